"""Chat templates: the text that transformers writes, and nothing that a template does wrong gets out of its process."""

import copy
import os
import threading
import time

import pytest

from nectar_mlx import NectarError
from nectar_mlx.core import isolated
from nectar_mlx.mlxlm import prompts
from nectar_mlx.models import template
from tests import toys
from tests.models.hostile_gguf import TEMPLATES

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi, é 你 🙂 <b>\"'\n", "name": None},
    {"role": "assistant", "content": "<think>x</think> Hello", "reasoning_content": "x"},
    {"role": "user", "content": "and?"},
]
USED = {
    "loops": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ loop.index0 }}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'a': 'é<'} | tojson(ensure_ascii=True) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}",
    "thoughts": "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}{{ m.name is defined }}{% endfor %}",
    "variables": "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}{{ enable_thinking }}"
    "{{ add_generation_prompt }}",
    "methods": "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ messages[::-1][0].content.upper() }}",
    "date": "{{ strftime_now('%Y')[:2] }}{{ dict(a=1).items() | list }}",
    "blocks": "  {%- if true %}\n    a\n  {% endif %}\n b\n\n",
}


@pytest.fixture
def tokenizer():
    return copy.deepcopy(toys.tokenizer())


def with_template(tokenizer, text):
    tokenizer._tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False, "add_generation_prompt": True}])
def test_the_text_is_that_of_transformers(tokenizer, name, options):
    with_template(tokenizer, USED[name])
    assert template.render(tokenizer, CHAT, **options) == tokenizer.apply_chat_template(CHAT, tokenize=False, **options)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"drops", "power", "huge", "megabyte", "nested", "blocks"}))
def test_a_hostile_template_is_one_line_soon(tokenizer, name):
    prompts.prefix(tokenizer, "the process is running")
    with_template(tokenizer, TEMPLATES[name])
    with pytest.raises(NectarError, match="chat template") as error:
        prompts.prefix(tokenizer, "the text")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_it_is_stopped_by_what_it_computes(tokenizer):
    start = time.process_time()
    with pytest.raises(NectarError, match="takes more than"):
        template.render(with_template(tokenizer, TEMPLATES["loop"]), CHAT)
    assert time.process_time() - start < 1, "of this process"
    assert template.render(with_template(tokenizer, "{{ 1 + 1 }}"), CHAT) == "2", "another process is started"


def test_a_long_conversation_from_many_threads(tokenizer):
    with_template(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    found = {}

    def ask(n):
        text = f"{n}é" * 300_000
        found[n] = template.render(tokenizer, [{"role": "user", "content": text}]) == text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_a_tokenizer_with_python_code_of_its_own_is_asked(tokenizer):
    tokenizer._chat_template = lambda messages, **options: f"{len(messages)} by hand"
    assert template.render(tokenizer, CHAT) == "4 by hand"


def test_a_process_of_ours_takes_no_module_from_the_current_folder(tmp_path, monkeypatch):
    import subprocess

    for name in ("pip", "json", "runpy", "jinja2"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the {name}.py that lies here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.setenv("PYTHONPATH", os.curdir)
    done = subprocess.run(isolated.module("pip", "--version"), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("pip "), done.stderr


def test_a_process_that_has_just_ended_is_one_line():
    process = template._Process()
    assert process.render("{{ messages }}", {"messages": "a"}) == "a"
    running = process._running
    running.kill()
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
    running.poll = lambda: None  # as before the system says so
    with pytest.raises(NectarError, match="template"):
        process.render("{{ messages }}", {"messages": "a"})
    assert process.render("{{ messages }}", {"messages": "a"}) == "a"
    process.stop()
