"""A document of a library that is changed: its file is brought up to date, and where that would be worse it is fitted
anew; with a real fit of a toy model."""

import pytest

from nectar_mlx import Nectar, store
from nectar_mlx.fitting import updating
from nectar_mlx.fitting.samples import self_study
from nectar_mlx.library import Library, ModelFitter, volumes
from nectar_mlx.retrieval import find_keys
from tests import toys
from tests.fitting.toy_fit import FAST, FEW_TOGETHER, TEXT, shallow

MORE = TEXT + " A new hare came by, and it sang about the river."
EDITED = MORE.replace("fox number 7", "cat number 9")


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Writes a document of a library on a toy model, and looks at it again: its file's report, and what was said."""
    said: list[str] = []
    monkeypatch.setattr(self_study, "FEWEST_TOGETHER", FEW_TOGETHER)
    monkeypatch.setattr(volumes, "SHORT", 100)  # characters, so that it has a file of its own
    toys.save_model(shallow(), tmp_path / "model", toys.tokenizer())
    fitter = ModelFitter(str(tmp_path / "model"), FAST | {"budget": 0.3}, log=said.append)
    library, note = Library(tmp_path / "library"), tmp_path / "note.md"

    def added(text):
        said.clear()
        note.write_text(text)
        library.add([note], fitter)
        (document,) = library.documents()
        return store.read(document.file)[1]["report"], said

    added(TEXT)
    return added


def test_what_is_added_to_it_and_what_is_changed_in_it_is_fitted_alone(added):
    report, said = added(MORE)
    assert report["updated"]["way"] == "append" and "tokens were added" in said[0]
    report, said = added(EDITED)
    assert report["updated"]["way"] == "edit" and "of the text has changed" in said[0]


def test_a_file_that_is_still_right_keeps_the_keys_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "SHORT", 100)
    toys.save_model(toys.toy("llama"), tmp_path / "model", toys.tokenizer())
    fitter = ModelFitter(str(tmp_path / "model"), FAST | {"kind": "retrieval", "context_tokens": 200})
    library, note = Library(tmp_path / "library"), tmp_path / "note.md"
    for text in (TEXT, MORE):  # alike as far as they are read
        note.write_text(text)
        assert library.add([note], fitter).work.fitted == ["note.md"]
        (document,) = library.documents()
        assert find_keys(document.file, Nectar.read(document.file).digest).exists()


def test_another_text_is_fitted_anew(added):
    report, said = added(" ".join(TEXT.split()[::-1]))
    assert "updated" not in report
    assert said[-1].startswith("fitting anew: ") and said[-1].endswith("of the text has changed")


def test_an_update_that_is_worse_is_given_up(added, monkeypatch):
    monkeypatch.setattr(updating.outcome, "_worse", lambda new, old: True)
    report, said = added(MORE)
    assert "updated" not in report
    assert said[-1] == "fitting anew: the update answers worse than the file did when it was fitted"
