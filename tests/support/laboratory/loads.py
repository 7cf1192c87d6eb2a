"""What clients ask of a simulated machine, by time. All chance comes from one seed.

Times are in empty steps of the machine (``Machine.empty_step``), so that one load means the same on all.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from laboratory.machines import SAID, Machine
from tidegate.engine.request import Request, SamplingParams

VOCAB = 50_000


@dataclass(frozen=True)
class Arrival:
    """A request; ``wait`` seconds from the start of the load, or from the end of the request ``after``."""

    request: Request
    wait: float = 0.0
    after: str | None = None


@dataclass(frozen=True)
class Load:
    name: str
    arrivals: list[Arrival]
    device_tokens: int
    pause: float = 0.0
    """Seconds that a client waits at the end of its credit before it grants more."""
    grant: int = 1 << 30
    """Tokens that it grants then; unless a load says otherwise, the rest."""

    @property
    def tokens_at_peak(self) -> int:
        return sum(a.request.params.n * _length(a.request) for a in self.arrivals)


def _length(request: Request) -> int:
    return len(request.prompt_token_ids) + (request.params.max_tokens or 0)


class Writer:
    """Makes requests of one load."""

    def __init__(self, machine: Machine, rng: random.Random) -> None:
        self.rng = rng
        self._empty_step = machine.empty_step
        self._count = 0

    def seconds(self, steps: float) -> float:
        return self._empty_step * steps

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(2, VOCAB) for _ in range(count)]

    def around(self, size: int) -> int:
        """A length between half and one and a half of ``size``."""
        return self.rng.randint(size // 2, size * 3 // 2)

    def request(
        self,
        prompt: list[int],
        output: int,
        *,
        n: int = 1,
        credit: int | None = None,
        name: str | None = None,
    ) -> Request:
        self._count += 1
        params = SamplingParams(n=n, max_tokens=output, ignore_eos=True)
        name = name or f"r{self._count}"
        return Request(id=name, prompt_token_ids=prompt, params=params, seed=self._count, emit_upto=credit)

    def chats(self, count: int, prompt: int, output: int, credit: int | None = None) -> Iterator[Request]:
        for _ in range(count):
            yield self.request(self.tokens(self.around(prompt)), self.around(output), credit=credit)


def storm(writer: Writer) -> Load:
    """All at once, with KV for a quarter of the need."""
    arrivals = [Arrival(request) for request in writer.chats(128, 512, 512)]
    return Load("storm", arrivals, 32_768)


def pauses(writer: Writer) -> Load:
    """Clients that stop reading in mid-answer and come back later."""
    arrivals = [
        Arrival(request, writer.seconds(1000 * writer.rng.random()))
        for request in writer.chats(128, 512, 512, credit=64)
    ]
    return Load("pauses", arrivals, 32_768, writer.seconds(250))


def hiccups(writer: Writer) -> Load:
    """Clients that read a little late, again and again, and are back before the grace ends."""
    arrivals = [
        Arrival(request, writer.seconds(1000 * writer.rng.random()))
        for request in writer.chats(128, 512, 512, credit=32)
    ]
    return Load("hiccups", arrivals, 65_536, writer.seconds(4), grant=32)


def turns(writer: Writer) -> Load:
    """Conversations that come back: each turn sends all that was said, and something new."""
    arrivals = []
    for talk in range(48):
        said: list[int] = []
        before = None
        for turn in range(5):
            prompt, output = [*said, *writer.tokens(writer.around(192))], writer.around(128)
            request = writer.request(prompt, output, name=f"c{talk}.{turn}")
            wait = writer.seconds(800 * writer.rng.random())
            arrivals.append(Arrival(request, wait, before))
            said, before = [*prompt, *[SAID] * output], request.id
    return Load("turns", arrivals, 24_576)


def system_prompts(writer: Writer) -> Load:
    """Eight long system prompts, each wanted again and again, while others need the room."""
    systems = [writer.tokens(1536) for _ in range(8)]
    arrivals = [
        Arrival(
            writer.request(
                [*writer.rng.choice(systems), *writer.tokens(writer.around(96))], writer.around(192)
            ),
            writer.seconds(3000 * writer.rng.random()),
        )
        for _ in range(192)
    ]
    return Load("system prompts", arrivals, 16_384)


def bursts(writer: Writer) -> Load:
    """Four rushes, each more than the device tier holds, and calm in between."""
    arrivals = [
        Arrival(request, writer.seconds(1200 * burst))
        for burst in range(4)
        for request in writer.chats(48, 384, 320)
    ]
    return Load("bursts", arrivals, 24_576)


def choices(writer: Writer) -> Load:
    """Four choices of each prompt."""
    arrivals = [
        Arrival(writer.request(writer.tokens(writer.around(768)), writer.around(320), n=4)) for _ in range(40)
    ]
    return Load("n = 4", arrivals, 32_768)


def long_prompts(writer: Writer) -> Load:
    """A few very long prompts among many short chats."""
    long = [
        Arrival(request, writer.seconds(1500 * writer.rng.random()))
        for request in writer.chats(8, 12_288, 128)
    ]
    short = [
        Arrival(request, writer.seconds(1500 * writer.rng.random()))
        for request in writer.chats(160, 256, 256)
    ]
    return Load("long among short", [*long, *short], 40_960)


LOADS: tuple[Callable[[Writer], Load], ...] = (
    storm, pauses, hiccups, turns, system_prompts, bursts, choices, long_prompts,
)  # fmt: skip
