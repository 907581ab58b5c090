"""The decode kernel against float64, on a simulated GPU (tests/metal), in every kind, type, head size and grouping."""

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import kernels
from nectar_mlx.core.quantize import quantize
from nectar_mlx.errors import NectarError
from nectar_mlx.heads import Corrected, Exact, Quadrature
from nectar_mlx.kernels import DecodeKernel, variants
from nectar_mlx.kernels.packing import DTYPES, Form, pack
from nectar_mlx.mlxlm.cache import NectarCache
from tests.kernels.cases import BANKS, SIZES, TOLERANCE, WORK, Case, make_heads, softmax_part
from tests.metal import harness
from tests.metal.harness import KernelError

MODE = harness.default_mode()
pytestmark = pytest.mark.skipif(MODE is None, reason="neither clang nor ziglang is installed")


def check(case, simulate, **options):
    simulate(**options)
    error = case.error()
    hidden = {"float32": 0, "bfloat16": 2e-2}.get(case.packed.form.storage, 2e-3) if case.kind == "deep" else 0
    assert error < max(TOLERANCE[case.element], hidden), error


# Every kind, head size, type, storage and the corners of grouping, length and batch occur; together they meet once.
MATRIX = [
    dict(kind="quadrature", head_dim=64, group=1, element="float32", storage="float32"),
    dict(kind="quadrature", head_dim=128, group=2, element="bfloat16", storage="bfloat16", live=130, fused=True),
    dict(kind="quadrature", head_dim=80, group=16, length=8, element="float32", storage="int4", live=70),
    dict(kind="quadrature", head_dim=96, group=7, batch=3, element="float16", storage="int8", padding=[0, 8, 3]),
    dict(kind="quadrature", head_dim=256, group=4, element="float32", storage="bfloat16", live=70),
    dict(kind="quadrature", head_dim=128, group=5, length=2, element="float32", storage="float16", fused=True),
    dict(kind="corrected", head_dim=128, group=2, batch=4, element="bfloat16", storage="int8", fused=True),
    dict(kind="corrected", head_dim=64, group=3, length=3, batch=2, element="float32", storage="float16", padding=[4, 0]),
    dict(kind="corrected", head_dim=80, group=8, element="float16", storage="int4"),
    dict(kind="mlp", head_dim=128, group=4, element="float32", storage="bfloat16", fused=True),
    dict(kind="mlp", head_dim=96, group=2, length=5, element="bfloat16", storage="int8"),
    dict(kind="deep", head_dim=64, group=2, batch=2, element="float32", storage="float32"),
    dict(kind="deep", head_dim=256, group=1, length=4, element="float16", storage="int4", fused=True),
]  # fmt: skip


def name(options):
    return "-".join(str(v) for v in options.values())


@pytest.mark.parametrize("index", range(len(MATRIX)), ids=[name(o) for o in MATRIX])
def test_every_kind_against_float64(simulate, index):
    options = MATRIX[index]
    case = Case(**{"sizes": SIZES[options["kind"]], "seed": index, **options})
    check(case, simulate, schedule=("forward", "reverse", "random")[index % 3])


def full_matrix():
    count = 0
    for kind in SIZES:
        for head_dim in kernels.HEAD_DIMS:
            for storage in (*DTYPES, "int8", "int4"):
                count += 1
                element = list(DTYPES)[count % 3]
                group, length, batch = (1, 2, 3, 4, 5, 8, 16)[count % 7], (1, 1, 2, 3, 8, 4)[count % 6], 1 + count % 3
                live, fused, blocks = (9, 64, 65, 200)[count % 4], count % 2 == 0, (4, 12, 40)[count % 3]
                padding = [0, 8, 5][:batch] if count % 4 == 0 else None
                common = 20_000.0 if count % 3 == 1 else None
                yield dict(
                    kind=kind, head_dim=head_dim, storage=storage, element=element, group=group, length=length,
                    batch=batch, live=live, padding=padding, fused=fused, blocks=blocks, seed=count, common=common,
                )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", list(full_matrix()), ids=name)
def test_full_matrix(simulate, options):
    schedule = ("forward", "reverse", "random")[options["seed"] % 3]
    check(Case(sizes=SIZES[options["kind"]], **options), simulate, schedule=schedule)


SYNCHRONISED = dict(
    kind="corrected", sizes=SIZES["corrected"], head_dim=256, group=4, element="float32", storage="float16"
)


