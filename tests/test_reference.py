"""The reference: every public name has examples, and they run and say what they say."""

from __future__ import annotations

import doctest
import importlib
import shutil
import warnings

import pandas as pd
import pytest
from ase.collections import dcdft

import matxfer

#: Packages whose ``__all__`` is public, beside matxfer's own.
PUBLIC = ("matxfer", "matxfer.domain", "matxfer.estimator", "matxfer.sharing")
#: Elements of the table of the examples.
SOLIDS = (
    *("Al", "Ag", "Au", "Ba", "Be", "Ca", "Cd", "Co", "Cr", "Cs", "Cu", "Fe", "Ge", "Hf"),
    *("Ir", "K", "Li", "Mg", "Mo", "Na", "Nb", "Ni", "Pb", "Pd", "Pt", "Rb", "Rh", "Ru"),
    *("Si", "Sn", "Sr", "Ta", "Ti", "V", "W", "Zn", "Zr"),
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


def public():
    """Return the names, each object by its first one."""
    found = {}
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            found.setdefault(id(getattr(module, name)), f"{module.__name__}.{name}")
    return list(found.values())


def examples_of(path):
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    # ``help`` shows this docstring; those of methods are told by the class.
    return doctest.DocTestParser().get_doctest(found.__doc__ or "", {}, path, None, 0)


@pytest.fixture(scope="module")
def workplace(repository, tmp_path_factory):
    """Return a folder with what the examples speak of: solids.parquet, bulk-plugin, examples/."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(repository / "datasets" / "examples", folder / "examples")
    atoms = [dcdft[name] for name in SOLIDS]
    pd.DataFrame({
        "material_id": SOLIDS,
        "lattice": [a.cell.array.ravel() for a in atoms],
        "numbers": [a.numbers for a in atoms],
        "frac_coords": [a.get_scaled_positions().ravel() for a in atoms],
        "bulk_modulus_gpa": [dcdft.data[name]["wien2k_B"] for name in SOLIDS],
        "split": ["test" if k % 6 == 5 else "val" if k % 6 == 2 else "train"
                  for k in range(len(SOLIDS))],
    }).to_parquet(folder / "solids.parquet")  # fmt: skip
    matxfer.finetune(
        folder / "solids.parquet", "bulk_modulus_gpa", folder / "bulk-plugin", model="mp-small",
        split_column="split", strategy="features", features="ridge",
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("path", public())
def test_every_public_name_has_an_example_that_runs(path, workplace, monkeypatch):
    test = examples_of(path)
    assert test.examples, f"{path}: give its docstring a section Examples"
    monkeypatch.chdir(workplace)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a toy's warnings are no part of what an example shows
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert result.failed == 0, "".join(said)
    assert result.attempted == len(test.examples)


def test_examples_are_compared():
    """The tool of this file notices an example that says something else."""
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(optionflags=FLAGS).run(wrong, out=lambda _: None).failed == 1
