"""Where the time of a batch prediction goes: stages one by one, and the whole command.

CIF files are written from random crystals of mp_formation_energy, every second one with its space
group (conventional cell, as pymatgen symmetrises it), the others in P1, and ten broken ones are
strewn among them. The stages are timed one by one in this process; then ``matxfer predict`` runs
on the folder, and its rows are checked: one per file, in order, ten with an error.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, random_crystals, write_tables

from matxfer.crystal import CrystalError
from matxfer.data.loader import edge_budget_batches
from matxfer.data.packed import PackedGraphs
from matxfer.graph import build_graph
from matxfer.model import DEFAULT_MODEL, load_model
from matxfer.readers import read_file
from matxfer.runtime import keep_large_blocks, use_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matxfer.crystal import Crystal
    from matxfer.model import Model

KINDS = ("with space group", "P1")

_CIF = """data_broken
_cell_length_a {a}
_cell_length_b {b}
_cell_length_c 4.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
{sites}
"""


def _cif(a: str = "4.0", b: str = "4.0", sites: str = "Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5") -> str:
    return _CIF.format(a=a, b=b, sites=sites)


#: Files that hold no usable crystal: what is wrong, and the text.
BROKEN: dict[str, str] = {
    "empty": "",
    "blank": "\n \n",
    "prose": "This is not a CIF file.\n",
    "page": "<html><body>404 Not Found</body></html>\n",
    "no_sites": _cif().split("loop_", 1)[0],
    "cut_short": _cif().rpartition(" 0.5")[0],
    "text_for_length": _cif(a="long"),
    "no_volume": _cif(b="0.0"),
    "unknown_element": _cif(sites="Xx1 Xx 0 0 0\nCl1 Cl 0.5 0.5 0.5"),
    "overlap": _cif(sites="Na1 Na 0 0 0\nCl1 Cl 0.01 0 0"),
}


@dataclass(frozen=True, slots=True)
class Files:
    """The files in their order, by kind; the set of broken ones."""

    folder: Path
    names: list[str]
    kinds: dict[str, list[Path]]
    broken: set[str]


def write_files(crystals: Sequence[Crystal], folder: Path) -> Files:
    """Write one CIF file per crystal, broken ones evenly among them."""
    from pymatgen.io.cif import CifWriter

    folder.mkdir(parents=True)
    step = max(len(crystals) // len(BROKEN), 1)
    broken = dict(zip(range(step // 2, 10**9, step), BROKEN.items(), strict=False))
    kinds: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    names, marked = [], set()
    for k, crystal in enumerate(crystals):
        if k in broken:
            reason, text = broken[k]
            names.append(f"{len(names):05d}-broken-{reason}")
            marked.add(names[-1])
            (folder / f"{names[-1]}.cif").write_text(text)
        names.append(f"{len(names):05d}-{crystal.id}")
        path = folder / f"{names[-1]}.cif"
        kind = KINDS[k % 2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = crystal.to_pymatgen()
            writer = CifWriter(structure, symprec=0.01 if kind == KINDS[0] else None)
        path.write_text(str(writer))
        kinds[kind].append(path)
    return Files(folder, names, kinds, marked)


def time_stages(model: Model, files: Files, repeats: int) -> dict[str, list[float]]:
    """Return ms per structure of each stage, once per repeat; a first pass is left out."""
    measured: dict[str, list[float]] = {}

    def record(stage: str, start: float, n: int) -> None:
        measured.setdefault(stage, []).append((time.perf_counter() - start) / n * 1e3)

    options = model.backbone.graph_options
    for _ in range(repeats + 1):
        crystals = []
        for kind in KINDS:
            start = time.perf_counter()
            entries = [entry for path in files.kinds[kind] for entry in read_file(path)]
            record(f"reading CIF, {kind}", start, len(entries))
            crystals += [entry.crystal for entry in entries if entry.crystal is not None]
        start = time.perf_counter()
        graphs = [_graph_or_none(crystal, options) for crystal in crystals]
        record("building graphs", start, len(crystals))
        start = time.perf_counter()
        packed = PackedGraphs.pack(graphs)
        record("packing graphs", start, len(crystals))
        rows = np.flatnonzero(packed.nodes_per_graph > 0)
        start = time.perf_counter()
        batches = [packed.batch(index) for index in edge_budget_batches(packed, rows)]
        record("gathering batches", start, len(rows))
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model.predict_graphs(batch)
        record("model", start, len(rows))
    return {stage: values[1:] for stage, values in measured.items()}


def _graph_or_none(crystal: Crystal, options: object) -> object:
    try:
        return build_graph(crystal, options)
    except CrystalError:
        return None


def command() -> list[str]:
    """Return how to call matxfer in this environment, installed or on the path of modules."""
    script = Path(sys.executable).with_name("matxfer")
    if script.exists():
        return [str(script)]
    return [sys.executable, "-c", "from matxfer.cli import main; main()"]


def run_predict(inputs: Path, output: Path, model: str, threads: int) -> float:
    """Run ``matxfer predict`` in a process of its own, caches empty; return its wall time in s."""
    cache = output.with_name("cache")
    shutil.rmtree(cache, ignore_errors=True)
    words = [*command(), "predict", str(inputs), "-o", str(output)]
    words += [] if model == DEFAULT_MODEL else ["--model", model]
    environment = os.environ | {"MATXFER_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    # Rows with an error may well be told by the exit code: the file is what counts.
    if not output.is_file():
        raise RuntimeError(f"{' '.join(words[-4:])} wrote nothing:\n{done.stderr[-2000:]}")
    return seconds


def check_rows(output: Path, files: Files) -> tuple[str, bool]:
    """Compare the rows with the files; return the finding and whether it is as it should be."""
    with output.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    in_order = [Path(row["source"]).stem for row in rows] == files.names
    failed = {Path(row["source"]).stem for row in rows if row["error"].strip()}
    missed, surplus = files.broken - failed, failed - files.broken
    finding = (
        f"{len(rows):,} rows for {len(files.names):,} files, {'' if in_order else 'NOT '}in their "
        f"order; {len(failed)} errors, {len(files.broken)} of them expected"
        if not missed
        else f"no error for {sorted(missed)}"
    )
    if surplus:
        first = next(row for row in rows if Path(row["source"]).stem in surplus)
        finding += f"; unexpected: {len(surplus)}, first {first['id']}: {first['error']}"
    return finding, in_order and not missed and not surplus


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "throughput")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder of a model")
    parser.add_argument("-n", type=int, default=1000, help="CIF files, the broken ones not counted")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of the stages")
    parser.add_argument("--command-repeats", type=int, default=3, help="runs of the command")
    return parser.parse_args()


def main() -> None:
    """Measure, check and write the result."""
    args = parse_arguments()
    if args.n < len(BROKEN):
        raise SystemExit(f"-n must be at least {len(BROKEN)}, one per broken file")
    use_threads(args.threads)
    keep_large_blocks()
    model = load_model(args.model)
    table = args.data / "mp_formation_energy.parquet"
    drawn = random_crystals(table, 2 * args.n, args.seed)
    known = [c for c in drawn if set(c.numbers.tolist()) <= model.elements]
    order = np.random.default_rng(args.seed).permutation(len(known))[: args.n]
    crystals = [known[k] for k in order]

    tables = []
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(crystals, Path(temporary) / "cif")
        stages = time_stages(model, files, args.repeats)
        per_structure = Table("Stages in one process, ms per structure", ("stage", "median", "min"))
        total = 0.0
        for stage, values in stages.items():
            median = statistics.median(values)
            total += median / (len(KINDS) if stage.startswith("reading") else 1)
            per_structure.rows.append((stage, f"{median:.3f}", f"{min(values):.3f}"))
        per_structure.rows.append(("all (reading: mean of both kinds)", f"{total:.3f}", ""))
        tables.append(per_structure)

        output = Path(temporary) / "out.csv"
        one = files.kinds["P1"][0]
        several = range(args.command_repeats)
        start_up = [
            run_predict(one, output.with_name("one.csv"), args.model, args.threads) for _ in several
        ]
        whole = [run_predict(files.folder, output, args.model, args.threads) for _ in several]
        finding, good = check_rows(output, files)
        runs = Table("`matxfer predict`, wall time in s", ("input", "median", "each run"))
        runs.rows += [
            (what, f"{statistics.median(values):.2f}", ", ".join(f"{v:.2f}" for v in values))
            for what, values in (("one file", start_up), (f"{len(files.names):,} files", whole))
        ]
        tables.append(runs)
    more = facts(
        args.threads,
        model=f"{model.name}, {sum(p.numel() for p in model.parameters()):,} parameters",
        files=f"{', '.join(f'{len(p)} {kind}' for kind, p in files.kinds.items())}, "
        f"{len(files.broken)} broken; in the system's file cache",
        atoms=f"{np.mean([c.n_sites for c in crystals]):.1f} per crystal of the table",
        check=finding,
    )
    write_tables(args.output, "Throughput of predictions", more, tables)
    if not good:
        raise SystemExit("the rows of the command are not as they should be")


if __name__ == "__main__":
    main()
