"""Batch prediction: inputs in, one row each out, in order; a bad input keeps its row and says why.

Files are read and graphs are built here or in worker processes, a bounded number of chunks ahead;
the network runs in this process, once per crystal for the source properties and all plugins.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.loader import edge_budget_batches
from matxfer.data.packed import PackedGraphs
from matxfer.data.store import available_cpus
from matxfer.graph import GraphArrays, GraphOptions, build_graph
from matxfer.readers import Entry, crystals_of_table, expand, is_single, read_file
from matxfer.runtime import keep_large_blocks, leave_interrupts_to_the_parent
from matxfer.transfer.bases import with_base
from matxfer.transfer.plugin import Plugin, predict_columns, prediction_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.model import Model

#: Columns before the properties; ``error`` follows them.
LEADING_COLUMNS = ("id", "source", "frame", "formula", "n_sites")
#: Crystals (or single-structure files) per unit of work.
CHUNK = 256
#: Below this many files a worker's start-up, about a second, costs more than it saves.
_FILES_FOR_WORKERS = 4000

#: One row of a prediction: column → value; missing values are None.
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A chunk of inputs ready for the network: rows, and the graphs of those without an error."""

    rows: list[Row]
    graphs: PackedGraphs


@dataclass(frozen=True, slots=True, eq=False)
class Preparation:
    """What a worker needs to know: graph options and elements of the model, column of a table."""

    options: GraphOptions
    elements: frozenset[int]
    structure_column: str | None = None

    def of_entries(self, entries: Iterable[Entry]) -> Prepared:
        """Build the graphs of a chunk of entries."""
        rows: list[Row] = []
        graphs: list[GraphArrays | None] = []
        for entry in entries:
            row, graph = self._one(entry)
            rows.append(row)
            graphs.append(graph)
        return Prepared(rows, PackedGraphs.pack(graphs))

    def of_files(self, paths: Sequence[Path]) -> Prepared:
        """Read a chunk of files and build their graphs."""
        return self.of_entries(entry for path in paths for entry in self.read(path))

    def read(self, path: Path) -> Iterator[Entry]:
        """Read one file."""
        return read_file(path, structure_column=self.structure_column)

    def _one(self, entry: Entry) -> tuple[Row, GraphArrays | None]:
        row: Row = {"id": entry.id, "source": entry.source, "frame": entry.frame}
        row |= {"formula": None, "n_sites": None, "error": None}
        try:
            if entry.crystal is None:
                raise entry.error or CrystalError("no structure")
            row |= {"formula": entry.crystal.formula, "n_sites": entry.crystal.n_sites}
            entry.crystal.check_elements(self.elements)
            return row, build_graph(entry.crystal, self.options)
        except CrystalError as error:
            # The row's own columns say where; the reason need not repeat it.
            row["error"] = str(CrystalError(error.reason, error.remedy))
            return row, None


class Predictor:
    """A model and plugins, loaded once, that turn inputs into rows.

    Parameters
    ----------
    model
        Base model, its name or its folder; ``None``: that of the plugins, without any ``mp-base``.
    plugins
        Plugins or their folders, all of one base model.

    Raises
    ------
    FormatError
        If a model or plugin cannot be read, or a plugin belongs to another model.
    """

    def __init__(
        self,
        model: str | Path | Model | None = None,
        plugins: Iterable[str | Path | Plugin] = (),
    ) -> None:
        keep_large_blocks()
        self.model, self.plugins = with_base(plugins, model)
        own = prediction_columns(self.model, self.plugins)
        self.properties = [*self.model.heads, *(name for names in own for name in names)]
        self.columns = [*LEADING_COLUMNS, *self.properties, "error"]

    def rows(
        self,
        inputs: Iterable[str | Path] | Iterable[Entry],
        *,
        structure_column: str | None = None,
        workers: int | None = None,
    ) -> Iterator[Row]:
        """Yield one row per input, in order.

        Parameters
        ----------
        inputs
            Files, folders and globs; or entries that have been read already.
        structure_column
            Column of structures, where a table has an unusual one.
        workers
            Processes that read files and build graphs; ``None``: one less than there are CPUs
            for thousands of files, else none.
        """
        preparation = Preparation(
            self.model.backbone.graph_options, self.model.elements, structure_column
        )
        for prepared in _prepared(inputs, preparation, workers):
            yield from self._predict(prepared)

    def _predict(self, prepared: Prepared) -> Iterator[Row]:
        usable = np.flatnonzero(prepared.graphs.nodes_per_graph > 0)
        parts: list[dict[str, NDArray[np.float64]]] = []
        with torch.inference_mode():
            for index in edge_budget_batches(prepared.graphs, usable):
                batch = prepared.graphs.batch(index).to(self.model.device)
                parts.append(predict_columns(self.model, self.plugins, batch))
        for name in self.properties:
            values = np.concatenate([np.zeros(0), *(part[name] for part in parts)]).tolist()
            for k, value in zip(usable, values, strict=True):
                prepared.rows[k][name] = value
        for row in prepared.rows:
            yield {column: row.get(column) for column in self.columns}


