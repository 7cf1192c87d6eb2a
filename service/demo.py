"""``tidegate demo``: eight conversations share the two tiers of a small server, and one of them stalls.

The server is a real ``tidegate serve`` with room on its device for less than half of what the eight need. All
eight run on one session. One gets little credit: when it is used up, its KV moves to the host tier, and
when credit comes, it goes on where it was.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tidegate.service.client import AsyncClient, Chunk, Message, Progress, Session, Usage
from tidegate.service.launch import private_server
from tidegate.v1 import control_pb2, events_pb2

DEVICE_TOKENS, HOST_TOKENS = 352, 1408
SERVER_FLAGS = (
    *("demo", "--block-size", "16", "--park-grace", "0.3"),
    *("--device-kv-tokens", str(DEVICE_TOKENS), "--host-kv-tokens", str(HOST_TOKENS)),
)
HELD = 1
"""The conversation that is held back..."""
HELD_CREDIT = 12
"""...after so many tokens."""
HELD_SECONDS = 2.0
"""How long the stalled conversation stays in the host tier, for everybody to see."""
TEMPERATURE = 0.8
MAX_TOKENS = 140
"""Of one answer. Both turns of a conversation fit into the device tier with it."""
TIME_LIMIT = 40.0
"""Seconds for each answer: whatever goes wrong, the demo ends."""
LOAD_INTERVAL = 0.05

TALKS = (
    ("Tell me a story about a kite.", "What colour is the kite?"),
    ("Tell me a story about a cat called Momo.", "What colour is the cat?"),
    ("Tell me a story about a baker.", "What is the baker called?"),
    ("Tell me a story about a girl called Mira.", "What is the story about?"),
    ("My favourite colour is green.", "What is my favourite colour?"),
    ("Tell me a story about a lantern.", "Who has the lantern?"),
    ("Tell me a story about a dog.", "What is the dog called?"),
    ("Please tell me a story about a teacher.", "Who is the teacher?"),
)
"""What each user says, and then asks about what was said."""


@dataclass
class Conversation:
    number: int
    messages: list[Message] = field(default_factory=list)
    """Complete ones."""
    answer: str = ""
    """The one under way."""
    states: list[str] = field(default_factory=lambda: ["waiting"])
    """The last one is the present one."""

    def enter(self, state: str, view: "View") -> None:
        if state != self.states[-1]:
            self.states.append(state)
            view.changed(self)


class View(Protocol):
    """What the person sees."""

    def running(self) -> AbstractContextManager[object]:
        """Shown while this context lasts."""

    def asked(self, conversation: Conversation, text: str) -> None:
        """The user's message has been added to the conversation."""

    def said(self, conversation: Conversation, text: str) -> None:
        """A piece of the answer has been added to the conversation."""

    def changed(self, conversation: Conversation) -> None:
        """Its state is another one."""

    def loaded(self, load: events_pb2.Load) -> None:
        """The server's load is another one."""


@dataclass
class Figures:
    """What the table at the end is made of."""

    first_token_seconds: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    device_peak: int = 0
    host_peak: int = 0
    last: control_pb2.WatchLoadResponse = field(default_factory=control_pb2.WatchLoadResponse)

    def count(self, usage: Usage) -> None:
        self.output_tokens += usage.output_tokens
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console = Console()
    console.print("Starting [bold]tidegate serve demo[/bold] with a small device tier...")
    started = time.perf_counter()
    with private_server(SERVER_FLAGS) as address:
        console.print(
            f"It serves after {time.perf_counter() - started:.1f} s, on {address}\n", highlight=False
        )
        conversations = [Conversation(number) for number in range(1, len(TALKS) + 1)]
        view: View = _LiveView(console, conversations) if console.is_terminal else _LineView(console)
        figures, went_well = asyncio.run(_talk(address, conversations, view))
    console.print(_table(figures))
    console.print("The server stopped cleanly." if went_well else "Not all went as it should.")
    return 0 if went_well else 1


