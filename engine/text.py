"""Between text and token ids: tokenizer and chat template.

Knows no gRPC and imports no torch, so that a front stays light. The tokenizer is the checkpoint's
``tokenizer.json`` as it stands; nothing here runs code from a checkpoint.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import jinja2
from tokenizers import Tokenizer, decoders

from tidegate.engine.checkpoint import resolve
from tidegate.engine.config import ConfigError
from tidegate.engine.request import InvalidRequest, Violation

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
        self.is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        """Whether a token is a sequence of bytes, whatever stands around it."""
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


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 as it is, the others from U+0100 on."""
    table = {chr(b): b for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    others = (b for b in range(256) if b not in table.values())
    table.update({chr(0x100 + index): b for index, b in enumerate(sorted(others))})
    return table


def _invalid(field: str, description: str) -> InvalidRequest:
    return InvalidRequest([Violation(field, description)])
