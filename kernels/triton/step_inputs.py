# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""What a step reads of the rows that live on the device, and what it leaves there and for the host.

The rows' tokens, block tables and parameters stay on the device from step to step. A step's news comes as a
*packet* in pinned host memory, which ``apply_packet`` reads where it lies, and its tokens leave through
pinned memory too: so neither waits in the queue of a copy engine behind blocks on their way to the host.

Legend: T packed tokens, S sequences, R rows that sample, M blocks of the longest row, L positions of the
longest row, B positions a block. A row number below 0 is padding.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SEGMENT_WORDS = 1024
"""The most words of one segment: a program reads them all at once."""
SEGMENT_FIELDS = 3
"""(first word of the target, first word of the packet, number of words)"""


def apply_packet(words: torch.Tensor, packet: torch.Tensor, num_segments: int) -> None:
    """Store each segment of ``packet`` at its place in ``words``; both int32 and flat.

    The packet begins with ``num_segments`` segments of three numbers; it may lie in pinned host memory.
    """
    if words.dtype != torch.int32 or packet.dtype != torch.int32:
        raise ValueError("words, packet: must be int32")
    if SEGMENT_FIELDS * num_segments > len(packet):
        raise ValueError(f"packet: {len(packet)} words hold no {num_segments} segments")
    if num_segments:
        _apply_kernel[(num_segments,)](words, packet, WORDS=SEGMENT_WORDS, num_warps=4, enable_fp_fusion=True)


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """One entry for each token."""

    token_ids_T: torch.Tensor
    """int64; 0 for padding, as the positions are."""
    positions_T: torch.Tensor
    """int64."""
    context_lens_T: torch.Tensor
    """int32: tokens up to this one; 0 for padding."""
    slot_blocks_T: torch.Tensor
    """int64; -1 for padding, whose key and value go nowhere."""
    slot_offsets_T: torch.Tensor
    """int64."""


