"""How what the layers without heads keep of a text lies in tensors: last windows and recurrent states.

A window's keys and values are kept as the model computes them (`windows.3.keys`). An array of a state is kept the same
way (`windows.3.state.0`), or coded: in 16 bits, or in 8 with a scale for each group of its last axis
(`windows.3.state.0.scales`). Which of them is measured (`fitting.state_bits`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx

from ..core.quantize import Quantized, dequantize, quantize
from ..errors import NectarError
from ..mlxlm.geometry import Geometry, Layer
from ..mlxlm.kept import Kept, State, Window, shared_layers
from .tensor_file import Tensors

STATE_BITS = (8, 16)
_GROUP = 16  # rows of another width are kept in 16 bits
_HALF_MAX = 65504.0


def coded(kept: Mapping[int, Kept], bits: int) -> dict[int, Kept]:
    """The same with every state as a file of 8 or 16 bits gives it back."""
    return {layer: _coded(k, bits) if isinstance(k, State) else k for layer, k in kept.items()}


def read(stored: Tensors, geometry: Geometry, context: int) -> dict[int, Kept]:
    """What a file holds, by layer, of `context` positions. NectarError if the file does not hold it."""
    kept = shared_layers(geometry)
    for number, layer in enumerate(geometry.layers):
        window = _window(stored, number, layer, context) if layer.window else None
        if layer.states:
            kept[number] = _state(stored, number, layer, window)
        elif window:
            kept[number] = window
    return kept


def _window(stored: Tensors, number: int, layer: Layer, context: int) -> Window:
    window = Window(stored[f"windows.{number}.keys"], stored[f"windows.{number}.values"], layer.window)
    shape = (layer.n_kv_heads, min(layer.window, context))
    if window.keys.shape != (*shape, layer.head_dim) or window.values.shape != (*shape, layer.value_dim):
        raise NectarError(f"the file is damaged: the window of layer {number} has another shape")
    return window


def _state(stored: Tensors, number: int, layer: Layer, window: Window | None) -> State:
    prefix = f"windows.{number}."
    own = {name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(f"{prefix}state.")}
    arrays = _decoded(own, len(layer.states))
    if [array.shape[1:] for array in arrays] != list(layer.states):
        raise NectarError(f"the file is damaged: the state of layer {number} has another shape")
    return State(arrays=arrays, stored=own, beside=layer.fitted, window=window)


def _coded(state: State, bits: int) -> State:
    stored: dict[str, mx.array] = {}
    for i, array in enumerate(state.arrays):
        x, name = array[0].astype(mx.float32), f"state.{i}"
        if bits == 8 and x.shape[-1] % _GROUP == 0:
            stored[name], stored[f"{name}.scales"] = quantize(x, bits=8)
        else:
            fits = not x.size or bool(mx.abs(x).max() < _HALF_MAX)
            stored[name] = x.astype(mx.float16 if fits else mx.bfloat16)
    types = [array.dtype for array in state.arrays]
    arrays = [x.astype(dtype) for x, dtype in zip(_decoded(stored, len(types)), types, strict=True)]
    mx.eval(stored, arrays)
    return replace(state, arrays=tuple(arrays), stored=stored)


def _decoded(stored: Mapping[str, mx.array], count: int) -> tuple[mx.array, ...]:
    arrays: Sequence[mx.array] = [
        dequantize(Quantized(stored[f"state.{i}"], stored[f"state.{i}.scales"]), bits=8)
        if f"state.{i}.scales" in stored
        else stored[f"state.{i}"]
        for i in range(count)
    ]
    return tuple(array[None] for array in arrays)
