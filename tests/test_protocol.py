"""Small methods that use every part of the protocol, and the promises of the mechanism itself.

The methods: a prefix with a cache, LoRA on a tied embedding and on packed weights, a KL penalty to the base, a ladder
beside the backbone, a rank drawn at every step, a budget over all modules, phases with a rewind. The full methods come
later; here the library's side is tested.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from contract import (
    CHECKS,
    KINDS,
    Row,
    Sizes,
    all_same,
    batch,
    build,
    near,
    noise,
    put_on,
    run,
    same,
    short_fit,
    the_loss,
    tokens,
    tuned,
    values,
)
from helpers import dev, host, wrong_answers

from tinyft import CannotMerge, array, combine, edit, evaluate, fit, no_grad, ops
from tinyft.edit import (
    Attached,
    Edit,
    Method,
    Phase,
    attach,
    count,
    detach,
    merge,
    select,
    state_dict,
    trained,
    without,
)
from tinyft.functional import kl_divergence
from tinyft.methods import BitFit, Full, Houlsby, LoRA, Partial, PrefixTuning, PromptTuning
from tinyft.methods.reparameterized.lora import LowRank
from tinyft.models.attention import Attention
from tinyft.models.blocks import MLP, PreNormBlock
from tinyft.nn import Cache, Context, LayerNorm, Linear, Module, Packed, Parameter
from tinyft.optim import AdamW
from tinyft.tensor import Record, Tensor, topological

GPTS = ("gpt", "gpt-classes")
BOTH = pytest.mark.parametrize("kind", ["gpt", "bert"])


def plain(method: Method, *, merges: bool = False) -> Row:
    """A row for checks that need neither the start nor the count."""
    return Row(method, "other", merges=merges, count=lambda s: 0)


# ═════════════════════════════ methods that bend the protocol ═════════════════════════════
@dataclass(frozen=True)
class Ladder(Method):
    """z_i = μ_i h_{i−1} + (1 − μ_i) D_i h^b_i,   h_i = Side_i(z_i),   the head gets U norm(h_L);   μ = σ(α / T)

    The side's hidden state passes from block to block in the Context (ctx.scratch), not in the edits."""
    c: int = 6
    T: float = 0.1
    targets: Any = ("blocks.*", "norm")

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        edits: dict[str, Edit] = {}
        for path, m in found.items():
            if path != "norm":
                edits[path] = Rung(m.out_features, self.c, self.T, first=path == "blocks.0", rng=rng)
        edits["norm"] = Top(self.c, found["norm"].out_features, rng)
        return edits


class Rung(Edit):
    """One block of the side network, beside one block of the backbone."""

    def __init__(self, C: int, c: int, T: float, *, first: bool, rng: np.random.Generator):
        self.D = Linear(C, c, rng=rng, std=0.3)
        self.D0 = Linear(C, c, rng=rng, std=0.3) if first else None
        self._T = T
        attn = Attention(c, 2, rng=rng, causal=True, out_std=0.3)
        mlp = MLP(c, 10, activation=ops.gelu_tanh, rng=rng, out_std=0.3)
        self.side = PreNormBlock(attn, mlp, eps=1e-5)
        self.alpha = Parameter(dev(np.zeros(1, np.float32)), decay=False)

    def before(self, x: Tensor, ctx: Context) -> Tensor:
        if self.D0 is not None:
            ctx.scratch["ladder"] = self.D0(x.detach(), ctx)
        return x

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        mu = ops.sigmoid(self.alpha * (1 / self._T))
        z = mu * ctx.scratch["ladder"] + (1 - mu) * self.D(y.detach(), ctx)
        ctx.scratch["ladder"] = self.side(z, ctx)        # its attention reads masks and cache from ctx too
        return y


class Top(Edit):
    def __init__(self, c: int, C: int, rng: np.random.Generator):
        self.norm, self.U = LayerNorm(c), Linear(c, C, rng=rng, std=0.3)

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return self.U(self.norm(ctx.scratch["ladder"], ctx), ctx)


@dataclass(frozen=True)
class DyLoRA(Method):
    """y + (α/b) (x A[:b]ᵀ) B[:, :b]ᵀ.

    A step draws one b for the whole model; only row b of A and column b of B move (the paper's FROZEN)."""

    r: int = 4
    alpha: float = 4.0
    targets: Any = "attn.[qv]"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        return Nested(m.in_features, m.out_features, self.r, self.alpha, 0.0, rng)

    def begin(self, edits: dict[str, Edit], t: int, T: int, rng: np.random.Generator) -> None:
        b = int(rng.integers(1, self.r + 1))
        for e in edits.values():
            e.b[...] = b
            at = dev(np.arange(self.r) == b - 1)
            e.A.mask, e.B.mask = at[:, None], at


class Nested(LowRank):
    def __init__(self, in_features: int, out_features: int, r: int, alpha: float, dropout: float,
                 rng: np.random.Generator):
        super().__init__(in_features, out_features, r, alpha, dropout, rng)
        self.b = dev(np.array(r))

    def cut(self) -> tuple[Tensor, Tensor, float]:
        b = int(host(self.b))
        return self.A[:b], self.B[:, :b], self.alpha / b

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        A, B, s = self.cut()
        return y + ops.linear(ops.linear(x, A), B) * s

    def fold(self, p: dict) -> dict:
        A, B, s = self.cut()
        return {**p, "weight": p["weight"] + s * (B.data @ A.data)}


@dataclass(frozen=True)
class Budget(Method):
    """y + ((x Qᵀ) ⊙ λ) Pᵀ.

    After every step, the b(t) triplets of all modules with the largest |λ ∂L/∂λ| are kept (AdaLoRA's idea)."""

    r: int = 3
    last: int = 5
    gamma: float = 0.1
    targets: Any = "attn.[qv]"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        return Triplets(m.in_features, m.out_features, self.r, rng)

    def penalty(self, edits: dict[str, Edit], model: Module, ctx: Context) -> Any:
        """γ Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖²"""
        eye = dev(np.eye(self.r)).astype(next(iter(edits.values())).P.dtype)
        off = [M @ M.T - eye for e in edits.values() for M in (e.P.T, e.Q)]
        return sum(((d * d).sum() for d in off), Tensor(0.0)) * self.gamma

    def size(self, n: int, t: int, T: int) -> int:
        return self.last if t + 1 >= T else n - (n - self.last) * (t + 1) // T

    def step(self, edits: dict[str, Edit], t: int, T: int) -> None:
        for e in edits.values():
            e.I[...] = 0.8 * e.I + 0.2 * abs(e.lam.data * e.lam.grad)
        scores = np.concatenate([host(e.I) for e in edits.values()])
        keep = largest([scores], self.size(scores.size, t, T))[0].reshape(len(edits), -1)
        for e, k in zip(edits.values(), keep):
            e.keep[...] = dev(k)
            e.lam.copy_(e.lam.data * e.keep)


