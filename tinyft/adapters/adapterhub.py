"""Adapters of AdapterHub (the package `adapters`, 1.3): bottleneck adapters, both ways.

    adapter_config.json     the settings, under "config"
    adapter.safetensors     the tensors: <place>.adapters.<name>.adapter_down.0.weight (m, C), adapter_up.weight (C, m)
    head_config.json        \\
    model_head.safetensors   }  of a classifier: classifier.weight, or score.weight

Houlsby's adapter is AdapterHub's `double_seq_bn` with the non-linearity "gelu". A place is an attention or a
feed-forward, before the residual sum:

                  after the attention                  after the feed-forward
    BERT          ....layer.0.attention.output         ....layer.0.output
    others        ....0.attention_adapters             ....0.output_adapters

AdapterHub writes pickles unless it is told otherwise, and pickles are not opened here: there, call
model.save_adapter(path, name, use_safetensors=True) and model.load_adapter(path, use_safetensors=True).

Its files have no place for the layer norms of the base. Houlsby(norms=False) trains none; an adapter that has trained
them is refused.
"""
from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from .. import array, edit
from ..checks import brief, flag, number, whole
from ..edit import Attached
from ..files import read_together
from ..formats.directory import first_names
from ..formats.huggingface import FAMILIES
from ..keywords import checked_keywords
from ..methods.additive.houlsby import Houlsby
from ..nn import Module
from .exchange import (
    Values,
    attach_values,
    check_arguments,
    check_settings,
    compact_targets,
    read_folder,
    write_folder,
)
from .names import ModuleNames

__all__ = ["load_adapterhub", "save_adapterhub"]

FILE = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
PICKLE = "pytorch_adapter.bin"
HEAD_FILE = "head_config.json"
HEAD_WEIGHTS = "model_head.safetensors"
HEAD_PICKLE = "pytorch_model_head.bin"
# Settings of a bottleneck adapter that change its outputs, with the one value of ours first.
FIXED: dict[str, tuple] = {
    "non_linearity": ("gelu",),
    "original_ln_before": (False, None),
    "original_ln_after": (True,),
    "ln_before": (False, None),
    "ln_after": (False, None),
    "adapter_residual_before_ln": (False, None),
    "residual_before_ln": (True,),
    "is_parallel": (False, None),
    "scaling": (1.0,),
    "use_gating": (False, None),
    "inv_adapter": (None,),
    "cross_adapter": (False, None),
    "phm_layer": (False, None),
    "stochastic_depth": (0.0, None),
    "architecture": (None,),
}
READ = {"mh_adapter", "output_adapter", "reduction_factor", "leave_out"}
# How an adapter starts and trains, and settings of layers that `phm_layer` and `inv_adapter` switch on.
HARMLESS = {
    "dropout", "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W",
    "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm",
    "hypercomplex_nonlinearity", "phm_rank", "phm_bias",
}
# {name here: name there} of the tensors of one adapter.
TENSORS = {
    "down.weight": "adapter_down.0.weight", "down.bias": "adapter_down.0.bias",
    "up.weight": "adapter_up.weight", "up.bias": "adapter_up.bias",
}
# {switch in the config: the module beside the norms of a block}
MODULES = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}
LARGEST = 1 << 40

Tensors = dict[str, np.ndarray]


