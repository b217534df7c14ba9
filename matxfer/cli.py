"""The ``matxfer`` command: arguments in, tables out; nothing heavy before it is needed."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from matxfer.benchmark.cli import app as benchmark_app
from matxfer.cli_names import ModelOfPlugins, model_names, plugin_places
from matxfer.cli_shape import TreeGroup, farewell, in_front, root, silent_log, with_examples
from matxfer.datasets_cli import app as datasets_app
from matxfer.domain.cli import shift
from matxfer.finetune_cli import finetune
from matxfer.plugins_cli import app as plugins_app
from matxfer.potential_cli import potential
from matxfer.predict_cli import predict
from matxfer.probing.cli import probe
from matxfer.report.cli import report
from matxfer.simulate_cli import md, relax
from matxfer.sources_cli import sources
from matxfer.terminal import (
    AsJson,
    StructureColumn,
    condition,
    counter_on_terminal,
    figures_line,
    interruptible,
    plain_warnings,
    print_json,
    told_in_one_line,
)

app = typer.Typer(
    name="matxfer",
    cls=TreeGroup,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.callback()(root)
app.command()(predict)
app.command()(relax)
app.command()(md)
app.command()(finetune)
app.command()(potential)
app.command()(shift)
app.command()(sources)
app.command()(probe)
app.command()(report)
app.add_typer(benchmark_app)
app.add_typer(datasets_app)
app.add_typer(plugins_app)


@app.command()
def consolidate(
    plugin: Annotated[
        str, typer.Argument(help="Folder of a plugin.", autocompletion=plugin_places)
    ],
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
    plugin: Annotated[
        str | None,
        typer.Option(help="Folder of the plugin to evaluate.", autocompletion=plugin_places),
    ] = None,
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
        str | None,
        typer.Argument(
            help="Print the card of this model (or folder).", autocompletion=model_names
        ),
    ] = None,
    backbones: Annotated[
        bool, typer.Option("--backbones", help="List the networks that installed packages declare.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List models, their size and their test errors, or print one model's card.

    First the shipped ones, then those that come with other packages, such as CHGNet.
    """
    from matxfer import model_card
    from matxfer.model import available_models, find_model, models_of_packages

    if backbones:
        found = model_card.backbones()
        if as_json:
            print_json(found)
        for kind, told in {} if as_json else found.items():
            extra = f"; pip install '{told['package']}[{told['extra']}]'" if told["extra"] else ""
            typer.echo(f"{kind}: {told['class']} ({told['package']}{extra})")
    elif as_json:
        cards = {n: find_model(n)[1] for n in available_models()}
        print_json(find_model(name)[1] if name else cards)
    elif name:
        typer.echo(model_card.full_text(name))
    else:
        for shipped in available_models():
            typer.echo(model_card.one_line(shipped))
        for brought in models_of_packages():
            typer.echo(model_card.line_of_package(brought))


def main() -> None:
    """Run the command; known problems end in one line on stderr and exit code 2."""
    # Threads that wait should sleep: on a busy machine spinning ones slow a call a hundredfold.
    # Read once by the OpenMP library, so it has to be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    silent_log()
    with told_in_one_line(), warnings.catch_warnings():
        command = with_examples(typer.main.get_command(app))
        try:
            command(args=in_front(sys.argv[1:]), prog_name="matxfer", standalone_mode=True)
        finally:
            farewell()
