"""Sources of planted facts: the right page, chapter, sheet or mail; and which sentences of an answer are supported.

Measured on a set that no constant was chosen on: `-s` prints the figures.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from nectar_mlx import documents
from nectar_mlx.retrieval import citing, sources
from nectar_mlx.retrieval.passages import Passages
from tests.retrieval import planted

DOCUMENTS, EACH = 10, 10
Case = tuple[Passages, planted.Fact]


def cases(folder: Path, name: str, maker: Callable[[Path, planted.Parts], None], seed: int) -> list[Case]:
    """100 facts, each with the document that it is in."""
    found: list[Case] = []
    for number in range(DOCUMENTS):
        parts, facts = planted.planted(planted.MEASURED, seed + number, EACH)
        path = folder / f"{number}.{name}"
        maker(path, parts)
        passages = Passages(documents.read([path]))
        found += [(passages, fact) for fact in facts]
    return found


def is_right(case: Case, unit: str, answer: str) -> bool:
    passages, fact = case
    found = sources.find(passages, fact.question, answer)
    return bool(found) and found[0].place.partition(":")[0].replace("sheet S", "sheet ") == f"{unit} {fact.part}"


@pytest.mark.parametrize(
    ("name", "maker", "unit"),
    [
        ("pdf", planted.two_columns, "page"),
        ("epub", planted.chapters, "chapter"),
        ("xlsx", planted.sheets, "sheet"),
        ("mbox", planted.mails, "mail"),
    ],
)
def test_the_first_source_is_in_the_right_part(
    name: str, maker: Callable[[Path, planted.Parts], None], unit: str, tmp_path: Path
) -> None:
    found = cases(tmp_path, name, maker, seed=1000)
    for kind in ("short", "answer"):
        right = sum(is_right(case, unit, getattr(case[1], kind)) for case in found)
        print(f"{unit} right, {kind}: {right} of {len(found)}")
        assert len(found) == 100 and right >= 95


def test_supported_sentences_are_told_from_made_up_ones(tmp_path: Path) -> None:
    kept = missed = caught = lost = 0
    for passages, fact in cases(tmp_path, "pdf", planted.two_columns, seed=2000):
        cited = citing.cite(passages, fact.question, " ".join([fact.answer, *fact.wrong]), [])
        supported = [sentence.source is not None for sentence in cited.sentences]
        kept += supported[0]
        lost += not supported[0]
        missed += sum(supported[1:])
        caught += len(supported) - 1 - sum(supported[1:])
    print(f"supported: {kept} kept, {lost} lost; made up: {caught} caught, {missed} missed")
    assert kept >= 0.95 * (kept + lost) and caught >= 0.9 * (caught + missed)
