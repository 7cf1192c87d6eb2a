"""How many threads compute: what was asked for or fits the machine, and one where more would only wait."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from tidegate.engine.model.config import read_config
from tidegate.engine.model.threads import available_cores, threads_for


def test_threads_are_as_many_as_asked_for_or_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert available_cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= available_cores() <= os.cpu_count()


@pytest.mark.parametrize(
    ("hidden", "inner", "num_tokens", "threads"),
    [(256, 704, 64, 1), (256, 704, 512, 4), (896, 4864, 1, 4), (896, 4864, 64, 4)],
    ids=["tiny, decode", "tiny, prefill", "0.5B, one sequence", "0.5B, decode"],
)
def test_small_products_run_on_one_thread(
    tmp_path: Path, hidden: int, inner: int, num_tokens: int, threads: int
) -> None:
    config = replace(
        read_config(make_checkpoint(tmp_path, "llama")), hidden_size=hidden, intermediate_size=inner
    )
    assert threads_for(config, num_tokens, cores=4) == threads
