"""Grammars as llguidance compiles them, over the tokens of a checkpoint's tokenizer.

Their texts come from clients: each is tried in a process of its own before it is compiled here, on a thread
with ``STACK_BYTES``. Nothing of a text is logged.
"""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import structlog
from llguidance import LLMatcher, LLTokenizer

from tidegate.engine.grammar_trial import LIMITS
from tidegate.engine.grammar_trials import GrammarTrials
from tidegate.engine.request import InvalidRequest, StructuredOutput, Violation

MAX_MESSAGE_CHARS = 300
"""Of what is said of a grammar: it may quote all of it."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,16}"
"""Between the parts of a JSON value: enough for any layout, and no sentence that is whitespace for ever."""

log = structlog.get_logger(__name__)


class Grammars:
    """Compiles grammars, on any thread. The tokenizer is read for the first one: of 150,000 tokens that took
    0.8 s and 80 MB.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._loading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._special: list[int] = []
        self._trials = GrammarTrials()

    def close(self) -> None:
        """End the trials under way; what they try is refused."""
        self._trials.close()

    def special_token_ids(self) -> list[int]:
        """Those that are no text, the model's end-of-sequence tokens included. Raises ``ValueError``."""
        self._load()
        return self._special

    def output(self, form: StructuredOutput) -> LLMatcher:
        """The automaton of the sentences of a language. Raises ``InvalidRequest`` that names the field."""
        if form.json_schema is not None:
            try:
                source = LLMatcher.grammar_from_json_schema(
                    form.schema_text, defaults={"whitespace_pattern": WHITESPACE}
                )
            except ValueError as error:
                raise _invalid("structured_output.json_schema", str(error)) from error
        elif form.regex is not None:
            source = LLMatcher.grammar_from_regex(form.regex)
        elif form.grammar is not None:
            source = LLMatcher.grammar_from_lark(form.grammar)
        else:
            source = LLMatcher.grammar_from_lark(f"start: {_any_of(form.choices)}\n")
        return self._compile(source, f"structured_output.{form.field}")

    def text_without(self, words: Sequence[str]) -> LLMatcher:
        """The automaton of all texts that hold none of the words. Raises ``InvalidRequest``."""
        rules = ("start: TEXT", "TEXT: ANY & ~(ANY BAD ANY)", "ANY: /(?s:.)*/", f"BAD: {_any_of(words)}")
        return self._compile(LLMatcher.grammar_from_lark("\n".join(rules) + "\n"), "bad_words")

    def _compile(self, source: str, field: str) -> LLMatcher:
        try:
            tokenizer = self._load()
        except ValueError as error:
            raise _invalid(field, f"needs a tokenizer.json that can be used: {error}") from error
        if (fault := self._trials.fault(source)) is not None:
            raise _invalid(field, fault)
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise _invalid(field, matcher.get_error())
        return matcher

    def _load(self) -> LLTokenizer:
        """Raises ``ValueError`` where the checkpoint has no tokenizer that can be used."""
        with self._loading:
            if self._tokenizer is None:
                began = time.monotonic()
                if not self._file.is_file():
                    raise ValueError("there is none beside the weights")
                tokenizer = LLTokenizer(
                    self._file.read_text(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
                )
                special = [token for token in range(self._vocab_size) if tokenizer.is_special_token(token)]
                self._special = [*special, *self._eos_token_ids]
                self._tokenizer = tokenizer
                seconds = round(time.monotonic() - began, 3)
                log.info("grammars_ready", tokens=self._vocab_size, seconds=seconds)
            return self._tokenizer


def _any_of(words: Sequence[str]) -> str:
    """An alternative of literals; written as in JSON, but for a character that Lark wants escaped."""
    return " | ".join(json.dumps(word, ensure_ascii=False).replace("\x7f", r"\u007f") for word in words)


def _invalid(field: str, message: str) -> InvalidRequest:
    text = " ".join(message.split())
    if len(text) > MAX_MESSAGE_CHARS:
        text = text[:MAX_MESSAGE_CHARS] + "…"
    return InvalidRequest([Violation(field, text)])
