"""How near the kernel is to killing for want of memory: in our control group, else in the machine."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CHECK_INTERVAL = 0.1
"""Seconds for which a reading holds: a burst of requests must not read files for each."""
PROC_CGROUP, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Files:
    """Of one version of control groups."""

    limit: str
    usage: str
    inactive: str
    """The key in memory.stat of the page cache that the kernel takes back first."""


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class MemoryGauge:
    """Call it for the part in use, from 0 to 1."""

    def __init__(self, read: Callable[[], float] | None = None) -> None:
        self._read = read or memory_in_use
        self._value = 0.0
        self._read_at = float("-inf")

    def __call__(self) -> float:
        now = time.monotonic()
        if now - self._read_at >= CHECK_INTERVAL:
            self._value, self._read_at = self._read(), now
        return self._value


def memory_in_use(proc_cgroup: Path = PROC_CGROUP, root: Path = CGROUP_ROOT) -> float:
    """The greatest part in use: of the machine's memory, or of any limit that we stand under.

    Without what the kernel can take back by itself, as the kubelet counts it.
    """
    machine = psutil.virtual_memory()
    parts = [1 - machine.available / machine.total]
    for folder, files in _groups(proc_cgroup, root):
        limit = (folder / files.limit).read_text().strip()
        if limit == "max" or int(limit) >= machine.total:
            continue
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / files.usage).read_text()) - int(stat.get(files.inactive, 0))
        parts.append(used / max(1, int(limit)))
    return max(parts)


def _groups(proc_cgroup: Path, root: Path) -> Iterator[tuple[Path, _Files]]:
    """Our group and those around it, as far as they can be seen from in here."""
    if not proc_cgroup.is_file():
        return
    for line in proc_cgroup.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, files = root, _V2
        elif "memory" in controllers.split(","):
            base, files = root / "memory", _V1
        else:
            continue
        group = base / path.lstrip("/")
        # In a container the path may be that of the world outside: then our group is the root in here.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            if (folder / files.limit).is_file() and (folder / files.usage).is_file():
                yield folder, files
