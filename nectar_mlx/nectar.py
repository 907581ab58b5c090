"""The fitted object: what a model needs to answer about one context."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from . import store
from .core.progress import Progress, silent
from .core.types import JsonObject, LayerCache, Tokenizer
from .documents import Reading
from .errors import NectarError
from .heads import Bank
from .kernels import DecodeKernel
from .mlxlm import attention_patch, prompts
from .mlxlm.kept import make_caches
from .models import hub
from .models.sharding import shard_of
from .nectar_file import NectarFile
from .retrieval import HybridBank, HybridContext, citing, find_keys, recording
from .retrieval.citing import Cited
from .retrieval.first_sentence import first_sentence
from .retrieval.fitted_text import About, FittedText
from .retrieval.likelihood import log_likelihood
from .retrieval.passages import Passages
from .retrieval.recall import Recall
from .retrieval.sources import Source
from .store import chunking, load, sharding
from .store import text as kept_text


class Nectar(NectarFile):
    """A long context, fitted: per layer and KV head a function of the query that stands for the context's keys and
    values (Nectar, arXiv 2605.09778).

    Attributes: those of a `NectarFile`, and `hybrid`: the banks that read exact keys, and what answers read of them.
    """

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Tokenizer,
        text: str,
        *,
        budget: float | str = "auto",
        progress: Progress = silent,
        others: Sequence["Nectar"] = (),
        **options: Any,
    ) -> Self:
        """Fits a text.

        Args:
            model, tokenizer: of `mlx_lm.load`.
            text: what answers are to be about.
            budget: bytes kept / bytes of the bf16 KV cache, as a number or as "2%"; a size such as "20M"; or "auto",
                the smallest at which answers are expected to be close to those with the full text.
            progress: whom the fit reports to (`core.progress`); `Overall` makes one of all stages.
            others: files that are in view, before the text, in its conversations and in the loss: for
                `compose([*others, fitted], model)`.
            options: fields of `fitting.config.FitConfig`.

        NectarError for a text, budget, option or model that cannot be fitted, and for others that cannot be put
        together with it.
        """
        from .fitting.config import FitConfig, parse_budget
        from .fitting.pipeline import fit

        chosen = parse_budget(budget) if isinstance(budget, str) else {"budget": budget}
        config = FitConfig(**chosen, **options)
        return cls(*fit(model, tokenizer, text, config=config, progress=progress, others=others))

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, tokenizer: Tokenizer | None = None, *, like: JsonObject | None = None
    ) -> Self:
        """Reads a .nectar to answer from: a file, or one on the hub (user/name). like: the metadata of one that
        was loaded with this model and tokenizer: where both name the same, it is not computed again that they fit.
        Of a model that is divided among ranks (`models.sharding`) it has the heads of this one's part.

        NectarError unless it is whole and was fitted on this very model (and tokenizer, if one is given). Warns where
        the keys beside it are missing or damaged: then no key is read exactly.
        """
        nectar = cls.read(path)
        if (shard := shard_of(model)) is not None:
            nectar = cls(*sharding.part(nectar.tensors, nectar.metadata, rank=shard.rank, size=shard.size))
        if like is None or not load.same_model(nectar.metadata, like):
            load.check_model(path, nectar.metadata, model, tokenizer)
        nectar.windows = load.as_computed(nectar.windows, model)
        if nectar.is_hybrid:
            shape = (len(nectar.banks), nectar.geometry.n_kv_heads, len(nectar.prefix))
            keys = find_keys(hub.nectar_file(path), nectar.digest)
            nectar.keys = load.key_file(keys, nectar=nectar.digest, shape=shape, head_dim=nectar.geometry.head_dim)
        return nectar

    def make_cache(self, *, kv_bits: int | None = None, exact_fraction: float | None = None) -> list[Any]:
        """Fresh caches for mlx-lm, one a layer, that start behind the context.

        Args:
            kv_bits: 4 or 8 quantizes the keys and values of what follows the context; None keeps the model's type.
            exact_fraction: of the context's keys, read exactly at each step, at most; in [0, 1]. None is 0.01 where
                there is a file of keys, else 0.

        NectarError for another number, or where there are no keys to read.
        """
        if banks := self.hybrid_banks(exact_fraction):
            make = recording(self.hybrid.record(len(banks)))
            return make_caches(banks, self.windows, self.start, kv_bits=kv_bits, make=make)
        return make_caches(self._without_retrieval, self.windows, self.start, kv_bits=kv_bits, kernels=self._kernels)

    def hybrid_banks(self, exact_fraction: float | None = None) -> Sequence[HybridBank]:
        """The banks that read a fraction of the keys exactly, one a layer; see `make_cache`. None without keys."""
        return self.hybrid.banks(exact_fraction)

    def sources(
        self,
        tokenizer: Tokenizer,
        question: str,
        answer: str,
        *,
        caches: Sequence[LayerCache] = (),
        chunk: int | None = None,
        count: int = 3,
    ) -> list[Source]:
        """The passages of the text that say what an answer says, the best first, at most `count`.

        caches: those that the answer was written with, token by token; where they read exact keys, attention counts.
        chunk: the one that it was answered from (from 0); None for the whole text.
        """
        attention = self.hybrid.attended(caches, self.passages(tokenizer))
        return self._text.sources(tokenizer, question, answer, attention=attention, chunk=chunk, count=count)

    def about(self, document: str, number: int | None = None) -> None:
        """Answers are about this one of the documents in the text: sources name no other, if the text holds it.
        number: its place (from 0) among them, where it may have been renamed since."""
        self._text.about = About(document, number)

    def cite(self, tokenizer: Tokenizer, question: str, answer: str, found: Sequence[Source]) -> Cited:
        """The answer with a mark behind each sentence: the source that supports it, or that none does."""
        return citing.cite(self.passages(tokenizer), question, answer, found)

    def text(self, tokenizer: Tokenizer) -> Reading:
        """The text that it stands for, with its documents and their pages, chapters, sheets, mails; of one chunk the
        whole text, which places are counted in.

        NectarError if what the file holds of them is damaged.
        """
        return self._text.reading(tokenizer)

    def passages(self, tokenizer: Tokenizer) -> Passages:
        """The passages of `text`; made once, for a file belongs to one tokenizer."""
        return self._text.passages(tokenizer)

    def keep(self, reading: Reading, tokenizer: Tokenizer) -> None:
        """Keeps in the report which documents it was fitted to, so that sources can name them."""
        self.report |= kept_text.keep(reading, tokenizer, self.prefix)

    def prompt(
        self,
        tokenizer: Tokenizer,
        messages: str | Sequence[prompts.Message],
        *,
        tools: Sequence[JsonObject] | None = None,
        **template: Any,
    ) -> list[int]:
        """The token ids that follow the prefix, up to where the answer starts.

        messages: a question, or a conversation in mlx-lm's form. tools: functions that the model may call, in OpenAI's
        form. template: arguments of the chat template.
        """
        return prompts.prompt(tokenizer, messages, tools=tools, **template)

    def logits_processors(self) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """For one conversation with mlx-lm: recall (`retrieval.recall`), where the fit found that it helps; else none.

        mlx_lm.generate(…, prompt_cache=nectar.make_cache(), logits_processors=nectar.logits_processors())
        """
        return [self.recall.processor(self.prefix)] if self.recall.weight else []

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, every mlx-lm entry point that makes a cache for the model starts behind the context."""
        with attention_patch.attached(model, self.make_cache):
            yield model

    def nearest(self, tokenizer: Tokenizer, question: str) -> int | None:
        """The number (from 0) of the chunk that a question is about, by its words (BM25).

        None where no word tells, where there are no chunks, and where sliding-window layers keep the last one alone.
        """
        return self._text.nearest(tokenizer, question) if self.chunks and not self.windows else None

    def log_likelihood(self, model: nn.Module, prompt: Sequence[int]) -> float:
        """How likely a prompt is behind the context, in nats. prompt: the token ids of `prompt`."""
        return log_likelihood(model, self.make_cache(), prompt)

    def first_sentence(self, model: nn.Module, tokenizer: Tokenizer, question: str) -> str:
        """The first sentence of the likeliest answer, at most 24 tokens; from the nearest chunk, where there is one."""
        number = self.nearest(tokenizer, question)
        part = self if number is None else self.chunk(number)
        return first_sentence(model, tokenizer, part.make_cache(), self.prompt(tokenizer, question))

    def likeliest_chunk(self, model: nn.Module, tokenizer: Tokenizer, question: str) -> int | None:
        """The number (from 0) of the chunk behind which a question is likeliest; reads it once a chunk.

        None where there are no chunks, and where sliding-window layers keep the last one alone.
        """
        if not self.chunks or self.windows:
            return None
        prompt = self.prompt(tokenizer, question)
        return max(range(len(self.chunks)), key=lambda number: self.chunk(number).log_likelihood(model, prompt))

    def chunk(self, number: int) -> "Nectar":
        """One chunk of the text (from 0), as if it alone had been fitted.

        NectarError if there is none of that number, or where sliding-window layers keep the last chunk alone.
        """
        if self.windows:
            raise NectarError("this model's layers with a sliding window keep the last chunk alone: use all of them")
        tensors = chunking.take(self.layout, self.tensors, self._ids, number)
        report = {name: value for name, value in self.report.items() if name not in kept_text.KEYS}
        own = {"chunks": [], "report": report, "prefix_sha256": store.prefix_digest(tensors)}
        part = type(self)(tensors, self.metadata | own)
        part._text = self._text.of_chunk(number)
        return part

    @cached_property
    def recall(self) -> Recall:
        """How much of the text's own wording counts where an answer quotes it, as the fit found best."""
        return Recall.of(self.report)

    @cached_property
    def hybrid(self) -> HybridContext:
        return HybridContext(self.banks, self.keys, self.geometry, nbytes=self.nbytes)

    @cached_property
    def _text(self) -> FittedText:
        return FittedText(self._ids, self.report, name=str(self.metadata.get("source") or ""))

    @cached_property
    def _without_retrieval(self) -> list[Bank]:
        """The banks as they answer without retrieval."""
        return [bank.without_retrieval() for bank in self.banks]

    @cached_property
    def _kernels(self) -> list[DecodeKernel] | None:
        return load.decode_kernels(self._without_retrieval, self.layout, self.tensors)
