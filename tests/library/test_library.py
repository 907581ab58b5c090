"""The library: what is added, changed, renamed, removed, broken, interrupted."""

import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import types
from contextlib import nullcontext

import pytest

from nectar_mlx.core.progress import Overall, Stage
from nectar_mlx.documents import files
from nectar_mlx.documents.reading import Unreadable
from nectar_mlx.errors import NectarError
from nectar_mlx.library import Library, default_folder, scan
from nectar_mlx.library.database import Database, path_bytes
from nectar_mlx.library.noted import Noted
from nectar_mlx.store import tensor_file
from tests.documents.test_epub import unpacked
from tests.library.cheap import CheapFitter, text_in


def by_name(library):
    return {document.name: document for document in library.documents()}


def states(library):
    return {document.name: document.state for document in library.documents()}


def test_each_long_document_has_a_file_and_short_ones_share(library, notes):
    fitter = CheapFitter()
    added = library.add([notes], fitter)
    documents = by_name(library)
    assert len(documents) == 7 and set(states(library).values()) == {"ready"}
    assert documents["long 0.txt"].shared == documents["long 1.txt"].shared == 0
    assert any(documents[f"note {i}.md"].shared for i in range(5))
    assert len(added.work.fitted) == 7 and len(fitter.fitted) == len({d.file for d in documents.values()})
    assert "copper" in library.text(documents["note 0.md"])
    assert "# note 0.md\n\n" in text_in(documents["note 0.md"].file) or not documents["note 0.md"].shared


def test_nothing_is_fitted_twice_nor_is_the_model_needed(library, notes):
    library.add([notes], CheapFitter())

    class Unloaded(CheapFitter):
        identity = property(lambda self: pytest.fail("the model is loaded"), lambda self, value: None)

    added = library.add([notes], Unloaded())
    assert added.scan.read == [] and len(added.scan.unchanged) == 7 and added.work.fitted == []


def test_a_document_whose_file_is_gone_is_fitted_again(library, notes):
    library.add([notes], CheapFitter())
    by_name(library)["long 0.txt"].file.unlink()
    fitter = CheapFitter()
    said: list[str] = []
    assert library.update(fitter, log=said.append).work.fitted == ["long 0.txt"] and fitter.fitted == ["long 0.txt"]
    assert said[0] == "1 of the library's files cannot be read: what they held is fitted again"
    assert by_name(library)["long 0.txt"].file.exists()


def test_a_document_whose_file_is_damaged_is_fitted_again(library, notes):
    library.add([notes], CheapFitter())
    damaged = by_name(library)["long 0.txt"].file
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])
    fitter = CheapFitter()
    assert library.update(fitter, retry=False).work.fitted == [], "a look every few seconds reads no files"
    assert library.update(fitter).work.fitted == ["long 0.txt"] and fitter.fitted == ["long 0.txt"]
    assert by_name(library)["long 0.txt"].file.read_bytes() == whole


def test_what_a_file_could_not_be_read_for_is_not_remembered(library, notes, monkeypatch):
    library.add([notes], CheapFitter())
    document = by_name(library)["long 0.txt"]

    def refused(*arguments):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "open", refused, raising=False)
        assert document.looked_at().reason == "its file cannot be read (Too many open files)"
    assert document.looked_at().state == "ready"
    document.file.unlink()
    document.file.mkdir()
    assert document.looked_at().reason == "its file is a folder"


