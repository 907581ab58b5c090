"""Runs the Metal kernels on a CPU.

`Simulator.launcher` takes the place of `source.launcher`: it has MLX generate the very text that it would hand to
Metal (recorded through `mx.export_function`, which needs no Metal), compiles that with vocabulary.h for the CPU, runs
it with every thread as a fiber (simulator.cpp) and returns its outputs. Buffers have exactly their size, gaps between
strided rows hold NaN.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.metal import front_end

HERE = Path(__file__).parent
BUILDS = Path(tempfile.gettempdir()) / f"nectar-mlx-kernels-{os.getuid()}"
SCHEDULES = {"forward": 0, "reverse": 1, "random": 2}
_SANITIZERS = {
    "plain": ([], []),
    "asan": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"], ["-DWITH_ASAN"]),
    "tsan": (["-fsanitize=thread"], ["-DWITH_TSAN"]),
}
_STRICT = [
    *("-Wall", "-Wextra", "-Werror", "-Wdouble-promotion", "-Wimplicit-float-conversion", "-Wvla"),
    *("-Wno-unknown-attributes", "-Wno-unused", "-Wno-sign-compare", "-Wno-unused-parameter", "-Wno-pass-failed"),
]


class KernelError(Exception):
    """The kernel broke a rule: what the sanitizer, the simulator or the compiler said."""


@cache
def compiler() -> list[str] | None:
    """A C++ compiler: clang, else the one in PyPI's ziglang."""
    names = ["clang++", *(f"clang++-{v}" for v in range(24, 16, -1))]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found and os.environ.get("NECTAR_TEST_COMPILER") != "zig":
        return [found]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


@cache
def modes() -> tuple[str, ...]:
    """The builds that this machine can make and run."""
    if compiler() is None:
        return ()
    if "ziglang" in compiler():  # it takes the flags and has no sanitizer
        return ("plain",)
    return tuple(mode for mode in _SANITIZERS if mode == "plain" or _works(mode))


def default_mode() -> str | None:
    """The build that finds most at a bearable cost; None without a compiler."""
    return next((mode for mode in ("asan", "plain") if mode in modes()), None)


def _works(mode: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "a.cpp"), Path(folder, "a")
        source.write_text("int main() { return 0; }")
        try:
            _run([*compiler(), *_SANITIZERS[mode][0], str(source), "-o", str(program)])
            _run([str(program)])
        except KernelError:
            return False
    return True


def _run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    if done.returncode:
        telling = r"SIMULATOR|ERROR: AddressSanitizer|runtime error|WARNING: ThreadSanitizer|error:|warning:"
        lines = [line for line in done.stderr.splitlines() if re.search(telling, line)]
        raise KernelError("\n".join(lines[:6]) or f"exit code {done.returncode}: {done.stderr[-500:]}")
    return done.stderr


def capture(kernel: Callable, inputs: list[mx.array], **call: object) -> str:
    """The Metal source that MLX makes of a call. Nothing is run."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(out.fileno(), 1)
        try:
            traced = lambda *arrays: kernel(inputs=list(arrays), verbose=True, **call)  # noqa: E731
            mx.export_function(os.path.join(folder, "call.mlxfn"), traced, *inputs)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        out.seek(0)
        return re.search(r"```\n(.*?)\n```", out.read().decode(), re.S)[1] + "\n"


@dataclass(frozen=True)
class Signature:
    name: str
    buffers: list[tuple[str, str, bool]]  # name, C++ type, whether a reference
    attributes: list[str]


def parse(text: str) -> Signature:
    name, arguments = re.search(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{\n", text, re.S).groups()
    buffers, attributes = [], []
    for argument in arguments.split(",\n"):
        declared, attribute = re.match(r"\s*(.+?) \[\[(\w+)", argument).groups()
        if attribute != "buffer":
            attributes.append(attribute)
            continue
        kind, reference, buffer = re.match(r"(?:const )?(?:device|constant) (\w+)([*&]) (\w+)", declared).groups()
        buffers.append((buffer, kind, reference == "&"))
    return Signature(name, buffers, attributes)


_ATTRIBUTES = {
    "threadgroup_position_in_grid": "uint3(at.threadgroup[0], at.threadgroup[1], at.threadgroup[2])",
    "threadgroups_per_grid": "uint3(at.threadgroups[0], at.threadgroups[1], at.threadgroups[2])",
    "thread_index_in_threadgroup": "at.thread",
    "thread_index_in_simdgroup": "at.lane",
    "simdgroup_index_in_threadgroup": "at.simdgroup",
}


def rewrite_arrays(text: str) -> str:
    """Without Metal's headers, and the one construct that C++ cannot express by macros: a threadgroup array."""
    text = re.sub(r"^#include <metal_\w+>$", "", text, flags=re.M)
    return re.sub(r"^\s*threadgroup ([\w<>:]+) (\w+)\[(.+?)\];", r"THREADGROUP_ARRAY(\1, \2, \3);", text, flags=re.M)


