"""A block manager over a fake copy engine, for tests of single cases."""

from collections.abc import Sequence

from fake_transfer import FakeTransfer

from tidegate.engine.memory.block import BlockTable, Event, State
from tidegate.engine.memory.groups import KVGroup
from tidegate.engine.memory.prefix import BlockHasher
from tidegate.engine.memory.tiers import BlockManager

SIZE = 2
"""Positions a block."""


class Rig:
    """A manager over a fake copy engine, and the moves that tests make of it."""

    def __init__(
        self,
        device: int,
        host: int,
        *,
        caches: bool = True,
        host_quota: int | None = None,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        """``windows``: of each KV group."""
        self.transfer = FakeTransfer(device, host, SIZE)
        self.events: list[Event] = []
        self.manager = BlockManager(
            block_size=SIZE,
            device_blocks=device,
            host_blocks=host,
            host_quota=host_quota,
            transfer=self.transfer,
            hasher=BlockHasher("model", SIZE, b"secret") if caches else None,
            groups=[KVGroup(window) for window in windows],
            most_uncommitted=4 * SIZE,
            observer=lambda block, event, before, after: self.events.append(event),
        )
        self.tables: list[BlockTable] = []
        self.step = 0

    def admit(self, tokens: Sequence[int], tenant: str = "t") -> BlockTable:
        table = self.manager.new_table(tenant)
        found = self.manager.find_prefix(table, tokens)
        assert self.manager.has_room(found.blocks, self.manager.num_to_come(table, found, len(tokens)))
        self.manager.adopt(table, found)
        self.tables.append(table)
        return table

    def compute(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Steps up to the last token."""
        assert self.manager.reserve(table, len(tokens))
        self.launch(table)
        self.manager.commit(table, len(tokens), tokens)
        self.manager.collected(self.step)

    def launch(self, *tables: BlockTable) -> int:
        self.step += 1
        for table in tables:
            self.manager.launched(table, self.step)
        return self.step

    def run(self, tokens: Sequence[int], tenant: str = "t") -> BlockTable:
        table = self.admit(tokens, tenant)
        assert table.is_ready
        self.compute(table, tokens)
        return table

    def release(self, table: BlockTable) -> None:
        self.manager.release(table)
        self.tables.remove(table)

    def copy_all(self, *, ok: bool = True) -> int:
        """End the copies ordered so far."""
        self.manager.flush()
        tickets = list(self.transfer.under_way)
        for ticket in tickets:
            self.transfer.finish(ticket, ok=ok)
        self.manager.poll()
        return len(tickets)

    def park(self, table: BlockTable) -> None:
        self.manager.suspend(table)
        self.copy_all()
        assert self.manager.is_written(table)

    def check(self) -> None:
        self.manager.check_integrity(self.tables)


def states(table: BlockTable) -> list[State]:
    return [block.state for block in table.blocks]
