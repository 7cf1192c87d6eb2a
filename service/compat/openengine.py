"""``openengine.v1``: what NVIDIA Dynamo's sidecar speaks to an engine.

Dynamo tokenizes and renders itself, from the checkpoint's files that it has too: it sends token ids, and
makes the text of those that come back. What it can ask for and we cannot do is refused by name, never left
out in silence.
"""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable
from importlib.metadata import version

import grpc.aio

from tidegate.compat.openengine import openengine_pb2, openengine_pb2_grpc
from tidegate.engine.messages import PositionLogprobs
from tidegate.engine.request import MAX_CHOICES, MAX_LOGPROBS, FinishReason, Violation
from tidegate.service.call import stream_call
from tidegate.service.errors import Failure
from tidegate.service.events import Admitted, ChoiceEnd, Delta, Event, Finished
from tidegate.service.hub import Hub
from tidegate.service.identity import caller
from tidegate.service.intake import Intake, check_model
from tidegate.v1 import inference_pb2, prompt_pb2, sampling_pb2

SERVICES = ("openengine.v1.Inference", "openengine.v1.Control")
REVISION = 1
RELEASE = "v0.1.0"
"""The protocol's, in its own words."""

FINISH_REASONS = {
    FinishReason.STOP_TOKEN: openengine_pb2.FINISH_REASON_STOP,
    FinishReason.STOP_STRING: openengine_pb2.FINISH_REASON_STOP,
    FinishReason.GRAMMAR_COMPLETE: openengine_pb2.FINISH_REASON_STOP,
    FinishReason.MAX_TOKENS: openengine_pb2.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT_LENGTH: openengine_pb2.FINISH_REASON_LENGTH,
    FinishReason.DEADLINE: openengine_pb2.FINISH_REASON_CANCELLED,
    FinishReason.CANCELLED: openengine_pb2.FINISH_REASON_CANCELLED,
}

ANY_OBJECT = '{"type": "object"}'
GUIDES = ("json_schema", "json_object", "regex", "choice")
"""What an output can be held to. Their grammars are in another notation than ours."""
SAME_SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
)
SAME_STOPPING = ("max_tokens", "min_tokens", "ignore_eos")
"""Fields that are named alike on both sides."""

GenerateRequest = openengine_pb2.GenerateRequest
GenerateResponse = openengine_pb2.GenerateResponse


class Inference(openengine_pb2_grpc.InferenceServicer):
    def __init__(self, intake: Intake, hub: Hub) -> None:
        self._intake = intake
        self._info = hub.info

    async def Generate(
        self, request: GenerateRequest, context: "grpc.aio.ServicerContext[GenerateRequest, GenerateResponse]"
    ) -> AsyncGenerator[GenerateResponse]:
        _check_model(request.model, self._info.model)
        answer = _Answer(request, self._info.eos_token_ids)
        async with contextlib.aclosing(
            stream_call(self._intake, _native(request), context.time_remaining())
        ) as call:
            try:
                async for response in answer.responses(call):
                    yield response
            except Failure as failure:
                # The protocol has one way to fail before a request is accepted, and another one behind that.
                if not answer.is_accepted:
                    raise
                yield answer.error(failure)


