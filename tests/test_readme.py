"""The README and its pages: code runs, commands can be given, links lead on, figures hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import matxfer.cli
from matxfer.cli_shape import with_examples

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "matxfer/README.md",
    "matxfer/backbones/README.md",
    "tests/benchmarks/README.md",
)
COMMAND = with_examples(typer.main.get_command(matxfer.cli.app))


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def commands(page):
    """Yield the whole commands of matxfer that a page shows, in blocks and between backticks."""
    text = text_of(page)
    for block in blocks("console", page):
        yield from (line[2:] for line in block.splitlines() if line.startswith("$ matxfer "))
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", text):
        line = re.sub(r"\s+", " ", code)
        if re.match(r"(time )?matxfer [a-z]", line):
            yield line.removeprefix("time ")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = text_of(page)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_given(page):
    """Of the whole ones: those with an ellipsis or alternatives say how, not what."""
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        command = COMMAND
        while hasattr(command, "commands"):
            assert words, line
            if words[0] not in command.commands:  # `matxfer datasets list|info|fetch`
                assert words == ["--help"] or set(words[0].split("|")) <= set(command.commands), (
                    line
                )
                break
            command, words = command.commands[words[0]], words[1:]
        options = {name for parameter in command.params for name in parameter.opts}
        for word in words:
            if word.startswith("--") and word != "--help" and not hasattr(command, "commands"):
                assert word.split("=")[0] in options, line


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """Its last line says what it predicts."""
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "MAE" in capsys.readouterr().out
    assert (tmp_path / "melting" / "plugin.json").exists()
    assert (tmp_path / "parity.png").stat().st_size > 5000
    (told,) = re.findall(r"and (\d+) K", code)
    predicted = matxfer.predict(names["carbide"], names["plugin"]).melting_point_k[0]
    assert predicted == pytest.approx(float(told), abs=60)


def test_the_transfer_table_is_that_of_the_benchmark():
    table = text_of("tests/benchmarks/results/transfer.md")
    columns, *rows = re.findall(
        r"^\|(.+)\|$", table.split("## Test MAE")[1].split("\n## ")[0], re.MULTILINE
    )
    columns = [name.strip() for name in columns.split("|")]
    measured = {}
    for row in rows[1:]:
        cells = dict(zip(columns, (cell.strip() for cell in row.split("|")), strict=True))
        published = [
            float(cells[name]) for name in columns[columns.index("cgcnn_scratch") :]
            if cells[name] != "–"
        ]  # fmt: skip
        ours = [float(cells[name].split(" ")[0]) for name in ("scratch", "auto")]
        measured[cells["task"]] = (*ours, published[0], min(published))
    section = text_of("README.md").split("## What transfer buys")[1].split("\n## ")[0]
    shown = [
        tuple(float(cell.strip(" *")) for k, cell in enumerate(line.split("|")[2:7]) if k != 2)
        for line in section.splitlines() if re.match(r"\| .+ \d", line)
    ]  # fmt: skip
    assert len(shown) == len(measured) == 8
    # Each is another one of the tasks, to the digits that it shows.
    found = {
        name for row in shown for name, task in measured.items() if row == pytest.approx(task, 0.01)
    }
    assert found == set(measured)
