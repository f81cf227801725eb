"""Lesson 07: what an adapter computes, its first weights, and the norms that train with it."""
from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from tinyft import BERT, GPT, BERTConfig, Context, Edit, GPTConfig, Houlsby, Module, Parameter, ops
from tinyft.array import asarray
from tinyft.edit import base_modules, base_parameters, inside
from tinyft.learn.diagnose import Unusable, close, described
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import sizes
from tinyft.methods.additive.houlsby import Bottleneck
from tinyft.nn import LayerNorm, Linear, RMSNorm
from tinyft.tensor import Tensor

# ── after ─────────────────────────────────────────────────────────────────────────────────────────
after = Exercise(
    "methods.additive.houlsby:Bottleneck.after", difficulty=1, minutes=10,
    may_use="self.down and self.up, which are called like functions: self.down(y, ctx); ops.gelu; "
            "+ on Tensors.",
    example="""
        >>> from tinyft.methods.additive.houlsby import Bottleneck
        >>> adapter = Bottleneck(2, 1, std=0.01, rng=np.random.default_rng(0))
        >>> adapter.down.weight.data[:] = [[1, 1]]
        >>> adapter.up.weight.data[:] = [[1], [0]]
        >>> y = Tensor([[1.0, 2.0]])                  # down: 1 + 2 = 3;  gelu(3) = 2.996
        >>> after(adapter, None, y, Context()).numpy().round(3)
        array([[3.996, 2.   ]], dtype=float32)
        """,
    hints=(
        "The adapter computes a small correction from y. Then it adds the correction to y.",
        "The correction has three steps: down makes m numbers out of C, gelu bends them, up makes "
        "C numbers out of m.",
        "down is called as self.down(y, ctx), and up in the same way. ops.gelu takes a Tensor and "
        "no ctx."))


def adapter_of(down, up, down_bias=None, up_bias=None):
    """A Bottleneck with these weights, float64: down (m, C), up (C, m)."""
    m, width = down.shape
    made = Bottleneck(width, m, 0.01, np.random.default_rng(0))
    made.down.weight = Parameter(down)
    made.up.weight = Parameter(up)
    made.down.bias = Parameter(np.zeros(m) if down_bias is None else down_bias)
    made.up.bias = Parameter(np.zeros(width) if up_bias is None else up_bias)
    return made


def gelu(z):
    return ops.gelu(Tensor(z)).numpy()


@after.law("with zeros in up, the output is y", x="t c", y="t c", down="m c")
def _(f, x, y, down):
    out = f(adapter_of(down, 0 * down.T), Tensor(x), Tensor(y), Context())
    guesses = {"y is missing: an adapter adds its result to y": 0 * y,
               "it is x, the module's input; the adapter adds to y, the module's output": x,
               "gelu is applied to y itself; the path past the adapter has no nonlinearity":
                   gelu(y)}
    close(out, y, "the output", guesses)


@after.law("y + up(gelu(down(y)))", x="t c", y="t c", down="m c", up="c m")
def _(f, x, y, down, up):
    out = f(adapter_of(down, up), Tensor(x), Tensor(y), Context())
    z = y @ down.T                                                  # (t, m)
    guesses = {
        "gelu comes after up; it belongs between down and up": y + gelu(z @ up.T),
        "down reads x, the module's input; it reads y, the module's output":
            y + gelu(x @ down.T) @ up.T,
        "there is no nonlinearity: gelu belongs between down and up": y + z @ up.T,
        "gelu comes before down; it belongs between down and up": y + (gelu(y) @ down.T) @ up.T,
        "it is relu where gelu is expected": y + np.maximum(z, 0) @ up.T,
        "it is gelu_tanh, an approximation, where gelu is expected":
            y + ops.gelu_tanh(Tensor(z)).numpy() @ up.T,
    }
    close(out, y + gelu(z) @ up.T, "the output", guesses)


