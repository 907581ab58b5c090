"""Texts written by program: a ship's log full of exact facts, with a question for each, and a long technical manual.

    python -m nectar_mlx.texts log --words 3000 --output log.txt --questions log.jsonl
    python -m nectar_mlx.texts manual --words 5000 --output manual.txt

The questions are JSON lines for `nectar evaluate --questions`: question, answer, and depth, where the fact stands.
"""

import argparse
import importlib
import inspect
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path

from . import cli
from .errors import NectarError

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
MODULES: tuple[str, ...] = (
    *("argparse", "asyncio", "collections", "csv", "datetime", "decimal", "email", "fractions", "heapq", "json"),
    *("logging", "pathlib", "random", "sqlite3", "statistics", "string", "subprocess", "tarfile", "threading"),
)


@dataclass(frozen=True)
class Fact:
    """A question with its one answer, and how deep in the text it stands, 0 … 1."""

    question: str
    answer: str
    depth: float


@dataclass(frozen=True)
class Facts:
    """A text and what can be asked about it, in the order of the text."""

    text: str
    facts: list[Fact]

    def questions(self) -> str:
        """JSON lines."""
        return "".join(json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in self.facts)


def ships_log(*, words: int, seed: int = 0) -> Facts:
    """A log of about so many words, one entry a day; every entry holds a few facts that stand nowhere else.

    Ships that are met, passengers and cargoes are each named once, so that every question has one answer.
    """
    rng = random.Random(seed)
    met, passengers = _pairs(rng, ("barque", "brig", "schooner", "ketch"), _SHIPS), _pairs(rng, _FIRST, _LAST)
    day = date(1847, 3, 2)
    parts = [
        "The log of the brig Aurora, kept by her master.\n\n"
        "We left harbour in good order, all hands aboard, the ship newly caulked and the stores complete."
    ]
    found: list[tuple[int, str, str]] = []
    length = 0
    while length < words:
        day += timedelta(days=rng.randint(1, 4))
        sentences, facts = _entry(rng, day, next(met), next(passengers))
        sentences.insert(rng.randint(1, len(sentences)), rng.choice(_FILL).format(wind=_wind(rng), side=_side(rng)))
        entry = f"{_date(day)}. " + " ".join(sentences)
        at = sum(len(p) + 2 for p in parts)
        found += [(at + entry.find(sentence), question, answer) for sentence, question, answer in facts]
        parts.append(entry)
        length += len(entry.split())
    text = "\n\n".join(parts) + "\n"
    return Facts(text, [Fact(q, a, round(at / len(text), 4)) for at, q, a in sorted(found)])


def _entry(rng: random.Random, day: date, ship: str, person: str) -> tuple[list[str], list[tuple[str, str, str]]]:
    """The sentences of one day; and sentence, question and answer of each of its facts."""
    port, goods, casks = rng.choice(_PORTS), rng.choice(_GOODS), str(rng.randint(13, 980))
    cabin, fare, crew = str(rng.randint(2, 40)), str(rng.randint(41, 399)), str(rng.randint(7, 60))
    master = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
    pools = [
        (
            f"At noon we spoke the {ship}, {crew} men, master {master}, out of {port} with {casks} casks of {goods}.",
            [
                (f"How many casks did the {ship} carry?", casks),
                (f"What was in the casks of the {ship}?", goods),
                (f"Who was master of the {ship}?", master),
                (f"From which port did the {ship} come?", port),
            ],
        ),
        (
            f"A passenger, {person}, came aboard on {_date(day)} and took cabin number {cabin} for {fare} shillings.",
            [
                (f"Which cabin did {person} take?", cabin),
                (f"How many shillings did {person} pay?", fare),
                (f"On which date did {person} come aboard?", _date(day)),
            ],
        ),
    ]
    rng.shuffle(pools)
    return [sentence for sentence, _ in pools], [(sentence, *rng.choice(facts)) for sentence, facts in pools]


def _pairs(rng: random.Random, first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    """All pairs in random order, then again with a numeral: never the same name twice."""
    for turn in range(1, 1000):
        names = [f"{a} {b}" for a in first for b in second]
        rng.shuffle(names)
        yield from (name if turn == 1 else f"{name} the {turn}th" for name in names)


def _date(day: date) -> str:
    return f"{day.day} {day:%B} {day.year}"


def _wind(rng: random.Random) -> str:
    return rng.choice(("north", "north-west", "west", "south-west", "south", "east"))


def _side(rng: random.Random) -> str:
    return rng.choice(("larboard", "starboard"))


def manual(*, words: int, modules: Sequence[str] = MODULES) -> str:
    """A technical text of about so many words: signatures and docstrings of Python's own library."""
    parts, length = ["The Python library: a reference, from its own documentation."], 0
    for name in modules:
        for section in _sections(name):
            if length >= words:
                return "\n\n".join(parts) + "\n"
            parts.append(section)
            length += len(section.split())
    return "\n\n".join(parts) + "\n"


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
    parser = cli.Parser("texts", "Write a text to evaluate with.")
    parser.add_argument("kind", choices=("log", "manual"), help="a ship's log full of facts, or a technical manual")
    parser.add_argument("--words", type=int, default=3000, help="about how long (default 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the log")
    parser.add_argument("--output", required=True, metavar="FILE", help="where the text goes")
    parser.add_argument("--questions", metavar="FILE", help="where the log's questions go, as JSON lines")
    return cli.run(parser, _work, argv)


def _work(arguments: argparse.Namespace) -> None:
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
