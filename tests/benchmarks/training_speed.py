"""Training steps of the built-in network, of a CGConv network of the same size, and of CHGNet.

The built-in network has the shapes of the shipped models. Beside it train a network of PyG's
``CGConv`` layers on graphs of the full cell from PyG's loader, as wide as gives it the number of
weights of the first shape, and CHGNet if it is installed. All train in turns on the same crystals
with the same threads, so that whatever else the machine does hits all alike; speeds are medians
over the turns, a step is batch, forward, backward and AdamW. What the machine can do (a matrix
product, a copy) is measured in the same turns. Then all but CHGNet learn the same rows for a few
epochs, and the profiler says on what operations a step spends its time.

    python tests/benchmarks/training_speed.py --data ../shared/data --threads 1
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _machine import Machine, count, shares
from _table import Table, add_common_arguments, facts, write_tables
from architectures import MEV, TARGET, load_data
from torch import nn
from torch.utils.data import DataLoader
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as PyGDataLoader
from torch_geometric.nn import CGConv, global_mean_pool

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.data.loader import LabelledGraphs
from matxfer.data.properties import property_of
from matxfer.graph import GraphOptions
from matxfer.model import find_model
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.layers import GaussianBasis
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.pretraining.config import TrainingConfig
from matxfer.runtime import keep_large_blocks, use_threads

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.packed import PackedGraphs

#: How batches are made.
ASYMMETRIC, FULL, PYG, READY, CHGNET = "asymmetric unit", "full cell", "PyG", "ready", "CHGNet"
#: Structures of a CHGNet batch, which then holds about as many edges as one of ours.
CHGNET_BATCH = 16
#: Kinds of operations in the table of the profiler.
TOP = 8


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Graphs of both kinds, normalised targets (G, 1) and their unit in eV/atom, parts."""

    asymmetric: PackedGraphs
    full: PackedGraphs
    targets: NDArray[np.float32]
    std_ev: float
    train: NDArray[np.int64]
    val: NDArray[np.int64]


def load_rows(args: argparse.Namespace) -> Rows:
    """Draw rows of the training and the validation part that have graphs of both kinds."""
    options = (GraphOptions(), GraphOptions(symmetry=False))
    ours, full = (load_data(args.data, args.n, args.val, args.seed, each) for each in options)
    train, val = (np.intersect1d(ours.rows[part], full.rows[part]) for part in ("train", "val"))
    std_ev = float(ours.scaler.std)
    return Rows(ours.graphs, full.graphs, ours.targets, std_ev, train, val)


class Ours(nn.Module):
    """The built-in network in the shape of a shipped model with one head, on labelled batches."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = EdgeGatedNetwork.from_config(architecture)
        prop, width = property_of(TARGET), self.backbone.node_dim
        self.head = PropertyHead(prop, width, default_readout(prop), width)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.head(self.backbone(batch.graphs).node, batch.graphs), batch.targets[:, 0]


class Ordinary(nn.Module):
    """Embedding, Gaussians, layers of ``CGConv``, mean over the atoms, two-layer output."""

    def __init__(self, width: int, architecture: dict[str, Any]) -> None:
        super().__init__()
        basis = architecture["basis_size"]
        self.element = nn.Embedding(MAX_ATOMIC_NUMBER + 1, width)
        self.basis = GaussianBasis(basis, architecture["graph"]["cutoff_angstrom"])
        self.layers = nn.ModuleList(
            CGConv(width, dim=basis, batch_norm=True) for _ in range(architecture["n_layers"])
        )
        self.out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        node, edge = self.element(batch.z), self.basis(batch.distance)
        for layer in self.layers:
            node = layer(node, batch.edge_index, edge)
        pooled = global_mean_pool(node, batch.batch, batch.num_graphs)
        return self.out(pooled).squeeze(-1), batch.y


class Energies(nn.Module):
    """CHGNet, asked for nothing but the energy; it joins its graphs in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        from chgnet.model import CHGNet

        self.net = CHGNet()

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch[0], task="e")["e"], batch[1]


def size_of(model: nn.Module) -> int:
    """Return the number of weights."""
    return sum(p.numel() for p in model.parameters())


def width_of_size(size: int, architecture: dict[str, Any]) -> int:
    """Return the width, a multiple of 4, at which CGConv comes nearest to a number of weights."""
    with torch.device("meta"):
        off = {w: abs(size_of(Ordinary(w, architecture)) - size) for w in range(8, 513, 4)}
    return min(off, key=off.__getitem__)


