"""What may come next: the tokens that a choice's ``allowed_token_ids``, ``bad_words`` and
``structured_output`` leave at its next position, as one bit a token.

The automata are llguidance's. They are made of the parameters and advanced by confirmed tokens alone, so what
they allow is the same behind a preemption, on another engine and in any batch.

Legend: N automata, W words of a mask. Bit ``i % 32`` of word ``i // 32`` stands for token ``i``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

Mask = npt.NDArray[np.int32]


def mask_of(token_ids: Iterable[int], vocab_size: int) -> Mask:
    """Of these tokens; ids that the vocabulary does not have are left out."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[[token_id for token_id in token_ids if token_id < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def allowed_tokens(mask: Mask, vocab_size: int) -> npt.NDArray[np.bool_]:
    """A flag for each token of the vocabulary."""
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


def _holds(mask: Mask, token_id: int) -> bool:
    return bool(mask[token_id // 32] >> (token_id % 32) & 1)


class DeadEnd(Exception):
    """The choice cannot go on; ``reason`` in UPPER_SNAKE."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Endings:
    """Tokens that are no text, and those that end the choice."""

    special: Mask
    """They say nothing to ``bad_words``."""
    eos: Mask
    """The model's end-of-sequence tokens, which are among the special ones."""
    ends: Mask
    """What may stand behind a whole sentence: ``eos`` unless it is ignored, stop tokens that are no text."""
    stops: Mask
    """What may not come before ``min_tokens``."""

    @classmethod
    def of(cls, special: Mask, eos: Mask, stop_ids: Iterable[int]) -> "Endings":
        """``stop_ids``: tokens that end the choice, the model's own among them unless they are ignored."""
        stops = mask_of(stop_ids, 32 * len(special))
        return cls(special=special, eos=eos, ends=stops & special, stops=stops)


class Constraint:
    """Of one choice. Only the engine's thread calls it, once it is made."""

    def __init__(
        self,
        endings: Endings,
        *,
        allowed: Mask | None = None,
        sentence: LLMatcher | None = None,
        text: LLMatcher | None = None,
        min_tokens: int = 0,
    ) -> None:
        """``sentence``: the automaton of the structured output; ``text``: that of texts without bad words."""
        self._endings = endings
        self._allowed = allowed
        self._sentence = sentence
        self._text = text
        self._min_tokens = min_tokens
        self._num_output = 0
        self.mask: Mask = np.empty(0, np.int32)
        """Of the next position; ``compute_masks`` fills it in."""
        self.is_due = True
        """Whether the mask is void: there is a token that it does not know of."""
        self.is_complete = False
        """Whether the output is a whole sentence, behind which nothing can come but its end."""

    @property
    def follows_tokens(self) -> bool:
        """Whether what may come next depends on the token before it."""
        return bool(self.automata)

    @property
    def automata(self) -> list[LLMatcher]:
        return [automaton for automaton in (self._sentence, self._text) if automaton is not None]

    @property
    def is_broken(self) -> bool:
        """Whether an automaton has given up, for its limits or for a token that it did not allow."""
        return any(automaton.is_error() for automaton in self.automata)

    def has_allowed(self, token_ids: Sequence[int]) -> bool:
        """Whether ``allowed_token_ids`` hold all of these."""
        allowed = self._allowed
        return allowed is None or all(_holds(allowed, token_id) for token_id in token_ids)

    def stop_at(self, stop_ids: Iterable[int]) -> None:
        """From here on these tokens end the choice, and the mask is void."""
        self._endings = Endings.of(self._endings.special, self._endings.eos, stop_ids)
        self.is_due = True

    def advance(self, token_id: int) -> None:
        """The next token of the output."""
        self._num_output += 1
        self.is_due = self.follows_tokens
        if self._sentence is not None:
            self._sentence.consume_token(token_id)
            self.is_complete = self._sentence.is_stopped() and not self._sentence.is_error()
        if self._text is not None and not _holds(self._endings.special, token_id):
            self._text.consume_token(token_id)

    def settle(self, masks_NW: npt.NDArray[np.int32]) -> None:
        """Put together what the automata allow. Raises ``DeadEnd``."""
        endings, mask = self._endings, self._allowed
        is_sentence = False
        for automaton, allowed in zip(self.automata, masks_NW, strict=True):
            if automaton.is_error():
                raise DeadEnd("GRAMMAR_TOO_COMPLEX")
            allowed = allowed & ~endings.eos
            if automaton.is_accepting():
                is_sentence = is_sentence or automaton is self._sentence
                allowed |= endings.ends if automaton is self._sentence else endings.special
            mask = allowed if mask is None else mask & allowed
        if mask is None:
            raise ValueError("a constraint that allows everything")
        self.is_complete = is_sentence and not (mask & ~endings.ends).any()
        self.mask, self.is_due = mask, False
        # The sampler takes them away.
        left = mask & ~endings.stops if self._num_output < self._min_tokens else mask
        if not (self.is_complete or left.any()):
            raise DeadEnd("NO_TOKEN_ALLOWED")


def compute_masks(
    constraints: Sequence[Constraint], executor: LLExecutor, vocab_size: int
) -> list[DeadEnd | None]:
    """Fill in the next mask of each, many at a time on the executor's threads; what keeps one from it."""
    automata = [automaton for constraint in constraints for automaton in constraint.automata]
    masks_NW = allocate_token_bitmask(len(automata), vocab_size)
    if automata:
        numbered = [(automaton, number) for number, automaton in enumerate(automata)]
        fill_next_token_bitmask_par(executor, numbered, masks_NW)
    ends: list[DeadEnd | None] = []
    first = 0
    for constraint in constraints:
        last = first + len(constraint.automata)
        try:
            constraint.settle(masks_NW[first:last])
            ends.append(None)
        except DeadEnd as end:
            ends.append(end)
        first = last
    return ends
