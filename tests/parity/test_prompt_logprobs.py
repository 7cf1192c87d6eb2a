"""Logprobs of prompts are those of transformers, however the prompts were batched, cut up and moved."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import VOCAB_SIZE
from drive import Hook, Outcome, assert_nothing_held, config_for, drive, preempting_every, requests_for
from transformers import AutoModelForCausalLM, PreTrainedModel

from tidegate.engine.build import build_engine
from tidegate.engine.llm import LLM
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import Finish, PositionLogprobs, Release, Submit
from tidegate.engine.model import scoring
from tidegate.engine.request import FinishReason, Parent, Request, SamplingParams

CLOSE = 1e-4
BLOCK = 8
ROOM = {"device_kv_tokens": 4096, "host_kv_tokens": 8192}
SWAP = {"device_kv_tokens": 160, "host_kv_tokens": 8192, "preemption": "swap"}
RECOMPUTE = {"device_kv_tokens": 160, "host_kv_tokens": 0, "preemption": "recompute"}
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=3)


def prompts() -> list[list[int]]:
    """Of 1 to 70 tokens; some begin alike."""
    rng = random.Random(5)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(20)]
    lengths = [1, 2, 9, 33, 50, 17, 40, 8]
    own = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    return [shared + tokens if i % 2 else tokens for i, tokens in enumerate(own)]


def load_reference(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def assert_scored(
    model: PreTrainedModel, prompt: list[int], got: list[PositionLogprobs], top: int = 3
) -> None:
    """Each of the prompt's tokens but the first, given those before it."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    assert [position.chosen.token_id for position in got] == prompt[1:]
    for position, expected in zip(got, logprobs, strict=True):
        best, chosen = expected.topk(max(top, 1)).values, position.chosen
        assert chosen.logprob == pytest.approx(expected[chosen.token_id].item(), abs=CLOSE)
        ahead = int((expected > chosen.logprob + CLOSE).sum())
        assert ahead < chosen.rank <= 1 + int((expected > chosen.logprob - CLOSE).sum())
        assert [each.rank for each in position.top] == list(range(1, top + 1))
        for each, value in zip(position.top, best.tolist(), strict=False):
            assert each.logprob == pytest.approx(value, abs=CLOSE)
            assert each.logprob == pytest.approx(expected[each.token_id].item(), abs=CLOSE)


def run(path: Path, requests: list[Request], hook: Hook | None = None, **options: object) -> Outcome:
    core = build_engine(config_for(str(path), **options))
    outcome = drive(core, requests, hook)
    core.close()
    return outcome


@pytest.mark.parametrize("variant", ["llama-head-40", "qwen2-window-of-every-other-layer"])
@pytest.mark.parametrize("room", [ROOM, SWAP, RECOMPUTE], ids=["room", "swap", "recompute"])
@pytest.mark.parametrize(("chunk", "depth"), [(1, 1), (7, 2), (64, 2)])
def test_each_value_comes_once_and_is_that_of_transformers(
    variant: str, room: dict[str, object], chunk: int, depth: int, checkpoint: Callable[[str], Path]
) -> None:
    """With a prefix cache that holds a part, and preemption in the middle of prompts. ``Outcome`` refuses a
    value that comes twice, or one that is left out.
    """
    path = checkpoint(variant)
    model, asked = load_reference(path), requests_for(prompts(), PARAMS)
    hook = preempting_every(3) if room is not ROOM else None
    outcome = run(path, asked, hook, max_step_tokens=chunk, pipeline_depth=depth, **room)
    for request in asked[1:]:
        assert_scored(model, request.prompt_token_ids, outcome.prompt_logprobs[request.id])
    assert asked[0].id not in outcome.prompt_logprobs, "a single token has no other before it"


