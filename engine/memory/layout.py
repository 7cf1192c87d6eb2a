"""What a KV block is in bytes: one tensor a tier, a block contiguous across all layers.

Shapes: ``N`` blocks, ``L`` layers, ``2`` for key and value, ``K`` KV heads, ``B`` positions a block,
``D`` head size. Block-major, so that moving one block of a sequence between the tiers is one copy: on
PCIe 5 copies of 16 KiB reach a tenth of the link's bandwidth and copies of 64 KiB nearly all of it.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class BlockLayout:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.bytes_per_token * self.block_size

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
