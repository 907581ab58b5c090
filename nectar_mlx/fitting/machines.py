"""Machines and models of which a fit's time is estimated: this one, by a short measurement, and some by their published
figures."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import msgspec
import psutil
from mlx.utils import tree_flatten

from ..core import json_text
from ..core.device import LINUX_CPU, device, gpu, using
from ..core.types import JsonObject
from ..errors import NectarError
from ..heads import AUTO, KINDS
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.window import window
from .config import FitConfig, parse_budget
from .config import effort as effort_options
from .estimate import estimate
from .work import Machine, Shape

_APPLE_SHARE = 0.21  # of the float32 rate: what the stages of a fit reach on an H100, of its 67 · 10¹² a second
_NVIDIA_RATE = 14e12  # the same in operations a second, of an H200 as of an H100
_CPU_SHARE = 2.7  # what the stages of a fit reach, in multiples of what `_rate` measures: on two cores, one thread
_UNKNOWN_WINDOW = 1 << 62
TOKENS = (10_000, 100_000, 1_000_000, 10_000_000)  # of the texts that fits are planned for


def _apple(name: str, rate: float, bandwidth: float, memory: int, basis: str = "calculated") -> Machine:
    """rate: published float32 operations of the GPU, in 10¹² a second; bandwidth in GB/s; memory in GB."""
    return Machine(
        name=name,
        rate=_APPLE_SHARE * rate * 1e12,
        bandwidth=bandwidth * 1e9,
        memory=memory * 1e9,
        profile=replace(gpu(memory * 1e9), compile_steps=True),
        basis=basis,
    )


def _nvidia(name: str, bandwidth: float, memory: int, basis: str) -> Machine:
    """bandwidth in TB/s; memory in GB, the GPU's."""
    return Machine(
        name=name,
        rate=_NVIDIA_RATE,
        bandwidth=bandwidth * 1e12,
        memory=memory * 1e9,
        profile=gpu(memory * 1e9, nvidia=True),
        basis=basis,
    )


MACHINES = (
    Machine(
        name="2 CPU cores, 16 GB", rate=20e9, bandwidth=20e9, memory=16e9, profile=LINUX_CPU, basis="measured at 135M"
    ),
    _apple("M1, 16 GB", 2.6, 68, 16),
    _apple("M2, 24 GB", 3.6, 100, 24),
    _apple("M3, 24 GB", 4.1, 100, 24),
    _apple("M4, 32 GB", 4.3, 120, 32),
    _apple("M4 Max, 128 GB", 18.4, 546, 128),
    _apple("M5 Max, 128 GB", 18.4, 614, 128, "calculated as an M4 Max"),
    _apple("M2 Ultra, 192 GB", 27.2, 800, 192),
    _apple("M3 Ultra, 512 GB", 28.2, 819, 512),
    _apple("M5 Ultra, 512 GB", 36.8, 1228, 512, "calculated as two M5 Max"),
    _nvidia("H100, 80 GB", 3.35, 80, "calculated as an H200"),
    _nvidia("H200, 141 GB", 4.8, 141, "measured at 1.7B's shape"),
)

# Published configurations: layers, width, heads, KV heads, width of the network, vocabulary, window.
_PUBLISHED = {
    "SmolLM2-135M": (30, 576, 9, 3, 64, 1536, 49152, 8192),
    "Qwen3-1.7B": (28, 2048, 16, 8, 128, 6144, 151936, 40960),
    "Qwen3-4B": (36, 2560, 32, 8, 128, 9728, 151936, 40960),
    "Llama-3.1-8B": (32, 4096, 32, 8, 128, 14336, 128256, 131072),
    "Qwen3-8B": (36, 4096, 32, 8, 128, 12288, 151936, 40960),
    "Qwen3-14B": (40, 5120, 40, 8, 128, 17408, 151936, 40960),
    "Qwen3-32B": (64, 5120, 64, 8, 128, 25600, 151936, 40960),
    "Llama-3.3-70B": (80, 8192, 64, 8, 128, 28672, 128256, 131072),
}


def _shape(
    name: str,
    layers: int,
    width: int,
    heads: int,
    kv: int,
    head: int,
    inner: int,
    words: int,
    window: int,
    *,
    windows: Sequence[int] = (),
) -> Shape:
    geometry = Geometry.uniform(
        model_type="",
        n_heads=heads,
        n_kv_heads=kv,
        head_dim=head,
        scale=head**-0.5,
        windows=windows or (0,) * layers,
    )
    body = layers * (2.0 * width * head * (heads + kv) + 3.0 * width * inner)
    return Shape(name=name, geometry=geometry, body=body, vocabulary=float(words * width), window=window)


SHAPES = {name: _shape(name, *numbers) for name, numbers in _PUBLISHED.items()}


def shape_of(model: nn.Module, geometry: Geometry, name: str) -> Shape:
    """Of a loaded model."""
    sizes: dict[str, int] = {}
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    packed = 1
    for path, weight in weights:
        packed = 8 if weight.dtype == mx.uint32 else packed  # 4 bits an entry, about
        sizes[path] = weight.size * (8 if weight.dtype == mx.uint32 else 1)
    table = max((size for path, size in sizes.items() if "embed" in path), default=0)
    outputs = sum(size for path, size in sizes.items() if "embed" in path or "lm_head" in path)
    return Shape(
        name=name,
        geometry=geometry,
        body=float(sum(sizes.values()) - outputs),
        vocabulary=float(table),
        window=window(model) or _UNKNOWN_WINDOW,
        bytes_each=0.5 if packed > 1 else 2.0,
    )


