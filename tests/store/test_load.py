"""From the file to the decode kernel: nothing is rounded twice, and nothing is searched for."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import store
from nectar_mlx.core.quantize import Quantized, dequantize
from nectar_mlx.store import Layout, load

SIZES = {
    "quadrature": [(9,), (2,), (40,), (1,)],
    "hybrid": [(9,), (2,), (40,), (1,)],
    "retrieval": [(0,)] * 4,
    "corrected": [(9, 4), (2, 5), (40, 8), (1, 6)],
    "mlp": [(8, 1, 32, 1), (16, 1, 64, 1), (24, 1, 32, 1), (8, 1, 32, 1)],
}


def written(kind, bits, head_dim):
    layout = Layout(kind=kind, n_layers=2, n_kv_heads=2, head_dim=head_dim, scale=0.2, bits=bits)
    key, heads = mx.random.key(bits or 0), []
    for size in SIZES[kind]:
        head = {}
        for name, shape in layout.bank.shapes(size, head_dim).items():
            key, now = mx.random.split(key)
            head[name] = mx.random.normal(shape, key=now) * mx.exp(
                mx.random.normal((shape[0], *[1] * (len(shape) - 1)))
            )
        heads.append(head)
    return layout, store.pack(layout, heads)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_kernel_gets_the_integers_of_the_file(kind, bits, head_dim):
    layout, tensors = written(kind, bits, head_dim)
    banks = [bank.without_retrieval() for bank in store.unpack(layout, tensors)]
    layers = load.stored_heads(layout, tensors)
    for bank, heads in zip(banks, layers, strict=True):
        for head, truth in zip(heads, bank.unstack(), strict=True):
            assert head.keys() == truth.keys()
            for name, x in head.items():
                values = dequantize(x, bits=8) if isinstance(x, Quantized) else x
                assert np.array_equal(np.array(values), np.array(truth[name])), name
                # A matrix whose rows are no whole groups has no integers of its own; nodes always have.
                assert isinstance(x, Quantized) == (truth[name].ndim > 1) or name not in ("keys", "values")


@pytest.mark.parametrize("kind, bits", [("quadrature", None), ("quadrature", 6), ("corrected", 6), ("hybrid", 6)])
def test_a_file_is_packed_where_there_is_a_kernel(kind, bits, monkeypatch):
    layout, tensors = written(kind, bits, 64)
    banks = [bank.without_retrieval() for bank in store.unpack(layout, tensors)]
    assert load.decode_kernels(banks, layout, tensors) is None, "a CPU has no kernel"
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    layers = load.decode_kernels(banks, layout, tensors)
    assert [layer.packed.form.storage for layer in layers] == ["int8"] * 2


def test_what_keys_are_relative_to_goes_to_the_kernel(monkeypatch):
    layout, tensors = written("hybrid", 6, 64)
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    for offsets in (None, mx.random.normal((4, 64)).astype(mx.bfloat16)):
        tensors |= {} if offsets is None else {"offsets": offsets}
        banks = [bank.without_retrieval() for bank in store.unpack(layout, tensors)]
        layers = load.decode_kernels(banks, layout, tensors)
        assert [layer.packed.form.offset for layer in layers] == [offsets is not None] * 2
    tables = 4 * (2 + layers[1].packed.form.blocks)
    held = np.array(layers[1].packed.words)[tables : tables + 128].view(np.float32)
    assert (held == np.array(offsets[2:].astype(mx.float32)).reshape(-1)).all()


@pytest.mark.parametrize("kind, bits", [("quadrature", None), *((kind, 6) for kind in SIZES)])
def test_beside_a_kernel_matrices_take_half_the_memory(kind, bits):
    layout, tensors = written(kind, bits, 64)
    queries = mx.random.normal((2, 5, 64), key=mx.random.key(7))
    for half, full in zip(store.unpack(layout, tensors, half=True), store.unpack(layout, tensors), strict=True):
        sizes = [sum(x.nbytes for x in b.parameters.values() if x.ndim > 2) for b in (half, full)]
        assert 2 * sizes[0] == sizes[1]
        for ours, truth in zip(half(queries), full(queries), strict=True):
            assert ours.dtype == mx.float32
            np.testing.assert_allclose(ours, truth, atol=3e-3 * float(mx.abs(truth).max()))


def test_a_float_file_stays_as_it_is():
    layout, tensors = written("quadrature", 16, 64)
    half, full = store.unpack(layout, tensors, half=True), store.unpack(layout, tensors)
    assert all(mx.array_equal(h.parameters["keys"], f.parameters["keys"]) for h, f in zip(half, full, strict=True))
    assert half[0].parameters["keys"].dtype == full[0].parameters["keys"].dtype
