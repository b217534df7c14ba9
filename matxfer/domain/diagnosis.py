"""Does the source fit the target, and if not, which kind of gap is it? The whole diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.table import TableError
from matxfer.domain.concept import ConceptShift
from matxfer.domain.covariate import FEWEST, CovariateShift, covariate_shift
from matxfer.domain.kinds import unseen_elements
from matxfer.domain.sample import (
    Collection,
    Sample,
    draw,
    make_sample,
    read_collection,
)
from matxfer.domain.values import compare_values, like_quantity
from matxfer.errors import OptionError
from matxfer.model import Model, load_model
from matxfer.notebook import told_in_notebook
from matxfer.runtime import keep_large_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from matxfer.domain.remedies import Remedies


@dataclass(frozen=True, slots=True, eq=False)
class Diagnosis:
    """The gap between a source and a target.

    Attributes
    ----------
    source_name, target_name, model
        What was compared, by which model's fingerprints.
    covariate, concept
        Other structures, and other rules.
    source, target
        The samples, for figures.
    unread
        How many structures of both could not be used.
    remedies
        What helps and what does not, if it was tried.

    Examples
    --------
    >>> from matxfer.domain import diagnose
    >>> found = diagnose("solids.parquet", "examples", model="mp-small", permutations=199)
    >>> found.model, found.unread
    ('mp-small', 0)
    >>> print(next(found.lines()))
    solids.parquet → examples, seen by mp-small
    """

    source_name: str
    target_name: str
    model: str
    covariate: CovariateShift
    concept: ConceptShift
    source: Sample
    target: Sample
    unread: int
    remedies: Remedies | None = None

    def to_json(self) -> dict[str, Any]:
        """Return booleans and the statistics behind them."""
        return {
            "source": self.source_name,
            "target": self.target_name,
            "model": self.model,
            "covariate_shift": self.covariate.shift,
            "concept_shift": self.concept.shift,
            "verdict": self.verdict,
            "covariate": self.covariate.to_json(),
            "concept": self.concept.to_json(),
            "unread": self.unread,
            "remedies": self.remedies and self.remedies.to_json(),
        }

    @property
    def verdict(self) -> str:
        """The gap in one sentence or two."""
        found = self.covariate
        structures = "the structures are alike"
        if found.shift:
            kinds = "; ".join(kind.words for kind in found.kinds)
            unseen = _unseen_words(found)
            named = "; ".join(part for part in (unseen, kinds) if part)
            structures = f"covariate shift, {_strength(found.auc)}"
            structures += f": {named}" if named else ", of no kind that has a name here"
        rules = {
            True: f"concept shift: {self.concept.words}",
            False: f"no concept shift: {self.concept.words}",
            None: f"concept shift not decided: {self.concept.words}",
        }[self.concept.shift]
        return f"{structures}. {rules[0].upper()}{rules[1:]}."

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterable[str]:
        """Yield the diagnosis as text, with its evidence."""
        found = self.covariate
        yield f"{self.source_name} → {self.target_name}, seen by {self.model}"
        head = f"covariate shift: {'yes, ' + _strength(found.auc) if found.shift else 'no'}"
        yield (
            f"{head} (classifier AUC {found.auc:.3f}, p {found.p_value:.2g}; {found.n_source} and "
            f"{found.n_target} distinct structures)"
        )
        if unseen := _unseen_words(found):
            yield f"  {unseen}"
        for kind in found.kinds:
            yield f"  {kind.words}"
        if found.copies["shared"]:
            yield f"  {found.copies['shared']} of the materials compared are in both"
        yield f"  {found.weights.words()}"
        outside = float((found.novelty > 1).mean())
        yield f"  {outside:.0%} of the target structures lie beyond the source's rim (its own: 5%)"
        far = (f"{each['id']} {each['formula']} ({each['novelty']:.1f})" for each in found.farthest)
        if found.shift:
            yield f"  farthest out: {', '.join(list(far)[:5])}"
        answer = {True: "yes", False: "no", None: "not decided"}[self.concept.shift]
        yield f"concept shift: {answer} ({self.concept.way})"
        yield f"  {self.concept.words}"
        for effect in self.concept.effects:
            unit = f" {self.concept.unit}" if self.concept.unit else ""
            yield (
                f"  {effect.name}: {effect.value:+.3g}, moves values by {effect.size:.3g}{unit}, "
                f"p {effect.p_adjusted:.2g}{'' if effect.matters else ', does not matter'}"
            )
        if self.concept.effects:
            known, own = self.concept.own_error, ", by the spread of the values"
            if known:
                own = f", half of its own error of {known:.3g} ({self.concept.reference})"
            yield (
                f"  mean absolute difference {self.concept.mae:.3g} (n = {self.concept.n}); sizes "
                f"matter from {self.concept.threshold:.3g} on{own}"
            )
        if self.remedies is not None:
            yield from self.remedies.lines()


@told_in_notebook("on_graphs", "building graphs")
def diagnose(
    source: Any,
    target: Any,
    *,
    column: str | None = None,
    source_column: str | None = None,
    model: str | Path | Model = "mp-base",
    layers: Sequence[int] | None = None,
    sample: int = 1000,
    split_column: str | None = None,
    structure_column: str | None = None,
    permutations: int = 499,
    try_remedies: bool = False,
    seed: int = 0,
    on_graphs: Callable[[int], None] | None = None,
) -> Diagnosis:
    """Tell whether a source fits a target, and which kind of gap there is.

    Parameters
    ----------
    source, target
        Tables or data frames, or whatever :func:`matxfer.predict` takes.
    column
        Column of the target's values; without one only structures are compared.
    source_column
        Column of the source's values, where it has another name.
    model
        The source model: its fingerprints, and its predictions where it knows the quantity.
    layers
        Layers whose fingerprints are compared; ``None``: the first, the middle and the last.
    sample
        At most so many structures of each are looked at closely; elements and copies are those of
        all structures.
    split_column
        Column of the source that says ``train``, ``val`` or ``test``; ``None``: ``split``, if there
        is one. The model's own error is that on rows that it was not fitted to.
    structure_column
        Column of structures, see :mod:`matxfer.readers`.
    permutations, seed
        Of the tests; and of the samples.
    try_remedies
        Try corrections, importance weights and invariant features, and measure them on target
        values (:mod:`matxfer.domain.remedies`).
    on_graphs
        Called with the number of graphs built since the last call.

    Returns
    -------
    Diagnosis

    Raises
    ------
    TableError
        If a column is missing, or there are too few structures.
    OptionError
        If an option is out of its range.

    Examples
    --------
    >>> from matxfer.domain import diagnose
    >>> found = diagnose("solids.parquet", "examples", model="mp-small", permutations=199)
    >>> found.to_json()["covariate_shift"], found.to_json()["concept_shift"]
    (True, None)
    """
    keep_large_blocks()
    base = model if isinstance(model, Model) else load_model(model)
    chosen = _layers(base, layers)
    if sample < FEWEST:
        raise OptionError(f"sample is {sample}, but must be at least {FEWEST}")
    if permutations < 199:
        raise OptionError(f"permutations is {permutations}, but must be at least 199")
    names = [column] if column else []
    like = like_quantity(column, base) if column else None
    theirs = [n for n in (source_column, column, like) if n]
    wide = read_collection(
        source, theirs, split_column=split_column, structure_column=structure_column
    )
    goal = read_collection(target, names, structure_column=structure_column)
    for name, found in ((column, goal), (source_column, wide)):
        if name and name not in found.values:
            raise TableError(f"{found.name}: there is no column {name!r}")
    named = next((n for n in theirs if n in wide.values), None) if column else None
    rows = [_rows(wide, named), _rows(goal, column)]
    picked = [draw(rows[0], sample, seed), draw(rows[1], sample, seed + 1)]
    ours = make_sample(base, wide, picked[0], chosen, on_graphs)
    other = make_sample(base, goal, picked[1], chosen, on_graphs)
    for found, drawn in ((wide, ours), (goal, other)):
        if len(drawn) < FEWEST:
            raise TableError(
                f"{found.name}: {len(drawn)} usable structure(s), but at least {FEWEST} are needed"
            )
    unseen = unseen_elements(
        [wide.compositions[k] for k in rows[0]], [goal.compositions[k] for k in rows[1]]
    )
    shift = covariate_shift(ours, other, unseen, permutations=permutations, seed=seed)
    rules = ConceptShift(None, "nothing to compare", "no column of values was named")
    if column:
        rules = compare_values(
            base, (wide, ours), (goal, other), (column, named, like), shift, seed
        )
    remedies = None
    if try_remedies:
        remedies = _remedies(base, wide, goal, (column, named), sample, seed, on_graphs)
    unread = wide.failed + goal.failed + ours.failed + other.failed
    return Diagnosis(wide.name, goal.name, base.name, shift, rules, ours, other, unread, remedies)


def _remedies(
    base: Model,
    source: Collection,
    target: Collection,
    columns: tuple[str | None, str | None],
    sample: int,
    seed: int,
    on_graphs: Callable[[int], None] | None,
) -> Remedies:
    from matxfer.domain.remedies import try_remedies

    column, named = columns
    if column is None:
        raise OptionError("remedies are measured on values: name their column (--target)")
    return try_remedies(
        base, source, target, (column, named), sample=sample, seed=seed, on_graphs=on_graphs
    )


def _layers(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    last = model.backbone.n_layers
    if layers is None:
        return tuple(sorted({0, last // 2, last}))
    if not layers or not set(layers) <= set(range(last + 1)):
        raise OptionError(f"layers are {list(layers)}, but must be among {list(range(last + 1))}")
    return tuple(sorted(set(layers)))


def _rows(collection: Collection, column: str | None) -> NDArray[np.int64]:
    """Return the rows that have a value, or all where no values matter."""
    if column is None:
        return np.arange(len(collection))
    rows = np.flatnonzero(np.isfinite(collection.values[column]))
    if not len(rows):
        raise TableError(f"{collection.name}: no usable structure has a value in {column!r}")
    return rows


def _strength(auc: float) -> str:
    """Say how far two tables are apart."""
    steps = ((0.6, "slight"), (0.75, "moderate"), (0.9, "strong"), (0.98, "very strong"))
    return next((word for most, word in steps if auc < most), "hardly any overlap")


def _unseen_words(found: CovariateShift) -> str:
    if not found.unseen.numbers:
        return ""
    symbols = found.unseen.symbols
    more = f" and {len(symbols) - 8} more" if len(symbols) > 8 else ""
    share = f"{found.unseen.share:.1%} of the target structures"
    return f"elements unseen in the source: {', '.join(symbols[:8])}{more} (in {share})"