def test_the_progress_is_that_of_all_documents(library, tmp_path):
    for number in range(3):
        (tmp_path / f"heron {number}.txt").write_text(f"The heron {number} lives in the reeds. " * 300)
    now, told, said = [0.0], [], []
    progress = Overall(lambda: now[0])

    class Telling(CheapFitter):
        def expected(self, characters):
            return 10.0

        def fit(self, reading, output, *, progress, **options):
            stages = [Stage("reading", 4.0), Stage("training", 6.0)]
            progress.expect(stages)
            for stage in stages:
                with progress(stage.description, 2) as update:
                    for done in (1, 2):
                        now[0] += stage.seconds  # twice as long as expected
                        update(done)
                        told.append(whole.status())
            super().fit(reading, output, progress=progress, **options)

    whole = progress
    library.add([tmp_path], Telling(), progress=progress, log=said.append)
    assert [status.part for status in told] == [f"document {n} of 3" for n in (1, 2, 3) for _ in range(4)]
    assert [status.description for status in told[:4]] == ["reading", "reading", "training", "training"]
    for status in told[2:]:
        assert status.total_seconds == pytest.approx(60, rel=0.25) and status.elapsed <= 60
        assert status.share == pytest.approx(status.elapsed / 60, abs=0.1)
    assert said[0].endswith("(3 documents to go, about 30 s)"), "what was expected"
    assert len(said) == 3, "one line a document"


def test_the_time_that_is_left_follows_from_the_fits_before(library, tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"heron {number}.txt").write_text(f"The heron {number} lives in the reeds. " * 300)
    said, now = [], iter(range(0, 1000, 25))  # a fit takes 25 s
    monkeypatch.setattr("nectar_mlx.library.work.time", types.SimpleNamespace(monotonic=lambda: next(now)))
    fitter = CheapFitter()
    fitter.expected = lambda characters: 10.0
    library.add([tmp_path], fitter, log=said.append)
    assert [line.partition("go, ")[2] for line in said] == ["about 30 s)", "about 50 s)", "about 25 s)"]


def test_a_folder_in_the_place_of_a_file_is_one_line(library, notes):
    library.add([notes], CheapFitter())
    place = by_name(library)["long 0.txt"].file
    place.unlink()
    (place / "inside").mkdir(parents=True)
    fitter = CheapFitter()
    with pytest.raises(NectarError) as caught:
        library.update(fitter)
    assert str(caught.value) == f"{place} is a folder, where a file of the library belongs; remove it"
    assert fitter.fitted == [] and (place / "inside").is_dir(), "nothing is fitted in vain, or removed"
    shutil.rmtree(place)
    assert library.update(fitter).work.fitted == ["long 0.txt"]


def test_a_damaged_file_of_an_older_model_is_not_fitted_by_it_again(library, notes):
    library.add([notes], CheapFitter())
    for document in library.documents():
        document.file.write_text("damaged")
    assert len(library.update(CheapFitter("newer")).work.fitted) == len(library.documents())
    assert all(document.state == "ready" for document in library.documents())


def test_what_changes_alone_is_fitted_again(library, notes):
    library.add([notes], CheapFitter())
    (notes / "long 0.txt").write_text("The otter lives in the river. " * 300)
    (notes / "new.txt").write_text("The lynx lives in the wood. " * 300)
    fitter = CheapFitter()
    added = library.add([notes], fitter)
    assert fitter.fitted == ["long 0.txt", "new.txt"] and len(added.scan.read) == 2
    assert "heron" not in "".join(text_in(path) for path in library.folder.volumes.iterdir())


def test_a_changed_document_starts_from_its_old_file(library, notes):
    library.add([notes], CheapFitter())
    (notes / "long 0.txt").write_text("The otter lives in the river. " * 300)
    with pytest.raises(KeyboardInterrupt):
        library.update(CheapFitter(raising=KeyboardInterrupt()))
    (notes / "long 0.txt").write_text("The otter lives by the river. " * 300)
    (notes / "new.txt").write_text("The lynx lives in the wood. " * 300)
    fitter = CheapFitter()
    library.update(fitter)
    former = dict(zip(fitter.fitted, fitter.former, strict=True))
    assert "heron" in former["long 0.txt"] and former["new.txt"] is None
    assert "heron" not in "".join(text_in(path) for path in library.folder.volumes.iterdir())
    library.remove([notes / "long 0.txt"])
    assert "otter" not in "".join(text_in(path) for path in library.folder.volumes.iterdir())


