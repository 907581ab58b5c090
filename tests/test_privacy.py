"""Nothing leaves the machine once the model is on its disk: every command, with every socket watched.

A hook in the process notes what is connected to, sent to or looked up besides loopback. Where the system has network
namespaces, the commands run in one without a network, too. `push` is left out: sending is its purpose. The others run
one after the other in one process, so that what they import is imported once; only the server has its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nectar_mlx import models
from nectar_mlx.__main__ import COMMANDS
from nectar_mlx.library import Library, ModelFitter
from tests import toys

WATCH = """
import json, sys
seen, running = open(sys.argv.pop(1), "a", buffering=1), "import"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host and (host.decode() if isinstance(host, bytes) else host) not in LOOPBACK:
        seen.write(json.dumps([running, event, str(host)]) + "\\n")
sys.addaudithook(watch)
"""
# Prints a line for each command: its name, its exit code, and all that it said.
RUN = (
    WATCH
    + """
import io, traceback
from contextlib import redirect_stderr, redirect_stdout
from nectar_mlx.__main__ import main
for arguments in json.loads(sys.argv[1]):
    running, said = arguments[0], io.StringIO()
    sys.stdin = io.StringIO("who?\\n/quit\\n")
    with redirect_stdout(said), redirect_stderr(said):
        try:
            code = main(arguments)
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps([running, code, said.getvalue()]), flush=True)
"""
)
# The server answers one question from a thread beside it.
SERVE = (
    WATCH
    + """
import os, socket, threading, time, urllib.request
from nectar_mlx.__main__ import main
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
body = json.dumps({"messages": [{"role": "user", "content": "who?"}], "max_tokens": 3}).encode()
def ask():
    url, kind = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    for _ in range(600):
        try:
            answer = json.load(urllib.request.urlopen(urllib.request.Request(url, body, kind)))
            os._exit(0 if answer["choices"] else 4)
        except OSError:
            time.sleep(0.2)
    os._exit(3)
threading.Thread(target=ask, daemon=True).start()
main(["serve", *sys.argv[1:], "--port", str(port)])
"""
)
QUICK = ["--budget", "30%", "--queries", "500", "--steps", "2"]
CASES = {
    "fit": ["--model", "model", "--context", "text.txt", "--output", "new.nectar", *QUICK],
    "ask": ["book.nectar", "who?", "--max-tokens", "3"],
    "chat": ["book.nectar", "--max-tokens", "3"],
    "serve": ["book.nectar"],
    "evaluate": ["book.nectar", "--no-answers", "--answer-tokens", "4", "--rows", "256"],
    "inspect": ["book.nectar"],
    "export": ["book.nectar", "out.safetensors", "--prompt-cache"],
    "bench": ["decode", "--shape", "toy", "--contexts", "64", "--rounds", "1"],
    "demo": ["--context-tokens", "200", "--queries", "500", "--steps", "2", "--max-tokens", "3"],
    "add": ["text.txt", "--model", "model", "--library", "new", "--kind", "exact"],
    "list": ["--library", "library"],
    "update": ["--library", "library", "--model", "model"],
    "remove": ["other.txt", "--library", "library", "--missing"],
    "doctor": [],
    "completion": ["zsh"],
    "plan": ["--model", "model", "--tokens", "10k"],
}
SENDING = {"push"}
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a file fitted on it, a text, and a small model in the place of the demo's."""
    folder, model, tokenizer = tmp_path_factory.mktemp("private"), toys.toy("llama"), toys.tokenizer()
    toys.save_model(model, folder / "model", tokenizer)
    toys.exact(model, toys.random_tokens(60), tokenizer, name=str(folder / "model")).save(folder / "book.nectar")
    (folder / "text.txt").write_text("The ship sailed at dawn with barley and rope. " * 12)
    library = Library(folder / "library")
    (folder / "other.txt").write_text("The ferry waits for nobody. " * 12)
    library.add([folder / "text.txt", folder / "other.txt"], ModelFitter(str(folder / "model"), {"kind": "exact"}))
    shutil.copytree(folder / "model", folder / "cache" / models.demo_folder().name)
    return folder


def run(place, program, *arguments, alone=False):
    """The process, and what it asked of the network. alone: in a network namespace of its own."""
    seen = place / "seen"
    seen.write_text("")
    sealed = ["unshare", "--map-root-user", "--net"] if alone else []
    root = str(Path(__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "NECTAR_CACHE": str(place / "cache"),
        "HF_HOME": str(place / "hub"),
        "PYTHONPATH": root,
    }
    command = [*sealed, sys.executable, "-c", program, str(seen), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, timeout=600)
    return done, [json.loads(line) for line in seen.read_text().splitlines()]


@pytest.fixture(scope="module")
def commands(place):
    """Every command but the server has run -> exit code, what it said and what it asked of the network, by name."""
    arguments = [[name, *CASES[name]] for name in sorted(COMMANDS.keys() - SENDING - {"serve"})]
    done, seen = run(place, RUN, json.dumps(arguments), alone=can_be_alone())
    assert done.returncode == 0, done.stderr[-2000:]
    assert [event for event in seen if event[0] == "import"] == []
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (code, said, [event for event in seen if event[0] == name]) for name, code, said in told}


def test_every_command_has_a_case():
    assert COMMANDS.keys() - SENDING <= CASES.keys()


def test_the_hook_sees_what_is_sent(place):
    done, seen = run(place, WATCH + "import socket; socket.getaddrinfo('example.invalid', 80)")
    assert done.returncode != 0 and seen == [["import", "socket.getaddrinfo", "example.invalid"]]


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - SENDING - {"serve"}))
def test_a_command_asks_nothing_of_the_network(commands, name):
    code, said, seen = commands[name]
    assert code == 0, said[-2000:]
    assert seen == []


def test_the_server_asks_nothing_of_the_network(place):
    done, seen = run(place, SERVE, *CASES["serve"])  # without its network a namespace has no loopback either
    assert done.returncode == 0, done.stderr[-2000:]
    assert seen == []


def test_telemetry_is_off(place):
    code = "import nectar_mlx.models; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    done, _ = run(place, WATCH + code)
    assert done.stdout == "True\n"


def can_be_alone():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True).returncode == 0
