"""Soft prompts and prefixes in PEFT's files, both ways: one table, prompt_embeddings.

    PromptTuning    P (p, C)
    PrefixTuning    (p, 2 L H D): its columns are [K_0 | V_0 | K_1 | V_1 | ...], each head after head

H counts the key/value heads, which may be fewer than the query heads. The table holds the prefix itself: an MLP that
made it is gone, in PEFT too.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import array, edit
from ..checks import brief
from ..edit import Attached
from ..formats.directory import first_names
from ..methods.additive.prefix import Prefix, PrefixTuning, Shift
from ..methods.additive.prompt import PromptTuning, SoftPrompt
from ..models.blocks import Classifier
from ..nn import Module
from .exchange import Values
from .names import ModuleNames
from .peft_config import FILE, read_whole

__all__ = ["read_prefix", "read_prompt", "write_prefix", "write_prompt"]

PROMPT = "prompt_embeddings"

Tensors = dict[str, np.ndarray]


def write_prompt(model: Module, names: ModuleNames, a: Attached) -> tuple[dict[str, Any], Tensors]:
    """The soft prompt P as PEFT's prompt_embeddings."""
    _refuse_first_row(model)
    (P,) = [e.P for e in a.edits.values() if isinstance(e, SoftPrompt)]
    p, C = P.shape
    _check_length(p)
    heads = names.plan.config.heads
    layers = len(_kv_paths(model))
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": p, "token_dim": C, "num_transformer_submodules": 1,
              "num_attention_heads": heads, "num_layers": layers}
    return config, {PROMPT: array.asnumpy(P.data)}


def read_prompt(model: Module, names: ModuleNames, config: dict[str, Any],
                tensors: Tensors) -> tuple[PromptTuning, Values]:
    """PromptTuning, and P (p, C) from prompt_embeddings."""
    _refuse_first_row(model)
    p = read_whole(config, "num_virtual_tokens")
    C = names.plan.config.width
    _check_size(config, "token_dim", C)
    _check_size(config, "num_layers", len(_kv_paths(model)))
    P = _only_table(tensors, (p, C))
    (embedding,) = edit.token_embedding(model)
    return PromptTuning(p=p), {embedding: {"P": P}}


def write_prefix(model: Module, names: ModuleNames, a: Attached) -> tuple[dict[str, Any], Tensors]:
    """The prefixes of all layers as PEFT's prompt_embeddings (p, 2 L H D)."""
    method, edits = a.method.eject(dict(a.edits))
    heads, D, layers = _attention_sizes(model)
    p = method.p
    _check_length(p)
    is_shifted = any(isinstance(e, Shift) for e in edits.values())
    columns = []
    for path in _kv_paths(model):
        e = edits.get(path)
        if not isinstance(e, Prefix):
            raise ValueError(f"PEFT has a prefix in every layer, and {path} has none")
        K, V = array.asnumpy(e.K.data), array.asnumpy(e.V.data)                  # (H, p, D)
        if not is_shifted:
            K = _rotate(model, path, K, p)
        columns += [K.transpose(1, 0, 2).reshape(p, heads * D), V.transpose(1, 0, 2).reshape(p, heads * D)]
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": p, "token_dim": heads * D,
              "num_transformer_submodules": 1, "num_attention_heads": heads, "num_layers": layers,
              "encoder_hidden_size": heads * D, "prefix_projection": False}
    return config, {PROMPT: np.concatenate(columns, axis=1)}


def read_prefix(model: Module, names: ModuleNames, config: dict[str, Any],
                tensors: Tensors) -> tuple[PrefixTuning, Values]:
    """PrefixTuning with `shift`, as in PEFT, and K and V (H, p, D) of each layer from prompt_embeddings."""
    heads, D, layers = _attention_sizes(model)
    p = read_whole(config, "num_virtual_tokens")
    for key, size in (("num_layers", layers), ("num_attention_heads", heads), ("token_dim", heads * D)):
        _check_size(config, key, size)
    table = _only_table(tensors, (p, 2 * layers * heads * D))
    values: Values = {}
    rows = table.reshape(p, layers, 2, heads, D).transpose(1, 2, 3, 0, 4)        # (L, 2, H, p, D)
    for path, (K, V) in zip(_kv_paths(model), rows, strict=True):
        values[path] = {"K": K, "V": V}
    return PrefixTuning(p=p, shift=True), values


def _refuse_first_row(model: Module) -> None:
    """ValueError for a prompt before a classifier of the first position: BERT's."""
    if isinstance(model.head, Classifier) and not model.head.last:
        raise ValueError("with a prompt PEFT's BERT classifies the first row of the prompt, and this library's "
                         "classifies [CLS]: the two give different scores; use LoRA or PrefixTuning")


def _check_length(p: int) -> None:
    """ValueError for an empty prompt or prefix."""
    if p < 1:
        raise ValueError("PEFT wants at least one virtual token, got a length of 0")


def _check_size(config: dict[str, Any], key: str, size: int) -> None:
    """ValueError unless the config's size, if it is there, is this model's."""
    if config.get(key) not in (None, size):
        raise ValueError(f"{FILE}: the adapter belongs to another base: {key} is {brief(config[key])}, "
                         f"this model's is {size}")


def _only_table(tensors: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    """The array prompt_embeddings. ValueError for other tensors or another shape."""
    others = [n for n in tensors if n != PROMPT]
    if PROMPT not in tensors or others:
        got = first_names(others) if others else "none"
        raise ValueError(f"a prompt or a prefix wants one tensor, {PROMPT}, got {got}")
    if tensors[PROMPT].shape != shape:
        raise ValueError(f"{PROMPT} wants the shape {shape}, got {tensors[PROMPT].shape}")
    return tensors[PROMPT]


def _kv_paths(model: Module) -> list[str]:
    """The paths of the key/value parts of the blocks, bottom to top. ValueError for more than one stack."""
    stacks = edit.stacks(model)
    if len(stacks) != 1:
        raise ValueError(f"PEFT's prefix of a model with the stacks {', '.join(stacks)} is not read or written here")
    (blocks,) = stacks.values()
    return [f"{block}.attn.kv" for block in blocks]


def _attention_sizes(model: Module) -> tuple[int, int, int]:
    """(key/value heads, head width, layers)."""
    paths = _kv_paths(model)
    kv = edit.base_modules(model)[paths[0]]
    return kv.heads, kv.head_width, len(paths)


def _rotate(model: Module, path: str, K: np.ndarray, p: int) -> np.ndarray:
    """Keys (H, p, D) for a text that starts at position p, from keys for one that starts at 0.

    Rotary positions turn a query at position t by the angles t ω; p positions later it is turned by p ω more, and so
    are these keys: the scores stay. ValueError for a model with other positions, where the text itself changes."""
    rotary = edit.base_modules(model)[path.removesuffix(".kv")]._rotary
    if rotary is None:
        raise ValueError("in PEFT the text after a prefix starts at position p, in this adapter at 0: "
                         "train it with PrefixTuning(shift=True)")
    angles = p * rotary.frequencies()                                            # (D/2,)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(K, 2, axis=-1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(K.dtype)
