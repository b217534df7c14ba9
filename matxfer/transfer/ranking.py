"""A ranking of source models: which are better than what no pretraining gives, and how surely."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from matxfer.model import Model
    from matxfer.transfer.scoring import Scored

    Floats = NDArray[np.float64]

#: Standard errors that a gain has to be away from none: 5 % one-sided.
_SURE = 1.645


class Verdict(StrEnum):
    """What is expected of a model as a base."""

    HELPS = "helps"
    UNCLEAR = "no clear gain"
    NEGATIVE = "negative transfer expected"


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A model, or a baseline, and what was measured of it.

    Attributes
    ----------
    name
        Of the model; ``composition``, or ``untrained, shape of …``.
    scored
        Scores by layer, and the error of each row.
    model
        ``None``: features of no network.
    rivals
        Of a model: the baselines that it has to beat, by name. Of a baseline: empty.
    seconds
        That it took.
    error, spread
        Mean absolute error over the rows of the ranking, and its standard error over materials, in
        the target's unit.
    gain, gain_spread
        By how much the error is smaller than that of the best rival, ``against``, and the standard
        error of the paired difference.
    verdict, reason
        In words; ``None`` for baselines.
    """

    name: str
    scored: Scored
    model: Model | None
    rivals: tuple[str, ...] = ()
    seconds: float = 0.0
    error: float = np.nan
    spread: float = np.nan
    gain: float = np.nan
    gain_spread: float = np.nan
    against: str = ""
    verdict: Verdict | None = None
    reason: str = ""

    @property
    def best_layer(self) -> int | None:
        """The single layer whose features are best; ``None`` for those of no network."""
        single = {k: s for k, s in self.scored.by_layers.items() if k and "," not in k}
        if not single:
            return None
        return int(min(single, key=lambda k: single[k]["kernel_ridge"]))

    def to_json(self) -> dict[str, Any]:
        """Return all but rows and weights."""
        found: dict[str, Any] = {
            "name": self.name,
            "sha256": self.model.checksum if self.model is not None else None,
            "error": self.error,
            "spread": self.spread,
            "layers": list(self.scored.layers),
            "best_layer": self.best_layer,
            "scores": self.scored.scores,
            "by_layers": {k: s["kernel_ridge"] for k, s in self.scored.by_layers.items()},
            "seconds": self.seconds,
        }
        if self.verdict is not None:
            found |= {"gain": self.gain, "gain_spread": self.gain_spread, "against": self.against}
            found |= {"verdict": str(self.verdict), "reason": self.reason}
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Models in the order of their use for a target.

    Attributes
    ----------
    table, target, unit
        Of the target.
    rows, of_rows
        How many training rows were looked at, of how many.
    sources
        The models, those that are of use first, then by their errors.
    baselines
        What they were compared with.
    left_out
        Why other models were no candidates, by name.
    seconds
        That it took.
    """

    table: str
    target: str
    unit: str
    rows: int
    of_rows: int
    sources: tuple[Source, ...]
    baselines: tuple[Source, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def best(self) -> Source | None:
        """The best model; ``None`` where negative transfer is expected of all."""
        first = self.sources[0]
        return None if first.verdict is Verdict.NEGATIVE else first

    @property
    def refused(self) -> dict[str, str]:
        """Models of which negative transfer is expected, and why."""
        return {s.name: s.reason for s in self.sources if s.verdict is Verdict.NEGATIVE}

    def to_json(self) -> dict[str, Any]:
        """Return what the file of a plugin keeps."""
        return {
            "target": self.target,
            "unit": self.unit,
            "rows": self.rows,
            "of_rows": self.of_rows,
            "method": "leave-one-out errors of kernel ridge regression on frozen features of "
            "training rows",
            "chosen": None if self.best is None else self.best.name,
            "sources": [source.to_json() for source in self.sources],
            "baselines": [source.to_json() for source in self.baselines],
            "left_out": self.left_out,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        order = ", ".join(f"{s.name} {s.error:.4g} ({s.verdict})" for s in self.sources)
        return f"Ranking({self.target!r}: {order})"


def ranked(
    sources: Sequence[Source], baselines: Sequence[Source], group: NDArray[np.int64]
) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """Measure all on the rows that all can use, judge the models, and sort them.

    Parameters
    ----------
    group
        Number of the material of each row, (G,): rows of one are no independent evidence.
    """
    everyone = [*sources, *baselines]
    common = np.flatnonzero(np.isfinite([s.scored.errors for s in everyone]).all(axis=0))
    group = group[common]

    def measured(source: Source) -> Source:
        error, spread = mean_and_spread(source.scored.errors[common], group)
        return replace(source, error=error, spread=spread)

    known = {b.name: measured(b) for b in baselines}
    judged = []
    for source in map(measured, sources):
        rival = min((known[name] for name in source.rivals), key=lambda b: b.error)
        difference = (rival.scored.errors - source.scored.errors)[common]
        gain, spread = mean_and_spread(difference, group)
        judged.append(_judged(replace(source, gain=gain, gain_spread=spread), rival))
    judged.sort(key=lambda s: (s.verdict is Verdict.NEGATIVE, s.error))
    return tuple(judged), tuple(sorted(known.values(), key=lambda b: b.error))


def _judged(source: Source, rival: Source) -> Source:
    gain, spread = source.gain, source.gain_spread
    told = f"error {source.error:.4g} against {rival.error:.4g} of {rival.name}"
    reason, verdict = told, Verdict.HELPS
    if source.model is not None and (skill := useless_skill(source.model)):
        verdict, reason = Verdict.NEGATIVE, skill
    elif not gain > 0:
        verdict, reason = Verdict.NEGATIVE, f"{told}, which needs no pretraining"
    elif gain < _SURE * spread:
        verdict = Verdict.UNCLEAR
        reason = f"{told}, a difference of {gain:.2g} ± {spread:.2g}"
    return replace(source, against=rival.name, verdict=verdict, reason=reason)


def useless_skill(model: Model) -> str:
    """Say why a model has learnt nothing from its own source, if its card shows it; else ``""``.

    It has if on its own held-out rows no property is predicted better than by a constant, R² ≤ 0.
    A model that learned structures or forces besides says nothing by its properties.
    """
    data = model.card.get("data", [])
    if any(t.get("denoise_angstrom") or t.get("forces") for t in data if isinstance(t, dict)):
        return ""
    found = dict(_held_out_r2(model.card.get("figures", {})))
    if not found or max(found.values()) > 0:
        return ""
    told = ", ".join(f"{name} {r2:.2f}" for name, r2 in found.items())
    return (
        f"on its own held-out rows it predicts no better than a constant (R²: {told}); it has "
        "learnt nothing that could be transferred, so look at the labels that it was trained on"
    )


def _held_out_r2(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, parts in figures.items():
        for part in ("test", "val"):
            r2 = parts.get(part, {}).get("r2")
            if r2 is not None:
                yield name, float(r2)
                break


def mean_and_spread(values: Floats, group: NDArray[np.int64]) -> tuple[float, float]:
    """Return the mean of values (n,) and its standard error, rows of one group counted together.

    The variance of a mean over clusters (Liang & Zeger, Biometrika 73, 13 (1986)); with groups of
    one row it is that of the mean.
    """
    mean = float(values.mean())
    _, number = np.unique(group, return_inverse=True)
    sums = np.bincount(number, values - mean)
    n = len(sums)
    if n < 2:
        return mean, float("nan")
    return mean, float(np.sqrt((sums**2).sum() * n / (n - 1)) / len(values))
