"""Do two samples come from one distribution? Two tests on several views, one p-value for all.

*Classifier test* (Lopez-Paz & Oquab, ICLR 2017): a linear discriminant on components and their
squares, fitted by least squares with a ridge; the statistic is its cross-validated area under the
ROC curve. *MMD* (Gretton et al., JMLR 13, 723 (2012)): the unbiased estimate of the squared
maximum mean discrepancy with a Gaussian kernel, its width the median distance.

p-values come from permutations of the labels, the same ones for all tests: the largest statistic of
all, in standard deviations over the permutations, is compared with its own permutation distribution
(maxT of Westfall & Young 1993), so the chance of any false alarm is the level, however the tests
depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FOLDS = 5
#: Ridge of the discriminant, per row of training data; its inputs have a spread of one.
RIDGE = 0.01
#: Components beyond so many standard deviations are cut: squares of outliers would rule.
_CLIP = 4.0
#: Rows that the median distance is taken from.
_MEDIAN_ROWS = 500


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test on one view.

    Attributes
    ----------
    view, method
        What was compared; ``"classifier"`` or ``"mmd"``.
    statistic
        Area under the curve (0.5: no better than guessing), or the squared discrepancy.
    p_value, p_adjusted
        Of this test alone, and adjusted for all tests of the family.
    """

    view: str
    method: str
    statistic: float
    p_value: float
    p_adjusted: float


def two_sample_tests(
    views: Mapping[str, Floats],
    is_target: NDArray[np.bool_],
    pair: NDArray[np.int64],
    *,
    permutations: int = 499,
    seed: int = 0,
) -> tuple[float, list[TestResult]]:
    """Test whether the labels of rows can be told from several views of them.

    Parameters
    ----------
    views
        Name → components (n, d) of the rows, scaled so that their sizes can be compared.
    is_target
        Which rows belong to the target, (n,).
    pair
        For each row the row of the other sample that is the same thing, −1 where there is none,
        (n,). Both have their fold in common, and permutations swap them: copies neither hide a
        difference by confusing the classifier nor count twice.
    permutations, seed
        How many, and of what.

    Returns
    -------
    float, list of TestResult
        p-value of all tests together, and each test.
    """
    rng = np.random.default_rng(seed)
    labels = permuted_labels(is_target, pair, permutations, rng)
    fold = _folds(pair, rng)
    names, rows = [], []
    for view, x in views.items():
        names += [(view, "classifier"), (view, "mmd")]
        rows += [classifier_auc(x, labels, fold), mmd(x, labels, rng)]
    # What differs by rounding alone is equal: copies swapped change nothing.
    statistics: Floats = np.asarray(rows).round(9)
    share = _upper_shares(statistics)
    spread = statistics.std(axis=1, keepdims=True)
    score = (statistics - statistics.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    largest = score.round(6).max(axis=0)
    adjusted = [float((largest >= z).mean()) for z in score[:, 0].round(6)]
    results = [
        TestResult(view, method, float(statistics[k, 0]), float(share[k, 0]), adjusted[k])
        for k, (view, method) in enumerate(names)
    ]
    return min(adjusted), results


def permuted_labels(
    is_target: NDArray[np.bool_],
    pair: NDArray[np.int64],
    permutations: int,
    rng: np.random.Generator,
) -> Floats:
    """Return labels (n, 1 + permutations), 1 for target; the first column are the true ones."""
    n = len(is_target)
    labels = np.repeat(is_target[:, None].astype(float), permutations + 1, axis=1)
    single = np.flatnonzero(pair < 0)
    first = np.flatnonzero((pair >= 0) & (np.arange(n) < pair))
    for k in range(1, permutations + 1):
        labels[single, k] = labels[rng.permutation(single), 0]
        swapped = first[rng.random(len(first)) < 0.5]
        labels[swapped, k] = 1 - labels[swapped, 0]
        labels[pair[swapped], k] = 1 - labels[pair[swapped], 0]
    return labels


def classifier_auc(x: Floats, labels: Floats, fold: NDArray[np.int64]) -> Floats:
    """Return the cross-validated area under the curve for each column of labels, (P,).

    The discriminant is linear in the labels, so all permutations are one matrix product.
    """
    from scipy.stats import rankdata

    spread = x.std(axis=0)
    x = np.clip((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1), -_CLIP, _CLIP)
    x = np.column_stack([x, x**2 - (x**2).mean(axis=0)])
    areas, weights = np.zeros(labels.shape[1]), np.zeros(labels.shape[1])
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        if not test.any():
            continue
        centre = x[train].mean(axis=0)
        inner = x[train] - centre
        gram = inner.T @ inner + RIDGE * len(inner) * np.eye(x.shape[1])
        direction = np.linalg.solve(gram, inner.T @ (labels[train] - labels[train].mean(axis=0)))
        rank = rankdata((x[test] - centre) @ direction, axis=0)
        target = labels[test]
        n_target = target.sum(axis=0)
        pairs = n_target * (len(target) - n_target)
        above = (rank * target).sum(axis=0) - n_target * (n_target + 1) / 2
        # A fold counts by its number of pairs; one of a single kind says nothing.
        areas += above
        weights += pairs
    return np.where(weights > 0, areas / np.maximum(weights, 1), 0.5)


def mmd(x: Floats, labels: Floats, rng: np.random.Generator) -> Floats:
    """Return the unbiased squared discrepancy for each column of labels, (P,)."""
    kernel = np.exp(-0.5 * squared_distances(x, x) / median_distance(x, rng) ** 2)
    ones = np.ones(len(x))
    both = kernel @ labels
    target = (labels * both).sum(axis=0)
    cross = (ones @ kernel) @ labels - target
    source = kernel.sum() - target - 2 * cross
    n = labels.sum(axis=0)
    m = len(x) - n
    # The diagonal, of ones, is left out of the means within a sample.
    return np.asarray(
        (target - n) / (n * (n - 1)) + (source - m) / (m * (m - 1)) - 2 * cross / (m * n)
    )


def median_distance(x: Floats, rng: np.random.Generator) -> float:
    """Return the median distance between (some) rows."""
    if len(x) > _MEDIAN_ROWS:
        x = x[rng.choice(len(x), _MEDIAN_ROWS, replace=False)]
    upper = np.triu_indices(len(x), 1)
    median = float(np.sqrt(np.median(squared_distances(x, x)[upper]))) if len(x) > 1 else 0.0
    return median if median > 0 else 1.0


def squared_distances(a: Floats, b: Floats) -> Floats:
    """Return squared Euclidean distances, (n, m)."""
    square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.maximum(square, 0.0))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number (Holm, Scand. J. Stat. 6, 65 (1979))."""
    adjusted, largest = {}, 0.0
    for k, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - k) * p))
        adjusted[name] = largest
    return adjusted


def _upper_shares(statistics: Floats) -> Floats:
    """Return for each entry of (T, P) which share of its row is at least as large."""
    below = [np.searchsorted(np.sort(row), row, side="left") for row in statistics]
    size = statistics.shape[1]
    return np.asarray((size - np.array(below)) / size)


def _folds(pair: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Deal rows into folds, pairs together."""
    n = len(pair)
    unit = np.where(pair >= 0, np.minimum(pair, np.arange(n)), np.arange(n))
    return np.asarray(rng.permutation(np.arange(n) % FOLDS)[unit], dtype=np.int64)
