"""The command ``matxfer potential``, and ``matxfer finetune`` where frames are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.cli_names import model_names
from matxfer.errors import OptionError
from matxfer.terminal import (
    AsJson,
    condition,
    counter_on_terminal,
    plain_warnings,
    print_json,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matxfer.potential.dataset import FrameData

#: Words after --target that mean frames.
TARGETS = ("energy_ev", "forces", "forces_ev_per_a", "stress_ev_per_a3")
#: The same names as in matxfer.model and matxfer.potential.model, which would import torch.
_DEFAULT_MODEL, _DEFAULT_POTENTIAL = "mp-base", "mp-potential"
_AUTO = "auto"  # as in matxfer.transfer.selection
#: Figures of errors: what, by how much a unit for people is larger, and its name.
_FIGURES = {
    "energy": ("ev_per_atom", 1e3, "meV/atom"),
    "forces": ("ev_per_a", 1.0, "eV/Å"),
    "stress": ("ev_per_a3", 160.21766, "GPa"),
}

Where = Annotated[
    list[str] | None,
    typer.Option(help="COLUMN=VALUE: only frames that have it; may be repeated."),
]
EnergyWeight = Annotated[
    float | None, typer.Option(help="Of errors in eV/atom, of frames; 0: none.")
]
ForceWeight = Annotated[float | None, typer.Option(help="Of errors in eV/Å, of frames; 0: none.")]
StressWeight = Annotated[float | None, typer.Option(help="Of errors in eV/Å³, of frames; 0: none.")]
MaxForce = Annotated[
    float | None, typer.Option(help="Frames with a larger force (eV/Å) are not trained on.")
]
Check = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Refuse frames whose units are not eV and Å."),
]


def potential_of(model: str, target: str | None) -> str | None:
    """Return the potential that a plugin is wanted of, None if it is a plugin of a property.

    Raises
    ------
    OptionError
        If model and target do not go together.
    """
    from matxfer.model import find_model, is_potential

    if model == _AUTO:
        if target is None or target in TARGETS:
            raise OptionError(
                f"--model {_AUTO} chooses among models of properties: give the column of one with "
                f"--target; for energies and forces give --model {_DEFAULT_POTENTIAL}"
            )
        return None
    if target in TARGETS and model == _DEFAULT_MODEL:
        model = _DEFAULT_POTENTIAL
    of_frames = is_potential(find_model(model)[1])
    if of_frames and target is not None and target not in TARGETS:
        raise OptionError(
            f"--target {target}: {model} is a potential, whose plugins learn energies, forces and "
            "stresses together; leave --target out, or give a model of properties with --model"
        )
    if not of_frames and target is None:
        raise OptionError(
            f"{model} is a model of properties: give the column of one with --target; for frames "
            f"with energies and forces give a potential: --model {_DEFAULT_POTENTIAL}"
        )
    if not of_frames and target in TARGETS:
        raise OptionError(
            f"--target {target}: energies and forces are learnt by plugins of a potential, and "
            f"{model} is a model of properties: give --model {_DEFAULT_POTENTIAL}"
        )
    return model if of_frames else None


def finetune_frames(
    files: list[str],
    output: str | None,
    potential: str,
    *,
    split_column: str | None,
    where: list[str] | None,
    source_data: str | None,
    check: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Train a plugin of a potential, and say how it went."""
    from matxfer.potential.fit import finetune_potential

    if options.get("strength") == "auto":
        raise OptionError("--strength auto: a plugin of a potential needs a number")
    folder = output or f"{Path(files[0]).stem}-plugin"
    with plain_warnings(), counter_on_terminal("building graphs") as advance:
        plugin = finetune_potential(
            files,
            folder,
            potential=potential,
            split_column=split_column,
            where=conditions(where),
            source_data=source_data,
            check=check,
            on_graphs=advance,
            on_data=None if as_json else _say_data,
            on_best=None if as_json else _say_best,
            **{name: value for name, value in options.items() if value is not None},
        )
    if as_json:
        print_json({"plugin": folder, **plugin.meta})
        return
    for line in plugin_lines(plugin.meta):
        typer.echo(line)
    seconds = plugin.meta["provenance"]["seconds"]
    typer.echo(f"{folder}: written in {seconds:.1f} s; use it with --plugin {folder}")


