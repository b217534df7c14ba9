"""What is known of a plugin for its report: its file, and what a table at hand says more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.table import SPLITS, open_table, read_property_table
from matxfer.errors import OptionError
from matxfer.estimator.about import FOLDS
from matxfer.estimator.files import estimator_record
from matxfer.files import (
    ESTIMATOR_FORMAT,
    PLUGIN_FORMAT,
    POTENTIAL_KIND,
    FormatError,
    read_json,
    sha256,
)
from matxfer.metrics import regression_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from matxfer.domain.diagnosis import Diagnosis
    from matxfer.estimator.classifier import TransferClassifier
    from matxfer.model import Model
    from matxfer.transfer.plugin import Plugin

_META, _WEIGHTS = "plugin.json", "plugin.safetensors"
_ESTIMATOR, _ARRAYS = "estimator.json", "classifier.safetensors"
#: What ``estimator.json`` says under ``kind`` where it is that of a classifier.
CLASSIFIER_KIND = "TransferClassifier"
#: Part of rows of a table whose split is not known.
ALL = "all rows"


@dataclass(slots=True, eq=False)
class Record:
    """A plugin or a classifier, as far as it is known.

    Attributes
    ----------
    meta
        What ``plugin.json`` (of a classifier ``estimator.json``) says; predictions and figures of a
        table at hand in place of the kept.
    name
        Of the plugin.
    files
        File → size in bytes and SHA-256.
    parts
        Names of the parts whose predictions are known, the one to show first.
    notes
        What a reader should know of how this came about.
    diagnosis
        Of source and target structures, if both were at hand.
    """

    meta: dict[str, Any]
    name: str
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    parts: tuple[str, ...] = ("test", "val")
    notes: list[str] = field(default_factory=list)
    diagnosis: Diagnosis | None = None

    @property
    def is_potential(self) -> bool:
        """Whether it predicts energies, forces and stresses."""
        return self.meta.get("kind") == POTENTIAL_KIND

    @property
    def is_classifier(self) -> bool:
        """Whether it gives probabilities of classes."""
        return self.meta.get("kind") == CLASSIFIER_KIND

    @property
    def file(self) -> str:
        """Name of the file that says so."""
        return _ESTIMATOR if self.is_classifier else _META


def read_record(plugin: str | Path | Plugin | TransferClassifier) -> Record:
    """Read what a plugin or classifier says of itself; its weights are not loaded.

    Raises
    ------
    FormatError
        If there is neither ``plugin.json`` nor ``estimator.json``, or it is not readable.
    """
    if not isinstance(plugin, str | Path):
        given: Any = plugin
        # By what it can: scikit-learn need not be imported for a plugin.
        if hasattr(given, "predict_proba"):
            return _of_classifier(estimator_record(given, given.record()), "classifier")
        record = Record(dict(given.report.meta), given.name)
        folder = given.folder
    else:
        folder = Path(plugin)
        if not (folder / _META).is_file():
            return _read_classifier(folder)
        meta = read_json(folder / _META)
        record = Record(meta, str(meta.get("name") or folder.name))
    if folder is not None:
        record.files = _files(folder, (_META, _WEIGHTS))
    if (found := record.meta.get("format", PLUGIN_FORMAT)) != PLUGIN_FORMAT:
        record.notes.append(
            f"plugin.json is of format {found}, and this version of matxfer reads {PLUGIN_FORMAT}: "
            "some of it may be missing here"
        )
    return record


def _read_classifier(folder: Path) -> Record:
    """Read what the folder of an estimator without a plugin says."""
    path = folder / _ESTIMATOR
    if (folder / "card.json").is_file():
        own = sorted(str(each.parent) for each in folder.glob(f"plugins/*/{_META}"))
        there = f"; its plugins are {', '.join(own)}" if own else ""
        raise FormatError(
            f"{folder}: is a base model, of which matxfer models {folder} tells; a report is of a "
            f"plugin{there}"
        )
    if not path.is_file():
        raise FormatError(
            f"{folder}: there is no {_META}, nor the {_ESTIMATOR} of a classifier; give the folder "
            "of a plugin, such as matxfer finetune makes, or of a saved TransferClassifier"
        )
    meta = read_json(path, ESTIMATOR_FORMAT)
    if meta.get("kind") != CLASSIFIER_KIND:
        raise FormatError(
            f"{path}: holds a {meta.get('kind')!r}, of which there is no report; give the folder "
            "of a plugin or of a TransferClassifier"
        )
    record = _of_classifier(meta, folder.name)
    record.files = _files(folder, (_ESTIMATOR, _ARRAYS))
    return record


def _of_classifier(said: dict[str, Any], name: str) -> Record:
    """Return what ``estimator.json`` says under the names that plugins have for it."""
    params = said.get("params")
    figures = said.get("figures")
    meta = said | {
        "config": params if isinstance(params, dict) else {},
        "figures": {FOLDS: figures} if figures else {},
    }
    return Record(meta, name, parts=(FOLDS,))


def _files(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[int, str]]:
    paths = (folder / name for name in names)
    return {p.name: (p.stat().st_size, sha256(p)) for p in paths if p.is_file()}


def measure(
    record: Record,
    plugin: Plugin,
    table: str | Path | pd.DataFrame,
    *,
    split_column: str | None = None,
    structure_column: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Predict a table and put predictions and errors in place of those that the plugin keeps.

    Rows are told apart by the split column, or by the random split of the fine-tuning where the
    table is the one that it was trained on; else they are all shown together.

    Raises
    ------
    TableError
        If the table or a column is missing.
    """
    from matxfer.prediction import predict

    target = plugin.target
    facts = record.meta.get("data") or {}
    frame, source = open_table(table)
    column = split_column or facts.get("split_column")
    if split_column is None and column not in frame.columns:
        column = None
    path = Path(table) if isinstance(table, str | Path) else None
    same = path is not None and path.is_file() and sha256(path) == facts.get("sha256")
    seed = int((record.meta.get("config") or {}).get("seed", 0))
    data = read_property_table(
        frame, [target], split_column=column, structure_column=structure_column, seed=seed,
        source=source,
    )  # fmt: skip
    told = column is not None or same
    split = data.split if told else np.full(len(data), ALL)
    found = predict(frame, plugin, structure_column=structure_column, on_progress=on_progress)
    own = next(c for c in (f"{target}__{plugin.name}", target) if c in found.columns)
    score = "ood" if "ood" in found.columns else f"{own}_ood"
    columns = {"predicted": own, "std": f"{own}_std", "lower": f"{own}_lo", "upper": f"{own}_hi"}
    columns |= {"ood": score}
    truth = data.values[target]
    predictions, figures = {}, {}
    for part in [p for p in (*SPLITS, ALL) if (split == p).any()]:
        rows = np.flatnonzero((split == part) & np.isfinite(truth))
        if not len(rows):
            continue
        mine = found.iloc[rows]
        kept = {key: mine[name].to_list() for key, name in columns.items() if name in found.columns}
        names = {"id": mine["id"].astype(str).to_list(), "formula": mine["formula"].to_list()}
        predictions[part] = {"rows": len(rows), "truth": truth[rows].tolist(), **names, **kept}
        figures[part] = _figures(predictions[part], plugin)
    if not predictions:
        raise OptionError(f"{source}: no row of train, val or test has a value in {target!r}")
    record.meta["predictions"], record.meta["figures"] = predictions, figures
    record.parts = tuple(p for p in ("test", ALL, "val", "train") if p in predictions)
    whole = "the table that the plugin was trained on" if same else "not the plugin's own table"
    record.notes.append(f"Predicted anew for this report: {Path(source).name} ({whole}).")
    if not told:
        record.notes.append(
            "There is no split column, so some of these rows may have been trained on: their "
            "errors would flatter."
        )