def test_few_logits_at_a_time_give_the_same(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do where the vocabulary is large: here three rows at once, of a chunk of 64."""
    monkeypatch.setattr(scoring, "_LOGITS", 3 * VOCAB_SIZE + 1)
    path = checkpoint("qwen2")
    asked = requests_for(prompts()[3:], PARAMS)
    outcome = run(path, asked, max_step_tokens=64, **ROOM)
    for request in asked:
        assert_scored(load_reference(path), request.prompt_token_ids, outcome.prompt_logprobs[request.id])


def test_what_the_tiers_hold_of_such_a_prompt_is_computed_again_and_of_others_is_not(
    checkpoint: Callable[[str], Path],
) -> None:
    """The prefix of an earlier request, the KV of a parent; and what a swapped one has is not lost."""
    path = checkpoint("qwen2")
    model, prompt = load_reference(path), prompts()[3]
    core = build_engine(config_for(str(path), **ROOM))
    plain = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    first = Request(id="first", prompt_token_ids=prompt, params=plain, seed=0, is_leased=True)
    output = drive(core, [first]).tokens["first", 0]
    turn = [*prompt, *output, 5, 6, 7]
    asked = [
        Request(id="same", prompt_token_ids=prompt, params=PARAMS, seed=0),
        Request(id="turn", prompt_token_ids=turn, params=PARAMS, seed=0, parent=Parent("first")),
    ]
    again = Request(id="plain", prompt_token_ids=prompt, params=plain, seed=0, is_leased=True)
    outcome = drive(core, [*asked, again])
    core.handle(Release(["first", "plain"]))
    core.step()
    assert_nothing_held(core)
    core.close()
    for request in asked:
        assert_scored(model, request.prompt_token_ids, outcome.prompt_logprobs[request.id])
        assert outcome.finished[request.id, 0].usage.cached_tokens == 0
        assert outcome.finished[request.id, 0].usage.recomputed_tokens == 0
    assert outcome.finished["plain", 0].usage.cached_tokens == len(prompt) // BLOCK * BLOCK


def test_a_swap_in_the_middle_of_a_prompt_computes_nothing_again(checkpoint: Callable[[str], Path]) -> None:
    path, asked = checkpoint("qwen2"), requests_for(prompts()[3:], PARAMS)
    outcome = run(path, asked, preempting_every(3), max_step_tokens=7, **SWAP)
    assert any(end.usage.preemptions for end in outcome.finished.values())
    assert all(end.usage.recomputed_tokens == 0 for end in outcome.finished.values())


def test_choices_share_the_values_of_their_prompt(checkpoint: Callable[[str], Path]) -> None:
    """Also where the choice that computed them was ended in the middle: another one goes on."""
    path, prompt = checkpoint("qwen2"), prompts()[3]
    params = SamplingParams(n=3, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
    (request,) = requests_for([prompt], params)
    outcome = run(path, [request], preempting_every(4), max_step_tokens=5, **ROOM)
    assert_scored(load_reference(path), prompt, outcome.prompt_logprobs["r0"], top=0)

    core = build_engine(config_for(str(path), max_step_tokens=5, prefix_caching=False, **RECOMPUTE))
    outcome = Outcome()
    core.handle(Submit(request))
    for _ in range(5):
        outcome.take(core.step())
    core.handle(Finish("r0", FinishReason.CANCELLED, choice=0, at_offset=0))
    outcome.take(core.step())
    # What it goes on from is computed again, and not told again.
    assert core.scheduler.preempt("r0")
    while len(outcome.finished) < 3:
        outcome.take(core.step())
    core.close()
    assert_scored(load_reference(path), prompt, outcome.prompt_logprobs["r0"], top=0)


def test_an_engine_that_takes_over_gives_the_rest(checkpoint: Callable[[str], Path]) -> None:
    """In the middle of the prompt, and behind it."""
    path, prompt = checkpoint("qwen2"), prompts()[3]
    whole = run(path, requests_for([prompt], PARAMS), **ROOM)
    for told, output in ((17, []), (len(prompt) - 1, whole.tokens["r0", 0][:2])):
        (request,) = requests_for([prompt], PARAMS)
        request.num_scored, request.choices = told, {0: output}
        core = build_engine(config_for(str(path), max_step_tokens=7, **ROOM))
        core.handle(Submit(request))
        rest: list[PositionLogprobs] = []
        while core.has_work():
            for scored in core.step().prompt_logprobs:
                assert scored.offset == 1 + told + len(rest)
                rest += scored.positions
        core.close()
        assert len(rest) == len(prompt) - 1 - told
        if rest:
            assert_scored(load_reference(path), prompt, whole.prompt_logprobs["r0"][:told] + rest)


def test_a_lookup_that_is_not_skipped_is_seen(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: with the known prefix taken as ever, its values would be missing."""
    start_of = BlockManager.start_of
    prompt = prompts()[3]
    monkeypatch.setattr(BlockManager, "start_of", lambda self, table, _: start_of(self, table, prompt))
    asked = requests_for([prompt, prompt], PARAMS)
    core = build_engine(config_for(str(checkpoint("qwen2")), **ROOM))
    drive(core, asked[:1])
    with pytest.raises(AssertionError, match="left out"):
        drive(core, asked[1:])
    core.close()


def test_offline_each_prompt_token_has_an_entry_and_the_first_has_none() -> None:
    with LLM("demo", **ROOM) as llm:
        scored, plain = llm.generate(
            ["Once upon a time", "Once upon a time"],
            [SamplingParams(max_tokens=1, prompt_logprobs=2), SamplingParams(max_tokens=1)],
            use_tqdm=False,
        )
    assert plain.prompt_logprobs is None
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    ids = [position.chosen.token_id for position in scored.prompt_logprobs[1:] if position is not None]
    assert ids == scored.prompt_token_ids[1:]
    assert all(position is None or len(position.top) == 2 for position in scored.prompt_logprobs)
