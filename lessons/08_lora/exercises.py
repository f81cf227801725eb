"""Lesson 08: the two factors, the branch beside a layer, and the merge into its weight."""
from __future__ import annotations

from collections import UserDict

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.array import asarray, asnumpy, peak_memory
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import Shaped
from tinyft.methods.reparameterized.lora import LowRank
from tinyft.nn import Context
from tinyft.tensor import Tensor

LORA = "methods.reparameterized.lora:"
FILLED = (1, 2, -1, 3, -2)                               # no zeros: a zero would hide a mistake


def filled(shape):
    """An input without zeros."""
    return Shaped(shape, FILLED, fractions=(1, 0.5, -1.5, 2, -0.75))


def tensor(a):
    return Tensor(asarray(np.array(a, np.float64)), requires_grad=True)


# ── initial_factors ───────────────────────────────────────────────────────────────────────────────
initial_factors = Exercise(
    f"{LORA}initial_factors", difficulty=1, minutes=10, on_host=True,
    may_use="np.zeros and the methods of rng, such as rng.uniform(low, high, shape); "
            "a.astype(np.float32) gives an array as float32.",
    example="""
        >>> A, B = initial_factors(4, 3, 2, np.random.default_rng(0))
        >>> A.shape, A.dtype
        ((2, 4), dtype('float32'))
        >>> bool(abs(A).max() <= 0.5)
        True
        >>> B
        array([[0., 0.],
               [0., 0.],
               [0., 0.]], dtype=float32)
    """,
    hints=(
        "Only one of the two factors is zero.  The docstring says which one, and gives the shapes.",
        "A = rng.uniform(-bound, bound, (r, in_features)), with bound = 1/√in_features.",
        "rng.uniform gives float64: A.astype(np.float32).  For B: np.zeros(shape, np.float32)."))


def two_arrays(made, A_shape, B_shape, note=""):
    """(A, B), with the right shapes, of what the function returned. note: joins the message."""
    if not isinstance(made, tuple) or len(made) != 2:
        raise Unusable(f"it should return two arrays, (A, B); yours is {made!r:.60}")
    A, B = made
    got_A = np.array(getattr(A, "shape", ()))
    got_B = np.array(getattr(B, "shape", ()))
    close(got_A, np.array(A_shape), "the shape of A, which is (r, in)" + note,
          {"it is the shape of A transposed: A is (r, in)": A_shape[::-1]})
    close(got_B, np.array(B_shape), "the shape of B, which is (out, r)" + note,
          {"it is the shape of B transposed: B is (out, r)": B_shape[::-1]})
    return A, B


def new_factors(f, n, m, r, seed=0):
    return two_arrays(f(n, m, r, np.random.default_rng(seed)), (r, n), (m, r))


@initial_factors.law("A is (r, in) and B is (out, r)", n="size", m="size", r="size")
def _(f, n, m, r):
    new_factors(f, n, m, r)


@initial_factors.law("both are float32", n="size", m="size", r="size")
def _(f, n, m, r):
    for name, a in zip("AB", new_factors(f, n, m, r)):
        close(a, np.asarray(a, np.float32), name, dtype=True)


@initial_factors.law("B is zero, so the model starts unchanged", n="size", m="size", r="size")
def _(f, n, m, r):
    A, B = new_factors(f, n, m, r)
    close(np.asarray(B, float), np.zeros((m, r)), "B")


@initial_factors.law("the entries of A lie between −1/√in and 1/√in, and fill this range",
                     n="size", m="size")