def cut(rows: NDArray[np.int64], size: int) -> list[list[int]]:
    """Cut rows into chunks."""
    return [rows[k : k + size].tolist() for k in range(0, len(rows), size)]


class Source:
    """Batches of given rows in one of the ways to make them."""

    def __init__(self, kind: str, rows: Rows) -> None:
        self.kind, self.rows = kind, rows
        self.pack = rows.asymmetric if kind == ASYMMETRIC else rows.full
        self.labelled = LabelledGraphs(self.pack, np.arange(len(self.pack)), rows.targets)
        self.targets = torch.from_numpy(rows.targets[:, 0])
        self.graphs: dict[int, Any] = {}

    def prepare(self, chunks: Sequence[list[int]]) -> int:
        """Build what is built once per crystal, outside the clock; return the number of edges."""
        index = [row for chunk in chunks for row in chunk]
        if self.kind in (PYG, READY, CHGNET):
            make = self._chgnet if self.kind == CHGNET else self._pyg
            for row in set(index) - set(self.graphs):
                self.graphs[row] = make(row)
        if self.kind == CHGNET:
            return sum(len(self.graphs[row].atom_graph) for row in index)
        return int(self.pack.edges_per_graph[index].sum())

    def _pyg(self, row: int) -> Data:
        graph = self.pack.batch(np.array([row]))
        distance = torch.linalg.vector_norm(graph.edge_vector, dim=1)
        edges = {"edge_index": graph.edge_index, "distance": distance}
        return Data(z=graph.z, y=self.targets[[row]], num_nodes=len(graph.z), **edges)

    def _chgnet(self, row: int) -> Any:
        from chgnet.graph import CrystalGraphConverter
        from pymatgen.core import Structure

        one = self.pack.select(np.array([row]))
        atoms = (one.cell_angstrom[0], one.numbers.tolist(), one.position_angstrom)
        structure = Structure(*atoms, coords_are_cartesian=True)
        graph = CrystalGraphConverter(on_isolated_atoms="ignore")(structure)
        graph.atom_frac_coord.requires_grad_(False)  # gradients of the weights only
        return graph

    def batches(self, chunks: Sequence[list[int]]) -> Iterable[Any]:
        """Return one batch per chunk of rows (CHGNet: several), made when it is asked for."""
        if self.kind == CHGNET:
            parts = [part for chunk in chunks for part in cut(np.array(chunk), CHGNET_BATCH)]
            return (([self.graphs[row] for row in part], self.targets[part]) for part in parts)
        if self.kind in (PYG, READY):
            loader: Iterable[Any] = PyGDataLoader(self.graphs, batch_sampler=chunks)
            return list(loader) if self.kind == READY else loader
        return DataLoader(self.labelled, batch_sampler=chunks, collate_fn=lambda batch: batch)


@dataclass(eq=False)
class Contender:
    """A network, its batches and its optimiser."""

    name: str
    model: nn.Module
    source: Source
    learning_rate: float
    bf16: bool = False
    predicts: bool = False
    turns: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.options = TrainingConfig()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, weight_decay=self.options.weight_decay
        )

    def step(self, batch: Any, factor: float = 1.0) -> None:
        """Take one training step (or predict, if that is all that is asked)."""
        if self.predicts:
            with torch.no_grad():
                self.model.eval()(batch)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output, target = self.model(batch)
        loss = (output.float() - target).abs().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()

    def turn(self, chunks: Sequence[list[int]]) -> None:
        """Train on the chunks; note structures/s, edges/s and the share of making batches."""
        edges = self.source.prepare(chunks)
        batches = self.source.batches(chunks)
        stepping, start = 0.0, time.perf_counter()
        for batch in batches:
            before = time.perf_counter()
            self.step(batch)
            stepping += time.perf_counter() - before
        seconds = time.perf_counter() - start
        crystals = sum(map(len, chunks))
        self.turns.append((crystals / seconds, edges / seconds, 1 - stepping / seconds))

    def median(self, what: int) -> float:
        """Return the median of a figure of the turns; the first is a warm-up."""
        return statistics.median(turn[what] for turn in self.turns[1:])

    def steps(self, chunks: Sequence[list[int]]) -> tuple[Any, int]:
        """Return a function that takes the steps of ready batches, and how many edges they have."""
        edges = self.source.prepare(chunks)
        ready = list(self.source.batches(chunks))
        return (lambda: [self.step(batch) for batch in ready]), edges

    def mae(self, chunks: Sequence[list[int]]) -> float:
        """Return the mean absolute error in units of the targets' spread, in full precision."""
        self.source.prepare(chunks)
        self.model.eval()
        with torch.inference_mode():
            pairs = [self.model(batch) for batch in self.source.batches(chunks)]
        return float(torch.cat([output - target for output, target in pairs]).abs().mean())


