"""The ``matxfer`` command: arguments in, tables out; nothing heavy before it is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from matxfer.benchmark.cli import app as benchmark_app
from matxfer.domain.cli import shift
from matxfer.predict_cli import predict
from matxfer.terminal import (
    AsJson,
    ModelOfPlugins,
    ModelOption,
    StructureColumn,
    condition,
    counter_on_terminal,
    figures_line,
    integers,
    interruptible,
    plain_warnings,
    plugin_lines,
    print_json,
    say_trial,
    strength_of,
    told_in_one_line,
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
app.command()(predict)
app.command()(shift)
app.add_typer(benchmark_app)

#: The same name as in matxfer.model, which would import torch.
DEFAULT_MODEL = "mp-base"


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
        str | None,
        typer.Option(
            help="identity, nonnegative, log, log10, log1p, bounded(LOW,HIGH), or auto: chosen on "
            "validation rows (default: that of the property)."
        ),
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
    with plain_warnings(), counter_on_terminal("building graphs") as advance:
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
    for line in plugin_lines(plugin.meta):
        typer.echo(line)
    typer.echo(
        f"{folder}: written in {plugin.meta['seconds']:.1f} s; use it with --plugin {folder}"
    )


@app.command()
def consolidate(
    plugin: Annotated[str, typer.Argument(help="Folder of a plugin.")],
    table: Annotated[str, typer.Argument(help="The table that it was trained on.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the new model.")],
    model: ModelOfPlugins = None,
    gamma: Annotated[
        float, typer.Option(help="How much of the base's Fisher information still counts, 0 to 1.")
    ] = 1.0,
    split_column: Annotated[
        str | None, typer.Option(help="Column with train, val, test, if not that of the plugin.")
    ] = None,
    samples: Annotated[int, typer.Option(help="At most so many rows are looked at.")] = 1000,
    structure_column: StructureColumn = None,
    as_json: AsJson = False,
) -> None:
    """Make a base model of a plugin, to fine-tune the next one on (online EWC).

    The model has the plugin's layers and the source heads; its Fisher information is that of the
    base times gamma plus that of the plugin. The plugin's head, and those of earlier rounds, lie
    beside it in the folder plugins.
    """
    from matxfer.transfer.consolidate import consolidate as run

    with plain_warnings(), counter_on_terminal("building graphs") as advance:
        made = run(
            plugin,
            table,
            output,
            model=model,
            gamma=gamma,
            split_column=split_column,
            structure_column=structure_column,
            samples=samples,
            on_graphs=advance,
        )
    if as_json:
        print_json(made.card)
        return
    typer.echo(f"{output}: written; fine-tune the next property with --model {output}")
    typer.echo(f"{output}/plugins: what was learned so far, as plugins of it")


@app.command()
def evaluate(
    table: Annotated[str, typer.Argument(help="Parquet or CSV table.")],
    target: Annotated[str, typer.Option(help="Column of true values.")],
    plugin: Annotated[str | None, typer.Option(help="Folder of the plugin to evaluate.")] = None,
    model: ModelOfPlugins = None,
    split_column: Annotated[str | None, typer.Option(help="Column that names the split.")] = None,
    split: Annotated[str, typer.Option(help="Which rows, with --split-column.")] = "test",
    where: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=VALUE: only rows that have it; may be repeated."),
    ] = None,
    weights_for: Annotated[
        str | None,
        typer.Option(
            help="Table, file or folder of a target: weigh rows by how much they resemble it."
        ),
    ] = None,
    structure_column: StructureColumn = None,
    as_json: AsJson = False,
) -> None:
    """Compare predictions with a column of a table: MAE, RMSE, R² and n."""
    from matxfer.evaluation import evaluate as run

    conditions = dict(condition(text) for text in where or [])
    with plain_warnings(), counter_on_terminal("building graphs") as advance:
        weigh = None
        if weights_for is not None:
            from matxfer.domain.weighing import weights_for as weights_of

            weigh = weights_of(weights_for)
        figures = run(
            table,
            target,
            plugin,
            model=model,
            split_column=split_column,
            split=split,
            where=conditions,
            structure_column=structure_column,
            weigh=weigh,
            on_graphs=advance,
        )
    if as_json:
        print_json(figures)
    else:
        typer.echo(figures_line(figures))
        if weighted := figures.get("weighted"):
            rows = weighted["weights"]["effective_rows"]
            line = figures_line({k: v for k, v in weighted.items() if k != "weights"})
            typer.echo(f"weighed for {weights_for}: {line}, as good as {rows:.0f} rows")
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
        - {table: frames.parquet, forces: forces_ev_per_a, max_force_ev_per_a: 10.0}
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
    with told_in_one_line():
        app(standalone_mode=True)
