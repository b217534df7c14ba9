"""Predict a folder of CIF files with another package's model, batched, on the CPU.

Called by batch_prediction.py, a package a process: ``python _peers.py megnet FOLDER``. CHGNet
brings its weights; the others fetch theirs when they are used, so these have random weights in the
shape that the package gives by default, which takes as long. Each reads with pymatgen, as users
do, builds the graphs with its own code, and runs batches of like size: at its best.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: Atoms of a batch.
ATOMS = 600


def structures(folder: Path) -> list[Any]:
    """Read the files, sorted by size."""
    from pymatgen.core import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crystals = [Structure.from_file(path) for path in sorted(folder.glob("*.cif"))]
    return sorted(crystals, key=len)


def batches(crystals: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield crystals together up to a number of atoms."""
    batch: list[Any] = []
    atoms = 0
    for crystal in crystals:
        if batch and atoms + len(crystal) > ATOMS:
            yield batch
            batch, atoms = [], 0
        batch.append(crystal)
        atoms += len(crystal)
    if batch:
        yield batch


def matgl(model: Any, state: bool) -> Callable[[list[Any]], int]:
    """Return how to run a model of MatGL on a batch."""
    import torch
    from matgl.config import DEFAULT_ELEMENTS
    from matgl.ext.pymatgen import Structure2Graph
    from torch_geometric.data import Batch

    convert = Structure2Graph(element_types=DEFAULT_ELEMENTS, cutoff=model.cutoff)
    model.eval()

    def run(batch: list[Any]) -> int:
        graphs = []
        for crystal in batch:
            graph, lattice, _ = convert.get_graph(crystal)
            graph.pbc_offshift = torch.matmul(graph.pbc_offset, lattice[0])
            graph.pos = graph.frac_coords @ lattice[0]
            graphs.append(graph)
        joined = Batch.from_data_list(graphs)
        with torch.no_grad():
            if state:
                return len(model(g=joined, state_attr=torch.zeros(len(batch), 2)).reshape(-1))
            return len(model(g=joined).reshape(-1))

    return run


def megnet() -> Callable[[list[Any]], int]:
    """MEGNet as its formation-energy model is: the default shape."""
    from matgl.config import DEFAULT_ELEMENTS
    from matgl.models import MEGNet

    return matgl(MEGNet(element_types=DEFAULT_ELEMENTS, is_classification=False), state=True)


def m3gnet() -> Callable[[list[Any]], int]:
    """M3GNet for an intensive property: the default shape."""
    from matgl.config import DEFAULT_ELEMENTS
    from matgl.models import M3GNet

    return matgl(M3GNet(element_types=DEFAULT_ELEMENTS, is_intensive=True), state=False)


def alignn() -> Callable[[list[Any]], int]:
    """ALIGNN, its small model in plain torch: two and two layers of 64, no forces."""
    import torch
    from alignn.models.alignn_atomwise_pure import ALIGNNAtomWisePure, ALIGNNAtomWisePureConfig
    from alignn.torch_graph_builder import batch_torch_graph_pairs, build_pure_torch_graph
    from jarvis.core.atoms import pmg_to_atoms

    config = ALIGNNAtomWisePureConfig(
        name="alignn_atomwise_pure", atom_input_features=92, calculate_gradient=False,
        energy_mult_natoms=False, lg_on_fly=False, use_penalty=False,
    )  # fmt: skip
    model = ALIGNNAtomWisePure(config).eval()

    def run(batch: list[Any]) -> int:
        pairs = [
            build_pure_torch_graph(
                atoms=pmg_to_atoms(crystal), two_body_cutoff=8.0, max_neighbors=12
            )
            for crystal in batch
        ]
        with torch.no_grad():
            joined = batch_torch_graph_pairs(pairs)
            out = model((joined[0], joined[1], torch.eye(3).repeat(len(batch), 1, 1)))
        return len(out["out"].reshape(-1))

    return run


def chgnet() -> Callable[[list[Any]], int]:
    """CHGNet, energies only, with its weights."""
    from chgnet.model import CHGNet

    model = CHGNet.load(use_device="cpu", verbose=False)

    def run(batch: list[Any]) -> int:
        found = model.predict_structure(batch, task="e", batch_size=len(batch))
        return len(found) if isinstance(found, list) else 1

    return run


def main() -> None:
    """Run one package; print the seconds of reading and of all after it, without its imports."""
    makers = {"megnet": megnet, "m3gnet": m3gnet, "alignn": alignn, "chgnet": chgnet}
    run = makers[sys.argv[1]]()
    begin = time.perf_counter()
    crystals = structures(Path(sys.argv[2]))
    read = time.perf_counter()
    done = sum(run(batch) for batch in batches(crystals))
    if done != len(crystals):
        raise SystemExit(f"{done} results of {len(crystals)} structures")
    print(read - begin, time.perf_counter() - read)


if __name__ == "__main__":
    main()
