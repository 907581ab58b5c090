"""A summary of the text by the model itself, as long as the bytes allow, in the document's place."""

import mlx.core as mx

from ..errors import NectarError
from ..fitting.samples.conversation import Conversation
from ..mlxlm import prompts
from .base import Baseline, EvalContext, View

_REQUEST = "Write a summary of the text with all its important names, numbers and facts, in about {words} words."


def summary(task: EvalContext, nbytes: int) -> View:
    introduction = prompts.encode(task.tokenizer, prompts.INTRODUCTION, specials=False)
    room = int((nbytes - task.window_bytes) / task.text_bytes) - len(task.head) - len(introduction) - 1
    if room < 8:
        raise NectarError(f"{nbytes:,} bytes do not hold a summary")
    asked = Conversation(task.ask(_REQUEST.format(words=max(5, room * 2 // 3))))
    task.converse(task.context, [asked], seed=task.seed, temperature=1e-3, max_tokens=room)
    answer = asked.answer[:-1] if asked.answer[-1] in task.tokenizer.eos_token_ids else asked.answer
    mx.clear_cache()
    return task.text([*introduction, *answer], detail=f"{len(answer)} tokens")


BASELINES = (Baseline(name="summary", build=summary),)
