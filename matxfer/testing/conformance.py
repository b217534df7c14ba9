"""The checks of a backbone, each of them a promise that other modules build on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import matxfer.testing.crystals as make
from matxfer.errors import MatxferError
from matxfer.nn.backbone import BackboneModule
from matxfer.testing.subject import Subject, detached, in_double, nodes
from matxfer.transfer.freezing import adaptable_copy, trainable_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from matxfer.crystal import Crystal

Check = Callable[[Subject], None]
_ATTRIBUTES = ("kind", "n_layers", "node_dim", "edge_dim", "graph_options")
#: Oxygen, silicon, titanium, iron: elements that most networks know.
ELEMENTS = (8, 14, 22, 26)


class ConformanceError(MatxferError, AssertionError):
    """Checks that a backbone does not pass, one line each."""


def check_backbone(
    backbone: nn.Module, *, elements: Sequence[int] = ELEMENTS, rtol: float = 1e-4
) -> list[str]:
    """Try a backbone with everything that matxfer relies on.

    Its weights should be such that all of its parts do something: a layer that starts as zeros
    counts as one that ignores the structure.

    Parameters
    ----------
    backbone
        The network; it is left as it was.
    elements
        Atomic numbers that it knows, three or more.
    rtol
        Largest difference that counts as none, as a part of a layer's largest feature.

    Returns
    -------
    list of str
        The names of the checks that it passed, all of :func:`backbone_checks`.

    Raises
    ------
    ConformanceError
        Naming each check that it does not pass, and why.
    """
    failed = []
    checks = backbone_checks()
    for check in checks.values():
        try:
            check(backbone, elements=elements, rtol=rtol)
        except ConformanceError as error:
            failed.append(str(error))
            if check is next(iter(checks.values())):
                break  # without the interface nothing else can be asked
    if failed:
        text = "\n".join(f"- {line}" for line in failed)
        raise ConformanceError(f"{type(backbone).__name__} is no backbone for matxfer:\n{text}")
    return list(checks)


def backbone_checks() -> dict[str, Callable[..., None]]:
    """Return the checks by name, for ``pytest.mark.parametrize``; each takes a backbone."""
    return {name: partial(_run, name, check) for name, check in _CHECKS.items()}


def _run(
    name: str,
    check: Check,
    backbone: nn.Module,
    *,
    elements: Sequence[int] = ELEMENTS,
    rtol: float = 1e-4,
) -> None:
    tried: Any = copy.deepcopy(backbone).cpu().float().eval().requires_grad_(False)
    subject = Subject(tried, tuple(elements), rtol)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if check is not _interface:
                usual = subject.batch(make.low_symmetry(elements), make.perovskite(elements))
                states = subject.layers(usual)
                subject.scale = [max(float(s.node.abs().max()), 1e-12) for s in states]
            check(subject)
    except Exception as error:  # whatever a stranger's network raises is a failure
        reason = str(error) if isinstance(error, AssertionError) else repr(error)
        raise ConformanceError(f"{name}: {reason}") from error


# -- what it is ---------------------------------------------------------------------------------
def _interface(subject: Subject) -> None:
    backbone: Any = subject.backbone
    for base in (nn.Module, BackboneModule):
        assert isinstance(backbone, base), f"it is no {base.__module__}.{base.__name__}"
    lacking = [n for n in _ATTRIBUTES if not hasattr(backbone, n)]
    assert not lacking, f"it lacks {', '.join(lacking)}"
    assert isinstance(backbone.kind, str), "its kind, the name of its class, is no text"
    assert backbone.n_layers >= 1, "it has no layer"
    assert backbone.node_dim >= 1, "its nodes have no features"
    names = [name for name, _ in backbone.blocks()]
    wanted = ["embed", *(f"layers.{k}" for k in range(backbone.n_layers))]
    assert names == wanted, f"blocks() yields {names}, not {wanted}"


def _shapes(subject: Subject) -> None:
    backbone = subject.backbone
    pack = subject.pack(_ordinary(subject))
    graphs = pack.batch(np.arange(len(pack)))
    extra_rows = int(backbone.extra_rows_per_graph(pack).sum())
    states = subject.layers(graphs)
    assert len(states) == backbone.n_layers + 1, f"states() yields {len(states) - 1} states"
    for k, state in enumerate(states):
        sizes = {
            "node": (state.node, (len(graphs.z), backbone.node_dim)),
            "edge": (state.edge, (graphs.edge_index.shape[1], backbone.edge_dim)),
        }
        if backbone.extra_dim:
            assert state.extra is not None, f"extra is None after layer {k}"
            sizes["extra"] = (state.extra, (extra_rows, backbone.extra_dim))
        for what, (value, size) in sizes.items():
            assert tuple(value.shape) == size, f"{what} after {k} layers: {value.shape}, not {size}"
            assert torch.isfinite(value).all(), f"{what} after {k} layers is not finite"


def _partition(subject: Subject) -> None:
    """Ask that no parameter is outside of the blocks, where none trains it, or in two of them."""
    owner: dict[int, str] = {}
    for block, module in subject.backbone.blocks():
        for name, parameter in module.named_parameters():
            assert id(parameter) not in owner, f"{block}.{name} is in {owner[id(parameter)]} too"
            owner[id(parameter)] = block
    lost = [n for n, p in subject.backbone.named_parameters() if id(p) not in owner]
    assert not lost, f"{lost[0]} belongs to no block"


def _no_batch_statistics(subject: Subject) -> None:
    for name, module in subject.backbone.named_modules():
        assert not isinstance(module, nn.modules.batchnorm._NormBase), (  # noqa: SLF001
            f"{name} is a {type(module).__name__}, whose statistics depend on the batch; use "
            "LayerNorm"
        )
    before = {n: b.clone() for n, b in subject.backbone.named_buffers()}
    subject.backbone.train()
    subject.layers(subject.batch(*_ordinary(subject)))
    for name, buffer in subject.backbone.named_buffers():
        assert torch.equal(buffer, before[name]), f"a forward pass in training changes {name}"


# -- what it does -------------------------------------------------------------------------------
def _deterministic(subject: Subject) -> None:
    graphs = subject.batch(*_ordinary(subject))
    first = nodes(subject.layers(graphs))
    again = nodes(subject.layers(graphs))
    assert all(map(torch.equal, first, again)), "two passes in evaluation mode differ"
    subject.backbone.requires_grad_(True)
    state = subject.backbone.embed(graphs)
    tracked = [state, *subject.backbone.states(graphs, state, 0, subject.backbone.n_layers)]
    subject.same(first, nodes(tracked), "with gradients")


def _sees_the_structure(subject: Subject) -> None:
    known, reach = subject.elements, subject.options.cutoff_angstrom
    pairs = {
        "distances": (make.pair(known, 0.4 * reach), make.pair(known, 0.5 * reach)),
        "elements": (make.pair(known, 0.4 * reach), make.pair(known[1:], 0.4 * reach)),
    }
    for what, (before, after) in pairs.items():
        # The first layer may say of an atom what it is; the last has to know of its neighbour.
        left, right = (subject.sites(crystal)[-1] for crystal in (before, after))
        seen = subject.difference([left] * len(subject.scale), [right] * len(subject.scale))
        assert seen > subject.rtol, f"the features do not depend on the {what}"


def _composition(subject: Subject) -> None:
    """Ask that a prefix and its suffix are the whole, whatever passes between the two."""
    backbone, L = subject.backbone, subject.backbone.n_layers
    graphs = subject.batch(*_ordinary(subject))
    other = subject.batch(make.one_atom(subject.elements[0]))
    with torch.no_grad():
        whole = backbone(graphs)
        for k in range(L + 1):
            prefix = detached(backbone.run(graphs, backbone.embed(graphs), 0, k))
            backbone(other)
            resumed = backbone.run(graphs, prefix, k, L)
            apart = subject.difference([resumed.node] * (L + 1), [whole.node] * (L + 1))
            assert apart <= subject.rtol, f"layers 0…{k} and then {k}…{L} are not the whole"
            stayed = backbone.run(graphs, prefix, k, k)
            assert torch.equal(stayed.node, prefix.node), f"running no layer changes state {k}"
        last = subject.layers(graphs)[-1]
    subject.same([last.node] * (L + 1), [whole.node] * (L + 1), "states() against forward()")


def _freezing(subject: Subject) -> None:
    """Ask that what is frozen stays, gets no gradient, and depends on nothing that is trained."""
    backbone, graphs = subject.backbone, subject.batch(*_ordinary(subject))
    before = subject.layers(graphs)
    for depth in range(backbone.n_layers + 1):
        own = adaptable_copy(backbone, depth)
        blocks = dict(trainable_blocks(own, depth))
        trained = {id(p) for block in blocks.values() for p in block.parameters()}
        node = own(graphs).node
        if blocks:
            (node * torch.randn_like(node)).sum().backward()
        for name, block in own.blocks():
            gradients = [p.grad for p in block.parameters()]
            if name in blocks and gradients:
                some = any(g is not None and bool(g.abs().max() > 0) for g in gradients)
                assert some, f"with {depth} frozen, {name} gets no gradient"
        for name, parameter in own.named_parameters():
            if id(parameter) not in trained:
                told = f"with {depth} frozen, {name}"
                assert not parameter.requires_grad, f"{told} is trainable"
                assert parameter.grad is None, f"{told} gets a gradient"
        with torch.no_grad():
            for block in blocks.values():
                for parameter in block.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        after = subject.layers(graphs, own)
        for k in range(depth + 1 if depth else 0):
            assert torch.equal(after[k].node, before[k].node), (
                f"state {k} changes with the layers above the {depth} frozen ones"
            )
        again = nodes(subject.layers(graphs))
        assert all(map(torch.equal, again, nodes(before))), "training a copy changes the original"


def _invariance(change: Callable[[Crystal], Crystal], subject: Subject) -> None:
    for crystal in _ordinary(subject):
        before, after = subject.sites(crystal), subject.sites(change(crystal))
        n = len(before[0])
        for first in range(0, len(after[0]), n):  # a supercell has every atom several times
            part = [layer[first : first + n] for layer in after]
            subject.same(before, part, crystal.formula)


def _permutation(subject: Subject) -> None:
    for crystal in _ordinary(subject):
        order = np.random.default_rng(1).permutation(crystal.n_sites)
        before = [layer[torch.from_numpy(order)] for layer in subject.sites(crystal)]
        subject.same(before, subject.sites(make.permuted(crystal, order)), crystal.formula)


def _asymmetric_unit(subject: Subject) -> None:
    """Ask that one node per symmetry orbit gives the features of the full cell."""
    if not subject.options.symmetry:
        return
    full = replace(subject.options, symmetry=False)
    for crystal in _ordinary(subject):
        subject.same(subject.sites(crystal), subject.sites(crystal, full), crystal.formula)


def _batching(subject: Subject) -> None:
    """Ask that company does not matter, be it rows that failed or atoms without neighbours."""
    crystals = [*_ordinary(subject), None, make.lone_atom(subject.elements[-1])]
    together = nodes(subject.layers(subject.batch(*crystals)))
    singly = [nodes(subject.layers(subject.batch(crystal))) for crystal in crystals]
    joined = [torch.cat([each[k] for each in singly]) for k in range(len(together))]
    subject.same(together, joined, "together and one by one")


def _no_neighbours(subject: Subject) -> None:
    lone = make.lone_atom(subject.elements[0])
    for what, batch in (
        ("an atom without neighbours", subject.batch(lone)),
        ("several of them", subject.batch(lone, make.lone_atom(subject.elements[1]))),
        ("no atom at all", subject.batch(None)),
    ):
        for k, state in enumerate(subject.layers(batch)):
            size = (len(batch.z), subject.backbone.node_dim)
            assert tuple(state.node.shape) == size, f"{what}: node is {tuple(state.node.shape)}"
            assert len(state.edge) == 0, f"{what}: there are edges"
            assert torch.isfinite(state.node).all(), f"{what}: state {k} is not finite"


def _continuous(subject: Subject) -> None:
    """Ask that it does not matter whether a neighbour just at the cutoff is found."""
    reach, step = subject.options.cutoff_angstrom, 1e-5
    inside = subject.sites(make.pair(subject.elements, reach * (1 - step)))
    outside = subject.sites(make.pair(subject.elements, reach * (1 + step)))
    subject.same(inside, outside, f"two atoms just within and just beyond {reach} Å")


def _gradients(subject: Subject) -> None:
    """Ask for derivatives by the edge vectors, which forces and stresses are made of."""
    backbone = copy.deepcopy(subject.backbone).double()
    graphs = in_double(subject.batch(*_ordinary(subject)))
    weight = torch.randn(len(graphs.z), backbone.node_dim, dtype=torch.float64)

    def output(vector: Tensor) -> Tensor:
        total: Tensor = (backbone(replace(graphs, edge_vector=vector)).node * weight).sum()
        return total

    vector = graphs.edge_vector.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(output(vector), vector)
    assert torch.isfinite(slope).all(), "a derivative is not finite"
    assert bool(slope.abs().max() > 0), "the derivatives are zero"
    # A strain of all vectors keeps edges and their opposites opposite.
    strain, step = torch.randn(3, 3, dtype=torch.float64), 1e-5
    moved = graphs.edge_vector @ strain
    with torch.no_grad():
        ahead, behind = (output(graphs.edge_vector + s * step * moved) for s in (1, -1))
    wanted, found = float(ahead - behind) / (2 * step), float((slope * moved).sum())
    scale = max(abs(wanted), float((slope * moved).abs().sum()) * 1e-2)
    assert abs(wanted - found) <= 1e-4 * scale, (
        f"the derivative by a strain is {found:.6g}, but differences say {wanted:.6g}"
    )


def _double_precision(subject: Subject) -> None:
    graphs = subject.batch(*_ordinary(subject))
    single = subject.layers(graphs)
    double = subject.layers(in_double(graphs), copy.deepcopy(subject.backbone).double())
    for what, states, dtype in (
        ("float32", single, torch.float32),
        ("float64", double, torch.double),
    ):
        for k, state in enumerate(states):
            for value in (state.node, state.edge, state.extra):
                if value is None:
                    continue
                assert value.dtype == dtype, f"state {k} of {what} is {value.dtype}"
    subject.same(nodes(single), nodes(double), "float32 against float64")


def _saving(subject: Subject) -> None:
    from safetensors.torch import load, save

    backbone = subject.backbone
    config = json.loads(json.dumps(backbone.config()))
    assert config.get("kind") == backbone.kind, f"config() says kind {config.get('kind')!r}"
    assert config.get("graph") == backbone.graph_options.to_json(), (
        "config() must give graph_options.to_json() as 'graph'"
    )
    again = type(backbone).from_config(config).eval()
    assert again.config() == config, "from_config() builds another network than config() describes"
    state = load(save({k: v.clone().contiguous() for k, v in backbone.state_dict().items()}))
    again.load_state_dict(state)
    graphs = subject.batch(*_ordinary(subject))
    before, after = nodes(subject.layers(graphs)), nodes(subject.layers(graphs, again))
    assert all(map(torch.equal, before, after)), "read back it says something else"


def _ordinary(subject: Subject) -> list[Crystal]:
    known = subject.elements
    return [make.low_symmetry(known), make.perovskite(known), make.one_atom(known[-1])]


_CHECKS: dict[str, Check] = {
    "interface": _interface,
    "shapes": _shapes,
    "blocks partition the parameters": _partition,
    "no batch statistics": _no_batch_statistics,
    "determinism": _deterministic,
    "dependence on the structure": _sees_the_structure,
    "prefix and suffix are the whole": _composition,
    "freezing": _freezing,
    "invariance under rotation": partial(_invariance, make.rotated),
    "invariance under translation": partial(_invariance, make.moved),
    "invariance under another cell": partial(_invariance, make.other_cell),
    "invariance under a supercell": partial(_invariance, make.supercell),
    "order of the atoms": _permutation,
    "asymmetric unit": _asymmetric_unit,
    "batches": _batching,
    "no neighbours": _no_neighbours,
    "continuity at the cutoff": _continuous,
    "derivatives": _gradients,
    "double precision": _double_precision,
    "saving and loading": _saving,
}
