"""Fitting layer by layer: a context is read and fitted while the keys and values of only one layer exist.

    sample conversations, a passage of the text in view -> decide each head's budget on an excerpt
    -> for each layer: read the text, hear the conversations behind all of it, fit the layer's heads, forget its keys

Memory is then the hidden states of all tokens, one layer's keys and values and its training rows. The conversations
are not those that the full context would have brought about, but the attention that heads are fitted to is the full
context's own: the divergence is somewhat larger than where answers are sampled with everything in view, by a quarter in
a prototype (docs/log/layerwise.md).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import store
from ..core.clock import Clock
from ..core.device import device
from ..heads import Exact, Size
from ..mlxlm import prompts
from ..mlxlm.attention_patch import Geometry, compute_type
from ..mlxlm.cache import Window
from . import finite, prefill, sizes
from .checkpoint import Checkpoint, Plan
from .config import FitConfig, allocate, layout_for, rows_for
from .fitted_chunk import Answer, FittedChunk, checked
from .fitter import CHECK_TEMPERATURE, Fitter, Progress
from .layers import LayerRunner
from .prefill import READ, Context
from .samples import capture, self_study
from .samples.capture import CaptureCache, ReplayBatch
from .samples.sample_store import SampleStore
from .samples.self_study import Conversation, Split
from .solve import initial

_PASSAGE = 900  # tokens in view while a conversation is sampled, at most
_PROMPT = 96  # tokens of a long prompt
_EXCERPT, _EXCERPT_QUERIES = 1024, 3000  # at most
_GOLDEN = 0.6180339887  # multiples of it, modulo 1, fill the unit interval evenly at any number


class LayerwiseFitter:
    """The model, the text, and what was said about it. Heads are numbered as in `Fitter`, and `skip` means the same."""

    conversations: list[Conversation]
    answers: list[Answer]  # to the last layer's end, once all layers were heard

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prefix: Sequence[int],
        geometry: Geometry,
        config: FitConfig,
        *,
        progress: Progress,
        checkpoint: Checkpoint,
        skip: int = 0,
        offsets: Sequence[mx.array | None] = (),
    ):
        self.model, self.tokenizer, self.prefix, self.geometry = model, tokenizer, list(prefix), geometry
        self._offsets = dict(zip(geometry.fitted, offsets, strict=False))  # of layers whose keys' mean is not taken
        self.config, self.progress, self.checkpoint, self.skip = config, progress, checkpoint, skip
        self.layout = layout_for(config, geometry, n_layers=len(geometry.fitted))
        self.windows: dict[int, Window] = {}
        self._walk = LayerRunner(model, geometry)
        self.queries = rows_for(config, heads=geometry.n_kv_heads, head_dim=geometry.head_dim)
        self._wanted: dict[Split, int] = {"train": self.queries, "held_out": max(self.queries // 10, 64)}  # rows a head
        self.rows = 0  # a head, that it was fitted to
        checkpoint.claim(asdict(config) | {"skip": skip}, prefix)

    @cached_property
    def _memory(self) -> int:
        """Bytes that every phase keeps to: about what must exist while a layer is fitted, 1.5 times its keys and
        values, 3 times the hidden states, and its rows."""
        g = self.geometry
        numbers = len(self.prefix) * (3 * g.n_kv_heads * g.head_dim + 3 * self._walk.width)
        return numbers * compute_type(self.model).size + SampleStore.nbytes(g.n_kv_heads, self.queries, g.head_dim)

    @cached_property
    def _tokens(self) -> int:
        """Tokens whose keys and values may be in all layers at once: three eighths are read, the others said."""
        token = self.geometry.cache_bytes(1) * compute_type(self.model).size // 2
        return max(device().layerwise_tokens, self._memory * 15 // 16 // token)

    @property
    def _seen(self) -> int:
        """Tokens of a passage."""
        return min(_PASSAGE, self._tokens * 3 // 8)

    @property
    def _together(self) -> int:
        """Conversations that are sampled side by side, with a passage or as large an excerpt in view."""
        return max(
            1, min(device().passage_conversations, (self._tokens - self._seen) // (_PROMPT + self.config.answer_tokens))
        )

    def fit(self, nbytes: float, share: float, *, clock: Clock, plan: Plan | None = None) -> FittedChunk:
        """All heads, in so many bytes, a share of the KV cache. plan: what each head gets, where it was decided
        elsewhere."""
        plan = plan or self.plan(nbytes, share)
        clock.lap("budgets")
        self.converse()
        clock.lap("study")
        part = self.regress(plan.sizes)
        clock.lap("regression")
        return part

    def converse(self) -> None:
        """Samples conversations until every head has its rows, about passages spread evenly over the text."""
        self.conversations = self.checkpoint.load_conversations()
        with self.progress("sampling answers", self.queries) as done:
            try:
                while any(self._rows(split) < wanted for split, wanted in self._wanted.items()):
                    self.conversations += self._ask_batch(
                        self_study.training_conversations, self.config.temperature, done
                    )
                while len(checked(self.conversations)) < self.config.checks:
                    self.conversations += self._ask_batch(self_study.check_conversations, CHECK_TEMPERATURE, done)
            finally:
                self.checkpoint.save_conversations(self.conversations)

    def _rows(self, split: Split) -> int:
        """Rows a head that the conversations of a split so far will give."""
        return self_study.n_samples(self.conversations, self.geometry, split=split)

    def _passage(self, number: int) -> list[int]:
        opening = prompts.preamble(self.tokenizer)
        last = max(opening, len(self.prefix) - self._seen)
        start = opening + int((number * _GOLDEN + 0.5) % 1 * (last - opening + 1))
        return self.prefix[:opening] + self.prefix[start : start + self._seen]

    def _ask_batch(
        self, make: Callable[..., list[Conversation]], temperature: float, done: Callable[[int], None]
    ) -> list[Conversation]:
        """Conversations about the next passage. make: a function of `self_study` that writes their prompts."""
        config, number, rows = self.config, len(self.conversations), self._rows("train")
        passage = self._passage(number // self._together)
        batch = make(self.tokenizer, passage, first=number, count=self._together, seed=config.seed)
        self_study.sample_answers(
            self.model,
            prefill.read_text(self.model, passage, self.geometry),
            sorted(batch, key=lambda c: len(c.prompt)),
            stop=set(self.tokenizer.eos_token_ids),
            max_tokens=config.answer_tokens,
            temperature=temperature,
            key=mx.random.key(config.seed + number),
            progress=lambda at: done(min(self.queries, rows + self_study.n_samples(batch, self.geometry, until=at))),
        )
        mx.clear_cache()
        return batch

    def plan(self, nbytes: float, share: float) -> Plan:
        """Every head's size, by the errors of a short uniform fit to an excerpt of the text, as long as is quick.

        Which heads need most is far more a matter of the model than of the text.
        """
        plan = self.checkpoint.load_plan()
        if plan is None:
            n = len(self.prefix) - prompts.preamble(self.tokenizer)
            excerpt = prefill.read_text(self.model, self.prefix[: min(_EXCERPT, self._tokens * 3 // 8)], self.geometry)
            config = replace(
                self.config,
                queries=min(self.queries, _EXCERPT_QUERIES),
                conversations=self._together,
                memory=self._memory,
            )
            trial = Fitter(self.model, self.tokenizer, excerpt, self.geometry, config, progress=self.progress)
            trial.converse()
            trial.hear(together=device().layerwise_replay_tokens)
            trial.prepare()
            few = nbytes * len(excerpt.prefix) / len(self.prefix)
            nodes, *_ = initial.size_for(trial.layout, few / trial.n_heads, most=trial.length)
            # Rows of heads that are tried together are there at once.
            heads = self._memory // 8 // SampleStore.nbytes(1, trial.queries, self.geometry.head_dim)
            trial.room = min(self._room, heads * nodes * config.batch)
            errors = sizes.trial_errors(trial, few)
            plan = Plan(allocate(errors, nbytes, share=share, layout=self.layout, config=self.config, n=n), share)
            self.checkpoint.save_plan(plan)
        return plan

    def regress(self, sizes: Sequence[Size]) -> FittedChunk:
        """All heads, trained at their own sizes; each layer's are kept as they will be stored, which is how little they
        take from now on."""
        K, layers, errors = self.geometry.n_kv_heads, list[store.Tensors](), list[float]()
        with self.progress("fitting layers", self.layout.n_layers) as done:
            for fitter in self.layers():
                fitter.prepare()
                heads = fitter.regress(sizes[len(errors) : len(errors) + K])
                layers.append(store.pack(fitter.layout, heads, offsets=fitter.context.offsets))
                errors += fitter.errors(store.unpack(fitter.layout, layers[-1]))
                done(len(layers))
        return FittedChunk(layers=layers, errors=errors, rows=self.rows, windows=self.windows, answers=self.answers)

    def layers(self) -> Iterator[Fitter]:
        """For each layer with full attention, a Fitter of that layer alone that has heard the conversations."""
        text = [self._walk.embed(mx.array([self.prefix[a : a + READ]])) for a in range(0, len(self.prefix), READ)]
        group = self.geometry.n_heads // self.geometry.n_kv_heads
        K, D = self.geometry.n_kv_heads, self.geometry.head_dim
        studies = {split: SampleStore(K, rows, D, folder=None) for split, rows in self._wanted.items()}
        batches = capture.together(self.conversations, studies, group=group, tokens=READ)
        heard = [self._walk.embed(batch.tokens) for batch in batches]
        mx.eval(text, heard)
        for layer in range(self.geometry.n_layers):
            part = self._read(layer, text)
            if isinstance(part, Window):
                self.windows[layer] = part
                self._hear(layer, partial(part.make_cache, len(self.prefix)), batches, heard, studies)
            else:
                for study in studies.values():
                    study.rows = 0
                make_cache = partial(CaptureCache, part, len(self.prefix), skip=self.skip)
                self._hear(layer, make_cache, batches, heard, studies)
                yield self._fitter(layer, part, studies)
            del part
            mx.clear_cache()
        self.rows = studies["train"].rows
        places = {id(c): (b, i) for b, batch in enumerate(batches) for i, c in enumerate(batch.conversations)}
        found = ((c, *places[id(c)]) for c in checked(self.conversations))
        self.answers = [Answer.of(c, heard[b][i]) for c, b, i in found]

    def _fitter(self, layer: int, bank: Exact, studies: Mapping[Split, SampleStore]) -> Fitter:
        """One layer's, with the rows that were just captured."""
        context, K = Context(self.prefix, [bank]), self.geometry.n_kv_heads
        checkpoint = self.checkpoint.part(f"layer-{layer}")
        fitter = Fitter(
            self.model, self.tokenizer, context, self.geometry, self.config, checkpoint=checkpoint, skip=self.skip
        )
        fitter.study, fitter.held_out, fitter.room = studies["train"], studies["held_out"], self._room
        broken = {at + K * self.geometry.fitted.index(layer) for study in studies.values() for at in study.not_finite}
        finite.check_heads("capturing attention", broken, self.geometry)
        return fitter

    @property
    def _room(self) -> int:
        """Scores of a training batch: few, for heads that are trained together have their rows there together."""
        return max(device().layer_training_scores, self._memory // 768)

    def _read(self, layer: int, text: list[mx.array]) -> Exact | Window:
        """The text through one layer, its hidden states [1, READ, E] replaced piece by piece."""
        cache = prefill.reading_cache(len(self.prefix), self.geometry.windows[layer], prefill=self.config.prefill)
        for i, piece in enumerate(text):
            after = self._walk.layer(layer, piece, cache)
            if layer < self.geometry.n_layers - 1:
                text[i] = after
            del after, piece  # behind the last layer nobody needs the text: what is not evaluated costs nothing
            mx.eval(text[i], cache.state)
            mx.clear_cache()
        return prefill.what_was_read(cache, scale=self.geometry.scale, offset=self._offsets.get(layer))

    def _hear(
        self,
        layer: int,
        make_cache: Callable[[], Any],
        batches: Sequence[ReplayBatch],
        heard: list[mx.array],
        studies: Mapping[Split, SampleStore],
    ) -> None:
        """The conversations through one layer behind the whole text; what its attention saw goes to the studies."""
        for i, batch in enumerate(batches):
            cache = make_cache()
            heard[i] = self._walk.layer(layer, heard[i], cache)
            mx.eval(heard[i], cache.state)
            if isinstance(cache, CaptureCache):
                capture.record([cache], studies.values(), batch.places)
