"""From a message to a request: what is wrong with it (all at once), its token ids, its parameters."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from tidegate.engine.request import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_OUTPUT_CHOICES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    InvalidRequest,
    SamplingParams,
    StructuredOutput,
    Violation,
    unknown_biases,
)
from tidegate.engine.text import Text
from tidegate.service.credit import token_bytes
from tidegate.service.errors import Failure, log_unexpected
from tidegate.service.generation import Generation
from tidegate.service.hub import Hub
from tidegate.service.identity import caller
from tidegate.service.leases import LONGEST_LEASE, Origin, Stem
from tidegate.v1 import inference_pb2, prompt_pb2, sampling_pb2, session_pb2

MAX_REQUEST_ID_CHARS = 256
BAD_REQUEST_ID = Violation("request_id", f"must have 1 to {MAX_REQUEST_ID_CHARS} characters")
MAX_CHAT_PARTS = 2**14
"""Messages of a conversation and parts of their contents: a template renders some 200,000 a second."""
MAX_PROMPT_CHARS = 2**22
"""Text beyond any model's context; to tokenize it takes a hundred times its size in memory."""

MAX_UNARY_PROMPT_LOGPROBS = 2**17
"""Of an answer in one message: some 2 MB, where a client's gRPC takes 4 MB by default."""

RequestMessage = session_pb2.Start | inference_pb2.GenerateRequest | inference_pb2.GenerateUnaryRequest
"""The messages that start a request; they share the names of their fields."""

SCALARS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "include_stop",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
)
"""Sampling fields with explicit presence, named alike on both sides; absent ones keep our default."""

LISTS = {
    "stop": MAX_STOP_STRINGS,
    "stop_token_ids": MAX_STOP_TOKEN_IDS,
    "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
    "bad_words": MAX_BAD_WORDS,
}
"""Repeated ones, with how many there may be; of more, one is enough to tell."""


