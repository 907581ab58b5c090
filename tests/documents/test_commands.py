"""What the commands say about the files they read."""

import json
from pathlib import Path

import pytest

from nectar_mlx import ask, fit, inspect
from nectar_mlx.errors import NectarError
from tests import toys
from tests.documents.makers import column, pdf_pages, shown, write

PICTURE = b"q 500 0 0 700 40 60 cm /I Do Q"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    write(folder / "a.txt", "The key is under the mat. " * 8)
    write(folder / "b.pdf", pdf_pages([shown(column(["The lease."])), PICTURE]))
    write(folder / "old.doc", b"\xd0\xcf\x11\xe0" + bytes(600))
    return folder


def test_a_dry_run_says_what_would_be_read(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(["--model", "none", "--context", str(notes), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "b.pdf: 2 pages, 10 characters; left out: page 2: only a picture" in err
    assert "old.doc: an old Word file; save it as .docx" in err and err.count("old.doc") == 1
    assert "read 2 of 3 files; about " in err
    assert [file["name"] for file in json.loads(out)["files"]] == ["a.txt", "b.pdf", "old.doc"]


def test_a_dry_run_estimates_tokens_time_and_size(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toys.save_model(toys.toy("llama"), tmp_path / "model", toys.tokenizer())
    arguments = ["--context", str(notes), "--dry-run", "--json", "--model"]
    assert fit.main([*arguments, str(tmp_path / "model"), "--budget", "0.1"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["tokens"] > 0 and facts["seconds"] > 0 and facts["file_bytes"] > 0
    assert f"; {facts['tokens']:,} tokens" in err and "estimated: " in err
    assert fit.main([*arguments, "no such model"]) == 0
    out, err = capsys.readouterr()
    assert "about " in err and "time and size are not estimated: " in err and "seconds" not in json.loads(out)


@pytest.mark.parametrize(
    "wrong, said",
    [(["--budget", "2"], "a budget of 2 is not in (0, 1]"), (["--effort", "fast"], "unknown effort 'fast'")],
)
def test_wrong_settings_are_told_before_documents_are_read(
    notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: list[str], said: str
) -> None:
    monkeypatch.setattr("nectar_mlx.documents.read", lambda *paths, **options: pytest.fail("documents were read"))
    for dry in ([], ["--dry-run"]):
        assert fit.main(["--context", str(notes), *wrong, *dry]) == 2
        assert said in capsys.readouterr().err


def test_a_dry_run_needs_no_model(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--context", str(notes), "--dry-run"]

    def none(*, log: object) -> str:
        raise NectarError("no --model given, and this machine has none")

    monkeypatch.setattr("nectar_mlx.installed.default_model", none)
    assert fit.main(arguments) == 0
    err = capsys.readouterr().err
    assert "read 2 of 3 files; about " in err
    assert "time and size are not estimated: no --model given, and this machine has none" in err
    model = toys.save_model(toys.toy("llama"), tmp_path / "model", toys.tokenizer())
    monkeypatch.setattr("nectar_mlx.installed.default_model", lambda *, log: str(model))
    assert fit.main(arguments) == 0
    assert "estimated: " in capsys.readouterr().err


def test_strict_and_patterns(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "none", "--dry-run", "--strict", "--context", str(notes)]
    assert fit.main(arguments) == 2
    assert "not everything can be read: old.doc" in capsys.readouterr().err
    assert fit.main([*arguments, "--include", "*.txt", "*.doc", "--exclude", "old*"]) == 0
    assert "read 1 of 1 file" in capsys.readouterr().err


def test_the_file_keeps_the_list(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = toys.tokenizer()
    toys.save_model(toys.toy("llama"), tmp_path / "model", tokenizer)
    output = tmp_path / "notes.nectar"
    small = ["--queries", "400", "--steps", "10", "--context-tokens", "200", "--budget", "0.5"]
    arguments = ["--model", str(tmp_path / "model"), "--context", str(notes), "--output", str(output)]
    assert fit.main([*arguments, *small]) == 0
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("read 2 of 3 files: old.doc")
    assert inspect.main([str(output)]) == 0
    shown_files = capsys.readouterr().out
    assert "b.pdf: 2 pages, 10 characters; left out: page 2" in shown_files and "edits" not in shown_files
    assert "old.doc: not read: an old Word file; save it as .docx" in shown_files
    assert ask.main([str(output), "What is under the mat?", "--json", "--max-tokens", "3"]) == 0
    source = json.loads(capsys.readouterr().out)["sources"][0]
    assert (source["document"], source["place"]) == ("a.txt", "line 1") and "under the mat" in source["text"]


def test_a_file_is_named_after_the_context() -> None:
    names = ["book.txt", "a/notes", "a/notes/.", "/"]
    assert [str(fit._default_output([name])) for name in names] == [
        "book.nectar", "notes.nectar", "notes.nectar", "context.nectar",
    ]  # fmt: skip
