"""The failure table: each row, and where two clients meet it."""

import ast
from pathlib import Path

import pytest
from fake_engine import FAULTS

from tidegate.service.errors import CODES

FOLDER = Path(__file__).parent
TESTS = Path(__file__).parents[2]

BOTH_CLIENTS: dict[str, tuple[str, ...]] = {
    "the client cancels": (
        "test_requests.py::test_a_cancelled_call_frees_its_request",
        "test_requests.py::test_a_request_cancelled_in_a_session_ends_finished",
    ),
    "time limit, in the queue": (
        "test_time.py::test_a_time_limit_in_the_queue_means_that_nothing_ran",
        "test_time.py::test_a_queue_that_outlasts_the_time_limit_is_not_entered",
    ),
    "time limit, running": ("test_time.py::test_at_the_deadline_what_there_is_is_delivered",),
    "slow reader": ("test_time.py::test_a_reader_that_takes_nothing_loses_its_stream",),
    "half-open TCP": ("test_time.py::test_a_half_open_connection_is_noticed_and_its_request_freed",),
    "prompt and max_tokens can never fit": (
        "test_requests.py::test_what_can_never_fit_is_refused_before_it_waits",
    ),
    "bad UTF-8, undecodable bytes": (
        "test_requests.py::test_bytes_that_are_no_message_are_an_invalid_argument",
    ),
    "parameters out of range": ("test_requests.py::test_all_that_is_wrong_is_told_at_once",),
    "queue full": (
        "test_room.py::test_without_room_a_call_is_refused_before_headers",
        "test_room.py::test_without_room_a_sessions_request_is_refused_and_the_session_goes_on",
        "test_room.py::test_grpcs_own_retries_come_back_when_the_server_asked",
    ),
    "tenant over quota": ("test_room.py::test_without_room_a_call_is_refused_before_headers",),
    "a swap copy fails, for good": (
        "test_server_faults.py::test_a_request_that_the_engine_cannot_compute_fails_alone",
    ),
    "device out of memory": (
        "test_server_faults.py::test_a_request_that_the_engine_cannot_compute_fails_alone",
    ),
    "NaN logits": ("test_server_faults.py::test_a_request_that_the_engine_cannot_compute_fails_alone",),
    "the engine process dies, another one comes": (
        "test_server_faults.py::test_a_stream_goes_on_when_another_engine_comes",
    ),
    "the engine process dies, no other one comes": (
        "test_server_faults.py::test_where_no_other_engine_comes_calls_are_told_when_to_come_back",
    ),
    "a request kills the engine": (
        "test_server_faults.py::test_a_request_that_kills_the_engine_is_refused_for_good_and_others_finish",
    ),
    "SIGTERM": (
        "test_server_faults.py::test_a_draining_server_sends_elsewhere",
        "test_server_faults.py::test_a_draining_server_sends_its_sessions_away_and_finishes_their_requests",
    ),
    "unknown model": ("test_requests.py::test_another_model_is_not_found",),
    "still loading": ("test_server_faults.py::test_while_the_model_loads_a_call_is_told_when_to_come_back",),
    "thousands of streams at once": (
        "test_room.py::test_of_many_streams_at_once_each_is_admitted_or_refused_with_a_reason",
    ),
    "no credentials": ("test_callers.py::test_strangers_are_unauthenticated",),
    "not allowed": ("test_callers.py::test_another_tenants_requests_are_for_routers_alone",),
    "memory pressure": ("test_room.py::test_short_of_memory_new_calls_are_shed",),
}
"""Rows that a client sees: these tests run once with grpcio and once with grpc-js."""

NO_CLIENT: dict[str, tuple[str, ...]] = {
    "host tier full": (
        "unit/memory/test_tiers.py::test_where_the_host_is_full_the_longest_parked_gives_up_its_tail",
        "e2e/test_storm.py::test_every_request_ends_once_and_no_block_stays_in_use",
    ),
    "missing, truncated or corrupt weights; unsupported architecture": (
        "service/test_serve.py::test_a_model_that_cannot_be_loaded_is_one_line_and_status_1",
        "unit/test_weights.py::test_a_missing_tensor_is_named",
        "unit/test_weights.py::test_a_truncated_file_is_named_with_the_tensor_that_is_cut",
        "unit/test_weights.py::test_a_file_with_a_broken_header_is_named",
        "unit/test_weights.py::test_what_the_decoder_does_not_do_is_refused_by_its_key",
    ),
    "TLS misconfigured": (
        "service/test_serve.py::test_a_file_of_tls_that_cannot_be_read_ends_the_start_at_once",
    ),
}
"""Rows that no client sees: the server does not start, or nothing is to be noticed."""

OF_ONE_FEATURE = {
    "GRAMMAR_TOO_COMPLEX",
    "LEASES_FULL",
    "NO_CHAT_TEMPLATE",
    "NO_TOKEN_ALLOWED",
    "OFFSET_OUT_OF_RANGE",
    "PARENT_GONE",
    "PARENT_RUNNING",
    "PROFILE_RUNNING",
    "REQUEST_GONE",
    "REQUEST_MOVED",
    "ROLE_REQUIRED",
    "SERVICE_UNKNOWN",
    "SESSION_FULL",
    "SESSION_SUPERSEDED",
    "TOO_MANY_SESSIONS",
}
"""Reasons that are no row: the tests of turns, resuming, sessions, administration and constraints ask for
them."""


def arguments(test: str, folder: Path) -> set[str]:
    """Of the test of this name, ``FILE::FUNCTION``."""
    file, _, name = test.partition("::")
    for node in ast.parse((folder / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return {argument.arg for argument in node.args.args}
    raise AssertionError(f"there is no {test}")


@pytest.mark.parametrize("row", BOTH_CLIENTS)
def test_two_clients_meet_the_row(row: str) -> None:
    for test in BOTH_CLIENTS[row]:
        assert "connect" in arguments(test, FOLDER), f"{test} is not run by both clients"


@pytest.mark.parametrize("row", NO_CLIENT)
def test_the_row_that_no_client_meets_has_its_tests(row: str) -> None:
    for test in NO_CLIENT[row]:
        arguments(test, TESTS)


def test_every_reason_is_asserted_somewhere() -> None:
    """A reason that is new needs a row, or a test of the feature that it belongs to."""
    by_both = _reasons_in(FOLDER) | set(FAULTS.values())
    assert set(CODES) - by_both == OF_ONE_FEATURE
    assert _reasons_in(FOLDER.parent) >= OF_ONE_FEATURE


def _reasons_in(folder: Path) -> set[str]:
    """What the tests of a folder spell out."""
    return {
        node.value
        for file in folder.glob("test_*.py")
        if file != Path(__file__)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
