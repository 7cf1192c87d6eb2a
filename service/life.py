"""The life of ``tidegate serve``: listen, load the model, serve it until a signal comes, drain, end."""

import asyncio
import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import structlog
import uvloop

from tidegate.engine.checkpoint import resolve
from tidegate.engine.client import EngineClient, EngineGone
from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.logging import configure_logging, process_age
from tidegate.engine.messages import EngineInfo
from tidegate.engine.process import ProcessClient
from tidegate.engine.text import Text
from tidegate.service.addresses import every_interface
from tidegate.service.compat.protocols import Compat
from tidegate.service.config import ServerConfig
from tidegate.service.errors import log_unexpected
from tidegate.service.gateway import Gateway, find_program
from tidegate.service.listener import Listener, open_listener
from tidegate.service.observe import Tracer
from tidegate.service.security import Security, load_security
from tidegate.service.server import start_server
from tidegate.service.supervisor import Supervisor

YOUNG_OBJECTS = 50_000
"""New objects at which the garbage collector starts to look for cycles."""

_log = structlog.get_logger(__name__)


def run(config: ServerConfig) -> int:
    """``serve`` on uvloop, from the main thread. Returns the exit status."""
    return uvloop.run(serve(config))


async def serve(config: ServerConfig) -> int:
    """Listen, load the model, serve it until a signal comes, drain. Returns the exit status.

    A start that cannot work, or an engine that ends, is one line in the log and status 1. A second
    signal ends the process at once.
    """
    configure_logging(config.log_format)
    try:
        # Before the model loads: a mistake here shows at once, and probes and early clients get an answer.
        security = load_security(config.security)
        tracer = None if config.otlp_endpoint is None else _load_tracer(config.otlp_endpoint)
        if config.openai_port is not None:
            find_program()
        listener = await _listen(config, security, tracer)
    except ConfigError as error:
        _log.error("cannot start", reason=str(error))
        return 1
    stopping = asyncio.create_task(_signal())
    loading = asyncio.create_task(_load(config))
    await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        await asyncio.wait({loading})
        await listener.close()
        return 0
    try:
        engine, text = await loading
    except (ConfigError, EngineGone) as error:
        await listener.close()
        _log.error("cannot start", reason=str(error))
        return 1
    try:
        return await _serve(config, listener, engine, text, stopping)
    finally:
        await engine.close()
        text.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


async def _listen(config: ServerConfig, security: Security, tracer: Tracer | None) -> Listener:
    """Raises ``ConfigError``."""
    # The gateway speaks to a port that nobody else needs to know.
    for_gateway = [] if config.openai_port is None else ["127.0.0.1:0"]
    return await open_listener(
        [*config.addresses, *for_gateway],
        security=security,
        health_addresses=[] if config.health_port is None else [every_interface(config.health_port)],
        admin_addresses=config.admin_addresses,
        metrics_address=None if config.metrics_port is None else every_interface(config.metrics_port),
        protocols=config.protocols,
        tracer=tracer,
        reflection_on=config.reflection,
    )


async def _serve(
    config: ServerConfig, listener: Listener, engine: Supervisor, text: Text, stopping: asyncio.Task[None]
) -> int:
    folder = await asyncio.to_thread(resolve, config.engine.model)
    server = await start_server(
        listener,
        engine,
        text,
        admission=config.admission_limits(),
        restart=engine.restart,
        compat=Compat(config.protocols, folder, config.engine.max_num_seqs),
    )
    spare_collector()
    _log.info(
        "ready",
        model=engine.info.model,
        addresses=listener.addresses[: len(config.addresses)],  # the gateway's is behind them
        health=listener.health_addresses,
        admin=listener.admin_addresses,
        metrics=listener.metrics_address,
        after_s=round(process_age(), 2),
    )
    ends: set[asyncio.Future[Any]] = {stopping, server.engine_ended, server.drain_asked}
    try:
        # Around the drain, too: the gateway's requests finish through it.
        async with _gateway(config, listener.addresses[-1], engine.info.model, ends):
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if server.engine_ended.done():
                await server.stop()
            else:
                asked = server.drain_asked.result() if server.drain_asked.done() else None
                grace = config.drain_grace if asked is None else asked
                _log.info("draining", grace=grace)
                await server.drain(grace)
    except ConfigError as error:
        _log.error("cannot start", reason=str(error))
        await server.stop()
        return 1
    status = _exit_status(server.engine_ended)
    if not server.is_closed:
        # gRPC would wait for that client for ever, and the interpreter for gRPC.
        await engine.close()
        os._exit(status)
    return status


