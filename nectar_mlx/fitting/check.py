"""The check of a finished fit: its answers compared with those of the full cache."""

from collections.abc import Mapping, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from ..core.device import device
from ..core.types import JsonObject, LayerCache
from ..errors import NectarError
from ..heads import Bank
from ..mlxlm.kept import Kept, make_caches
from ..retrieval.recall import Calibration, Seen
from . import fidelity
from .distributed import World
from .fidelity import Divergence
from .layers import layer_runner
from .prefill import read_head
from .run import FitRun
from .samples.capture import Collected
from .samples.conversation import Conversation, answered_checks
from .verdict import measured


def check(
    run: FitRun,
    data: Collected,
    banks: Sequence[Bank],
    *,
    windows: Mapping[int, Kept] | None = None,
    asked: Sequence[Conversation] | None = None,
    no_context: float | None = None,
    stage: str = "checking",
) -> JsonObject:
    """How far the answers to the check questions are from the full cache's (`verdict`), and how much recall helps them;
    banks: one a layer. windows: what the layers without heads keep (default: the context's). asked: of the data's
    conversations those that are compared (default: all that were answered). no_context: the divergence without the
    text, where it is known. stage: what progress calls it. Each rank compares some of the answers."""
    context = data.context
    conversations = answered_checks(data.conversations) if asked is None else asked
    conversations = sorted(conversations, key=lambda c: len(c.prompt))  # those of a batch are padded to the longest
    windows = context.windows if windows is None else windows
    make_cache = partial(make_caches, context.in_view(banks), windows, context.start)
    views: dict[str, fidelity.MakeCache] = {"nectar": make_cache}
    if no_context is None:
        views["no context"] = read_head(run.model, run.tokenizer, context.prefix, run.geometry).make_cache
    calibration = Calibration(context.prefix)

    def observe(name: str, conversation: Conversation, truth: mx.array, ours: mx.array) -> None:
        if name == "nectar":
            calibration.add(conversation.prompt, conversation.answer, truth, ours)

    batch = device().check_batch
    parts = [range(len(conversations))[start : start + batch] for start in range(0, len(conversations), batch)]
    mine = [number for part in run.world.mine(parts) for number in part]
    with run.progress(stage, len(mine)) as done:
        compared = fidelity.compare(
            run.model,
            context.make_cache,
            views,
            [conversations[number] for number in mine],
            known=_known(run, data),
            observe=observe,
            progress=done,
        )
    divergences = {name: _of_all(run.world, x, mine) for name, x in compared.items()}
    seen = [zip(numbers, own, strict=True) for numbers, own in run.world.values([mine, calibration.seen])]
    calibration.seen = [Seen(*own) for _, own in sorted(pair for pairs in seen for pair in pairs)]
    if broken := np.flatnonzero(~np.isfinite(divergences["nectar"].kl)).tolist():
        _name_layer(run, make_cache(), conversations[divergences["nectar"].conversation[broken[0]]])
    figures = measured(divergences["nectar"], divergences["no context"] if no_context is None else no_context)
    return figures | {"recall": calibration.report(figures["kl"])}


def _known(run: FitRun, data: Collected) -> fidelity.Known:
    """The full cache's logits, where the last layer's output was kept when an answer was drawn or replayed."""
    finals = {id(data.conversations[i]): of for i, of in data.finals.items()}
    runner = layer_runner(run.model, run.geometry) if finals else None
    if runner is None or not runner.steps_as_it_reads:  # answers were drawn one by one, and are compared read together
        return lambda conversation: None

    def known(conversation: Conversation) -> mx.array | None:
        final = finals.get(id(conversation))
        return None if final is None else runner.logits(final[None])[0, :]

    return known


def _of_all(world: World, divergence: Divergence, mine: Sequence[int]) -> Divergence:
    """The divergences of all ranks in the order of the conversations. mine: the numbers of this one's."""
    numbered = divergence._replace(conversation=np.array(mine, np.int32)[divergence.conversation])
    arrays = {name: mx.array(x) for name, x in numbered._asdict().items()}
    every = [Divergence(**{name: np.array(x) for name, x in of.items()}) for of in world.arrays(arrays)]
    together = fidelity.joined(every)
    return Divergence(*(x[np.argsort(together.conversation, kind="stable")] for x in together))


def _name_layer(run: FitRun, caches: Sequence[LayerCache], conversation: Conversation) -> None:
    """NectarError that names the first layer whose output is not finite, if one layer after the other shows it."""
    runner = layer_runner(run.model, run.geometry)
    if runner is None:
        return
    hidden = runner.embed(mx.array([conversation.prompt + conversation.answer]))
    for layer, cache in enumerate(caches):
        hidden = runner.layer(layer, hidden, cache)
        if not mx.isfinite(hidden).all().item():
            raise NectarError(f"checking: the output of layer {layer} is not finite, so nothing is written")
