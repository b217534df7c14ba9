"""One run of a benchmark: a plugin is made, and measured on its task and on the source."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.errors import OptionError
from matxfer.transfer.activations import Activations
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.finetune import finetune
from matxfer.transfer.report import retention_of
from matxfer.transfer.retention import RETENTIONS_WITH_SOURCE, SourceData
from matxfer.transfer.task import Task

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from matxfer.benchmark.records import Record
    from matxfer.benchmark.tasks import DataFolder
    from matxfer.model import Model
    from matxfer.transfer.plugin import Plugin

#: Rows of each source table to measure forgetting on, and others to rehearse.
MEASURED_ROWS, REHEARSED_ROWS = 1000, 2000
#: How strongly a retention holds by default.
DEFAULT_STRENGTH = FinetuneConfig().strength


class Bench:
    """A base model and data to measure on.

    Parameters
    ----------
    model
        The base; it should have seen no material of the tasks.
    data
        The tables.
    epochs
        At most so many passes in every run, for a quick look.
    """

    def __init__(self, model: Model, data: DataFolder, epochs: int | None = None) -> None:
        self.model, self.data, self.epochs = model, data, epochs

    @property
    def last(self) -> int:
        """Number of layers of the base."""
        return self.model.backbone.n_layers

    def run(
        self, task: str, split: int, options: Mapping[str, Any], share: float = 1.0
    ) -> dict[str, Any]:
        """Return what identifies a run: base, task, split, part of the training rows, options."""
        limited = {} if self.epochs is None else {"epochs": self.epochs}
        return {
            "model": self.model.name,
            "weights": self.model.checksum[:12],
            "task": task,
            "split": split,
            "share": share,
            "options": {**options, **limited},
        }

    def measure(self, run: dict[str, Any]) -> Record:
        """Fine-tune as a run says; return its errors, its cost, and what became of the source.

        Everything is chosen on the validation rows; the test rows are read once. ``val_errors`` are
        those after each epoch on the scale on which the target is fitted.
        """
        task, options = self.data.task(run["task"]), run["options"]
        column = f"split_{run['split']}"
        whole = run["share"] == 1
        plugin = finetune(
            task.path if whole else task.thinned(column, run["share"], run["split"]),
            task.target,
            model=self.model,
            split_column=column,
            seed=run["split"],
            source_data=self.rehearsal if options.get("retain") in RETENTIONS_WITH_SOURCE else None,
            **options,
        )
        meta, figures = plugin.meta, plugin.meta["figures"]
        return {
            "val": figures["val"]["mae"],
            "test": figures["test"]["mae"],
            "constant": figures["test"].get("mae_of_a_constant"),
            "coverage": figures["test"].get("coverage"),
            "ood": figures["test"].get("rank_correlation_of_error_and_ood"),
            "rows": meta["data"]["rows"]["train"],
            "chosen": meta["chosen"],
            "seconds": meta["seconds"],
            "seconds_per_epoch": meta.get("seconds_per_epoch"),
            "best_epoch": meta.get("best_epoch"),
            "val_errors": [round(error, 6) for error in meta.get("history", [])],
            "source": source_errors(plugin, self.held_out),
        }

    @cached_property
    def held_out(self) -> SourceData:
        """Source rows that no pretraining and no plugin has seen."""
        frame = self.data.source_rows("test", MEASURED_ROWS)
        known = [target for target in self.model.heads if target in frame.columns]
        if not known:
            raise OptionError(
                f"model {self.model.name!r} predicts none of the properties of the source tables; "
                "choose one that was pretrained on them"
            )
        table = read_property_table(frame, known, source="source rows")
        graphs = graph_store(table.crystals, self.model.backbone.graph_options).graphs
        return SourceData(graphs, Activations(self.model, graphs), table.values)

    @cached_property
    def rehearsal(self) -> pd.DataFrame:
        """Source rows for replay: of the training part, none that forgetting is measured on."""
        return self.data.source_rows("train", REHEARSED_ROWS)


def source_errors(plugin: Plugin, source: SourceData) -> dict[str, Any]:
    """Return each source property's error on source rows, before and after, and its change."""
    nothing = dict.fromkeys(("val", "test"), np.zeros(0, np.int64))
    values = np.full(len(source.graphs), np.nan)
    # What the report measures on target rows is of no use here: there are none.
    task = Task(
        plugin.base,
        source.graphs,
        source.activations,
        plugin.head.prop,
        values,
        nothing,
        {},
    )
    errors: dict[str, Any] = retention_of(task, plugin, source)["source_error"]
    return errors
