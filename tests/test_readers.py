"""The readers against independent oracles: pymatgen, ASE and what was written into the files."""

from __future__ import annotations

import ast
import gzip
import json
import os
import shutil
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import ase.db
import ase.io
import moyopy
import numpy as np
import pandas as pd
import pytest
from gemmi import cif
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifParser, CifWriter
from pymatgen.io.vasp import Poscar

from matxfer.crystal import Crystal
from matxfer.readers import Entry, crystals_of_table, expand, load_table, read, read_file
from matxfer.readers.cif_careful import read_careful
from matxfer.readers.cif_fast import read_fast

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NACL = Crystal(
    np.eye(3) * 5.64,
    [11] * 4 + [17] * 4,
    [
        [0, 0, 0],
        [0, 0.5, 0.5],
        [0.5, 0, 0.5],
        [0.5, 0.5, 0],
        [0.5, 0.5, 0.5],
        [0.5, 0, 0],
        [0, 0.5, 0],
        [0, 0, 0.5],
    ],
)
TRICLINIC = Crystal(
    [[4.1, 0.2, 0.1], [0.3, 5.2, -0.4], [-0.7, 0.5, 6.3]],
    [26, 8, 8, 1],
    [[0.01, 0.02, 0.03], [0.4, 0.5, 0.6], [0.7, 0.2, 0.9], [0.15, 0.8, 0.35]],
)


def same(a: Crystal, b: Crystal, tolerance: float = 1e-4) -> None:
    """Assert equal cells (up to rotation), compositions and positions modulo the lattice."""
    np.testing.assert_allclose(
        a.lattice @ a.lattice.T, b.lattice @ b.lattice.T, atol=2e-4, rtol=1e-6
    )
    assert np.linalg.det(a.lattice) * np.linalg.det(b.lattice) > 0
    assert sorted(a.numbers) == sorted(b.numbers)
    delta = a.frac_coords[:, None] - b.frac_coords
    delta -= np.rint(delta)
    distance = np.abs(delta).max(axis=-1)
    distance[a.numbers[:, None] != b.numbers] = np.inf
    assert distance.min(axis=1).max() < tolerance
    assert distance.min(axis=0).max() < tolerance


def one(path: str | Path, **options: str) -> Crystal:
    entries = list(read_file(path, **options))
    assert [e.error for e in entries] == [None]
    crystal = entries[0].crystal
    assert crystal is not None
    assert crystal.id == entries[0].id
    return crystal


def failing(entry: Entry, source: object, frame: int, *words: str) -> None:
    """Assert an error that names the file, the frame, the fault and a remedy."""
    assert entry.crystal is None
    assert entry.error is not None
    assert (entry.source, entry.frame) == (str(source), frame)
    assert (entry.error.source, entry.error.frame) == (str(source), frame)
    assert entry.error.remedy
    message = str(entry.error)
    assert str(source) in message
    assert f"frame {frame}" in message
    for word in words:
        assert any(w in message.lower() for w in word.lower().split("|")), message


def cif_text(
    sites: str = "Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5",
    *,
    cell: str = "5.64 5.64 5.64 90 90 90",
    symmetry: str = "loop_\n_space_group_symop_operation_xyz\nx,y,z",
    columns: str = "label type_symbol fract_x fract_y fract_z",
    head: str = "",
    name: str = "NaCl",
) -> str:
    tags = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    values = "\n".join(f"_cell_{t} {v}" for t, v in zip(tags, cell.split(), strict=False))
    loop = "\n".join(f"_atom_site_{c}" for c in columns.split())
    return f"data_{name}\n{head}\n{values}\n{symmetry}\nloop_\n{loop}\n{sites}\n"


def block(text: str) -> cif.Block:
    return cif.read_string(text)[0]


FM3M = "_space_group_name_H-M_alt 'F m -3 m'"


# -- CIF: the two paths ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real_structures(shared_data: Path) -> list[Crystal]:
    table = load_table(
        shared_data / "mp_formation_energy.parquet",
        ["material_id", "lattice", "numbers", "frac_coords", "n_sites"],
    )
    table = table[table.n_sites <= 30].sample(420, random_state=7)
    return [e.crystal for e in crystals_of_table(table, "mp") if e.crystal is not None]


@pytest.mark.data
def test_fast_and_careful_paths_agree_on_real_structures(real_structures: list[Crystal]) -> None:
    systems, taken = set(), 0
    for i, crystal in enumerate(real_structures):
        structure = crystal.to_pymatgen()
        # Half as P1, half by symmetry; the careful path takes 5 ms, so not everything twice.
        if i % 3 == 0:
            text, expected = str(CifWriter(structure)), crystal
        else:
            writer = CifWriter(structure, symprec=0.01, refine_struct=True)
            text = str(writer)
            number = int(block(text).find_value("_symmetry_Int_Tables_number"))
            systems.add(np.searchsorted([2, 15, 74, 142, 167, 194, 230], number))
            expected = None
        fast = read_fast(block(text))
        careful = Crystal(*read_careful(block(text)))
        if expected is not None:
            same(careful, expected)
        if fast is None:
            continue
        taken += 1
        same(Crystal(*fast), careful)
        np.testing.assert_allclose(fast[0], careful.lattice, atol=1e-9)
    assert len(real_structures) >= 400
    assert systems == set(range(7))
    assert taken > 0.95 * len(real_structures)


