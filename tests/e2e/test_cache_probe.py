"""Can a tenant find out what another one has asked? It sends prompts and looks at whatever it gets to see.

The prefix cache makes a known prompt cheap, which is the secret: a probe guesses from the cost of its own
request whether the victim had sent the same prompt before. How well it guesses is the area under its ROC
curve (AUC): 0.5 is a coin.

With ``TIDEGATE_PROBES=N`` so many probes are sent, and the clock is judged too: that needs a quiet machine.
"""

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest
from roc import auc
from served import Served
from wire import connect

from tidegate.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

PROBES = int(os.environ.get("TIDEGATE_PROBES", "60"))
TOKENS = {"victim": "victim-0123456789", "attacker": "attacker-0123456789"}
PROMPT_TOKENS, VOCABULARY = 192, 512
SEED = 20261124
JUDGED = ["computed tokens", "cached tokens", *(["seconds"] if "TIDEGATE_PROBES" in os.environ else [])]
"""What a probe sees. CI's machines are too noisy for the last one."""


class Tenant:
    def __init__(self, name: str, channel: grpc.aio.Channel) -> None:
        self._metadata = (("authorization", f"Bearer {TOKENS[name]}"),)
        self._inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self._control = control_pb2_grpc.ControlServiceStub(channel)

    async def ask(self, prompt: list[int]) -> dict[str, float]:
        """What the request cost, by everything that a tenant can see of it."""
        before = await self._computed_tokens()
        request = inference_pb2.GenerateRequest(
            prompt={"token_ids": {"ids": prompt}}, sampling={"max_tokens": 1, "temperature": 0}
        )
        began = time.perf_counter()
        first, usage = None, None
        async for response in self._inference.Generate(request, metadata=self._metadata):
            if response.HasField("batch"):
                first = first or time.perf_counter() - began
            elif response.HasField("finished"):
                usage = response.finished.usage
        assert first is not None
        assert usage is not None
        return {
            "computed tokens": await self._computed_tokens() - before,
            # Less is more suspicious, of all three.
            "cached tokens": -usage.cached_tokens,
            "seconds": first,
        }

    async def _computed_tokens(self) -> int:
        """Of the whole server, once it is idle: that is how a tenant sees its own."""
        while True:
            seen = await self._control.Inspect(control_pb2.InspectRequest(), metadata=self._metadata)
            if not (seen.load.waiting or seen.load.running):
                computed: int = seen.totals.prompt_tokens
                return computed


@pytest.mark.timeout(120 + 2 * PROBES)
async def test_a_probe_tells_what_its_own_tenant_has_asked_and_of_others_nothing(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text("".join(f"{token} {name}\n" for name, token in TOKENS.items()))
    server = serve("demo", "--auth-tokens", str(tokens))
    rng = random.Random(SEED)
    async with connect(server.address) as channel:
        victim, attacker = Tenant("victim", channel), Tenant("attacker", channel)
        for prober, name, low, high in (
            (attacker, "another tenant", 0.45, 0.55),
            (victim, "the tenant itself", 0.95, 1.0),
        ):
            found = await guesses(victim, prober, rng)
            told = ", ".join(f"{cost} {value:.3f}" for cost, value in found.items())
            print(f"{PROBES} probes by {name}: AUC by {told}")
            for cost in JUDGED:
                assert low <= found[cost] <= high, cost


async def guesses(victim: Tenant, prober: Tenant, rng: random.Random) -> dict[str, float]:
    """How well the prober tells what the victim had asked before, by each of the costs that it sees."""
    costs: dict[bool, dict[str, list[float]]] = {known: defaultdict(list) for known in (True, False)}
    for number in range(PROBES):
        asked, other = ([rng.randrange(1, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(2))
        # In both cases the victim has just asked something: that alone must not tell.
        await victim.ask(asked)
        known = number % 2 == 0
        for name, cost in (await prober.ask(asked if known else other)).items():
            costs[known][name].append(cost)
    return {name: auc(costs[False][name], costs[True][name]) for name in costs[True]}
