"""``matxfer shift``: whether a source fits a target, and which kind of gap there is."""

from __future__ import annotations

from typing import Annotated

import typer

from matxfer.cli_names import ModelOption  # noqa: TC001 - Typer reads the annotations
from matxfer.terminal import (
    AsJson,
    StructureColumn,
    counter_on_terminal,
    integers,
    plain_warnings,
    print_json,
    say,
)


def shift(
    source: Annotated[str, typer.Argument(help="Table, file or folder of the source.")],
    target: Annotated[str, typer.Argument(help="Table, file or folder of the target.")],
    column: Annotated[
        str | None,
        typer.Option("--target", help="Column of the target's values; its name ends in the unit."),
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(help="Column of the source's values, if it has another name.")
    ] = None,
    model: ModelOption = "mp-base",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to compare, such as 0,4 (default: first, middle and last)."),
    ] = None,
    sample: Annotated[
        int, typer.Option(help="At most so many structures of each are looked at closely.")
    ] = 1000,
    split_column: Annotated[
        str | None,
        typer.Option(
            help="Column of SOURCE with train, val, test: the model's own error is that on rows it "
            "was not fitted to (default: split, if there is one)."
        ),
    ] = None,
    permutations: Annotated[int, typer.Option(help="Of the labels, for p-values.")] = 499,
    try_remedies: Annotated[
        bool,
        typer.Option(
            "--try-remedies",
            help="Try corrections, weights and invariant features, and measure what helps on "
            "target values; a minute or two.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of samples and permutations.")] = 0,
    figure: Annotated[
        str | None, typer.Option(help="Draw map, elements and residuals to this PNG file.")
    ] = None,
    structure_column: StructureColumn = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether SOURCE fits TARGET: other structures, other rules, both or neither.

    Covariate shift (other structures): tests on fingerprints of several layers, elements,
    prototypes, volumes. Concept shift (other rules): with --target, whether the same structure has
    another value. A gap is told if it is sure and if it matters; --json gives the booleans
    covariate_shift and concept_shift (null: cannot be told) and the statistics.
    """
    from matxfer.domain.diagnosis import diagnose

    with plain_warnings(), counter_on_terminal("building graphs") as advance:
        found = diagnose(
            source,
            target,
            column=column,
            source_column=source_column,
            model=model,
            layers=integers("--layers", layers) if layers else None,
            sample=sample,
            split_column=split_column,
            structure_column=structure_column,
            permutations=permutations,
            try_remedies=try_remedies,
            seed=seed,
            on_graphs=advance,
        )
    if figure:
        from matxfer.domain.figures import draw_diagnosis

        drawn = draw_diagnosis(found, figure)
        say(f"{figure}: written" if drawn else "matplotlib is not installed, so nothing is drawn")
    if as_json:
        print_json(found.to_json())
        return
    for line in found.lines():
        typer.echo(line)
