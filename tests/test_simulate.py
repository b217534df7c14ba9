"""Simulating with the calculator: what it answers, ensembles, warnings; relaxing, dynamics."""

from __future__ import annotations

import json
import warnings

import ase.io
import numpy as np
import pandas as pd
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.lj import LennardJones
from ase.filters import FrechetCellFilter
from ase.mep import NEB
from ase.optimize import FIRE
from ase.vibrations import Vibrations
from typer.testing import CliRunner

from matxfer.calculator import MatxferCalculator
from matxfer.cli import app
from matxfer.crystal import CrystalError
from matxfer.dynamics import ENSEMBLES, MDOptions, UncertainError, UncertaintyStop, run_md
from matxfer.errors import ErrorKind, OptionError
from matxfer.files import FormatError
from matxfer.forcefield import DomainWarning
from matxfer.potential.model import potential_from
from matxfer.potential.plugin import load_potential_plugin
from matxfer.prediction import predict
from matxfer.relaxation import OPTIMIZERS, RelaxOptions, relax

MECHANICAL = {"energy", "free_energy", "forces", "stress", "energies"}


def salt(rattle=0.05):
    atoms = bulk("NaCl", "rocksalt", a=5.4, cubic=True)
    atoms.rattle(rattle, seed=3)
    return atoms


@pytest.fixture
def calculator(small_potential):
    return MatxferCalculator(small_potential)


@pytest.fixture
def ensemble(small_potential, small_potential_plugins):
    return MatxferCalculator(small_potential, small_potential_plugins)


# -- what the calculator answers --------------------------------------------------------------
def test_answers_of_a_potential(calculator, small_potential_folder):
    assert set(calculator.implemented_properties) == MECHANICAL
    atoms = salt()
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    assert isinstance(energy, float)
    assert energy == atoms.get_potential_energy(force_consistent=True)
    assert forces.shape == (8, 3)
    assert atoms.get_stress().shape == (6,)
    assert atoms.get_potential_energies().sum() == pytest.approx(energy)
    np.testing.assert_array_equal(
        atoms.get_stress(voigt=False)[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], atoms.get_stress()
    )
    for given in ({"model": small_potential_folder}, {"potential": str(small_potential_folder)}):
        other = MatxferCalculator(**given)
        assert other.get_property("energy", salt()) == energy
        assert other.model is None
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property("magmoms", atoms)
    with pytest.raises(OptionError, match="give one potential"):
        MatxferCalculator(small_potential_folder, potential=small_potential_folder)


def test_stress_is_for_periodic_cells(calculator):
    water = molecule("H2O", vacuum=5.0)
    for atoms in (molecule("H2O"), water):
        with pytest.raises(PropertyNotImplementedError, match="stress needs a periodic cell"):
            calculator.get_property("stress", atoms)
        assert np.isfinite(calculator.get_property("energy", atoms))
    water.pbc = True
    assert calculator.get_property("stress", water).any()


def test_one_search_serves_many_steps(small_potential):
    counts = {}
    for skin in (0.0, 0.8):
        calculator = MatxferCalculator(small_potential, skin_angstrom=skin)
        atoms = salt()
        rng = np.random.default_rng(0)
        for _ in range(10):
            atoms.positions += rng.normal(0, 0.01, (8, 3))
            calculator.get_property("forces", atoms)
        counts[skin] = calculator.forcefield.neighbours.searches
    assert counts == {0.0: 10, 0.8: 1}


def test_precision_is_an_option(small_potential):
    values = {
        dtype: MatxferCalculator(small_potential, dtype=dtype).get_property("forces", salt())
        for dtype in ("float32", "float64")
    }
    difference = np.abs(values["float32"] - values["float64"]).max()
    assert 0 < difference < 1e-5
    with pytest.raises(OptionError, match="dtype"):
        MatxferCalculator(small_potential, dtype="float16")


