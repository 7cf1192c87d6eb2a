"""What a KV block is in bytes: one tensor a tier, a block contiguous across all layers of its group.

Shapes: ``N`` blocks, ``L`` layers of a block, ``2`` for key and value, ``K`` KV heads, ``B`` positions a
block, ``D`` head size. Block-major, so that moving one block of a sequence between the tiers is one copy: on
PCIe 5 copies of 16 KiB reach a tenth of the link's bandwidth and copies of 64 KiB nearly all of it.

Layers that keep their KV for equally long make up a **group**, and a block holds one group's layers: the key
and value tiles ``BD`` of the group's layer number l and head k begin at ``((l * 2 + c) * K + k) * B * D``
elements of the block, c being 0 for keys and 1 for values. Layers of one model have one shape, so blocks are
of one size where their groups have equally many layers: ``group_layers`` cuts them so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from tidegate.engine.memory.groups import KVGroup

MOST_UNUSED = 1 / 8
"""Share of the room that may stay empty so that there are fewer groups: each costs a table a sequence."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    kind: KVGroup
    layers: tuple[int, ...]
    """Layers of the model, in the order in which they lie in a block."""


def group_layers(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Of each layer its attention window, None without one, to as few groups as ``MOST_UNUSED`` allows.

    Each has as many layers as the first; some have fewer, and leave the rest of their blocks empty.
    """
    by_window: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        by_window.setdefault(window, []).append(layer)

    def unused(size: int) -> int:
        return sum(ceil(len(layers) / size) * size - len(layers) for layers in by_window.values())

    # A size of 1 leaves nothing unused.
    size = next(size for size in range(len(windows), 0, -1) if unused(size) <= MOST_UNUSED * len(windows))
    return tuple(
        LayerGroup(KVGroup(window), tuple(layers[first : first + size]))
        for window, layers in by_window.items()
        for first in range(0, len(layers), size)
    )


def places_of(groups: Sequence[LayerGroup]) -> list[tuple[int, int]]:
    """Of each layer of the model its group, and its place in the group's blocks."""
    places = {
        layer: (number, place)
        for number, group in enumerate(groups)
        for place, layer in enumerate(group.layers)
    }
    return [places[layer] for layer in range(len(places))]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    num_layers: int
    """Of a block."""
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    num_groups: int = 1

    @property
    def bytes_per_token(self) -> int:
        """Of a sequence that all groups keep."""
        return self.num_groups * self.block_bytes // self.block_size

    @property
    def block_bytes(self) -> int:
        elements = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return elements * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> torch.Tensor:
        """One tier's pool, NLCKBD with C = 2. Its content is undefined: nothing may read before writing."""
        return torch.empty(
            (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim),
            dtype=self.dtype,
            device=device,
        )

    @staticmethod
    def layer(pool_NLCKBD: torch.Tensor, layer: int) -> torch.Tensor:
        """One layer's strided view of the pool, NCKBD; no copy."""
        return pool_NLCKBD[:, layer]
