"""Time the Triton kernels on a CUDA device against torch, against peers and against the device's ceilings.

    PYTHONPATH=.src:tests/support:tests/gpu python3 -P tests/gpu/kernel_times.py --json times.json

Beside each time stands how much of the ceiling that is: of the bandwidth of a copy, or in TFLOP/s.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from kernel_checks import LIMITS, relative_error, sampling_rows
from peers import PagedWork, peers
from report import Report, run_part
from timing import copy_bandwidth, matmul_flops, seconds
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidegate.kernels.triton.activation import silu_mul
from tidegate.kernels.triton.attention import AttentionBatch, paged_attention
from tidegate.kernels.triton.gemv import gemv, gemv_add, gemv_gated
from tidegate.kernels.triton.norm import add_rms_norm
from tidegate.kernels.triton.rope_kv_write import rope_kv_write
from tidegate.kernels.triton.sampling import SamplingRows, sample

LLAMA_8B, QWEN_1_5B, HEAD_64, HEAD_256 = (32, 8, 128), (12, 2, 128), (32, 8, 64), (16, 4, 256)
"""Query heads, KV heads and head size."""


@dataclass
class Pool:
    """Random sequences in a pool of several layers: as many launches as layers read different data."""

    batch: AttentionBatch
    work: PagedWork

    @property
    def launches(self) -> list[Callable[[], object]]:
        query_THD, pool_NLCKBD, scale = self.work.query_THD, self.work.pool_NLCKBD, self.work.scale
        return [
            lambda layer=layer: paged_attention(query_THD, pool_NLCKBD[:, layer], self.batch, scale)
            for layer in range(pool_NLCKBD.shape[1])
        ]

    def time(self) -> tuple[float, list[tuple[str, float]]]:
        """Seconds of one launch, and of each peer's that gives the same."""
        mine = self.launches
        expected_THD = mine[0]()
        times = []
        for name, plan in peers(self.work):
            try:
                launches = plan()
                error = relative_error(launches[0](), expected_THD)
                if not error < LIMITS[torch.bfloat16]:
                    raise ValueError(f"computes something else: error {error:.1e}")
                times.append((name, seconds(launches)))
            except (RuntimeError, TypeError, ValueError) as problem:
                print(f"peer {name} left out: {str(problem)[:300]}", flush=True)
        return seconds(mine), times


