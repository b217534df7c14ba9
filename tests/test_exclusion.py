"""Materials of named tables are kept out of pretraining, by id and by composition."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core.composition import Composition
from pymatgen.core.structure import Structure

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.table import TableError
from matxfer.errors import OptionError
from matxfer.files import sha256
from matxfer.pretraining.config import ConfigError, read_config
from matxfer.pretraining.exclusion import (
    ExcludeConfig,
    Exclusions,
    read_exclusions,
    reduced_composition,
)
from matxfer.pretraining.sources import load_sources
from matxfer.readers import crystals_of_table, load_table

NA, CL, O, SI, TI = 11, 17, 8, 14, 22  # noqa: E741 - oxygen
ARRAYS = ["lattice", "numbers", "frac_coords"]


def crystal(numbers, name=""):
    """Return atoms in a row, far apart."""
    n = len(numbers)
    frac = np.stack([np.arange(n) / n, np.zeros(n), np.zeros(n)], axis=1)
    return Crystal(np.diag([3.0 * n, 4.0, 4.0]), numbers, frac, id=name)


def write(path, numbers, **columns):
    """Write a table of crystals, an empty structure where the numbers are None."""
    crystals = [None if z is None else crystal(z) for z in numbers]
    frame = pd.DataFrame(
        {name: [None if c is None else getattr(c, name).ravel() for c in crystals]
         for name in ARRAYS} | columns
    )  # fmt: skip
    frame.to_parquet(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a table of NaCl (test), SiO2 (train) and TiO2 (test)."""
    write(
        tmp_path / "task.parquet",
        [[NA, CL], [SI, O, O], [TI, O, O]],
        material_id=["mp-1", "mp-2", "mp-3"],
        split=["test", "train", "test"],
        number=[1, 2, 3],
    )
    return tmp_path


# -- composition ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([CL, NA], ((NA, 1), (CL, 1))),
        ([NA, CL] * 4, ((NA, 1), (CL, 1))),
        ([O, TI, O] * 3, ((O, 2), (TI, 1))),
        ([SI] * 8, ((SI, 1),)),
        ([O, O], ((O, 1),)),  # pymatgen writes O2, other tables O
        ([NA, NA, O, O], ((O, 1), (NA, 1))),
        ([TI] * 4 + [O] * 6, ((O, 3), (TI, 2))),
    ],
)
def test_reduced_composition(numbers, expected):
    assert reduced_composition(crystal(numbers)) == expected


def test_different_compositions_have_different_keys():
    several = [[TI, O], [TI, O, O], [TI, TI, O, O, O], [TI], [O], [SI, O, O], [TI, O, O, O]]
    assert len({reduced_composition(crystal(numbers)) for numbers in several}) == len(several)


# -- matching ---------------------------------------------------------------------------------
def test_matches_by_id_and_by_composition(folder):
    exclusions = read_exclusions([ExcludeConfig("task.parquet")], folder)
    assert exclusions.ids == {"mp-1", "mp-2", "mp-3"}
    rows = {
        "mp-1": crystal([SI]),  # the id alone
        "mp-9": crystal([O, SI, O] * 2),  # the composition alone: another cell, another order
        "mp-2": crystal([SI, O, O]),  # both
        "mp-11": crystal([TI, O]),  # neither: the same elements; and mp-1 is a part of its id
        "mp-12": CrystalError("broken"),
        "mp-3": CrystalError("broken, but its id is known"),
    }
    ids, crystals = list(rows), list(rows.values())
    assert exclusions.by_id(ids, 6).tolist() == [True, False, True, False, False, True]
    by_composition = [False, True, True, False, False, False]
    assert exclusions.by_composition(crystals).tolist() == by_composition
    matches = exclusions.matches(ids, crystals)
    assert matches.dtype == bool
    assert matches.tolist() == [True, True, True, False, False, True]
    assert exclusions.matches(None, crystals).tolist() == by_composition


def test_nothing_to_match():
    assert read_exclusions([], None).matches(["mp-1"], [crystal([SI])]).tolist() == [False]
    assert Exclusions({"mp-1"}, set(), []).matches([], []).shape == (0,)


def test_ids_must_be_as_many_as_rows():
    with pytest.raises(ValueError, match="2 ids for 1 rows"):
        Exclusions({"a"}, set(), []).matches(["a", "b"], [crystal([SI])])