class Triplets(Edit):
    def __init__(self, in_features: int, out_features: int, r: int, rng: np.random.Generator):
        self.P = Parameter(array.normal(rng, (out_features, r), 0.3))
        self.Q = Parameter(array.normal(rng, (r, in_features), 0.3))
        self.lam = Parameter(dev(np.zeros(r, np.float32)))
        self.I = dev(np.zeros(r, np.float32))            # the importance of each triplet, smoothed
        self.keep = dev(np.ones(r, bool))

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + ops.linear(ops.linear(x, self.Q) * self.lam, self.P)

    def fold(self, p: dict) -> dict:
        return {**p, "weight": p["weight"] + (self.P.data * self.lam.data) @ self.Q.data}


def largest(scores: list[np.ndarray], K: int) -> list[np.ndarray]:
    """Exactly K Trues over several arrays together; ties by position."""
    flat = np.concatenate([s.ravel() for s in scores])
    keep = np.zeros(flat.size, bool)
    keep[np.argsort(-flat, kind="stable")[:K]] = True
    ends = np.cumsum([s.size for s in scores])
    return [k.reshape(s.shape) for k, s in zip(np.split(keep, ends[:-1]), scores)]


@dataclass(frozen=True)
class Ticket(Method):
    """θ = θ₀ + μ ⊙ δ  (LT-SFT's idea).

    A dense phase; then μ marks the K largest |δ| of the whole model and δ goes back to 0; then a sparse phase. The base
    is never written, so nothing leaks through momentum or decay."""

    K: int = 40
    targets: Any = "**"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit | None:
        return Delta(m) if m.own() and not isinstance(m, LayerNorm) and not path.startswith("head") else None

    def phases(self) -> list[Phase]:
        return [Phase(0.5), Phase(0.5, self.rewind)]

    def rewind(self, model: Any, edits: dict[str, Edit], batches: Any, rng: np.random.Generator) -> None:
        ds = [(e, n) for e in edits.values() for n in e.d]
        for (e, n), k in zip(ds, largest([np.abs(host(e.d[n])) for e, n in ds], self.K)):
            e.keep[n][...] = dev(k)
            e.d[n].copy_(0 * host(e.d[n]))
            e.d[n].mask = e.keep[n]


class Delta(Edit):
    def __init__(self, m: Module):
        self.d = {n: Parameter(0 * p.data) for n, p in m.own().items()}
        self.keep = {n: dev(np.ones(p.shape, bool)) for n, p in m.own().items()}

    def tensor(self, name: str, p: Any) -> Any:
        return p + self.d[name] * self.keep[name]


@dataclass(frozen=True)
class KL(Method):
    """β KL(p₀ ‖ p) to the model without what trains.  No edits of its own, no second copy."""
    beta: float = 1.0

    def penalty(self, edits: dict[str, Edit], model: Module, ctx: Context) -> Any:
        with no_grad(), without(model):
            old = ctx.again()
            model(old.ids, old)
        return kl_divergence(old.output, ctx.output) * self.beta


class Int8(Packed):
    """A row is codes times its largest absolute value / 127."""

    def __init__(self, W: array.Array):
        self.scale = abs(W).max(axis=1, keepdims=True) / 127
        self.codes, self.shape = ops.xp(W).rint(W / self.scale).astype(np.int8), W.shape

    def dequantize(self) -> array.Array:
        return self.codes * self.scale


