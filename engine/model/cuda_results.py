"""What a step on a GPU gives, in the ring of pinned memory where it writes it, and when it may be read.

Shapes: ``P`` scored tokens of prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tidegate.engine.device.streams import Event
from tidegate.engine.messages import PositionLogprobs
from tidegate.engine.model.cuda_sampling import Extras, line_words, read_lines, read_reports
from tidegate.engine.model.scoring import Scores
from tidegate.engine.step import DeviceLost, StepResult


@dataclass(frozen=True, slots=True)
class Part:
    """Chunks that were computed together: a whole step, but where memory ran out."""

    num_samples: int
    extras: Extras | None
    scores: Scores

    @property
    def report_words(self) -> int:
        return 0 if self.extras is None else self.extras.report_words

    @property
    def score_words(self) -> int:
        return len(self.scores) * line_words(self.scores.counts_P)


class Places(NamedTuple):
    """Words of the ring where a part's results go."""

    samples: int
    reports: int
    scores: int


@dataclass(slots=True)
class LaunchedStep:
    """A step under way, or one that has ended."""

    began: Event
    done: Event
    words: npt.NDArray[np.int32]
    """Its part of the ring."""
    first: Places
    """Within ``words``: two words a sample, behind them reports, behind those scores of prompts."""
    first_word: int
    """Of the ring."""
    is_lost: Callable[[Exception], bool]
    parts: list[Part] = field(default_factory=list)
    error: Exception | None = None
    outcome: StepResult | None = None

    @property
    def places(self) -> Places:
        """Those of the next part."""
        first, parts = self.first, self.parts
        return Places(
            self.first_word + first.samples + 2 * sum(part.num_samples for part in parts),
            self.first_word + first.reports + sum(part.report_words for part in parts),
            self.first_word + first.scores + sum(part.score_words for part in parts),
        )

    def result(self) -> StepResult:
        if self.error is None and self.outcome is None:
            try:
                self.done.synchronize()
                self.outcome = self._read(self.done.seconds_since(self.began))
            except Exception as error:  # noqa: BLE001 - raised below, and again whenever asked for
                self.error = DeviceLost(str(error)) if self.is_lost(error) else error
        if self.outcome is None:
            raise self.error or RuntimeError("a step ended without a result")
        return self.outcome

    def settle(self) -> None:
        """Take the result out of the ring, whose words are wanted for another step."""
        if self.error is None:
            self.result()

    def _read(self, seconds: float) -> StepResult:
        count = sum(part.num_samples for part in self.parts)
        token_ids, finite = self.words[: 2 * count].reshape(-1, 2).T.tolist() if count else ([], [])
        logprobs: list[PositionLogprobs | None] = []
        prompt_logprobs: list[PositionLogprobs] = []
        _, place, score_place = self.first
        for part in self.parts:
            mine = token_ids[len(logprobs) : len(logprobs) + part.num_samples]
            if part.extras is None:
                logprobs += [None] * part.num_samples
            else:
                logprobs += read_reports(self.words[place:], part.extras, mine)
            place += part.report_words
            scores = part.scores
            prompt_logprobs += read_lines(
                self.words[score_place:], scores.token_ids_P.tolist(), scores.counts_P
            )
            score_place += part.score_words
        return StepResult(token_ids, [bool(flag) for flag in finite], logprobs, seconds, prompt_logprobs)
