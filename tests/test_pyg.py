"""PyG graphs: equal to our own batches, and good for PyG's loaders, transforms and models."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader
from torch_geometric.nn import CGConv, GCNConv, global_add_pool
from torch_geometric.transforms import Compose, Constant, LocalDegreeProfile

from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.graph import GraphOptions, build_graph
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.nn.readout import AtomwiseReadout, PooledReadout
from matxfer.pyg import CrystalGraph

OPTIONS = GraphOptions(cutoff_angstrom=4.0)


def crystals():
    """Return crystals of 1 to 4 nodes, among them one without edges."""
    rng = np.random.default_rng(3)
    cubic = np.eye(3)
    rocksalt = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    rocksalt += [[0.5, 0.5, 0.5], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]
    return [
        Crystal(2.9 * cubic, [26], [[0, 0, 0]]),
        Crystal(5.6 * cubic, [11] * 4 + [17] * 4, rocksalt),
        Crystal(50 * cubic, [2], [[0, 0, 0]]),
        Crystal(4.5 * cubic + 0.3 * rng.normal(size=(3, 3)), [22, 8, 8, 3],
                np.array([[0, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0.02, 0.47]])),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def packed():
    return PackedGraphs.pack([build_graph(c, OPTIONS) for c in crystals()])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return EdgeGatedNetwork(2, 16, 8, 10, OPTIONS).eval()


def test_loader_batches_equal_ours(packed, network):
    graphs = [CrystalGraph.from_crystal(c, OPTIONS) for c in crystals()]
    batch = next(iter(DataLoader(graphs, batch_size=len(graphs))))
    ours = packed.batch(np.arange(len(packed)))
    for name in ("z", "multiplicity", "edge_index", "edge_vector", "batch"):
        assert torch.equal(getattr(batch, name), getattr(ours, name)), name
        assert getattr(batch, name).dtype == getattr(ours, name).dtype, name
    assert batch.num_graphs == ours.num_graphs == len(graphs)
    for kind in (AtomwiseReadout, PooledReadout):
        torch.manual_seed(1)
        readout = kind(16, 8)
        theirs = readout(network(batch).node, batch)
        assert theirs.shape == (len(graphs),)
        assert torch.equal(theirs, readout(network(ours).node, ours))


def test_a_graph_alone_goes_through_the_network(packed, network):
    torch.manual_seed(1)
    for k, crystal in enumerate(crystals()):
        graph = CrystalGraph.from_crystal(crystal, OPTIONS)
        assert graph.num_graphs == 1
        assert torch.equal(graph.batch, torch.zeros(graph.num_nodes, dtype=torch.long))
        assert "batch" not in graph  # computed, so that batching finds nothing stale to increment
        ours = packed.batch(np.array([k]))
        readout = PooledReadout(16, 8)
        assert torch.equal(readout(network(graph).node, graph), readout(network(ours).node, ours))


def test_fields_shapes_and_units():
    crystal = crystals()[1]
    graph = CrystalGraph.from_crystal(crystal, OPTIONS, y=-1.5)
    n, n_edges = graph.num_nodes, graph.num_edges
    assert n == 2
    assert graph.multiplicity.tolist() == [4.0, 4.0]
    assert graph.z.tolist() == [11, 17]
    assert graph.pos.shape == (n, 3)
    assert graph.cell.shape == (1, 3, 3)
    assert graph.edge_index.shape == (2, n_edges)
    assert graph.edge_vector.shape == (n_edges, 3)
    assert graph.edge_attr.shape == (n_edges, 1)
    assert graph.node_of_site.tolist() == [0] * 4 + [1] * 4
    # Six nearest neighbours of the other kind at a / 2 = 2.8 Å, twelve of its own at a / √2.
    receives = graph.edge_index[1] == 0
    distance = graph.edge_weight[receives]
    other = graph.z[graph.edge_index[0][receives]] == 17
    torch.testing.assert_close(distance[other], torch.full((6,), 2.8))
    torch.testing.assert_close(distance[~other], torch.full((12,), 5.6 / 2**0.5))
    torch.testing.assert_close(graph.edge_attr[:, 0], graph.edge_vector.norm(dim=1))
    assert graph.y.tolist() == [-1.5]
    assert graph.validate(raise_on_error=True)


def test_vector_points_from_receiver_to_an_image_of_the_sender():
    graph = CrystalGraph.from_crystal(crystals()[3], GraphOptions(4.0, symmetry=False))
    sender, receiver = graph.edge_index
    end = graph.pos[receiver] + graph.edge_vector - graph.pos[sender]
    cells = torch.linalg.solve(graph.cell[0].T.double(), end.T.double()).T
    torch.testing.assert_close(cells, cells.round(), atol=1e-4, rtol=0)
    assert cells.abs().max() >= 1  # some bond does cross the cell's face


def test_sites_are_numbered_through_in_a_batch():
    graphs = [CrystalGraph.from_crystal(c, OPTIONS, y=float(k)) for k, c in enumerate(crystals())]
    batch = Batch.from_data_list(graphs)
    species = np.concatenate([c.numbers for c in crystals()])
    assert np.array_equal(batch.z[batch.node_of_site].numpy(), species)
    assert batch.cell.shape == (len(graphs), 3, 3)
    assert batch.y.tolist() == [0.0, 1.0, 2.0, 3.0]
    for one, again in zip(graphs, batch.to_data_list(), strict=True):
        assert isinstance(again, CrystalGraph)
        for key in one.keys():  # noqa: SIM118 - a Data is no mapping
            assert torch.equal(one[key], again[key]), key


def test_from_packed(packed):
    for k, crystal in enumerate(crystals()):
        graph = CrystalGraph.from_packed(packed, k, y=2.0)
        again = CrystalGraph.from_crystal(crystal, OPTIONS, y=2.0)
        assert set(again.keys()) - set(graph.keys()) == {"node_of_site"}
        for key in graph.keys():  # noqa: SIM118 - a Data is no mapping
            assert torch.equal(graph[key], again[key]), key
    loaded = DataLoader([CrystalGraph.from_packed(packed, k) for k in (2, 0)], batch_size=2)
    assert next(iter(loaded)).z.tolist() == [2, 26]
    with pytest.raises(IndexError):
        CrystalGraph.from_packed(packed, len(packed))
    with pytest.raises(ValueError, match="row 1 gave no graph"):
        CrystalGraph.from_packed(PackedGraphs.pack([build_graph(crystals()[0], OPTIONS), None]), 1)


def test_tensors_do_not_alias_the_pack(packed):
    graph = CrystalGraph.from_packed(packed, 1)
    before = packed.edge_vector_angstrom.copy()
    graph.edge_vector.zero_()
    graph.z.zero_()
    assert np.array_equal(packed.edge_vector_angstrom, before)
    assert (packed.numbers > 0).all()


def test_pyg_transforms_and_models():
    transform = Compose([Constant(), LocalDegreeProfile()])
    graphs = [transform(CrystalGraph.from_crystal(c, OPTIONS, y=0.5)) for c in crystals()]
    batch = next(iter(DataLoader(graphs, batch_size=4)))
    width = batch.x.shape[1]
    assert width == 6
    torch.manual_seed(0)
    convolution, second = CGConv(width, dim=1), GCNConv(width, 3)
    x = convolution(batch.x, batch.edge_index, batch.edge_attr)
    x = second(x, batch.edge_index, 1 / (1 + batch.edge_weight))
    pooled = global_add_pool(x * batch.multiplicity[:, None], batch.batch)
    assert pooled.shape == (4, 3)
    loss = (pooled.sum(1) - batch.y).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in convolution.parameters())
    # The same graph by itself, with the batch vector that a single graph provides.
    alone = graphs[1]
    single = second(
        convolution(alone.x, alone.edge_index, alone.edge_attr),
        alone.edge_index,
        1 / (1 + alone.edge_weight),
    )
    single = global_add_pool(single * alone.multiplicity[:, None], alone.batch)
    torch.testing.assert_close(single[0], pooled[1])


def test_moves_and_clones_like_any_data(network):
    graph = CrystalGraph.from_crystal(crystals()[3], OPTIONS)
    double = graph.clone().to("cpu")
    assert isinstance(double, CrystalGraph)
    assert torch.equal(network(graph).node, network(double).node)


def test_nothing_else_imports_pyg(repository):
    for path in (repository / "matxfer").rglob("*.py"):
        if path.name == "pyg.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("torch_geometric") for name in names), path
