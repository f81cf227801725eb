"""Hugging Face style directories: config.json, model.safetensors (or its shards) and tokenizer.json, read and written.

    model, tokenizer = load("path/to/directory")          or load("base-gpt"), a model that ships with tinyft
    save(model, "path/to/directory", tokenizer)           transformers reads it, with the same outputs

Nothing is downloaded and nothing is unpickled.  What is read is checked before a model is made of it: sizes, names, shapes, kinds of
numbers.  What is written comes into its place only when all of it is on the disk.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

from .. import array, edit
from ..files import write_atomically
from ..nn import Module, Packed
from . import bert, gpt2
from .directory import FLOATS, few, read_all, read_json
from .layout import Place, Plan, build, put

__all__ = ["load", "save", "classifier"]

ASSETS = Path(__file__).parent.parent / "assets"
FAMILIES: dict[str, Any] = {"gpt2": gpt2, "bert": bert}
KEPT = ("id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id")      # read, kept, not used
SPECIAL = {"pad": ("[PAD]", "<pad>", "<|pad|>"), "unk": ("[UNK]", "<unk>"), "cls": ("[CLS]",), "sep": ("[SEP]",), "mask": ("[MASK]",),
           "bos": ("<|endoftext|>",), "eos": ("<|endoftext|>",)}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def load(path: str | os.PathLike, dtype: Any = None) -> tuple[Module, Tokenizer | None]:
    """(model, tokenizer) from a directory, or from the name of a model that ships.  The tokenizer is None where there is no tokenizer.json.

    dtype: of the model's numbers; float32 unless given, whatever the file holds.  The model is on the backend in use.  Its one dropout
    rate, at work after model.train(), is the largest of those in config.json.
    FileNotFoundError if there is no such directory or a file of it is missing.  ValueError, in one sentence naming what was wanted and
    what was got, if a file is damaged or the model is one that this library does not have."""
    folder, dtype = find(path), _float(dtype or np.float32)
    config = read_json(folder / "config.json")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ValueError(f"{folder} holds a model of the type {config.get('model_type')!r}; those read here are {', '.join(FAMILIES)}")
    try:
        held = _normal(family, read_all(folder))
        plan = family.plan(config, held.keys())
        arrays = _fit(plan, held, family, config)
    except ValueError as e:
        raise ValueError(str(e) if str(folder) in str(e) else f"{folder}: {e}") from e
    tokenizer = _tokenizer(folder)
    model = build(family.blank(plan), {n: array.asarray(_as(a, dtype, n)) for n, a in arrays.items()})
    model._about = {k: config[k] for k in KEPT if k in config}
    return model, tokenizer


def find(path: str | os.PathLike) -> Path:
    "The directory meant: this one, or for a bare name that is none the model of this name that ships with tinyft."
    folder = Path(path)
    if not folder.exists() and isinstance(path, str) and path and not {"/", os.sep, os.altsep} & set(path):
        folder = ASSETS / path
        if not (folder / "config.json").is_file():
            ships = sorted(p.parent.name for p in ASSETS.glob("*/config.json"))
            raise FileNotFoundError(f"there is no directory {path!r}, and no model of this name ships; "
                                    f"those that do: {', '.join(ships) or 'none'}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is {'a file' if folder.exists() else 'not there'}; "
                                "wanted a directory with config.json and model.safetensors")
    return folder


def _normal(family: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    "The tensors under the family's plain names.  Two spellings of one name are refused: which is meant cannot be known."
    out, spelt = {}, {}
    for name, a in tensors.items():
        plain = family.rename(name)
        if plain in out:
            raise ValueError(f"{spelt[plain]} and {name} are two spellings of one tensor: which of them is meant is not clear")
        if plain is not None:
            out[plain], spelt[plain] = a, name
    return out


def _fit(plan: Plan, held: dict[str, np.ndarray], family: Any, config: dict) -> dict[str, np.ndarray]:
    "{our name: view} of every tensor of the plan, after all checks.  `held` is used up."
    c = plan.config
    if c.width % c.heads:
        raise ValueError(f"config.json: {c.heads} heads do not divide a width of {c.width}")
    if c.layers > len(held):                                                     # before a table of that many layers is made
        raise ValueError(f"config.json asks for {c.layers} layers; the file holds {len(held)} tensors in all")
    places: dict[str, Place] = family.places(plan)
    head = [alias for alias in family.TIED if alias.endswith(".weight")]
    if config.get("tie_word_embeddings") is False and plan.head in ("lm", "mlm") and head[0] not in held:
        raise ValueError(f"config.json says that the output layer is not the embedding, and the file holds no {head[0]}")
    for alias, name in family.TIED.items():
        if alias in held and name in held:
            if not _same(held[alias], held[name]):
                raise ValueError(f"{alias} differs from {name}: an output layer of its own, which this library's model does not have")
            del held[alias]
        elif alias in held:
            held[name] = held.pop(alias)
    stored = {p.name: p.stored for p in places.values()}
    missing, more = [n for n in stored if n not in held], [n for n in held if n not in stored]
    wrong = [f"{n} has shape {held[n].shape}, not {s}" for n, s in stored.items() if n in held and held[n].shape != s]
    wrong += [f"{n} holds {held[n].dtype} numbers, not {', '.join(FLOATS)}"
              for n in stored if n in held and held[n].dtype not in FLOATS.values()]
    if missing or more or wrong:
        says = [f"missing {few(missing)}"] * bool(missing) + [f"unexpected {few(more)}"] * bool(more) + [few(wrong)] * bool(wrong)
        raise ValueError(f"the tensors are not those that config.json asks for: {'; '.join(says)}")
    return {ours: p.take(held[p.name]) for ours, p in places.items()}


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and (a is b or np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True))


def _tokenizer(folder: Path) -> Tokenizer | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:                                                       # the library raises plain Exception
        raise ValueError(f"{file} is damaged: {e}") from e
    if folder.parent == ASSETS:
        tokenizer.encode_special_tokens = True                                   # as in data.shipped_tokenizer: "[MASK]" in a text is text
    return tokenizer


def _as(a: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    "A copy of a in C order and of this dtype.  OverflowError where a finite number would become infinite."
    with np.errstate(over="ignore"):
        b = np.array(a, dtype, order="C")
    if dtype != a.dtype and dtype.itemsize <= a.dtype.itemsize and not np.isfinite(b[np.isfinite(a)]).all():
        raise OverflowError(f"{name} holds a number too large for {dtype}: choose a wider dtype")
    return b


def _float(dtype: Any) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in FLOATS.values():
        raise TypeError(f"a model holds float64, float32, float16 or bfloat16 numbers; got {dtype}")
    return dtype


# ── a new head ───────────────────────────────────────────────────────────────────────────────────────────────────────
def classifier(model: Module, classes: int, seed: int = 0) -> Module:
    """The model with a new head that scores `classes` classes, (B, T) ids -> (B, classes); in place.  The head is drawn from `seed`, and
    trains with whatever method is attached afterwards.  ValueError if something is attached already."""
    if not isinstance(classes, (int, np.integer)) or classes < 1:
        raise ValueError(f"classifier wants at least one class; got {classes!r}")
    if not hasattr(type(model), "new_head"):
        raise TypeError(f"a {type(model).__name__} takes no new head")
    if edit.attached(model):
        raise ValueError(f"put the head on first: {edit.attached(model)[-1].name} is attached; detach it, and attach it again afterwards")
    like = next(iter(model.named_parameters().values())).data
    old = {id(p) for p in model.parameters()}
    model.new_head(int(classes), np.random.default_rng(seed))
    for p in model.parameters():
        if id(p) not in old:                                                     # beside the model's weights, and of their kind
            p.data = array.to(p.data, array.name_of(like)).astype(like.dtype)
    return model


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def save(model: Module, path: str | os.PathLike, tokenizer: Tokenizer | None = None, dtype: Any = None) -> Path:
    """Write a model, and its tokenizer if given, as a directory that `load` and transformers read.

    dtype: of the numbers on disk; the model's own unless given.  Other files of an existing directory stay.  All is written beside its
    place first: OSError (a full disk) or an interruption leaves what was there before.  ValueError for a model that such a directory
    cannot hold: one with edits on it, a packed one, one of another family; OverflowError if a number is too large for dtype."""
    family = next((f for f in FAMILIES.values() if type(model) is f.MODEL), None)
    if family is None:
        can = " and ".join(f.MODEL.__name__ for f in FAMILIES.values())
        raise ValueError(f"a {type(model).__name__} cannot be written in this format; {can} can")
    if names := sorted({n for m in model.modules() for n in m.edits}):
        raise ValueError(f"{few(names)} is attached: work it into the weights (tinyft.merge), or write it alone (tinyft.save_adapter)")
    if packed := [p for p, m in model.named_modules() if isinstance(m, Packed)]:
        raise ValueError(f"{few(packed)} is packed, which this format cannot hold: unpack the model first")
    plan = family.plan_of(model)
    places, params = family.places(plan), model.named_parameters()
    if odd := sorted(places.keys() ^ params.keys()) or [n for n, p in params.items() if p.shape != places[n].shape]:
        raise ValueError(f"this model is no longer what its config says: {few(odd)}")
    kind = _float(model.embed.weight.dtype if dtype is None else dtype)
    ours = {n: _as(array.asnumpy(p.data), kind, n) for n, p in params.items()}
    weights = {family.full_name(n, plan): a for n, a in put(places, ours).items()}
    config = {**family.config_of(plan), "torch_dtype": str(kind), **_about(model, plan, tokenizer)}
    pt = {"format": "pt"}                                                        # transformers wants to know whose layout it is
    files = {"config.json": _json(config), "model.safetensors": safetensors.numpy.save(weights, metadata=pt)}
    if tokenizer is not None:
        special = {f"{k}_token": t for k, ts in SPECIAL.items() for t in ts if tokenizer.token_to_id(t) is not None}
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": plan.config.positions, **special}
        files["tokenizer.json"] = _json(json.loads(tokenizer.to_str()))
        files["tokenizer_config.json"] = _json(about)
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; a model is saved as a directory")
    write_atomically({path / name: data for name, data in files.items()})
    return path


def _json(facts: dict) -> bytes:
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def _about(model: Module, plan: Plan, tokenizer: Tokenizer | None) -> dict[str, Any]:
    "What the model was loaded with and does not compute with: names of classes, special tokens."
    kept = dict(getattr(model, "_about", {}))
    if len(kept.get("id2label") or ()) != plan.classes:
        kept = {k: v for k, v in kept.items() if k not in ("id2label", "label2id", "problem_type")}
        if plan.classes:
            names = [f"LABEL_{i}" for i in range(plan.classes)]                  # transformers reads the number of classes from these
            kept |= {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}
    for token in ("pad", "bos", "eos"):
        found = [i for t in SPECIAL[token] if tokenizer is not None and (i := tokenizer.token_to_id(t)) is not None]
        kept.update({f"{token}_token_id": found[0]} if found else {})
    return kept
