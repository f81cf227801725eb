"""compress: put a packed weight in the place of every linear map's dense weight, layer by layer.

    ft.compress(model, ft.RTN(bits=4, group=64))                     a rule without data: each weight by itself
    ft.compress(model, ft.GPTQ(bits=4, group=64), batches)           a rule with data: in the order of the forward pass

With data, the blocks of the model are compressed from the bottom to the top, and the maps of a block in the order in
which they run. A map is calibrated with the inputs that the compressed maps before it give, so that it can make up for
their errors. Only one block's activations are held at a time.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import array, checks, edit
from ..keywords import checked_keywords
from ..nn import Context, Embedding, Linear, Module, Packed, Parameter, evaluation_mode
from ..tensor import Tensor
from .calibrate import Hessian, StopPass, read_passes, recording, run_pass, token_rows
from .rule import Rule

__all__ = ["LayerReport", "compress", "find_targets"]

Inputs = list[tuple[Tensor, Context]]                    # what a block gets, one pair for each calibration batch


@dataclass(frozen=True)
class LayerReport:
    """One compressed weight.

    path     of its module
    error    tr (W − Ŵ) H (W − Ŵ)ᵀ / tr W H Wᵀ, the relative squared error of the layer's outputs on the calibration
             data; without data ‖W − Ŵ‖² / ‖W‖²
    before, after   bytes of the dense and of the packed weight
    seconds  of the rule"""

    path: str
    error: float
    before: int
    after: int
    seconds: float


@checked_keywords
def compress(
    model: Module, rule: Rule, batches: Iterable | None = None, *, targets: Any = None,
    done: MutableMapping[str, Packed] | None = None, on_layer: Callable[[LayerReport], None] | None = None,
) -> list[LayerReport]:
    """Compress the weights of a model's linear maps in place, and report on each.

    rule      what to do with one weight: RTN(), GPTQ() ...
    batches   calibration data, for a rule that needs it: as for `fit`, without an end or with one; read once
    targets   glob(s) over module paths, matched at a path's end; None: every linear map inside the model's blocks.
              An embedding may be named too, for a rule without data
    done      {path: packed weight}, such as a folder that keeps them: a path that it has is not computed again, and
              every new weight is put into it
    on_layer  called with the report of each weight when it is in its place, before `done` gets it

    The model evaluates, without dropout. TypeError or ValueError, before anything is changed, for a model with
    attached methods, a weight that is packed already, a rule that needs data without batches, and batches without
    tokens."""
    edit.check_model("compress", model)
    checks.instance("compress: rule", rule, Rule, "a rule such as RTN(bits=4)")
    if done is not None:
        checks.instance("compress: done", done, MutableMapping, "a dict {path: packed weight}")
    if on_layer is not None:
        checks.function("compress: on_layer", on_layer, "a function of a LayerReport")
    if edit.attached(model):
        raise ValueError(f"compress wants a base without methods, got {edit.attached(model)[-1].name!r} attached: "
                         "merge or detach it first, and attach methods to the compressed model afterwards")
    found = find_targets(model, rule, targets)
    work = _Work(model, rule, found, {} if done is None else done, on_layer)
    if not rule.needs_hessian:
        for path in found:
            work.replace(path, None)
        return work.reports
    if batches is None:
        raise TypeError(f"compress wants calibration batches for {type(rule).__name__}, got none")
    passes = read_passes("compress", batches)
    with evaluation_mode(model):
        _compress_blocks(work, passes)
        _compress_rest(work, passes)
    return work.reports


def find_targets(model: Module, rule: Rule, targets: Any = None) -> dict[str, Module]:
    """{path: module} of the modules whose weights a rule is to compress, in the order of the model.

    ValueError for a module without a weight of two axes, for a weight that is packed already or holds inf or NaN, and
    for an embedding if the rule needs data: it multiplies no inputs."""
    if targets is None:
        blocks = [path for stack in edit.stacks(model).values() for path in stack]
        inside = {path: m for path, m in edit.base_modules(model).items() if edit.inside(path, blocks)}
        found = {path: m for path, m in inside.items() if isinstance(m, Linear)}
        if not found:
            raise ValueError(f"compress found no linear map inside the blocks of this {type(model).__name__}")
    else:
        found = edit.select(model, edit.check_targets("compress: targets", targets))
    for path, module in found.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Packed):
            raise ValueError(f"{path} is packed already: unpack the model first (tinyft.unpack)")
        if not isinstance(module, (Linear, Embedding)):
            raise ValueError(f"compress wants linear maps or embeddings, and {path} is a {type(module).__name__}")
        if rule.needs_hessian and isinstance(module, Embedding):
            raise ValueError(f"{type(rule).__name__} wants linear maps; {path} is an embedding, which has no inputs "
                             "to calibrate with: use a rule without data for it, such as RTN")
        if not np.isfinite(array.asnumpy(weight.data)).all():
            raise ValueError(f"{path} wants finite weights, got inf or NaN")
    return found


class _Work:
    """The state of one compression: the model, the rule, what is done and what remains."""

    def __init__(self, model: Module, rule: Rule, found: dict[str, Module], done: MutableMapping[str, Packed],
                 on_layer: Callable[[LayerReport], None] | None):
        self.model = model
        self.rule = rule
        self.remaining = dict(found)
        self.done = done
        self.on_layer = on_layer
        self.reports: list[LayerReport] = []

    def replace(self, path: str, H: np.ndarray | None) -> None:
        """Put the packed weight of one module in the place of its dense weight."""
        module = self.remaining.pop(path)
        weight = module.weight
        W = array.asnumpy(weight.data)
        is_new = path not in self.done
        start = time.perf_counter()
        if not is_new:
            packed = self.done[path]
        else:
            packed = self.rule(W, H) if self.rule.needs_hessian else self.rule(W)
        seconds = time.perf_counter() - start
        _follow(packed, weight)
        report = LayerReport(path, _relative_error(W, packed, H), W.nbytes, packed.nbytes, seconds)
        module.weight = packed
        self.reports.append(report)
        if self.on_layer is not None:
            self.on_layer(report)
        if is_new:
            self.done[path] = packed


def _follow(packed: Packed, weight: Parameter) -> None:
    """Give a packed weight the backend and the dtype of the dense weight in whose place it comes."""
    packed.to(array.name_of(weight.data), dtype=weight.dtype)


def _relative_error(W: np.ndarray, packed: Packed, H: np.ndarray | None) -> float:
    """The squared error of the compressed weight, divided by the squared size of the dense one; see LayerReport."""
    W = W.astype(np.float64)
    D = W - array.asnumpy(packed.dequantize()).astype(np.float64)
    if H is None:
        error, size = np.vdot(D, D), np.vdot(W, W)
    else:
        error, size = np.vdot(D @ H, D), np.vdot(W @ H, W)
    return float(error / size) if size else 0.0


# ── rules with data ──────────────────────────────────────────────────────────────────────────────────────────────────
def _compress_blocks(work: _Work, passes: list) -> None:
    """The maps inside the blocks, from the bottom to the top of each stack."""
    modules = edit.base_modules(work.model)
    for blocks in getattr(work.model, "stacks", {}).values():
        inputs: Inputs | None = None
        for block in blocks:
            targets = {path: m for path, m in work.remaining.items() if edit.inside(path, [block])}
            if not targets and not any(edit.inside(path, blocks) for path in work.remaining):
                break
            if inputs is None:
                inputs = _inputs_of(work.model, modules[block], passes)
            _compress_block(work, modules[block], targets, inputs)
            inputs = [(modules[block](x, ctx), ctx) for x, ctx in inputs]


def _inputs_of(model: Module, block: Module, passes: list) -> Inputs:
    """The inputs of a block, for every batch. The pass ends there."""
    found: Inputs = []

    def see(path: str, x: Tensor, ctx: Context) -> None:
        found.append((x, ctx))
        raise StopPass
    with recording({"block": block}, see):
        for targets in passes:
            run_pass(model, targets)
    return found


def _compress_block(work: _Work, block: Module, targets: dict[str, Module], inputs: Inputs) -> None:
    """The maps of one block, in the order in which they run. Maps that read the same input share a Hessian."""
    for group in _groups(block, targets, inputs):
        first = group[0]
        H = None
        if any(path not in work.done for path in group):
            H = _hessian_in_block(block, targets[first], inputs)
        for path in group:
            work.replace(path, H)


def _groups(block: Module, targets: dict[str, Module], inputs: Inputs) -> list[list[str]]:
    """The paths of the maps in the order of their first calls; maps that read the same Tensor form one group."""
    groups: dict[int, list[str]] = {}
    held = []                                            # keeps every input alive, so that its id stays its own
    called = set()

    def see(path: str, x: Tensor, ctx: Context) -> None:
        if path not in called:
            called.add(path)
            held.append(x)
            groups.setdefault(id(x), []).append(path)
    with recording(targets, see):
        x, ctx = inputs[0]
        block(x, ctx)
    return list(groups.values())


def _hessian_in_block(block: Module, module: Module, inputs: Inputs) -> np.ndarray:
    """The Hessian of one map of a block from the block's inputs. Each pass ends at the map."""
    hessian = Hessian(module.in_features)

    def see(path: str, x: Tensor, ctx: Context) -> None:
        hessian.add(token_rows(x, ctx))
        raise StopPass
    with recording({"": module}, see):
        for x, ctx in inputs:
            try:
                block(x, ctx)
            except StopPass:
                pass
    return _counted(hessian)


def _compress_rest(work: _Work, passes: list) -> None:
    """The maps outside of the blocks, such as a pooler: all in one pass, after the blocks."""
    rest = dict(work.remaining)
    if not rest:
        return
    hessians = {path: Hessian(module.in_features) for path, module in rest.items()}

    def see(path: str, x: Tensor, ctx: Context) -> None:
        hessians[path].add(token_rows(x, ctx))
    with recording(rest, see):
        for targets in passes:
            run_pass(work.model, targets)
    for path in rest:
        work.replace(path, _counted(hessians[path]))


def _counted(hessian: Hessian) -> np.ndarray:
    """The Hessian's matrix. ValueError if no token was counted."""
    if not hessian.n:
        raise ValueError("compress wants calibration batches with tokens, got only padding")
    return hessian.matrix
