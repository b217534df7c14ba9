"""Batch prediction: inputs in, one row each out, in order; a bad input keeps its row and says why.

The engine is in :mod:`matxfer.batch`; here is its face, for one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.batch.cache import PredictionCache, weights_of
from matxfer.batch.prepare import MAX_ATOMS, Preparation
from matxfer.batch.stream import Predicted, predicted
from matxfer.batch.units import Plan, count_inputs
from matxfer.batch.work import Setup
from matxfer.crystal import Crystal, CrystalError
from matxfer.data.store import available_cpus
from matxfer.notebook import told_in_notebook
from matxfer.readers import Entry, crystals_of_table
from matxfer.readers.objects import crystal_of_object, is_atoms, is_structure
from matxfer.runtime import keep_large_blocks
from matxfer.transfer.bases import with_base
from matxfer.transfer.plugin import Plugin, prediction_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    import pandas as pd

    from matxfer.batch.units import Unit
    from matxfer.columns import Row
    from matxfer.model import Model

#: Columns before and after the properties.
LEADING_COLUMNS = ("id", "source", "frame", "formula", "n_sites")
TRAILING_COLUMNS = ("error_kind", "error")
#: Crystals (or single-structure files) per unit of work.
CHUNK = 256
#: Below so many structures the workers' start-up, a few seconds, costs more than they save.
_STRUCTURES_FOR_WORKERS = 2000
#: Seconds that a structure may take in a worker process.
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How to work, whatever on.

    Parameters
    ----------
    structure_column
        Column of structures, where a table has an unusual one.
    workers
        Worker processes. ``None``: for thousands of structures one per CPU (one less with a
        network on a GPU), else none.
    timeout_s
        Seconds that a structure may take in a worker process; 0: for ever. ``None``:
        :data:`TIMEOUT_S`, if there are workers.
    max_atoms
        Larger cells are not tried.
    cache
        Whether to keep predictions on disk for the next run with the same weights. Values from
        another run may differ in the last digit of single precision.
    """

    structure_column: str | None = None
    workers: int | None = None
    timeout_s: float | None = None
    max_atoms: int = MAX_ATOMS
    cache: bool = False


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
        self.columns = [*LEADING_COLUMNS, *self.properties, *TRAILING_COLUMNS]

    def rows(
        self,
        inputs: Iterable[str | Path] | Iterable[Entry],
        options: BatchOptions | None = None,
        *,
        structure_column: str | None = None,
        workers: int | None = None,
    ) -> Iterator[Row]:
        """Yield one row per input, in order.

        Parameters
        ----------
        inputs
            Files, folders and globs; or entries that have been read already.
        options
            How to work.
        structure_column, workers
            Two of these by themselves, where ``options`` is not given.
        """
        options = options or BatchOptions(structure_column, workers)
        given: Any = inputs if hasattr(inputs, "__next__") else list(inputs)
        plan = Plan(given, chunk=CHUNK, structure_column=options.structure_column)
        for each in self.predicted(plan, options):
            yield from self.rows_of(each)

    def predicted(
        self,
        plan: Plan,
        options: BatchOptions,
        through: Callable[[Iterable[Unit]], Iterable[Unit]] = iter,
    ) -> Generator[Predicted, None, None]:
        """Yield the units of a plan with their predictions.

        Parameters
        ----------
        plan, options
            What to do, and how.
        through
            What the units go through on their way, such as something that ends them early.
        """
        preparation = Preparation(
            self.model.backbone.graph_options,
            self.model.elements,
            options.structure_column,
            options.max_atoms,
        )
        setup = Setup(preparation, self.model, self.plugins, self.properties)
        timeout = TIMEOUT_S if options.timeout_s is None else options.timeout_s
        cache = None
        if options.cache:
            weights = weights_of(self.model, self.plugins)
            cache = PredictionCache(weights, len(self.properties))
        try:
            yield from predicted(
                through(plan),
                setup,
                workers=self._workers(plan, options),
                timeout_s=timeout or None,
                cache=cache,
            )
        finally:
            if cache is not None:
                cache.close()

    def _workers(self, plan: Plan, options: BatchOptions) -> int:
        if options.workers is not None:
            return options.workers
        if count_inputs(plan.inputs, _STRUCTURES_FOR_WORKERS) < _STRUCTURES_FOR_WORKERS:
            return int(bool(options.timeout_s))  # only a worker can be given up
        on_cpu = self.model.device.type == "cpu"
        return available_cpus() if on_cpu else max(available_cpus() - 1, 1)

    def rows_of(self, each: Predicted) -> Iterator[Row]:
        """Yield the rows of a predicted unit."""
        rows = each.rows
        missing = [None] * len(self.properties)
        for k, values in enumerate(each.values.tolist()):
            error = rows.errors[k]
            place = rows.ids[k], rows.sources[k], rows.frames[k], rows.formulas[k], rows.n_sites[k]
            cells = (*place, *(values if error is None else missing), rows.kinds[k], error)
            yield dict(zip(self.columns, cells, strict=True))


@told_in_notebook("on_progress", "predicting")
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
        property with its unit in the name, ``error_kind`` (see :class:`matxfer.errors.ErrorKind`)
        and ``error`` (missing where all went well).

    Examples
    --------
    >>> import matxfer
    >>> frame = matxfer.predict("examples/*.cif", model="mp-small")
    >>> list(frame.columns[:6])
    ['id', 'source', 'frame', 'formula', 'n_sites', 'formation_energy_ev_per_atom']
    >>> bool(frame.set_index("id").band_gap_ev["MgO"] > 3)
    True

    Structures of other packages, one or many; ``bulk-plugin`` adds columns of its property:

    >>> from ase.build import bulk
    >>> found = matxfer.predict([bulk("Si"), bulk("Cu")], "bulk-plugin")
    >>> list(found.columns[9:12])
    ['bulk_modulus_gpa', 'bulk_modulus_gpa_std', 'bulk_modulus_gpa_lo']

    What cannot be used keeps its row:

    >>> matxfer.predict(["examples/Cu.cif", "gone.cif"], model="mp-small").error_kind[1]
    'missing_file'
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
    if isinstance(structures, Crystal) or is_atoms(structures) or is_structure(structures):
        structures = [structures]
    items = list(structures)
    if all(isinstance(item, str | Path) for item in items):
        return items
    return iter([_entry(k, item) for k, item in enumerate(items)])


def _entry(k: int, item: Any) -> Entry:
    """Turn one structure of any library into an entry; its failure too."""
    source = f"<{type(item).__name__}>"
    try:
        crystal = crystal_of_object(item)
        if crystal is not None:
            return Entry(source, k, crystal.id or str(k), crystal=crystal)
    except CrystalError as error:
        return Entry(source, k, str(k), error=error.located(source, k))
    raise TypeError(
        f"item {k} is a {type(item).__name__}; give paths, pymatgen structures, ASE atoms or "
        "crystals, not a mixture of paths and structures"
    )
