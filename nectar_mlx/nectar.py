"""The fitted object: what a model needs to answer about one context."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from heapq import nlargest
from itertools import islice
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import models, store
from .core.bm25 import Index
from .errors import NectarError
from .fitting import verdict
from .heads import Bank, HybridHead
from .kernels.packing import Packed
from .mlxlm import attention_patch, prompts
from .mlxlm.attention_patch import Geometry
from .mlxlm.cache import Window, make_caches
from .models import hub
from .retrieval import EXACT, HybridBank, KeyFile, Record, hybrid_banks, kv_path, recorded, recording
from .retrieval.router import Router, routers
from .retrieval.sources import Source, passages
from .store import Layout, load


class Nectar:
    """A long context, fitted: per layer and KV head a function of the query that stands for it.

    Attributes: `prefix`, the token ids it stands for (positions 0 … n-1); `banks`, head functions, a bank for each
    layer with full attention; `windows`, what the other layers keep; `keys`, the file of exact keys and values beside
    it, where there is one; `report`, what was measured while fitting; `metadata`, where it came from.
    """

    def __init__(self, tensors: store.Tensors, metadata: store.Metadata, keys: KeyFile | None = None):
        """tensors, metadata: what a file holds (`store.contents`, `store.description`). keys: what stands beside it."""
        self._tensors, self.metadata, self.keys = tensors, metadata, keys
        self.geometry = Geometry.from_dict(metadata["geometry"])
        self.layout = Layout(**metadata["layout"])
        self.prefix: list[int] = np.array(tensors["prefix"]).tolist()
        self.report: dict[str, Any] = metadata["report"]
        self.banks = load.banks(self.layout, tensors)
        self._retrieving: dict[float, Sequence[HybridBank]] = {}
        # Of all chunks: the index, how many passages each has, the words that do not count.
        self._passages: tuple[Index, list[int], set[str]] | None = None
        self.chunks = _chunks(metadata.get("chunks", []), len(self.prefix))
        self.windows = _windows(tensors, self.geometry, self.start)
        if len(self.banks) != len(self.geometry.fitted):
            raise NectarError("the file is damaged: its heads are not those of its model")

    @classmethod
    def fit(cls, model: nn.Module, tokenizer: Any, text: str, *, budget: float | str = "auto", **options: Any) -> Self:
        """Fits a text.

        budget: bytes kept / bytes of the bf16 KV cache, as a number or as "2%"; a size such as "20M"; or "auto", the
        smallest at which answers are expected to be close to the full text's. Options: see `fitting.config.FitConfig`.
        """
        from .fitting.config import FitConfig, parse_budget
        from .fitting.pipeline import fit

        chosen = parse_budget(budget) if isinstance(budget, str) else {"budget": budget}
        return cls(*fit(model, tokenizer, text, config=FitConfig(**chosen, **options)))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: Any = None) -> Self:
        """Reads a .nectar: a file, or one on the hub (user/name).

        NectarError unless it is whole and was fitted on this very model (and tokenizer, if one is given).
        """
        nectar = cls.read(path)
        metadata = nectar.metadata
        geometry = attention_patch.route(model)
        if geometry != nectar.geometry or models.fingerprint(model) != metadata["model_sha256"]:
            raise NectarError(
                f"{path} was fitted on {metadata['model']}, which is not the model given: load that one, or fit again"
            )
        if tokenizer is not None and models.tokenizer_fingerprint(tokenizer) != metadata["tokenizer_sha256"]:
            raise NectarError(
                f"{path} was fitted with another tokenizer or chat template than the one given: fit again"
            )
        dtype = attention_patch.compute_type(model)
        nectar.windows = {
            i: Window(w.keys.astype(dtype), w.values.astype(dtype), w.size) for i, w in nectar.windows.items()
        }
        mx.eval([w[:2] for w in nectar.windows.values()])  # in this thread: MLX's streams are a thread's own
        if nectar.is_hybrid:
            nectar._open_keys(kv_path(hub.nectar_file(path)))
        return nectar

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The same without a model to check it against: to look at, not to answer from."""
        tensors, metadata = store.read(hub.nectar_file(path))
        try:
            return cls(tensors, metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise NectarError(f"{path} is damaged: {error}") from None

    def _open_keys(self, path: Path) -> None:
        """Answers come from the summary alone, with a warning, where the keys cannot be used."""
        shape = (len(self.banks), self.geometry.n_kv_heads, len(self.prefix))
        try:
            self.keys = KeyFile.open(path, nectar=self.digest, shape=shape)
        except NectarError as error:
            warnings.warn(f"{error}: answering from the .nectar alone, no key is read exactly", stacklevel=3)

    def save(self, path: str | Path) -> None:
        """Writes a .nectar, and its keys beside it, in one step each; NectarError if the path holds something else,
        or cannot be written."""
        path = Path(path)
        store.check_writable(path)
        if self.keys is not None:
            self.keys.write(kv_path(path))
        store.write(path, self._tensors, self.metadata)

    def make_cache(self, *, kv_bits: int | None = None, exact: float | None = None) -> list[Any]:
        """Fresh caches, one a layer, that start behind the context.

        kv_bits: 4 or 8 quantises what comes after it. exact: the share of the context's keys that a step reads
        exactly, at most (default: 0.01 where there is a file of keys, else 0). NectarError if there is none.
        """
        context = self.start
        if banks := self.hybrid_banks(exact):
            record = Record(context, len(banks))
            return make_caches(banks, self.windows, context, kv_bits=kv_bits, make=recording(record))
        return make_caches(self._without_retrieval, self.windows, context, kv_bits=kv_bits, packed=self._packed)

    def sources(self, caches: Sequence[Any], *, count: int = 3) -> list[Source]:
        """The passages whose keys took the most exact attention since `forget_reading`, while tokens were written one
        by one with these caches; none without a file of keys, or in a batch."""
        record = recorded(caches)
        return [] if record is None or self.keys is None else passages(self.keys.small, record.mass, count=count)

    def reading(self, caches: Sequence[Any]) -> dict[str, Any]:
        """The sources, and the bytes that were read for a token: keys and values, router, summary. For JSON."""
        record = recorded(caches)
        if record is None:
            return {}
        told = [asdict(source) for source in self.sources(caches)]
        return {"sources": told, "bytes_read_per_token": record.bytes_per_token}

    def forget_reading(self, caches: Sequence[Any]) -> None:
        """Before an answer of its own in a conversation that goes on."""
        if (record := recorded(caches)) is not None:
            record.clear()

    def hybrid_banks(self, exact: float | None = None) -> Sequence[HybridBank]:
        """The banks that read a share of the keys exactly; none if that is not one key a head."""
        if exact is not None and not 0 <= exact <= 1:
            raise NectarError(f"exact = {exact:g} is not in [0, 1]: it is the share of the keys to read at each step")
        if self.keys is None:
            if exact:
                raise NectarError("there are no exact keys beside this file: fit it with --kind hybrid")
            return []
        share = EXACT if exact is None else exact
        if share not in self._retrieving:
            self._retrieving[share] = hybrid_banks(
                self.banks,
                self.keys,
                self._selectors,
                exact=share,
                nbytes=self.nbytes,
                group=self.geometry.n_heads // self.geometry.n_kv_heads,
            )
        return self._retrieving[share]

    @cached_property
    def _selectors(self) -> list[Router]:
        assert self.keys is not None
        return routers(self.keys, scale=self.geometry.scale)

    @property
    def is_hybrid(self) -> bool:
        """Whether its heads are made to stand beside exact keys."""
        return issubclass(self.layout.bank, HybridHead)

    @cached_property
    def digest(self) -> str:
        """What ties a file of keys to this one."""
        return store.digest(self._tensors)

    @cached_property
    def _without_retrieval(self) -> list[Bank]:
        """The banks as they answer without retrieval."""
        return [bank.without_retrieval() if isinstance(bank, HybridHead) else bank for bank in self.banks]

    @cached_property
    def _packed(self) -> list[Packed] | None:
        return load.packed(self._without_retrieval, self.layout, self._tensors)

    def prompt(self, tokenizer: Any, messages: str | Sequence[prompts.Message], **template: Any) -> list[int]:
        """The tokens that follow the prefix for a question or a conversation, up to where the answer starts."""
        return prompts.prompt(tokenizer, messages, **template)

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, every mlx-lm entry point that makes a cache for the model starts behind the context."""
        attention_patch.route(model)
        before = vars(model).get("make_cache")
        model.make_cache = self.make_cache
        try:
            yield model
        finally:
            del model.make_cache
            if before is not None:
                model.make_cache = before

    def nearest(self, tokenizer: Any, question: str) -> int | None:
        """Of a text that was read in chunks, the number of the one whose three best passages are nearest to a question
        (BM25, by the words and phrases that no more than half of the chunks say). None where none of them tells, where
        there are no chunks, and where layers with a sliding window keep the last chunk alone."""
        if not self.chunks or self.windows:
            return None
        if self._passages is None:  # counted once, with the first tokenizer: a file belongs to one
            indices = [Index.of(tokenizer, self._body(n), run=3) for n in range(len(self.chunks))]
            saying = Counter(word for index in indices for word in index.vocabulary)
            common = {word for word, chunks in saying.items() if 2 * chunks > len(indices)}
            self._passages = Index.joined(indices), [len(index.passages) for index in indices], common
        whole, counts, common = self._passages
        scores = iter(whole.scores(question, without=common))
        found = [sum(nlargest(3, islice(scores, count))) for count in counts]
        return int(np.argmax(found)) if max(found) > 0 else None

    def _body(self, number: int) -> list[int]:
        """A chunk's own tokens."""
        first = len(self.prefix) - sum(self.chunks[number:])
        return self.prefix[first : first + self.chunks[number]]

    def chunk(self, number: int) -> "Nectar":
        """One chunk of the text, as if it alone had been fitted. NectarError if there is none of that number, or where
        layers with a sliding window keep the last chunk alone."""
        count, opening = len(self.chunks), len(self.prefix) - sum(self.chunks)
        if self.windows:
            raise NectarError("this model's layers with a sliding window keep the last chunk alone: use all of them")
        if not 0 <= number < count:
            raise NectarError(f"there is no chunk {number}: the text was read in {count}, which count from 0")
        nodes = []
        for size in np.array(self._tensors["sizes"])[:, 0].tolist():
            each, rest = divmod(size - opening, count)
            if each < 1 or rest:
                raise NectarError("the file is damaged: its heads are not those of its chunks")
            first = opening + number * each
            nodes.append(np.concatenate([np.arange(opening), np.arange(first, first + each)]))
        tensors = store.select_nodes(self.layout, self._tensors, nodes)
        # Each chunk was stored as one of many, which weigh as much as one.
        own = mx.array(np.concatenate([np.arange(len(n)) >= opening for n in nodes]))
        tensors["heads.bias"] = mx.where(own, tensors["heads.bias"] + math.log(count), tensors["heads.bias"])
        tensors["prefix"] = mx.array(self.prefix[:opening] + self._body(number), dtype=mx.int32)
        return type(self)(tensors, self.metadata | {"chunks": []})

    @property
    def start(self) -> int:
        """The position of the token that follows: behind the prefix, or behind its longest chunk."""
        return len(self.prefix) - sum(self.chunks) + max(self.chunks, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the fitted parameters, as kept."""
        return sum(t.nbytes for name, t in self._tensors.items() if name != "prefix")

    @property
    def bits(self) -> float:
        """That a number of a matrix takes in the file, on average."""
        if self.layout.bits is not None:
            return self.layout.bits
        matrices = (x for bank in self.banks for head in bank.unstack() for x in head.values() if x.ndim > 1)
        return round(8 * self._tensors["heads.numbers"].nbytes / sum(x.size for x in matrices), 2)

    @property
    def verdict(self) -> str:
        """How close its answers are to those with the whole text in view, in one sentence; "" where it keeps all keys,
        or was fitted by a version that did not check."""
        return str(self.report.get("verdict", ""))

    @property
    def faithful(self) -> bool:
        """Whether the verdict is that its answers are close to those with the whole text in view, or there is none."""
        return verdict.grade(self.report) in (None, "close")

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the bf16 KV cache that it replaces."""
        return self.geometry.cache_bytes(len(self.prefix))


def _chunks(told: Any, tokens: int) -> list[int]:
    lengths = [int(length) for length in told]
    if any(length < 1 for length in lengths) or sum(lengths) > tokens:
        raise NectarError("the file is damaged: its chunks are not those of its prefix")
    return lengths


def _windows(tensors: store.Tensors, geometry: Geometry, context: int) -> dict[int, Window]:
    """What the sliding-window layers keep; NectarError if the file does not hold it."""
    found: dict[int, Window] = {}
    for layer, size in enumerate(geometry.windows):
        if not size:
            continue
        shape = (geometry.n_kv_heads, min(size, context), geometry.head_dim)
        window = Window(tensors[f"windows.{layer}.keys"], tensors[f"windows.{layer}.values"], size)
        if window.keys.shape != shape or window.values.shape != shape:
            raise NectarError(f"the file is damaged: the window of layer {layer} has another shape")
        found[layer] = window
    return found
