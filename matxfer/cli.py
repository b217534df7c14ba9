"""The ``matxfer`` command: arguments in, tables out; nothing heavy before it is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from matxfer.benchmark.cli import app as benchmark_app
from matxfer.errors import MatxferError
from matxfer.terminal import (
    condition,
    counted,
    counter_on_terminal,
    figures_line,
    integers,
    interruptible,
    plain_warnings,
    print_json,
    say,
    say_trial,
    strength_of,
)

app = typer.Typer(
    name="matxfer",
    help="Transfer learning for crystals: predict properties of structure files with a pretrained "
    "network, and fine-tune small plugins for properties of your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(benchmark_app)

ModelOption = Annotated[
    str, typer.Option("--model", help="Base model: a shipped one by name, or its folder.")
]
StructureColumn = Annotated[
    str | None,
    typer.Option(help="Column of structures (CIF text, paths or JSON) of a table."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
#: The same name as in matxfer.model, which would import torch.
DEFAULT_MODEL = "mp-base"


@app.command()
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Structure files, tables, folders or globs.", metavar="INPUT..."),
    ],
    model: ModelOption = DEFAULT_MODEL,
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", help="Folder of a plugin; may be repeated.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="OUT.csv, .parquet, .jsonl, .extxyz or .db."),
    ] = None,
    structure_column: StructureColumn = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read files and build graphs.")
    ] = None,
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
    row and says why. Exit code 1 if no structure could be predicted.
    """
    from matxfer import output as out
    from matxfer.output_metadata import describe_prediction
    from matxfer.output_structures import with_crystals
    from matxfer.prediction import Predictor
    from matxfer.readers import with_standard_input
    from matxfer.screening import Screen

    if output is not None:
        out.output_format(output)
    inputs = with_standard_input(inputs, input_format)
    predictor = Predictor(model, plugin or [])
    chosen = columns and [name.strip() for name in columns.split(",")]
    screen = Screen(predictor.columns, where=where, sort_by=sort_by, top=top, columns=chosen)
    rows = predictor.rows(inputs, structure_column=structure_column, workers=workers)
    if output is None and sys.stdout.isatty():
        out.print_table(screen(rows), screen.columns)
    elif output is None:
        out.write_csv(screen(rows), screen.columns, sys.stdout)
    else:
        if out.holds_structures(output):
            rows = with_crystals(rows, inputs, structure_column)
        of = predictor.model, predictor.plugins, screen.columns
        facts = describe_prediction(*of, **screen.choices())
        advice = f"; the rows so far are in {output}.part"
        with interruptible(advice), counter_on_terminal("predicting") as advance:
            out.write_rows(screen(counted(rows, advance)), screen.columns, output, facts)
    total, failed = screen.seen, screen.failed
    if failed:
        say(f"{failed} of {total} structures could not be predicted; see the column 'error'")
    if summary := screen.summary():
        say(summary)
    if not total:
        say("there are no structures in what was given; check the paths")
    if failed == total:
        raise typer.Exit(1)