class Int4(Packed):
    """Two codes in a byte, a scale and a zero for each group of 4 in a row."""

    def __init__(self, W: array.Array, group: int = 4):
        g = W.reshape(W.shape[0], -1, group)
        self.zero, self.shape = g.min(axis=-1, keepdims=True), W.shape
        self.scale = (g.max(axis=-1, keepdims=True) - self.zero) / 15
        codes = ops.xp(W).rint((g - self.zero) / self.scale).astype(np.uint8).reshape(W.shape[0], -1)
        self.bytes = codes[:, ::2] * 16 + codes[:, 1::2]

    def dequantize(self) -> array.Array:
        codes = ops.xp(self.bytes).stack([self.bytes // 16, self.bytes % 16], axis=-1)
        return (codes.reshape(self.scale.shape[0], -1, 4) * self.scale + self.zero).reshape(self.shape)


def pack(model: Any, kind: Any = Int8, targets: Any = ("attn.[qkvo]", "mlp.up", "mlp.down")) -> Any:
    """Packed weights in the place of dense ones, which are gone."""
    for m in select(model, targets).values():
        m.weight = kind(m.weight.data)
    return model


# ═════════════════════════════ they keep the contract ═════════════════════════════
def count_ladder(s: Sizes) -> int:
    """The maps D, one side block and one gate per block, and the top's norm and map."""
    side_block = 4 * (36 + 6) + 2 * 6 * 10 + 10 + 6 + 4 * 6
    maps = (s.L + 1) * (6 * s.C + 6)
    top = 12 + 6 * s.C + s.C
    return maps + s.L * (side_block + 1) + top


def count_ticket(s: Sizes) -> int:
    """Every tensor outside the norms and the head."""
    return s.total - (s.L * 4 + 2) * s.C - s.own_head


ROWS = {
    "ladder": Row(Ladder(), "other", merges=False, count=count_ladder, on=GPTS),
    "dylora": Row(DyLoRA(), "same", merges=True, count=lambda s: s.L * 2 * 4 * 2 * s.C),
    "budget": Row(Budget(), "same", merges=True, count=lambda s: s.L * 2 * 3 * (2 * s.C + 1), still=("lam",)),
    "ticket": Row(Ticket(K=500), "same", merges=True, count=count_ticket, on=KINDS[:3], still=("bias", "weight"),
                  lr=0.05),
}
CASES = []
for name, row in ROWS.items():
    for kind in row.on:
        CASES += [pytest.param(check, row, kind, id=f"{check}-{name}-{kind}") for check in CHECKS]


@pytest.mark.parametrize("check, row, kind", CASES)
def test_a_method_that_bends_the_protocol_keeps_the_contract(check, row, kind):
    CHECKS[check](row, kind)


# ═════════════════════════════ ladder: nothing comes back through the backbone ═════════════════════════════
def kept_by(y: Tensor) -> dict[int, Any]:
    """{id: array} of the arrays that the pullbacks behind y keep alive; a view counts as its base."""
    found, seen = {}, set()
    todo: list = [back for n in topological(y) if isinstance(n, Record) for _, back in n.pulls]
    while todo:
        v = todo.pop()
        if array.is_array(v):
            v = v if getattr(v, "base", None) is None else v.base
            found[id(v)] = v
        elif isinstance(v, (list, tuple)):
            todo.extend(v)
        elif callable(v) and id(v) not in seen:
            seen.add(id(v))
            todo.extend(c.cell_contents for c in getattr(v, "__closure__", None) or ())
    return found


def check_no_way_back(method: Method) -> None:
    model = build("gpt")
    attach(model, method)
    y = model(tokens())
    base = {id(p): n for n, p in edit.base_parameters(model).items()}
    records = [n for n in topological(y) if isinstance(n, Record)]
    reached = {id(p) for record in records for parents, _ in record.pulls for p in parents}
    entered = [name for i, name in base.items() if i in reached]
    assert not entered, f"gradient enters {entered}"
    alive = kept_by(y)
    shapes = [a.shape for a in alive.values()]
    assert (4, 7, Sizes.F) not in shapes                 # rows of the backbone's MLP
    assert shapes.count((4, 7, Sizes.C)) <= Sizes.L + 1  # h_0 .. h_L, the inputs of the maps D
    weights = {id(p.data): n for n, p in edit.base_parameters(model).items()}
    assert {weights[i] for i in alive if i in weights} <= {"embed.weight"}       # the frozen head passes gradients down


def test_a_ladder_sends_no_gradient_into_the_backbone_and_keeps_only_what_its_own_maps_need():
    check_no_way_back(Ladder())


def test_a_ladders_gates_choose_between_the_side_and_the_backbone():
    model = build("gpt")
    a = attach(model, Ladder())
    noise(model)
    rungs = [e for e in a.edits.values() if isinstance(e, Rung)]
    for e in rungs:
        e.alpha.copy_(np.full(1, 1e3))                                           # μ = 1: the side sees h_0 alone
    y = run(model)
    spoil = [p for n, p in edit.base_parameters(model).items() if n.startswith("blocks.")]
    kept = [host(p).copy() for p in spoil]
    for p in spoil:
        p.copy_(host(p) * 1.5 + 0.1)
    assert same(run(model), y)
    for e in rungs:
        e.alpha.copy_(np.full(1, -1e3))                  # μ = 0: the last rung sees D h^b_L alone
    assert not near(run(model), y, 1e-3)
    for p, was in zip(spoil, kept):
        p.copy_(was)
    y = run(model)
    rungs[0].D0.weight.copy_(host(rungs[0].D0.weight) + 1)
    rungs[0].side.mlp.up.weight.copy_(host(rungs[0].side.mlp.up.weight) + 1)
    assert same(run(model), y)


# ═════════════════════════════ DyLoRA: one row a step ═════════════════════════════
def fit_and_inspect(model: Any, kind: str, steps: int, inspect: Callable[[], Any]) -> None:
    """Train, and call inspect() after every step."""
    def evaluate_step() -> dict:
        inspect()
        return {"loss": 0.0}

    batches = [batch(kind, 0), batch(kind, 1)]
    optimizer = AdamW(0.02, weight_decay=0.1)
    fit(model, batches, steps, optimizer, evaluate=evaluate_step, evaluate_every=1, progress=False)


def check_one_row_a_step(method: Method) -> None:
    """Only row b of A and column b of B move in a step, under weight decay and whatever momentum is left."""
    model = build("gpt")
    a = attach(model, method)
    noise(model)
    last, drawn = {p: (host(e.A).copy(), host(e.B).copy()) for p, e in a.edits.items()}, []

    def look() -> None:
        bs = {int(host(e.b)) for e in a.edits.values()}
        assert len(bs) == 1, "every module draws its own rank"
        drawn.append(bs.pop())
        for p, e in a.edits.items():
            A, B = host(e.A).copy(), host(e.B).copy()
            moved = set(np.flatnonzero((A != last[p][0]).any(1))), set(np.flatnonzero((B != last[p][1]).any(0)))
            assert moved == ({drawn[-1] - 1},) * 2, f"b = {drawn[-1]}, moved {moved}"
            last[p] = A, B
    fit_and_inspect(model, "gpt", 12, look)
    assert set(drawn) == {1, 2, 3, 4}


def test_dylora_moves_one_row_a_step():
    check_one_row_a_step(DyLoRA())


def test_dylora_cut_to_b_is_lora_of_rank_b_and_knows_nothing_of_the_rest():
    model = build("gpt")
    a = attach(model, DyLoRA())
    noise(model)
    model.to(dtype=np.float64)
    for b in (1, 2, 3, 4):
        plain = build("gpt")
        c = attach(plain, LoRA(r=b, alpha=4))
        plain.to(dtype=np.float64)
        for p, e in a.edits.items():
            e.b[...] = b
            c.edits[p].A.copy_(host(e.A)[:b])
            c.edits[p].B.copy_(host(e.B)[:, :b])
        y = run(model)
        assert near(y, run(plain))
        for e in a.edits.values():
            e.A.copy_(host(e.A) + np.arange(4)[:, None] // b)                    # disturb what is cut off
        assert same(run(model), y)
        merge(plain)
        assert near(run(plain), y)


def test_a_mask_is_broadcast_and_counted_as_what_it_lets_move():
    model = build("gpt")
    a = attach(model, DyLoRA())
    whole = count(model).trained
    a.method.begin(a.edits, 0, 1, np.random.default_rng(0))
    assert count(model).trained == whole // 4


# ═════════════════════════════ a budget over all modules ═════════════════════════════
def check_budget(method: Budget) -> None:
    model = build("gpt")
    a = attach(model, method)
    alive = []
    fit_and_inspect(model, "gpt", 12, lambda: alive.append([int((host(e.lam) != 0).sum()) for e in a.edits.values()]))
    sums = [sum(n) for n in alive]
    assert all(x <= method.size(12, t, 12) for t, x in enumerate(sums)) and sums[-1] == method.last
    assert len(set(alive[-1])) > 1, "every module keeps as many: the budget is not shared"
    y = run(model)
    merge(model)
    assert near(run(model), y, 1e-5)


def test_a_budget_is_shared_by_all_modules_and_met_at_the_end():
    check_budget(Budget())


def test_the_orthogonality_penalty_is_zero_for_orthonormal_factors_only():
    model = build("gpt")
    a = attach(model, Budget())
    assert a.method.penalty(a.edits, model, Context()).item() > 0.1
    for e in a.edits.values():
        e.P.copy_(np.linalg.qr(host(e.P))[0])
        e.Q.copy_(np.linalg.qr(host(e.Q).T)[0].T)
    assert abs(a.method.penalty(a.edits, model, Context()).item()) < 1e-10


# ═════════════════════════════ phases ═════════════════════════════
def check_ticket(method: Ticket) -> None:
    """Exactly K entries differ from the base at the end. The second phase starts at the base with a fresh optimiser."""
    model, base = build("gpt"), build("gpt")
    a = attach(model, method)
    sizes = []

    def record_sizes() -> None:
        deltas = [np.abs(host(d)).ravel() for e in a.edits.values() for d in e.d.values()]
        sizes.append(np.concatenate(deltas))

    fit_and_inspect(model, "gpt", 10, record_sizes)
    kept = [int(host(k).sum()) for e in a.edits.values() for k in e.keep.values()]
    assert (sizes[4] > 0).sum() > 2 * method.K
    assert 0 < (sizes[5] > 0).sum() <= method.K
    assert sizes[5].max() <= 0.02 * 1.01                 # the first step of a fresh Adam is the learning rate
    assert (sizes[9] > 0).sum() <= method.K
    assert sum(kept) == method.K
    assert count(model).trained == method.K
    tuned_, y = values(base), run(model)
    merge(model)
    assert near(run(model), y, 1e-5)
    changed = sum(int((v != tuned_[n]).sum()) for n, v in values(model).items())
    assert 0.9 * method.K <= changed <= method.K


def test_a_ticket_changes_exactly_K_numbers_and_starts_again_from_the_base():
    check_ticket(Ticket())


class Killed(Exception):
    """The process is gone."""


class Dying:
    """Batches that kill the process when the n-th is asked for."""

    def __init__(self, batches: list, n: int):
        self.batches, self.left = batches, n

    def __iter__(self) -> Iterator[dict]:
        for b in self.batches:
            if not self.left:
                raise Killed
            self.left -= 1
            yield b


@pytest.mark.parametrize("method", [Ticket(), DyLoRA(), Budget(), Ladder()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("after", [2, 6])
def test_a_run_that_was_killed_goes_on_bitwise_whatever_the_phase(method, after, tmp_path):
    batches, go = [batch("gpt", 0), batch("gpt", 1)], dict(steps=8, progress=False, save_every=1, out=tmp_path)
    through, stopped, again = build("gpt"), build("gpt"), build("gpt")
    for m in (through, stopped, again):
        attach(m, method)
    fit(through, batches, 8, AdamW(0.02), progress=False)
    with pytest.raises(Killed):
        fit(stopped, Dying(batches, after), optimizer=AdamW(0.02), **go)
    fit(again, batches, optimizer=AdamW(0.02), resume=True, **go)
    scatter = array.backend() == "cupy"
    ends = values(again)
    for name, v in values(through).items():
        assert near(v, ends[name], 1e-4) if scatter else same(v, ends[name]), name


def test_two_methods_that_bring_phases_do_not_go_together():
    model = build("gpt")
    attach(model, Ticket(), name="one")
    attach(model, Ticket(), name="two")
    with pytest.raises(ValueError, match="at most one method with several training phases"):
        fit(model, [batch("gpt", 0)], 2, progress=False)


# ═════════════════════════════ a penalty to the model without what trains ═════════════════════════════
TRAINERS = [LoRA(r=2), BitFit(), Full(), LoRA(r=2, targets="embed"), Houlsby(m=3), PrefixTuning(p=2), PromptTuning(p=2)]


def largest_gradient(model: Any) -> float:
    """The largest absolute entry of all gradients."""
    return max(float(abs(host(p.grad)).max()) for p in trained(model).values() if p.grad is not None)


def check_kl_starts_at_zero(method: Method, *, packed: bool = False, kind: str = "gpt",
                            trainer: Method = TRAINERS[0]) -> None:
    """Zero with zero gradient on every batch while nothing has moved; after that not."""
    model = build(kind)
    model.to(dtype=np.float64)
    if packed:
        pack(model)
    attach(model, trainer)
    model.to(dtype=np.float64)
    a = attach(model, method)
    for i in range(2):
        b = batch(kind, i)
        ctx = Context(mask=b["mask"])
        with no_grad():
            model(b["ids"], Context(mask=b["mask"]))
        model(b["ids"], ctx)
        kl = method.penalty(a.edits, model, ctx)
        model.zero_grad()
        kl.backward()
        assert abs(kl.item()) < 1e-13
        assert largest_gradient(model) < 1e-13
    noise(model)
    ctx = Context(mask=b["mask"])
    model(b["ids"], ctx)
    kl = method.penalty(a.edits, model, ctx)
    kl.backward()
    assert kl.item() > 1e-3
    assert largest_gradient(model) > 1e-6


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("trainer", [TRAINERS[0], TRAINERS[1], TRAINERS[3]], ids=lambda m: type(m).__name__)
@BOTH
def test_a_kl_penalty_is_zero_with_zero_gradient_before_anything_moved(trainer, packed, kind):
    check_kl_starts_at_zero(KL(), packed=packed, kind=kind, trainer=trainer)


def test_a_kl_penalty_works_beside_full_fine_tuning_too():
    check_kl_starts_at_zero(KL(), trainer=Full())


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda m: type(m).__name__)
@BOTH
def test_the_reference_of_a_kl_penalty_is_the_base_bitwise_and_its_gradient_is_right(trainer, kind):
    model, base = build(kind), build(kind)
    attach(model, trainer)
    noise(model)
    b = batch(kind, 0)
    ctx = Context(mask=b["mask"])
    model.train()
    model(b["ids"], ctx)
    with no_grad(), without(model):
        old = ctx.again()
        reference = host(model(old.ids, old))
    assert same(reference, run(base, b["ids"], mask=b["mask"]))
    attach(model, KL())
    model.to(dtype=np.float64)
    rng, h = np.random.default_rng(1), 1e-5
    model.zero_grad()
    the_loss(model, b).backward()
    ps = trained(model)
    exact, way = 0.0, {}
    for n, p in ps.items():
        way[n] = rng.standard_normal(p.shape) / max(p.size, 1)**0.5
        exact += 0.0 if p.grad is None else float((host(p.grad) * way[n]).sum())
    ends = []
    for e in (h, -h):
        was = {n: host(p).copy() for n, p in ps.items()}
        for n, p in ps.items():
            p.copy_(was[n] + e * way[n])
        with no_grad():
            ends.append(the_loss(model, b).item())
        for n, p in ps.items():
            p.copy_(was[n])
    assert abs((ends[0] - ends[1]) / (2 * h) - exact) <= 1e-5 * abs(exact) + 1e-8


def test_a_strong_kl_penalty_keeps_the_model_where_it_was():
    away = []
    for beta in (0.0, 30.0):
        model = build("gpt")
        attach(model, LoRA(r=4))
        if beta:
            attach(model, KL(beta))
        short_fit(model, "gpt", plain(LoRA(), merges=True), steps=12, decay=0.0)
        with no_grad():
            away.append(kl_divergence(build("gpt")(tokens()), model(tokens())).item())
    assert 0 <= away[1] < 0.2 * away[0]


# ═════════════════════════════ packed weights ═════════════════════════════
PACKED = pytest.mark.parametrize("kind", [Int8, Int4])


@PACKED
def test_a_packed_weight_is_near_the_dense_one_and_smaller(kind):
    W = build("gpt").blocks[0].mlp.up.weight
    p = kind(W.data)
    if kind is Int8:
        step = np.abs(host(W)).max(1, keepdims=True) / 127
    else:
        step = np.repeat(host(p.scale)[..., 0], 4, axis=1)
    error = np.abs(host(p.dequantize()) - host(W))
    assert error.max() > 0 and (error <= step * 0.501).all()
    assert p.nbytes < W.data.nbytes and p.shape == W.shape


@PACKED
def test_lora_trains_beside_a_packed_base_whose_codes_stay(kind):
    model = pack(build("gpt"), kind)
    y0, codes = run(model), {n: host(v).copy() for n, v in model.named_buffers().items()}
    assert codes and not any(n.endswith(("q.weight", "up.weight")) for n in model.named_parameters())
    attach(model, LoRA(r=4, targets=("attn.[qkvo]", "mlp.up", "mlp.down")))
    assert same(run(model), y0) and count(model).total == Sizes("gpt").total
    pair = [batch("gpt", 0), batch("gpt", 1)]
    first = evaluate(model, pair)["loss"]
    fit(model, pair, 12, AdamW(0.02, weight_decay=0.1), progress=False)
    assert evaluate(model, pair)["loss"] < first - 0.01
    assert all(same(host(v), codes[n]) for n, v in model.named_buffers().items() if n in codes)
    y, a = run(model), detach(model)
    assert same(run(model), y0)
    attach(model, a)
    assert same(run(model), y)


@PACKED
def test_the_gradient_goes_through_a_packed_weight_to_its_input_and_no_dense_weight_is_kept(kind):
    lin = Linear(8, 6, rng=np.random.default_rng(0), std=0.5).to(dtype=np.float64)
    lin.weight = kind(lin.weight.data)
    rng = np.random.default_rng(1)
    x, cover = Tensor(dev(rng.standard_normal((3, 8))), requires_grad=True), rng.standard_normal((3, 6))
    W = host(lin.weight.dequantize())
    y = lin(x)
    assert near(host(y), host(x) @ W.T + host(lin.bias)) and not any(a.shape == (6, 8) for a in kept_by(y).values())
    y.backward(dev(cover))
    assert near(host(x.grad), cover @ W)


@pytest.mark.parametrize("check", ["gradients", "rows", "padding"])
@PACKED
def test_lora_on_a_packed_base_keeps_the_contract(check, kind, monkeypatch):
    import contract
    monkeypatch.setattr(contract, "build", lambda k, seed=0: pack(build(k, seed), kind))
    CHECKS[check](plain(LoRA(r=3)), "gpt")


@PACKED
def test_merging_onto_packed_weights_refuses_names_two_ways_out_and_changes_nothing(kind):
    model = pack(build("gpt"), kind)
    a = attach(model, LoRA(r=2, targets=("attn.q", "pos")))
    noise(model)
    y, before = run(model), values(model)
    with pytest.raises(CannotMerge, match="blocks.0.attn.q.*keep the adapter.*unpack"):
        merge(model)
    assert same(run(model), y) and all_same(values(model), before)
    assert edit.attached(model) == (a,)


@PACKED
def test_an_unpacked_base_computes_the_same_stays_frozen_and_takes_the_merge(kind):
    from tinyft import unpack
    model = pack(build("gpt"), kind)
    attach(model, LoRA(r=2, targets=("attn.q", "mlp.up")))
    noise(model)
    y, mine = run(model), set(edit.trained(model))
    unpack(model)
    assert near(run(model), y) and set(edit.trained(model)) == mine
    np.testing.assert_allclose(run(merge(model)), y, rtol=1e-4, atol=1e-5)       # float32
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_knows_the_packed_base_it_was_trained_on(tmp_path):
    from tinyft import load_adapter, save_adapter
    model = pack(build("gpt"))
    attach(model, LoRA(r=2))
    noise(model)
    save_adapter(model, tmp_path)
    again = pack(build("gpt"))
    load_adapter(again, tmp_path)
    assert same(run(again), run(model))
    for other in (build("gpt"), pack(build("gpt"), Int4), pack(build("gpt", seed=1))):
        with pytest.raises(ValueError, match="this adapter was trained on"):
            load_adapter(other, tmp_path)


# ═════════════════════════════ prefix and cache, tied embedding ═════════════════════════════
def test_beams_take_the_cache_of_their_rows_along_a_prefix_is_not_in_it():
    model, _ = tuned(plain(PrefixTuning(p=3)), "gpt")
    ids, cache, i = tokens(), Cache(), np.array([2, 2, 0, 1])
    run(model, ids[:, :5], cache=cache)
    assert cache.length == 5 and all(k.shape[2] == 5 for k, _ in cache.kv.values())
    step = run(model, ids[i, 5:6], cache=cache.rows(dev(i)))
    assert near(step[:, 0], run(model, ids[:, :6])[i, 5])


def test_a_prompt_is_in_the_cache_once():
    model, _ = tuned(plain(PromptTuning(p=3)), "gpt")
    cache = Cache()
    for i in range(7):
        run(model, tokens()[:, i:i + 1], cache=cache)
    assert cache.length == 10


@dataclass(frozen=True)
class Rows(Method):
    """LoRA on an embedding as a change of the rows it gives: y + s A[:, x]ᵀ Bᵀ.  The head does not see it."""
    targets: Any = "embed"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        class LowRankRows(LowRank):
            def after(self, x: Any, y: Tensor, ctx: Context) -> Tensor:
                return y + (ops.embedding(self.B, x) @ self.A) * self.s
        return LowRankRows(m.out_features, m.in_features, 2, 1.0, 0.0, rng)


def test_what_changes_only_the_rows_a_tied_embedding_gives_out_refuses_to_merge():
    model, _ = tuned(plain(Rows()), "gpt")
    with pytest.raises(CannotMerge, match="head"):
        merge(model)
    loose, _ = tuned(plain(Rows(), merges=True), "gpt-classes")
    y = run(loose)
    merge(loose)
    assert near(run(loose), y)


# ═════════════════════════════ order ═════════════════════════════
class In(Edit):
    """x ⊙ l"""

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator):
        self.l = Parameter(dev(rng.uniform(0.5, 1.5, in_features)))

    def before(self, x: Tensor, ctx: Context) -> Tensor:
        return x * self.l

    def fold(self, p: dict) -> dict:
        return {**p, "weight": p["weight"] * self.l.data}


class Out(Edit):
    """y ⊙ l"""

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator):
        self.l = Parameter(dev(rng.uniform(0.5, 1.5, out_features)))

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y * self.l

    def fold(self, p: dict) -> dict:
        return {"weight": p["weight"] * self.l.data[:, None], "bias": p["bias"] * self.l.data}


class Turn(Edit):
    """x → x Q in front, Qᵀ back behind: a change on both sides."""

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator):
        self.Q, self.R = (Parameter(dev(rng.standard_normal((n, n)))) for n in (in_features, out_features))

    def before(self, x: Tensor, ctx: Context) -> Tensor:
        return ops.linear(x, self.Q)

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return ops.linear(y, self.R)

    def fold(self, p: dict) -> dict:
        return {"weight": self.R.data @ p["weight"] @ self.Q.data, "bias": self.R.data @ p["bias"]}


class Hole(Edit):
    """W ⊙ M"""

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator):
        self.M = dev((rng.random((out_features, in_features)) < 0.6).astype(np.float64))

    def tensor(self, name: str, p: Any) -> Any:
        return p * self.M if name == "weight" else p


