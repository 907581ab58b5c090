"""An answer while it is written: by the model here, or by a server (`remote`)."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from . import cli
from .core.repetition import Repetition

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.generate import GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .core.types import JsonObject, LayerCache, Tokenizer
    from .nectar import Nectar


class Ended(NamedTuple):
    """How an answer ended. reason: "stop", the model's own end; "length"; or "repetition". peak_bytes: of memory; None
    for a server's answer."""

    reason: str
    tokens: int
    prompt_tokens: int
    tokens_per_second: float
    peak_bytes: int | None = None


class Written(NamedTuple):
    """What is new: of the answer, of the thoughts before it, and of the model's text, which has both and their marks.
    tokens: that the text stands for. ended: with the last piece."""

    answer: str = ""
    thoughts: str = ""
    text: str = ""
    tokens: tuple[int, ...] = ()
    ended: Ended | None = None


def write(
    model: "nn.Module",
    tokenizer: "Tokenizer",
    nectar: "Nectar",
    prompt: Sequence[int],
    cache: "Sequence[LayerCache]",
    args: argparse.Namespace,
    *,
    max_tokens: int,
) -> Iterator[Written]:
    """The answer to a prompt behind a cache of the file's, with the options of `cli.add_generation`; it ends where it
    repeats itself.

    max_tokens: the longest answer, from `window.answer_tokens`.
    """
    from mlx_lm import stream_generate

    from .answering import Answer, Markers, Sampling

    markers = Markers.of(tokenizer)
    answer = Answer(markers=markers, opened=markers is not None and markers.opened(tokenizer, prompt))
    sampling = Sampling(temperature=args.temp, top_p=args.top_p, seed=args.seed)
    loops, responses = (
        Repetition(),
        stream_generate(
            model,
            cast("TokenizerWrapper", tokenizer),
            list(prompt),
            max_tokens=max_tokens,
            sampler=sampling.sampler(),
            prompt_cache=list(cache),
            logits_processors=nectar.logits_processors() if args.recall else [],
        ),
    )
    for response in responses:
        thoughts, text = answer.feed(response.text)
        reason = response.finish_reason
        if loops.add(response.text) and not args.allow_loops:
            reason = reason or "repetition"
        if reason is None:
            yield Written(text, thoughts, response.text, (response.token,))
            continue
        last_thoughts, last = answer.finish()
        yield Written(text + last, thoughts + last_thoughts, response.text, (response.token,), _ended(response, reason))
        return


def _ended(last: "GenerationResponse", reason: str) -> Ended:
    return Ended(
        reason=reason,
        tokens=last.generation_tokens,
        prompt_tokens=last.prompt_tokens,
        tokens_per_second=round(last.generation_tps, 2),
        peak_bytes=round(last.peak_memory * 1e9),
    )


def show(pieces: Iterator[Written], *, quiet: bool = False) -> Ended | None:
    """Shows an answer as it comes, on stdout (not if quiet), and its thoughts on stderr; how it ended, None where
    nothing came."""
    ended, thinking = None, False
    answer, thoughts = cli.answering(), cli.thinking()
    try:
        for piece in pieces:
            thoughts.add(piece.thoughts)
            if thinking and piece.answer:
                thoughts.add("\n\n")
            thinking = (thinking or bool(piece.thoughts)) and not piece.answer
            if not quiet:
                answer.add(piece.answer)
            ended = piece.ended
    finally:  # an answer that is interrupted is shown to its last word
        thoughts.finish()
        answer.finish()
    if thinking:
        thoughts.add("\n")
    if not quiet:
        print(flush=True)
    return ended


def say_how_it_ended(ended: Ended | None, args: argparse.Namespace) -> None:
    """A line where an answer ended before the model ended it."""
    if ended is None:
        return
    if ended.reason == "length" and args.max_tokens:
        cli.say(f"the answer is cut at {ended.tokens:,} tokens: --max-tokens {2 * args.max_tokens} allows more")
    elif ended.reason == "length":
        cli.say(f"the answer is cut at {ended.tokens:,} tokens: --max-tokens allows more, up to the model's window")
    elif ended.reason == "repetition":
        cli.say(f"stopped after {ended.tokens:,} tokens: the model repeats itself; other words or --temp 0.7 may help")


def as_json(ended: Ended | None) -> "JsonObject":
    """What is known of the end, for `--json`."""
    return {
        "finish_reason": ended.reason if ended else None,
        "answer_tokens": ended.tokens if ended else 0,
        "tokens_per_second": ended.tokens_per_second if ended else 0.0,
        "peak_memory_bytes": ended.peak_bytes if ended else None,
    }
