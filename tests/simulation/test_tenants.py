"""What one tenant has asked shows to itself alone: the cache is kept apart by tenant."""

from scenes import request, step, submit
from world import World

PROBES = 50


def cached(world: World, name: str, prompt: list[int], tenant: str) -> int:
    """Prompt tokens of a request that needed no compute, in either tier."""
    submit(world, request(name, prompt=prompt, max_tokens=1, tenant=tenant))
    admitted = [one for out in step(world, 12) for one in out.admitted]
    return sum(one.cached_device_tokens + one.cached_host_tokens for one in admitted)


def test_a_probe_of_another_tenants_prompts_never_hits_and_one_of_its_own_does() -> None:
    world = World(1, device_blocks=64, host_blocks=128)
    hits = {"same": 0, "other": 0}
    for number in range(PROBES):
        prompt = [1 + (number * 7 + i * i) % 40 for i in range(17)]
        cached(world, f"asked{number}", prompt, "victim")
        # Which of the two asks first must not matter.
        for who in ("other", "same") if number % 2 else ("same", "other"):
            tenant = "victim" if who == "same" else f"probe{number}"
            hits[who] += cached(world, f"{who}{number}", prompt, tenant) > 0
    print(f"{PROBES} prompts: {hits}")
    assert hits["other"] == 0
    assert hits["same"] >= 0.95 * PROBES
