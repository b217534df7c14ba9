"""The cells of a transfer map that are wanted: targets, splits, sources, depths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.benchmark.records import Records
from matxfer.data.properties import Property
from matxfer.data.table import TableError, open_table
from matxfer.errors import OptionError
from matxfer.model import Model, available_models, find_model, is_potential, load_model
from matxfer.options import COUNT, SEED, check_choice
from matxfer.probing.cells import METHODS, NO_SOURCES, RANDOM, SCRATCH, Cells, method_of
from matxfer.probing.composition import KINDS as COMPOSITIONS
from matxfer.probing.groups import KINDS as GROUPS
from matxfer.probing.groups import leave_out as left_out_splits
from matxfer.probing.networks import WAYS, architecture
from matxfer.probing.targets import Target, check_split, read_targets, with_splits
from matxfer.runtime import keep_large_blocks
from matxfer.transfer.freezing import check_depth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pandas as pd


#: What a source is compared with.
AGAINST = (RANDOM, SCRATCH)
#: At most so many training rows, so that a cell takes seconds.
ROWS = 2000
#: Models of one task each, which are compared by default where they are there.
_SINGLE_TASKS, _DEFAULT = "source-", ("mp-base-strict", "mp-small")


class Probe:
    """What a transfer map consists of; see :func:`probe` for the options."""

    def __init__(
        self,
        tables: Sequence[str | Path | pd.DataFrame],
        sources: Sequence[str | Path | Model] | None = None,
        *,
        target: str | Sequence[str] | None = None,
        splits: str | Sequence[str] | int | None = None,
        depths: Sequence[int] | None = None,
        method: str = "kernel_ridge",
        against: str = RANDOM,
        by_layer: Sequence[str] = (),
        leave_out: str | None = None,
        rows: int | Sequence[int] | None = ROWS,
        transform: str | None = None,
        seed: int = 0,
        structure_column: str | None = None,
        on_graphs: Callable[[int], None] | None = None,
    ) -> None:
        check_choice("method", method, METHODS)
        check_choice("against", against, AGAINST)
        for way in by_layer:
            check_choice("by_layer", way, WAYS)
        if leave_out is not None:
            check_choice("leave_out", leave_out, GROUPS)
            if splits is not None:
                raise OptionError("splits and leave_out are two ways to split; choose one")
        if transform == "auto":
            raise OptionError("transform is 'auto', but all cells need the same one; name it")
        if transform is not None:
            Property("target", "", transform)  # an unknown one is better told now
        if not SEED[0](seed):
            raise OptionError(f"seed is {seed}, but {SEED[1]}")
        sizes = [rows] if rows is None or isinstance(rows, int) else list(rows)
        if not sizes or not all(n is None or COUNT[0](n) for n in sizes):
            raise OptionError(f"rows are {rows}, but {COUNT[1]}")
        keep_large_blocks()
        self.method, self.against, self.by_layer = method, against, tuple(by_layer)
        self.leave_out, self.transform, self.seed = leave_out, transform, seed
        self.sizes = sorted(set(sizes), key=lambda n: n or 0)
        self.sources = load_sources(sources)
        self.depths = frozen_depths(self.sources, depths)
        self.told: list[str] = []
        self.targets = self._read(tables, target, splits, structure_column)
        self.cells = Cells(self.targets, self.sources, on_graphs)
        if leave_out is not None:
            self._leave_out(leave_out)
        self.told += [line for found in self.targets.values() for line in found.told]
        self._tell_thinned()

    # -- targets ------------------------------------------------------------------------------
    def _read(
        self,
        tables: Sequence[str | Path | pd.DataFrame],
        target: str | Sequence[str] | None,
        splits: str | Sequence[str] | int | None,
        structure_column: str | None,
    ) -> dict[str, Target]:
        if not tables:
            raise OptionError("no table was given")
        columns = [target] if isinstance(target, str) else target
        elements = frozenset.intersection(*(m.elements for m in self.sources.values()))
        found: dict[str, Target] = {}
        for k, table in enumerate(tables):
            frame = open_table(table)[0]
            called = None if isinstance(table, str | Path) else f"table {k + 1}"
            for each in read_targets(
                table, columns, elements, structure_column=structure_column, called=called
            ):
                if each.name in found:
                    raise OptionError(f"two tables are called {each.name!r}; rename one of them")
                if self.leave_out is None:
                    each = with_splits(each, frame, splits, self.seed)  # noqa: PLW2901
                found[each.name] = each
        return found

    def _leave_out(self, kind: str) -> None:
        for name, target in self.targets.items():
            first = next(iter(self.sources))
            prints = self.cells.fingerprints(name, first) if kind == "cluster" else None
            splits, told = left_out_splits(
                kind, target.data.crystals, target.usable, prints, self.seed
            )
            for group, words in list(splits.items()):
                try:
                    check_split(words[target.usable], f"{name}: without {group}, the table")
                except TableError as error:
                    told.append(str(error))
                    del splits[group]
            if not splits:
                reasons = f" ({'; '.join(told)})" if told else ""
                raise TableError(f"{name}: no {kind} can be left out{reasons}")
            told = [*target.told, *(f"{name}: {line}" for line in told)]
            self.targets[name] = replace(target, splits=splits, told=told)
        self.cells.targets = self.targets

    def _tell_thinned(self) -> None:
        most = self.sizes[-1]
        for name, target in self.targets.items():
            rows = max(
                int(((words == "train") & target.usable).sum()) for words in target.splits.values()
            )
            if most is not None and rows > most:
                self.told.append(
                    f"{name}: {most} of up to {rows} training rows are used; more with --rows"
                )

    # -- runs ---------------------------------------------------------------------------------
    def runs(self) -> list[dict[str, Any]]:
        """Return all cells, in an order in which each network runs over a table once."""
        wanted: list[dict[str, Any]] = []
        for name, target in self.targets.items():
            data = {split: target.digest(split) for split in target.splits}
            found = ({**run, "data": data[run["split"]]} for run in self._runs(name))
            # A layer is changed at a depth that may be among those asked for.
            wanted += {json.dumps(run): run for run in found}.values()
        return wanted

    def _runs(self, name: str) -> Iterator[dict[str, Any]]:
        for kind in COMPOSITIONS:
            yield from self._over(name, kind, "", [None])
        shapes = {architecture(model): source for source, model in self.sources.items()}
        for shape, source in shapes.items():
            yield from self._over(name, RANDOM, shape, self.depths[source])
            if self.against == SCRATCH:
                yield from self._over(name, SCRATCH, shape, [None])
        for source, model in self.sources.items():
            weights = model.checksum[:12]
            yield from self._over(name, source, weights, self.depths[source])
            last = model.backbone.n_layers
            if self.by_layer:
                yield from self._over(name, source, weights, [last])
                yield from self._over(name, RANDOM, architecture(model), [last])
            for way in self.by_layer:
                for block in range(last + 1):
                    yield from self._over(name, source, weights, [last], block, way)

    def _over(
        self,
        name: str,
        source: str,
        weights: str,
        depths: Sequence[int | None],
        layer: int | None = None,
        way: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the runs of a source over splits, numbers of training rows and depths."""
        target = self.targets[name]
        for draw, split in enumerate(target.splits):
            for size in self.sizes if way is None else self.sizes[-1:]:
                for depth in depths:
                    yield {
                        "target": name,
                        "split": split,
                        "draw": draw,
                        "rows": size,
                        "source": source,
                        "weights": weights,
                        "depth": depth,
                        "layer": layer,
                        "way": way,
                        "method": method_of(source, self.method),
                        "transform": self.transform,
                        "seed": self.seed,
                    }

    def missing(
        self, path: Path, on_damage: Callable[[str], None] | None = None
    ) -> list[dict[str, Any]]:
        """Return the cells that are not in a file of records yet."""
        return Records(path, on_damage).missing(self.runs())


