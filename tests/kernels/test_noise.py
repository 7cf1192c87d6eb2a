"""The noise: reproducible to the bit, and as good as independent draws in every direction it is keyed by.

Statistics are of fixed keys, so a test gives the same figure on every run; limits are at about 5 sigma.
"""

import functools
import math

import numpy as np
import pytest
import torch

from tidegate.kernels.noise import gumbel_noise, noise_keys

TOKENS, ROWS = 2000, 500

# What changes from one row to the next; the rest stands still.
DIRECTIONS = ["positions", "sample_indices", "seeds", "seed_high_bits"]


@functools.cache
def uniforms(direction: str, tokens: int = TOKENS, rows: int = ROWS) -> np.ndarray:
    """(rows, tokens) uniform numbers: the noise through the Gumbel distribution's own function."""
    steps = np.arange(rows, dtype=np.uint64)
    still = np.zeros(rows, np.int64)
    seeds = {"seeds": steps, "seed_high_bits": steps << np.uint64(52)}.get(direction, np.full_like(steps, 42))
    indices = steps.astype(np.int64) if direction == "sample_indices" else still
    positions = steps.astype(np.int64) if direction == "positions" else still + 17
    keys = torch.from_numpy(noise_keys(seeds, indices, positions))
    noise = gumbel_noise(keys[:, None], torch.arange(tokens, dtype=torch.int32))
    return torch.exp(-torch.exp(-noise.double())).numpy()


def normal_score(samples: np.ndarray) -> float:
    """Distance of a correlation from 0 in standard deviations, for two columns of samples."""
    return float(np.corrcoef(samples)[0, 1] * math.sqrt(samples.shape[1]))


def test_known_values():
    """Frozen: another value would change the output of every seeded request."""
    keys = torch.from_numpy(
        noise_keys(np.array([0, 2**64 - 1], np.uint64), np.array([0, 3]), np.array([0, 9]))
    )
    noise = gumbel_noise(keys[:, None], torch.tensor([0, 1, 151_935], dtype=torch.int32))
    assert keys.tolist() == [[956087953, 595752380], [-189818314, 1480038333]]
    torch.testing.assert_close(
        noise,
        torch.tensor([[0.455238, 0.245833, -0.454042], [0.243106, 1.668135, 0.764321]]),
        rtol=0,
        atol=2e-6,
    )


def test_the_device_mix_is_unsigned_32_bit_arithmetic():
    """Against the same mix in numpy's uint32, where shifts and overflow are defined."""
    keys = np.array([[0, 0], [-1, 1], [-(2**31), 2**31 - 1], [123456789, -987654321]], np.int32)
    ids = np.array([0, 1, 2, 77777, 2**31 - 1], np.int32)

    def mix(x: np.ndarray) -> np.ndarray:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x

    low, high = keys.view(np.uint32)[:, :1], keys.view(np.uint32)[:, 1:]
    words = mix(mix(ids.view(np.uint32) ^ low) ^ high) & np.uint32(2**31 - 1)
    v = np.minimum((words + 0.5) / 2**31, 1 - 2.0**-24)
    got = gumbel_noise(torch.from_numpy(keys)[:, None], torch.from_numpy(ids))
    torch.testing.assert_close(got.double(), torch.from_numpy(-np.log(-np.log1p(-v))), rtol=1e-5, atol=1e-5)


def test_noise_of_a_token_does_not_depend_on_which_others_are_asked_for():
    keys = torch.from_numpy(noise_keys(np.array([7], np.uint64), np.array([0]), np.array([3])))
    everything = gumbel_noise(keys, torch.arange(5000, dtype=torch.int32))
    some = torch.tensor([4999, 0, 77], dtype=torch.int32)
    assert torch.equal(gumbel_noise(keys.expand(3, 2), some), everything[some.long()])


