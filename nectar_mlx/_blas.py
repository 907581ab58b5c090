"""An optimised BLAS for MLX's Linux CPU build.

The CPU wheel of MLX carries the reference BLAS, about 30 times slower than an optimised one. Its BLAS symbols are
resolved through the dynamic linker's global scope, so a library that is loaded there before `mlx.core` takes their place.
"""

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def use_fast_blas() -> str | None:
    """Load an optimised BLAS for MLX's CPU build and return its path, or None where there is nothing to do.

    Must run before `mlx.core` is imported. The environment variable NECTAR_BLAS names a library to use, or is "off".
    """
    choice = os.environ.get("NECTAR_BLAS", "")
    if sys.platform != "linux" or choice == "off" or "mlx.core" in sys.modules or not _is_cpu_build():
        return None
    for library in [choice] if choice else _candidates():
        try:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    return None


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.distribution("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _candidates() -> Iterator[str]:
    lib = Path(sys.prefix) / "lib"
    yield from (str(path) for path in sorted(lib.glob("libmkl_rt.so*")))
    yield from ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so", "libmkl_rt.so.2")
