"""A small layer on which a decode kernel is compared with plain operations before its first use.

Whatever a kernel leaves out must show in the result. So the context and the live tokens have about the same mass, and
the tokens beside a limit (the first and the last that a query sees or a threadgroup reads, and those just outside) have
larger scores than others.
"""

import math
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..core import attention
from ..core.quantize import Quantized, Stored, dequantize, quantize
from ..core.types import AnyArray, DoubleArray, IntArray
from ..heads import KINDS, Bank, HeadArrays
from .packing import DTYPES, Packed, pack
from .variants import LIVE_SLICE, Variant

NODES, UNITS = 40, 24  # of a head, about: every head has a few more or less
LIVE, BEHIND = LIVE_SLICE + 6, 5  # tokens: two slices of them; and what the buffers hold behind them
COUNTS = (LIVE, LIVE_SLICE, 3 * LIVE_SLICE + 9)  # of live tokens that are tried: a whole slice, and several uneven ones
# Largest error / largest number. Far below what leaving out one token does, four times what rounding the output does.
TOLERANCE = {"float32": 2e-5, "float16": 1.5e-3, "bfloat16": 1e-2}
_MATMUL_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # where hidden layers are stock matmuls, by storage
_HALF_MATMUL_TOLERANCE = 4e-3  # with other storages, whose matmuls are in float16
_SPREAD, _RAISED = 1.5, 4.0  # standard deviation of scores; mean score of the tokens beside a limit
_RAISED_MASS = 0.7  # what raised tokens add to the live tokens' log-normaliser, about
_DEEP_LAYERS = 2  # hidden layers of a network that has more than one
# Of a variant with an offset: scale * q·c of every query. It comes from one column in _APART, where no keys differ, so
# that rounding what they have in common leaves alone what they have not.
COMMON_SCORE, _APART = 20_000.0, 8
_OF_QUERIES = ("w_in", "w_gate", "w_up", "skip")  # whose rows are multiplied by a query


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """A decode step, of shapes as in `DecodeKernel.attend`, S = live + BEHIND. `bank` holds the values that `packed`
    keeps."""

    packed: Packed
    bank: Bank
    queries: mx.array
    keys: mx.array
    values: mx.array
    left_padding: mx.array | None
    live: int
    tolerance: float

    def reference(self) -> mx.array:
        """What the kernel should return, by plain operations in float32."""
        live = [x[:, :, : self.live] for x in (self.keys, self.values)]
        return reference(self.bank, self.queries, *live, left_padding=self.left_padding)

    def mismatch(self, result: mx.array) -> str | None:
        """What is wrong with a kernel's result; None where nothing is."""
        error = relative_error(result, self.reference())
        return None if error <= self.tolerance else difference(error, self.tolerance)


def probe(variant: Variant, *, one_launch: bool, live: int = LIVE) -> Probe:
    """The layer and the decode step for which `variant` is the kernel's text, with as many query rows as it holds, and
    so many live tokens."""
    rng = np.random.default_rng(0)
    unit = math.sqrt(
        _SPREAD / (variant.scale * math.sqrt(variant.head_dim))
    )  # of queries, keys: scores are what they are
    queries, keys, values, padding = _live(variant, live, rng)
    bank = _bank(variant, live, unit, rng)
    if variant.offset:
        level = math.sqrt(COMMON_SCORE * _APART / _SPREAD) / variant.head_dim**0.25
        offset = rng.standard_normal((variant.n_kv_heads, variant.head_dim))
        queries[..., ::_APART], keys[..., ::_APART], offset[:, ::_APART] = level, 0.0, level
        bank.offset = _rounded(unit * offset, variant.element).astype(mx.float32)
        keys += np.array(bank.offset)[:, None] / unit
    dtype, bits = (mx.float16, int(variant.storage[3:])) if variant.quantised else (DTYPES[variant.storage], 16)
    bank, heads = stored(bank, dtype, bits)
    packed = pack(
        bank,
        dtype=dtype,
        bits=bits,
        heads=heads,
        blocks=3 * variant.n_kv_heads,
        backend=variant.backend,
        one_launch=one_launch,
    )
    hidden = _MATMUL_TOLERANCE.get(variant.storage, _HALF_MATMUL_TOLERANCE) if variant.given_activations else 0.0
    return Probe(
        packed=replace(packed, form=replace(packed.form, flight=variant.flight, tile=variant.tile)),
        bank=bank,
        queries=_rounded(unit * queries, variant.element).swapaxes(1, 2),
        keys=_rounded(unit * keys, variant.element),
        values=_rounded(values, variant.element),
        left_padding=mx.array(padding, mx.int32) if variant.padded else None,
        live=live,
        tolerance=max(TOLERANCE[variant.element], hidden),
    )


