"""The kernels of sparse attention against dense attention under the mask, on a simulated GPU (tests/metal)."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.core.attention import Partial
from nectar_mlx.kernels import source
from nectar_mlx.sparse import Fixed, Strided, kernel, sparse_attention
from tests.metal import harness
from tests.metal.harness import KernelError, Simulator

MODE = next((m for m in ("asan", "plain") if m in harness.modes()), None)
pytestmark = pytest.mark.skipif(MODE is None, reason="neither clang nor ziglang is installed")
needs_asan = pytest.mark.skipif("asan" not in harness.modes(), reason="needs clang with AddressSanitizer")
needs_tsan = pytest.mark.skipif("tsan" not in harness.modes(), reason="needs clang with ThreadSanitizer")
TOLERANCE = {mx.bfloat16: 6e-3, mx.float16: 1e-3}  # relative, of weights that are rounded


@pytest.fixture
def simulate(monkeypatch):
    """simulate(...) -> the Simulator that runs every launch from here on."""
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    monkeypatch.setattr(kernel, "works", lambda *_, **__: True)  # test_checking.py has what it does

    def start(**options):
        simulator = Simulator(**{"mode": MODE, **options})
        monkeypatch.setattr(source, "launcher", simulator.launcher)
        return simulator

    return start


def dense(queries, keys, values, pattern, scale):
    """The oracle: plain differentiable attention under the pattern's mask, in float32."""
    groups = queries.shape[1] // keys.shape[1]
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    keys, values = (mx.repeat(x, groups, axis=1) for x in (keys, values))
    scores = queries @ keys.swapaxes(-1, -2) * scale
    scores = mx.where(pattern.mask(queries.shape[2], keys.shape[2], heads=queries.shape[1]), scores, -1e30)
    return Partial(mx.softmax(scores, axis=-1) @ values, mx.logsumexp(scores, axis=-1))


def distance(found, wanted):
    """Relative, and infinite where anything is not finite."""
    a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (found, wanted))
    return np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-9) if np.isfinite(a).all() else np.inf


class Case:
    def __init__(self, pattern, length, keys_length, *, heads=2, kv_heads=1, batch=1, dim=64, dtype=mx.bfloat16):
        mx.random.seed(length)
        self.pattern, self.scale, self.dtype = pattern, dim**-0.5, dtype
        # As a cache hands them out: slices of longer buffers.
        queries = mx.random.normal((batch, length, heads, dim)).swapaxes(1, 2)
        keys, values = (mx.random.normal((batch, kv_heads, keys_length + 5, dim))[:, :, 2:-3] for _ in range(2))
        self.inputs = [x.astype(dtype) for x in (queries, keys, values)]
        self.by = mx.random.normal(queries.shape).astype(dtype).astype(mx.float32), mx.random.normal(queries.shape[:3])

    def error(self, *, backward=True):
        """The largest of the errors of (o, L) and of all gradients."""
        ours, theirs = (self.results(attend, backward) for attend in (sparse_attention, self.dense))
        return max(distance(a, b) for a, b in zip(ours, theirs, strict=True))

    def dense(self, *inputs, pattern, scale):
        return dense(*inputs, pattern, scale)

    def results(self, attend, backward):
        def part(*inputs):
            return attend(*inputs, pattern=self.pattern, scale=self.scale)

        def loss(*inputs):
            return sum((x * by).sum() for x, by in zip(part(*inputs), self.by, strict=True))

        found = list(part(*self.inputs))
        return found + list(mx.grad(loss, argnums=(0, 1, 2))(*self.inputs)) if backward else found


CASES = {
    "fixed": Case(Fixed(16, summary=3), 40, 40),
    "overlap, some of the queries, groups": Case(Fixed(16, summary=3, overlap=True), 30, 101, heads=4, kv_heads=2),
    "more than a threadgroup": Case(Fixed(64, summary=8), 300, 301, batch=2, heads=1),
    "one block": Case(Fixed(500), 150, 150, heads=1),
    "all columns": Case(Fixed(8, summary=8), 70, 70, heads=1),
    "one query": Case(Fixed(16, summary=2, overlap=True), 1, 77),
    "fixed by heads": Case(Fixed(16, "heads", summary=2), 50, 50, heads=4, kv_heads=2),
    "fixed, far layer": Case(Fixed(16, "interleaved", 1, summary=2), 50, 50),
    "strided": Case(Strided(8), 30, 101, heads=4, kv_heads=2),
    "strided, long columns": Case(Strided(2), 280, 280, heads=1),
    "strided by heads": Case(Strided(8, "heads"), 50, 50, heads=4, kv_heads=2),
    "strided, near layer": Case(Strided(8, "interleaved"), 50, 50),
    "heads of 128": Case(Fixed(16, summary=3), 70, 70, dim=128, dtype=mx.float16),
    "heads of 96": Case(Fixed(16, summary=3), 70, 70, heads=1, dim=96),
    "heads of 80": Case(Fixed(24, summary=5, overlap=True), 41, 90, dim=80, dtype=mx.float16),
}


RARE = "one block", "all columns", "fixed, far layer", "strided by heads", "strided, near layer", "heads of 80"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in RARE else n for n in CASES])
def test_equals_dense(simulate, name):
    index = list(CASES).index(name)
    # A sanitizer takes twice as long; every kernel meets it.
    simulate(mode=MODE if index % 4 == 0 else "plain", schedule=("forward", "reverse", "random")[index % 3])
    case = CASES[name]
    assert case.error() < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["fixed", "heads of 128"])
