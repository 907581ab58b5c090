"""Which job may start, and with which caches: files, kept prompts and answers share one bound on memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..answering import Markers
from ..mlxlm.attention_patch import can_batch, compute_type
from ..mlxlm.window import answer_tokens
from ..nectar import Nectar
from .decoding import AnswerSequence
from .job import Ticket
from .kept import Caches, KeptPrompts
from .shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Settings:
    """concurrency: answers written at a time. max_open: requests that may be open, the waiting ones included.
    prefill_step: tokens of a prompt that are read at a time, at most. kv_bits: of the live tokens' caches; answers are
    then decoded one by one. exact: the default share of keys to read. kept_prompts, kept_bytes: bounds of what is kept
    for a conversation's next turn. memory: bytes for open files, kept prompts and answers; None for half of what is
    free once the model is loaded.
    """

    concurrency: int = 32
    max_open: int = 512
    prefill_step: int = 512
    kv_bits: int | None = None
    exact: float | None = None
    kept_prompts: int = 32
    kept_bytes: int = 1 << 62
    memory: int | None = None


class Admission:
    """Turns tickets into sequences."""

    def __init__(self, shelf: Shelf, kept: KeptPrompts, settings: Settings):
        self._shelf, self._kept, self._settings = shelf, kept, settings
        self._markers = Markers.of(shelf.tokenizer)  # looks through the vocabulary
        self._memory = settings.memory or _half_of_free()
        self._token_bytes = compute_type(shelf.model).size / 2  # relative to bfloat16
        self._batches = can_batch(shelf.model)

    def sequence(self, ticket: Ticket, active: Sequence[AnswerSequence]) -> AnswerSequence | None:
        """A job with its caches; None while there is no room for them beside the active ones. NectarError for a job
        that cannot be done."""
        job, shelf = ticket.job, self._shelf
        nectar = whole = shelf.get(job.name)
        chunks = (nectar.nearest(shelf.tokenizer, question) for question in job.questions)
        chunk = next((number for number in chunks if number is not None), None)
        if chunk is None and job.questions:  # no word tells
            chunk = nectar.likeliest_chunk(shelf.model, shelf.tokenizer, job.questions[0])
        if chunk is not None:
            nectar = shelf.get(job.name, chunk)
        limit = answer_tokens(
            shelf.model,
            start=nectar.start,
            prompt=len(job.prompt),
            chosen=job.max_tokens,
            default=job.default_tokens,
        )
        reserved = int(self._token_bytes * nectar.geometry.cache_bytes(len(job.prompt) + limit))
        if not self._make_room(reserved, sum(sequence.reserved for sequence in active)):
            return None
        caches, cached, single = self._caches(nectar, ticket)
        return AnswerSequence(
            ticket,
            nectar,
            shelf.tokenizer,
            self._markers,
            whole=whole,
            chunk=chunk,
            caches=caches,
            cached=cached,
            limit=limit,
            reserved=reserved,
            single=single,
        )

    def _caches(self, nectar: Nectar, ticket: Ticket) -> tuple[Caches, int, bool]:
        """Caches for a job, how many tokens of its prompt they hold, and whether it is decoded on its own."""
        exact = self._settings.exact if ticket.job.exact is None else ticket.job.exact
        single = bool(nectar.hybrid_banks(exact)) or self._settings.kv_bits is not None or not self._batches
        kept, cached = self._kept.find(nectar, ticket.job.exact, ticket.job.prompt)
        if kept is None:
            return nectar.make_cache(kv_bits=self._settings.kv_bits, exact_fraction=exact), 0, single
        nectar.hybrid.forget(kept)
        return kept, cached, single

    def _make_room(self, nbytes: int, used: int) -> bool:
        """Drops kept prompts, then files, until so many bytes fit beside those that are used; always true where nothing
        else runs."""
        room = self._memory - used - nbytes
        self._kept.shrink(max(0, room - self._shelf.nbytes))
        self._shelf.shrink(max(0, room))
        return used == 0 or self._shelf.nbytes <= room


def _half_of_free() -> int:
    import psutil

    return cast("int", cast("Any", psutil).virtual_memory().available) // 2
