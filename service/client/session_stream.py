"""One request of a session, whichever connection and whichever server carries it at the moment."""

import asyncio
import dataclasses
import math
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import grpc

from tidegate.service.client import messages
from tidegate.service.client.errors import ServerFault, TidegateError, Unavailable
from tidegate.service.client.messages import (
    Admitted,
    Chunk,
    Event,
    Finished,
    PositionLogprobs,
    PromptLogprobs,
)
from tidegate.service.client.retry import Attempts
from tidegate.service.client.stream import Stream
from tidegate.v1 import prompt_pb2, session_pb2

MAX_REQUEST_ID_CHARS = 256
TOKEN_BYTES = 4
POSITION_BYTES = 48
LOGPROB_BYTES = 18
"""What the server's log of a token takes, about; with logprobs, beside it a position and each alternative."""

Command = session_pb2.Start | session_pb2.AppendTurn | session_pb2.ForkBranch


class Carrier(Protocol):
    """The session of a stream."""

    def send(self, *commands: session_pb2.SessionRequest) -> None: ...

    def cancel(self, stream: "SessionStream") -> None: ...


@dataclasses.dataclass(slots=True)
class _Held:
    """What has arrived of one choice."""

    token_ids: list[int]
    acked: int
    chars: int = 0
    """Of its text."""
    chars_here: int = 0
    """Of its text, how far the present server has got in saying it."""
    ended: bool = False


