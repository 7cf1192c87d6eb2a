"""``vllm.grpc.engine.VllmEngine``: what the SMG gateway and llm-d's router speak to an engine.

The gateway tokenizes and renders itself: it asks for the tokenizer's files and sends token ids. What it
can ask for and we cannot do is refused by name, never left out in silence.
"""

import asyncio
import contextlib
import hashlib
import io
import json
import time
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import grpc.aio

from tidegate.compat.vllm import common_pb2, engine_pb2, engine_pb2_grpc
from tidegate.engine.messages import PositionLogprobs
from tidegate.engine.request import FinishReason, Violation
from tidegate.service.call import stream_call
from tidegate.service.errors import Failure
from tidegate.service.events import Admitted, ChoiceEnd, Delta, Event, Finished, PromptLogprobs
from tidegate.service.hub import Hub
from tidegate.service.identity import caller
from tidegate.service.intake import MAX_UNARY_PROMPT_LOGPROBS, Intake
from tidegate.v1 import inference_pb2, prompt_pb2, sampling_pb2

SERVICE = "vllm.grpc.engine.VllmEngine"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
CHUNK_BYTES = 60_000
"""Of the tokenizer's archive in one message; the gateway takes up to 64 KB."""

FINISH_REASONS = {
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.GRAMMAR_COMPLETE: "stop",
    FinishReason.MAX_TOKENS: "length",
    FinishReason.CONTEXT_LENGTH: "length",
    FinishReason.DEADLINE: "abort",
    FinishReason.CANCELLED: "abort",
}

ANY_OBJECT = '{"type": "object"}'
UNSUPPORTED = ("truncate_prompt_tokens", "grammar", "structural_tag")
"""Sampling fields that would change the output; refused where they are set."""
NUMBERS = (
    "temperature",
    "max_tokens",
    "logprobs",
    "prompt_logprobs",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_tokens",
    "n",
)
"""Sampling fields that are named alike on both sides."""


class VllmEngine(engine_pb2_grpc.VllmEngineServicer):
    def __init__(self, intake: Intake, hub: Hub, folder: Path, max_num_seqs: int) -> None:
        """``folder``: the checkpoint's, whose tokenizer the gateway loads."""
        self._intake = intake
        self._hub = hub
        self._folder = folder
        self._max_num_seqs = max_num_seqs
        self._started_at = time.monotonic()
        self._last_request_at = 0.0

    async def Generate(
        self,
        request: engine_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[engine_pb2.GenerateRequest, engine_pb2.GenerateResponse]",
    ) -> AsyncGenerator[engine_pb2.GenerateResponse]:
        self._last_request_at = time.time()
        call = stream_call(self._intake, _native(request), context.time_remaining())
        async with contextlib.aclosing(call):
            async for response in _Answer(request).responses(call):
                yield response

    async def HealthCheck(
        self, request: engine_pb2.HealthCheckRequest, context: object
    ) -> engine_pb2.HealthCheckResponse:
        if self._hub.is_draining:
            return engine_pb2.HealthCheckResponse(healthy=False, message="draining")
        return engine_pb2.HealthCheckResponse(healthy=True)

    async def Abort(self, request: engine_pb2.AbortRequest, context: object) -> engine_pb2.AbortResponse:
        for request_id in request.request_ids:
            if generation := self._hub.find(caller().tenant, request_id):
                generation.cancel()
        return engine_pb2.AbortResponse()

    async def GetModelInfo(
        self, request: engine_pb2.GetModelInfoRequest, context: object
    ) -> engine_pb2.GetModelInfoResponse:
        info = self._hub.info
        return engine_pb2.GetModelInfoResponse(
            model_path=info.model,
            served_model_name=info.model,
            tokenizer_path=str(self._folder),
            is_generation=True,
            max_context_length=info.max_model_len,
            max_req_input_len=info.max_model_len - 1,
            vocab_size=info.vocab_size,
            model_type=_model_type(self._folder),
            architectures=[info.architecture],
            eos_token_ids=info.eos_token_ids,
        )

    async def GetServerInfo(
        self, request: engine_pb2.GetServerInfoRequest, context: object
    ) -> engine_pb2.GetServerInfoResponse:
        info, stats = self._hub.info, self._hub.stats
        return engine_pb2.GetServerInfoResponse(
            active_requests=stats.running + stats.waiting,
            last_receive_timestamp=self._last_request_at,
            uptime_seconds=time.monotonic() - self._started_at,
            server_type="tidegate",
            data_parallel_size=1,
            block_size=info.block_size,
            model_dtype=info.dtype,
            max_num_seqs=self._max_num_seqs,
        )

    async def GetLoads(
        self, request: engine_pb2.GetLoadsRequest, context: object
    ) -> engine_pb2.GetLoadsResponse:
        info, stats = self._hub.info, self._hub.stats
        # What is only cached can go at once: to a router it is free.
        used = stats.device.total - stats.device.free - stats.device.reclaimable
        waiting = stats.waiting + stats.swapped
        load = engine_pb2.SchedulerLoad(
            num_running_reqs=stats.running,
            num_waiting_reqs=waiting,
            num_total_reqs=stats.running + waiting,
            num_used_tokens=info.tokens_in(used),
            max_total_num_tokens=info.tokens_in(info.device_blocks),
            token_usage=used / max(1, info.device_blocks),
        )
        now = datetime.now(UTC).isoformat()
        return engine_pb2.GetLoadsResponse(
            timestamp=now, version=version("tidegate"), dp_rank_count=1, loads=[load]
        )

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: object
    ) -> AsyncGenerator[common_pb2.GetTokenizerChunk]:
        # In a thread: a large tokenizer takes a second to pack, and every stream would wait.
        archive = await asyncio.to_thread(_tokenizer_archive, self._folder)
        digest = hashlib.sha256(archive).hexdigest()
        for start in range(0, len(archive), CHUNK_BYTES):
            end = start + CHUNK_BYTES
            is_last = end >= len(archive)
            yield common_pb2.GetTokenizerChunk(data=archive[start:end], sha256=digest if is_last else "")


