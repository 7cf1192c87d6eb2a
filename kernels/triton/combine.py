# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""Combine the partial results of decode attention's items into one for each sequence.

A kernel of its own: letting the last item of a sequence combine them all saves a launch, but leaves the
work to few programs, and measured 2 to 10 us slower.

Legend: S sequences, H query heads, D head size, I items of the plan, C items taken in at a time.
"""

import torch
import triton
import triton.language as tl

from tidegate.kernels.triton.decode_plan import DecodePlan
from tidegate.kernels.triton.device import overlaps_launches
from tidegate.kernels.triton.overlap import wait_for_kernel_before

# Of fp32, held in registers at a time.
_TILE_ELEMENTS = 4096


def combine_items(
    partial_IHD: torch.Tensor, lse_IH: torch.Tensor, plan: DecodePlan, out_SHD: torch.Tensor
) -> None:
    """Write the weighted mean of each sequence's partial results to ``out_SHD``.

    ``lse_IH`` is the base-2 logarithm of each result's weight, -inf for none: a sequence all of whose items
    weigh nothing gets 0. A sequence of one item is left alone: its output is written already.
    """
    num_items, num_heads, head_dim = partial_IHD.shape
    if lse_IH.shape != (num_items, num_heads) or num_items != len(plan.items_I4):
        raise ValueError(f"lse_IH, partial_IHD: must have a line for each of {len(plan.items_I4)} items")
    if out_SHD.shape != (plan.num_sequences, num_heads, head_dim):
        raise ValueError(f"out_SHD: shape {tuple(out_SHD.shape)} does not fit the plan's partial results")
    if plan.num_sequences:
        _launch(partial_IHD, lse_IH, plan, out_SHD)


def _launch(partial_IHD: torch.Tensor, lse_IH: torch.Tensor, plan: DecodePlan, out_SHD: torch.Tensor) -> None:
    num_heads, head_dim = partial_IHD.shape[1:]
    head_dim_padded = triton.next_power_of_2(head_dim)
    overlap = overlaps_launches(out_SHD.device)
    _combine_kernel[(plan.num_sequences, num_heads)](
        out_SHD,
        partial_IHD,
        lse_IH,
        plan.first_items_S1,
        out_SHD.stride(0),
        num_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=head_dim_padded,
        ITEMS=_TILE_ELEMENTS // head_dim_padded,
        OVERLAP=overlap,
        num_warps=4,
        enable_fp_fusion=True,
        launch_pdl=overlap,
    )


@triton.jit
def _combine_kernel(
    out_ptr,  # (S, H, D)
    partial_ptr,  # (I, H, D) fp32
    lse_ptr,  # (I, H) fp32
    first_items_ptr,  # (S + 1,) int32
    out_stride,
    num_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    ITEMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_kernel_before(OVERLAP)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(first_items_ptr + sequence)
    end = tl.load(first_items_ptr + sequence + 1)
    if end - first == 1:
        return

    dims_D = tl.arange(0, HEAD_DIM_PADDED)
    acc_D = tl.zeros((HEAD_DIM_PADDED,), tl.float32)
    largest = -float("inf")
    total = 0.0
    for start in tl.range(first, end, ITEMS):
        items_C = start + tl.arange(0, ITEMS)
        mine_C = items_C < end
        lines_C = items_C.to(tl.int64) * num_heads + head
        lse_C = tl.load(lse_ptr + lines_C, mask=mine_C, other=-float("inf"))
        partial_CD = tl.load(
            partial_ptr + lines_C[:, None] * HEAD_DIM + dims_D[None, :],
            mask=mine_C[:, None] & (dims_D < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(lse_C))
        # Weights are relative to the largest; where there is none yet, -inf - -inf would be NaN.
        reference = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights_C = tl.exp2(lse_C - reference)
        shrink = tl.exp2(largest - reference)
        total = total * shrink + tl.sum(weights_C)
        acc_D = acc_D * shrink + tl.sum(weights_C[:, None] * partial_CD, 0)
        largest = new_largest

    mean_D = acc_D / tl.where(total > 0, total, 1.0)
    out_ptrs_D = out_ptr + sequence.to(tl.int64) * out_stride + head * HEAD_DIM + dims_D
    tl.store(out_ptrs_D, mean_D.to(out_ptr.dtype.element_ty), mask=dims_D < HEAD_DIM)
