"""The native kernels as functions of tensors.

Legend as in the C files: T packed tokens, S sequences, R rows of logits, M hidden size, F intermediate size,
V vocabulary, H query heads, K KV heads, X = (H + 2K) * D, D head size; the pool's layer view is NCKBD.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tidegate.kernels.attention import AttentionBatch
from tidegate.kernels.cpu.compiler import CompilerError, compile_kernels

_SCALARS = {torch.bfloat16: "SCALAR_BF16", torch.float16: "SCALAR_FP16", torch.float32: "SCALAR_FP32"}
_TILE_ROWS = 16
"""ROWS in ``attention.c``."""
_UNLIMITED = 2**62
"""A window wider than any sequence."""
_PANEL_OUTPUTS = 64
"""OUTPUTS in ``linear.c``."""


class _Step(ctypes.Structure):
    """``Step`` in ``attention.c``, which says what each field is."""

    _fields_ = (
        ("num_seqs", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("block_bits", c_int32),
        ("table_width", c_int32),
        ("num_threads", c_int32),
        ("block_stride", c_int64),
        ("value_stride", c_int64),
        ("head_stride", c_int64),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("tile_starts", c_void_p),
        ("angles", c_void_p),
        ("window", c_int64),
        ("scale", c_float),
    )


_SIGNATURES = {
    "attend": (POINTER(_Step), c_void_p, c_void_p, c_void_p),
    "add_norm": (c_int64, c_int64, c_int32, c_float, c_void_p, c_void_p, c_void_p, c_void_p),
    "silu_mul": (c_int64, c_int64, c_int32, c_void_p, c_void_p),
    "argmax": (c_int64, c_int64, c_int32, c_void_p, c_void_p, c_void_p),
    # Only where ``linear.c`` has something to offer.
    "linear": (c_int64, c_int64, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_void_p),
}


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """RoPE, KV write and attention of one step, for every layer of it."""

    _kernels: "NativeKernels"
    _step: _Step
    _held: tuple[object, ...]
    """What the step's addresses point into."""

    def __call__(self, qkv_TX: torch.Tensor, kv_NCKBD: torch.Tensor) -> torch.Tensor:
        """The heads of each token side by side, contiguous. Turns the queries in ``qkv_TX`` in place."""
        step = self._step
        out = qkv_TX.new_empty((len(qkv_TX), step.num_heads * kv_NCKBD.shape[4]))
        self._kernels.attend(step, _address(qkv_TX), kv_NCKBD.data_ptr(), out.data_ptr())
        return out