@pytest.mark.skipif("tsan" not in harness.modes(), reason="needs clang with ThreadSanitizer")
@pytest.mark.parametrize("fused", [False, True], ids=["two launches", "one launch"])
def test_no_data_race(simulate, fused):
    check(Case(fused=fused, **SYNCHRONISED), simulate, mode="tsan", schedule="random")


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def without(statement, occurrence):
    """Removes one occurrence of a statement from the texts that have it, and counts."""

    def edit(text):
        parts = text.split(statement)
        if len(parts) <= occurrence + 1:
            return text
        edit.used = True
        return (
            statement.join(parts[: occurrence + 1]) + statement.join(["", *parts[occurrence + 1 :]])[len(statement) :]
        )

    edit.used = False
    return edit


def caught(case, simulate, edit, modes=("tsan", "asan")):
    """Whether some build and schedule notices what `edit` does to the kernel."""
    for mode in (m for m in modes if m in harness.modes()):
        for schedule in ("forward", "reverse", "random"):
            simulate(mode=mode, schedule=schedule, edit=edit)
            try:
                error = case.error()
            except KernelError:
                return True
            if not error < TOLERANCE[case.element]:
                return True
    return False


@pytest.mark.skipif("tsan" not in harness.modes(), reason="needs clang with ThreadSanitizer")
def test_every_barrier_is_needed(simulate):
    """Each barrier in turn is taken out of the text; the tests above must then be red."""
    simulator = simulate()
    case = Case(batch=3, **SYNCHRONISED)
    assert case.error() < TOLERANCE["float32"]
    barriers = {max(text.count(BARRIER) for text in simulator.texts)}.pop()
    assert barriers >= 2
    for occurrence in range(barriers):
        edit = without(BARRIER, occurrence)
        assert caught(case, simulate, edit), f"barrier {occurrence} can go unnoticed"
        assert edit.used


# ruff: noqa: E501  (texts to find in the kernels are as long as they are)
PLANTED = [
    ("rows past the end are read", "min(base + u * lane.step + lane.first, end - 1)", "min(base + u * lane.step + lane.first, end)"),
    ("rows past the end count", "row < tile.end[n] ?|seen ?", "true ?"),
    ("units past the end count", "h = valid ? h : 0.0f;", ""),
    ("not causal", "live - LENGTH + row % LENGTH + 1", "live"),
    ("another sequence", "row / SEQUENCE_ROWS == sequence ?", "true ?"),
    ("another KV head", "static_cast<size_t>(head) * static_cast<size_t>(keys_strides[1])", "static_cast<size_t>(0)"),
    ("a row sum lacks a step", "step > 0; step /= 2", "step > 1; step /= 2"),
    ("lane groups are not merged", "for (int step = LANES; step < 32; step *= 2)", "for (int step = LANES; step < 16; step *= 2)"),
    ("columns out of place", "8 * (v % PARTS) + 4 * (v / PARTS)", "4 * v"),
    ("the correction of L is lost", "+ found[2] + b_score", "+ b_score"),
    ("the bias of another row", "bias[row]", "bias[0]"),
    (
        "a simdgroup barrier that not all reach",
        "const float top = metal::max(far_top, live_top);",
        "if (lane == 3) simdgroup_barrier(mem_flags::mem_none); const float top = metal::max(far_top, live_top);",
    ),
    ("a threadgroup array is too short", "tile_out[SIMDGROUPS * ROUND * VECTORS]", "tile_out[SIMDGROUPS * ROUND * VECTORS - 1]"),
    ("more threadgroup memory than there is", "tile_out[SIMDGROUPS * ROUND * VECTORS]", "tile_out[SIMDGROUPS * ROUND * VECTORS * 4]"),
    ("a vector load off its alignment", "m.words + static_cast<size_t>(row) * m.stride", "m.words + 1 + static_cast<size_t>(row) * m.stride"),
    ("threadgroup memory is read before it is written", "tile_top[simdgroup * TILE + n] = tile.top[n];", ""),
    ("the strides of the keys are ignored", "static_cast<size_t>(keys_strides[2])", "static_cast<size_t>(HEAD_DIM + 8)"),
]  # fmt: skip


