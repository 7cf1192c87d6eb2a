"""Best of n: one beginning, several continuations, and the one that the model itself finds most likely.

    tidegate serve demo                      # in one shell
    python service/examples/best_of_n.py     # in another; a server's address may follow

The branches share the KV of the beginning, block by block: it is computed once and held once.
"""

import asyncio
import statistics
import sys

from tidegate import AsyncClient
from tidegate.service.client import Session, SessionStream

BRANCHES = 6
STORY = [{"role": "user", "content": "Tell me a story about a lantern."}]


async def continued(session: Session, beginning: SessionStream, seed: int) -> tuple[float, str]:
    """One branch: the mean log-probability of its tokens, and its text."""
    branch = await session.fork(beginning, max_tokens=60, temperature=1.0, seed=seed, logprobs=0)
    text, logprobs = "", []
    async for chunk in branch:
        text += chunk.text
        logprobs += [position.chosen.logprob for position in chunk.logprobs]
    return statistics.mean(logprobs), text


async def main(address: str = "127.0.0.1:50051") -> None:
    async with AsyncClient(address) as client, client.session() as session:
        # The lease keeps the beginning when it has ended, for branches to grow from.
        beginning = await session.start(STORY, max_tokens=24, temperature=0, lease=60)
        start = await beginning.text()
        branches = await asyncio.gather(*(continued(session, beginning, seed) for seed in range(BRANCHES)))
    branches = sorted(branches, reverse=True)
    print(f"{start} …\n")
    for score, text in branches:
        print(f"{score:6.2f}  …{' '.join(text.split())}")
    print(f"\nThe best of {BRANCHES}:\n{start}{branches[0][1]}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
