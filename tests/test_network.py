"""The network: invariance, smoothness, resumable layers, readouts, scaling, Fisher information."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

import matxfer.nn.network
from matxfer.crystal import Crystal
from matxfer.data.batch import GraphBatch, node_weights
from matxfer.data.packed import PackedGraphs
from matxfer.data.properties import Property, apply_transform
from matxfer.fisher import concentration, fisher_diagonal, total_fisher
from matxfer.graph import GraphOptions, build_graph
from matxfer.model import Model
from matxfer.neighbors import neighbor_list
from matxfer.nn.backbone import Backbone, Features
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.layers import polynomial_envelope
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.nn.readout import AtomwiseReadout, PooledReadout, SumReadout, make_readout, pool
from matxfer.nn.scaling import TargetScaler, composition

FULL = GraphOptions(symmetry=False)
CUTOFF = FULL.cutoff_angstrom
ENERGY = Property("energy_ev_per_atom", "eV/atom", per_atom_energy=True)


def low_symmetry():
    lattice = np.array([[4.3, 0.1, 0.2], [0.9, 4.8, -0.3], [-0.5, 0.6, 5.1]])
    frac = [[0.02, 0.05, 0.03], [0.51, 0.44, 0.52], [0.48, 0.03, 0.55], [0.06, 0.52, 0.49]]
    return Crystal(lattice, [56, 22, 8, 8], frac)


def rocksalt():
    frac = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    frac = np.concatenate([frac, frac + np.array([0.5, 0, 0])])
    return Crystal(5.64 * np.eye(3), [11] * 4 + [17] * 4, frac)


def some_crystals():
    lone = Crystal(20 * np.eye(3), [10], [[0, 0, 0]])
    iron = Crystal(2.87 * np.eye(3), [26, 26], [[0, 0, 0], [0.5, 0.5, 0.5]])
    return [low_symmetry(), rocksalt(), lone, iron]


def sensitive_network(n_layers=2, node_dim=16, options=FULL):
    """Return a random network whose outputs differ by about one between crystals."""
    torch.manual_seed(5)
    network = EdgeGatedNetwork(n_layers, node_dim, 12, 16, options).eval()
    for parameter in network.parameters():
        if parameter.dim() == 2:
            parameter.data *= 2.5
    return network


@pytest.fixture(scope="module")
def network():
    return sensitive_network()


@pytest.fixture(scope="module")
def readouts():
    torch.manual_seed(6)
    return nn.ModuleList([AtomwiseReadout(16, 16), PooledReadout(16, 16)])


@pytest.fixture(scope="module")
def predict(network, readouts):
    def outputs(crystal, options=FULL):
        packed = PackedGraphs.pack([build_graph(crystal, options)])
        batch = packed.batch(np.array([0]))
        with torch.no_grad():
            node = network(batch).node
            return np.array([float(readout(node, batch)) for readout in readouts])

    return outputs


@pytest.fixture(scope="module")
def packed():
    return PackedGraphs.pack([build_graph(crystal, FULL) for crystal in some_crystals()])


def everything(packed):
    return packed.batch(np.arange(len(packed)))


# -- invariance -------------------------------------------------------------------------------
def _same(crystal):
    return crystal.lattice, crystal.numbers, crystal.frac_coords


def _transformed(kind, crystal):
    """Return the same crystal written down differently."""
    lattice, numbers, frac = _same(crystal)
    rotation = Rotation.from_euler("xyz", [0.4, -1.1, 2.3]).as_matrix()
    rng = np.random.default_rng(2)
    order = rng.permutation(len(numbers))
    rewritten = {
        "rotation": (lattice @ rotation.T, numbers, frac),
        "improper rotation": (lattice @ (-rotation).T, numbers, frac),
        "translation": (lattice, numbers, frac + np.array([0.37, -0.21, 5.4])),
        "permutation": (lattice, numbers[order], frac[order]),
        "images": (lattice, numbers, frac + rng.integers(-2, 3, frac.shape)),
        "axes": (lattice[[2, 0, 1]], numbers, frac[:, [2, 0, 1]]),
    }
    if kind in rewritten:
        return Crystal(*rewritten[kind])
    change = {
        "supercell": np.diag([2, 1, 1]),
        "sheared cell": [[1, 0, 0], [2, 1, 0], [0, -1, 1]],
        "sheared supercell": [[1, 1, 0], [-1, 1, 0], [0, 1, 2]],
    }[kind]
    return Crystal.from_pymatgen(crystal.to_pymatgen() * np.array(change))


@pytest.mark.parametrize("options", [FULL, GraphOptions()], ids=["all atoms", "asymmetric unit"])
@pytest.mark.parametrize(
    "kind",
    [
        *("rotation", "improper rotation", "translation", "permutation", "images", "axes"),
        *("supercell", "sheared cell", "sheared supercell"),
    ],
)
@pytest.mark.parametrize("crystal", [low_symmetry(), rocksalt()], ids=str)
def test_invariance(crystal, kind, options, predict):
    other = _transformed(kind, crystal)
    np.testing.assert_allclose(predict(other, options), predict(crystal, options), atol=1e-5)


def test_not_invariant_to_what_matters(predict):
    crystal = low_symmetry()
    lattice, numbers, frac = _same(crystal)
    moved = frac.copy()
    moved[1] += 0.02
    variants = [
        Crystal(1.01 * lattice, numbers, frac),
        Crystal(lattice, numbers, moved),
        Crystal(lattice, [56, 22, 8, 16], frac),
        Crystal(lattice, [22, 56, 8, 8], frac),
    ]
    reference = predict(crystal)
    for variant in variants:
        assert (np.abs(predict(variant) - reference) > 1e-4).all()


# -- layers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("k", range(4))
def test_resumable_after_any_layer(k, packed):
    network = sensitive_network(n_layers=3)
    graphs = everything(packed)
    start = network.embed(graphs)
    whole = network.run(graphs, start, 0, 3)
    part = network.run(graphs, network.run(graphs, start, 0, k), k, 3)
    assert torch.equal(part.node, whole.node)
    assert torch.equal(part.edge, whole.edge)
    assert torch.equal(network(graphs).node, whole.node)
    # And run leaves what it was given alone.
    again = network.embed(graphs)
    assert torch.equal(again.node, start.node)
    assert torch.equal(again.edge, start.edge)


def test_every_layer_does_something(packed):
    network = sensitive_network(n_layers=3)
    graphs = everything(packed)
    features = network.embed(graphs)
    for k in range(3):
        after = network.run(graphs, features, k, k + 1)
        assert not torch.allclose(after.node, features.node)
        assert not torch.allclose(after.edge, features.edge)
        features = after
    assert network.run(graphs, features, 2, 2) is features


def test_backbone_protocol(network, packed):
    assert isinstance(network, Backbone)
    assert not isinstance(nn.Linear(2, 2), Backbone)
    features = network(everything(packed))
    assert isinstance(features, Features)
    assert features.node.shape == (packed.node_offset[-1], network.node_dim)
    assert features.edge.shape == (packed.edge_offset[-1], network.edge_dim)


def test_blocks_cover_every_parameter_once():
    network = EdgeGatedNetwork(3, 16, 8, 10)
    names, parameters = [], []
    for name, module in network.blocks():
        names.append(name)
        parameters += [id(p) for p in module.parameters()]
    assert names == ["embed", "layers.0", "layers.1", "layers.2"]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == {id(p) for p in network.parameters()}


def test_config_round_trip():
    options = GraphOptions(4.2, symmetry=False)
    network = EdgeGatedNetwork(3, 10, 6, 7, options)
    again = EdgeGatedNetwork.from_config(network.config())
    assert again.config() == network.config()
    assert again.graph_options == options
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.embedding.basis.centres, network.embedding.basis.centres)


def test_a_graph_does_not_depend_on_its_company(network, readouts, packed):
    graphs = everything(packed)
    features = network(graphs)
    together = [readout(features.node, graphs) for readout in readouts]
    for k in range(len(packed)):
        alone = packed.batch(np.array([k]))
        own = network(alone)
        torch.testing.assert_close(own.node, features.node[graphs.batch == k], atol=1e-6, rtol=1e-6)
        for readout, output in zip(readouts, together, strict=True):
            torch.testing.assert_close(readout(own.node, alone)[0], output[k], atol=1e-6, rtol=1e-6)


# -- envelope and smoothness ------------------------------------------------------------------
@pytest.mark.parametrize("cutoff", [3.0, 5.0])
def test_envelope(cutoff):
    def value_and_derivatives(distance):
        d = torch.tensor(distance, dtype=torch.float64, requires_grad=True)
        value = polynomial_envelope(d, cutoff)
        (first,) = torch.autograd.grad(value, d, create_graph=True)
        (second,) = torch.autograd.grad(first, d)
        return [x.item() for x in (value, first, second)]

    assert value_and_derivatives(cutoff) == pytest.approx([0, 0, 0], abs=1e-12)
    near = value_and_derivatives(cutoff * (1 - 1e-6))
    assert near == pytest.approx([0, 0, 0], abs=1e-3)
    assert near[2] != 0
    assert value_and_derivatives(cutoff * 1.0001) == [0, 0, 0]
    assert value_and_derivatives(0.0)[:2] == pytest.approx([1, 0])
    grid = torch.linspace(0, 2 * cutoff, 401, dtype=torch.float64)
    envelope = polynomial_envelope(grid, cutoff)
    assert (envelope[200:] == 0).all()
    assert (envelope.diff() <= 0).all()
    half = polynomial_envelope(torch.tensor(cutoff / 2, dtype=torch.float64), cutoff)
    assert float(half) == pytest.approx(1 - 28 / 2**6 + 48 / 2**7 - 21 / 2**8)


def precise_batch(crystal, cutoff):
    """Return the full graph of a crystal in double precision."""
    receiver, sender, vector, _ = neighbor_list(crystal, cutoff)
    return GraphBatch(
        z=torch.from_numpy(crystal.numbers.copy()),
        multiplicity=torch.ones(crystal.n_sites, dtype=torch.float64),
        edge_index=torch.from_numpy(np.stack([sender, receiver])),
        edge_vector=torch.from_numpy(vector),
        batch=torch.zeros(crystal.n_sites, dtype=torch.long),
        num_graphs=1,
    )


def _cosine(distance, cutoff):
    return 0.5 * (1 + torch.cos(np.pi * (distance / cutoff).clamp(max=1.0)))


def _hard(distance, cutoff):
    return (distance < cutoff).to(distance.dtype)


def test_smooth_through_the_cutoff(monkeypatch):
    """An atom passes through another's cutoff sphere: nothing jumps, up to second derivatives.

    The cosine cutoff, whose second derivative does jump, and the hard one show that the test
    sees such jumps.
    """
    torch.manual_seed(1)
    network = sensitive_network().double()
    readouts = [kind(16, 16).double() for kind in (AtomwiseReadout, PooledReadout)]
    step = 2e-4
    places = CUTOFF + step * (np.arange(41) - 19.5)

    def along_the_way():
        values = []
        for x in places:
            # One pair passes the cutoff; a third atom keeps both from being lonely before.
            frac = np.array([[0, 0, 0], [x, 0, 0], [x / 2, 1.5, 0]]) / 40
            graphs = precise_batch(Crystal(40 * np.eye(3), [8, 26, 14], frac, False), CUTOFF)
            with torch.no_grad():
                node = network(graphs).node
                values.append([float(readout(node, graphs)) for readout in readouts])
        values = np.array(values)
        first = np.diff(values, axis=0) / step
        second = np.diff(first, axis=0) / step
        jumps = [np.abs(np.diff(d, axis=0)).max(axis=0) for d in (values, first, second)]
        return np.stack(jumps)  # (3, 2)

    ours = along_the_way()
    monkeypatch.setattr(matxfer.nn.network, "polynomial_envelope", _cosine)
    cosine = along_the_way()
    monkeypatch.setattr(matxfer.nn.network, "polynomial_envelope", _hard)
    hard = along_the_way()
    assert (ours < 1e-3 * hard).all(), (ours, hard)
    assert (ours[2] < 0.05 * cosine[2]).all(), (ours, cosine)


# -- readouts ---------------------------------------------------------------------------------
def test_gradients_of_readouts(packed):
    graphs = everything(packed)
    # No two atoms alike: at a tie for the largest, finite differences see one side only.
    node = torch.randn(len(graphs.z), 16, dtype=torch.float64)
    graphs.multiplicity = graphs.multiplicity.double()
    for kind in (AtomwiseReadout, PooledReadout):
        torch.manual_seed(0)
        readout = kind(16, 8).double()
        features = node.clone().requires_grad_(True)
        assert torch.autograd.gradcheck(lambda x: readout(x, graphs), features)  # noqa: B023
        readout(features, graphs).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in readout.parameters())


def test_pooling_by_hand():
    graphs = GraphBatch(
        z=torch.tensor([1, 8, 3]),
        multiplicity=torch.tensor([2.0, 1.0, 4.0]),
        edge_index=torch.zeros(2, 0, dtype=torch.long),
        edge_vector=torch.zeros(0, 3),
        batch=torch.tensor([0, 0, 1]),
        num_graphs=2,
    )
    node = torch.tensor([[1.0, -3.0], [4.0, -6.0], [-5.0, 7.0]])
    torch.testing.assert_close(node_weights(graphs), torch.tensor([2 / 3, 1 / 3, 1.0]))
    expected = torch.tensor([[2.0, -4.0, 4.0, -3.0], [-5.0, 7.0, -5.0, 7.0]])
    torch.testing.assert_close(pool(node, graphs), expected)
    atomwise = AtomwiseReadout(2, 4)
    each = atomwise.per_node(node)
    mean = torch.stack([(2 * each[0] + each[1]) / 3, each[2]])
    torch.testing.assert_close(atomwise(node, graphs), mean)
    # Negative features: an empty start value of the maximum must not win.
    assert pool(-torch.ones(3, 2), graphs)[:, 2:].max() == -1


def test_a_sum_is_that_of_the_cell_and_a_mean_that_of_the_material(network):
    """A supercell has twice the sum, which a property of a material cannot be."""
    one = low_symmetry()
    frac = np.concatenate([one.frac_coords, one.frac_coords + np.array([1, 0, 0])]) / [2, 1, 1]
    two = Crystal(one.lattice * [[2], [1], [1]], np.tile(one.numbers, 2), frac)
    torch.manual_seed(0)
    total, mean = SumReadout(16, 8).double(), AtomwiseReadout(16, 8).double()
    mean.load_state_dict(total.state_dict())
    double = copy.deepcopy(network).double()
    with torch.no_grad():
        sums, means = (
            [float(r(double(g := precise_batch(c, CUTOFF)).node, g)) for c in (one, two)]
            for r in (total, mean)
        )
    assert sums[0] == pytest.approx(4 * means[0], rel=1e-4)
    assert sums[1] == pytest.approx(2 * sums[0], rel=1e-4)
    assert means[1] == pytest.approx(means[0], rel=1e-4)
    assert not PropertyHead(ENERGY, 16, "sum").is_mean_over_atoms


def test_a_sum_loses_on_means():
    """Crystals of 1 to 30 atoms whose value is a mean over them: the same steps, a larger error."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 31, (400,), generator=generator)
    batch = torch.repeat_interleave(torch.arange(400), counts)
    node = torch.randn(400, 8, generator=generator)[batch]
    node = node + 0.3 * torch.randn(len(batch), 8, generator=generator)  # atoms of one material
    graphs = GraphBatch(
        torch.ones(len(batch)), torch.ones(len(batch)), torch.zeros(2, 0, dtype=torch.long),
        torch.zeros(0, 3), batch, 400,
    )  # fmt: skip
    share = node_weights(graphs)
    each = nn.functional.layer_norm(node, (8,))[:, :2].sum(1)  # what the readouts see
    truth = torch.zeros(400).index_add(0, batch, each * share)
    truth = truth / truth.std()
    error = {}
    for kind in ("sum", "atomwise"):
        torch.manual_seed(0)
        readout = make_readout(kind, 8, 16)
        optimizer = torch.optim.Adam(readout.parameters(), 0.01)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (readout(node, graphs) - truth).abs()[:300].mean()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error[kind] = float((readout(node, graphs) - truth).abs()[300:].mean())
    assert error["sum"] > 5 * error["atomwise"], error


