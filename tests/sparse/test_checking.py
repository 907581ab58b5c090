"""The kernels of sparse attention are tried before their use, forwards and backwards; wrong ones are refused."""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import pytest

from nectar_mlx.kernels import source
from nectar_mlx.sparse import Fixed, Strided, checking, kernel, sparse_attention
from tests.metal import harness
from tests.metal.harness import KernelError, Simulator

needs_compiler = pytest.mark.skipif(harness.default_mode() is None, reason="neither clang nor ziglang is installed")
PATTERNS = [
    Fixed(16, summary=4),
    Fixed(24, "heads", summary=5, overlap=True),
    Strided(16),
    Strided(8, "interleaved", 1),
    Strided(200),
]


@dataclass(frozen=True)
class Masked:
    """In a pattern's place: another mask."""

    mask: Callable[..., mx.array]


def mistakes(pattern):
    """Masks that are wrong in one way."""
    mask = pattern.mask
    near = replace(pattern, combine="interleaved", layer=0).mask

    def without_near(T, S, heads):
        return mask(T, S, heads=heads) & (~near(T, S, heads=heads) | (mx.arange(S - T, S)[:, None] == mx.arange(S)))

    def with_the_next(T, S, heads):
        return mask(T, S, heads=heads) | (mx.arange(S - T, S)[:, None] + 1 == mx.arange(S))

    steps = [pattern.steps(head) for head in range(checking.HEADS)]
    if any(far for _, far in steps):
        yield "far keys are ignored", lambda T, S, heads: mask(T, S, heads=heads) & near(T, S, heads=heads)
    if any(near for near, _ in steps):
        yield "near keys are ignored", without_near
    yield "the next key is seen", with_the_next


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_mistake_is_beyond_the_tolerance(pattern, backwards):
    probe = checking.probe(pattern, dtype=mx.bfloat16, head_dim=64, scale=0.2)
    assert probe.mismatch(probe.reference, backwards=backwards) is None
    attend = {what: partial(checking.dense, pattern=Masked(mask), scale=0.2) for what, mask in mistakes(pattern)}
    attend["another scale"] = partial(checking.dense, pattern=pattern, scale=0.24)
    attend["another KV head"] = lambda q, k, v: probe.reference(q, k[:, ::-1], v[:, ::-1])
    for what, wrong in attend.items():
        assert max(probe.errors(wrong, backwards=backwards)) > 2 * checking.TOLERANCE[mx.bfloat16], what


@pytest.fixture
def simulate(monkeypatch):
    """simulate(...) -> the Simulator that runs every launch from here on; kernels are tried before their use."""
    monkeypatch.setenv("NECTAR_KERNEL", "metal")

    def start(*edits):
        def edit(text):
            for good, bad in edits:
                text = text.replace(good, bad)
            return text

        simulator = Simulator(mode="plain", edit=edit)
        monkeypatch.setattr(source, "launcher", partial(_as_mlx_raises, simulator))
        kernel.tried.cache_clear()
        return simulator

    yield start
    kernel.tried.cache_clear()


def _as_mlx_raises(simulator, *call):
    run = simulator.launcher(*call)

    def launch(**inputs):
        try:
            return run(**inputs)
        except KernelError as error:
            raise RuntimeError(str(error)) from None

    return launch


def results():
    """(o, L) and gradients of sparse attention; what it warned of."""
    shapes = [(1, 2, 40, 64), (1, 1, 40, 64), (1, 1, 40, 64)]
    inputs = [mx.random.normal(s, key=mx.random.key(n)).astype(mx.bfloat16) for n, s in enumerate(shapes)]
    pattern = Fixed(16, summary=3)

    def loss(*inputs):
        return sum(x.sum() for x in sparse_attention(*inputs, pattern=pattern, scale=0.125))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [*sparse_attention(*inputs, pattern=pattern, scale=0.125), *mx.grad(loss, argnums=(0, 1, 2))(*inputs)]
    plain = [*checking.dense(*inputs, pattern=pattern, scale=0.125)]
    plain += mx.grad(lambda *x: sum(y.sum() for y in checking.dense(*x, pattern=pattern, scale=0.125)), (0, 1, 2))(
        *inputs
    )
    for x, y in zip(found, plain, strict=True):
        assert checking.relative_error(x, y) < checking.TOLERANCE[mx.bfloat16]
    return [str(w.message) for w in caught]


@needs_compiler
def test_right_kernels_are_used(simulate):
    simulator = simulate()
    assert results() == []
    stages = {re.search(r"nectar_sparse_(\w+?)_", text)[1] for text in simulator.texts}
    assert stages == {"forward", "queries", "keys"}
    assert min(Counter(simulator.texts).values()) >= 2, "each is tried, then used"


WRONG = {
    "far keys are ignored": ("head.far ? metal::max(0, last / STRIDE - GAP) * SUMMARY : 0", "0"),
    "another scale": ("score[x] *= SCALE;", "score[x] *= 1.2f * SCALE;"),
    "does not compile": ("const Span span", "const Spam span"),
}


@needs_compiler
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_refused(simulate, what):
    simulate(WRONG[what])
    (warning,) = results()
    assert "Fixed(stride=16" in warning and "heads of 64, mlx.core.bfloat16, forwards" in warning
    assert ("error:" if "compile" in what else "differ from those of plain") in warning


TERMS = "const float constant_of[2] = {constants[rows.place[0]], constants[rows.place[1]]};"
WRONG_BACKWARDS = {
    "far gradients are lost": ("sum[d / 2 * 4 + r * 2 + d % 2] += far_sums[", "far_sums["),
    "the gradient of L is lost": (TERMS, "const float constant_of[2] = {0.0f, 0.0f};"),
    "does not compile": ("terms[COLUMNS]", "trams[COLUMNS]"),
}


@needs_compiler
@pytest.mark.parametrize("what", WRONG_BACKWARDS)
def test_a_wrong_gradient_is_refused(simulate, what):
    simulate(WRONG_BACKWARDS[what])
    (warning,) = results()
    assert "backwards" in warning
