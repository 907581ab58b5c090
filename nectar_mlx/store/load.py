"""From a file's tensors and metadata to what answers: banks, decode kernels, windows, exact keys."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .. import kernels, models, store
from ..core.quantize import Stored
from ..core.types import Tokenizer
from ..errors import NectarError
from ..heads import Bank
from ..kernels import DecodeKernel
from ..mlxlm import attention_patch
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.kept import Kept, State
from ..models import adapters
from . import HALF_MAX, Layout, Metadata, Tensors, schema, states
from .kv_file import KeyFile


def banks(layout: Layout, tensors: Tensors, *, trusted: bool = False) -> list[Bank]:
    """The heads that a file holds, one bank a layer. trusted: as for `store.unpack`."""
    # Where a kernel decodes from the packed integers, these are for prompts alone: half as many bytes will do.
    return store.unpack(layout, tensors, half=kernels.backend() != "ops", trusted=trusted)


def decode_kernels(banks: Sequence[Bank], layout: Layout, tensors: Tensors) -> list[DecodeKernel] | None:
    """One a layer; None if there are none, with a warning where there should have been.

    banks: what the tensors hold, as it answers without retrieval.
    """
    if kernels.backend() == "ops" or any(bank.decode_work() is None for bank in banks):
        return None
    if layout.value_dim:
        warnings.warn(f"decoding without the fused kernel: {no_kernel(layout)}", stacklevel=2)
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


def no_kernel(layout: Layout) -> str:
    """Why the decode kernel cannot take heads of this shape; "" where it can."""
    if layout.value_dim:
        return f"it takes no values ({layout.value_dim}) narrower than keys ({layout.head_dim})"
    if layout.head_dim not in kernels.HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, kernels.HEAD_DIMS))} numbers, not of {layout.head_dim}"
    return ""


def stored_heads(layout: Layout, tensors: Tensors) -> list[list[Stored]]:
    """Every layer's heads in the integers of the file, as they answer without retrieval."""
    layers = store.integer_heads(layout, tensors)
    return [[layout.bank.stored_without_retrieval(head) for head in heads] for heads in layers]


def _fit_half(banks: Sequence[Bank]) -> bool:
    """Whether float16 can hold all matrices."""
    matrices = (x for bank in banks for x in bank.parameters.values() if x.ndim > 2)
    return all(bool(mx.abs(x).max() < HALF_MAX) for x in matrices if x.size)


def geometry(metadata: Metadata) -> Geometry:
    """What the file knows of its model."""
    return Geometry.from_dict(metadata["geometry"])


def windows(tensors: Tensors, geometry: Geometry, context: int) -> dict[int, Kept]:
    """What the layers without heads keep of `context` positions, by layer. NectarError if the file does not hold it."""
    return states.read(tensors, geometry, context)


def as_computed(windows: Mapping[int, Kept], model: nn.Module) -> dict[int, Kept]:
    """The same in the types that the model computes in."""
    types = attention_patch.state_types(model)
    converted = {layer: kept.astype(types[layer]) for layer, kept in windows.items()}
    mx.eval([kept.tensors() for kept in converted.values()])  # in this thread: MLX's streams are a thread's own
    mx.eval([kept.arrays for kept in converted.values() if isinstance(kept, State)])
    return converted


def check_model(path: str | Path, metadata: Metadata, model: nn.Module, tokenizer: Tokenizer | None = None) -> None:
    """NectarError unless a file was fitted on this very model, and tokenizer, if one is given. path: for the error."""
    if attention_patch.route(model) != geometry(metadata) or models.fingerprint(model) != metadata["model_sha256"]:
        check_adapter(path, metadata, model)
        raise NectarError(
            f"{path} was fitted on {metadata['model']}, which is not the model in use: load that one, or fit again"
        )
    if tokenizer is not None and models.tokenizer_fingerprint(tokenizer) != metadata["tokenizer_sha256"]:
        raise NectarError(f"{path} was fitted with another tokenizer or chat template than the one given: fit again")


def check_adapter(path: str | Path, metadata: Metadata, model: nn.Module) -> None:
    """NectarError, with what to give, unless a model has the adapter that a file was fitted with, or both have none."""
    if difference := adapters.difference(path, metadata.get("adapter"), model):
        raise NectarError(difference)


def same_model(metadata: Metadata, other: Metadata) -> bool:
    """Whether two files were fitted on the same model and tokenizer."""
    names = ("model_sha256", "tokenizer_sha256")
    return geometry(metadata) == geometry(other) and all(metadata.get(name) == other.get(name) for name in names)


def key_file(path: Path, *, nectar: str, shape: tuple[int, int, int], head_dim: int) -> KeyFile | None:
    """The keys beside a .nectar; arguments as for `KeyFile.open`. None, with a warning, where they cannot be used."""
    try:
        keys = KeyFile.open(path, nectar=nectar, shape=shape)
        schema.check_keys(keys.small, shape=shape, head_dim=head_dim)
        return keys
    except (NectarError, ValueError) as error:
        warnings.warn(f"{error}: answering from the .nectar alone, no key is read exactly", stacklevel=3)
        return None
