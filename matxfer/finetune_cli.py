"""The command ``matxfer finetune``: a plugin for a property of a table, or of a potential."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matxfer.cli_names import model_names, several_models
from matxfer.errors import OptionError
from matxfer.potential_cli import (
    Check,
    EnergyWeight,
    ForceWeight,
    MaxForce,
    StressWeight,
    Where,
    finetune_frames,
    potential_of,
)
from matxfer.terminal import (
    AsJson,
    StructureColumn,
    counter_on_terminal,
    integers,
    names,
    plain_warnings,
    plugin_lines,
    print_json,
    refuse,
    say_source,
    say_trial,
    strength_of,
)

#: The same name as in matxfer.model, which would import torch.
DEFAULT_MODEL = "mp-base"


def finetune(
    tables: Annotated[
        list[str],
        typer.Argument(
            help="Parquet or CSV table; for a potential tables or extended XYZ files of frames.",
            metavar="TABLE...",
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Column of values; its name ends in the unit. A potential needs none."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder of the plugin.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Base model: a shipped one by name, its folder, or auto: the best.",
            autocompletion=model_names,
        ),
    ] = DEFAULT_MODEL,
    models: Annotated[
        str | None,
        typer.Option(
            help="Of --model auto: names and folders with commas to choose among (those shipped).",
            autocompletion=several_models,
        ),
    ] = None,
    split_column: Annotated[
        str | None, typer.Option(help="Column with train, val, test; else a seeded random split.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="auto: try the others, keep the best on validation rows; features: a simple model "
            "on fingerprints; finetune: readouts and layers; scratch: from random weights; "
            "correction: a few numbers on top of the base's own prediction."
        ),
    ] = None,
    freeze: Annotated[
        int | None,
        typer.Option(help="Frozen message-passing layers: 0 none … L all but the readout."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers that the readout reads, such as 2,4 (default all).")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="ridge, kernel_ridge, gaussian_process or forest, of --strategy features."
        ),
    ] = None,
    correction: Annotated[
        str | None,
        typer.Option(
            help="offset, elements, linear, elements+linear or auto, of --strategy correction."
        ),
    ] = None,
    difference: Annotated[
        bool | None,
        typer.Option(help="Learn the difference from the base's own prediction, if it has one."),
    ] = None,
    retain: Annotated[
        str | None,
        typer.Option(
            help="Hold on to what the source needs: none, ewc, l2sp, distill, replay, ewc+replay."
        ),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(help="λ of the retention (1: the source's full posterior), or auto."),
    ] = None,
    source_data: Annotated[
        str | None,
        typer.Option(help="Table of source structures: to rehearse, and to measure forgetting on."),
    ] = None,
    keep_predictions: Annotated[
        int | None,
        typer.Option(
            help="At most so many validation and test rows (ids, formulas, values, predictions) "
            "are kept in the plugin for matxfer report; 0: none (default: 1000)."
        ),
    ] = None,
    weights_for: Annotated[
        str | None,
        typer.Option(
            help="Structures to be predicted (table, file or folder): rows that resemble them "
            "count more; refused where too few do."
        ),
    ] = None,
    invariant: Annotated[
        str | None,
        typer.Option(help="Train layers whose features do not tell the domains: grl, coral, mmd."),
    ] = None,
    invariant_for: Annotated[
        str | None,
        typer.Option(help="Structures to be predicted, for --invariant: table, file or folder."),
    ] = None,
    invariant_strength: Annotated[
        float | None, typer.Option(help="How strongly; coral needs some 100 (default 1).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="At most so many passes.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many passes without improvement.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Crystals per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the last layer.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Learning rate of a layer over that of the one above.")
    ] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="Of the readout.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On the readout.")] = None,
    unfreeze_every: Annotated[
        int | None, typer.Option(help="Free one layer more, from the top, every so many epochs.")
    ] = None,
    average: Annotated[
        float | None, typer.Option(help="Decay of a running average of the weights; 0: none.")
    ] = None,
    readout: Annotated[
        str | None, typer.Option(help="atomwise, pooled, extrema or statistics.")
    ] = None,
    members: Annotated[int | None, typer.Option(help="Readouts in the ensemble.")] = None,
    transform: Annotated[
        str | None,
        typer.Option(
            help="identity, nonnegative, log, log10, log1p, bounded(LOW,HIGH), or auto: chosen on "
            "validation rows (default: that of the property)."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Initial weights, order, random split.")] = None,
    structure_column: StructureColumn = None,
    where: Where = None,
    energy_weight: EnergyWeight = None,
    force_weight: ForceWeight = None,
    stress_weight: StressWeight = None,
    max_force: MaxForce = None,
    check: Check = True,
    as_json: AsJson = False,
) -> None:
    """Train a plugin for one property of a table, or of a potential on frames.

    What the frozen layers of the base model make of the structures is computed once and kept; by
    default several strategies on top of it are tried, the best on the validation rows is kept,
    and the test rows are reported once. With a potential as --model the tables hold frames with
    energies, forces and, if there are any, stresses, which are learnt together.
    """
    common: dict[str, Any] = {
        "strategy": strategy,
        "freeze": freeze,
        "average": average,
        "retain": retain,
        "strength": strength and strength_of(strength),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "layer_decay": layer_decay,
        "head_learning_rate": head_learning_rate,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    of_properties: dict[str, Any] = {
        "layers": layers and tuple(integers("--layers", layers)),
        "features": features,
        "correction": correction,
        "difference": difference,
        "invariant": invariant,
        "invariant_strength": invariant_strength,
        "unfreeze_every": unfreeze_every,
        "members": members,
        "patience": patience,
        "batch_size": batch_size,
        "readout": readout,
        "transform": transform,
        "keep_predictions": keep_predictions,
    }
    of_frames = {
        "energy_weight": energy_weight,
        "force_weight": force_weight,
        "stress_weight": stress_weight,
    }
    if (base := potential_of(model, target)) is not None:
        refuse(
            of_properties
            | {
                "structure_column": structure_column,
                "weights_for": weights_for,
                "models": models,
                "invariant_for": invariant_for,
            },
            f"is of properties, but {base} is a potential",
        )
        finetune_frames(
            tables,
            output,
            base,
            split_column=split_column,
            where=where,
            source_data=source_data,
            check=check,
            as_json=as_json,
            options=common | of_frames | {"max_force_ev_per_a": max_force},
        )
        return
    from matxfer.transfer.finetune import finetune as run

    refuse(
        of_frames | {"max_force": max_force, "where": where, "no_check": None if check else False},
        f"is of frames and potentials, but {model} is a model of properties",
    )
    if len(tables) > 1:
        raise OptionError(f"one table is needed for a property, but {len(tables)} were given")
    (table,), options = tables, common | of_properties
    folder = output or f"{Path(table).stem}-plugin"
    with plain_warnings(), counter_on_terminal("building graphs") as advance:
        weigh = candidates = None
        if weights_for is not None:
            from matxfer.domain.weighing import weights_for as weights_of

            weigh = weights_of(weights_for)
        if invariant_for is not None:
            from matxfer.domain.sample import read_collection

            candidates = read_collection(invariant_for).crystals
        plugin = run(
            table,
            str(target),
            folder,
            model=model,
            models=models and names("--models", models),
            split_column=split_column,
            structure_column=structure_column,
            source_data=source_data,
            weigh=weigh,
            invariant_for=candidates,
            on_graphs=advance,
            on_source=None if as_json else say_source,
            on_trial=None if as_json else say_trial,
            **{name: value for name, value in options.items() if value is not None},
        )
    if as_json:
        print_json({"plugin": folder, **plugin.meta})
        return
    for line in plugin_lines(plugin.meta):
        typer.echo(line)
    typer.echo(
        f"{folder}: written in {plugin.meta['seconds']:.1f} s; use it with --plugin {folder}"
    )
