"""Facts planted in several texts: how well they are told with all texts read as one, put together, or one chosen.

    python -m tests.texts_together MODEL BOOK --texts 4 --write FOLDER    # to be fitted
    python -m tests.texts_together MODEL BOOK --texts 4 [--files FOLDER/document-*.nectar] [--views "end to end" …]

BOOK: a text that is cut into documents. Every document gets six facts with a number: three whose question names a word
that no other text has, and three of which other texts speak, too, without the number, so that every word of the
question is in several texts. The model is given the sentence that tells the fact, up to the number: right where every
token of the number is the likeliest one; and the mean log-probability of the number. Keys and values are exact, which
bounds what fitted files could reach, or those of files. One JSON line a view: of each kind of question how many are
right, of how many, and the mean log-probability.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from nectar_mlx import Nectar, models
from nectar_mlx.composition import compose
from nectar_mlx.library import Library
from nectar_mlx.mlxlm import prompts
from tests import toys
from tests.library.cheap import CheapFitter

VIEWS = ["read as one", "end to end", "side by side", "the right text", "the routed text", "the surest text"]
SURE = 3  # tokens of an answer by which the surest text is chosen
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


def told(model, tokenizer, cache, question, sentence, number):
    """Whether the number is the likeliest, and the mean log-probability of its tokens."""
    import mlx.core as mx  # behind nectar_mlx, which loads the faster BLAS

    before = tokenizer.encode(sentence, add_special_tokens=False)
    whole = tokenizer.encode(f"{sentence} {number}", add_special_tokens=False)
    same = next(i for i, (a, b) in enumerate(zip([*before, None], whole, strict=False)) if a != b)
    number_ids = whole[same:]
    tokens = prompts.prompt(tokenizer, question) + whole
    logits = model(mx.array([tokens[:-1]]), cache=cache)[0, -len(number_ids) :].astype(mx.float32)
    logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    rows = np.arange(len(number_ids))
    return bool((logs.argmax(-1) == number_ids).all()), float(logs[rows, number_ids].mean())


def sureness(model, tokenizer, cache, question, sentence):
    """Mean log-probability of the likeliest tokens with which the model goes on."""
    import mlx.core as mx

    tokens = mx.array([prompts.prompt(tokenizer, question) + tokenizer.encode(sentence, add_special_tokens=False)])
    total = 0.0
    for _ in range(SURE):
        logits = model(tokens, cache=cache)[:, -1].astype(mx.float32)
        tokens, top = logits.argmax(-1)[:, None], logits.max() - mx.logsumexp(logits)
        total += top.item()
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

        def evidence(documents):
            of = [files[int(Path(document.name).stem)] for document in documents]
            return [file.log_likelihood(model, file.prompt(tokenizer, question)) for file in of]

        by_words, by_both, close = [], [], []
        for _, _, question, *_ in asked:
            routing = library.route(question)
            by_words.append(number(routing.best))
            close.append([number(candidate) for candidate in routing.close])
            by_both.append(number(library.route(question, evidence=evidence).best))
    return by_words, by_both, close


def views(model, tokenizer, texts, files, asked, wanted):
    """By name, each wanted view as a function of a fact's number, which gives a cache."""
    if "read as one" in wanted:
        one = toys.exact(model, prompts.prefix(tokenizer, "\n\n".join(texts)))
        yield "read as one", lambda i: one.make_cache()
    for name, end_to_end in (("end to end", True), ("side by side", False)):
        if name in wanted:
            together = compose(files, model, end_to_end=end_to_end)
            yield name, lambda i, together=together: together.make_cache()
    if "the right text" in wanted:
        yield "the right text", lambda i: files[asked[i][0]].make_cache()
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
            yield f"routed {name}", lambda i, found=found: files[found[i] or 0].make_cache()

    if "the surest text" in wanted:
        sure = [
            [sureness(model, tokenizer, file.make_cache(), question, sentence) for file in files]
            for _, _, question, sentence, _ in asked
        ]
        surest = [int(np.argmax(of)) for of in sure]
        for kind in KINDS:
            of = [i for i, fact in enumerate(asked) if fact[1] == kind]
            print(json.dumps({"surest right": kind, "of": len(of), "right": sum(surest[i] == asked[i][0] for i in of)}))
        yield "the surest text", lambda i: files[surest[i]].make_cache()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("book", type=Path)
    parser.add_argument("--texts", type=int, default=4, help=f"how many, at most {MOST}")
    parser.add_argument("--tokens", type=int, default=1650, help="of the book in each; facts come on top")
    parser.add_argument("--write", type=Path, help="write the texts to this folder, and stop")
    parser.add_argument("--files", nargs="+", type=Path, help="their .nectar files (default: exact keys)")
    parser.add_argument("--views", nargs="+", default=VIEWS)
    arguments = parser.parse_args()
    model, tokenizer = models.load(arguments.model)
    texts, asked = documents(tokenizer, arguments.book.read_text(), arguments.texts, arguments.tokens)
    if arguments.write:
        for number, text in enumerate(texts):
            (arguments.write / f"document-{number}.txt").write_text(text)
        return
    if arguments.files:
        files = [Nectar.load(path, model, tokenizer) for path in arguments.files]
    elif arguments.views == ["read as one"]:
        files = []
    else:
        files = [toys.exact(model, prompts.prefix(tokenizer, text)) for text in texts]
    for name, view in views(model, tokenizer, texts, files, asked, arguments.views):
        results = [told(model, tokenizer, view(i), *rest) for i, (_, _, *rest) in enumerate(asked)]
        figures = {"texts": len(texts), "kind": files[0].layout.kind if files else "exact", "view": name}
        for kind in KINDS:
            right, logs = zip(*(r for r, fact in zip(results, asked, strict=True) if fact[1] == kind), strict=True)
            figures[kind] = [sum(right), len(right), round(float(np.mean(logs)), 3)]
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
