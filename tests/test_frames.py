"""Frames: read from tables and extended XYZ, checked one by one and all together."""

from __future__ import annotations

import ase.io
import numpy as np
import pandas as pd
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from emt_frames import emt_frames, table_of

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.table import TableError
from matxfer.potential.consistency import check_references, check_units
from matxfer.potential.dataset import prepare
from matxfer.potential.frames import read_frames
from matxfer.potential.packed import PackedFrames
from matxfer.potential.work import compare, pairs_of

ENERGY, FORCES, STRESS = "energy_ev", "forces_ev_per_a", "stress_ev_per_a3"


@pytest.fixture(scope="module")
def atoms():
    return emt_frames(24)


@pytest.fixture(scope="module")
def frame(atoms):
    return table_of(atoms)


def scaled(frame, column, factor):
    """Return the table with a column in another unit."""
    other = frame.copy()
    other[column] = [np.asarray(v) * factor if np.ndim(v) else v * factor for v in frame[column]]
    return other


def same(frames, table):
    np.testing.assert_allclose(frames.energy_ev, table[ENERGY], rtol=1e-10)
    for found, told in zip(frames.forces_ev_per_a, table[FORCES], strict=True):
        np.testing.assert_allclose(found.ravel(), told, atol=1e-7)
    np.testing.assert_allclose(
        frames.stress_ev_per_a3.reshape(-1, 9), np.stack(table[STRESS]), atol=1e-8
    )


# -- reading ----------------------------------------------------------------------------------
def test_tables_and_extended_xyz_say_the_same(atoms, frame, tmp_path):
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    ase.io.write(tmp_path / "a.traj", atoms)
    frame.to_parquet(tmp_path / "a.parquet")
    text = frame.copy()
    for column in text.columns.drop(ENERGY):
        text[column] = [str(np.asarray(cell).tolist()) for cell in text[column]]
    text.to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.xyz", "a.traj", "a.parquet", "a.csv"):
        same(read_frames(tmp_path / name), frame)
    frames = read_frames(tmp_path / "a.xyz")
    assert frames.labels[0][1] == {ENERGY: "energy", FORCES: "forces", STRESS: "stress"}
    assert np.abs(np.stack(frame[STRESS])).max() > 0.01


def test_atoms_are_frames_without_a_file(atoms, frame):
    frames = read_frames(atoms)
    same(frames, frame)
    assert frames.name == "<atoms>"
    same(read_frames([*atoms[:4], *atoms[4:]][:7]), frame[:7])
    assert (read_frames(tuple(atoms)).split == frames.split).all()
    with pytest.raises(TableError, match="neither energies nor forces"):
        read_frames([a.copy() for a in atoms])  # a copy has no calculator


def test_marked_references_come_before_plain_results(atoms, frame, tmp_path):
    marked = []
    for a in atoms:
        copy = a.copy()
        copy.info["REF_energy"] = a.get_potential_energy()
        copy.arrays["REF_forces"] = a.get_forces()
        copy.info["virial"] = -a.get_stress(voigt=False) * a.get_volume()
        copy.calc = SinglePointCalculator(copy, energy=1.0, forces=np.ones((len(a), 3)))
        marked.append(copy)
    ase.io.write(tmp_path / "a.xyz", marked, format="extxyz")
    frames = read_frames(tmp_path / "a.xyz")
    assert frames.labels[0][1] == {ENERGY: "REF_energy", FORCES: "REF_forces", STRESS: "virial"}
    same(frames, frame)


def test_several_files_are_one_set(atoms, frame, tmp_path):
    ase.io.write(tmp_path / "a.xyz", atoms[:10], format="extxyz")
    frame[10:].to_parquet(tmp_path / "b.parquet")
    frames = read_frames([tmp_path / "a.xyz", tmp_path / "b.parquet"])
    same(frames, frame)
    assert frames.name == "a.xyz, b.parquet"
    assert frames.file.tolist() == [0] * 10 + [1] * 14
    assert set(frames.group.tolist()) == {"a.xyz", "b.parquet"}


def test_voigt_order_is_that_of_ase(frame):
    voigt = frame.copy()
    voigt[STRESS] = [np.asarray(s)[[0, 4, 8, 5, 2, 1]] for s in frame[STRESS]]
    same(read_frames(voigt), frame)


