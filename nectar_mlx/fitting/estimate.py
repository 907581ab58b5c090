"""What a fit takes, before it is made: seconds of each stage (`work`), memory, and the size of the file."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ..core.clock import duration
from ..core.progress import Stage
from ..errors import NectarError
from .budget import beyond_budget, distills, exceeded, share_of, undistilled
from .config import FitConfig
from .work import AUTO_SHARE, TRAIN_SHARE, Machine, Shape, Work, compute_bytes

QUESTIONS = 1024  # of the window, that questions and answers need
SMALLEST_CHUNK = 64  # tokens of a text that are worth reading at a time
_MOST_CHUNKS = 100_000  # whose stages are listed
_CHECKED_AGAIN = 2 / 3  # of a check, where answers without the text are known
_KEY_BYTES = 1.2  # of a number in the key file, with scales, checksums and sketches
_SHORT = 32  # tokens of a short question and its answer
_READ = 2  # bytes that the decode kernel reads of a byte of a file: nodes of 4 bits are widened to 8


class Estimate(NamedTuple):
    """stages: of the fit, in their order. memory: bytes in use at the same time, weights included. size: bytes of the
    file, and of its keys. disk: bytes that are written besides while the fit runs. chunks: that the text is read in.
    layerwise: whether layer by layer. undistilled, exceeded: as `budget` says. step: bytes of the file that a decoding
    step reads, cache: of the text's bfloat16 keys and values."""

    stages: list[Stage]
    memory: float
    size: float
    disk: float
    chunks: int
    layerwise: bool
    undistilled: str
    exceeded: str
    step: float
    cache: float

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def sentence(self) -> str:
        """For a person."""
        return (
            f"about {duration(self.seconds)}, {_bytes(self.memory)} of memory and {_bytes(self.size + self.disk)} of "
            f"disk, for a file of about {_bytes(self.size)}"
        )


def estimate(
    shape: Shape,
    machine: Machine,
    config: FitConfig,
    tokens: int,
    *,
    chunks: int | None = None,
    machines: int = 1,
    others: bool = False,
) -> Estimate:
    """Of a text of so many tokens. chunks: that it is read in (default: as the model's window says). machines: equal
    ones that share the work. others: whether it is fitted with other files in view, by which it is checked again; their
    few nodes cost little. NectarError for a text that the model's window is too small for."""
    share = share_of(config, shape.geometry, tokens)
    work = Work(
        shape=shape,
        machine=machine,
        config=config,
        n=tokens,
        share=share or AUTO_SHARE,
        layerwise=False,
        machines=machines,
    )
    bank = work.layout.bank
    chunks = chunks or (_chunks(shape, tokens) if bank.fitted else 1)
    n, limit = -(-tokens // chunks), config.memory or machine.memory / 2
    layerwise = bool(config.layerwise)
    if config.layerwise is None and not bank.keeps_keys:
        layerwise = shape.geometry.cache_bytes(n) * compute_bytes(machine) / 2 > limit
    work = replace(work, n=n, layerwise=layerwise)
    way = {"chunks": chunks > 1, "layerwise": layerwise, "others": others}
    work = replace(work, distills=distills(config, work.layout, share, **way))
    stages = list(_excerpt(work)) if share is None and (chunks > 1 or layerwise) else []
    first, later = (
        list(part) for part in (work.parts(choice=chunks == 1), replace(work, machines=1).parts(first=False))
    )
    for number in [
        0,
        *range(1, chunks, machines),
    ]:  # the first one is fitted together, each of the others by one machine
        name = "" if chunks == 1 else f"chunk {number + 1} of {chunks}: "
        stages += [Stage(name + what, seconds) for what, seconds in (later if number else first)]
    if work.distills:
        stages.append(Stage("distilling", work.distillation()))
    if bank.fitted:
        stages.append(Stage("checking", work.check() if chunks == 1 else -(-chunks // machines) * work.check_alone()))
        if others:
            stages.append(Stage("checking", _CHECKED_AGAIN * work.check()))
    kept = work.share * shape.geometry.cache_bytes(tokens)
    windows = shape.geometry.window_bytes(n) * compute_bytes(machine) / 2 if bank.fitted else 0.0
    parts = {"windows": windows, "keys": shape.geometry.cache_bytes(tokens) - shape.geometry.window_bytes(tokens)}
    size = kept + beyond_budget(kept, **parts) + 4 * tokens
    if bank.keeps_keys:
        size += shape.geometry.cache_bytes(tokens) * _KEY_BYTES / 2
    disk, cache = size + chunks * work.kept(), float(shape.geometry.cache_bytes(tokens))
    step = (_READ if work.layout.bits is None else 1) * kept
    reason = undistilled(config, work.layout, share, **way)
    more = exceeded(share, kept, **parts)
    return Estimate(stages, work.memory(), size, disk, chunks, layerwise, reason, more, min(step, cache), cache)


def update_stages(
    shape: Shape, machine: Machine, config: FitConfig, tokens: int, *, kept: float, new: float, checks: int
) -> list[Stage]:
    """Of an update (`updating`) of a text that is fitted at once. config: its steps, check questions and answers. kept,
    new: samples a head of conversations that are replayed, and of those that are sampled. checks: questions about what
    is new."""
    share = share_of(config, shape.geometry, tokens) or AUTO_SHARE
    work = Work(shape=shape, machine=machine, config=config, n=tokens, share=share, layerwise=False)
    replayed, sampled = (samples / (TRAIN_SHARE * work.group) for samples in (kept, new))
    captured = work.seconds(replayed * work.token(vocabulary=False), "capturing")
    sampling = work.decode(sampled, together=max(1, int(sampled / work.conversation)))
    return [
        work.read(),
        Stage("sampling answers", sampling + work.decode(checks * _SHORT, together=checks)),
        Stage("capturing attention", captured),
        Stage("fitting heads", work.regression()),
        Stage("checking", work.check()),
        Stage("checking what is new", work.check() * checks * _SHORT / work.checked),
    ]


def _chunks(shape: Shape, tokens: int) -> int:
    """That a text of so many tokens is read in. NectarError for a window that is too small for any, or a text that is
    longer than any."""
    if (room := shape.window - QUESTIONS) < SMALLEST_CHUNK:
        raise NectarError(f"{shape.name}: its window of {shape.window:,} tokens is too small for a text with questions")
    if (chunks := -(-tokens // room)) > _MOST_CHUNKS:
        raise NectarError(f"{tokens:,} tokens are {chunks:,} chunks for {shape.name}: at most {_MOST_CHUNKS:,}")
    return chunks


def _excerpt(work: Work) -> Iterator[Stage]:
    """Choosing a budget on the first tokens of the text."""
    small = replace(work, n=min(work.n, work.machine.profile.excerpt_tokens), layerwise=False)
    _, *stages, _ = small.stages(sizes=True, choice=True)
    yield from stages


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
