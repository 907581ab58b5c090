"""Reads a text once, keeps a small file, and asks it two questions.

python examples/read_a_book.py book.txt [model]
"""

import sys
from pathlib import Path

from nectar_mlx import Nectar, models  # before mlx_lm: it makes MLX fast on a Linux CPU

import mlx_lm  # isort: skip

book = Path(sys.argv[1])
model, tokenizer = models.load(sys.argv[2] if len(sys.argv) > 2 else "SmolLM2-135M-Instruct")

nectar = Nectar.fit(model, tokenizer, book.read_text(encoding="utf-8"), budget=0.05)
nectar.save(book.with_suffix(".nectar"))
print(f"{len(nectar.prefix):,} tokens: {nectar.cache_nbytes / nectar.nbytes:.0f} x smaller than their KV cache")

nectar = Nectar.load(book.with_suffix(".nectar"), model, tokenizer)
for question in ("Who or what is this about?", "What happens at the end?"):
    prompt = nectar.prompt(tokenizer, question)
    print(mlx_lm.generate(model, tokenizer, prompt, prompt_cache=nectar.make_cache(), max_tokens=80))
