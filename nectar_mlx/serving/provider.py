"""What mlx-lm's server loads and generates with: a .nectar for each id, and prompts that continue its context."""

import argparse
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import models, store
from ..core.progress import Log, no_log
from ..core.types import JsonObject, LayerCache, Tokenizer
from ..errors import NectarError
from ..mlxlm import prompts
from ..mlxlm.window import answer_tokens
from ..nectar import Nectar
from ..retrieval.sources import sources_as_json

LoadNectar = Callable[[Path, nn.Module, Tokenizer], Nectar]
"""Reads a file for a model that is loaded; shows its warnings."""


@dataclass(frozen=True)
class Target:
    """What a request is answered from; to mlx-lm, the id of the model to load. name: of the file. chunk: of its text,
    None for the whole. exact: the share of keys to read exactly, None for the server's default."""

    name: str
    chunk: int | None = None
    exact: float | None = None


class ContextTokenizer(TokenizerWrapper):
    """The model's tokenizer, but its prompts continue a context: they have no template head and no BOS."""

    has_chat_template = True  # `prompts` also works without one

    def __init__(self, tokenizer: TokenizerWrapper):
        vars(self).update(vars(tokenizer))
        self._base = tokenizer

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **template: Any) -> Any:  # type: ignore[override]
        tokens = prompts.prompt(self._base, messages, **template)
        return tokens if tokenize else self._base.decode(tokens)

    def encode(self, text: str, **options: Any) -> list[int]:
        """The ids of stop words, which may be control tokens."""
        return prompts.encode(self._base, text, specials=True)

    def completion(self, prompt: object) -> list[int]:
        """The ids of a text that continues the document."""
        if not isinstance(prompt, str) or not prompt:
            raise NectarError("the prompt must be one non-empty string")
        return prompts.encode(self._base, prompt)


class Provider(server.ModelProvider):
    """Loads the given .nectar files and nothing else; their common model is loaded once."""

    model: Any
    tokenizer: Any
    draft_model: Any
    model_key: Any
    serving: Nectar
    caches: Sequence[LayerCache]  # of the latest request that is served on its own

    def __init__(self, args: argparse.Namespace, files: dict[str, Path], load_nectar: LoadNectar, *, log: Log = no_log):
        super().__init__(args)
        self.files, self._load_nectar, self._log = files, load_nectar, log
        self._model_map["default_model"] = Target(next(iter(files)))
        self._base: tuple[str, nn.Module, TokenizerWrapper] | None = None
        self._nectars: dict[tuple[str, int | None], Nectar] = {}  # by file and chunk
        self.caches = []
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def no_model(self, name: str) -> str:
        """The message for a request for a model that is not served."""
        return f"there is no model {name!r}; there are: {', '.join(self.files)}"

    def load_default(self) -> None:
        """Loads every file once, the first one last, so that errors show before the first request."""
        try:
            for name in reversed(self.files):
                self.load(Target(name), None, "default_model")  # type: ignore[no-untyped-call]
        except Exception as error:
            self.failure = error
        self.ready.set()

    def _load(self, model_path: Target, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        target = model_path
        exact = self.cli_args.exact if target.exact is None else target.exact
        nectar, model, tokenizer = self._nectar(target)
        hybrid = bool(nectar.hybrid_banks(exact))

        def make_cache() -> Sequence[LayerCache]:
            self.caches = nectar.make_cache(kv_bits=self.cli_args.kv_bits, exact_fraction=exact)
            return self.caches

        model.make_cache = make_cache
        if draft_model_path is not None and self.draft_model is None:
            self.draft_model, _ = models.load(draft_model_path, log=self._log)
        self.model, self.tokenizer = model, ContextTokenizer(tokenizer)
        self.is_batchable = self.draft_model is None and not hybrid  # what was read is known for single requests only
        self.serving = nectar
        self.model_key = (target, adapter_path, draft_model_path)

    def reading(self) -> JsonObject:
        """What the latest answer read exactly of its text, and the passages that its attention went to."""
        read = self.serving.hybrid.reading(self.caches)
        if read and self._base is not None:
            read["sources"] = sources_as_json(self.serving.sources(self._base[2], "", "", caches=self.caches))
        return read

    def nearest(self, name: str, questions: Iterable[str]) -> int | None:
        """The chunk for the first of the questions that has a nearest chunk; None if none has, or without chunks."""
        nectar, base = self._nectars.get((name, None)), self._base
        if nectar is None or base is None:
            return None
        chunks = (nectar.nearest(base[2], question) for question in questions)
        return next((chunk for chunk in chunks if chunk is not None), None)

    def _nectar(self, target: Target) -> tuple[Nectar, nn.Module, TokenizerWrapper]:
        if target.name not in self.files:
            raise NectarError(self.no_model(target.name))
        file = self.files[target.name]
        wanted = self.cli_args.model or store.model_name(file)
        if self._base is None or self._base[0] != wanted:
            self._base = None
            self._nectars.clear()
            self.reset()
            self._base = (wanted, *models.load(wanted, log=self._log))
        _, model, tokenizer = self._base
        key, whole = (target.name, target.chunk), (target.name, None)
        if whole not in self._nectars:
            self._nectars[whole] = self._load_nectar(file, model, tokenizer)
        if target.chunk is not None and key not in self._nectars:
            self._nectars[key] = self._nectars[whole].chunk(target.chunk)
        return self._nectars[key], model, tokenizer


class PromptCache(LRUPromptCache):
    """mlx-lm's cache of prompts. It may have a whole prompt, but a batch needs at least one token that is still to be
    read."""

    def __init__(self, max_size: int, provider: Provider | None = None):
        super().__init__(max_size)
        self._provider = provider

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and self._provider is not None:
            self._provider.caches = cache
            self._provider.serving.hybrid.forget(cache)
        if rest:
            return cache, rest
        if all(layer.is_trimmable() for layer in cache):
            for layer in cache:
                layer.trim(1)
            return cache, tokens[-1:]
        return None, tokens


class Generator(server.ResponseGenerator):
    """mlx-lm's generator, with answers limited to the model's window. For a request that is served on its own, the
    `GenerationContext` gets a field `reading`: what the answer has read of its context."""

    model_provider: Provider

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        if request.request_type == "chat":
            tokenized = super()._tokenize(tokenizer, request, args)  # type: ignore[no-untyped-call]
        else:
            prompt = tokenizer.completion(request.prompt)
            tokenized = prompt, [prompt], ["assistant"], "normal", None
        length = {"chosen" if args.chosen else "default": args.max_tokens}
        provider = self.model_provider
        args.max_tokens = answer_tokens(
            provider.model, start=provider.serving.start, prompt=len(tokenized[0]), **length
        )
        return tokenized

    def _serve_single(self, request: Any, stream: Any) -> None:
        queue, *others = request
        super()._serve_single((_ResponseQueue(queue, self.model_provider), *others), stream)  # type: ignore[no-untyped-call]


class _ResponseQueue:
    """A request's queue, which adds `reading` to its `GenerationContext`: the first item. The last item is None."""

    def __init__(self, queue: Any, provider: Provider):
        self._queue, self._provider, self._context = queue, provider, None

    def put(self, item: Any) -> None:
        if self._context is None:
            self._context = item
        elif item is None:
            self._context.reading = self._provider.reading()
        self._queue.put(item)
