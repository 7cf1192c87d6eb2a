"""The kernels' machine code, for GPUs that need not be there.

A kernel that spills registers, or multiplies on the slow units, is right and useless; TF32 in an fp32
kernel is wrong in the fourth digit and passes in the interpreter. Neither shows without a look at the code.
``test_oldest_triton.py`` runs all of this once more with the oldest Triton that is supported.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from offline_compiler import Launch, compile_launch, recorded_launches
from triton.runtime.jit import JITFunction

import tidegate.kernels.triton
from tidegate.kernels.triton import combine, decode_attention, gemv, rope_kv_write, step_inputs
from tidegate.kernels.triton import prefill_attention as prefill
from tidegate.kernels.triton.activation import silu_mul
from tidegate.kernels.triton.decode_plan import plan_decode
from tidegate.kernels.triton.norm import add_rms_norm, rms_norm
from tidegate.kernels.triton.sampling import sample
from tidegate.kernels.triton.sampling_rows import PARAMETER_WORDS, sampling_rows

CAPABILITIES = (80, 90, 100)
# Bytes a thread, by head size. fp32 multiplies on the plain units and is there to check results with, not for
# speed: so its figures are recorded, not forbidden.
FP32_STACK = {64: 0, 80: 512, 96: 512, 128: 512, 256: 64}
OVERLAPPING = (combine, decode_attention, gemv, rope_kv_write)


@contextmanager
def recorded_on(capability: int) -> Iterator[list[Launch]]:
    """What operations would launch on a GPU of this compute capability."""
    with ExitStack() as patches:
        enter = patches.enter_context
        enter(mock.patch.object(prefill, "compute_capability", return_value=capability))
        enter(mock.patch.object(gemv, "num_multiprocessors", return_value=132))
        for module in OVERLAPPING:
            enter(mock.patch.object(module, "overlaps_launches", return_value=capability >= 90))
        yield enter(recorded_launches())


def attention_launches(
    dtype: torch.dtype,
    head_dim: int,
    group: int = 4,
    block_size: int = 64,
    capability: int = 90,
    window: int | None = None,
) -> dict[str, Launch]:
    """The decode and prefill kernels and the combination, as a step of Llama's proportions has them."""
    kv_NCKBD = torch.empty(4, 2, 2, 2, block_size, head_dim, dtype=dtype)[:, 1]
    query_THD = torch.empty(4, 2 * group, head_dim, dtype=dtype)
    tables_SM = torch.empty(4, 16, dtype=torch.int32)
    tiles_P5 = torch.empty(4, 5, dtype=torch.int32)
    out_THD = torch.empty_like(query_THD)
    with recorded_on(capability) as launches:
        plan = plan_decode(torch.ones(4, dtype=torch.int32), 2, 64, 132, window)
        decode_attention.decode_attention(query_THD, kv_NCKBD, tables_SM, plan, 0.1, out_THD)
        prefill.prefill_attention(query_THD, kv_NCKBD, tables_SM, tiles_P5, 0.1, out_THD, window)
    return {launch.name: launch for launch in launches}


def other_launches(capability: int) -> list[Launch]:
    """Everything else that a step has, with the shapes of Llama-3.1-8B."""
    x_TM, weight_M = torch.empty(4, 4096).bfloat16(), torch.empty(4096).bfloat16()
    qkv_TXD, angles_T1D = torch.empty(4, 48, 128).bfloat16(), torch.empty(4, 1, 128).bfloat16()
    kv_NCKBD = torch.empty(4, 2, 8, 64, 128).bfloat16()
    slots_T = torch.empty(4, dtype=torch.int64)
    norm_D = torch.empty(128).bfloat16()
    words = torch.zeros(4096, dtype=torch.int32)
    four, table_44 = words[:4], words[:16].view(4, 4)
    write = rope_kv_write.rope_kv_write
    with recorded_on(capability) as launches:
        rms_norm(x_TM, weight_M, 1e-5)
        add_rms_norm(x_TM, x_TM, weight_M, 1e-5)
        silu_mul(x_TM)
        write(qkv_TXD, angles_T1D, angles_T1D, kv_NCKBD, slots_T, slots_T)
        write(qkv_TXD, angles_T1D, angles_T1D, kv_NCKBD, slots_T, slots_T, (norm_D, norm_D, 1e-6))
        rows = sampling_rows(words[: 4 * PARAMETER_WORDS].view(4, PARAMETER_WORDS), four, four)
        for dtype in (torch.float32, torch.bfloat16):
            sampled = sample(torch.empty(4, 152_064, dtype=dtype), rows)
        step_inputs.apply_packet(words, words, 4)
        step_inputs.token_inputs(four, four, table_44, table_44, 64)
        step_inputs.gather_tables(four, four, table_44, 4, 64)
        step_inputs.store_sampled(sampled.token_ids_R, sampled.finite_R, four, four, table_44, words, four)
        step_inputs.store_words(words, 0, four)
        step_inputs.copy_blocks(words.view(4, 1024), four, four)
    return launches + one_token_launches(capability)


