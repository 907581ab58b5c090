"""From text to token ids, where only a chat template's own text may have control tokens.

`<|im_end|>` in a template is one token; the same characters in a document or a message are text. Two tokenizers made
from the model's one encode them: `Encoder.text` knows no control tokens, `Encoder.control` knows nothing else.
"""

import json
import re
from typing import Any, Literal
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer, models

from nectar_mlx.core import types
from nectar_mlx.core.types import JsonObject

Preceding = Literal["start", "control", "text"]
Span = tuple[int, int]

_encoders: "WeakKeyDictionary[Any, tuple[Any, Encoder]]" = WeakKeyDictionary()


class Encoder:
    """Encodes a text in pieces, with the ids of the whole text.

    A piece at the start of the text or after a control token may get a space in front (SentencePiece's `▁`); a piece
    that continues another one gets none. So the ids are those of the whole text, unless one of its tokens crosses a
    seam. Control tokens never do. Byte-level BPE joins a word with the letters before it, and punctuation or spaces
    with the line breaks after them; SentencePiece joins what is one piece in its vocabulary.
    """

    def __init__(self, backend: Tokenizer, template: str):
        """backend: a fast tokenizer's. template: the chat template, or ""."""
        added, pieces = backend.get_added_tokens_decoder(), _pieces(backend)
        control = {i: token for i, token in added.items() if not _is_text(token, pieces, template)}
        text = [token for i, token in added.items() if i not in control]
        settings = _settings(backend)
        continued, sections = _without_prefix(settings)
        self._start, self._continued = (_tokenizer(s, backend, text) for s in (settings, continued))
        self._section = self._start if sections else self._continued
        self._ids = {token.content: i for i, token in control.items()}
        self._finder = Tokenizer(models.BPE())
        if backend.normalizer is not None:
            self._finder.normalizer = backend.normalizer
        self._finder.add_tokens(list(control.values()))

    def text(self, text: str, preceding: Preceding) -> tuple[list[int], list[Span]]:
        """The ids of a text without control tokens, and the characters [start, end) of each.

        preceding: what comes before the text.
        """
        tokenizer = {"start": self._start, "control": self._section, "text": self._continued}[preceding]
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def control(self, text: str) -> list[tuple[int, Span]]:
        """The control tokens in a template's text: ids, and the characters [start, end) of each."""
        encoding = self._finder.encode(text, add_special_tokens=False)
        return [(self._ids[token], span) for token, span in zip(encoding.tokens, encoding.offsets, strict=True)]


class _SlowEncoder(Encoder):
    """For a tokenizer without a fast backend: no spans, and its special tokens are the control tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._specials = [token for token in getattr(tokenizer, "all_special_tokens", []) if token]

    def text(self, text: str, preceding: Preceding) -> tuple[list[int], list[Span]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return list(self._tokenizer.encode(text, **options)), []

    def control(self, text: str) -> list[tuple[int, Span]]:
        if not self._specials:
            return []
        matches = re.finditer("|".join(map(re.escape, self._specials)), text)
        return [(self._tokenizer.convert_tokens_to_ids(match[0]), match.span()) for match in matches]


def encoder(tokenizer: types.Tokenizer) -> Encoder:
    """The encoder of mlx-lm's or transformers' tokenizer, made once for its vocabulary and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _SlowEncoder(tokenizer)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    state = (backend.get_vocab_size(), template)
    if tokenizer not in _encoders or _encoders[tokenizer][0] != state:
        _encoders[tokenizer] = (state, Encoder(backend, template))
    return _encoders[tokenizer][1]


def hidden(encoder: Encoder, text: str, mark: str) -> str:
    """The text with the mark between the characters of everything that would be a control token in a template's text.
    mark: not in the text.
    """
    while tokens := encoder.control(text):
        pieces, at = list[str](), 0
        for _, (start, end) in tokens:
            pieces += [text[at:start], mark.join(text[start:end])]
            at = end
        before, text = text, "".join(pieces) + text[at:]
        if text == before:  # a control token of one character
            break
    return text


def _pieces(backend: Tokenizer) -> set[str]:
    """SentencePiece's own pieces, such as Gemma's `<b>` or line breaks, which it splits off everywhere; none for
    byte-level BPE.
    """
    if not getattr(backend.model, "byte_fallback", False):
        return set()
    return set(backend.get_vocab(with_added_tokens=False))


def _is_text(token: AddedToken, pieces: set[str], template: str) -> bool:
    """Whether an added token is ordinary text: not special, one of SentencePiece's, and not in the template."""
    named = bool(token.content.strip()) and token.content in template
    return not token.special and token.content in pieces and not named


def _settings(backend: Tokenizer) -> JsonObject:
    """The tokenizer's serialisation without its vocabulary, which takes long to write."""
    shell = Tokenizer(models.BPE())
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, name) is not None:
            setattr(shell, name, getattr(backend, name))
    settings: JsonObject = json.loads(shell.to_str())
    return settings


def _tokenizer(settings: JsonObject, backend: Tokenizer, added: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.model = backend.model
    tokenizer.add_tokens(added)
    return tokenizer


def _without_prefix(settings: JsonObject) -> tuple[JsonObject, bool]:
    """The settings without a space in front of a text, and whether the original ones add one after a control token."""
    changed: JsonObject = json.loads(json.dumps(settings))
    sections = True
    for whole in (changed["normalizer"] or {}, changed["pre_tokenizer"] or {}):
        for step in whole.get("normalizers", whole.get("pretokenizers", [whole])):
            if step.get("type") == "Prepend":
                step["prepend"] = ""
            elif step.get("type") == "Metaspace":
                sections = step.get("prepend_scheme") != "first"
                step["prepend_scheme"] = "never"
            elif step.get("type") == "ByteLevel":
                step["add_prefix_space"] = False
    return changed, sections
