"""What mlx-lm's server loads and generates with: a .nectar for every model's id, prompts that continue its context."""

import argparse
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import cli, models, store
from ..errors import NectarError
from ..mlxlm import prompts
from ..mlxlm.window import answer_tokens
from ..nectar import Nectar

_PART, _EXACT = "@part=", "@exact="


class ContextTokenizer(TokenizerWrapper):
    """The model's tokenizer, except that what it encodes continues a context: no template head, no BOS."""

    has_chat_template = True  # `prompts` has a way for models without one

    def __init__(self, tokenizer: TokenizerWrapper):
        vars(self).update(vars(tokenizer))
        self._whole = tokenizer

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **template: Any) -> Any:  # type: ignore[override]
        tokens = prompts.prompt(self._whole, messages, **template)
        return tokens if tokenize else self._whole.decode(tokens)

    def encode(self, text: str, **options: Any) -> list[int]:
        """Words that end an answer, which may be control tokens."""
        return prompts.encode(self._whole, text, specials=True)

    def completion(self, prompt: Any) -> list[int]:
        """A text that goes on where the document ends."""
        if not isinstance(prompt, str) or not prompt:
            raise NectarError("the prompt must be one non-empty string")
        return prompts.encode(self._whole, prompt)


class Provider(server.ModelProvider):
    """Loads what the server may serve: the given .nectar files, whose shared model is loaded once."""

    model: Any
    tokenizer: Any
    draft_model: Any
    model_key: Any
    serving: Nectar
    reading: list[Any]  # the caches of the request that is served alone

    def __init__(self, args: argparse.Namespace, files: dict[str, Path]):
        super().__init__(args)
        self.files = files
        self._model_map["default_model"] = next(iter(files))
        self._base: tuple[str, Any, Any] | None = None
        self._nectars: dict[str, Nectar] = {}
        self.reading = []
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def no_model(self, name: str) -> str:
        """What to say to a request for a model that is not served."""
        return f"there is no model {name!r}; there are: {', '.join(self.files)}"

    def load_default(self) -> None:
        """Loads every file once, so that what is wrong is known before the first request; the first one stays."""
        try:
            for name in reversed(self.files):
                self.load(name, None, "default_model")  # type: ignore[no-untyped-call]
        except Exception as error:
            self.failure = error
        self.ready.set()

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        name, part, exact = _parted(model_path, self.cli_args.exact)
        if name not in self.files:
            raise NectarError(self.no_model(name))
        nectar, model, tokenizer = self._nectar(name)
        if part is not None:
            whole, key = nectar, loaded_id(name, part=part)
            nectar = self._nectars[key] = self._nectars.get(key) or whole.chunk(part)
        retrieves = bool(nectar.hybrid_banks(exact))

        def make_cache() -> list[Any]:
            self.reading = nectar.make_cache(kv_bits=self.cli_args.kv_bits, exact_fraction=exact)
            return self.reading

        model.make_cache = make_cache
        if draft_model_path is not None and self.draft_model is None:
            self.draft_model, _ = models.load(draft_model_path, log=cli.say)
        self.model, self.tokenizer = model, ContextTokenizer(tokenizer)
        self.is_batchable = self.draft_model is None and not retrieves  # what an answer read is known of one alone
        self.serving = nectar
        self.model_key = (model_path, adapter_path, draft_model_path)

    def nearest(self, name: str, questions: Iterable[str]) -> int | None:
        """The part of a text read in parts that the first question which tells is about."""
        nectar, base = self._nectars.get(name), self._base
        if nectar is None or base is None:
            return None
        return next((part for q in questions if (part := nectar.nearest(base[2], q)) is not None), None)

    def _nectar(self, name: str) -> tuple[Nectar, Any, Any]:
        file = self.files[name]
        wanted = self.cli_args.model or store.model_name(file)
        if self._base is None or self._base[0] != wanted:
            self._base = None
            self._nectars.clear()
            self.reset()
            self._base = (wanted, *models.load(wanted, log=cli.say))
        _, model, tokenizer = self._base
        if name not in self._nectars:
            self._nectars[name] = cli.load_nectar(file, model, tokenizer)
        return self._nectars[name], model, tokenizer


class PromptCache(LRUPromptCache):
    """mlx-lm's, which may hold the whole of a prompt; its batches need at least one token that is still to be read."""

    def __init__(self, max_size: int, provider: Provider | None = None):
        super().__init__(max_size)
        self._provider = provider

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and self._provider is not None:
            self._provider.reading = cache
            self._provider.serving.hybrid.forget(cache)
        if rest:
            return cache, rest
        if all(layer.is_trimmable() for layer in cache):
            for layer in cache:
                layer.trim(1)
            return cache, tokens[-1:]
        return None, tokens


class Generator(server.ResponseGenerator):
    """mlx-lm's, within the model's window; what an answer that was served alone has read of its context becomes a field
    of the request's.
    """

    model_provider: Provider

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        if request.request_type == "chat":
            found = super()._tokenize(tokenizer, request, args)  # type: ignore[no-untyped-call]
        else:
            prompt = tokenizer.completion(request.prompt)
            found = prompt, [prompt], ["assistant"], "normal", None
        length = {"chosen" if args.chosen else "default": args.max_tokens}
        provider = self.model_provider
        args.max_tokens = answer_tokens(provider.model, start=provider.serving.start, prompt=len(found[0]), **length)
        return found

    def _serve_single(self, request: Any, stream: Any) -> None:
        queue, *others = request
        super()._serve_single((_Told(queue, self.model_provider), *others), stream)  # type: ignore[no-untyped-call]


class _Told:
    """A request's queue: the first item is its `GenerationContext`, the last is None."""

    def __init__(self, queue: Any, provider: Provider):
        self._queue, self._provider, self._context = queue, provider, None

    def put(self, item: Any) -> None:
        if self._context is None:
            self._context = item
        elif item is None:
            self._context.reading = self._provider.serving.hybrid.reading(self._provider.reading)
        self._queue.put(item)


def loaded_id(name: str, *, part: int | None = None, exact: float | None = None) -> str:
    """The id that is loaded: a file's, with the part and the share of exact keys that a request is answered from."""
    return name + (f"{_PART}{part}" if part is not None else "") + (f"{_EXACT}{exact}" if exact is not None else "")


def _parted(loaded: str, exact: float | None) -> tuple[str, int | None, float | None]:
    """A file's id, the part, and the share of keys to read exactly, the server's own unless the request said so."""
    rest, at, told = loaded.partition(_EXACT)
    name, _, part = rest.partition(_PART)
    return name, int(part) if part else None, float(told) if at else exact
