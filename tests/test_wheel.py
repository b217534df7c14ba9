"""The wheel: what is in it; an environment with it and its dependencies alone works."""

from __future__ import annotations

import importlib.util
import os
import site
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

import matxfer
from matxfer import available_models
from matxfer.datasets.card import available_datasets
from matxfer.prediction import predict

#: The package index takes files of up to 100 MB; the weights make nearly all of it.
MOST_BYTES = 30e6


def python(executable, *words, folder, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [executable, *map(str, words)],
        capture_output=True, text=True, check=False, cwd=folder, env=kept | environment,
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    """Build the wheel with what is installed: nothing is fetched."""
    for needed in ("hatchling", "pip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed; pip install {needed} to test the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    done = python(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index",
        "--no-build-isolation", "--disable-pip-version-check", "-w", folder, repository,
        folder=folder, PYTHONPATH=os.environ.get("PYTHONPATH", ""),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Return the folder of programs of a new environment that has the wheel.

    The dependencies are those of this environment; its own matxfer is not among them, because an
    editable install is found by a .pth file, and those of added folders are not followed.
    """
    root = tmp_path_factory.mktemp("environment")
    made = python(sys.executable, "-m", "venv", "--without-pip", root, folder=root)
    assert made.returncode == 0, made.stderr
    programs = root / ("Scripts" if os.name == "nt" else "bin")
    installed = python(
        sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet",
        "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", wheel,
        folder=root,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    (packages,) = root.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return programs


def test_what_is_in_the_wheel(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [n for n in names if n.endswith("METADATA")]
        facts = Parser().parsestr(archive.read(metadata).decode())
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    assert wheel.stat().st_size < MOST_BYTES
    for name in available_models():
        ours = {p.name for p in (repository / "pretrained" / name).iterdir()}
        assert {f"matxfer/pretrained/{name}/{file}" for file in ours} <= names
    for name in available_datasets():
        assert f"matxfer/dataset_cards/{name}.toml" in names
    ours = {str(p.relative_to(repository)) for p in (repository / "matxfer").rglob("*.py")}
    assert ours <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert top == {"matxfer", f"matxfer-{matxfer.__version__}.dist-info"}
    odd = (
        "tests/",
        "test_",
        ".ipynb",
        "__pycache__",
        ".pyc",
        ".pkl",
        "/.",
        "conftest",
        "lightning_logs",
    )
    assert [n for n in names if any(word in n.removeprefix("matxfer/") for word in odd)] == []
    assert facts["Version"] == matxfer.__version__
    assert facts["License-Expression"] == "MIT"
    extras = set(facts.get_all("Provides-Extra"))
    assert {"hub", "mp", "notebook", "ray", "simulation"} <= extras


def test_the_wheel_predicts_the_same(environment, repository, tmp_path):
    cif = repository / "datasets" / "examples" / "NaCl.cif"
    words = ("predict", cif, "--model", "mp-small", "-o", "out.csv")
    done = python(environment / "matxfer", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    predict(cif, model="mp-small").to_csv(tmp_path / "ours.csv", index=False)
    import pandas as pd

    theirs, ours = pd.read_csv(tmp_path / "out.csv"), pd.read_csv(tmp_path / "ours.csv")
    numbers = ours.select_dtypes("number").columns
    assert len(numbers) > 4
    pd.testing.assert_frame_equal(theirs[numbers], ours[numbers], rtol=1e-6)


def test_the_wheel_is_what_runs_and_knows_its_cards(environment, wheel, tmp_path):
    code = (
        "import sys, matxfer; from matxfer.datasets.card import available_datasets;"
        "print(matxfer.__file__); print(*available_datasets())"
    )
    done = python(environment / "python", "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    file, cards = done.stdout.splitlines()
    assert file.startswith(str(environment.parent))
    assert cards.split() == available_datasets()
    version = python(environment / "python", "-m", "matxfer", "--version", folder=tmp_path)
    assert version.stdout == f"matxfer {matxfer.__version__}\n"
