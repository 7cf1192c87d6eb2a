"""Which blocks hold a prefix already: chained keys over full blocks, kept apart by tenant.

A block's key covers every token before it too, so one look-up a block tells whether the whole prefix is
there. Keys are keyed hashes with a secret of the process: nobody outside can aim at a collision.
"""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tidegate.engine.memory.groups import KVGroup

B = TypeVar("B")

KEY_BYTES = 16


class BlockHasher:
    """Makes the keys. ``model`` names all that shapes the KV besides tokens: checkpoint, dtype, adapter."""

    def __init__(self, model: str, block_size: int, secret: bytes | None = None) -> None:
        self.block_size = block_size
        self._model = model
        self._secret = os.urandom(32) if secret is None else secret

    def root(self, tenant: str) -> bytes:
        """The parent of a tenant's first blocks."""
        name = f"{len(tenant)}:{tenant}{self._model}".encode()
        return hashlib.blake2b(name, digest_size=KEY_BYTES, key=self._secret).digest()

    def extend(self, keys: list[bytes], root: bytes, token_ids: Sequence[int], num_blocks: int) -> None:
        """Append to ``keys`` until it covers the first ``num_blocks`` full blocks of ``token_ids``."""
        size = self.block_size
        while len(keys) < num_blocks:
            start = len(keys) * size
            tokens = array("I", token_ids[start : start + size]).tobytes()
            parent = keys[-1] if keys else root
            keys.append(hashlib.blake2b(parent + tokens, digest_size=KEY_BYTES, key=self._secret).digest())


@dataclass(frozen=True, slots=True)
class Prefix(Generic[B]):
    """Blocks that a sequence may begin with."""

    length: int
    """In blocks."""
    groups: tuple[list[B], ...]
    """Of each group those that are needed to go on from there, up to the last one."""

    @property
    def blocks(self) -> list[B]:
        """Those of all groups, group by group."""
        return [block for group in self.groups for block in group]

    def numbered(self) -> Iterator[tuple[int, B]]:
        """The same, each with its number in the sequence."""
        for blocks in self.groups:
            yield from enumerate(blocks, self.length - len(blocks))


class PrefixIndex(Generic[B]):
    """Key to block, for each group. A block stands here at most once, under the key it carries."""

    def __init__(self, kinds: Sequence[KVGroup], block_size: int) -> None:
        self._kinds = tuple(kinds)
        self._block_size = block_size
        self._groups: tuple[dict[bytes, B], ...] = tuple({} for _ in kinds)

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def get(self, group: int, key: bytes) -> B | None:
        return self._groups[group].get(key)

    def add(self, group: int, key: bytes, block: B) -> bool:
        """False, and nothing changes, where another block of the group holds the same content already."""
        return self._groups[group].setdefault(key, block) is block

    def remove(self, group: int, key: bytes) -> None:
        del self._groups[group][key]

    def longest(self, keys: Sequence[bytes]) -> Prefix[B]:
        """The longest prefix, of the blocks with these keys, that somebody may go on from.

        A group of full attention has to know all of its blocks, one with a window those that the next
        position sees anything of.
        """
        length = len(keys)
        for kind, known in zip(self._kinds, self._groups, strict=True):
            if kind.window is None:
                length = next((i for i in range(length) if keys[i] not in known), length)
        while (gap := self._last_gap(keys, length)) is not None:
            length = gap
        tokens = length * self._block_size
        return Prefix(
            length,
            tuple(
                [known[key] for key in keys[kind.needed_from(tokens, self._block_size) : length]]
                for kind, known in zip(self._kinds, self._groups, strict=True)
            ),
        )

    def _last_gap(self, keys: Sequence[bytes], length: int) -> int | None:
        """The last block that some window needs to go on behind so many, and that is not known."""
        for kind, known in zip(self._kinds, self._groups, strict=True):
            if kind.window is not None:
                needed = range(kind.needed_from(length * self._block_size, self._block_size), length)
                gap = next((i for i in reversed(needed) if keys[i] not in known), None)
                if gap is not None:
                    return gap
        return None

    def values(self) -> list[B]:
        return [block for known in self._groups for block in known.values()]