@after.law("down and up add their biases", y="t c", down="m c", up="c m", down_bias="m",
           up_bias="c")
def _(f, y, down, up, down_bias, up_bias):
    out = f(adapter_of(down, up, down_bias, up_bias), Tensor(y), Tensor(y), Context())
    z = y @ down.T
    guesses = {"the biases are left out: call self.down and self.up, they add theirs":
                   y + gelu(z) @ up.T}
    close(out, y + gelu(z + down_bias) @ up.T + up_bias, "the output", guesses)


@after.law("any axes in front; x may have another width", x="... k", y="... c", down="m c",
           up="c m")
def _(f, x, y, down, up):
    out = f(adapter_of(down, up), Tensor(x), Tensor(y), Context())
    close(out, y + gelu(y @ down.T) @ up.T, "the output")


class Listening(Linear):
    """A Linear that keeps the ctx of its last call."""
    last_ctx = None

    def forward(self, x, ctx):
        self.last_ctx = ctx
        return super().forward(x, ctx)


@after.law("down and up get the ctx", y="t c")
def _(f, y):
    width = y.shape[1]
    adapter = adapter_of(np.ones((1, width)), np.ones((width, 1)))
    adapter.down = Listening(width, 1, rng=np.random.default_rng(0))
    adapter.up = Listening(1, width, rng=np.random.default_rng(0))
    ctx = Context()
    f(adapter, Tensor(asarray(y)), Tensor(asarray(y)), ctx)
    for name in ("down", "up"):
        if getattr(adapter, name).last_ctx is not ctx:
            raise Unusable(f"self.{name} did not get the ctx: write self.{name}(..., ctx)")


@after.law("gradients reach y, down and up", y="t c", down="m c", up="c m", g="t c")
def _(f, y, down, up, g):
    adapter = adapter_of(down, up)
    leaf = Tensor(y, requires_grad=True)
    out = f(adapter, Tensor(y), leaf, Context())
    if not isinstance(out, Tensor) or not out.requires_grad:
        raise Unusable("the output has no gradient: it was computed from arrays; "
                       "compute with Tensors, without .data and .numpy()")
    out.backward(g)
    z = Tensor(y @ down.T, requires_grad=True)
    ops.gelu(z).backward(g @ up)
    through = np.asarray(z.grad) @ down
    guesses = {"the path past the adapter is missing": through,
               "the path through the adapter is missing": g}
    close(leaf.grad, g + through, "the gradient of y", guesses)
    close(adapter.down.weight.grad, np.asarray(z.grad).T @ y, "the gradient of down.weight")
    close(adapter.up.weight.grad, g.T @ gelu(y @ down.T), "the gradient of up.weight")


@after.wrong_answer("The nonlinearity comes at the end.", says="after up")
def _(self, x, y, ctx):
    return y + ops.gelu(self.up(self.down(y, ctx), ctx))


@after.wrong_answer("An adapter is one more layer: its output is the new output.",
                    says="y is missing")
def _(self, x, y, ctx):
    return self.up(ops.gelu(self.down(y, ctx)), ctx)


@after.wrong_answer("An adapter reads what the module reads.", says="down reads x")
def _(self, x, y, ctx):
    return y + self.up(ops.gelu(self.down(x, ctx)), ctx)


@after.wrong_answer("A residual connection adds the input of the module.", says="it is x")
def _(self, x, y, ctx):
    return x + self.up(ops.gelu(self.down(y, ctx)), ctx)


@after.wrong_answer("Two linear maps with a bottleneck between them are an adapter.",
                    says="no nonlinearity")
def _(self, x, y, ctx):
    return y + self.up(self.down(y, ctx), ctx)


@after.wrong_answer("The activation comes first, as in a pre-activation network.",
                    says="before down")
def _(self, x, y, ctx):
    return y + self.up(self.down(ops.gelu(y), ctx), ctx)


