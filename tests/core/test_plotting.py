"""Pictures: what stands in their way is told before the work, or in one line after it."""

import importlib.util

import pytest

from nectar_mlx import NectarError, bench, evaluate
from nectar_mlx.benchmarks import measure_decode
from nectar_mlx.core import plotting


def test_what_is_missing_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure_decode, "measured", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(evaluate.cli, "load", lambda *_: pytest.fail("loaded"))
    nowhere = str(tmp_path / "nowhere" / "a.png")
    commands = (bench.main, ["decode", "--shape", "toy", "--plot"]), (evaluate.main, ["x.nectar", "--plot"])
    for main, arguments in commands:
        if importlib.util.find_spec("matplotlib"):
            assert main([*arguments, nowhere]) == 2 and "no such folder" in capsys.readouterr().err
        with monkeypatch.context() as without:
            without.setattr(importlib.util, "find_spec", lambda name: None)
            assert main([*arguments, str(tmp_path / "a.png")]) == 2
            assert "pip install '.[plot]' in the clone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.unknown", "folder.png"])
def test_a_picture_that_cannot_be_written(tmp_path, name):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    figure, _ = plotting.subplots()
    with pytest.raises(NectarError, match="cannot write"):
        plotting.save(figure, tmp_path / name)
