"""Known answers of the six elements of mlearn from force plugins: lattice, elasticity, curves.

Reference is the DFT of the data. Lattice constant: its unstrained cells. Elastic constants: a cubic
tensor fitted to the stresses of its strained cells, the model's to its own stresses of these very
cells, so clamped or relaxed ions cannot differ. A constant isotropic stress is fitted besides (that
of Cu and Ni is offset in the data, see their card). Bulk modulus: of the tensor, and of an equation
of state of the model; the Voigt-Reuss-Hill value of mp_elasticity stands beside it. The strained
cells are among the frames that plugins are trained on: this asks whether derivatives are right, not
whether other crystals are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from _table import RESULTS, Table, add_common_arguments, facts, write_tables
from ase.eos import EquationOfState
from scipy.optimize import minimize_scalar

from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.graph import GraphOptions, build_graph
from matxfer.potential.plugin import load_potential_plugin
from matxfer.runtime import use_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.potential.model import Potential

ELEMENTS = ("Cu", "Ge", "Li", "Mo", "Ni", "Si")
#: Cells per edge of the strained supercells.
CELLS = {"Cu": 3, "Ge": 2, "Li": 1, "Mo": 3, "Ni": 3, "Si": 2}
#: Largest strain that counts as linear.
LINEAR = 0.021
GPA = 160.21766208  # of 1 eV/Å³
#: Materials Project ids of the ground states.
MP_ID = {
    "Cu": "mp-30",
    "Ge": "mp-32",
    "Li": "mp-135",
    "Mo": "mp-129",
    "Ni": "mp-23",
    "Si": "mp-149",
}


def respond(potential: Potential, crystals: list[Crystal]) -> tuple[NDArray[np.float64], ...]:
    """Return energies (n,) in eV/atom and stresses (n, 3, 3) in GPa."""
    options = GraphOptions(potential.backbone.graph_options.cutoff_angstrom, symmetry=False)
    pack = PackedGraphs.pack([build_graph(crystal, options) for crystal in crystals])
    energy, stress = [], []
    for k, crystal in enumerate(crystals):
        found = potential.respond(pack.batch(np.array([k])))
        energy.append(float(found.energy_ev[0]) / crystal.n_sites)
        stress.append(found.virial_ev[0].double().numpy() / crystal.volume_angstrom3 * GPA)
    return np.array(energy), np.array(stress)


def strained(data: Path, element: str) -> tuple[Crystal, list[Crystal], NDArray[np.float64], float]:
    """Return the ideal cell, its strained copies, their DFT stresses in GPa, lattice constant."""
    frame = pd.read_parquet(data / "mlearn_efs.parquet")
    frame = frame[frame.formula == element]
    largest = np.array([np.abs(np.array(forces)).max() for forces in frame.forces_ev_per_a])
    frame = frame[(frame.group == "Elastic") | (frame.group.isna() & (largest < 0.02))]
    n = frame.n_sites.mode()[0]
    frame = frame[frame.n_sites == n]
    crystals = [
        Crystal(
            np.reshape(row.lattice, (3, 3)),
            np.array(row.numbers),
            np.reshape(row.frac_coords, (-1, 3)),
        )
        for row in frame.itertuples()
    ]
    # The modes strain one or two axes: the length that most axes have is the unstrained one.
    lengths = np.concatenate([np.linalg.norm(c.lattice, axis=1) for c in crystals])
    values, counts = np.unique(lengths.round(3), return_counts=True)
    length = lengths[lengths.round(3) == values[counts.argmax()]].mean()
    cell = length * np.eye(3)
    small = [k for k, c in enumerate(crystals) if np.abs(strain(c.lattice, cell)).max() < LINEAR]
    chosen = [crystals[k] for k in small]
    stress = np.array([np.reshape(frame.stress_ev_per_a3.iloc[k], (3, 3)) for k in small]) * GPA
    flattest = min(crystals, key=lambda c: np.abs(strain(c.lattice, cell)).max())
    ideal = Crystal(cell, flattest.numbers, flattest.frac_coords)
    return ideal, chosen, stress, length / CELLS[element]


def strain(lattice: NDArray[np.float64], cell: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Green-Lagrange strain of a lattice (rows) relative to a cell."""
    deformation = np.linalg.solve(cell, lattice)  # rows: lattice = cell · deformation
    return np.asarray(0.5 * (deformation @ deformation.T - np.eye(3)))