def test_make_readout():
    assert isinstance(make_readout("pooled", 4, 4), PooledReadout)
    with pytest.raises(ValueError, match=r"'mean'; known are .*'atomwise', 'attention'"):
        make_readout("mean", 4, 4)
    assert default_readout(ENERGY) == "atomwise"
    assert default_readout(Property("gap_ev", "eV")) == "pooled"


def test_contributions_of_atoms_add_up(network, packed):
    torch.manual_seed(0)
    graphs = everything(packed)
    head = PropertyHead(ENERGY, 16, "atomwise", 8)
    head.scaler.mean.fill_(-1.5)
    head.scaler.std.fill_(0.7)
    head.scaler.reference.copy_(torch.randn(119))
    node = network(graphs).node
    each = head.per_node(node, graphs)
    total = torch.zeros(4).index_add(0, graphs.batch, each * node_weights(graphs))
    np.testing.assert_allclose(total.detach().numpy(), head.values(node, graphs), atol=1e-5)
    pooled = PropertyHead(ENERGY, 16, "pooled")
    assert not pooled.is_mean_over_atoms
    with pytest.raises(ValueError, match="not a mean over atoms"):
        pooled.per_node(node, graphs)


# -- scaling ----------------------------------------------------------------------------------
def random_compositions(n, elements, seed=0):
    """Return a pack of edgeless random compositions of the elements."""
    rng = np.random.default_rng(seed)
    graphs = []
    for _ in range(n):
        z = rng.choice(elements, rng.integers(1, min(len(elements), 3) + 1), replace=False)
        empty = build_graph(Crystal(30 * np.eye(3), [1], [[0, 0, 0]]), FULL)
        graphs.append(
            dataclasses.replace(
                empty,
                numbers=z.astype(np.int16),
                multiplicity=rng.integers(1, 5, len(z)).astype(np.int32),
                position_angstrom=np.zeros((len(z), 3), np.float32),
            )
        )
    return PackedGraphs.pack(graphs)


