"""The router against exact scores of every key: what it finds, in clusters of any filling, and what it reads for it."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.heads.hybrid import ANCHORS, middle
from nectar_mlx.retrieval import sketch
from nectar_mlx.retrieval.router import Router
from nectar_mlx.retrieval.selection import Choice, best, log_sum
from tests import oracle

K, G, N, D, SCALE = 2, 3, 20, 16, 0.3


class Text:
    """Keys of n tokens in clusters [K, n, D], queries that lie in few directions [K, N, G, D], and both routers.

    whole: heads that are searched whole; None leaves it to `build`.
    """

    def __init__(self, n, *, rank=12, whole=None):
        random = np.random.default_rng(n)
        mixing = random.normal(size=(D, D)) * np.where(np.arange(D) < 6, 1, 0.05)[:, None]
        centres = 1.5 * random.normal(size=(K, 30, D))
        members = np.take_along_axis(centres, random.integers(0, 30, (K, n, 1)), axis=1)
        self.keys = mx.array((members + 0.3 * random.normal(size=(K, n, D))).astype(np.float32))
        draw = lambda *shape: (random.normal(size=(*shape, D)) @ mixing).astype(np.float32)  # noqa: E731
        self.queries, self.anchors = mx.array(draw(K, N, G)), mx.array(random.normal(size=(K, N, G)).astype(np.float32))
        self.small = sketch.build([self.keys], [draw(K, 500)], scale=SCALE, rank=rank)
        if whole is not None:
            self.small["sketch.scanned"][:] = np.isin(np.arange(K), whole)
        self.router = Router(self.small, 0, scale=SCALE)
        self.sketch = sketch.load(self.small, [(0, head) for head in range(K)], scale=SCALE)
        self.oracle = oracle.Selector(self.keys[:, middle(n)], scale=SCALE)

    def shares(self):
        """Every key's share of each head's attention, anchors and middle together, [K, N, G, n]."""
        scores = self.oracle.scores(self.queries.reshape(K, N * G, D)).reshape(K, N, G, -1)
        return np.exp(np.array(scores - mx.logaddexp(log_sum(scores), self.anchors)[..., None]))


def chosen(text, count, at_once):
    """What the router chooses, so many tokens at a time: few have some clusters searched, many have all."""
    parts = [
        text.router.choose(text.queries[:, i : i + at_once], text.anchors[:, i : i + at_once], count=count)
        for i in range(0, N, at_once)
    ]
    return Choice(*(mx.concatenate(list(xs), axis=1) for xs in zip(*parts, strict=True)))


def missed(text, choice):
    taken = np.take_along_axis(text.shares(), np.array(choice.positions)[:, :, None], axis=-1).sum()
    return 1 - taken / text.shares().sum()


def test_a_sketch_knows_the_scores_of_queries_like_those_it_saw():
    text = Text(90, rank=6)
    queries = text.queries.reshape(K, N * G, D)
    exact, found = np.array(text.oracle.scores(queries)), np.array(text.sketch.scores(queries))
    assert np.square(found - exact).mean() < 0.03 * exact.var()
    some = sketch.load(text.small, [(0, 1)], scale=SCALE, keys=np.array([3, 7]))
    np.testing.assert_allclose(np.array(some.scores(queries[1:])), found[1:, :, [3, 7]], rtol=1e-5)


@pytest.mark.parametrize("n", [ANCHORS + 1, ANCHORS + 31, ANCHORS + 64, 500, 1999])
@pytest.mark.parametrize("count", [1, 7, 40, 10_000])
@pytest.mark.parametrize("whole", [[], [1], [0, 1]])
@pytest.mark.parametrize("at_once", [1, 3, N])
def test_any_text_and_count(n, count, whole, at_once):
    text = Text(n, whole=whole)
    choice = chosen(text, count, at_once)
    positions, inside = np.array(choice.positions), n - ANCHORS
    assert positions.shape == (K, N, min(count, inside)) and positions.min() >= 0 and positions.max() < inside
    assert all(len(set(row)) == len(row) for row in positions.reshape(-1, positions.shape[-1]).tolist())
    dense = text.sketch.scores(text.queries.reshape(K, N * G, D)).reshape(K, N, G, -1)
    expected = np.take_along_axis(np.array(dense), positions[:, :, None], axis=-1)
    np.testing.assert_allclose(np.array(choice.scores), expected, rtol=1e-4, atol=1e-4)
    above = np.array(choice.scores >= choice.threshold[..., None])
    assert above.any(2).all(), "every key was read for some head"
    unread = np.ones((K, N, inside), bool)
    np.put_along_axis(unread, positions, False, axis=-1)
    highest = np.where(unread[:, :, None], dense, -np.inf) <= np.array(choice.threshold)[..., None] + 1e-4
    assert highest[whole].all() and ((at_once < N and count < inside) or highest.all())


def test_little_is_missed_that_scores_of_every_key_would_find():
    text = Text(6000)
    few, many = (chosen(text, 48, at_once) for at_once in (2, N))
    dense = text.sketch.scores(text.queries.reshape(K, N * G, D)).reshape(K, N, G, -1)
    every = best(dense - mx.logaddexp(log_sum(dense), text.anchors)[..., None], count=48)
    exact = text.oracle.choose(text.queries, text.anchors, count=48)
    assert missed(text, exact) <= missed(text, every) <= missed(text, few) < 1.15 * missed(text, exact)
    assert missed(text, many) < 1.02 * missed(text, every)
    blind = best(mx.zeros(dense.shape) + mx.arange(5988), count=48)
    assert missed(text, few) < 0.9 * missed(text, blind)


def test_heads_that_look_for_single_keys_are_searched_whole():
    """Head 0 attends to clusters; head 1 to single keys, each as far from its cluster as it gets."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(K, 3000, D))
    queries = np.stack([random.normal(size=(500, D)), 8 * keys[1, random.integers(100, 2900, 500)]])
    keys[0] = np.repeat(keys[0, ::100], 100, axis=0) + 0.1 * random.normal(size=(3000, D))
    small = sketch.build([mx.array(keys.astype(np.float32))], [queries.astype(np.float32)], scale=SCALE)
    few, many = small["sketch.scanned"][0]
    assert few < 0.05 and many > 0.25


def test_what_is_read_is_a_part_of_what_is_kept():
    router = Text(6000, whole=[]).router
    codes = K * 5988 * (12 + 2)
    assert codes < router.nbytes < 1.5 * codes
    assert router.step_bytes(48) < codes / 3 and router.step_bytes(48) < router.step_bytes(200) < router.nbytes
    assert codes < Text(6000, whole=[0, 1]).router.step_bytes(48) < 1.1 * codes
