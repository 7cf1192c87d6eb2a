"""Two clients that a test drives alike: grpcio in this process, and grpc-js in a Node process of its own."""

import asyncio
import base64
import hashlib
import itertools
import json
import queue
import shutil
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google.rpc
import grpc.aio
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "clients" / "node"
PROTOS = [str(ROOT / "protos"), str(Path(next(iter(google.rpc.__path__))).parents[1])]
SECONDS = 30.0
"""No answer takes longer, unless something hangs."""
CODES = {code.value[0]: code for code in grpc.StatusCode}

_POOL = descriptor_pool.Default()
assert error_details_pb2.DESCRIPTOR.name, "the pool must know the details' types"


@dataclass
class Outcome:
    """How a call ended, with the details of its status taken apart."""

    code: grpc.StatusCode
    message: str
    trailers: dict[str, str]
    details: dict[str, dict[str, Any]]
    """By the last part of their type's name, in the JSON form with the protos' own names."""
    had_headers: bool
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reason(self) -> str:
        info = self.details["ErrorInfo"]
        assert info["domain"] == "tidegate"
        reason: str = info["reason"]
        return reason

    @property
    def violations(self) -> list[str]:
        """The fields that are wrong."""
        return [one["field"] for one in self.details["BadRequest"]["field_violations"]]

    @property
    def retry_ms(self) -> int | None:
        """Of ``RetryInfo``; the trailer that gRPC's own retries obey must say the same."""
        delay = self.details.get("RetryInfo", {}).get("retry_delay")
        value = None if delay is None else _milliseconds(delay)
        assert self.trailers["grpc-retry-pushback-ms"] == str(-1 if value is None else value)
        return value


class Call(ABC):
    """One RPC of any kind."""

    @abstractmethod
    async def outcome(self) -> Outcome:
        """Read to the end, whatever it is."""

    @abstractmethod
    async def next(self) -> dict[str, Any]:
        """The next message."""

    async def until(self, kind: str) -> dict[str, Any]:
        """The next message that holds a member of this name, in its JSON form."""
        while kind not in (message := await self.next()):
            pass
        member: dict[str, Any] = message[kind]
        return member

    @abstractmethod
    async def write(self, **fields: Any) -> None: ...

    @abstractmethod
    async def write_bytes(self, message: bytes) -> None: ...

    @abstractmethod
    async def end(self) -> None:
        """Write no more."""

    @abstractmethod
    async def cancel(self) -> None: ...


class WireClient(ABC):
    @abstractmethod
    async def call(
        self,
        method: str,
        message: Mapping[str, Any] | bytes | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
        service_config: Mapping[str, Any] | None = None,
        is_paused: bool = False,
    ) -> Call:
        """``method`` such as ``InferenceService/Generate``; ``message`` its one request, or raw bytes.

        ``is_paused``: take no message before the first ``next`` or ``outcome``.
        """

    @abstractmethod
    async def close(self) -> None: ...


# --- grpcio -----------------------------------------------------------------------------------------------


class GrpcioClient(WireClient):
    def __init__(self, address: str) -> None:
        self._address = address
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def call(
        self,
        method: str,
        message: Mapping[str, Any] | bytes | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
        service_config: Mapping[str, Any] | None = None,
        is_paused: bool = False,
    ) -> Call:
        path = f"tidegate.v1.{method}"
        rpc = _POOL.FindMethodByName(path.replace("/", "."))
        request_class, response_class = GetMessageClass(rpc.input_type), GetMessageClass(rpc.output_type)
        key = json.dumps(service_config)
        if key not in self._channels:
            options = [
                ("grpc.use_local_subchannel_pool", 1),
                # So that what is not read soon holds the server up, as it does on a long way.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", 65_536),
            ]
            if service_config is not None:
                options.append(("grpc.service_config", key))
            self._channels[key] = grpc.aio.insecure_channel(self._address, options=options)
        call = self._channels[key].stream_stream(
            f"/{path}", request_serializer=bytes, response_deserializer=response_class.FromString
        )(metadata=tuple((metadata or {}).items()), timeout=timeout)
        made = _GrpcioCall(call, request_class)
        if message is not None:
            await made.write_bytes(
                message if isinstance(message, bytes) else request_class(**message).SerializeToString()
            )
            await made.end()
        return made

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


