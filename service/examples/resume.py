"""A connection breaks in the middle of an answer, and the reader does not notice.

    tidegate serve demo                   # in one shell
    python service/examples/resume.py     # in another; a server's address may follow

The client reaches the server through a cable, which this script pulls. The session takes itself up again
on a new connection: the server has kept what did not arrive, and the request's KV.
"""

import asyncio
import contextlib
import sys
from types import TracebackType
from typing import Self

from tidegate import AsyncClient
from tidegate.service.client import Chunk, Finished, Options

STORY = [{"role": "user", "content": "Tell me a story about a lantern."}]
OPTIONS = Options(max_tokens=100, temperature=0.8, seed=3)
CREDIT = 32
"""Tokens that the server may be ahead of us: there is something left to generate when the cable is pulled."""
PULL_AT = 20


class Cable:
    """A relay between a local port and the server: ``async with Cable(server) as cable``."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._ends: list[asyncio.StreamWriter] = []
        self._relays: list[asyncio.Task[None]] = []
        self.address = ""
        """Of our end of it."""

    @property
    def connections(self) -> int:
        return len(self._relays)

    def pull(self) -> None:
        """Break all that runs through it, without a word to either side, as networks do."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._listener.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.close()
        self.pull()
        await asyncio.gather(*self._relays)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._relays.append(asyncio.create_task(self._relay(reader, writer)))

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server.startswith("unix:"):
            connecting = asyncio.open_unix_connection(self._server.removeprefix("unix:"))
        else:
            host, _, port = self._server.rpartition(":")
            connecting = asyncio.open_connection(host, int(port))
        far_reader, far_writer = await connecting
        self._ends += [writer, far_writer]
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(address: str = "127.0.0.1:50051") -> None:
    async with AsyncClient(address) as client:
        undisturbed = await client.generate(STORY, **OPTIONS).text()

    async with Cable(address) as cable, AsyncClient(cable.address) as client, client.session() as session:
        stream = await session.start(STORY, credit=CREDIT, **OPTIONS)
        text, is_pulled = "", False
        # ``events`` gives the end with its figures too; iterating over the stream itself gives chunks alone.
        async for event in stream.events():
            if isinstance(event, Chunk):
                text += event.text
                print(event.text, end="", flush=True)
                if event.offset >= PULL_AT and not is_pulled:
                    is_pulled = True
                    cable.pull()
                    print(" [the cable is pulled] ", end="", flush=True)
            elif isinstance(event, Finished):
                usage = event.usage
                print(f"\n\n{usage.output_tokens} tokens, {usage.recomputed_tokens} computed twice.")
    print(f"{cable.connections} connections carried them.")
    print(f"The same text as without the break: {'yes' if text == undisturbed else 'NO'}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
