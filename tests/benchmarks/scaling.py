"""Training against the number of structures, and against the number of processes (DDP).

Each size runs in a process of its own, once to build the graph stores and once to train from them:
it reads the tables and opens the stores, fits the scalers, gathers every batch of an epoch, and
takes training steps on Lightning, as ``matxfer pretrain`` does. Its memory is read from outside all
the while: ``anonymous`` is what the process holds, ``mapped`` are pages of files that the system
may drop. The last size adds the structures without labels, which teach denoising on full cells.

    python tests/benchmarks/scaling.py --data ../shared/data --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from _table import Table, add_common_arguments, facts, write_tables
from architectures import TARGET
from throughput import command

from matxfer.pretraining.config import read_config
from matxfer.pretraining.run import build_model, load_sources
from matxfer.readers import load_table
from matxfer.runtime import keep_large_blocks, quiet_lightning, use_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

UNLABELLED = "mp_structures_unlabeled.parquet"
MARK = "mark "
STAGES = BUILD, READ, FIT, GATHER, TRAIN = "build", "read", "fit", "gather", "train"
MB = 1024
#: Processes, threads of each, Lightning's strategy.
KINDS = ((1, 1, "auto"), (1, 2, "auto"), (2, 1, "ddp"))
#: Of 20 rows 18 are trained on, one validates, one tests.
TRAINING_SHARE = 0.9


def mark(stage: str, **figures: float) -> None:
    """Tell the watching process that a stage ended, and what was counted in it."""
    print(MARK + json.dumps({"stage": stage, "at": time.monotonic(), **figures}), flush=True)


def child(config_path: Path, threads: int, batches: int) -> None:
    """Run the stages of one size; with no batches, only build the stores."""
    use_threads(threads)
    keep_large_blocks()
    config = read_config(config_path)
    mark("start")
    data = load_sources(config)
    if not batches:
        mark(BUILD)
        return
    edges, size = data.graphs.edges_per_graph, config.training.batch_size
    mark(READ, structures=len(data.graphs), edges=int(edges.sum()))
    model = build_model(config, data)
    mark(FIT)

    import lightning as L  # noqa: N812
    from lightning.pytorch.callbacks import Callback

    from matxfer.pretraining.module import PretrainModule, SourceModule

    module = PretrainModule(model, config)
    source = SourceModule(data, model, size, config.seed)
    rows = data.rows("train")
    start = time.perf_counter()
    for _ in source.train_dataloader():
        pass
    mark(GATHER, per_s=len(rows) / (time.perf_counter() - start))

    class Clock(Callback):
        """Sums up structures and edges of the steps after the first few."""

        start = structures = edges = 0.0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if batch_idx < 5:
                self.start = time.perf_counter()
                return
            self.structures += batch.graphs.num_graphs
            self.edges += batch.graphs.edge_index.shape[1]
            self.seconds = time.perf_counter() - self.start

    clock = Clock()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    with quiet_lightning():
        L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=batches,
            limit_val_batches=0,
            gradient_clip_val=config.training.clip_norm,
            callbacks=[clock],
            use_distributed_sampler=False,
            enable_model_summary=False,
            **quiet,
        ).fit(module, source)
    per_s, edges_per_s = clock.structures / clock.seconds, clock.edges / clock.seconds
    mark(TRAIN, per_s=per_s, edges_per_s=edges_per_s)


@dataclass(slots=True)
class Stage:
    """Figures of a stage, and its memory in kB: largest, and when it ended."""

    figures: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    mapped: int = 0
    after: int = 0


def memory_of(pid: int) -> tuple[int, int]:
    """Return the anonymous and the mapped memory of a process in kB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    known = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return tuple(int(known.get(k, "0").split()[0]) for k in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def watch(words: Sequence[str], environment: dict[str, str]) -> dict[str, Stage]:
    """Run a child; return what it told of each stage, with its memory as seen from outside."""
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(words, env=environment, stdout=told, stderr=errors)
        seen: list[tuple[float, int, int]] = []
        while process.poll() is None:
            seen.append((time.monotonic(), *memory_of(process.pid)))
            time.sleep(0.01)
        told.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} failed:\n{errors.read()[-3000:]}")
        marks = [json.loads(line.removeprefix(MARK)) for line in told if line.startswith(MARK)]
    stages: dict[str, Stage] = {}
    before = 0.0
    for told_of in marks:
        name, at = told_of.pop("stage"), told_of.pop("at")
        until = [sample for sample in seen if sample[0] <= at]
        # A stage may be over before anybody has looked.
        within = [sample for sample in until if sample[0] > before] or until[-1:]
        anon, mapped = ([sample[k] for sample in within] for k in (1, 2))
        stages[name] = Stage(told_of, max(anon), max(mapped), anon[-1])
        before = at
    return stages


