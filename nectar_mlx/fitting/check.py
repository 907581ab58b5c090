"""The check of a finished fit: its answers compared with those of the full cache."""

from collections.abc import Sequence
from functools import partial

from ..core.types import JsonObject
from ..heads import Bank
from ..mlxlm.cache import make_caches
from . import fidelity
from .prefill import read_head
from .run import FitRun
from .samples.capture import Collected
from .samples.conversation import answered_checks
from .verdict import measured


def check(run: FitRun, data: Collected, banks: Sequence[Bank], *, questions: int | None = None) -> JsonObject:
    """How far the answers to the check questions, or the first so many, are from the full cache's (`verdict`); banks:
    one a layer."""
    context = data.context
    head = read_head(run.model, run.tokenizer, context.prefix, run.geometry)
    conversations = answered_checks(data.conversations)[:questions]
    with run.progress("checking", len(conversations)) as done:
        divergences = fidelity.compare(
            run.model,
            context.make_cache,
            {
                "nectar": partial(make_caches, banks, context.windows, context.start),
                "no context": head.make_cache,
            },
            conversations,
            progress=done,
        )
    return measured(divergences["nectar"], divergences["no context"])
