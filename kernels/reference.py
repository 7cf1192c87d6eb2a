"""What the kernels must compute, in the plainest way: the oracle for every device.

Shapes as in ``attention.py``, with ``Q`` query tokens and ``X`` context tokens of one sequence.
"""

import torch

from tidegate.kernels.attention import AttentionBatch


def write_kv_reference(
    key_TKD: torch.Tensor, value_TKD: torch.Tensor, kv_NCKBD: torch.Tensor, batch: AttentionBatch
) -> None:
    """Store each token's key and value in its slot."""
    slots = zip(batch.slot_blocks_T.tolist(), batch.slot_offsets_T.tolist(), strict=True)
    for t, (block, offset) in enumerate(slots):
        kv_NCKBD[block, 0, :, offset] = key_TKD[t]
        kv_NCKBD[block, 1, :, offset] = value_TKD[t]


def paged_attention_reference(
    query_THD: torch.Tensor, kv_NCKBD: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """Attention in fp64, one sequence and one query head at a time; THD in fp64."""
    _, num_heads, _ = query_THD.shape
    num_kv_heads, block_size = kv_NCKBD.shape[2:4]
    out_THD = torch.empty_like(query_THD, dtype=torch.float64)
    for s, context_len in enumerate(batch.context_lens):
        start, end = batch.query_starts[s], batch.query_starts[s + 1]
        positions_Q = torch.arange(context_len - (end - start), context_len)
        # Before what any query sees there may be no block.
        first = 0 if batch.window is None else max(0, context_len - (end - start) + 1 - batch.window)
        positions_X = torch.arange(first, context_len)
        blocks_X = batch.block_tables_SM[s, positions_X // block_size].long()
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            key_XD = kv_NCKBD[blocks_X, 0, kv_head, positions_X % block_size].double()
            value_XD = kv_NCKBD[blocks_X, 1, kv_head, positions_X % block_size].double()
            scores_QX = query_THD[start:end, head].double() @ key_XD.T * scale
            sees_QX = positions_X <= positions_Q[:, None]
            if batch.window is not None:
                sees_QX &= positions_X > positions_Q[:, None] - batch.window
            weights_QX = scores_QX.masked_fill(~sees_QX, -torch.inf).softmax(-1)
            out_THD[start:end, head] = weights_QX @ value_XD
    return out_THD