class NativeKernels:
    """For one dtype and head size, on up to ``num_threads`` threads where there is work for them.

    Raises ``CompilerError`` where they cannot be had.
    """

    def __init__(self, dtype: torch.dtype, head_dim: int, num_threads: int) -> None:
        self._threads = num_threads
        compiled = compile_kernels({_SCALARS[dtype]: "1", "HEAD_DIM": str(head_dim)})
        try:
            library = ctypes.CDLL(str(compiled.path))
        except OSError as error:
            raise CompilerError(f"the compiled kernels cannot be loaded: {error}") from None
        for name, argtypes in _SIGNATURES.items():
            if hasattr(library, name):
                function = getattr(library, name)
                function.argtypes, function.restype = argtypes, None
        self.attend = library.attend
        self._add_norm = library.add_norm
        self._silu_mul = library.silu_mul
        self._argmax = library.argmax
        self._linear = getattr(library, "linear", None)

    def attention(
        self,
        batch: AttentionBatch,
        kv_NCKBD: torch.Tensor,
        num_heads: int,
        angles_L2F: torch.Tensor,
        scale: float,
    ) -> PagedAttention:
        """``angles_L2F``: fp32 cosine and sine of each position, as far as the longest context."""
        num_kv_heads, block_size = kv_NCKBD.shape[2:4]
        group = num_heads // num_kv_heads
        tiles_S = -(-np.diff(batch.starts_S1) * group // _TILE_ROWS)
        tile_starts_S1 = np.concatenate(([0], tiles_S.cumsum()))
        tables_SM = batch.block_tables_SM.contiguous()
        block_stride, value_stride, head_stride = kv_NCKBD.stride()[:3]
        step = _Step(
            num_seqs=len(batch.lens_S),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            block_bits=block_size.bit_length() - 1,
            table_width=tables_SM.shape[1],
            num_threads=self._threads,
            block_stride=block_stride,
            value_stride=value_stride,
            head_stride=head_stride,
            query_starts=batch.starts_S1.ctypes.data,
            context_lens=batch.lens_S.ctypes.data,
            block_tables=tables_SM.data_ptr(),
            tile_starts=tile_starts_S1.ctypes.data,
            angles=angles_L2F.data_ptr(),
            window=_UNLIMITED if batch.window is None else batch.window,
            scale=scale,
        )
        return PagedAttention(self, step, (batch, tables_SM, tile_starts_S1, angles_L2F))

    def add_norm(
        self, x_TM: torch.Tensor, delta_TM: torch.Tensor | None, weight_M: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add the delta to ``x_TM`` in place; the RMS norm of the sum."""
        num_tokens, size = x_TM.shape
        normed_TM = torch.empty_like(x_TM)
        x, delta, weight = (
            _address(x_TM),
            delta_TM if delta_TM is None else _address(delta_TM),
            _address(weight_M),
        )
        self._add_norm(num_tokens, size, self._threads, eps, x, delta, weight, normed_TM.data_ptr())
        return normed_TM

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """SiLU of the gate times up, TF."""
        num_tokens, both = gate_up_T2F.shape
        out_TF = gate_up_T2F.new_empty((num_tokens, both // 2))
        self._silu_mul(num_tokens, both // 2, self._threads, _address(gate_up_T2F), out_TF.data_ptr())
        return out_TF

    def argmax(self, logits_RV: torch.Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The best token of each row, the lowest id where logits tie; and whether all logits are finite."""
        rows, vocab_size = logits_RV.shape
        ids_R, finite_R = np.empty(rows, np.int64), np.empty(rows, np.bool_)
        self._argmax(
            rows,
            vocab_size,
            self._threads,
            _address(logits_RV),
            ids_R.ctypes.data,
            finite_R.ctypes.data,
        )
        return ids_R, finite_R

    def projection(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """From TI to TO with a packed copy of the weight; None where torch's own product is the better."""
        num_outputs, num_inputs = weight_OI.shape
        linear = self._linear
        if linear is None or num_inputs % 2:
            return None
        panels = _pack(weight_OI)

        def packed_linear(x_TI: torch.Tensor) -> torch.Tensor:
            out_TO = x_TI.new_empty((len(x_TI), num_outputs))
            linear(
                len(x_TI),
                num_inputs,
                num_outputs,
                self._threads,
                _address(x_TI),
                panels.data_ptr(),
                None if bias_O is None else _address(bias_O),
                out_TO.data_ptr(),
            )
            return out_TO

        return packed_linear


def _pack(weight_OI: torch.Tensor) -> torch.Tensor:
    """Panels of 64 outputs, filled up with zeros: in each, for every two inputs, 64 pairs side by side."""
    num_outputs, num_inputs = weight_OI.shape
    num_panels = -(-num_outputs // _PANEL_OUTPUTS)
    padded_OI = F.pad(weight_OI, (0, 0, 0, num_panels * _PANEL_OUTPUTS - num_outputs))
    return padded_OI.view(num_panels, _PANEL_OUTPUTS, num_inputs // 2, 2).transpose(1, 2).contiguous()


def _address(tensor: torch.Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError(f"a native kernel needs contiguous tensors, not strides {tensor.stride()}")
    return tensor.data_ptr()