def test_composition(packed):
    x = composition(packed)
    assert x.shape == (4, 119)
    np.testing.assert_allclose(x.sum(axis=1), 1)
    assert x[0, [56, 22, 8]].tolist() == [0.25, 0.25, 0.5]
    unit = PackedGraphs.pack([build_graph(c, GraphOptions()) for c in some_crystals()] + [None])
    np.testing.assert_allclose(composition(unit)[:4], x)
    assert not composition(unit)[4].any()


@pytest.mark.parametrize(
    "transform", ["identity", "nonnegative", "log", "log10", "log1p", "bounded(-0.5,40)"]
)
@pytest.mark.parametrize("energy", [False, True])
def test_scaler_round_trip(transform, energy):
    graphs = random_compositions(40, [1, 8, 26, 57])
    values = np.random.default_rng(1).lognormal(1.0, 0.8, 40)
    values[3] = np.nan
    prop = Property("x", "", transform, per_atom_energy=energy)
    scaler = TargetScaler.fit(prop, values, graphs)
    targets = scaler.normalised(values, graphs)
    assert targets.dtype == np.float32
    assert np.isnan(targets[3])
    known = np.arange(40) != 3
    assert np.mean(targets[known]) == pytest.approx(0, abs=1e-5)
    assert np.std(targets[known]) == pytest.approx(1, abs=1e-5)
    fitted = scaler.fitted(torch.from_numpy(targets), graphs.batch(np.arange(40)))
    back = scaler.to_unit(fitted.double().numpy())
    np.testing.assert_allclose(back[known], values[known], rtol=1e-4)


