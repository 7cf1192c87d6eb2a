# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""From adjusted logits to tokens, without a sort: what ``engine.model.sampler`` draws, on the GPU.

Four kernels: the best logit of each slice of a row; from those the row's best and what its filters keep;
the winner of each slice; the winner of the row. Only the second has one program a row, and it is short
where no filter is set.

A token's *distance* is how far its logit lies below the row's best. top_k and top_p each come down to the
largest distance that they keep, found by trying some: a pass over the row counts, or weighs, the tokens
within a distance, and says which distances come next to it. Of the tokens kept, the largest score plus
Gumbel noise wins, the noise being that of ``kernels.noise``; where tokens tie, the lowest id.

Legend: R rows, V vocabulary, C slices of it, X tokens of a slice or of a tile.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_SLICE = 4096
# Of the search: as many tokens as keep its passes over the row busy, and fit into registers.
_TILE = 4096


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """One entry for each row."""

    temperature_R: torch.Tensor
    """fp32; 0 takes the best token."""
    top_k_R: torch.Tensor
    """int32; V keeps all."""
    top_p_R: torch.Tensor
    """fp64; 1 keeps all."""
    log_min_p_R: torch.Tensor
    """fp32: natural logarithm of min_p; -inf keeps all."""
    noise_keys_R2: torch.Tensor
    """int32: of ``kernels.noise.noise_keys``."""

    def __post_init__(self) -> None:
        dtypes = (torch.float32, torch.int32, torch.float64, torch.float32, torch.int32)
        for name, dtype in zip(self.__slots__, dtypes, strict=True):
            tensor = getattr(self, name)
            if tensor.dtype != dtype or len(tensor) != len(self.temperature_R) or not tensor.is_contiguous():
                raise ValueError(f"{name}: must be contiguous, {dtype}, with one entry for each row")


class SampledRows(NamedTuple):
    """One entry for each row."""

    token_ids_R: torch.Tensor
    """int64."""
    finite_R: torch.Tensor
    """int32: 0 where the logits held NaN or infinity; that token is a valid id without a meaning."""


def sample(logits_RV: torch.Tensor, rows: SamplingRows) -> SampledRows:
    """The token of each row, and whether it means anything."""
    num_rows = len(logits_RV)
    if num_rows != len(rows.temperature_R):
        raise ValueError(f"logits_RV: {num_rows} rows with parameters for {len(rows.temperature_R)}")
    if logits_RV.stride(1) != 1:
        raise ValueError("logits_RV: rows must be contiguous")
    sampled = SampledRows(
        torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device),
        torch.empty(num_rows, dtype=torch.int32, device=logits_RV.device),
    )
    if num_rows:
        _launch(sampled, logits_RV, rows)
    return sampled


def _launch(sampled: SampledRows, logits_RV: torch.Tensor, rows: SamplingRows) -> None:
    num_rows, vocab_size = logits_RV.shape
    num_slices = triton.cdiv(vocab_size, _SLICE)
    slices_padded = triton.next_power_of_2(num_slices)
    best_RC = logits_RV.new_empty((num_rows, num_slices), dtype=torch.float32)
    ids_RC = logits_RV.new_empty((num_rows, num_slices), dtype=torch.int32)
    finite_RC = logits_RV.new_empty((num_rows, num_slices), dtype=torch.int32)
    best_R = logits_RV.new_empty(num_rows, dtype=torch.float32)
    kept_R = logits_RV.new_empty(num_rows, dtype=torch.float32)
    # Without fused multiply-add: scores must be those of the CPU to the bit, or tokens at a filter's cut
    # would come and go.
    _best_kernel[(num_rows, num_slices)](
        best_RC,
        ids_RC,
        finite_RC,
        logits_RV,
        logits_RV.stride(0),
        vocab_size,
        num_slices,
        SLICE=_SLICE,
        num_warps=8,
        enable_fp_fusion=False,
    )
    _filter_kernel[(num_rows,)](
        sampled.token_ids_R,
        sampled.finite_R,
        best_R,
        kept_R,
        best_RC,
        ids_RC,
        finite_RC,
        logits_RV,
        rows.temperature_R,
        rows.top_k_R,
        rows.top_p_R,
        rows.log_min_p_R,
        logits_RV.stride(0),
        vocab_size,
        num_slices,
        SLICES_PADDED=slices_padded,
        TILE=_TILE,
        num_warps=16,
        enable_fp_fusion=False,
    )
    _draw_kernel[(num_rows, num_slices)](
        best_RC,
        ids_RC,
        logits_RV,
        best_R,
        kept_R,
        rows.temperature_R,
        rows.noise_keys_R2,
        logits_RV.stride(0),
        vocab_size,
        num_slices,
        SLICE=_SLICE,
        num_warps=8,
        enable_fp_fusion=False,
    )
    _winner_kernel[(num_rows,)](
        sampled.token_ids_R,
        best_RC,
        ids_RC,
        rows.temperature_R,
        num_slices,
        SLICES_PADDED=slices_padded,
        num_warps=1,
        enable_fp_fusion=False,
    )


