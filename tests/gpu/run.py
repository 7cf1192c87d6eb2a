"""Check and measure everything that needs a GPU: ``make gpu``, or some of it with ``PARTS="swap storm"``.

Each part is a process of its own with a limit of seconds, so that one that fails, hangs or breaks the device
costs the others nothing. At the end comes one table, and everything is written as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton
from machine import device_name

HERE = Path(__file__).parent
PARTS = {
    "check": ("kernel_checks.py", 140),
    "models": ("models.py", 150),
    "swap": ("swap.py", 120),
    "engine": ("engine.py", 100),
    "storm": ("storm.py", 90),
    "kernels": ("kernel_times.py", 110),
    "sanitizer": ("sanitizer.py", 130),
}
"""Script and seconds of each, in the order in which they run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file for all results")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    device = device_name()
    report: dict[str, object] = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    lines = []
    for name in arguments.part or PARTS:
        result, line = _run(name, deadline)
        report[name] = result
        lines.append(line)
        arguments.json.write_text(json.dumps(report, indent=1))
    print(f"\n{device}")
    for name in arguments.part or PARTS:
        for figure in report[name].get("figures", []):  # type: ignore[attr-defined]
            if figure["goal"] is not None:
                at_most, value, goal = figure["at_most"], figure["value"], figure["goal"]
                reached = value <= goal if at_most else value >= goal
                verdict = "reached" if reached else "missed"
                sign = "<=" if at_most else ">="
                print(f"{figure['name']:62} {value:10.4g} {figure['unit']:8} {verdict:8} {sign} {goal:g}")
    print("\n".join(lines))
    return 0 if all(report[name].get("passed") for name in arguments.part or PARTS) else 1  # type: ignore[attr-defined]


def _run(name: str, deadline: float) -> tuple[dict[str, object], str]:
    """Run a part. Its results, and a line about it."""
    script, limit = PARTS[name]
    seconds = min(limit, deadline - time.monotonic())
    if seconds < 10:
        return {"passed": False, "cut": True}, f"{name:10} left out: no time"
    path = Path(f".gpu-{name}.json").resolve()
    path.unlink(missing_ok=True)
    print(f"\n=== {name}", flush=True)
    began = time.monotonic()
    command = [sys.executable, "-P", str(HERE / script), "--json", str(path)]
    try:
        status: int | str = subprocess.run(
            command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, timeout=seconds, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        status = f"cut off after {seconds:.0f} s"
    elapsed = time.monotonic() - began
    result: dict[str, object] = json.loads(path.read_text()) if path.exists() else {"passed": False}
    path.unlink(missing_ok=True)
    result |= {"seconds": elapsed, "status": status, "passed": bool(result.get("passed")) and status == 0}
    checks = result.get("checks", [])
    wrong = [check["name"] for check in checks if not check["error"] <= check["limit"]]  # type: ignore[attr-defined]
    verdict = "passed" if result["passed"] else f"FAILED ({status}) {wrong} {result.get('failures', [])}"
    return result, f"{name:10} {len(checks):4} checks {elapsed:6.1f} s  {verdict}"  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