async def _talk(address: str, conversations: list[Conversation], view: View) -> tuple[Figures, bool]:
    """The figures, and whether all went as it should."""
    figures = Figures()
    with view.running():
        async with AsyncClient(address) as client, client.session() as session:
            watcher = asyncio.create_task(_watch(client, view, figures))
            stage = _Stage(session, view, figures)
            started = time.perf_counter()
            ends = await asyncio.gather(*map(stage.converse, conversations, TALKS))
            figures.seconds = time.perf_counter() - started
            # A few more intervals, for the totals at the end.
            await asyncio.sleep(4 * LOAD_INTERVAL)
            watcher.cancel()
            await asyncio.wait({watcher})
    return figures, all(ends)


async def _watch(client: AsyncClient, view: View, figures: Figures) -> None:
    async for response in client.watch_load(LOAD_INTERVAL):
        figures.last = response
        load = response.load
        figures.device_peak = max(figures.device_peak, _held(load.device))
        figures.host_peak = max(figures.host_peak, _held(load.host))
        view.loaded(load)


@dataclass
class _Stage:
    """Where the conversations are held."""

    session: Session
    view: View
    figures: Figures

    async def converse(self, conversation: Conversation, talk: Sequence[str]) -> bool:
        """Both turns; the second one sends the whole conversation again, as chat applications do."""
        story, question = talk
        is_held = conversation.number == HELD
        ends = [
            await self._turn(conversation, story, is_held=is_held),
            await self._turn(conversation, question),
        ]
        return all(ends) and (not is_held or "parked" in conversation.states)

    async def _turn(self, conversation: Conversation, content: str, *, is_held: bool = False) -> bool:
        """Whether the model came to the end of its answer."""
        conversation.messages.append({"role": "user", "content": content})
        self.view.asked(conversation, content)
        sent = time.perf_counter()
        stream = await self.session.start(
            conversation.messages,
            temperature=TEMPERATURE,
            seed=conversation.number,
            max_tokens=MAX_TOKENS,
            timeout=TIME_LIMIT,
            credit=HELD_CREDIT if is_held else None,
            auto_credit=not is_held,
        )

        def release() -> None:
            conversation.enter("released", self.view)
            stream.grant(MAX_TOKENS)

        async for event in stream.events():
            if isinstance(event, Chunk):
                if event.offset == 0:
                    self.figures.first_token_seconds.append(time.perf_counter() - sent)
                conversation.enter("streaming", self.view)
                conversation.answer += event.text
                self.view.said(conversation, event.text)
            elif isinstance(event, Progress):
                conversation.enter(event.kind, self.view)
                if is_held and event.kind == "parked":
                    asyncio.get_running_loop().call_later(HELD_SECONDS, release)
        conversation.messages.append({"role": "assistant", "content": conversation.answer})
        conversation.answer = ""
        conversation.enter("done", self.view)
        if stream.finished is None:
            return False
        self.figures.count(stream.finished.usage)
        return stream.finished.reason == "stop_token"


_EXPLAINED = {
    "stalled": "its credit is used up, and it left the batch",
    "parked": "its KV is in the host tier, and it costs no device memory",
    "released": "it gets credit; its KV comes back to the device",
    "preempted": "others needed its device memory; it comes back by itself",
    "dropped": "its KV was given up for room, and will be computed again",
    "resumed": "it runs again, from where it was",
}
_STYLES = {
    "waiting": "dim",
    "streaming": "green",
    "stalled": "yellow",
    "parked": "bold blue",
    "released": "bold green",
    "preempted": "magenta",
    "resumed": "bold green",
    "dropped": "red",
    "done": "dim",
}


