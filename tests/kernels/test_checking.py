"""Kernels are tried before their use: a right one passes in every type, a wrong one is refused, an answer never fails."""

import itertools
import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.core import attention
from nectar_mlx.kernels import DecodeKernel, checking, source
from nectar_mlx.kernels.packing import DTYPES, Form
from nectar_mlx.kernels.variants import variant_for
from nectar_mlx.mlxlm.cache import NectarCache
from tests.kernels.cases import BANKS, SIZES, TOLERANCE, WORK, Case
from tests.metal import harness

needs_compiler = pytest.mark.skipif(harness.default_mode() is None, reason="neither clang nor ziglang is installed")
LIVE = checking.LIVE


def variant(kind="quadrature", storage="int8", element="bfloat16", group=2, length=1, batch=1, padded=False, **form):
    of = {"n_kv_heads": 3, "head_dim": 64, "scale": 0.1, "blocks": 9, "backend": "metal"} | form
    of |= {"kind": BANKS[kind].kind, "work": WORK[kind], "storage": storage}
    return variant_for(Form(**of), batch * group * length, group, length, element, padded)


@pytest.mark.parametrize(("group", "length"), list(itertools.product((1, 2, 3, 7, 16), (1, 2, 3, 8))))
def test_a_probe_is_of_the_very_form(group, length):
    for batch in (1, 2, 3, 5, 40):
        wanted = variant(group=group, length=length, batch=batch)
        probe = checking.probe(wanted, one_launch=False)
        (B, H, T, _), form = probe.queries.shape, probe.packed.form
        assert (H, T, probe.keys.shape[0]) == (3 * group, length, B)
        assert variant_for(form, B * group * T, group, T, "bfloat16", False) == wanted
        assert len(set(probe.bank.sizes)) > 1, "ragged"


def test_a_probe_of_a_trial_has_its_choices():
    wanted = variant(group=4, flight=6, tile=1)
    form = checking.probe(wanted, one_launch=False).packed.form
    assert variant_for(form, 4, 4, 1, "bfloat16", False) == wanted
    assert (wanted.flight, wanted.tile, wanted.tiles) == (6, 1, 4)


def dropped(x, at):
    return mx.concatenate([x[:, :, :at], x[:, :, at + 1 : LIVE]], axis=2)


def mask_of(probe):
    """[B, 1, T, LIVE]: which live tokens a query sees."""
    T, at = probe.queries.shape[2], mx.arange(LIVE)
    mask = (at <= mx.arange(LIVE - T, LIVE)[:, None])[None, None]
    return mask if probe.left_padding is None else mask & (at >= probe.left_padding[:, None, None, None])


def faults(probe):
    """What a kernel would return that makes one mistake, by name."""
    bank, queries, padding = probe.bank, probe.queries, probe.left_padding
    live = [x[:, :, :LIVE] for x in (probe.keys, probe.values)]

    def result(bank=bank, live=live, padding=padding):
        return checking.reference(bank, queries, *live, left_padding=padding)

    def stacked(heads):
        return type(bank).stack(heads, scale=bank.scale, offset=bank.offset)

    yield "live tokens are ignored", bank.over(queries.astype(mx.float32)).output
    yield "one live token too few", result(live=[x[:, :, :-1] for x in live])
    yield "one live token too many", result(live=[x[:, :, : LIVE + 1] for x in (probe.keys, probe.values)])
    for at in (LIVE // 2 - 1, LIVE // 2):
        yield f"token {at}, beside the seam of two slices, is left out", result(live=[dropped(x, at) for x in live])
    if len(bank.sizes) > 1:
        yield "another KV head's tokens", result(live=[x[:, ::-1] for x in live])
        yield "another KV head's context", result(bank=stacked(bank.unstack()[::-1]))
    if bank.offset is not None:
        yield "the offset is ignored", result(bank=replace(bank, offset=None))
        if len(bank.sizes) > 1:
            yield "another KV head's offset", result(bank=replace(bank, offset=bank.offset[::-1]))
        common = attention.common_score(queries, bank.offset, scale=bank.scale)
        half = common.astype(mx.bfloat16 if queries.dtype == mx.bfloat16 else mx.float16).astype(mx.float32)
        near = attention.causal(queries, *live, scale=bank.scale, mask=mask_of(probe), offset=bank.offset)
        near = near._replace(log_normalizer=near.log_normalizer + common - half)
        yield (
            "scores are made relative in half precision",
            attention.merge(bank.over(queries.astype(mx.float32)), near).output,
        )
    yield "another scale", result(bank=replace(bank, scale=1.1 * bank.scale))
    if padding is not None:
        yield "padding is ignored", result(padding=None)
        yield "one padding token is seen", result(padding=padding - 1)
        yield "one token more is padding", result(padding=padding + 1)
    if "bias" in bank.parameters:
        heads = [head | {"bias": mx.zeros_like(head["bias"])} for head in bank.unstack()]
        yield "biases are ignored", result(bank=stacked(heads))
        nodes = [head | {"bias": head["bias"] - 1e4} for head in bank.unstack()]
        yield "nodes are ignored", result(bank=stacked(nodes))
    for name in set(bank.parameters) & {"w_score", "w_out", "target.w_out", "score.w_out", "target.skip", "score.skip"}:
        heads = [head | {name: mx.zeros_like(head[name])} for head in bank.unstack()]
        yield f"{name} is ignored", result(bank=stacked(heads))


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(storage="int8", head_dim=64),
        dict(storage="int8", head_dim=128, group=4, length=2, padded=True),
        dict(storage="int4", head_dim=256, group=8, length=8, batch=3, scale=1.0),
        dict(storage="bfloat16", head_dim=80, group=1, length=2, batch=2, padded=True, scale=0.003),
        dict(storage="float32", head_dim=96, group=1),
        dict(storage="int8", head_dim=128, group=4, length=2, offset=True),
        dict(storage="float16", head_dim=80, padded=True, offset=True, scale=0.5),
        dict(storage="float16", head_dim=64, group=1, n_kv_heads=1, offset=True),  # one row has to show it all
    ],
    ids=lambda options: f"{options['storage']}-{options['head_dim']}" + "-offset" * ("offset" in options),
)
def test_every_mistake_is_beyond_the_tolerance(kind, element, options):
    probe = checking.probe(variant(kind=kind, element=element, **options), one_launch=False)
    assert probe.mismatch(probe.reference().astype(DTYPES[element])) is None
    assert 4 * TOLERANCE[element] > probe.tolerance or kind == "deep"
    wanted = probe.reference()
    for what, result in faults(probe):
        assert checking.relative_error(result, wanted) > 2 * probe.tolerance, what