def test_values_outside_a_transforms_domain_are_left_out():
    graphs = random_compositions(5, [1, 8])
    values = np.array([1.0, 100.0, 0.0, -2.0, np.inf])
    prop = Property("modulus_gpa", "GPa", "log10")
    scaler = TargetScaler.fit(prop, values, graphs)
    assert float(scaler.mean) == pytest.approx(1.0)
    usable = np.isfinite(scaler.normalised(values, graphs))
    assert usable.tolist() == [True, True, False, False, False]
    assert np.isnan(apply_transform("log1p", np.array([-1.0, -0.5]))).tolist() == [True, False]
    assert TargetScaler("nonnegative").to_unit(np.array([-0.2, 0.3])).tolist() == [0.0, 0.3]
    with pytest.raises(ValueError, match="modulus_gpa: no training value is usable"):
        TargetScaler.fit(prop, np.full(5, -1.0), graphs)
    with pytest.raises(ValueError, match="unknown transform 'sqrt'"):
        Property("x", "", "sqrt")


def test_element_references_recover_a_linear_law():
    elements = np.array([3, 8, 22, 26, 56])
    graphs = random_compositions(300, elements)
    energy = np.array([-1.9, -4.9, -7.8, -8.3, -1.7])
    values = composition(graphs)[:, elements] @ energy
    scaler = TargetScaler.fit(ENERGY, values, graphs)
    recovered = scaler.reference[elements].numpy() + float(scaler.mean)
    np.testing.assert_allclose(recovered, energy, atol=2e-3)
    assert float(scaler.std) < 1e-3
    assert scaler.reference.count_nonzero() == 5
    none = TargetScaler.fit(dataclasses.replace(ENERGY, per_atom_energy=False), values, graphs)
    assert none.reference.count_nonzero() == 0
    assert float(none.std) == pytest.approx(values.std(), rel=1e-5)


