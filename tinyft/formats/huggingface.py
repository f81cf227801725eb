"""Hugging Face style directories: config.json, model.safetensors (or its shards) and tokenizer.json, read and written.

    model, tokenizer = load("path/to/directory")          or load("base-gpt"), a model that ships with tinyft
    save(model, "path/to/directory", tokenizer)           transformers reads it, with the same outputs

A model with packed weights (tinyft.compress) is written and read too; transformers refuses it (compressed.py).

Nothing is downloaded and nothing is unpickled. Sizes, names, shapes and dtypes are checked before a model is
built. Written files replace the old ones only when all of them are on the disk.
"""
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

from .. import array, edit
from ..checks import brief, flag, instance, whole
from ..files import check_ordinary, drop_pages, is_mapped, read_together, refuse_damage, write_atomically
from ..keywords import checked_keywords
from ..nn import Module
from ..tokens import special_token
from . import compressed
from .bert import BERTFamily
from .config import check_kept
from .directory import FLOATS, check_tensors, first_names, read_all, read_json
from .distilbert import DistilBERTFamily
from .family import Family
from .gguf_model import load_gguf
from .gpt2 import GPT2Family
from .layout import FileTensor, Plan, Table, blocks_of, cast, file_tensors, set_parameters
from .llama import LlamaFamily
from .marian import MarianFamily
from .roberta import RoBERTaFamily
from .sentence import MODULES, pooling_files, read_pooling
from .switch import SwitchBERTFamily, SwitchGPT2Family
from .t5 import T5Family
from .tokenizer import configure, tokenizer_config

__all__ = ["load", "save", "classifier", "FAMILIES", "Family"]

FAMILIES: tuple[Family, ...] = (
    GPT2Family(), BERTFamily(), DistilBERTFamily(), RoBERTaFamily(),
    LlamaFamily("llama"), LlamaFamily("mistral"), LlamaFamily("qwen2"),
    SwitchGPT2Family(), SwitchBERTFamily(), MarianFamily(), T5Family(),
)
ASSETS = Path(__file__).parent.parent / "assets"
# Entries of config.json that the library does not use. `load` keeps them and `save` writes them again.
KEPT = ("id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def load(path: str | os.PathLike, dtype: Any = None, *, packed: bool = False) -> tuple[Module, Tokenizer | None]:
    """(model, tokenizer) from a directory, from a GGUF file, or from the name of a model that ships.

    The tokenizer is None if the directory has no tokenizer.json. It neither pads nor truncates, whatever the file says;
    settings of tokenizer_config.json that change its ids are applied (formats/tokenizer.py).

    dtype   of the model's parameters; float32 unless given, whatever the file holds
    packed  of a GGUF file: True keeps matrices of 4 or 8 bits a weight as they are in the file (tinyft.compress)

    The model is on the backend in use. Its one dropout rate, active after model.train(), is the largest of
    those in config.json. FileNotFoundError if the directory or one of its files is missing. ValueError, in one
    sentence with the wanted and the found value, if a file is damaged or the library does not have the model.
    """
    instance("load", path, (str, os.PathLike), "a path")
    dtype = _float_dtype(np.float32 if dtype is None else dtype)
    flag("load: packed", packed)
    if Path(path).suffix.lower() == ".gguf" and not os.path.isdir(path):
        return load_gguf(Path(path), dtype, packed=packed)
    folder = find(path)
    if packed:
        raise ValueError(f"load: packed=True wants a GGUF file, whose weights are packed already; {folder} is a "
                         "directory, whose weights are loaded as they were saved")
    return read_together(folder, "config.json", lambda: _read(folder, dtype))


def _read(folder: Path, dtype: np.dtype) -> tuple[Module, Tokenizer | None]:
    """(model, tokenizer) of a directory; see load."""
    config = read_json(folder / "config.json")
    family = _family_of_type(config.get("model_type"), folder)
    if os.path.lexists(folder / MODULES):                  # the class of the pretrained model: the tensors decide
        config.pop("architectures", None)
    try:
        check_kept(config)
        described = compressed.take_description(config)
        arrays, tensors = compressed.take_arrays(described, read_all(folder))
        stored = _under_table_names(family, tensors)
        plan = family.read_config(config, stored.keys())
        for name in stored.keys() & set(family.unused(plan)):
            family.check_unused(name, stored.pop(name), plan)
        _check_sizes(plan, stored)
        stored = _without_aliases(family.aliases(plan), stored)
        table = family.table(plan)
        packed = compressed.restore(described, arrays, table)
        table = compressed.dense_table(table, packed)
        _check_tensors(table, stored)
        pooling = read_pooling(folder, plan.config.width)
        model = family.build(plan)
        compressed.put(model, packed)
    except ValueError as e:
        if str(folder) in str(e):                          # the message names the directory already
            raise
        raise ValueError(f"{folder}: {str(e)[:1000]}") from e
    tokenizer = _read_tokenizer(folder)

    def read(name: str, place: FileTensor) -> array.Array:
        return _parameter(name, place, stored[place.name], dtype)
    set_parameters(model, table, read)
    for weight in packed.values():
        weight.to(dtype=dtype)
    # `save` writes these entries again.
    model._kept_config = {key: config[key] for key in KEPT if key in config}
    model._pooling = pooling                               # for `embed`; None if the directory has no modules.json
    return model, tokenizer


def _parameter(name: str, place: FileTensor, stored: np.ndarray, dtype: np.dtype) -> array.Array:
    """The data of a parameter from its tensor in a file, on the backend in use.

    A tensor of a mapped file that has this dtype and layout is taken as it lies: it is read when it is used. Otherwise
    it is copied, and the memory of its pages is given back."""
    view = place.read(stored)                              # transposed or cut where needed
    fits = view.dtype == dtype and place.third is None and view.flags.c_contiguous and view.flags.aligned
    if fits and is_mapped(stored) and array.backend() == "numpy":
        return view
    data = array.asarray(cast(view, dtype, name))
    drop_pages(stored)
    return data


def find(path: str | os.PathLike) -> Path:
    """The directory of this path. A bare name that is no directory names a model that ships with tinyft."""
    folder = Path(path)
    try:
        folder.exists()
    except OSError as e:                                   # a name that is too long, a folder that may not be read
        raise FileNotFoundError(e.errno, f"{brief(path)} cannot be read ({e.strerror}); wanted a directory") from e
    if not folder.exists() and _is_bare_name(path):
        folder = ASSETS / path
        if not (folder / "config.json").is_file():
            names = sorted(p.parent.name for p in ASSETS.glob("*/config.json"))
            shipped = ", ".join(names) or "none"
            raise FileNotFoundError(f"there is no directory {path!r}, and no model of this name ships; "
                                    f"models that ship: {shipped}")
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {state}; wanted a directory with config.json and model.safetensors, "
                                "or a file whose name ends in .gguf")
    return folder