def named_shape(name: str) -> Shape:
    """Of a model by a published name (any owner, any suffix), of a folder with a config.json, or of a .gguf file;
    nothing is fetched.

    NectarError if it is none of them.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _configured(path.name, path)
    if (path / "config.json").is_file():
        return _configured(name, path / "config.json")
    short = name.split("/")[-1].lower()
    known = [shape for key, shape in SHAPES.items() if short.startswith(key.lower())]
    if not known:
        raise NectarError(f"{name}: no folder with a config.json, no .gguf file, and none of {', '.join(SHAPES)}")
    return known[0]


_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
_MaybeCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] | None  # 0 and null: it is not said


class _Config(msgspec.Struct):
    """What is read of a model's config.json."""

    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    hidden_size: _Count
    num_attention_heads: _Count
    intermediate_size: _Count
    vocab_size: _Count
    num_key_value_heads: _MaybeCount = None
    head_dim: _MaybeCount = None
    max_position_embeddings: _MaybeCount = None
    sliding_window: _MaybeCount = None
    sliding_window_pattern: int | str | None = None
    former_pattern: int | str | None = msgspec.field(default=None, name="_sliding_window_pattern")
    layer_types: list[str] | None = None

    @property
    def kv_heads(self) -> int:
        """ValueError where they do not share the heads equally."""
        count = self.num_key_value_heads or self.num_attention_heads
        if self.num_attention_heads % count:
            raise ValueError(f"{self.num_attention_heads} heads cannot share {count} KV heads")
        return count

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each layer, 0 for none; of the forms that configurations have for it the two usual
        ones. ValueError where no layer has full attention."""
        slides = [False] * self.num_hidden_layers
        pattern = self.sliding_window_pattern or self.former_pattern
        if self.layer_types:
            slides = ["sliding" in kind for kind in self.layer_types]
        elif isinstance(pattern, int):
            slides = [(layer + 1) % pattern != 0 for layer in range(self.num_hidden_layers)]
        if len(slides) != self.num_hidden_layers:
            raise ValueError(f"{self.num_hidden_layers} layers, but the types of {len(slides)}")
        windows = tuple((self.sliding_window or 0) if sliding else 0 for sliding in slides)
        if all(windows):
            raise ValueError("no layer has full attention")
        return windows


def _configured(name: str, path: Path) -> Shape:
    try:
        told = _gguf_config(path) if path.suffix == ".gguf" else json.loads(path.read_bytes())
        config = json_text.typed(told.get("text_config") or told, _Config)
        return _shape(
            name,
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.head_dim or config.hidden_size // config.num_attention_heads,
            config.intermediate_size,
            config.vocab_size,
            config.max_position_embeddings or _UNKNOWN_WINDOW,
            windows=config.windows,
        )
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise NectarError(f"{path} does not describe a model ({type(error).__name__}: {error})") from None


def _gguf_config(path: Path) -> JsonObject:
    from ..models.gguf import read_config  # takes seconds to import

    return read_config(path)


def here() -> Machine:
    """This machine; its rate is measured once a process."""
    rate = _rate(device().linux_cpu)
    return Machine(
        name="this machine",
        rate=(_CPU_SHARE if device().linux_cpu else 1.0) * rate,
        bandwidth=rate if device().linux_cpu else rate / 4,
        memory=float(psutil.virtual_memory().total),
        profile=device(),
        basis="measured",
    )


@cache
def _rate(linux_cpu: bool) -> float:
    """Operations a second, in a fifth of a second: attention of 512 queries over 1,024 keys in 8 heads."""
    queries, keys = (mx.random.normal((8, n, 64), key=mx.random.key(n)) for n in (512, 1024))
    operations, times = 4.0 * 8 * 512 * 1024 * 64, list[float]()
    copies = 1 if linux_cpu else 32
    while len(times) < 3 or sum(times) < 0.2:
        start = time.perf_counter()
        mx.eval([mx.softmax(queries * (1 + i) @ keys.swapaxes(1, 2), axis=-1) @ keys for i in range(copies)])
        times.append(time.perf_counter() - start)
    return copies * operations / min(times[1:])


def settings(machine: Machine, *, budget: str, kind: str, effort: str = "normal") -> FitConfig:
    """What a fit with these options, and else the default ones, would be on that machine."""
    with using(machine.profile):
        return FitConfig(**effort_options(effort), **parse_budget(budget), kind=kind)


def planned(
    shape: Shape, tokens: int, machine: Machine, config: FitConfig, *, machines: int = 1, others: bool = False
) -> JsonObject:
    """What a fit would take. machines: how many share it; memory is that of each. others: whether other files are in
    view."""
    expected = estimate(shape, machine, config, tokens, machines=machines, others=others)
    whole = expected.chunks == 1 or KINDS[AUTO if config.kind == "auto" else config.kind].joinable
    return {
        "model": shape.name,
        "tokens": tokens,
        "machine": machine.name,
        "machines": machines,
        "seconds": round(expected.seconds, 1),
        "stages": [{"stage": stage.description, "seconds": round(stage.seconds, 1)} for stage in expected.stages],
        "memory_bytes": int(expected.memory),
        "file_bytes": int(expected.size),
        "disk_bytes": int(expected.size + expected.disk),
        "step_bytes": int(expected.step),
        "cache_bytes": int(expected.cache),
        "chunks": expected.chunks,
        "layerwise": expected.layerwise,
        "undistilled": expected.undistilled,
        "exceeded": expected.exceeded,
        "fits": whole and expected.memory <= machine.memory,
        "basis": machine.basis,
    }
