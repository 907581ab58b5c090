"""The tokenizer of a .gguf file, with the token ids of the one that the model was published with.

Two kinds: byte-level BPE, whose merges the file keeps, and SentencePiece's BPE, whose merges follow from its scores.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx_lm  # noqa: F401  keeps transformers from advising to install PyTorch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nectar_mlx.errors import NectarError
from nectar_mlx.models import gguf_settings

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits a text before byte-level BPE, by the name that llama.cpp gives the tokenizer.
SPLITS = {
    "default": (_GPT2_WORDS,),
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "starcoder": (r"\p{N}", _GPT2_WORDS),
    "qwen2": (_WORDS % "",),
    "deepseek-r1-qwen": (_WORDS % "",),
    "llama-bpe": (_WORDS % "{1,3}",),
    "llama3": (_WORDS % "{1,3}",),
}
_LLAMA3 = ("llama-bpe", "llama3")
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_SPACE = "▁"  # SentencePiece's


class _Settings:
    """A file's `tokenizer.ggml.*`: the pieces with their types, and the other settings."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata
        self.kind, self.tokens = self("model"), self("tokens") or []
        self.types = list(self("token_type", [_NORMAL] * len(self.tokens)))
        if self.kind == "llama":  # llama.cpp keeps user-defined pieces as they are written, with spaces
            pairs = zip(self.tokens, self.types, strict=True)
            self.tokens = [token.replace(" ", _SPACE) if type_ == _USER_DEFINED else token for token, type_ in pairs]

    def __call__(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def token(self, role: str) -> str | None:
        """The piece that has a role, such as "bos"."""
        index = self(f"{role}_token_id")
        return self.tokens[index] if index is not None and 0 <= index < len(self.tokens) else None


def build(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a file's metadata describes; NectarError, which names the path, if there is none or it is not
    supported.
    """
    try:
        gguf_settings.check_tokenizer(dict(metadata))
        return _build(path, metadata)
    except NectarError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NectarError(f"{path}: its tokenizer is damaged ({reason})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, which is no Exception
            raise
        raise NectarError(f"{path}: its tokenizer is damaged") from None


def _build(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    settings = _Settings(metadata)
    if not settings.tokens:
        raise NectarError(f"{path}: the file carries no tokenizer")
    if settings.kind == "gpt2":
        tokenizer = _byte_level(path, settings)
    elif settings.kind == "llama":
        tokenizer = _sentencepiece(settings)
    else:
        kind = settings.kind
        raise NectarError(f"{path}: tokenizer {kind!r} is not supported as GGUF; take an mlx-community folder of it")
    for wanted in (_CONTROL, _USER_DEFINED):
        special = wanted == _CONTROL
        pairs = zip(settings.tokens, settings.types, strict=True)
        added = [AddedToken(token, special=special, normalized=False) for token, type_ in pairs if type_ == wanted]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    roles = {role: token for role, name in names.items() if (token := settings.token(name)) is not None}
    if settings("add_bos_token", settings.kind == "llama" or settings("pre") in _LLAMA3):
        start = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start}:0 $A:0", special_tokens=[(start, settings("bos_token_id"))]
        )
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length", 1 << 30),
        **({"chat_template": template} if template else {}),
        **roles,
    )


def _byte_level(path: Path, settings: _Settings) -> Tokenizer:
    name = settings("pre", "default")
    if name not in SPLITS:
        raise NectarError(f"{path}: tokenizer {name!r} is not supported as GGUF; take an mlx-community folder of it")
    vocabulary = {token: index for index, token in enumerate(settings.tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in settings("merges", [])]
    # Llama 3 takes a word that its vocabulary holds whole, whatever its merges would make of it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _LLAMA3))
    if "qwen" in name:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS[name]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(settings: _Settings) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(settings.tokens)}
    unknown = settings.tokens[settings("unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(settings, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if settings("add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(settings: _Settings, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """SentencePiece's BPE as merges: a pair merges the earlier, the higher the score of what it makes. What the user
    defined has the highest, 0; llama.cpp writes another one.

    Of one score, the order is that of Gemma's published tokenizer.json, the longest left piece first: it decides how
    long runs of spaces are split. With a space prefix, as in Llama 2, the order is that of the vocabulary and makes no
    difference to the ids; fingerprints of tokenizers depend on it.
    """
    scores, merges = settings("scores"), []
    for piece, index in vocabulary.items():
        if settings.types[index] in (_CONTROL, _BYTE):
            continue
        score = 0.0 if settings.types[index] == _USER_DEFINED else scores[index]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-score, -len(left), -len(right), left, right))
    decisive = 1 if settings("add_space_prefix", True) else 3
    merges.sort(key=lambda merge: merge[:decisive])
    return [(left, right) for *_, left, right in merges]
