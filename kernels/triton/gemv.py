# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""Linear layers of a single token (GEMV), each in one kernel with what comes before and after it.

The product of one token is the reading of its weights, and the kernels around it cost as much as the smaller
ones of them. So a program reads whole rows of the weight, at the speed of the memory, and takes in what
surrounds them: the RMS norm of the input before, the gate of the MLP or the residual's addition behind. The
norm's scale is a factor of the whole product, known when the row has been read.

Legend: I inputs, O outputs, F = O / 2 of a gated product; X inputs of a tile, R rows of the weight.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tidegate.kernels.triton.device import num_multiprocessors, overlaps_launches
from tidegate.kernels.triton.overlap import wait_for_kernel_before

Norm = tuple[torch.Tensor, float]
"""Weight, of I, and epsilon of an RMS norm."""


@dataclass(frozen=True, slots=True)
class _Tile:
    inputs: int
    rows: int
    """Of each program; the same number of rows of gate and of up, where it is gated."""
    num_warps: int


def gemv(
    x_1I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, norm: Norm | None
) -> torch.Tensor:
    """``norm(x)`` times the weight transposed, plus the bias; 1O. Computed in fp32, rounded once."""
    _check(x_1I, weight_OI, bias_O, norm)
    out_1O = x_1I.new_empty((1, len(weight_OI)))
    _launch(out_1O, x_1I, weight_OI, bias_O, norm)
    return out_1O


