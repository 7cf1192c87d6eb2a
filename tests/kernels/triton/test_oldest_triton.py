"""The machine code once more, made by the oldest Triton that is supported: what many a GPU machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OLDEST = ROOT / ".cache/triton-oldest"


@pytest.mark.timeout(600)
def test_the_oldest_triton_compiles_every_kernel_as_well():
    """Every test in ``test_compiles.py``. Its own report is shown where one fails."""
    assert (OLDEST / ".installed").exists(), "not here: `make .cache/triton-oldest/.installed`"
    path = os.pathsep.join(filter(None, (str(OLDEST), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            Path(__file__).with_name("test_compiles.py"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    version = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert version.stdout.startswith("3.6."), "another Triton was found first"
