"""What `bench fit` measures: time and peak memory of each stage of a fit, with random weights and a text of noise.

The stages are those of `fitting.fit`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import adapter
from ..fitting import reading
from ..fitting.config import FitConfig, affordable_bytes
from ..fitting.fitter import Fitter
from .measure import Shape

STAGES = ("prefill", "sampling", "capture", "fitting")
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

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


@dataclass
class Stages:
    """Seconds and peak bytes of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        mx.clear_cache()
        mx.reset_peak_memory()
        start = time.perf_counter()
        yield
        mx.synchronize()
        self.seconds[name], self.peaks[name] = time.perf_counter() - start, mx.get_peak_memory()


def rows(shape: Shape, contexts: list[int], config: FitConfig) -> Iterator[Row]:
    """One row a stage and context: seconds, their share of the fit, and the peak of MLX's memory, weights included."""
    model = shape.model()
    small = replace(config, queries=256, steps=2, scout_steps=2, answer_tokens=4)
    measured(model, shape, min(contexts[0], 1024), small)  # kernels are compiled when they are first needed
    for context in contexts:
        stages = measured(model, shape, context, config)
        whole = sum(stages.seconds.values())
        for name in STAGES:
            row: Row = {"context": context, "stage": name, "seconds": stages.seconds[name]}
            yield row | {"share": stages.seconds[name] / whole, "peak_memory": stages.peaks[name]}


def measured(model: nn.Module, shape: Shape, tokens: int, config: FitConfig) -> Stages:
    """The stages of one fit of a text of so many tokens."""
    geometry = adapter.route(model)
    prefix = np.random.default_rng(0).integers(0, shape.vocabulary, tokens).tolist()
    stages, tokenizer = Stages(), Words(shape.vocabulary)
    with stages.stage("prefill"):
        context = reading.read(model, prefix, geometry)
    fitter = Fitter(model, tokenizer, context, geometry, config)
    with stages.stage("sampling"):
        fitter.converse()
    with stages.stage("capture"):
        fitter.hear()
    with stages.stage("fitting"):
        fitter.prepare()
        fitter.regress(fitter.sizes(affordable_bytes(config, geometry, fitter.layout, n=tokens)))
    return stages
