"""Is energy conserved? Drift of the total energy of silicon in the NVE ensemble.

64 atoms, velocity Verlet, after a warm-up in which the crystal takes half of the kinetic energy
that it was given. The drift is the slope of a line through the total energy per atom; the waver is
the standard deviation about it.

    python tests/benchmarks/nve_drift.py --threads 1 --models mp-potential PLUGIN
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from _md import matxfer as our_calculator
from _table import Table, add_common_arguments, facts, write_tables
from ase import units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet

from matxfer.dynamics import MDOptions, run_md
from matxfer.forcefield import ForceField
from matxfer.relaxation import RelaxOptions, relax
from matxfer.runtime import use_threads


def run(args: argparse.Namespace, model: str, dtype: str) -> tuple[str, ...]:
    """Return a row of the table."""
    atoms = bulk("Si", "diamond", a=5.43, cubic=True).repeat(args.repeat)
    calculator = our_calculator(model)
    field = calculator.forcefield
    calculator.forcefield = ForceField(field.members, dtype=dtype)
    atoms.calc = calculator
    relax(atoms, RelaxOptions(fmax_ev_per_a=0.005, steps=200))
    edge = atoms.get_volume() ** (1 / 3) / args.repeat
    # Twice the temperature: half of it becomes potential energy.
    warm = MDOptions("nve", 2 * args.temperature, args.warm_up, args.timestep_fs, seed=args.seed)
    run_md(atoms, warm, lambda _: None)
    dynamics = VelocityVerlet(atoms, args.timestep_fs * units.fs)
    found: list[tuple[float, float]] = []
    dynamics.attach(
        lambda: found.append((atoms.get_total_energy() / len(atoms), atoms.get_temperature())),
        interval=args.interval,
    )
    steps = round(1e3 * args.picoseconds / args.timestep_fs)
    dynamics.run(steps)
    energy, temperature = np.array(found).T
    time_ps = np.arange(len(energy)) * args.interval * args.timestep_fs / 1e3
    slope, start = np.polyfit(time_ps, 1e3 * energy, 1)
    waver = np.std(1e3 * energy - slope * time_ps - start)
    searches = calculator.forcefield.neighbours.searches
    return (
        Path(model).name, dtype, f"{edge:.3f}", f"{temperature.mean():.0f}", f"{slope:+.4f}",
        f"{waver:.4f}", f"{np.ptp(1e3 * energy):.4f}", f"{searches:,}",
    )  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "nve_drift")
    parser.add_argument(
        "--models", nargs="+", default=["mp-potential"], help="potentials or plugins, or untrained"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"], help="precisions")
    parser.add_argument("--repeat", type=int, default=2, help="8 n³ atoms")
    parser.add_argument("--temperature", type=float, default=300.0, help="K, about")
    parser.add_argument("--timestep-fs", type=float, default=1.0, help="of a step")
    parser.add_argument("--warm-up", type=int, default=1000, help="steps before")
    parser.add_argument("--picoseconds", type=float, default=10.0, help="length of the run")
    parser.add_argument("--interval", type=int, default=10, help="steps between energies")
    return parser.parse_args()


def main() -> None:
    """Measure and write the result."""
    args = parse_arguments()
    use_threads(args.threads)
    table = Table(
        "Drift of the total energy",
        ("model", "precision", "relaxed cell Å", "mean K", "drift meV/atom/ps", "waver meV/atom",
         "range meV/atom", "neighbour searches"),
    )  # fmt: skip
    for model in args.models:
        for dtype in args.dtypes:
            table.rows.append(run(args, model, dtype))
            print(*table.rows[-1], flush=True)
    more = facts(
        args.threads,
        system=f"{8 * args.repeat**3} atoms of silicon, {args.picoseconds:g} ps in steps of "
        f"{args.timestep_fs:g} fs",
    )
    write_tables(args.output, "Energy conservation", more, [table])


if __name__ == "__main__":
    main()
