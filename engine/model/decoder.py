"""The decoder: one description in ``ModelConfig`` covers every architecture that is served.

Plain functions over fused weights rather than modules: a step of a small model is limited by the number
of operations dispatched, so query, key and value are one product, and so are gate and up.

Legend: T packed tokens, R rows whose logits are wanted, M hidden size, H query heads, K KV heads,
D head size, F intermediate size, V vocabulary; the pool's NLCKBD stands in ``engine.memory.layout``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.model.config import ModelConfig
from tidegate.engine.model.linear import Projection
from tidegate.engine.model.rope import Rotary, rotate
from tidegate.kernels.attention import AttentionBatch, paged_attention, write_kv


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: torch.Tensor
    qkv: Projection
    """Heads of query, then key, then value."""
    o: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    """Gate, then up."""
    down: Projection


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding: torch.Tensor
    """V, M."""
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: Projection


class Decoder:
    """A loaded model. ``forward`` keeps nothing between calls; the KV cache is the caller's pool."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._weights = weights
        self._rotary = Rotary(config.rope, config.head_dim, self.dtype, self.device)
        self._scale = config.head_dim**-0.5

    def layout(self, block_size: int) -> BlockLayout:
        """The KV blocks that this model reads and writes."""
        config = self.config
        return BlockLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        pool_NLCKBD: torch.Tensor,
        batch: AttentionBatch,
        sample_rows_R: torch.Tensor,
    ) -> torch.Tensor:
        """Write the tokens' keys and values to the pool and return logits RV, in the model's dtype.

        Only ``sample_rows_R`` (indices into T) pass through what follows the last layer's attention: no
        later token reads the rest.
        """
        weights = self._weights
        cos_T1D, sin_T1D = self._rotary.angles(positions_T)
        x_TM = F.embedding(token_ids_T, weights.embedding)
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            kv_NCKBD = BlockLayout.layer(pool_NLCKBD, index)
            normed_TM = self._norm(x_TM, layer.attention_norm)
            attended_TX = self._attend(normed_TM, layer, kv_NCKBD, batch, cos_T1D, sin_T1D)
            if index == last:
                x_TM, attended_TX = (
                    x_TM.index_select(0, sample_rows_R),
                    attended_TX.index_select(0, sample_rows_R),
                )
            x_TM = x_TM + layer.o(attended_TX)
            x_TM = x_TM + self._mlp(self._norm(x_TM, layer.mlp_norm), layer)
        return weights.lm_head(self._norm(x_TM, weights.norm))

    def _norm(self, x_TM: torch.Tensor, weight_M: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_TM, weight_M.shape, weight_M, self.config.rms_eps)

    def _attend(
        self,
        x_TM: torch.Tensor,
        layer: LayerWeights,
        kv_NCKBD: torch.Tensor,
        batch: AttentionBatch,
        cos_T1D: torch.Tensor,
        sin_T1D: torch.Tensor,
    ) -> torch.Tensor:
        """Heads of each token side by side."""
        config = self.config
        turned = config.num_heads + config.num_kv_heads
        heads_TXD = layer.qkv(x_TM).view(len(x_TM), turned + config.num_kv_heads, config.head_dim)
        query_key_TXD = rotate(heads_TXD[:, :turned], cos_T1D, sin_T1D)
        query_THD, key_TKD = query_key_TXD[:, : config.num_heads], query_key_TXD[:, config.num_heads :]
        write_kv(key_TKD, heads_TXD[:, turned:], kv_NCKBD, batch)
        return paged_attention(query_THD, kv_NCKBD, batch, self._scale).flatten(1)

    def _mlp(self, x_TM: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        gate_TF, up_TF = layer.gate_up(x_TM).chunk(2, dim=-1)
        return layer.down(F.silu(gate_TF) * up_TF)