# ── public ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def save_adapterhub(model: Module, path: str | os.PathLike, name: str | None = None) -> Path:
    """Write one attached Houlsby (the last one, or `name`) as a folder that AdapterHub reads.

    There: adapters.init(base), then base.load_adapter(path, use_safetensors=True, set_active=True). A classifier is
    written with it. The model is not changed.

    Returns the path. LookupError if nothing is attached under `name`. ValueError for another method; for an adapter
    that has trained layer norms, or that stands at other places than AdapterHub's; and for a folder that holds an
    adapter of another format, whose file would be lost. OSError if the files cannot be written."""
    folder = check_arguments("save_adapterhub", model, path, name)
    a = edit.get_attached(model, name)
    if type(a.method) is not Houlsby:
        raise ValueError(f"save_adapterhub writes Houlsby, got {type(a.method).__name__}: "
                         "keep it with tinyft.save_adapter, or, for PEFT, with tinyft.save_peft")
    for other in ("adapter.json", "adapter_model.safetensors"):
        if (folder / other).exists():
            raise ValueError(f"{folder} holds an adapter of another format ({other}): choose another folder")
    names = ModuleNames(model, "save_adapterhub")
    head = _head(names, model)
    _check_base_untouched(model, a, head)
    settings, tensors = _describe(model, names, a)
    common = {
        "model_type": names.family.model_type,
        "hidden_size": names.plan.config.width,
        "model_class": names.family.write_config(names.plan)["architectures"][0],
        "model_name": None,
        "version": "adapters.1.3.0",
    }
    files: dict[str, dict[str, Any]] = {}
    if head:
        parameters = edit.base_parameters(model)
        values = {theirs: array.asnumpy(parameters[ours].data) for ours, theirs in head.items()}
        labels = {f"LABEL_{i}": i for i in range(names.plan.classes)}
        files[HEAD_WEIGHTS] = values
        files[HEAD_FILE] = {**common, "name": None, "config": None, "num_labels": len(labels), "label2id": labels}
    elif (folder / HEAD_FILE).exists():
        raise ValueError(f"{folder} holds the head of another adapter ({HEAD_FILE}): choose another folder")
    files[WEIGHTS] = tensors
    files[FILE] = {**common, "name": a.name, "config": settings}
    return write_folder(folder, files, "save_adapterhub")


@checked_keywords
def load_adapterhub(model: Module, path: str | os.PathLike, name: str | None = None) -> Attached:
    """Attach a bottleneck adapter that AdapterHub, or save_adapterhub, wrote, as Houlsby(norms=False).

    name  of the attached method: the name in the file if None

    If the folder holds the head of a classifier, the model must have a new one of as many classes (tinyft.classifier),
    whose values it replaces. Only safetensors are read.

    FileNotFoundError if a file is missing; ValueError, by its key, for a setting that changes the outputs and that
    Houlsby does not have, and for tensors that are missing, unexpected or of another shape. After any exception the
    model is unchanged."""
    folder = check_arguments("load_adapterhub", model, path, name)

    def read() -> tuple:
        adapter = read_folder(folder, FILE, WEIGHTS, PICKLE)
        has_head = os.path.lexists(folder / HEAD_FILE)
        return adapter, read_folder(folder, HEAD_FILE, HEAD_WEIGHTS, HEAD_PICKLE) if has_head else None

    (config, tensors), head = read_together(folder, FILE, read)
    try:
        names = ModuleNames(model, "load_adapterhub")
        stored_name, settings = _check_config(config, names)
        method, values = _read_tensors(model, names, settings, stored_name, tensors)
        base_values = {} if head is None else _read_head(model, names, *head)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{folder}: {e}") from e
    return attach_values(model, folder, method, name or stored_name, values, base_values)


def _head(names: ModuleNames, model: Module) -> dict[str, str]:
    """{name here: name in transformers} of the tensors of AdapterHub's file of a head: those outside the model's body.

    ValueError for a new pooler inside the body, such as BERT's: neither file holds it."""
    for ours, theirs in names.new_head(model).items():
        if names.is_in_body(theirs):
            raise ValueError(f"AdapterHub's file of a classifier has no place for {ours}, which is new: keep the "
                             "adapter with tinyft.save_adapter, or start from a base that has a pooler")
    return {ours: theirs for ours, theirs in names.head_and_pooler().items() if not names.is_in_body(theirs)}


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _check_base_untouched(model: Module, a: Attached, head: dict[str, str]) -> None:
    """ValueError if the method has changed tensors of the base that AdapterHub's files do not hold.

    a.base_values holds the values from before."""
    parameters = edit.base_parameters(model)
    changed = [n for n, before in a.base_values.items()
               if n not in head and not np.array_equal(array.asnumpy(before), array.asnumpy(parameters[n].data))]
    if changed:
        raise ValueError(f"AdapterHub's files have no place for {first_names(changed)}, which {a.name} trained: train "
                         "with Houlsby(norms=False), or keep the adapter with tinyft.save_adapter")


