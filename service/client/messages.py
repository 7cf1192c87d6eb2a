"""What goes in and what comes out, as plain Python: prompts, sampling parameters and typed events.

The fields are those of the ``.proto`` files, which say what each one means. Enum values are the lower
case of the protos' names without their prefix (``"max_tokens"``, ``"parked"``), and may grow.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from google.protobuf import duration_pb2
from google.protobuf.descriptor import EnumDescriptor

from tidegate.v1 import events_pb2, inference_pb2, prompt_pb2, sampling_pb2

_FINISH_REASONS = events_pb2.FinishReason.DESCRIPTOR
_PROGRESS_KINDS = events_pb2.ProgressKind.DESCRIPTOR

Message = Mapping[str, str]
"""One message of a chat: ``{"role": "user", "content": "Hello"}``."""

PromptInput = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a chat."""


class StructuredOutput(TypedDict, total=False):
    """What the output must be: ``tidegate.v1.StructuredOutput``, exactly one field."""

    json_schema: str | Mapping[str, Any]
    """As text, or as the mapping that it stands for."""
    regex: str
    grammar: str
    choices: Sequence[str]


class Sampling(TypedDict, total=False):
    """How tokens are chosen and when a choice ends: ``tidegate.v1.SamplingParams``, every field optional."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    logit_bias: Mapping[int, float]
    """By token id."""
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    structured_output: StructuredOutput
    skip_special_tokens: bool


class Options(Sampling, total=False):
    """What else a request may say: ``tidegate.v1.Start``, every field optional."""

    request_id: str
    """For ``abort`` and the server's log; drawn at random by default."""
    priority: int
    """Higher runs first and loses its device memory last."""
    generated_token_ids: Sequence[int]
    """Output made before, to go on behind. Its text is not sent again."""
    sample_index: int
    """With ``generated_token_ids``: which choice of the first request they were."""
    return_prompt_token_ids: bool
    """Fill ``Admitted.prompt_token_ids``."""


@dataclass(frozen=True, slots=True)
class Logprob:
    token_id: int
    logprob: float
    rank: int
    """1 is the most likely."""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    chosen: Logprob
    top: tuple[Logprob, ...]
    """The most likely first."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request has its first memory and begins to run."""

    queue_position: int
    prompt_tokens: int
    cached_device_tokens: int
    cached_host_tokens: int
    seed: int
    prompt_token_ids: tuple[int, ...]
    """Empty unless they were asked for."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Some logprobs of the prompt, before any output."""

    offset: int
    """Prompt offset of the first one's token."""
    positions: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """New output of one choice. ``str(chunk)`` is its text.

    Text may lag behind the tokens (half a character, perhaps the start of a stop string); all of it has
    come by the chunk that has a ``finish_reason``.
    """

    choice: int
    offset: int
    """Output offset of the first of ``token_ids``."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[PositionLogprobs, ...]
    """One a token, where they were asked for."""
    finish_reason: str | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Progress:
    """Something happened to a choice: queued, stalled, preempted, parked, resumed, dropped, recovered."""

    choice: int
    kind: str


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    choice: int
    reason: str
    """stop_token, stop_string, max_tokens, context_length, deadline, cancelled or grammar_complete."""
    output_tokens: int
    stop_string: str | None
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the request reached the engine."""

    queued: float
    to_first_token: float | None
    total: float


@dataclass(frozen=True, slots=True)
class Finished:
    """All choices ended."""

    choices: tuple[ChoiceEnd, ...]
    usage: Usage
    timings: Timings

    @property
    def reason(self) -> str:
        """Of the first choice."""
        return self.choices[0].reason


Event = Admitted | PromptLogprobs | Chunk | Progress | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """All output of one choice."""

    choice: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Response:
    """The whole answer to ``generate_unary``."""

    admitted: Admitted
    completions: tuple[Completion, ...]
    finished: Finished
    prompt_logprobs: tuple[PositionLogprobs, ...]
    """Of the prompt's tokens from the second one on, where they were asked for."""

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.completions[0].text


def prompt_message(prompt: PromptInput) -> prompt_pb2.Prompt:
    """Raises ``TypeError`` for anything that is neither text, token ids nor messages."""
    if isinstance(prompt, str):
        return prompt_pb2.Prompt(text=prompt)
    ids: list[int] = []
    messages: list[prompt_pb2.ChatMessage] = []
    for item in prompt:
        if isinstance(item, Mapping):
            part = prompt_pb2.ContentPart(text=item["content"])
            messages.append(prompt_pb2.ChatMessage(role=item["role"], content=[part]))
        else:
            ids.append(item)
    if messages and ids:
        raise TypeError("a prompt is text, a list of token ids or a list of messages, not a mixture")
    if messages:
        return prompt_pb2.Prompt(chat=prompt_pb2.Chat(messages=messages))
    return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=ids))


