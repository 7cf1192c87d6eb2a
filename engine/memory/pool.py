"""One tier's slots by index: which are free, and which index is handed out next."""

import heapq
from collections.abc import Iterable


class BlockPool:
    """A fixed number of slots. Knows nothing of what they hold; made once for each tier.

    The lowest free index is taken first, so that blocks taken together tend to be neighbours and
    their copies merge into longer ones.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """The lowest free index. Raises ``IndexError`` when the pool is empty: callers check first."""
        index = heapq.heappop(self._free)
        self._is_free[index] = 0
        return index

    def give(self, index: int) -> None:
        """Return an index. Giving one twice is a defect of the caller, and raises."""
        if self._is_free[index]:
            raise RuntimeError(f"block {index} is returned to its pool twice")
        self._is_free[index] = 1
        heapq.heappush(self._free, index)

    def check_integrity(self, used: Iterable[int]) -> None:
        """``used`` are all indices that somebody holds: with the free ones they make up the pool, once."""
        everything = sorted([*self._free, *used])
        if everything != list(range(self.num_blocks)):
            raise RuntimeError("free and used blocks do not make up the pool")
        if sum(self._is_free) != len(self._free):
            raise RuntimeError("the free map and the free list disagree")
