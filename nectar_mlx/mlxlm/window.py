"""The positions that a model supports, and how many of them are left for an answer."""

import mlx.nn as nn

from ..errors import NectarError
from ..models import arguments

_NAMES = ("max_position_embeddings", "model_max_length", "n_positions", "n_ctx", "block_size", "max_seq_len")
ANSWER_TOKENS = 512  # the longest answer by default


class NoRoom(NectarError):
    """The prompt or the answer does not fit the model's window."""


def window(model: nn.Module) -> int | None:
    """The positions that the model supports; None if its configuration does not have the number."""
    read = arguments(model)
    for part in (read, getattr(read, "text_config", None)):  # of a vision model, its text part
        settings = part if isinstance(part, dict) else vars(part) if part is not None else {}
        for name in _NAMES:
            if isinstance(size := settings.get(name), int):
                return size
    return None


def answer_tokens(
    model: nn.Module, *, start: int, prompt: int, chosen: int | None = None, default: int = ANSWER_TOKENS
) -> int:
    """The longest answer in tokens: the chosen number, or else the default, cut to the room in the model's window.

    start: the position of the first token of the prompt, `Nectar.start`. prompt: its number of tokens. Raises NoRoom,
    with the room there is, if the prompt or the chosen number does not fit.
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