class Intake:
    """Takes requests in, for every RPC that starts one."""

    def __init__(self, hub: Hub, text: Text) -> None:
        self._hub = hub
        self._text = text

    def open(
        self,
        request_id: str,
        message: RequestMessage,
        *,
        credit: int | None,
        unread: int | None,
        time_limit: float | None = None,
        digest: bytes = b"",
    ) -> Generation:
        """Register the request. Raises ``Failure`` where it is refused at once.

        ``time_limit``: seconds that the RPC leaves, beside the message's own limit. ``digest``: of the
        content, where it is to be found again behind its end.
        """
        self.check_model(message)
        if not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
            raise Failure.invalid([BAD_REQUEST_ID, *self._violations(message)])
        limits = [] if time_limit is None else [time_limit]
        if (limit := seconds(message.time_limit)) > 0:
            limits.append(limit)
        sampling = message.sampling
        return self._hub.open(
            request_id,
            caller().tenant,
            num_choices=min(max(sampling.n, 1), MAX_CHOICES),
            credit=credit,
            unread=unread,
            time_limit=min(limits, default=None),
            digest=digest,
            token_bytes=token_bytes(sampling.logprobs if sampling.HasField("logprobs") else None),
            with_prompt=message.return_prompt_token_ids,
            lease_seconds=seconds(message.lease.time_to_live) if message.HasField("lease") else None,
        )

    async def submit(
        self, generation: Generation, message: RequestMessage, origin: Origin | None = None
    ) -> None:
        """Read the content of an open request and pass it on; what is wrong with it ends the request.

        ``origin``: what the message's prompt goes behind.
        """
        try:
            violations = self._violations(message)
            prompt_token_ids: list[int] = []
            stem = None if origin is None else await origin.stem()
            try:
                prompt_token_ids = await self._read_prompt(message.prompt, stem)
            except InvalidRequest as invalid:
                violations += invalid.violations
            else:
                violations += self._misfits(message, len(prompt_token_ids))
            if violations:
                raise Failure.invalid(violations if origin is None else _of_input(violations))
            generation.conversation = _conversation_behind(message.prompt, stem, self._text)
            self._hub.submit(
                generation,
                prompt_token_ids,
                sampling_params(message.sampling),
                output_token_ids=list(message.generated_token_ids),
                sample_index=message.sample_index,
                priority=message.priority,
                parent=None if stem is None else stem.parent,
            )
        except Failure as failure:
            generation.fail(failure)
        except Exception as error:  # noqa: BLE001  a session has no other place where this would be seen
            log_unexpected("a request could not be read", error, request_id=generation.request_id)
            generation.fail(Failure.internal())

    async def update(self, generation: Generation, message: session_pb2.Update) -> None:
        """Change a running request. Raises ``Failure``: REQUEST_GONE, or what is wrong with the message."""
        await generation.has_content()
        params = generation.params
        if generation.is_ended or params is None:
            raise Failure("REQUEST_GONE", "no request with this id is under way in this session")
        found: list[Violation] = []
        max_tokens = message.max_tokens if message.HasField("max_tokens") else None
        if max_tokens is not None:
            if params.max_tokens is None or max_tokens < params.max_tokens:
                found.append(Violation("max_tokens", "can only grow"))
            elif len(generation.prompt_token_ids) + max_tokens > self._hub.info.max_model_len:
                longest = self._hub.info.max_model_len
                found.append(Violation("max_tokens", f"with the prompt exceeds the limit of {longest}"))
        stops = None
        if message.HasField("stops"):
            stops = (tuple(message.stops.stop), tuple(message.stops.stop_token_ids))
            found += self._unknown_ids("stops.stop_token_ids", stops[1])
        if found:
            raise Failure.invalid(found)
        try:
            generation.update(max_tokens, stops)
        except InvalidRequest as invalid:
            found = [Violation(f"stops.{v.field}", v.description) for v in invalid.violations]
            raise Failure.invalid(found) from invalid

    def check_model(
        self,
        message: RequestMessage
        | inference_pb2.TokenizeRequest
        | inference_pb2.DetokenizeRequest
        | inference_pb2.CountTokensRequest,
    ) -> None:
        check_model(message.model if message.HasField("model") else None, self._hub.info.model)

    async def token_ids(self, prompt: prompt_pb2.Prompt) -> list[int]:
        """What the model would read. Raises ``Failure``, which names the paths of the message."""
        try:
            return await self._read_prompt(prompt)
        except InvalidRequest as invalid:
            raise Failure.invalid(invalid.violations) from invalid

    def check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Raises ``Failure`` where the model does not have one of them, or has no room for so many."""
        if violations := self._unknown_ids(field, token_ids):
            raise Failure.invalid(violations)

    async def _read_prompt(self, prompt: prompt_pb2.Prompt, stem: Stem | None = None) -> list[int]:
        """With what stands before it.

        Raises ``InvalidRequest`` with the paths of the message, or ``Failure``.
        """
        before = [] if stem is None else stem.token_ids
        match prompt.WhichOneof("content"):
            case "text":
                _check_length("prompt.text", len(prompt.text))
                try:
                    # What opens a text stands at its beginning alone.
                    return [
                        *before,
                        *await self._text.encode_async(prompt.text, add_special_tokens=not before),
                    ]
                except InvalidRequest as invalid:
                    raise _at("prompt.text", "prompt", invalid) from invalid
            case "token_ids":
                ids = list(prompt.token_ids.ids)
                violations = self._unknown_ids("prompt.token_ids.ids", ids)
                if violations:
                    raise InvalidRequest(violations)
                return [*before, *ids]
            case "chat":
                return await self._render(prompt.chat, stem)
            case None if before:
                return before
            case _:
                raise InvalidRequest([Violation("prompt", "must hold text, token_ids or chat")])

    async def _render(self, chat: prompt_pb2.Chat, stem: Stem | None) -> list[int]:
        if not self._text.has_chat_template:
            raise Failure("NO_CHAT_TEMPLATE", "this model has no chat template: send text or token ids")
        num_parts = len(chat.messages)
        if num_parts <= MAX_CHAT_PARTS:
            num_parts += sum(len(message.content) for message in chat.messages)
        if num_parts > MAX_CHAT_PARTS:
            text = f"must be at most {MAX_CHAT_PARTS}, parts of contents included"
            raise InvalidRequest([Violation("prompt.chat.messages", text)])
        violations = [
            Violation(f"prompt.chat.messages[{index}].content[{part_index}]", "must hold text")
            for index, message in enumerate(chat.messages)
            for part_index, part in enumerate(message.content)
            if part.WhichOneof("part") is None
        ]
        if violations:
            raise InvalidRequest(violations)
        num_chars = sum(
            len(message.role) + sum(len(part.text) for part in message.content) for message in chat.messages
        )
        _check_length("prompt.chat.messages", num_chars)
        messages = conversation(chat)
        add_generation_prompt = chat.add_generation_prompt or not chat.HasField("add_generation_prompt")
        try:
            if stem is None:
                return await self._text.render_chat_async(messages, add_generation_prompt)
            return await self._text.continue_chat_async(
                stem.token_ids, stem.num_prompt, stem.conversation, messages, add_generation_prompt
            )
        except InvalidRequest as invalid:
            raise _at("prompt.chat.messages", "messages", invalid) from invalid

    def _violations(self, message: RequestMessage) -> list[Violation]:
        """Everything that is wrong with a message and can be told without its prompt's tokens."""
        sampling = message.sampling
        found = sampling_violations(sampling)
        found += self._unknown_ids("sampling.stop_token_ids", sampling.stop_token_ids)
        unknown = unknown_biases(_logit_bias(sampling), self._hub.info.vocab_size)
        found += [Violation(f"sampling.{field}", text) for field, text in unknown]
        given = message.generated_token_ids
        found += self._unknown_ids("generated_token_ids", given)
        if given and sampling.n > 1:
            found.append(Violation("generated_token_ids", "can be continued with sampling.n = 1 alone"))
        if given and sampling.HasField("max_tokens") and len(given) > sampling.max_tokens:
            found.append(Violation("generated_token_ids", "must not be more than sampling.max_tokens"))
        if message.HasField("time_limit") and seconds(message.time_limit) <= 0:
            found.append(Violation("time_limit", "must be positive"))
        if message.HasField("lease") and not 0 < seconds(message.lease.time_to_live) <= LONGEST_LEASE:
            longest = f"must be positive and at most {LONGEST_LEASE:.0f} seconds"
            found.append(Violation("lease.time_to_live", longest))
        return found

    def _misfits(self, message: RequestMessage, prompt_tokens: int) -> list[Violation]:
        """Refuse what can never fit before it waits for nothing."""
        longest = self._hub.info.max_model_len
        if prompt_tokens == 0:
            return [Violation("prompt", "must give at least one token")]
        max_tokens = message.sampling.max_tokens
        if not message.sampling.HasField("max_tokens"):
            max_tokens = len(message.generated_token_ids) + 1
        if isinstance(message, inference_pb2.GenerateUnaryRequest):
            count = prompt_tokens * (1 + message.sampling.prompt_logprobs)
            if message.sampling.HasField("prompt_logprobs") and count > MAX_UNARY_PROMPT_LOGPROBS:
                text = f"{count} of them are too many for one answer: use Generate, or ask for fewer"
                return [Violation("sampling.prompt_logprobs", text)]
        if prompt_tokens + max_tokens <= longest:
            return []
        field = "sampling.max_tokens" if prompt_tokens < longest else "prompt"
        text = f"{prompt_tokens} tokens of prompt and {max_tokens} of output exceed the limit of {longest}"
        return [Violation(field, text)]

    def _unknown_ids(self, field: str, token_ids: Sequence[int]) -> list[Violation]:
        """One violation, for the first id that the model does not have, or for more than fit it."""
        if not token_ids:
            return []
        vocab_size, longest = self._hub.info.vocab_size, self._hub.info.max_model_len
        if len(token_ids) > longest:
            # Not looked at: a message holds tens of millions, and every other stream would wait.
            return [Violation(field, f"{len(token_ids)} tokens exceed the limit of {longest}")]
        for index, token_id in enumerate(token_ids):
            if token_id >= vocab_size:
                return [Violation(f"{field}[{index}]", f"must be below the vocabulary's size, {vocab_size}")]
        return []


