"""Messages name things that exist: `ops.cross_entropy(logits, labels)`, tinyft.unpack, Batches.load_state_dict.

A message is a string with a space in it that is no docstring. Two kinds of names are looked up in it:

    owner.name   the owner is the library, one of its modules or classes, or one of OWNERS
    name(        a function, a method or a class of the library, or one of FOREIGN
"""
from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers import host_only
from house import FUNCTIONS, SOURCES, parse

import tinyft
from tinyft.nn import Module
from tinyft.optim import Optimizer

pytestmark = host_only

DOTTED = re.compile(r"(?<![\w./-])([A-Za-z_]\w*)((?:\.[A-Za-z_]\w*)+)")
CALLED = re.compile(r"(?<![\w./-])((?:[A-Za-z_]\w*\.)*)([A-Za-z_]\w*)\((?!s\))")
ENDINGS = {"bin", "cpp", "cu", "gguf", "h", "html", "jinja", "json", "jsonl", "md", "png", "py", "safetensors", "so",
           "svg", "txt", "xz"}                             # of file names
# Owners by another name than their own.
OWNERS = {"ft": tinyft, "numpy": np, "model": Module, "optimizer": Optimizer, "tokenizer": tokenizers.Tokenizer}
# Names of others, and what they belong to.
FOREIGN = {
    "LLM.int8": "the title of a paper", "__syncthreads": "CUDA", "dynamic_shared": "the emulator of CUDA",
    "from_pretrained": "transformers", "no_padding": "tokenizers", "no_truncation": "tokenizers",
    "pytest.mark.parametrize": "pytest", "test": "the file of tests that `tinyft start` writes",
    "tokenizer.ggml": "a key of a GGUF file", "config": "a configuration, in the text of a model card",
}


def messages(text: str) -> Iterator[str]:
    """The strings of a source text that have a space and are no docstrings."""
    tree = parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and node.body:
            docstrings.add(id(getattr(node.body[0], "value", None)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if " " in node.value:
                yield node.value


@lru_cache(None)
def owners() -> dict[str, Any]:
    """{name: module or class} of the library: its outer modules, the classes of all modules, and OWNERS."""
    found: dict[str, Any] = {}
    for module in SOURCES:
        if module.endswith("__main__") or module.startswith("tinyft.kernels.cuda."):
            continue                                       # a program; modules that import CuPy
        loaded = importlib.import_module(module)
        if module.count(".") <= 1:
            found[module.rpartition(".")[2]] = loaded
        for name, value in vars(loaded).items():
            if inspect.isclass(value) and value.__module__.startswith("tinyft"):
                found[name] = value
    return found | OWNERS


@lru_cache(None)
def callables() -> set[str]:
    """The names of all functions, methods and classes of the library, and of Python."""
    defined = set(dir(builtins))
    for text in SOURCES.values():
        defined |= {node.name for node in ast.walk(parse(text)) if isinstance(node, (ast.ClassDef, *FUNCTIONS))}
    return defined


def unknown_names(message: str) -> list[str]:
    """The names in a message that do not exist."""
    found = []
    for owner, rest in DOTTED.findall(message):
        names = rest[1:].split(".")
        name = owner + rest
        is_foreign = any(name == key or name.startswith(f"{key}.") for key in FOREIGN)
        if owner in owners() and names[-1] not in ENDINGS and not is_foreign and not has(owners()[owner], names):
            found.append(name)
    for before, name in CALLED.findall(message):
        is_known = name in callables() or before.split(".")[0] in owners()         # those were looked up above
        if not is_known and before + name not in FOREIGN and name not in FOREIGN:
            found.append(f"{before}{name}(")
    return found


def has(owner: Any, names: list[str]) -> bool:
    """True if owner.name.name ... exists. What an instance has beside its class's attributes counts as well."""
    for name in names:
        if inspect.isclass(owner) and name in getattr(owner, "__annotations__", {}):
            return True
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def test_messages_name_what_exists():
    wrong = []
    for module, text in SOURCES.items():
        for message in messages(text):
            wrong += [f"{module}: {name} in {message!r}" for name in unknown_names(message)]
    assert wrong == []


@pytest.mark.parametrize("message, name", [
    ("the loss comes from functional.cross_entropy(logits, labels)", "functional.cross_entropy"),
    ("unpack the model first (tinyft.unpak)", "tinyft.unpak"),
    ("use ft.AdamW16bit", "ft.AdamW16bit"),
    ("call optimizer.zero_gradients() first", "optimizer.zero_gradients"),
    ("Batches.load_state wants a state", "Batches.load_state"),
    ("call its no_cutting() first", "no_cutting("),
    ("a generator: rng=numpy.random.default_generator(seed)", "numpy.random.default_generator"),
    ("this library's ops.attention.mask is gone", "ops.attention.mask"),
])
def test_a_message_with_a_name_that_does_not_exist_is_caught(message, name):
    assert unknown_names(message) == [name]


@pytest.mark.parametrize("message", [
    "the loss comes from ops.cross_entropy(logits, labels)", "unpack the model first (tinyft.unpack)",
    "got no tokenizer.json in it", "Batches.load_state_dict wants a state", "rng=numpy.random.default_rng(seed)",
    "encode the text first, tokenizer.encode(text).ids", "the block(s) of attn.q", "config.json: n_embd is missing",
])
def test_a_message_with_names_that_exist_passes(message):
    assert unknown_names(message) == []


def test_a_docstring_is_no_message_and_a_part_of_an_fstring_is_one():
    text = 'def f(x):\n    "see ops.nothing for more"\n    raise ValueError(f"see ops.none at {x}")\n'
    assert list(messages(text)) == ["see ops.none at "]
