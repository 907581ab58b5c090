"""Every text that the library would hand to Metal: `python -m tests.metal.texts FOLDER` writes one file each.

No text is run, so any machine makes them. Decode kernels in every kind, storage and type, head sizes and groupings in
turn; the kernels of sparse attention for every step, head size and type, forwards and backwards.
"""

import itertools
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import nectar_mlx  # noqa: F401  # isort: skip  (it comes before mlx)
import mlx.core as mx

from nectar_mlx import kernels
from nectar_mlx.kernels import source, variants
from nectar_mlx.kernels.packing import DTYPES, Form
from nectar_mlx.sparse import Fixed, Strided, kernel
from tests.kernels.cases import WORK
from tests.metal import harness

K = 2  # KV heads
SHAPES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (3, 2, 2), (7, 1, 3), (16, 8, 9)]  # query heads a KV head, tokens, sequences


def texts() -> dict[str, str]:
    """By name; no two are alike."""
    found: dict[str, str] = {}
    known = set()
    for name, text in itertools.chain(decode_texts(), sparse_texts()):
        alike = re.sub(r"custom_kernel_\w+", "", text)
        if alike not in known:
            found[name if name not in found else f"{name}-{len(found)}"] = text
            known.add(alike)
    return found


def decode_texts() -> Iterator[tuple[str, str]]:
    kinds = ("quadrature", "corrected", "mlp", "deep")
    for i, (kind, storage, element) in enumerate(itertools.product(kinds, (*DTYPES, "int8", "int4"), DTYPES)):
        head_dim, (group, length, batch) = kernels.HEAD_DIMS[i % 5], SHAPES[i % 6]
        form = Form(
            kind=kind,
            work=WORK[kind],
            storage=storage,
            n_kv_heads=K,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            blocks=8,
            backend="metal",
            offset=i % 2 == 0,
        )
        variant = variants.variant_for(form, batch * group * length, group, length, element, padded=i // 6 % 2 == 0)
        live = mx.zeros((batch, K, 80, head_dim), DTYPES[element])
        given = {
            "queries": mx.zeros((batch, K * group, length, head_dim), DTYPES[element]),
            "keys": live,
            "values": live,
            "parameters": mx.zeros(64, mx.uint32),
            "live_tokens": mx.zeros((70, 8), mx.int32),
            "left_padding": mx.zeros(batch, mx.int32),
            "activations": mx.zeros((K, batch * group * length, 8)),
            "partials": mx.zeros(64),
        }
        for stage, out in (("partial", mx.float32), ("merge", DTYPES[element])):
            inputs = [given[name] for name in variants.inputs_of(variant, stage)]
            text = _text(variants.build(variant, stage), inputs, [(64,)], [out])
            yield f"{stage}-{kind}-{storage}-{element}-{head_dim}", text


def sparse_texts() -> Iterator[tuple[str, str]]:
    patterns = (Fixed(16, summary=4), Fixed(16, "interleaved", 0, summary=4, overlap=True), Strided(16))
    for head_dim, dtype, pattern in itertools.product(kernel.HEAD_DIMS, (mx.float16, mx.bfloat16), patterns):
        queries = mx.zeros((1, 2 * K, 40, head_dim), dtype)
        keys = mx.zeros((1, K, 40, head_dim), dtype)
        found: list[str] = []
        with mock.patch.object(source, "launcher", partial(_recorder, found)):
            for launch in kernel.launches_of(pattern, 2 * K, K, head_dim**-0.5, "metal"):
                part = launch.forward(queries, keys, keys)
                launch.backward(queries, keys, keys, queries, part.log_normalizer, part.log_normalizer)
        for text in found:
            stage = re.search(r"nectar_(sparse_\w+?)_[0-9a-f]{12}", text)
            assert stage
            yield f"{stage[1]}-{type(pattern).__name__}-{head_dim}-{str(dtype).split('.')[-1]}", text


def _recorder(found, run, grid, shapes, dtypes, threads):  # type: ignore[no-untyped-def]
    """In the place of `source.launcher`: launches leave their text in `found` and return zeros."""

    def launch(inputs: list[mx.array]) -> list[mx.array]:
        found.append(_text(run, inputs, shapes, dtypes))
        return [mx.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    return launch


def _text(run, inputs: list[mx.array], shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype]) -> str:  # type: ignore[no-untyped-def]
    one = {"grid": (256, 1, 1), "threadgroup": (256, 1, 1)}  # not part of the text
    return harness.capture(run, inputs, output_shapes=shapes, output_dtypes=dtypes, **one)


def main(folder: str) -> None:
    """A file begins as MLX begins every kernel; what it includes lies in the folder `include` of MLX's wheel."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    found = texts()
    for name, text in found.items():
        Path(folder, f"{name}.metal").write_text(f'#include "mlx/backend/metal/kernels/utils.h"\n{text}')
    print(f"{len(found)} texts in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
