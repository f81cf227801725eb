"""Mistakes that work on NumPy and go wrong, or slow, on a GPU, planted one at a time in a copy of a function: this
harness must notice.

Noticed is an exception, or a difference in the losses, in the dtypes, or in what two training steps ask of the device.
"""
from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass

import cupy as cp
import fake_gpu
import numpy as np
import pytest
from contract import batch, build

from tinyft import AdamW, array, dispatch, edit, kernels, nn, optim, tensor
from tinyft.tensor import OPS
from tinyft.train.batch import compute_loss, read_batch


@dataclass
class Mistake:
    """In `function` (an op's name, or module.name) `right` is replaced by `wrong`; `noticed`: by which sign."""
    function: str
    right: str
    wrong: str
    noticed: str


EXP = "e = m.exp(s - m.where(top == -math.inf, 0, top))"
MISTAKES = {
    "a host mask in where": Mistake("attention", "causal_mask(*s.shape[-2:], m)", "causal_mask(*s.shape[-2:], np)",
                                    "TypeError"),
    "a host arange as an index": Mistake("cross_entropy", "m.arange(rows.shape[0])", "np.arange(rows.shape[0])", "h2d"),
    "a list as an index": Mistake("cross_entropy", "m.arange(rows.shape[0])", "list(range(rows.shape[0]))", "h2d"),
    "sum(where=)": Mistake("cross_entropy", "w.sum()", "w.sum(where=real)", "TypeError"),
    "max(initial=)": Mistake("cross_entropy", "rows.max(axis=-1, keepdims=True)",
                             "rows.max(axis=-1, keepdims=True, initial=-1e9)", "TypeError"),
    "float(loss) inside the loss": Mistake("cross_entropy", "(value / total)", "m.asarray(float(value) / total)",
                                           "waits"),
    "an item of a device array": Mistake("cross_entropy", "(g / total)", "(g / total.item())", "waits"),
    "a loop that asks the device": Mistake("attention", EXP, EXP + "\n    assert e.max() <= 1", "waits"),
    "a factor of np.float64": Mistake("attention", "q.shape[-1]**-0.5", "np.float64(q.shape[-1])**-0.5", "dtype"),
    "a factor of np.float64 in an activation": Mistake("gelu_tanh", "(2 / math.pi)**0.5", "np.sqrt(2 / np.pi)",
                                                       "dtype"),
    # the engine rounds it: one launch more
    "the default dtype": Mistake("embedding", "m.zeros(shape, g.dtype)", "m.zeros(shape)", "kernels"),
    "+= with repeated indices": Mistake("embedding", "m.add.at(d, ids, g)", "d[ids] += g", "loss"),
    "boolean-mask assignment": Mistake("attention", "s = m.where(visible, s, -math.inf)",
                                       "s[m.broadcast_to(~visible, s.shape)] = -math.inf", "waits"),
    "a selection by mask": Mistake("cross_entropy", "w.sum()", "w[real].sum()", "waits"),
    "np.zeros for a gradient on the device": Mistake("embedding", "m.zeros(shape, g.dtype)", "np.zeros(shape, g.dtype)",
                                                     "AttributeError"),
    "m.empty for zeros": Mistake("embedding", "m.zeros(shape, g.dtype)", "m.empty(shape, g.dtype)",
                                 "FloatingPointError"),
    "a constant uploaded at every call": Mistake("layer_norm", "+ eps)",
                                                 "+ xp(x).asarray(np.array([eps], np.float32)))", "h2d"),
    "a detour by the host": Mistake("layer_norm", "h = centred / s",
                                    "h = xp(x).asarray(xp(x).asnumpy(centred) / xp(x).asnumpy(s))", "d2h"),
    "np.asarray of a device array": Mistake("layer_norm", "h = centred / s", "h = np.asarray(centred) / s",
                                            "TypeError"),
    "one kernel more than needed": Mistake("layer_norm", "h = centred / s", "h = 1 * centred / s", "launches"),
    "a product more than needed": Mistake("linear", "(flat(x) @ W.T)", "(flat(x) @ W.T + 0 * (flat(x) @ W.T))",
                                          "products"),
    "a kernel for each row": Mistake("embedding", "return rows_of(W, ids)", "return m.stack([W[i] for i in ids])",
                                     "launches"),
    "CuPy's own random numbers": Mistake("embedding", "return rows_of(W, ids)",
                                         "return W[ids] + 0 * m.random.standard_normal(W[ids].shape)", "ImportError"),
    "a name CuPy lacks": Mistake("attention", "q @ t(k)", "m.vecdot(q[..., :, None, :], k[..., None, :, :])",
                                 "AttributeError"),
    "a keyword CuPy lacks": Mistake("attention", EXP, "e = m.exp(s - m.where(top == -math.inf, 0, top), where=visible)",
                                    "TypeError"),
    "the norm read twice": Mistake("optim.optimizers.clip_norm", "m.minimum(limit / (norm + 1e-6), 1.0)",
                                   "min(limit / (float(norm) + 1e-6), 1.0)", "waits"),
    "a host array beside the moments": Mistake("optim.optimizers.adam_update", "+ eps)",
                                               "+ np.full(w.shape, eps, np.float32))", "TypeError"),
    "a step size of np.float64": Mistake("optim.optimizers.adam_update", "(1 - b1) * g",
                                         "np.float64(1 - b1) * g.astype(np.float64)", "kernels"),
    "positions made on the host": Mistake("nn.Context.positions", "m.cumsum(key_mask.astype(np.int64), axis=1)",
                                             "m.asarray(np.cumsum(m.asnumpy(key_mask), axis=1))", "d2h"),
    "a size asked of the device": Mistake("tensor.sum_to", "g.ndim - len(shape)",
                                          "int(xp(g).asarray(g.ndim)) - len(shape)", "waits"),
}

