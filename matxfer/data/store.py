"""Graphs of a whole table, built once by parallel workers and kept on disk by content.

The folder's name is a digest of the structures, the graph options and the graph version: another
table, another cutoff or another matxfer finds another folder, and an edited table is never mixed
up with its old graphs. A store is built in a temporary folder and renamed into place when whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.packed import PackedGraphs
from matxfer.graph import GRAPH_VERSION, GraphArrays, GraphOptions, build_graph
from matxfer.runtime import deaf_to_interrupts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_log = logging.getLogger(__name__)
_CHUNK = 500


@dataclass(frozen=True, slots=True, eq=False)
class GraphStore:
    """The graphs of a sequence of structures, in their order.

    Attributes
    ----------
    graphs
        One graph per structure; a failed one has no nodes.
    errors
        Why, for each row that failed.
    """

    graphs: PackedGraphs
    errors: dict[int, str]


def cache_folder() -> Path:
    """Return where computed graphs are kept: ``$MATXFER_CACHE``, else the user's cache folder."""
    if folder := os.environ.get("MATXFER_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "matxfer"


def available_cpus() -> int:
    """Return how many CPUs this process may use (a cluster job often has a few of many)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pack_chunk(
    crystals: Sequence[Crystal | CrystalError], options: GraphOptions
) -> tuple[PackedGraphs, dict[int, str]]:
    """Build and pack a chunk of graphs; return it with the reasons of the rows that failed."""
    graphs: list[GraphArrays | None] = []
    errors: dict[int, str] = {}
    for k, crystal in enumerate(crystals):
        try:
            if isinstance(crystal, CrystalError):
                raise crystal
            graphs.append(build_graph(crystal, options))
        except CrystalError as error:
            graphs.append(None)
            errors[k] = str(error)
    return PackedGraphs.pack(graphs), errors


def store_key(crystals: Sequence[Crystal | CrystalError], options: GraphOptions) -> str:
    """Return the digest that names the store of these structures and options."""
    digest = hashlib.sha256(json.dumps([GRAPH_VERSION, options.to_json()]).encode())
    for crystal in crystals:
        if isinstance(crystal, Crystal):
            digest.update(crystal.content_key())
        else:
            digest.update(str(crystal).encode())
    return digest.hexdigest()[:32]


def graph_store(
    crystals: Sequence[Crystal | CrystalError],
    options: GraphOptions,
    *,
    workers: int | None = None,
    cache: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> GraphStore:
    """Open the store of these structures, building it first if it is not there.

    Parameters
    ----------
    crystals
        The structures; an error in their place becomes a graph without nodes.
    options
        How to build the graphs.
    workers
        Processes that build graphs; ``None``: one per CPU for large tables, none for small ones.
    cache
        Folder of stores; ``None``: :func:`cache_folder`.
    on_progress
        Called with the number of structures done since the last call.
    """
    folder = (cache or cache_folder()) / "graphs" / store_key(crystals, options)
    try:
        found = _open(folder)
    except ValueError:
        _log.info("graphs of %d structures: to be built", len(crystals))
    else:
        _log.info("graphs of %d structures: from %s", len(crystals), folder)
        return found
    packs: list[PackedGraphs] = []
    errors: dict[int, str] = {}
    done = 0
    for pack, failed in _packed_chunks(crystals, options, workers):
        packs.append(pack)
        errors |= {done + k: reason for k, reason in failed.items()}
        done += len(pack)
        if on_progress is not None:
            on_progress(len(pack))
    store = GraphStore(PackedGraphs.concatenate(packs or [PackedGraphs.pack([])]), errors)
    return _keep(store, folder, options)


def _packed_chunks(
    crystals: Sequence[Crystal | CrystalError], options: GraphOptions, workers: int | None
) -> Iterator[tuple[PackedGraphs, dict[int, str]]]:
    chunks = [crystals[k : k + _CHUNK] for k in range(0, len(crystals), _CHUNK)]
    if workers is None:
        # A worker costs a second of start-up, about a thousand graphs.
        workers = available_cpus() if len(crystals) >= 3000 else 0
    build = partial(pack_chunk, options=options)
    if workers < 2:
        yield from map(build, chunks)
        return
    # Spawned, not forked: forking a process that has started torch's threads can deadlock.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        with deaf_to_interrupts():  # all are started as the chunks are handed in
            packs = pool.map(build, chunks)
        yield from packs


def _open(folder: Path) -> GraphStore:
    graphs, meta = PackedGraphs.load(folder)
    return GraphStore(graphs, {int(k): reason for k, reason in meta["errors"].items()})


def _keep(store: GraphStore, folder: Path, options: GraphOptions) -> GraphStore:
    """Write the store beside its place and rename it, so that no reader sees half of it."""
    extra: dict[str, Any] = {"options": options.to_json(), "errors": store.errors}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError:
        return store  # no place to keep it: the graphs in memory serve as well
    try:
        store.graphs.save(temporary, extra)
        if folder.exists():  # damaged, or another process was faster: either way, ours is whole
            shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        return _open(folder)
    except (OSError, ValueError):
        return store
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
