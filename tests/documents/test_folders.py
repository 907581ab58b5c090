"""Several files: folders, their order, what is left aside, and the report on each file."""

import os
import subprocess
from pathlib import Path

import pytest

from nectar_mlx import NectarError, documents
from nectar_mlx.documents import ocr
from tests.documents.makers import FOX, refusal, write


def names(folder: Path, **options: object) -> list[str]:
    return [report.name for report in documents.read([folder], **options).files]  # type: ignore[arg-type]


def test_are_headed_by_their_names(tmp_path: Path) -> None:
    one, two = write(tmp_path / "b.txt", "bee"), write(tmp_path / "a.txt", "ay")
    assert documents.read([one, str(two)]).text == "# b.txt\n\nbee\n\n# a.txt\n\nay"


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for name in ("note 10.txt", "note 2.txt", "Note 1.txt", "a/2.md", "a/10.md", "b.txt", "note 2b.txt"):
        write(tmp_path / name, name)
    order = ["a/2.md", "a/10.md", "b.txt", "Note 1.txt", "note 2.txt", "note 2b.txt", "note 10.txt"]
    assert names(tmp_path) == order


def test_names_of_many_digits_are_sorted(tmp_path: Path) -> None:
    for name in ("9" * 200, "1" * 201, "²", "٣"):
        write(tmp_path / name, FOX)
    assert names(tmp_path)[:2] == ["9" * 200, "1" * 201]


def test_hidden_and_lock_files_are_left_aside(tmp_path: Path) -> None:
    for name in (".git/x.txt", "a/.hidden.txt", "~$plan.docx", ".~lock.plan.odt#", ".DS_Store", "draft.txt~", "z.txt"):
        write(tmp_path / name, FOX)
    assert names(tmp_path) == ["z.txt"]


def test_a_hidden_folder_that_is_given(tmp_path: Path) -> None:
    write(tmp_path / ".notes" / "a.txt", FOX)
    assert documents.read([tmp_path / ".notes"]).text == FOX


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "a" / "one.txt", FOX)
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink(tmp_path / "a" / "one.txt", tmp_path / "b.txt")
    os.symlink(tmp_path / "absent", tmp_path / "c.txt")
    reports = documents.read([tmp_path]).files
    assert [(report.name, report.reason) for report in reports] == [
        ("a/one.txt", ""),
        ("b.txt", "the same file as a/one.txt"),
        ("c.txt", "a link that leads nowhere"),
    ]


@pytest.mark.parametrize(
    "name, reason",
    [("deep", "deep/" + "a/" * 199 + "a: the folder lies more than 200 folders deep"), ("deep.epub", "deep.epub: ")],
)
def test_folders_are_not_followed_beyond_the_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    write(tmp_path / "fox.txt", FOX)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    for _ in range(1100):  # each path within the last one: the system takes no longer ones
        os.mkdir("a")
        os.chdir("a")
    try:
        assert documents.read([tmp_path]).summary().startswith(f"read 1 of 2 files: {reason}")
    finally:
        monkeypatch.undo()
        subprocess.run(["rm", "-rf", tmp_path / name], check=True)  # Python's own stack, too, would end


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    write(tmp_path / "a.txt", FOX)
    assert documents.read([tmp_path]).summary().startswith("read 1 of 2 files: pipe.txt: not a file")


def test_patterns(tmp_path: Path) -> None:
    for name in ("a.md", "b.txt", "notes/c.md", "old/d.md"):
        write(tmp_path / name, FOX)
    assert names(tmp_path, include=["*.md"]) == ["a.md", "notes/c.md", "old/d.md"]
    assert names(tmp_path, include=["*.md"], exclude=["old/"]) == ["a.md", "notes/c.md"]
    assert names(tmp_path, exclude=["notes/*", "*.txt"]) == ["a.md", "old/d.md"]


@pytest.mark.parametrize("url", ["https://example.org/a.pdf", "www.example.org", "ftp://a/b"])
def test_urls_are_refused(url: str) -> None:
    assert refusal(url) == f"{url}: only files and folders are read; save the page to a file first"


