"""What the benchmarks share: a result as a Markdown file, and random crystals of a table."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matxfer.data.store import available_cpus
from matxfer.provenance import versions
from matxfer.readers import crystals_of_table, load_table
from matxfer.readers.tables import ARRAY_COLUMNS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matxfer.crystal import Crystal

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(slots=True)
class Table:
    """Rows of cells under a heading; numbers are formatted by whoever fills them in."""

    heading: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table as Markdown, columns padded to equal width."""
        cells = [[str(cell) for cell in row] for row in (self.columns, *self.rows)]
        width = [max(len(row[k]) for row in cells) for k in range(len(self.columns))]
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(row, width, strict=True)) + " |"
            for row in cells
        ]
        lines.insert(1, "| " + " | ".join("-" * w for w in width) + " |")
        return "\n".join([f"## {self.heading}", "", *lines])


def command_line() -> str:
    """Return the command of this process, absolute paths made relative to where it was started."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    script = f"tests/benchmarks/{words[0]}"
    plain = [os.path.relpath(w) if Path(w).is_absolute() else w for w in words[1:]]
    return shlex.join(["python", script, *plain])


def facts(threads: int, **more: object) -> list[str]:
    """Return when and with what the figures were taken, as lines of a Markdown list."""
    import torch_geometric

    used = versions() | {"torch_geometric": torch_geometric.__version__}
    more = {
        "date": datetime.now(UTC).date().isoformat(),
        "threads": f"{threads} of {available_cpus()} CPUs",
        "versions": ", ".join(f"{k} {v}" for k, v in used.items() if v[0].isdigit()),
        **more,
    }
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in more.items()]


def write_tables(path: Path, title: str, facts: Sequence[str], tables: Sequence[Table]) -> None:
    """Write (and print) a result: title, command, facts, tables."""
    parts = [
        f"# {title}",
        f"```\n{command_line()}\n```",
        "\n".join(facts),
        *(table.markdown() for table in tables),
    ]
    text = "\n\n".join(parts) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(text)


def add_common_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of every benchmark."""
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of the data tables"
    )
    parser.add_argument(
        "--threads", type=int, default=available_cpus(), help="threads of torch (default: all CPUs)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which rows are drawn")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / f"{name}.md", help="file of the result"
    )


def random_crystals(path: Path, n: int, seed: int) -> list[Crystal]:
    """Return up to n crystals of a table, drawn at random, in the order of the table."""
    frame = load_table(path, ["material_id", *ARRAY_COLUMNS])
    size = min(n, len(frame))
    rows = np.sort(np.random.default_rng(seed).choice(len(frame), size, replace=False))
    entries = crystals_of_table(frame.iloc[rows], str(path))
    return [entry.crystal for entry in entries if entry.crystal is not None]
