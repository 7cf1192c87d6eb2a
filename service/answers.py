"""Questions to the engine that it answers once, in the output of a step to come."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar, cast

from tidegate.engine.messages import Flushed, Inspection, Profiled, StepOutput
from tidegate.service.errors import Failure

Answer = Inspection | Flushed | Profiled
A = TypeVar("A", Inspection, Flushed, Profiled)


class Answers:
    """One question of a kind at a time: a step's output holds one answer of each."""

    def __init__(self) -> None:
        self._turns: defaultdict[type[Answer], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._awaited: dict[type[Answer], asyncio.Future[Answer]] = {}

    async def get(self, kind: type[A], ask: Callable[[], None]) -> A:
        """Ask when it is our turn, and wait. Raises ``Failure`` where no answer will come."""
        # Whoever asks may leave; the answer to his question must not be taken for the next one's.
        return cast(A, await asyncio.shield(asyncio.create_task(self._get(kind, ask))))

    async def _get(self, kind: type[Answer], ask: Callable[[], None]) -> Answer:
        async with self._turns[kind]:
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            self._awaited[kind] = future
            try:
                ask()
                return await future
            finally:
                del self._awaited[kind]

    def take(self, output: StepOutput) -> None:
        for answer in (output.inspection, output.flushed, output.profiled):
            if answer is not None and (future := self._awaited.get(type(answer))) and not future.done():
                future.set_result(answer)

    def fail(self, failure: Failure) -> None:
        """The engine that was asked is gone."""
        for future in self._awaited.values():
            if not future.done():
                future.set_exception(failure)
