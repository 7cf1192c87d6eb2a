# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""RMS norm, with the residual's addition before it where there is one.

Legend: T packed tokens, M hidden size.
"""

import torch
import triton
import triton.language as tl


def rms_norm(x_TM: torch.Tensor, weight_M: torch.Tensor, eps: float) -> torch.Tensor:
    """Each row over its root mean square, times the weight; TM. Computed in fp32, rounded once."""
    return _normalize(x_TM, None, weight_M, eps)


def add_rms_norm(
    x_TM: torch.Tensor, residual_TM: torch.Tensor, weight_M: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add ``x_TM`` to ``residual_TM`` in place, and return the norm of the sum as it was rounded."""
    if residual_TM.shape != x_TM.shape or residual_TM.dtype != x_TM.dtype or residual_TM.stride(-1) != 1:
        raise ValueError("residual_TM: must have the shape and dtype of x_TM, with contiguous rows")
    return _normalize(x_TM, residual_TM, weight_M, eps)


def _normalize(
    x_TM: torch.Tensor, residual_TM: torch.Tensor | None, weight_M: torch.Tensor, eps: float
) -> torch.Tensor:
    num_tokens, size = x_TM.shape
    if x_TM.stride(1) != 1:
        raise ValueError("x_TM: rows must be contiguous")
    if weight_M.shape != (size,):
        raise ValueError(f"weight_M: must be of shape {(size,)}, is {tuple(weight_M.shape)}")
    out_TM = x_TM.new_empty((num_tokens, size))
    if num_tokens:
        _launch(out_TM, x_TM, residual_TM, weight_M, eps)
    return out_TM


def _launch(
    out_TM: torch.Tensor,
    x_TM: torch.Tensor,
    residual_TM: torch.Tensor | None,
    weight_M: torch.Tensor,
    eps: float,
) -> None:
    num_tokens, size = x_TM.shape
    size_padded = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_tokens,)](
        out_TM,
        x_TM,
        residual_TM,
        weight_M,
        x_TM.stride(0),
        residual_TM.stride(0) if residual_TM is not None else 0,
        eps,
        SIZE=size,
        SIZE_PADDED=size_padded,
        ADD=residual_TM is not None,
        num_warps=min(16, max(1, size_padded // 512)),
        enable_fp_fusion=True,
    )


@triton.jit
def _rms_norm_kernel(
    out_ptr,  # (T, M)
    x_ptr,  # (T, M)
    residual_ptr,  # (T, M) with ADD
    weight_ptr,  # (M,)
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    ADD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dims_M = tl.arange(0, SIZE_PADDED)
    exists_M = dims_M < SIZE
    weight_M = tl.load(weight_ptr + dims_M, mask=exists_M, other=0.0).to(tl.float32)
    x_M = tl.load(x_ptr + token * x_stride + dims_M, mask=exists_M, other=0.0)
    if ADD:
        residual_ptrs_M = residual_ptr + token * residual_stride + dims_M
        residual_M = tl.load(residual_ptrs_M, mask=exists_M, other=0.0)
        x_M = (x_M.to(tl.float32) + residual_M.to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs_M, x_M, mask=exists_M)
    x_M = x_M.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_M * x_M) / SIZE + eps)
    out_M = (x_M * inverse * weight_M).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * SIZE + dims_M, out_M, mask=exists_M)
