"""The Python client: tokens from a Tidegate server, without torch and without the engine.

    from tidegate import Client

    with Client("127.0.0.1:50051") as client:
        messages = [{"role": "user", "content": "Tell me a story."}]
        for chunk in client.generate(messages, max_tokens=100, temperature=0):
            print(chunk, end="", flush=True)

A backend service opens one session and runs all its users' requests on it:

    async with AsyncClient("unix:/run/tidegate.sock") as client, client.session() as session:
        stream = await session.start("Once upon a time", max_tokens=100, timeout=30)
        async for chunk in stream:
            ...
        print(stream.finished.reason, stream.finished.usage.output_tokens)

A stream whose reader pauses stops generating when its credit is used up, and its KV leaves the device's
memory; reading on brings it back. See ``AsyncClient``, ``Session``, ``Stream`` and ``TidegateError``.
"""

from tidegate.service.client.aio import DEFAULT_TARGET, AsyncClient
from tidegate.service.client.errors import (
    AccessDenied,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    NotSupported,
    Overloaded,
    ServerFault,
    TidegateError,
    Unavailable,
    Violation,
)
from tidegate.service.client.messages import (
    Admitted,
    ChoiceEnd,
    Chunk,
    Completion,
    Event,
    Finished,
    Logprob,
    Message,
    Options,
    PositionLogprobs,
    Progress,
    PromptInput,
    PromptLogprobs,
    Response,
    Sampling,
    StructuredOutput,
    Timings,
    Usage,
)
from tidegate.service.client.session import Session
from tidegate.service.client.session_stream import SessionStream
from tidegate.service.client.stream import GenerateStream, Stream
from tidegate.service.client.sync import BlockingSession, BlockingSessionStream, BlockingStream, Client

__all__ = [
    "DEFAULT_TARGET",
    "AccessDenied",
    "Admitted",
    "AlreadyExists",
    "AsyncClient",
    "BlockingSession",
    "BlockingSessionStream",
    "BlockingStream",
    "Cancelled",
    "ChoiceEnd",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Event",
    "FailedPrecondition",
    "Finished",
    "GenerateStream",
    "InvalidRequest",
    "Logprob",
    "Message",
    "NotFound",
    "NotSupported",
    "Options",
    "Overloaded",
    "PositionLogprobs",
    "Progress",
    "PromptInput",
    "PromptLogprobs",
    "Response",
    "Sampling",
    "ServerFault",
    "Session",
    "SessionStream",
    "Stream",
    "StructuredOutput",
    "TidegateError",
    "Timings",
    "Unavailable",
    "Usage",
    "Violation",
]