def _native(request: engine_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    """The same request in our words. Raises ``Failure`` that names all that we cannot do."""
    if violations := list(_violations(request)):
        raise Failure.invalid(violations)
    theirs = request.sampling_params
    ours = sampling_pb2.SamplingParams(
        stop=theirs.stop,
        stop_token_ids=theirs.stop_token_ids,
        ignore_eos=theirs.ignore_eos,
        include_stop=theirs.include_stop_str_in_output,
        skip_special_tokens=theirs.skip_special_tokens,
    )
    # Of their fields without presence, those that are 0 are not listed: it is how they are left out.
    for field, value in theirs.ListFields():
        if field.name in NUMBERS:
            setattr(ours, field.name, value)
    if theirs.HasField("seed"):
        # Theirs is signed; any 64 bits are a seed here.
        ours.seed = theirs.seed % 2**64
    ours.logit_bias.update(theirs.logit_bias)
    match theirs.WhichOneof("constraint"):
        case "json_schema":
            ours.structured_output.json_schema = theirs.json_schema
        case "json_object":
            ours.structured_output.json_schema = ANY_OBJECT
        case "regex":
            ours.structured_output.regex = theirs.regex
        case "choice":
            ours.structured_output.choices.values.extend(theirs.choice.choices)
        case _:
            pass  # none, or one that was refused
    if request.WhichOneof("input") == "text":
        prompt = prompt_pb2.Prompt(text=request.text)
    else:
        prompt = prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=request.tokenized.input_ids))
    native = inference_pb2.GenerateRequest(prompt=prompt, sampling=ours)
    # Theirs name all tokens of the prompt, the first one too.
    native.return_prompt_token_ids = ours.HasField("prompt_logprobs")
    if request.request_id:
        native.request_id = request.request_id
    return native


def _violations(request: engine_pb2.GenerateRequest) -> Iterable[Violation]:
    for name in ("mm_inputs", "media_refs", "kv_transfer_params_json"):
        if request.HasField(name):
            yield Violation(name, "not supported")
    if request.extra_mm_inputs:
        yield Violation("extra_mm_inputs", "not supported")
    sampling = request.sampling_params
    present = {field.name for field, _ in sampling.ListFields()}
    for name in UNSUPPORTED:
        if name in present:
            yield Violation(f"sampling_params.{name}", "not supported yet")
    for name in ("logprobs", "prompt_logprobs"):
        if name in present and getattr(sampling, name) < 0:
            yield Violation(f"sampling_params.{name}", "must name how many; all of them are not supported")
    if any(token_id < 0 for token_id in sampling.logit_bias):
        yield Violation("sampling_params.logit_bias", "takes no negative token ids")


