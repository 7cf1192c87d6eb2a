"""How far the requests of a session may generate ahead of what its client holds.

A session's un-acknowledged output is memory of this process, so it has a cap. Room under the cap is
handed out in advance, as credit of the engine, and comes back with every ``Ack``; a request that finds
none stalls as without credit, and goes on in its turn when there is room again.
"""

from collections import deque
from collections.abc import Callable

TOKEN_BYTES = 4
POSITION_BYTES = 48
LOGPROB_BYTES = 18
"""What the log of a request with logprobs takes beside: for each position, and for each alternative."""
LONGEST_CHUNK = 512
"""Steps of room handed to one request at a time, at most."""


def token_bytes(logprobs: int | None) -> int:
    """What one output token takes in the log, with so many alternatives beside the chosen one."""
    if logprobs is None:
        return TOKEN_BYTES
    return TOKEN_BYTES + POSITION_BYTES + (1 + logprobs) * LOGPROB_BYTES


class Pool:
    """The room of one session, and its credit as a whole."""

    def __init__(self, capacity: int) -> None:
        """``capacity`` in bytes."""
        self.capacity = capacity
        self.used = 0
        """Bytes of output that is not acknowledged, and of output that may come without asking again."""
        self.is_lifted = False
        """Whether the cap does not count, since the client can say nothing any more."""
        self._upto: int | None = None
        self._allotted = 0
        """Output tokens that all requests together have been allowed so far."""
        self._num_shares = 0
        self._waiting: deque[Share] = deque()

    def grant(self, upto: int) -> None:
        """All requests together may have generated so many tokens; absolute, the larger wins."""
        if self._upto is None or upto > self._upto:
            self._upto = upto
            self._serve()

    def lift(self) -> None:
        self.is_lifted = True
        self._serve()

    def _chunk(self, share: "Share") -> int:
        """Steps that a request may ask for at once: its fair part of half the room."""
        fair = self.capacity // (2 * max(1, self._num_shares) * share.step_bytes)
        return min(max(1, fair), LONGEST_CHUNK)

    def _room(self, share: "Share") -> int:
        """Steps that a request may have now."""
        room = (self.capacity - self.used) // share.step_bytes
        if self.is_lifted:
            room = LONGEST_CHUNK
        elif self.used == 0:
            room = max(1, room)  # one step may take more than all the room; it must come some time
        room = min(room, self._chunk(share))
        if self._upto is not None:
            room = min(room, (self._upto - self._allotted) // share.choices)
        return max(0, room)

    def _serve(self) -> None:
        """Turn to those that wait, first come first served, as far as there is room."""
        for _ in range(len(self._waiting)):
            share = self._waiting[0]
            if not self._room(share):
                return
            self._waiting.popleft()
            share.is_waiting = False
            share.on_room()


class Share:
    """One request's part of the room of its session."""

    __slots__ = ("_pool", "_token_bytes", "choices", "held", "is_waiting", "on_room", "prompt_bytes")

    def __init__(self, pool: Pool, token_bytes: int, held: int, on_room: Callable[[], None]) -> None:
        """``held``: tokens that it has of old, from another session. ``on_room`` asks again."""
        self.choices = 1
        """Those that still run, as it asked last."""
        self.held = held
        """Tokens that are not acknowledged or may still come."""
        self.on_room = on_room
        self.is_waiting = False
        self.prompt_bytes = 0
        """Of its prompt's logprobs, which come unasked: they may exceed the cap, and then all wait."""
        self._token_bytes = token_bytes
        self._pool = pool
        pool._num_shares += 1
        pool.used += held * token_bytes

    @property
    def step_bytes(self) -> int:
        """What one token of each choice takes."""
        return self._token_bytes * self.choices

    @property
    def chunk(self) -> int:
        """Steps that it would get if nobody held any."""
        return self._pool._chunk(self)

    def take(self, steps: int, choices: int) -> int:
        """Room for up to ``steps`` more tokens of each of so many choices: how many each may have.

        Fewer where there are not so many; where there is none, ``on_room`` is called when there is.
        """
        pool = self._pool
        self.choices = choices
        got = min(steps, pool._room(self))
        if got == 0:
            if not self.is_waiting:
                self.is_waiting = True
                pool._waiting.append(self)
            return 0
        self.held += got * choices
        pool.used += got * self.step_bytes
        pool._allotted += got * choices
        return got

    def give_back(self, tokens: int, unused: bool = False) -> None:
        """So many were acknowledged, or (``unused``) will not come."""
        pool = self._pool
        tokens = min(tokens, self.held)
        self.held -= tokens
        pool.used -= tokens * self._token_bytes
        if unused:
            pool._allotted -= tokens
        pool._serve()

    def hold_prompt(self, size: int) -> None:
        """The logprobs of its prompt that are kept take so many bytes by now."""
        self._pool.used += size - self.prompt_bytes
        self.prompt_bytes = size
        self._pool._serve()

    def leave(self) -> None:
        """The request needs no room of this session any more."""
        pool = self._pool
        pool._num_shares -= 1
        if self.is_waiting:
            pool._waiting.remove(self)
            self.is_waiting = False
        self.hold_prompt(0)
        self.give_back(self.held)