def test_properties_beside_a_potential(tiny_model, small_potential, small_potential_plugins):
    plugin = small_potential_plugins[0]
    calculators = [
        MatxferCalculator(tiny_model, potential=small_potential),
        MatxferCalculator(tiny_model, plugin=load_potential_plugin(plugin, small_potential)),
    ]
    atoms = Atoms("MgO", cell=4.2 * np.eye(3), scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.4]], pbc=1)
    expected = predict(atoms, model=tiny_model).iloc[0]
    energies = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DomainWarning)
        for calculator in calculators:
            assert set(calculator.implemented_properties) > MECHANICAL | {"band_gap_ev"}
            gap = calculator.get_property("band_gap_ev", atoms)
            assert gap == pytest.approx(expected["band_gap_ev"], rel=1e-5)
            assert "energy" not in calculator.results  # not asked for
            energies.append(calculator.get_property("energy", atoms))
            assert calculator.get_property("band_gap_ev", atoms) == gap
    assert abs(energies[0] - energies[1]) > 1e-4  # one is the plugin's


# -- ensembles --------------------------------------------------------------------------------
def test_an_ensemble_tells_mean_and_spread(ensemble, small_potential, small_potential_plugins):
    atoms = salt()
    singles = [MatxferCalculator(small_potential, plugin=f) for f in small_potential_plugins]
    assert "uncertainty" not in singles[0].implemented_properties
    for name in MECHANICAL:
        values = np.array([single.get_property(name, atoms) for single in singles])
        assert np.ptp(values, axis=0).max() > 1e-4
        found = ensemble.get_property(name, atoms)
        np.testing.assert_allclose(found, values.mean(axis=0), atol=1e-6)
    forces = np.array([single.get_property("forces", atoms) for single in singles])
    spread = np.sqrt(np.sum(np.var(forces, axis=0), axis=1))
    np.testing.assert_allclose(ensemble.get_property("forces_std", atoms), spread, rtol=1e-5)
    assert ensemble.get_property("uncertainty", atoms) == pytest.approx(spread.max(), rel=1e-5)


def test_a_run_ends_where_an_ensemble_disagrees(ensemble, calculator):
    atoms = salt()
    atoms.calc = ensemble
    now = ensemble.get_property("uncertainty", atoms)
    optimizer = FIRE(atoms, logfile=None)
    optimizer.attach(UncertaintyStop(atoms, 10 * now), interval=1)
    optimizer.run(fmax=1e-4, steps=3)
    assert optimizer.nsteps == 3
    optimizer.attach(UncertaintyStop(atoms, 1e-9), interval=1)
    with pytest.raises(UncertainError, match=r"disagree by .* on atom \d \((Na|Cl)\)"):
        optimizer.run(fmax=1e-4, steps=100)
    assert optimizer.nsteps <= 4
    atoms.calc = calculator
    with pytest.raises(OptionError, match="two or more plugins"):
        UncertaintyStop(atoms, 0.1)
    with pytest.raises(OptionError, match="must be positive"):
        UncertaintyStop(atoms, 0.0)


def test_plugins_of_another_potential(small_potential, small_potential_plugins):
    stranger = potential_from(None, small_potential.backbone.config())
    with pytest.raises(FormatError, match="trained on weights"):
        MatxferCalculator(stranger, small_potential_plugins)
    plugin = load_potential_plugin(small_potential_plugins[0], small_potential)
    with pytest.raises(FormatError, match="belongs to potential"):
        MatxferCalculator(stranger, plugin=plugin)


