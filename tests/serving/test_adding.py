"""Uploads that wait to be fitted: one that is removed meanwhile leaves the others alone."""

import hashlib
import os
from types import SimpleNamespace

import pytest

from nectar_mlx.library import Library
from nectar_mlx.serving.adding import Adding
from nectar_mlx.serving.errors import ApiError
from nectar_mlx.serving.library import names
from nectar_mlx.serving.library_api import LibraryApi
from tests.library.cheap import CheapFitter

from .running import wait_for


@pytest.fixture
def library(tmp_path):
    """Of no documents."""
    return SimpleNamespace(folder=SimpleNamespace(path=tmp_path, documents=tmp_path), documents=lambda: [])


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path in paths:
        path.write_text("x")
    return paths


def test_a_file_that_is_removed_while_it_waits_or_is_read(library, files, monkeypatch):
    ran = []

    def run(adding, paths, said):
        """Refuses all where one is gone, as the command does."""
        ran.append(list(paths))
        files[1].unlink(missing_ok=True)
        said.write(b"no such file")
        return len(ran) == 1

    monkeypatch.setattr(Adding, "_run", run)
    adding = Adding(library, "model")
    files[0].unlink()
    with adding._wanted:
        for path in files:
            adding.add(path)
    assert wait_for(lambda: len(ran) == 2 and not adding.busy)
    adding.stop()
    assert ran == [files[1:], files[2:]] and adding.message == ""


def test_the_page_tells_a_damaged_file(files, tmp_path):
    library = Library(tmp_path / "library")
    for path in files[:2]:
        path.write_text(path.name * 1000)
    library.add(files[:2], CheapFitter())
    damaged = library.documents()[0].file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    served = SimpleNamespace(refresh=lambda: names(library.documents()))
    service = SimpleNamespace(engine=SimpleNamespace(shelf=None), library=served)
    shown = LibraryApi(service, SimpleNamespace(busy=False, pending=[], message=""))._show()["documents"]
    assert [(document["state"], document["model"]) for document in shown] == [("damaged", None), ("ready", "b.txt")]
    assert "cut short" in shown[0]["reason"]


def test_an_upload_is_removed_while_it_waits(library, files):
    adding = SimpleNamespace(pending=files)
    engine = SimpleNamespace(shelf=None)
    api = LibraryApi(SimpleNamespace(engine=engine, library=SimpleNamespace(library=library)), adding)
    wanted = hashlib.sha256(os.fsencode(files[1])).hexdigest()[:16]
    assert api._remove(wanted) == {"removed": [str(files[1])], "waiting": []}
    assert [path.exists() for path in files] == [True, False, True]
    with pytest.raises(ApiError, match="no longer"):
        api._remove(wanted)