def translation_unit(text: str) -> str:
    signature = parse(text)
    text = text.replace("#pragma unroll", "")  # says nothing about the result, and compiling takes three times as long
    arguments = [f"{'*' * ref}({kind}*)buffers[{i}]" for i, (_, kind, ref) in enumerate(signature.buffers)]
    arguments += [_ATTRIBUTES[a] for a in signature.attributes]
    return (
        '#include "vocabulary.h"\n#line 1 "generated.metal"\n'
        + rewrite_arrays(text)
        + "\n".join(f"#undef {word}" for word in ("device", "constant", "thread", "threadgroup"))
        + "\n"
        'extern "C" void kernel_entry(void** buffers, const simulator::Position& at) {\n'
        f"  {signature.name}({', '.join(arguments)});\n}}\n"
    )


def _made_once(parts: list[str], make: Callable[[Path, Path], None]) -> Path:
    """The file of a build, named by what it is made from. make(folder to work in, file to write)."""
    made = BUILDS / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    if not made.exists():
        BUILDS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILDS) as folder:
            make(Path(folder), Path(folder, "made"))
            Path(folder, "made").replace(made)  # whole, whoever else makes it meanwhile
    return made


def _base() -> list[str]:
    return [*compiler(), "-std=c++17", f"-I{HERE}"]


def _simulator(mode: str) -> Path:
    """The program that runs a kernel's library, the same for all kernels of a build."""
    flags, defines = _SANITIZERS[mode]
    texts = [(HERE / name).read_text() for name in ("simulator.h", "simulator.cpp")]
    compiled, linked = [*_base(), "-O2", *defines], [*_base(), *flags, "-rdynamic"]

    def make(folder: Path, out: Path) -> None:
        part = str(folder / "simulator.o")
        _run([*compiled, "-c", str(HERE / "simulator.cpp"), "-o", part])
        _run([*linked, part, "-o", str(out)])

    return _made_once([*texts, *compiled, *linked], make)