@pytest.mark.data
def test_symmetrised_cif_keeps_the_crystal(real_structures: list[Crystal]) -> None:
    """The oracle is the structure that was written, not another CIF reader."""
    checked = 0
    for crystal in real_structures[:120]:
        structure = crystal.to_pymatgen()
        text = str(CifWriter(structure, symprec=0.01))
        found = read_fast(block(text))
        assert found is not None
        again = Crystal(*found)
        # The refined cell may be a multiple of the original one.
        assert again.n_sites % crystal.n_sites == 0 or crystal.n_sites % again.n_sites == 0
        volume = again.volume_angstrom3 / again.n_sites
        assert volume == pytest.approx(crystal.volume_angstrom3 / crystal.n_sites, rel=1e-3)
        assert _number(again) == int(block(text).find_value("_symmetry_Int_Tables_number"))
        assert again.formula == crystal.formula
        # Loose, because refining moves atoms by up to symprec.
        assert _shortest(again) == pytest.approx(_shortest(crystal), abs=0.05)
        checked += 1
    assert checked == 120


def _shortest(crystal: Crystal) -> float:
    """Return the shortest distance between atoms in Å, images within one cell included."""
    shifts = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)
    delta = crystal.frac_coords[:, None, None] - crystal.frac_coords[:, None] + shifts
    distance = np.linalg.norm(delta @ crystal.lattice, axis=-1)
    return distance[distance > 1e-6].min()


def _number(crystal: Crystal) -> int:
    cell = moyopy.Cell(
        crystal.lattice.tolist(), crystal.frac_coords.tolist(), crystal.numbers.tolist()
    )
    return moyopy.MoyoDataset(cell, symprec=0.01).number


@pytest.mark.parametrize(
    ("name", "formula", "number", "n_sites"),
    [
        ("Si", "Si", 227, 8),
        ("GaAs", "GaAs", 216, 8),
        ("NaCl", "NaCl", 225, 8),
        ("MgO", "MgO", 225, 8),
        ("CsCl", "CsCl", 221, 2),
        ("SrTiO3", "SrTiO3", 221, 5),
        ("TiO2_rutile", "TiO2", 136, 6),
        ("ZnO_wurtzite", "ZnO", 186, 4),
        ("Cu", "Cu", 225, 4),
        ("MoS2_2H", "MoS2", 194, 6),
    ],
)
def test_examples(repository: Path, name: str, formula: str, number: int, n_sites: int) -> None:
    path = repository / "datasets" / "examples" / f"{name}.cif"
    crystal = one(path)
    assert (crystal.id, crystal.n_sites) == (name, n_sites)
    assert crystal.to_pymatgen().reduced_formula == formula
    assert _number(crystal) == number
    fast = read_fast(cif.read(str(path))[0])
    assert fast is not None
    same(Crystal(*fast), Crystal(*read_careful(cif.read(str(path))[0])))