@contextlib.asynccontextmanager
async def _gateway(
    config: ServerConfig, worker: str, model: str, ends: set[asyncio.Future[Any]]
) -> AsyncGenerator[None]:
    """The gateway of ``openai_port``, if one is wanted: once it is ready, or the server is to end.

    Raises ``ConfigError`` where it cannot start.
    """
    if config.openai_port is None:
        yield
        return
    gateway = Gateway(find_program(), worker, config.openai_address)
    starting = asyncio.create_task(gateway.start(model))
    try:
        await asyncio.wait({starting, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _log.info("openai endpoint ready", address=config.openai_address, after_s=round(process_age(), 2))
        yield
    finally:
        starting.cancel()
        await asyncio.wait({starting})
        await gateway.stop()


def _load_tracer(endpoint: str) -> Tracer:
    """Raises ``ConfigError`` where OpenTelemetry is not installed."""
    try:
        # By name: it is an extra, and takes half a second to import.
        tracing = importlib.import_module("tidegate.service.tracing")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"otlp_endpoint needs {error.name}, which is not installed: pip install 'tidegate[tracing]'"
        ) from error
    tracer: Tracer = tracing.over_otlp(endpoint)
    return tracer


def spare_collector() -> None:
    """Have the garbage collector look at less, and less often; all that a stream needs goes without it.

    What has been loaded stays: to look through all of that takes a tenth of a second, in which no stream
    would get anything. And every step makes some thousand little objects that are gone with the next one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


async def _load(config: ServerConfig) -> tuple[Supervisor, Text]:
    """The engine process and, meanwhile in a thread, the tokenizer.

    Raises ``ConfigError``, ``EngineGone``.
    """
    own_imports = process_age()
    # A hub name is downloaded here, once; the engine then finds it in the cache.
    folder = await asyncio.to_thread(resolve, config.engine.model)

    async def start(engine_config: EngineConfig, progress: bool = False) -> EngineClient:
        return await ProcessClient.start(
            engine_config,
            progress=progress,
            log_format=config.log_format,
            hang_timeout=config.hang_timeout,
        )

    engine, text = await asyncio.gather(
        start(config.engine, progress=sys.stderr.isatty()),
        asyncio.to_thread(Text.load, str(folder)),
        return_exceptions=True,
    )
    if isinstance(engine, BaseException):
        raise engine
    if isinstance(text, BaseException):
        await engine.close()
        raise text
    seconds = {"own_imports": own_imports, **engine.info.load_seconds, "total": process_age()}
    _log.info("loaded", **{f"{name}_s": round(value, 2) for name, value in seconds.items()})
    again = _same_again(config.engine, engine.info)
    return Supervisor(engine, lambda: start(again), config.max_restarts), text


def _same_again(config: EngineConfig, info: EngineInfo) -> EngineConfig:
    """For an engine of the same size as the first, with room for every request that had room there."""
    return msgspec.structs.replace(
        config,
        max_model_len=info.max_model_len,
        block_size=info.block_size,
        device_kv_tokens=info.tokens_in(info.device_blocks),
        host_kv_tokens=info.tokens_in(info.host_blocks),
    )


async def _signal() -> None:
    """Wait for SIGTERM or SIGINT; the next one then does what it does by default."""
    loop = asyncio.get_running_loop()
    received = asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, received.set)
    await received.wait()
    for number in numbers:
        loop.remove_signal_handler(number)


def _exit_status(engine_ended: asyncio.Task[None]) -> int:
    """Of a server that has stopped: by us, or with its engine."""
    try:
        engine_ended.result()
    except asyncio.CancelledError:
        _log.info("stopped")
        return 0
    except EngineGone as gone:
        _log.error("the engine has ended", reason=str(gone), exit_code=gone.exit_code)
    except Exception as error:  # noqa: BLE001  whatever it is, it ends the server
        log_unexpected("the engine's output could not be read", error)
    return 1
