# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""Attention of some query rows over a range of one sequence's positions: what decode and prefill share.

Legend: R query rows, X positions of a tile, D head size (padded to a power of two), B positions a block.
The softmax runs in base 2, with its scale folded in, and in fp32 (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018).
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    acc_RD,  # fp32: weighted sum of the values so far
    max_R,  # fp32: largest scaled score so far, base 2; -inf at first
    sum_R,  # fp32: sum of the weights so far
    query_RD,
    first_seen_R,  # the first position that each row sees, with WINDOWED
    last_seen_R,  # the last one, with MASKED
    first,  # a multiple of TILE, but with WINDOWED
    end,
    key_ptr,  # (N, B, D) of this KV head, strided over N
    value_ptr,  # (N, B, D) of this KV head, strided over N
    table_ptr,  # (M,) of this sequence
    block_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Take in the positions [first, end). Without MASKED every row sees all of them, in whole tiles.

    With MASKED alone each row must see the first of its first tile. With WINDOWED too a row may see nothing
    yet, and what lies before ``first`` is never read: its blocks may be somebody else's by now.
    """
    dims_D = tl.arange(0, HEAD_DIM_PADDED)
    aligned_first = first // TILE * TILE if WINDOWED else first
    # A tile's blocks are looked up while the tile before it is on its way.
    next_X = aligned_first + tl.arange(0, TILE)
    next_ids_X = tl.load(table_ptr + next_X // BLOCK_SIZE, mask=next_X < end, other=0)
    for start in tl.range(aligned_first, end, TILE):
        positions_X = start + tl.arange(0, TILE)
        present_X = positions_X < end
        if WINDOWED:
            present_X = present_X & (positions_X >= first)
        block_ids_X = next_ids_X
        next_X = positions_X + TILE
        next_ids_X = tl.load(table_ptr + next_X // BLOCK_SIZE, mask=next_X < end, other=0)
        # Blocks lie far apart: in a large pool the product needs 64 bits.
        lines_X = block_ids_X.to(tl.int64) * block_stride + (positions_X % BLOCK_SIZE) * HEAD_DIM
        offsets_XD = lines_X[:, None] + dims_D[None, :]
        if MASKED:
            mask_XD = present_X[:, None] & (dims_D < HEAD_DIM)[None, :]
            key_XD = tl.load(key_ptr + offsets_XD, mask=mask_XD, other=0.0)
            # Cleared, not only unweighted: a stale slot may hold NaN, which no weight of zero silences.
            value_XD = tl.load(value_ptr + offsets_XD, mask=mask_XD, other=0.0)
        elif HEAD_DIM < HEAD_DIM_PADDED:
            mask_XD = (dims_D < HEAD_DIM)[None, :]
            key_XD = tl.load(key_ptr + offsets_XD, mask=mask_XD, other=0.0)
            value_XD = tl.load(value_ptr + offsets_XD, mask=mask_XD, other=0.0)
        else:
            key_XD = tl.load(key_ptr + offsets_XD)
            value_XD = tl.load(value_ptr + offsets_XD)

        scores_RX = tl.dot(query_RD, tl.trans(key_XD), input_precision="ieee")
        if MASKED:
            scores_RX = tl.where(positions_X[None, :] <= last_seen_R[:, None], scores_RX, -float("inf"))
        if WINDOWED:
            scores_RX = tl.where(positions_X[None, :] >= first_seen_R[:, None], scores_RX, -float("inf"))
        new_max_R = tl.maximum(max_R, tl.max(scores_RX, 1) * scale_log2)
        # What weights are relative to. Of a row that has seen nothing, -inf - -inf would be NaN.
        level_R = tl.where(new_max_R == -float("inf"), 0.0, new_max_R) if WINDOWED else new_max_R
        weights_RX = tl.exp2(scores_RX * scale_log2 - level_R[:, None])
        shrink_R = tl.exp2(max_R - level_R)
        sum_R = sum_R * shrink_R + tl.sum(weights_RX, 1)
        acc_RD = acc_RD * shrink_R[:, None]
        acc_RD = tl.dot(weights_RX.to(value_XD.dtype), value_XD, acc_RD, input_precision="ieee")
        max_R = new_max_R
    return acc_RD, max_R, sum_R
