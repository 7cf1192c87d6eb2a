"""The text of one choice as its tokens come in, and the stop string that ends it."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

from tidegate.engine.detokenizer import detokenizer
from tidegate.engine.request import FinishReason, SamplingParams
from tidegate.engine.stops import stop_automaton
from tidegate.engine.text import Text


class StopMatch(NamedTuple):
    """A stop string ended the choice."""

    stop: str
    at_offset: int
    """How many output tokens there are: the one that completed the stop string is the last."""


class TextDelta(NamedTuple):
    """What some tokens add to a choice."""

    text: str
    num_tokens: int
    """How many of the pushed tokens belong to the output; the others came after a stop string."""
    stop: StopMatch | None


class TextStream:
    """The text of one choice as its tokens come in, ended by a stop string where one appears.

    Text that may turn out to be the beginning of a stop string is held back, and so are the bytes of
    an unfinished character. However the tokens are split over calls, the texts add up to the same. Of
    several stop strings the one that is complete first wins; of those complete at the same character,
    the longest.
    """

    __slots__ = (
        "_detokenizer",
        "_held",
        "_include_stop",
        "_is_clear",
        "_min_tokens",
        "_plain",
        "_skip_special_tokens",
        "_state",
        "_stops",
        "_text",
        "num_tokens",
        "stop",
    )

    def __init__(self, text: Text, params: SamplingParams) -> None:
        self.num_tokens = 0
        """Output tokens so far."""
        self.stop: StopMatch | None = None
        self._text = text
        self._detokenizer = detokenizer(text, params.skip_special_tokens)
        self._skip_special_tokens = params.skip_special_tokens
        self._stops = stop_automaton(params.stop) if params.stop else None
        self._state = 0
        self._held = ""
        self._plain = text.plain_tokens(params.skip_special_tokens, params.stop)
        self._is_clear = self._detokenizer.is_between
        """Whether nothing is held back, neither of a stop string nor of a character."""
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop

    def push(self, token_ids: Sequence[int], reason: FinishReason | None = None) -> TextDelta:
        """Take the next tokens; ``reason``, where the engine ended the choice behind them.

        With a reason, the delta holds all that was held back. The token of ``STOP_TOKEN``, the last
        one, has text only where ``include_stop`` asks for it. Behind a stop string nothing counts.
        """
        parts: list[str] = []
        before = self.num_tokens
        last = len(token_ids) - 1
        for index, token_id in enumerate(token_ids):
            if self.stop is not None:
                break
            if index == last and reason is FinishReason.STOP_TOKEN:
                self.num_tokens += 1
                parts.append(self._end(self._text.decode([token_id], False) if self._include_stop else ""))
            else:
                parts.append(self.push_step(token_id))
        if reason is not None:
            parts.append(self._end())
        return TextDelta("".join(parts), self.num_tokens - before, self.stop)

    def copy(self) -> "TextStream":
        """Another stream, that stands where this one does."""
        twin = copy.copy(self)
        twin._detokenizer = self._detokenizer.copy()
        return twin

    def flush(self) -> str:
        """All that is held back, for a choice that ends without more tokens."""
        return self._end()

    def push_step(self, token_id: int) -> str:
        """``push`` of one token behind which the engine goes on: the usual step, which is to be fast."""
        self.num_tokens += 1
        was_clear = self._is_clear
        if was_clear:
            plain = self._plain.get(token_id)
            if plain is not None:
                return plain
        text = self._match(self._detokenizer.push(token_id))
        self._is_clear = not self._held and self._detokenizer.is_between
        # Below min_tokens, a stop string that is complete does not show.
        if was_clear and self._is_clear and self.stop is None and self.num_tokens >= self._min_tokens:
            self._plain[token_id] = text
        return text

    def change_stops(self, stops: tuple[str, ...]) -> str:
        """Other stop strings, from the next token on; the text that only the old ones held back.

        A new one may begin in text that is held back, but not end there.
        """
        if self.stop is not None:
            return ""
        text, self._state = self._held, 0
        self._stops = stop_automaton(stops) if stops else None
        self._plain = self._text.plain_tokens(self._skip_special_tokens, stops)
        keep = len(text)
        if self._stops is not None:
            for char in text:
                self._state, _ = self._stops.step(self._state, char)
            keep -= self._stops.depth[self._state]
        self._held = text[keep:]
        self._is_clear = not self._held and self._detokenizer.is_between
        return text[:keep]

    def _end(self, stop_token_text: str = "") -> str:
        if self.stop is not None:
            return ""
        text = self._match(self._detokenizer.flush())
        if self.stop is not None:
            return text
        text += self._held + stop_token_text
        self._held, self._state = "", 0
        return text

    def _match(self, new_text: str) -> str:
        """What can be said once ``new_text`` is known: up to a stop string, or to what may become one."""
        stops = self._stops
        if stops is None or not new_text:
            return new_text
        text = self._held + new_text
        position = len(self._held)
        matched: str | None
        for char in new_text:
            position += 1
            self._state, matched = stops.step(self._state, char)
            if matched is not None and self.num_tokens >= self._min_tokens:
                self.stop = StopMatch(matched, self.num_tokens)
                self._held = ""
                return text[: position if self._include_stop else position - len(matched)]
        keep = len(text) - stops.depth[self._state]
        self._held = text[keep:]
        return text[:keep]
