"""What the command says and reads: lines, counters and small values of options."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.errors import MatxferError, OptionError
from matxfer.notebook import is_watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

StructureColumn = Annotated[
    str | None,
    typer.Option(help="Column of structures (CIF text, paths or JSON) of a table."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


#: Exit code of a defect of ours, which no user can mend.
DEFECT = 70


@dataclass
class Voice:
    """How much is said: ``--quiet`` and ``--debug`` of this command."""

    quiet: bool = False
    debug: bool = False


voice = Voice()


def say(text: str) -> None:
    """Write a line on standard error, unless told to be quiet."""
    if not voice.quiet:
        typer.echo(text, err=True)


def complain(text: str) -> None:
    """Write a line on standard error that has to be read."""
    typer.echo(text, err=True)


def person_looks() -> bool:
    """Say whether progress is to be shown."""
    return is_watched() and not voice.quiet


def print_json(data: dict[str, Any]) -> None:
    """Write one JSON object."""
    typer.echo(json.dumps(data, ensure_ascii=False))


def say_trial(trial: Any) -> None:
    """Say what ``auto`` tried and how good it was."""
    say(f"{trial.facts['seconds']:6.1f} s  validation MAE {trial.error:.4g}  {trial.label}")


def refuse(options: dict[str, Any], why: str) -> None:
    """Raise an :class:`OptionError` if any of the options was given."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise OptionError(f"{names}: {why}")


def integers(option: str, text: str) -> list[int]:
    """Read numbers with commas between them."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise OptionError(f"{option} {text!r}: write numbers with commas, such as 2,4") from None


def names(option: str, text: str) -> list[str]:
    """Read names with commas between them."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise OptionError(f"{option} {text!r}: write names with commas, such as mp-base,mp-small")
    return words


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
    if sources := meta.get("sources"):
        yield from ranking_lines(sources)
    if transforms := meta.get("transform_trials"):
        yield f"transform: {transforms['chosen']}, {transforms['why']}"
    yield f"chosen: {meta['chosen']}"
    if correction := meta.get("correction"):
        yield from _correction_lines(correction)
    if weights := meta.get("weights"):
        yield _weights_line(weights, meta["data"]["rows"])
    if transfer := meta.get("transfer"):
        word = "negative transfer" if transfer["negative"] else "transfer"
        yield f"{word}: {transfer['message']}"
    yield from _figures_lines(meta["figures"])
    yield "drift of the source predictions on these structures, were the base to share the layers:"
    for name, entry in meta["retention"]["drift"].items():
        yield f"      {name}: {entry['mean_absolute_drift']:.4g} {entry['unit']}"
    for name, entry in meta["retention"].get("source_error", {}).items():
        before, after = f"{entry['before']:.4g} before", f"{entry['after']:.4g} after"
        yield f"      {name}: {entry['scale']} {before}, {after}"


def _figures_lines(parts: dict[str, Any]) -> Iterator[str]:
    for part, figures in parts.items():
        yield f"{part:5s} {figures_line(figures)}"
        if "weighted" in figures:
            yield f"      weighed: {figures_line(figures['weighted'])}"
        if "coverage" in figures:
            yield f"      {coverage_line(figures)}"


def coverage_line(figures: dict[str, Any]) -> str:
    """Return in words how many values of a part the intervals of a plugin hold."""
    level, coverage = figures["coverage_level"], figures["coverage"]
    if coverage is None:
        return f"no {level:.0%} intervals: too few validation rows to calibrate them on"
    return f"{level:.0%} intervals hold {coverage:.0%} of the values"


def _weights_line(weights: dict[str, Any], rows: dict[str, int]) -> str:
    effective = weights["effective_rows_by_part"]
    told = ", ".join(f"{effective[part]:.0f} of {rows[part]} {part}" for part in effective)
    return f"weights: rows are as good as equal ones of this number: {told}"


def _correction_lines(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"correction: {found['slope']:.4g} × {found['source']} {found['offset']:+.4g}, from "
        f"{found['rows']} rows; error of rows left out one by one {found['left_out_error']:.4g}"
    )
    elements = sorted(found["elements"].items(), key=lambda item: -abs(item[1]["value"]))
    if elements:
        largest = ", ".join(f"{symbol} {each['value']:+.3g}" for symbol, each in elements[:8])
        more = f" and {len(elements) - 8} more" if len(elements) > 8 else ""
        yield f"      by element, times its atomic fraction: {largest}{more}"


def say_source(source: Any) -> None:
    """Say how good a model is as a base."""
    error = source.scored.scores["kernel_ridge"]
    say(f"{source.seconds:6.1f} s  leave-one-out MAE {error:.4g}  {source.name}")


def ranking_lines(ranking: dict[str, Any]) -> Iterator[str]:
    """Yield a ranking of models as a table, and what is to be told of some."""
    unit = f" {ranking['unit']}" if ranking["unit"] else ""
    rows = f"{ranking['rows']} of {ranking['of_rows']} training rows"
    yield f"models for {ranking['target']}, {rows}: {ranking['method']}"
    everyone = sorted(ranking["sources"] + ranking["baselines"], key=lambda s: s["error"])
    head = ("model", f"MAE{unit}", "best layer", "5 nearest", "alignment", "LogME", "")
    cells = [head]
    for source in everyone:
        scores, layer = source["scores"], source["best_layer"]
        cells.append((
            source["name"],
            f"{source['error']:.4g} ± {source['spread']:.2g}",
            "–" if layer is None else str(layer),
            f"{scores['neighbours']:.4g}",
            f"{scores['alignment']:.3f}",
            f"{scores['log_evidence']:.3f}",
            source.get("verdict", "baseline"),
        ))  # fmt: skip
    width = [max(len(row[k]) for row in cells) for k in range(len(head))]
    for row in cells:
        line = "  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True))
        yield f"      {line.rstrip()}"
    refused = [s for s in ranking["sources"] if s["verdict"].startswith("negative")]
    for source in refused:
        yield f"refused: {source['name']}: {source['reason']}"
    for name, reason in ranking["left_out"].items():
        yield f"left out: {name}: {reason}"
    if ranking["chosen"] is None:
        yield "model: none helps, so that training from scratch is the better choice"
    else:
        chosen = next(s for s in ranking["sources"] if s["name"] == ranking["chosen"])
        yield f"model: {chosen['name']}, {chosen['reason']}"


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Say warnings without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(str(message))
        yield


@contextmanager
def counter_on_terminal(what: str) -> Iterator[Callable[[int], None]]:
    """Show a counter on stderr if a person is looking at it."""
    if not person_looks():
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
    if not person_looks():
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
    if not person_looks():
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
        complain(f"interrupted{advice}")
        raise typer.Exit(130) from None


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """End the process as a command should: problems and Ctrl-C in one line on stderr.

    With ``--debug`` the traceback comes before the line.
    """
    try:
        yield
    except SystemExit as stop:
        # Typer turns Ctrl-C into exit code 130 without a word.
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            complain("interrupted")
        raise
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of the pipe has seen enough
        sys.stderr.close()
        sys.exit(141)
    except (MatxferError, OSError) as error:
        _show_place()
        complain(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    except Exception as error:  # noqa: BLE001 - a defect of ours
        _show_place()
        told = " ".join(f"{type(error).__name__}: {error}".split())
        more = "" if voice.debug else "; --debug shows where"
        complain(f"error: {told} (unexpected: please report it as a defect of matxfer{more})")
        sys.exit(DEFECT)
    finally:
        voice.quiet = voice.debug = False


def _show_place() -> None:
    if voice.debug:
        traceback.print_exc()