def test_what_was_not_calculated_may_be_missing(frame):
    frames = read_frames(frame.drop(columns=STRESS))
    assert np.isnan(frames.stress_ev_per_a3).all()
    assert np.isnan(read_frames(frame.drop(columns=ENERGY)).energy_ev).all()
    assert read_frames(frame.drop(columns=FORCES)).forces_ev_per_a == [None] * len(frame)
    empty = frame.astype({STRESS: object})
    empty.at[3, STRESS] = None
    frames = read_frames(empty)
    assert np.isnan(frames.stress_ev_per_a3[3]).all()
    assert isinstance(frames.crystals[3], Crystal)


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        (ENERGY, float("nan"), "no finite number"),
        (ENERGY, "low", "not numbers"),
        (FORCES, [1.0] * 5, "5 numbers, not 3 x 4"),
        (FORCES, [0.0] * 4 + [float("nan")] + [0.0] * 7, "force on atom 1"),
        (FORCES, "none", "not numbers"),
        (STRESS, [0.1] * 5, "5 numbers, not 9"),
        (STRESS, [float("inf")] + [0.0] * 8, "component"),
        (STRESS, [0.0, 0.5, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0], "symmetric"),
        ("numbers", [29, 29, 29, 400], "400"),
    ],
)
def test_a_bad_frame_is_told_and_the_others_are_read(column, cell, words, frame, tmp_path):
    bad = frame.copy().astype({column: object})
    bad.at[5, column] = cell
    frames = read_frames(bad)
    error = frames.crystals[5]
    assert isinstance(error, CrystalError)
    assert words in str(error)
    assert "frame 5" in str(error)
    assert error.remedy
    assert sum(isinstance(c, Crystal) for c in frames.crystals) == len(frame) - 1
    packed = PackedFrames.build(frames, 4.0)
    assert list(packed.errors) == [5]
    assert packed.split[5] == "failed"
    np.testing.assert_allclose(
        packed.batch(np.array([6])).forces_ev_per_a.ravel(), frame[FORCES][6], atol=1e-6
    )


def test_bad_frames_of_extended_xyz(atoms, tmp_path):
    ase.io.write(tmp_path / "a.xyz", atoms[:4], format="extxyz")
    blocks = (tmp_path / "a.xyz").read_text().split("\n4\n")
    blocks[1] = blocks[1].replace("Ni ", "Xx ")
    blocks[2] = blocks[2].replace("energy=", "energy=nan old_energy=", 1)
    blocks[2] = blocks[2].replace("free_old_energy", "old_energy")
    (tmp_path / "a.xyz").write_text("\n4\n".join(blocks))
    frames = read_frames(tmp_path / "a.xyz")
    assert [isinstance(c, Crystal) for c in frames.crystals] == [True, False, False, True]
    assert "a.xyz (frame 1)" in str(frames.crystals[1])
    assert "no finite number" in str(frames.crystals[2])


def test_files_without_frames(frame, tmp_path):
    (tmp_path / "empty.xyz").write_text("")
    frame[:0].to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "a.cif").write_text("data_x")
    for name, words in [
        ("empty.xyz", "no frames"),
        ("empty.parquet", "no frames"),
        ("a.cif", "extended XYZ"),
        ("missing.xyz", "no such file"),
        ("missing.parquet", "no such file"),
    ]:
        with pytest.raises(Exception, match=words) as caught:
            read_frames(tmp_path / name)
        assert isinstance(caught.value, TableError | CrystalError)
    with pytest.raises(TableError, match="neither energies nor forces"):
        read_frames(frame.drop(columns=[ENERGY, FORCES]))
    with pytest.raises(TableError, match="no files"):
        read_frames([])


def test_conditions_count_frames_in_the_file(atoms, frame, tmp_path):
    for k, a in enumerate(atoms):
        a.info["config_type"] = ("hot", "cold")[k % 2]
        a.info["number"] = k
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    frames = read_frames(tmp_path / "a.xyz", where={"config_type": ["cold"]})
    np.testing.assert_allclose(frames.energy_ev, frame[ENERGY][1::2])
    assert set(frames.group.tolist()) == {"cold"}
    assert len(read_frames(tmp_path / "a.xyz", where={"number": ["3", "4"]})) == 2
    with pytest.raises(TableError, match="'warm'"):
        read_frames(tmp_path / "a.xyz", where={"config_type": ["warm"]})
    bad = frame.assign(part=np.arange(len(frame)) % 2).astype({ENERGY: object})
    bad.at[7, ENERGY] = float("nan")
    frames = read_frames(bad, where={"part": [1]})
    assert frames.crystals[3].frame == 7


