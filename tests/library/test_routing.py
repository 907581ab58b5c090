"""From questions to documents: a hundred of them, in ten languages."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from nectar_mlx.library import Library, index
from nectar_mlx.library.routing import Candidate, Routing, with_answers, with_evidence
from tests.documents.makers import column, pdf
from tests.library import generated
from tests.library import generated_third as third
from tests.library.cheap import CheapFitter


def filled(folder: Path, made: generated.Generated) -> Library:
    (folder / "documents").mkdir()
    for number, text in enumerate(made.texts):
        (folder / "documents" / f"{number}.txt").write_text(text)
    library = Library(folder / "library")
    library.add([folder / "documents"], CheapFitter())
    return library


@pytest.mark.parametrize(
    "languages, plain, seed",
    [
        (generated.A, generated.PLAIN_A, 23),
        (generated.B, generated.PLAIN_B, 24),
        pytest.param(third.C, third.PLAIN_C, 1, marks=pytest.mark.slow),
        pytest.param(third.C_INFLECTED, {}, 6, marks=pytest.mark.slow),
    ],
    ids=["A", "B", "C", "inflected"],
)
def test_planted_facts_are_found_and_none_is_an_answer(tmp_path, languages, plain, seed):
    made = generated.generate(languages, plain, seed=seed)
    library = filled(tmp_path, made)
    first = three = refused = recognised = 0
    asked = [question for question in made.questions if question.document is not None]
    unrelated = [question for question in made.questions if question.document is None]
    start = time.perf_counter()
    for question in asked:
        routing = library.route(question.text)
        names = [candidate.document.name for candidate in routing.candidates]
        first += names[:1] == [f"{question.document}.txt"]
        three += f"{question.document}.txt" in names[:3]
        refused += not routing.found
    milliseconds = 1000 * (time.perf_counter() - start) / len(asked)
    recognised = sum(not library.route(question.text).found for question in unrelated)
    print(
        f"first {first / len(asked):.1%}, in three {three / len(asked):.1%}, refused {refused / len(asked):.1%}, "
        f"none recognised {recognised / len(unrelated):.1%}, {milliseconds:.1f} ms a question"
    )
    assert (len(asked), len(unrelated)) == (200, 100)
    assert first >= 0.95 * len(asked) and three >= 0.99 * len(asked)
    assert refused <= 0.05 * len(asked) and recognised >= 0.9 * len(unrelated)


@pytest.mark.parametrize(
    "forms",
    [
        ("בילודי", "בבילודי", "ובבילודי", "לבילודי"),
        ("ديتاجو", "لديتاجو", "وديتاجو"),
        ("كتاب", "بكتاب", "الكتاب", "والكتاب"),
        ("سامي", "لسامي", "بسامي"),
    ],
)
def test_letters_attached_to_a_word_make_no_other(forms):
    assert len({index.stem(form) for form in forms}) == 1 and index.stem(forms[0])


@pytest.fixture
def zoo(tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "Mietvertrag.txt").write_text("Die Kaution beträgt 900 Euro. Haustiere sind erlaubt.")
    (folder / "herons.txt").write_text("Herons stand in shallow water. " * 40 + "The heron Olga was ringed in 1987.")
    (folder / "note.txt").write_text("Buy milk, bread and a new kettle.")
    pages = [
        f"Page about the {animal}. The {animal} eats {food}."
        for animal, food in (("otter", "crayfish"), ("lynx", "hares"))
    ]
    (folder / "animals.pdf").write_bytes(pdf(*[column([page]) for page in pages]))
    library = Library(tmp_path / "library")
    library.add([folder], CheapFitter())
    return library


@pytest.mark.parametrize(
    "question, name",
    [
        ("In which year was the heron Olga ringed?", "herons.txt"),
        ("Was steht im Mietvertrag?", "Mietvertrag.txt"),
        ("Sind Haustiere erlaubt?", "Mietvertrag.txt"),
        ("which kettles do I need to buy?", "note.txt"),
    ],
)
def test_the_document_is_found(zoo, question, name):
    routing = zoo.route(question)
    assert routing.best is not None and routing.best.document.name == name


def test_the_page_is_named(zoo):
    assert zoo.route("What does the lynx eat?").best.describe() == "animals.pdf, page 2"
    assert zoo.route("What does the otter eat?").best.describe() == "animals.pdf, page 1"


@pytest.mark.parametrize(
    "question", ["Who won the chess olympiad in Baku?", "Wie hoch ist der Eiffelturm?", "?", "", "谁是国王?"]
)
def test_none_of_them_is_an_answer(zoo, question):
    routing = zoo.route(question)
    assert not routing.found and routing.best is None and routing.close == []


def test_an_empty_library_answers_nothing(tmp_path):
    assert not Library(tmp_path).route("Who is there?").found


def test_close_documents_are_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"The boiler of house {name} was serviced by Mister Vance.")
    library = Library(tmp_path / "library")
    library.add([tmp_path / "a.txt", tmp_path / "b.txt"], CheapFitter())
    routing = library.route("Who serviced the boiler?")
    assert {routing.best.document.name, *(c.document.name for c in routing.close)} == {"a.txt", "b.txt"}


def with_nats(zoo, odds, nats, *, scores=(5.0, 3.0, 2.0)):
    documents = [document for document in zoo.documents() if document.file][:3]
    routing = Routing([Candidate(d, score) for d, score in zip(documents, scores, strict=True)], odds)
    return documents, with_evidence(routing, lambda seen: nats[: len(seen)])


def test_the_model_decides_where_words_leave_doubt(zoo):
    documents, routing = with_nats(zoo, -0.5, [-60.0, -30.0, -55.0])
    assert routing.found and routing.best.document == documents[1]
    for odds in (0.5, -0.5):
        documents, routing = with_nats(zoo, odds, [-60.0, -58.0, -55.0])
        assert routing.odds == odds and routing.candidates[0].document == documents[0]


def test_the_model_is_not_asked_without_doubt(zoo):
    for odds in (9.0, -9.0):
        documents, routing = with_nats(zoo, odds, [])
        assert routing.odds == odds and [c.document for c in routing.candidates] == documents


def test_what_the_model_cannot_say_changes_nothing(zoo):
    documents, routing = with_nats(zoo, 0.5, [float("nan"), -30.0, float("nan")])
    assert routing.odds == 0.5 and [c.document for c in routing.candidates] == documents


def test_close_documents_with_files_are_asked_and_four_at_most(zoo):
    (one,) = (document for document in zoo.documents() if document.name == "note.txt")
    documents = [replace(one, path=bytes([65 + n]), file=None if n == 1 else one.file) for n in range(7)]
    routing = Routing([Candidate(document, 1 - n / 100) for n, document in enumerate(documents)], 1.0)
    seen = []

    def answers(asked):
        seen.extend(document.name for document in asked)
        return ["The year is 1999.", "", "The year is 1987."]

    texts = dict(zip("ABCDEFG", ["Bread.", "Milk.", "Kettles.", "In the year 1987."] * 2, strict=False))
    decided = with_answers(routing, "What year?", answers, lambda document: texts[document.name])
    assert seen == ["A", "C", "D"], "of the first four, those with a file"
    assert [candidate.document.name for candidate in decided.candidates] == list("DABCEFG")
    assert (
        decided.odds == 1.0
        and [c.support is not None for c in decided.candidates] == [True, True, False, True] + [False] * 3
    )
    assert {"A", "C"} <= {candidate.document.name for candidate in decided.close}


def test_documents_are_not_asked_where_one_stands_alone_or_none_answers(zoo):
    def answers(asked):
        raise AssertionError("asked")

    for question in ("In which year was the heron Olga ringed?", "Who won the chess olympiad in Baku?"):
        assert zoo.route(question, answers=answers) == zoo.route(question)
