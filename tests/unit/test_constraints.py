"""What may come next: which tokens the constraints of a request leave, and where they end it."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tidegate.engine.constraint import Constraint, DeadEnd, allowed_tokens
from tidegate.engine.constraints import Constraints, Made
from tidegate.engine.demo import checkpoint_path
from tidegate.engine.request import InvalidRequest, Request, SamplingParams, StructuredOutput

TOKENIZER: Any = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
VOCAB_SIZE = TOKENIZER.get_vocab_size()
END = json.loads((checkpoint_path() / "config.json").read_text())["eos_token_id"]
SPECIAL = next(t for t in TOKENIZER.get_added_tokens_decoder() if t != END)
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def constraints() -> Iterator[Constraints]:
    made = Constraints(checkpoint_path(), VOCAB_SIZE, [END])
    yield made
    made.close()


@pytest.fixture
def make(constraints: Constraints) -> Callable[..., Made]:
    def make(output: Sequence[int] = (), **params: Any) -> Made:
        request = Request(
            id="r",
            prompt_token_ids=[5],
            params=SamplingParams(**params),
            seed=0,
            output_token_ids=list(output),
        )
        constraints.begin(request)
        constraints.wait(60)
        (made,) = constraints.take_made()
        assert made.request is request
        return made

    return make


@pytest.fixture
def start(make: Callable[..., Made], constraints: Constraints) -> Callable[..., "Walk"]:
    def start(**params: Any) -> Walk:
        made = make(**params)
        assert not made.violations, made.violations
        return Walk(constraints, made.constraints[0])

    return start


class Walk:
    """One choice, token by token."""

    def __init__(self, constraints: Constraints, constraint: Constraint) -> None:
        self._constraints = constraints
        self.constraint = constraint

    def __contains__(self, token_id: int) -> bool:
        """Whether it may come next."""
        return bool(allowed_tokens(self.constraint.mask, VOCAB_SIZE)[token_id])

    def push(self, token_ids: Sequence[int]) -> DeadEnd | None:
        """As long as each may come; asserts that it may."""
        end = None
        for token_id in token_ids:
            assert token_id in self, TOKENIZER.decode([token_id])
            self.constraint.advance(token_id)
            (end,) = self._constraints.compute_masks([self.constraint])
        return end

    def reach(self, token_ids: Sequence[int]) -> int:
        """How many of them may come, one behind the other."""
        for count, token_id in enumerate(token_ids):
            if token_id not in self:
                return count
            self.push([token_id])
        return len(token_ids)


FORMS: list[tuple[StructuredOutput, list[str], list[str]]] = [
    (
        StructuredOutput(json_schema=PERSON),
        ['{"age": 7}', '{ "age":-12}'],
        ['{"age": "x"}', '{"name"', "[7]"],
    ),
    (StructuredOutput(json_schema=json.dumps(PERSON)), ['{"age": 7}'], ["7"]),
    (StructuredOutput(regex=r"[a-z]+/\d{2}"), ["tide/42", "a/00"], ["Tide/42", "tide/4x", "tide/423"]),
    (StructuredOutput(grammar='start: WORD (" " WORD)*\nWORD: "sea" | "tide"'), ["sea tide"], ["sea,"]),
    (StructuredOutput(choices=('a "b"\\', "é\n🌊", "<|x|>")), ['a "b"\\', "é\n🌊", "<|x|>"], ["a b", "é 🌊"]),
]


@pytest.mark.parametrize(("form", "good", "bad"), FORMS)
def test_an_output_is_a_whole_sentence_of_its_language(start, form, good, bad):
    """The end of the sequence may come behind it and nowhere before."""
    for sentence in good:
        walk = start(structured_output=form)
        *inner, last = ids(sentence)
        for token_id in inner:
            walk.push([token_id])
            assert not walk.constraint.is_complete
        assert walk.push([last]) is None
        assert walk.constraint.is_complete or END in walk
    for sentence in bad:
        walk = start(structured_output=form)
        assert END not in walk
        assert walk.reach(ids(sentence)) < len(ids(sentence))


def test_a_sentence_that_nothing_can_follow_is_complete(start):
    walk = start(structured_output=StructuredOutput(choices=("sea", "sea tide")))
    assert walk.push(ids("sea")) is None
    assert not walk.constraint.is_complete, "another choice goes on from here"
    assert END in walk
    walk.push(ids(" tide"))
    assert walk.constraint.is_complete


def test_tokens_that_end_a_sequence_stand_behind_a_sentence_alone(start):
    form = StructuredOutput(regex="a+")
    walk = start(structured_output=form, stop_token_ids=(SPECIAL,))
    assert END not in walk
    assert SPECIAL not in walk
    walk.push(ids("a"))
    assert END in walk
    assert SPECIAL in walk
    ignoring = start(structured_output=form, ignore_eos=True)
    ignoring.push(ids("a"))
    assert END not in ignoring
    assert ids("a")[0] in ignoring


WORDS = ("kite", "a\nb", "é🌊", 'say "no"', "<|x|>")


@pytest.mark.parametrize("word", WORDS)
def test_a_bad_word_is_kept_out_however_it_is_cut_into_tokens(start, word):
    """As the tokenizer would write it, and in single bytes; one that only begins like it is let through."""
    bytes_of = {TOKENIZER.id_to_token(t): t for t in range(VOCAB_SIZE)}
    single = [t for char in word for t in ids(char)]
    assert len(bytes_of) == VOCAB_SIZE
    for way in (ids(word), single, ids("so " + word)):
        walk = start(bad_words=WORDS)
        assert walk.reach(way) < len(way)
        assert END in walk or walk.reach(way[-1:]) == 0
    walk = start(bad_words=WORDS)
    assert walk.reach(ids("a ki, tea b 🌋 say no")) == len(ids("a ki, tea b 🌋 say no"))
    assert END in walk


def test_special_tokens_are_no_text_of_a_bad_word(start):
    """They may come, and what stands on both sides of one is one text."""
    walk = start(bad_words=("kite",))
    assert SPECIAL in walk
    first, *rest = ids("k") + ids("ite")
    assert walk.push([first, SPECIAL]) is None
    assert walk.reach(rest) < len(rest)
    assert walk.push([SPECIAL, *ids(" sea")]) is None


def test_all_constraints_hold_at_once(start):
    form = StructuredOutput(choices=("kite", "sea", "baker"))
    walk = start(structured_output=form, bad_words=("kit", "bak"))
    assert walk.reach(ids("kite")) < len(ids("kite"))
    walk = start(structured_output=form, bad_words=("kit", "bak"))
    walk.push(ids("sea"))
    assert walk.constraint.is_complete
    only = start(allowed_token_ids=(5, 40, END))
    assert [t for t in range(VOCAB_SIZE) if t in only] == sorted((5, 40, END))
    assert not only.constraint.follows_tokens


def test_constraints_that_contradict_each_other_are_a_dead_end(make, start):
    refused = make(structured_output=StructuredOutput(regex="abc"), allowed_token_ids=(END,))
    assert [v.field for v in refused.violations] == ["structured_output.regex"]
    assert "contradict" in refused.violations[0].description
    later = start(structured_output=StructuredOutput(regex="(a|b)[0-9]"), allowed_token_ids=tuple(ids("ab")))
    end = later.push(ids("a"))
    assert end is not None
    assert end.reason == "NO_TOKEN_ALLOWED"
    early = make(allowed_token_ids=(END,), min_tokens=2)
    assert [v.field for v in early.violations] == ["allowed_token_ids"]


def test_output_that_came_with_a_request_counts(make, constraints):
    form = StructuredOutput(json_schema=PERSON)
    made = make(output=ids('{"age":'), structured_output=form)
    walk = Walk(constraints, made.constraints[0])
    walk.push(ids("7}"))
    assert walk.constraint.is_complete
    assert make(output=ids('{"age":7}'), structured_output=form).constraints[0].is_complete
    (violation,) = make(output=ids('{"name"'), structured_output=form).violations
    assert violation.field == "output_token_ids"
    (violation,) = make(output=ids("a kite"), bad_words=("kite",)).violations
    assert violation.field == "output_token_ids"


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"json_schema": '{"type": "nope"}'}, "Invalid type"),
    ({"json_schema": '{"not": {}}'}, "Unimplemented"),
    ({"json_schema": '{"$ref": "http://host/x"}'}, "http://host/x"),
    ({"json_schema": "{"}, ""),
    ({"json_schema": '{"items":' * 900 + "{}" + "}" * 900}, "recursion"),
    ({"regex": "("}, "unclosed"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": "a?" * 2048}, "lexer"),
    ({"grammar": "start: nope"}, "nope"),
    ({"grammar": "nope: start"}, ""),
    ({"grammar": "start: " + "(" * 8000 + '"a"' + ")" * 8000}, "deeply"),
]


@pytest.mark.parametrize(("form", "said"), BROKEN)
def test_what_cannot_be_compiled_is_refused_with_the_field_and_the_reason(make, form, said):
    (violation,) = make(structured_output=StructuredOutput(**form)).violations
    assert violation.field == f"structured_output.{next(iter(form))}"
    assert said in violation.description
    assert len(violation.description) < 400


def test_nothing_of_a_grammar_is_logged(make, capfd):
    """Neither by us nor by the library, whether it compiles or not."""
    for form in ({"regex": "kanari[0-9]"}, {"regex": "kanari("}, {"json_schema": '{"type": "kanari"}'}):
        make(structured_output=StructuredOutput(**form))
    make(bad_words=("kanari",), output=ids("a kanari"))
    make(structured_output=StructuredOutput(grammar='start: "kanari" nope'))
    make(structured_output=StructuredOutput(regex="kanari\ud800"))
    said = capfd.readouterr()
    assert "kanari" not in said.out + said.err


def test_a_long_chain_of_rules_does_not_end_the_process(make):
    """The compiler descends into it, as deep as a text of the most characters can lead."""
    names = [f"r{i:x}" for i in range(1500)]
    rules = [f"{one}: {next_one}" for one, next_one in itertools.pairwise(names)]
    grammar = "\n".join(["start: r0", *rules, f'{names[-1]}: "a"'])
    assert 15_000 < len(grammar) <= 2**14
    assert not make(structured_output=StructuredOutput(grammar=grammar)).violations


def test_a_token_that_the_model_does_not_have_is_named(make):
    (violation,) = make(allowed_token_ids=(4, VOCAB_SIZE)).violations
    assert violation.field == "allowed_token_ids[1]"


def test_a_checkpoint_without_a_tokenizer_serves_lists_of_tokens_alone(tmp_path: Path):
    constraints = Constraints(tmp_path, 40, [3])
    made: list[Made] = []
    for params in (SamplingParams(bad_words=("x",)), SamplingParams(allowed_token_ids=(3, 4))):
        constraints.begin(Request(id="r", prompt_token_ids=[5], params=params, seed=0))
        constraints.wait(60)
        made += constraints.take_made()
    constraints.close()
    fields = {v.field: v.description for one in made for v in one.violations}
    assert list(fields) == ["bad_words"]
    assert "tokenizer.json" in fields["bad_words"]
    assert [bool(one.violations) for one in made] == [True, False]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"structured_output": StructuredOutput()}, "structured_output"),
        ({"structured_output": StructuredOutput(regex="a", choices=("b",))}, "structured_output"),
        ({"structured_output": StructuredOutput(regex="a" * 4097)}, "structured_output.regex"),
        ({"structured_output": StructuredOutput(regex="")}, "structured_output.regex"),
        ({"structured_output": StructuredOutput(choices=("a", ""))}, "structured_output.choices"),
        ({"structured_output": StructuredOutput(choices=("a",) * 1025)}, "structured_output.choices"),
        ({"structured_output": StructuredOutput(choices=("a" * 256,) * 129)}, "structured_output.choices"),
        ({"bad_words": ("a" * 65,)}, "bad_words"),
        ({"bad_words": ("a",) * 33}, "bad_words"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"allowed_token_ids": (1,) * (2**14 + 1)}, "allowed_token_ids"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_compiled(params, field):
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**params)
    assert [v.field for v in error.value.violations] == [field]
