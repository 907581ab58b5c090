"""What every baseline gets, the `EvalContext`, and what it returns, a `View`."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .. import store
from ..core.device import device
from ..core.types import LayerCache, Tokenizer
from ..errors import NectarError
from ..fitting import fisher, prefill
from ..fitting.fidelity import Change, Prompt
from ..fitting.prefill import Context
from ..fitting.samples import capture, instructions, sampling
from ..fitting.samples.conversation import Conversation, count_samples
from ..fitting.samples.sample_store import DeviceSampleStore, Samples, SampleStore
from ..fitting.solve import attention_matching
from ..heads import Bank, Exact, HeadArrays, Weighed
from ..mlxlm import prompts
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.kept import Kept, make_caches
from ..store import Layout

BITS = {"quadrature": 5, "exact": 8}  # of a matrix entry, by default: the best for each (docs/log/baselines.md)


@dataclass(frozen=True, kw_only=True)
class LiveText:
    """Text that a view reads with each question, as live tokens. prompt: makes the prompt with the text in it, from a
    conversation. kv_bits: of the live tokens' cache; None for the model's own type."""

    prompt: Prompt
    kv_bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class View:
    """A replacement of the full KV cache: a bank a layer, the position of the first live token, and its size.

    windows: what layers without heads keep, by layer. nbytes: what has to be kept to answer a question. detail: the
    method's settings, for a person. live_text: what it reads with each question, if anything. change: of its logits.
    """

    banks: Sequence[Bank]
    start: int
    nbytes: int
    windows: Mapping[int, Kept] = field(default_factory=dict)
    detail: str = ""
    live_text: LiveText | None = None
    change: Change | None = None

    @property
    def prompt(self) -> Prompt | None:
        """Makes the prompt from a conversation; None for the conversation's own."""
        return self.live_text.prompt if self.live_text else None

    def make_cache(self) -> Sequence[LayerCache]:
        kv_bits = self.live_text.kv_bits if self.live_text else None
        return make_caches(self.banks, self.windows, self.start, kv_bits=kv_bits)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What methods may learn from, and how long answers get.

    samples: captured queries a head for the methods that need queries. conversations: how many conversations these come
    from, at least; None for the device's number. A method that is trained on conversations gets all of them. seed: of
    these conversations; not the evaluation's. answer_tokens: the longest answer.
    """

    samples: int = 4096
    conversations: int | None = None
    seed: int = 77
    answer_tokens: int = 96


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """The context that every method has to keep in few bytes, and what a method may use for it: the model, the exact
    keys and values, and self-study conversations with the samples captured from them."""

    model: nn.Module
    tokenizer: Tokenizer
    geometry: Geometry
    context: Context
    config: EvalConfig = field(default_factory=EvalConfig)

    @property
    def full_cache(self) -> View:
        """The exact keys and values, what every method is compared with. It counts no bytes."""
        return View(banks=self.context.banks, windows=self.context.windows, start=self.context.start, nbytes=0)

    @property
    def n_layers(self) -> int:
        """Layers with full attention; sliding-window layers keep their exact window in every method."""
        return len(self.context.banks)

    @property
    def n_heads(self) -> int:
        return self.n_layers * self.geometry.n_kv_heads

    @property
    def window_bytes(self) -> int:
        return sum(kept.nbytes for kept in self.context.windows.values())

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
    def conversations(self) -> list[Conversation]:
        """Self-study conversations: training templates, answered with the full cache."""
        config, wanted = self.config, self.config.conversations or device().baseline_conversations
        questions = instructions.training(self.passage, seed=config.seed)
        size = min(device().baseline_batch, max(8, wanted, config.samples // 400))
        conversations: list[Conversation] = []
        group = self.geometry.n_heads // self.geometry.n_kv_heads
        while len(conversations) < wanted or count_samples(conversations, group=group) < config.samples:
            batch = [Conversation(self.ask(next(questions))) for _ in range(size)]
            self.sample_answers(self.full_cache, batch, seed=config.seed + len(conversations), temperature=0.9)
            conversations += batch
        return conversations

    @property
    def answered(self) -> list[Conversation]:
        """The self-study conversations whose answer is not empty."""
        return [c for c in self.conversations if c.answer]

    @cached_property
    def samples(self) -> SampleStore:
        """Captured queries of all heads, from the self-study conversations."""
        return self.replay(self.conversations)

    def replay(self, conversations: Sequence[Conversation]) -> SampleStore:
        """Samples of all heads from a teacher-forced pass over the conversations behind the full cache: at most
        `config.samples` a head."""
        if device().linux_cpu:
            store = SampleStore(self.n_heads, self.config.samples, self.geometry.head_dim, folder=None)
        else:
            store = DeviceSampleStore(self.config.samples)
        capture.replay(self.model, self.context, conversations, {"train": store}, n_heads=self.geometry.n_heads)
        return store

    @cached_property
    def metric(self) -> mx.array:
        """The metric that measures the heads' errors in nats, [n_heads, D, D] (fitting/fisher.py)."""
        probes = self.answered[: device().fisher_probes]
        return fisher.metric(self.model, self.context, probes, geometry=self.geometry)

    def ask(self, question: str) -> list[int]:
        return prompts.prompt(self.tokenizer, question)

    def passage(self, rng: random.Random, at: float | None = None) -> str:
        """A passage of 20 to 60 tokens of the document, at this place in [0, 1) or anywhere."""
        return instructions.passage(self.tokenizer, self.context.prefix[len(self.head) :], rng, at)

    def sample_answers(
        self,
        view: View,
        batch: Sequence[Conversation],
        *,
        seed: int,
        temperature: float,
        max_tokens: int | None = None,
    ) -> None:
        """Samples the answers of a batch with a view of the context."""
        most = max_tokens or self.config.answer_tokens
        sampling.sample_answers(
            self.model,
            Context(self.context.prefix[: view.start], list(view.banks), dict(view.windows)),  # type: ignore[arg-type]
            sorted(batch, key=lambda c: len(c.prompt)),
            stop=set(self.tokenizer.eos_token_ids),
            max_tokens=most,
            temperature=temperature,
            chances=sampling.chances(seed, range(len(batch)), most),
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
        """What is added to the scores of these keys, [K, n]: zero unless the text was read in chunks."""
        parameters = self.context.banks[layer].parameters
        return parameters.get("bias", mx.zeros(parameters["keys"].shape[:2]))

    def captured(self, layer: int) -> Samples:
        """The samples of one layer's heads."""
        K = self.geometry.n_kv_heads
        return self.samples.heads(range(layer * K, layer * K + K))

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
            value_dim=0 if g.value_dim == g.head_dim else g.value_dim,
            bits=bits or BITS[kind],
        )

    def affordable(self, nbytes: int, kind: str, bits: int | None = None) -> int:
        """How many nodes or keys, over all heads, fit in nbytes when stored as a file stores them."""
        layout = self.layout(kind, bits)
        fixed = self.window_bytes + (4 + 2 * self.geometry.head_dim) * self.n_heads  # sizes and offsets
        return int((nbytes - fixed) / store.head_bytes(layout, (1,)))

    def affordable_each(self, nbytes: int, kind: str, bits: int | None = None) -> int:
        """`affordable` for each head, shared evenly; NectarError if not even one fits."""
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
        """The view of heads, layer by layer, after rounding them to the bits of a file; nbytes is their stored size.

        offsets: what their keys are relative to, by layer (default: the context's)."""
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
        """The context's own keys and values at the positions chosen(layer) [K, m], with their biases."""
        heads, biases = list[HeadArrays](), list[mx.array]()
        for layer in range(self.n_layers):
            keys, values = self.layer(layer)
            index = chosen(layer)
            kept = [mx.take_along_axis(x, index[..., None], axis=1) for x in (keys, values)]
            heads += [{"keys": k, "values": v} for k, v in zip(*kept, strict=True)]
            biases.append(mx.take_along_axis(self.bias(layer), index, axis=1))
        view = self.stored("exact", heads, **options)
        banks = cast("Sequence[Exact]", view.banks)
        return replace(view, banks=[Weighed.of(bank, bias) for bank, bias in zip(banks, biases, strict=True)])

    def keep_best(self, scores: Callable[[int], mx.array], nbytes: int, **options: Any) -> View:
        """The keys of the highest scores(layer) [K, n]: the same number for every head, as many as fit in nbytes."""
        count = self.affordable_each(nbytes, "exact")
        options.setdefault("detail", f"{count} keys a head")
        return self.keep(lambda layer: mx.sort(mx.argsort(-scores(layer), axis=1)[:, :count], axis=1), **options)

    def text(self, ids: Sequence[int], **options: Any) -> View:
        """Other tokens in the document's place, behind the template's head; keys and values in int8."""
        prefix = self.head + list(ids)
        read = prefill.read_text(self.model, prefix, self.geometry)
        heads = [head for bank in read.banks for head in bank.unstack()]
        options |= {"start": len(prefix), "windows": read.windows}
        return self.stored("exact", heads, offsets=read.offsets, **options)

    @property
    def text_bytes(self) -> float:
        """Bytes of one token's keys and values in int8, all heads."""
        return self.n_heads * store.head_bytes(self.layout("exact"), (1,))


Method = Callable[[EvalContext, int], View]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A method: `build(ctx, nbytes)` returns a view, of at most nbytes if `sized`.

    extra: left out unless the user names it, because it takes minutes on a GPU or is a weaker form of another one.
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
