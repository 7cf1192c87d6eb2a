"""``InferenceService``: text and tokens for applications."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import grpc.aio

from tidegate.engine.text import Text
from tidegate.service import convert, events
from tidegate.service.call import open_call, stream_call
from tidegate.service.delivery import Delivery
from tidegate.service.intake import Intake
from tidegate.service.sessions import Sessions
from tidegate.v1 import inference_pb2, inference_pb2_grpc, session_pb2


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, text: Text, intake: Intake, sessions: Sessions) -> None:
        self._text = text
        self._intake = intake
        self._sessions = sessions

    async def Session(
        self,
        request_iterator: AsyncIterator[session_pb2.SessionRequest],
        context: object,
    ) -> AsyncGenerator[session_pb2.SessionResponse]:
        async with contextlib.aclosing(self._sessions.serve(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def Generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: "grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]",
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        call = stream_call(self._intake, request, context.time_remaining())
        async with contextlib.aclosing(call):
            async for event in call:
                # A refusal is raised before anything was written: it goes out without headers.
                yield _response(event)

    async def GenerateUnary(
        self,
        request: inference_pb2.GenerateUnaryRequest,
        context: "grpc.aio.ServicerContext[inference_pb2.GenerateUnaryRequest, "
        "inference_pb2.GenerateUnaryResponse]",
    ) -> inference_pb2.GenerateUnaryResponse:
        delivery = Delivery()
        generation = open_call(
            self._intake, request, delivery, unread=None, remaining=context.time_remaining()
        )
        try:
            await self._intake.submit(generation, request)
            return await _collect(delivery)
        finally:
            generation.abandon()

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: object
    ) -> inference_pb2.TokenizeResponse:
        self._intake.check_model(request)
        return inference_pb2.TokenizeResponse(token_ids=await self._intake.token_ids(request.prompt))

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: object
    ) -> inference_pb2.DetokenizeResponse:
        self._intake.check_model(request)
        self._intake.check_token_ids("token_ids", request.token_ids)
        skip_special_tokens = request.skip_special_tokens or not request.HasField("skip_special_tokens")
        text = await self._text.decode_async(list(request.token_ids), skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: object
    ) -> inference_pb2.CountTokensResponse:
        self._intake.check_model(request)
        return inference_pb2.CountTokensResponse(tokens=len(await self._intake.token_ids(request.prompt)))


def _response(event: events.Event) -> inference_pb2.GenerateResponse:
    match event:
        case list():
            response = inference_pb2.GenerateResponse()
            convert.fill_batch(response.batch, event)
            return response
        case events.Admitted():
            return inference_pb2.GenerateResponse(admitted=convert.admitted(event))
        case events.PromptLogprobs():
            return inference_pb2.GenerateResponse(prompt_logprobs=convert.prompt_logprobs(event))
        case events.Progress():
            return inference_pb2.GenerateResponse(progress=convert.progress(event))
        case events.Finished():
            return inference_pb2.GenerateResponse(finished=convert.finished(event))
        case _:
            raise TypeError(f"{type(event).__name__} is an event of sessions")


async def _collect(delivery: Delivery) -> inference_pb2.GenerateUnaryResponse:
    """Everything until the end, as one answer. Raises the failure of ``Failed``."""
    response = inference_pb2.GenerateUnaryResponse()
    whole: dict[int, events.Delta] = {}
    while True:
        for event in await delivery.take():
            match event:
                case list():
                    for delta in event:
                        if delta.choice in whole:
                            whole[delta.choice].absorb(delta)
                        else:
                            whole[delta.choice] = delta
                case events.Admitted():
                    response.admitted.CopyFrom(convert.admitted(event))
                case events.PromptLogprobs():
                    response.prompt_logprobs.extend(map(convert.position_logprobs, event.positions))
                case events.Finished():
                    response.finished.CopyFrom(convert.finished(event))
                    response.completions.extend(
                        convert.completion(end, whole.get(end.choice)) for end in event.choices
                    )
                    return response
                case events.Failed():
                    raise event.failure
                case _:
                    pass  # progress is of no use to one who waits for the whole
