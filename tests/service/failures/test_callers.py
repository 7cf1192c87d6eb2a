"""Who calls, as two clients see it."""

from pathlib import Path

import grpc
import pytest
from calls import CALLS, GENERATE, SESSION, UNARY, Connect, Start, content, told
from front import Front

from tidegate.service.security import SecurityConfig, load_security

TOKEN, ROUTER = "alice-0123456789", "router-0123456789"


@pytest.fixture
async def guarded(start_front: Start, tmp_path: Path) -> Front:
    """A front that asks for tokens."""
    path = tmp_path / "tokens"
    path.touch(mode=0o600)
    path.write_text(f"{TOKEN} alice\n{ROUTER} edge router\n")
    front: Front = await start_front(security=load_security(SecurityConfig(auth_tokens=path)))
    return front


@pytest.mark.parametrize("method", [*CALLS, SESSION, "ControlService/GetServerInfo"])
@pytest.mark.parametrize(
    ("metadata", "reason"),
    [({}, "CREDENTIALS_MISSING"), ({"authorization": "Bearer wrong-0123456789"}, "CREDENTIALS_INVALID")],
)
async def test_strangers_are_unauthenticated(
    guarded: Front, connect: Connect, method: str, metadata: dict[str, str], reason: str
) -> None:
    message = {GENERATE: content(), UNARY: content(), SESSION: None}.get(method, {})
    outcome = await (await connect(guarded).call(method, message, metadata=metadata)).outcome()
    assert told(outcome) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    assert outcome.retry_ms is None


async def test_another_tenants_requests_are_for_routers_alone(guarded: Front, connect: Connect) -> None:
    client = connect(guarded)
    abort = {"request_id": "r", "tenant": "bob"}
    denied = await client.call("ControlService/Abort", abort, metadata={"authorization": f"Bearer {TOKEN}"})
    assert told(await denied.outcome()) == (grpc.StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED")
    allowed = await client.call("ControlService/Abort", abort, metadata={"authorization": f"Bearer {ROUTER}"})
    assert (await allowed.outcome()).code == grpc.StatusCode.OK
