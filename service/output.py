"""All output of one request, and the stream that listens: what it is given, in which order.

First that the request was admitted, then the logprobs of its prompt, then what its choices say, then its
end. Of the request's life this room knows nothing: a stream may come, leave and come back at any time,
behind the end too.
"""

from collections.abc import Mapping

from tidegate.engine import messages
from tidegate.engine.messages import PositionLogprobs, ProgressKind
from tidegate.engine.request import FinishReason
from tidegate.engine.text_stream import StopMatch
from tidegate.service.choice import Choice
from tidegate.service.delivery import BATCH_TOKENS, WAITING_CHARS, Delivery, Flush
from tidegate.service.events import Admitted, Delta, Failed, Finished, Progress
from tidegate.service.prompt_log import PromptLog


class Output:
    """One request's: a ``Source`` of the stream that listens."""

    __slots__ = (
        "_admitted",
        "_admitted_is_sent",
        "_end",
        "_end_is_sent",
        "_request_id",
        "choices",
        "is_marked",
        "listener",
        "prompt",
    )

    def __init__(self, request_id: str) -> None:
        self.choices: list[Choice] = []
        """Empty until the request's content is known."""
        self.prompt = PromptLog(request_id)
        self.listener: Delivery | None = None
        self.is_marked = False
        self._request_id = request_id
        self._admitted: Admitted | None = None
        self._admitted_is_sent = False
        self._end: Finished | Failed | None = None
        self._end_is_sent = False

    # Who listens.

    def set_listener(self, delivery: Delivery | None) -> None:
        """Texts that were made for the stream before are let go of."""
        if self.listener is not None:
            self.listener.waiting_chars -= sum(len(choice.waiting_text) for choice in self.choices)
        for choice in self.choices:
            choice.forget_text()
        self.listener = delivery
        self.is_marked = False

    def listen(self, delivery: Delivery | None, next_offsets: Mapping[int, int]) -> None:
        """Tell this stream everything from these output offsets on, by choice; of others, from the last
        ``Ack`` on.
        """
        self.set_listener(delivery)
        self._admitted_is_sent = self._end_is_sent = False
        for choice in self.choices:
            choice.rewind(next_offsets.get(choice.index))
        # Output comes behind all of them.
        self.prompt.rewind(is_held=any(choice.sent > choice.num_given for choice in self.choices))
        self.mark()

    def mark(self) -> None:
        """There is something new."""
        if self.listener is not None:
            self.listener.mark(self)

    @property
    def is_being_told(self) -> bool:
        """Whether a stream still waits for the end."""
        return self.listener is not None and not self._end_is_sent

    # What arrives.

    def admitted(self, admitted: Admitted) -> None:
        self._admitted = admitted
        self.mark()

    def push_prompt(self, positions: list[PositionLogprobs]) -> None:
        """Take the next logprobs of the prompt."""
        self.prompt.push(positions)
        self.mark()

    def push(self, choice: Choice, delta: messages.Delta, reason: FinishReason | None) -> StopMatch | None:
        """Take a choice's next tokens; ``reason``: why the engine ended it behind them, where it did.

        The stop string that ends it, if there is one; of all that comes behind, nothing counts.
        """
        listener, token_ids = self.listener, delta.token_ids
        # As a rule: nothing waits, and the writer does. Without this, a token costs twice as much.
        if (
            reason is None
            and not self.is_marked
            and listener is not None
            and (writer := listener.passing_on) is not None
            and len(writer) < BATCH_TOKENS
            and len(token_ids) == 1
            and delta.logprobs is None
            and (text := choice.pass_on(token_ids[0])) is not None
        ):
            if not writer:
                listener.wake()
            writer.append(Delta(self._request_id, choice.index, delta.offset, token_ids, text))
            return choice.stream.stop
        if listener is None:
            return choice.push(token_ids, delta.logprobs, reason, keep_text=False).stop
        waiting = len(choice.waiting_text)
        keep_text = listener.waiting_chars < WAITING_CHARS
        added = choice.push(token_ids, delta.logprobs, reason, keep_text)
        listener.waiting_chars += len(choice.waiting_text) - waiting
        listener.mark(self)
        return added.stop

    def flush(self, choice: Choice) -> StopMatch | None:
        """A choice ends without more tokens: what it held back is text now, unless it is a stop string."""
        waiting = len(choice.waiting_text)
        choice.flush(keep_text=self.listener is not None)
        if self.listener is not None:
            self.listener.waiting_chars += len(choice.waiting_text) - waiting
        return choice.stream.stop

    def note(self, choice: Choice, kind: ProgressKind) -> None:
        """Something happened to a choice, which is news for those alone who listen."""
        if self.listener is not None:
            choice.note(Progress(self._request_id, choice.index, kind))
            self.mark()

    def close(self, end: Finished | Failed | None) -> None:
        """The request has ended; None: nobody is to be told."""
        self._end = end
        self.mark()

    # What leaves.

    def collect(self, flush: Flush) -> None:
        """What is new goes into the flush, as far as there is room."""
        listener = self.listener
        if self._admitted is not None and not self._admitted_is_sent:
            self._admitted_is_sent = True
            flush.before.append(self._admitted)
        if self.prompt.has_news:
            flush.add_prompt(self.prompt.take(flush.room))
            if self.prompt.has_news:
                # Output comes behind them, in another message.
                self.mark()
                return
        has_more = False
        for choice in self.choices:
            behind: list[Progress] = []
            if choice.has_progress:
                passed_on = flush.passed_on(self._request_id, choice.index)
                before, behind = choice.take_progress(choice.sent if passed_on is None else passed_on.offset)
                flush.before += before
            if flush.room > 0:
                waiting = len(choice.waiting_text)
                delta = choice.take(flush.room)
                if delta is not None:
                    if listener is not None:
                        listener.waiting_chars -= waiting - len(choice.waiting_text)
                    flush.add(delta)
            flush.after += behind
            has_more = has_more or choice.has_news
        if has_more:
            self.mark()
        elif self._end is not None and not self._end_is_sent:
            self._end_is_sent = True
            flush.after.append(self._end)
