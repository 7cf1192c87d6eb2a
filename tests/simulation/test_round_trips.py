"""Blocks that went out to the host tier and came back hold every byte that they left with."""

import os

import pytest
from round_trips import Storm, make_round_trips

from tidegate.engine.memory.block import BlockTable
from tidegate.engine.memory.tiers import BlockManager

ROUND_TRIPS = int(os.environ.get("BLOCK_ROUND_TRIPS", "20000"))
"""CI's share: `make integrity ROUND_TRIPS=1000000` makes a million."""


@pytest.mark.timeout(120 + ROUND_TRIPS // 500)
def test_every_byte_of_a_block_comes_back() -> None:
    done = make_round_trips(ROUND_TRIPS, seed=0)
    print(f"\n{done}")
    assert done.blocks >= ROUND_TRIPS
    assert done.mismatches == 0


def test_without_the_fence_steps_read_what_others_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run finds the fault: slots are given away while a step may still write to them."""
    launched = BlockManager.launched

    def unfenced(self: BlockManager, table: BlockTable, step_id: int) -> list[tuple[int, int]]:
        return launched(self, table, 0)

    monkeypatch.setattr(BlockManager, "launched", unfenced)
    storm = Storm(0)
    storm.run(1_000_000)
    storm.close()
    assert storm.mismatches > 0
