"""Compiles the C files of this folder with the machine's own compiler, once for each machine and user.

The library lies in a cache folder under a name made of all that it depends on: sources, flags, compiler and
processor. So nothing ever goes stale, and what another machine left on a shared home is not taken for ours.
"""

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

SOURCES = ("kernels.c", "attention.c", "elementwise.c", "linear.c", "dots.h", "threads.h", "vector.h")

_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_TIMEOUT = 120
"""Seconds; a compilation takes about one."""


class CompilerError(Exception):
    """There will be no native kernels; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Compiled:
    path: Path
    seconds: float
    """What compiling took; 0 where the cache had the library."""


def compile_kernels(definitions: dict[str, str]) -> Compiled:
    """The library for these preprocessor ``definitions``. Raises ``CompilerError``."""
    command = _compiler()
    flags = [*_FLAGS, *_machine_flags(), *(f"-D{name}={value}" for name, value in definitions.items())]
    folder = files(__package__)
    sources = {name: folder.joinpath(name).read_bytes() for name in SOURCES}
    identity = repr([sources, command, _state_of(command[0]), flags, _processor()])
    name = f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    try:
        path = _cache_folder() / name
        if path.is_file():
            return Compiled(path, 0.0)
        started = time.perf_counter()
        _compile(command, flags, sources, path)
    except OSError as error:
        raise CompilerError(f"the kernels could not be written: {error}") from None
    return Compiled(path, time.perf_counter() - started)


def _compiler() -> list[str]:
    """The command of ``$CC``, or else the system's compiler."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    program = shutil.which(command[0])
    if program is None:
        raise CompilerError(f"no C compiler: {command[0]!r} is not on PATH; install gcc, or name one in CC")
    return [program, *command[1:]]


def _machine_flags() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ["-march=native", "-mprefer-vector-width=512"] if x86 else ["-mcpu=native"]


def _compile(command: list[str], flags: list[str], sources: dict[str, bytes], target: Path) -> None:
    """Under another name first: processes that start together each compile, and the last one's stays."""
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=target.parent) as name:
        folder = Path(name)
        for source, content in sources.items():
            (folder / source).write_bytes(content)
        _run([*command, *flags, "-pthread", "-shared", "kernels.c", "-lm", "-o", target.name], folder)
        (folder / target.name).replace(target)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} failed: {error}") from None
    if done.returncode != 0:
        said = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr[:200])
        raise CompilerError(f"{command[0]} failed with status {done.returncode}: {said.strip()}")


def _cache_folder() -> Path:
    """Ours alone, since libraries are loaded from it: below the user's cache, or else a temporary one."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = base / "tidegate"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # read-only, or no home at all
        pass
    return _temporary_folder()


@cache
def _temporary_folder() -> Path:
    """Of this process and gone with it: whoever asks for the kernels next finds them compiled."""
    folder = Path(tempfile.mkdtemp(prefix="tidegate-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _state_of(program: str) -> tuple[str, int, int]:
    """Changes when the compiler is updated, without running it."""
    path = Path(program).resolve()
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    named = ("model name", "cpu family", "model", "stepping", "flags", "features", "cpu part")
    return "\n".join(line for line in lines if line.split(":")[0].strip().lower() in named)