def predict(
    structures: Any,
    plugins: Iterable[str | Path | Plugin] | str | Path | Plugin = (),
    *,
    model: str | Path | Model | None = None,
    structure_column: str | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Predict properties of crystals.

    Parameters
    ----------
    structures
        Paths (files, folders, globs), pymatgen structures, ASE atoms, crystals, one or many of
        them; or a data frame with structure columns.
    plugins
        Plugins or their folders, one or many.
    model, structure_column, workers
        See :class:`Predictor`.
    on_progress
        Called with the number of rows done since the last call.

    Returns
    -------
    pandas.DataFrame
        One row per input in their order: ``id, source, frame, formula, n_sites``, one column per
        property with its unit in the name, ``error`` (missing where all went well).
    """
    import pandas as pd

    if isinstance(plugins, str | Path | Plugin):
        plugins = [plugins]
    predictor = Predictor(model, plugins)
    rows = []
    for row in predictor.rows(
        as_inputs(structures, structure_column), structure_column=structure_column, workers=workers
    ):
        rows.append(row)
        if on_progress is not None:
            on_progress(1)
    frame = pd.DataFrame(rows, columns=predictor.columns)
    frame[predictor.properties] = frame[predictor.properties].astype(float)
    for name in ("frame", "n_sites"):
        frame[name] = frame[name].astype("Int64")
    return frame


def as_inputs(structures: Any, structure_column: str | None = None) -> list[Any] | Iterator[Entry]:
    """Return what :meth:`Predictor.rows` takes, from whatever a user has.

    Raises
    ------
    TypeError
        If it is nothing that holds a structure.
    """
    if hasattr(structures, "iloc"):
        return crystals_of_table(structures, "<data frame>", structure_column=structure_column)
    if isinstance(structures, str | Path):
        return [structures]
    if isinstance(structures, Crystal) or _is_atoms(structures) or _is_structure(structures):
        structures = [structures]
    items = list(structures)
    if all(isinstance(item, str | Path) for item in items):
        return items
    return iter([_entry(k, item) for k, item in enumerate(items)])


def _is_atoms(item: Any) -> bool:
    """Say whether this is ASE's, without importing ASE."""
    return hasattr(item, "get_positions")


def _is_structure(item: Any) -> bool:
    """Say whether this is pymatgen's, without importing pymatgen."""
    return hasattr(item, "frac_coords") and hasattr(item, "lattice")


def _entry(k: int, item: Any) -> Entry:
    """Turn one structure of any library into an entry; its failure too."""
    source = f"<{type(item).__name__}>"
    try:
        if isinstance(item, Crystal):
            return Entry(source, k, item.id or str(k), crystal=item)
        if _is_atoms(item):
            return Entry(source, k, str(k), crystal=Crystal.from_ase(item))
        if _is_structure(item):
            return Entry(source, k, str(k), crystal=Crystal.from_pymatgen(item))
    except CrystalError as error:
        return Entry(source, k, str(k), error=error.located(source, k))
    raise TypeError(
        f"item {k} is a {type(item).__name__}; give paths, pymatgen structures, ASE atoms or "
        "crystals, not a mixture of paths and structures"
    )


def _prepared(
    inputs: Iterable[Any], preparation: Preparation, workers: int | None
) -> Iterator[Prepared]:
    """Yield prepared chunks in the order of the inputs."""
    inputs = list(inputs) if not hasattr(inputs, "__next__") else inputs
    if workers is None:
        workers = _default_workers(inputs)
    jobs = _jobs(inputs, preparation)
    if workers < 1:
        yield from (function(chunk) for function, chunk in jobs)
        return
    with _spare_threads(workers), _pool(workers) as pool:
        waiting: deque[Any] = deque()
        for function, chunk in jobs:
            waiting.append(pool.submit(function, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _default_workers(inputs: Any) -> int:
    if not isinstance(inputs, list):
        return 0
    counted = sum(1 for _ in islice(expand(inputs), _FILES_FOR_WORKERS))
    return max(available_cpus() - 1, 1) if counted >= _FILES_FOR_WORKERS else 0


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: forking a process that has started torch's threads can deadlock.
    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=leave_interrupts_to_the_parent
    )


@contextmanager
def _spare_threads(workers: int) -> Iterator[None]:
    """Leave the workers' CPUs to them: threads that wait for a busy CPU spin for milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, available_cpus() - workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _jobs(
    inputs: Iterable[Any], preparation: Preparation
) -> Iterator[tuple[Callable[[Any], Prepared], list[Any]]]:
    """Cut the inputs into chunks: small files together, long ones entry by entry."""
    if hasattr(inputs, "__next__"):
        for chunk in _chunks(inputs):
            yield preparation.of_entries, chunk
        return
    small: list[Path] = []
    for path in expand(inputs):
        if is_single(path):
            small.append(path)
            if len(small) == CHUNK:
                yield preparation.of_files, small
                small = []
            continue
        if small:
            yield preparation.of_files, small
            small = []
        for chunk in _chunks(preparation.read(path)):
            yield preparation.of_entries, chunk
    if small:
        yield preparation.of_files, small


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    iterator = iter(entries)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