def test_train_and_val_are_left_out_and_test_stays(folder):
    exclusions = read_exclusions([ExcludeConfig("task.parquet")], folder)
    split = np.array(["train", "val", "test", "unused", "train", "val", "train"])
    salt, other = crystal([CL, NA]), crystal([SI])
    crystals = [salt, salt, salt, salt, other, other, other]
    ids = ["a", "mp-1", "mp-1", "mp-1", "mp-2", "d", "e"]
    changed, counts = exclusions.leave_out(split, ids, crystals)
    assert changed.tolist() == [
        "excluded", "excluded", "test", "unused", "excluded", "val", "train"
    ]  # fmt: skip
    assert counts == {"train": 2, "val": 1, "by_id": 2, "by_composition": 2}
    assert split[0] == "train", "what was given is not changed"


# -- tables -----------------------------------------------------------------------------------
def test_where_takes_some_rows(folder):
    some = read_exclusions([ExcludeConfig("task.parquet", {"split": ["test"]})], folder)
    assert some.ids == {"mp-1", "mp-3"}
    assert some.compositions == {((NA, 1), (CL, 1)), ((O, 2), (TI, 1))}
    # All columns have to agree, with one of their values each.
    for both in ({"split": ["test"], "number": [1, 2]}, {"number": [1, 2], "split": ["test"]}):
        assert read_exclusions([ExcludeConfig("task.parquet", both)], folder).ids == {"mp-1"}


def test_tables_add_up_and_are_recorded(folder):
    write(folder / "more.parquet", [[SI], [SI] * 2, None], material_id=["x", "y", "z"])
    configs = [ExcludeConfig("task.parquet", {"split": ["test"]}), ExcludeConfig("more.parquet")]
    exclusions = read_exclusions(configs, folder)
    assert exclusions.ids == {"mp-1", "mp-3", "x", "y", "z"}
    assert len(exclusions.compositions) == 3
    task, more = exclusions.to_json().pop("tables")
    assert task == {
        "table": "task.parquet",
        "sha256": sha256(folder / "task.parquet"),
        "where": {"split": ["test"]},
        "rows": 2,
        "ids": 2,
        "compositions": 2,
        "unreadable_structures": 0,
    }
    assert (more["rows"], more["ids"], more["compositions"]) == (3, 3, 1)
    assert more["unreadable_structures"] == 1
    record = exclusions.to_json()
    assert (record["ids"], record["compositions"]) == (5, 3)


def test_table_without_ids_counts_by_composition(folder):
    write(folder / "bare.parquet", [[NA, CL]])
    exclusions = read_exclusions([ExcludeConfig("bare.parquet")], folder)
    assert exclusions.ids == set()
    assert exclusions.matches(["0", "1"], [crystal([CL, NA]), crystal([SI])]).tolist() == [
        True, False
    ]  # fmt: skip


def test_missing_ids_match_nothing(folder):
    """As text they read nan or None, as do those of the source tables."""
    write(folder / "gaps.parquet", [[NA, CL]] * 4, material_id=["a", None, np.nan, " "])
    exclusions = read_exclusions([ExcludeConfig("gaps.parquet")], folder)
    assert exclusions.ids == {"a"}
    names = ["None", "nan", "", "a"]
    assert exclusions.by_id(names, 4).tolist() == [False, False, False, True]


def test_csv_and_another_id_column(folder):
    pd.DataFrame({
        "id": ["007", "008"], "code": [7, 8], "lattice": ["[4,0,0,0,4,0,0,0,4]"] * 2,
        "numbers": ["[14]", "[22]"], "frac_coords": ["[0,0,0]"] * 2,
    }).to_csv(folder / "task.csv", index=False)  # fmt: skip
    assert read_exclusions([ExcludeConfig("task.csv")], folder).ids == set()
    for column, ids in (("id", {"007", "008"}), ("code", {"7", "8"})):
        exclusions = read_exclusions([ExcludeConfig("task.csv", id_column=column)], folder)
        assert exclusions.ids == ids
        assert exclusions.compositions == {((SI, 1),), ((TI, 1),)}


# -- what is wrong ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "gone.parquet"}, r"gone\.parquet: there is no such file"),
        ({"where": {"part": ["test"]}}, r"task\.parquet: no column 'part' .*'split'"),
        ({"where": {"split": ["tset"]}}, r"task\.parquet: no row has 'tset' in column 'split'"),
        # The first value has rows; those of the second would have stayed in.
        ({"where": {"split": ["test", "vall"]}}, "no row has 'vall' in column 'split'"),
        ({"where": {"split": []}}, r"task\.parquet: no row is left .*'split'"),
        ({"where": {"split": ["train"], "number": [1]}}, "no row is left .*'number'"),
        ({"id_column": "mp_id"}, r"task\.parquet: no column 'mp_id' .*'material_id'"),
    ],
)
def test_wrong_tables_and_columns(folder, options, message):
    with pytest.raises(TableError, match=message):
        read_exclusions([ExcludeConfig(**{"table": "task.parquet"} | options)], folder)