class Low(LowRank):
    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator):
        super().__init__(in_features, out_features, 2, 1.0, 0.0, rng)
        self.B.copy_(rng.standard_normal(self.B.shape))


@dataclass(frozen=True)
class One(Method):
    """One edit of one kind on one linear map."""
    kind: type = Low
    targets: Any = "up"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        return self.kind(m.in_features, m.out_features, rng)


class Map(Module):
    """A model of one linear map."""

    def __init__(self):
        self.up = Linear(5, 4, rng=np.random.default_rng(8), std=1.0)
        self.up.bias.copy_(np.arange(4))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.up(x, ctx)


X = np.random.default_rng(9).standard_normal((3, 5))


def stack(kinds: tuple) -> Map:
    model = Map()
    for i, kind in enumerate(kinds):
        attach(model, One(kind), name=kind.__name__, seed=i)
    return model.to(dtype=np.float64)


def through(model: Map) -> np.ndarray:
    return run(model, Tensor(dev(X)))


def orders(kinds: list, least: int = 1) -> list[tuple]:
    """Every order of every choice of at least so many."""
    out: list[tuple] = [()]
    for _ in kinds:
        out += [o + (k,) for o in out for k in kinds if k not in o]
    return [o for o in dict.fromkeys(out) if len(o) >= least]


