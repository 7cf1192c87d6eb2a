"""How many threads compute a step on the CPU."""

import os
from pathlib import Path

from tidegate.engine.model.config import ModelConfig

_SMALL_PRODUCT = 2**26
"""Multiplications in a layer's largest product, about half a millisecond of them."""
_SMALL_WEIGHT = 2**22
"""Elements of its weight, a few MiB, which stay in a core's cache."""


def threads_for(config: ModelConfig, num_tokens: int, cores: int) -> int:
    """One where the products of the step are small, and otherwise one for each core.

    Products of small matrices gained nothing from a second thread where the machine was calm. Where other
    processes want the cores it may be kept waiting for milliseconds, at each of dozens of products, while
    the first one spins; and on a calm machine the scheduler's own thread has use for the core.
    """
    weight = config.hidden_size * 2 * config.intermediate_size
    is_small = weight <= _SMALL_WEIGHT and weight * num_tokens <= _SMALL_PRODUCT
    return 1 if is_small else cores


def available_cores() -> int:
    """Cores that this process may use: its affinity, without hyperthreads, within the cgroup's quota.

    A second thread on a core makes matrix products no faster, and threads beyond the quota are stopped in
    the middle of a parallel section while the others wait for them. ``OMP_NUM_THREADS`` overrides.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    cpus = os.sched_getaffinity(0)
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus}
    cores = len(siblings) if None not in siblings else len(cpus)
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota.isdecimal():
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def _read(path: str) -> str | None:
    """The file's text; None where the kernel does not offer it."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