class _LineView:
    """For pipes and files: a line a sentence, as they are said, and a line for each event."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._unfinished: dict[int, str] = {}
        self._load = events_pb2.Load()

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()

    def asked(self, conversation: Conversation, text: str) -> None:
        self._line(conversation, f"> {text}")

    def said(self, conversation: Conversation, text: str) -> None:
        text = self._unfinished.get(conversation.number, "") + text
        cut = max(text.rfind(end) + 1 for end in ".?!")
        if cut:
            self._line(conversation, f"  {text[:cut].strip()}")
        self._unfinished[conversation.number] = text[cut:]

    def changed(self, conversation: Conversation) -> None:
        explained = _EXPLAINED.get(conversation.states[-1])
        if explained is not None:
            rest = self._unfinished.pop(conversation.number, "").strip()
            if rest:
                self._line(conversation, f"  {rest} ...")
            self._line(conversation, f"* {conversation.states[-1]}: {explained}")
        if conversation.states[-1] == "released":
            self._line(conversation, f"* {_tiers(self._load)}")

    def loaded(self, load: events_pb2.Load) -> None:
        self._load = load

    def _line(self, conversation: Conversation, text: str) -> None:
        self._console.print(f"{conversation.number} {text}", highlight=False, markup=False, soft_wrap=True)


class _LiveView:
    """For a terminal: the two tiers, and a panel a conversation, two beside each other."""

    def __init__(self, console: Console, conversations: list[Conversation]) -> None:
        self._console = console
        self._conversations = conversations
        self._load = events_pb2.Load()
        self._is_over = False

    @contextmanager
    def running(self) -> Iterator[None]:
        with Live(console=self._console, get_renderable=self._picture, refresh_per_second=10):
            try:
                yield
            finally:
                # The last picture stays, and shows all that was said.
                self._is_over = True

    def asked(self, conversation: Conversation, text: str) -> None:
        """The next refresh shows it."""

    def said(self, conversation: Conversation, text: str) -> None:
        """The next refresh shows it."""

    def changed(self, conversation: Conversation) -> None:
        """The next refresh shows it."""

    def loaded(self, load: events_pb2.Load) -> None:
        self._load = load

    def _picture(self) -> Group:
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        panels = [self._panel(conversation) for conversation in self._conversations]
        for left, right in zip(panels[::2], panels[1::2], strict=True):
            grid.add_row(left, right)
        return Group(Text(_tiers(self._load), style="bold"), grid)

    def _panel(self, conversation: Conversation) -> Panel:
        state = conversation.states[-1]
        style = _STYLES.get(state, "")
        text = Text()
        for message in conversation.messages:
            text.append(f"{message['content']}\n", style="cyan" if message["role"] == "user" else "")
        text.append(conversation.answer)
        title = Text(f"{conversation.number} {state}", style=style)
        if self._is_over:
            return Panel(text, title=title, title_align="left", border_style=style)
        # All panels fit on the screen; each shows the end of what was said.
        height = max(3, (self._console.height - 2) // (len(self._conversations) // 2))
        lines = text.wrap(self._console, self._console.width // 2 - 4)[2 - height :]
        return Panel(
            Text("\n").join(lines), title=title, title_align="left", border_style=style, height=height
        )


def _held(tier: events_pb2.TierLoad) -> int:
    """Blocks that sequences need, now or when they come back; the rest is free or mere cache."""
    return tier.total - tier.free - tier.reclaimable


def _tiers(load: events_pb2.Load) -> str:
    return "   ".join(
        f"{name} tier: {_held(tier)} of {tier.total} blocks held, {tier.reclaimable} cached"
        for name, tier in (("device", load.device), ("host", load.host))
    )


def _table(figures: Figures) -> Table:
    totals, load = figures.last.totals, figures.last.load
    first = figures.first_token_seconds
    rate = figures.output_tokens / figures.seconds
    swapped = f"{totals.swap_out_bytes >> 10} KiB out, {totals.swap_in_bytes >> 10} KiB in"
    hits = f"{figures.cached_tokens} of {figures.prompt_tokens} prompt tokens"
    table = Table(title="What happened", title_justify="left", show_header=False)
    for row in (
        ("output", f"{figures.output_tokens} tokens in {figures.seconds:.1f} s: {rate:.0f} tokens/s"),
        ("time to first token", f"{statistics.median(first):.2f} s median, {max(first):.2f} s at most"),
        ("device tier", f"{load.device.total} blocks, at most {figures.device_peak} held at once"),
        ("host tier", f"{load.host.total} blocks, at most {figures.host_peak} held at once"),
        ("swaps", f"{totals.preemptions_swap} preemptions; {swapped}"),
        ("recomputed", f"{totals.recomputed_tokens} tokens; {totals.preemptions_recompute} preemptions"),
        ("prefix hits", f"{hits}, {totals.prefix_host_hit_tokens} of them in the host tier"),
    ):
        table.add_row(*row)
    return table
