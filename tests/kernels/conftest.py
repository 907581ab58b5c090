"""The simulated GPU that the tests of the decode kernel run on."""

import mlx.core as mx
import pytest

from nectar_mlx.kernels import decode, source, variants
from tests.metal import harness
from tests.metal.harness import Simulator


@pytest.fixture
def simulate(monkeypatch):
    """simulate(...) -> the Simulator that runs every launch from here on. checked: kernels are tried before their use.

    What CUDA would be given is generated as Metal too: the same text, address spaces not yet taken out.
    """
    works = decode.works
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    monkeypatch.setattr(mx.fast, "cuda_kernel", mx.fast.metal_kernel)
    monkeypatch.setattr(source, "to_cuda", lambda header, body: (header, body))

    def start(*, checked=False, **options):
        monkeypatch.setattr(decode, "works", works if checked else lambda *_, **__: True)
        works.cache_clear()
        simulator = Simulator(**{"mode": harness.default_mode(), **options})
        monkeypatch.setattr(source, "launcher", simulator.launcher)
        variants.build.cache_clear()
        return simulator

    return start
