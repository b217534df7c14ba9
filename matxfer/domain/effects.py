"""What is systematic in differences of values: an offset, a scale, a dependence on composition.

Each effect has a size in the unit of the values (how far it moves a typical one) beside its
p-value. Means are trimmed by a tenth at both ends (Yuen 1974): a few wild values make no offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from matxfer.domain.two_sample import holm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.pretraining.exclusion import Composition

    Floats = NDArray[np.float64]

#: An effect is sure below this p-value, adjusted for the number of effects.
LEVEL = 0.01
#: Differences are cut at so many robust standard deviations for the fit by element.
_CUT = 5.0
_TRIM, _FOLDS = 0.1, 5
_PENALTIES = (1e-4, 1e-3, 1e-2)
#: An element of fewer compounds than this has no figure of its own.
FEWEST_OF_ELEMENT = 5
#: What composition explains of the source's own errors is no news; the target's share must be so
#: many times larger.
_MORE = 1.5


@dataclass(frozen=True, slots=True)
class Effect:
    """One systematic difference.

    Attributes
    ----------
    name
        ``offset``, ``scale`` or ``composition``.
    value
        Mean difference in the unit; slope minus one; share of the variance that composition
        explains out of fold.
    size
        How far it moves a typical value, in the unit.
    p_value, p_adjusted
        By itself, and for the number of effects (Holm).
    matters
        Whether it is sure (p) and its size above the threshold.
    """

    name: str
    value: float
    size: float
    p_value: float
    p_adjusted: float
    matters: bool


def systematic_effects(
    difference: Floats,
    level: Floats,
    fractions: Floats,
    compositions: Sequence[Composition],
    threshold: float,
    *,
    reference: tuple[Floats, Floats, Floats, Sequence[Composition]] | None = None,
    permutations: int = 499,
    seed: int = 0,
) -> list[Effect]:
    """Look for what is systematic in differences.

    Parameters
    ----------
    difference
        Target value minus what the source says, (n,).
    level
        What the source says, (n,).
    fractions, compositions
        Element fractions (n, 119) and reduced compositions.
    threshold
        Effects of a smaller size do not matter.
    reference
        The same four of held-out source rows: errors that the source makes on its own ground, of
        which the target's are to differ. ``None``: they are to differ from zero.
    permutations, seed
        Of the test of composition.
    """
    from scipy.stats import norm, trim_mean, ttest_ind

    own = reference or (np.zeros(0), np.zeros(0), np.zeros((0, fractions.shape[1])), [])
    offset = float(trim_mean(difference, _TRIM) - (trim_mean(own[0], _TRIM) if len(own[0]) else 0))
    if np.ptp(difference) == 0 and len(own[0]) == 0:
        p_offset = 1.0 if offset == 0 else 0.0
    elif len(own[0]):
        p_offset = float(ttest_ind(difference, own[0], equal_var=False, trim=_TRIM).pvalue)
    else:
        p_offset = trimmed_p_value(difference)
    slope, error = robust_slope(level, difference)
    if len(own[0]):
        other, other_error = robust_slope(own[1], own[0])
        slope, error = slope - other, float(np.hypot(error, other_error))
    p_scale = float(2 * norm.sf(abs(slope) / error)) if error > 0 else float(slope == 0)
    rest = _without_line(difference, level)
    share, moved, p_composition = composition_effect(
        rest, fractions, compositions, permutations=permutations, seed=seed
    )
    known = composition_effect(_without_line(own[0], own[1]), own[2], own[3], permutations=0)[1]
    p_values = {"offset": p_offset, "scale": p_scale, "composition": p_composition}
    adjusted = holm(p_values)
    found = (
        ("offset", offset, abs(offset), threshold),
        ("scale", slope, abs(slope) * float(np.std(level)), threshold),
        ("composition", share, moved, max(threshold, _MORE * known)),
    )
    return [
        Effect(name, value, size, p_values[name], adjusted[name],
               bool(adjusted[name] <= LEVEL and size >= least))
        for name, value, size, least in found
    ]  # fmt: skip


def trimmed_p_value(x: Floats) -> float:
    """Return the p-value of a trimmed mean of zero (Tukey & McLaughlin 1963)."""
    from scipy.stats import t, trim_mean
    from scipy.stats.mstats import winsorize

    n = len(x)
    cut = int(_TRIM * n)
    left = n - 2 * cut
    spread = float(np.std(np.asarray(winsorize(x, (_TRIM, _TRIM))), ddof=1))
    error = spread * np.sqrt(n) / left
    mean = float(trim_mean(x, _TRIM))
    return float(2 * t.sf(abs(mean) / error, left - 1)) if error > 0 else float(mean == 0)


def robust_slope(x: Floats, y: Floats) -> tuple[float, float]:
    """Return the slope of y on x and its standard error, valid for uneven noise (HC3)."""
    centred = x - x.mean() if len(x) else x
    square = float((centred**2).sum())
    if len(x) < 3 or square == 0:
        return 0.0, 0.0
    slope = float((centred * y).sum() / square)
    residual = y - y.mean() - slope * centred
    leverage = 1 / len(x) + centred**2 / square
    error = np.sqrt((centred**2 * (residual / np.maximum(1 - leverage, 1e-9)) ** 2).sum()) / square
    return slope, float(error)


def composition_effect(
    difference: Floats,
    fractions: Floats,
    compositions: Sequence[Composition],
    *,
    permutations: int = 499,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Ask how much of differences the element fractions explain, by ridge regression.

    Returns
    -------
    float, float, float
        Share of the variance explained out of fold (compositions kept whole), root mean square of
        what is explained, and the p-value from permuted differences.
    """
    used = (fractions > 0).sum(axis=0) >= FEWEST_OF_ELEMENT
    if len(difference) < 4 * _FOLDS or used.sum() < 2 or np.ptp(difference) == 0:
        return 0.0, 0.0, 1.0
    rng = np.random.default_rng(seed)
    x, y = fractions[:, used], _cut(difference)
    columns = [y, *(rng.permutation(y) for _ in range(permutations))]
    targets = np.stack(columns, axis=1)
    names = {c: k for k, c in enumerate(dict.fromkeys(compositions))}
    fold = rng.permutation(np.arange(len(names)) % _FOLDS)[[names[c] for c in compositions]]
    predicted = np.zeros((len(_PENALTIES), *targets.shape))
    for k in np.unique(fold):
        train, test = fold != k, fold == k
        centre, mean = x[train].mean(axis=0), targets[train].mean(axis=0)
        inner = x[train] - centre
        gram, right = inner.T @ inner, inner.T @ (targets[train] - mean)
        for i, penalty in enumerate(_PENALTIES):
            weight = np.linalg.solve(gram + penalty * len(inner) * np.eye(x.shape[1]), right)
            predicted[i][test] = (x[test] - centre) @ weight + mean
    total = ((targets - targets.mean(axis=0)) ** 2).sum(axis=0)
    shares = 1 - ((targets - predicted) ** 2).sum(axis=1) / total
    best = int(np.argmax(shares[:, 0]))
    share = float(max(shares[best, 0], 0.0))
    largest = shares.max(axis=0)
    return share, float(np.sqrt(share * y.var())), float((largest >= largest[0]).mean())