# -- splits -----------------------------------------------------------------------------------
def test_split_column_and_its_aliases(frame):
    words = ["training"] * 16 + ["Valid"] * 4 + ["test"] * 3 + ["unused"]
    frames = read_frames(frame.assign(part=words), split_column="part")
    assert frames.split.tolist() == ["train"] * 16 + ["val"] * 4 + ["test"] * 3 + ["unused"]
    no_val = read_frames(frame.assign(part=["train"] * 20 + ["test"] * 4), split_column="part")
    assert (no_val.split == "val").sum() == 2
    assert (no_val.split[20:] == "test").all()
    with pytest.raises(TableError, match="holds none of"):
        read_frames(frame.assign(part="x"), split_column="part")
    with pytest.raises(TableError, match="no column 'part'"):
        read_frames(frame, split_column="part")


def test_random_split_keeps_equal_frames_together(frame):
    twice = pd.concat([frame, frame]).reset_index(drop=True)
    frames = read_frames(twice, seed=3)
    assert (frames.split[:24] == frames.split[24:]).all()
    assert len(set(frames.split.tolist())) == 3
    assert (read_frames(twice, seed=4).split != frames.split).any()


def test_copies_in_two_parts_are_told(frame, small_potential):
    part = np.array(["train"] * 18 + ["val"] * 3 + ["test"] * 3)
    twice = frame.assign(part=part)
    twice.loc[23, list(frame.columns)] = frame.loc[0]
    with pytest.warns(UserWarning, match="of test hold materials of an earlier part"):
        data = prepare(twice, small_potential, trained=False, split_column="part")
    assert data.facts()["leak"]["test"] == 1


def test_too_few_frames_for_a_split(frame, small_potential):
    with pytest.raises(TableError, match="part 'val'"):
        prepare(frame[:2], small_potential, trained=False)


# -- units ------------------------------------------------------------------------------------
def findings(frame):
    return check_units(read_frames(frame)) + check_references(read_frames(frame))


def test_consistent_frames_raise_no_alarm(frame):
    assert findings(frame) == []
    work = compare(pairs_of(read_frames(frame), np.arange(24)))
    assert work.pairs >= 8
    assert work.forces == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("column", "factor", "words"),
    [
        (ENERGY, 1 / 27.2114, "hartree"),
        (ENERGY, 2 / 27.2114, "rydberg"),
        (ENERGY, 23.0605, "kcal/mol"),
        (ENERGY, 1 / 4, "energies per atom"),
        (FORCES, 1 / 51.4221, "hartree/bohr"),
        (FORCES, -1, "other sign"),
        (STRESS, 160.2177, "GPa"),
        (STRESS, -1602.177, "kbar"),
        (STRESS, -1, "other sign"),
    ],
)
def test_other_units_are_found(column, factor, words, frame):
    (finding,) = findings(scaled(frame, column, factor))
    assert finding.certain
    assert words in finding.message
    assert column in finding.message


def test_energies_per_atom_of_cells_of_two_sizes():
    frames = emt_frames(12) + emt_frames(12, seed=1, repeat=2)
    table = table_of(frames)
    assert findings(table) == []
    table[ENERGY] = table[ENERGY] / [len(a) for a in frames]
    (finding,) = findings(table)
    assert finding.certain
    assert "per atom" in finding.message
    # Without forces they are seen from their sizes, far from zero as those of DFT are.
    table = table_of(frames).drop(columns=FORCES)
    table[ENERGY] -= np.array([4.0 * len(a) for a in frames])
    assert findings(table) == []
    table[ENERGY] /= [len(a) for a in frames]
    (finding,) = findings(table)
    assert finding.certain


