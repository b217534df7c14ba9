"""``matxfer sources``: which of several models is the best base for a target."""

from __future__ import annotations

from typing import Annotated

import typer

from matxfer.cli_names import several_models
from matxfer.terminal import (
    AsJson,
    StructureColumn,
    counter_on_terminal,
    names,
    plain_warnings,
    print_json,
    ranking_lines,
    say_source,
)


def sources(
    table: Annotated[str, typer.Argument(help="Parquet or CSV table.")],
    target: Annotated[str, typer.Option(help="Column of values; its name ends in the unit.")],
    models: Annotated[
        str | None,
        typer.Option(
            help="Names and folders of models with commas between them, or folders that hold "
            "several (default: those shipped).",
            autocompletion=several_models,
        ),
    ] = None,
    split_column: Annotated[
        str | None, typer.Option(help="Column with train, val, test; else a seeded random split.")
    ] = None,
    most_rows: Annotated[
        int, typer.Option(help="At most so many training rows are looked at.")
    ] = 500,
    transform: Annotated[
        str | None, typer.Option(help="Scale of the target, as of matxfer finetune.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the rows that are drawn.")] = 0,
    structure_column: StructureColumn = None,
    as_json: AsJson = False,
) -> None:
    """Rank models as bases for a property, in seconds and without training.

    Kernel ridge regression on the frozen features of each model, layer by layer, with its
    leave-one-out error on training rows; beside it the composition alone and a network of random
    weights, which a model has to beat. matxfer finetune --model auto uses this ranking.
    """
    from matxfer.transfer.selection import rank_sources

    with plain_warnings(), counter_on_terminal("building graphs") as advance:
        ranking = rank_sources(
            table,
            target,
            models and names("--models", models),
            split_column=split_column,
            structure_column=structure_column,
            transform=transform,
            most_rows=most_rows,
            seed=seed,
            on_graphs=advance,
            on_source=None if as_json else say_source,
        )
    if as_json:
        print_json(ranking.to_json())
        return
    for line in ranking_lines(ranking.to_json()):
        typer.echo(line)
