"""An engine in this process under a stopwatch: when the tokens of each request came, and what it took."""

import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

from tidegate.engine import build
from tidegate.engine.config import EngineConfig
from tidegate.engine.limits import Limits
from tidegate.engine.messages import Command, Finished, Stats, StepOutput, Submit
from tidegate.engine.request import FinishReason, Parent, Request, SamplingParams

WARM_UP_TOKENS = 8


@dataclass
class Timed:
    """Seconds on one clock; token ids of the one choice."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def cached_tokens(self) -> int:
        if self.finished is None:
            raise RuntimeError("the request has not ended")
        return self.finished.usage.cached_tokens


class Stopwatch:
    """``options`` are fields of ``EngineConfig``; ``write_ahead`` as in ``Limits``."""

    def __init__(self, write_ahead: float | None = None, **options: Any) -> None:
        ahead = {} if write_ahead is None else {"write_ahead": write_ahead}
        with patch.object(build, "Limits", lambda **limits: Limits(**{**limits, **ahead})):
            self.core = build.build_engine(EngineConfig(**options))
        self.scheduling = 0.0
        """Seconds spent in planning steps and in taking in their results."""
        scheduler = self.core.scheduler
        self._time(scheduler, "plan")
        self._time(scheduler, "apply")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.core.close()

    def _time(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.scheduling += time.perf_counter() - began

        setattr(owner, name, timed)

    def warm_up(self) -> None:
        """The first steps pay for things that a long run does not."""
        rng = random.Random(0)
        self.run([request(f"warm up {i}", prompt(rng, 64), WARM_UP_TOKENS) for i in range(2)])
        self.idle()

    def say(self, command: Command) -> None:
        self.core.handle(command)

    def run(self, requests: Sequence[Request]) -> list[Timed]:
        """All at once, each to its end."""
        timed = {one.id: Timed(time.perf_counter()) for one in requests}
        for one in requests:
            self.say(Submit(one))
        while any(one.finished is None for one in timed.values()):
            self._take(self.core.step(), timed)
        return list(timed.values())

    def idle(self) -> None:
        """Let what is under way come to its end."""
        while self.core.has_work():
            self.core.step()

    def stats(self) -> Stats:
        return self.core.stats()

    @staticmethod
    def _take(out: StepOutput, timed: dict[str, Timed]) -> None:
        now = time.perf_counter()
        if out.refused:
            raise RuntimeError(f"refused: {out.refused}")
        for delta in out.deltas:
            timed[delta.request_id].arrivals += [now] * len(delta.token_ids)
            timed[delta.request_id].tokens += delta.token_ids
        for finished in out.finished:
            if finished.reason is FinishReason.ERROR:
                raise RuntimeError(f"{finished.request_id} failed: {finished.error}")
            timed[finished.request_id].finished = finished


def prompt(rng: random.Random, length: int) -> list[int]:
    """Token ids that every model's vocabulary has."""
    return [rng.randrange(3, 500) for _ in range(length)]


def request(
    name: str, tokens: list[int], output: int, parent: str | None = None, *, leased: bool = False
) -> Request:
    """Greedy, to its full length."""
    return Request(
        id=name,
        prompt_token_ids=tokens,
        params=SamplingParams(temperature=0, ignore_eos=True, max_tokens=output),
        seed=0,
        parent=None if parent is None else Parent(parent),
        is_leased=leased,
    )


def median_interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """The median, and the 95% bootstrap interval around it."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return statistics.median(values), medians[int(draws * 0.025)], medians[int(draws * 0.975) - 1]


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