def _is_bare_name(path: str | os.PathLike) -> bool:
    """True for a string without a path separator."""
    separators = {"/", os.sep, os.altsep}
    return isinstance(path, str) and path != "" and not separators & set(path)


def _family_of_type(model_type: Any, folder: Path) -> Family:
    """The family with this `model_type`. ValueError if there is none."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(f"{folder} holds a model of the type {brief(model_type)}; wanted one of {known}")


def _under_table_names(family: Family, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a file under the names of the family's table, such as without the prefix `bert.`.

    Tensors that are no weights of the model are left out. ValueError if two tensors have the same table name: files may
    spell a name in several ways.
    """
    out: dict[str, np.ndarray] = {}
    spelling: dict[str, str] = {}
    for name, tensor in tensors.items():
        table_name = family.table_name(name)
        if table_name is None:
            continue
        if table_name in out:
            raise ValueError(f"{spelling[table_name]} and {name} are two spellings of one tensor; wanted one of them")
        out[table_name] = tensor
        spelling[table_name] = name
    return out


def _check_sizes(plan: Plan, stored: dict[str, np.ndarray]) -> None:
    """Checks that must come before a table of all layers is made."""
    c = plan.config
    if c.layers > len(stored):
        raise ValueError(f"config.json asks for {c.layers} layers; the file holds {len(stored)} tensors in all")


