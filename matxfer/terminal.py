"""What the command says and reads: lines, counters and small values of options."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.errors import MatxferError, OptionError
from matxfer.notebook import is_watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ModelOption = Annotated[
    str, typer.Option("--model", help="Base model: a shipped one by name, or its folder.")
]
#: Where plugins may say which model is theirs.
ModelOfPlugins = Annotated[
    str | None,
    typer.Option("--model", help="Base model, by name or folder (that of the plugin, or mp-base)."),
]
StructureColumn = Annotated[
    str | None,
    typer.Option(help="Column of structures (CIF text, paths or JSON) of a table."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def say(text: str) -> None:
    """Write a line on standard error."""
    typer.echo(text, err=True)


def print_json(data: dict[str, Any]) -> None:
    """Write one JSON object."""
    typer.echo(json.dumps(data, ensure_ascii=False))


def say_trial(trial: Any) -> None:
    """Say what ``auto`` tried and how good it was."""
    say(f"{trial.facts['seconds']:6.1f} s  validation MAE {trial.error:.4g}  {trial.label}")


def integers(option: str, text: str) -> list[int]:
    """Read numbers with commas between them."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise OptionError(f"{option} {text!r}: write numbers with commas, such as 2,4") from None


def strength_of(text: str) -> float | str:
    """Read a strength: a number, or ``auto``."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise OptionError(f"--strength {text!r}: write a number or auto") from None


def condition(text: str) -> tuple[str, str]:
    """Read COLUMN=VALUE."""
    column, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"--where {text!r}: write COLUMN=VALUE")
    return column.strip(), value.strip()


def figures_line(figures: dict[str, Any]) -> str:
    """Return errors as one line."""
    if not figures["n"]:
        return "no rows to compare"
    unit = f" {figures['unit']}" if figures["unit"] else ""
    r2 = "–" if figures["r2"] is None else f"{figures['r2']:.4f}"
    line = f"MAE {figures['mae']:.4g}{unit}  RMSE {figures['rmse']:.4g}{unit}  R² {r2}"
    extra = "".join(f"  {k} {v:.4g}" for k, v in figures.items() if k.startswith("mae_log"))
    return f"{line}  n {figures['n']}{extra}"


def plugin_lines(meta: dict[str, Any]) -> Iterator[str]:
    """Yield what a person wants to know of a fresh plugin."""
    if transforms := meta.get("transform_trials"):
        yield f"transform: {transforms['chosen']}, {transforms['why']}"
    yield f"chosen: {meta['chosen']}"
    for part, figures in meta["figures"].items():
        yield f"{part:5s} {figures_line(figures)}"
        if "coverage" in figures:
            level, coverage = figures["coverage_level"], figures["coverage"]
            yield f"      {level:.0%} intervals hold {coverage:.0%} of the values"
    yield "drift of the source predictions on these structures, were the base to share the layers:"
    for name, entry in meta["retention"]["drift"].items():
        yield f"      {name}: {entry['mean_absolute_drift']:.4g} {entry['unit']}"
    for name, entry in meta["retention"].get("source_error", {}).items():
        before, after = f"{entry['before']:.4g} before", f"{entry['after']:.4g} after"
        yield f"      {name}: {entry['scale']} {before}, {after}"


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Say warnings without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(str(message))
        yield


@contextmanager
def counter_on_terminal(what: str) -> Iterator[Callable[[int], None]]:
    """Show a counter on stderr if a person is looking at it."""
    if not is_watched():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed:,.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda count: progress.advance(task, count)


@contextmanager
def download_on_terminal(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show bytes, speed and time left on stderr if a person is looking.

    Yields a function of the bytes so far and, if known, in all.
    """
    if not is_watched():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def progress_on_terminal(what: str, total: int | None) -> Iterator[Callable[[int, int], None]]:
    """Show rows done, failures, rate and, with a total, time left on stderr, if a person looks.

    Yields a function of the number of rows and of failures since the last call.
    """
    if not is_watched():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description} {task.completed:,.0f}"),
        TextColumn("of {task.total:,.0f}" if total else ""),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        *([TextColumn("left"), TimeRemainingColumn()] if total else []),
        TextColumn("{task.fields[failures]}"),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, rate="", failures="")
        failed = 0

        def advance(rows: int, failures: int) -> None:
            nonlocal failed
            failed += failures
            speed = progress.tasks[task].speed
            progress.update(
                task,
                advance=rows,
                rate=f"{speed:,.0f}/s" if speed else "",
                failures=f"[red]{failed:,} failed" if failed else "",
            )

        yield advance


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Say with some advice that Ctrl-C was heard, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted{advice}")
        raise typer.Exit(130) from None


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """End the process as a command should: known problems and Ctrl-C in one line on stderr."""
    try:
        yield
    except SystemExit as stop:
        # Typer turns Ctrl-C into exit code 130 without a word.
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            say("interrupted")
        raise
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of the pipe has seen enough
        sys.stderr.close()
        sys.exit(141)
    except (MatxferError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
