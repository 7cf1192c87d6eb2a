"""Words for setting up single situations of the engine in the fake world, and for what it said."""

import random

from world import EOS, World

from tidegate.engine.messages import Delta, Finished, StepOutput, Submit
from tidegate.engine.request import Parent, Request, SamplingParams

POISON_TOKEN = 49
"""No prompt holds it by chance."""


def request(
    name: str,
    num_prompt: int = 4,
    max_tokens: int | None = 4,
    *,
    prompt: list[int] | None = None,
    n: int = 1,
    priority: int = 0,
    emit_upto: int | None = None,
    deadline: float | None = None,
    given: list[int] | None = None,
    parent: Parent | None = None,
    leased: bool = False,
    tenant: str = "local",
    seed: int = 1,
) -> Request:
    rng = random.Random(name)
    return Request(
        id=name,
        prompt_token_ids=prompt or [rng.randrange(EOS + 1, POISON_TOKEN) for _ in range(num_prompt)],
        params=SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True),
        seed=seed,
        priority=priority,
        emit_upto=emit_upto,
        deadline=deadline,
        output_token_ids=given or [],
        parent=parent,
        is_leased=leased,
        tenant=tenant,
    )


def submit(world: World, *requests: Request) -> None:
    for one in requests:
        world.core.handle(Submit(one))


def step(world: World, count: int) -> list[StepOutput]:
    outputs = []
    for _ in range(count):
        world.clock.time += 0.001
        outputs.append(world.core.step())
        world.core.check_integrity()
    return outputs


def ends(outputs: list[StepOutput]) -> dict[str, Finished]:
    return {end.request_id: end for out in outputs for end in out.finished}


def tokens(outputs: list[StepOutput], name: str) -> list[int]:
    deltas: list[Delta] = [delta for out in outputs for delta in out.deltas if delta.request_id == name]
    return [token for delta in deltas for token in delta.token_ids]


def admissions(outputs: list[StepOutput]) -> list[str]:
    return [admitted.request_id for out in outputs for admitted in out.admitted]
