"""The memory of training, found by running `fit` on arrays that have sizes and no numbers (sizes.py).

Everything that a run allocates counts from its allocation until it is freed: weights, gradients, moments, master
weights, the arrays that the graph keeps, and working memory. Nothing of a large model is ever in memory.

    report = ft.memory(ft.GPTConfig(width=1600, layers=48, heads=25), ft.LoRA(r=8), batch=4, length=1024)
    print(report);   report.peak

The figures are those of NumPy's kernels in this library. tests/test_memory.py holds them to the peak that the allocator
reports for real runs: within a few percent.

A formula that is often quoted, "4 N bytes for each of weights, gradients and optimiser states, and 4 N B for the
activations", has four errors. Adam keeps two moments, so the fixed part is 16 N and not 12 N. Activations do not grow
with N but with tokens, width and layers, and, where scores are stored, with the square of the length. The length does
not appear in it at all. And it leaves out the logits. It also mixes GB (10⁹ bytes) with GiB (2³⁰ bytes).
"""
from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import array, checks, edit, sizes
from ..array import Array
from ..edit import Method
from ..keywords import checked_keywords, keyword_names, refuse_keywords
from ..models import (
    BERT,
    GPT,
    T5,
    BERTConfig,
    EncoderDecoder,
    GPTConfig,
    Llama,
    LlamaConfig,
    Seq2Seq,
    Seq2SeqConfig,
    SwitchMLP,
    T5Config,
)
from ..models.blocks import Classifier
from ..nn import Context, Linear, Module, Packed
from ..optim import AdamW, Optimizer
from ..tensor import Tensor
from ..train import CrossEntropy, Targets, fit

__all__ = ["Memory", "build", "largest_batch", "memory", "without_numbers"]

MODELS: dict[type, type[Module]] = {
    GPTConfig: GPT, BERTConfig: BERT, LlamaConfig: Llama, Seq2SeqConfig: Seq2Seq, T5Config: T5,
}
DTYPES = ("float32", "float16", "bfloat16")
# Bits of a packed weight, scales included: groups of 64 (NF4), blocks of 32 (Q4_0, Q4_1, Q8_0), rows (int8).
PACKED_BITS = {"nf4": 4 + 32 / 64, "nf4-double": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8.0,
               "q4_0": 4.5, "q4_1": 5.0, "q8_0": 8.5}
DENSE = 1 << 20                                          # dense weights that a packed product holds at a time
MOST_TOKENS = 1 << 24                                    # of the largest batch that is tried: its ids are real


@dataclass(frozen=True)
class Memory:
    """The bytes of a training step, and the operations of its matrix products.

    description    the run in words
    parameters     the number of parameters, a tied one once; `trained`: of those that train
    weights        bytes of all parameters and buffers, adapters included
    copies         bytes of the trained base tensors' first values, which `attach` keeps for `detach`
    optimizer      bytes of the moments, and of the float32 master weights of 16-bit parameters
    activations    bytes that live at the peak and were allocated in a forward pass
    gradients      the same of the backward pass: of parameters, and on their way; with recompute, also the activations
                   of the block that ran again
    other          the rest of the peak: arrays of a start or of an update
    peak           the most bytes that live at once: the sum of the six parts
    kept           bytes of the forward pass that live when backward starts
    all_gradients  bytes of the gradients of all trained parameters
    tokens         positions of a batch that the model reads, sources included
    flops          {"forward", "backward"}: operations of the matrix products of a step, 2 for a multiplication with its
                   addition
    """

    description: str
    parameters: int
    trained: int
    weights: int
    copies: int
    optimizer: int
    activations: int
    gradients: int
    other: int
    peak: int
    kept: int
    all_gradients: int
    tokens: int
    flops: dict[str, int] = field(default_factory=dict)

    PARTS = {
        "weights": "weights", "copies": "copies of the base, for detach", "optimizer": "optimiser states",
        "activations": "activations, at the peak", "gradients": "gradients, at the peak", "other": "other",
    }

    def __str__(self) -> str:
        """The parts as a table."""
        percent = 100 * self.trained / max(self.parameters, 1)
        lines = [self.description,
                 f"{self.parameters:,} parameters, {self.trained:,} trained ({percent:.2f} %)", ""]
        for name, title in self.PARTS.items():
            value = getattr(self, name)
            if value or name in ("weights", "activations", "gradients"):
                lines.append(f"  {title:<32}{in_bytes(value):>12}{100 * value / self.peak:7.1f} %")
        lines.append(f"  {'peak':<32}{in_bytes(self.peak):>12}           ({self.peak / 2**30:,.2f} GiB)")
        lines += ["", f"  {'kept for the backward pass':<32}{in_bytes(self.kept):>12}"]
        lines.append(f"  {'gradients of all that trains':<32}{in_bytes(self.all_gradients):>12}")
        total = sum(self.flops.values())
        parts = ", ".join(f"{name} {in_flops(n)}" for name, n in self.flops.items())
        lines.append(f"  {'products of a step':<32}{in_flops(total):>12}   ({parts})")
        return "\n".join(lines)