def line_up(rows: Rows, args: argparse.Namespace, more: Sequence[str] = ()) -> list[Contender]:
    """Return the contenders with fresh weights; ``more`` names those that are only timed."""
    known = {name: find_model(name)[1]["architecture"] for name in args.models}
    first = args.models[0]
    width = width_of_size(size_of(Ours(known[first])), known[first])
    makers = {
        first: (ASYMMETRIC, lambda: Ours(known[first])),
        f"{first}, bf16": (ASYMMETRIC, lambda: Ours(known[first])),
        f"{first}, full cell": (FULL, lambda: Ours(known[first])),
        **{name: (ASYMMETRIC, lambda n=name: Ours(known[n])) for name in args.models[1:]},
        f"CGConv {width}": (PYG, lambda: Ordinary(width, known[first])),
    }
    if READY in more:
        makers[f"CGConv {width}, ready batches"] = (READY, lambda: Ordinary(width, known[first]))
    if CHGNET in more:
        makers |= dict.fromkeys((CHGNET, f"{CHGNET}, predicting only"), (CHGNET, Energies))
    contenders = []
    for name, (kind, make) in makers.items():
        torch.manual_seed(args.seed)
        modes = {"bf16": name.endswith("bf16"), "predicts": name.endswith("predicting only")}
        contenders.append(Contender(name, make(), Source(kind, rows), args.learning_rate, **modes))
    return contenders


def ordinary_of(contenders: Sequence[Contender]) -> Contender:
    """Return the one that all others are compared with."""
    return next(one for one in contenders if one.source.kind == PYG)


def speeds(contenders: Sequence[Contender]) -> Table:
    """Return the table of the turns."""
    ordinary = ordinary_of(contenders)
    columns = ("weights", "edges/crystal", "structures/s", "edges/s", "making batches")
    table = Table(
        "Training, medians over the turns", ("network", *columns, f"times {ordinary.name!r}")
    )
    for one in contenders:
        per_s, edges_per_s, loading = (one.median(k) for k in range(3))
        density = statistics.median(turn[1] / turn[0] for turn in one.turns[1:])
        cells = (f"{size_of(one.model):,}", f"{density:.0f}", f"{per_s:.1f}", f"{edges_per_s:,.0f}")
        pairs = zip(one.turns[1:], ordinary.turns[1:], strict=True)
        ratio = statistics.median(mine[0] / other[0] for mine, other in pairs)
        table.rows.append((one.name, *cells, f"{loading:.1%}", f"{ratio:.2f}"))
    return table


def use_of(
    machine: Machine, contenders: Sequence[Contender], chunks: Sequence[list[int]]
) -> list[Table]:
    """Return how far the steps use the machine, and on what the first of each kind spend time."""
    columns = ("kFLOP/edge", "kB/edge", "GFLOP/s", "of matmul", "GB/s", "of copy")
    use = Table("Use of the machine by the steps", ("network", *columns))
    profiled: dict[str, dict[str, float]] = {}
    for one in contenders:
        work, edges = one.steps(chunks)
        flops, moved = (amount / edges for amount in count(work))
        rate = one.median(1) / (1 - one.median(2))  # edges/s of the steps alone
        matmul = machine.best["bfloat16" if one.bf16 else "float32"]
        cells = (f"{flops / 1e3:.0f}", f"{moved / 1e3:.1f}", f"{flops * rate / 1e9:.1f}")
        cells += (f"{flops * rate / matmul:.0%}", f"{moved * rate / 1e9:.1f}")
        use.rows.append((one.name, *cells, f"{moved * rate / machine.best['copy']:.0%}"))
        if one.source.kind in (ASYMMETRIC, PYG):
            profiled[one.name] = shares(work)
    first = next(iter(profiled.values()))
    top = sorted(first, key=first.__getitem__, reverse=True)[:TOP]
    spent = Table("Share of the time of the operations of a step", ("operations", *profiled))
    for kind in top:
        spent.rows.append((kind, *(f"{own.get(kind, 0):.1%}" for own in profiled.values())))
    rest = (1 - sum(own.get(kind, 0) for kind in top) for own in profiled.values())
    spent.rows.append(("all others", *(f"{share:.1%}" for share in rest)))
    return [use, spent]