@pytest.mark.skipif("asan" not in harness.modes(), reason="needs clang with AddressSanitizer")
@pytest.mark.parametrize(("what", "good", "bad"), PLANTED, ids=[what for what, _, _ in PLANTED])
def test_planted_bugs_are_caught(simulate, what, good, bad):
    case = Case(kind="corrected", sizes=((40, 13), (25, 30)), group=1, length=2, batch=2, live=70, storage="float16")
    found = []

    def plant(text):
        for part in good.split("|"):  # guards that do for each other go together
            found.append(part in text)
            text = text.replace(part, bad)
        return text

    assert caught(case, simulate, plant, modes=("asan",)), what
    assert any(found), "the text has changed: plant the bug elsewhere"


@pytest.mark.skipif("asan" not in harness.modes(), reason="needs clang with AddressSanitizer")
def test_prefetching_past_the_parameters_is_caught(simulate):
    case = Case(sizes=((20,), (5,)), blocks=12, fused=True)
    check(case, simulate)
    assert caught(
        case, simulate, lambda text: text.replace("metal::min(from + each, quads) - from", "each"), modes=("asan",)
    )


def texts(simulate, **options):
    """The generated Metal of the variants of a case: partial and merge."""
    simulator = simulate()
    Case(**options).run()
    return simulator.texts


@pytest.mark.skipif("asan" not in harness.modes(), reason="needs clang")
@pytest.mark.parametrize("kind", SIZES)
def test_address_spaces(simulate, kind):
    for text in texts(simulate, kind=kind, sizes=SIZES[kind], storage="int8", element="bfloat16", padding=[2]):
        harness.check_address_spaces(text)


@pytest.mark.skipif("asan" not in harness.modes(), reason="needs clang")
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("const device float* bias,", "const float* bias,"),
        ("device Element* to = ", "thread Element* to = "),
        ("partials, output, sums, head,", "partials, output, output, head,"),
        ("x / (1.0f +", "x / (1.0 +"),
    ],
)  # fmt: skip
def test_address_spaces_that_are_wrong(simulate, good, bad):
    generated = texts(simulate, kind="corrected", sizes=SIZES["corrected"])
    broken = [text.replace(good, bad) for text in generated if good in text]
    assert broken
    with pytest.raises(KernelError):
        for text in broken:
            harness.check_address_spaces(text)


@pytest.mark.skipif("asan" not in harness.modes(), reason="needs clang")
def test_small_inputs_keep_their_address_space(simulate):
    """MLX passes fewer than eight values as `constant`: a network of three units must still compile, and be right."""
    options = dict(kind="deep", sizes=((2, 2, 1, 2),), group=1, batch=1, padding=[0])
    for text in texts(simulate, **options):
        harness.check_address_spaces(text)
    check(Case(**options), simulate)


