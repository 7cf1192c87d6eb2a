"""The kernels' machine code, for GPUs that need not be there.

A kernel that spills registers, or multiplies on the slow units, is right and useless; TF32 in an fp32
kernel is wrong in the fourth digit and passes in the interpreter. Neither shows without a look at the code.
"""

from unittest import mock

import pytest
import torch
from offline_compiler import Launch, compile_launch, recorded_launches

from tidegate.kernels.triton import prefill_attention as prefill_module
from tidegate.kernels.triton.activation import silu_mul
from tidegate.kernels.triton.decode_attention import decode_attention
from tidegate.kernels.triton.decode_plan import plan_decode
from tidegate.kernels.triton.norm import add_rms_norm, rms_norm
from tidegate.kernels.triton.prefill_attention import prefill_attention
from tidegate.kernels.triton.rope_kv_write import rope_kv_write
from tidegate.kernels.triton.sampling import SamplingRows, sample

# Bytes a thread, for head sizes 64, 128 and 256. fp32 multiplies on the plain units and is there to check
# results with, not for speed: so its figures are recorded, not forbidden.
FP32_STACK = {64: 0, 128: 512, 256: 64}


def attention_launches(
    dtype: torch.dtype, head_dim: int, group: int = 4, block_size: int = 64, capability: int = 90
) -> dict[str, Launch]:
    """The decode and prefill kernels and the combination, as a step of Llama's proportions has them."""
    kv_NCKBD = torch.empty(4, 2, 2, 2, block_size, head_dim, dtype=dtype)[:, 1]
    query_THD = torch.empty(4, 2 * group, head_dim, dtype=dtype)
    tables_SM = torch.empty(4, 16, dtype=torch.int32)
    tiles_P5 = torch.empty(4, 5, dtype=torch.int32)
    out_THD = torch.empty_like(query_THD)
    with (
        recorded_launches() as launches,
        mock.patch.object(prefill_module, "compute_capability", return_value=capability),
    ):
        plan = plan_decode(torch.ones(4, dtype=torch.int32), 2, 64, 132)
        decode_attention(query_THD, kv_NCKBD, tables_SM, plan, 0.1, out_THD)
        prefill_attention(query_THD, kv_NCKBD, tables_SM, tiles_P5, 0.1, out_THD)
    return {launch.name: launch for launch in launches}


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "group", "block_size"),
    [
        (90, torch.bfloat16, 64, 7, 16),
        (90, torch.bfloat16, 80, 1, 32),
        (90, torch.bfloat16, 96, 4, 64),
        (90, torch.bfloat16, 128, 4, 64),
        (90, torch.bfloat16, 128, 16, 16),
        (90, torch.float16, 128, 6, 32),
        (90, torch.bfloat16, 256, 4, 64),
        (90, torch.float16, 256, 16, 16),
        (80, torch.bfloat16, 128, 4, 64),
        (80, torch.float16, 256, 4, 64),
        (100, torch.bfloat16, 128, 4, 64),
        (100, torch.float16, 256, 4, 64),
    ],
    ids=str,
)
def test_attention_in_half_precision_multiplies_on_the_tensor_cores_without_spilling(
    capability, dtype, head_dim, group, block_size
):
    launches = attention_launches(dtype, head_dim, group, block_size, capability)
    decode = compile_launch(launches["_decode_kernel"], capability)
    assert decode.num_stack_bytes == 0
    assert "mma.sync" in decode.ptx
    # Keys and values travel 16 bytes at a time, while the tile before them is worked on.
    assert decode.ptx.count("cp.async.cg.shared.global") >= 16
    prefill = compile_launch(launches["_prefill_kernel"], capability)
    assert prefill.num_stack_bytes == 0
    product = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    assert product in prefill.ptx
    assert prefill.ptx.count("cp.async.cg.shared.global") >= 16


@pytest.mark.parametrize("head_dim", FP32_STACK)
def test_attention_in_fp32_is_fp32(head_dim):
    launches = attention_launches(torch.float32, head_dim)
    for name in ("_decode_kernel", "_prefill_kernel"):
        binary = compile_launch(launches[name], 90)
        assert "tf32" not in binary.ptx
        assert binary.num_stack_bytes <= FP32_STACK[head_dim]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_other_kernel_compiles_without_spilling(capability):
    x_TM, weight_M = torch.empty(4, 4096).bfloat16(), torch.empty(4096).bfloat16()
    qkv_TXD, angles_T1D = torch.empty(4, 48, 128).bfloat16(), torch.empty(4, 1, 128).bfloat16()
    kv_NCKBD = torch.empty(4, 2, 8, 64, 128).bfloat16()
    slots_T = torch.empty(4, dtype=torch.int64)
    norm_D = torch.empty(128).bfloat16()
    rows = SamplingRows(
        torch.empty(4),
        torch.empty(4, dtype=torch.int32),
        torch.empty(4, dtype=torch.float64),
        torch.empty(4),
        torch.empty(4, 2, dtype=torch.int32),
    )
    with recorded_launches() as launches:
        rms_norm(x_TM, weight_M, 1e-5)
        add_rms_norm(x_TM, x_TM, weight_M, 1e-5)
        silu_mul(x_TM)
        rope_kv_write(qkv_TXD, angles_T1D, angles_T1D, kv_NCKBD, slots_T, slots_T)
        rope_kv_write(qkv_TXD, angles_T1D, angles_T1D, kv_NCKBD, slots_T, slots_T, (norm_D, norm_D, 1e-6))
        sample(torch.empty(4, 152_064), rows)
    attention = attention_launches(torch.bfloat16, 128)
    launches += [attention["_plan_kernel"], attention["_combine_kernel"]]
    assert len(launches) == 11
    for launch in launches:
        assert compile_launch(launch, capability).num_stack_bytes == 0, launch.name
