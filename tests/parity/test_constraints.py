"""Constrained output of a whole engine: in the form that was asked for, and the same in any company.

Alone and in a batch, with steps that overlap and without, under pressure that moves it between the tiers.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from drive import Outcome, assert_nothing_held, config_for, drive, preempting_every
from jsonschema import validate
from tokenizers import Tokenizer

from tidegate.engine.build import build_engine
from tidegate.engine.core import EngineCore
from tidegate.engine.demo import checkpoint_path
from tidegate.engine.grammar import Grammars
from tidegate.engine.messages import Finish, Limit, Release, Submit, Update
from tidegate.engine.request import FinishReason, Parent, Request, SamplingParams, StructuredOutput

TOKENIZER = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "color": {"enum": ["red", "green", "blue"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
    },
    "required": ["name", "color", "ages"],
    "x-guidance": {"whitespace_pattern": " ?"},
    "additionalProperties": False,
}
JSON_FORM = StructuredOutput(json_schema=SCHEMA)
REGEX = r"[A-Z][a-z]{1,6} (has|had) [0-9]{1,3} kites\."
BAD_WORDS = ("the", "had", " a", "was")
AMPLE = {"device_kv_tokens": 8192, "host_kv_tokens": 8192, "block_size": 16}
TIGHT = {"device_kv_tokens": 384, "host_kv_tokens": 8192, "block_size": 16, "preemption": "swap"}


def requests() -> list[Request]:
    """Of all kinds, free ones between them."""
    asks = []
    for temperature in (0, 1):
        common = {"temperature": temperature, "max_tokens": 90}
        asks += [
            SamplingParams(structured_output=JSON_FORM, **common),
            SamplingParams(**{**common, "max_tokens": 40}),
            SamplingParams(structured_output=StructuredOutput(regex=REGEX), **common),
            SamplingParams(bad_words=BAD_WORDS, **{**common, "max_tokens": 40}),
            SamplingParams(structured_output=JSON_FORM, bad_words=('"r', '"b'), **common),
            SamplingParams(structured_output=JSON_FORM, ignore_eos=True, n=2, **common),
        ]
    prompts = ["Once upon a time", "There is a baker", "Tell me of a kite. " * 6]
    return [
        Request(id=f"r{i}", prompt_token_ids=ids(prompts[i % 3]), params=params, seed=i)
        for i, params in enumerate(asks)
    ]


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def engine(depth: int = 2, **options: object) -> EngineCore:
    return build_engine(config_for("demo", device="cpu", pipeline_depth=depth, **options))


def text(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens)))


class Compiling:
    """Holds each grammar that begins to be compiled until the test lets it go on."""

    def __init__(self, output: Callable[[Grammars, StructuredOutput], Any]) -> None:
        self.may_end = threading.Event()
        self._output = output
        self._begun = threading.Semaphore(0)
        self._seen = 0

    def await_calls(self, number: int) -> None:
        """Until ``number`` have begun, of all so far."""
        while self._seen < number:
            assert self._begun.acquire(timeout=60)
            self._seen += 1

    def output(self, grammars: Grammars, form: StructuredOutput) -> Any:
        self._begun.release()
        assert self.may_end.wait(60)
        return self._output(grammars, form)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiling]:
    held = Compiling(Grammars.output)
    monkeypatch.setattr(Grammars, "output", lambda grammars, form: held.output(grammars, form))
    yield held
    held.may_end.set()


@pytest.fixture(scope="module")
def expected() -> Outcome:
    """Each request with nothing beside it."""
    core = engine(**AMPLE)
    outcome = Outcome()
    for request in requests():
        alone = drive(core, [request])
        outcome.tokens |= alone.tokens
        outcome.finished |= alone.finished
    core.close()
    return outcome


def test_outputs_have_the_form_that_was_asked_for(expected):
    for request in requests():
        params, form = request.params, request.params.structured_output
        for choice in range(params.n):
            said, end = text(expected.tokens[request.id, choice]), expected.finished[request.id, choice]
            assert not [word for word in params.bad_words if word in said]
            if form is JSON_FORM:
                assert end.reason is FinishReason.GRAMMAR_COMPLETE
                value = json.loads(said)
                validate(value, SCHEMA)
                assert '"r' not in params.bad_words or value["color"] == "green"
            elif form is not None:
                assert re.fullmatch(REGEX, said), said
                assert end.reason is FinishReason.GRAMMAR_COMPLETE


@pytest.mark.parametrize(
    ("depth", "options"), [(1, AMPLE), (2, AMPLE), (2, TIGHT), (1, {**TIGHT, "preemption": "recompute"})]
)
def test_outputs_are_the_same_in_any_company(expected, depth, options):
    core = engine(depth, **options, max_num_seqs=8)
    hook = preempting_every(7, times=2) if options is not AMPLE else None
    got = drive(core, requests(), hook)
    preemptions = core.stats().preemptions_swap + core.stats().preemptions_recompute
    core.close()
    assert got.tokens == expected.tokens
    reasons = {key: end.reason for key, end in expected.finished.items()}
    assert {key: end.reason for key, end in got.finished.items()} == reasons
    assert preemptions > 0 or options is AMPLE


def test_an_engine_that_takes_over_goes_on_as_the_first_one_would(expected):
    """It is told the choices with their outputs so far, cut wherever the first engine died."""
    asked = [request for request in requests() if request.params.structured_output is JSON_FORM]
    core = engine(**AMPLE)
    for cut in (1, 9, 20):
        for request in asked:
            tokens = {choice: expected.tokens[request.id, choice] for choice in range(request.params.n)}
            known = {choice: output[:cut] for choice, output in tokens.items()}
            again = Request(
                id=request.id,
                prompt_token_ids=request.prompt_token_ids,
                params=request.params,
                seed=request.seed,
                choices=known,
            )
            core.handle(Submit(again))
            rest: dict[int, list[int]] = {choice: [] for choice in known}
            ends = {}
            while len(ends) < len(known):
                output = core.step()
                assert not output.refused
                for delta in output.deltas:
                    rest[delta.choice] += delta.token_ids
                ends |= {end.choice: end.reason for end in output.finished}
            assert {choice: known[choice] + rest[choice] for choice in known} == tokens
            assert set(ends.values()) == {FinishReason.GRAMMAR_COMPLETE}
    core.close()


def test_output_that_is_whole_already_ends_at_once():
    core = engine(**AMPLE)
    given = ids("Tam had 5 kites.")
    params = SamplingParams(structured_output=StructuredOutput(regex=REGEX), max_tokens=50)
    core.handle(Submit(Request(id="r", prompt_token_ids=[5], params=params, seed=1, output_token_ids=given)))
    ends = []
    while not ends:
        output = core.step()
        assert not output.deltas
        assert not output.refused
        ends += output.finished
    core.close()
    assert ends[0].reason is FinishReason.GRAMMAR_COMPLETE


def test_a_dead_end_ends_its_request_and_no_other():
    """Behind "a" the form wants a digit, and none may come."""
    allowed = tuple({*ids("a"), *ids("b")})
    params = SamplingParams(
        structured_output=StructuredOutput(regex="(a|b)[0-9]"), allowed_token_ids=allowed, max_tokens=9
    )
    core = engine(**AMPLE)
    stuck = Request(id="stuck", prompt_token_ids=ids("Once"), params=params, seed=1)
    other = Request(id="other", prompt_token_ids=ids("Once"), params=SamplingParams(max_tokens=9), seed=1)
    ends = drive(core, [stuck, other]).finished
    core.close()
    assert (ends["stuck", 0].reason, ends["stuck", 0].error) == (FinishReason.ERROR, "NO_TOKEN_ALLOWED")
    assert ends["other", 0].reason is FinishReason.MAX_TOKENS


def test_a_turn_and_a_branch_are_constrained_from_their_own_first_token_on():
    """Whatever the request was constrained to whose KV they start from, and whether it has ended or runs."""
    regex = SamplingParams(structured_output=StructuredOutput(regex=REGEX), max_tokens=60, temperature=1)
    parent = Request(id="p", prompt_token_ids=ids("Once upon a time"), params=regex, seed=4, is_leased=True)
    core = engine(**AMPLE)
    said = drive(core, [parent]).tokens["p", 0]
    transcript = parent.prompt_token_ids + said
    turn = Request(
        id="turn",
        prompt_token_ids=[*transcript, *ids(" And then")],
        params=SamplingParams(structured_output=JSON_FORM, max_tokens=90),
        seed=5,
        parent=Parent("p"),
        is_leased=True,
    )
    branch = msgspec.structs.replace(
        turn, id="branch", prompt_token_ids=transcript[:-3], params=regex, seed=6
    )
    again = msgspec.structs.replace(parent, id="again", emit_upto=3)
    core.handle(Submit(again))
    running = Outcome()
    while len(running.tokens.get(("again", 0), ())) < 3:
        running.take(core.step())
    of_running = msgspec.structs.replace(
        branch, id="of one that runs", prompt_token_ids=transcript[: -len(said) + 2], parent=Parent("again")
    )
    got = drive(core, [turn, branch, of_running])
    core.handle(Finish("again", FinishReason.CANCELLED))
    core.handle(Release(["p", "again", "turn", "branch", "of one that runs"]))
    assert [end.request_id for end in core.step().finished] == ["again"]
    assert_nothing_held(core)
    alone = {}
    for request in (turn, branch, of_running):
        alone |= drive(core, [msgspec.structs.replace(request, parent=None, is_leased=False)]).tokens
    core.close()
    assert got.tokens == alone
    validate(json.loads(text(got.tokens["turn", 0])), SCHEMA)
    for name in ("branch", "of one that runs"):
        assert re.fullmatch(REGEX, text(got.tokens[name, 0]))


@pytest.mark.parametrize("held", [False, True], ids=["while it waits for credit", "while it is compiled"])
def test_an_update_holds_beside_a_constraint(held, compiling):
    """It may become longer; and it ends at a token that has become a stop token."""
    (letter,) = ids("a")
    form = StructuredOutput(regex="a{30}")
    params = SamplingParams(structured_output=form, allowed_token_ids=(letter,), max_tokens=5)
    core = engine(**AMPLE)
    if not held:
        compiling.may_end.set()
    for name in ("longer", "stopped"):
        core.handle(Submit(Request(id=name, prompt_token_ids=[5], params=params, seed=1, emit_upto=2)))
    outcome = Outcome()
    while not held and [len(told) for told in outcome.tokens.values()] != [2, 2]:
        outcome.take(core.step())
    core.handle(Update("longer", max_tokens=60))
    core.handle(Update("stopped", stop_token_ids=(letter,)))
    compiling.may_end.set()
    for name in ("longer", "stopped"):
        core.handle(Limit(name, 100))
    while len(outcome.finished) < 2:
        outcome.take(core.step())
        core.check_integrity()
    core.close()
    ended = {name: (end.reason, len(outcome.tokens[name, 0])) for (name, _), end in outcome.finished.items()}
    assert ended == {
        "longer": (FinishReason.GRAMMAR_COMPLETE, 30),
        "stopped": (FinishReason.STOP_TOKEN, 1 if held else 3),
    }


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.DEADLINE])
def test_a_request_may_end_while_its_constraint_is_compiled(reason, compiling):
    """Nothing is held for it then, and what was compiled for it is not for the next one of its name."""
    core = engine(**AMPLE)
    form = StructuredOutput(regex="[a-z]{4}")
    ask = Request(
        id="r",
        prompt_token_ids=ids("Once"),
        params=SamplingParams(structured_output=form, n=2, max_tokens=9),
        seed=1,
        deadline=time.monotonic() if reason is FinishReason.DEADLINE else None,
    )
    core.handle(Submit(ask))
    compiling.await_calls(1)
    if reason is FinishReason.CANCELLED:
        core.handle(Finish("r", reason))
    outcome = Outcome()
    while len(outcome.finished) < 2:
        outcome.take(core.step())
        core.check_integrity()
    assert {end.reason for end in outcome.finished.values()} == {reason}
    params = SamplingParams(structured_output=StructuredOutput(regex="[0-9]{4}"), max_tokens=9)
    core.handle(Submit(Request(id="r", prompt_token_ids=ids("Once"), params=params, seed=1)))
    compiling.await_calls(2)
    compiling.may_end.set()
    outcome = Outcome()
    while not outcome.finished:
        outcome.take(core.step())
        core.check_integrity()
    assert_nothing_held(core)
    core.close()
    assert set(outcome.tokens) == {("r", 0)}
    assert re.fullmatch("[0-9]{4}", text(outcome.tokens["r", 0]))


def test_an_engine_closes_while_constraints_are_compiled(compiling):
    """It waits for those under way, and leaves no thread."""
    before = set(threading.enumerate())
    core = engine(**AMPLE)
    params = SamplingParams(structured_output=JSON_FORM)
    for i in range(5):
        core.handle(Submit(Request(id=f"r{i}", prompt_token_ids=[5], params=params, seed=1)))
    compiling.await_calls(1)
    closing = threading.Thread(target=core.close)
    closing.start()
    compiling.may_end.set()
    closing.join(60)
    assert not closing.is_alive()
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in left if name.startswith("tidegate-grammars")]
