"""What `bench fit` measures: time and peak memory of each stage of a fit, with random weights and a text of noise.

The stages are those of `fitting.fit`, and so are the shares of ranks, where there are several.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import store
from ..fitting import prefill
from ..fitting.budget import affordable_bytes, share_of
from ..fitting.config import FitConfig
from ..fitting.distributed import World
from ..fitting.kinds import kind_fit
from ..fitting.run import FitRun
from ..fitting.samples import recording
from ..fitting.sizes import plan_sizes
from ..fitting.train import train_heads
from ..mlxlm import attention_patch
from .measure import Shape

STAGES = ("prefill", "study", "deciding sizes", "regression", "packing")
Row = dict[str, Any]


@dataclass(frozen=True)
class Words:
    """A tokenizer of as many words as a vocabulary has, w0, w1, …; answers never end by themselves."""

    vocabulary: int
    chat_template: None = None
    bos_token: None = None
    eos_token_ids: tuple[int, ...] = ()

    def encode(self, text: str, **options: Any) -> list[int]:
        """One token a word."""
        return [sum(word.encode()) % self.vocabulary for word in text.split()]

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        return " ".join(f"w{i}" for i in token_ids)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        raise NotImplementedError("it has no template")

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(self.vocabulary)}


def rows(shape: Shape, contexts: list[int], config: FitConfig) -> Iterator[Row]:
    """One row a context and stage, as soon as it is known: seconds, and the peak of MLX's memory, weights included."""
    mx.random.seed(0)  # or ranks would have other weights
    model = shape.model()
    small = replace(config, queries=256, steps=2, trial_steps=2, answer_tokens=4)
    for _ in stages(model, shape, min(contexts[0], 1024), small):  # kernels are compiled when they are first needed
        pass
    for context in contexts:
        for row in stages(model, shape, context, config):
            yield {"context": context} | row


def stages(model: nn.Module, shape: Shape, tokens: int, config: FitConfig) -> Iterator[Row]:
    """One row a stage of one fit of a text of so many tokens; that of the study has the samples a head, too, and the
    last one the digest of what a file would hold."""
    geometry = attention_patch.route(model)
    prefix = np.random.default_rng(0).integers(0, shape.vocabulary, tokens).tolist()
    words, world = Words(shape.vocabulary), World.here()
    run = FitRun(model=model, tokenizer=words, geometry=geometry, config=config, world=world)
    clock = Clock()
    context = prefill.read_text(model, prefix, geometry, world=world)
    yield clock.stage("prefill")
    data = recording.collect(run, context)
    yield clock.stage("study") | {"samples": data.train.capacity}
    kind = kind_fit(run, data)
    affordable = partial(affordable_bytes, geometry=geometry, layout=run.layout, n=tokens)
    plan = plan_sizes(kind, affordable, share_of(config, geometry, tokens))
    yield clock.stage("deciding sizes")
    heads = train_heads(kind, plan.sizes)
    yield clock.stage("regression")
    tensors = store.contents(run.layout, heads, prefix=prefix, windows={}, offsets=context.offsets, shared=world.shared)
    yield clock.stage("packing") | {"digest": store.digest(tensors)}


class Clock:
    """Of stages that follow each other."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        mx.clear_cache()
        mx.reset_peak_memory()
        self.start = time.perf_counter()

    def stage(self, name: str) -> Row:
        """What happened since the last call, under a name."""
        mx.synchronize()
        row: Row = {"stage": name, "seconds": time.perf_counter() - self.start, "peak_memory": mx.get_peak_memory()}
        self._start()
        return row