def load_sources(sources: Sequence[str | Path | Model] | None) -> dict[str, Model]:
    """Return models by name: those given, else the shipped ones of one source task each.

    Raises
    ------
    FormatError
        If one cannot be read.
    OptionError
        If there is none, or one is a potential, or two are of one name.
    """
    if sources is None:
        names = available_models()
        single = [name for name in names if name.startswith(_SINGLE_TASKS)]
        sources = [*single, *(name for name in _DEFAULT if name in names)]
    found: dict[str, Model] = {}
    for source in sources:
        model = source if isinstance(source, Model) else _load(source)
        name = model.name if isinstance(source, Model) else Path(source).name
        if name in found or name in NO_SOURCES:
            raise OptionError(f"two sources are called {name!r}; rename the folder of one")
        found[name] = model
    if not found:
        raise OptionError("no source was given, and none is shipped; name one with --sources")
    return found


def _load(source: str | Path) -> Model:
    card = find_model(source)[1]
    if is_potential(card):
        raise OptionError(
            f"{source} is a potential, not a model of properties; leave it out of the sources"
        )
    return load_model(source)


def frozen_depths(
    sources: Mapping[str, Model], depths: Sequence[int] | None
) -> dict[str, list[int]]:
    """Return the frozen depths of each source: those given that it has, else all.

    Raises
    ------
    OptionError
        If no source has as many layers, or one has none of the depths.
    """
    layers = {name: model.backbone.n_layers for name, model in sources.items()}
    if depths is None:
        return {name: list(range(last + 1)) for name, last in layers.items()}
    deepest = max(sources.values(), key=lambda model: model.backbone.n_layers)
    wanted = sorted({check_depth(deepest.backbone, depth) for depth in depths})
    found = {name: [d for d in wanted if d <= last] for name, last in layers.items()}
    for name, own in found.items():
        if not own:
            raise OptionError(f"depths are {wanted}, but {name} has {layers[name]} layers")
    return found
