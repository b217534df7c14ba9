"""Whether an error is smaller than another one over splits: paired comparisons with intervals.

Splits differ in how hard they are, so it is the ratio of the two errors of a split that is averaged
(on the logarithmic scale). The splits of one table share training rows, so their ratios are not
independent and the plain t-interval is too narrow. Its variance is therefore raised from s²/n to
s² (1/n + n_test/n_train) (the corrected resampled t-test: Nadeau & Bengio, Machine Learning 52,
239 (2003)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Probability that the interval holds the mean.
LEVEL = 0.95
BETTER, NEGATIVE, UNCLEAR, ONE_SPLIT = "better", "negative transfer", "unclear", "one split"
#: Errors below this are taken for it: a ratio needs two positive numbers.
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Gain:
    """By which share an error is smaller than a reference.

    Attributes
    ----------
    mean, low, high
        Mean over the splits and its interval; ``None`` for the interval of a single split.
    n
        Number of splits.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        """What the interval says: better, negative transfer, or unclear as it holds zero."""
        if self.low is None or self.high is None:
            return ONE_SPLIT
        return BETTER if self.low > 0 else NEGATIVE if self.high < 0 else UNCLEAR

    def text(self) -> str:
        """Return the gain in percent with its interval."""
        if self.low is None or self.high is None:
            return f"{self.mean:+.1%}"
        return f"{self.mean:+.1%} [{self.low:+.1%}, {self.high:+.1%}]"


def paired_gain(reference: Sequence[float], errors: Sequence[float], overlap: float = 0.0) -> Gain:
    """Return by which share errors are smaller: 1 less the geometric mean of their ratios.

    Parameters
    ----------
    reference, errors
        One per split, in the same order, (n,).
    overlap
        Test rows over training rows of a split; 0: independent splits, the plain paired t-interval.
    """
    one, other = (np.log(np.maximum(np.asarray(e, float), _TINY)) for e in (reference, errors))
    mean, half = _interval(one - other, overlap)
    if half is None:
        return Gain(float(1 - np.exp(-mean)), None, None, len(one))
    middle, low, high = (float(1 - np.exp(-mean + k * half)) for k in (0, 1, -1))
    return Gain(middle, low, high, len(one))


def paired_share(
    larger: Sequence[float], smaller: Sequence[float], whole: float, overlap: float = 0.0
) -> Gain:
    """Return the mean difference of two errors as a share of a whole, otherwise as above."""
    difference = np.asarray(larger, float) - np.asarray(smaller, float)
    mean, half = _interval(difference, overlap)
    if half is None:
        return Gain(mean / whole, None, None, len(difference))
    return Gain(mean / whole, (mean - half) / whole, (mean + half) / whole, len(difference))


def _interval(values: NDArray[np.float64], overlap: float) -> tuple[float, float | None]:
    """Return the mean of values and half the width of its interval, ``None`` for one value."""
    from scipy.stats import t

    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, None
    error = float(values.std(ddof=1)) * np.sqrt(1 / n + overlap)
    return mean, float(t.ppf(0.5 + LEVEL / 2, n - 1)) * error
