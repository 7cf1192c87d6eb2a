"""The engine as a process of its own, which owns the device and may die without its front.

Both ends of the wire are here. A ZeroMQ PAIR over a Unix socket carries MessagePack: to the engine
lists of commands, to the front first ``Ready`` or ``StartFailed``, then one ``StepOutput`` a step.

Beside the wire, the two share the memory of a ``FlightRecorder``: the engine's heartbeat, and what it
computed when it died.

The child is ``python -P -m tidegate.engine.process``, not a ``multiprocessing`` spawn: that one runs
the front's main module once more in the child, with all that it imports, and hands arguments over by
pickle. ``-P`` keeps the working directory off ``sys.path``.
"""

import asyncio
import ctypes
import importlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable

import msgspec
import zmq

from tidegate.engine.client import EndingQueue, EngineGone
from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.flight import FlightRecorder, new_memory
from tidegate.engine.logging import LogFormat, configure_logging, process_age
from tidegate.engine.loop import Core, run
from tidegate.engine.messages import Command, EngineInfo, StepOutput

ENGINE_FACTORY = "tidegate.engine.build:build_engine"
CLOSE_SECONDS = 10.0
"""How long the child may take for an orderly end before it is killed."""
LOOKS = 10
"""At the heartbeat, within the time in which there must be one."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Start(msgspec.Struct):
    """The child's last argument, as JSON."""

    config: EngineConfig
    factory: str
    """``module:function``, called with ``config, progress``; gives the ``Core``."""
    progress: bool
    """Whether to draw progress bars on stderr."""
    log_format: LogFormat


class Ready(msgspec.Struct, tag="ready"):
    """The engine takes commands now."""

    info: EngineInfo


class StartFailed(msgspec.Struct, tag="start_failed"):
    """The configuration cannot work; the message is that of the ``ConfigError``."""

    message: str


_encode = msgspec.msgpack.Encoder().encode
_decode_started = msgspec.msgpack.Decoder(Ready | StartFailed).decode
_decode_commands = msgspec.msgpack.Decoder(list[Command]).decode
_decode_output = msgspec.msgpack.Decoder(StepOutput).decode