def _live(
    variant: Variant, live: int, rng: np.random.Generator
) -> tuple[DoubleArray, DoubleArray, DoubleArray, IntArray]:
    """Queries [B, T, H, D], keys and values [B, K, S, D], and left padding [B]."""
    K, D, T = variant.n_kv_heads, variant.head_dim, variant.length
    B = max(1, variant.tile * variant.tiles // (variant.group * T)) + variant.full
    # What every query has in common, and the keys of raised tokens have too; so their scores are nearly alike.
    common = rng.standard_normal(D)
    common *= math.sqrt(_RAISED / _SPREAD * math.sqrt(D)) / np.linalg.norm(common)
    queries = rng.standard_normal((B, T, K * variant.group, D))
    queries += (1.0 - (queries @ common) / (common @ common))[..., None] * common
    keys, values = rng.standard_normal((2, B, K, live + BEHIND, D))
    padding = (3 + 2 * np.arange(B, dtype=np.int32)) % 8 if variant.padded else np.zeros(B, np.int32)
    at, in_slice = np.arange(live + BEHIND), -(-live // -(-live // LIVE_SLICE))
    beside_seam = (at % in_slice == 0) | (at % in_slice == in_slice - 1)
    raised = (at >= live - T - 1) | beside_seam | (at <= padding[:, None])
    keys = np.where(raised[:, None, :, None], common + 0.2 * keys, keys)
    return queries, keys, values, padding


def _rounded(x: AnyArray, element: str) -> mx.array:
    return mx.array(x.astype(np.float32)).astype(DTYPES[element])


def _bank(variant: Variant, live: int, unit: float, rng: np.random.Generator) -> Bank:
    """Random heads of the variant's kind, as heavy as the live tokens. unit: of a query."""
    kind, layers = KINDS[variant.kind], _DEEP_LAYERS if variant.given_activations else 1
    heads = []
    for k in range(variant.n_kv_heads):
        nodes, units = NODES + 7 * k % 13 - 6, UNITS + 5 * k % 11 - 5
        size = kind.size_with(nodes=nodes, units=units, layers=layers)
        heads.append({n: _parameter(n, s, live, unit, rng) for n, s in kind.shapes(size, variant.head_dim).items()})
    return kind.stack(heads, scale=variant.scale)


def _parameter(name: str, shape: tuple[int, ...], live: int, unit: float, rng: np.random.Generator) -> mx.array:
    """Hidden units and outputs of about one, and log-normalisers that vary little about the live tokens' own."""
    x = rng.standard_normal(shape)
    of_score, last = "score" in name, name.rpartition(".")[2]
    if name == "keys":
        x *= unit
    elif name == "bias":
        x += math.log(live / NODES) + _RAISED_MASS
    elif last in _OF_QUERIES:
        x /= unit * math.sqrt(shape[-1])
    elif last in ("w_out", "w_score"):
        x /= math.sqrt(shape[0])
    elif last.startswith("w_"):
        x /= math.sqrt(shape[-1])
    elif last.startswith("b_"):
        x *= 0.3
    if of_score and last in ("w_out", "w_score", "skip"):
        x *= 0.4
    if name == "score.b_out":
        x += math.log(live) + _SPREAD**2 / 2 + _RAISED_MASS
    if name == "keys" or last in _OF_QUERIES:  # whatever is common to all queries, heads do not see it
        x[..., ::_APART] = 0.0
    return mx.array(x.astype(np.float32))


def reference(
    bank: Bank, queries: mx.array, keys: mx.array, values: mx.array, *, left_padding: mx.array | None = None
) -> mx.array:
    """`DecodeKernel.attend` by plain operations in float32, on the CPU; all keys and values [B, K, S, D] are live."""
    with mx.stream(mx.cpu):  # elsewhere float32 products may be rounded to TF32
        (T, D), S = queries.shape[2:], keys.shape[2]
        assert bank.head_dim == D
        q, k, v = attention.in_float32(queries, keys, values)
        mask = (mx.arange(S) <= mx.arange(S - T, S)[:, None])[None, None]
        if left_padding is not None:
            mask = mask & (mx.arange(S) >= left_padding[:, None, None, None])
        live = attention.causal(q, k, v, scale=bank.scale, mask=mask, offset=bank.offset)
        merged = attention.merge(bank.over(q), live).output
        mx.eval(merged)
    return merged


def relative_error(result: mx.array, expected: mx.array) -> float:
    """Largest difference / largest number."""
    result, expected = result.astype(mx.float32), expected.astype(mx.float32)
    return float(np.array(mx.abs(result - expected).max() / mx.abs(expected).max()))


def difference(error: float, tolerance: float) -> str:
    return f"its results differ from those of plain operations by {error:.1e}, where {tolerance:.1e} is right"


def summary(error: Exception) -> str:
    """The line of an exception's message that says most: a compiler's first error, else the first one."""
    lines = str(error).splitlines() or [repr(error)]
    return next((line for line in lines if "error:" in line), lines[0])


def stored(bank: Bank, dtype: mx.Dtype, bits: int) -> tuple[Bank, list[Stored]]:
    """(the bank with the values that `dtype`, or `bits` < 16, keeps; its heads as they are kept).

    Quantised are the matrices whose rows are as wide as a query: what the kernel reads.
    """
    heads: list[Stored] = []
    values: list[HeadArrays] = []
    for head in bank.unstack():
        kept: Stored = {}
        for name, x in head.items():
            quantised = bits < 16 and x.ndim == 2 and x.shape[1] == bank.head_dim
            kept[name] = quantize(x, bits=bits) if quantised else x.astype(dtype if x.ndim == 2 else mx.float32)
        heads.append(kept)
        values.append({n: dequantize(x, bits=bits) if isinstance(x, Quantized) else x for n, x in kept.items()})
    return type(bank).stack(values, scale=bank.scale, offset=bank.offset), heads
