"""The CUDA device's copy engine and its pinned pool, on a fake GPU that works late and in any order."""

import random
from collections.abc import Iterator

import pytest
import structlog
import torch
from fake_cuda import FakeCuda

from tidegate.engine.memory.copies import CopyOp
from tidegate.engine.memory.cuda_transfer import CudaTransfer
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.memory.pinned_pool import PinnedPool

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_size=16, dtype=torch.float32)
DEVICE_BLOCKS, HOST_BLOCKS, CHUNK_BLOCKS = 12, 20, 4
SEEDS = range(25)


class Rig:
    """A copy engine beside a stream that computes."""

    def __init__(self, seed: int, *, fenced: bool = True) -> None:
        self.gpu = FakeCuda(seed)
        self.pool = LAYOUT.allocate(DEVICE_BLOCKS, torch.device("cpu")).zero_()
        self.host = PinnedPool(self.gpu, LAYOUT, HOST_BLOCKS, CHUNK_BLOCKS * LAYOUT.block_bytes)
        self.host.wait(HOST_BLOCKS)
        self.host_values = self.host.blocks.view(torch.float32)
        self.compute, self.step_done = self.gpu.stream(), self.gpu.event()
        self.transfer = CudaTransfer(
            self.gpu, self.pool, self.host, lambda: self.step_done if fenced else None
        )

    def step(self, block: int, value: float) -> torch.Tensor:
        """A step that reads a block, and writes to it afterwards; what it read shows later."""
        seen = torch.empty(self.pool[block].shape)
        self.compute.launch(lambda: seen.copy_(self.pool[block]))
        self.compute.launch(lambda: self.pool[block].fill_(value))
        self.step_done.record(self.compute)
        return seen

    def finish(self, count: int) -> dict[int, bool]:
        done: dict[int, bool] = {}
        for _ in range(10_000):
            for completion in self.transfer.poll():
                assert completion.ticket not in done, "reported twice"
                done[completion.ticket] = completion.ok
            if len(done) == count:
                return done
        raise AssertionError("copies never end")


def write_back_is_right(seed: int, *, fenced: bool) -> bool:
    """A block is ordered to the host right behind the step that computes it."""
    rig = Rig(seed, fenced=fenced)
    rig.step(3, 7.0)
    rig.transfer.submit([CopyOp(1, True, 3, 5)])
    rig.finish(1)
    arrived = bool((rig.host_values[5] == 7.0).all())
    rig.transfer.close()
    return arrived


def load_is_right(seed: int, *, fenced: bool) -> bool:
    """A block is loaded to a slot that the last step still reads: it reads what was there before."""
    rig = Rig(seed, fenced=fenced)
    rig.host_values[2].fill_(9.0)
    rig.pool[3].fill_(1.0)
    seen = rig.step(3, 1.0)
    rig.transfer.submit([CopyOp(1, False, 3, 2)])
    rig.finish(1)
    rig.gpu.synchronize()
    right = bool((seen == 1.0).all() and (rig.pool[3] == 9.0).all())
    rig.transfer.close()
    return right


@pytest.mark.parametrize("case", [write_back_is_right, load_is_right])
def test_a_copy_starts_behind_the_step_that_was_launched_before_it(case):
    assert all(case(seed, fenced=True) for seed in SEEDS)


@pytest.mark.parametrize("case", [write_back_is_right, load_is_right])
def test_without_the_fence_some_order_of_work_shows_it(case):
    """These tests are worth what they catch."""
    assert not all(case(seed, fenced=False) for seed in SEEDS)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_go_and_come_back_byte_for_byte(seed):
    """Random blocks in runs and alone, both ways at once; each ticket is reported once."""
    rig, rng = Rig(seed), random.Random(seed)
    rig.pool.copy_(torch.randn(rig.pool.shape))
    expected = rig.pool.clone()
    away = rng.sample(range(DEVICE_BLOCKS), 8)
    places = rng.sample(range(HOST_BLOCKS), 8)
    pairs = list(zip(away, places, strict=True))
    rig.transfer.submit([CopyOp(i, True, device, host) for i, (device, host) in enumerate(pairs)])
    assert rig.finish(8) == dict.fromkeys(range(8), True)
    rig.pool.fill_(torch.nan)
    rig.transfer.submit([CopyOp(10 + i, False, device, host) for i, (device, host) in enumerate(pairs)])
    assert rig.finish(8) == dict.fromkeys(range(10, 18), True)
    for device in away:
        assert torch.equal(rig.pool[device], expected[device])
    rig.transfer.close()