@after.wrong_answer("The sum is what the nonlinearity is for.", says="applied to y itself")
def _(self, x, y, ctx):
    return ops.gelu(y + self.up(self.down(y, ctx), ctx))


@after.wrong_answer("One nonlinearity is as good as another.", says="relu")
def _(self, x, y, ctx):
    return y + self.up(ops.relu(self.down(y, ctx)), ctx)


@after.wrong_answer("GELU is GPT-2's formula with tanh.", says="gelu_tanh")
def _(self, x, y, ctx):
    return y + self.up(ops.gelu_tanh(self.down(y, ctx)), ctx)


@after.wrong_answer("The biases are zero, so they can be left out.", says="biases are left out")
def _(self, x, y, ctx):
    return y + ops.gelu(y @ self.down.weight.T) @ self.up.weight.T


@after.wrong_answer("A forward pass needs values only.", says="no gradient", subtle=True)
def _(self, x, y, ctx):
    return Tensor(Bottleneck.after(self, x, y, ctx).data)


@after.wrong_answer("ctx is for dropout, and there is none here.", says="did not get the ctx",
                    subtle=True)
def _(self, x, y, ctx):
    return y + self.up(ops.gelu(self.down(y)))


# ── truncated_normal ──────────────────────────────────────────────────────────────────────────────
truncated_normal = Exercise(
    "methods.additive.houlsby:truncated_normal", difficulty=2, minutes=15, on_host=True,
    may_use="rng.standard_normal(shape), which draws from N(0, 1); NumPy; comparisons as indices: "
            "z[far] = ... writes where far is True.",
    example="""
        >>> rng = np.random.default_rng(0)
        >>> z = truncated_normal(rng, (100, 100), 0.5)
        >>> z.shape, bool(abs(z).max() <= 1.0), round(float(z.std()), 2)
        ((100, 100), True, 0.44)
        """,
    hints=(
        "Draw all numbers from N(0, 1) first. About one in twenty lies beyond 2 or -2. Only these "
        "are drawn again.",
        "far = abs(z) > 2 marks them. z[far] = rng.standard_normal(far.sum()) draws that many new "
        "numbers. One in twenty of the new ones lies beyond, too: so this is a loop.",
        "while far.any(): draw again where far is True, and compute far again. At the end multiply "
        "by std."))
N = 20_000                                                          # numbers in a sample


def draw(f, std, shape=(N,), seed=0):
    """The array that f draws; Unusable if it is none of float64, with this shape."""
    z = f(np.random.default_rng(seed), shape, std)
    if not isinstance(z, np.ndarray):
        raise Unusable(f"the result should be a NumPy array; yours is {described(z)}")
    if z.shape != shape:
        raise Unusable(f"the result should have the shape {shape}; yours has {z.shape}")
    close(np.asarray(z.dtype == np.float64), np.asarray(True), "whether the array is float64")
    return z


@truncated_normal.law("the result is a float64 array of the given shape",
                      shape=st.lists(sizes(), min_size=1, max_size=3), std=st.integers(1, 3))
def _(f, shape, std):
    draw(f, float(std), tuple(shape))


@truncated_normal.law("no number lies beyond ±2 std", std=st.sampled_from((1.0, 0.5, 2.0, 0.01)))
def _(f, std):
    z = draw(f, std)
    if not np.isfinite(z).all():
        raise Unusable("some numbers are nan or infinite")
    beyond = int((abs(z) > 2 * std).sum())
    if not beyond:
        return
    if (abs(draw(f, 1.0)) > 2).any():
        again = "; a number that is drawn again may lie beyond, too" if beyond < N / 100 else ""
        raise Unusable(f"{beyond} of {N:,} numbers lie beyond ±2 std{again}")
    raise Unusable(f"{beyond} of {N:,} numbers lie beyond ±2 std for std = {std}: the limit is "
                   "right for std = 1 only; it is 2 std")