def gemv_gated(
    x_1I: torch.Tensor, gate_up_OI: torch.Tensor, bias_O: torch.Tensor | None, norm: Norm
) -> torch.Tensor:
    """``silu(gate) * up`` of ``norm(x)``, 1F; the weight's rows are those of gate, then those of up."""
    _check(x_1I, gate_up_OI, bias_O, norm)
    if len(gate_up_OI) % 2:
        raise ValueError(f"gate_up_OI: {len(gate_up_OI)} rows are no pairs of gate and up")
    out_1F = x_1I.new_empty((1, len(gate_up_OI) // 2))
    _launch(out_1F, x_1I, gate_up_OI, bias_O, norm, gated=True)
    return out_1F


def gemv_add(
    x_1I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, residual_1O: torch.Tensor
) -> None:
    """Add the product to ``residual_1O`` in place. The sum is rounded once."""
    _check(x_1I, weight_OI, bias_O, None)
    if residual_1O.shape != (1, len(weight_OI)) or residual_1O.dtype != x_1I.dtype:
        raise ValueError(f"residual_1O: must be 1 x {len(weight_OI)} of {x_1I.dtype}")
    if residual_1O.stride(1) != 1:
        raise ValueError("residual_1O: must be contiguous")
    _launch(residual_1O, x_1I, weight_OI, bias_O, None, add=True)


def _check(
    x_1I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, norm: Norm | None
) -> None:
    num_tokens, num_inputs = x_1I.shape
    if num_tokens != 1 or x_1I.stride(1) != 1:
        raise ValueError(f"x_1I: must be one contiguous row, has {num_tokens}")
    if weight_OI.dim() != 2 or weight_OI.shape[1] != num_inputs or not weight_OI.is_contiguous():
        raise ValueError(f"weight_OI: must be contiguous rows of {num_inputs}, is {tuple(weight_OI.shape)}")
    if weight_OI.dtype != x_1I.dtype:
        raise ValueError(f"weight_OI: dtype {weight_OI.dtype} is not the input's, {x_1I.dtype}")
    if bias_O is not None and bias_O.shape != (len(weight_OI),):
        raise ValueError(f"bias_O: must be of {len(weight_OI)}, is {tuple(bias_O.shape)}")
    if norm is not None and norm[0].shape != (num_inputs,):
        raise ValueError(f"norm: its weight must be of {num_inputs}, is {tuple(norm[0].shape)}")


def _tile(num_inputs: int, num_outputs: int, gated: bool, device: torch.device) -> _Tile:
    """What measured best on an H200. Each thread reads 16 bytes of each row of 16-bit weights at a time: then
    the input has the weights' layout, and none of it goes through shared memory.
    """
    if gated:
        # Many rows: programs of two warps run at different places of theirs, and hide each other's ends.
        return _Tile(inputs=512, rows=4 if num_inputs < 2048 else 2, num_warps=2)
    if num_outputs < 16 * num_multiprocessors(device):
        # Few rows: all the reads of a program at once.
        return _Tile(inputs=2048, rows=2, num_warps=8)
    return _Tile(inputs=1024, rows=4, num_warps=4)


def _launch(
    out_1O: torch.Tensor,
    x_1I: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    norm: Norm | None,
    gated: bool = False,
    add: bool = False,
) -> None:
    num_inputs, num_outputs = x_1I.shape[1], out_1O.shape[1]
    tile = _tile(num_inputs, num_outputs, gated, x_1I.device)
    overlap = overlaps_launches(x_1I.device)
    _gemv_kernel[(triton.cdiv(num_outputs, tile.rows),)](
        out_1O,
        x_1I,
        weight_OI,
        bias_O,
        None if norm is None else norm[0],
        0.0 if norm is None else norm[1],
        num_inputs,
        num_outputs,
        ROWS=tile.rows,
        TILE=tile.inputs,
        NORM=norm is not None,
        BIAS=bias_O is not None,
        GATED=gated,
        ADD=add,
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        launch_pdl=overlap,
    )


@triton.jit
def _gemv_kernel(
    out_ptr,  # (O,); (F,) with GATED; the residual with ADD
    x_ptr,  # (I,)
    weight_ptr,  # (O, I)
    bias_ptr,  # (O,) with BIAS
    norm_ptr,  # (I,) with NORM
    eps,
    num_inputs,
    num_outputs,  # F with GATED
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rows_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists_R = rows_R < num_outputs
    # A row behind the last is the last once more, and not stored.
    read_R = tl.minimum(rows_R, num_outputs - 1).to(tl.int64)
    inputs_1X = tl.arange(0, TILE)[None, :]
    weight_ptrs_RX = weight_ptr + read_R[:, None] * num_inputs + inputs_1X
    up_ptrs_RX = weight_ptrs_RX + num_outputs.to(tl.int64) * num_inputs

    # One tile ahead: the first one comes while the kernel before this one ends.
    weight_RX = _load_ahead(weight_ptrs_RX, inputs_1X, num_inputs)
    up_RX = weight_RX
    if GATED:
        up_RX = _load_ahead(up_ptrs_RX, inputs_1X, num_inputs)
    wait_for_kernel_before(OVERLAP)

    sums_RX = tl.zeros((ROWS, TILE), tl.float32)
    up_sums_RX = sums_RX
    squares_1X = tl.zeros((1, TILE), tl.float32)
    for start in tl.range(0, num_inputs, TILE):
        places_1X = start + inputs_1X
        exists_1X = places_1X < num_inputs
        now_RX, up_now_RX = weight_RX, up_RX
        weight_RX = _load_ahead(weight_ptrs_RX + (start + TILE), places_1X + TILE, num_inputs)
        if GATED:
            up_RX = _load_ahead(up_ptrs_RX + (start + TILE), places_1X + TILE, num_inputs)
        x_1X = tl.load(x_ptr + places_1X, mask=exists_1X, other=0.0).to(tl.float32)
        if NORM:
            squares_1X += x_1X * x_1X
            x_1X *= tl.load(norm_ptr + places_1X, mask=exists_1X, other=0.0).to(tl.float32)
        sums_RX += now_RX.to(tl.float32) * x_1X
        if GATED:
            up_sums_RX += up_now_RX.to(tl.float32) * x_1X

    result_R = tl.sum(sums_RX, 1)
    up_R = tl.sum(up_sums_RX, 1) if GATED else result_R
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares_1X) / num_inputs + eps)
        result_R *= inverse
        up_R *= inverse
    if BIAS:
        result_R += tl.load(bias_ptr + rows_R, mask=exists_R, other=0.0).to(tl.float32)
        if GATED:
            up_R += tl.load(bias_ptr + num_outputs + rows_R, mask=exists_R, other=0.0).to(tl.float32)
    if GATED:
        result_R = result_R * tl.sigmoid(result_R) * up_R
    if ADD:
        result_R += tl.load(out_ptr + rows_R, mask=exists_R, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows_R, result_R.to(out_ptr.dtype.element_ty), mask=exists_R)


@triton.jit
def _load_ahead(ptrs_RX, places_1X, num_inputs):
    """Weights, each read once: they should not push out of the cache what is read again."""
    return tl.load(ptrs_RX, mask=places_1X < num_inputs, other=0.0, eviction_policy="evict_first")
