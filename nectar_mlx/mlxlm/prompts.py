"""What the fitted prefix is, and what follows it.

The prefix is the chat template's head with the document inside a user turn that is still open; every prompt continues
that turn. Whatever the template puts first (BOS, a system turn) is in the prefix, and is cut from each prompt.

Control tokens come from the template alone: those that are written in a document, a question or an earlier answer stay
text. Prefix and prompt together are the ids of the whole rendered conversation, unless one of its tokens reaches over
the end of the document, such as a full stop with the line breaks that follow (see `models.encoder`).
"""

import re
import secrets
from collections.abc import Sequence
from typing import Any

from ..errors import NectarError
from ..models.encoder import Behind, Span, encoder, hidden

INTRODUCTION = "Here is a text.\n\n"
_MARK = "<<the document stands here>>"  # stands for the document while the template is rendered

Message = dict[str, str]


def prefix(tokenizer: Any, text: str, *, max_tokens: int | None = None) -> list[int]:
    """The token ids of the template's head and the document; max_tokens bounds the document's."""
    ids, _ = located(tokenizer, text)
    return ids if max_tokens is None else cut(tokenizer, ids, max_tokens)


def cut(tokenizer: Any, prefix: list[int], max_tokens: int) -> list[int]:
    """A prefix with so many tokens of its document, at most."""
    return prefix[: preamble(tokenizer) + max_tokens]


def located(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """The prefix, and the characters [start, end) of the text that each of its tokens stands for; both are negative for
    the template's own tokens, and the list is empty where the tokenizer cannot tell.
    """
    control, turn, behind = _head(tokenizer)
    before = turn + INTRODUCTION
    ids, spans = encoder(tokenizer).text(before + text, behind)
    if spans:
        spans = [(-1, -1)] * len(control) + [(start - len(before), end - len(before)) for start, end in spans]
    return control + ids, spans


def preamble(tokenizer: Any) -> int:
    """How many tokens of a prefix come before the document."""
    return len(located(tokenizer, "")[0])


def head(tokenizer: Any) -> list[int]:
    """The token ids that the chat template puts in front of the user's first message."""
    encodes, (control, turn, behind) = encoder(tokenizer), _head(tokenizer)
    ids, spans = encodes.text(turn + INTRODUCTION, behind)
    if not spans:
        return control + encodes.text(turn, behind)[0]
    # A token that reaches into the message is the message's: SentencePiece has one for a space and a word.
    return control + [token for token, (_, end) in zip(ids, spans, strict=True) if end <= len(turn)]


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
    if not all(isinstance(m.get(part), str) for m in messages for part in ("role", "content")):
        raise NectarError("a message must have a role and a content, both of them text")
    mark = secrets.token_hex(8)  # no message holds what nobody can guess
    turns = [_message(tokenizer, m, mark) for m in messages]
    system = "\n\n".join(m["content"] for m in turns if m["role"] == "system")
    turns = [m for m in turns if m["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        raise NectarError("a conversation must begin with a user message")
    question = turns[0]["content"]
    turns[0]["content"] = f"{_MARK}\n\n" + (f"{system}\n\n{question}" if system else question)
    _, tail = _render(tokenizer, turns, **{"enable_thinking": False, **template})
    control, text, behind = _split(tokenizer, tail, "text", mark=mark)
    return control + encoder(tokenizer).text(text, behind)[0]


def encode(tokenizer: Any, text: str, *, specials: bool = False) -> list[int]:
    """The token ids of a text that continues another one. specials=True: control tokens are taken for what they are."""
    control, rest, behind = _split(tokenizer, text, "text") if specials else ([], text, "text")
    return control + encoder(tokenizer).text(rest, behind)[0]


def _head(tokenizer: Any) -> tuple[list[int], str, Behind]:
    """The template's head: ids up to its last control token, the text of the turn from there, and what comes before."""
    text, _ = _render(tokenizer, [{"role": "user", "content": _MARK}])
    return _split(tokenizer, text, "nothing")


def _split(tokenizer: Any, text: str, behind: Behind, *, mark: str = "") -> tuple[list[int], str, Behind]:
    """A template's text: ids up to its last control token, the text from there, and what comes before that text. The
    mark, which keeps other texts from being control tokens, is left out.
    """
    encodes, ids, at = encoder(tokenizer), list[int](), 0
    for token, (start, end) in encodes.control(text):
        ids += encodes.text(text[at:start].replace(mark, ""), behind)[0]
        ids.append(token)
        at, behind = end, "control"
    return ids, text[at:].replace(mark, ""), behind


def _message(tokenizer: Any, message: Message, mark: str) -> Message:
    """A message whose texts hold no control tokens, except for those around the thoughts before an earlier answer,
    which many templates look for and drop.
    """
    encodes = encoder(tokenizer)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return hidden(encodes, value, mark) if isinstance(value, str) else value

    found: Message = plain(message)
    if message["role"] == "assistant" and (thoughts := _thoughts(tokenizer, message["content"])):
        start, between, end, answer = thoughts.groups()
        found["content"] = start + plain(between) + end + plain(answer)
    return found


def _thoughts(tokenizer: Any, answer: str) -> re.Match[str] | None:
    """What opens the thoughts before an answer, the thoughts, what ends them, and the answer."""
    start, end = getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None)
    start, end = re.escape(start or "<think>"), re.escape(end or "</think>")
    return re.match(rf"(\s*{start})(.*?)({end})(.*)", answer, re.DOTALL)


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
