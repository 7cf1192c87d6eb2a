"""The logprobs of a request's prompt: kept until the client holds output, which comes behind all of them."""

from collections.abc import Sequence

import msgspec

from tidegate.engine.messages import PositionLogprobs
from tidegate.service.credit import POSITION_BYTES
from tidegate.service.events import PromptLogprobs

FIRST_OFFSET = 1
"""The first token of a prompt has none."""

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(PositionLogprobs).decode


class PromptLog:
    """One request's, and how much of it the present stream was given."""

    __slots__ = ("_packed", "_request_id", "_sent", "num_known", "size")

    def __init__(self, request_id: str) -> None:
        self.num_known = 0
        """Those that the engine has given."""
        self.size = 0
        """Bytes of those that are kept."""
        self._request_id = request_id
        self._packed: list[bytes] = []
        """Of all of them, or none: those that the client holds are let go of together."""
        self._sent = 0

    @property
    def next_offset(self) -> int:
        """The prompt offset of the token whose logprobs come next."""
        return FIRST_OFFSET + self.num_known

    def push(self, positions: Sequence[PositionLogprobs]) -> None:
        """Take the next ones."""
        packed = list(map(_pack, positions))
        self._packed += packed
        self.num_known += len(packed)
        self.size += sum(map(len, packed)) + len(packed) * POSITION_BYTES

    @property
    def has_news(self) -> bool:
        return self._sent < len(self._packed)

    def take(self, room: int) -> PromptLogprobs:
        """The next ones for the stream, as far as there is room; an alternative counts as a token."""
        first = self._sent
        positions: list[PositionLogprobs] = []
        while room > 0 and self.has_news:
            position = _unpack(self._packed[self._sent])
            positions.append(position)
            room -= 1 + len(position.top)
            self._sent += 1
        return PromptLogprobs(self._request_id, FIRST_OFFSET + first, positions)

    def rewind(self, is_held: bool) -> None:
        """Another stream listens: it is given those that are kept once more, unless its client holds them."""
        self._sent = len(self._packed) if is_held else 0

    def forget(self) -> None:
        """The client holds all of them."""
        self.size = 0
        self._packed, self._sent = [], 0
