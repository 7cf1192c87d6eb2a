"""One request for one RPC: what ``Generate`` is, and what other people's protocols are translated to."""

import uuid
from collections.abc import AsyncGenerator

from tidegate.service.delivery import Delivery
from tidegate.service.events import Event, Failed, Finished
from tidegate.service.generation import Generation
from tidegate.service.intake import Intake
from tidegate.v1 import inference_pb2

UNREAD_TOKENS = 1024
"""How far a streamed request runs ahead of what its stream takes, for each choice."""
DEADLINE_MARGIN = 0.05
"""Seconds, or this part of the whole if that is less: the last message must arrive in time."""

Message = inference_pb2.GenerateRequest | inference_pb2.GenerateUnaryRequest


def open_call(
    intake: Intake, request: Message, delivery: Delivery, *, unread: int | None, remaining: float | None
) -> Generation:
    """Register the request. Raises ``Failure``.

    ``remaining``: seconds until the RPC's deadline, which it will end a little before.
    """
    request_id = request.request_id if request.HasField("request_id") else uuid.uuid4().hex
    limit = None
    if remaining is not None:
        limit = remaining - min(DEADLINE_MARGIN, DEADLINE_MARGIN * remaining)
    generation = intake.open(request_id, request, credit=None, unread=unread, time_limit=limit)
    generation.join(None, delivery, None)
    return generation


async def stream_call(
    intake: Intake, request: inference_pb2.GenerateRequest, remaining: float | None
) -> AsyncGenerator[Event]:
    """Everything that happens to the request, to its ``Finished``; a consumer that leaves ends it.

    A list is what is new of each choice. The next event is asked for when the one before was written,
    and so the request waits for a slow reader. Raises ``Failure``, for a refusal before anything else.
    """
    delivery = Delivery()
    generation = open_call(intake, request, delivery, unread=UNREAD_TOKENS, remaining=remaining)
    try:
        await intake.submit(generation, request)
        ended = False
        while not ended:
            for event in await delivery.take():
                if isinstance(event, Failed):
                    raise event.failure
                yield event
                if isinstance(event, list):
                    for delta in event:
                        generation.delivered(delta.choice, delta.end_offset)
                ended = isinstance(event, Finished)
    finally:
        generation.abandon()
