"""The sampler: what it keeps, what it draws, and that neither depends on the rest of the batch."""

import math

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tidegate.engine.model.sampler import Sampled, Sampler
from tidegate.engine.request import SamplingParams
from tidegate.engine.step import RowSetup

EOS = [1, 2]
GREEDY = SamplingParams(temperature=0)


def sample(
    logits: torch.Tensor,
    params: SamplingParams | list[SamplingParams],
    history: list[int] | list[list[int]] = (),
    num_prompt_tokens: int = 0,
    seeds: list[int] | None = None,
    sample_index: int = 0,
) -> Sampled:
    """One row for each row of the logits; a single history or params serves all rows."""
    count = len(logits)
    histories = history if history and isinstance(history[0], list) else [list(history)] * count
    every = params if isinstance(params, list) else [params] * count
    sampler = Sampler(count + 3, EOS)
    tokens = np.full((count + 3, 64), 9, np.int32)
    rows = np.arange(count)[::-1].copy() + 2
    for i, row in enumerate(rows.tolist()):
        known = histories[i]
        tokens[row, : len(known)] = known
        seed = i if seeds is None else seeds[i]
        sampler.set_row(RowSetup(row, known, num_prompt_tokens, [], every[i], seed, sample_index))
    positions = np.array([len(known) for known in histories])
    return sampler.sample(logits.clone(), rows, positions, tokens)


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def warped_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers would draw one row's token from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].double())[0].softmax(-1)


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=3.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10_000),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.3),
    SamplingParams(top_p=0.999999),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=2.0, top_p=0.95, min_p=0.1),
]


@pytest.mark.parametrize("params", FILTERS, ids=repr)
def test_draws_follow_the_distribution_of_transformers(params):
    """Never a token that it cuts, and each kept one as often as its probability says (chi-squared)."""
    logits = random_logits(1, 60)
    draws = 6000
    tokens = sample(logits.expand(draws, -1), params).token_ids
    expected = warped_probabilities(logits[0], params).numpy() * draws
    counts = np.bincount(tokens, minlength=60)
    assert counts[expected == 0].sum() == 0
    common = expected > 8
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    score = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    freedom = max(1, len(observed) - 1)
    assert score < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=50.0, top_p=0.7),
        SamplingParams(temperature=50.0, top_k=900, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=1999),
        SamplingParams(temperature=2.0, top_p=0.5),
    ],
    ids=repr,
)
def test_a_wide_filter_cuts_where_transformers_does(params):
    """Far beyond the first candidates: thousands of draws stay within the kept, and reach its end."""
    logits = random_logits(1, 2000, scale=1.0)
    kept = warped_probabilities(logits[0], params) > 0
    drawn = torch.zeros(2000, dtype=torch.bool)
    drawn[sample(logits.expand(3000, -1), params).token_ids] = True
    assert not (drawn & ~kept).any()
    rare_end = logits[0].masked_fill(~kept, torch.inf).argsort()[: int(kept.sum()) // 3]
    assert drawn[rare_end].any()


def test_tokens_that_tie_at_a_cut_are_kept_together():
    """So that no sort order decides: with two of three equal tokens wanted, all three may come."""
    logits = torch.tensor([[0.0, 5.0, -9.0, 5.0, 5.0]])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        assert set(sample(logits.expand(200, -1), params).token_ids.tolist()) == {1, 3, 4}


def test_ties_take_the_lowest_id():
    """Greedy, in a plain batch and in a mixed one, and over a vocabulary wide enough for several threads."""
    logits = torch.zeros(3, 200_000)
    logits[0, [150_000, 199_999, 70_001]] = 3
    logits[1, [5, 6]] = 1
    mixed = [GREEDY, SamplingParams(temperature=0, logprobs=0), SamplingParams(temperature=0, min_tokens=1)]
    for params in (GREEDY, mixed):
        assert sample(logits, params).token_ids.tolist() == [70_001, 5, 0]


def test_each_kind_of_row_gets_the_same_token_alone_and_in_a_mixed_batch():
    """Fifty rows of every kind at once, in a batch of another order than their row numbers."""
    kinds = [
        GREEDY,
        *FILTERS,
        SamplingParams(temperature=0, repetition_penalty=1.7, logprobs=3),
        SamplingParams(presence_penalty=1.0, frequency_penalty=0.7, top_k=30),
        SamplingParams(min_tokens=30, stop_token_ids=(3,), min_p=0.01),
        SamplingParams(temperature=0, logit_bias={7: 9.0, 299: -4.5}),
        SamplingParams(top_p=0.9, frequency_penalty=0.7, logit_bias={30: 6.0, 31: -100.0}, logprobs=2),
    ]
    params = [kinds[i % len(kinds)] for i in range(50)]
    logits = random_logits(50, 300)
    history = [list(range(i % 40, 60)) for i in range(50)]
    together = sample(logits, params, history, num_prompt_tokens=10)
    for i in range(50):
        alone = sample(logits[i : i + 1], params[i], [history[i]], num_prompt_tokens=10, seeds=[i])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]


