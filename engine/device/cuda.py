"""The CUDA device, through torch; and the driver's batched copy, which torch does not offer."""

import ctypes
from collections.abc import Callable, Sequence
from typing import SupportsInt

import numpy as np
import structlog
import torch

from tidegate.engine.device.streams import BlockCopy, Event, Memory, Stream

log = structlog.get_logger(__name__)

_STICKY = ("CUDA error", "Triton Error [CUDA]")


class CudaEvent:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)

    def record(self, stream: Stream) -> None:
        self._event.record(_torch(stream))

    def query(self) -> bool:
        return bool(self._event.query())

    def synchronize(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, CudaEvent):
            raise TypeError("the earlier event belongs to another device")
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaStream:
    def __init__(self, device: torch.device) -> None:
        self.torch_stream = torch.cuda.Stream(device)

    def launch(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self.torch_stream):
            work()

    def wait(self, event: Event) -> None:
        if not isinstance(event, CudaEvent):
            raise TypeError("the event belongs to another device")
        self.torch_stream.wait_event(event._event)


class CudaDevice:
    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self._graph_pool = torch.cuda.graph_pool_handle()
        self._batched = BatchedMemcpy.find()
        if self._batched is None:
            log.info(
                "no_batched_memcpy", why="the driver is older than CUDA 12.8: blocks are copied one by one"
            )

    def stream(self) -> CudaStream:
        return CudaStream(self.torch_device)

    def event(self) -> CudaEvent:
        return CudaEvent()

    def pinned(self, num_words: int) -> torch.Tensor:
        return torch.empty(num_words, dtype=torch.int32, pin_memory=True)

    def capture(self, stream: Stream, work: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may register memory meanwhile, which a capture in the global mode would forbid.
        with torch.cuda.graph(
            graph, pool=self._graph_pool, stream=_torch(stream), capture_error_mode="thread_local"
        ):
            work()
        return graph.replay

    def copy_blocks(
        self, stream: Stream, target: torch.Tensor, source: torch.Tensor, copies: Sequence[BlockCopy]
    ) -> None:
        if self._batched is not None:
            self._batched.copy(_torch(stream), target, source, copies)
            return
        with torch.cuda.stream(_torch(stream)):
            for copy in copies:
                target[copy.target : copy.target + copy.length].copy_(
                    source[copy.source : copy.source + copy.length], non_blocking=True
                )

    def pin(self, address: int, num_bytes: int) -> None:
        _check(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0), "cudaHostRegister")

    def unpin(self, address: int) -> None:
        _check(torch.cuda.cudart().cudaHostUnregister(address), "cudaHostUnregister")

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def memory(self) -> Memory:
        return Memory(*torch.cuda.mem_get_info(self.torch_device))

    def peak_bytes(self, work: Callable[[], object]) -> int:
        # What is reserved, not what is allocated: gaps count too, and so does the graphs' own memory.
        before = torch.cuda.memory_reserved(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        work()
        return int(torch.cuda.max_memory_reserved(self.torch_device)) - int(before)

    def release_cache(self) -> None:
        torch.cuda.empty_cache()

    def is_lost(self, error: Exception) -> bool:
        if isinstance(error, torch.OutOfMemoryError):
            return False
        return isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in _STICKY)


class _Attributes(ctypes.Structure):
    """``CUmemcpyAttributes``; the hints concern managed memory alone."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", ctypes.c_int * 2),
        ("target_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


_SOURCE_ACCESS_ORDER_STREAM = 1
"""The source is read in the order of the stream: write-backs wait for what computes their blocks."""


class BatchedMemcpy:
    """``cuMemcpyBatchAsync`` of CUDA 13's interface: one call for copies between any places."""

    def __init__(self, function: "ctypes._NamedFuncPointer") -> None:
        function.restype = ctypes.c_int
        function.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
        ]
        self._function = function
        self._attributes = _Attributes(source_access_order=_SOURCE_ACCESS_ORDER_STREAM)
        self._first = ctypes.c_size_t(0)

    @classmethod
    def find(cls) -> "BatchedMemcpy | None":
        """None where the driver does not have it."""
        function = getattr(ctypes.CDLL("libcuda.so.1"), "cuMemcpyBatchAsync_v2", None)
        return None if function is None else cls(function)

    def copy(
        self,
        stream: torch.cuda.Stream,
        target: torch.Tensor,
        source: torch.Tensor,
        copies: Sequence[BlockCopy],
    ) -> None:
        """Raises ``RuntimeError`` with the driver's number where it refuses."""
        fields = np.array(copies, np.uint64).reshape(-1, 3)
        block_bytes = np.uint64(target.stride(0))
        targets = np.uint64(target.data_ptr()) + fields[:, 0] * block_bytes
        sources = np.uint64(source.data_ptr()) + fields[:, 1] * block_bytes
        sizes = fields[:, 2] * block_bytes
        status = self._function(
            targets.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            len(copies),
            ctypes.addressof(self._attributes),
            ctypes.addressof(self._first),
            1,
            stream.cuda_stream,
        )
        if status != 0:
            raise RuntimeError(f"CUDA error {status} from cuMemcpyBatchAsync of {len(copies)} pieces")


def _check(status: SupportsInt, call: str) -> None:
    if int(status) != 0:
        raise RuntimeError(f"{call} failed: {torch.cuda.cudart().cudaGetErrorString(status)}")


def _torch(stream: Stream) -> torch.cuda.Stream:
    if not isinstance(stream, CudaStream):
        raise TypeError("the stream belongs to another device")
    return stream.torch_stream
