"""An optimised BLAS for MLX's Linux CPU build.

The CPU wheel of MLX carries the reference BLAS, which is tens of times slower than an optimised one. Its BLAS symbols
are looked up in the dynamic linker's global scope first, so a library that is loaded there before `mlx.core` takes its
place. PyPI's `scipy-openblas32` is a current OpenBLAS for x86-64 and aarch64 whose symbols all begin with `scipy_`; a
copy without that prefix is kept in the cache folder.

Its threads wait for each other by spinning, so one that shares its core with another program holds up all of them:
they get the cores that are idle when MLX is imported.
"""

import atexit
import ctypes
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from nectar_mlx.core.files import written_at_once
from nectar_mlx.core.folders import cache_folder

loaded: str | None = None
"""The library that `use_fast_blas` put in place."""

threads: int | None = None
"""How many threads it was given; None where that was left to the library."""

_THREADS_CHOSEN = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112


def use_fast_blas() -> str | None:
    """Put an optimised BLAS in place of MLX's own and return its path, or None where there is none to replace.

    Does nothing outside Linux, beside MLX's CUDA build, or where the environment variable NECTAR_BLAS is "off"; it may
    also be the path of the library to load. Warns where `mlx.core` has been imported already, which is too late.
    """
    global loaded, threads
    choice = os.environ.get("NECTAR_BLAS", "")
    if sys.platform != "linux" or choice == "off" or not is_installed("mlx-cpu"):
        return None
    if "mlx.core" in sys.modules:
        warnings.warn("import nectar_mlx before mlx: MLX now computes with its slow reference BLAS", stacklevel=5)
        return None
    for library in [choice] if choice else candidates():
        if works(library):
            threads = _set_threads(ctypes.CDLL(library, ctypes.RTLD_GLOBAL))
            loaded = library
            return library
    if choice:
        warnings.warn(f"NECTAR_BLAS={choice} cannot be loaded, or computes wrong results", stacklevel=4)
    return None


def idle_cores() -> int:
    """Cores that this process may use and that no other one is using, at least 1."""
    running = []
    for _ in range(5):  # the number changes with every process that wakes up for a moment
        running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1)  # without this process
        time.sleep(0.002)
    idle = (os.cpu_count() or 1) - sorted(running)[len(running) // 2]
    return max(1, min(len(os.sched_getaffinity(0)), idle))


def _set_threads(library: ctypes.CDLL) -> int | None:
    """Gives OpenBLAS the idle cores; None where the user has chosen, or another library is in use."""
    if any(name in os.environ for name in _THREADS_CHOSEN) or not hasattr(library, "openblas_set_num_threads"):
        return None
    try:
        count = idle_cores()
    except (OSError, ValueError, IndexError):
        return None
    library.openblas_set_num_threads(count)
    return count


def is_installed(distribution: str) -> bool:
    from importlib import metadata

    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def candidates() -> Iterator[str]:
    if packaged := unprefixed_openblas():
        yield packaged
    yield from (str(path) for path in (Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))
    yield from ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so")


def unprefixed_openblas() -> str | None:
    """The path of a copy of scipy-openblas32's library with plain symbols, or None without that package.

    Where the cache folder cannot take it (read-only, a full disk), the copy is in a temporary folder, for this process
    alone; None where that cannot take it either.
    """
    from importlib import metadata, util

    package = util.find_spec("scipy_openblas32")
    if not package or not package.origin:
        return None
    version = metadata.version("scipy-openblas32")
    folder = cache_folder() / f"openblas-{version}-{os.uname().machine}"
    copy = folder / "libopenblas.so"
    if copy.exists():
        return str(copy)
    try:
        library = _without_prefix(next(Path(package.origin).parent.glob("lib/libscipy_openblas*.so")))
    except (ImportError, StopIteration):
        return None
    try:
        with written_at_once(folder) as scratch:
            (scratch / copy.name).write_bytes(library)
        return str(copy)
    except OSError:
        return _temporary(library, copy.name)


def _without_prefix(library: Path) -> bytes:
    """A library whose symbols have lost their prefix. As bytes: lief writes files that a full disk cuts short, and says
    nothing."""
    import lief

    parsed = lief.ELF.parse(str(library))
    if parsed is None:
        raise ImportError(f"{library} is not a library")
    for symbol in parsed.dynamic_symbols:
        symbol.name = str(symbol.name).removeprefix("scipy_")
    return bytes(parsed.write_to_bytes())


def _temporary(library: bytes, name: str) -> str | None:
    """A file of the bytes that goes when this process ends; None where there is no room for it."""
    try:
        folder = tempfile.mkdtemp(prefix="nectar-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / name
        path.write_bytes(library)
    except OSError:
        return None
    return str(path)


def works(library: str) -> bool:
    """Whether the library loads and multiplies small integers exactly: old builds compute wrong on new processors."""
    import numpy as np

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
