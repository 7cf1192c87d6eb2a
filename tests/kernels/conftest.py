"""What the tests of the kernels share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_in_every_run() -> None:
    """Else a limit on an error holds in one run and not in the next."""
    torch.manual_seed(0)
