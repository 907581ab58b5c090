"""CUDA text -> machine code, by the compiler that MLX brings with it.

`mx.fast.cuda_kernel` puts MLX's own headers in front of a kernel, which takes two and a half seconds to compile in
every process. A text that includes nothing is compiled here in a tenth of a second, once a machine.
"""

import ctypes
import functools
import hashlib
from collections.abc import Callable

import mlx.core as mx

from ..core.files import write_atomically
from ..core.folders import cache_folder
from ..errors import NectarError

_LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")


def cubin(text: str) -> bytes:
    """A text's code for this machine's GPU; from the cache folder if it was compiled before."""
    architecture = str(mx.device_info()["architecture"])  # such as sm_90
    digest = hashlib.sha256(f"{architecture} {text}".encode()).hexdigest()[:32]
    try:
        path = cache_folder() / "cuda" / f"{digest}.cubin"
        if path.exists():
            return path.read_bytes()
        made = compiled(text, architecture)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(made))
    except (OSError, NectarError):  # no folder to write to
        made = compiled(text, architecture)
    return made


def compiled(text: str, architecture: str) -> bytes:
    """RuntimeError with the compiler's words where it refuses the text, or where there is no compiler."""
    library = _library()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"nectar.cu", 0, None, None))
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        if library.nvrtcCompileProgram(program, 1, options):
            raise RuntimeError(_text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).decode())
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _library() -> ctypes.CDLL:
    for name in _LIBRARIES:  # MLX has loaded one of them
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"none of {', '.join(_LIBRARIES)} can be loaded")


def _text(size_of: Callable[..., int], get: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC's error {status}")
