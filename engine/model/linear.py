"""Matrix products with weights laid out once for the device that they are on.

Legend: T tokens, I inputs, O outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tidegate.kernels.cpu.native import NativeKernels

Projection = Callable[[torch.Tensor], torch.Tensor]
"""TI to TO."""


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A ``Projection`` by torch on a plain weight, which is there for other kernels to read too."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O)


_PACKED_FOR_TOKENS = 64
"""oneDNN chooses its layout for a number of rows; others run on it too, measured no slower."""


def projection(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None, kernels: NativeKernels | None = None
) -> Projection:
    """Input times the weight transposed, plus the bias.

    On the CPU the native kernels multiply where they can; they read a packed copy of the weight. Elsewhere
    oneDNN does, on a blocked copy. Given a plain weight it makes that copy at every call, which takes longer
    than the product of a few rows: blocked once, the products of a 0.5B model in bf16 measured 1.1 to 5.5
    times as fast with 1 to 32 rows. The plain weight is not kept, but where it is an embedding too.
    """
    native = None if kernels is None else kernels.projection(weight_OI, bias_O)
    if native is not None:
        return native
    if not _can_pack(weight_OI):
        return PlainLinear(weight_OI, bias_O)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACKED_FOR_TOKENS)
    product = torch.ops.mkldnn._linear_pointwise.default

    def packed_linear(x_TI: torch.Tensor) -> torch.Tensor:
        result_TO: torch.Tensor = product(x_TI, packed, bias_O, "none", [], "")
        return result_TO

    return packed_linear


def _can_pack(weight_OI: torch.Tensor) -> bool:
    if weight_OI.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    match weight_OI.dtype:
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        case _:
            return weight_OI.dtype == torch.float32
