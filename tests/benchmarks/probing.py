"""What the layers know of an atom's bonds: linear probes on the node features of every depth.

For each atom of the asymmetric unit of the coherent validation rows of the source table, a ridge
regression predicts from its features after K layers

- coordination number: neighbours by pymatgen's CrystalNN with its defaults (atoms where it finds
  none are left out);
- mean and standard deviation of the bond lengths to them in Å (the latter for two or more);
- mean absolute difference of the Pauling electronegativities to theirs;
- oxidation state by pymatgen's BVAnalyzer; crystals where it fails (most intermetallics) are left
  out of this target and counted.

Nothing of the network is trained. Parts (60 / 20 / 20 %) are drawn by formula, so that neither a
crystal nor its polymorphs are in two of them; the strength of the ridge is chosen on the second
part, figures are those of the third. Each atom of the asymmetric unit counts once. Two baselines
tell what of it is due to learning: a ridge on the one-hot element, and the same network with random
weights, drawn anew for every split. Targets are computed once and kept in matxfer's cache folder.

    python tests/benchmarks/probing.py --model mp-base --model mp-base-strict
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.crystal import MAX_ATOMIC_NUMBER, Crystal
from matxfer.data.loader import edge_budget_batches
from matxfer.data.packed import PackedGraphs
from matxfer.data.store import cache_folder
from matxfer.graph import GraphArrays, GraphOptions, build_graph
from matxfer.model import DEFAULT_MODEL, Model, load_model
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.readers import crystals_of_table, load_table
from matxfer.runtime import use_threads

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

TARGETS = {
    "coordination number": "",
    "bond length": "Å",
    "spread of bond lengths": "Å",
    "electronegativity difference": "",
    "oxidation state": "e",
}
#: Part of the cache's key: raise it when a target changes its meaning.
TARGETS_VERSION = 1
RIDGES = tuple(10.0**k for k in range(-3, 6))  # on standardised features, summed over the atoms
FRACTIONS = (0.6, 0.2)
SOURCE = "mp_formation_energy"


# -- targets ----------------------------------------------------------------------------------
def untrained(model: Model, seed: int) -> Model:
    """Return a model of the same shape with random weights and no heads."""
    torch.manual_seed(seed)
    network = EdgeGatedNetwork.from_config(model.backbone.config())
    card = deepcopy(model.card) | {"name": "random", "sha256": ""}
    return Model(network, [], model.elements, card).eval().requires_grad_(False)


def local_targets(crystal: Crystal) -> NDArray[np.float64]:
    """Return the targets of every atom of the cell, shape (n_sites, 5), NaN where there is none.

    They are computed for one atom of each symmetry orbit and copied to the others.
    """
    from pymatgen.analysis.bond_valence import BVAnalyzer
    from pymatgen.analysis.local_env import CrystalNN
    from pymatgen.core.periodic_table import Element

    chi = [np.nan] + [Element.from_Z(z).X for z in range(1, MAX_ATOMIC_NUMBER + 1)]
    structure, finder = crystal.to_pymatgen(), CrystalNN()
    graph = build_graph(crystal, GraphOptions())
    targets = np.full((graph.n_nodes, len(TARGETS)), np.nan)
    for node, site in enumerate(representatives(graph)):
        try:
            bonds = finder.get_nn_info(structure, int(site))
        except (ValueError, RuntimeError, IndexError):
            continue
        if not bonds:
            continue
        centre = structure[int(site)].coords
        length = np.array([np.linalg.norm(bond["site"].coords - centre) for bond in bonds])
        others = [chi[int(crystal.numbers[bond["site_index"]])] for bond in bonds]
        spread = length.std() if len(length) > 1 else np.nan
        difference = np.abs(np.array(others) - chi[int(crystal.numbers[site])]).mean()
        targets[node, :4] = len(bonds), length.mean(), spread, difference
    targets = targets[graph.node_of_site]
    with contextlib.suppress(ValueError, KeyError, AttributeError):  # no valences that balance
        targets[:, 4] = BVAnalyzer().get_valences(structure)
    return targets


def quiet_targets(crystal: Crystal) -> NDArray[np.float64]:
    """Compute targets without pymatgen's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return local_targets(crystal)


