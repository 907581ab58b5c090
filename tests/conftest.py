"""What the tests share. The library comes first: it loads an optimised BLAS, which must precede mlx.core."""

import os
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process that tests start compiles all that it imports
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a script, as nohup does
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

import nectar_mlx  # noqa: F401
from nectar_mlx.core.device import device, using

sys.dont_write_bytecode = False  # where PYTHONDONTWRITEBYTECODE was set: else every run compiles all tests


@pytest.fixture
def set_device() -> Iterator[Callable[..., None]]:
    """Changes numbers of the device's profile for the rest of the test."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(using(replace(device(), **changes)))


HERE = Path(__file__).parent
# What a marker stands for, by folder or module; `process` and `slow` are given where they are needed.
AREAS = {
    "kernel": ("kernels", "metal", "sparse"),
    "fit": ("baselines", "fitting", "test_bench.py", "test_demo.py", "test_evaluate.py", "serving"),
}
# Begun first, so that no process is left with one of them at the end; the longest of them takes a minute.
LONG = [
    *("kernels/test_kernels.py", "fitting/test_chunks.py", "fitting/test_killed.py", "fitting/test_update.py"),
    *("fitting/test_fit.py", "fitting/test_numbers.py", "sparse/test_kernel.py", "mlxlm/test_families.py"),
    *("mlxlm/test_cache.py", "models/test_hub.py", "fitting/test_families.py", "fitting/test_recording.py"),
    *("fitting/test_auto_budget.py", "test_macos.py", "serving/test_answers.py", "fitting/test_distillation.py"),
    *("mlxlm/test_attention_patch.py", "fitting/test_layerwise.py", "fitting/test_estimate.py", "test_bench.py"),
    *("test_evaluate.py", "test_privacy.py", "kernels/test_checking.py", "fitting/test_retrieval_fit.py"),
    *("test_demo.py", "serving/test_page.py", "serving/test_lifecycle.py", "library/test_changed.py"),
    *("sparse/test_sparse_bytes.py", "fitting/test_kinds.py", "fitting/test_others.py", "library/test_kill.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that build kernels or fit models, so that the edit loop can leave them out. LONG comes first."""
    places = {HERE / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
    for item in items:
        part = item.path.relative_to(HERE).parts[0]
        for marker, parts in AREAS.items():
            if part in parts:
                item.add_marker(marker)
