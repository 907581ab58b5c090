"""One fit in progress: from captured rows to trained heads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._exp import SLOW_EXP
from ..adapter import Geometry
from ..cache import make_caches
from ..clock import Clock
from ..heads import Bank, HeadArrays, Quadrature, Size
from ..store import MEAN_BITS
from . import (
    capture,
    dialogue,
    fidelity,
    finite,
    grouping,
    matching,
    planning,
    reading,
    regression,
    settling,
    starts,
)
from .checkpoint import Checkpoint, Plan
from .config import STEPS, FitConfig, free_memory, layout_for, rows_for
from .dialogue import Conversation
from .part import checked
from .planning import Affordable
from .reading import Context
from .starts import Start
from .study import Captured, DeviceStudy, Study
from .verdict import measured

_RATES = {"quadrature": 1.5e-2, "retrieval+nectar": 2.5e-2}  # others 6e-3
_ENOUGH = 0.9  # of the rows asked for: not another batch for the last few
_LEAST_TOGETHER = 16  # conversations: with fewer, sampling is slow on any machine
CHECK_TEMPERATURE = 0.7
_CHECK_SEED = 1_000_003  # of the answers to the check questions, beside that of the fit


Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def silent(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


class Fitter:
    """The model, the context it has read, what was captured of it, and the heads fitted so far.

    Heads are numbered layer by layer, the sliding-window layers left out. skip: how many of the context's first tokens
    they do not stand for: others will.
    """

    study: Study
    held_out: Study

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        context: Context,
        geometry: Geometry,
        config: FitConfig,
        *,
        progress: Progress = silent,
        checkpoint: Checkpoint | None = None,
        skip: int = 0,
    ):
        self.model, self.tokenizer, self.context, self.geometry = model, tokenizer, context, geometry
        self.config, self.progress, self.checkpoint = config, progress, checkpoint or Checkpoint(None)
        self.skip, self.banks = skip, [bank.part(slice(skip, None)) for bank in context.banks]
        self.conversations = list[Conversation]()
        self.n_layers = len(context.banks)
        self.n_heads = self.n_layers * geometry.n_kv_heads
        self.length = len(context.prefix) - skip
        self.memory = config.memory or free_memory() // 2
        self.queries = rows_for(config, heads=self.n_heads, head_dim=geometry.head_dim)
        self.room = 1 << 19 if SLOW_EXP else 1 << 28  # scores of a batch, of all heads that are trained together
        self.steps = config.steps or STEPS
        self.bits = MEAN_BITS  # of a number of a node
        self.layout = layout_for(config, geometry, n_layers=self.n_layers)
        self.rate = config.rate or _RATES.get(self.layout.kind, 6e-3)
        self.checkpoint.claim(asdict(config) | {"skip": skip}, context.prefix)

    def fit(
        self, affordable: Affordable, share: float | None, *, clock: Clock, plan: Plan | None = None
    ) -> tuple[Plan, list[HeadArrays]]:
        """All heads. plan: what each head gets, where that was decided elsewhere; else as for `plan`."""
        self.collect()
        clock.lap("study")
        plan = plan or self.plan(affordable, share)
        clock.lap("budgets")
        self.bits = plan.bits
        heads = self.regress(plan.sizes)
        clock.lap("regression")
        return plan, heads

    def collect(self) -> None:
        """Everything that heads are fitted to."""
        self.converse()
        self.hear()
        self.prepare()

    def converse(self) -> None:
        """Samples conversations until they give every head its rows."""
        self.conversations = self.checkpoint.load_conversations()
        with self.progress("conversing about it", self.queries) as done:
            try:
                while self._rows() < _ENOUGH * self.queries:
                    self.conversations += self._ask_batch(done)
                if not checked(self.conversations):
                    self.conversations += self._ask_checks()
            finally:
                self.checkpoint.save_conversations(self.conversations)

    def _rows(self) -> int:
        """Rows a head that the conversations so far will give."""
        return dialogue.rows(self.conversations, self.geometry)

    def _together(self) -> int:
        """How many conversations are sampled side by side: as many as are still needed, and as the memory holds."""
        config, g = self.config, self.geometry
        fit = max(_LEAST_TOGETHER, self.memory // 4 // g.cache_bytes(2 * config.answer_tokens))
        needed = (self.queries - self._rows()) // (g.n_heads // g.n_kv_heads * config.answer_tokens) + 1
        return min(config.conversations, fit, max(_LEAST_TOGETHER, needed))

    def _ask_batch(self, done: Callable[[int], None]) -> list[Conversation]:
        config, rows = self.config, self._rows()
        number = sum(c.split != "check" for c in self.conversations)
        count = self._together()
        batch = dialogue.asked(self.tokenizer, self.context.prefix, first=number, count=count, seed=config.seed)
        self._answer(
            batch,
            seed=config.seed + number,
            temperature=config.temperature,
            progress=lambda at: done(min(self.queries, rows + dialogue.rows(batch, self.geometry, until=at))),
        )
        return batch

    def _ask_checks(self) -> list[Conversation]:
        config = self.config
        batch = dialogue.checks(self.tokenizer, self.context.prefix, first=0, count=config.checks, seed=config.seed)
        self._answer(batch, seed=config.seed + _CHECK_SEED, temperature=CHECK_TEMPERATURE)
        return batch

    def _answer(
        self,
        batch: Sequence[Conversation],
        *,
        seed: int,
        temperature: float,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        dialogue.converse(
            self.model,
            self.context,
            sorted(batch, key=lambda c: len(c.prompt)),
            stop=set(self.tokenizer.eos_token_ids),
            max_tokens=self.config.answer_tokens,
            temperature=temperature,
            key=mx.random.key(seed),
            progress=progress,
        )

    def hear(self, *, together: int | None = None) -> None:
        """Fills `study` and `held_out` with what attention sees in the conversations, so many tokens read together."""
        g, spare = self.geometry, max(self.queries // 10, 64)
        kept = Study if SLOW_EXP else DeviceStudy
        spill = kept.nbytes(self.n_heads, self.queries + spare, g.head_dim) > self.memory
        folder = self.checkpoint.spill() if spill else None
        self.study = self._empty(self.queries, folder and folder / "study.rows")
        self.held_out = self._empty(spare, folder and folder / "held_out.rows")
        conversations = [c for c in self.conversations if c.split != "check"]
        total = sum(map(dialogue.fed_tokens, conversations))
        with self.progress("weighing what was said", total) as done:
            capture.hear(
                self.model,
                self.context,
                conversations,
                {"train": self.study, "held_out": self.held_out},
                n_heads=g.n_heads,
                skip=self.skip,
                tokens=together,
                progress=done,
            )
        for study in (self.study, self.held_out):
            finite.check_heads("capturing attention", study.not_finite, self.geometry)

    def _empty(self, rows: int, folder: Path | None) -> Study:
        if folder or SLOW_EXP:
            return Study(self.n_heads, rows, self.geometry.head_dim, folder=folder)
        return DeviceStudy(rows)

    def prepare(self) -> None:
        """Shuffles the rows and weighs the context's keys."""
        self.rows = np.random.default_rng(self.config.seed).permutation(self.study.rows)
        self.importance: list[mx.array] = []  # per head, the rms attention of every key of the context, [n]
        K = self.geometry.n_kv_heads
        with self.progress("weighing keys", self.n_layers) as done:
            for layer in range(self.n_layers):
                rows = self._samples(range(layer * K, layer * K + K))
                keys = self.banks[layer].parameters["keys"]
                self.importance += list(matching.importance(rows, keys, scale=self.geometry.scale))
                done(layer + 1)

    def _samples(self, heads: Sequence[int]) -> Captured:
        return self.study.heads(heads, np.sort(self.rows[: self.config.samples]))

    def training_rows(self, heads: Sequence[int], count: int | None = None) -> Captured:
        """What some heads are fitted to, shuffled: all rows, or so many of them."""
        return self.study.heads(heads, self.rows[:count])

    def held_out_rows(self, heads: Sequence[int]) -> Captured:
        """What some heads are judged by."""
        return self.held_out.heads(heads)

    def matched(self, indices: Sequence[int], counts: Sequence[int]) -> list[HeadArrays]:
        """Attention Matching for some heads, each with its own count of nodes."""
        keys, values = [], []
        for index, count in zip(indices, counts, strict=True):
            layer, k = divmod(index, self.geometry.n_kv_heads)
            parameters = self.banks[layer].parameters
            chosen = matching.most_important(self.importance[index], count)
            keys.append(parameters["keys"][k][chosen])
            values.append(parameters["values"][k][chosen])
        return matching.match(self._samples(indices), keys, values, scale=self.geometry.scale)

    def plan(self, affordable: Affordable, share: float | None) -> Plan:
        """What each head gets: see `planning.plan`."""
        plan = self.checkpoint.load_plan()
        if plan is None:
            plan = planning.plan(self, affordable, share)
            self.checkpoint.save_plan(plan)
        return plan

    def members(self, sizes: Sequence[Size]) -> Iterator[tuple[list[int], bool]]:
        """Heads that are fitted together, and whether they have room for every key, so that nothing is trained."""
        nodes = self.layout.kind == "quadrature"
        for group in self.groups(sizes):
            whole = [i for i in group if nodes and sizes[i][0] >= self.length]
            for members, keeps in ((whole, True), ([i for i in group if i not in whole], False)):
                if members:
                    yield sorted(members), keeps

    def judged(self, bank: Bank, rows: Captured, metric: mx.array) -> np.ndarray:
        """What the errors of some heads cost, [M], by which they get their bytes."""
        return np.array(regression.errors(bank, rows, metric=metric))

    def groups(self, sizes: Sequence[Size]) -> list[list[int]]:
        """Heads that are trained together; what one costs a step is the scores of its batch."""
        launch = 1 << 14 if SLOW_EXP else 1 << 24
        return grouping.groups([s[0] * self.config.batch for s in sizes], room=self.room, launch=launch)

    def start(self, group: Sequence[int], sizes: Sequence[Size], rows: Captured) -> Start:
        nodes = self.matched(group, [s[0] for s in sizes]) if self.layout.kind != "mlp" else []
        return starts.start(self.layout, nodes, sizes, rows, seed=self.config.seed)

    def train(self, start: Start, rows: Captured, steps: int) -> Bank:
        return regression.train(start, rows, steps=steps, batch=self._batch, rate=self.rate)

    @property
    def _batch(self) -> int:
        return self.config.batch

    def regress(self, sizes: Sequence[Size]) -> list[HeadArrays]:
        """All heads, trained at their own sizes, and nodes rounded as they will be stored."""
        heads = self.checkpoint.load_heads()
        with self.progress("fitting heads", self.n_heads) as done:
            for group, whole in self.members(sizes):
                left = [i for i in group if i not in heads]
                if left:
                    rows = self.training_rows(left)
                    start = self.kept(left) if whole else self.start(left, [sizes[i] for i in left], rows)
                    fitted = self._fitted(left, start, rows, steps=0 if whole else self.steps)
                    self.checkpoint.save_heads(fitted)
                    heads |= fitted
                done(len(heads))
        return [heads[i] for i in range(self.n_heads)]

    def _fitted(self, group: Sequence[int], start: Start, rows: Captured, *, steps: int) -> dict[int, HeadArrays]:
        """Some heads, trained and rounded; those whose error on held-out rows grew in that are as they started."""
        first = copy(start.bank)
        first.parameters = start.fold(start.parameters)
        finite.check_heads("initialization", self._not_finite(group, first), self.geometry)
        trained = self.train(start, rows, steps) if steps else first
        bank = self._settled(trained, rows, train=bool(steps))  # a text's own keys are better left as they are
        heads = bank.unstack()
        if self.held_out.rows:
            held_out = self.held_out_rows(group)
            before, after = (np.array(regression.errors(b, held_out)) for b in (first, bank))
            worse = ~(after <= before)
            if worse.any():
                plain = self._settled(first, rows, train=False)
                better = worse & ~(np.array(regression.errors(plain, held_out)) >= after)
                heads = [p if b else h for p, b, h in zip(plain.unstack(), better, heads, strict=True)]
        fitted = dict(zip(group, heads, strict=True))
        broken = [i for i, head in fitted.items() if not all(mx.isfinite(x).all().item() for x in head.values())]
        finite.check_heads("training", broken, self.geometry)
        return fitted

    def _not_finite(self, group: Sequence[int], bank: Bank) -> list[int]:
        return [group[m] for m in finite.not_finite(bank.parameters.values())]

    def kept(self, group: Sequence[int]) -> Start:
        """Heads with room for every key: there is nothing to train."""
        nodes = []
        for index in group:
            layer, k = divmod(index, self.geometry.n_kv_heads)
            nodes.append({name: x.astype(mx.float32) for name, x in self.banks[layer].nodes()[k].items()})
        return Start.of(Quadrature.stack(nodes, scale=self.layout.scale))

    def _settled(self, bank: Bank, rows: Captured, *, train: bool = True) -> Bank:
        """The bank rounded as it will be stored, where that is done in the course of training."""
        if self.layout.bits is not None:
            return bank
        steps = self.steps if train else 0
        return settling.settled(bank, rows, bits=self.bits, steps=steps, batch=self.config.batch, rate=self.rate)

    def errors(self, banks: Sequence[Bank]) -> list[float]:
        """Merged error of every head on the held-out rows, one bank a layer."""
        K, found = self.geometry.n_kv_heads, np.zeros(self.n_heads)
        for layer, bank in enumerate(banks):
            heads = range(layer * K, layer * K + K)
            found[heads] = np.array(regression.errors(bank, self.held_out.heads(heads)))
        return [float(f"{x:.3g}") for x in found]

    def fidelity(self, banks: Sequence[Bank], *, checks: int | None = None) -> dict[str, Any]:
        """How far the answers to the check questions, or the first so many, are from the full cache's; banks: one a
        layer."""
        make_cache = partial(make_caches, banks, self.context.windows, self.context.start)
        head = reading.read_head(self.model, self.tokenizer, self.context.prefix, self.geometry)
        conversations = checked(self.conversations)[:checks]
        with self.progress("checking", len(conversations)) as done:
            found = fidelity.compare(
                self.model,
                self.context.make_cache,
                {"nectar": make_cache, "no context": head.make_cache},
                conversations,
                progress=done,
            )
        return measured(found["nectar"], found["no context"])