def test_a_file_in_other_units_is_named(frame, tmp_path):
    frame.to_parquet(tmp_path / "right.parquet")
    scaled(frame, FORCES, -1).to_parquet(tmp_path / "wrong.parquet")
    found = check_units(read_frames([tmp_path / "right.parquet", tmp_path / "wrong.parquet"]))
    assert [f.message.split(":")[0] for f in found] == ["wrong.parquet"]


def test_wrong_units_end_a_training_before_it_begins(frame, small_potential):
    wrong = scaled(frame, ENERGY, 1 / 27.2114)
    with pytest.raises(TableError, match=r"hartree.*--no-check"):
        prepare(wrong, small_potential, trained=False)
    with pytest.warns(UserWarning, match="hartree"):
        data = prepare(wrong, small_potential, trained=False, check=False)
    assert data.facts()["findings"][0]["kind"] == "units"


def test_forces_of_another_calculation_are_suspected(frame):
    (finding,) = findings(scaled(frame, FORCES, 3.0))
    assert finding.kind == "work"
    assert not finding.certain


def test_offset_of_stress():
    """Strained cells at rest, with a pressure of 3.2 GPa that the energies know nothing of."""
    frames = emt_frames(40, ("Cu",))
    for a in frames:
        a.set_scaled_positions(np.round(a.get_scaled_positions() * 2) / 2)
    table = table_of(frames)
    assert findings(table) == []
    table[STRESS] = [np.asarray(s) + 0.02 * np.eye(3).ravel() for s in table[STRESS]]
    (finding,) = findings(table)
    assert finding.kind == "stress_offset"
    assert finding.figures["pressure_ev_per_a3"] == pytest.approx(-0.02, rel=0.1)


# -- references -------------------------------------------------------------------------------
def test_a_file_with_another_reference_is_found(frame, tmp_path):
    other = frame[:10].assign(energy_ev=frame[ENERGY][:10] - 4 * 3.0)
    frame[10:].to_parquet(tmp_path / "a.parquet")
    other.to_parquet(tmp_path / "b.parquet")
    frames = read_frames([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert check_units(frames) == []
    found = check_references(frames)
    assert {f.kind for f in found} == {"references"}
    told = next(f for f in found if "'b.parquet'" in f.message)
    assert told.figures["offset_ev_per_atom"] == pytest.approx(-3.0, abs=0.1)
    assert told.figures["frames"] == 10


def test_two_references_in_one_file_are_found(frame):
    mixed = frame.assign(energy_ev=frame[ENERGY] + 4 * 3.0 * (np.arange(24) % 4 == 0))
    (finding,) = check_references(read_frames(mixed))
    assert finding.figures["frames"] == 6
    assert finding.figures["offset_ev_per_atom"] == pytest.approx(3.0, abs=0.1)


def test_a_potential_makes_the_search_sharper(frame):
    """An offset of 0.3 eV/atom shows only when the structures have been accounted for."""
    told = frame.assign(
        energy_ev=frame[ENERGY] + 4 * 0.3 * (np.arange(24) % 4 == 0),
        group=np.where(np.arange(24) % 4 == 0, "old", "new"),
    )
    frames = read_frames(told)
    assert check_references(frames) == []
    found = check_references(frames, frame[ENERGY].to_numpy() / 4)
    assert {f.kind for f in found} == {"references"}


def test_isolated_atoms_are_no_other_reference(frame):
    frames = emt_frames(24)
    for a in frames[::4]:
        a.set_cell(a.cell * 2.5, scale_atoms=True)
        a.get_forces()
    assert check_references(read_frames(table_of(frames))) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mattersim_benchmark_efs", []),
        ("mlearn_efs", ["Cu", "Ni"]),
        ("nbmotaw_efs", []),
        ("lial_ef", []),
    ],
)
def test_real_tables_raise_no_false_alarm(name, expected, shared_data):
    path = shared_data / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"{name} is not among the shared tables")
    frames = read_frames(path)
    assert all(isinstance(c, Crystal) for c in frames.crystals)
    found = check_units(frames) + check_references(frames)
    assert [f.kind for f in found] == ["stress_offset"] * len(expected)
    assert [f.figures["formula"] for f in found] == expected
    card = {"Cu": -0.0152, "Ni": -0.0178}  # eV/Å³, of the table's card
    for f in found:
        offset = f.figures["pressure_ev_per_a3"]
        assert offset == pytest.approx(card[f.figures["formula"]], rel=0.1)
