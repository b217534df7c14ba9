"""Relaxed structures as frames: what is read of them, and that they move the zero of the stress."""

import numpy as np
import pandas as pd
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from matxfer.potential.fit import make_potential
from matxfer.potential.frames import read_frames
from matxfer.potential.packed import PackedFrames
from matxfer.potential.relaxed import relaxed_frames


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def row(atoms, **more):
    """Return a row of a table of structures."""
    return {
        "lattice": atoms.cell.array.ravel(),
        "numbers": atoms.numbers,
        "frac_coords": atoms.get_scaled_positions().ravel(),
        **more,
    }


def test_what_is_read():
    rows = [row(bulk("Cu"), kind="pbe"), row(bulk("Al", cubic=True) * (2, 2, 2), kind="pbe"),
            row(bulk("Ni"), kind="pbe"), row(bulk("Pd"), kind="other")]  # fmt: skip
    table = pd.DataFrame(rows)
    found = relaxed_frames(table, where={"kind": ["pbe"]}, max_sites=12, leave_out={"Ni"})
    assert [c.formula for c in found.crystals] == ["Cu"], "Al is large, Ni left out, Pd of another"
    assert np.isnan(found.energy_ev).all()
    assert not found.stress_ev_per_a3.any()
    assert found.forces_ev_per_a[0].shape == (1, 3)
    assert set(found.split) == {"train"}
    assert len(relaxed_frames(table, n=2)) == 2


def frames(rng, n=24):
    """Return frames of strained, shaken Cu and of one other element, labelled by EMT."""
    rows = []
    for k in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell * (1 + 0.02 * rng.standard_normal()), scale_atoms=True)
        atoms.rattle(0.05, rng=rng)
        atoms.calc = EMT()
        rows.append(row(atoms, energy_ev=atoms.get_potential_energy(),
                        forces_ev_per_a=atoms.get_forces().ravel(),
                        stress_ev_per_a3=atoms.get_stress(voigt=False).ravel(),
                        split=("val", "test", "train", "train")[k % 4]))  # fmt: skip
    return pd.DataFrame(rows)


def test_concatenation(rng):
    parts = [PackedFrames.build(read_frames(frames(rng, 4), split_column="split"), 4.0)] * 2
    both = PackedFrames.concatenate(parts)
    assert len(both) == 8
    index = np.array([1, 6])
    joined, first, second = (
        both.batch(index), parts[0].batch(np.array([1])), parts[1].batch(np.array([2]))
    )  # fmt: skip
    np.testing.assert_array_equal(joined.energy_ev, [first.energy_ev[0], second.energy_ev[0]])
    np.testing.assert_array_equal(
        joined.forces_ev_per_a, np.concatenate([first.forces_ev_per_a, second.forces_ev_per_a])
    )


def test_they_are_learned_from(rng, tmp_path):
    """A potential that has seen no frame of Ag learns from relaxed ones where it is at rest."""
    silver = bulk("Ag")
    silver.set_cell(silver.cell * 0.93, scale_atoms=True)  # a made-up place of rest
    graph = {"cutoff_angstrom": 4.0}
    widths = {"n_layers": 1, "node_dim": 16, "edge_dim": 8, "basis_size": 16, "angular_dim": 2}
    architecture = {"kind": "edge_gated", "graph": graph, **widths}
    table = frames(rng)
    at_rest = PackedFrames.build(relaxed_frames(pd.DataFrame([row(silver)])), 4.0)
    graphs = at_rest.batch(np.array([0])).graphs
    stress = {}
    for n in (0, 50):
        potential = make_potential(
            table, tmp_path / str(n), model=None, architecture=architecture, split_column="split",
            epochs=20, max_edges=1000, learning_rate=5e-3, head_learning_rate=5e-3,
            stress_weight=30.0,
            relaxed=pd.DataFrame([row(silver)] * n) if n else None,
        )  # fmt: skip
        assert (47 in potential.elements) == bool(n)
        stress[n] = float(potential.respond(graphs).virial_ev.abs().max())
    assert potential.card["relaxed"]["rows"] == 50
    assert stress[50] < 0.6 * stress[0]
