# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""From one fused projection to a rotated query and a written KV cache, in one kernel.

Legend: T packed tokens, H query heads, K KV heads, X = H + 2K heads of the projection: query, then key,
then value; D head size, F = D / 2; N blocks of the pool, B positions a block.
"""

import torch
import triton
import triton.language as tl

from tidegate.kernels.triton.device import overlaps_launches
from tidegate.kernels.triton.overlap import wait_for_kernel_before

_HEADS_PER_PROGRAM = 8


def rope_kv_write(
    qkv_TXD: torch.Tensor,
    cos_T1D: torch.Tensor,
    sin_T1D: torch.Tensor,
    kv_NCKBD: torch.Tensor,
    slot_blocks_T: torch.Tensor,
    slot_offsets_T: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Rotate the query and key heads, store keys and values in their slots; the query, THD, contiguous.

    A pair is an element of a head's first half and the same of its second half; ``sin_T1D`` comes with its
    first half negated, as ``engine.model.rope`` makes it. ``norms``: weights D of an RMS norm over each
    query head and each key head before the rotation, and its epsilon. A slot block below 0 stands for a token
    whose key and value go nowhere. Computed in fp32, rounded once.
    """
    num_tokens, num_heads_in_all, head_dim = qkv_TXD.shape
    num_kv_heads = kv_NCKBD.shape[2]
    num_heads = num_heads_in_all - 2 * num_kv_heads
    if num_heads <= 0 or head_dim != kv_NCKBD.shape[4] or head_dim % 2:
        raise ValueError(f"qkv_TXD: shape {tuple(qkv_TXD.shape)} does not fit {num_kv_heads} KV heads")
    if qkv_TXD.dtype != kv_NCKBD.dtype:
        raise ValueError(f"kv_NCKBD: dtype {kv_NCKBD.dtype} is not that of qkv_TXD, {qkv_TXD.dtype}")
    if qkv_TXD.stride()[1:] != (head_dim, 1) or kv_NCKBD.stride()[3:] != (head_dim, 1):
        raise ValueError("qkv_TXD, kv_NCKBD: heads of a token and positions of a block must be contiguous")
    for name, tensor in (("cos_T1D", cos_T1D), ("sin_T1D", sin_T1D)):
        if tensor.numel() != num_tokens * head_dim or not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, {num_tokens} x {head_dim}")
    for name, tensor in (("slot_blocks_T", slot_blocks_T), ("slot_offsets_T", slot_offsets_T)):
        if tensor.shape != (num_tokens,) or tensor.dtype != torch.int64:
            raise ValueError(f"{name}: must be {num_tokens} of int64")
    query_THD = qkv_TXD.new_empty((num_tokens, num_heads, head_dim))
    if num_tokens:
        _launch(query_THD, qkv_TXD, cos_T1D, sin_T1D, kv_NCKBD, slot_blocks_T, slot_offsets_T, norms)
    return query_THD


