"""Plugins on their way: packed into one file and out of it, to the Hub and from there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.errors import OptionError
from matxfer.hub import PREFIX, HubError, commit_of, is_remote, parse_address, send
from matxfer.plugin_files import (
    META,
    PACKED_SUFFIX,
    WEIGHTS,
    json_bytes,
    packed,
    read_plugin,
    with_checksum,
    write_files,
)

if TYPE_CHECKING:
    from matxfer.plugin_files import PluginFiles


def pack(plugin: str | Path, output: str | Path | None = None) -> Path:
    """Write a plugin as one file, for mail: a zip file that is read without being unpacked.

    Parameters
    ----------
    plugin
        Its folder, packed file or ``hf://user/name[@revision]``.
    output
        The file, ``NAME.matxfer.zip``; ``None``: of the plugin's name, in the current folder.

    Returns
    -------
    Path
        The file. The same plugin gives the same bytes.

    Raises
    ------
    FormatError
        If the plugin is damaged or of a format that is not read.

    Examples
    --------
    >>> import matxfer
    >>> from matxfer.sharing import pack
    >>> print(pack("bulk-plugin", "bulk.matxfer.zip"))
    bulk.matxfer.zip
    >>> matxfer.load_plugin("bulk.matxfer.zip").target
    'bulk_modulus_gpa'
    """
    files = read_plugin(plugin)
    path = Path(output or f"{files.name}{PACKED_SUFFIX}")
    if not path.name.lower().endswith(PACKED_SUFFIX):
        raise OptionError(f"{path}: the name of a packed plugin ends in {PACKED_SUFFIX}")
    data = packed(_checked(files))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)
    return path


def unpack(plugin: str | Path, output: str | Path | None = None) -> Path:
    """Write a packed plugin as a folder.

    Parameters
    ----------
    plugin
        The packed file.
    output
        The folder; ``None``: of the plugin's name, in the current folder.

    Raises
    ------
    FormatError
        If the file is damaged or not what :func:`pack` makes.
    OptionError
        If there is something in the folder already.

    Examples
    --------
    >>> from matxfer.sharing import pack, unpack
    >>> print(unpack(pack("bulk-plugin"), "again/bulk"))
    again/bulk
    """
    files = read_plugin(plugin)
    return _into_folder(files, output)


def push(
    plugin: str | Path,
    repository: str,
    *,
    licence: str | None = None,
    private: bool = False,
    message: str | None = None,
) -> dict[str, Any]:
    """Send a plugin to the Hugging Face Hub, with a model card made of its ``plugin.json``.

    Parameters
    ----------
    plugin
        Its folder or packed file.
    repository
        ``user/name``; made if there is none. The token comes from ``$HF_TOKEN`` or
        ``hf auth login``.
    licence
        Identifier for the card, such as ``cc-by-4.0``.
    private
        Whether a new repository is private.
    message
        Of the commit.

    Returns
    -------
    dict
        ``url``, ``revision`` (the commit) and ``address``, by which exactly this is fetched.

    Raises
    ------
    FormatError
        If the plugin is damaged; then nothing is sent.
    HubError
        If the Hub refuses or cannot be reached.

    Examples
    --------
    >>> from matxfer.sharing import push
    >>> push("nowhere", "ada/bulk")
    Traceback (most recent call last):
    matxfer.files.FormatError: nowhere/plugin.json: not readable ...
    """
    from matxfer.sharing.card import readme

    files = read_plugin(plugin)
    content = _checked(files)
    card = readme(files, repository, licence).encode()
    sent = send(
        repository,
        {**content, "README.md": card},
        message or f"matxfer plugin {files.name}",
        private=private,
    )
    return {**sent, "address": f"{PREFIX}{repository}@{sent['revision']}"}


def pull(
    repository: str, output: str | Path | None = None, *, revision: str | None = None
) -> dict[str, Any]:
    """Fetch a plugin from the Hugging Face Hub into a folder, checked before it is there.

    Parameters
    ----------
    repository
        ``user/name``, ``user/name@revision`` or ``hf://user/name[@revision]``.
    output
        The folder; ``None``: of the repository's name, in the current folder.
    revision
        Branch, tag or commit (default: main).

    Returns
    -------
    dict
        ``folder``, ``revision`` (the commit) and ``address``, by which exactly this is fetched.

    Raises
    ------
    HubError
        If the Hub cannot be reached, refuses, or what came is damaged.

    Examples
    --------
    >>> from matxfer.sharing import pull
    >>> pull("no-user-and-no-name")
    Traceback (most recent call last):
    matxfer.hub.HubError: hf://no-user-and-no-name: write hf://user/name or ...
    """
    address = repository if is_remote(repository) else f"{PREFIX}{repository}"
    name, named = parse_address(address)
    if revision is not None and "@" in address and named != revision:
        raise HubError(f"{address}: names another revision than {revision}; give one of them")
    _check_free(Path(output or name.partition("/")[2]))
    files = read_plugin(f"{PREFIX}{name}@{revision or named}")
    commit = commit_of(files.path)
    folder = _into_folder(files, output)
    return {"folder": str(folder), "revision": commit, "address": f"{PREFIX}{name}@{commit}"}


def _checked(files: PluginFiles) -> dict[str, bytes]:
    """Return the content of a plugin that is whole, with the checksum of the weights in it."""
    meta = files.meta()
    files.tensors(meta)
    if "sha256" in meta:
        return files.content
    facts = with_checksum(meta, files.content[WEIGHTS])
    return {**files.content, META: json_bytes(facts)}


def _into_folder(files: PluginFiles, output: str | Path | None) -> Path:
    content = _checked(files)
    folder = Path(output or files.name)
    _check_free(folder)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        write_files(part, content)
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _check_free(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OptionError(f"{folder}: there is something already; give another folder with -o")
