"""LoRA: Low-Rank Adaptation of Large Language Models.  Hu et al., ICLR 2022.  arXiv:2106.09685

    y = x W₀ᵀ + b + (α/r) (x Aᵀ) Bᵀ                                                §4.1, eq. 3
    W₀ (out, in) frozen,  A (r, in) ~ U(±1/√in),  B (out, r) = 0
    merged:  W = W₀ + (α/r) B A

LoRA changes the output of a linear map: this costs two thin products, and the (out, in) gradient of
W is never built. An embedding has token ids as input, so there LoRA changes the weight itself. A
tied head reads the same weight, and so gets the change too.

Departures: the paper draws A from a Gaussian; its code, PEFT and we draw it uniformly from ±1/√in.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import array, ops
from ...array import Array
from ...checks import number, whole
from ...edit import Edit, Method, base_modules, check_targets, select
from ...nn import Context, Dropout, Embedding, Module, Packed, Parameter
from ...tensor import Tensor


@dataclass(frozen=True)
class LoRA(Method):
    """r: rank;  alpha: the update is scaled by alpha/r;  dropout: on the branch's input;
    targets: the linear maps (or the embedding) to adapt."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Any = "attn.[qv]"

    def __post_init__(self) -> None:
        super().__post_init__()
        if whole("LoRA: r", self.r) < 1:
            raise ValueError(f"LoRA wants a rank r >= 1, got {self.r}")
        number("LoRA: alpha", self.alpha)
        number("LoRA: dropout", self.dropout, low=0, below=1)
        check_targets("LoRA: targets", self.targets)

    def find(self, model: Module) -> dict[str, Module]:
        """The linear maps and embeddings that `targets` names. LookupError, with those that there
        are, for a pattern that names nothing."""
        matrices = [path for path, m in base_modules(model).items() if has_matrix(m)]
        return select(model, self.targets, candidates=matrices)

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        """The edit of one linear map or embedding. TypeError for a module without a matrix."""
        if not has_matrix(module):
            maps = [name for name, part in base_modules(module).items() if has_matrix(part)]
            hint = f": name its maps {', '.join(maps[:4])}" if maps else ""
            raise TypeError(f"LoRA adapts a weight matrix; "
                            f"{path} is a {type(module).__name__} and has none{hint}")
        out_features, in_features = module.weight.shape      # of an embedding: (vocabulary, width)
        s = self.alpha / self.r                      # the update of the weight is s B A
        # A linear map gets it on its output. An embedding reads ids: there the weight is changed.
        edit_class = LowRankWeight if isinstance(module, Embedding) else LowRank
        return edit_class(in_features, out_features, self.r, s, self.dropout, rng)


def has_matrix(module: Module) -> bool:
    """True for a module with a weight of two axes, dense or packed. A tied head has none."""
    return len(getattr(vars(module).get("weight"), "shape", ())) == 2


class LowRank(Edit):
    """s (x Aᵀ) Bᵀ, added to the module's output."""

    def __init__(self, in_features: int, out_features: int, r: int, s: float, dropout: float,
                 rng: np.random.Generator):
        """A (r, in) ~ U(±1/√in) and B (out, r) = 0, so the first output is the base's. s = α/r."""
        bound = in_features**-0.5
        A = rng.uniform(-bound, bound, (r, in_features)).astype(np.float32)
        self.A = Parameter(array.asarray(A))
        self.B = Parameter(array.asarray(np.zeros((out_features, r), np.float32)))
        self.s = s
        self.drop = Dropout(dropout)

    def delta(self) -> Array:
        """ΔW = s B A"""
        return self.s * (self.B.data @ self.A.data)

    def branch(self, x: Tensor) -> Tensor:
        """s (x Aᵀ) Bᵀ. The factor s acts on the r-wide array, the smallest one."""
        return ops.linear(ops.linear(x, self.A) * self.s, self.B)

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.branch(self.drop(x, ctx))

    def fold(self, p: dict[str, Array]) -> dict[str, Array]:
        return {**p, "weight": p["weight"] + self.delta()}


class LowRankWeight(LowRank):
    """W + s B A in place of an embedding's weight, for all modules that read it.

    There is no dropout: the branch has no input of its own."""

    takes_packed = True
    # The output is not changed a second time: `tensor` alone applies the update.
    after = Edit.after
    fold = Edit.fold

    def tensor(self, name: str, p: Any) -> Any:
        if name != "weight":
            return p
        if isinstance(p, Packed):
            return PackedPlusLowRank(p, self)
        return p + (self.B @ self.A) * self.s


class PackedPlusLowRank(Packed):
    """W + s B A with a packed W. The dense array is never built."""

    def __init__(self, packed: Packed, update: LowRank):
        self.shape = packed.shape
        self._packed = packed
        self._update = update

    def matmul(self, x: Tensor) -> Tensor:
        """x (W + s B A)ᵀ:  (..., in) -> (..., out)"""
        return self._packed.matmul(x) + self._update.branch(x)

    def rows(self, ids: Array) -> Tensor:
        """(W + s B A)[ids]:  (...) -> (..., in)"""
        B = ops.embedding(self._update.B, ids)                                   # (..., r)
        return self._packed.rows(ids) + (B @ self._update.A) * self._update.s

    def dequantize(self) -> Array:
        return self._packed.dequantize() + self._update.delta()
