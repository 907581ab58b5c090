"""What every baseline is given, and what it returns."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import store
from ..core.device import device
from ..errors import NectarError
from ..fitting import fisher, prefill
from ..fitting.fidelity import Prompt
from ..fitting.fisher import N_PROBE
from ..fitting.prefill import Context
from ..fitting.samples import capture, instructions, self_study
from ..fitting.samples.conversation import Conversation, count_samples
from ..fitting.samples.sample_store import DeviceSampleStore, Samples, SampleStore
from ..fitting.solve import attention_matching
from ..heads import Bank, HeadArrays, Weighed
from ..mlxlm import prompts
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.cache import Window, make_caches
from ..store import Layout

BITS = {"quadrature": 5, "exact": 8}  # of a matrix entry, unless told: what serves each best (docs/log/baselines.md)


@dataclass(frozen=True, kw_only=True)
class View:
    """One way of seeing a context: a bank a layer, the position of the first live token, and what it costs.

    windows: what sliding-window layers keep. nbytes: what has to be kept to answer a question. prompt: what it reads
    instead of a conversation's own prompt. kv_bits: of the live tokens' cache, for methods that keep their text there.
    detail: its settings, for a person.
    """

    banks: Sequence[Bank]
    start: int
    nbytes: int
    windows: Mapping[int, Window] = field(default_factory=dict)
    detail: str = ""
    prompt: Prompt | None = None
    kv_bits: int | None = None

    def make_cache(self) -> list[Any]:
        return make_caches(self.banks, self.windows, self.start, kv_bits=self.kv_bits)


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """A context to be kept in few bytes, and what may be used for it.

    rows: how many captured rows a head the methods that need queries get. conversations: how many conversations these
    are from, at least, and how many a method gets that is trained on them. seed: of those conversations; another one
    than the evaluation's.
    """

    model: nn.Module
    tokenizer: Any
    geometry: Geometry
    context: Context
    rows: int = 4096
    conversations: int = field(default_factory=lambda: device().baseline_conversations)
    seed: int = 77
    answer_tokens: int = 96

    @property
    def n_layers(self) -> int:
        """Layers with full attention; sliding-window layers keep their exact window in every method."""
        return len(self.context.banks)

    @property
    def n_heads(self) -> int:
        return self.n_layers * self.geometry.n_kv_heads

    @property
    def window_bytes(self) -> int:
        return sum(2 * (w.keys.size + w.values.size) for w in self.context.windows.values())

    @property
    def length(self) -> int:
        return len(self.context.prefix)

    @cached_property
    def head(self) -> list[int]:
        """The chat template's own tokens in front of the document."""
        return self.context.prefix[: len(prompts.head(self.tokenizer))]

    @cached_property
    def document(self) -> str:
        """The text that the prefix holds."""
        text = str(self.tokenizer.decode(self.context.prefix[len(self.head) :], skip_special_tokens=True))
        return text.removeprefix(prompts.INTRODUCTION).strip()

    @cached_property
    def studied(self) -> tuple[SampleStore, list[Conversation]]:
        """Samples rows of all heads, and the conversations they are from; training templates, full cache in view."""
        asked = instructions.training(self.passage, seed=self.seed)
        size = min(device().baseline_batch, max(8, self.conversations, self.rows // 400))
        conversations: list[Conversation] = []
        while (
            len(conversations) < self.conversations
            or count_samples(conversations, group=self.geometry.n_heads // self.geometry.n_kv_heads) < self.rows
        ):
            batch = [Conversation(self.ask(next(asked))) for _ in range(size)]
            self.converse(self.context, batch, seed=self.seed + len(conversations), temperature=0.9)
            conversations += batch
        return self.heard(conversations), conversations

    def heard(self, conversations: Sequence[Conversation]) -> SampleStore:
        """What attention sees in the conversations, at most `rows` rows a head, with the full cache in view."""
        if device().linux_cpu:
            study = SampleStore(self.n_heads, self.rows, self.geometry.head_dim, folder=None)
        else:
            study = DeviceSampleStore(self.rows)
        capture.replay(self.model, self.context, conversations, {"train": study}, n_heads=self.geometry.n_heads)
        return study

    @cached_property
    def metric(self) -> mx.array:
        """What counts the errors of the heads in nats, [n_heads, D, D] (fitting/fisher.py)."""
        told = [c for c in self.studied[1] if c.answer][:N_PROBE]
        information = fisher.fisher(self.model, self.context, told, geometry=self.geometry)
        return fisher.metric(information)

    def ask(self, question: str) -> list[int]:
        return prompts.prompt(self.tokenizer, question)

    def passage(self, rng: random.Random) -> str:
        """Some 20 to 60 tokens of the document."""
        return instructions.passage(self.tokenizer, self.context.prefix[len(self.head) :], rng)

    def converse(
        self,
        context: Context | View,
        batch: Sequence[Conversation],
        *,
        seed: int,
        temperature: float,
        max_tokens: int | None = None,
    ) -> None:
        """Samples the answers of a batch with some view of the context."""
        start = context.start
        self_study.sample_answers(
            self.model,
            Context(self.context.prefix[:start], list(context.banks), dict(context.windows)),  # type: ignore[arg-type]
            sorted(batch, key=lambda c: len(c.prompt)),
            stop=set(self.tokenizer.eos_token_ids),
            max_tokens=max_tokens or self.answer_tokens,
            temperature=temperature,
            key=mx.random.key(seed),
        )

    def layer(self, layer: int) -> tuple[mx.array, mx.array]:
        """The exact keys and values of one layer, [K, n, D] each; the keys are relative to `offset(layer)`."""
        parameters = self.context.banks[layer].parameters
        return parameters["keys"], parameters["values"]

    def offset(self, layer: int) -> mx.array:
        """[K, D]"""
        offset = self.context.banks[layer].offset
        return mx.zeros((self.geometry.n_kv_heads, self.geometry.head_dim)) if offset is None else offset

    def bias(self, layer: int) -> mx.array:
        """What is added to the scores of these keys, [K, n]: not nothing where the chunks of a text are weighed."""
        parameters = self.context.banks[layer].parameters
        return parameters.get("bias", mx.zeros(parameters["keys"].shape[:2]))

    def captured(self, layer: int) -> Samples:
        """The studied rows of one layer's heads."""
        K = self.geometry.n_kv_heads
        return self.studied[0].heads(range(layer * K, layer * K + K))

    @cached_property
    def importance(self) -> list[mx.array]:
        """Per layer, the root-mean-square attention of every key, [K, n]."""
        scale = self.geometry.scale
        return [
            attention_matching.importance(
                self.captured(layer), self.layer(layer)[0], bias=self.bias(layer), scale=scale
            )
            for layer in range(self.n_layers)
        ]

    def layout(self, kind: str, bits: int | None = None) -> Layout:
        g = self.geometry
        return Layout(
            kind=kind,
            n_layers=self.n_layers,
            n_kv_heads=g.n_kv_heads,
            head_dim=g.head_dim,
            scale=g.scale,
            bits=bits or BITS[kind],
        )

    def affordable(self, nbytes: int, kind: str, bits: int | None = None) -> int:
        """How many nodes or keys, all heads together, fit in nbytes when stored as the file stores them."""
        layout = self.layout(kind, bits)
        besides = self.window_bytes + (4 + 2 * self.geometry.head_dim) * self.n_heads  # sizes and offsets
        return int((nbytes - besides) / store.head_bytes(layout, (1,)))

    def affordable_each(self, nbytes: int, kind: str, bits: int | None = None) -> int:
        """The same, shared evenly by the heads. NectarError where not even one fits."""
        count = min(self.length, self.affordable(nbytes, kind, bits) // self.n_heads)
        if count < 1:
            raise NectarError(f"{nbytes:,} bytes do not hold one key a head")
        return count

    def stored(
        self,
        kind: str,
        heads: Sequence[HeadArrays],
        *,
        bits: int | None = None,
        offsets: Sequence[mx.array | None] | None = None,
        **options: Any,
    ) -> View:
        """The view that heads (layer by layer) give once they were stored in few bits, at what they then take.

        offsets: what their keys are relative to (default: what the context's are)."""
        layout = self.layout(kind, bits)
        tensors = store.pack(layout, heads, offsets=self.context.offsets if offsets is None else offsets)
        view = View(
            banks=store.unpack(layout, tensors),
            start=self.context.start,
            nbytes=sum(t.nbytes for t in tensors.values()) + self.window_bytes,
            windows=self.context.windows,
        )
        return replace(view, **options)

    def keep(self, chosen: Callable[[int], mx.array], **options: Any) -> View:
        """The context's own keys and values at chosen(layer) [K, m], each weighed as it was, nothing else."""
        heads, biases = list[HeadArrays](), list[mx.array]()
        for layer in range(self.n_layers):
            keys, values = self.layer(layer)
            index = chosen(layer)
            kept = [mx.take_along_axis(x, index[..., None], axis=1) for x in (keys, values)]
            heads += [{"keys": k, "values": v} for k, v in zip(*kept, strict=True)]
            biases.append(mx.take_along_axis(self.bias(layer), index, axis=1))
        view = self.stored("exact", heads, **options)
        banks: Any = zip(view.banks, biases, strict=True)
        return replace(view, banks=[Weighed.of(bank, bias) for bank, bias in banks])

    def keep_best(self, scores: Callable[[int], mx.array], nbytes: int, **options: Any) -> View:
        """The keys of the highest scores(layer) [K, n], the same number for every head, as many as fit in nbytes."""
        count = self.affordable_each(nbytes, "exact")
        options.setdefault("detail", f"{count} keys a head")
        return self.keep(lambda layer: mx.sort(mx.argsort(-scores(layer), axis=1)[:, :count], axis=1), **options)

    def text(self, ids: Sequence[int], **options: Any) -> View:
        """Other tokens behind the template's head instead of the document, their keys and values in int8."""
        prefix = self.head + list(ids)
        read = prefill.read_text(self.model, prefix, self.geometry)
        heads = [head for bank in read.banks for head in bank.unstack()]
        options |= {"start": len(prefix), "windows": read.windows}
        return self.stored("exact", heads, offsets=read.offsets, **options)

    @property
    def text_bytes(self) -> float:
        """What one token of text takes, its keys and values in int8 in all heads."""
        return self.n_heads * store.head_bytes(self.layout("exact"), (1,))


Method = Callable[[EvalContext, int], View]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A method's name and how it is built: `build(task, nbytes)` returns a view of at most nbytes where `sized`.

    extra: left out unless it is named: minutes of work even on a GPU, or a weaker form of another one.
    """

    name: str
    build: Method
    sized: bool = True
    extra: bool = False

    @property
    def slug(self) -> str:
        return slug(self.name)


def slug(name: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))
