"""Potentials that other packages carry, as bases of plugins."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ase.build import bulk
from emt_frames import emt_frames, table_of

from matxfer.calculator import MatxferCalculator
from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.graph import build_graph
from matxfer.potential.fit import finetune_potential
from matxfer.potential.model import load_potential

PACKAGES = {"chgnet-potential": "chgnet", "sevennet-potential": "sevenn"}
#: At which one epoch is not the best already; the penalty pulls from the second step on.
RATES = {"chgnet-potential": 5e-3, "sevennet-potential": 5e-4}


@pytest.fixture(scope="module", params=list(PACKAGES))
def base(request):
    package = PACKAGES[request.param]
    extra = request.param.split("-")[0]
    pytest.importorskip(package, reason=f"{package} is not installed: pip install matxfer[{extra}]")
    return load_potential(request.param)


@pytest.fixture(scope="module")
def table():
    return table_of(emt_frames(16)).assign(split=["train"] * 12 + ["val"] * 2 + ["test"] * 2)


def test_a_plugin(base, table, tmp_path):
    last = base.backbone.n_layers - 1
    for strategy in ("finetune", "scratch"):
        plugin = finetune_potential(
            table, tmp_path / strategy, potential=base.name, split_column="split",
            strategy=strategy, freeze=last if strategy == "finetune" else 0, epochs=1,
        )  # fmt: skip
        assert np.isfinite(plugin.meta["test"]["forces_mae_ev_per_a"])
    atoms = emt_frames(1)[0]
    atoms.calc = MatxferCalculator(plugins=[tmp_path / "finetune"])
    assert np.isfinite(atoms.get_forces()).all()


def test_ewc_holds_what_the_base_says_of_other_crystals(base, table):
    """Frames of another method pull the layers away; the penalty keeps oxides where they were."""
    options = base.backbone.graph_options
    crystals = []
    for seed, (formula, a) in enumerate((("NaCl", 5.7), ("MgO", 4.25), ("LiF", 4.05))):
        atoms = bulk(formula, "rocksalt", a=a, cubic=True)
        atoms.rattle(0.05, seed=seed)
        crystals.append(Crystal.from_ase(atoms))
    pack = PackedGraphs.pack([build_graph(crystal, options) for crystal in crystals])
    graphs = pack.batch(np.arange(len(pack)))
    before = base.respond(graphs)
    moved, energy, forces = {}, {}, {}
    for strength in (0.0, 1.0):
        plugin = finetune_potential(
            table, potential=base, split_column="split", retain="ewc", strength=strength,
            freeze=base.backbone.n_layers - 2, epochs=4, max_edges=1000, average=0.0,
            learning_rate=RATES[base.name],
        )  # fmt: skip
        learnt = "forces_mae_ev_per_a"
        assert plugin.meta["test"][learnt] < plugin.meta["test_before"][learnt]
        after = plugin.on_the_base_head().respond(graphs)
        energy[strength] = float((after.energy_ev - before.energy_ev).abs().mean()) / 8
        forces[strength] = float((after.forces_ev_per_a - before.forces_ev_per_a).abs().mean())
        own = plugin.potential.backbone.state_dict()
        moved[strength] = sum(
            float((v - own[k]).square().sum()) for k, v in base.backbone.state_dict().items()
        )
    told = f"moved {moved}, energies by {energy} eV/atom, forces by {forces} eV/Å"
    print(told)
    assert moved[0.0] > moved[1.0] > 0, told
    assert energy[1.0] < 0.5 * energy[0.0], told
    assert forces[1.0] < 0.5 * forces[0.0], told


def test_its_fisher_information_is_of_its_layers(base):
    fisher = base.fisher()
    shapes = {name: value.shape for name, value in base.backbone.named_parameters()}
    assert {name: value.shape for name, value in fisher.items()} == shapes
    card = json.loads((base.folder / "card.json").read_text())["fisher"]
    assert card["n_source"] > 100_000
    assert card["noise"].keys() == {"energy", "forces"}
    assert all(bool(torch.isfinite(v).all() and (v >= 0).all()) for v in fisher.values())
    deep = [name for name in fisher if name.startswith("layers.1.")]
    assert any(float(fisher[name].sum()) > 0 for name in deep)
