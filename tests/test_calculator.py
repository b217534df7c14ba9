"""The ASE calculator: predictions through ``atoms.calc``, contributions of the atoms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import bulk, make_supercell
from ase.calculators.calculator import PropertyNotImplementedError

import matxfer
import matxfer.calculator as calculator_module
from matxfer.calculator import MatxferCalculator
from matxfer.crystal import Crystal, CrystalError
from matxfer.data.properties import property_of
from matxfer.nn.ensemble import ReadoutEnsemble
from matxfer.nn.plugin_head import PluginHead
from matxfer.prediction import predict
from matxfer.transfer.plugin import Plugin

ENERGY = "formation_energy_ev_per_atom"
CONTRIBUTIONS = f"{ENERGY}_contributions"


def salt():
    return bulk("NaCl", "rocksalt", a=5.64, cubic=True)


def crooked():
    """Return four atoms of which no two are alike."""
    lattice = np.array([[4.3, 0.1, 0.2], [0.9, 4.8, -0.3], [-0.5, 0.6, 5.1]])
    frac = [[0.02, 0.05, 0.03], [0.51, 0.44, 0.52], [0.48, 0.03, 0.55], [0.06, 0.52, 0.49]]
    return Crystal(lattice, [26, 12, 8, 8], frac).to_ase()


def make_plugin(model, target="vibrational_energy_mev_per_atom", depth=1, readout="atomwise"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(depth)
        own = ReadoutEnsemble(readout, 2 * model.backbone.node_dim, 4, 3)
        source = target if target in model.heads else None
        head = PluginHead(property_of(target), (0, model.backbone.n_layers), own, source)
        head.scaler.mean.fill_(20.0)
        head.scaler.std.fill_(5.0)
        plugin = Plugin(model, depth, head, {"name": "mine"})
        for parameter in plugin.backbone.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return plugin.eval()


@pytest.fixture
def calculator(tiny_model):
    return MatxferCalculator(tiny_model, [make_plugin(tiny_model)])


@pytest.mark.parametrize("atoms", [salt(), crooked(), bulk("Fe", a=2.87)], ids=str)
def test_values_equal_predict(atoms, calculator, tiny_model):
    atoms.calc = calculator
    expected = predict(atoms, calculator.plugins, model=tiny_model).iloc[0]
    names = [*tiny_model.heads, "vibrational_energy_mev_per_atom"]
    for name in names:
        value = atoms.calc.get_property(name, atoms)
        assert isinstance(value, float)
        assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    # Energies alone are means over the atoms; the others have no contributions.
    assert calculator.implemented_properties == [
        *names, CONTRIBUTIONS, "vibrational_energy_mev_per_atom_contributions",
    ]  # fmt: skip


def test_one_calculator_does_not_lend_its_properties_to_another(tiny_model):
    first = MatxferCalculator(tiny_model, [make_plugin(tiny_model)])
    second = MatxferCalculator(tiny_model)
    assert "vibrational_energy_mev_per_atom" in first.implemented_properties
    assert "vibrational_energy_mev_per_atom" not in second.implemented_properties


@pytest.mark.parametrize("atoms", [salt(), crooked(), bulk("Fe", a=2.87)], ids=str)
@pytest.mark.parametrize("name", [ENERGY, "vibrational_energy_mev_per_atom"])
def test_contributions_have_the_property_for_a_mean(name, atoms, calculator):
    atoms.calc = calculator
    parts = calculator.get_property(f"{name}_contributions", atoms)
    assert parts.shape == (len(atoms),)
    assert parts.mean() == pytest.approx(calculator.get_property(name, atoms), rel=1e-5, abs=1e-5)


def test_equivalent_atoms_contribute_equally(calculator):
    atoms = salt()
    parts = calculator.get_property(CONTRIBUTIONS, atoms)
    sodium = atoms.numbers == 11
    assert np.ptp(parts[sodium]) == np.ptp(parts[~sodium]) == 0
    assert abs(parts[sodium][0] - parts[~sodium][0]) > 1e-3
    apart = calculator.get_property(CONTRIBUTIONS, crooked())
    assert len(np.unique(apart.round(5))) == 4


def test_contributions_follow_the_order_of_the_atoms(calculator):
    rng = np.random.default_rng(0)
    for atoms in (crooked(), make_supercell(salt(), np.diag([2, 1, 1])), crooked() * (2, 1, 1)):
        order = rng.permutation(len(atoms))
        parts = calculator.get_property(CONTRIBUTIONS, atoms)
        permuted = calculator.get_property(CONTRIBUTIONS, atoms[order])
        np.testing.assert_allclose(permuted, parts[order], atol=1e-5)
    single = calculator.get_property(CONTRIBUTIONS, crooked())
    np.testing.assert_allclose(parts, np.tile(single, 2), atol=1e-5)


def test_results_are_kept_until_the_atoms_change(calculator, monkeypatch):
    built = []
    original = calculator_module.build_graph
    monkeypatch.setattr(
        calculator_module, "build_graph", lambda *a: built.append(1) or original(*a)
    )
    atoms = crooked()
    atoms.calc = calculator
    first = calculator.get_property(ENERGY, atoms)
    calculator.get_property("band_gap_ev", atoms)
    calculator.get_property(ENERGY, atoms)
    assert len(built) == 1
    parts = calculator.get_property(CONTRIBUTIONS, atoms)
    calculator.get_property(CONTRIBUTIONS, atoms)[:] = 0  # a copy: not what is kept
    assert len(built) == 2
    assert np.array_equal(calculator.get_property(CONTRIBUTIONS, atoms), parts)
    assert len(built) == 2

    atoms.positions[1] += 0.2
    assert calculator.get_property(ENERGY, atoms) != pytest.approx(first, abs=1e-6)
    moved = calculator.get_property(CONTRIBUTIONS, atoms)
    assert np.abs(moved - parts).max() > 1e-5
    assert moved.mean() == pytest.approx(calculator.get_property(ENERGY, atoms), abs=1e-5)
    atoms.numbers[0] = 3
    changed = calculator.get_property(ENERGY, atoms)
    assert changed == pytest.approx(
        predict(atoms, model=calculator.model)[ENERGY][0], rel=1e-5, abs=1e-6
    )


def test_pooled_plugins_have_no_contributions(tiny_model):
    plugin = make_plugin(tiny_model, "debye_temperature_k", readout="pooled")
    calculator = MatxferCalculator(tiny_model, [plugin])
    expected = predict(crooked(), plugin, model=tiny_model)["debye_temperature_k"][0]
    assert calculator.get_property("debye_temperature_k", crooked()) == pytest.approx(expected)
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property("debye_temperature_k_contributions", crooked())


def test_a_plugin_of_a_property_of_the_base(tiny_model, tiny_model_folder, tmp_path):
    plugin = make_plugin(tiny_model, ENERGY, depth=2)
    plugin.save(tmp_path / "mine")
    calculator = MatxferCalculator(tiny_model_folder, [tmp_path / "mine"])
    atoms = crooked()
    column = f"{ENERGY}__mine"
    expected = predict(atoms, plugin, model=tiny_model).iloc[0]
    for name in (ENERGY, column):
        value = calculator.get_property(name, atoms)
        assert value == pytest.approx(expected[name], rel=1e-5)
        parts = calculator.get_property(f"{name}_contributions", atoms)
        assert parts.mean() == pytest.approx(value, rel=1e-5, abs=1e-5)
    assert expected[ENERGY] != pytest.approx(expected[column], abs=0.1)


@pytest.mark.parametrize("name", ["forces", "energy", "stress", "band_gap_ev_contributions"])
def test_other_properties_are_not_implemented(name, calculator):
    atoms = salt()
    atoms.calc = calculator
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property(name, atoms)
    with pytest.raises(PropertyNotImplementedError, match=f"'{name}' is not predicted; there are"):
        calculator.calculate(atoms, [name])
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_forces()


def test_atoms_that_are_no_structure(calculator):
    atoms = salt()
    atoms.calc = calculator
    calculator.get_property(ENERGY, atoms)
    atoms.positions[1] = atoms.positions[0] + [0.05, 0, 0]
    with pytest.raises(CrystalError, match="overlap"):
        calculator.get_property(ENERGY, atoms)
    # The values of the good structure are not handed out for the bad one, nor lost for good.
    with pytest.raises(CrystalError, match="overlap"):
        calculator.get_property("band_gap_ev", atoms)
    assert np.isfinite(calculator.get_property(ENERGY, salt()))


def test_elements_that_the_model_never_saw(calculator):
    with pytest.raises(CrystalError, match="never seen the element"):
        calculator.get_property(ENERGY, bulk("U", "bcc", a=3.5))


def test_top_level_name(tiny_model):
    assert matxfer.MatxferCalculator is MatxferCalculator
    assert isinstance(tiny_model, matxfer.Model)