@pytest.mark.parametrize("pair", [True, False])
def test_under_determined_references_stay_small(pair):
    """Two elements that always come together; or a single structure for many elements."""
    empty = build_graph(Crystal(30 * np.eye(3), [1], [[0, 0, 0]]), FULL)
    one = dataclasses.replace(
        empty,
        numbers=np.array([3, 9] if pair else [3, 9, 17, 35, 53], np.int16),
        multiplicity=np.ones(2 if pair else 5, np.int32),
        position_angstrom=np.zeros((2 if pair else 5, 3), np.float32),
    )
    graphs = PackedGraphs.pack([one] * (20 if pair else 1))
    values = np.random.default_rng(0).normal(-3.0, 0.1, len(graphs))
    scaler = TargetScaler.fit(ENERGY, values, graphs)
    assert scaler.reference.isfinite().all()
    assert scaler.reference.abs().max() < 1
    assert float(scaler.std) > 0
    targets = scaler.normalised(values, graphs)
    assert np.isfinite(targets).all()
    fitted = scaler.fitted(torch.from_numpy(targets), graphs.batch(np.arange(len(graphs))))
    np.testing.assert_allclose(fitted.numpy(), values, atol=1e-4)


# -- Fisher information -----------------------------------------------------------------------
@pytest.fixture
def tiny_model():
    torch.manual_seed(3)
    backbone = EdgeGatedNetwork(2, 6, 4, 5, FULL)
    gap = Property("gap_ev", "eV")
    return Model(
        backbone, [PropertyHead(ENERGY, 6, "atomwise", 5), PropertyHead(gap, 6, "pooled", 5)]
    )