def test_metal_limits(simulate):
    """At most 31 buffers, ASCII, and no shape or stride that MLX takes from a longer word."""
    for text in texts(simulate, kind="deep", sizes=SIZES["deep"], padding=[1]):
        assert len(harness.parse(text).buffers) <= 31
        assert text.isascii()
        used = {b for b, _, _ in harness.parse(text).buffers if b.endswith(("_shape", "_strides"))}
        body = text[text.index("[[kernel]]") :]
        assert all(body.count(f"{b}[") >= 1 for b in used)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_simulator_runs_mlx_own_kernel(head_dim):
    """Calibration: MLX's sdpa_vector, which is known to be right on Apple GPUs, is right here."""
    header = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/sdpa_vector.h"
    source = harness.rewrite_arrays(header.read_text().replace("#include <metal_simdgroup>", ""))
    H, K, S = 4, 2, 37
    unit = (
        '#include "vocabulary.h"\ntemplate <typename T> struct Limits { static constexpr T finite_min = T(-3.0e38f); };\n'
        + source
        + "#undef device\n#undef constant\n#undef thread\n#undef threadgroup\n"
        'extern "C" void kernel_entry(void** b, const simulator::Position& at) {\n'
        f"  sdpa_vector<half, {head_dim}>((half*)b[0], (half*)b[1], (half*)b[2], (half*)b[3], *(int*)b[4], *(int*)b[5], "
        "*(size_t*)b[6], *(size_t*)b[7], *(size_t*)b[6], *(size_t*)b[7], *(float*)b[8], nullptr, nullptr, *(int*)b[4], "
        "*(int*)b[4], *(int*)b[4], nullptr, *(int*)b[4], uint3(at.threadgroup[0], at.threadgroup[1], at.threadgroup[2]), "
        "uint3(at.threadgroups[0], at.threadgroups[1], at.threadgroups[2]), at.simdgroup, at.lane);\n}\n"
    )
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float16) for s in ((H, head_dim), (K, S, head_dim), (K, S, head_dim)))
    numbers = [np.int32(H // K), np.int32(S), np.int64(S * head_dim), np.int64(head_dim), np.float32(head_dim**-0.5)]
    buffers = [(0, x.tobytes()) for x in (q, k, v)] + [(1, 2 * H * head_dim)] + [(0, x.tobytes()) for x in numbers]
    program = harness.build(unit, MODE, ["-w"])
    (data,) = harness.run_job(program, buffers, (1024 * H, 1, 1), (1024, 1, 1), "random")
    got = np.frombuffer(data, np.float16).reshape(H, head_dim).astype(np.float64)
    for h in range(H):
        k64, v64, q64 = (x.astype(np.float64) for x in (k[h // 2], v[h // 2], q[h]))
        assert np.abs(got[h] - softmax_part(k64 @ q64 * head_dim**-0.5, v64)[0]).max() < 2e-3


def test_large_scores_stay_finite(simulate):
    check(Case(spread=40.0, sizes=SIZES["quadrature"]), simulate)


OFFSETS = [
    dict(kind="quadrature", element="float16", storage="float16", live=70, length=2),
    dict(kind="quadrature", element="bfloat16", storage="bfloat16", head_dim=128, live=70, fused=True),
    dict(kind="quadrature", element="float32", storage="float32", head_dim=80, group=4, batch=2, padding=[3, 0]),
    dict(kind="corrected", element="float16", storage="float16", head_dim=96, fused=True),
    dict(kind="corrected", element="bfloat16", storage="float32", group=1, length=3, live=130),
    dict(kind="mlp", element="bfloat16", storage="float16", head_dim=256, group=1),
    dict(kind="mlp", element="float16", storage="float32", batch=3, length=2, fused=True),
    dict(kind="deep", element="bfloat16", storage="float32", head_dim=64),
]  # fmt: skip


@pytest.mark.parametrize("options", OFFSETS, ids=name)
def test_scores_that_have_20_000_in_common(simulate, options):
    """Keys relative to an offset, in half precision, against float64; a kernel that ignored it would be far off."""
    simulate(schedule="random")
    case = Case(sizes=SIZES[options["kind"]], common=20_000.0, **options)
    scores = case.scale * case.queries[0, 0].astype(mx.float32) @ case.keys[0, 0].astype(mx.float32).T
    assert scores.min() > 19_000
    error = case.error()
    assert error < TOLERANCE[options["element"]]
    simulate(mode="plain")  # of the other one only the numbers count
    bank = BANKS[case.kind].stack(case.heads, scale=case.scale)
    case.kernel = DecodeKernel(pack(bank, dtype=DTYPES[options["storage"]]))
    assert case.error() > 10 * max(error, TOLERANCE[options["element"]])


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_keys_of_a_million(simulate, element):
    simulate()
    offset = np.random.default_rng(0).standard_normal((2, 64)) * 1e6
    check(Case(element=element, offset=offset, live=70, length=2), simulate)


def test_without_an_offset_all_is_as_before(simulate):
    """The same text and the same buffer as ever; an offset of zeros gives the same numbers."""
    simulator = simulate()
    without, zeros = Case(live=70, length=2), Case(live=70, length=2, offset=np.zeros((2, 64)))
    assert (without.run() == zeros.run()).all()
    partial, _, relative, _ = simulator.texts
    assert "offset[8]" not in partial and "offset[8]" in relative
    words, moved = (np.array(case.packed.words) for case in (without, zeros))
    tables = 4 * (2 + without.packed.form.blocks)
    assert len(moved) == len(words) + 2 * 64
    assert (moved[tables : tables + 128] == 0).all() and (moved[tables + 128 :] == words[tables:]).all()


def test_a_cache_relative_to_an_offset(simulate):
    """Through the kernel as through plain operations, whose keys are made relative in float32."""
    simulate(mode="plain")
    case = Case(element="float16", common=20_000.0)
    bank, results = BANKS[case.kind].stack(case.heads, scale=case.scale, offset=case.offset), []
    for kernel in (case.kernel, None):
        cache = NectarCache(bank, 40, kernel=kernel)
        for start, stop in ((0, 7), (7, 9)):
            mx.random.seed(start)
            queries = mx.repeat(case.queries, stop - start, axis=2)
            mask = cache.make_mask(stop - start, return_array=True, window_size=None)
            live = cache.update_and_fetch(case.keys[:, :, start:stop], case.values[:, :, start:stop])
            out = cache.attend(queries, *live, scale=case.scale, mask=mask)
        results.append(out)
    assert mx.abs(results[0] - results[1]).max() < TOLERANCE["float16"] * mx.abs(results[1]).max()


def test_more_blocks_than_rows(simulate):
    check(Case(sizes=((3,), (1,)), blocks=200), simulate)


def test_many_blocks_a_head(simulate):
    check(Case(sizes=((90,), (400,)), blocks=160, live=130), simulate)


def test_one_launch_leaves_its_counters_at_zero(simulate):
    case = Case(fused=True, batch=2, length=2)
    simulate()
    for _ in range(2):
        assert case.error() < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "change",
    [dict(length=9, live=20), dict(head_dim=72), dict(head_dim=512)],
    ids=["nine query tokens", "a head size with no kernel", "a head too large"],
)
def test_refuses_what_it_has_no_kernel_for(simulate, change):
    simulate()
    case = Case(**change)
    assert case.run() is None


def test_whole_buffers_and_a_length(simulate):
    """What lies behind the live tokens is not read, whatever it is."""
    simulate()
    case = Case(batch=2, length=2, live=70, padding=[3, 0])
    rest = mx.full((2, 2, 5, 64), mx.nan)
    keys, values = (mx.concatenate([x, rest], axis=2) for x in (case.keys, case.values))
    padding = mx.array(case.padding, mx.int32)
    got = case.kernel.attend(case.queries, keys, values, live=70, left_padding=padding)
    assert (got == case.run()).all().item()
    assert case.kernel.attend(case.queries, keys, values, live=76) is None


def test_a_batch_of_caches(simulate):
    """A prompt by plain operations, then steps by the kernel from whole buffers; one at a time, then together."""
    simulate()
    case = Case(element="float32")
    bank = Quadrature.stack(case.heads, scale=case.scale)

    def steps(kernel):
        caches, found = [NectarCache(bank, 40, kernel=kernel) for _ in range(2)], []
        for cache, prompt in zip(caches, (9, 12), strict=True):
            found += [step(cache, 1, length) for length in (prompt, 2)]
        assert caches[0].live.keys_and_values()[0].shape[2] == (11 if kernel is None else 256), "not sliced"
        batch = NectarCache.merge(caches)
        found.append(step(batch, 2, 1))
        batch.filter(mx.array([1]))
        found.append(step(batch, 1, 1))
        return found

    def step(cache, batch, length):
        mx.random.seed(cache.size())
        q, k, v = (mx.random.normal((batch, heads, length, 64)) for heads in (4, 2, 2))
        mask = cache.make_mask(length, return_array=True, window_size=None)
        return cache.attend(q, *cache.update_and_fetch(k, v), scale=case.scale, mask=mask)

    for got, want in zip(steps(case.kernel), steps(None), strict=True):
        assert mx.abs(got - want).max() < 2e-5


def test_refuses_other_types_and_heads(simulate):
    simulate()
    case = Case()
    assert case.kernel.attend(case.queries.astype(mx.float16), case.keys, case.values) is None
    assert case.kernel.attend(case.queries[:, :3], case.keys, case.values) is None
    assert case.kernel.attend(case.queries, case.keys[:, :1], case.values[:, :1]) is None
    assert case.kernel.attend(case.queries, case.keys[:, :, :0], case.values[:, :, :0]) is None


def test_packing_stores_every_row_once_and_little_else():
    bank = Corrected.stack(make_heads("corrected", ((300, 20), (7, 90)), 128, "int8")[1], scale=1.0)
    packed = pack(bank, bits=8, blocks=20)
    rows = (300 + 7) * 2 + (20 + 90) * 3
    least = rows * (128 + 8) + (300 + 7) * 4 + (20 + 90) * 12
    assert least <= packed.nbytes <= 1.05 * least
    words = np.array(packed.words)
    plan = words[8 : 8 + 4 * packed.form.blocks].reshape(-1, 4)
    for head, sizes in enumerate(((300, 20), (7, 90))):
        for kind, size in enumerate(sizes):
            assert plan[(plan[:, 0] == head) & (plan[:, 1] == kind), 2].sum() == size
    assert (plan[:, 3] % 4 == 0).all()


def test_packing_quantizes_as_the_file_does():
    bank = Quadrature.stack(make_heads("quadrature", ((33,), (7,)), 64, "float32")[1], scale=1.0)
    for bits in (8, 4):
        heads = [{n: quantize(a, bits=bits) if a.ndim == 2 else a for n, a in h.items()} for h in bank.unstack()]
        assert (np.array(pack(bank, bits=bits).words) == np.array(pack(bank, bits=bits, heads=heads).words)).all()


def test_packing_refuses(monkeypatch):
    bank = Quadrature.stack(make_heads("quadrature", ((3,),), 64, "float32")[1], scale=1.0)
    with pytest.raises(NectarError, match="int32"):
        pack(bank, dtype=mx.int32)
    heads = [{"keys": quantize(mx.zeros((3, 64)), bits=8), "values": mx.zeros((3, 64)), "bias": mx.zeros((3,))}]
    with pytest.raises(NectarError, match="bits"):
        pack(bank, heads=heads)
    exact = Exact.stack([{"keys": mx.zeros((3, 64)), "values": mx.zeros((3, 64))}], scale=1.0)
    with pytest.raises(NectarError, match="exact"):
        pack(exact)
    monkeypatch.setenv("NECTAR_KERNEL", "vulkan")
    with pytest.raises(NectarError, match="vulkan"):
        kernels.backend()


@pytest.mark.parametrize(
    ("chip", "blocks"), [("applegpu_g14d", 144), ("applegpu_g14s", 96), ("applegpu_g13g", 96), ("amd", 96)]
)
def test_ultra_chips_get_more_blocks(monkeypatch, chip, blocks):
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": chip})
    assert kernels.blocks() == blocks
    bank = Quadrature.stack(make_heads("quadrature", ((300,), (300,)), 64, "float32")[1], scale=1.0)
    assert kernels.pack(bank).form.blocks == blocks
    assert kernels.pack(bank, n_blocks=50).form.blocks == 50


def test_apple_has_registers_for_fewer_rows_in_flight():
    form = Form(
        kind="quadrature",
        work=WORK["quadrature"],
        storage="int8",
        n_kv_heads=8,
        head_dim=128,
        scale=1,
        blocks=96,
        backend="metal",
    )
    flights = [variants.variant_for(form, rows, rows, 1, "bfloat16", False).flight for rows in (1, 2, 4)]
    assert flights == [4, 4, 2]
    few, many = (variants.variant_for(form, rows, rows, 1, "bfloat16", False).text("partial") for rows in (2, 4))
    assert "if (base == begin)" not in few[0] + many[0], "queries are made floats before the loop"
    cuda = variants.variant_for(replace(form, backend="cuda", one_launch=True), 2, 2, 1, "bfloat16", False)
    assert "if (base == begin)" in cuda.text("fused")[0]


def test_metal_text_includes_what_it_calls(simulate):
    for text in texts(simulate, kind="quadrature"):
        assert all(f"#include <{name}>" in text for name in ("metal_simdgroup", "metal_simdgroup_matrix"))


def test_backend_here(monkeypatch):
    monkeypatch.delenv("NECTAR_KERNEL", raising=False)
    gpu = "metal" if mx.metal.is_available() else "cuda"
    assert kernels.backend() == ("ops" if mx.default_device() == mx.cpu else gpu)
    monkeypatch.setenv("NECTAR_KERNEL", "ops")
    assert kernels.backend() == "ops"


@pytest.mark.parametrize("kind", SIZES)
def test_cuda_text_has_no_metal_left(monkeypatch, tmp_path, kind):
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path))
    made = {}
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **options: made.update(options))
    variants.build.cache_clear()
    form = Form(
        kind=kind,
        work=WORK[kind],
        storage="int4",
        n_kv_heads=8,
        head_dim=128,
        scale=0.1,
        blocks=124,
        one_launch=True,
        backend="cuda",
        offset=True,
    )
    variants.build(variants.variant_for(form, 2, 2, 1, "bfloat16", False), "fused")
    variants.build.cache_clear()
    files = [Path(p) for part in ("header", "source") for p in re.findall(r'#include "(.+)"', made[part])]
    assert len(files) == 2
    text = "".join(f.read_text() for f in files)
    assert not re.search(r"\b(device|constant|threadgroup|thread) |#ifdef|//", text.split("namespace nectar")[1])
    assert all(shape in made["source"] for shape in re.findall(r"\w+_(?:shape|strides)\b", text))
    assert len(made["header"] + made["source"]) < 700, "MLX copies and hashes this at every call"
