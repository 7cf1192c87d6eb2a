"""A whole engine on a GPU that is not there: the CUDA device's rooms, with its kernels interpreted.

Its tokens are those of the CPU's engine, whatever the order in which the device does its work.
"""

from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from drive import config_for, drive, preempting_every
from fake_cuda import FakeCuda

from tidegate.engine import cuda
from tidegate.engine.build import build_engine, compose
from tidegate.engine.core import EngineCore
from tidegate.engine.request import Request, SamplingParams

MAX_LEN = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        "qwen2",
        num_hidden_layers=1,
        hidden_size=32,
        head_dim=16,
        num_attention_heads=4,
        intermediate_size=32,
    )


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Overrides that of the kernels' own tests: here the pools are poisoned, and time is short."""


def requests() -> list[Request]:
    prefix = [5 + i % 7 for i in range(20)]
    greedy = SamplingParams(temperature=0, max_tokens=7)
    asks = [
        greedy,
        SamplingParams(temperature=1.2, top_p=0.9, max_tokens=6),
        SamplingParams(temperature=0.9, repetition_penalty=1.4, min_tokens=3, logprobs=2, max_tokens=6),
        SamplingParams(top_k=9, presence_penalty=0.5, frequency_penalty=0.3, max_tokens=5),
        greedy,
    ]
    prompts = [[9, 8, 7], prefix, [*prefix, 33, 44], [3], [*prefix, 33, 44, 55]]
    pairs = zip(prompts, asks, strict=True)
    return [
        Request(id=f"r{i}", prompt_token_ids=prompt, params=params, seed=i)
        for i, (prompt, params) in enumerate(pairs)
    ]


def cuda_engine(folder: Path, device: FakeCuda, **options: object) -> EngineCore:
    config = config_for(str(folder), **{"block_size": 16, "max_model_len": MAX_LEN, **options})
    return compose(config, folder, cuda.assemble(config, folder, False, device))


OPTIONS = {"device_kv_tokens": 160, "host_kv_tokens": 320, "max_num_seqs": 4, "max_step_tokens": 24}


@pytest.mark.parametrize("seed", range(3))
def test_its_tokens_are_those_of_the_cpu(folder, seed):
    """Prompts in chunks, a shared prefix, penalties and logprobs, preemption: in any order of work."""
    config = config_for(str(folder), block_size=16, max_model_len=MAX_LEN, device="cpu", **OPTIONS)
    cpu = build_engine(config)
    expected = drive(cpu, requests())
    cpu.close()
    core = cuda_engine(folder, FakeCuda(seed), preemption="swap", **OPTIONS)
    got = drive(core, requests(), preempting_every(5, times=1))
    swapped = core.stats().preemptions_swap
    core.close()
    assert got.tokens == expected.tokens
    assert swapped > 0
