"""Fine-tuning: a small table of one property → a plugin, with its figures and its retention."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import torch

from matxfer.data.loader import edge_budget_batches
from matxfer.data.properties import property_of
from matxfer.data.store import graph_store
from matxfer.data.table import TableError, read_property_table
from matxfer.files import FormatError, sha256
from matxfer.fisher import concentration, total_fisher
from matxfer.metrics import regression_metrics
from matxfer.model import DEFAULT_MODEL, Model, load_model
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.scaling import TargetScaler
from matxfer.provenance import provenance
from matxfer.runtime import keep_large_blocks
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.ewc import EWCPenalty
from matxfer.transfer.freezing import check_depth
from matxfer.transfer.plugin import Plugin
from matxfer.transfer.prefix import PrefixCache
from matxfer.transfer.training import FinetuneModule, train_plugin

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs


def finetune(
    table: str | Path | pd.DataFrame,
    target: str,
    output: str | Path | None = None,
    *,
    model: str | Path | Model = DEFAULT_MODEL,
    split_column: str | None = None,
    structure_column: str | None = None,
    config: FinetuneConfig | None = None,
    on_graphs: Callable[[int], None] | None = None,
    **options: Any,
) -> Plugin:
    """Fine-tune a plugin for one property of a table.

    Parameters
    ----------
    table
        Parquet or CSV table of structures, or a data frame (see :mod:`matxfer.readers`).
    target
        Column of values; its name says the unit.
    output
        Folder of the plugin; ``None``: the plugin is returned but not written.
    model
        Base model, its name or its folder.
    split_column
        Column with ``train``, ``val`` and ``test``; without one, a seeded random split.
    structure_column
        Column of structures, where the table has an unusual one.
    config, **options
        :class:`FinetuneConfig`, or its fields one by one.
    on_graphs
        Called with the number of graphs built since the last call.

    Returns
    -------
    Plugin
        With ``meta["figures"]`` (val and test errors) and ``meta["retention"]``.

    Raises
    ------
    TableError
        If the table, a column or a usable row is missing.
    ValueError
        If an option is out of range.
    """
    keep_large_blocks()
    started = time.monotonic()
    config = replace(config or FinetuneConfig(), **options)
    base = model if isinstance(model, Model) else load_model(model)
    check_depth(base.backbone, config.freeze)
    data = read_property_table(
        table,
        [target],
        split_column=split_column,
        structure_column=structure_column,
        seed=config.seed,
    )
    store = graph_store(data.crystals, base.backbone.graph_options, on_progress=on_graphs)
    graphs, values = store.graphs, data.values[target]
    parts, excluded = _parts(data.source, data.split, graphs, values, base)

    L.seed_everything(config.seed, verbose=False)
    head = _make_head(base, target, config, values[parts["train"]], graphs.select(parts["train"]))
    plugin = Plugin(base, config.freeze, head)
    targets = head.scaler.normalised(values, graphs)[:, None]
    usable = {part: rows[np.isfinite(targets[rows, 0])] for part, rows in parts.items()}
    _require_rows(data.source, usable)
    if outside := sum(len(parts[p]) - len(usable[p]) for p in ("train", "val")):
        excluded["outside the transform's domain"] = outside
    module = FinetuneModule(plugin, config, _penalty(base, plugin, config, len(usable["train"])))
    cache = PrefixCache(base.backbone, graphs, config.freeze)
    if output is not None:  # better now than after the training
        Path(output).mkdir(parents=True, exist_ok=True)
    seconds_per_epoch = train_plugin(module, cache, usable, targets)

    plugin.eval()
    plugin.meta = {
        "config": asdict(config),
        "figures": _figures(plugin, cache, parts, values),
        "best_epoch": module.best_epoch,
        "seconds_per_epoch": seconds_per_epoch,
        "retention": _retention(base, plugin, cache, parts),
        "elements": np.unique(graphs.select(parts["train"]).numbers).tolist(),
        "data": {
            "table": Path(data.source).name,
            "sha256": sha256(Path(data.source)) if Path(data.source).is_file() else None,
            "split_column": split_column,
            "rows": {part: len(rows) for part, rows in parts.items()},
            "rows_excluded": excluded,
        },
        **provenance(time.monotonic() - started),
    }
    if module.penalty is not None:
        plugin.meta["fisher"] = concentration(total_fisher(base.fisher()))
    if output is not None:
        plugin.save(output)
    return plugin


def _parts(
    source: str,
    split: NDArray[np.str_],
    graphs: PackedGraphs,
    values: NDArray[np.float64],
    base: Model,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, int]]:
    """Return the usable rows of each part, and how many were left out for which reason."""
    foreign = graphs.has_elements_outside(base.elements)
    no_graph, no_value = graphs.nodes_per_graph == 0, ~np.isfinite(values)
    usable = ~(foreign | no_graph | no_value)
    parts = {p: np.flatnonzero((split == p) & usable) for p in ("train", "val", "test")}
    _require_rows(source, parts)
    excluded = {
        "unreadable structure": int(no_graph.sum()),
        "no value": int((no_value & ~no_graph).sum()),
        "element unknown to the model": int((foreign & ~no_value).sum()),
    }
    return parts, {reason: count for reason, count in excluded.items() if count}


def _require_rows(source: str, parts: dict[str, NDArray[np.int64]]) -> None:
    """Raise a :class:`TableError` unless there are rows to train on and to stop early on."""
    for part, least in (("train", 2), ("val", 1)):
        if len(parts[part]) < least:
            raise TableError(
                f"{source}: {len(parts[part])} usable row(s) in {part!r}, but at least {least} are "
                "needed; check the split column, the structures, the target values and their "
                "transform"
            )


def _make_head(
    base: Model,
    target: str,
    config: FinetuneConfig,
    values: NDArray[np.float64],
    graphs: PackedGraphs,
) -> PropertyHead:
    """Return the base's own head where it knows the property, else a new one."""
    prop = property_of(target)
    if config.transform is not None:
        prop = replace(prop, transform=config.transform)
    known = base.heads[target] if target in base.heads else None  # noqa: SIM401 - no dict
    kind = config.readout or default_readout(prop)
    if known is not None and known.prop == prop and known.readout.kind == kind:
        # A new readout would throw away what the source already knows of this very property.
        head = PropertyHead.from_json(known.to_json(), base.backbone.node_dim)
        head.load_state_dict(known.state_dict())
        return head.requires_grad_(True)
    head = PropertyHead(prop, base.backbone.node_dim, kind)
    head.scaler = TargetScaler.fit(prop, values, graphs)
    return head


