"""Libraries of texts that share a question's words: which text answers, by words and with what is answered behind each.

    python -m tests.close_texts MODEL BOOK --set fresh [--libraries 1]

Every fact is in one of four texts; the three others speak of it without the answer, and have the same fact about other
names. Questions: in the words that all texts share; in other words; about what no text tells; about a name that one
text alone has. Keys are exact. One JSON line a kind of question: how many, for how many the right text is found by the
words, and with the model (`Library.route`, `answers`), how many answers behind it, and behind the right one, hold the
fact; of those that no text answers, for how many one is taken.
"""

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from nectar_mlx import models
from nectar_mlx.library import Library
from nectar_mlx.mlxlm import prompts
from tests import toys
from tests.library.cheap import CheapFitter

TEXTS, FACTS, UNTOLD = 4, 3, 2  # of a library; kinds of facts in it; names a kind of fact of which no text tells
TOKENS = 150  # of the book in each text
NUMBER = None  # of four digits
START = """
Har Os Tar Vel Quil Brack Mor Is Lin Pel Rush Cal Stave Thorn Or Wex Ash Dun East Fen Gars Hex In Jar Kel Lut Mar Nor
Pen Rip Tet Ux Ol Park Quorn Rom Sel Thir Ul Wans Yar Zen Al Bour Crick Dow Even Fro
"""
END = "wick mington ford don lan ley combe stow thwaite ham den mere by gate well holm"
# The fact, a question in its words, one in others, what the other texts say, and the values.
CHOOSING = (
    (
        "The access code of the {} depot is {v}",
        "What is the access code of the {} depot?",
        "Which digits open the door of the depot at {}?",
        "Nobody at the {} depot would tell us the access code",
        NUMBER,
    ),
    (
        "The number of crates in the {} store is {v}",
        "How many crates does the {} store hold?",
        "How large is the stock kept in the {} store?",
        "We never learnt how many crates the {} store may hold",
        NUMBER,
    ),
    (
        "The berth of the {} ferry is number {v}",
        "Which berth has the {} ferry?",
        "Where in the harbour does the boat to {} tie up?",
        "No one could say which berth the {} ferry has",
        NUMBER,
    ),
    (
        "The colour of the {} flag is {v}",
        "What is the colour of the {} flag?",
        "How is the banner of {} dyed?",
        "Poets praise the colour of the {} flag",
        ("purple", "orange", "silver", "brown"),
    ),
    (
        "The guide of the {} tour is {v}",
        "Who is the guide of the {} tour?",
        "Which person leads visitors through {}?",
        "We asked in vain who the guide of the {} tour is",
        ("Simon Hale", "Bertha Knox", "Emil Rand", "Clara Voss"),
    ),
    (
        "The {} museum opens at {v}",
        "When does the {} museum open?",
        "From what time can one visit the exhibits in {}?",
        "People stand in line before the {} museum opens",
        ("9.40", "8.15", "10.20", "7.50"),
    ),
)
JUDGED = (
    (
        "The annual rent of the {} mill is {v} crowns",
        "What is the annual rent of the {} mill?",
        "How much does one have to pay each year for the mill at {}?",
        "The annual rent of the {} mill was never made public",
        NUMBER,
    ),
    (
        "The {} chapel was built in the year {v}",
        "In which year was the {} chapel built?",
        "How old is the little church of {}?",
        "It is disputed in which year the {} chapel was built",
        ("1764", "1688", "1823", "1591"),
    ),
    (
        "The password of the {} archive is {v}",
        "What is the password of the {} archive?",
        "Which word lets me into the archive at {}?",
        "The password of the {} archive is a well-kept secret",
        ("bluebell", "thunder", "walnut", "compass"),
    ),
    (
        "The keeper of the {} lighthouse is {v}",
        "Who is the keeper of the {} lighthouse?",
        "Which person looks after the lighthouse at {}?",
        "Everybody has heard of the keeper of the {} lighthouse",
        ("Martha Quill", "Oscar Finch", "Helen Strand", "Jacob Lowe"),
    ),
    (
        "The {} bridge can carry a load of {v} tons",
        "What load can the {} bridge carry?",
        "How heavy may a waggon be that crosses the river at {}?",
        "The engineers argue about what load the {} bridge can carry",
        NUMBER,
    ),
    (
        "The {} express leaves from platform {v}",
        "From which platform does the {} express leave?",
        "Where in the station do I board the train to {}?",
        "Travellers ask from which platform the {} express may leave",
        ("14", "27", "35", "41"),
    ),
    (
        "The coat of arms of {} shows a {v}",
        "What does the coat of arms of {} show?",
        "Which animal is on the emblem of {}?",
        "Tourists photograph what the coat of arms of {} does show",
        ("heron", "badger", "salmon", "beaver"),
    ),
    (
        "The {} inn charges {v} shillings for a night",
        "How many shillings does the {} inn charge for a night?",
        "What does it cost to sleep in the inn at {}?",
        "Guests quarrel over how many shillings the {} inn may charge for a night",
        NUMBER,
    ),
    (
        "The dish that the {} tavern is known for is {v}",
        "What dish is the {} tavern known for?",
        "What should I eat when I visit the tavern in {}?",
        "The {} tavern is known for a dish",
        ("eel pie", "pea soup", "plum cake", "roast goose"),
    ),
)
FRESH = (
    (
        "The depth of the {} well is {v} feet",
        "What is the depth of the {} well?",
        "How far down is the water at {}?",
        "Children ask what the depth of the {} well is",
        NUMBER,
    ),
    (
        "The {} bakery closes at {v}",
        "When does the {} bakery close?",
        "Until what time can I buy bread in {}?",
        "People fear that the {} bakery may close",
        ("5.30", "6.15", "4.45", "7.10"),
    ),
    (
        "The owner of the {} quarry is {v}",
        "Who is the owner of the {} quarry?",
        "To which person does the stone pit of {} belong?",
        "Nobody has seen the owner of the {} quarry",
        ("Gilbert Stone", "Ada Morrow", "Felix Barlow", "Irene Cobb"),
    ),
    (
        "The wood of the {} altar is {v}",
        "What is the wood of the {} altar?",
        "Of which tree was the altar in {} made?",
        "Experts study the wood of the {} altar",
        ("oak", "maple", "cedar", "larch"),
    ),
    (
        "The flower of the {} guild is the {v}",
        "What is the flower of the {} guild?",
        "Which blossom do the craftsmen of {} wear?",
        "Songs are sung about the flower of the {} guild",
        ("tulip", "poppy", "violet", "lupin"),
    ),
    (
        "The number of steps in the {} tower is {v}",
        "What is the number of steps in the {} tower?",
        "How many stairs must one climb at {}?",
        "Visitors like to guess the number of steps in the {} tower",
        NUMBER,
    ),
    (
        "The toll on the {} road is {v} pence",
        "What is the toll on the {} road?",
        "How much does one pay to drive to {}?",
        "The toll on the {} road has been raised again",
        NUMBER,
    ),
    (
        "The composer of the {} hymn is {v}",
        "Who is the composer of the {} hymn?",
        "Which musician wrote the song of {}?",
        "The composer of the {} hymn is forgotten by most",
        ("Hugo Pratt", "Nora Lind", "Edgar Voyle", "Paula Wren"),
    ),
    (
        "The cargo of the {} barge is {v}",
        "What is the cargo of the {} barge?",
        "What does the boat from {} transport?",
        "The customs men inspect the cargo of the {} barge",
        ("slate", "barley", "copper", "wool"),
    ),
)
SETS = {"choosing": (CHOOSING, 11, 0, 5), "judged": (JUDGED, 12, 500, 6), "fresh": (FRESH, 13, 250, 7)}


