"""What the tests share. The library comes first: it loads an optimised BLAS, which must precede mlx.core."""

import os
import signal

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that build kernels or fit models, so that the edit loop can leave them out."""
    for item in items:
        part = item.path.relative_to(HERE).parts[0]
        for marker, parts in AREAS.items():
            if part in parts:
                item.add_marker(marker)
