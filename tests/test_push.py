"""Sharing: a .nectar goes up to a small hub on loopback with its card, and every command takes its id."""

import base64
import hashlib
import json
import threading
import types
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from nectar_mlx import __main__, push
from nectar_mlx import push as push_module
from tests import toys
from tests.models.test_hub import Handler, Hub
from tests.store.test_kv_file import Book as Kept


class Upload(Handler):
    """The part of the hub's HTTP interface that uploads use. A repository is private or public as it was made."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/").removeprefix("api/models/")
        if name in self.server.repositories and "/api/models/" in self.path:
            private = self.server.repositories[name].get(".private") == b"1"
            return self.answer({"id": name, "sha": "0" * 40, "private": private, "siblings": []})
        super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0]).strip("/")
        self.server.requests.append(path)
        if self.headers.get("Authorization") != "Bearer hf_token":
            return self.answer_post({"error": "no token"}, 401)
        if path == "api/repos/create":
            name = "/".join(filter(None, [json.loads(body).get("organization"), json.loads(body)["name"]]))
            made = {".private": b"1"} if json.loads(body)["visibility"] == "private" else {}
            self.server.repositories.setdefault(name, made)
            return self.answer_post({"url": f"{self.server.url}/{name}"})
        if path == "api/validate-yaml":
            return self.answer_post({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {**f, "uploadMode": "lfs" if f["path"].endswith(".nectar") else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer_post({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer_post({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            return self.commit(path.removeprefix("api/models/").removesuffix("/commit/main"), body)
        self.answer_post({"error": path}, 404)

    def do_PUT(self) -> None:
        oid = self.path.rsplit("/", 1)[1]
        self.server.repositories.setdefault("lfs", {})[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer_post({})

    def commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.repositories[name][value["path"]] = self.server.repositories["lfs"][value["oid"]]
        self.answer_post({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.url}/{name}/commit/1"})

    def answer_post(self, body: object, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub():
    server = Hub()
    server.RequestHandlerClass = Upload
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return toys.book(tmp_path_factory.mktemp("book"))


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def nectar(monkeypatch, capsys):
    """`nectar ARGUMENTS` in this process, against a hub and with a cache of its own."""

    def nectar(hub: Hub, cache: Path, *arguments: str, token: str = "hf_token", offline: bool = False) -> Done:
        monkeypatch.setenv("HF_TOKEN", token)
        settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": offline, "HF_HUB_CACHE": str(cache)}
        settings |= {"HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}
        for name, value in {**settings, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "is_offline_mode", lambda: offline)
        capsys.readouterr()
        code = __main__.main(arguments)
        return Done(code, *capsys.readouterr())

    disable_progress_bars()
    yield nectar
    enable_progress_bars()


def test_up_and_down_again(hub, nectar, book, tmp_path):
    pushed = nectar(hub, tmp_path, "push", str(book.path), "someone/book")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout == f"{hub.url}/someone/book\n"
    files = hub.repositories["someone/book"]
    assert files[".private"] == b"1" and files["book.nectar"] == book.path.read_bytes()
    card = files["README.md"].decode()
    assert hashlib.sha256(book.path.read_bytes()).hexdigest() in card
    assert "book.nectar.kv" not in files and "exact keys" not in card
    assert "library_name: nectar_mlx" in card and f"{toys.CONTEXT} tokens" in card and "nectar ask someone/book" in card

    here = nectar(hub, tmp_path, "ask", str(book.path), "who is the fox?", "--max-tokens", "6")
    there = nectar(hub, tmp_path, "ask", "someone/book", "who is the fox?", "--max-tokens", "6")
    assert (there.returncode, there.stdout) == (0, here.stdout), there.stderr
    facts = nectar(hub, tmp_path, "inspect", "someone/book", "--json")
    assert json.loads(facts.stdout)["context_tokens"] == toys.CONTEXT
    asked = len(hub.requests)
    offline = nectar(hub, tmp_path, "inspect", "someone/book", "--json", offline=True)
    assert offline.stdout == facts.stdout and len(hub.requests) == asked


def test_keys_go_along(hub, nectar, tmp_path):
    book = Kept(tmp_path / "kept")
    assert nectar(hub, tmp_path, "push", str(book.path), "someone/kept").returncode == 0
    keys = toys.key_file(book.path)
    assert hub.repositories["someone/kept"][keys.name] == keys.read_bytes()
    assert "exact keys" in hub.repositories["someone/kept"]["README.md"].decode()
    found = nectar(hub, tmp_path, "ask", "someone/kept", "who?", "--exact", "0.5", "--sources", "--max-tokens", "3")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("push", "{missing}", "someone/book"), "no such file"),
        (("push", "{text}", "someone/book"), "not a .nectar"),
        (("push", "{book}", "not a name"), "not a repository's name"),
        (("inspect", "someone/absent"), "no such repository"),
        (("inspect", "someone/two"), "holds a.nectar, b.nectar; it must hold exactly one"),
        (("inspect", "someone/none"), "holds no .nectar"),
    ],
)
def test_what_cannot_be_shared(hub, nectar, book, tmp_path, arguments, complaint):
    hub.repositories |= {"someone/two": {"a.nectar": b"1", "b.nectar": b"2"}, "someone/none": {"README.md": b""}}
    (tmp_path / "text.nectar").write_text("text")
    named = {"missing": tmp_path / "missing.nectar", "text": tmp_path / "text.nectar", "book": book.path}
    done = nectar(hub, tmp_path, *(a.format(**named) for a in arguments))
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_lists_and_sends_nothing(hub, nectar, book, tmp_path):
    done = nectar(hub, tmp_path, "push", str(book.path), "someone/book", "--dry-run")
    assert done.returncode == 0 and not hub.requests and "nothing is uploaded" in done.stderr
    nectar_line, card_line = done.stdout.splitlines()
    digest = hashlib.sha256(book.path.read_bytes()).hexdigest()
    assert nectar_line.split() == [digest, f"{book.path.stat().st_size:,}", "book.nectar"]
    assert card_line.endswith("README.md")


def test_a_text_is_made_public_only_if_the_person_means_it(hub, nectar, book, tmp_path, monkeypatch):
    push = ("push", str(book.path), "someone/open", "--public")
    done = nectar(hub, tmp_path, *push)
    assert done.returncode == 2 and "--yes publishes it" in done.stderr and "someone/open" not in hub.repositories
    answers = iter(["n\n", "perhaps\n", "y\n"])
    monkeypatch.setattr(push_module.terminal, "at_terminal", lambda: True)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(readline=lambda: next(answers)))
    done = nectar(hub, tmp_path, *push)
    assert done.returncode == 2 and f"{toys.CONTEXT} tokens of tests" in done.stderr
    assert "someone/open" not in hub.repositories
    assert nectar(hub, tmp_path, *push).returncode == 0
    assert ".private" not in hub.repositories["someone/open"]
    done = nectar(hub, tmp_path, "push", str(book.path), "someone/open")
    assert done.returncode == 2 and "someone/open is public" in done.stderr
    assert nectar(hub, tmp_path, *push, "--yes").returncode == 0


def test_no_token(hub, nectar, book, tmp_path):
    done = nectar(hub, tmp_path, "push", str(book.path), "someone/book", token="hf_wrong")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr.splitlines()[-1]


def test_a_hub_that_is_away(nectar, tmp_path):
    server = Hub()
    server.server_close()
    done = nectar(server, tmp_path, "inspect", "someone/book")
    assert done.returncode == 2
    assert "gives no answer" in done.stderr.splitlines()[-1], done.stderr


def test_card_says_how_faithful_it_is():
    facts = {
        "file": "a/book.nectar",
        "model": "Qwen/Qwen3-1.7B",
        "model_sha256": "ab" * 32,
        "adapter": "my/adapter",
        "adapter_sha256": "cd" * 32,
        "context_tokens": 6000,
        "source": "time_machine.txt",
        "kind": "quadrature",
        "bits": 8,
        "parameter_bytes": 1 << 20,
        "keys_file_bytes": 0,
        "share_of_kv_cache": 0.02,
        "report": {"kl": 0.0123, "agree": 0.97, "error": [1, 2]},
    }
    sums = {"book.nectar": "12ab" * 16}
    card = push.card(facts, "someone/book", sums)
    for said in (
        "| sha256 of book.nectar | `12ab12ab",
        "base_model: Qwen/Qwen3-1.7B",
        "| adapter | `my/adapter` (fingerprint `cdcdcdcdcdcdcdcd`)",
        "6,000 tokens of time_machine.txt",
        "2.00%",
        "0.0123",
        "0.97",
    ):
        assert said in card
    assert "not measured" in push.card({**facts, "report": {}}, "someone/book", sums)
    updated = push.card(facts | {"report": facts["report"] | {"new": {"gap_closed": 0.31}}}, "someone/book", sums)
    assert set(card.splitlines()) < set(updated.splitlines())
    assert "closes, about what its last update changed | 0.31 |" in updated
