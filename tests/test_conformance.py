"""What a backbone must keep, on networks that do and on networks that each break one promise."""

from __future__ import annotations

import pytest
import torch
from readme_schnet import blocks, schnet_module
from torch import nn
from torch.nn import functional

from matxfer.graph import GraphOptions
from matxfer.model import available_models, find_model, is_potential, load_model
from matxfer.nn.backbone import BackboneModule, Features
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.potential.model import load_potential
from matxfer.testing import ConformanceError, backbone_checks, check_backbone

CHECKS = backbone_checks()


class Sound(EdgeGatedNetwork):
    """A small network that keeps all promises; the others break one of them."""

    kind = "sound"

    def __init__(self, graph_options=None, *, n_layers=2, node_dim=8, edge_dim=6, basis_size=8,
                 angular_dim=2):  # fmt: skip
        super().__init__(n_layers, node_dim, edge_dim, basis_size, graph_options, angular_dim)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.data *= 2  # or else layers would hardly matter

    def embed(self, graphs):
        state = super().embed(graphs)
        return Features(self.change(state.node, graphs), state.edge)

    def states(self, graphs, features, start, stop):
        for state in super().states(graphs, features, start, stop):
            features = Features(self.change(state.node, graphs), state.edge)
            yield features

    def change(self, node, graphs):
        return node


def summed(values, graphs, end=1):
    return values.new_zeros(len(graphs.z), values.shape[1]).index_add(
        0, graphs.edge_index[end], values
    )


class SeesDirections(Sound):
    def change(self, node, graphs):
        return node + summed(graphs.edge_vector.abs(), graphs)[:, :1]


class SeesTheOrder(Sound):
    def change(self, node, graphs):
        return node + 0.01 * torch.arange(len(node))[:, None]


class CountsAtoms(Sound):
    def change(self, node, graphs):
        atoms = torch.bincount(graphs.batch, weights=graphs.multiplicity.double())
        return node + 0.1 * atoms[graphs.batch].to(node)[:, None]


class LooksAtTheBatch(Sound):
    def change(self, node, graphs):
        return node - node.mean(0)


class GathersAtTheSender(Sound):
    """Right on full cells, where every edge has its opposite; wrong on one node per orbit."""

    def change(self, node, graphs):
        length = torch.linalg.vector_norm(graphs.edge_vector, dim=1, keepdim=True)
        reach = self.graph_options.cutoff_angstrom
        return node + summed((1 - (length / reach) ** 2).clamp(min=0) ** 3, graphs, end=0)


class HasNoEnvelope(Sound):
    def change(self, node, graphs):
        return node + 0.1 * summed(torch.ones(len(graphs.edge_vector), 1).to(node), graphs)


class DropsOut(Sound):
    def change(self, node, graphs):
        return functional.dropout(node, 0.2, training=True)


class WorksInSingle(Sound):
    def change(self, node, graphs):
        return node.float()


class NeedsNeighbours(Sound):
    def change(self, node, graphs):
        length = torch.linalg.vector_norm(graphs.edge_vector, dim=1)
        return node * (length.max() / length.max())


class DividesByTheNeighbours(Sound):
    def change(self, node, graphs):
        ones = torch.ones(len(graphs.edge_vector), 1).to(node)
        return node * (summed(ones, graphs) / summed(ones, graphs))


class IgnoresDistances(Sound):
    def __init__(self, graph_options=None):
        super().__init__(graph_options, angular_dim=0)

    def embed(self, graphs):
        return super().embed(self.blind(graphs))

    def states(self, graphs, features, start, stop):
        return super().states(self.blind(graphs), features, start, stop)

    def blind(self, graphs):
        unit = functional.normalize(graphs.edge_vector.detach(), dim=1)
        return type(graphs)(graphs.z, graphs.multiplicity, graphs.edge_index, unit, graphs.batch,
                            graphs.num_graphs)  # fmt: skip

    def config(self):
        return {"kind": self.kind, "graph": self.graph_options.to_json()}


class HasBatchNorm(Sound):
    def __init__(self, graph_options=None):
        super().__init__(graph_options)
        self.embedding.norm = nn.BatchNorm1d(self.node_dim)


class Remembers(Sound):
    """Keeps something of the embedding in itself, which a resumed suffix finds replaced."""

    def embed(self, graphs):
        state = super().embed(graphs)
        self.mean = state.node.mean().detach()
        return state

    def change(self, node, graphs):
        return node + getattr(self, "mean", 0.0)


class SkipsTheFirst(Sound):
    """Counts layers from where it starts instead of from the input."""

    def states(self, graphs, features, start, stop):
        return super().states(graphs, features, 0, stop - start)


class SharesALayer(Sound):
    def __init__(self, graph_options=None):
        super().__init__(graph_options)
        self.layers[1] = self.layers[0]


class HasALooseWeight(Sound):
    def __init__(self, graph_options=None):
        super().__init__(graph_options)
        self.loose = nn.Parameter(torch.ones(1))

    def change(self, node, graphs):
        return node * self.loose


class EmbedsWithALayer(Sound):
    """The prefix depends on what is above it."""

    def embed(self, graphs):
        state = super().embed(graphs)
        return Features(self.layers[-1].norm(state.node), state.edge)


class CutsGradients(Sound):
    def states(self, graphs, features, start, stop):
        for state in super().states(graphs, features, start, stop):
            yield Features(state.node.detach(), state.edge)


class CutsDerivatives(Sound):
    def change(self, node, graphs):
        return node + 0.3 * node.detach()


