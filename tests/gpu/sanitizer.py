"""NVIDIA's compute-sanitizer on small cases of every kernel: accesses out of bounds, and races.

Run by itself with ``--cases`` it is the program that the tool looks into.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from machine import DRY
from paged_cases import make_case
from report import Report, run_part

from tidegate.kernels.noise import noise_keys
from tidegate.kernels.triton.activation import silu_mul
from tidegate.kernels.triton.attention import AttentionBatch, paged_attention
from tidegate.kernels.triton.gemv import gemv, gemv_add, gemv_gated
from tidegate.kernels.triton.norm import add_rms_norm, rms_norm
from tidegate.kernels.triton.rope_kv_write import rope_kv_write
from tidegate.kernels.triton.sampling import SamplingRows, sample
from tidegate.kernels.triton.sampling_rows import PARAMETER_WORDS, sampling_rows
from tidegate.kernels.triton.step_inputs import (
    apply_packet,
    copy_blocks,
    gather_tables,
    store_sampled,
    store_words,
    token_inputs,
)

TOOLS = ("memcheck", "racecheck")
SECONDS = 60
DEVICE = "cpu" if DRY else "cuda"


def run_tool(report: Report, tool: str) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        print(f"compute-sanitizer is not here: {tool} left out")
        return
    command = [program, "--tool", tool, "--print-limit", "5", sys.executable, "-P", __file__, "--cases"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, env={**os.environ}
        )
    except subprocess.TimeoutExpired:
        print(f"{tool}: not done within {SECONDS} s, and says nothing")
        return
    text = run.stdout + run.stderr
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if not summaries or "cases done" not in text:
        print(text[-2000:])
        raise RuntimeError(f"{tool} gave no summary; exit status {run.returncode}")
    if summaries != ["0"]:
        print(text[-3000:])
    report.check(f"compute-sanitizer {tool}, errors", float(sum(map(int, summaries))), 0)


def cases() -> None:
    """Every kernel once, small, with edges inside tiles and blocks."""
    attend(None)
    attend(9)
    multiply_one_token()
    x_TM, weight_M = torch.randn(3, 900, device=DEVICE), torch.randn(900, device=DEVICE)
    rms_norm(x_TM, weight_M, 1e-5)
    add_rms_norm(x_TM, x_TM.clone(), weight_M, 1e-5)
    silu_mul(torch.randn(3, 2 * 900, device=DEVICE))
    words = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    packet = torch.tensor([7, 3, 5, 1, 2, 3, 4, 5], dtype=torch.int32)
    ring = torch.zeros(64, dtype=torch.int32)
    if not DRY:
        packet, ring = packet.pin_memory(), ring.pin_memory()
    apply_packet(words, packet, 1)
    rows_R = torch.tensor([2, -1, 0], dtype=torch.int32, device=DEVICE)
    positions_R = torch.tensor([33, 0, 1], dtype=torch.int32, device=DEVICE)
    tokens_XL, tables_XM = words[:300].view(3, 100), words[300:321].view(3, 7)
    inputs = token_inputs(rows_R, positions_R, tokens_XL, tables_XM, 16)
    gather_tables(rows_R, inputs.context_lens_T, tables_XM, 7, 16)
    sampling_rows(words[: 3 * PARAMETER_WORDS].view(3, PARAMETER_WORDS), rows_R, positions_R)
    every = np.arange(3)
    rows = SamplingRows(
        torch.tensor([0, 1, 0.7], device=DEVICE),
        torch.tensor([5000, 50, 5000], dtype=torch.int32, device=DEVICE),
        torch.tensor([1, 1, 0.9], dtype=torch.float64, device=DEVICE),
        torch.tensor([0, 0.02, 0], device=DEVICE).log(),
        torch.from_numpy(noise_keys(every.astype(np.uint64), every, every)).to(DEVICE),
    )
    sampled = sample(torch.randn(3, 5000, device=DEVICE), rows)
    place_1 = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    store_sampled(sampled.token_ids_R, sampled.finite_R, rows_R, positions_R, tokens_XL, ring, place_1)
    store_words(ring, 40, words[:5])
    pairs = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=DEVICE)
    copy_blocks(words.view(8, 512), pairs[0], pairs[1])
    if not DRY:
        torch.cuda.synchronize()
    print("cases done")


def attend(window: int | None) -> None:
    """One step of two decodes and a chunk of a prompt. ``window`` begins inside a block and inside a tile."""
    case = make_case(
        [(1, 70), (1, 1), (5, 33)],
        num_heads=4,
        num_kv_heads=2,
        dtype=torch.float16,
        device=DEVICE,
        window=window,
    )
    batch = AttentionBatch.build(
        case.num_decodes,
        case.query_starts,
        case.context_lens,
        case.block_tables_SM,
        case.kv_NCKBD,
        4,
        window,
    )
    num_tokens = len(case.query_THD)
    angles_T1D = torch.ones(num_tokens, 1, 64, dtype=torch.float16, device=DEVICE)
    qkv_TXD = torch.cat((case.query_THD, case.key_TKD, case.value_TKD), 1)
    rope_kv_write(qkv_TXD, angles_T1D, angles_T1D, case.kv_NCKBD, batch.slot_blocks_T, batch.slot_offsets_T)
    paged_attention(case.query_THD, case.kv_NCKBD, batch, 0.1)


def multiply_one_token() -> None:
    """More inputs and outputs than whole tiles of either; with and without what a product may take along."""
    num_inputs, num_outputs = 1100, 70
    x_1I, norm_I = torch.randn(1, num_inputs, device=DEVICE), torch.randn(num_inputs, device=DEVICE)
    weight_OI = torch.randn(num_outputs, num_inputs, device=DEVICE)
    bias_O = torch.randn(num_outputs, device=DEVICE)
    for bias, norm in ((None, None), (bias_O, (norm_I, 1e-5))):
        gemv(x_1I, weight_OI, bias, norm)
    gemv_gated(x_1I, weight_OI, bias_O, (norm_I, 1e-5))
    gemv_add(x_1I, weight_OI, bias_O, torch.randn(1, num_outputs, device=DEVICE))


if __name__ == "__main__":
    if "--cases" in sys.argv:
        cases()
    else:
        sys.exit(run_part([(tool, lambda report, tool=tool: run_tool(report, tool)) for tool in TOOLS]))
