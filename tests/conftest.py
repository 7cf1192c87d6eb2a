"""What every test run shares."""

import os
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

import tidegate

# Before torch is imported anywhere: the models here are so small that a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, however fast the machine is: what fails here fails everywhere.
settings.register_profile("same in every run", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("same in every run")


@pytest.fixture(autouse=True)
def logging_unconfigured() -> None:
    """``LLM`` sets the log of its process up, and so does a server: a test that reads the log must find it as
    if nobody had run before.
    """
    structlog.reset_defaults()


def pytest_report_header() -> str:
    """Which tidegate is tested: the built wheel in `make test`, the sources in an editable install."""
    return f"tidegate: {Path(tidegate.__file__).parent}"
