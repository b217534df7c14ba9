"""Results as Markdown: tables, the command that made them, when and with what."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from matxfer.data.store import available_cpus
from matxfer.provenance import versions

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(slots=True)
class Table:
    """Rows of cells under a heading; numbers are formatted by whoever fills them in."""

    heading: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown, columns padded to equal width."""
        cells = [[str(cell) for cell in row] for row in (self.columns, *self.rows)]
        width = [max(len(row[k]) for row in cells) for k in range(len(self.columns))]
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(row, width, strict=True)) + " |"
            for row in cells
        ]
        lines.insert(1, "| " + " | ".join("-" * w for w in width) + " |")
        note = [self.note, ""] if self.note else []
        return "\n".join([f"## {self.heading}", "", *note, *lines])


def command_line(*program: str) -> str:
    """Return the command of this process as ``program`` and its words, paths made relative."""
    words = sys.argv[1:]
    plain = [os.path.relpath(w) if Path(w).is_absolute() else w for w in words]
    return shlex.join([*program, *plain])


def facts(threads: int, **more: object) -> list[str]:
    """Return when and with what the figures were taken, as lines of a Markdown list."""
    used = versions() | {"torch_geometric": metadata.version("torch_geometric")}
    more = {
        "date": datetime.now(UTC).date().isoformat(),
        "threads": f"{threads} of {available_cpus()} CPUs",
        "versions": ", ".join(f"{k} {v}" for k, v in used.items() if v[0].isdigit()),
        **more,
    }
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in more.items()]


def document(title: str, command: str, facts: Sequence[str], tables: Sequence[Table]) -> str:
    """Return a result: title, command, facts, tables."""
    parts = [f"# {title}", f"```\n{command}\n```", "\n".join(facts)]
    return "\n\n".join([*parts, *(table.markdown() for table in tables)]) + "\n"


def spread(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation, a dash for no values."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"