def token_inputs(
    rows_T: torch.Tensor,
    positions_T: torch.Tensor,
    tokens_XL: torch.Tensor,
    tables_XM: torch.Tensor,
    block_size: int,
) -> TokenInputs:
    """Look the tokens up in the rows' tokens XL and block tables XM; everything int32."""
    num_tokens = len(rows_T)
    longs = rows_T.new_empty((4, num_tokens), dtype=torch.int64)
    inputs = TokenInputs(longs[0], longs[1], rows_T.new_empty(num_tokens), longs[2], longs[3])
    if num_tokens:
        tile = 128
        _token_inputs_kernel[(triton.cdiv(num_tokens, tile),)](
            inputs.token_ids_T,
            inputs.positions_T,
            inputs.context_lens_T,
            inputs.slot_blocks_T,
            inputs.slot_offsets_T,
            rows_T,
            positions_T,
            tokens_XL,
            tables_XM,
            num_tokens,
            tokens_XL.stride(0),
            tables_XM.stride(0),
            BLOCK_SIZE=block_size,
            TILE=tile,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return inputs


def gather_tables(
    rows_S: torch.Tensor, context_lens_S: torch.Tensor, tables_XM: torch.Tensor, width: int, block_size: int
) -> torch.Tensor:
    """The sequences' block tables side by side, (S, width); entries behind the last block are undefined."""
    num_sequences = len(rows_S)
    tables_SM = rows_S.new_empty((num_sequences, width))
    if num_sequences:
        _gather_tables_kernel[(num_sequences,)](
            tables_SM,
            rows_S,
            context_lens_S,
            tables_XM,
            width,
            tables_XM.stride(0),
            BLOCK_SIZE=block_size,
            TILE=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return tables_SM


def store_sampled(
    token_ids_R: torch.Tensor,
    finite_R: torch.Tensor,
    rows_R: torch.Tensor,
    positions_R: torch.Tensor,
    tokens_XL: torch.Tensor,
    ring: torch.Tensor,
    place_1: torch.Tensor,
) -> None:
    """Write each token to its row, where it fits, and to the host's ring.

    ``ring``: int32, flat, pinned. ``place_1``: int32, the word of the ring where the first token goes; each
    takes two words, itself and 1 where its logits were finite. Padding rows leave the ring's words alone.
    """
    num_rows = len(token_ids_R)
    if num_rows:
        _store_sampled_kernel[(triton.cdiv(num_rows, 128),)](
            ring,
            tokens_XL,
            token_ids_R,
            finite_R,
            rows_R,
            positions_R,
            place_1,
            num_rows,
            tokens_XL.shape[1],
            tokens_XL.stride(0),
            TILE=128,
            num_warps=4,
            enable_fp_fusion=True,
        )


def store_words(ring: torch.Tensor, first: int, words: torch.Tensor) -> None:
    """Write int32 words to the host's ring, from its word ``first`` on."""
    if words.dtype != torch.int32 or not words.is_contiguous():
        raise ValueError("words: must be int32 and contiguous")
    count = words.numel()
    if first < 0 or first + count > len(ring):
        raise ValueError(f"ring: {count} words from {first} on do not fit into {len(ring)}")
    if count:
        _store_words_kernel[(triton.cdiv(count, 1024),)](
            ring, words, first, count, TILE=1024, num_warps=4, enable_fp_fusion=True
        )


def copy_blocks(pool_NX: torch.Tensor, sources_P: torch.Tensor, targets_P: torch.Tensor) -> None:
    """Copy whole blocks within the pool, given as rows of int32 words; sources and targets are disjoint."""
    if len(sources_P):
        words = pool_NX.shape[1]
        tile = 4096
        _copy_blocks_kernel[(len(sources_P), triton.cdiv(words, tile))](
            pool_NX,
            sources_P,
            targets_P,
            words,
            pool_NX.stride(0),
            TILE=tile,
            num_warps=8,
            enable_fp_fusion=True,
        )


@triton.jit
def _apply_kernel(
    words_ptr,
    packet_ptr,
    WORDS: tl.constexpr,
):
    segment_ptr = packet_ptr + tl.program_id(0) * 3
    target = tl.load(segment_ptr).to(tl.int64)
    source = tl.load(segment_ptr + 1)
    count = tl.load(segment_ptr + 2)
    places = tl.arange(0, WORDS)
    exists = places < count
    words = tl.load(packet_ptr + source + places, mask=exists, other=0)
    tl.store(words_ptr + target + places, words, mask=exists)


@triton.jit
def _token_inputs_kernel(
    token_ids_ptr,  # (T,) int64
    positions_out_ptr,  # (T,) int64
    context_lens_ptr,  # (T,) int32
    slot_blocks_ptr,  # (T,) int64
    slot_offsets_ptr,  # (T,) int64
    rows_ptr,  # (T,) int32
    positions_ptr,  # (T,) int32
    tokens_ptr,  # (X, L) int32
    tables_ptr,  # (X, M) int32
    num_tokens,
    tokens_stride,
    tables_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    places_T = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists_T = places_T < num_tokens
    rows_T = tl.load(rows_ptr + places_T, mask=exists_T, other=-1).to(tl.int64)
    real_T = rows_T >= 0
    positions_T = tl.load(positions_ptr + places_T, mask=exists_T & real_T, other=0)
    token_ids_T = tl.load(tokens_ptr + rows_T * tokens_stride + positions_T, mask=real_T, other=0)
    blocks_T = tl.load(tables_ptr + rows_T * tables_stride + positions_T // BLOCK_SIZE, mask=real_T, other=-1)
    tl.store(token_ids_ptr + places_T, token_ids_T.to(tl.int64), mask=exists_T)
    tl.store(positions_out_ptr + places_T, positions_T.to(tl.int64), mask=exists_T)
    tl.store(context_lens_ptr + places_T, tl.where(real_T, positions_T + 1, 0), mask=exists_T)
    tl.store(slot_blocks_ptr + places_T, blocks_T.to(tl.int64), mask=exists_T)
    tl.store(slot_offsets_ptr + places_T, (positions_T % BLOCK_SIZE).to(tl.int64), mask=exists_T)


@triton.jit
def _gather_tables_kernel(
    tables_out_ptr,  # (S, M) int32
    rows_ptr,  # (S,) int32
    context_lens_ptr,  # (S,) int32
    tables_ptr,  # (X, M) int32
    width,
    tables_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    num_blocks = tl.minimum(tl.cdiv(tl.load(context_lens_ptr + sequence), BLOCK_SIZE), width)
    # Padding has no row: its length is 0, and nothing is read.
    for start in tl.range(0, num_blocks, TILE):
        places_M = start + tl.arange(0, TILE)
        exists_M = places_M < num_blocks
        blocks_M = tl.load(tables_ptr + row * tables_stride + places_M, mask=exists_M, other=0)
        tl.store(tables_out_ptr + sequence * width + places_M, blocks_M, mask=exists_M)


@triton.jit
def _store_sampled_kernel(
    ring_ptr,  # int32, the host's
    tokens_ptr,  # (X, L) int32
    token_ids_ptr,  # (R,) int64
    finite_ptr,  # (R,) int32
    rows_ptr,  # (R,) int32
    positions_ptr,  # (R,) int32
    place_ptr,  # (1,) int32
    num_rows,
    max_len,
    tokens_stride,
    TILE: tl.constexpr,
):
    places_R = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rows_R = tl.load(rows_ptr + places_R, mask=places_R < num_rows, other=-1).to(tl.int64)
    real_R = rows_R >= 0
    positions_R = tl.load(positions_ptr + places_R, mask=real_R, other=0)
    token_ids_R = tl.load(token_ids_ptr + places_R, mask=real_R, other=0).to(tl.int32)
    finite_R = tl.load(finite_ptr + places_R, mask=real_R, other=0)
    # A full row samples a token that nobody will read from it.
    fits_R = real_R & (positions_R < max_len)
    tl.store(tokens_ptr + rows_R * tokens_stride + positions_R, token_ids_R, mask=fits_R)
    ring_ptrs_R = ring_ptr + tl.load(place_ptr) + places_R * 2
    tl.store(ring_ptrs_R, token_ids_R, mask=real_R)
    tl.store(ring_ptrs_R + 1, finite_R, mask=real_R)


@triton.jit
def _store_words_kernel(ring_ptr, words_ptr, first, count, TILE: tl.constexpr):
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = places < count
    tl.store(ring_ptr + first + places, tl.load(words_ptr + places, mask=exists, other=0), mask=exists)


@triton.jit
def _copy_blocks_kernel(
    pool_ptr,  # (N, X) int32
    sources_ptr,  # (P,) int32
    targets_ptr,  # (P,) int32
    num_words,
    block_stride,
    TILE: tl.constexpr,
):
    pair = tl.program_id(0)
    source = tl.load(sources_ptr + pair).to(tl.int64) * block_stride
    target = tl.load(targets_ptr + pair).to(tl.int64) * block_stride
    places_X = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists_X = places_X < num_words
    words_X = tl.load(pool_ptr + source + places_X, mask=exists_X, other=0)
    tl.store(pool_ptr + target + places_X, words_X, mask=exists_X)
