"""The host tier of a CUDA device: memory that its copy engines reach, pinned while the engine serves.

Pinning takes about as long as touching, seconds for a hundred gigabytes. So it goes on in the background,
from the first block on, in small chunks with rests between them: other threads' calls into CUDA wait while
one is pinned (6 to 10 ms for one of 128 MiB), and kernels 6.11 to 6.13 refuse to pin 2 GB at a time. No block
lies across the border of two chunks, because a copy across it is refused. Not by torch's allocator of pinned
memory: it would round the pool up to a power of two.
"""

import contextlib
import math
import mmap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import structlog
import torch

from tidegate.engine.device.streams import Device
from tidegate.engine.memory.layout import BlockLayout

CHUNK_BYTES = 8 * 2**20
REST = 3
"""Seconds of rest for each second of pinning."""
_TOUCH_THREADS = 4
"""Each page is first touched, and thereby placed, by a thread on the cores that this process may use."""
_ADVICE = "lower host_kv_tokens, or raise the limit of locked memory (ulimit -l)"

log = structlog.get_logger(__name__)


class PinnedPool:
    """One tier's blocks in host memory. Blocks [0, ``num_ready``) can be copied now, the rest soon."""

    def __init__(
        self, device: Device, layout: BlockLayout, num_blocks: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.num_blocks = num_blocks
        self.num_ready = 0
        self._device = device
        self._block_bytes = layout.block_bytes
        # A chunk begins and ends both with a page and with a block.
        unit = math.lcm(layout.block_bytes, mmap.PAGESIZE)
        self.chunk_blocks = -(-chunk_bytes // unit) * unit // layout.block_bytes
        """No copy may reach over a multiple of it."""
        size = -(-num_blocks * layout.block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A huge page is touched and pinned as fast as a small one. A kernel without them says so: no matter.
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8)[: num_blocks * layout.block_bytes]
        self.blocks = flat.view(num_blocks, layout.block_bytes)
        """uint8 (blocks, bytes)."""
        self._pinned: list[int] = []
        self._failure: Exception | None = None
        self._closed = threading.Event()
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._pin_all, name="tidegate-pinning", daemon=True)
        self._thread.start()

    def wait(self, num_blocks: int) -> None:
        """Until so many blocks are ready. Raises ``RuntimeError`` where they will never be."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._failure is not None or self.num_ready >= num_blocks)
        if self.num_ready < num_blocks:
            raise RuntimeError(f"host memory cannot be pinned: {self._failure}; {_ADVICE}")

    def close(self) -> None:
        """No copy may be under way."""
        self._closed.set()
        self._thread.join()
        while self._pinned:
            self._device.unpin(self._pinned.pop())

    def _pin_all(self) -> None:
        began = time.perf_counter()
        address = self._bytes.ctypes.data
        try:
            with ThreadPoolExecutor(_TOUCH_THREADS, thread_name_prefix="tidegate-touch") as threads:
                for first in range(0, self.num_blocks, self.chunk_blocks):
                    if self._closed.is_set():
                        return
                    end = min(first + self.chunk_blocks, self.num_blocks)
                    start_byte = first * self._block_bytes
                    end_byte = -(-end * self._block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                    self._touch(threads, start_byte, end_byte)
                    pinning = time.perf_counter()
                    self._device.pin(address + start_byte, end_byte - start_byte)
                    self._pinned.append(address + start_byte)
                    with self._arrived:
                        self.num_ready = end
                        self._arrived.notify_all()
                    # Whoever waited for it to end comes before the next one.
                    self._closed.wait(REST * (time.perf_counter() - pinning))
        except Exception as error:
            # What is pinned serves; the rest of the tier stays away.
            log.exception("host_tier_cut_short", ready=self.num_ready, wanted=self.num_blocks, advice=_ADVICE)
            with self._arrived:
                self._failure = error
                self._arrived.notify_all()
            return
        log.info("host_tier_pinned", blocks=self.num_blocks, seconds=round(time.perf_counter() - began, 3))

    def _touch(self, threads: ThreadPoolExecutor, start: int, end: int) -> None:
        """Write to each page, so that pinning finds it there."""
        step = -(-(end - start) // _TOUCH_THREADS // mmap.PAGESIZE) * mmap.PAGESIZE or mmap.PAGESIZE
        parts = [self._bytes[at : min(at + step, end) : mmap.PAGESIZE] for at in range(start, end, step)]
        for done in [threads.submit(part.fill, 0) for part in parts]:
            done.result()
