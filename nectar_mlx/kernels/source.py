"""Kernel text as MLX takes it: files of metal/, `#ifdef`s resolved, as Metal or turned into CUDA."""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..core.files import write_atomically
from ..core.folders import cache_folder
from ..errors import NectarError

Kernel = Callable[..., list[mx.array]]
# What MLX's own text in front of ours does not include.
_METAL_HEADERS = "#include <metal_simdgroup>\n#include <metal_simdgroup_matrix>\n"


def backend() -> str:
    """What evaluates a decode step here: "metal", "cuda" or "ops". NECTAR_KERNEL overrides it."""
    chosen = os.environ.get("NECTAR_KERNEL", "")
    if chosen:
        if chosen not in ("metal", "cuda", "ops"):
            raise NectarError(f"NECTAR_KERNEL={chosen}: use metal, cuda or ops")
        return chosen
    if mx.default_device() == mx.cpu:
        return "ops"
    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "ops"


def kernel(
    name: str,
    backend: str,
    header: str,
    body: str,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    ensure_row_contiguous: bool = True,
) -> Kernel:
    """What MLX makes of a Metal header and body for a backend, "metal" or "cuda"; the rest as MLX has it."""
    name = f"nectar_{name}_{hashlib.sha256((header + body).encode()).hexdigest()[:12]}"
    make: Any = mx.fast.metal_kernel
    if backend == "cuda":
        make = mx.fast.cuda_kernel
        header, body = to_cuda(header, body)
    else:
        header = _METAL_HEADERS + header
    made: Kernel = make(
        name=name,
        input_names=inputs,
        output_names=outputs,
        header=header,
        source=body,
        ensure_row_contiguous=ensure_row_contiguous,
    )
    return made


def launcher(
    kernel: Kernel,
    grid: tuple[int, int, int],
    output_shapes: list[tuple[int, ...]],
    output_dtypes: list[mx.Dtype],
    threads: int,
) -> Kernel:
    """The kernel with all but its inputs given; the tests put a simulator here. threads: of a threadgroup."""
    threadgroup = (threads, 1, 1)

    def launch(inputs: list[mx.array]) -> list[mx.array]:  # functools.partial costs the host more
        return kernel(
            inputs=inputs,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
        )

    return launch


def _folder() -> Path:
    """metal/: inside the package where it is installed, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "metal"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "metal"


@functools.cache
def read(name: str) -> str:
    """metal/{name}.metal, without what only a reader needs."""
    return _brief(text(f"{name}.metal"))


def text(name: str) -> str:
    """A file of metal/."""
    return (_folder() / name).read_text()


def _brief(text: str) -> str:
    """Without comments and indentation: MLX copies and hashes the text at every call."""
    lines = (line.strip() for line in re.sub(r"//[^\n]*", "", text).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def resolve(text: str, defined: set[str]) -> str:
    """The text with its `#ifdef`s resolved, since MLX copies and hashes it at every call."""
    kept, on = [], [True]
    for line in text.splitlines():
        if line.startswith("#ifdef "):
            on.append(on[-1] and line.split()[1] in defined)
        elif line == "#endif":
            on.pop()
        elif on[-1]:
            kept.append(line)
    return "\n".join(kept) + "\n"


def to_cuda(header: str, body: str) -> tuple[str, str]:
    """Metal text -> CUDA text: arrays of a threadgroup are shared, other address spaces are not written.

    NVRTC reads files, so what MLX copies and hashes at every call are two `#include`s of files in the cache folder.
    """

    def plain(text: str) -> str:
        text = re.sub(r"^threadgroup (\w+ \w+\[)", r"__shared__ \1", text, flags=re.M)
        return re.sub(r"\b(device|constant|threadgroup|thread) ", "", text)

    header, body = (_folder() / "cuda.h").read_text() + plain(header), "KERNEL_ATTRIBUTES\n" + plain(body)
    # MLX looks in the body for the shapes and strides to pass.
    wanted = " ".join(sorted(set(re.findall(r"\w+_(?:shape|strides)\b", body))))
    try:
        return f'#include "{_file(header)}"\n', f'// {wanted}\n#include "{_file(body)}"\n'
    except (OSError, NectarError):  # no folder to write to
        return header, body


def _file(text: str) -> Path:
    path = cache_folder() / "cuda" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.h"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(text.encode()))
    return path
