"""The strategies: how a plugin comes about, and how ``auto`` chooses among them."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np

from matxfer.nn.ensemble import ReadoutEnsemble, join_readouts
from matxfer.nn.feature_readout import FeatureReadout
from matxfer.transfer.correction import corrected_head
from matxfer.transfer.features import fit_features
from matxfer.transfer.freezing import check_depth
from matxfer.transfer.plugin import Plugin
from matxfer.transfer.report import predicted
from matxfer.transfer.retention import Retention
from matxfer.transfer.training import train_plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from matxfer.nn.plugin_head import PluginHead
    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.retention import SourceData
    from matxfer.transfer.task import Task

#: ``auto`` keeps the strongest retention whose validation error is within this of the best.
TOLERANCE = 0.02
#: Strengths that ``strength="auto"`` tries, the strongest first.
STRENGTHS = (10.0, 1.0, 0.1, 0.01, 0.0)
#: Random weights need more passes than pretrained ones; twice as many were no better.
SCRATCH_EPOCHS = 50
#: ``auto`` tries a Gaussian process up to so many rows, where it takes a second.
FEW_ROWS = 400
#: ``auto`` does not train layers where even one epoch of them would take longer than this.
SLOW_EPOCH_S = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A plugin that was tried.

    Attributes
    ----------
    plugin
        With its best weights, rounded as in a file.
    config
        What it was made with, every choice spelled out.
    error
        Mean absolute error on the validation rows, in the property's unit; weighed as they are.
    facts
        Seconds, best epoch and the like.
    """

    plugin: Plugin
    config: FinetuneConfig
    error: float
    facts: dict[str, Any]

    @property
    def label(self) -> str:
        """Say in a few words what was tried."""
        config, head = self.config, self.plugin.head
        read = ",".join(map(str, head.layers))
        if config.strategy == "features":
            return f"features, {config.simple_model}, layers {read}"
        if config.strategy == "correction":
            return f"correction, {self.facts['correction']['form']}, of {head.source}"
        held = "" if config.retain == "none" else f", {config.retain} {config.strength}"
        start = f", from {head.source}" if head.source else ""
        if config.invariant != "none" and self.plugin.depth < self.plugin.backbone.n_layers:
            held += f", {config.invariant} {config.invariant_strength:g}"
        return (
            f"{config.strategy}, {self.plugin.depth} frozen, {head.readout.kind}, "
            f"layers {read}{start}{held}"
        )


def run_strategy(
    task: Task,
    config: FinetuneConfig,
    source: SourceData | None = None,
    probe: PluginHead | None = None,
) -> Trial:
    """Make a plugin by one strategy; ``auto`` is :func:`choose`.

    Parameters
    ----------
    probe
        A head that was trained on the frozen network with the same options: where the training of
        layers starts from one, it need not be trained again.

    Raises
    ------
    ValueError
        If an option is out of range.
    """
    if config.strategy != "scratch" and config.strength == "auto":
        return _strongest(task, config, source, probe)
    L.seed_everything(config.seed, verbose=False)
    started = time.monotonic()
    if config.strategy == "features":
        plugin, facts = _features(task, config)
    elif config.strategy == "correction":
        head, facts = corrected_head(task, config)
        plugin = Plugin(task.base, task.base.backbone.n_layers, head)
    elif config.strategy == "scratch":
        plugin, facts = _scratch(task, config)
    else:
        plugin, facts = _finetune(task, config, source, probe)
    return _measured(task, plugin, config, facts, started)


def _measured(
    task: Task, plugin: Plugin, config: FinetuneConfig, facts: dict[str, Any], started: float
) -> Trial:
    """Round a finished plugin as its file will, and measure it on the validation rows."""
    plugin.eval().round()
    val = task.parts["val"]
    error = task.mean(np.abs(predicted(task, plugin, val)[0] - task.values[val]), val)
    facts["seconds"] = round(time.monotonic() - started, 3)
    return Trial(plugin, config, error, facts)


