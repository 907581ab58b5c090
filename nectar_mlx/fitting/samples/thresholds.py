"""What the heads of a context are trained on when some of its keys will be read exactly.

Of every captured query the keys of the middle split at a threshold on the sketches' scores: those above it will be
read, those below are the rest that a head is to stand for, the sketches' mistakes included. The query heads of a group
read the same keys, so their thresholds are one share of each one's attention, as `selection.best` has it; it is drawn
at the ranks that budgets from 0.2 to 6% reach. For a tenth of the tokens nothing is read, so that one head serves every
budget and the .nectar alone.
"""

import math

import mlx.core as mx
import numpy as np

from ...core.attention import EMPTY, Partial, merge
from ...core.device import device
from ...core.exp import exp
from ...core.types import DoubleArray
from ...heads.hybrid import EVERYTHING, SINKS, TAIL
from ...retrieval.selection import Scoring, log_sum
from .sample_store import Samples

_RANKS = (0.002, 0.06)  # of a threshold among the middle's keys
UNREAD = 0.1
_SAMPLE = 1024  # keys tell the ranks


def split(
    samples: Samples,
    keys: mx.array,
    values: mx.array,
    selector: Scoring,
    *,
    scale: float,
    seed: int,
    unread: float,
    group: int = 1,
    repeat: float = 1.0,
) -> Samples:
    """Samples [M, N, ...] of the whole context -> samples of the rest, as `regression` takes them.

    keys, values: [M, n, D] of the whole context. selector: of the same M heads. unread: the share of tokens for which
    nothing is read. group: samples that are one token's, side by side. repeat: how many keys each key of the middle
    stands for. queries get the threshold as one more number, [M, N, D + 1]; output and log_normalizer are those of the
    rest; the live ones take in the anchors and what is read.
    """
    M, N = samples.queries.shape[:2]
    assert N % group == 0, "samples of whole tokens"
    ranks = _ranks(np.random.default_rng(seed), N // group, unread)
    step = max(1, device().max_batch_scores // (M * keys.shape[1] * group))
    parts = []
    for start in range(0, N // group, step):
        part = samples.some(slice(start * group, (start + step) * group))
        parts.append(
            _split(part, keys, values, selector, scale=scale, ranks=ranks[start : start + step], repeat=repeat)
        )
        mx.eval(parts[-1])
    return Samples(*(mx.concatenate(list(xs), axis=1) for xs in zip(*parts, strict=True)))


def _ranks(random: np.random.Generator, count: int, unread: float) -> DoubleArray:
    """Shares of the keys to read, [count]; 0 where nothing is."""
    low, high = np.log(_RANKS)
    return np.where(random.random(count) < unread, 0.0, np.exp(random.uniform(low, high, count)))


def _split(
    samples: Samples,
    keys: mx.array,
    values: mx.array,
    selector: Scoring,
    *,
    scale: float,
    ranks: DoubleArray,
    repeat: float,
) -> Samples:
    """ranks: of each token, [N / group]."""
    queries = samples.queries.astype(mx.float32)
    scores = (queries * scale) @ keys.astype(mx.float32).swapaxes(1, 2)
    routed = selector.scores(queries)
    anchors = log_sum(mx.concatenate([scores[..., :SINKS], scores[..., -TAIL:]], axis=-1))
    threshold = _thresholds(routed, mx.logaddexp(log_sum(routed) + math.log(repeat), anchors), ranks)
    below = mx.pad(routed < threshold[..., None], [(0, 0), (0, 0), (SINKS, TAIL)])
    top = scores.max(-1, keepdims=True)
    times = mx.pad(mx.full((routed.shape[-1],), repeat), [(SINKS, TAIL)], constant_values=1.0)
    weights = exp(scores - top) * times
    rest = _part(mx.where(below, weights, 0.0), top, values)
    read = _part(mx.where(below, 0.0, weights), top, values)
    live = merge(read, Partial(samples.live_output.astype(mx.float32), samples.live_log_normalizer))
    queries = mx.concatenate([queries, threshold[..., None]], axis=-1)
    return Samples(queries, rest.output, live.output, rest.log_normalizer, live.log_normalizer)


def _thresholds(scores: mx.array, total: mx.array, ranks: DoubleArray) -> mx.array:
    """scores [M, N, n], total [M, N], ranks [tokens] -> [M, N]: the scores of the share of attention that, of a sample
    of the keys, a share `rank` exceeds in some head of the token."""
    M, N, n = scores.shape
    shares = scores[..., :: max(1, n // _SAMPLE)] - total[..., None]
    sample = mx.sort(shares.reshape(M, len(ranks), N // len(ranks), -1).max(2), axis=-1)
    count = sample.shape[-1]
    at = np.clip(count - 1 - np.floor(ranks * count).astype(int), 1, count - 1)
    ends = np.stack([at - 1, at], axis=-1)
    shares_at = mx.take_along_axis(sample, mx.array(np.broadcast_to(ends, (M, *ends.shape))), axis=-1).mean(-1)
    threshold = shares_at[..., None] + total.reshape(M, len(ranks), -1)
    return mx.where(mx.array(ranks)[:, None] > 0, threshold, EVERYTHING).reshape(M, N)


def _part(weights: mx.array, top: mx.array, values: mx.array) -> Partial:
    total = weights.sum(-1, keepdims=True)
    log = mx.where(total > 0, top + mx.log(mx.maximum(total, 1e-30)), EMPTY)
    return Partial((weights @ values.astype(mx.float32)) / mx.maximum(total, 1e-30), log[..., 0])
