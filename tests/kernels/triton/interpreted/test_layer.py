"""The kernels between the matrix products of a layer, against torch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from tidegate.kernels.triton.activation import silu_mul
from tidegate.kernels.triton.gemv import gemv, gemv_add, gemv_gated
from tidegate.kernels.triton.norm import add_rms_norm, rms_norm
from tidegate.kernels.triton.rope_kv_write import rope_kv_write

DTYPES = pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=["fp32", "fp16"]
)


def relative_error(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """``size``: what the result would be if no terms of its sums cancelled; their rounding stays."""
    return ((got.double() - expected).norm() / (expected if size is None else size).norm()).item()


def product(
    x_1I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """In fp64, and its size as ``relative_error`` asks for it."""
    weight_OI, bias_O = weight_OI.double(), None if bias_O is None else bias_O.double()
    size_O = None if bias_O is None else bias_O.abs()
    return F.linear(x_1I, weight_OI, bias_O), F.linear(x_1I.abs(), weight_OI.abs(), size_O)


@DTYPES
@pytest.mark.parametrize("size", [64, 1536, 900])
def test_rms_norm(size, dtype, limit):
    x_TM, weight_M = torch.randn(3, size).to(dtype), torch.randn(size).to(dtype)
    expected_TM = F.rms_norm(x_TM.double(), (size,), weight_M.double(), 1e-5)
    assert relative_error(rms_norm(x_TM, weight_M, 1e-5), expected_TM) < limit


@DTYPES
def test_the_residual_is_added_in_place_and_the_rounded_sum_is_normalized(dtype, limit):
    """As the two operations one after the other: the residual keeps what the norm has seen."""
    x_TM, weight_M = torch.randn(3, 900).to(dtype), torch.randn(900).to(dtype)
    residual_TM = torch.randn(3, 1000).to(dtype)[:, :900]
    sum_TM = x_TM + residual_TM
    normed_TM = add_rms_norm(x_TM, residual_TM, weight_M, 1e-5)
    assert torch.equal(residual_TM, sum_TM)
    assert relative_error(normed_TM, F.rms_norm(sum_TM.double(), (900,), weight_M.double(), 1e-5)) < limit


@DTYPES
@pytest.mark.parametrize("size", [16, 1500])
def test_silu_mul(size, dtype, limit):
    gate_up_TE = (torch.randn(3, 2 * size) * 3).to(dtype)
    gate_TF, up_TF = gate_up_TE.double().chunk(2, 1)
    assert relative_error(silu_mul(gate_up_TE), F.silu(gate_TF) * up_TF) < limit


@DTYPES
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 64), (3, 1, 80), (14, 7, 96)])
def test_rope_turns_query_and_key_and_fills_the_slots_alone(
    num_heads, num_kv_heads, head_dim, normed, dtype, limit
):
    """Heads of query, key and value lie side by side, and a program's share may hold all three."""
    num_tokens, turned = 5, num_heads + num_kv_heads
    qkv_TXD = torch.randn(num_tokens, turned + num_kv_heads, head_dim).to(dtype)
    angles_TF = torch.randn(num_tokens, head_dim // 2)
    cos_T1D = torch.cat((angles_TF.cos(), angles_TF.cos()), 1)[:, None].to(dtype)
    sin_T1D = torch.cat((-angles_TF.sin(), angles_TF.sin()), 1)[:, None].to(dtype)
    pool = torch.full((9, 3, 2, num_kv_heads, 16, head_dim), torch.nan, dtype=dtype)
    blocks_T, offsets_T = torch.tensor([8, 0, 0, 5, 3]), torch.tensor([15, 0, 1, 7, 7])
    norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype), 1e-6) if normed else None

    query_THD = rope_kv_write(qkv_TXD, cos_T1D, sin_T1D, pool[:, 1], blocks_T, offsets_T, norms)

    heads_TXD = qkv_TXD[:, :turned].double()
    if norms is not None:
        weights_XD = torch.stack([norms[0]] * num_heads + [norms[1]] * num_kv_heads)
        heads_TXD = F.rms_norm(heads_TXD, (head_dim,), None, 1e-6) * weights_XD
    expected_TXD = heads_TXD * cos_T1D + heads_TXD.roll(head_dim // 2, -1) * sin_T1D
    assert relative_error(query_THD, expected_TXD[:, :num_heads]) < limit
    assert relative_error(pool[blocks_T, 1, 0, :, offsets_T], expected_TXD[:, num_heads:]) < limit
    assert torch.equal(pool[blocks_T, 1, 1, :, offsets_T], qkv_TXD[:, turned:])
    pool[blocks_T, 1, :, :, offsets_T] = torch.nan
    assert pool.isnan().all()


@DTYPES
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(8, 1), (1100, 70), (2048, 9)])
def test_the_product_of_one_token_and_what_surrounds_it(num_inputs, num_outputs, dtype, limit):
    """With inputs and outputs that fill no tile."""
    x_1I = torch.randn(1, num_inputs).to(dtype)
    weight_OI = (torch.randn(2 * num_outputs, num_inputs) / num_inputs**0.5).to(dtype)
    norm_I = torch.randn(num_inputs).to(dtype)
    normed_1I = F.rms_norm(x_1I.double(), (num_inputs,), norm_I.double(), 1e-5)
    for bias_O in (torch.randn(2 * num_outputs).to(dtype), None):
        expected_1O, size_1O = product(normed_1I, weight_OI, bias_O)
        assert relative_error(gemv(x_1I, weight_OI, bias_O, (norm_I, 1e-5)), expected_1O, size_1O) < limit
        gate_1F, up_1F = expected_1O.chunk(2, 1)
        gate_size_1F, up_size_1F = size_1O.chunk(2, 1)
        got_1F = gemv_gated(x_1I, weight_OI, bias_O, (norm_I, 1e-5))
        assert relative_error(got_1F, F.silu(gate_1F) * up_1F, gate_size_1F * up_size_1F) < limit
        plain_1O, size_1O = product(x_1I.double(), weight_OI, bias_O)
        assert relative_error(gemv(x_1I, weight_OI, bias_O, None), plain_1O, size_1O) < limit
        residual_1O = torch.randn(plain_1O.shape).to(dtype)
        plain_1O, size_1O = plain_1O + residual_1O.double(), size_1O + residual_1O.double().abs()
        gemv_add(x_1I, weight_OI, bias_O, residual_1O)
        assert relative_error(residual_1O, plain_1O, size_1O) < limit


