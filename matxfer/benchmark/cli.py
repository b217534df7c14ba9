"""``matxfer benchmark``: what transfer is worth on the small tasks, in tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.benchmark.arguments import (
    DATA,
    MODEL,
    OUTPUT,
    AsJson,
    BaseModel,
    Data,
    Epochs,
    Output,
    Splits,
    Tasks,
    Threads,
    chosen_of,
    use_threads,
    write_document,
)
from matxfer.benchmark.matbench_cli import matbench
from matxfer.errors import OptionError
from matxfer.terminal import integers, interruptible, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matxfer.benchmark.bench import Bench
    from matxfer.benchmark.records import Record

app = typer.Typer(
    name="benchmark",
    help="What transfer is worth: the eight small tasks beside published results, learning curves, "
    "the target's error against the source's, and Matbench v0.1. A killed benchmark goes on with "
    "the same command; several may run side by side.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command()(matbench)


@app.command()
def transfer(
    data: Data = DATA,
    model: BaseModel = MODEL,
    tasks: Tasks = None,
    splits: Splits = "0,1,2,3,4",
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            help="auto, scratch, features, readouts (all layers frozen), 'K frozen', "
            "'K frozen + EWC', with commas between them (default: all).",
        ),
    ] = None,
    epochs: Epochs = None,
    threads: Threads = None,
    output: Output = OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Strategies of fine-tuning against scratch and published results.

    Writes OUTPUT/runs.jsonl, one line per run, and OUTPUT/transfer.md. The tables show all runs
    that are there.
    """
    from matxfer.benchmark import transfer as benchmark
    from matxfer.benchmark.summary import Results, summarised

    bench = _bench(data, model, epochs, threads)
    known = list(benchmark.variants(bench.last))
    wanted = benchmark.runs(
        bench,
        chosen_of("--tasks", tasks, bench.data.names, bench.data.names),
        chosen_of("--variants", variants, known, known),
        integers("--splits", splits),
    )
    _complete(bench, wanted, output)
    records = _records(bench, output)
    write_document(
        bench.model, output, "transfer", benchmark.TITLE, benchmark.tables(bench, records), as_json
    )
    if as_json:
        named = benchmark.named(bench, records)
        print_json(summarised(Results(named, bench.data.published)))


