"""Facts planted in several texts: how well they are told with all texts read as one, put together, or one chosen.

    python -m tests.texts_together MODEL BOOK --texts 4 --budget 4% [--effort best] [--views "end to end" …]

MODEL: as for `nectar fit`: a name, a folder or a .gguf file. BOOK: a text that is cut into documents. Every document
gets six facts with a number: three whose question names a word that no other text has, and three of which other texts
speak, too, without the number, so that every word of the question is in several texts. The model is given the sentence
that tells the fact, up to the number: right where every token of the number is the likeliest one; and the mean
log-probability of the number. Keys and values are exact, which bounds what fitted files can reach; with a budget, each
text is also fitted by itself. All texts read as one are a text for themselves. One JSON line a fit and a view: of each
kind of question how many are right, of how many, and the mean log-probability. At last the same as a table.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from nectar_mlx import Nectar, models
from nectar_mlx.composition import compose
from nectar_mlx.fitting.config import EFFORTS, effort
from nectar_mlx.library import Library
from nectar_mlx.mlxlm import prompts
from nectar_mlx.mlxlm.kept import widened
from tests import toys
from tests.library.cheap import CheapFitter

VIEWS = ["read as one", "end to end", "side by side", "the right text", "the routed text", "the surest text"]
SURE = 3  # tokens of an answer by which the surest text is chosen
BATCH = 8  # facts that are read together
KINDS = ("own words", "shared words")
FACTS = (
    (
        "What is the access code of the {} depot?",
        "The access code of the {} depot is",
        "Nobody at the {} depot would tell us the access code",
    ),
    (
        "How many crates does the {} store hold?",
        "The number of crates in the {} store is",
        "We never learnt how many crates the {} store may hold",
    ),
    (
        "Which berth has the {} ferry?",
        "The berth of the {} ferry is number",
        "No one could say which berth the {} ferry has",
    ),
)
MOST = 8  # texts
_NAMES = """
Harwick Osmington Tarrant Velden Quillan Brackley Moran Istrad Lindor Pellam Rushden Calder Stavely Thornby Orms Wexley
Ashby Dunmore Eastrey Fenwick Garston Hexley Ingram Jarrow Kelso Lutton Marden Norham Penrith Ripley Tetbury Uxley
Olney Parkend Quorn Romsey Selby Thirsk Ulver Wansford Yarm Zennor Alford Bourne Crick Dowlish Evenley Frome
"""
NAMES = [line.split() for line in _NAMES.strip().splitlines()]  # for each kind of fact


def documents(tokenizer, book, count, tokens):
    """Texts of so many tokens, each with three facts of its own and three of which two or three others speak without
    the number, and their questions: (document, kind, question, sentence, number). The first texts of more are the
    same."""
    ids, chance, asked = tokenizer.encode(book), np.random.default_rng(7), []
    planted = [list[str]() for _ in range(MOST)]
    for document in range(MOST):
        for kind, shift in zip(KINDS, (0, MOST), strict=True):
            for (question, sentence, mention), names in zip(FACTS, NAMES, strict=True):
                name, number = names[document + shift], str(chance.integers(1000, 10_000))
                asked.append((document, kind, question.format(name), sentence.format(name), number))
                planted[document].append(f"{sentence.format(name)} {number}")
                for other in range(MOST) if shift else ():
                    if other != document and other // 4 == document // 4:
                        planted[other].append(mention.format(name))
    texts = []
    for document, told in enumerate(planted[:count]):
        start = document * (len(ids) // MOST)
        words = tokenizer.decode(ids[start : start + tokens]).split(". ")
        places = np.linspace(1, len(words) - 1, len(told)).astype(int)
        for place, sentence in sorted(zip(places, chance.permutation(told), strict=True), reverse=True):
            words.insert(place, sentence)
        texts.append(". ".join(words))
    return texts, [fact for fact in asked if fact[0] < count]


def log_probabilities(model, file, sequences):
    """Behind a file, of each sequence's tokens: those of the token that follows, [T, V]."""
    import mlx.core as mx  # behind nectar_mlx, which loads the faster BLAS

    for start in range(0, len(sequences), BATCH):
        part = sequences[start : start + BATCH]
        longest = max(map(len, part))  # what is filled up behind a sequence, the sequence does not see
        tokens = mx.array([ids + [0] * (longest - len(ids)) for ids in part])
        logits = model(tokens, cache=widened(file.make_cache(), len(part))).astype(mx.float32)
        logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        yield from (of[: len(ids)] for of, ids in zip(logs, part, strict=True))


