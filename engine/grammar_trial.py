"""Compiles grammars on trial, in a process that may be ended: ``python -m tidegate.engine.grammar_trial``.

A client's text of a kilobyte can make llguidance compile for hours and take gigabytes (an intersection of
``n`` patterns doubles with each of them), and nothing that it can be told bounds either; nor can a thread be
stopped. So every text is compiled here first, where the operating system ends what takes too long or too
much. What passes costs the engine the same again, and no more.

A line on stdin is a grammar as ``LLMatcher`` takes it, a JSON string; the line on stdout that answers it is
what is wrong with it, or null. Nothing of ours is imported: the process is there after some 50 ms.
"""

import json
import resource
import signal
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_SECONDS = 1.0
"""Of one grammar, on no clock of the wall: a busy machine refuses nothing that an idle one takes."""
STACK_BYTES = 2**28
"""Of a thread that compiles; only what is used of it becomes memory. With the usual 8 MiB a chain of 4000
rules ended the process."""
HEAP_BYTES = 2**28
"""For Python, llguidance and the automata."""
LIMITS = LLParserLimits(
    verbose_errors=False,
    # Of a mask, which the engine's step waits for: schemas of hundreds of alternatives took below 5 ms with
    # these. With the usual ones an ambiguous grammar of 55 characters came to 2 s.
    step_max_items=4_000,
    max_items_in_row=1_000,
    step_lexer_fuel=100_000,
)


def fault(tokenizer: LLTokenizer, source: str) -> str | None:
    """What is wrong with a grammar, up to its first mask."""
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error() if matcher.is_error() else None


def _serve() -> None:
    # Bytes for tokens: how a grammar compiles does not hang on the vocabulary.
    tokenizer = LLTokenizer("byte")
    for line in sys.stdin:
        # CPU time; the signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = json.dumps(fault(tokenizer, json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (STACK_BYTES + HEAP_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    server = threading.Thread(target=_serve)
    server.start()
    server.join()


if __name__ == "__main__":
    main()