# What real CuPy does not mind: the strict double does (test_strict.py).
UNNOTICED = {
    "np.exp on a device array": Mistake("attention", EXP, EXP.replace("m.exp", "np.exp"), ""),
    "np.sqrt on a device array": Mistake("layer_norm", "xp(x).sqrt", "np.sqrt", ""),
}
HOMES = {"optim": optim, "nn": nn, "tensor": tensor}


def planted(f, m):
    """A copy of the function f with the mistake in it."""
    source = textwrap.dedent(inspect.getsource(f))
    message = f"{m.function} has changed: it no longer says {m.right!r}; plant this mistake anew"
    assert source.count(m.right) >= 1, message
    while source.startswith(("@", "#")):  # the decorator
        source = source.partition("\n")[2]
    names: dict = {**f.__globals__, "np": np}
    exec(compile(source.replace(m.right, m.wrong), f"<{m.function}>", "exec"), names)
    return names[f.__name__]


def plant(m, monkeypatch):
    if m.function in OPS:  # as a kernel is put in an op's place
        monkeypatch.setitem(dispatch.KERNELS, (OPS[m.function], cp.ndarray),
                            [planted(inspect.unwrap(OPS[m.function].definition), m)])
        return
    home, _, name = m.function.partition(".")
    owner = HOMES[home]
    if "." in name:
        owner, name = getattr(owner, name.split(".")[0]), name.split(".")[1]
    monkeypatch.setattr(owner, name, planted(getattr(owner, name), m))


def signs():
    """The visible results of three training steps."""
    model, seen = build("gpt"), {}
    optimizer = AdamW(0.01).start(edit.trained(model))
    losses, dtypes = [], set()
    for _ in range(3):
        fake_gpu.reset()
        ctx, loss = compute_loss(model, read_batch(batch("gpt", 0)))
        loss.backward()
        losses.append(float(loss.data))
        dtypes |= {str(loss.dtype), str(ctx.output.dtype),
                   *(str(p.grad.dtype) for p in model.parameters() if p.grad is not None)}
        optimizer.step(1.0, 0.01)
        model.zero_grad()
        seen = fake_gpu.counts()._asdict() | {"kernels": dict(fake_gpu.launched)}
    return seen | {"loss": losses, "dtype": dtypes}


def noticed(right, monkeypatch, m):
    """By which signs a mistake shows."""
    plant(m, monkeypatch)
    try:
        got = signs()
    except Exception as e:
        return [c.__name__ for c in type(e).__mro__]
    differ = [k for k in ("launches", "products", "waits", "h2d", "d2h", "d2d", "kernels",
                          "dtype") if got[k] != right[k]]
    return differ + ["loss"] * (not np.allclose(got["loss"], right["loss"], rtol=1e-6, atol=0))


@pytest.fixture(scope="module")
def right():
    array.use("cupy")
    with kernels.definitions():
        signs()
        return signs()


@pytest.fixture(autouse=True)
def _plain(definitions):
    """By the definitions: a kernel in an op's place would hide what is planted."""


def test_nothing_is_noticed_where_nothing_is_planted(right, monkeypatch):
    assert noticed(right, monkeypatch, Mistake("linear", "flat(x) @ W.T", "flat(x) @ W.T", "")) == []
    with pytest.raises(AssertionError, match="plant this mistake anew"):
        noticed(right, monkeypatch, Mistake("linear", "no such text", "", ""))


@pytest.mark.parametrize("what", MISTAKES)
def test_a_planted_mistake_is_noticed(what, right, monkeypatch):
    assert MISTAKES[what].noticed in noticed(right, monkeypatch, MISTAKES[what])


@pytest.mark.parametrize("what", UNNOTICED)
def test_what_this_harness_cannot_see(what, right, monkeypatch):
    assert noticed(right, monkeypatch, UNNOTICED[what]) == []
