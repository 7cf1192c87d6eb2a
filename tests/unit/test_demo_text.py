"""The demo model's training text: what it promises to the training script and to the reader."""

from __future__ import annotations

import re
from random import Random

import pytest

from tidegate.engine.demo import text, words

SEEDS = range(400)


def _stories() -> list[tuple[str, text.Story, str]]:
    return [text.story_request(Random(seed)) for seed in SEEDS]


def test_same_seed_makes_the_same_document() -> None:
    assert [text.document(Random(seed)) for seed in SEEDS] == [text.document(Random(seed)) for seed in SEEDS]


def test_documents_hardly_ever_repeat() -> None:
    documents = {text.document(Random(seed)) for seed in range(2000)}
    assert len(documents) > 1990


def test_facts_are_spread_widely() -> None:
    """No guess may pay: the most frequent hero and colour are rare among the stories."""
    for slot, share in (("hero", 0.06), ("colour", 0.15), ("homespot", 0.04)):
        values = [story.facts.slots[slot] for _, story, _ in _stories()]
        assert max(map(values.count, values)) <= share * len(values), slot


def test_dialogues_alternate_and_have_two_to_sixteen_turns() -> None:
    for seed in SEEDS:
        messages = text.dialogue(Random(seed))
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert 4 <= len(messages) <= 32
        assert all(message["content"] for message in messages)


def test_earlier_turns_are_a_prefix_of_later_ones() -> None:
    messages = text.dialogue(Random(3))
    whole = text.render(messages)
    for turns in range(len(messages)):
        assert whole.startswith(text.render(messages[:turns]))


def test_documents_end_once_and_carry_no_unfilled_slot() -> None:
    for seed in SEEDS:
        document = text.document(Random(seed))
        assert document.startswith(text.BEGIN)
        assert document.count(text.BEGIN) == 1
        assert document.endswith(text.END)
        assert not set("{}") & set(document)


def test_stories_are_sentences_with_the_right_article() -> None:
    for _, _, story in _stories():
        for sentence in re.split(r"(?<=\.)\s+", story):
            assert re.fullmatch(r"[A-Z][^.]*\.", sentence), sentence
            assert not re.search(r"\b[Aa] [aeiou]", sentence), sentence
            assert not re.search(r"\b[Aa]n [^aeiou]", sentence), sentence


def test_long_stories_are_longer_than_short_ones() -> None:
    def mean_words(length: str) -> float:
        stories = [text.story_request(Random(seed), length=length)[2] for seed in SEEDS]
        return sum(len(story.split()) for story in stories) / len(stories)

    assert mean_words("long ") > 120
    assert mean_words("short ") < 60


def test_facts_read_from_a_story_are_the_facts_it_was_told_from() -> None:
    for _, story, told in _stories():
        facts = text.read_facts(told)
        assert facts is not None, told
        assert facts.kinds == story.facts.kinds, told
        assert facts.slots.items() <= story.facts.slots.items(), told


def test_every_answer_stands_in_its_story() -> None:
    """Whoever, whatever colour and whichever job an answer names, the story has named before."""
    facts_of_interest = {*words.COLOURS, *words.JOBS, *words.FEELINGS, *words.WEATHERS, *words.GIFTS}
    asked = 0
    for seed, (_, story, told) in zip(SEEDS, _stories(), strict=True):
        pair = text.ask_about_story(story.facts, Random(seed))
        assert pair is not None
        answer = pair[1]
        named = {fact for fact in facts_of_interest if re.search(rf"\b{fact}\b", answer)}
        named |= set(re.findall(r"\b[A-Z][a-z]+", answer)) - {
            "The",
            "She",
            "He",
            "Her",
            "His",
            "They",
            "It",
            "A",
        }
        asked += len(named)
        assert all(fact in told for fact in named), (told, pair)
    assert asked > 200


@pytest.mark.parametrize(
    "story",
    [
        "Mara has a small green boat. Mara has a small red boat.",
        "The boats were floating somewhere.",
        "",
    ],
)
def test_a_story_that_contradicts_itself_or_says_nothing_has_no_facts(story: str) -> None:
    assert text.read_facts(story) is None


def test_reading_knows_what_it_does_not_know() -> None:
    """Without a pronoun in the story, questions name the hero."""
    facts = text.read_facts("Mara has an old green boat.")
    assert facts is not None
    assert facts.slots == {"hero": "Mara", "size": "old", "colour": "green", "thing": "boat"}
    questions = {text.ask_about_story(facts, Random(seed)) for seed in range(100)} - {None}
    assert ("What colour is the boat?", "The boat is green.") in questions
    assert not any(pair and re.search(r"\b(she|he|her|his)\b", pair[0].lower()) for pair in questions)
