"""Modules, and what one forward pass knows.

    Module    a tree of parts with names.  __call__ is the only place that knows edits exist (edit.py)
    Context   what one forward pass knows: ids, mask, task, cache ...  Handed down as the second argument, never stored
    Packed    a compressed weight in a Parameter's place
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import array, ops
from .array import Array, xp
from .tensor import Tensor, no_grad, op


class Context:
    """What one forward pass knows.  Made by the outermost call from its keywords, `model(ids, mask=...)`, or by the caller.

    ids     (B, T) integers             mask   (B, T) True where a token is real; None: all are
    types   (B, T) BERT's segments      at     places in the flattened (B T) rows where the head is wanted; None: all
    task    (B,) task ids               route  (B,) adapter names                          source  the encoder's Context
    cache   a Cache, to go on from      rng    numpy Generator; dropout acts where one is given and the module is training
    output_hidden_states    True: `layers` collects the hidden state before the first block and after each

    When the pass is over, `hidden` holds the last hidden states and `out` the output; `notes` is where edits of one pass leave
    each other things.  Facts about rows (ids, mask, types) stay aligned with x: an edit that prepends rows calls `prepend`.
    """

    def __init__(self, ids: Any = None, mask: Any = None, token_type_ids: Any = None, logit_positions: Any = None, task: Any = None, route: Any = None,
                 source: Context | None = None, cache: Cache | None = None, rng: np.random.Generator | None = None,
                 output_hidden_states: bool = False, **more: Any):
        self.inputs = dict(ids=ids, mask=mask, token_type_ids=token_type_ids, logit_positions=logit_positions, task=task, route=route, source=source, cache=cache, rng=rng,
                          output_hidden_states=output_hidden_states, **more)
        vars(self).update(self.inputs)
        self.scratch, self.hidden_states, self.last_hidden_state, self.output = {}, [], None, None

    def __getattr__(self, fact: str) -> Any:
        raise AttributeError(f"this forward pass was not told its {fact!r}: call model(ids, {fact}=...)")

    def need(self, fact: str) -> Any:
        "The fact, or an error that says how to give it."
        if vars(self).get(fact) is None:
            self.__getattr__(fact)
        return vars(self)[fact]

    def again(self, **more: Any) -> Context:
        "The same batch as it was given, for another pass (a teacher, the base).  Without the generator: such a pass has no dropout."
        source = self.inputs["source"]
        return Context(**{**self.inputs, "source": source and source.again(), "rng": None, **more})

    def begin(self, x: Any, like: Array) -> None:
        "The model's first line: put the facts beside its weights.  x is (B, T) ids, or (B, T, C) embeddings in their place."
        self.inputs["ids"] = x
        if isinstance(x, Tensor):
            self.ids = xp(like).full(x.shape[:2], -1)
        else:
            self.ids = array.put_like(x, like)
        if self.ids.ndim != 2:
            raise ValueError(f"a model wants ids of shape (B, T) or embeddings (B, T, C); got shape {tuple(x.shape)}")
        for fact, dtype in (("mask", bool), ("token_type_ids", None), ("logit_positions", None), ("task", None)):
            value = vars(self)[fact]
            if value is not None:
                value = array.put_like(value, like, dtype)
                if fact in ("mask", "token_type_ids") and value.shape != self.ids.shape:
                    raise ValueError(f"{fact} has shape {value.shape}, the ids {self.ids.shape}: they go together, one for one")
                setattr(self, fact, value)

    def prepend(self, p: int) -> None:
        "Say that x grew by p rows in front: real, and no token."
        def lead(a: Array, value: Any) -> Array:
            return None if a is None else xp(a).concatenate([xp(a).full((len(a), p), value, a.dtype), a], axis=1)
        self.ids, self.mask, self.token_type_ids = lead(self.ids, -1), lead(self.mask, True), lead(self.token_type_ids, 0)

    @property
    def past_length(self) -> int:
        "How many rows the cache holds already."
        return 0 if self.cache is None else self.cache.length

    def key_mask(self) -> Array | None:
        "(B, Tk) True where a key is real, cached ones first; None if all are."
        old = None if self.cache is None else self.cache.mask
        if not self.past_length or (old is None and self.mask is None):
            return self.mask
        m, (B, T) = xp(self.ids), self.ids.shape
        full = [a if a is not None else m.ones((B, n), dtype=bool) for a, n in ((old, self.past_length), (self.mask, T))]
        return m.concatenate(full, axis=1)

    def positions(self) -> Array:
        "(B, T) or (1, T): the place of each token among the real ones of its row.  Right under padding on either side."
        keys, m, T = self.key_mask(), xp(self.ids), self.ids.shape[1]
        if keys is None:
            return m.arange(self.past_length, self.past_length + T)[None]
        return m.maximum(m.cumsum(keys.astype(np.int64), axis=1) - 1, 0)[:, -T:]

    def select_positions(self, x: Tensor) -> Tensor:
        "The rows of x the head is wanted at: (B, T, C) -> (B, T, C), or (n, C) where `at` names n places."
        return x if self.logit_positions is None else x.reshape(-1, x.shape[-1])[self.logit_positions]


class Cache:
    "Keys and values of the rows seen so far, per attention module."

    def __init__(self) -> None:
        self.kv: dict[Any, tuple[Tensor, Tensor]] = {}
        self.mask, self.length = None, 0

    def join(self, key: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        "These keys and values after those kept under `key`; both (B, H, T, D).  Kept for the next call."
        if key in self.kv:
            k, v = (ops.concatenate(a, b, axis=2) for a, b in zip(self.kv[key], (k, v)))
        self.kv[key] = k, v
        return k, v

    def advance(self, ctx: Context) -> None:
        "The pass is over: its rows belong to the past."
        self.mask, self.length = ctx.key_mask(), self.length + ctx.ids.shape[1]

    def rows(self, i: Array) -> Cache:
        "The cache of some rows only: what beam search does with the survivors."
        c = Cache()
        c.kv = {key: (k[i], v[i]) for key, (k, v) in self.kv.items()}
        c.mask, c.length = None if self.mask is None else self.mask[i], self.length
        return c


class Parameter(Tensor):
    "A tensor that trains: what a module owns."
    __slots__ = ()

    def __init__(self, data: Any, decay: bool | None = None):
        super().__init__(data, requires_grad=True, decay=decay)


class Module:
    """A part of a model, made of Parameters, arrays (buffers), Modules, and lists and dicts of these, under their attribute names.

    A leading underscore marks a reference to someone else's part: it is used, not walked.  Subclasses write forward(x, ctx)."""
    edits: dict[str, Any] = {}                           # adapter name -> Edit; see edit.py
    training, tied = False, False                        # tied: the weight is also the output layer's

    def __call__(self, x: Any, ctx: Context | None = None, **about: Any) -> Any:
        ctx = Context(**about) if ctx is None else ctx
        for e in self.edits.values():
            x = e.before(x, ctx)
        y = self.forward(x, ctx)
        for e in self.edits.values():
            y = e.after(x, y, ctx)
        return y

    def forward(self, x: Any, ctx: Context) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def read(self, name: str) -> Any:
        "The module's own tensor, through its edits.  Every forward, and a tied head, reads it here."
        p = getattr(self, name)
        for e in self.edits.values():
            p = e.tensor(name, p)
        return p

    # ── the tree ──
    def parts(self) -> Iterator[tuple[str, Any]]:
        "(name, value) of every attribute, lists and dicts opened."
        for k, v in vars(self).items():
            if k[0] == "_":
                continue
            inner = enumerate(v) if isinstance(v, list) else v.items() if isinstance(v, dict) else [(None, v)]
            for j, c in inner:
                yield (k if j is None else f"{k}.{j}"), c

    def named_modules(self, path: str = "") -> Iterator[tuple[str, Module]]:
        yield path, self
        for k, c in self.parts():
            if isinstance(c, Module):
                yield from c.named_modules(f"{path}.{k}" if path else k)

    def modules(self) -> Iterator[Module]:
        return (m for _, m in self.named_modules())

    def own(self, kind: Any = Tensor) -> dict[str, Any]:
        "The module's own tensors (or buffers), not its parts'."
        match = array.is_array if kind is Array else lambda v: isinstance(v, kind)
        return {k: v for k, v in self.parts() if match(v)}

    def _named(self, kind: Any) -> dict[str, Any]:
        "By full name; what is shared appears once, under its first name."
        first: dict[int, tuple[str, Any]] = {}
        for path, m in self.named_modules():
            for k, v in m.own(kind).items():
                first.setdefault(id(v), (f"{path}.{k}" if path else k, v))
        return dict(first.values())

    def named_parameters(self) -> dict[str, Tensor]:
        return self._named(Tensor)

    def parameters(self) -> list[Tensor]:
        return list(self._named(Tensor).values())

    def named_buffers(self) -> dict[str, Array]:
        return self._named(Array)

    # ── state ──
    def train(self, on: bool = True) -> Module:
        for m in self.modules():
            m.training = on
        return self

    def eval(self) -> Module:
        return self.train(False)

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None

    def state_dict(self) -> dict[str, Array]:
        "Name -> array, of every parameter and buffer: the arrays themselves, not copies."
        return {n: p.data for n, p in self.named_parameters().items()} | self.named_buffers()

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Copy arrays in by name.  strict: every name must be there and no other.  On any mismatch a KeyError or ShapeError lists
        the names, and nothing is changed."""
        here = self.named_parameters() | self.named_buffers()
        missing, extra = [n for n in here if n not in state], [n for n in state if n not in here]
        if strict and (missing or extra):
            more = " ..." * (len(missing) > 5 or len(extra) > 5)
            raise KeyError(f"names do not match: missing {missing[:5]}, unexpected {extra[:5]}{more}")
        wrong = [f"{n}: {tuple(state[n].shape)} for {tuple(p.shape)}" for n, p in here.items() if n in state and state[n].shape != p.shape]
        if wrong:
            raise ValueError("shapes do not match: " + "; ".join(wrong[:5]))
        for n, p in here.items():
            if n in state and isinstance(p, Tensor):
                p.copy_(state[n])
            elif n in state:
                p[...] = array.put_like(state[n], p, p.dtype)

    def to(self, backend: str | None = None, dtype: Any = None) -> Module:
        "Move every parameter and buffer to a backend, and floating-point ones to a dtype.  In place; shared ones stay shared."
        done: dict[int, tuple[Array, Array]] = {}                                # the old one too, so that no id is given out twice

        def moved(a: Any) -> Any:
            if not array.is_array(a):
                return a
            if id(a) not in done:
                b = a if backend is None else array.to(a, backend)
                done[id(a)] = b.astype(dtype) if dtype is not None and b.dtype.kind in "fV" else b, a
            return done[id(a)][0]
        for p in self.parameters():
            p.data, p.mask, p.grad = moved(p.data), moved(p.mask), None
        for m in {id(m): m for m in self.modules()}.values():
            for k, v in list(vars(m).items()):
                if k[0] == "_":
                    continue
                if isinstance(v, list):
                    v[:] = map(moved, v)
                elif isinstance(v, dict):
                    v.update({j: moved(c) for j, c in v.items()})
                else:
                    setattr(m, k, moved(v))
        return self


class Packed(Module):
    """A compressed weight in a Parameter's place.  Its arrays (codes, scales) are buffers.  Subclasses give `shape` and dequantize()."""
    shape: tuple

    def dequantize(self) -> Array:
        "The dense weight, (out, in)."
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.own(Array).values())

    def matmul(self, x: Tensor) -> Tensor:
        "x Wᵀ.  x (..., in) -> (..., out).  The dense weight is made anew for the gradient of x, not kept."
        return _packed_linear(x, packed=self)


