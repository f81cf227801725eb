"""GGUF beside the package gguf, which quantizes and reads, and transformers, which reads the whole model.

A small random file for each type, and SmolLM2-135M-Instruct in work/real (make real-assets), if it is there.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import small_llama, write_model
from helpers import dev, host

import tinyft as ft
from tinyft import data
from tinyft.chat import template_of
from tinyft.compress import FORMATS
from tinyft.formats.gguf import read_gguf

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'tinyft[peers]'")
torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
from tokenizers import pre_tokenizers  # noqa: E402
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402

SMOLLM = Path(__file__).parents[2] / "work/real/SmolLM2-135M-Instruct.Q4_1.gguf"
REAL = pytest.mark.skipif(not SMOLLM.is_file(), reason="SmolLM2 is not in work/real: make real-assets")
KINDS = pytest.mark.parametrize("kind", FORMATS)
NUMERIC = re.compile(r"[\d½Ⅷ²]")                         # every numeric character of the lines
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ODD = [
    "", " ", "  ", "\t", "\n", "\r\n", " \n \n\n", "a\u00a0b", "\u2003wide", "\u200bzero", "x  ", "  x", "\ufeffx",
    "don't DON'T we'll", "1", "12", "1234567", "3.14e-10", "٣٤", "½ Ⅷ ²", "a1b22c333", "café cafe\u0301", "naïve", "ﬁ",
    "漢字かな交じり文", "한국어", "العربية", "हिन्दी", "Ελληνικά", "ไทย", "🙂👍🏽👨‍👩‍👧", "\x00\x01\x7f", "𝔘𝔫𝔦", "Ⓐ",
    "def f(x):\n\treturn x  # comment\n", "if (a && b) { c[0]++; }", "SELECT * FROM t WHERE x != 'y';",
    "\\n\\t\\u0041", "a_b __init__ CamelCase", "$x^2$ \\frac{1}{2}", "!!!???...", "-----", "a" * 300, "é" * 100,
    "<|im_start|>user\nHi<|im_end|>\n", "x<|endoftext|>y", "<|im_start", "|im_end|>", "<|IM_END|>", "<repo_name>a",
]


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@KINDS
def test_quantized_bytes_and_dense_values_are_those_of_the_package(kind, rng):
    W = rng.standard_normal((200, 96)) * rng.choice([1e-6, 1e-3, 1, 50], (200, 1))
    W[1, :32] = 0
    W[2, 32:64] = 0.25
    W[3] = np.round(W[3] * 4) / 4                          # ties
    W = W.astype(np.float32)
    wanted = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.quantize(W, wanted)
    ours = FORMATS[kind].quantize(dev(W))
    np.testing.assert_array_equal(ours.file_blocks().reshape(200, -1), theirs)
    np.testing.assert_array_equal(host(ours.dequantize()), gguf.quants.dequantize(theirs, wanted))


# ── small files ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *FORMATS])
def test_the_reader_gives_what_the_packages_reader_gives(kind, tmp_path):
    file = write_model(tmp_path / "m.gguf", small_llama(), kind)
    theirs = gguf.GGUFReader(file)
    ours = read_gguf(file)
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert mine.kind == t.tensor_type.name
        assert mine.shape == tuple(reversed(t.shape.tolist()))
        assert mine.data.tobytes() == np.ascontiguousarray(t.data).tobytes()
    for key, found in ours.metadata.items():
        wanted = theirs.fields[key].contents()
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == wanted


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *FORMATS])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_logits_are_those_of_transformers(kind, architecture, tmp_path):
    original = small_llama(qkv_bias=architecture == "qwen2", tied=False)
    rng = np.random.default_rng(1)
    for name, p in original.named_parameters().items():
        if name.endswith("bias"):
            p.copy_(rng.standard_normal(p.shape))
    changes = {"tokenizer.ggml.pre": "qwen2"} if architecture == "qwen2" else {}
    file = write_model(tmp_path / "m.gguf", original, kind, architecture, changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = rng.integers(3, 260, (2, 9))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
    for packed in (False, True):
        model, _ = ft.load(file, packed=packed)
        found = host(model(ids))
        np.testing.assert_allclose(found, expected, atol=2e-5 * abs(expected).max())


# ── SmolLM2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def smollm() -> Any:
    """(our model, our tokenizer, theirs, their tokenizer)"""
    model, tokenizer = ft.load(SMOLLM)
    folder, file = str(SMOLLM.parent), SMOLLM.name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return model, tokenizer, theirs, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def their_ids(tokenizer: Any, text: str) -> list[int]:
    """Its ids of a text. It would begin each text with the token `bos`, although the file says add_bos_token false."""
    return tokenizer(text, add_special_tokens=False).input_ids


@REAL
def test_smollm_says_that_paris_is_the_capital_of_france_token_by_token(smollm):
    model, tokenizer, theirs, their_tokenizer = smollm
    prompt = ft.chat_prompt(QUESTION, tokenizer)
    ids = np.array([tokenizer.encode(prompt).ids])
    assert ids.tolist() == [their_ids(their_tokenizer, prompt)]
    end = tokenizer.token_to_id(ft.chat_end(tokenizer))
    wanted = theirs.generate(torch.tensor(ids), max_new_tokens=40, do_sample=False, eos_token_id=end, pad_token_id=end)
    found = ft.generate(model, ids, 40, end=end)
    assert found.tolist() == wanted.tolist()
    assert tokenizer.decode(found[0, ids.shape[1]:].tolist()) == "The capital of France is Paris."
    assert ft.predict(model, tokenizer, [prompt]) == ["The capital of France is Paris."]
    packed, _ = ft.load(SMOLLM, packed=True)
    assert ft.generate(packed, ids, 40, end=end).tolist() == wanted.tolist()


@REAL
def test_the_logits_of_smollm(smollm):
    model, tokenizer, theirs, _ = smollm
    ids = np.array([tokenizer.encode(ft.chat_prompt(QUESTION, tokenizer) + "The capital of France is Paris.").ids])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(host(model(ids)), expected, atol=1e-4 * abs(expected).max())
    packed, _ = ft.load(SMOLLM, packed=True)
    np.testing.assert_allclose(host(packed(ids)), expected, atol=1e-4 * abs(expected).max())
    nbytes = sum(m.nbytes for m in packed.modules() if isinstance(m, ft.Packed))
    assert nbytes + sum(p.data.nbytes for p in packed.parameters()) < 100e6


def lines() -> list[str]:
    """1,000 lines of the snapshot, prose and source, and odd ones."""
    found: dict[str, None] = {}
    for record in data.snapshot():
        found.update(dict.fromkeys(line for line in record.text.split("\n") if line.strip()))
    every = list(found)
    chosen = np.random.default_rng(0).choice(len(every), 1000, replace=False)
    return [every[i] for i in chosen] + ODD


@REAL
def test_ids_are_those_of_transformers_on_1000_lines(smollm):
    """transformers leaves out the first step of SmolLM2's own tokenizer, to cut out every digit, when it reads a GGUF
    file. So lines with several blanks before a digit get other ids there. With that step, all are equal."""
    _, tokenizer, _, theirs = smollm
    texts = lines()
    assert len(texts) > 1000
    assert sum(not text.isascii() for text in texts) > 20
    ours = [tokenizer.encode(text).ids for text in texts]
    as_read = [their_ids(theirs, text) for text in texts]
    without_digits = [i for i, text in enumerate(texts) if not NUMERIC.search(text)]
    assert [ours[i] for i in without_digits] == [as_read[i] for i in without_digits]
    assert sum(a != b for a, b in zip(ours, as_read, strict=True)) < 20
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    for text, ids in zip(texts, ours, strict=True):
        assert their_ids(theirs, text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@REAL
def test_special_tokens_and_saving_for_transformers(smollm, tmp_path):
    model, tokenizer, _, _ = smollm
    ft.save(model, tmp_path, tokenizer, "float16")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|im_end|>", "<|im_end|>", "<|im_start|>")
    assert theirs.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == ft.chat_prompt(
        QUESTION, tokenizer)
    for text in ODD:
        assert theirs(text).input_ids == tokenizer.encode(text).ids, text


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
SYSTEM = {"role": "system", "content": "You answer in rhymes.\n{{ no program }}"}
REPLY = {"role": "assistant", "content": " Paris!\n\n"}
CONVERSATIONS = [
    QUESTION,
    [SYSTEM, *QUESTION],
    [*QUESTION, REPLY, {"role": "user", "content": ""}],
    [SYSTEM, *QUESTION, REPLY, {"role": "user", "content": "<|im_end|> 'quoted' \"twice\" é 🙂\t"}, REPLY],
    [*QUESTION, SYSTEM, *QUESTION],
    [{"role": "system", "content": ""}, *QUESTION],
]
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- "\n\n# Tools\n\n<tools>" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def rendered(template: str, messages: list, add_generation_prompt: bool) -> str:
    """The text that transformers makes with a template."""
    texts, _ = render_jinja_template(conversations=[messages], chat_template=template,
                                     add_generation_prompt=add_generation_prompt, bos_token="<|begin_of_text|>")
    return texts[0]


@pytest.mark.parametrize("template", [QWEN2, QWEN25, LLAMA3])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_are_those_of_the_jinja_program(template, add_generation_prompt):
    for messages in CONVERSATIONS:
        found = ft.chat_prompt(messages, template_of(template), add_generation_prompt=add_generation_prompt)
        assert found == rendered(template, messages, add_generation_prompt)
    named = {QWEN2: "qwen2", QWEN25: "qwen2.5", LLAMA3: "llama3"}[template]
    assert ft.chat_prompt(QUESTION, named) == ft.chat_prompt(QUESTION, template_of(template))


@REAL
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_of_smollm_are_those_of_its_own_template(smollm, add_generation_prompt):
    _, tokenizer, _, theirs = smollm
    assert theirs.chat_template == tokenizer.chat_template
    for messages in CONVERSATIONS:
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert ft.chat_prompt(messages, tokenizer, add_generation_prompt=add_generation_prompt) == wanted
        assert ft.chat_prompt(messages, "smollm2", add_generation_prompt=add_generation_prompt) == wanted
