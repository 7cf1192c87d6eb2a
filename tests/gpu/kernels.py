"""Check the Triton kernels on a CUDA device, then time them against torch and the device's ceilings.

    PYTHONPATH=.src:tests/support:tests/gpu python3 -P tests/gpu/kernels.py --json kernels.json

Prints a line for each result and writes all of them as JSON; ends with status 1 where one is wrong. Takes
a minute and a half, most of it compiling.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import triton
from paged_cases import make_case
from peers import PagedWork, peers
from timing import copy_bandwidth, matmul_flops, seconds
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidegate.kernels.noise import gumbel_noise, noise_keys
from tidegate.kernels.triton.activation import silu_mul
from tidegate.kernels.triton.attention import AttentionBatch, paged_attention, write_kv
from tidegate.kernels.triton.gemv import gemv, gemv_add, gemv_gated
from tidegate.kernels.triton.norm import add_rms_norm, rms_norm
from tidegate.kernels.triton.rope_kv_write import rope_kv_write
from tidegate.kernels.triton.sampling import SamplingRows, sample

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# (query tokens, context) of each sequence.
MIXED = [(1, 1), (1, 40), (1, 33), (1, 9000), (1, 64), (5, 5), (64, 64), (7, 50), (300, 970), (2, 129)]
LLAMA_8B, QWEN_1_5B, HEAD_64, HEAD_256 = (32, 8, 128), (12, 2, 128), (32, 8, 64), (16, 4, 256)
"""Query heads, KV heads and head size."""


@dataclass
class Check:
    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN is not


@dataclass
class Timing:
    name: str
    microseconds: float
    share: float
    """Of ``ceiling``, in the time's unit of work."""
    ceiling: str


def check_attention() -> list[Check]:
    checks = []
    for dtype, limit in LIMITS.items():
        for num_heads, num_kv_heads, head_dim, block_size, window in (
            (32, 8, 128, 64, None),
            (7, 1, 80, 16, None),
            (16, 1, 256, 32, None),
            (4, 4, 64, 64, None),
            (6, 2, 96, 32, None),
            (32, 8, 128, 64, 512),
            (7, 1, 80, 16, 33),
            (16, 1, 256, 32, 1),
            (4, 4, 64, 128, 100),
        ):
            case = make_case(
                MIXED,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                block_size=block_size,
                dtype=dtype,
                device="cuda",
                window=window,
            )
            batch = AttentionBatch.build(
                case.num_decodes,
                case.query_starts,
                case.context_lens,
                case.block_tables_SM,
                case.kv_NCKBD,
                num_heads,
                window,
            )
            write_kv(case.key_TKD, case.value_TKD, case.kv_NCKBD, batch)
            name = (
                f"attention {_short(dtype)} H{num_heads} K{num_kv_heads} D{head_dim} B{block_size} W{window}"
            )
            for again in ("", ", again"):
                out_THD = paged_attention(case.query_THD, case.kv_NCKBD, batch, case.scale)
                checks.append(Check(name + again, max(case.errors(out_THD)), limit))
    return checks