def test_merging_everything_is_exact_in_every_order_of_attachment():
    merged = 0
    for order in orders([In, Out, Low, Hole, Turn]):
        model = stack(order)
        y, before = through(model), values(model)
        try:
            merge(model)
        except CannotMerge:
            assert Turn in order, order
            assert same(through(model), y) and all_same(values(model), before), order
        else:
            merged += 1
            assert near(through(model), y, 1e-11), [k.__name__ for k in order]
    assert merged > 64                                   # all orders of the four one-sided kinds, and Turn alone


def test_merging_some_of_them_is_exact_or_refuses():
    merged = 0
    for order in orders([In, Out, Low, Hole], least=2):
        for going in order:
            model = stack(order)
            y, before = through(model), values(model)
            try:
                merge(model, going.__name__)
            except CannotMerge:
                assert same(through(model), y) and all_same(values(model), before)
            else:
                merged += 1
                assert near(through(model), y, 1e-11), ([k.__name__ for k in order], going.__name__)
                assert {a.name for a in edit.attached(model)} == {k.__name__ for k in order} - {going.__name__}
    assert merged > 10


class Mix(Edit):
    """x → Q x: a change of the input alone."""

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator):
        self.Q = Parameter(dev(rng.standard_normal((in_features, in_features))))

    def before(self, x: Tensor, ctx: Context) -> Tensor:
        return ops.linear(x, self.Q)

    def fold(self, p: dict) -> dict:
        return {**p, "weight": p["weight"] @ self.Q.data}