def _penalty(
    base: Model, plugin: Plugin, config: FinetuneConfig, n_train: int
) -> EWCPenalty | None:
    if config.retain == "none" or config.freeze == base.backbone.n_layers:
        return None  # with every layer frozen there is nothing to hold back
    fisher = total_fisher(base.fisher())
    source_size = base.card.get("fisher", {}).get("source_size")
    if source_size is None:
        raise FormatError(
            f"model {base.name!r}: card.json does not say fisher.source_size, the number of source "
            "samples that the strength refers to; write it there"
        )
    return EWCPenalty(plugin.backbone, fisher, config.strength, source_size / n_train)


def _suffix_features(plugin: Plugin, cache: PrefixCache, rows: NDArray[np.int64]) -> Any:
    """Yield batches and last-layer features of the plugin's own backbone."""
    with torch.inference_mode():
        for index in edge_budget_batches(cache.graphs, rows):
            graphs, prefix = cache.batch(index)
            yield graphs, plugin.features(graphs, prefix)


def _figures(
    plugin: Plugin,
    cache: PrefixCache,
    parts: dict[str, NDArray[np.int64]],
    values: NDArray[np.float64],
) -> dict[str, Any]:
    """Return the errors on the validation and test rows, beside those of a constant."""
    figures = {}
    constant = np.median(values[parts["train"]])
    for part in ("val", "test"):
        rows = parts[part]
        batches = _suffix_features(plugin, cache, rows)
        predicted = [plugin.head.values(features.node, graphs) for graphs, features in batches]
        flat = np.concatenate(predicted) if predicted else np.zeros(0)
        figures[part] = regression_metrics(values[rows], flat, plugin.head.prop)
        if len(rows):
            figures[part]["mae_of_a_constant"] = float(np.abs(values[rows] - constant).mean())
    return figures


def _retention(
    base: Model, plugin: Plugin, cache: PrefixCache, parts: dict[str, NDArray[np.int64]]
) -> dict[str, Any]:
    """Return how far the source predictions moved on the target structures, in their units.

    The source heads read the plugin's layers instead of the base's: this is the drift that a
    single network would suffer. A plugin keeps layers of its own, so ``predict`` never shows it.
    """
    rows = np.concatenate([parts["val"], parts["test"]])
    change: dict[str, list[NDArray[np.float64]]] = {name: [] for name in base.heads}
    for graphs, features in _suffix_features(plugin, cache, rows):
        before = base.predict_graphs(graphs)
        after = base.predict_features(features, graphs)
        for name in base.heads:
            change[name].append(np.abs(after[name] - before[name]))
    drift = {
        name: {"mean_absolute_drift": float(np.concatenate(c).mean()), "unit": h.prop.unit}
        for (name, h), c in zip(base.heads.items(), change.values(), strict=True)
    }
    return {"measured_on": "target structures, val and test rows", "drift": drift}
