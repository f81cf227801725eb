"""What every fine-tuning method is held to, written once: G1 to G11 of the specification, and what follows from them.

A Row says what a method claims.  A check builds a small model, puts the method on it and asserts one property; it is given wrong methods
too (test_methods.py, test_protocol.py), and must refuse them.  A new method is one more Row.
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from helpers import host

from tinyft import (
    BERT,
    GPT,
    AdamW,
    BERTConfig,
    Cache,
    CannotMerge,
    GPTConfig,
    Method,
    adapters,
    array,
    edit,
    evaluate,
    fit,
    no_grad,
)
from tinyft.identity import describe
from tinyft.train.batch import compute_loss, read_batch

KINDS = ("gpt", "bert", "gpt-classes", "bert-classes")
CLASSES = 3


@dataclass(frozen=True)
class Sizes:
    "V vocabulary, P positions, S token types, C width, L layers, F feed-forward width; tail: the numbers above the blocks."
    kind: str
    V: int = 23
    P: int = 24
    S: int = 2
    C: int = 12
    L: int = 2
    H: int = 3
    F: int = 20

    gpt = property(lambda s: s.kind.startswith("gpt"))
    classes = property(lambda s: s.kind.endswith("classes"))
    block = property(lambda s: 4 * (s.C**2 + s.C) + 2 * s.C * s.F + s.F + s.C + 4 * s.C)
    mlm = property(lambda s: 0 if s.gpt or s.classes else s.C**2 + s.C + 2 * s.C + s.V)
    tail = property(lambda s: 2 * s.C if s.gpt else s.mlm)
    bottom = property(lambda s: (s.V + s.P) * s.C + (0 if s.gpt else s.S * s.C + 2 * s.C))
    total = property(lambda s: s.bottom + s.L * s.block + s.tail)
    head = property(lambda s: 0 if not s.classes else s.C * CLASSES if s.gpt else s.C * CLASSES + CLASSES + s.C**2 + s.C)


@dataclass(frozen=True)
class Row:
    """A method and what it claims.

    start     "same": the output is the base's, bitwise, when it is attached;  "near": almost;  "other": it is not
    merges    can be worked into the base's weights
    count     the numbers that train, a new head aside, from the model's sizes
    base      which of the base's tensors train as well, a new head aside
    on        the models it is for;   drops: it drops out;   still: tensors of its edits that need not move"""
    method: Method
    start: str
    merges: bool
    count: Callable[[Sizes], int]
    base: Callable[[str], bool] = lambda name: False
    on: tuple[str, ...] = KINDS
    drops: bool = False
    still: tuple[str, ...] = ()
    lr: float = 0.02
    caches: bool = True


# ── small models, batches, and what to do with them ──────────────────────────────────────────────────────────────────
def build(kind: str, seed: int = 0) -> Any:
    "A small model of this kind, in eval mode, no tensor of it zero or one."
    s, rng = Sizes(kind), np.random.default_rng(seed + 100)
    if s.gpt:
        model = GPT(GPTConfig(s.V, s.P, s.C, s.L, s.H, s.F), seed)
    else:
        model = BERT(BERTConfig(s.V, s.P, s.S, s.C, s.L, s.H, s.F), seed)
    if s.classes:
        model.new_head(CLASSES, rng)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape) * (0.3 if p.ndim > 1 else 0.1))
    return model.eval()


def tokens(n: int = 4, T: int = 7, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, Sizes.V, (n, T))


def batch(kind: str, seed: int, n: int = 4, T: int = 7) -> dict:
    "What fit takes: next tokens, hidden tokens or classes; some of it padding."
    rng, ids, mask = np.random.default_rng(seed), tokens(n, T, seed + 50), np.ones((n, T), bool)
    mask[-1, T - 2:] = False
    if kind.endswith("classes"):
        return {"ids": ids, "mask": mask, "labels": rng.integers(0, CLASSES, n)}
    if kind == "gpt":
        return {"ids": ids, "mask": mask}
    return {"ids": ids, "mask": mask, "labels": np.where(mask & (rng.random((n, T)) < 0.4), ids, -100)}


def run(model: Any, ids: Any = None, **about: Any) -> np.ndarray:
    with no_grad():
        return host(model(tokens() if ids is None else ids, **about))


def noise(model: Any, std: float = 0.3, seed: int = 1) -> Any:
    "Move every tensor that trains away from its special start."
    rng = np.random.default_rng(seed)
    for p in edit.trained(model).values():
        p.copy_(host(p) + rng.standard_normal(p.shape) * (std if p.ndim > 1 else std / 3))
    return model


def put_on(row: Row, kind: str, seed: int = 0) -> tuple[Any, edit.Attached]:
    model = build(kind)
    a = edit.attach(model, row.method, seed=seed)
    return model.eval(), a


def tuned(row: Row, kind: str, std: float = 0.3) -> tuple[Any, edit.Attached]:
    "In float64, every trained tensor at a generic point."
    model, a = put_on(row, kind)
    return noise(model, std).to(dtype=np.float64).eval(), a


def short_fit(model: Any, kind: str, row: Row, steps: int = 4, decay: float = 0.1, **more: Any) -> AdamW:
    optimizer = AdamW(row.lr, weight_decay=decay)
    fit(model, [batch(kind, 0), batch(kind, 1)], steps, optimizer, progress=False, **more)
    return optimizer


def values(model: Any) -> dict[str, np.ndarray]:
    return {n: np.array(host(v)) for n, v in model.state_dict().items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b)


def near(a: np.ndarray, b: np.ndarray, tol: float = 1e-12) -> bool:
    "Equal to within tol of the largest number; masks altogether."
    if a.dtype == bool:
        return same(a, b)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tol * max(np.abs(b).max(), 1))


def the_loss(model: Any, b: dict, rng: Any = None) -> Any:
    "The loss of a batch as the trainer forms it, penalties included."
    ctx, loss = compute_loss(model, read_batch(b), rng)
    for a in edit.attached(model):
        loss = loss + a.method.penalty(a.edits, model, ctx)
    return loss


def started(row: Row, a: edit.Attached) -> None:
    "What the trainer does before a step."
    row.method.begin(a.edits, 0, 10, np.random.default_rng(3))


# ── the checks ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_moves(row: Row, kind: str) -> None:
    "G1: training moves what the row says, under weight decay, and every other number stays as it is, bitwise."
    model, a = put_on(row, kind)
    fresh = getattr(model, "head_modules", ())
    base = {n for n in edit.base_parameters(model) if row.base(n) or n.split(".")[0] in fresh}
    assert {n for n, p in edit.base_parameters(model).items() if p.requires_grad} == base
    before = values(model)
    short_fit(model, kind, row)
    moved = {n for n, v in values(model).items() if not same(v, before[n])}
    ours = {n for n in moved if "edits" not in n.split(".")}
    assert ours <= base, f"moved as well: {sorted(ours - base)}"
    asked = base | {n for n in model.named_parameters() if "edits" in n.split(".")}
    silent = {n for n in asked if n.endswith("attn.k.bias") or n.split(".")[-1] in row.still}      # softmax does not see the key's bias
    assert asked <= moved | silent, f"did not move: {sorted(asked - moved - silent)}"


def check_count(row: Row, kind: str) -> None:
    "G2: how much trains is the closed form; so is the size of the base."
    model, _ = put_on(row, kind)
    s, c = Sizes(kind), edit.count(model)
    assert (c.trained, c.head, c.total) == (row.count(s), s.head, s.total)


def check_start(row: Row, kind: str) -> None:
    "G3: what the output is when the method has just been attached."
    y0, y = run(build(kind)), run(put_on(row, kind)[0])
    assert y.shape == y0.shape
    away = np.abs(y - y0).max()
    claimed = away == 0 if row.start == "same" else 0 < away < 0.02 if row.start == "near" else away > 0.01
    assert claimed, f"{row.start}, but {away:.2g} away"


def check_gradients(row: Row, kind: str) -> None:
    "G4: the gradient of every tensor that trains, along a random direction, by central differences in float64 at a generic point."
    model, a = tuned(row, kind)
    started(row, a)
    b, rng, h = batch(kind, 2), np.random.default_rng(4), 1e-4
    model.zero_grad()
    the_loss(model, b).backward()
    grads = {n: p.grad for n, p in edit.trained(model).items()}
    alive = 0
    for n, p in edit.trained(model).items():
        v, was = rng.standard_normal(p.shape), np.array(host(p))
        v /= np.sqrt((v * v).sum())
        exact = 0.0 if grads[n] is None else float((host(grads[n]) * v).sum())
        at = {}
        for e in (h, -h, 2 * h, -2 * h):
            p.copy_(was + e * v)
            with no_grad():
                at[e] = float(the_loss(model, b).data)
        p.copy_(was)
        numeric = (8 * (at[h] - at[-h]) - (at[2 * h] - at[-2 * h])) / (12 * h)          # the error is of the fourth order in h
        alive += abs(exact) > 1e-6
        assert abs(numeric - exact) <= 2e-6 * abs(exact) + 1e-9, f"{n}: by differences {numeric:.9g}, by backward {exact:.9g}"
    assert alive, "no gradient at all"


def check_save(row: Row, kind: str) -> None:
    "G5: what was saved, put on another copy of the base, gives the same output and the same state, bitwise.  Through a file as well."
    model, a = put_on(row, kind)
    short_fit(model, kind, row)
    y, kept = run(model), edit.state_dict(model, a)
    assert set(kept) == {f"{p}.edits.{a.name}.{n}" for p, n in _first_names(a)} | set(a.base)
    other = build(kind)
    b = edit.attach(other, row.method, seed=9)
    edit.load_state_dict(other, b, kept)
    assert same(run(other.eval()), y)
    again = edit.state_dict(other, b)
    assert kept.keys() == again.keys() and all(same(again[n], v) for n, v in kept.items())
    third = build(kind)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save_adapter(model, folder)
        c = adapters.load_adapter(third, folder, name="third", method=type(row.method))
    assert same(run(third.eval()), y)
    assert describe(c.method) == describe(a.method)
    for bad in ({}, {n: v for n, v in list(kept.items())[1:]}, kept | {"nobody": np.zeros(2)}, {n: np.zeros(99) for n in kept}):
        try:
            edit.load_state_dict(other, b, bad)
        except ValueError:
            assert same(run(other), y)
        else:
            raise AssertionError("a state that does not fit was loaded")


def _first_names(a: edit.Attached) -> list[tuple[str, str]]:
    "(path, name) of everything in an adapter, shared parts once."
    seen, out = set(), []
    for path, e in a.edits.items():
        for n, v in {**e.named_parameters(), **e.named_buffers()}.items():
            if id(v) not in seen:
                seen.add(id(v))
                out.append((path, n))
    return out


def check_off_and_on(row: Row, kind: str) -> None:
    "G6: without the method the model is the base, bitwise, under the base's names; with it again, what it was."
    base = build(kind)
    y0, before = run(base), values(base)
    model, a = put_on(row, kind)
    assert set(before) <= set(values(model))
    short_fit(model, kind, row)
    y, state = run(model), edit.state_dict(model, a)
    assert not near(y, y0, 1e-6)

    def bare() -> bool:
        now = values(model)
        return now.keys() == before.keys() and all(same(now[n], v) for n, v in before.items()) and same(run(model), y0)
    with edit.without(model):
        assert bare()
    assert same(run(model), y)
    assert edit.detach(model) is a and bare() and all(p.requires_grad for p in model.parameters())
    edit.attach(model, a)
    assert same(run(model), y) and all(same(v, state[n]) for n, v in edit.state_dict(model, a).items())


def check_merge(row: Row, kind: str) -> None:
    "G7: merged is unmerged, to 1e-12, under the base's names; or CannotMerge, and nothing changed.  fold writes nothing in place."
    model, a = tuned(row, kind)
    y, before = run(model), values(model)
    for p, e in a.edits.items():
        own = {n: w.data for n, w in edit.base_modules(model)[p].own().items()}
        try:
            e.fold(own)
        except CannotMerge as reason:
            assert str(reason)
        assert all(same(host(w), before[f"{p}.{n}"]) for n, w in own.items()), "fold wrote into what it was given"
    try:
        edit.merge(model)
    except CannotMerge:
        now = values(model)
        assert not row.merges and now.keys() == before.keys() and all(same(v, before[n]) for n, v in now.items()) and same(run(model), y)
    else:
        assert row.merges and set(values(model)) == set(values(build(kind))) and not edit.attached(model)
        assert near(run(model), y)


def check_rows(row: Row, kind: str) -> None:
    "G8: a row's output does not depend on the other rows, nor on their order."
    model, a = tuned(row, kind)
    started(row, a)
    y, order = run(model), np.array([2, 0, 3, 1])
    assert near(run(model, tokens()[order]), y[order])
    for i in range(4):
        assert near(run(model, tokens()[i:i + 1]), y[i:i + 1])


def check_optimizer(row: Row, kind: str) -> None:
    "G9: Adam holds two numbers for each one that trains, and nothing else."
    model, _ = put_on(row, kind)
    optimizer = short_fit(model, kind, row)
    assert sum(m.size for g in optimizer.groups for m in g.moments) == 2 * sum(p.size for p in edit.trained(model).values())
    assert {n for g in optimizer.groups for n in g.tensors} == set(edit.trained(model))


def check_dropout(row: Row, kind: str) -> None:
    "G10: only what the row says drops out, only while training, only in the branch; eval mode is deterministic."
    model, a = put_on(row, kind)
    y, rng = run(model), np.random.default_rng(0)
    assert same(run(model, rng=rng), y) and same(run(model), y)
    if row.start == "same":                                                      # the branch gives nothing yet, however it is thinned
        assert same(run(model.train(), rng=rng), y)
    noise(model)
    y = run(model.eval())
    assert same(run(model, rng=rng), y)
    thinned = run(model.train(), rng=rng)
    assert same(thinned, y) != row.drops


def check_learns(row: Row, kind: str) -> None:
    "G11: two batches can be fitted, and the same seed gives the same numbers."
    ends = []
    for _ in range(2):
        model, a = put_on(row, kind)
        pair = [batch(kind, 0), batch(kind, 1)]
        first = evaluate(model, pair)["loss"]
        short_fit(model, kind, row, steps=16, decay=0.0)
        assert evaluate(model, pair)["loss"] < first - 2e-3
        ends.append(edit.state_dict(model, a))
    scatter = array.backend() == "cupy"                                          # a GPU adds colliding rows in any order
    assert all(near(v, ends[1][n], 1e-4) if scatter else same(v, ends[1][n]) for n, v in ends[0].items())


def check_padding(row: Row, kind: str) -> None:
    "Padding on either side changes nothing.  BERT's [CLS] stands first, so for it on the right only."
    model, a = tuned(row, kind)
    started(row, a)
    ids, pad = tokens(4, 5), np.full((4, 3), 2)
    y, on, off = run(model, ids), np.ones((4, 5), bool), np.zeros((4, 3), bool)
    rows = (lambda z, i: z) if kind.endswith("classes") else (lambda z, i: z[:, i:i + 5])
    assert near(rows(run(model, np.c_[ids, pad], mask=np.c_[on, off]), 0), y)
    if kind != "bert-classes":
        assert near(rows(run(model, np.c_[pad, ids], mask=np.c_[off, on]), 3), y)


def check_cache(row: Row, kind: str) -> None:
    "Decoding through the cache, in chunks, is one pass over the whole; with padding in front too."
    if kind != "gpt" or not row.caches:
        return
    model, a = tuned(row, kind)
    started(row, a)
    mask = np.ones((4, 7), bool)
    mask[0, :2] = mask[1, :1] = False
    for m in (None, mask):
        whole, cache = run(model, mask=m), Cache()
        steps = [run(model, tokens()[:, i:j], mask=None if m is None else m[:, i:j], cache=cache) for i, j in ((0, 3), (3, 4), (4, 7))]
        got = np.concatenate(steps, axis=1)
        real = mask if m is not None else np.ones_like(mask)
        assert got.shape == whole.shape and near(got[real], whole[real])


CHECKS = {name[6:]: f for name, f in list(globals().items()) if name.startswith("check_")}
