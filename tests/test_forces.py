"""Forces as a source task: read, checked, learnt; the vectors turn with the crystal."""

from __future__ import annotations

import dataclasses

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy.spatial.transform import Rotation

from matxfer.crystal import Crystal
from matxfer.data.loader import LabelledGraphs
from matxfer.data.packed import PackedGraphs
from matxfer.data.table import TableError
from matxfer.files import read_tensors
from matxfer.graph import GraphOptions, build_graph
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.nn.readout import VectorReadout
from matxfer.pretraining.config import ConfigError, read_config
from matxfer.pretraining.module import PretrainModule, SourceModule
from matxfer.pretraining.run import build_model, pretrain
from matxfer.pretraining.sources import load_sources
from matxfer.runtime import quiet_lightning

ENERGY = "formation_energy_ev_per_atom"
FULL = GraphOptions(cutoff_angstrom=4.0, symmetry=False)
#: Of the spring between the two sublattices of a CsCl cell, in eV/Å².
STIFFNESS = 1.7


def springs(n, seed):
    """Return CsCl cells whose second atom is displaced by u, and the forces ±k u on both."""
    rng = np.random.default_rng(seed)
    crystals, forces = [], []
    for _ in range(n):
        a = rng.uniform(3.2, 3.6)
        u = rng.normal(0, 0.15, 3)
        crystals.append(Crystal(a * np.eye(3), [11, 17], [[0, 0, 0], 0.5 + u / a]))
        forces.append(STIFFNESS * np.array([u, -u]))
    return crystals, forces


def frame_of(crystals, **columns):
    return pd.DataFrame(
        {
            "lattice": [c.lattice.ravel() for c in crystals],
            "numbers": [c.numbers for c in crystals],
            "frac_coords": [c.frac_coords.ravel() for c in crystals],
            **columns,
        }
    )


@pytest.fixture
def folder(crystal_frame, tmp_path):
    """Return a folder with a table of energies and one of forces."""
    crystal_frame.to_parquet(tmp_path / "energies.parquet")
    crystals, forces = springs(64, 0)
    frame = frame_of(
        crystals,
        forces_ev_per_a=[f.ravel() for f in forces],
        group=np.array(["near", "far"])[np.arange(64) % 2],
    )
    frame.to_parquet(tmp_path / "forces.parquet")
    return tmp_path


def config_of(folder, *, source=None, **training):
    """Read a configuration with a source of forces."""
    forces = {"table": "forces.parquet", "forces": "forces_ev_per_a", **(source or {})}
    tree = {
        "name": "tiny",
        "sources": [
            {"table": "energies.parquet", "targets": [ENERGY], "split_column": "split"},
            forces,
        ],
        "graph": {"cutoff_angstrom": 4.0},
        "network": {"n_layers": 2, "node_dim": 16, "edge_dim": 8, "basis_size": 10},
        "training": {"epochs": 3, "batch_size": 16, "learning_rate": 0.01, "fisher_samples": 0}
        | training,
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "seed": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return read_config(folder / "config.yaml")


def train(folder, name, **options):
    where = folder / name
    return pretrain(config_of(folder, **options), where / "model", run_folder=where / "run")


def weights(folder, name):
    return read_tensors(folder / name / "model" / "model.safetensors")


# -- learning -----------------------------------------------------------------------------------
def test_forces_of_a_spring_are_learnt(folder):
    """On displacements that were not trained on; to say zero everywhere is the thing to beat."""
    config = config_of(folder, epochs=30)
    data = load_sources(config)
    torch.manual_seed(0)
    module = PretrainModule(build_model(config, data), config)
    source = SourceModule(data, module.model, 16, 0)
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, source)
    crystals, forces = springs(40, 5)
    graphs = PackedGraphs.pack([build_graph(c, FULL) for c in crystals]).batch(np.arange(40))
    with torch.no_grad():
        edge = module.model.backbone(graphs).edge
        told = module.force_readout(edge, graphs, 4.0).numpy() * data.force_scale_ev_per_a
    error = np.abs(told - np.concatenate(forces)).mean()
    assert error < 0.25 * np.abs(np.concatenate(forces)).mean()


def test_forces_shape_the_weights_as_their_weight_says(folder):
    card = train(folder, "a").card
    metrics = next((folder / "a" / "run").rglob("metrics.csv"))
    loss = pd.read_csv(metrics)["train_forces"].dropna().to_numpy()
    assert len(loss) == 3
    assert loss[-1] < loss[0]
    _, forces = springs(64, 0)
    assert card["force_scale_ev_per_a"] == pytest.approx(np.std(np.array(forces)), rel=1e-5)
    assert not any("force" in name for name in weights(folder, "a"))  # the readout stays behind
    train(folder, "again")
    train(folder, "less", force_weight=0.0)
    one, again, less = (weights(folder, name) for name in ("a", "again", "less"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], less[key]) for key in one)


def test_vectors_turn_with_the_crystal():
    torch.manual_seed(0)
    network = EdgeGatedNetwork(2, 16, 8, 10, FULL, angular_dim=4).double().eval()
    readout = VectorReadout(8, 8).double()
    crystal = springs(1, 3)[0][0]
    rotation = Rotation.from_euler("xyz", [0.3, -1.1, 0.7]).as_matrix()
    turned = Crystal(crystal.lattice @ rotation.T, crystal.numbers, crystal.frac_coords)
    told = []
    for one in (crystal, turned):
        graphs = PackedGraphs.pack([build_graph(one, FULL)]).batch(np.array([0]))
        graphs.edge_vector = graphs.edge_vector.double()
        graphs.multiplicity = graphs.multiplicity.double()
        with torch.no_grad():
            told.append(readout(network(graphs).edge, graphs, 4.0).numpy())
    assert np.abs(told[0]).max() > 1e-3
    np.testing.assert_allclose(told[1], told[0] @ rotation.T, atol=1e-5)