def test_noise_is_finite_at_both_ends_of_the_uniform():
    """For the tokens whose words come out as all zeros and as all ones, found by undoing the mix."""

    def unmix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint32(16))) * np.uint32(pow(0x846CA68B, -1, 2**32))
        x = (x ^ (x >> np.uint32(15)) ^ (x >> np.uint32(30))) * np.uint32(pow(0x7FEB352D, -1, 2**32))
        return x ^ (x >> np.uint32(16))

    ends = np.array([0, 2**31 - 1, 2**32 - 1, 2**31], np.uint32)
    tokens = torch.from_numpy(unmix(unmix(ends)).view(np.int32))
    noise = gumbel_noise(torch.zeros(1, 2, dtype=torch.int32), tokens)
    largest, smallest = 32 * math.log(2), -math.log(24 * math.log(2))
    torch.testing.assert_close(noise, torch.tensor([largest, smallest, smallest, largest]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_uniform_over_tokens_and_over_rows(direction):
    """Chi-squared over 100 bins: of all numbers, and of each column and row as the worst of its kind."""
    u = uniforms(direction)

    def chi2(samples: np.ndarray, bins: int) -> float:
        counts = np.histogram(samples, bins, (0, 1))[0]
        expected = samples.size / bins
        return float((((counts - expected) ** 2).sum() / expected - (bins - 1)) / math.sqrt(2 * (bins - 1)))

    assert abs(chi2(u, 100)) < 5
    assert max(chi2(row, 20) for row in u) < 7
    assert max(chi2(column, 20) for column in u.T[:500]) < 7


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mean_and_variance_are_those_of_a_uniform(direction):
    u = uniforms(direction)
    assert abs(u.mean() - 0.5) * math.sqrt(12 * u.size) < 5
    assert abs(u.var() - 1 / 12) * math.sqrt(180 * u.size) < 5


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("lag", [1, 2, 3, 64, 256])
def test_neighbours_are_not_correlated(direction, lag):
    """Neighbouring rows (positions, sample indices, seeds) and, within a row, neighbouring tokens."""
    u = uniforms(direction)
    assert abs(normal_score(np.stack([u[:-lag].ravel(), u[lag:].ravel()]))) < 5
    assert abs(normal_score(np.stack([u[:, :-lag].ravel(), u[:, lag:].ravel()]))) < 5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pairs_fill_the_square(direction):
    """Chi-squared of (u, next u) over 32 by 32 cells, which sees what a correlation does not."""
    u = uniforms(direction)
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        counts = np.histogram2d(a.ravel(), b.ravel(), 32, [[0, 1], [0, 1]])[0]
        expected = a.size / counts.size
        score = (((counts - expected) ** 2).sum() / expected - counts.size) / math.sqrt(2 * counts.size)
        assert abs(score) < 5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_runs_above_and_below_the_median_are_as_many_as_by_chance(direction):
    """Along positions (or seeds, or sample indices) and along tokens."""
    above = uniforms(direction) > 0.5
    for sequence in (above, above.T):
        changes = (sequence[1:] != sequence[:-1]).sum()
        trials = sequence[1:].size
        assert abs(changes - trials / 2) / math.sqrt(trials / 4) < 5


def test_every_key_bit_flips_half_of_the_output_bits():
    """Avalanche: one bit of seed, sample index or position moves each key bit with probability 1/2."""
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**63, 4000).astype(np.uint64)
    indices, positions = rng.integers(0, 64, 4000), rng.integers(0, 2**20, 4000)
    base = noise_keys(seeds, indices, positions)
    changed = [noise_keys(seeds ^ np.uint64(1 << bit), indices, positions) for bit in (0, 1, 31, 32, 63)]
    changed += [noise_keys(seeds, indices ^ 1, positions), noise_keys(seeds, indices, positions ^ (1 << 12))]
    for other in changed:
        flipped = np.unpackbits((base ^ other).view(np.uint8), axis=1)
        assert np.abs(flipped.mean(0) - 0.5).max() < 0.05


def test_the_three_parts_of_a_key_cannot_stand_in_for_each_other():
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(20), np.arange(20)), -1).reshape(-1, 3)
    keys = noise_keys(grid[:, 0].astype(np.uint64), grid[:, 1], grid[:, 2])
    assert len(np.unique(keys.view(np.int64))) == len(grid)
