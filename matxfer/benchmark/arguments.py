"""Arguments that the benchmarks share, and how they write their tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matxfer.benchmark.markdown import Table
    from matxfer.model import Model

Data = Annotated[
    str, typer.Option("--data", envvar="MATXFER_DATA", help="Folder of the data tables.")
]
BaseModel = Annotated[
    str, typer.Option("--model", help="Base model; the default has seen no material of the tasks.")
]
Tasks = Annotated[str | None, typer.Option("--tasks", help="With commas between them.")]
Splits = Annotated[str, typer.Option("--splits", help="Published splits, such as 0,1,2.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Of torch (default: all CPUs).")]
Epochs = Annotated[
    int | None, typer.Option("--epochs", help="At most so many passes, for a quick look.")
]
Output = Annotated[
    str, typer.Option("-o", "--output", help="Folder of raw results, tables and figures.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DATA, MODEL, OUTPUT = "../shared/data", "mp-base-strict", "runs/benchmark"


def use_threads(threads: int | None) -> None:
    """Compute with so many threads, ``None``: all CPUs."""
    from matxfer.data.store import available_cpus
    from matxfer.runtime import use_threads as use

    if threads is not None and threads < 1:
        raise OptionError(f"--threads is {threads}, but must be at least 1")
    use(threads or available_cpus())


def write_document(
    model: Model, output: str, name: str, title: str, tables: Sequence[Table], as_json: bool
) -> None:
    """Write (and print) the tables."""
    import torch

    from matxfer.benchmark import markdown

    about = markdown.facts(torch.get_num_threads(), model=model.name, weights=model.checksum[:12])
    text = markdown.document(title, markdown.command_line("matxfer"), about, tables)
    (Path(output) / f"{name}.md").write_text(text, encoding="utf-8")
    if not as_json:
        typer.echo(text)


def chosen_of(
    option: str, text: str | None, known: Sequence[str], default: Sequence[str]
) -> list[str]:
    """Read names with commas between them, all of which must be known."""
    if text is None:
        return list(default)
    names = [word.strip() for word in text.split(",") if word.strip()]
    if foreign := [name for name in names if name not in known]:
        raise OptionError(f"{option}: {foreign[0]!r} is not among {list(known)}")
    if not names:
        raise OptionError(f"{option} {text!r}: write names with commas, such as {known[0]}")
    return names
