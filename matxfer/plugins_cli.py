"""``matxfer plugins``: what there is, what is in it, one file for mail, the Hub, and checks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.cli_names import ModelOfPlugins, plugin_places
from matxfer.terminal import AsJson, interruptible, print_json, say

if TYPE_CHECKING:
    from matxfer.sharing.listing import Summary

#: Exit code where a plugin has a problem.
BAD = 1

app = typer.Typer(
    name="plugins",
    help="Plugins to give away: what there is and what is in it, one file for mail, the Hugging "
    "Face Hub, and what is checked on arrival.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PluginPath = Annotated[
    str,
    typer.Argument(
        help="Folder, packed file (NAME.matxfer.zip) or hf://user/name[@revision].",
        metavar="PLUGIN",
        autocompletion=plugin_places,
    ),
]


@app.command("list")
def list_plugins(
    folder: Annotated[str, typer.Argument(help="Where to look, and in the folders below.")] = ".",
    as_json: AsJson = False,
) -> None:
    """List the plugins under a folder, packed ones too: one row each, with the test error.

    A plugin that cannot be used keeps its row and says why.
    """
    from matxfer.sharing.card import printable
    from matxfer.sharing.listing import find_plugins

    found = list(find_plugins(folder))
    if as_json:
        print_json({"plugins": [plugin.to_json() for plugin in found]})
        return
    if not found:
        say(f"{folder}: there are no plugins in it; matxfer finetune makes one")
        return
    rows = [("name", "target", "base", "test error", "MB", "format", "path"), *map(_row, found)]
    wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, wide, strict=True))
        typer.echo(printable("  ".join(cells).rstrip()))
    for plugin in found:
        if plugin.problem:
            say(printable(f"{plugin.path}: {plugin.problem}"))


def _row(plugin: Summary) -> tuple[str, ...]:
    error = "–"
    if plugin.test_error is not None:
        error = f"{plugin.test_error:.4g} {plugin.test_error_unit}".rstrip()
    return (
        plugin.name,
        plugin.target or "?",
        plugin.base or "?",
        error,
        "–" if plugin.megabytes is None else f"{plugin.megabytes:.2f}",
        "?" if plugin.format is None else str(plugin.format),
        plugin.path + ("  (problem)" if plugin.problem else ""),
    )


@app.command()
def info(plugin: PluginPath, as_json: AsJson = False) -> None:
    """Print a plugin's card: property, base, errors, data, training, checksum."""
    from matxfer.plugin_files import read_plugin
    from matxfer.sharing.card import card_text

    if as_json:
        print_json(read_plugin(plugin).facts())
    else:
        typer.echo(card_text(plugin))


@app.command()
def verify(
    plugins: Annotated[
        list[str],
        typer.Argument(
            help="Folders, packed files or hf://user/name[@revision].",
            metavar="PLUGIN...",
            autocompletion=plugin_places,
        ),
    ],
    model: ModelOfPlugins = None,
    as_json: AsJson = False,
) -> None:
    """Check plugins before they are used: files, formats, checksums, numbers, base; that they load.

    With --json one object per line and plugin: ok, problems (file, what, remedy), notes, files.

    Exit codes: 0 all are good; 1 there is a problem; 2 wrong options.
    """
    from matxfer.sharing.verification import verify as check

    found = [check(plugin, model) for plugin in plugins]
    for result in found:
        if as_json:
            typer.echo(json.dumps(result, ensure_ascii=False))
        else:
            _say_result(result)
    if not all(result["ok"] for result in found):
        raise typer.Exit(BAD)


def _say_result(result: dict[str, Any]) -> None:
    from matxfer.sharing.card import printable

    if result["ok"]:
        base = result["base"]["name"]
        line = f"{result['plugin']}: good (format {result['format']}, on {base}; it loads)"
        typer.echo(printable(line))
    for problem in result["problems"]:
        remedy = f"; {problem['remedy']}" if problem["remedy"] else ""
        typer.echo(printable(f"{result['plugin']}: {problem['what']}{remedy}"))
    for note in result["notes"]:
        typer.echo(printable(f"{result['plugin']}: note: {note}"))


@app.command()
def pack(
    plugin: PluginPath,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="NAME.matxfer.zip (default: of the plugin's name)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a plugin as one file, for mail; --plugin takes it as it is, without unpacking.

    The same plugin gives the same bytes, so that the SHA-256 told here can be compared.
    """
    from matxfer.files import sha256
    from matxfer.sharing.exchange import pack as run

    path = run(plugin, output)
    size = path.stat().st_size
    facts = {"file": str(path), "bytes": size, "sha256": sha256(path)}
    if as_json:
        print_json(facts)
        return
    typer.echo(f"{path}: {size / 1e6:.2f} MB, SHA-256 {facts['sha256']}")


@app.command()
def unpack(
    plugin: Annotated[str, typer.Argument(help="NAME.matxfer.zip.", metavar="FILE")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder (default: of the file's name).")
    ] = None,
) -> None:
    """Write a packed plugin as a folder, once it has been checked."""
    from matxfer.sharing.exchange import unpack as run

    typer.echo(f"{run(plugin, output)}: written")


@app.command()
def push(
    plugin: PluginPath,
    repository: Annotated[str, typer.Argument(help="user/name on the Hub.", metavar="USER/NAME")],
    licence: Annotated[
        str | None, typer.Option(help="For the card, such as cc-by-4.0 (default: unknown).")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Of the commit.")] = None,
    show_card: Annotated[
        bool, typer.Option("--show-card", help="Print the card and send nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send a plugin to the Hugging Face Hub, with a model card made of its plugin.json.

    Needs pip install 'matxfer[hub]' and a token with the right to write, from the environment
    (HF_TOKEN) or hf auth login. HF_ENDPOINT names another server.
    """
    from matxfer.plugin_files import read_plugin
    from matxfer.sharing.card import readme
    from matxfer.sharing.exchange import push as run

    if show_card:
        typer.echo(readme(read_plugin(plugin), repository, licence))
        return
    with interruptible("; a commit is there whole or not at all"):
        sent = run(plugin, repository, licence=licence, private=private, message=message)
    if as_json:
        print_json(sent)
        return
    if licence is None:
        say("no licence is named, so others cannot know what they may do with it: see --licence")
    typer.echo(f"{sent['url']}: sent; exactly this plugin is --plugin {sent['address']}")


@app.command()
def pull(
    repository: Annotated[
        str,
        typer.Argument(help="user/name[@revision] on the Hub.", metavar="USER/NAME"),
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder (default: NAME).")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit (default: main).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a plugin from the Hugging Face Hub into a folder, checked before it is there.

    Every command that takes --plugin takes hf://user/name[@revision], too.
    """
    from matxfer.sharing.exchange import pull as run

    with interruptible("; nothing was kept"):
        found = run(repository, output, revision=revision)
    if as_json:
        print_json(found)
        return
    typer.echo(f"{found['folder']}: written; exactly this plugin is {found['address']}")
