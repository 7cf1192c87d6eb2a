"""A whole engine on a GPU that is not there: the CUDA device's rooms, with its kernels interpreted.

Its tokens are those of the CPU's engine, whatever the order in which the device does its work.
"""

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from drive import config_for, drive, preempting_every
from fake_cuda import UNWRITTEN, FakeCuda
from tokenizers import Tokenizer

from tidegate.engine import cuda
from tidegate.engine.build import build_engine, compose
from tidegate.engine.config import ConfigError
from tidegate.engine.core import EngineCore
from tidegate.engine.messages import PositionLogprobs
from tidegate.engine.model.cuda_decoder import CudaDecoder
from tidegate.engine.model.cuda_inbox import Inbox
from tidegate.engine.model.cuda_results import LaunchedStep
from tidegate.engine.request import Request, SamplingParams, StructuredOutput
from tidegate.engine.step import DeviceLost

MAX_LEN = 96
REGEX = "(ab|ba)[0-9]{3}(ab|ba)"


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
        SamplingParams(temperature=1.2, top_p=0.9, max_tokens=6, logit_bias={3: 2.5, 70: -9.0, 71: 3.0}),
        SamplingParams(
            temperature=0.9,
            repetition_penalty=1.4,
            min_tokens=3,
            logprobs=2,
            max_tokens=6,
            logit_bias={12: 5.0},
        ),
        SamplingParams(top_k=9, presence_penalty=0.5, frequency_penalty=0.3, max_tokens=5),
        msgspec.structs.replace(greedy, prompt_logprobs=2),
        SamplingParams(allowed_token_ids=(3, 31, 32, 90), presence_penalty=0.5, logprobs=1, max_tokens=6),
        SamplingParams(structured_output=StructuredOutput(regex=REGEX), max_tokens=9),
    ]
    prompts = [[9, 8, 7], prefix, [*prefix, 33, 44], [3], [*prefix, 33, 44, 55], [4, 5], [6]]
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
    assert set(got.tokens["r5", 0]) <= {3, 31, 32, 90}
    written = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(got.tokens["r6", 0])
    assert re.fullmatch(REGEX, written)
    assert swapped > 0
    assert_same_scores(got.prompt_logprobs["r4"], expected.prompt_logprobs["r4"])


def assert_same_scores(got: list[PositionLogprobs], expected: list[PositionLogprobs]) -> None:
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        pairs = zip([ours.chosen, *ours.top], [theirs.chosen, *theirs.top], strict=True)
        for one, other in pairs:
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_result_read_before_its_step_has_ended_is_caught(folder, monkeypatch):
    """With the wait taken out, what the host finds in the ring is no token."""
    monkeypatch.setattr(LaunchedStep, "result", lambda step: step._read(0.0))
    core = cuda_engine(folder, FakeCuda(0, lazy=True), **OPTIONS)
    request = Request(id="r", prompt_token_ids=[9, 8], params=SamplingParams(max_tokens=1), seed=1)
    tokens = drive(core, [request]).tokens["r", 0]
    core.close()
    assert tokens == [UNWRITTEN]


def packets_arrive() -> bool:
    """More packets than the ring holds, sent before the device has read any."""
    gpu = FakeCuda(0, lazy=True)
    words = torch.zeros(64, dtype=torch.int32)
    inbox = Inbox(gpu, gpu.stream(), words, 32, packet_words=64)
    for i in range(12):
        inbox.store(i, np.array([i + 1], np.int32))
        inbox.send()
    gpu.synchronize()
    return words[:12].tolist() == list(range(1, 13))


def test_a_packet_waits_for_the_reader_of_the_one_whose_place_it_takes(monkeypatch):
    assert packets_arrive()
    monkeypatch.setattr(Inbox, "_await_reader", lambda inbox, index: None)
    assert not packets_arrive()


