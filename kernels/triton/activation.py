# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""The gated activation of the MLP.

Legend: T packed tokens, F intermediate size, E = 2F: gate, then up.
"""

import torch
import triton
import triton.language as tl

_TILE = 1024


def silu_mul(gate_up_TE: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, TF. Computed in fp32, rounded once."""
    num_tokens, size = gate_up_TE.shape
    if size % 2 or gate_up_TE.stride(1) != 1:
        raise ValueError("gate_up_TE: must have contiguous rows of gate and up side by side")
    out_TF = gate_up_TE.new_empty((num_tokens, size // 2))
    if num_tokens:
        _launch(out_TF, gate_up_TE)
    return out_TF


def _launch(out_TF: torch.Tensor, gate_up_TE: torch.Tensor) -> None:
    num_tokens, size = out_TF.shape
    _silu_mul_kernel[(num_tokens, triton.cdiv(size, _TILE))](
        out_TF, gate_up_TE, gate_up_TE.stride(0), size, TILE=_TILE, num_warps=4, enable_fp_fusion=True
    )


@triton.jit
def _silu_mul_kernel(
    out_ptr,  # (T, F)
    gate_up_ptr,  # (T, 2F)
    gate_up_stride,
    size,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dims_F = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists_F = dims_F < size
    gate_ptrs_F = gate_up_ptr + token * gate_up_stride + dims_F
    gate_F = tl.load(gate_ptrs_F, mask=exists_F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_ptrs_F + size, mask=exists_F, other=0.0).to(tl.float32)
    out_F = gate_F * tl.sigmoid(gate_F) * up_F
    tl.store(out_ptr + token * size + dims_F, out_F.to(out_ptr.dtype.element_ty), mask=exists_F)