def kept_targets(crystals: Sequence[Crystal], workers: int) -> list[NDArray[np.float64]]:
    """Return the targets of every crystal, from the cache where they have been computed."""
    import pandas as pd
    import pymatgen.core

    digest = hashlib.sha256(f"{TARGETS_VERSION} {pymatgen.core.__version__}".encode())
    for crystal in crystals:
        digest.update(crystal.content_key())
    path = cache_folder() / "probing" / f"{digest.hexdigest()[:32]}.parquet"
    sizes = np.cumsum([crystal.n_sites for crystal in crystals])
    if path.is_file():
        flat = pd.read_parquet(path)[list(TARGETS)].to_numpy()
        return np.split(flat, sizes[:-1])
    started, found = time.monotonic(), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for targets in pool.map(quiet_targets, crystals, chunksize=10):
            found.append(targets)
            if len(found) % 200 == 0:
                done = f"{len(found)} of {len(crystals)} crystals"
                print(f"{time.monotonic() - started:.0f} s: targets of {done}", flush=True)
    frame = pd.DataFrame(np.concatenate(found), columns=list(TARGETS))
    frame.insert(0, "crystal", np.repeat(np.arange(len(found)), [len(t) for t in found]))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".part")
    frame.to_parquet(partial_file)
    partial_file.replace(path)
    return found


# -- features ---------------------------------------------------------------------------------
def representatives(graph: GraphArrays) -> NDArray[np.int64]:
    """Return the first atom of the cell that each node stands for, shape (n,)."""
    return np.unique(graph.node_of_site, return_index=True)[1]


def node_features(model: Model, graphs: PackedGraphs) -> list[NDArray[np.float64]]:
    """Return the node features after 0 … L layers, each (N, F)."""
    backbone = model.backbone
    depths: list[list[NDArray[np.float64]]] = [[] for _ in range(backbone.n_layers + 1)]
    for rows in edge_budget_batches(graphs, np.arange(len(graphs))):
        batch = graphs.batch(rows)
        with torch.no_grad():
            features = backbone.embed(batch)
            for k, kept in enumerate(depths):
                kept.append(features.node.double().numpy())
                if k < backbone.n_layers:
                    features = backbone.run(batch, features, k, k + 1)
    return [np.concatenate(kept) for kept in depths]


