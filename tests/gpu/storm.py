"""A preemption storm: KV for a quarter of the need, by swap and by recomputation, against KV for all."""

import random
import sys
import time

from machine import DRY, open_device
from random_model import LLAMA_8B, TINY, engine_of, random_decoder
from report import Report, run_part

from tidegate.engine.core import EngineCore
from tidegate.engine.device.streams import Device
from tidegate.engine.messages import Stats, Submit
from tidegate.engine.model.cuda_decoder import CudaDecoder
from tidegate.engine.request import Request, SamplingParams

REQUESTS, ROWS, PROMPT, OUTPUT = (6, 4, 30, 10) if DRY else (96, 40, 512, 384)
NEED = REQUESTS * (PROMPT + OUTPUT + 64)


def storm(report: Report) -> None:
    device = open_device()
    decoder = random_decoder(TINY if DRY else LLAMA_8B, device, 64 if DRY else 2048)
    rates = {}
    run(decoder, device, {"device_kv_tokens": NEED, "host_kv_tokens": 0})  # compiles kernels
    for name, options in {
        "KV for all": {"device_kv_tokens": NEED, "host_kv_tokens": 0},
        "swap": {"device_kv_tokens": NEED // 4, "host_kv_tokens": NEED, "preemption": "swap"},
        "auto": {"device_kv_tokens": NEED // 4, "host_kv_tokens": NEED, "preemption": "auto"},
        "recompute": {"device_kv_tokens": NEED // 4, "host_kv_tokens": 0, "preemption": "recompute"},
    }.items():
        rates[name], stats = run(decoder, device, options)
        swapped = (stats.swap_out_bytes + stats.swap_in_bytes) / 1e9
        report.figure(
            f"storm of {REQUESTS} x ({PROMPT} + {OUTPUT}), {name}",
            rates[name],
            "tok/s",
            note=f"{stats.preemptions_swap} swapped, {stats.preemptions_recompute} dropped, "
            f"{stats.recomputed_tokens} tokens again, {swapped:.1f} GB moved",
        )
        device.release_cache()
    for name in ("swap", "auto"):
        ratio = rates[name] / rates["KV for all"]
        report.figure(f"storm, {name} against KV for all", ratio, "times", 0.90, at_most=False)
    report.figure(
        "storm, swap against recompute", rates["swap"] / rates["recompute"], "times", 1.0, at_most=False
    )


def run(decoder: CudaDecoder, device: Device, options: dict[str, object]) -> tuple[float, Stats]:
    """Tokens a second, and what the engine counted meanwhile."""
    core = engine_of(
        decoder,
        device,
        max_num_seqs=ROWS,
        max_step_tokens=64 if DRY else 2048,
        prefix_caching=False,
        block_size=16 if DRY else 64,
        **options,
    )
    warm_up(core, decoder.vocab_size)
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    began = time.perf_counter()
    for i in range(REQUESTS):
        prompt = [rng.randrange(3, decoder.vocab_size) for _ in range(PROMPT)]
        core.handle(Submit(Request(id=f"r{i}", prompt_token_ids=prompt, params=params, seed=i)))
    finished = 0
    while finished < REQUESTS:
        out = core.step()
        assert all(done.error is None for done in out.finished), out.finished
        finished += len(out.finished)
    seconds = time.perf_counter() - began
    stats = core.stats()
    core.close()
    return REQUESTS * OUTPUT / seconds, stats


def warm_up(core: EngineCore, vocab_size: int) -> None:
    """Until the graphs of every batch size are captured: that is no part of a storm."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for batch in [1] if DRY else [1, 2, 4, 8, *range(16, ROWS + 1, 16), ROWS]:
        for i in range(batch):
            prompt = [3 + (i + j) % (vocab_size - 3) for j in range(8)]
            core.handle(Submit(Request(id=f"w{batch}-{i}", prompt_token_ids=prompt, params=params, seed=i)))
        finished = 0
        while finished < batch:
            finished += len(core.step().finished)


if __name__ == "__main__":
    sys.exit(run_part([("storm", storm)]))
