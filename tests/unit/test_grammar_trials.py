"""Grammars that would take the engine down: tried elsewhere, refused, and in nobody's way."""

import json
import time
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from tidegate.engine.constraint import allowed_tokens
from tidegate.engine.constraints import Constraints
from tidegate.engine.demo import checkpoint_path
from tidegate.engine.grammar_trials import TOO_MUCH, GrammarTrials
from tidegate.engine.request import Request, SamplingParams, StructuredOutput

TOKENIZER = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
VOCAB_SIZE = TOKENIZER.get_vocab_size()
LETTER = TOKENIZER.token_to_id("a")
END = json.loads((checkpoint_path() / "config.json").read_text())["eos_token_id"]
ENDLESS = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(30)]}
"""Below two kilobytes, and its compilation doubles with each pattern."""
AMBIGUOUS = "start: a\na: a a | a a a | /[a-z]/ | /[a-z ]/"
"""It compiles at once; with each token of its output there are more ways to read it."""


@pytest.fixture
def constraints() -> Iterator[Constraints]:
    made = Constraints(checkpoint_path(), VOCAB_SIZE, [END])
    yield made
    made.close()


def request(name: str, output: tuple[int, ...] = (), **params: object) -> Request:
    return Request(
        id=name,
        prompt_token_ids=[5],
        params=SamplingParams(**params),  # type: ignore[arg-type]
        seed=0,
        output_token_ids=list(output),
    )


def endless(number: int) -> Request:
    return request(
        f"endless {number}", structured_output=StructuredOutput(json_schema=ENDLESS | {"$id": f"{number}"})
    )


def made_in_time(constraints: Constraints, of: Request) -> bool:
    """Whether the constraints of this request come, and nothing is wrong with them."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        constraints.wait(0.1)
        for made in constraints.take_made():
            if made.request is of:
                return not made.violations
    return False


def test_a_grammar_that_would_compile_for_ever_is_refused_and_the_next_one_is_made(constraints):
    bomb = endless(0)
    constraints.begin(bomb)
    constraints.wait(60)
    (made,) = constraints.take_made()
    assert [(v.field, v.description) for v in made.violations] == [
        ("structured_output.json_schema", TOO_MUCH)
    ]
    good = request("good", structured_output=StructuredOutput(regex="[a-z]+"))
    constraints.begin(good)
    assert made_in_time(constraints, good)


def test_lists_of_tokens_wait_for_nobodys_grammar(constraints):
    for number in range(8):
        constraints.begin(endless(number))
    listed = request("listed", allowed_token_ids=(9, 10))
    constraints.begin(listed)
    assert listed in [made.request for made in constraints.take_made()]


def test_nothing_more_is_heard_of_a_request_that_has_ended(constraints):
    """Those that wait for a thread are never compiled: else a hundred would take a minute of this one's."""
    bombs = [endless(number) for number in range(100)]
    for bomb in bombs:
        constraints.begin(bomb)
    for bomb in bombs:
        constraints.drop(bomb)
    assert not constraints.is_making
    good = request("good", bad_words=("tide",))
    constraints.begin(good)
    assert made_in_time(constraints, good)


def test_an_engine_closes_while_a_grammar_is_tried(constraints):
    for number in range(2):
        constraints.begin(endless(number))
    constraints.close()
    assert all(made.violations for made in constraints.take_made())


def test_a_grammar_that_becomes_too_ambiguous_ends_its_choice(constraints):
    mine = request("mine", structured_output=StructuredOutput(grammar=AMBIGUOUS))
    constraints.begin(mine)
    constraints.wait(60)
    constraint = constraints.take_made()[0].constraints[0]
    ends = []
    for _ in range(80):
        constraint.advance(LETTER)
        ends += constraints.compute_masks([constraint])
        if ends[-1] is not None:
            break
    assert ends[-1] is not None
    assert ends[-1].reason == "GRAMMAR_TOO_COMPLEX"


def test_what_was_said_of_a_grammar_is_remembered_where_it_passed():
    trials = GrammarTrials()
    assert trials.fault(json.dumps({"grammars": [{"json_schema": {"type": "object"}}]})) is None
    trials.close()
    assert trials.fault(json.dumps({"grammars": [{"json_schema": {"type": "object"}}]})) is None
    with pytest.raises(RuntimeError, match="closed"):
        trials.fault(json.dumps({"grammars": [{"json_schema": {"type": "array"}}]}))


def test_a_trial_that_something_else_ended_is_made_again():
    trials = GrammarTrials()
    assert trials.fault(json.dumps({"grammars": [{"json_schema": {"type": "object"}}]})) is None
    (process,) = trials._idle
    process.kill()
    process.wait()
    assert trials.fault(json.dumps({"grammars": [{"json_schema": {"type": "array"}}]})) is None
    trials.close()


@pytest.mark.parametrize(
    "params", [{"bad_words": ("\x7f",)}, {"structured_output": StructuredOutput(choices=("\x7f",))}]
)
def test_any_character_may_stand_in_a_word(constraints, params):
    mine = request("mine", **params)
    constraints.begin(mine)
    assert made_in_time(constraints, mine)


def test_output_that_came_with_a_request_is_held_against_its_list_of_tokens(constraints):
    constraints.begin(request("broken", (7,), allowed_token_ids=(5, 6)))
    (made,) = constraints.take_made()
    assert [v.field for v in made.violations] == ["output_token_ids"]


def test_other_stop_tokens_end_a_sentence_from_then_on(constraints):
    """A token that is no text stands behind a sentence where it ends the choice, and nowhere else."""
    first, second = [token for token in TOKENIZER.get_added_tokens_decoder() if token != END][:2]
    mine = request(
        "mine",
        structured_output=StructuredOutput(regex="a+"),
        stop_token_ids=(first,),
        ignore_eos=True,
    )
    constraints.begin(mine)
    constraints.wait(60)
    constraint = constraints.take_made()[0].constraints[0]
    constraint.advance(LETTER)
    for stop, other in ((first, second), (second, first)):
        constraint.stop_at([stop])
        assert constraints.compute_masks([constraint]) == [None]
        allowed = allowed_tokens(constraint.mask, VOCAB_SIZE)
        assert (allowed[stop], allowed[other]) == (True, False)
