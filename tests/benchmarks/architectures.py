"""The built-in network against CGCNN and SchNet: same rows, same budget of training.

All models share graphs, readout, target scaler, loss, optimiser, schedule, batch size, threads and
precision; each gets its own learning rate, the best of a few short runs on the validation rows.
The budget counts seconds of training steps (batches included, validation not), or epochs. Models
train in turns of a few seconds, so that whatever else the machine does hits all of them alike. The
weights are those of the best validation; the test rows are read once, at the end.

A baseline by its plain name is given our graphs of the asymmetric unit, which its own packages do
not have; ``NAME-full`` is the same network on graphs of the full cell, as it is installed.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables
from baselines import CGCNN, SchNet

from matxfer.data.loader import LabelledGraphs, shuffled_loader
from matxfer.data.properties import property_of
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.graph import GraphOptions
from matxfer.metrics import predict_rows, regression_metrics
from matxfer.model import Model
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.nn.scaling import TargetScaler
from matxfer.pretraining.config import TrainingConfig
from matxfer.readers import load_table
from matxfer.runtime import keep_large_blocks, use_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from matxfer.data.loader import LabelledBatch
    from matxfer.data.packed import PackedGraphs

TARGET = "formation_energy_ev_per_atom"
HIDDEN_DIM = 128
MEV = 1000.0

MODELS: dict[str, Callable[[GraphOptions], torch.nn.Module]] = {
    "ours": lambda options: EdgeGatedNetwork(node_dim=192, angular_dim=16, graph_options=options),
    "ours-distances": lambda options: EdgeGatedNetwork(graph_options=options),
    "cgcnn": lambda options: CGCNN(graph_options=options),
    "schnet": lambda options: SchNet(graph_options=options),
    "cgcnn-128": lambda options: CGCNN(node_dim=128, graph_options=options),
    "schnet-128": lambda options: SchNet(node_dim=128, graph_options=options),
}
FULL = "-full"
MODELS |= {f"{name}{FULL}": make for name, make in MODELS.items() if not name.startswith("ours")}


def options_of(name: str) -> GraphOptions:
    """Return the graphs that a model works on."""
    return GraphOptions(symmetry=not name.endswith(FULL))


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Graphs of all rows, their values in eV/atom (NaN: none), and the rows of each part."""

    graphs: PackedGraphs
    values: NDArray[np.float64]
    rows: dict[str, NDArray[np.int64]]
    scaler: TargetScaler

    @property
    def targets(self) -> NDArray[np.float32]:
        """Normalised targets, shape (G, 1)."""
        return self.scaler.normalised(self.values, self.graphs)[:, None]

    def mae_of_references(self, part: str) -> float:
        """Return the error, in eV/atom, of a network whose output is zero."""
        normalised = self.targets[self.rows[part], 0]
        return float(np.nanmean(np.abs(normalised)) * self.scaler.std)


def load_data(
    folder: Path, n_train: int, n_report: int | None, seed: int, options: GraphOptions
) -> Data:
    """Read the coherent rows: n_train of the training part, val and test whole or n_report each."""
    frame = load_table(folder / "mp_formation_energy.parquet")
    frame = frame[(frame["structure_source"] == "crysxpp") & frame[TARGET].notna()]
    rng = np.random.default_rng(seed)
    chosen = []
    for part, limit in (("train", n_train), ("val", n_report), ("test", n_report)):
        rows = np.flatnonzero(frame["split"].to_numpy() == part)
        size = len(rows) if limit is None else min(limit, len(rows))
        chosen.append(np.sort(rng.choice(rows, size, replace=False)))
    frame = frame.iloc[np.concatenate(chosen)].reset_index(drop=True)
    table = read_property_table(frame, [TARGET], split_column="split")
    graphs = graph_store(table.crystals, options).graphs
    usable = graphs.nodes_per_graph > 0
    rows = {p: np.flatnonzero(usable & (table.split == p)) for p in ("train", "val", "test")}
    values = table.values[TARGET]
    scaler = TargetScaler.fit(
        property_of(TARGET), values[rows["train"]], graphs.select(rows["train"])
    )
    return Data(graphs, values, rows, scaler)


@dataclass(frozen=True, slots=True)
class Settings:
    """What all runs have in common; with ``epochs`` given, they are the budget, not seconds."""

    training: TrainingConfig
    budget_s: float
    bf16: bool
    epochs: float | None = None


