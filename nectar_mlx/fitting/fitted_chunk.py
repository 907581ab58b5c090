"""What is left of a text, or of a chunk of one, once its heads are fitted: so little that many can wait for the rest.

Its keys and values, and the rows its heads were trained on, are gone. What its answers would be with all of it in view
can still be told, for the hidden states that follow the last layer are kept where a few held-out answers were
predicted.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import mlx.core as mx

from .. import store
from ..heads import Size
from ..mlxlm.cache import Window
from . import fidelity
from .checkpoint import Checkpoint
from .layers import LayerRunner
from .prefill import Context
from .samples.self_study import Conversation
from .verdict import measured


class Answer(NamedTuple):
    """A conversation that a finished fit is checked with, and the hidden states [A, E] that follow the last layer where
    the tokens of its answer were predicted, the whole text in view."""

    conversation: Conversation
    hidden: mx.array

    @classmethod
    def of(cls, conversation: Conversation, hidden: mx.array) -> Self:
        """hidden: of all its tokens [T, E]."""
        first = len(conversation.prompt) - 1
        kept = mx.contiguous(hidden[first : first + len(conversation.answer)])
        mx.eval(kept)
        return cls(conversation, kept)


def checked(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those that a finished fit is measured on."""
    return [c for c in conversations if c.split == "check" and c.answer]


def heard(walk: LayerRunner, context: Context, conversation: Conversation) -> Answer:
    """What follows the last layer behind the context's own keys and values."""
    hidden = walk.embed(mx.array([conversation.prompt + conversation.answer]))
    for layer, cache in enumerate(context.make_cache()):
        hidden = walk.layer(layer, hidden, cache)
    return Answer.of(conversation, hidden[0])


@dataclass(kw_only=True)
class FittedChunk:
    """layers: each layer's heads as they will be stored. errors: of every head on held-out rows. rows: a head, that it
    was fitted to. windows: what sliding-window layers keep, by layer."""

    layers: list[store.Tensors]
    errors: list[float]
    rows: int
    windows: dict[int, Window]
    answers: list[Answer]

    @property
    def sizes(self) -> list[Size]:
        """Of every head."""
        rows: list[Any] = [row for layer in self.layers for row in layer["sizes"].tolist()]  # type: ignore[union-attr]
        return [tuple(row) for row in rows]

    @property
    def offsets(self) -> list[mx.array | None]:
        """What each layer's keys are relative to, [K, D]."""
        return [layer.get("offsets") for layer in self.layers]

    def fidelity(
        self, walk: LayerRunner, make_cache: fidelity.MakeCache, no_context: fidelity.MakeCache
    ) -> dict[str, float]:
        """How far the file's answers and those without a context are from those with this text in view (`verdict`)."""
        views: tuple[list[fidelity.Divergence], ...] = ([], [])
        for number, (conversation, hidden) in enumerate(self.answers):
            truth = walk.logits(hidden[None])[0]
            for found, make in zip(views, (make_cache, no_context), strict=True):
                (ours,) = fidelity.answer_logits(walk.model, make(), [conversation])
                found.append(fidelity.divergence(truth, ours, conversation.answer, number))
        return measured(*(fidelity.joined(found) for found in views))

    def save(self, checkpoint: Checkpoint) -> None:
        """Keeps it, so that an interrupted fit does not read this text again."""
        arrays = {f"layers.{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.items()}
        arrays |= {f"answers.{i}.hidden": answer.hidden for i, answer in enumerate(self.answers)}
        for i, window in self.windows.items():
            arrays |= {f"windows.{i}.keys": window.keys, f"windows.{i}.values": window.values}
        told = {
            "errors": self.errors,
            "rows": self.rows,
            "layers": len(self.layers),
            "windows": {i: window.size for i, window in self.windows.items()},
            "answers": [asdict(answer.conversation) for answer in self.answers],
        }
        checkpoint.save_chunk(arrays, told)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Self | None:
        """What `save` kept, if it did."""
        found = checkpoint.load_chunk()
        if found is None:
            return None
        arrays, told = found
        parts: dict[tuple[str, int], store.Tensors] = {}
        for key, array in arrays.items():
            kind, number, name = key.split(".", 2)
            parts.setdefault((kind, int(number)), {})[name] = array
        return cls(
            layers=[parts["layers", i] for i in range(told["layers"])],
            errors=told["errors"],
            rows=told["rows"],
            windows={int(i): Window(**parts["windows", int(i)], size=size) for i, size in told["windows"].items()},
            answers=[Answer(Conversation(**c), parts["answers", i]["hidden"]) for i, c in enumerate(told["answers"])],
        )