def told(model, tokenizer, file, facts):
    """Of each fact whether the number is the likeliest, and the mean log-probability of its tokens."""
    sequences, numbers = [], []
    for _, _, question, sentence, number in facts:
        before = tokenizer.encode(sentence, add_special_tokens=False)
        whole = tokenizer.encode(f"{sentence} {number}", add_special_tokens=False)
        same = next(i for i, (a, b) in enumerate(zip([*before, None], whole, strict=False)) if a != b)
        sequences.append(prompts.prompt(tokenizer, question) + whole[:-1])
        numbers.append(whole[same:])
    for logs, number in zip(log_probabilities(model, file, sequences), numbers, strict=True):
        logs = logs[-len(number) :]
        yield bool((logs.argmax(-1) == number).all()), float(logs[np.arange(len(number)), number].mean())


def sureness(model, tokenizer, file, facts):
    """Of each fact, the mean log-probability of the likeliest tokens with which the model goes on."""
    sequences = [
        prompts.prompt(tokenizer, question) + tokenizer.encode(sentence, add_special_tokens=False)
        for _, _, question, sentence, _ in facts
    ]
    total = np.zeros(len(facts))
    for _ in range(SURE):
        last = [logs[-1] for logs in log_probabilities(model, file, sequences)]
        total += [logs.max() for logs in last]
        sequences = [[*ids, int(logs.argmax())] for ids, logs in zip(sequences, last, strict=True)]
    return total / SURE


def routed(model, tokenizer, texts, files, asked):
    """For every fact, the text that the library answers from, by words and with the model's view; and those that are
    close to it by words."""
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts):
            Path(folder, f"{number}.txt").write_text(text)
        library = Library(Path(folder, "library"))
        library.add([Path(folder, f"{number}.txt") for number in range(len(texts))], CheapFitter())

        def number(candidate):
            return None if candidate is None else int(Path(candidate.document.name).stem)

        def asking(question):
            def behind(look):
                return lambda documents: [look(files[int(Path(document.name).stem)]) for document in documents]

            likelihood = behind(lambda file: file.log_likelihood(model, file.prompt(tokenizer, question)))
            answers = behind(lambda file: file.first_sentence(model, tokenizer, question))
            return library.route(question, evidence=likelihood, answers=answers)

        questions = [question for _, _, question, *_ in asked]
        routings = [library.route(question) for question in questions]
        by_words = [number(routing.best) for routing in routings]
        close = [[number(candidate) for candidate in routing.close] for routing in routings]
        by_both = [number(asking(question).best) for question in questions]
    return by_words, by_both, close