@pytest.mark.parametrize("order", [(In, Mix), (Mix, In), (Out, Mix, In)], ids=str)
def test_changes_of_the_input_merge_in_reverse_order(order):
    model = stack(order)
    y = through(model)
    merge(model)
    assert near(through(model), y, 1e-11)


def test_edits_act_in_the_order_of_attachment():
    y = {order: through(stack(order)) for order in ((Out, Low), (Low, Out))}
    assert not near(*y.values(), 1e-3)


def three() -> Any:
    model = build("gpt")
    for m, name in ((LoRA(r=2), "lora"), (PrefixTuning(p=2), "prefix"), (Houlsby(m=3), "adapter")):
        attach(model, m, name=name)
    return noise(model).to(dtype=np.float64).eval()


def test_three_methods_stand_together_one_leaves_from_the_middle_and_one_is_merged():
    model = three()
    y, n = run(model), count(model).trained
    alone = [put_on(plain(m), "gpt")[0] for m in (LoRA(r=2), PrefixTuning(p=2), Houlsby(m=3))]
    assert n == sum(count(m).trained for m in alone)
    before = values(model)
    with pytest.raises(CannotMerge):
        merge(model)
    assert same(run(model), y) and values(model).keys() == before.keys()
    with without(model, "prefix"):
        inner = run(model)
    assert same(run(model), y) and not near(inner, y, 1e-3)
    p = detach(model, "prefix")
    assert same(run(model), inner) and "blocks.0.mlp.edits.adapter.up.weight" in model.named_parameters()
    attach(model, p)
    assert same(run(model), y)
    merge(model, "lora")
    assert near(run(model), y) and [a.name for a in edit.attached(model)] == ["adapter", "prefix"]
    with pytest.raises(LookupError, match="adapter, prefix"):
        detach(model, "lora")


def test_without_gives_back_everything_after_an_error_and_can_be_nested():
    model = three()
    y = run(model)
    with pytest.raises(RuntimeError, match="inside"), without(model, "lora"):
        with without(model):
            assert near(run(model), run(build("gpt").to(dtype=np.float64)))
        raise RuntimeError("inside")
    assert same(run(model), y)


def test_without_leaves_a_frozen_adapter_where_it_is():
    model = build("gpt")
    for name, seed in (("old", 1), ("new", 2)):
        a = attach(model, LoRA(r=2), name=name, seed=seed)
        noise(model, seed=seed)
        if name == "old":
            y = run(model)
            for e in a.edits.values():
                for p in e.parameters():
                    p.train(False)
    with without(model):
        assert same(run(model), y)


def test_of_methods_that_train_the_same_tensors_the_last_one_can_always_come_off():
    model = build("gpt")
    for name in ("one", "two", "three"):
        attach(model, BitFit(), name=name)
    for name in ("three", "two", "one"):
        assert detach(model, name).name == name


def test_two_methods_that_train_the_same_tensors_come_off_in_reverse():
    model, y0 = build("gpt"), run(build("gpt"))
    for m in (BitFit(), Houlsby(m=3)):
        attach(model, m)
        short_fit(model, "gpt", plain(m, merges=True))
    y = run(model)
    for take in (detach, lambda m, n: without(m, n).__enter__()):
        with pytest.raises(ValueError, match="houlsby trained the same tensors after bitfit"):
            take(model, "bitfit")
        assert same(run(model), y)
    with without(model):
        assert same(run(model), y0)
    top = detach(model)
    bottom = detach(model)
    assert same(run(model), y0)
    attach(model, bottom)
    attach(model, top)
    assert same(run(model), y)


def test_a_refused_merge_wrote_nothing_even_where_others_had_agreed():
    model = build("gpt")
    attach(model, LoRA(r=2, targets="blocks.0.attn.q"))
    attach(model, PrefixTuning(p=2, targets="blocks.1.attn.kv"))
    noise(model)
    before = values(model)
    with pytest.raises(CannotMerge, match="Prefix"):
        merge(model)
    assert all(same(v, before[n]) for n, v in values(model).items())


@pytest.mark.parametrize("kept, merged, fine", [
    (Full(), LoRA(r=2), False), (LoRA(r=2), Full(), True),
    (BitFit(), Partial(k=1), False), (Partial(k=1), BitFit(), False),
    (BitFit(), LoRA(r=2), True), (LoRA(r=2), BitFit(), True), (LoRA(r=2), LoRA(r=2, targets="mlp.up"), True)])
@pytest.mark.parametrize("kept_first", [True, False])
def test_a_merge_survives_the_detaching_of_what_stayed_or_is_refused(kept, merged, fine, kept_first):
    model = build("gpt")
    for name, m in sorted({"kept": kept, "merged": merged}.items(), reverse=not kept_first):
        attach(model, m, name=name)
    noise(model).to(dtype=np.float64)
    if not fine:
        with pytest.raises(CannotMerge, match="kept trains the same tensors"):
            merge(model, "merged")
        return
    with without(model, "kept"):
        y = run(model)
    merge(model, "merged")
    detach(model, "kept")
    assert near(run(model), y)


