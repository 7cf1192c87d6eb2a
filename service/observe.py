"""What metrics, traces and the log are told of every request, whichever RPC it came by."""

from tidegate.engine.messages import ProgressKind
from tidegate.service.generation import Generation


class Observer:
    """Does nothing: override what is of use.

    Called by the hub, in order, on its loop: must be quick, and must not raise.

    ``on_tokens`` is called for every token, and so only where ``hears_tokens`` says that it does something.
    ``on_open`` runs in the task of the RPC that brought the request, and so sees its context variables.
    """

    hears_tokens = False

    def on_open(self, generation: Generation) -> None:
        """It was let in, and is not read yet."""

    def on_admitted(self, generation: Generation) -> None:
        """It left the queue and runs."""

    def on_tokens(self, generation: Generation, choice: int, now: float) -> None:
        """One step of the engine, which arrived ``now`` (monotonic seconds), made new output of a choice."""

    def on_progress(self, generation: Generation, choice: int, kind: ProgressKind) -> None:
        """Something else happened to a choice."""

    def on_end(self, generation: Generation) -> None:
        """It is over: ``generation.end`` says how, or is None where its client left."""


class Observers(Observer):
    """Several, told one after the other."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self._of_tokens = [observer for observer in observers if observer.hears_tokens]
        self.hears_tokens = bool(self._of_tokens)

    def on_open(self, generation: Generation) -> None:
        for observer in self._observers:
            observer.on_open(generation)

    def on_admitted(self, generation: Generation) -> None:
        for observer in self._observers:
            observer.on_admitted(generation)

    def on_tokens(self, generation: Generation, choice: int, now: float) -> None:
        for observer in self._of_tokens:
            observer.on_tokens(generation, choice, now)

    def on_progress(self, generation: Generation, choice: int, kind: ProgressKind) -> None:
        for observer in self._observers:
            observer.on_progress(generation, choice, kind)

    def on_end(self, generation: Generation) -> None:
        for observer in self._observers:
            observer.on_end(generation)


class Tracer(Observer):
    """An observer that also follows the callers' traces."""

    def attach(self, metadata: dict[str, str]) -> None:
        """What the present RPC's tasks start belongs to the trace that its metadata names, if any."""

    def close(self) -> None:
        """Nothing comes any more."""
