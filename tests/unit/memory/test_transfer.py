"""The CPU device's copy engine on real pools: what arrives is what was sent, byte for byte."""

import random
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import structlog
import torch

from tidegate.engine.memory.copies import Completion, CopyOp
from tidegate.engine.memory.host_pool import HostPool
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.memory.transfer import SHARE, SHORTEST_REST, SLICE_BYTES, ThreadTransfer

LAYOUT = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.bfloat16)
DEVICE_BLOCKS, HOST_BLOCKS = 48, 64


@dataclass
class Tiers:
    device: torch.Tensor
    host: torch.Tensor
    transfer: ThreadTransfer

    def write(self, index: int, data: bytes) -> None:
        self.device[index].view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(data, np.uint8)

    def checksum(self, index: int) -> int:
        return zlib.crc32(self.device[index].view(torch.uint8).numpy().tobytes())

    def wait_for(self, count: int) -> list[Completion]:
        done: list[Completion] = []
        deadline = time.monotonic() + 30
        while len(done) < count:
            assert time.monotonic() < deadline, "copies never end"
            self.transfer.wait(1.0)
            done += self.transfer.poll()
        return done


@pytest.fixture
def tiers() -> Iterator[Tiers]:
    device = LAYOUT.allocate(DEVICE_BLOCKS, torch.device("cpu"))
    host = LAYOUT.allocate(HOST_BLOCKS, torch.device("cpu"))
    transfer = ThreadTransfer(device, HostPool(host))
    yield Tiers(device, host, transfer)
    transfer.close()


@dataclass
class RoundTrips:
    """Blocks on their way out and back, many at once, from random slots to random slots.

    Each block is written, sent to the host, wiped on the device, and read back into another slot. A
    slot is used again only when its copy was reported, as the block manager's pins see to.
    """

    tiers: Tiers
    rng: random.Random
    waits: bool = True
    """False: a device slot is wiped while its copy may still read it, as without a pin."""
    done: int = 0
    mismatches: int = 0
    next_ticket: int = 1
    free_device: list[int] = field(default_factory=lambda: list(range(DEVICE_BLOCKS)))
    free_host: list[int] = field(default_factory=lambda: list(range(HOST_BLOCKS)))
    sums: dict[int, int] = field(default_factory=dict)
    """Checksum of what each host slot should hold, as far as it has arrived."""
    under_way: dict[int, CopyOp] = field(default_factory=dict)
    sums_under_way: dict[int, int] = field(default_factory=dict)

    def run(self, count: int) -> None:
        while self.done < count:
            batch = self._out(self.rng.randint(0, len(self.free_device)))
            batch += self._back(self.rng.randint(0, len(self.sums)))
            self.tiers.transfer.submit(batch)
            if not self.waits:
                for op in batch:
                    if op.to_host:
                        self._wipe(op.device_index)
            if self.under_way:
                self.tiers.transfer.wait(1.0)
            for completion in self.tiers.transfer.poll():
                assert completion.ok
                self._end(completion.ticket)

    def _out(self, count: int) -> list[CopyOp]:
        ops = []
        self.rng.shuffle(self.free_device)
        self.rng.shuffle(self.free_host)
        for _ in range(min(count, len(self.free_host))):
            device = self.free_device.pop()
            data = self.rng.randbytes(LAYOUT.block_bytes)
            self.tiers.write(device, data)
            ops.append(self._order(True, device, self.free_host.pop(), zlib.crc32(data)))
        return ops

    def _back(self, count: int) -> list[CopyOp]:
        hosts = self.rng.sample(sorted(self.sums), min(count, len(self.free_device)))
        return [self._order(False, self.free_device.pop(), host, self.sums.pop(host)) for host in hosts]

    def _order(self, to_host: bool, device: int, host: int, checksum: int) -> CopyOp:
        op = CopyOp(self.next_ticket, to_host, device, host)
        self.next_ticket += 1
        self.under_way[op.ticket] = op
        self.sums_under_way[op.ticket] = checksum
        return op

    def _end(self, ticket: int) -> None:
        op, checksum = self.under_way.pop(ticket), self.sums_under_way.pop(ticket)
        if op.to_host:
            self.sums[op.host_index] = checksum
        else:
            self.mismatches += self.tiers.checksum(op.device_index) != checksum
            self.free_host.append(op.host_index)
            self.done += 1
        self._wipe(op.device_index)
        self.free_device.append(op.device_index)

    def _wipe(self, index: int) -> None:
        self.tiers.device[index].fill_(-1.0)


