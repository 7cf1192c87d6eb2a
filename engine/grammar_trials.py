"""Tries grammars in processes of their own, before the engine compiles them."""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from hashlib import blake2b

import structlog

from tidegate.engine import grammar_trial

MOST_REMEMBERED = 2**12
"""Grammars that passed; most conversations send the same few again and again."""
TOO_MUCH = "takes too much time or memory to compile: make it simpler"
_COMMAND = (sys.executable, "-P", "-m", grammar_trial.__name__)

log = structlog.get_logger(__name__)


class GrammarTrials:
    """Calls come from any thread; each that tries something has a process for so long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []
        self._busy: set[subprocess.Popen[str]] = set()
        self._passed: dict[bytes, None] = {}
        self._is_closed = False

    def fault(self, source: str) -> str | None:
        """What is wrong with a grammar as ``LLMatcher`` takes it; None where it can be compiled here."""
        digest = blake2b(source.encode(), digest_size=16).digest()
        with self._lock:
            if digest in self._passed:
                return None
        answer = self._ask(source)
        if not answer:
            return TOO_MUCH
        said: str | None = json.loads(answer)
        if said is None:
            with self._lock:
                self._passed[digest] = None
                if len(self._passed) > MOST_REMEMBERED:
                    del self._passed[next(iter(self._passed))]
        return said

    def close(self) -> None:
        """End the processes; what is tried at present counts as taking too much."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for process in self._busy:
                process.kill()
        for process in idle:
            _end(process)

    def _ask(self, source: str) -> str:
        """The answer's line; empty where the process ended instead."""
        process, is_new = self._take()
        try:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("a trial without pipes")
            # ASCII alone: whatever the locale.
            process.stdin.write(json.dumps(source) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        with self._lock:
            self._busy.discard(process)
            is_spent = not answer or self._is_closed
            if not is_spent:
                self._idle.append(process)
        if is_spent:
            _end(process)
        if answer:
            return answer
        log.warning("grammar_trial_ended", status=process.returncode)
        # One that waited may have ended for any reason; then this grammar is not what ended it.
        return "" if is_new or self._is_closed else self._ask(source)

    def _take(self) -> tuple[subprocess.Popen[str], bool]:
        """A process, and whether it is a new one."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            is_new = not self._idle
            if self._idle:
                process = self._idle.pop()
            else:
                # In a session of its own: Ctrl-C in a terminal is for the engine; it ends with its stdin.
                # What it says on stderr may quote the grammar.
                process = subprocess.Popen(
                    _COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                )
            self._busy.add(process)
            return process, is_new


def _end(process: subprocess.Popen[str]) -> None:
    # Waits for it, and closes the pipes: one may hold what it has not read.
    with suppress(BrokenPipeError), process:
        process.kill()