def potential(
    frames: Annotated[
        list[str],
        typer.Argument(
            help="Tables or extended XYZ files with energies and forces.", metavar="FRAMES..."
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the potential.")],
    model: Annotated[
        str,
        typer.Option(
            help="Whose layers are the start: a model of properties, a potential, or none.",
            autocompletion=model_names,
        ),
    ] = "mp-small",
    split_column: Annotated[
        str | None, typer.Option(help="Column with train, val, test; else a seeded random split.")
    ] = None,
    where: Where = None,
    freeze: Annotated[int | None, typer.Option(help="Frozen message-passing layers.")] = None,
    energy_weight: EnergyWeight = None,
    force_weight: ForceWeight = None,
    stress_weight: StressWeight = None,
    max_force: MaxForce = None,
    epochs: Annotated[int | None, typer.Option(help="Passes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the last layer.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Learning rate of a layer over that of the one above.")
    ] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="Of the readout.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On the readout.")] = None,
    average: Annotated[
        float | None, typer.Option(help="Decay of a running average of the weights; 0: none.")
    ] = None,
    relaxed: Annotated[
        str | None,
        typer.Option(help="Table of relaxed structures: their forces and stresses are zero."),
    ] = None,
    relaxed_where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=VALUE: only relaxed structures that have it.")
    ] = None,
    n_relaxed: Annotated[int, typer.Option(help="At most so many of them, at random.")] = 6000,
    licence: Annotated[str, typer.Option(help="Of the frames, for the card.")] = "",
    seed: Annotated[int | None, typer.Option(help="Initial weights, order, random split.")] = None,
    check: Check = True,
    as_json: AsJson = False,
) -> None:
    """Train a general potential on energies, forces and stresses.

    Plugins of it are trained by matxfer finetune. The Fisher information that holds them to it
    (--retain ewc) is computed at the end and lies in the same folder.
    """
    from matxfer.potential.fit import make_potential

    options: dict[str, Any] = {
        "freeze": freeze,
        "energy_weight": energy_weight,
        "force_weight": force_weight,
        "stress_weight": stress_weight,
        "max_force_ev_per_a": max_force,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "layer_decay": layer_decay,
        "head_learning_rate": head_learning_rate,
        "weight_decay": weight_decay,
        "average": average,
        "seed": seed,
    }
    with plain_warnings(), counter_on_terminal("building graphs") as advance:
        made = make_potential(
            frames,
            output,
            model=None if model == "none" else model,
            split_column=split_column,
            where=conditions(where),
            relaxed=relaxed,
            relaxed_where=conditions(relaxed_where),
            n_relaxed=n_relaxed,
            licence=licence,
            check=check,
            on_graphs=advance,
            on_data=None if as_json else _say_data,
            on_best=None if as_json else _say_best,
            **{name: value for name, value in options.items() if value is not None},
        )
    if as_json:
        print_json(made.card)
        return
    for part in ("validation", "test"):
        typer.echo(f"{part}: {errors_line(made.card[part])}")
    typer.echo(f"{output}: written; make a plugin with matxfer finetune FRAMES --model {output}")


def conditions(where: list[str] | None) -> dict[str, list[Any]] | None:
    """Read COLUMN=VALUE; several values of one column are alternatives."""
    found: dict[str, list[Any]] = {}
    for text in where or []:
        column, value = condition(text)
        found.setdefault(column, []).append(value)
    return found or None


def errors_line(after: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Return mean absolute errors as one line, with those before if told."""
    words = []
    for what, (end, scale, unit) in _FIGURES.items():
        name = f"{what}_mae_{end}"
        if name in after:
            old = f"{scale * before[name]:.4g} → " if before and name in before else ""
            words.append(f"{what} {old}{scale * after[name]:.4g} {unit}")
    return "MAE " + ", ".join(words) if words else "no frames to compare"


def plugin_lines(meta: dict[str, Any]) -> Iterator[str]:
    """Yield what a person wants to know of a fresh plugin of a potential."""
    kept = meta["best_epoch"] + 1
    yield f"kept: epoch {kept} of {meta['configuration']['epochs']}, the best on validation frames"
    yield "errors with the potential as it was, its references moved → with the plugin:"
    yield f"  validation: {errors_line(meta['validation'], meta['validation_before'])}"
    yield f"  test:       {errors_line(meta['test'], meta['test_before'])}"
    if "retention" in meta:
        line = errors_line(meta["retention"]["after"], meta["retention"]["before"])
        yield "errors of the potential on its own test frames, before → on the plugin's layers:"
        yield f"  {line}"


def _say_data(data: FrameData) -> None:
    facts = data.facts()
    parts = ", ".join(f"{count} {part}" for part, count in facts["rows"].items())
    for source, labels in data.frames.labels:
        say(f"{Path(source).name}: {', '.join(labels.values())}")
    say(f"frames: {parts}")


def _say_best(figures: dict[str, float]) -> None:
    say(f"epoch {int(figures['epoch']) + 1}: validation {errors_line(figures)}")
