"""`nectar inspect` tells what a file holds without its model."""

import json
import re

import pytest

from nectar_mlx import Nectar, cli, inspect, store
from tests import toys


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "toy.nectar"
    model = toys.toy("gemma3_text")
    toys.picked(model, toys.random_tokens(50), 10).save(path)
    return path


def test_json(path, capsys):
    assert inspect.main([str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["context_tokens"], facts["chunks"]) == (50, 1)
    assert (facts["kind"], facts["bits"], facts["layers"], facts["window_layers"]) == ("quadrature", 8, 3, 2)
    assert facts["file_bytes"] == path.stat().st_size
    window = 2 * 2 * 2 * 24 * 16 * 4  # two layers' keys and values of 2 heads, 24 tokens of 16 float32
    assert window < facts["parameter_bytes"] < facts["file_bytes"]
    assert facts["kv_cache_bytes"] == 2 * 2 * 2 * 16 * (24 + 24 + 50)
    assert facts["share_of_kv_cache"] == pytest.approx(facts["parameter_bytes"] / facts["kv_cache_bytes"], abs=1e-5)
    assert facts["report"]["kl"] == 0.5


def test_text(path, capsys):
    assert inspect.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "toy" in out and "quadrature" in out and " MB (" in out and "0.5" in out
    assert re.search(r"^share of kv cache +\d[\d.]{0,3}%$", out, re.MULTILINE), out


def test_a_damaged_file(path, tmp_path, capsys):
    (tmp_path / "cut.nectar").write_bytes(path.read_bytes()[:200])
    assert inspect.main([str(tmp_path / "cut.nectar")]) == cli.FAULT
    assert "cut short" in capsys.readouterr().err


def test_the_library_is_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert inspect.main([cli.LIBRARY]) == cli.FAULT
    assert "`nectar list` shows what is in it" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [
    ("report", None),
    ("report", [float("nan")]),
    ("chunks", [float("inf")]),
    ("geometry", {"n_kv_heads": [2]}),
    ("geometry", {"scale": "0.25"}),
    ("layout", {"scale": None}),
])  # fmt: skip
def test_a_file_whose_settings_are_of_another_type_is_damaged(path, tmp_path, monkeypatch, capsys, name, value):
    tensors, metadata = store.read(path)
    changed = metadata[name] | value if name in ("geometry", "layout") else value
    with monkeypatch.context() as patch:  # `store.write` refuses what is not finite
        patch.setattr(json, "dumps", lambda value, dumps=json.dumps, **_: dumps(value))
        store.write(tmp_path / "other.nectar", tensors, metadata | {name: changed})
    assert inspect.main([str(tmp_path / "other.nectar")]) == cli.FAULT
    assert "damaged" in capsys.readouterr().err


def test_a_report_without_numbers_is_no_verdict(path, tmp_path, capsys):
    tensors, metadata = store.read(path)
    store.write(tmp_path / "other.nectar", tensors, metadata | {"report": {"kl": None}})
    assert inspect.main([str(tmp_path / "other.nectar")]) == cli.DONE
    assert Nectar.read(tmp_path / "other.nectar").faithful
    store.write(tmp_path / "other.nectar", tensors, metadata | {"report": {"gap_closed": "much"}})
    assert inspect.main([str(tmp_path / "other.nectar")]) == cli.FAULT
    assert "report.gap_closed" in capsys.readouterr().err


def test_a_folder(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == cli.FAULT
    assert f"{tmp_path} is a folder, not a .nectar: `nectar fit --context" in capsys.readouterr().err