@app.command()
def finetune(
    table: Annotated[str, typer.Argument(help="Parquet or CSV table.")],
    target: Annotated[str, typer.Option(help="Column of values; its name ends in the unit.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder of the plugin.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    split_column: Annotated[
        str | None, typer.Option(help="Column with train, val, test; else a seeded random split.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="auto: try the others, keep the best on validation rows; features: a simple model "
            "on fingerprints; finetune: readouts and layers; scratch: from random weights."
        ),
    ] = None,
    freeze: Annotated[
        int | None,
        typer.Option(help="Frozen message-passing layers: 0 none … L all but the readout."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers that the readout reads, such as 2,4 (default all).")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="ridge, kernel_ridge, gaussian_process or forest, of --strategy features."
        ),
    ] = None,
    difference: Annotated[
        bool | None,
        typer.Option(help="Learn the difference from the base's own prediction, if it has one."),
    ] = None,
    retain: Annotated[
        str | None,
        typer.Option(
            help="Hold on to what the source needs: none, ewc, l2sp, distill, replay, ewc+replay."
        ),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(help="λ of the retention (1: the source's full posterior), or auto."),
    ] = None,
    source_data: Annotated[
        str | None,
        typer.Option(help="Table of source structures: to rehearse, and to measure forgetting on."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="At most so many passes.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many passes without improvement.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Crystals per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the last layer.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Learning rate of a layer over that of the one above.")
    ] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="Of the readout.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On the readout.")] = None,
    unfreeze_every: Annotated[
        int | None, typer.Option(help="Free one layer more, from the top, every so many epochs.")
    ] = None,
    average: Annotated[
        float | None, typer.Option(help="Decay of a running average of the weights; 0: none.")
    ] = None,
    readout: Annotated[
        str | None, typer.Option(help="atomwise, pooled, extrema or statistics.")
    ] = None,
    members: Annotated[int | None, typer.Option(help="Readouts in the ensemble.")] = None,
    transform: Annotated[
        str | None, typer.Option(help="identity, nonnegative, log, log10 or log1p.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Initial weights, order, random split.")] = None,
    structure_column: StructureColumn = None,
    as_json: AsJson = False,
) -> None:
    """Train a plugin for one property of a table.

    What the frozen layers of the base model make of the structures is computed once and kept; by
    default several strategies on top of it are tried, the best on the validation rows is kept,
    and the test rows are reported once.
    """
    from matxfer.transfer.finetune import finetune as run

    options: dict[str, Any] = {
        "strategy": strategy,
        "freeze": freeze,
        "layers": layers and tuple(integers("--layers", layers)),
        "features": features,
        "difference": difference,
        "unfreeze_every": unfreeze_every,
        "average": average,
        "members": members,
        "retain": retain,
        "strength": strength and strength_of(strength),
        "epochs": epochs,
        "patience": patience,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "layer_decay": layer_decay,
        "head_learning_rate": head_learning_rate,
        "weight_decay": weight_decay,
        "readout": readout,
        "transform": transform,
        "seed": seed,
    }
    folder = output or f"{Path(table).stem}-plugin"
    with interruptible(), counter_on_terminal("building graphs") as advance:
        plugin = run(
            table,
            target,
            folder,
            model=model,
            split_column=split_column,
            structure_column=structure_column,
            source_data=source_data,
            on_graphs=advance,
            on_trial=None if as_json else say_trial,
            **{name: value for name, value in options.items() if value is not None},
        )
    if as_json:
        print_json({"plugin": folder, **plugin.meta})
        return
    typer.echo(f"chosen: {plugin.meta['chosen']}")
    for part, figures in plugin.meta["figures"].items():
        typer.echo(f"{part:5s} {figures_line(figures)}")
        if "coverage" in figures:
            level, coverage = figures["coverage_level"], figures["coverage"]
            typer.echo(f"      {level:.0%} intervals hold {coverage:.0%} of the values")
    drift = plugin.meta["retention"]["drift"]
    typer.echo(
        "drift of the source predictions on these structures, were the base to share the layers:"
    )
    for name, entry in drift.items():
        typer.echo(f"      {name}: {entry['mean_absolute_drift']:.4g} {entry['unit']}")
    for name, entry in plugin.meta["retention"].get("source_error", {}).items():
        before, after = f"{entry['before']:.4g} before", f"{entry['after']:.4g} after"
        typer.echo(f"      {name}: {entry['scale']} {before}, {after}")
    typer.echo(
        f"{folder}: written in {plugin.meta['seconds']:.1f} s; use it with --plugin {folder}"
    )


