"""The meeting point of all requests and the engine: the one reader of its output, the one writer.

Everything here runs on one asyncio loop and without a pause inside a step's output, so that what one
step gave to a stream reaches its writer together.

What the engine knows, the front knows too, and more: when the engine dies and another one comes, that one
is told every request anew, with the output so far. Meanwhile requests are taken in as ever, and wait.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator

import msgspec

from tidegate.engine import failpoints
from tidegate.engine.client import EngineClient, EngineGone
from tidegate.engine.messages import (
    Command,
    Flush,
    Inspect,
    Limit,
    Pause,
    Profile,
    Release,
    Stats,
    StepOutput,
    Submit,
)
from tidegate.engine.request import FinishReason, Parent, Request, SamplingParams
from tidegate.engine.text import Text
from tidegate.service.admission import Admission, Ticket
from tidegate.service.answers import A, Answers
from tidegate.service.credit import TOKEN_BYTES
from tidegate.service.errors import Failure, log_unexpected
from tidegate.service.events import Finished
from tidegate.service.generation import Generation
from tidegate.service.leases import Lease, Leases
from tidegate.service.observe import Observer
from tidegate.service.quarantine import Quarantine
from tidegate.service.remembered import Remembered

RESTART_SECONDS = 5.0
"""After a drain or an engine lost for good: about the time in which a server is up, here or elsewhere."""


class Hub:
    """Registers requests, passes them to the engine, and takes its output apart."""

    def __init__(
        self,
        engine: EngineClient,
        text: Text,
        admission: Admission,
        *,
        restart: Callable[[EngineGone], Awaitable[None]] | None = None,
        set_serving: Callable[[bool], Awaitable[None]] | None = None,
    ) -> None:
        """``restart`` puts a new engine behind ``engine``, or raises; without it, the engine's end is the
        end. ``set_serving`` is told when there is none, and when there is one again.
        """
        self.info = engine.info
        self.stats = Stats()
        self.admission = admission
        self.is_draining = False
        self.restarts = 0
        """Engines that took the place of one that died."""
        self.observer = Observer()
        """Told of every request; set before the first one comes."""
        self.stopping = asyncio.Event()
        """Set when the server ends the streams that would go on for ever."""
        self._engine = engine
        self._restart = restart
        self._set_serving = set_serving
        self._quarantine = Quarantine()
        self._is_told = True
        """Whether the present engine knows all of ``_submitted``; if not, it soon will."""
        self._text = text
        self._generations: dict[tuple[str, str], Generation] = {}
        """All that are under way, by tenant and request id."""
        self._submitted: dict[str, Generation] = {}
        """Those that the engine knows, by its own ids. What it says of others comes too late."""
        self._remembered = Remembered()
        self.leases = Leases(engine.info, self._send)
        self._tickets: dict[Generation, Ticket] = {}
        """Of all that are under way."""
        self._engine_ids = (f"r{number}" for number in itertools.count())
        self._is_gone = False
        self._is_paused = False
        self._answers = Answers()
        self._idle = asyncio.Event()
        self._idle.set()

    def open(
        self,
        request_id: str,
        tenant: str,
        *,
        num_choices: int,
        credit: int | None,
        unread: int | None,
        time_limit: float | None,
        digest: bytes = b"",
        token_bytes: int = TOKEN_BYTES,
        with_prompt: bool = False,
        lease_seconds: float | None = None,
    ) -> Generation:
        """Register a request whose content is still to come; the arguments are those of ``Generation``.

        Raises ``Failure``: DRAINING, ENGINE_RESTARTING, REQUEST_ID_IN_USE, LEASES_FULL, and those of
        ``Admission.enter``.
        """
        if self._is_gone:
            raise _engine_gone()
        if self.is_draining:
            raise draining()
        if self.known(tenant, request_id) is not None:
            raise Failure("REQUEST_ID_IN_USE", "another request has this id")
        if lease_seconds is not None:
            self.leases.check(tenant)
        ticket = self.admission.enter(tenant)
        generation = Generation(
            request_id,
            tenant,
            num_choices=num_choices,
            credit=credit,
            unread=unread,
            time_limit=time_limit,
            send=self._send,
            on_end=self._ended,
            digest=digest,
            token_bytes=token_bytes,
            with_prompt=with_prompt,
            lease_seconds=lease_seconds,
        )
        self._generations[tenant, request_id] = generation
        self._tickets[generation] = ticket
        self._idle.clear()
        self.observer.on_open(generation)
        return generation

    def submit(
        self,
        generation: Generation,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        output_token_ids: list[int],
        sample_index: int,
        priority: int,
        parent: Parent | None = None,
    ) -> None:
        """Give a registered request its content and pass it to the engine, unless it has ended since.

        Raises ``Failure``: those of ``Admission.weigh``.
        """
        if generation.is_ended:
            return
        num_tokens = len(prompt_token_ids) + len(output_token_ids)
        most = self.info.max_model_len - len(prompt_token_ids)
        max_tokens = most if params.max_tokens is None else min(params.max_tokens, most)
        self.admission.weigh(
            self._tickets[generation],
            queue_tokens=num_tokens,
            quota_tokens=len(prompt_token_ids) + params.n * max_tokens,
            priority=priority,
            time_left=None if generation.deadline is None else generation.deadline - time.monotonic(),
        )
        engine_id = next(self._engine_ids)
        request = Request(
            id=engine_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            sample_index=sample_index,
            tenant=generation.tenant,
            priority=priority,
            deadline=generation.deadline,
            output_token_ids=output_token_ids,
            parent=parent,
            is_leased=generation.lease_seconds is not None,
        )
        generation.prepare(request, self._text, self.admission.waiting - 1, self.info.eos_token_ids)
        if generation.is_ended:
            return
        generation.submitted(engine_id)
        self._submitted[engine_id] = generation
        if self._is_told:
            self._send(Submit(request))

    async def ask(self, question: Inspect | Flush | Profile, kind: type[A]) -> A:
        """The engine's answer. Raises ``Failure`` where the engine is gone before it comes."""

        def send() -> None:
            if self._is_gone or not self._is_told:
                raise _engine_gone()
            self._send(question)

        return await self._answers.get(kind, send)

    def pause(self, is_on: bool) -> None:
        """Let the engine plan no more steps, or go on; so does one that takes its place."""
        self._is_paused = is_on
        self._send(Pause(is_on))

    def find(self, tenant: str, request_id: str) -> Generation | None:
        """The request with this id that is under way."""
        return self._generations.get((tenant, request_id))

    def submitted(self, engine_id: str) -> Generation | None:
        """The request that the engine knows by this id."""
        return self._submitted.get(engine_id)

    def known(self, tenant: str, request_id: str) -> Generation | None:
        """The request with this id: under way, or finished and not forgotten yet."""
        return self.find(tenant, request_id) or self._remembered.find(tenant, request_id)

    def parent(self, tenant: str, request_id: str) -> Generation | Lease:
        """What a request may go on from: a request under way, or the lease of one that has ended.

        Raises ``Failure``: PARENT_GONE.
        """
        found = self.find(tenant, request_id) or self.leases.use(tenant, request_id)
        if found is None:
            raise Failure("PARENT_GONE", "the parent is unknown, or its lease is over")
        return found

    def forget(self, generation: Generation) -> None:
        """The client holds all of an ended request."""
        self._remembered.forget(generation)

    def close(self) -> None:
        """Let go of what would outlive the server's last stream."""
        self._remembered.close()
        self.leases.close()

    def __iter__(self) -> Iterator[Generation]:
        """All requests that are under way."""
        return iter(list(self._generations.values()))

    async def idle(self) -> None:
        """Wait until no request is under way."""
        await self._idle.wait()

    async def run(self) -> None:
        """Read the engine's output until it is gone for good; then every request has ended.

        Raises ``EngineGone``.
        """
        try:
            while True:
                try:
                    await self._read()
                except EngineGone as gone:
                    await self._replace_engine(gone)
        finally:
            self._is_gone = True
            self._answers.fail(_engine_gone())
            for generation in self:
                generation.on_gone(_engine_gone())

    async def _read(self) -> None:
        """Take one engine's output apart until it is gone."""
        if not self._is_told:
            await self._tell_all()
        while True:
            self._apply(await self._engine.receive())
            # An engine that is ahead must not keep the writers from their turn.
            await asyncio.sleep(0)

    async def _replace_engine(self, gone: EngineGone) -> None:
        """Raises ``EngineGone`` where it cannot be."""
        if self._restart is None:
            raise gone
        self._is_told = False
        self._answers.fail(_engine_gone())
        await self._tell_health(False)
        for generation in list(self._submitted.values()):
            generation.on_engine_death()
        for engine_id in self._quarantine.on_death(gone.executing):
            if poison := self._submitted.get(engine_id):
                poison.fail(Failure("POISON_SUSPECTED", "the engine dies of this request"))
        await self._restart(gone)
        self.restarts += 1

    async def _tell_all(self) -> None:
        """Let a new engine go on with every request; first with those that are suspect, one at a time."""
        tried = set()
        for engine_id in self._quarantine.suspects():
            generation = self._submitted.get(engine_id)
            if generation is not None and generation.has_credit:
                tried.add(engine_id)
                await self._try(engine_id, generation)
        self._is_told = True
        if self._is_paused:
            self._send(Pause(True))
        for engine_id, generation in self._submitted.items():
            request = generation.continuation()
            if engine_id not in tried:
                self._send(Submit(request))
            else:
                most = self.info.max_model_len if request.emit_upto is None else request.emit_upto
                self._send(Limit(engine_id, most))
            generation.on_recovered()
        await self._tell_health(True)

    async def _try(self, engine_id: str, generation: Generation) -> None:
        """Run one request alone for one token more, behind which it waits for the others' turns."""
        request = generation.continuation()
        longest = max(map(len, request.running_choices().values()))
        self._send(Submit(msgspec.structs.replace(request, emit_upto=longest + 1)))
        while engine_id in self._submitted and self._quarantine.is_suspect(engine_id):
            self._apply(await self._engine.receive())
            await asyncio.sleep(0)

    async def _tell_health(self, is_serving: bool) -> None:
        if self._set_serving is not None and not self.is_draining:
            await self._set_serving(is_serving)

    def _apply(self, output: StepOutput) -> None:
        for refused in output.refused:
            if generation := self._submitted.get(refused.request_id):
                generation.on_refused(refused)
        for admitted in output.admitted:
            if generation := self._submitted.get(admitted.request_id):
                self.admission.admit(self._tickets[generation])
                generation.on_admitted(admitted)
                self.observer.on_admitted(generation)
        for scored in output.prompt_logprobs:
            if generation := self._submitted.get(scored.request_id):
                generation.on_prompt_logprobs(scored)
        self._apply_deltas(output)
        # Of the stalls of those that are tried alone, nobody needs to hear.
        for progress in output.progress if self._is_told else ():
            if generation := self._submitted.get(progress.request_id):
                self.observer.on_progress(generation, progress.choice, progress.kind)
                generation.on_progress(progress)
        # First all last deltas, then all ends: a writer then sends the deltas of a step as one message.
        ended = [
            (self._submitted[finished.request_id], finished)
            for finished in output.finished
            if finished.request_id in self._submitted
        ]
        for generation, finished in ended:
            generation.on_choice_end(finished)
        for generation, _ in ended:
            generation.finish_if_confirmed()
        self._answers.take(output)
        if output.stats is not None:
            self.stats = output.stats

    def _apply_deltas(self, output: StepOutput) -> None:
        reasons = {
            (finished.request_id, finished.choice): finished.reason
            for finished in output.finished
            if finished.reason is not FinishReason.ERROR
        }
        if self._quarantine:
            for delta in output.deltas:
                self._quarantine.clear(delta.request_id, delta.choice)
        # What follows is done for every token.
        now, submitted = time.monotonic(), self._submitted
        on_tokens = self.observer.on_tokens if self.observer.hears_tokens else None
        may_fail = failpoints.ARMED
        for delta in output.deltas:
            generation = submitted.get(delta.request_id)
            if generation is None:
                continue
            if on_tokens is not None:
                on_tokens(generation, delta.choice, now)
            try:
                if may_fail:
                    failpoints.reach("output", delta.token_ids)
                reason = reasons.get((delta.request_id, delta.choice)) if reasons else None
                generation.on_delta(delta, reason, now)
            except Exception as error:  # noqa: BLE001  one request's text must not end the others
                log_unexpected("output of a request failed", error, request_id=generation.request_id)
                generation.fail(Failure.internal())

    def _send(self, command: Command) -> None:
        try:
            self._engine.send((command,))
        except EngineGone:
            # The reader meets the same end, and there every request is told.
            return

    def _ended(self, generation: Generation) -> None:
        del self._generations[generation.tenant, generation.request_id]
        self.admission.end(self._tickets.pop(generation))
        self.observer.on_end(generation)
        if generation.engine_id is not None:
            del self._submitted[generation.engine_id]
            self._quarantine.forget(generation.engine_id)
        if isinstance(generation.end, Finished):
            self.leases.keep(generation)
            generation.shed()
            if generation.digest:
                self._remembered.add(generation)
        elif generation.engine_id is not None and generation.lease_seconds is not None:
            self._send(Release([generation.engine_id]))
        if not self._generations:
            self._idle.set()


def draining() -> Failure:
    return Failure("DRAINING", "the server is about to stop", retry_after=RESTART_SECONDS)


def _engine_gone() -> Failure:
    return Failure("ENGINE_RESTARTING", "the engine has ended", retry_after=RESTART_SECONDS)