@pytest.mark.parametrize("writer", ["pymatgen", "symmetrised", "ase"])
def test_cif_written_by_others(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "a.cif"
    # Symmetrising would choose another cell for the triclinic one.
    for crystal in (NACL,) if writer == "symmetrised" else (NACL, TRICLINIC):
        if writer == "ase":
            ase.io.write(path, crystal.to_ase())
        else:
            symprec = 0.01 if writer == "symmetrised" else None
            path.write_text(str(CifWriter(crystal.to_pymatgen(), symprec=symprec)))
        same(one(path), crystal, 2e-4)


def test_rounded_special_positions_are_put_in_place() -> None:
    hexagonal = "_space_group_name_H-M_alt 'P 63/m m c'"
    operations = [op.as_xyz_str() for op in _operations("P6_3/mmc")]
    loop = "loop_\n_space_group_symop_operation_xyz\n" + "\n".join(f"'{o}'" for o in operations)
    for third, two_thirds in (("0.333", "0.667"), ("0.3333", "0.6667"), ("0.33333", "0.66667")):
        text = cif_text(
            f"Mg1 Mg {third} {two_thirds} 0.25",
            cell="3.21 3.21 5.21 90 90 120",
            symmetry=f"{hexagonal}\n{loop}",
        )
        found = read_fast(block(text))
        assert found is not None
        same(
            Crystal(*found),
            Crystal(found[0], [12, 12], [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]),
            1e-9,
        )


def _operations(symbol: str) -> list:
    from pymatgen.symmetry.groups import SpaceGroup

    return list(SpaceGroup(symbol).symmetry_ops)


@pytest.mark.parametrize("second", ["0 0.5 0.5", "0.02 0.01 0", "0.5 0.52 0.01"])
def test_fast_path_leaves_overlaps_to_the_careful_one(tmp_path: Path, second: str) -> None:
    """As a copy of the first site, near it, and near one of its images."""
    loop = "loop_\n_space_group_symop_operation_xyz\n" + "\n".join(
        f"'{o.as_xyz_str()}'" for o in _operations("Fm-3m")
    )
    text = cif_text(f"Na1 Na 0 0 0\nCl1 Cl {second}", symmetry=loop)
    assert read_fast(block(text)) is None
    path = tmp_path / "a.cif"
    path.write_text(text)
    failing(next(read_file(path)), path, 0, "overlap|disordered")


def test_rounded_sixths_in_p1_mean_the_fraction() -> None:
    found = read_fast(block(cif_text("Na1 Na 0.1667 0.6666 0.1668\nCl1 Cl 0.3333(2) 0.8333 0.33")))
    assert found is not None
    np.testing.assert_array_equal(found[2], [[1 / 6, 2 / 3, 0.1668], [0.3333, 5 / 6, 0.33]])


@pytest.mark.parametrize(
    ("change", "n_sites"),
    [
        ({"symmetry": FM3M}, 8),
        ({"symmetry": "_space_group_IT_number 225"}, 8),
        ({"symmetry": "_symmetry_space_group_name_Hall '-F 4 2 3'"}, 8),
        ({"symmetry": ""}, 2),
        ({"sites": "Na1 Na 0 0 0 ?\nCl1 Cl 0.5 0.5 0.5 1.0",
          "columns": "label type_symbol fract_x fract_y fract_z occupancy"}, 2),
        ({"sites": "NA1 NA 0 0 0\nCL1 CL 0.5 0.5 0.5"}, 2),
    ],
)  # fmt: skip
def test_careful_path_takes_over(change: dict[str, str], n_sites: int) -> None:
    text = cif_text(**change)
    assert read_fast(block(text)) is None
    _, numbers, _ = read_careful(block(text))
    assert sorted(numbers) == [11] * (n_sites // 2) + [17] * (n_sites // 2)


def test_dot_occupancy_is_full_and_deuterium_is_hydrogen() -> None:
    text = cif_text(
        "D1 D 0 0 0 .\nCl1 Cl1- 0.5 0.5 0.5 1.000(2)",
        columns="label type_symbol fract_x fract_y fract_z occupancy",
    )
    for found in (read_fast(block(text)), read_careful(block(text))):
        assert found is not None
        assert sorted(found[1]) == [1, 17]


def test_origin_choice_is_settled_by_the_formula_or_refused(tmp_path: Path) -> None:
    silicon = {"sites": "Si1 Si 0 0 0", "cell": "5.43 5.43 5.43 90 90 90",
               "symmetry": "_space_group_name_H-M_alt 'F d -3 m'"}  # fmt: skip
    declared = "_chemical_formula_sum Si\n_cell_formula_units_Z 8"
    assert len(read_careful(block(cif_text(**silicon, head=declared)))[1]) == 8
    path = tmp_path / "si.cif"
    path.write_text(cif_text(**silicon))
    failing(next(read_file(path)), path, 0, "origin", "symmetry operations")


def test_rhombohedral_axes_are_told_from_the_cell() -> None:
    symbol = "_space_group_name_H-M_alt 'R -3 m'"
    site = "Bi1 Bi 0.234 0.234 0.234"
    text = cif_text(site, cell="4.75 4.75 4.75 57.2 57.2 57.2", symmetry=symbol)
    assert len(read_careful(block(text))[1]) == 2
    text = cif_text("Bi1 Bi 0 0 0.234", cell="4.55 4.55 11.86 90 90 120", symmetry=symbol)
    assert len(read_careful(block(text))[1]) == 6


def test_cif_in_the_style_of_a_refinement(tmp_path: Path) -> None:
    """Uncertainties, free text, other loops, capital tags and line ends of another system."""
    operations = "\n".join(f"'{o.as_xyz_str()}'" for o in _operations("Fm-3m"))
    text = (
        cif_text(
            "Na1 Na1+ 0 0 0 1.000(3) 0.01\nCl1 Cl1- 0.5 0.5 0.5 1 0.02",
            cell="5.6402(2) 5.6402(2) 5.6402(2) 90 90 90.",
            symmetry=f"{FM3M}\nloop_\n_symmetry_equiv_pos_site_id\n_symmetry_equiv_pos_as_xyz\n"
            + "\n".join(f"{i} {o}" for i, o in enumerate(operations.splitlines(), 1)),
            columns="label type_symbol fract_x fract_y fract_z occupancy U_iso_or_equiv",
            head="_publ_author_name 'Müller, F.'\n_publ_section_title\n;\n a 'title'\n;\n"
            "_chemical_formula_sum 'Cl Na'\n_cell_formula_units_Z 4",
        )
        + "loop_\n_atom_site_aniso_label\n_atom_site_aniso_U_11\nNa1 0.01\nCl1 0.02\n"
    )
    text = text.replace("_cell_length_a", "_Cell_Length_A").replace("\n", "\r\n")
    assert read_fast(block(text)) is not None
    path = tmp_path / "a.cif"
    path.write_bytes(text.encode("latin-1"))
    crystal = one(path)
    assert crystal.n_sites == 8
    assert crystal.lattice[0, 0] == pytest.approx(5.6402)
    same(Crystal(*read_careful(block(text))), crystal)


def test_ase_cif_with_a_space_group(tmp_path: Path) -> None:
    from ase.spacegroup import crystal as build

    atoms = build(
        ("Na", "Cl"), [(0, 0, 0), (0.5, 0.5, 0.5)], spacegroup=225, cellpar=[5.64] * 3 + [90] * 3
    )
    ase.io.write(tmp_path / "a.cif", atoms)
    same(one(tmp_path / "a.cif"), NACL)


def test_magnetic_cif_is_read_by_its_magnetic_group() -> None:
    text = cif_text(
        "Mn1 Mn 0 0 0\nO1 O 0.5 0.5 0.5",
        symmetry="loop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\nx+1/2,y+1/2,z,-1\n"
        "loop_\n_atom_site_moment_label\n_atom_site_moment_crystalaxis_x\n"
        "_atom_site_moment_crystalaxis_y\n_atom_site_moment_crystalaxis_z\nMn1 0 0 3.0\n"
        "loop_\n_space_group_symop_operation_xyz\nx,y,z",
    )
    assert read_fast(block(text)) is None
    assert sorted(read_careful(block(text))[1]) == [8, 8, 25, 25]
    moments_only = cif_text(
        symmetry=f"{FM3M}\nloop_\n_atom_site_moment.label\n_atom_site_moment.crystalaxis_x\nNa1 1"
    )
    assert len(read_careful(block(moments_only))[1]) == 8


def test_blocks_of_a_cif(tmp_path: Path) -> None:
    path = tmp_path / "many.cif"
    path.write_text(
        "data_global\n_publ_section_title 'x'\n"
        + cif_text(name="a")
        + cif_text("Na1 Na 0 0 0\nCl1 Cl ? 0.5 0.5", name="bad")
        + cif_text("K1 K 0 0 0\nCl1 Cl 0.5 0.5 0.5", name="c")
    )
    entries = list(read_file(path))
    assert [(e.frame, e.id) for e in entries] == [(1, "many:a"), (2, "many:bad"), (3, "many:c")]
    failing(entries[1], path, 2, "missing coordinates", "Cl1")
    assert entries[2].crystal is not None
    assert sorted(entries[2].crystal.numbers) == [17, 19]
    path.write_text("data_global\n_a 1\ndata_more\n_b 2\n")
    (entry,) = read_file(path)
    failing(entry, path, 0, "missing coordinates")


def test_a_cif_with_bad_syntax_is_repaired_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.cif"
    path.write_text(cif_text(head="_symmetry_space_group_name_H-M P 1"))
    assert one(path).n_sites == 2
    path.write_text("hello, this is not a CIF file")
    failing(next(read_file(path)), path, 0, "CIF")


OCCUPIED = "label type_symbol fract_x fract_y fract_z occupancy"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": "Na1 Na 0 0 0 0.5\nCl1 Cl 0.5 0.5 0.5 1", "columns": OCCUPIED},
         ["disordered", "Na1"]),
        ({"sites": "Na1 Na 0 0 0 0.5\nK1 K 0 0 0 0.5", "columns": OCCUPIED}, ["disordered"]),
        ({"sites": "Na1 Na 0 0 0\nCl1 Cl . 0.5 0.5"}, ["missing coordinates", "Cl1"]),
        ({"sites": "Na1 Na 0 0\nCl1 Cl 0.5 0.5", "columns": "label type_symbol fract_x fract_y"},
         ["missing coordinates", "_atom_site_fract_z"]),
        ({"sites": "Na1 Na 0 0 0", "columns": "label type_symbol Cartn_x Cartn_y Cartn_z"},
         ["missing coordinates", "Cartesian"]),
        ({"cell": "5.64 5.64"}, ["unit cell"]),
        ({"cell": "5.64 5.64 0 90 90 90"}, ["volume"]),
        ({"cell": "5.64 5.64 5.64 30 30 170"}, ["volume"]),
        ({"sites": "X1 X 0 0 0\nCl1 Cl 0.5 0.5 0.5"}, ["unknown species", "X"]),
        ({"sites": "Qq1 0 0 0", "columns": "label fract_x fract_y fract_z"}, ["unknown species"]),
        ({"sites": "CA1 0 0 0", "columns": "label fract_x fract_y fract_z"},
         ["unknown species", "CA1"]),
        ({"sites": "Na1 Na 0 0 0\nNa2 Na 0 0 0"}, []),
        ({"sites": "Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5\nNa2 Na 0 0.5 0.5", "symmetry": FM3M},
         ["overlap", "once"]),
        ({"sites": "Na1 Na 0 0 0\nCl1 Cl 0.02 0.01 0", "symmetry": FM3M}, ["overlap"]),
        ({"symmetry": "_space_group_name_H-M_alt 'F o o'"}, ["space group", "F o o"]),
        ({"symmetry": FM3M + "\n_space_group_IT_number 221"}, ["space group", "221"]),
        ({"head": "_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z 4"}, ["formula", "Z = 4"]),
        ({"head": "_chemical_formula_sum 'Na Cl H2'"}, ["formula", "hydrogen"]),
        ({"sites": "O1 O 0 0 0 2",
          "columns": "label type_symbol fract_x fract_y fract_z attached_hydrogens"},
         ["hydrogen"]),
        ({"sites": "Na1 Na 0 0 0 4\nCl1 Cl 0.5 0.5 0.5 4",
          "columns": "label type_symbol fract_x fract_y fract_z symmetry_multiplicity"},
         ["multiplicities", "symmetry operations"]),
    ],
)  # fmt: skip
def test_bad_cif(tmp_path: Path, change: dict[str, str], words: list[str]) -> None:
    path = tmp_path / "bad.cif"
    path.write_text(cif_text(**change))
    entries = list(read_file(path))
    if change.get("sites", "").endswith("Na2 Na 0 0 0"):
        # P1 positions are compared where distances are computed, in the graph.
        assert entries[0].crystal is not None
        assert entries[0].crystal.n_sites == 2
        return
    assert len(entries) == 1
    failing(entries[0], path, 0, *words)


