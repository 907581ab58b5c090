"""The user's defaults, the default model, and what a fit would replace."""

import argparse
import json
from pathlib import Path

import pytest

from nectar_mlx import NectarError, fit, installed, models, output, settings
from nectar_mlx.core.progress import no_log
from nectar_mlx.installed import Installed
from tests import toys


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    monkeypatch.setenv("NECTAR_CONFIG", str(path))
    return path


def test_defaults_are_read(file):
    assert settings.read() == settings.Settings()
    file.write_text('model = "Qwen3-1.7B"\nlibrary = "~/texts"\nbudget = "2%"\n')
    assert settings.read() == settings.Settings(model="Qwen3-1.7B", library=Path.home() / "texts", budget="2%")
    file.write_text('model = "Qwen3-1.7B"\nadapter = "~/mine"')
    for given, chosen in [
        ({}, ("Qwen3-1.7B", "~/mine")),
        ({"adapter": "his"}, ("Qwen3-1.7B", "his")),
        ({"model": "other"}, ("other", None)),
    ]:
        args = argparse.Namespace(**{"model": None, "adapter": None} | given)
        installed.choose(args, log=no_log)
        assert (args.model, args.adapter) == chosen


@pytest.mark.parametrize("content, complaint", [
    (b'modle = "x"', "there is no setting 'modle'; the settings are model, adapter, library, budget"),
    (b"budget = 0.02", 'budget must be a text in quotes, as in budget = "2%"'),
    (b'adapter = "~/mine"', "adapter is of a model: set model, too"),
    (b"model = true", "model must be a text"),
    (b'model = " "', "model must be a text"),
    (b'[model]\nname = "x"', "model must be a text"),
    (b'library = ["a"]', "library must be a text"),
    (b'model = "x\\u0000"', "model must be a text"),
    (b"model = ", "is not TOML"),
    (b'model = "\xff"', "is not TOML"),
    (b"a = " + b"[" * 20_000, "is not TOML"),
    (b"#" * 200_000, "too large"),
])  # fmt: skip
def test_what_is_wrong_is_one_line_with_the_files_name(file, content, complaint):
    file.write_bytes(content)
    with pytest.raises(NectarError) as error:
        settings.read()
    assert complaint in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_no_file_of_settings(file):
    file.mkdir()
    with pytest.raises(NectarError, match="cannot be read: Is a directory"):
        settings.read()


def test_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.delenv("NECTAR_CONFIG", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.path() == tmp_path / ".config" / "nectar" / "config.toml"
    monkeypatch.setattr(settings.sys, "platform", "darwin")
    assert settings.path() == tmp_path / ".config" / "nectar" / "config.toml"
    mac = tmp_path / "Library" / "Application Support" / "nectar" / "config.toml"
    mac.parent.mkdir(parents=True)
    mac.touch()
    assert settings.path() == mac


def test_the_default_model_is_the_settings_then_the_largest_that_fits(file, monkeypatch):
    lines = []
    found = [Installed("huge", "hub's cache", 1 << 60), Installed("good", "hub's cache", 9), Installed("demo", "", 1)]
    monkeypatch.setattr(installed, "installed", lambda: found)
    assert installed.default_model(log=lines.append) == "good" and "good (hub's cache)" in lines[-1]
    file.write_text('model = "mine"')
    assert installed.default_model(log=lines.append) == "mine" and str(file) in lines[-1]
    file.unlink()
    found.clear()
    with pytest.raises(NectarError, match=models.DEMO):
        installed.default_model(log=lines.append)


def test_models_in_the_hubs_cache_are_found_if_they_can_be_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path / "none"))
    snapshots = {}
    settings = {"me/llama": {"model_type": "llama"}, "me/bert": {"model_type": "bert"}, "me/list": [], "me/deep": None}
    for name, config in settings.items():
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("1" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("1" * 40)
        (snapshot / "config.json").write_text(json.dumps(config) if config is not None else "[" * 100_000)
        (snapshot / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
        (snapshot / "model.safetensors").write_bytes(b"12345")
        snapshots[name] = snapshot
    monkeypatch.setattr(models.hub, "cached", lambda name: (name, snapshots[name]))
    scan = installed.huggingface_hub.scan_cache_dir
    monkeypatch.setattr(installed.huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path / "hub"))
    assert installed.installed() == [Installed("me/llama", "hub's cache", 5)]


def test_another_fit_is_not_replaced_without_a_question(tmp_path, monkeypatch):
    model, path = toys.toy("llama"), tmp_path / "book.nectar"
    same = {"model": "toy", "config": {"budget": 0.1, "seed": 0}}
    output.check(path, False, same)
    nectar = toys.picked(model, toys.random_tokens(40), 8)
    read = {"name": "book.txt", "unit": "", "places": [], "left_out": [], "reason": None}
    nectar.report["files"] = [{**read, "characters": 9}]
    nectar.save(path)
    output.check(path, False, same, nectar.report["files"])
    others = [(same | {"model": "other"}, nectar.report["files"]), (same, [{**read, "characters": 10}])]
    for other, files in others:
        with pytest.raises(NectarError, match=r"holds another fit \(40 tokens of tests, by toy\).*--force replaces it"):
            output.check(path, False, other, files)
        output.check(path, True, other, files)
    monkeypatch.setattr(output.terminal, "confirm", lambda question, otherwise: False)
    with pytest.raises(NectarError, match="is kept"):
        output.check(path, False, *others[0])
    monkeypatch.setattr(output.terminal, "confirm", lambda question, otherwise: True)
    output.check(path, False, *others[0])


def test_an_interrupted_fit_does_not_replace_a_file_without_a_question(tmp_path):
    """It may have been another one: whoever agreed to that did not agree to this."""
    path = tmp_path / "book.nectar"
    toys.picked(toys.toy("llama"), toys.random_tokens(40), 8).save(path)
    (tmp_path / "book.nectar.partial").mkdir()
    (tmp_path / "book.nectar.partial" / "fit.json").write_text("{}")
    with pytest.raises(NectarError, match="holds another fit"):
        output.check(path, False, {"model": "other"})


def test_a_damaged_fit_is_not_replaced_without_a_question_either(tmp_path):
    path = tmp_path / "book.nectar"
    path.write_bytes(b"12345678")
    with pytest.raises(NectarError, match="a damaged fit"):
        output.check(path, False, {"model": "toy"})


def test_a_model_that_there_is_not_is_said_before_anything_is_asked(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("A text.")
    toys.picked(toys.toy("llama"), toys.random_tokens(40), 8).save(tmp_path / "book.nectar")
    options = ["--context", tmp_path / "book.txt", "--output", tmp_path / "book.nectar"]
    assert fit.main([*map(str, options), "--model", str(tmp_path / "absent")]) == 2
    assert "absent" in (err := capsys.readouterr().err) and "holds another fit" not in err
