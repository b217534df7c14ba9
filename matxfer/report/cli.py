"""``matxfer report``: a plugin as one page."""

from __future__ import annotations

from typing import Annotated

import typer

from matxfer.cli_names import ModelOfPlugins, report_places
from matxfer.terminal import (
    StructureColumn,
    counter_on_terminal,
    plain_warnings,
    say,
)


def report(
    plugin: Annotated[
        str,
        typer.Argument(
            help="Folder of a plugin, or of a saved TransferClassifier.",
            autocompletion=report_places,
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="The page.")] = "report.html",
    data: Annotated[
        str | None,
        typer.Option(help="Table with the target: predict its rows anew, and show these."),
    ] = None,
    source_data: Annotated[
        str | None,
        typer.Option(
            help="Table of source structures: what became of the source and, with --data, the "
            "domain gap."
        ),
    ] = None,
    model: ModelOfPlugins = None,
    target: Annotated[
        str | None,
        typer.Option(help="Column of labels of --data, of a classifier whose y had no name."),
    ] = None,
    split_column: Annotated[
        str | None,
        typer.Option(help="Column with train, val, test of --data, if not that of the plugin."),
    ] = None,
    sample: Annotated[
        int, typer.Option(help="At most so many source and target structures are compared.")
    ] = 300,
    structure_column: StructureColumn = None,
) -> None:
    """Write what is known of PLUGIN as one HTML page that opens without a network.

    What it is, its data, predictions against true values, errors by element, calibration, training,
    retention of the source, domain gap, provenance, how to use and cite it. Without --data the page
    shows the validation and test rows that the plugin keeps; of a classifier the samples of its
    folds: how well classes are told apart, confusions, and whether probabilities are frequencies.
    """
    from matxfer.report.page import write_report

    with plain_warnings(), counter_on_terminal("structures") as advance:
        write_report(
            plugin,
            output,
            data=data,
            source_data=source_data,
            model=model,
            target=target,
            split_column=split_column,
            structure_column=structure_column,
            sample=sample,
            on_progress=advance,
        )
    say(f"{output}: written; open it in a browser")
