"""The Hugging Face Hub: files of a repository at one revision, and a commit of files.

All of the Hub's protocol is left to ``huggingface_hub`` (the extra ``hub``), which takes the
address from ``$HF_ENDPOINT`` and the token from ``$HF_TOKEN`` or ``hf auth login``. A branch or tag
is first resolved to its commit, and everything is fetched at that commit.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from matxfer.data.store import cache_folder
from matxfer.errors import MatxferError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)
PREFIX = "hf://"
#: A file of a plugin is never larger; see :data:`matxfer.plugin_files.LIMITS`.
MAX_BYTES = 512 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(r"hf:/+([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", re.ASCII)
_SECONDS = 30.0


class HubError(MatxferError):
    """What could not be fetched from or sent to the Hub: why, and what to do."""


def is_remote(path: str | Path) -> bool:
    """Say whether a path is an address on the Hub, ``hf://user/name[@revision]``."""
    return str(path).startswith("hf:/")


def parse_address(address: str) -> tuple[str, str]:
    """Return repository and revision of ``hf://user/name[@revision]``; the default is main.

    Raises
    ------
    HubError
        If it is no such address.

    Examples
    --------
    >>> parse_address("hf://ada/exfoliation@v2")
    ('ada/exfoliation', 'v2')
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or ".." in address:
        raise HubError(f"{address}: write hf://user/name or hf://user/name@revision")
    return found[1], found[2] or "main"


# -- fetching ---------------------------------------------------------------------------------
def local_folder(
    address: str, names: Sequence[str], check: Callable[[Path], None] = lambda _: None
) -> Path:
    """Return a folder in matxfer's cache with the files of a repository, fetched if need be.

    Parameters
    ----------
    address
        ``hf://user/name[@revision]``. A revision that is a commit's 40 digits, once fetched, needs
        no network.
    names
        The files that are wanted; others are left where they are.
    check
        Called with the folder before it is kept; if it raises, nothing is.

    Raises
    ------
    HubError
        If the Hub cannot be reached, refuses, has no such repository, revision or file, or if the
        check fails.
    """
    repository, revision = parse_address(address)
    user, _, name = repository.partition("/")
    root = cache_folder() / "hub" / user
    if not _COMMIT.fullmatch(revision):
        revision = _commit_of(repository, revision, names, _kept(root, name))
    folder = root / revision / name
    if all((folder / file).is_file() for file in names):
        _log.info("%s@%s: from %s", repository, revision, folder)
        return folder
    _log.info("%s@%s: fetching from %s", repository, revision, _endpoint() or "the Hub")
    hub = _library()
    part = folder.with_name(f".{name}.{os.getpid()}.part")
    try:
        with _told(repository, revision):
            for file in names:
                hub.hf_hub_download(
                    repository,
                    file,
                    revision=revision,
                    local_dir=part,
                    endpoint=_endpoint(),
                    etag_timeout=_SECONDS,
                )
        try:
            check(part)
        except MatxferError as error:
            why = str(error).replace(str(part), f"{PREFIX}{repository}@{revision}")
            raise HubError(f"{why}; nothing of it was kept") from error
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def commit_of(folder: Path) -> str:
    """Return the commit that a folder of :func:`local_folder` is of."""
    return folder.parent.name


def _commit_of(repository: str, revision: str, names: Sequence[str], kept: str) -> str:
    """Return the commit of a branch or tag, once it has the files in their size."""
    hub = _library()
    with _told(repository, revision, kept):
        found = hub.HfApi(endpoint=_endpoint()).model_info(
            repository, revision=revision, files_metadata=True, timeout=_SECONDS
        )
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
    if missing := [name for name in names if name not in sizes]:
        raise HubError(
            f"{PREFIX}{repository}@{revision}: has no {missing[0]}, so it is no plugin of matxfer; "
            "check the name"
        )
    if large := [name for name in names if sizes[name] > MAX_BYTES]:
        raise HubError(f"{PREFIX}{repository}@{revision}: {large[0]} is larger than any plugin")
    return str(found.sha)


def _kept(root: Path, name: str) -> str:
    """Return an address that needs no network, if any revision is on this machine."""
    commits = sorted(
        (path.parent for path in root.glob(f"*/{name}") if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
    )
    if not commits:
        return ""
    return f"; on this machine there is {PREFIX}{root.name}/{name}@{commits[-1].name}"


# -- sending ----------------------------------------------------------------------------------
def send(
    repository: str, files: Mapping[str, bytes], message: str, *, private: bool = False
) -> dict[str, str]:
    """Make a repository if there is none, and commit files to its main branch.

    Returns
    -------
    dict
        ``url`` of the repository and the ``revision``, the commit's 40 digits.

    Raises
    ------
    HubError
        If there is no token, or the Hub refuses or cannot be reached.
    """
    if parse_address(f"{PREFIX}{repository}")[0] != repository:
        raise HubError(f"{repository!r}: write user/name")
    hub = _library()
    api = hub.HfApi(endpoint=_endpoint(), library_name="matxfer")
    if not hub.get_token():
        raise HubError(
            f"{repository}: there is no token to write with; set HF_TOKEN to one with the right to "
            "write (https://huggingface.co/settings/tokens), or run hf auth login"
        )
    additions = [hub.CommitOperationAdd(name, data) for name, data in files.items()]
    with _told(repository, "main"):
        made = api.create_repo(repository, exist_ok=True, private=private)
        done = api.create_commit(repository, additions, commit_message=message)
    return {"url": str(made), "revision": str(done.oid)}


# -- the library ------------------------------------------------------------------------------
def _library() -> Any:
    """Return ``huggingface_hub``."""
    try:
        library = import_module("huggingface_hub")
        utilities = import_module("huggingface_hub.utils")
    except ImportError:
        raise HubError(
            "the Hub needs huggingface_hub, which is not installed: pip install 'matxfer[hub]'"
        ) from None
    utilities.disable_progress_bars()  # plugins are small
    return library


def _endpoint() -> str | None:
    # The library reads it once, as it is imported.
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _told(repository: str, revision: str, kept: str = "") -> Iterator[None]:
    """Turn what the library and its HTTP library raise into words."""
    place = f"{PREFIX}{repository}@{revision}"
    try:
        yield
    except MatxferError:
        raise
    except Exception as error:  # which HTTP library raises depends on the library's version
        status = _status(error)
        told = " ".join(str(error).split())[:200]
        if status in (401, 403):
            words = (
                f"the Hub answers {status}: there is no such repository, or it is private or gated "
                "and your token (HF_TOKEN, or hf auth login) does not open it"
            )
        elif status == 404:
            words = "the Hub has no such repository, revision or file; check user, name and @"
        elif status is not None:
            words = f"the Hub answers {status} ({told}); try again later"
        elif isinstance(error, ValueError):
            words = f"the Hub's library refuses it ({told})"
        else:
            words = (
                f"the Hub at {_endpoint() or 'https://huggingface.co'} could not be reached, or "
                f"the connection broke ({type(error).__name__}: {told}). Are you offline? Ask for "
                f"the plugin as a file (matxfer plugins pack){kept}"
            )
        raise HubError(f"{place}: {words}") from error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that lies at the bottom of an error, if there is one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None
