"""Compile the kernels that an operation launches, for any NVIDIA architecture, without a GPU.

``recorded_launches`` runs operations on CPU tensors and keeps their launches instead of running them, with
the types, constants and alignments that Triton would specialise on; ``compile_launch`` makes the binary.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")


@dataclass
class Launch:
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[int]
    """Arguments that are multiples of 16."""
    options: dict[str, int | bool]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass
class Binary:
    ptx: str
    num_stack_bytes: int
    """Of a thread: what its registers spill, mostly."""
    num_registers: int
    num_shared_bytes: int


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, aligned = {}, {}, []
        for index, name in enumerate(kernel.arg_names):
            value = values[name]
            if kernel.params[index].is_constexpr or value is None:
                signature[name] = "constexpr"
                constants[name] = value
                continue
            signature[name], is_aligned = _type_of(value)
            if is_aligned:
                aligned.append(index)
        launches.append(Launch(kernel, signature, constants, aligned, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compile_launch(launch: Launch, capability: int) -> Binary:
    """``capability``: 90 for sm_90."""
    source = ASTSource(
        launch.kernel,
        launch.signature,
        {(launch.kernel.arg_names.index(name),): value for name, value in launch.constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    resources = _resources(compiled.asm["cubin"])
    return Binary(compiled.asm["ptx"], resources["STACK"], resources["REG"], compiled.metadata.shared)


def _type_of(value: Any) -> tuple[str, bool]:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def _resources(cubin: bytes) -> dict[str, int]:
    """What Triton's own cuobjdump says of the one kernel in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        )
    pairs = re.findall(r"([A-Z]+):(\d+)", text.stdout)
    return {name: int(number) for name, number in pairs}