def _launch(
    query_THD: torch.Tensor,
    qkv_TXD: torch.Tensor,
    cos_T1D: torch.Tensor,
    sin_T1D: torch.Tensor,
    kv_NCKBD: torch.Tensor,
    slot_blocks_T: torch.Tensor,
    slot_offsets_T: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> None:
    num_tokens, num_heads_in_all, head_dim = qkv_TXD.shape
    query_norm_D, key_norm_D, eps = norms if norms is not None else (None, None, 0.0)
    overlap = overlaps_launches(qkv_TXD.device)
    _rope_kv_write_kernel[(num_tokens, triton.cdiv(num_heads_in_all, _HEADS_PER_PROGRAM))](
        query_THD,
        kv_NCKBD,
        qkv_TXD,
        cos_T1D,
        sin_T1D,
        slot_blocks_T,
        slot_offsets_T,
        query_norm_D,
        key_norm_D,
        eps,
        qkv_TXD.stride(0),
        *kv_NCKBD.stride()[:3],
        QUERY_HEADS=query_THD.shape[1],
        KV_HEADS=kv_NCKBD.shape[2],
        HEAD_DIM=head_dim,
        HALF=head_dim // 2,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        HEADS=_HEADS_PER_PROGRAM,
        NORM=norms is not None,
        OVERLAP=overlap,
        num_warps=4,
        enable_fp_fusion=True,
        launch_pdl=overlap,
    )


@triton.jit
def _rope_kv_write_kernel(
    query_ptr,  # (T, H, D)
    kv_ptr,  # (N, 2, K, B, D)
    qkv_ptr,  # (T, X, D)
    cos_ptr,  # (T, D)
    sin_ptr,  # (T, D), the first half negated
    slot_blocks_ptr,  # (T,) int64
    slot_offsets_ptr,  # (T,) int64
    query_norm_ptr,  # (D,) with NORM
    key_norm_ptr,  # (D,) with NORM
    eps,
    qkv_stride,
    block_stride,
    value_stride,
    head_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_kernel_before(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    heads_X = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims_F = tl.arange(0, HALF_PADDED)
    in_half_1F = (dims_F < HALF)[None, :]
    is_query_X = heads_X < QUERY_HEADS
    is_value_X = heads_X >= QUERY_HEADS + KV_HEADS
    exists_XF = (heads_X < QUERY_HEADS + 2 * KV_HEADS)[:, None] & in_half_1F

    qkv_ptrs_XF = qkv_ptr + token * qkv_stride + heads_X[:, None] * HEAD_DIM + dims_F[None, :]
    first_XF = tl.load(qkv_ptrs_XF, mask=exists_XF, other=0.0).to(tl.float32)
    second_XF = tl.load(qkv_ptrs_XF + HALF, mask=exists_XF, other=0.0).to(tl.float32)
    # Both halves of a pair turn by one angle.
    cos_1F = _load_half(cos_ptr + token * HEAD_DIM, dims_F, HALF)
    sin_1F = _load_half(sin_ptr + token * HEAD_DIM + HALF, dims_F, HALF)

    turned_first_XF, turned_second_XF = first_XF, second_XF
    if NORM:
        squares_X = tl.sum(first_XF * first_XF, 1) + tl.sum(second_XF * second_XF, 1)
        inverse_X1 = tl.rsqrt(squares_X / HEAD_DIM + eps)[:, None]
        turned_first_XF *= inverse_X1 * tl.where(
            is_query_X[:, None],
            _load_half(query_norm_ptr, dims_F, HALF),
            _load_half(key_norm_ptr, dims_F, HALF),
        )
        turned_second_XF *= inverse_X1 * tl.where(
            is_query_X[:, None],
            _load_half(query_norm_ptr + HALF, dims_F, HALF),
            _load_half(key_norm_ptr + HALF, dims_F, HALF),
        )
    rotated_first_XF = turned_first_XF * cos_1F - turned_second_XF * sin_1F
    rotated_second_XF = turned_second_XF * cos_1F + turned_first_XF * sin_1F
    first_XF = tl.where(is_value_X[:, None], first_XF, rotated_first_XF).to(kv_ptr.dtype.element_ty)
    second_XF = tl.where(is_value_X[:, None], second_XF, rotated_second_XF).to(kv_ptr.dtype.element_ty)

    query_ptrs_XF = query_ptr + (token * QUERY_HEADS + heads_X[:, None]) * HEAD_DIM + dims_F[None, :]
    is_query_XF = is_query_X[:, None] & in_half_1F
    tl.store(query_ptrs_XF, first_XF, mask=is_query_XF)
    tl.store(query_ptrs_XF + HALF, second_XF, mask=is_query_XF)

    slot_block = tl.load(slot_blocks_ptr + token)
    # From this head on they are stored: none of a token that goes nowhere.
    first_cached = tl.where(slot_block >= 0, QUERY_HEADS, QUERY_HEADS + 2 * KV_HEADS)
    is_cached_XF = exists_XF & (heads_X >= first_cached)[:, None]
    kv_heads_X = (heads_X - QUERY_HEADS - tl.where(is_value_X, KV_HEADS, 0)).to(tl.int64)
    lines_X = kv_heads_X * head_stride + tl.where(is_value_X, value_stride, 0)
    slot_ptr = kv_ptr + slot_block * block_stride
    slot_ptr += tl.load(slot_offsets_ptr + token) * HEAD_DIM
    slot_ptrs_XF = slot_ptr + lines_X[:, None] + dims_F[None, :]
    tl.store(slot_ptrs_XF, first_XF, mask=is_cached_XF)
    tl.store(slot_ptrs_XF + HALF, second_XF, mask=is_cached_XF)


@triton.jit
def _load_half(ptr, dims_F, HALF: tl.constexpr):
    """Half a head's worth of numbers, 1F in fp32."""
    return tl.load(ptr + dims_F, mask=dims_F < HALF, other=0.0).to(tl.float32)[None, :]
