"""Fitting: a text goes in, a Nectar comes out.

read the text once -> converse about it, capturing queries and exact attention -> decide each head's budget
-> start every head from Attention Matching at its own budget -> regress -> quantise -> report
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import adapter, budget, fidelity, instructions, matching, models, nectar, prompts, queries, regression, store
from ._exp import SLOW_EXP
from .adapter import Geometry
from .checkpoint import Checkpoint
from .errors import NectarError
from .heads import HeadArrays, Quadrature
from .nectar import Nectar
from .queries import Captured, Context, Conversation, Study
from .store import Layout

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def _silent(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """What can be chosen when fitting.

    budget: bytes kept / bytes of the bf16 KV cache. kind: auto, quadrature, mlp, corrected or exact. bits: of a stored matrix
    entry (16, 8 or 4). queries: captured rows a head. steps: of the regression (default: 1,500 on a GPU, 400 on a CPU).
    context_tokens: cut the text after so many tokens. memory: bytes that captured rows may take before they go to disk
    (default: half of what is free).
    """

    budget: float = 0.02
    kind: str = "auto"
    bits: int = 8
    queries: int = 20_000
    steps: int | None = None
    seed: int = 0
    context_tokens: int | None = None
    memory: int | None = None
    answer_tokens: int = 96
    temperature: float = 0.9
    conversations: int = 32 if SLOW_EXP else 64  # sampled side by side
    power: float = 0.75
    scout_steps: int | None = None
    rate: float = 6e-3
    batch: int = 1024 if SLOW_EXP else 4096
    samples: int = 4096  # rows that Attention Matching solves on

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise NectarError(f"a budget of {self.budget:g} is not in (0, 1]: it is the share of the KV cache to keep")
        if self.bits not in (4, 8, 16):
            raise NectarError(f"{self.bits} bits are not supported: choose 4, 8 or 16")
        if self.kind not in ("auto", "quadrature", "exact"):
            raise NectarError(f"unknown kind {self.kind!r}: choose auto, quadrature, mlp, corrected or exact")
        for name in ("queries", "seed", "steps", "context_tokens", "memory"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "seed" else 1):
                raise NectarError(f"{name} must be positive, not {value}")


def fit(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    config: FitConfig,
    name: str = "",
    source: str = "",
    progress: Progress = _silent,
    checkpoint: Checkpoint | None = None,
) -> Nectar:
    """Fits a text; see the module's first lines. name, source: what the file says of the model and the text.

    checkpoint: where an interrupted fit leaves its work, and a resumed one finds it. NectarError for a text, budget or model
    that cannot be fitted.
    """
    clock = _Clock()
    geometry = adapter.route(model)
    prefix = _checked_prefix(model, tokenizer, text, config)
    with progress("reading", len(prefix)) as done:
        context = queries.read(model, prefix, geometry, progress=done)
    clock.lap("read")
    fitter = _Fitter(model, tokenizer, context, geometry, config, progress, checkpoint or Checkpoint(None))
    report: dict[str, Any] = {}
    if config.kind == "exact":
        layout = fitter.layout("exact", 16)
        heads = [head for bank in context.banks for head in bank.unstack()]
    else:
        layout = fitter.layout("quadrature", config.bits)
        heads, report = fitter.fit(layout, clock)
    provenance = {
        "model": name or getattr(tokenizer, "name_or_path", ""),
        "model_sha256": models.fingerprint(model),
        "tokenizer_sha256": models.tokenizer_fingerprint(tokenizer),
        "config": asdict(config),
        "source": source,
    }
    fitted = nectar.build(
        layout,
        heads,
        prefix=prefix,
        geometry=geometry,
        provenance=provenance,
        report=report,
        windows=context.windows,
    )
    if config.kind != "exact":
        report |= fitter.fidelity(fitted)
        clock.lap("check")
    report["seconds"] = clock.laps
    return fitted


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 2), now


def _checked_prefix(model: nn.Module, tokenizer: Any, text: str, config: FitConfig) -> list[int]:
    if not text.strip():
        raise NectarError("the text is empty")
    prefix = prompts.prefix(tokenizer, text, max_tokens=config.context_tokens)
    window = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    room = (window or 1 << 62) - 1024  # questions and answers need positions too
    if config.kind != "exact" and len(prefix) > room:
        raise NectarError(
            f"the text has {len(prefix):,} tokens; the model's window of {window:,} leaves room for {max(0, room):,}: "
            f"cut it with --context-tokens {max(0, room - 64)}"
        )
    return prefix


class _Fitter:
    """One fit in progress: the model, the context, and what was captured of it."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        context: Context,
        geometry: Geometry,
        config: FitConfig,
        progress: Progress,
        checkpoint: Checkpoint,
    ):
        self.model, self.tokenizer, self.context, self.geometry = model, tokenizer, context, geometry
        self.config, self.progress, self.checkpoint = config, progress, checkpoint
        self.n_layers = len(context.banks)  # sliding-window layers are kept as they are
        self.n_heads = self.n_layers * geometry.n_kv_heads
        self.steps = config.steps or (400 if SLOW_EXP else 1500)
        checkpoint.claim(asdict(config), context.prefix)

    def layout(self, kind: str, bits: int) -> Layout:
        g = self.geometry
        return Layout(
            kind=kind,
            n_layers=self.n_layers,
            n_kv_heads=g.n_kv_heads,
            head_dim=g.head_dim,
            scale=g.scale,
            bits=bits,
        )

    def fit(self, layout: Layout, clock: _Clock) -> tuple[list[HeadArrays], dict[str, Any]]:
        nodes = self._affordable_nodes(layout)
        self._converse()
        clock.lap("study")
        rng = np.random.default_rng(self.config.seed)
        self.rows = rng.permutation(self.study.rows)
        self.importance = self._importance()
        sizes = self._sizes(nodes)
        clock.lap("budgets")
        heads = self._regress(sizes)
        clock.lap("regression")
        report = {"nodes": sizes, "error": self._errors(heads), "queries": self.study.rows}
        return heads, report

    def _affordable_nodes(self, layout: Layout) -> float:
        """How many nodes the budget buys, all heads together; what the file holds besides is set aside where it matters."""
        n = len(self.context.prefix)
        kept = self.config.budget * self.geometry.cache_bytes(n)
        besides = 4 * n + 24 * self.n_heads + 6000
        nodes = (kept - min(besides, kept / 10)) / store.head_bytes(layout, (1,))
        if nodes < 4 * self.n_heads:
            least = 4 * self.n_heads * store.head_bytes(layout, (1,)) / 0.9 / self.geometry.cache_bytes(n)
            raise NectarError(
                f"a budget of {self.config.budget:g} is too small for this text: it needs at least {least:.2g}"
            )
        return nodes

    def _converse(self) -> None:
        """Fills `study` and `held_out` with what attention sees in conversations, and keeps the held-out ones."""
        config, g = self.config, self.geometry
        spare = max(config.queries // 10, 64)
        spill = Study.nbytes(self.n_heads, config.queries + spare, g.head_dim) > (config.memory or _free_memory() // 2)
        folder = self.checkpoint.spill() if spill else None
        self.study = Study(self.n_heads, config.queries, g.head_dim, folder=folder and folder / "study.rows")
        self.held_out = Study(self.n_heads, spare, g.head_dim, folder=folder and folder / "held_out.rows")
        studies = {"study": self.study, "held_out": self.held_out}
        self.conversations = self.checkpoint.load_studies(studies)
        with self.progress("conversing about it", config.queries) as done:
            while not (self.study.full and self.held_out.full):
                before = [s.rows for s in studies.values()]
                try:
                    self.conversations += self._ask_batch(done)
                except KeyboardInterrupt:
                    for study, rows in zip(studies.values(), before, strict=True):
                        study.rows = rows  # the batch is asked again
                    self.checkpoint.save_studies(studies, self.conversations)
                    raise
        self.checkpoint.save_studies(studies, self.conversations)

    def _ask_batch(self, done: Callable[[int], None]) -> list[Conversation]:
        config = self.config
        number = len(self.conversations) // config.conversations
        asked = instructions.training(self._passage, seed=config.seed + number)
        batch = [Conversation(self._prompt(q)) for q in itertools.islice(asked, config.conversations)]
        for conversation in batch[:: 10]:
            conversation.held_out = True
        batch.sort(key=lambda c: len(c.prompt))
        queries.converse(
            self.model,
            self.context,
            batch,
            stop=set(self.tokenizer.eos_token_ids),
            max_tokens=config.answer_tokens,
            temperature=config.temperature,
            key=mx.random.key(config.seed + number),
            study=self.study,
            held_out=self.held_out,
            progress=done,
        )
        return batch

    def _prompt(self, question: str) -> list[int]:
        return prompts.prompt(self.tokenizer, question, enable_thinking=False)

    def _passage(self, rng: random.Random) -> str:
        ids = self.context.prefix
        length = rng.randrange(20, 60)
        start = rng.randrange(0, max(1, len(ids) - length))
        return str(self.tokenizer.decode(ids[start : start + length], skip_special_tokens=True)).strip()

    def _layer(self, layer: int) -> tuple[mx.array, mx.array]:
        parameters = self.context.banks[layer].parameters
        return parameters["keys"], parameters["values"]

    def _samples(self, heads: Sequence[int]) -> Captured:
        return self.study.heads(heads, np.sort(self.rows[: self.config.samples]))

    def _importance(self) -> list[mx.array]:
        """Per head, the root-mean-square attention of every key of the context, [n]."""
        found: list[mx.array] = []
        K = self.geometry.n_kv_heads
        with self.progress("weighing keys", self.n_layers) as done:
            for layer in range(self.n_layers):
                rows = self._samples(range(layer * K, layer * K + K))
                found += list(matching.importance(rows, self._layer(layer)[0], scale=self.geometry.scale))
                done(layer + 1)
        return found

    def _start(self, indices: Sequence[int], sizes: Sequence[int]) -> Quadrature:
        """Attention Matching for some heads, each at its own size."""
        keys, values = [], []
        for index, size in zip(indices, sizes, strict=True):
            layer, k = divmod(index, self.geometry.n_kv_heads)
            chosen = matching.most_important(self.importance[index], size)
            keys.append(self._layer(layer)[0][k][chosen])
            values.append(self._layer(layer)[1][k][chosen])
        heads = matching.match(self._samples(indices), keys, values, scale=self.geometry.scale)
        return Quadrature.stack(heads, scale=self.geometry.scale)

    def _sizes(self, nodes: float) -> list[int]:
        """Nodes a head, from the errors of a short uniform fit."""
        n = len(self.context.prefix)
        mean = max(4, int(nodes / self.n_heads))
        errors = np.zeros(self.n_heads)
        scout = self.config.scout_steps if self.config.scout_steps is not None else self.steps // 4
        groups = self._groups([min(mean, n)] * self.n_heads)
        with self.progress("budgets", len(groups)) as done:
            for number, group in enumerate(groups):
                bank, rows = self._start(group, [min(mean, n)] * len(group)), self.study.heads(group, self.rows)
                if scout:
                    bank = self._train(bank, rows, scout)
                errors[group] = np.array(regression.errors(bank, rows))
                done(number + 1)
        most = min(n, max(n // 4, 2 * mean))
        return budget.allocate(errors.tolist(), nodes=nodes, power=self.config.power, least=4, most=most)

    def _groups(self, sizes: Sequence[int]) -> list[list[int]]:
        """Heads that are trained together: similar sizes, as many as the device takes at a time."""
        room = 1 << 19 if SLOW_EXP else 1 << 28  # scores of a batch
        order = sorted(range(self.n_heads), key=lambda i: -sizes[i])
        groups: list[list[int]] = []
        for index in order:
            if groups and (len(groups[-1]) + 1) * sizes[groups[-1][0]] * self.config.batch <= room:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def _train(self, bank: Quadrature, rows: Captured, steps: int) -> Quadrature:
        trained = regression.train(bank, rows, steps=steps, batch=self.config.batch, rate=self.config.rate)
        assert isinstance(trained, Quadrature)
        return trained

    def _regress(self, sizes: Sequence[int]) -> list[HeadArrays]:
        heads: dict[int, HeadArrays] = self.checkpoint.load_heads()
        with self.progress("fitting heads", self.n_heads) as done:
            for group in self._groups(sizes):
                if not set(group) <= heads.keys():
                    bank = self._start(group, [sizes[i] for i in group])
                    bank = self._train(bank, self.study.heads(group, self.rows), self.steps)
                    heads |= dict(zip(group, bank.unstack(), strict=True))
                    self.checkpoint.keep_heads(heads)
                done(len(heads))
        return [heads[i] for i in range(self.n_heads)]

    def _errors(self, heads: Sequence[HeadArrays]) -> list[float]:
        """Merged error of every head on the held-out rows."""
        K, found = self.geometry.n_kv_heads, []
        for first in range(0, self.n_heads, K):
            bank = Quadrature.stack(heads[first : first + K], scale=self.geometry.scale)
            found += regression.errors(bank, self.held_out.heads(range(first, first + K))).tolist()
        return [float(f"{x:.3g}") for x in found]

    def fidelity(self, fitted: Nectar) -> dict[str, Any]:
        """KL and agreement with the full cache on the held-out conversations."""
        conversations = [c for c in self.conversations if c.held_out and c.answer][:8]
        with self.progress("checking", len(conversations)) as done:
            found = fidelity.compare(
                self.model, self.context.make_cache, {"nectar": fitted.make_cache}, conversations, progress=done
            )["nectar"]
        return {"kl": round(float(found.kl.mean()), 5), "agree": round(float(found.agree.mean()), 4)}


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