def test_empty_table(folder):
    pd.DataFrame({name: [] for name in ARRAYS}).to_parquet(folder / "none.parquet")
    with pytest.raises(TableError, match=r"none\.parquet: .*no rows"):
        read_exclusions([ExcludeConfig("none.parquet")], folder)


def test_table_without_structures(folder):
    pd.DataFrame({"material_id": ["a"]}).to_parquet(folder / "ids.parquet")
    with pytest.raises(TableError, match=r"ids\.parquet: .*no structure columns"):
        read_exclusions([ExcludeConfig("ids.parquet")], folder)


def test_row_that_could_not_be_kept_out(folder):
    write(folder / "bad.parquet", [[SI], None, None], material_id=["a", "b", None],
          split=["train", "train", "test"])  # fmt: skip
    for where in ({}, {"split": ["test"]}):  # the row is numbered as in the file
        with pytest.raises(TableError, match=r"bad\.parquet: row 2 has no id and no structure"):
            read_exclusions([ExcludeConfig("bad.parquet", where)], folder)
    rest = read_exclusions([ExcludeConfig("bad.parquet", {"split": ["train"]})], folder)
    assert rest.ids == {"a", "b"}


@pytest.mark.parametrize("where", ["split", {"split": "test"}, ["split"], None])
def test_where_of_another_shape(where):
    with pytest.raises(OptionError, match=r"'where' in exclude \(task\.parquet\) is .*, not names"):
        ExcludeConfig("task.parquet", where)


# -- as pretraining uses it -------------------------------------------------------------------
def test_sources_leave_the_materials_out(folder):
    write(
        folder / "source.parquet",
        [[CL, NA], [CL, NA], [CL, NA], [SI], [SI, O, O], [SI], [SI]],
        material_id=["a", "b", "c", "mp-3", "e", "f", "g"],
        split=["train", "val", "test", "train", "train", "val", "test"],
        band_gap_ev=[5.0, 5.0, 5.0, 1.0, 6.0, 1.0, 1.0],
    )
    (folder / "config.yaml").write_text(
        "name: m\n"
        "sources: [{table: source.parquet, targets: [band_gap_ev], split_column: split}]\n"
        "exclude: [{table: task.parquet, where: {split: [test]}}]\n"
    )
    data = load_sources(read_config(folder / "config.yaml"))
    # SiO2 is no test row of the table, so e stays; c is a test row of its own.
    assert data.split.tolist() == [
        "excluded", "excluded", "test", "excluded", "train", "val", "test"
    ]  # fmt: skip
    assert [data.rows(part).tolist() for part in ("train", "val", "test")] == [[4], [5], [2, 6]]
    assert data.tables[0]["rows"]["excluded"] == 3
    assert data.tables[0]["excluded"]["ids"] == 2


def test_configuration_errors_name_the_file(folder):
    text = "name: m\nsources: [{table: a, targets: [b]}]\nexclude: [{table: c, where: {d: e}}]\n"
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: 'where' in exclude \(c\)"):
        read_config(folder / "config.yaml")


