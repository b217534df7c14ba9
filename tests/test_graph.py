"""Neighbours against slow obvious searches; graphs of the asymmetric unit against the full cell."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ase.build import molecule
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import matxfer.graph
from matxfer.crystal import Crystal, CrystalError
from matxfer.data.packed import PackedGraphs
from matxfer.graph import GraphOptions, build_graph, is_equitable, symmetry_orbits
from matxfer.neighbors import neighbor_list
from matxfer.nn.layers import polynomial_envelope
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.nn.readout import AtomwiseReadout, PooledReadout

FULL = GraphOptions(symmetry=False)
CUTOFF = GraphOptions().cutoff_angstrom
CUBIC = np.eye(3)
FCC = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
FCC_SITES = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def rocksalt(a=5.64, numbers=(11, 17)):
    frac = np.concatenate([FCC_SITES, FCC_SITES + np.array([0.5, 0, 0])])
    return Crystal(a * CUBIC, np.repeat(numbers, 4), frac)


def rocksalt_primitive(a=5.64, numbers=(11, 17)):
    return Crystal(a * FCC, numbers, [[0, 0, 0], [0.5, 0.5, 0.5]])


def rutile():
    u = 0.305
    oxygen = [[u, u, 0], [-u, -u, 0], [0.5 + u, 0.5 - u, 0.5], [0.5 - u, 0.5 + u, 0.5]]
    return Crystal(
        np.diag([4.594, 4.594, 2.959]), [22, 22, 8, 8, 8, 8], [[0] * 3, [0.5] * 3, *oxygen]
    )


def quartz():
    """Return alpha-quartz, trigonal with a 3-fold screw axis: no site of full symmetry."""
    a, c, u = 4.913, 5.405, 0.4697
    x, y, z = 0.4133, 0.2672, 0.7855
    lattice = np.array([[a, 0, 0], [-a / 2, a * 3**0.5 / 2, 0], [0, 0, c]])
    silicon = [[u, 0, 2 / 3], [0, u, 1 / 3], [-u, -u, 0]]
    oxygen = [
        [x, y, z], [-y, x - y, z + 2 / 3], [y - x, -x, z + 1 / 3],
        [y, x, -z], [x - y, -y, 1 / 3 - z], [-x, y - x, 2 / 3 - z],
    ]  # fmt: skip
    return Crystal(lattice, [14] * 3 + [8] * 6, silicon + oxygen)


def random_crystal(rng, n, scale):
    """Return a random cell with atoms at least 0.8 Å apart."""
    while True:
        lattice = scale * (np.eye(3) + 0.35 * rng.normal(size=(3, 3)))
        words = lattice, rng.integers(1, 90, n), rng.uniform(-1.5, 1.5, (n, 3))
        if abs(np.linalg.det(lattice)) < 4 * n:
            continue
        crystal = Crystal(*words)
        if crystal.volume_angstrom3 > 4 * n and not len(neighbor_list(crystal, 0.8)[0]):
            return crystal


# -- neighbours -------------------------------------------------------------------------------
def slow_neighbors(crystal, cutoff):
    """Return (i, j, rounded distance) of all pairs by looping over a supercell large enough."""
    height = crystal.volume_angstrom3 / np.array(
        [np.linalg.norm(np.cross(*np.delete(crystal.lattice, k, axis=0))) for k in range(3)]
    )
    spread = np.ptp(crystal.frac_coords, axis=0)
    reach = np.where(crystal.pbc, np.ceil(cutoff / height + spread), 0).astype(int)
    pairs = []
    images = list(itertools.product(*(range(-r, r + 1) for r in reach)))
    for i in range(crystal.n_sites):
        for j in range(crystal.n_sites):
            for image in images:
                vector = crystal.cart_coords[j] + image @ crystal.lattice - crystal.cart_coords[i]
                distance = np.sqrt(vector @ vector)
                if distance < cutoff and not (i == j and image == (0, 0, 0)):
                    pairs.append((i, j, *vector, distance))
    return pairs


def assert_same_pairs(found, expected, cutoff, tolerance=1e-6):
    """Compare two sets of pairs; those within the tolerance of the cutoff may be on either side."""

    def table(rows):
        rows = np.asarray(rows, dtype=float).reshape(-1, 6)
        rows = rows[rows[:, 5] < cutoff - tolerance]
        return rows[np.lexsort(np.round(rows, 5).T[::-1])]

    found, expected = table(found), table(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=tolerance)


def hard_cells():
    rng = np.random.default_rng(0)
    sheared = np.array([[1, 0, 0], [7, 1, 0], [-3, 5, 1]]) @ (3.1 * CUBIC)
    return {
        "one atom": Crystal(2.6 * FCC * 2**0.5, [29], [[0.3, 0.7, 0.2]]),
        "one atom, very skewed choice of cell": Crystal(sheared, [84], [[0, 0, 0]]),
        "flat": Crystal(np.diag([1.4, 9.0, 3.0]), [1, 6], [[0, 0, 0], [0.5, 0.4, 0.3]]),
        "left-handed": Crystal(3.3 * FCC[::-1], [26, 13], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        "one periodic axis": Crystal(
            np.diag([2.5, 3.0, 3.0]), [6, 8], [[0, 0, 0], [0.5, 2.5, 0]], (True, False, False)
        ),
        "slab": Crystal(2.9 * CUBIC, [47, 46], [[0, 0, 0], [0.5, 0.5, 0.5]], (True, True, False)),
        "not periodic": Crystal(2 * CUBIC, [8, 1], [[0, 0, 0], [0, 0, 2.2]], False),
        **{f"random {k}": random_crystal(rng, n, s) for k, (n, s) in
           enumerate([(1, 2.4), (2, 2.6), (3, 3.2), (5, 4.5), (6, 5.0)])},
    }  # fmt: skip


@pytest.mark.parametrize("name", hard_cells())
def test_neighbors_against_slow_search(name):
    crystal, cutoff = hard_cells()[name], 4.3
    receiver, sender, vector, distance = neighbor_list(crystal, cutoff)
    assert (np.diff(receiver) >= 0).all()
    found = np.column_stack([receiver, sender, vector, distance])
    assert_same_pairs(found, slow_neighbors(crystal, cutoff), cutoff)


@pytest.mark.parametrize("name", hard_cells())
def test_neighbors_against_pymatgen(name):
    crystal, cutoff = hard_cells()[name], 5.7
    structure = crystal.to_pymatgen()
    centre, point, image, _ = structure.get_neighbor_list(cutoff)
    vector = structure.cart_coords[point] + image @ structure.lattice.matrix
    vector -= structure.cart_coords[centre]
    theirs = np.column_stack([centre, point, vector, np.linalg.norm(vector, axis=1)])
    ours = np.column_stack(neighbor_list(crystal, cutoff))
    assert_same_pairs(ours, theirs, cutoff)


def test_pairs_at_the_cutoff_do_not_count():
    """Rounding puts such pairs in or out of the list; either way they carry no weight."""
    for a in (2.5, 5.0 / 3, 5.0, 5.0 / 2**0.5):
        crystal = Crystal(a * CUBIC, [84], [[0.1, 0.2, 0.3]])
        graph = build_graph(crystal, FULL)
        distance = torch.tensor(np.linalg.norm(graph.edge_vector_angstrom, axis=1))
        at = (distance - CUTOFF).abs() < 1e-5
        envelope = polynomial_envelope(distance, CUTOFF)
        assert (envelope[at].abs() < 1e-6).all()
        assert (envelope[~at] > 1e-5).all() if a != 5.0 else at.all()


# -- the asymmetric unit ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def predict():
    """Return a function: graphs → outputs of a random network and both readouts, (B, 2)."""
    torch.manual_seed(5)
    network = EdgeGatedNetwork(2, 16, 12, 16).eval()
    readouts = torch.nn.ModuleList([AtomwiseReadout(16, 16), PooledReadout(16, 16)])
    # Fresh weights hardly look at distances; larger ones make outputs that differ by about one.
    for parameter in [*network.parameters(), *readouts.parameters()]:
        if parameter.dim() == 2:
            parameter.data *= 2.5

    def outputs(graphs):
        packed = PackedGraphs.pack(graphs)
        batch = packed.batch(np.arange(len(packed)))
        with torch.no_grad():
            node = network(batch).node
            return torch.stack([readout(node, batch) for readout in readouts], dim=1).numpy()

    outputs.network, outputs.readouts = network, readouts
    return outputs


def n_edges(graphs):
    return sum(graph.n_edges for graph in graphs)


@pytest.fixture(scope="module")
def crystals_of_all_systems(shared_data):
    """Return 210 crystals of the shared data, 30 of each crystal system, as {system: [...]}."""
    import moyopy
    import pandas as pd

    columns = ["lattice", "numbers", "frac_coords", "n_sites"]
    frame = pd.read_parquet(shared_data / "mp_elasticity.parquet", columns=columns)
    frame = frame[frame.n_sites <= 24].sample(frac=1, random_state=1)
    last = {"triclinic": 2, "monoclinic": 15, "orthorhombic": 74, "tetragonal": 142}
    last |= {"trigonal": 167, "hexagonal": 194, "cubic": 230}
    found = {system: [] for system in last}
    for row in frame.itertuples():
        crystal = Crystal(row.lattice, row.numbers, row.frac_coords)
        cell = moyopy.Cell(
            crystal.lattice.tolist(), crystal.frac_coords.tolist(), crystal.numbers.tolist()
        )
        number = moyopy.MoyoDataset(cell, symprec=1e-2).number
        system = next(name for name, end in last.items() if number <= end)
        if len(found[system]) < 30:
            found[system].append(crystal)
        if all(len(crystals) == 30 for crystals in found.values()):
            return found
    pytest.fail(f"too few crystals: { {k: len(v) for k, v in found.items()} }")


@pytest.mark.data
def test_asymmetric_unit_of_shared_crystals(crystals_of_all_systems, predict):
    total = {True: 0, False: 0}
    for system, crystals in crystals_of_all_systems.items():
        full = [build_graph(crystal, FULL) for crystal in crystals]
        unit = [build_graph(crystal, GraphOptions()) for crystal in crystals]
        np.testing.assert_allclose(predict(unit), predict(full), atol=1e-5, err_msg=system)
        for crystal, graph in zip(crystals, unit, strict=True):
            assert graph.multiplicity.sum() == crystal.n_sites
            assert np.array_equal(graph.numbers[graph.node_of_site], crystal.numbers)
        total[True] += n_edges(unit)
        total[False] += n_edges(full)
        # Outputs differ between crystals by far more than the tolerance above.
        assert predict(full).std(axis=0).min() > 0.1
    assert total[False] > 1.5 * total[True]


@pytest.mark.data
def test_per_site_features_of_shared_crystals(crystals_of_all_systems, predict):
    """Each atom gets the features of its node, not only the crystal its mean."""
    for crystals in crystals_of_all_systems.values():
        for crystal in crystals[:4]:
            unit, full = build_graph(crystal, GraphOptions()), build_graph(crystal, FULL)
            node = [
                predict.network(PackedGraphs.pack([graph]).batch(np.array([0]))).node.detach()
                for graph in (unit, full)
            ]
            difference = node[0][torch.from_numpy(unit.node_of_site).long()] - node[1]
            # Merged atoms of these relaxed structures differ by up to 0.0001 Å themselves.
            assert difference.abs().max() < 1e-4 * node[1].abs().max()
            assert node[1].std(0).max() > 0.1 or len(set(crystal.numbers)) == 1


@pytest.mark.parametrize(
    ("crystal", "n_nodes"), [(rocksalt(), 2), (rutile(), 2), (quartz(), 2)], ids=str
)
def test_orbits_of_known_crystals(crystal, n_nodes, predict):
    unit, full = build_graph(crystal, GraphOptions()), build_graph(crystal, FULL)
    assert unit.n_nodes == n_nodes
    assert full.n_nodes == crystal.n_sites
    np.testing.assert_allclose(predict([unit]), predict([full]), atol=1e-5)
    orbit = symmetry_orbits(crystal, 1e-4)
    assert np.array_equal(orbit[orbit], orbit)
    assert (orbit <= np.arange(len(orbit))).all()


def neighborhoods(graph):
    """Return for each node: species, share of the atoms, sorted (species, distance) around it."""
    shares = graph.multiplicity / graph.multiplicity.sum()
    distance = np.linalg.norm(graph.edge_vector_angstrom, axis=1)
    result = []
    for k in range(graph.n_nodes):
        mine = graph.edge_index[1] == k
        around = np.column_stack([graph.numbers[graph.edge_index[0][mine]], distance[mine]])
        around = around[around[:, 1] < CUTOFF - 1e-4]
        around = around[np.lexsort(np.round(around, 3).T[::-1])]
        result.append((int(graph.numbers[k]), float(shares[k]), around))
    return result


def assert_same_graph(first, second):
    """Compare two graphs up to the order of nodes and edges."""
    assert first.n_nodes == second.n_nodes
    left = neighborhoods(second)
    for z, share, around in neighborhoods(first):
        match = next(
            (
                k for k, (z2, share2, around2) in enumerate(left)
                if z == z2 and abs(share - share2) < 1e-6 and around.shape == around2.shape
                and np.allclose(around, around2, atol=2e-4)
            ),
            None,
        )  # fmt: skip
        assert match is not None, f"no node like Z = {z}, {share:.3f}"
        left.pop(match)


SHEARS = {
    "2x1x1": np.diag([2, 1, 1]),
    "3x2x1": np.diag([3, 2, 1]),
    "sheared": [[1, 2, 0], [0, 1, 0], [0, -1, 1]],
    "sheared supercell": [[1, 1, 0], [-1, 1, 0], [0, 1, 2]],
    "mirrored": np.diag([1, 1, -1]),
}


@pytest.mark.parametrize("shear", SHEARS)
@pytest.mark.parametrize("crystal", [rocksalt(), rutile(), quartz()], ids=str)
def test_choice_of_cell_does_not_matter(crystal, shear, predict):
    structure = crystal.to_pymatgen() * np.array(SHEARS[shear])
    other = Crystal.from_pymatgen(structure)
    graphs = [build_graph(c, GraphOptions()) for c in (crystal, other)]
    assert_same_graph(*graphs)
    np.testing.assert_allclose(*map(predict, ([graphs[0]], [graphs[1]])), atol=1e-5)


def test_primitive_and_conventional_cell(predict):
    graphs = [build_graph(c, GraphOptions()) for c in (rocksalt(), rocksalt_primitive())]
    assert_same_graph(*graphs)
    np.testing.assert_allclose(*map(predict, ([graphs[0]], [graphs[1]])), atol=1e-5)
    other = build_graph(rocksalt(5.70), GraphOptions())
    with pytest.raises(AssertionError):
        assert_same_graph(graphs[0], other)


@pytest.mark.data
def test_primitive_cells_of_shared_crystals(crystals_of_all_systems, predict):
    graphs = [[], []]
    for crystals in crystals_of_all_systems.values():
        for crystal in crystals[:3]:
            doubled = Crystal.from_pymatgen(crystal.to_pymatgen() * [1, 2, 1])
            graphs[0].append(build_graph(crystal, GraphOptions()))
            graphs[1].append(build_graph(doubled, GraphOptions()))
    np.testing.assert_allclose(predict(graphs[0]), predict(graphs[1]), atol=1e-5)
    assert n_edges(graphs[1]) < 1.3 * n_edges(graphs[0])


def test_thousand_atoms(predict):
    large = Crystal.from_pymatgen(rocksalt().to_pymatgen() * [5, 5, 5])
    assert large.n_sites == 1000
    graph = build_graph(large, GraphOptions())
    assert graph.n_nodes == 2
    assert graph.multiplicity.tolist() == [500, 500]
    small = build_graph(rocksalt(), GraphOptions())
    np.testing.assert_allclose(predict([graph]), predict([small]), atol=1e-5)
    full = build_graph(large, FULL)
    assert full.n_nodes == 1000
    np.testing.assert_allclose(predict([full]), predict([small]), atol=1e-5)


# -- never merging different atoms ------------------------------------------------------------
def lipschitz_bound(predict, full, tolerance):
    """Bound how far outputs move if no neighbour distance is off by more than the tolerance.

    Message passing on a quotient equals message passing on the full cell in which every atom is
    given the distances of its orbit's representative. ``is_equitable`` lets no distance be off by
    more than the tolerance, so to first order an output moves by at most Σ_edges |∂y/∂d| times
    it; the factor of two covers the second order, and 1e-5 the rounding of single precision.
    """
    batch = PackedGraphs.pack([full]).batch(np.array([0]))
    batch.edge_vector.requires_grad_(True)
    node = predict.network(batch).node
    bounds = []
    for readout in predict.readouts:
        output = readout(node, batch).sum()
        (gradient,) = torch.autograd.grad(output, batch.edge_vector, retain_graph=True)
        bounds.append(2 * tolerance * float(gradient.norm(dim=1).sum()) + 1e-5)
    return np.array(bounds)


PEROVSKITE = Crystal(
    3.9 * CUBIC,
    [38, 22, 8, 8, 8],
    [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
)
SYMMETRIC = [rocksalt(), rutile(), quartz(), PEROVSKITE]


@settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    which=st.integers(0, len(SYMMETRIC) - 1),
    site=st.integers(0, 100),
    exponent=st.floats(-6, np.log10(0.3)),
    # Directions of high symmetry keep some of the operations, which is where merging is tempting.
    direction=st.sampled_from(
        [(1, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (1, -2, 0), (0.31, 0.77, -0.52)]
    ),
)
@example(which=0, site=0, exponent=-4.0, direction=(1, 0, 0))
@example(which=0, site=5, exponent=-3.0, direction=(1, 1, 1))
@example(which=3, site=1, exponent=-2.0, direction=(0, 0, 1))
def test_one_displaced_atom(which, site, exponent, direction, predict):
    crystal, amount = SYMMETRIC[which], 10**exponent
    site %= crystal.n_sites
    cart = crystal.cart_coords.copy()
    cart[site] += amount * np.array(direction) / np.linalg.norm(direction)
    moved = Crystal(crystal.lattice, crystal.numbers, cart @ np.linalg.inv(crystal.lattice))
    unit, full = build_graph(moved, GraphOptions()), build_graph(moved, FULL)
    difference = np.abs(predict([unit]) - predict([full]))[0]
    tolerance = 10 * GraphOptions().symprec_angstrom
    # Atoms that merge have neighbours whose distances differ by no more than the tolerance. A
    # displacement well above it leaves only exact symmetries, hence no difference at all.
    bound = lipschitz_bound(predict, full, tolerance) if amount < 2 * tolerance else 1e-5
    assert (difference <= bound).all(), (difference, bound)


def test_a_wrong_merge_would_be_seen(monkeypatch, predict):
    """Force the orbits of the undisplaced crystal on a displaced one: both guards must object."""
    crystal = rocksalt()
    frac = crystal.frac_coords.copy()
    frac[3] += [0.05, 0, 0]  # 0.28 Å
    moved = Crystal(crystal.lattice, crystal.numbers, frac)
    wrong = symmetry_orbits(crystal, 1e-4)
    assert not is_equitable(wrong, *_list(moved), CUTOFF, 1e-3)
    full = build_graph(moved, FULL)
    monkeypatch.setattr(matxfer.graph, "symmetry_orbits", lambda *_: wrong)
    assert build_graph(moved, GraphOptions()).n_nodes == 8  # the check turns the orbits down
    monkeypatch.setattr(matxfer.graph, "is_equitable", lambda *_: True)
    merged = build_graph(moved, GraphOptions())
    assert merged.n_nodes == 2
    difference = np.abs(predict([merged]) - predict([full]))[0]
    assert (difference > 1e-4).all()
    assert (difference > lipschitz_bound(predict, full, 1e-3)).any()


def _list(crystal, cutoff=CUTOFF):
    receiver, sender, _, distance = neighbor_list(crystal, cutoff)
    return receiver, sender, distance


def test_is_equitable():
    crystal = rutile()
    right = np.array([0, 0, 2, 2, 2, 2])
    assert is_equitable(right, *_list(crystal), CUTOFF, 1e-3)
    assert is_equitable(np.arange(6), *_list(crystal), CUTOFF, 1e-3)
    # A finer partition need not be equitable: two oxygens apart from the two others see the
    # titanium sites alike, but not each other.
    assert not is_equitable(np.array([0, 1, 2, 2, 4, 2]), *_list(crystal), CUTOFF, 1e-3)
    # Titanium with oxygen: other numbers of neighbours or other distances.
    assert not is_equitable(np.array([0, 0, 0, 3, 3, 3]), *_list(crystal), CUTOFF, 1e-3)
    # Distances: within the tolerance or not.
    receiver, sender, distance = _list(crystal)
    off = distance.copy()
    off[np.flatnonzero(receiver == 3)[0]] += 5e-4
    assert is_equitable(right, receiver, sender, off, CUTOFF, 1e-3)
    assert not is_equitable(right, receiver, sender, off, CUTOFF, 1e-4)
    # A neighbour too many, well inside the cutoff; and one that only just is.
    more = [np.insert(a, 0, v) for a, v in ((receiver, 0), (sender, 0))]
    for extra, expected in ((3.0, False), (CUTOFF - 5e-4, True)):
        assert is_equitable(right, *more, np.insert(distance, 0, extra), CUTOFF, 1e-3) is expected


def test_different_species_on_equivalent_sites(predict):
    """Sites that geometry alone would merge: the species keep them apart."""
    copper = Crystal(3.6 * CUBIC, [29] * 4, FCC_SITES)
    ordered = Crystal(3.6 * CUBIC, [79, 29, 29, 29], FCC_SITES)
    four = Crystal(3.6 * CUBIC, [79, 29, 47, 46], FCC_SITES)
    assert [build_graph(c, GraphOptions()).n_nodes for c in (copper, ordered, four)] == [1, 2, 4]
    for crystal in (copper, ordered, four):
        graph = build_graph(crystal, GraphOptions())
        assert np.array_equal(graph.numbers[graph.node_of_site], crystal.numbers)
        np.testing.assert_allclose(
            predict([graph]), predict([build_graph(crystal, FULL)]), atol=1e-5
        )


def test_orbits_of_mixed_species_are_turned_down(monkeypatch):
    """In CsCl the two sites see the same geometry, so that only the species tell them apart."""
    crystal = Crystal(4.12 * CUBIC, [55, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
    both = np.array([0, 0])
    assert is_equitable(both, *_list(crystal), CUTOFF, 1e-3)
    monkeypatch.setattr(matxfer.graph, "symmetry_orbits", lambda *_: both)
    assert build_graph(crystal, GraphOptions()).numbers.tolist() == [55, 17]


def test_symmetry_search_is_quiet(caplog):
    """A displacement near the tolerance and a supercell of lower symmetry make moyo warn."""
    frac = rocksalt().frac_coords.copy()
    frac[3, 0] += 1.5e-5
    build_graph(Crystal(5.64 * CUBIC, [11] * 4 + [17] * 4, frac), GraphOptions())
    build_graph(Crystal.from_pymatgen(rocksalt().to_pymatgen() * [2, 1, 1]), GraphOptions())
    assert not caplog.records


def test_symmetry_needs_three_periodic_axes():
    crystal = rocksalt()
    slab = Crystal(crystal.lattice, crystal.numbers, crystal.frac_coords, (True, True, False))
    assert np.array_equal(symmetry_orbits(slab, 1e-4), np.arange(8))
    assert build_graph(slab, GraphOptions()).n_nodes == 8


def test_failed_symmetry_search_falls_back_to_the_full_cell(monkeypatch, predict):
    import moyopy

    def fail(*_, **__):
        raise RuntimeError("the search lost its way")

    expected = predict([build_graph(rutile(), GraphOptions())])
    monkeypatch.setattr(moyopy, "MoyoDataset", fail)
    graph = build_graph(rutile(), GraphOptions())
    assert graph.n_nodes == 6
    np.testing.assert_allclose(predict([graph]), expected, atol=1e-5)


# -- edges of the domain ----------------------------------------------------------------------
def test_isolated_atoms(predict):
    lone = build_graph(Crystal(30 * CUBIC, [2], [[0.5] * 3]), GraphOptions())
    assert (lone.n_nodes, lone.n_edges) == (1, 0)
    assert lone.edge_index.shape == (2, 0)
    assert lone.edge_vector_angstrom.shape == (0, 3)
    two = Crystal(30 * CUBIC, [2, 2, 10], [[0] * 3, [0.5] * 3, [0.25] * 3])
    graph = build_graph(two, GraphOptions())
    assert graph.n_edges == 0
    np.testing.assert_allclose(
        predict([graph]), predict([build_graph(two, FULL)]), atol=1e-6
    )  # empty edges beside others in one batch, too
    both = predict([lone, build_graph(rocksalt(), GraphOptions()), lone])
    np.testing.assert_allclose(both[0], predict([lone])[0], atol=1e-6)
    assert np.isfinite(both).all()


def test_one_atom_cell():
    graph = build_graph(Crystal(3.61 * FCC, [29], [[0, 0, 0]]), GraphOptions())
    assert graph.n_nodes == 1
    assert (graph.edge_index == 0).all()
    # fcc: 12 at a/√2, 6 at a, 24 at a √(3/2) = 4.42 Å; the next shell is at 5.1 Å.
    distance = np.sort(np.linalg.norm(graph.edge_vector_angstrom, axis=1))
    shells = 3.61 * np.repeat([0.5**0.5, 1, 1.5**0.5], [12, 6, 24])
    np.testing.assert_allclose(distance, shells, atol=1e-5)


def test_molecule():
    atoms = molecule("CH3CH2OH")
    graph = build_graph(Crystal.from_ase(atoms), GraphOptions())
    distance = atoms.get_all_distances()
    assert graph.n_edges == (distance[~np.eye(len(atoms), dtype=bool)] < CUTOFF).sum()
    np.testing.assert_allclose(
        np.linalg.norm(graph.edge_vector_angstrom, axis=1),
        distance[graph.edge_index[1], graph.edge_index[0]],
        atol=1e-5,
    )


def test_overlapping_atoms_raise():
    close = Crystal(4 * CUBIC, [26, 26], [[0, 0, 0], [0.02, 0, 1.0]])
    for options in (GraphOptions(), FULL):
        with pytest.raises(CrystalError, match=r"atoms \d and \d .*overlap.*0\.080 Å.*remove"):
            build_graph(close, options)
    same = Crystal(4 * CUBIC, [26, 26], [[0, 0, 0], [1, 0, 0]])
    with pytest.raises(CrystalError, match=r"0\.000 Å"):
        build_graph(same, GraphOptions())


def test_edges_are_sorted_by_receiver_and_vectors_match():
    crystal = quartz()
    for options in (GraphOptions(), FULL):
        graph = build_graph(crystal, options)
        assert (np.diff(graph.edge_index[1]) >= 0).all()
        assert graph.edge_index.max() < graph.n_nodes
    sender, receiver = graph.edge_index
    cart = crystal.cart_coords
    images = (graph.edge_vector_angstrom - cart[sender] + cart[receiver]) @ np.linalg.inv(
        crystal.lattice
    )
    np.testing.assert_allclose(images, np.rint(images), atol=1e-5)


def test_options_round_trip():
    options = GraphOptions(4.5, symmetry=False, symprec_angstrom=1e-3)
    assert GraphOptions.from_json(options.to_json()) == options
    with pytest.raises(ValueError, match=r"\['radius'\]; known are"):
        GraphOptions.from_json({"radius": 3})
