"""Fitting layer by layer: a context is read and fitted while the keys and values of only one layer exist.

    sample conversations about passages of the text -> decide each head's size on an excerpt
    -> for each layer: read the text, replay the conversations behind all of it, fit the layer's heads, forget its keys

Memory is then the hidden states of all tokens, one layer's keys and values and its training samples. The conversations
are not those that the full context would have brought about, but the attention that heads are fitted to is the full
context's own: the divergence is somewhat larger than where answers are sampled with the full cache, by a quarter in a
prototype (docs/log/layerwise.md).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import mlx.core as mx

from .. import store
from ..core.clock import Clock
from ..core.device import device
from ..core.progress import no_update, silent
from ..heads import Exact
from ..mlxlm import prompts
from ..mlxlm.attention_patch import compute_type
from ..mlxlm.kept import Kept, make_caches, what_is_kept, widened
from . import finite
from .budget import equal_size, head_sizes
from .checkpoint import Plan
from .distributed import parts
from .fitted_chunk import Answer, ChunkTarget, FittedChunk
from .kinds import KindFit, kind_fit
from .layers import LayerRunner
from .prefill import READ, Context, read_text, reading_cache
from .run import FitRun
from .samples import instructions, self_study
from .samples.ahead import furthest, spaced
from .samples.capture import CaptureCache, Collected, ReplayBatch, capture, held_out_count, record, replay_batches
from .samples.conversation import Conversation, Split, answered_checks, count_samples, furthest_ahead
from .samples.sample_store import SampleStore
from .sizes import mean_bits, sensitivity, trial_errors
from .train import merged_errors, train_heads

PASSAGE = 900  # tokens that a conversation is sampled about, at most
PROMPT = 96  # tokens of a long prompt
_EXCERPT, _EXCERPT_SAMPLES = 1024, 3000  # tokens and samples a head by which sizes are decided, at most


class LayerwiseFit:
    """The fit of a text, or of a chunk of one, layer by layer. Heads are numbered as in `KindFit`."""

    def __init__(self, run: FitRun, prefix: Sequence[int], target: ChunkTarget):
        self.run, self.prefix, self.target = run, list(prefix), target
        self.runner = LayerRunner(run.model, run.geometry)
        train = run.n_samples(run.geometry.n_kv_heads)
        self.wanted: dict[Split, int] = {"train": train, "held_out": held_out_count(train)}  # samples a head

    @cached_property
    def memory(self) -> int:
        """Bytes that every phase keeps to: about what must exist while a layer is fitted, 1.5 times its keys and
        values, 3 times the hidden states, and its samples."""
        g = self.run.geometry
        numbers = len(self.prefix) * (3 * g.n_kv_heads * g.head_dim + 3 * self.runner.width)
        samples = SampleStore.nbytes(g.n_kv_heads, self.wanted["train"], g.head_dim)
        return numbers * compute_type(self.run.model).size + samples

    @cached_property
    def tokens_at_once(self) -> int:
        """Tokens whose keys and values may be in all layers at once: three eighths are read, the others sampled."""
        token = self.run.geometry.cache_bytes(1) * compute_type(self.run.model).size // 2
        return max(device().layerwise_tokens, self.memory * 15 // 16 // token)

    @property
    def passage_tokens(self) -> int:
        return min(PASSAGE, self.tokens_at_once * 3 // 8)

    @cached_property
    def furthest(self) -> int:
        """How much further on than right behind the text a conversation may begin."""
        first = read_text(self.run.model, self.passage(0), self.run.geometry)
        return furthest(self.run, first, start=len(self.prefix))

    @property
    def side_by_side(self) -> int:
        """Conversations that are sampled together, about a passage or as large an excerpt."""
        fit = (self.tokens_at_once - self.passage_tokens) // (PROMPT + self.run.config.answer_tokens)
        return max(1, min(device().passage_conversations, fit))

    @property
    def training_scores(self) -> int:
        """Scores of a training batch: few, for heads that are trained together have their samples there together."""
        return max(device().layer_training_scores, self.memory // 768)

    def fit(self, *, clock: Clock) -> FittedChunk:
        """All heads."""
        plan = self.target.plan or self.plan()
        clock.lap("budgets")
        conversations = self.study()
        clock.lap("study")
        chunk = self.train(plan, conversations)
        clock.lap("regression")
        return chunk

    def study(self) -> list[Conversation]:
        """Samples conversations until every head has its samples, about passages spread evenly over the text."""
        run, config = self.run, self.run.config
        conversations = run.kept_conversations()
        with run.progress("sampling answers", self.wanted["train"]) as done:
            while any(
                count_samples(conversations, group=run.group, split=split) < wanted
                for split, wanted in self.wanted.items()
            ):
                conversations += self._sample_batch(conversations, self_study.training_conversations, done)
                run.checkpoint.save_conversations(conversations)
        with run.progress("answering check questions", config.checks) as done:
            while len(answered := answered_checks(conversations)) < config.checks:
                done(len(answered))
                conversations += self._sample_batch(conversations, self_study.check_conversations, no_update)
                run.checkpoint.save_conversations(conversations)
        return conversations

    def passage(self, number: int) -> list[int]:
        """The tokens that conversations of one batch are about."""
        preamble = prompts.preamble(self.run.tokenizer)
        last = max(preamble, len(self.prefix) - self.passage_tokens)
        start = preamble + int((number * instructions.GOLDEN + 0.5) % 1 * (last - preamble + 1))
        return self.prefix[:preamble] + self.prefix[start : start + self.passage_tokens]

    def _sample_batch(
        self,
        before: Sequence[Conversation],
        make: self_study.Prompts,
        done: Callable[[int], None],
    ) -> list[Conversation]:
        """Conversations about the next passage."""
        run, number = self.run, len(before)
        passage = self.passage(number // self.side_by_side)
        batch = make(run.tokenizer, passage, first=number, count=self.side_by_side, seed=run.config.seed)
        spaced(run, batch, furthest=self.furthest, first=number)
        samples = count_samples(before, group=run.group)
        self_study.answer(
            run,
            read_text(run.model, passage, run.geometry),
            batch,
            seed=run.config.seed + number,
            progress=self_study.batch_progress(run, batch, samples, self.wanted["train"], done),
        )
        mx.clear_cache()
        return batch

    def plan(self) -> Plan:
        """Every head's size, by the errors of a short uniform fit to an excerpt of the text, as long as is quick.

        Which heads need most is far more a matter of the model than of the text.
        """
        run, target = self.run, self.target
        plan = run.kept_plan()
        if plan is None:
            tokens = min(_EXCERPT, self.tokens_at_once * 3 // 8)
            excerpt = read_text(run.model, self.prefix[:tokens], run.geometry)
            config = replace(
                run.config,
                queries=min(self.wanted["train"], _EXCERPT_SAMPLES),
                conversations=self.side_by_side,
                memory=self.memory,
            )
            trial = run.part("excerpt", config=config)
            trial.claim(excerpt.prefix)
            conversations = self_study.study(trial, excerpt)
            data = capture(trial, excerpt, conversations, tokens=device().layerwise_replay_tokens)
            nbytes = target.nbytes * len(excerpt.prefix) / len(self.prefix)
            nodes, *_ = equal_size(run.layout, nbytes, heads=run.n_heads, most=excerpt.length)
            # Samples of heads that are tried together are there at once.
            samples = SampleStore.nbytes(1, trial.n_samples(run.n_heads), run.geometry.head_dim)
            together = self.memory // 8 // samples
            kind = kind_fit(trial, data, training_scores=min(self.training_scores, together * nodes * run.config.batch))
            n = len(self.prefix) - prompts.preamble(run.tokenizer)
            errors = trial_errors(kind, nbytes, sensitivity(kind))
            sizes = head_sizes(errors, target.nbytes, share=target.share, layout=run.layout, config=run.config, n=n)
            plan = Plan(sizes, target.share, bits=mean_bits(run.layout, sizes, target.nbytes, n=n))
            run.checkpoint.save_plan(plan)
        return plan

    def train(self, plan: Plan, conversations: Sequence[Conversation]) -> FittedChunk:
        """All heads, trained as planned; each layer's are kept as they will be stored, which is how little they
        take from now on."""
        ahead = furthest_ahead(conversations)
        chunk = FittedChunk(plan=plan, layers=[], errors=[], samples=0, ahead=ahead, windows={}, answers=[])
        K, one = self.run.geometry.n_kv_heads, replace(self.run.layout, n_layers=1)
        with self.run.progress("fitting layers", self.run.layout.n_layers) as done:
            for kind in self.layers(conversations, chunk):
                own = plan.sizes[len(chunk.errors) : len(chunk.errors) + K]
                heads = train_heads(kind, own, bits=plan.bits)
                chunk.layers.append(store.pack(one, heads, offsets=kind.data.context.offsets))
                chunk.errors += merged_errors(kind, store.unpack(one, chunk.layers[-1]))
                done(len(chunk.layers))
        return chunk

    def layers(self, conversations: Sequence[Conversation], chunk: FittedChunk) -> Iterator[KindFit]:
        """How the heads of each layer with full attention are fitted, one layer after the other.

        What is left of the others goes into the chunk, and at last the answers that it is checked by.
        """
        g, embed = self.run.geometry, self.runner.embed
        text = [embed(mx.array([self.prefix[a : a + READ]])) for a in range(0, len(self.prefix), READ)]
        stores = {
            split: SampleStore(g.n_kv_heads, count, g.head_dim, folder=None) for split, count in self.wanted.items()
        }
        batches = replay_batches(conversations, stores, group=self.run.group, tokens=READ)
        hidden = [embed(batch.tokens) for batch in batches]
        mx.eval(text, hidden)
        for layer in range(g.n_layers):
            bank, kept = self._read(layer, text)
            if kept is not None:
                chunk.windows[layer] = kept
            for store_ in stores.values() if bank else ():
                store_.clear()
            self._replay(layer, bank, kept, batches, hidden, stores)
            if bank is not None:
                yield self._kind_fit(layer, bank, stores)
            del bank, kept
            mx.clear_cache()
        chunk.samples = stores["train"].count
        places = {id(c): (b, i) for b, batch in enumerate(batches) for i, c in enumerate(batch.conversations)}
        for conversation in answered_checks(conversations):
            b, i = places[id(conversation)]
            chunk.answers.append(Answer.of(conversation, hidden[b][i]))

    def _kind_fit(self, layer: int, bank: Exact, stores: Mapping[Split, SampleStore]) -> KindFit:
        """One layer's, with the samples that were just captured."""
        run, K = self.run.part(f"layer-{layer}", progress=silent), self.run.geometry.n_kv_heads
        run.claim(self.prefix, preamble=self.target.preamble)
        first = K * run.geometry.fitted.index(layer)
        broken = {first + head for store_ in stores.values() for head in store_.not_finite}
        finite.check_heads("capturing attention", broken, run.geometry)
        data = Collected(
            context=Context(self.prefix, [bank], preamble=self.target.preamble),
            conversations=[],
            train=stores["train"],
            held_out=stores["held_out"],
            parts=parts(range(K), run.shares(K, len(self.prefix))),
        )
        return kind_fit(run, data, training_scores=self.training_scores)

    def _read(self, layer: int, text: list[mx.array]) -> tuple[Exact | None, Kept | None]:
        """The text through one layer, its hidden states [1, READ, E] replaced piece by piece."""
        g = self.run.geometry
        cache = reading_cache(len(self.prefix), g.layers[layer], prefill=self.run.config.prefill)
        for i, piece in enumerate(text):
            after = self.runner.layer(layer, piece, cache)
            if layer < g.n_layers - 1:
                text[i] = after
            del after, piece  # behind the last layer the text is not needed: what is not evaluated costs nothing
            mx.eval(text[i], cache.state)
            mx.clear_cache()
        offsets = dict(zip(g.fitted, self.target.offsets, strict=False))  # empty where the keys' mean is taken
        return what_is_kept(cache, g.layers[layer], offset=offsets.get(layer))

    def _replay(
        self,
        layer: int,
        bank: Exact | None,
        kept: Kept | None,
        batches: Sequence[ReplayBatch],
        hidden: list[mx.array],
        stores: Mapping[Split, SampleStore],
    ) -> None:
        """The conversations through one layer behind the whole text; what its attention saw goes to the stores."""
        make = partial(CaptureCache, preamble=self.target.preamble)
        for i, batch in enumerate(batches):
            banks, windows = [bank] if bank else [], {0: kept} if kept else {}
            (cache,) = make_caches(banks, windows, len(self.prefix), make=make, ahead=batch.ahead)
            widened([cache], len(batch.conversations))
            hidden[i] = self.runner.layer(layer, hidden[i], cache)
            mx.eval(hidden[i], cache.state)
            if isinstance(cache, CaptureCache):
                record(cache, stores.values(), batch.places, group=self.run.group)
