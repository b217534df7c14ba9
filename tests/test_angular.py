"""Three-body terms: closed forms, invariance, smoothness, and equality on the asymmetric unit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ase.build import bulk, make_supercell
from ase.spacegroup import crystal as spacegroup_crystal

from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.graph import GraphOptions, build_graph, has_equal_angles
from matxfer.neighbors import neighbor_list
from matxfer.nn.layers import AngularTerms, angular_basis
from matxfer.nn.network import EdgeGatedNetwork

FULL = GraphOptions(symmetry=False)


def unit_vectors(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1)


def network(angular_dim=8, seed=0):
    torch.manual_seed(seed)
    return EdgeGatedNetwork(3, 32, 16, 12, angular_dim=angular_dim).double().eval()


def features(net, atoms, options=FULL):
    """Mean over the atoms of the features of the last layer, shape (F,)."""
    graph = build_graph(Crystal.from_ase(atoms), options)
    batch = PackedGraphs.pack([graph]).batch(np.array([0]))
    batch.edge_vector = torch.from_numpy(graph.edge_vector_angstrom).double()
    weight = batch.multiplicity.double() / batch.multiplicity.sum()
    with torch.no_grad():
        return (net(batch).node * weight[:, None]).sum(0)


@pytest.fixture(scope="module")
def quartz():
    return spacegroup_crystal(
        ["Si", "O"],
        [(0.4697, 0, 0), (0.4135, 0.2669, 0.1191)],
        spacegroup=152,
        cellpar=[4.916, 4.916, 5.405, 90, 90, 120],
    )


def test_angular_basis_gives_legendre_polynomials():
    a, b = unit_vectors(50), unit_vectors(50, seed=1)
    cosine = (a * b).sum(1)
    product = angular_basis(a) * angular_basis(b)
    torch.testing.assert_close(product[:, :3].sum(1), cosine)
    torch.testing.assert_close(product[:, 3:].sum(1), 1.5 * cosine**2 - 0.5)


def test_terms_equal_a_sum_over_triplets():
    """The moments of one pass over the edges against the double sum that they stand for."""
    torch.manual_seed(0)
    n, e, width = 4, 14, 3
    terms = AngularTerms(6, 5, width).double()
    receiver = torch.randint(0, n, (e,)).sort().values
    index = torch.stack([torch.randint(0, n, (e,)), receiver])
    normed, edge = torch.randn(n, 6).double(), torch.randn(e, 5).double()
    envelope, unit = torch.rand(e, 1).double(), unit_vectors(e).double()
    degree = torch.zeros(n, 1).double().index_add(0, receiver, envelope)
    node_terms, edge_terms = terms(normed, edge, index, envelope, degree, angular_basis(unit))

    weight = terms.edge(edge) * terms.sender(normed)[index[0]] * envelope
    node_slow, edge_slow = torch.zeros_like(node_terms), torch.zeros_like(edge_terms)
    for j in range(e):
        for k in range(e):
            i = receiver[j]
            if receiver[k] != i:
                continue
            cosine = unit[j] @ unit[k]
            legendre = (cosine, 1.5 * cosine**2 - 0.5)
            for degree_l, p in enumerate(legendre):
                part = slice(degree_l * width, (degree_l + 1) * width)
                norm = torch.rsqrt(1 + degree[i])
                node_slow[i, part] += p * weight[j] * weight[k] * norm**2
                edge_slow[j, part] += p * weight[k] * norm
    torch.testing.assert_close(node_terms, node_slow)
    torch.testing.assert_close(edge_terms, edge_slow)


def test_angles_are_seen_where_distances_are_not():
    """Two neighbours at equal distances, at 90° or 180°: only the three-body terms differ."""
    from ase import Atoms

    bent = Atoms("HOH", positions=[[2, 0, 0], [0, 0, 0], [0, 2, 0]], cell=[40] * 3, pbc=True)
    straight = Atoms("HOH", positions=[[2, 0, 0], [0, 0, 0], [-2, 0, 0]], cell=[40] * 3, pbc=True)
    options = GraphOptions(cutoff_angstrom=2.5, symmetry=False)  # H does not see H
    torch.manual_seed(0)
    shape = {"n_layers": 2, "node_dim": 16, "edge_dim": 8, "basis_size": 8}
    for angular_dim, differ in ((0, False), (4, True)):
        net = EdgeGatedNetwork(**shape, graph_options=options, angular_dim=angular_dim).double()
        gap = (features(net, bent, options) - features(net, straight, options)).abs().max()
        assert (gap > 1e-4) == differ


def test_invariance(quartz):
    net = network()
    atoms = quartz.copy()
    atoms.rattle(0.05, seed=1)
    expected = features(net, atoms)
    turned = atoms.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    moved = atoms.copy()
    moved.positions += [0.3, -0.7, 5.1]
    moved.wrap()
    order = np.random.default_rng(0).permutation(len(atoms))
    large = make_supercell(atoms, [[1, 1, 0], [0, 1, 0], [0, 0, 2]])
    for other in (turned, moved, atoms[order], large):
        torch.testing.assert_close(features(net, other), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["quartz", "fcc", "diamond", "hcp"])
def test_asymmetric_unit_equals_full_cell(name, quartz):
    atoms = {
        "quartz": quartz,
        "fcc": bulk("Cu", cubic=True),
        "diamond": bulk("Si", cubic=True),
        "hcp": bulk("Ti") * (2, 2, 1),
    }[name]
    net = network()
    graph = build_graph(Crystal.from_ase(atoms), GraphOptions())
    assert graph.n_nodes < len(atoms)
    torch.testing.assert_close(
        features(net, atoms, GraphOptions()), features(net, atoms), atol=1e-5, rtol=1e-5
    )


def test_smooth_through_the_cutoff():
    """A neighbour that crosses the cutoff changes value and first derivative continuously."""
    from ase import Atoms

    net = network()
    reach = net.graph_options.cutoff_angstrom

    def value(x):
        positions = [[0, 0, 0], [2.0, 0, 0], [0, x, 0]]
        atoms = Atoms("OSiO", positions=positions, cell=[60] * 3, pbc=True)
        return features(net, atoms)[:8]

    h = 1e-2
    steps = [value(reach + k * h) for k in (-2, -1, 0, 1, 2)]
    slopes = [(b - a) / h for a, b in itertools.pairwise(steps)]
    assert max(float((b - a).abs().max()) for a, b in itertools.pairwise(slopes)) < 1e-3


def test_equal_angles_are_required():
    """A square and a rectangle-like arrangement with equal shells, called one orbit wrongly."""
    from ase import Atoms

    positions = [[0, 0, 0], [2, 0, 0], [0, 2, 0], [20, 0, 0], [22, 0, 0], [18, 0, 0]]
    crystal = Crystal.from_ase(Atoms("OH2OH2", positions=positions, cell=[60] * 3, pbc=True))
    receiver, sender, vector, _ = neighbor_list(crystal, 2.5)
    wrong = np.array([0, 1, 2, 0, 1, 2])
    assert not has_equal_angles(wrong, receiver, sender, vector, 2.5, 1e-3)
    turned = np.array([0, 1, 1, 3, 4, 4])  # within each molecule the claim is right
    assert has_equal_angles(turned, receiver, sender, vector, 2.5, 1e-3)


def test_config_keeps_the_channels():
    net = network(angular_dim=5)
    again = EdgeGatedNetwork.from_config(net.config())
    assert again.angular_dim == 5
    again.double().load_state_dict(net.state_dict())
