"""What a model's card says, as text for people."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from matxfer.files import read_shapes
from matxfer.model import WEIGHTS_FILE, find_model, headline_figure, is_potential
from matxfer.nn.registry import BACKBONES, MissingPackageError, declared, origin

if TYPE_CHECKING:
    from pathlib import Path


def size_of(folder: Path) -> tuple[int, float]:
    """Return the number of parameters of a model and the size of its folder in MB."""
    shapes = read_shapes(folder / WEIGHTS_FILE)
    megabytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    # A scaler is fitted, not trained.
    trained = sum(prod(shape) for name, shape in shapes.items() if ".scaler." not in name)
    return trained, megabytes


def one_line(name: str) -> str:
    """Return name, size, properties and test errors of a model."""
    folder, card = find_model(name)
    parameters, megabytes = size_of(folder)
    size = f"{name}: {parameters:,} parameters, {megabytes:.1f} MB"
    if is_potential(card):
        return f"{size}; potential ({', '.join(_potential_errors(card.get('test', {})))})"
    properties = []
    for head in card["heads"]:
        prop = head["property"]["name"]
        test = card.get("figures", {}).get(prop, {}).get("test", {})
        text = prop
        if test.get("n"):
            error, unit = headline_figure(test)
            text += f" (MAE {error:.3g} {unit})" if unit else f" (MAE {error:.3g})"
        properties.append(text)
    return f"{size}; {', '.join(properties)}"


def line_of_package(name: str) -> str:
    """Return the line of a model that a package brings, or what to install for it."""
    try:
        return one_line(name)
    except MissingPackageError as error:
        return f"{name}: {error}"


def backbones() -> dict[str, dict[str, str]]:
    """Return the backbones that installed packages declare, by name: package, class, extra."""
    return {
        name: {
            "package": origin(entry),
            "class": entry.value.split(" ")[0],
            "extra": ",".join(entry.extras),
        }
        for name, entry in sorted(declared(BACKBONES).items())
    }


def _potential_errors(figures: dict[str, Any]) -> list[str]:
    """Return the mean absolute errors of a potential, each with its unit."""
    named = {
        "energy": ("energy_mae_ev_per_atom", "eV/atom"),
        "forces": ("forces_mae_ev_per_a", "eV/Å"),
        "stress": ("stress_mae_ev_per_a3", "eV/Å³"),
    }
    return [
        f"{what} MAE {figures[key]:.3g} {unit}"
        for what, (key, unit) in named.items()
        if key in figures
    ]


def full_text(name: str) -> str:
    """Return the whole card, section by section."""
    folder, card = find_model(name)
    parameters, megabytes = size_of(folder)
    shape = card["architecture"]
    lines = [
        f"{card['name']}  ({folder})",
        f"  {parameters:,} parameters, {megabytes:.1f} MB with the Fisher information",
        f"  {len(card['elements'])} elements, cutoff {shape['graph']['cutoff_angstrom']} Å, "
        + ", ".join(f"{k} {v}" for k, v in shape.items() if k not in ("graph", "kind")),
        "",
        "errors (mean absolute)",
    ]
    for prop, parts in card.get("figures", {}).items():
        for part, figures in parts.items():
            if not figures.get("n"):
                continue
            error, unit = headline_figure(figures)
            lines.append(f"  {prop:32} {part:4}  {error:.4g} {unit}  (n {figures['n']:,})")
    if is_potential(card):
        lines += [
            f"  {part}: {', '.join(_potential_errors(card.get(part, {})))}"
            for part in ("validation", "test")
        ]
    lines += ["", "data", *_data_lines(card), "", "training"]
    for key in ("training_device", "training_seconds", "note", "command", "date", "licence"):
        if key in (told := card.get("provenance", {}) | card):
            lines.append(f"  {key.replace('_', ' ')}: {told[key]}")
    lines += [f"  cite: {entry}" for entry in card.get("citation", [])]
    lines.append(f"  sha256: {card['sha256']}")
    return "\n".join(lines)


def _data_lines(card: dict[str, Any]) -> list[str]:
    """Return what a model was trained on, a line or two per table."""
    if is_potential(card):
        data = card.get("data", {})
        rows = ", ".join(f"{part} {count:,}" for part, count in data.get("rows", {}).items())
        lines = [f"  {data.get('frames', 'unknown')}: {rows}"]
        lines += [f"    {finding['message']}" for finding in data.get("findings", [])]
        return [*lines, f"  licence: {data['licence']}"] if data.get("licence") else lines
    lines = []
    for table in card.get("data", []):
        learnt = ", ".join(table["targets"]) or f"denoising, {table.get('denoise_angstrom')} Å"
        rows = ", ".join(f"{part} {count:,}" for part, count in table["rows"].items())
        lines.append(f"  {table['table']}: {learnt}; {rows}")
        if kept_out := table.get("excluded"):
            tables = ", ".join(t["table"] for t in kept_out["tables"])
            lines.append(f"    without the materials of {tables}")
    return lines
