"""The host tier is used as far as its memory is in place, and no further."""

import time

import pytest
import torch
from fake_transfer import FakeTransfer

from tidegate.engine.memory import host_pool
from tidegate.engine.memory.block import State
from tidegate.engine.memory.host_pool import HostPool
from tidegate.engine.memory.tiers import BlockManager


def wait_until_ready(pool: HostPool) -> None:
    deadline = time.monotonic() + 60
    while pool.num_ready < len(pool.blocks):
        assert time.monotonic() < deadline, "the pool is never ready"
        time.sleep(0.001)


def test_a_small_pool_is_ready_at_once() -> None:
    pool = HostPool(torch.empty(10, 4096, dtype=torch.uint8))
    assert pool.num_ready == 10
    pool.close()


def test_a_large_pool_becomes_ready_in_the_background_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pool, "CHUNK_BYTES", 3 * 5000)
    monkeypatch.setattr(host_pool, "REST", 0)
    blocks = torch.full((100, 5000), 7, dtype=torch.uint8)
    pool = HostPool(blocks)
    assert pool.num_ready >= 3
    wait_until_ready(pool)
    pool.close()
    touched = (blocks.flatten() == 0).nonzero().flatten()
    assert int(touched.diff().max()) <= 4096, "a page was never written to"


def test_closing_does_not_wait_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pool, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(host_pool, "REST", 1e9)
    pool = HostPool(torch.empty(1000, 4096, dtype=torch.uint8))
    pool.close()
    assert pool.num_ready < 1000


def test_a_pool_of_no_blocks_is_ready() -> None:
    HostPool(torch.empty(0, 4096, dtype=torch.uint8)).close()


def test_the_host_tier_is_used_as_far_as_it_is_ready() -> None:
    """Until then the device tier serves alone, as without a host tier."""
    ready = [0]
    manager = BlockManager(
        block_size=2,
        device_blocks=8,
        host_blocks=4,
        transfer=FakeTransfer(8, 4, 2),
        hasher=None,
        host_ready=lambda: ready[0],
    )
    assert manager.host.num_blocks == 0
    for num_ready, kept in ((0, 0), (1, 2), (9, 4)):
        ready[0] = num_ready
        manager.poll()
        table = manager.new_table("t")
        manager.adopt(table, manager.find_prefix(table, [1, 2, 3, 4]))
        manager.reserve(table, 4)
        manager.commit(table, 4, [1, 2, 3, 4])
        manager.suspend(table)
        assert table.num_tokens == kept
        assert all(block.state is State.WRITING_BACK for block in table.blocks)
        manager.check_integrity([table])
        transfer = manager._store._transfer
        manager.flush()
        for ticket in list(transfer.under_way):
            transfer.finish(ticket, ok=True)
        manager.poll()
        manager.release(table)
    assert manager.host.num_blocks == 4
