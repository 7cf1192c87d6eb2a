"""Tokens drawn by the kernel against those of the CPU's sampler, for the same requests and positions."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tidegate.engine.model.sampler import Sampler
from tidegate.engine.request import SamplingParams
from tidegate.engine.step import RowSetup
from tidegate.kernels.noise import gumbel_noise as cpu_gumbel_noise
from tidegate.kernels.noise import noise_keys
from tidegate.kernels.triton.sampling import SamplingRows, gumbel_noise, mix32, sample

VOCAB = 5000  # more than a tile, and no multiple of it
REQUESTS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=1),
    SamplingParams(top_k=50, temperature=1.7),
    SamplingParams(top_k=VOCAB),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_p=0.999, temperature=3),
    SamplingParams(top_k=20, top_p=0.8),
    SamplingParams(top_k=3, top_p=0.9999),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=100, top_p=0.95, min_p=0.02, temperature=0.8),
]


def parameters(requests: list[SamplingParams], positions_R: np.ndarray) -> SamplingRows:
    seeds_R = np.arange(len(requests), dtype=np.uint64)
    with np.errstate(divide="ignore"):
        log_min_p_R = np.log(np.array([params.min_p for params in requests], np.float32))
    return SamplingRows(
        torch.tensor([params.temperature for params in requests]),
        torch.tensor([params.top_k or VOCAB for params in requests], dtype=torch.int32),
        torch.tensor([params.top_p for params in requests], dtype=torch.float64),
        torch.from_numpy(log_min_p_R),
        torch.from_numpy(noise_keys(seeds_R, np.zeros(len(requests), np.int64), positions_R)),
    )


def cpu_tokens(requests: list[SamplingParams], logits_RV: torch.Tensor, positions_R: np.ndarray) -> list[int]:
    sampler = Sampler(len(requests), eos_token_ids=())
    for row, params in enumerate(requests):
        sampler.set_row(RowSetup(row, [1], 1, [], params, seed=row, sample_index=0))
    tokens = np.zeros((len(requests), int(positions_R.max()) + 1), np.int32)
    sampled = sampler.sample(logits_RV.clone(), np.arange(len(requests)), positions_R, tokens)
    return sampled.token_ids.tolist()


@pytest.mark.parametrize("position", [1, 2, 3])
def test_tokens_are_those_of_the_cpu(position):
    logits_RV = torch.randn((len(REQUESTS), VOCAB), generator=torch.Generator().manual_seed(position)) * 3
    positions_R = np.full(len(REQUESTS), position)
    got = sample(logits_RV, parameters(REQUESTS, positions_R)).token_ids_R.tolist()
    assert got == cpu_tokens(REQUESTS, logits_RV, positions_R)


def test_tokens_that_tie_at_a_cut_stay_together_as_on_the_cpu():
    """Few distinct logits: every filter cuts through a tie, and many tokens tie for the best."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randint(0, 6, (len(REQUESTS), VOCAB), generator=generator).float()
    positions_R = np.arange(1, len(REQUESTS) + 1)
    got = sample(logits_RV, parameters(REQUESTS, positions_R)).token_ids_R.tolist()
    assert got == cpu_tokens(REQUESTS, logits_RV, positions_R)


def test_logits_of_minus_infinity_are_never_drawn():
    """What the caller has ruled out stays out, even where top_k asks for more tokens than are left."""
    logits_RV = torch.full((len(REQUESTS), VOCAB), -torch.inf)
    logits_RV[:, [7, 4500]] = 1.0
    for position in range(3):
        got = sample(logits_RV, parameters(REQUESTS, np.full(len(REQUESTS), position))).token_ids_R
        assert set(got.tolist()) <= {7, 4500}


# The interpreter computes with numpy, which warns of inf - inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_gives_a_valid_token_and_leaves_the_others_alone(value):
    logits_RV = torch.randn(len(REQUESTS), VOCAB)
    rows = parameters(REQUESTS, np.ones(len(REQUESTS), np.int64))
    expected_R, finite_R = sample(logits_RV, rows)
    assert finite_R.all()
    logits_RV[::2, 4321] = value
    assert sample(logits_RV, rows).finite_R.tolist() == [i % 2 for i in range(len(REQUESTS))]
    logits_RV[::2] = value
    got_R, finite_R = sample(logits_RV, rows)
    assert finite_R.tolist() == [i % 2 for i in range(len(REQUESTS))]
    assert torch.equal(got_R[1::2], expected_R[1::2])
    assert got_R.min() >= 0
    assert got_R.max() < VOCAB


@triton.jit
def _noise_kernel(noise_ptr, mixed_ptr, keys_ptr, COUNT: tl.constexpr):
    row = tl.program_id(0)
    tokens = tl.arange(0, COUNT)
    key_0, key_1 = tl.load(keys_ptr + row * 2), tl.load(keys_ptr + row * 2 + 1)
    tl.store(noise_ptr + row * COUNT + tokens, gumbel_noise(key_0, key_1, tokens))
    tl.store(mixed_ptr + row * COUNT + tokens, mix32(tokens.to(tl.uint32)).to(tl.int32))


def test_noise_is_that_of_the_cpu():
    """To a few last bits, the very large and the very small included; the integers are a bijection."""
    keys_R2 = torch.from_numpy(noise_keys(np.arange(20, dtype=np.uint64), np.arange(20), np.arange(20)))
    noise_RV, mixed_RV = torch.empty(20, 8192), torch.empty(20, 8192, dtype=torch.int32)
    _noise_kernel[(20,)](noise_RV, mixed_RV, keys_R2, COUNT=8192)
    expected_RV = cpu_gumbel_noise(keys_R2[:, None], torch.arange(8192, dtype=torch.int32))
    torch.testing.assert_close(noise_RV, expected_RV, rtol=2e-6, atol=2e-6)
    assert len(mixed_RV[0].unique()) == 8192


def test_what_does_not_fit_is_named():
    rows = parameters(REQUESTS[:2], np.ones(2, np.int64))
    with pytest.raises(ValueError, match="logits_RV"):
        sample(torch.zeros(3, VOCAB), rows)
    with pytest.raises(ValueError, match="top_k_R"):
        SamplingRows(rows.temperature_R, rows.top_p_R, rows.top_p_R, rows.log_min_p_R, rows.noise_keys_R2)