def test_news_too_long_for_a_packet_go_in_several():
    gpu = FakeCuda(3)
    words = torch.zeros(5000, dtype=torch.int32)
    inbox = Inbox(gpu, gpu.stream(), words, 4900, packet_words=1200)
    inbox.store(7, np.arange(4000, dtype=np.int32))
    put = inbox.put(np.arange(6, dtype=np.int32).reshape(2, 3))
    inbox.send()
    gpu.synchronize()
    assert words[7:4007].tolist() == list(range(4000))
    assert put.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(RuntimeError, match="words of news"):
        inbox.put(np.zeros(101, np.int32))


def test_windows_in_some_layers_have_block_tables_of_their_own(tmp_path):
    """Past the window, under preemption, with a shared prefix: the tokens are those of the CPU."""
    folder = make_checkpoint(
        tmp_path,
        "qwen2",
        num_hidden_layers=2,
        use_sliding_window=True,
        sliding_window=18,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size=32,
        head_dim=16,
        num_attention_heads=4,
        intermediate_size=32,
    )
    shared = [5 + i % 7 for i in range(40)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [[*shared, 9], [3, 4], [*shared, 33, 44]]
    asked = [
        Request(id=f"r{i}", prompt_token_ids=prompt, params=params, seed=i)
        for i, prompt in enumerate(prompts)
    ]
    options = {"block_size": 16, "max_model_len": MAX_LEN, **OPTIONS}
    on_cpu = build_engine(config_for(str(folder), device="cpu", **options))
    expected = drive(on_cpu, asked).tokens
    on_cpu.close()
    core = cuda_engine(folder, FakeCuda(1), preemption="swap", **OPTIONS)
    got = drive(core, asked[:2], preempting_every(4)).tokens | drive(core, asked[2:]).tokens
    stats = core.stats()
    core.close()
    assert got == expected
    assert stats.preemptions_swap > 0
    assert stats.prefix_hit_tokens > 0


def test_steps_that_find_no_memory_are_cut_until_they_do(folder, monkeypatch):
    """The tokens stay the same; a step of one token that finds none is its sequence's own fault."""
    core = cuda_engine(folder, FakeCuda(0), **OPTIONS)
    expected = drive(core, requests()[3:])
    core.close()
    forward = CudaDecoder.forward

    def scarce(self, token_ids_T, *arguments):
        if len(token_ids_T) > 9:
            raise torch.OutOfMemoryError("planted")
        return forward(self, token_ids_T, *arguments)

    monkeypatch.setattr(CudaDecoder, "forward", scarce)
    core = cuda_engine(folder, FakeCuda(0, eager=True), **OPTIONS)
    got = drive(core, requests()[3:])
    core.close()
    assert got.tokens == expected.tokens
    assert_same_scores(got.prompt_logprobs["r4"], expected.prompt_logprobs["r4"])

    def none_at_all(self, token_ids_T, *arguments):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(CudaDecoder, "forward", none_at_all)
    core = cuda_engine(folder, FakeCuda(0, eager=True), **OPTIONS)
    outcome = drive(core, requests()[:1])
    core.close()
    assert [end.error for end in outcome.finished.values()] == ["DEVICE_OUT_OF_MEMORY"]


def test_a_lost_device_ends_the_engine(folder, monkeypatch):
    """Nothing will run in this process again: the error goes up to whoever starts another engine."""
    gpu = FakeCuda(0, eager=True)
    core = cuda_engine(folder, gpu, **OPTIONS)
    gpu.lost = True

    def broken(self, *arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(CudaDecoder, "forward", broken)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        drive(core, requests()[:1])


def test_the_device_tier_is_what_weights_and_the_largest_step_leave(folder):
    gpu = FakeCuda(0)
    gpu.free_bytes = 2**21
    core = cuda_engine(folder, gpu, host_kv_tokens=0, max_num_seqs=4, max_step_tokens=24)
    block_bytes = core.info.kv_bytes_per_token * core.info.block_size
    used, step = gpu.free_bytes, gpu.free_bytes // 4
    room = int(0.9 * 2 * gpu.free_bytes) - used - step
    assert core.info.device_blocks == min(room // block_bytes, 4 * (MAX_LEN // 16) + 1)
    core.close()
    with pytest.raises(ConfigError, match="device_memory_fraction"):
        cuda_engine(folder, gpu, device_memory_fraction=0.5, max_num_seqs=4, max_step_tokens=24)
