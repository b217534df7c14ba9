"""What the cells say: gains with intervals, the layers' shares, what structure adds."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from matxfer.probing.cells import RANDOM, SCRATCH
from matxfer.probing.composition import KINDS as COMPOSITIONS
from matxfer.probing.intervals import Gain, paired_gain, paired_share
from matxfer.probing.networks import architecture, block_names
from matxfer.probing.prediction import affinity_rows, mean_scores
from matxfer.probing.transfer_map import TransferMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matxfer.benchmark.records import Record
    from matxfer.probing.plan import Probe
    from matxfer.probing.rows import Row

    #: Source, weights and depth of cells of which the best on validation rows is taken.
    Candidate = tuple[str, str, int | None]


class _Records:
    """Records of a probe by what they are of."""

    def __init__(self, probe: Probe, records: Iterable[Record]) -> None:
        self.probe = probe
        self.by_key = {self._key(record["run"]): record for record in records}

    @staticmethod
    def _key(run: Row) -> tuple[Any, ...]:
        names = ("target", "split", "rows", "source", "weights", "depth", "layer", "way")
        return tuple(run[name] for name in names)

    def over_splits(
        self,
        target: str,
        rows: Any,
        source: str,
        weights: str,
        depth: int | None,
        layer: int | None = None,
        way: str | None = None,
    ) -> list[Record]:
        """Return the records of one cell, split by split."""  # fmt: skip
        splits = self.probe.targets[target].splits
        return [self.by_key[target, s, rows, source, weights, depth, layer, way] for s in splits]

    def chosen(self, target: str, rows: Any, candidates: Sequence[Candidate]) -> list[Record]:
        """Return for each split the record of the smallest validation error."""
        found = [self.over_splits(target, rows, *candidate) for candidate in candidates]
        return [min(of_split, key=lambda r: r["val"]) for of_split in zip(*found, strict=True)]


def errors(records: Iterable[Record], part: str = "test") -> list[float]:
    """Return the errors of records."""
    return [record[part] for record in records]


def summarised(probe: Probe, records: Sequence[Record]) -> TransferMap:
    """Return the transfer map of the records of a probe."""
    found = _Records(probe, records)
    cells = [
        row
        for name in probe.targets
        for rows in probe.sizes
        for row in _cells_of(probe, found, name, rows)
    ]
    layers, structure, groups, affinity = [], [], [], []
    for name in probe.targets:
        mine = [r for r in cells if r["target"] == name and r["rows"] == probe.sizes[-1]]
        affinity += affinity_rows(mine, name)
        for source in probe.sources:
            layers += _layers_of(probe, found, name, source)
            structure += _structure_of(probe, found, name, source)
        if probe.leave_out is not None:
            groups += _groups_of(probe, found, name)
    settings = {
        "sources": {name: model.checksum[:12] for name, model in probe.sources.items()},
        "method": probe.method,
        "against": probe.against,
        "leave_out": probe.leave_out,
        "rows": probe.sizes,
        "transform": probe.transform,
        "seed": probe.seed,
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "n_cells": len(records),
    }
    return TransferMap(cells, layers, structure, groups, affinity, settings, probe.told)


def _overlap(probe: Probe, target: str) -> float:
    found = probe.targets[target]
    return statistics.mean(found.overlap(split) for split in found.splits)


def _reference(probe: Probe, found: _Records, target: str, rows: Any, shape: str) -> list[Record]:
    """Return what sources of a shape are compared with, split by split."""
    if probe.against == SCRATCH:
        return found.over_splits(target, rows, SCRATCH, shape, None)
    return found.chosen(target, rows, _random(probe, shape))


def _random(probe: Probe, shape: str) -> list[Candidate]:
    source = next(s for s, m in probe.sources.items() if architecture(m) == shape)
    return [(RANDOM, shape, depth) for depth in probe.depths[source]]


def _cells_of(probe: Probe, found: _Records, target: str, rows: Any) -> list[Row]:
    """Return the cells of all sources, and of what is none."""
    shapes: dict[str, str] = {}  # digest of the architecture → first source that has it
    kinds: list[tuple[str, str, list[Candidate]]] = []
    for name, model in probe.sources.items():
        shapes.setdefault(architecture(model), name)
        deep: list[Candidate] = [(name, model.checksum[:12], d) for d in probe.depths[name]]
        kinds.append((name, architecture(model), deep))
    for shape, name in shapes.items():
        like = f" (as {name})" if len(shapes) > 1 else ""
        kinds.append((f"{RANDOM}{like}", shape, _random(probe, shape)))
        if probe.against == SCRATCH:
            kinds.append((f"{SCRATCH}{like}", shape, [(SCRATCH, shape, None)]))
    kinds += [(kind, next(iter(shapes)), [(kind, "", None)]) for kind in COMPOSITIONS]
    made = []
    for source, shape, candidates in kinds:
        reference = _reference(probe, found, target, rows, shape)
        for candidate in candidates:
            if (depth := candidate[2]) is not None:
                records = found.over_splits(target, rows, *candidate)
                made.append(_cell(probe, source, depth, records, reference))
        chosen = found.chosen(target, rows, candidates)
        made.append(_cell(probe, source, None, chosen, reference))
    return made


def _cell(
    probe: Probe,
    source: str,
    depth: int | None,
    records: Sequence[Record],
    reference: Sequence[Record],
) -> Row:
    run, test, base = records[0]["run"], errors(records), errors(reference)
    target = probe.targets[run["target"]]
    gain = paired_gain(base, test, _overlap(probe, target.name))
    depths = [r["run"]["depth"] for r in records]
    return {
        "target": target.name,
        "column": target.column,
        "unit": target.unit,
        "rows": run["rows"],
        "train_rows": round(statistics.mean(record["train_rows"] for record in records)),
        "source": source,
        "is_source": source in probe.sources,
        "depth": depth,
        "chosen": depth is None,
        "depths": ",".join(map(str, depths)) if None not in depths else "",
        "splits": len(test),
        "test_mae": statistics.mean(test),
        "test_std": statistics.stdev(test) if len(test) > 1 else None,
        "val_mae": statistics.mean(errors(records, "val")),
        "constant_mae": statistics.mean(errors(records, "constant")),
        "reference_mae": statistics.mean(base),
        **_gain_row(gain),
        "scores": None if depth is None else mean_scores(records),
    }


def _gain_row(gain: Gain) -> Row:
    return {"gain": gain.mean, "low": gain.low, "high": gain.high, "verdict": gain.verdict}


def _layers_of(probe: Probe, found: _Records, target: str, source: str) -> list[Row]:
    """Return what each block is worth, as a share of the gain over random weights.

    Read out after the last layer, as the source and the random network are.
    """
    if not probe.by_layer:
        return []
    model, rows = probe.sources[source], probe.sizes[-1]
    last, weights = model.backbone.n_layers, model.checksum[:12]
    whole = errors(found.over_splits(target, rows, source, weights, last))
    random = errors(found.over_splits(target, rows, RANDOM, architecture(model), last))
    made = []
    for way in probe.by_layer:
        for block, name in enumerate(block_names(model)):
            test = errors(found.over_splits(target, rows, source, weights, last, block, way))
            # What is lost without it, or what is there with it alone.
            pair = (random, test) if way == "alone" else (test, whole)
            gain = statistics.mean(random) - statistics.mean(whole)
            share = paired_share(*pair, gain or 1.0, _overlap(probe, target))
            row = {
                "target": target,
                "unit": probe.targets[target].unit,
                "source": source,
                "block": name,
                "way": way,
                "test_mae": statistics.mean(test),
                "source_mae": statistics.mean(whole),
                "random_mae": statistics.mean(random),
                # Shares of a loss would be read as those of a gain.
                "share": share.mean if gain > 0 else None,
                "low": share.low if gain > 0 else None,
                "high": share.high if gain > 0 else None,
            }
            made.append(row)
    return made


def _structure_of(probe: Probe, found: _Records, target: str, source: str) -> list[Row]:
    """Return what the source's layers add to the composition, each at its best on ``val``."""
    rows, weights = probe.sizes[-1], probe.sources[source].checksum[:12]
    deep = [(source, weights, depth) for depth in probe.depths[source] if depth > 0]
    if not deep:
        return []
    plain: list[Candidate] = [(kind, "", None) for kind in COMPOSITIONS]
    if 0 in probe.depths[source]:
        plain.append((source, weights, 0))
    composition = found.chosen(target, rows, plain)
    structure = found.chosen(target, rows, deep)
    gain = paired_gain(errors(composition), errors(structure), _overlap(probe, target))
    return [
        {
            "target": target,
            "unit": probe.targets[target].unit,
            "source": source,
            "composition_mae": statistics.mean(errors(composition)),
            "structure_mae": statistics.mean(errors(structure)),
            **_gain_row(gain),
        }
    ]


def _groups_of(probe: Probe, found: _Records, target: str) -> list[Row]:
    """Return the errors on each group that was left out."""
    made = []
    rows = probe.sizes[-1]
    candidates: dict[str, list[Candidate]] = {
        name: [(name, model.checksum[:12], depth) for depth in probe.depths[name]]
        for name, model in probe.sources.items()
    }
    first = architecture(next(iter(probe.sources.values())))
    candidates[RANDOM] = _random(probe, first)
    if probe.against == SCRATCH:
        candidates[SCRATCH] = [(SCRATCH, first, None)]
    candidates |= {kind: [(kind, "", None)] for kind in COMPOSITIONS}
    for source, of_source in candidates.items():
        made += [
            {
                "target": target,
                "unit": probe.targets[target].unit,
                "group": record["run"]["split"],
                "source": source,
                "test_rows": record["test_rows"],
                "test_mae": record["test"],
                "constant_mae": record["constant"],
            }
            for record in found.chosen(target, rows, of_source)
        ]
    return made
