"""Which values a concept shift is read from: two columns, a column and predictions, or a map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.properties import apply_transform, property_of, unit_of
from matxfer.domain import concept
from matxfer.domain.concept import ConceptShift, Values
from matxfer.domain.sample import HELD_OUT, Collection, Sample, draw
from matxfer.nn.plugin_head import like_source
from matxfer.prediction import predict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.data.properties import Property
    from matxfer.domain.covariate import CovariateShift
    from matxfer.model import Model

#: Structures that both tables hold, with values: from so many on they are compared directly.
FEWEST_MATCHED = 30
#: So many of them, and so many held-out rows of the source, are looked at at most.
MOST_MATCHED, MOST_HELD_OUT = 5000, 500


def like_quantity(column: str, model: Model) -> str | None:
    """Return the source property that is the same quantity as a column, if there is one.

    The same name, a like energy, or a name that goes on where that of the property has its unit
    (``band_gap_hse_ev`` after ``band_gap_ev``).
    """
    if found := like_source(property_of(column), model.heads):
        return found
    for name, head in model.heads.items():
        stem = "_".join(name.split("_")[:2])
        if unit_of(column) == head.prop.unit and column.startswith(f"{stem}_"):
            return name
    return None


def compare_values(
    model: Model,
    source: tuple[Collection, Sample],
    target: tuple[Collection, Sample],
    columns: tuple[str, str | None, str | None],
    shift: CovariateShift,
    seed: int,
) -> ConceptShift:
    """Choose the way of comparing that the data allow, and compare.

    Parameters
    ----------
    model
        The source model.
    source, target
        All structures, and the sample of them that the model was run on.
    columns
        The target's column, the source's (if there is one), and the model's property that is the
        same quantity (if there is one).
    shift
        Says which target structures lie within the source.
    seed
        Of samples, folds and permutations.
    """
    column, named, like = columns
    wide, goal, drawn = source[0], target[0], target[1]
    prop = model.heads[like].prop if like else property_of(column)
    unit = f"{prop.transform}({prop.unit})" if prop.transform.startswith("log") else prop.unit
    if named:
        matched = _matched(wide, goal, named, column, prop)
        if len(matched) >= FEWEST_MATCHED:
            names = (column, named, unit)
            return concept.same_structures(matched, _card_error(model, like), names, seed=seed)
    inside = shift.novelty <= 1
    values = _fitted(prop, goal.values[column][drawn.index])
    if like:
        guess = _fitted(prop, drawn.predicted[like])
        reference, where = _held_out(model, wide, named, like, prop, seed)
        target_values = Values(drawn.crystals, drawn.compositions, values, guess)
        return concept.residuals(
            target_values, reference, _card_error(model, like), where, (column, like, unit),
            within=inside, seed=seed,
        )  # fmt: skip
    if named:
        return _by_own_model(source, target, (column, named, unit), inside, seed)
    return concept.other_quantity(
        goal.values[column][drawn.index], drawn.predicted, column, unit_of(column), seed
    )


def _fitted(prop: Property, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values on the scale on which errors are compared: logarithms stay logarithms."""
    return apply_transform(prop.transform, values) if prop.transform.startswith("log") else values


def _card_error(model: Model, name: str | None) -> float | None:
    """Return the error on test rows that the model's card tells, on the fitted scale."""
    if name is None:
        return None
    figures = model.card.get("figures", {}).get(name, {}).get("test", {})
    scale = model.heads[name].prop.transform
    found = figures.get(f"mae_{scale}" if scale.startswith("log") else "mae")
    return float(found) if found else None


def _held_out(
    model: Model, source: Collection, named: str | None, like: str, prop: Property, seed: int
) -> tuple[Values | None, str]:
    """Return source rows that the model was not fitted to, with predictions."""
    if named is None:
        return None, "the model card"
    known = np.isfinite(source.values[named])
    held = known & np.isin(source.split, HELD_OUT)
    where = "held-out rows of the source"
    if held.sum() < concept.FEWEST:
        held, where = known, "rows of the source (the model may have been fitted to them)"
    rows = draw(np.flatnonzero(held), MOST_HELD_OUT, seed + 2)
    crystals = [source.crystals[k] for k in rows]
    guess = predict(crystals, model=model)[like].to_numpy(dtype=float)
    found = Values(
        crystals,
        [source.compositions[k] for k in rows],
        _fitted(prop, source.values[named][rows]),
        _fitted(prop, guess),
    ).known()
    if len(found) < concept.FEWEST:
        return None, "the model card"
    return found, where


def _matched(
    source: Collection, target: Collection, named: str, column: str, prop: Property
) -> Values:
    """Return the structures that both tables hold, with their two values."""
    known = np.isfinite(source.values[named])
    place: dict[Any, int] = {}
    for k in np.flatnonzero(known).tolist():
        for key in _keys(source, k):
            place.setdefault(key, k)
    pairs = []
    for k in np.flatnonzero(np.isfinite(target.values[column])).tolist():
        found = next((place[key] for key in _keys(target, k) if key in place), None)
        if found is not None:
            pairs.append((found, k))
    kept = np.array(pairs, dtype=np.int64).reshape(-1, 2)[:MOST_MATCHED]
    return Values(
        [target.crystals[k] for k in kept[:, 1]],
        [target.compositions[k] for k in kept[:, 1]],
        _fitted(prop, target.values[column][kept[:, 1]]),
        _fitted(prop, source.values[named][kept[:, 0]]),
    ).known()


def _keys(collection: Collection, row: int) -> list[Any]:
    """Return what names a material: its structure, and its id with the composition."""
    crystal = collection.crystals[row]
    keys: list[Any] = [crystal.content_key()]
    if crystal.id and not crystal.id.isdigit():  # row numbers stand in for missing ids
        keys.append((crystal.id, collection.compositions[row]))
    return keys


def _by_own_model(
    source: tuple[Collection, Sample],
    target: tuple[Collection, Sample],
    names: tuple[str, str, str],
    inside: NDArray[np.bool_],
    seed: int,
) -> ConceptShift:
    """Compare residuals of kernel ridge on fingerprints, fitted to the source's own values."""
    import torch

    from matxfer.transfer.features import fit_features

    (wide, ours), (goal, drawn) = source, target
    column, named, _ = names
    y = wide.values[named][ours.index]
    mean, spread = float(y.mean()), float(y.std()) or 1.0
    order = np.random.default_rng(seed).permutation(len(y))
    train, val, held = np.split(order, [int(0.6 * len(y)), int(0.75 * len(y))])
    x = torch.from_numpy(np.concatenate(list(ours.layers.values()), axis=1)).float()
    readout = fit_features("kernel_ridge", x, (y - mean) / spread, train, val, seed)

    def guess(found: Sample) -> NDArray[np.float64]:
        rows = torch.from_numpy(np.concatenate(list(found.layers.values()), axis=1)).float()
        return np.asarray(readout(rows, None).mean(0).double().numpy() * spread + mean)

    own = Values(
        [ours.crystals[k] for k in held],
        [ours.compositions[k] for k in held],
        y[held],
        guess(ours)[held],
    )
    there = Values(
        drawn.crystals, drawn.compositions, goal.values[column][drawn.index], guess(drawn)
    )
    where = "held-out rows of the source, of a kernel ridge on fingerprints"
    return concept.residuals(there, own, None, where, names, within=inside, seed=seed)
