"""KServe's Open Inference Protocol, with Triton's bidirectional ``ModelStreamInfer``.

A model is a pair of tensors here: ``text_input`` (one string) in, ``text_output`` (one string) out, with
``stream`` (a boolean) beside it. Sampling fields have their names of ``tidegate.v1``: as parameters of the
request, or together as JSON in ``sampling_parameters``, as Triton's vLLM backend has them.
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from importlib.metadata import version

import grpc.aio
from google.protobuf import json_format

from tidegate.compat.kserve import grpc_service_pb2, grpc_service_pb2_grpc
from tidegate.engine.request import Violation
from tidegate.service.call import stream_call
from tidegate.service.errors import Failure, log_unexpected
from tidegate.service.events import Finished
from tidegate.service.hub import Hub
from tidegate.service.intake import Intake, check_model
from tidegate.v1 import inference_pb2, prompt_pb2, sampling_pb2

SERVICE = "inference.GRPCInferenceService"
MAX_REQUESTS = 1000
"""Of one stream under way at once; then no more of its messages are read."""
UNWRITTEN = 64
"""Responses of one stream that may wait for a client that does not read."""
FINAL = "triton_final_response"
MODEL_VERSION = "1"
IGNORED_PARAMETERS = ("triton_enable_empty_final_response",)
"""What clients say about how they read, and is so anyway."""
LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")
"""Sampling fields that hold several values; a parameter holds one."""

Infer = grpc_service_pb2.ModelInferRequest
Response = grpc_service_pb2.ModelInferResponse
StreamResponse = grpc_service_pb2.ModelStreamInferResponse


class InferenceService(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, intake: Intake, hub: Hub) -> None:
        self._intake = intake
        self._hub = hub

    async def ServerLive(
        self, request: grpc_service_pb2.ServerLiveRequest, context: object
    ) -> grpc_service_pb2.ServerLiveResponse:
        return grpc_service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: grpc_service_pb2.ServerReadyRequest, context: object
    ) -> grpc_service_pb2.ServerReadyResponse:
        return grpc_service_pb2.ServerReadyResponse(ready=not self._hub.is_draining)

    async def ModelReady(
        self, request: grpc_service_pb2.ModelReadyRequest, context: object
    ) -> grpc_service_pb2.ModelReadyResponse:
        is_ours = request.name == self._hub.info.model
        return grpc_service_pb2.ModelReadyResponse(ready=is_ours and not self._hub.is_draining)

    async def ServerMetadata(
        self, request: grpc_service_pb2.ServerMetadataRequest, context: object
    ) -> grpc_service_pb2.ServerMetadataResponse:
        return grpc_service_pb2.ServerMetadataResponse(name="tidegate", version=version("tidegate"))

    async def ModelMetadata(
        self, request: grpc_service_pb2.ModelMetadataRequest, context: object
    ) -> grpc_service_pb2.ModelMetadataResponse:
        check_model(request.name, self._hub.info.model)
        tensor = grpc_service_pb2.ModelMetadataResponse.TensorMetadata
        return grpc_service_pb2.ModelMetadataResponse(
            name=self._hub.info.model,
            versions=[MODEL_VERSION],
            platform="tidegate",
            inputs=[
                tensor(name="text_input", datatype="BYTES", shape=[1]),
                tensor(name="stream", datatype="BOOL", shape=[1]),
            ],
            outputs=[tensor(name="text_output", datatype="BYTES", shape=[1])],
        )

    async def ModelInfer(
        self, request: Infer, context: "grpc.aio.ServicerContext[Infer, Response]"
    ) -> Response:
        call = _Call(request, self._hub.info.model)
        if call.is_streamed:
            raise Failure.invalid([Violation("inputs.stream", "needs ModelStreamInfer")])
        responses = [response async for response in call.responses(self._intake, context.time_remaining())]
        return responses[-1]

    async def ModelStreamInfer(
        self,
        request_iterator: AsyncIterator[Infer],
        context: "grpc.aio.ServicerContext[Infer, StreamResponse]",
    ) -> AsyncGenerator[StreamResponse]:
        responses: _Responses = asyncio.Queue(UNWRITTEN)
        running = asyncio.create_task(self._run_all(request_iterator, responses))
        try:
            while isinstance(response := await responses.get(), StreamResponse):
                yield response
            if response is not None:
                raise response
        finally:
            running.cancel()
            await asyncio.wait({running})

    async def _run_all(self, requests: AsyncIterator[Infer], responses: "_Responses") -> None:
        """Run every request of a stream, side by side; then say how the stream ends."""
        end: Failure | None = None
        free = asyncio.Semaphore(MAX_REQUESTS)
        running: set[asyncio.Task[None]] = set()
        try:
            async for request in requests:
                await free.acquire()
                task = asyncio.create_task(self._run(request, responses))
                running.add(task)
                task.add_done_callback(running.discard)
                task.add_done_callback(lambda _: free.release())
            if running:
                await asyncio.wait(running)
        except Failure as failure:
            end = failure
        except Exception as error:  # noqa: BLE001  in a task of its own, nobody else would see it
            log_unexpected("a stream of requests could not be read", error)
            end = Failure.internal()
        finally:
            for task in running:
                task.cancel()
        await responses.put(end)

    async def _run(self, request: Infer, responses: "_Responses") -> None:
        """One request of a stream. What goes wrong with it is a response of its own."""
        try:
            call = _Call(request, self._hub.info.model)
            async with contextlib.aclosing(call.responses(self._intake, None)) as answers:
                async for answer in answers:
                    await responses.put(StreamResponse(infer_response=answer))
        except Failure as failure:
            await responses.put(_error(request.id, failure))
        except Exception as error:  # noqa: BLE001  the other requests of the stream go on
            log_unexpected("a request of a stream failed", error)
            await responses.put(_error(request.id, Failure.internal()))


_Responses = asyncio.Queue[StreamResponse | Failure | None]
"""Of one stream; what is no response is its end: with a failure, or None in order."""


class _Call:
    """One request in our words, and its answers in theirs."""

    def __init__(self, request: Infer, model: str) -> None:
        """Raises ``Failure`` with everything that is wrong with the tensors and the parameters."""
        check_model(request.model_name, model)
        self._id = request.id
        self._model = model
        inputs = _inputs(request)
        self.is_streamed = inputs.stream
        # Without an id: theirs tell the requests of one stream apart, and may come again.
        self._native = inference_pb2.GenerateRequest(
            prompt=prompt_pb2.Prompt(text=inputs.text), sampling=inputs.sampling
        )

    async def responses(self, intake: Intake, remaining: float | None) -> AsyncGenerator[Response]:
        """With ``stream`` what is new, as it comes, and a last one without text; else one with all.

        Raises ``Failure``.
        """
        text: list[str] = []
        async with contextlib.aclosing(stream_call(intake, self._native, remaining)) as call:
            async for event in call:
                match event:
                    case list():
                        new = "".join(delta.text for delta in event)
                        if self.is_streamed and new:
                            yield self._response(new, {FINAL: False})
                        text.append(new)
                    case Finished():
                        whole = "" if self.is_streamed else "".join(text)
                        yield self._response(whole, {FINAL: True, **_summary(event)})
                    case _:
                        pass  # the protocol has no words for progress

    def _response(self, text: str, parameters: dict[str, bool | int | str]) -> Response:
        data = text.encode()
        response = Response(
            model_name=self._model,
            model_version=MODEL_VERSION,
            id=self._id,
            outputs=[Response.InferOutputTensor(name="text_output", datatype="BYTES", shape=[1])],
            raw_output_contents=[struct.pack("<I", len(data)) + data],
        )
        for name, value in parameters.items():
            _set(response.parameters[name], value)
        return response


@dataclass(slots=True)
class _Inputs:
    text: str = ""
    stream: bool = False
    sampling: sampling_pb2.SamplingParams = field(default_factory=sampling_pb2.SamplingParams)


def _inputs(request: Infer) -> _Inputs:
    """What the tensors and parameters say. Raises ``Failure``."""
    found = _Inputs()
    violations: list[Violation] = []
    names = [tensor.name for tensor in request.inputs]
    if "text_input" not in names:
        violations.append(Violation("inputs.text_input", "is missing"))
    for index, tensor in enumerate(request.inputs):
        path = f"inputs.{tensor.name}"
        try:
            value = _value(request, index)
            match tensor.name:
                case "text_input":
                    found.text = _text(value)
                case "stream":
                    found.stream = bool(value)
                case "sampling_parameters":
                    json_format.Parse(_text(value), found.sampling)
                case "exclude_input_in_output" if value:
                    pass  # it never is in it
                case _:
                    violations.append(Violation(path, "is not supported"))
        except (ValueError, json_format.ParseError) as error:
            violations.append(Violation(path, f"cannot be read: {type(error).__name__}"))
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if name in IGNORED_PARAMETERS or kind is None:
            continue
        value = getattr(parameter, kind)
        try:
            json_format.ParseDict({name: [value] if name in LISTS else value}, found.sampling)
        except json_format.ParseError:
            violations.append(Violation(f"parameters.{name}", "is no sampling field, or of another type"))
    if found.sampling.n > 1:
        violations.append(Violation("parameters.n", "must be 1: a response has one text"))
    if violations:
        raise Failure.invalid(violations)
    return found


def _value(request: Infer, index: int) -> bytes | bool:
    """The one element of an input. Raises ``ValueError``."""
    tensor = request.inputs[index]
    if tensor.datatype not in ("BYTES", "BOOL"):
        raise ValueError
    if request.raw_input_contents:
        raw = request.raw_input_contents[index] if index < len(request.raw_input_contents) else b""
        if tensor.datatype == "BOOL":
            (flag,) = raw
            return bool(flag)
        (length,) = struct.unpack_from("<I", raw.ljust(4, b"\0"))
        if length != len(raw) - 4:
            raise ValueError
        return raw[4:]
    (value,) = tensor.contents.bool_contents if tensor.datatype == "BOOL" else tensor.contents.bytes_contents
    return value


def _text(value: bytes | bool) -> str:
    """Raises ``ValueError`` where it is no text."""
    if isinstance(value, bool):
        raise ValueError
    return value.decode()


def _summary(finished: Finished) -> dict[str, bool | int | str]:
    (end,) = finished.choices
    return {
        "finish_reason": end.reason.value,
        "prompt_tokens": finished.usage.prompt_tokens,
        "output_tokens": finished.usage.output_tokens,
    }


def _set(parameter: grpc_service_pb2.InferParameter, value: bool | int | str) -> None:
    match value:
        case bool():
            parameter.bool_param = value
        case int():
            parameter.int64_param = value
        case str():
            parameter.string_param = value


def _error(request_id: str, failure: Failure) -> StreamResponse:
    """A request's error, which the protocol knows as a text; the reason comes first in it."""
    details = "; ".join(f"{violation.field}: {violation.description}" for violation in failure.violations)
    message = f"{failure.reason}: {failure.message}" + (f" ({details})" if details else "")
    response = Response(id=request_id)
    _set(response.parameters[FINAL], True)
    return StreamResponse(error_message=message, infer_response=response)


def add(server: grpc.aio.Server, intake: Intake, hub: Hub) -> None:
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(intake, hub), server)
