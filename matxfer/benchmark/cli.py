"""``matxfer benchmark``: what transfer is worth on the small tasks, in tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.errors import OptionError
from matxfer.terminal import integers, interruptible, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matxfer.benchmark.bench import Bench
    from matxfer.benchmark.markdown import Table
    from matxfer.benchmark.records import Record

app = typer.Typer(
    name="benchmark",
    help="What transfer is worth: the eight small tasks beside published results, learning curves, "
    "and the target's error against the source's. A killed benchmark goes on with the same "
    "command; several may run side by side.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

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
        _chosen("--tasks", tasks, bench.data.names, bench.data.names),
        _chosen("--variants", variants, known, known),
        integers("--splits", splits),
    )
    _complete(bench, wanted, output)
    records = _records(bench, output)
    _write(bench, output, "transfer", benchmark.TITLE, benchmark.tables(bench, records), as_json)
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
        _chosen("--tasks", tasks, bench.data.names, benchmark.TASKS),
        _chosen("--variants", variants, list(known_variants(bench.last)), benchmark.VARIANTS),
        integers("--splits", splits),
        [percent / 100 for percent in percents],
    )
    rows = benchmark.rows(bench, _complete(bench, wanted, output))
    drawn = benchmark.draw(rows, Path(output) / "curves.png")
    _write_rows(rows, output, "curves", drawn)
    _write(bench, output, "curves", benchmark.TITLE, benchmark.tables(rows), as_json)
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
        _chosen("--tasks", tasks, bench.data.names, benchmark.TASKS),
        _chosen("--methods", methods, benchmark.METHODS, benchmark.METHODS),
        integers("--splits", splits),
        by_way,
    )
    records = _complete(bench, benchmark.runs(bench, *asked), output)
    rows = benchmark.rows(bench, records, *asked)
    drawn = benchmark.draw(rows, Path(output) / "plane.png")
    _write_rows(rows, output, "plane", drawn)
    _write(bench, output, "plane", benchmark.TITLE, benchmark.tables(rows), as_json)
    if as_json:
        print_json({"rows": rows})


def _bench(data: str, model: str, epochs: int | None, threads: int | None) -> Bench:
    import torch

    from matxfer.benchmark.bench import Bench
    from matxfer.benchmark.tasks import DataFolder
    from matxfer.data.store import available_cpus
    from matxfer.model import load_model

    if threads is not None and threads < 1:
        raise OptionError(f"--threads is {threads}, but must be at least 1")
    folder = DataFolder(data)
    if not folder.published:
        places = " or ".join(map(str, folder.published_places))
        say(f"no published results in {places}: the tables go without; put the file there")
    torch.set_num_threads(threads or available_cpus())
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


def _write(
    bench: Bench, output: str, name: str, title: str, tables: Sequence[Table], as_json: bool
) -> None:
    """Write (and print) the tables."""
    import torch

    from matxfer.benchmark import markdown

    about = markdown.facts(
        torch.get_num_threads(), model=bench.model.name, weights=bench.model.checksum[:12]
    )
    text = markdown.document(title, markdown.command_line("matxfer"), about, tables)
    (Path(output) / f"{name}.md").write_text(text, encoding="utf-8")
    if not as_json:
        typer.echo(text)


def _chosen(
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


def _numbers(option: str, text: str) -> list[float]:
    """Read numbers that are not negative, with commas between them."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise OptionError(f"{option} {text!r}: write numbers with commas, such as 0.1,1,10")
    return values
