"""What became of a text: its tokens before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Self

_LONGEST = 20_000  # tokens between the first and the last difference that are compared one by one


@dataclass(frozen=True)
class Revision:
    """old, new: a prefix before and after. changed: places [start, end) of the new one whose tokens are new, in their
    order; of what was only left out there are none. moved: by how many positions most of the kept tokens moved."""

    old: Sequence[int]
    new: Sequence[int]
    changed: Sequence[tuple[int, int]]
    moved: int = 0

    @classmethod
    def of(cls, old: Sequence[int], new: Sequence[int]) -> Self:
        """Compares two prefixes."""
        first = _alike(old, new)
        last = min(_alike(old[::-1], new[::-1]), min(len(old), len(new)) - first)
        before, after = old[first : len(old) - last], new[first : len(new) - last]
        if len(before) + len(after) > _LONGEST:
            return cls(old, new, [(first, len(new) - last)])
        changed, kept = list[tuple[int, int]](), {0: first, len(new) - len(old): last}
        for kind, a, a_end, b, b_end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if kind == "equal":
                kept[b - a] = kept.get(b - a, 0) + a_end - a
            elif b < b_end:
                changed.append((first + b, first + b_end))
        return cls(old, new, changed, max(kept, key=lambda by: kept[by]))

    @property
    def same(self) -> bool:
        return list(self.old) == list(self.new)

    @property
    def appended(self) -> int:
        """Tokens that follow the old prefix; 0 where anything else is different."""
        n = len(self.old)
        return len(self.new) - n if len(self.new) > n and list(self.new[:n]) == list(self.old) else 0

    @property
    def share(self) -> float:
        """How much of the text is another: tokens that are new or left out, of all of the longer one."""
        added = sum(end - start for start, end in self.changed)
        left_out = len(self.old) - (len(self.new) - added)
        return max(added, left_out) / max(len(self.old), len(self.new))


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
