"""The byte-model example at a tiny size: it learns, resumes exactly, and reports what it says it reports."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "sparse_bytes.py"
TINY = "--context=64 --stride=8 --summary=2 --layers=2 --width=32 --heads=2 --batch=4 --sample-bytes=20"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sparse_bytes", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"Line %d of the text is here. " % (n % 97) for n in range(400)))
    return str(path)


def models(example: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict]:  # type: ignore[type-arg]
    capsys.readouterr()
    assert example.main([*TINY.split(), *(str(a) for a in arguments), "--json"]) == 0
    return {model["kind"]: model for model in json.loads(capsys.readouterr().out)["models"]}


def test_all_three_learn(example: ModuleType, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = models(example, capsys, text, "--steps", 60, "--output", tmp_path / "out")
    assert list(reports) == ["dense", "fixed", "strided"]
    for report in reports.values():
        assert report["bits_per_byte"] < 4 and report["train_bits_per_byte"] < 4  # they start at 8
        assert report["steps"] == 60 and report["seconds_per_step"] > 0 and report["peak_bytes"] > 0
        assert len(report["sample"].encode(errors="replace")) >= 20
    assert len({report["parameters"] for report in reports.values()}) == 1


@pytest.mark.parametrize("combine", ["merged", "interleaved", "heads"])
def test_resume_continues_exactly(
    example: ModuleType, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], combine: str
) -> None:
    same = [text, "--steps", 12, "--kinds", "fixed", "--combine", combine, "--save-every", 5]
    whole = models(example, capsys, *same, "--output", tmp_path / "whole")["fixed"]
    original, calls = example.Run.step, 0

    def interrupted(run: object, text: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        original(run, text)

    example.Run.step = interrupted
    try:
        assert example.main([*TINY.split(), *map(str, same), "--output", str(tmp_path / "halves"), "--json"]) == 130
    finally:
        example.Run.step = original
    halves = models(example, capsys, *same, "--output", tmp_path / "halves", "--resume")["fixed"]
    for name in ("bits_per_byte", "train_bits_per_byte", "sample", "steps"):
        assert halves[name] == whole[name]
    one, two = (mx.load(str(tmp_path / run / "fixed.safetensors")) for run in ("whole", "halves"))
    assert one.keys() == two.keys() and all(mx.array_equal(one[name], two[name]).item() for name in one)


def test_keys_and_values_kept_equal_reading_all_again(example: ModuleType, tmp_path: Path) -> None:
    settings = example.Settings(
        context=64, stride=8, summary=2, combine="merged", layers=2, width=32, heads=2, batch=1, steps=1,
        learning_rate=1e-3, seed=0,
    )  # fmt: skip
    for kind in ("dense", "fixed", "strided"):
        model = example.Run(kind, settings, tmp_path).model
        model.logits.weight = mx.random.normal(model.logits.weight.shape)
        tokens = mx.random.randint(0, 256, (1, 40))
        whole, _ = model(tokens)
        cache, pieces = None, []
        for start, stop in [(0, 21), (21, 22), (22, 23), (23, 40)]:
            logits, cache = model(tokens[:, start:stop], cache)
            pieces.append(logits)
        assert mx.allclose(mx.concatenate(pieces, axis=1), whole, atol=1e-4)


def test_initialization_scales_with_depth(example: ModuleType, tmp_path: Path) -> None:
    small, deep = (
        example.Run(
            "fixed",
            example.Settings(
                context=64, stride=8, summary=2, combine="merged", layers=layers, width=64, heads=2, batch=1, steps=1,
                learning_rate=1e-3, seed=0,
            ),
            tmp_path,
        ).model
        for layers in (1, 16)
    )  # fmt: skip
    for model, layers in ((small, 1), (deep, 16)):
        block = model.blocks[0]
        assert math.isclose(mx.std(block.attention_out.weight).item(), (64 * 2 * layers) ** -0.5, rel_tol=0.1)
        assert math.isclose(mx.std(block.mlp_out.weight).item(), (256 * 2 * layers) ** -0.5, rel_tol=0.1)
        assert math.isclose(mx.std(block.qkv.weight).item(), 64**-0.5, rel_tol=0.1)


def test_what_the_user_gets_wrong(
    example: ModuleType, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "out")]
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for arguments, said in [
        ([str(tmp_path / "none.txt")], "cannot be read"),
        ([str(short)], "bytes"),
        ([text, "--kinds", "dense,sparse"], "sparse"),
        ([text, "--heads", "3"], "multiple"),
        ([text, "--summary", "9"], "summary"),
        ([text, "--plot", "curves.doc"], ".png"),
        ([text, "--output", text], "--output"),
    ]:
        assert example.main([*TINY.split(), *output, *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
    base = [*TINY.split(), text, "--kinds", "fixed", *output]
    assert example.main([*base, "--steps", "2", "--json"]) == 0
    assert example.main([*base, "--steps", "3", "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err
    (tmp_path / "out" / "fixed.safetensors").write_bytes(b"cut")
    assert example.main([*base, "--steps", "2", "--resume"]) == 2
    assert "not a checkpoint" in capsys.readouterr().err


def test_plot(example: ModuleType, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    models(example, capsys, text, "--steps", 3, "--output", tmp_path / "out", "--plot", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
