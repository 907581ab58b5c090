"""silu(gate) · x on a Linux CPU, against mlx-lm's own."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

from nectar_mlx.mlxlm import activation, attention_patch
from tests import toys


@pytest.fixture
def arrays():
    """Some that are large, and more of them than are taken at a time."""
    keys = mx.random.split(mx.random.key(0))
    gate, x = (mx.random.normal((2, 300, 257), key=key) for key in keys)
    gate[0, 0, :4] = mx.array([200.0, -200.0, 0.0, -80.0])
    return gate, x


def test_it_is_mlx_lms(arrays, set_device):
    set_device(linux_cpu=True)
    np.testing.assert_allclose(activation.swiglu(*arrays), activation.stock_swiglu(*arrays), rtol=1e-5, atol=1e-6)


def test_so_are_its_gradients(arrays, set_device):
    set_device(linux_cpu=True)
    weights = mx.arange(arrays[0].shape[-1])
    ours, theirs = (
        mx.grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1))(*arrays)
        for f in (activation.swiglu, activation.stock_swiglu)
    )
    for mine, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-3)


def test_it_can_be_compiled_and_takes_other_types(arrays, set_device):
    set_device(linux_cpu=True)
    compiled = mx.compile(activation.swiglu)(*arrays)
    np.testing.assert_allclose(compiled, activation.stock_swiglu(*arrays), rtol=1e-5, atol=1e-6)
    half = [x.astype(mx.bfloat16) for x in arrays]
    assert mx.array_equal(activation.swiglu(*half), activation.stock_swiglu(*half))


def test_models_that_are_routed_use_it():
    attention_patch.route(toys.toy("llama"))
    assert llama.swiglu is activation.swiglu
