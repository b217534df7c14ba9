"""Concept shift: whether the same structure has another value in the target than in the source.

Three ways, by what is known. *The same structures* in both tables: their two values are compared.
*The same quantity*: residuals of the source model on target structures, against the errors that it
makes on source rows that it was not fitted to; only structures within the source's rim count, since
beyond it errors say nothing about the rules. *Another quantity*: how much of it a linear or a
monotone map of a source prediction explains.

What does not move values by half of the source's own error does not matter, however sure it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.domain.effects import class_offsets, element_offsets, systematic_effects
from matxfer.domain.structures import chemical_class, element_fractions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.crystal import Crystal
    from matxfer.domain.effects import Effect
    from matxfer.pretraining.exclusion import Composition

    Floats = NDArray[np.float64]

#: An effect matters if it moves values by this share of the source's own mean absolute error …
MATERIAL = 0.5
#: … or, where that is not known, by this share of the values' standard deviation.
MATERIAL_SPREAD = 0.05
#: Fewer structures than this decide nothing.
FEWEST = 20
#: So much of the variance of another quantity must a map explain for the rules to be the same.
EXPLAINED = 0.9
_FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class ConceptShift:
    """What is known of the difference between two sets of values.

    Attributes
    ----------
    shift
        Whether the rules differ; ``None``: it cannot be told.
    way
        ``"same structures"``, ``"residuals"``, ``"other quantity"``, or ``"nothing to compare"``.
    words
        What was found, and why.
    target, source
        The column, and what it was compared with.
    unit
        Of sizes.
    n
        Number of target structures compared.
    own_error, threshold
        Mean absolute error of the source on its own ground (``None``: unknown), and the least size
        that matters.
    reference
        Where the source's own error comes from.
    mae
        Mean absolute difference.
    effects
        Offset, scale, dependence on composition.
    elements
        Symbol → difference per atom of the element, and the number of compounds.
    classes
        Classes of compounds whose mean differs from the common offset, with it and their number.
    maps
        Of another quantity: Spearman's ρ and shares of variance explained, by source property.
    points
        Of each structure what the source says, the target's value and the class, for figures.
    """

    shift: bool | None
    way: str
    words: str
    target: str = ""
    source: str = ""
    unit: str = ""
    n: int = 0
    own_error: float | None = None
    threshold: float | None = None
    reference: str = ""
    mae: float | None = None
    effects: list[Effect] = field(default_factory=list)
    elements: dict[str, tuple[float, int]] = field(default_factory=dict)
    classes: list[tuple[str, float, int]] = field(default_factory=list)
    maps: dict[str, dict[str, float]] = field(default_factory=dict)
    points: tuple[Floats, Floats] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all but what has one entry per structure."""
        names = ("shift", "way", "words", "target", "source", "unit", "n", "own_error")
        more = ("threshold", "reference", "mae", "elements", "classes", "maps")
        found = {name: getattr(self, name) for name in (*names, *more)}
        return found | {"effects": {e.name: asdict(e) for e in self.effects}}


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Values of n structures beside what the source says of them.

    Attributes
    ----------
    crystals, compositions
        The structures.
    value, source
        The target's value, and the source's value or prediction, (n,), in one unit.
    """

    crystals: list[Crystal]
    compositions: Sequence[Composition]
    value: Floats
    source: Floats

    def __len__(self) -> int:
        return len(self.crystals)

    def known(self, extra: NDArray[np.bool_] | None = None) -> Values:
        """Return the rows where both are known, and that are among the ``extra`` ones."""
        rows = np.isfinite(self.value) & np.isfinite(self.source)
        kept = np.flatnonzero(rows if extra is None else rows & extra).tolist()
        return Values(
            [self.crystals[k] for k in kept],
            [self.compositions[k] for k in kept],
            self.value[kept],
            self.source[kept],
        )


def same_structures(
    matched: Values, own_error: float | None, names: tuple[str, str, str], *, seed: int = 0
) -> ConceptShift:
    """Compare two values of each structure.

    Parameters
    ----------
    matched
        Structures that both tables hold.
    own_error
        Mean absolute error of the source model, if it predicts the quantity.
    names
        Target column, source column, unit.
    """
    return _judged(matched, None, own_error, "the model card", names, "same structures", seed)


def residuals(
    target: Values,
    reference: Values | None,
    own_error: float | None,
    where: str,
    names: tuple[str, str, str],
    *,
    within: NDArray[np.bool_],
    seed: int = 0,
) -> ConceptShift:
    """Compare a source model's errors on the target with those on its own ground.

    Parameters
    ----------
    target
        Target structures with values and predictions.
    reference
        Source structures that the model was not fitted to; ``None``: there are none, and errors
        are compared with zero.
    own_error, where
        Its error, where there is no reference, and what to call the place that it comes from.
    names
        Target column, source property, unit.
    within
        Which target structures lie within the source's rim.
    """
    inside = target.known(within)
    if len(inside) >= FEWEST:
        return _judged(inside, reference, own_error, where, names, "residuals", seed)
    everything = target.known()
    if len(everything) < FEWEST:
        words = f"{len(everything)} target structures have a value and a prediction: too few to say"
        return ConceptShift(None, "residuals", words, names[0], names[1], names[2], len(everything))
    found = _judged(everything, reference, own_error, where, names, "residuals", seed)
    words = (
        f"it cannot be told whether the rules differ: only {len(inside)} of {len(everything)} "
        f"target structures lie within the source, and beyond it errors are the model's own; over "
        f"all, {found.words}"
    )
    kept = {name: getattr(found, name) for name in ConceptShift.__dataclass_fields__}
    return ConceptShift(**(kept | {"shift": None, "words": words}))


def other_quantity(
    value: Floats, predicted: dict[str, Floats], target: str, unit: str, seed: int = 0
) -> ConceptShift:
    """Ask how much of another quantity a map of a source prediction explains, out of fold."""
    from scipy.stats import spearmanr
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import KFold, cross_val_predict

    maps: dict[str, dict[str, float]] = {}
    folds = KFold(_FOLDS, shuffle=True, random_state=seed)
    for name, source in predicted.items():
        rows = np.isfinite(value) & np.isfinite(source)
        x, y = source[rows], value[rows]
        if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
            continue

        def explained(model: Any, x: Floats = x, y: Floats = y) -> float:
            found = cross_val_predict(model, x[:, None], y, cv=folds)
            return float(max(1 - ((y - found) ** 2).mean() / y.var(), 0.0))

        rank = float(spearmanr(x, y).statistic)
        monotone = IsotonicRegression(increasing=rank >= 0, out_of_bounds="clip")
        maps[name] = {
            "spearman": rank,
            "linear": explained(LinearRegression()),
            "monotone": explained(monotone),
            "n": float(len(x)),
        }
    if not maps:
        words = f"too few values of {target} to relate them to the source's predictions"
        return ConceptShift(None, "other quantity", words, target, "", unit)
    best = max(maps, key=lambda name: max(maps[name]["linear"], maps[name]["monotone"]))
    figures = maps[best]
    shift = max(figures["linear"], figures["monotone"]) < EXPLAINED
    words = (
        f"{target} is another quantity; of what the source predicts {best} is nearest: Spearman "
        f"{figures['spearman']:.2f}, a linear map explains {figures['linear']:.0%} of the variance "
        f"and a monotone one {figures['monotone']:.0%}"
    )
    known = np.isfinite(value) & np.isfinite(predicted[best])
    points = (predicted[best][known], value[known])
    n = int(figures["n"])
    return ConceptShift(
        shift, "other quantity", words, target, best, unit, n, maps=maps, points=points
    )


def _judged(
    target: Values,
    reference: Values | None,
    own_error: float | None,
    where: str,
    names: tuple[str, str, str],
    way: str,
    seed: int,
) -> ConceptShift:
    from ase.data import chemical_symbols

    difference = target.value - target.source
    fractions = element_fractions(target.crystals)
    beside = None
    if reference is not None:
        error = reference.value - reference.source
        own_error = float(np.abs(error).mean())
        own = element_fractions(reference.crystals)
        beside = (error, reference.source, own, reference.compositions)
    spread = MATERIAL_SPREAD * float(np.std(target.value))
    threshold = MATERIAL * own_error if own_error else spread
    effects = systematic_effects(
        difference, target.source, fractions, target.compositions, threshold,
        reference=beside, seed=seed,
    )  # fmt: skip
    kinds = np.array([chemical_class(np.unique(c.numbers)) for c in target.crystals], dtype=str)
    offset = float(np.median(difference))
    matters = [effect.name for effect in effects if effect.matters]
    classes = class_offsets(difference, kinds, threshold, offset)
    return ConceptShift(
        bool(matters),
        way,
        _words(effects, names, threshold, classes if "composition" in matters else []),
        *names,
        n=len(target),
        own_error=own_error,
        threshold=threshold,
        reference=where if own_error else "the spread of the values",
        mae=float(np.abs(difference).mean()),
        effects=effects,
        elements={
            chemical_symbols[z]: found
            for z, found in element_offsets(difference, fractions).items()
        },
        classes=classes,
        points=(target.source, target.value),
    )


def _words(
    effects: list[Effect],
    names: tuple[str, str, str],
    threshold: float,
    classes: list[tuple[str, float, int]],
) -> str:
    column, source, unit = names
    by_name = {effect.name: effect for effect in effects}
    suffix = f" {unit}" if unit else ""
    parts = []
    if by_name["offset"].matters:
        parts.append(f"an offset of {by_name['offset'].value:+.3g}{suffix}")
    if by_name["scale"].matters:
        parts.append(f"a scale of {1 + by_name['scale'].value:.3g}")
    if by_name["composition"].matters:
        effect = by_name["composition"]
        told = ", ".join(f"{name} {mean:+.2g}{suffix} (n = {n})" for name, mean, n in classes[:6])
        parts.append(
            f"a dependence on the elements of {effect.size:.2g}{suffix}, {effect.value:.0%} of the "
            f"variance{f': {told}' if told else ''}"
        )
    if not parts:
        return (
            f"no offset, scale or dependence on the elements of {column} against {source} is sure "
            f"and larger than {threshold:.2g}{suffix}"
        )
    more = ""
    if by_name["composition"].matters and unit == "eV/atom":
        more = "; so differ correction schemes and reference energies"
    return f"{column} against {source}: {'; '.join(parts)}{more}"
