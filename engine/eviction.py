"""Who gives up device blocks, and how: preemption, parking, and copies made before anybody must wait."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from tidegate.engine import policy
from tidegate.engine.journal import Journal
from tidegate.engine.limits import Limits
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import ProgressKind
from tidegate.engine.roster import Roster
from tidegate.engine.sequence import Sequence, Status
from tidegate.engine.timers import Timers

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Throughput:
    """How fast prompts are computed lately, in tokens a second; None before the first prefill."""

    tokens_per_second: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-9)
        known = self.tokens_per_second
        self.tokens_per_second = rate if known is None else known + 0.2 * (rate - known)


class Eviction:
    """Moves sequences out of the batch, and finds the place in which they wait to come back."""

    def __init__(
        self,
        limits: Limits,
        roster: Roster,
        manager: BlockManager,
        journal: Journal,
        *,
        bytes_per_second: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self.timers = Timers(alive=roster)
        self.prefill = Throughput()
        self.step_id = 0
        """The last step that was planned."""
        self.step_seconds = 0.0
        """How long the last step took that was collected."""
        self._limits = limits
        self._roster = roster
        self._manager = manager
        self._journal = journal
        self._bytes_per_second = bytes_per_second
        self._now = now
        self._parking: list[Sequence] = []

    # Making room

    @property
    def room_is_on_its_way(self) -> bool:
        """Whether device blocks come free by themselves: preempting more before they did would cascade."""
        return self._manager.num_draining > 0 or any(seq.preempted for seq in self._roster.running)

    def victim(self, may: Callable[[policy.Candidate], bool]) -> Sequence | None:
        """The sequence that gives up its device blocks first, among those that ``may``."""
        ranked = [
            (policy.victim_rank(candidate), seq)
            for seq, candidate in self._candidates(self._holders())
            if may(candidate)
        ]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None

    def preempt(self, seq: Sequence) -> None:
        """Take its device blocks as soon as no step uses them; what is under way still counts."""
        if seq.status in (Status.STALLED, Status.LEASED):
            self._park(seq)
        elif seq.in_flight:
            seq.preempted = True
        else:
            self.swap_or_drop(seq)

    def swap_or_drop(self, seq: Sequence) -> None:
        """Preempt a sequence of which no step is in flight."""
        seq.preempted = False
        self._roster.leave(seq)
        if self._should_swap(seq):
            self._journal.stats.preemptions_swap += 1
            self._manager.suspend(seq.table)
        else:
            self._journal.stats.preemptions_recompute += 1
            self._manager.release(seq.table)
        seq.rewind()
        self._journal.preempted(seq)
        self.place(seq)

    def place(self, seq: Sequence) -> None:
        """Find the place of a sequence that has no row: ready, idle without credit, or running at once."""
        table = seq.table
        if not seq.may_sample:
            seq.status = Status.PARKED if table.blocks else Status.STALLED
            self._roster.idle[seq] = None
            if table.blocks:
                self._manager.park(table)
                self._parking.append(seq)
            return
        self._manager.unpark(table)
        if table.resident:
            # Credit came back within the grace. Nobody could take the blocks of a sequence that waits in
            # the ready queue, so without a row it must not keep them.
            if self._roster.rows:
                self._journal.progress(seq, ProgressKind.RESUMED)
                self._roster.run(seq)
                return
            self._manager.suspend(table)
        seq.status = Status.SWAPPED if table.blocks else Status.WAITING
        self._roster.enqueue(seq)

    def _should_swap(self, seq: Sequence) -> bool:
        if self._manager.host.num_blocks == 0:
            return False
        if self._limits.preemption != "auto" or self.prefill.tokens_per_second is None:
            return self._limits.preemption != "recompute"
        # What it shares with others that run stays, and is there when it comes back.
        table, size = seq.table, self._limits.block_bytes
        own = [block for block in table.blocks if block.resident == 1]
        dirty = sum(not block.is_clean for block in own)
        costs = policy.preemption_costs(
            bytes_out=dirty * size,
            bytes_in=len(own) * size,
            queued_bytes=self._manager.copies_in_flight * size,
            bytes_per_second=self._bytes_per_second(),
            tokens=max(0, table.num_tokens - table.num_shared * self._manager.block_size),
            tokens_per_second=self.prefill.tokens_per_second,
        )
        fits = self._manager.has_host_room(dirty)
        if not (fits and costs.prefers_swap):
            log.info("recompute_chosen", tokens=table.num_tokens, host_room=fits, **costs._asdict())
        return fits and costs.prefers_swap

    # Without credit

    @property
    def is_parking(self) -> bool:
        """Whether there are sequences of which it is still to be told that they are parked."""
        return bool(self._parking)

    def stall(self, seq: Sequence) -> None:
        """Out of credit: it leaves the batch; its blocks stay resident for the grace."""
        self._roster.leave(seq)
        seq.status = Status.STALLED
        seq.num_stalls += 1
        self._roster.idle[seq] = None
        self._journal.progress(seq, ProgressKind.STALLED)
        self._begin_grace(seq)

    def lease(self, seq: Sequence) -> None:
        """It has ended, and left its place: what it knows the KV of is kept, as if it had stalled."""
        # The front may have ended it before the last tokens that were computed.
        self._manager.truncate(seq.table, len(seq.tokens))
        seq.rewind()
        seq.status = Status.LEASED
        self._roster.lease(seq)
        self._begin_grace(seq)

    def end_leases(self, request_id: str) -> None:
        for seq in list(self._roster.leases.get(request_id, {}).values()):
            self._end_lease(seq)

    def _end_lease(self, seq: Sequence) -> None:
        self._manager.release(seq.table)
        self._roster.end_lease(seq)
        seq.status = Status.FINISHED

    def _begin_grace(self, seq: Sequence) -> None:
        # Without a host tier, parking would throw away what nobody needs the room of yet.
        if self._manager.host.num_blocks:
            stalls = seq.num_stalls
            grace_ends = self._now() + self._limits.park_grace
            self.timers.at(grace_ends, seq.request.id, lambda: self._end_grace(seq, stalls))

    def _end_grace(self, seq: Sequence, stalls: int) -> None:
        waits = seq.status in (Status.STALLED, Status.LEASED) and seq.num_stalls == stalls
        if waits and seq.table.resident:
            self._park(seq)

    def _park(self, seq: Sequence) -> None:
        """Idle for longer than the grace, or under pressure: its KV goes to the host tier."""
        self._manager.park(seq.table)
        self._manager.suspend(seq.table)
        if seq.status is Status.STALLED:
            seq.status = Status.PARKED
            self._parking.append(seq)

    def announce_parked(self) -> None:
        for seq in list(self._parking):
            if seq.status is not Status.PARKED:
                self._parking.remove(seq)
            elif self._manager.is_written(seq.table):
                self._parking.remove(seq)
                if seq.started_at is not None:
                    self._journal.progress(seq, ProgressKind.PARKED)

    # What was lost, and how to lose less

    def note_truncated(self) -> None:
        """Sequences whose KV was given up, in whole or in part, compute it again when they return."""
        for table in self._manager.take_truncated():
            seq = self._roster.by_table.get(table)
            if seq is None:
                continue
            seq.rewind()
            self._journal.stats.parked_dropped += 1
            if seq.status is Status.LEASED:
                if not table.blocks:
                    self._end_lease(seq)
            elif seq.started_at is not None:
                self._journal.progress(seq, ProgressKind.DROPPED)

    def copy_ahead(self) -> None:
        """Write to the host what will have to leave the device soon, so that nobody waits for it then."""
        manager = self._manager
        total = manager.device.num_blocks
        if manager.device.num_free < policy.DEMOTE_MARK * total:
            manager.demote_prefixes(policy.DEMOTED_A_STEP)
        if not self._limits.write_ahead or manager.num_available > (1 - policy.WRITE_AHEAD_MARK) * total:
            return
        if self._all_may_grow():
            return
        most = policy.write_ahead_blocks(
            seconds=self._limits.write_ahead * self.step_seconds,
            bytes_per_second=self._bytes_per_second(),
            block_bytes=self._limits.block_bytes,
            queued_blocks=manager.copies_in_flight,
        )
        size = manager.block_size
        # Few have a new full block in any one step, and to rank all takes as long as to plan the step.
        grown = [seq for seq in self._holders() if seq.table.num_tokens // size != seq.full_blocks_seen]
        ready = [seq for seq in grown if seq.table.is_ready]
        ranked = sorted(self._candidates(ready), key=lambda pair: policy.victim_rank(pair[1]))
        for seq, _ in ranked:
            most -= manager.write_ahead(seq.table.full_blocks(size), most)
            if most == 0 or not manager.num_host_available:
                return
            seq.full_blocks_seen = seq.table.num_tokens // size

    def _all_may_grow(self) -> bool:
        """Whether there is room for those that run however long they become, and nobody joins them.

        Those that wait cannot while all rows are taken.
        """
        if self._roster.ready and self._roster.rows:
            return False
        room = self._manager.num_available
        for seq in self._roster.running:
            room -= self._manager.most_blocks(seq.num_prompt + seq.max_output) - len(seq.table.blocks)
            if room < 0:
                return False
        return True

    def _holders(self) -> list[Sequence]:
        """All that have device blocks of their own to give."""
        running = [seq for seq in self._roster.running if not seq.preempted]
        idle = (*self._roster.idle, *self._roster.leased())
        return running + [seq for seq in idle if seq.table.resident]

    def _candidates(self, holders: list[Sequence]) -> Iterator[tuple[Sequence, policy.Candidate]]:
        return ((seq, seq.candidate(self.step_id)) for seq in holders)
