"""What every attention kernel asks of its arguments. Shapes as in ``kernels.attention``."""

import math

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_attention(
    query_THD: torch.Tensor,
    kv_NCKBD: torch.Tensor,
    block_tables_SM: torch.Tensor,
    scale: float,
    out_THD: torch.Tensor,
) -> None:
    """Raises ValueError with the name of the argument that does not fit."""
    if kv_NCKBD.dim() != 5 or kv_NCKBD.shape[1] != 2:
        raise ValueError(f"kv_NCKBD: must be of shape (N, 2, K, B, D), is {tuple(kv_NCKBD.shape)}")
    num_kv_heads, block_size, head_dim = kv_NCKBD.shape[2:]
    if kv_NCKBD.stride()[3:] != (head_dim, 1):
        raise ValueError("kv_NCKBD: the positions of a block and KV head must be contiguous")
    if query_THD.dtype not in DTYPES:
        raise ValueError(f"query_THD: must be fp32, fp16 or bf16, is {query_THD.dtype}")
    if kv_NCKBD.dtype != query_THD.dtype:
        raise ValueError(f"kv_NCKBD: dtype {kv_NCKBD.dtype} is not the query's, {query_THD.dtype}")
    if query_THD.dim() != 3 or query_THD.shape[2] != head_dim or query_THD.shape[1] % num_kv_heads:
        raise ValueError(
            f"query_THD: shape {tuple(query_THD.shape)} does not fit {num_kv_heads} KV heads of {head_dim}"
        )
    if out_THD.shape != query_THD.shape or out_THD.dtype != query_THD.dtype:
        raise ValueError("out_THD: must have the query's shape and dtype")
    for name, tensor in (("query_THD", query_THD), ("out_THD", out_THD)):
        if tensor.stride()[1:] != (head_dim, 1):
            raise ValueError(f"{name}: the heads of a token must be contiguous")
    if block_tables_SM.dtype != torch.int32 or block_tables_SM.stride(-1) != 1:
        raise ValueError("block_tables_SM: must be int32 with contiguous rows")
    if block_size & (block_size - 1):
        raise ValueError(f"kv_NCKBD: {block_size} positions a block is not a power of two")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: must be a positive number, is {scale}")