class SessionStream(Stream):
    """One request of a session.

    Credit is how far the server may generate ahead of the reader. By default it is topped up as chunks
    are read, so a reader that pauses pauses its request, and only that one.
    """

    def __init__(
        self,
        session: Carrier,
        command: Command,
        fork: session_pb2.Fork | None,
        window: int | None,
        attempts: Attempts,
    ) -> None:
        """``command`` starts it; ``fork`` holds what a ``ForkBranch`` branches off. ``window``: tokens to
        keep granted ahead of the reader; None: only by ``grant``.
        """
        super().__init__(command.request_id)
        self.wire_id = command.request_id
        """What the present server calls it."""
        self.update: session_pb2.Update | None = None
        """The last one, as sent."""
        self.is_cancelled = False
        self.attempts = attempts
        self._session = session
        self._command = command
        self._fork = fork
        self._was_started = False
        self._window = window
        self._granted = command.credit
        given = list(command.generated_token_ids) if isinstance(command, session_pb2.Start) else []
        self._num_given = len(given)
        self._held = [_Held(list(given), len(given)) for _ in range(max(1, command.sampling.n))]
        self._generated_elsewhere = 0
        """Of those tokens, those that the present server was given."""
        self._arrived: deque[Event] = deque()
        self._error: TidegateError | None = None
        self._ended = False
        self._wakeup = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the server, or the loss of the session, ended the request."""
        return self._ended

    @property
    def has_tokens(self) -> bool:
        return any(len(held.token_ids) > self._num_given for held in self._held)

    def cancel(self) -> None:
        if not self._ended:
            self._session.cancel(self)

    def grant(self, upto: int) -> None:
        """Let each choice generate up to output offset ``upto``. A smaller value than before does nothing."""
        if upto > self._granted and not self._ended:
            self._granted = upto
            credit = session_pb2.Credit(request_id=self.wire_id, upto=upto)
            self._session.send(session_pb2.SessionRequest(credit=credit))

    # For the session.

    def starting(self) -> session_pb2.SessionRequest:
        """The command that starts the request, as it must be by now."""
        command = self._command
        command.credit = self._granted
        remaining = self.attempts.remaining
        if remaining is not None and self._was_started:
            command.time_limit.CopyFrom(messages.duration(remaining))
        self._was_started = True
        match command:
            case session_pb2.Start():
                return session_pb2.SessionRequest(start=command)
            case session_pb2.AppendTurn():
                return session_pb2.SessionRequest(append_turn=command)
            case _:
                fork = session_pb2.Fork(branches=[command])
                if self._fork is not None:
                    fork.MergeFrom(self._fork)
                return session_pb2.SessionRequest(fork=fork)

    def crediting(self) -> session_pb2.SessionRequest:
        """The credit so far, for a server that has the request already."""
        credit = session_pb2.Credit(request_id=self.wire_id, upto=self._granted)
        return session_pb2.SessionRequest(credit=credit)

    def reack(self) -> Iterator[session_pb2.SessionRequest]:
        """All that is held, for a server that may have heard nothing of it."""
        for held in self._held:
            held.acked = min(held.acked, self._num_given)
        return self.acks()

    def resume_points(self) -> Iterator[session_pb2.ResumePoint]:
        for choice, held in enumerate(self._held):
            yield session_pb2.ResumePoint(
                request_id=self.wire_id, choice=choice, next_offset=len(held.token_ids)
            )

    def move(self, is_same: bool) -> None:
        """Go on at another server, from what is held. ``is_same``: it gives the same tokens.

        Raises ``Unavailable`` where that cannot be.
        """
        if not is_same and self.has_tokens:
            raise Unavailable(
                "the request cannot go on elsewhere: the other server's model or configuration differs",
                code=grpc.StatusCode.UNAVAILABLE,
            )
        start = session_pb2.Start()
        command = self._command
        if isinstance(command, session_pb2.Start):
            start.CopyFrom(command)
        elif self.admitted is None:
            raise Unavailable(
                "the request cannot go on elsewhere: its parent was on the server that is gone",
                code=grpc.StatusCode.UNAVAILABLE,
            )
        else:
            ids = prompt_pb2.TokenIds(ids=self.admitted.prompt_token_ids)
            start.prompt.CopyFrom(prompt_pb2.Prompt(token_ids=ids))
            start.sampling.CopyFrom(command.sampling)
            start.priority = command.priority
            if command.HasField("lease"):
                start.lease.CopyFrom(command.lease)
        if self.admitted is not None:
            start.sampling.seed = self.admitted.seed
        if self.has_tokens:
            # They came before the first of them.
            start.sampling.ClearField("prompt_logprobs")
        if len(self._held) == 1:
            del start.generated_token_ids[:]
            start.generated_token_ids.extend(self._held[0].token_ids)
            self._generated_elsewhere = len(self._held[0].token_ids) - self._num_given
            self._held[0].acked = len(self._held[0].token_ids)
        else:
            # Each is made again from its beginning, and the same: what is held is skipped as it comes.
            for held in self._held:
                held.acked, held.chars_here = 0, 0
        # A name of its own: a server that lost the session may still know the request by the old one.
        suffix = f".{uuid.uuid4().hex[:8]}"
        self.wire_id = start.request_id = self.request_id[: MAX_REQUEST_ID_CHARS - len(suffix)] + suffix
        self._command, self._fork = start, None

    def arrive(self, event: Event) -> int:
        """Take an event; returns the bytes of the server's log that it stands for."""
        if self._ended:
            return 0
        size = 0
        if isinstance(event, Chunk):
            size = self._size(event)
            rest = self._beyond(event)
            if rest is None:
                return size
            event = rest
        elif isinstance(event, PromptLogprobs):
            size = self._logprobs_size(event.positions)
            unheard = self._unheard(event)
            if unheard is None:
                return size
            event = unheard
        elif isinstance(event, Admitted):
            if self.admitted is not None:
                return 0  # said again to another connection, or by another server
        elif isinstance(event, Finished):
            usage = event.usage
            usage = dataclasses.replace(usage, output_tokens=usage.output_tokens + self._generated_elsewhere)
            event = dataclasses.replace(event, usage=usage)
            self._ended = True
        self._note(event)
        self._arrived.append(event)
        self._wakeup.set()
        return size

    def acks(self) -> Iterator[session_pb2.SessionRequest]:
        """What has arrived since the last time, as commands."""
        for choice, held in enumerate(self._held):
            if held.acked < len(held.token_ids):
                held.acked = len(held.token_ids)
                ack = session_pb2.Ack(request_id=self.wire_id, choice=choice, upto=held.acked)
                yield session_pb2.SessionRequest(ack=ack)

    def delay_before_retry(self, error: TidegateError) -> float:
        """Seconds; raises ``error`` where it is final."""
        if self.has_tokens:
            raise error
        return self.attempts.delay(error)

    def fail(self, error: TidegateError) -> None:
        if not self._ended:
            self._error = error
            self._ended = True
            self._wakeup.set()

    # Inside.

    async def _next_event(self) -> Event:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wakeup.clear()
            await self._wakeup.wait()
        event = self._arrived.popleft()
        if isinstance(event, Chunk):
            self._consumed(event)
        return event

    def _consumed(self, chunk: Chunk) -> None:
        if self._window is None or chunk.finish_reason is not None:
            return
        upto = chunk.offset + len(chunk.token_ids) + self._window
        update = self.update
        limit = self._command.sampling.max_tokens or math.inf
        if update is not None and update.HasField("max_tokens"):
            limit = update.max_tokens
        # Half a window at a time: one small message for many tokens.
        if upto - self._granted >= self._window / 2 and self._granted < limit:
            self.grant(upto)

    def _beyond(self, chunk: Chunk) -> Chunk | None:
        """What of a chunk is not held yet; None where nothing is."""
        held = self._held[chunk.choice]
        skip = len(held.token_ids) - chunk.offset
        if skip < 0:
            self.fail(ServerFault("the server left out tokens", code=grpc.StatusCode.INTERNAL))
            return None
        if held.ended:
            return None
        unseen = max(0, held.chars - held.chars_here)
        held.chars_here += len(chunk.text)
        held.chars = max(held.chars, held.chars_here)
        held.token_ids += chunk.token_ids[skip:]
        held.ended = chunk.finish_reason is not None
        if not skip and not unseen:
            return chunk
        rest = dataclasses.replace(
            chunk,
            offset=chunk.offset + min(skip, len(chunk.token_ids)),
            token_ids=chunk.token_ids[skip:],
            logprobs=chunk.logprobs[skip:],
            text=chunk.text[unseen:],
        )
        return rest if rest.token_ids or rest.text or held.ended else None

    @classmethod
    def _size(cls, chunk: Chunk) -> int:
        return TOKEN_BYTES * len(chunk.token_ids) + cls._logprobs_size(chunk.logprobs)

    @staticmethod
    def _logprobs_size(positions: Sequence[PositionLogprobs]) -> int:
        alternatives = sum(1 + len(position.top) for position in positions)
        return POSITION_BYTES * len(positions) + LOGPROB_BYTES * alternatives
