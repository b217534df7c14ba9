"""Which remedies help: each is tried and measured on target rows that no model has learnt from.

Published experience says that most domain adaptation does not help for materials, so nothing is
recommended unseen. Half of the labelled target structures, compositions kept whole (or materials,
where there are few compositions), is for the corrections to be fitted to; errors are those on the
other half. *Of the base's own predictions*: a correction, and fine-tuning on the same rows. *Of
models trained on the source's rows*, no target value seen: importance weights, and layers with
invariant features. A remedy helps if it lowers the mean absolute error by more than 2 % and by more
than twice the standard error of the difference.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.copies import materials
from matxfer.data.properties import invert_transform
from matxfer.data.store import graph_store
from matxfer.data.table import PropertyTable
from matxfer.domain.sample import draw
from matxfer.domain.values import like_quantity
from matxfer.domain.weighing import weights_for
from matxfer.errors import MatxferError
from matxfer.transfer.activations import Activations
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.report import predicted
from matxfer.transfer.retention import SourceData
from matxfer.transfer.row_weights import weighed
from matxfer.transfer.strategies import run_strategy
from matxfer.transfer.task import FEWEST_ROWS, Task, make_task

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from numpy.typing import NDArray

    from matxfer.domain.sample import Collection
    from matxfer.model import Model
    from matxfer.transfer.strategies import Trial

    Floats = NDArray[np.float64]

#: A smaller gain is no reason to do anything.
LEAST_GAIN = 0.02
#: Standard errors of the difference that make it sure.
_SURE = 2.0
#: What is tried of invariant features, and how strongly: the order of size at which each distance
#: is felt beside the loss.
INVARIANT = (("grl", 0.3), ("coral", 100.0), ("mmd", 1.0))
#: Share of the source rows that settings are chosen on.
_HELD = 0.2


@dataclass(frozen=True, slots=True)
class Remedy:
    """What one remedy does.

    Attributes
    ----------
    name, option
        The remedy, and how to ask ``matxfer finetune`` for it.
    of
        What it is to mend.
    before, after
        Mean absolute errors on the target rows without and with it; ``None``: it was refused.
    gain, error
        Mean of the paired differences, and its standard error, in the same unit.
    verdict
        ``"helps"``, ``"harms"``, ``"no difference"`` or ``"refused"``.
    why
        Why it was refused, or what was found.
    """

    name: str
    option: str
    of: str
    before: float | None
    after: float | None
    gain: float | None
    error: float | None
    verdict: str
    why: str = ""

    def words(self) -> str:
        """Say it in one line."""
        if self.after is None or self.before is None or self.error is None:
            return f"{self.name}: {self.verdict}: {self.why}"
        scale = self.before or 1.0
        change = f"{self.after / scale - 1:+.1%} ± {self.error / scale:.1%}"
        found = f", {self.why}" if self.why else ""
        ask = f"; {self.option}" if self.verdict == "helps" else ""
        errors = f"{self.before:.4g} → {self.after:.4g}"
        return f"{self.name}: {self.verdict}, error {errors} ({change}{found}){ask}"


@dataclass(frozen=True, slots=True)
class Remedies:
    """All that was tried.

    Attributes
    ----------
    tried
        One by one.
    fitted, measured, source
        Numbers of target rows that were fitted to and measured on, and of source rows.
    unit
        Of the errors.
    """

    tried: list[Remedy]
    fitted: int
    measured: int
    source: int
    unit: str

    def lines(self) -> Iterator[str]:
        """Yield what was found, as text."""
        unit = f" in {self.unit}" if self.unit else ""
        yield (
            f"remedies, measured{unit} on {self.measured} target structures that nothing was "
            f"fitted to (± is one standard error):"
        )
        last = ""
        for each in self.tried:
            if each.of != last:
                yield f"  {each.of}"
                last = each.of
            yield f"    {each.words()}"
        if not any(each.verdict == "helps" for each in self.tried):
            yield "  none helps: leave them out"

    def to_json(self) -> dict[str, Any]:
        """Return everything."""
        return asdict(self)


def compared(
    name: str, option: str, of: str, errors: tuple[Floats, Floats], why: str = ""
) -> Remedy:
    """Compare absolute errors of the same rows, (n,), without and with a remedy."""
    before, after = (float(e.mean()) for e in errors)
    difference = errors[0] - errors[1]
    gain, error = float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)
    sure = abs(gain) > _SURE * error and abs(gain) > LEAST_GAIN * before
    verdict = ("helps" if gain > 0 else "harms") if sure else "no difference"
    return Remedy(name, option, of, before, after, gain, error, verdict, why)


def try_remedies(
    model: Model,
    source: Collection,
    target: Collection,
    columns: tuple[str, str | None],
    *,
    sample: int = 1000,
    seed: int = 0,
    on_graphs: Callable[[int], None] | None = None,
) -> Remedies:
    """Try all remedies that the data allow.

    Parameters
    ----------
    model
        The base model.
    source, target
        All structures with their values.
    columns
        The target's column, and that of the source (``None``: there is none, and nothing is trained
        on it).
    sample
        At most so many structures of each are used.
    seed
        Of samples, splits and trainings.

    Raises
    ------
    TableError
        If there are too few target structures with a value.
    """
    column, named = columns
    rows = draw(np.flatnonzero(np.isfinite(target.values[column])), sample, seed)
    groups = _groups(target, rows)
    half = _halves(groups, 0.5, seed)
    split = np.where(half, "train", "test")
    fit = np.flatnonzero(half)
    chosen = _halves([groups[k] for k in fit], _HELD, seed + 1)
    split[fit[chosen]] = "val"
    crystals = [target.crystals[k] for k in rows]
    task = _task(
        model, target.name, crystals, column, target.values[column][rows], split, on_graphs
    )
    unit = task.prop.unit
    measured = len(task.parts["test"])
    tried = list(_of_predictions(task, seed))
    n = 0
    if named is not None:
        picked = draw(np.flatnonzero(np.isfinite(source.values[named])), sample, seed + 2)
        n = len(picked)
        tried += _of_trained(model, source, named, picked, task, (crystals, split), seed, on_graphs)
    fitted = len(task.parts["train"]) + len(task.parts["val"])
    return Remedies(tried, fitted, measured, n, unit)


def _of_predictions(task: Task, seed: int) -> Iterator[Remedy]:
    """Try what mends the base's predictions, from target rows with values."""
    like = like_quantity(task.prop.name, task.base)
    rows, base = task.parts["train"], task.base.name
    of = f"the predictions of {base}, from {len(rows)} target rows"
    if like is None:
        yield Remedy(
            "correction", "--correction linear", of, None, None, None, None, "refused",
            f"{base} predicts nothing like {task.prop.name}",
        )  # fmt: skip
        return
    config = FinetuneConfig(seed=seed)
    plain = _errors_as_it_is(task, like)
    trial = run_strategy(task, replace(config, strategy="correction"))
    form = trial.facts["correction"]["form"]
    option = f"--correction {form}"
    yield compared(f"correction ({form})", option, of, (plain, _errors(task, trial)))
    tuned = run_strategy(task, replace(config, strategy="features"))
    name = "fine-tuning instead (kernel ridge)"
    yield compared(name, "no --correction", of, (plain, _errors(task, tuned)))


