"""Structures of OPTIMADE providers, through the client of optimade-python-tools (optional).

OPTIMADE (Andersen et al., Sci. Data 8, 217 (2021)) is one interface of many databases. pymatgen has
a client too, but that one leaves out entries that it cannot read and providers that fail, with a
line in the log; here every entry has its row, and a provider that fails is an error.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlparse

from matxfer.datasets.card import Column, DatasetCard, DatasetError
from matxfer.datasets.columns import read_columns
from matxfer.datasets.convert import write_table
from matxfer.datasets.download import Patience
from matxfer.datasets.fetch import output_table
from matxfer.datasets.optimade_structure import FIELDS, crystal_of_optimade
from matxfer.provenance import provenance
from matxfer.readers.entry import attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_DOI = "10.1038/s41597-021-00974-z"
#: Spellings of units that providers use, in small letters.
_UNITS = {
    "ev": "eV", "electronvolt": "eV", "electron_volt": "eV", "ev/atom": "eV/atom",
    "mev": "meV", "mev/atom": "meV/atom", "gpa": "GPa", "gigapascal": "GPa", "k": "K",
    "kelvin": "K", "cm^-1": "1/cm", "cm-1": "1/cm", "1/cm": "1/cm", "dimensionless": "", "1": "",
}  # fmt: skip
#: Answers worth asking for again, by the beginning of what the client says of them.
_PASSING = ("RuntimeError: 5", "Timeout", "ReadTimeout", "ConnectTimeout", "ConnectionError",
            "ChunkedEncodingError", "RuntimeError: Could not decode", "Busy")  # fmt: skip
#: No number of rows that a provider has; the client wants one.
_ALL = 10**12


def fetch_optimade(
    provider: str,
    output: str | Path,
    *,
    criteria: str,
    columns: Sequence[str] = (),
    limit: int | None = None,
    patience: Patience | None = None,
    on_row: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a table of the structures of an OPTIMADE provider that meet a filter.

    Parameters
    ----------
    provider
        Address of its interface, or its name in the list of providers (``mp``, ``oqmd`` …).
    output
        Parquet file to write: besides structures ``last_modified`` and the columns asked for.
    criteria
        OPTIMADE filter, such as ``elements HAS "Li" AND nelements=2``.
    columns
        Properties: ``FIELD=NAME`` or ``FIELD=NAME:UNIT`` (see
        :func:`matxfer.datasets.columns.read_column`); FIELD is one of the provider's, with dots for
        what is inside of it. The unit is compared with the one that the provider states.
    limit
        At most so many structures.
    patience
        See :class:`matxfer.datasets.download.Patience`.
    on_row
        Called with the number of rows done since the last call.

    Returns
    -------
    dict
        ``table``, ``rows``, ``failed``, ``errors``, ``values``, as of
        :func:`matxfer.datasets.fetch.fetch_dataset`; ``found``: how many structures the provider
        says that it has of these.

    Raises
    ------
    DatasetError
        If the client is not installed, the provider is unknown, does not answer or breaks off, the
        filter is none, a field does not exist, units disagree or are missing, or nothing meets it.
    """
    table = output_table(output)
    _check_filter(criteria)
    if limit is not None and limit < 1:
        raise DatasetError(f"--limit is {limit}, but must be at least 1")
    session = _Session(provider, patience or Patience())
    about = session.ask("info")
    wanted = read_columns(columns, _units(session, columns) if columns else None)
    attributes = _dictionary(_dictionary(about.data).get("attributes"))
    origin = _dictionary(about.meta.get("provider"))
    card = DatasetCard(
        name="optimade",
        title=f"OPTIMADE: {criteria}",
        collection=str(origin.get("name") or session.url),
        licence=_licence(attributes),
        url=session.url,
        sha256="",
        file_type="json",
        rows=0,
        doi=(_DOI,),
        columns=wanted,
        structure_column="structure",
        id_column="id",
        formula_column="chemical_formula_reduced",
        text_columns=("last_modified",),
    )
    pages = _Pages(session, criteria, [column.source for column in wanted], limit)
    facts = {"filter": criteria, "api_version": attributes.get("api_version"), **provenance()}
    name = f"{session.url}, {criteria}"
    found = write_table(card, pages.rows(wanted), table, facts, on_row, name)
    return {"table": str(table), **asdict(found), "found": pages.returned}


