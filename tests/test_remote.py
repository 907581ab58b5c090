"""`ask` and `chat` by a server that runs: the same answers, no MLX in the client, and a way back where it is gone."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from nectar_mlx import ask, chat, cli, remote, serve
from nectar_mlx.core import local_server
from tests import toys

QUESTION = "who is the fox?"
CLIENT = """
import sys
from nectar_mlx import ask
code = ask.main(sys.argv[1:])
slow = "mlx.core", "numpy", "msgspec", "rich", "http.client", "dataclasses", "ctypes", "tempfile", "difflib"
print(code, [name for name in slow if name in sys.modules], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return toys.book(tmp_path_factory.mktemp("book"), max_position_embeddings=256)


@pytest.fixture(scope="module")
def server(book):
    """A server of the book, with its socket in a cache folder of its own."""
    with tempfile.TemporaryDirectory(prefix="n") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NECTAR_CACHE", folder)
        patch.setenv("NECTAR_API_KEY", "secret")
        running = serve.start(serve.make_parser().parse_args([str(book.path), "--port", "0"]))
        thread = threading.Thread(target=running.run)
        thread.start()
        yield running
        running.shutdown()
        thread.join()
        assert list(Path(folder, "servers").iterdir()) == []


def answer(capsys, *arguments):
    assert ask.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("options", [(), ("--max-tokens", "9"), ("--temp", "0.9", "--top-p", "0.8", "--seed", "3")])
def test_the_answer_is_the_one_made_here(server, book, capsys, options):
    there, here = (answer(capsys, book.path, QUESTION, *options, *place) for place in ((), ("--here",)))
    assert there.pop("server") and "server" not in here
    for name in ("answer", "finish_reason", "answer_tokens", "prompt_tokens", "model", "context_tokens", "chunk"):
        assert there[name] == here[name], name


def test_an_answer_without_sources_says_so_wherever_it_is_made(server, book, capsys):
    for place in ((), ("--here",)):
        assert ask.main([str(book.path), "xyzzy", "--sources", "--max-tokens", "3", *place]) == 0
        assert cli.NO_SOURCE in capsys.readouterr().err, place


@pytest.mark.process
def test_the_client_imports_nothing_slow(server, book):
    command = [sys.executable, "-c", CLIENT, str(book.path), QUESTION, "--max-tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr
    assert "answered by the server" in done.stderr and done.stdout.strip()


def test_a_question_that_passes_the_window_is_refused_as_here(server, book, capsys):
    lines = []
    for place in ((), ("--here",)):
        assert ask.main([str(book.path), QUESTION * 99, *place]) == cli.FAULT
        lines.append(capsys.readouterr().err.splitlines()[-1])
    assert all("window of 256" in line for line in lines), lines


def test_a_conversation_is_the_one_held_here(server, book, monkeypatch, capsys):
    told = []
    for place in ((), ("--here",)):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nand the dog?\n/history\n/reset\n/history\n"))
        assert chat.main([str(book.path), "--max-tokens", "7", *place]) == 0
        out, err = capsys.readouterr()
        told.append(out)
        assert ("by the server]" in err) == (not place)
    assert told[0] == told[1]


def test_a_server_has_only_what_it_read(server, book, tmp_path):
    assert local_server.find(book.path) is not None
    copy = tmp_path / "book.nectar"
    copy.write_bytes(book.path.read_bytes())
    assert local_server.find(copy) is None, "another file of that name"
    os.utime(book.path, ns=(1, 1))
    assert local_server.find(book.path) is None, "changed since"


def test_only_its_owner_may_ask(server):
    folder = Path(os.environ["NECTAR_CACHE"]) / "servers"
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {".sock": 0o600, ".json": 0o600} and folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_is_not_looked_into(book, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="n") as folder:
        monkeypatch.setenv("NECTAR_CACHE", folder)
        local = local_server.LocalSocket({"book": book.path})
        assert local_server.find(book.path) is not None
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert local_server.find(book.path) is None and local_server.LocalSocket({"book": book.path}).listeners == []
        local.close()


def test_what_a_killed_server_left_is_removed_and_the_model_is_loaded_here(book, monkeypatch, capsys):
    with tempfile.TemporaryDirectory(prefix="n") as folder:
        monkeypatch.setenv("NECTAR_CACHE", folder)
        local = local_server.LocalSocket({"book": book.path})
        (listener,) = local.listeners
        listener.close()
        assert "server" not in answer(capsys, book.path, QUESTION, "--max-tokens", "3")
        assert list(Path(folder, "servers").iterdir()) == []


@pytest.mark.parametrize("note", ["", "[]", '{"files": 3}', '{"files": {"a": null}}', "\xff"])
def test_a_broken_note_is_passed_over(book, monkeypatch, note):
    with tempfile.TemporaryDirectory(prefix="n") as folder:
        monkeypatch.setenv("NECTAR_CACHE", folder)
        Path(folder, "servers").mkdir()
        Path(folder, "servers", "1.json").write_text(note)
        assert local_server.find(book.path) is None


def _choice(**fields):
    return json.dumps({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"} | fields]})


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        '{"choices": 3}',
        '{"choices": [[]]}',
        '{"choices": [{}]}',
        _choice(delta=None),
        _choice(delta={"content": 3}),
        _choice(delta={"content": {}}),
        _choice(delta={"reasoning": ["a"]}),
        _choice(finish_reason=["stop"]),
        '{"usage": [3]}',
        '{"usage": {"completion_tokens": "many"}}',
        '{"usage": {"completion_tokens": Infinity}}',
        '{"sources": 3}',
        '{"sources": ["a"]}',
        '{"sources": [{"document": 3, "place": "", "score": 1, "text": ""}]}',
        '{"sources": [{"document": "", "place": "", "score": "a", "text": ""}]}',
        '{"error": "a"}',
        '{"error": {"message": "no\\n\\u001b[31m"}}',
        "[" * 100_000,
        "a" * (9 << 20),
    ],
    ids=lambda line: line[:50],
)
def test_a_false_server_is_one_line(book, monkeypatch, capsys, line):
    """A process of the same user that answers on the socket, but not as this server does."""
    with tempfile.TemporaryDirectory(prefix="n") as folder:
        monkeypatch.setenv("NECTAR_CACHE", folder)
        local = local_server.LocalSocket({"book": book.path})

        def serve_once():
            connection, _ = local.listeners[0].accept()
            with connection:
                connection.recv(1 << 16)
                with contextlib.suppress(OSError):
                    connection.sendall(f"HTTP/1.0 200 OK\r\n\r\ndata: {line}\n\n".encode())

        thread = threading.Thread(target=serve_once)
        thread.start()
        code = ask.main([str(book.path), QUESTION, "--sources"])
        thread.join()
        local.close()
    said = capsys.readouterr().err
    assert code == 2 and said.splitlines()[-1].startswith("nectar") and "\x1b" not in said, said


def test_a_file_whose_header_has_no_end_is_no_memory(tmp_path):
    (tmp_path / "x.nectar").write_bytes(b"\xff" * 100)
    assert remote._header(tmp_path / "x.nectar")["tokens"] == 0


def test_no_socket_where_the_path_is_too_long(book, tmp_path, monkeypatch):
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path / ("x" * 120)))
    assert local_server.LocalSocket({"book": book.path}).listeners == []
