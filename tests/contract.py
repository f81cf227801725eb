"""The contract of every fine-tuning method, written once: G1 to G11 of the specification, and their consequences.

A Row says what a method claims. A check builds a small model, attaches the method and asserts one property. Wrong
methods go through the same checks (test_methods.py, test_protocol.py, test_stacks.py), and must be rejected.
A new method is one more Row.
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
    Llama,
    LlamaConfig,
    Method,
    adapters,
    array,
    edit,
    evaluate,
    fit,
    no_grad,
    recompute,
)
from tinyft.identity import describe
from tinyft.train.batch import compute_loss, read_batch

KINDS = ("gpt", "bert", "gpt-classes", "bert-classes", "llama")
NEXT_TOKEN = ("gpt", "llama")                            # the models that predict the next token
CLASSES = 3
LLAMA_HEADS = {"heads": 4, "key_value_heads": 2, "head_width": 4}                # wider than C / H


@dataclass(frozen=True)
class Sizes:
    """Sizes of the small models, and the number of parameters of their parts.

    V vocabulary, P positions, S token types, C width, L layers, H heads, F feed-forward width. The Llama has heads of
    its own (LLAMA_HEADS), biases on q, k and v, as Qwen2's, and an output layer of its own."""

    kind: str
    V: int = 23
    P: int = 24
    S: int = 2
    C: int = 12
    L: int = 2
    H: int = 3
    F: int = 20

    @property
    def gpt(self) -> bool:
        return self.kind.startswith("gpt")

    @property
    def llama(self) -> bool:
        return self.kind == "llama"

    @property
    def classes(self) -> bool:
        return self.kind.endswith("classes")

    @property
    def queries(self) -> int:
        """The width of all query heads together."""
        return LLAMA_HEADS["heads"] * LLAMA_HEADS["head_width"] if self.llama else self.C

    @property
    def keys(self) -> int:
        """The width of all heads of keys together."""
        return LLAMA_HEADS["key_value_heads"] * LLAMA_HEADS["head_width"] if self.llama else self.C

    @property
    def block(self) -> int:
        """Parameters of one block: attention, MLP and two norms."""
        if self.llama:
            qkv = (self.queries + 2 * self.keys) * (self.C + 1)
            return qkv + self.queries * self.C + 3 * self.C * self.F + 2 * self.C
        attention = 4 * (self.C**2 + self.C)
        mlp = 2 * self.C * self.F + self.F + self.C
        return attention + mlp + 4 * self.C

    @property
    def own_head(self) -> int:
        """Parameters of the language-model head, a tied weight aside: BERT's dense map, norm and bias; Llama's map."""
        if self.gpt or self.classes:
            return 0
        if self.llama:
            return self.V * self.C
        return self.C**2 + self.C + 2 * self.C + self.V

    @property
    def tail(self) -> int:
        """Parameters above the blocks, a new head aside."""
        last_norm = {"gpt": 2 * self.C, "llama": self.C}.get(self.kind.removesuffix("-classes"), 0)
        return last_norm + self.own_head

    @property
    def bottom(self) -> int:
        """Parameters below the blocks: embeddings, and BERT's first norm."""
        if self.llama:
            return self.V * self.C
        tables = (self.V + self.P) * self.C
        return tables if self.gpt else tables + self.S * self.C + 2 * self.C

    @property
    def total(self) -> int:
        return self.bottom + self.L * self.block + self.tail

    @property
    def head(self) -> int:
        """Parameters of a new head: GPT's classifier has no bias, BERT's comes with a pooler."""
        if not self.classes:
            return 0
        if self.gpt:
            return self.C * CLASSES
        return self.C * CLASSES + CLASSES + self.C**2 + self.C


def no_base_tensor(name: str) -> bool:
    return False


@dataclass(frozen=True)
class Row:
    """A method and what it claims.

    start    the output right after attaching: "same" as the base's, bitwise; "near" it; or "other"
    merges   True if the method can be merged into the base's weights
    count    the number of trainable parameters, a new head aside, from the model's sizes
    base     True for the name of a base tensor that trains as well, a new head aside
    on       the models that the method is for
    drops    True if the method has dropout
    still    last names of edit tensors that need not move
    lr       learning rate of the short runs
    caches   True if decoding through the cache works"""

    method: Method
    start: str
    merges: bool
    count: Callable[[Sizes], int]
    base: Callable[[str], bool] = no_base_tensor
    on: tuple[str, ...] = KINDS
    drops: bool = False
    still: tuple[str, ...] = ()
    lr: float = 0.02
    caches: bool = True


