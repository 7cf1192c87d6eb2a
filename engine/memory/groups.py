"""KV groups: sets of layers that keep the KV of a sequence for equally long.

A layer of full attention reads every position of a sequence, one with a sliding window only the last few.
In one block table the first would keep alive what the second has done with; so each group has a table of
its own, and a block belongs to one group.

All groups' blocks are of one size: the same number of layers each (``layout.py``), and layers of one model
have one shape. So they share one pool, one free list and one order of eviction in each tier. A pool for each
group would have to be cut before anybody knows how long the sequences will be, and one would be full while
the other stands empty.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

KEPT_BLOCKS = 1
"""Blocks that a window has passed and that are kept all the same: a table may so go back by a block's worth
of positions. A stop string is found behind what was computed past it, and choices that share a prompt each
compute the last token of it."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """What a group needs of a sequence. Blocks are counted from the sequence's first."""

    window: int | None = None
    """Positions that a query sees, its own included, two at least; None: all before it."""

    def needed_from(self, num_tokens: int, block_size: int) -> int:
        """The first block that whoever goes on behind ``num_tokens`` positions has to read."""
        return 0 if self.window is None else max(0, num_tokens + 1 - self.window) // block_size

    def kept_from(self, num_tokens: int, block_size: int) -> int:
        """The first block that a sequence keeps once it has computed ``num_tokens`` positions."""
        return max(0, self.needed_from(num_tokens, block_size) - KEPT_BLOCKS)

    def most_blocks(self, num_tokens: int, uncommitted: int, block_size: int) -> int:
        """Held at once, at the most, by a sequence that grows to ``num_tokens`` positions, no more than
        ``uncommitted`` of them not yet committed: a chunk of its prompt for each step in flight.
        """
        blocks = -(-num_tokens // block_size)
        if self.window is None:
            return blocks
        # What the steps write and what their queries see may begin and end anywhere in a block.
        return min(blocks, -(-(self.window - 1 + uncommitted) // block_size) + 1 + KEPT_BLOCKS)


FULL_ATTENTION = (KVGroup(),)
"""Of a model whose layers all attend to everything."""


def most_blocks(groups: Sequence[KVGroup], num_tokens: int, uncommitted: int, block_size: int) -> int:
    """Blocks that one sequence holds at once in all groups; see ``KVGroup.most_blocks``."""
    return sum(group.most_blocks(num_tokens, uncommitted, block_size) for group in groups)


def longest_sequence(
    groups: Sequence[KVGroup], blocks: int, most_tokens: int, uncommitted: int, block_size: int
) -> int:
    """Tokens, in whole blocks and up to ``most_tokens``, of the longest sequence that so many blocks hold."""
    lengths = range(block_size, most_tokens + block_size, block_size)
    fitting = bisect_right(
        lengths, blocks, key=lambda length: most_blocks(groups, length, uncommitted, block_size)
    )
    return fitting * block_size