def _describe(model: Module, names: ModuleNames, a: Attached) -> tuple[dict[str, Any], Tensors]:
    """(the entries of "config", the tensors) of an attached Houlsby. ValueError for places that AdapterHub lacks."""
    places = _places(model, names)
    others = sorted(a.edits.keys() - places.keys())
    if others:
        raise ValueError(f"AdapterHub has adapters after attentions and feed-forwards, and none on {others[0]}")
    kinds = {kind for path, (kind, _) in places.items() if path in a.edits}
    layers = {_block(path) for path in a.edits}
    for path, (kind, _) in places.items():
        if kind in kinds and _block(path) in layers and path not in a.edits:
            raise ValueError(f"AdapterHub has adapters at the same places of all layers; {path} has none")
    C = names.plan.config.width
    settings = {
        "mh_adapter": "mh_adapter" in kinds,
        "output_adapter": "output_adapter" in kinds,
        "reduction_factor": reduction_factor(C, a.method.m),
        "leave_out": sorted({_block(path) for path in places} - layers),
        **{key: supported[0] for key, supported in FIXED.items() if key != "architecture"},
        "init_weights": "houlsby",
    }
    tensors = {}
    for path, e in a.edits.items():
        start = f"{places[path][1]}.adapters.{a.name}"
        for ours, p in e.named_parameters().items():
            tensors[f"{start}.{TENSORS[ours]}"] = array.asnumpy(p.data)
    if "." in a.name:
        raise ValueError(f"AdapterHub's names have no dots, got {a.name!r}: attach the adapter under another name")
    return settings, tensors


