"""Measuring a transfer map cell by cell; what is there is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from matxfer.benchmark.records import Records, complete
from matxfer.probing.plan import Probe
from matxfer.probing.summary import summarised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from matxfer.benchmark.records import Record
    from matxfer.model import Model
    from matxfer.probing.transfer_map import TransferMap


def completed(
    wanted: Probe, path: Path, on_record: Callable[[Record], None] | None = None
) -> TransferMap:
    """Measure the cells that ``path`` lacks, and return the map.

    Parameters
    ----------
    wanted
        The cells.
    path
        Raw results, JSON lines; created if need be.
    on_record
        Told of each cell that was measured.
    """
    measured = complete(Records(path), wanted.runs(), wanted.cells.measure, on_record)
    return summarised(wanted, measured)


def probe(
    tables: str | Path | pd.DataFrame | Sequence[str | Path | pd.DataFrame],
    sources: Sequence[str | Path | Model] | None = None,
    *,
    output: str | Path | None = None,
    on_record: Callable[[Record], None] | None = None,
    **options: Any,
) -> TransferMap:
    """Measure what source models and frozen depths are worth for target tables.

    Everything is chosen on the validation rows of each split; its test rows are read once.

    Parameters
    ----------
    tables
        Parquet or CSV tables of structures, or data frames.
    sources
        Models, names of shipped ones or folders; ``None``: the shipped ones of one source task.
    output
        Folder of raw results, which a killed run goes on from; ``None``: none are kept.
    on_record
        Told of each cell that was measured.
    **options
        ``target``: column or columns; ``None``: a table's only column of numbers.
        ``splits``: columns, or a number of random splits; ``None``: all columns called ``split…``,
        else five random ones.
        ``depths``: numbers K of frozen layers; ``None``: 0 … L. K = 0 reads the embedding of the
        elements, which knows the composition alone.
        ``method``: see :data:`matxfer.probing.cells.METHODS`.
        ``against``: ``"random weights"`` (frozen, read in the same way) or ``"scratch"`` (all of
        the network trained on the target).
        ``by_layer``: ways to change one layer, see :data:`matxfer.probing.networks.WAYS`.
        ``leave_out``: ``"anion"``, ``"group"``, ``"prototype"`` or ``"cluster"``: splits in which
        a whole group is the test part, see :mod:`matxfer.probing.groups`.
        ``rows``: at most so many training rows; several numbers give learning curves.
        ``transform``: scale on which all targets are fitted; ``None``: each property's own.
        ``seed``: of random splits, weights and thinned rows.
        ``structure_column``: see :mod:`matxfer.readers`.
        ``on_graphs``: called with the number of graphs built since the last call.

    Raises
    ------
    TableError
        If a table, a column or a usable row is missing.
    FormatError
        If a source cannot be read.
    OptionError
        If an option is out of its range.
    """
    one = isinstance(tables, str | Path) or hasattr(tables, "iloc")
    made = Probe(cast("Any", [tables] if one else tables), sources, **options)
    if output is not None:
        found = completed(made, Path(output) / "runs.jsonl", on_record)
        found.save(output)
        return found
    with tempfile.TemporaryDirectory(prefix="matxfer-probe-") as folder:
        return completed(made, Path(folder) / "runs.jsonl", on_record)
