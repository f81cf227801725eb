"""Conversations as prompts: the formats, the templates of files that are recognised, and conversations that are none.

tests/peers/test_gguf_peers.py compares with transformers' apply_chat_template.
"""
from __future__ import annotations

import json
from typing import Any

import pytest
from gguf_files import SYSTEM, TEMPLATE
from tokenizers import Tokenizer, models

import tinyft as ft
from tinyft.chat import TEMPLATES, ChatTemplate, chat_end, chat_prompt, template_of

USER = [{"role": "user", "content": "What is 2 + 2?"}]
TURNS = [*USER, {"role": "assistant", "content": " Four.\n"}, {"role": "user", "content": ""}]


def named(kind: str) -> str:
    """A template text with this format: as files spell it."""
    body = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    other = '{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>" + "\\n" }}'
    turn = {"newlines": body, "escapes": other}[kind]
    end = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    return "{% for message in messages %}" + turn + "{% endfor %}" + end


def test_chatml_to_the_letter():
    assert chat_prompt(USER) == "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert chat_prompt(USER, add_generation_prompt=False) == "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    assert chat_prompt(TURNS, "qwen2") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n Four.\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    own = [{"role": "system", "content": "Be brief."}, *USER]
    for name in ("smollm2", "qwen2", "qwen2.5", "chatml"):
        assert chat_prompt(own, name).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_llama3_to_the_letter():
    assert chat_prompt(TURNS, "llama3") == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFour.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert chat_end("llama3") == "<|eot_id|>"
    assert chat_end("smollm2") == "<|im_end|>"


def test_the_conversation_is_not_changed():
    messages = [dict(message) for message in TURNS]
    chat_prompt(messages, "smollm2")
    assert messages == TURNS


@pytest.mark.parametrize("kind", ["newlines", "escapes"])
def test_a_template_of_a_file_is_recognised(kind):
    assert template_of(named(kind)) == TEMPLATES["chatml"]
    found = template_of(TEMPLATE)
    assert found.system == SYSTEM
    assert chat_prompt(USER, found).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user")
    assert template_of(TEMPLATE.replace("\n", "\\n")) == found


@pytest.mark.parametrize("text", [
    "", "{{ messages }}", "[INST] {{ messages[0].content }} [/INST]",
    named("newlines").replace("message['content']", "message['content'] | trim"),
    "{{ bos_token }}" + named("newlines"),
    named("newlines").replace("add_generation_prompt", "true"),
    named("newlines") + "{{ strftime_now('%d %b %Y') }}",
    named("newlines").replace("{% endfor %}", "{% if '</think>' in content %}{% endif %}{% endfor %}"),
    named("newlines").replace("<|im_end|>", "<|end|>"),
    named("newlines").replace("message['role']", "message['from']"),
])
def test_an_unknown_template_is_refused_with_the_alternative(text):
    with pytest.raises(ValueError, match="is not known here: name the format it has, template= one of chatml, "):
        template_of(text)


def tokenizer(template: str | None) -> Tokenizer:
    out = Tokenizer(models.BPE({"a": 0}, []))
    if template is not None:
        out.chat_template = template
    return out


def test_a_tokenizer_carries_its_template():
    assert chat_prompt(USER, tokenizer(TEMPLATE)) == chat_prompt(USER, template_of(TEMPLATE))
    assert chat_end(tokenizer(TEMPLATE)) == "<|im_end|>"
    for bare in (tokenizer(None), tokenizer("x")):
        with pytest.raises(ValueError, match="template= one of chatml"):
            chat_prompt(USER, bare)


@pytest.mark.parametrize("template, error", [
    ("chatm", ValueError), (None, TypeError), (3, TypeError), (b"x", TypeError)])
def test_a_template_of_another_kind(template, error):
    with pytest.raises(error, match="chat_prompt: template wants"):
        chat_prompt(USER, template)


@pytest.mark.parametrize("messages, error, words", [
    ([], ValueError, "at least one message, got an empty list"),
    ("Hello", TypeError, "a list of messages, got 'Hello'"),
    (None, TypeError, "a list of messages"),
    ({"role": "user", "content": "x"}, TypeError, "a list of messages"),
    (["Hello"], TypeError, "message 1 wants a dict"),
    ([*USER, {"role": "tool", "content": "x"}], ValueError, "message 2: role wants one of 'system', 'user'"),
    ([{"role": "User", "content": "x"}], ValueError, "role wants one of"),
    ([{"role": None, "content": "x"}], ValueError, "role wants one of"),
    ([{"role": "user", "content": None}], TypeError, "message 1: content wants a text, got None"),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], TypeError, "content wants a text"),
    ([{"role": "user"}], ValueError, "message 1 wants the keys role and content alone, got 'role'"),
    ([{}], ValueError, "wants the keys role and content alone, got none"),
    ([{"role": "user", "content": "x", "name": "y"}], ValueError, "alone, got 'role', 'content', 'name'"),
    ([{"role": "system", "content": "x"}], ValueError, "a message of the role user, got none"),
    ([{"role": "assistant", "content": "x"}], ValueError, "a message of the role user, got none"),
])
def test_what_is_no_conversation_is_refused_in_one_sentence(messages, error, words):
    for template in TEMPLATES:
        with pytest.raises(error, match=words) as caught:
            chat_prompt(messages, template)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="add_generation_prompt wants True or False"):
        chat_prompt(USER, add_generation_prompt=1)


# ── directories ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def folder(tmp_path):
    model = ft.GPT(ft.GPTConfig(20, 8, 8, 1, 2), seed=0)
    ft.save(model, tmp_path / "m", tokenizer(None))
    return tmp_path / "m"


def settings(folder: Any, entry: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": entry}))


def test_a_directory_holds_its_template_in_one_of_three_places(folder):
    assert ft.load(folder)[1].chat_template is None
    settings(folder, "of the settings")
    model, loaded = ft.load(folder)
    assert loaded.chat_template == "of the settings"
    ft.save(model, folder.parent / "again", loaded)
    assert ft.load(folder.parent / "again")[1].chat_template == "of the settings"
    settings(folder, [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}])
    assert ft.load(folder)[1].chat_template == "y"
    (folder / "chat_template.jinja").write_text("of its file\n")
    assert ft.load(folder)[1].chat_template == "of its file\n"


@pytest.mark.parametrize("entry", [3, {"default": "x"}, [{"name": "default", "template": 3}]])
def test_a_damaged_template_is_refused(folder, entry):
    settings(folder, entry)
    with pytest.raises(ValueError, match="chat_template wants a text, or a list of named texts"):
        ft.load(folder)


def test_a_template_file_that_is_none(folder):
    file = folder / "chat_template.jinja"
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="tokenizer_config.json|chat_template.jinja"):
        ft.load(folder)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match="is no ordinary file"):
        ft.load(folder)
    file.unlink()
    file.write_bytes(b"x" * (1 << 22) + b"x")
    with pytest.raises(ValueError, match="at most 4,194,304 bytes"):
        ft.load(folder)


def test_a_chat_template_is_a_value():
    assert ChatTemplate(TEMPLATES["chatml"].render, "<|im_end|>") == TEMPLATES["chatml"]
