# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""Decode attention: one query token a sequence, over the paged KV cache, split over the whole GPU.

Reading the cache once is all the work, so the query heads of a KV head share one pass over it, packed
into the rows of one tile, and each program keeps several tiles of keys and values on their way. A sequence
that is one item has its output written at once; the results of several are combined afterwards.

Legend: S sequences, H query heads, K KV heads, G = H / K, D head size, N blocks of the pool, B positions
a block, M blocks of the longest sequence, I items of the plan; R rows of a tile, G padded.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tidegate.kernels.triton.combine import combine_items
from tidegate.kernels.triton.decode_plan import DecodePlan
from tidegate.kernels.triton.device import overlaps_launches
from tidegate.kernels.triton.online_softmax import attend
from tidegate.kernels.triton.overlap import wait_for_kernel_before
from tidegate.kernels.triton.validate import check_attention

LOG2_E = 1.4426950408889634

# The smallest tile of the tensor cores, in each direction.
MIN_TILE = 16


@dataclass(frozen=True, slots=True)
class _Tile:
    positions: int
    num_warps: int
    num_stages: int


def decode_attention(
    query_SHD: torch.Tensor,
    kv_NCKBD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    plan: DecodePlan,
    scale: float,
    out_SHD: torch.Tensor,
) -> None:
    """Write each query's attention over its context, or the plan's window of it, to ``out_SHD``; 0 where the
    context is empty.

    ``kv_NCKBD`` may be strided over N, C and K, and the others over their first dimension.
    """
    check_attention(query_SHD, kv_NCKBD, block_tables_SM, scale, out_SHD)
    if len(query_SHD) != plan.num_sequences:
        raise ValueError(f"query_SHD: {len(query_SHD)} rows for a plan of {plan.num_sequences} sequences")
    if not len(query_SHD):
        return
    num_items = len(plan.items_I4)
    partial_IHD = query_SHD.new_empty((num_items, *query_SHD.shape[1:]), dtype=torch.float32)
    lse_IH = query_SHD.new_empty((num_items, query_SHD.shape[1]), dtype=torch.float32)
    _launch(query_SHD, kv_NCKBD, block_tables_SM, plan, scale, out_SHD, partial_IHD, lse_IH)
    combine_items(partial_IHD, lse_IH, plan, out_SHD)


def decode_tile_positions(head_dim: int, dtype: torch.dtype) -> int:
    """What a plan's pieces must be multiples of."""
    return _tile(head_dim, dtype).positions


def _tile(head_dim: int, dtype: torch.dtype) -> _Tile:
    if dtype == torch.float32:
        return _Tile(positions=16 if head_dim > 128 else 32, num_warps=4, num_stages=2)
    if head_dim > 128:
        return _Tile(positions=32, num_warps=4, num_stages=4)
    return _Tile(positions=64, num_warps=4, num_stages=3)


def _launch(
    query_SHD: torch.Tensor,
    kv_NCKBD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    plan: DecodePlan,
    scale: float,
    out_SHD: torch.Tensor,
    partial_IHD: torch.Tensor,
    lse_IH: torch.Tensor,
) -> None:
    _, num_heads, head_dim = query_SHD.shape
    num_kv_heads, block_size = kv_NCKBD.shape[2:4]
    group = num_heads // num_kv_heads
    tile = _tile(head_dim, query_SHD.dtype)
    overlap = overlaps_launches(query_SHD.device)
    _decode_kernel[(num_kv_heads, len(plan.items_I4))](
        out_SHD,
        partial_IHD,
        lse_IH,
        query_SHD,
        kv_NCKBD,
        block_tables_SM,
        plan.items_I4,
        plan.first_items_S1,
        plan.num_sequences,
        scale * LOG2_E,
        out_SHD.stride(0),
        query_SHD.stride(0),
        *kv_NCKBD.stride()[:3],
        block_tables_SM.stride(0),
        num_kv_heads,
        GROUP=group,
        ROWS=max(MIN_TILE, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=max(MIN_TILE, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        TILE=tile.positions,
        WINDOWED=plan.window is not None,
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
        launch_pdl=overlap,
    )


@triton.jit
def _decode_kernel(
    out_ptr,  # (S, H, D)
    partial_ptr,  # (I, H, D) fp32: of items that are not their sequence's only one
    lse_ptr,  # (I, H) fp32: base-2 logarithm of the sum of each row's weights
    query_ptr,  # (S, H, D)
    kv_ptr,  # (N, 2, K, B, D)
    tables_ptr,  # (S, M) int32
    items_ptr,  # (I, 4) int32
    first_items_ptr,  # (S + 1,) int32
    num_sequences,
    scale_log2,
    out_stride,
    query_stride,
    block_stride,
    value_stride,
    head_stride,
    table_stride,
    num_kv_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_kernel_before(OVERLAP)
    # The KV heads of a block lie side by side, so programs that run together read neighbouring memory.
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(first_items_ptr + num_sequences):
        return
    sequence = tl.load(items_ptr + item * 4)
    first = tl.load(items_ptr + item * 4 + 1)
    end = tl.load(items_ptr + item * 4 + 2)
    num_items = tl.load(items_ptr + item * 4 + 3)

    rows_R = tl.arange(0, ROWS)
    dims_D = tl.arange(0, HEAD_DIM_PADDED)
    heads_R = kv_head * GROUP + rows_R
    exists_R = rows_R < GROUP
    exists_RD = exists_R[:, None] & (dims_D < HEAD_DIM)[None, :]
    offsets_RD = heads_R[:, None] * HEAD_DIM + dims_D[None, :]
    query_RD = tl.load(
        query_ptr + sequence.to(tl.int64) * query_stride + offsets_RD, mask=exists_RD, other=0.0
    )

    key_ptr = kv_ptr + kv_head.to(tl.int64) * head_stride
    acc_RD, max_R, sum_R = attend(
        tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32),
        tl.full((ROWS,), -float("inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
        query_RD,
        tl.zeros((ROWS,), tl.int32) + first,
        tl.zeros((ROWS,), tl.int32) + (end - 1),
        first if WINDOWED else tl.multiple_of(first, TILE),
        end,
        key_ptr,
        key_ptr + value_stride,
        tables_ptr + sequence.to(tl.int64) * table_stride,
        block_stride,
        scale_log2,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        BLOCK_SIZE,
        TILE,
        MASKED=True,
        WINDOWED=WINDOWED,
    )

    # An empty context has the sum 0, and its output is 0.
    result_RD = acc_RD / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    if num_items == 1:
        out_ptrs_RD = out_ptr + sequence.to(tl.int64) * out_stride + offsets_RD
        tl.store(out_ptrs_RD, result_RD.to(out_ptr.dtype.element_ty), mask=exists_RD)
    else:
        line = item.to(tl.int64) * num_kv_heads * GROUP
        tl.store(partial_ptr + line * HEAD_DIM + offsets_RD, result_RD, mask=exists_RD)
        tl.store(lse_ptr + line + heads_R, max_R + tl.log2(sum_R), mask=exists_R)
