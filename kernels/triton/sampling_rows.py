# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""The sampling parameters of every row, kept on the device, and those of one step's rows taken from them.

Legend: X all rows, R rows of the step.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from tidegate.kernels.triton.sampling import SamplingRows

PARAMETERS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float64),
        ("log_min_p", np.float32),
        ("padding", np.int32),
        # Of seed and sample index: ``kernels.noise.noise_state``.
        ("noise_state", np.uint64),
    ]
)
"""One row's record; see ``SamplingRows`` for what the fields mean."""
PARAMETER_WORDS = PARAMETERS.itemsize // 4


def sampling_rows(
    parameters_XW: torch.Tensor, rows_R: torch.Tensor, positions_R: torch.Tensor
) -> SamplingRows:
    """What ``sample`` takes, for the token of each row at its position. Padding rows are greedy.

    ``parameters_XW``: int32, a record of ``PARAMETERS`` for each row.
    """
    if parameters_XW.dtype != torch.int32 or parameters_XW.shape[1] != PARAMETER_WORDS:
        raise ValueError(f"parameters_XW: must be int32, {PARAMETER_WORDS} words a row")
    num_rows = len(rows_R)
    rows = SamplingRows(
        parameters_XW.new_empty(num_rows, dtype=torch.float32),
        parameters_XW.new_empty(num_rows),
        parameters_XW.new_empty(num_rows, dtype=torch.float64),
        parameters_XW.new_empty(num_rows, dtype=torch.float32),
        parameters_XW.new_empty((num_rows, 2)),
    )
    if num_rows:
        _rows_kernel[(triton.cdiv(num_rows, 128),)](
            rows.temperature_R,
            rows.top_k_R,
            rows.top_p_R,
            rows.log_min_p_R,
            rows.noise_keys_R2,
            parameters_XW,
            rows_R,
            positions_R,
            num_rows,
            WORDS=PARAMETER_WORDS,
            TILE=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return rows


@triton.jit
def _rows_kernel(
    temperature_ptr,  # (R,) fp32
    top_k_ptr,  # (R,) int32
    top_p_ptr,  # (R,) fp64
    log_min_p_ptr,  # (R,) fp32
    noise_keys_ptr,  # (R, 2) int32
    parameters_ptr,  # (X, W) int32
    rows_ptr,  # (R,) int32
    positions_ptr,  # (R,) int32
    num_rows,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    places_R = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists_R = places_R < num_rows
    rows_R = tl.load(rows_ptr + places_R, mask=exists_R, other=-1).to(tl.int64)
    real_R = rows_R >= 0
    record_ptrs_R = parameters_ptr + rows_R * WORDS
    temperature_R = tl.load(record_ptrs_R, mask=real_R, other=0).to(tl.float32, bitcast=True)
    tl.store(temperature_ptr + places_R, temperature_R, mask=exists_R)
    tl.store(top_k_ptr + places_R, tl.load(record_ptrs_R + 1, mask=real_R, other=1), mask=exists_R)
    top_p_R = _load_64(record_ptrs_R + 2, real_R).to(tl.float64, bitcast=True)
    tl.store(top_p_ptr + places_R, top_p_R, mask=exists_R)
    log_min_p_R = tl.load(record_ptrs_R + 4, mask=real_R, other=0).to(tl.float32, bitcast=True)
    tl.store(log_min_p_ptr + places_R, log_min_p_R, mask=exists_R)
    positions_R = tl.load(positions_ptr + places_R, mask=real_R, other=0).to(tl.uint64)
    state_R = mix64(_load_64(record_ptrs_R + 6, real_R) + (positions_R + 1) * 0x9E3779B97F4A7C15)
    tl.store(noise_keys_ptr + places_R * 2, state_R.to(tl.uint32).to(tl.int32, bitcast=True), mask=exists_R)
    upper_R = (state_R >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    tl.store(noise_keys_ptr + places_R * 2 + 1, upper_R, mask=exists_R)


@triton.jit
def _load_64(ptrs, exists):
    """Two words of 32 bits, the lower first, as one unsigned of 64."""
    lower = tl.load(ptrs, mask=exists, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    upper = tl.load(ptrs + 1, mask=exists, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (upper << 32) | lower


@triton.jit
def mix64(words):
    """``kernels.noise._mix64``: the finalizer of SplitMix64."""
    words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9
    words = (words ^ (words >> 27)) * 0x94D049BB133111EB
    return words ^ (words >> 31)