def libraries(templates, seed):
    """Of each library the sentences that its texts tell, and the questions: (kind, text, question, value)."""
    chance, names = np.random.default_rng(seed), [start + end for start in START.split() for end in END.split()]
    chance.shuffle(names)
    names = iter(names)
    for at in range(0, len(templates), FACTS):
        planted, asked = [list[str]() for _ in range(TEXTS)], []
        for fact, question, reworded, mention, values in templates[at : at + FACTS]:
            told = values or [str(number) for number in chance.integers(1000, 10_000, TEXTS)]
            for text, value in enumerate(told):
                name = next(names)
                for other in range(TEXTS):
                    planted[other].append(fact.format(name, v=value) if other == text else mention.format(name))
                asked.append(("shared words", text, question.format(name), value))
                asked.append(("other words", text, reworded.format(name), value))
            for _ in range(UNTOLD):
                name = next(names)
                for other in range(TEXTS):
                    planted[other].append(mention.format(name))
                asked.append(("no answer", None, question.format(name), None))
        for text in range(TEXTS):
            fact, question, _, _, values = templates[at + text % FACTS]
            name = next(names)
            value = values[(text + 1) % TEXTS] if values else str(chance.integers(1000, 10_000))
            planted[text].append(fact.format(name, v=value))
            asked.append(("own words", text, question.format(name), value))
        yield planted, asked