def learn(contenders: Sequence[Contender], rows: Rows, args: argparse.Namespace) -> Table:
    """Train for a few epochs; return the validation error after each, and the seconds."""
    epochs, warmup = args.epochs, TrainingConfig().warmup_fraction
    columns = (*(f"epoch {k + 1}" for k in range(epochs)), "s/epoch")
    table = Table("Validation error after each epoch, meV/atom", ("network", *columns))
    errors: dict[str, list[str]] = {c.name: [] for c in contenders}
    spent = dict.fromkeys(errors, 0.0)
    val = cut(rows.val, args.batch_size)
    for epoch in range(epochs):
        order = np.random.default_rng((args.seed, epoch)).permutation(rows.train)
        chunks = cut(order, args.batch_size)
        for one in contenders:
            one.source.prepare(chunks)
            start = time.perf_counter()
            for k, batch in enumerate(one.source.batches(chunks)):
                part = (epoch + k / len(chunks)) / epochs
                cosine = 0.5 * (1 + math.cos(math.pi * (part - warmup) / (1 - warmup)))
                one.step(batch, max(part / warmup, 0.01) if part < warmup else cosine)
            spent[one.name] += time.perf_counter() - start
            errors[one.name].append(f"{one.mae(val) * rows.std_ev * MEV:.1f}")
    table.rows += [(name, *errors[name], f"{spent[name] / epochs:.1f}") for name in errors]
    return table


def chgnet_here() -> str | None:
    """Return the version of CHGNet, ``None`` if it cannot be imported."""
    try:
        import chgnet.model  # noqa: F401

        return version("chgnet")
    except (ImportError, PackageNotFoundError):
        return None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "training_speed")
    parser.add_argument(
        "--models", nargs="+", default=["mp-base", "mp-small"], help="shapes of our networks"
    )
    parser.add_argument("-n", type=int, default=2400, help="training rows")
    parser.add_argument("--val", type=int, default=600, help="validation rows")
    parser.add_argument("--turns", type=int, default=9, help="timed turns of each contender")
    parser.add_argument("--batch-size", type=int, default=64, help="crystals per batch")
    parser.add_argument("--turn-batches", type=int, default=2, help="batches per turn")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of the comparison of errors")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of all networks")
    return parser.parse_args()


def main() -> None:
    """Measure, train and write the result."""
    args = parse_arguments()
    torch.set_flush_denormal(True)  # as in architectures.py: tails of Gaussians
    use_threads(args.threads)
    keep_large_blocks()
    rows, chgnet = load_rows(args), chgnet_here()
    contenders = line_up(rows, args, (READY, CHGNET) if chgnet else (READY,))
    machine, rng = Machine(), np.random.default_rng(args.seed)
    for turn in range(args.turns + 1):
        chosen = rng.permutation(rows.train)[: args.batch_size * args.turn_batches]
        chunks = cut(chosen, args.batch_size)
        machine.turn()
        for contender in contenders[:: 1 if turn % 2 else -1]:
            contender.turn(chunks)
    tables = [speeds(contenders), *use_of(machine, contenders, chunks)]
    if args.epochs:
        tables.append(learn(line_up(rows, args), rows, args))
    known = facts(
        args.threads,
        rows=f"train {len(rows.train):,}, val {len(rows.val):,} of mp_formation_energy",
        turns=f"{args.turns} of {args.turn_batches} batches of {args.batch_size} crystals, the "
        "same for all; float32 but for bf16 (autocast)",
        ours="shapes of the shipped models, fresh weights, one head",
        CGConv=f"as wide as comes nearest to the weights of {args.models[0]}; layers, Gaussians, "
        "cutoff as there; full cells from PyG's loader",
        CHGNet=f"{chgnet}, own graphs, random weights, energy only, {CHGNET_BATCH} in a batch"
        if chgnet
        else "not measured: it is not installed",
        machine=machine,
        counted="FLOPs of matrix products; bytes that operations read and write wherever they lie "
        "(cache or not), views left out; both of whole steps: forward, backward, AdamW",
        profile="own time of each operation, time between operations left out",
        optimiser=f"AdamW, learning rate {args.learning_rate:g} for all, warm-up and cosine over "
        "all epochs; mean absolute error of the normalised target; denormals flushed to zero",
    )
    write_tables(args.output, "Training speed", known, tables)


if __name__ == "__main__":
    main()
