"""What a decoder computes between its matrix products, behind one interface: native kernels, or torch.

Legend: T packed tokens, M hidden size, H query heads, K KV heads, D head size, X = (H + 2K) * D and
Y = H * D, F intermediate size, L positions; the pool's NLCKBD stands in ``engine.memory.layout``.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from tidegate.engine.model.config import ModelConfig
from tidegate.engine.model.rope import Rotary, rotate
from tidegate.engine.model.sampler import Greedy, torch_argmax
from tidegate.engine.model.threads import available_cores
from tidegate.kernels.attention import AttentionBatch, paged_attention, write_kv
from tidegate.kernels.cpu.compiler import CompilerError
from tidegate.kernels.cpu.native import NativeKernels

Attention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""For one layer of one step: the fused projection TX and the layer's view of the pool NCKBD to the attended
heads TY. Writes the tokens' keys and values to the pool; may overwrite the projection."""


class Operations(Protocol):
    @property
    def path(self) -> str:
        """``native`` or ``torch``."""

    @property
    def slower_because(self) -> str | None:
        """Why it is not the fastest that this device has, where it is not."""

    def add_norm(
        self, x_TM: torch.Tensor, delta_TM: torch.Tensor | None, weight_M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x + delta``, which may be ``x_TM`` itself, overwritten, and the RMS norm of it."""

    def attention(self, batch: AttentionBatch, kv_NCKBD: torch.Tensor) -> Attention:
        """Rotary embedding, KV write and attention for the layers of one step."""

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """SiLU of the gate times up; TF."""

    def argmax(self, logits_RV: torch.Tensor) -> Greedy:
        """Of each row, the lowest id with the best logit, and whether all logits are finite."""


def find_kernels(config: ModelConfig, dtype: torch.dtype) -> NativeKernels | CompilerError:
    """The native kernels of this machine, or why there are none."""
    try:
        return NativeKernels(dtype, config.head_dim, available_cores())
    except CompilerError as error:
        return error


def choose_operations(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Operations:
    """Native kernels where there is a C compiler, and otherwise torch."""
    rotary = Rotary(config.rope, config.head_dim, dtype, device)
    kernels = find_kernels(config, dtype)
    if isinstance(kernels, CompilerError):
        return TorchOperations(config, rotary, slower_because=str(kernels))
    return NativeOperations(config, rotary, kernels)


class TorchOperations:
    """Operations of torch alone: the reference, and the way where there is no compiler."""

    path = "torch"

    def __init__(self, config: ModelConfig, rotary: Rotary, slower_because: str | None = None) -> None:
        self.slower_because = slower_because
        self._config = config
        self._rotary = rotary

    def add_norm(
        self, x_TM: torch.Tensor, delta_TM: torch.Tensor | None, weight_M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TM = x_TM if delta_TM is None else x_TM + delta_TM
        return x_TM, F.rms_norm(x_TM, weight_M.shape, weight_M, self._config.rms_eps)

    def attention(self, batch: AttentionBatch, kv_NCKBD: torch.Tensor) -> Attention:
        config = self._config
        turned = config.num_heads + config.num_kv_heads
        cos_T1D, sin_T1D = self._rotary.angles(batch.positions_T)

        def attend(qkv_TX: torch.Tensor, kv_NCKBD: torch.Tensor) -> torch.Tensor:
            heads_THD = qkv_TX.view(len(qkv_TX), turned + config.num_kv_heads, config.head_dim)
            query_key_THD = rotate(heads_THD[:, :turned], cos_T1D, sin_T1D)
            query_THD, key_TKD = query_key_THD.tensor_split((config.num_heads,), dim=1)
            write_kv(key_TKD, heads_THD[:, turned:], kv_NCKBD, batch)
            return paged_attention(query_THD, kv_NCKBD, batch, config.head_dim**-0.5).flatten(1)

        return attend

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF

    def argmax(self, logits_RV: torch.Tensor) -> Greedy:
        return torch_argmax(logits_RV)


class NativeOperations:
    """``kernels.cpu``."""

    path = "native"
    slower_because = None

    def __init__(self, config: ModelConfig, rotary: Rotary, kernels: NativeKernels) -> None:
        self._config = config
        self._rotary = rotary
        self._kernels = kernels

    def add_norm(
        self, x_TM: torch.Tensor, delta_TM: torch.Tensor | None, weight_M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x_TM, self._kernels.add_norm(x_TM, delta_TM, weight_M, self._config.rms_eps)

    def attention(self, batch: AttentionBatch, kv_NCKBD: torch.Tensor) -> Attention:
        config = self._config
        angles_L2F = self._rotary.table(int(batch.lens_S.max(initial=1)))
        return self._kernels.attention(batch, kv_NCKBD, config.num_heads, angles_L2F, config.head_dim**-0.5)

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return self._kernels.silu_mul(gate_up_T2F)

    def argmax(self, logits_RV: torch.Tensor) -> Greedy:
        return self._kernels.argmax(logits_RV)
