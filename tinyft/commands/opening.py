"""Files in and folders out: models, adapters, and the folder for results.

    open_model("base-gpt", packed=False)        (model, tokenizer), checked
    open_adapter(model, "work/run")             attaches an adapter of tinyft or of PEFT
    claimed_folder("work/out")                  a new folder, which is removed if the work ends before it is used
"""
from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .. import checks
from ..files import read_json, read_safetensors, write_atomically
from ..formats.huggingface import ASSETS, classifier, load
from ..models import EncoderDecoder
from ..models.blocks import Classifier
from ..nn import Module
from ..train.batch import is_causal

__all__ = [
    "check_new_folder", "claimed_folder", "is_language_model", "open_adapter", "open_model", "set_class_names",
    "write_class_names",
]

CLASS_NAMES = "labels.json"                              # beside the files of an adapter with a new head


# The commands that give a model one text at a time. An encoder-decoder wants a source and a target.
OF_ONE_TEXT = ("embed", "chat")


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def open_model(path: str, *, packed: bool = False, command: str) -> tuple[Module, Tokenizer]:
    """(model, tokenizer) of a shipped base, a directory or a .gguf file.

    packed   keep the compressed weights of a .gguf file
    command  the command that wants them, for the messages

    FileNotFoundError, naming a near path, if there is none. ValueError for a model without a tokenizer, for one whose
    tokenizer has more tokens than the embedding has rows, and for a directory with packed."""
    if packed and not path.lower().endswith(".gguf"):
        raise ValueError(f"--packed wants a .gguf file, which has compressed weights, got {path}")
    try:
        model, tokenizer = load(path, packed=True) if packed else load(path)
    except FileNotFoundError as e:
        near = _near_model(path)
        hint = f": did you mean {near}?" if near else ""
        raise FileNotFoundError(f"{e}{hint}") from e
    if isinstance(model, EncoderDecoder) and command in OF_ONE_TEXT:
        raise ValueError(f"{command} wants a model that reads one text, got the encoder-decoder "
                         f"{type(model).__name__} in {path}: tinyft generate writes a target for a source")
    if tokenizer is None:
        raise ValueError(f"{command} wants a model with its tokenizer, got no tokenizer.json in {path}")
    tokens = tokenizer.get_vocab_size()
    rows = model.embed.in_features
    if tokens > rows:
        raise ValueError(f"{command} wants an embedding for every token, got {tokens} tokens in the tokenizer "
                         f"of {path} and {rows} rows in the embedding")
    return model, tokenizer


def _near_model(path: str) -> str | None:
    """The shipped model, or the entry of the same folder, that is most like a path that does not exist."""
    if os.path.lexists(path):
        return None
    names = [folder.parent.name for folder in ASSETS.glob("*/config.json")]
    near = difflib.get_close_matches(path, names, 1, 0.6)
    folder = Path(path).parent
    if not near and folder.is_dir():
        near = difflib.get_close_matches(Path(path).name, os.listdir(folder), 1, 0.7)
        near = [str(folder / name) for name in near]
    return near[0] if near else None


def is_language_model(model: Module) -> bool:
    """True for a causal model that scores every token of its vocabulary."""
    scores = getattr(getattr(model, "head", None), "out_features", 0)
    return is_causal(model) and not isinstance(model.head, Classifier) and scores == model.embed.in_features


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def open_adapter(model: Module, path: str) -> None:
    """Attach the adapter in a folder: one of tinyft, of a run of `tinyft tune`, or of PEFT.

    A new head that the adapter was trained with is put on first, with the names of its classes.
    FileNotFoundError if the folder has no adapter; ValueError for the adapter of another base."""
    folder = _adapter_folder(path)
    is_own = os.path.lexists(folder / "adapter.json")
    if is_own:
        _open_own(model, folder)
    else:
        _open_foreign(model, folder)
    if isinstance(model.head, Classifier) and (folder / CLASS_NAMES).exists():
        set_class_names(model, _read_class_names(folder / CLASS_NAMES, model.head.out_features))


def _open_own(model: Module, folder: Path) -> None:
    """Attach an adapter of tinyft, after the new head that its file asks for."""
    from ..adapters import load_adapter
    from ..adapters.files import identify_base
    from ..adapters.reading import read_adapter

    facts, _ = read_adapter(folder)
    head = facts["base"]["head"]
    if head and identify_base(model)["head"] != head:
        classifier(model, head[-1][0])                   # its shapes end with (classes,) or (classes, width)
    load_adapter(model, folder)


