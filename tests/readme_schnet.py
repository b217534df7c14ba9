"""The SchNet of matxfer/backbones/README.md, as it is written there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

README = Path(__file__).resolve().parents[1] / "matxfer" / "backbones" / "README.md"


def blocks(language: str) -> list[str]:
    """Return the code blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def schnet_module() -> ModuleType:
    """Return the module ``my_package`` that its reader would write."""
    if "my_package" not in sys.modules:
        module = ModuleType("my_package")
        sys.modules["my_package"] = module
        exec(blocks("python")[0], module.__dict__)
    return sys.modules["my_package"]