# ruff: noqa: E501  (texts to find in the kernels are as long as they are)
PLANTED = {
    "live tokens are ignored": ("int start = begin;", "int start = end;"),
    "nodes are ignored": ("true, 0, end);", "true, end, end);"),
    "one live token too few": ("const int live = static_cast<int>(live_tokens_shape[0]);", "const int live = static_cast<int>(live_tokens_shape[0]) - 1;"),
    "another KV head's queries": ("static_cast<size_t>(head * QUERY_HEADS)", "static_cast<size_t>(0)"),
    "padding is ignored": ("start = metal::max(begin, left_padding[sequence]);", "start = begin;"),
    "biases are ignored": ("biased ? bias[row] : 0.0f", "0.0f"),
    "the offset is ignored": ("x[i] -= tile.offset[i];", ""),
    "another KV head's offset": ("+ head * HEAD_DIM + lane.part * 8", "+ lane.part * 8"),
    "another scale": ("(scored ? SCALE : 1.0f)", "(scored ? 1.1f * SCALE : 1.0f)"),
    "a slice too many for a whole one": ("(live + LIVE_SLICE - 1) / LIVE_SLICE", "(live + LIVE_SLICE) / LIVE_SLICE"),
    "tokens of an uneven slice": ("const int each = (live + slices - 1) / slices;", "const int each = slices > 2 ? live / slices : (live + slices - 1) / slices;"),
}  # fmt: skip


def refused(case):
    """Whether the case's layer is answered by plain operations, with one warning; by the kernel it is without any."""
    padding = None if case.padding is None else mx.array(case.padding, mx.int32)
    kernel = DecodeKernel(case.packed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = kernel.attend(case.queries, case.keys, case.values, left_padding=padding)
    assert (found is None) == (len(caught) == 1), [str(w.message) for w in caught]
    return str(caught[0].message) if caught else None


@needs_compiler
@pytest.mark.parametrize("what", PLANTED)
def test_a_wrong_kernel_is_refused(simulate, what):
    length = 1 + list(PLANTED).index(what) % 2
    simulate(checked=True, mode="plain", edit=lambda text: text.replace(*PLANTED[what]))
    padding = [2] if "padding" in what else None
    offset = np.ones((2, 64)) if "offset" in what else None
    warning = refused(Case(length=length, element="bfloat16", storage="int8", padding=padding, offset=offset))
    assert warning is not None
    assert "quadrature heads of 64 (int8), bfloat16 queries" in warning and "differ from those of plain" in warning


@needs_compiler
@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(kind="quadrature", length=1, storage="int8", fused=True),
        dict(kind="corrected", length=2, storage="float16", batch=2, padding=[3, 0]),
        dict(kind="deep", length=1, storage="bfloat16"),
        dict(kind="quadrature", length=2, storage="int8", offset=np.ones((2, 64))),
    ],
    ids=lambda options: options["kind"] + "-offset" * ("offset" in options),
)
def test_a_right_kernel_passes_in_every_type(simulate, element, options):
    simulator = simulate(checked=True, mode="plain")
    case = Case(sizes=SIZES[options["kind"]][:2], element=element, **options)
    assert refused(case) is None
    launches = 1 if case.packed.form.one_launch else 2
    assert len(simulator.texts) == (len(checking.COUNTS) + 2) * launches, "once for each check, and two calls"
    assert set(simulator.texts[:launches]) == set(simulator.texts[launches:]), "what is checked is the very text"


@needs_compiler
def test_an_answer_does_not_fail_with_the_compiler(simulate, monkeypatch):
    def launcher(kernel, *call):
        def launch(*, inputs):
            raise RuntimeError(
                "[metal::Device] Unable to build metal library from source\nprogram:3: error: no such word"
            )

        return launch

    simulate(checked=True)
    monkeypatch.setattr(source, "launcher", launcher)
    assert "error: no such word" in refused(Case())


@needs_compiler
def test_a_refused_kernel_leaves_the_plain_result(simulate):
    """Through a cache, whose buffers are whole where there is a kernel."""
    simulate(checked=True, mode="plain", edit=lambda text: text.replace(*PLANTED["live tokens are ignored"]))
    case = Case()
    results = []
    for kernel in (case.kernel, None):
        mx.random.seed(0)
        cache = NectarCache(BANKS[case.kind].stack(case.heads, scale=case.scale), 40, kernel=kernel)
        for length in (9, 1, 1):
            q, k, v = (mx.random.normal((1, heads, length, 64)) for heads in (4, 2, 2))
            mask = cache.make_mask(length, return_array=True, window_size=None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = cache.attend(q, *cache.update_and_fetch(k, v), scale=case.scale, mask=mask)
        results.append(out)
    assert mx.abs(results[0] - results[1]).max() < 1e-6
