"""Downloads that may be cut and go on: pooch keeps and checks the files, this brings the bytes.

What has come of a file lies beside its place as ``NAME.part`` until it is whole, so that a later
try, or the next run, asks for the rest only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matxfer.data.store import cache_folder
from matxfer.datasets.card import DatasetError
from matxfer.readers.content import MAX_FILE_BYTES, MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matxfer.datasets.card import DatasetCard

_PIECE = MIB // 4


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a server.

    Parameters
    ----------
    tries
        Connections for one file; each goes on where the last one broke.
    pause_s
        Seconds between two tries, twice as many each time.
    stall_s
        A connection is given up when fewer than ``stall_bytes`` come in so many seconds.
    stall_bytes
        See there.
    limit_s
        Seconds for the whole file, over all tries; ``None``: as long as it takes.
    """

    tries: int = 4
    pause_s: float = 1.0
    stall_s: float = 30.0
    stall_bytes: int = 1024
    limit_s: float | None = None


class _BrokenError(Exception):
    """A connection that ended too early; another may do better."""


def download_folder() -> Path:
    """Return the folder of published files, in matxfer's cache."""
    return cache_folder() / "datasets"


def download(
    card: DatasetCard,
    *,
    patience: Patience | None = None,
    on_bytes: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Return the path of a published file, downloaded if it is not in the cache, its sum checked.

    Parameters
    ----------
    card
        The dataset's card.
    patience
        How long to wait for the server.
    on_bytes
        Called with the bytes so far, and in all where the server says how many.

    Raises
    ------
    DatasetError
        If the server cannot be reached, does not have the file, is too slow or sends another file.
    """
    import pooch
    from filelock import FileLock

    folder = download_folder()
    folder.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    bring = _Resuming(card, folder / f"{card.file_name}.part", patience or Patience(), on_bytes)
    with FileLock(folder / f".{card.name}.lock"):
        for last in (False, True):
            bring.resumed = False
            try:
                found = pooch.retrieve(
                    card.url,
                    f"sha256:{card.sha256}",
                    fname=card.file_name,
                    path=folder,
                    downloader=bring,
                )
            except DatasetError:
                raise
            except ValueError as error:
                # The halves may be of two versions of the file: once more from the start.
                if bring.resumed and not last:
                    continue
                raise DatasetError(
                    f"{card.name}: the file from {card.url} does not have the checksum of the "
                    "card. The publisher has changed it, or something on the way has; "
                    "nothing was kept. A copy of the right file can be given with --from FILE"
                ) from error
            return folder / str(found)
    raise AssertionError("one of the two tries returns or raises")


class _Resuming:
    """What pooch calls to bring a file.

    Parameters
    ----------
    card
        The dataset's card, for messages.
    part
        Where to keep what has come.
    patience, on_bytes
        See :func:`download`.
    """

    def __init__(
        self,
        card: DatasetCard,
        part: Path,
        patience: Patience,
        on_bytes: Callable[[int, int | None], None] | None,
    ) -> None:
        self.card, self.part, self.patience = card, part, patience
        self.on_bytes = on_bytes or (lambda *_: None)
        self.resumed = False

    def __call__(self, url: str, output_file: str, _pooch: Any) -> None:
        """Bring the file of an address to a path."""
        import requests

        started = time.monotonic()
        for k in range(self.patience.tries):
            self._check_time(started)
            try:
                self._bring(url, started)
                self.part.replace(output_file)
            except (_BrokenError, requests.RequestException, OSError) as error:
                if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
                    raise  # the disk is full, say
                if k + 1 < self.patience.tries:
                    time.sleep(self.patience.pause_s * 2**k)
                    continue
                raise self._failure(error) from error
            return

    def _bring(self, url: str, started: float) -> None:
        """Bring the rest of the file, as far as the connection goes."""
        import requests
        import urllib3

        have = self.part.stat().st_size if self.part.is_file() else 0
        # Compressed on the way, a range would be one of other bytes.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        wait = self.patience.stall_s
        if self.patience.limit_s is not None:
            wait = max(min(wait, started + self.patience.limit_s - time.monotonic()), 0.001)
        timeout = (min(10.0, wait), wait)
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            if answer.status_code == 416:  # we have more than there is
                self.part.unlink()
                raise _BrokenError("the server has less than what had come before")
            if answer.status_code in (429, 500, 502, 503, 504):
                raise _BrokenError(f"HTTP {answer.status_code} {answer.reason}")
            if answer.status_code not in (200, 206):  # 202 is a page that wants a browser
                raise self._refused(answer)
            goes_on = answer.status_code == 206
            if goes_on and not _starts_at(answer, have):
                self.part.unlink(missing_ok=True)
                raise _BrokenError("the server sent another part than it was asked for")
            self.resumed |= goes_on
            have = have if goes_on else 0
            total = _length(answer, have)
            try:
                with self.part.open("ab" if goes_on else "wb") as file:
                    have = self._copy(answer.raw, file, have, total, started)
            except urllib3.exceptions.ReadTimeoutError as error:
                raise _BrokenError(f"nothing for {wait:.3g} s") from error
            except urllib3.exceptions.HTTPError as error:
                have = self.part.stat().st_size
                raise _BrokenError(f"{have} of {total or 'all'} bytes came") from error
        if total is not None and have < total:
            raise _BrokenError(f"{have} of {total} bytes came")

    def _copy(self, raw: Any, file: Any, have: int, total: int | None, started: float) -> int:
        """Copy what comes; return the size of the file."""
        window, mark = time.monotonic(), have
        while piece := raw.read1(_PIECE, decode_content=False):
            file.write(piece)
            have += len(piece)
            self.on_bytes(have, total)
            if have > MAX_FILE_BYTES:
                file.truncate(0)
                raise DatasetError(
                    f"{self.card.name}: {self.card.url} sends more than "
                    f"{MAX_FILE_BYTES // MIB} MiB, which is not this dataset; see its publication"
                )
            now = time.monotonic()
            self._check_time(started)
            if now - window > self.patience.stall_s:
                if have - mark < self.patience.stall_bytes:
                    raise _BrokenError(f"only {have - mark} bytes in {now - window:.0f} s")
                window, mark = now, have
        return have

    def _check_time(self, started: float) -> None:
        limit = self.patience.limit_s
        if limit is not None and time.monotonic() - started > limit:
            raise DatasetError(
                f"{self.card.name}: {self.card.url} has not sent all in the {limit:g} s allowed; "
                "the same command goes on from there, with a larger --time-limit if need be"
            )

    def _failure(self, error: Exception) -> DatasetError:
        import requests

        name, url = self.card.name, self.card.url
        broken = isinstance(error, _BrokenError) or (
            self.part.is_file() and self.part.stat().st_size
        )
        if not broken and isinstance(error, requests.ConnectionError):
            return DatasetError(
                f"{name}: the server of {url} cannot be reached; are you offline? Download that "
                f"address where there is a connection (SHA-256 {self.card.sha256}) and give the "
                f"file: matxfer datasets fetch {name} --from FILE"
            )
        return DatasetError(
            f"{name}: the connection to {url} broke {self.patience.tries} times "
            f"({' '.join(str(error).split())[:200]}); the same command goes on from there"
        )

    def _refused(self, answer: Any) -> DatasetError:
        return DatasetError(
            f"{self.card.name}: {self.card.url} answers HTTP {answer.status_code} {answer.reason}; "
            f"the file may have moved. Look for it in its publication (SHA-256 "
            f"{self.card.sha256}) and give it with --from FILE"
        )


def _starts_at(answer: Any, have: int) -> bool:
    """Say whether a partial answer goes on where we are."""
    found: str = answer.headers.get("Content-Range", "")
    return found.startswith(f"bytes {have}-")


def _length(answer: Any, have: int) -> int | None:
    """Return the size of the whole file, if the server says it."""
    length = answer.headers.get("Content-Length", "")
    return have + int(length) if length.isdigit() else None