@app.command()
def evaluate(
    table: Annotated[str, typer.Argument(help="Parquet or CSV table.")],
    target: Annotated[str, typer.Option(help="Column of true values.")],
    plugin: Annotated[str | None, typer.Option(help="Folder of the plugin to evaluate.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    split_column: Annotated[str | None, typer.Option(help="Column that names the split.")] = None,
    split: Annotated[str, typer.Option(help="Which rows, with --split-column.")] = "test",
    where: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=VALUE: only rows that have it; may be repeated."),
    ] = None,
    structure_column: StructureColumn = None,
    as_json: AsJson = False,
) -> None:
    """Compare predictions with a column of a table: MAE, RMSE, R² and n."""
    from matxfer.evaluation import evaluate as run

    conditions = dict(condition(text) for text in where or [])
    with counter_on_terminal("building graphs") as advance:
        figures = run(
            table,
            target,
            plugin,
            model=model,
            split_column=split_column,
            split=split,
            where=conditions,
            structure_column=structure_column,
            on_graphs=advance,
        )
    if as_json:
        print_json(figures)
    else:
        typer.echo(figures_line(figures))
        for reason, count in figures["excluded"].items():
            typer.echo(f"left out: {count} rows, {reason}")


@app.command()
def pretrain(
    config: Annotated[str, typer.Argument(help="YAML file, see pretrained/mp-base/config.yaml.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder of the finished model.")
    ] = None,
    run_folder: Annotated[
        str | None, typer.Option(help="Folder of checkpoints and logs (default runs/NAME).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pretrain a model on several source properties at once.

    CONFIG is a YAML file; pretrained/mp-base/config.yaml is a whole one, and this a small one:

    \b
      name: mine
      sources:                       # tables, relative to the file
        - table: energies.parquet
          targets: [formation_energy_ev_per_atom]   # columns, units in their names
          split_column: split        # train, val, test; without: a seeded random split
        - {table: structures.parquet, denoise_angstrom: 0.1}  # no labels: learns geometry
      network: {n_layers: 4, node_dim: 128, edge_dim: 64, angular_dim: 16}
      training: {epochs: 20, batch_size: 64, learning_rate: 1.0e-3}
      trainer: {accelerator: auto, devices: 1}      # goes to lightning.Trainer as it is

    Checkpoints (last.ckpt, best.ckpt) and learning_curves.csv and .png lie in the run folder; a
    killed run goes on with the same command and --resume, which takes no changed file. A GPU is
    used where there is one; for several devices set devices, num_nodes and strategy in trainer.
    """  # noqa: D301 - the escape tells click to leave the block as it is
    from matxfer.pretraining.config import read_config
    from matxfer.pretraining.run import pretrain as run

    settings = read_config(config)
    folder = output or str(Path("runs") / settings.name / "model")
    advice = "; the same command with --resume goes on after the last whole epoch"
    counter = counter_on_terminal("building graphs")
    with interruptible(advice), plain_warnings(), counter as advance:
        model = run(settings, folder, run_folder=run_folder, resume=resume, on_progress=advance)
    if "figures" not in model.card:
        return  # one of several processes; the first one writes the model and speaks
    if as_json:
        print_json(model.card)
        return
    for name, parts in model.card["figures"].items():
        typer.echo(f"{name}: {figures_line(parts['test'])}")
    typer.echo(f"{folder}: written")


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(help="Print the card of this model (or folder).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the shipped models, their size and their test errors, or print one model's card."""
    from matxfer import model_card
    from matxfer.model import available_models, find_model

    if as_json:
        cards = {n: find_model(n)[1] for n in available_models()}
        print_json(find_model(name)[1] if name else cards)
    elif name:
        typer.echo(model_card.full_text(name))
    else:
        for found in available_models():
            typer.echo(model_card.one_line(found))


def main() -> None:
    """Run the command; known problems end in one line on stderr and exit code 2."""
    # Threads that wait should sleep: on a busy machine spinning ones slow a call a hundredfold.
    # Read once by the OpenMP library, so it has to be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of the pipe has seen enough
        sys.stderr.close()
        sys.exit(141)
    except (MatxferError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
