"""The banks of a fitted file, and their decode kernels where there are kernels."""

import warnings
from collections.abc import Sequence

import mlx.core as mx

from .. import kernels, store
from ..core.quantize import Stored
from ..errors import NectarError
from ..heads import Bank
from ..kernels import DecodeKernel
from . import HALF_MAX, Layout, Tensors


def banks(layout: Layout, tensors: Tensors) -> list[Bank]:
    """The heads that a file holds, one bank a layer."""
    # Where a kernel decodes from the packed integers, these are for prompts alone: half as many bytes will do.
    return store.unpack(layout, tensors, half=kernels.backend() != "ops")


def decode_kernels(banks: Sequence[Bank], layout: Layout, tensors: Tensors) -> list[DecodeKernel] | None:
    """One a layer; None if there are none, with a warning where there should have been.

    banks: what the tensors hold, as it answers without retrieval.
    """
    if kernels.backend() == "ops" or any(bank.decode_work() is None for bank in banks):
        return None
    # The kernel takes the file's own integers, each in a byte, or coded numbers rounded to a byte, which is little
    # beside what they were rounded before.
    in_bytes = layout.bits != 16 and layout.bank.decodes_stored
    heads = stored_heads(layout, tensors) if in_bytes and layout.bits is not None else [None] * len(banks)
    dtype = mx.float16 if in_bytes or _fit_half(banks) else mx.float32
    try:
        return [
            DecodeKernel(kernels.pack(bank, dtype=dtype, bits=8 if in_bytes else 16, heads=stored))
            for bank, stored in zip(banks, heads, strict=True)
        ]
    except (NectarError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
    warnings.warn(f"decoding without the fused kernel: {reason}", stacklevel=2)
    return None


def stored_heads(layout: Layout, tensors: Tensors) -> list[list[Stored]]:
    """Every layer's heads in the integers of the file, as they answer without retrieval."""
    layers = store.integer_heads(layout, tensors)
    return [[layout.bank.stored_without_retrieval(head) for head in heads] for heads in layers]


def _fit_half(banks: Sequence[Bank]) -> bool:
    """Whether float16 can hold all matrices."""
    matrices = (x for bank in banks for x in bank.parameters.values() if x.ndim > 2)
    return all(bool(mx.abs(x).max() < HALF_MAX) for x in matrices if x.size)
