"""Metrics as Prometheus scrapes them, and the names under which callers find their requests again."""

import asyncio
import itertools
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import POISON
from front import Front, open_session, refusal_of, until
from prometheus_client.parser import text_string_to_metric_families

from tidegate.engine.client import EngineGone
from tidegate.engine.config import ConfigError
from tidegate.engine.messages import DURATION_BOUNDS, Durations, Stats, SwapStats
from tidegate.service.admission import AdmissionLimits
from tidegate.v1 import inference_pb2

Start = Callable[..., Any]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

GENERATE = "/tidegate.v1.InferenceService/Generate"


def unary(text: str = "the tide", max_tokens: int = 3, **fields: Any) -> inference_pb2.GenerateUnaryRequest:
    return inference_pb2.GenerateUnaryRequest(
        prompt={"text": text}, sampling={"max_tokens": max_tokens}, **fields
    )


@pytest.fixture
async def front(start_front: Start) -> Front:
    started: Front = await start_front(metrics_address="127.0.0.1:0")
    return started


async def scrape(front: Front) -> str:
    def read() -> str:
        with urllib.request.urlopen(f"http://{front.server.listener.metrics_address}/metrics") as response:
            text: str = response.read().decode()
            return text

    return await asyncio.to_thread(read)


async def samples(front: Front) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(await scrape(front))
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


async def test_requests_are_counted_by_how_they_end(front: Front) -> None:
    await front.inference.GenerateUnary(unary())
    await front.inference.GenerateUnary(unary(max_tokens=7))
    await refusal_of(front.inference.GenerateUnary(unary(f"x{POISON}")))
    await refusal_of(front.inference.GenerateUnary(unary(max_tokens=10**6)))
    front.engine.admits = False
    leaving = front.inference.Generate(inference_pb2.GenerateRequest(prompt={"text": "x"}))
    await until(lambda: front.engine.waiting)
    leaving.cancel()
    await until(lambda: not front.engine.waiting)
    found = await samples(front)

    def ended(code: str, reason: str) -> float:
        return value(found, "tidegate_requests_total", code=code, reason=reason)

    assert ended("OK", "max_tokens") == 2
    assert ended("INTERNAL", "NONFINITE_LOGITS") == 1
    assert ended("INVALID_ARGUMENT", "INVALID_REQUEST") == 1
    assert ended("CANCELLED", "client_left") == 1
    assert value(found, "tidegate_request_seconds_count") == 5
    assert value(found, "tidegate_queue_seconds_count") == 3
    assert value(found, "tidegate_time_to_first_token_seconds_count") == 2
    assert value(found, "tidegate_inter_token_latency_seconds_count") == 2 + 6
    assert value(found, "tidegate_output_tokens_sum") == 3 + 7
    assert value(found, "tidegate_prompt_tokens_sum") == 2 * len("the tide")


async def test_latencies_fall_into_their_buckets(start_front: Start) -> None:
    """Steps of 30 ms: no gap between tokens is shorter."""
    front = await start_front(metrics_address="127.0.0.1:0", step_seconds=0.03)
    await front.inference.GenerateUnary(unary(max_tokens=5))
    found = await samples(front)
    name = "tidegate_inter_token_latency_seconds"
    assert value(found, f"{name}_bucket", le="0.025") == 0
    assert value(found, f"{name}_bucket", le="+Inf") == value(found, f"{name}_count") == 4
    assert value(found, f"{name}_sum") >= 4 * 0.03
    buckets = [value for (found_name, _), value in found.items() if found_name == f"{name}_bucket"]
    assert all(lower <= upper for lower, upper in itertools.pairwise(buckets))


async def test_several_choices_of_one_step_are_no_latency(front: Front) -> None:
    request = inference_pb2.GenerateUnaryRequest(prompt={"text": "x"}, sampling={"max_tokens": 4, "n": 5})
    await front.inference.GenerateUnary(request)
    assert value(await samples(front), "tidegate_inter_token_latency_seconds_count") == 3


async def test_rpcs_are_counted_by_method_and_code_and_sessions_while_they_last(front: Front) -> None:
    session = await open_session(front)
    found = await samples(front)
    assert value(found, "tidegate_sessions") == 1
    await session.send(close={})
    await session.rest()
    async for _ in front.inference.Generate(
        inference_pb2.GenerateRequest(prompt={"text": "x"}, sampling={"max_tokens": 1})
    ):
        pass
    await refusal_of(front.inference.Generate(inference_pb2.GenerateRequest()))
    found = await samples(front)
    assert value(found, "tidegate_sessions") == 0
    assert value(found, "tidegate_rpcs_total", method=GENERATE, code="OK") == 1
    assert value(found, "tidegate_rpcs_total", method=GENERATE, code="INVALID_ARGUMENT") == 1
    assert value(found, "tidegate_rpcs_active", method=GENERATE) == 0


async def test_the_state_of_queue_and_tiers_is_that_of_the_engine(start_front: Start) -> None:
    front = await start_front(metrics_address="127.0.0.1:0", admission=AdmissionLimits(max_waiting=5))
    front.engine.preempted = {0}
    running = front.inference.GenerateUnary(unary())
    await until(lambda: front.engine.running)
    front.engine.admits = False
    waiting = front.inference.GenerateUnary(unary("four"))
    await until(lambda: front.engine.waiting)
    front.engine.go_on()

    found = await samples(front)
    assert value(found, "tidegate_requests_waiting") == value(found, "vllm:num_requests_waiting") == 1
    assert value(found, "tidegate_requests_waiting_tokens") == len("four")
    assert value(found, "vllm:num_requests_running") == 1
    assert value(found, "tidegate_sequences", state="running") == 1
    blocks = {
        (tier, state): value(found, "tidegate_kv_blocks", tier=tier, state=state)
        for tier in ("device", "host")
        for state in ("free", "dirty", "other")
    }
    assert (blocks["device", "dirty"], blocks["host", "other"]) == (1, 0)
    assert sum(blocks[tier, state] for tier, state in blocks if tier == "device") == 64
    assert sum(blocks[tier, state] for tier, state in blocks if tier == "host") == 128
    assert value(found, "vllm:kv_cache_usage_perc") == pytest.approx(1 / 64)
    assert (
        value(found, "vllm:cache_config_info", block_size="16", num_gpu_blocks="64", num_cpu_blocks="128")
        == 1
    )
    front.engine.admits, front.engine.preempted = True, set()
    front.engine.go_on()
    await asyncio.gather(running, waiting)