def test_a_method_that_fails_half_way_leaves_the_model_as_it_was():
    @dataclass(frozen=True)
    class Breaks(Method):
        targets: Any = "attn.q"

        def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
            if path.startswith("blocks.1"):
                raise ArithmeticError("no")
            return Low(m.in_features, m.out_features, rng)
    model = build("gpt")
    names = set(values(model))
    with pytest.raises(ArithmeticError):
        attach(model, Breaks())
    assert set(values(model)) == names and not edit.attached(model) and all(p.requires_grad for p in model.parameters())


# ═════════════════════════════ names, contexts, shared parts ═════════════════════════════
def test_the_names_that_an_error_offers_are_few_and_two_parts_long():
    """At most four that look like the glob, else the first eight; layers under one name."""
    paths = [f"top.blocks.{i}.part.{letter}" for i in (0, 1) for letter in "abcdefghijkl"]
    assert edit._nearest("zzz", ["", *paths]) == [f"part.{letter}" for letter in "abcdefgh"]
    near = edit._nearest("part.x", paths)
    assert len(near) == 4 and set(near) <= {f"part.{letter}" for letter in "abcdefghijkl"}


def test_a_glob_that_names_nothing_says_what_there_is():
    wrong = {"layers.*.q": "attn.q", "attn.query": "attn.q", "mlp.wown": "mlp.down", "blocks.7.attn": "attn"}
    for glob, there in wrong.items():
        with pytest.raises(LookupError, match=f"names no module.*{there}"):
            attach(build("gpt"), LoRA(targets=glob))
    some = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.q", "attn.v", "mlp.up")]
    assert list(select(build("gpt"), ("mlp.up", "attn.[qv]"))) == some
    assert list(select(build("gpt"), "blocks.*")) == ["blocks.0", "blocks.1"]
    assert list(select(build("bert"), "norm")) == ["head.norm"]
    assert len(select(build("gpt"), "**")) == len(edit.base_modules(build("gpt"))) - 1


def test_an_edits_own_parts_are_no_targets():
    model = build("gpt")
    attach(model, Houlsby(m=3))
    with pytest.raises(LookupError):
        attach(model, LoRA(targets="edits.houlsby.up"))
    assert all("edits" not in p for p in select(model, "**"))


def test_a_name_is_taken_once():
    model = build("gpt")
    a = attach(model, LoRA(r=2))
    with pytest.raises(ValueError, match="another name"):
        attach(model, LoRA(r=2))
    attach(model, LoRA(r=2), name="second")
    assert detach(model, "lora") is a
    with pytest.raises(ValueError, match="attached already"):
        attach(model, a, name="second")


def test_every_module_of_a_pass_gets_the_same_context_and_no_two_passes_share_one():
    seen = []

    class Probe(Edit):
        def before(self, x: Any, ctx: Context) -> Any:
            seen.append(ctx)
            return x
    model = build("bert")
    for m in list(model.modules()):
        m.edits = {"probe": Probe()}
    run(model)
    n = len(seen)
    # Attention draws the mask of its probabilities itself, without a call.
    called = [p for p in edit.base_modules(model) if not p.endswith("drop_p")]
    assert n == len(called) and len({id(c) for c in seen}) == 1
    run(model)
    assert len({id(c) for c in seen}) == 2 and seen[0].output is not None


def test_a_context_can_give_the_same_batch_again_whoever_lengthened_it():
    for method in (PromptTuning(p=2), LoRA()):
        model, _ = put_on(plain(method), "gpt")
        mask = np.ones((4, 7), bool)
        mask[0, 5:] = False
        ctx = Context(mask=mask, rng=np.random.default_rng(0), task=[3])
        y = model(tokens(), ctx)
        old = ctx.again()
        assert old.rng is None and old.task == [3] and same(host(old.ids), tokens()) and same(host(old.mask), mask)
        assert same(host(model(old.ids, old)), host(y))


def test_a_fact_that_was_not_given_is_asked_for_by_name():
    class Asks(Edit):
        def after(self, x: Any, y: Any, ctx: Context) -> Any:
            return y * float(ctx.need("task")[0]) + len(ctx.need("route"))
    model = build("gpt")
    model.norm.edits = {"asks": Asks()}
    with pytest.raises(AttributeError, match=r"model\(ids, task="):
        run(model)
    with pytest.raises(AttributeError, match=r"model\(ids, route="):
        run(model, task=np.ones(4, int))
    assert run(model, task=np.ones(4, int), route=['a']).shape == (4, 7, 23)


@dataclass(frozen=True)
class Twice(Method):
    """The same low-rank change on two maps: one pair of factors."""
    targets: Any = ("attn.q", "attn.v")

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        e = LowRank(12, 12, 2, 1.0, 0.0, rng)
        return dict.fromkeys(found, e)


def test_shared_parts_are_one_tensor_saved_counted_and_trained_once():
    model = build("gpt")
    a = attach(model, Twice())
    assert count(model).trained == 2 * 2 * 12
    assert set(state_dict(model, a)) == {f"blocks.0.attn.q.edits.twice.{n}" for n in "AB"}
    CHECKS["save"](plain(Twice(), merges=True), "gpt")
    CHECKS["merge"](plain(Twice(), merges=True), "gpt")
    CHECKS["optimizer"](plain(Twice(), merges=True), "gpt")
    CHECKS["gradients"](plain(Twice(), merges=True), "gpt")


def test_what_is_shared_stays_shared_when_a_model_moves():
    class Holds(Module):
        def __init__(self, table: Any):
            self.table, self.list, self.map = table, [table, dev(np.ones(3, np.float32))], {"a": table}
    table = dev(np.zeros((2, 2), np.float32))
    both = Module()
    both.one, both.two = Holds(table), Holds(table)
    both.to(dtype=np.float64)
    assert both.one.table is both.two.table is both.one.list[0] is both.two.map["a"]
    assert both.one.table.dtype == np.float64
    assert both.one.list[1].dtype == np.float64 and len(both.named_buffers()) == 3


# ═════════════════════════════ combining ═════════════════════════════
def adapters(methods: list[Method], kind: str = "gpt") -> list[Attached]:
    out = []
    for i, m in enumerate(methods):
        model = build(kind)
        attach(model, m, name=f"a{i}", seed=i)
        noise(model, seed=i)
        out.append(detach(model.to(dtype=np.float64)))
    return out


def check_combined(together: Any) -> None:
    """W₀ + Σ cⱼ sⱼ Bⱼ Aⱼ, by hand."""
    parts, weights = adapters([LoRA(r=2, alpha=6), LoRA(r=3, targets=("attn.q", "mlp.up"))]), [0.7, -1.5]
    model, hand = build("gpt").to(dtype=np.float64), build("gpt").to(dtype=np.float64)
    for a, c in zip(parts, weights):
        for p, e in a.edits.items():
            W = edit.base_modules(hand)[p].weight
            W.copy_(host(W) + c * host(e.delta()))
    attach(model, together(parts, weights))
    y = run(hand)
    assert near(run(model.eval()), y)
    merge(model)
    assert near(run(model), y)