class Control(openengine_pb2_grpc.ControlServicer):
    def __init__(self, hub: Hub, max_num_seqs: int) -> None:
        self._hub = hub
        self._max_num_seqs = max_num_seqs
        self._instance = uuid.uuid4().hex

    async def GetServerInfo(
        self, request: openengine_pb2.GetServerInfoRequest, context: object
    ) -> openengine_pb2.ServerInfo:
        info = self._hub.info
        return openengine_pb2.ServerInfo(
            engine_name="tidegate",
            engine_version=version("tidegate"),
            engine_role=openengine_pb2.ENGINE_ROLE_AGGREGATED,
            instance_id=self._instance,
            supported_models=[info.model],
            schema_revision=REVISION,
            minimum_client_revision=REVISION,
            schema_release=RELEASE,
            capacity=openengine_pb2.DeploymentCapacity(
                kv_block_size=info.block_size,
                total_kv_blocks=info.device_blocks,
                max_running_requests=self._max_num_seqs,
                max_loras=0,
            ),
        )

    async def GetModelInfo(
        self, request: openengine_pb2.GetModelInfoRequest, context: object
    ) -> openengine_pb2.ModelInfo:
        info = self._hub.info
        _check_model(request.model, info.model)
        return openengine_pb2.ModelInfo(
            model_id=info.model,
            served_model_name=info.model,
            max_context_length=info.max_model_len,
            max_output_tokens=info.max_model_len - 1,
            supports_text_input=True,
            supports_token_ids_input=True,
            generation=openengine_pb2.GenerationCapabilities(
                prompt_logprobs=openengine_pb2.LogprobCapabilities(supported=False),
                output_logprobs=openengine_pb2.LogprobCapabilities(
                    supported=True,
                    candidate_selection_modes=[openengine_pb2.CANDIDATE_TOKEN_SELECTION_MODE_TOP_N],
                    max_top_n=MAX_LOGPROBS,
                ),
                guided_decoding=openengine_pb2.GuidedDecodingCapabilities(supported=True),
                max_num_sequences=MAX_CHOICES,
                supports_priority=False,
                supports_stop_in_output=True,
                supports_cache_salt=False,
                supports_prefix_cache_bypass=False,
            ),
            supports_lora=False,
            supports_multimodal=False,
        )

    async def GetLoad(
        self, request: openengine_pb2.GetLoadRequest, context: object
    ) -> openengine_pb2.LoadInfo:
        stats = self._hub.stats
        return openengine_pb2.LoadInfo(
            instance_id=self._instance,
            timestamp_unix_nanos=time.time_ns(),
            running_requests=stats.running,
            queued_requests=stats.waiting + stats.swapped,
            # What is only cached can go at once: to a router it is free.
            used_kv_blocks=stats.device.total - stats.device.free - stats.device.reclaimable,
            total_kv_blocks=self._hub.info.device_blocks,
        )

    async def Health(
        self, request: openengine_pb2.HealthRequest, context: object
    ) -> openengine_pb2.HealthResponse:
        if request.include_inference_probe:
            raise Failure.invalid([Violation("include_inference_probe", "not supported")])
        if self._hub.is_draining:
            return openengine_pb2.HealthResponse(state=openengine_pb2.HEALTH_STATE_DRAINING)
        return openengine_pb2.HealthResponse(state=openengine_pb2.HEALTH_STATE_READY)

    async def Abort(
        self, request: openengine_pb2.AbortRequest, context: object
    ) -> openengine_pb2.AbortResponse:
        """A request that is not here has ended: Dynamo cancels the stream, too, and that may come first."""
        if (target := request.WhichOneof("target")) != "request_id":
            raise Failure.invalid([Violation(target or "request_id", "abort requests by their ids")])
        generation = self._hub.find(caller().tenant, request.request_id)
        if generation is None:
            return openengine_pb2.AbortResponse(status=openengine_pb2.ABORT_STATUS_ALREADY_FINISHED)
        generation.cancel()
        return openengine_pb2.AbortResponse(status=openengine_pb2.ABORT_STATUS_ABORTED)


def _check_model(wanted: str, served: str) -> None:
    """Raises ``Failure`` where another model is meant.

    A path is not a name: the sidecar tells where itself has the checkpoint, which may be anywhere.
    """
    if wanted and not wanted.startswith(("/", ".")):
        check_model(wanted, served)


def _native(request: GenerateRequest) -> inference_pb2.GenerateRequest:
    """The same request in our words. Raises ``Failure`` that names all that we cannot do."""
    if violations := list(_violations(request)):
        raise Failure.invalid(violations)
    ours = sampling_pb2.SamplingParams()
    for message, names in ((request.sampling, SAME_SAMPLING), (request.stopping, SAME_STOPPING)):
        for field, value in message.ListFields():
            if field.name in names:
                setattr(ours, field.name, value)
    if request.sampling.top_k > 0:
        ours.top_k = request.sampling.top_k
    if request.sampling.HasField("num_sequences"):
        ours.n = request.sampling.num_sequences
    for condition in request.stopping.conditions:
        if condition.HasField("stop_text"):
            ours.stop.append(condition.stop_text)
        else:
            ours.stop_token_ids.append(condition.stop_token_id)
    if request.HasField("guided"):
        ours.structured_output.CopyFrom(_form(request.guided))
    ours.include_stop = request.stopping.include_stop_in_output
    if request.response.return_output_logprobs or request.response.HasField("output_candidates"):
        ours.logprobs = request.response.output_candidates.top_n
    if request.WhichOneof("input") == "prompt":
        prompt = prompt_pb2.Prompt(text=request.prompt)
    else:
        prompt = prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=request.token_ids.ids))
    native = inference_pb2.GenerateRequest(prompt=prompt, sampling=ours)
    if request.request_id:
        native.request_id = request.request_id
    return native


def _form(guided: openengine_pb2.GuidedDecoding) -> sampling_pb2.StructuredOutput:
    """Of one of ``GUIDES``."""
    match guided.WhichOneof("guide"):
        case "json_schema":
            return sampling_pb2.StructuredOutput(json_schema=guided.json_schema)
        case "regex":
            return sampling_pb2.StructuredOutput(regex=guided.regex)
        case "choice":
            choices = sampling_pb2.ChoiceList(values=guided.choice.choices)
            return sampling_pb2.StructuredOutput(choices=choices)
        case _:
            return sampling_pb2.StructuredOutput(json_schema=ANY_OBJECT)


