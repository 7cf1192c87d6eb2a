# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""Prefill attention: chunks of query tokens over the paged KV cache, causal, with any prefix before them.

The rows of a tile are pairs of query token and head of one KV head's group, token by token: a short chunk
of many heads fills a tile as a long one does, and all its rows read one pass of keys and values.

Legend: T packed query tokens, S sequences, H query heads, K KV heads, G = H / K, D head size, N blocks of
the pool, B positions a block, M blocks of the longest sequence, P tiles of query rows; R rows of a tile.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from tidegate.kernels.triton.decode_attention import LOG2_E, MIN_TILE
from tidegate.kernels.triton.device import compute_capability
from tidegate.kernels.triton.online_softmax import attend
from tidegate.kernels.triton.validate import check_attention

PREFILL_TILE_FIELDS = 5
"""Of each tile of a step; see ``prefill_tiles``."""


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    positions: int
    num_warps: int
    num_stages: int


def prefill_tiles(
    query_starts_S1: npt.NDArray[np.int64],
    context_lens_S: npt.NDArray[np.int64],
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> npt.NDArray[np.int32]:
    """The tiles of a step, P5: (sequence, its first token, number of its tokens, tokens of its context
    before these, first row of the tile). Those that see most come first: the last to start should not be
    the longest, with the GPU waiting for it.

    Sequences with no query token have no tile.
    """
    rows = _tile(head_dim, dtype, compute_capability(device)).rows
    query_lens_S = np.diff(query_starts_S1)
    prefix_lens_S = context_lens_S - query_lens_S
    counts_S = -(-query_lens_S * group // rows)
    sequences_P = np.repeat(np.arange(len(counts_S)), counts_S)
    first_rows_P = (np.arange(counts_S.sum()) - np.repeat(counts_S.cumsum() - counts_S, counts_S)) * rows
    per_sequence_S4 = np.stack(
        (np.arange(len(counts_S)), query_starts_S1[:-1], query_lens_S, prefix_lens_S), axis=1
    )
    tiles_P5 = np.column_stack((per_sequence_S4[sequences_P], first_rows_P)).astype(np.int32)
    seen_P = prefix_lens_S[sequences_P] + first_rows_P // group
    return tiles_P5[np.argsort(-seen_P, kind="stable")]


def prefill_attention(
    query_THD: torch.Tensor,
    kv_NCKBD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    tiles_P5: torch.Tensor,
    scale: float,
    out_THD: torch.Tensor,
    window: int | None = None,
) -> None:
    """Write each query's attention over its context up to itself to ``out_THD``; over ``window`` positions of
    it, the query's own included, where that is given.

    ``tiles_P5``: those of ``prefill_tiles``, on the device. Rows of other sequences are left alone.
    """
    check_attention(query_THD, kv_NCKBD, block_tables_SM, scale, out_THD)
    if tiles_P5.dtype != torch.int32 or not tiles_P5.is_contiguous():
        raise ValueError("tiles_P5: must be int32 and contiguous")
    if window is not None and window < 1:
        raise ValueError(f"window: must be at least 1, is {window}")
    if len(tiles_P5):
        _launch(query_THD, kv_NCKBD, block_tables_SM, tiles_P5, scale, out_THD, window)


def _tile(head_dim: int, dtype: torch.dtype, capability: int) -> _Tile:
    if dtype == torch.float32:
        size = 16 if head_dim > 128 else 32
        return _Tile(rows=size, positions=size, num_warps=4, num_stages=1)
    if capability < 90:
        # With half as many warps registers spill.
        return _Tile(rows=64, positions=32 if head_dim > 128 else 64, num_warps=8, num_stages=3)
    if head_dim > 128:
        return _Tile(rows=128, positions=32, num_warps=8, num_stages=3)
    # Two programs share a multiprocessor: one multiplies while the other takes its softmax.
    return _Tile(rows=64, positions=64, num_warps=4, num_stages=3)


def _launch(
    query_THD: torch.Tensor,
    kv_NCKBD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    tiles_P5: torch.Tensor,
    scale: float,
    out_THD: torch.Tensor,
    window: int | None,
) -> None:
    _, num_heads, head_dim = query_THD.shape
    num_kv_heads, block_size = kv_NCKBD.shape[2:4]
    tile = _tile(head_dim, query_THD.dtype, compute_capability(query_THD.device))
    _prefill_kernel[(num_kv_heads, len(tiles_P5))](
        out_THD,
        query_THD,
        kv_NCKBD,
        block_tables_SM,
        tiles_P5,
        scale * LOG2_E,
        out_THD.stride(0),
        query_THD.stride(0),
        *kv_NCKBD.stride()[:3],
        block_tables_SM.stride(0),
        window or 0,
        GROUP=num_heads // num_kv_heads,
        ROWS=tile.rows,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=max(MIN_TILE, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        TILE=tile.positions,
        WINDOWED=window is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )


@triton.jit
def _prefill_kernel(
    out_ptr,  # (T, H, D)
    query_ptr,  # (T, H, D)
    kv_ptr,  # (N, 2, K, B, D)
    tables_ptr,  # (S, M) int32
    tiles_ptr,  # (P, 5) int32
    scale_log2,
    out_stride,
    query_stride,
    block_stride,
    value_stride,
    head_stride,
    table_stride,
    window,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # Programs that run together are the KV heads of one tile of rows, all equally long.
    kv_head = tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(1) * 5
    sequence = tl.load(tile_ptr)
    query_start = tl.load(tile_ptr + 1)
    query_len = tl.load(tile_ptr + 2)
    prefix_len = tl.load(tile_ptr + 3)
    first_row = tl.load(tile_ptr + 4)

    rows_R = first_row + tl.arange(0, ROWS)
    exists_R = rows_R < query_len * GROUP
    # A row behind the last does as the last does, and is not stored: so it sees something too.
    rows_R = tl.minimum(rows_R, query_len * GROUP - 1)
    tokens_R = rows_R // GROUP
    heads_R = kv_head * GROUP + rows_R % GROUP
    dims_D = tl.arange(0, HEAD_DIM_PADDED)
    columns_RD = heads_R[:, None] * HEAD_DIM + dims_D[None, :]
    in_head_1D = (dims_D < HEAD_DIM)[None, :]
    lines_R = (query_start + tokens_R).to(tl.int64)
    query_ptrs_RD = query_ptr + lines_R[:, None] * query_stride + columns_RD
    if HEAD_DIM < HEAD_DIM_PADDED:
        query_RD = tl.load(query_ptrs_RD, mask=in_head_1D, other=0.0)
    else:
        query_RD = tl.load(query_ptrs_RD)

    last_seen_R = prefix_len + tokens_R
    first_seen_R = last_seen_R - window + 1 if WINDOWED else last_seen_R
    first_token = first_row // GROUP
    last_token = tl.minimum(first_row + ROWS, query_len * GROUP) - 1
    end = prefix_len + last_token // GROUP + 1
    # Up to here every row of the tile sees every position, and needs no mask...
    masked_from = (prefix_len + first_token + 1) // TILE * TILE
    whole_from = 0
    if WINDOWED:
        # ...but from here on only: before, the windows of the later rows have not begun.
        last_window = tl.maximum(prefix_len + last_token // GROUP + 1 - window, 0)
        whole_from = tl.minimum(tl.cdiv(last_window, TILE) * TILE, end)
        masked_from = tl.maximum(masked_from, whole_from)

    key_ptr = kv_ptr + kv_head.to(tl.int64) * head_stride
    value_ptr = key_ptr + value_stride
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    acc_RD = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
    max_R = tl.full((ROWS,), -float("inf"), tl.float32)
    sum_R = tl.zeros((ROWS,), tl.float32)
    if WINDOWED:
        acc_RD, max_R, sum_R = attend(
            acc_RD,
            max_R,
            sum_R,
            query_RD,
            first_seen_R,
            last_seen_R,
            tl.maximum(prefix_len + first_token + 1 - window, 0),
            whole_from,
            key_ptr,
            value_ptr,
            table_ptr,
            block_stride,
            scale_log2,
            HEAD_DIM,
            HEAD_DIM_PADDED,
            BLOCK_SIZE,
            TILE,
            MASKED=True,
            WINDOWED=True,
        )
    acc_RD, max_R, sum_R = attend(
        acc_RD,
        max_R,
        sum_R,
        query_RD,
        first_seen_R,
        last_seen_R,
        whole_from,
        masked_from,
        key_ptr,
        value_ptr,
        table_ptr,
        block_stride,
        scale_log2,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        BLOCK_SIZE,
        TILE,
        MASKED=False,
        WINDOWED=False,
    )
    acc_RD, max_R, sum_R = attend(
        acc_RD,
        max_R,
        sum_R,
        query_RD,
        first_seen_R,
        last_seen_R,
        masked_from,
        end,
        key_ptr,
        value_ptr,
        table_ptr,
        block_stride,
        scale_log2,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        BLOCK_SIZE,
        TILE,
        MASKED=True,
        WINDOWED=False,
    )

    out_RD = acc_RD / sum_R[:, None]
    tl.store(
        out_ptr + lines_R[:, None] * out_stride + columns_RD,
        out_RD.to(out_ptr.dtype.element_ty),
        mask=exists_R[:, None] & in_head_1D,
    )
