# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""How decode attention splits its contexts over the GPU, decided on the GPU once a step.

A CUDA graph replays one grid, whatever the lengths. So the grid is an upper bound, and this plan tells
each of its programs which positions of which sequence are its own: long contexts are cut into pieces of
about equal length, as many as keep the multiprocessors busy, and a short one stays whole. All layers of a
step share the plan.

Legend: S sequences, I items, the pieces; an item is (sequence, first position, end position,
number of items of its sequence).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Programs for each multiprocessor, over all KV heads, where contexts are long: several run there at once,
# and the end of one hides behind the others...
_MOST_PROGRAMS = 8
# ...but each costs a partial result, so pieces shorter than this many granules are cut only for lack of
# so many programs.
_WORTHWHILE_PIECE = 16
_FEWEST_PROGRAMS = 2


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Valid while the contexts have the lengths that it was made for."""

    items_I4: torch.Tensor
    """int32. Those from the number of items on are undefined."""
    first_items_S1: torch.Tensor
    """int32: sequence s has the items [first_items[s], first_items[s + 1]), at least one, which is empty if
    its context is. The last entry is the number of items."""
    window: int | None
    """The items cover only so many positions at the end of each context; None: all of it."""

    @property
    def num_sequences(self) -> int:
        return len(self.first_items_S1) - 1


def plan_decode(
    context_lens_S: torch.Tensor,
    num_kv_heads: int,
    granule: int,
    num_multiprocessors: int,
    window: int | None = None,
) -> DecodePlan:
    """``context_lens_S``: int32; ``granule``: pieces start at multiples of it, the kernel's tile, but for a
    sequence's first one, which starts where its window does.
    """
    if context_lens_S.dtype != torch.int32 or context_lens_S.dim() != 1:
        raise ValueError(f"context_lens_S: must be int32 of one dimension, is {_describe(context_lens_S)}")
    if window is not None and window < 1:
        raise ValueError(f"window: must be at least 1, is {window}")
    num_sequences = len(context_lens_S)
    most = max(1, _MOST_PROGRAMS * num_multiprocessors // num_kv_heads)
    fewest = max(1, _FEWEST_PROGRAMS * num_multiprocessors // num_kv_heads)
    plan = DecodePlan(
        items_I4=context_lens_S.new_empty((most + num_sequences, 4)),
        first_items_S1=context_lens_S.new_empty(num_sequences + 1),
        window=window,
    )
    if num_sequences:
        _launch(plan, context_lens_S, most, fewest, granule)
    return plan


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _launch(plan: DecodePlan, context_lens_S: torch.Tensor, most: int, fewest: int, granule: int) -> None:
    _plan_kernel[(plan.num_sequences,)](
        plan.items_I4,
        plan.first_items_S1,
        context_lens_S,
        plan.num_sequences,
        most,
        fewest,
        plan.window or 0,
        WINDOWED=plan.window is not None,
        WORTHWHILE_PIECE=_WORTHWHILE_PIECE,
        GRANULE=granule,
        SEQUENCES_PADDED=triton.next_power_of_2(plan.num_sequences),
        PIECES=64,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def _plan_kernel(
    items_ptr,  # (I, 4)
    first_items_ptr,  # (S + 1,)
    context_lens_ptr,  # (S,)
    num_sequences,
    most,
    fewest,
    window,
    WINDOWED: tl.constexpr,
    WORTHWHILE_PIECE: tl.constexpr,
    GRANULE: tl.constexpr,
    SEQUENCES_PADDED: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One program a sequence; each finds the common length of a piece for itself."""
    sequence = tl.program_id(0)
    sequences_S = tl.arange(0, SEQUENCES_PADDED)
    lens_S = tl.load(context_lens_ptr + sequences_S, mask=sequences_S < num_sequences, other=0)
    granules_S = tl.cdiv(lens_S, GRANULE)
    if WINDOWED:
        granules_S -= tl.maximum(lens_S - window, 0) // GRANULE
    total = tl.sum(granules_S)
    longest_piece = tl.minimum(WORTHWHILE_PIECE, tl.cdiv(total, fewest))
    longest_piece = tl.maximum(tl.maximum(longest_piece, tl.cdiv(total, most)), 1)
    pieces_S = tl.maximum(tl.cdiv(granules_S, longest_piece), 1)
    pieces_S = tl.where(sequences_S < num_sequences, pieces_S, 0)

    first = tl.sum(tl.where(sequences_S < sequence, pieces_S, 0))
    count = tl.sum(tl.where(sequences_S == sequence, pieces_S, 0))
    tl.store(first_items_ptr + sequence, first)
    if sequence == num_sequences - 1:
        tl.store(first_items_ptr + num_sequences, first + count)

    # Pieces of equal length, but the last. With this count none of them is empty, unless the context is.
    context_len = tl.load(context_lens_ptr + sequence)
    first_seen = tl.maximum(context_len - window, 0) if WINDOWED else 0
    base = first_seen // GRANULE * GRANULE
    piece_len = tl.cdiv(tl.cdiv(context_len - base, GRANULE), count) * GRANULE
    for start in tl.range(0, count, PIECES):
        pieces_P = start + tl.arange(0, PIECES)
        item_ptrs_P = items_ptr + (first + pieces_P) * 4
        mine_P = pieces_P < count
        tl.store(item_ptrs_P, sequence, mask=mine_P)
        starts_P = base + pieces_P * piece_len
        tl.store(item_ptrs_P + 1, tl.maximum(starts_P, first_seen), mask=mine_P)
        tl.store(item_ptrs_P + 2, tl.minimum(starts_P + piece_len, context_len), mask=mine_P)
        tl.store(item_ptrs_P + 3, count, mask=mine_P)
