"""What the benchmarks share: a result as a Markdown file, and random crystals of a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matxfer.benchmark.markdown import Table, command_line, document, facts
from matxfer.data.store import available_cpus
from matxfer.readers import crystals_of_table, load_table
from matxfer.readers.tables import ARRAY_COLUMNS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matxfer.crystal import Crystal

__all__ = [
    "Table",
    "add_common_arguments",
    "facts",
    "random_crystals",
    "write_tables",
]

RESULTS = Path(__file__).resolve().parent / "results"


def write_tables(path: Path, title: str, facts: Sequence[str], tables: Sequence[Table]) -> None:
    """Write (and print) a result: title, command, facts, tables."""
    script = f"tests/benchmarks/{Path(sys.argv[0]).name}"
    text = document(title, command_line("python", script), facts, tables)
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