def test_a_draw_depends_on_seed_sample_index_and_position_alone():
    logits = torch.zeros(1, 5000)
    params = SamplingParams()

    def draw(seed: int = 1, sample_index: int = 0, position: int = 4) -> int:
        return int(sample(logits, params, [5] * position, 0, [seed], sample_index).token_ids[0])

    assert draw() == draw()
    assert len({draw(), draw(seed=2), draw(seed=2**64 - 1), draw(sample_index=1), draw(position=5)}) == 5


def test_noise_of_a_token_is_the_same_whether_filters_are_on_or_off():
    """A filter that keeps the winner leaves the draw as it is."""
    logits = random_logits(300, 100, scale=1.0)
    whole = sample(logits, SamplingParams(temperature=0.7)).token_ids
    filtered = sample(logits, SamplingParams(temperature=0.7, top_k=99)).token_ids
    assert (whole == filtered).mean() > 0.98


def test_repetition_penalty_is_that_of_transformers_over_prompt_and_output():
    logits = random_logits(40, 50)
    history = np.random.default_rng(0).integers(0, 50, (40, 25))
    expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.from_numpy(history), logits.clone()).argmax(1)
    params = SamplingParams(temperature=0, repetition_penalty=1.8)
    got = sample(logits, params, history.tolist(), num_prompt_tokens=12)
    assert got.token_ids.tolist() == expected.tolist()
    assert (expected != logits.argmax(1)).any()


def test_presence_and_frequency_count_output_tokens_only():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    prompt = [0, 0, 0]

    def best(output: list[int], **penalties: float) -> int:
        params = SamplingParams(temperature=0, **penalties)
        return int(sample(logits, params, prompt + output, num_prompt_tokens=3).token_ids[0])

    assert best([], presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert best([0], presence_penalty=1.5) == 1
    assert best([0, 0, 0, 1], presence_penalty=1.5) == 0
    assert best([0, 0, 0], frequency_penalty=0.5) == 1
    assert best([0], frequency_penalty=0.5) == 0
    assert best([3], frequency_penalty=-2.0, presence_penalty=-2.0) == 3


def test_tokens_behind_the_known_ones_are_not_history():
    """A row keeps what an earlier, longer sequence left behind, beside a row that is longer now."""
    sampler = Sampler(2, EOS)
    params = SamplingParams(temperature=0, repetition_penalty=5.0, presence_penalty=2.0)
    for row in range(2):
        sampler.set_row(RowSetup(row, [3], 1, [], params, 0, 0))
    tokens = np.array([[3, 0, 0, 0], [1, 1, 1, 0]], np.int32)
    logits = torch.tensor([[2.0, 1.0, 0.5, 1.9], [2.0, 1.0, 0.5, 1.9]])
    sampled = sampler.sample(logits, np.array([0, 1]), np.array([1, 3]), tokens)
    assert sampled.token_ids.tolist() == [0, 0]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=7, top_p=0.8, min_p=0.01),
        SamplingParams(repetition_penalty=1.8, presence_penalty=0.5, frequency_penalty=-0.5),
        SamplingParams(min_tokens=30, stop_token_ids=(3, 4), repetition_penalty=0.5),
    ],
    ids=repr,
)
def test_a_bias_is_added_before_anything_else(params):
    """As if the model had given these logits, to whatever follows: bias +100 or not, an end stays banned."""
    logits, rng = random_logits(40, 50), np.random.default_rng(0)
    history = rng.integers(0, 50, (40, 25)).tolist()
    biases = [dict(zip(rng.permutation(50)[:9].tolist(), rng.normal(0, 4, 9), strict=True)) for _ in history]
    biases[5][3] = 100.0
    shifted = logits.clone()
    for row, logit_bias in enumerate(biases):
        for token, bias in logit_bias.items():
            shifted[row, token] += bias
    asked = [msgspec.structs.replace(params, logit_bias=logit_bias) for logit_bias in biases]
    got = sample(logits, asked, history, num_prompt_tokens=12).token_ids.tolist()
    assert got == sample(shifted, params, history, num_prompt_tokens=12).token_ids.tolist()
    assert got != sample(logits, params, history, num_prompt_tokens=12).token_ids.tolist()


