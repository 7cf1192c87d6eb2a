"""How a step's news reaches the device: packets in pinned memory, which a kernel reads where they lie.

No copy engine takes part: those are first come, first served, and a step's few words would queue behind
blocks on their way between the tiers.
"""

import numpy as np
import numpy.typing as npt
import torch

from tidegate.engine.device.streams import Device, Event, Stream
from tidegate.kernels.triton.step_inputs import SEGMENT_FIELDS, SEGMENT_WORDS, apply_packet

PACKET_WORDS = 2**16
_PACKETS = 4
"""In the ring. Two steps are under way at once; what a step sends seldom needs a second packet."""


class Inbox:
    """Collects what is to be stored in the device's ``words`` before the next step, and sends it."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        words: torch.Tensor,
        first: int,
        packet_words: int = PACKET_WORDS,
    ) -> None:
        """``words`` from ``first`` on are the inbox proper: room for what ``put`` is given."""
        self._stream = stream
        self._words = words
        self._first = first
        self._used = 0
        self._packet_words = packet_words
        self._packets = [device.pinned(packet_words) for _ in range(_PACKETS)]
        self._read: list[Event] = [device.event() for _ in range(_PACKETS)]
        """Behind the kernel that reads the packet: until then the host must not write to it."""
        self._next = 0
        self._segments: list[tuple[int, npt.NDArray[np.int32]]] = []

    def store(self, place: int, values: npt.NDArray[np.int32]) -> None:
        """``words[place : place + len(values)] = values``. Places stored to before the next send are
        disjoint, or the last one does not win.
        """
        for start in range(0, len(values), SEGMENT_WORDS):
            self._segments.append((place + start, values[start : start + SEGMENT_WORDS]))

    def put(self, values: npt.NDArray[np.int32]) -> torch.Tensor:
        """Room in the inbox with these words in it, once they are sent; until ``clear``."""
        flat = np.ascontiguousarray(values).reshape(-1)
        place = self._first + self._used
        if place + len(flat) > len(self._words):
            raise RuntimeError(f"a step has more than {len(self._words) - self._first} words of news")
        self._used += -(-len(flat) // 4) * 4
        self.store(place, flat)
        return self._words[place : place + len(flat)].view(values.shape)

    def clear(self) -> None:
        """What was put may be overwritten by what comes next: all that reads it has been launched."""
        self._used = 0

    def send(self) -> None:
        """Give the stream what was collected, behind all that it was given before."""
        segments, self._segments = self._segments, []
        while segments:
            room, count = self._packet_words, 0
            for _, values in segments:
                room -= SEGMENT_FIELDS + len(values)
                if room < 0:
                    break
                count += 1
            self._send_packet(segments[:count])
            segments = segments[count:]

    def _send_packet(self, segments: list[tuple[int, npt.NDArray[np.int32]]]) -> None:
        index, self._next = self._next, (self._next + 1) % _PACKETS
        self._await_reader(index)
        packet, read = self._packets[index], self._read[index]
        count = len(segments)
        sizes = np.array([len(values) for _, values in segments], np.int32)
        host = packet.numpy()
        table = host[: SEGMENT_FIELDS * count].reshape(count, SEGMENT_FIELDS)
        table[:, 0] = [place for place, _ in segments]
        table[:, 1] = SEGMENT_FIELDS * count + sizes.cumsum() - sizes
        table[:, 2] = sizes
        data = np.concatenate([values for _, values in segments])
        host[SEGMENT_FIELDS * count : SEGMENT_FIELDS * count + len(data)] = data
        self._stream.launch(lambda: apply_packet(self._words, packet, count))
        read.record(self._stream)

    def _await_reader(self, index: int) -> None:
        """With the ring's packets the reader has long been done."""
        self._read[index].synchronize()
