"""Generated texts: a ship's log full of exact facts, with a question for each, and a long technical manual.

    python -m nectar_mlx.evaluation.texts log --words 3000 --output log.txt --questions log.jsonl
    python -m nectar_mlx.evaluation.texts manual --words 5000 --output manual.txt

The questions are JSON lines for `nectar evaluate --questions`: question, answer, depth (the fact's place in the
text), and choices: a sentence with the right answer, and seven with wrong ones. Small models can choose the right one
long before they can write it.
"""

import argparse
import importlib
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path

from ..errors import NectarError

_PORTS = "Ostend Bergen Lisbon Cadiz Genoa Smyrna Riga Danzig Leith Hull Havre Palermo Odessa Tunis Naples".split()  # noqa: SIM905
_GOODS = "barley timber salt wool copper amber tar flax cork marble olives indigo hemp tallow cinnamon slate".split()  # noqa: SIM905
_FIRST = "Anna Karel Ines Tomas Greta Piet Sofia Marten Elsa Jonas Lena Hendrik Clara Anton Marie Lucas".split()  # noqa: SIM905
_LAST = "Velde Okker Sund Marchetti Brandt Lowe Dragan Quist Haldane Ferro Novak Teague Ruiz Winter Kroon".split()  # noqa: SIM905
_SHIPS = "Heron Meridian Albatross Constance Swift Polaris Osprey Harvest Minerva Juniper Teal Corona Linnet".split()  # noqa: SIM905
_FILL = (
    "The wind held from the {wind} all day, and the watch had little to do but mend canvas.",
    "Towards evening the sky cleared in the {wind}, and the cook was seen on deck for the first time in a week.",
    "We pumped the well twice; the carpenter is satisfied with the new planking on the {side} side.",
    "A long swell ran from the {wind}. Two of the younger hands were ill, and were given ginger.",
    "The mate complained of the biscuit again, and he was right to do so.",
    "Nothing was sighted until dusk, when a school of porpoises kept us company on the {side} side.",
)
_START = date(1847, 3, 2)
_CHOICES = 8
MODULES: tuple[str, ...] = (
    *("argparse", "asyncio", "collections", "csv", "datetime", "decimal", "email", "fractions", "heapq", "json"),
    *("logging", "pathlib", "random", "sqlite3", "statistics", "string", "subprocess", "tarfile", "threading"),
)


Draw = Callable[[random.Random], str]


@dataclass(frozen=True)
class _Entry:
    """A question about one sentence of the log. statement: with {} in the answer's place. draw: a random answer of that
    kind."""

    question: str
    statement: str
    answer: str
    draw: Draw

    def choices(self, rng: random.Random) -> tuple[str, ...]:
        """The true statement among seven wrong ones; wrong numbers have as many digits."""
        answers = {self.answer}
        while len(answers) < _CHOICES:
            other = self.draw(rng)
            if not other.isdigit() or len(other) == len(self.answer):
                answers.add(other)
        return tuple(self.statement.format(answer) for answer in sorted(answers))


@dataclass(frozen=True)
class Fact:
    """A question with its only answer, the answer's place in the text, 0 … 1, and statements of which one is true."""

    question: str
    answer: str
    depth: float
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """A text and its facts, in the order of the text."""

    text: str
    facts: list[Fact]

    def questions(self) -> str:
        """JSON lines."""
        return "".join(json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in self.facts)


def ships_log(*, words: int, seed: int = 0) -> Facts:
    """A log of about `words` words, one entry a day; every entry has a few facts that are nowhere else.

    Ships that are met, passengers and cargoes are each named once, so that every question has one answer.
    """
    rng = random.Random(seed)
    met, passengers = _pairs(rng, ("barque", "brig", "schooner", "ketch"), _SHIPS), _pairs(rng, _FIRST, _LAST)
    wrong = random.Random(seed)  # a second generator, so that the text does not depend on the choices
    day = _START
    paragraphs = [
        "The log of the brig Aurora, kept by her master.\n\n"
        "We left harbour in good order, all hands aboard, the ship newly caulked and the stores complete."
    ]
    placed: list[tuple[int, _Entry]] = []  # with the position in the text
    length = 0
    while length < words:
        day += timedelta(days=rng.randint(1, 4))
        sentences, templates = _day_of(rng, day, next(met), next(passengers))
        sentences.insert(rng.randint(1, len(sentences)), rng.choice(_FILL).format(wind=_wind(rng), side=_side(rng)))
        entry = f"{_date(day)}. " + " ".join(sentences)
        start = sum(len(p) + 2 for p in paragraphs)
        placed += [(start + entry.find(sentence), template) for sentence, template in templates]
        paragraphs.append(entry)
        length += len(entry.split())
    text = "\n\n".join(paragraphs) + "\n"
    placed.sort(key=lambda pair: pair[0])
    facts = [Fact(t.question, t.answer, round(at / len(text), 4), t.choices(wrong)) for at, t in placed]
    return Facts(text, facts)


