"""Adapters of PEFT: a folder that PeftModel.from_pretrained reads, and the reverse.

    adapter_config.json         peft_type, the settings, the names of the adapted modules
    adapter_model.safetensors   the tensors, under the names that transformers gives to the modules

    LoRA            LORA               peft_lora.py
    PromptTuning    PROMPT_TUNING      prompt_embeddings (p, C)
    PrefixTuning    PREFIX_TUNING      prompt_embeddings (p, 2 L H D): rows [K_0 | V_0 | K_1 | V_1 ...], head after head

H counts the key/value heads. The file holds the prefix itself: an MLP that made it is gone, in PEFT too.
A classifier is saved with the adapter, as PEFT's modules_to_save.

The same adapter gives the same logits on both sides, with these differences between the two libraries:

    prompt          PEFT returns logits for the p rows of the prompt, too. A classifier of GPT-2 or Llama reads the
                    last position in PEFT, also if it is padding. BERT's reads the first row of the prompt, ours [CLS]:
                    refused
    prefix          in PEFT the text starts at position p, as with PrefixTuning(shift=True). Without `shift` a model
                    with rotary positions still has an equal prefix, its keys rotated by p; other models have none:
                    refused. PEFT has no prefix for BERT's masked language model, only for BertModel and the classifier
    positions       without position_ids transformers counts padding as positions, so texts are padded on the right
"""
from __future__ import annotations

import os
from typing import Any

import numpy as np

from .. import array, edit
from ..checks import brief
from ..edit import Attached, Method
from ..files import read_together
from ..formats.directory import first_names
from ..methods.additive.houlsby import Houlsby
from ..methods.additive.prefix import Prefix, PrefixTuning, Shift
from ..methods.additive.prompt import PromptTuning, SoftPrompt
from ..methods.reparameterized.lora import LoRA
from ..nn import Module
from .exchange import Values, attach_values, check_arguments, read_folder, write_folder
from .names import ModuleNames
from .peft_config import FILE, check_keys, is_part, names_in, read_whole
from .peft_lora import read_lora, write_lora

__all__ = ["load_peft", "save_peft"]

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CLASSIFIERS = ["classifier", "score"]                    # PEFT trains and saves these with a task_type of SEQ_CLS
PROMPT = "prompt_embeddings"
TASK_OF_HEAD = {"lm": "CAUSAL_LM", "classes": "SEQ_CLS", "mlm": None, None: "FEATURE_EXTRACTION"}

Tensors = dict[str, np.ndarray]