def element_offsets(difference: Floats, fractions: Floats) -> dict[int, tuple[float, int]]:
    """Return for each element the difference per atom of it, and in how many compounds it is.

    From a ridge regression with a common offset, in the unit of the values.
    """
    used = np.flatnonzero((fractions > 0).sum(axis=0) >= FEWEST_OF_ELEMENT)
    if not len(used):
        return {}
    x, y = fractions[:, used], _cut(difference)
    inner = x - x.mean(axis=0)
    gram = inner.T @ inner + _PENALTIES[1] * len(x) * np.eye(len(used))
    weight = np.linalg.solve(gram, inner.T @ (y - y.mean()))
    # An element moves all others' base line when it is rare: figures are against the mean compound.
    offset = weight - float(x.mean(axis=0) @ weight) + float(y.mean())
    counts = (x > 0).sum(axis=0)
    return {int(z): (float(o), int(n)) for z, o, n in zip(used, offset, counts, strict=True)}


def class_offsets(
    difference: Floats, kinds: NDArray[np.str_], threshold: float, offset: float
) -> list[tuple[str, float, int]]:
    """Return classes whose mean difference departs from the common offset: name, mean, number."""
    from scipy.stats import trim_mean

    found = []
    names = np.unique(kinds)
    for name in names:
        own = difference[kinds == name]
        if len(own) < FEWEST_OF_ELEMENT:
            continue
        mean = float(trim_mean(own, _TRIM))
        sure = trimmed_p_value(own - offset) * len(names) <= LEVEL
        if abs(mean - offset) >= threshold and sure:
            found.append((str(name), mean, len(own)))
    return sorted(found, key=lambda item: -abs(item[1] - offset))


def _cut(difference: Floats) -> Floats:
    middle = np.median(difference)
    spread = 1.4826 * float(np.median(np.abs(difference - middle)))
    if spread == 0:
        return difference
    return np.asarray(np.clip(difference, middle - _CUT * spread, middle + _CUT * spread))


def _without_line(difference: Floats, level: Floats) -> Floats:
    """Return what neither an offset nor a scale explains."""
    if not len(difference):
        return difference
    slope = robust_slope(level, difference)[0]
    return np.asarray(difference - difference.mean() - slope * (level - level.mean()))
