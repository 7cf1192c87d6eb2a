"""A server that follows a script, to try a client with every answer that a server may give."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from tidegate.v1 import (
    control_pb2,
    control_pb2_grpc,
    events_pb2,
    inference_pb2,
    inference_pb2_grpc,
    session_pb2,
)

DEFAULT_CREDIT = 8
WORDS = [f"w{i} " for i in range(10_000)]


def status(code: grpc.StatusCode, reason: str, *details: Any, message: str = "no") -> status_pb2.Status:
    """A status as the server makes it: ErrorInfo and whatever else."""
    packed = []
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain="tidegate"), *details):
        holder = any_pb2.Any()
        holder.Pack(detail)
        packed.append(holder)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def retry_after(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


async def refuse(context: Any, refusal: status_pb2.Status, *trailers: tuple[str, str]) -> None:
    code = next(c for c in grpc.StatusCode if c.value[0] == refusal.code)
    trailing = (("grpc-status-details-bin", refusal.SerializeToString()), *trailers)
    await context.abort(code, refusal.message, trailing)


def delta(request_id: str, start: int, stop: int, **fields: Any) -> events_pb2.Delta:
    return events_pb2.Delta(
        request_id=request_id,
        offset=start,
        token_ids=range(start, stop),
        text="".join(WORDS[start:stop]),
        **fields,
    )


def finished(request_id: str, reason: Any, tokens: int) -> events_pb2.Finished:
    return events_pb2.Finished(
        request_id=request_id,
        choices=[events_pb2.ChoiceEnd(reason=reason, output_tokens=tokens)],
        usage=events_pb2.Usage(prompt_tokens=3, output_tokens=tokens),
        timings=events_pb2.Timings(queued=0.25, total=1.5),
    )


def prompt_logprobs(offset: int, token_ids: list[int]) -> events_pb2.PromptLogprobs:
    chosen = [events_pb2.Logprob(token_id=token_id, logprob=-1.0, rank=1) for token_id in token_ids]
    positions = [events_pb2.PositionLogprobs(chosen=one) for one in chosen]
    return events_pb2.PromptLogprobs(offset=offset, positions=positions)


class ScriptedServer(inference_pb2_grpc.InferenceServiceServicer, control_pb2_grpc.ControlServiceServicer):
    """Token i of every answer is ``w<i>``. ``refusals`` are given out first, one a request or attempt."""

    def __init__(self) -> None:
        self.refusals: list[Callable[[Any], Any]] = []
        self.requests: list[Any] = []
        self.commands: list[session_pb2.SessionRequest] = []
        self.start_errors: list[status_pb2.Status] = []
        self.token_delay = 0.0
        self.lose_connection_at: int | None = None
        self.lose_connection_in_prompt = False
        """Once, between the two messages with the prompt's logprobs."""
        self.closed = False
        self.cancelled = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        if self.refusals:
            await self.refusals.pop(0)(context)
        response = inference_pb2.GenerateResponse
        request_id = request.request_id
        try:
            yield response(admitted=events_pb2.Admitted(request_id=request_id, prompt_tokens=3, seed=17))
            # What a later server may add: an event that this client does not know.
            yield response()
            if request.sampling.HasField("prompt_logprobs"):
                yield response(prompt_logprobs=prompt_logprobs(1, [5, 6]))
                if self.lose_connection_in_prompt:
                    self.lose_connection_in_prompt = False
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                yield response(prompt_logprobs=prompt_logprobs(3, [7]))
            count = request.sampling.max_tokens
            for i in range(count):
                await asyncio.sleep(self.token_delay)
                if i == self.lose_connection_at:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                yield response(batch=events_pb2.Batch(deltas=[delta(request_id, i, i + 1)]))
            yield response(finished=finished(request_id, events_pb2.FINISH_REASON_MAX_TOKENS, count))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def GenerateUnary(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        if self.refusals:
            await self.refusals.pop(0)(context)
        await asyncio.sleep(self.token_delay)
        ids = [0, 1]
        logprob = events_pb2.Logprob(token_id=0, logprob=-0.5, rank=1)
        return inference_pb2.GenerateUnaryResponse(
            admitted=events_pb2.Admitted(prompt_tokens=3),
            completions=[
                inference_pb2.Completion(
                    token_ids=ids,
                    text="w0 w1 ",
                    finish_reason=events_pb2.FINISH_REASON_STOP_STRING,
                    logprobs=[events_pb2.PositionLogprobs(chosen=logprob, top=[logprob])] * 2,
                )
            ],
            finished=finished("x", events_pb2.FINISH_REASON_STOP_STRING, 2),
        )

    async def Tokenize(self, request: Any, context: Any) -> Any:
        return inference_pb2.TokenizeResponse(token_ids=map(ord, request.prompt.text))

    async def Detokenize(self, request: Any, context: Any) -> Any:
        return inference_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return control_pb2.GetModelInfoResponse(model="scripted", vocab_size=99)

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        if self.refusals:
            await self.refusals.pop(0)(context)
        outbox: asyncio.Queue[session_pb2.SessionResponse | None] = asyncio.Queue()
        limits = session_pb2.SessionLimits(default_credit=DEFAULT_CREDIT)
        first = await anext(aiter(requests))
        assert first.WhichOneof("command") == "open"
        outbox.put_nowait(session_pb2.SessionResponse(opened=session_pb2.Opened(limits=limits, model="m")))
        reader = asyncio.create_task(self._serve(requests, outbox))
        try:
            while (response := await outbox.get()) is not None:
                yield response
            self.closed = True
        finally:
            reader.cancel()
            if not self.closed:
                self.cancelled.set()

    async def _serve(self, requests: AsyncIterator[Any], outbox: asyncio.Queue[Any]) -> None:
        answer = session_pb2.SessionResponse
        credit: dict[str, int] = {}
        sent: dict[str, int] = {}
        limit: dict[str, int] = {}

        def advance(request_id: str) -> None:
            until = min(credit[request_id], limit[request_id])
            while sent[request_id] < until:
                stop = min(until, sent[request_id] + 4)
                deltas = [delta(request_id, sent[request_id], stop)]
                outbox.put_nowait(answer(batch=events_pb2.Batch(deltas=deltas)))
                sent[request_id] = stop
            if sent[request_id] == limit[request_id]:
                end(request_id, events_pb2.FINISH_REASON_MAX_TOKENS)
            else:
                kind = events_pb2.PROGRESS_KIND_PARKED
                outbox.put_nowait(answer(progress=events_pb2.Progress(request_id=request_id, kind=kind)))

        def end(request_id: str, reason: Any) -> None:
            del limit[request_id]
            outbox.put_nowait(answer(finished=finished(request_id, reason, sent[request_id])))

        async for request in _each(requests):
            self.commands.append(request)
            match request.WhichOneof("command"):
                case "start" if self.start_errors:
                    error = session_pb2.RequestError(
                        request_id=request.start.request_id, status=self.start_errors.pop(0)
                    )
                    outbox.put_nowait(answer(request_error=error))
                case "start":
                    start = request.start
                    credit[start.request_id] = start.credit
                    sent[start.request_id] = len(start.generated_token_ids)
                    limit[start.request_id] = start.sampling.max_tokens
                    outbox.put_nowait(
                        answer(admitted=events_pb2.Admitted(request_id=start.request_id, seed=5))
                    )
                    advance(start.request_id)
                case "credit" if request.credit.request_id in limit:
                    credit[request.credit.request_id] = request.credit.upto
                    advance(request.credit.request_id)
                case "cancel" if request.cancel.request_id in limit:
                    end(request.cancel.request_id, events_pb2.FINISH_REASON_CANCELLED)
                case "close":
                    outbox.put_nowait(None)


async def _each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Also those that came several in one message."""
    async for request in requests:
        for command in request.commands.commands or [request]:
            yield command


async def start_scripted_server(address: str) -> tuple[ScriptedServer, grpc.aio.Server]:
    scripted = ScriptedServer()
    grpc_server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(scripted, grpc_server)
    control_pb2_grpc.add_ControlServiceServicer_to_server(scripted, grpc_server)
    grpc_server.add_insecure_port(address)
    await grpc_server.start()
    return scripted, grpc_server
