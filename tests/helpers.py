"""What the tests share: arrays on the suite's backend, the gradient check, and shapes drawn from an op's shape string."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tinyft import GPT, AdamW, GPTConfig, LoRA, array, attach, fit
from tinyft.tensor import Tensor


def dev(a: Any, dtype: Any = None) -> array.Array:
    """Host numbers as an array on the backend in use; float64 stays float64."""
    a = np.asarray(a)
    with np.errstate(over="ignore"):                                             # a number too large for half precision is inf there
        return array.asarray(a if dtype is None else a.astype(dtype))


def leaf(a: Any, dtype: Any = None) -> Tensor:
    """A tensor that trains."""
    return Tensor(dev(a, dtype), requires_grad=True)


def host(a: Any) -> np.ndarray | None:
    """A tensor or a device array as a NumPy array; None stays None."""
    return None if a is None else array.asnumpy(a.data if isinstance(a, Tensor) else a)


def gradcheck(f: Callable[..., Tensor], arrays: Sequence[np.ndarray], rng: np.random.Generator, tol: float = 1e-6,
              eps: float = 1e-5) -> None:
    """⟨ȳ, J v⟩ by central differences against ⟨Jᵀ ȳ, v⟩ by backward, for a random covector ȳ and a random direction v.

    f takes one Tensor per array.  rng must be the stream the arrays came from: another generator with the same seed would make ȳ equal
    to an input, and AᵀG symmetric, which hides a transposed gradient.  A loss that sums y would be blind to softmax.
    The tolerance is relative to the sum of the magnitudes that enter, so a sum that cancels is no excuse."""
    arrays = [np.asarray(a, np.float64) for a in arrays]
    ts = [leaf(a) for a in arrays]
    y = f(*ts)
    covector, direction = rng.standard_normal(y.shape), [rng.standard_normal(a.shape) for a in arrays]
    assert y.requires_grad, "the result does not depend on the inputs"
    y.backward(dev(covector))
    ahead, behind = (host(f(*(Tensor(dev(a + e * v)) for a, v in zip(arrays, direction)))) for e in (eps, -eps))
    along = covector * (ahead - behind) / (2 * eps)
    assert all(t.grad is not None for t in ts), "an input got no gradient"
    back = [host(t.grad) * v for t, v in zip(ts, direction)]
    numeric, exact = along.sum(), sum(b.sum() for b in back)
    size = np.abs(along).sum() + sum(np.abs(b).sum() for b in back)
    assert abs(numeric - exact) <= tol * size + 1e-9, f"by differences {numeric:.9g}, by backward {exact:.9g}"
    for a, t in zip(arrays, ts):
        assert array.is_array(t.grad) and t.grad.shape == a.shape and t.grad.dtype == np.float64


def seeds() -> st.SearchStrategy[np.random.Generator]:
    """A generator: every number of an example comes from this one stream."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def accepted(kernel: Callable, definition: Callable, *args: Any, **kwargs: Any) -> Any:
    """The kernel's result; the definition's, if the kernel declines these arguments."""
    result = kernel(*args, **kwargs)
    return definition(*args, **kwargs) if result is NotImplemented else result


@st.composite
def shapes_of(draw: Callable, spec: str, broadcast: bool = True) -> tuple[list[tuple], tuple]:
    """([shape of each input], shape of the output) for a shape string such as "... n k, ... k m -> ... n m".

    Every letter is a size of 1 to 4, "..." stands for 0 to 2 leading sizes.  With `broadcast`, an input may lack some of the leading
    axes, or have length one there.  In some draws all letters are one size."""
    ins, out = ([side.split() for side in part.split(",")] for part in spec.split("->"))
    square = draw(st.sampled_from([None, None, 2, 3]))                           # a forgotten transpose shows only among equal sizes
    size = {d: square or draw(st.integers(1, 4)) for d in sorted(set(re.findall(r"\b[a-z]\b", spec)))}
    lead = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    many = sum("..." in s for s in ins) > 1

    def own() -> tuple:
        if not (broadcast and many):
            return lead
        cut = draw(st.integers(0, len(lead)))
        return tuple(n if draw(st.booleans()) else 1 for n in lead[cut:])
    leads = [own() if "..." in s else () for s in ins]
    full = np.broadcast_shapes(*leads)
    shape = lambda s, front: (front if "..." in s else ()) + tuple(size[d] for d in s if d != "...")
    return [shape(s, front) for s, front in zip(ins, leads)], shape(out[0], full)


def lora_curve(steps: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The losses of a small GPT that LoRA trains, with dropout and padding in batches of `rows` texts, and a matrix B at the end."""
    model = GPT(GPTConfig(19, 12, 16, 2, 2, dropout=0.1), seed=1)
    attach(model, LoRA(r=2, targets=("attn.[qv]", "mlp.up")))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 19, (3, rows, 10)), rng.integers(4, 11, (3, rows, 1)) > np.arange(10)
    history = fit(model, [{"ids": i, "mask": m} for i, m in zip(ids, mask)], steps, AdamW(0.01), progress=False)
    return np.array(history.losses), model.blocks[0].attn.q.edits["lora"].B.numpy()