def _without_aliases(aliases: dict[str, str], stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with one name each: the second name of a tied tensor is replaced by its first.

    aliases: {second name: first name}; the output layer shares the weight of the embedding. ValueError if the two
    names of a tied tensor hold different values.
    """
    out = dict(stored)
    for alias, name in aliases.items():
        if alias not in out:
            continue
        tensor = out.pop(alias)
        if name in out and not _equal(tensor, out[name]):
            raise ValueError(f"{alias} differs from {name}: an output layer of its own, "
                             "which this library's model does not have")
        out.setdefault(name, tensor)
    return out


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """True if both hold the same values, whatever their dtypes."""
    if a.shape != b.shape:
        return False
    is_equal = a is b or all(
        np.array_equal(a[rows].astype(np.float32), b[rows].astype(np.float32), equal_nan=True) for rows in blocks_of(a))
    drop_pages(a)
    drop_pages(b)
    return is_equal


def _check_tensors(table: Table, stored: dict[str, np.ndarray]) -> None:
    """ValueError unless the file's tensors are those of the table, with its shapes and a floating-point dtype."""
    shapes = {place.name: place.file_shape for place in table.values()}
    of_other_dtypes = [name for name in shapes if name in stored and stored[name].dtype not in FLOATS.values()]
    wanted = ", ".join(FLOATS)
    wrong = [f"{name} wants one of the dtypes {wanted}, got {stored[name].dtype}" for name in of_other_dtypes]
    check_tensors(shapes, stored, "config.json", wrong)


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a directory, or None if it has no tokenizer.json. ValueError if the file is damaged."""
    file = folder / "tokenizer.json"
    if not os.path.lexists(file):
        return None
    check_ordinary(file)
    with refuse_damage(file):
        tokenizer = Tokenizer.from_file(str(file))
    configure(tokenizer, folder)
    with refuse_damage(file), contextlib.suppress(Exception):               # no unknown token: for other texts
        tokenizer.encode("a b")                            # some damage is noticed only here, as a panic
    if folder.parent == ASSETS:                            # a model that ships with tinyft
        tokenizer.encode_special_tokens = True             # as in data.shipped_tokenizer: "[MASK]" in a text is text
    return tokenizer


def _float_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype. TypeError for a dtype that no model has."""
    wanted = "a model wants float64, float32, float16 or bfloat16 parameters"
    try:
        dtype = np.dtype(dtype)
    except (TypeError, ValueError):
        raise TypeError(f"{wanted}, got {brief(dtype)}") from None
    if dtype not in FLOATS.values():
        raise TypeError(f"{wanted}, got {dtype}")
    return dtype


# ── a new head ───────────────────────────────────────────────────────────────────────────────────────────────────────
@runtime_checkable
class TakesNewHead(Protocol):
    """A model whose head can be replaced by a classifier."""

    def new_head(self, classes: int, rng: np.random.Generator) -> None:
        """Replace the head by a new classifier, drawn from `rng`."""


@checked_keywords
def classifier(model: Module, classes: int, seed: int = 0) -> Module:
    """The model with a new head that scores `classes` classes, (B, T) ids -> (B, classes); in place.

    The head is drawn from `seed`. The first method that is attached afterwards trains it too. ValueError if
    `classes` is not a whole number of at least 1, or if something is attached already; TypeError for a model
    that takes no new head; MemoryError if the head is too large. Then the model was not changed.
    """
    if not isinstance(model, Module) or not isinstance(model, TakesNewHead):
        raise TypeError(f"classifier wants a model with a head; a {type(model).__name__} takes no new head")
    if isinstance(classes, bool) or not isinstance(classes, (int, np.integer)) or classes < 1:
        raise ValueError(f"classifier wants at least one class, got {brief(classes)}")
    whole("classifier: seed", seed, least=0)
    if attached := edit.attached(model):
        raise ValueError(f"put the head on first: {attached[-1].name} is attached; "
                         "detach it, and attach it again afterwards")
    embedding = next(iter(model.named_parameters().values())).data      # its device and dtype are the model's
    before = {id(p) for p in model.parameters()}
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    try:
        model.new_head(int(classes), np.random.default_rng(seed))
        for p in model.parameters():
            if id(p) not in before:                        # a tensor of the new head
                p.data = array.to(p.data, array.name_of(embedding)).astype(embedding.dtype)
    except BaseException:
        for module, values in attributes:
            vars(module).clear()
            vars(module).update(values)
        raise
    return model


def new_model(path: str | os.PathLike, seed: int = 0) -> Module:
    """A model with random values from `seed`, of the sizes in a config.json.

    Its head is that of the model's class, a language model's or a masked one's. FileNotFoundError if there is no such
    file; ValueError, in one sentence, for a config.json that `load` would refuse."""
    config = read_json(Path(path))
    family = _family_of_type(config.get("model_type"), Path(path))
    try:
        check_kept(config)
        plan = family.read_config(config, ())
    except ValueError as e:
        raise ValueError(f"{path}: {str(e)[:1000]}") from e
    return family.model(plan.config, seed)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def save(model: Module, path: str | os.PathLike, tokenizer: Tokenizer | None = None, dtype: Any = None) -> Path:
    """Write a model, and its tokenizer if given, as a directory that `load` reads, and transformers if nothing is
    packed. Packed weights are written as they are.

    dtype  of the parameters on disk; the model's own unless given

    Other files of an existing directory stay. All files are written under other names first: an OSError (a full
    disk) or an interruption leaves the directory as it was. ValueError for a model that the format cannot hold:
    one with edits, one of another family. OverflowError if a value is too large for dtype.
    """
    instance("save", path, (str, os.PathLike), "a path")
    if tokenizer is not None:
        instance("save", tokenizer, Tokenizer, "a Tokenizer of the library tokenizers")
    family = _family_of_model(model)
    _check_plain(model)
    plan = family.plan_of(model)
    table = family.table(plan)
    parameters = model.named_parameters()
    packed = compressed.packed_weights(model)
    _check_parameters(table, {name: tuple(p.shape) for name, p in {**parameters, **packed}.items()})
    table = compressed.dense_table(table, packed)
    own_dtype = next(iter(parameters.values())).dtype
    dtype = _float_dtype(own_dtype if dtype is None else dtype)
    arrays = {name: cast(array.asnumpy(p.data), dtype, name) for name, p in parameters.items()}
    weights = {family.file_name(name, plan): a for name, a in file_tensors(table, arrays).items()}
    config = {**family.write_config(plan), "torch_dtype": str(dtype)}
    kept = family.fallbacks(plan) | _kept_entries(model, plan, tokenizer)
    config |= {key: value for key, value in kept.items() if key not in config}
    metadata = {"format": "pt"}                            # transformers requires this entry
    if packed:
        config[compressed.KEY] = compressed.describe(packed)
        weights |= compressed.stored_arrays(packed)
        metadata = compressed.METADATA
    files = {"model.safetensors": safetensors.numpy.save(weights, metadata=metadata)}
    pooling = getattr(model, "_pooling", None)
    if pooling is not None and plan.head is None:          # a model for embeddings, as it was loaded
        described = pooling_files(pooling, plan.config.width)
        files |= {name: _json(values) for name, values in described.items()}
    if tokenizer is not None:
        files["tokenizer.json"] = _json(json.loads(tokenizer.to_str()))
        files["tokenizer_config.json"] = _json(tokenizer_config(tokenizer, plan.config.positions))
    files["config.json"] = _json(config)                   # last: see write_atomically
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; save wants a directory")
    _write(path, files)
    return path


def _write(path: Path, files: dict[str, bytes]) -> None:
    """Write files of a directory, all or none. files: {name: content}; a name may have a folder before it."""
    below = {path / name: data for name, data in files.items() if "/" in name}
    here = {path / name: data for name, data in files.items() if "/" not in name}
    with contextlib.ExitStack() as undo:
        for file, data in below.items():                   # of a folder of its own: no part of the atomic writing
            before = file.read_bytes() if file.is_file() else None
            write_atomically({file: data})
            undo.callback(_restore, file, before)
        write_atomically(here)
        undo.pop_all()


def _restore(file: Path, before: bytes | None) -> None:
    """Give a file its content of before, or remove it with its folder if it was not there."""
    if before is not None:
        write_atomically({file: before})
        return
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):                     # other files are in the folder
        file.parent.rmdir()


