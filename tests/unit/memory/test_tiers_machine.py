"""The block manager as a state machine: hypothesis searches for the shortest run that breaks a promise."""

from collections.abc import Callable
from typing import Any

import pytest
from block_manager_model import RULES, WINDOWS, BlockManagerModel, Rule, Violation
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tidegate.engine.memory.tiers import BlockManager


class BlockManagerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model: BlockManagerModel | None = None
        self.is_sound = True

    @initialize(
        block_size=st.sampled_from((1, 2, 4)),
        device_blocks=st.sampled_from((3, 5, 8)),
        host_blocks=st.sampled_from((0, 2, 4)),
        host_quota=st.sampled_from((None, 0, 2)),
        windows=st.sampled_from(WINDOWS),
    )
    def build(
        self,
        block_size: int,
        device_blocks: int,
        host_blocks: int,
        host_quota: int | None,
        windows: tuple[int | None, ...],
    ) -> None:
        self.model = BlockManagerModel(
            lambda n: 0,
            block_size=block_size,
            device_blocks=device_blocks * len(windows),
            host_blocks=host_blocks * len(windows),
            host_quota=host_quota,
            windows=windows,
        )

    def apply(self, method: Callable[[BlockManagerModel], None], data: st.DataObject) -> None:
        assert self.model is not None
        self.model.choose = lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0
        self.is_sound = False
        method(self.model)
        self.is_sound = True

    @invariant()
    def holds(self) -> None:
        """After every rule: counts, lists, table rows and the content of every slot."""
        if self.model is not None and self.is_sound:
            self.is_sound = False
            self.model.check()
            self.is_sound = True

    def teardown(self) -> None:
        """A run that broke nothing ends with both tiers whole again."""
        if self.model is not None and self.is_sound:
            self.model.choose = lambda n: 0
            self.model.finish()


def _as_rule(spec: Rule) -> Any:
    def run(self: BlockManagerMachine, data: st.DataObject) -> None:
        self.apply(spec.run, data)

    run.__name__ = spec.run.__name__
    return precondition(lambda self: self.model is not None and bool(spec.when(self.model)))(
        rule(data=st.data())(run)
    )


# One rule for each of the model's, so that hypothesis can leave some out of a run. Those of seldom use
# are kept out: here they would come as often as the rest, and end what makes a run interesting.
for _spec in RULES:
    if _spec.weight >= 1:
        setattr(BlockManagerMachine, _spec.run.__name__, _as_rule(_spec))

BlockManagerMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestBlockManager = BlockManagerMachine.TestCase


def test_the_machine_finds_a_planted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots never come out from behind their fences."""
    monkeypatch.setattr(BlockManager, "collected", lambda self, step_id: None)
    generate_only = settings(BlockManagerMachine.TestCase.settings, phases=[Phase.generate])
    with pytest.raises(Violation):
        run_state_machine_as_test(BlockManagerMachine, settings=generate_only)
