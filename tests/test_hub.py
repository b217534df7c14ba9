"""Plugins to and from the Hugging Face Hub, played by a server of our own with faults."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import yaml

from matxfer import sharing
from matxfer.errors import OptionError
from matxfer.files import FormatError
from matxfer.hub import HubError, parse_address
from matxfer.plugin_files import META, NAMES, WEIGHTS
from matxfer.prediction import predict
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

hub = pytest.importorskip("huggingface_hub", reason="needs pip install 'matxfer[hub]'")

TARGET = "debye_temperature_k"
TOKEN = "hf_of_the_tests"


class Hub:
    """What the server holds: commits of repositories, each with its files."""

    def __init__(self):
        self.commits = defaultdict(list)  # repository: [(sha, {name: bytes})]
        self.tags = {}
        self.private = set()
        self.requests = []
        self.faults = {}

    def commit(self, repository, files):
        before = self.commits[repository][-1][1] if self.commits[repository] else {}
        sha = hashlib.sha1(repr((repository, len(self.commits[repository]))).encode()).hexdigest()
        self.commits[repository].append((sha, {**before, **files}))
        return sha

    def at(self, repository, revision):
        commits = self.commits.get(repository, [])
        if revision == "main":
            return commits[-1] if commits else None
        revision = self.tags.get(revision, revision)
        return next((c for c in commits if c[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", headers=None, length=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code):
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def authorised(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self):
        state = self.server.state
        path = urlsplit(self.path).path.strip("/").split("/")
        state.requests.append((self.command, self.path))
        if status := state.faults.get("status"):
            self.answer(status, {"error": "fault"})
        elif path[:2] == ["api", "models"]:
            revision = "/".join(path[5:]) if path[4:5] == ["revision"] else "main"
            self.info("/".join(path[2:4]), revision)
        elif path[2:3] == ["resolve"]:
            self.file("/".join(path[:2]), path[3], path[4])
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def known(self, repository, revision):
        state = self.server.state
        if repository not in state.commits:
            self.refuse(401, "RepoNotFound")  # as the Hub does, so that nobody learns what there is
        elif repository in state.private and not self.authorised:
            self.refuse(401, "RepoNotFound")
        elif (found := state.at(repository, revision)) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            return found
        return None

    def info(self, repository, revision):
        if found := self.known(repository, revision):
            sha, files = found
            siblings = [{"rfilename": n, "size": len(d)} for n, d in files.items()]
            self.answer(200, {"id": repository, "modelId": repository, "sha": sha,
                              "siblings": siblings, "private": False, "tags": []})  # fmt: skip

    def file(self, repository, revision, name):
        state = self.server.state
        found = self.known(repository, revision)
        if not found:
            return
        sha, files = found
        if name not in files:
            self.refuse(404, "EntryNotFound")
            return
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha}
        if self.command == "GET" and name == WEIGHTS:
            if state.faults.get("cut"):
                self.answer(200, data[: len(data) // 2], headers, len(data))
                self.close_connection = True
                return
            if state.faults.get("other bytes"):
                data = data[:-8] + b"ABCDEFGH"
        self.answer(200, data, headers)

    def do_POST(self):
        state = self.server.state
        path = urlsplit(self.path).path.strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        state.requests.append(("POST", self.path))
        if path == "api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
            return
        if not self.authorised:
            self.answer(401, {"error": "Invalid credentials"})
            return
        parts = path.split("/")
        if path == "api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            if not repository.startswith("ada/"):
                self.answer(403, {"error": "no right to write there"})
                return
            if asked.get("private") or asked.get("visibility") == "private":
                state.private.add(repository)
            known = repository in state.commits
            state.commits[repository] = state.commits[repository]
            url = f"http://{self.headers['Host']}/{repository}"
            self.answer(409 if known else 200, {"url": url, "name": repository, "id": repository})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            self.answer(200, {"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]})  # fmt: skip
        elif parts[4] == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            state.messages = [v["value"]["summary"] for v in lines if v["key"] == "header"]
            files = {v["value"]["path"]: base64.b64decode(v["value"]["content"])
                     for v in lines if v["key"] == "file"}  # fmt: skip
            repository = "/".join(parts[2:4])
            sha = state.commit(repository, files)
            url = f"http://{self.headers['Host']}/{repository}/commit/{sha}"
            self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})
        else:
            self.answer(404, {"error": "?"})


@pytest.fixture(scope="module")
def original(crystal_table, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "debye"
    finetune(crystal_table, TARGET, folder, model=tiny_model, split_column="split",
             strategy="features", features="ridge")  # fmt: skip
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Return the state of a Hub of our own that is asked instead of the real one."""
    playing = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    playing.state = Hub()
    threading.Thread(target=playing.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{playing.server_port}")
    monkeypatch.setenv("MATXFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.chdir(tmp_path)
    yield playing.state
    playing.shutdown()
    playing.server_close()


@pytest.fixture
def published(server, original):
    """Return a server that has a plugin, and its first commit."""
    sha = server.commit("ada/debye", {name: (original / name).read_bytes() for name in NAMES})
    server.commit("ada/debye", {META: b"{}", WEIGHTS: b"spoilt later"})
    server.tags["v1"] = sha
    return sha


def same(folder, original):
    return all((Path(folder) / n).read_bytes() == (original / n).read_bytes() for n in NAMES)


# -- there and back ---------------------------------------------------------------------------
def test_push_and_pull(server, original, tiny_model, monkeypatch, run):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, err = run("plugins", "push", original, "ada/debye", "--licence", "cc-by-4.0",
                         "-m", "the first", "--json")  # fmt: skip
    assert (code, err) == (0, "")
    sent = json.loads(out)
    ((sha, files),) = server.commits["ada/debye"]
    assert sent["revision"] == sha
    assert sent["address"] == f"hf://ada/debye@{sha}"
    assert set(files) == {*NAMES, "README.md"}
    assert server.messages == ["the first"]
    assert all(files[name] == (original / name).read_bytes() for name in NAMES)
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["license"] == "cc-by-4.0"
    assert not server.private

    code, out, _ = run("plugins", "pull", "ada/debye", "-o", "mine", "--json")
    found = json.loads(out)
    assert (code, found["revision"], found["folder"]) == (0, sha, "mine")
    assert same("mine", original)
    assert load_plugin("mine", tiny_model).name == "mine"
    with pytest.raises(OptionError, match="something already"):
        sharing.pull("ada/debye", "mine")


def test_push_of_a_packed_plugin_and_again(server, original, monkeypatch, run):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path = sharing.pack(original)
    first = sharing.push(path, "ada/debye", private=True)
    assert server.private == {"ada/debye"}
    second = sharing.push(path, "ada/debye")
    assert first["revision"] != second["revision"]
    assert len(server.commits["ada/debye"]) == 2
    code, out, err = run("plugins", "push", path, "ada/debye")
    assert (code, "sent; exactly this plugin is --plugin hf://ada/debye@" in out) == (0, True)
    assert "--licence" in err
    assert same(sharing.pull("ada/debye")["folder"], original)  # the token opens what is private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="private or gated"):
        sharing.pull("ada/debye", "other")


def test_an_address_is_taken_as_a_plugin(published, server, original, tiny_model, crystal_table):
    expected = predict(crystal_table, original, model=tiny_model)[TARGET]
    found = predict(crystal_table, "hf://ada/debye@v1", model=tiny_model)
    assert np.array_equal(found[TARGET], expected)
    plugin = load_plugin("hf://ada/debye@v1", tiny_model)
    assert (plugin.name, plugin.folder.parent.name) == ("debye", published)
    assert sharing.summary(f"hf://ada/debye@{published}").target == TARGET
    # A commit that has been fetched needs no network.
    server.requests.clear()
    load_plugin(f"hf://ada/debye@{published}", tiny_model)
    assert server.requests == []


def test_what_is_fetched_is_of_one_commit(published, server, original):
    """Even if somebody commits in between."""
    found = sharing.pull("ada/debye", "mine", revision="v1")
    assert found == {"folder": "mine", "revision": published,
                     "address": f"hf://ada/debye@{published}"}  # fmt: skip
    assert same("mine", original)
    files = [path for _, path in server.requests if "/resolve/" in path]
    assert files
    assert all(f"/resolve/{published}/" in path for path in files)
    asked = [parse_qs(urlsplit(path).query) for _, path in server.requests if "/api/" in path]
    assert len(asked) == 1
    with pytest.raises(HubError, match=r"plugin\.json: its format is None.*nothing of it was kept"):
        sharing.pull("ada/debye", "latest")


# -- what goes wrong --------------------------------------------------------------------------
def refused(server, words, address="ada/debye@v1"):
    with pytest.raises(HubError, match=f"(?s){words}") as caught:
        sharing.pull(address, "mine")
    assert str(caught.value).startswith("hf://ada/")
    assert not Path("mine").exists()
    kept = [p for p in Path("cache").rglob("*") if p.is_file()]
    assert kept == []
    return str(caught.value)


def test_wrong_checksum(published, server):
    server.faults["other bytes"] = True
    text = refused(server, "checksum differs.*nothing of it was kept")
    assert f"hf://ada/debye@{published}/{WEIGHTS}" in text
    server.faults.clear()
    sharing.pull("ada/debye@v1", "mine")  # so that the next try is a new one


def test_cut_connection(published, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.faults["cut"] = True
    refused(server, "connection broke.*offline|could not be reached")
    server.faults.clear()
    sharing.pull("ada/debye@v1", "mine")


def test_404(published, server):
    refused(server, "no such repository, revision or file", "ada/debye@v7")
    refused(server, "401.*no such repository, or it is private", "ada/nothing")
    server.commit("ada/other", {"model.bin": b"x"})
    refused(server, r"has no plugin\.json, so it is no plugin of matxfer", "ada/other")
    server.commits["ada/debye"][0][1].pop(WEIGHTS)
    refused(server, r"has no plugin\.safetensors")
    refused(server, "no such repository, revision or file", f"ada/debye@{published}")


@pytest.mark.parametrize("status", [401, 403, 500])
def test_refusals(status, published, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.faults["status"] = status
    refused(server, f"the Hub answers {status}")


def test_offline(published, server, original, tiny_model, monkeypatch, run):
    load_plugin("hf://ada/debye@v1", tiny_model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(HubError, match=r"could not be reached.*Are you offline\?") as caught:
        load_plugin("hf://ada/debye@v1", tiny_model)
    # What is on this machine is told, and works.
    address = f"hf://ada/debye@{published}"
    assert f"on this machine there is {address}" in str(caught.value)
    load_plugin(address, tiny_model)
    code, _, err = run("predict", "x.cif", "--plugin", "hf://ada/other")
    assert (code, err.count("\n"), "Are you offline?" in err) == (2, 1, True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, _, err = run("plugins", "push", original, "ada/debye")
    assert (code, "Are you offline?" in err) == (2, True)


def test_too_large(published, server, monkeypatch):
    monkeypatch.setattr("matxfer.hub.MAX_BYTES", 100)
    refused(server, r"plugin\.json is larger than any plugin")


def test_push_needs_a_token_and_the_right(server, original, monkeypatch, run):
    code, _, err = run("plugins", "push", original, "ada/debye")
    assert (code, "no token to write with; set HF_TOKEN" in err) == (2, True)
    assert server.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="401"):
        sharing.push(original, "ada/debye")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="403"):
        sharing.push(original, "somebody/debye")
    assert not server.commits


def test_what_is_damaged_is_not_sent(server, original, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    bad = Path(shutil.copytree(original, tmp_path / "bad"))
    (bad / WEIGHTS).write_bytes(b"x")
    with pytest.raises(FormatError, match="checksum differs"):
        sharing.push(bad, "ada/debye")
    assert server.requests == []


def test_without_the_library(original, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (lambda: sharing.pull("ada/debye"), lambda: sharing.push(original, "ada/debye")):
        with pytest.raises(HubError, match=r"pip install 'matxfer\[hub\]'"):
            act()


def test_a_token_is_never_told(server, original, monkeypatch, run):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_somebody")
    _, out, err = run("plugins", "push", original, "ada/debye")
    assert "hf_secret" not in out + err


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://x", "hf://a/b/c", "hf://../b", "hf://a/..@x", "hf://a/b@", "hf://a/b@../c",
     "hf://a b/c", "hf://a/b@x y", "hf://é/b"],
)  # fmt: skip
def test_addresses_that_are_none(address):
    with pytest.raises(HubError, match="write hf://user/name"):
        parse_address(address)


def test_addresses():
    assert parse_address("hf://ada/my-plugin.v2") == ("ada/my-plugin.v2", "main")
    assert parse_address("hf:/ada/x@refs/pr/3") == ("ada/x", "refs/pr/3")  # as pathlib writes it
    with pytest.raises(HubError, match="another revision"):
        sharing.pull("ada/x@v1", revision="v2")
