"""BM25 retrieval: the passages with the best score for the question (the last one of a talk), in front of all.

Its bytes are those of the passages' keys and values in mlx-lm's 8-bit cache. Not counted: the text itself, which must
be kept on disk and searched for every question, and the time to read the passages.
"""

from ..core.bm25 import PASSAGE, Index
from ..errors import NectarError
from ..fitting.samples.conversation import Conversation
from ..mlxlm import prompts
from .base import Baseline, EvalContext, LiveText, View
from .no_context import no_context


def passages(ctx: EvalContext, nbytes: int) -> View:
    tokens = int((nbytes - ctx.window_bytes) / ctx.text_bytes) - len(ctx.head)
    introduction = prompts.encode(ctx.tokenizer, prompts.INTRODUCTION, specials=False)
    room = tokens - len(introduction)
    if room < 8:
        raise NectarError(f"{nbytes:,} bytes do not hold a passage")
    count = max(1, round(room / PASSAGE))
    size = room // count
    index = Index.of(ctx.tokenizer, ctx.context.prefix[len(ctx.head) :], passage=size)

    def prompt(conversation: Conversation) -> list[int]:
        question = conversation.question or str(ctx.tokenizer.decode(conversation.prompt, skip_special_tokens=True))
        return [*introduction, *index.best(question, count), *conversation.prompt]

    head = no_context(ctx, 0)
    return View(
        banks=head.banks,
        windows=head.windows,
        start=head.start,
        nbytes=int((len(ctx.head) + len(introduction) + count * size) * ctx.text_bytes) + ctx.window_bytes,
        detail=f"{count} passage{'s' if count > 1 else ''} of {size} tokens",
        live_text=LiveText(prompt=prompt, kv_bits=8 if ctx.geometry.head_dim % 32 == 0 else None),
    )


BASELINES = (Baseline(name="BM25 passages", build=passages),)