# -- reading ------------------------------------------------------------------------------------
def test_forces_lie_as_the_nodes_lie(table_crystals):
    """With positions in the place of forces, a batch has to give each atom its own."""
    graphs = PackedGraphs.pack([build_graph(crystal, FULL) for crystal in table_crystals])
    targets = np.zeros((len(graphs), 1), np.float32)
    labelled = LabelledGraphs(
        graphs, np.arange(len(graphs))[::-1], targets, forces=graphs.position_angstrom
    )
    batch = labelled.__getitems__([7, 0, 31]).to("cpu")
    expected = [table_crystals[59 - k].cart_coords for k in (7, 0, 31)]
    np.testing.assert_allclose(batch.forces.numpy(), np.concatenate(expected), atol=1e-5)


def test_each_atom_has_the_force_of_its_row(folder):
    data = load_sources(config_of(folder, source={"where": {"group": ["far"]}}))
    first = len(pd.read_parquet(folder / "energies.parquet"))
    start = data.graphs.node_offset[first]
    _, forces = springs(64, 0)
    np.testing.assert_allclose(
        data.forces_ev_per_a[start:], np.concatenate(forces[1::2]), rtol=1e-5
    )
    assert np.isnan(data.forces_ev_per_a[:start]).all()
    assert data.rows("train", labelled=True).max() < first


def test_extreme_and_broken_rows_are_counted(folder):
    frame = pd.read_parquet(folder / "forces.parquet")
    forces = [np.array(f) for f in frame["forces_ev_per_a"]]
    forces[2][4] = np.nan
    forces[5] = forces[5][:3]
    forces[6] = None
    forces[8] = 50 * forces[8]
    forces[9][0] = np.inf
    frame["forces_ev_per_a"] = forces
    frame.to_parquet(folder / "forces.parquet")
    config = config_of(folder, source={"max_force_ev_per_a": 5.0}, epochs=1)
    data = load_sources(config)
    assert {row - 60: reason for row, reason in data.errors.items()}.keys() == {2, 5, 6, 9}
    assert "forces.parquet (frame 2): the force on atom 1 in column" in data.errors[62]
    assert "does not hold 3 x 2 numbers; correct this row" in data.errors[65]
    kept = [f for k, f in enumerate(forces) if k not in (2, 5, 6, 8, 9)]
    assert data.force_scale_ev_per_a == pytest.approx(np.std(np.array(kept)), rel=1e-5)
    assert not np.isin([62, 65, 66, 68, 69], data.rows("train")).any()
    card = train(folder, "a", source={"max_force_ev_per_a": 5.0}, epochs=1).card
    assert card["rows_without_graph"] == 4
    record = card["data"][1]
    assert record["rows"] == {"above max_force": 1, "train": 63}
    assert (record["forces"], record["max_force_ev_per_a"]) == ("forces_ev_per_a", 5.0)


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ({"forces": "f_ev_per_a"}, r"forces\.parquet: no column 'f_ev_per_a' of forces; the col"),
        ({"forces": "group"}, r"forces\.parquet: no row has forces in 'group' to learn from"),
        ({"where": {"group": ["neer"]}}, r"forces\.parquet: no row has 'neer' in column 'group'"),
        ({"max_force_ev_per_a": 1e-9}, "no row has forces in 'forces_ev_per_a' to learn from"),
    ],
    ids=str,
)
def test_tables_without_forces(source, pattern, folder):
    with pytest.raises(TableError, match=pattern):
        load_sources(config_of(folder, source=source))


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ({"targets": [ENERGY]}, "one of them only"),
        ({"denoise_angstrom": 0.1}, "one of them only"),
        ({"forces": None, "denoise_angstrom": 0.1, "max_force_ev_per_a": 2.0}, "needs 'forces'"),
        ({"max_force_ev_per_a": 0}, "'max_force_ev_per_a' in .* is 0, but must be positive"),
        ({"forces": 3}, "'forces' in .* is 3, not text or null"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(source, pattern, folder):
    with pytest.raises(ConfigError, match=pattern):
        config_of(folder, source=source)


def test_forces_beside_displacements(folder):
    """Forces are those of the atoms where they are: their rows are not displaced."""
    config = config_of(folder)
    noisy = dataclasses.replace(config.sources[0], targets=[], split_column=None,
                                denoise_angstrom=0.1)  # fmt: skip
    config = dataclasses.replace(config, sources=[*config.sources, noisy])
    data = load_sources(config)
    module = PretrainModule(build_model(config, data), config)
    batch = LabelledGraphs(
        data.graphs, np.array([70, 130]), np.zeros((len(data.graphs), 1), np.float32),
        noise_angstrom=data.noise_angstrom, forces=data.forces_ev_per_a,
    ).__getitems__([0, 1])  # fmt: skip
    displaced, shift = module._displaced(batch, 0)
    first = batch.graphs.batch == 0
    assert (shift[first] == 0).all()
    assert (shift[~first] != 0).any()
    assert batch.forces[first].isfinite().all()
    assert batch.forces[~first].isnan().all()
    edges = first[batch.graphs.edge_index[1]]
    assert torch.equal(displaced.edge_vector[edges], batch.graphs.edge_vector[edges])