def test_an_emptied_document_does_not_start_from_another_ones_file(library, tmp_path):
    """The number of a text that is gone is given again."""
    texts = {name: f"The {name} lives by the river. " * 300 for name in ("heron", "otter")}
    for name in texts:
        (tmp_path / f"{name}.txt").write_text(texts[name])
        library.add([tmp_path / f"{name}.txt"], CheapFitter())
    (tmp_path / "otter.txt").write_text("")
    library.update(CheapFitter())
    (tmp_path / "lynx.txt").write_text("The lynx lives in the wood. " * 300)
    library.add([tmp_path / "lynx.txt"], CheapFitter())
    (tmp_path / "otter.txt").write_text(texts["otter"] + "It swims.")
    fitter = CheapFitter()
    library.update(fitter)
    assert (fitter.fitted, fitter.former) == (["otter.txt"], [None])


def test_a_document_that_is_removed_takes_its_old_file_along(library, notes):
    library.add([notes], CheapFitter())
    (notes / "long 0.txt").write_text("The otter lives in the river. " * 300)
    with pytest.raises(KeyboardInterrupt):
        library.update(CheapFitter(raising=KeyboardInterrupt()))
    library.remove([notes / "long 0.txt"])
    assert "heron" not in "".join(text_in(path) for path in library.folder.volumes.iterdir())


def test_a_touched_or_renamed_file_is_not_fitted_again(library, notes):
    library.add([notes], CheapFitter())
    os.utime(notes / "long 1.txt", ns=(1, 1))
    (notes / "long 0.txt").rename(notes / "deep" / "renamed.txt")
    (notes / "deep" / "note 3.md").rename(notes / "note.txt")
    fitter = CheapFitter()
    added = library.add([notes], fitter)
    assert fitter.fitted == [] and added.scan.missing == []
    assert {"renamed.txt", "note.txt"} < states(library).keys() and len(library.documents()) == 7


def test_one_more_note_changes_one_group(library, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"note {number * number} about thing {number}")
    first = CheapFitter()
    library.add([folder], first)
    (folder / "more.txt").write_text("one more note")
    second = CheapFitter()
    library.add([folder], second)
    assert 3 < len(first.fitted) < 40 and len(second.fitted) <= 2
    assert "more.txt" in ",".join(second.fitted)


def test_broken_documents_are_named_and_stop_nothing(library, notes):
    (notes / "bad.pdf").write_bytes(b"%PDF-1.7 no more")
    (notes / "empty.txt").write_text("")
    (notes / "deep" / "worse.md").write_text("this is unfittable")
    added = library.add([notes], CheapFitter())
    found = by_name(library)
    assert found["bad.pdf"].state == found["empty.txt"].state == "not read"
    assert found["bad.pdf"].reason and found["empty.txt"].reason
    assert (found["worse.md"].state, found["worse.md"].reason) == ("failed", "this text cannot be fitted")
    assert sum(d.state == "ready" for d in found.values()) == 7, "its neighbours are fitted without it"
    assert added.work.failed == {"worse.md": "this text cannot be fitted"} and len(added.scan.failed) == 2
    again = CheapFitter()
    library.add([notes], again)
    assert again.fitted == []
    library.update(CheapFitter(broken="nothing"))
    assert states(library)["worse.md"] == "ready"


def test_a_fitter_that_fails_otherwise_stops_nothing(library, notes):
    added = library.add([notes], CheapFitter(raising=ValueError("shape\nmismatch")))
    assert len(added.work.failed) == 7
    assert set(added.work.failed.values()) == {"the fit fails (ValueError: shape mismatch)"}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), sqlite3.OperationalError("No space left: the disk is full")],
)
def test_a_full_disk_stops_and_the_next_call_goes_on(library, notes, error):
    with pytest.raises(NectarError, match="No space left"):
        library.add([notes], CheapFitter(raising=error))
    assert set(states(library).values()) == {"waiting"}
    library.add([notes], CheapFitter())
    assert set(states(library).values()) == {"ready"}


