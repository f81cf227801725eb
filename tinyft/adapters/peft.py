"""Adapters of PEFT: a folder that PeftModel.from_pretrained reads, and the reverse.

    adapter_config.json         peft_type, the settings, the names of the adapted modules
    adapter_model.safetensors   the tensors, under the names that transformers gives to the modules

    LoRA                         LORA                             peft_lora.py
    PromptTuning, PrefixTuning   PROMPT_TUNING, PREFIX_TUNING     peft_prompts.py
    a classifier                 modules_to_save                  peft_head.py

The same adapter gives the same logits on both sides, with these differences between the two libraries:

    prompt          PEFT returns logits for the p rows of the prompt, too. A classifier of GPT-2 or Llama reads the
                    last position in PEFT, also if it is padding. BERT's reads the first row of the prompt, ours [CLS]:
                    refused
    prefix          in PEFT the text starts at position p, as with PrefixTuning(shift=True). Without `shift` a model
                    with rotary positions still has an equal prefix, its keys rotated by p; other models have none:
                    refused. PEFT runs no prefix with a masked language model, nor with DistilBERT and RoBERTa
    tied embedding  a LoRA on it is two in PEFT, one on the embedding and one on the output layer. Its merge_and_unload
                    adds both to the one weight: merge here (tinyft.merge), or keep them apart there
    positions       without position_ids transformers counts padding as positions, so texts are padded on the right
"""
from __future__ import annotations

import os
from pathlib import Path

from .. import edit
from ..edit import Attached, Method
from ..files import read_together
from ..formats.directory import first_names
from ..keywords import checked_keywords
from ..methods.additive.houlsby import Houlsby
from ..methods.additive.prefix import PrefixTuning
from ..methods.additive.prompt import PromptTuning
from ..methods.reparameterized.lora import LoRA
from ..nn import Module
from .exchange import attach_values, check_arguments, read_folder, write_folder
from .names import ModuleNames
from .peft_config import FILE, check_keys
from .peft_head import read_head, write_head
from .peft_lora import read_lora, write_lora
from .peft_prompts import read_prefix, read_prompt, write_prefix, write_prompt

__all__ = ["load_peft", "save_peft"]

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# AdapterHub's config has the name of PEFT's; its tensors have the name of those of save_adapter.
HUB_WEIGHTS, OWN_FILE = "adapter.safetensors", "adapter.json"
TASK_OF_HEAD = {"lm": "CAUSAL_LM", "classes": "SEQ_CLS", "mlm": None, None: "FEATURE_EXTRACTION"}
WRITERS = {LoRA: write_lora, PromptTuning: write_prompt, PrefixTuning: write_prefix}
READERS = {"LORA": read_lora, "PROMPT_TUNING": read_prompt, "PREFIX_TUNING": read_prefix}


@checked_keywords
def save_peft(model: Module, path: str | os.PathLike, name: str | None = None) -> Path:
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
    if (folder / HUB_WEIGHTS).exists() and not (folder / OWN_FILE).exists():
        raise ValueError(f"{folder} holds an adapter of another format ({HUB_WEIGHTS}): choose another folder")
    names = ModuleNames(model, "save_peft")
    config, tensors = write(model, names, a)
    saved_modules, head = write_head(model, names, config["peft_type"])
    others = sorted(a.base_values.keys() - names.new_head(model).keys())
    if others:
        raise ValueError(f"{a.name} trains {first_names(others)} of the base, which PEFT's file does not hold: "
                         "keep it with tinyft.save_adapter")
    task = TASK_OF_HEAD[names.plan.head]
    if task is None and config["peft_type"] != "LORA":   # PEFT has no task for a masked language model
        task = "FEATURE_EXTRACTION"
    config |= {"task_type": task, "base_model_name_or_path": None, "inference_mode": True}
    if saved_modules:
        config["modules_to_save"] = saved_modules
    return write_folder(folder, {WEIGHTS: tensors | head, FILE: config}, "save_peft")


@checked_keywords
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
        head, tensors = read_head(model, names, config, tensors)
        method, values = READERS[kind](model, names, config, tensors)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{folder}: {e}") from e
    return attach_values(model, folder, method, name, values, head)


def _elsewhere(method: Method) -> str:
    """The function that keeps a method that PEFT does not have."""
    if isinstance(method, Houlsby):
        return "bottleneck adapters are AdapterHub's, written with tinyft.save_adapterhub"
    return "keep it with tinyft.save_adapter, or write the whole model with tinyft.save"