def test_the_tiling_for_cuda_equals_dense(simulate, monkeypatch, name):
    """As it is shared out on NVIDIA, with Apple's matrix products."""
    here = kernel.tiling
    monkeypatch.setattr(kernel, "tiling", lambda stage, head_dim, _: here(stage, head_dim, "cuda"))
    simulator = simulate(mode="plain")
    assert CASES[name].error() < TOLERANCE[CASES[name].dtype]
    assert all("SUMS = 2;" in text for text in simulator.texts)


def test_large_scores_stay_finite(simulate):
    simulate(mode="plain")
    case = Case(Fixed(16, summary=3), 40, 40)
    case.inputs[0] = case.inputs[0] * 100
    assert case.error(backward=False) < TOLERANCE[case.dtype]


SYNCHRONISED = Case(Fixed(32, summary=8), 180, 180, heads=1)


@needs_tsan
@pytest.mark.parametrize(
    "case",
    [pytest.param(SYNCHRONISED, marks=pytest.mark.slow), CASES["heads of 128"]],
    ids=["registers", "threadgroup memory"],
)
def test_no_data_race(simulate, case):
    simulator = simulate(mode="tsan", schedule="random")
    assert case.error() < TOLERANCE[case.dtype]
    assert any("uint4 parts[" in text for text in simulator.texts) == (case is not SYNCHRONISED)


def caught(case, simulate, edit, mode, *, backward=True):
    """Whether some schedule finds out about the edit."""
    for schedule in ("reverse", "random", "forward"):
        simulator = simulate(mode=mode, schedule=schedule, edit=edit)
        try:
            if not case.error(backward=backward) < 1e-2:
                return True
        except KernelError:
            return True
        assert any(edit(text) != text for text in simulator.texts), "nothing was edited"
    return False


@needs_tsan
@pytest.mark.parametrize("stage", ["forward", "queries", "keys"])
@pytest.mark.parametrize("occurrence", [0, 1])
def test_every_barrier_is_needed(simulate, stage, occurrence):
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"

    def edit(text):
        if f"nectar_sparse_{stage}" not in text:
            return text
        parts = text.split(barrier)
        assert len(parts) == 3
        return parts[0] + (barrier if occurrence else "") + parts[1] + ("" if occurrence else barrier) + parts[2]

    assert caught(SYNCHRONISED, simulate, edit, "tsan", backward=stage != "forward")


BUGS = {
    "sees the future": ("return j <= i &&", "return j <= i + 1 &&"),
    "one row too many": ("f / SUMMARY < i / STRIDE - GAP", "f / SUMMARY <= i / STRIDE - GAP"),
    "one key too many": ("const bool exists = local < end", "const bool exists = local <= end + 64"),
    "a summary column too far": ("f / SUMMARY * STRIDE + head.first", "f / SUMMARY * STRIDE + head.first + 1"),
    "no rescaling": ("total[r] *= factor;", ""),
    "another lane's row": ("lane_index / 2 % 4;", "lane_index / 2 % 2;"),
    "past the end": (
        "rows.at[r] = query_position(head, metal::min(row, end - 1))",
        "rows.at[r] = query_position(head, row)",
    ),
    "forgets far gradients": ("sum[d / 2 * 4 + r * 2 + d % 2] += far_sums[", "far_sums["),
}


@needs_asan
@pytest.mark.parametrize("what", BUGS)
def test_planted_bugs_are_caught(simulate, what):
    case, backward = Case(Fixed(16, summary=3), 71, 71, heads=1), "gradients" in what
    assert caught(case, simulate, lambda text: text.replace(*BUGS[what]), "asan", backward=backward)


@needs_asan
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_address_spaces(simulate, dtype):
    simulator = simulate(mode="plain")
    for pattern in (Fixed(16, summary=3), Strided(8)):
        Case(pattern, 20, 20, heads=1, dtype=dtype).error()
    for text in simulator.texts:
        harness.check_address_spaces(text)
        assert len(harness.parse(text).buffers) <= 31


def test_cuda_text_has_no_metal_left(monkeypatch, tmp_path):
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path))
    made = {}
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **options: made.update(options) or print)
    kernel.build.cache_clear()
    (launch,) = kernel.launches_of(Fixed(512), 2, 2, 0.125, "cuda")
    for stage, flags in (("forward", ()), ("queries", ()), ("keys", ("FAR_KEYS",)), ("keys", ("NEAR_KEYS", "JOIN"))):
        launch.kernel(stage, mx.zeros((1, 2, 8, 64), mx.bfloat16), *flags, blocks=1, shapes=[])
        files = [Path(p) for part in ("header", "source") for p in re.findall(r'#include "(.+)"', made[part])]
        text = "".join(file.read_text() for file in files)
        assert not re.search(r"\b(device|constant|threadgroup|thread) |#ifdef|//", text.split("namespace nectar")[1])
        assert "mma.sync" in text and "simdgroup_matrix" not in text
        assert all(name in made["source"] for name in re.findall(r"\w+_(?:shape|strides)\b", text))
    kernel.build.cache_clear()


def test_what_it_has_no_kernel_for(simulate):
    simulate()
    x, narrow = mx.zeros((1, 1, 4, 64)), mx.zeros((1, 1, 4, 64), mx.bfloat16)
    assert kernel.supports(narrow, narrow, narrow)
    assert not kernel.supports(x, x, x)
    assert not kernel.supports(narrow, narrow, narrow.astype(mx.float16))
    assert not kernel.supports(*[narrow[..., :40]] * 3)


def test_plain_operations_where_they_are_asked_for(monkeypatch):
    monkeypatch.setenv("NECTAR_KERNEL", "ops")
    monkeypatch.setattr(kernel, "attention", None)
    assert Case(Fixed(16), 20, 20).error() < TOLERANCE[mx.bfloat16]