def test_a_fit_does_not_fail_for_a_note_of_how_far_it_is(library, monkeypatch):
    def full():
        raise NectarError("the disk is full")

    monkeypatch.setattr(library._database, "writing", full)
    told = []
    with Noted(library._database, "a volume", lambda *stage: nullcontext(told.append))("sampling", 3) as count:
        count(2)
    assert told == [2]


def test_an_interrupt_leaves_the_volume_to_the_next_call(library, notes):
    with pytest.raises(KeyboardInterrupt):
        library.add([notes], CheapFitter(raising=KeyboardInterrupt()))
    assert set(states(library).values()) == {"waiting"}


def test_another_model_answers_until_update_has_fitted_the_last(library, notes):
    library.add([notes], CheapFitter("old"))
    library.touch(by_name(library)["long 1.txt"])
    (notes / "new.txt").write_text("The lynx lives in the wood. " * 300)
    fitter = CheapFitter("new")
    added = library.add([notes], fitter)
    assert fitter.fitted == ["new.txt"] and added.work.later > 0
    found = by_name(library)
    assert found["long 0.txt"].state == "older model" and found["long 0.txt"].model == "old"
    assert found["new.txt"].state == "ready" and found["long 0.txt"].file.is_file()
    fitter = CheapFitter("new")
    library.update(fitter)
    assert fitter.fitted[0] == "long 1.txt", "the one used last comes first"
    assert set(states(library).values()) == {"ready"}
    assert {document.model for document in library.documents()} == {"new"}
    assert {path.stem for path in library.folder.volumes.iterdir()} == {d.file.stem for d in library.documents()}


def test_a_changed_model_of_the_same_name_is_noticed_by_update(library, notes):
    library.add([notes], CheapFitter())
    fitter = CheapFitter(weights="2")
    library.update(fitter)
    assert len(fitter.fitted) == len({document.file for document in library.documents()})


def test_a_file_that_disappears_stays_until_it_is_removed(library, notes):
    library.add([notes], CheapFitter())
    (notes / "long 0.txt").unlink()
    added = library.update(CheapFitter())
    assert [path.rpartition("/")[2] for path in added.scan.missing] == ["long 0.txt"]
    found = by_name(library)["long 0.txt"]
    assert found.missing and found.state == "ready" and library.text(found)
    library.remove([], missing=True)
    assert "long 0.txt" not in states(library) and not found.file.exists()


def test_of_a_file_that_disappears_and_was_not_read_nothing_stays(library, notes):
    (notes / "bad.pdf").write_bytes(b"%PDF-1.7 no more")
    library.add([notes], CheapFitter())
    assert states(library)["bad.pdf"] == "not read"
    (notes / "bad.pdf").unlink()
    assert [path.rpartition("/")[2] for path in library.update(CheapFitter()).scan.missing] == ["bad.pdf"]
    assert "bad.pdf" not in states(library)


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_removed_while_it_is_read(library, notes, whole, monkeypatch, tmp_path):
    """By another process: it does not come back. whole: with the folder that was added."""
    library.add([notes], CheapFitter())
    (notes / "long 0.txt").write_text("The otter lives in the river. " * 300)
    read, other = scan._read, Library(tmp_path / "library")

    def removing(source):
        if other.documents():
            other.remove([notes if whole else source.path])
        return read(source)

    monkeypatch.setattr(scan, "_read", removing)
    fitter = CheapFitter()
    assert str(notes / "long 0.txt") in library.update(fitter).scan.ignored
    assert len(library.documents()) == (0 if whole else 6) and fitter.fitted == []
    library._database.close()
    assert not any(b"otter" in path.read_bytes() for path in library.folder.path.rglob("*") if path.is_file())


