"""Which sequences there are, and where each of them stands."""

from bisect import bisect_left, insort

from tidegate.engine.memory.block import BlockTable
from tidegate.engine.request import Parent
from tidegate.engine.sequence import Sequence, Status


class Roster:
    """Every sequence that has not ended stands in exactly one place.

    That is the *ready* queue (wants to run, has no row), *running* (has a row and resident blocks), *idle*
    (without credit), or behind its request's first choice until their common prompt is computed. Those
    that have ended under a lease are kept beside them.
    """

    def __init__(self, num_rows: int) -> None:
        self.requests: dict[str, list[Sequence]] = {}
        """By request id, the choices that have not ended."""
        self.leases: dict[str, dict[int, Sequence]] = {}
        """By request id and choice, those that have ended and whose KV is kept."""
        self.by_table: dict[BlockTable, Sequence] = {}
        """The block manager speaks of tables: whose is one that lost blocks?"""
        self.ready: list[Sequence] = []
        """In the order in which they are to enter the batch."""
        self.running: list[Sequence] = []
        """In the same order."""
        self.idle: dict[Sequence, None] = {}
        """A set that keeps its order, so that a run of one seed is the same run every time."""
        self.rows = list(range(num_rows - 1, -1, -1))
        """Those that are free."""
        self.num_rows = num_rows

    def __contains__(self, request_id: object) -> bool:
        """Whether anything is held on behalf of this request."""
        return request_id in self.requests or request_id in self.leases

    def add(self, choices: list[Sequence]) -> None:
        """A new request: all choices but the first stand behind it."""
        self.requests[choices[0].request.id] = choices
        choices[0].siblings = choices[1:]
        for seq in choices:
            self.by_table[seq.table] = seq

    def remove(self, seq: Sequence) -> None:
        """A choice that has ended, and left its place before."""
        del self.by_table[seq.table]
        self._end(seq)

    def lease(self, seq: Sequence) -> None:
        """The same, but its table stays."""
        self._end(seq)
        self.leases.setdefault(seq.request.id, {})[seq.choice] = seq

    def _end(self, seq: Sequence) -> None:
        choices = self.requests[seq.request.id]
        choices.remove(seq)
        if not choices:
            del self.requests[seq.request.id]

    def end_lease(self, seq: Sequence) -> None:
        del self.by_table[seq.table]
        leased = self.leases[seq.request.id]
        del leased[seq.choice]
        if not leased:
            del self.leases[seq.request.id]

    def find(self, parent: Parent) -> Sequence | None:
        """The choice that a request continues, if anything is held of it."""
        for seq in self.requests.get(parent.request_id, ()):
            if seq.choice == parent.choice:
                return seq
        return self.leases.get(parent.request_id, {}).get(parent.choice)

    def set_table(self, seq: Sequence, table: BlockTable) -> None:
        """Give a sequence another table in place of its own, which is empty."""
        del self.by_table[seq.table]
        seq.table = table
        self.by_table[table] = seq

    def enqueue(self, seq: Sequence) -> None:
        insort(self.ready, seq, key=lambda s: s.order)

    def run(self, seq: Sequence) -> None:
        """Give it a row; there must be one."""
        seq.status = Status.RUNNING
        seq.row = self.rows.pop()
        seq.row_blocks = -1
        seq.reserved = 0
        insort(self.running, seq, key=lambda s: s.order)

    def leave(self, seq: Sequence) -> None:
        """Out of whatever place the sequence stands in. Its row may be reused by the next step."""
        if seq.row >= 0:
            self.running.remove(seq)
            self.rows.append(seq.row)
            seq.row = -1
        elif seq in self.idle:
            del self.idle[seq]
        elif (place := self._place_in_ready(seq)) is not None:
            del self.ready[place]
        else:
            for other in self.requests[seq.request.id]:
                if seq in other.siblings:
                    other.siblings.remove(seq)

    def _place_in_ready(self, seq: Sequence) -> int | None:
        """Found by the queue's order: thousands may wait, and may be cancelled all at once."""
        place = bisect_left(self.ready, seq.order, key=lambda s: s.order)
        return place if place < len(self.ready) and self.ready[place] is seq else None

    def sequences(self) -> list[Sequence]:
        """All that have not ended."""
        return [seq for choices in self.requests.values() for seq in choices]

    def leased(self) -> list[Sequence]:
        """All that have ended under a lease."""
        return [seq for choices in self.leases.values() for seq in choices.values()]

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` where the places or the rows do not add up."""
        alive = set(self.sequences())
        behind = [sibling for seq in alive for sibling in seq.siblings]
        places = [*self.ready, *self.running, *self.idle, *behind]
        if len(places) != len(set(places)) or set(places) != alive:
            raise RuntimeError("a sequence stands in no place, or in two")
        if {seq.table for seq in [*alive, *self.leased()]} != set(self.by_table):
            raise RuntimeError("a table belongs to no sequence that is alive or leased")
        if sorted([*self.rows, *(seq.row for seq in self.running)]) != list(range(self.num_rows)):
            raise RuntimeError("free and used rows do not add up")
