"""The laboratory runs, and says of swapping what the tier is for."""

import subprocess
import sys
from pathlib import Path


def test_the_laboratory_prints_a_table_in_which_swapping_computes_nothing_again() -> None:
    lab = Path(__file__).with_name("lab.py")
    command = [sys.executable, "-P", lab, "--machine", "2-core CPU, 5M"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    recomputed = {(row[0], row[1]): row[-1] for row in rows if row[-1]}
    assert {value for (_, policy), value in recomputed.items() if policy == "swap"} == {"0"}
    assert all(value != "0" for (_, policy), value in recomputed.items() if policy == "recompute")
    assert len(recomputed) == 8
