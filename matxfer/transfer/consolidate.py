"""A plugin becomes the base of the next one, with all that must not be forgotten so far.

The new model has the plugin's layers and the source heads. What holds its weights is

F = γ F_base + (n/N) F_plugin,    anchored at the new weights,

the recursion of online elastic weight consolidation (Schwarz et al., ICML 2018, section 3; one
anchor for all tasks: Huszár, PNAS 115, E2496 (2018)). F_plugin is the mean information per sample
of the plugin's n training rows (:mod:`matxfer.fisher`); N, the number of source samples, is what
the information of a model is the mean over (:mod:`matxfer.transfer.ewc`), so that with γ = 1 each
value ever learned from counts alike, and with γ < 1 the older ones fade.

A plugin's head reads the layers of its base, so it and those of earlier rounds lie beside the new
model, in ``plugins/``, as plugins of it with all layers frozen.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.errors import OptionError
from matxfer.fisher import concentration, output_fisher, total_fisher
from matxfer.model import Model, load_model
from matxfer.provenance import provenance
from matxfer.transfer.activations import Activations
from matxfer.transfer.plugin import Plugin, load_plugin
from matxfer.transfer.report import (
    calibrated,
    evaluations,
    figures_of,
    kept_predictions,
    normalised_residuals,
    predicted_parts,
)
from matxfer.transfer.retention import source_size
from matxfer.transfer.task import make_task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.crystal import Crystal, CrystalError
    from matxfer.data.batch import GraphBatch
    from matxfer.transfer.task import Task

#: What a model takes over from the card of its parent.
_INHERITED = ("data", "licence", "citation")
#: What is true of a plugin whatever layers its head reads.
_LASTING = (
    *("config", "chosen", "elements", "data", "history", "train_history", "trials"),
    *("command", "date", "versions", "seconds"),
)


def consolidate(
    plugin: str | Path | Plugin,
    table: str | Path | pd.DataFrame,
    output: str | Path,
    *,
    model: str | Path | Model | None = None,
    gamma: float = 1.0,
    split_column: str | None = None,
    structure_column: str | None = None,
    samples: int = 1000,
    seed: int = 0,
    on_graphs: Callable[[int], None] | None = None,
) -> Model:
    """Make a base model of a plugin.

    Parameters
    ----------
    plugin
        A plugin or its folder.
    table
        The table that it was trained on.
    output
        Folder of the new model; the plugins of it are in its folder ``plugins``.
    model
        Base of the plugin; ``None``: found by the name that the plugin says.
    gamma
        γ, how much of the information of the base still counts, 0 … 1.
    split_column
        Column with ``train``, ``val`` and ``test``; ``None``: the one that the plugin says.
    structure_column, on_graphs
        As in :func:`matxfer.transfer.finetune.finetune`.
    samples, seed
        At most so many training rows are drawn for the Fisher information, with this seed.

    Returns
    -------
    Model
        Of use wherever a model is; ``card["parent"]`` names the base, ``card["fisher"]`` says γ.

    Raises
    ------
    OptionError
        If an option is out of range, or the plugin has no layers of the base's or no gradient.
    FormatError
        If the base has no Fisher information.

    Examples
    --------
    >>> import matxfer
    >>> plugin = matxfer.finetune(
    ...     "solids.parquet", "bulk_modulus_gpa", "first", model="mp-small", freeze=2, epochs=1
    ... )
    >>> model = matxfer.consolidate(plugin, "solids.parquet", "next-base", samples=20)
    >>> model.name, model.card["parent"]["name"]
    ('next-base', 'mp-small')
    """
    started = time.monotonic()
    given = model if isinstance(model, Model | None) else load_model(model)
    own = plugin if isinstance(plugin, Plugin) else load_plugin(plugin, given)
    base, folder = own.base, Path(output)
    _check(own, gamma, samples, folder)
    facts = own.meta.get("data", {})
    data = read_property_table(
        table,
        [own.target],
        split_column=split_column or facts.get("split_column"),
        structure_column=structure_column,
        seed=own.meta.get("config", {}).get("seed", 0),
    )
    graphs = graph_store(data.crystals, base.backbone.graph_options, on_progress=on_graphs).graphs
    activations = Activations(base, graphs)
    task = make_task(base, data, own.target, graphs, activations, own.head.prop.transform)

    backbone = copy.deepcopy(own.backbone).eval().requires_grad_(False)
    heads = copy.deepcopy(list(base.heads.values()))
    merged = Model(backbone, heads, base.elements).eval().requires_grad_(False)
    moved = _moved(own, merged)
    found = [evaluation for evaluation, _, _ in evaluations(task, own, task.parts["val"])]
    residual = normalised_residuals(task, own, found, task.parts["val"])
    noise = max(float(np.sqrt(np.mean(residual**2))), 1e-3)
    rows = task.parts["train"]
    if len(rows) > samples:
        rows = np.sort(np.random.default_rng(seed).choice(rows, samples, replace=False))
    fresh = plugin_fisher(moved, task, rows, noise)
    size = source_size(base)
    fisher = accumulated(base.fisher(), fresh, gamma, len(task.parts["train"]) / size)
    merged.card = {
        **{key: base.card[key] for key in _INHERITED if key in base.card},
        "parent": {**_identity(base), "parent": base.card.get("parent")},
        "consolidated": {
            "plugin": own.name,
            "target": own.target,
            "table": Path(data.source).name,
            "rows": len(task.parts["train"]),
            "drift": own.meta.get("retention", {}).get("drift"),
        },
        "fisher": {
            "source_size": size,
            "gamma": gamma,
            "samples": len(rows),
            "noise_normalised": {own.target: noise},
            "concentration": concentration(total_fisher(fisher)),
        },
        "note": f"layers of plugin {own.name}, source heads of {base.name}, not trained again",
        **provenance(time.monotonic() - started),
    }
    merged.save(folder, fisher)
    _save_plugins(merged, own, moved, task, data.crystals)
    return merged


def plugin_fisher(
    plugin: Plugin, task: Task, rows: NDArray[np.int64], noise: float
) -> dict[str, Tensor]:
    """Return the mean diagonal Fisher information of a plugin's prediction per sample.

    Parameters
    ----------
    plugin
        With all layers frozen, so that its backbone's parameters are those of its base.
    task, rows
        Training structures.
    noise
        σ, the spread of its residuals in units of the targets' spread.

    Returns
    -------
    dict
        ``"<property>__<plugin>/<backbone parameter>"`` → tensor of the parameter's shape.
    """
    head, source, key = plugin.head, plugin.head.source, f"{plugin.target}__{plugin.name}"
    last = plugin.backbone.n_layers

    def outputs(batch: GraphBatch) -> dict[str, Tensor]:
        features = plugin.backbone.embed(batch)
        nodes = [features.node]
        nodes += [s.node for s in plugin.backbone.states(batch, features, 0, last)]
        read = [nodes[k] for k in head.layers]
        output = head(head.inputs(read, batch), batch).mean(0)
        if source is not None:  # the base's prediction that it starts from moves too
            fitted = plugin.base.heads[source].fitted(nodes[last], batch)
            output = output + head.slope * fitted / head.scaler.std
        return {key: output}

    return output_fisher(plugin.backbone, outputs, task.graphs, rows, {key: noise})


def accumulated(
    earlier: dict[str, Tensor], fresh: dict[str, Tensor], gamma: float, ratio: float
) -> dict[str, Tensor]:
    """Return γ F_base + (n/N) F_plugin, part by part.

    Parameters
    ----------
    earlier, fresh
        Mean information per sample of the base and of the plugin, by ``"<part>/<parameter>"``.
    ratio
        n/N, training rows of the plugin over source samples.
    """
    total = {key: gamma * value for key, value in earlier.items()}
    for key, value in fresh.items():
        total[key] = total[key] + ratio * value if key in total else ratio * value
    return total


def _check(own: Plugin, gamma: float, samples: int, folder: Path) -> None:
    if not 0 <= gamma <= 1:
        raise OptionError(f"gamma is {gamma}, but must be between 0 (forget the source) and 1")
    if samples < 1:
        raise OptionError(f"samples is {samples}, but must be at least 1")
    if own.meta.get("config", {}).get("strategy") == "scratch":
        raise OptionError(
            f"plugin {own.name!r} was trained from random weights, on which the source heads know "
            "nothing; fine-tune from the base model"
        )
    if getattr(own.head.readout, "method", None) == "forest":
        raise OptionError(
            f"plugin {own.name!r} is a forest, which has no gradient and so no Fisher information; "
            "choose another strategy"
        )
    if own.base.folder is not None and folder.resolve() == own.base.folder.resolve():
        raise OptionError(f"{folder} is the base of plugin {own.name!r}; write to another folder")
    if own.name in {path.name for path in _plugins_of(own.base)}:
        raise OptionError(
            f"{own.base.name!r} holds a plugin called {own.name!r} already; rename the new one's "
            "folder"
        )


def _identity(model: Model) -> dict[str, str]:
    return {"name": model.name, "sha256": model.checksum}


def _plugins_of(model: Model) -> list[Path]:
    """Return the folders of the plugins that lie beside a consolidated model."""
    if model.folder is None:
        return []
    return sorted(path.parent for path in model.folder.glob("plugins/*/plugin.json"))


def _moved(plugin: Plugin, model: Model) -> Plugin:
    """Return a plugin's head as a plugin of another model, all its layers frozen."""
    meta = {key: plugin.meta[key] for key in _LASTING if key in plugin.meta}
    first = plugin.meta.get("consolidated", {"trained_on": _identity(plugin.base)})
    meta |= {"name": plugin.name, "consolidated": first}
    return Plugin(model, model.backbone.n_layers, copy.deepcopy(plugin.head), meta).eval()


def _save_plugins(
    model: Model,
    own: Plugin,
    moved: Plugin,
    task: Task,
    crystals: Sequence[Crystal | CrystalError],
) -> None:
    """Write the plugin, measured again, and those of earlier rounds beside the model.

    It keeps as many predictions as before, none where it kept none. Of the earlier ones no table
    is at hand: they have no figures, predictions and uncertainty any more.
    """
    assert model.folder is not None, "the model has been written"
    task = replace(task, base=model, activations=Activations(model, task.graphs))
    calibrated(task, moved)
    found = predicted_parts(task, moved)
    moved.meta["figures"] = figures_of(task, moved, found)
    before = own.meta.get("predictions") or {}
    most = max((len(part["truth"]) for part in before.values()), default=0)
    if kept := kept_predictions(task, found, crystals, most):
        moved.meta["predictions"] = kept
    moved.save(model.folder / "plugins" / own.name)
    for path in _plugins_of(own.base):
        earlier = _moved(load_plugin(path, own.base), model)
        earlier.save(model.folder / "plugins" / path.name)
