"""Sparse attention against dense attention under the explicit mask, its cost, its memory and its gradients."""

import itertools
import random
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import NectarError
from nectar_mlx.core.attention import Partial, causal
from nectar_mlx.sparse import Fixed, Pattern, Strided, blocks, sparse_attention

COMBINE = ["merged", "interleaved", "heads"]


def arrays(
    length: int, keys_length: int | None = None, *, batch: int = 1, heads: int = 2, kv_heads: int = 2, dim: int = 8
) -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(length)
    queries = mx.random.normal((batch, heads, length, dim))
    keys, values = (mx.random.normal((batch, kv_heads, keys_length or length, dim)) for _ in range(2))
    return queries, keys, values


def dense(queries: mx.array, keys: mx.array, values: mx.array, pattern: Pattern, scale: float) -> Partial:
    """The oracle: plain differentiable attention under the pattern's mask."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (mx.repeat(x, groups, axis=1) for x in (keys, values))
    mask = pattern.mask(queries.shape[2], keys.shape[2], heads=queries.shape[1])
    scores = mx.where(mask, (queries * scale) @ keys.swapaxes(-1, -2), -1e30)
    return Partial(mx.softmax(scores, axis=-1) @ values, mx.logsumexp(scores, axis=-1))


def difference(one: Partial, two: Partial) -> float:
    return max(mx.abs(a - b).max().item() for a, b in zip(one, two, strict=True))


def some_pattern(rng: random.Random) -> Pattern:
    stride, combine, layer = rng.choice([1, 2, 3, 8, 13, 16, 40, 500]), rng.choice(COMBINE), rng.randrange(2)
    if rng.random() < 0.5:
        return Strided(stride, combine, layer)
    return Fixed(stride, combine, layer, summary=rng.randint(1, stride), overlap=rng.random() < 0.5)


# --- which keys a query sees -------------------------------------------------------------------------------------


def naive_mask(pattern: Pattern, length: int, head: int) -> np.ndarray:
    """The paper's sets, position by position."""
    seen = np.zeros((length, length), bool)
    near, far = {
        "merged": (True, True),
        "interleaved": (pattern.layer % 2 == 0, pattern.layer % 2 == 1),
        "heads": (head % 2 == 0, head % 2 == 1),
    }[pattern.combine]
    stride = pattern.stride
    for i, j in itertools.product(range(length), repeat=2):
        if j > i:
            continue
        if isinstance(pattern, Strided):
            sets = i - j < stride, (i - j) % stride == 0
        else:
            order = (head // 2 if pattern.combine == "heads" else head) % (stride // pattern.summary)
            end = stride - order * pattern.summary
            own = i // stride - pattern.overlap <= j // stride
            sets = own, end - pattern.summary <= j % stride < end
        seen[i, j] = i == j or (near and sets[0]) or (far and sets[1])
    return seen


@pytest.mark.parametrize("seed", range(20))
def test_mask_is_the_papers(seed: int) -> None:
    pattern = some_pattern(random.Random(seed))
    mask = np.array(pattern.mask(50, 50, heads=5))
    assert mask.shape == (5, 50, 50)
    for head in range(5):
        assert (mask[head] == naive_mask(pattern, 50, head)).all()
    assert (np.array(pattern.mask(7, 50, heads=5)) == mask[:, -7:]).all()
    assert (np.array(pattern.mask(7, 50, heads=5, first=9)) == mask[:, -7:, :9]).all()


def test_heads_read_different_summary_columns() -> None:
    mask = np.array(Fixed(8, summary=2).mask(64, 64, heads=4))
    columns = [set(np.flatnonzero(mask[head, 63, :56]) % 8) for head in range(4)]
    assert columns == [{6, 7}, {4, 5}, {2, 3}, {0, 1}]


def test_two_steps_connect_all_positions() -> None:
    for pattern in (Strided(8, "interleaved"), Fixed(8, "interleaved", summary=1)):
        first, second = (np.array(pattern.at(layer).mask(64, 64)[0]).astype(int) for layer in range(2))
        reached = (first @ second > 0) | (second @ first > 0)
        assert (reached == np.tril(np.ones((64, 64), bool))).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Strided(0),
        lambda: Fixed(-1),
        lambda: Fixed(8, summary=9),
        lambda: Fixed(8, summary=0),
        lambda: Strided(4, "both"),  # type: ignore[arg-type]
    ],
)
def test_impossible_patterns(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NectarError):
        make()


