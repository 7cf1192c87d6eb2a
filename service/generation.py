"""One request from its arrival to its terminal event: the state that the front keeps of it.

The first transition wins: whatever ends a choice first (the engine, a stop string, a cancel, the time
limit) decides its reason, and tokens that come later are dropped and not counted.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from tidegate.engine import messages
from tidegate.engine.messages import Command, Finish, Limit, ProgressKind
from tidegate.engine.request import FinishReason, Request
from tidegate.engine.text import Text, TextStream
from tidegate.service.errors import Failure
from tidegate.service.events import (
    Admitted,
    ChoiceEnd,
    Delta,
    Failed,
    Finished,
    Outbox,
    Progress,
    Timings,
    Usage,
)


@dataclass(slots=True)
class _Choice:
    index: int
    stream: TextStream
    token_ids: list[int]
    """Output that came with the request or from the engine, and counts."""
    delivered: int
    """Output tokens [0, delivered) were written to the client's stream."""
    end: ChoiceEnd | None = None
    is_confirmed: bool = False
    """Whether the engine said that it holds nothing of this choice any more."""

    @property
    def offset(self) -> int:
        """Of the next token."""
        return len(self.token_ids)


class Generation:
    """A request that ends in exactly one ``Finished`` or ``Failed`` in its outbox.

    Unless its client left: ``abandon`` ends it without a word.
    """

    def __init__(
        self,
        request_id: str,
        tenant: str,
        outbox: Outbox,
        *,
        num_choices: int,
        credit: int | None,
        unread: int | None,
        time_limit: float | None,
        send: Callable[[Command], None],
        on_end: Callable[["Generation"], None],
    ) -> None:
        """``credit``: the client's, absolute. ``unread``: tokens of a choice that may wait for the writer.

        None is without limit, for both. ``time_limit`` in seconds from now.
        """
        self.request_id = request_id
        self.tenant = tenant
        self.engine_id: str | None = None
        """The engine's name for it, once it was submitted."""
        self.is_admitted = False
        self.is_ended = False
        self.end: Finished | Failed | None = None
        """The terminal event. None behind the end, where nobody is to be told."""
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self._outbox = outbox
        self._num_choices = num_choices
        self._choices: list[_Choice] = []
        """Empty until the content is known."""
        self._credit = credit
        self._unread = unread
        self._limit: int | None = None
        """What the engine was last told: each choice may have generated up to here."""
        self._send = send
        self._on_end = on_end
        self._request: Request | None = None
        self._queue_position = 0
        self._usage = Usage()
        self._arrived_at = time.monotonic()
        self._admitted_at: float | None = None
        self._first_token_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        if time_limit is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, time_limit), self.expire)

    # From the front.

    def prepare(self, request: Request, text: Text, queue_position: int, eos_token_ids: list[int]) -> None:
        """Take the content, and set in it how far the engine may generate at first.

        Where the output that the request brought along has reached an end already, the request ends
        here, as it would have ended then.
        """
        self._request = request
        self._queue_position = queue_position
        self._usage.prompt_tokens = len(request.prompt_token_ids)
        given = request.output_token_ids
        for index in range(self._num_choices):
            stream = TextStream(text, request.params)
            stream.push(given)
            self._choices.append(_Choice(index, stream, list(given), len(given)))
        self._limit = request.emit_upto = self._allowed()
        if given:
            reason = _end_of_given(request, self._choices[0].stream, eos_token_ids)
            if reason is not None:
                self._stop(reason)

    def grant(self, upto: int) -> None:
        """Credit from the client: absolute, the larger wins."""
        if self._credit is not None and upto > self._credit:
            self._credit = upto
            self._raise_limit(by_at_least=1)

    def delivered(self, choice_index: int, upto: int) -> None:
        """Output tokens of a choice before this offset were written to the client's stream."""
        choice = self._choices[choice_index]
        choice.delivered = max(choice.delivered, upto)
        if self._unread is None or self._limit is None:
            return
        # Not at every write: half of what may be unread is a good time to say so. A choice that has
        # ended may have been the one that held the others back.
        step = self._unread // 2
        if choice.end is not None or upto + self._unread >= self._limit + step:
            self._raise_limit(by_at_least=step)

    def cancel(self) -> None:
        self._stop(FinishReason.CANCELLED)

    def expire(self) -> None:
        """The time limit is reached."""
        if self.is_admitted:
            self._stop(FinishReason.DEADLINE)
        else:
            self.fail(Failure("TIME_LIMIT", "the time limit was reached before the request could run"))

    def abandon(self) -> None:
        """The client is gone: nobody listens to the end."""
        if self._end():
            self._finish_in_engine(FinishReason.CANCELLED)

    def fail(self, failure: Failure) -> None:
        if self._end(Failed(self.request_id, failure)):
            self._finish_in_engine(FinishReason.CANCELLED)

    # When the engine dies and another one comes.

    def on_engine_death(self) -> None:
        """Nobody will confirm any more what was decided."""
        for choice in self._choices:
            choice.is_confirmed = choice.end is not None
        if self._choices:
            self.finish_if_confirmed()

    @property
    def has_credit(self) -> bool:
        """Whether every choice that runs may generate."""
        allowed = self._allowed()
        return allowed is None or all(c.offset < allowed for c in self._choices if c.end is None)

    def continuation(self) -> Request:
        """What another engine is told of a request that was submitted, to go on behind what there is."""
        if self._request is None:
            raise RuntimeError("the content of the request is not known yet")
        self._limit = self._allowed()
        running = {choice.index: list(choice.token_ids) for choice in self._choices if choice.end is None}
        return msgspec.structs.replace(self._request, emit_upto=self._limit, choices=running)

    def on_recovered(self) -> None:
        """Another engine goes on with it."""
        if self.is_admitted:
            for choice in self._choices:
                if choice.end is None:
                    self._outbox.put(Progress(self.request_id, choice.index, ProgressKind.RECOVERED))

    # From the engine.

    def on_gone(self, failure: Failure) -> None:
        """The engine is gone. What was decided stands; what still ran fails."""
        if self._choices and all(choice.end is not None for choice in self._choices):
            self._finish()
        else:
            self._end(Failed(self.request_id, failure))

    def on_refused(self, refused: messages.Refused) -> None:
        self._end(Failed(self.request_id, Failure.invalid(refused.violations)))

    def on_admitted(self, admitted: messages.Admitted) -> None:
        if self._request is None or self.is_admitted:
            return
        self.is_admitted = True
        self._admitted_at = time.monotonic()
        self._usage.cached_tokens = admitted.cached_device_tokens + admitted.cached_host_tokens
        self._outbox.put(
            Admitted(
                request_id=self.request_id,
                queue_position=self._queue_position,
                cached_device_tokens=admitted.cached_device_tokens,
                cached_host_tokens=admitted.cached_host_tokens,
                seed=self._request.seed,
                prompt_token_ids=self._request.prompt_token_ids,
            )
        )

    def on_delta(self, delta: messages.Delta, reason: FinishReason | None) -> None:
        """``reason``: why the engine ended the choice behind these tokens, where it did so in this step."""
        choice = self._choices[delta.choice]
        if choice.end is not None:
            return
        if delta.offset != choice.offset:
            self.fail(Failure("TOKENS_OUT_OF_ORDER", "the engine skipped or repeated a token"))
            return
        if self._first_token_at is None:
            self._first_token_at = time.monotonic()
        added = choice.stream.push(delta.token_ids, reason)
        token_ids = delta.token_ids[: added.num_tokens]
        logprobs = delta.logprobs[: added.num_tokens] if delta.logprobs else None
        choice.token_ids += token_ids
        if added.stop is not None:
            reason = FinishReason.STOP_STRING
            self._finish_in_engine(reason, choice)
        if reason is not None:
            self._decide(choice, reason)
        self._outbox.put(
            Delta(self.request_id, choice.index, delta.offset, token_ids, added.text, logprobs, reason)
        )

    def on_progress(self, progress: messages.Progress) -> None:
        choice = self._choices[progress.choice]
        if choice.end is None:
            self._outbox.put(Progress(self.request_id, choice.index, progress.kind))

    def on_choice_end(self, finished: messages.Finished) -> None:
        """The engine ended a choice. The tokens of its last step have been seen."""
        choice = self._choices[finished.choice]
        choice.is_confirmed = True
        self._usage.recomputed_tokens += finished.usage.recomputed_tokens
        self._usage.preemptions += finished.usage.preemptions
        if self.is_ended or choice.end is not None:
            return
        if finished.reason is FinishReason.ERROR:
            self.fail(Failure(finished.error or "INTERNAL", "the engine could not compute the request"))
        elif finished.reason is FinishReason.DEADLINE and not self.is_admitted:
            self.expire()
        else:
            self._end_choice(choice, finished.reason)

    def finish_if_confirmed(self) -> None:
        if all(choice.is_confirmed for choice in self._choices):
            self._finish()

    # Inside.

    def _stop(self, reason: FinishReason) -> None:
        """End all choices that still run, and the request with them, without waiting for the engine.

        The engine may be in the middle of a long step, and past its deadline a client does not listen.
        """
        if self.is_ended:
            return
        for choice in self._choices:
            if choice.end is None:
                self._finish_in_engine(reason, choice if self.is_admitted else None)
                self._end_choice(choice, reason)
        self._finish(reason)

    def _end_choice(self, choice: _Choice, reason: FinishReason) -> None:
        """End a choice behind its last token, with the text that was held back."""
        text = choice.stream.flush()
        if choice.stream.stop is not None:
            reason = FinishReason.STOP_STRING
        self._decide(choice, reason)
        self._outbox.put(Delta(self.request_id, choice.index, choice.offset, [], text, None, reason))

    def _decide(self, choice: _Choice, reason: FinishReason) -> None:
        choice.end = ChoiceEnd(choice.index, reason, choice.offset)
        if reason is FinishReason.STOP_TOKEN:
            choice.end.stop_token_id = choice.token_ids[-1]
        elif reason is FinishReason.STOP_STRING and choice.stream.stop is not None:
            choice.end.stop_string = choice.stream.stop.stop

    def _finish(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """``reason``: for choices of which nothing is known yet."""
        if self.is_ended:
            return
        ends = [choice.end for choice in self._choices if choice.end is not None]
        if self._request is None:
            ends = [ChoiceEnd(index, reason, 0) for index in range(self._num_choices)]
        else:
            num_given = len(self._request.output_token_ids)
            self._usage.output_tokens = sum(end.output_tokens - num_given for end in ends)
        now = time.monotonic()
        timings = Timings(
            queued=(self._admitted_at or now) - self._arrived_at,
            to_first_token=None if self._first_token_at is None else self._first_token_at - self._arrived_at,
            total=now - self._arrived_at,
        )
        self._end(Finished(self.request_id, ends, self._usage, timings))

    def _end(self, end: Finished | Failed | None = None) -> bool:
        """The one way into the end. True for the first caller alone, whose end it is."""
        if self.is_ended:
            return False
        self.is_ended = True
        self.end = end
        if self._timer is not None:
            self._timer.cancel()
        self._on_end(self)
        if end is not None:
            self._outbox.put(end)
        return True

    def _finish_in_engine(self, reason: FinishReason, choice: _Choice | None = None) -> None:
        """Tell the engine to end a choice at the last token that counts, or all where they stand."""
        if self.engine_id is None:
            return
        if choice is None:
            self._send(Finish(self.engine_id, reason))
        elif not choice.is_confirmed:
            self._send(Finish(self.engine_id, reason, choice.index, choice.offset))

    def _allowed(self) -> int | None:
        """How far each choice may have generated: by the client's credit, and by what is unread."""
        bounds = [] if self._credit is None else [self._credit]
        if self._unread is not None:
            running = [choice.delivered for choice in self._choices if choice.end is None]
            bounds.append(min(running, default=0) + self._unread)
        return min(bounds, default=None)

    def _raise_limit(self, by_at_least: int) -> None:
        if self.engine_id is None or self.is_ended or self._limit is None:
            return
        allowed = self._allowed()
        if allowed is None or allowed <= self._limit:
            return
        if allowed >= self._limit + by_at_least or allowed == self._credit:
            self._limit = allowed
            self._send(Limit(self.engine_id, allowed))


def _end_of_given(request: Request, stream: TextStream, eos_token_ids: list[int]) -> FinishReason | None:
    """The end that output which came with a request has reached already, if any."""
    params, given = request.params, request.output_token_ids
    if stream.stop is not None:
        return FinishReason.STOP_STRING
    stop_token_ids = [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]
    if given[-1] in stop_token_ids and len(given) > params.min_tokens:
        return FinishReason.STOP_TOKEN
    if params.max_tokens is not None and len(given) >= params.max_tokens:
        return FinishReason.MAX_TOKENS
    return None
