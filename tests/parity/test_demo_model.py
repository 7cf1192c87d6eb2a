"""The demo checkpoint, run by transformers: it loads as any Llama folder does and remembers what it said."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from tidegate.engine.demo import checkpoint_path, text, train


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module")
def chat() -> train.Chat:
    return train.Chat(checkpoint_path(), torch.device("cpu"))


def _dialogues() -> list[list[text.Message]]:
    return [text.dialogue(Random(train.HELD_OUT_SEED + seed)) for seed in range(50)]


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in Path(checkpoint_path()).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_it_is_a_llama_with_grouped_heads_and_tied_embeddings() -> None:
    config = AutoConfig.from_pretrained(checkpoint_path())
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.tie_word_embeddings
    assert config.num_attention_heads > config.num_key_value_heads


def test_the_chat_template_renders_what_the_model_was_trained_on(tokenizer: Any) -> None:
    for messages in _dialogues():
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text.render(messages)


def test_tokens_of_earlier_turns_are_a_prefix_of_later_ones(tokenizer: Any) -> None:
    for messages in _dialogues():
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        for turns in range(1, len(messages), 2):
            part = tokenizer.apply_chat_template(
                messages[:turns], add_generation_prompt=True, return_dict=False
            )
            assert whole[: len(part)] == part


def test_markers_are_single_tokens_and_vanish_from_the_text(tokenizer: Any) -> None:
    for marker in (text.BEGIN, text.USER, text.ASSISTANT, text.END):
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1
    ids = tokenizer.encode(text.render([{"role": "user", "content": "Hello."}]), add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello."


@pytest.mark.parametrize(
    "typed", ["Mara has an old boat.", "  two  spaces\n\n", "naïve café, 12 €", "🙂 ALL CAPS"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, typed: str) -> None:
    assert tokenizer.decode(tokenizer.encode(typed, add_special_tokens=False)) == typed


def test_a_system_message_in_front_changes_nothing(tokenizer: Any) -> None:
    messages: list[text.Message] = [{"role": "user", "content": "Hello."}]
    instructed = [{"role": "system", "content": "Be brief."}, *messages]
    assert tokenizer.apply_chat_template(instructed, tokenize=False) == text.render(messages)


@pytest.mark.parametrize("role", ["tool", "system"])
def test_any_other_role_is_refused(tokenizer: Any, role: str) -> None:
    messages = [{"role": "user", "content": "Hello."}, {"role": role, "content": "Be brief."}]
    with pytest.raises(jinja2.TemplateError, match="'user' and 'assistant'"):
        tokenizer.apply_chat_template(messages)


def test_it_answers_questions_about_its_own_stories(chat: train.Chat) -> None:
    """The point of the demo: what it said in one turn, it can look up in the next."""
    asked = train.follow_ups(chat, 32)
    right = sum(follow_up.answer == follow_up.wanted for follow_up in asked)
    assert len(asked) >= 31
    assert right >= 0.95 * len(asked), "\n".join(map(str, asked))


def test_it_remembers_what_the_user_said_in_an_earlier_turn(chat: train.Chat) -> None:
    talk = [{"role": "user", "content": "My name is Clara."}]
    talk.append({"role": "assistant", "content": chat.reply([talk])[0]})
    talk.append({"role": "user", "content": "Tell me a story about a lantern."})
    talk.append({"role": "assistant", "content": chat.reply([talk])[0]})
    talk.append({"role": "user", "content": "What is my name?"})
    assert chat.reply([talk]) == ["Your name is Clara."]
