"""Prefix and prompt under chat templates of more families, with and without thinking. Written here with the structure
of the published ones: what opens turns, where thoughts begin, what stands before the first turn."""

import pytest

from nectar_mlx import NectarError
from nectar_mlx.mlxlm import prompts
from tests import toys


def turns(user, assistant, end, answer="", *, head=""):
    """A template of turns that open and end with these texts; answer: what opens one beside that."""
    return (
        f"{head}{{% for m in messages %}}{{% if m.role == 'user' %}}{user}{{{{ m.content }}}}{end}"
        f"{{% else %}}{assistant}{{{{ m.content }}}}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{answer}{{% endif %}}"
    )


def thinking(on, off):
    """enable_thinking is on unless it is false, as in most templates."""
    return f"{{% if enable_thinking is defined and not enable_thinking %}}{off}{{% else %}}{on}{{% endif %}}"


QWEN35 = turns(
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
    thinking("<think>\n", "<think>\n\n</think>\n\n"),
)
LFM2 = turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", head="{{ bos_token }}")
GRANITE4 = turns(
    "<|start_of_role|>user<|end_of_role|>",
    "<|start_of_role|>assistant<|end_of_role|>",
    "<|end_of_text|>\n",
    head="<|start_of_role|>system<|end_of_role|>You are a helpful assistant.<|end_of_text|>\n",
)
GLM47 = turns("<|user|>", "<|assistant|>", "", thinking("<think>", "</think>"), head="[gMASK]<sop>")
NEMOTRON = turns(
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
    thinking("<think>\n", "<think></think>"),
    head="<|im_start|>system\n<|im_end|>\n",
)
DEEPSEEK = turns("<|User|>", "<|Assistant|>", "", thinking("<think>", "</think>"), head="{{ bos_token }}")
KIMI = turns("<|im_user|>user<|im_middle|>", "<|im_assistant|>assistant<|im_middle|>", "<|im_end|>")
# These say before the first turn whether there are thoughts.
GEMMA4 = turns(
    "<|turn>user\n",
    "<|turn>model\n",
    "<turn|>\n",
    head="{{ bos_token }}{% if enable_thinking %}<|turn>system\n<|think|><turn|>\n{% endif %}",
)
SMOLLM3 = turns(
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
    thinking("", "<think>\n\n</think>\n"),
    head=f"<|im_start|>system\nReasoning Mode: {thinking('/think', '/no_think')}<|im_end|>\n",
)
SPECIALS = [
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<bos>", "<|start_of_role|>", "<|end_of_role|>"),
    *("<|end_of_text|>", "<|user|>", "<|assistant|>", "[gMASK]", "<sop>", "<|User|>", "<|Assistant|>"),
    *("<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|turn>", "<turn|>", "<|think|>"),
]
# template, what opens an answer with thoughts and without; None where the template says so before the document
TEMPLATES = {
    "qwen3.5": (QWEN35, "<think>\n", "<think>\n\n</think>\n\n"),
    "lfm2": (LFM2, "", ""),
    "granite4": (GRANITE4, "", ""),
    "glm4.7": (GLM47, "<think>", "</think>"),
    "nemotron_h": (NEMOTRON, "<think>\n", "<think></think>"),
    "deepseek_v3": (DEEPSEEK, "<think>", "</think>"),
    "kimi": (KIMI, "", ""),
    "gemma4": (GEMMA4, None, ""),
    "smollm3": (SMOLLM3, None, "<think>\n\n</think>\n"),
}
TEXT, QUESTION = "The fox is brown.", "Who is the fox?"


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("think", [False, True], ids=["plain", "thinking"])
def test_prefix_and_prompt_are_the_whole_conversation(family, think):
    template, *openings = TEMPLATES[family]
    tokenizer, opening = toys.tokenizer(template, bos="<bos>", specials=SPECIALS), openings[0 if think else 1]
    prefix = prompts.prefix(tokenizer, TEXT)
    if opening is None:
        with pytest.raises(NectarError, match="enable_thinking=True before the document"):
            prompts.prompt(tokenizer, QUESTION, enable_thinking=think)
        return
    prompt = prompts.prompt(tokenizer, QUESTION, enable_thinking=think)
    whole = [{"role": "user", "content": f"{prompts.INTRODUCTION}{TEXT}\n\n{QUESTION}"}]
    options = {"add_generation_prompt": True, "enable_thinking": think, "tokenize": False}
    rendered = tokenizer.apply_chat_template(whole, **options)
    assert tokenizer.decode(prefix + prompt) == rendered
    assert rendered.endswith(opening)
    assert prefix + prompt == tokenizer.encode(rendered, add_special_tokens=False)
