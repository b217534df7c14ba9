"""From a dataset's name to a table of ours: card, published file, conversion, record."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.datasets.card import DatasetError, find_card
from matxfer.datasets.convert import convert
from matxfer.datasets.download import download
from matxfer.files import sha256
from matxfer.provenance import provenance

if TYPE_CHECKING:
    from collections.abc import Callable

    from matxfer.datasets.card import DatasetCard
    from matxfer.datasets.download import Patience


def fetch_dataset(
    name: str,
    output: str | Path | None = None,
    *,
    source: str | Path | None = None,
    unverified: bool = False,
    patience: Patience | None = None,
    on_bytes: Callable[[int, int | None], None] | None = None,
    on_row: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Make a table of a public dataset, downloading it if need be.

    Parameters
    ----------
    name
        See :func:`matxfer.datasets.card.find_card`.
    output
        Parquet file to write; default ``NAME.parquet``. The card and the checksum of the published
        file are in its metadata, under ``matxfer_dataset``.
    source
        The published file, where it has been downloaded already. It is read, not copied.
    unverified
        Take ``source`` even if its checksum is not that of the card, and say so in the table.
    patience, on_bytes
        See :func:`matxfer.datasets.download.download`.
    on_row
        Called with the number of rows converted since the last call.

    Returns
    -------
    dict
        ``table``, ``rows``, ``failed``, ``errors`` (the first few), ``values`` (number per column),
        ``source_sha256``, ``verified``.

    Raises
    ------
    DatasetError
        If there is no such dataset, its file cannot be had, has another checksum or is damaged.
    """
    started = time.monotonic()
    card = find_card(name)
    table = output_table(output if output is not None else f"{card.name}.parquet")
    if source is None:
        published = download(card, patience=patience, on_bytes=on_bytes)
        found, verified = card.sha256, True
    else:
        published = Path(source)
        found, verified = _checked(card, published, unverified=unverified)
    facts = {"source_sha256": found, "verified": verified}
    record = provenance(time.monotonic() - started)
    conversion = convert(card, published, table, facts | record, on_row)
    if verified and conversion.rows != card.rows:
        raise DatasetError(
            f"{table}: has {conversion.rows} rows where the card says {card.rows}; correct the card"
        )
    return {"table": str(table), **asdict(conversion), **facts}


def output_table(output: str | Path) -> Path:
    """Return the path of a table that can be written.

    Raises
    ------
    DatasetError
        If it is no Parquet file, or there is no such folder.
    """
    table = Path(output)
    if table.suffix.lower() != ".parquet":
        raise DatasetError(f"{table}: the table is a Parquet file; let its name end in .parquet")
    if not table.parent.is_dir():
        raise DatasetError(f"{table.parent}: there is no such folder; make it first")
    return table


def _checked(card: DatasetCard, published: Path, *, unverified: bool) -> tuple[str, bool]:
    """Return the checksum of a local copy and whether it is the card's."""
    if not published.is_file():
        raise DatasetError(f"{published}: there is no such file; give the path of {card.file_name}")
    found = sha256(published)
    if found != card.sha256 and not unverified:
        raise DatasetError(
            f"{published}: its SHA-256 is {found}, but {card.name} has {card.sha256}; download "
            f"{card.url} again, or take it as it is with --unverified"
        )
    return found, found == card.sha256
