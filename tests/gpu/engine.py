"""Throughput and latency of the whole engine, scheduler included, at batches of 1 to 256."""

import itertools
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

from machine import DRY, open_device
from random_model import LLAMA_8B, QWEN_1_5B, TINY, engine_of, random_decoder, weight_bytes
from report import Report, run_part
from timing import copy_bandwidth

from tidegate.engine.core import EngineCore
from tidegate.engine.device.streams import Device
from tidegate.engine.messages import Submit
from tidegate.engine.model.config import ModelConfig
from tidegate.engine.model.cuda_runner import CudaRunner
from tidegate.engine.request import Request, SamplingParams
from tidegate.engine.step import StepHandle, StepPlan, StepResult

PROMPT, STEPS, WARM_UP = (20, 8, 4) if DRY else (1024, 96, 24)
BATCHES = (1, 4) if DRY else (1, 8, 64, 256)
# Of a decode step over its roofline, by (shape, batch): solid.
GOALS = {("Llama-3.1-8B", 1): 1.25, ("Qwen2.5-1.5B", 1): 1.6, ("Llama-3.1-8B", 64): 1.3}
IDLE_GOAL_US = 150


@dataclass
class Watch:
    """Times the device's own work of each step, and its rest between two."""

    runner: CudaRunner
    seconds: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    _before: StepHandle | None = None

    def launch(self, plan: StepPlan) -> StepHandle:
        return _Watched(self, self.runner.launch(plan))

    def close(self) -> None:
        self.runner.close()

    def ended(self, handle: StepHandle, result: StepResult) -> None:
        self.seconds.append(result.seconds)
        if self._before is not None:
            self.gaps.append(max(0.0, handle.began.seconds_since(self._before.done)))  # type: ignore[attr-defined]
        self._before = handle


@dataclass
class _Watched:
    watch: Watch
    handle: StepHandle

    def result(self) -> StepResult:
        result = self.handle.result()
        self.watch.ended(self.handle, result)
        return result


def run_shape(shape: ModelConfig, bandwidth: float, device: Device, report: Report) -> None:
    decoder = random_decoder(shape, device, 128 if DRY else 2048)
    room = max(BATCHES) * (PROMPT + STEPS + WARM_UP + 128)
    core = engine_of(
        decoder,
        device,
        max_num_seqs=max(BATCHES),
        max_step_tokens=64 if DRY else 4096,
        device_kv_tokens=room,
        host_kv_tokens=0,
        prefix_caching=False,
    )
    watch = Watch(core._runner)  # type: ignore[arg-type]
    core._runner = watch  # type: ignore[assignment]
    for batch in BATCHES:
        run_batch(core, watch, shape, batch, bandwidth, report)
    core.close()


def run_batch(
    core: EngineCore, watch: Watch, shape: ModelConfig, batch: int, bandwidth: float, report: Report
) -> None:
    rng = random.Random(batch)
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=STEPS + WARM_UP, ignore_eos=True)
    began = time.perf_counter()
    for i in range(batch):
        prompt = [rng.randrange(3, shape.vocab_size) for _ in range(PROMPT)]
        core.handle(Submit(Request(id=f"{batch}-{i}", prompt_token_ids=prompt, params=params, seed=i)))
    first: dict[str, float] = {}
    produced: dict[str, int] = {}
    finished = 0
    while len(first) < batch:
        for delta in core.step().deltas:
            first.setdefault(delta.request_id, time.perf_counter())
            produced[delta.request_id] = produced.get(delta.request_id, 0) + len(delta.token_ids)
    prefill = max(first.values()) - began
    # Until graphs are captured and the kernels compiled for this batch.
    while min(produced.values()) < WARM_UP:
        for delta in core.step().deltas:
            produced[delta.request_id] += len(delta.token_ids)
    watch.seconds.clear()
    watch.gaps.clear()
    arrivals = []
    begun = time.perf_counter()
    tokens = 0
    while finished < batch:
        out = core.step()
        count = sum(len(delta.token_ids) for delta in out.deltas)
        finished += len(out.finished)
        if count == batch:
            arrivals.append(time.perf_counter())
            tokens += count
    name = f"{shape.architecture}, batch {batch}"
    if len(arrivals) < 3:
        return
    pauses = [b - a for a, b in itertools.pairwise(arrivals)]
    step = statistics.median(watch.seconds)
    context = PROMPT + WARM_UP + STEPS / 2
    kv = batch * context * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    roofline = (weight_bytes(shape) + kv) / bandwidth
    rate = batch * len(pauses) / (arrivals[-1] - arrivals[0])
    report.figure(f"{name}: output", rate, "tok/s", note=f"{tokens} tokens in {arrivals[-1] - begun:.2f} s")
    report.figure(
        f"{name}: prefill of {PROMPT} each",
        batch * PROMPT / prefill,
        "tok/s",
        note=f"{prefill * 1e3:.0f} ms to the last first token",
    )
    quantiles = sorted(pauses)
    report.figure(
        f"{name}: between tokens, p50",
        statistics.median(pauses) * 1e3,
        "ms",
        note=f"p99 {quantiles[int(0.99 * (len(quantiles) - 1))] * 1e3:.2f} ms",
    )
    report.figure(
        f"{name}: decode step over its roofline",
        step / roofline,
        "times",
        GOALS.get((shape.architecture, batch)),
        note=f"{step * 1e3:.3f} ms of {roofline * 1e3:.3f}",
    )
    report.figure(
        f"{name}: GPU idle between steps",
        statistics.median(watch.gaps) * 1e6,
        "us",
        IDLE_GOAL_US,
        note=f"longest {max(watch.gaps) * 1e6:.0f}",
    )


def llama(report: Report) -> None:
    device = open_device()
    run_shape(TINY if DRY else LLAMA_8B, 1e9 if DRY else copy_bandwidth(), device, report)


def qwen(report: Report) -> None:
    device = open_device()
    device.release_cache()
    run_shape(TINY if DRY else QWEN_1_5B, 1e9 if DRY else copy_bandwidth(), device, report)


if __name__ == "__main__":
    sys.exit(run_part([("Qwen2.5-1.5B", qwen), ("Llama-3.1-8B", llama)]))
