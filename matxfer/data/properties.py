"""The one registry of properties: column name, unit, transform to the scale the network fits.

A column's unit is the end of its name (``band_gap_ev``, ``bulk_modulus_vrh_gpa``). Known
properties say more: how they are transformed and whether per-element reference energies apply.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Ends of column names and the units they mean; longer ends first where one ends another.
UNIT_SUFFIXES: dict[str, str] = {
    "_ev_per_cation": "eV/cation",
    "_ev_per_a3": "eV/Å³",
    "_mev_per_atom": "meV/atom",
    "_mev_per_a2": "meV/Å²",
    "_ev_per_atom": "eV/atom",
    "_ev_per_a": "eV/Å",
    "_j_per_mol_atom_k": "J/(mol-atom·K)",
    "_mub_per_cell": "μB/cell",
    "_uv_per_k": "μV/K",
    "_c_per_m2": "C/m²",
    "_per_cm": "1/cm",
    "_cm1": "1/cm",
    "_gpa": "GPa",
    "_mev": "meV",
    "_ev": "eV",
    "_k": "K",
}

TRANSFORMS = ("identity", "nonnegative", "log", "log10", "log1p", "bounded", "bounded(LOW,HIGH)")
#: A bounded property is fitted on a range so much wider at both ends, so that a value at a limit
#: has a place of its own on the fitted scale.
BOUNDED_MARGIN = 0.01


@dataclass(frozen=True, slots=True)
class Property:
    """A scalar property of a crystal.

    Parameters
    ----------
    name
        Column name; ends in the unit.
    unit
        Unit of the values, ``""`` if dimensionless.
    transform
        Scale on which the network fits: ``identity``, ``nonnegative`` (identity, predictions
        clipped at zero), ``log``, ``log10``, ``log1p`` or ``bounded(LOW,HIGH)`` (logit between
        two limits, predictions never beyond them; ``bounded`` alone: between 0 and 1).
    per_atom_energy
        True if the value is an energy per atom, to which each element contributes a reference.
    """

    name: str
    unit: str
    transform: str = "identity"
    per_atom_energy: bool = False

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS[:-1] and limits_of(self.transform) is None:
            raise OptionError(
                f"{self.name}: unknown transform {self.transform!r}; known are {TRANSFORMS}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the property as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Property:
        """Read a property back."""
        return cls(**data)


def unit_of(column: str) -> str:
    """Return the unit that a column's name ends in, ``""`` if it names none."""
    suffix = next((end for end in UNIT_SUFFIXES if column.endswith(end)), None)
    if suffix is None:
        return ""
    unit = UNIT_SUFFIXES[suffix]
    return f"ln({unit})" if column.startswith("log_") else unit


_KNOWN = {
    prop.name: prop
    for prop in (
        Property("formation_energy_ev_per_atom", "eV/atom", per_atom_energy=True),
        Property("expt_formation_enthalpy_ev_per_atom", "eV/atom", per_atom_energy=True),
        Property("band_gap_ev", "eV", transform="nonnegative"),
        Property("bulk_modulus_vrh_gpa", "GPa", transform="log10"),
        Property("shear_modulus_vrh_gpa", "GPa", transform="log10"),
    )
}


def property_of(column: str) -> Property:
    """Return what is known of a column: its registry entry, else its unit and no transform."""
    return _KNOWN.get(column) or Property(column, unit_of(column))


def limits_of(transform: str) -> tuple[float, float] | None:
    """Return the limits of a ``bounded`` transform, ``None`` if it is another.

    Raises
    ------
    OptionError
        If the limits are no two numbers in rising order.
    """
    found = re.fullmatch(r"bounded(?:\((.*)\))?", transform)
    if found is None:
        return None
    try:
        low, high = (float(word) for word in ("0,1" if found[1] is None else found[1]).split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not -math.inf < low < high < math.inf:
        raise OptionError(
            f"transform {transform!r}: write two limits, the lower first, such as bounded(0,0.5)"
        )
    return low, high


def apply_transform(transform: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map values in their unit to the fitted scale; values outside its domain become NaN.

    The limits of ``bounded`` belong to its domain.
    """
    if transform in ("identity", "nonnegative"):
        return values
    result = np.full_like(values, np.nan)
    if limits := limits_of(transform):
        low, high = _widened(*limits)
        domain = (values >= limits[0]) & (values <= limits[1])
        inside = values[domain]
        result[domain] = np.log((inside - low) / (high - inside))
        return result
    domain = values > (-1.0 if transform == "log1p" else 0.0)
    function = {"log": np.log, "log10": np.log10, "log1p": np.log1p}[transform]
    result[domain] = function(values[domain])
    return result


def invert_transform(transform: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map the fitted scale back to values in their unit."""
    if transform == "identity":
        return values
    if transform == "nonnegative":
        return np.maximum(values, 0.0)
    if transform == "log10":
        return np.asarray(10.0**values)
    if limits := limits_of(transform):
        low, high = _widened(*limits)
        # tanh never overflows, as an exponential would.
        return np.clip(low + (high - low) * 0.5 * (1 + np.tanh(0.5 * values)), *limits)
    return np.asarray({"log": np.exp, "log1p": np.expm1}[transform](values))


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = BOUNDED_MARGIN * (high - low)
    return low - margin, high + margin
