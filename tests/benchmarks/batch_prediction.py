"""Batch prediction at the size of a screening: rate, memory, interruptions, processes, peers.

The structures of mp_structures_unlabeled, as a Parquet table and as CIF files (P1, written once
into a folder that may be kept). Each run of ``matxfer predict`` is a process of its own, its
memory that of the process and its workers together (the sum of their resident sets, which counts
shared pages more than once, so it is an upper bound). Every comparison of rows is exact.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.batch.compute import predict_pack
from matxfer.crystal import CrystalError
from matxfer.data.packed import PackedGraphs
from matxfer.graph import build_graph, symmetry_orbits
from matxfer.model import DEFAULT_MODEL, load_model
from matxfer.neighbors import neighbor_list
from matxfer.readers import read_file
from matxfer.runtime import keep_large_blocks, use_threads

STRUCTURES = "mp_structures_unlabeled.parquet"
PARTS = ("stages", "end-to-end", "memory", "kill", "processes", "peers")


# -- inputs -----------------------------------------------------------------------------------
def write_table(source: Path, path: Path, n: int | None, repeat_to: int | None = None) -> int:
    """Write n rows of the table, repeated up to a number of rows; return how many there are."""
    table = pq.read_table(source, columns=["material_id", "lattice", "numbers", "frac_coords"])
    if n is not None and n < table.num_rows:
        rows = np.sort(np.random.default_rng(0).permutation(table.num_rows)[:n])
        table = table.take(rows)
    if repeat_to is None:
        pq.write_table(table, path, compression="zstd")
        return table.num_rows
    done = 0
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        while done < repeat_to:
            some = table.slice(0, repeat_to - done)
            writer.write_table(some)
            done += some.num_rows
    return done


def write_cifs(table: Path, folder: Path) -> int:
    """Write one CIF file per row, unless they are there; return how many there are."""
    marker = folder / "complete"
    rows = pq.read_metadata(table).num_rows
    if marker.exists() and int(marker.read_text()) == rows:
        return rows
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    from ase.data import chemical_symbols

    for k, entry in enumerate(read_file(table)):
        crystal = entry.crystal
        assert crystal is not None
        lengths = np.linalg.norm(crystal.lattice, axis=1)
        unit = crystal.lattice / lengths[:, None]
        angles = np.degrees(np.arccos([unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1]]))
        lines = [f"data_{entry.id}"]
        lines += [f"_cell_length_{x} {v:.8f}" for x, v in zip("abc", lengths, strict=True)]
        names = ("alpha", "beta", "gamma")
        lines += [f"_cell_angle_{x} {v:.8f}" for x, v in zip(names, angles, strict=True)]
        lines += ["_symmetry_space_group_name_H-M 'P 1'", "loop_", "_symmetry_equiv_pos_as_xyz"]
        lines += ["'x, y, z'", "loop_", "_atom_site_label"]
        lines += ["_atom_site_type_symbol", *(f"_atom_site_fract_{x}" for x in "xyz")]
        symbols = [chemical_symbols[z] for z in crystal.numbers]
        lines += [
            f"{symbol}{i} {symbol} {x:.8f} {y:.8f} {z:.8f}"
            for i, (symbol, (x, y, z)) in enumerate(zip(symbols, crystal.frac_coords, strict=True))
        ]
        (folder / f"{k:06d}-{entry.id}.cif").write_text("\n".join(lines) + "\n")
    marker.write_text(str(rows))
    return rows


# -- running the command ----------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """Wall time in s, CPU time in s and largest resident memory in MB of a run."""

    seconds: float
    cpu_seconds: float
    memory_mb: float
    code: int
    errors: str


def command(*words: object) -> list[str]:
    """Return how to call matxfer in this environment."""
    return [sys.executable, "-c", "from matxfer.cli import main; main()", "predict",
            *map(str, words)]  # fmt: skip


def run(*words: object, cache: Path, cores: str | None = None) -> Run:
    """Run ``matxfer predict`` to its end."""
    environment = os.environ | {"MATXFER_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    pinned = ["taskset", "-c", cores] if cores else []
    start, before = time.perf_counter(), os.times()
    process = subprocess.Popen(
        [*pinned, *command(*words)], stderr=subprocess.PIPE, text=True, env=environment
    )
    peak = Peak(process.pid)
    _, errors = process.communicate()
    after = os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return Run(time.perf_counter() - start, cpu, peak.stop(), process.returncode, errors.strip())


class Peak:
    """The largest sum of resident memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        self.pid, self.largest, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._over.wait(0.25):
            total = 0
            for pid in _family(self.pid):
                try:
                    total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
                except (OSError, IndexError):
                    continue
            self.largest = max(self.largest, total)

    def stop(self) -> float:
        """Stop watching; return MB."""
        self._over.set()
        self._thread.join()
        return self.largest / 1e6


