"""The kernel on an NVIDIA GPU without the host: a model's layers in one CUDA graph, beside a plain read of their bytes.

python tests/metal/graph_bench.py            needs CuPy and MLX for CUDA
"""

import statistics
from dataclasses import replace

import cupy
import numpy as np

import nectar_mlx  # noqa: F401  (before mlx)
from nectar_mlx import kernels
from nectar_mlx.benchmarks.measure import SHAPES, random_bank
from nectar_mlx.kernels import packing

import mlx.core as mx  # isort: skip

_PLAIN_READ = r"""
extern "C" __global__ void plain_read(const uint4* p, long long n, unsigned* sink) {
  unsigned x = 0;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const uint4 v = p[i];
    x ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (x == 0x12345679u) { *sink = x; }
}
"""


def module(variant, stage):
    """The text that MLX's cuda_kernel gets, with shapes and strides as arguments by value."""
    made = {}
    real = mx.fast.cuda_kernel
    mx.fast.cuda_kernel = lambda **options: made.update(options)
    try:
        kernels._build.cache_clear()
        kernels._build(variant, stage)
    finally:
        mx.fast.cuda_kernel = real
    element = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float"}[variant.element]
    kinds = {"queries": element, "keys": element, "values": element, "parameters": "unsigned", "tickets": "int"}
    arguments = [f"const {kinds.get(n, 'float')}* {n}" for n in made["input_names"]]
    arguments += [f"{'float' if n == 'partials' else element}* {n}" for n in made["output_names"]]
    arrays = ["queries_shape", "queries_strides", "keys_shape", "keys_strides", "values_strides", "parameters_shape"]
    arguments += [f"long long {a}_{i}" for a in arrays for i in range(4)]
    locals_ = "".join(f"const long long {a}[4] = {{{', '.join(f'{a}_{i}' for i in range(4))}}};\n" for a in arrays)
    source = (
        "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"
        + made["header"]
        + f'extern "C" __global__ void kernel({", ".join(arguments)}) {{\n{locals_}{made["source"]}\n}}\n'
    )
    return cupy.RawModule(code=source, options=("-std=c++17",), backend="nvrtc").get_function("kernel")


class Layer:
    """One layer's buffers on the device."""

    def __init__(self, packed, shape, element, live):
        B, H, K, T, D = shape.batch, shape.n_heads, shape.n_kv_heads, 1, shape.head_dim
        rng = np.random.default_rng(0)
        normal = lambda *s: cupy.array(  # noqa: E731
            np.array(mx.array(rng.standard_normal(s).astype(np.float32)).astype(element).view(mx.uint16))
        )
        self.words = cupy.array(np.array(packed.words))
        self.queries, self.keys, self.values = normal(B, H, T, D), normal(B, K, live, D), normal(B, K, live, D)
        slices = min(-(-live // kernels.LIVE_SLICE), kernels.MAX_SLICES)
        self.rows = B * (H // K) * T
        self.partials = cupy.zeros((packed.form.blocks + K * slices) * self.rows * (D + 2), cupy.float32)
        self.output = cupy.zeros((B, H, T, D), cupy.uint16)
        self.tickets = cupy.zeros(K, cupy.int32)
        self.blocks = packed.form.blocks + B * K * slices
        q, k = (B, H, T, D), (B, K, live, D)
        steps = lambda s: [int(np.prod(s[i + 1 :])) for i in range(4)]  # noqa: E731
        self.shapes = [np.int64(n) for n in (*q, *steps(q), *k, *steps(k), *steps(k), self.words.size, 0, 0, 0)]


def graph_us(calls, repeats=30):
    """Median time of all calls in one graph, in microseconds."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        calls()
        stream.synchronize()
        stream.begin_capture()
        calls()
        graph = stream.end_capture()
        times = []
        for _ in range(repeats):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) * 1000)
    return statistics.median(times)


def measure(shape, nodes, units, storage, live=64, layers=28, blocks=124, parts=True):
    bank = random_bank(shape, nodes, units)
    bits = {"int8": 8, "int4": 4}.get(storage, 16)
    packed = packing.pack(bank, dtype=mx.bfloat16, bits=bits, blocks=blocks, backend="cuda")
    rows = shape.batch * shape.n_heads // shape.n_kv_heads
    variant = kernels.variant_for(packed.form, rows, rows // shape.batch, 1, "bfloat16", False)
    data = [Layer(packed, shape, mx.bfloat16, live) for _ in range(layers)]
    threads = 32 * kernels.SIMDGROUPS
    rounds = -(-rows // (variant.tiles * variant.tile))
    fused = module(variant, "fused")
    if parts:
        partial, merge = module(variant, "partial"), module(variant, "merge")

    def one():
        for x in data:
            inputs = (x.queries, x.keys, x.values, x.words, x.tickets, x.partials, x.output)
            fused((x.blocks, rounds), (threads,), (*inputs, *x.shapes))

    def first():
        for x in data:
            partial((x.blocks, rounds), (threads,), (x.queries, x.keys, x.values, x.words, x.partials, *x.shapes))

    def two():
        for x in data:
            partial((x.blocks, rounds), (threads,), (x.queries, x.keys, x.values, x.words, x.partials, *x.shapes))
            grid = (-(-x.rows // (kernels.SIMDGROUPS // variant.shares)), shape.n_kv_heads)
            merge(grid, (threads,), (x.queries, x.keys, x.words, x.partials, x.output, *x.shapes))

    read = cupy.RawKernel(_PLAIN_READ, "plain_read")
    sink = cupy.zeros(1, cupy.uint32)

    def plain():
        for x in data:
            read((528,), (256,), (x.words, np.int64(x.words.size // 4), sink))

    works = {"one": one, "read": plain} | ({"two": two, "partial": first} if parts else {})
    us = {name: graph_us(work) / layers for name, work in works.items()}
    print(
        f"{nodes:5} nodes {units:4} units {storage:8} B={shape.batch} {packed.form.blocks:4} blocks "
        f"{packed.words.nbytes / 1e6:6.2f} MB  "
        + "  ".join(f"{n} {t:6.2f}" for n, t in us.items())
        + f"  us a layer; one / read = {us['one'] / us['read']:.2f}; {fused.num_regs} registers",
        flush=True,
    )


def main():
    shape = SHAPES["qwen3-1.7b"]
    cases = [(n, u, s, b) for n, u in ((660, 64), (1310, 0), (1310, 256)) for s in ("bfloat16", "int8") for b in (1, 4)]
    for nodes, units, storage, batch in [*cases, (1310, 256, "int4", 1)]:
        measure(replace(shape, batch=batch), nodes, units, storage)


if __name__ == "__main__":
    main()
