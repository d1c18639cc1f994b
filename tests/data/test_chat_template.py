"""Chat templates against those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fiddlehead.data import ByteTokenizer, chat_template
from fiddlehead.data.chat_template import ChatTemplate
from fiddlehead.data.template_process import compiled
from fiddlehead.errors import ConfigError

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{ bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{{ ' ' + message['content'] + eos_token }}{% continue %}{% endif %}
{% endfor %}"""
TOOLS = """\
{% if tools is not none %}{{ 'tools' }}{% endif %}{% if documents is not none %}{{ 'documents' }}{% endif %}
{% for message in messages %}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}{{ message | tojson }}{% endif %}
{% endfor %}"""
MESSAGES = [
    {"role": "user", "content": " What is a fern? "},
    {"role": "assistant", "content": "A plant\nwith fronds."},
    {"role": "user", "content": "And {{ moss }}?"},
    {"role": "assistant", "content": "Another."},
]


def folder_with(template: str, tmp_path: Path, **settings: object) -> Path:
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens} | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_text_is_that_of_transformers(template: str, add_generation_prompt: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder_with(template, tmp_path) / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    ours = ChatTemplate.load(tmp_path)
    assert ours is not None
    for messages in (MESSAGES, MESSAGES[:3]):
        expected = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert ours.render(messages, add_generation_prompt) == expected


def test_an_answer_is_told_from_what_asks_for_it(tmp_path: Path) -> None:
    template = ChatTemplate.load(folder_with(CHATML, tmp_path))
    assert template is not None
    asked, whole = template.answer(MESSAGES, 1)
    assert asked == template.render(MESSAGES[:1], add_generation_prompt=True)
    assert whole == asked + "A plant\nwith fronds.<|im_end|>\n"


NOTHING_IS_REFUSED = "{% if messages[0]['role'] != 'system' %}{{ 'Be kind.' }}{% endif %}" + CHATML
"""As most do, it asks for the first message's role, which an empty conversation has not."""


@pytest.mark.parametrize(
    "template", [CHATML, NOTHING_IS_REFUSED, CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"]
)
def test_a_conversation_can_begin_with_an_answer(template: str) -> None:
    ours = ChatTemplate(template, {})
    asked, whole = ours.answer(MESSAGES[1:], 0)
    assert whole == ours.render(MESSAGES[1:2]) and asked.endswith("<|im_start|>assistant\n")
    assert whole.removeprefix(asked).startswith("A plant\nwith fronds.<|im_end|>\n")


def test_an_answer_that_is_not_written_after_what_asks_for_it_is_refused() -> None:
    template = ChatTemplate(CHATML.replace("assistant\\n'", "assistant\\n<think>'"), {}, "mine.jinja")
    with pytest.raises(ConfigError, match=r"mine\.jinja: asks for an answer with .*<think>'"):
        template.answer(MESSAGES, 1)


@pytest.mark.parametrize(
    "tools", [None, [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": None}}}]]
)
def test_tools_reach_the_template_for_them_as_in_transformers(
    tools: list[dict[str, Any]] | None, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    written = "{{ tools | tojson }}{{ messages[0].content }}"
    named = [{"name": "default", "template": "plain " + written}, {"name": "tool_use", "template": "tools " + written}]
    folder = folder_with("", tmp_path, chat_template=named, eos_token="</s>")
    (folder / "chat_template.jinja").unlink()
    ours, theirs = ChatTemplate.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours is not None
    assert ours.render(MESSAGES, tools=tools) == theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)


def test_a_template_s_own_refusal_and_mistakes_are_said(tmp_path: Path) -> None:
    template = ChatTemplate.load(folder_with(MISTRAL, tmp_path))
    assert template is not None
    with pytest.raises(ConfigError, match="roles must alternate"):
        template.render(MESSAGES[1:])
    broken = ChatTemplate.load(folder_with("{% if %}", tmp_path))
    assert broken is not None
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: "):
        broken.render(MESSAGES)


def test_a_template_that_computes_what_cannot_be_is_told(tmp_path: Path) -> None:
    template = ChatTemplate.load(folder_with("{{ messages[0].content + 1 }}", tmp_path))
    assert template is not None
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: can only concatenate str"):
        template.render(MESSAGES)


def test_a_template_is_compiled_once() -> None:
    assert compiled(CHATML) is compiled(CHATML)


def test_a_template_runs_nothing(tmp_path: Path) -> None:
    template = ChatTemplate.load(folder_with("{{ ''.__class__.__mro__[1].__subclasses__() }}", tmp_path))
    assert template is not None
    with pytest.raises(ConfigError, match="unsafe"):
        template.render(MESSAGES)


def test_a_template_in_the_settings_is_found_and_none_is_none(tmp_path: Path) -> None:
    folder = folder_with(
        "", tmp_path, chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    )
    (folder / "chat_template.jinja").unlink()
    found = ChatTemplate.load(folder)
    assert found is not None and found.render(MESSAGES) == "d"
    (folder / "tokenizer_config.json").unlink()
    assert ChatTemplate.load(folder) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes too long"),
        ("{{ 'x' * 10000000000 }}", "needs more than"),
        (
            "{% set n = namespace(x='x' * 999) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "needs more",
        ),
        ("{{ 'x'.center(10000000000) }}", "needs more than"),
        ("{{ range(99999) | join('x' * 999999) }}", "needs more than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
        ("{{ 'x' * 20000000 }}", "writes more than"),
        ("{{ 1 // 0 }}", "division"),
        ("(" * 9 + "{{ " + "(" * 9999, "nested too deep"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
    ],
)
def test_a_template_that_does_not_end_or_asks_for_too_much_is_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"chat_template: .*{message}"):
        ChatTemplate(template, {}).render(MESSAGES)
    assert ChatTemplate("{{ messages[0].role }}", {}).render(MESSAGES) == "user"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes too long"),
        ("{{ 'x' * 10000000000 }}", "needs more than 128 MB"),
        ("{{ range(99999) | join('x' * 999999) }}", "needs more than 128 MB"),
    ],
)
def test_where_the_system_does_not_limit_memory_it_is_watched(template: str, message: str, monkeypatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(chat_template, "LIMITED", False)
    monkeypatch.setattr(chat_template, "_renderer", chat_template._Renderer())
    with pytest.raises(ConfigError, match=f"chat_template: {message}"):
        ChatTemplate(template, {}).render(MESSAGES)
    assert ChatTemplate("{{ messages[0].role }}", {}).render(MESSAGES) == "user"
    chat_template._renderer.stop()