class Run:
    """One model on its way through its budget; :meth:`train` may be called for a slice of it."""

    def __init__(
        self, name: str, learning_rate: float, seed: int, data: Data, settings: Settings
    ) -> None:
        self.name, self.learning_rate, self.seed = name, learning_rate, seed
        self.data, self.settings = data, settings
        torch.manual_seed(seed)
        prop = property_of(TARGET)
        backbone = MODELS[name](options_of(name))
        head = PropertyHead(prop, backbone.node_dim, default_readout(prop), HIDDEN_DIM)
        head.scaler = copy.deepcopy(data.scaler)
        self.head, self.model = head, Model(backbone, [head])
        options = settings.training
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, weight_decay=options.weight_decay
        )
        dataset = LabelledGraphs(data.graphs, data.rows["train"], data.targets)
        self.loader = shuffled_loader(dataset, options.batch_size, seed)
        self.batches: Iterator[LabelledBatch] = iter(())
        self.spent_s, self.seen, self.passes = 0.0, 0, -1
        self.best_mae, self.best_at, self.best = math.inf, 0.0, self.model.state_dict()

    @property
    def progress(self) -> float:
        """Part of the budget that is spent."""
        if self.settings.epochs is not None:
            return self.epochs / self.settings.epochs
        return self.spent_s / self.settings.budget_s

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self.progress >= 1

    @property
    def epochs(self) -> float:
        """Passes over the training rows so far."""
        return self.seen / len(self.data.rows["train"])

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.model.parameters())

    def train(self, seconds: float) -> None:
        """Train for a slice of the budget; validate after each epoch and when it is spent."""
        stop = self.spent_s + seconds
        while self.spent_s < stop and not self.done:
            start = time.perf_counter()
            batch = next(self.batches, None)
            if batch is None:
                self._next_epoch()
                continue
            self._step(batch)
            self.seen += batch.graphs.num_graphs
            self.spent_s += time.perf_counter() - start
        if self.done:
            self._validate()

    def _next_epoch(self) -> None:
        if self.seen:
            self._validate()
        self.passes += 1
        self.loader.sampler.set_epoch(self.passes)
        self.batches = iter(self.loader)

    def _step(self, batch: LabelledBatch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self._schedule()
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            output = self.head(self.model.backbone(batch.graphs).node, batch.graphs)
        loss = (output.float() - batch.targets[:, 0]).abs().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip = self.settings.training.clip_norm
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()

    def _schedule(self) -> float:
        """Return the factor of the learning rate: warm-up, then a cosine over the budget."""
        part = self.progress
        warmup = self.settings.training.warmup_fraction
        if part < warmup:
            return max(part / warmup, 0.01)
        return 0.5 * (1 + math.cos(math.pi * min((part - warmup) / (1 - warmup), 1)))

    def _validate(self) -> None:
        mae = self.mae("val")
        if mae < self.best_mae:
            self.best_mae, self.best_at = mae, self.epochs
            self.best = copy.deepcopy(self.model.state_dict())

    def mae(self, part: str) -> float:
        """Return the mean absolute error on a part in eV/atom, in full precision."""
        rows = self.data.rows[part]
        predicted = predict_rows(self.model.eval(), self.data.graphs, rows)[TARGET]
        measured = regression_metrics(self.data.values[rows], predicted, self.head.prop)
        # A diverged run predicts NaN, which regression_metrics leaves out.
        return float(measured["mae"]) if np.isfinite(predicted).all() else math.inf

    def test(self) -> float:
        """Return the error on the test rows with the weights of the best validation."""
        self.model.load_state_dict(self.best)
        return self.mae("test")


def run_in_turns(runs: Sequence[Run], slice_s: float) -> None:
    """Spend the budgets of all runs, a slice each in turn."""
    while active := [run for run in runs if not run.done]:
        for run in active:
            run.train(slice_s)


def warm_up(names: Sequence[str], data: dict[str, Data], settings: Settings) -> None:
    """Take some steps with models that are thrown away, before any clock matters."""
    for name in names:
        Run(name, 1e-4, 0, data[name], settings).train(1.0)


def choose_learning_rates(
    names: Sequence[str],
    rates: Sequence[float],
    data: dict[str, Data],
    settings: Settings,
    slice_s: float,
) -> dict[str, float]:
    """Return for each model the learning rate of the lowest validation error of short runs."""
    if len(rates) == 1:
        return dict.fromkeys(names, rates[0])
    # A seed of its own: the choice should not know the runs that are reported.
    runs = [Run(name, rate, 10_000, data[name], settings) for name in names for rate in rates]
    run_in_turns(runs, slice_s)
    chosen = {}
    for name in names:
        mine = [run for run in runs if run.name == name]
        for run in mine:
            print(f"{name}: learning rate {run.learning_rate:g}: val {run.best_mae * MEV:.1f}")
        chosen[name] = min(mine, key=lambda run: run.best_mae).learning_rate
        if len(rates) > 2 and chosen[name] in (min(rates), max(rates)):
            print(f"{name}: the best learning rate is at the end of the range")
    return chosen


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean, and the standard deviation over the seeds if there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "architectures")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["ours", "cgcnn", "schnet"], help="which"
    )
    parser.add_argument("--train", type=int, default=8000, help="training rows")
    parser.add_argument("--limit", type=int, help="rows of val and of test (default: all)")
    parser.add_argument("--budget", type=float, default=240, help="seconds of training per model")
    parser.add_argument(
        "--epochs", type=float, help="passes over the training rows as the budget, not seconds"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs per model")
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[5e-4, 1e-3, 2e-3, 4e-3],
        help="candidates; a single one is used as it is",
    )
    parser.add_argument(
        "--tune-budget", type=float, default=40, help="seconds of training per candidate"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="crystals per batch")
    parser.add_argument("--precision", choices=("32", "bf16-mixed"), default="32")
    parser.add_argument("--slice", type=float, default=10, help="seconds of a model's turn")
    return parser.parse_args()