class ProcessClient:
    """An engine in a child process; the front's end of the wire.

    The child's end is noticed at once, through its pidfd. What it said last may be lost with it. A child
    that makes no progress, frozen or stuck, is killed.
    """

    info: EngineInfo

    def __init__(self, start: Start, hang_timeout: float) -> None:
        """Private: use ``start``."""
        self._loop = asyncio.get_running_loop()
        self._hang_timeout = hang_timeout
        self._hangs = False
        self._watching: asyncio.TimerHandle | None = None
        self._outgoing: list[Command] = []
        self._frames: EndingQueue[bytes] = EndingQueue()
        self._exited = asyncio.Event()
        self._context = zmq.Context()
        # mkdtemp gives the folder to this user alone (0700).
        self._folder = tempfile.mkdtemp(prefix="tidegate-")
        address = f"ipc://{self._folder}/engine"
        self._socket = _open_socket(self._context)
        self._socket.bind(address)
        memory = new_memory()
        self._recorder = FlightRecorder(memory)
        numbers = (str(os.getpid()), str(memory))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, address, *numbers, msgspec.json.encode(start)],
            stdin=subprocess.DEVNULL,
            pass_fds=(memory,),
            # Threads that wait for one another spin briefly, then sleep: the front and the application
            # beside it share these cores, and a spinning thread holds up the one that it waits for.
            env={"GOMP_SPINCOUNT": "20000", **os.environ},
            # Signals to the front's group, from a terminal or a supervisor, are the front's to answer.
            process_group=0,
        )
        os.close(memory)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._loop.add_reader(self._socket.FD, self._read)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        progress: bool = False,
        log_format: LogFormat = "console",
        hang_timeout: float = 60.0,
        factory: str = ENGINE_FACTORY,
    ) -> "ProcessClient":
        """Spawn the engine and wait until it is ready. Only from the main thread.

        ``hang_timeout``: seconds without progress, of an engine that was ready, after which it is killed;
        more than its longest step takes.

        Raises ``ConfigError`` where the configuration cannot work, ``EngineGone`` where the process
        ends before it is ready.
        """
        if threading.current_thread() is not threading.main_thread():
            # The parent-death signal would fire at the end of the thread that spawned the child.
            raise RuntimeError("an engine process must be started from the main thread")
        client = cls(Start(config, factory, progress, log_format), hang_timeout)
        try:
            started = _decode_started(await client._frames.get())
            if isinstance(started, StartFailed):
                raise ConfigError(started.message)
        except BaseException:
            await client.close()
            raise
        client.info = started.info
        # Both ends are connected: with the path gone, nothing is left behind if this process is killed.
        shutil.rmtree(client._folder)
        client._watch(client._recorder.beats, 0)
        return client

    def send(self, commands: Iterable[Command]) -> None:
        self._frames.check()
        if not self._outgoing:
            # One message for all that is sent in this turn of the loop.
            self._loop.call_soon(self._flush)
        self._outgoing += commands

    async def receive(self) -> StepOutput:
        return _decode_output(await self._frames.get())

    async def close(self) -> None:
        if not self._exited.is_set():
            self._process.terminate()
            try:
                await asyncio.wait_for(self._exited.wait(), CLOSE_SECONDS)
            except TimeoutError:
                self._process.kill()
                await self._exited.wait()
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.FD)
            self._context.destroy(linger=0)
            self._recorder.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _flush(self) -> None:
        commands, self._outgoing = self._outgoing, []
        if commands and not self._exited.is_set():
            try:
                self._socket.send(_encode(commands), zmq.NOBLOCK)
            except zmq.Again:
                # Nobody is at the other end any more: the news of that is on its way to the readers.
                return
            # Sending may take the notice of an arrival off the socket's descriptor.
            self._read()

    def _read(self) -> None:
        """Take every frame there is: the descriptor tells of the first one only."""
        try:
            while True:
                self._frames.put(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return

    def _watch(self, beats: int, looks: int) -> None:
        """``looks`` at the heartbeat found it at ``beats``.

        Looks are counted, not seconds: of those in which this process itself was frozen, with the engine
        or without it, nothing is known.
        """
        now = self._recorder.beats
        if now != beats:
            looks = 0
        elif looks >= LOOKS:
            self._hangs = True
            self._process.kill()
            return
        self._watching = self._loop.call_later(self._hang_timeout / LOOKS, self._watch, now, looks + 1)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._watching is not None:
            self._watching.cancel()
        code = self._process.wait()
        self._read()
        reason = f"the engine process ended with {_describe_exit(code)}"
        if self._hangs:
            reason = f"the engine process made no progress for {self._hang_timeout:g} s and was killed"
        self._frames.end(EngineGone(reason, code, self._recorder.executing()))
        self._exited.set()


def main() -> None:
    """The child: build the engine, say so, then step until SIGTERM."""
    address, parent_pid, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = msgspec.json.decode(sys.argv[4], type=Start)
    configure_logging(start.log_format)
    with zmq.Context() as context, _open_socket(context) as front:
        front.connect(address)
        try:
            build = _load_factory(start.factory)
            imports = process_age()
            core = build(start.config, start.progress)
            core.recorder = FlightRecorder(memory)
        except ConfigError as error:
            front.send(_encode(StartFailed(str(error))))
            signal.pause()  # the front ends us once it has read why
            raise
        commands = _CommandSocket(front)
        load_seconds = {"imports": imports, **core.info.load_seconds}
        front.send(_encode(Ready(msgspec.structs.replace(core.info, load_seconds=load_seconds))))
        try:
            run(core, commands, lambda output: front.send(_encode(output)))
        except BaseException:  # noqa: BLE001  nothing is swallowed: it ends the process
            # Threads of a broken engine might never let the interpreter end.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        core.close()


class _CommandSocket:
    """The child's end of the wire, ended by SIGTERM."""

    def __init__(self, front: "zmq.Socket[bytes]") -> None:
        self._front = front
        # A signal handler alone does not end a poll: it is restarted. The byte that Python writes to
        # the wakeup descriptor does.
        self._wakeup, write_end = socket.socketpair()
        self._wakeup.setblocking(False)
        write_end.setblocking(False)
        self._write_end = write_end
        signal.set_wakeup_fd(write_end.fileno())
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._poller = zmq.Poller()
        self._poller.register(front, zmq.POLLIN)
        self._poller.register(self._wakeup, zmq.POLLIN)

    def take(self, timeout: float) -> list[Command] | None:
        ready = dict(self._poller.poll(math.ceil(timeout * 1000)))
        if self._wakeup.fileno() in ready:
            return None
        taken: list[Command] = []
        try:
            while self._front in ready:
                taken += _decode_commands(self._front.recv(zmq.NOBLOCK))
        except zmq.Again:
            pass
        return taken


def _open_socket(context: "zmq.Context[zmq.Socket[bytes]]") -> "zmq.Socket[bytes]":
    """No message is ever dropped or refused for their number: credit bounds what is under way."""
    pair = context.socket(zmq.PAIR)
    pair.set_hwm(0)
    pair.linger = 1000
    return pair


def die_with_parent(parent_pid: int) -> None:
    """From here on, this process is killed when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit("the parent ended before its child started")


def _load_factory(dotted: str) -> Callable[[EngineConfig, bool], Core]:
    module, _, name = dotted.partition(":")
    factory: Callable[[EngineConfig, bool], Core] = getattr(importlib.import_module(module), name)
    return factory


def _describe_exit(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


if __name__ == "__main__":
    main()
