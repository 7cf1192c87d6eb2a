"""The decoder: one description in ``ModelConfig`` covers every architecture that is served.

Plain functions over fused weights rather than modules: a step of a small model is limited by the number
of operations dispatched, so query, key and value are one product, and so are gate and up.

Legend: T packed tokens, R rows whose logits are wanted, M hidden size, Y query heads times head size,
V vocabulary; the pool's NLCKBD stands in ``engine.memory.layout``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F

from tidegate.engine.memory.layout import BlockLayout, group_layers, places_of
from tidegate.engine.model.config import ModelConfig
from tidegate.engine.model.linear import Projection
from tidegate.engine.model.operations import choose_operations
from tidegate.engine.model.threads import available_cores, threads_for
from tidegate.kernels.attention import AttentionBatch

P_co = TypeVar("P_co", bound=Projection, covariant=True)
"""What a device makes of the weights of a product."""


@dataclass(frozen=True)
class LayerWeights(Generic[P_co]):
    attention_norm: torch.Tensor
    qkv: P_co
    """Heads of query, then key, then value."""
    o: P_co
    mlp_norm: torch.Tensor
    gate_up: P_co
    """Gate, then up."""
    down: P_co


@dataclass(frozen=True)
class DecoderWeights(Generic[P_co]):
    embedding: torch.Tensor
    """V, M."""
    layers: list[LayerWeights[P_co]]
    norm: torch.Tensor
    lm_head: P_co


class Decoder:
    """A loaded model. ``forward`` keeps nothing between calls; the KV cache is the caller's pool."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights[Projection]) -> None:
        self.config = config
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.vocab_size = config.vocab_size
        self.groups = group_layers(config.windows)
        self._places = places_of(self.groups)
        self._weights = weights
        self._cores = available_cores()
        self.operations = choose_operations(config, self.dtype, self.device)

    def layout(self, block_size: int) -> BlockLayout:
        """The KV blocks that this model reads and writes."""
        config, groups = self.config, self.groups
        return BlockLayout(
            num_layers=len(groups[0].layers),
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            dtype=self.dtype,
            num_groups=len(groups),
        )

    @torch.inference_mode()
    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        pool_NLCKBD: torch.Tensor,
        batches: Sequence[AttentionBatch],
        rows_R: torch.Tensor,
    ) -> torch.Tensor:
        """Write the tokens' keys and values to the pool and return hidden states RM for ``logits``.

        ``batches``: one for each of ``groups``, with its block tables and its window.
        Only ``rows_R`` (indices into T) pass through what follows the last layer's attention: no later token
        reads the rest.
        """
        torch.set_num_threads(threads_for(self.config, len(token_ids_T), self._cores))
        weights, operations = self._weights, self.operations
        kv_LNCKBD = pool_NLCKBD.unbind(1)
        attends = [operations.attention(batch, kv_LNCKBD[0]) for batch in batches]
        x_TM, delta_TM = F.embedding(token_ids_T, weights.embedding), None
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            x_TM, normed_TM = operations.add_norm(x_TM, delta_TM, layer.attention_norm)
            group, place = self._places[index]
            attended_TY = attends[group](layer.qkv(normed_TM), kv_LNCKBD[place])
            if index == last:
                x_TM = x_TM.index_select(0, rows_R)
                attended_TY = attended_TY.index_select(0, rows_R)
            x_TM, normed_TM = operations.add_norm(x_TM, layer.o(attended_TY), layer.mlp_norm)
            delta_TM = layer.down(operations.silu_mul(layer.gate_up(normed_TM)))
        _, normed_RM = operations.add_norm(x_TM, delta_TM, weights.norm)
        return normed_RM

    @torch.inference_mode()
    def logits(self, hidden_RM: torch.Tensor) -> torch.Tensor:
        """RV, in the model's dtype: of what ``forward`` gave, or of some of its rows."""
        return self._weights.lm_head(hidden_RM)