def test_twenty_thousand_random_round_trips_bring_back_every_byte(tiers: Tiers) -> None:
    trips = RoundTrips(tiers, random.Random(0))
    trips.run(20_000)
    assert trips.mismatches == 0


def test_the_same_round_trips_without_pins_are_seen_to_be_wrong(tiers: Tiers) -> None:
    """The copies are truly asynchronous, and the checksums would tell."""
    trips = RoundTrips(tiers, random.Random(0), waits=False)
    trips.run(2_000)
    assert trips.mismatches > 0


def test_a_copy_touches_its_own_blocks_only(tiers: Tiers) -> None:
    tiers.device.fill_(1.0)
    tiers.host.fill_(2.0)
    tiers.transfer.submit([CopyOp(1, True, 3, 7), CopyOp(2, True, 4, 8), CopyOp(3, False, 9, 20)])
    assert sorted((ticket, ok) for ticket, ok, _ in tiers.wait_for(3)) == [(1, True), (2, True), (3, True)]
    assert [i for i in range(HOST_BLOCKS) if (tiers.host[i] == 1.0).all()] == [7, 8]
    assert [i for i in range(DEVICE_BLOCKS) if (tiers.device[i] == 2.0).all()] == [9]
    assert int((tiers.host == 2.0).sum()) == (HOST_BLOCKS - 2) * tiers.host[0].numel()
    assert int((tiers.device == 1.0).sum()) == (DEVICE_BLOCKS - 1) * tiers.device[0].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_dtype_travels_as_bytes(dtype: torch.dtype) -> None:
    """NaN patterns, subnormals and all."""
    layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=16, block_size=2, dtype=dtype)
    device, host = (layout.allocate(2, torch.device("cpu")) for _ in range(2))
    data = np.random.default_rng(0).integers(0, 256, layout.block_bytes, np.uint8)
    device[1].view(torch.uint8).numpy().reshape(-1)[:] = data
    transfer = ThreadTransfer(device, HostPool(host))
    tiers = Tiers(device, host, transfer)
    transfer.submit([CopyOp(1, True, 1, 0)])
    tiers.wait_for(1)
    transfer.submit([CopyOp(2, False, 0, 0)])
    tiers.wait_for(1)
    transfer.close()
    assert device[0].view(torch.uint8).numpy().tobytes() == data.tobytes()


def test_a_failed_run_is_reported_for_each_of_its_blocks_and_the_next_goes_on(tiers: Tiers) -> None:
    """Slots that do not exist stand for whatever may fail; it is logged, and the thread lives."""
    beyond = [CopyOp(1, False, 0, HOST_BLOCKS), CopyOp(2, False, 1, HOST_BLOCKS + 1)]
    with structlog.testing.capture_logs() as logs:
        tiers.transfer.submit([*beyond, CopyOp(3, True, 5, 5)])
        assert sorted((ticket, ok) for ticket, ok, _ in tiers.wait_for(3)) == [
            (1, False),
            (2, False),
            (3, True),
        ]
    assert [(entry["event"], entry["blocks"], entry["to_host"]) for entry in logs] == [
        ("copy_failed", 2, False)
    ]


