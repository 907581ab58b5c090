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
from nectar_mlx.kernels import packing, variants

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


# Every kernel gets the same shapes and strides, four numbers each, whatever it reads of them.
_PASSED = (
    "queries_shape",
    "queries_strides",
    "keys_strides",
    "values_strides",
    "parameters_shape",
    "live_tokens_shape",
)


def source(variant, stage):
    """(the text that MLX's cuda_kernel gets, with shapes and strides as arguments by value; the arrays it takes)."""
    made = {}
    real = mx.fast.cuda_kernel
    mx.fast.cuda_kernel = lambda **options: made.update(options)
    try:
        variants.build.cache_clear()
        variants.build(variant, stage)
    finally:
        mx.fast.cuda_kernel = real
    element = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float"}[variant.element]
    kinds = {"parameters": "unsigned", "arrival_counters": "int"} | dict.fromkeys(
        ("queries", "keys", "values", "output"), element
    )
    names = made["input_names"] + made["output_names"]
    arguments = [f"{'const ' * (n in made['input_names'])}{kinds.get(n, 'float')}* {n}" for n in names]
    arguments += [f"long long {a}_{i}" for a in _PASSED for i in range(4)]
    locals_ = "".join(f"const long long {a}[4] = {{{', '.join(f'{a}_{i}' for i in range(4))}}};\n" for a in _PASSED)
    text = (
        "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"
        + made["header"]
        + f'extern "C" __global__ void kernel({", ".join(arguments)}) {{\n{locals_}{made["source"]}\n}}\n'
    )
    return text, names


def compiled(text):
    return cupy.RawModule(code=text, options=("-std=c++17",), backend="nvrtc").get_function("kernel")


class Layer:
    """One layer's buffers on the device, by the names that the kernels have for them."""

    def __init__(self, packed, shape, live, seed):
        B, H, K, D = shape.batch, shape.n_heads, shape.n_kv_heads, shape.head_dim
        rng = np.random.default_rng(seed)
        slots = packed.form.blocks + K * min(-(-live // kernels.LIVE_SLICE), kernels.MAX_SLICES)
        normal = lambda *s: cupy.array(  # noqa: E731
            np.array(mx.array(rng.standard_normal(s).astype(np.float32)).astype(mx.bfloat16).view(mx.uint16))
        )
        self.arrays = {
            "queries": normal(B, H, 1, D),
            "keys": normal(B, K, live, D),
            "values": normal(B, K, live, D),
            "parameters": cupy.array(np.array(packed.words)),
            "live_tokens": cupy.broadcast_to(cupy.zeros(8, cupy.float32), (live, 8)),
            "arrival_counters": cupy.zeros(K, cupy.int32),
            "partials": cupy.zeros(slots * B * (H // K) * (D + 2), cupy.float32),
            "output": cupy.zeros((B, H, 1, D), cupy.uint16),
        }
        self.numbers = []
        for name in _PASSED:
            of, _, what = name.rpartition("_")
            x = self.arrays[of]
            values = x.shape if what == "shape" else [n // x.itemsize for n in x.strides]
            self.numbers += [np.int64(n) for n in (*values, 0, 0, 0)[:4]]

    def arguments(self, names):
        return (*(self.arrays[n] for n in names), *self.numbers)


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


def measure(shape, nodes, units, storage, live=64, layers=28, blocks=124):
    bank = random_bank(shape, nodes, units)
    bits = {"int8": 8, "int4": 4}.get(storage, 16)
    packed = packing.pack(bank, dtype=mx.bfloat16, bits=bits, blocks=blocks, backend="cuda")
    rows = shape.batch * shape.n_heads // shape.n_kv_heads
    variant = variants.variant_for(packed.form, rows, rows // shape.batch, 1, "bfloat16", False)
    data = [Layer(packed, shape, live, seed) for seed in range(layers)]
    rounds = -(-rows // (variant.tiles * variant.tile))
    slices = min(-(-live // kernels.LIVE_SLICE), kernels.MAX_SLICES)
    grids = {
        "fused": (packed.form.blocks + shape.n_kv_heads * slices, rounds),
        "merge": (-(-rows // (kernels.SIMDGROUPS // variant.shares)), shape.n_kv_heads),
    }
    grids["partial"] = grids["fused"]
    texts = {stage: source(variant, stage) for stage in grids}
    functions = {stage: (compiled(text), names) for stage, (text, names) in texts.items()}

    def launches(*stages):
        def all_layers():
            for layer in data:
                for stage in stages:
                    function, names = functions[stage]
                    function(grids[stage], (32 * kernels.SIMDGROUPS,), layer.arguments(names))

        return all_layers

    read = cupy.RawKernel(_PLAIN_READ, "plain_read")
    sink = cupy.zeros(1, cupy.uint32)

    def plain():
        for layer in data:
            words = layer.arrays["parameters"]
            read((528,), (256,), (words, np.int64(words.size // 4), sink))

    works = {
        "one": launches("fused"),
        "two": launches("partial", "merge"),
        "partial": launches("partial"),
        "read": plain,
    }
    us = {name: graph_us(work) / layers for name, work in works.items()}
    print(
        f"{nodes:5} nodes {units:4} units {storage:8} B={shape.batch} {packed.form.blocks:4} blocks "
        f"{packed.words.nbytes / 1e6:6.2f} MB  "
        + "  ".join(f"{n} {t:6.2f}" for n, t in us.items())
        + f"  us a layer; one / read = {us['one'] / us['read']:.2f}; {functions['fused'][0].num_regs} registers",
        flush=True,
    )


def main():
    shape = SHAPES["qwen3-1.7b"]
    cases = [(n, u, s, b) for n, u in ((660, 64), (1310, 0), (1310, 256)) for s in ("bfloat16", "int8") for b in (1, 4)]
    for nodes, units, storage, batch in [*cases, (1310, 256, "int4", 1)]:
        measure(replace(shape, batch=batch), nodes, units, storage)


if __name__ == "__main__":
    main()
