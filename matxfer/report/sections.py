"""The sections of a report; what is damaged or missing is told in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matxfer.errors import MatxferError
from matxfer.html import Markup, tag
from matxfer.report.about import about_section, data_section, provenance_section, use_section
from matxfer.report.classes import (
    classifier_section,
    confusion_section,
    mistakes_by_element_section,
    probabilities_section,
    reliability_section,
    samples_section,
)
from matxfer.report.parts import missing
from matxfer.report.quality import (
    calibration_section,
    elements_section,
    parity_section,
    potential_section,
    training_section,
)
from matxfer.report.source import retention_section, shift_section

if TYPE_CHECKING:
    from collections.abc import Callable

    from matxfer.report.record import Record


def all_sections(record: Record) -> list[Markup]:
    """Return every section that a plugin of its kind has."""
    of_properties: tuple[tuple[str, Callable[[Record], Any]], ...] = (
        ("Predictions and truth", parity_section),
        ("Errors by element", elements_section),
        ("Calibration", calibration_section),
        ("Training", training_section),
        ("Retention of the source", retention_section),
        ("Source and target", shift_section),
    )
    of_potentials = (
        ("Errors", potential_section),
        ("Training", training_section),
    )
    of_classes = (
        ("Classes and probabilities", probabilities_section),
        ("Confusions", confusion_section),
        ("Mistakes by element", mistakes_by_element_section),
        ("Calibration", reliability_section),
    )
    middle = of_potentials if record.is_potential else of_properties
    wanted = (
        ("What it is", classifier_section if record.is_classifier else about_section),
        ("Data", samples_section if record.is_classifier else data_section),
        *(of_classes if record.is_classifier else middle),
        ("Provenance", provenance_section),
        ("Use and cite", use_section),
    )
    return [_section(title, build, record) for title, build in wanted]


def _section(title: str, build: Callable[[Record], Any], record: Record) -> Markup:
    """Build a section; what a stranger's file says may be of any type, and is then told."""
    try:
        content = build(record)
    except MatxferError as error:
        content = missing(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        content = missing(f"what {record.file} says of this cannot be read ({error!r:.120})")
    return tag("section", tag("h2", title), content)