# -- other formats -----------------------------------------------------------------------------
def _write(path: Path, crystal: Crystal) -> None:
    structure = crystal.to_pymatgen()
    name = path.name
    if name.endswith(".json"):
        path.write_text(json.dumps(structure.as_dict()))
    elif name.endswith(".gz"):
        plain = path.with_suffix("")
        _write(plain, crystal)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif "POSCAR" in name or name.endswith(".vasp"):
        Poscar(structure).write_file(path)
    elif name.endswith(".cif"):
        path.write_text(str(CifWriter(structure)))
    else:
        kind = {".xyz": "extxyz", ".pwi": "espresso-in", ".cell": "castep-cell"}.get(path.suffix)
        kind = {"XDATCAR": "vasp-xdatcar"}.get(name, kind)
        atoms = crystal.to_ase()
        options = (
            {"pseudopotentials": dict.fromkeys(atoms.symbols, "x")} if kind == "espresso-in" else {}
        )
        ase.io.write(path, atoms, format=kind, **options)


@pytest.mark.parametrize(
    "name",
    [
        "a.cif", "a.cif.gz", "POSCAR", "POSCAR_1", "a.vasp", "a.vasp.gz", "a.xyz", "a.extxyz",
        "a.xyz.gz", "a.json", "a.json.gz", "a.db", "a.traj", "a.xsf", "a.gen", "a.res", "a.pwi",
        "a.cfg", "XDATCAR",
    ],
)  # fmt: skip
def test_round_trip(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    _write(path, TRICLINIC)
    crystal = one(path)
    assert crystal.pbc == (True, True, True)
    same(crystal, TRICLINIC)


def test_selective_dynamics_cartesian_and_potcar_names(tmp_path: Path) -> None:
    atoms = NACL.to_ase()
    from ase.constraints import FixAtoms

    atoms.set_constraint(FixAtoms([0, 3]))
    path = tmp_path / "CONTCAR"
    ase.io.write(path, atoms, format="vasp", direct=False)
    text = path.read_text().replace("Na  Cl", "Na_pv/6a2f546d Cl_h", 1)
    lines = text.splitlines()
    lines[5] = "Na_pv/6a2f546d Cl_h"
    path.write_text("\n".join(lines) + "\n")
    crystal = one(path)
    same(crystal, NACL)
    assert crystal.id == tmp_path.name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (None, ["line of elements", "line 6"]),
        ("Foo Bar", ["unknown species", "Foo"]),
        ("Na", ["1 species"]),
    ],
)  # fmt: skip
def test_bad_poscar(tmp_path: Path, line: str | None, words: list[str]) -> None:
    path = tmp_path / "POSCAR"
    Poscar(NACL.to_pymatgen()).write_file(path)
    lines = path.read_text().splitlines()
    lines[5:6] = [] if line is None else [line]
    path.write_text("\n".join(lines))
    failing(next(read_file(path)), path, 0, *words)