def conversation(chat: prompt_pb2.Chat) -> list[Mapping[str, str]]:
    return [
        {"role": message.role, "content": "".join(part.text for part in message.content)}
        for message in chat.messages
    ]


def _conversation_behind(
    prompt: prompt_pb2.Prompt, stem: Stem | None, text: Text
) -> list[Mapping[str, str]] | None:
    """The whole chat that a prompt stands for; None where it is no chat from its beginning on."""
    if prompt.WhichOneof("content") != "chat":
        return None
    messages = conversation(prompt.chat)
    if stem is None:
        return messages
    if stem.conversation is None:
        return None
    answer = text.decode(stem.token_ids[stem.num_prompt :])
    return [*stem.conversation, {"role": "assistant", "content": answer}, *messages]


def digest(*parts: Message) -> bytes:
    """Stands for the content of a request, which is all but credit and time limit."""
    content = blake2b(digest_size=16)
    for part in parts:
        copy = type(part)()
        copy.CopyFrom(part)
        for field in ("credit", "time_limit"):
            if field in part.DESCRIPTOR.fields_by_name:
                copy.ClearField(field)
        data = copy.SerializeToString(deterministic=True)
        content.update(b"%s %d " % (part.DESCRIPTOR.name.encode(), len(data)) + data)
    return content.digest()


