"""A classifier in PEFT's files, both ways. PEFT saves the modules that modules_to_save names whole, with the adapter.

    base_model.model.classifier.weight    with a LoRA; without "model." with a prompt or a prefix

With the task SEQ_CLS PEFT adds "classifier" and "score" to modules_to_save, whichever of the two the model has. A new
pooler below the classifier is part of the head here, so it is named and saved as well: BERT's "pooler" and DistilBERT's
"pre_classifier"; RoBERTa's is inside "classifier".
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import array, edit
from ..formats.directory import first_names
from ..nn import Module
from .names import ModuleNames
from .peft_config import FILE, is_part, names_in

__all__ = ["read_head", "write_head"]

CLASSIFIERS = ["classifier", "score"]
PREFIX = {"LORA": "base_model.model.", "PROMPT_TUNING": "base_model.", "PREFIX_TUNING": "base_model."}

Tensors = dict[str, np.ndarray]


def write_head(model: Module, names: ModuleNames, kind: str) -> tuple[list[str], Tensors]:
    """(modules_to_save, the tensors of the classifier by their names in the file). Both empty without a classifier.

    kind: the peft_type"""
    head = names.new_head(model)
    if not head:
        return [], {}
    saved = list(CLASSIFIERS)
    tensors = {}
    parameters = edit.base_parameters(model)
    for ours, theirs in head.items():
        module = names.of_path(ours.rpartition(".")[0]).table_name.split(".")[0]          # "classifier", "pooler"
        if module not in saved:
            saved.append(module)
        tensors[f"{PREFIX[kind]}{theirs}"] = array.asnumpy(parameters[ours].data)
    return saved, tensors


def read_head(model: Module, names: ModuleNames, config: dict[str, Any], tensors: Tensors) -> tuple[Tensors, Tensors]:
    """({name here: values} for the tensors of a new head, the other tensors by their names in the file).

    ValueError if modules_to_save names something else than a classifier and its pooler, if the model has no classifier,
    if the file's is another one, or if the model's is part of its base and has other values."""
    saved = _modules_to_save(config)
    stored, rest = _split(tensors, PREFIX[config["peft_type"]], saved)
    _check_model(names, config, stored)
    own = {theirs: ours for ours, theirs in names.head_and_pooler().items()}
    wanted = set()
    for module in saved:
        parts = {theirs for theirs in own if is_part(theirs, module)}
        if not parts and module not in CLASSIFIERS:
            raise ValueError(f"{FILE}: modules_to_save wants a classifier of this model, got {first_names([module])}")
        wanted |= parts
    if stored:                                           # a new pooler must come with its classifier
        wanted |= set(names.new_head(model).values())
    faults = [f"missing {first_names(sorted(wanted - stored.keys()))}"] if wanted - stored.keys() else []
    faults += [f"unexpected {first_names(sorted(stored.keys() - wanted))}"] if stored.keys() - wanted else []
    if faults:
        raise ValueError(f"the classifier in the file is not that of this model: {'; '.join(faults)}")
    return names.new_head_values(model, {own[theirs]: stored[theirs] for theirs in sorted(wanted)}), rest


def _modules_to_save(config: dict[str, Any]) -> list[str]:
    """The modules that PEFT saves whole, each once."""
    added = CLASSIFIERS if config.get("task_type") == "SEQ_CLS" else []
    return list(dict.fromkeys([*names_in(config, "modules_to_save"), *added]))


def _split(tensors: Tensors, prefix: str, saved: list[str]) -> tuple[Tensors, Tensors]:
    """({name in transformers: array} of the tensors in the saved modules, the others by their names in the file)."""
    stored: Tensors = {}
    rest: Tensors = {}
    for name, a in tensors.items():
        theirs = name.removeprefix(prefix)
        if name.startswith(prefix) and any(is_part(theirs, module) for module in saved):
            stored[theirs] = a
        else:
            rest[name] = a
    return stored, rest


def _check_model(names: ModuleNames, config: dict[str, Any], stored: Tensors) -> None:
    """ValueError if the adapter has a classifier, and the model has none."""
    classes = [len(a) for theirs, a in stored.items() if theirs in ("classifier.weight", "score.weight")]
    if names.plan.head == "classes" or not (classes or config.get("task_type") == "SEQ_CLS"):
        return
    count = f" of {classes[0]} classes" if classes else ""
    raise ValueError(f"the adapter was trained with a classifier{count}, which this model lacks: "
                     "call tinyft.classifier first")
