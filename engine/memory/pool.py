"""One tier's slots by index: which are free, and which index is handed out next."""

from collections.abc import Iterable

ROOM_TO_GROW = 8
"""Free neighbours that are looked for where a run of blocks begins."""


class BlockPool:
    """A number of slots, which may grow. Knows nothing of what they hold; made once for each tier.

    Blocks that are copied together should be neighbours, so that their copies merge into longer ones: an
    index next to the one before is taken where it is free, and else the first of a free run.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._is_free = bytearray(b"\x01" * num_blocks)
        self._last = -1

    def grow(self, num_blocks: int) -> None:
        """From now on there are so many; never fewer than before."""
        more = num_blocks - self.num_blocks
        if more > 0:
            self._is_free.extend(b"\x01" * more)
            self.num_blocks += more
            self.num_free += more

    def take(self, after: int | None = None) -> int:
        """A free index, behind ``after`` if possible; None: behind the one that was taken last.

        Raises ``IndexError`` when the pool is empty: callers check first.
        """
        index = (self._last if after is None else after) + 1
        if index >= self.num_blocks or not self._is_free[index]:
            index = self._first_of_a_run()
        self._is_free[index] = 0
        self._last = index
        self.num_free -= 1
        return index

    def _first_of_a_run(self) -> int:
        length = ROOM_TO_GROW
        while length:
            index = self._is_free.find(b"\x01" * length)
            if index >= 0:
                return index
            length //= 2
        raise IndexError("no block is free")

    def give(self, index: int) -> None:
        """Return an index. Giving one twice is a defect of the caller, and raises."""
        if self._is_free[index]:
            raise RuntimeError(f"block {index} is returned to its pool twice")
        self._is_free[index] = 1
        self.num_free += 1

    def check_integrity(self, used: Iterable[int]) -> None:
        """``used`` are all indices that somebody holds: with the free ones they make up the pool, once."""
        free = [index for index, is_free in enumerate(self._is_free) if is_free]
        if sorted([*free, *used]) != list(range(self.num_blocks)):
            raise RuntimeError("free and used blocks do not make up the pool")
        if self.num_free != len(free):
            raise RuntimeError("the free blocks are miscounted")
