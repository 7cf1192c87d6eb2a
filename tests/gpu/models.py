"""Whole models on the device: tokens in fp32 against the CPU's engine, logits in bf16 against fp64's."""

import gc
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints import VARIANTS, VOCAB_SIZE, make_checkpoint
from drive import Outcome, config_for, drive, preempting_every
from machine import DRY, open_device
from report import Report, run_part
from transformers import AutoModelForCausalLM

from tidegate.engine import cuda
from tidegate.engine.build import build_engine, compose
from tidegate.engine.checkpoint import resolve
from tidegate.engine.device.streams import Device
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.messages import Limit, Submit
from tidegate.engine.model.cuda_decoder import CudaDecoder
from tidegate.engine.model.linear import PlainLinear
from tidegate.engine.model.weights import load_weights
from tidegate.engine.request import Request, SamplingParams
from tidegate.kernels.triton.attention import AttentionBatch

NEAR_TIE = 1e-4
OUTPUT = 6 if DRY else 32
BLOCK = 16
WAYS: dict[str, dict[str, object]] = {
    "room for all": {"device_kv_tokens": 4096, "host_kv_tokens": 4096},
    "room for all, step by step": {"device_kv_tokens": 4096, "host_kv_tokens": 0, "pipeline_depth": 1},
    "swap": {"device_kv_tokens": 288, "host_kv_tokens": 4096, "preemption": "swap"},
    "recompute, small chunks": {
        "device_kv_tokens": 288,
        "host_kv_tokens": 0,
        "preemption": "recompute",
        "max_step_tokens": 23,
    },
    "swap, no cached prefix": {
        "device_kv_tokens": 288,
        "host_kv_tokens": 4096,
        "preemption": "swap",
        "prefix_caching": False,
    },
}
if DRY:
    WAYS = dict(list(WAYS.items())[2:3])


def requests(vocab_size: int, count: int) -> list[Request]:
    """Greedy, filtered and penalized ones; every third begins with a prefix that others share."""
    kinds = [
        SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, max_tokens=OUTPUT, ignore_eos=True),
        SamplingParams(temperature=1.2, min_p=0.02, repetition_penalty=1.2, max_tokens=OUTPUT),
        SamplingParams(temperature=0, presence_penalty=0.5, min_tokens=5, logprobs=3, max_tokens=OUTPUT),
    ]
    rng = random.Random(0)
    shared = [rng.randrange(3, vocab_size) for _ in range(37)]
    made = []
    for i in range(count):
        own = [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, 60))]
        prompt = shared + own if i % 3 == 0 else own
        made.append(Request(id=f"r{i}", prompt_token_ids=prompt, params=kinds[i % 4], seed=i))
    return made


def run(
    device: Device | None, model: str, asked: list[Request], options: dict[str, object], hook: bool
) -> Outcome:
    """On the CPU where there is no device."""
    config = config_for(model, **{"block_size": BLOCK, "max_model_len": 256, "device": "cpu", **options})
    path = resolve(model)
    core = (
        build_engine(config)
        if device is None
        else compose(config, path, cuda.assemble(config, path, False, device))
    )
    outcome = drive(core, asked, preempting_every(7, times=2) if hook else None)
    core.close()
    return outcome


def fp32_tokens(report: Report) -> None:
    """The same tokens as the CPU's engine, whatever happens to the sequences meanwhile."""
    device = open_device()
    count = 5 if DRY else 24
    variants = [
        "llama-llama3",
        "qwen2-yarn-one-kv-head",
        "llama-head-40",
        "qwen2-window-of-every-other-layer",
    ]
    with tempfile.TemporaryDirectory() as folder:
        models = {name: str(make_checkpoint(Path(folder, name), **VARIANTS[name])) for name in variants}
        if DRY:
            models = {"llama-llama3": models["llama-llama3"]}
        else:
            models["demo"] = "demo"
        for name, model in models.items():
            vocab_size = load_weights(resolve(model), lambda *_: PlainLinear)[0].vocab_size
            asked = requests(vocab_size, count)
            expected = run(
                None, model, asked, WAYS.get("room for all", {}) | {"host_kv_tokens": 0}, False
            ).tokens
            compared, differ = 0, []
            for way, options in WAYS.items():
                got = run(device, model, asked, options, "recompute" not in way).tokens
                compared += len(expected)
                differ += [f"{key} {way}" for key in expected if got[key] != expected[key]]
            report.check(f"tokens of {name} in fp32, of {compared} outputs differ", len(differ), 0)
            if differ:
                print("   ", differ[:6])