def make_pool(
    shapes: list[tuple[int, int]],
    model: tuple[int, int, int],
    block_size: int = 64,
    num_layers: int = 2,
    layer_major: bool = False,
    window: int | None = None,
) -> Pool:
    num_heads, num_kv_heads, head_dim = model
    num_blocks = [-(-context // block_size) for _, context in shapes]
    sizes = [sum(num_blocks), num_layers, 2, num_kv_heads, block_size, head_dim]
    if layer_major:
        sizes[:2] = sizes[1::-1]
    pool = torch.randn(sizes, dtype=torch.bfloat16, device="cuda")
    ids = torch.randperm(sum(num_blocks)).int()
    tables_SM = torch.zeros((len(shapes), max(num_blocks)), dtype=torch.int32)
    for s, blocks in enumerate(ids.split(num_blocks)):
        tables_SM[s, : len(blocks)] = blocks
    pool = pool.transpose(0, 1) if layer_major else pool
    starts = [0, *np.cumsum([count for count, _ in shapes]).tolist()]
    num_decodes = len(shapes) if shapes[0][0] == 1 else 0
    batch = AttentionBatch.build(
        num_decodes, starts, [context for _, context in shapes], tables_SM, pool[:, 0], num_heads, window
    )
    query_THD = torch.randn(starts[-1], num_heads, head_dim, device="cuda").bfloat16()
    lens = [context for _, context in shapes]
    return Pool(batch, PagedWork(pool, query_THD, batch.block_tables_SM, lens, starts))


def ceilings(report: Report) -> None:
    report.figure("copy, bytes read and written", copy_bandwidth() / 1e12, "TB/s")
    report.figure("bf16 product", matmul_flops() / 1e12, "TFLOP/s")


def record_bytes(report: Report, name: str, num_bytes: float, elapsed: float) -> None:
    """A launch's time, and its share of the bandwidth if it moves so many bytes."""
    share = num_bytes / elapsed / copy_bandwidth()
    report.figure(name, elapsed * 1e6, "us", note=f"{share:.3f} of a copy's bandwidth")


def record_flops(report: Report, name: str, flops: float, elapsed: float) -> None:
    report.figure(name, elapsed * 1e6, "us", note=f"{flops / elapsed / 1e12:.0f} TFLOP/s")


def time_decode(report: Report) -> None:
    ragged = torch.randint(100, 8000, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    for name, lens, model, options in (
        ("8B, 64 x 4k", [4096] * 64, LLAMA_8B, {}),
        ("8B, 64 x 4k, blocks of 16", [4096] * 64, LLAMA_8B, {"block_size": 16}),
        ("8B, 64 x 4k, layer-major", [4096] * 64, LLAMA_8B, {"layer_major": True}),
        ("8B, 64 x 1k", [1024] * 64, LLAMA_8B, {"num_layers": 8}),
        ("8B, 40 x 2k", [2048] * 40, LLAMA_8B, {"num_layers": 8}),
        ("8B, 64 of 100 to 8k", ragged, LLAMA_8B, {}),
        ("8B, 1 x 32k", [32768], LLAMA_8B, {"num_layers": 8}),
        ("8B, 1 x 1k", [1024], LLAMA_8B, {"num_layers": 32}),
        ("1.5B, 64 x 4k", [4096] * 64, QWEN_1_5B, {"num_layers": 4}),
        ("1.5B, 1 x 1k", [1024], QWEN_1_5B, {"num_layers": 64}),
        ("8B, 64 x 4k, window of 1k", [4096] * 64, LLAMA_8B, {"num_layers": 8, "window": 1024}),
        ("D 64, 64 x 4k", [4096] * 64, HEAD_64, {}),
        ("D 256, 64 x 2k", [2048] * 64, HEAD_256, {}),
    ):
        pool = make_pool([(1, length) for length in lens], model, **options)
        if "window" in options:
            elapsed, others = seconds(pool.launches), []
            lens = [min(length, options["window"]) for length in lens]
        else:
            elapsed, others = pool.time()
        num_bytes = sum(lens) * 2 * model[1] * model[2] * 2
        record_bytes(report, f"decode {name}", num_bytes, elapsed)
        for peer, spent in others:
            record_bytes(report, f"  {peer}", num_bytes, spent)


def time_prefill(report: Report) -> None:
    for name, shapes, model in (
        ("8B, 1 x 8k", [(8192, 8192)], LLAMA_8B),
        ("8B, 1 x 2k", [(2048, 2048)], LLAMA_8B),
        ("8B, 8 x 1k", [(1024, 1024)] * 8, LLAMA_8B),
        ("8B, 2k after 14k", [(2048, 16384)], LLAMA_8B),
        ("8B, 8 x 128 after 4k", [(128, 4224)] * 8, LLAMA_8B),
        ("1.5B, 1 x 8k", [(8192, 8192)], QWEN_1_5B),
        ("D 64, 1 x 8k", [(8192, 8192)], HEAD_64),
        ("D 256, 1 x 4k", [(4096, 4096)], HEAD_256),
    ):
        num_heads, _, head_dim = model
        pool = make_pool(shapes, model)
        elapsed, others = pool.time()
        flops = sum(4 * num_heads * head_dim * (n * x - n * (n - 1) / 2) for n, x in shapes)
        record_flops(report, f"prefill {name}", flops, elapsed)
        for peer, spent in others:
            record_flops(report, f"  {peer}", flops, spent)
        if len(shapes) == 1 and shapes[0][0] == shapes[0][1]:
            time_torch_prefill(report, shapes[0][0], num_heads, head_dim, flops)


def time_torch_prefill(report: Report, length: int, num_heads: int, head_dim: int, flops: float) -> None:
    """The same attention by torch, on contiguous tensors and with a KV head for each query head."""
    query, key, value = (
        torch.randn(1, num_heads, length, head_dim, device="cuda").bfloat16() for _ in range(3)
    )
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            elapsed = seconds([lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)])
        record_flops(report, f"  the same, torch {backend.name.lower()}, no pages", flops, elapsed)


def time_layer(report: Report, num_tokens: int) -> None:
    """The kernels between the products of an 8B model's layer."""
    sets = 16 if num_tokens < 8192 else 3
    weight_M = torch.randn(4096, device="cuda").bfloat16()
    rows = [torch.randn(num_tokens, 4096, device="cuda").bfloat16() for _ in range(2 * sets)]
    gates = [torch.randn(num_tokens, 2 * 14336, device="cuda").bfloat16() for _ in range(sets)]
    qkvs = [torch.randn(num_tokens, 48, 128, device="cuda").bfloat16() for _ in range(sets)]
    pool = torch.zeros(num_tokens // 64 + 1, 1, 2, 8, 64, 128, dtype=torch.bfloat16, device="cuda")
    angles_T1D = torch.randn(num_tokens, 1, 128, device="cuda").bfloat16()
    places_T = torch.arange(num_tokens, device="cuda")
    blocks_T, offsets_T = places_T // 64, places_T % 64
    pairs = zip(rows[::2], rows[1::2], strict=True)
    for name, launches, num_bytes in (
        (
            "add + RMS norm, M 4096",
            [
                lambda x=x, residual=residual: add_rms_norm(x, residual, weight_M, 1e-5)
                for x, residual in pairs
            ],
            4096 * 2 * 4,
        ),
        ("SiLU·mul, F 14336", [lambda gate=gate: silu_mul(gate) for gate in gates], 14336 * 2 * 3),
        (
            "RoPE + KV write, H 32 K 8 D 128",
            [
                lambda qkv=qkv: rope_kv_write(qkv, angles_T1D, angles_T1D, pool[:, 0], blocks_T, offsets_T)
                for qkv in qkvs
            ],
            128 * 2 * (2 * 48 + 2),
        ),
    ):
        record_bytes(report, f"{name}, {num_tokens} tokens", num_tokens * num_bytes, seconds(launches))


def time_gemv(report: Report) -> None:
    """Products of one token, against torch's of the same weights without what surrounds them."""
    for name, ours, num_inputs, num_outputs in (
        ("8B, norm + QKV", gemv, 4096, 6144),
        ("8B, norm + gate and up + SiLU", gemv_gated, 4096, 28_672),
        ("8B, down + residual", gemv_add, 14_336, 4096),
        ("1.5B, norm + QKV", gemv, 1536, 2048),
        ("1.5B, norm + gate and up + SiLU", gemv_gated, 1536, 17_920),
        ("1.5B, down + residual", gemv_add, 8960, 1536),
        ("1.5B, norm + LM head", gemv, 1536, 151_936),
    ):
        num_bytes = 2 * num_inputs * num_outputs
        sets = max(1, int(200e6 / num_bytes))
        weights = [torch.randn(num_outputs, num_inputs, device="cuda").bfloat16() for _ in range(sets)]
        x_1I = torch.randn(1, num_inputs, device="cuda").bfloat16()
        norm = torch.randn(num_inputs, device="cuda").bfloat16(), 1e-5
        last = torch.randn(1, num_outputs, device="cuda").bfloat16() if ours is gemv_add else norm
        elapsed = seconds([partial(ours, x_1I, weight, None, last) for weight in weights])
        record_bytes(report, name, num_bytes, elapsed)
        plain = seconds([partial(F.linear, x_1I, weight) for weight in weights])
        record_bytes(report, "  torch, the product alone", num_bytes, plain)


def time_sampling(report: Report, num_rows: int) -> None:
    """With each kind of filter alone; the work is one pass over the logits."""
    vocab_size = 152_064
    logits_RV = torch.randn(num_rows, vocab_size, device="cuda") * 3
    mixed = sampling_rows(6 * num_rows, vocab_size)
    for kind, name in enumerate(("greedy", "no filter", "top-k 50", "top-p 0.9", "top-k 40, top-p 0.95")):
        rows = SamplingRows(
            *(getattr(mixed, field)[kind::6].contiguous() for field in SamplingRows.__slots__)
        )
        elapsed = seconds([lambda rows=rows: sample(logits_RV, rows)])
        record_bytes(report, f"sampling, {num_rows} rows, {name}", num_rows * vocab_size * 4, elapsed)


STEPS: list[tuple[str, Callable[[Report], object]]] = [
    ("ceilings", ceilings),
    ("decode", time_decode),
    ("prefill", time_prefill),
    ("products of one token", time_gemv),
    *((f"layer, {num} tokens", partial(time_layer, num_tokens=num)) for num in (1, 64, 8192)),
    *((f"sampling, {num} rows", partial(time_sampling, num_rows=num)) for num in (1, 64, 256)),
]


if __name__ == "__main__":
    sys.exit(run_part(STEPS))
