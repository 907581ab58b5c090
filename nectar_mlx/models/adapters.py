"""Adapters: LoRA and DoRA layers, or fine-tuned weights, as `mlx_lm.lora` writes them beside a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from nectar_mlx.errors import NectarError
from nectar_mlx.models.fingerprints import adapter_fingerprint, lora_scales

_FILES = ("adapter_config.json", "adapters.safetensors")


@dataclass(frozen=True)
class Adapter:
    """path: the folder as it was given; "" where a model came with LoRA layers. sha256: of what it changes."""

    path: str
    sha256: str


def check(path: str) -> None:
    """NectarError unless this is an adapter's folder."""
    if missing := [name for name in _FILES if not (Path(path).expanduser() / name).is_file()]:
        raise NectarError(f"{path} is not an adapter's folder, as mlx_lm.lora writes it: it has no {missing[0]}")


def apply(model: nn.Module, path: str) -> None:
    """Changes a model as the adapter in this folder says. NectarError where mlx-lm cannot read it for this model."""
    from mlx_lm.utils import load_adapters

    folder, before = Path(path).expanduser(), lora_scales(model)
    try:
        load_adapters(model, str(folder))
        weights = cast("dict[str, mx.array]", mx.load(str(folder / _FILES[1])))
        _check_weights(weights, {name: x for name, x in lora_scales(model).items() if name not in before})
        sha256 = adapter_fingerprint(model, weights)
    except Exception as error:  # a folder from anyone, and layers that the model may not have
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise NectarError(f"mlx-lm cannot load the adapter {path} for this model ({reason})") from error
    if sha256 is None:
        raise NectarError(f"the adapter {path} changes nothing in this model: is it another model's?")
    model.eval()
    vars(model)["_nectar_adapter"] = Adapter(path, sha256)


def _check_weights(weights: dict[str, mx.array], scales: dict[str, float]) -> None:
    """ValueError for layers that mlx-lm makes and the file does not fill, which are random, and for what is no number.

    scales: of the layers that the adapter adds.
    """
    if missing := {f"{layer}.{leaf}" for layer in scales for leaf in ("lora_a", "lora_b")} - weights.keys():
        raise ValueError(f"its file has no {min(missing)}")
    for name, array in [*weights.items(), *((f"the scale of {layer}", mx.array(x)) for layer, x in scales.items())]:
        if not mx.isfinite(array).all().item():
            raise ValueError(f"{name} is not finite")


def of(model: nn.Module) -> Adapter | None:
    """A model's adapter: what `apply` gave it, or the LoRA layers that it came with."""
    known: Adapter | None = vars(model).get("_nectar_adapter")
    if known is None and (sha256 := adapter_fingerprint(model)) is not None:
        return Adapter("", sha256)
    return known


def difference(path: str | Path, held: Any, model: nn.Module) -> str:
    """Why a model with another adapter, or with none, is not the one that a file was fitted on, and what to give; ""
    where the adapter is the same. held: the file's `adapter`. path: the file's."""
    given = of(model)
    if held is None:
        which = given and (given.path or "its LoRA layers")
        return f"{path} was fitted without the adapter ({which}): leave it out, or fit again" if given else ""
    wanted = Adapter(**held)
    if given is not None and given.sha256 == wanted.sha256:
        return ""
    named = f"{path} was fitted with the adapter {wanted.path or 'of LoRA layers that its model came with'}"
    if given is not None and given.path == wanted.path:
        return f"{named}, which has been trained further since: fit again"
    advice = f": give --adapter {wanted.path}" if wanted.path else ""
    return f"{named}, {f'not with {given.path}' if given else 'and the model given has none'}{advice}"
