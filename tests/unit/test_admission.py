"""Admission: queues and quotas, the measured pace, the time that a request has, and memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from tidegate.engine.config import ConfigError
from tidegate.service.admission import (
    MEMORY_LIMIT,
    RETRY_SECONDS,
    Admission,
    AdmissionLimits,
    DrainRate,
    Ticket,
)
from tidegate.service.errors import Failure
from tidegate.service.memory import MemoryGauge, memory_in_use

SHORTEST, LONGEST = RETRY_SECONDS


@dataclass
class Desk:
    """An admission with a clock and a memory that the test sets."""

    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    now: float = 1000.0
    memory: float = 0.0

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits, lambda: self.memory, lambda: self.now)

    def take(
        self, tenant: str = "a", queue_tokens: int = 10, quota_tokens: int = 20, **options: Any
    ) -> Ticket:
        ticket = self.admission.enter(tenant)
        weight = {"priority": 0, "time_left": None, **options}
        try:
            self.admission.weigh(ticket, queue_tokens=queue_tokens, quota_tokens=quota_tokens, **weight)
        except Failure:
            self.admission.end(ticket)
            raise
        return ticket

    def refusal(self, **fields: Any) -> Failure:
        with pytest.raises(Failure) as caught:
            self.take(**fields)
        return caught.value


def test_a_full_queue_has_room_again_when_one_runs_or_ends() -> None:
    desk = Desk(AdmissionLimits(max_waiting=2))
    first, second = desk.take(), desk.take()
    assert desk.refusal().reason == "QUEUE_FULL"
    desk.admission.admit(first)
    third = desk.take()
    assert desk.refusal().reason == "QUEUE_FULL"
    desk.admission.end(second)
    desk.take()
    desk.admission.end(third)
    desk.admission.end(third)
    assert desk.admission.waiting == 1


def test_the_queue_is_bounded_in_tokens_too_and_takes_any_single_request() -> None:
    desk = Desk(AdmissionLimits(max_waiting_tokens=100))
    large = desk.take(queue_tokens=5000)
    assert desk.refusal(queue_tokens=1).reason == "QUEUE_FULL"
    desk.admission.admit(large)
    desk.take(queue_tokens=60)
    desk.take(queue_tokens=40)
    assert desk.refusal(queue_tokens=1).reason == "QUEUE_FULL"
    assert desk.admission.waiting_tokens == 100


def test_a_tenants_quotas_leave_the_others_alone() -> None:
    desk = Desk(AdmissionLimits(tenant_requests=2, tenant_tokens=100))
    first = desk.take("a", quota_tokens=60)
    refusal = desk.refusal(tenant="a", quota_tokens=41)
    assert (refusal.reason, refusal.quota) == ("TENANT_QUOTA", ("tenant:a", "100 tokens under way at once"))
    desk.take("a", quota_tokens=40)
    refusal = desk.refusal(tenant="a", quota_tokens=1)
    assert refusal.quota == ("tenant:a", "2 requests under way at once")
    desk.take("b", quota_tokens=100)
    # Running takes as much of a quota as waiting does.
    desk.admission.admit(first)
    assert desk.refusal(tenant="a").reason == "TENANT_QUOTA"
    desk.admission.end(first)
    desk.take("a", quota_tokens=60)


def test_a_quota_is_told_in_the_details_and_a_hopeless_request_is_not_told_to_come_back() -> None:
    desk = Desk(AdmissionLimits(tenant_tokens=100))
    refusal = desk.refusal(quota_tokens=101)
    assert refusal.retry_after is None
    desk.take(quota_tokens=100)
    status = desk.refusal(quota_tokens=1).status()
    quota, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    assert [detail.Unpack(quota) for detail in status.details] == [False, True, False]
    assert [detail.Unpack(retry) for detail in status.details] == [False, False, True]
    assert [violation.subject for violation in quota.violations] == ["tenant:a"]


def test_the_time_to_come_back_follows_the_measured_pace() -> None:
    """A tenth of the queue at 2 requests a second, then at 20."""
    desk = Desk(AdmissionLimits(max_waiting=200))
    tickets = [desk.take() for _ in range(200)]
    for ticket in tickets[:40]:
        desk.now += 0.5
        desk.admission.admit(ticket)
        desk.take()
    assert desk.refusal().retry_after == pytest.approx(10, rel=0.01)
    for ticket in tickets[40:]:
        for _ in range(10):
            desk.now += 0.005
        desk.admission.admit(ticket)
        desk.take()
    slow, fast = 10, 1
    assert fast < (desk.refusal().retry_after or 0) < slow


def test_before_anything_is_measured_the_time_to_come_back_is_the_shortest() -> None:
    desk = Desk(AdmissionLimits(max_waiting=1))
    desk.take()
    assert desk.refusal().retry_after == SHORTEST


def test_a_queue_that_stands_still_asks_for_more_and_more_patience() -> None:
    desk = Desk(AdmissionLimits(max_waiting=10))
    tickets = [desk.take() for _ in range(10)]
    desk.now += 1
    desk.admission.admit(tickets[0])
    desk.take()
    asked = []
    for _ in range(6):
        asked.append(desk.refusal().retry_after or 0)
        desk.now += 10
    assert asked == sorted(asked)
    assert asked[0] < asked[-1] == LONGEST


def test_who_cannot_make_it_in_time_is_refused_at_once() -> None:
    """100 tokens a second, 1000 before it: 10 seconds."""
    desk = Desk()
    tickets = [desk.take(queue_tokens=100) for _ in range(20)]
    for ticket in tickets[:10]:
        desk.now += 1
        desk.admission.admit(ticket)
    refusal = desk.refusal(time_left=9.0)
    assert refusal.reason == "WAIT_TOO_LONG"
    assert refusal.retry_after == pytest.approx(1, abs=0.1)
    assert int(refusal.metadata["wait_ms"]) == pytest.approx(10_000, rel=0.01)
    desk.take(time_left=11.0)
    desk.take(time_left=None)
    # Those of a lower priority are not before it.
    desk.take(time_left=0.5, priority=1)
    assert desk.refusal(time_left=0.01, priority=1).reason == "WAIT_TOO_LONG"


def test_an_empty_queue_refuses_nobody_for_lack_of_time() -> None:
    desk = Desk()
    first = desk.take()
    desk.now += 100
    desk.admission.admit(first)
    desk.now += 100
    desk.take(time_left=0.001)


def test_an_idle_time_does_not_count_as_slowness() -> None:
    rate = DrainRate()
    rate.began(0)
    rate.drained(10, 1)
    rate.ended(1)
    assert rate.seconds_for(10, 1) == rate.seconds_for(10, 1000) == pytest.approx(1)
    rate.began(2000)
    assert rate.seconds_for(10, 2000) == pytest.approx(1)


def test_a_refused_request_leaves_nothing_behind() -> None:
    desk = Desk(AdmissionLimits(tenant_tokens=100))
    for _ in range(5):
        desk.refusal(quota_tokens=101)
    assert (desk.admission.waiting, desk.admission.waiting_tokens) == (0, 0)
    desk.take(quota_tokens=100)


def test_short_of_memory_new_requests_are_shed_until_it_is_better() -> None:
    desk = Desk(memory=MEMORY_LIMIT + 0.01)
    refusal = desk.refusal()
    assert refusal.reason == "MEMORY_PRESSURE"
    assert refusal.retry_after is not None
    desk.memory = MEMORY_LIMIT
    desk.take()


@pytest.mark.parametrize("name", AdmissionLimits.__slots__)
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        AdmissionLimits(**{name: 0})


# --- memory -----------------------------------------------------------------------------------------------


def group(folder: Path, files: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def test_memory_is_read_as_the_kernel_limits_it(tmp_path: Path) -> None:
    """The tightest limit above us counts, without the page cache that goes by itself."""
    proc = tmp_path / "cgroup"
    proc.write_text("0::/pod/container\n")
    v2 = {"memory.max": 1000, "memory.current": 900, "memory.stat": "anon 1\ninactive_file 100"}
    root = tmp_path / "v2"
    group(root / "pod", {**v2, "memory.max": 801, "memory.current": 900})
    group(root / "pod/container", v2)
    assert memory_in_use(proc, root) == pytest.approx(800 / 801)
    group(root / "pod", {"memory.max": "max"})
    unlimited_pod = memory_in_use(proc, root)
    assert unlimited_pod == pytest.approx(max(0.8, memory_in_use(tmp_path / "none")))


def test_memory_is_read_under_the_first_version_too(tmp_path: Path) -> None:
    """Where the path is that of the world outside, our group is the root."""
    proc = tmp_path / "cgroup"
    proc.write_text("9:cpu:/x\n4:memory:/kubepods/pod1/abc\n0::/\n")
    v1 = {
        "memory.limit_in_bytes": 1000,
        "memory.usage_in_bytes": 1000,
        "memory.stat": "inactive_file 900\ntotal_inactive_file 1",
    }
    group(tmp_path / "v1/memory", v1)
    assert memory_in_use(proc, tmp_path / "v1") == pytest.approx(0.999)


def test_a_gauge_does_not_look_at_every_request() -> None:
    looks = []
    gauge = MemoryGauge(lambda: looks.append(1) or 0.5)
    assert [gauge() for _ in range(100)] == [0.5] * 100
    assert len(looks) < 100