class _Session:
    """Questions to one provider, asked again where that may help."""

    def __init__(self, provider: str, patience: Patience) -> None:
        self.patience, self.started = patience, time.monotonic()
        self.url = provider if "://" in provider else _address(provider)
        if urlparse(self.url).scheme not in {"http", "https"}:
            raise DatasetError(f"{self.url}: no address; write optimade:https://… or optimade:mp")
        client = _client_class()
        self.client = client(
            base_urls=self.url,
            max_results_per_provider=_ALL,
            http_timeout=patience.stall_s,
            use_async=False,
            http_client=_polite_session(),
            silent=True,
        )

    def ask(self, endpoint: str, **options: Any) -> Any:
        """Return one page of an endpoint: ``data``, ``meta``, ``links``.

        Raises
        ------
        DatasetError
            If it cannot be had.
        """
        options = {"filter": "", **options}
        for left in range(self.patience.tries - 1, -1, -1):
            if (limit := self.patience.limit_s) and time.monotonic() - self.started > limit:
                raise DatasetError(f"{self.url}: not done after {limit:g} s; give it more time")
            found = self.client.get_one(endpoint, base_url=self.url, paginate=False, **options)
            page = next(iter(found.values()))
            if not page.errors:
                return page
            told = "; ".join(str(error) for error in page.errors)
            if not (left and told.startswith(_PASSING)):
                break
            time.sleep(self.patience.pause_s)
        raise DatasetError(
            f"{self.url}: {endpoint} cannot be had ({told[:500]}); check address, filter, fields "
            "and the connection, or try again later"
        )


class _Pages:
    """The pages of an answer, one after the other."""

    def __init__(
        self, session: _Session, criteria: str, fields: Sequence[str], limit: int | None
    ) -> None:
        self.session, self.limit = session, limit
        # What is asked for of a nested field is the whole of it.
        asked = [*FIELDS, *(field.partition(".")[0] for field in fields)]
        # The client puts the text into the address as it is: & and # would end it.
        self.options = {"filter": quote(criteria), "response_fields": list(dict.fromkeys(asked))}
        self.returned: int | None = None

    def rows(self, columns: Sequence[Column]) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """Yield index and cells of each entry, or what is wrong with it."""
        seen, count = set[str](), 0
        for page in self._pages():
            entries = page.data if isinstance(page.data, list) else []
            for entry in entries:
                if count == self.limit:
                    return
                yield str(count), _cells(entry, columns, seen)
                count += 1
        if self.returned is not None and self.limit is None and count != self.returned:
            raise DatasetError(
                f"{self.session.url}: sent {count} of the {self.returned} structures that it has; "
                "nothing was written. Try again later, or tell the provider"
            )

    def _pages(self) -> Iterator[Any]:
        page = self.session.ask("structures", **self.options)
        returned = page.meta.get("data_returned")
        self.returned = returned if isinstance(returned, int) else None
        gone = set[str]()
        while True:
            yield page
            following = page.links.get("next")
            address = following.get("href") if isinstance(following, dict) else following
            if not address:
                return
            if address in gone:
                raise DatasetError(f"{self.session.url}: its pages go round ({address})")
            gone.add(address)
            page = self.session.ask("structures", override_url=address)