def request_fields(prompt: PromptInput, options: Options) -> dict[str, Any]:
    """The fields that ``Start``, ``GenerateRequest`` and ``GenerateUnaryRequest`` have in common.

    Raises ``TypeError`` that names an unknown option.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown request option {', '.join(sorted(unknown))}")
    sampling = {name: value for name, value in options.items() if name in Sampling.__annotations__}
    fields = {name: value for name, value in options.items() if name not in sampling}
    fields.setdefault("request_id", uuid.uuid4().hex)
    if (form := options.get("structured_output")) is not None:
        sampling["structured_output"] = _structured_output(form)
    return fields | {
        "prompt": prompt_message(prompt),
        "sampling": sampling_pb2.SamplingParams(**cast(Any, sampling)),
    }


def _structured_output(form: StructuredOutput) -> sampling_pb2.StructuredOutput:
    """Raises ``TypeError`` where it has not exactly one field, or another one."""
    unknown = form.keys() - StructuredOutput.__annotations__.keys()
    if unknown or len(form) != 1:
        fields = ", ".join(StructuredOutput.__annotations__)
        raise TypeError(f"structured_output takes exactly one of {fields}, not {', '.join(form) or 'none'}")
    schema = form.get("json_schema")
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return sampling_pb2.StructuredOutput(json_schema=text)
    if "choices" in form:
        return sampling_pb2.StructuredOutput(choices=sampling_pb2.ChoiceList(values=form["choices"]))
    return sampling_pb2.StructuredOutput(**cast(Any, form))


def continued_fields(prompt: PromptInput | None, options: Options) -> dict[str, Any]:
    """The fields that ``AppendTurn`` and ``ForkBranch`` have in common.

    Raises ``TypeError`` that names an option which they do not have.
    """
    for name in ("generated_token_ids", "sample_index"):
        if name in options:
            raise TypeError(f"{name} makes no sense for a request that goes on from another")
    fields = request_fields("" if prompt is None else prompt, options)
    fields.pop("return_prompt_token_ids", None)
    content = fields.pop("prompt")
    return fields if prompt is None else fields | {"input": content}


def duration(seconds: float) -> duration_pb2.Duration:
    message = duration_pb2.Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def admitted_event(message: events_pb2.Admitted) -> Admitted:
    return Admitted(
        queue_position=message.queue_position,
        prompt_tokens=message.prompt_tokens,
        cached_device_tokens=message.cached_device_tokens,
        cached_host_tokens=message.cached_host_tokens,
        seed=message.seed,
        prompt_token_ids=tuple(message.prompt_token_ids),
    )


def chunk_event(message: events_pb2.Delta) -> Chunk:
    return Chunk(
        choice=message.choice,
        offset=message.offset,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=_logprobs(message.logprobs),
        finish_reason=_finish_reason(message.finish_reason) if message.HasField("finish_reason") else None,
    )


def prompt_logprobs_event(message: events_pb2.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(offset=message.offset, positions=_logprobs(message.positions))


def progress_event(message: events_pb2.Progress) -> Progress:
    return Progress(choice=message.choice, kind=_word(_PROGRESS_KINDS, message.kind, "PROGRESS_KIND_"))


def finished_event(message: events_pb2.Finished) -> Finished:
    usage, timings = message.usage, message.timings
    return Finished(
        choices=tuple(
            ChoiceEnd(
                choice=end.choice,
                reason=_finish_reason(end.reason),
                output_tokens=end.output_tokens,
                stop_string=end.stop_string if end.HasField("stop_string") else None,
                stop_token_id=end.stop_token_id if end.HasField("stop_token_id") else None,
            )
            for end in message.choices
        ),
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            recomputed_tokens=usage.recomputed_tokens,
            preemptions=usage.preemptions,
        ),
        timings=Timings(
            queued=timings.queued,
            to_first_token=timings.to_first_token if timings.HasField("to_first_token") else None,
            total=timings.total,
        ),
    )


def response(message: inference_pb2.GenerateUnaryResponse) -> Response:
    return Response(
        admitted=admitted_event(message.admitted),
        completions=tuple(
            Completion(
                choice=completion.choice,
                token_ids=tuple(completion.token_ids),
                text=completion.text,
                logprobs=_logprobs(completion.logprobs),
                finish_reason=_finish_reason(completion.finish_reason),
            )
            for completion in message.completions
        ),
        finished=finished_event(message.finished),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
    )


def _logprobs(messages: Sequence[events_pb2.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(
        PositionLogprobs(_logprob(message.chosen), tuple(_logprob(top) for top in message.top))
        for message in messages
    )


def _logprob(message: events_pb2.Logprob) -> Logprob:
    return Logprob(message.token_id, message.logprob, message.rank)


def _finish_reason(value: "events_pb2.FinishReason.ValueType") -> str:
    return _word(_FINISH_REASONS, value, "FINISH_REASON_")


def _word(enum: EnumDescriptor, value: int, prefix: str) -> str:
    """A value that this client does not know yet is its number."""
    known = enum.values_by_number.get(value)
    return known.name.removeprefix(prefix).lower() if known else str(value)
