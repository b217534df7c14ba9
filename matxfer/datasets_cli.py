"""``matxfer datasets``: public datasets, from their address to a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from matxfer.terminal import (
    AsJson,
    counter_on_terminal,
    download_on_terminal,
    interruptible,
    print_json,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matxfer.datasets.card import DatasetCard

app = typer.Typer(
    name="datasets",
    help="Public datasets (Matbench, JARVIS-DFT, matminer's collection): where they are, and "
    "tables of them with the unit in each column's name.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_datasets(as_json: AsJson = False) -> None:
    """List the datasets that have a card, with their rows and columns of values."""
    from matxfer.datasets.card import available_datasets, find_card

    cards = [find_card(name) for name in available_datasets()]
    if as_json:
        print_json({card.name: card.to_json() for card in cards})
        return
    wide = max(len(card.name) for card in cards)
    for card in cards:
        names = ", ".join(column.name for column in card.columns[:3])
        more = ", …" if len(card.columns) > 3 else ""
        typer.echo(f"{card.name:{wide}s} {card.rows:8,d}  {names}{more}")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Name of a dataset, or a card (.toml).")],
    as_json: AsJson = False,
) -> None:
    """Print a dataset's card: what it holds, in which units, where it is, whom to cite."""
    from matxfer.datasets.card import find_card

    card = find_card(name)
    if as_json:
        print_json(card.to_json())
    else:
        for line in _card_lines(card):
            typer.echo(line)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name of a dataset, or a card (.toml).")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Parquet file (default NAME.parquet).")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="The published file, where you have it already."),
    ] = None,
    unverified: Annotated[
        bool,
        typer.Option("--unverified", help="Take --from FILE whatever its checksum is."),
    ] = False,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds for the download (default: as long as it takes).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a dataset, check it and write it as a table for finetune, evaluate and predict.

    What was downloaded stays in matxfer's cache ($MATXFER_CACHE, else the user's). A download that
    was cut goes on with the same command. A row that cannot be used keeps its place, and the column
    error says why.
    """
    from matxfer.datasets.download import Patience
    from matxfer.datasets.fetch import fetch_dataset

    advice = "; the same command goes on from there"
    with (
        interruptible(advice),
        download_on_terminal(name) as on_bytes,
        counter_on_terminal("rows") as on_row,
    ):
        found = fetch_dataset(
            name,
            output,
            source=source,
            unverified=unverified,
            patience=Patience(limit_s=time_limit),
            on_bytes=on_bytes,
            on_row=on_row,
        )
    for error in found["errors"]:
        say(error)
    if found["failed"] > len(found["errors"]):
        say(f"… {found['failed'] - len(found['errors'])} more such rows, see the column error")
    if not found["verified"]:
        say(f"not the file of the card: its SHA-256 is {found['source_sha256']}")
    if as_json:
        print_json(found)
        return
    failed = f", {found['failed']} with an error" if found["failed"] else ""
    typer.echo(f"{found['table']}: {found['rows']} rows{failed}")
    for column, count in found["values"].items():
        typer.echo(f"  {column}: {count} values")


def _card_lines(card: DatasetCard) -> Iterator[str]:
    yield f"{card.name}: {card.title}"
    yield f"collection: {card.collection}, {card.rows} rows"
    yield f"address: {card.url}"
    yield f"SHA-256: {card.sha256}"
    yield f"licence: {card.licence}"
    yield f"cite: {', '.join(card.doi) or 'no publication is named'}"
    if card.note:
        yield f"note: {card.note}"
    if not card.structure_column:
        yield "there are no structures in it, only formulas"
    yield "columns:"
    for column in card.columns:
        unit = f"  (published as {column.source!r}, {column.unit or 'no unit'})"
        yield f"  {column.name}{unit}"
    if card.other_columns:
        yield f"left out: {', '.join(card.other_columns)}"
