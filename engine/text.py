"""Between text and token ids: tokenizer, chat template, incremental detokenizer, stop strings.

Knows no gRPC and imports no torch, so that a front stays light. The tokenizer is the checkpoint's
``tokenizer.json`` as it stands; nothing here runs code from a checkpoint.
"""

import asyncio
import codecs
import copy
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

import jinja2
from tokenizers import Tokenizer, decoders

from tidegate.engine.checkpoint import resolve
from tidegate.engine.config import ConfigError
from tidegate.engine.request import FinishReason, InvalidRequest, SamplingParams, Violation

REPLACEMENT_CHAR = "\ufffd"
MAX_HELD_TOKENS = 8
"""A character is at most 4 bytes, and so at most 4 tokens: a longer broken tail will not mend."""

P = ParamSpec("P")
R = TypeVar("R")


class Text:
    """A checkpoint's tokenizer and chat template. Every method may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, render: Callable[..., str] | None = None) -> None:
        """``render(conversation, add_generation_prompt, continue_final_message)``, all by keyword."""
        # A checkpoint may ship with limits meant for training; a prompt is never cut in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._render = render
        self._special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._token_bytes: dict[int, bytes] = {}
        self._plain: WeakValueDictionary[tuple[bool, tuple[str, ...]], PlainTokens] = WeakValueDictionary()
        self._pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="text")

    @classmethod
    def load(cls, model: str) -> "Text":
        """Read tokenizer and chat template of a model: a folder, a hub name, or ``demo``.

        Raises ``ConfigError`` that names what is missing.
        """
        # Not at the top of the file: it takes longer than a front's other imports together, and the
        # engine process, already started by then, loads meanwhile.
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

        file = resolve(model) / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"{file} is missing; load this tokenizer once with transformers.AutoTokenizer and save it "
                "there with save_pretrained"
            )
        try:
            loaded = PreTrainedTokenizerFast.from_pretrained(file.parent)
        except Exception as error:  # what a broken file raises is not narrower than that
            first_line = str(error).strip().partition("\n")[0]
            raise ConfigError(f"{file} cannot be read: {type(error).__name__}: {first_line}") from error

        def render(**options: Any) -> str:
            return str(loaded.apply_chat_template(tokenize=False, **options))

        return cls(loaded.backend_tokenizer, render if loaded.chat_template else None)

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, special tokens included; the model's may be padded beyond it."""
        return self._tokenizer.get_vocab_size()

    @property
    def has_chat_template(self) -> bool:
        return self._render is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises ``InvalidRequest`` where ``text`` is no valid Unicode (a lone surrogate)."""
        try:
            # tokenizers would call a lone surrogate "not a string".
            text.encode()
        except UnicodeEncodeError as error:
            raise _invalid("prompt", f"is no valid Unicode at character {error.start}") from error
        # As a batch of one it leaves the interpreter's lock to others: a long text takes seconds.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, each message ``{"role": …, "content": …}``, by the chat template.

        ``add_generation_prompt`` opens the assistant's next message; ``continue_final_message`` leaves
        the last one open instead, to be carried on. Raises ``InvalidRequest`` that names ``messages``.
        """
        if not messages:
            raise _invalid("messages", "must hold at least one message")
        for index, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise _invalid(f"messages[{index}].role", "must be a string")
        text = self._rendered(messages, add_generation_prompt, continue_final_message)
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False)

    def continue_chat(
        self,
        token_ids: list[int],
        num_prompt: int,
        history: Sequence[Mapping[str, Any]] | None,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a chat that goes on: ``token_ids``, then the end of the answer and new messages.

        [0, num_prompt) of ``token_ids`` are the prompt that ``history`` became, or another prompt (None);
        the others are the answer. They stay as they were sampled, so that what was computed for them
        counts. Where the template writes a past turn in another way than it was read (some drop an
        answer's reasoning), the whole chat is rendered anew, and only the beginning is the same.

        Raises ``InvalidRequest`` that names ``messages``.
        """
        answer = self.decode(token_ids[num_prompt:])
        if history is None:
            history, answer = [{"role": "user", "content": "x"}], "y"
        chat = [*history, {"role": "assistant", "content": answer}, *messages]
        opened = self._rendered(history, add_generation_prompt=True)
        whole = self._rendered(chat, add_generation_prompt)
        for head in (opened + answer, opened + answer.strip()):
            if whole.startswith(head):
                rest = self.encode(whole[len(head) :], add_special_tokens=False)
                # The answer may have ended with the very token that closes a turn.
                closed = bool(rest) and rest[0] == token_ids[-1] and self.is_special(rest[0])
                return [*token_ids, *rest[closed:]]
        return self.encode(whole, add_special_tokens=False)

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool = False,
    ) -> str:
        """Raises ``InvalidRequest`` that names ``messages``."""
        if self._render is None:
            raise _invalid("messages", "this model has no chat template; send text or token ids")
        try:
            return self._render(
                conversation=list(messages),
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            # Not in the error's own words, which may quote a message.
            description = "the chat template refused them: check the roles, their order and the contents"
            raise _invalid("messages", description) from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids outside the vocabulary have no text."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return await self._in_pool(self.encode, text, add_special_tokens)

    async def render_chat_async(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        return await self._in_pool(self.render_chat, messages, add_generation_prompt, continue_final_message)

    async def continue_chat_async(
        self,
        token_ids: list[int],
        num_prompt: int,
        history: Sequence[Mapping[str, Any]] | None,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> list[int]:
        return await self._in_pool(
            self.continue_chat, token_ids, num_prompt, history, messages, add_generation_prompt
        )

    async def decode_async(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return await self._in_pool(self.decode, token_ids, skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool) -> "Detokenizer":
        """A fresh incremental decoder for one sequence."""
        if self._is_byte_level:
            return _ByteLevelDetokenizer(self, skip_special_tokens)
        return _WindowDetokenizer(self, skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of a byte-level token: a piece of a character, perhaps."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id) or ""
            table = _byte_of_char()
            try:
                known = bytes(table[char] for char in token)
            except KeyError:  # an added token, whose content is plain text
                known = token.encode()
            self._token_bytes[token_id] = known
        return known

    def plain_tokens(self, skip_special_tokens: bool, stops: tuple[str, ...]) -> "PlainTokens":
        """Shared by all streams of this kind, and gone with the last of them."""
        return self._plain.setdefault((skip_special_tokens, stops), PlainTokens())

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_pool(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))


class PlainTokens(dict[int, str]):
    """The text of tokens, as far as they were met, that is the same whatever came before, and that no stop
    string has a part in: behind a stream that holds nothing back, they need not be looked at again.
    """


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
        self._detokenizer = text.detokenizer(params.skip_special_tokens)
        self._skip_special_tokens = params.skip_special_tokens
        self._stops = _stop_automaton(params.stop) if params.stop else None
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
        self._stops = _stop_automaton(stops) if stops else None
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


class _StopAutomaton:
    """Aho-Corasick over stop strings: one step a character, whatever the strings are.

    A state stands for the longest suffix of the text that begins a stop string; ``depth`` is its
    length, which is exactly what must be held back.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._matched: list[str | None] = [None]
        self.depth = [0]
        for stop in stops:
            self._insert(stop)
        # Breadth first: a state's fallback is shallower than the state.
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                self._fail[child], _ = self.step(self._fail[state], char)
                self._matched[child] = self._matched[child] or self._matched[self._fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> tuple[int, str | None]:
        """The state behind ``char``, and the longest stop string that ends there."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        state = self._next[state].get(char, 0)
        return state, self._matched[state]

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._matched.append(None)
                self.depth.append(self.depth[state] + 1)
            state = self._next[state][char]
        self._matched[state] = stop


@lru_cache(maxsize=256)
def _stop_automaton(stops: tuple[str, ...]) -> _StopAutomaton:
    return _StopAutomaton(stops)


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 as it is, the others from U+0100 on."""
    table = {chr(b): b for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    others = (b for b in range(256) if b not in table.values())
    table.update({chr(0x100 + index): b for index, b in enumerate(sorted(others))})
    return table


def _invalid(field: str, description: str) -> InvalidRequest:
    return InvalidRequest([Violation(field, description)])