class _Answer:
    """Our events of one request as their responses."""

    def __init__(self, request: engine_pb2.GenerateRequest) -> None:
        self._is_streamed = request.stream
        self._alternatives = request.sampling_params.prompt_logprobs
        self._prompt_token_ids: Sequence[int] = ()
        """Empty where their logprobs are not wanted."""
        self._prompt_logprobs: list[PositionLogprobs] = []
        self._is_first = True
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._outputs: dict[int, Delta] = {}

    async def responses(self, call: AsyncIterator[Event]) -> AsyncGenerator[engine_pb2.GenerateResponse]:
        async for event in call:
            match event:
                case Admitted():
                    self._prompt_tokens = event.prompt_tokens
                    self._cached_tokens = event.cached_device_tokens + event.cached_host_tokens
                    self._prompt_token_ids = event.prompt_token_ids
                    self._check_size()
                case PromptLogprobs():
                    self._prompt_logprobs += event.positions
                case list():
                    for delta in event:
                        if self._is_streamed and delta.token_ids:
                            yield engine_pb2.GenerateResponse(chunk=self._chunk(delta))
                        self._keep(delta)
                case Finished():
                    for end in event.choices:
                        yield engine_pb2.GenerateResponse(complete=self._complete(end))
                case _:
                    pass  # the protocol has no words for progress

    def _check_size(self) -> None:
        """The protocol has the prompt's logprobs in one message. Raises ``Failure`` where they do not fit."""
        count = len(self._prompt_token_ids) * (1 + self._alternatives)
        if count > MAX_UNARY_PROMPT_LOGPROBS:
            text = f"{count} of them are too many for one message: ask for fewer"
            raise Failure.invalid([Violation("sampling_params.prompt_logprobs", text)])

    def _keep(self, delta: Delta) -> None:
        if kept := self._outputs.get(delta.choice):
            kept.absorb(delta)
        else:
            self._outputs[delta.choice] = delta

    def _chunk(self, delta: Delta) -> engine_pb2.GenerateStreamChunk:
        input_logprobs = self._input_logprobs() if self._is_first else None
        self._is_first = False
        return engine_pb2.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(delta.token_ids),
            cached_tokens=self._cached_tokens,
            output_logprobs=_logprobs(delta.logprobs),
            input_logprobs=input_logprobs,
            index=delta.choice,
        )

    def _complete(self, end: ChoiceEnd) -> engine_pb2.GenerateComplete:
        output = self._outputs.get(end.choice)
        complete = engine_pb2.GenerateComplete(
            output_ids=output.token_ids if output else (),
            finish_reason=FINISH_REASONS[end.reason],
            prompt_tokens=self._prompt_tokens,
            completion_tokens=end.output_tokens,
            cached_tokens=self._cached_tokens,
            output_logprobs=_logprobs(output.logprobs) if output else None,
            input_logprobs=self._input_logprobs(),
            index=end.choice,
        )
        if end.stop_string is not None:
            complete.matched_stop_str = end.stop_string
        elif end.stop_token_id is not None:
            complete.matched_token_id = end.stop_token_id
        return complete

    def _input_logprobs(self) -> engine_pb2.InputLogProbs | None:
        if not self._prompt_token_ids:
            return None
        positions = self._prompt_logprobs
        value = engine_pb2.InputTokenLogProb
        return engine_pb2.InputLogProbs(
            token_logprobs=[value(), *(value(value=position.chosen.logprob) for position in positions)],
            token_ids=self._prompt_token_ids[: 1 + len(positions)],
            top_logprobs=[engine_pb2.TopLogProbs(), *map(_top_logprobs, positions)],
        )


def _logprobs(positions: list[PositionLogprobs] | None) -> engine_pb2.OutputLogProbs | None:
    if not positions:
        return None
    return engine_pb2.OutputLogProbs(
        token_logprobs=[position.chosen.logprob for position in positions],
        token_ids=[position.chosen.token_id for position in positions],
        top_logprobs=map(_top_logprobs, positions),
    )


def _top_logprobs(position: PositionLogprobs) -> engine_pb2.TopLogProbs:
    return engine_pb2.TopLogProbs(
        values=[top.logprob for top in position.top], token_ids=[top.token_id for top in position.top]
    )


@cache
def _model_type(folder: Path) -> str:
    """As the checkpoint says."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


@cache
def _tokenizer_archive(folder: Path) -> bytes:
    """The same bytes for the same files, so that their digest names them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                archive.writestr(zipfile.ZipInfo(name), (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def add(server: grpc.aio.Server, intake: Intake, hub: Hub, folder: Path, max_num_seqs: int) -> None:
    engine_pb2_grpc.add_VllmEngineServicer_to_server(VllmEngine(intake, hub, folder, max_num_seqs), server)