@truncated_normal.law("a number beyond is drawn again, not moved",
                      std=st.sampled_from((1.0, 0.5, 2.0, 0.01)))
def _(f, std):
    values, counts = np.unique(draw(f, std), return_counts=True)
    if counts.max() == 1:
        return
    often = values[counts > 1]
    if (abs(often) > 1.99 * std).all():
        raise Unusable(f"{counts[counts > 1].sum()} of {N:,} numbers are exactly 2 std or -2 std: "
                       "they were clipped; a number beyond is drawn again")
    raise Unusable(f"{counts.max()} of {N:,} numbers are exactly {values[counts.argmax()]:g}: "
                   "a number beyond is drawn again, by a draw of its own")


def inside_share(k):
    """The share of numbers within k σ, for N(0, σ²) without the numbers beyond 2σ."""
    return math.erf(k / 2**0.5) / math.erf(2 / 2**0.5)


@truncated_normal.law("inside, the numbers are those of N(0, std²)",
                      std=st.sampled_from((1.0, 0.5, 2.0, 0.01)))
def _(f, std):
    z = draw(f, std) / std
    negative = (z < 0).mean()
    if abs(negative - 0.5) > 0.03:
        raise Unusable(f"{100 * negative:.0f} % of the numbers are negative, expected about 50 %")
    for k in (0.5, 1.0, 1.5):
        share = (abs(z) < k).mean()
        if abs(share - inside_share(k)) > 0.02:
            raise Unusable(f"for std = {std}, {100 * share:.0f} % of the numbers lie within "
                           f"{k} std, expected about {100 * inside_share(k):.0f} %: the numbers "
                           "that were not beyond must keep their distribution")


@truncated_normal.law("all numbers come from rng", seed=st.integers(0, 9))
def _(f, seed):
    first = draw(f, 1.0, (50,), seed)
    if not np.array_equal(first, draw(f, 1.0, (50,), seed)):
        raise Unusable("the same seed gives other numbers in the second call: draw from rng only")
    if np.array_equal(first, draw(f, 1.0, (50,), seed + 1)):
        raise Unusable("another seed gives the same numbers: draw from rng, which was passed in")


@truncated_normal.wrong_answer("Truncated means clipped.", says="clipped")
def _(rng, shape, std):
    return np.clip(rng.standard_normal(shape), -2, 2) * std


@truncated_normal.wrong_answer("Numbers beyond are set to 0.", says="exactly 0")
def _(rng, shape, std):
    z = np.asarray(rng.standard_normal(shape))
    return np.where(abs(z) > 2, 0.0, z) * std


@truncated_normal.wrong_answer("One more draw is enough.", says="drawn again may lie beyond")
def _(rng, shape, std):
    z = np.asarray(rng.standard_normal(shape))
    return np.where(abs(z) > 2, rng.standard_normal(shape), z) * std


@truncated_normal.wrong_answer("A normal distribution with a small σ has no large numbers.",
                               says="beyond ±2 std")
def _(rng, shape, std):
    return np.asarray(rng.standard_normal(shape)) * std


def redrawn(rng, shape, std, limit):
    """Numbers from N(0, std²), drawn again while they lie beyond the limit."""
    z = np.asarray(rng.standard_normal(shape)) * std
    far = abs(z) > limit
    while far.any():
        z[far] = rng.standard_normal(int(far.sum())) * std
        far = abs(z) > limit
    return z


@truncated_normal.wrong_answer("The limit is 2.", says="right for std = 1 only")
def _(rng, shape, std):
    return redrawn(rng, shape, std, 2 * max(std, 1.0))


@truncated_normal.wrong_answer("The limit is one standard deviation.", says="within 0.5 std")
def _(rng, shape, std):
    return redrawn(rng, shape, std, std)


@truncated_normal.wrong_answer("Any distribution between the limits will do.", says="within")
def _(rng, shape, std):
    return np.asarray(rng.uniform(-2 * std, 2 * std, shape))


