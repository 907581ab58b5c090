"""A fitted file in the form that the decode kernel reads, where there is a kernel."""

import warnings
from collections.abc import Sequence

import mlx.core as mx

from .. import kernels, store
from ..core.quantize import Quantized, Stored
from ..errors import NectarError
from ..heads import Bank, HybridHead
from ..heads.hybrid import ANCHORS
from ..kernels.packing import Packed
from . import HALF_MAX, Layout, Tensors


def banks(layout: Layout, tensors: Tensors) -> list[Bank]:
    """The heads that a file holds, one bank a layer."""
    # Where a kernel decodes from the packed integers, these are for prompts alone: half as many bytes will do.
    return store.unpack(layout, tensors, half=kernels.backend() != "ops")


def packed(banks: Sequence[Bank], layout: Layout, tensors: Tensors) -> list[Packed] | None:
    """One layer after the other; None, with a warning where there should have been a kernel, if there is none.

    banks: what the tensors hold, as it answers without retrieval.
    """
    if kernels.backend() == "ops" or layout.kind == "exact":
        return None
    # The kernel takes the file's own integers, each in a byte, or coded numbers rounded to a byte, which is little
    # beside what they were rounded before; a completion's sums are in neither.
    whole = layout.bits != 16 and layout.kind != "completion"
    heads = _stored(layout, tensors) if whole and layout.bits is not None else [None] * len(banks)
    dtype = mx.float16 if whole or _fit_half(banks) else mx.float32
    try:
        layers = [
            kernels.pack(bank, dtype=dtype, bits=8 if whole else 16, heads=stored)
            for bank, stored in zip(banks, heads, strict=True)
        ]
        mx.eval([layer.words for layer in layers])
        return layers
    except (NectarError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
    warnings.warn(f"decoding without the fused kernel: {reason}", stacklevel=2)
    return None


def _fit_half(banks: Sequence[Bank]) -> bool:
    """Whether float16 can hold all matrices."""
    matrices = (x for bank in banks for x in bank.parameters.values() if x.ndim > 2)
    return all(bool(mx.abs(x).max() < HALF_MAX) for x in matrices if x.size)


def _stored(layout: Layout, tensors: Tensors) -> list[list[Stored]]:
    """Every layer's heads in the integers of the file, as they answer without retrieval."""
    layers = store.integer_heads(layout, tensors)
    return [[_alone(head) for head in heads] for heads in layers] if issubclass(layout.bank, HybridHead) else layers


def _alone(head: Stored) -> Stored:
    """`HybridHead.alone` of what is stored: the anchors, then the nodes."""
    whole: Stored = {"anchor_bias": mx.zeros(ANCHORS), **head}
    parts = {name: [whole[n] for n in (f"anchor_{name}", name) if n in whole] for name in ("keys", "values", "bias")}
    return {name: _joined(of) for name, of in parts.items()}


def _joined(parts: Sequence[mx.array | Quantized]) -> mx.array | Quantized:
    if all(isinstance(part, Quantized) for part in parts):
        return Quantized(*(mx.concatenate(list(each)) for each in zip(*parts, strict=True)))
    return mx.concatenate([part for part in parts if isinstance(part, mx.array)])
