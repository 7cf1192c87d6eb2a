"""What an operator's commands do to the engine: pause, flush, profile."""

import json
from pathlib import Path

import pytest
from scenes import ends, request, step, submit
from world import World

from tidegate.engine.messages import Flush, Flushed, Pause, Profile
from tidegate.engine.profiler import Profiler
from tidegate.engine.request import FinishReason
from tidegate.engine.torch_trace import TorchTrace


def test_paused_no_step_is_planned_and_requests_wait_for_the_end_of_the_pause() -> None:
    world = World(1)
    submit(world, request("running", 6, 20))
    step(world, 4)
    world.core.handle(Pause(is_on=True))
    step(world, 4)  # what was under way is collected
    steps = world.core.stats().steps
    submit(world, request("late", 6, 3))
    outputs = step(world, 20)
    assert world.core.stats().steps == steps
    assert not any(out.deltas or out.finished for out in outputs)
    assert not world.core.has_work()
    assert world.core.next_deadline() is None
    world.core.handle(Pause(is_on=False))
    ended = ends(step(world, 60))
    assert {name: end.reason for name, end in ended.items()} == {
        "running": FinishReason.MAX_TOKENS,
        "late": FinishReason.MAX_TOKENS,
    }


@pytest.mark.parametrize("tiers", [(True, True), (True, False), (False, True)])
def test_a_flush_forgets_what_nobody_holds_in_the_tiers_it_names(tiers: tuple[bool, bool]) -> None:
    """And leaves the sequences that run alone."""
    device, host = tiers
    world = World(1, device_blocks=24, host_blocks=48)
    submit(world, *(request(f"done{i}", 9, 9) for i in range(6)))
    step(world, 200)
    submit(world, request("running", 9, 40))
    step(world, 3)
    before = world.core.stats()
    assert before.device.reclaimable > 0
    world.core.handle(Flush(device, host))
    (out, *_) = step(world, 1)
    assert isinstance(out.flushed, Flushed)
    after = world.core.stats()
    assert (out.flushed.device_blocks > 0) == device
    if device:
        assert after.device.reclaimable < before.device.reclaimable
    if host:
        assert after.host.reclaimable <= before.host.reclaimable
    world.core.check_integrity()
    step(world, 200)
    world.core.check_integrity()


class Recorded:
    def __init__(self) -> None:
        self.stopped = False

    def stop(self) -> str:
        self.stopped = True
        return "/trace"


def test_a_profile_ends_behind_its_last_step() -> None:
    made: list[Recorded] = []

    def make() -> Recorded:
        made.append(Recorded())
        return made[-1]

    profiler = Profiler(make)
    assert profiler.stepped() is None
    profiler.start(3)
    assert [profiler.stepped() for _ in range(4)] == [None, None, "/trace", None]
    assert [trace.stopped for trace in made] == [True]


def test_an_engine_tells_where_the_profile_of_its_steps_lies() -> None:
    world = World(1)
    world.core.handle(Profile(4))
    submit(world, request("r", 6, 12))
    told = [out.profiled for out in step(world, 30) if out.profiled is not None]
    assert len(told) == 1


def test_a_trace_of_torch_can_be_read_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = Path(TorchTrace().stop())
    assert path.is_relative_to(tmp_path)
    assert "traceEvents" in json.loads(path.read_text())
