"""`tinyft merge`, `tinyft convert` and `tinyft embed`: files in, files out."""
from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .. import checks, edit
from ..adapters import save_adapterhub, save_peft
from ..data.files import near_name, read_rows
from ..embed import embed
from ..files import write_atomically
from ..formats.huggingface import save
from ..methods import Houlsby
from ..models.blocks import Classifier
from ..nn import Module
from ..predict import class_names
from .arguments import UsageError
from .opening import as_json, check_new_folder, claimed_folder, open_adapter, open_model, write_class_names

__all__ = ["run_convert", "run_embed", "run_merge"]

VECTORS = (".npy", ".jsonl")


# ── directories ──────────────────────────────────────────────────────────────────────────────────────────────────────
def run_merge(args: argparse.Namespace) -> int:
    """Write the base with its adapter worked in. Returns the exit status, 0.

    ValueError, with the reason, for an adapter that cannot be merged; then nothing is written."""
    check_new_folder(args.out)
    with claimed_folder(args.out) as folder:
        model, tokenizer = open_model(args.model, command="merge")
        open_adapter(model, args.adapter)
        try:
            edit.merge(model)
        except edit.CannotMerge as e:
            raise ValueError(f"{args.adapter} cannot be merged: {e}") from e
        write_model(model, folder, tokenizer, args)
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Write a model, or with --adapter its adapter alone, in another form. Returns the exit status, 0.

    Compressed weights become dense ones: the directory is for transformers."""
    check_new_folder(args.out)
    with claimed_folder(args.out) as folder:
        model, tokenizer = open_model(args.model, command="convert")
        if args.adapter is not None:
            open_adapter(model, args.adapter)
            write_adapter(model, folder, args)
        else:
            edit.unpack(model)
            write_model(model, folder, tokenizer, args)
    return 0


def write_adapter(model: Module, folder: Path, args: argparse.Namespace) -> None:
    """Write the attached method in the form of PEFT, a bottleneck adapter in that of AdapterHub."""
    method = edit.attached(model)[-1].method
    if isinstance(method, Houlsby):
        library = "AdapterHub"
        save_adapterhub(model, folder)
    else:
        library = "PEFT"
        save_peft(model, folder)
    if isinstance(model.head, Classifier):
        write_class_names(folder, [str(name) for name in class_names(model, None)])
    if args.json:
        print(as_json({"out": os.fspath(folder), "method": type(method).__name__, "library": library}))
    else:
        print(f"written  {folder}: {method!r} for {library}")


def write_model(model: Module, folder: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Write the directory of a model, and print its size."""
    save(model, folder, tokenizer, args.dtype)
    total = sum(file.stat().st_size for file in folder.iterdir())
    parameters = sum(p.size for p in model.parameters())
    if args.json:
        print(as_json({"out": os.fspath(folder), "parameters": parameters, "dtype": args.dtype, "bytes": total}))
    else:
        print(f"written  {folder}: {parameters:,} parameters in {args.dtype}, {total / 1e6:,.1f} MB")


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_embed(args: argparse.Namespace) -> int:
    """Write one vector for each text. Returns the exit status, 0. The file appears when it is complete."""
    out = Path(args.out)
    check_vectors(out)
    rows = read_rows(args.texts, split_lines=True)
    if rows.kind not in ("text", "labelled"):
        raise ValueError(f"--texts wants rows of text, got {rows.path} with {rows.kind}")
    texts = [row[0] for row in rows.rows]
    model, tokenizer = open_model(args.model, packed=args.packed, command="embed")
    vectors = embed(model, tokenizer, texts, batch_size=args.batch)
    write_atomically({out: as_file(vectors, texts, out.suffix.lower())})
    result: dict[str, Any] = {"out": os.fspath(out), "texts": len(texts), "width": vectors.shape[1]}
    print(as_json(result) if args.json else f"written  {out}: {len(texts):,} vectors of {vectors.shape[1]} numbers")
    return 0


def check_vectors(out: Path) -> None:
    """UsageError for another ending than .npy and .jsonl. OSError for a place where no file can be written."""
    if out.suffix.lower() not in VECTORS:
        near = near_name(out.suffix.lower(), VECTORS)
        hint = f": did you mean {near}?" if near else ""
        raise UsageError(f"--out wants the ending {' or '.join(VECTORS)}, got {checks.brief(str(out))}{hint}")
    if os.path.lexists(out) and not out.is_file():
        raise OSError(f"--out wants the path of a new or an ordinary file, and {out} is something else")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out wants a file in a folder that exists, and {out.parent} does not")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"--out wants a folder that can be written to, got {out.parent}")


def as_file(vectors: np.ndarray, texts: list[str], ending: str) -> bytes:
    """The content of the file of vectors (N, C): an array of NumPy, or lines of JSON, {"text", "vector"}."""
    if ending == ".npy":
        content = io.BytesIO()
        np.save(content, vectors, allow_pickle=False)
        return content.getvalue()
    lines = []
    for text, vector in zip(texts, vectors, strict=True):
        numbers = [float(f"{value:.7g}") for value in vector]
        lines.append(json.dumps({"text": text, "vector": numbers}))
    return ("\n".join(lines) + "\n").encode()
