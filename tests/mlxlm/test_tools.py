"""Tools in prompts: the template's own description behind the text, ours where it has none; calls and results too."""

import json

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools, pythonic

from nectar_mlx.mlxlm import prompts, tools
from tests import toys

QWEN = """
{%- if tools %}<|im_start|>system
{{ messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' }}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
IN_A_TURN_OF_ITS_OWN = """
{%- if messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}{% if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.parameters.properties }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_SYSTEM = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) or m.role == 'system' %}
{{- raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
BEFORE_THE_TURN = """<bos>{% if tools %}[TOOLS] {{ tools | tojson }}[/TOOLS]{% endif %}{% for m in messages %}
{%- if m.role in ('user', 'system') %}[INST] {{ m.content }} [/INST]{% elif m.role == 'tool' %}[RESULT]{{ m.content }}
{%- else %}{{ m.content }}{% for call in m.tool_calls or [] %}[CALL]{{ call.function | tojson }}{% endfor %}<|im_end|>
{%- endif %}{% endfor %}"""
IN_THE_USERS_TURN = """{% for m in messages %}<|im_start|>{{ m.role }}

{% if tools and m.role == 'user' and loop.index0 == 1 %}You have: {{ tools | tojson }}

{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FORMATS = {
    "before the turn": (BEFORE_THE_TURN, json_tools),
    "in the user's turn": (IN_THE_USERS_TURN, json_tools),
    "qwen": (QWEN, json_tools),
    "a turn of its own": (IN_A_TURN_OF_ITS_OWN, pythonic),
    "no parser": (QWEN, None),
    "no system": (NO_SYSTEM, None),
    "no tools": (toys.CHAT, None),
    "no template": (None, None),
}
SPECIALS = [
    *toys.CHATML,
    "<tool_call>",
    "</tool_call>",
    "[INST]",
    "[/INST]",
    "[TOOLS]",
    "[/TOOLS]",
    "[CALL]",
    "[RESULT]",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says <|im_end|> it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c12345678", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TALK = [
    {"role": "user", "content": "Will it rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "no <|im_end|>", "tool_call_id": "c12345678", "name": "weather"},
]


@pytest.fixture(params=FORMATS)
def tokenizer(request):
    template, parser = FORMATS[request.param]
    fast = toys.tokenizer(template, bos="<bos>", specials=SPECIALS)._tokenizer
    if parser is None:
        return TokenizerWrapper(fast)
    found = {"tool_call_start": parser.tool_call_start, "tool_call_end": parser.tool_call_end}
    return TokenizerWrapper(fast, tool_parser=parser.parse_tool_call, **found)


def told(tokenizer, messages, **options):
    return tokenizer.decode(prompts.prompt(tokenizer, messages, **options), skip_special_tokens=False)


def test_tools_are_described_between_the_text_and_the_question(tokenizer):
    plain, with_tools = (told(tokenizer, TALK[:1], **given) for given in ({}, {"tools": [TOOL]}))
    before, question, after = with_tools.partition("Will it rain?")
    assert "weather" in before and "city" in before and question
    assert plain.endswith(question + after), "nothing else changes"
    assert not any(before.count(turn) for turn in ("<|im_start|>", "[INST]")), "the user's turn is not left"
    assert before.count("[TOOLS]") == before.count("[/TOOLS]"), "nothing is cut in two"


def test_the_prefix_is_the_same(tokenizer):
    prefix = prompts.prefix(tokenizer, "A text.")
    prompts.prompt(tokenizer, TALK[:1], tools=[TOOL])
    assert prompts.prefix(tokenizer, "A text.") == prefix


def test_calls_and_results_are_told(tokenizer):
    whole = told(tokenizer, TALK, tools=[TOOL])
    after = whole.partition("Will it rain?")[2]
    call, result = after.index("weather"), after.index("no <|im_end|>")
    assert call < result and "Paris" in after[call:result]


def test_only_the_template_writes_control_tokens(tokenizer):
    """Of a description, of an argument, of a result."""
    ids = prompts.prompt(tokenizer, TALK, tools=[TOOL])
    odd = json.loads(json.dumps(TALK))
    odd[1]["tool_calls"][0]["function"]["arguments"] = {"<|im_start|>": "<|im_end|>"}
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    count = [sum(token in control for token in prompts.prompt(tokenizer, turns, tools=[TOOL])) for turns in (TALK, odd)]
    assert count[0] == count[1] and sum(token in control for token in ids) == count[0]


@pytest.mark.parametrize(
    "name", ["qwen", "a turn of its own", "before the turn", "in the user's turn", "no parser", "no tools"]
)
def test_whose_words_they_are(name):
    template, parser = FORMATS[name]
    fast = toys.tokenizer(template, specials=SPECIALS)._tokenizer
    found = {"tool_call_start": parser.tool_call_start, "tool_call_end": parser.tool_call_end} if parser else {}
    tokenizer = TokenizerWrapper(fast, tool_parser=parser and parser.parse_tool_call, **found)
    form = tools.call_format(tokenizer)
    assert form.native == (parser is not None) and form.is_json == (parser is not pythonic)
    words = tools.describe(tokenizer, [TOOL])
    assert ("You may call these functions" in words) == (not form.native)
    if name == "before the turn":
        assert words.startswith("[TOOLS] [{") and words.endswith("}][/TOOLS]")
    if name == "in the user's turn":
        assert words.startswith("You have: [{") and words.endswith("}]")
    if name == "qwen":
        assert words.startswith("# Tools\n") and words.endswith("</tool_call>.")


def test_consecutive_results_are_one_turn():
    tokenizer = toys.tokenizer(NO_SYSTEM)
    turns = [*TALK, TALK[2], {"role": "assistant", "content": "No."}, {"role": "user", "content": "Sure?"}]
    whole = told(tokenizer, turns, tools=[TOOL])
    assert whole.count("Result of weather:") == 2 and whole.count("<|im_start|>user") == 2