def check_graph_replay() -> list[Check]:
    """One captured decode step, replayed with other lengths, tables and numbers of splits."""
    context_lens_S = torch.ones(32, dtype=torch.int32, device="cuda")
    tables_SM = torch.zeros((32, 300), dtype=torch.int32, device="cuda")
    pool = torch.randn(8192, 1, 2, 8, 16, 128, device="cuda").bfloat16()
    query_SHD = torch.randn(32, 32, 128, device="cuda").bfloat16()

    def step() -> torch.Tensor:
        batch = AttentionBatch.decodes(context_lens_S, tables_SM, pool[:, 0])
        return paged_attention(query_SHD, pool[:, 0], batch, 0.1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_SHD = step()
    checks = []
    for longest, filled in ((4000, 32), (40, 32), (3000, 1), (1, 7)):
        context_lens_S.zero_()
        context_lens_S[:filled] = torch.randint(1, longest + 1, (filled,), device="cuda").int()
        tables_SM.copy_(torch.randint(0, 8192, tables_SM.shape, device="cuda"))
        graph.replay()
        expected_SHD = torch.zeros(out_SHD.shape, device="cuda")
        for s in range(filled):
            length = int(context_lens_S[s])
            blocks = pool[tables_SM[s, : -(-length // 16)].long(), 0].float()
            key_1KXD, value_1KXD = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, :length]
            expected_SHD[s] = F.scaled_dot_product_attention(
                query_SHD[s, None, :, None].float(), key_1KXD, value_1KXD, scale=0.1, enable_gqa=True
            )[0, :, 0]
        checks.append(
            Check(f"graph replay, {filled} of up to {longest}", _error(out_SHD, expected_SHD), 1e-2)
        )
    return checks


def check_rest() -> list[Check]:
    checks = []
    for dtype, limit in LIMITS.items():

        def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, device="cuda").to(dtype)

        x_TM, residual_TM, weight_M = random(33, 4096), random(33, 4096), random(4096)
        sum_TM = x_TM + residual_TM
        normed_TM = add_rms_norm(x_TM, residual_TM, weight_M, 1e-5)
        expected_TM = F.rms_norm(sum_TM.double(), (4096,), weight_M.double(), 1e-5)
        checks.append(Check(f"add + RMS norm {_short(dtype)}", _error(normed_TM, expected_TM), limit))
        checks.append(Check(f"residual {_short(dtype)}", _error(residual_TM, sum_TM), limit))
        normed_TM = rms_norm(x_TM[:, :1536].contiguous(), weight_M[:1536], 1e-5)
        expected_TM = F.rms_norm(x_TM[:, :1536].double(), (1536,), weight_M[:1536].double(), 1e-5)
        checks.append(Check(f"RMS norm {_short(dtype)}", _error(normed_TM, expected_TM), limit))
        gate_up_TE = random(33, 2 * 8960)
        gate_TF, up_TF = gate_up_TE.double().chunk(2, 1)
        checks.append(
            Check(f"SiLU·mul {_short(dtype)}", _error(silu_mul(gate_up_TE), F.silu(gate_TF) * up_TF), limit)
        )

        qkv_TXD, angles_TF = random(40, 48, 80), random(40, 40, dtype=torch.float32)
        cos_T1D = torch.cat((angles_TF.cos(), angles_TF.cos()), 1)[:, None].to(dtype)
        sin_T1D = torch.cat((-angles_TF.sin(), angles_TF.sin()), 1)[:, None].to(dtype)
        pool = torch.full((64, 2, 2, 8, 16, 80), torch.nan, dtype=dtype, device="cuda")
        blocks_T = torch.randperm(64, device="cuda")[:40]
        offsets_T = torch.randint(0, 16, (40,), device="cuda")
        norms = (random(80), random(80), 1e-6)
        query_THD = rope_kv_write(qkv_TXD, cos_T1D, sin_T1D, pool[:, 1], blocks_T, offsets_T, norms)
        heads_TXD = qkv_TXD.double()
        heads_TXD[:, :32] = F.rms_norm(heads_TXD[:, :32], (80,), norms[0].double(), 1e-6)
        heads_TXD[:, 32:40] = F.rms_norm(heads_TXD[:, 32:40], (80,), norms[1].double(), 1e-6)
        swapped_TXD = heads_TXD[:, :40].roll(40, -1)
        turned_TXD = heads_TXD[:, :40] * cos_T1D.double() + swapped_TXD * sin_T1D.double()
        checks.append(Check(f"RoPE of query {_short(dtype)}", _error(query_THD, turned_TXD[:, :32]), limit))
        got_TKD = pool[blocks_T, 1, 0, :, offsets_T]
        checks.append(Check(f"RoPE of key {_short(dtype)}", _error(got_TKD, turned_TXD[:, 32:]), limit))
        got_TKD = pool[blocks_T, 1, 1, :, offsets_T]
        checks.append(Check(f"KV write {_short(dtype)}", _error(got_TKD, qkv_TXD[:, 40:]), 0.0))
        unwritten = int((~pool.isnan()).sum()) - 2 * qkv_TXD[:, 32:40].numel()
        checks.append(Check(f"KV write, lines elsewhere {_short(dtype)}", float(unwritten), 0.0))
    return checks


def check_gemv() -> list[Check]:
    """With rows of 8B and of an odd size."""
    checks = []
    for dtype, limit in LIMITS.items():
        for num_inputs, num_outputs in ((4096, 6144), (1100, 70), (14_336, 4096)):
            weight_OI = (torch.randn(num_outputs, num_inputs, device="cuda") / num_inputs**0.5).to(dtype)
            bias_O = torch.randn(num_outputs, device="cuda").to(dtype)
            norm_I = torch.randn(num_inputs, device="cuda").to(dtype)
            x_1I = torch.randn(1, num_inputs, device="cuda").to(dtype)
            normed_1I = F.rms_norm(x_1I.double(), (num_inputs,), norm_I.double(), 1e-5)
            expected_1O = F.linear(normed_1I, weight_OI.double(), bias_O.double())
            gate_1F, up_1F = expected_1O.chunk(2, 1)
            residual_1O = torch.randn(1, num_outputs, device="cuda").to(dtype)
            sum_1O = residual_1O + F.linear(x_1I.double(), weight_OI.double(), bias_O.double())
            gemv_add(x_1I, weight_OI, bias_O, residual_1O)
            got_1F = gemv_gated(x_1I, weight_OI, bias_O, (norm_I, 1e-5))
            shape = f"{_short(dtype)} {num_outputs} x {num_inputs}"
            checks += [
                Check(
                    f"norm + product of one token {shape}",
                    _error(gemv(x_1I, weight_OI, bias_O, (norm_I, 1e-5)), expected_1O),
                    limit,
                ),
                Check(f"  with SiLU {shape}", _error(got_1F, F.silu(gate_1F) * up_1F), limit),
                Check(f"  with residual {shape}", _error(residual_1O, sum_1O), limit),
            ]
    return checks


def check_sampling() -> list[Check]:
    """Against a full sort, on a large vocabulary; the share of rows whose token differs."""
    num_rows, vocab_size = 64, 152_064
    generator = torch.Generator("cuda").manual_seed(0)
    logits_RV = torch.randn((num_rows, vocab_size), generator=generator, device="cuda") * 3
    rows = sampling_rows(num_rows, vocab_size)
    got_R = sample(logits_RV, rows).token_ids_R
    wrong = 0
    for r in range(num_rows):
        temperature = float(rows.temperature_R[r])
        if temperature == 0:
            wrong += int(got_R[r] != logits_RV[r].argmax())
            continue
        scores_V = (logits_RV[r] - logits_RV[r].max()) / temperature
        ordered_V = scores_V.sort(descending=True).values[: int(rows.top_k_R[r])].double()
        sums_V = ordered_V.exp().cumsum(0)
        last = min(int((sums_V < rows.top_p_R[r] * sums_V[-1]).sum()), len(ordered_V) - 1)
        cut = max(float(ordered_V[last]), float(rows.log_min_p_R[r]))
        ids_V = torch.arange(vocab_size, dtype=torch.int32, device="cuda")
        noisy_V = scores_V + gumbel_noise(rows.noise_keys_R2[r], ids_V)
        wrong += int(got_R[r] != noisy_V.masked_fill_(scores_V < cut, -torch.inf).argmax())
    return [Check("sampling, rows that differ", float(wrong), 0.0)]


def sampling_rows(num_rows: int, vocab_size: int) -> SamplingRows:
    """Greedy, plain, top_k, top_p, both, all: one row after another."""
    every = np.arange(num_rows)

    def pick(values: list[float], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.resize(np.array(values, dtype), num_rows)).cuda()

    return SamplingRows(
        pick([0, 1, 0.7, 1, 1.3, 0.5], np.float32),
        pick([vocab_size, vocab_size, 50, vocab_size, 40, 1000], np.int32),
        pick([1, 1, 1, 0.9, 0.95, 0.8], np.float64),
        pick([0, 0, 0, 0, 0, 0.05], np.float32).log(),
        torch.from_numpy(noise_keys(every.astype(np.uint64), every, every)).cuda(),
    )


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
                error = _error(launches[0](), expected_THD)
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


def time_decode(bandwidth: float) -> list[Timing]:
    ragged = torch.randint(100, 8000, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    timings = []
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
        timings += [
            Timing(label, spent * 1e6, num_bytes / spent / bandwidth, "copy bandwidth")
            for label, spent in [
                (f"decode {name}", elapsed),
                *((f"  {peer}", spent) for peer, spent in others),
            ]
        ]
    return timings


def time_prefill() -> list[Timing]:
    timings = []
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
        timings += [
            Timing(label, spent * 1e6, flops / spent / 1e12, "TFLOP/s")
            for label, spent in [
                (f"prefill {name}", elapsed),
                *((f"  {peer}", spent) for peer, spent in others),
            ]
        ]
        if len(shapes) == 1 and shapes[0][0] == shapes[0][1]:
            timings += time_torch_prefill(shapes[0][0], num_heads, head_dim, flops)
    return timings


def time_torch_prefill(length: int, num_heads: int, head_dim: int, flops: float) -> list[Timing]:
    """The same attention by torch, on contiguous tensors and with a KV head for each query head."""
    query, key, value = (
        torch.randn(1, num_heads, length, head_dim, device="cuda").bfloat16() for _ in range(3)
    )
    timings = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            elapsed = seconds([lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)])
        name = f"  the same, torch {backend.name.lower()}, no pages"
        timings.append(Timing(name, elapsed * 1e6, flops / elapsed / 1e12, "TFLOP/s"))
    return timings


def time_layer(num_tokens: int, bandwidth: float) -> list[Timing]:
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
    timings = []
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
        elapsed = seconds(launches)
        share = num_tokens * num_bytes / elapsed / bandwidth
        timings.append(Timing(f"{name}, {num_tokens} tokens", elapsed * 1e6, share, "copy bandwidth"))
    return timings


def time_gemv(bandwidth: float) -> list[Timing]:
    """Products of one token, against torch's of the same weights without what surrounds them."""
    timings = []
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
        timings += [
            Timing(label, spent * 1e6, num_bytes / spent / bandwidth, "copy bandwidth")
            for label, spent in (
                (name, seconds([partial(ours, x_1I, weight, None, last) for weight in weights])),
                (
                    "  torch, the product alone",
                    seconds([partial(F.linear, x_1I, weight) for weight in weights]),
                ),
            )
        ]
    return timings


def time_sampling(num_rows: int, bandwidth: float) -> list[Timing]:
    """With each kind of filter alone; the work is one pass over the logits."""
    vocab_size = 152_064
    logits_RV = torch.randn(num_rows, vocab_size, device="cuda") * 3
    mixed = sampling_rows(6 * num_rows, vocab_size)
    timings = []
    for kind, name in enumerate(("greedy", "no filter", "top-k 50", "top-p 0.9", "top-k 40, top-p 0.95")):
        rows = SamplingRows(
            *(getattr(mixed, field)[kind::6].contiguous() for field in SamplingRows.__slots__)
        )
        elapsed = seconds([lambda rows=rows: sample(logits_RV, rows)])
        share = num_rows * vocab_size * 4 / elapsed / bandwidth
        timings.append(Timing(f"sampling, {num_rows} rows, {name}", elapsed * 1e6, share, "copy bandwidth"))
    return timings


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="file for all results")
    parser.add_argument("--part", choices=("check", "time"), help="one part alone")
    arguments = parser.parse_args()

    device = torch.cuda.get_device_name()
    report = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}")
    checks: list[Check] = []
    if arguments.part != "time":
        checks = check_attention() + check_graph_replay() + check_rest() + check_gemv()
        checks += check_sampling()
        for check in checks:
            verdict = "ok   " if check.passed else "WRONG"
            print(f"{verdict} {check.name:55} {check.error:.2e} of {check.limit:.0e}")
        report["checks"] = [asdict(check) for check in checks]
    if arguments.part != "check":
        bandwidth, flops = copy_bandwidth(), matmul_flops()
        print(f"copy {bandwidth / 1e12:.2f} TB/s read and written, bf16 product {flops / 1e12:.0f} TFLOP/s")
        timings = time_decode(bandwidth) + time_prefill()
        timings += time_gemv(bandwidth)
        for num_tokens in (1, 64, 8192):
            timings += time_layer(num_tokens, bandwidth)
        for num_rows in (1, 64, 256):
            timings += time_sampling(num_rows, bandwidth)
        for timing in timings:
            print(f"{timing.name:45} {timing.microseconds:9.1f} us {timing.share:8.3f} {timing.ceiling}")
        report |= {"copy_bandwidth": bandwidth, "matmul_flops": flops}
        report["timings"] = [asdict(timing) for timing in timings]
    with open(arguments.json, "w") as file:
        json.dump(report, file, indent=1)
    failed = [check.name for check in checks if not check.passed]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
