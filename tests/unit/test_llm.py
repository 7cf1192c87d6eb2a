"""``LLM`` over a core without a model: what it takes, what it gives back, how it fails."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_core import MAX_MODEL_LEN, VOCAB_SIZE, FakeCore, hashed
from small_tokenizers import EOS, TEMPLATE, byte_level_tokenizer
from transformers import PreTrainedTokenizerFast

from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.llm import LLM
from tidegate.engine.messages import Command, Finish
from tidegate.engine.request import FinishReason, InvalidRequest, SamplingParams

TOKENIZER = byte_level_tokenizer()
EOS_ID = TOKENIZER.token_to_id(EOS)
REPLY = "The tide 🌊 comes in. And out."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token=EOS, chat_template=TEMPLATE)
    wrapped.save_pretrained(path)
    return str(path)


MakeLLM = Callable[..., LLM]


@pytest.fixture
def make_llm(folder: str, monkeypatch: pytest.MonkeyPatch) -> MakeLLM:
    """An ``LLM`` whose core picks its tokens with ``next_token``; the core is at ``llm._core``."""

    def make(
        next_token: Callable[[Sequence[int], int], int] = hashed, tokens_per_step: int = 1, **options: Any
    ) -> LLM:
        def build(config: EngineConfig, progress: bool) -> FakeCore:
            return FakeCore(config, next_token, [EOS_ID], tokens_per_step)

        monkeypatch.setattr("tidegate.engine.llm.build_engine", build)
        return LLM(folder, **options)

    return make


def replying(prompt: str, reply: str) -> Callable[[Sequence[int], int], int]:
    """A model that answers ``prompt`` with ``reply`` and then its end-of-sequence token, for ever."""
    num_prompt_tokens = len(TOKENIZER.encode(prompt).ids)
    reply_ids = TOKENIZER.encode(reply).ids

    def next_token(context: Sequence[int], _choice: int) -> int:
        position = len(context) - num_prompt_tokens
        return int(reply_ids[position]) if position < len(reply_ids) else EOS_ID

    return next_token


def hashed_tokens(prompt: list[int], count: int, choice: int = 0) -> list[int]:
    context = list(prompt)
    for _ in range(count):
        context.append(hashed(context, choice))
    return context[len(prompt) :]


LENGTH_4 = SamplingParams(max_tokens=4, ignore_eos=True)


# Prompts


def test_a_prompt_may_be_text_or_token_ids_alone_or_in_a_list(make_llm: MakeLLM) -> None:
    llm = make_llm()
    ids = TOKENIZER.encode("tide").ids
    for single in ("tide", ids, {"prompt_token_ids": ids}):
        for prompts in (single, [single]):
            (result,) = llm.generate(prompts, LENGTH_4, use_tqdm=False)
            assert result.prompt_token_ids == ids
            assert result.prompt == ("tide" if single == "tide" else None)
            assert result.outputs[0].token_ids == hashed_tokens(ids, 4)


def test_results_stand_in_the_order_of_mixed_prompts_of_ragged_lengths(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompts: list[Any] = [[5], "tide", {"prompt_token_ids": [7, 8, 9]}]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    results = llm.generate(prompts, params, use_tqdm=False)
    assert [r.prompt_token_ids for r in results] == [[5], TOKENIZER.encode("tide").ids, [7, 8, 9]]
    assert [len(r.outputs[0].token_ids) for r in results] == [9, 1, 5]


def test_no_prompts_give_no_results(make_llm: MakeLLM) -> None:
    assert make_llm().generate([], use_tqdm=False) == []


def test_thousands_of_prompts_pass_a_short_queue(make_llm: MakeLLM) -> None:
    llm = make_llm(max_waiting=50)
    prompts = [[i % 250, i // 250] for i in range(3000)]
    results = llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert [r.outputs[0].token_ids for r in results] == [hashed_tokens(p, 2) for p in prompts]
    assert llm._core.peak_requests == 50  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompts", "error", "complaint"),
    [
        (["ok", 5], TypeError, r"prompts\[1\] must be a string, a list of token ids or .* not int 5"),
        ([[1], [1, "x"]], TypeError, r"prompts\[1\] must be"),
        ([[1], [True]], TypeError, r"prompts\[1\] must be"),
        ({"prompt": "x"}, TypeError, r"prompts\[0\] must be"),
        (5, TypeError, "prompts must be a list, not int"),
        ([[1], [2, VOCAB_SIZE]], InvalidRequest, rf"prompts\[1\]: token id {VOCAB_SIZE} is not in"),
        ([[1], [-1]], InvalidRequest, r"prompts\[1\]: token id -1 is not in"),
        (["ok", "\ud800"], InvalidRequest, r"prompts\[1\]\.prompt: is no valid Unicode"),
        ([[1], [1] * MAX_MODEL_LEN], InvalidRequest, r"prompts\[1\]\.prompt: is too long"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_named(
    make_llm: MakeLLM, prompts: Any, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        make_llm().generate(prompts, LENGTH_4, use_tqdm=False)


def test_after_a_refused_prompt_nothing_runs_on_and_the_next_call_works(make_llm: MakeLLM) -> None:
    llm = make_llm()
    with pytest.raises(InvalidRequest):
        llm.generate([[1], [1] * MAX_MODEL_LEN, [2]], SamplingParams(max_tokens=1000), use_tqdm=False)
    assert not llm._core.has_work()
    assert llm.generate([1, 2], LENGTH_4, use_tqdm=False)[0].outputs[0].token_ids == hashed_tokens([1, 2], 4)


def test_a_keyboard_interrupt_leaves_an_idle_engine(make_llm: MakeLLM) -> None:
    interrupted = False

    def next_token(context: Sequence[int], choice: int) -> int:
        nonlocal interrupted
        if len(context) == 10 and not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        return hashed(context, choice)

    llm = make_llm(next_token)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert not llm._core.has_work()
    assert len(llm.generate([1], LENGTH_4, use_tqdm=False)) == 1


def test_an_engine_that_stops_short_is_an_error_and_not_an_endless_loop(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    monkeypatch.setattr(llm._core, "handle", lambda command: None)
    with pytest.raises(RuntimeError, match="the engine is idle while 1 requests are unfinished"):
        llm.generate([1], LENGTH_4, use_tqdm=False)


# Parameters


def test_the_number_of_params_must_be_that_of_the_prompts(make_llm: MakeLLM) -> None:
    with pytest.raises(ValueError, match="params: 2 of them for 3 prompts"):
        make_llm().generate([[1], [2], [3]], [LENGTH_4, LENGTH_4], use_tqdm=False)


@pytest.mark.parametrize(
    ("logit_bias", "complaint"),
    [
        ({VOCAB_SIZE: 1.0}, rf"params\[1\]\.logit_bias\[{VOCAB_SIZE}\]: must be below the vocabulary's size"),
        ({-1: 1.0}, "logit_bias: takes at most 300 token ids, none negative"),
        (dict.fromkeys(range(301), 1.0), "logit_bias: takes at most 300"),
        ({3: 100.1}, "logit_bias: each must be between -100 and 100"),
        ({3: float("nan")}, "logit_bias: each must be"),
    ],
)
def test_a_bias_that_cannot_be_is_refused(
    make_llm: MakeLLM, logit_bias: dict[int, float], complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        make_llm().generate([[1], [2]], [LENGTH_4, SamplingParams(logit_bias=logit_bias)], use_tqdm=False)


def test_every_choice_is_an_output_of_its_own(make_llm: MakeLLM) -> None:
    params = SamplingParams(n=3, max_tokens=4, ignore_eos=True)
    (result,) = make_llm().generate([1, 2], params, use_tqdm=False)
    assert [output.index for output in result.outputs] == [0, 1, 2]
    assert [output.token_ids for output in result.outputs] == [hashed_tokens([1, 2], 4, i) for i in range(3)]


def test_the_seed_is_the_one_given_or_a_random_one_reported_back(make_llm: MakeLLM) -> None:
    llm = make_llm()
    given, first, second = llm.generate(
        [[1], [1], [1]], [SamplingParams(seed=0, max_tokens=1), LENGTH_4, LENGTH_4], use_tqdm=False
    )
    assert given.seed == 0
    assert first.seed != second.seed


def test_logprobs_come_one_entry_a_token(make_llm: MakeLLM) -> None:
    llm = make_llm()
    with_logprobs, without = llm.generate(
        [[1], [1]], [SamplingParams(logprobs=2, max_tokens=4, ignore_eos=True), LENGTH_4], use_tqdm=False
    )
    output = with_logprobs.outputs[0]
    assert output.logprobs is not None
    assert [entry.chosen.token_id for entry in output.logprobs] == output.token_ids
    assert all(len(entry.top) == 2 for entry in output.logprobs)
    assert without.outputs[0].logprobs is None


# Ends


def test_text_ends_before_the_stop_token(make_llm: MakeLLM) -> None:
    llm = make_llm(replying("tide?", REPLY))
    output = llm.generate("tide?", use_tqdm=False)[0].outputs[0]
    assert output.text == REPLY
    assert output.token_ids == [*TOKENIZER.encode(REPLY).ids, EOS_ID]
    assert (output.finish_reason, output.stop) == (FinishReason.STOP_TOKEN, None)


def test_a_character_that_max_tokens_cut_is_a_replacement_character(make_llm: MakeLLM) -> None:
    llm = make_llm(replying("tide?", "🌊"))
    output = llm.generate("tide?", SamplingParams(max_tokens=1), use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason) == ("\ufffd", FinishReason.MAX_TOKENS)


@pytest.mark.parametrize("tokens_per_step", [1, 5])
@pytest.mark.parametrize(
    ("include_stop", "text"), [(False, "The tide 🌊 comes"), (True, "The tide 🌊 comes in.")]
)
def test_a_stop_string_ends_text_tokens_logprobs_and_usage(
    make_llm: MakeLLM, tokens_per_step: int, include_stop: bool, text: str
) -> None:
    llm = make_llm(replying("tide?", REPLY), tokens_per_step)
    params = SamplingParams(stop=("nowhere", " in."), include_stop=include_stop, logprobs=0)
    output = llm.generate("tide?", params, use_tqdm=False)[0].outputs[0]
    assert (output.text, output.stop, output.finish_reason) == (text, " in.", FinishReason.STOP_STRING)
    assert TOKENIZER.decode(output.token_ids) == "The tide 🌊 comes in."
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids) == output.usage.output_tokens
    assert not llm._core.has_work()


def test_the_engine_is_told_at_which_token_a_stop_string_ended_the_choice(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(replying("tide?", REPLY), tokens_per_step=5)
    commands: list[Command] = []
    handle = llm._core.handle
    monkeypatch.setattr(llm._core, "handle", lambda command: (commands.append(command), handle(command)))
    output = llm.generate("tide?", SamplingParams(stop=("tide",)), use_tqdm=False)[0].outputs[0]
    _, finish = commands
    assert finish == Finish("0", FinishReason.STOP_STRING, 0, len(output.token_ids))


def test_a_stop_string_wins_over_max_tokens_reached_in_the_same_step(make_llm: MakeLLM) -> None:
    llm = make_llm(replying("tide?", "abcd"), tokens_per_step=4)
    output = llm.generate("tide?", SamplingParams(max_tokens=4, stop=("b",)), use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason) == ("a", FinishReason.STOP_STRING)
    assert output.usage.output_tokens == len(output.token_ids) == 2


def test_a_stop_string_ends_one_choice_and_not_its_siblings(make_llm: MakeLLM) -> None:
    says_tide = replying("?", "the tide comes")

    def next_token(context: Sequence[int], choice: int) -> int:
        return says_tide(context, 0) if choice == 1 else TOKENIZER.encode("x").ids[0]

    params = SamplingParams(n=3, max_tokens=30, stop=("tide",))
    outputs = make_llm(next_token).generate("?", params, use_tqdm=False)[0].outputs
    assert [output.text for output in outputs] == ["x" * 30, "the ", "x" * 30]


# Chat


def test_chat_takes_one_conversation_or_several(make_llm: MakeLLM) -> None:
    rendered = "<|start|>user: tide?<|end|><|start|>assistant: "
    llm = make_llm(replying(rendered, REPLY))
    conversation = [{"role": "user", "content": "tide?"}]
    for messages, times in ((conversation, 1), ([conversation, conversation], 2)):
        results = llm.chat(messages, use_tqdm=False)
        assert [result.prompt for result in results] == [rendered] * times
        assert [result.outputs[0].text for result in results] == [REPLY] * times


@pytest.mark.parametrize(
    ("messages", "error", "complaint"),
    [
        (
            [[{"role": "user", "content": "x"}], "tide?"],
            TypeError,
            r"conversations\[1\] must be a list of messages",
        ),
        ([[]], InvalidRequest, r"conversations\[0\]\.messages: must hold at least one"),
        (
            [{"role": "pirate", "content": "x"}],
            InvalidRequest,
            r"conversations\[0\]\.messages: the chat template refused them",
        ),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_named(
    make_llm: MakeLLM, messages: Any, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        make_llm().chat(messages, use_tqdm=False)


# The object


def test_progress_is_drawn_on_stderr_unless_it_is_turned_off(
    make_llm: MakeLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = make_llm()
    llm.generate([[1], [2]], LENGTH_4, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate([[1], [2]], LENGTH_4)
    assert "2/2" in capsys.readouterr().err


def test_leaving_the_with_block_closes_the_engine(make_llm: MakeLLM) -> None:
    with make_llm() as llm:
        llm.generate([1], LENGTH_4, use_tqdm=False)
        assert llm.stats().output_tokens == 4
    assert llm._core.closed  # type: ignore[attr-defined]


def test_an_argument_out_of_range_or_unknown_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="block_size must be one of"):
        LLM(folder, block_size=7)
    with pytest.raises(TypeError, match="num_gpus"):
        LLM(folder, num_gpus=2)