def _figures(kept: dict[str, Any], plugin: Plugin) -> dict[str, Any]:
    truth = np.array(kept["truth"], dtype=np.float64)
    figures = regression_metrics(
        truth, np.array(kept["predicted"], dtype=np.float64), plugin.head.prop
    )
    if "lower" in kept and plugin.uncertainty is not None:
        low, high = (np.array(kept[key], dtype=np.float64) for key in ("lower", "upper"))
        known = np.isfinite(np.array(kept["predicted"], dtype=np.float64))
        if known.any():
            inside = float(((truth >= low) & (truth <= high))[known].mean())
            # Intervals without an end hold everything, which says nothing.
            figures["coverage"] = inside if np.isfinite(plugin.uncertainty.quantile) else None
            figures["coverage_level"] = plugin.uncertainty.level
    return figures


def compare_with_source(
    record: Record,
    plugin: Plugin,
    source: str | Path | pd.DataFrame,
    target: str | Path | pd.DataFrame | None,
    *,
    sample: int = 300,
    structure_column: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Measure what a plugin does to the source's errors and, with a target table, the domain gap.

    Raises
    ------
    TableError
        If a table cannot be used.
    """
    from matxfer.domain.diagnosis import diagnose
    from matxfer.transfer.finetune import read_source_data
    from matxfer.transfer.report import source_errors

    frame, name = open_table(source)
    if len(frame) > sample:
        frame = frame.sample(sample, random_state=0)
        record.notes.append(f"{sample:,} rows of {Path(name).name} were drawn to compare with.")
    if any(head in frame.columns for head in plugin.base.heads):
        errors = source_errors(plugin, read_source_data(frame, plugin.base, on_progress))
        retention = dict(record.meta.get("retention") or {})
        record.meta["retention"] = retention | {"source_error": errors}
    if target is None:
        record.notes.append("The domain gap needs the target's structures too (--data).")
        return
    rows, of = open_table(target)
    found = diagnose(
        frame, rows, column=plugin.target, model=plugin.base, sample=sample,
        structure_column=structure_column, on_graphs=on_progress,
    )  # fmt: skip
    # Folders are the user's business, and the page is for others.
    record.diagnosis = replace(found, source_name=Path(name).name, target_name=Path(of).name)


def load_for(
    record: Record, plugin: str | Path | Plugin, model: str | Path | Model | None
) -> Plugin:
    """Return the plugin itself, to predict with.

    Raises
    ------
    OptionError
        If it is a plugin of a potential.
    FormatError
        If it cannot be read.
    """
    if record.is_potential:
        raise OptionError(
            f"{record.name} is a plugin of a potential; its report is of what it says itself: "
            "leave out --data and --source-data"
        )
    from matxfer.transfer.bases import with_base

    return with_base([plugin], model)[1][0]
