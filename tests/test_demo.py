import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nectar_mlx import demo
from tests import toys

SMALL = ["--context-tokens", "150", "--budget", "50%", "--queries", "300", "--steps", "5", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    toys.save_model(toys.toy("llama"), folder, toys.tokenizer())
    return folder


def test_the_demo_answers_every_question_both_ways(model_folder, capsys):
    assert demo.main(["--model", str(model_folder), *SMALL, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [a["question"] for a in told["answers"]] == list(demo.QUESTIONS)
    assert 0 < told["file_bytes"] < told["cache_bytes"]
    for answer in told["answers"]:
        assert answer["full_seconds"] > 0 and 0 <= answer["agreement"] <= 1


def test_the_demo_shows_both_side_by_side_and_keeps_the_file(model_folder, capsys, tmp_path):
    kept = tmp_path / "manual.nectar"
    assert demo.main(["--model", str(model_folder), *SMALL, "--output", str(kept)]) == 0
    shown = capsys.readouterr().out
    assert kept.is_file()
    for words in ("full KV cache", "the file", "agreement", "MB", "What does the with statement do?"):
        assert words in shown


def test_the_manual_has_a_few_thousand_words_of_every_topic():
    text = demo.manual()
    assert len(text.split()) > 5_000 and "context manager" in text[:20_000]


def test_the_example_runs_as_it_is(model_folder, tmp_path, monkeypatch, capsys):
    book = tmp_path / "book.txt"
    book.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    example = Path(__file__).parents[1] / "examples" / "read_a_book.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(book), str(model_folder)])
    from nectar_mlx.fitting.config import FitConfig

    defaults = FitConfig.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "queries", 300)
    monkeypatch.setitem(defaults, "steps", 5)
    runpy.run_path(str(example), run_name="__main__")
    assert book.with_suffix(".nectar").is_file()
    assert "x smaller" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["batch_speed", "hybrid", "read_a_book", "sparse_bytes"])
def test_examples_say_what_they_take(name, monkeypatch, capsys):
    example = Path(__file__).parents[1] / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(example), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(example), run_name="__main__")
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.process
def test_the_hybrid_example_runs_in_a_clone_that_is_not_installed_in_place(tmp_path):
    root = Path(__file__).parents[1]
    (tmp_path / "nectar_mlx").symlink_to(root / "nectar_mlx")
    code = (
        f"import runpy, sys; sys.path = [path for path in sys.path if path not in ('', {str(root)!r})]\n"
        f"sys.path.append({str(tmp_path)!r}); sys.argv[1:] = ['--tokens', '60']\n"
        f"runpy.run_path({str(root / 'examples' / 'hybrid.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "the .nectar" in done.stdout, done.stderr