def cubic_tensor(
    strains: list[NDArray[np.float64]], stresses: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Return C11, C12, C44 of the least-squares fit, a constant isotropic stress besides."""
    rows, values = [], []
    for epsilon, sigma in zip(strains, stresses, strict=True):
        trace = np.trace(epsilon)
        for i in range(3):
            rows.append([epsilon[i, i], trace - epsilon[i, i], 0.0, 1.0])
            values.append(sigma[i, i])
        for i, j in ((0, 1), (0, 2), (1, 2)):
            rows.append([0.0, 0.0, 2 * epsilon[i, j], 0.0])
            values.append(sigma[i, j])
    (c11, c12, c44, _), *_ = np.linalg.lstsq(np.array(rows), np.array(values))
    return float(c11), float(c12), float(c44)


def scaled(ideal: Crystal, factor: float) -> Crystal:
    """Return the ideal crystal with other edges."""
    return Crystal(ideal.lattice * factor, ideal.numbers, ideal.frac_coords)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "solids")
    parser.add_argument("--plugins", type=Path, required=True, help="folder of potentials.py")
    parser.add_argument("--variant", default="full-ewc", help="which plugins of it")
    parser.add_argument("--figure", type=Path, default=RESULTS / "solids.png")
    return parser.parse_args()


def main() -> None:
    """Compute and write."""
    args = parse_arguments()
    use_threads(args.threads)
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    elastic = pd.read_parquet(args.data / "mp_elasticity.parquet").set_index("material_id")
    lattice = Table("Lattice constant, Å", ("element", "DFT", "plugin", "error %", "within 0.5 %"))
    moduli = Table(
        "Elastic constants, GPa (DFT / plugin)",
        ("element", "C11", "C12", "C44", "largest error %", "within 15 %"),
    )
    bulk = Table(
        "Bulk modulus, GPa",
        ("element", "DFT tensor", "mp_elasticity", "plugin tensor", "plugin equation of state",
         "error %", "within 10 %"),
    )  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.2), constrained_layout=True)
    for element, axis in zip(ELEMENTS, axes.flat, strict=True):
        folder = args.plugins / f"{element}-{args.variant}"
        potential = load_potential_plugin(folder).potential
        ideal, crystals, dft, a_dft = strained(args.data, element)

        def energy(factor: float, p: Potential = potential, c: Crystal = ideal) -> float:
            return float(respond(p, [scaled(c, factor)])[0][0])

        best = minimize_scalar(
            energy, bounds=(0.95, 1.05), method="bounded", options={"xatol": 1e-5}
        )
        a = a_dft * best.x
        off = 100 * (a / a_dft - 1)
        lattice.rows.append(
            (element, f"{a_dft:.4f}", f"{a:.4f}", f"{off:+.2f}", _yes(abs(off) < 0.5))
        )

        strains = [strain(c.lattice, ideal.lattice) for c in crystals]
        ours = respond(potential, crystals)[1]
        reference, found = cubic_tensor(strains, dft), cubic_tensor(strains, ours)
        # The stresses of sheared Li change sign with the size of the shear: no reference.
        errors = [100 * (f / r - 1) for f, r in zip(found, reference, strict=True) if r > 1]
        worst = max(errors, key=abs)
        cells = [
            f"{r:.0f} / {f:.0f}" if r > 1 else f"noise / {f:.0f}"
            for r, f in zip(reference, found, strict=True)
        ]
        moduli.rows.append((element, *cells, f"{worst:+.0f}", _yes(abs(worst) < 15)))

        factors = best.x * np.linspace(0.98, 1.02, 9)
        energies = respond(potential, [scaled(ideal, f) for f in factors])[0]
        volumes = np.array([scaled(ideal, f).volume_angstrom3 / ideal.n_sites for f in factors])
        state = EquationOfState(volumes, energies, eos="birchmurnaghan")
        _, _, slope = state.fit()
        k_dft, k_ours = ((c[0] + 2 * c[1]) / 3 for c in (reference, found))
        off = 100 * (slope * GPA / k_dft - 1)
        told = elastic.bulk_modulus_vrh_gpa.get(MP_ID[element], np.nan)
        bulk.rows.append((element, f"{k_dft:.0f}", f"{told:.0f}", f"{k_ours:.0f}",
                          f"{slope * GPA:.0f}", f"{off:+.0f}", _yes(abs(off) < 10)))  # fmt: skip

        wide = best.x * np.linspace(0.94, 1.06, 41)
        v = np.array([scaled(ideal, f).volume_angstrom3 / ideal.n_sites for f in wide])
        e = respond(potential, [scaled(ideal, f) for f in wide])[0]
        axis.plot(v, 1e3 * (e - e.min()), color="#0072B2", label="plugin")
        v0 = ideal.volume_angstrom3 / ideal.n_sites
        near = v[(v > 0.93 * v0) & (v < 1.07 * v0)]
        parabola = 0.5 * k_dft / GPA * (near - v0) ** 2 / v0
        axis.plot(near, 1e3 * parabola, "--", color="#D55E00", label="DFT: volume, bulk modulus")
        axis.set_title(element)
        axis.set_xlabel("volume, Å³/atom")
        axis.set_ylabel("energy, meV/atom")
    axes.flat[0].legend(fontsize=8, frameon=False)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=110)
    more = facts(args.threads, plugins=args.variant)
    write_tables(args.output, "Six elemental solids", more, [lattice, moduli, bulk])


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


if __name__ == "__main__":
    main()
