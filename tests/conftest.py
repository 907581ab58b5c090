"""What the tests share. The library comes first: it loads an optimised BLAS, which must precede mlx.core."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

import nectar_mlx  # noqa: F401
from nectar_mlx.core.device import device, using


@pytest.fixture
def set_device() -> Iterator[Callable[..., None]]:
    """Changes numbers of the device's profile for the rest of the test."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(using(replace(device(), **changes)))
