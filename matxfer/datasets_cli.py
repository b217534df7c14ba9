"""``matxfer datasets``: public datasets, from their address to a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.cli_names import dataset_names
from matxfer.terminal import (
    AsJson,
    StructureColumn,
    counter_on_terminal,
    download_on_terminal,
    interruptible,
    print_json,
    refuse,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matxfer.datasets.card import DatasetCard
    from matxfer.datasets.download import Patience

#: How a name begins that is of an OPTIMADE provider.
OPTIMADE = "optimade:"

app = typer.Typer(
    name="datasets",
    help="Public datasets (Matbench, JARVIS-DFT, matminer's collection, OPTIMADE providers): where "
    "they are, and tables of them, or of files of your own, with the unit in each column's name.",
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
    name: Annotated[
        str,
        typer.Argument(help="Name of a dataset, or a card (.toml).", autocompletion=dataset_names),
    ],
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


Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="Column to take: SOURCE=NAME, NAME ending in the unit, or SOURCE=NAME:UNIT, such as "
        "gap=band_gap_ev or K=bulk_modulus_vrh_gpa:log10(GPa); :1 for none. Repeatable.",
    ),
]


@app.command()
def fetch(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of a dataset, a card (.toml), or optimade:PROVIDER (or address).",
            autocompletion=dataset_names,
        ),
    ],
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
    criteria: Annotated[
        str | None,
        typer.Option("--filter", help="OPTIMADE: which, such as 'elements HAS \"Li\"'."),
    ] = None,
    columns: Columns = None,
    limit: Annotated[int | None, typer.Option(help="OPTIMADE: at most so many.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download a dataset, check it and write it as a table for finetune, evaluate and predict.

    What was downloaded stays in matxfer's cache ($MATXFER_CACHE, else the user's). A download that
    was cut goes on with the same command. A row that cannot be used keeps its place, and the column
    error says why. OPTIMADE providers: pip install 'matxfer[optimade]'.
    """
    from matxfer.datasets.download import Patience

    patience = Patience(limit_s=time_limit)
    if name.startswith(OPTIMADE):
        refuse({"from": source, "unverified": unverified or None}, "is of published files")
        _fetch_optimade(name, output, criteria, columns or [], limit, patience, as_json)
        return
    refuse({"filter": criteria, "column": columns, "limit": limit}, "is of OPTIMADE providers")
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
            patience=patience,
            on_bytes=on_bytes,
            on_row=on_row,
        )
    _tell(found, as_json)


def _fetch_optimade(
    name: str,
    output: str | None,
    criteria: str | None,
    columns: list[str],
    limit: int | None,
    patience: Patience,
    as_json: bool,
) -> None:
    from matxfer.datasets.optimade import fetch_optimade

    with interruptible(""), counter_on_terminal("structures") as on_row:
        found = fetch_optimade(
            name.removeprefix(OPTIMADE),
            output or "optimade.parquet",
            criteria=criteria or "",
            columns=columns,
            limit=limit,
            patience=patience,
            on_row=on_row,
        )
    if found["found"] is not None and found["found"] > found["rows"]:
        say(f"the first {found['rows']} of {found['found']} structures")
    _tell(found, as_json)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="ASE database (.db), table (.parquet, .csv), or data frame in JSON with pymatgen "
            "structures (.json, .json.gz, .jsonl; pandas, matminer)."
        ),
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Parquet file (default SOURCE.parquet).")
    ] = None,
    columns: Columns = None,
    id_column: Annotated[str | None, typer.Option(help="Column of ids.")] = None,
    structure_column: StructureColumn = None,
    as_json: AsJson = False,
) -> None:
    """Write a file of structures and properties as a table, the units of its columns checked.

    Columns of numbers whose names end in a unit are kept, and so are texts; a column whose name
    says no unit is left out, and told, unless --column names it. Of an ASE database: key-value
    pairs, numbers and texts in data, and energies. A row that cannot be used keeps its place, and
    the column error says why.
    """
    from pathlib import Path

    from matxfer.datasets.convert_local import convert_local

    with interruptible(""), counter_on_terminal("rows") as on_row:
        found = convert_local(
            source,
            output or f"{Path(source).name.split('.')[0]}.parquet",
            columns=columns or [],
            id_column=id_column,
            structure_column=structure_column,
            on_row=on_row,
        )
    for name, reason in found["left_out"].items():
        say(f"left out: {name} ({reason})")
    _tell(found, as_json)


def _tell(found: dict[str, Any], as_json: bool) -> None:
    """Say what became of the rows of a table."""
    for error in found["errors"]:
        say(error)
    if found["failed"] > len(found["errors"]):
        say(f"… {found['failed'] - len(found['errors'])} more such rows, see the column error")
    if not found.get("verified", True):
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
