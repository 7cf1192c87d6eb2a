"""CUDA graphs of decode steps, one for each size of batch that was seen.

A graph replays a step's hundreds of kernels in one call, so that the GPU waits for no Python. It has one
batch size; a smaller batch is padded. Graphs are captured when their size comes first, so that a start takes
no longer for them.
"""

from collections.abc import Callable

import structlog
import torch

from tidegate.engine.device.streams import Device, Stream

_POWERS = (1, 2, 4, 8)
_MULTIPLE = 16

log = structlog.get_logger(__name__)


Decode = Callable[[int, bool], None]
"""Gives the device one step of so many rows, with sampling or without."""


class DecodeGraphs:
    def __init__(self, device: Device, stream: Stream, max_rows: int) -> None:
        self._device = device
        self._stream = stream
        self._max_rows = max_rows
        self._replays: dict[tuple[int, bool], Callable[[], None]] = {}

    def bucket(self, num_rows: int) -> int:
        """The batch size, with padding, in which so many rows are computed."""
        for power in _POWERS:
            if num_rows <= power:
                return min(power, self._max_rows)
        return min(-(-num_rows // _MULTIPLE) * _MULTIPLE, self._max_rows)

    def launch(self, size: int, samples: bool, decode: Decode) -> None:
        """The step of a bucket's size; the first of its kind operation by operation, then captured."""
        key = size, samples
        replay = self._replays.get(key)
        if replay is not None:
            self._stream.launch(replay)
            return
        self._stream.launch(lambda: decode(size, samples))
        try:
            self._replays[key] = self._device.capture(self._stream, lambda: decode(size, samples))
        except torch.OutOfMemoryError as error:
            # The step itself has been launched. The next one of this size tries again.
            log.warning("graph_out_of_memory", rows=size, error=str(error))

    def clear(self) -> None:
        """Give back the graphs' memory; none may be under way."""
        self._replays.clear()
