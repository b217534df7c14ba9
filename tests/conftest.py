"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Matrices of the tests are small: threads of a BLAS that wait for a busy CPU cost more than they
# give.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import ase.io
import numpy as np
import pandas as pd
import pytest
import torch
from ase.build import bulk
from hypothesis import settings

from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.data.properties import property_of
from matxfer.fisher import fisher_diagonal
from matxfer.graph import GraphOptions, build_graph
from matxfer.model import Model, load_model
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.potential.model import Potential, load_potential, potential_from
from matxfer.potential.plugin import PotentialPlugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# The same examples in every run, and no failure because a machine is busy.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[Any, str, str]]:
    """Return a function that runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)  # nothing may land in the repository

    def call(*words: Any) -> tuple[Any, str, str]:
        from matxfer.cli import main

        monkeypatch.setattr(sys, "argv", ["matxfer", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit_.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """Return the folder of the shared data tables; tests that need it are skipped without it."""
    given = os.environ.get("MATXFER_SHARED_DATA")
    folder = Path(given) if given else repository.parent / "shared" / "data"
    if not (folder / "mp_formation_energy.parquet").is_file():
        pytest.skip(
            f"the shared data tables are not in {folder}; set MATXFER_SHARED_DATA to their folder"
        )
    return folder


# -- a tiny model and a table to train on, for everything above the network ----------------------
ELEMENTS = (3, 8, 11, 12, 17, 26)
#: A target that no head of the tiny model predicts.
TARGET = "debye_temperature_k"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep graphs out of the user's cache, and sums in one order: one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATXFER_CACHE", str(tmp_path_factory.mktemp("graph-cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def table_crystals() -> list[Crystal]:
    """Return 60 rock-salt, CsCl and fcc crystals with between one and eight atoms in the cell."""
    rng = np.random.default_rng(7)
    fcc = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    crystals = []
    for k in range(60):
        first, second = rng.choice(ELEMENTS, 2, replace=False)
        a = rng.uniform(3.8, 5.4)
        if k % 3 == 0:
            frac = np.concatenate([fcc, fcc + np.array([0.5, 0, 0])])
            crystals.append(Crystal(a * np.eye(3), [first] * 4 + [second] * 4, frac, id=f"c{k}"))
        elif k % 3 == 1:
            frac = [[0, 0, 0], [0.5, 0.5, 0.5]]
            crystals.append(Crystal(0.7 * a * np.eye(3), [first, second], frac, id=f"c{k}"))
        else:
            cell = 0.5 * a * (1 - np.eye(3))
            crystals.append(Crystal(cell, [first], [[0, 0, 0]], id=f"c{k}"))
    return crystals


@pytest.fixture(scope="session")
def crystal_frame(table_crystals: list[Crystal]) -> pd.DataFrame:
    """Return the crystals as a table of arrays with made-up properties and a split (48/6/6)."""
    z = np.array([c.numbers.mean() for c in table_crystals])
    density = np.array([c.n_sites / c.volume_angstrom3 for c in table_crystals])
    n = len(table_crystals)
    return pd.DataFrame(
        {
            "material_id": [c.id for c in table_crystals],
            "lattice": [c.lattice.ravel() for c in table_crystals],
            "numbers": [c.numbers for c in table_crystals],
            "frac_coords": [c.frac_coords.ravel() for c in table_crystals],
            "split": np.array(["train"] * 8 + ["val", "test"])[np.arange(n) % 10],
            "family": np.array(["rock salt", "CsCl", "fcc"])[np.arange(n) % 3],
            TARGET: 200 + 12 * z + 4000 * density,
            "formation_energy_ev_per_atom": -0.08 * z + 3 * density - 1,
            "bulk_modulus_vrh_gpa": np.exp(3 + 0.03 * z + 8 * density),
        }
    )


@pytest.fixture(scope="session")
def crystal_table(crystal_frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of that table."""
    path = tmp_path_factory.mktemp("table") / "crystals.parquet"
    crystal_frame.to_parquet(path)
    return path


