"""The native kernels of the CPU against fp64, against torch, with all that they may not read set to NaN.

Shapes as in ``kernels/cpu/native.py``.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paged_cases import LAYER, PagedCase, make_case

from tidegate.kernels.attention import AttentionBatch
from tidegate.kernels.cpu.compiler import CompilerError
from tidegate.kernels.cpu.native import NativeKernels

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp16", "bf16"])

# (query tokens, context): ends of pages and of vectors, one page, several runs of the softmax.
SHAPES = [(1, n) for n in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300, 700)]
SHAPES += [(5, 5), (64, 64), (7, 50), (33, 97), (2, 129), (100, 260)]


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> None:
    try:
        NativeKernels(torch.float32, 32, 1)
    except CompilerError as error:
        pytest.skip(f"no native kernels on this machine: {error}")


THREADS = pytest.mark.parametrize("threads", [1, 3], ids=["1 thread", "3 threads"])


def attend(case: PagedCase, angles_L2F: torch.Tensor | None = None, threads: int = 1) -> torch.Tensor:
    """What the kernel gives for a case; without angles nothing is turned."""
    num_tokens, num_heads, head_dim = case.query_THD.shape
    if angles_L2F is None:
        angles_L2F = torch.zeros(max(case.context_lens), 2, head_dim // 2)
        angles_L2F[:, 0] = 1
    kernels = NativeKernels(case.query_THD.dtype, head_dim, threads)
    batch = AttentionBatch.build(
        case.num_decodes,
        case.query_starts,
        case.context_lens,
        case.block_tables_SM,
        case.kv_NCKBD,
        case.window,
    )
    attention = kernels.attention(batch, case.kv_NCKBD, num_heads, angles_L2F, case.scale)
    qkv_TX = torch.cat((case.query_THD, case.key_TKD, case.value_TKD), dim=1).view(num_tokens, -1)
    return attention(qkv_TX, case.kv_NCKBD).view(case.query_THD.shape)


HEADS = [(3, 3, 40), (4, 2, 64), (8, 2, 32), (6, 1, 80), (14, 2, 64), (8, 1, 128), (20, 1, 16)]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [(*heads, dtype) for dtype in (torch.float32, torch.bfloat16) for heads in HEADS]
    + [(*heads, torch.float16) for heads in HEADS[:2]],
)
def test_attention_is_within_the_dtype_limit_of_fp64(num_heads, num_kv_heads, head_dim, dtype):
    """Groups of 1, 2, 4, 6, 7, 8 and 20 heads; decodes and prefills, fresh and later, in one step."""
    case = make_case(SHAPES, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    assert max(case.errors(attend(case))) < LIMITS[dtype]


@pytest.mark.parametrize("block_size", [8, 16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_page_size_does_not_matter(block_size, dtype):
    case = make_case(SHAPES, head_dim=32, block_size=block_size, dtype=dtype)
    assert max(case.errors(attend(case))) < LIMITS[dtype]


@pytest.mark.parametrize("window", [2, 7, 16, 33, 64, 200, 5000])
@pytest.mark.parametrize("block_size", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_query_sees_its_window_and_reads_no_block_before_it(window, block_size, dtype):
    """Windows shorter than a page, longer than the context, and across several runs of the softmax."""
    for heads in ({"num_heads": 3, "num_kv_heads": 3}, {"num_heads": 14, "num_kv_heads": 2}):
        case = make_case(SHAPES, head_dim=32, block_size=block_size, dtype=dtype, window=window, **heads)
        assert max(case.errors(attend(case))) < LIMITS[dtype]


def test_order_of_blocks_of_layers_and_of_threads_does_not_matter():
    """The same numbers are read in the same order: equal to the bit, in a step that threads share."""
    shapes = [(1, 3000)] * 12 + [(200, 900)]
    plain, *others = (
        attend(make_case(shapes, head_dim=32, dtype=torch.bfloat16, **layout), threads=threads)
        for layout, threads in (({}, 1), ({}, 3), ({"block_seed": 5}, 3), ({"layer_major": True}, 2))
    )
    assert all(torch.equal(plain, other) for other in others)


def test_a_sequence_attends_the_same_alone_and_in_a_batch():
    """To the bit: a token must not depend on who else is in the step."""
    case = make_case(SHAPES, num_heads=8, num_kv_heads=2, head_dim=32)
    together = attend(case)
    for s, (start, end) in enumerate(zip(case.query_starts[:-1], case.query_starts[1:], strict=True)):
        alone = PagedCase(
            num_decodes=int(end - start == 1),
            query_starts=[0, end - start],
            context_lens=[case.context_lens[s]],
            block_tables_SM=case.block_tables_SM[s : s + 1],
            pool_NLCKBD=case.pool_NLCKBD,
            query_THD=case.query_THD[start:end],
            key_TKD=case.key_TKD[start:end],
            value_TKD=case.value_TKD[start:end],
            expected_THD=case.expected_THD[start:end],
        )
        assert torch.equal(attend(alone), together[start:end])


@DTYPES
def test_keys_and_values_are_written_to_their_slots_alone(dtype):
    """Rotated keys as torch rotates them, values as they are; every other element keeps its bits."""
    case = make_case(SHAPES, num_heads=4, num_kv_heads=2, head_dim=40, dtype=dtype)
    before = case.pool_NLCKBD.clone()
    angles_LF = torch.arange(800)[:, None] * torch.logspace(0, -3, 20)
    attend(case, torch.stack((angles_LF.cos(), angles_LF.sin()), dim=1))

    batch = AttentionBatch.build(
        case.num_decodes, case.query_starts, case.context_lens, case.block_tables_SM, case.kv_NCKBD
    )
    at = angles_LF[batch.positions_T, None]
    first_TKF, second_TKF = case.key_TKD.float().chunk(2, dim=-1)
    turned = (first_TKF * at.cos() - second_TKF * at.sin(), second_TKF * at.cos() + first_TKF * at.sin())
    slots = batch.slot_blocks_T, batch.slot_offsets_T
    written = case.pool_NLCKBD[slots[0], LAYER, :, :, slots[1]]
    # One step of the last place: a fused multiply-add rounds once where torch rounds twice.
    torch.testing.assert_close(
        written[:, 0].float(), torch.cat(turned, -1), rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6
    )
    assert torch.equal(written[:, 1], case.value_TKD)
    before[slots[0], LAYER, :, :, slots[1]] = written
    torch.testing.assert_close(case.pool_NLCKBD, before, rtol=0, atol=0, equal_nan=True)


def test_a_sequence_that_is_not_finite_shows_it_and_harms_nobody_else():
    case = make_case([(1, 40), (1, 50), (3, 60)], head_dim=32)
    case.value_TKD[1] = torch.nan
    errors = np.array(case.errors(attend(case)))
    assert np.isinf(errors[1])
    assert errors[[0, 2]].max() < LIMITS[torch.float32]


def test_an_empty_step_attends_to_nothing():
    kv_NCKBD = torch.zeros(2, 2, 1, 16, 32)
    batch = AttentionBatch.build(0, [0], [], torch.zeros(0, 1, dtype=torch.int32), kv_NCKBD)
    attention = NativeKernels(torch.float32, 32, 1).attention(batch, kv_NCKBD, 4, torch.zeros(1, 2, 16), 1.0)
    assert attention(torch.zeros(0, 6 * 32), kv_NCKBD).shape == (0, 4 * 32)


@DTYPES
@THREADS
@pytest.mark.parametrize("size", [8, 40, 256, 896])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_norm_equals_torch(size, with_delta, dtype, threads):
    """The sum is rounded as the residual is stored, and the norm is that of the rounded sum."""
    generator = torch.Generator().manual_seed(0)
    x_TM, delta_TM = (torch.randn(700, size, generator=generator).to(dtype) for _ in range(2))
    weight_M = torch.randn(size, generator=generator).to(dtype)
    expected_TM = x_TM + delta_TM if with_delta else x_TM.clone()
    normed_TM = NativeKernels(dtype, 32, threads).add_norm(
        x_TM, delta_TM if with_delta else None, weight_M, 1e-6
    )
    assert torch.equal(x_TM, expected_TM)
    exact_TM = F.rms_norm(expected_TM.double(), (size,), weight_M.double(), 1e-6)
    torch.testing.assert_close(normed_TM.double(), exact_TM, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


@DTYPES
@THREADS
@pytest.mark.parametrize("size", [8, 40, 704])
def test_silu_mul_equals_torch(size, dtype, threads):
    """Over the whole range of a gate, where its exponential overflows too."""
    generator = torch.Generator().manual_seed(0)
    gate_TF = torch.linspace(-120, 120, 800 * size).view(800, size).to(dtype)
    up_TF = torch.randn(800, size, generator=generator).to(dtype)
    out_TF = NativeKernels(dtype, 32, threads).silu_mul(torch.cat((gate_TF, up_TF), dim=1))
    exact_TF = F.silu(gate_TF.double()) * up_TF.double()
    torch.testing.assert_close(out_TF.double(), exact_TF, rtol=torch.finfo(dtype).eps * 2, atol=1e-7)


@DTYPES
@THREADS
@pytest.mark.parametrize("vocab_size", [1, 97, 1024, 9000])
def test_argmax_takes_the_lowest_of_the_best_and_marks_what_is_not_finite(vocab_size, dtype, threads):
    """Few different values: nearly every row has a tie."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_RV = torch.randint(-3, 4, (60, vocab_size), generator=generator).to(dtype)
    expected_R = torch.tensor([(row == row.max()).nonzero()[0, 0] for row in logits_RV])
    spoiled = {3: torch.nan, 5: torch.inf, 7: -torch.inf}
    for row, value in spoiled.items():
        logits_RV[row, vocab_size // 2] = value
    ids_R, finite_R = NativeKernels(dtype, 32, threads).argmax(logits_RV)
    healthy = [row for row in range(60) if row not in spoiled]
    assert ids_R[healthy].tolist() == expected_R[healthy].tolist()
    assert finite_R.tolist() == [row not in spoiled for row in range(60)]
    assert ((ids_R >= 0) & (ids_R < vocab_size)).all()


@THREADS
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 1), (40, 64), (256, 200), (704, 2000)])
def test_the_packed_product_equals_torch(inputs, outputs, threads):
    """Every number of tokens that a register block leaves over, with and without bias."""
    kernels = NativeKernels(torch.bfloat16, 32, threads)
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(outputs, inputs, generator=generator).bfloat16()
    bias_O = torch.randn(outputs, generator=generator).bfloat16()
    for bias in (bias_O, None):
        product = kernels.projection(weight_OI, bias)
        if product is None:
            pytest.skip("this processor's products are torch's")
        for num_tokens in (0, 1, 2, 3, 4, 5, 6, 7, 11, 64):
            x_TI = torch.randn(num_tokens, inputs, generator=generator).bfloat16()
            exact_TO = F.linear(x_TI.double(), weight_OI.double(), None if bias is None else bias.double())
            torch.testing.assert_close(product(x_TI).double(), exact_TO, rtol=2**-8, atol=1e-4 * inputs**0.5)


def test_callers_at_the_same_time_do_not_mix_their_work():
    """One set of helpers serves one loop; whoever calls meanwhile goes on alone."""
    kernels = NativeKernels(torch.float32, 32, 4)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, 9000, generator=generator) for rows in (56, 61, 70)]
    expected = [logits_RV.argmax(1).tolist() for logits_RV in inputs]

    def repeat(number: int) -> list[list[int]]:
        return [kernels.argmax(inputs[number])[0].tolist() for _ in range(300)]

    with ThreadPoolExecutor(3) as callers:
        for number, results in enumerate(callers.map(repeat, range(3))):
            assert all(result == expected[number] for result in results)


def test_a_tensor_with_gaps_is_refused():
    kernels = NativeKernels(torch.float32, 32, 1)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.silu_mul(torch.zeros(4, 64)[:, ::2])
