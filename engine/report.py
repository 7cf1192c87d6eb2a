"""What an engine tells about itself: totals for metrics, and a picture of both tiers for whoever looks."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tidegate.engine.journal import Journal
from tidegate.engine.memory.block import State
from tidegate.engine.memory.copies import Reason
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import (
    FREE_SLOT,
    PREFIX_SLOT,
    SLOT_LETTERS,
    Inspection,
    SequenceView,
    Stats,
    SwapStats,
    TierStats,
)
from tidegate.engine.roster import Roster
from tidegate.engine.sequence import Sequence, Status

UTILIZATION_WINDOW = 0.25
"""Seconds over which the use of the link is averaged, at the least."""

DEVICE_STATES = (State.RESERVED, State.DIRTY, State.WRITING_BACK, State.CLEAN, State.LOADING)
HOST_STATES = (State.WRITING_BACK, State.CLEAN, State.HOST_ONLY, State.LOADING)
STALE = "stale"
"""Of a block of which the device holds more by now."""


@dataclass(slots=True)
class Link:
    """One direction between the tiers."""

    seconds: float = 0.0
    """What its copies had taken when the last window ended."""
    utilization: float = 0.0

    def observe(self, seconds: float, window: float) -> None:
        self.utilization = min(1.0, (seconds - self.seconds) / window)
        self.seconds = seconds


class Reporter:
    """Looks at everything and changes nothing. ``now`` is a monotonic clock in seconds."""

    def __init__(
        self,
        journal: Journal,
        roster: Roster,
        manager: BlockManager,
        block_bytes: int,
        now: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._roster = roster
        self._manager = manager
        self._block_bytes = block_bytes
        self._now = now
        self._out, self._in = Link(), Link()
        self._window_began = now()

    def stats(self) -> Stats:
        """The totals, with the present state of queue and tiers filled in."""
        stats, manager, memory = self._journal.totals(), self._manager, self._manager.stats
        sequences = self._roster.sequences()
        by_status = Counter(seq.status for seq in sequences)
        stats.running = by_status[Status.RUNNING]
        stats.stalled = by_status[Status.STALLED]
        stats.swapped = by_status[Status.SWAPPED] + by_status[Status.PARKED]
        stats.parked = by_status[Status.PARKED]
        stats.waiting = by_status[Status.WAITING]
        leased = self._roster.leased()
        stats.leased = len(leased)
        stats.leased_blocks = sum(len(seq.table.blocks) for seq in leased)
        stats.device, stats.host = self._tiers()
        self._watch_link()
        out, back = manager.num_copies
        stats.swap_out = self._swaps(memory.copied_out, memory.seconds_out, out, self._out)
        stats.swap_in = self._swaps(memory.copied_in, memory.seconds_in, back, self._in)
        stats.swap_out_bytes = memory.copied_out.total() * self._block_bytes
        stats.swap_in_bytes = memory.copied_in.total() * self._block_bytes
        stats.failed_copies = memory.failed_copies
        stats.preempted_blocks = memory.preempted_full
        stats.preempted_clean_blocks = memory.preempted_clean
        stats.host_hit_tokens_resumed = memory.host_hits_resumed
        stats.host_hit_tokens_prefix = memory.host_hits_prefix
        stats.thrashed_blocks = memory.thrash
        return stats

    def _tiers(self) -> tuple[TierStats, TierStats]:
        manager, states = self._manager, self._manager.stats.states
        device, host = manager.device, manager.host
        on_host = {state.value: states[state] for state in HOST_STATES}
        on_host[STALE] = host.num_blocks - host.num_free - sum(on_host.values())
        return (
            TierStats(
                device.num_blocks,
                device.num_free,
                manager.num_reclaimable,
                {state.value: states[state] for state in DEVICE_STATES},
            ),
            TierStats(host.num_blocks, host.num_free, manager.num_host_reclaimable, on_host),
        )

    def _swaps(self, copied: Counter[Reason], seconds: float, queued: int, link: Link) -> SwapStats:
        return SwapStats(
            bytes={reason.value: blocks * self._block_bytes for reason, blocks in copied.items()},
            seconds=seconds,
            queue_bytes=queued * self._block_bytes,
            utilization=link.utilization,
        )

    def _watch_link(self) -> None:
        now, memory = self._now(), self._manager.stats
        window = now - self._window_began
        if window >= UTILIZATION_WINDOW:
            self._out.observe(memory.seconds_out, window)
            self._in.observe(memory.seconds_in, window)
            self._window_began = now

    def inspection(self, max_sequences: int) -> Inspection:
        """Every slot of both tiers, and the sequences that hold them, the most urgent first."""
        manager, roster = self._manager, self._roster
        device = bytearray(FREE_SLOT * manager.device.num_blocks, "ascii")
        host = bytearray(FREE_SLOT * manager.host.num_blocks, "ascii")
        for block in manager.blocks(roster.by_table):
            is_known_only = not block.holders and block.copy is None
            letter = ord(PREFIX_SLOT if is_known_only else SLOT_LETTERS[block.state])
            if block.device is not None:
                device[block.device.index] = letter
            if block.host is not None:
                host[block.host.index] = letter
        sequences = sorted(roster.sequences(), key=lambda seq: (seq.row < 0, seq.order))
        shown = [*sequences, *roster.leased()][:max_sequences]
        return Inspection(bytes(device), bytes(host), [self._view(seq) for seq in shown])

    def _view(self, seq: Sequence) -> SequenceView:
        on_device = sum(block.device is not None for block in seq.table.blocks)
        return SequenceView(
            request_id=seq.request.id,
            choice=seq.choice,
            tenant=seq.request.tenant,
            status=seq.status.value,
            priority=seq.request.priority,
            prompt_tokens=seq.num_prompt,
            output_tokens=seq.num_output,
            computed_tokens=seq.table.num_tokens,
            device_blocks=on_device,
            host_blocks=len(seq.table.blocks) - on_device,
            seconds=self._now() - seq.arrived_at,
        )