def _cells(entry: Any, columns: Sequence[Column], seen: set[str]) -> dict[str, Any] | str:
    if not isinstance(entry, dict) or not isinstance(entry.get("attributes"), dict):
        return "the provider sent no attributes"
    name, told = str(entry.get("id")), entry["attributes"]
    if name in seen:
        return f"the provider sent {name!r} before"
    seen.add(name)
    build = partial(crystal_of_optimade, told, name)
    return {
        "id": name,
        "structure": attempt(build, "the structure", "see the provider's entry"),
        "chemical_formula_reduced": told.get("chemical_formula_reduced"),
        "last_modified": told.get("last_modified"),
        **{column.source: _inner(told, column.source) for column in columns},
    }


def _inner(told: dict[str, Any], path: str) -> Any:
    """Return a field, or what is inside of one by a path with dots."""
    if path in told:
        return told[path]
    value: Any = told
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _units(session: _Session, columns: Sequence[str]) -> dict[str, str]:
    """Return the units that the provider states of its fields; check that the fields exist."""
    properties = _dictionary(_dictionary(session.ask("info/structures").data).get("properties"))
    for text in columns:
        field = text.partition("=")[0].strip()
        outer = field.partition(".")[0]
        if properties and field not in properties and outer not in properties:
            own = sorted(name for name in properties if name.startswith("_")) or sorted(properties)
            raise DatasetError(
                f"{session.url}: has no field {outer!r}; of its own it has {', '.join(own[:40])}"
            )
    stated = {}
    for name, about in properties.items():
        unit = _dictionary(about).get("unit") or _dictionary(about).get("x-optimade-unit")
        if isinstance(unit, str) and unit.lower() != "inapplicable":
            stated[name] = _UNITS.get(unit.lower().replace(" ", ""), unit)
    return stated


def _licence(attributes: dict[str, Any]) -> str:
    link = attributes.get("license")
    address = link.get("href") if isinstance(link, dict) else link
    named = attributes.get("available_licenses")
    if isinstance(named, list) and named:
        return ", ".join(map(str, named))
    return str(address) if address else "not stated by the provider; ask it before passing data on"


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _client_class() -> Any:
    try:
        from optimade.client import OptimadeClient
    except ImportError as error:
        raise DatasetError(
            "OPTIMADE: its client is not installed; pip install 'matxfer[optimade]'"
        ) from error
    return OptimadeClient


def _check_filter(criteria: str) -> None:
    _client_class()
    from optimade.exceptions import BadRequest
    from optimade.filterparser import LarkParser

    if not criteria.strip():
        raise DatasetError(
            "OPTIMADE: say which structures, such as --filter 'elements HAS \"Li\" AND nelements=2'"
        )
    try:
        LarkParser().parse(criteria)
    except BadRequest as error:
        raise DatasetError(
            f"{criteria!r} is no OPTIMADE filter ({error.detail}); such as "
            'elements HAS "Li" AND nelements=2'
        ) from error


def _address(name: str) -> str:
    """Return the address of a provider's one database."""
    from optimade.utils import get_all_databases, get_providers

    _client_class()
    found = [str(url).rstrip("/") for url in get_all_databases(include_providers={name})]
    if len(found) == 1:
        return found[0]
    if found:
        raise DatasetError(
            f"provider {name!r} has several databases, whose values may not be comparable: "
            f"{', '.join(found)}; choose one, such as optimade:{found[0]}"
        )
    known = sorted(str(provider["id"]) for provider in get_providers())
    if not known:
        raise DatasetError(
            f"provider {name!r}: the list of providers cannot be reached; are you offline? Give "
            "the address of the provider: optimade:https://…"
        )
    raise DatasetError(
        f"provider {name!r} is unknown or has no database that answers; known are "
        f"{', '.join(known)}, or give an address: optimade:https://…"
    )


def _polite_session() -> Any:
    import requests

    class Busy(requests.RequestException):
        """The provider asks for patience."""

    class PoliteSession(requests.Session):
        """A session in which "too many requests" is an error: the client would ask for ever."""

        def get(self, url: Any, **options: Any) -> Any:  # type: ignore[override]
            answer = super().get(url, **options)
            if answer.status_code == 429:
                raise Busy(f"429 - {url}: too many requests")
            return answer

    return PoliteSession