@pytest.mark.parametrize(
    ("x_1I", "weight_OI", "bias_O", "residual_1O", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 8), None, torch.zeros(2, 4), "x_1I"),
        (torch.zeros(1, 8), torch.zeros(4, 9), None, torch.zeros(1, 4), "weight_OI"),
        (torch.zeros(1, 8), torch.zeros(4, 8).half(), None, torch.zeros(1, 4), "weight_OI"),
        (torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(3), torch.zeros(1, 4), "bias_O"),
        (torch.zeros(1, 8), torch.zeros(4, 8), None, torch.zeros(1, 5), "residual_1O"),
        (torch.zeros(1, 8), torch.zeros(4, 8), None, torch.zeros(1, 8)[:, ::2], "residual_1O"),
    ],
)
def test_a_product_of_one_token_says_what_does_not_fit(x_1I, weight_OI, bias_O, residual_1O, message):
    with pytest.raises(ValueError, match=message):
        gemv_add(x_1I, weight_OI, bias_O, residual_1O)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="weight_M"):
        rms_norm(torch.zeros(1, 8), torch.zeros(7), 1e-5)
    with pytest.raises(ValueError, match="residual_TM"):
        add_rms_norm(torch.zeros(1, 8), torch.zeros(2, 8), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match="gate_up_TE"):
        silu_mul(torch.zeros(1, 7))
    angles_T1D, slots_T = torch.zeros(1, 1, 8), torch.zeros(1, dtype=torch.int64)
    for qkv_TXD, slots, message in (
        (torch.zeros(1, 4, 8), slots_T, "qkv_TXD"),
        (torch.zeros(1, 6, 8).half(), slots_T, "kv_NCKBD"),
        (torch.zeros(1, 6, 8), slots_T.int(), "slot_blocks_T"),
        (torch.zeros(2, 6, 8), slots_T, "cos_T1D"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_kv_write(qkv_TXD, angles_T1D, angles_T1D, torch.zeros(4, 2, 2, 16, 8), slots, slots)
