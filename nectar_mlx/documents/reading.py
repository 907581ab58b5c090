"""What reading gives: the text, its places, and what became of each file."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace


class Unreadable(Exception):
    """A file holds no text that can be read; the message says why, in one line."""


@dataclass(frozen=True)
class Place:
    """A part of a document that a source can be named by.

    Attributes:
        unit: "page", "chapter", "sheet", "slide", "mail", "cell", "contact", "event" or "minute".
        name: the part's number, with its title where it has one.
        start: the first character of the part in the text.
        end: the character after its last one.
    """

    unit: str
    name: str
    start: int
    end: int

    def label(self) -> str:
        """As a person names it: "page 12", "chapter 3: The Storm"."""
        number, _, title = self.name.partition(" ")
        if self.unit != "sheet" and number.isdigit() and title:
            return f"{self.unit} {number}: {title}"
        return f"{self.unit} {self.name}"


@dataclass(frozen=True)
class Edit:
    """Characters of the text that normalization changed: text[start:end] was `original`."""

    start: int
    end: int
    original: str


@dataclass
class Document:
    """One document as a reader gives it: text in light Markdown, places in it, and what was left out and why."""

    kind: str
    text: str
    places: list[Place] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


Inner = Callable[[bytes, str], Document]
"""Reads a document that lies in another one, by its name."""


def told(left_out: Counter[str]) -> list[str]:
    """What was left out, each with how often it was, for `Document.left_out`."""
    return [f"{what} ({count} times)" if count > 1 else what for what, count in left_out.items()]


class Places:
    """Parts of one kind set one after the other, with an empty line between them."""

    def __init__(self, unit: str, heading: str = "") -> None:
        self._unit = unit
        self._texts = [heading] if heading else []
        self._length = len(heading)
        self._places: list[Place] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, name: str, text: str) -> None:
        start = self._length + 2 * bool(self._texts)
        self._length = start + len(text)
        self._places.append(Place(self._unit, name, start, self._length))
        self._texts.append(text)

    def result(self) -> tuple[str, list[Place]]:
        return "\n\n".join(self._texts), self._places


@dataclass
class FileReport:
    """What became of one file.

    Attributes:
        name: the path below the folder that was given, or the file's name.
        kind: "pdf", "docx", "text" …; empty where the kind is not known.
        characters: how many the text has.
        start: where the file's text starts in the reading.
        end: where it ends.
        places: its pages, chapters, sheets, slides or mails, as ranges of the reading's text.
        left_out: what was not read of it, and why.
        reason: why nothing of it was read; empty where it was.
    """

    name: str
    kind: str = ""
    characters: int = 0
    start: int = 0
    end: int = 0
    places: list[Place] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def was_read(self) -> bool:
        return not self.reason

    def cut(self, end: int) -> "FileReport":
        """The report on what of the file stands before a character of the text."""
        if not self.was_read or self.end <= end:
            return self
        if self.start >= end:
            return FileReport(self.name, self.kind, self.characters, reason="left out: the text was cut before it")
        places = [replace(place, end=min(place.end, end)) for place in self.places if place.start < end]
        return replace(self, end=end, places=places, left_out=[*self.left_out, "its end: the text was cut there"])

    def describe(self) -> str:
        """One line: the name and either the counts or the reason."""
        if self.reason:
            return f"{self.name}: {self.reason}"
        unit = self.places[0].unit if self.places else ""
        counts = [f"{len(self.places)} {unit}{'s' * (len(self.places) > 1)}"] if unit else []
        notes = [f"left out: {note}" for note in self.left_out]
        return f"{self.name}: " + "; ".join([", ".join([*counts, f"{self.characters:,} characters"]), *notes])


@dataclass
class Reading:
    """The text of all files that could be read, and a report on every file.

    Attributes:
        text: the normalized text; where there are several files each part is headed by its file's name.
        files: a report on each file, in the order of reading.
        edits: what normalization changed, in the order of the text.
    """

    text: str
    files: list[FileReport]
    edits: list[Edit] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return self.text

    def original(self, start: int, end: int) -> str:
        """The passage text[start:end] as the document spells it, before normalization."""
        parts, position = [], start
        for edit in self.edits[bisect_left(self.edits, start, key=lambda edit: edit.end) :]:
            if edit.start > end:
                break
            removed_here = edit.start == edit.end
            if removed_here or (edit.start < end and edit.end > start):
                parts += [self.text[position : edit.start], edit.original]
                position = edit.end
        return "".join(parts) + self.text[position:end]

    def place(self, position: int) -> tuple[FileReport, Place | None] | None:
        """The file and the place in it that hold a character of the text; None between files."""
        for report in self.files:
            if report.was_read and report.start <= position < report.end:
                inside = [place for place in report.places if place.start <= position < place.end]
                return report, inside[-1] if inside else None
        return None

    def cut(self, end: int) -> "Reading":
        """The reading of the text before a character: what lies behind it is told as left out."""
        if end >= len(self.text):
            return self
        files, edits = [report.cut(end) for report in self.files], [edit for edit in self.edits if edit.end <= end]
        return Reading(self.text[:end], files, edits)

    def counts(self) -> str:
        """How many files were read: "read 26 of 53 files"."""
        read = sum(report.was_read for report in self.files)
        return f"read {read} of {len(self.files)} file{'s' * (len(self.files) != 1)}"

    def summary(self) -> str:
        """One line: "read 26 of 53 files", what was not read and why, and what was read only in part."""
        skipped = [report.describe() for report in self.files if not report.was_read]
        partly = [f"{report.name} ({', '.join(report.left_out)})" for report in self.files if report.left_out]
        line = self.counts() + (f": {'; '.join(skipped)}" if skipped else "")
        return line + (f"; left out: {'; '.join(partly)}" if partly else "")

    def as_list(self) -> list[dict[str, object]]:
        """The reports as a file can hold them: places as their name, start and end."""
        return [
            {
                "name": report.name,
                "kind": report.kind,
                "characters": report.characters,
                "start": report.start,
                "end": report.end,
                "unit": report.places[0].unit if report.places else "",
                "places": [[place.name, place.start, place.end] for place in report.places],
                "left_out": report.left_out,
                "reason": report.reason,
            }
            for report in self.files
        ]
