"""Makes the constraints of requests ready, on threads beside the engine's, and computes their masks."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import structlog
from llguidance import LLExecutor

from tidegate.engine.constraint import Constraint, DeadEnd, Endings, compute_masks, mask_of
from tidegate.engine.grammar import Grammars
from tidegate.engine.grammar_trial import STACK_BYTES
from tidegate.engine.request import InvalidRequest, Request, SamplingParams, Violation

THREADS = 2
_DEAD_ENDS = {
    "GRAMMAR_TOO_COMPLEX": "is too complex: its first tokens cannot be found within the limits",
    "NO_TOKEN_ALLOWED": "leaves no token to begin with: do the constraints contradict each other?",
}

log = structlog.get_logger(__name__)


class Made(NamedTuple):
    """What became of a request's constraints."""

    request: Request
    constraints: dict[int, Constraint]
    """By choice, with their first masks; empty where there are violations."""
    violations: list[Violation]


class Constraints:
    """Calls come from the engine's thread."""

    def __init__(self, checkpoint: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """``eos_token_ids``: those of the model, which its tokenizer may not know as such."""
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._grammars = Grammars(checkpoint / "tokenizer.json", vocab_size, self._eos_token_ids)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tidegate-grammars")
        self._making: dict[Future[dict[int, Constraint]], Request] = {}

    def begin(self, request: Request) -> None:
        """Make the constraints of a request that has some; they come by ``take_made``."""
        params = request.params
        if params.structured_output is None and not params.bad_words:
            # At once: nothing to compile, and not behind those who have.
            self._making[_done(self._make, request)] = request
            return
        # It counts for threads that start meanwhile: there is no other way to say it.
        usual = threading.stack_size(STACK_BYTES)
        try:
            future = self._threads.submit(self._make, request)
        finally:
            threading.stack_size(usual)
        self._making[future] = request

    def drop(self, request: Request) -> None:
        """It has ended. What is being compiled for it goes on to its end, and nobody hears of it."""
        for future in [future for future, of in self._making.items() if of is request]:
            future.cancel()
            del self._making[future]

    @property
    def is_making(self) -> bool:
        return bool(self._making)

    def wait(self, timeout: float) -> None:
        """Until something is made; at most so many seconds."""
        wait(self._making, timeout, return_when="FIRST_COMPLETED")

    def take_made(self) -> list[Made]:
        """What was made since the last call, in the order of ``begin``."""
        return [self._result(future) for future in list(self._making) if future.done()]

    def compute_masks(self, constraints: Sequence[Constraint]) -> list[DeadEnd | None]:
        """Of those that were advanced; for each, what keeps it from going on."""
        return compute_masks(constraints, self._executor, self._vocab_size)

    def close(self) -> None:
        """End the trials of grammars, which nothing else takes long for, and then the threads."""
        self._grammars.close()
        self._threads.shutdown(cancel_futures=True)

    def _result(self, future: Future[dict[int, Constraint]]) -> Made:
        request, error = self._making.pop(future), future.exception()
        if error is None:
            return Made(request, future.result(), [])
        if isinstance(error, InvalidRequest):
            return Made(request, {}, error.violations)
        # Without its message, which may quote the grammar.
        log.error("constraint_failed", error=type(error).__name__)
        return Made(request, {}, [Violation(_field(request.params), "cannot be compiled")])

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    # On a thread

    def _make(self, request: Request) -> dict[int, Constraint]:
        """For each choice, behind the output that came with it. Raises ``InvalidRequest``."""
        params, size = request.params, self._vocab_size
        for index, token_id in enumerate(params.allowed_token_ids):
            if token_id >= size:
                description = f"must be below the vocabulary's size, {size}"
                raise InvalidRequest([Violation(f"allowed_token_ids[{index}]", description)])
        form, words = params.structured_output, params.bad_words
        sentence = None if form is None else self._grammars.output(form)
        text = self._grammars.text_without(words) if words else None
        endings = self._endings(params, self._grammars.special_token_ids() if form or words else [])
        constraints = {}
        for choice, output in request.running_choices().items():
            constraint = constraints[choice] = Constraint(
                endings,
                allowed=mask_of(params.allowed_token_ids, size) if params.allowed_token_ids else None,
                sentence=None if sentence is None else sentence.deep_copy(),
                text=None if text is None else text.deep_copy(),
                min_tokens=params.min_tokens,
            )
            for token_id in output:
                constraint.advance(token_id)
            if constraint.is_broken or not constraint.has_allowed(output):
                description = "are not what the constraints of the output allow"
                raise InvalidRequest([Violation("output_token_ids", description)])
        for end in self.compute_masks(list(constraints.values())):
            if end is not None:
                raise InvalidRequest([Violation(_field(params), _DEAD_ENDS[end.reason])])
        return constraints

    def _endings(self, params: SamplingParams, special: Sequence[int]) -> Endings:
        eos = self._eos_token_ids
        stops = params.stop_token_ids + (() if params.ignore_eos else eos)
        return Endings.of(mask_of(special, self._vocab_size), mask_of(eos, self._vocab_size), stops)


def _done(
    make: Callable[[Request], dict[int, Constraint]], request: Request
) -> Future[dict[int, Constraint]]:
    future: Future[dict[int, Constraint]] = Future()
    try:
        future.set_result(make(request))
    except InvalidRequest as invalid:
        future.set_exception(invalid)
    return future


def _field(params: SamplingParams) -> str:
    """What constrains most."""
    if params.structured_output is not None:
        return f"structured_output.{params.structured_output.field}"
    return "bad_words" if params.bad_words else "allowed_token_ids"
