"""The copy engine of the CPU device: how blocks travel between the tiers beside the computation."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import structlog
import torch

from tidegate.engine import failpoints
from tidegate.engine.memory.copies import Completion, CopyOp, Run, merge_runs
from tidegate.engine.memory.host_pool import HostPool

SLICE_BYTES = 256 << 10
"""What is copied at one go: short enough that nobody who computes has to wait long for the memory."""

SHARE = 0.25
"""Of a core's time that copies may take while steps compute: here, copying is computing time lost."""

SHORTEST_REST = 1e-4
"""Seconds. Below that, falling asleep and waking up would cost more than it leaves to others."""

log = structlog.get_logger(__name__)

Bytes = npt.NDArray[np.uint8]


class ThreadTransfer:
    """Both tiers are ordinary memory and one thread copies, in slices, loads before write-backs.

    A load is what a sequence waits for; a write-back holds up nobody until its slot is wanted. The thread
    rests between slices, unless the engine does nothing but wait for it. It is as asynchronous as a GPU's
    copy engine, so the same races have to be right.
    """

    def __init__(self, device_pool: torch.Tensor, host_pool: HostPool) -> None:
        """The pools of both tiers; the host's is closed with the transfer."""
        # numpy copies plain bytes on this thread alone and without the interpreter's lock; torch would
        # spread a large copy over the threads that compute.
        self._device: Bytes = device_pool.view(torch.uint8).flatten(1).numpy()
        self._host: Bytes = host_pool.blocks.view(torch.uint8).flatten(1).numpy()
        self._host_pool = host_pool
        self._loads: deque[Run] = deque()
        self._write_backs: deque[Run] = deque()
        self._done: deque[Completion] = deque()
        self._work = threading.Condition()
        self._arrived = threading.Event()
        self._hurry = threading.Event()
        """Set while somebody waits for copies, and nothing is computed that they could slow down."""
        self._owed = 0.0
        """Seconds of rest that are due."""
        self._closed = False
        self.bytes_per_second = 4e9
        self._thread = threading.Thread(target=self._loop, name="tidegate-copies", daemon=True)
        self._thread.start()

    def submit(self, ops: Sequence[CopyOp]) -> None:
        with self._work:
            for run in merge_runs(ops):
                (self._write_backs if run.to_host else self._loads).append(run)
            self._work.notify()

    def poll(self) -> list[Completion]:
        self._arrived.clear()
        return [self._done.popleft() for _ in range(len(self._done))]

    def wait(self, timeout: float) -> None:
        self._hurry.set()
        self._arrived.wait(timeout)
        self._hurry.clear()

    def close(self) -> None:
        with self._work:
            self._closed = True
            self._work.notify()
        self._hurry.set()
        self._thread.join()
        self._host_pool.close()

    def _loop(self) -> None:
        while (run := self._next_run()) is not None:
            try:
                seconds = self._copy(run)
                copied = True
            except Exception:
                # The manager drops these blocks and has them computed again: a report, not the end.
                log.exception("copy_failed", blocks=len(run.tickets), to_host=run.to_host)
                seconds, copied = 0.0, False
            self._done.extend(
                Completion(ticket, copied, seconds / len(run.tickets)) for ticket in run.tickets
            )
            self._arrived.set()

    def _next_run(self) -> Run | None:
        """Waits for one; None when the transfer is closed."""
        with self._work:
            while not (self._loads or self._write_backs or self._closed):
                self._work.wait()
            if self._closed:
                return None
            return (self._loads or self._write_backs).popleft()

    def _copy(self, run: Run) -> float:
        """The seconds that the copy took, rests apart."""
        if failpoints.ARMED:
            failpoints.reach("copy")
        seconds, length = 0.0, 0
        for target, source in self._slices(run):
            self._rest()
            started = time.perf_counter()
            np.copyto(target, source)
            taken = time.perf_counter() - started
            self._owed += taken * (1 / SHARE - 1)
            seconds += taken
            length += len(source)
        self.bytes_per_second += 0.1 * (length / max(seconds, 1e-9) - self.bytes_per_second)
        return seconds

    def _rest(self) -> None:
        """Leave the rest of a core to those who compute."""
        if self._owed > SHORTEST_REST:
            self._hurry.wait(self._owed)
            self._owed = 0.0

    def _slices(self, run: Run) -> Iterator[tuple[Bytes, Bytes]]:
        """Target and source, slice by slice. The blocks of a run lie side by side in both tiers."""
        length = len(run.tickets)
        device = self._device[run.device_start : run.device_start + length].reshape(-1)
        host = self._host[run.host_start : run.host_start + length].reshape(-1)
        target, source = (host, device) if run.to_host else (device, host)
        for start in range(0, max(target.size, source.size), SLICE_BYTES):
            yield target[start : start + SLICE_BYTES], source[start : start + SLICE_BYTES]