def one_token_launches(capability: int) -> list[Launch]:
    """The products of a single token, in the shapes of an 8B and a 1.5B model, which choose other tiles."""
    launches: list[Launch] = []
    for hidden, inner, heads, bias in ((4096, 14_336, 6144, False), (1536, 8960, 2048, True)):
        x_1M, inner_1F = torch.empty(1, hidden).bfloat16(), torch.empty(1, inner).bfloat16()
        norm = torch.empty(hidden).bfloat16(), 1e-5
        bias_X = torch.empty(heads).bfloat16() if bias else None
        with recorded_on(capability) as mine:
            gemv.gemv(x_1M, torch.empty(heads, hidden).bfloat16(), bias_X, norm)
            gemv.gemv_gated(x_1M, torch.empty(2 * inner, hidden).bfloat16(), None, norm)
            gemv.gemv_add(inner_1F, torch.empty(hidden, inner).bfloat16(), None, x_1M)
        launches += mine
    return launches


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "group", "block_size", "window"),
    [
        (90, torch.bfloat16, 64, 7, 16, None),
        (90, torch.bfloat16, 80, 1, 32, None),
        (90, torch.bfloat16, 96, 4, 64, None),
        (90, torch.bfloat16, 128, 4, 64, None),
        (90, torch.bfloat16, 128, 4, 64, 4096),
        (90, torch.bfloat16, 128, 16, 16, None),
        (90, torch.float16, 128, 6, 32, None),
        (90, torch.bfloat16, 256, 4, 64, None),
        (90, torch.float16, 256, 16, 16, 500),
        (80, torch.bfloat16, 128, 4, 64, None),
        (80, torch.float16, 256, 4, 64, 4096),
        (100, torch.bfloat16, 128, 4, 64, 4096),
        (100, torch.float16, 256, 4, 64, None),
    ],
    ids=str,
)
def test_attention_in_half_precision_multiplies_on_the_tensor_cores_without_spilling(
    capability, dtype, head_dim, group, block_size, window
):
    launches = attention_launches(dtype, head_dim, group, block_size, capability, window)
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


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_other_kernel_compiles_without_spilling(capability):
    attention = attention_launches(torch.bfloat16, 128, capability=capability, window=4096)
    launches = [attention["_plan_kernel"], attention["_combine_kernel"], *other_launches(capability)]
    compiled = {launch.name for launch in launches} | set(attention)
    assert compiled == all_kernels(), "each kernel has its place in one of these tests"
    for launch in launches:
        binary = compile_launch(launch, capability)
        assert binary.num_stack_bytes == 0, (launch.name, launch.constants)
        if launch.name == "_gemv_kernel":
            # Weights 16 bytes at a time, and none of the input by way of shared memory on each turn.
            assert "v4.b32" in binary.ptx
            assert binary.num_shared_bytes <= 256
        waits = "griddepcontrol.wait" in binary.ptx
        assert waits == bool(launch.options.get("launch_pdl")), launch.name


def all_kernels() -> set[str]:
    """Of the package: what is launched, as opposed to what kernels call."""
    return {
        name
        for module in pkgutil.iter_modules(tidegate.kernels.triton.__path__, "tidegate.kernels.triton.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
