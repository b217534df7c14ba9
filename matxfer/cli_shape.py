"""The shape of the command line: options of every command, the tree of commands, examples."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from matxfer.cli_examples import EXAMPLES
from matxfer.terminal import voice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Options that may stand anywhere in a command.
EVERYWHERE = ("-v", "--verbose", "-q", "--quiet", "--debug")


class TreeGroup(TyperGroup):
    """A group whose help lists the commands of its groups, too."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - Click's
        """Write the commands, those of a group below it."""
        rows = [
            ("  " * (len(path) - 1) + path[-1], command)
            for path, command in walk(self)
            if path and not command.hidden
        ]
        limit = formatter.width - 6 - max(len(name) for name, _ in rows)
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(limit)) for name, command in rows]
            )


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a command and all below it, each with the words that lead to it."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


def with_examples(command: Any) -> Any:
    """Put the examples into the help of a command and of all below it."""
    for path, found in walk(command):
        lines = EXAMPLES.get(" ".join(path))
        if lines:
            block = "\n".join(f"  {line}" for line in lines)
            found.epilog = f"\b\nExamples:\n{block}"
    return command


def in_front(words: Sequence[str]) -> list[str]:
    """Move the options of every command before the command, where they are read.

    What comes after ``--`` stays.

    Examples
    --------
    >>> in_front(["predict", "x.cif", "--quiet"])
    ['--quiet', 'predict', 'x.cif']
    """
    end = list(words).index("--") if "--" in words else len(words)
    front = [word for word in words[:end] if word in EVERYWHERE]
    return [*front, *(word for word in words[:end] if word not in EVERYWHERE), *words[end:]]


def root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the version, with -v of packages too."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("-v", "--verbose", help="Say what is read, kept and found, and how long."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Nothing on standard error but errors.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="With an error, show where in the code it was raised.")
    ] = False,
) -> None:
    """Transfer learning for crystals.

    Predict properties of structure files with a pretrained network, and fine-tune small plugins
    for properties of your own. -v, -q and --debug may stand anywhere in a command.
    """
    voice.quiet, voice.debug = quiet, debug
    if quiet:
        warnings.simplefilter("ignore")
    if verbose:
        _log_to_terminal()
    if version:
        _say_version(with_packages=verbose)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)
    logging.getLogger("matxfer").info("matxfer %s", " ".join(in_front(sys.argv[1:])))


def _say_version(*, with_packages: bool) -> None:
    from matxfer import __version__

    typer.echo(f"matxfer {__version__}")
    if with_packages:
        from matxfer.provenance import versions

        for name, found in versions().items():
            if name != "matxfer":
                typer.echo(f"{name} {found}")


class _Elapsed(logging.Formatter):
    """Lines that begin with the seconds since the start of the command."""

    def __init__(self) -> None:
        super().__init__()
        self.started = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        """Return a line."""
        return f"{time.monotonic() - self.started:7.2f} s  {record.getMessage()}"


def _log_to_terminal() -> None:
    log = logging.getLogger("matxfer")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Elapsed())
    log.handlers = [handler]
    log.setLevel(logging.INFO)


def farewell() -> None:
    """Say with ``-v`` what the command took."""
    log = logging.getLogger("matxfer")
    try:
        import resource
    except ImportError:  # not on Windows
        log.info("done")
    else:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        log.info("done; %.0f MB of memory at most", kilobytes / 1024)


def silent_log() -> None:
    """Undo what ``-v`` did, for the next command of the same process."""
    log = logging.getLogger("matxfer")
    log.handlers = []
    log.setLevel(logging.NOTSET)
