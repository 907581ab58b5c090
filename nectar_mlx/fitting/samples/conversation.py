"""A question about a text and the answer that the model gave to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...core.device import Device, device

Split = Literal["train", "held_out", "check"]
FEWEST_TOGETHER = 16  # conversations: with fewer, sampling is slow on any machine


@dataclass
class Conversation:
    """A prompt that continues the prefix, and the answer that the model gave with its full cache, as token ids.

    split: heads are trained on "train" and compared on "held_out", which is of the same kind; the finished file is
    checked on "check", which is not. ahead: how many positions further on than right behind the prefix it begins, as
    if other talk lay between. question: what is asked last, where the prompt has earlier turns, too.
    """

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    split: Split = "train"
    ahead: int = 0
    question: str = ""

    @property
    def fed_tokens(self) -> int:
        """Tokens that the model is fed: the last one of an answer is only kept."""
        return len(self.prompt) + max(0, len(self.answer) - 1)


def count_groups(count: int, *, most: int, scores: int, profile: Device | None = None) -> int:
    """In how many groups so many conversations are sampled, at most `most` together: a multiple of the device's shares,
    if that leaves enough in each. scores: of all of them, in one layer and step. profile: default `device()`."""
    profile, fewest = profile or device(), -(-count // most)
    shares = profile.study_shares if scores >= profile.shared_scores else 1
    return max(fewest, min(-(-fewest // shares) * shares, count // profile.study_share))


def count_samples(
    conversations: Sequence[Conversation], *, group: int, split: Split = "train", until: int | None = None
) -> int:
    """Samples a KV head that the conversations of a split give when they are replayed: one a query head and token.

    group: query heads a KV head. until: how many tokens of each conversation there are so far, at most.
    """
    fed = [c.fed_tokens for c in conversations if c.split == split]
    return group * sum(tokens if until is None else min(tokens, until) for tokens in fed)


def spread(conversations: Sequence[Conversation], count: int) -> list[Conversation]:
    """So many of them, from everywhere."""
    return [conversations[i * len(conversations) // count] for i in range(count)]


def without(conversations: Sequence[Conversation], others: Sequence[Conversation]) -> list[Conversation]:
    """Those that are not among the others; equal ones may be."""
    among = {id(c) for c in others}
    return [c for c in conversations if id(c) not in among]


def furthest_ahead(conversations: Sequence[Conversation]) -> int:
    """How many positions further on than right behind the text one of them begins, at most."""
    return max((c.ahead for c in conversations), default=0)


def answered_checks(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those that a finished fit is measured on."""
    return [c for c in conversations if c.split == "check" and c.answer]
