"""``matxfer benchmark matbench``: Matbench v0.1 from local files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.benchmark.arguments import (
    DATA,
    MODEL,
    AsJson,
    BaseModel,
    Data,
    Epochs,
    Output,
    Threads,
    chosen_of,
    use_threads,
    write_document,
)
from matxfer.errors import OptionError
from matxfer.terminal import integers, interruptible, print_json, say

if TYPE_CHECKING:
    from matxfer.benchmark.matbench import MatbenchData, MatbenchTask
    from matxfer.benchmark.records import Record
    from matxfer.model import Model


def matbench(
    data: Data = DATA,
    model: BaseModel = MODEL,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Such as phonons,jdft2d (default: those that are there)."),
    ] = None,
    folds: Annotated[str, typer.Option("--folds", help="Some of the five.")] = "0,1,2,3,4",
    strategy: Annotated[
        str | None, typer.Option(help="auto, features, finetune or scratch, see finetune.")
    ] = None,
    transform: Annotated[
        str | None, typer.Option(help="Scale on which values are fitted, see finetune.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Plugins per fold; their mean is the prediction.")
    ] = 1,
    epochs: Epochs = None,
    seen_labels: Annotated[
        bool,
        typer.Option("--seen-labels", help="Play tasks on whose labels the base was pretrained."),
    ] = False,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Take other rows than the benchmark's, as a trial.")
    ] = False,
    algorithm: Annotated[str, typer.Option(help="Name on the leaderboard.")] = "matxfer v0.1",
    authors: Annotated[str | None, typer.Option(help="Authors on the leaderboard.")] = None,
    threads: Threads = None,
    output: Output = "runs/matbench",
    as_json: AsJson = False,
) -> None:
    """Play structure tasks of Matbench v0.1 from local files, and write a submission.

    DATA holds matbench_NAME.parquet (matxfer datasets fetch) or matbench_NAME.json.gz as published.
    Each fold is learned from its training rows alone. Writes OUTPUT/matbench.jsonl, one line per
    fold, and OUTPUT/matbench.md; of the tasks whose five folds are there also results.json.gz,
    info.json and run.py, the submission.
    """
    from matxfer.benchmark import matbench_report as report
    from matxfer.benchmark.matbench import N_FOLDS, read_task
    from matxfer.benchmark.matbench_files import AUTHORS, write_submission
    from matxfer.model import load_model

    given = {"strategy": strategy, "target_transform": transform, "epochs": epochs}
    options = {name: value for name, value in given.items() if value is not None}
    numbers = _folds(folds, N_FOLDS)
    use_threads(threads)
    base = load_model(model)
    played = []
    for task in _tasks(base, Path(data), tasks, seen_labels or strategy == "scratch"):
        found = read_task(task, Path(data), stand_in=stand_in)
        played.append((found, _records(base, found, numbers, options, repeats, output)))
    notes = report.notes_on(base, played, options)
    whole = [(found, records) for found, records in played if len(records) == N_FOLDS]
    if whole:
        names = write_submission(
            Path(output), whole, algorithm=algorithm, authors=authors or AUTHORS, notes=notes
        )
        say(f"{output}: {', '.join(names)} of {', '.join(found.task.name for found, _ in whole)}")
        if authors is None:
            say(f"the authors in {output}/info.json are missing; give --authors")
    else:
        say(f"no submission was written: that takes all {N_FOLDS} folds of a task")
    for note in notes:
        say(note)
    tables = report.tables(played, report.published_in(Path(data)))
    write_document(base, output, "matbench", report.TITLE, tables, as_json)
    if as_json:
        print_json({"tasks": report.summary(played), "notes": notes})


def _tasks(base: Model, folder: Path, asked: str | None, seen_too: bool) -> list[MatbenchTask]:
    """Return the tasks to play: those asked for, else those that are there and not seen."""
    from matxfer.benchmark.matbench import TASKS, file_of

    words = asked and asked.replace("matbench_", "")
    there = [name for name, task in TASKS.items() if file_of(task, folder) is not None]
    chosen = [TASKS[name] for name in chosen_of("--tasks", words, list(TASKS), there)]
    if not chosen:
        raise OptionError(
            f"{folder}: there is no task, such as matbench_phonons.parquet; fetch one with: "
            f"matxfer datasets fetch matbench_phonons -o {folder / 'matbench_phonons.parquet'}"
        )
    seen = [] if seen_too else [task for task in chosen if task.seen_by(base)]
    names = ", ".join(task.short for task in seen)
    advice = (
        f"{base.name} was pretrained on labels of {names}, those of test rows among them; use "
        "--strategy scratch there, or --seen-labels to play nevertheless"
    )
    if seen and (asked or len(seen) == len(chosen)):
        raise OptionError(advice)
    if seen:
        say(f"left out: {advice}")
    return [task for task in chosen if task not in seen]


def _folds(text: str, most: int) -> list[int]:
    numbers = sorted(set(integers("--folds", text)))
    if not set(numbers) <= set(range(most)):
        raise OptionError(f"--folds {text!r}: there are {', '.join(map(str, range(most)))}")
    return numbers


def _records(
    base: Model,
    data: MatbenchData,
    folds: list[int],
    options: dict[str, Any],
    repeats: int,
    output: str,
) -> list[Record]:
    """Play the folds that are not there yet; return the records of all."""
    from matxfer.benchmark.matbench_play import play, run_of
    from matxfer.benchmark.records import Records, complete

    records = Records(Path(output) / "matbench.jsonl", on_damage=say)
    wanted = [run_of(base, data, fold, options, repeats) for fold in folds]
    there = len(wanted) - len(records.missing(wanted))
    say(f"{data.task.name}: {len(wanted)} folds, {there} of them in {records.path}")
    with interruptible("; the same command goes on where it stopped"):
        return complete(records, wanted, lambda run: play(base, data, run), _say_record)


def _say_record(record: Record) -> None:
    run, scores = record["run"], record["scores"]
    figure = f"MAE {scores['mae']:.4g}" if "mae" in scores else f"AUC {record['auc']:.4g}"
    chosen = "; ".join(dict.fromkeys(record["parameters"]["chosen"]))
    say(f"{run['task']} fold {run['fold']}: {figure} in {record['seconds']:.0f} s, {chosen}")
