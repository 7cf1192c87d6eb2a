"""A GPU without a GPU: streams that do their work late, in any order that their events allow.

Work given to a stream is kept and done when somebody waits for it, or by chance from the seed before that.
Streams take turns at random, an event holds back exactly those that wait for it, and a copy moves its blocks
in pieces between which other streams may run. So a missing fence is a wrong token or a wrong byte for some
seed; with every fence in place all seeds give the same.
"""

import mmap
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tidegate.engine.device.streams import BlockCopy, Event, Memory, Stream

Work = Callable[[], object]
UNWRITTEN = -7
"""What pinned memory holds before anybody writes to it."""


@dataclass
class _Mark:
    """An event's place in a stream; passed once the stream has come to it."""

    passed: bool = False


class FakeEvent:
    def __init__(self, device: "FakeCuda") -> None:
        self._device = device
        self.mark: _Mark | None = None

    def record(self, stream: Stream) -> None:
        self.mark = mark = _Mark()

        def work() -> None:
            mark.passed = True

        _fake(stream).queue.append(work)

    def query(self) -> bool:
        self._device.stir()
        return self.mark is None or self.mark.passed

    def synchronize(self) -> None:
        mark = self.mark
        self._device.run_until(lambda: mark is None or mark.passed)

    def seconds_since(self, earlier: Event) -> float:
        assert self.query()
        assert earlier.query()
        return 1e-3


class FakeStream:
    def __init__(self, device: "FakeCuda") -> None:
        self.queue: deque[Work | _Mark] = deque()
        """Work to do, and marks to wait for."""
        self._device = device

    def launch(self, work: Work) -> None:
        self.queue.append(work)
        if self._device.eager:
            self._device.synchronize()
        else:
            self._device.stir()

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        if event.mark is not None:
            self.queue.append(event.mark)

    @property
    def can_run(self) -> bool:
        while self.queue and isinstance(self.queue[0], _Mark) and self.queue[0].passed:
            self.queue.popleft()
        return bool(self.queue) and not isinstance(self.queue[0], _Mark)


class FakeCuda:
    """An ``engine.device.streams.Device`` on CPU tensors."""

    torch_device = torch.device("cpu")

    def __init__(self, seed: int = 0, *, eager: bool = False, lazy: bool = False) -> None:
        """``eager``: work is done as soon as it is given, so that its errors come from ``launch``. ``lazy``:
        none is done before somebody waits for it.
        """
        self.eager = eager
        self.lazy = lazy
        self.captures = 0
        self.fail_copies = False
        self.fail_pinning = False
        self.pinned_ranges: list[tuple[int, int]] = []
        self.lost = False
        self.free_bytes = 2**24
        self._rng = random.Random(seed)
        self._streams: list[FakeStream] = []

    def stream(self) -> FakeStream:
        stream = FakeStream(self)
        self._streams.append(stream)
        return stream

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def pinned(self, num_words: int) -> torch.Tensor:
        return torch.full((num_words,), UNWRITTEN, dtype=torch.int32)

    def capture(self, stream: Stream, work: Work) -> Work:
        self.captures += 1
        return work

    def copy_blocks(
        self, stream: Stream, target: torch.Tensor, source: torch.Tensor, copies: Sequence[BlockCopy]
    ) -> None:
        if self.fail_copies:
            raise RuntimeError("planted")
        assert target.dtype == source.dtype == torch.uint8
        assert target.shape[1] == source.shape[1]
        half = target.shape[1] // 2
        for copy in copies:
            self._check_pinning(target, copy.target, copy.length)
            self._check_pinning(source, copy.source, copy.length)
            for i in range(copy.length):
                assert 0 <= copy.target + i < len(target)
                assert 0 <= copy.source + i < len(source)
                for part in (slice(half), slice(half, None)):
                    _fake(stream).launch(
                        lambda to=target[copy.target + i, part], of=source[copy.source + i, part]: to.copy_(
                            of
                        )
                    )

    def _check_pinning(self, blocks: torch.Tensor, first: int, count: int) -> None:
        """CUDA refuses a copy that begins in one pinned range and ends in another."""
        start = blocks.data_ptr() + first * blocks.stride(0)
        end = start + count * blocks.stride(0)
        for address, num_bytes in self.pinned_ranges:
            if address < end and start < address + num_bytes:
                assert address <= start, "a copy reaches over the border of a pinned range"
                assert end <= address + num_bytes, "a copy reaches over the border of a pinned range"

    def pin(self, address: int, num_bytes: int) -> None:
        assert address % mmap.PAGESIZE == num_bytes % mmap.PAGESIZE == 0
        if self.fail_pinning:
            raise RuntimeError("planted: out of locked memory")
        self.pinned_ranges.append((address, num_bytes))

    def unpin(self, address: int) -> None:
        [found] = [place for place in self.pinned_ranges if place[0] == address]
        self.pinned_ranges.remove(found)

    def synchronize(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self._streams))

    def memory(self) -> Memory:
        return Memory(free=self.free_bytes, total=2 * self.free_bytes)

    def peak_bytes(self, work: Work) -> int:
        work()
        return self.free_bytes // 4

    def release_cache(self) -> None:
        pass

    def is_lost(self, error: Exception) -> bool:
        return self.lost

    def stir(self) -> None:
        """Do some of what could be done now, or nothing."""
        for _ in range(0 if self.lazy else self._rng.choice((0, 0, 0, 1, 5))):
            if not self._run_one():
                return

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self._run_one(), "waits for work that can never be done"

    def _run_one(self) -> bool:
        runnable = [stream for stream in self._streams if stream.can_run]
        if not runnable:
            return False
        work = self._rng.choice(runnable).queue.popleft()
        assert not isinstance(work, _Mark)
        work()
        return True


def _fake(stream: Stream) -> FakeStream:
    assert isinstance(stream, FakeStream)
    return stream