def test_fisher_against_a_jacobian(tiny_model, packed):
    """Jacobian of the outputs of the whole batch, squared and averaged: Σ_b J_b² / (B σ²)."""
    rows, noise = np.array([0, 1, 3]), {"energy_ev_per_atom": 0.3, "gap_ev": 0.8}
    fisher = fisher_diagonal(tiny_model, packed, rows, noise)
    names = [name for name, _ in tiny_model.backbone.named_parameters()]
    assert set(fisher) == {f"{task}/{name}" for task in noise for name in names}
    graphs = packed.batch(rows)
    for task, head in tiny_model.heads.items():

        def outputs(*parameters, head=head):
            given = dict(zip(names, parameters, strict=True))
            features = torch.func.functional_call(tiny_model.backbone, given, (graphs,))
            return head(features.node, graphs)

        jacobian = torch.autograd.functional.jacobian(
            outputs, tuple(p.detach() for p in tiny_model.backbone.parameters())
        )
        for name, j in zip(names, jacobian, strict=True):
            expected = j.square().mean(0) / noise[task] ** 2
            torch.testing.assert_close(fisher[f"{task}/{name}"], expected, atol=1e-7, rtol=1e-4)
    # It is not the square of the mean gradient.
    batched = jacobian[2].mean(0).square() / noise[task] ** 2
    assert not torch.allclose(batched, fisher[f"{task}/{names[2]}"], rtol=0.05, atol=0)


