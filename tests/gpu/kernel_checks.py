"""Check the Triton kernels on a CUDA device against torch.

    PYTHONPATH=.src:tests/support:tests/gpu python3 -P tests/gpu/kernel_checks.py --json checks.json

Takes a minute and a half, most of it compiling.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from paged_cases import make_case
from report import Report, run_part

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


def check_attention(report: Report) -> None:
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
                report.check(name + again, max(case.errors(out_THD)), limit)


def check_graph_replay(report: Report) -> None:
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
        error = relative_error(out_SHD, expected_SHD)
        report.check(f"graph replay, {filled} of up to {longest}", error, 1e-2)


def check_rest(report: Report) -> None:
    for dtype, limit in LIMITS.items():

        def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, device="cuda").to(dtype)

        x_TM, residual_TM, weight_M = random(33, 4096), random(33, 4096), random(4096)
        sum_TM = x_TM + residual_TM
        normed_TM = add_rms_norm(x_TM, residual_TM, weight_M, 1e-5)
        expected_TM = F.rms_norm(sum_TM.double(), (4096,), weight_M.double(), 1e-5)
        report.check(f"add + RMS norm {_short(dtype)}", relative_error(normed_TM, expected_TM), limit)
        report.check(f"residual {_short(dtype)}", relative_error(residual_TM, sum_TM), limit)
        normed_TM = rms_norm(x_TM[:, :1536].contiguous(), weight_M[:1536], 1e-5)
        expected_TM = F.rms_norm(x_TM[:, :1536].double(), (1536,), weight_M[:1536].double(), 1e-5)
        report.check(f"RMS norm {_short(dtype)}", relative_error(normed_TM, expected_TM), limit)
        gate_up_TE = random(33, 2 * 8960)
        gate_TF, up_TF = gate_up_TE.double().chunk(2, 1)
        expected_TF = F.silu(gate_TF) * up_TF
        report.check(f"SiLU·mul {_short(dtype)}", relative_error(silu_mul(gate_up_TE), expected_TF), limit)

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
        report.check(f"RoPE of query {_short(dtype)}", relative_error(query_THD, turned_TXD[:, :32]), limit)
        got_TKD = pool[blocks_T, 1, 0, :, offsets_T]
        report.check(f"RoPE of key {_short(dtype)}", relative_error(got_TKD, turned_TXD[:, 32:]), limit)
        got_TKD = pool[blocks_T, 1, 1, :, offsets_T]
        report.check(f"KV write {_short(dtype)}", relative_error(got_TKD, qkv_TXD[:, 40:]), 0)
        unwritten = int((~pool.isnan()).sum()) - 2 * qkv_TXD[:, 32:40].numel()
        report.check(f"KV write, lines elsewhere {_short(dtype)}", unwritten, 0)


def check_gemv(report: Report) -> None:
    """With rows of 8B and of an odd size."""
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
            normed_1O = gemv(x_1I, weight_OI, bias_O, (norm_I, 1e-5))
            report.check(
                f"norm + product of one token {shape}", relative_error(normed_1O, expected_1O), limit
            )
            report.check(f"  with SiLU {shape}", relative_error(got_1F, F.silu(gate_1F) * up_1F), limit)
            report.check(f"  with residual {shape}", relative_error(residual_1O, sum_1O), limit)


def check_sampling(report: Report) -> None:
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
    report.check("sampling, rows that differ", wrong, 0)


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


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of what differs, as a share of what is expected."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    torch.manual_seed(0)
    parts = (check_attention, check_graph_replay, check_rest, check_gemv, check_sampling)
    sys.exit(run_part([(part.__name__.removeprefix("check_"), part) for part in parts]))
