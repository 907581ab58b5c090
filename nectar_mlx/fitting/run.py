"""What all stages of one fit are given."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, Self

import mlx.nn as nn
import psutil

from .. import __version__, kernels, models
from ..core.device import device
from ..core.progress import Progress, silent
from ..core.types import Tokenizer
from ..heads import AUTO, KINDS
from ..mlxlm.attention_patch import Geometry
from ..models import adapters
from ..store import Layout
from .auto_budget import FIRST
from .budget import distills, share_of
from .checkpoint import Checkpoint, Plan, text_digest
from .config import FitConfig, density, useful_samples
from .distributed import World
from .others import OtherFile, digests
from .prefill import Context
from .samples.conversation import Conversation
from .samples.sample_store import DeviceSampleStore, SampleStore

_WORTH = 8  # times what it costs to start a group
ROUTER_SAMPLES = 2048  # whose queries the router is made from: all that a kind needs which is not trained


@dataclass(frozen=True, kw_only=True)
class FitRun:
    """One fit: a model and its tokenizer, what was chosen, whom to report progress to, and where an interrupted fit
    leaves its work. The stages are functions of it and of each other's results:

        read -> collect -> plan -> train -> check

    facts: what decides the result beside the settings and the prefix (`identity`). free: bytes of memory that the fit
    may take where the settings do not say it; a resumed one goes on with those of its first run. world: the
    processes that share its work. others: files that are in view.
    """

    model: nn.Module
    tokenizer: Tokenizer
    geometry: Geometry
    config: FitConfig
    progress: Progress = silent
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None))
    facts: Mapping[str, Any] = field(default_factory=dict)
    free: int = field(default_factory=lambda: free_memory() // 2)
    world: World = field(default_factory=World)
    others: Sequence[OtherFile] = ()

    @cached_property
    def layout(self) -> Layout:
        """How the heads of all layers will be stored."""
        config, g = self.config, self.geometry
        kind = AUTO if config.kind == "auto" else config.kind
        bank = KINDS[kind]
        return Layout(
            kind=kind,
            n_layers=len(g.fitted),
            n_kv_heads=g.n_kv_heads,
            head_dim=g.head_dim,
            scale=g.scale,
            value_dim=0 if g.value_dim == g.head_dim else g.value_dim,
            bits=config.bits if config.bits and bank.fitted else bank.default_bits,
        )

    @property
    def n_heads(self) -> int:
        """KV heads of all layers with full attention."""
        return self.layout.n_layers * self.layout.n_kv_heads

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.geometry.n_heads // self.geometry.n_kv_heads

    @property
    def memory(self) -> int:
        """Bytes that keys and values, or captured samples, may take."""
        return self.config.memory or self.free

    def shares(self, heads: int, n: int) -> int:
        """Into how many parts so many heads of n tokens are divided, each for one rank: whatever the number of ranks,
        so that the same heads are trained side by side; into one, where starting more groups would take long."""
        share, shares = share_of(self.config, self.geometry, n) or FIRST, device().study_shares
        scores = heads * share * n * self.config.batch  # of a training step
        return shares if scores >= shares * _WORTH * device().launch_scores else 1

    def n_samples(self, heads: int) -> int:
        """Samples a head, of so many heads at a time: as asked for, or as many as are useful and the memory holds."""
        if not self.layout.bank.trainable:
            return min(self.config.queries or ROUTER_SAMPLES, ROUTER_SAMPLES)
        if self.config.queries:
            return self.config.queries
        store = SampleStore if device().linux_cpu else DeviceSampleStore
        return useful_samples(
            self.config,
            device(),
            group=self.group,
            nbytes=store.nbytes(heads, 1, self.geometry.head_dim),
            memory=psutil.virtual_memory().total,  # not what is free: an interrupted fit goes on with the same samples
        )

    def distills(self, context: Context) -> bool:
        """Whether the heads of a context that was read at once are trained through the whole model in the end."""
        share = share_of(self.config, self.geometry, context.length)
        chunks, others = bool(context.chunks or context.preamble), context.others is not None
        return distills(self.config, self.layout, share, chunks=chunks, others=others)

    def density(self, context: Context) -> float:
        """Share of the tokens of conversations about a text whose samples are kept."""
        if not self.layout.bank.trainable:
            return 1.0
        samples = self.n_samples(self.n_heads)
        return density(self.config, device(), group=self.group, samples=samples, distilled=self.distills(context))

    def claim(self, prefix: Sequence[int], *, preamble: int = 0) -> None:
        """Starts or continues the fit of this prefix; see `Checkpoint.claim`."""
        settings = {"settings": asdict(self.config), "prefix": text_digest(prefix), "preamble": preamble}
        self.checkpoint.claim({**self.facts, **settings})

    def kept_plan(self) -> Plan | None:
        """What an interrupted fit has decided, as rank 0 knows it."""
        plan = self.checkpoint.load_plan()
        kept = self.world.values(None if plan is None else plan._asdict())[0]
        return None if kept is None else Plan.of(kept)

    def kept_conversations(self) -> list[Conversation]:
        """What an interrupted fit has sampled, as rank 0 knows it."""
        kept = self.world.values([asdict(c) for c in self.checkpoint.load_conversations()])[0]
        return [Conversation(**c) for c in kept]

    def provenance(self, *, model: str, source: str) -> dict[str, Any]:
        """Where a file comes from, for its metadata. model, source: names of the model and of the text."""
        adapter = adapters.of(self.model)
        return {
            "model": model,
            "model_sha256": self.facts["model"],
            **({"adapter": asdict(adapter)} if adapter else {}),
            "tokenizer_sha256": self.facts["tokenizer"],
            "config": asdict(self.config),
            "source": source,
            **digests(self.others),
        }

    def part(self, name: str, **changes: Any) -> Self:
        """The same fit for a part of its work, which has a checkpoint of its own."""
        return replace(self, checkpoint=self.checkpoint.part(name), **changes)


def identity(model: nn.Module, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """What decides the result of a fit beside its settings: the model, the text, the library and the machine."""
    return {
        "model": models.fingerprint(model),
        "tokenizer": models.tokenizer_fingerprint(tokenizer),
        "text": text_digest(text),
        "version": {"nectar_mlx": __version__, "mlx": version("mlx")},
        "machine": {"device": asdict(device()), "kernel": kernels.backend(), "memory": psutil.virtual_memory().total},
    }


def free_memory() -> int:
    """Bytes of memory that no process uses."""
    return int(psutil.virtual_memory().available)