def test_xyz_streams_past_a_bad_frame(tmp_path: Path) -> None:
    path = tmp_path / "run.extxyz"
    atoms = [NACL.to_ase() for _ in range(4)]
    for i, frame in enumerate(atoms):
        frame.set_cell(frame.cell * (1 + 0.1 * i), scale_atoms=True)
    ase.io.write(path, atoms, format="extxyz")
    lines = path.read_text().splitlines(keepends=True)
    lines[13] = "Na 0.0 zero 0.0\n"
    path.write_text("".join(lines))
    entries = list(read_file(path))
    assert [(e.frame, e.id) for e in entries] == [(i, f"run:{i}") for i in range(4)]
    failing(entries[1], path, 1, "frame")
    for i in (0, 2, 3):
        assert entries[i].crystal.lattice[0, 0] == pytest.approx(5.64 * (1 + 0.1 * i))
    # A wrong number of atoms loses the next frame's beginning: the error says that it stops.
    lines[10] = "9\n"
    path.write_text("".join(lines))
    entries = list(read_file(path))
    assert entries[0].crystal is not None
    assert all(e.error for e in entries[1:])
    failing(entries[-1], path, len(entries) - 1, "later frames are not read")
    path.write_text("".join(lines[:7]))
    (entry,) = read_file(path)
    failing(entry, path, 0, "5 of 8 atoms")