def test_each_copy_is_reported_once(tiers: Tiers) -> None:
    tiers.transfer.submit([CopyOp(ticket, True, ticket, ticket) for ticket in range(40)])
    assert sorted(done.ticket for done in tiers.wait_for(40)) == list(range(40))
    assert tiers.transfer.poll() == []


def test_waiting_ends_with_the_first_report_or_with_the_time(tiers: Tiers) -> None:
    started = time.monotonic()
    tiers.transfer.wait(0.05)
    assert time.monotonic() - started >= 0.04
    tiers.transfer.submit([CopyOp(1, True, 0, 0)])
    tiers.transfer.wait(1e6)
    (done,) = tiers.transfer.poll()
    assert (done.ticket, done.ok) == (1, True)


def test_loads_go_before_write_backs_and_large_blocks_go_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is queued while a copy is under way; a sequence waits for a load."""
    device = torch.zeros(8, SLICE_BYTES // 4 * 3, dtype=torch.uint8)
    host = torch.empty(8, SLICE_BYTES // 4 * 3, dtype=torch.uint8)
    reached, go, slices = threading.Event(), threading.Event(), []
    copyto = np.copyto

    def held_up(target: np.ndarray, source: np.ndarray) -> None:
        reached.set()
        assert go.wait(30)
        slices.append(target.size)
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", held_up)
    tiers = Tiers(device, host, ThreadTransfer(device, HostPool(host)))
    host.fill_(1)
    tiers.transfer.submit([CopyOp(1, True, 0, 0)])
    assert reached.wait(30)
    tiers.transfer.submit([CopyOp(2, True, 2, 2), CopyOp(3, False, 4, 4), CopyOp(4, False, 5, 5)])
    go.set()
    done = tiers.wait_for(4)
    tiers.transfer.close()
    assert [completion.ticket for completion in done] == [1, 3, 4, 2]
    assert max(slices) <= SLICE_BYTES
    assert sum(slices) == 4 * device[0].numel()
    assert [int(block.sum()) // device[0].numel() for block in (device[4], device[5], host[2])] == [1, 1, 0]


def test_whoever_waits_for_a_copy_ends_its_rest(tiers: Tiers) -> None:
    tiers.transfer._owed = 1e6
    tiers.transfer.submit([CopyOp(1, True, 1, 1)])
    assert [done.ok for done in tiers.wait_for(1)] == [True]


def test_it_leaves_most_of_the_time_of_a_core_to_the_steps(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(tiers.transfer._hurry, "wait", rests.append)
    copied = 0.0
    for round_ in range(10_000):
        tiers.transfer.submit([CopyOp(round_, True, 1, 1)])
        (done,) = tiers.wait_for(1)
        copied += done.seconds
        if len(rests) == 3:
            break
    assert len(rests) == 3
    assert min(rests) > SHORTEST_REST
    assert sum(rests) <= copied * (1 / SHARE - 1)


def test_its_rate_is_measured(tiers: Tiers) -> None:
    """Policy weighs it against recomputation: it has to follow what copies achieve."""
    before = tiers.transfer.bytes_per_second
    tiers.transfer.submit([CopyOp(1, True, 0, 0)])
    tiers.wait_for(1)
    assert 0 < tiers.transfer.bytes_per_second != before


def test_closing_ends_the_thread_whatever_is_queued() -> None:
    device, host = (LAYOUT.allocate(8, torch.device("cpu")) for _ in range(2))
    transfer = ThreadTransfer(device, HostPool(host))
    transfer.submit([CopyOp(ticket, True, ticket, ticket) for ticket in range(8)])
    transfer.close()
    assert all(thread.name != "tidegate-copies" for thread in threading.enumerate())
    transfer.close()


def test_a_host_tier_of_no_blocks_is_served() -> None:
    transfer = ThreadTransfer(
        LAYOUT.allocate(2, torch.device("cpu")), HostPool(LAYOUT.allocate(0, torch.device("cpu")))
    )
    assert transfer.poll() == []
    transfer.close()
