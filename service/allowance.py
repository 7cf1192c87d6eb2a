"""How far the engine may generate for one request: the one number that it is told, and when to raise it.

Three things bound it: the client's credit, what may wait for the writer, and the room in the request's
session. It counts in output tokens of each choice, and never falls.
"""

import math
from collections.abc import Callable, Sequence

from tidegate.engine.messages import Command, Limit
from tidegate.service.choice import Choice
from tidegate.service.credit import Pool, Share


class Allowance:
    """One request's, for all of its choices alike."""

    __slots__ = (
        "_choices",
        "_credit",
        "_engine_id",
        "_is_over",
        "_limit",
        "_prompt_bytes",
        "_send",
        "_share",
        "_token_bytes",
        "_unread",
        "max_tokens",
        "raise_at",
    )

    def __init__(
        self, *, credit: int | None, unread: int | None, token_bytes: int, send: Callable[[Command], None]
    ) -> None:
        """``credit``: the client's, absolute. ``unread``: tokens of a choice that may wait for the writer.

        None is without limit, for both. ``token_bytes``: of one output token in the log.
        """
        self.max_tokens: int | None = None
        """No room is taken for tokens behind these, which cannot come."""
        self.raise_at = math.inf
        """The output offset that is a reason to ask for more room."""
        self._credit = credit
        self._unread = unread
        self._token_bytes = token_bytes
        self._send = send
        self._choices: Sequence[Choice] = ()
        self._share: Share | None = None
        self._limit: int | None = None
        """What the engine was last told: each choice may have generated up to here."""
        self._engine_id: str | None = None
        """None where nobody is to be told: before the engine knows the request, and behind its end."""
        self._is_over = False
        self._prompt_bytes = 0

    def begin(self, choices: Sequence[Choice], num_given: int, max_tokens: int | None) -> int | None:
        """The content is known: how far the choices may generate at first. None is without limit."""
        self._choices, self.max_tokens = choices, max_tokens
        self._limit = num_given
        return self.renew()

    def submitted(self, engine_id: str) -> None:
        """The engine knows the request by this name, and is told from now on."""
        self._engine_id = engine_id

    def close(self) -> None:
        """The request has ended: what was handed out in advance for choices that still ran is not needed."""
        self._is_over, self._engine_id = True, None
        self.raise_at = math.inf
        for choice in self._choices:
            if choice.end is None:
                self.give_back_unused(choice)

    # What moves it.

    def grant(self, upto: int) -> None:
        """Credit from the client: absolute, the larger wins."""
        if self._credit is not None and upto > self._credit:
            self._credit = upto
            self.ask()

    def delivered(self, choice: Choice) -> None:
        """More of a choice was written to the client's stream."""
        if self._unread is None or self._limit is None:
            return
        # Not at every write: half of what may be unread is a good time to say so. A choice that has
        # ended may have been the one that held the others back.
        step = self._unread // 2
        if choice.end is not None or choice.delivered + self._unread >= self._limit + step:
            self.ask(by_at_least=step)

    def acknowledged(self, num_tokens: int) -> None:
        """The client holds so many more tokens."""
        if num_tokens and self._share is not None:
            self._share.give_back(num_tokens)

    def hold_prompt(self, size: int) -> None:
        """So many bytes of the prompt's logprobs are kept by now."""
        self._prompt_bytes = size
        if self._share is not None:
            self._share.hold_prompt(size)

    def give_back_unused(self, choice: Choice) -> None:
        """A choice ends here, though it might have gone on."""
        if self._share is not None and self._limit is not None:
            self._share.give_back(self._limit - len(choice.token_ids), unused=True)

    def join(self, pool: Pool | None) -> None:
        """Take room here from now on; None: there is no cap."""
        if self._share is not None:
            self._share.leave()
            self._share = None
        if pool is not None:
            self._share = Share(pool, self._token_bytes, sum(map(self._held, self._choices)), self.ask)
            self._share.hold_prompt(self._prompt_bytes)

    # What it is.

    @property
    def has_credit(self) -> bool:
        """Whether every choice that runs may generate."""
        limit = self._limit
        return limit is None or all(len(c.token_ids) < limit for c in self._choices if c.end is None)

    def renew(self) -> int | None:
        """How far the choices may generate now, for an engine that is told of the request anew."""
        self._limit = self._next()
        return self._limit

    def ask(self, by_at_least: int = 1) -> None:
        """Tell the engine where the choices may generate further than it knows, by so many tokens or to the
        end of the credit.
        """
        if self._engine_id is None or self._limit is None:
            return
        limit = self._next()
        if limit is None or limit <= self._limit:
            return
        if limit >= self._limit + by_at_least or limit == self._credit:
            self._limit = limit
            self._send(Limit(self._engine_id, limit))

    # Inside.

    def _next(self) -> int | None:
        bounds = [] if self._credit is None else [self._credit]
        if self._unread is not None:
            running = [choice.delivered for choice in self._choices if choice.end is None]
            bounds.append(min(running, default=0) + self._unread)
        limit = min(bounds, default=None)
        if limit is None or self._share is None or self._limit is None:
            return limit
        if self.max_tokens is not None:
            limit = min(limit, self.max_tokens)
        num_running = sum(choice.end is None for choice in self._choices)
        if limit > self._limit and num_running:
            wanted = min(limit - self._limit, self._share.chunk)
            reached = self._limit + self._share.take(wanted, num_running)
        else:
            reached = self._limit
        # More is asked for in good time, unless it waits for room or for credit already.
        waits = reached >= limit or self._share.is_waiting
        self.raise_at = math.inf if waits else reached - self._share.chunk // 2
        return reached

    def _held(self, choice: Choice) -> int:
        """Tokens of a choice that are not acknowledged, or may come without asking again."""
        reached = len(choice.token_ids)
        if choice.end is None and not self._is_over:
            reached = max(reached, self._limit or 0)
        return reached - choice.acked