def _(f, n, m):
    A, B = new_factors(f, n, m, 2000 // n)
    bound = n**-0.5
    if not np.any(A):
        raise Unusable("A is zero: with A = B = 0 no factor ever gets a gradient")
    largest = float(np.abs(A).max())
    if largest > bound * 1.0001:
        raise Unusable(f"an entry of A has the size {largest:.3f}; "
                       f"for in = {n} the largest size should be 1/√in = {bound:.3f}")
    low, high = float(A.min()), float(A.max())
    if high < 0.98 * bound or low > -0.98 * bound:
        raise Unusable(f"2,000 entries of A lie between {low:.3f} and {high:.3f}; "
                       f"for in = {n} they should fill the range from -1/√in to 1/√in, "
                       f"here ±{bound:.3f}")
    share = float(np.mean(np.abs(A) < bound / 2))
    if not 0.44 < share < 0.56:
        raise Unusable(f"{100 * share:.0f} % of the entries of A lie in the inner half of the "
                       "range; if they are drawn uniformly, it is 50 %")


@initial_factors.law("rng draws A: the same seed gives the same A, another seed another A",
                     n="size", m="size", r="size")
def _(f, n, m, r):
    first, again = new_factors(f, n, m, r)[0], new_factors(f, n, m, r)[0]
    if not np.array_equal(first, again):
        raise Unusable("two generators of one seed give two different A: draw from rng, "
                       "not from another generator")
    other = new_factors(f, n, m, r, seed=1)[0]
    if np.array_equal(first, other):
        raise Unusable("two seeds give the same A: draw from rng, not from a generator of your own")


def drawn_factors(n, m, r, rng):
    return rng.uniform(-n**-0.5, n**-0.5, (r, n)).astype(np.float32), np.zeros((m, r), np.float32)


@initial_factors.wrong_answer("The update must start at zero, so both factors are zero.",
                              says="A is zero")
def _(in_features, out_features, r, rng):
    return 0 * drawn_factors(in_features, out_features, r, rng)[0], np.zeros((out_features, r),
                                                                             np.float32)


@initial_factors.wrong_answer("A new layer needs random weights, so both factors are random.",
                              says="entries differ")
def _(in_features, out_features, r, rng):
    A, B = drawn_factors(in_features, out_features, r, rng)
    return A, rng.uniform(-1, 1, B.shape).astype(np.float32)


@initial_factors.wrong_answer("The update is A B, so A is (out, r) and B is (r, in).",
                              says="transposed")
def _(in_features, out_features, r, rng):
    A, B = drawn_factors(in_features, out_features, r, rng)
    return A.T, B.T


@initial_factors.wrong_answer("A small range for A is 1/√r.", says="1/√in", subtle=True)
def _(in_features, out_features, r, rng):
    A, B = drawn_factors(in_features, out_features, r, rng)
    return (A * in_features**0.5 / (r + 1)**0.5).astype(np.float32), B


@initial_factors.wrong_answer("Random initial weights are Gaussian.", says="1/√in", subtle=True)
def _(in_features, out_features, r, rng):
    A, B = drawn_factors(in_features, out_features, r, rng)
    return (rng.standard_normal(A.shape) * in_features**-0.5).astype(np.float32), B


@initial_factors.wrong_answer("rng.uniform(0, bound) is uniform enough.", says="fill the range",
                              subtle=True)
def _(in_features, out_features, r, rng):
    A, B = drawn_factors(in_features, out_features, r, rng)
    return np.abs(A), B


@initial_factors.wrong_answer("The fixed size 1/√in with a random sign is as good as uniform.",
                              says="inner half")
def _(in_features, out_features, r, rng):
    A, B = drawn_factors(in_features, out_features, r, rng)
    return (np.sign(A) * np.float32(in_features**-0.5)), B


@initial_factors.wrong_answer("Any generator will do.", says="two seeds give the same A",
                              subtle=True)
def _(in_features, out_features, r, rng):
    return drawn_factors(in_features, out_features, r, np.random.default_rng(0))


@initial_factors.wrong_answer("NumPy's arrays are float32 by default.", says="dtype", subtle=True)
def _(in_features, out_features, r, rng):
    A, B = drawn_factors(in_features, out_features, r, rng)
    return A, B.astype(float)


# ── low_rank_branch ───────────────────────────────────────────────────────────────────────────────
low_rank_branch = Exercise(
    f"{LORA}low_rank_branch", difficulty=2, minutes=15,
    closed=(f"{LORA}LowRank.branch",),
    may_use="ops.linear(x, W), which is x Wᵀ for W (out, in); + and * of tensors and numbers; "
            "A.shape.",
    example="""
        >>> x = Tensor(np.array([[1.0, 2.0]]))               # one row, in = 2
        >>> A = Tensor(np.array([[3.0, 1.0], [0.0, 1.0]]))   # r = 2
        >>> B = Tensor(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))       # out = 3
        >>> low_rank_branch(x, A, B, alpha=4.0).numpy()
        array([[10.,  4., 20.]])
    """,
    hints=(
        "Read the formula from the inside: first x Aᵀ, then that times Bᵀ, then the factor α/r.",
        "ops.linear(x, A) is x Aᵀ: (..., in) -> (..., r).  r is the first size of A's shape.",
        "Two calls of ops.linear, one for A and one for B, and one product with "
        "alpha / A.shape[0]."))

FACTORS = {"x": filled("... k"), "A": filled("r k"), "B": filled("m r"),
           "alpha": st.sampled_from((2.0, 1.0, 3.0))}


def guessed(x, A, B, alpha):
    """{mistake: result}"""
    plain = x @ A.T @ B.T
    r = len(A)
    return {"the factor α/r is left out": plain,
            "α is the factor here; it should be α/r": alpha * plain,
            "the factor is 1/r; it should be α/r": plain / r,
            "the factor is α/√r; it should be α/r": alpha / r**0.5 * plain,
            "the factor is r/α; it should be α/r": r / alpha * plain,
            "the factor α/r is there twice": (alpha / r)**2 * plain}


def branch_of(f, x, A, B, alpha):
    out = f(tensor(x), tensor(A), tensor(B), alpha)
    if not isinstance(out, Tensor):
        raise Unusable(f"the result should be a Tensor; yours is a {type(out).__name__}")
    return out


@low_rank_branch.law("the result is (..., out)", **FACTORS)
def _(f, x, A, B, alpha):
    shape = branch_of(f, x, A, B, alpha).shape
    close(np.array(shape), np.array((*x.shape[:-1], len(B))), "the shape of the result")


@low_rank_branch.law("it is (α/r) (x Aᵀ) Bᵀ", **FACTORS)
def _(f, x, A, B, alpha):
    want = alpha / len(A) * (x @ A.T @ B.T)
    close(branch_of(f, x, A, B, alpha).data, want, "the branch", guessed(x, A, B, alpha))


def gradients_of(f, x, A, B, alpha):
    tensors = tensor(x), tensor(A), tensor(B)
    out = f(*tensors, alpha)
    if isinstance(out, Tensor) and out.requires_grad:
        out.sum().backward()
    return [None if t.grad is None else asnumpy(t.grad) for t in tensors]


@low_rank_branch.law("the gradients reach x, A and B", **FACTORS)
def _(f, x, A, B, alpha):
    s = alpha / len(A)
    rows = x.reshape(-1, x.shape[-1])
    ones = np.ones((len(rows), len(B)))                  # the gradient of the sum
    wants = {"x": (s * ones @ B @ A).reshape(x.shape), "A": s * (ones @ B).T @ rows,
             "B": s * ones.T @ (rows @ A.T)}
    for (name, want), got in zip(wants.items(), gradients_of(f, x, A, B, alpha)):
        if got is None:
            raise Unusable(f"{name} gets no gradient: work with the tensors, not with {name}.data")
        close(got, want, f"the gradient of {name}")


@low_rank_branch.law("the product B A is never built: rank 1 on 1,000 features takes little memory",
                     alpha=st.sampled_from((2.0, 1.0)))
def _(f, alpha):
    n = 1000
    x, A, B = Tensor(np.ones((1, n))), Tensor(np.ones((1, n))), Tensor(np.ones((n, 1)))
    with peak_memory() as memory:
        f(x, A, B, alpha)
    if memory["bytes"] >= 8 * n * n:
        raise Unusable(f"it builds an array of {n:,} x {n:,} entries, the product B A: "
                       "multiply x with A first")


@low_rank_branch.wrong_answer("The factor α/r only matters for the optimiser.",
                              says="the factor α/r is left out")
def _(x, A, B, alpha):
    return ops.linear(ops.linear(x, A), B)


@low_rank_branch.wrong_answer("alpha is the factor.", says="α is the factor here")
def _(x, A, B, alpha):
    return ops.linear(ops.linear(x, A) * alpha, B)


@low_rank_branch.wrong_answer("The scale is α/√r (that is rsLoRA).", says="α/√r")
def _(x, A, B, alpha):
    return ops.linear(ops.linear(x, A) * (alpha / A.shape[0]**0.5), B)


@low_rank_branch.wrong_answer("r is the last size of A's shape.", says="factor")
def _(x, A, B, alpha):
    return ops.linear(ops.linear(x, A) * (alpha / A.shape[-1]), B)


@low_rank_branch.wrong_answer("B comes first, since the formula says B A.", says="linear")
def _(x, A, B, alpha):
    return ops.linear(ops.linear(x, B), A) * (alpha / A.shape[0])


@low_rank_branch.wrong_answer("x A B is x Aᵀ Bᵀ.", says="matmul")
def _(x, A, B, alpha):
    return x @ A @ B * (alpha / A.shape[0])


@low_rank_branch.wrong_answer("With arrays one computes as well as with tensors.",
                              says="gets no gradient", subtle=True)
def _(x, A, B, alpha):
    return Tensor(ops.linear(ops.linear(x, A), B).data * (alpha / A.shape[0]))


@low_rank_branch.wrong_answer("A is frozen, as in a random projection.",
                              says="A gets no gradient", subtle=True)
def _(x, A, B, alpha):
    return ops.linear(ops.linear(x, A.detach()), B) * (alpha / A.shape[0])


@low_rank_branch.wrong_answer("The order of the products does not matter.", says="builds an array",
                              subtle=True)
def _(x, A, B, alpha):
    return ops.linear(x, B @ A) * (alpha / A.shape[0])


# ── after ─────────────────────────────────────────────────────────────────────────────────────────
after = Exercise(
    f"{LORA}LowRank.after", difficulty=2, minutes=10,
    may_use="self.branch(x), the branch of x; self.drop(x, ctx), which is x itself when the model "
            "is evaluated; + of tensors.",
    example="""
        >>> from types import SimpleNamespace
        >>> edit = SimpleNamespace(branch=lambda x: x * 3.0, drop=lambda x, ctx: x)
        >>> x, y = Tensor(np.array([[1.0, 2.0]])), Tensor(np.array([[10.0, 10.0]]))
        >>> after(edit, x, y, Context()).numpy()
        array([[13., 16.]])
    """,
    hints=(
        "The base computed y without knowing about LoRA.  The branch is added to it.",
        "self.drop knows whether the model trains.  So you need no `if`: give it x and ctx.",
        "y + self.branch(...), with self.drop(x, ctx) as the input of the branch."))

LAYER = {"x": filled("n k"), "A": filled("r k"), "B": filled("m r")}


def an_edit(A, B, alpha=2.0, dropout=0.0):
    """A LowRank with these factors."""
    e = LowRank(A.shape[1], B.shape[0], A.shape[0], alpha, dropout, np.random.default_rng(0))
    e.A.data = asarray(A.copy())
    e.B.data = asarray(B.copy())
    return e


def output(f, e, x, y, rng=None):
    """The result of `after` as an array."""
    out = f(e, tensor(x), tensor(y), Context(rng=rng))
    if not isinstance(out, Tensor):
        raise Unusable(f"the result should be a Tensor; yours is a {type(out).__name__}")
    return asnumpy(out.data)


@after.law("the result is y plus the branch of x", **LAYER, y=filled("n m"))
def _(f, x, A, B, y):
    branch = 2.0 / len(A) * (x @ A.T @ B.T)
    guesses = {"it is the branch alone: the base's output y is missing": branch,
               "it is y: the branch is not added": y,
               "the branch is subtracted": y - branch}
    if x.shape == y.shape:
        reads_y = y + 2.0 / len(A) * (y @ A.T @ B.T)
        guesses["the input of the branch is y; it should be x"] = reads_y
    close(output(f, an_edit(A, B), x, y), y + branch, "the result", guesses)


@after.law("B = 0 leaves the output as it was, in training too", **LAYER, y=filled("n m"))
def _(f, x, A, B, y):
    e = an_edit(A, 0 * B, dropout=0.5).train()
    close(output(f, e, x, y, np.random.default_rng(0)), y, "the result in training with B = 0")


@after.law("nothing is dropped when the model is evaluated", **LAYER, y=filled("n m"))
def _(f, x, A, B, y):
    e = an_edit(A, B, dropout=0.5).eval()
    want = y + 2.0 / len(A) * (x @ A.T @ B.T)
    close(output(f, e, x, y, np.random.default_rng(0)), want, "the result in evaluation")


@after.law("in training, dropout acts on the input of the branch", **LAYER, y=filled("n m"))
def _(f, x, A, B, y):
    e = an_edit(A, B, dropout=0.5).train()
    dropped = asnumpy(e.drop(tensor(x), Context(rng=np.random.default_rng(1))).data)
    want = y + 2.0 / len(A) * (dropped @ A.T @ B.T)
    got = output(f, e, x, y, np.random.default_rng(1))
    close(got, want, "the result in training",
          {"nothing is dropped: the branch gets x itself": y + 2.0 / len(A) * (x @ A.T @ B.T)})


@after.wrong_answer("LoRA replaces the output of the layer.", says="y is missing")
def _(self, x, y, ctx):
    return self.branch(self.drop(x, ctx))


@after.wrong_answer("LoRA changes the output of the layer, so the branch reads y.",
                    says="it should be x")
def _(self, x, y, ctx):
    return y + self.branch(self.drop(y, ctx))


@after.wrong_answer("Dropout belongs to the whole output.", says="in training with B = 0")
def _(self, x, y, ctx):
    return self.drop(y + self.branch(x), ctx)


@after.wrong_answer("The branch's output may be dropped as well as its input.", says="differ",
                    subtle=True)
def _(self, x, y, ctx):
    return y + self.drop(self.branch(x), ctx)


@after.wrong_answer("Dropout is for the pretraining only.", says="nothing is dropped", subtle=True)
def _(self, x, y, ctx):
    return y + self.branch(x)


@after.wrong_answer("Dropout acts whenever the branch is used.", says="in evaluation")
def _(self, x, y, ctx):
    return y + self.branch(ops.dropout(x, self.drop.p, 3) if self.drop.p else x)


# ── fold ──────────────────────────────────────────────────────────────────────────────────────────
fold = Exercise(
    f"{LORA}LowRank.fold", difficulty=2, minutes=10,
    may_use="self.delta(), the update ΔW = (α/r) B A, (out, in); + of arrays; {**p, name: array}, "
            "a new dict with the entries of p, and this one put in.",
    example="""
        >>> from types import SimpleNamespace
        >>> edit = SimpleNamespace(delta=lambda: np.array([[10.0, 0.0]]))
        >>> fold(edit, {"weight": np.array([[1.0, 2.0]]), "bias": np.array([5.0])})
        {'weight': array([[11.,  2.]]), 'bias': array([5.])}
    """,
    hints=(
        "x Wᵀ + x ΔWᵀ = x (W + ΔW)ᵀ: only the weight changes.",
        "Do not write into p or its arrays: `p[\"weight\"] += ...` changes the caller's model.",
        "Return {**p, \"weight\": ...}, with the sum of the old weight and self.delta()."))

MERGE = {**LAYER, "W": filled("m k"), "bias": filled("m")}


def folded(f, A, B, arrays):
    """What `fold` returns for these arrays.  Unusable if it is no dict, or if p was changed."""
    given = {name: asarray(a.copy()) for name, a in arrays.items()}
    p = UserDict(given)                                  # a dict would be copied before the call
    weight = given["weight"]
    out = f(an_edit(A, B), p)
    if not hasattr(out, "keys"):
        raise Unusable(f"the result should be a dict with the names of p; yours is {out!r:.60}")
    if not np.array_equal(asnumpy(weight), arrays["weight"]):
        raise Unusable("it changed the array p[\"weight\"]: += writes into the array; "
                       "w + delta makes a new one")
    if set(p) != set(arrays) or any(p[name] is not given[name] for name in given):
        raise Unusable("it changed the dict p: return a new dict")
    return {name: asnumpy(a) for name, a in out.items()}


@fold.law("the result has the names of p", **MERGE)
def _(f, x, A, B, W, bias):
    for arrays in ({"weight": W, "bias": bias}, {"weight": W}):
        names = sorted(folded(f, A, B, arrays))
        if names != sorted(arrays):
            raise Unusable(f"p has the names {', '.join(sorted(arrays))}; "
                           f"your result has {', '.join(map(str, names)) or 'none'}")


@fold.law("ΔW is added to the weight", **MERGE)
def _(f, x, A, B, W, bias):
    change = 2.0 / len(A) * (B @ A)
    got = folded(f, A, B, {"weight": W, "bias": bias}).get("weight")
    close(got, W + change, "the merged weight",
          {"it is ΔW alone: W is missing": change, "ΔW is subtracted": W - change,
           "ΔW is added twice": W + 2 * change,
           "α/r is left out: self.delta() has it already": W + B @ A,
           "α/r is there twice: self.delta() has it already": W + 2.0 / len(A) * change})


@fold.law("the bias stays as it is", **MERGE)
def _(f, x, A, B, W, bias):
    got = folded(f, A, B, {"weight": W, "bias": bias}).get("bias")
    change = 2.0 / len(A) * (B @ A)
    close(got, bias, "the bias",
          {"the bias is changed as well: ΔW belongs to the weight": bias + change.sum(axis=1)})


@fold.law("the merged layer computes what the layer with its branch computes", **MERGE)
def _(f, x, A, B, W, bias):
    new = folded(f, A, B, {"weight": W, "bias": bias})
    want = x @ W.T + bias + 2.0 / len(A) * (x @ A.T @ B.T)
    close(x @ new["weight"].T + new["bias"], want, "the output of the merged layer")


@fold.wrong_answer("The bias is merged as well.", says="ΔW belongs to the weight")
def _(self, p):
    return {name: a + (self.delta() if a.ndim == 2 else self.delta().sum(axis=1))
            for name, a in p.items()}


@fold.wrong_answer("After the merge the layer has the update for its weight.",
                   says="ΔW alone")
def _(self, p):
    return {**p, "weight": self.delta()}


@fold.wrong_answer("The update is merged once for A and once for B.", says="added twice")
def _(self, p):
    return {**p, "weight": p["weight"] + self.delta() + self.delta()}


@fold.wrong_answer("The scale must be put in.", says="α/r is there twice")
def _(self, p):
    return {**p, "weight": p["weight"] + self.s * self.delta()}


@fold.wrong_answer("The scale is for training only.", says="α/r is left out")
def _(self, p):
    return {**p, "weight": p["weight"] + self.B.data @ self.A.data}


@fold.wrong_answer("An update writes into the weight.", says="writes into the array")
def _(self, p):
    p["weight"] += self.delta()
    return p


@fold.wrong_answer("The dict is mine to change.", says="changed the dict p")
def _(self, p):
    p["weight"] = p["weight"] + self.delta()
    return p


@fold.wrong_answer("Only what changes is returned.", says="your result has weight")
def _(self, p):
    return {"weight": p["weight"] + self.delta()}


@fold.wrong_answer("Every linear map has a bias.", says="bias", subtle=True)
def _(self, p):
    bias = p["bias"] if "bias" in p else np.zeros(len(p["weight"]))
    return {"weight": p["weight"] + self.delta(), "bias": bias}


# ── low_rank_factors ──────────────────────────────────────────────────────────────────────────────
low_rank_factors = Exercise(
    f"{LORA}low_rank_factors", difficulty=3, minutes=20, on_host=True,
    may_use="np.linalg.svd(M, full_matrices=False), which gives U, sizes, V with "
            "M = (U * sizes) @ V and the largest sizes first; slices.",
    example="""
        >>> A, B = low_rank_factors(np.array([[3.0, 0.0], [0.0, 1.0]]), 1)
        >>> A.shape, B.shape
        ((1, 2), (2, 1))
        >>> B @ A + 0.0
        array([[3., 0.],
               [0., 0.]])
    """,
    hints=(
        "First the ValueError: r is at least 1 and at most the smaller size of M.  Then the "
        "singular value decomposition.",
        "M is a sum of matrices of rank 1: column i of U, times sizes[i], times row i of V.  "
        "Keep the first r of them.",
        "A is V[:r].  B is U[:, :r] * sizes[:r]: each column of U times its size."))


def factors_of(f, M, r):
    """(A, B) of the right shapes."""
    A, B = two_arrays(f(M, r), (r, M.shape[1]), (M.shape[0], r))
    return asnumpy(A), asnumpy(B)


@low_rank_factors.law("A is (r, in) and B is (out, r)", M=filled("m n"))
def _(f, M):
    for r in range(1, min(M.shape) + 1):
        two_arrays(f(M, r), (r, M.shape[1]), (M.shape[0], r), f" (here r = {r})")


@low_rank_factors.law("with the full rank, B A is M", M=filled("m n"))
def _(f, M):
    A, B = factors_of(f, M, min(M.shape))
    U, sizes, V = np.linalg.svd(M, full_matrices=False)
    close(B @ A, M, "B A", {"the singular values are left out": U @ V,
                            "the singular values are in both factors": U * sizes**2 @ V})


@low_rank_factors.law("no other pair of factors of rank r is nearer to M", M=filled("m n"))
def _(f, M):
    sizes = np.linalg.svd(M, compute_uv=False)
    for r in range(1, min(M.shape)):
        A, B = factors_of(f, M, r)
        error = float(((M - B @ A)**2).sum())
        least = float((sizes[r:]**2).sum())
        if error > least * (1 + 1e-9) + 1e-9:
            raise Unusable(f"with r = {r}, the sum of the squared differences of B A and M is "
                           f"{error:.4g}; the smallest possible is {least:.4g}")


@low_rank_factors.law("another rank raises ValueError", M=filled("m n"))
def _(f, M):
    for r in (0, -1, min(M.shape) + 1):
        try:
            f(M, r)
        except ValueError:
            continue
        raise Unusable(f"r = {r} for an M of shape {M.shape} should raise ValueError")


def kept(M, r, start=0):
    """(A, B) of r singular values in a row."""
    if not 1 <= r <= min(M.shape):
        raise ValueError("r")
    U, sizes, V = np.linalg.svd(M, full_matrices=False)
    part = slice(start, start + r)
    return V[part], U[:, part] * sizes[part]


@low_rank_factors.wrong_answer("The first r rows of M are the best r rows.",
                               says="smallest possible", subtle=True)
def _(M, r):
    kept(M, r)
    if r == min(M.shape):
        return kept(M, r)
    return M[:r], np.eye(len(M))[:, :r]


@low_rank_factors.wrong_answer("The singular values come smallest first, as eigenvalues do.",
                               says="smallest possible", subtle=True)
def _(M, r):
    return kept(M, r, min(M.shape) - r)


@low_rank_factors.wrong_answer("U and V alone make M.", says="singular values are left out")
def _(M, r):
    kept(M, r)
    U, sizes, V = np.linalg.svd(M, full_matrices=False)
    return V[:r], U[:, :r]


@low_rank_factors.wrong_answer("svd returns V with the vectors in its columns.", says="shape of A")
def _(M, r):
    kept(M, r)
    U, sizes, V = np.linalg.svd(M, full_matrices=False)
    return V[:, :r], U[:, :r] * sizes[:r]


@low_rank_factors.wrong_answer("The sizes belong to both factors.", says="in both factors")
def _(M, r):
    A, B = kept(M, r)
    sizes = np.linalg.svd(M, compute_uv=False)[:r]
    return sizes[:, None] * A, B


@low_rank_factors.wrong_answer("A slice takes care of a rank that is too large.",
                               says="should raise ValueError", subtle=True)
def _(M, r):
    return kept(M, min(max(r, 1), *M.shape))