# -- the training domain ----------------------------------------------------------------------
def test_warnings_of_unlike_structures(small_potential, small_potential_plugins):
    calculator = MatxferCalculator(small_potential, plugin=small_potential_plugins[0])
    iron = bulk("FeO", "rocksalt", a=4.3)
    with pytest.warns(DomainWarning, match="not trained on O, Fe"):
        calculator.get_property("energy", iron)
    general = MatxferCalculator(small_potential)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iron.positions[0] += 0.01
        calculator.get_property("energy", iron)  # said once
        calculator.get_property("energy", salt())
        general.get_property("energy", iron)  # the general one knows them
        general.get_property("energy", Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]))
    close = Atoms("Si2", [[0, 0, 0], [0, 0, 0.59 * 2.22]])
    with pytest.warns(DomainWarning, match=r"at 0\.59 of the sum of their covalent radii"):
        general.get_property("energy", close)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close.positions[1, 2] = 1.2
        general.get_property("energy", close)
        fresh = MatxferCalculator(small_potential)
        close.positions[1, 2] = 0.61 * 2.22
        fresh.get_property("energy", close)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a.numbers.__setitem__(0, 92), "never seen the element.* U; "),
        (lambda a: a.numbers.__setitem__(0, 0), "unknown species"),
        (lambda a: a.positions.__setitem__(0, np.nan), "missing or infinite coordinates"),
        (lambda a: a.positions.__setitem__(1, a.positions[0]), "overlap"),
        (lambda a: a.__delitem__(range(8)), "no atoms"),
    ],
    ids=["element", "dummy", "nan", "overlap", "empty"],
)  # fmt: skip
def test_bad_input(spoil, words, calculator):
    good = salt()
    expected = calculator.get_property("energy", good)
    bad = salt()
    spoil(bad)
    with pytest.raises(CrystalError, match=words):
        calculator.get_property("energy", bad)
    with pytest.raises(CrystalError, match=words):  # and no left-over answer
        calculator.get_property("forces", bad)
    assert calculator.get_property("energy", good) == expected


# -- with ASE ---------------------------------------------------------------------------------
def test_a_perturbed_crystal_relaxes_with_its_cell(small_potential):
    """Down in energy, force and stress; random weights would have it fold up if it went on."""
    atoms = salt(0.1)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * np.eye(3, k=1)), scale_atoms=True)
    atoms.calc = MatxferCalculator(small_potential, dtype="float64")
    cell = FrechetCellFilter(atoms)
    trace = []
    optimizer = FIRE(cell, logfile=None)
    optimizer.attach(lambda: trace.append(atoms.get_potential_energy()))
    optimizer.run(fmax=1e-4, steps=12)
    assert trace[-1] < trace[0] - 1e-3
    assert (np.diff(trace) < 0).mean() > 0.8
    # The derivatives by the cell are those that the optimiser is given.
    strain, h = np.zeros((3, 3)), 1e-4
    strain[0, 1] = strain[1, 0] = h / 2
    energies = []
    for sign in (1, -1):
        other = atoms.copy()
        other.set_cell(atoms.cell.array @ (np.eye(3) + sign * strain), scale_atoms=True)
        energies.append(atoms.calc.get_property("energy", other))
    numeric = (energies[0] - energies[1]) / (2 * h) / atoms.get_volume()
    assert atoms.get_stress()[5] == pytest.approx(numeric, rel=1e-5, abs=1e-9)


def test_nudged_elastic_band(small_potential):
    ends = [salt(0.0), salt(0.0)]
    ends[1].positions[0] += [0.4, 0.3, 0.0]
    images = [ends[0], *(ends[0].copy() for _ in range(2)), ends[1]]
    calculator = MatxferCalculator(small_potential)
    for image in images:
        image.calc = calculator
    band = NEB(images, allow_shared_calculator=True, method="improvedtangent")
    band.interpolate()
    before = np.linalg.norm(band.get_forces())
    FIRE(band, logfile=None).run(fmax=1e-3, steps=10)
    assert np.linalg.norm(band.get_forces()) < before


def test_vibrations_of_a_molecule(small_potential, tmp_path):
    atoms = molecule("H2O")
    atoms.calc = MatxferCalculator(small_potential, dtype="float64")
    FIRE(atoms, logfile=None).run(fmax=1e-5, steps=400)
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"))
    vibrations.run()
    energies = np.sort(np.abs(vibrations.get_energies()))
    assert len(energies) == 9
    # Six of them move or turn the whole, which costs nothing.
    assert energies[5] < 0.02 * energies[-1]


