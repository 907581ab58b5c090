"""What is left of a text, or of a chunk of one, once its heads are fitted: so little that many can wait for the others.

Its keys and values, and the samples its heads were trained on, are gone. What its answers would be with its full cache
can still be computed, for the hidden states that follow the last layer are kept where a few held-out answers were
predicted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Self

import mlx.core as mx

from .. import store
from ..core.types import JsonObject
from ..mlxlm.geometry import Geometry
from ..mlxlm.kept import Kept
from ..retrieval.recall import Calibration
from ..store import states
from . import fidelity
from .checkpoint import Checkpoint, Plan
from .distributed import World
from .layers import LayerRunner
from .prefill import Context
from .samples.conversation import Conversation
from .verdict import measured


class Answer(NamedTuple):
    """A conversation that a finished fit is checked with, and the hidden states [A, E] that follow the last layer where
    the tokens of its answer were predicted, with the full cache."""

    conversation: Conversation
    hidden: mx.array

    @classmethod
    def of(cls, conversation: Conversation, hidden: mx.array) -> Self:
        """hidden: of all its tokens [T, E]."""
        first = len(conversation.prompt) - 1
        kept = mx.contiguous(hidden[first : first + len(conversation.answer)])
        mx.eval(kept)
        return cls(conversation, kept)

    @classmethod
    def replayed(cls, runner: LayerRunner, context: Context, conversation: Conversation) -> Self:
        """What follows the last layer behind the context's own keys and values."""
        hidden = runner.embed(mx.array([conversation.prompt + conversation.answer]))
        for layer, cache in enumerate(context.make_cache()):
            hidden = runner.layer(layer, hidden, cache)
        return cls.of(conversation, hidden[0])


class ChunkTarget(NamedTuple):
    """What a chunk's heads are to be.

    nbytes: for all of them, a share of the chunk's KV cache. plan: what each head gets, where that was decided
    elsewhere. preamble: how many of the text's first tokens they do not stand for. offsets: what each layer's keys are
    relative to, [K, D], where it is not their mean.
    """

    nbytes: float
    share: float
    plan: Plan | None = None
    preamble: int = 0
    offsets: Sequence[mx.array | None] = ()


@dataclass(kw_only=True)
class FittedChunk:
    """A chunk's heads, and what it is checked by.

    plan: what each head got. layers: each layer's heads as they will be stored. errors: of every head on held-out
    samples. samples: a head, that it was fitted to. ahead: how many positions further on than right behind the text
    their conversations begin, at most. windows: what layers without heads keep, by layer.
    """

    plan: Plan
    layers: list[store.Tensors]
    errors: list[float]
    samples: int
    ahead: int
    windows: dict[int, Kept]
    answers: list[Answer]

    @property
    def offsets(self) -> list[mx.array | None]:
        """What each layer's keys are relative to, [K, D]."""
        return [layer.get("offsets") for layer in self.layers]

    def check(
        self,
        runner: LayerRunner,
        make_cache: fidelity.MakeCache,
        no_context: fidelity.MakeCache,
        *,
        recall: Calibration,
    ) -> JsonObject:
        """How far the file's answers and those without a context are from those with this chunk's full cache
        (`verdict`). recall: told of the answers."""
        with_file, without = list[fidelity.Divergence](), list[fidelity.Divergence]()
        for number, (conversation, hidden) in enumerate(self.answers):
            truth = runner.logits(hidden[None])[0]
            for divergences, make in ((with_file, make_cache), (without, no_context)):
                (logits,) = fidelity.answer_logits(runner.model, make(), [conversation])
                if make is make_cache:
                    recall.add(conversation.prompt, conversation.answer, truth, logits)
                divergences.append(fidelity.divergence(truth, logits, conversation.answer, number))
        return measured(fidelity.joined(with_file), fidelity.joined(without))

    def save(self, checkpoint: Checkpoint) -> None:
        """Keeps it, so that an interrupted fit does not read this text again."""
        checkpoint.save_chunk(*self._flat())

    def _flat(self) -> tuple[store.Tensors, JsonObject]:
        """Its arrays by name, and all else."""
        arrays = {f"layers.{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.items()}
        arrays |= {f"answers.{i}.hidden": answer.hidden for i, answer in enumerate(self.answers)}
        arrays |= {f"windows.{i}.{name}": x for i, kept in self.windows.items() for name, x in kept.tensors().items()}
        record: JsonObject = {
            "plan": self.plan._asdict(),
            "errors": self.errors,
            "samples": self.samples,
            "ahead": self.ahead,
            "windows": bool(self.windows),
            "layers": len(self.layers),
            "answers": [asdict(answer.conversation) for answer in self.answers],
        }
        return arrays, record

    @classmethod
    def load(cls, checkpoint: Checkpoint, geometry: Geometry, length: int) -> Self | None:
        """What `save` kept of so many tokens, if it did."""
        saved = checkpoint.load_chunk()
        return None if saved is None else cls._of(*saved, geometry, length)

    @classmethod
    def of_all_ranks(
        cls, world: World, own: Mapping[int, Self], geometry: Geometry, lengths: Sequence[int]
    ) -> dict[int, Self]:
        """The chunks that all ranks have, by their numbers. lengths: of all chunks, in tokens. All ranks must call
        it."""
        if world.size == 1:
            return dict(own)
        flat = {number: chunk._flat() for number, chunk in own.items()}
        sent = {f"{number}/{name}": x for number, (arrays, _) in flat.items() for name, x in arrays.items()}
        found: dict[int, Self] = {}
        records = world.values({number: record for number, (_, record) in flat.items()})
        for arrays, of in zip(world.arrays(sent), records, strict=True):
            for number, record in of.items():
                own_arrays = {n.partition("/")[2]: x for n, x in arrays.items() if n.startswith(f"{number}/")}
                found.setdefault(int(number), cls._of(own_arrays, record, geometry, lengths[int(number)]))
        return found

    @classmethod
    def _of(cls, arrays: Mapping[str, mx.array], record: JsonObject, geometry: Geometry, length: int) -> Self:
        groups: dict[tuple[str, int], store.Tensors] = {}
        for key, array in arrays.items():
            group, number, name = key.split(".", 2)
            groups.setdefault((group, int(number)), {})[name] = array
        conversations = [Conversation(**c) for c in record["answers"]]
        return cls(
            plan=Plan.of(record["plan"]),
            layers=[groups["layers", i] for i in range(record["layers"])],
            errors=record["errors"],
            samples=record["samples"],
            ahead=record["ahead"],
            windows=states.read(dict(arrays), geometry, length) if record["windows"] else {},
            answers=[Answer(c, groups["answers", i]["hidden"]) for i, c in enumerate(conversations)],
        )
