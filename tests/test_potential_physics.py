"""A potential as physics: derivatives, symmetries, smoothness, the repulsion, energy conserved."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, make_supercell, molecule
from ase.md.verlet import VelocityVerlet
from scipy import constants
from scipy.spatial.transform import Rotation

from matxfer.calculator import MatxferCalculator
from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.forcefield import ForceField
from matxfer.graph import build_graph

pytestmark = pytest.mark.filterwarnings("ignore::matxfer.forcefield.DomainWarning")
SPECIES = (8, 11, 12, 14, 17, 26)
CUTOFF = 4.0


@pytest.fixture(scope="module")
def calculator(small_potential):
    """Return the calculator in double precision; its neighbours are those of the last test."""
    return MatxferCalculator(small_potential, dtype="float64")


def crystal(seed, n=None):
    """Return a crystal of random cell, species and positions, no atoms closer than 1.6 Å."""
    rng = np.random.default_rng(seed)
    n = n or int(rng.integers(1, 6))
    edge = (18.0 * n) ** (1 / 3)
    while True:
        cell = edge * (np.eye(3) + rng.uniform(-0.25, 0.25, (3, 3)))
        atoms = Atoms(
            rng.choice(SPECIES, n), cell=cell, scaled_positions=rng.random((n, 3)), pbc=True
        )
        distances = atoms.get_all_distances(mic=True)[np.triu_indices(n, 1)]
        if atoms.get_volume() > 10 * n and (not n > 1 or distances.min() > 1.6):
            return atoms


def energy(calculator, atoms):
    return calculator.get_property("energy", atoms)


def slope(function, h):
    """Return the derivative at zero, central differences of fourth order."""
    near, far = function(h) - function(-h), function(2 * h) - function(-2 * h)
    return (8 * near - far) / (12 * h)


# -- derivatives ------------------------------------------------------------------------------
@pytest.mark.parametrize("block", range(5))
def test_forces_are_the_slope_of_the_energy(block, calculator):
    """50 crystals in all, six components of each."""
    for seed in range(10 * block, 10 * block + 10):
        atoms = crystal(seed)
        forces = calculator.get_property("forces", atoms)
        rng = np.random.default_rng(seed)
        # A crystal of one atom has no force; its neighbours are its own images.
        scale = max(np.abs(forces).max(), 1e-3)
        for _ in range(6):
            i, axis = rng.integers(len(atoms)), rng.integers(3)

            def moved(step, atoms=atoms, i=i, axis=axis):
                other = atoms.copy()
                other.positions[i, axis] += step
                return energy(calculator, other)

            assert abs(forces[i, axis] + slope(moved, 1e-3)) < 1e-6 * scale


@pytest.mark.parametrize("block", range(5))
def test_stress_is_the_slope_of_the_energy_by_strain(block, calculator):
    for seed in range(10 * block, 10 * block + 10):
        atoms = crystal(seed)
        stress = calculator.get_property("stress", atoms)
        numeric = []
        for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):

            def strained(step, atoms=atoms, a=a, b=b):
                strain = np.eye(3)
                strain[a, b] += step / 2
                strain[b, a] += step / 2
                other = atoms.copy()
                other.set_cell(atoms.cell.array @ strain, scale_atoms=True)
                return energy(calculator, other)

            numeric.append(slope(strained, 1e-3) / atoms.get_volume())
        assert np.abs(stress - numeric).max() < 1e-5 * np.abs(stress).max()


def test_a_compressed_cell_has_negative_stress(calculator):
    # Cells so small that the repulsion of the nuclei is all that matters.
    atoms = bulk("Si", "diamond", a=3.0)
    assert (calculator.get_property("stress", atoms)[:3] < -1).all()


# -- symmetries -------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_rotations_turn_forces_and_stress(seed, calculator):
    atoms = crystal(seed, 4)
    turn = Rotation.random(random_state=seed).as_matrix()
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn.T, scale_atoms=True)
    forces, stress = (calculator.get_property(n, atoms) for n in ("forces", "stress"))
    assert energy(calculator, turned) == pytest.approx(energy(calculator, atoms), abs=1e-10)
    found = calculator.get_property("forces", turned)
    np.testing.assert_allclose(found, forces @ turn.T, atol=1e-10)
    assert np.abs(found - forces).max() > 1e-3  # they did turn
    full = turned.copy()
    full.calc = calculator
    before = atoms.copy()
    before.calc = calculator
    np.testing.assert_allclose(
        full.get_stress(voigt=False), turn @ before.get_stress(voigt=False) @ turn.T, atol=1e-10
    )
    assert np.abs(full.get_stress() - stress).max() > 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_origin_order_and_choice_of_cell_do_not_matter(seed, calculator):
    atoms = crystal(seed, 4)
    expected = energy(calculator, atoms)
    forces, stress = (calculator.get_property(n, atoms) for n in ("forces", "stress"))

    shifted = atoms.copy()
    shifted.positions += [0.7, -3.1, 11.9]
    shifted.wrap()
    order = np.random.default_rng(seed).permutation(4)
    sheared = atoms.copy()  # the same lattice, other vectors
    sheared.set_cell(np.array([[1, 0, 0], [2, 1, 0], [-1, 3, 1]]) @ atoms.cell.array)
    for other, permuted in ((shifted, np.arange(4)), (atoms[order], order), (sheared, range(4))):
        assert energy(calculator, other) == pytest.approx(expected, abs=1e-10)
        found = calculator.get_property("forces", other)
        np.testing.assert_allclose(found, forces[list(permuted)], atol=1e-10)
        np.testing.assert_allclose(calculator.get_property("stress", other), stress, atol=1e-11)


@pytest.mark.parametrize("matrix", [np.diag([2, 1, 1]), np.diag([3, 2, 1]), [[1, 1, 0], [-1, 1, 0],
                                    [0, 0, 2]]], ids=str)  # fmt: skip
def test_energy_is_extensive(matrix, calculator):
    atoms = crystal(3, 3)
    n = round(np.linalg.det(matrix))
    large = make_supercell(atoms, np.array(matrix))
    assert len(large) == n * len(atoms)
    assert energy(calculator, large) == pytest.approx(n * energy(calculator, atoms), rel=1e-12)
    stress = calculator.get_property("stress", atoms)
    np.testing.assert_allclose(calculator.get_property("stress", large), stress, atol=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_pushes_itself(seed, calculator):
    """No net force on a crystal, nor torque on a molecule; the shares are the energy."""
    atoms = crystal(seed, 5)
    forces = calculator.get_property("forces", atoms)
    assert np.abs(forces.sum(axis=0)).max() < 1e-12 * len(atoms) + 1e-14
    shares = calculator.get_property("energies", atoms)
    assert shares.sum() == pytest.approx(energy(calculator, atoms), abs=1e-11)

    atoms = Atoms(atoms.numbers, atoms.positions)
    forces = calculator.get_property("forces", atoms)
    assert np.abs(forces).max() > 1e-4
    assert np.abs(forces.sum(axis=0)).max() < 1e-12
    assert np.abs(np.cross(atoms.positions, forces).sum(axis=0)).max() < 1e-11


# -- the cutoff -------------------------------------------------------------------------------
def test_nothing_jumps_where_an_atom_crosses_the_cutoff(calculator):
    """Energy, force and its slope meet: the atom also has a near neighbour, which it never leaves.

    With three vanishing orders at the cutoff, what the crossing pair adds goes as δ³, δ² and δ.
    """
    axis = np.array([1.0, 0.0, 0.0])

    def trimer(distance):
        atoms = Atoms("NaClSi", positions=[[0, 0, 0], [2.2, 1.7, 0], [0, 0, 0]])
        atoms.positions[2] = distance * axis
        return energy(calculator, atoms), calculator.get_property("forces", atoms)

    def curvature(distance, h):
        forces = [trimer(distance + k * h)[1][2, 0] for k in (-1, 1)]
        return (forces[1] - forces[0]) / (2 * h)

    jumps = []
    for delta in (1e-2, 1e-3, 1e-4):
        below, above = trimer(CUTOFF - delta), trimer(CUTOFF + delta)
        between = (below[1] + above[1])[2, 0] / 2
        jumps.append(
            (
                # less what the force itself does on the way
                abs(above[0] - below[0] + 2 * delta * between),
                np.abs(above[1] - below[1]).max(),
                abs(curvature(CUTOFF + delta, delta / 2) - curvature(CUTOFF - delta, delta / 2)),
            )
        )
    for wide, narrow in pairwise(jumps):
        assert narrow[0] < 0.02 * wide[0] + 1e-12
        assert narrow[1] < 0.15 * wide[1] + 1e-12
        assert narrow[2] < 0.15 * wide[2] + 1e-7
    assert jumps[0][2] > 1e-7  # something does happen there


def test_a_pair_fades_out_with_the_third_power(calculator):
    free = 2 * [0.0]
    for k, symbol in enumerate(("Na", "Cl")):
        free[k] = energy(calculator, Atoms(symbol))

    def bond(distance):
        return abs(energy(calculator, Atoms("NaCl", [[0, 0, 0], [0, 0, distance]])) - sum(free))

    assert bond(CUTOFF + 1e-9) == 0
    ratio = bond(CUTOFF - 0.02) / bond(CUTOFF - 0.01)
    assert 6.5 < ratio < 9.5


# -- repulsion --------------------------------------------------------------------------------
def zbl(z1, z2, r, reach):
    """Return the repulsion written down once more, in SI units and with the factors spelled out."""
    bohr = constants.physical_constants["Bohr radius"][0]
    a = 0.8854 * bohr / (z1**0.23 + z2**0.23)
    x = r * constants.angstrom / a
    phi = (
        0.18175 * np.exp(-3.19980 * x)
        + 0.50986 * np.exp(-0.94229 * x)
        + 0.28022 * np.exp(-0.40290 * x)
        + 0.02817 * np.exp(-0.20162 * x)
    )
    joule = z1 * z2 * constants.e**2 / (4 * np.pi * constants.epsilon_0) / (r * constants.angstrom)
    s = r / reach
    switch = 1 - 28 * s**6 + 48 * s**7 - 21 * s**8 if s < 1 else 0.0
    return joule * phi / constants.e * switch


@pytest.mark.parametrize(("pair", "reach"), [("SiSi", 2.22), ("NaCl", 2.68), ("H2", 0.62),
                                             ("FeO", 1.98)])  # fmt: skip
def test_repulsion_has_its_closed_form(pair, reach, small_potential):
    without = type(small_potential)(
        small_potential.backbone, small_potential.head, None, small_potential.elements
    )
    wall, bare = (ForceField([p], dtype="float64") for p in (small_potential, without))
    for distance in (0.55, 0.8, 1.2, 1.7, 2.2, 2.7):
        atoms = Atoms(pair, positions=[[0, 0, 0], [0, distance, 0]])
        found = wall.respond(atoms).energy_ev - bare.respond(atoms).energy_ev
        expected = zbl(*atoms.numbers, distance, reach)
        assert found == pytest.approx(expected, rel=3e-6, abs=1e-9)


def test_atoms_thrown_at_each_other_come_apart_again(calculator):
    atoms = Atoms("Si2", positions=[[0, 0, 0], [3.5, 0, 0]])
    speed = np.sqrt(2 * 15 / atoms.get_masses()[0])  # 15 eV each
    atoms.set_velocities([[speed, 0, 0], [-speed, 0, 0]])
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, 0.1 * units.fs)
    before, closest = atoms.get_total_energy(), np.inf
    for _ in range(300):
        dynamics.run(1)
        closest = min(closest, atoms.get_distance(0, 1))
    assert 0.5 < closest < 1.6
    assert atoms.get_distance(0, 1) > 2.5
    assert atoms.get_total_energy() == pytest.approx(before, abs=1e-3)


# -- precision, sizes, batches ----------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_single_precision_agrees_with_double(seed, small_potential, calculator):
    single = MatxferCalculator(small_potential)
    atoms = crystal(seed, 5)
    assert energy(single, atoms) == pytest.approx(energy(calculator, atoms), abs=1e-5)
    assert energy(single, atoms) != energy(calculator, atoms)
    for name in ("forces", "stress", "energies"):
        expected = calculator.get_property(name, atoms)
        found = single.get_property(name, atoms)
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max() + 1e-6
        assert found.dtype == np.float64
    # The potential given keeps its own precision.
    assert {p.dtype for p in small_potential.parameters()} == {torch.float32}


def test_an_atom_alone(calculator, small_potential):
    atom = Atoms("Na")
    value = energy(calculator, atom)
    assert np.isfinite(value)
    assert not calculator.get_property("forces", atom).any()
    assert calculator.get_property("energies", atom) == pytest.approx([value])
    far = Atoms("NaNa", positions=[[0, 0, 0], [0, 0, 50]])
    assert energy(calculator, far) == pytest.approx(2 * value, abs=1e-12)
    boxed = Atoms("Na", cell=[20, 20, 20], pbc=True)
    assert energy(calculator, boxed) == pytest.approx(value, abs=1e-12)
    assert not calculator.get_property("stress", boxed).any()


def test_a_cell_of_one_atom(calculator):
    atoms = bulk("Fe", "bcc", a=2.87)
    assert len(atoms) == 1
    assert np.abs(calculator.get_property("forces", atoms)).max() < 1e-13
    cubic = bulk("Fe", "bcc", a=2.87, cubic=True)
    assert energy(calculator, cubic) == pytest.approx(2 * energy(calculator, atoms), rel=1e-12)
    stress = calculator.get_property("stress", atoms)
    np.testing.assert_allclose(stress[:3], stress[0], atol=1e-12)
    np.testing.assert_allclose(stress[3:], 0, atol=1e-12)
    assert abs(stress[0]) > 1e-4


def test_a_molecule_without_a_cell(calculator):
    atoms = molecule("H2O")
    boxed = atoms.copy()
    boxed.center(vacuum=8)
    boxed.pbc = True
    assert energy(calculator, atoms) == pytest.approx(energy(calculator, boxed), abs=1e-11)
    forces = calculator.get_property("forces", boxed)
    np.testing.assert_allclose(calculator.get_property("forces", atoms), forces, atol=1e-11)


def test_a_batch_says_of_each_crystal_what_the_calculator_says(small_potential, calculator):
    many = [crystal(seed) for seed in range(8)] + [bulk("Fe", "bcc", a=2.87), molecule("H2O")]
    options = small_potential.backbone.graph_options
    pack = PackedGraphs.pack([build_graph(Crystal.from_ase(a), options) for a in many])
    response = small_potential.respond(pack.batch(np.arange(len(many))))
    start = 0
    for k, atoms in enumerate(many):
        stop = start + len(atoms)
        assert float(response.energy_ev[k]) == pytest.approx(energy(calculator, atoms), abs=3e-5)
        for found, name in (
            (response.forces_ev_per_a, "forces"),
            (response.energies_ev, "energies"),
        ):
            expected = calculator.get_property(name, atoms)
            np.testing.assert_allclose(found[start:stop].numpy(), expected, atol=2e-5, rtol=1e-4)
        start = stop
        if atoms.pbc.all():
            atoms.calc = calculator
            virial = atoms.get_stress(voigt=False) * atoms.get_volume()
            np.testing.assert_allclose(response.virial_ev[k], virial, atol=2e-4, rtol=1e-4)
    assert start == len(response.energies_ev)


def test_energies_alone_need_no_derivatives(small_potential):
    graph = build_graph(Crystal.from_ase(crystal(0, 4)), small_potential.backbone.graph_options)
    batch = PackedGraphs.pack([graph]).batch(np.array([0]))
    whole, energies = (small_potential.respond(batch, forces=flag) for flag in (True, False))
    assert torch.allclose(whole.energy_ev, energies.energy_ev, atol=1e-5)
    assert whole.forces_ev_per_a.any()
    assert not energies.forces_ev_per_a.any()
    reordered = replace(batch, edge_index=batch.edge_index.flip(0), edge_vector=-batch.edge_vector)
    assert torch.allclose(
        small_potential.respond(reordered).forces_ev_per_a, whole.forces_ev_per_a, atol=1e-5
    )


# -- energy is conserved ----------------------------------------------------------------------
def test_dynamics_conserve_energy_to_second_order_in_the_step(calculator):
    """The total energy of velocity Verlet wavers by a part that falls with the step squared."""
    spread = []
    for step_fs in (1.0, 0.5):
        atoms = bulk("Si", "diamond", a=5.43, cubic=True)
        atoms.calc = calculator
        atoms.set_momenta(0.8 * np.random.default_rng(0).standard_normal((8, 3)))  # some 260 K
        dynamics = VelocityVerlet(atoms, step_fs * units.fs)
        total = []
        dynamics.attach(lambda atoms=atoms, total=total: total.append(atoms.get_total_energy()))
        dynamics.run(int(60 / step_fs))
        spread.append(np.ptp(total))
    assert spread[0] < 5e-3
    assert 3 < spread[0] / spread[1] < 5.5
