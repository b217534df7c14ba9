"""The command ``matxfer predict``: a table, a file, or a folder of parts from many processes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.cli_names import ModelOfPlugins, plugin_places
from matxfer.errors import OptionError, StrictError
from matxfer.terminal import (
    StructureColumn,
    complain,
    interruptible,
    person_looks,
    plain_warnings,
    progress_on_terminal,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from matxfer.campaign.parts import Campaign, Outcome
    from matxfer.campaign.share import Share
    from matxfer.prediction import BatchOptions, Predictor
    from matxfer.screening import Screen

#: Exit codes, besides 0: nothing could be predicted; wrong options or files; --strict and a
#: structure failed; interrupted.
NOTHING, WRONG, STRICT, INTERRUPTED = 1, 2, 3, 130
ENGINES = ("local", "ray")


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Structure files, tables, folders or globs.", metavar="INPUT..."),
    ],
    model: ModelOfPlugins = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin", help="Folder of a plugin; may be repeated.", autocompletion=plugin_places
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", help="OUT.csv, .parquet, .jsonl, .extxyz or .db; or DIR/ for parts."
        ),
    ] = None,
    structure_column: StructureColumn = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Worker processes, one thread each (default: by the number of inputs)."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that a structure may take in a worker; 0: for ever [300]."),
    ] = None,
    max_atoms: Annotated[
        int | None, typer.Option(help="Larger cells are not tried [10000].")
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Keep predictions on this machine, so that a run like this one is nearly free.",
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first structure that fails.")
    ] = False,
    shard_size: Annotated[
        int | None, typer.Option(help="Structures per part, with -o DIR/ [20000].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the parts in DIR/.")] = False,
    rank: Annotated[
        int | None, typer.Option(help="Number of this process, from 0 (default: the launcher's).")
    ] = None,
    world_size: Annotated[int | None, typer.Option(help="How many processes there are.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: a Ray cluster does parts.")] = "local",
    input_format: Annotated[
        str | None, typer.Option(help="Of standard input (-): cif, poscar, extxyz or jsonl.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option("--filter", help="Condition, such as 'band_gap_ev > 1 and n_sites <= 20'."),
    ] = None,
    sort_by: Annotated[
        str | None, typer.Option(help="COLUMN (small values first) or COLUMN:desc.")
    ] = None,
    top: Annotated[int | None, typer.Option(help="Only so many, with --sort-by.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns to write, with commas between them.")
    ] = None,
) -> None:
    """Predict properties of crystals, one row per structure.

    Without -o: a table on a terminal, CSV into a pipe. A structure that cannot be used keeps its
    row and says why, in the columns error_kind and error.

    With -o DIR/ the rows go into DIR/part-00000.parquet, … and DIR/manifest.json. A part is there
    whole or not at all: after Ctrl-C, a crash or a full disk the same command with --resume goes
    on, and ends with the same rows. The inputs (names, sizes, times of change), weights and
    options have to be the same. The same command under torchrun or srun shares the parts among
    the processes; in a Slurm array say so:

    \b
      srun matxfer predict table.parquet -o DIR/
      torchrun --nproc-per-node 4 --no-python matxfer predict table.parquet -o DIR/
      matxfer predict table.parquet -o DIR/ \\
        --rank $SLURM_ARRAY_TASK_ID --world-size $SLURM_ARRAY_TASK_COUNT   # --array=0-7

    Exit codes: 0 done; 1 no structure could be predicted; 2 wrong options or files; 3 with
    --strict, a structure failed; 130 interrupted.
    """  # noqa: D301 - the escape tells click to leave the block as it is
    from matxfer.batch.prepare import MAX_ATOMS
    from matxfer.campaign.share import share_of
    from matxfer.output import output_format
    from matxfer.prediction import BatchOptions, Predictor
    from matxfer.readers import with_standard_input
    from matxfer.screening import Screen

    share = share_of(rank, world_size)
    folder = _folder_of(output)
    given = {"--shard-size": shard_size is not None, "--resume": resume}
    given |= {"--world-size": world_size is not None, f"--engine {engine}": engine != "local"}
    _check(engine, folder, share, [name for name, is_given in given.items() if is_given])
    atoms = MAX_ATOMS if max_atoms is None else max_atoms
    options = BatchOptions(structure_column, workers, timeout, atoms, cache)
    inputs = with_standard_input(inputs, input_format)
    if folder is None:
        if output is not None:
            output_format(output)  # a wrong suffix is told before a model is loaded
        predictor = Predictor(model, plugin or [])
        chosen = columns and [name.strip() for name in columns.split(",")]
        screen = Screen(predictor.columns, where=where, sort_by=sort_by, top=top, columns=chosen)
        _into_one(predictor, screen, inputs, options, output, strict=strict)
        return
    if any(given is not None for given in (where, sort_by, top, columns)):
        raise OptionError(
            "--filter, --sort-by, --top and --columns need one file (-o FILE); parts hold all rows"
        )
    from matxfer.campaign.parts import PART_SIZE, Campaign

    campaign = Campaign(
        folder,
        Predictor(model, plugin or []),
        inputs,
        options,
        part_size=PART_SIZE if shard_size is None else shard_size,
        resume=resume,
        share=share,
    )
    _into_parts(campaign, engine, strict=strict)


def _folder_of(output: str | None) -> Path | None:
    """Return the folder that an output names, None for a file."""
    if output is None:
        return None
    path = Path(output)
    return path if output.endswith(("/", "\\")) or path.is_dir() else None


def _check(engine: str, folder: Path | None, share: Share, given: list[str]) -> None:
    if engine not in ENGINES:
        raise OptionError(f"--engine {engine!r}: the engines are {', '.join(ENGINES)}")
    if folder is None and given:
        raise OptionError(f"{given[0]} needs a folder for the parts: -o DIR/")
    if folder is None and share.size > 1:
        raise OptionError(
            f"this is process {share.rank} of {share.size}: give a folder for their parts (-o DIR/)"
        )
    if engine == "ray" and share.size > 1:
        raise OptionError("--engine ray starts its own processes; start it once")


# -- one table --------------------------------------------------------------------------------
def _into_one(
    predictor: Predictor,
    screen: Screen,
    inputs: list[str],
    options: BatchOptions,
    output: str | None,
    *,
    strict: bool,
) -> None:
    import matxfer.output as out
    from matxfer.output_structures import with_crystals

    kinds: dict[str, int] = {}
    rows = _tallied(predictor.rows(inputs, options), kinds, strict=strict)
    with _strictly(), plain_warnings():
        if output is None:
            out.print_rows(screen(rows), screen.columns)
        else:
            if out.holds_structures(output):
                rows = with_crystals(rows, inputs, options.structure_column)
            _into_file(rows, predictor, screen, inputs, output)
    if summary := screen.summary():
        say(summary)
    _summary(screen.seen, screen.failed, kinds)


def _into_file(
    rows: Iterator[Any], predictor: Predictor, screen: Screen, inputs: list[str], output: str
) -> None:
    import matxfer.output as out
    from matxfer.output_metadata import describe_prediction

    expected = _expected(inputs) if person_looks() else None
    facts = describe_prediction(
        predictor.model, predictor.plugins, screen.columns, **screen.choices()
    )
    with (
        interruptible(f"; the rows so far are in {output}.part"),
        progress_on_terminal("predicting", expected) as advance,
    ):
        out.write_rows(screen(_advancing(rows, advance)), screen.columns, output, facts)


def _expected(inputs: list[str]) -> int | None:
    from matxfer.batch.units import count_of
    from matxfer.readers import expand

    counts = [count_of(path) for path in expand(inputs)]
    return None if None in counts else sum(count for count in counts if count is not None)


def _tallied(rows: Iterable[Any], kinds: dict[str, int], *, strict: bool) -> Iterator[Any]:
    """Pass rows on, counting their errors by kind."""
    for row in rows:
        if row["error_kind"] is not None:
            kinds[row["error_kind"]] = kinds.get(row["error_kind"], 0) + 1
            if strict:
                raise _strict_error(row)
        yield row


def _advancing(rows: Iterable[Any], advance: Callable[[int, int], None]) -> Iterator[Any]:
    for row in rows:
        advance(1, int(row["error"] is not None))
        yield row


# -- a folder of parts ------------------------------------------------------------------------
def _into_parts(campaign: Campaign, engine: str, *, strict: bool) -> None:
    from matxfer.campaign.parts import stop_on_signals

    again = "; the same command with --resume goes on"
    structures = None if campaign.structures is None else campaign.structures // campaign.share.size
    progress = progress_on_terminal("predicting", structures)
    try:
        with _strictly(), plain_warnings(), interruptible(again), progress as advance:
            if engine == "ray":
                from matxfer.campaign.ray_engine import run_with_ray

                outcome = run_with_ray(campaign, on_part=advance)
            else:

                def seen(row: Any) -> None:
                    failed = row["error"] is not None
                    if failed and strict:
                        raise _strict_error(row)
                    advance(1, int(failed))

                with stop_on_signals(say) as stop:
                    outcome = campaign.run(stop=stop, on_row=seen)
    except OSError as error:
        raise OptionError(f"{error}{again}, once that is mended") from error
    _report(campaign, outcome, again)


def _report(campaign: Campaign, outcome: Outcome, again: str) -> None:
    if outcome.stopped:
        say(f"stopped after {outcome.rows:,} rows, in whole parts in {campaign.folder}{again}")
        raise typer.Exit(INTERRUPTED)
    if outcome.found:
        say(f"{outcome.found} parts were there already")
    if not outcome.complete:
        say(
            f"process {campaign.share.rank} of {campaign.share.size} is done: {outcome.rows:,} "
            "rows; other parts are still missing, and the last process writes the manifest"
        )
        return
    whole = outcome.manifest
    say(f"{campaign.folder}: {whole['rows']:,} rows in {len(whole['parts'])} parts")
    _summary(whole["rows"], whole["failed"], whole["errors"])


# -- words ------------------------------------------------------------------------------------
def _strict_error(row: Mapping[str, Any]) -> StrictError:
    return StrictError(
        f"{row['source']} (frame {row['frame']}): {row['error_kind']}: {row['error']}"
    )


@contextmanager
def _strictly() -> Iterator[None]:
    try:
        yield
    except StrictError as error:
        complain(f"error: {' '.join(str(error).split())}")
        raise typer.Exit(STRICT) from None


def _summary(total: int, failed: int, kinds: Mapping[str, int]) -> None:
    """Say what failed and why, and exit with 1 if that is all."""
    if failed:
        words = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items(), key=lambda i: -i[1]))
        say(
            f"{failed:,} of {total:,} structures could not be predicted ({words}); "
            "see the column 'error'"
        )
    if not total:
        say("there are no structures in what was given; check the paths")
    if failed == total:
        raise typer.Exit(NOTHING)
