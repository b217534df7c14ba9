"""One cell of a transfer map: features of a frozen network, a readout, its errors on a split."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.data.store import graph_store
from matxfer.model import Model
from matxfer.nn.feature_readout import FeatureReadout
from matxfer.probing.composition import KINDS as COMPOSITIONS
from matxfer.probing.composition import features_of
from matxfer.probing.networks import architecture, changed
from matxfer.transfer import affinity
from matxfer.transfer.activations import Activations
from matxfer.transfer.baselines import untrained
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.features import METHODS as SIMPLE
from matxfer.transfer.features import fit_features, principal_axes
from matxfer.transfer.report import predicted
from matxfer.transfer.strategies import run_strategy
from matxfer.transfer.task import make_task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.benchmark.records import Record
    from matxfer.data.packed import PackedGraphs
    from matxfer.graph import GraphOptions
    from matxfer.probing.targets import Target
    from matxfer.transfer.task import Task

    Run = dict[str, Any]

#: How the target is learnt. The simple models read fingerprints of layer K; ``readouts`` are
#: trained networks on the atoms' features of layer K; ``finetune`` trains a readout and the layers
#: above K.
METHODS = (*SIMPLE, "readouts", "finetune")
#: What is no source: the network with random weights, frozen; the same, all of it trained on the
#: target; and features of the composition.
RANDOM, SCRATCH = "random weights", "scratch"
NO_SOURCES = (RANDOM, SCRATCH, *COMPOSITIONS)
#: Affinity without training, on normalised targets, the larger the better: centred alignment of
#: the fingerprints' kernel with the targets, leave-one-out errors of the mean of five neighbours
#: and of ridge regression (negative), logarithm of the evidence of a linear model.
SCORES = ("kernel alignment", "nearest neighbours", "ridge", "LogME")
#: The simple model where the method trains networks and there is none to train.
_DEFAULT = "kernel_ridge"


class Cells:
    """Measures cells; what the network made of a table is kept for the next one.

    Parameters
    ----------
    targets, sources
        By name.
    on_graphs
        Called with the number of graphs built since the last call.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        sources: Mapping[str, Model],
        on_graphs: Callable[[int], None] | None = None,
    ) -> None:
        self.targets, self.sources = targets, sources
        self._shapes = {architecture(model): model for model in sources.values()}
        self._on_graphs = on_graphs
        self._graphs: dict[tuple[str, GraphOptions], PackedGraphs] = {}
        self._latest: tuple[Any, Activations] | None = None

    def measure(self, run: Run) -> Record:
        """Return the errors of a cell; the setting is chosen on ``val``, ``test`` is read once."""
        started = time.monotonic()
        target = self.targets[run["target"]]
        activations = self._activations(run)
        task = make_task(
            activations.model,
            target.split(run["split"], run["rows"], run["seed"]),
            target.column,
            activations.graphs,
            activations,
            run["transform"],
        )
        val, test = self._errors(task, run)
        truth, centre = task.values, np.median(task.values[task.parts["train"]])
        return {
            "val": val,
            "test": test,
            "constant": float(np.abs(truth[task.parts["test"]] - centre).mean()),
            "train_rows": len(task.parts["train"]),
            "test_rows": len(task.parts["test"]),
            "scores": self._scores(task, run),
            "seconds": round(time.monotonic() - started, 3),
        }

    def fingerprints(self, target: str, source: str) -> NDArray[np.float64]:
        """Return fingerprints of the last layer for all rows of a target, (n, D)."""
        kept = self._kept(target, self.sources[source], (target, source))
        last = self.sources[source].backbone.n_layers
        return kept.inputs(FeatureReadout.kind, (last,)).double().numpy()

    def graphs(self, target: str, options: GraphOptions) -> PackedGraphs:
        """Return the graphs of all rows of a target."""
        data = self.targets[target].data
        if (target, options) not in self._graphs:
            store = graph_store(data.crystals, options, on_progress=self._on_graphs)
            self._graphs[target, options] = store.graphs
        return self._graphs[target, options]

    def _activations(self, run: Run) -> Activations:
        source, weights, seed = run["source"], run["weights"], _draw(run)
        key: tuple[Any, ...] = (run["target"], source, weights)
        if source in NO_SOURCES:
            model = self._shapes.get(weights) or next(iter(self.sources.values()))
            if source == RANDOM:
                return self._kept(run["target"], lambda: untrained(model, seed), (*key, seed))
            return self._kept(run["target"], model, key)
        model = self.sources[source]
        if run["way"] is None:
            return self._kept(run["target"], model, key)
        change = (run["layer"], run["way"], seed)
        return self._kept(run["target"], lambda: changed(model, *change), (*key, *change))

    def _kept(self, target: str, model: Model | Callable[[], Model], key: Any) -> Activations:
        """Return what a model makes of a target, made once as long as it is asked for in turn."""
        if self._latest is None or self._latest[0] != key:
            made = model if isinstance(model, Model) else model()
            graphs = self.graphs(target, made.backbone.graph_options)
            self._latest = (key, Activations(made, graphs))
        return self._latest[1]

    def _scores(self, task: Task, run: Run) -> dict[str, float] | None:
        """Return the affinity scores of frozen features, of the training rows alone."""
        if run["source"] == SCRATCH or run["way"] is not None:
            return None
        return affinity_scores(task, self._features(task, run))

    def _features(self, task: Task, run: Run) -> Tensor:
        """Return fingerprints (G, D) of all rows."""
        if run["source"] in COMPOSITIONS:
            return features_of(run["source"], task.graphs)
        return task.inputs(FeatureReadout.kind, (run["depth"],))

    def _errors(self, task: Task, run: Run) -> tuple[float, float]:
        method, depth, seed = run["method"], run["depth"], _draw(run)
        if run["source"] == SCRATCH:
            config = FinetuneConfig(strategy="scratch", seed=seed)
        elif method in SIMPLE:
            return simple_errors(task, self._features(task, run), method, seed)
        else:
            # A start from the source's own prediction would tell of all its layers.
            config = FinetuneConfig("finetune", depth, difference=False, seed=seed)
            if method == "readouts":
                last = task.base.backbone.n_layers
                config = replace(config, freeze=last, layers=(depth,))
        trial = run_strategy(task, config)
        rows = task.parts["test"]
        told = predicted(task, trial.plugin, rows)[0]
        return trial.error, float(np.abs(told - task.values[rows]).mean())


