"""Attention over the paged KV cache, on the CPU, in torch's own operations.

It serves where the native kernels (``kernels.cpu``) cannot be compiled, and checks them where they can.

Shapes: ``T`` packed query tokens, ``S`` sequences, ``M`` blocks of the longest of them, ``N`` blocks of
the pool, ``C = 2`` for key and value, ``K`` KV heads, ``H`` query heads, ``G = H / K`` query heads a KV
head, ``B`` positions a block, ``D`` head size, ``P = M * B`` positions with their padding.

``kv_NCKBD`` is one layer's strided view of the pool; inside it each *tile* ``BD`` is contiguous, so the
layer can be read as a table of tiles or of *lines* ``D``, whatever the order of blocks and layers. One
gather of tiles then puts a sequence's keys in order, and the batched SDPA reads them with the ``G`` query
heads of a KV head packed into one small matrix. Gathering blocks and then transposing them measured four
times slower; a product for each block, combined afterwards, no faster than the padded whole.

A position that holds no token of the sequence may hold anything, NaN included: it is cleared in the
gathered copy, because the zero weight that the mask gives it does not silence a NaN value.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

Int64Array = npt.NDArray[np.int64]

# A group of decodes is one SDPA call padded to its longest member. Padding is cheaper than another call
# up to about this many positions, or this share of the group; the last bounds the gathered copy.
_GROUP_PADDING = 512
_GROUP_PADDING_SHARE = 1 / 8
_GROUP_POSITIONS = 8_192


@dataclass(slots=True)
class _Decodes:
    """Sequences with one query token each, padded to a common length ``P`` and attended to together."""

    tokens_S: torch.Tensor
    tiles: torch.Tensor
    """Tile of each (C, S, K, M) in the layer's table of tiles; flat."""
    padding: torch.Tensor
    """Lines of the gathered (C, S, K, P) that hold no token of their sequence; flat."""
    mask_S11P: torch.Tensor
    """0 where there is a token that the query sees, -inf elsewhere; added to the scores."""


@dataclass(slots=True)
class _Prefill:
    """A sequence with any number of query tokens, the last ones of its context."""

    start: int
    end: int
    """Its query tokens are [start, end) of the packed ones."""
    num_keys: int
    """The context, from the first block on that a query sees anything of."""
    tiles: torch.Tensor
    """Tile of each (C, K, M), flat."""
    hidden: int
    """The first keys that no query sees: what their block holds there may be anything."""
    mask_TP: torch.Tensor | None
    """True where a query sees a key. None where the queries are the whole context: plainly causal."""


@dataclass(slots=True)
class _Gathers:
    """Where a step's keys and values lie in the layer's table of tiles or lines."""

    slot_lines: torch.Tensor
    """Line of each (C, T, K), flat."""
    decodes: list[_Decodes]
    prefills: list[_Prefill]
    scratch: torch.Tensor
    """Room for the largest gather of the step, reused by each: fresh pages cost as much as the copy."""


