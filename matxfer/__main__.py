"""``python -m matxfer`` is the command ``matxfer``."""

from matxfer.cli import main

if __name__ == "__main__":
    main()
