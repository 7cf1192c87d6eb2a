"""Tables that only a client can want back, and may never: in which order they make way for others.

Parked sequences have no credit; leased ones have ended, and a later request may begin with them. Where
the host tier is full each tenant keeps the tables parked last, up to its quota, before anybody keeps
more than that; among equals the one parked longest ago goes first.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from tidegate.engine.memory.block import Block, BlockTable


@dataclass(slots=True)
class _Holdings:
    """What one tenant has parked. A block that several of its tables share counts once."""

    tables: OrderedDict[BlockTable, None] = field(default_factory=OrderedDict)
    blocks: Counter[Block] = field(default_factory=Counter)

    def take(self, blocks: Iterable[Block]) -> None:
        self.blocks.update(blocks)

    def drop(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if self.blocks[block] == 1:
                del self.blocks[block]
            else:
                self.blocks[block] -= 1


class Parked:
    """The parked tables, least recently parked first. The blocks of one change only through ``lost``."""

    def __init__(self, quota: int | None) -> None:
        """``quota``: blocks a tenant; None: as many as there are."""
        self._quota = quota
        self._stamps: OrderedDict[BlockTable, int] = OrderedDict()
        self._tenants: dict[str, _Holdings] = {}
        self._clock = count()

    def __contains__(self, table: BlockTable) -> bool:
        return table in self._stamps

    def __len__(self) -> int:
        return len(self._stamps)

    def num_blocks(self, tenant: str) -> int:
        """Blocks that the tenant's parked tables hold, in whichever tier."""
        holdings = self._tenants.get(tenant)
        return len(holdings.blocks) if holdings is not None else 0

    def add(self, table: BlockTable) -> None:
        """Park a table, or count it as parked only now."""
        self.remove(table)
        self._stamps[table] = next(self._clock)
        holdings = self._tenants.setdefault(table.tenant, _Holdings())
        holdings.tables[table] = None
        holdings.take(table.blocks)

    def remove(self, table: BlockTable) -> None:
        """The table is wanted, or over. Nothing happens to one that is not parked."""
        if self._stamps.pop(table, None) is None:
            return
        holdings = self._tenants[table.tenant]
        del holdings.tables[table]
        holdings.drop(table.blocks)
        if not holdings.tables:
            del self._tenants[table.tenant]

    def lost(self, table: BlockTable, blocks: Iterable[Block]) -> None:
        """These blocks are no longer the table's."""
        if table in self._stamps:
            self._tenants[table.tenant].drop(blocks)

    def victim(self, block: Block) -> BlockTable | None:
        """The table whose tail makes way for a host copy of ``block``; None where the block comes first."""
        newest = max((self._stamps.get(holder, -1) for holder in block.holders), default=-1)
        # A block of anybody who is to go on by himself outranks all that is parked.
        outranks_all = any(holder not in self._stamps for holder in block.holders)
        shares: BlockTable | None = None
        for table, beyond in self._in_order():
            if table in block.holders:
                if beyond and not outranks_all:
                    return shares
                continue
            if not (outranks_all or beyond or self._stamps[table] < newest):
                return shares
            if any(_frees_a_slot(block) and len(block.holders) == 1 for block in reversed(table.blocks)):
                return table
            # To give up what others have parked too frees nothing yet: only where there is nothing better.
            if shares is None and any(
                _frees_a_slot(block) and block.holders.keys() <= self._stamps.keys() for block in table.blocks
            ):
                shares = table
        return shares

    def can_free(self, num_blocks: int) -> bool:
        """Whether that many host slots hold what parked tables alone want back."""
        found: set[Block] = set()
        for table in self._stamps:
            for block in table.blocks:
                if len(found) >= num_blocks:
                    return True
                if _frees_a_slot(block) and block.holders.keys() <= self._stamps.keys():
                    found.add(block)
        return len(found) >= num_blocks

    def _in_order(self) -> Iterator[tuple[BlockTable, bool]]:
        """Tables with blocks, in the order in which they make way; True: beyond its tenant's quota."""
        if self._quota is not None:
            over = [h for h in self._tenants.values() if len(h.blocks) > self._quota]
            for holdings in sorted(over, key=lambda h: self._stamps[next(iter(h.tables))]):
                yield from ((table, True) for table in holdings.tables if table.blocks)
        yield from ((table, False) for table in self._stamps if table.blocks)

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` where the holdings are not those of the parked tables."""
        for tenant, holdings in self._tenants.items():
            found = Counter(block for table in holdings.tables for block in table.blocks)
            if not holdings.tables or found != holdings.blocks:
                raise RuntimeError("a tenant's parked blocks are miscounted")
            if any(table.tenant != tenant or table not in self._stamps for table in holdings.tables):
                raise RuntimeError("a table is parked under a tenant that is not its own")
        if sum(len(holdings.tables) for holdings in self._tenants.values()) != len(self._stamps):
            raise RuntimeError("parked tables are miscounted")


def _frees_a_slot(block: Block) -> bool:
    """Whether the block has a host slot that no copy is using."""
    return block.host is not None and block.copy is None
