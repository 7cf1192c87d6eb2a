"""Attention over the paged KV cache, on a CUDA device: what ``kernels.attention`` is on the CPU.

Shapes as there, and P tiles of prefill. A step's metadata goes to the device in two copies, made once for
all layers; nothing is read back.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tidegate.kernels.triton.decode_attention import decode_attention, decode_tile_positions
from tidegate.kernels.triton.decode_plan import DecodePlan, plan_decode
from tidegate.kernels.triton.device import num_multiprocessors
from tidegate.kernels.triton.prefill_attention import prefill_attention, prefill_tiles


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's metadata, made once and shared by all layers. Make it with ``build`` or ``decodes``."""

    num_decodes: int
    context_lens_S: torch.Tensor
    """int32: tokens of each sequence, this step's queries included."""
    block_tables_SM: torch.Tensor
    """int32 device block ids. Entries behind a sequence's last block are never followed."""
    positions_T: torch.Tensor
    """int64 position of each query token in its sequence."""
    slot_blocks_T: torch.Tensor
    slot_offsets_T: torch.Tensor
    """int64: the block and the position in it where a token's key and value go; below 0, nowhere."""
    _decode_plan: DecodePlan
    """Of the first ``num_decodes`` sequences."""
    _prefill_tiles_P5: torch.Tensor
    """Of the sequences behind the decodes."""
    window: int | None = None
    """A query at position i sees the keys at (i - window, i]; None: at [0, i]."""

    @classmethod
    def build(
        cls,
        num_decodes: int,
        query_starts: list[int],
        context_lens: list[int],
        block_tables_SM: torch.Tensor,
        kv_NCKBD: torch.Tensor,
        num_heads: int,
        window: int | None = None,
    ) -> "AttentionBatch":
        """The first ``num_decodes`` sequences have exactly one query token each.

        ``block_tables_SM`` is the host's, and blocks that lie before every window are never followed;
        ``kv_NCKBD`` is any layer's view of the pool.
        """
        num_kv_heads, block_size, head_dim = kv_NCKBD.shape[2:]
        tables_SM = block_tables_SM.numpy()
        starts_S1 = np.asarray(query_starts, dtype=np.int64)
        lens_S = np.asarray(context_lens, dtype=np.int64)
        counts_S = np.diff(starts_S1)
        sequence_T = np.repeat(np.arange(len(lens_S)), counts_S)
        places_T = np.arange(starts_S1[-1]) + (lens_S - counts_S - starts_S1[:-1])[sequence_T]
        tiles_P5 = prefill_tiles(
            starts_S1[num_decodes:],
            lens_S[num_decodes:],
            num_heads // num_kv_heads,
            head_dim,
            kv_NCKBD.dtype,
            kv_NCKBD.device,
        )
        positions_T, slot_blocks_T, slot_offsets_T = _on_device(
            kv_NCKBD.device,
            places_T,
            tables_SM[sequence_T, places_T // block_size].astype(np.int64),
            places_T % block_size,
        )
        device_lens_S, device_tables_SM, device_tiles_P5 = _on_device(
            kv_NCKBD.device, lens_S.astype(np.int32), tables_SM, tiles_P5
        )
        return cls(
            num_decodes=num_decodes,
            context_lens_S=device_lens_S,
            block_tables_SM=device_tables_SM,
            positions_T=positions_T,
            slot_blocks_T=slot_blocks_T,
            slot_offsets_T=slot_offsets_T,
            _decode_plan=_plan(device_lens_S[:num_decodes], kv_NCKBD, window),
            _prefill_tiles_P5=device_tiles_P5,
            window=window,
        )

    @classmethod
    def decodes(
        cls,
        context_lens_S: torch.Tensor,
        block_tables_SM: torch.Tensor,
        kv_NCKBD: torch.Tensor,
        window: int | None = None,
    ) -> "AttentionBatch":
        """One query token for each sequence, with lengths and tables on the device: a CUDA graph can
        capture this, and replay it with what the tensors hold then.

        A sequence of length 0 is padding: it attends to nothing, and its key and value go nowhere.
        """
        block_size = kv_NCKBD.shape[3]
        positions_T = (context_lens_S.long() - 1).clamp_(min=0)
        slot_blocks_T = block_tables_SM.gather(1, (positions_T // block_size)[:, None])[:, 0].long()
        return cls.on_device(
            len(context_lens_S),
            context_lens_S,
            block_tables_SM,
            positions_T,
            slot_blocks_T.masked_fill_(context_lens_S == 0, -1),
            positions_T % block_size,
            context_lens_S.new_empty((0, 5)),
            kv_NCKBD,
            window,
        )

    @classmethod
    def on_device(
        cls,
        num_decodes: int,
        context_lens_S: torch.Tensor,
        block_tables_SM: torch.Tensor,
        positions_T: torch.Tensor,
        slot_blocks_T: torch.Tensor,
        slot_offsets_T: torch.Tensor,
        prefill_tiles_P5: torch.Tensor,
        kv_NCKBD: torch.Tensor,
        window: int | None = None,
    ) -> "AttentionBatch":
        """From what lies on the device already; the tiles are those of ``prefill_tiles``."""
        return cls(
            num_decodes=num_decodes,
            context_lens_S=context_lens_S,
            block_tables_SM=block_tables_SM,
            positions_T=positions_T,
            slot_blocks_T=slot_blocks_T,
            slot_offsets_T=slot_offsets_T,
            _decode_plan=_plan(context_lens_S[:num_decodes], kv_NCKBD, window),
            _prefill_tiles_P5=prefill_tiles_P5,
            window=window,
        )


def write_kv(
    key_TKD: torch.Tensor, value_TKD: torch.Tensor, kv_NCKBD: torch.Tensor, batch: AttentionBatch
) -> None:
    """Store the step's keys and values in the slots of their tokens."""
    kv_NCKBD[batch.slot_blocks_T, 0, :, batch.slot_offsets_T] = key_TKD
    kv_NCKBD[batch.slot_blocks_T, 1, :, batch.slot_offsets_T] = value_TKD


def paged_attention(
    query_THD: torch.Tensor, kv_NCKBD: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """Causal attention of the step's queries over their sequences' keys and values; THD.

    The keys and values of the queries themselves must be written before. Scores and softmax are in fp32
    whatever the dtype of the pool, which is that of the query and of the result.
    """
    out_THD = query_THD.new_empty(query_THD.shape)
    split = batch.num_decodes
    decode_attention(
        query_THD[:split], kv_NCKBD, batch.block_tables_SM[:split], batch._decode_plan, scale, out_THD[:split]
    )
    prefill_attention(
        query_THD,
        kv_NCKBD,
        batch.block_tables_SM[split:],
        batch._prefill_tiles_P5,
        scale,
        out_THD,
        batch.window,
    )
    return out_THD


def _plan(context_lens_S: torch.Tensor, kv_NCKBD: torch.Tensor, window: int | None) -> DecodePlan:
    num_kv_heads, _, head_dim = kv_NCKBD.shape[2:]
    granule = decode_tile_positions(head_dim, kv_NCKBD.dtype)
    return plan_decode(context_lens_S, num_kv_heads, granule, num_multiprocessors(kv_NCKBD.device), window)


def _on_device(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """The arrays, of one dtype, as tensors in one piece of device memory, sent in one copy."""
    host = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        host = host.pin_memory()
    flat = host.to(device, non_blocking=True)
    pieces = flat.split([array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