def parking(report: Report) -> None:
    """Without credit a sequence leaves the device; its tokens are those of one that never stopped."""
    device = open_device()
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_checkpoint(Path(folder, "m"), **VARIANTS["llama"]))
        config = config_for(
            model,
            block_size=BLOCK,
            max_model_len=64,
            # Less than the four need: who waits for credit makes room for the others.
            device_kv_tokens=96,
            host_kv_tokens=1024,
            park_grace=0.0,
        )
        path = resolve(model)
        params = SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True)
        make = lambda credit: [  # noqa: E731
            Request(id=f"p{i}", prompt_token_ids=[5 + i] * (20 + i), params=params, seed=i, emit_upto=credit)
            for i in range(4)
        ]
        core = compose(config, path, cuda.assemble(config, path, False, device))
        expected = drive(core, make(None)).tokens
        core.close()
        core = compose(config, path, cuda.assemble(config, path, False, device))
        outcome = Outcome()
        for request in make(3):
            core.handle(Submit(request))
        credit, steps = 3, 0
        while len(outcome.finished) < 4:
            outcome.take(core.step())
            steps += 1
            assert steps < 50_000
            if steps % 40 == 0:
                credit += 3
                for i in range(4):
                    core.handle(Limit(f"p{i}", credit))
        moved = core.stats().swap_in_bytes
        core.close()
        wrong = sum(outcome.tokens[key] != expected[key] for key in expected)
        report.check("parked sequences whose tokens differ, of 4", wrong, 0)
        report.check("no block came back from the host tier", float(moved == 0), 0)


def bf16_logits(report: Report) -> None:
    """Teacher-forced, prefill and decode: an error of at most 1.25 times that of transformers in bf16."""
    device = open_device()
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
    }
    sizes |= {"num_key_value_heads": 4, "max_position_embeddings": 1024}
    for arch in ("llama",) if DRY else ("llama", "qwen2"):
        with tempfile.TemporaryDirectory() as folder:
            path = make_checkpoint(Path(folder), arch, dtype=torch.bfloat16, **({} if DRY else sizes))
            tokens_T = torch.randint(
                VOCAB_SIZE, (40 if DRY else 300,), generator=torch.Generator().manual_seed(0)
            )
            reference = _transformers(path, torch.float64, device)(tokens_T)
            theirs = _transformers(path, torch.float32 if DRY else torch.bfloat16, device)(tokens_T)
            dtype = "float32" if DRY else "bfloat16"
            config, weights = load_weights(path, lambda *_: PlainLinear, dtype, device.torch_device)
            decoder = CudaDecoder(config, weights, 512)
            limit = 1.25 * max(_relative(theirs, reference), 1e-6)
            prefill_TV, decode_TV = _our_logits(decoder, tokens_T, device)
            report.check(f"{arch}, bf16 logits of prefill", _relative(prefill_TV, reference), limit)
            report.check(
                f"{arch}, bf16 logits of decode", _relative(decode_TV, reference[-len(decode_TV) :]), limit
            )
            del decoder, weights
            gc.collect()


def _transformers(path: Path, dtype: torch.dtype, device: Device) -> Callable[[torch.Tensor], torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    model.to(device.torch_device)

    @torch.inference_mode()
    def logits(tokens_T: torch.Tensor) -> torch.Tensor:
        return model(tokens_T[None].to(device.torch_device)).logits[0]

    return logits


@torch.inference_mode()
def _our_logits(
    decoder: CudaDecoder, tokens_T: torch.Tensor, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token prefilled at once, and of the last few decoded one by one."""
    layout = decoder.layout(64)
    count = len(tokens_T)
    num_blocks = -(-count // 64)
    pool = layout.allocate(2 * num_blocks, device.torch_device).fill_(torch.nan)
    table_1M = torch.arange(2 * num_blocks - 1, num_blocks - 1, -1, dtype=torch.int32)[None]
    heads = decoder.config.num_heads

    def step(start: int, end: int) -> torch.Tensor:
        decodes = int(end - start == 1)
        kv = BlockLayout.layer(pool, 0)
        batch = AttentionBatch.build(decodes, [0, end - start], [end], table_1M, kv, heads)
        ids = tokens_T[start:end].to(device.torch_device)
        return decoder.logits(decoder.forward(ids, batch.positions_T, pool, [batch], None))

    prefill_TV = step(0, count)
    pool.fill_(torch.nan)
    last = count - 4 if DRY else count - 64
    step(0, last)
    return prefill_TV, torch.cat([step(i, i + 1) for i in range(last, count)])


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


if __name__ == "__main__":
    sys.exit(run_part([("fp32 tokens", fp32_tokens), ("parking", parking), ("bf16 logits", bf16_logits)]))
