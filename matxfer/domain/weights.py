"""Importance weights: how much each source crystal counts if the target is what matters.

A classifier that tells target from source knows the ratio of their densities (Sugiyama, Suzuki &
Kanamori 2012): w(x) = p_T(x) / p_S(x) = (n_S / n_T) · P(T | x) / P(S | x). The probabilities are
those of folds that a crystal was not in, since a classifier is too sure of what it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: No source row counts for more than so many average ones.
LIMIT = 20.0
#: Weights are too uneven to use below this share of effective rows, or so few of them.
LEAST_SHARE, LEAST_ROWS = 0.05, 30
#: The mean of the ratio over the source is the share of the target that the source covers, 1 if
#: all of it. Below this the tables hardly overlap, and even weights mean nothing.
LEAST_COVER = 0.25
_PENALTIES = (0.01, 0.1, 1.0)
_FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class ImportanceWeights:
    """Weights of source rows.

    Attributes
    ----------
    values
        Weights of a mean of 1, (n,).
    clipped
        Share of rows that were cut to the limit.
    cover
        Mean of the ratio before it was cut and scaled: 1 where the source covers the target.

    Examples
    --------
    >>> import numpy as np
    >>> from matxfer.domain import density_ratio
    >>> rng = np.random.default_rng(0)
    >>> weights = density_ratio(rng.normal(0, 1, (200, 1)), rng.normal(0, 1, (200, 1)))
    >>> round(float(weights.values.mean()), 6), weights.usable
    (1.0, True)
    """

    values: Floats
    clipped: float
    cover: float

    @property
    def effective(self) -> float:
        """Number of equal rows that would be as good, (Σw)² / Σw² (Kish 1965)."""
        return float(self.values.sum() ** 2 / (self.values**2).sum())

    @property
    def share(self) -> float:
        """Effective number over the number of rows, in (0, 1]."""
        return self.effective / len(self.values)

    @property
    def usable(self) -> bool:
        """Whether they are even enough, and the source covers enough of the target."""
        even = self.share >= LEAST_SHARE and self.effective >= LEAST_ROWS
        return even and self.cover >= LEAST_COVER

    def words(self) -> str:
        """Say how even they are, and whether to use them."""
        size = f"{self.effective:.0f} of {len(self.values)} source rows count ({self.share:.0%})"
        if self.usable:
            return f"{size}: even enough for importance weights"
        if self.cover < LEAST_COVER:
            return (
                f"the source covers {self.cover:.0%} of the target (of which at least "
                f"{LEAST_COVER:.0%} are needed): no weights make it resemble the target"
            )
        return (
            f"{size}, too uneven for importance weights (at least {LEAST_SHARE:.0%} and "
            f"{LEAST_ROWS} rows): the source has too little that resembles the target"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what is known of the weights, without them."""
        return {
            "effective_rows": self.effective,
            "effective_share": self.share,
            "largest": float(self.values.max()),
            "clipped_share": self.clipped,
            "cover": self.cover,
            "usable": self.usable,
        }


def density_ratio(
    source: Floats,
    target: Floats,
    *,
    limit: float = LIMIT,
    squares: bool = True,
    seed: int = 0,
) -> ImportanceWeights:
    """Estimate p_T / p_S at the source rows.

    Parameters
    ----------
    source, target
        Features (n, d) and (m, d), such as principal components of fingerprints.
    limit
        Cut weights above so many times their mean, which bounds the variance.
    squares
        Whether the classifier sees the squares of the features too: Gaussians of different widths
        need them.
    seed
        Of the folds.

    Raises
    ------
    OptionError
        If there are fewer than five rows of either, or the widths differ.

    Examples
    --------
    Rows that resemble the target count more:

    >>> import numpy as np
    >>> from matxfer.domain import density_ratio
    >>> rng = np.random.default_rng(0)
    >>> source, target = rng.normal(0, 1, (300, 1)), rng.normal(1, 1, (300, 1))
    >>> values = density_ratio(source, target).values
    >>> bool(values[source[:, 0] > 1].mean() > 4 * values[source[:, 0] < 0].mean())
    True
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    if min(len(source), len(target)) < _FOLDS:
        raise OptionError(
            f"a density ratio of {len(source)} source and {len(target)} target rows cannot be "
            f"estimated; give at least {_FOLDS} of each"
        )
    if source.shape[1] != target.shape[1]:
        raise OptionError(f"{source.shape[1]} source features, but {target.shape[1]} of the target")
    x = np.concatenate([source, target])
    label = np.repeat([0, 1], [len(source), len(target)])
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    best, probability = np.inf, np.zeros(len(x))
    for penalty in _PENALTIES:
        steps = [StandardScaler(), LogisticRegression(C=penalty, max_iter=300)]
        if squares:
            both = _WithSquares() if x.shape[1] > 8 else PolynomialFeatures(2, include_bias=False)
            steps = [StandardScaler(), both, *steps]
        found = cross_val_predict(
            make_pipeline(*steps), x, label, cv=folds, method="predict_proba"
        )[:, 1].clip(1e-9, 1 - 1e-9)
        loss = -np.log(np.where(label == 1, found, 1 - found)).mean()
        if loss < best:
            best, probability = loss, found
    odds = probability[label == 0] / (1 - probability[label == 0])
    return clipped_weights(odds * len(source) / len(target), limit)


def clipped_weights(ratio: Floats, limit: float = LIMIT) -> ImportanceWeights:
    """Cut ratios above ``limit`` times their mean and scale them to a mean of 1."""
    largest = limit * ratio.mean()
    cut = np.minimum(ratio, largest)
    return ImportanceWeights(cut / cut.mean(), float((ratio > largest).mean()), float(ratio.mean()))


def _WithSquares() -> Any:  # noqa: N802 - stands where a transformer's class would
    """Return a transformer x → (x, x²): products of many components would be too many."""
    from sklearn.preprocessing import FunctionTransformer

    return FunctionTransformer(_with_squares)


def _with_squares(x: Floats) -> Floats:
    x = np.clip(x, -4, 4)
    return np.column_stack([x, x**2])