def in_bytes(n: float) -> str:
    """Bytes as text. 1 GB is 10⁹ bytes."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n) >= unit:
            return f"{n / unit:.3g} {name}" if n < 999.5 * unit else f"{n / unit:.0f} {name}"
    return f"{n:.0f} B"


def in_flops(n: float) -> str:
    """Operations as text."""
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return f"{n:.0f} FLOP"


# ── the account ──────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def memory(
    model: Any, method: Method | None = None, *, batch: int = 1, length: int = 128, source_length: int | None = None,
    weights: str | None = None, optimizer: Optimizer | None = None, autocast: str | None = None, accumulate: int = 1,
    recompute: bool = False, labelled: float = 1.0,
) -> Memory:
    """The memory of `fit(model, ...)` on batches of `batch` rows of `length` tokens. The model stays as it is.

    model       a model, with what is attached to it; or its configuration, such as a GPTConfig, without weights
    method      attached to it; None: what is attached already trains, or else everything
    source_length   tokens of a source, for an encoder-decoder; None: as many as its text has
    weights     float32, float16 or bfloat16; or a packed format for the linear maps of the blocks: nf4, nf4-double,
                int8, q4_0, q4_1, q8_0. None: as they are; of a configuration, float32
    optimizer   AdamW if None
    autocast, accumulate, recompute     as in fit
    labelled    the share of the positions that have a label: logits are computed for these

    The experts of a Switch layer share the tokens evenly here, and drop none. With other shares a run needs as much
    within a few percent, and less where tokens are dropped.
    TypeError or ValueError for arguments that make no sense, such as a length beyond the model's positions."""
    checks.whole("memory: batch", batch, least=1)
    checks.whole("memory: length", length, least=1)
    if source_length is not None:
        checks.whole("memory: source_length", source_length, least=1)
    checks.whole("memory: accumulate", accumulate, least=1)
    checks.number("memory: labelled", labelled, above=0, high=1)
    optimizer = AdamW(1e-3) if optimizer is None else copy.copy(optimizer)
    checks.instance("memory: optimizer", optimizer, Optimizer, "an optimiser")
    gc.collect()
    with without_numbers() as ledger:
        with ledger.during("weights"):
            sized = build(model, weights)
        with ledger.during("copies"):
            if method is not None:
                edit.attach(sized, method)
        ledger.restart_peak()                            # weights that were packed here were never dense elsewhere
        loss = _Counted()
        run = min(accumulate, 2)                         # a third batch needs no more than the second
        with ledger.during("backward"):
            rows = _batch(sized, batch, length, labelled, source_length)
            fit(sized, [rows], 1, optimizer, loss=loss, autocast=autocast, accumulate=run, recompute=recompute,
                progress=False)
        report = _report(sized, optimizer, ledger, loss, rows, weights)
    return replace(report, flops={name: n * accumulate // run for name, n in report.flops.items()})


@contextmanager
def without_numbers() -> Iterator[sizes.Ledger]:
    """New arrays have no numbers, and count in a new ledger, for the length of a `with`."""
    before = array.backend()
    array.use("sizes")
    try:
        with sizes.accounting() as ledger:
            yield ledger
    finally:
        array.use(before)


@dataclass(frozen=True)
class _Counted(CrossEntropy):
    """Cross-entropy whose forward pass is a phase of the ledger; `kept` gets the bytes that live at its end."""
    kept: list = field(default_factory=list)

    def __call__(self, model: Module, targets: Targets, rng: Any = None) -> tuple[Context, Tensor]:
        ledger = sizes.current_ledger()
        with ledger.during("forward"):
            result = super().__call__(model, targets, rng)
        self.kept.append(ledger.live["forward"])
        return result


def _batch(
    model: Module, batch: int, length: int, labelled: float, source_length: int | None,
) -> dict[str, np.ndarray]:
    """A batch with labels, and with sources for an encoder-decoder. TypeError for source_length and another model."""
    if source_length is not None and not isinstance(model, EncoderDecoder):
        raise TypeError(f"memory: source_length is for an encoder-decoder, got a {type(model).__name__}")
    ids = np.zeros((batch, length), np.int64)
    if isinstance(model.head, Classifier):
        return {"ids": ids, "labels": np.zeros(batch, np.int64)}
    labels = np.zeros(batch * length, np.int64)
    count = max(1, round(labelled * len(labels)))
    labels[count:] = -100
    rows = {"ids": ids, "labels": labels.reshape(batch, length)}
    if isinstance(model, EncoderDecoder):
        rows["source_ids"] = np.zeros((batch, source_length or length), np.int64)
    return rows


def _report(
    model: Module, optimizer: Optimizer, ledger: sizes.Ledger, loss: _Counted, rows: dict[str, np.ndarray],
    weights: str | None,
) -> Memory:
    """The ledger of a run on batches such as `rows` in the parts of a Memory."""
    trained = edit.trained(model)
    parameters = model.parameters()
    held = sum(p.data.nbytes for p in parameters) + sum(b.nbytes for b in model.named_buffers().values())
    copies = sum(a.nbytes for attached in edit.attached(model) for a in attached.base_values.values())
    moved = sum(group.stored.nbytes for group in optimizer.groups)       # trained parameters: they lie in its arrays
    masters = sum(group.w.nbytes for group in optimizer.groups if group.rounded is not None)
    states = masters + sum(a.nbytes for group in optimizer.groups for a in group.moments)
    at_peak = ledger.at_peak
    activations = at_peak["forward"]
    gradients = at_peak["backward"] - moved - states
    other = ledger.peak - held - copies - states - activations - gradients
    names = [type(a.method).__name__ for a in edit.attached(model)] or ["everything trains"]
    packed = sum(int(np.prod(m.shape)) for m in model.modules() if isinstance(m, Packed))
    dtype = weights or str(parameters[0].dtype)
    batch, length = rows["ids"].shape
    source = rows["source_ids"].shape[1] if "source_ids" in rows else 0
    lengths = f"({source} + {length})" if source else str(length)
    return Memory(
        description=f"{type(model).__name__}, {', '.join(names)}; {batch} × {lengths} tokens, {dtype} weights, "
                    f"{type(optimizer).__name__}",
        parameters=sum(p.size for p in parameters) + packed,
        trained=sum(p.size for p in trained.values()),
        weights=held, copies=copies, optimizer=states, activations=activations, gradients=gradients, other=other,
        peak=ledger.peak, kept=loss.kept[0],
        all_gradients=sum(p.size * np.dtype(p.grad_dtype).itemsize for p in trained.values()),
        tokens=batch * (source + length),
        flops={name: ledger.flops[name] for name in ("forward", "backward")},
    )


def largest_batch(model: Any, budget: float, method: Method | None = None, **options: Any) -> int:
    """The largest batch whose training needs at most `budget` bytes; 0 if a batch of one row needs more.

    method, options: as in memory, except batch. The peak grows with the batch, so the search halves an interval. It
    ends at 2²⁴ tokens: a larger budget gives that batch."""
    if "batch" in options:
        raise TypeError("largest_batch searches the batch: call it without batch=")
    known = {*keyword_names(memory), "budget"} - {"batch"}
    refuse_keywords("largest_batch", options.keys() - known, known)
    checks.number("largest_batch: budget", budget, above=0)
    most = max(1, MOST_TOKENS // checks.whole("largest_batch: length", options.get("length", 128), least=1))

    def fits(n: int) -> bool:
        return memory(model, method, batch=n, **options).peak <= budget
    if not fits(1):
        return 0
    low = 1
    while low < most and fits(min(2 * low, most)):
        low = min(2 * low, most)
    high = min(2 * low, most + 1)                        # low fits; high does not, or is too many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ── models without numbers ───────────────────────────────────────────────────────────────────────────────────────────
class _NoNumbers(np.random.Generator):
    """A generator whose normal numbers are one zero, shown many times: they take no memory."""

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Any = None) -> np.ndarray:
        """Zeros of the shape `size`, float32."""
        return np.broadcast_to(np.float32(0), size)


class PackedSizes(Packed):
    """A packed weight (out, in) of so many bits a weight, without numbers."""

    def __init__(self, shape: tuple, bits: float):
        self.shape = shape
        self.rows_per_block = max(1, DENSE // shape[1])
        self.codes = sizes.new((int(np.ceil(shape[0] * shape[1] * bits / 8)),), np.uint8)
        self.unit = sizes.new((0,), np.float32)


class EvenSwitchMLP(SwitchMLP):
    """A Switch layer without numbers, whose experts share the tokens evenly. None is dropped."""

    def count(self, kept: Array) -> list[int]:
        """Equal shares of the N rows of kept (N, E)."""
        N, E = kept.shape
        return [(i + 1) * N // E - i * N // E for i in range(E)]


def build(model: Any, weights: str | None = None) -> Module:
    """A model without numbers, from a configuration or like a model, with its edits; inside `without_numbers`.

    weights: as in memory. TypeError for what is neither."""
    if weights is not None:
        checks.one_of("weights", weights, (*DTYPES, *PACKED_BITS))
    if isinstance(model, Module):
        sized = _copy_without_numbers(model)
    elif type(model) in MODELS:
        sized = MODELS[type(model)](model, _NoNumbers(np.random.PCG64(0)))
    else:
        known = ", ".join(config.__name__ for config in MODELS)
        raise TypeError(f"memory wants a model, or a configuration ({known}), got {checks.brief(model)}")
    for module in sized.modules():
        if isinstance(module, SwitchMLP):
            module.__class__ = EvenSwitchMLP
    if weights in DTYPES:
        sized.to(dtype=weights)
    elif weights is not None:
        for path in _inside_blocks(sized):
            linear = edit.base_modules(sized)[path]
            linear.weight = PackedSizes(tuple(linear.weight.shape), PACKED_BITS[weights])
    return sized


def _inside_blocks(model: Module) -> list[str]:
    """The paths of the linear maps with a dense weight in the blocks of a model."""
    blocks = [path for stack in model.stacks.values() for path in stack]
    found = []
    for path, module in edit.base_modules(model).items():
        if isinstance(module, Linear) and isinstance(module.weight, Tensor) and edit.inside(path, blocks):
            found.append(path)
    return found


def _copy_without_numbers(model: Module) -> Module:
    """A copy of a model with its edits, in which every array is replaced by one without numbers.

    The copy takes no memory: deepcopy finds each array's replacement in its memo."""
    arrays = [p.data for p in model.parameters()]
    arrays += [p.mask for p in model.parameters() if p.mask is not None]
    arrays += model.named_buffers().values()
    for attached in edit.attached(model):
        arrays += attached.base_values.values()
    memo: dict[int, Any] = {}
    for a in arrays:
        memo[id(a)] = sizes.xp.asarray(sizes.new(a.shape, a.dtype))
    for p in model.parameters():
        if p.grad is not None:
            memo[id(p.grad)] = None
    return copy.deepcopy(model, memo)
