"""``matxfer probe``: what source models, frozen depths and layers are worth for target tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matxfer.errors import OptionError
from matxfer.terminal import (
    AsJson,
    StructureColumn,
    counter_on_terminal,
    integers,
    interruptible,
    plain_warnings,
    print_json,
    progress_on_terminal,
    say,
)

if TYPE_CHECKING:
    from matxfer.probing.transfer_map import TransferMap


def probe(
    tables: Annotated[list[str], typer.Argument(help="Parquet or CSV tables.", metavar="TABLE...")],
    sources: Annotated[
        str | None,
        typer.Option(
            help="Models by name or folder, with commas between them (default: the shipped ones "
            "called source-…, of one source task each, and mp-base-strict, mp-small)."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Column to learn, or several with commas (default: the one of numbers)."),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(
            help="Columns of splits with commas, or a number of random splits (default: all "
            "columns called split…, else 5 random ones)."
        ),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Frozen depths K, such as 0,2,4 (default: all).")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="kernel_ridge, ridge, forest, gaussian_process: on fingerprints of layer K; "
            "readouts: trained ones on its atoms; finetune: the layers above K are trained."
        ),
    ] = "kernel_ridge",
    against: Annotated[
        str,
        typer.Option(
            help="random (weights, frozen and read out in the same way) or scratch (all of the "
            "network trained on the target: minutes)."
        ),
    ] = "random",
    by_layer: Annotated[
        str | None,
        typer.Option(
            help="Ask what each layer is worth: reinitialised, permuted, alone, with commas."
        ),
    ] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(help="Test on a whole anion, group, prototype or cluster left out in turn."),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="At most so many training rows; 50,200,800: learning curves.")
    ] = "2000",
    transform: Annotated[
        str | None,
        typer.Option(help="Scale on which targets are fitted (default: each property's own)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random splits, weights and thinned rows.")] = 0,
    structure_column: StructureColumn = None,
    threads: Annotated[int | None, typer.Option(help="Of torch (default: all CPUs).")] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder of raw results, tables and figure.")
    ] = "runs/probe",
    as_json: AsJson = False,
) -> None:
    """Map what transfers: targets by source models and frozen depths, against no transfer.

    Test errors with everything chosen on validation rows, gains with 95 % intervals over the
    splits, negative transfer where the interval says so; what structure adds to the composition.
    Writes OUTPUT/transfer_map.md, .csv, .parquet, .json and .png; a killed run goes on with the
    same command, from OUTPUT/runs.jsonl.
    """
    import torch

    from matxfer.benchmark.arguments import use_threads
    from matxfer.probing.plan import Probe
    from matxfer.probing.run import completed

    if Path(output).is_file():
        raise OptionError(f"--output {output} is a file, but results go into a folder; name one")
    use_threads(threads)
    with plain_warnings(), counter_on_terminal("building graphs") as advance:
        wanted = Probe(
            tables,
            _words(sources),
            target=_words(target),
            splits=int(splits) if splits and splits.isdecimal() else _words(splits),
            depths=integers("--depths", depths) if depths else None,
            method=method,
            against="random weights" if against == "random" else against,
            by_layer=_words(by_layer) or (),
            leave_out=leave_out,
            rows=integers("--rows", rows),
            transform=transform,
            seed=seed,
            structure_column=structure_column,
            on_graphs=advance,
        )
    for line in wanted.told:
        say(line)
    path = Path(output) / "runs.jsonl"
    total, missing = len(wanted.runs()), len(wanted.missing(path, say))
    say(f"{total} cells, {total - missing} of them in {path}")
    with (
        plain_warnings(),
        interruptible("; the same command goes on where it stopped"),
        progress_on_terminal("cells", missing) as progress,
    ):
        found = completed(wanted, path, lambda _: progress(1, 0))
    drawn = _write(found, output, torch.get_num_threads())
    if as_json:
        print_json(found.to_json())
    else:
        from matxfer.probing.report import short_lines

        for line in short_lines(found):
            typer.echo(line)
    say(f"{output}/transfer_map: .md, .csv, .parquet, .json{', .png' if drawn else ''} written")
    if not drawn:
        say("matplotlib is not installed, so nothing is drawn")


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _write(found: TransferMap, output: str, threads: int) -> bool:
    from matxfer.benchmark import markdown
    from matxfer.probing.report import TITLE, tables

    drawn = found.save(output)
    about = markdown.facts(threads, **_facts(found))
    text = markdown.document(TITLE, markdown.command_line("matxfer"), about, tables(found))
    (Path(output) / "transfer_map.md").write_text(text, encoding="utf-8")
    return drawn


def _facts(found: TransferMap) -> dict[str, object]:
    settings = found.settings
    sources = ", ".join(f"{name} {weights}" for name, weights in settings["sources"].items())
    facts = {
        "sources": sources,
        "method": settings["method"],
        "cells": f"{settings['n_cells']}, {settings['seconds']:.0f} s",
    }
    return facts | ({"told": "; ".join(found.told)} if found.told else {})
