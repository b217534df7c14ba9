"""What an estimator's folder says of it: class and parameters as JSON, never a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matxfer.files import ESTIMATOR_FORMAT, FormatError, read_json, write_json
from matxfer.model import Model, available_models

_FILE = "estimator.json"


def write_estimator(folder: Path, estimator: Any, extra: dict[str, Any] | None = None) -> None:
    """Write class and parameters of an estimator, and what else is to be known."""
    write_json(folder / _FILE, estimator_record(estimator, extra))


def estimator_record(estimator: Any, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return class and parameters of an estimator, and what else is to be known."""
    params = {name: _plain(value) for name, value in estimator.get_params(deep=False).items()}
    kind = type(estimator).__name__
    return {"format": ESTIMATOR_FORMAT, "kind": kind, "params": params, **(extra or {})}


def read_estimator(folder: str | Path, kind: type, model: str | Path | Model | None) -> Any:
    """Return an unfitted estimator of a folder and what else was written.

    Raises
    ------
    FormatError
        If the folder holds none, or one of another class.
    """
    path = Path(folder) / _FILE
    record = read_json(path, ESTIMATOR_FORMAT)
    if record.get("kind") != kind.__name__:
        raise FormatError(
            f"{path}: holds a {record.get('kind')!r}; load it with that class, not {kind.__name__}"
        )
    try:
        params = dict(record["params"])
        if isinstance(params.get("layers"), list):
            params["layers"] = tuple(params["layers"])
        if model is not None:
            params["model"] = model
        return kind(**params), record
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: damaged ({error}); save the estimator again") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Model):
        shipped = value.name in available_models()
        return value.name if shipped or value.folder is None else str(value.folder)
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value