def method_of(source: str, method: str) -> str:
    """Return how a target is learnt from a source, or from what is none."""
    if source == SCRATCH:
        return SCRATCH
    return _DEFAULT if source in COMPOSITIONS and method not in SIMPLE else method


def simple_errors(task: Task, inputs: Tensor, method: str, seed: int = 0) -> tuple[float, float]:
    """Return the mean absolute errors on ``val`` and ``test`` of a simple model of features.

    Parameters
    ----------
    inputs
        Features (G, D) of all rows of the task.
    method
        See :data:`matxfer.transfer.features.METHODS`; its settings are chosen on ``val``.
    """
    scaler, train, val = task.scaler(None), task.parts["train"], task.parts["val"]
    targets = task.targets(scaler, None).astype(np.float64)
    readout = fit_features(method, inputs, targets, train, val, seed)
    errors = []
    for part in ("val", "test"):
        rows = task.parts[part]
        graphs = task.graphs.batch(rows, with_edges=False)
        with torch.no_grad():
            output = readout(inputs[torch.from_numpy(rows)], graphs).mean(0)
            fitted = scaler.fitted(output, graphs).double().numpy()
        errors.append(float(np.abs(scaler.to_unit(fitted) - task.values[rows]).mean()))
    return errors[0], errors[1]


def affinity_scores(task: Task, inputs: Tensor) -> dict[str, float] | None:
    """Return how well features (G, D) explain the target, in closed form: see :data:`SCORES`.

    ``None`` for features that are the same for all crystals.
    """
    rows, scaler = task.parts["train"], task.scaler(None)
    y = task.targets(scaler, None)[rows].astype(np.float64)
    centre, project = principal_axes(inputs, rows)
    x = (inputs[torch.from_numpy(rows)].double().numpy() - centre) @ project
    if not np.ptp(x, axis=0).any():
        return None
    return {
        "kernel alignment": affinity.target_alignment(x @ x.T, y),
        "nearest neighbours": float(-np.abs(affinity.nearest_neighbour_residuals(x, y)).mean()),
        "ridge": float(-np.abs(affinity.ridge_residuals(x, y)).mean()),
        "LogME": affinity.log_evidence(x, y),
    }


def _draw(run: Run) -> int:
    """Return the seed of random weights and trained readouts: another one for each split."""
    return int(run["seed"] + 1000 * run["draw"])
