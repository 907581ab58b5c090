"""The fit of a model that is divided among ranks (`models.sharding`): each fits the heads that its part has.

All ranks do the same, in step, for the model's every call adds up what they give: they read, sample, capture and check
together, and each captures and trains its own heads alone. A budget is a share, which each rank divides among its own
heads. Nothing is kept of an interrupted fit: ranks that go on from different places would wait for each other.
"""

from dataclasses import replace

import mlx.nn as nn

from .. import store
from ..core.progress import Log, Progress, no_log, silent
from ..core.types import Tokenizer
from ..errors import NectarError
from ..heads import AUTO, KINDS, HybridHead
from ..store import sharding
from . import pipeline
from .config import FitConfig
from .distributed import World
from .run import free_memory


def fit(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    *,
    config: FitConfig,
    world: World,
    name: str = "",
    source: str = "",
    progress: Progress = silent,
    log: Log = no_log,
) -> tuple[store.Tensors, store.Metadata, None]:
    """As `pipeline.fit`, of this rank's part of a model; every rank gets the whole file. world: of those ranks.

    NectarError also for a kind that keeps the text's keys beside the file.
    """
    if issubclass(KINDS[AUTO if config.kind == "auto" else config.kind], HybridHead):
        raise NectarError("a model that is divided among ranks keeps no keys beside its file: choose another --kind")
    if config.size is not None:
        config = replace(config, size=config.size // world.size)
    # What one rank decides by its memory the others must decide, too.
    config = replace(config, memory=config.memory or min(world.values(free_memory() // 2)))
    tensors, metadata, _ = pipeline.fit(
        model, tokenizer, text, config=config, name=name, source=source, progress=progress, log=log
    )
    report, heads = metadata["report"], metadata["layout"]["n_kv_heads"]
    of_heads = {figure: report[figure] for figure in ("sizes", "error") if figure in report}
    parts = world.values(of_heads)
    for figure, values in of_heads.items():  # layer by layer, and of several chunks chunk by chunk
        layers = range(0, len(values), heads)
        report[figure] = [x for i in layers for of in parts for x in of[figure][i : i + heads]]
    return *sharding.whole(world.arrays(tensors), metadata), None