@pytest.mark.parametrize(("length", "keys_length", "heads"), [(9, 8, 2), (0, 8, 2), (8, 8, 3)])
def test_shapes_that_do_not_fit(length: int, keys_length: int, heads: int) -> None:
    queries, keys = mx.zeros((1, heads, length, 8)), mx.zeros((1, 2, keys_length, 8))
    with pytest.raises(ValueError, match="do not fit"):
        sparse_attention(queries, keys, keys, pattern=Strided(4), scale=1.0)


# --- the same numbers as dense attention under the mask --------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_equals_dense(seed: int, set_device: Callable[..., None]) -> None:
    rng = random.Random(seed)
    pattern = some_pattern(rng)
    kv_heads, groups = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    keys_length = rng.choice([1, 2, 7, 16, 33, 100, 255, 256, 401, 1023, 1024])
    length = rng.choice([keys_length, rng.randint(1, keys_length)])
    set_device(max_scores=rng.choice([1 if keys_length < 300 else 10_000, 5000, 1 << 20]))
    q, k, v = arrays(length, keys_length, batch=rng.choice([1, 2]), heads=kv_heads * groups, kv_heads=kv_heads)
    ours = sparse_attention(q, k, v, pattern=pattern, scale=0.5)
    assert ours.output.dtype == ours.log_normalizer.dtype == mx.float32
    assert difference(ours, dense(q, k, v, pattern, 0.5)) < 1e-5
    mask = pattern.mask(length, keys_length, heads=q.shape[1])[None]
    assert difference(ours, causal(q, k, v, scale=0.5, mask=mask)) < 1e-5


@pytest.mark.parametrize("length", range(1, 41))
@pytest.mark.parametrize(
    "pattern",
    [
        Strided(5),
        Fixed(5, summary=2),
        Strided(6, "heads"),
        Fixed(6, "heads", summary=4),
        Fixed(5, summary=2, overlap=True),
        Fixed(6, "heads", summary=2, overlap=True),
    ],
)
def test_every_short_length(length: int, pattern: Pattern, set_device: Callable[..., None]) -> None:
    set_device(max_scores=1)  # every row a chunk of its own, and never the masked path
    q, k, v = arrays(length, heads=4)
    assert difference(sparse_attention(q, k, v, pattern=pattern, scale=1.0), dense(q, k, v, pattern, 1.0)) < 1e-5


@pytest.mark.parametrize("pattern", [Strided(16), Fixed(16, summary=4)])
def test_chunked_prefill_equals_one(pattern: Pattern) -> None:
    q, k, v = arrays(203)
    whole = sparse_attention(q, k, v, pattern=pattern, scale=0.3)
    cuts = [0, 1, 2, 50, 64, 128, 187, 203]
    for start, stop in itertools.pairwise(cuts):
        part = sparse_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], pattern=pattern, scale=0.3)
        assert difference(part, Partial(*(x[:, :, start:stop] for x in whole))) < 1e-5


@pytest.mark.parametrize("pattern", [Strided(16), Fixed(16, summary=4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 2e-3), (mx.bfloat16, 2e-2)])
def test_half_precision(pattern: Pattern, dtype: mx.Dtype, tolerance: float) -> None:
    q, k, v = (x.astype(dtype) for x in arrays(203))
    wide = (x.astype(mx.float32) for x in (q, k, v))
    assert difference(sparse_attention(q, k, v, pattern=pattern, scale=0.3), dense(*wide, pattern, 0.3)) < tolerance


def test_against_float64() -> None:
    pattern, scale = Fixed(16, summary=4), 2.0  # scores up to about 60
    q, k, v = arrays(150)
    ours = sparse_attention(q, k, v, pattern=pattern, scale=scale)
    scores = np.einsum("bhtd,bhsd->bhts", *(np.array(x, np.float64) for x in (q * scale, k)))
    scores = np.where(np.array(pattern.mask(150, 150, heads=2)), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours.output, weights / total @ np.array(v, np.float64), atol=2e-5)
    np.testing.assert_allclose(ours.log_normalizer, (top + np.log(total))[..., 0], atol=2e-5)