class _GrpcioCall(Call):
    def __init__(self, call: Any, request_class: Any) -> None:
        self._call = call
        self._request_class = request_class

    async def outcome(self) -> Outcome:
        messages = []
        try:
            while (message := await asyncio.wait_for(self._call.read(), SECONDS)) != grpc.aio.EOF:
                messages.append(_as_json(message))
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
        trailers = dict(iter(await self._call.trailing_metadata() or ()))
        status = status_pb2.Status.FromString(trailers.pop("grpc-status-details-bin", b""))
        details = {}
        for packed in status.details:
            kind = packed.TypeName()
            detail = GetMessageClass(_POOL.FindMessageTypeByName(kind)).FromString(packed.value)
            assert kind.rpartition(".")[2] not in details
            details[kind.rpartition(".")[2]] = _as_json(detail)
        return Outcome(
            await self._call.code(),
            await self._call.details() or "",
            trailers,
            details,
            bool(await self._call.initial_metadata()),
            messages,
        )

    async def next(self) -> dict[str, Any]:
        message = await asyncio.wait_for(self._call.read(), SECONDS)
        assert message != grpc.aio.EOF, "the stream ended"
        return _as_json(message)

    async def write(self, **fields: Any) -> None:
        await self.write_bytes(self._request_class(**fields).SerializeToString())

    async def write_bytes(self, message: bytes) -> None:
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # refused already; the outcome tells

    async def end(self) -> None:
        try:
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return

    async def cancel(self) -> None:
        self._call.cancel()


def _as_json(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


# --- grpc-js ----------------------------------------------------------------------------------------------


def build_node_client() -> Path:
    """The folder of the compiled client, installed and built where it is not yet. Needs npm."""
    protos = sorted((ROOT / "protos" / "tidegate" / "v1").glob("*.proto"))
    sources = [path for path in sorted(SOURCES.iterdir()) if path.is_file()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, *protos))).hexdigest()[:16]
    lock = hashlib.sha256((SOURCES / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = ROOT / ".cache" / f"node-{lock}"
    built = folder / f"built-{digest}"
    if built.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copy(source, folder)
    if not (folder / "node_modules").exists():
        _run(folder, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    shutil.rmtree(folder / "generated", ignore_errors=True)
    files = ["tidegate/v1/inference.proto", "tidegate/v1/control.proto"]
    _run(folder, "npm", "run", "types", "--", "-I", *PROTOS, "--", *files)
    _run(folder, "npm", "run", "build")
    built.touch()
    return folder


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"


class NodeDriver:
    """The Node process: commands in, reports out, each to the call that it is about."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            ["node", folder / "build" / "driver.js", *PROTOS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.reports: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self.ids = itertools.count()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            report = json.loads(line)
            self.reports[report["id"]].put(report)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class NodeClient(WireClient):
    def __init__(self, driver: NodeDriver, address: str) -> None:
        self.driver = driver
        self._address = address

    async def call(
        self,
        method: str,
        message: Mapping[str, Any] | bytes | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
        service_config: Mapping[str, Any] | None = None,
        is_paused: bool = False,
    ) -> Call:
        made = _NodeCall(self.driver, is_paused)
        self.driver.send(
            id=made.id,
            op="call",
            address=self._address,
            method=f"tidegate.v1.{method}",
            message=base64.b64encode(message).decode() if isinstance(message, bytes) else message,
            metadata=dict(metadata or {}),
            paused=is_paused,
            **({} if timeout is None else {"deadlineMs": round(timeout * 1000)}),
            **({} if service_config is None else {"serviceConfig": json.dumps(service_config)}),
        )
        return made

    async def close(self) -> None:
        self.driver.send(id=-1, op="close")


class _NodeCall(Call):
    def __init__(self, driver: NodeDriver, is_paused: bool) -> None:
        self.id = next(driver.ids)
        self._driver = driver
        self._is_paused = is_paused
        self._had_headers = False
        driver.reports[self.id] = queue.SimpleQueue()

    async def outcome(self) -> Outcome:
        messages = []
        while (report := await self._report())["event"] != "status":
            messages.append(report["message"])
        details = {}
        for detail in report["details"]:
            kind = detail["type"].rpartition(".")[2]
            assert kind not in details
            details[kind] = detail["value"]
        return Outcome(
            CODES[report["code"]],
            report["message"],
            report["trailers"],
            details,
            self._had_headers,
            messages,
        )

    async def next(self) -> dict[str, Any]:
        report = await self._report()
        assert report["event"] == "message", report
        message: dict[str, Any] = report["message"]
        return message

    async def _report(self) -> dict[str, Any]:
        if self._is_paused:
            self._is_paused = False
            self._driver.send(id=self.id, op="read")
        while True:
            report = await asyncio.to_thread(self._driver.reports[self.id].get, timeout=SECONDS)
            if report["event"] != "headers":
                return report
            self._had_headers = True

    async def write(self, **fields: Any) -> None:
        self._driver.send(id=self.id, op="write", message=fields)

    async def write_bytes(self, message: bytes) -> None:
        self._driver.send(id=self.id, op="write", message=base64.b64encode(message).decode())

    async def end(self) -> None:
        self._driver.send(id=self.id, op="end")

    async def cancel(self) -> None:
        self._driver.send(id=self.id, op="cancel")


def _milliseconds(duration: str | Mapping[str, Any]) -> int:
    """Of a duration in JSON, or as protobufjs gives it."""
    if isinstance(duration, str):
        return round(float(duration.removesuffix("s")) * 1000)
    return int(duration.get("seconds", 0)) * 1000 + duration.get("nanos", 0) // 1_000_000
