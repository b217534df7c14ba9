"""Files that mean harm: nothing of them is run, nothing grows without bound, nothing hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import lru_cache
from typing import TYPE_CHECKING

import ase.io
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymatgen.io.cif import CifWriter

from matxfer.crystal import Crystal, CrystalError
from matxfer.neighbors import neighbor_list
from matxfer.pretraining.config import ConfigError, read_config
from matxfer.readers import read_file
from matxfer.readers.cif_fast import read_fast

if TYPE_CHECKING:
    from pathlib import Path

ROCK_SALT = Crystal(4 * (1 - np.eye(3)), [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])


def structure() -> dict:
    return ROCK_SALT.to_pymatgen().as_dict()


def error_of(path: Path) -> str:
    (entry,) = read_file(path)
    assert entry.error is not None
    assert entry.error.source == str(path)
    return str(entry.error)


# -- code -------------------------------------------------------------------------------------
def test_no_module_that_a_json_file_names_is_imported(tmp_path: Path) -> None:
    """Monty's decoder imports what @module says; pymatgen hands it the sites' properties."""
    (tmp_path / "canary_module.py").write_text("open('canary_was_here', 'w')\n")
    evil = {"@module": "canary_module", "@class": "Run", "command": "x"}
    document = structure()
    document["properties"] = {"a": evil}
    document["lattice"] |= {"@module": "canary_module", "@class": "Lattice", "properties": evil}
    for site in document["sites"]:
        site["properties"] = {"magmom": evil, "list": [evil]}
        site |= {"@module": "canary_module", "@class": "PeriodicSite"}
        site["species"][0] |= {"properties": evil, "@module": "canary_module"}
    (tmp_path / "a.json").write_text(json.dumps(document))
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "structure": document}))
    (tmp_path / "b.json").write_text(json.dumps(evil))
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from matxfer.readers import read_file\n"
        "for name in ('a.json', 'a.jsonl', 'b.json'):\n"
        "    for e in read_file(name): print(e.crystal and e.crystal.formula)\n"
        "assert 'canary_module' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["NaCl", "NaCl", "None"]
    assert not (tmp_path / "canary_was_here").exists()
    # The reason for the care: pymatgen alone would have imported it.
    code = (
        "import sys, json; sys.path.insert(0, '.')\n"
        "from pymatgen.core import Structure\n"
        "try: Structure.from_dict(json.load(open('a.json')))\n"
        "except Exception: pass\n"
        "print('canary_module' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_yaml_builds_no_objects_and_does_not_explode(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch canary']\nsources: []\n")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        read_config(path)
    levels = "\n".join(f"l{k}: &l{k} [{', '.join([f'*l{k - 1}'] * 10)}]" for k in range(1, 12))
    laughs = f"l0: &l0 [lol]\n{levels}\n"
    nested = "a: " + "[" * 5000 + "]" * 5000
    for text in (f"{laughs}name: *l11\nsources: *l11\n", f"{laughs}name: x\nsources: [*l11]\n",
                 f"{laughs}name: x\nsources: [{{table: x, targets: [y], max_sites: *l11}}]\n",
                 nested):  # fmt: skip
        path.write_text(text)
        started = time.process_time()
        with pytest.raises(ConfigError) as caught:
            read_config(path)
        assert time.process_time() - started < 5
        assert len(str(caught.value)) < 10_000


# -- JSON -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 200_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ("9" * 10_000, "no valid JSON"),
        ('{"lattice": 1, "lattice": 2, "sites": []}', "twice"),
        ("{}" * 3, "no valid JSON"),
        ("null", "no structure"),
        ('{"sites": [], "lattice": {}}', ""),
        ('{"sites": [{"species": 5}], "lattice": {"matrix": [[1e999]]}}', ""),
        ('{"ids": [1], "nextid": 2}', ""),
    ],
)
def test_json_tricks(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert word in error_of(path)


def test_numbers_beyond_measure_are_no_crystals(tmp_path: Path) -> None:
    for place, value in (("matrix", 1e300), ("matrix", 1e9), ("abc", 1e300), ("abc", float("nan")),
                         ("abc", 1e12)):  # fmt: skip
        document = structure()
        if place == "matrix":
            document["lattice"]["matrix"][2][0] = value
        else:
            document["sites"][1]["abc"][0] = value
        path = tmp_path / "a.json"
        path.write_text(json.dumps(document))
        assert error_of(path)


# -- cells ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lattice", "frac", "pbc", "word"),
    [
        ([[0, 2.8, 2.8], [2.8, 0, 2.8], [1e9, 2.8, 0]], [[0, 0, 0], [0.5] * 3], True, "degenerate"),
        ([[4.6, 0, 0], [9999, 4.6, 0], [0, 9999, 3]], [[0, 0, 0], [0.5] * 3], True, "degenerate"),
        (np.eye(3) * 0.2, [[0, 0, 0]], True, "overlapping"),
        (np.eye(3), np.random.default_rng(0).uniform(size=(40, 3)), True, "overlapping"),
        (np.eye(3) * 5, [[0, 0, 0], [2e6, 0, 0]], True, "far outside"),
        (np.eye(3), [[0, 0, 0], [3e5, 0, 0]], False, "apart"),
        (np.eye(3) * 5, [[0, 0, 0], [3e5, 0, 0]], (False, True, True), "apart"),
    ],
)  # fmt: skip
def test_cells_that_end_the_neighbour_search(lattice, frac, pbc, word) -> None:
    """Some of these end vesin 0.6 with a floating point exception, and the process with it."""
    with pytest.raises(CrystalError, match=word):
        Crystal(lattice, [26] * len(frac), frac, pbc)


@pytest.mark.parametrize("pbc", [True, False, (True, False, True)])
@pytest.mark.parametrize("cell", [(9000, 9000, 3), (9000, 0.9, 9000), (4000, 9000, 30)])
def test_vast_flat_cells_do_not_end_the_process(cell, pbc) -> None:
    """A division by zero in vesin 0.6; the pairs are known from the way they were placed."""
    frac = np.array([[0.1, 0.2, 0.3], [0.6, 0.7, 0.4], [0, 0, 0]])
    frac[2] = frac[0] + 0.4 * np.eye(3)[0] / cell[0]
    crystal = Crystal(np.diag(cell), [26, 8, 1], frac, pbc)
    receiver, sender, _, distance = neighbor_list(crystal, 0.5)
    assert list(zip(receiver, sender, strict=True)) == [(0, 2), (2, 0)]
    np.testing.assert_allclose(distance, 0.4, atol=1e-9)


def test_atoms_far_outside_of_a_periodic_cell_take_no_time() -> None:
    frac = [[0, 0, 0], [95_000, 400_000.5, 0.5]]
    started = time.process_time()
    *_, distance = neighbor_list(Crystal(4 * np.eye(3), [26, 8], frac), 3.0)
    assert time.process_time() - started < 5
    np.testing.assert_allclose(distance, [2 * 2**0.5] * 8, atol=1e-6)


def test_random_cells_take_no_time_or_are_refused() -> None:
    rng = np.random.default_rng(0)
    kept = 0
    started = time.process_time()
    for k in range(150):
        lattice = rng.normal(size=(3, 3)) * 10 ** rng.uniform(0, 3.9, (3, 1))
        if k % 2:
            lattice[2] = rng.normal(size=2) @ lattice[:2]  # nearly in the plane of the others
            lattice[2] += rng.normal(size=3) * 10 ** rng.uniform(-3, 0)
        try:
            crystal = Crystal(lattice, [26, 8], [[0, 0, 0], [0.4, 0.3, 0.2]])
        except CrystalError:
            continue
        kept += 1
        neighbor_list(crystal, 6.0)
    assert 50 < kept < 150
    assert time.process_time() - started < 40


def test_odd_but_real_cells_are_kept() -> None:
    long_ = Crystal([[3, 0, 0], [0, 3, 0], [0, 0, 900]], [26, 8], [[0, 0, 0], [0, 0, 0.5]])
    long_.check_distances()
    skewed = Crystal([[3, 0, 0], [300, 3, 0], [0, 0, 3]], [26], [[0, 0, 0]])
    skewed.check_distances()
    hydrogen = Crystal(np.eye(3) * 1.2, [1], [[0, 0, 0]])  # compressed beyond any experiment
    hydrogen.check_distances()
    molecule = Crystal(np.eye(3), [8] * 20, np.arange(60).reshape(20, 3), False)
    molecule.check_distances()


# -- CIF --------------------------------------------------------------------------------------
HEAD = """data_x
_cell_length_a {0}
_cell_length_b {0}
_cell_length_c {0}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
"""
ATOMS = """loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
"""
SITES = "Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5\n"
P1 = "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (HEAD.format(4) + "_cell_length_a 5\n" + P1 + ATOMS + SITES, "twice"),
        (HEAD.format(4) + P1 + ATOMS + SITES + ATOMS + SITES.replace("Na", "K"), "twice"),
        (HEAD.format(4) + P1 + "-x,-y,-z\n-x,y,z\n" + ATOMS + SITES, "no.* group"),
        (HEAD.format(4) + P1 + "y+11.2.32,-x,z\n" + ATOMS + SITES, "cannot be understood"),
        (HEAD.format(4) + P1 + ATOMS + "Na1 Na 0 0 0\nCl1 Cl 0.\u2717 0.5 0.5\n", ""),
        (HEAD.format(4) + P1 + ATOMS + SITES + "'\n", "no valid CIF"),
        (HEAD.format(4) + P1 + ATOMS + SITES * 5 + "Na1 Na 0", "no valid CIF"),
    ],
)
def test_cif_that_could_be_read_in_two_ways_is_refused(
    tmp_path: Path, text: str, word: str
) -> None:
    import re

    path = tmp_path / "a.cif"
    path.write_text(text, encoding="utf-8")
    assert re.search(word, error_of(path))
    plain = HEAD.format(4) + "_cell_length_a 4\n" + P1 + ATOMS + SITES
    path.write_text(plain)  # twice the same is no contradiction
    assert next(read_file(path)).error is None


def test_large_cif_take_time_in_proportion(tmp_path: Path) -> None:
    """Two thousand sites without operations (the careful path), and a bomb of symmetry."""
    grid = np.stack(np.meshgrid(*[np.arange(13) / 13] * 3), -1).reshape(-1, 3)[:2000]
    sites = "".join(f"Na{k} Na {x:.4f} {y:.4f} {z:.4f}\n" for k, (x, y, z) in enumerate(grid))
    path = tmp_path / "a.cif"
    path.write_text(HEAD.format(40) + ATOMS + sites)
    started = time.process_time()
    (entry,) = read_file(path)
    assert entry.crystal is not None
    assert entry.crystal.n_sites == 2000
    path.write_text(HEAD.format(40) + ATOMS + sites.replace(" Na ", " NA "))
    assert "too large" in error_of(path)
    from gemmi import SpaceGroup

    operations = "".join(f"{op.triplet()}\n" for op in SpaceGroup("F m -3 m").operations())
    text = HEAD.format(400) + "loop_\n_symmetry_equiv_pos_as_xyz\n" + operations + ATOMS + sites * 6
    path.write_text(text)
    assert "too large" in error_of(path)
    assert time.process_time() - started < 20


# -- xyz --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "99999999999\n\nNa 0 0 0\n",
        '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1000000000:pos:R:3\nNa 0 0 0\n',
        '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3000000\nNa 0 0 0\n',
        '1\nLattice="4 0 0 0 4 0 0 0 4 Properties=species:S:1:pos:R:3\nNa 0 0 0\x00\n',
        "1\n" + "[" * 100_000 + "\nNa 0 x 0\n",
    ],
)
def test_xyz_headers_that_lie(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text)
    started = time.process_time()
    assert error_of(path)
    assert time.process_time() - started < 5


# -- vasprun.xml ------------------------------------------------------------------------------
def test_xml_entities_do_not_multiply(tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    laughs = "".join(f'<!ENTITY l{k} "{f"&l{k - 1};" * 10}">' for k in range(1, 10))
    path.write_text(
        f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "lol">{laughs}]><modeling>&l9;</modeling>'
    )
    started = time.process_time()
    assert error_of(path)
    assert time.process_time() - started < 10
    secret = tmp_path / "secret"
    secret.write_text("TOP SECRET")
    path.write_text(
        f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "{secret.as_uri()}">]>'
        "<modeling>&e;</modeling>"
    )
    assert "SECRET" not in error_of(path)


# -- anything at all --------------------------------------------------------------------------
@lru_cache
def _seed(name: str) -> bytes:
    import io

    if name.endswith(".json"):
        return json.dumps(structure()).encode()
    if name.endswith(".cif"):
        return str(CifWriter(ROCK_SALT.to_pymatgen(), symprec=0.01)).encode()
    file = io.StringIO()
    ase.io.write(file, ROCK_SALT.to_ase(), format="vasp" if name == "POSCAR" else "extxyz")
    return file.getvalue().encode()


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[int, int, bytes]]:
    """Draw cuts: from where (in thousandths of the file), how long, and what comes instead."""
    words = st.sampled_from([b"", b"0", b"-1", b"nan", b"1e999", b"\n", b"loop_", b"?", b"'", b"[",
                             b"\xff", b"\x00", b"Na", b"x,y,z", b"0.25"])  # fmt: skip
    cut = st.tuples(
        st.integers(0, 999), st.integers(0, 12), st.one_of(words, st.binary(max_size=6))
    )
    return draw(st.lists(cut, min_size=1, max_size=4))


@pytest.mark.parametrize("name", ["a.cif", "POSCAR", "a.extxyz", "a.json", "a.jsonl", "a.cif.gz",
                                  "a.zip", "a.tar"])  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(cuts=changes())
def test_whatever_is_in_a_file_it_gives_crystals_or_errors(
    tmp_path: Path, name: str, cuts: list[tuple[int, int, bytes]]
) -> None:
    data = _seed(
        {"a.jsonl": "a.json"}.get(
            name, name if name in {"POSCAR", "a.extxyz", "a.json"} else "a.cif"
        )
    )
    for start, length, new in cuts:
        k = start * len(data) // 1000
        data = data[:k] + new + data[k + length :]
    path = tmp_path / name
    path.write_bytes(data)
    entries = list(read_file(path))
    assert entries
    for entry in entries:
        assert (entry.crystal is None) != (entry.error is None)
        if entry.error is not None:
            assert entry.error.remedy
            continue
        try:
            entry.crystal.check_distances()
        except CrystalError:
            continue
        if name == "a.cif":
            _same_as_gemmi(data.decode("utf-8-sig", "replace"), entry.crystal)


def _same_as_gemmi(text: str, ours: Crystal) -> None:
    """Compare with gemmi's own expansion, where gemmi reads the text and we took the fast path."""
    import gemmi
    from gemmi import cif

    try:
        block = cif.read_string(text, 0)[0]
    except ValueError:
        return
    if read_fast(block) is None:
        return
    small = gemmi.make_small_structure_from_block(block)
    sites = small.get_all_unit_cell_sites()
    assert sorted(site.element.atomic_number for site in sites) == sorted(ours.numbers.tolist())
    assert small.cell.volume == pytest.approx(ours.volume_angstrom3, rel=1e-4)