def test_one_bad_file_is_named_and_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", FOX)
    write(tmp_path / "b.pdf", "no pdf")
    write(tmp_path / "c.docx", b"PK\x03\x04 cut")
    write(tmp_path / "d.png", b"\x89PNG\r\n\x1a\n")
    write(tmp_path / "old.doc", b"\xd0\xcf\x11\xe0" + bytes(600))
    reading = documents.read([tmp_path])
    assert reading.text == f"# a.txt\n\n{FOX}"
    assert reading.summary() == (
        "read 1 of 5 files: b.pdf: a damaged PDF; c.docx: not a whole DOCX file; d.png: a picture, "
        f"and no text recognition is installed: {ocr.advice()}; old.doc: an old Word file; save it as .docx"
    )


def test_strict_refuses_what_is_not_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", FOX)
    assert documents.read([tmp_path], strict=True).text == FOX
    write(tmp_path / "b.txt", "naïve, déjà vu, cœur ".encode() + b"\xff")
    line = "read 2 of 2 files; left out: b.txt (1 character that is not valid UTF-8)"
    assert documents.read([tmp_path]).summary() == line
    with pytest.raises(NectarError, match=r"^not everything can be read: b.txt: .*not valid UTF-8$"):
        documents.read([tmp_path], strict=True)
    write(tmp_path / "c.pdf", "no pdf")
    with pytest.raises(NectarError, match=r"^not everything can be read: c.pdf: a damaged PDF; b.txt"):
        documents.read([tmp_path], strict=True)


def test_nothing_can_be_read(tmp_path: Path) -> None:
    assert "holds no document" in refusal(tmp_path)
    picture = write(tmp_path / "picture.png", "x")
    reason = f"a picture, and no text recognition is installed: {ocr.advice()}"
    assert refusal(tmp_path) == f"none of the files can be read: picture.png: {reason}"
    assert refusal(picture) == f"{picture}: {reason}"
    assert refusal() == "no document was given"
    assert refusal(tmp_path / "absent.txt") == f"{tmp_path / 'absent.txt'}: no such file or folder"
    assert refusal("a\0b").endswith("no such file or folder")


def test_the_report_names_ranges_of_the_text(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "cafe\u0301 ﬁrst")
    write(tmp_path / "b.html", "<h1>Sec\u00adond</h1>")
    reading = documents.read([tmp_path])
    first, second = reading.files
    assert reading.text == "# a.txt\n\ncafé first\n\n# b.html\n\n# Second"
    assert reading.text[first.start : first.end] == "café first"
    assert reading.text[second.start : second.end] == "# Second"
    assert (first.kind, first.characters, second.kind) == ("text", 10, "html")
    assert reading.original(first.start, first.end) == "cafe\u0301 ﬁrst"
    assert reading.original(second.start, second.end) == "# Sec\u00adond"
    assert reading.original(first.start, first.start + 3) == "caf"
    found = reading.place(second.start)
    assert found is not None and found[0] is second and found[1] is None
    assert reading.place(0) is None
    assert reading.as_list()[0] == {
        "name": "a.txt",
        "kind": "text",
        "characters": 10,
        "start": 9,
        "end": 19,
        "unit": "",
        "places": [],
        "left_out": [],
        "reason": "",
    }


def test_a_file_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    assert documents.read([write(tmp_path / "a.doc", r"{\rtf1\ansi Plan B}")]).text == "Plan B"
    encrypted = b"\xd0\xcf\x11\xe0" + bytes(600) + "EncryptedPackage".encode("utf-16-le") + bytes(600)
    assert "encrypted" in refusal(write(tmp_path / "a.docx", encrypted))


def test_names_that_are_no_text_are_shown_in_one_line(tmp_path: Path) -> None:
    for name in (b"line\nbreak\x1b[31m.txt", b"bad\xff.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("words")
    text = documents.read([tmp_path]).text
    assert text.encode() and "\x1b" not in text
    assert text == "# bad\ufffd.txt\n\nwords\n\n# line\ufffdbreak\ufffd[31m.txt\n\nwords"
    assert "\n" not in refusal(str(tmp_path / "no\nfile"))


def test_what_has_no_size_is_not_waited_for() -> None:
    assert "the file is empty" in refusal("/proc/self/status" if Path("/proc/self/status").exists() else os.devnull)


def test_what_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.txt", "words")
    whole = Path.stat

    def stat(self: Path, **options: bool) -> os.stat_result:
        if self.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return whole(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    reading = documents.read([tmp_path])
    assert reading.text.endswith("words") and "b.txt: cannot be read (Permission denied)" in reading.summary()