def test_xyz_is_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "long.xyz"
    ase.io.write(path, [NACL.to_ase()] * 300, format="extxyz")
    assert next(iter(read_file(path))).id == "long:0"
    assert sum(1 for _ in read_file(path)) == 300


def test_xyz_without_lattice_is_a_molecule(tmp_path: Path) -> None:
    path = tmp_path / "water.xyz"
    path.write_text("3\n\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n")
    crystal = one(path)
    assert crystal.pbc == (False, False, False)
    np.testing.assert_allclose(crystal.cart_coords[1], [0.96, 0, 0], atol=1e-12)
    path.write_text("2\n\nO 0 0 0\nQq 0.96 0 0\n")
    failing(next(read_file(path)), path, 0)


def test_ase_database(tmp_path: Path) -> None:
    for name in ("a.db", "a.json"):
        path = tmp_path / name
        with ase.db.connect(path) as database:
            database.write(NACL.to_ase(), name="salt")
            database.write(ase.Atoms("X", cell=[3, 3, 3], pbc=True))
            database.write(TRICLINIC.to_ase())
        entries = list(read_file(path))
        assert [e.id for e in entries] == ["salt", "2", "3"]
        failing(entries[1], path, 1, "unknown species")
        same(entries[2].crystal, TRICLINIC)
    path = tmp_path / "fake.db"
    path.write_text("no database at all")
    failing(next(read_file(path)), path, 0, "database")
    assert path.read_text() == "no database at all"


def test_truncated_trajectory_says_that_it_stops(tmp_path: Path) -> None:
    path = tmp_path / "XDATCAR"
    ase.io.write(path, [NACL.to_ase()] * 3, format="vasp-xdatcar")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + "0 zero 0\n")
    entries = list(read_file(path))
    failing(entries[-1], path, len(entries) - 1, "cannot go on")


def test_pymatgen_json(tmp_path: Path) -> None:
    a, b = NACL.to_pymatgen().as_dict(), TRICLINIC.to_pymatgen().as_dict()
    disordered = Structure(Lattice.cubic(3), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]]).as_dict()
    dummy = Structure(Lattice.cubic(3), ["X"], [[0, 0, 0]]).as_dict()
    path = tmp_path / "s.json"
    shapes = {
        "entry": ({"structure": a, "energy": 1.0, "entry_id": "e"}, ["s"]),
        "list": ([a, {"structure": b, "entry_id": "e1"}], ["s:0", "e1"]),
        "mapping": ({"x": a, "y": {"structure": b}}, ["x", "y"]),
        "matbench": ({"index": ["mb-1", "mb-2"], "columns": ["structure", "e_form"],
                      "data": [[a, 0.1], [b, 0.2]]}, ["mb-1", "mb-2"]),
    }  # fmt: skip
    for content, ids in shapes.values():
        path.write_text(json.dumps(content))
        entries = list(read_file(path))
        assert [e.id for e in entries] == ids
        same(entries[0].crystal, NACL)
        if len(entries) == 2:
            same(entries[1].crystal, TRICLINIC)
    path.write_text(json.dumps([disordered, dummy, None, {"a": 1}, a]))
    entries = list(read_file(path))
    for i, words in enumerate(
        (["disordered"], ["unknown species", "'X'"], ["no structure"], ["its keys: a"])
    ):
        failing(entries[i], path, i, *words)
    same(entries[4].crystal, NACL)
    for text in ("{", "3", "[]", '{"a": 1}'):
        path.write_text(text)
        failing(next(read_file(path)), path, 0)


