"""A real server under clients of every kind: each request ends once, and nothing of it stays behind."""

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import pytest
from served import Served, is_empty, load_when
from wire import Cable, Seen, Session, client_process, connect, generate, generate_unary

from tidegate.v1 import control_pb2, control_pb2_grpc, events_pb2

SEED = 20260731
NUM_WHOLE_SESSIONS, NUM_LEFT_SESSIONS, NUM_CUT_SESSIONS = 400, 50, 50
"""Those that end well, those whose client cancels the stream, and those whose connection is cut."""
NUM_GENERATE, NUM_UNARY = 80, 40
NUM_CHANNELS, NUM_CABLES = 40, 5
NUM_REFERENCES = 20
"""Different undisturbed requests, whose tokens are known from before the storm."""
RUSH = 0.5
"""Seconds within which everything starts."""
STORM_SECONDS = 400.0
"""More, and something hangs; on two idle cores it takes ten."""

SMALL_TIERS = (
    *("demo", "--dtype", "float32", "--block-size", "16", "--park-grace", "0.1"),
    *("--device-kv-tokens", "1280", "--host-kv-tokens", "5120", "--preemption", "swap"),
)
"""Room for a part of what wants to run, so that KV moves between the tiers all the time.

In float32, where the tokens of a request do not depend on what else is in the batch.
"""

LOST = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, asyncio.CancelledError)
"""What a client meets on a stream that it left, or that was cut."""


@dataclass(frozen=True)
class Fate:
    """What happens to a request of a session."""

    ends: Collection[str]
    """Any of them may be its end."""
    act: "Callable[[Session, Seen, grpc.aio.Channel], Awaitable[None]] | None" = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of ``Start``, beside the content."""


async def cancel_midway(session: Session, request: Seen, channel: grpc.aio.Channel) -> None:
    await request.has_tokens(4)
    await session.send(cancel={"request_id": request.id})


async def cancel_at_once(session: Session, request: Seen, channel: grpc.aio.Channel) -> None:
    await session.send(cancel={"request_id": request.id})


async def abort(session: Session, request: Seen, channel: grpc.aio.Channel) -> None:
    """From outside of its session."""
    await request.has_tokens(4)
    control = control_pb2_grpc.ControlServiceStub(channel)
    await control.Abort(control_pb2.AbortRequest(request_id=request.id))


async def grant_late(session: Session, request: Seen, channel: grpc.aio.Channel) -> None:
    """When its KV has left the device."""
    left = {events_pb2.PROGRESS_KIND_PARKED, events_pb2.PROGRESS_KIND_DROPPED}
    await request.until(lambda: not left.isdisjoint(request.progress))
    await session.send(credit={"request_id": request.id, "upto": 10_000})


async def start_twice(session: Session, request: Seen, channel: grpc.aio.Channel) -> None:
    """While the first is certainly under way, having no credit to end: the same again changes nothing, and
    other content is refused.
    """
    await session.start(request)
    await session.start(request, priority=3)
    await session.send(credit={"request_id": request.id, "upto": 10_000})
    await request.has_ended()
    assert session.rejections == ["REQUEST_ID_IN_USE"]


OUT_OF_TIME = {"DEADLINE", "TIME_LIMIT", "WAIT_TOO_LONG", "MAX_TOKENS"}
FATES = {
    "cancelled midway": Fate({"CANCELLED", "MAX_TOKENS"}, cancel_midway),
    "cancelled at once": Fate({"CANCELLED"}, cancel_at_once),
    "aborted": Fate({"CANCELLED", "MAX_TOKENS"}, abort),
    "granted late": Fate({"MAX_TOKENS"}, grant_late, {"credit": 3}),
    "never granted": Fate(
        {"DEADLINE", "TIME_LIMIT", "WAIT_TOO_LONG"}, fields={"credit": 3, "time_limit": {"seconds": 5}}
    ),
    "short of time": Fate(OUT_OF_TIME, fields={"time_limit": {"seconds": 2}}),
    "out of time": Fate(OUT_OF_TIME, fields={"time_limit": {"nanos": 10**7}}),
    "started twice": Fate({"MAX_TOKENS"}, start_twice, {"credit": 1}),
    "invalid": Fate({"INVALID_REQUEST"}, fields={"sampling": {"top_p": 7.0}}),
}
UNDISTURBED = "undisturbed"
# Past its deadline, gRPC's client itself may end an RPC.
SHORT_OF_TIME = {*OUT_OF_TIME, "DEADLINE_EXCEEDED"}
ENDS: dict[str, Collection[str]] = {
    UNDISTURBED: {"STOP_TOKEN", "MAX_TOKENS"},
    "generate left": {"CANCELLED", "MAX_TOKENS"},
    "generate short of time": SHORT_OF_TIME,
    "unary left": {"CANCELLED", "MAX_TOKENS"},
    "unary short of time": SHORT_OF_TIME,
    **{name: fate.ends for name, fate in FATES.items()},
}
"""What may be the end of a request whose stream stays open, by its fate."""


def references() -> list[dict[str, Any]]:
    """Requests of all lengths, half of them greedy and half with a seed, some to the model's own end."""
    said = (
        "Tell me a story about a cat.",
        "My favourite colour is green.",
        "Tell me a story about a baker.",
        "Who has the lantern?",
    )
    found = []
    for index in range(NUM_REFERENCES):
        text = said[index % len(said)]
        chat = {"chat": {"messages": [{"role": "user", "content": [{"text": text}]}]}}
        prompt = {"text": f"{text} " * (1 + index)} if index % 3 == 0 else chat
        sampling = {"temperature": index % 2 * 0.9, "seed": index, "max_tokens": 20 + 2 * index}
        found.append({"prompt": prompt, "sampling": sampling})
    return found


