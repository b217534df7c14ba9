"""What each idea buys the source model: variants of one configuration, trained for equal epochs.

All variants named in ``source_study.yaml`` train side by side on the same device (a GPU holds
sixteen of them); a first epoch of all of them together says how many epochs fit into
``--minutes``. Figures are those of the validation rows, since choices are made on them.

    python tests/benchmarks/source_study.py --minutes 8 --out runs/study

With ``--small`` they train one after another on one CPU thread, on fewer rows and with a narrower
network (``small`` in the YAML file). A variant that is finished is not trained again, one that was
cut off goes on.

    python tests/benchmarks/source_study.py --small --out runs/small
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import sys
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
import yaml

from matxfer.metrics import predict_rows, regression_metrics
from matxfer.model import headline_figure
from matxfer.pretraining.config import read_config
from matxfer.pretraining.sources import load_sources

VARIANTS = Path(__file__).with_suffix(".yaml")


def variant_tree(base: dict, changes: dict) -> dict:
    """Return the configuration of a variant: dotted keys set values in a copy of the base."""
    tree = json.loads(json.dumps(base))
    for key, value in changes.items():
        if key in ("sources+", "sources++"):
            tree["sources"].append(value)
        elif key == "sources-":
            tree["sources"] = tree["sources"][:value]
        else:
            *folders, leaf = key.split(".")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = value
    return tree


def read_variants(names: list[str] | None, path: Path, out: Path, rows: int | None = None) -> dict:
    """Return the checked configurations of the variants by name; small ones if told the rows."""
    study = yaml.safe_load(path.read_text())
    base, small = study["base"], study["small"]
    if rows is not None:
        base = variant_tree(base, small["changes"])
    configs = {}
    for name in names or (study["variants"] if rows is None else small["variants"]):
        tree = variant_tree(base, study["variants"][name]) | {"name": name}
        for source in tree["sources"] if rows is not None else []:
            if share := small["share_of_rows"].get(Path(source["table"]).name):
                source["table"] = fewer_rows(path.parent / source["table"], int(share * rows), out)
        written = out / f"{name}.yaml"
        written.write_text(yaml.safe_dump(tree))
        # Tables are named as seen from the study, whose folder this file is not in.
        configs[name] = replace(read_config(written), folder=path.parent)
    return configs


def fewer_rows(path: Path, n: int, out: Path, seed: int = 0) -> str:
    """Write a table with n of the training rows drawn at random; val and test stay. Return where.

    Energies are those of the coherent structures only, unlabelled cells those of up to 12 atoms.
    """
    frame = pd.read_parquet(path)
    if "structure_source" in frame.columns:
        frame = frame[frame["structure_source"] == "crysxpp"]
    elif "split" not in frame.columns:
        frame = frame[frame["n_sites"] <= 12]
    learnt = (frame["split"] == "train") if "split" in frame.columns else frame["n_sites"] > 0
    drawn = frame[learnt].sample(min(n, int(learnt.sum())), random_state=seed)
    written = out.resolve() / f"{path.stem}_{n}.parquet"
    pd.concat([drawn, frame[~learnt]]).sort_index().to_parquet(written)
    return str(written)


def one_by_one(configs: dict, out: Path) -> dict:
    """Train the variants one after another with ``matxfer.pretraining``; return their results."""
    from matxfer.pretraining.run import pretrain

    torch.set_num_threads(1)
    results = {}
    for name, config in configs.items():
        written = out / name / "result.json"
        if not written.is_file():
            model = pretrain(config, out / name, run_folder=out / "runs" / name, resume=True)
            epochs = len(pd.read_csv(out / "runs" / name / "learning_curves.csv"))
            figures = {target: parts["val"] for target, parts in model.card["figures"].items()}
            result = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds_per_epoch": model.card["training_seconds"] / epochs,
                "epochs": epochs,
                "validation": figures,
            }
            written.write_text(json.dumps(result, indent=1))
        results[name] = json.loads(written.read_text())
        print(name, json.dumps(results[name]), flush=True)
    return results


def train(config, data, epochs: int, folder: Path | None) -> dict:
    """Train one variant and return its validation figures and the seconds per epoch."""
    import lightning as L  # noqa: N812 - its documented alias
    from lightning.pytorch.loggers import CSVLogger

    from matxfer.pretraining.module import PretrainModule, SourceModule
    from matxfer.pretraining.run import build_model
    from matxfer.runtime import quiet_lightning

    config = replace(config, training=replace(config.training, epochs=epochs))
    L.seed_everything(config.seed, verbose=False)
    model = build_model(config, data)
    module = PretrainModule(model, config)
    source = SourceModule(data, model, config.training.batch_size, config.seed)
    options = {"precision": "32-true", **config.trainer}
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=epochs,
            gradient_clip_val=config.training.clip_norm,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=CSVLogger(folder) if folder else False,
            use_distributed_sampler=False,
            **options,
        )
        started = time.monotonic()
        trainer.fit(module, source)
        seconds = (time.monotonic() - started) / epochs
    model.load_state_dict(PretrainModule.final_weights(module.state_dict()))
    model = model.cpu().eval()
    rows = data.rows("val", labelled=True)
    figures = {}
    if folder:
        predicted = predict_rows(model, data.graphs, rows)
        for name, head in model.heads.items():
            figures[name] = regression_metrics(data.values[name][rows], predicted[name], head.prop)
        model.card |= {
            "variant": asdict(config.network) | asdict(config.training),
            "data": data.tables,
            "validation": figures,
            "seconds_per_epoch": seconds,
        }
        model.save(folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_epoch": seconds,
        "epochs": epochs,
        "validation": figures,
    }


def work(name, config, data, pipe, folder: Path) -> None:
    """Pilot epoch, then as many epochs as the parent says."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    try:
        pipe.send(train(config, data, 1, None)["seconds_per_epoch"])
        epochs = pipe.recv()
        pipe.send(train(config, data, epochs, folder))
    except Exception as error:  # a failed variant is a row of the table
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--file", type=Path, default=VARIANTS)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--epochs", type=int, help="instead of what fits into the minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--small", action="store_true", help="one after another on one CPU thread")
    parser.add_argument("--rows", type=int, default=8000, help="energies of a small study")
    args = parser.parse_args()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.rows if args.small else None
    configs = read_variants(args.variants, args.file, args.out, rows)
    show(one_by_one(configs, args.out) if args.small else side_by_side(configs, args, started))


