"""The words in which the tests of the failure table speak, to either client."""

from collections.abc import Callable
from typing import Any

import grpc
from front import Front
from wire_clients import Call, Outcome, WireClient

Start = Callable[..., Any]

Connect = Callable[[Front | str], WireClient]
"""A client of a front, or of whatever is at an address."""

GENERATE, UNARY, SESSION = (f"InferenceService/{rpc}" for rpc in ("Generate", "GenerateUnary", "Session"))
CALLS = [GENERATE, UNARY]


def content(text: str = "the tide", max_tokens: int = 2, **fields: Any) -> dict[str, Any]:
    return {"prompt": {"text": text}, "sampling": {"max_tokens": max_tokens}, **fields}


def told(outcome: Outcome) -> tuple[grpc.StatusCode, str]:
    return outcome.code, outcome.reason


async def open_session(client: WireClient, **options: Any) -> Call:
    session = await client.call(SESSION, **options)
    await session.write(open={})
    await session.until("opened")
    return session


async def close_session(session: Call) -> Outcome:
    await session.write(close={})
    outcome = await session.outcome()
    assert outcome.code == grpc.StatusCode.OK
    return outcome