# ── small models and batches ─────────────────────────────────────────────────────────────────────────────────────────
def build(kind: str, seed: int = 0) -> Any:
    """A small model of this kind, in eval mode. No entry of its tensors is zero or one."""
    s = Sizes(kind)
    rng = np.random.default_rng(seed + 100)
    if s.gpt:
        model = GPT(GPTConfig(s.V, s.P, s.C, s.L, s.H, s.F), seed)
    elif s.llama:
        sizes = {"vocab": s.V, "positions": s.P, "width": s.C, "layers": s.L, "hidden": s.F}
        model = Llama(LlamaConfig(**sizes, **LLAMA_HEADS, qkv_bias=True), seed)
    else:
        model = BERT(BERTConfig(s.V, s.P, s.S, s.C, s.L, s.H, s.F), seed)
    if s.classes:
        model.new_head(CLASSES, rng)
    for p in model.parameters():
        std = 0.3 if p.ndim > 1 else 0.1
        p.copy_(host(p) + rng.standard_normal(p.shape) * std)
    return model.eval()


def tokens(n: int = 4, T: int = 7, seed: int = 5) -> np.ndarray:
    """Random ids (n, T)."""
    return np.random.default_rng(seed).integers(0, Sizes.V, (n, T))


def batch(kind: str, seed: int, n: int = 4, T: int = 7) -> dict:
    """A batch for fit, with some padding: next tokens, masked tokens or classes, as the model's head wants them."""
    rng = np.random.default_rng(seed)
    ids = tokens(n, T, seed + 50)
    mask = np.ones((n, T), bool)
    mask[-1, T - 2:] = False
    if kind.endswith("classes"):
        return {"ids": ids, "mask": mask, "labels": rng.integers(0, CLASSES, n)}
    if kind in NEXT_TOKEN:
        return {"ids": ids, "mask": mask}
    chosen = mask & (rng.random((n, T)) < 0.4)
    return {"ids": ids, "mask": mask, "labels": np.where(chosen, ids, -100)}


# ── running and comparing ────────────────────────────────────────────────────────────────────────────────────────────
def run(model: Any, ids: Any = None, **facts: Any) -> np.ndarray:
    """The model's output, on the host."""
    with no_grad():
        return host(model(tokens() if ids is None else ids, **facts))


def noise(model: Any, std: float = 0.3, seed: int = 1) -> Any:
    """Move every trainable tensor away from its special start."""
    rng = np.random.default_rng(seed)
    for p in edit.trained(model).values():
        scale = std if p.ndim > 1 else std / 3
        p.copy_(host(p) + rng.standard_normal(p.shape) * scale)
    return model


def put_on(row: Row, kind: str, seed: int = 0) -> tuple[Any, edit.Attached]:
    """A small model with the row's method on it."""
    model = build(kind)
    a = edit.attach(model, row.method, seed=seed)
    return model.eval(), a


def tuned(row: Row, kind: str, std: float = 0.3) -> tuple[Any, edit.Attached]:
    """The same in float64, every trainable tensor at a generic point."""
    model, a = put_on(row, kind)
    return noise(model, std).to(dtype=np.float64).eval(), a


def short_fit(model: Any, kind: str, row: Row, steps: int = 4, decay: float = 0.1, **more: Any) -> AdamW:
    """Train for a few steps; the optimiser that did it."""
    optimizer = AdamW(row.lr, weight_decay=decay)
    fit(model, [batch(kind, 0), batch(kind, 1)], steps, optimizer, progress=False, **more)
    return optimizer