class YieldsTooFew(Sound):
    def states(self, graphs, features, start, stop):
        return list(super().states(graphs, features, start, stop))[:1]


class IsNarrower(Sound):
    def change(self, node, graphs):
        return node[:, 1:] if len(node) < 0 else torch.cat([node, node], 1)[:, : 1 + node.shape[1]]


class ForgetsAnOption(Sound):
    def config(self):
        return {k: v for k, v in super().config().items() if k != "n_layers"}

    def __init__(self, graph_options=None, n_layers=3, **options):
        super().__init__(graph_options, n_layers=n_layers, **options)

    @classmethod
    def from_config(cls, config):
        return cls(GraphOptions.from_json(config["graph"]), n_layers=2)


class KeepsAWeightAside(Sound):
    """Something decides that is neither in the state nor in the description."""

    def __init__(self, graph_options=None, **options):
        super().__init__(graph_options, **options)
        self.aside = float(torch.rand(()))

    def change(self, node, graphs):
        return node + self.aside


BROKEN = {
    SeesDirections: "invariance under rotation",
    SeesTheOrder: "order of the atoms",
    CountsAtoms: "invariance under a supercell",
    LooksAtTheBatch: "batches",
    GathersAtTheSender: "asymmetric unit",
    HasNoEnvelope: "continuity at the cutoff",
    DropsOut: "determinism",
    WorksInSingle: "double precision",
    NeedsNeighbours: "no neighbours",
    DividesByTheNeighbours: "no neighbours",
    IgnoresDistances: "dependence on the structure",
    HasBatchNorm: "no batch statistics",
    Remembers: "prefix and suffix are the whole",
    SkipsTheFirst: "prefix and suffix are the whole",
    SharesALayer: "blocks partition the parameters",
    HasALooseWeight: "blocks partition the parameters",
    EmbedsWithALayer: "freezing",
    CutsGradients: "freezing",
    CutsDerivatives: "derivatives",
    YieldsTooFew: "shapes",
    IsNarrower: "shapes",
    ForgetsAnOption: "saving and loading",
    KeepsAWeightAside: "saving and loading",
}


def made(network, **options):
    torch.manual_seed(3)
    return network(**options)


def test_every_check_can_fail():
    others = {"invariance under translation", "invariance under another cell", "interface"}
    assert set(BROKEN.values()) | others == set(CHECKS)


@pytest.mark.parametrize("network", BROKEN, ids=lambda n: n.__name__)
def test_what_is_broken_is_found(network):
    with pytest.raises(ConformanceError, match=f"^{BROKEN[network]}: "):
        CHECKS[BROKEN[network]](made(network))


def test_another_cell_and_a_translation_are_tried():
    """Our graphs hide both from a network, so it is told from outside what breaks them."""

    class Leaks(Sound):
        calls = 0

        def change(self, node, graphs):
            self.calls += 1
            return node + self.calls / 100

    for name in ("invariance under translation", "invariance under another cell"):
        with pytest.raises(ConformanceError, match=name):
            CHECKS[name](made(Leaks))


def test_all_failures_are_told_at_once():
    class Worse(SeesTheOrder):
        def change(self, node, graphs):
            return super().change(node, graphs).float()

    with pytest.raises(ConformanceError) as failed:
        check_backbone(made(Worse))
    lines = str(failed.value).splitlines()
    assert "Worse is no backbone" in lines[0]
    told = [line.split(":")[0].removeprefix("- ") for line in lines[1:]]
    assert {"order of the atoms", "double precision"} <= set(told)
    assert "invariance under rotation" not in told


@pytest.mark.parametrize("other", [nn.Linear(3, 3), "lacking", "misnamed"])
def test_what_is_no_backbone_at_all(other):
    if other == "lacking":
        other = made(Sound)
        del other.edge_dim
    elif other == "misnamed":

        class Misnamed(Sound):
            def blocks(self):
                return reversed(list(super().blocks()))

        other = made(Misnamed)
    with pytest.raises(ConformanceError) as failed:
        check_backbone(other)
    assert str(failed.value).count("\n") == 1  # nothing else is asked
    assert "- interface: " in str(failed.value)


def test_the_backbone_is_left_as_it_was():
    network = made(Sound).train()
    network.embedding.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.random.get_rng_state()
    assert check_backbone(network) == list(CHECKS)
    assert network.training
    assert not any(p.requires_grad for p in network.embedding.parameters())
    assert all(p.requires_grad and p.grad is None for p in network.layers.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())


def test_a_full_cell_network_and_a_network_without_edge_features():
    assert check_backbone(made(Sound, graph_options=GraphOptions(4.0, symmetry=False)))
    assert check_backbone(made(Sound, angular_dim=0, edge_dim=1))


@pytest.mark.parametrize("name", available_models())
def test_shipped_weights(name):
    potential = is_potential(find_model(name)[1])
    model = load_potential(name) if potential else load_model(name)
    assert check_backbone(model.backbone) == list(CHECKS)


def test_schnet_of_the_readme():
    schnet = made(schnet_module().SchNetBackbone)
    assert isinstance(schnet, BackboneModule)
    assert check_backbone(schnet) == list(CHECKS)
    lines = blocks("python")[0].split("class SchNetBackbone")[1].strip().splitlines()
    assert len([line for line in lines if line]) <= 30
    # The second block is what a reader runs next.
    exec(blocks("python")[1], dict(schnet_module().__dict__))
