"""Who may call, as whom, and what must be refused: TLS, client certificates, tokens, tenants, roles."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import jwt
import pytest
from certificates import Authority, Issued
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from front import Front, SessionClient, refusal_of, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate import AsyncClient
from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.messages import Submit
from tidegate.service import security
from tidegate.service.client import AccessDenied
from tidegate.service.config import ServerConfig
from tidegate.service.listener import MAX_METADATA_BYTES
from tidegate.service.security import SecurityConfig, load_security
from tidegate.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

Start = Callable[..., Any]

ALICE, BOB, ROUTER = "alice-0123456789", "bob-0123456789abc", "router-0123456789"
TOKENS = f"""
# Of the test's tenants.
{ALICE} alice
{BOB}   bob user

{ROUTER} edge router
"""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def secret_file(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> SecurityConfig:
    return SecurityConfig(auth_tokens=secret_file(tmp_path / "tokens", TOKENS))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server_cert(authority: Authority) -> Issued:
    return authority.issue("server", ips=["127.0.0.1"], dns=["localhost"])


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def unary(**fields: Any) -> inference_pb2.GenerateUnaryRequest:
    return inference_pb2.GenerateUnaryRequest(
        prompt={"text": "the tide"}, sampling={"max_tokens": 2}, **fields
    )


def tenants(front: Front) -> list[str]:
    return [command.request.tenant for command in front.engine.sent(Submit) if isinstance(command, Submit)]


# --- every kind of RPC ------------------------------------------------------------------------------------


def every_kind(front: Front, metadata: Any) -> dict[str, Any]:
    streamed = inference_pb2.GenerateRequest(prompt={"text": "x"}, sampling={"max_tokens": 2})
    return {
        "unary": front.inference.GenerateUnary(unary(), metadata=metadata),
        "stream": front.inference.Generate(streamed, metadata=metadata),
        "session": front.inference.Session(metadata=metadata),
        "control": front.control.GetServerInfo(control_pb2.GetServerInfoRequest(), metadata=metadata),
        "watch": front.control.WatchLoad(control_pb2.WatchLoadRequest(), metadata=metadata),
        "health": health_pb2_grpc.HealthStub(front.channel).Check(
            health_pb2.HealthCheckRequest(), metadata=metadata
        ),
    }


@pytest.mark.parametrize("kind", ["unary", "stream", "session", "control", "watch", "health"])
@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "CREDENTIALS_MISSING"),
        (bearer("unknown-0123456789"), "CREDENTIALS_INVALID"),
        (bearer(ALICE[:-1]), "CREDENTIALS_INVALID"),
        ((("authorization", f"Basic {ALICE}"),), "CREDENTIALS_INVALID"),
        ((*bearer(ALICE), *bearer(BOB)), "CREDENTIALS_INVALID"),
    ],
)
async def test_no_rpc_of_any_kind_is_answered_without_a_known_token(
    start_front: Start, tokens: SecurityConfig, kind: str, metadata: Any, reason: str
) -> None:
    front = await start_front(security=load_security(tokens))
    refusal = await refusal_of(every_kind(front, metadata)[kind])
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    assert refusal.trailers["grpc-retry-pushback-ms"] == "-1"
    assert ALICE[:-1] not in refusal.message
    assert front.engine.commands == []


async def test_a_stranger_is_refused_before_the_message_is_read(
    start_front: Start, tokens: SecurityConfig
) -> None:
    front = await start_front(security=load_security(tokens))
    call = front.channel.unary_unary(
        "/tidegate.v1.InferenceService/GenerateUnary", request_serializer=bytes, response_deserializer=bytes
    )
    assert (await refusal_of(call(b"\xff\xff\xff"))).reason == "CREDENTIALS_MISSING"


async def test_metadata_beyond_the_limit_is_refused(start_front: Start) -> None:
    front = await start_front()
    call = front.inference.GenerateUnary(unary(), metadata=(("x-noise", "x" * MAX_METADATA_BYTES),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert front.engine.commands == []


# --- tenants and roles ------------------------------------------------------------------------------------


async def test_the_tenant_is_that_of_the_token_for_every_way_to_start_a_request(
    start_front: Start, tokens: SecurityConfig
) -> None:
    """The engine keeps cached prefixes apart by it."""
    front = await start_front(security=load_security(tokens))
    await front.inference.GenerateUnary(unary(), metadata=bearer(ALICE))
    streamed = inference_pb2.GenerateRequest(prompt={"text": "x"}, sampling={"max_tokens": 2})
    async for _ in front.inference.Generate(streamed, metadata=bearer(BOB)):
        pass
    session = SessionClient(front.inference.Session(metadata=bearer(ALICE)))
    await session.send(open={})
    await session.send(start={"request_id": "r", "prompt": {"text": "x"}, "sampling": {"max_tokens": 2}})
    await session.next("finished")
    assert tenants(front) == ["alice", "bob", "alice"]


async def test_two_tenants_use_the_same_request_id_side_by_side(
    start_front: Start, tokens: SecurityConfig
) -> None:
    front = await start_front(security=load_security(tokens))
    front.engine.admits = False
    calls = [
        front.inference.GenerateUnary(unary(request_id="same"), metadata=bearer(token))
        for token in (ALICE, BOB)
    ]
    await until(lambda: len(front.engine.waiting) == 2)
    refusal = await refusal_of(front.inference.GenerateUnary(unary(request_id="same"), metadata=bearer(BOB)))
    assert refusal.reason == "REQUEST_ID_IN_USE"
    front.engine.admits = True
    front.engine.go_on()
    await asyncio.gather(*calls)


async def test_abort_reaches_the_callers_own_requests_and_a_router_those_of_others(
    start_front: Start, tokens: SecurityConfig
) -> None:
    front = await start_front(security=load_security(tokens))
    front.engine.admits = False
    call = front.inference.GenerateUnary(unary(request_id="r"), metadata=bearer(ALICE))
    await until(lambda: front.engine.waiting)

    async def abort(token: str, **fields: Any) -> bool:
        request = control_pb2.AbortRequest(request_id="r", **fields)
        aborted: bool = (await front.control.Abort(request, metadata=bearer(token))).aborted
        return aborted

    assert not await abort(BOB)
    refusal = await refusal_of(
        front.control.Abort(control_pb2.AbortRequest(request_id="r", tenant="alice"), metadata=bearer(BOB))
    )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED")
    assert not await abort(ROUTER)
    assert await abort(ROUTER, tenant="alice")
    assert not await abort(ROUTER, tenant="alice")
    assert (await call).finished.choices[0].output_tokens == 0


async def test_a_tenant_lists_its_own_sessions_and_a_router_those_of_others(
    start_front: Start, tokens: SecurityConfig
) -> None:
    front = await start_front(security=load_security(tokens))
    session = SessionClient(front.inference.Session(metadata=bearer(ALICE)))
    await session.send(open={})
    await session.next("opened")

    async def number(token: str, **fields: Any) -> int:
        request = control_pb2.ListSessionsRequest(**fields)
        return len((await front.control.ListSessions(request, metadata=bearer(token))).sessions)

    assert [await number(token) for token in (ALICE, BOB, ROUTER)] == [1, 0, 0]
    assert await number(ROUTER, tenant="alice") == 1
    request = control_pb2.ListSessionsRequest(tenant="alice")
    refusal = await refusal_of(front.control.ListSessions(request, metadata=bearer(BOB)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED")
    await session.send(close={})
    await session.rest()
    assert await number(ALICE) == 0


# --- the commands -----------------------------------------------------------------------------------------


async def test_a_command_speaks_tls_and_shows_its_certificate_and_its_token(
    start_front: Start, tmp_path: Path, authority: Authority, server_cert: Issued, tokens: SecurityConfig
) -> None:
    config = SecurityConfig(
        tls_cert=server_cert.cert,
        tls_key=server_cert.key,
        tls_client_ca=authority.cert,
        auth_tokens=tokens.auth_tokens,
    )
    front = await start_front(security=load_security(config), addresses=["127.0.0.1:0"])
    address, own = front.server.addresses[0], authority.issue("person")
    token = secret_file(tmp_path / "token", f"{ALICE} alice\n")
    tls = ["--tls-ca", authority.cert, "--tls-cert", own.cert, "--tls-key", own.key]

    async def run(*command: str | Path) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tidegate.service.cli", *command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 110)
        return process.returncode, out.decode(), err.decode()

    generate = ["generate", "the tide", "--max-tokens", "5", "--server", address]
    whole, without_token, without_tls, top, mixed, certified = await asyncio.gather(
        run(*generate, *tls, "--token-file", token),
        run(*generate, *tls),
        run(*generate, "--token-file", token),
        run("top", address, "--once", *tls, "--token-file", token),
        run("generate", "x", "--model", "demo", "--token-file", token),
        run("generate", "x", "--model", "demo", "--tls-cert", own.cert, "--tls-key", own.key),
    )
    assert whole == (0, front.engine.expected("the tide", 5) + "\n", "")
    assert tenants(front) == ["alice"]
    assert (without_token[0], without_token[2]) == (
        1,
        "tidegate generate: error: send metadata authorization: Bearer TOKEN\n",
    )
    assert (without_tls[0], "no server answers" in without_tls[2]) == (1, True)
    assert (top[0], "device" in top[1]) == (0, True)
    for refused in (mixed, certified):
        assert (refused[0], "--token-file are for --server" in refused[2]) == (1, True)


# --- signed tokens ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signer() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def signed_config(tmp_path: Path, signer: ec.EllipticCurvePrivateKey) -> SecurityConfig:
    path = tmp_path / "public.pem"
    path.write_bytes(public_pem(signer))
    return SecurityConfig(jwt_keys=path, jwt_issuer="https://issuer", jwt_audience="tidegate")


def public_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def claims(**changed: Any) -> dict[str, Any]:
    all_of_them = {
        "tenant": "alice",
        "iss": "https://issuer",
        "aud": "tidegate",
        "exp": int(time.time()) + 3600,
        **changed,
    }
    return {name: value for name, value in all_of_them.items() if value is not None}


async def test_a_signed_token_names_the_tenant(
    start_front: Start, signed_config: SecurityConfig, signer: ec.EllipticCurvePrivateKey
) -> None:
    front = await start_front(security=load_security(signed_config))
    token = jwt.encode(claims(), signer, "ES256")
    await front.inference.GenerateUnary(unary(), metadata=bearer(token))
    assert tenants(front) == ["alice"]


@pytest.mark.parametrize(
    "changed",
    [
        {"exp": 1_000_000_000},
        {"exp": None},
        {"nbf": 10_000_000_000},
        {"iss": "https://another"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"tenant": None},
        {"tenant": ""},
        {"tenant": ["alice"]},
        {"tenant": "al\nice"},
        {"role": "owner"},
    ],
)
async def test_a_signed_token_that_does_not_hold_is_refused(
    start_front: Start,
    signed_config: SecurityConfig,
    signer: ec.EllipticCurvePrivateKey,
    changed: dict[str, Any],
) -> None:
    front = await start_front(security=load_security(signed_config))
    token = jwt.encode(claims(**changed), signer, "ES256")
    refusal = await refusal_of(front.inference.GenerateUnary(unary(), metadata=bearer(token)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    assert "another" not in refusal.message


async def test_a_token_that_the_key_did_not_sign_is_refused(
    start_front: Start, signed_config: SecurityConfig, signer: ec.EllipticCurvePrivateKey
) -> None:
    """Another key's, no key's, and the public key itself taken for a shared secret."""
    front = await start_front(security=load_security(signed_config))
    header, payload = (
        jwt.utils.base64url_encode(json.dumps(part).encode()).decode()
        for part in ({"alg": "HS256", "typ": "JWT"}, claims())
    )
    digest = jwt.get_algorithm_by_name("HS256").sign(f"{header}.{payload}".encode(), public_pem(signer))
    forged = [
        jwt.encode(claims(), ec.generate_private_key(ec.SECP256R1()), "ES256"),
        jwt.encode(claims(), None, "none"),
        f"{header}.{payload}.{jwt.utils.base64url_encode(digest).decode()}",
    ]
    for token in forged:
        refusal = await refusal_of(front.inference.GenerateUnary(unary(), metadata=bearer(token)))
        assert refusal.reason == "CREDENTIALS_INVALID"


async def test_a_key_set_is_chosen_from_by_key_id(start_front: Start, tmp_path: Path) -> None:
    keys = {name: rsa.generate_private_key(65537, 2048) for name in ("old", "new")}
    algorithm = jwt.get_algorithm_by_name("RS256")
    key_set = [{**json.loads(algorithm.to_jwk(key.public_key())), "kid": name} for name, key in keys.items()]
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": key_set}))
    front = await start_front(security=load_security(SecurityConfig(jwt_keys=path)))

    def token(signer: str, key_id: str | None) -> str:
        headers = None if key_id is None else {"kid": key_id}
        return jwt.encode(claims(aud=None), keys[signer], "RS256", headers=headers)

    await front.inference.GenerateUnary(unary(), metadata=bearer(token("old", "old")))
    await front.inference.GenerateUnary(unary(), metadata=bearer(token("new", "new")))
    for signer, key_id in (("old", "new"), ("old", None), ("old", "other")):
        call = front.inference.GenerateUnary(unary(), metadata=bearer(token(signer, key_id)))
        assert (await refusal_of(call)).reason == "CREDENTIALS_INVALID"


async def test_static_and_signed_tokens_work_side_by_side(
    start_front: Start, tokens: SecurityConfig, signed_config: SecurityConfig, signer: Any
) -> None:
    both = SecurityConfig(
        auth_tokens=tokens.auth_tokens, jwt_keys=signed_config.jwt_keys, jwt_audience="tidegate"
    )
    front = await start_front(security=load_security(both))
    for token in (BOB, jwt.encode(claims(), signer, "ES256")):
        await front.inference.GenerateUnary(unary(), metadata=bearer(token))
    assert tenants(front) == ["bob", "alice"]


# --- TLS --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def tls_channel(
    front: Front, authority: Authority, client: Issued | None = None, index: int = -1
) -> AsyncGenerator[grpc.aio.Channel]:
    credentials = grpc.ssl_channel_credentials(
        authority.cert.read_bytes(),
        None if client is None else client.key.read_bytes(),
        None if client is None else client.cert.read_bytes(),
    )
    address = front.server.addresses[index]
    async with grpc.aio.secure_channel(address, credentials) as channel:
        yield channel


async def call_over(channel: grpc.aio.Channel, **options: Any) -> None:
    await inference_pb2_grpc.InferenceServiceStub(channel).GenerateUnary(unary(), timeout=20, **options)


async def code_over(channel: grpc.aio.Channel) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_over(channel)
    return caught.value.code()


async def test_tls_serves_those_who_trust_it_and_nobody_in_plaintext(
    start_front: Start, tmp_path: Path, authority: Authority, server_cert: Issued
) -> None:
    security = load_security(SecurityConfig(tls_cert=server_cert.cert, tls_key=server_cert.key))
    front = await start_front(security=security, addresses=["127.0.0.1:0"])
    async with tls_channel(front, authority) as channel:
        await call_over(channel)
    async with grpc.aio.insecure_channel(front.server.addresses[0]) as channel:
        assert await code_over(channel) == grpc.StatusCode.UNAVAILABLE
    (tmp_path / "other").mkdir()
    async with tls_channel(front, Authority(tmp_path / "other")) as channel:
        assert await code_over(channel) == grpc.StatusCode.UNAVAILABLE
    assert tenants(front) == ["local"]


async def test_every_address_speaks_tls(
    start_front: Start, authority: Authority, server_cert: Issued
) -> None:
    config = SecurityConfig(tls_cert=server_cert.cert, tls_key=server_cert.key)
    front = await start_front(
        security=load_security(config),
        addresses=["127.0.0.1:0", "127.0.0.1:0"],
        admin_addresses=["127.0.0.1:0"],
    )
    for index in range(2):
        async with tls_channel(front, authority, index=index) as channel:
            await call_over(channel)
    trusted = grpc.ssl_channel_credentials(authority.cert.read_bytes())
    async with grpc.aio.secure_channel(front.server.listener.admin_addresses[0], trusted) as channel:
        await admin_pb2_grpc.AdminServiceStub(channel).Resume(admin_pb2.ResumeRequest(), timeout=20)


async def test_renewed_certificates_hold_from_the_next_connection_on(
    start_front: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "RENEWAL_SECONDS", 0.0)
    folders = {name: tmp_path / name for name in ("old", "new")}
    authorities, servers, clients = {}, {}, {}
    for name, folder in folders.items():
        folder.mkdir()
        authorities[name] = Authority(folder)
        servers[name] = authorities[name].issue("server", ips=["127.0.0.1"])
        clients[name] = authorities[name].issue("client")
    current = tmp_path / "current"  # as a Secret is mounted: one link, put in the place of another
    current.symlink_to(folders["old"])
    files = {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "authority.pem"}
    config = SecurityConfig(**{setting: current / name for setting, name in files.items()})
    front = await start_front(security=load_security(config), addresses=["127.0.0.1:0", "127.0.0.1:0"])

    async def reaches(name: str) -> bool:
        """Both addresses, and alike."""
        reached = set()
        for index in range(2):
            async with tls_channel(front, authorities[name], clients[name], index) as channel:
                try:
                    await call_over(channel)
                    reached.add(True)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    reached.add(False)
        (both,) = reached
        return both

    async with tls_channel(front, authorities["old"], clients["old"]) as open_before:
        await call_over(open_before)
        assert not await reaches("new")
        link = tmp_path / "link"
        link.symlink_to(folders["new"])
        link.rename(current)
        assert await reaches("new")
        assert not await reaches("old")
        await call_over(open_before)
    # A certificate that cannot work changes nothing.
    servers["new"].cert.write_text("half of a certif")
    assert await reaches("new")
    # Nor does a key that all may read, until its mode is put right.
    servers["old"].key.chmod(0o644)
    servers["old"].cert.rename(servers["new"].cert)
    servers["old"].key.rename(servers["new"].key)
    assert await reaches("new")
    servers["new"].key.chmod(0o600)
    assert not await reaches("new")


@pytest.mark.parametrize(
    ("names", "tenant"),
    [
        ({"uris": ["spiffe://cluster/ns/a/sa/chat"], "dns": ["chat.local"]}, "spiffe://cluster/ns/a/sa/chat"),
        ({"dns": ["chat.local"]}, "chat.local"),
        ({}, "chat"),
    ],
)
async def test_the_clients_certificate_names_the_tenant(
    start_front: Start, authority: Authority, server_cert: Issued, names: Any, tenant: str
) -> None:
    config = SecurityConfig(tls_cert=server_cert.cert, tls_key=server_cert.key, tls_client_ca=authority.cert)
    front = await start_front(security=load_security(config), addresses=["127.0.0.1:0"])
    async with tls_channel(front, authority, authority.issue("chat", **names)) as channel:
        await call_over(channel)
    assert tenants(front) == [tenant]


async def test_without_a_certificate_of_the_authority_nobody_gets_in(
    start_front: Start, tmp_path: Path, authority: Authority, server_cert: Issued
) -> None:
    config = SecurityConfig(tls_cert=server_cert.cert, tls_key=server_cert.key, tls_client_ca=authority.cert)
    front = await start_front(security=load_security(config), addresses=["127.0.0.1:0"])
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("chat")
    expired = authority.issue("late", valid_for=timedelta(days=-1))
    for client in (None, stranger, expired):
        async with tls_channel(front, authority, client) as channel:
            assert await code_over(channel) == grpc.StatusCode.UNAVAILABLE
    assert front.engine.commands == []


async def test_beside_a_certificate_the_token_decides(
    start_front: Start, authority: Authority, server_cert: Issued, tokens: SecurityConfig
) -> None:
    config = SecurityConfig(
        tls_cert=server_cert.cert,
        tls_key=server_cert.key,
        tls_client_ca=authority.cert,
        auth_tokens=tokens.auth_tokens,
    )
    front = await start_front(security=load_security(config), addresses=["127.0.0.1:0"])
    async with tls_channel(front, authority, authority.issue("chat")) as channel:
        assert await code_over(channel) == grpc.StatusCode.UNAUTHENTICATED
        await call_over(channel, metadata=bearer(BOB))
    assert tenants(front) == ["bob"]


async def test_a_socket_beside_mutual_tls_is_local(
    start_front: Start, tmp_path: Path, authority: Authority, server_cert: Issued
) -> None:
    config = SecurityConfig(tls_cert=server_cert.cert, tls_key=server_cert.key, tls_client_ca=authority.cert)
    addresses = [f"unix:{tmp_path}/socket", "127.0.0.1:0"]
    front = await start_front(security=load_security(config), addresses=addresses)
    await front.inference.GenerateUnary(unary())
    async with tls_channel(front, authority, authority.issue("chat")) as channel:
        await call_over(channel)
    assert tenants(front) == ["local", "chat"]


async def test_our_client_shows_its_certificate_and_its_token_with_every_call(
    start_front: Start, authority: Authority, server_cert: Issued, tokens: SecurityConfig
) -> None:
    config = SecurityConfig(
        tls_cert=server_cert.cert,
        tls_key=server_cert.key,
        tls_client_ca=authority.cert,
        auth_tokens=tokens.auth_tokens,
    )
    front = await start_front(security=load_security(config), addresses=["127.0.0.1:0"])
    own = authority.issue("chat")
    credentials = grpc.ssl_channel_credentials(
        authority.cert.read_bytes(), own.key.read_bytes(), own.cert.read_bytes()
    )
    address = front.server.addresses[0]
    async with AsyncClient(address, credentials=credentials, token=BOB) as client:
        await client.generate_unary("the tide", max_tokens=2)
        assert await client.generate("the tide", max_tokens=2).text()
        async with client.session() as session:
            assert await (await session.start("the tide", max_tokens=2)).text()
        await client.tokenize("the tide")
        await client.count_tokens("the tide")
        await client.detokenize([97])
        await client.server_info()
        await client.model_info()
        await client.abort("unknown")
        async for _ in client.watch_load():
            break
    assert tenants(front) == ["bob"] * 3
    for token in (None, "unknown-0123456789"):
        async with AsyncClient(address, credentials=credentials, token=token) as client:
            with pytest.raises(AccessDenied):
                await client.generate_unary("the tide", max_tokens=2)


# --- the port for probes ----------------------------------------------------------------------------------


async def test_the_health_port_answers_probes_without_credentials_and_nothing_else(
    start_front: Start, tokens: SecurityConfig
) -> None:
    front = await start_front(security=load_security(tokens), health_addresses=["127.0.0.1:0"])
    async with grpc.aio.insecure_channel(front.server.listener.health_addresses[0]) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def state(service: str) -> int:
            status: int = (await health.Check(health_pb2.HealthCheckRequest(service=service))).status
            return status

        assert await state("") == await state("liveness") == SERVING
        for call in (
            inference_pb2_grpc.InferenceServiceStub(channel).GenerateUnary(unary(), metadata=bearer(ALICE)),
            control_pb2_grpc.ControlServiceStub(channel).GetServerInfo(control_pb2.GetServerInfoRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED

        # While it drains: not ready for requests, and alive.
        front.engine.admits = False
        call = front.inference.GenerateUnary(unary(), metadata=bearer(ALICE))
        await until(lambda: front.engine.waiting)
        draining = asyncio.create_task(front.server.drain(30))
        watch = health.Watch(health_pb2.HealthCheckRequest())
        while (await watch.read()).status != NOT_SERVING:
            pass
        assert await state("liveness") == SERVING
        front.engine.admits = True
        front.engine.go_on()
        await call
        await draining


# --- what cannot start ------------------------------------------------------------------------------------


def test_an_address_for_strangers_needs_both_encryption_and_authentication(
    tokens: SecurityConfig, authority: Authority, server_cert: Issued
) -> None:
    files = {"tls_cert": server_cert.cert, "tls_key": server_cert.key}

    def config(**fields: Any) -> ServerConfig:
        return ServerConfig(
            engine=EngineConfig(model="demo"), addresses=("0.0.0.0:1",), security=SecurityConfig(**fields)
        )

    for fields in ({}, files, {"auth_tokens": tokens.auth_tokens}, {"jwt_keys": server_cert.cert}):
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            config(**fields)
    assert config(**files, auth_tokens=tokens.auth_tokens)
    assert config(**files, jwt_keys=server_cert.cert)
    assert config(**files, tls_client_ca=authority.cert)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"tls_cert": Path("a")}, "tls_cert needs tls_key"),
        ({"tls_key": Path("a")}, "tls_key needs tls_cert"),
        ({"tls_client_ca": Path("a")}, "tls_client_ca needs tls_cert and tls_key"),
        ({"jwt_issuer": "a"}, "jwt_issuer needs jwt_keys"),
        ({"jwt_audience": "a"}, "jwt_audience needs jwt_keys"),
    ],
)
def test_half_a_configuration_is_refused(fields: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SecurityConfig(**fields)


def broken_tls(folder: Path) -> Iterator[tuple[dict[str, Path], str]]:
    """Configurations that must not start, and words of the reason."""
    authority = Authority(folder)
    good, other = authority.issue("good"), authority.issue("other")
    expired = authority.issue("expired", valid_for=timedelta(days=-1))
    nothing, garbage = folder / "missing.pem", secret_file(folder / "garbage.pem", "no PEM at all")
    binary = folder / "binary.pem"
    binary.write_bytes(b"\xff\xfe\x00")
    public = authority.issue("public")
    public.key.chmod(0o604)
    yield {"tls_cert": nothing, "tls_key": good.key}, "No such file"
    yield {"tls_cert": good.cert, "tls_key": nothing}, "No such file"
    yield {"tls_cert": garbage, "tls_key": good.key}, "no certificate in PEM"
    yield {"tls_cert": binary, "tls_key": good.key}, "not text"
    yield {"tls_cert": good.cert, "tls_key": garbage}, "no private key"
    yield {"tls_cert": good.cert, "tls_key": other.key}, "is not the key of"
    yield {"tls_cert": good.key, "tls_key": good.key}, "no certificate in PEM"
    yield {"tls_cert": expired.cert, "tls_key": expired.key}, "has expired"
    yield {"tls_cert": public.cert, "tls_key": public.key}, "every user of this machine"
    pair = {"tls_cert": good.cert, "tls_key": good.key}
    yield {**pair, "tls_client_ca": nothing}, "No such file"
    yield {**pair, "tls_client_ca": garbage}, "no certificate in PEM"


def test_tls_files_that_cannot_work_are_refused_with_their_name(tmp_path: Path) -> None:
    number = 0
    for fields, complaint in broken_tls(tmp_path):
        with pytest.raises(ConfigError, match=complaint) as caught:
            load_security(SecurityConfig(**fields))
        assert str(caught.value).startswith("tls_")
        number += 1
    assert number == 11


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no token"),
        ("# nothing\n", "holds no token"),
        (ALICE, "line 1: must be TOKEN TENANT"),
        (f"{ALICE} alice user more", "line 1: must be TOKEN TENANT"),
        (f"{ALICE} alice\nshort bob", "line 2: the token needs at least 16"),
        (f"{ALICE} alice owner", "line 1: the role must be one of user, router, admin"),
        (f"{ALICE} {'a' * 257}", "line 1: the tenant may have at most 256"),
        (f"{ALICE} alice\n{ALICE} bob", "line 2: the token stands there twice"),
    ],
)
def test_a_file_of_tokens_that_cannot_work_is_refused_without_a_token(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = secret_file(tmp_path / "tokens", text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_security(SecurityConfig(auth_tokens=path))
    assert ALICE not in str(caught.value)


def test_a_file_of_tokens_that_everybody_reads_is_refused(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "tokens", TOKENS)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"auth_tokens .*chmod o-rwx"):
        load_security(SecurityConfig(auth_tokens=path))
    path.chmod(0o640)
    assert load_security(SecurityConfig(auth_tokens=path))


def test_keys_that_cannot_verify_tokens_are_refused(
    tmp_path: Path, signer: ec.EllipticCurvePrivateKey
) -> None:
    private = signer.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    shared = json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlYw"}]})
    for text, complaint in (
        ("nothing", "neither a public key"),
        (private, "a private key"),
        ("{}", "no JWK set"),
        ('{"keys": []}', "no JWK set"),
        ('{"keys": [{"kty": "what"}]}', "no JWK set"),
        (shared, "every user of this machine"),
    ):
        path = tmp_path / "keys"
        path.write_text(text)
        os.chmod(path, 0o644)
        with pytest.raises(ConfigError, match=complaint):
            load_security(SecurityConfig(jwt_keys=path))
