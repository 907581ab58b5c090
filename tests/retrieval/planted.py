"""Documents with planted facts: every fact stands in one part (page, chapter, sheet, mail), and others share its words.

A fact has a subject ("the Heron pump"), a property and a value. Around it stand sentences about the same subject with
another property, and about another subject with the same property. Question and answer do not repeat the sentence. The
two sets share no subject, no wording and no layout: constants were chosen on one, figures are measured on the other.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import openpyxl

from tests.documents.makers import Text, column, pdf, write, zipped
from tests.documents.test_epub import CONTAINER

Draw = Callable[[random.Random], str]
Parts = list[list[str]]
_FAMILIES = [
    "Okafor",
    "Lindqvist",
    "Marchetti",
    "Duval",
    "Petrov",
    "Nakamura",
    "Brandt",
    "Siqueira",
    "Halloran",
    "Yilmaz",
    "Costa",
    "Novak",
    "Osei",
]


@dataclass(frozen=True)
class Set:
    """properties: statement | question | short answer | answer in a sentence, and how the value is drawn."""

    subjects: Sequence[str]
    properties: Sequence[tuple[str, Draw]]
    filler: Sequence[str]
    parts: int


@dataclass(frozen=True)
class Fact:
    """part: the number, from 1, of the part it stands in. wrong: sentences that the document does not support."""

    part: int
    statement: str
    question: str
    short: str
    answer: str
    wrong: tuple[str, ...]


def _count(low: int, high: int, unit: str = "") -> Draw:
    return lambda rng: f"{rng.randrange(low, high):,}{unit}"


def _year(low: int, high: int) -> Draw:
    return lambda rng: str(rng.randrange(low, high))


def _person(*given: str) -> Draw:
    return lambda rng: f"{rng.choice(given)} {rng.choice(_FAMILIES)}"


TUNING = Set(
    [
        f"the {a} {b}"
        for a in ["Heron", "Osprey", "Falcon", "Kestrel", "Merlin", "Plover"]
        for b in ["pump", "valve", "press"]
    ],
    [
        (
            "The service interval of {s} is {v}. | How often must {s} be serviced? | Every {v}. | "
            "{S} must be serviced every {v}.",
            _count(400, 9900, " hours"),
        ),
        ("{S} was delivered in {v}. | When did {s} arrive? | In {v}. | {S} arrived in {v}.", _year(1950, 2020)),
        (
            "Its maker gives {s} a pressure of {v} at most. | What pressure can {s} stand? | {v}. | "
            "{S} stands a pressure of {v}.",
            _count(11, 99, ".5 bar"),
        ),
        (
            "{v} is in charge of {s} since the reform. | Who is responsible for {s}? | {v}. | "
            "{v} is responsible for {s}.",
            _person("Ana", "Jon", "Mia", "Leo"),
        ),
        (
            "The price of {s} came to {v} before tax. | How much did {s} cost? | {v}. | {S} cost {v}.",
            _count(1100, 99000, " euros"),
        ),
    ],
    [
        "The hall was painted again in spring, and the roof holds.",
        "Every shift writes down what it has seen, and signs the sheet.",
        "Spare parts are kept in the store behind the canteen.",
        "Visitors wear a helmet and stay behind the yellow line.",
        "The board met four times, and agreed on most questions.",
    ],
    parts=8,
)

MEASURED = Set(
    [
        f"{b} {a}"
        for a in ["Almeria", "Bergen", "Cadiz", "Dundee", "Esbjerg", "Faro"]
        for b in ("the ferry", "the lighthouse at", "the depot in")
    ],
    [
        (
            "Up to {v} may be on board or inside of {s} at a time. | What is the capacity of {s}? | {v}. | "
            "{S} has a capacity of {v}.",
            _count(12, 1900, " people"),
        ),
        (
            "Work on {s} began in the year {v}. | In which year was {s} started? | {v}. | Building {s} started in {v}.",
            _year(1850, 1990),
        ),
        (
            "For {s} the insurers ask {v} a year. | What does the insurance for {s} cost? | {v} per year. | "
            "Insurance for {s} costs {v} per year.",
            _count(2100, 88000, " crowns"),
        ),
        (
            "The keys to {s} are with {v}. | Who has the keys to {s}? | {v} has them. | {v} holds the keys to {s}.",
            _person("Ruth", "Omar", "Ines", "Karl"),
        ),
        (
            "Measured from the bridge, {s} lies {v} to the north. | How far is {s} from the bridge? | {v}. | "
            "{S} is {v} north of the bridge.",
            _count(2, 98, ".4 km"),
        ),
        (
            "In the storm {s} lost {v}. | What damage did the storm do to {s}? | It lost {v}. | "
            "The storm cost {s} {v}.",
            _count(3, 60, " windows"),
        ),
    ],
    [
        "Storms from the west are the rule in the north, and people board up their windows by October.",
        "A report on costs, insurance and damage is due each year in June.",
        "The bridge carries the road and, since the war, the tram.",
        "Nobody may enter without a pass, and keys are handed out at the gate.",
        "Capacity is not the trouble; staff is, and has been for years.",
        "Fishing has declined, but the market on Thursdays draws a crowd from far inland.",
    ],
    parts=12,
)


def planted(chosen: Set, seed: int, facts: int) -> tuple[Parts, list[Fact]]:
    """The sentences of each part of a document, and some of the facts in it."""
    rng = random.Random(seed)
    subjects = rng.sample(chosen.subjects, min(len(chosen.subjects), 2 * facts))
    table = {(s, p): draw(rng) for s in subjects for p, (_, draw) in enumerate(chosen.properties)}
    keys = list(table)
    rng.shuffle(keys)
    where = {key: rng.randrange(chosen.parts) for key in keys[: len(keys) * 3 // 4]}
    parts: Parts = [rng.choices(chosen.filler, k=rng.randrange(3, 9)) for _ in range(chosen.parts)]
    for (subject, prop), part in where.items():
        parts[part].append(_said(chosen.properties[prop][0].split(" | ")[0], subject, table[subject, prop]))
    for part in parts:
        rng.shuffle(part)
    asked = list(where)[:facts]
    return parts, [_fact(chosen, rng, key, table, where) for key in asked]


def _fact(
    chosen: Set, rng: random.Random, key: tuple[str, int], table: dict[tuple[str, int], str], where: dict
) -> Fact:
    (subject, prop), value = key, table[key]
    wording, draw = chosen.properties[prop]
    statement, question, short, answer = (_said(text, subject, value) for text in wording.split(" | "))
    others = [s for s, p in where if p == prop and s != subject and table[s, p] != value]
    values = [table[rng.choice(others), prop], draw(rng)]  # another one's, and a new one
    sentence = wording.split(" | ")[3]
    wrong = [_said(sentence, subject, other) for other in values if other != value]
    wrong.append(_said(sentence, rng.choice(others), value))  # this value of another one
    return Fact(where[key] + 1, statement, question, short, answer, tuple(wrong))


def _said(text: str, subject: str, value: str) -> str:
    said = text.format(s=subject, S=subject[0].upper() + subject[1:], v=value)
    return said[0].upper() + said[1:]


def _wrapped(sentences: Sequence[str], width: int) -> list[str]:
    lines, line = list[str](), ""
    for word in " ".join(sentences).split():
        if len(line) + len(word) >= width:
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
    return [*lines, line]


def one_column(path: Path, parts: Parts) -> None:
    write(path, pdf(*[column(_wrapped(sentences, 80)) for sentences in parts]))


def two_columns(path: Path, parts: Parts) -> None:
    """With running heads and page numbers."""
    pages: list[list[Text]] = []
    for number, sentences in enumerate(parts, 1):
        lines = _wrapped(sentences, 42)
        half = (len(lines) + 1) // 2
        margins = [(50.0, 800.0, 9.0, "Annual Review of the Harbour Works"), (290.0, 30.0, 9.0, str(number))]
        left, right = column(lines[:half], size=10), column(lines[half:], left=320, size=10)
        pages.append([*margins, *left, *right])
    write(path, pdf(*pages))


def chapters(path: Path, parts: Parts) -> None:
    """Sentences of an EPUB, each a paragraph."""
    names = [f"c{number}.xhtml" for number in range(1, len(parts) + 1)]
    items = "".join(f'<item id="{name}" href="{name}"/>' for name in names)
    spine = "".join(f'<itemref idref="{name}"/>' for name in names)
    package = f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>"
    texts = {
        f"OEBPS/{name}": f"<h1>Part</h1>{''.join(f'<p>{sentence}</p>' for sentence in part)}"
        for name, part in zip(names, parts, strict=True)
    }
    write(path, zipped({"META-INF/container.xml": CONTAINER, "OEBPS/book.opf": package, **texts}))


def sheets(path: Path, parts: Parts) -> None:
    """Sentences of a workbook, each in a row with a number."""
    workbook = openpyxl.Workbook()
    workbook.remove(workbook.worksheets[0])
    for number, part in enumerate(parts, 1):
        sheet = workbook.create_sheet(f"S{number}")
        for row, sentence in enumerate(part):
            sheet.append([row, sentence])
    workbook.save(path)


def mails(path: Path, parts: Parts) -> None:
    start = "From a@example.org Mon Jan  1 00:00:00 2024\nFrom: a@example.org\nSubject: Notes\n\n"
    write(path, "".join(f"{start}{chr(10).join(_wrapped(part, 70))}\n\n" for part in parts))