@pytest.mark.parametrize("to_host", [True, False])
def test_a_run_over_the_border_of_two_pinned_chunks_goes_in_pieces(to_host):
    """CUDA refuses a copy that begins in one and ends in the other; so does the fake."""
    rig = Rig(0)
    values = torch.randn(rig.pool.shape)
    source = rig.pool if to_host else rig.host_values.view(HOST_BLOCKS, *rig.pool.shape[1:])
    target = rig.host_values.view(HOST_BLOCKS, *rig.pool.shape[1:]) if to_host else rig.pool
    first_device, first_host, count = 1, CHUNK_BLOCKS - 2, 2 * CHUNK_BLOCKS
    of, to = (first_device, first_host) if to_host else (first_host, first_device)
    source[of : of + count].copy_(values[:count])
    rig.transfer.submit([CopyOp(i, to_host, first_device + i, first_host + i) for i in range(count)])
    assert rig.finish(count) == dict.fromkeys(range(count), True)
    assert torch.equal(target[to : to + count], values[:count])
    rig.transfer.close()


def test_a_copy_that_the_driver_refuses_is_reported_and_the_next_one_goes_on():
    rig = Rig(0)
    rig.gpu.fail_copies = True
    with structlog.testing.capture_logs() as logs:
        rig.transfer.submit([CopyOp(1, True, 0, 0), CopyOp(2, True, 1, 1)])
    assert rig.finish(2) == {1: False, 2: False}
    assert [entry["event"] for entry in logs] == ["copy_failed"]
    rig.gpu.fail_copies = False
    rig.transfer.submit([CopyOp(3, True, 2, 2)])
    assert rig.finish(1) == {3: True}
    rig.transfer.close()


def test_no_more_is_handed_over_than_the_link_carries_meanwhile():
    """With a link of a block a batch, a long queue stays here and goes out bit by bit."""
    rig = Rig(0)
    slow = CudaTransfer(
        rig.gpu, rig.pool, rig.host, lambda: None, bytes_per_second=LAYOUT.block_bytes / 0.002
    )
    slow.submit([CopyOp(i, True, i % DEVICE_BLOCKS, i) for i in range(HOST_BLOCKS)])
    waiting = sum(len(piece.tickets) for piece in slow._lanes[True].waiting)
    assert 0 < waiting < HOST_BLOCKS
    rig.transfer = slow
    assert rig.finish(HOST_BLOCKS) == dict.fromkeys(range(HOST_BLOCKS), True)
    slow.close()


def test_the_link_is_measured_before_anything_is_in_the_pools():
    rig = Rig(0)
    rig.transfer.calibrate()
    assert rig.transfer.bytes_per_second > 0
    assert rig.transfer.poll() == []
    rig.transfer.close()


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    gpu = FakeCuda()
    yield gpu
    assert gpu.pinned_ranges == [], "memory stayed pinned"


@pytest.mark.parametrize("blocks", [0, 1, 100])
def test_the_pool_is_pinned_in_chunks_of_whole_blocks_and_pages(gpu, blocks):
    """A copy across the border of two chunks would be refused."""
    odd = BlockLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_size=16, dtype=torch.float32)
    pool = PinnedPool(gpu, odd, blocks, chunk_bytes=20_000)
    pool.wait(blocks)
    assert pool.num_ready == blocks
    first = pool.blocks.data_ptr()
    borders = [address - first for address, _ in gpu.pinned_ranges]
    assert all(border % odd.block_bytes == 0 for border in borders)
    assert sum(size for _, size in gpu.pinned_ranges) >= blocks * odd.block_bytes
    assert len(borders) > 1 or blocks < 100
    pool.close()


def test_a_pool_that_cannot_be_pinned_says_what_to_do():
    gpu = FakeCuda()
    gpu.fail_pinning = True
    with structlog.testing.capture_logs() as logs:
        pool = PinnedPool(gpu, LAYOUT, 4)
        with pytest.raises(RuntimeError, match=r"planted.*lower host_kv_tokens"):
            pool.wait(4)
    pool.close()
    assert [entry["event"] for entry in logs] == ["host_tier_cut_short"]
