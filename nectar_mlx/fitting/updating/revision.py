"""What became of a text: its tokens before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import NamedTuple, Self

_LONGEST = 20_000  # tokens between the first and the last difference that are compared one by one
_FEWEST = 4  # tokens in a row that count as kept: two texts have words in common anywhere


class Run(NamedTuple):
    """Tokens in a row that were kept: places [start, end) of the new prefix, and by how many positions they moved."""

    start: int
    end: int
    moved: int


@dataclass(frozen=True)
class Revision:
    """old, new: a prefix before and after. kept: the runs of tokens that are in both, in their order."""

    old: Sequence[int]
    new: Sequence[int]
    kept: Sequence[Run]

    @classmethod
    def of(cls, old: Sequence[int], new: Sequence[int]) -> Self:
        """Compares two prefixes."""
        first = _alike(old, new)
        last = min(_alike(old[::-1], new[::-1]), min(len(old), len(new)) - first)
        before, after = old[first : len(old) - last], new[first : len(new) - last]
        runs = [Run(0, first, 0)]
        if len(before) + len(after) <= _LONGEST:
            blocks = SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
            runs += [Run(first + b, first + b + n, b - a) for a, b, n in blocks if n >= _FEWEST]
        runs.append(Run(len(new) - last, len(new), len(new) - len(old)))
        return cls(old, new, [run for run in runs if run.start < run.end])

    @property
    def changed(self) -> list[tuple[int, int]]:
        """Places [start, end) of the new prefix whose tokens are new, in their order; of what was only left out there
        are none."""
        ends, starts = [0, *(run.end for run in self.kept)], [*(run.start for run in self.kept), len(self.new)]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """Places [start, end) of the old prefix whose tokens are in the new one no more, in their order."""
        old = [(run.start - run.moved, run.end - run.moved) for run in self.kept]
        ends, starts = [0, *(end for _, end in old)], [*(start for start, _ in old), len(self.old)]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    def quotes_left_out(self, tokens: Sequence[int]) -> bool:
        """Whether they hold some tokens in a row that the old prefix has where something was left out, and the new one
        nowhere."""
        return bool(self._gone and not self._gone.isdisjoint(_rows(tokens)))

    @cached_property
    def _gone(self) -> set[tuple[int, ...]]:
        around = [self.old[max(0, start - _FEWEST + 1) : end + _FEWEST - 1] for start, end in self.left_out]
        return set().union(*map(_rows, around)) - _rows(self.new) if around else set()

    def passages(self, before: int) -> list[tuple[int, int]]:
        """What is new, with so many tokens before it; places that meet are one."""
        found = list[tuple[int, int]]()
        for start, end in self.changed:
            start = max(0, start - before)
            if found and start <= found[-1][1]:
                start = found.pop()[0]
            found.append((start, end))
        return found

    @property
    def appended(self) -> int:
        """Tokens that follow the old prefix; 0 where anything else is different."""
        n = len(self.old)
        return len(self.new) - n if len(self.new) > n and list(self.new[:n]) == list(self.old) else 0

    @property
    def share(self) -> float:
        """How much of the text is another: tokens that are new or left out, of all of the longer one."""
        kept = sum(run.end - run.start for run in self.kept)
        longest = max(len(self.old), len(self.new))
        return (longest - kept) / longest


def _rows(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    """All that are in a row, as many as count as kept."""
    return {tuple(tokens[at : at + _FEWEST]) for at in range(len(tokens) - _FEWEST + 1)}


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