def _family(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += [int(word) for word in task.read_text().split()]
            except OSError:
                continue
    return found


def rows_of(folder: Path) -> pd.DataFrame:
    """Return the rows of a folder of parts, in the order of its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"], folder
    return pd.concat([pd.read_parquet(folder / part["file"]) for part in manifest["parts"]],
                     ignore_index=True)  # fmt: skip


# -- measurements -----------------------------------------------------------------------------
def stages(table: Path, cifs: Path | None, model_name: str, n: int) -> Table:
    """Time the stages one by one, on one thread of this process, ms of CPU per structure."""
    use_threads(1)
    keep_large_blocks()
    model = load_model(model_name)
    options = model.backbone.graph_options
    result = Table(
        f"Stages, one thread, {n:,} structures", ("stage", "CPU ms per structure", "1/s per core")
    )

    def timed(stage: str, work: object) -> object:
        start = time.process_time()
        made = work()  # type: ignore[operator]
        ms = (time.process_time() - start) / n * 1e3
        result.rows.append((stage, f"{ms:.3f}", f"{1e3 / max(ms, 1e-6):,.0f}"))
        return made

    def graph(crystal: object) -> object:
        try:
            return build_graph(crystal, options)
        except CrystalError:
            return None

    rows = read_file(table)
    next(rows)  # imports
    entries = timed("reading Parquet", lambda: [e for e, _ in zip(rows, range(n), strict=False)])
    crystals = [entry.crystal for entry in entries if entry.crystal is not None]
    if cifs is not None:
        paths = sorted(cifs.glob("*.cif"))[:n]
        list(read_file(paths[0]))
        timed("reading CIF", lambda: [list(read_file(path)) for path in paths])
    timed("formula", lambda: [c.formula for c in crystals])
    timed("content key", lambda: [c.content_key() for c in crystals])
    timed("neighbour list", lambda: [neighbor_list(c, options.cutoff_angstrom) for c in crystals])
    timed("symmetry", lambda: [symmetry_orbits(c, options.symprec_angstrom) for c in crystals])
    graphs = timed("graph (with these two)", lambda: [graph(c) for c in crystals])
    pack = PackedGraphs.pack([g for g in graphs if g is not None])
    timed("network", lambda: predict_pack(model, [], list(model.heads), pack))
    return result


def end_to_end(args: argparse.Namespace, table: Path, cifs: Path, work: Path) -> Table:
    """Run the command on the table and the files; again with its cache."""
    result = Table(
        "`matxfer predict`, whole runs",
        ("input", "rows", "wall s", "rows/s", "CPU ms per row", "memory MB"),
    )
    n = pq.read_metadata(table).num_rows
    cases: list[tuple[str, Path, list[str]]] = [
        ("Parquet", table, []),
        ("CIF files", cifs, []),
        ("Parquet, first run with --cache", table, ["--cache"]),
        ("Parquet, repeated with --cache", table, ["--cache"]),
    ]
    for k, (name, source, options) in enumerate(cases):
        out = work / f"end-{k}.parquet"
        done = run(source, "-o", out, "--model", args.model, *options, cache=work / "cache")
        rows = pq.read_metadata(out).num_rows
        assert rows == n, (name, rows, done.errors)
        rate, cpu = rows / done.seconds, 1e3 * done.cpu_seconds / rows
        result.rows.append((name, f"{rows:,}", f"{done.seconds:.1f}", f"{rate:,.0f}",
                            f"{cpu:.2f}", f"{done.memory_mb:,.0f}"))  # fmt: skip
    return result


def memory(args: argparse.Namespace, source: Path, work: Path) -> Table:
    """Run on tables of growing length, the last one the table repeated."""
    result = Table(
        "Resident memory against the number of rows (repeats are answered from the cache)",
        ("rows", "output", "wall s", "rows/s", "memory MB"),
    )
    for n in args.memory_rows:
        table = work / f"memory-{n}.parquet"
        write_table(source, table, args.n, n)
        for output in (work / f"memory-{n}-out.parquet", work / f"memory-{n}-out"):
            words = [output] if output.suffix else [f"{output}/"]
            done = run(table, "-o", *words, "--model", args.model, "--cache", cache=work / "cache")
            assert done.code == 0, done.errors
            result.rows.append((f"{n:,}", "file" if output.suffix else "folder of parts",
                                f"{done.seconds:.1f}", f"{n / done.seconds:,.0f}",
                                f"{done.memory_mb:,.0f}"))  # fmt: skip
            shutil.rmtree(output, ignore_errors=True)
    return result


def kill(args: argparse.Namespace, table: Path, work: Path) -> Table:
    """Kill a run at random moments, go on each time, and compare the rows."""
    small = work / "kill.parquet"
    n = write_table(table, small, args.kill_rows)
    words = [small, "--model", args.model, "--shard-size", max(n // 12, 256)]
    whole = run(*words, "-o", f"{work / 'whole'}/", cache=work / "cache")
    assert whole.code == 0, whole.errors
    expected = rows_of(work / "whole")
    result = Table(
        f"Killed and gone on with, {n:,} rows, {args.kills} runs",
        ("run", "killed after s", "whole parts then", "rows", "identical"),
    )
    moments = random.Random(args.seed)
    for k in range(args.kills):
        folder, moment = work / f"kill-{k}", moments.uniform(0.05, 0.98) * whole.seconds
        environment = os.environ | {"MATXFER_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command(*words, "-o", f"{folder}/"), stderr=subprocess.DEVNULL, env=environment
        )
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        parts = len(list(folder.glob("part-*.parquet")))
        done = run(*words, "-o", f"{folder}/", "--resume", cache=work / "cache")
        assert done.code == 0, done.errors
        found = rows_of(folder)
        same = found.equals(expected) and not found["id"].duplicated().any()
        result.rows.append((str(k), f"{moment:.1f}", str(parts), f"{len(found):,}",
                            "yes" if same else "NO"))  # fmt: skip
        shutil.rmtree(folder)
    return result


def processes(args: argparse.Namespace, table: Path, work: Path) -> Table:
    """Compare one process of one worker with two of one worker each, pinned to a core each."""
    words = [table, "--model", args.model, "--workers", 1, "--shard-size", 2048]
    one = run(*words, "-o", f"{work / 'one'}/", cache=work / "cache", cores="0")
    assert one.code == 0, one.errors
    start = time.perf_counter()
    environment = os.environ | {"MATXFER_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            ["taskset", "-c", str(rank), *command(*words, "-o", f"{work / 'two'}/", "--rank", rank,
             "--world-size", 2)], env=environment, stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]  # fmt: skip
    codes = [process.wait() for process in both]
    seconds = time.perf_counter() - start
    assert codes == [0, 0], codes
    same = rows_of(work / "one").equals(rows_of(work / "two"))
    result = Table(
        "Two processes against one, a core each", ("processes", "wall s", "speed-up", "same rows")
    )
    result.rows.append(("1", f"{one.seconds:.1f}", "1", ""))
    ratio = f"{one.seconds / seconds:.2f}"
    result.rows.append(("2", f"{seconds:.1f}", ratio, "yes" if same else "NO"))
    return result


# -- other packages ---------------------------------------------------------------------------
def peers(args: argparse.Namespace, cifs: Path, work: Path) -> Table:
    """Run other packages' shipped models on the same files, end to end, and ours."""
    paths = sorted(cifs.glob("*.cif"))[: args.peer_rows]
    some = work / "peer-cifs"
    some.mkdir()
    for path in paths:
        (some / path.name).symlink_to(path.resolve())
    done = run(some, "-o", work / "peers.parquet", "--model", args.model, cache=work / "cache")
    ms = 1e3 * done.seconds / len(paths)
    result = Table(
        f"The same {len(paths):,} CIF files, end to end, two cores",
        ("package", "reading s", "graphs and network s", "ms per structure", "times ours"),
    )
    result.rows.append(("matxfer, with its start", "", f"{done.seconds:.1f}", f"{ms:.2f}", "1"))
    script = Path(__file__).with_name("_peers.py")
    for name in ("megnet", "m3gnet", "alignn", "chgnet"):
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        found = subprocess.run([args.peer_python, str(script), name, str(some)], env=environment,
                               capture_output=True, text=True, check=False)  # fmt: skip
        if found.returncode != 0:
            lines = found.stderr.strip().splitlines() or ["no message"]
            result.rows.append((name, "skipped", lines[-1][:100], "", ""))
            continue
        reading, rest = map(float, found.stdout.split()[-2:])
        total = reading + rest
        ms = 1e3 * total / len(paths)
        result.rows.append((name, f"{reading:.1f}", f"{rest:.1f}", f"{ms:.2f}",
                            f"{total / done.seconds:.1f}"))  # fmt: skip
    return result


# -- main -------------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "batch_prediction")
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder of a model")
    parser.add_argument("-n", type=int, help="random rows of the table (default: all)")
    parser.add_argument("--stage-rows", type=int, default=2000, help="structures of the stages")
    parser.add_argument("--memory-rows", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed")
    parser.add_argument("--kill-rows", type=int, default=6000, help="rows of these runs")
    parser.add_argument("--peer-rows", type=int, default=1000, help="files for other packages")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has them")
    parser.add_argument("--work", type=Path, help="folder for inputs and outputs, kept")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for and write the result."""
    args = parse_arguments()
    if unknown := set(args.parts) - set(PARTS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    source = args.data / STRUCTURES
    tables = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        outputs = Path(tempfile.mkdtemp(dir=work))
        table = work / f"structures-{args.n or 'all'}.parquet"
        n = write_table(source, table, args.n)
        cifs = work / f"cifs-{args.n or 'all'}"
        if {"stages", "end-to-end", "peers"} & set(args.parts):
            write_cifs(table, cifs)
        measure = {
            "stages": lambda: stages(table, cifs, args.model, min(args.stage_rows, n - 1)),
            "end-to-end": lambda: end_to_end(args, table, cifs, outputs),
            "memory": lambda: memory(args, source, outputs),
            "kill": lambda: kill(args, table, outputs),
            "processes": lambda: processes(args, table, outputs),
            "peers": lambda: peers(args, cifs, outputs),
        }
        for part in args.parts:
            tables.append(measure[part]())
            print(tables[-1].heading, *tables[-1].rows, sep="\n  ", flush=True)
        shutil.rmtree(outputs)
    more = facts(args.threads, model=args.model, structures=f"{n:,}")
    write_tables(args.output, "Batch prediction", more, tables)
    if any("NO" in row for each in tables for row in each.rows):
        raise SystemExit("rows differ where they must not")


if __name__ == "__main__":
    main()