def test_phonopy(small_potential):
    phonopy = pytest.importorskip("phonopy")
    from phonopy.structure.atoms import PhonopyAtoms

    unit = bulk("Si", "diamond", a=5.4)
    phonons = phonopy.Phonopy(
        PhonopyAtoms(unit.symbols, cell=unit.cell, scaled_positions=unit.get_scaled_positions()),
        np.diag([2, 2, 2]),
    )
    phonons.generate_displacements()
    calculator = MatxferCalculator(small_potential, dtype="float64")
    phonons.forces = [
        calculator.get_property("forces", Atoms(s.symbols, s.positions, cell=s.cell, pbc=True))
        for s in phonons.supercells_with_displacements
    ]
    phonons.produce_force_constants()
    phonons.run_qpoints([[0, 0, 0]])
    frequencies = np.sort(np.abs(phonons.get_qpoints_dict()["frequencies"][0]))
    # Three modes move the whole crystal; the other three are one, threefold.
    assert frequencies[2] < 0.05 * frequencies[3]
    np.testing.assert_allclose(frequencies[3:], frequencies[3], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Elastic strain-stress fits")  # random weights are no springs
def test_matcalc(small_potential):
    matcalc = pytest.importorskip("matcalc")
    from pymatgen.io.ase import AseAtomsAdaptor

    structure = AseAtomsAdaptor.get_structure(salt())
    calculator = MatxferCalculator(small_potential)
    found = matcalc.RelaxCalc(calculator, max_steps=20, fmax=0.1).calc(structure)
    assert np.isfinite(found["energy"])
    elastic = matcalc.ElasticityCalc(calculator, relax_structure=False).calc(structure)
    assert np.isfinite(elastic["bulk_modulus_vrh"])
    eos = matcalc.EOSCalc(calculator, relax_structure=False).calc(structure)
    assert np.isfinite(eos["bulk_modulus_bm"])


# -- relaxing ---------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_down(optimizer, calculator):
    atoms = salt()
    atoms.calc = calculator
    before = atoms.get_potential_energy()
    converged, steps = relax(atoms, RelaxOptions(0.02, 200, cell=False, optimizer=optimizer))
    assert converged
    assert 0 < steps < 200
    assert atoms.get_potential_energy() < before
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() <= 0.02


def test_pressure_and_cell_are_options(calculator):
    volumes = {}
    for cell, pressure in ((False, 0.0), (True, 0.0), (True, 20.0)):
        atoms = salt()
        atoms.calc = calculator
        relax(atoms, RelaxOptions(0.02, 10, cell, "fire", pressure))
        volumes[cell, pressure] = atoms.get_volume()
    assert volumes[False, 0.0] == pytest.approx(5.4**3)
    assert volumes[True, 0.0] != pytest.approx(5.4**3, rel=1e-3)
    assert volumes[True, 20.0] < 0.999 * volumes[True, 0.0]


@pytest.mark.parametrize(
    "options", [{"optimizer": "newton"}, {"fmax_ev_per_a": 0}, {"steps": 0},
                {"pressure_gpa": float("nan")}],
    ids=str,
)  # fmt: skip
def test_impossible_relaxations(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        RelaxOptions(**options)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_relax_command(small_potential_folder, tmp_path):
    good, bad, foreign = tmp_path / "a.extxyz", tmp_path / "b.cif", tmp_path / "c.extxyz"
    ase.io.write(good, [salt(), molecule("H2O")])
    bad.write_text("not a structure")
    ase.io.write(foreign, [bulk("U", "bcc", a=3.5)])
    out, table = tmp_path / "out.extxyz", tmp_path / "out.parquet"
    words = ("relax", good, bad, foreign, "-o", out, "--table", table, "--model",
             small_potential_folder, "--fmax", 0.05, "--steps", 60, "--no-cell")  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "2 of 4 structures" in result.output
    rows = pd.read_parquet(table)
    assert rows["error_kind"].tolist()[2:] == ["unreadable", "unknown_element"]
    assert rows["error_kind"].isna().tolist() == [True, True, False, False]
    assert "never seen the element(s) U" in rows["error"][3]
    assert str(foreign) in rows["error"][3]
    assert pd.isna(rows["volume_angstrom3"][1])  # a molecule
    frames = ase.io.read(out, ":")
    assert len(frames) == 2
    calculator = MatxferCalculator(small_potential_folder)
    for frame, (_, row) in zip(frames, rows.iterrows(), strict=False):
        # What is in the file is of the structure in the file.
        assert frame.get_potential_energy() == pytest.approx(row["energy_ev"], abs=1e-5)
        assert calculator.get_property("energy", frame) == pytest.approx(row["energy_ev"], abs=1e-4)
        assert np.abs(frame.get_forces()).max() <= row["largest_force_ev_per_a"] + 1e-6
        assert row["energy_change_ev_per_atom"] < 0
        assert row["converged"] == (row["steps"] < 60)
    assert frames[0].get_stress().shape == (6,)
    errors = pd.read_csv(tmp_path / "out.extxyz.errors.csv")
    assert errors["error_kind"].tolist() == ["unreadable", "unknown_element"]
    meta = json.loads((tmp_path / "out.extxyz.meta.json").read_text())
    assert meta["potentials"][0]["name"] == "small"
    assert meta["relax"]["steps"] == 60

    result = run("relax", bad, "-o", out, "--model", small_potential_folder)
    assert result.exit_code == 1
    ase.io.write(good, salt())
    volumes = []
    for flag in ("--cell", "--no-cell"):
        result = run(
            "relax", good, "-o", out, "--steps", 2, flag, "--model", small_potential_folder
        )
        assert result.exit_code == 0
        assert "1 of them not converged in 2 steps" in result.output
        volumes.append(ase.io.read(out).get_volume())
    assert volumes[1] == pytest.approx(5.4**3)
    assert volumes[0] != pytest.approx(5.4**3, rel=1e-5)


def test_relax_tells_of_each_structure_that_it_is_unlike_the_training(
    small_potential_folder, small_potential_plugins, tmp_path, recwarn
):
    given, table = tmp_path / "in.extxyz", tmp_path / "out.csv"
    iron = bulk("FeO", "rocksalt", a=4.3)
    ase.io.write(given, [iron, salt(), iron])
    words = ("--model", small_potential_folder, "--plugin", small_potential_plugins[0])
    out = tmp_path / "out.extxyz"
    result = run("relax", given, "-o", out, "--table", table, "--steps", 1, *words)
    assert result.exit_code == 0, result.output
    warned = pd.read_csv(table)["warning"]
    assert warned.isna().tolist() == [False, True, False]
    assert "not trained on O, Fe" in warned[2]
    assert not [w for w in recwarn if issubclass(w.category, DomainWarning)]


def test_relax_command_keeps_what_is_written_when_interrupted(
    small_potential_folder, tmp_path, monkeypatch
):
    import matxfer.relaxation as module

    original, calls = module._relaxed, []

    def interrupted(*words):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*words)

    monkeypatch.setattr(module, "_relaxed", interrupted)
    given, out, table = (tmp_path / n for n in ("in.extxyz", "out.extxyz", "out.csv"))
    ase.io.write(given, [salt(), salt()])
    result = run("relax", given, "-o", out, "--table", table, "--model", small_potential_folder,
                 "--steps", 2)  # fmt: skip
    assert result.exit_code == 130
    assert "out.extxyz.part" in result.output
    assert len(ase.io.read(tmp_path / "out.extxyz.part", ":", format="extxyz")) == 1
    assert len(pd.read_csv(table)) == 1


def test_wrong_words(small_potential_folder, small_potential_plugins, tmp_path):
    given = tmp_path / "in.extxyz"
    ase.io.write(given, [salt(), salt()])
    out = tmp_path / "out.extxyz"
    model = ("--model", small_potential_folder)
    for words, message in (
        (("relax", given, "-o", "out.csv", *model), "extxyz or .db"),
        (("relax", given, "-o", out, "--table", "t.db", *model), "the table is"),
        (("relax", given, "-o", out, "--model", "mp-small"), "not a potential"),
        (("md", given, "-o", "out.csv", *model), "extended XYZ"),
        (("md", given, "-o", out, *model), "--frame"),
        (("md", given, "-o", out, "--frame", 7, *model), "no structure 7"),
        (("md", given, "-o", out, "--frame", 1, "--supercell", "2,2", *model), "three whole"),
        (("md", given, "-o", out, "--frame", 1, "--ensemble", "nph", *model), "ensemble"),
        (("md", given, "-o", out, "--frame", 1, "--max-uncertainty", 1, *model), "two or more"),
    ):
        result = run(*words)
        assert result.exit_code != 0
        assert message in str(result.exception), words


# -- dynamics ---------------------------------------------------------------------------------
@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_ensembles_keep_what_they_should(ensemble, small_potential):
    atoms = salt(0.0) * (2, 1, 1)
    atoms.calc = MatxferCalculator(small_potential)
    relax(atoms, RelaxOptions(0.02, 100, cell=False))
    volume = atoms.get_volume()
    frames = []
    last = run_md(
        atoms,
        MDOptions(ensemble, 200, steps=60, damping_fs=20, interval=20, pressure_gpa=30),
        lambda facts: frames.append(dict(facts)),
    )
    assert [f["step"] for f in frames] == [0, 20, 40, 60]
    assert last == frames[-1]
    assert last["time_fs"] == 60
    total = [f["total_energy_ev"] for f in frames]
    assert (np.ptp(total) < 2e-3) == (ensemble == "nve")
    assert (atoms.get_volume() == volume) == (ensemble != "npt")
    if ensemble == "npt":
        assert atoms.get_volume() < volume  # 30 GPa press
    assert np.abs(atoms.get_momenta().sum(axis=0)).max() < 1e-6 or ensemble != "nve"


def test_velocities_are_thermal_and_seeded(calculator):
    atoms = salt(0.0) * (3, 3, 3)
    atoms.calc = calculator
    seen = []
    for seed in (0, 0, 1):
        copy = atoms.copy()
        copy.calc = calculator
        options = MDOptions("nve", 500, steps=1, interval=1, seed=seed)
        run_md(copy, options, lambda facts: seen.append(facts["temperature_k"]))
    assert seen[0] == seen[2] != seen[4]
    assert seen[0] == pytest.approx(500, rel=0.12)  # 648 degrees of freedom: 5.6 %


def test_npt_needs_a_crystal(calculator):
    atoms = molecule("H2O")
    atoms.calc = calculator
    with pytest.raises(OptionError, match="periodic in three directions"):
        run_md(atoms, MDOptions("npt"), lambda facts: None)
    atoms = bulk("Fe", "bcc", a=2.87)
    atoms.calc = calculator
    with pytest.raises(OptionError, match="one atom"):
        run_md(atoms, MDOptions("nvt"), lambda facts: None)
    for options in ({"ensemble": "nph"}, {"timestep_fs": 0}, {"temperature_k": -1}, {"seed": -1}):
        with pytest.raises(OptionError, match=next(iter(options))):
            MDOptions(**options)


def test_md_command(small_potential_folder, small_potential_plugins, tmp_path):
    given, out = tmp_path / "in.extxyz", tmp_path / "out.extxyz"
    ase.io.write(given, salt())
    plugins = [word for folder in small_potential_plugins for word in ("--plugin", folder)]
    model = ("--model", small_potential_folder)
    result = run("md", given, "-o", out, "--ensemble", "nve", "--steps", 10, "--interval", 5,
                 "--supercell", "2,1,1", *model, *plugins)  # fmt: skip
    assert result.exit_code == 0, result.output
    frames = ase.io.read(out, ":")
    assert [f.info["step"] for f in frames] == [0, 5, 10]
    assert len(frames[0]) == 16
    assert np.abs(frames[-1].get_momenta()).max() > 0
    assert frames[-1].info["uncertainty_ev_per_a"] > 0
    ensemble = MatxferCalculator(small_potential_folder, small_potential_plugins)
    expected = ensemble.get_property("forces", frames[-1])
    np.testing.assert_allclose(frames[-1].get_forces(), expected, atol=1e-4)
    meta = json.loads((tmp_path / "out.extxyz.meta.json").read_text())
    assert [p["name"] for p in meta["potentials"]] == ["own-0", "own-1", "own-2"]
    assert len({p["sha256"] for p in meta["potentials"]}) == 3

    result = run("md", given, "-o", out, "--max-uncertainty", 1e-9, *model, *plugins)
    assert result.exit_code == 3
    assert "stopped after step 0" in result.output
    assert len(ase.io.read(out, ":")) == 1  # the frame that it stopped at


@pytest.mark.parametrize(
    "option",
    [("--temperature", 600), ("--timestep-fs", 2), ("--seed", 1), ("--ensemble", "nve"),
     ("--damping-fs", 5), ("--pressure-gpa", 50), ("--supercell", "1,1,2"), ("--frame", 1),
     ("--dtype", "float64"), ("--model",), ("--plugin",)],
    ids=lambda option: option[0],
)  # fmt: skip
def test_every_option_of_md_counts(
    option, small_potential, small_potential_folder, small_potential_plugins, tmp_path
):
    given, other = tmp_path / "in.extxyz", tmp_path / "other"
    ase.io.write(given, [salt(), salt(0.08)])
    if option == ("--model",):
        stranger = potential_from(None, small_potential.backbone.config())
        stranger.elements = small_potential.elements
        stranger.save(other)
        option = ("--model", other)
    if option == ("--plugin",):
        option = ("--plugin", small_potential_plugins[0])
    ensemble = "npt" if option[0] == "--pressure-gpa" else "nvt"
    words = ["--frame", 0, "--ensemble", ensemble, "--model", small_potential_folder, "--steps", 4]
    found = []
    for k, more in enumerate(((), option)):
        out = tmp_path / f"{k}.extxyz"
        result = run("md", given, "-o", out, *words, "--interval", 2, *more)
        assert result.exit_code == 0, result.output
        found.append(ase.io.read(out, ":"))
    assert [f.info["step"] for f in found[1]] == [0, 2, 4]
    last, changed = (frames[-1] for frames in found)
    assert len(last) != len(changed) or (last.get_forces() != changed.get_forces()).any()


@pytest.mark.parametrize(
    "option", [("--fmax", 0.2), ("--optimizer", "bfgs"), ("--pressure-gpa", 20), ("--cell",),
               ("--dtype", "float64"), ("--steps", 3)],
    ids=lambda option: option[0],
)  # fmt: skip
def test_every_option_of_relax_counts(option, small_potential_folder, tmp_path):
    given = tmp_path / "in.extxyz"
    ase.io.write(given, salt())
    cell = "--cell" if option[0] == "--pressure-gpa" else "--no-cell"
    words = ("--model", small_potential_folder, "--steps", 8, cell)
    found = []
    for k, more in enumerate(((), option)):
        out = tmp_path / f"{k}.extxyz"
        assert run("relax", given, "-o", out, *words, *more).exit_code == 0
        found.append(ase.io.read(out))
    assert (found[0].get_forces() != found[1].get_forces()).any()


def test_md_command_keeps_frames_when_interrupted(small_potential_folder, tmp_path, monkeypatch):
    import matxfer.dynamics as module

    original = module._facts

    def interrupted(atoms, step, timestep_fs):
        if step == 4:
            raise KeyboardInterrupt
        return original(atoms, step, timestep_fs)

    monkeypatch.setattr(module, "_facts", interrupted)
    given, out = tmp_path / "in.extxyz", tmp_path / "out.extxyz"
    ase.io.write(given, salt())
    result = run("md", given, "-o", out, "--interval", 2, "--model", small_potential_folder)
    assert result.exit_code == 130
    assert [f.info["step"] for f in ase.io.read(out, ":")] == [0, 2]


@pytest.mark.parametrize("failure", [CrystalError("two atoms meet", "mend it"), ValueError("nan")])
def test_a_relaxation_that_goes_astray_is_told(failure):
    """What fails on the way is another reason than a structure that could not be used at all."""

    class Failing(LennardJones):
        evaluations = 0

        def calculate(self, *args, **kwargs):
            self.evaluations += 1
            if self.evaluations > 3:
                raise failure
            super().calculate(*args, **kwargs)

    atoms = Atoms("Ar2", [[0, 0, 0], [0, 0, 1.6]], cell=[9, 9, 9], pbc=True)
    atoms.calc = Failing()
    with pytest.raises(CrystalError, match=r"went astray after \d+ steps") as caught:
        relax(atoms, RelaxOptions(cell=False))
    assert caught.value.kind is ErrorKind.RELAXATION_FAILED
    assert str(failure) in str(caught.value)