def side_by_side(configs: dict, args: argparse.Namespace, started: float) -> dict:
    """Train the variants all at once for as many epochs as there is time for; return results."""
    groups = defaultdict(list)
    for name, config in configs.items():
        key = json.dumps([[asdict(s) for s in config.sources], config.graph.to_json()])
        groups[key].append(name)
    # Forked workers share the source data; torch's threads must not have started before.
    context = mp.get_context("fork")
    pipes, jobs = {}, {}
    loaded = {}
    for names in groups.values():
        data = load_sources(configs[names[0]])
        loaded |= dict.fromkeys(names, data)
        print(f"{time.monotonic() - started:.0f} s: {names}: {len(data.graphs)} graphs", flush=True)
    for name, config in configs.items():
        pipes[name], theirs = context.Pipe()
        folder = args.out / name
        jobs[name] = context.Process(
            target=work, args=(name, config, loaded[name], theirs, folder), daemon=True
        )
        jobs[name].start()
    pilot = {}
    for name in list(configs):
        pilot[name] = pipes[name].recv()
        if isinstance(pilot[name], dict):
            print(name, pilot.pop(name), flush=True)
            configs.pop(name)
    slowest = max(pilot.values())
    left = 60 * args.minutes - (time.monotonic() - started) - 25  # evaluation, saving
    epochs = args.epochs or max(1, int(left / slowest))
    print(f"pilot {time.monotonic() - started:.0f} s, {pilot}; {epochs} epochs", flush=True)
    for name in configs:
        pipes[name].send(epochs)
    results = {}
    for name in configs:
        results[name] = pipes[name].recv()
        print(f"{time.monotonic() - started:.0f} s", name, json.dumps(results[name]), flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
    for name in configs:
        jobs[name].join(30)
    return results


def show(results: dict) -> None:
    """Print the table of validation errors."""
    targets = list(dict.fromkeys(t for r in results.values() for t in r.get("validation", {})))
    head = ["variant", "parameters", "s/epoch", "epochs", *targets]
    print(" | ".join(head))
    for name, result in results.items():
        if "error" in result:
            print(name, result["error"])
            continue
        cells = [
            f"{headline_figure(m)[0]:.4f}" if (m := result["validation"].get(target)) else "–"
            for target in targets
        ]
        print(
            " | ".join(
                [
                    name,
                    f"{result['parameters']:,}",
                    f"{result['seconds_per_epoch']:.1f}",
                    str(result["epochs"]),
                    *cells,
                ]
            )
        )


if __name__ == "__main__":
    sys.exit(main())