async def outputs_alone(channel: grpc.aio.Channel, contents: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each request, run with nothing beside it."""
    requests = [Seen(f"alone {index}", UNDISTURBED, content) for index, content in enumerate(contents)]
    for request in requests:
        await generate_unary(channel, request)
    return [request.tokens for request in requests]


class Storm:
    """Makes the requests, from one seed, and knows what became of each."""

    def __init__(self, known: list[dict[str, Any]]) -> None:
        self.requests: list[Seen] = []
        self._random = random.Random(SEED)
        self._known = known

    def clients(self, channels: Iterator[grpc.aio.Channel], cut: Iterator[grpc.aio.Channel]) -> Iterator[Any]:
        """All of them, as coroutines. Those on the channels of ``cut`` will lose their connection."""
        for _ in range(NUM_WHOLE_SESSIONS):
            yield self._session(next(channels))
        for _ in range(NUM_LEFT_SESSIONS):
            yield self._left_session(next(channels))
        for _ in range(NUM_CUT_SESSIONS):
            yield self._cut_session(next(cut))
        for _ in range(NUM_GENERATE):
            yield self._generate(next(channels))
        for _ in range(NUM_UNARY):
            yield self._unary(next(channels))

    def _undisturbed(self) -> Seen:
        return self._add(UNDISTURBED, self._random.choice(self._known))

    def _disturbed(self, fate: str, max_tokens: int | None = None) -> Seen:
        prompt = [self._random.randrange(4, 2000) for _ in range(self._random.randrange(5, 120))]
        sampling = {
            "max_tokens": max_tokens or self._random.randrange(8, 64),
            "ignore_eos": True,
            "temperature": self._random.choice((0, 1)),
        }
        return self._add(fate, {"prompt": {"token_ids": {"ids": prompt}}, "sampling": sampling})

    def _add(self, fate: str, content: dict[str, Any]) -> Seen:
        self.requests.append(Seen(f"{fate} {len(self.requests)}", fate, content))
        return self.requests[-1]

    async def _rush(self) -> None:
        await asyncio.sleep(self._random.uniform(0, RUSH))

    async def _session(self, channel: grpc.aio.Channel) -> None:
        """One or two requests; then the client closes, in one of the two ways, and reads on to the end."""
        await self._rush()
        session = Session(channel)
        reading = await session.open()
        acts = []
        if self._random.random() < 0.6:
            request = self._disturbed(self._random.choice(list(FATES)))
            fate = FATES[request.fate]
            await session.start(request, **fate.fields)
            if fate.act:
                acts.append(fate.act(session, request, channel))
        if not session.requests or self._random.random() < 0.3:
            await session.start(self._undisturbed())
        await asyncio.gather(*acts)
        if self._random.random() < 0.5:
            await session.done_writing()
        else:
            await session.send(close={})
        await reading

    async def _left_session(self, channel: grpc.aio.Channel) -> None:
        """The client cancels the stream, wherever its request stands."""
        await self._rush()
        session, request = Session(channel), self._disturbed("left behind")
        reading = await session.open()
        await session.start(request)
        await request.has_tokens(self._random.randrange(5))
        session.call.cancel()
        with contextlib.suppress(*LOST):
            await reading

    async def _cut_session(self, channel: grpc.aio.Channel) -> None:
        await self._rush()
        with contextlib.suppress(*LOST):
            session = Session(channel)
            reading = await session.open()
            with contextlib.suppress(*LOST):
                await session.start(self._disturbed("cut off", max_tokens=250))
            await reading

    async def _generate(self, channel: grpc.aio.Channel) -> None:
        await self._rush()
        match self._random.randrange(3):
            case 0:
                await generate(channel, self._undisturbed())
            case 1:
                await generate(channel, self._disturbed("generate left"), leave_at=self._random.randrange(8))
            case _:
                timeout = self._random.uniform(0.05, 3)
                await generate(channel, self._disturbed("generate short of time"), timeout)

    async def _unary(self, channel: grpc.aio.Channel) -> None:
        await self._rush()
        match self._random.randrange(3):
            case 0:
                await generate_unary(channel, self._undisturbed())
            case 1:
                leave_after = self._random.uniform(0, 2)
                await generate_unary(channel, self._disturbed("unary left"), leave_after=leave_after)
            case _:
                timeout = self._random.uniform(0.05, 3)
                await generate_unary(channel, self._disturbed("unary short of time"), timeout)


@pytest.mark.timeout(600)
async def test_every_request_ends_once_and_no_block_stays_in_use(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    """500 sessions and 120 other calls at once: cancelled, short of time, starved, left and cut off."""
    server = serve(*SMALL_TIERS)
    front = psutil.Process(server.process.pid)
    known = references()
    storm = Storm(known)
    async with connect(server.address) as quiet:
        alone = await outputs_alone(quiet, known)
        connections = len(front.net_connections("unix"))
        started = time.perf_counter()
        await blow(storm, server, tmp_path)
        seconds = time.perf_counter() - started
        _, totals = await load_when(quiet, is_empty)
        connections_after = len(front.net_connections("unix"))
        again = await outputs_alone(quiet, known)

    outcomes = Counter((request.fate, *request.ends) for request in storm.requests)
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:5d} {': '.join(outcome)}")
    print(f"{len(storm.requests)} requests in {seconds:.1f} s\n{totals}")

    for request in storm.requests:
        if request.fate in ENDS:
            assert len(request.ends) == 1, (request.id, request.ends)
            assert request.ends[0] in ENDS[request.fate], (request.id, request.ends)
    met = {end for request in storm.requests for end in request.ends}
    assert met >= {"STOP_TOKEN", "MAX_TOKENS", "CANCELLED", "INVALID_REQUEST"}
    assert met & OUT_OF_TIME
    assert outcomes["cut off",] > 0
    assert totals.swap_out_bytes > 0
    assert totals.swap_in_bytes > 0

    tokens_alone = {id(content): tokens for content, tokens in zip(known, alone, strict=True)}
    for request in storm.requests:
        if request.fate == UNDISTURBED:
            assert request.tokens == tokens_alone[id(request.content)], request.id
    assert again == alone, "the storm left wrong KV in the prefix cache"

    assert connections_after <= connections
    assert server.faults == []
    server.process.terminate()
    assert await asyncio.to_thread(server.process.wait, 60) == 0


async def blow(storm: Storm, server: Served, folder: Path) -> None:
    """Every client to its end, one process of clients among them, which is killed."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connect(server.address)) for _ in range(NUM_CHANNELS)]
        cables = [
            await stack.enter_async_context(Cable(server.address, folder / f"cable{i}"))
            for i in range(NUM_CABLES)
        ]
        ends = [await stack.enter_async_context(connect(cable.address)) for cable in cables]
        victim = stack.enter_context(client_process(server.address, 10, 1000))

        async def kill() -> None:
            await victim.has_tokens()
            victim.process.kill()

        async def cut() -> None:
            for cable in cables:
                await asyncio.sleep(0.4)
                cable.cut()

        clients = storm.clients(itertools.cycle(channels), itertools.cycle(ends))
        try:
            async with asyncio.timeout(STORM_SECONDS):
                await asyncio.gather(kill(), cut(), *clients)
        except TimeoutError:
            still_open = [request.id for request in storm.requests if not request.ends]
            raise AssertionError(f"the storm does not end; requests without an end: {still_open}") from None
