"""The one form of a structure: checks, round trips, identity."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from pymatgen.core.composition import Composition
from pymatgen.core.lattice import Lattice
from pymatgen.core.periodic_table import DummySpecies
from pymatgen.core.structure import Structure

from matxfer.crystal import Crystal, CrystalError
from matxfer.graph import GraphOptions, build_graph

SKEWED = np.array([[4.1, 0.2, -0.3], [1.1, 3.9, 0.4], [-0.7, 0.9, 5.2]])
FRAC = np.array([[0.1, 0.2, 0.3], [0.62, 0.71, 0.83], [1.31, -0.12, 0.55]])
ALL_PBC = [(bool(k & 1), bool(k & 2), bool(k & 4)) for k in range(8)]


def skewed(pbc=True, **options):
    return Crystal(SKEWED, [56, 22, 8], FRAC, pbc, **options)


# -- round trips ------------------------------------------------------------------------------
@pytest.mark.parametrize("pbc", ALL_PBC)
def test_pymatgen_round_trip(pbc):
    crystal = skewed(pbc, id="a")
    structure = crystal.to_pymatgen()
    assert structure.lattice.pbc == pbc
    assert [site.specie.Z for site in structure] == [56, 22, 8]
    np.testing.assert_allclose(structure.cart_coords, crystal.cart_coords, atol=1e-12)
    assert Crystal.from_pymatgen(structure, "a") == crystal


@pytest.mark.parametrize("pbc", ALL_PBC)
def test_ase_round_trip(pbc):
    crystal = skewed(pbc, id="b")
    atoms = crystal.to_ase()
    assert tuple(atoms.pbc) == pbc
    np.testing.assert_allclose(atoms.positions, crystal.cart_coords, atol=1e-12)
    again = Crystal.from_ase(atoms, "b")
    assert (again.pbc, again.id) == (crystal.pbc, "b")
    assert np.array_equal(again.numbers, crystal.numbers)
    np.testing.assert_allclose(again.lattice, crystal.lattice, atol=1e-12)
    np.testing.assert_allclose(again.frac_coords, crystal.frac_coords, atol=1e-12)


def test_ase_positions_outside_the_cell_are_kept():
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.positions += [13.0, -7.5, 2.25]
    np.testing.assert_allclose(Crystal.from_ase(atoms).cart_coords, atoms.positions, atol=1e-9)


def test_molecule_without_cell():
    atoms = molecule("C2H6")
    crystal = Crystal.from_ase(atoms)
    assert crystal.pbc == (False, False, False)
    np.testing.assert_allclose(
        np.linalg.norm(crystal.cart_coords[:, None] - crystal.cart_coords, axis=-1),
        atoms.get_all_distances(),
        atol=1e-10,
    )
    # Whatever cell was completed, no atom may see an image of another.
    graph = build_graph(crystal, GraphOptions(cutoff_angstrom=20.0))
    assert graph.n_edges == len(atoms) * (len(atoms) - 1)


def test_slab_with_one_missing_vector():
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [1.8, 1.8, 0.5]], cell=[3.6, 3.6, 0], pbc=(1, 1, 0))
    crystal = Crystal.from_ase(atoms)
    assert crystal.pbc == (True, True, False)
    np.testing.assert_allclose(crystal.cart_coords, atoms.positions, atol=1e-12)
    assert crystal.volume_angstrom3 > 0


# -- immutability and identity ----------------------------------------------------------------
def test_immutable_and_independent_of_its_arguments():
    lattice, frac = SKEWED.copy(), FRAC.copy()
    crystal = Crystal(lattice, [56, 22, 8], frac)
    key = crystal.content_key()
    lattice[0, 0] = frac[0, 0] = 99.0
    assert crystal.content_key() == key
    for name in ("lattice", "numbers", "frac_coords"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(crystal, name)[0] = 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(crystal, name, None)


def test_content_key():
    crystal = skewed()
    assert len(crystal.content_key()) == 32
    assert crystal.content_key() == skewed(id="another id").content_key()
    moved = FRAC.copy()
    moved[2, 1] = np.nextafter(moved[2, 1], 1)
    cell = SKEWED.copy()
    cell[1, 2] = np.nextafter(cell[1, 2], 1)
    others = [
        Crystal(SKEWED, [56, 22, 8], moved),
        Crystal(cell, [56, 22, 8], FRAC),
        Crystal(SKEWED, [56, 22, 9], FRAC),
        skewed((True, True, False)),
    ]
    assert len({c.content_key() for c in [crystal, *others]}) == 5


def test_equality_hash_and_pickle():
    crystal = skewed(id="x")
    assert crystal == skewed(id="x")
    assert hash(crystal) == hash(skewed(id="x"))
    assert crystal != crystal.with_id("y")
    assert crystal != "x"
    again = pickle.loads(pickle.dumps(crystal))
    assert again == crystal
    assert not again.lattice.flags.writeable


def test_sizes_and_repr():
    crystal = skewed(id="x")
    assert len(crystal) == crystal.n_sites == 3
    assert crystal.volume_angstrom3 == pytest.approx(Lattice(SKEWED).volume)
    assert crystal.volume_angstrom3 == pytest.approx(
        Crystal(SKEWED[::-1], [1], [[0, 0, 0]]).volume_angstrom3  # a left-handed cell
    )
    assert repr(crystal) == "Crystal('x', BaTiO, 3 sites)"


# -- errors -----------------------------------------------------------------------------------
def _disordered():
    return Structure(Lattice.cubic(4), [{"Fe": 0.5, "Co": 0.5}], [[0, 0, 0]])


CELL, ONE = 4 * np.eye(3), [[0.0, 0.0, 0.0]]
BAD = {
    "lattice not numbers": (lambda: Crystal([["a"] * 3] * 3, [1], ONE), "not numeric"),
    "lattice of 8 numbers": (lambda: Crystal(range(8), [1], ONE), "not numeric"),
    "species not numbers": (lambda: Crystal(CELL, ["Fe"], ONE), "not numeric"),
    "ragged coordinates": (lambda: Crystal(CELL, [1, 1], [[0, 0, 0], [0, 0]]), "not numeric"),
    "too few coordinates": (lambda: Crystal(CELL, [1, 1], ONE), "2 atoms but 3 coordinates"),
    "no atoms": (lambda: Crystal(CELL, [], []), "no atoms"),
    "lattice nan": (lambda: Crystal(CELL * np.nan, [1], ONE), "lattice has missing"),
    "lattice inf": (lambda: Crystal(CELL + np.inf, [1], ONE), "lattice has missing"),
    "coordinate nan": (
        lambda: Crystal(CELL, [1, 1], [[0, 0, 0], [0, np.nan, 0]]),
        r"coordinates for atom\(s\) \[1\]",
    ),
    "no volume": (lambda: Crystal([[1, 0, 0], [0, 1, 0], [1, 1, 0]], [1], ONE), "cell volume"),
    "Z = 0": (lambda: Crystal(CELL, [0], ONE), r"unknown species.*\[0"),
    "Z = 119": (lambda: Crystal(CELL, [119], ONE), r"unknown species.*\[119"),
    "Z = -1": (lambda: Crystal(CELL, [-1], ONE), "unknown species"),
    "Z = 1.5": (lambda: Crystal(CELL, [1.5], ONE), r"unknown species.*\[1\.5"),
    "Z = nan": (lambda: Crystal(CELL, [np.nan], ONE), "unknown species"),
    "pbc of two": (lambda: Crystal(CELL, [1], ONE, (True, True)), "pbc has 2 entries"),
    "disordered": (lambda: Crystal.from_pymatgen(_disordered()), "disordered site .*Fe"),
    "dummy species": (
        lambda: Crystal.from_pymatgen(Structure(Lattice.cubic(4), [DummySpecies("X")], ONE)),
        "unknown species",
    ),
    "periodic without cell": (lambda: Crystal.from_ase(Atoms("Cu", pbc=True)), "no cell vector"),
    "ase without volume": (
        lambda: Crystal.from_ase(Atoms("Cu", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 1]], pbc=True)),
        "volume",
    ),
    "overlap": (
        lambda: Crystal(CELL, [26, 8], [[0, 0, 0], [0.1, 0, 0]]).check_distances(),
        r"atoms 0 and 1 \(Z = 26, 8\) overlap.*0\.400 Å",
    ),
    "overlap over the face": (
        lambda: Crystal(CELL, [26, 8], [[0.01, 0, 0], [0.99, 0, 0]]).check_distances(),
        r"overlap.*0\.080 Å",
    ),
    "overlap with its own image": (
        lambda: Crystal(np.diag([0.4, 4, 4]), [1], ONE).check_distances(),
        "atoms 0 and 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_and_what_to_do(case):
    make, pattern = BAD[case]
    with pytest.raises(CrystalError, match=pattern) as caught:
        make()
    error = caught.value
    assert error.reason
    assert error.remedy
    assert str(error) == f"{error.reason}; {error.remedy}"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (CrystalError, str(error))


def test_located_error():
    error = CrystalError("it is bad", "repair it")
    located = error.located("a.cif", 3)
    assert str(located) == "a.cif (frame 3): it is bad; repair it"
    assert str(located.located("b.cif", 4)) == str(located)  # the first place known is the true one
    assert str(error.located(None, 2)) == "frame 2: it is bad; repair it"
    again = pickle.loads(pickle.dumps(located))
    assert (again.source, again.frame, again.remedy) == ("a.cif", 3, "repair it")


def test_distances_allowed_and_not():
    def pair(distance, pbc):
        return Crystal(4 * np.eye(3), [1, 1], [[0, 0, 0], [distance / 4, 0, 0]], pbc)

    pair(0.501, True).check_distances()
    with pytest.raises(CrystalError):
        pair(0.499, True).check_distances()
    pair(3.7, False).check_distances()  # 0.3 Å only across a face that is none
    with pytest.raises(CrystalError):
        pair(3.7, True).check_distances()


def test_accepts_what_users_have():
    assert Crystal(SKEWED.ravel(), np.array([1], np.int16), [0, 0, 0]).n_sites == 1
    assert Crystal(SKEWED, [1.0], [[0, 0, 0]], np.True_).pbc == (True, True, True)
    assert Crystal(SKEWED, [118], [[0, 0, 0]], np.array([1, 0, 1])).pbc == (True, False, True)


# -- formula ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("symbols", "formula"),
    [("ClNa", "NaCl"), ("Na4Cl4", "NaCl"), ("O3CaTi", "CaTiO3"), ("Si8", "Si"), ("O2Mg2", "MgO")],
)
def test_formula(symbols, formula):
    atoms = Atoms(symbols, cell=[9, 9, 9], pbc=True, positions=np.zeros((len(Atoms(symbols)), 3)))
    assert Crystal.from_ase(atoms).formula == formula


@pytest.mark.data
def test_formula_agrees_with_pymatgen(shared_data):
    import pandas as pd

    columns = ["numbers", "lattice", "frac_coords", "formula"]
    frame = pd.read_parquet(shared_data / "mp_elasticity.parquet", columns=columns)
    for row in frame.sample(50, random_state=0).itertuples():
        crystal = Crystal(row.lattice, row.numbers, row.frac_coords)
        ours = Composition(crystal.formula)
        full = crystal.to_pymatgen().composition
        divisor = math.gcd(*(int(n) for n in full.values()))
        assert {str(e): n * divisor for e, n in ours.items()} == {
            str(e): n for e, n in full.items()
        }
        assert ours.reduced_formula == row.formula