def main() -> None:
    """Train all models and write the table."""
    args = parse_arguments()
    # Tails of Gaussians are denormal numbers, on which matrix products crawl: the baselines, which
    # multiply them in every layer, would lose most of their speed. Before any thread is started,
    # because threads inherit it.
    torch.set_flush_denormal(True)
    use_threads(args.threads)
    keep_large_blocks()
    loaded = {
        options: load_data(args.data, args.train, args.limit, args.seed, options)
        for options in map(options_of, args.models)
    }
    data = {name: loaded[options_of(name)] for name in args.models}
    some = data[args.models[0]]
    training = TrainingConfig(batch_size=args.batch_size)
    bf16 = args.precision == "bf16-mixed"
    settings = Settings(training, args.budget, bf16, args.epochs)
    warm_up(args.models, data, settings)
    tune = Settings(training, args.tune_budget, bf16)
    rates = choose_learning_rates(args.models, args.learning_rates, data, tune, args.slice)

    finished: dict[str, list[tuple[Run, float]]] = {name: [] for name in args.models}
    for seed in range(args.seeds):
        runs = [Run(name, rates[name], seed, data[name], settings) for name in args.models]
        run_in_turns(runs, args.slice)
        for run in runs:
            test = run.test()
            finished[run.name].append((run, test))
            print(
                f"seed {seed}, {run.name}: val {run.best_mae * MEV:.1f}, test {test * MEV:.1f} "
                f"meV/atom after {run.epochs:.1f} epochs",
                flush=True,
            )

    table = Table(
        "Formation energy, mean absolute error in meV/atom",
        (
            "model",
            "parameters",
            "learning rate",
            "epochs",
            "best epoch",
            "structures/s",
            "val",
            "test",
        ),
    )
    for name, results in finished.items():
        mine = [run for run, _ in results]
        table.rows.append(
            (
                name,
                f"{mine[0].parameters:,}",
                f"{rates[name]:g}",
                spread([run.epochs for run in mine]),
                spread([run.best_at for run in mine]),
                spread([run.seen / run.spent_s for run in mine], 0),
                spread([run.best_mae * MEV for run in mine]),
                spread([test * MEV for _, test in results]),
            )
        )
    known = facts(
        args.threads,
        precision=args.precision,
        rows=", ".join(f"{part} {len(rows):,}" for part, rows in some.rows.items())
        + " of mp_formation_energy with structure_source crysxpp, split by formula",
        budget=(f"{args.budget:g} s" if args.epochs is None else f"{args.epochs:g} epochs")
        + f" of training per model, {args.seeds} seed(s), in turns of {args.slice:g} s; "
        "denormal numbers flushed to zero",
        optimiser=f"AdamW, batch {training.batch_size}, weight decay {training.weight_decay:g}, "
        f"gradient norm ≤ {training.clip_norm:g}, warm-up {training.warmup_fraction:g} and cosine "
        "over the budget; mean absolute error of the normalised target",
        learning_rate=f"best on val of {', '.join(f'{r:g}' for r in args.learning_rates)}, "
        f"{args.tune_budget:g} s each"
        if len(args.learning_rates) > 1
        else "given",
        reference_energies_alone=f"val {some.mae_of_references('val') * MEV:.1f}, "
        f"test {some.mae_of_references('test') * MEV:.1f} meV/atom",
    )
    write_tables(args.output, "Architectures on an equal budget", known, [table])


if __name__ == "__main__":
    main()
