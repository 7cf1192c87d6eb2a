"""How well a measurement tells two kinds of things apart."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """The probability that one of the first is greater than one of the others; a tie counts half.

    0.5: the measurement says nothing. It is the area under the ROC curve, by Mann and Whitney.
    """
    ranked = sorted(negatives)
    below = sum(bisect_left(ranked, one) + bisect_right(ranked, one) for one in positives)
    return below / (2 * len(positives) * len(negatives))
