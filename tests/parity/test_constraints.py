"""Constrained output of a whole engine: in the form that was asked for, and the same in any company.

Alone and in a batch, with steps that overlap and without, under pressure that moves it between the tiers.
"""

import json
import re
from collections.abc import Sequence

import pytest
from drive import Outcome, config_for, drive, preempting_every
from jsonschema import validate
from tokenizers import Tokenizer

from tidegate.engine.build import build_engine
from tidegate.engine.core import EngineCore
from tidegate.engine.demo import checkpoint_path
from tidegate.engine.messages import Finish, Submit
from tidegate.engine.request import FinishReason, Request, SamplingParams, StructuredOutput

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


def test_a_request_that_is_cancelled_while_its_grammar_is_made_is_gone():
    core = engine(**AMPLE)
    params = SamplingParams(structured_output=JSON_FORM)
    core.handle(Submit(Request(id="r", prompt_token_ids=[5], params=params, seed=1)))
    core.handle(Finish("r", FinishReason.CANCELLED))
    ends = []
    while core.has_work() or not ends:
        output = core.step()
        assert not output.deltas
        assert not output.refused
        ends += output.finished
        core.check_integrity()
    core.close()
    assert [end.reason for end in ends] == [FinishReason.CANCELLED]
