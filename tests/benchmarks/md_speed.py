"""Steps per second of molecular dynamics, beside other packages; cost against the atoms.

Silicon at 300 K, velocity Verlet of ASE with each package's ASE calculator, a process each, in
turns; a step is one evaluation of energy, forces and stress. Other packages are found in the Python
of --peer-python and left out where they are not installed.

    python tests/benchmarks/md_speed.py --threads 2 --peer-python PYTHON
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from _md import matxfer as our_calculator
from _md import silicon
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.runtime import use_threads

SCRIPT = Path(__file__).with_name("_md.py")


def steps_of(python: str, threads: int, *words: object) -> list[float] | str:
    """Return the seconds of each step of a package in its own process, or why there are none."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [python, str(SCRIPT), *map(str, words)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return lines[-1][:100]
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def speed(args: argparse.Namespace) -> Table:
    """Run all packages in turns, for each size."""
    table = Table(
        "Steps per second, median over all steps",
        ("package", "atoms", "steps/s", "ms per step", "times CHGNet's", "times MACE's"),
    )
    for repeat in args.repeats:
        taken: dict[str, list[float]] = {name: [] for name in ("matxfer", *args.peers)}
        errors: dict[str, str] = {}
        for _ in range(args.turns):
            for name in taken:
                ours = name == "matxfer"
                steps = args.steps if ours else args.peer_steps
                python = sys.executable if ours else args.peer_python
                words = (name, repeat, steps, *([args.model] if ours else []))
                found = steps_of(python, args.threads, *words)
                if isinstance(found, str):
                    errors[name] = found
                else:
                    taken[name] += found
        medians = {name: statistics.median(s) for name, s in taken.items() if s}
        for name in taken:
            if name not in medians:
                table.rows.append((name, 8 * repeat**3, "skipped", errors[name], "", ""))
                continue
            ratios = [
                f"{medians[peer] / medians[name]:.1f}" if peer in medians else "–"
                for peer in ("chgnet", "mace")
            ]
            row = (f"{1 / medians[name]:.2f}", f"{1e3 * medians[name]:.1f}", *ratios)
            table.rows.append((name, 8 * repeat**3, *row))
            print(*table.rows[-1], flush=True)
    return table


def scaling(args: argparse.Namespace) -> Table:
    """Time one evaluation against the number of atoms, and one search for neighbours."""
    use_threads(args.threads)
    sizes, costs = [], []
    rows = []
    for repeat in args.scaling:
        atoms = silicon(repeat)
        atoms.calc = our_calculator(args.model)
        atoms.get_forces()
        seconds = []
        rng = np.random.default_rng(args.seed)
        for _ in range(args.scaling_steps):
            atoms.positions += rng.normal(0, 0.002, atoms.positions.shape)
            start = time.perf_counter()
            atoms.get_forces()
            seconds.append(time.perf_counter() - start)
        neighbours = atoms.calc.forcefield.neighbours
        assert neighbours.searches == 1, "these steps were to go without a search"
        neighbours._numbers = None
        start = time.perf_counter()
        neighbours.graphs(atoms)
        search = time.perf_counter() - start
        sizes.append(len(atoms))
        costs.append(statistics.median(seconds))
        each = f"{1e6 * costs[-1] / len(atoms):.1f}"
        rows.append((f"{len(atoms):,}", f"{1e3 * costs[-1]:.1f}", each, f"{1e3 * search:.1f}"))
        print(*rows[-1], flush=True)
    large = [k for k, n in enumerate(sizes) if n >= 500]
    note = ""
    if len(large) > 1:
        x, y = (np.log([v[k] for k in large]) for v in (sizes, costs))
        note = f"From 500 atoms on the cost grows as n^{np.polyfit(x, y, 1)[0]:.2f}."
    columns = ("atoms", "ms per step", "µs per atom", "ms of a search, when there is one")
    return Table("Cost against the number of atoms", columns, rows, note)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "md_speed")
    parser.add_argument(
        "--model", default="mp-potential", help="potential or plugin, or untrained: as mp-small"
    )
    parser.add_argument("--repeats", type=int, nargs="*", default=[2, 4], help="8 n³ atoms each")
    parser.add_argument("--steps", type=int, default=100, help="timed steps a turn")
    parser.add_argument("--peers", nargs="*", default=["chgnet", "mace"], help="other packages")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has them")
    parser.add_argument("--peer-steps", type=int, default=8, help="their timed steps a turn")
    parser.add_argument("--turns", type=int, default=3, help="processes of each package and size")
    parser.add_argument(
        "--scaling", type=int, nargs="*", default=[2, 3, 4, 6, 8, 10, 11], help="8 n³ atoms each"
    )
    parser.add_argument("--scaling-steps", type=int, default=5, help="timed evaluations of each")
    return parser.parse_args()


def main() -> None:
    """Measure and write the result."""
    args = parse_arguments()
    tables = [speed(args)] if args.repeats else []
    tables += [scaling(args)] if args.scaling else []
    more = facts(args.threads, model=Path(args.model).name, precision="float32")
    write_tables(args.output, "Speed of molecular dynamics", more, tables)


if __name__ == "__main__":
    main()