@pytest.fixture(scope="session")
def few_rows(crystal_frame: pd.DataFrame) -> pd.DataFrame:
    """Return 20 small crystals: 14 to train on, 3 and 3."""
    small = crystal_frame[crystal_frame["numbers"].map(len) <= 2].iloc[:20]
    return small.assign(split=["train"] * 14 + ["val"] * 3 + ["test"] * 3)


@pytest.fixture(scope="session")
def real_crystals(repository: Path) -> list[Crystal]:
    """Return the textbook crystals of datasets/examples, and elements, strained and rattled."""
    atoms = [ase.io.read(path) for path in sorted((repository / "datasets/examples").glob("*.cif"))]
    rng = np.random.default_rng(0)
    for symbol in ("Li", "Mg", "Al", "Ti", "Fe", "Ni", "Ge", "Zr", "W", "Au", "Pb"):
        cell = bulk(symbol)
        cell = cell if symbol in ("Ti", "Pb") else cell.repeat((2, 1, 1))
        cell.set_cell(cell.cell @ (np.eye(3) + rng.normal(0, 0.02, (3, 3))), scale_atoms=True)
        cell.positions += rng.normal(0, 0.05, cell.positions.shape)
        atoms.append(cell)
    assert len(atoms) >= 20
    return [Crystal.from_ase(a) for a in atoms]


@pytest.fixture(scope="session")
def tiny_model_folder(
    table_crystals: list[Crystal], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a random model of three layers and four heads, with its Fisher file."""
    options = GraphOptions(cutoff_angstrom=4.0)
    names = ("formation_energy_ev_per_atom", "band_gap_ev", "bulk_modulus_vrh_gpa",
             "shear_modulus_vrh_gpa")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        backbone = EdgeGatedNetwork(3, 16, 8, 10, options)
        heads = []
        for k, prop in enumerate(map(property_of, names)):
            head = PropertyHead(prop, backbone.node_dim, default_readout(prop), hidden_dim=12)
            head.scaler.mean.fill_((-1.0, 1.5, 1.9, 1.6)[k])
            head.scaler.std.fill_((0.8, 1.0, 0.3, 0.3)[k])
            if prop.per_atom_energy:
                head.scaler.reference.copy_(torch.randn_like(head.scaler.reference))
            heads.append(head)
        model = Model(backbone, heads, ELEMENTS)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data *= 1.5  # or else all crystals would look alike
    model.eval()
    packed = PackedGraphs.pack([build_graph(crystal, options) for crystal in table_crystals[:12]])
    noise = dict.fromkeys(names, 0.3)
    model.card["fisher"] = {"source_size": 500, "noise": noise}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save(folder, fisher_diagonal(model, packed, np.arange(12), noise))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> Model:
    """Return that model as it is loaded; nothing may change it."""
    return load_model(tiny_model_folder)


# -- a small potential, for everything that moves atoms -------------------------------------------
@pytest.fixture(scope="session")
def small_potential_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random potential of two layers with angles and repulsion."""
    config = EdgeGatedNetwork(2, 16, 8, 10, GraphOptions(4.0, symmetry=False), 2).config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        potential = potential_from(None, config, 12)
        for parameter in potential.parameters():
            if parameter.dim() == 2:
                parameter.data *= 1.5  # or else all neighbourhoods would look alike
        scaler = potential.head.scaler
        scaler.mean.fill_(-4.0)
        scaler.reference.copy_(torch.randn_like(scaler.reference))
    potential.elements = frozenset((1, 8, 11, 12, 14, 17, 26))
    folder = tmp_path_factory.mktemp("potentials") / "small"
    potential.eval().save(folder)
    return folder


@pytest.fixture(scope="session")
def small_potential(small_potential_folder: Path) -> Potential:
    """Return that potential as it is loaded; nothing may change it."""
    return load_potential(small_potential_folder)


@pytest.fixture(scope="session")
def small_potential_plugins(
    small_potential: Potential, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Return the folders of three plugins of it, of one frozen layer, that differ a little."""
    folders = []
    for seed in range(3):
        plugin = PotentialPlugin(small_potential, 1, {"elements": [11, 14, 17]})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for parameter in plugin.potential.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn_like(parameter)
        folders.append(tmp_path_factory.mktemp("potential-plugins") / f"own-{seed}")
        plugin.save(folders[-1])
    return folders