def test_what_is_not_seen_does_not_matter() -> None:
    pattern = Fixed(8, summary=2)
    q, k, v = arrays(61)
    seen = mx.any(pattern.mask(1, 61, heads=2), axis=(0, 1))[:, None]
    huge = mx.where(seen, k, 1e4), mx.where(seen, v, 1e9)
    ours = sparse_attention(q, *huge, pattern=pattern, scale=1.0)
    plain = sparse_attention(q, k, v, pattern=pattern, scale=1.0)
    assert mx.array_equal(ours.output[:, :, -1], plain.output[:, :, -1])


def test_one_block_of_the_whole_length_is_dense_attention() -> None:
    q, k, v = arrays(100)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
    assert mx.allclose(sparse_attention(q, k, v, pattern=Fixed(128), scale=0.3).output, expected, atol=1e-5)


def test_compiles() -> None:
    q, k, v = arrays(100)
    pattern = Strided(8)
    run = mx.compile(lambda q, k, v: sparse_attention(q, k, v, pattern=pattern, scale=0.3))
    assert difference(Partial(*run(q, k, v)), dense(q, k, v, pattern, 0.3)) < 1e-5


# --- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_gradients_equal_denses(seed: int, set_device: Callable[..., None]) -> None:
    rng = random.Random(seed)
    pattern = some_pattern(rng)
    keys_length = rng.choice([2, 7, 16, 33, 100])
    length = rng.choice([keys_length, rng.randint(1, keys_length)])
    set_device(max_scores=rng.choice([1, 500, 1 << 20]))
    inputs = arrays(length, keys_length, batch=2, heads=4, kv_heads=rng.choice([1, 2, 4]))
    by_output, by_log = mx.random.normal(inputs[0].shape), mx.random.normal(inputs[0].shape[:3])

    def gradients(attention) -> list[mx.array]:  # type: ignore[no-untyped-def]
        def loss(*inputs: mx.array) -> mx.array:
            output, log_normalizer = attention(*inputs)
            return (output * by_output).sum() + (log_normalizer * by_log).sum()

        return mx.grad(loss, argnums=(0, 1, 2))(*inputs)

    ours = gradients(lambda *inputs: sparse_attention(*inputs, pattern=pattern, scale=0.5))
    theirs = gradients(lambda *inputs: dense(*inputs, pattern, 0.5))
    for one, two in zip(ours, theirs, strict=True):
        assert mx.abs(one - two).max().item() < 1e-4


# --- cost -------------------------------------------------------------------------------------------------------


def score_counts(pattern: Pattern, length: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every array of scores that one call makes."""
    sizes, original = [], blocks.masked_scores

    def counted(*args) -> mx.array:  # type: ignore[no-untyped-def]
        sizes.append(original(*args))
        return sizes[-1]

    monkeypatch.setattr(blocks, "masked_scores", counted)
    sparse_attention(*arrays(length, heads=1, kv_heads=1), pattern=pattern, scale=1.0)
    monkeypatch.setattr(blocks, "masked_scores", original)
    return [x.size for x in sizes]


@pytest.mark.parametrize("kind", [Strided, Fixed])
def test_cost_grows_as_n_root_n(
    kind: type[Strided] | type[Fixed], monkeypatch: pytest.MonkeyPatch, set_device: Callable[..., None]
) -> None:
    set_device(max_scores=1 << 15)
    counts = {n: score_counts(kind.balanced(n), n, monkeypatch) for n in (1024, 4096, 16384)}
    for n, sizes in counts.items():
        assert max(sizes) <= max(1 << 15, 8 * n)  # a chunk, or one row's queries with their far keys
        assert sum(sizes) < 8 * n**1.5
    assert sum(counts[4096]) < 9 * sum(counts[1024])
    assert sum(counts[16384]) < 9 * sum(counts[4096])


@pytest.mark.parametrize("kind", [Strided, Fixed])
@pytest.mark.parametrize("reverse", [False, True])
def test_memory_grows_as_n(kind: type[Strided] | type[Fixed], reverse: bool, set_device: Callable[..., None]) -> None:
    set_device(max_scores=1 << 15)

    def peak(length: int) -> int:
        inputs = arrays(length, dim=16)
        mx.eval(inputs)

        def loss(*inputs: mx.array) -> mx.array:
            return sparse_attention(*inputs, pattern=kind.balanced(length), scale=0.25).output.sum()

        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(loss, argnums=(0, 1, 2))(*inputs) if reverse else loss(*inputs))
        return mx.get_peak_memory() - before

    short, long = peak(2048), peak(8192)
    assert long < 5 * short  # dense: 16 times
    assert long < 30 * 2 * 8192 * 16 * 4  # some copies of the inputs
