"""Molecular dynamics of one structure: ASE's integrators, frames as they come, a rule to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import MatxferError, OptionError
from matxfer.options import COUNT, NOT_NEGATIVE, POSITIVE, SEED, check_choice, check_ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from ase import Atoms
    from numpy.typing import NDArray

ENSEMBLES = ("nve", "nvt", "npt")
#: A barostat is slower than a thermostat by this factor.
_BAROSTAT = 10


class UncertainError(MatxferError):
    """Potentials of an ensemble that disagree by more than a run may bear."""


class UncertaintyStop:
    """An observer that ends a run where an ensemble of potentials disagrees too much.

    ``dynamics.attach(UncertaintyStop(atoms, 0.3), interval=5)`` for ASE's dynamics and optimisers
    alike: past the limit the run ends with an :class:`UncertainError`, and the atoms are as they
    were then.

    Parameters
    ----------
    atoms
        Atoms with a :class:`matxfer.calculator.MatxferCalculator` of several plugins.
    limit_ev_per_a
        Largest spread of the force on an atom between the potentials.

    Raises
    ------
    OptionError
        If the limit is not positive, or the calculator is no ensemble.
    """

    def __init__(self, atoms: Atoms, limit_ev_per_a: float) -> None:
        self.atoms, self.limit_ev_per_a = atoms, limit_ev_per_a
        check_ranges(self, {"limit_ev_per_a": POSITIVE}, "uncertainty")
        known = getattr(atoms.calc, "implemented_properties", ())
        if "uncertainty" not in known:
            raise OptionError(
                "one potential alone cannot tell its uncertainty: give two or more plugins, "
                "trained with different seeds or on different parts of the data"
            )

    def __call__(self) -> None:
        """Look at the atoms as they are."""
        uncertainty = self.atoms.calc.get_property("uncertainty", self.atoms)
        if not uncertainty <= self.limit_ev_per_a:
            spread = self.atoms.calc.get_property("forces_std", self.atoms)
            atom = int(np.argmax(spread))
            raise UncertainError(
                f"the potentials disagree by {uncertainty:.3g} eV/Å on the force on atom {atom} "
                f"({self.atoms.symbols[atom]}), more than {self.limit_ev_per_a:g}: this is outside "
                "of what they know; add such structures to their training data"
            )


@dataclass(frozen=True, slots=True)
class MDOptions:
    """How a run is done.

    Parameters
    ----------
    ensemble
        ``nve`` (velocity Verlet), ``nvt`` (stochastic velocity rescaling, Bussi et al., J. Chem.
        Phys. 126, 014101 (2007)) or ``npt`` (Martyna-Tobias-Klein, the cell keeps its shape).
    temperature_k
        Of the thermostat, and of the velocities at the start.
    steps, timestep_fs
        How many, and how long each.
    pressure_gpa
        Of ``npt``.
    damping_fs
        Time in which the thermostat acts; the barostat's is ten times as long.
    interval
        Steps between frames.
    max_uncertainty_ev_per_a
        See :class:`UncertaintyStop`; None: no such limit.
    seed
        Of velocities and thermostat.

    Raises
    ------
    OptionError
        If one is out of its range.
    """

    ensemble: str = "nvt"
    temperature_k: float = 300.0
    steps: int = 1000
    timestep_fs: float = 1.0
    pressure_gpa: float = 0.0
    damping_fs: float = 100.0
    interval: int = 10
    max_uncertainty_ev_per_a: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("ensemble", self.ensemble, ENSEMBLES)
        positive = ("timestep_fs", "damping_fs", "max_uncertainty_ev_per_a")
        finite = (lambda value: bool(np.isfinite(value)), "must be finite")
        ranges = {
            **dict.fromkeys(("steps", "interval"), COUNT),
            **dict.fromkeys(positive, POSITIVE),
            "temperature_k": NOT_NEGATIVE if self.ensemble == "nve" else POSITIVE,
            "seed": SEED,
            "pressure_gpa": finite,
        }
        check_ranges(self, ranges)


def run_md(
    atoms: Atoms, options: MDOptions, on_frame: Callable[[dict[str, float]], None]
) -> dict[str, float]:
    """Run atoms that have a calculator; return what the last frame says of itself.

    Parameters
    ----------
    atoms
        The atoms; they get fresh velocities, and are changed in place.
    options
        How.
    on_frame
        Called at the start and every ``interval`` steps with ``step``, ``time_fs``,
        ``temperature_k``, ``potential_energy_ev``, ``total_energy_ev`` and, where there are such,
        ``volume_angstrom3``, ``pressure_gpa`` and ``uncertainty_ev_per_a``.

    Raises
    ------
    CrystalError
        If the atoms are no usable structure, or become none on the way.
    UncertainError
        Past the limit of the uncertainty.
    OptionError
        For a single atom, ``npt`` without a periodic cell, or a limit without an ensemble of
        potentials.
    """
    if options.ensemble == "npt" and not atoms.pbc.all():
        raise OptionError("npt needs a cell that is periodic in three directions; use nvt")
    if len(atoms) == 1:
        raise OptionError("one atom has nothing to move against: take a larger cell (--supercell)")
    stop = None
    if options.max_uncertainty_ev_per_a is not None:
        stop = UncertaintyStop(atoms, options.max_uncertainty_ev_per_a)
    rng = np.random.default_rng(options.seed)
    atoms.set_momenta(_thermal_momenta(atoms, options.temperature_k, rng))
    dynamics = _integrator(atoms, options, rng)
    last: dict[str, float] = {}

    def frame() -> None:
        last.update(_facts(atoms, dynamics.nsteps, options.timestep_fs))
        on_frame(last)

    dynamics.attach(frame, interval=options.interval)
    if stop is not None:
        dynamics.attach(stop, interval=1)
    dynamics.run(options.steps)
    return last


def _thermal_momenta(
    atoms: Atoms, temperature_k: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return momenta of the Maxwell-Boltzmann distribution without those of the whole, (n, 3)."""
    from ase.units import kB

    masses = atoms.get_masses()[:, None]
    momenta = rng.standard_normal((len(atoms), 3)) * np.sqrt(masses * kB * temperature_k)
    return np.asarray(momenta - momenta.sum(axis=0) * masses / masses.sum())


