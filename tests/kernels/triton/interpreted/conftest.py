"""What all of these tests share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN: an output that no program wrote shows, and so does one read too early."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    assert torch.zeros(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