@op("... k -> ... n")
def _packed_linear(x, packed=None):
    "y = x Wᵀ with W made from its codes.    dx = g W, W made again"
    W = packed.dequantize()
    shape, y = x.shape, (ops.flat(x) @ W.T).reshape(*x.shape[:-1], W.shape[0])
    return y, (lambda g: (ops.flat(g) @ packed.dequantize()).reshape(shape),)


class Linear(Module):
    "y = x Wᵀ + b.    W (out, in) ~ N(0, std²),  b (out,) = 0,  x (..., in) -> (..., out)"

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator, bias: bool = True, std: float = 0.02):
        self.weight: Any = Parameter(array.normal(rng, (out_features, in_features), std))
        self.bias = Parameter(array.asarray(np.zeros(out_features, np.float32))) if bias else None

    in_features, out_features = property(lambda self: self.weight.shape[1]), property(lambda self: self.weight.shape[0])

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        W, b = self.read("weight"), None if self.bias is None else self.read("bias")
        if isinstance(W, Packed):
            y = W.matmul(x)
            return y if b is None else y + b
        return ops.linear(x, W, b)


class Embedding(Module):
    "Rows of W by number.    W (V, C) ~ N(0, std²),  ids (...) -> (..., C).  Embeddings given in place of ids pass through."

    def __init__(self, rows: int, c: int, rng: np.random.Generator, std: float = 0.02):
        self.weight: Any = Parameter(array.normal(rng, (rows, c), std))

    in_features, out_features = property(lambda self: self.weight.shape[0]), property(lambda self: self.weight.shape[1])

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        return ids if isinstance(ids, Tensor) else ops.embedding(self.read("weight"), ids)


