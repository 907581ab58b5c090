"""From text to token ids, where only a chat template's own text may hold control tokens.

What a template writes as `<|im_end|>` is one token; the same characters in a document or a message are text. The two
are encoded by different tokenizers made of the model's one: `Encoder.text` knows no control tokens at all, and what
finds them in a template's text knows nothing else.
"""

import json
import re
from typing import Any, Literal
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer, models

Behind = Literal["nothing", "control", "text"]
Span = tuple[int, int]

_encoders: "WeakKeyDictionary[Any, tuple[Any, Encoder]]" = WeakKeyDictionary()


class Encoder:
    """Encodes a text in pieces, to the ids that it has as a whole.

    A piece that begins where the whole text does, or behind a control token, may get a space in front (SentencePiece's
    `▁`); one that continues another piece gets none. So the ids are those of the whole, unless one of its tokens
    reaches over a seam. Control tokens never do. Byte-level BPE joins a word with the letters in front of it, and
    punctuation or spaces with the line breaks behind them; SentencePiece joins what its vocabulary has in one piece.
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

    def text(self, text: str, behind: Behind) -> tuple[list[int], list[Span]]:
        """The ids of a text without control tokens, and the characters [start, end) that each stands for.

        behind: what comes before the text.
        """
        tokenizer = {"nothing": self._start, "control": self._section, "text": self._continued}[behind]
        found = tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def control(self, text: str) -> list[tuple[int, Span]]:
        """The control tokens in a template's text: ids, and the characters [start, end) of each."""
        found = self._finder.encode(text, add_special_tokens=False)
        return [(self._ids[token], span) for token, span in zip(found.tokens, found.offsets, strict=True)]


class _SlowEncoder(Encoder):
    """For a tokenizer that cannot be taken apart: no spans, and control tokens are what it calls special."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._specials = [token for token in getattr(tokenizer, "all_special_tokens", []) if token]

    def text(self, text: str, behind: Behind) -> tuple[list[int], list[Span]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return list(self._tokenizer.encode(text, **options)), []

    def control(self, text: str) -> list[tuple[int, Span]]:
        if not self._specials:
            return []
        found = re.finditer("|".join(map(re.escape, self._specials)), text)
        return [(self._tokenizer.convert_tokens_to_ids(match[0]), match.span()) for match in found]


def encoder(tokenizer: Any) -> Encoder:
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
    """The text with the mark between the characters of what would be control tokens in a template's text; the mark
    is one that the text does not hold.
    """
    while found := encoder.control(text):
        pieces, at = list[str](), 0
        for _, (start, end) in found:
            pieces += [text[at:start], mark.join(text[start:end])]
            at = end
        before, text = text, "".join(pieces) + text[at:]
        if text == before:  # a control token of one character
            break
    return text


def _pieces(backend: Tokenizer) -> set[str]:
    """SentencePiece's own pieces. It splits them off wherever they are written, such as Gemma's `<b>` or line breaks;
    byte-level BPE has no such pieces.
    """
    if not getattr(backend.model, "byte_fallback", False):
        return set()
    return set(backend.get_vocab(with_added_tokens=False))


def _is_text(token: AddedToken, pieces: set[str], template: str) -> bool:
    """Whether an added token is ordinary text: not special, one of SentencePiece's, and no word of the template's."""
    named = bool(token.content.strip()) and token.content in template
    return not token.special and token.content in pieces and not named


def _settings(backend: Tokenizer) -> dict[str, Any]:
    """The tokenizer's serialisation without its vocabulary, which takes long to write."""
    shell = Tokenizer(models.BPE())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, part) is not None:
            setattr(shell, part, getattr(backend, part))
    settings: dict[str, Any] = json.loads(shell.to_str())
    return settings


def _tokenizer(settings: dict[str, Any], backend: Tokenizer, added: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.model = backend.model
    tokenizer.add_tokens(added)
    return tokenizer


def _without_prefix(settings: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The settings that put no space in front of a text, and whether the given ones put one behind a control token."""
    changed: dict[str, Any] = json.loads(json.dumps(settings))
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
