"""What the fitted prefix is, and what follows it.

The prefix is the chat template's head with the document inside a user turn that is still open; every prompt continues
that turn. Whatever the template puts first (BOS, a system turn) is in the prefix, and is cut from each prompt.
"""

from collections.abc import Sequence
from typing import Any

from .errors import NectarError

INTRODUCTION = "Here is a text.\n\n"
_MARK = "<<the document stands here>>"  # stands for the document while the template is rendered

Message = dict[str, str]


def prefix(tokenizer: Any, text: str, *, max_tokens: int | None = None) -> list[int]:
    """The token ids of the template's head and the document; max_tokens bounds the document's."""
    document = encode(tokenizer, INTRODUCTION + text, specials=False)
    introduction = len(encode(tokenizer, INTRODUCTION, specials=False))
    if max_tokens is not None:
        document = document[: introduction + max_tokens]
    return head(tokenizer) + document


def opening(tokenizer: Any) -> int:
    """How many tokens of a prefix come before the document."""
    return len(head(tokenizer)) + len(encode(tokenizer, INTRODUCTION, specials=False))


def head(tokenizer: Any) -> list[int]:
    """The token ids that the chat template puts in front of the user's first message."""
    text, _ = _render(tokenizer, [{"role": "user", "content": _MARK}])
    return encode(tokenizer, text)


def prompt(tokenizer: Any, messages: str | Sequence[Message], **template: Any) -> list[int]:
    """The token ids that follow the prefix, up to where the answer starts.

    messages: a question, or a conversation whose first user message continues the prefix; a system message goes before
    that message's text. `template` goes to the chat template; thinking is off unless it says enable_thinking=True.
    Raises NectarError for a conversation that cannot continue the prefix.
    """
    if template.pop("tools", None):
        raise NectarError(
            "tools are not supported: a template describes them before the document, which is already read"
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    turns = [dict(m) for m in messages if m["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        raise NectarError("a conversation must begin with a user message")
    question = turns[0]["content"]
    turns[0]["content"] = f"{_MARK}\n\n" + (f"{system}\n\n{question}" if system else question)
    _, tail = _render(tokenizer, turns, **{"enable_thinking": False, **template})
    return encode(tokenizer, tail)


def encode(tokenizer: Any, text: str, *, specials: bool = True) -> list[int]:
    """Token ids without added BOS or EOS. specials=False: a special token's text stays text, as in a document."""
    split = not specials
    # verbose=False: the tokenizer would warn that a document is longer than the window, which the fit checks itself.
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split, verbose=False))


def _render(tokenizer: Any, turns: Sequence[Message], **template: Any) -> tuple[str, str]:
    """The text before and after the document's place."""
    if not getattr(tokenizer, "chat_template", None):
        text = (tokenizer.bos_token or "") + "\n\n".join(m["content"] for m in turns) + "\n\nAnswer:"
    else:
        options = {"add_generation_prompt": True, **template, "tokenize": False}
        text = tokenizer.apply_chat_template(list(turns), **options)
    head, mark, tail = text.partition(_MARK)
    if not mark:
        raise NectarError("the model's chat template drops the user's message; the document has no place in it")
    return head, tail
