"""One request from its arrival to its terminal event: what becomes of it, and who decides.

The first transition wins: whatever ends a choice first (the engine, a stop string, a cancel, the time
limit) decides its reason, and tokens that come later are dropped and not counted.

What it has to say is taken from its ``Output`` by the stream that listens, if there is one. Behind its end
it can still be asked for, until its client has acknowledged it.
"""

import asyncio
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec.structs import replace

from tidegate.engine import messages
from tidegate.engine.messages import Command, Finish, Update
from tidegate.engine.request import FinishReason, Request, SamplingParams, Violation
from tidegate.engine.text import Text
from tidegate.engine.text_stream import TextStream
from tidegate.service.allowance import Allowance
from tidegate.service.choice import Choice
from tidegate.service.credit import TOKEN_BYTES, Pool
from tidegate.service.delivery import Delivery
from tidegate.service.errors import Failure
from tidegate.service.events import Admitted, ChoiceEnd, Failed, Finished, Timings, Usage
from tidegate.service.output import Output


class Keeper(Protocol):
    """The session that a request belongs to."""

    def lost(self, generation: "Generation") -> None:
        """Another session or RPC has the request now, or nobody remembers it any more."""


class Generation:
    """A request that ends in exactly one ``Finished`` or ``Failed``.

    Unless its client left: ``abandon`` ends it without a word.
    """

    __slots__ = (
        "_admitted_at",
        "_allowance",
        "_arrived_at",
        "_content_is_known",
        "_first_token_at",
        "_num_choices",
        "_on_end",
        "_output",
        "_queue_position",
        "_request",
        "_send",
        "_timer",
        "_usage",
        "_with_prompt",
        "conversation",
        "deadline",
        "digest",
        "end",
        "engine_id",
        "is_admitted",
        "is_ended",
        "keeper",
        "lease_seconds",
        "request_id",
        "tenant",
    )
    # Ten thousand of them may be open.

    def __init__(
        self,
        request_id: str,
        tenant: str,
        *,
        num_choices: int,
        credit: int | None,
        unread: int | None,
        time_limit: float | None,
        send: Callable[[Command], None],
        on_end: Callable[["Generation"], None],
        digest: bytes = b"",
        token_bytes: int = TOKEN_BYTES,
        with_prompt: bool = False,
        lease_seconds: float | None = None,
    ) -> None:
        """``credit``, ``unread``, ``token_bytes``: see ``Allowance``. ``time_limit`` in seconds from now.
        ``digest`` stands for the content, where another request with this id may ask for the same.
        ``with_prompt``: the client wants to be told its prompt's tokens. ``lease_seconds``: how long it can
        be continued behind its end.
        """
        self.request_id = request_id
        self.tenant = tenant
        self.digest = digest
        self.lease_seconds = lease_seconds
        self.engine_id: str | None = None
        """The engine's name for it, once it was submitted."""
        self.conversation: list[Mapping[str, str]] | None = None
        """The chat that its prompt was rendered from, where it may be continued."""
        self.is_admitted = False
        self.is_ended = False
        self.end: Finished | Failed | None = None
        """The terminal event. None behind the end, where nobody is to be told."""
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self.keeper: Keeper | None = None
        self._num_choices = num_choices
        self._output = Output(request_id)
        self._allowance = Allowance(credit=credit, unread=unread, token_bytes=token_bytes, send=send)
        self._with_prompt = with_prompt
        self._send = send
        self._on_end = on_end
        self._request: Request | None = None
        self._queue_position = 0
        self._usage = Usage()
        self._arrived_at = time.monotonic()
        self._admitted_at: float | None = None
        self._first_token_at: float | None = None
        self._content_is_known: asyncio.Event | None = None
        """Made for the first one who waits for it."""
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
        choices = self._output.choices = [
            Choice(self.request_id, index, text, request.params, given) for index in range(self._num_choices)
        ]
        if self._content_is_known is not None:
            self._content_is_known.set()
        request.emit_upto = self._allowance.begin(choices, len(given), request.params.max_tokens)
        if given:
            reason = _end_of_given(request, choices[0].stream, eos_token_ids)
            if reason is not None:
                self._stop(reason)

    def submitted(self, engine_id: str) -> None:
        """The engine is told of it, under this name."""
        self.engine_id = engine_id
        self._allowance.submitted(engine_id)

    async def has_content(self) -> None:
        """Wait until its prompt has been read, or it has ended before."""
        if self._request is None and not self.is_ended:
            if self._content_is_known is None:
                self._content_is_known = asyncio.Event()
            await self._content_is_known.wait()

    def grant(self, upto: int) -> None:
        """Credit from the client: absolute, the larger wins."""
        self._allowance.grant(upto)

    def delivered(self, choice_index: int, upto: int) -> None:
        """Output tokens of a choice before this offset were written to the client's stream."""
        choice = self._output.choices[choice_index]
        choice.delivered = max(choice.delivered, upto)
        if upto > choice.num_given:
            self._forget_prompt_logprobs()
        self._allowance.delivered(choice)

    def ack(self, choice_index: int, upto: int) -> None:
        """The client holds the output tokens of a choice before this offset."""
        choices = self._output.choices
        if choice_index < len(choices) and (newly := choices[choice_index].ack(upto)):
            self._allowance.acknowledged(newly)
            self._forget_prompt_logprobs()

    @property
    def params(self) -> SamplingParams | None:
        """None until the content is known."""
        return None if self._request is None else self._request.params

    def update(self, max_tokens: int | None, stops: tuple[tuple[str, ...], tuple[int, ...]] | None) -> None:
        """Raise the limit of a running request, and replace its stop strings and its stop token ids.

        Raises ``InvalidRequest`` where they are out of range, and then changes nothing.
        """
        if self._request is None or self.engine_id is None:
            return
        changes: dict[str, object] = {} if max_tokens is None else {"max_tokens": max_tokens}
        if stops is not None:
            changes["stop"], changes["stop_token_ids"] = stops
        self._request.params = replace(self._request.params, **changes)
        self._send(Update(self.engine_id, max_tokens, None if stops is None else stops[1]))
        self._allowance.max_tokens = self._request.params.max_tokens
        self._allowance.ask()
        if stops is not None:
            for choice in self._output.choices:
                if choice.end is None:
                    choice.change_stops(stops[0])
            self._output.mark()

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
        self._break_off()

    def fail(self, failure: Failure) -> None:
        self._break_off(Failed(self.request_id, failure))

    # When the engine dies and another one comes.

    def on_engine_death(self) -> None:
        """Nobody will confirm any more what was decided."""
        choices = self._output.choices
        for choice in choices:
            choice.is_confirmed = choice.end is not None
        if choices:
            self.finish_if_confirmed()

    @property
    def has_credit(self) -> bool:
        """Whether every choice that runs may generate."""
        return self._allowance.has_credit

    def continuation(self) -> Request:
        """What another engine is told of a request that was submitted, to go on behind what there is."""
        if self._request is None:
            raise RuntimeError("the content of the request is not known yet")
        running = {
            choice.index: list(choice.token_ids) for choice in self._output.choices if choice.end is None
        }
        return replace(
            self._request,
            emit_upto=self._allowance.renew(),
            choices=running,
            num_scored=self._output.prompt.num_known,
        )

    def on_recovered(self) -> None:
        """Another engine goes on with it."""
        if self.is_admitted:
            for choice in self._output.choices:
                if choice.end is None:
                    self._output.note(choice, messages.ProgressKind.RECOVERED)

    # Who continues it.

    @property
    def prompt_token_ids(self) -> list[int]:
        return [] if self._request is None else self._request.prompt_token_ids

    @property
    def outputs(self) -> list["array[int]"]:
        """The output tokens so far, of each choice."""
        return [choice.token_ids for choice in self._output.choices]

    @property
    def log_bytes(self) -> int:
        """What the logs of the prompt and of all choices take."""
        return self._output.prompt.size + sum(choice.log_bytes for choice in self._output.choices)

    @property
    def is_being_told(self) -> bool:
        """Whether a stream still waits for its end."""
        return self._output.is_being_told

    def shed(self) -> None:
        """It has ended: let go of what only an engine, or those that continue it, would want to know."""
        self.conversation = None
        if self._request is not None:
            self._request = replace(self._request, prompt_token_ids=[], output_token_ids=[])

    # Who listens.

    def join(self, keeper: Keeper | None, delivery: Delivery | None, pool: Pool | None) -> None:
        """Belong to this session or RPC from now on; whoever had the request before loses it."""
        before, self.keeper = self.keeper, keeper
        if before is not None and before is not keeper:
            before.lost(self)
        self._allowance.join(pool)
        self._output.set_listener(delivery)

    def listen(self, delivery: Delivery | None, next_offsets: Mapping[int, int] | None = None) -> None:
        """Tell this stream everything from these output offsets on, by choice; of others, from the last
        ``Ack`` on. None: nobody listens, and what comes is kept.
        """
        self._output.listen(delivery, next_offsets or {})

    def forget(self) -> None:
        """The client holds all of it, or will not ask any more."""
        self._allowance.join(None)
        self._output.set_listener(None)
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            keeper.lost(self)

    # From the engine.

    def on_gone(self, failure: Failure) -> None:
        """The engine is gone. What was decided stands; what still ran fails."""
        choices = self._output.choices
        if choices and all(choice.end is not None for choice in choices):
            self._finish()
        else:
            self._end(Failed(self.request_id, failure))

    def on_refused(self, refused: messages.Refused) -> None:
        self._end(Failed(self.request_id, Failure.invalid([_in_message(v) for v in refused.violations])))

    def on_admitted(self, admitted: messages.Admitted) -> None:
        if self._request is None or self.is_admitted:
            return
        self.is_admitted = True
        self._admitted_at = time.monotonic()
        self._usage.cached_tokens = admitted.cached_device_tokens + admitted.cached_host_tokens
        self._output.admitted(
            Admitted(
                request_id=self.request_id,
                queue_position=self._queue_position,
                cached_device_tokens=admitted.cached_device_tokens,
                cached_host_tokens=admitted.cached_host_tokens,
                seed=self._request.seed,
                prompt_tokens=len(self._request.prompt_token_ids),
                prompt_token_ids=self._request.prompt_token_ids if self._with_prompt else (),
            )
        )

    def on_prompt_logprobs(self, scored: messages.PromptLogprobs) -> None:
        if self.is_ended:
            return
        prompt = self._output.prompt
        if scored.offset != prompt.next_offset:
            self.fail(Failure("TOKENS_OUT_OF_ORDER", "the engine skipped or repeated a token"))
            return
        self._output.push_prompt(scored.positions)
        self._allowance.hold_prompt(prompt.size)

    def on_delta(self, delta: messages.Delta, reason: FinishReason | None, now: float) -> None:
        """``reason``: why the engine ended the choice behind these tokens, where it did so in this step.
        ``now``: when the step arrived.
        """
        choice = self._output.choices[delta.choice]
        if choice.end is not None:
            return
        if delta.offset != len(choice.token_ids):
            self.fail(Failure("TOKENS_OUT_OF_ORDER", "the engine skipped or repeated a token"))
            return
        if self._first_token_at is None:
            self._first_token_at = now
        if self._output.push(choice, delta, reason) is not None:
            reason = FinishReason.STOP_STRING
            self._finish_in_engine(reason, choice)
        if reason is not None:
            self._decide(choice, reason)
        elif len(choice.token_ids) >= self._allowance.raise_at:
            self._allowance.ask()

    def on_progress(self, progress: messages.Progress) -> None:
        choice = self._output.choices[progress.choice]
        if choice.end is None:
            self._output.note(choice, progress.kind)

    def on_choice_end(self, finished: messages.Finished) -> None:
        """The engine ended a choice. The tokens of its last step have been seen."""
        choice = self._output.choices[finished.choice]
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
        if all(choice.is_confirmed for choice in self._output.choices):
            self._finish()

    # Inside.

    def _forget_prompt_logprobs(self) -> None:
        """The client holds output, which comes behind all of them."""
        if self._output.prompt.size:
            self._output.prompt.forget()
            self._allowance.hold_prompt(0)

    def _stop(self, reason: FinishReason) -> None:
        """End all choices that still run, and the request with them, without waiting for the engine.

        The engine may be in the middle of a long step, and past its deadline a client does not listen.
        """
        if self.is_ended:
            return
        for choice in self._output.choices:
            if choice.end is None:
                self._finish_in_engine(reason, choice if self.is_admitted else None)
                self._end_choice(choice, reason)
        self._finish(reason)

    def _end_choice(self, choice: Choice, reason: FinishReason) -> None:
        """End a choice behind its last token, with the text that was held back."""
        if self._output.flush(choice) is not None:
            reason = FinishReason.STOP_STRING
        self._decide(choice, reason)

    def _decide(self, choice: Choice, reason: FinishReason) -> None:
        choice.end = ChoiceEnd(choice.index, reason, len(choice.token_ids))
        if reason is FinishReason.STOP_TOKEN:
            choice.end.stop_token_id = choice.token_ids[-1]
        elif reason is FinishReason.STOP_STRING and choice.stream.stop is not None:
            choice.end.stop_string = choice.stream.stop.stop
        self._allowance.give_back_unused(choice)
        self._output.mark()

    def _finish(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """``reason``: for choices of which nothing is known yet."""
        if self.is_ended:
            return
        ends = [choice.end for choice in self._output.choices if choice.end is not None]
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

    def _break_off(self, end: Failed | None = None) -> None:
        """End it while the engine may still be at it."""
        if not self.is_ended:
            # Before the end gives back a lease: what the engine ends behind that, it would keep for ever.
            self._finish_in_engine(FinishReason.CANCELLED)
            self._end(end)

    def _end(self, end: Finished | Failed | None) -> None:
        """The one way into the end; the first is the one that counts."""
        if self.is_ended:
            return
        self.is_ended = True
        self.end = end
        if self._timer is not None:
            self._timer.cancel()
        self._allowance.close()
        if self._content_is_known is not None:
            self._content_is_known.set()
        self._output.close(end)
        self._on_end(self)

    def _finish_in_engine(self, reason: FinishReason, choice: Choice | None = None) -> None:
        """Tell the engine to end a choice at the last token that counts, or all where they stand."""
        if self.engine_id is None:
            return
        if choice is None:
            self._send(Finish(self.engine_id, reason))
        elif not choice.is_confirmed:
            self._send(Finish(self.engine_id, reason, choice.index, len(choice.token_ids)))


def _in_message(violation: Violation) -> Violation:
    """What the engine says of a request's field, of the message that brought it."""
    root = violation.field.partition(".")[0].partition("[")[0]
    if root in SamplingParams.__struct_fields__:
        return violation.below("sampling")
    if root == "output_token_ids":
        return violation._replace(field="generated_token_ids")
    return violation


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