@truncated_normal.wrong_answer("Divide by the largest: then all lie inside.", says="within")
def _(rng, shape, std):
    z = np.asarray(rng.standard_normal(shape))
    return z / abs(z).max() * 2 * std


@truncated_normal.wrong_answer("σ² is the number that the formula names.", says="within")
def _(rng, shape, std):
    return redrawn(rng, shape, min(std, std**2), 2 * std)


@truncated_normal.wrong_answer("Weights are positive.", says="negative", subtle=True)
def _(rng, shape, std):
    return abs(redrawn(rng, shape, std, 2 * std))


@truncated_normal.wrong_answer("Any generator is random.", says="another seed", subtle=True)
def _(rng, shape, std):
    return redrawn(np.random.default_rng(0), shape, std, 2 * std)


@truncated_normal.wrong_answer("A generator made here is as good.", says="the same seed",
                               subtle=True)
def _(rng, shape, std):
    return redrawn(np.random.default_rng(), shape, std, 2 * std)


@truncated_normal.wrong_answer("Weights are float32, so the array is.", says="float64")
def _(rng, shape, std):
    return redrawn(rng, shape, std, 2 * std).astype(np.float32)


# ── trains ────────────────────────────────────────────────────────────────────────────────────────
trains = Exercise(
    "methods.additive.houlsby:Houlsby.trains", difficulty=3, minutes=20,
    may_use="self.norms; model.top_modules, the paths of the modules above the blocks; "
            "base_modules(model), a dict {path: module}, and base_parameters(model), a dict "
            "{name: tensor}, both without edits; sublayers(model), a dict {path of a sublayer: "
            "path of its norm}; inside(name, paths), True if the name lies below one of the paths, "
            "but not for a path itself; isinstance with LayerNorm and RMSNorm.",
    example="""
        >>> from tinyft import GPT, GPTConfig, Houlsby
        >>> model = GPT(GPTConfig(vocab=4, positions=4, width=2, layers=1, heads=1))
        >>> for name in sorted(trains(Houlsby(), model)): print(name)
        blocks.0.norm1.bias
        blocks.0.norm1.weight
        blocks.0.norm2.bias
        blocks.0.norm2.weight
        norm.bias
        norm.weight
        """,
    hints=(
        "First find the paths of the norms, then the names of the tensors inside them.",
        "sublayers(model).values() are the norms that the blocks name. Of base_modules(model) take "
        "those that are a LayerNorm or an RMSNorm, and are not inside one of model.top_modules.",
        "inside('blocks.0.norm1.bias', {'blocks.0.norm1'}) is True. So the result is the set of "
        "the names in base_parameters(model) that are inside one of the paths."))


def small_gpt(layers=1):
    return GPT(GPTConfig(vocab=4, positions=4, width=2, layers=layers, heads=1))


def small_bert(layers=1, pooler=False):
    config = BERTConfig(vocab=8, positions=4, width=2, layers=layers, heads=1)
    return BERT(config, pooler=pooler)


def names_of(f, method, model):
    """The set that f returns; Unusable if it is none, or holds the path of a module."""
    got = f(method, model)
    if not isinstance(got, (set, frozenset)):
        raise Unusable(f"the result should be a set of names; yours is {described(got)}")
    modules = sorted(str(n) for n in got if n in base_modules(model))
    if modules:
        raise Unusable(f"{modules[0]!r} is the path of a module; return the names of its tensors, "
                       f"such as {modules[0]}.weight")
    return got


def same_names(got, want, why):
    """Unusable, with the first name that is missing or too many, unless the sets are equal.

    why: {part of a name: reason}, in words after the name."""
    for name in sorted(want - got):
        sibling = name.replace(".bias", ".weight")
        if sibling != name and sibling in got:
            raise Unusable(f"{name} is missing: a layer norm has a weight and a bias, both train")
        raise Unusable(f"{name} is missing{reason(name, why)}")
    for name in sorted(got - want):
        raise Unusable(f"{name} should not be in the set{reason(name, why)}")