def test_other_libraries_are_not_asked(folder):
    code = (
        "import sys; from pathlib import Path\n"
        "from matxfer.pretraining.exclusion import ExcludeConfig, read_exclusions\n"
        "from matxfer.readers import crystals_of_table, load_table\n"
        "folder = Path(sys.argv[1]); path = folder / 'task.parquet'\n"
        "found = read_exclusions([ExcludeConfig(path.name)], folder)\n"
        "crystals = [e.crystal for e in crystals_of_table(load_table(path), str(path))]\n"
        "assert found.matches(None, crystals).all()\n"
        "assert not {'pymatgen', 'ase', 'torch', 'lightning'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- on real data: what matches in structure does not survive ---------------------------------
MATCHER = StructureMatcher()
SYMBOLS = {z: Structure(np.eye(3), [z], [[0, 0, 0]])[0].specie.symbol for z in range(1, 104)}


def pymatgen_formula(numbers):
    """Return pymatgen's reduced formula, with no help of ours."""
    values, counts = np.unique(numbers, return_counts=True)
    symbols = [SYMBOLS[z] for z in values.tolist()]
    return Composition(dict(zip(symbols, counts.tolist(), strict=True))).reduced_formula


def structure_of(row):
    lattice, frac = np.reshape(row.lattice, (3, 3)), np.reshape(row.frac_coords, (-1, 3))
    return Structure(lattice, [int(z) for z in row.numbers], frac)


class SharedTables:
    """The tables that are to be kept out, and a source with what its rows are found by."""

    def __init__(self, data):
        names = sorted(path.name for path in (data / "small_tasks").glob("*.parquet"))
        assert len(names) == 8
        configs = [ExcludeConfig(f"small_tasks/{name}") for name in names]
        self.tasks = [load_table(data / config.table) for config in configs]
        elasticity = load_table(data / "mp_elasticity.parquet")
        self.tasks.append(elasticity[elasticity["split"] == "test"])
        configs.append(ExcludeConfig("mp_elasticity.parquet", {"split": ["test"]}))
        self.exclusions = read_exclusions(configs, data)
        frame = load_table(data / "mp_formation_energy.parquet", ["material_id", *ARRAYS, "split"])
        self.source = frame
        cell = np.abs(np.linalg.det(np.stack(frame["lattice"].to_list()).reshape(-1, 3, 3)))
        self.n_sites = frame["numbers"].map(len).to_numpy()
        self.volume_per_atom = cell / self.n_sites
        self.by_formula = defaultdict(list)
        for row, numbers in enumerate(frame["numbers"]):
            self.by_formula[pymatgen_formula(numbers)].append(row)

    def drawn(self, n, seed, largest):
        """Return n small rows of each task."""
        for task in self.tasks:
            small = task[task["n_sites"] <= largest]
            yield from small.sample(n, random_state=seed).itertuples()

    def survive(self, rows):
        """Return which of some source rows stay in train or val, by composition alone."""
        frame = self.source.iloc[rows]
        crystals = [e.crystal for e in crystals_of_table(frame, "source")]
        assert None not in crystals
        split = np.array(["train"] * len(rows))
        return self.exclusions.leave_out(split, None, crystals)[0] == "train"


@pytest.fixture(scope="module")
def shared(shared_data):
    return SharedTables(shared_data)


@pytest.mark.data
def test_no_structure_match_survives(shared):
    """Candidates by pymatgen's formula; ids are not asked, so composition alone must do."""
    matches, materials, fits = set(), 0, 0
    for row in shared.drawn(40, seed=1, largest=16):
        candidates = shared.by_formula.get(pymatgen_formula(row.numbers), [])
        # Supercells of the source would be slow to reduce.
        candidates = [c for c in candidates if shared.n_sites[c] <= 32]
        mine = structure_of(row)
        found = {c for c in candidates
                 if MATCHER.fit(mine, structure_of(shared.source.iloc[c]))}  # fmt: skip
        matches |= found
        materials += bool(found)
        fits += len(candidates)
    assert materials > 100, "many materials have to match, or else this test says nothing"
    assert fits > len(matches), "and not everything does"
    assert not shared.survive(sorted(matches)).any()


@pytest.mark.data
def test_no_structure_match_survives_that_was_found_without_the_formula(shared):
    """Candidates of as many atoms and a similar volume, whatever they are made of."""
    matches, foreign = set(), 0
    for row in shared.drawn(4, seed=2, largest=12):
        mine = structure_of(row)
        ratio = shared.volume_per_atom / (mine.volume / len(mine))
        alike = (shared.n_sites == len(mine)) & (np.abs(ratio - 1) < 0.03)
        candidates = np.flatnonzero(alike)[:300].tolist()
        found = [c for c in candidates
                 if MATCHER.fit(mine, structure_of(shared.source.iloc[c]))]  # fmt: skip
        matches.update(found)
        foreign += sum(c not in shared.by_formula[pymatgen_formula(row.numbers)]
                       for c in candidates)  # fmt: skip
    assert len(matches) > 8
    assert foreign > 1000, "most candidates have to be of other formulas"
    assert not shared.survive(sorted(matches)).any()


@pytest.mark.data
def test_not_everything_is_excluded(shared):
    """Exactly the rows of equal formula go, so polymorphs do and neighbours in composition stay."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(shared.source), 4000, replace=False)).tolist()
    formulas = {pymatgen_formula(n) for task in shared.tasks for n in task["numbers"]}
    numbers = shared.source["numbers"]
    expected = [pymatgen_formula(numbers.iloc[row]) not in formulas for row in rows]
    survives = shared.survive(rows)
    assert survives.tolist() == expected
    assert 0.85 < survives.mean() < 0.98


@pytest.mark.data
def test_no_id_survives(shared):
    ids = {str(name) for task in shared.tasks for name in task["material_id"]}
    assert shared.exclusions.ids == ids
    names = shared.source["material_id"].tolist()
    hit = shared.exclusions.by_id(names, len(names))
    assert hit.sum() == len(ids & set(names)) > 3000
