"""The decoder on a CUDA device: products by cuBLAS, all between them by the kernels of ``kernels.triton``.

Ten kernels a layer. At small batches their number matters more than their work, so query, key and value are
one product, rotation and KV write one kernel, and the residual is added where the sum is normalized. The
decode of a single sequence takes seven, with products of its own (``kernels.triton.gemv``).

Legend: T packed tokens, R rows whose logits are wanted, M hidden size, X heads of query, key and value, D
head size, L positions; the pool's NLCKBD stands in ``engine.memory.layout``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tidegate.engine.memory.layout import BlockLayout, group_layers, places_of
from tidegate.engine.model.config import ModelConfig
from tidegate.engine.model.decoder import DecoderWeights
from tidegate.engine.model.linear import PlainLinear
from tidegate.engine.model.rope import Rotary
from tidegate.kernels.triton.activation import silu_mul
from tidegate.kernels.triton.attention import AttentionBatch, paged_attention
from tidegate.kernels.triton.gemv import gemv, gemv_add, gemv_gated
from tidegate.kernels.triton.norm import add_rms_norm, rms_norm
from tidegate.kernels.triton.rope_kv_write import rope_kv_write


class CudaDecoder:
    """A loaded model. ``forward`` keeps nothing between calls; the KV cache is the caller's pool."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights[PlainLinear], max_model_len: int) -> None:
        self.config = config
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.vocab_size = config.vocab_size
        self.max_model_len = max_model_len
        self.group = config.num_heads // config.num_kv_heads
        self.groups = group_layers(config.windows)
        self._places = places_of(self.groups)
        self._weights = weights
        self._scale = config.head_dim**-0.5
        # Made on the CPU, whose cosine the CPU device uses: so both devices turn by the same angles.
        rotary = Rotary(config.rope, config.head_dim, self.dtype, torch.device("cpu"))
        cos_L1D, sin_L1D = rotary.angles(torch.arange(max_model_len))
        self._cos_L1D, self._sin_L1D = cos_L1D.to(self.device), sin_L1D.to(self.device)

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
        rows_R: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write the tokens' keys and values to the pool and return hidden states RM for ``logits``.

        ``batches``: one for each of ``groups``.
        Only ``rows_R`` (indices into T; None for all) pass through what follows the last layer's attention:
        no later token reads the rest.
        """
        weights, eps = self._weights, self.config.rms_eps
        angles = self._cos_L1D.index_select(0, positions_T), self._sin_L1D.index_select(0, positions_T)
        residual_TM = F.embedding(token_ids_T, weights.embedding)
        if len(token_ids_T) == 1 and rows_R is None:
            return self._decode_one(residual_TM, pool_NLCKBD, batches, *angles)
        last = len(weights.layers) - 1
        x_TM: torch.Tensor | None = None
        for index, layer in enumerate(weights.layers):
            if x_TM is None:
                normed_TM = rms_norm(residual_TM, layer.attention_norm, eps)
            else:
                normed_TM = add_rms_norm(x_TM, residual_TM, layer.attention_norm, eps)
            group, place = self._places[index]
            kv_NCKBD = BlockLayout.layer(pool_NLCKBD, place)
            attended_TX = self._attend(layer.qkv(normed_TM), kv_NCKBD, batches[group], *angles)
            if index == last and rows_R is not None:
                attended_TX = attended_TX.index_select(0, rows_R)
                residual_TM = residual_TM.index_select(0, rows_R)
            normed_TM = add_rms_norm(layer.o(attended_TX), residual_TM, layer.mlp_norm, eps)
            x_TM = layer.down(silu_mul(layer.gate_up(normed_TM)))
        if x_TM is None:
            raise ValueError("a decoder needs a layer")
        return add_rms_norm(x_TM, residual_TM, weights.norm, eps)

    @torch.inference_mode()
    def logits(self, hidden_RM: torch.Tensor) -> torch.Tensor:
        """RV, in the model's dtype: of what ``forward`` gave, or of some of its rows."""
        return self._weights.lm_head(hidden_RM)

    def _decode_one(
        self,
        residual_1M: torch.Tensor,
        pool_NLCKBD: torch.Tensor,
        batches: Sequence[AttentionBatch],
        cos_11D: torch.Tensor,
        sin_11D: torch.Tensor,
    ) -> torch.Tensor:
        """The hidden state 1M of a single token."""
        weights, eps = self._weights, self.config.rms_eps
        for index, layer in enumerate(weights.layers):
            qkv, o, gate_up, down = layer.qkv, layer.o, layer.gate_up, layer.down
            qkv_1X = gemv(residual_1M, qkv.weight_OI, qkv.bias_O, (layer.attention_norm, eps))
            group, place = self._places[index]
            kv_NCKBD = BlockLayout.layer(pool_NLCKBD, place)
            attended_1X = self._attend(qkv_1X, kv_NCKBD, batches[group], cos_11D, sin_11D)
            gemv_add(attended_1X, o.weight_OI, o.bias_O, residual_1M)
            inner_1F = gemv_gated(residual_1M, gate_up.weight_OI, gate_up.bias_O, (layer.mlp_norm, eps))
            gemv_add(inner_1F, down.weight_OI, down.bias_O, residual_1M)
        return rms_norm(residual_1M, weights.norm, eps)

    def _attend(
        self,
        qkv_TX: torch.Tensor,
        kv_NCKBD: torch.Tensor,
        batch: AttentionBatch,
        cos_T1D: torch.Tensor,
        sin_T1D: torch.Tensor,
    ) -> torch.Tensor:
        """Heads of each token side by side."""
        config = self.config
        num_heads = config.num_heads + 2 * config.num_kv_heads
        qkv_TXD = qkv_TX.view(len(qkv_TX), num_heads, config.head_dim)
        query_THD = rope_kv_write(
            qkv_TXD, cos_T1D, sin_T1D, kv_NCKBD, batch.slot_blocks_T, batch.slot_offsets_T
        )
        return paged_attention(query_THD, kv_NCKBD, batch, self._scale).flatten(1)
