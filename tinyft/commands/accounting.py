"""`tinyft memory`: the bytes and the operations of a fine-tuning, and the largest batch for a budget."""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from typing import Any

from ..memory import CONFIGS, Memory, largest_batch, memory
from ..memory.formulas import korthikanti_bytes
from ..memory.training import in_bytes
from ..models import Seq2SeqConfig, T5Config
from ..optim import SGD, AdamW
from .arguments import UsageError
from .opening import as_json, open_model
from .settings import make_method

__all__ = ["read_bytes", "run"]

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status, 0."""
    model = open_subject(args)
    if args.set and not args.method:
        raise UsageError("--set wants a method: add --method")
    method = make_method(args.method, args.set) if args.method else None
    budget = None if args.budget is None else read_bytes(args.budget)
    options: dict[str, Any] = {
        "length": args.length, "source_length": args.source_length, "weights": args.weights,
        "autocast": args.autocast, "accumulate": args.accumulate,
        "recompute": args.recompute, "optimizer": AdamW(1e-3) if args.optimizer == "adamw" else SGD(1e-2),
    }
    report = memory(model, method, batch=args.batch, **options)
    result: dict[str, Any] = {**dataclasses.asdict(report), "formula": formula(model, args.batch, args.length)}
    if budget is not None:
        result["budget"] = int(budget)
        result["largest_batch"] = largest_batch(model, budget, method, **options)
    if args.json:
        print(as_json(result))
        return 0
    print_report(report, result)
    return 0


def open_subject(args: argparse.Namespace) -> Any:
    """The model or the configuration that the options name. UsageError unless there is exactly one."""
    if (args.model is None) == (args.config is None):
        raise UsageError("memory wants --model MODEL or --config NAME")
    if args.model is not None:
        return open_model(args.model, packed=args.packed, command="memory")[0]
    if args.config not in CONFIGS:
        near = difflib.get_close_matches(args.config, CONFIGS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONFIGS)}"
        raise UsageError(f"--config wants the name of a known model, got {args.config!r}: {hint}")
    return CONFIGS[args.config]


def read_bytes(text: str) -> float:
    """A number of bytes from a text such as 8GB (10⁹ bytes) or 8GiB (2³⁰). UsageError for another text."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if unit is None or float(match[1]) <= 0:
        raise UsageError(f"--budget wants bytes, such as 8GB or 8GiB, got {text!r}")
    return float(match[1]) * unit


def formula(model: Any, batch: int, length: int) -> dict[str, int] | None:
    """The activations of all layers by Korthikanti et al. 2022, in float32: with dropout and stored scores, and without
    both. None for an encoder-decoder: the formula counts layers without cross-attention."""
    c = getattr(model, "config", model)
    if isinstance(c, (Seq2SeqConfig, T5Config)):
        return None
    sizes = (length, batch, c.width, c.heads, c.layers, 4)
    return {
        "stored_scores": korthikanti_bytes(*sizes),
        "flash": korthikanti_bytes(*sizes, dropout=False, stored_scores=False),
    }


def print_report(report: Memory, result: dict[str, Any]) -> None:
    """The report as text."""
    print(report)
    by_formula = result["formula"]
    if by_formula is not None:
        print(f"  {'activations by formula':<32}{in_bytes(by_formula['flash']):>12}   (Korthikanti et al. 2022, full "
              f"fine-tuning; with dropout and stored scores {in_bytes(by_formula['stored_scores'])})")
    if "budget" in result:
        largest = result["largest_batch"]
        print(f"  {'largest batch':<32}{largest:>12}   for {in_bytes(result['budget'])}")