def write_config(folder: Path, tables: Sequence[Path], **trainer: Any) -> Path:
    """Write the configuration of a run on a labelled table and maybe one without labels."""
    labelled = {"table": str(tables[0]), "targets": [TARGET], "split_column": "split"}
    more = [{"table": str(path), "denoise_angstrom": 0.1} for path in tables[1:]]
    config = {
        "name": "scaling",
        "sources": [labelled, *more],
        "training": {"epochs": 1, "batch_size": 64, "fisher_samples": 0, **trainer.pop("training")},
        "trainer": {"accelerator": "cpu", **trainer},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment_of(cache: Path, threads: int) -> dict[str, str]:
    """Return the environment of a process with its own cache and number of threads."""
    set_here = {"MATXFER_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    return os.environ | set_here | {"OMP_WAIT_POLICY": "PASSIVE"}


def draw(frame: pd.DataFrame, n: int, seed: int, path: Path) -> Path:
    """Write n random rows of a table, some of them to validate and test."""
    frame = frame.sample(n, random_state=seed).reset_index(drop=True)
    frame["split"] = np.resize(["train"] * 18 + ["val", "test"], n)
    frame.to_parquet(path)
    return path


def measure_sizes(args: argparse.Namespace, folder: Path) -> list[Table]:
    """Return the tables of speed and memory against the number of structures."""
    columns = ("edges, million", "store, MB", "batches only, structures/s")
    columns += ("training, structures/s", "training, edges/s")
    speed = Table("Speed", ("structures", *columns))
    columns = ("start", "building stores", "opening stores", "fitting scalers")
    columns += ("gathering an epoch", "training", "mapped, largest")
    memory = Table("Memory, MB", ("structures", *columns))
    source = args.data.resolve() / "mp_formation_energy.parquet"
    frame = load_table(source)
    sizes = [(n, False) for n in args.sizes if n < len(frame)]
    sizes += [(len(frame), False), (len(frame), True)] if args.all else []
    for n, with_unlabelled in sizes:
        table = draw(frame, n, args.seed, folder / "table.parquet")
        tables = [table, source.with_name(UNLABELLED)] if with_unlabelled else [table]
        config = write_config(folder, tables, training={})
        cache = folder / "cache"
        environment = environment_of(cache, args.threads)
        words = [sys.executable, __file__, "--child", str(config), "--threads", str(args.threads)]
        stages = watch([*words, "--batches", "0"], environment)
        stages |= watch([*words, "--batches", str(args.batches)], environment)
        stored = sum(path.stat().st_size for path in cache.rglob("*.npy"))
        shutil.rmtree(cache)
        counted, gathered, trained = (stages[k].figures for k in (READ, GATHER, TRAIN))
        structures = f"{counted['structures']:,}"
        speed.rows.append(
            (
                structures,
                f"{counted['edges'] / 1e6:.1f}",
                f"{stored / 1e6:,.0f}",
                f"{gathered['per_s']:,.0f}",
                f"{trained['per_s']:,.0f}",
                f"{trained['edges_per_s']:,.0f}",
            )
        )
        cells = [f"{s.peak // MB:,} → {s.after // MB:,}" for s in map(stages.get, STAGES)]
        mapped = max(stages[k].mapped for k in (GATHER, TRAIN))
        start = f"{stages['start'].after // MB:,}"
        memory.rows.append((structures, start, *cells, f"{mapped // MB:,}"))
        print(structures, memory.rows[-1], speed.rows[-1], flush=True)
    return [speed, memory]


def measure_processes(args: argparse.Namespace, folder: Path) -> Table:
    """Return the table of epochs of ``matxfer pretrain`` with one and two processes."""
    columns = ("threads each", "strategy", "s/epoch", "of each run", "structures/s", "faster by")
    title = f"`matxfer pretrain` on {args.ddp_rows:,} structures, epochs after the first"
    result = Table(title, ("processes", *columns))
    frame = load_table(args.data / "mp_formation_energy.parquet")
    table = draw(frame, args.ddp_rows, args.seed, folder / "table.parquet")
    spent: dict[tuple[int, int, str], list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.ddp_turns):
        for kind in KINDS[:: 1 if turn % 2 else -1]:
            devices, threads, strategy = kind
            run = Path(tempfile.mkdtemp(dir=folder))
            training = {"epochs": 1 + args.ddp_epochs}
            config = write_config(
                run, [table], devices=devices, strategy=strategy, training=training
            )
            words = [*command(), "pretrain", str(config), "-o", str(run / "model")]
            words += ["--run-folder", str(run)]
            environment = environment_of(folder / "cache", threads)
            done = subprocess.run(
                words, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
            curves = load_table(run / "learning_curves.csv")
            spent[kind].append(float(curves["seconds"].iloc[1:].median()))
    first = np.median(spent[KINDS[0]])
    for (devices, threads, strategy), times in spent.items():
        median = float(np.median(times))
        cells = (f"{median:.2f}", ", ".join(f"{t:.2f}" for t in times))
        rate = TRAINING_SHARE * args.ddp_rows / median
        cells = (*cells, f"{rate:,.0f}", f"{first / median:.2f}")
        result.rows.append((devices, threads, strategy, *cells))
    return result


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "scaling")
    parser.add_argument(
        "--sizes", nargs="*", type=int, default=[1000, 5000, 20000], help="structures"
    )
    parser.add_argument(
        "--all", action=argparse.BooleanOptionalAction, default=True, help="and the whole tables"
    )
    parser.add_argument("--batches", type=int, default=120, help="training steps per size")
    parser.add_argument("--ddp-rows", type=int, default=3000, help="structures for DDP; 0: none")
    parser.add_argument("--ddp-epochs", type=int, default=4, help="timed epochs of a run")
    parser.add_argument("--ddp-turns", type=int, default=3, help="timed runs of each kind")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure sizes and processes and write the result."""
    args = parse_arguments()
    if args.child is not None:
        child(args.child, args.threads, args.batches)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tables = measure_sizes(args, folder)
        if args.ddp_rows:
            tables.append(measure_processes(args, folder))
    known = facts(
        args.threads,
        rows="random ones of mp_formation_energy, asymmetric unit; the last size adds "
        "mp_structures_unlabeled as a denoising source, full cells",
        training=f"default network, float32, batches of 64, {args.batches} steps per size "
        "through Lightning, the first 5 not timed",
        gathering="every training batch of an epoch, nothing else done with it",
        memory="anonymous memory of the main process, largest during a stage → left at its end; "
        "mapped: pages of files",
    )
    write_tables(args.output, "Scaling", known, tables)


if __name__ == "__main__":
    main()
