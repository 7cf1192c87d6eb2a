"""What the engine was doing when it died: a few words of memory that it shares with its front.

The engine writes, the front reads: whether there is progress, at any time; which requests the steps under
way held, once the engine is dead. The memory has no name and no file, and outlives the engine because the
front maps it too.
"""

import mmap
import os
import struct
from collections.abc import Sequence

import msgspec

from tidegate.engine.messages import Place

SLOTS = 2
"""Steps that may be under way at once."""
SLOT_BYTES = 2**18
"""Enough for the most sequences of one step, named as a front names them. Pages not written cost nothing."""
COUNTER = struct.Struct("=Q")


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Place]).decode


class FlightRecorder:
    """One end of the memory. Without a descriptor, it is for this process alone."""

    def __init__(self, descriptor: int = -1) -> None:
        """``descriptor``: what ``new_memory`` gave. It may be closed afterwards."""
        self._memory = mmap.mmap(descriptor, (1 + SLOTS) * SLOT_BYTES)

    @property
    def beats(self) -> int:
        """Grows for as long as the engine makes progress."""
        (beats,) = COUNTER.unpack_from(self._memory, 0)
        return int(beats)

    def beat(self) -> None:
        COUNTER.pack_into(self._memory, 0, self.beats + 1)

    def launched(self, step_id: int, places: Sequence[Place]) -> None:
        """Before the step is launched. It counts as under way until it has landed."""
        data, start = _encode(places), self._slot(step_id)
        self._memory[start + COUNTER.size : start + COUNTER.size + len(data)] = data
        # The length last: a death in between leaves the slot empty, and the step was not launched.
        COUNTER.pack_into(self._memory, start, len(data))

    def landed(self, step_id: int) -> None:
        """Its results are taken in, or it has failed."""
        COUNTER.pack_into(self._memory, self._slot(step_id), 0)

    def executing(self) -> list[Place]:
        """All that the steps under way compute."""
        places = []
        for slot in range(SLOTS):
            start = self._slot(slot)
            (length,) = COUNTER.unpack_from(self._memory, start)
            if length:
                places += _decode(self._memory[start + COUNTER.size : start + COUNTER.size + length])
        return places

    def close(self) -> None:
        self._memory.close()

    @staticmethod
    def _slot(step_id: int) -> int:
        return (1 + step_id % SLOTS) * SLOT_BYTES


def new_memory() -> int:
    """The descriptor of an empty one, for both ends."""
    descriptor = os.memfd_create("tidegate-flight", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, (1 + SLOTS) * SLOT_BYTES)
    return descriptor
