"""A session: many requests of one client, whichever stream carries them at the moment.

Here are its commands and what it remembers of its requests until they are acknowledged. A request's
failure is an event; what ends the stream itself is raised.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable

from tidegate.engine.request import Violation
from tidegate.service import convert, events
from tidegate.service.credit import Pool
from tidegate.service.delivery import Delivery
from tidegate.service.errors import Failure
from tidegate.service.events import CommandRejected, Failed
from tidegate.service.generation import Generation
from tidegate.service.hub import Hub
from tidegate.service.identity import caller
from tidegate.service.intake import BAD_REQUEST_ID, MAX_REQUEST_ID_CHARS, Intake, digest
from tidegate.service.leases import Origin
from tidegate.service.session_limits import SessionLimits
from tidegate.v1 import control_pb2, session_pb2
from tidegate.v1.session_pb2 import SessionRequest, SessionResponse

UNREAD_REFUSALS = 1000
"""Refusals that may wait for a client that does not read; then no more of its commands are read."""

ResumePoints = dict[str, dict[int, int]]
"""The next output offset that a client wants, by request id and choice."""


class Session:
    """The state of one session. At most one stream listens to it."""

    def __init__(self, token: str, hub: Hub, intake: Intake, limits: SessionLimits) -> None:
        self.token = token
        self.tenant = caller().tenant
        self.delivery: Delivery | None = None
        """Of the stream that carries it."""
        self.opened_at = time.time_ns()
        """Nanoseconds since the epoch."""
        self.heard_at = time.monotonic()
        """When the client last said something."""
        self.is_closing = False
        """No commands come any more on this stream: it ends with its last request."""
        self._hub = hub
        self._intake = intake
        self._limits = limits
        self._pool = Pool(limits.unacked_log_bytes)
        self._requests: dict[str, Generation] = {}
        """All whose end was not acknowledged."""
        self._refused: dict[str, Failed] = {}
        """Requests that never came to be, likewise; the oldest first, and not more than a client can owe."""
        self._open: set[str] = set()
        """Ids whose end the present stream was not given."""
        self._points: ResumePoints = {}
        self._num_rejections = 0
        """Answers, other than ends of requests, that were not written yet."""
        self._was_written = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # Streams.

    def attach(self, points: ResumePoints) -> Delivery:
        """Tell a new stream everything that the client does not hold; the one before is cut off."""
        if self.delivery is not None:
            self.delivery.cut(Failure("SESSION_SUPERSEDED", "another stream has taken the session over"))
        delivery = self.delivery = Delivery()
        self.is_closing = False
        self._pool.is_lifted = False
        self._points = points
        self._num_rejections = 0
        self._was_written.set()
        for failed in self._refused.values():
            delivery.put(failed)
        for request_id, generation in self._requests.items():
            generation.listen(delivery, points.get(request_id))
        self._open = {*self._requests, *self._refused}
        return delivery

    def commands_ended(self) -> None:
        """The client has closed its half of the stream. It cannot acknowledge anything any more."""
        self.is_closing = True
        self._pool.lift()

    def detach(self) -> None:
        """The stream is gone: requests go on as far as they may, and what they say is kept."""
        self.delivery = None
        for generation in self._requests.values():
            generation.listen(None)

    def end(self) -> None:
        """Nobody will take it up again: what still runs is cancelled, what has finished can be asked for."""
        for task in self._tasks:
            task.cancel()
        for generation in list(self._requests.values()):
            generation.abandon()
            generation.join(None, None, None)
        self._requests.clear()

    def state(self) -> control_pb2.SessionState:
        """For those who look from outside."""
        state = control_pb2.SessionState(
            connected=self.delivery is not None,
            unacked_requests=len(self._requests) + len(self._refused),
            running_requests=sum(not generation.is_ended for generation in self._requests.values()),
            unacked_log_bytes=self._pool.used,
            waiting_chars=0 if self.delivery is None else self.delivery.waiting_chars,
        )
        state.opened_at.FromNanoseconds(self.opened_at)
        return state

    @property
    def is_idle(self) -> bool:
        return not self._open

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be said on this stream."""
        return self.is_closing and not self._open and not self._num_rejections

    @property
    def is_over(self) -> bool:
        """Whether the client has closed it, and holds everything."""
        return self.is_done and not self._requests and not self._refused

    @property
    def is_behind(self) -> bool:
        """Whether so much waits for the client that no more of its commands should be read."""
        most = self._limits.requests_per_session + UNREAD_REFUSALS
        return self._num_rejections >= UNREAD_REFUSALS or len(self._open) >= most

    async def caught_up(self) -> None:
        while self.is_behind:
            self._was_written.clear()
            await self._was_written.wait()

    # Commands.

    def obey(self, request: SessionRequest) -> None:
        """Raises ``Failure`` where the protocol is broken."""
        command = request.WhichOneof("command")
        if self.is_closing and command not in ("credit", "ack", "cancel", "commands"):
            raise Failure("SESSION_CLOSED", "behind Close nothing but Credit, Ack and Cancel may come")
        match command:
            case "credit":
                self._credit(request.credit)
            case "ack":
                self._ack(request.ack)
            case "start":
                start = request.start
                self._begin("start", start, digest(start))
            case "append_turn":
                self._append(request.append_turn)
            case "fork":
                self._fork(request.fork)
            case "update":
                self._update(request.update)
            case "cancel":
                if generation := self._requests.get(request.cancel.request_id):
                    generation.cancel()
            case "commands":
                self._obey_all(request.commands)
            case "close":
                self.is_closing = True
            case "open":
                raise Failure("ALREADY_OPEN", "the session is open already")
            case _:
                raise Failure("UNKNOWN_COMMAND", "a message holds no command that this server knows")

    def _obey_all(self, commands: session_pb2.Commands) -> None:
        for command in commands.commands:
            if command.HasField("ack"):  # as a rule
                self._ack(command.ack)
            elif command.HasField("commands"):
                raise Failure("UNKNOWN_COMMAND", "a list of commands holds another one")
            else:
                self.obey(command)

    def _credit(self, credit: session_pb2.Credit) -> None:
        if not credit.request_id:
            self._pool.grant(credit.upto)
        elif generation := self._requests.get(credit.request_id):
            generation.grant(credit.upto)

    def _ack(self, ack: session_pb2.Ack) -> None:
        request_id = ack.request_id
        generation = self._requests.get(request_id)
        if generation is not None:
            generation.ack(ack.choice, ack.upto)
        if ack.end and request_id not in self._open:
            self._refused.pop(request_id, None)
            if generation is not None:
                self._hub.forget(generation)

    def _append(self, append: session_pb2.AppendTurn) -> None:
        start = session_pb2.Start(
            request_id=append.request_id,
            prompt=append.input,
            sampling=append.sampling,
            priority=append.priority,
            return_prompt_token_ids=append.return_prompt_token_ids,
        )
        _copy_optional(append, start)
        try:
            parent = self._hub.parent(self.tenant, append.parent_request_id)
            if isinstance(parent, Generation):
                raise Failure("PARENT_RUNNING", "the parent still runs; wait for its end, or fork it")
            if append.input.WhichOneof("content") is None:
                raise Failure.invalid([Violation("input", "must hold text, token_ids or chat")])
        except Failure as failure:
            self._begin("append_turn", start, digest(append), refusal=failure)
            return
        self._begin("append_turn", start, digest(append), Origin(parent, append.parent_choice, None))

    def _fork(self, fork: session_pb2.Fork) -> None:
        origin = refusal = None
        try:
            parent = self._hub.parent(self.tenant, fork.parent_request_id)
            at_offset = fork.at_offset if fork.HasField("at_offset") else None
            origin = Origin(parent, fork.parent_choice, at_offset)
        except Failure as failure:
            refusal = failure
        stem = session_pb2.Fork()
        stem.CopyFrom(fork)
        stem.ClearField("branches")
        for branch in fork.branches:
            start = session_pb2.Start(
                request_id=branch.request_id,
                prompt=branch.input,
                sampling=branch.sampling,
                priority=branch.priority,
                return_prompt_token_ids=branch.return_prompt_token_ids,
            )
            _copy_optional(branch, start)
            self._begin("fork", start, digest(stem, branch), origin, refusal)

    def _begin(
        self,
        command: str,
        start: session_pb2.Start,
        content: bytes,
        origin: Origin | None = None,
        refusal: Failure | None = None,
    ) -> None:
        """Start a request, or attach to the one that has this id and this content.

        ``refusal``: why it cannot be started, if it is not one that there is already.
        """
        request_id = start.request_id
        if len(request_id) > MAX_REQUEST_ID_CHARS:
            # A RequestError would be kept, with an id of any size, until it is acknowledged.
            self._reject(request_id, command, Failure.invalid([BAD_REQUEST_ID]))
            return
        other = self._hub.known(self.tenant, request_id)
        is_same = other is not None and bool(other.digest) and other.digest == content
        if request_id in self._open:
            if not is_same or self._requests.get(request_id) is not other:
                # A RequestError would read as the end of the request that has this id.
                in_use = Failure("REQUEST_ID_IN_USE", "another request has this id")
                self._reject(request_id, command, in_use)
            return
        if other is not None and is_same:
            self._take_over(other)
            return
        try:
            if refusal is not None and other is None:
                raise refusal
            if len(self._open) >= self._limits.requests_per_session:
                raise Failure("SESSION_FULL", "the session has too many requests under way")
            credit = start.credit
            if not start.HasField("credit"):
                credit = self._limits.default_credit + len(start.generated_token_ids)
            generation = self._intake.open(request_id, start, credit=credit, unread=None, digest=content)
        except Failure as failure:
            self._refuse(request_id, failure)
            return
        self._hold(generation)
        generation.join(self, self.delivery, self._pool)
        self._spawn(self._intake.submit(generation, start, origin))

    def _take_over(self, generation: Generation) -> None:
        generation.join(self, None, self._pool)
        self._hold(generation)
        generation.listen(self.delivery, self._points.get(generation.request_id))

    def _hold(self, generation: Generation) -> None:
        request_id = generation.request_id
        self._refused.pop(request_id, None)
        failed = self._requests.pop(request_id, None)
        if failed is not None and failed is not generation:
            failed.forget()
        self._requests[request_id] = generation
        self._open.add(request_id)

    def _refuse(self, request_id: str, failure: Failure) -> None:
        """Refuse to start a request. Its id is taken until the client is told, or it would end twice."""
        failed = self._refused[request_id] = Failed(request_id, failure)
        if len(self._refused) > 2 * UNREAD_REFUSALS:
            for oldest in self._refused:
                if oldest not in self._open:
                    del self._refused[oldest]
                    break
        self._open.add(request_id)
        self._put(failed)

    def _update(self, update: session_pb2.Update) -> None:
        generation = self._requests.get(update.request_id)

        async def change() -> None:
            try:
                if generation is None or generation.is_ended:
                    raise Failure("REQUEST_GONE", "no request with this id is under way in this session")
                await self._intake.update(generation, update)
            except Failure as failure:
                self._reject(update.request_id, "update", failure)

        self._spawn(change())

    def _reject(self, request_id: str, command: str, failure: Failure) -> None:
        self._num_rejections += 1
        self._put(CommandRejected(request_id[:MAX_REQUEST_ID_CHARS], command, failure))

    # Events.

    def lost(self, generation: Generation) -> None:
        """Another has the request now, or it was acknowledged, or forgotten."""
        request_id = generation.request_id
        if self._requests.get(request_id) is not generation:
            return
        del self._requests[request_id]
        if request_id in self._open:
            self._put(Failed(request_id, Failure("REQUEST_MOVED", "another session has the request now")))

    def response(self, event: events.Event) -> SessionResponse:
        match event:
            case list():
                response = SessionResponse()
                convert.fill_batch(response.batch, event)
                return response
            case events.Admitted():
                return SessionResponse(admitted=convert.admitted(event))
            case events.PromptLogprobs():
                return SessionResponse(prompt_logprobs=convert.prompt_logprobs(event))
            case events.Progress():
                return SessionResponse(progress=convert.progress(event))
            case events.Finished():
                return SessionResponse(finished=convert.finished(event))
            case events.Failed():
                error = session_pb2.RequestError(request_id=event.request_id, status=event.failure.status())
                return SessionResponse(request_error=error)
            case events.CommandRejected():
                rejected = session_pb2.CommandRejected(
                    request_id=event.request_id, command=event.command, status=event.failure.status()
                )
                return SessionResponse(command_rejected=rejected)
            case events.GoAway():
                return SessionResponse(go_away=session_pb2.GoAway(grace=convert.duration(event.grace)))
            case events.Heartbeat():
                return SessionResponse(load=convert.load(self._hub.stats, self._hub.is_draining))

    def written(self, event: events.Event) -> None:
        """The present stream has given this to the client."""
        if isinstance(event, events.Finished | events.Failed):
            self._open.discard(event.request_id)
        elif isinstance(event, CommandRejected):
            self._num_rejections -= 1
        else:
            return
        self._was_written.set()

    def _put(self, notice: events.Notice) -> None:
        if self.delivery is not None:
            self.delivery.put(notice)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        # The loop itself holds tasks weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _copy_optional(source: session_pb2.AppendTurn | session_pb2.ForkBranch, start: session_pb2.Start) -> None:
    """Fields whose absence means something."""
    if source.HasField("credit"):
        start.credit = source.credit
    if source.HasField("time_limit"):
        start.time_limit.CopyFrom(source.time_limit)
    if source.HasField("lease"):
        start.lease.CopyFrom(source.lease)


def resume_points(points: Iterable[session_pb2.ResumePoint]) -> ResumePoints:
    """As a message gives them."""
    found: ResumePoints = {}
    for point in points:
        found.setdefault(point.request_id, {})[point.choice] = point.next_offset
    return found
