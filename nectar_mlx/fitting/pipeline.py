"""Fitting: a text goes in, what a .nectar holds comes out.

read the text once -> sample questions and answers about it -> capture what attention sees in them -> decide each
head's size -> start every head from Attention Matching at its own size -> regress -> round, and train on meanwhile ->
check

Where the text does not fit the model's window, or its keys and values the memory: chunks.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .. import store
from ..core.clock import Clock
from ..core.files import free_space
from ..core.progress import Log, Overall, Progress, no_log, silent
from ..core.types import JsonObject, Tokenizer
from ..errors import NectarError
from ..heads import AUTO, Bank
from ..mlxlm import attention_patch, prompts
from ..mlxlm.kept import plain_windows
from ..mlxlm.window import window
from ..store import chunking, load
from ..store.kv_file import KeyFile
from . import chunks, finite, verdict
from . import others as other_files
from .budget import affordable_bytes, share_of
from .check import check
from .checkpoint import Checkpoint
from .config import FitConfig
from .distributed import World
from .estimate import QUESTIONS, SMALLEST_CHUNK, estimate
from .kinds import HybridFit
from .machines import here, shape_of
from .others import OtherFile, Others
from .prefill import read_text
from .run import FitRun, identity
from .samples import kept_study
from .stages import fit_context
from .state_bits import coded_states
from .train import merged_errors

LONG = 600.0  # seconds of a fit that is announced


def fit(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    *,
    config: FitConfig,
    name: str = "",
    source: str = "",
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
    log: Log = no_log,
    world: World | None = None,
    others: Sequence[OtherFile] = (),
) -> tuple[store.Tensors, store.Metadata, KeyFile | None]:
    """Fits a text -> what a Nectar is made of; see the module's first lines.

    name, source: what the file says of the model and the text. checkpoint: where an interrupted fit leaves its work,
    and a resumed one finds it. log: is told before it takes long. world: the processes that share the work; all of them
    call this, and get the same. others: files that are in view, before the text, in its conversations and in the loss.
    NectarError for a text, budget or model that cannot be fitted, and for files that cannot be put together with it.
    """
    clock, keys = Clock(), None
    mx.reset_peak_memory()
    finite.check_weights(model)
    if not text.strip():
        raise NectarError("the text is empty")
    run = FitRun(
        model=model,
        tokenizer=tokenizer,
        geometry=attention_patch.route(model),
        config=config,
        progress=progress,
        checkpoint=checkpoint or Checkpoint(None),
        facts=identity(model, tokenizer, text) | other_files.digests(others),
        world=world or World(),
        others=others,
    )
    other_files.check(others, model=run.facts["model"], kind=run.layout.kind)
    whole = prompts.prefix(tokenizer, text)
    prefix = whole if config.context_tokens is None else prompts.cut(tokenizer, whole, config.context_tokens)
    run = _agreed(run)
    run.claim(prefix)
    free = run.checkpoint.decided("memory", lambda: run.free)
    run = replace(run, free=min(run.world.values(free)))
    lengths = _chunk_lengths(run, prefix)
    _announce(run, len(prefix), len(lengths), name=name, log=log)
    provenance = run.provenance(model=name or getattr(tokenizer, "name_or_path", ""), source=source)
    layerwise = needs_layers(run, len(prefix) - sum(lengths) + max(lengths))
    in_pieces = len(lengths) > 1 or layerwise
    _check_room(run, prefix, in_pieces=in_pieces)
    if in_pieces:
        tensors, report = chunks.fit(run, prefix, chunks=lengths, layerwise=layerwise, clock=clock)
    else:
        tensors, report, keys = _fit_whole(run, prefix, text=text, clock=clock)
    judge(run, tensors, report, tokens=len(prefix))
    if left_out := len(whole) - len(prefix):
        report["left_out_tokens"] = left_out
    report["seconds"] = clock.laps
    report["peak_memory"] = int(mx.get_peak_memory())
    metadata = store.description(
        tensors, run.layout, run.geometry, provenance=provenance, report=report, chunks=lengths
    )
    return tensors, metadata, keys


def judge(run: FitRun, tensors: store.Tensors, report: JsonObject, *, tokens: int) -> None:
    """Adds to a report the verdict on its figures, where they allow one. tokens: that the tensors stand for."""
    kept = sum(x.nbytes for name, x in tensors.items() if name not in ("prefix", kept_study.TENSOR))
    if sentence := verdict.sentence(report, share=kept / run.geometry.cache_bytes(tokens)):
        report["verdict"] = sentence


def _agreed(run: FitRun) -> FitRun:
    """The run with what the memory of each machine would decide otherwise: as the smallest allows."""
    if run.world.size == 1:
        return run
    samples = min(run.world.values(run.n_samples(run.n_heads)))
    return replace(run, config=replace(run.config, queries=samples))


def _fit_whole(
    run: FitRun, prefix: Sequence[int], *, text: str, clock: Clock
) -> tuple[store.Tensors, JsonObject, KeyFile | None]:
    """All layers of all of the text at once -> tensors and report, and the file of keys, where the kind has one."""
    others = Others.before(prefix, run.others, run.model, run.geometry)
    share = share_of(run.config, run.geometry, len(prefix))
    affordable = partial(
        affordable_bytes, geometry=run.geometry, layout=run.layout, n=len(prefix), at_least=share is None
    )
    if run.layout.bank.trainable and share is not None:
        affordable(share)  # one that is too small is refused before anything takes long
    with run.progress("reading", len(prefix)) as done:
        context = read_text(run.model, prefix, run.geometry, prefill=run.config.prefill, world=run.world, progress=done)
    clock.lap("read")
    finite.check_banks("reading", context.banks, run.geometry)
    finite.check_logits(run.model(mx.array([prefix[-1:]]), cache=context.make_cache()))
    if others is not None:
        plain_windows(run.geometry, context.windows, "put together")
        context = replace(context, others=others)
    contents = partial(store.contents, prefix=prefix, offsets=context.offsets, shared=run.world.shared)
    if not run.layout.bank.fitted:
        heads = [head for bank in context.banks for head in bank.unstack()]
        return contents(run.layout, heads, windows=context.windows), {}, None
    kind, plan, heads = fit_context(run, context, affordable, share, clock=clock)
    windows, state = coded_states(run, kind.data)
    tensors, keys = contents(run.layout, heads, windows=windows), None
    if run.config.keep_study:  # before the keys, which belong to these very tensors
        tensors[kept_study.TENSOR] = kept_study.packed(kind.data.conversations)
    banks: Sequence[Bank] = load.banks(run.layout, tensors, trusted=True)
    finite.check_banks("rounding", banks, run.geometry)
    if isinstance(kind, HybridFit):
        keys = kind.key_file(text, nectar=store.digest(tensors))
        banks = kind.reading_banks(banks, keys)
        clock.lap("keys")
    report: JsonObject = {
        "budget": plan.share,
        "sizes": plan.sizes,
        "queries": kind.data.train.count,
        "error": merged_errors(kind, banks),
    }
    report |= {"ahead": kind.data.furthest}
    report |= ({"exponent": plan.exponent} if plan.exponent else {}) | ({"state": state} if state else {})
    alone = kind.data if others is None else replace(kind.data, context=replace(context, others=None), finals={})
    report |= check(run, alone, banks, windows=windows)
    if others is not None:
        figures = check(run, kind.data, banks, windows=windows, no_context=report["kl_no_context"])
        report |= {"with": other_files.names(run.others), "kl_with": figures["kl"], "agree_with": figures["agree"]}
    clock.lap("check")
    return tensors, report, keys


def _check_room(run: FitRun, prefix: Sequence[int], *, in_pieces: bool) -> None:
    """NectarError where other files are to be in view and there is no room for them, or for the text itself."""
    if not run.others:
        return
    if in_pieces:
        raise NectarError(other_files.ALONE)
    tokens, positions = other_files.tokens(prefix, run.others), window(run.model)
    if positions is not None and tokens + QUESTIONS > positions:
        raise NectarError(
            f"together the texts take {tokens:,} tokens; the model's window of {positions:,} leaves room for "
            f"{max(0, positions - QUESTIONS):,}: leave out --with"
        )


def _announce(run: FitRun, tokens: int, chunks: int, *, name: str, log: Log) -> None:
    """Tells what the fit is expected to take: the progress, a person where it is long, where an effort is not made as a
    whole or the file will be larger than its budget, and NectarError where the disk has no room for it."""
    shape = shape_of(run.model, run.geometry, name)
    expected = estimate(shape, here(), run.config, tokens, chunks=chunks, others=bool(run.others))
    if run.checkpoint.folder is not None:
        folder = run.checkpoint.folder.parent.resolve()
        needed, free = expected.size + expected.disk, free_space(folder)
        if needed > free:
            raise NectarError(
                f"the fit writes about {needed / 1e6:,.1f} MB; {folder} has room for {free / 1e6:,.1f} MB: free some, "
                "or choose another --output"
            )
    if isinstance(run.progress, Overall):
        run.progress.expect(expected.stages)
    for line in filter(None, (expected.undistilled, expected.exceeded)):
        log(line)
    if expected.seconds > LONG:
        log(f"this takes {expected.sentence()}")


def in_parts(run: FitRun, prefix: Sequence[int]) -> bool:
    """Whether a fit takes a prefix chunk by chunk or layer by layer."""
    return len(_chunk_lengths(run, prefix)) > 1 or needs_layers(run, len(prefix))


def needs_layers(run: FitRun, n: int) -> bool:
    """Whether the fit goes layer by layer: when that was chosen, or when the KV cache would not fit the memory."""
    config, kind = run.config, run.layout.bank
    if config.layerwise and kind.keeps_keys:
        raise NectarError(
            f"kind {config.kind} keeps the text's keys, and --layerwise forgets them: leave one of them out"
        )
    if config.layerwise is not None or kind.keeps_keys:
        return bool(config.layerwise)
    cache_bytes = run.geometry.cache_bytes(n) * attention_patch.compute_type(run.model).size // 2
    return cache_bytes > run.memory


def _chunk_lengths(run: FitRun, prefix: Sequence[int]) -> list[int]:
    """The lengths of the chunks in which the document fits the model's window; one, wherever it can be."""
    preamble, positions = prompts.preamble(run.tokenizer), window(run.model)
    room = (positions or 1 << 62) - preamble - QUESTIONS
    tokens = len(prefix) - preamble
    if not run.layout.bank.fitted or tokens <= room:
        return [tokens]
    if room < SMALLEST_CHUNK:
        raise NectarError(
            f"the model's window of {positions:,} tokens is too small: beside a text, questions and answers take "
            f"{QUESTIONS:,}"
        )
    if not run.layout.bank.joinable:
        raise NectarError(
            f"the text has {len(prefix):,} tokens; the model's window of {positions:,} leaves room for {room:,}: "
            f"cut it with --context-tokens {room}, or fit it chunk by chunk with --kind {AUTO}"
        )
    return chunking.split(tokens, room)
