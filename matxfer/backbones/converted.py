"""Model folders made of weights that other packages carry, once each, in matxfer's cache folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from matxfer.data.store import cache_folder
from matxfer.files import FormatError, read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from matxfer.model import Model

#: Raise it when the tensors that are written change.
LAYOUT = 1


def converted_folder(
    package: str,
    name: str,
    weights: str,
    make: Callable[[Path], Model],
    card: Path,
    fisher: Path,
) -> Path:
    """Return the folder of a model, made on first use.

    Parameters
    ----------
    package, weights
        The package, and a pattern within it that its one file of weights matches.
    name
        Of the model.
    make
        Reads the weights.
    card, fisher
        Our own files that go into it; they tell it from a folder of another time.

    Raises
    ------
    ModuleNotFoundError
        If the package is not installed.
    FormatError
        If its weights are not those that are known, or the folder cannot be written.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    own = hashlib.sha256(f"{LAYOUT}".encode() + card.read_bytes() + fisher.read_bytes())
    place = f"{package}-{version(package)}-{own.hexdigest()[:8]}"
    target = cache_folder() / "models" / place / name
    if not (target / "card.json").is_file():
        found = sorted(Path(spec.submodule_search_locations[0]).glob(weights))
        if len(found) != 1:
            raise FormatError(
                f"{spec.submodule_search_locations[0]}: there are no weights {weights}; "
                f"install {package} again"
            )
        _write(make(found[0]), fisher, target)
    return target


def _write(model: Model, fisher: Path, target: Path) -> None:
    """Write the folder beside its place and rename it, so that no reader sees half of it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
    except OSError as error:
        raise FormatError(
            f"{target}: cannot be written ({error}); set MATXFER_CACHE to a folder that can"
        ) from error
    try:
        model.save(temporary / target.name, read_tensors(fisher))
        if target.exists():  # half of one, from another time
            shutil.rmtree(target, ignore_errors=True)
        (temporary / target.name).replace(target)
    except OSError:
        if not (target / "card.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