def reduction_factor(C: int, m: int) -> float:
    """A float f with int(C // f) = m, from which AdapterHub computes the width m of the bottleneck.

    C/m is one, except where rounding puts it above the exact quotient: then it is the next smaller float."""
    f = C / m
    return f if int(C // f) == m else math.nextafter(f, 0.0)


def _block(path: str) -> int:
    """The number of the block in a path such as blocks.3.attn."""
    return int(path.split(".")[1])


def _places(model: Module, names: ModuleNames) -> dict[str, tuple[str, str]]:
    """{path of a sublayer: (its switch in the config, its module in AdapterHub)} of every block.

    ValueError for a model with more than one stack, or with cross-attention."""
    places = {}
    by_name = {"attn": "mh_adapter", "mlp": "output_adapter"}
    for path, norm in edit.sublayers(model).items():
        kind = by_name.get(path.split(".")[-1])
        if kind is None or not path.startswith("blocks."):
            raise ValueError(f"adapters on {path} are not exchanged with AdapterHub")
        holder = names.of_path(norm).name.rpartition(".")[0]                     # the module that holds the norm
        if not holder.endswith(".output"):               # BERT's is the output part of the sublayer; others are blocks
            holder = f"{holder}.{MODULES[kind]}"
        places[path] = (kind, holder)
    return places


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _check_config(config: dict[str, Any], names: ModuleNames) -> tuple[str, dict[str, Any]]:
    """(the adapter's name, the entries of "config"). ValueError for another base and for settings that ours lacks."""
    name, settings = config.get("name"), config.get("config")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 300 or "." in name:
        raise ValueError(f"{FILE}: name wants the name of an adapter, got {brief(name)}")
    if not isinstance(settings, dict):
        raise ValueError(f"{FILE}: config wants an object with the adapter's settings, got {brief(settings)}")
    types = [family.model_type for family in FAMILIES if type(family) is type(names.family)]     # of one layout
    for key, own in (("model_type", types), ("hidden_size", [names.plan.config.width])):
        if config.get(key) not in (None, *own):
            raise ValueError(f"{FILE}: the adapter belongs to another base: {key} is {brief(config[key])}, "
                             f"this model's is {own[0]}")
    settings = {"non_linearity": None, **settings}       # AdapterHub has no default for it
    check_settings(FILE, settings, FIXED, READ | HARMLESS)
    return name, settings


def _read_tensors(model: Module, names: ModuleNames, settings: dict[str, Any], name: str,
                  tensors: Tensors) -> tuple[Houlsby, Values]:
    """(Houlsby, its values) from the settings and tensors of a file. ValueError for missing and unexpected tensors."""
    places = _places(model, names)
    switches = {key: flag(f"{FILE}: {key}", settings.get(key)) for key in ("mh_adapter", "output_adapter")}
    left_out = settings.get("leave_out") or []
    if not isinstance(left_out, list):
        raise ValueError(f"{FILE}: leave_out wants a list of layers, got {brief(left_out)}")
    left_out = {whole(f"{FILE}: leave_out", layer, 0, LARGEST) for layer in left_out}
    chosen = [path for path, (kind, _) in places.items() if switches[kind] and _block(path) not in left_out]
    wanted = {}                                          # name in the file: (path, name of the tensor here)
    for path in chosen:
        for ours, theirs in TENSORS.items():
            wanted[f"{_plain(names, places[path][1])}.adapters.{name}.{theirs}"] = (path, ours)
    stored = {_plain(names, n): a for n, a in tensors.items()}
    if len(stored) < len(tensors):
        raise ValueError("the file holds a tensor under two names, with and without the prefix of the model's class")
    missing = [n for n in wanted if n not in stored]
    unexpected = [n for n in stored if n not in wanted]
    if missing or unexpected or not wanted:
        faults = [f"missing {first_names(missing)}"] if missing else []
        faults += [f"unexpected {first_names(unexpected)}"] if unexpected else []
        faults += [] if wanted else ["it asks for none"]
        raise ValueError(f"the tensors are not those that the config asks for: {'; '.join(faults)}")
    C = names.plan.config.width
    m = _bottleneck(settings, C, next(a for n, a in stored.items() if n.endswith(TENSORS["down.weight"])))
    values: Values = {}
    for n, (path, ours) in wanted.items():
        values.setdefault(path, {})[ours] = stored[n]
    targets = () if set(chosen) == places.keys() else compact_targets(model, chosen)
    return Houlsby(m=m, norms=False, targets=targets), values


def _plain(names: ModuleNames, name: str) -> str:
    """A name without the prefix of the class with a head."""
    return names.family.table_name(name) or name


def _bottleneck(settings: dict[str, Any], C: int, down: np.ndarray) -> int:
    """The width m of the bottleneck: that of the first tensor, which must follow from reduction_factor.

    ValueError for a reduction_factor that differs from layer to layer."""
    factor = settings.get("reduction_factor")
    if isinstance(factor, dict):
        raise ValueError(f"{FILE}: reduction_factor wants one number, got {brief(factor)}: Houlsby has one width here")
    number(f"{FILE}: reduction_factor", factor, above=0)
    m = max(int(min(C // factor, LARGEST)), 1)
    if down.ndim != 2 or len(down) != m:
        raise ValueError(f"{FILE}: a reduction_factor of {factor} asks for a bottleneck of {m}, "
                         f"got a tensor of the shape {down.shape}")
    return m


def _read_head(model: Module, names: ModuleNames, config: dict[str, Any], tensors: Tensors) -> Tensors:
    """{name here: values} of the classifier in model_head.safetensors; none for the head of a language model.

    ValueError unless the model has a new classifier, without a new pooler, of the same shape; or unless the head of
    the language model is this model's own."""
    kind = config.get("model_class")
    if isinstance(kind, str) and not kind.endswith("ForSequenceClassification"):
        others = [n for n, a in tensors.items() if names.differs_from_base(model, n, a)]
        if others:
            raise ValueError(f"the head in the file is not this model's: {first_names(others)} differs")
        return {}
    own = {theirs: ours for ours, theirs in _head(names, model).items()}
    if not own:
        raise ValueError("the adapter was saved with a classifier, which this model lacks: "
                         "call tinyft.classifier first")
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"the head in the file is not this model's classifier: {first_names(odd)} is in one of them")
    return names.new_head_values(model, {ours: tensors[theirs] for theirs, ours in own.items()})