def values(model: Any) -> dict[str, np.ndarray]:
    """Copies of all parameters and buffers by name."""
    return {name: np.array(host(v)) for name, v in model.state_dict().items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """True if the arrays are equal bitwise."""
    return a.shape == b.shape and np.array_equal(a, b)


def all_same(now: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> bool:
    """True if both hold the same names and the same values, bitwise."""
    return now.keys() == before.keys() and all(same(now[name], v) for name, v in before.items())


def near(a: np.ndarray, b: np.ndarray, tol: float = 1e-12) -> bool:
    """True if the arrays are equal to within tol of the largest number; masks must be equal."""
    if a.dtype == bool:
        return same(a, b)
    if a.shape != b.shape:
        return False
    return bool(np.abs(a - b).max() <= tol * max(np.abs(b).max(), 1))


def the_loss(model: Any, b: dict, rng: Any = None) -> Any:
    """The loss of a batch as the trainer forms it, penalties included."""
    ctx, loss = compute_loss(model, read_batch(b), rng)
    for a in edit.attached(model):
        loss = loss + a.method.penalty(a.edits, model, ctx)
    return loss


def begin_step(row: Row, a: edit.Attached) -> None:
    """The method's own work before a step, as the trainer calls it."""
    row.method.begin(a.edits, 0, 10, np.random.default_rng(3))


# ── the checks ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_moves(row: Row, kind: str) -> None:
    """G1: training moves the tensors that the row names, under weight decay; all others stay bitwise."""
    model, _ = put_on(row, kind)
    parameters = edit.base_parameters(model)
    base = {name for name in parameters if row.base(name) or edit.is_head(model, name)}
    assert {name for name, p in parameters.items() if p.requires_grad} == base
    before = values(model)
    short_fit(model, kind, row)
    moved = {name for name, v in values(model).items() if not same(v, before[name])}
    extra = {name for name in moved if not edit.is_in_edit(name)} - base
    assert not extra, f"moved as well: {sorted(extra)}"
    wanted = base | {name for name in model.named_parameters() if edit.is_in_edit(name)}
    key_biases = {name for name in wanted if name.endswith("attn.k.bias")}       # softmax ignores them
    still = {name for name in wanted if name.split(".")[-1] in row.still}
    missing = wanted - moved - key_biases - still
    assert not missing, f"did not move: {sorted(missing)}"


def check_count(row: Row, kind: str) -> None:
    """G2: the number of trainable parameters is the closed form, and so is the size of the base."""
    model, _ = put_on(row, kind)
    s = Sizes(kind)
    c = edit.count(model)
    assert (c.trained, c.head, c.total) == (row.count(s), s.head, s.total)


def check_start(row: Row, kind: str) -> None:
    """G3: right after attaching, the output is the base's, near it, or another, as the row says."""
    base = run(build(kind))
    y = run(put_on(row, kind)[0])
    assert y.shape == base.shape
    away = np.abs(y - base).max()
    claims = {"same": away == 0, "near": 0 < away < 0.02, "other": away > 0.01}
    assert claims[row.start], f"{row.start}, but {away:.2g} away"


def check_gradients(row: Row, kind: str) -> None:
    """G4: gradients agree with central differences, in float64, at a generic point, along random directions."""
    model, a = tuned(row, kind)
    begin_step(row, a)
    b = batch(kind, 2)
    rng = np.random.default_rng(4)
    model.zero_grad()
    the_loss(model, b).backward()
    gradients = {name: p.grad for name, p in edit.trained(model).items()}
    alive = 0
    for name, p in edit.trained(model).items():
        direction = rng.standard_normal(p.shape)
        direction /= np.sqrt((direction * direction).sum())
        g = gradients[name]
        exact = 0.0 if g is None else float((host(g) * direction).sum())
        numeric = directional_derivative(model, p, b, direction)
        alive += abs(exact) > 1e-6
        close = abs(numeric - exact) <= 2e-6 * abs(exact) + 1e-9
        assert close, f"{name}: by differences {numeric:.9g}, by backward {exact:.9g}"
    assert alive, "no gradient at all"


def directional_derivative(model: Any, p: Any, b: dict, direction: np.ndarray, h: float = 1e-4) -> float:
    """The derivative of the loss along a direction of p, by differences whose error is of the fourth order in h."""
    center = np.array(host(p))
    losses = {}
    for step in (h, -h, 2 * h, -2 * h):
        p.copy_(center + step * direction)
        with no_grad():
            losses[step] = float(the_loss(model, b).data)
    p.copy_(center)
    return (8 * (losses[h] - losses[-h]) - (losses[2 * h] - losses[-2 * h])) / (12 * h)


def check_save(row: Row, kind: str) -> None:
    """G5: a saved state, put on another copy of the base, gives the same output and the same state, bitwise.

    The same holds through a file. A state that does not fit is refused, and changes nothing."""
    model, a = put_on(row, kind)
    short_fit(model, kind, row)
    y = run(model)
    saved = edit.state_dict(model, a)
    assert set(saved) == edit_names(a) | set(a.base_values)
    other = build(kind)
    b = edit.attach(other, row.method, seed=9)
    edit.load_state_dict(other, b, saved)
    assert same(run(other.eval()), y)
    assert all_same(edit.state_dict(other, b), saved)
    third = build(kind)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save_adapter(model, folder)
        c = adapters.load_adapter(third, folder, name="third", method=type(row.method))
    assert same(run(third.eval()), y)
    assert describe(c.method) == describe(a.method)
    one_less = dict(list(saved.items())[1:])
    other_shapes = {name: np.zeros(99) for name in saved}
    for bad in ({}, one_less, saved | {"nobody": np.zeros(2)}, other_shapes):
        try:
            edit.load_state_dict(other, b, bad)
        except ValueError:
            assert same(run(other), y)
        else:
            raise AssertionError("a state that does not fit was loaded")


def edit_names(a: edit.Attached) -> set[str]:
    """The names of all tensors and buffers in an adapter; a shared part has the name of its first module."""
    seen = set()
    names = set()
    for path, e in a.edits.items():
        for name, v in {**e.named_parameters(), **e.named_buffers()}.items():
            if id(v) not in seen:
                seen.add(id(v))
                names.add(f"{path}.edits.{a.name}.{name}")
    return names


def check_off_and_on(row: Row, kind: str) -> None:
    """G6: without the method the model is the base, bitwise, under the base's names; with it again, as before."""
    base = build(kind)
    base_output = run(base)
    before = values(base)
    model, a = put_on(row, kind)
    assert set(before) <= set(values(model))
    short_fit(model, kind, row)
    y = run(model)
    state = edit.state_dict(model, a)
    assert not near(y, base_output, 1e-6)

    def is_base() -> bool:
        return all_same(values(model), before) and same(run(model), base_output)

    with edit.without(model):
        assert is_base()
    assert same(run(model), y)
    assert edit.detach(model) is a
    assert is_base()
    assert all(p.requires_grad for p in model.parameters())
    edit.attach(model, a)
    assert same(run(model), y)
    assert all_same(edit.state_dict(model, a), state)


def check_merge(row: Row, kind: str) -> None:
    """G7: the merged model equals the unmerged one to 1e-12; or CannotMerge is raised, and nothing changed.

    The names are the base's. fold writes nothing in place."""
    model, a = tuned(row, kind)
    y = run(model)
    before = values(model)
    for path, e in a.edits.items():
        own = {name: w.data for name, w in edit.base_modules(model)[path].own().items()}
        try:
            e.fold(own)
        except CannotMerge as reason:
            assert str(reason)
        unwritten = all(same(host(w), before[f"{path}.{name}"]) for name, w in own.items())
        assert unwritten, "fold wrote into its argument"
    try:
        edit.merge(model)
    except CannotMerge:
        assert not row.merges
        assert all_same(values(model), before)
        assert same(run(model), y)
    else:
        assert row.merges
        assert set(values(model)) == set(values(build(kind)))
        assert not edit.attached(model)
        assert near(run(model), y)


def check_rows(row: Row, kind: str) -> None:
    """G8: the output of a row of the batch does not depend on the other rows, nor on their order."""
    model, a = tuned(row, kind)
    begin_step(row, a)
    y = run(model)
    order = np.array([2, 0, 3, 1])
    assert near(run(model, tokens()[order]), y[order])
    for i in range(4):
        assert near(run(model, tokens()[i:i + 1]), y[i:i + 1])


def check_optimizer(row: Row, kind: str) -> None:
    """G9: Adam holds two numbers for each trainable parameter, and nothing else."""
    model, _ = put_on(row, kind)
    optimizer = short_fit(model, kind, row)
    trained = edit.trained(model)
    moments = [m for group in optimizer.groups for m in group.moments]
    names = {name for group in optimizer.groups for name in group.tensors}
    assert sum(m.size for m in moments) == 2 * sum(p.size for p in trained.values())
    assert names == set(trained)


def check_dropout(row: Row, kind: str) -> None:
    """G10: dropout acts only if the row says so, while training, and in the branch; eval mode is deterministic."""
    model, _ = put_on(row, kind)
    rng = np.random.default_rng(0)
    y = run(model)
    assert same(run(model, rng=rng), y) and same(run(model), y)
    if row.start == "same":                              # the branch gives zero yet, whatever is dropped from it
        assert same(run(model.train(), rng=rng), y)
    noise(model)
    y = run(model.eval())
    assert same(run(model, rng=rng), y)
    in_training = run(model.train(), rng=rng)
    assert same(in_training, y) != row.drops


def check_learns(row: Row, kind: str) -> None:
    """G11: training lowers the loss of two batches, and the same seed gives the same values."""
    ends = []
    for _ in range(1 if array.backend() == "strict" else 2):               # the double repeats as NumPy does
        model, a = put_on(row, kind)
        pair = [batch(kind, 0), batch(kind, 1)]
        first = evaluate(model, pair)["loss"]
        short_fit(model, kind, row, steps=16, decay=0.0)
        assert evaluate(model, pair)["loss"] < first - 2e-3
        ends.append(edit.state_dict(model, a))
    one, other = ends[0], ends[-1]
    if array.backend() == "cupy":                        # a GPU adds colliding rows in any order
        assert all(near(v, other[name], 1e-4) for name, v in one.items())
    else:
        assert all_same(one, other)


def check_padding(row: Row, kind: str) -> None:
    """Padding on either side changes nothing."""
    model, a = tuned(row, kind)
    begin_step(row, a)
    ids = tokens(4, 5)
    padding = np.full((4, 3), 2)
    real = np.ones((4, 5), bool)
    hidden = np.zeros((4, 3), bool)
    y = run(model, ids)

    def at_text(z: np.ndarray, start: int) -> np.ndarray:
        return z if kind.endswith("classes") else z[:, start:start + 5]

    padded_right = run(model, np.c_[ids, padding], mask=np.c_[real, hidden])
    assert near(at_text(padded_right, 0), y)
    padded_left = run(model, np.c_[padding, ids], mask=np.c_[hidden, real])
    assert near(at_text(padded_left, 3), y)


def check_cache(row: Row, kind: str) -> None:
    """Decoding through the cache, in chunks, equals one pass over the whole; with padding in front too."""
    if kind not in NEXT_TOKEN or not row.caches:
        return
    model, a = tuned(row, kind)
    begin_step(row, a)
    everything_real = np.ones((4, 7), bool)
    padded = everything_real.copy()
    padded[0, :2] = False
    padded[1, :1] = False
    for mask in (None, padded):
        whole = run(model, mask=mask)
        cache = Cache()
        chunks = []
        for start, end in ((0, 3), (3, 4), (4, 7)):
            part = None if mask is None else mask[:, start:end]
            chunks.append(run(model, tokens()[:, start:end], mask=part, cache=cache))
        in_chunks = np.concatenate(chunks, axis=1)
        real = everything_real if mask is None else mask
        assert in_chunks.shape == whole.shape
        assert near(in_chunks[real], whole[real])


def check_recompute(row: Row, kind: str) -> None:
    """With recompute, the gradients of a training step are the same, bitwise."""
    model, a = put_on(row, kind)
    noise(model).train()
    begin_step(row, a)
    gradients = {}
    for on in (False, True):
        model.zero_grad()
        with recompute(on):
            loss = the_loss(model, batch(kind, 2), np.random.default_rng(6))
        loss.backward()
        gradients[on] = {name: host(p.grad) for name, p in edit.trained(model).items() if p.grad is not None}
    assert gradients[True]
    assert all_same(gradients[True], gradients[False])


CHECKS = {
    "moves": check_moves, "count": check_count, "start": check_start, "gradients": check_gradients,
    "save": check_save, "off_and_on": check_off_and_on, "merge": check_merge, "rows": check_rows,
    "optimizer": check_optimizer, "dropout": check_dropout, "learns": check_learns, "padding": check_padding,
    "cache": check_cache, "recompute": check_recompute,
}
