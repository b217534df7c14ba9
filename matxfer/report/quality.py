"""How good a plugin is: parity, errors by element, calibration, training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import MatxferError
from matxfer.html import Markup, join, table
from matxfer.plot.agreement import draw_parity
from matxfer.plot.curves import curves_of, training_curve
from matxfer.plot.elements import residuals_by_element
from matxfer.plot.trust import draw_calibration
from matxfer.plot.values import of_record
from matxfer.report.drawing import drawn
from matxfer.report.parts import figure, missing, row
from matxfer.transfer.summary import errors_table, trials_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matxfer.plot.values import Values
    from matxfer.report.record import Record

#: More points than this are drawn at random.
_MOST_POINTS = 4000
_WORST = 10
#: So many trials of ``auto`` are drawn.
_CURVES = 6
_NONE = "The plugin keeps no predictions, see above."
_KEEP = "made before matxfer kept them, or with --keep-predictions 0"
_LOST = "its base was consolidated with a later plugin since, and its own table was not at hand"


def known_parts(record: Record) -> list[tuple[str, Values]]:
    """Return the parts whose predictions are known, at most :data:`_MOST_POINTS` rows of each.

    Raises
    ------
    OptionError
        If there is none.
    """
    found = []
    for part in record.parts:
        try:
            found.append((part, _thinned(of_record(record.meta, part))))
        except MatxferError:
            if part == record.parts[-1] and not found:
                raise
    return found


def _thinned(found: Values) -> Values:
    if len(found) <= _MOST_POINTS:
        return found
    return found.take(np.sort(np.random.default_rng(0).choice(len(found), _MOST_POINTS, False)))


def parity_section(record: Record) -> Any:
    """Return predictions against true values, the errors and the worst rows."""
    errors = errors_table(record.meta)
    if not record.meta.get("predictions"):
        lost = record.meta.get("consolidated") and not record.meta.get("figures")
        why = _LOST if lost else _KEEP
        note = missing(
            f"The plugin keeps no predictions ({why}): no figures of them. Run matxfer report "
            "with --data TABLE to predict its rows anew."
        )
        return join([errors or "", note])
    shown = []
    for k, (part, found) in enumerate(known_parts(record)[:2]):
        usable = found.known(part)

        def draw(axis: Any, found: Values = found) -> None:
            draw_parity(axis, found)

        points = [
            (x, y, f"{name} {formula}: {x:.4g}, predicted {y:.4g}")
            for x, y, name, formula in zip(
                usable.truth, usable.predicted, _padded(usable.names, len(usable)),
                _padded(usable.formulas, len(usable)), strict=True,
            )
        ]  # fmt: skip
        alt = f"predictions against true values, {part} rows"
        picture = drawn(f"parity-{k}", alt, draw, 3.1, 3.1, points)
        drawn_of = f", {len(found):,} of {found.rows:,} drawn" if found.rows > len(found) else ""
        shown.append(figure(picture, f"{part} rows{drawn_of}; vertical lines: intervals"))
    first, found = known_parts(record)[0]
    return join([errors or "", row(*shown), _worst(found.known(first), first)])


def _worst(found: Values, part: str) -> Markup:
    order = np.argsort(-np.abs(found.predicted - found.truth), kind="stable")[:_WORST]
    unit = f" ({found.prop.unit})" if found.prop.unit else ""
    names, formulas = (_padded(w, len(found)) for w in (found.names, found.formulas))
    rows = []
    for k in order:
        cells: list[Any] = [
            names[k],
            formulas[k],
            *map(float, (found.truth[k], found.predicted[k])),
        ]
        cells.append(float(found.predicted[k] - found.truth[k]))
        if found.has_intervals:
            cells.append(f"{found.lower[k]:.4g} to {found.upper[k]:.4g}".replace("-", "−"))
        if len(found.ood):
            cells.append(float(found.ood[k]))
        rows.append(cells)
    head = ["id", "formula", f"true{unit}", "predicted", "error"]
    head += [f"{found.level:.0%} interval"] if found.has_intervals else []
    head += ["out of domain"] if len(found.ood) else []
    return table(head, rows, f"Largest errors of the {part} rows", class_="wide")


def _padded(words: Sequence[str], n: int) -> Sequence[str]:
    return words if len(words) == n else [""] * n


def elements_section(record: Record) -> Any:
    """Return the mean absolute errors of the materials that hold each element."""
    if not record.meta.get("predictions"):
        return missing(_NONE)
    part, found = known_parts(record)[0]
    usable = found.known(part)

    def draw(axis: Any) -> None:
        residuals_by_element(
            usable.truth, usable.predicted, usable.formulas, target=usable.prop.name, ax=axis
        )

    alt = f"mean absolute error by element, {part} rows"
    caption = (
        f"{part} rows. Colour: mean absolute error of the materials with the element; dot: fewer "
        "than five of them; grey: none."
    )
    return figure(drawn("residuals", alt, draw, 5.0, 3.1), caption)


def calibration_section(record: Record) -> Any:
    """Return the coverage of the intervals at every level."""
    if not record.meta.get("predictions"):
        return missing(_NONE)
    parts = dict(known_parts(record))
    part = next(iter(parts))
    found, reference = parts[part], None
    if part != "val" and "val" in parts and parts["val"].has_intervals:
        reference = parts["val"]
    if not found.has_intervals:
        return missing("The plugin gives no intervals.")

    def draw(axis: Any) -> None:
        draw_calibration(axis, found, found.level, reference)

    picture = drawn("calibration", f"coverage against promise, {part} rows", draw, 3.1, 3.0)
    how = "conformal, by the validation rows" if reference else "stretched as for normal errors"
    caption = (
        f"Share of the {part} rows inside intervals of every level ({how}). Shade: where a "
        "calibrated model lies in 95 of 100 cases."
    )
    figures = (record.meta.get("figures") or {}).get(part) or {}
    ranks = {
        "of the errors with the spread (_std)": figures.get("rank_correlation_of_error_and_std"),
        "of the errors with the distance (ood)": figures.get("rank_correlation_of_error_and_ood"),
    }
    known = {key: value for key, value in ranks.items() if value is not None}
    rows = table((f"rank correlation, {part} rows", ""), known.items()) if known else ""
    return join([figure(picture, caption), rows])


def training_section(record: Record) -> Any:
    """Return the learning curves and what was tried."""
    meta = record.meta
    tried = trials_table(meta)
    if record.is_potential:
        curves, best = {"validation": meta.get("history") or []}, meta.get("best_epoch")
        label = "weighted validation error"
    else:
        curves, best, label = curves_of(meta)
    if not any(len(values) for values in curves.values()):
        note = missing("No learning curve: nothing was trained epoch by epoch, or it was not kept.")
        return join([tried or "", note])
    drawn_of = dict(list(curves.items())[:_CURVES])

    def draw(axis: Any) -> None:
        training_curve(drawn_of, best=best, label=label, ax=axis)

    numbered = " Numbers are those of the table above." if tried is not None else ""
    caption = f"Error after each epoch.{numbered}"
    return join([tried or "", figure(drawn("training", "learning curves", draw), caption)])


def potential_section(record: Record) -> Any:
    """Return the errors of a potential's plugin, before and after the fine-tuning."""
    meta = record.meta
    names = {
        "validation_before": "validation, before",
        "validation": "validation",
        "test_before": "test, before",
        "test": "test",
    }
    units = {
        "energy_mae_ev_per_atom": "energy MAE (eV/atom)",
        "forces_mae_ev_per_a": "forces MAE (eV/Å)",
        "stress_mae_ev_per_a3": "stress MAE (eV/Å³)",
    }
    present = [key for key in units if any(key in (meta.get(part) or {}) for part in names)]
    rows = [
        [words, *((meta.get(part) or {}).get(key) for key in present)]
        for part, words in names.items()
        if meta.get(part)
    ]
    if not rows:
        return missing("plugin.json holds no errors")
    return table(["rows", *(units[key] for key in present)], rows, "Errors")
