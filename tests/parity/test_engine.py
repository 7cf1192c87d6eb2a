"""The engine says what transformers says, however its work was batched, cut up, moved and resumed.

In fp32 the tokens are the same, except where the reference itself is undecided: at a first divergence
its best logit may lead by less than ``NEAR_TIE``; then the rest is held against the reference fed with
our tokens. Such prompts are counted, and may be one in a thousand.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, VOCAB_SIZE
from drive import assert_nothing_held, config_for, drive, preempting_every, requests_for
from transformers import AutoModelForCausalLM, PreTrainedModel

from tidegate.engine.build import build_engine
from tidegate.engine.messages import Release
from tidegate.engine.request import Parent, Request, SamplingParams

NEAR_TIE = 1e-4
PROMPTS_EACH = 19
ALONE = 5
"""Prompts of each checkpoint that also run with nothing beside them."""
OUTPUT = 40
BLOCK = 8

PRESSURE = {
    "all": {"device_kv_tokens": 4096, "host_kv_tokens": 8192},
    "swap": {"device_kv_tokens": 240, "host_kv_tokens": 8192, "preemption": "swap"},
    "recompute": {"device_kv_tokens": 240, "host_kv_tokens": 0, "preemption": "recompute"},
    "auto": {"device_kv_tokens": 240, "host_kv_tokens": 512, "preemption": "auto"},
}
"""KV for everything, and for about a quarter of what the prompts of a checkpoint come to need."""


def variations() -> list[dict[str, object]]:
    """Every combination of pressure, prefix caching, chunk and depth, each with or without the hook."""
    product = itertools.product(PRESSURE, (True, False), (1, 7, 64), (1, 2))
    return [
        {
            **PRESSURE[pressure],
            "prefix_caching": caching,
            "max_step_tokens": chunk,
            "pipeline_depth": depth,
            "hook": (number % 3 == 0),
        }
        for number, (pressure, caching, chunk, depth) in enumerate(product)
    ]


VARIATIONS = variations()


def variations_of(variant: str) -> Iterator[dict[str, object]]:
    """Every seventh combination, from another one for each checkpoint: all run, each on several."""
    number = list(VARIANTS).index(variant)
    return itertools.islice(VARIATIONS, number % 7, None, 7)


def prompts_for(variant: str) -> list[list[int]]:
    """Ragged lengths from 1 to 60; some share a prefix of several blocks."""
    rng = random.Random(variant)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(21)]
    prompts = []
    for i in range(PROMPTS_EACH):
        own = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 39))]
        prompts.append(shared + own if i % 3 == 0 else own)
    return prompts


@dataclass
class Tally:
    """Comparisons made, those that a near tie decided, and what pressure did, over the whole module."""

    compared: int = 0
    near_ties: list[str] = field(default_factory=list)
    swapped_in: int = 0
    recomputed: int = 0

    def compare(
        self, model: PreTrainedModel, prompt: list[int], wanted: list[int], ours: list[int], name: str
    ) -> None:
        """The same tokens, or a near tie of the reference's own."""
        self.compared += 1
        if ours != wanted:
            margin = explain(model, prompt, ours)
            assert margin < NEAR_TIE, f"{name}: off by {margin}"
            self.near_ties.append(f"{name}: {margin:.1e}")


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    print(f"\n{tally.compared} outputs compared, near ties: {tally.near_ties or 'none'}")
    assert len(tally.near_ties) <= max(1, tally.compared // 1000)
    assert tally.swapped_in > 0, "no variation moved a block"
    assert tally.recomputed > 0, "no variation computed anything again"


@torch.inference_mode()
def reference_tokens(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """Greedy generation by transformers, one prompt at a time, past any end of sequence."""
    cache, ids, output = None, torch.tensor([prompt]), []
    for _ in range(length):
        step = model(ids, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        output.append(int(step.logits[0, -1].argmax()))
        ids = torch.tensor([[output[-1]]])
    return output


@torch.inference_mode()
def explain(model: PreTrainedModel, prompt: list[int], ours: list[int]) -> float:
    """The widest margin by which the reference, fed with our tokens, would have said something else."""
    logits = model(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(ours)[:, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())


def load_reference(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_output_is_that_of_transformers(
    variant: str, checkpoint: Callable[[str], Path], tally: Tally
) -> None:
    """Every token, alone, and under every variation of batch, memory, chunking, caching and depth."""
    path = checkpoint(variant)
    model, prompts = load_reference(path), prompts_for(variant)
    expected = [reference_tokens(model, prompt, OUTPUT) for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    for variation in variations_of(variant):
        options = dict(variation)
        hook = preempting_every(5) if options.pop("hook") else None
        core = build_engine(config_for(str(path), **options))
        try:
            outcome = drive(core, requests_for(prompts, params), hook)
            stats = core.stats()
        finally:
            core.close()
        tally.swapped_in += stats.swap_in_bytes
        tally.recomputed += stats.recomputed_tokens
        for i, (prompt, wanted) in enumerate(zip(prompts, expected, strict=True)):
            tally.compare(model, prompt, wanted, outcome.tokens[f"r{i}", 0], f"{variant}/{i}, {variation}")
    core = build_engine(config_for(str(path), **PRESSURE["all"]))
    for request, wanted in zip(requests_for(prompts[:ALONE], params), expected, strict=False):
        ours = drive(core, [request]).tokens[request.id, 0]
        tally.compare(model, request.prompt_token_ids, wanted, ours, f"{variant}/{request.id}, alone")
    core.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", ["llama-head-40", "qwen2-yarn-one-kv-head", "llama-biases"])
def test_seeded_output_does_not_depend_on_how_it_was_served(
    variant: str, checkpoint: Callable[[str], Path], tally: Tally
) -> None:
    """Sampling with a seed gives each request, alone, batched or moved about, the same tokens."""
    path, prompts = checkpoint(variant), prompts_for(variant)[:10]
    kinds = [
        SamplingParams(temperature=0.8, top_k=20, max_tokens=OUTPUT, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.9, min_p=0.02, max_tokens=OUTPUT, ignore_eos=True),
        SamplingParams(temperature=1.3, presence_penalty=0.5, repetition_penalty=1.2, max_tokens=OUTPUT),
    ]
    requests = [r for k, p in enumerate(kinds) for r in _renamed(requests_for(prompts, p, seed=k * 100), k)]
    alone = {}
    core = build_engine(config_for(str(path), **PRESSURE["all"], prefix_caching=False, pipeline_depth=1))
    for request in requests:
        alone.update(drive(core, [request]).tokens)
    core.close()
    for variation in variations_of(variant):
        options = dict(variation)
        hook = preempting_every(5) if options.pop("hook") else None
        core = build_engine(config_for(str(path), **options))
        together = drive(core, requests, hook).tokens
        core.close()
        for key, tokens in alone.items():
            tally.compared += 1
            assert together[key] == tokens, f"{key} under {variation}"


def _renamed(requests: list, kind: int) -> list:
    for request in requests:
        request.id = f"{kind}-{request.id}"
    return requests


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", ["qwen2", "llama-head-40", "qwen2-window-of-every-other-layer"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_conversation_is_that_of_transformers_on_the_whole_transcript(
    variant: str, depth: int, checkpoint: Callable[[str], Path], tally: Tally
) -> None:
    """Each turn goes on from the KV of the one before, of which most had to leave the device meanwhile."""
    path = checkpoint(variant)
    model, rng = load_reference(path), random.Random(variant)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    options = {**PRESSURE["swap"], "pipeline_depth": depth, "prefix_caching": False, "park_grace": 0.0}
    core = build_engine(config_for(str(path), **options))
    transcripts: list[list[int]] = [[] for _ in range(8)]
    new = 0
    for turn in range(4):
        requests = []
        for i, transcript in enumerate(transcripts):
            told = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
            # The last token of a turn has no KV when it ends.
            new += len(told) + (turn > 0)
            parent = Parent(f"{i}, turn {turn - 1}") if turn else None
            name, prompt = f"{i}, turn {turn}", transcript + told
            requests.append(
                Request(
                    id=name, prompt_token_ids=prompt, params=params, seed=0, parent=parent, is_leased=True
                )
            )
        outcome = drive(core, requests)
        core.handle(Release([f"{i}, turn {turn - 1}" for i in range(8)]))
        for i, request in enumerate(requests):
            ours, prompt = outcome.tokens[request.id, 0], request.prompt_token_ids
            tally.compare(model, prompt, reference_tokens(model, prompt, 9), ours, f"{variant}, {request.id}")
            transcripts[i] = prompt + ours
    stats = core.stats()
    core.handle(Release([request.id for request in requests]))
    core.step()
    assert_nothing_held(core)
    core.close()
    assert stats.swap_in_bytes > 0
    assert stats.recomputed_tokens == 0
    assert stats.prompt_tokens == new


def test_a_window_lets_a_sequence_grow_past_the_device_tier(
    checkpoint: Callable[[str], Path], tally: Tally
) -> None:
    """Two sequences of 230 tokens, where the device tier holds 128: what the window has passed goes."""
    path = checkpoint("mistral-window")
    model, rng = load_reference(path), random.Random(3)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(150)] for _ in range(2)]
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    options = {"device_kv_tokens": 128, "host_kv_tokens": 256, "max_step_tokens": 16}
    core = build_engine(config_for(str(path), **options))
    outcome = drive(core, requests_for(prompts, params), preempting_every(20))
    stats = core.stats()
    core.close()
    for i, prompt in enumerate(prompts):
        wanted = reference_tokens(model, prompt, 80)
        tally.compare(model, prompt, wanted, outcome.tokens[f"r{i}", 0], f"long/{i}")
    assert stats.device.total * BLOCK == 128
    assert stats.preemptions_swap > 0


def test_a_prefix_is_shared_from_the_window_before_its_end(
    checkpoint: Callable[[str], Path], tally: Tally
) -> None:
    """The later prompts begin with a long one that is over: they compute their own tokens alone."""
    path = checkpoint("qwen2-window-of-upper-layers")
    model, rng = load_reference(path), random.Random(4)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(20 * BLOCK)]
    prompts = [[*shared, *(rng.randrange(3, VOCAB_SIZE) for _ in range(5))] for _ in range(3)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    core = build_engine(config_for(str(path), **PRESSURE["all"]))
    for request in requests_for(prompts, params):
        ours, prompt = drive(core, [request]).tokens[request.id, 0], request.prompt_token_ids
        tally.compare(model, prompt, reference_tokens(model, prompt, 20), ours, f"shared, {request.id}")
    stats = core.stats()
    core.close()
    assert stats.prefix_hit_tokens == 2 * len(shared)
    assert stats.prompt_tokens == len(shared) + 3 * 5


@pytest.mark.parametrize("variant", ["qwen2", "mistral-window"])
def test_choices_of_one_request_differ(variant: str, checkpoint: Callable[[str], Path]) -> None:
    """n samples share the prompt's blocks and nothing else; each is what its index and seed say."""
    core = build_engine(config_for(str(checkpoint(variant)), **PRESSURE["all"]))
    prompt = list(range(5, 45))
    params = SamplingParams(n=5, temperature=1.0, max_tokens=12, ignore_eos=True)
    first = drive(core, requests_for([prompt], params, seed=7)).tokens
    again = drive(core, requests_for([prompt], params, seed=7)).tokens
    computed = core.stats().prompt_tokens
    core.close()
    assert len({tuple(tokens) for tokens in first.values()}) == 5
    assert first == again
    assert computed < 2 * len(prompt) + 9 * BLOCK
