"""The shape of the package: imports point one way, modules are short, names are documented."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "matxfer"
MODULES = sorted(ROOT.rglob("*.py"))

#: Rooms from the ground up: a room may use those below it, and none of its own floor.
FLOORS = (
    ("errors", "columns"),
    ("screening", "html"),
    ("notebook",),
    ("files", "provenance", "runtime", "neighbors", "terminal", "options"),
    ("crystal", "checkpoint"),
    ("graph", "readers"),
    ("data", "pyg"),
    ("nn", "skin", "datasets", "hub"),
    ("model", "plugin_files"),
    ("fisher", "metrics", "model_card", "invariance"),
    ("plot",),
    ("pretraining", "transfer"),
    ("potential",),
    ("batch", "forcefield", "backbones", "testing"),
    ("prediction", "evaluation", "output_metadata", "sharing"),
    ("output_structures",),
    ("calculator", "output", "estimator"),
    ("benchmark",),
    ("campaign", "relaxation", "dynamics", "domain"),
    ("probing", "report"),
    (
        *("predict_cli", "simulate_cli", "potential_cli"),
        *("datasets_cli", "plugins_cli", "sources_cli"),
    ),
    ("finetune_cli",),
    ("cli_examples",),
    ("cli_shape",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
#: Where Lightning may appear.
TRAINING = {
    "matxfer.checkpoint",
    "matxfer.invariance.callback",
    "matxfer.potential.training",
    "matxfer.pretraining.callbacks",
    "matxfer.pretraining.module",
    "matxfer.pretraining.run",
    "matxfer.transfer.ewc_callback",
    "matxfer.transfer.finetune",
    "matxfer.transfer.strategies",
    "matxfer.transfer.training",
}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(tree, *, lazy=True, types=False):
    """Yield the modules that a tree imports, with ``types`` those for type checkers too.

    Without ``lazy`` imports inside functions are left out.
    """
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if is_type_checking(node) and not types:
            waiting += node.orelse
            continue
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            # `from matxfer import output` imports a module by another spelling.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def imported(name, **which):
    """Return the modules of ours that a module imports."""
    return {other for other in imports_of(TREES[name], **which) if other in TREES and other != name}


def room(name):
    return name.split(".")[1] if "." in name else ""


def has_cycle(graph):
    """Return a cycle of a graph as a list, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if cycle := visit(other):
                return cycle
        done.add(path.pop())
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node))), None)


# -- the tools of this file -------------------------------------------------------------------
def test_the_tools_see_what_they_should():
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import hidden\nelse:\n    import other\n"
        "from a.b import c\n"
        "def f():\n    import lazy\n"
        "class C:\n    import inner\n"
        "try:\n    import tried\nexcept ImportError:\n    import instead\n"
    )
    eager = {"typing", "typing.TYPE_CHECKING", "other", "a.b", "a.b.c", "inner", "tried", "instead"}
    assert set(imports_of(tree, lazy=False)) == eager
    assert set(imports_of(tree)) == eager | {"lazy"}
    assert set(imports_of(tree, types=True)) == eager | {"lazy", "hidden"}
    assert has_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert has_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


# -- imports ----------------------------------------------------------------------------------
def test_every_module_has_a_floor():
    assert {room(name) for name in TREES} - {""} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_point_down(name):
    others = {other for other in imported(name) if room(other) != room(name)}
    if name == "matxfer":
        assert not others, "the top-level names are imported on first use"
        return
    # `from matxfer import output` is a way to name a module; the top-level names are for users.
    assert "matxfer" not in others or name in {"matxfer.cli", "matxfer.cli_shape"}
    upward = {other for other in others - {"matxfer"} if FLOOR[room(other)] >= FLOOR[room(name)]}
    assert not upward


def test_rooms_have_no_cycle():
    graph = {}
    for name in TREES:
        graph.setdefault(room(name), set()).update(room(o) for o in imported(name))
    for name, others in graph.items():
        others.discard(name)
    assert has_cycle(graph) is None


def test_modules_have_no_cycle():
    """Inside a room too; as far as imports happen when a module is loaded for a room's face."""
    assert has_cycle({name: imported(name, lazy=False) for name in TREES}) is None
    faces = {module_name(path) for path in MODULES if path.name == "__init__.py"}
    everything = {name: imported(name, types=True) - faces for name in TREES if name not in faces}
    assert has_cycle(everything) is None


def importers(*libraries):
    """Return the modules that import one of the libraries, wherever they do."""
    return {
        name
        for name, tree in TREES.items()
        if {module.split(".")[0] for module in imports_of(tree)} & set(libraries)
    }


def test_pytorch_geometric_stays_in_its_room():
    assert importers("torch_geometric") == {"matxfer.pyg"}
    assert not {name for name in TREES if "matxfer.pyg" in imported(name)}


def test_lightning_stays_in_training():
    found = importers("lightning", "pytorch_lightning")
    assert found <= TRAINING
    assert {"matxfer.pretraining.run", "matxfer.transfer.training"} <= found
    # What predicts imports none of them as it is loaded.
    reached, waiting = set(), ["matxfer.prediction", "matxfer.evaluation", "matxfer.calculator"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += imported(name, lazy=False) - reached
    assert len(reached) > 15
    assert not reached & TRAINING


@pytest.mark.parametrize("library", ["torch", "lightning", "pandas", "torch_geometric"])
def test_structures_need_no_network(library):
    """Crystals, graphs and readers are of use without PyTorch; pandas comes with tables alone."""
    for name, tree in TREES.items():
        if room(name) in {"crystal", "neighbors", "graph", "readers", "cli", ""}:
            found = {i.split(".")[0] for i in imports_of(tree, lazy=False)}
            assert library not in found, name


# -- size and documentation -------------------------------------------------------------------
@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


def undocumented(tree, prefix=""):
    """Yield public functions, classes and methods without a docstring."""
    for node in tree.body:
        if is_type_checking(node):
            continue
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if not named or node.name.startswith("_"):
            continue
        if any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list):
            continue  # the getter has it
        if ast.get_docstring(node) is None:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{node.name}.")


@pytest.mark.parametrize("name", sorted(TREES))
def test_public_names_are_documented(name):
    assert ast.get_docstring(TREES[name]), "the module itself"
    assert list(undocumented(TREES[name])) == []


def test_undocumented_names_are_found():
    tree = ast.parse("class A:\n    '''Doc.'''\n    def f(self): ...\n    def _g(self): ...\n"
                     "def h(): ...\n")  # fmt: skip
    assert list(undocumented(tree)) == ["A.f", "h"]
