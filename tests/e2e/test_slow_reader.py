"""A client that stops reading, in front of a real engine with a real host tier."""

import asyncio
from collections.abc import Callable

from served import Served, load_when
from wire import Seen, Session, connect, generate

from tidegate.v1 import control_pb2, control_pb2_grpc

BLOCK_SIZE = 16
TIERS = ("demo", "--block-size", str(BLOCK_SIZE), "--device-kv-tokens", "4096", "--host-kv-tokens", "8192")
REQUESTS = 4
TOKENS = 200
"""With so many logprobs, each takes more than 400 bytes of the log: together four times its cap."""
BUFFERS = 64 * 1024

Serve = Callable[..., Served]


def story(name: str, **sampling: object) -> Seen:
    sampling = {"max_tokens": TOKENS, "ignore_eos": True, "seed": 7, "temperature": 1.0, **sampling}
    return Seen(name, "", {"prompt": {"text": f"Tell me a story about {name}."}, "sampling": sampling})


async def test_a_session_that_stops_reading_costs_no_device_memory_and_no_recompute(serve: Serve) -> None:
    """What waits for it stays below 64 KB, all its KV goes to the host, others go on; what it then reads is
    what it would have read, and nothing was computed twice.
    """
    server = serve(*TIERS)
    names = [f"lantern {index}" for index in range(REQUESTS)]
    async with connect(server.address) as channel, connect(server.address) as lazy:
        control = control_pb2_grpc.ControlServiceStub(channel)
        undisturbed = [story(name) for name in names]
        await asyncio.gather(*(generate(channel, request) for request in undisturbed))

        session = Session(lazy, ack_tokens=20)
        await session.send(open={})
        late = [story(f"{name} again", logprobs=20) for name in names]
        for request, name in zip(late, names, strict=True):
            request.content = story(name, logprobs=20).content
            await session.start(request, credit=TOKENS)
        await load_when(channel, lambda load, _: load.swapped == REQUESTS and load.running == 0)
        (state,) = (await control.ListSessions(control_pb2.ListSessionsRequest())).sessions
        assert BUFFERS / 4 < state.unacked_log_bytes + state.waiting_chars <= BUFFERS
        inspected = await control.Inspect(control_pb2.InspectRequest())
        assert [sequence.status for sequence in inspected.sequences] == ["parked"] * REQUESTS
        computed = sum(sequence.computed_tokens for sequence in inspected.sequences)
        device, host = inspected.load.device, inspected.load.host
        assert device.total == device.free + device.reclaimable, "what is left is cache, and goes when needed"
        assert host.total - host.free - host.reclaimable >= computed / BLOCK_SIZE
        await generate(channel, story("cat"))

        reading = asyncio.create_task(session.read())
        await asyncio.gather(*(request.has_ended() for request in late))
        reading.cancel()
        totals = (await control.Inspect(control_pb2.InspectRequest())).totals
    assert [request.ends for request in late] == [["MAX_TOKENS"]] * REQUESTS
    assert [request.tokens for request in late] == [request.tokens for request in undisturbed]
    assert (totals.recomputed_tokens, totals.parked_dropped) == (0, 0)
    assert server.faults == []
