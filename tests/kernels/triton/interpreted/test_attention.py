"""Decode and prefill attention over the paged cache, against fp64 and against themselves rearranged."""

import importlib
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from paged_cases import PagedCase, make_case

import tidegate.kernels.triton
from tidegate.kernels.attention import AttentionBatch as CpuBatch
from tidegate.kernels.attention import paged_attention as cpu_attention
from tidegate.kernels.attention import write_kv as cpu_write_kv
from tidegate.kernels.triton.attention import AttentionBatch, paged_attention, write_kv
from tidegate.kernels.triton.combine import combine_items
from tidegate.kernels.triton.decode_attention import decode_attention, decode_tile_positions
from tidegate.kernels.triton.decode_plan import plan_decode

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3}
# (query tokens, context) of each sequence: page edges, length 1, a long one that is split, fresh prefills,
# later chunks, and a chunk whose rows fill several tiles.
MIXED = [(1, 1), (1, 33), (1, 700), (1, 32), (1, 64), (5, 5), (64, 64), (7, 50), (40, 97), (2, 129)]
DECODES = [(1, length) for length in (31, 64, 65, 1, 900, 2)]


def attend(case: PagedCase) -> torch.Tensor:
    num_heads = case.query_THD.shape[1]
    batch = AttentionBatch.build(
        case.num_decodes,
        case.query_starts,
        case.context_lens,
        case.block_tables_SM,
        case.kv_NCKBD,
        num_heads,
        case.window,
    )
    write_kv(case.key_TKD, case.value_TKD, case.kv_NCKBD, batch)
    return paged_attention(case.query_THD, case.kv_NCKBD, batch, case.scale)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [
        (4, 4, 64, 16),
        (7, 1, 80, 32),
        (6, 2, 96, 64),
        (8, 2, 128, 64),
        (5, 1, 128, 16),
        (16, 1, 256, 32),
        (24, 2, 40, 16),
    ],
)
def test_attention_is_within_the_dtype_limit_of_fp64(num_heads, num_kv_heads, head_dim, block_size, dtype):
    case = make_case(
        MIXED,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    assert max(case.errors(attend(case))) < LIMITS[dtype]


@pytest.mark.parametrize("shapes", [DECODES, [(70, 70)], [(1, 20), (17, 300)]], ids=str)
def test_a_step_of_one_kind_attends_too(shapes):
    case = make_case(shapes)
    assert max(case.errors(attend(case))) < LIMITS[torch.float32]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("window", [1, 7, 32, 33, 100, 5000])
def test_a_window_is_seen_and_nothing_before_it(window, dtype):
    """From one narrower than a page or a tile to one wider than any context. Blocks before what the step's
    queries see are gone: the table leads nowhere, and what is left of a block is NaN.
    """
    case = make_case(MIXED, block_size=16, dtype=dtype, window=window)
    assert max(case.errors(attend(case))) < LIMITS[dtype]


def test_what_a_block_holds_before_the_window_is_not_read():
    case = make_case([(1, 30), (3, 31)], window=7)
    assert max(case.errors(attend(case))) < LIMITS[torch.float32]


@pytest.mark.parametrize(("head_dim", "block_size"), [(80, 64), (128, 32), (256, 16)])
def test_a_window_does_not_mind_head_and_page_size(head_dim, block_size):
    case = make_case(MIXED, num_heads=5, num_kv_heads=1, head_dim=head_dim, block_size=block_size, window=45)
    assert max(case.errors(attend(case))) < LIMITS[torch.float32]


@pytest.mark.parametrize("num_multiprocessors", [1, 3, 40])
def test_the_number_of_splits_of_a_window_does_not_matter(num_multiprocessors):
    case = make_case(DECODES, window=300)
    attend(case)
    lens_S = torch.tensor([*case.context_lens, 0], dtype=torch.int32)
    plan = plan_decode(lens_S, 2, decode_tile_positions(64, torch.float32), num_multiprocessors, case.window)
    query_SHD = torch.cat((case.query_THD, case.query_THD[:1]))
    tables_SM = torch.nn.functional.pad(case.block_tables_SM, (0, 0, 0, 1))
    out_SHD = torch.full_like(query_SHD, torch.nan)
    decode_attention(query_SHD, case.kv_NCKBD, tables_SM, plan, case.scale, out_SHD)
    assert max(case.errors(out_SHD[:-1])) < LIMITS[torch.float32]
    assert torch.equal(out_SHD[-1], torch.zeros(out_SHD.shape[1:]))


def test_it_is_what_the_cpu_device_computes():
    """The same step through the same three calls."""
    case, other = make_case(MIXED), make_case(MIXED)
    batch = CpuBatch.build(
        other.num_decodes, other.query_starts, other.context_lens, other.block_tables_SM, other.kv_NCKBD
    )
    cpu_write_kv(other.key_TKD, other.value_TKD, other.kv_NCKBD, batch)
    expected = cpu_attention(other.query_THD, other.kv_NCKBD, batch, other.scale)
    torch.testing.assert_close(attend(case), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case.pool_NLCKBD, other.pool_NLCKBD, rtol=0, atol=0, equal_nan=True)


def test_order_of_blocks_and_of_layers_in_memory_does_not_matter():
    """The same numbers are read in the same order, so the outputs are equal to the bit."""
    plain = attend(make_case(MIXED))
    assert torch.equal(plain, attend(make_case(MIXED, block_seed=7)))
    assert torch.equal(plain, attend(make_case(MIXED, layer_major=True)))


@pytest.mark.parametrize("block_size", [16, 64])
def test_page_size_does_not_matter(block_size):
    assert torch.equal(attend(make_case(MIXED)), attend(make_case(MIXED, block_size=block_size)))


@pytest.mark.parametrize("num_multiprocessors", [1, 3, 40])
def test_the_number_of_splits_does_not_matter(num_multiprocessors):
    """From contexts left whole to a split for each tile; each written, none with NaN."""
    case = make_case(DECODES)
    attend(case)
    lens_S = torch.tensor(case.context_lens, dtype=torch.int32)
    granule = decode_tile_positions(64, torch.float32)
    plan = plan_decode(lens_S, 2, granule, num_multiprocessors)
    out_SHD = torch.full_like(case.query_THD, torch.nan)
    decode_attention(case.query_THD, case.kv_NCKBD, case.block_tables_SM, plan, case.scale, out_SHD)
    assert max(case.errors(out_SHD)) < LIMITS[torch.float32]


def test_a_step_on_the_device_plans_itself_and_its_padding_gives_zero():
    """``decodes`` takes lengths from the device; a length of 0 is padding, and its table means nothing."""
    case = make_case(DECODES)
    attend(case)
    lens_S = torch.tensor([*case.context_lens, 0, 0], dtype=torch.int32)
    tables_SM = torch.nn.functional.pad(case.block_tables_SM, (0, 0, 0, 2))
    query_SHD = torch.cat((case.query_THD, case.query_THD[:2]))
    batch = AttentionBatch.decodes(lens_S, tables_SM, case.kv_NCKBD)
    out_SHD = paged_attention(query_SHD, case.kv_NCKBD, batch, case.scale)
    assert max(case.errors(out_SHD[:-2])) < LIMITS[torch.float32]
    assert torch.equal(out_SHD[-2:], torch.zeros(2, *out_SHD.shape[1:]))
    expected = [length - 1 for length in case.context_lens]
    assert batch.positions_T[:-2].tolist() == expected
    slots = [int(tables_SM[s, position // 32]) for s, position in enumerate(expected)]
    assert batch.slot_blocks_T[:-2].tolist() == slots
    assert batch.slot_offsets_T[:-2].tolist() == [position % 32 for position in expected]


@pytest.mark.parametrize(("num_kv_heads", "window"), [(1, None), (8, None), (1, 31), (8, 1), (1, 1000)])
def test_a_plan_covers_every_position_once(num_kv_heads, window):
    """Items lie in the order of sequences and positions, start at granules or with the window, and fit the
    grid's bound.
    """
    generator = np.random.default_rng(0)
    for longest, num_sequences in ((1, 1), (100, 3), (5000, 2), (40_000, 1), (3000, 40)):
        lens_S = generator.integers(0, longest + 1, num_sequences)
        plan = plan_decode(torch.from_numpy(lens_S.astype(np.int32)), num_kv_heads, 32, 132, window)
        first_items = plan.first_items_S1.tolist()
        assert first_items[0] == 0
        assert first_items[-1] <= len(plan.items_I4)
        items = plan.items_I4.tolist()
        for s, length in enumerate(lens_S.tolist()):
            mine = items[first_items[s] : first_items[s + 1]]
            assert all(item[0] == s and item[3] == len(mine) for item in mine)
            bounds = [item[1] for item in mine] + [length]
            assert [item[2] for item in mine] == bounds[1:]
            assert bounds[0] == (0 if window is None else max(0, length - window))
            assert all(start % 32 == 0 for start in bounds[1:-1])
            assert all(start < max(end, 1) for start, end in pairwise(bounds))


def test_long_contexts_are_cut_and_short_ones_are_not():
    lens_S = torch.tensor([60, 32_000, 60], dtype=torch.int32)
    first_items = plan_decode(lens_S, 2, 64, 132).first_items_S1.diff().tolist()
    assert first_items[0] == first_items[2] == 1
    assert first_items[1] > 20


def test_combining_gives_the_mean_by_weight_and_ignores_empty_parts():
    """A part of weight -inf counts for nothing, at the front, at the back, or as the only kind there is."""
    plan = plan_decode(torch.tensor([3000, 3000], dtype=torch.int32), 1, 64, 4)
    num_items = int(plan.first_items_S1[1])
    assert num_items > 2
    partial_IHD = torch.randn(len(plan.items_I4), 2, 40)
    lse_IH = torch.randn(len(plan.items_I4), 2) * 5
    lse_IH[0, 0] = lse_IH[num_items - 1, 0] = -torch.inf
    lse_IH[:, 1] = -torch.inf
    out_SHD = torch.full((2, 2, 40), torch.nan)
    combine_items(partial_IHD, lse_IH, plan, out_SHD)
    weights_IH = lse_IH[:num_items].double().exp2()
    expected_D = (weights_IH[:, 0, None] * partial_IHD[:num_items, 0]).sum(0) / weights_IH[:, 0].sum()
    torch.testing.assert_close(out_SHD[0, 0].double(), expected_D, rtol=1e-5, atol=1e-6)
    assert torch.equal(out_SHD[:, 1], torch.zeros(2, 40))


def test_blocks_far_apart_are_found(tmp_path):
    """A pool of more elements than 32 bits count, in a sparse file: only the pages that are used exist."""
    far = 2**30 + 64
    elements = 4 * far + 2 * 16 * 64
    memory = np.memmap(tmp_path / "pool", np.float16, "w+", shape=(elements,))
    kv = torch.from_numpy(memory).as_strided((5, 2, 1, 16, 64), (far, 16 * 64, 16 * 64, 64, 1))
    key_XD, value_XD = torch.randn(2, 16, 64).half()
    kv[4, 0, 0], kv[4, 1, 0] = key_XD, value_XD
    query_THD = torch.randn(4, 1, 64).half()
    tables_SM = torch.tensor([[4], [4]], dtype=torch.int32)
    batch = AttentionBatch.build(1, [0, 1, 4], [16, 16], tables_SM, kv, 1)
    out_THD = paged_attention(query_THD, kv, batch, 0.125)
    scores_TX = query_THD[:, 0].double() @ key_XD.double().T * 0.125
    for row, last in zip(range(4), (15, 13, 14, 15), strict=True):
        expected_D = scores_TX[row, : last + 1].softmax(0) @ value_XD[: last + 1].double()
        assert (out_THD[row, 0].double() - expected_D).norm() / expected_D.norm() < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_THD": torch.zeros(1, 3, 64)}, "query_THD"),
        ({"query_THD": torch.zeros(1, 4, 64, dtype=torch.float64)}, "query_THD"),
        ({"kv_NCKBD": torch.zeros(4, 2, 2, 32, 64).half()}, "kv_NCKBD"),
        ({"kv_NCKBD": torch.zeros(4, 2, 2, 48, 64)}, "not a power of two"),
        ({"kv_NCKBD": torch.zeros(4, 2, 2, 64, 32).transpose(3, 4)}, "contiguous"),
        ({"block_tables_SM": torch.zeros(1, 1, dtype=torch.int64)}, "block_tables_SM"),
        ({"scale": 0.0}, "scale"),
        ({"out_SHD": torch.zeros(1, 4, 64).half()}, "out_THD"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {
        "query_THD": torch.zeros(1, 4, 64),
        "kv_NCKBD": torch.zeros(4, 2, 2, 32, 64),
        "block_tables_SM": torch.zeros(1, 1, dtype=torch.int32),
        "plan": plan_decode(torch.ones(1, dtype=torch.int32), 2, 32, 4),
        "scale": 0.125,
        "out_SHD": torch.zeros(1, 4, 64),
    } | changes
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments.values())


FAULTS: dict[str, tuple[str, str, str, Callable[[Path], None]]] = {
    "a lost causal mask": (
        "online_softmax",
        'tl.where(positions_X[None, :] <= last_seen_R[:, None], scores_RX, -float("inf"))',
        "scores_RX",
        lambda _: test_a_step_of_one_kind_attends_too([(70, 70)]),
    ),
    "stale values read behind the end of a context": (
        "online_softmax",
        "value_XD = tl.load(value_ptr + offsets_XD, mask=mask_XD, other=0.0)",
        "value_XD = tl.load(value_ptr + offsets_XD)",
        lambda _: test_a_step_of_one_kind_attends_too(DECODES),
    ),
    "an offset of 32 bits": (
        "online_softmax",
        "block_ids_X.to(tl.int64) * block_stride",
        "block_ids_X * block_stride",
        lambda tmp_path: test_blocks_far_apart_are_found(tmp_path),
    ),
    "no guard for parts that are all empty": (
        "combine",
        'tl.where(new_largest == -float("inf"), 0.0, new_largest)',
        "new_largest",
        lambda _: test_combining_gives_the_mean_by_weight_and_ignores_empty_parts(),
    ),
    "no guard for an empty context": (
        "decode_attention",
        "tl.where(sum_R > 0, sum_R, 1.0)",
        "sum_R",
        lambda _: test_a_step_on_the_device_plans_itself_and_its_padding_gives_zero(),
    ),
    "a piece cut off the plan": (
        "decode_plan",
        "mine_P = pieces_P < count",
        "mine_P = pieces_P < count - 1",
        lambda _: test_a_plan_covers_every_position_once(1, None),
    ),
    "a window that is a key too wide": (
        "prefill_attention",
        "last_seen_R - window + 1 if WINDOWED",
        "last_seen_R - window if WINDOWED",
        lambda _: test_a_window_is_seen_and_nothing_before_it(33, torch.float32),
    ),
    "stale values read before the window": (
        "online_softmax",
        "present_X = present_X & (positions_X >= first)",
        "present_X = present_X",
        lambda _: test_what_a_block_holds_before_the_window_is_not_read(),
    ),
    "no guard for rows that have seen nothing yet": (
        "online_softmax",
        'tl.where(new_max_R == -float("inf"), 0.0, new_max_R) if WINDOWED else new_max_R',
        "new_max_R",
        lambda _: test_a_window_is_seen_and_nothing_before_it(33, torch.float32),
    ),
    "a plan of the whole context for a window": (
        "decode_plan",
        "first_seen = tl.maximum(context_len - window, 0) if WINDOWED else 0",
        "first_seen = 0",
        lambda _: test_a_plan_covers_every_position_once(1, 31),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    """These tests are worth what they catch: with the fault in a copy of the kernels, one of them fails."""
    module, correct, faulty, caught_by = FAULTS[fault]
    copy = tmp_path / "faulty_kernels"
    copy.mkdir()
    for source in Path(tidegate.kernels.triton.__file__).parent.glob("*.py"):
        text = source.read_text().replace("tidegate.kernels.triton", "faulty_kernels")
        if source.stem == module:
            assert correct in text
            text = text.replace(correct, faulty)
        (copy / source.name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("faulty_kernels")]:
        monkeypatch.delitem(sys.modules, name)
    for room, names in (
        ("attention", ("AttentionBatch", "paged_attention", "write_kv")),
        ("combine", ("combine_items",)),
        ("decode_attention", ("decode_attention",)),
        ("decode_plan", ("plan_decode",)),
    ):
        faulty_room = importlib.import_module(f"faulty_kernels.{room}")
        for name in names:
            monkeypatch.setitem(globals(), name, getattr(faulty_room, name))
    with warnings.catch_warnings(action="ignore"), pytest.raises(AssertionError):
        caught_by(tmp_path)