def build(unit: str, mode: str, warnings: list[str] = _STRICT) -> tuple[Path, Path]:
    """C++ that defines kernel_entry -> a program, and a library of it that the program runs; both are made once."""
    texts = [unit, *((HERE / name).read_text() for name in ("simulator.h", "vocabulary.h"))]
    exact = ["-O0", "-g1", "-ffp-contract=off"]  # compiles five times faster than -O1 under a sanitizer
    library = ["-shared", "-fPIC", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    command = [*_base(), *exact, *_SANITIZERS[mode][0], *warnings, *library]

    def make(folder: Path, out: Path) -> None:
        source = folder / "kernel.cpp"
        source.write_text(unit)
        _run([*command, str(source), "-o", str(out)])

    return _simulator(mode), _made_once([*texts, *command], make)


def strided_bytes(x: mx.array) -> tuple[bytes, list[int]]:
    """An array's memory from its first to its last element, NaN where it has gaps, and its strides in elements."""
    mx.eval(x)
    a = np.array(x.view(_UNSIGNED[x.itemsize]), copy=False)
    extent = sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)) + a.itemsize
    memory = np.full(extent, 0xFF, np.uint8)
    np.lib.stride_tricks.as_strided(memory[: a.itemsize].view(a.dtype), a.shape, a.strides)[...] = a
    return memory.tobytes(), [s // a.itemsize for s in a.strides]


_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


def run_job(
    program: tuple[Path, Path],
    buffers: list[tuple[int, bytes | int]],
    grid: tuple[int, ...],
    threadgroup: tuple[int, ...],
    schedule: str = "forward",
) -> list[bytes]:
    """program: of `build`. buffers: (role, bytes, or an output's size), roles as simulator.cpp has them.

    Returns what was written.
    """
    job = struct.pack("<8i", *grid, *threadgroup, SCHEDULES[schedule], len(buffers))
    for role, data in buffers:
        size = data if isinstance(data, int) else len(data)
        job += struct.pack("<qi", size, role) + (b"" if isinstance(data, int) else data)
    sanitizers = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",  # one thread runs all fibers
    }
    with tempfile.TemporaryDirectory() as folder:
        jobs, results = Path(folder, "jobs"), Path(folder, "results")
        jobs.write_bytes(job)
        _run([*map(str, program), str(jobs), str(results)], env={**os.environ, **sanitizers})
        data = results.read_bytes()
    written = []
    for role, content in buffers:
        if role:
            size = content if isinstance(content, int) else len(content)
            written.append(data[:size])
            data = data[size:]
    assert not data
    return written


@dataclass
class Simulator:
    """Stands in for the GPU. edit: changes the text first, to plant bugs. texts collects what was run."""

    mode: str = "asan"
    schedule: str = "forward"
    edit: Callable[[str], str] = lambda text: text

    def __post_init__(self) -> None:
        self.texts: list[str] = []

    def launcher(self, kernel, *call):  # type: ignore[no-untyped-def]
        return lambda *, inputs: self.launch(kernel, inputs, *call)

    def launch(self, kernel, inputs, grid, output_shapes, output_dtypes, threads):  # type: ignore[no-untyped-def]
        call = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
        text = capture(kernel, inputs, grid=grid, threadgroup=(threads, 1, 1), **call)
        self.texts.append(text)
        text = self.edit(text)
        signature = parse(text)
        named = iter(inputs)
        outputs = iter(zip(output_shapes, output_dtypes, strict=True))
        strides: list[int] = []
        x = None
        buffers: list[tuple[int, bytes | int]] = []
        names = {name for name, _, _ in signature.buffers}
        for name, _, _ in signature.buffers:
            if name.endswith("_shape"):
                buffers.append((0, np.array(x.shape, np.int32).tobytes()))
            elif name.endswith("_strides"):
                buffers.append((0, np.array(strides, np.int64).tobytes()))
            elif (x := next(named, None)) is not None:
                # A kernel that is not told strides asks MLX for rows that lie side by side.
                data, strides = strided_bytes(x if f"{name}_strides" in names else mx.contiguous(x))
                buffers.append((2 if name == "arrival_counters" else 0, data))
            else:
                shape, dtype = next(outputs)
                buffers.append((1, int(np.prod(shape)) * dtype.size))
        written = run_job(build(translation_unit(text), self.mode), buffers, grid, (threads, 1, 1), self.schedule)
        if any(role == 2 for role, _ in buffers):
            assert not any(written.pop(0)), "the counters were not left at zero"
        return [
            mx.array(np.frombuffer(data, _NUMPY[dtype.size])).view(dtype).reshape(shape)
            for data, shape, dtype in zip(written, output_shapes, output_dtypes, strict=True)
        ]


_NUMPY = {2: np.uint16, 4: np.uint32}


def check_address_spaces(text: str) -> None:
    """Type-checks the text with Metal's address spaces as clang's, in the C++ that Metal has. Raises KernelError."""
    if found := front_end.pointers(text):
        raise KernelError(found[0])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cpp")
        source.write_text('#include "check.h"\n#line 1 "generated.metal"\n' + rewrite_arrays(text))
        strict = [*_STRICT, "-Wshadow", "-Wfloat-conversion", "-Wno-null-dereference"]
        _run([*compiler(), "-std=c++14", "-fsyntax-only", *strict, f"-I{HERE}", str(source)])
