"""Nothing leaves the machine once the model is on its disk: every command, with every socket watched.

A hook in the process notes what is connected to, sent to or looked up besides loopback. Where the system has network
namespaces, the command runs in one without a network, too. `push` is left out: sending is its purpose.
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
seen = open(sys.argv.pop(1), "a", buffering=1)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host and (host.decode() if isinstance(host, bytes) else host) not in LOOPBACK:
        seen.write(json.dumps([event, str(host)]) + "\\n")
sys.addaudithook(watch)
"""
RUN = WATCH + "from nectar_mlx.__main__ import main; sys.exit(main(sys.argv[1:]))"
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
    "evaluate": ["book.nectar", "--no-answers", "--answer-tokens", "4"],
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


def run(place, program, arguments, *, alone=False):
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
    done = subprocess.run(
        command, capture_output=True, text=True, input="who?\n/quit\n", cwd=place, env=environment, timeout=600
    )
    return done, [json.loads(line) for line in seen.read_text().splitlines()]


def test_every_command_has_a_case():
    assert COMMANDS.keys() - SENDING <= CASES.keys()


def test_the_hook_sees_what_is_sent(place):
    done, seen = run(place, WATCH + "import socket; socket.getaddrinfo('example.invalid', 80)", [])
    assert done.returncode != 0 and seen == [["socket.getaddrinfo", "example.invalid"]]


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - SENDING))
def test_a_command_asks_nothing_of_the_network(place, name):
    alone = name != "serve" and can_be_alone()  # without its network a namespace has no loopback either
    program, arguments = (SERVE, CASES[name]) if name == "serve" else (RUN, [name, *CASES[name]])
    done, seen = run(place, program, arguments, alone=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert seen == []


def test_telemetry_is_off(place):
    code = "import nectar_mlx.models; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    done, _ = run(place, WATCH + code, [])
    assert done.stdout == "True\n"


def can_be_alone():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True).returncode == 0
