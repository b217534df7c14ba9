"""Tables of Matbench v0.1: errors of the tasks beside published ones, and of the folds."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from matxfer.benchmark.markdown import Table, spread
from matxfer.benchmark.matbench import N_FOLDS
from matxfer.data.table import TableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matxfer.benchmark.matbench import MatbenchData
    from matxfer.benchmark.records import Record
    from matxfer.model import Model

    Played = Sequence[tuple[MatbenchData, Sequence[Record]]]

TITLE = "Matbench v0.1"
#: Methods of the file of published results, in this order.
_METHODS = ("best", "coGN", "ALIGNN", "MODNet", "MEGNet", "CGCNN", "JMP-L")
_FILE = "published_results.json"


def published_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return errors published for the tasks, by short name; empty if the file is not there.

    Raises
    ------
    TableError
        If the file is damaged.
    """
    places = (folder / _FILE, folder.resolve().parent / _FILE)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["matbench"]["tasks"])
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(
            f"{path}: holds no results of Matbench ({error!r}); fetch it again, or move it away"
        ) from error


def notes_on(base: Model, played: Played, options: Mapping[str, Any]) -> list[str]:
    """Return what readers of the figures must know."""
    scratch = options.get("strategy") == "scratch"
    notes = []
    seen = [data.task.name for data, _ in played if data.task.seen_by(base)]
    if seen and not scratch:
        notes.append(
            f"{base.name} was pretrained on labels of {', '.join(seen)}, those of test rows among "
            "them: these figures are no measure of transfer and not comparable with others."
        )
    if not scratch:
        notes.append(
            f"The base is pretrained on Materials Project data ({', '.join(base.heads)}); see "
            f"matxfer models {base.name} for what it has and has not seen."
        )
    stand_ins = [data.task.name for data, _ in played if data.stand_in]
    if stand_ins:
        notes.append(f"Not the benchmark's rows: {', '.join(stand_ins)}. Not to be submitted.")
    for data, records in played:
        count = sum(r["parameters"]["unusable_test_structures"] for r in records)
        if count:
            notes.append(
                f"{data.task.name}: {count} test structure(s) cannot be used and were given the "
                "median of the training values."
            )
    return notes


def summary(played: Played) -> dict[str, Any]:
    """Return mean and spread of each figure over the folds, by task."""
    found: dict[str, Any] = {}
    for data, records in played:
        figures = [r["scores"] | ({"auc": r["auc"]} if "auc" in r else {}) for r in records]
        found[data.task.name] = {
            "unit": data.task.unit,
            "folds": [r["run"]["fold"] for r in records],
            "stand_in": data.stand_in,
            "seconds": round(sum(r["seconds"] for r in records), 1),
            **{
                name: {
                    "mean": statistics.mean(f[name] for f in figures),
                    "std": statistics.stdev(f[name] for f in figures) if len(figures) > 1 else None,
                }
                for name in figures[0]
            },
        }
    return found


def tables(played: Played, published: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return the errors of tasks beside published ones, and of every fold."""
    known = [m for m in _METHODS if any(m in published.get(d.task.short, {}) for d, _ in played)]
    errors = Table(
        "Tasks",
        ("task", "unit", "folds", "ours", "of a constant", *known),
        note="Mean absolute error, mean and sample standard deviation over the folds; classes: "
        "area under the ROC curve of the probabilities, and as the benchmark takes it (of classes, "
        'which is balanced accuracy). "Of a constant": mean absolute deviation.',
    )
    folds = Table("Folds", ("task", "fold", "test", "RMSE", "chosen", "validation", "s"))
    for data, records in played:
        task = data.task
        mine = spread([r["scores"]["rocauc" if task.classes else "mae"] for r in records])
        if task.classes:
            mine = f"{spread([r['auc'] for r in records])}; {mine}"
        done = str(len(records)) if len(records) == N_FOLDS else f"{len(records)} of {N_FOLDS}"
        if data.stand_in:
            done += ", stand-in"
        constant = "0.5" if task.classes else f"{_deviation(data):.4g}"
        others = [str(published.get(task.short, {}).get(method, "–")) for method in known]
        errors.rows.append((task.name, task.unit or "–", done, mine, constant, *others))
        for record in records:
            scores, said = record["scores"], record["parameters"]
            validation = said.get("validation_mae", [])
            folds.rows.append((
                task.name,
                record["run"]["fold"],
                f"{record['auc'] if task.classes else scores['mae']:.4g}",
                "–" if task.classes else f"{scores['rmse']:.4g}",
                "; ".join(dict.fromkeys(said["chosen"])),
                f"{statistics.mean(validation):.4g}" if validation else "–",
                f"{record['seconds']:.0f}",
            ))  # fmt: skip
    return [errors, folds]


def _deviation(data: MatbenchData) -> float:
    return float(abs(data.values - data.values.mean()).mean())
