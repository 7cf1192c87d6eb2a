"""The output of one choice: its log, and what of it the client's stream still has to be given.

Output offsets, as half-open intervals::

    [0, num_given)       came with the request
    [0, acked)           held by the client: never sent again
    [0, sent)            given to the stream
    [0, len(token_ids))  computed, and counts

Text is made when the tokens arrive, since stop strings have to be found then, and a healthy stream takes
it at once. For a stream that is far behind, or that comes back, it is made again from the tokens, and is
the same: the text up to an offset depends on the tokens up to there alone.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from tidegate.engine.messages import PositionLogprobs
from tidegate.engine.request import FinishReason, SamplingParams
from tidegate.engine.text import Text
from tidegate.engine.text_stream import TextDelta, TextStream
from tidegate.service.credit import POSITION_BYTES, TOKEN_BYTES
from tidegate.service.events import ChoiceEnd, Delta, Progress

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(PositionLogprobs).decode


class _StopChange(NamedTuple):
    """From this output offset on, other stop strings hold."""

    at_offset: int
    stops: tuple[str, ...]


class Choice:
    """One choice's log and its place in it."""

    __slots__ = (
        "_changes",
        "_end_is_sent",
        "_is_behind",
        "_logprobs",
        "_logprobs_from",
        "_params",
        "_progress",
        "_replay",
        "_text",
        "_text_upto",
        "_weight",
        "acked",
        "delivered",
        "end",
        "index",
        "is_confirmed",
        "num_given",
        "request_id",
        "sent",
        "stream",
        "token_ids",
        "waiting_text",
    )

    def __init__(
        self, request_id: str, index: int, text: Text, params: SamplingParams, given: Sequence[int]
    ) -> None:
        """``given``: output that the request brought along, for its one choice."""
        self.request_id = request_id
        self.index = index
        self.token_ids: array[int] = array("I", given)
        self.num_given = len(given)
        self.sent = self.acked = self.num_given
        self.delivered = self.num_given
        """Output tokens [0, delivered) were written to the stream."""
        self.stream = TextStream(text, params)
        self.stream.push(given)
        self.end: ChoiceEnd | None = None
        self.is_confirmed = False
        """Whether the engine said that it holds nothing of this choice any more."""
        self._text = text
        self._params = params
        self._changes: list[_StopChange] = []
        self.waiting_text = ""
        """Of [sent, _text_upto), or where that counts, of all that is not sent."""
        self._is_behind = False
        """Text of what stands behind ``_text_upto`` was not kept, and is to be made again."""
        self._text_upto = self.num_given
        self._replay: TextStream | None = None
        """Stands at ``_text_upto`` while the choice is behind; None: still to be made from the beginning."""
        self._weight = 1 + (params.logprobs or 0)
        """A token's part of a message's size, where each alternative counts as one."""
        self._logprobs: list[bytes] = []
        self._logprobs_from = self.num_given
        self._progress: list[tuple[int, Progress]] = []
        self._end_is_sent = False

    # What arrives.

    def pass_on(self, token_id: int) -> str | None:
        """Take one token and give it out at once, in the usual case: its text; None, and nothing done, in
        any other one.
        """
        if self._is_behind:
            return None
        self.token_ids.append(token_id)
        self.sent += 1
        return self.stream.push_step(token_id)

    def push(
        self,
        token_ids: list[int],
        logprobs: list[PositionLogprobs] | None,
        reason: FinishReason | None,
        keep_text: bool,
    ) -> TextDelta:
        """Take the next tokens; ``reason``, where the engine ended the choice behind them.

        ``keep_text``: there is a stream that will soon ask for it.
        """
        if not keep_text:
            self._fall_behind()
        added = self.stream.push(token_ids, reason)
        log = self.token_ids
        if added.num_tokens < len(token_ids):
            token_ids = token_ids[: added.num_tokens]
        log.extend(token_ids)
        if logprobs:
            self._logprobs += map(_pack, logprobs[: added.num_tokens])
        if not self._is_behind:
            self.waiting_text += added.text
        return added

    def flush(self, keep_text: bool) -> None:
        """The choice ends without more tokens: what was held back is text now."""
        if not keep_text:
            self._fall_behind()
        text = self.stream.flush()
        if not self._is_behind:
            self.waiting_text += text

    def note(self, progress: Progress) -> None:
        self._progress.append((len(self.token_ids), progress))

    def change_stops(self, stops: tuple[str, ...]) -> None:
        """Other stop strings, from the next token on."""
        self._changes.append(_StopChange(len(self.token_ids), stops))
        text = self.stream.change_stops(stops)
        if not self._is_behind:
            self.waiting_text += text

    @property
    def log_bytes(self) -> int:
        """What its log takes."""
        logprobs = len(self._logprobs) * POSITION_BYTES + sum(map(len, self._logprobs))
        return len(self.token_ids) * TOKEN_BYTES + logprobs

    # What leaves.

    @property
    def has_news(self) -> bool:
        return (
            self.sent < len(self.token_ids)
            or bool(self.waiting_text)
            or (self.end is not None and not self._end_is_sent)
            or bool(self._progress)
        )

    def take(self, room: int) -> Delta | None:
        """What is new, as far as there is room for it; None where nothing is."""
        start, stop = self.sent, len(self.token_ids)
        is_last = self.end is not None and not self._end_is_sent
        if start == stop and not is_last and not self.waiting_text:
            return None
        if self._has_kept_text:
            # Not cut to the room: so much text does not wait.
            stop, ends = (self._text_upto, False) if self._is_behind else (stop, is_last)
            text, self.waiting_text = self.waiting_text, ""
            token_ids = self.token_ids[start:stop]
        else:
            stop = min(stop, start + max(1, room // self._weight))
            ends = is_last and stop == len(self.token_ids)
            token_ids = self.token_ids[start:stop]
            text = self._text_again(token_ids, ends)
        reason = self.end.reason if ends and self.end is not None else None
        self.sent = stop
        self._end_is_sent = self._end_is_sent or ends
        logprobs = None
        if self._logprobs:
            offset = self._logprobs_from
            logprobs = [_unpack(packed) for packed in self._logprobs[start - offset : stop - offset]]
        return Delta(self.request_id, self.index, start, token_ids, text, logprobs, reason)

    @property
    def has_progress(self) -> bool:
        return bool(self._progress)

    def take_progress(self, upto: int) -> tuple[list[Progress], list[Progress]]:
        """What happened up to this output offset, and what happened behind it."""
        before = [progress for offset, progress in self._progress if offset <= upto]
        behind = [progress for offset, progress in self._progress if offset > upto]
        self._progress.clear()
        return before, behind

    def ack(self, upto: int) -> int:
        """The client holds the tokens before this offset; how many of them it had not acknowledged."""
        upto = min(upto, self.sent)
        if upto <= self.acked:
            return 0
        newly, self.acked = upto - self.acked, upto
        del self._logprobs[: upto - self._logprobs_from]
        self._logprobs_from = max(self._logprobs_from, upto)
        return newly

    def rewind(self, next_offset: int | None) -> None:
        """Another stream asks for everything from this offset on; None: from the last ``Ack``."""
        offset = self.acked if next_offset is None else min(max(next_offset, self.acked), len(self.token_ids))
        self.sent = self.delivered = offset
        self._end_is_sent = False
        self.forget_text()

    def forget_text(self) -> None:
        """Make the text from ``sent`` on again, from the beginning of all, when it is asked for."""
        self.waiting_text, self._text_upto = "", self.sent
        self._is_behind, self._replay = bool(self.token_ids), None

    # Inside.

    @property
    def _has_kept_text(self) -> bool:
        """Whether the text that comes next was kept when its tokens arrived."""
        return not self._is_behind or self._text_upto > self.sent or bool(self.waiting_text)

    def _fall_behind(self) -> None:
        """Keep no text of what comes from here on."""
        if not self._is_behind:
            self._is_behind, self._replay = True, self.stream.copy()
            self._text_upto = len(self.token_ids)

    def _text_again(self, token_ids: Sequence[int], ends: bool) -> str:
        """The text of the tokens from ``sent`` on; where the choice ends, of all that was held back, too."""
        if self._replay is None:
            self._replay = TextStream(self._text, self._params)
            self._retrace(self._replay, 0, self.token_ids[: self.sent])
        reason = self.end.reason if ends and self.end is not None else None
        text = self._retrace(self._replay, self.sent, token_ids, reason)
        self._text_upto = self.sent + len(token_ids)
        if self._text_upto == len(self.token_ids):
            self._is_behind, self._replay = False, None
        return text

    def _retrace(
        self, stream: TextStream, start: int, token_ids: Sequence[int], reason: FinishReason | None = None
    ) -> str:
        """Push tokens that stand at ``start``, with the stop strings that held there."""
        parts, stop = [], start + len(token_ids)
        at = start
        for change in self._changes:
            if start <= change.at_offset < stop or (change.at_offset == stop and reason is not None):
                parts.append(stream.push(token_ids[at - start : change.at_offset - start]).text)
                parts.append(stream.change_stops(change.stops))
                at = change.at_offset
        parts.append(stream.push(token_ids[at - start :], reason).text)
        return "".join(parts)
