"""What tells one model, tokenizer or adapter from another, in a file that belongs to it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nectar_mlx.core.types import Tokenizer
from nectar_mlx.models.sharding import shard_of

_LORA = ("lora_a", "lora_b", "m")  # parameters of a LoRA or DoRA layer beside the layer's own
_Sampled = tuple[str, tuple[int, ...], mx.array]  # of a parameter its name, shape and `_sample`
_KNOWN: dict[int, tuple[ref[Any], Any, str]] = {}  # by `id` a tokenizer, what tells a change of it, and its digest


def arguments(model: nn.Module) -> Any:
    """What mlx-lm read of a model's configuration, a dataclass; None where it did not keep it."""
    return getattr(model, "args", getattr(model, "config", None))


def fingerprint(model: nn.Module) -> str:
    """The sha256 of a model's configuration and weights, the same on the CPU in float32 and on a GPU in bfloat16.

    It covers the name, the shape and up to 4,096 evenly spaced values of every parameter, rounded to bfloat16: a second
    even for large models. A fine-tuned or requantized model differs; a change of single weights may be missed. A part
    of a model (`sharding`) has that of the whole.
    """
    shard = shard_of(model)
    return _digest(_settings(model), _parameters(model)) if shard is None else shard.fingerprint


def fingerprint_of_files(load: Callable[[], nn.Module]) -> str:
    """The same of a model whose weights are read one at a time. load: makes it, without reading them."""
    model = load()
    settings, parameters = _settings(model), _parameters(model)
    del model  # from now on nothing but the list holds weights
    return _sha256(settings, _sampled_one_by_one(parameters))


def adapter_fingerprint(model: nn.Module, names: Iterable[str] = ()) -> str | None:
    """The sha256 of what an adapter adds to a model, as `fingerprint` is of all of it; None where it adds nothing.

    names: of the parameters that an adapter without LoRA layers sets.
    """
    scales, chosen = lora_scales(model), set(names)

    def is_added(name: str) -> bool:
        layer, _, leaf = name.rpartition(".")
        return name in chosen or (layer in scales and leaf in _LORA)

    added = [(name, array) for name, array in _parameters(model) if is_added(name)]
    return _digest(scales, added) if added else None


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """The sha256 of everything that decides token ids and prompts: vocabulary, merges, chat template, an encoding.

    A second's work for a large vocabulary, so it is done once for a tokenizer, and again where that has changed.
    """
    # The encoding covers normalization and splitting, whose serialisation differs between library versions.
    encoded = list(tokenizer.encode("We'll  see:\n\n1234 naïve ﬁnds, x_1 = [3.14];\t你好 🙂 <s>"))
    template = getattr(tokenizer, "chat_template", None)
    state = (_vocabulary_size(tokenizer), json.dumps(template, sort_keys=True, default=str), encoded)
    number = id(tokenizer)  # not the tokenizer: it need not have a hash, and others may be equal to it
    known = _KNOWN.get(number)
    if known is not None and known[0]() is tokenizer and known[1] == state:
        return known[2]
    digest = _tokenizer_digest(tokenizer, template, encoded)
    with suppress(TypeError):  # there are objects to which nothing can refer weakly
        _KNOWN[number] = ref(tokenizer, lambda _: _KNOWN.pop(number, None)), state, digest
    return digest


def _vocabulary_size(tokenizer: Any) -> int:
    """Without the time that a copy of the vocabulary takes, where the tokenizer tells it."""
    size = getattr(tokenizer, "__len__", None)  # wrappers may have it as an attribute alone, which `len` does not see
    return int(size()) if size else len(tokenizer.get_vocab())


def _tokenizer_digest(tokenizer: Any, template: Any, encoded: list[int]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges") if backend else None
    contents = [
        sorted(tokenizer.get_vocab().items(), key=itemgetter(1, 0)),
        [" ".join(merge) if isinstance(merge, list) else merge for merge in merges or []],
        template,
        encoded,
    ]
    return hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()


def _settings(model: nn.Module) -> dict[str, Any]:
    read = arguments(model)
    settings: dict[str, Any] = {"class": type(model).__name__} if read is None else dataclasses.asdict(read)
    if scales := lora_scales(model):
        settings["lora_scales"] = scales
    return settings


def _parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    return sorted(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def lora_scales(model: nn.Module) -> dict[str, float]:
    """What each LoRA layer multiplies its product by, which is no parameter."""
    return {name: float(getattr(module, "scale", 1.0)) for name, module in model.named_modules() if "lora_a" in module}


def _digest(settings: dict[str, Any], parameters: Iterable[tuple[str, mx.array]]) -> str:
    parameters = list(parameters)
    samples = [_sample(array) for _, array in parameters]
    mx.eval(samples)
    return _sha256(settings, ((name, x.shape, sample) for (name, x), sample in zip(parameters, samples, strict=True)))


def _sampled_one_by_one(parameters: list[tuple[str, mx.array]]) -> Iterator[_Sampled]:
    """Empties the list, so that each weight is forgotten before the next one is read."""
    while parameters:
        name, array = parameters.pop(0)
        yield name, array.shape, _sample(array)


def _sha256(settings: dict[str, Any], samples: Iterable[_Sampled]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, shape, sample in samples:
        digest.update(f"{name} {shape}".encode())
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()


def _sample(array: mx.array) -> mx.array:
    # An odd step, so that a power of two in the shape does not pick the same column of every row.
    step = -(-array.size // 4096) | 1
    values = array.reshape(-1)[::step]
    return values.astype(mx.bfloat16).view(mx.uint16) if mx.issubdtype(array.dtype, mx.floating) else values
