"""The laboratory: what its simulated machines say of the tier, and that they say it twice alike."""

import pytest
from laboratory.loads import long_prompts, pauses, storm, turns
from laboratory.machines import MACHINES
from laboratory.trial import Figures, Variant, trial

H200, SHARDS, CPU = MACHINES
AUTO = Variant("auto")


@pytest.mark.parametrize("load", [storm, pauses], ids=lambda load: load.__name__)
def test_swapping_computes_nothing_again_and_recomputing_copies_less(load) -> None:
    """Nothing written in advance: else what was dropped comes back from the host as a known prefix."""
    figures = {
        mode: trial(CPU, load, Variant(mode, limits={"preemption": mode, "write_ahead": 0.0}), 0)
        for mode in ("auto", "swap", "recompute")
    }
    assert figures["swap"].recomputed == 0
    assert figures["swap"].preemptions >= 16
    assert figures["recompute"].recomputed > 0
    assert figures["recompute"].bytes_in < figures["swap"].bytes_in
    assert figures["auto"].tokens_per_second > 0.98 * figures["swap"].tokens_per_second


@pytest.mark.parametrize("machine", [H200, SHARDS], ids=lambda machine: machine.name)
@pytest.mark.parametrize("load", [storm, pauses, long_prompts], ids=lambda load: load.__name__)
def test_what_is_preempted_has_been_written_to_the_host_before(machine, load) -> None:
    """Its blocks are free at once: the link had time for them while the device computed."""
    figures = trial(machine, load, AUTO, 0)
    assert figures.full_blocks > 100
    assert figures.clean_ratio > 0.95


def test_a_turn_that_comes_back_does_not_wait_for_others_to_leave() -> None:
    ahead = trial(H200, turns, AUTO, 0)
    late = trial(H200, turns, Variant("no write-ahead", limits={"write_ahead": 0.0}), 0)
    assert ahead.ttft_p99 < late.ttft_p99 / 2
    assert ahead.tokens_per_second > late.tokens_per_second


def test_a_variant_changes_the_policy_for_its_own_trial_only() -> None:
    def run(variant: Variant) -> Figures:
        return trial(CPU, storm, variant, 1)

    before = run(AUTO)
    assert run(Variant("no reserve", rules={"growth_reserve": lambda *_: 0})) != before
    assert run(AUTO) == before
