"""Text: tokenizer, chat template, incremental detokenizer and stop strings."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    EOS,
    SAMPLE,
    TEMPLATE,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    letter_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from tidegate.engine.config import ConfigError
from tidegate.engine.request import FinishReason, InvalidRequest, SamplingParams
from tidegate.engine.text import Text
from tidegate.engine.text_stream import StopMatch, TextStream

BYTE_LEVEL = Text(byte_level_tokenizer())
BYTE_FALLBACK = Text(byte_fallback_tokenizer())
LETTERS = Text(letter_tokenizer())


def split(items: list[int], sizes: list[int]) -> list[list[int]]:
    """``items`` in pieces of the given sizes, the rest as one."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(items[start : start + size])
        start += size
    return [*pieces, items[start:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in Hugging Face format, with a chat template."""
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, chat_template=TEMPLATE
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(folder: Path) -> Text:
    return Text.load(str(folder))


# Tokenizer and chat template


def test_encodes_and_decodes_as_transformers_does(folder: Path, text: Text) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = text.encode(SAMPLE)
    assert ids == reference.encode(SAMPLE)
    assert text.decode(ids) == SAMPLE


def test_a_prompt_is_never_cut_by_the_truncation_stored_with_the_tokenizer(text: Text) -> None:
    assert len(text.encode("tide " * 50)) > 4


def test_other_threads_run_while_a_long_text_is_encoded(text: Text) -> None:
    with ThreadPoolExecutor() as pool:
        encoding = pool.submit(text.encode, SAMPLE * 2000)
        turns = 0
        while not encoding.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 10


def test_special_tokens_in_text_are_skipped_on_request(text: Text) -> None:
    ids = text.encode(f"tide{EOS}")
    assert text.decode(ids) == "tide"
    assert text.decode(ids, skip_special_tokens=False) == f"tide{EOS}"


def test_a_lone_surrogate_is_an_invalid_prompt(text: Text) -> None:
    with pytest.raises(InvalidRequest, match="prompt: is no valid Unicode at character 3"):
        text.encode("abc\ud800")


def test_chat_renders_the_template_and_opens_the_answer(text: Text) -> None:
    ids = text.render_chat([{"role": "user", "content": "tide?"}])
    assert text.decode(ids, skip_special_tokens=False) == "<|start|>user: tide?<|end|><|start|>assistant: "


def test_chat_can_leave_the_final_message_open(text: Text) -> None:
    messages = [{"role": "user", "content": "tide?"}, {"role": "assistant", "content": "It comes"}]
    ids = text.render_chat(messages, continue_final_message=True)
    assert (
        text.decode(ids, skip_special_tokens=False)
        == "<|start|>user: tide?<|end|><|start|>assistant: It comes"
    )


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages: must hold at least one message"),
        ([{"content": "x"}], r"messages\[0\]\.role: must be a string"),
        ([{"role": "pirate", "content": "x"}], "messages: the chat template refused them: (?!.*pirate)"),
        ([{"role": "user", "content": 5}], "messages: the chat template refused them"),
        ([{"role": "user"}], "messages: the chat template refused them"),
    ],
)
def test_messages_that_cannot_be_rendered_are_named(text: Text, messages: list, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        text.render_chat(messages)


def test_a_model_without_a_chat_template_says_so() -> None:
    assert not BYTE_LEVEL.has_chat_template
    with pytest.raises(InvalidRequest, match="messages: this model has no chat template"):
        BYTE_LEVEL.render_chat([{"role": "user", "content": "x"}])


async def test_async_variants_give_the_same(text: Text) -> None:
    messages = [{"role": "user", "content": SAMPLE}]
    assert await text.encode_async(SAMPLE) == text.encode(SAMPLE)
    assert await text.render_chat_async(messages, False) == text.render_chat(messages, False)
    assert await text.decode_async(text.encode(SAMPLE)) == SAMPLE


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        Text.load(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["", "{", json.dumps({"version": "1.0"}), json.dumps({"added_tokens": []})]
)
def test_a_broken_tokenizer_file_is_a_config_error_of_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read") as caught:
        Text.load(str(tmp_path))
    assert "\n" not in str(caught.value)


# Incremental detokenizer


def stream_text(text: Text, pieces: list[list[int]], params: SamplingParams) -> str:
    stream = TextStream(text, params)
    deltas = [stream.push(piece) for piece in pieces]
    assert sum(delta.num_tokens for delta in deltas) == sum(map(len, pieces))
    return "".join(delta.text for delta in deltas) + stream.flush()


@settings(max_examples=300)
@given(
    ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=40),
    sizes=st.lists(st.integers(0, 5), max_size=10),
    skip=st.booleans(),
)
def test_deltas_of_any_byte_level_tokens_add_up_to_the_full_decode(
    ids: list[int], sizes: list[int], skip: bool
) -> None:
    """Broken UTF-8, special and added tokens and ids outside the vocabulary included."""
    params = SamplingParams(skip_special_tokens=skip)
    assert stream_text(BYTE_LEVEL, split(ids, sizes), params) == BYTE_LEVEL.decode(ids, skip)


@settings(max_examples=200)
@given(st.text(alphabet=st.sampled_from("the tide comes in a🌊潮é\u200d👩🚀"), max_size=40))
def test_deltas_of_a_byte_fallback_tokenizer_add_up_to_the_full_decode(sample: str) -> None:
    """A decoder that depends on context: it strips the space at the start and fuses byte tokens."""
    ids = BYTE_FALLBACK.encode(sample)
    assert stream_text(
        BYTE_FALLBACK, [[token_id] for token_id in ids], SamplingParams()
    ) == BYTE_FALLBACK.decode(ids)


def test_a_space_after_skipped_special_tokens_is_kept() -> None:
    tide = BYTE_FALLBACK.encode("tide comes", add_special_tokens=False)
    eos = BYTE_FALLBACK.encode(EOS, add_special_tokens=False)[-1]
    ids = [*tide[:2], *[eos] * 20, *tide[2:]]
    assert stream_text(
        BYTE_FALLBACK, [[token_id] for token_id in ids], SamplingParams()
    ) == BYTE_FALLBACK.decode(ids)


@pytest.mark.parametrize("text", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
def test_no_delta_ends_inside_a_character(text: Text) -> None:
    ids = text.encode("the 🌍 tide 🎈🪁")
    stream = TextStream(text, SamplingParams())
    deltas = [stream.push([token_id]).text for token_id in ids]
    assert "\ufffd" not in "".join(deltas)
    assert deltas.count("") >= 3


def test_an_unfinished_character_is_given_out_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("🌊")[:1]
    stream = TextStream(BYTE_LEVEL, SamplingParams())
    assert stream.push(ids).text == ""
    assert stream.push([], FinishReason.MAX_TOKENS).text == "\ufffd"


def test_bytes_that_never_become_a_character_are_not_held_for_ever() -> None:
    bad = BYTE_FALLBACK._tokenizer.token_to_id("<0xFF>")
    stream = TextStream(BYTE_FALLBACK, SamplingParams())
    assert len("".join(stream.push([bad]).text for _ in range(100))) > 80


# Stop strings


def naive_stop(
    pieces: list[str], stops: list[str], include: bool, min_tokens: int
) -> tuple[str, StopMatch | None]:
    """Read character by character; the first complete stop string ends the text, the longest of a tie."""
    seen = ""
    for count, piece in enumerate(pieces, start=1):
        for char in piece:
            seen += char
            ending = [stop for stop in stops if seen.endswith(stop)]
            if ending and count >= min_tokens:
                stop = max(ending, key=len)
                return seen if include else seen.removesuffix(stop), StopMatch(stop, count)
    return seen, None


@settings(max_examples=500)
@given(
    ids=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(0, 4), max_size=10),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
)
def test_stop_strings_end_the_text_as_reading_it_character_by_character_would(
    ids: list[int], stops: list[str], sizes: list[int], include: bool, min_tokens: int
) -> None:
    params = SamplingParams(stop=tuple(stops), include_stop=include, min_tokens=min_tokens)
    expected_text, expected_stop = naive_stop(
        [LETTERS.decode([token_id]) for token_id in ids], stops, include, min_tokens
    )
    stream = TextStream(LETTERS, params)
    deltas = [stream.push(piece) for piece in split(ids, sizes)]
    assert "".join(delta.text for delta in deltas) + stream.flush() == expected_text
    assert stream.stop == expected_stop
    counted = expected_stop.at_offset if expected_stop else len(ids)
    assert sum(delta.num_tokens for delta in deltas) == stream.num_tokens == counted


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=("\n\nUser:",)))
    given_out = [stream.push(BYTE_LEVEL.encode(piece)).text for piece in ("tide", "\n", "\nUs", "a", "ge")]
    assert given_out == ["tide", "", "", "\n\nUsa", "ge"]


def test_a_stop_string_is_found_across_tokens_and_characters_of_several_bytes() -> None:
    ids = BYTE_LEVEL.encode("tide 🌊🚢 out")
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=("🌊🚢",)))
    text = "".join(stream.push([token_id]).text for token_id in ids)
    assert text == "tide "
    assert stream.stop is not None
    assert BYTE_LEVEL.decode(ids[: stream.stop.at_offset]) == "tide 🌊🚢"


def test_tokens_behind_a_stop_string_do_not_count() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=("tide",)))
    ids = BYTE_LEVEL.encode("tide")
    delta = stream.push([*ids, *ids], FinishReason.MAX_TOKENS)
    assert (delta.text, delta.num_tokens, delta.stop) == ("", len(ids), StopMatch("tide", len(ids)))
    assert stream.push(ids) == ("", 0, delta.stop)
    assert stream.flush() == ""


def test_held_back_text_comes_out_when_the_choice_ends_otherwise() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=("tide!",)))
    assert stream.push(BYTE_LEVEL.encode("the tide")).text == "the "
    assert stream.push([], FinishReason.CANCELLED).text == "tide"
    assert stream.flush() == ""


@pytest.mark.parametrize(("include_stop", "expected"), [(False, "tide"), (True, f"tide{EOS}")])
def test_a_stop_token_has_text_only_on_request(include_stop: bool, expected: str) -> None:
    ids = BYTE_LEVEL.encode(f"tide{EOS}")
    stream = TextStream(BYTE_LEVEL, SamplingParams(include_stop=include_stop))
    delta = stream.push(ids, FinishReason.STOP_TOKEN)
    assert (delta.text, delta.num_tokens) == (expected, len(ids))


def test_an_ordinary_token_that_stops_has_no_text_either() -> None:
    ids = BYTE_LEVEL.encode("tide.")
    delta = TextStream(BYTE_LEVEL, SamplingParams()).push(ids, FinishReason.STOP_TOKEN)
    assert delta.text == "tide"


def test_long_outputs_cost_the_same_for_each_token() -> None:
    """A stop string that nearly matches all the way: work must not grow with what is held back."""
    stops = ("a" * 255 + "b",)
    stream = TextStream(LETTERS, SamplingParams(stop=stops))
    rng = random.Random(0)
    ids = [rng.choice([0, 0, 0, 0, 5]) for _ in range(3000)]
    out = "".join(stream.push([token_id]).text for token_id in ids) + stream.flush()
    assert out == LETTERS.decode(ids)
