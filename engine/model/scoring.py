"""Logprobs of prompts: which rows of a step they are of, and the logits of how many rows at a time.

The logits of a long chunk would take more memory than all else in its step: they are made, read and dropped a
few rows at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidegate.engine.step import Chunk

_LOGITS = 2**22
"""At a time: 16 MiB in fp32."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the chunks of a step want to know of their prompts; legend: P scored tokens, in plan order."""

    rows_P: npt.NDArray[np.int32]
    """Of the step's packed tokens: each stands right before the one that is scored."""
    token_ids_P: npt.NDArray[np.int32]
    counts_P: list[int]
    """The most likely tokens that are wanted beside each."""

    def __len__(self) -> int:
        return len(self.counts_P)


def scores_of(chunks: Sequence[Chunk]) -> Scores:
    rows: list[int] = []
    token_ids: list[int] = []
    counts: list[int] = []
    first = 0
    for chunk in chunks:
        if (scored := chunk.scored) is not None:
            start = first + scored.start - chunk.start
            rows += range(start, start + len(scored.token_ids))
            token_ids += scored.token_ids
            counts += [scored.top] * len(scored.token_ids)
        first += chunk.count
    return Scores(np.array(rows, np.int32), np.array(token_ids, np.int32), counts)


def slices(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """All rows in their order, as many at a time as may have logits at once."""
    at_once = max(1, _LOGITS // vocab_size)
    for start in range(0, num_rows, at_once):
        yield slice(start, min(start + at_once, num_rows))
