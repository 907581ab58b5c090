"""BM25 retrieval: the passages that share most with the question, in front of it.

Bytes are those of the passages' keys and values in mlx-lm's 8-bit cache; the text itself, which has to be kept on disk
and read for every question, is not counted, nor is the time to read the passages.
"""

from ..core.bm25 import PASSAGE, Index
from ..errors import NectarError
from ..fitting.samples.conversation import Conversation
from ..mlxlm import prompts
from .base import Baseline, EvalContext, View
from .nothing import no_context


def passages(task: EvalContext, nbytes: int) -> View:
    tokens = int((nbytes - task.window_bytes) / task.text_bytes) - len(task.head)
    introduction = prompts.encode(task.tokenizer, prompts.INTRODUCTION, specials=False)
    room = tokens - len(introduction)
    if room < 8:
        raise NectarError(f"{nbytes:,} bytes do not hold a passage")
    count = max(1, round(room / PASSAGE))
    size = room // count
    searched = Index.of(task.tokenizer, task.context.prefix[len(task.head) :], passage=size)

    def prompt(conversation: Conversation) -> list[int]:
        question = str(task.tokenizer.decode(conversation.prompt, skip_special_tokens=True))
        return [*introduction, *searched.best(question, count), *conversation.prompt]

    head = no_context(task, 0)
    return View(
        banks=head.banks,
        windows=head.windows,
        start=head.start,
        nbytes=int((len(task.head) + len(introduction) + count * size) * task.text_bytes) + task.window_bytes,
        detail=f"{count} passage{'s' if count > 1 else ''} of {size} tokens",
        prompt=prompt,
        kv_bits=8 if task.geometry.head_dim % 32 == 0 else None,
    )


BASELINES = (Baseline(name="BM25 passages", build=passages),)
