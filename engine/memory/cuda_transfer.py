"""The copy engine of a CUDA device: one stream in each direction, beside the one that computes.

A copy starts behind every step that was launched before it was handed over, in both directions: a write-back
must not read a block before it is computed, and a load must not overwrite one that attention still reads.

Copies are handed over in batches of a few milliseconds, and no more of them than keep the link busy until
somebody looks again: a queue of seconds in the GPU could not be taken back at the end.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
import torch

from tidegate.engine.device.streams import BlockCopy, Device, Event
from tidegate.engine.memory.copies import Completion, CopyOp, Run, merge_runs
from tidegate.engine.memory.pinned_pool import PinnedPool
from tidegate.engine.step import DeviceLost

_BATCH_SECONDS = 0.002
_LEAST_AHEAD_SECONDS = 0.01
"""Copies handed over ahead of time, at least: the next look may come late."""
_MOST_BATCHES = 32
"""Handed over in one direction: so many pairs of events are made, once."""
_CALIBRATION_BYTES = 64 * 2**20
_CALIBRATION_ROUNDS = 3
_POLL_SECONDS = 0.0002

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Batch:
    began: Event
    done: Event
    tickets: list[int]
    num_bytes: int


@dataclass(slots=True)
class _Piece:
    """Neighbouring blocks of one run; the tickets are one a block."""

    copy: BlockCopy
    tickets: list[int]


@dataclass(slots=True)
class _Lane:
    """One direction."""

    to_host: bool
    target: torch.Tensor
    source: torch.Tensor
    events: deque[tuple[Event, Event]]
    bytes_per_second: float
    waiting: deque[_Piece] = field(default_factory=deque)
    under_way: deque[_Batch] = field(default_factory=deque)
    bytes_under_way: int = 0


class CudaTransfer:
    """A ``Transfer`` between a device pool and a pinned one. Calls come from the engine's thread alone."""

    def __init__(
        self,
        device: Device,
        device_pool: torch.Tensor,
        host_pool: PinnedPool,
        compute_done: Callable[[], Event | None],
        bytes_per_second: float = 20e9,
    ) -> None:
        """``compute_done``: the event behind the last step launched. ``bytes_per_second``: a first guess."""
        self._device = device
        self._host = host_pool
        self._compute_done = compute_done
        self._device_blocks = device_pool.view(torch.uint8).flatten(1)
        self._block_bytes = self._device_blocks.shape[1]
        self._lanes = {
            to_host: _Lane(
                to_host,
                target=host_pool.blocks if to_host else self._device_blocks,
                source=self._device_blocks if to_host else host_pool.blocks,
                events=deque((device.event(), device.event()) for _ in range(_MOST_BATCHES)),
                bytes_per_second=bytes_per_second,
            )
            for to_host in (True, False)
        }
        self._streams = {to_host: device.stream() for to_host in (True, False)}
        self._done: list[Completion] = []
        self._last_look = time.perf_counter()
        self._between_looks = _LEAST_AHEAD_SECONDS

    @property
    def bytes_per_second(self) -> float:
        """Of the slower direction, lately."""
        return min(lane.bytes_per_second for lane in self._lanes.values())

    def submit(self, ops: Sequence[CopyOp]) -> None:
        for run in merge_runs(ops):
            self._lanes[run.to_host].waiting.extend(self._pieces(run))
        self._hand_over()

    def poll(self) -> list[Completion]:
        now = time.perf_counter()
        self._between_looks += 0.2 * (now - self._last_look - self._between_looks)
        self._last_look = now
        self._collect()
        self._hand_over()
        done, self._done = self._done, []
        return done

    def wait(self, timeout: float) -> None:
        deadline = time.perf_counter() + timeout
        self._collect()
        while not self._done and time.perf_counter() < deadline:
            self._hand_over()
            time.sleep(_POLL_SECONDS)
            self._collect()

    def close(self) -> None:
        """Copies that were handed over end; those that wait are dropped."""
        for lane in self._lanes.values():
            lane.waiting.clear()
            for batch in lane.under_way:
                batch.done.synchronize()
            lane.under_way.clear()
        self._host.close()

    def calibrate(self, seed: int = 0) -> None:
        """Measure both directions with blocks at random places, before anything is in either pool."""
        most = max(1, _CALIBRATION_BYTES // self._block_bytes)
        count = min(most, len(self._device_blocks), self._host.num_blocks)
        if count == 0:
            return
        self._host.wait(count)
        rng = random.Random(seed)
        ids = rng.sample(range(len(self._device_blocks)), count)
        for lane in self._lanes.values():
            stream = self._streams[lane.to_host]
            rates = []
            for _ in range(_CALIBRATION_ROUNDS):
                copies = [self._copy(lane.to_host, index, i, 1) for i, index in enumerate(ids)]
                began, done = lane.events[0]
                began.record(stream)
                self._device.copy_blocks(stream, lane.target, lane.source, copies)
                done.record(stream)
                done.synchronize()
                rates.append(count * self._block_bytes / max(done.seconds_since(began), 1e-9))
            lane.bytes_per_second = max(rates)
        log.info(
            "link_calibrated",
            to_host_gb_s=round(self._lanes[True].bytes_per_second / 1e9, 1),
            to_device_gb_s=round(self._lanes[False].bytes_per_second / 1e9, 1),
        )

    def _pieces(self, run: Run) -> list[_Piece]:
        """The run in copies that fit into a batch, each within one chunk of the pinned pool."""
        lane = self._lanes[run.to_host]
        most = max(1, int(lane.bytes_per_second * _BATCH_SECONDS) // self._block_bytes)
        pieces = []
        i = 0
        while i < len(run.tickets):
            to_border = self._host.chunk_blocks - (run.host_start + i) % self._host.chunk_blocks
            tickets = run.tickets[i : i + min(most, to_border)]
            copy = self._copy(run.to_host, run.device_start + i, run.host_start + i, len(tickets))
            pieces.append(_Piece(copy, tickets))
            i += len(tickets)
        return pieces

    @staticmethod
    def _copy(to_host: bool, device_index: int, host_index: int, count: int) -> BlockCopy:
        if to_host:
            return BlockCopy(host_index, device_index, count)
        return BlockCopy(device_index, host_index, count)

    def _hand_over(self) -> None:
        ahead = max(_LEAST_AHEAD_SECONDS, 2 * self._between_looks)
        for lane in self._lanes.values():
            fenced = False
            while lane.waiting and lane.events and lane.bytes_under_way < lane.bytes_per_second * ahead:
                if not fenced:
                    fenced = True
                    compute_done = self._compute_done()
                    if compute_done is not None:
                        self._streams[lane.to_host].wait(compute_done)
                self._hand_over_batch(lane)

    def _hand_over_batch(self, lane: _Lane) -> None:
        most = lane.bytes_per_second * _BATCH_SECONDS
        copies: list[BlockCopy] = []
        tickets: list[int] = []
        while lane.waiting:
            size = (len(tickets) + len(lane.waiting[0].tickets)) * self._block_bytes
            if copies and size > most:
                break
            piece = lane.waiting.popleft()
            copies.append(piece.copy)
            tickets += piece.tickets
        stream = self._streams[lane.to_host]
        began, done = lane.events.popleft()
        try:
            began.record(stream)
            self._device.copy_blocks(stream, lane.target, lane.source, copies)
            done.record(stream)
        except Exception as error:
            if self._device.is_lost(error):
                raise DeviceLost(str(error)) from error
            # The manager drops these blocks and has them computed again: a report, not the end.
            log.exception("copy_failed", blocks=len(tickets), to_host=lane.to_host)
            lane.events.append((began, done))
            self._done += [Completion(ticket, False) for ticket in tickets]
            return
        lane.under_way.append(_Batch(began, done, tickets, len(tickets) * self._block_bytes))
        lane.bytes_under_way += len(tickets) * self._block_bytes

    def _collect(self) -> None:
        """Take in the batches that have ended. They end in order, so only the oldest is asked."""
        try:
            for lane in self._lanes.values():
                while lane.under_way and lane.under_way[0].done.query():
                    batch = lane.under_way.popleft()
                    lane.bytes_under_way -= batch.num_bytes
                    lane.events.append((batch.began, batch.done))
                    seconds = max(batch.done.seconds_since(batch.began), 1e-9)
                    share = seconds / len(batch.tickets)
                    self._done += [Completion(ticket, True, share) for ticket in batch.tickets]
                    rate = batch.num_bytes / seconds
                    # A small batch is mostly latency, and says little of the link.
                    weight = min(0.2, batch.num_bytes / (rate * _BATCH_SECONDS) * 0.2)
                    lane.bytes_per_second += weight * (rate - lane.bytes_per_second)
        except Exception as error:
            if self._device.is_lost(error):
                raise DeviceLost(str(error)) from error
            raise
