"""Sequences laid out in a paged pool, with everything that no kernel may read set to NaN.

Shapes as in ``kernels/attention.py``; L layers.
"""

import math
from dataclasses import dataclass

import torch

NUM_LAYERS, LAYER = 2, 1


@dataclass
class PagedCase:
    """The pool before a step, the step's own query, key and value, and what attention must give."""

    num_decodes: int
    query_starts: list[int]
    context_lens: list[int]
    block_tables_SM: torch.Tensor
    pool_NLCKBD: torch.Tensor
    query_THD: torch.Tensor
    key_TKD: torch.Tensor
    value_TKD: torch.Tensor
    expected_THD: torch.Tensor
    """fp64."""
    window: int | None = None

    @property
    def kv_NCKBD(self) -> torch.Tensor:
        return self.pool_NLCKBD[:, LAYER]

    @property
    def scale(self) -> float:
        return self.query_THD.shape[-1] ** -0.5

    def errors(self, out_THD: torch.Tensor) -> list[float]:
        """Of each sequence, as a norm relative to its own output's; infinite where anything is NaN."""
        out_THD = out_THD.double()
        bounds = zip(self.query_starts[:-1], self.query_starts[1:], strict=True)
        norms = [
            ((out_THD[a:b] - self.expected_THD[a:b]).norm() / self.expected_THD[a:b].norm()).item()
            for a, b in bounds
        ]
        # Not NaN: the largest of some numbers and NaN may be a number.
        return [math.inf if math.isnan(norm) else norm for norm in norms]


def make_case(
    shapes: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    block_seed: int = 0,
    layer_major: bool = False,
    window: int | None = None,
) -> PagedCase:
    """``shapes``: (query tokens, context) of each sequence; those with one query token come first.

    The past of each sequence is in the pool, the step's own keys and values are not. ``block_seed`` changes
    nothing but the order of blocks. With a ``window`` what no query sees is NaN, and blocks with nothing else
    in them are nowhere.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    num_blocks = [-(-context // block_size) for _, context in shapes]
    total = sum(num_blocks) + 3
    pool_shape = (total, NUM_LAYERS, 2, num_kv_heads, block_size, head_dim)
    if layer_major:
        layers_first = (NUM_LAYERS, total, *pool_shape[2:])
        pool = torch.full(layers_first, torch.nan, dtype=dtype, device=device).transpose(0, 1)
    else:
        pool = torch.full(pool_shape, torch.nan, dtype=dtype, device=device)
    # Block 0, which a careless lookup gives, is never used.
    ids = 1 + torch.randperm(total - 1, generator=torch.Generator().manual_seed(block_seed))
    tables = torch.full((len(shapes), max(num_blocks, default=0) + 2), 2**31 - 1, dtype=torch.int32)

    queries, keys, values, expected = [], [], [], []
    first = 0
    for s, (count, context) in enumerate(shapes):
        tables[s, : num_blocks[s]] = ids[first : first + num_blocks[s]]
        first += num_blocks[s]
        key_XKD, value_XKD = random(context, num_kv_heads, head_dim), random(context, num_kv_heads, head_dim)
        query_QHD = random(count, num_heads, head_dim)
        seen = 0 if window is None else max(0, context - count + 1 - window)
        tables[s, : seen // block_size] = 2**31 - 1
        past_X = torch.arange(seen, context - count)
        blocks_X = tables[s, past_X // block_size].long().to(device)
        offsets_X = (past_X % block_size).to(device)
        pool[blocks_X, LAYER, 0, :, offsets_X] = key_XKD[past_X]
        pool[blocks_X, LAYER, 1, :, offsets_X] = value_XKD[past_X]
        queries.append(query_QHD)
        keys.append(key_XKD[context - count :])
        values.append(value_XKD[context - count :])
        expected.append(_attention(query_QHD, key_XKD, value_XKD, window))

    starts = [0]
    for count, _ in shapes:
        starts.append(starts[-1] + count)
    num_decodes = next((s for s, (count, _) in enumerate(shapes) if count > 1), len(shapes))
    return PagedCase(
        num_decodes=num_decodes,
        query_starts=starts,
        context_lens=[context for _, context in shapes],
        block_tables_SM=tables,
        pool_NLCKBD=pool,
        query_THD=torch.cat(queries),
        key_TKD=torch.cat(keys),
        value_TKD=torch.cat(values),
        expected_THD=torch.cat(expected),
        window=window,
    )


def _attention(
    query_QHD: torch.Tensor, key_XKD: torch.Tensor, value_XKD: torch.Tensor, window: int | None
) -> torch.Tensor:
    """In fp64, with no pool at all; the queries are the last of the context."""
    group = query_QHD.shape[1] // key_XKD.shape[1]
    key_XHD = key_XKD.double().repeat_interleave(group, 1)
    value_XHD = value_XKD.double().repeat_interleave(group, 1)
    scores_HQX = torch.einsum("qhd,xhd->hqx", query_QHD.double(), key_XHD) * query_QHD.shape[-1] ** -0.5
    hidden_QX = torch.ones(scores_HQX.shape[1:], dtype=torch.bool, device=query_QHD.device)
    past = len(key_XKD) - len(query_QHD)
    behind_QX = hidden_QX.triu(past + 1)
    hidden_QX = behind_QX if window is None else behind_QX | hidden_QX.tril(past - window)
    weights_HQX = scores_HQX.masked_fill(hidden_QX, -torch.inf).softmax(-1)
    return torch.einsum("hqx,xhd->qhd", weights_HQX, value_XHD)
