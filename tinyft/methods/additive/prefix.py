"""Prefix-Tuning: Optimizing Continuous Prompts for Generation.  Li & Liang, ACL 2021.
arXiv:2101.00190

    K ← [P_K; K],  V ← [P_V; V]  in every layer      P_K, P_V (H, p, D) per layer           §4.2
    with `mlp`, while training:                                                             §4.3
    [P_K P_V]_ℓ = W₂ℓ tanh(W₁ E + b₁) + b₂ℓ          E (p, C),  W₁ (k, C),  W₂ℓ (2 H D, k)

A prefix is a cache of keys and values without tokens. It changes the output even if it is all zero:
zero keys still take attention weight from the text. H is the number of key/value heads, which may
be smaller than that of the query heads. In an encoder-decoder, cross-attention gets a prefix too.

Departures: without the MLP the prefix starts at N(0, std²) (PEFT: N(0, 1)); in the paper it starts
at activations of real words. `shift` puts the text at positions p, p + 1, ..., as implementations
with past_key_values do; the paper's mathematics has no positions.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import array, ops
from ...array import Array, xp
from ...checks import flag, number, whole
from ...edit import Edit, Method, check_targets, select, token_embedding
from ...nn import Context, Embedding, Linear, Module, Parameter
from ...tensor import Tensor, no_grad


@dataclass(frozen=True)
class PrefixTuning(Method):
    """p: prefix length;  mlp: width k of the reparameterisation, None for none;  std: of the
    initial prefix;  shift: the text starts at position p;  targets: the key/value parts."""

    p: int = 10
    mlp: int | None = None
    std: float = 0.02
    shift: bool = False
    targets: Any = "kv"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("PrefixTuning: p", self.p, least=0)
        if self.mlp is not None:
            whole("PrefixTuning: mlp", self.mlp, least=1)
        number("PrefixTuning: std", self.std, low=0)
        flag("PrefixTuning: shift", self.shift)
        check_targets("PrefixTuning: targets", self.targets)

    def find(self, model: Module) -> dict[str, Module]:
        found = select(model, self.targets)
        return {**token_embedding(model), **found} if self.shift else found

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        """{path: edit} for the modules that `find` gave: a prefix for every `kv` of an attention.

        With `mlp`, all prefixes are computed from one shared part. If `shift` is True, found holds
        the token embedding too; its edit moves the positions of the text."""
        shared = None                                    # the part of the MLP that all layers share
        edits: dict[str, Edit] = {}
        for path, module in found.items():
            if isinstance(module, Embedding):
                edits[path] = Shift(self.p)
                continue
            heads, head_width = key_value_heads(path, module)
            if self.mlp is None:
                K = array.normal(rng, (heads, self.p, head_width), self.std)
                V = array.normal(rng, (heads, self.p, head_width), self.std)
                edits[path] = Prefix(K, V)
            else:
                if shared is None:
                    shared = Hidden(self.p, heads * head_width, self.mlp, rng)
                edits[path] = Reparameterized(heads, head_width, shared, rng)
        return edits

    def eject(self, edits: dict[str, Edit]) -> tuple[Method, dict[str, Edit]]:
        """The prefixes as plain tensors, without their MLP. Outputs stay bitwise the same."""
        ejected = {path: e.ejected() if isinstance(e, Prefix) else e for path, e in edits.items()}
        return replace(self, mlp=None), ejected


def key_value_heads(path: str, module: Module) -> tuple[int, int]:
    """(heads, head width) of the `kv` of an attention. TypeError for another module."""
    sizes = vars(module)
    is_kv = isinstance(sizes.get("heads"), int) and isinstance(sizes.get("cached"), bool)
    if not is_kv:
        raise TypeError(f"PrefixTuning wants the key/value part of an attention, such as attn.kv; "
                        f"{path} is a {type(module).__name__}")
    return sizes["heads"], sizes["head_width"]


class Prefix(Edit):
    """P_K and P_V in front of the keys and values.

    Cached keys and values are joined before this edit runs, so the cache never holds a prefix."""

    keeps_shape = False

    def __init__(self, K: Array, V: Array):
        self.K = Parameter(K, decay=False)               # (H, p, D)
        self.V = Parameter(V, decay=False)

    def prefix(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """P_K, P_V (H, p, D)"""
        return self.K, self.V

    def after(self, x: tuple, y: tuple, ctx: Context) -> tuple:
        """(k, v, key_mask) with the prefix in front, the same one for every row of the batch.

        y: k and v (B, H, Tk, D), key_mask (B, Tk) or None. x, the module's input, is not used."""
        k, v, key_mask = y
        P_K, P_V = self.prefix(ctx)
        B = k.shape[0]
        H, p, D = P_K.shape
        k = ops.concatenate(ops.broadcast_to(P_K, (B, H, p, D)), k, axis=2)      # (B, H, p + Tk, D)
        v = ops.concatenate(ops.broadcast_to(P_V, (B, H, p, D)), v, axis=2)
        if key_mask is not None:
            prefix_mask = xp(key_mask).ones((B, p), dtype=bool)
            key_mask = xp(key_mask).concatenate([prefix_mask, key_mask], axis=1)  # (B, p + Tk)
        return k, v, key_mask

    def ejected(self) -> Prefix:
        """This prefix as plain tensors."""
        return self


class Hidden(Edit):
    """tanh(W₁ E + b₁) (p, k): the part of the reparameterisation that all layers share."""

    def __init__(self, p: int, width: int, k: int, rng: np.random.Generator):
        self.E = Embedding(p, width, rng=rng, std=1.0)
        self.W1 = Linear(width, k, rng=rng, std=width**-0.5)

    def forward(self, _: Any, ctx: Context) -> Tensor:
        return ops.tanh(self.W1(self.E.weight, ctx))


class Reparameterized(Prefix):
    """P_K and P_V of one layer, computed from the shared hidden rows."""

    def __init__(self, heads: int, head_width: int, shared: Hidden, rng: np.random.Generator):
        k = shared.W1.out_features
        self.hidden = shared
        self.W2 = Linear(k, 2 * heads * head_width, rng=rng, std=k**-0.5)
        self._heads = heads
        self._head_width = head_width

    def prefix(self, ctx: Context) -> tuple[Tensor, Tensor]:
        rows = self.W2(self.hidden(None, ctx), ctx)                              # (p, 2 H D)
        width = self._heads * self._head_width
        return self.split(rows[:, :width]), self.split(rows[:, width:])

    def split(self, rows: Tensor) -> Tensor:
        """(p, H D) -> (H, p, D)"""
        return rows.reshape(-1, self._heads, self._head_width).permute(1, 0, 2)

    def ejected(self) -> Prefix:
        with no_grad():
            K, V = self.prefix(Context())
        return Prefix(K.data.copy(), V.data.copy())


class Shift(Edit):
    """The text starts at position p.

    An edit of the token embedding: it runs before the model reads its positions."""

    def __init__(self, p: int):
        self._p = p

    def before(self, ids: Any, ctx: Context) -> Any:
        ctx.position_shift += self._p
        return ids