def _violations(request: GenerateRequest) -> Iterable[Violation]:
    guide = request.guided.WhichOneof("guide") or "guide"
    refused = {
        "kv.session": request.kv.HasField("session"),
        "kv.bypass_prefix_cache": request.kv.bypass_prefix_cache,
        "kv.cache_salt": request.kv.cache_salt,
        "media": request.media,
        "lora_name": request.lora_name,
        # Of a prefill worker, which wants the prompt's KV alone. The protocol has an engine pass over what
        # else it does not know of these.
        "extra.request_type": "request_type" in request.extra.fields,
        f"guided.{guide}": request.HasField("guided") and guide not in GUIDES,
        "guided.backend": request.guided.backend,
        "response.return_prompt_logprobs": request.response.return_prompt_logprobs,
        "response.prompt_candidates": request.response.HasField("prompt_candidates"),
        "response.output_candidates.token_ids": request.response.output_candidates.HasField("token_ids"),
        "response.output_candidates.all": request.response.output_candidates.HasField("all"),
    }
    for path, is_wanted in refused.items():
        if is_wanted:
            yield Violation(path, "not supported")
    if request.sampling.top_k < -1:
        yield Violation("sampling.top_k", "must be -1 or more; -1 and 0 keep all")
    for index, condition in enumerate(request.stopping.conditions):
        if condition.WhichOneof("condition") is None:
            yield Violation(f"stopping.conditions[{index}]", "must have a text or a token id")


class _Answer:
    """Our events of one request as their responses."""

    def __init__(self, request: GenerateRequest, eos_token_ids: Collection[int]) -> None:
        self._request_id = request.request_id
        extra = request.extra.fields
        self._has_text = "detokenize" not in extra or extra["detokenize"].bool_value
        self._eos_token_ids = eos_token_ids
        self.is_accepted = False

    async def responses(self, call: AsyncIterator[Event]) -> AsyncGenerator[GenerateResponse]:
        async for event in call:
            match event:
                case Admitted():
                    self.is_accepted = True
                case list():
                    for delta in event:
                        yield GenerateResponse(request_id=self._request_id, token=self._output(delta))
                case Finished():
                    for end in event.choices:
                        response = GenerateResponse(request_id=self._request_id, finished=self._finished(end))
                        if end is event.choices[-1]:
                            response.usage.CopyFrom(_usage(event))
                        yield response
                case _:
                    pass  # the protocol has no words for progress

    def _output(self, delta: Delta) -> openengine_pb2.TokenOutput:
        if delta.logprobs:
            tokens = [_token_info(position) for position in delta.logprobs]
        else:
            tokens = [openengine_pb2.TokenInfo(token_id=token_id) for token_id in delta.token_ids]
        output = openengine_pb2.TokenOutput(output_index=delta.choice, tokens=tokens)
        if self._has_text:
            output.text = delta.text
        return output

    def error(self, failure: Failure) -> GenerateResponse:
        is_overload = failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = openengine_pb2.EngineError(
            code=openengine_pb2.ERROR_CODE_OVERLOADED if is_overload else openengine_pb2.ERROR_CODE_INTERNAL,
            message=failure.message,
        )
        error.details["reason"] = failure.reason
        if failure.retry_after is not None:
            error.retryable = True
            error.retry_after_ms = round(failure.retry_after * 1000)
        return GenerateResponse(request_id=self._request_id, error=error)

    def _finished(self, end: ChoiceEnd) -> openengine_pb2.GenerationFinished:
        finished = openengine_pb2.GenerationFinished(
            output_index=end.choice, reason=FINISH_REASONS[end.reason], message=end.reason.value
        )
        if end.stop_string is not None:
            finished.stop_match.stop_text = end.stop_string
        elif end.stop_token_id is not None:
            if end.stop_token_id in self._eos_token_ids:
                finished.stop_match.eos_token_id = end.stop_token_id
            else:
                finished.stop_match.stop_token_id = end.stop_token_id
        return finished


def _token_info(position: PositionLogprobs) -> openengine_pb2.TokenInfo:
    chosen = position.chosen
    return openengine_pb2.TokenInfo(
        token_id=chosen.token_id,
        logprob=chosen.logprob,
        rank=chosen.rank,
        candidates=[
            openengine_pb2.LogProb(token_id=top.token_id, logprob=top.logprob, rank=top.rank)
            for top in position.top
        ],
    )


def _usage(finished: Finished) -> openengine_pb2.Usage:
    usage = finished.usage
    return openengine_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.output_tokens,
        total_tokens=usage.prompt_tokens + usage.output_tokens,
        cached_prompt_tokens=usage.cached_tokens,
    )


def add(server: grpc.aio.Server, intake: Intake, hub: Hub, max_num_seqs: int) -> None:
    openengine_pb2_grpc.add_InferenceServicer_to_server(Inference(intake, hub), server)
    openengine_pb2_grpc.add_ControlServicer_to_server(Control(hub, max_num_seqs), server)