async def test_copies_and_waits_are_told_by_direction_and_reason(front: Front) -> None:
    front.engine.report = Stats(
        swap_out=SwapStats({"park": 100, "ahead": 20}, seconds=1.5, queue_bytes=7, utilization=0.25),
        swap_in=SwapStats({"resume": 50}),
        preempted_blocks=10,
        preempted_clean_blocks=9,
        resume_wait=Durations([0, 2, *[0] * (len(DURATION_BOUNDS) - 1)], 0.004),
        host_hit_tokens_prefix=11,
        thrashed_blocks=3,
    )
    await front.inference.GenerateUnary(unary())
    found = await samples(front)
    swapped = "tidegate_kv_swap_bytes_total"
    assert value(found, swapped, direction="out", reason="park") == 100
    assert value(found, swapped, direction="in", reason="resume") == 50
    assert value(found, "tidegate_kv_swap_seconds_total", direction="out") == 1.5
    assert value(found, "tidegate_kv_swap_queue_bytes", direction="out") == 7
    assert value(found, "tidegate_kv_link_utilization_ratio", direction="out") == 0.25
    assert value(found, "tidegate_kv_clean_at_preempt_ratio") == 0.9
    assert value(found, "tidegate_kv_host_hit_tokens_total", **{"class": "prefix"}) == 11
    assert value(found, "tidegate_kv_thrash_total") == 3
    assert value(found, "tidegate_resume_wait_seconds_bucket", le="0.001") == 0
    assert value(found, "tidegate_resume_wait_seconds_bucket", le="0.0025") == 2
    assert value(found, "tidegate_resume_wait_seconds_count") == 2


async def test_every_metric_has_a_help_text_and_our_prefix_or_that_of_gateways(front: Front) -> None:
    await front.inference.GenerateUnary(unary())
    for family in text_string_to_metric_families(await scrape(front)):
        assert family.documentation
        assert re.fullmatch(r"(tidegate_|vllm:)[a-z_]+", family.name)


async def test_engines_that_took_the_place_of_others_are_counted(start_front: Start) -> None:
    fronts: list[Front] = []

    async def restart(gone: EngineGone) -> None:
        fronts[0].engine.revive()

    fronts.append(await start_front(metrics_address="127.0.0.1:0", restart=restart))
    (front,) = fronts
    assert value(await samples(front), "tidegate_engine_restarts_total") == 0
    for _ in range(2):
        front.engine.kill()
        await front.inference.GenerateUnary(unary())
    assert value(await samples(front), "tidegate_engine_restarts_total") == 2


async def test_a_port_that_is_taken_ends_the_start(front: Front, tmp_path: Path, start_front: Start) -> None:
    with pytest.raises(ConfigError, match=r"metrics_port .* cannot be opened"):
        await start_front(
            metrics_address=front.server.listener.metrics_address, addresses=[f"unix:{tmp_path}/another"]
        )


# --- the caller's own name for an RPC ---------------------------------------------------------------------


async def test_a_callers_request_id_comes_back_in_the_trailers(front: Front) -> None:
    metadata = (("x-request-id", "abc-123"),)
    call = front.inference.GenerateUnary(unary(), metadata=metadata)
    await call
    assert dict(iter(await call.trailing_metadata()))["x-request-id"] == "abc-123"
    refusal = await refusal_of(front.inference.GenerateUnary(unary(max_tokens=10**6), metadata=metadata))
    assert refusal.trailers["x-request-id"] == "abc-123"
    assert refusal.reason == "INVALID_REQUEST"
    stream = front.inference.Generate(
        inference_pb2.GenerateRequest(prompt={"text": "x"}, sampling={"max_tokens": 1}), metadata=metadata
    )
    async for _ in stream:
        pass
    assert dict(iter(await stream.trailing_metadata()))["x-request-id"] == "abc-123"


async def test_a_request_that_the_server_failed_is_in_the_log_by_all_its_names(
    front: Front, capsys: pytest.CaptureFixture[str]
) -> None:
    call = front.inference.GenerateUnary(
        unary(f"the tide{POISON}", request_id="r-1"), metadata=(("x-request-id", "abc-123"),)
    )
    await refusal_of(call)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "request failed" in line]
    for part in ("r-1", "local", "NONFINITE_LOGITS", "abc-123"):
        assert part in line
    assert "tide" not in line


@pytest.mark.parametrize("name", ["", "x" * 129])
async def test_a_name_that_can_stand_in_no_log_is_left_out(front: Front, name: str) -> None:
    call = front.inference.GenerateUnary(unary(), metadata=(("x-request-id", name),))
    await call
    assert "x-request-id" not in dict(iter(await call.trailing_metadata()))


async def test_without_a_port_there_are_no_metrics(start_front: Start) -> None:
    front = await start_front()
    await front.inference.GenerateUnary(unary())
    assert front.server.listener.metrics_address is None
