"""How good a classifier is: probabilities, confusions, calibration, errors by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError
from matxfer.estimator.about import FOLDS
from matxfer.html import Markup, facts, join, table
from matxfer.plot.classes import probabilities_by_class, reliability, roc
from matxfer.plot.elements import element_residuals, periodic_table
from matxfer.report.drawing import drawn
from matxfer.report.parts import elements_figure, figure, files_table, missing, row
from matxfer.report.record import ALL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.report.record import Record

    Floats = NDArray[np.float64]

#: Words of the kinds of samples whose probabilities are known.
_PARTS = {FOLDS: "held-out samples of the folds", ALL: "rows of the table"}
_WORST = 10
#: Elements in fewer samples are not judged.
_FEW = 5
#: Larger tables of confusions are not read by anyone.
_MOST_CLASSES = 20
_NONE = "The classifier keeps no probabilities, see above."


@dataclass(frozen=True, slots=True, eq=False)
class Classified:
    """Samples with their classes and probabilities.

    Attributes
    ----------
    classes
        The labels, (K,).
    target
        Numbers of the true classes, (n,).
    probability
        (n, K).
    names, formulas
        What the samples are called, and their compositions.
    rows
        How many there were, should these be a part of them.
    """

    classes: NDArray[np.str_]
    target: NDArray[np.int64]
    probability: Floats
    names: Sequence[str]
    formulas: Sequence[str]
    rows: int

    def __len__(self) -> int:
        return len(self.target)

    @property
    def said(self) -> NDArray[np.int64]:
        """Numbers of the likeliest classes, (n,)."""
        return np.asarray(self.probability.argmax(axis=1))

    @property
    def labels(self) -> NDArray[np.str_]:
        """The true labels as text, (n,)."""
        return self.classes[self.target]


def classified(record: Record, part: str) -> Classified:
    """Return what is known of a part's samples.

    Raises
    ------
    OptionError
        If columns do not fit together.
    ValueError, TypeError, LookupError
        If something is of another type.
    """
    kept = record.meta["predictions"][part]
    known = [str(label) for label in record.meta["classes"]]
    number = {label: k for k, label in enumerate(known)}
    target = np.array([number[str(label)] for label in kept["truth"]], dtype=np.int64)
    probability = np.array(kept["probability"], dtype=np.float64).T
    names, formulas = ([str(word) for word in kept[key]] for key in ("id", "formula"))
    sizes = {len(target), len(names), len(formulas)}
    if len(sizes) != 1 or probability.shape != (len(target), len(known)) or not len(target):
        raise OptionError(f"the probabilities of the {part} rows are damaged: sizes do not fit")
    if len(number) != len(known) or not np.isfinite(probability).all():
        raise OptionError(
            f"the probabilities of the {part} rows are damaged: not numbers, or twice"
        )
    rows = int(kept["rows"])
    return Classified(np.array(known), target, probability, names, formulas, rows)


def first_part(record: Record) -> tuple[str, Classified]:
    """Return the samples to show first, and what to call them.

    Raises
    ------
    OptionError
        If there are none, or they are damaged.
    """
    for part in record.parts:
        if part in record.meta["predictions"]:
            return _words(part), classified(record, part)
    raise OptionError(f"{record.file} holds probabilities, but none of {record.parts}")


def _words(part: str) -> str:
    return _PARTS.get(part, f"{part} rows")


def classes_headline(record: Record) -> str:
    """Return the figures of a classifier, in words."""
    for part in record.parts:
        found = (record.meta.get("figures") or {}).get(part) or {}
        if found.get("n"):
            auc = "" if found.get("auc") is None else f"AUC {float(found['auc']):.3f}, "
            of = f"{int(found['n']):,} {_words(part)}"
            return f"{auc}accuracy {_percent(found['accuracy'])} on {of}"
    return ""


def classes_subject(record: Record) -> str:
    """Return what a classifier tells apart, in words."""
    known = [str(label) for label in record.meta.get("classes") or ()]
    if len(known) > 6:
        words = f"{len(known)} classes"
    else:
        words = " or ".join([", ".join(known[:-1]), *known[-1:]]) if len(known) > 1 else "classes"
    target = record.meta.get("target")
    return f"{target}: {words}" if target else words


def classifier_section(record: Record) -> Markup:
    """Return what the classifier is, and its files."""
    meta, base = record.meta, record.meta.get("base") or {}
    params = meta.get("config") or {}
    layers = meta.get("layers")
    about = {
        "classes": ", ".join(map(str, (meta.get("classes") or [])[:_MOST_CLASSES])),
        "base model": f"{base.get('name', '–')} ({str(base.get('sha256', ''))[:12]}…)",
        "kind": "logistic regression on fingerprints; all layers of the base are frozen",
        "layers read": ", ".join(map(str, layers)) if layers else "all",
        "reads the base's own predictions": bool(params.get("source", True)),
        "inverse penalty C": meta.get("C"),
        "temperature": meta.get("temperature"),
    }
    return join([facts(about), files_table(record.files)])


def samples_section(record: Record) -> Any:
    """Return samples, classes and elements."""
    meta, data = record.meta, record.meta.get("data") or {}
    if not data:
        return missing("estimator.json says nothing of the samples: it was saved before it did")
    about = {
        **({"labels": meta["target"]} if "target" in meta else {}),
        "samples": data.get("samples"),
        "left out, as they could not be used": data.get("left_out"),
        "materials": data.get("materials"),
        "folds": f"{data.get('folds')}, copies of a material in one" if data.get("folds") else "–",
    }
    counts = data.get("class_counts") or []
    total = max(sum(counts), 1)
    rows = [
        (str(label), int(n), _percent(n / total))
        for label, n in zip(meta.get("classes") or (), counts, strict=True)
    ][:_MOST_CLASSES]
    shown = table(("class", "samples", "share"), rows, "Classes")
    return join([facts(about), shown, elements_figure(meta.get("elements") or ())])


def probabilities_section(record: Record) -> Any:
    """Return the figures, how classes are told apart, and the surest mistakes."""
    figures = _figures_table(record)
    if not record.meta.get("predictions"):
        note = missing(
            "The classifier keeps no probabilities (it had too few materials for folds, was made "
            "before they were kept, or with keep_predictions=0): no figures of them. Run matxfer "
            "report with --data TABLE to predict its rows."
        )
        return join([figures, note])
    words, found = first_part(record)
    parts: list[Any] = [figures]
    pictures = []
    if len(np.unique(found.target)) > 1:

        def draw_roc(axis: Any) -> None:
            roc(found.labels, found.probability, classes=found.classes, ax=axis)

        picture = drawn("roc", "receiver operating characteristic", draw_roc, 3.1, 3.0)
        pictures.append(figure(picture, "What is found of a class, and what is taken for it."))

    def draw_histogram(axis: Any) -> None:
        probabilities_by_class(found.labels, found.probability, classes=found.classes, ax=axis)

    picture = drawn("histogram", "histogram of probabilities by class", draw_histogram, 3.6, 3.0)
    pictures.append(figure(picture, "Predicted probabilities by true class."))
    return join([*parts, _shown(words, found), row(*pictures), _mistakes(found)])


def _shown(words: str, found: Classified) -> Markup:
    most = f"{len(found):,} of {found.rows:,}" if found.rows > len(found) else f"{len(found):,}"
    return facts({"drawn": f"{most} {words}"})


def _figures_table(record: Record) -> Markup:
    columns = {
        "auc": "AUC",
        "accuracy": "accuracy",
        "accuracy_of_the_commonest": "accuracy of the commonest class",
        "brier": "Brier score",
        "log_loss": "log loss (nats)",
        "log_loss_uncalibrated": "log loss without the temperature",
        "calibration_error": "calibration error of the likeliest class",
        "n": "n",
    }
    found = [(part, each) for part, each in (record.meta.get("figures") or {}).items() if each]
    present = [key for key in columns if any(key in each for _, each in found)]
    if not found or not present:
        return missing("No figures: there were too few materials of a class for folds.")
    rows = [[_words(part), *(each.get(key) for key in present)] for part, each in found]
    return table(["rows", *(columns[key] for key in present)], rows, "Figures")


def _mistakes(found: Classified) -> Markup:
    confidence = found.probability.max(axis=1)
    wrong = np.flatnonzero(found.said != found.target)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:_WORST]
    rows = [
        (
            found.names[k], found.formulas[k], found.classes[found.target[k]],
            found.classes[found.said[k]], float(confidence[k]),
        )
        for k in order
    ]  # fmt: skip
    if not rows:
        return facts({"mistakes": "none"})
    head = ("id", "formula", "true", "predicted", "its probability")
    return table(head, rows, f"Surest of {len(wrong):,} mistakes", class_="wide")


def confusion_section(record: Record) -> Any:
    """Return how often each class is taken for each other one."""
    if not record.meta.get("predictions"):
        return missing(_NONE)
    words, found = first_part(record)
    n = len(found.classes)
    counts = np.zeros((n, n), dtype=np.int64)
    np.add.at(counts, (found.target, found.said), 1)
    order = np.argsort(-counts.sum(axis=1), kind="stable")[:_MOST_CLASSES]
    shown = np.sort(order)
    true, said, right = counts.sum(axis=1), counts.sum(axis=0), counts.diagonal()
    rows = []
    for k in shown:
        cells = [f"{counts[k, j]:,} ({_percent(_over(counts[k, j], true[k]))})" for j in shown]
        rows.append([
            found.classes[k], *cells, int(true[k]), _percent(_over(right[k], true[k])),
            _percent(_over(right[k], said[k])),
        ])  # fmt: skip
    head = ["true class", *(f"predicted {found.classes[j]}" for j in shown)]
    caption = f"Likeliest classes of {len(found):,} {words}; in brackets: share of the true class"
    left = [] if n <= _MOST_CLASSES else [missing(f"The {_MOST_CLASSES} commonest of {n} classes.")]
    return join([*left, table([*head, "n", "recall", "precision"], rows, caption)])


def reliability_section(record: Record) -> Any:
    """Return whether probabilities are frequencies."""
    if not record.meta.get("predictions"):
        return missing(_NONE)
    words, found = first_part(record)

    def draw(axis: Any) -> None:
        reliability(found.labels, found.probability, classes=found.classes, ax=axis)

    picture = drawn("reliability", "share found against probability", draw, 3.1, 3.3)
    caption = (
        f"How often a class occurs against its predicted probability, {words}. Bars: 95 % "
        "intervals; on the diagonal probabilities are frequencies. Above: how many samples there "
        "are of each."
    )
    return figure(picture, caption)


def mistakes_by_element_section(record: Record) -> Any:
    """Return the share of mistakes among the samples that hold each element."""
    if not record.meta.get("predictions"):
        return missing(_NONE)
    words, found = first_part(record)
    wrong = (found.said != found.target).astype(np.float64)
    by_element = element_residuals(wrong, found.formulas)
    known = {z: values for z, values in by_element.items() if len(values) >= _FEW}
    shares = {z: 100 * float(values.mean()) for z, values in known.items()}

    def draw(axis: Any) -> None:
        periodic_table(shares, "samples with the element that are wrong (%)", ax=axis)

    rows = [(symbol, len(known[z]), f"{shares[z]:.0f} %") for z, symbol in _most_often_wrong(known)]
    picture = drawn("residuals", f"mistakes by element, {words}", draw, 5.0, 3.1)
    shown = figure(picture, f"{len(found):,} {words}. Grey: in fewer than {_FEW} of them.")
    head = ("element", "samples", "wrong")
    return join([shown, table(head, rows, "Most often wrong") if rows else ""])


def _most_often_wrong(known: dict[int, Floats]) -> list[tuple[int, str]]:
    from ase.data import chemical_symbols

    often = [z for z, values in known.items() if values.any()]
    order = sorted(often, key=lambda z: (-known[z].mean(), z))[:_WORST]
    return [(z, chemical_symbols[z]) for z in order]


def _over(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else float("nan")


def _percent(share: Any) -> str:
    return "–" if share != share else f"{100 * float(share):.1f} %"  # noqa: PLR0124 - NaN