@dataclass(eq=False)
class AttentionBatch:
    """One step's metadata, made once and shared by all layers. Make it with ``build``."""

    num_decodes: int
    query_starts: list[int]
    """S + 1 offsets into the packed tokens."""
    context_lens: list[int]
    """Tokens of each sequence, this step's queries included."""
    block_tables_SM: torch.Tensor
    """int32 device block ids. Entries behind a sequence's last block are never followed."""
    starts_S1: Int64Array
    lens_S: Int64Array
    """``query_starts`` and ``context_lens`` as arrays."""
    positions_T: torch.Tensor
    """int64 position of each query token in its sequence."""
    slot_blocks_T: torch.Tensor
    slot_offsets_T: torch.Tensor
    """int64: the block and the position in it where a token's key and value go."""
    window: int | None
    """Positions that a query sees, its own included; None: all before it."""
    _kv_NCKBD: torch.Tensor

    @classmethod
    def build(
        cls,
        num_decodes: int,
        query_starts: list[int],
        context_lens: list[int],
        block_tables_SM: torch.Tensor,
        kv_NCKBD: torch.Tensor,
        window: int | None = None,
    ) -> "AttentionBatch":
        """The first ``num_decodes`` sequences have exactly one query token each.

        ``kv_NCKBD`` is any layer's view of the pool: its shape, strides and dtype are those of every layer.
        With a ``window`` the query at position i sees those of (i - window, i]; entries of the block tables
        for blocks that no query sees anything of are never followed.
        """
        starts_S1 = np.asarray(query_starts, dtype=np.int64)
        lens_S = np.asarray(context_lens, dtype=np.int64)
        counts_S = np.diff(starts_S1)
        sequence_T = np.repeat(np.arange(len(lens_S)), counts_S)
        positions_T = np.arange(starts_S1[-1]) + (lens_S - counts_S - starts_S1[:-1])[sequence_T]
        block_size = kv_NCKBD.shape[3]
        slot_blocks_T = block_tables_SM.numpy()[sequence_T, positions_T // block_size]
        return cls(
            num_decodes=num_decodes,
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables_SM=block_tables_SM,
            starts_S1=starts_S1,
            lens_S=lens_S,
            positions_T=torch.from_numpy(positions_T),
            slot_blocks_T=torch.from_numpy(slot_blocks_T.astype(np.int64)),
            slot_offsets_T=torch.from_numpy(positions_T % block_size),
            window=window,
            _kv_NCKBD=kv_NCKBD,
        )

    @cached_property
    def gathers(self) -> _Gathers:
        """What this file's functions need; the native kernels do without."""
        kv_NCKBD = self._kv_NCKBD
        strides = _TileStrides.of(kv_NCKBD)
        block_size, head_dim = kv_NCKBD.shape[3:]
        tables_SM = self.block_tables_SM.numpy()
        slot_tiles_CT = strides.tiles(self.slot_blocks_T.numpy()[:, None])[:, :, :, 0]
        slot_lines_CTK = slot_tiles_CT * block_size + self.slot_offsets_T.numpy()[None, :, None]
        # [hidden, lens) is what each sequence's first query sees, and all behind it.
        hidden_S = np.zeros_like(self.lens_S)
        if self.window is not None:
            hidden_S = np.maximum(0, self.lens_S - np.diff(self.starts_S1) + 1 - self.window)
        skipped_S = hidden_S // block_size
        hidden_S, lens_S = hidden_S % block_size, self.lens_S - skipped_S * block_size
        if skipped_S.any():
            columns_SM = skipped_S[:, None] + np.arange(tables_SM.shape[1])
            tables_SM = np.take_along_axis(tables_SM, columns_SM.clip(max=tables_SM.shape[1] - 1), axis=1)
        decodes = [
            _build_decodes(rows_S, hidden_S[rows_S], lens_S[rows_S], tables_SM, strides, kv_NCKBD)
            for rows_S in _group_by_length(lens_S[: self.num_decodes], block_size)
        ]
        prefills = [
            _build_prefill(
                self.query_starts[s],
                self.query_starts[s + 1],
                int(hidden_S[s]),
                int(lens_S[s]),
                tables_SM[s],
                strides,
                block_size,
                self.window,
            )
            for s in range(self.num_decodes, len(self.context_lens))
        ]
        tiles = [group.tiles for group in decodes] + [chunk.tiles for chunk in prefills]
        return _Gathers(
            slot_lines=torch.from_numpy(slot_lines_CTK.reshape(-1)),
            decodes=decodes,
            prefills=prefills,
            scratch=kv_NCKBD.new_empty((max(map(len, tiles), default=0), block_size * head_dim)),
        )


def write_kv(
    key_TKD: torch.Tensor, value_TKD: torch.Tensor, kv_NCKBD: torch.Tensor, batch: AttentionBatch
) -> None:
    """Store the step's keys and values in the slots of their tokens."""
    head_dim = kv_NCKBD.shape[-1]
    written_CTKD = torch.stack((key_TKD, value_TKD))
    _rows_of(kv_NCKBD, head_dim).index_copy_(0, batch.gathers.slot_lines, written_CTKD.view(-1, head_dim))


def paged_attention(
    query_THD: torch.Tensor, kv_NCKBD: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """Causal attention of the step's queries over their sequences' keys and values; THD.

    The keys and values of the queries themselves must be written before (``write_kv``). Scores and
    softmax are in fp32 whatever the dtype of the pool, which is that of the query and of the result.
    """
    _, num_heads, head_dim = query_THD.shape
    num_kv_heads, block_size = kv_NCKBD.shape[2:4]
    tiles = _rows_of(kv_NCKBD, block_size * head_dim)
    out_THD = query_THD.new_empty(query_THD.shape)

    for group in batch.gathers.decodes:
        lines = _gather(tiles, group.tiles, batch.gathers.scratch).view(-1, head_dim)
        lines.index_fill_(0, group.padding, 0)
        num_seqs = len(group.tokens_S)
        key_SKPD, value_SKPD = lines.view(2, num_seqs, num_kv_heads, -1, head_dim)
        query_SKGD = query_THD.index_select(0, group.tokens_S).view(num_seqs, num_kv_heads, -1, head_dim)
        out_SKGD = scaled_dot_product_attention(
            query_SKGD, key_SKPD, value_SKPD, attn_mask=group.mask_S11P, scale=scale
        )
        out_THD.index_copy_(0, group.tokens_S, out_SKGD.reshape(num_seqs, num_heads, head_dim))

    for chunk in batch.gathers.prefills:
        gathered_CKPD = _gather(tiles, chunk.tiles, batch.gathers.scratch).view(2, num_kv_heads, -1, head_dim)
        gathered_CKPD[:, :, : chunk.hidden] = 0
        key_1KPD, value_1KPD = gathered_CKPD[:, None, :, : chunk.num_keys]
        query_1HTD = query_THD[chunk.start : chunk.end].transpose(0, 1).unsqueeze(0)
        out_1HTD = scaled_dot_product_attention(
            query_1HTD,
            key_1KPD,
            value_1KPD,
            attn_mask=chunk.mask_TP,
            is_causal=chunk.mask_TP is None,
            scale=scale,
            enable_gqa=True,
        )
        out_THD[chunk.start : chunk.end] = out_1HTD[0].transpose(0, 1)
    return out_THD


@dataclass(frozen=True, slots=True)
class _TileStrides:
    """Distance in tiles from one block, from key to value, and from one KV head to the next."""

    block: int
    kind: int
    head: int
    num_kv_heads: int

    @classmethod
    def of(cls, kv_NCKBD: torch.Tensor) -> "_TileStrides":
        tile = kv_NCKBD.shape[3] * kv_NCKBD.shape[4]
        block, kind, head = (stride // tile for stride in kv_NCKBD.stride()[:3])
        return cls(block, kind, head, kv_NCKBD.shape[2])

    def tiles(self, blocks_SM: npt.NDArray[np.integer]) -> Int64Array:
        """Tile of each (C, S, K, M) for a table of blocks SM."""
        heads_K1 = (np.arange(self.num_kv_heads) * self.head)[:, None]
        kinds_C111 = (np.arange(2) * self.kind)[:, None, None, None]
        return kinds_C111 + heads_K1 + blocks_SM.astype(np.int64)[None, :, None, :] * self.block


def _group_by_length(lens_S: Int64Array, block_size: int) -> list[Int64Array]:
    """Sequences of similar length, each group as row numbers of ``lens_S``, longest first."""
    order = np.argsort(-lens_S, kind="stable")
    padded_lens = (-(-lens_S[order] // block_size) * block_size).tolist()
    groups: list[Int64Array] = []
    first = padding = 0
    for i, length in enumerate(padded_lens):
        longest = padded_lens[first]
        positions = longest * (i + 1 - first)
        padding += longest - length
        allowed = max(_GROUP_PADDING, positions * _GROUP_PADDING_SHARE)
        if i > first and (padding > allowed or positions > _GROUP_POSITIONS):
            groups.append(order[first:i])
            first, padding = i, 0
    if len(order):
        groups.append(order[first:])
    return groups


def _build_decodes(
    rows_S: Int64Array,
    hidden_S: Int64Array,
    lens_S: Int64Array,
    tables_SM: npt.NDArray[np.int32],
    strides: _TileStrides,
    kv_NCKBD: torch.Tensor,
) -> _Decodes:
    block_size = kv_NCKBD.shape[3]
    num_blocks = -(-int(lens_S.max()) // block_size)
    positions_P = np.arange(num_blocks * block_size)
    absent_SP = (positions_P >= lens_S[:, None]) | (positions_P < hidden_S[:, None])
    # Behind the last block of a shorter sequence any block will do: its copy is cleared.
    behind_SM = positions_P[::block_size] >= lens_S[:, None]
    blocks_SM = np.where(behind_SM, 0, tables_SM[rows_S, :num_blocks])
    absent_CSKP = np.broadcast_to(
        absent_SP[None, :, None], (2, len(rows_S), strides.num_kv_heads, absent_SP.shape[1])
    )
    mask_SP = torch.zeros(absent_SP.shape, dtype=kv_NCKBD.dtype)
    mask_SP.masked_fill_(torch.from_numpy(absent_SP), -torch.inf)
    return _Decodes(
        # A decode's token has the number of its sequence: decodes come first.
        tokens_S=torch.from_numpy(rows_S),
        tiles=torch.from_numpy(strides.tiles(blocks_SM).reshape(-1)),
        padding=torch.from_numpy(np.flatnonzero(absent_CSKP)),
        mask_S11P=mask_SP[:, None, None],
    )


def _build_prefill(
    start: int,
    end: int,
    hidden: int,
    num_keys: int,
    table_M: npt.NDArray[np.int32],
    strides: _TileStrides,
    block_size: int,
    window: int | None,
) -> _Prefill:
    num_blocks = -(-num_keys // block_size)
    count = end - start
    past = num_keys - count
    mask_TP = None
    if past or (window is not None and count > window):
        mask_TP = torch.ones((count, num_keys), dtype=torch.bool).tril_(past)
        if window is not None:
            mask_TP.triu_(past + 1 - window)
    tiles = torch.from_numpy(strides.tiles(table_M[None, :num_blocks]).reshape(-1))
    return _Prefill(start, end, num_keys, tiles, hidden, mask_TP)


def _rows_of(kv_NCKBD: torch.Tensor, width: int) -> torch.Tensor:
    """The memory that the layer's view spans as rows of ``width`` elements: a tile or a line."""
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(kv_NCKBD.shape, kv_NCKBD.stride(), strict=True)
    )
    return kv_NCKBD.as_strided((extent // width, width), (width, 1))


def _gather(rows: torch.Tensor, indices: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    return torch.index_select(rows, 0, indices, out=scratch[: len(indices)])