def reason(name, why):
    found = [text for part, text in (why or {}).items() if part in name]
    return f": {found[0]}" if found else ""


def block_norms(layers):
    return {f"blocks.{i}.{norm}.{tensor}" for i in range(layers) for norm in ("norm1", "norm2")
            for tensor in ("weight", "bias")}


@trains.law("GPT: the weight and the bias of every layer norm", layers=st.integers(1, 2))
def _(f, layers):
    got = names_of(f, Houlsby(), small_gpt(layers))
    why = {"blocks.": "the norms of every block train",
           "norm.": "the last norm is itself one of model.top_modules, not inside one of them: "
                    "look at the path of the module, not at the names of its tensors"}
    same_names(got, block_norms(layers) | {"norm.weight", "norm.bias"}, why)


@trains.law("BERT: the norm inside the head does not train", layers=st.integers(1, 2))
def _(f, layers):
    got = names_of(f, Houlsby(), small_bert(layers))
    why = {"head": "it is inside the head", "norm0": "the norm of the embeddings is one, too",
           "blocks.": "the norms of every block train"}
    same_names(got, block_norms(layers) | {"norm0.weight", "norm0.bias"}, why)


@trains.law("a norm inside the pooler does not train", layers=st.integers(1, 2))
def _(f, layers):
    model = small_bert(layers, pooler=True)
    model.pooler.norm = LayerNorm(2)
    why = {"pooler": "it is inside the pooler, which is in model.top_modules"}
    same_names(names_of(f, Houlsby(), model),
               block_norms(layers) | {"norm0.weight", "norm0.bias"}, why)


@trains.law("norms=False: the empty set", layers=st.integers(1, 2))
def _(f, layers):
    why = {"norm": "self.norms is False"}
    same_names(names_of(f, Houlsby(norms=False), small_gpt(layers)), set(), why)


@trains.law("a name tells nothing: the class of the module decides", layers=st.integers(1, 2))
def _(f, layers):
    model = small_gpt(layers)
    model.blocks[0].attn.scale = LayerNorm(2)
    model.blocks[0].attn.normal = Linear(2, 2, rng=np.random.default_rng(0))
    want = block_norms(layers) | {"norm.weight", "norm.bias", "blocks.0.attn.scale.weight",
                                  "blocks.0.attn.scale.bias"}
    why = {"scale": "it is a LayerNorm, whatever its name is", "normal": "it is a Linear"}
    same_names(names_of(f, Houlsby(), model), want, why)


@trains.law("an RMSNorm is a layer norm, too", layers=st.integers(1, 2))
def _(f, layers):
    model = small_gpt(layers)
    model.norm = RMSNorm(2)
    model.blocks[0].norm1 = RMSNorm(2)
    want = block_norms(layers) - {"blocks.0.norm1.bias"} | {"norm.weight"}
    why = {"norm": "an RMSNorm is a layer norm, too"}
    same_names(names_of(f, Houlsby(), model), want, why)


class Scale(Module):
    """y = w x: a norm of a class of its own."""

    def __init__(self, width):
        self.w = Parameter(np.ones(width))

    def forward(self, x, ctx):
        return x * self.w


@trains.law("the norm of a sublayer trains, of whatever class", layers=st.integers(1, 2))
def _(f, layers):
    model = small_gpt(layers)
    model.blocks[0].norm2 = Scale(2)
    lost = {"blocks.0.norm2.weight", "blocks.0.norm2.bias"}
    want = block_norms(layers) - lost | {"norm.weight", "norm.bias", "blocks.0.norm2.w"}
    why = {"norm2.w": "sublayers(model) gives blocks.0.norm2 as the norm of a sublayer"}
    same_names(names_of(f, Houlsby(), model), want, why)