def test_a_bias_bans_or_forces_a_token_and_is_not_in_the_logprobs():
    """Nor does it outlive its row's request."""
    logits = random_logits(2, 50)
    best = logits.argmax(1).tolist()
    params = SamplingParams(temperature=0, logprobs=1, logit_bias={best[0]: -100.0, 17: 100.0})
    got = sample(logits, [params, GREEDY])
    assert got.token_ids.tolist() == [17, best[1]]
    raw = logits[0].log_softmax(-1)
    assert got.logprobs[0].chosen.logprob == pytest.approx(raw[17].item(), abs=1e-5)
    assert got.logprobs[0].top[0].token_id == best[0]

    sampler, tokens = Sampler(1, EOS), np.zeros((1, 8), np.int32)
    for asked, expected in ((params, 17), (GREEDY, best[0])):
        sampler.set_row(RowSetup(0, [1], 1, [], asked, 0, 0))
        sampled = sampler.sample(logits[:1].clone(), np.array([0]), np.array([1]), tokens)
        assert sampled.token_ids.tolist() == [expected]


def test_min_tokens_keeps_end_tokens_out_until_it_is_reached():
    """Both of the model's ends and the request's; ids beyond the vocabulary do no harm."""
    logits = torch.tensor([[0.0, 9.0, 8.0, 7.0, 6.0]])

    def best(num_outputs: int, **kwargs: object) -> int:
        params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(3, 70_000), **kwargs)
        return int(sample(logits, params, [0] * (4 + num_outputs), num_prompt_tokens=4).token_ids[0])

    assert [best(outputs) for outputs in (0, 1, 2)] == [4, 4, 1]
    assert best(0, ignore_eos=True) == 1


def test_min_tokens_holds_for_random_rows_too():
    logits = torch.tensor([[0.0, 9.0, 9.0, 9.0, 0.0]]).expand(100, -1)
    params = SamplingParams(min_tokens=1, stop_token_ids=(3,))
    assert set(sample(logits, params).token_ids.tolist()) == {0, 4}


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=0, presence_penalty=1.0, logprobs=3), *FILTERS], ids=repr
)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_marked_and_give_a_valid_id(params, poison):
    """The neighbours' tokens are what they are without it."""
    logits = random_logits(3, 30)
    expected = sample(logits, params).token_ids
    logits[1, 17] = poison
    got = sample(logits, params)
    assert got.finite.tolist() == [True, False, True]
    assert 0 <= got.token_ids[1] < 30
    assert got.token_ids[[0, 2]].tolist() == expected[[0, 2]].tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 2e-5])
def test_a_tiny_temperature_is_greedy_and_overflows_nothing(temperature):
    logits = random_logits(20, 40, scale=30)
    got = sample(logits, SamplingParams(temperature=temperature))
    assert got.token_ids.tolist() == logits.argmax(1).tolist()


def test_logprobs_are_those_of_the_raw_logits():
    """Whatever temperature, penalties and filters did to the choice."""
    logits = random_logits(8, 50)
    params = SamplingParams(temperature=2.0, top_k=40, repetition_penalty=2.0, logprobs=5)
    got = sample(logits, params, [4, 5, 6], num_prompt_tokens=1)
    raw = logits.double().log_softmax(-1)
    for i in range(8):
        entry, token = got.logprobs[i], int(got.token_ids[i])
        assert entry.chosen.token_id == token
        assert entry.chosen.logprob == pytest.approx(raw[i, token].item(), abs=1e-5)
        assert entry.chosen.rank == 1 + int((raw[i] > raw[i, token]).sum())
        values, ids = raw[i].topk(5)
        assert [top.token_id for top in entry.top] == ids.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(values.tolist(), abs=1e-5)
        assert [top.rank for top in entry.top] == [1, 2, 3, 4, 5]


def test_logprobs_rank_ties_by_id_and_none_or_zero_are_not_the_same():
    logits = torch.zeros(3, 6)
    params = [SamplingParams(temperature=0, logprobs=n) for n in (3, 0, None)]
    three, zero, none = sample(logits, params).logprobs
    assert [(top.token_id, top.rank) for top in three.top] == [(0, 1), (1, 2), (2, 3)]
    assert (zero.top, zero.chosen.rank) == ([], 1)
    assert none is None
    drawn = sample(torch.zeros(1, 6), SamplingParams(logprobs=0), seeds=[5])
    assert drawn.logprobs[0].chosen.rank == drawn.token_ids[0] + 1


def test_half_precision_logits_are_sampled_in_fp32():
    logits = random_logits(30, 100).bfloat16()
    params = SamplingParams(temperature=0.8, top_p=0.9)
    assert sample(logits, params).token_ids.tolist() == sample(logits.float(), params).token_ids.tolist()
