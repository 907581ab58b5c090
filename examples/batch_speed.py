"""Tokens a second behind a context, one question at a time and eight in a batch.

python examples/batch_speed.py book.nectar --questions 8 --tokens 128
"""

import argparse
import json
import time

from nectar_mlx import cli  # first: it loads an optimised BLAS, which must precede mlx.core

import mlx.core as mx  # isort: skip
from mlx_lm.generate import BatchGenerator  # isort: skip


def seconds_a_token(model, prompts, tokens):
    """Of the decode steps alone, all sequences being read: seconds a step / sequences."""
    generator = BatchGenerator(model, max_tokens=tokens)
    generator.insert(prompts)
    while len(generator.next_generated()) < len(prompts):
        pass
    start, steps = time.perf_counter(), 0
    while responses := generator.next_generated():
        steps += len(responses)
    mx.synchronize()
    generator.close()
    return (time.perf_counter() - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nectar")
    cli.add_model(parser)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    model, tokenizer, nectar = cli.load(args.nectar, args)
    prompts = [nectar.prompt(tokenizer, f"Tell me the part of the story numbered {i}.") for i in range(args.questions)]
    with nectar.attach(model):
        seconds_a_token(model, prompts, 8)  # compile and warm up
        one = min(seconds_a_token(model, prompts[:1], args.tokens) for _ in range(3))
        batch = min(seconds_a_token(model, prompts, args.tokens) for _ in range(3))
    result = {"one": 1 / one, "batch": 1 / batch, "questions": args.questions, "ratio": one / batch}
    print(json.dumps({name: round(value, 2) for name, value in result.items()}))


if __name__ == "__main__":
    main()