def _adapter_folder(path: str) -> Path:
    """The folder with the files of the adapter: `path`, or the folder `adapter` of the run in it."""
    for folder in (Path(path), Path(path) / "adapter"):
        if any(os.path.lexists(folder / name) for name in ("adapter.json", "adapter_config.json")):
            return folder
    if (Path(path) / "checkpoint.safetensors").exists():
        raise FileNotFoundError(f"{path} holds a run that has not ended: tinyft tune --resume --out {path} goes on")
    state = "has no adapter.json and no adapter_config.json" if Path(path).is_dir() else "is no folder"
    raise FileNotFoundError(f"--adapter wants the folder of an adapter, and {path} {state}")


def _open_foreign(model: Module, folder: Path) -> None:
    """Attach an adapter of PEFT or of AdapterHub, after a new head if its files hold a classifier.

    adapter_config.json of PEFT names a peft_type."""
    from .. import adapters

    config = read_json(folder / "adapter_config.json")
    is_peft = "peft_type" in config
    weights = folder / ("adapter_model.safetensors" if is_peft else "model_head.safetensors")
    classes = _classes_in(weights) if weights.is_file() else 0
    if classes and not isinstance(model.head, Classifier):
        classifier(model, classes)
    reader = adapters.load_peft if is_peft else adapters.load_adapterhub
    reader(model, folder)


def _classes_in(weights: Path) -> int:
    """The number of classes of the classifier in a file of tensors; 0 if there is none."""
    tensors, _ = read_safetensors(weights)
    for name, tensor in tensors.items():
        if re.search(r"(^|\.)(classifier(\.out_proj)?|score)\.weight$", name) and tensor.ndim == 2:
            return len(tensor)
    return 0


# ── the names of classes ─────────────────────────────────────────────────────────────────────────────────────────────
def set_class_names(model: Module, names: Sequence[str]) -> None:
    """Give the classes of a model names: `predict` gives them, `save` writes them as id2label."""
    kept = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    model._kept_config = getattr(model, "_kept_config", {}) | kept


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write the names of the classes beside an adapter."""
    write_atomically({folder / CLASS_NAMES: (json.dumps({"labels": list(names)}, indent=1) + "\n").encode()})


def _read_class_names(file: Path, classes: int) -> list[str]:
    """The names of the classes beside an adapter. ValueError if they are not one string for each class."""
    names = read_json(file).get("labels")
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} wants a list of {classes} labels, got {checks.brief(names)}")
    return names


# ── the folder of results ────────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def claimed_folder(out: str) -> Iterator[Path]:
    """The folder, made with its parents; files can be written to it.

    If the `with` ends with an exception, the folders that were made are removed again, unless they hold something.
    OSError, in one sentence, if the folder cannot be made or written to."""
    folder = Path(out)
    made: list[Path] = []
    try:
        _make(folder, made)
        yield folder
    except BaseException:
        for new in reversed(made):
            with contextlib.suppress(OSError):           # it holds something
                new.rmdir()
        raise


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and its parents, and append to `made` those that were not there. OSError if it cannot be used."""
    try:
        missing = []
        for path in (folder, *folder.parents):
            if os.path.lexists(path):
                break
            missing.append(path)
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(bytes(100_000))                      # a full disk takes an empty file
    except OSError as e:
        reason = e.strerror or e
        raise OSError(f"--out wants a folder that can be written to, got {folder} ({reason})") from e
    except ValueError as e:                              # a null byte in the name
        raise ValueError(f"--out wants the path of a folder, got {checks.brief(str(folder))} ({e})") from e


def check_new_folder(out: str) -> None:
    """ValueError unless there is nothing under this path, or an empty folder."""
    if not out:
        raise ValueError("--out wants the path of a folder, got an empty path")
    if os.path.isdir(out) and os.listdir(out):
        raise ValueError(f"--out wants a new or an empty folder, got {out}, which holds {_some(os.listdir(out))}")
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ValueError(f"--out wants a new or an empty folder, got {out}, which is no folder")


def _some(names: list[str]) -> str:
    """The first names of a list in words."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(sorted(names)[:2]) + more


def as_json(values: dict[str, Any]) -> str:
    """One line of JSON; a number that is not finite becomes null, since JSON has none."""
    text = json.dumps(values, default=str)
    return json.dumps(json.loads(text, parse_constant=_null))


def _null(name: str) -> None:
    """The value of NaN and Infinity in JSON."""