def _family_of_model(model: Module) -> Family:
    """The family of this model's class. ValueError if there is none."""
    for family in FAMILIES:
        if family.holds(model):
            return family
    types = [family.model_type for family in FAMILIES if type(model) is family.model]
    if types:
        raise ValueError(f"save wants a {type(model).__name__} with the settings of {' or '.join(types)}, got others: "
                         f"{model.config}")
    known = ", ".join(dict.fromkeys(family.model.__name__ for family in FAMILIES))
    raise ValueError(f"save wants one of {known}, got a {type(model).__name__}")


def _check_plain(model: Module) -> None:
    """ValueError if the model has edits, which this format cannot hold."""
    if names := sorted({name for module in model.modules() for name in module.edits}):
        raise ValueError(f"{first_names(names)} is attached: merge it into the weights (tinyft.merge), "
                         "or write it alone (tinyft.save_adapter)")


def _check_parameters(table: Table, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError if the model's parameters are not those of the table."""
    odd = sorted(table.keys() ^ shapes.keys())
    if not odd:
        odd = [name for name, shape in shapes.items() if shape != table[name].shape]
    if odd:
        raise ValueError(f"this model is no longer what its config says: {first_names(odd)}")


def _json(values: dict | list) -> bytes:
    """A JSON file of these values."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _kept_entries(model: Module, plan: Plan, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Entries of config.json: those that `load` kept from the model's file, brought up to date.

    The class names are replaced if their number is not that of the head; the ids of special tokens, if the tokenizer
    has them. A model that was not loaded has no kept entries.
    """
    kept = dict(getattr(model, "_kept_config", {}))
    if len(kept.get("id2label") or ()) != plan.classes:    # another head than the one that was loaded
        for key in ("id2label", "label2id", "problem_type"):
            kept.pop(key, None)
        if plan.classes:                                   # transformers reads the number of classes from these names
            labels = [f"LABEL_{i}" for i in range(plan.classes)]
            kept["id2label"] = {str(i): label for i, label in enumerate(labels)}
            kept["label2id"] = {label: i for i, label in enumerate(labels)}
    for kind in ("pad", "bos", "eos"):
        token = None if tokenizer is None else special_token(tokenizer, kind)
        if token is not None:
            kept[f"{kind}_token_id"] = tokenizer.token_to_id(token)
    return kept
