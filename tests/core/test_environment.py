"""Variables that huggingface_hub cannot read are one line, whatever the command."""

import os
import subprocess
import sys

import pytest

from nectar_mlx import NectarError
from nectar_mlx.core import environment

WRONG = [
    ("HF_ENDPOINT", "http://[::1"),
    ("HF_ENDPOINT", "http://127.0.0.1:99999999"),
    ("HF_ENDPOINT", "http://127.0.0.1:x"),
    ("HF_HUB_ETAG_TIMEOUT", "soon"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_variable_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(NectarError, match=f"^{name} is .*: change or unset it$"):
        environment.check()


@pytest.mark.parametrize("endpoint", ["", "https://huggingface.co", "http://[::1]:8080/", "no address"])
def test_what_huggingface_hub_can_read_is_left_to_it(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "10")
    environment.check()
    assert os.environ.get("HF_ENDPOINT") == (endpoint or None)


@pytest.mark.process
@pytest.mark.parametrize("command", ["ask", "serve"])  # one imports huggingface_hub late, one at once
def test_commands_refuse_with_one_line(monkeypatch, command):
    monkeypatch.setenv("HF_ENDPOINT", "http://[::1")
    call = [sys.executable, "-m", "nectar_mlx", command, "someone/thing", "who?"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
