"""What Matbench v0.1 wants of a submission: ``results.json.gz``, ``info.json`` and the source.

The layout is that of ``MatbenchBenchmark.to_file`` of the package matbench 0.6, with its checksum,
and of its guide for submissions.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from matxfer.benchmark.matbench import N_FOLDS
from matxfer.files import write_json
from matxfer.provenance import versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matxfer.benchmark.matbench import MatbenchData
    from matxfer.benchmark.records import Record

_BENCHMARK = "matbench_v0.1"
#: Version of the package whose layout this is.
PACKAGE = "0.6"
RESULTS, INFO, SOURCE = "results.json.gz", "info.json", "run.py"
AUTHORS = "write your name here"
_CITATIONS = (
    "@article{Dunn2020, doi = {10.1038/s41524-020-00406-3}, year = {2020}, volume = {6}, "
    "number = {138}, author = {Alexander Dunn and Qi Wang and Alex Ganose and Daniel Dopp and "
    "Anubhav Jain}, title = {Benchmarking materials property prediction methods: the Matbench test "
    "set and Automatminer reference algorithm}, journal = {npj Computational Materials}}"
)
_SOURCE = '''"""Matbench v0.1 with matxfer: pip install matbench=={package} matxfer=={version}

For each fold a plugin is learned on top of a pretrained network from the training rows alone: a
tenth of them is kept to choose by, on the rest readouts of the frozen layers, simple models on
fingerprints and layers freed under elastic weight consolidation are tried, and what is best on the
kept rows predicts the test rows.
"""

from matbench.bench import MatbenchBenchmark

from matxfer.benchmark.matbench import TASKS
from matxfer.benchmark.matbench_play import predictions

MODEL = {model!r}
REPEATS = {repeats!r}
OPTIONS = {options!r}

mb = MatbenchBenchmark(autoload=False, subset={tasks!r})
for task in mb.tasks:
    task.load()
    for fold in task.folds:
        structures, values = task.get_train_and_val_data(fold)
        predicted, parameters = predictions(
            TASKS[task.dataset_name.removeprefix("matbench_")],
            list(structures),
            values.to_numpy(),
            list(task.get_test_data(fold, include_target=False)),
            fold=fold,
            model=MODEL,
            repeats=REPEATS,
            options=OPTIONS,
        )
        task.record(fold, predicted.tolist(), params=parameters)
mb.to_file("results.json")
'''


def results(
    played: Sequence[tuple[MatbenchData, Sequence[Record]]], notes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the results of whole tasks in the package's layout.

    Parameters
    ----------
    played
        Tasks, each with the records of its five folds in their order.
    notes
        What is said of the whole.
    """
    found: dict[str, Any] = {
        "@module": "matbench.bench",
        "@class": "MatbenchBenchmark",
        "version": PACKAGE,
        "benchmark_name": _BENCHMARK,
        "tasks": {data.task.name: _task(data, records) for data, records in played},
        "user_metadata": dict(notes),
        "datestamp": datetime.now(UTC).strftime("%Y.%m.%d %H:%M.%S"),
    }
    return found | {"hash": checksum(found)}


def checksum(content: Mapping[str, Any]) -> str:
    """Return the package's checksum of results: SHA-256 of the JSON text, keys in their order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _task(data: MatbenchData, records: Sequence[Record]) -> dict[str, Any]:
    folds = {}
    for (_, test), record in zip(data.task.folds(data.values), records, strict=True):
        folds[f"fold_{record['run']['fold']}"] = {
            "data": {data.ids[k]: p for k, p in zip(test, record["predictions"], strict=True)},
            "parameters": record["parameters"],
            "scores": record["scores"],
        }
    assert len(folds) == N_FOLDS, "a task is submitted as a whole"
    return {
        "@module": "matbench.task",
        "@class": "MatbenchTask",
        "benchmark_name": _BENCHMARK,
        "dataset_name": data.task.name,
        "results": folds,
    }


def write_submission(
    folder: Path,
    played: Sequence[tuple[MatbenchData, Sequence[Record]]],
    *,
    algorithm: str,
    authors: str,
    notes: Sequence[str],
) -> list[str]:
    """Write the three files of a submission; return their names.

    Parameters
    ----------
    folder
        Where to; there already.
    played
        See :func:`results`; of one base and one set of options.
    algorithm, authors
        What the leaderboard shows.
    notes
        What its readers must know.
    """
    run = played[0][1][0]["run"]
    said = {name: run[name] for name in ("model", "weights", "repeats", "options")}
    content = results(played, {**said, "notes": " ".join(notes)})
    temporary = folder / f".{RESULTS}.part"
    temporary.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    temporary.replace(folder / RESULTS)
    used = versions()
    packages = [f"matbench=={PACKAGE}", *(f"{n}=={used[n]}" for n in ("matxfer", "torch", "numpy"))]
    write_json(
        folder / INFO,
        {
            "authors": authors,
            "algorithm": algorithm,
            "algorithm_long": (
                f"Transfer learning with matxfer: for each fold a plugin on the pretrained network "
                f"{run['model']} (weights {run['weights']}), with the strategy chosen on a "
                f"tenth of the training rows; {run['repeats']} such plugin(s) per fold."
            ),
            "bibtex_refs": _CITATIONS,
            "notes": " ".join(notes),
            "requirements": {"python": packages},
        },
    )
    names = [data.task.name for data, _ in played]
    (folder / SOURCE).write_text(
        _SOURCE.format(
            package=PACKAGE,
            version=used["matxfer"],
            model=run["model"],
            repeats=run["repeats"],
            options=run["options"],
            tasks=names,
        ),
        encoding="utf-8",
    )
    return [RESULTS, INFO, SOURCE]
