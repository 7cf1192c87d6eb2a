"""Whom the deaths of an engine make suspect, and whom they do not."""

from tidegate.engine.messages import Place
from tidegate.service.quarantine import Quarantine


def places(*names: str, start: int = 0, end: int = 10) -> list[Place]:
    return [Place(name, 0, start, end) for name in names]


def test_two_deaths_at_the_same_place_make_suspect_and_one_does_not() -> None:
    quarantine = Quarantine()
    quarantine.on_death(places("a", "b"))
    assert quarantine.suspects() == []
    quarantine.on_death(places("b", "c"))
    assert quarantine.suspects() == ["b"]


def test_only_one_that_was_alone_at_two_deaths_is_poison() -> None:
    quarantine = Quarantine()
    for _ in range(5):
        assert quarantine.on_death(places("a", "b")) == set()
    assert quarantine.on_death(places("a")) == set()
    assert quarantine.on_death(places("a")) == {"a"}
    assert quarantine.suspects() == ["a", "b"]


def test_a_completed_step_clears() -> None:
    quarantine = Quarantine()
    for _ in range(10):
        assert quarantine.on_death(places("a")) == set()
        quarantine.clear("a", 0)
    assert quarantine.suspects() == []


def test_a_prompt_that_got_further_in_between_is_not_suspect() -> None:
    """Its chunks give no tokens, but the place of the next death shows that they were computed."""
    quarantine = Quarantine()
    for chunk in range(10):
        assert quarantine.on_death(places("a", start=64 * chunk, end=64 * chunk + 64)) == set()
    assert quarantine.suspects() == []


def test_a_prompt_that_always_dies_in_the_same_late_chunk_is_poison() -> None:
    quarantine = Quarantine()
    quarantine.on_death(places("a", start=128, end=192))
    assert quarantine.on_death(places("a", start=128, end=192)) == {"a"}


def test_two_steps_under_way_hold_one_place_of_a_choice() -> None:
    quarantine = Quarantine()
    both = [*places("a", start=10, end=11), *places("a", start=11, end=12)]
    assert quarantine.on_death(both) == set()
    assert quarantine.suspects() == []
    assert quarantine.on_death(places("a", start=11, end=12)) == {"a"}


def test_choices_are_cleared_one_by_one_and_their_request_is_alone_with_them() -> None:
    quarantine = Quarantine()
    both = [Place("a", 0, 0, 10), Place("a", 1, 0, 10)]
    quarantine.on_death(both)
    quarantine.clear("a", 0)
    assert quarantine.on_death(both) == {"a"}


def test_of_a_request_that_ended_nothing_is_kept() -> None:
    quarantine = Quarantine()
    quarantine.on_death([*places("a", "b"), Place("a", 1, 0, 10)])
    quarantine.forget("a")
    quarantine.forget("b")
    assert not quarantine