# -- tables ------------------------------------------------------------------------------------
def _arrays(crystals: list[Crystal], **columns: list) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "lattice": [c.lattice.ravel().tolist() for c in crystals],
            "numbers": [c.numbers.tolist() for c in crystals],
            "frac_coords": [c.frac_coords.ravel().tolist() for c in crystals],
            **columns,
        }
    )


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.csv.gz"])
def test_table_of_arrays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    table = _arrays([NACL, TRICLINIC, NACL], material_id=["007", "b", "c"], y=[1.0, 2.0, 3.0])
    table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
    entries = list(read_file(path))
    assert [(e.frame, e.id) for e in entries] == [(0, "007"), (1, "b"), (2, "c")]
    same(entries[0].crystal, NACL, 1e-12)
    same(entries[1].crystal, TRICLINIC, 1e-12)
    assert list(load_table(path, ["y"]).columns) == ["y"]
    with pytest.raises(ValueError, match=r"(?s)t\.(parquet|csv).*'nope'.*columns: .*lattice"):
        load_table(path, ["nope"])


@pytest.mark.data
def test_shared_table(shared_data: Path) -> None:
    path = shared_data / "matbench_phonons.parquet"
    table = pd.read_parquet(path)
    entries = list(read_file(path))
    assert [len(e.crystal) for e in entries] == table.n_sites.tolist()
    np.testing.assert_array_equal(entries[5].crystal.lattice.ravel(), table.lattice[5])


def test_table_rows_that_fail_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = _arrays([NACL] * 6, id=list("abcdef"))
    table.at[1, "lattice"] = None
    table.at[2, "frac_coords"] = [np.nan] + [0.0] * 23
    table.at[3, "lattice"] = [0.0] * 9
    table.at[4, "numbers"] = [0] * 8
    table.to_parquet(path)
    entries = list(read_file(path))
    assert [e.id for e in entries] == list("abcdef")
    assert [e.error is None for e in entries] == [True, False, False, False, False, True]
    failing(entries[1], path, 1, "missing lattice")
    failing(entries[2], path, 2, "missing or infinite coordinates")
    failing(entries[3], path, 3, "volume")
    failing(entries[4], path, 4, "unknown species")
    csv = tmp_path / "rows.csv"
    table = _arrays([NACL] * 3)
    table["lattice"] = ["[1, 2", None, json.dumps(NACL.lattice.tolist())]
    table.to_csv(csv, index=False)
    entries = list(read_file(csv))
    failing(entries[0], csv, 0, "lattice", "JSON")
    failing(entries[1], csv, 1, "missing lattice")
    same(entries[2].crystal, NACL, 1e-12)


def test_table_of_texts_paths_and_structures(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "cifs").mkdir(parents=True)
    _write(folder / "cifs" / "a.cif", NACL)
    (folder / "cifs" / "bad.cif").write_text(cif_text("Na1 Na 0 0 0 0.5", columns=OCCUPIED))
    text = (folder / "cifs" / "a.cif").read_text()
    structure = json.dumps(NACL.to_pymatgen().as_dict())
    cells = {
        "cif": [text, cif_text("Na1 Na ? 0 0"), None],
        "structure": [structure, "{}", None],
        "path": ["cifs/a.cif", "cifs/bad.cif", "cifs/none.cif"],
    }
    for column, values in cells.items():
        for name, option in ((column, {}), ("mine", {"structure_column": "mine"})):
            path = folder / "table.csv"
            pd.DataFrame({name: values, "y": 1.0}).to_csv(path, index=False)
            entries = list(read_file(path, **option))
            assert [e.id for e in entries] == ["0", "1", "2"]
            same(entries[0].crystal, NACL)
            assert entries[0].crystal.id == "0"
            failing(entries[1], path, 1)
            failing(entries[2], path, 2)
        if column == "path":
            assert "bad.cif" in entries[1].error.reason
            assert "disordered" in entries[1].error.reason
            assert "no such file" in entries[2].error.reason