def views(model, tokenizer, texts, files, asked, wanted):
    """By name, what each wanted view has before each fact: something with `make_cache`."""
    for name, end_to_end in (("end to end", True), ("side by side", False)):
        if name in wanted:
            yield name, [compose(files, model, end_to_end=end_to_end)] * len(asked)
    if "the right text" in wanted:
        yield "the right text", [files[document] for document, *_ in asked]
    if "the routed text" in wanted:
        by_words, by_both, close = routed(model, tokenizer, texts, files, asked)
        for kind in KINDS:
            of = [i for i, fact in enumerate(asked) if fact[1] == kind]
            right = [[found[i] == asked[i][0] for i in of] for found in (by_words, by_both)]
            named = [asked[i][0] in (by_words[i], *close[i]) for i in of]
            print(json.dumps({"routed right": kind, "of": len(of), "by words": sum(right[0]),
                              "with the model": sum(right[1]), "first or named as close": sum(named)}))  # fmt: skip
        for name, found in (("by words", by_words), ("with the model", by_both)):
            # None of them: the one that the words fit best is read all the same.
            yield f"routed {name}", [files[number or 0] for number in found]
    if "the surest text" in wanted:
        surest = np.argmax([sureness(model, tokenizer, file, asked) for file in files], axis=0)
        for kind in KINDS:
            of = [i for i, fact in enumerate(asked) if fact[1] == kind]
            right = sum(int(surest[i] == asked[i][0]) for i in of)
            print(json.dumps({"surest right": kind, "of": len(of), "right": right}))
        yield "the surest text", [files[number] for number in surest]


def figures(model, tokenizer, view, asked):
    """Of each kind of question: how many are right, of how many, and the mean log-probability."""
    results = {}
    for file in {id(file): file for file in view}.values():
        of = [i for i, behind in enumerate(view) if behind is file]
        results |= zip(of, told(model, tokenizer, file, [asked[i] for i in of]), strict=True)
    found = {}
    for kind in KINDS:
        right, logs = zip(*(results[i] for i, fact in enumerate(asked) if fact[1] == kind), strict=True)
        found[kind] = [sum(right), len(right), round(float(np.mean(logs)), 3)]
    return found


def fitted(model, tokenizer, text, budget, options):
    start = time.perf_counter()
    file = Nectar.fit(model, tokenizer, text, budget=budget, **options)
    report = {name: file.report.get(name) for name in ("kl", "agree", "gap_closed")}
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"fitted": len(file.prefix), "bytes": file.nbytes, "seconds": seconds, **report}), flush=True)
    return file


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("book", type=Path)
    parser.add_argument("--texts", type=int, default=4, help=f"how many, at most {MOST}")
    parser.add_argument("--tokens", type=int, default=1650, help="of the book in each; facts come on top")
    parser.add_argument("--budget", help="fit every text with it, too, such as 4%%")
    parser.add_argument("--effort", choices=EFFORTS, default="normal", help="of these fits")
    parser.add_argument("--views", nargs="+", default=VIEWS, choices=VIEWS)
    arguments = parser.parse_args()
    model, tokenizer = models.load(arguments.model)
    texts, asked = documents(tokenizer, arguments.book.read_text(), arguments.texts, arguments.tokens)
    prefixes = [prompts.prefix(tokenizer, text) for text in texts]
    print(json.dumps({"texts": len(texts), "tokens": [len(prefix) for prefix in prefixes]}), flush=True)
    rows = []

    def measure(kind, name, view):
        found = figures(model, tokenizer, view, asked)
        print(json.dumps({"files": kind, "view": name, **found}), flush=True)
        rows.append((kind, name, *(f"{right} of {count} ({logs:.2f})" for right, count, logs in found.values())))

    if "read as one" in arguments.views:
        measure("exact", "read as one", [toys.exact(model, prompts.prefix(tokenizer, "\n\n".join(texts)))] * len(asked))
    made = {"exact": lambda: [toys.exact(model, prefix) for prefix in prefixes]}
    if arguments.budget:
        options = effort(arguments.effort)
        made[arguments.budget] = lambda: [fitted(model, tokenizer, text, arguments.budget, options) for text in texts]
    for kind, make in made.items():
        for name, view in views(model, tokenizer, texts, make(), asked, arguments.views):
            measure(kind, name, view)
    print("\n".join(f"| {' | '.join(row)} |" for row in [("files", "in view", *KINDS), ("---",) * 4, *rows]))


if __name__ == "__main__":
    main()