# ── public ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def save_peft(model: Module, path: str | os.PathLike, name: str | None = None) -> Any:
    """Write one attached method (the last one, or `name`) as a folder that PeftModel.from_pretrained reads.

    Of LoRA, PromptTuning and PrefixTuning. The base is not written: tinyft.save does that. A classifier is written with
    the adapter. The model is not changed. The file's docstring lists where the outputs of the two libraries differ.

    Returns the path. LookupError if nothing is attached under `name`; ValueError, naming the function that keeps the
    method instead, for a method or a model that PEFT does not have; OSError if the files cannot be written."""
    folder = check_arguments("save_peft", model, path, name)
    a = edit.get_attached(model, name)
    write = WRITERS.get(type(a.method))
    if write is None:
        raise ValueError(f"PEFT has no {type(a.method).__name__}: {_elsewhere(a.method)}")
    names = ModuleNames(model, "save_peft")
    config, tensors = write(model, names, a)
    head = names.head_tensors(model)
    others = sorted(a.base_values.keys() - head.keys())
    if others:
        raise ValueError(f"{a.name} trains {first_names(others)} of the base, which PEFT's file does not hold: "
                         "keep it with tinyft.save_adapter")
    common = {
        "task_type": TASK_OF_HEAD[names.plan.head],
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    if config["peft_type"] != "LORA":
        common["task_type"] = common["task_type"] or "FEATURE_EXTRACTION"
    if head:
        has_pooler = any(ours.startswith("pooler.") for ours in head)
        common["modules_to_save"] = [*CLASSIFIERS, "pooler"] if has_pooler else CLASSIFIERS
        parameters = edit.base_parameters(model)
        for ours, theirs in head.items():
            tensors[f"{_prefix(config)}{theirs}"] = array.asnumpy(parameters[ours].data)
    return write_folder(folder, {FILE: ({**config, **common}, tensors)}, {FILE: WEIGHTS}, "save_peft")


def load_peft(model: Module, path: str | os.PathLike, name: str | None = None) -> Attached:
    """Attach an adapter that PEFT, or save_peft, wrote: LORA, PROMPT_TUNING or PREFIX_TUNING.

    name  of the attached method: the class's name in lower case if None

    A file with a classifier wants a model with a new one of as many classes (tinyft.classifier), whose values it
    replaces. PEFT's file does not identify its base: only names and shapes are compared. Only safetensors are read.

    FileNotFoundError if a file is missing; ValueError, by its key, for a setting that changes the outputs and that this
    library does not have, and for tensors that are missing, unexpected or of another shape. After any exception the
    model is unchanged."""
    folder = check_arguments("load_peft", model, path, name)
    config, tensors = read_together(folder, FILE, lambda: read_folder(folder, FILE, WEIGHTS, PICKLE))
    try:
        names = ModuleNames(model, "load_peft")
        kind = check_keys(config)
        head, tensors = _read_head(model, names, config, tensors)
        method, values = READERS[kind](model, names, config, tensors)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{folder}: {e}") from e
    return attach_values(model, folder, method, name, values, head)


def _elsewhere(method: Method) -> str:
    """The function that keeps a method that PEFT does not have."""
    if isinstance(method, Houlsby):
        return "bottleneck adapters are AdapterHub's, written with tinyft.save_adapterhub"
    return "keep it with tinyft.save_adapter, or write the whole model with tinyft.save"


# ── the head ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _prefix(config: dict[str, Any]) -> str:
    """The prefix of the head's tensors. PEFT wraps the model once more for a LoRA."""
    return "base_model.model." if config["peft_type"] == "LORA" else "base_model."


def _read_head(model: Module, names: ModuleNames, config: dict[str, Any],
               tensors: Tensors) -> tuple[Tensors, Tensors]:
    """({name here: values} of the head's tensors, the other tensors by their names in the file).

    modules_to_save may name a classifier and its pooler. ValueError if it names something else, or if the file's head
    and the model's differ. A classifier that is no new one must have the values of the file already."""
    saved = list(dict.fromkeys(names_in(config, "modules_to_save")))
    if config.get("task_type") == "SEQ_CLS":
        saved = list(dict.fromkeys([*saved, *CLASSIFIERS]))
    own = names.head_tensors(model)
    if names.plan.head == "classes":                     # a pooler of the base may be in the file, as it is
        own |= {ours: theirs for ours, theirs in names.tensors.items() if ours.startswith("pooler.")}
    by_module = {module: [n for n in own if is_part(own[n], module)] for module in saved}
    others = [module for module in saved if not by_module[module] and module not in CLASSIFIERS]
    if others:
        raise ValueError(f"{FILE}: modules_to_save wants a classifier of this model, got {first_names(others)}")
    start = _prefix(config)
    stored = {n.removeprefix(start): n for n in tensors
              if any(is_part(n, module) for module in saved) and n.startswith(start)}
    classes = next((len(tensors[n]) for n in stored.values() if n.endswith(("classifier.weight", "score.weight"))), 0)
    if stored and not own:
        raise ValueError(f"the adapter was trained with a classifier of {classes} classes, which this model lacks: "
                         f"call tinyft.classifier(model, {classes}) first")
    if config.get("task_type") == "SEQ_CLS" and not own:
        raise ValueError("the adapter was trained with a classifier, which this model lacks: "
                         "call tinyft.classifier first")
    wanted = {own[n]: n for found in by_module.values() for n in found}
    if stored:
        wanted |= {theirs: n for n, theirs in names.head_tensors(model).items()}
    missing = [n for n in wanted if n not in stored]
    unexpected = [n for n in stored if n not in wanted]
    if missing or unexpected:
        parts = [f"missing {first_names(missing)}"] if missing else []
        parts += [f"unexpected {first_names(unexpected)}"] if unexpected else []
        raise ValueError(f"the classifier in the file is not that of this model: {'; '.join(parts)}")
    values = {ours: tensors[stored[theirs]] for theirs, ours in wanted.items()}
    rest = {n: a for n, a in tensors.items() if n not in stored.values()}
    return names.new_head_values(model, values), rest


# ── prompt and prefix ────────────────────────────────────────────────────────────────────────────────────────────────
def write_prompt(model: Module, names: ModuleNames, a: Attached) -> tuple[dict[str, Any], Tensors]:
    """The soft prompt P as PEFT's prompt_embeddings."""
    _refuse_first_row(names)
    (P,) = [e.P for e in a.edits.values() if isinstance(e, SoftPrompt)]
    p, C = P.shape
    _check_length(p)
    heads, _, layers = _attention_sizes(model)
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": p, "token_dim": C, "num_transformer_submodules": 1,
              "num_attention_heads": heads, "num_layers": layers}
    return config, {PROMPT: array.asnumpy(P.data)}


def read_prompt(model: Module, names: ModuleNames, config: dict[str, Any],
                tensors: Tensors) -> tuple[PromptTuning, Values]:
    """PromptTuning, and P (p, C) from prompt_embeddings."""
    _refuse_first_row(names)
    p = read_whole(config, "num_virtual_tokens")
    C = names.plan.config.width
    _check_size(config, "token_dim", C)
    P = _only_table(tensors, (p, C))
    return PromptTuning(p=p), {"embed": {"P": P}}


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


def _refuse_first_row(names: ModuleNames) -> None:
    """ValueError for a prompt before BERT's classifier."""
    if names.plan.head == "classes" and names.plan.pooler:
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
        raise ValueError(f"wanted the tensor {PROMPT}, got {got}")
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
    first, second = np.split(K.astype(np.float64), 2, axis=-1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(K.dtype)


WRITERS = {LoRA: write_lora, PromptTuning: write_prompt, PrefixTuning: write_prefix}
READERS = {"LORA": read_lora, "PROMPT_TUNING": read_prompt, "PREFIX_TUNING": read_prefix}
