"""How requests come in: what is refused, what a newcomer starts with, and when there is room for it."""

from collections.abc import Callable
from itertools import count

from tidegate.engine import policy
from tidegate.engine.constraints import Constraints
from tidegate.engine.eviction import Eviction
from tidegate.engine.journal import Journal
from tidegate.engine.memory.block import Block, State
from tidegate.engine.memory.prefix import Prefix
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import ProgressKind
from tidegate.engine.request import Request, Violation
from tidegate.engine.roster import Roster
from tidegate.engine.sequence import Sequence, Status


class Admission:
    """Brings sequences in: from a request to the ready queue, from there to a row and resident blocks."""

    def __init__(
        self,
        max_model_len: int,
        roster: Roster,
        manager: BlockManager,
        journal: Journal,
        eviction: Eviction,
        constraints: Constraints,
        *,
        eos_token_ids: frozenset[int],
        now: Callable[[], float],
    ) -> None:
        self._max_model_len = max_model_len
        self._roster = roster
        self._manager = manager
        self._journal = journal
        self._eviction = eviction
        self._constraints = constraints
        self._eos = eos_token_ids
        self._now = now
        self._arrivals = count()

    def violations(self, request: Request) -> list[Violation]:
        """Why the request can never run; empty where it can."""
        found = []
        prompt = len(request.prompt_token_ids)
        given = max(map(len, request.running_choices().values()))
        params, longest = request.params, self._max_model_len
        output = params.max_tokens or given + 1
        if request.id in self._roster:
            found.append(Violation("request_id", "is in use by a request that has not ended, or is leased"))
        if prompt == 0:
            found.append(Violation("prompt", "is empty: give at least one token"))
        elif prompt + output > longest:
            found.append(
                Violation(
                    "max_tokens" if prompt < longest else "prompt",
                    f"{prompt} prompt tokens and {output} of output exceed the limit of "
                    f"{longest}: shorten the prompt or lower max_tokens",
                )
            )
        if params.max_tokens is not None and given >= params.max_tokens:
            found.append(Violation("output_token_ids", "leave nothing to generate: raise max_tokens"))
        if request.output_token_ids and params.n != 1:
            found.append(Violation("n", "must be 1 when generation goes on behind given output tokens"))
        return found

    def submit(self, request: Request) -> None:
        """Take in a request without violations."""
        given = request.running_choices().items()
        choices = [self._new_sequence(request, choice, output) for choice, output in given]
        # The others stand behind the first one: it must be one that has credit as soon as any of them.
        choices.sort(key=lambda seq: seq.num_output)
        self._roster.add(choices)
        self._start_behind_parent(choices[0])
        if request.params.is_constrained:
            self._constraints.begin(request)
        self._eviction.place(choices[0])

    def _start_behind_parent(self, seq: Sequence) -> None:
        """Share the KV that the parent has of this prompt, in whatever tier it lies."""
        parent = None if seq.request.parent is None else self._roster.find(seq.request.parent)
        if parent is None or parent.request.tenant != seq.request.tenant:
            return
        # The last token must be computed, to give logits.
        tokens = seq.shareable
        most = min(parent.table.num_tokens, len(tokens) - 1)
        shared = self._manager.reach(parent.table, common_prefix(parent.tokens, tokens, most))
        known = self._manager.find_prefix(seq.table, tokens)
        if shared and shared >= known.length * self._manager.block_size:
            self._roster.set_table(seq, self._manager.fork(parent.table, shared))
            seq.high_water = seq.table.num_tokens
            self._journal.wanted(seq)

    def _new_sequence(self, request: Request, choice: int, output: list[int]) -> Sequence:
        params = request.params
        most = self._max_model_len - len(request.prompt_token_ids)
        seq = Sequence(
            request=request,
            choice=choice,
            arrival=next(self._arrivals),
            arrived_at=self._now(),
            table=self._manager.new_table(request.tenant),
            tokens=[*request.prompt_token_ids, *output],
            stop_ids=self.stop_ids(request, params.stop_token_ids),
            awaits_constraint=params.is_constrained,
            max_output=most if params.max_tokens is None else min(most, params.max_tokens),
        )
        if request.emit_upto is not None:
            seq.emit_upto = request.emit_upto
        return seq

    def stop_ids(self, request: Request, token_ids: tuple[int, ...]) -> frozenset[int]:
        """The tokens that end the request's choices: ``token_ids``, and the model's own."""
        return frozenset(token_ids) | (frozenset() if request.params.ignore_eos else self._eos)

    def take_constraints(self) -> list[Sequence]:
        """Let those go on whose constraints were made meanwhile, and return them; or refuse them."""
        made = []
        for request, constraints, violations in self._constraints.take_made():
            choices = [seq for seq in self._roster.requests.get(request.id, ()) if seq.request is request]
            if choices and violations:
                self._refuse(choices, violations)
                continue
            for seq in choices:
                constraint = seq.constraint = constraints[seq.choice]
                seq.awaits_constraint = False
                if seq.stop_ids != self.stop_ids(request, request.params.stop_token_ids):
                    constraint.stop_at(seq.stop_ids)
            for seq in choices:
                if seq in self._roster.idle and seq.may_sample:
                    self._roster.leave(seq)
                    self._eviction.place(seq)
            made += choices
        return made

    def _refuse(self, choices: list[Sequence], violations: list[Violation]) -> None:
        """All choices of a request of which nothing has run."""
        for seq in choices:
            self._roster.leave(seq)
            seq.generation += 1
            seq.siblings = []
            seq.status = Status.FINISHED
            self._manager.release(seq.table)
            self._roster.remove(seq)
        self._journal.refused(choices[0].request.id, violations)

    def find_row(self, seq: Sequence) -> bool:
        """Whether there is a row to take; where there is none, a less urgent sequence gives up its own."""
        roster = self._roster
        if not roster.rows and not any(running.preempted for running in roster.running):
            victim = self._eviction.victim(lambda c: not c.stalled and c.priority < seq.request.priority)
            if victim is not None:
                self._eviction.preempt(victim)
        return bool(roster.rows)

    def enter(self, seq: Sequence) -> bool:
        """Take a sequence from the ready queue into the batch; False, unchanged, where there is no room."""
        table, manager = seq.table, self._manager
        start = self._find_room(seq)
        if start is None:
            return False
        # Making room may have cost its own tail. Later, this would drop the step that it gets now.
        self._eviction.note_truncated()
        seq.immune_until = self._eviction.step_id + policy.IMMUNE_STEPS
        # The order in the queue depends on whether it has started: out of the queue first.
        self._roster.leave(seq)
        if seq.started_at is None:
            seq.started_at = self._now()
            size = manager.block_size
            total = table.num_tokens or start.length * size
            on_host = {
                i for i, block in start.numbered() if block.device is None or block.state is State.LOADING
            }
            self._journal.admitted(
                seq, known=total, on_host=sum(min(size, total - i * size) for i in on_host)
            )
        else:
            self._journal.progress(seq, ProgressKind.RESUMED)
        if table.end:
            manager.resume(table)
        else:
            manager.adopt(table, start)
        seq.num_scheduled = table.num_tokens
        self._roster.run(seq)
        return True

    def _find_room(self, seq: Sequence) -> Prefix[Block] | None:
        """What a newcomer starts with, its own blocks or a known prefix, once it fits on the device.

        With room left for others to grow; the stalled and the less urgent make way. None: not now.
        """
        manager, eviction, table = self._manager, self._eviction, seq.table
        while True:
            # Looked up anew each time: making room may have cost the prefix.
            start = manager.start_of(table, seq.shareable)
            extra = manager.num_to_come(table, start, len(seq.tokens) + 1)
            reserve = policy.growth_reserve(len(self._roster.running), manager.block_size)
            if manager.has_room(start.blocks, extra + reserve * len(manager.groups)):
                return start
            if eviction.room_is_on_its_way:
                return None
            victim = eviction.victim(lambda c: c.stalled or c.priority < seq.request.priority)
            if victim is None:
                return None
            eviction.preempt(victim)


def common_prefix(one: list[int], other: list[int], most: int) -> int:
    """How many tokens the two have in common from the first on, up to ``most``."""
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])
