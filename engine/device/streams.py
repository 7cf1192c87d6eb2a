"""Streams and events: all that the runner and the copy engine know of a GPU.

``engine.device.cuda`` is the real one. A test puts another in its place that ends work late and in other
orders, as a GPU may, so that a missing fence shows without one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch


class Event(Protocol):
    """A point in the work of a stream; none until it is recorded."""

    def record(self, stream: "Stream") -> None:
        """Mark what the stream was given so far; forget what was marked before."""

    def query(self) -> bool:
        """Whether the work up to the mark is done."""

    def synchronize(self) -> None:
        """Wait until it is. What the work wrote to pinned memory may be read then."""

    def seconds_since(self, earlier: "Event") -> float:
        """Between two marks that have passed."""


class Stream(Protocol):
    """Work done in the order in which it was given."""

    def launch(self, work: Callable[[], object]) -> None:
        """Call ``work``, which gives the device operations on tensors to do, behind all that came before.

        It must not look at what they compute; raises what it raises.
        """

    def wait(self, event: Event) -> None:
        """Let what is given from now on start behind the event's mark, as it stands now."""


class BlockCopy(NamedTuple):
    """``length`` neighbouring blocks, from one place to another."""

    target: int
    source: int
    length: int


class Memory(NamedTuple):
    """A device's, in bytes."""

    free: int
    total: int


class Device(Protocol):
    """One GPU and the thread that drives it."""

    @property
    def torch_device(self) -> torch.device: ...

    def stream(self) -> Stream: ...

    def event(self) -> Event: ...

    def pinned(self, num_words: int) -> torch.Tensor:
        """Host memory, int32, that kernels read and write where it lies. Its content is undefined."""

    def capture(self, stream: Stream, work: Callable[[], object]) -> Callable[[], None]:
        """Record what ``work`` would give the stream; what is returned gives it all at once, as it was.

        ``work`` must have run before, and its tensors must be there still. All recordings share one pool of
        memory: what one leaves in it is gone after the next has been replayed.
        """

    def copy_blocks(
        self, stream: Stream, target: torch.Tensor, source: torch.Tensor, copies: Sequence[BlockCopy]
    ) -> None:
        """Copy blocks between two pools, uint8 (blocks, bytes), by a copy engine; one of them is pinned."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Let copy engines reach host memory; both numbers are multiples of a page. From any thread."""

    def unpin(self, address: int) -> None: ...

    def synchronize(self) -> None:
        """Wait for all that the device was given, on whatever stream."""

    def memory(self) -> Memory: ...

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """What ``work``, which waits for what it gives the device, takes of its memory at most."""

    def release_cache(self) -> None:
        """Give back memory that is kept for reuse."""

    def is_lost(self, error: Exception) -> bool:
        """Whether nothing more will run on the device in this process."""
