"""The tensors that a checkpoint folder stores: safetensors files, memory-mapped, one or sharded."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from tidegate.engine.config import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth")
_FLOATS = {"F64", "F32", "F16", "BF16"}
"""Stored types that convert to the model's dtype; others belong to quantised checkpoints."""


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class _HeaderEntry(msgspec.Struct, frozen=True):
    data_offsets: tuple[int, int] = (0, 0)
    """First byte and end, counted from behind the header; ``__metadata__`` has none."""


class TensorFiles:
    """Which file holds each tensor. Opening maps the files and reads their headers, no data.

    Raises ``ConfigError``, in one line that names the file and the tensor, where one is missing, cut off,
    or pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.file_of: dict[str, Path]
        self._open_files = ExitStack()
        self._handles: dict[Path, Any] = {}
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.is_file():
            self._listing = single
            self.file_of = dict.fromkeys(self._open(single), single)
        elif index.is_file():
            self._listing = index
            self.file_of = self._open_shards(index)
        else:
            raise ConfigError(_no_weights(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ``ConfigError`` unless the tensor is there, in a float type, in its shape."""
        if name not in self.file_of:
            raise ConfigError(f"{self._listing}: tensor {name} is missing; config.json asks for it")
        file = self.file_of[name]
        stored = self._handles[file].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ConfigError(
                f"{file}: tensor {name} has shape {stored.get_shape()}; config.json asks for {list(shape)}"
            )
        if stored.get_dtype() not in _FLOATS:
            raise ConfigError(
                f"{file}: tensor {name} is stored as {stored.get_dtype()}, which is not supported; "
                "use a checkpoint in bf16, fp16 or fp32"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the file's memory."""
        view: torch.Tensor = self._handles[self.file_of[name]].get_tensor(name)
        return view

    def _open_shards(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{index}: not an index of shards: {error}") from None
        stored: dict[Path, set[str]] = {}
        file_of = {name: index.parent / shard for name, shard in weight_map.items()}
        for name, shard in file_of.items():
            if shard not in stored:
                if not shard.is_file():
                    raise ConfigError(f"{shard}: no such file; {index.name} says that it holds tensor {name}")
                stored[shard] = self._open(shard)
            if name not in stored[shard]:
                raise ConfigError(f"{shard}: tensor {name} is missing; {index.name} says that it is here")
        return file_of

    def _open(self, file: Path) -> set[str]:
        """Names of the tensors in ``file``."""
        try:
            handle = self._open_files.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ConfigError(_damage(file, error)) from None
        self._handles[file] = handle
        return set(handle.keys())


def _no_weights(folder: Path) -> str:
    for pattern in _PICKLES:
        for pickled in sorted(folder.glob(pattern)):
            return (
                f"{pickled}: pickled weights are not loaded, since unpickling runs code from the file; "
                "if you trust it, convert it with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
    return f"{folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there"


def _damage(file: Path, error: Exception) -> str:
    """What is wrong with a file that does not open: most often it was copied or downloaded in part.

    A safetensors file is eight bytes with the length of its header, the header in JSON, and the data.
    """
    again = "copy or download it again"
    size = file.stat().st_size
    with file.open("rb") as content:
        header_size = int.from_bytes(content.read(8), "little")
        data_start = 8 + header_size
        if data_start > size:
            return f"{file}: no safetensors file, or cut off at {size} bytes inside its header; {again}"
        try:
            header = msgspec.json.decode(content.read(header_size), type=dict[str, _HeaderEntry])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return f"{file}: no safetensors file, or damaged: its header is not readable; {again}"
    ends = sorted((data_start + entry.data_offsets[1], name) for name, entry in header.items())
    for end, name in ends:
        if end > size:
            return f"{file}: cut off at {size} of {ends[-1][0]} bytes, in tensor {name}; {again}"
    return f"{file}: not a valid safetensors file ({error}); {again}"
