"""Answers while they are written: a sequence of tokens each, and batches of them that are decoded together."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import GenerationBatch, StopSequences
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..answering import Answer, Markers, Piece
from ..answering.sampling import Processor, Sampler
from ..core.types import JsonObject
from ..nectar import Nectar
from ..retrieval.sources import sources_as_json
from .job import Finished, Started, Ticket, TokenLogprob, Written
from .kept import Caches

_ENDLESS = 1 << 62  # what ends a sequence is decided here, not by mlx-lm
T = TypeVar("T")


class AnswerSequence:
    """One answer: its prompt, what of it has been read, its caches, and the text so far.

    nectar: what it is answered from, a chunk of `whole` or all of it. markers: of the model's thoughts. cached: tokens
    of the prompt that the caches hold already. limit: the longest answer in tokens. reserved: bytes that its caches may
    come to have. single: whether it is decoded on its own.
    """

    def __init__(
        self,
        ticket: Ticket,
        nectar: Nectar,
        tokenizer: TokenizerWrapper,
        markers: Markers | None,
        *,
        whole: Nectar,
        chunk: int | None,
        caches: Caches,
        cached: int,
        limit: int,
        reserved: int,
        single: bool,
    ):
        job = ticket.job
        self.ticket, self.nectar, self.chunk, self.caches, self.single = ticket, nectar, chunk, caches, single
        self.prompt, self.read, self.limit, self.reserved = list(job.prompt), cached, limit, reserved
        markers = markers if job.thinks else None
        opened = markers is not None and markers.opened(tokenizer, self.prompt)
        self.answer = Answer(job.stops, markers, opened=opened)
        self.started = Started(len(self.prompt), cached, chunk)
        self.error: Exception | None = None
        self._whole, self._said = whole, list[str]()
        self.count = 0
        self._tokenizer, self._detokenizer = tokenizer, tokenizer.detokenizer
        self._logprobs: list[TokenLogprob] = []
        recall = nectar.logits_processors() if job.recall else []
        made = [*recall, *job.sampling.processors(), *([job.constraint()] if job.constraint else [])]
        self.processors = [self._guarded(processor) for processor in made]
        sampler = job.sampling.sampler()
        self.sampler: Sampler = sampler if job.sampling.greedy else self._guarded_sampler(sampler)

    @property
    def unread(self) -> int:
        """Tokens of the prompt to read before decoding starts with the last one."""
        return len(self.prompt) - 1 - self.read

    def read_piece(self, model: nn.Module, size: int) -> int:
        """Reads at most so many tokens of the prompt; returns how many."""
        piece = self.prompt[self.read : self.read + min(size, self.unread)]
        model(mx.array([piece]), cache=self.caches)
        mx.eval([cache.state for cache in self.caches])
        self.read += len(piece)
        return len(piece)

    def takes_last(self, token: int, logprobs: mx.array) -> bool:
        """Takes the next token and delivers its text; whether the answer has ended with it, or has failed (`error`)."""
        return self.error is not None or self._try(lambda: self._take(token, logprobs), lambda: True)

    def _take(self, token: int, logprobs: mx.array) -> bool:
        self.count += 1
        ended, piece = token in self._tokenizer.eos_token_ids, Piece()
        if not ended:
            self._note(token, logprobs)
            self._detokenizer.add_token(token)
            piece = self.answer.feed(self._detokenizer.last_segment)
        cut = self.count >= self.limit
        if (ended or cut) and not self.answer.stopped:
            self._detokenizer.finalize()
            last, rest = self.answer.feed(self._detokenizer.last_segment), self.answer.finish()
            piece = Piece(piece.thoughts + last.thoughts + rest.thoughts, piece.answer + last.answer + rest.answer)
        stopped = ended or self.answer.stopped
        if any(piece) or self._logprobs:
            self._said.append(piece.answer)
            self.ticket.deliver(Written(piece.answer, piece.thoughts, self._logprobs))
            self._logprobs = []
        if stopped or cut:
            self.ticket.deliver(Finished("stop" if stopped else "length", self.count, self._read_of_text()))
        return stopped or cut

    def _read_of_text(self) -> JsonObject:
        """What the answer read of the text's exact keys; its sources, where it did or they are asked for."""
        read, job = self.nectar.hybrid.reading(self.caches) if self.single else {}, self.ticket.job
        if not read and not job.sources:
            return {}
        question, caches = next(iter(job.questions), ""), self.caches if self.single else ()
        answer = "".join(self._said)
        self._whole.about(*job.about)  # which is another one's after another question
        found = self._whole.sources(self._tokenizer, question, answer, caches=caches, chunk=self.chunk)
        return read | {"sources": sources_as_json(found)}

    def _note(self, token: int, logprobs: mx.array) -> None:
        """Notes the token's log-probability, where it is asked for."""
        count = self.ticket.job.top_logprobs
        if count is None:
            return
        # All at once: to ask MLX for each would take longer than a step.
        numbers = np.array(logprobs.astype(mx.float32))
        likeliest = np.argsort(-numbers, kind="stable")[:count].tolist()
        text, *alternatives = (self._tokenizer.decode([i]) for i in (token, *likeliest))
        top = [(other, _finite(numbers[i])) for other, i in zip(alternatives, likeliest, strict=True)]
        self._logprobs.append(TokenLogprob(text, _finite(numbers[token]), top))

    def _guarded(self, processor: Processor) -> Processor:
        """An error in it ends this answer alone."""
        return lambda tokens, logits: self._try(lambda: processor(tokens, logits), lambda: logits)

    def _guarded_sampler(self, sampler: Sampler) -> Sampler:
        return lambda logprobs: self._try(lambda: sampler(logprobs), lambda: greedy_sampler(logprobs))

    def _try(self, work: Callable[[], T], otherwise: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            self.error = self.error or error
            return otherwise()


def _finite(logprob: float) -> float:
    """-inf is no JSON."""
    return max(float(logprob), -9999.0)


class Batch:
    """Sequences that are decoded together by mlx-lm's `GenerationBatch`, whatever their contexts; those of one context
    stay side by side. One that is served on its own is a batch of one, and keeps the caches that it has."""

    def __init__(self, model: nn.Module, first: Sequence[AnswerSequence]):
        self._model, self._size_class = model, size_class(first[0])
        self.single = first[0].single
        self.members = [first[i] for i in _side_by_side(first)]
        self._batch = self._of(self.members)

    def takes(self, sequence: AnswerSequence) -> bool:
        """Whether a sequence can join: neither is to be alone, and it is not of very different length."""
        return not (self.single or sequence.single) and self._size_class == size_class(sequence)

    def join(self, sequences: Sequence[AnswerSequence]) -> None:
        self._batch.extend(self._of(sequences))
        self.members.extend(sequences)
        order = _side_by_side(self.members)
        if order != sorted(order):
            self._keep(order)

    def step(self) -> list[AnswerSequence]:
        """One token for each member; returns those whose answers have ended, or failed (`error`)."""
        responses = zip(self.members, self._batch.next(), strict=True)
        return [member for member, response in responses if member.takes_last(response.token, response.logprobs)]

    def caches_of(self, member: AnswerSequence) -> tuple[Sequence[int], Caches]:
        """A member's tokens that have been read, and the caches that hold them."""
        at = self.members.index(member)
        tokens: list[int] = self._batch.tokens[at]
        return tokens, member.caches if self.single else self._batch.extract_cache(at)

    def remove(self, members: Sequence[AnswerSequence]) -> None:
        keep = [i for i, member in enumerate(self.members) if member not in members]
        if not keep:
            self.members = []
        elif len(keep) < len(self.members):
            self._keep(keep)

    def _keep(self, places: Sequence[int]) -> None:
        self._batch.filter(places)
        self.members = [self.members[i] for i in places]

    def _of(self, sequences: Sequence[AnswerSequence]) -> Any:
        """Their first tokens are computed at once."""
        if self.single:
            caches = sequences[0].caches
        else:
            layers = zip(*(sequence.caches for sequence in sequences), strict=True)
            caches = [layer[0].merge(layer) for layer in layers]
            for sequence in sequences:
                sequence.caches = []  # the batch has them
        return GenerationBatch(
            model=self._model,
            uids=[id(sequence) for sequence in sequences],
            inputs=mx.array([sequence.prompt[-1] for sequence in sequences]),
            prompt_cache=caches,
            tokens=[sequence.prompt[:-1] for sequence in sequences],
            samplers=[sequence.sampler for sequence in sequences],
            fallback_sampler=greedy_sampler,
            logits_processors=[sequence.processors for sequence in sequences],
            stop_sequences=[StopSequences() for _ in sequences],
            max_tokens=[_ENDLESS] * len(sequences),
        )


def _side_by_side(members: Sequence[AnswerSequence]) -> list[int]:
    """An order in which those of one context are neighbours; contexts are in the order in which they came."""
    places: dict[int, int] = {}
    for member in members:
        places.setdefault(id(member.nectar), len(places))
    return sorted(range(len(members)), key=lambda i: places[id(members[i].nectar)])


def size_class(sequence: AnswerSequence) -> int:
    """A batch pads all caches to its longest: prompts of up to 1,024 tokens share one, up to 4,096, and so on."""
    return (max(0, len(sequence.prompt) - 1) >> 10).bit_length() + 1 >> 1