def _strongest(
    task: Task, config: FinetuneConfig, source: SourceData | None, probe: PluginHead | None
) -> Trial:
    """Return the trial of the strongest retention that costs next to nothing."""
    strengths = STRENGTHS if _retains(task, config) else STRENGTHS[-1:]
    if probe is None and _starts_from_probe(task, config):
        probe = _probe(task, config)
    trials = [run_strategy(task, replace(config, strength=s), source, probe) for s in strengths]
    limit = min(trial.error for trial in trials) * (1 + TOLERANCE)
    chosen = next(trial for trial in trials if trial.error <= limit)
    tried = {str(t.config.strength): t.error for t in trials}
    return replace(chosen, facts=chosen.facts | {"val_mae_by_strength": tried})


def _depth(task: Task, config: FinetuneConfig) -> int:
    last = task.base.backbone.n_layers
    if config.freeze is not None:
        return config.freeze
    return last if config.retain == config.invariant == "none" else last // 2


def _retains(task: Task, config: FinetuneConfig) -> bool:
    """Say whether there are layers to hold back, and a way to do it."""
    trained = _depth(task, config) < task.base.backbone.n_layers
    return config.strategy == "finetune" and config.retain != "none" and trained


def choose(
    task: Task,
    config: FinetuneConfig,
    source: SourceData | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> tuple[Trial, list[Trial]]:
    """Try strategies from the cheapest to the dearest; return the best and all.

    Options that were given (a frozen depth, a readout, a retention …) are kept in all trials. With
    all layers frozen several readouts and simple models are tried; then half of the layers are
    freed, held by EWC, and if that helps all of them. The choice looks at validation rows alone.
    """
    trials: list[Trial] = []

    def add(trial: Trial) -> None:
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)

    def attempt(candidate: FinetuneConfig, start: PluginHead | None = None) -> None:
        add(run_strategy(task, candidate, source, start))

    last = task.base.backbone.n_layers
    probe: Trial | None = None
    if config.freeze in (None, last):
        for candidate in _on_frozen_layers(task, config):
            attempt(candidate)
        if (joint := _joint(task, trials)) is not None:
            add(joint)
        tuned = [t for t in trials if t.config.strategy == "finetune"]
        probe = min(tuned, key=lambda t: t.error)
    if config.freeze != last and _layers_are_affordable(task, config):
        # Held by default: it costs next to nothing, and the layers stay of use to the source.
        held = "ewc" if config.retain == "none" and task.base.has_fisher else config.retain
        start = config if probe is None else probe.config
        head = probe.plugin.head if probe is not None and config.probe_first else None
        for depth in (last // 2, 0) if config.freeze is None else (config.freeze,):
            before = min((trial.error for trial in trials), default=math.inf)
            attempt(replace(start, strategy="finetune", freeze=depth, retain=held), head)
            if trials[-1].error >= before:
                break  # where freeing half of the layers is of no use, freeing all is of less
    return min(trials, key=lambda trial: trial.error), trials


def _joint(task: Task, trials: list[Trial]) -> Trial | None:
    """Return the mean of the two best readouts as one, if they can be joined."""
    started = time.monotonic()
    tuned = [
        (trial, trial.plugin.head.readout)
        for trial in sorted(trials, key=lambda trial: trial.error)
        if isinstance(trial.plugin.head.readout, ReadoutEnsemble)
    ][:2]
    joint = join_readouts([(readout, trial.plugin.head.layers) for trial, readout in tuned])
    if joint is None or len(tuned) < 2:
        return None
    (readout, layers), best = joint, tuned[0][0]
    old = best.plugin.head
    plugin = Plugin(
        task.base, best.plugin.depth, task.head(layers, readout, old.source, old.scaler)
    )
    config = replace(best.config, readout=readout.kind, layers=layers, members=readout.members)
    facts = {"mean_of": [trial.label for trial, _ in tuned]}
    return _measured(task, plugin, config, facts, started)


def _on_frozen_layers(task: Task, config: FinetuneConfig) -> Iterator[FinetuneConfig]:
    """Yield what ``auto`` tries with all layers frozen, in seconds."""
    last = task.base.backbone.n_layers
    every, tuned = tuple(range(last + 1)), replace(config, strategy="finetune", freeze=last)
    kinds = [config.readout] if config.readout else [task.readout_kind(config), "extrema"]
    for kind in kinds:
        yield replace(tuned, readout=kind)
    if config.layers is None:
        yield replace(tuned, readout=kinds[0], layers=(last,))
    simple = replace(config, strategy="features")
    for layers in [config.layers] if config.layers else [every, (last,)]:
        yield replace(simple, features="kernel_ridge", layers=layers)
    if len(task.parts["train"]) <= FEW_ROWS:
        yield replace(simple, features="gaussian_process")


def _layers_are_affordable(task: Task, config: FinetuneConfig) -> bool:
    """Guess from the number of edges whether an epoch of training layers is short."""
    if config.freeze is not None:
        return True  # it was asked for
    edges = int(task.graphs.edges_per_graph[task.parts["train"]].sum())
    return edges * task.base.backbone.edge_seconds < SLOW_EPOCH_S


def _starts_from_probe(task: Task, config: FinetuneConfig) -> bool:
    return config.probe_first and _depth(task, config) < task.base.backbone.n_layers


def _probe(task: Task, config: FinetuneConfig) -> PluginHead:
    """Train a readout on the frozen network, with the epochs that such a one takes."""
    last = task.base.backbone.n_layers
    alone = replace(config, freeze=last, retain="none", invariant="none", epochs=None)
    return _finetune(task, alone, None, None)[0].head


def _finetune(
    task: Task, config: FinetuneConfig, source: SourceData | None, probe: PluginHead | None
) -> tuple[Plugin, dict[str, Any]]:
    depth = check_depth(task.base.backbone, _depth(task, config))
    if _starts_from_probe(task, config):
        head = copy.deepcopy(probe or _probe(task, config))
    else:
        head = _readout_head(task, config, task.source(config))
    plugin = Plugin(task.base, depth, head)
    retention = None
    if _retains(task, config):
        retention = Retention(plugin, config, len(task.parts["train"]), source)
    targets = task.targets(head.scaler, head.source)
    return plugin, asdict(train_plugin(task, plugin, targets, config, retention))


def _scratch(task: Task, config: FinetuneConfig) -> tuple[Plugin, dict[str, Any]]:
    """Train the whole network from random weights: one rate for all layers, nothing retained."""
    head = _readout_head(task, config, None)
    plugin = Plugin(task.base, 0, head)
    base = task.base.backbone
    fresh = type(base).from_config(base.config())
    plugin.backbone.load_state_dict(fresh.state_dict())
    own = replace(
        config,
        retain="none",
        probe_first=False,
        layer_decay=1.0,
        learning_rate=config.head_learning_rate,
        epochs=config.epochs or SCRATCH_EPOCHS,
    )
    return plugin, asdict(train_plugin(task, plugin, task.targets(head.scaler, None), own))


def _readout_head(task: Task, config: FinetuneConfig, source: str | None) -> PluginHead:
    layers = task.layers(config)
    readout = ReadoutEnsemble(
        task.readout_kind(config),
        task.base.backbone.node_dim * len(layers),
        config.hidden_dim,
        config.members,
    )
    return task.head(layers, readout, source, task.scaler(source))


def _features(task: Task, config: FinetuneConfig) -> tuple[Plugin, dict[str, Any]]:
    layers, source = task.layers(config), task.source(config)
    scaler = task.scaler(source)
    targets = task.targets(scaler, source).astype(np.float64)
    readout = fit_features(
        config.simple_model,
        task.inputs(FeatureReadout.kind, layers),
        targets,
        task.parts["train"],
        task.parts["val"],
        config.seed,
        task.axes(layers),
        task.weights,
    )
    head = task.head(layers, readout, source, scaler)
    return Plugin(task.base, task.base.backbone.n_layers, head), {}
