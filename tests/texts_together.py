"""Facts planted in several texts: how well they are told with all texts read as one, put together, or one chosen.

    python -m tests.texts_together MODEL BOOK [--texts 2 4 8] [--tokens 320]

BOOK: a text that is cut into documents. Every document gets three facts with a number. The model is given the sentence
that tells the fact, up to the number: right where every token of the number is the likeliest one; and the mean
log-probability of the number. Keys and values are exact, so this bounds what fitted files could reach. One JSON line a
count of texts.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from nectar_mlx import models
from nectar_mlx.composition import compose
from nectar_mlx.core.bm25 import Index
from nectar_mlx.mlxlm import prompts
from tests import toys

FACTS = (
    ("What is the access code of the {} depot?", "The access code of the {} depot is"),
    ("How many crates does the {} store hold?", "The number of crates in the {} store is"),
    ("Which berth has the {} ferry?", "The berth of the {} ferry is number"),
)
NAMES = [
    "Harwick",
    "Osmington",
    "Tarrant",
    "Velden",
    "Quillan",
    "Brackley",
    "Morwenna",
    "Istrad",
    "Lindor",
    "Pellam",
    "Rushden",
    "Calder",
]
SECONDS = [
    "Ashby",
    "Dunmore",
    "Eastrey",
    "Fenwick",
    "Garston",
    "Hexley",
    "Ingram",
    "Jarrow",
    "Kelso",
    "Lutton",
    "Marden",
    "Norham",
]
THIRDS = [
    "Olney",
    "Parkend",
    "Quorn",
    "Romsey",
    "Selby",
    "Thirsk",
    "Ulver",
    "Wansford",
    "Yarm",
    "Zennor",
    "Alford",
    "Bourne",
]


def documents(tokenizer, book, count, tokens):
    """Texts of so many tokens with facts in the middle, and their questions: (document, question, sentence, number)."""
    ids, chance, texts, asked = tokenizer.encode(book), np.random.default_rng(7), [], []
    for document in range(count):
        start = document * (len(ids) // count)
        words = tokenizer.decode(ids[start : start + tokens]).split(". ")
        for which, ((question, sentence), names) in enumerate(zip(FACTS, (NAMES, SECONDS, THIRDS), strict=True)):
            number = str(chance.integers(1000, 10_000))
            told = sentence.format(names[document])
            words.insert((which + 1) * len(words) // 4, f"{told} {number}")
            asked.append((document, question.format(names[document]), told, number))
        texts.append(". ".join(words))
    return texts, asked


def told(model, tokenizer, cache, question, sentence, number):
    """Whether the number is the likeliest, and the mean log-probability of its tokens."""
    import mlx.core as mx  # behind nectar_mlx, which loads the faster BLAS

    before, number_ids = tokenizer.encode(sentence, add_special_tokens=False), None
    whole = tokenizer.encode(f"{sentence} {number}", add_special_tokens=False)
    same = next(i for i, (a, b) in enumerate(zip([*before, None], whole, strict=False)) if a != b)
    number_ids = whole[same:]
    tokens = prompts.prompt(tokenizer, question) + whole
    logits = model(mx.array([tokens[:-1]]), cache=cache)[0, -len(number_ids) :].astype(mx.float32)
    logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    rows = np.arange(len(number_ids))
    return bool((logs.argmax(-1) == number_ids).all()), float(logs[rows, number_ids].mean())


def measured(model, tokenizer, texts, asked):
    """By view: how many facts are right, and the mean log-probability."""
    files = [toys.exact(model, prompts.prefix(tokenizer, text)) for text in texts]
    one = toys.exact(model, prompts.prefix(tokenizer, "\n\n".join(texts)))
    words = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    parts = [Index.of(tokenizer, ids) for ids in words]
    index, owner = Index.joined(parts), [i for i, part in enumerate(parts) for _ in part.passages]
    end_to_end, beside = compose(files, model), compose(files, model, end_to_end=False)
    routed = [owner[int(np.argmax(index.scores(question)))] for _, question, *_ in asked]
    views = {
        "read as one": lambda document, i: one,
        "end to end": lambda document, i: end_to_end,
        "side by side": lambda document, i: beside,
        "the right text": lambda document, i: files[document],
        "the routed text": lambda document, i: files[routed[i]],
    }
    figures = {"routed right": sum(r == document for r, (document, *_) in zip(routed, asked, strict=True))}
    for name, view in views.items():
        results = [
            told(model, tokenizer, view(document, i).make_cache(), *rest) for i, (document, *rest) in enumerate(asked)
        ]
        right, logs = zip(*results, strict=True)
        figures[name] = [sum(right), round(float(np.mean(logs)), 3)]
        print(name, figures[name], flush=True)
    return figures


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("book", type=Path)
    parser.add_argument("--texts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=320)
    arguments = parser.parse_args()
    model, tokenizer = models.load(arguments.model)
    book = arguments.book.read_text()
    for count in arguments.texts:
        texts, asked = documents(tokenizer, book, count, arguments.tokens)
        lengths = [len(tokenizer.encode(text)) for text in texts]
        figures = {"texts": count, "facts": len(asked), "tokens": round(float(np.mean(lengths)))}
        print(json.dumps(figures | measured(model, tokenizer, texts, asked)), flush=True)


if __name__ == "__main__":
    main()
