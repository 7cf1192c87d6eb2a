"""What a request is: its sampling parameters, its content and the reasons for which it ends."""

import json
from collections.abc import Mapping
from enum import StrEnum
from itertools import islice
from typing import Any, NamedTuple

import msgspec

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 300
MOST_LOGIT_BIAS = 100
MAX_ALLOWED_TOKEN_IDS = 2**14
MAX_BAD_WORDS = 32
MAX_BAD_WORD_CHARS = 64
"""The automaton of so many words of words so long can still be made in some milliseconds."""
MAX_SCHEMA_CHARS = 2**15
MAX_GRAMMAR_CHARS = 2**14
MAX_REGEX_CHARS = 2**12
"""No bound on what it takes to compile them, which ``engine.grammar_trial`` sets."""
MAX_OUTPUT_CHOICES = 2**10
MAX_OUTPUT_CHOICE_CHARS = 2**8
SEED_RANGE = 2**64
COUNT_RANGE = 2**63
"""What the sampler's arrays can hold."""


class FinishReason(StrEnum):
    """Why a choice ended. Every choice of every accepted request ends with exactly one of these."""

    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    GRAMMAR_COMPLETE = "grammar_complete"
    """The structured output is a whole sentence, and nothing can follow it."""
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ERROR = "error"


class Violation(NamedTuple):
    """One thing that is wrong with a request: the field, and what to do about it."""

    field: str
    description: str

    def below(self, parent: str) -> "Violation":
        """The same, of a field of ``parent``; of ``parent`` itself where the field has no name."""
        return self._replace(field=f"{parent}.{self.field}" if self.field else parent)


class InvalidRequest(ValueError):
    """A request that cannot be served as it stands; carries every violation at once."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class StructuredOutput(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The output is a sentence of one language; exactly one field says of which."""

    json_schema: str | dict[str, Any] | None = None
    """The output is a JSON value that this schema accepts."""
    regex: str | None = None
    """Matches the whole output. Rust's syntax: without look-around and back-references."""
    grammar: str | None = None
    """Context-free, in Lark's notation as ``llguidance`` reads it."""
    choices: tuple[str, ...] = ()
    """One of these, word for word."""

    @property
    def field(self) -> str:
        """The one that is set, or the first of them."""
        return next(iter(self._fields_set()), "json_schema")

    @property
    def schema_text(self) -> str:
        """``json_schema`` as JSON; the order of its properties is that of the output."""
        return self.json_schema if isinstance(self.json_schema, str) else json.dumps(self.json_schema)

    def violations(self) -> list[Violation]:
        """What can be told without compiling it."""
        if len(self._fields_set()) != 1:
            return [Violation("", "must have exactly one of json_schema, regex, grammar, choices")]
        field = self.field
        most = {"json_schema": MAX_SCHEMA_CHARS, "regex": MAX_REGEX_CHARS, "grammar": MAX_GRAMMAR_CHARS}
        if field in most:
            source = self.schema_text if field == "json_schema" else getattr(self, field)
            if not 0 < len(source) <= most[field]:
                return [Violation(field, f"must have 1 to {most[field]} characters")]
            return []
        if len(self.choices) > MAX_OUTPUT_CHOICES:
            return [Violation(field, f"takes at most {MAX_OUTPUT_CHOICES} strings")]
        if not all(0 < len(choice) <= MAX_OUTPUT_CHOICE_CHARS for choice in self.choices):
            return [Violation(field, f"each string must have 1 to {MAX_OUTPUT_CHOICE_CHARS} characters")]
        if sum(map(len, self.choices)) > MAX_SCHEMA_CHARS:
            return [Violation(field, f"must have at most {MAX_SCHEMA_CHARS} characters together")]
        return []

    def _fields_set(self) -> list[str]:
        fields = ("json_schema", "regex", "grammar")
        return [name for name in fields if getattr(self, name) is not None] + ["choices"] * bool(self.choices)


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How tokens are chosen and when a choice ends.

    The token at a position depends on the request alone (logits, these parameters, ``seed``, the
    position), never on what else was in the batch.

    Raises ``InvalidRequest`` that lists every field out of range.
    """

    n: int = 1
    temperature: float = 1.0
    """0 is greedy; ties take the lowest token id."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """In [0, 2**64). None: drawn at random when the request is admitted, and reported back."""
    max_tokens: int | None = None
    """None: as many as the context and the device tier hold."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    """Whether the text ends with the stop string or stop token that ended it."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the most likely tokens to report at each position, beside the chosen one."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first. Such a prompt is computed in full, whatever of it
    the tiers hold."""
    logit_bias: dict[int, float] = {}
    """By token id, added to its logit before anything else. ``logprobs`` do not see it."""
    allowed_token_ids: tuple[int, ...] = ()
    """If not empty, no other token can be chosen, end-of-sequence tokens included."""
    bad_words: tuple[str, ...] = ()
    """The text never holds one of these, however it is cut into tokens. Special tokens count as no text."""
    structured_output: StructuredOutput | None = None
    """The form of the output. Its end is that of a sentence: by an end-of-sequence token, or by itself where
    nothing can follow."""
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        found = self.violations()
        if found:
            raise InvalidRequest(found)

    def violations(self) -> list[Violation]:
        """Everything that is out of range, in the order of the fields."""
        checks = (
            ("n", 1 <= self.n <= MAX_CHOICES, f"must be between 1 and {MAX_CHOICES}"),
            ("temperature", _within(self.temperature, 0, 100), "must be between 0 and 100; 0 is greedy"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < COUNT_RANGE, "must be 0 (keep all tokens) or positive, below 2**63"),
            ("min_p", _within(self.min_p, 0, 1), "must be between 0 and 1"),
            ("presence_penalty", _within(self.presence_penalty, -2, 2), "must be between -2 and 2"),
            ("frequency_penalty", _within(self.frequency_penalty, -2, 2), "must be between -2 and 2"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "must be above 0 and at most 10"),
            ("seed", self.seed is None or 0 <= self.seed < SEED_RANGE, "must be between 0 and 2**64 - 1"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "must be at least 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= (COUNT_RANGE - 1 if self.max_tokens is None else self.max_tokens),
                "must be between 0 and max_tokens, below 2**63",
            ),
            ("stop", len(self.stop) <= MAX_STOP_STRINGS, f"takes at most {MAX_STOP_STRINGS} strings"),
            (
                "stop",
                all(0 < len(s) <= MAX_STOP_STRING_CHARS for s in self.stop),
                f"each string must have 1 to {MAX_STOP_STRING_CHARS} characters",
            ),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS and all(t >= 0 for t in self.stop_token_ids),
                f"takes at most {MAX_STOP_TOKEN_IDS} ids, none negative",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"must be between 0 and {MAX_LOGPROBS}",
            ),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"must be between 0 and {MAX_LOGPROBS}",
            ),
            (
                "logit_bias",
                len(self.logit_bias) <= MAX_LOGIT_BIASES and all(t >= 0 for t in self.logit_bias),
                f"takes at most {MAX_LOGIT_BIASES} token ids, none negative",
            ),
            (
                "logit_bias",
                all(_within(b, -MOST_LOGIT_BIAS, MOST_LOGIT_BIAS) for b in self.logit_bias.values()),
                f"each must be between -{MOST_LOGIT_BIAS} and {MOST_LOGIT_BIAS}",
            ),
            (
                "allowed_token_ids",
                len(self.allowed_token_ids) <= MAX_ALLOWED_TOKEN_IDS
                and all(t >= 0 for t in self.allowed_token_ids),
                f"takes at most {MAX_ALLOWED_TOKEN_IDS} ids, none negative",
            ),
            ("bad_words", len(self.bad_words) <= MAX_BAD_WORDS, f"takes at most {MAX_BAD_WORDS} strings"),
            (
                "bad_words",
                all(0 < len(word) <= MAX_BAD_WORD_CHARS for word in self.bad_words),
                f"each string must have 1 to {MAX_BAD_WORD_CHARS} characters",
            ),
        )
        found = [Violation(field, text) for field, holds, text in checks if not holds]
        form = self.structured_output
        return found + ([] if form is None else [v.below("structured_output") for v in form.violations()])

    @property
    def is_constrained(self) -> bool:
        """Whether there are tokens that must not be chosen at all, beside those of ``min_tokens``."""
        return bool(self.allowed_token_ids or self.bad_words or self.structured_output)

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


class Parent(msgspec.Struct, frozen=True, array_like=True):
    """A choice of an earlier request, which still runs or whose KV was leased, by the engine's id of it."""

    request_id: str
    choice: int = 0