def _day_of(rng: random.Random, day: date, ship: str, person: str) -> tuple[list[str], list[tuple[str, _Entry]]]:
    """The sentences of one day, and the questions about them."""
    port, goods, casks = _port(rng), _goods(rng), _casks(rng)
    cabin, fare, crew = _cabin(rng), _fare(rng), str(rng.randint(7, 60))
    master, today = _name(rng), _date(day)
    pools = [
        (
            f"At noon we spoke the {ship}, {crew} men, master {master}, out of {port} with {casks} casks of {goods}.",
            [
                _Entry(f"How many casks did the {ship} carry?", f"The {ship} carried {{}} casks.", casks, _casks),
                _Entry(f"What was in the casks of the {ship}?", f"The {ship} carried casks of {{}}.", goods, _goods),
                _Entry(f"Who was master of the {ship}?", f"The master of the {ship} was {{}}.", master, _name),
                _Entry(f"From which port did the {ship} come?", f"The {ship} came from {{}}.", port, _port),
            ],
        ),
        (
            f"A passenger, {person}, came aboard on {today} and took cabin number {cabin} for {fare} shillings.",
            [
                _Entry(f"Which cabin did {person} take?", f"{person} took cabin number {{}}.", cabin, _cabin),
                _Entry(f"How many shillings did {person} pay?", f"{person} paid {{}} shillings.", fare, _fare),
                _Entry(f"On which date did {person} come aboard?", f"{person} came aboard on {{}}.", today, _some_date),
            ],
        ),
    ]
    rng.shuffle(pools)
    return [sentence for sentence, _ in pools], [(sentence, rng.choice(facts)) for sentence, facts in pools]


def _pairs(rng: random.Random, first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    """All pairs in random order, then again with a numeral: never the same name twice."""
    for turn in range(1, 1000):
        names = [f"{a} {b}" for a in first for b in second]
        rng.shuffle(names)
        yield from (name if turn == 1 else f"{name} the {turn}th" for name in names)


def _date(day: date) -> str:
    return f"{day.day} {day:%B} {day.year}"


def _some_date(rng: random.Random) -> str:
    return _date(_START + timedelta(days=rng.randint(1, 600)))


def _port(rng: random.Random) -> str:
    return rng.choice(_PORTS)


def _goods(rng: random.Random) -> str:
    return rng.choice(_GOODS)


def _casks(rng: random.Random) -> str:
    return str(rng.randint(13, 980))


def _cabin(rng: random.Random) -> str:
    return str(rng.randint(2, 40))


def _fare(rng: random.Random) -> str:
    return str(rng.randint(41, 399))


def _name(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"


def _wind(rng: random.Random) -> str:
    return rng.choice(("north", "north-west", "west", "south-west", "south", "east"))


def _side(rng: random.Random) -> str:
    return rng.choice(("larboard", "starboard"))


def manual(*, words: int, modules: Sequence[str] = MODULES) -> str:
    """A technical text of about `words` words: signatures and docstrings of Python's own library."""
    sections, length = ["The Python library: a reference, from its own documentation."], 0
    for name in modules:
        for section in _sections(name):
            if length >= words:
                return "\n\n".join(sections) + "\n"
            sections.append(section)
            length += len(section.split())
    return "\n\n".join(sections) + "\n"


def _sections(name: str) -> Iterator[str]:
    """A module's docstring, then those of its public functions, classes and methods with their signatures."""
    module = importlib.import_module(name)
    yield f"Module {name}\n\n{inspect.getdoc(module) or ''}".strip()
    for title, member in inspect.getmembers(module):
        if title.startswith("_") or not (inspect.isclass(member) or inspect.isfunction(member)):
            continue
        yield from _described(f"{name}.{title}", member)
        if inspect.isclass(member):
            for method, function in inspect.getmembers(member, inspect.isfunction):
                if not method.startswith("_"):
                    yield from _described(f"{name}.{title}.{method}", function)


def _described(title: str, member: object) -> Iterator[str]:
    text = inspect.getdoc(member)
    if not text:
        return
    try:
        signature = str(inspect.signature(member))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        signature = ""
    # Default values that are objects print their address, another one in every process.
    yield f"{title}{'' if ' at 0x' in signature else signature}\n\n{text}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nectar_mlx.evaluation.texts", description="Writes a text to evaluate with.")
    parser.add_argument("kind", choices=("log", "manual"), help="a ship's log full of facts, or a technical manual")
    parser.add_argument("--words", type=int, default=3000, help="about how long (default 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the log (default 0)")
    parser.add_argument("--output", required=True, metavar="FILE", help="file for the text")
    parser.add_argument("--questions", metavar="FILE", help="file for the log's questions, as JSON lines")
    try:
        _write(parser.parse_args(argv))
    except NectarError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _write(arguments: argparse.Namespace) -> None:
    if arguments.words < 1:
        raise NectarError("--words must be positive")
    if arguments.kind == "log":
        log = ships_log(words=arguments.words, seed=arguments.seed)
        outputs = {arguments.output: log.text}
        if arguments.questions:
            outputs[arguments.questions] = log.questions()
    else:
        outputs = {arguments.output: manual(words=arguments.words)}
    for path, text in outputs.items():
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise NectarError(f"cannot write {path}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
