"""An optimised BLAS for MLX's Linux CPU build.

The CPU wheel of MLX carries the reference BLAS, which is tens of times slower than an optimised one. Its BLAS symbols
are looked up in the dynamic linker's global scope first, so a library that is loaded there before `mlx.core` takes its
place. PyPI's `scipy-openblas32` is a current OpenBLAS for x86-64 and aarch64 whose symbols all begin with `scipy_`; a
copy without that prefix is kept in the cache folder.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nectar_mlx.core.files import cache_folder, written_at_once

loaded: str | None = None
"""The library that `use_fast_blas` put in place."""

_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112


def use_fast_blas() -> str | None:
    """Put an optimised BLAS in place of MLX's own and return its path, or None where there is none to replace.

    Does nothing outside Linux, beside MLX's CUDA build, or where the environment variable NECTAR_BLAS is "off"; it may
    also be the path of the library to load. Warns where `mlx.core` has been imported already, which is too late.
    """
    global loaded
    choice = os.environ.get("NECTAR_BLAS", "")
    if sys.platform != "linux" or choice == "off" or not is_installed("mlx-cpu"):
        return None
    if "mlx.core" in sys.modules:
        warnings.warn("import nectar_mlx before mlx: MLX now computes with its slow reference BLAS", stacklevel=3)
        return None
    for library in [choice] if choice else candidates():
        if works(library):
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
            loaded = library
            return library
    if choice:
        warnings.warn(f"NECTAR_BLAS={choice} cannot be loaded, or computes wrong results", stacklevel=3)
    return None


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def candidates() -> Iterator[str]:
    if packaged := unprefixed_openblas():
        yield packaged
    yield from (str(path) for path in (Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))
    yield from ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so")


def unprefixed_openblas() -> str | None:
    """The path of a copy of scipy-openblas32's library with plain symbols, or None without that package."""
    package = importlib.util.find_spec("scipy_openblas32")
    if not package or not package.origin:
        return None
    version = importlib.metadata.version("scipy-openblas32")
    folder = cache_folder() / f"openblas-{version}-{os.uname().machine}"
    copy = folder / "libopenblas.so"
    if not copy.exists():
        try:
            import lief

            library = lief.ELF.parse(str(next(Path(package.origin).parent.glob("lib/libscipy_openblas*.so"))))
            if library is None:
                return None
            for symbol in library.dynamic_symbols:
                symbol.name = str(symbol.name).removeprefix("scipy_")
            with written_at_once(folder) as scratch:
                library.write(str(scratch / copy.name))
        except (ImportError, OSError, StopIteration):
            return None
    return str(copy)


def works(library: str) -> bool:
    """Whether the library loads and multiplies small integers exactly: old builds compute wrong on new processors."""
    try:
        sgemm = ctypes.CDLL(library).cblas_sgemm
    except (OSError, AttributeError):
        return False
    sgemm.restype = None
    m, n, k = 67, 131, 129
    left = np.random.default_rng(0).integers(-4, 5, (m, k)).astype(np.float32)
    right = np.random.default_rng(0).integers(-4, 5, (k, n)).astype(np.float32)
    for transposed in (False, True):
        b, order, stride = (right.T.copy(), _TRANSPOSE, k) if transposed else (right, _NO_TRANSPOSE, n)
        out = np.full((m, n), np.nan, np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (left, b, out)]
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        shape = [ctypes.c_int(size) for size in (m, n, k)]
        sgemm(_ROW_MAJOR, _NO_TRANSPOSE, order, *shape, one, pointers[0], k, pointers[1], stride, zero, pointers[2], n)
        if not np.array_equal(out, left @ right):
            return False
    return True