def test_frame_of_objects() -> None:
    """A frame in memory may hold what the user's own library makes; what it may not is told."""
    good = [NACL.to_pymatgen(), NACL.to_pymatgen().as_dict(), NACL.to_ase(), NACL.with_id("mine")]
    unknown = NACL.to_ase()
    unknown.numbers[0] = 0
    dummy = Structure(Lattice.cubic(3), ["X"], [[0, 0, 0]])
    frame = pd.DataFrame({"structure": [*good, unknown, dummy, 7]})
    entries = list(crystals_of_table(frame, "memory"))
    assert [entry.id for entry in entries] == list("0123456")
    for entry in entries[:4]:
        same(entry.crystal, NACL)
        assert entry.crystal.id == entry.id
    for entry, reason in zip(entries[4:], ("species|element|number", "'x'", "int"), strict=True):
        failing(entry, "memory", entry.frame, reason)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_table_without_structures_or_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(table: pd.DataFrame) -> None:
        table.to_csv(path, index=False) if name.endswith("csv") else table.to_parquet(path)

    write(pd.DataFrame({"formula": ["NaCl"], "y": [1.0]}))
    (entry,) = read_file(path)
    failing(entry, path, 0, "no structure columns", "formula, y", "--structure-column")
    (entry,) = read_file(path, structure_column="zzz")
    failing(entry, path, 0, "'zzz'", "formula, y")
    write(_arrays([]))
    (entry,) = read_file(path)
    failing(entry, path, 0, "no rows")
    path.write_text("")
    failing(next(read_file(path)), path, 0, "empty")
    if name.endswith("parquet"):
        path.write_text("not parquet")
        failing(next(read_file(path)), path, 0, "could not be read")


# -- paths -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["a.cif", "POSCAR", "a.xyz", "a.json", "a.db", "a.xsf", "a.traj", "a.csv", "a.parquet"]
)
@pytest.mark.parametrize("content", ["", " \n\n", "\x00\x01 garbage {", None])
def test_hopeless_files(tmp_path: Path, name: str, content: str | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    entries = list(read_file(path))
    assert len(entries) == 1
    failing(entries[0], path, 0, *(["no such file"] if content is None else []))
    if content == "":
        assert "empty" in str(entries[0].error)


def test_unsupported_suffix_lists_the_supported_ones(tmp_path: Path) -> None:
    for name in ("a.pckl", "a.pkl", "notes.txt", "a.cif.zst"):
        path = tmp_path / name
        path.write_text("x")
        failing(next(read_file(path)), path, 0, "not supported", ".cif", ".extxyz", "POSCAR")


def test_expand_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.cif", "a.cif", "sub/c.cif", "sub/POSCAR", "sub/.hidden.cif", ".git/x.cif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        _write(path, NACL)
    (tmp_path / "labels.csv").write_text("id,y\na,1\n")
    (tmp_path / "readme.md").write_text("x")
    found = [p.relative_to(tmp_path).as_posix() for p in expand([tmp_path])]
    assert found == ["a.cif", "b.cif", "sub/POSCAR", "sub/c.cif"]
    monkeypatch.chdir(tmp_path)
    assert [p.as_posix() for p in expand(["**/*.cif"])] == ["a.cif", "b.cif", "sub/c.cif"]
    inputs = ["b.cif", "gone.cif", "a*.cif", "nothing*.cif", "sub"]
    entries = list(read(inputs))
    assert [e.source for e in entries] == [
        "b.cif", "gone.cif", "a.cif", "nothing*.cif", "sub/POSCAR", "sub/c.cif",
    ]  # fmt: skip
    assert [e.error is None for e in entries] == [True, False, True, False, True, True]
    failing(entries[1], "gone.cif", 0, "no such file")
    failing(entries[3], "nothing*.cif", 0, "no such file")
    shutil.copy("a.cif", "a[1].cif")
    assert [e.source for e in read(["a[1].cif"])] == ["a[1].cif"]


def test_names_with_at_sign_are_plain_names(tmp_path: Path) -> None:
    for name in ("run@2.xsf", "run@2.xyz", "run@2.traj"):
        path = tmp_path / name
        _write(tmp_path / f"x{path.suffix}", TRICLINIC)
        (tmp_path / f"x{path.suffix}").rename(path)
        same(one(path), TRICLINIC)


def test_entry_holds_exactly_one() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Entry("a", 0, "a")
    with pytest.raises(ValueError, match="exactly one"):
        Entry("a", 0, "a", NACL, next(read_file("no-such.cif")).error)


def test_import_is_light(repository: Path) -> None:
    code = (
        "import sys, matxfer.readers\n"
        "print([m for m in ('torch', 'pandas', 'pymatgen', 'ase', 'pyarrow') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert ast.literal_eval(done.stdout) == []


def test_pymatgen_would_have_read_these_wrongly() -> None:
    """Why the careful path checks first: if pymatgen changes, these checks may go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dotted = CifParser.from_str(cif_text("Na1 Na 0 0 0\nCl1 Cl . 0.5 0.5")).parse_structures()
        unknown = CifParser.from_str(
            cif_text(symmetry="_space_group_name_H-M_alt 'F o o'")
        ).parse_structures()
    assert dotted[0][1].frac_coords[0] == 0.0
    assert len(unknown[0]) == 2