class Request(msgspec.Struct, kw_only=True):
    """One admitted request, as the engine sees it: token ids only, every choice resolved.

    ``output_token_ids`` are tokens that another replica generated before: generation goes on behind them
    as if they had been sampled here. With them, ``params.n`` is 1.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """``params.seed``, or the random one drawn at admission."""
    sample_index: int = 0
    """The first choice's index in the noise; choice ``i`` uses ``sample_index + i``."""
    tenant: str = "local"
    priority: int = 0
    """Higher runs first and is preempted last."""
    emit_upto: int | None = None
    """Credit: how many output tokens each choice may have produced. None: without limit."""
    deadline: float | None = None
    """On the machine's monotonic clock, in seconds."""
    output_token_ids: list[int] = []
    choices: dict[int, list[int]] | None = None
    """Of a request that an engine before this one did not end: the choices that still run, each with its
    output so far, ``output_token_ids`` included. None: all choices are new."""
    num_scored: int = 0
    """The prompt's logprobs that such an engine has given already."""
    parent: Parent | None = None
    """Whose KV holds a prefix of this prompt, down to the last position in common. Only a hint: the prompt
    stands here in full, and where the parent's KV is gone it is computed like any other."""
    is_leased: bool = False
    """Keep its KV behind its end, as long as there is room, until the front says ``Release``."""

    def running_choices(self) -> dict[int, list[int]]:
        """The choices to run, each with the output behind which it goes on."""
        if self.choices is not None:
            return self.choices
        return dict.fromkeys(range(self.params.n), self.output_token_ids)


def unknown_biases(logit_bias: Mapping[int, float], vocab_size: int) -> list[Violation]:
    """One violation, for the first token that the model does not have."""
    text = f"must be below the vocabulary's size, {vocab_size}"
    unknown = (token_id for token_id in logit_bias if token_id >= vocab_size)
    return [Violation(f"logit_bias[{token_id}]", text) for token_id in islice(unknown, 1)]


def _within(value: float, low: float, high: float) -> bool:
    """False for NaN too."""
    return low <= value <= high