def _of_input(violations: list[Violation]) -> list[Violation]:
    """Those of a prompt, of a message that calls it ``input``."""
    return [
        Violation("input" + v.field.removeprefix("prompt"), v.description)
        if v.field.startswith("prompt")
        else v
        for v in violations
    ]


def _check_length(path: str, num_chars: int) -> None:
    """Raises ``InvalidRequest`` before the work of tokenizing."""
    if num_chars > MAX_PROMPT_CHARS:
        raise InvalidRequest([Violation(path, f"must have at most {MAX_PROMPT_CHARS} characters")])


def seconds(duration: Duration) -> float:
    """Of any value that the message can hold, also of one that is no proper duration."""
    return duration.seconds + duration.nanos / 1e9


def check_model(wanted: str | None, served: str) -> None:
    if wanted is not None and wanted != served:
        raise Failure("MODEL_NOT_FOUND", "this server has another model", metadata={"model": served})


def sampling_violations(sampling: sampling_pb2.SamplingParams) -> list[Violation]:
    try:
        sampling_params(sampling)
    except InvalidRequest as invalid:
        return [violation.below("sampling") for violation in invalid.violations]
    return []


def sampling_params(sampling: sampling_pb2.SamplingParams) -> SamplingParams:
    """Raises ``InvalidRequest`` with the names of the fields alone."""
    present = {field.name for field, _ in sampling.ListFields()}
    given: dict[str, Any] = {name: getattr(sampling, name) for name in SCALARS if name in present}
    # Nothing is read that is not there: to look into a list makes one, in a message that stays for as long as
    # its stream does. Of ten thousand each held 1.4 KB more.
    for name, most in LISTS.items():
        if name in present:
            given[name] = tuple(islice(getattr(sampling, name), most + 1))
    if "logit_bias" in present:
        given["logit_bias"] = _logit_bias(sampling)
    if "structured_output" in present:
        given["structured_output"] = _structured_output(sampling.structured_output)
    return SamplingParams(**given)


def _logit_bias(sampling: sampling_pb2.SamplingParams) -> dict[int, float]:
    """As given; of more than there may be, enough to tell."""
    if not sampling.logit_bias:
        return {}
    return dict(islice(sampling.logit_bias.items(), MAX_LOGIT_BIASES + 1))


def _structured_output(form: sampling_pb2.StructuredOutput) -> StructuredOutput:
    match form.WhichOneof("constraint"):
        case "json_schema":
            return StructuredOutput(json_schema=form.json_schema)
        case "regex":
            return StructuredOutput(regex=form.regex)
        case "grammar":
            return StructuredOutput(grammar=form.grammar)
        case _:
            return StructuredOutput(choices=tuple(islice(form.choices.values, MAX_OUTPUT_CHOICES + 1)))


def _at(path: str, field: str, invalid: InvalidRequest) -> InvalidRequest:
    """The same violations, of a field that has another path in the message."""
    return InvalidRequest(
        [Violation(path + v.field.removeprefix(field), v.description) for v in invalid.violations]
    )
