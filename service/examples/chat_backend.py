"""A chat backend: 100 users, and one gRPC stream to the model for all of them.

    tidegate serve demo                         # in one shell
    python service/examples/chat_backend.py     # in another; a server's address may follow

``Backend`` is what you would take over into a service of your own. The rest plays its users.
"""

import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator

from tidegate import AsyncClient
from tidegate.service.client import NotFound, Session, SessionStream

USERS = 100
THINGS = ("kite", "cat", "baker", "lantern", "dog", "teacher")
ANSWER_TOKENS = 80
ANSWER_SECONDS = 60.0
"""An answer that is not complete by then ends with what there is."""
LEASE_SECONDS = 600.0
"""How long a user may think before the conversation is computed anew."""


class Backend:
    """Answers users, each in a conversation of their own. All of them share one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._history: dict[str, list[dict[str, str]]] = {}
        self._last: dict[str, SessionStream] = {}
        """Each user's last answer. The server keeps its KV, and the next turn goes on behind it."""
        self.prompt_tokens = 0
        self.cached_tokens = 0

    async def reply(self, user: str, text: str) -> AsyncIterator[str]:
        """Pass the answer on as it comes.

        Where the reader pauses, generation pauses: nothing piles up here, and the conversation's KV makes
        room for others. Where the reader leaves, the request is cancelled.
        """
        history = self._history.setdefault(user, [])
        history.append({"role": "user", "content": text})
        answer = ""
        async for piece in self._pieces(user, history):
            answer += piece
            yield piece
        history.append({"role": "assistant", "content": answer})

    async def _pieces(self, user: str, history: list[dict[str, str]]) -> AsyncIterator[str]:
        if previous := self._last.pop(user, None):
            turn = await self._session.append(
                previous,
                history[-1:],
                max_tokens=ANSWER_TOKENS,
                timeout=ANSWER_SECONDS,
                lease=LEASE_SECONDS,
            )
            try:
                async for piece in self._read(user, turn):
                    yield piece
                return
            except NotFound:
                pass  # the lease was over: say everything again, as for a first turn
        first = await self._session.start(
            history, max_tokens=ANSWER_TOKENS, timeout=ANSWER_SECONDS, lease=LEASE_SECONDS
        )
        async for piece in self._read(user, first):
            yield piece

    async def _read(self, user: str, stream: SessionStream) -> AsyncIterator[str]:
        async with stream:  # leaving it early cancels the request
            async for chunk in stream:
                yield chunk.text
        self._last[user] = stream
        if stream.finished is not None:
            self.prompt_tokens += stream.finished.usage.prompt_tokens
            self.cached_tokens += stream.finished.usage.cached_tokens


async def visit(backend: Backend, number: int, waits: list[float]) -> list[str]:
    """One user's two questions, with a pause for thought behind each; what was said on both sides."""
    name, thing = f"user {number}", THINGS[number % len(THINGS)]
    said = []
    for question in (f"Tell me a story about a {thing}.", f"What color is the {thing}?"):
        asked_at, answer = time.monotonic(), ""
        async for piece in backend.reply(name, question):
            if not answer:
                waits.append(time.monotonic() - asked_at)
            answer += piece
        said += [f"{name}: {question}", f"model: {answer.strip()}"]
        await asyncio.sleep(random.random())
    return said


async def main(address: str = "127.0.0.1:50051") -> None:
    waits: list[float] = []
    async with AsyncClient(address) as client, client.session() as session:
        backend = Backend(session)
        talks = await asyncio.gather(*(visit(backend, number, waits) for number in range(USERS)))
    print(*talks[0], sep="\n")
    print(f"\n{USERS} users got {len(waits)} answers on one stream.")
    print(
        f"Half of the answers began within {statistics.median(waits):.2f} s, all within {max(waits):.2f} s."
    )
    print(f"Of {backend.prompt_tokens} prompt tokens {backend.cached_tokens} had been computed before.")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
