"""Objects and progress in notebooks: tables that are escaped, bars that leave nothing behind."""

from __future__ import annotations

import io
import os
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import TARGET

from matxfer import notebook, terminal
from matxfer.crystal import Crystal
from matxfer.model import Model
from matxfer.pyg import CrystalGraph
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import Plugin
from matxfer.transfer.summary import Report

SCRIPT = "<script>alert(1)</script>"


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.names, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        assert not any(key.startswith("on") for key, _ in attrs)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def plugin(tiny_model, crystal_frame):
    return finetune(crystal_frame, TARGET, model=tiny_model, split_column="split", epochs=3)


# -- objects ------------------------------------------------------------------------------------
def test_a_model_shows_its_properties(tiny_model):
    cells = Cells(tiny_model._repr_html_())
    assert "Model tiny" in cells.texts
    size = sum(p.numel() for p in tiny_model.parameters())
    assert f"{size:,}" in cells.texts
    for name, head in tiny_model.heads.items():
        at = cells.texts.index(name)
        assert cells.texts[at + 1] == head.readout.kind
        assert head.prop.unit in cells.texts
    card = {"figures": {"band_gap_ev": {"test": {"mae": 0.1234, "n": 77, "unit": "eV"}}}}
    shown = Model(tiny_model.backbone, tiny_model.heads.values(), (8,), card | {"name": SCRIPT})
    cells = Cells(shown._repr_html_())
    at = cells.texts.index("band_gap_ev")
    assert cells.texts[at + 2 : at + 5] == ["0.1234", "eV", "77"]
    assert "script" not in cells.names
    assert f"Model {SCRIPT}" in cells.texts


def test_a_plugin_shows_its_errors_before_and_after_it_is_written(plugin, tiny_model, tmp_path):
    for _ in range(2):
        cells = Cells(plugin._repr_html_())
        assert f"{TARGET} (K)" in cells.texts
        assert f"{plugin.meta['figures']['test']['mae']:.4g}" in cells.texts
        assert cells.texts.count("test") == 1
        plugin.save(tmp_path / "mine")
    bare = Plugin(tiny_model, 3, plugin.head)
    assert "tiny" in bare._repr_html_()
    assert repr(plugin).startswith("Plugin('mine'")


def test_a_report_has_trials_retention_and_a_figure(plugin):
    report = plugin.report
    cells = Cells(report._repr_html_())
    assert cells.names.count("img") == 1
    assert sum("(chosen)" in text for text in cells.texts) == 1
    for name in report.retention["drift"]:
        assert name in cells.texts
    assert len(report.trials) > 3
    from matxfer.plot.curves import curves_of

    curves, _, label = curves_of(plugin.meta)
    trained = [f"trial {k}" for k, t in enumerate(report.trials, 1) if "history" in t]
    assert set(curves) <= {"validation", "training", *trained}
    assert len([name for name in curves if name.startswith("trial")]) >= len(trained) - 1
    assert label == "MAE (K)"
    assert "test MAE" in repr(report)
    assert str(report).splitlines()[0] == f"chosen: {plugin.meta['chosen']}"
    # Without the rows there is no figure, and without anything there is a title.
    lean = Report({k: v for k, v in plugin.meta.items() if k != "predictions"})
    assert "img" not in Cells(lean._repr_html_()).names
    empty = Report({"name": SCRIPT})
    assert "script" not in Cells(empty._repr_html_()).names
    assert repr(empty) == str(empty) == f"Report({SCRIPT!r}, no figures)"


def test_a_graph_shows_its_atoms_and_edges():
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    graph = CrystalGraph.from_crystal(Crystal(3.905 * np.eye(3), [38, 22, 8, 8, 8], sites), y=-3.5)
    cells = Cells(graph._repr_html_())
    assert "O 3, Ti 1, Sr 1" in cells.texts
    assert f"{graph.edge_index.shape[1]}" in cells.texts
    assert "−3.5" in cells.texts
    told = [int(t.split(": ")[1].split()[0]) for t in cells.texts if t.endswith(" edges")]
    assert sum(told) == graph.edge_index.shape[1]
    assert "rect" in cells.names

    from torch_geometric.data import Batch

    assert "10" in Cells(Batch.from_data_list([graph, graph])._repr_html_()).texts


# -- progress -----------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_moves_on_a_terminal_but_not_in_the_cell_of_a_notebook(monkeypatch):
    def drawn():
        written = Terminal()
        monkeypatch.setattr(sys, "stderr", written)
        with terminal.progress_on_terminal("predicting", 10) as advance:
            for _ in range(10):
                advance(1, 0)
        return written.getvalue()

    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert "predicting" in drawn()
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert drawn() == ""


def test_outside_of_a_notebook_nothing_is_injected():
    seen = []

    @notebook.told_in_notebook("on_done", "working")
    def work(*, on_done=None):
        seen.append(on_done)

    work()
    assert seen == [None]
    assert work.__name__ == "work"


# -- a real kernel ------------------------------------------------------------------------------
SLOW = """
import time
from matxfer.notebook import told_in_notebook
@told_in_notebook("on_done", "working on <b>")
def work(n, on_done=None):
    for _ in range(n):
        time.sleep(0.01)
        on_done(1)
"""


@pytest.fixture(scope="module")
def run():
    """Return a function that runs cells in one kernel and returns their outputs."""
    nbformat = pytest.importorskip("nbformat", reason="the notebook extra is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")

    def run(*cells):
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
        nbclient.NotebookClient(made, timeout=120, kernel_name="python3").execute()
        return [cell.outputs for cell in made.cells]

    return run


def test_progress_in_a_kernel_is_one_output_that_ends_empty(run, tmp_path):
    script = tmp_path / "bar.py"
    script.write_text(
        "import sys, time\n"
        "from matxfer.terminal import counter_on_terminal\n"
        "print('a terminal:', sys.stderr.isatty())\n"
        "with counter_on_terminal('counting') as advance:\n"
        "    for _ in range(30):\n"
        "        advance(1); time.sleep(0.01)\n"
    )
    _, quick, slow, told, shell = run(
        SLOW,
        "work(5)",
        "work(120)",
        "work(3, on_done=lambda n: print('mine', n))",
        f"!{sys.executable} {script}",
    )
    assert quick == []
    (only,) = slow  # in place of a hundred and twenty
    assert only["output_type"] == "display_data"
    assert only["data"] == {"text/plain": "", "text/html": ""}
    assert told[0]["text"].split("\n")[:3] == ["mine 1"] * 3
    text = "".join(output.get("text", "") for output in shell)
    assert "a terminal: True" in text
    assert "counting" not in text
    assert "\x1b" not in text


def test_a_line_says_how_far_it_is():
    line = notebook._Line("predicting", 25, 100, 5.0)
    assert repr(line) == "predicting 25 of 100 (5 s, 15 s left)"
    cells = Cells(line._repr_html_())
    assert cells.names == ["div", "span", "progress"]
    assert repr(notebook._Line("counting", 7, None, 1.0)) == "counting 7 (1 s)"
    assert "<b>" not in notebook._Line("<b>", 7, None, 1.0)._repr_html_()


def test_kernels_are_known_by_their_shell(monkeypatch):
    assert not notebook.in_notebook()

    class ZMQInteractiveShell:
        pass

    class Fake:
        get_ipython = staticmethod(ZMQInteractiveShell)

    monkeypatch.setitem(sys.modules, "IPython", Fake)
    assert notebook.in_notebook()
    assert "JPY_PARENT_PID" not in os.environ or not notebook.is_watched()
