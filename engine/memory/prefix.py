"""Which blocks hold a prefix already: chained keys over full blocks, kept apart by tenant.

A block's key covers every token before it too, so one look-up a block tells whether the whole prefix is
there. Keys are keyed hashes with a secret of the process: nobody outside can aim at a collision.
"""

import hashlib
import os
from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

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


class PrefixIndex(Generic[B]):
    """Key to block. A block stands here at most once, under the key it carries."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, B] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> B | None:
        return self._blocks.get(key)

    def add(self, key: bytes, block: B) -> bool:
        """False, and nothing changes, where another block holds the same content already."""
        return self._blocks.setdefault(key, block) is block

    def remove(self, key: bytes) -> None:
        del self._blocks[key]

    def longest(self, keys: Sequence[bytes]) -> list[B]:
        """The blocks of the longest run of keys, from the first, that are all known."""
        found: list[B] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def values(self) -> list[B]:
        return list(self._blocks.values())