def _integrator(atoms: Atoms, options: MDOptions, rng: np.random.Generator) -> Any:
    from ase import units

    step, damping = options.timestep_fs * units.fs, options.damping_fs * units.fs
    if options.ensemble == "nve":
        from ase.md.verlet import VelocityVerlet

        return VelocityVerlet(atoms, step)
    if options.ensemble == "nvt":
        from ase.md.bussi import Bussi

        # It draws from the older kind of generator.
        old = np.random.RandomState(rng.integers(2**32))
        return Bussi(atoms, step, temperature_K=options.temperature_k, taut=damping, rng=old)
    from ase.md.nose_hoover_chain import IsotropicMTKNPT

    return IsotropicMTKNPT(
        atoms,
        step,
        temperature_K=options.temperature_k,
        pressure_au=options.pressure_gpa * units.GPa,
        tdamp=damping,
        pdamp=_BAROSTAT * damping,
    )


def _facts(atoms: Atoms, step: int, timestep_fs: float) -> dict[str, float]:
    """Return what is told of a frame, its units in the names."""
    from ase.units import GPa

    potential = float(atoms.get_potential_energy())
    facts = {
        "step": step,
        "time_fs": step * timestep_fs,
        "temperature_k": float(atoms.get_temperature()),
        "potential_energy_ev": potential,
        "total_energy_ev": potential + float(atoms.get_kinetic_energy()),
    }
    if atoms.pbc.all():
        stress = atoms.get_stress(include_ideal_gas=True)
        facts["volume_angstrom3"] = float(atoms.get_volume())
        facts["pressure_gpa"] = float(-stress[:3].mean() / GPa)
    if "uncertainty" in atoms.calc.results:
        facts["uncertainty_ev_per_a"] = float(atoms.calc.results["uncertainty"])
    return facts