def test_a_folder_in_the_place_of_a_document_is_not_the_document(library, notes):
    library.add([notes], CheapFitter())
    for number, text in enumerate(("The same as before.", (notes / "long 1.txt").read_text())):
        place = notes / f"long {number}.txt"
        place.unlink()
        place.mkdir()
        (place / f"inside {number}.txt").write_text(text)
    added = library.update(CheapFitter())
    assert [path.rpartition("/")[2] for path in added.scan.missing] == ["long 0.txt"]
    assert by_name(library)["long 0.txt"].missing
    assert "long 1.txt" not in states(library) and "inside 1.txt" in states(library), "it was moved there"


def test_an_unpacked_book_is_one_document(library, notes):
    """As Books keeps it: a change within is seen, and it may be moved."""
    unpacked(notes / "a.epub")
    library.add([notes], CheapFitter())
    assert by_name(library)["a.epub"].kind == "epub" and len(library.documents()) == 8
    os.utime(notes / "a.epub" / "OEBPS" / "book.opf", ns=(1, 1))
    (notes / "a.epub").rename(notes / "deep" / "b.epub")
    fitter = CheapFitter()
    added = library.update(fitter)
    assert (fitter.fitted, added.scan.missing, states(library)["b.epub"]) == ([], [], "ready")
    (notes / "deep" / "b.epub" / "OEBPS" / "text" / "one.xhtml").write_text("<p>lynx</p>")
    assert len(library.update(CheapFitter()).scan.read) == 1
    assert "lynx" in library.text(by_name(library)["b.epub"])
    shutil.rmtree(notes / "deep" / "b.epub")
    library.update(CheapFitter())
    assert by_name(library)["b.epub"].missing


def test_a_folder_that_is_gone_is_no_error(library, notes, tmp_path):
    library.add([notes], CheapFitter())
    notes.rename(tmp_path / "away")
    library.update(CheapFitter())
    assert all(document.missing for document in library.documents())
    (tmp_path / "away").rename(notes)
    fitter = CheapFitter()
    library.update(fitter)
    assert not any(document.missing for document in library.documents()) and fitter.fitted == []


def test_what_is_removed_is_gone_from_every_file_and_stays_away(library, notes):
    library.add([notes], CheapFitter())
    removed = library.remove([notes / "deep" / "note 2.md", "long 0.txt"])
    assert len(removed.documents) == 2
    library._database.close()
    for path in library.folder.path.rglob("*"):
        assert path.is_dir() or (b"cobalt" not in path.read_bytes() and b"heron" not in path.read_bytes()), path
    added = library.add([notes], CheapFitter())
    assert len(added.scan.ignored) == 2 and len(library.documents()) == 5
    library.add([notes / "long 0.txt"], CheapFitter())
    assert "long 0.txt" in states(library), "named itself, it is taken again"


@pytest.mark.parametrize("moment", ["is_whole", "fit"])
@pytest.mark.parametrize("name", ["long 0.txt", "note 3.md"])
def test_what_is_removed_while_it_is_fitted(library, notes, moment, name, monkeypatch, tmp_path):
    fitter, other = CheapFitter(), Library(tmp_path / "library")
    plain, removed = getattr(fitter, moment), list[str]()

    def removing(first, *args, **options):
        if states(other).get(name) == "fitting":
            removed.extend(other.remove([name]).documents)
        return plain(first, *args, **options)

    monkeypatch.setattr(fitter, moment, removing)
    work = library.add([notes], fitter).work
    names = [document.name for document in library.documents()]
    assert removed and not work.failed and name not in names and len(names) == 6
    assert sorted(work.fitted) == sorted(names) and all(document.file for document in library.documents())
    assert not any(b"heron" in f.read_bytes() for f in library.folder.volumes.iterdir() if name.startswith("long"))


def test_a_removed_folder_is_not_looked_at_again(library, notes):
    library.add([notes], CheapFitter())
    library.remove([notes])
    assert library.documents() == [] and list(library.folder.volumes.iterdir()) == []
    assert library.update(CheapFitter()).scan.read == []


