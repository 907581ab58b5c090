"""The token ids of the fitted prefix, and of the prompts that follow it.

The prefix is the chat template's head and the document, in a user turn that is still open. Every prompt continues that
turn. What the template puts first (BOS, a system turn) is in the prefix, and is cut from each prompt.

Only the template makes control tokens: their text in a document, a question or an earlier answer stays text. Prefix and
prompt together are the ids of the whole rendered conversation, unless one of its tokens crosses the end of the
document, such as a full stop with the line breaks that follow (see `models.encoder`).
"""

import re
import secrets
from collections.abc import Sequence
from typing import Any

from ..core.terminal import typed
from ..core.types import JsonObject, Tokenizer
from ..errors import NectarError
from ..models.encoder import Encoder, Preceding, Span, encoder, hidden
from ..models.template import render
from . import tools as function_calls

INTRODUCTION = "Here is a text.\n\n"
_DEFAULTS = {"enable_thinking": False}  # of the template, for the prefix and for prompts
_MARK = "<<the document stands here>>"  # stands for the document while the template is rendered

Message = dict[str, Any]


def prefix(tokenizer: Tokenizer, text: str, *, max_tokens: int | None = None) -> list[int]:
    """The token ids of the template's head and the document; max_tokens bounds the document's."""
    ids, _ = located(tokenizer, text)
    return ids if max_tokens is None else cut(tokenizer, ids, max_tokens)


def cut(tokenizer: Tokenizer, prefix: list[int], max_tokens: int) -> list[int]:
    """A prefix with at most `max_tokens` tokens of its document."""
    return prefix[: preamble(tokenizer) + max_tokens]


