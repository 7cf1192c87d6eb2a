"""The host tier's memory on the CPU device: put in place by the kernel while the engine serves already.

A page that nobody has written to takes no memory yet, and the first write to it waits for the kernel to
clear one. Better a thread pays for that than a copy that somebody waits for; and where the sizes promise
more than there is, better soon after the start than in the middle of a storm.
"""

import mmap
import threading
import time

import numpy as np
import structlog
import torch

CHUNK_BYTES = 8 << 20
REST = 3
"""Seconds of rest for each second of touching: steps compute beside."""

log = structlog.get_logger(__name__)


class HostPool:
    """One tier's blocks in ordinary memory. Blocks ``[0, num_ready)`` may be used now, the rest soon."""

    def __init__(self, blocks: torch.Tensor) -> None:
        """``blocks``: fresh memory, its first dimension the blocks."""
        self.blocks = blocks
        self.num_ready = 0
        self._bytes = blocks.view(torch.uint8).flatten(1).numpy()
        block_bytes = self._bytes.shape[1]
        self._chunk = max(1, CHUNK_BYTES // block_bytes) if block_bytes else len(blocks)
        self._closed = threading.Event()
        self._began = time.perf_counter()
        # A small pool is ready before the first request, and needs no thread.
        self._touch_chunk()
        self._thread = threading.Thread(target=self._touch_all, name="tidegate-host-pool", daemon=True)
        if self.num_ready < len(blocks):
            self._thread.start()
        else:
            self._say()

    def close(self) -> None:
        """What is not ready yet never will be."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _touch_all(self) -> None:
        while self.num_ready < len(self.blocks):
            started = time.perf_counter()
            self._touch_chunk()
            if self._closed.wait(REST * (time.perf_counter() - started)):
                return
        self._say()

    def _touch_chunk(self) -> None:
        """Write to each page of the next chunk; numpy does so without the interpreter's lock."""
        end = min(self.num_ready + self._chunk, len(self.blocks))
        chunk: np.ndarray[tuple[int], np.dtype[np.uint8]] = self._bytes[self.num_ready : end].reshape(-1)
        chunk[:: mmap.PAGESIZE] = 0
        self.num_ready = end

    def _say(self) -> None:
        seconds = time.perf_counter() - self._began
        log.info("host_tier_ready", blocks=len(self.blocks), seconds=round(seconds, 3))