def test_what_cannot_be_removed(library, notes):
    library.add([notes], CheapFitter())
    (notes / "deep" / "long 0.txt").write_text("another")
    library.add([notes], CheapFitter())
    with pytest.raises(NectarError, match="2 documents have this name"):
        library.remove(["long 0.txt"])
    with pytest.raises(NectarError, match="not in the library"):
        library.remove(["nothing"])


def test_odd_names(library, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [
        b"new\nline.txt",
        b"\xff\xfe.txt",
        "naïve 'quote\".txt".encode(),
        b"-rf.txt",
        b"%s.txt",
        "日本語.txt".encode(),
    ]
    for number, name in enumerate(names):
        with open(path_bytes(folder) + b"/" + name, "w") as file:
            file.write(f"text number {number} " * 400)
    library.add([folder], CheapFitter())
    documents = library.documents()
    assert len(documents) == len(names) and {d.state for d in documents} == {"ready"}
    assert all(document.name.isprintable() for document in documents)
    library.remove([folder])
    assert library.documents() == []


def test_equal_documents_share_one_text(library, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same words " * 500)
    fitter = CheapFitter()
    library.add([tmp_path / "a.txt", tmp_path / "b.txt"], fitter)
    assert fitter.fitted == ["a.txt"] and len({document.file for document in library.documents()}) == 1
    library.remove([tmp_path / "a.txt"])
    assert [document.state for document in library.documents()] == ["ready"]


def test_a_link_is_read_once_what_it_is_the_same_as_is_gone(library, tmp_path):
    """Of several names of one file the first is read; which that is may change without the file."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "real.txt").write_text("the same words " * 500)
    (folder / "a.txt").symlink_to("real.txt")
    library.add([folder], CheapFitter())
    assert states(library) == {"a.txt": "ready", "real.txt": "not read"}
    (folder / "a.txt").unlink()
    library.update(CheapFitter())
    assert states(library) == {"real.txt": "ready"}


def test_a_file_that_may_be_opened_today_is_read(library, notes, monkeypatch):
    """A permission changes neither the size of a file nor its time of change."""
    with monkeypatch.context() as patch:
        patch.setattr(files.Source, "sha256", lambda self: (_ for _ in ()).throw(Unreadable("cannot be read (no)")))
        library.add([notes], CheapFitter())
        assert set(states(library).values()) == {"not read"}
        with library._database.reading() as rows:
            before = rows.execute("PRAGMA data_version").fetchone()
        scan.scan(Database(library.folder.database), scan.known_roots(library._database), own=library.folder.is_own)
        with library._database.reading() as rows:
            assert rows.execute("PRAGMA data_version").fetchone() == before, "nothing is written for those"
    library.update(CheapFitter())
    assert set(states(library).values()) == {"ready"}


@pytest.mark.parametrize("edited", [False, True])
def test_a_name_in_other_letters_is_a_new_name(library, tmp_path, edited):
    """On a Mac a file renamed so is still found by its old path. Here two names lead to one file."""
    folder = tmp_path / "cased"
    folder.mkdir()
    (folder / "Plan.txt").write_text("the same words " * 500)
    library.add([folder], CheapFitter())
    library.touch(by_name(library)["Plan.txt"])
    os.link(folder / "Plan.txt", folder / "PLAN.txt")
    if edited:
        (folder / "PLAN.txt").write_text("other words " * 500)
    added = library.add([folder], CheapFitter(), exclude=["Plan.txt"])
    found = by_name(library)
    if edited:
        assert found["Plan.txt"].missing and added.scan.missing == [str(folder / "Plan.txt")]
    else:
        assert found.keys() == {"PLAN.txt"} and found["PLAN.txt"].used and added.work.fitted == []


def test_the_library_itself_is_no_document(tmp_path):
    library = Library(tmp_path / "home" / "library")
    (tmp_path / "home" / "note.txt").write_text("a note")
    library.add([tmp_path / "home"], CheapFitter())
    library.update(CheapFitter())
    assert list(states(library)) == ["note.txt"]


@pytest.mark.parametrize(
    "given, complaint", [("missing", "no such file"), ("-", "standard input"), ("https://x.org/a", "only files")]
)
def test_what_cannot_be_added(library, given, complaint):
    with pytest.raises(NectarError, match=complaint):
        library.add([given], CheapFitter())
    assert library.documents() == []


def test_files_are_for_their_owner_alone(library, notes):
    library.add([notes], CheapFitter())
    library.documents()
    for path in (library.folder.path, *library.folder.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_damaged_database_is_one_line_and_its_files_are_found_again(library, notes):
    library.add([notes], CheapFitter())
    path = library.folder.database
    library._database.close()
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(NectarError, match=r"damaged .* remove it and add the folders again") as caught:
        Library(library.folder.path).documents()
    assert "\n" not in str(caught.value)
    for name in ("", "-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    fitter = CheapFitter()
    again = Library(library.folder.path)
    again.add([notes], fitter)
    assert fitter.fitted == [] and set(states(again).values()) == {"ready"}


def test_a_database_of_another_version_is_refused(tmp_path):
    Library(tmp_path)._database.close()
    connection = sqlite3.connect(tmp_path / "library.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(NectarError, match="another version"):
        Library(tmp_path)


def test_a_library_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NectarError, match="cannot be made"):
        Library(tmp_path / "file")


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    """A library closes its folder to others, and clears `volumes` and `work`."""
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    (home / "work" / "thesis.txt").write_text("all of it")
    (home / "letter.txt").write_text("a letter")
    home.chmod(0o755)
    with pytest.raises(NectarError, match=r"no library and holds other files \(letter.txt\)"):
        Library(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o755 and len(list(home.iterdir())) == 2
    (home / "letter.txt").unlink()
    Library(home).update(CheapFitter())
    assert (home / "work" / "thesis.txt").read_text() == "all of it"


def test_where_the_library_is(monkeypatch, tmp_path):
    monkeypatch.setenv("NECTAR_LIBRARY", str(tmp_path / "chosen"))
    assert default_folder() == tmp_path / "chosen"
    monkeypatch.delenv("NECTAR_LIBRARY")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "nectar" / "library"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder().parts[-4:] == ("Library", "Application Support", "nectar", "library")


def test_callers_read_while_a_thread_adds(library, notes):
    future = library.add_in_background([notes], CheapFitter(seconds=0.1))
    seen = set()
    while not future.done():
        seen.update(states(library).values())
        library.route("What does the copper pipe cost?")
    assert future.result().work.failed == {} and {"waiting", "fitting"} <= seen
    assert set(states(library).values()) == {"ready"}
    with pytest.raises(NectarError, match="no such file"):
        library.add_in_background(["missing"], CheapFitter()).result(10)


def test_threads_share_the_work(library, notes):
    fitters = [CheapFitter(seconds=0.1) for _ in range(3)]
    threads = [threading.Thread(target=library.add, args=([notes], fitter)) for fitter in fitters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fitted = [name for fitter in fitters for name in fitter.fitted]
    assert len(fitted) == len(set(fitted)) == len({document.file for document in library.documents()})
    assert set(states(library).values()) == {"ready"}


@pytest.mark.process
def test_processes_share_the_work(tmp_path, notes):
    command = [sys.executable, "-m", "tests.library.cheap", str(tmp_path / "library"), str(notes), "0.2"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 3
    library = Library(tmp_path / "library")
    assert set(states(library).values()) == {"ready"} and list((tmp_path / "library" / "work").iterdir()) == []


def test_one_changed_note_leaves_no_other_waiting(library, notes):
    library.add([notes], CheapFitter())
    (notes / "deep" / "note 2.md").write_text("# Shopping\n\nThe tin pipe costs 12 crowns.")
    without = set()

    class Watching(CheapFitter):
        def fit(self, *args, **options):
            without.update(name for name, state in states(library).items() if state != "ready")
            super().fit(*args, **options)

    library.add([notes], Watching())
    assert without == {"note 2.md"}
    assert set(states(library).values()) == {"ready"}