def test_fisher_leaves_the_model_as_it_was(tiny_model, packed):
    tiny_model.train()
    first = next(tiny_model.backbone.parameters())
    first.requires_grad_(False)
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    with torch.no_grad():  # and does not need the caller to record gradients
        fisher_diagonal(
            tiny_model, packed, np.arange(4), {"energy_ev_per_atom": 1.0, "gap_ev": 1.0}
        )
    assert tiny_model.training
    flags = [p.requires_grad for p in tiny_model.backbone.parameters()]
    assert flags == [False] + [True] * (len(flags) - 1)
    assert all(p.grad is None for p in tiny_model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())


class _LinearBackbone(nn.Module):
    """One weight per element and nothing else: the output is linear in the composition."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(119))

    def forward(self, graphs):
        return Features(self.weight[graphs.z][:, None], self.weight[:0])


class _MeanHead(nn.Module):
    def forward(self, node, graphs):
        return torch.zeros(graphs.num_graphs).index_add(
            0, graphs.batch, node[:, 0] * node_weights(graphs)
        )


def test_fisher_of_a_linear_model():
    """y = Σ_Z x_Z w_Z has F_ZZ = mean(x_Z²) / σ², whatever the weights."""
    graphs = random_compositions(30, [1, 8, 26])
    model = nn.Module()
    model.backbone = _LinearBackbone()
    model.heads = nn.ModuleDict({"y": _MeanHead()})
    fisher = fisher_diagonal(model, graphs, np.arange(30), {"y": 0.5})
    expected = (composition(graphs) ** 2).mean(axis=0) / 0.25
    np.testing.assert_allclose(fisher["y/weight"].numpy(), expected, rtol=1e-5)
    assert fisher["y/weight"].count_nonzero() == 3


def test_total_and_concentration():
    per_task = {
        "a/w": torch.tensor([1.0, 2.0]), "b/w": torch.tensor([3.0, 4.0]), "a/v": torch.ones(1),
    }  # fmt: skip
    total = total_fisher(per_task)
    assert {k: v.tolist() for k, v in total.items()} == {"w": [4.0, 6.0], "v": [1.0]}
    assert per_task["a/w"].tolist() == [1.0, 2.0]
    even = concentration({"w": torch.ones(1500), "v": torch.ones(500)})
    assert even["trace"] == 2000
    assert even["top_0.1_percent"] == pytest.approx(0.001)
    assert (even["w"], even["v"]) == (0.75, 0.25)
    peaked = torch.zeros(2000)
    peaked[7] = 5.0
    assert concentration({"w": peaked})["top_0.1_percent"] == 1.0
    assert concentration({"w": torch.zeros(3)}) == {"trace": 0.0}
    # A large even share next to a peak: single precision must not lose it.
    mixed = concentration({"w": torch.cat([torch.full((99_999,), 1e-6), torch.ones(1)])})
    assert mixed["top_0.1_percent"] == pytest.approx((1 + 99e-6) / (1 + 99_999e-6), rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_without_gradients_nothing_changes(mixed, tiny_model, table_crystals):
    """Sums and products are then done in place: the same values, and inputs left as they were."""
    options = tiny_model.backbone.graph_options
    network = EdgeGatedNetwork(2, 16, 8, 10, options, angular_dim=4)
    packed = PackedGraphs.pack([build_graph(c, options) for c in table_crystals[:6]])
    batch = packed.batch(np.arange(6))
    before = copy.deepcopy(batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        start = network.embed(batch)
        node, edge = start.node.clone(), start.edge.clone()
        expected = network.run(batch, start, 0, 2)
        with torch.no_grad():
            found = network.run(batch, start, 0, 2)
    assert torch.equal(start.node, node)
    assert torch.equal(start.edge, edge)
    for name in ("z", "multiplicity", "edge_index", "edge_vector", "batch"):
        assert torch.equal(getattr(batch, name), getattr(before, name))
    tolerance = 5e-2 if mixed else 1e-5
    torch.testing.assert_close(found.node, expected.node, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.edge, expected.edge, atol=tolerance, rtol=tolerance)
