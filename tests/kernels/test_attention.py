"""Paged attention and the KV write, against the plain reference and against themselves rearranged.

Shapes as in ``kernels/attention.py``.
"""

from dataclasses import dataclass, field

import pytest
import torch
from paged_cases import make_case

from tidegate.kernels.attention import AttentionBatch, paged_attention, write_kv
from tidegate.kernels.reference import paged_attention_reference, write_kv_reference

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NUM_LAYERS, LAYER = 3, 1

# (query tokens, context) of each sequence; those with one query token come first.
MIXED = [(1, 1), (1, 40), (1, 33), (1, 300), (1, 32), (1, 64), (5, 5), (64, 64), (7, 50), (33, 97), (2, 129)]
ONLY_DECODES = [(1, length) for length in (31, 32, 33, 1, 900, 2, 16, 31)]
ONLY_PREFILLS = [(64, 64), (1, 20), (17, 2000)]


@dataclass
class Case:
    """Keys, values and queries of some sequences, free of any pool: laid out afresh by ``run``."""

    shapes: list[tuple[int, int]]
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    num_decodes: int = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        kv_shape = (self.num_kv_heads, self.head_dim)
        self.keys = [random(context, *kv_shape) for _, context in self.shapes]
        self.values = [random(context, *kv_shape) for _, context in self.shapes]
        self.queries = [random(count, self.num_heads, self.head_dim) for count, _ in self.shapes]
        self.num_decodes = next(
            (i for i, (count, _) in enumerate(self.shapes) if count > 1), len(self.shapes)
        )

    def run(
        self,
        block_size: int = 32,
        order: list[int] | None = None,
        shuffle_blocks: int = 0,
        layer_major: bool = False,
        attention=paged_attention,
        write=write_kv,
    ) -> list[torch.Tensor]:
        """Output of each sequence, in the case's order, with every slot that holds no token set to NaN."""
        order = list(range(len(self.shapes))) if order is None else order
        counts = [self.shapes[i][0] for i in order]
        contexts = [self.shapes[i][1] for i in order]
        num_blocks = [-(-context // block_size) for context in contexts]
        total = sum(num_blocks) + 3
        shape = (total, NUM_LAYERS, 2, self.num_kv_heads, block_size, self.head_dim)
        if layer_major:
            pool = torch.full((NUM_LAYERS, total, *shape[2:]), torch.nan, dtype=self.dtype).transpose(0, 1)
        else:
            pool = torch.full(shape, torch.nan, dtype=self.dtype)
        kv = pool[:, LAYER]

        ids = torch.randperm(total, generator=torch.Generator().manual_seed(shuffle_blocks)).int()
        tables = torch.full((len(order), max(num_blocks) + 2), 2**31 - 1, dtype=torch.int32)
        first = 0
        for s, count in enumerate(num_blocks):
            tables[s, :count] = ids[first : first + count]
            first += count

        # The past is in the pool before the step; the step's own keys and values are written by it.
        for s, i in enumerate(order):
            for position in range(contexts[s] - counts[s]):
                block, offset = divmod(position, block_size)
                kv[tables[s, block], 0, :, offset] = self.keys[i][position]
                kv[tables[s, block], 1, :, offset] = self.values[i][position]

        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        num_decodes = next((s for s, count in enumerate(counts) if count > 1), len(counts))
        batch = AttentionBatch.build(num_decodes, starts, contexts, tables, kv)
        others = pool[:, [layer for layer in range(NUM_LAYERS) if layer != LAYER]].clone()
        write(
            torch.cat([self.keys[i][-count:] for i, count in zip(order, counts, strict=True)]),
            torch.cat([self.values[i][-count:] for i, count in zip(order, counts, strict=True)]),
            kv,
            batch,
        )
        query = torch.cat([self.queries[i] for i in order])
        out = attention(query, kv, batch, self.head_dim**-0.5)
        torch.testing.assert_close(pool[:, [0, 2]], others, equal_nan=True, rtol=0, atol=0)
        pieces = dict(zip(order, out.split(counts), strict=True))
        return [pieces[i] for i in range(len(order))]

    def expected(self) -> list[torch.Tensor]:
        """Softmax attention in fp64 with no pool at all."""
        outs = []
        for key, value, query in zip(self.keys, self.values, self.queries, strict=True):
            group = self.num_heads // self.num_kv_heads
            keys = key.double().repeat_interleave(group, 1)
            values = value.double().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,xhd->hqx", query.double(), keys) * self.head_dim**-0.5
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(key) - len(query) + 1)
            outs.append(
                torch.einsum("hqx,xhd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
            )
        return outs


def relative_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest of the sequences' errors, each as a norm relative to its own output's."""
    return max(
        ((g.double() - e.double()).norm() / e.double().norm()).item()
        for g, e in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shapes", [MIXED, ONLY_DECODES, ONLY_PREFILLS], ids=["mixed", "decodes", "prefills"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 32), (3, 1, 40), (14, 2, 64), (4, 4, 16)]
)
def test_attention_is_within_the_dtype_limit_of_fp64(shapes, num_heads, num_kv_heads, head_dim, dtype):
    """Decodes, fresh prefills and later chunks together; head groups of 1, 3, 4 and 7."""
    case = Case(shapes, num_heads, num_kv_heads, head_dim, dtype)
    assert relative_error(case.run(), case.expected()) < LIMITS[dtype]


def test_reference_agrees_with_attention_without_a_pool():
    """The oracle itself is checked against a formula that knows nothing of blocks."""
    case = Case(MIXED, dtype=torch.float64)
    got = case.run(attention=paged_attention_reference, write=write_kv_reference)
    assert relative_error(got, case.expected()) < 1e-14


@pytest.mark.parametrize("window", [2, 7, 33, 64, 5000])
@pytest.mark.parametrize(
    ("attention", "write", "limit"),
    [(paged_attention, write_kv, 1e-5), (paged_attention_reference, write_kv_reference, 1e-5)],
    ids=["torch", "reference"],
)
def test_a_query_sees_its_window_and_reads_no_block_before_it(window, attention, write, limit):
    """What lies before the windows is NaN or nowhere, for decodes, fresh prefills and later chunks."""
    for block_size in (8, 32):
        case = make_case(MIXED, head_dim=32, block_size=block_size, window=window)
        batch = AttentionBatch.build(
            case.num_decodes,
            case.query_starts,
            case.context_lens,
            case.block_tables_SM,
            case.kv_NCKBD,
            window,
        )
        write(case.key_TKD, case.value_TKD, case.kv_NCKBD, batch)
        assert max(case.errors(attention(case.query_THD, case.kv_NCKBD, batch, case.scale))) < limit


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_page_size_does_not_matter(block_size):
    case = Case(MIXED)
    assert relative_error(case.run(block_size), case.expected()) < LIMITS[torch.float32]


def test_order_of_blocks_and_of_layers_in_memory_does_not_matter():
    """The same numbers are read in the same order, so the outputs are equal to the bit."""
    case = Case(MIXED)
    plain = case.run()
    for other in (case.run(shuffle_blocks=7), case.run(layer_major=True)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_order_of_the_batch_does_not_matter():
    case = Case(MIXED)
    order = [5, 0, 3, 4, 1, 2, 9, 6, 10, 8, 7]
    assert relative_error(case.run(order=order), case.run()) < 1e-6


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_sequence_attends_the_same_alone_and_in_a_batch(dtype):
    case = Case(MIXED, dtype=dtype)
    for i, together in enumerate(case.run()):
        alone = Case(MIXED, dtype=dtype)
        for name in ("shapes", "keys", "values", "queries"):
            setattr(alone, name, [getattr(alone, name)[i]])
        assert relative_error(alone.run(), [together]) < LIMITS[dtype] / 10


def test_many_decodes_of_very_different_lengths_are_all_written():
    """Enough lengths for several groups, one of them longer than a group may be."""
    lengths = [20_000, 3, 700, 650, 1, 2500, 64, 2400, *range(1, 60)]
    case = Case([(1, length) for length in lengths], num_heads=2, num_kv_heads=1, head_dim=16)
    assert relative_error(case.run(), case.expected()) < LIMITS[torch.float32]


def test_a_write_touches_its_own_slots_only():
    """Every other line of the layer keeps its bits."""
    kv = torch.zeros(6, 2, 2, 16, 8)
    tables = torch.tensor([[4, 1], [2, 5]], dtype=torch.int32)
    batch = AttentionBatch.build(1, [0, 1, 4], [17, 18], tables, kv)
    write_kv(torch.ones(4, 2, 8), torch.full((4, 2, 8), 2.0), kv, batch)
    written = {(block, offset) for block, offset in kv[:, 0, 0, :, 0].nonzero().tolist()}
    assert written == {(1, 0), (2, 15), (5, 0), (5, 1)}
    assert kv[:, 0].sum() == 4 * 2 * 8
    assert kv[:, 1].sum() == 2 * 4 * 2 * 8


def test_an_empty_step_builds_and_attends():
    kv = torch.zeros(2, 2, 1, 16, 8)
    batch = AttentionBatch.build(0, [0], [], torch.zeros(0, 1, dtype=torch.int32), kv)
    assert paged_attention(torch.zeros(0, 1, 8), kv, batch, 1.0).shape == (0, 1, 8)
