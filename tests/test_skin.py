"""The skin list against a fresh search, along walks of atoms and cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from matxfer.crystal import Crystal, CrystalError
from matxfer.errors import OptionError
from matxfer.neighbors import neighbor_list
from matxfer.skin import SkinList

CUTOFF = 4.0


def edges(graphs):
    """Return the edges as a sorted table of receiver, sender, vector."""
    sender, receiver = graphs.edge_index.numpy()
    return np.array(sorted(zip(receiver, sender, *graphs.edge_vector.numpy().T, strict=True)))


def fresh(atoms, cutoff=CUTOFF):
    receiver, sender, vector, _ = neighbor_list(Crystal.from_ase(atoms), cutoff)
    return np.array(sorted(zip(receiver, sender, *vector.T, strict=True)))


def check(skin, atoms):
    """Compare with a fresh search; pairs within rounding of the cutoff count for nothing."""
    found, expected = edges(skin.graphs(atoms)), fresh(atoms)
    assert len(found) == len(expected)
    for i, j in {(i, j) for i, j, *_ in expected}:
        mine, theirs = (t[(t[:, 0] == i) & (t[:, 1] == j)][:, 2:] for t in (found, expected))
        distance = np.linalg.norm(mine[:, None] - theirs[None], axis=2).min(axis=1)
        assert len(mine) == len(theirs)
        assert distance.max() < 1e-9
    return len(expected)


def start(pbc, seed):
    rng = np.random.default_rng(seed)
    atoms = bulk("NaCl", "rocksalt", a=5.2)
    atoms *= (2, 1, 2)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.uniform(-0.1, 0.1, (3, 3))), True)
    atoms.pbc = pbc
    return atoms, rng


@pytest.mark.parametrize("pbc", [True, False, (True, True, False)], ids=str)
@pytest.mark.parametrize("cell_moves", [False, True], ids=["fixed", "strained"])
def test_same_edges_along_a_walk(pbc, cell_moves):
    atoms, rng = start(pbc, 1)
    skin = SkinList(CUTOFF, 0.6, torch.float64)
    steps = 80
    sizes = set()
    for step in range(steps):
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        if cell_moves:
            strain = np.eye(3) + rng.normal(0, 0.004, (3, 3))
            atoms.set_cell(atoms.cell.array @ strain, scale_atoms=step % 2 == 0)
        if step % 29 == 28:
            atoms.wrap()
        sizes.add(check(skin, atoms))
    assert len(sizes) > 2  # pairs did cross the cutoff
    assert 2 <= skin.searches < steps / 2


def test_a_strain_alone_moves_pairs_in():
    """Atoms that move with the cell do not leave their places, and yet pairs come closer."""
    atoms = bulk("NaCl", "rocksalt", a=5.2, cubic=True)
    skin = SkinList(CUTOFF, 0.3, torch.float64)
    before = check(skin, atoms)
    counts = []
    for factor in (0.99, 0.97, 0.93, 0.88, 0.8):
        squeezed = atoms.copy()
        squeezed.set_cell(atoms.cell * factor, scale_atoms=True)
        counts.append(check(skin, squeezed))
    assert counts[-1] > before
    assert 1 < skin.searches < 6
    # And in one direction only, turned and sheared.
    sheared = atoms.copy()
    sheared.set_cell(atoms.cell.array @ [[1, 0, 0], [0.4, 1, 0], [0, 0, 0.7]], scale_atoms=True)
    check(skin, sheared)


def test_a_turn_of_everything_needs_no_search():
    atoms, _ = start(True, 2)
    skin = SkinList(CUTOFF, 0.3, torch.float64)
    check(skin, atoms)
    atoms.rotate(57, (1, 2, 3), rotate_cell=True)
    check(skin, atoms)
    assert skin.searches == 1


def test_a_wider_skin_is_searched_less_often():
    searches = []
    for width in (0.0, 0.2, 1.0):
        atoms, rng = start(True, 3)
        skin = SkinList(CUTOFF, width)
        for _ in range(40):
            atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
            skin.graphs(atoms)
        searches.append(skin.searches)
    assert searches[0] == 40 > searches[1] > searches[2]


def test_the_limit_is_half_the_skin():
    atoms, skin = Atoms("NaCl", [[0, 0, 0], [0, 0, 3]]), SkinList(CUTOFF, 0.5)
    for move, searches in ((0.0, 1), (0.249, 1), (0.251, 2)):
        moved = atoms.copy()
        moved.positions[1, 0] += move
        skin.graphs(moved)
        assert skin.searches == searches


def test_other_atoms_are_another_structure():
    atoms, _ = start(True, 4)
    skin = SkinList(CUTOFF, 0.5, torch.float64)
    check(skin, atoms)
    for change in (
        lambda a: a.numbers.__setitem__(0, 26),
        lambda a: a.set_pbc([True, False, True]),
        lambda a: a.pop(),
    ):
        change(atoms)
        before = skin.searches
        check(skin, atoms)
        assert skin.searches == before + 1
    assert skin.graphs(atoms).z.tolist() == atoms.numbers.tolist()
    assert check(skin, molecule("H2O")) == 6
    assert skin.graphs(Atoms("Fe")).edge_index.shape == (2, 0)


def test_a_graph_holds_only_what_is_within_the_cutoff():
    graphs = SkinList(CUTOFF, 2.0).graphs(bulk("Fe", "bcc", a=2.87) * (2, 2, 2))
    length = torch.linalg.vector_norm(graphs.edge_vector, dim=1)
    assert float(length.max()) < CUTOFF < 4.06  # the next shell is in the skin
    assert graphs.edge_vector.dtype == torch.float32
    assert (graphs.edge_index[1].diff() >= 0).all()
    assert graphs.multiplicity.tolist() == [1] * 8


def test_what_is_no_structure():
    skin, atoms = SkinList(CUTOFF, 0.5), bulk("NaCl", "rocksalt", a=5.2)
    skin.graphs(atoms)
    cases = (
        (lambda a: a.positions.__setitem__((1, 2), np.nan), "missing or infinite coordinates"),
        (lambda a: a.positions.__setitem__(1, a.positions[0] + [0.1, 0, 0]), "overlap"),
        (lambda a: a.set_cell(np.zeros((3, 3))), "no cell vector"),
        (lambda a: a.set_cell(a.cell * 0.01, scale_atoms=True), "volume"),
        (lambda a: a.set_cell(np.full((3, 3), np.inf)), "missing or infinite|no volume"),
        (lambda a: a.__delitem__([0, 1]), "no atoms"),
    )
    for spoil, words in cases:
        bad = atoms.copy()
        spoil(bad)
        with pytest.raises(CrystalError, match=words):
            skin.graphs(bad)
        assert len(fresh(atoms)) == len(edges(skin.graphs(atoms)))
    # Closer than 0.5 Å within a kept list too.
    close = Atoms("NaCl", [[0, 0, 0], [0, 0, 0.6]])
    wide = SkinList(CUTOFF, 1.0)
    wide.graphs(close)
    close.positions[1, 2] = 0.45
    with pytest.raises(CrystalError, match=r"overlap: they are 0\.450 Å apart"):
        wide.graphs(close)
    assert wide.searches == 1


@pytest.mark.parametrize(("cutoff", "skin"), [(0, 0.5), (4, -0.1), (4, float("nan"))])
def test_impossible_radii(cutoff, skin):
    with pytest.raises(OptionError, match="neighbour list"):
        SkinList(cutoff, skin)