@triton.jit
def _best_kernel(
    best_ptr,  # (R, C) fp32: the largest logit of the slice...
    ids_ptr,  # (R, C) int32: ...and the lowest id that has it
    finite_ptr,  # (R, C) int32: whether all of the slice are finite
    logits_ptr,  # (R, V)
    logits_stride,
    vocab_size,
    num_slices,
    SLICE: tl.constexpr,
):
    row = tl.program_id(0)
    cell = row * num_slices + tl.program_id(1)
    tokens_X = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    logits_X = _load_logits(logits_ptr + row.to(tl.int64) * logits_stride, tokens_X, vocab_size)
    best, best_id = _lowest_id_of_max(logits_X, tokens_X)
    tl.store(best_ptr + cell, best)
    tl.store(ids_ptr + cell, best_id)
    # Neither NaN nor infinity lies below infinity.
    finite_X = (tl.abs(logits_X) < float("inf")) | (tokens_X >= vocab_size)
    tl.store(finite_ptr + cell, tl.min(finite_X.to(tl.int32)))


@triton.jit
def _filter_kernel(
    token_ids_ptr,  # (R,) int64: of the best token
    row_finite_ptr,  # (R,) int32
    row_best_ptr,  # (R,) fp32: the largest logit
    kept_ptr,  # (R,) fp32: scores down to minus this are kept
    best_ptr,  # (R, C) fp32
    ids_ptr,  # (R, C) int32
    finite_ptr,  # (R, C) int32
    logits_ptr,  # (R, V)
    temperature_ptr,  # (R,) fp32
    top_k_ptr,  # (R,) int32
    top_p_ptr,  # (R,) fp64
    log_min_p_ptr,  # (R,) fp32
    logits_stride,
    vocab_size,
    num_slices,
    SLICES_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    best, best_id = _best_of_slices(best_ptr, ids_ptr, row, num_slices, SLICES_PADDED)
    tl.store(token_ids_ptr + row, best_id.to(tl.int64))
    tl.store(row_best_ptr + row, best)
    slices_C = tl.arange(0, SLICES_PADDED)
    finite_C = tl.load(finite_ptr + row * num_slices + slices_C, mask=slices_C < num_slices, other=1)
    tl.store(row_finite_ptr + row, tl.min(finite_C))
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0:
        return

    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    sharpness = 1.4426950408889634 / temperature
    kept = tl.full((), float("inf"), tl.float32)
    surplus = tl.full((), 0, tl.float64)
    if top_k < vocab_size:
        goal = top_k.to(tl.float64)
        count, farthest, _beyond = _measure(row_ptr, vocab_size, best, sharpness, kept, False, TILE)
        kept, count = _search(row_ptr, vocab_size, best, sharpness, farthest, count, goal, False, TILE)
        # Tokens that tie for the last place: kept, but not counted in what top_p is a share of.
        surplus = (count - goal) * tl.exp2(-kept * sharpness).to(tl.float64)
    if top_p < 1:
        weight, farthest, _beyond = _measure(row_ptr, vocab_size, best, sharpness, kept, True, TILE)
        goal = top_p * (weight - surplus)
        kept, weight = _search(row_ptr, vocab_size, best, sharpness, farthest, weight, goal, True, TILE)
    # Logits that differ can be equal once divided by the temperature. Then both are kept, as on the CPU.
    kept = tl.minimum(tl.div_rn(kept, temperature), -tl.load(log_min_p_ptr + row))
    tl.store(kept_ptr + row, kept)


@triton.jit
def _draw_kernel(
    best_ptr,  # (R, C) fp32: the largest noisy score of the slice; -inf where it keeps no token
    ids_ptr,  # (R, C) int32
    logits_ptr,  # (R, V)
    row_best_ptr,  # (R,) fp32
    kept_ptr,  # (R,) fp32
    temperature_ptr,  # (R,) fp32
    noise_keys_ptr,  # (R, 2) int32
    logits_stride,
    vocab_size,
    num_slices,
    SLICE: tl.constexpr,
):
    """Gumbel-max over the tokens that the filters keep."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0:
        return
    cell = row * num_slices + tl.program_id(1)
    tokens_X = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    logits_X = _load_logits(logits_ptr + row.to(tl.int64) * logits_stride, tokens_X, vocab_size)
    scores_X = tl.div_rn(logits_X - tl.load(row_best_ptr + row), temperature)
    noise_X = gumbel_noise(tl.load(noise_keys_ptr + row * 2), tl.load(noise_keys_ptr + row * 2 + 1), tokens_X)
    kept_X = scores_X >= -tl.load(kept_ptr + row)
    best, best_id = _lowest_id_of_max(tl.where(kept_X, scores_X + noise_X, -float("inf")), tokens_X)
    tl.store(best_ptr + cell, best)
    tl.store(ids_ptr + cell, best_id)


@triton.jit
def _winner_kernel(
    token_ids_ptr,  # (R,) int64
    best_ptr,  # (R, C) fp32
    ids_ptr,  # (R, C) int32
    temperature_ptr,  # (R,) fp32
    num_slices,
    SLICES_PADDED: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(temperature_ptr + row) == 0:
        return
    _best, best_id = _best_of_slices(best_ptr, ids_ptr, row, num_slices, SLICES_PADDED)
    tl.store(token_ids_ptr + row, best_id.to(tl.int64))


@triton.jit
def _search(
    row_ptr,
    vocab_size,
    best,
    sharpness,
    upper,
    total,
    goal,
    BY_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The smallest distance within which the tokens' total reaches the goal, and that total.

    The answer is ``upper``, at first the farthest token's distance, within which all make ``total``, or lies
    between ``following`` and it. Both are distances of tokens, and each pass moves one to another token. A
    pass is dear: where to look next is guessed from the totals at both bounds (the Illinois algorithm, Dowell
    and Jarratt, 1971), and every third time it is the middle.
    """
    lower = tl.full((), 0.0, tl.float32)
    following = tl.full((), 0.0, tl.float32)
    # At the distance 0 there is the best token at least, of weight 1.
    missing = _gap(tl.full((), 1.0, tl.float64), goal, BY_WEIGHT)
    surplus = _gap(total, goal, BY_WEIGHT)
    moved_upper = 0
    passes = 0
    searching = (following < upper) & (total > goal)
    while searching:
        share = tl.where(passes % 3 == 2, 0.5, missing / (missing + surplus))
        middle = lower + (upper - lower) * share
        middle = tl.maximum(tl.where(middle < upper, middle, following), following)
        within, nearer, farther = _measure(row_ptr, vocab_size, best, sharpness, middle, BY_WEIGHT, TILE)
        if within >= goal:
            upper = nearer
            total = within
            surplus = _gap(within, goal, BY_WEIGHT)
            # The other bound stays once more: count it half, or it would stay for long.
            missing = tl.where(moved_upper > 0, missing / 2, missing)
            moved_upper = 1
        else:
            lower = middle
            following = farther
            missing = _gap(within, goal, BY_WEIGHT)
            surplus = tl.where(moved_upper < 0, surplus / 2, surplus)
            moved_upper = -1
        searching = (following < upper) & (total > goal)
        passes += 1
    return upper, total


@triton.jit
def _gap(total, goal, BY_WEIGHT: tl.constexpr):
    """How far a total is from its goal, by what grows about evenly with the distance near it: the weight, but
    the logarithm of a count. Something positive in any case.
    """
    ratio = (total / tl.maximum(goal, 1e-30)).to(tl.float32)
    if BY_WEIGHT:
        return tl.abs(ratio - 1.0) + 1e-9
    return tl.abs(tl.log2(tl.maximum(ratio, 1e-30))) + 1e-9


@triton.jit
def _measure(
    row_ptr,
    vocab_size,
    best,
    sharpness,
    limit,
    BY_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of the tokens within the limit: how many or how heavy they are in all (fp64: in fp32 the order of
    summation would show), and their largest distance; 0 without one. Then the smallest distance beyond.
    """
    total_X = tl.zeros((TILE,), tl.float64)
    nearer_X = tl.zeros((TILE,), tl.float32)
    farther_X = tl.full((TILE,), float("inf"), tl.float32)
    next_X = _load_logits(row_ptr, tl.arange(0, TILE), vocab_size)
    for start in tl.range(0, vocab_size, TILE):
        logits_X = next_X
        # One tile ahead: a single program has nobody else to work while it waits.
        next_X = _load_logits(row_ptr, start + TILE + tl.arange(0, TILE), vocab_size)
        distances_X = best - logits_X
        # A token of -inf, as the padding is, has no weight and takes part in nothing.
        within_X = (distances_X <= limit) & (distances_X < float("inf"))
        if BY_WEIGHT:
            total_X += tl.where(within_X, tl.exp2(-distances_X * sharpness), 0.0).to(tl.float64)
        else:
            total_X += within_X.to(tl.float64)
        nearer_X = tl.maximum(nearer_X, tl.where(within_X, distances_X, 0.0))
        farther_X = tl.minimum(farther_X, tl.where(distances_X > limit, distances_X, float("inf")))
    return tl.sum(total_X), tl.max(nearer_X), tl.min(farther_X)


@triton.jit
def gumbel_noise(key_0, key_1, tokens_X):
    """``kernels.noise.gumbel_noise``: the same integers, and floats that differ in the last bits at most."""
    words_X = mix32(mix32(tokens_X.to(tl.uint32) ^ key_0.to(tl.uint32)) ^ key_1.to(tl.uint32))
    halves_X = (words_X & 0x7FFFFFFF).to(tl.int32).to(tl.float32)
    uniform_X = tl.minimum((halves_X + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    # log1p(-u) by log alone: the rounding of 1 - u cancels in the quotient (Kahan).
    rest_X = 1.0 - uniform_X
    log1p_X = tl.where(rest_X == 1.0, -uniform_X, tl.log(rest_X) * (-uniform_X / (rest_X - 1.0)))
    return -tl.log(-log1p_X)


@triton.jit
def mix32(words_X):
    """A bijection of the 32-bit words: ``kernels.noise._mix32``."""
    words_X = (words_X ^ (words_X >> 16)) * 0x7FEB352D
    words_X = (words_X ^ (words_X >> 15)) * 0x846CA68B
    return words_X ^ (words_X >> 16)


@triton.jit
def _load_logits(row_ptr, tokens_X, vocab_size):
    return tl.load(row_ptr + tokens_X, mask=tokens_X < vocab_size, other=-float("inf")).to(tl.float32)


@triton.jit
def _best_of_slices(best_ptr, ids_ptr, row, num_slices, SLICES_PADDED: tl.constexpr):
    slices_C = tl.arange(0, SLICES_PADDED)
    exists_C = slices_C < num_slices
    best_C = tl.load(best_ptr + row * num_slices + slices_C, mask=exists_C, other=-float("inf"))
    ids_C = tl.load(ids_ptr + row * num_slices + slices_C, mask=exists_C, other=0x7FFFFFFF)
    return _lowest_id_of_max(best_C, ids_C)


@triton.jit
def _lowest_id_of_max(values_X, ids_X):
    """NaN counts as the least: then the id is that of something else, or the lowest there is."""
    values_X = tl.where(values_X == values_X, values_X, -float("inf"))
    largest = tl.max(values_X)
    return largest, tl.min(tl.where(values_X == largest, ids_X, 0x7FFFFFFF))
