"""The positions that a model was made for, and what of them is left for an answer."""

import mlx.nn as nn

from ..errors import NectarError

ANSWER_TOKENS = 512  # of an answer whose length nobody chose


class NoRoom(NectarError):
    """What was asked for would pass the model's window."""


def window(model: nn.Module) -> int | None:
    """Positions the model was made for, where its configuration (or its text part's) says."""
    arguments = getattr(model, "args", None)
    found: int | None = getattr(arguments, "max_position_embeddings", None)
    if found is None:
        found = (getattr(arguments, "text_config", None) or {}).get("max_position_embeddings")
    return found


def answer_tokens(
    model: nn.Module, *, start: int, prompt: int, chosen: int | None = None, default: int = ANSWER_TOKENS
) -> int:
    """How many tokens an answer may have: those chosen, else the default, cut to what the model's window has room for.

    start: the position where the prompt begins, `Nectar.start`. prompt: its tokens. NoRoom, which says for how many
    tokens there is room, where the prompt or the chosen tokens would pass the window.
    """
    size = window(model)
    if size is None:
        return chosen or default
    room = size - start
    if prompt >= room:
        raise NoRoom(
            f"the question, with the conversation so far, has {prompt:,} tokens; of the model's window of {size:,} the "
            f"text leaves room for {max(0, room):,}, the answer included: ask a shorter one, or start anew"
        )
    if chosen is not None and chosen > room - prompt:
        raise NoRoom(
            f"an answer of {chosen:,} tokens does not fit the model's window of {size:,}: behind the text and a prompt "
            f"of {prompt:,} tokens there is room for {room - prompt:,}"
        )
    return chosen or min(default, room - prompt)
