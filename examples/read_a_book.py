"""Reads a text once, keeps a small file, and asks it two questions.

python examples/read_a_book.py book.txt [model]
"""

import argparse
from pathlib import Path

from nectar_mlx import Nectar, models  # before mlx_lm: it makes MLX fast on a Linux CPU

import mlx_lm  # isort: skip

parser = argparse.ArgumentParser(description="Reads a text once, keeps a small file, and asks it two questions.")
parser.add_argument("book", type=Path, help="a text file; the .nectar is written beside it")
parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct", help="(default: %(default)s)")
arguments = parser.parse_args()
book = arguments.book
model, tokenizer = models.load(arguments.model)

nectar = Nectar.fit(model, tokenizer, book.read_text(encoding="utf-8"), budget=0.05)
nectar.save(book.with_suffix(".nectar"))
print(f"{len(nectar.prefix):,} tokens: {nectar.cache_nbytes / nectar.nbytes:.0f} x smaller than their KV cache")

nectar = Nectar.load(book.with_suffix(".nectar"), model, tokenizer)
for question in ("Who or what is this about?", "What happens at the end?"):
    prompt = nectar.prompt(tokenizer, question)
    print(mlx_lm.generate(model, tokenizer, prompt, prompt_cache=nectar.make_cache(), max_tokens=80))