class TiedHead(Module):
    "logits = x Eᵀ (+ b), E the embedding's weight, read through the embedding's edits.    (..., C) -> (..., V)"

    def __init__(self, embed: Embedding, bias: bool = False):
        self._embed, embed.tied = embed, True
        self.bias = Parameter(array.asarray(np.zeros(embed.in_features, np.float32))) if bias else None

    in_features, out_features = property(lambda self: self._embed.out_features), property(lambda self: self._embed.in_features)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ops.linear(x, self._embed.read("weight"), None if self.bias is None else self.read("bias"))


class LayerNorm(Module):
    "y = w (x − μ)/σ + b over the last axis.    w = 1, b = 0, both (C,)"

    def __init__(self, c: int, eps: float = 1e-5):
        self.weight = Parameter(array.asarray(np.ones(c, np.float32)), decay=False)
        self.bias, self.eps = Parameter(array.asarray(np.zeros(c, np.float32)), decay=False), eps

    in_features = out_features = property(lambda self: self.weight.shape[0])

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ops.layer_norm(x, self.read("weight"), self.read("bias"), eps=self.eps)


class Dropout(Module):
    "Zero entries with probability p and scale the rest by 1/(1 − p); only while training, and only in a pass that was given a generator."

    def __init__(self, p: float):
        if not 0 <= p < 1:
            raise ValueError(f"dropout wants 0 <= p < 1, got {p}")
        self.p = p

    def key(self, ctx: Context) -> Any:
        "What this call's noise is made from; None if there is to be none.  Of a captured step it lies on the device."
        return ctx.rng.integers(2**63) if self.training and self.p and ctx.rng is not None else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        key = self.key(ctx)
        return x if key is None else ops.dropout(x, self.p, key)


__all__ = ["Context", "Cache", "Parameter", "Module", "Packed", "Linear", "Embedding", "TiedHead", "LayerNorm", "Dropout", "no_grad"]
