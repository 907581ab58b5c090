"""Names on the hub and in its cache, against a small hub on loopback that holds a random model."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = """
import json, sys, time
import nectar_mlx
from nectar_mlx import NectarError, models
start = time.perf_counter()
try:
    source = models.resolve(sys.argv[1])
    print(json.dumps({"kind": source.kind, "path": str(source.path), "description": source.description}))
    if "load" in sys.argv:
        model, tokenizer = models.load(sys.argv[1])
        print(tokenizer.decode(tokenizer.encode("the quick fox")), model.model.embed_tokens.weight.size)
except NectarError as error:
    print(error, file=sys.stderr)
    print(time.perf_counter() - start, file=sys.stderr)
    sys.exit(2)
"""


def git_hash(content: bytes) -> str:
    """By which the hub names a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that downloads use: model_info, the list of files, and the files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.gated: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.requests.append(path)
        for name, files in self.server.repositories.items():
            etags = {file: git_hash(content) for file, content in files.items()}
            if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
                return self.answer({"id": name, "sha": COMMIT, "siblings": siblings})
            if path == f"api/models/{name}/tree/{COMMIT}":
                entries = [
                    {"type": "file", "path": file, "size": len(content), "oid": etags[file]}
                    for file, content in files.items()
                ]
                return self.answer(entries)
            for file, content in files.items():
                if path in (f"{name}/resolve/{COMMIT}/{file}", f"{name}/resolve/main/{file}"):
                    if name in self.server.gated:
                        return self.answer({"error": "gated"}, status=403, headers={"X-Error-Code": "GatedRepo"})
                    return self.answer(content, headers={"ETag": f'"{etags[file]}"', "X-Repo-Commit": COMMIT})
        self.answer({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A random llama of two layers as an mlx-lm folder's files."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 300,
    }
    model = llama.Model(llama.ModelArgs(**config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox"] * 5, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resolve(
    name: str, *args: str, cache: Path, endpoint: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    variables = {
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(cache),
        "NECTAR_CACHE": str(cache.parent / "nectar"),  # of all tests: its BLAS is made ready once
        "HF_ENDPOINT": endpoint,
    }
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, name, *args],
        env={**os.environ, **variables, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.process
def test_a_short_name_is_downloaded_then_found_offline(hub: Hub, model_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.repositories["Qwen/Qwen3-1.7B"] = model_files | {
        "README.md": b"not fetched",
        "pytorch_model.bin": b"not fetched",
    }
    online = resolve("Qwen3-1.7B", "load", cache=tmp_path, endpoint=hub.url)
    assert online.returncode == 0, online.stderr
    found, text = online.stdout.splitlines()
    assert json.loads(found)["kind"] == "hub"
    assert json.loads(found)["description"] == f"Qwen3-1.7B: Qwen/Qwen3-1.7B from the hub ({hub.url})"
    assert text == "the quick fox 9600"
    assert not [path for path in hub.requests if path.endswith((".md", ".bin"))]

    asked = len(hub.requests)
    again = resolve("Qwen3-1.7B", cache=tmp_path, endpoint=hub.url)
    offline = resolve("Qwen3-1.7B", "load", cache=tmp_path, HF_HUB_OFFLINE="1")
    for done in (again, offline):
        assert json.loads(done.stdout.splitlines()[0])["kind"] == "cache"
    assert offline.stdout.splitlines()[1] == text
    assert len(hub.requests) == asked


def test_the_first_that_fits_memory_is_taken(
    hub: Hub, model_files: dict[str, bytes], tmp_path: Path, monkeypatch
) -> None:
    from nectar_mlx.models import hub as library

    names = ["mlx-community/Toy-bf16", "Qwen/Toy", "mlx-community/Toy-8bit", "mlx-community/Toy-4bit"]
    for name, size in zip(names, (4000, 3000, 2000, 1000), strict=True):
        hub.repositories[name] = {"config.json": b"{}", "model.safetensors": b"0" * size}
    hub.repositories["mlx-community/Toy"] = {"config.json": b"{}", "toy.gguf": b"nothing that mlx-lm reads"}
    monkeypatch.setattr(library.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(library.constants, "is_offline_mode", lambda: False)
    for memory, expected in ((8000, names[0]), (6000, names[1]), (4001, names[2]), (2, names[3])):
        monkeypatch.setattr(library, "memory", lambda memory=memory: memory)
        assert library.find("Toy") == expected
    assert library.find("Absent") is None


@pytest.mark.process
def test_a_full_name_is_taken_as_it_is(hub: Hub, model_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.repositories["someone/toy"] = model_files
    hub.repositories["mlx-community/toy"] = model_files
    done = resolve("someone/toy", cache=tmp_path, endpoint=hub.url)
    assert "someone/toy from the hub" in json.loads(done.stdout)["description"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen3-9000B", "has none of mlx-community/Qwen3-9000B-bf16"),
        ("a/b", "has none of a/b;"),
        ("a b", "has none of"),
    ],
)
def test_what_the_hub_lacks(name: str, said: str, hub: Hub, tmp_path: Path) -> None:
    done = resolve(name, cache=tmp_path, endpoint=hub.url)
    message, _ = assert_one_line(done)
    assert message.startswith(f"{name}: no such folder or .gguf file") and said in message and hub.url in message


@pytest.mark.process
def test_a_gated_model_says_what_to_do(hub: Hub, model_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.repositories["meta-llama/Llama-9"] = model_files
    hub.gated.add("meta-llama/Llama-9")
    message, _ = assert_one_line(resolve("Llama-9", cache=tmp_path, endpoint=hub.url))
    assert message.startswith("meta-llama/Llama-9 is gated") and "hf auth login" in message


@pytest.mark.process
def test_nothing_reachable_is_told_in_one_line_and_soon(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    message, seconds = assert_one_line(resolve("Qwen3-1.7B", cache=tmp_path, endpoint=endpoint))
    assert all(part in message for part in ("no such folder", str(tmp_path), endpoint, "gives no answer"))
    assert seconds < 5


@pytest.mark.process
def test_a_silent_hub_is_given_up_on(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        message, seconds = assert_one_line(resolve("Qwen3-1.7B", cache=tmp_path, endpoint=endpoint))
    assert "gives no answer (timed out)" in message
    assert seconds < 15


@pytest.mark.process
def test_offline_is_honoured(hub: Hub, model_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.repositories["Qwen/Qwen3-1.7B"] = model_files
    message, _ = assert_one_line(resolve("Qwen3-1.7B", cache=tmp_path, endpoint=hub.url, HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in message
    assert not hub.requests


@pytest.mark.process
def test_half_a_download_is_not_a_model(hub: Hub, model_files: dict[str, bytes], tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    folder = tmp_path / "hub" / "models--Qwen--Toy" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(COMMIT)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    empty = (2).to_bytes(8, "little") + b"{}"  # weights of no tensors, whole
    (folder / "model-1.safetensors").write_bytes(empty)
    assert_one_line(resolve("Toy", cache=tmp_path, HF_HUB_OFFLINE="1"))
    (folder / "model-2.safetensors").write_bytes(empty[:-1])
    assert_one_line(resolve("Toy", cache=tmp_path, HF_HUB_OFFLINE="1"))
    (folder / "model-2.safetensors").write_bytes(empty)
    assert json.loads(resolve("Toy", cache=tmp_path, HF_HUB_OFFLINE="1").stdout)["path"] == str(folder)


def assert_one_line(done: subprocess.CompletedProcess[str]) -> tuple[str, float]:
    assert done.returncode == 2, done.stdout + done.stderr
    message, seconds = done.stderr.splitlines()
    return message, float(seconds)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_what_was_cut_is_noticed_and_fetched_again(
    hub: Hub, model_files: dict[str, bytes], tmp_path: Path, file: str
) -> None:
    hub.repositories["someone/toy"] = model_files
    source = json.loads(resolve("someone/toy", cache=tmp_path, endpoint=hub.url).stdout)
    path = Path(source["path"], file)
    whole = path.read_bytes()
    path.resolve().write_bytes(whole[:-9])
    assert "not whole" in assert_one_line(resolve("someone/toy", cache=tmp_path, HF_HUB_OFFLINE="1"))[0]
    again = json.loads(resolve("someone/toy", cache=tmp_path, endpoint=hub.url).stdout)
    assert again["kind"] == "hub" and Path(again["path"], file).read_bytes() == whole


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_TOKEN": "hf_\u4f60\u597d"},
        {"HF_TOKEN": "hf_a\nb"},
        {
            "ALL_PROXY": "socks5://127.0.0.1:9",
            "HTTPS_PROXY": "socks5://127.0.0.1:9",
            "HTTP_PROXY": "socks5://127.0.0.1:9",
        },
        {"HF_ENDPOINT": "no address"},
        {"HF_ENDPOINT": "ftp://127.0.0.1"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    assert_one_line(resolve("someone/toy", cache=tmp_path, **{"HF_ENDPOINT": "http://127.0.0.1:9"} | environment))
