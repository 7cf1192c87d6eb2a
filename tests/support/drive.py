"""Drives an engine in this process to the end of some requests, looking at everything after each step."""

from collections import Counter
from collections.abc import Callable, Sequence

from tidegate.engine.config import EngineConfig
from tidegate.engine.core import EngineCore
from tidegate.engine.messages import Finished, PositionLogprobs, StepOutput, Submit
from tidegate.engine.request import Request, SamplingParams

Hook = Callable[[EngineCore, int], None]
"""Called before each step with the number of steps so far."""


class Outcome:
    """What an engine said, by (request id, choice)."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.prompt_logprobs: dict[str, list[PositionLogprobs]] = {}
        """By request, of its prompt's tokens from the second on."""
        self.finished: dict[tuple[str, int], Finished] = {}

    def take(self, out: StepOutput) -> None:
        assert not out.refused, out.refused
        for scored in out.prompt_logprobs:
            known = self.prompt_logprobs.setdefault(scored.request_id, [])
            assert scored.offset == 1 + len(known), "logprobs of a prompt left out, or told twice"
            assert not any(name == scored.request_id for name, _ in self.tokens), "told behind the output"
            known.extend(scored.positions)
        for delta in out.deltas:
            tokens = self.tokens.setdefault((delta.request_id, delta.choice), [])
            assert delta.offset == len(tokens), "a gap, or tokens twice"
            tokens.extend(delta.token_ids)
        for finished in out.finished:
            key = (finished.request_id, finished.choice)
            assert key not in self.finished, "ended twice"
            self.finished[key] = finished


def drive(core: EngineCore, requests: Sequence[Request], hook: Hook | None = None) -> Outcome:
    """Submit all requests at once and step until each choice has ended; integrity is checked each step.

    Then nothing is held any more, unless one of them is leased.
    """
    outcome = Outcome()
    expected = sum(request.params.n for request in requests)
    for request in requests:
        core.handle(Submit(request))
    steps = 0
    while len(outcome.finished) < expected:
        if hook is not None:
            hook(core, steps)
        outcome.take(core.step())
        core.check_integrity()
        steps += 1
        assert steps < 100_000, "the requests never end"
    if not any(request.is_leased for request in requests):
        assert_nothing_held(core)
    return outcome


def assert_nothing_held(core: EngineCore) -> None:
    """After the last request, once copies and steps are over, every block can be had."""
    for _ in range(1000):
        if not core.has_work():
            break
        core.step()
    core.check_integrity()
    stats = core.stats()
    for tier in (stats.device, stats.host):
        assert tier.free + tier.reclaimable == tier.total, "blocks are held by nobody"


def preempting_every(steps: int, times: int = 3) -> Hook:
    """Takes the device blocks of all that run each so many steps, of each request a few times at most.

    Without that bound a prompt that takes longer to compute would never be done.
    """
    taken: Counter[str] = Counter()

    def hook(core: EngineCore, step: int) -> None:
        if step % steps == steps - 1:
            for name in core.scheduler.request_ids():
                if taken[name] < times and core.scheduler.preempt(name):
                    taken[name] += 1

    return hook


def requests_for(prompts: Sequence[list[int]], params: SamplingParams, seed: int = 0) -> list[Request]:
    return [
        Request(id=f"r{i}", prompt_token_ids=prompt, params=params, seed=seed + i)
        for i, prompt in enumerate(prompts)
    ]


def config_for(model: str, **overrides: object) -> EngineConfig:
    """Small blocks and an fp32 model, for tests of exactness."""
    defaults: dict[str, object] = {"model": model, "dtype": "float32", "block_size": 8, "max_num_seqs": 32}
    return EngineConfig(**{**defaults, **overrides})  # type: ignore[arg-type]