def written(tokenizer, book, planted, offset, chance):
    """Texts of a piece of the book each, with the sentences between its own."""
    for number, told in enumerate(planted):
        start = 4 * (offset + 3000 * number)
        words = tokenizer.decode(tokenizer.encode(book[start : start + 4000])[5:TOKENS]).split(". ")
        told = chance.permutation(told)
        places = sorted(chance.integers(1, len(words) + 1, len(told)), reverse=True)
        for place, sentence in zip(places, told, strict=True):
            words.insert(place, sentence)
        yield ". ".join(words)


def measure(model, tokenizer, texts, asked, counts):
    files = [toys.exact(model, prompts.prefix(tokenizer, text)) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.txt") for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        library = Library(Path(folder, "library"))
        library.add(paths, CheapFitter())
        for kind, right, question, value in asked:
            said = {}

            def answer(number, question=question, said=said):
                if number not in said:
                    said[number] = files[number].first_sentence(model, tokenizer, question)
                return said[number]

            def answers(documents, answer=answer):
                return [answer(number_of(document)) for document in documents]

            count, start = counts[kind], time.process_time()
            taken = library.route(question, answers=answers).best
            count["seconds"] += time.process_time() - start
            first = library.route(question).best
            count["of"] += 1
            count["found"] += first is not None
            for way, candidate in (("by words", first), ("with the model", taken)):
                number = None if candidate is None else number_of(candidate.document)
                if right is not None and number is not None:
                    count[f"{way}: text"] += number == right
                    count[f"{way}: answer"] += value in answer(number)
            if right is not None:
                count["right text: answer"] += value in answer(right)


def number_of(document):
    return int(Path(document.name).stem)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("book", type=Path)
    parser.add_argument("--set", choices=SETS, default="fresh")
    parser.add_argument("--libraries", type=int, help="the first so many")
    parser.add_argument("--kinds", nargs="+", default=["shared words", "other words", "no answer", "own words"])
    arguments = parser.parse_args()
    model, tokenizer = models.load(arguments.model)
    templates, seed, offset, of_texts = SETS[arguments.set]
    counts, chance = defaultdict(Counter), np.random.default_rng(of_texts)
    for number, (planted, asked) in enumerate([*libraries(templates, seed)][: arguments.libraries]):
        texts = [*written(tokenizer, arguments.book.read_text(), planted, 1000 * number + offset, chance)]
        measure(model, tokenizer, texts, [fact for fact in asked if fact[0] in arguments.kinds], counts)
    for kind, count in counts.items():
        print(json.dumps({"questions": kind, **count, "seconds": round(count["seconds"], 1)}))


if __name__ == "__main__":
    main()
