"""Token ids to text, one token at a time: the incremental detokenizers."""

import codecs
import copy
from typing import Protocol

from tidegate.engine.text import Text

REPLACEMENT_CHAR = "\ufffd"
MAX_HELD_TOKENS = 8
"""A character is at most 4 bytes, and so at most 4 tokens: a longer broken tail will not mend."""


class Detokenizer(Protocol):
    """Token ids in, text out. What went in gives, all together, the text of the whole."""

    is_between: bool
    """Whether the next token's text depends on that token alone."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty inside a character."""

    def flush(self) -> str:
        """The rest, at the end: broken characters as U+FFFD."""

    def copy(self) -> "Detokenizer":
        """Another one, that stands where this one does."""


def detokenizer(text: Text, skip_special_tokens: bool) -> Detokenizer:
    """A fresh incremental decoder for one sequence."""
    if text.is_byte_level:
        return _ByteLevelDetokenizer(text, skip_special_tokens)
    return _WindowDetokenizer(text, skip_special_tokens)


class _ByteLevelDetokenizer:
    """Byte-level BPE: a token is bytes, so decoding is that of UTF-8, exact and O(1) a token."""

    def __init__(self, text: Text, skip_special_tokens: bool) -> None:
        self._text = text
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decode = self._decoder.decode
        self.is_between = True

    def copy(self) -> "_ByteLevelDetokenizer":
        twin = _ByteLevelDetokenizer(self._text, self._skip)
        twin._decoder.setstate(self._decoder.getstate())
        twin.is_between = self.is_between
        return twin

    def push(self, token_id: int) -> str:
        if self._skip and self._text.is_special(token_id):
            return ""
        text = self._decode(self._text.token_bytes(token_id))
        self.is_between = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        return self._decode(b"", True)


class _WindowDetokenizer:
    """Any other decoder: new text is what a window of tokens says beyond what its head says.

    The head gives the decoder its context (whether to write the space before a word, say). A window
    that ends in U+FFFD may be inside a character and waits.
    """

    is_between = False

    def __init__(self, text: Text, skip_special_tokens: bool) -> None:
        self._text = text
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._head = 0
        """[0, head) of the window has been given out."""
        self._head_text = ""

    def copy(self) -> "_WindowDetokenizer":
        twin = copy.copy(self)
        twin._window = list(self._window)
        return twin

    def push(self, token_id: int) -> str:
        if self._skip and self._text.is_special(token_id):
            return ""
        self._window.append(token_id)
        whole = self._decode()
        if whole.endswith(REPLACEMENT_CHAR) and len(self._window) - self._head < MAX_HELD_TOKENS:
            return ""
        return self._advance(whole)

    def flush(self) -> str:
        return self._advance(self._decode())

    def _advance(self, whole: str) -> str:
        new_text = whole[len(self._head_text) :]
        if new_text:
            # The head keeps the tokens that spoke last: a decoder that strips what it takes for the
            # start of a text then strips it from head and window alike.
            self._window = self._window[self._head :]
            self._head_text = self._decode()
        self._head = len(self._window)
        return new_text

    def _decode(self) -> str:
        return self._text.decode(self._window, self._skip)
