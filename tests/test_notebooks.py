"""Notebooks run from top to bottom without the data tables, and are stored with their outputs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook extra is not installed")
nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: What cells print that need the shared data tables, where these are not.
WITHOUT_DATA = "the data tables are not here"
#: Places on the machine that ran a notebook.
PLACES = re.compile(r"(?<![\w.])/(home|tmp|root|work|usr|opt|var|Users)/|[A-Z]:\\\\")
LARGEST_MB = 2.0

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_figure(cell):
    return any("image/png" in output.get("data", ()) for output in cell.outputs)


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_there_are_notebooks_and_they_are_small():
    assert len(NOTEBOOKS) >= 6
    assert sum(path.stat().st_size for path in NOTEBOOKS) < LARGEST_MB * 1e6


@every_notebook
def test_notebook_runs_without_the_data_tables(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MATXFER_DATA", raising=False)
    # For cells that call the command: it lies beside this Python, whether or not that is on PATH.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", programs)
    folder = tmp_path / "clean" / "folder"  # no ../shared, no ../../shared
    folder.mkdir(parents=True)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    stored = nbformat.read(path, as_version=4)
    for found, kept in zip(code_cells(notebook), code_cells(stored), strict=True):
        assert not any(output.get("name") == "stderr" for output in found.outputs), found.outputs
        assert "command not found" not in text_of(found)
        assert WITHOUT_DATA in text_of(found) or has_figure(found) == has_figure(kept), kept.source


@every_notebook
def test_notebook_is_stored_with_outputs(path):
    text = path.read_text(encoding="utf-8")
    cells = code_cells(nbformat.reads(text, as_version=4))
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run it from top to bottom, then save it"
    for cell in cells:
        assert WITHOUT_DATA not in text_of(cell), "run it with the data tables, then save it"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            assert any(output.get("data", {"text": "some"}).values()), "an empty output"
    # Not within the letters of a picture.
    words = re.sub(r'"image/png": "[^"]*"|base64,[A-Za-z0-9+/=]+', "", text)
    assert not PLACES.search(words)
    assert "Traceback" not in words
    assert "\\u001b" not in words, "colours and moving text of a terminal"


def test_every_link_between_notebooks_leads_somewhere():
    for path in NOTEBOOKS:
        for name in re.findall(r"\]\(([\w.]+\.ipynb)\)", path.read_text(encoding="utf-8")):
            assert (FOLDER / name).is_file(), f"{path.name}: {name}"
