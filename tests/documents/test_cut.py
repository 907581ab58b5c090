"""A reading whose text is cut, as by --context-tokens."""

from nectar_mlx.documents.reading import Edit, FileReport, Place, Reading

TEXT = "aaaa bbbb cccc"
FILES = [
    FileReport("a", "text", 4, 0, 4),
    FileReport("b", "pdf", 9, 5, 14, [Place("page", "1", 5, 9), Place("page", "2", 10, 14)]),
    FileReport("broken", reason="damaged"),
]
READING = Reading(TEXT, FILES, [Edit(1, 2, "A"), Edit(11, 12, "C")])


def test_what_lies_behind_the_end_is_left_out():
    cut = READING.cut(7)
    assert cut.text == "aaaa bb" and cut.files[0] == FILES[0] and cut.files[2] == FILES[2]
    assert cut.files[1].places == [Place("page", "1", 5, 7)] and cut.files[1].end == 7
    assert cut.summary() == "read 2 of 3 files: broken: damaged; left out: b (its end: the text was cut there)"
    assert cut.edits == [Edit(1, 2, "A")] and cut.original(0, 4) == "aAaa"


def test_a_file_behind_the_end_was_not_read():
    cut = READING.cut(5)
    assert "b: left out: the text was cut before it" in cut.summary() and cut.counts() == "read 1 of 3 files"
    assert cut.place(3) == (FILES[0], None) and cut.place(6) is None


def test_a_text_that_is_whole_is_the_same():
    assert READING.cut(len(TEXT)) is READING