def test_a_combination_is_the_weighted_sum_of_the_updates_and_merges():
    check_combined(combine)


def test_combining_one_is_that_one_the_same_with_opposite_weights_is_nothing_and_combinations_combine():
    one, two = adapters([LoRA(r=2), Houlsby(m=3, norms=False)])
    base = build("gpt").to(dtype=np.float64)
    y0 = run(base)

    def out(a: Attached) -> np.ndarray:
        attach(base, a)
        y = run(base)
        assert detach(base, a.name) is a and same(run(base), y0)
        return y
    assert near(out(combine([one])), out(one)) and near(out(combine([one, one], [0.4, -0.4])), y0)
    assert near(out(combine([one, two])), out(combine([combine([one]), combine([two])])))
    assert not near(out(combine([one, two])), y0, 1e-3)


def test_combine_refuses_what_cannot_be_summed():
    for m in (BitFit(), PrefixTuning(p=2), LoRA(targets="embed"), Houlsby(m=3), One(In), One(Hole)):
        with pytest.raises(ValueError, match="only changes of outputs"):
            combine(adapters([m]))
    with pytest.raises(ValueError, match="one weight per adapter"):
        combine(adapters([LoRA(r=2)]), [1.0, 2.0])
    with pytest.raises(ValueError, match="one weight per adapter"):
        combine([])


def test_a_combination_with_a_nonlinear_part_runs_and_refuses_to_merge():
    model = build("gpt").to(dtype=np.float64)
    attach(model, combine(adapters([LoRA(r=2), Houlsby(m=3, norms=False)])))
    y = run(model)
    with pytest.raises(CannotMerge):
        merge(model)
    assert same(run(model), y)


# ═════════════════════════════ planted mistakes ═════════════════════════════
class Attentive(Rung):
    """Forgets to cut the backbone off."""

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        ctx.scratch["ladder"] = self.side(self.D(y, ctx), ctx)
        return y


class WarmLadder(Ladder):
    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        edits: dict[str, Edit] = {}
        for path, m in found.items():
            if path == "norm":
                edits[path] = Top(self.c, m.out_features, rng)
            else:
                edits[path] = Attentive(m.out_features, self.c, self.T, first=False, rng=rng)
        return edits


@dataclass(frozen=True)
class WarmBackbone(Method):
    """A ladder and a backbone that trains a little."""
    inner: Any = Ladder()
    targets: Any = Ladder.targets

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        return WarmLadder().edits(found, rng)

    def trains(self, model: Module) -> set[str]:
        return {"blocks.0.norm1.bias"}


class OwnRank(DyLoRA):
    """Every module draws its own rank."""

    def begin(self, edits: dict[str, Edit], t: int, T: int, rng: np.random.Generator) -> None:
        for p, e in edits.items():
            super().begin({p: e}, t, T, rng)


class GradientOnly(DyLoRA):
    """Rows other than b get no gradient, and that is all: momentum and decay still move them."""

    def begin(self, edits: dict[str, Edit], t: int, T: int, rng: np.random.Generator) -> None:
        super().begin(edits, t, T, rng)
        for e in edits.values():
            e.A.mask = e.B.mask = None


class TicketByGradient(Ticket):
    """Chooses the entries, and lets everything move."""

    def rewind(self, model: Any, edits: dict[str, Edit], batches: Any, rng: np.random.Generator) -> None:
        super().rewind(model, edits, batches, rng)
        for e in edits.values():
            for k in e.keep.values():
                k[...] = True


class NoRewind(Ticket):
    """Goes on from where the dense phase ended."""

    def rewind(self, model: Any, edits: dict[str, Edit], batches: Any, rng: np.random.Generator) -> None:
        before = {id(d): host(d).copy() for e in edits.values() for d in e.d.values()}
        super().rewind(model, edits, batches, rng)
        for e in edits.values():
            for n, d in e.d.items():
                d.copy_(before[id(d)] * host(e.keep[n]))


class PerModule(Budget):
    """Every module keeps its share, whatever the others need."""

    def step(self, edits: dict[str, Edit], t: int, T: int) -> None:
        for e in edits.values():
            keep = dev(np.arange(self.r) < max(1, self.size(self.r * len(edits), t, T) // len(edits)))
            e.lam.copy_(e.lam.data * keep)


@dataclass(frozen=True, eq=False)
class Stale(KL):
    """Keeps the first answer it was given."""
    first: Any = None

    def penalty(self, edits: dict[str, Edit], model: Module, ctx: Context) -> Any:
        if not hasattr(self, "_old"):
            with no_grad(), without(model):
                old = ctx.again()
                model(old.ids, old)
            object.__setattr__(self, "_old", old.output)
        return kl_divergence(self._old, ctx.output) * self.beta


class ToItself(KL):
    """Compares the model with itself."""

    def penalty(self, edits: dict[str, Edit], model: Module, ctx: Context) -> Any:
        return kl_divergence(ctx.output.detach(), ctx.output) * self.beta


class NotWithout(KL):
    """Forgets the mask of the batch."""

    def penalty(self, edits: dict[str, Edit], model: Module, ctx: Context) -> Any:
        with no_grad(), without(model):
            old = model(ctx.again().ids)
        return kl_divergence(old, ctx.output) * self.beta


def mixed_factors(parts: list[Attached], weights: list[float]) -> Attached:
    """PEFT's `linear`: sums factors, not updates."""
    paths = dict.fromkeys(p for a in parts for p in a.edits)
    out = {}
    for p in paths:
        es = [(a.edits[p], c) for a, c in zip(parts, weights) if p in a.edits]
        first = es[0][0]
        e = LowRank(first.A.shape[1], first.B.shape[0], 2, 2.0, 0.0, np.random.default_rng(0))
        e.to(dtype=np.float64)
        e.A.copy_(sum(np.sign(c) * abs(c * x.s)**0.5 * host(x.A)[:2] for x, c in es))
        e.B.copy_(sum(abs(c * x.s)**0.5 * host(x.B)[:, :2] for x, c in es))
        out[p] = e
    return Attached(LoRA(), "mixed", out)


PLANTED = {
    "a ladder that does not cut the backbone off": (check_no_way_back, WarmBackbone()),
    "DyLoRA with a rank for every module": (check_one_row_a_step, OwnRank()),
    "DyLoRA that masks the gradient only": (check_one_row_a_step, GradientOnly()),
    "a budget for every module alone": (check_budget, PerModule()),
    "a ticket that forgets its mask": (check_ticket, TicketByGradient()),
    "a ticket without the rewind": (check_ticket, NoRewind()),
    "a penalty against a stale copy": (check_kl_starts_at_zero, Stale()),
    "a penalty against the model itself": (check_kl_starts_at_zero, ToItself()),
    "a penalty that forgets the mask": (check_kl_starts_at_zero, NotWithout()),
    "a combination of factors": (check_combined, mixed_factors),
}


@wrong_answers
@pytest.mark.parametrize("name", PLANTED)
def test_the_checks_refuse_a_wrong_one(name):
    check, wrong = PLANTED[name]
    with pytest.raises(AssertionError):
        check(wrong)
