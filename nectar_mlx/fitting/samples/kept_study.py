"""The conversations of a fit, kept in its file (`--keep-study`): with them a changed text is fitted again without new
questions and answers. Deflated JSON, some bytes a token."""

import json
import zlib
from collections.abc import Sequence

import mlx.core as mx
import msgspec
import numpy as np

from ...core import json_text
from ...errors import FIT_AGAIN, NectarError
from .ahead import FURTHEST
from .conversation import Conversation, Split

TENSOR = "study"  # its name in the file


class _Kept(msgspec.Struct):
    prompt: list[int]
    answer: list[int]
    split: Split
    ahead: int = 0


def packed(conversations: Sequence[Conversation]) -> mx.array:
    """Conversations -> uint8 [bytes]."""
    rows = [{name: getattr(c, name) for name in _Kept.__struct_fields__} for c in conversations if c.answer]
    return mx.array(np.frombuffer(zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 9), np.uint8))


def unpacked(kept: mx.array, *, vocabulary: int) -> list[Conversation]:
    """The inverse of `packed`. vocabulary: how many token ids there are. NectarError for anything else."""
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(bytes(np.array(kept.astype(mx.uint8))), json_text.MOST_BYTES)
        rows = json_text.typed(json_text.decode(data), list[_Kept])
    except (ValueError, zlib.error) as error:
        raise NectarError(f"the file is damaged: its study cannot be read ({error})", advice=FIT_AGAIN) from None
    if any(not row.prompt or not row.answer for row in rows):
        raise NectarError("the file is damaged: a conversation of its study is empty", advice=FIT_AGAIN)
    if any(not 0 <= token < vocabulary for row in rows for token in row.prompt + row.answer):
        raise NectarError("the file is damaged: a token of its study is none of the model's", advice=FIT_AGAIN)
    if any(not 0 <= row.ahead <= FURTHEST for row in rows):
        raise NectarError("the file is damaged: a conversation of its study is nowhere near its text", advice=FIT_AGAIN)
    return [Conversation(row.prompt, row.answer, row.split, row.ahead) for row in rows]
