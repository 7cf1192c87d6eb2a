"""The copy engines: how blocks travel between the tiers on each device, beside the computation."""

import threading
import time
from collections import deque
from collections.abc import Sequence

import structlog
import torch

from tidegate.engine import failpoints
from tidegate.engine.memory.copies import Completion, CopyOp, Run, merge_runs

log = structlog.get_logger(__name__)


class ThreadTransfer:
    """The copy engine of the CPU device: both tiers are ordinary memory and one thread copies.

    It is as asynchronous as a GPU's copy engine, so the same races have to be right.
    """

    def __init__(self, device_pool: torch.Tensor, host_pool: torch.Tensor) -> None:
        # numpy copies plain bytes on this thread alone and without the interpreter's lock; torch would
        # spread a large copy over the threads that compute.
        self._device = device_pool.view(torch.uint8).flatten(1).numpy()
        self._host = host_pool.view(torch.uint8).flatten(1).numpy()
        self._queue: deque[Run] = deque()
        self._done: deque[Completion] = deque()
        self._work = threading.Condition()
        self._arrived = threading.Event()
        self._closed = False
        self.bytes_per_second = 4e9
        self._thread = threading.Thread(target=self._loop, name="tidegate-copies", daemon=True)
        self._thread.start()

    def submit(self, ops: Sequence[CopyOp]) -> None:
        with self._work:
            self._queue.extend(merge_runs(ops))
            self._work.notify()

    def poll(self) -> list[Completion]:
        self._arrived.clear()
        return [self._done.popleft() for _ in range(len(self._done))]

    def wait(self, timeout: float) -> None:
        self._arrived.wait(timeout)

    def close(self) -> None:
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._work:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                run = self._queue.popleft()
            try:
                self._copy(run)
                copied = True
            except Exception:
                # The manager drops these blocks and has them computed again: a report, not the end.
                log.exception("copy_failed", blocks=len(run.tickets), to_host=run.to_host)
                copied = False
            self._done.extend(Completion(ticket, copied) for ticket in run.tickets)
            self._arrived.set()

    def _copy(self, run: Run) -> None:
        if failpoints.ARMED:
            failpoints.reach("copy")
        started = time.perf_counter()
        length = len(run.tickets)
        device = self._device[run.device_start : run.device_start + length]
        host = self._host[run.host_start : run.host_start + length]
        if run.to_host:
            host[:] = device
        else:
            device[:] = host
        rate = device.nbytes / (time.perf_counter() - started)
        self.bytes_per_second += 0.1 * (rate - self.bytes_per_second)
