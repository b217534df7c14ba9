"""Options as told by a user: whether they are of the right kind and in their range."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from matxfer.errors import OptionError

#: What a number must be, and the words for it.
Range = tuple[Callable[[Any], bool], str]

COUNT: Range = (lambda value: value >= 1, "must be at least 1")
POSITIVE: Range = (lambda value: 0 < value < math.inf, "must be positive")
NOT_NEGATIVE: Range = (lambda value: 0 <= value < math.inf, "must not be negative")
PART: Range = (lambda value: 0 <= value < 1, "must be in [0, 1)")
#: NumPy takes no larger seed.
SEED: Range = (lambda value: 0 <= value < 2**32, "must be in [0, 4294967295]")

_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def check_ranges(options: object, ranges: Mapping[str, Range], place: str = "") -> None:
    """Check that numbers are in their ranges; in a dictionary each value has to be.

    Parameters
    ----------
    options
        The object whose attributes they are; one that is ``None`` is unsaid.
    ranges
        What each attribute must be.
    place
        What the message calls the object.

    Raises
    ------
    OptionError
        Naming the option, its value and what it must be.
    """
    for name, (within, words) in ranges.items():
        for keys, value in _leaves(getattr(options, name), ""):
            # Text is out of any range, and so is NaN, of which no comparison is true.
            if not isinstance(value, Real) or not within(value):
                raise OptionError(f"{_called(name, place)}{keys} is {value!r}, but {words}")


def check_choice(name: str, value: object, known: object, place: str = "") -> None:
    """Check that a value is one of those known.

    Raises
    ------
    OptionError
        Naming the option, its value and what there is.
    """
    if value not in known:  # type: ignore[operator]
        raise OptionError(f"{_called(name, place)} is {value!r}, but must be one of {known}")


def check_kinds(options: object, place: str = "") -> None:
    """Check that the fields of a dataclass hold what their annotations say.

    Raises
    ------
    OptionError
        Naming the option, its value and what it should be.
    """
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if not _is(value, hint):
            raise OptionError(
                f"{_called(name, place)} is {value!r}, not {_noun(hint)}{_advice(value, hint)}"
            )


def _called(name: str, place: str) -> str:
    return f"{name!r} in {place}" if place else name


def _leaves(value: Any, keys: str) -> Iterator[tuple[str, Any]]:
    """Yield the numbers of an option with the keys that lead to them; none if it is unsaid."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{keys} of {key!r}")
    elif value is not None:
        yield keys, value


def _is(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, kind) for kind in inner)
    if origin is list:
        return isinstance(value, list) and all(_is(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is(key, inner[0]) and _is(item, inner[1]) for key, item in value.items()
        )
    if hint in (int, float):  # NumPy's numbers are as good, but True is no number
        number = Integral if hint is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint)


def _noun(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_noun(kind) for kind in inner)
    if origin is list:
        return "a list" if inner[0] is Any else f"a list of {_plural(inner[0])}"
    if origin is dict:
        return "keys and values" if inner[1] is Any else f"names, each with {_noun(inner[1])}"
    if hint is type(None):
        return "null"
    return _NOUNS.get(hint, getattr(hint, "__name__", str(hint)))


def _plural(hint: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "text"}.get(hint, _noun(hint))


def _advice(value: Any, hint: Any) -> str:
    """Say how YAML wants it written, where its reading surprises."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            pass
        else:
            return " (write 1.0e-3)" if float in kinds else " (without quotes)"
        if any(get_origin(kind) is list for kind in kinds):
            return f" (write [{value}])"
    elif str in kinds and not isinstance(value, dict | list | None):
        return " (put it in quotes)"
    inner = get_args(hint)[1] if get_origin(hint) is dict else None
    return " (write {name: [value]})" if get_origin(inner) is list else ""
