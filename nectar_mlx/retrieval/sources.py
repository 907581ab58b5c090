"""The sources of an answer: the passages of the text whose keys took the most exact attention while it was written."""

import re
from dataclasses import dataclass

import numpy as np

from ..core.types import DoubleArray, FloatArray, Tokenizer
from ..mlxlm import prompts
from ..store.tensor_file import Arrays

_WINDOW = 32  # tokens whose attention is taken together
_REACH = 240  # characters to the end of a sentence, at most
_SENTENCE = re.compile(r"(?<=[.!?:;])[\"'”’)\]]*\s+|\n\s*\n")


@dataclass(frozen=True)
class Source:
    """text[start:end] of the text as it was read, and its share of the exact attention to the text, anchors aside."""

    start: int
    end: int
    share: float
    text: str

    def quoted(self) -> str:
        """One line for a person."""
        words = " ".join(self.text.split())
        return f"[{self.start:,}–{self.end:,}, {self.share:.0%}] {words}"


def arrays(tokenizer: Tokenizer, text: str, prefix: list[int]) -> Arrays:
    """The text, and for each token of the prefix the characters [start, end) that it stands for, -1 for the template's
    own. Empty for tokenizers without character offsets.
    """
    ids, located = prompts.located(tokenizer, text)
    if not located or ids[: len(prefix)] != prefix:
        return {}
    spans = np.array(located[: len(prefix)])
    offsets = np.where(spans[:, :1] < 0, -1, spans).astype(np.int32)
    read = text[: max(0, int(offsets[:, 1].max()))]
    return {"sources.offsets": offsets, "sources.text": np.frombuffer(read.encode(), np.uint8)}


def passages(small: Arrays, mass: FloatArray | DoubleArray, *, count: int = 3) -> list[Source]:
    """The `count` passages with the most of mass [n], in that order; they do not overlap."""
    if "sources.offsets" not in small or mass.sum() <= 0:
        return []
    offsets, text = small["sources.offsets"], small["sources.text"].tobytes().decode()
    inside = np.where(offsets[:, 0] >= 0, mass, 0.0)
    left, total, sources = inside.copy(), inside.sum(), list[Source]()
    while len(sources) < count and left.sum() > 0.01 * total:
        around = np.convolve(left, np.bartlett(_WINDOW + 1), mode="same")
        centre = int(around.argmax())
        tokens = slice(max(0, centre - _WINDOW // 2), centre + _WINDOW // 2 + 1)
        spans = offsets[tokens][offsets[tokens][:, 0] >= 0]
        start, end = _sentences(text, int(spans[:, 0].min()), int(spans[:, 1].max()))
        for other in sources:  # passages do not overlap
            start, end = (max(start, other.end), end) if other.start <= start else (start, min(end, other.start))
        covered = (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
        share = float(left[covered].sum() / total)
        left[covered], left[tokens] = 0, 0
        if end > start and text[start:end].strip():
            sources.append(Source(start, end, round(share, 4), text[start:end]))
    return sources


def _sentences(text: str, start: int, end: int) -> tuple[int, int]:
    """The characters widened to whole sentences, where those are not far."""
    before = [m.end() for m in _SENTENCE.finditer(text, max(0, start - _REACH), start)]
    after = _SENTENCE.search(text, end, min(len(text), end + _REACH))
    first = before[-1] if before else (0 if start <= _REACH else start)
    return first, after.start() if after else (len(text) if end + _REACH >= len(text) else end)
