"""How heads of one kind are fitted: the samples they see, where they start, what they cost."""

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np

from ...core.device import device
from ...core.gather import take
from ...heads import Bank, HeadArrays, Size
from ..distributed import parts
from ..prefill import Context
from ..run import FitRun
from ..samples.capture import Collected
from ..samples.sample_store import Samples
from ..solve import attention_matching, grouping, regression
from ..solve.initial import Init
from ..solve.regression import Training


class KindFit:
    """A kind of head function, as it is fitted to what was collected of a context.

    Heads are numbered layer by layer, the sliding-window layers left out. training_scores: of a training batch, of all
    heads that are trained together (default: the device's). by_share: as for `attention_matching.match`.
    """

    by_share = False

    def __init__(self, run: FitRun, data: Collected, *, training_scores: int | None = None):
        self.run, self.data = run, data
        self.training_scores = training_scores or device().training_scores
        self.banks = data.context.fitted  # exact keys and values, a bank a layer
        self.n_heads = len(self.banks) * run.geometry.n_kv_heads
        self.length = data.context.length
        self.settled: dict[int, HeadArrays] = {}  # heads that are already as they are to be, by their numbers

    @classmethod
    def check(cls, run: FitRun, context: Context) -> None:
        """NectarError if this kind cannot stand for the context."""

    def prepare(self) -> None:
        """Computes ahead what all heads need."""

    def initialize(self, heads: Sequence[int], sizes: Sequence[Size], samples: Samples) -> Init:
        """Where the regression of some heads starts. samples: what they will be trained on."""
        raise NotImplementedError

    def training_samples(self, heads: Sequence[int], count: int | None = None) -> Samples:
        """What some heads are trained on, shuffled: all samples, or so many of them."""
        return self.data.train.heads(heads, self.order[:count])

    def training(self, heads: Sequence[int], count: int | None = None) -> Training:
        """What trains some heads, on all samples or so many of them."""
        return Training(self.training_samples(heads, count), batch=self.batch())

    def held_out_samples(self, heads: Sequence[int]) -> Samples:
        """What some heads are judged by."""
        return self.data.held_out.heads(heads)

    def matching_samples(self, heads: Sequence[int]) -> Samples:
        """What Attention Matching solves on."""
        return self.data.train.heads(heads, np.sort(self.order[: self.run.config.matching_samples]))

    def ranking_samples(self, heads: Sequence[int]) -> Samples:
        """By what the keys of the context are ranked."""
        return self.matching_samples(heads)

    def keeps_every_key(self, size: Size) -> bool:
        """Whether a head of this size has room for every key, and keeps them as they are."""
        return False

    def trained(self, sizes: Sequence[Size]) -> list[bool]:
        """Which of all heads, of these sizes, are trained."""
        return [not self.keeps_every_key(size) for size in sizes]

    def batch(self) -> int:
        """Samples of a step."""
        return self.run.config.batch

    def steps(self, sizes: Sequence[Size]) -> int:
        """Of the regression of heads of these sizes, which are trained together."""
        return self.run.config.steps

    def rate(self, sizes: Sequence[Size]) -> float:
        """Of the same."""
        return self.run.config.rate or self.run.layout.bank.learning_rate

    def judge(self, bank: Bank, samples: Samples, metric: mx.array) -> np.ndarray:
        """What the errors of some heads cost, [M], by which they get their bytes. metric: as in `regression.errors`."""
        return np.array(regression.errors(bank, samples, metric=metric))

    def finish(self, index: int, head: HeadArrays) -> HeadArrays:
        """A trained head as it will be stored."""
        return head

    def step_scores(self, size: Size) -> int:
        """What a head of this size costs a training step, in scores."""
        return size[0] * self.run.config.batch

    def cost(self, size: Size, *, trained: bool) -> float:
        """What fitting a head of this size takes, in scores: where it starts, and its steps."""
        start = device().kept_steps if self.keeps_every_key(size) else device().start_steps
        return self.step_scores(size) * (start + trained * self.run.config.steps)

    def groups(self, sizes: Sequence[Size]) -> list[list[int]]:
        """Heads that are trained together, of those that this rank fits. sizes: of all. All ranks must call it: heads
        that cost more than was known when their samples were captured may change their rank."""
        costs = [self.cost(size, trained=trains) for size, trains in zip(sizes, self.trained(sizes), strict=True)]
        together = list[list[int]]()
        mine = self.run.world.mine(grouping.evened(self.data.parts, costs))
        self.data.fetch([head for part in mine for head in part], self.run.world)
        for part in mine:
            scores = [self.step_scores(sizes[head]) for head in part]
            groups = grouping.groups(scores, room=self.training_scores, launch=device().launch_scores)
            together += [[part[i] for i in group] for group in groups]
        return together

    @cached_property
    def layers(self) -> list[int]:
        """Those whose samples this rank has."""
        every = parts(range(len(self.banks)), len(self.data.parts))
        return sorted(layer for part in self.run.world.mine(every) for layer in part)

    @cached_property
    def order(self) -> np.ndarray:
        """The training samples, shuffled: their indices."""
        return self.shuffled(self.data.train.count)

    def shuffled(self, count: int) -> np.ndarray:
        """The numbers 0 … count - 1, always in the same random order."""
        return np.random.default_rng(self.run.config.seed).permutation(count).astype(np.int32)

    @cached_property
    def importance(self) -> list[mx.array]:
        """Per head, the root-mean-square attention of every key of the context, [n]."""
        return self.rank_keys()

    def ranked(self, index: int) -> mx.array:
        """The `importance` of one head."""
        return self.importance[index]

    def rank_keys(self) -> list[mx.array]:
        """Computes `importance`; each rank that of its layers."""
        run, K, ranked = self.run, self.run.geometry.n_kv_heads, dict[str, mx.array]()
        with run.progress("ranking keys", len(self.layers)) as done:
            for number, layer in enumerate(self.layers):
                heads = range(layer * K, layer * K + K)
                samples, keys = self.ranking_samples(heads), self.banks[layer].parameters["keys"]
                weights = attention_matching.importance(samples, keys, scale=run.geometry.scale, by_share=self.by_share)
                ranked |= {str(head): x for head, x in zip(heads, weights, strict=True)}
                done(number + 1)
        every = {head: x for part in run.world.arrays(ranked) for head, x in part.items()}
        return [every[str(head)] for head in range(self.n_heads)]

    def match(self, heads: Sequence[int], counts: Sequence[int]) -> list[HeadArrays]:
        """Attention Matching for some heads, each with its own count of nodes."""
        keys, values = [], []
        for index, count in zip(heads, counts, strict=True):
            layer, k = divmod(index, self.run.geometry.n_kv_heads)
            parameters = self.banks[layer].parameters
            chosen = attention_matching.most_important(self.ranked(index), count)
            keys.append(take(parameters["keys"][k, :], chosen))
            values.append(take(parameters["values"][k, :], chosen))
        samples, scale = self.matching_samples(heads), self.run.geometry.scale
        return attention_matching.match(samples, keys, values, scale=scale, by_share=self.by_share)