# -- probe ------------------------------------------------------------------------------------
def parts_by_formula(formulas: NDArray[np.str_], seed: int) -> list[NDArray[np.bool_]]:
    """Return masks of the training, validation and test crystals; a formula is in one only."""
    names, code = np.unique(formulas, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    ends = np.cumsum([round(f * len(names)) for f in FRACTIONS])
    return [np.isin(code, part) for part in np.split(order, ends)]


def ridge_probe(x, y, train, val, test) -> tuple[float, float]:
    """Return R² and MAE on the test rows of the ridge that is best on the validation rows.

    x (N, F) and y (N,); the parts are row numbers. A constant is fitted without a penalty.
    """
    mean, std = x[train].mean(0), x[train].std(0)
    x = (x - mean)[:, std > 1e-9] / std[std > 1e-9]
    centre = y[train].mean()
    value, vector = np.linalg.eigh(x[train].T @ x[train])
    rotated = x @ vector
    moment = rotated[train].T @ (y[train] - centre)
    told = [rotated @ (moment / (value.clip(min=0) + ridge)) + centre for ridge in RIDGES]
    best = min(told, key=lambda t: np.square(t - y)[val].mean())
    error = (best - y)[test]
    variance = np.square(y[test] - y[test].mean()).mean()
    return float(1 - np.square(error).mean() / variance), float(np.abs(error).mean())


class Probes:
    """R² and MAE by (features, target), one pair per split."""

    def __init__(self, targets: NDArray[np.float64], crystal: NDArray[np.int64], parts) -> None:
        # Row numbers of the atoms with a value, by target, split and part.
        self.targets = targets
        self.rows = [
            [[np.flatnonzero(np.isfinite(y) & mask[crystal]) for mask in split] for split in parts]
            for y in targets.T
        ]
        self.found: dict[str, list[list[tuple[float, float]]]] = {}

    def add(self, name: str, x: NDArray[np.float64], splits: Iterable[int]) -> None:
        """Probe features x (N, F) on some splits."""
        columns = self.found.setdefault(name, [[] for _ in TARGETS])
        for split in splits:
            for k, column in enumerate(columns):
                column.append(ridge_probe(x, self.targets[:, k], *self.rows[k][split]))

    def cells(self, name: str, figure: int) -> list[str]:
        """Return mean ± spread over the splits for each target: R² (0) or MAE (1)."""
        cells = []
        for column in self.found[name]:
            values = [pair[figure] for pair in column]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        return cells


def read_crystals(path: Path, n: int, max_sites: int, seed: int) -> tuple[list[Crystal], int]:
    """Return coherent validation rows of up to max_sites atoms, and how many there are in all."""
    frame: pd.DataFrame = load_table(path)
    frame = frame[(frame["split"] == "val") & (frame["structure_source"] == "crysxpp")]
    available = len(frame)
    frame = frame[frame["n_sites"] <= max_sites]
    if len(frame) > n:
        frame = frame.sample(n, random_state=seed).sort_index()
    entries = crystals_of_table(frame, str(path))
    return [entry.crystal for entry in entries if entry.crystal is not None], available


def counts(targets: NDArray[np.float64], crystal: NDArray[np.int64]) -> list[list[str]]:
    """Return, for each target, its unit, the number of atoms and crystals, mean and spread."""
    rows = []
    for (name, unit), y in zip(TARGETS.items(), targets.T, strict=True):
        known = np.isfinite(y)
        inside = len(np.unique(crystal[known]))
        left_out = len(np.unique(crystal)) - inside
        moments = f"{y[known].mean():.3f} ± {y[known].std():.3f}"
        rows.append(
            [name, unit or "1", f"{known.sum():,}", f"{inside:,}", f"{left_out:,}", moments]
        )
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "probing")
    parser.add_argument("--model", action="append", help="name or folder; may be repeated")
    parser.add_argument("--crystals", type=int, default=2000)
    parser.add_argument("--max-sites", type=int, default=200, help="largest cell")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes that compute targets")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    models = {
        m.rstrip("/").rsplit("/", 1)[-1]: load_model(m) for m in arguments.model or [DEFAULT_MODEL]
    }
    crystals, available = read_crystals(
        arguments.data / f"{SOURCE}.parquet",
        arguments.crystals,
        arguments.max_sites,
        arguments.seed,
    )
    by_site = kept_targets(crystals, arguments.workers)
    formulas = np.array([crystal.to_pymatgen().composition.reduced_formula for crystal in crystals])
    splits = range(arguments.splits)
    parts = [parts_by_formula(formulas, arguments.seed + split) for split in splits]

    tables, packs = [], {}
    started = time.monotonic()
    for name, model in models.items():
        options = model.backbone.graph_options
        if options not in packs:
            arrays = [build_graph(c, options) for c in crystals]
            atoms = np.concatenate(
                [t[representatives(g)] for t, g in zip(by_site, arrays, strict=True)]
            )
            crystal = np.repeat(np.arange(len(arrays)), [g.n_nodes for g in arrays])
            packs[options] = (PackedGraphs.pack(arrays), atoms, crystal)
        graphs, targets, crystal = packs[options]
        probes = Probes(targets, crystal, parts)
        one_hot = np.eye(MAX_ATOMIC_NUMBER + 1)[graphs.numbers]
        probes.add("element only", one_hot, splits)
        for depth, x in enumerate(node_features(model, graphs)):
            probes.add(f"K = {depth}", x, splits)
        print(f"{time.monotonic() - started:.0f} s: {name}, probed", flush=True)
        for split in splits:
            for depth, x in enumerate(node_features(untrained(model, split), graphs)):
                probes.add(f"random weights, K = {depth}", x, [split])
        print(f"{time.monotonic() - started:.0f} s: {name}, random weights probed", flush=True)
        if not tables:
            head = ["target", "unit", "atoms", "crystals", "crystals left out", "mean ± spread"]
            tables.append(Table("Targets", head, counts(targets, crystal)))
        for heading, figure in (("R²", 0), ("MAE", 1)):
            units = [f"{t}, {u}" if u and figure else t for t, u in TARGETS.items()]
            rows = [[features, *probes.cells(features, figure)] for features in probes.found]
            tables.append(Table(f"{name}: {heading}", ["features", *units], rows))
    weights = ", ".join(f"{name} {model.checksum[:12]}" for name, model in models.items())
    write_tables(
        arguments.output,
        "What the layers know of local bonding",
        facts(
            arguments.threads,
            weights=weights,
            crystals=f"{len(crystals):,} of {available:,} validation rows of {SOURCE}",
            splits=f"{arguments.splits}, by formula; mean ± spread over them",
        ),
        tables,
    )


if __name__ == "__main__":
    main()