def _of_trained(
    model: Model,
    source: Collection,
    named: str,
    rows: NDArray[np.int64],
    goal: Task,
    target: tuple[list[Any], NDArray[np.str_]],
    seed: int,
    on_graphs: Callable[[int], None] | None,
) -> Iterator[Remedy]:
    """Try what mends models trained on the source's rows, from target structures alone."""
    crystals, split = target
    held = _halves(_groups(source, rows), _HELD, seed)
    parts = np.concatenate(
        [np.where(held, "val", "train"), np.where(split == "test", "test", "unlabelled")]
    )
    values = np.concatenate([source.values[named][rows], goal.values])
    both = [*(source.crystals[k] for k in rows), *crystals]
    column = goal.prop.name
    task = _task(model, source.name, both, column, values, parts, on_graphs)
    config = FinetuneConfig(seed=seed)
    of = f"models trained on {len(task.parts['train'])} source rows"
    simple = replace(config, strategy="features")
    plain = _errors(task, run_strategy(task, simple))
    name, option = "importance weights (kernel ridge)", "--weights-for TARGET"
    try:
        # The structures to be predicted are no rows to be weighed.
        own = replace(task, parts=task.parts | {"test": np.zeros(0, np.int64)})
        weights, facts = weighed(own, weights_for(crystals, seed=seed))
        assert facts is not None, "there are weights"
        trial = run_strategy(weights, simple)
        why = f"{facts['effective_share']:.0%} of the rows count"
        yield compared(name, option, of, (plain, _errors(task, trial)), why)
    except MatxferError as error:
        yield Remedy(name, option, of, None, None, None, None, "refused", str(error))
    last = model.backbone.n_layers
    probe = run_strategy(task, replace(config, strategy="finetune", freeze=last)).plugin.head
    layers = replace(config, strategy="finetune", freeze=last // 2)
    freed = _errors(task, run_strategy(task, layers, None, probe))
    graphs = goal.graphs
    task = replace(task, candidates=SourceData(graphs, goal.activations, {}))
    for method, strength in INVARIANT:
        alike = replace(layers, invariant=method, invariant_strength=strength)
        trial = run_strategy(task, alike, None, probe)
        option = f"--invariant {method} --invariant-strength {strength:g} --invariant-for TARGET"
        name = f"invariant features ({method} {strength:g})"
        yield compared(name, option, of, (freed, _errors(task, trial)))


def _task(
    model: Model,
    name: str,
    crystals: list[Any],
    column: str,
    values: Floats,
    split: NDArray[np.str_],
    on_graphs: Callable[[int], None] | None,
) -> Task:
    data = PropertyTable(name, crystals, {column: values}, split)
    store = graph_store(crystals, model.backbone.graph_options, on_progress=on_graphs)
    task = make_task(model, data, column, store.graphs, Activations(model, store.graphs), None)
    if len(task.parts["test"]) < FEWEST_ROWS:
        from matxfer.data.table import TableError

        raise TableError(
            f"{name}: remedies would be measured on {len(task.parts['test'])} target structures, "
            f"but at least {FEWEST_ROWS} are needed"
        )
    return task


def _errors(task: Task, trial: Trial) -> Floats:
    rows = task.parts["test"]
    return np.asarray(np.abs(predicted(task, trial.plugin, rows)[0] - task.values[rows]))


def _errors_as_it_is(task: Task, like: str) -> Floats:
    """Return the errors of the base's own prediction of a property, on the test rows."""
    rows, transform = task.parts["test"], task.base.heads[like].prop.transform
    said = invert_transform(transform, task.activations.source(like)[rows])
    return np.asarray(np.abs(said - task.values[rows]))


def _groups(collection: Collection, rows: NDArray[np.int64]) -> list[Hashable]:
    """Return what is kept whole: the composition of each row, or its material if they are few."""
    compositions: list[Hashable] = [collection.compositions[k] for k in rows]
    if len(set(compositions)) >= FEWEST_ROWS:
        return compositions
    return list(materials([collection.crystals[k] for k in rows]).tolist())


def _halves(groups: Sequence[Hashable], share: float, seed: int) -> NDArray[np.bool_]:
    """Return which rows are in a random part of about this share, groups kept whole."""
    names = list(dict.fromkeys(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    inside = {names[k] for k in order[: max(round(share * len(names)), 1)]}
    return np.array([name in inside for name in groups])
