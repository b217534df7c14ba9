"""``python -m matxfer``: the same as the command ``matxfer``."""

from __future__ import annotations

from matxfer.cli import main

if __name__ == "__main__":
    main()
