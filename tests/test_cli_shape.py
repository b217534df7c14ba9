"""What all commands have in common: their help, examples, --version, -v, --quiet, --debug, Tab."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer

import matxfer
import matxfer.cli
from matxfer.cli_examples import EXAMPLES
from matxfer.cli_shape import in_front, walk, with_examples
from matxfer.terminal import DEFECT

HERE = Path(__file__).resolve().parents[1]
ROOT = with_examples(typer.main.get_command(matxfer.cli.app))
COMMANDS = {" ".join(path): command for path, command in walk(ROOT)}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["matxfer", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            matxfer.cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def in_new_process(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "matxfer", *words],
        capture_output=True, text=True, check=False, env=os.environ | environment, timeout=60,
    )  # fmt: skip


# -- help -------------------------------------------------------------------------------------
def test_help_is_a_tree_of_all_commands(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    listed = out.split("Commands:")[1].split("Examples:")[0]
    names = re.findall(r"^( +)(\S+)  +\S", listed, re.MULTILINE)
    deep = {len(path): "  " * len(path) for path, _ in walk(ROOT) if path}
    assert [(deep[len(p)], p[-1]) for p, _ in walk(ROOT) if p] == names
    for option in ("--version", "-v, --verbose", "-q, --quiet", "--debug", "--install-completion"):
        assert option in out
    assert run()[:2] == (2, out)  # no command: the same, but it is an error


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_can_be_given(name, run):
    lines = EXAMPLES.get(name)
    assert lines, f"give matxfer {name} an example in matxfer/cli_examples.py"
    _, out, _ = run(*name.split(), "--help")
    shown = out.split("Examples:")[1]
    for line in lines:
        assert line in shown
        words = shlex.split(line, comments=True)
        words = words[words.index("matxfer") + 1 :]
        assert " ".join(words).startswith(name.split(" ")[0]) or hasattr(COMMANDS[name], "commands")
        command = ROOT
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(line, list(words))  # raises for what the command does not know


def test_no_example_is_of_a_command_that_is_gone():
    assert set(EXAMPLES) == set(COMMANDS)


@pytest.mark.parametrize("words", [("models",), ("datasets", "info", "matbench_phonons"),
                                   ("plugins", "list")])  # fmt: skip
def test_examples_that_need_nothing_run(words, run):
    assert " ".join(("matxfer", *words)) in EXAMPLES[" ".join(words[:2])]
    assert run(*words)[0] == 0


# -- version ----------------------------------------------------------------------------------
def test_version(run):
    assert run("--version") == (0, f"matxfer {matxfer.__version__}\n", "")
    code, out, _ = run("--version", "-v")
    assert code == 0
    assert re.search(r"^torch \d", out, re.MULTILINE)
    assert re.search(r"^python \d", out, re.MULTILINE)


def test_version_of_the_module_in_less_than_a_second():
    before = os.times()
    result = in_new_process("--version")
    after = os.times()
    assert (result.stdout, result.stderr) == (f"matxfer {matxfer.__version__}\n", "")
    # Of the processor: the machine may be busy.
    spent = after.children_user + after.children_system - before.children_user
    assert spent - before.children_system < 1.0


# -- quiet, verbose, debug --------------------------------------------------------------------
@pytest.fixture
def files(repository, tmp_path):
    """Return a good structure and a bad one."""
    bad = tmp_path / "bad.cif"
    bad.write_text("no CIF")
    return [repository / "datasets" / "examples" / "Cu.cif", bad]


def test_quiet(files, run):
    words = ("predict", *files, "--model", "mp-small")
    code, out, err = run(*words)
    assert (code, "1 of 2 structures could not be predicted" in err) == (0, True)
    for quiet in ("--quiet", "-q"):
        assert run(*words, quiet) == (0, out, "")
        assert run(quiet, *words) == (0, out, "")
    assert run(*words)[2] == err  # the next command speaks again
    # Errors are told all the same.
    code, out, err = run("predict", *files, "--model", "nowhere", "-q")
    assert (code, out, err.count("\n"), err.startswith("error: no model")) == (2, "", 1, True)
    code, _, err = run(*words, "--strict", "-q")
    assert (code, err.startswith("error: ")) == (3, True)


def test_quiet_silences_warnings(run, monkeypatch):
    def warn(*_):
        warnings.warn("somebody warns", stacklevel=1)
        return "a card"

    monkeypatch.setattr("matxfer.sharing.card.card_text", warn)
    with pytest.warns(UserWarning, match="somebody warns"):
        assert run("plugins", "info", "x")[0] == 0
    with warnings.catch_warnings(record=True) as heard:
        assert run("plugins", "info", "x", "--quiet")[:2] == (0, "a card\n")
    assert heard == []


def test_no_progress_when_quiet(files, run, monkeypatch):
    from matxfer.terminal import counter_on_terminal, person_looks, voice

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert person_looks()
    monkeypatch.setattr(voice, "quiet", True)
    assert not person_looks()
    monkeypatch.setattr("rich.progress.Progress", None)
    with counter_on_terminal("building") as advance:
        advance(1)


def test_verbose(files, repository, run):
    words = ("predict", files[0], "--model", "mp-small")
    _, out, err = run(*words)
    assert err == ""
    for verbose in ("-v", "--verbose"):
        code, told, err = run(*words, verbose)
        assert (code, told) == (0, out)
        lines = err.splitlines()
        assert all(re.match(r" *\d+\.\d\d s  ", line) for line in lines)
        assert f"matxfer {verbose} predict" in lines[0]
        assert any(str(repository / "pretrained" / "mp-small") in line for line in lines)
        assert re.search(r"done; \d+ MB of memory at most", lines[-1])
    assert run(*words)[2] == ""


def test_debug(run):
    words = ("plugins", "info", "nowhere")
    code, _, err = run(*words)
    assert (code, err.count("\n")) == (2, 1)
    code, _, debug = run(*words, "--debug")
    assert code == 2
    assert debug.startswith("Traceback")
    assert debug.endswith(err)
    assert run(*words)[2] == err


def test_a_defect_of_ours_is_one_line_too(run, monkeypatch):
    def broken(_):
        raise KeyError("no such\nkey")

    monkeypatch.setattr("matxfer.sharing.card.card_text", broken)
    code, _, err = run("plugins", "info", "x")
    assert (code, err.count("\n")) == (DEFECT, 1)
    assert err.startswith("error: KeyError: ")
    assert "report it as a defect of matxfer; --debug shows where" in err
    code, _, err = run("plugins", "info", "x", "--debug")
    assert (code, err.startswith("Traceback"), "broken" in err) == (DEFECT, True, True)


def test_options_of_every_command_may_stand_anywhere():
    assert in_front(["predict", "-v", "a", "--quiet"]) == ["-v", "--quiet", "predict", "a"]
    assert in_front(["predict", "--", "-v"]) == ["predict", "--", "-v"]
    assert in_front(["predict", "--verbose-not", "-vv"]) == ["predict", "--verbose-not", "-vv"]
    taken = {
        option
        for path, command in walk(ROOT)
        if path
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert not taken & {"-v", "--verbose", "-q", "--quiet", "--debug", "--version"}


# -- completion -------------------------------------------------------------------------------
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    script = in_new_process("--show-completion", shell,
                            _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")  # fmt: skip
    assert script.returncode == 0, script.stderr
    assert "_MATXFER_COMPLETE" in script.stdout

    def complete(line):
        asked = {"_MATXFER_COMPLETE": f"complete_{shell}", "COMP_WORDS": line,
                 "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line,
                 "_TYPER_COMPLETE_FISH_ACTION": "get-args"}  # fmt: skip
        return in_new_process(**asked).stdout

    found = complete("matxfer plugins un")
    assert "unpack" in found
    assert "verify" not in found
    if shell == "bash":
        assert sorted(complete("matxfer pr").split()) == ["predict", "pretrain", "probe"]
        assert complete("matxfer predict --plug").split() == ["--plugin"]


@pytest.fixture
def places(tmp_path):
    """Return a folder with plugins, a packed one, a model, a classifier and what is none."""
    for folder in (
        "mine",
        "deep/er/plugin one",
        "model/plugins/first",
        ".hidden/p",
        "a/b/c/d/e/far",
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "plugin.json").write_text("{}")
    (tmp_path / "model" / "card.json").write_text("{}")
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "estimator.json").write_text("{}")
    (tmp_path / "mail.matxfer.zip").write_bytes(b"")
    (tmp_path / "mist").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def completed(line, folder):
    """Return what bash would offer, and the modules that were imported for it."""
    asked = {"_MATXFER_COMPLETE": "complete_bash", "COMP_WORDS": line,
             "COMP_CWORD": str(line.count(" "))}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "matxfer"], capture_output=True, text=True,
        env=os.environ | asked, cwd=folder, check=False,
    )  # fmt: skip
    imported = {row.split("|")[-1].strip() for row in done.stderr.splitlines() if "|" in row}
    return done.stdout.splitlines(), imported


def test_names_of_models_are_completed(places):
    shipped = sorted(path.parent.name for path in (HERE / "pretrained").glob("*/card.json"))
    assert len(shipped) > 3
    found, imported = completed("matxfer predict --model ", places)
    assert set(shipped) | {"chgnet", "model"} <= set(found)
    assert {"typer"} <= imported
    assert not imported & {"torch", "pandas", "lightning", "sklearn"}
    small = [name for name in shipped if name.startswith("mp-s")]
    for line in ("predict --model mp-s", "models mp-s", "finetune t.csv --model mp-s",
                 "relax x.cif --model mp-s", "shift a b --model mp-s",
                 "report mine --model mp-s", "potential x --model mp-s"):  # fmt: skip
        assert completed(f"matxfer {line}", places)[0] == small, line
    for line in ("probe t.csv --sources mp-base,mp-s", "sources t.csv --models mp-base,mp-s"):
        assert completed(f"matxfer {line}", places)[0] == [f"mp-base,{name}" for name in small]
    assert completed("matxfer models ./m", places)[0] == ["./model"]
    assert completed("matxfer predict --model mo", places)[0] == ["model"]


def test_places_of_plugins_are_completed(places):
    near = ["deep/er/plugin one", "mail.matxfer.zip", "mine", "model/plugins/first"]
    found, imported = completed("matxfer predict x.cif --plugin ", places)
    assert found == near
    assert not imported & {"torch", "pandas"}
    for line in ("predict --plugin m", "plugins info m", "plugins verify mine m", "consolidate m",
                 "md x.cif --plugin m", "evaluate t.csv --target x --plugin m"):  # fmt: skip
        assert completed(f"matxfer {line}", places)[0] == near[1:], line
    assert completed("matxfer report ", places)[0] == sorted([*near, "kinds"])
    assert completed("matxfer predict --plugin a/b/c/d/", places)[0] == ["a/b/c/d/e/far"]
    assert completed(f"matxfer predict --plugin {places}/mi", places)[0] == [f"{places}/mine"]
    assert completed("matxfer predict --plugin ../", places / "mist")[0] == [
        f"../{name}" for name in near
    ]
    assert completed("matxfer predict --plugin nowhere/x", places)[0] == [""]


def test_home_stays_as_it_was_typed(places, monkeypatch):
    from matxfer.cli_names import plugin_places

    monkeypatch.setenv("HOME", str(places))
    assert plugin_places("~/mi") == ["~/mine"]


def test_not_every_folder_of_a_disk_is_looked_into(tmp_path, monkeypatch):
    from matxfer import cli_names

    for k in range(60):
        (tmp_path / f"{k:02d}" / "inner").mkdir(parents=True)
        (tmp_path / f"{k:02d}" / "inner" / "plugin.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert len(cli_names.plugin_places("")) == 60
    monkeypatch.setattr(cli_names, "_MOST", 11)
    assert cli_names.plugin_places("") == [f"{k:02d}/inner" for k in range(10)]


def test_names_of_datasets_are_completed(places):
    cards = sorted(path.stem for path in (HERE / "datasets").glob("*.toml"))
    assert completed("matxfer datasets info ", places)[0] == cards
    found, imported = completed("matxfer datasets fetch matbench_", places)
    assert found == [name for name in cards if name.startswith("matbench_")]
    assert len(found) > 5
    assert not imported & {"torch", "pandas"}


def test_a_shell_is_answered_at_once(places):
    """The processor's time, not the clock's: other processes may be in the way."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        completed("matxfer predict x.cif --plugin m", places)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(spent) < 1
