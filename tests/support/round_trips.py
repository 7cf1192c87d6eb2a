"""Blocks go out to the host tier and come back for real, while steps write and read: every byte is compared.

The real block manager, the real copy engine and its thread, real memory; the steps run on a thread of
their own that computes beside. Only the model is missing: a position's content is a number that stands
for its sequence and its place, all over.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from tidegate.engine.memory.block import BlockTable
from tidegate.engine.memory.host_pool import HostPool
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.memory.transfer import ThreadTransfer

BLOCK_SIZE, WIDTH = 4, 64
DEVICE_BLOCKS, HOST_BLOCKS = 24, 256
SEQUENCES, LONGEST = 30, 8 * BLOCK_SIZE
PIPELINE_DEPTH = 2


def content(name: int, start: int, end: int) -> np.ndarray:
    """What positions ``[start, end)`` of a sequence hold: one number a position, ``WIDTH`` times."""
    places = np.arange(start, end, dtype=np.uint64)
    return np.repeat((np.uint64(name) * np.uint64(2654435761) + places)[:, None], WIDTH, axis=1)


@dataclass(eq=False)
class Sequence:
    name: int
    table: BlockTable
    computed: int = 0
    scheduled: int = 0
    epoch: int = 0
    """Raised when what is under way for it is lost."""


@dataclass
class Chunk:
    sequence: Sequence
    epoch: int
    start: int
    end: int
    slots: list[int]


@dataclass
class Step:
    step_id: int
    chunks: list[Chunk]
    may_run: threading.Event
    outcome: "Future[None]"


class Storm:
    """Sequences that all want to run, on a device that holds a tenth of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.device = np.zeros((DEVICE_BLOCKS, BLOCK_SIZE, WIDTH), np.uint64)
        host = np.zeros((HOST_BLOCKS, BLOCK_SIZE, WIDTH), np.uint64)
        self.transfer = ThreadTransfer(torch.from_numpy(self.device), HostPool(torch.from_numpy(host)))
        self.manager = BlockManager(
            block_size=BLOCK_SIZE,
            device_blocks=DEVICE_BLOCKS,
            host_blocks=HOST_BLOCKS,
            transfer=self.transfer,
            hasher=None,
        )
        self.executor = ThreadPoolExecutor(1)
        self.steps: deque[Step] = deque()
        self.next_step = 1
        self.num_named = 0
        self.sequences = [self._new() for _ in range(SEQUENCES)]
        self.bytes_compared = 0
        self.mismatches = 0

    @property
    def round_trips(self) -> int:
        """Blocks that came back; each was written out before."""
        return self.manager.stats.copied_in.total()

    def run(self, round_trips: int) -> None:
        """Until so many are done, or a step has read something that was never written for it."""
        while self.round_trips < round_trips and not self.mismatches:
            self.manager.poll()
            self._swap()
            self._launch()
            self.manager.flush()
            if self.steps and (len(self.steps) == PIPELINE_DEPTH or self.rng.random() < 0.5):
                self._collect()
            elif not self.steps:
                self.transfer.wait(0.01)

    def close(self) -> None:
        while self.steps:
            self._collect()
        self.executor.shutdown()
        self.transfer.close()

    def _new(self) -> Sequence:
        self.num_named += 1
        return Sequence(self.num_named, self.manager.new_table("anybody"))

    def _swap(self) -> None:
        """Some leave, with a step in flight or without; then whoever there is room for comes in."""
        running = [s for s in self.sequences if s.table.is_ready]
        for sequence in self.rng.sample(running, self.rng.randint(0, len(running))):
            sequence.epoch += 1
            sequence.scheduled = sequence.computed
            if sequence.computed >= LONGEST or self.rng.random() < 0.05:
                self.sequences.remove(sequence)
                self.manager.release(sequence.table)
                self.sequences.append(self._new())
            else:
                self.manager.suspend(sequence.table)
        waiting = [s for s in self.sequences if not s.table.resident]
        self.rng.shuffle(waiting)
        for sequence in waiting:
            if self.manager.has_room(sequence.table.blocks, 1):
                self.manager.resume(sequence.table)

    def _launch(self) -> None:
        chunks = []
        for sequence in self.sequences:
            start = sequence.scheduled
            end = min(LONGEST, start + self.rng.randint(1, 2 * BLOCK_SIZE))
            if sequence.table.is_ready and start < end and self.manager.reserve(sequence.table, end):
                assert self.manager.launched(sequence.table, self.next_step) == []
                slots = [block.device.index for block in sequence.table.blocks if block.device]
                chunks.append(Chunk(sequence, sequence.epoch, start, end, slots))
                sequence.scheduled = end
        if chunks:
            may_run = threading.Event()
            outcome = self.executor.submit(self._compute, chunks, may_run)
            self.steps.append(Step(self.next_step, chunks, may_run, outcome))
            self.next_step += 1
            if self.rng.random() < 0.5:
                may_run.set()

    def _compute(self, chunks: list[Chunk], may_run: threading.Event) -> None:
        """Read all that lies before each chunk, as attention does, and write what belongs there."""
        assert may_run.wait(60)
        for chunk in chunks:
            name, slots = chunk.sequence.name, chunk.slots
            if chunk.epoch == chunk.sequence.epoch:
                held = self.device[slots].reshape(-1, WIDTH)[: chunk.start]
                self.mismatches += not np.array_equal(held, content(name, 0, chunk.start))
                self.bytes_compared += held.nbytes
            places = np.arange(chunk.start, chunk.end)
            blocks = np.array(slots)[places // BLOCK_SIZE]
            self.device[blocks, places % BLOCK_SIZE] = content(name, chunk.start, chunk.end)

    def _collect(self) -> None:
        step = self.steps.popleft()
        step.may_run.set()
        step.outcome.result(60)
        self.manager.collected(step.step_id)
        for chunk in step.chunks:
            if chunk.epoch == chunk.sequence.epoch:
                self.manager.commit(chunk.sequence.table, chunk.end, ())
                chunk.sequence.computed = chunk.end


@contextmanager
def busy_core() -> Iterator[None]:
    """Matrix products beside, which want the memory and a core too."""
    stop = threading.Event()

    def multiply() -> None:
        matrix = torch.ones(256, 256)
        while not stop.is_set():
            torch.mm(matrix, matrix)

    thread = threading.Thread(target=multiply)
    thread.start()
    yield
    stop.set()
    thread.join()


@dataclass(frozen=True)
class RoundTrips:
    """What one storm came to."""

    blocks: int
    steps: int
    seconds: float
    bytes_compared: int
    mismatches: int


def make_round_trips(count: int, seed: int) -> RoundTrips:
    """So many blocks out and back beside a busy core; raises where a block is held by nobody, or was lost."""
    storm = Storm(seed)
    started = time.monotonic()
    with busy_core():
        storm.run(count)
    seconds = time.monotonic() - started
    try:
        storm.manager.check_integrity(sequence.table for sequence in storm.sequences)
    finally:
        storm.close()
    lost = storm.manager.take_truncated()
    assert not lost, f"KV was given up: {lost}"
    return RoundTrips(storm.round_trips, storm.next_step - 1, seconds, storm.bytes_compared, storm.mismatches)
