"""The one interface through which a front reaches an engine, wherever the engine runs."""

import asyncio
import queue
import threading
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from tidegate.engine.loop import Core, run
from tidegate.engine.messages import Command, EngineInfo, Place, StepOutput

T = TypeVar("T")


class EngineGone(ConnectionError):
    """The engine ended. ``exit_code`` is its process's status, negative for a signal."""

    def __init__(self, message: str, exit_code: int | None = None, executing: Sequence[Place] = ()) -> None:
        """``executing``: what the steps under way computed."""
        super().__init__(message)
        self.exit_code = exit_code
        self.executing = list(executing)


class EngineClient(Protocol):
    """A running engine. Calls are made from one asyncio loop."""

    info: EngineInfo

    def send(self, commands: Iterable[Command]) -> None:
        """Queue commands for the engine's next step; never blocks. Raises ``EngineGone``."""

    async def receive(self) -> StepOutput:
        """The next step's output, in order. Raises ``EngineGone`` once the engine has ended."""

    async def close(self) -> None:
        """Stop the engine and wait for its end; safe to call twice."""


class InProcessClient:
    """An engine that steps in a thread of this process. Takes the core over, and closes it.

    Must be made inside the asyncio loop from which it is called.
    """

    def __init__(self, core: Core) -> None:
        self.info = core.info
        self._loop = asyncio.get_running_loop()
        self._commands = _CommandQueue()
        self._outputs: EndingQueue[StepOutput] = EndingQueue()
        self._thread = threading.Thread(target=self._run, args=(core,), name="engine", daemon=True)
        self._thread.start()

    def send(self, commands: Iterable[Command]) -> None:
        self._outputs.check()
        self._commands.put(list(commands))

    async def receive(self) -> StepOutput:
        return await self._outputs.get()

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self, core: Core) -> None:
        gone = EngineGone("the engine was closed")
        try:
            run(core, self._commands, self._say)
        except Exception as error:  # noqa: BLE001  whatever it was, the front outlives it and is told
            gone = EngineGone(f"the engine failed: {error!r}", executing=core.recorder.executing())
            gone.__cause__ = error
        finally:
            core.close()
            self._loop.call_soon_threadsafe(self._outputs.end, gone)

    def _say(self, output: StepOutput) -> None:
        self._loop.call_soon_threadsafe(self._outputs.put, output)


class EndingQueue(Generic[T]):
    """What an engine says, in order, and behind it, for every reader, the news of its end."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[T | EngineGone] = asyncio.Queue()
        self._gone: EngineGone | None = None

    def put(self, item: T) -> None:
        self._queue.put_nowait(item)

    def end(self, gone: EngineGone) -> None:
        self._gone = gone
        self._queue.put_nowait(gone)

    def check(self) -> None:
        """Raise the end, once there is one."""
        if self._gone is not None:
            raise self._gone

    async def get(self) -> T:
        item = await self._queue.get()
        if isinstance(item, EngineGone):
            self._queue.put_nowait(item)  # for the next reader
            raise item
        return item


class _CommandQueue:
    """Commands between two threads."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[list[Command] | None] = queue.SimpleQueue()

    def put(self, commands: list[Command] | None) -> None:
        """None ends the engine."""
        self._queue.put(commands)

    def take(self, timeout: float) -> list[Command] | None:
        taken: list[Command] = []
        try:
            batch = self._queue.get(block=timeout != 0, timeout=timeout)
            while batch is not None:
                taken += batch
                batch = self._queue.get_nowait()
        except queue.Empty:
            return taken
        return None