class Normed(Edit):
    """An edit with a layer norm of its own."""

    def __init__(self):
        self.norm = LayerNorm(2)


@trains.law("a norm inside an edit is not one of the base", layers=st.integers(1, 2))
def _(f, layers):
    model = small_gpt(layers)
    model.blocks[0].attn.edits = {"other": Normed()}
    why = {"edits": "it is part of an edit"}
    same_names(names_of(f, Houlsby(), model),
               block_norms(layers) | {"norm.weight", "norm.bias"}, why)


def right(self, model):
    return Houlsby.trains(self, model)


@trains.wrong_answer("Only the adapters train.", says="missing")
def _(self, model):
    return set()


@trains.wrong_answer("The head trains with the method.", says="should not be in the set")
def _(self, model):
    if not self.norms:
        return set()
    head = {name for name in base_parameters(model) if inside(name, model.top_modules)}
    return right(self, model) | head


@trains.wrong_answer("A norm is a norm, in the head too.", says="inside the head")
def _(self, model):
    if not self.norms:
        return set()
    norms = {path for path, m in base_modules(model).items() if isinstance(m, LayerNorm)}
    return right(self, model) | {n for n in base_parameters(model) if inside(n, norms)}


@trains.wrong_answer("Every tensor with norm in its name belongs to a norm.",
                     says="whatever its name is")
def _(self, model):
    if not self.norms:
        return set()
    norms = {path for path in base_modules(model)
             if "norm" in path and not inside(path, model.top_modules)}
    return {name for name in base_parameters(model) if inside(name, norms)}


@trains.wrong_answer("What stands above the blocks does not train.",
                     says="itself one of model.top_modules")
def _(self, model):
    return {name for name in right(self, model) if not inside(name, model.top_modules)}


@trains.wrong_answer("attach wants the paths of the modules.", says="path of a module")
def _(self, model):
    return {name.rsplit(".", 1)[0] for name in right(self, model)}


@trains.wrong_answer("The weights train, the biases do not.", says="weight and a bias")
def _(self, model):
    return {name for name in right(self, model) if not name.endswith(".bias")}


@trains.wrong_answer("Only the norms in the blocks train.", says="the last norm")
def _(self, model):
    return {name for name in right(self, model) if name.startswith("blocks.")}


@trains.wrong_answer("The norms of the first block are enough.", says="every block")
def _(self, model):
    return {name for name in right(self, model) if "blocks.1." not in name}


@trains.wrong_answer("BERT's first norm belongs to its embeddings.", says="norm of the embeddings")
def _(self, model):
    return {name for name in right(self, model) if not name.startswith("norm0.")}


@trains.wrong_answer("The head is all that stands above the blocks.", says="inside the pooler",
                     subtle=True)
def _(self, model):
    pooler = {name for name in base_parameters(model) if name.startswith("pooler.norm")}
    return right(self, model) | pooler if self.norms else set()


@trains.wrong_answer("The norms of this method always train.", says="self.norms is False",
                     subtle=True)
def _(self, model):
    return Houlsby.trains(Houlsby(), model)


@trains.wrong_answer("A layer norm is a LayerNorm.", says="an RMSNorm is", subtle=True)
def _(self, model):
    rms = {path for path, m in base_modules(model).items() if isinstance(m, RMSNorm)}
    return {name for name in right(self, model) if not inside(name, rms)}


@trains.wrong_answer("The class decides, and nothing else.", says="as the norm of a sublayer",
                     subtle=True)
def _(self, model):
    return {name for name in right(self, model) if not name.endswith(".w")}


@trains.wrong_answer("Every module of the model is one of the base.", says="part of an edit",
                     subtle=True)
def _(self, model):
    if not self.norms:
        return set()
    edits = {name for name in model.named_parameters() if ".edits.other.norm." in name}
    return right(self, model) | edits


@trains.wrong_answer("A list of names is as good as a set.", says="a set of names")
def _(self, model):
    return sorted(right(self, model))