@app.command()
def curves(
    data: Data = DATA,
    model: BaseModel = MODEL,
    tasks: Tasks = None,
    splits: Splits = "0,1,2",
    variants: Annotated[
        str | None,
        typer.Option("--variants", help="See transfer (default: auto,readouts,scratch)."),
    ] = None,
    shares: Annotated[
        str, typer.Option("--shares", help="Percent of the training rows.")
    ] = "5,10,25,50,100",
    epochs: Epochs = None,
    threads: Threads = None,
    output: Output = OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Error against the number of training rows, and epochs to be as good as scratch.

    Writes OUTPUT/runs.jsonl, one line per run, and OUTPUT/curves.csv, curves.png and curves.md of
    the runs asked for. Default tasks: jarvis_2d_eform, mp_phonons, mp_eps_electronic.
    """
    from matxfer.benchmark import curves as benchmark
    from matxfer.benchmark.transfer import variants as known_variants

    percents = integers("--shares", shares)
    if not all(0 < percent <= 100 for percent in percents):
        raise OptionError(f"--shares {shares!r}: write percent of the rows, from 1 to 100")
    bench = _bench(data, model, epochs, threads)
    wanted = benchmark.runs(
        bench,
        chosen_of("--tasks", tasks, bench.data.names, benchmark.TASKS),
        chosen_of("--variants", variants, list(known_variants(bench.last)), benchmark.VARIANTS),
        integers("--splits", splits),
        [percent / 100 for percent in percents],
    )
    rows = benchmark.rows(bench, _complete(bench, wanted, output))
    drawn = benchmark.draw(rows, Path(output) / "curves.png")
    _write_rows(rows, output, "curves", drawn)
    write_document(bench.model, output, "curves", benchmark.TITLE, benchmark.tables(rows), as_json)
    if as_json:
        print_json({"rows": rows})


@app.command()
def plane(
    data: Data = DATA,
    model: BaseModel = MODEL,
    tasks: Tasks = None,
    splits: Splits = "0",
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="ewc, l2sp, replay, ewc+replay, freezing (default: all)."),
    ] = None,
    strengths: Annotated[
        str | None,
        typer.Option("--strengths", help="λ of all ways (default: 0.01 … 100; replay: 0.1 … 10)."),
    ] = None,
    epochs: Epochs = None,
    threads: Threads = None,
    output: Output = OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Target error against source error, over λ and frozen layers.

    Writes OUTPUT/runs.jsonl, one line per run, and OUTPUT/plane.csv, plane.png and plane.md of
    the runs asked for. Default tasks: jarvis_2d_eform, mp_phonons.
    """
    from matxfer.benchmark import plane as benchmark

    by_way: dict[str, Sequence[float]] = dict(benchmark.STRENGTHS)
    if strengths is not None:
        by_way = dict.fromkeys(by_way, _numbers("--strengths", strengths))
    bench = _bench(data, model, epochs, threads)
    asked = (
        chosen_of("--tasks", tasks, bench.data.names, benchmark.TASKS),
        chosen_of("--methods", methods, benchmark.METHODS, benchmark.METHODS),
        integers("--splits", splits),
        by_way,
    )
    records = _complete(bench, benchmark.runs(bench, *asked), output)
    rows = benchmark.rows(bench, records, *asked)
    drawn = benchmark.draw(rows, Path(output) / "plane.png")
    _write_rows(rows, output, "plane", drawn)
    write_document(bench.model, output, "plane", benchmark.TITLE, benchmark.tables(rows), as_json)
    if as_json:
        print_json({"rows": rows})


def _bench(data: str, model: str, epochs: int | None, threads: int | None) -> Bench:
    from matxfer.benchmark.bench import Bench
    from matxfer.benchmark.tasks import DataFolder
    from matxfer.model import load_model

    folder = DataFolder(data)
    if not folder.published:
        places = " or ".join(map(str, folder.published_places))
        say(f"no published results in {places}: the tables go without; put the file there")
    use_threads(threads)
    return Bench(load_model(model), folder, epochs)


def _complete(bench: Bench, wanted: list[dict[str, Any]], output: str) -> list[Record]:
    """Carry out the runs that are not there yet; return the records of all."""
    from matxfer.benchmark.records import Records, complete

    records = Records(Path(output) / "runs.jsonl", on_damage=say)
    there = len(wanted) - len(records.missing(wanted))
    say(f"{len(wanted)} runs, {there} of them in {records.path}")
    with interruptible("; the same command goes on where it stopped"):
        return complete(records, wanted, bench.measure, _say_record)


def _records(bench: Bench, output: str) -> list[Record]:
    """Return all records of this base and limit of epochs, in the order of tasks and splits."""
    from matxfer.benchmark.records import Records

    names = bench.data.names
    same = bench.run("", 0, {})
    found = []
    for record in Records(Path(output) / "runs.jsonl").read():
        run = record["run"]
        ours = all(run[key] == same[key] for key in ("model", "weights"))
        limited = run["options"].get("epochs") == same["options"].get("epochs")
        if ours and limited and run["task"] in names:
            found.append(record)
    return sorted(found, key=lambda r: (names.index(r["run"]["task"]), r["run"]["split"]))


def _say_record(record: Record) -> None:
    run = record["run"]
    options = " ".join(f"{k} {v}" for k, v in run["options"].items() if k != "strategy")
    what = f"{run['options']['strategy']} {options}".strip()
    part = "" if run["share"] == 1 else f" {run['share']:.0%} of the rows"
    say(
        f"{run['task']} split {run['split']}{part}, {what}: test MAE {record['test']:.4g} "
        f"in {record['seconds']:.1f} s"
    )


def _write_rows(rows: Sequence[dict[str, Any]], output: str, name: str, drawn: bool) -> None:
    """Write the numbers of a figure; say so if that is all."""
    from matxfer.benchmark.figures import write_csv

    write_csv(rows, Path(output) / f"{name}.csv")
    if not drawn:
        say(f"matplotlib is not installed, so {name}.png is not drawn; {name}.csv has its numbers")


def _numbers(option: str, text: str) -> list[float]:
    """Read numbers that are not negative, with commas between them."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise OptionError(f"{option} {text!r}: write numbers with commas, such as 0.1,1,10")
    return values
