"""A summary of the text by the model itself, in the document's place and as long as the bytes allow."""

import mlx.core as mx

from ..errors import NectarError
from ..fitting.samples.conversation import Conversation
from ..mlxlm import prompts
from .base import Baseline, EvalContext, View

_REQUEST = "Write a summary of the text with all its important names, numbers and facts, in about {words} words."


def summary(ctx: EvalContext, nbytes: int) -> View:
    introduction = prompts.encode(ctx.tokenizer, prompts.INTRODUCTION, specials=False)
    room = int((nbytes - ctx.window_bytes) / ctx.text_bytes) - len(ctx.head) - len(introduction) - 1
    if room < 8:
        raise NectarError(f"{nbytes:,} bytes do not hold a summary")
    request = Conversation(ctx.ask(_REQUEST.format(words=max(5, room * 2 // 3))))
    ctx.sample_answers(ctx.full_cache, [request], seed=ctx.config.seed, temperature=1e-3, max_tokens=room)
    answer = request.answer[:-1] if request.answer[-1] in ctx.tokenizer.eos_token_ids else request.answer
    mx.clear_cache()
    return ctx.text([*introduction, *answer], detail=f"{len(answer)} tokens")


BASELINES = (Baseline(name="summary", build=summary),)
