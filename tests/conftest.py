"""What every test run shares."""

import os
from pathlib import Path

import tidegate

# Before torch is imported anywhere: the models here are so small that a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_report_header() -> str:
    """Which tidegate is tested: the built wheel in `make test`, the sources in an editable install."""
    return f"tidegate: {Path(tidegate.__file__).parent}"
