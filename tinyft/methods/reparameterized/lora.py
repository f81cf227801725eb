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
        # A linear map gets it on its output. An embedding reads ids: there the weight is changed.
        edit_class = LowRankWeight if isinstance(module, Embedding) else LowRank
        return edit_class(in_features, out_features, self.r, self.alpha, self.dropout, rng)


def has_matrix(module: Module) -> bool:
    """True for a module with a weight of two axes, dense or packed. A tied head has none."""
    return len(getattr(vars(module).get("weight"), "shape", ())) == 2


def initial_factors(in_features: int, out_features: int, r: int,
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(A, B), both float32: rng draws A (r, in) uniformly from ±1/√in, and B (out, r) is zero.

    The product B A is zero, so the model starts unchanged. A is not zero, so B gets a gradient."""
    bound = in_features**-0.5
    A = rng.uniform(-bound, bound, (r, in_features)).astype(np.float32)
    return A, np.zeros((out_features, r), np.float32)         # host


def low_rank_branch(x: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """(α/r) (x Aᵀ) Bᵀ, for x (..., in), A (r, in) and B (out, r); the result is (..., out).

    The gradients reach x, A and B. The (out, in) product B A is never built."""
    s = alpha / A.shape[0]
    return ops.linear(ops.linear(x, A) * s, B)           # s acts on the r-wide array, the smallest


def low_rank_factors(M: Array, r: int) -> tuple[Array, Array]:
    """(A, B), with A (r, in) and B (out, r), so that B A is as near to M (out, in) as possible.

    Near means: the sum of the squared differences is the smallest that rank r allows.
    ValueError unless 1 <= r <= min(out, in).  Eckart & Young, Psychometrika 1936."""
    if not 1 <= r <= min(M.shape):
        raise ValueError(f"low_rank_factors wants 1 <= r <= {min(M.shape)}, got {r}")
    U, sizes, V = array.xp(M).linalg.svd(M, full_matrices=False)       # M = U diag(sizes) V
    return V[:r], U[:, :r] * sizes[:r]                   # the largest singular values come first


def merged_weight(packed: Packed, A: Array, B: Array, alpha: float) -> Array:
    """Ŵ + (α/r) B A, (out, in): the dense weight that computes what `packed` and its branch do.

    A (r, in), B (out, r). Ŵ: the values of `packed`, beside which the branch was trained. The dense
    weight from before the compression is another one."""
    s = alpha / A.shape[0]
    return packed.dequantize() + s * (B @ A)


class LowRank(Edit):
    """(α/r) (x Aᵀ) Bᵀ, added to the module's output."""

    def __init__(self, in_features: int, out_features: int, r: int, alpha: float, dropout: float,
                 rng: np.random.Generator):
        A, B = initial_factors(in_features, out_features, r, rng)
        self.A = Parameter(array.asarray(A))
        self.B = Parameter(array.asarray(B))
        self.alpha = alpha
        self.drop = Dropout(dropout)

    @property
    def s(self) -> float:
        """The scale α/r."""
        return self.alpha / self.B.shape[1]

    def delta(self) -> Array:
        """ΔW = (α/r) B A, (out, in)"""
        return self.s * (self.B.data @ self.A.data)

    def branch(self, x: Tensor) -> Tensor:
        """(α/r) (x Aᵀ) Bᵀ"""
        return low_rank_branch(x, self.A, self.B, self.alpha)

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        """y + branch(drop(x)): the base's output y (..., out) plus the branch of x (..., in).

        Dropout acts on the input of the branch only, and only in training: `drop` decides."""
        return y + self.branch(self.drop(x, ctx))

    def fold(self, p: dict[str, Array]) -> dict[str, Array]:
        """The arrays of a layer that gives the same outputs without this edit: ΔW joins the weight.

        p: {"weight": W (out, in), "bias": b (out,)}, or without "bias". The result is a new dict
        with the same names. p is not changed, and everything but the weight stays as it is."""
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
        u = self._update
        return merged_weight(self._packed, u.A.data, u.B.data, u.alpha)