def located(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """The prefix, and the characters [start, end) of the text for each of its tokens. Both are negative for the
    template's own tokens; the list is empty if the tokenizer gives no offsets. NectarError for lone surrogates.
    """
    control, turn, preceding = _head(tokenizer)
    before = turn + INTRODUCTION
    ids, spans = encoder(tokenizer).text(before + typed(text, "the text"), preceding)
    if spans:
        spans = [(-1, -1)] * len(control) + [(start - len(before), end - len(before)) for start, end in spans]
    return control + ids, spans


def document(tokenizer: Tokenizer, prefix: Sequence[int]) -> str:
    """The text that a prefix holds, as far as the tokenizer gives back what it encoded."""
    decoded = tokenizer.decode(list(prefix), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return decoded.partition(INTRODUCTION)[2]


def preamble(tokenizer: Tokenizer) -> int:
    """The number of tokens before the document in a prefix."""
    return len(located(tokenizer, "")[0])


def head(tokenizer: Tokenizer) -> list[int]:
    """The token ids that the chat template puts before the user's first message."""
    encodes, (control, turn, preceding) = encoder(tokenizer), _head(tokenizer)
    ids, spans = encodes.text(turn + INTRODUCTION, preceding)
    if not spans:
        return control + encodes.text(turn, preceding)[0]
    # A token that crosses into the message belongs to it: SentencePiece has tokens for a space with a word.
    return control + [token for token, (_, end) in zip(ids, spans, strict=True) if end <= len(turn)]


def prompt(
    tokenizer: Tokenizer,
    messages: str | Sequence[Message],
    *,
    tools: Sequence[JsonObject] | None = None,
    **template: Any,
) -> list[int]:
    """The token ids that follow the prefix, up to the start of the answer.

    messages: a question, or a conversation whose first user message continues the prefix; a system message goes before
    that message's text. tools: functions that the model may call, as OpenAI's API has them; they are described there,
    too. template: arguments of the chat template; thinking is off without enable_thinking=True, and cannot be turned on
    where the template says so before the document.
    Raises NectarError for a conversation that cannot continue the prefix.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise NectarError("a message must have a role and a content, both of them text")
    mark = secrets.token_hex(8)  # random, so that no message contains it
    turns = [_message(tokenizer, m, mark) for m in messages]
    system = [m["content"] for m in turns if m["role"] == "system"]
    if tools:
        system.insert(0, function_calls.describe(tokenizer, _hidden(encoder(tokenizer), list(tools), mark)))
    turns = function_calls.as_turns(tokenizer, [m for m in turns if m["role"] != "system"])
    if not turns or turns[0]["role"] != "user":
        raise NectarError("a conversation must begin with a user message")
    turns[0]["content"] = "\n\n".join([_MARK, *system, turns[0]["content"]])
    before, tail = _render(tokenizer, turns, **{**_DEFAULTS, **template})
    if template.get("enable_thinking") and before != _render(tokenizer, turns, **{**template, **_DEFAULTS})[0]:
        raise NectarError(
            "the model's chat template puts enable_thinking=True before the document, which is already read: leave it "
            "out"
        )
    control, text, preceding = _split(tokenizer, tail, "text", mark=mark)
    return control + encoder(tokenizer).text(text, preceding)[0]


def encode(tokenizer: Tokenizer, text: str, *, specials: bool = False) -> list[int]:
    """The token ids of a text that continues another one. specials=True: the text of a control token is that token."""
    control, rest, preceding = _split(tokenizer, text, "text") if specials else ([], text, "text")
    return control + encoder(tokenizer).text(rest, preceding)[0]


def _head(tokenizer: Tokenizer) -> tuple[list[int], str, Preceding]:
    """The template's head: ids up to its last control token, the text after it, and what comes before that text."""
    text, _ = _render(tokenizer, [{"role": "user", "content": _MARK}], **_DEFAULTS)
    return _split(tokenizer, text, "start")


def _split(
    tokenizer: Tokenizer, text: str, preceding: Preceding, *, mark: str = ""
) -> tuple[list[int], str, Preceding]:
    """A template's text: ids up to its last control token, the text after it, and what comes before that text. The
    mark, which breaks up control tokens in other texts, is removed.
    """
    encodes, ids, at = encoder(tokenizer), list[int](), 0
    for token, (start, end) in encodes.control(text):
        ids += encodes.text(text[at:start].replace(mark, ""), preceding)[0]
        ids.append(token)
        at, preceding = end, "control"
    return ids, text[at:].replace(mark, ""), preceding


def _message(tokenizer: Tokenizer, message: Message, mark: str) -> Message:
    """A message without control tokens in its texts, except those around the thoughts of an earlier answer: many
    templates look for these and drop the thoughts.
    """
    encodes = encoder(tokenizer)
    cleaned: Message = _hidden(encodes, message, mark)
    if message["role"] == "assistant" and (thoughts := _thoughts(tokenizer, message["content"])):
        start, between, end, answer = thoughts.groups()
        cleaned["content"] = start + hidden(encodes, between, mark) + end + hidden(encodes, answer, mark)
    return cleaned


def _hidden(encodes: Encoder, value: Any, mark: str) -> Any:
    """A value of JSON without control tokens in its texts."""
    if isinstance(value, dict):
        return {hidden(encodes, name, mark): _hidden(encodes, item, mark) for name, item in value.items()}
    if isinstance(value, list):
        return [_hidden(encodes, item, mark) for item in value]
    return hidden(encodes, typed(value, "a message"), mark) if isinstance(value, str) else value


def _thoughts(tokenizer: Tokenizer, answer: str) -> re.Match[str] | None:
    """The start tag of an answer's thoughts, the thoughts, the end tag, and the answer."""
    start, end = getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None)
    start, end = re.escape(start or "<think>"), re.escape(end or "</think>")
    return re.match(rf"(\s*{start})(.*?)({end})(.*)", answer, re.DOTALL)


def _render(tokenizer: Tokenizer, turns: Sequence[Message], **template: Any) -> tuple[str, str]:
    """The rendered text before and after the document's place."""
    if not getattr(tokenizer, "chat_template", None):
        text = (tokenizer.bos_token or "") + "\n\n".join(m["content"] for m in turns) + "\n\nAnswer:"
    else:
        text = render(tokenizer, turns, **{"add_generation_prompt": True, **template})
    head, mark, tail = text.partition(_MARK)
    if not mark:
        raise NectarError("the model's chat template drops the user's message; the document has no place in it")
    return head, tail
