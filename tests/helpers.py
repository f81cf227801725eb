"""Functions of many tests: arrays on the suite's backend, the gradient check, shapes drawn from a shape string."""
from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tinyft import GPT, AdamW, GPTConfig, LoRA, array, attach, fit
from tinyft.tensor import Tensor

REAL_ASSETS = Path(__file__).resolve().parents[1] / "work" / "real"


def real_asset(name: str) -> Path:
    """The path of a real model, a file or a folder in work/real. The test is skipped if it is not there."""
    path = REAL_ASSETS / name
    if not path.exists():
        pytest.skip(f"{name} is not in work/real: make real-assets fetches it")
    return path


def case_id(value: Any) -> str:
    """The id of a test's case: the value as a short text without addresses, which differ from process to process."""
    text = " ".join(str(value).split())
    return re.sub(" at 0x[0-9a-f]+", "", text)[:40]


# A test that plants wrong answers runs on NumPy alone: the right one runs everywhere, and that takes long enough.
wrong_answers = pytest.mark.skipif(array.backend() != "numpy", reason="wrong answers are caught on NumPy")
# The tests of a file that has no array of a device: they read sources, texts and files, and are the same everywhere.
host_only = pytest.mark.skipif(array.backend() != "numpy", reason="no array of a device: the same on every backend")


def not_on_strict(reason: str) -> pytest.MarkDecorator:
    """The mark of a test that the strict double leaves out. It proves that CuPy has each array call of the library.

    So a test may have the mark if its statement is another one, and other tests call the same functions there."""
    return pytest.mark.skipif(array.backend() == "strict", reason=reason)


# Processes that are killed and go on, refusals in one sentence, printed texts, damaged files.
of_the_host = not_on_strict("processes, messages and files are the same on every backend")
quality = not_on_strict("how well a model learns is the same on every backend")


def rejects(check: Callable[[], Any]) -> bool:
    """True if a check fails. Warnings of a wrong answer's numbers are not shown."""
    try:
        with np.errstate(all="ignore"):
            check()
    except AssertionError:
        return True
    return False


class TooSlow(AssertionError):
    """A call took longer than its limit."""


@contextlib.contextmanager
def time_limit(seconds: float, wall_seconds: float) -> Iterator[None]:
    """TooSlow if the body takes more processor time, or waits longer."""
    def stop(*_: Any) -> None:
        raise TooSlow(f"it takes more than {seconds} s of processor time, or {wall_seconds} s in all")

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def dev(a: Any, dtype: Any = None) -> array.Array:
    """An array on the backend in use, from host numbers. Float64 stays float64."""
    a = np.asarray(a)
    with np.errstate(over="ignore"):                     # a number too large for float16 becomes inf
        return array.asarray(a if dtype is None else a.astype(dtype))


def leaf(a: Any, dtype: Any = None) -> Tensor:
    """A trainable tensor."""
    return Tensor(dev(a, dtype), requires_grad=True)


def host(a: Any) -> np.ndarray | None:
    """A tensor or a device array as a NumPy array; None stays None."""
    return None if a is None else array.asnumpy(a.data if isinstance(a, Tensor) else a)


def gradcheck(f: Callable[..., Tensor], arrays: Sequence[np.ndarray], rng: np.random.Generator, tol: float = 1e-6,
              eps: float = 1e-5) -> None:
    """⟨ȳ, J v⟩ by central differences against ⟨Jᵀ ȳ, v⟩ by backward, for a random covector ȳ and a random direction v.

    f takes one Tensor per array.  rng must be the generator that drew the arrays: another generator with the same seed
    would make ȳ equal to an input, and AᵀG symmetric, which hides a transposed gradient.  The loss ȳ = 1 would miss a
    wrong softmax.  The tolerance is relative to the sum of the magnitudes of all terms, so it stays meaningful when the
    sum of the terms is small."""
    arrays = [np.asarray(a, np.float64) for a in arrays]
    leaves = [leaf(a) for a in arrays]
    y = f(*leaves)
    covector = rng.standard_normal(y.shape)
    directions = [rng.standard_normal(a.shape) for a in arrays]
    assert y.requires_grad, "the result does not depend on the inputs"
    y.backward(dev(covector))

    def shifted(step: float) -> np.ndarray:
        """The value at arrays + step · directions."""
        inputs = [Tensor(dev(a + step * v)) for a, v in zip(arrays, directions)]
        return host(f(*inputs))

    along = covector * (shifted(eps) - shifted(-eps)) / (2 * eps)
    assert all(t.grad is not None for t in leaves), "an input got no gradient"
    back = [host(t.grad) * v for t, v in zip(leaves, directions)]
    numeric = along.sum()
    exact = sum(b.sum() for b in back)
    size = np.abs(along).sum() + sum(np.abs(b).sum() for b in back)
    assert abs(numeric - exact) <= tol * size + 1e-9, f"by differences {numeric:.9g}, by backward {exact:.9g}"
    for a, t in zip(arrays, leaves):
        assert array.is_array(t.grad) and t.grad.shape == a.shape and t.grad.dtype == np.float64


def seeds() -> st.SearchStrategy[np.random.Generator]:
    """A strategy for generators. All numbers of an example must come from its one generator."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def accepted(kernel: Callable, definition: Callable, *args: Any, **kwargs: Any) -> Any:
    """The kernel's result, or the definition's result if the kernel declines these arguments."""
    result = kernel(*args, **kwargs)
    return definition(*args, **kwargs) if result is NotImplemented else result


@st.composite
def shapes_of(draw: Callable, spec: str, broadcast: bool = True) -> tuple[list[tuple], tuple]:
    """([shape of each input], shape of the output) for a shape string such as "... n k, ... k m -> ... n m".

    Every letter is a size of 1 to 4, "..." stands for 0 to 2 leading sizes.  With `broadcast`, an input may lack some
    of the leading axes, or have length one there.  In some draws all letters have the same size."""
    left, right = spec.split("->")
    inputs = [letters.split() for letters in left.split(",")]
    output = right.split(",")[0].split()
    square = draw(st.sampled_from([None, None, 2, 3]))   # equal sizes, because a forgotten transpose shows only there
    size = {d: square or draw(st.integers(1, 4)) for d in sorted(set(re.findall(r"\b[a-z]\b", spec)))}
    lead = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    several = sum("..." in letters for letters in inputs) > 1

    def leading_sizes(letters: list[str]) -> tuple:
        """The sizes that "..." stands for in one input."""
        if "..." not in letters:
            return ()
        if not (broadcast and several):
            return lead
        cut = draw(st.integers(0, len(lead)))
        return tuple(n if draw(st.booleans()) else 1 for n in lead[cut:])

    def shape(letters: list[str], front: tuple) -> tuple:
        named = tuple(size[d] for d in letters if d != "...")
        return (front if "..." in letters else ()) + named

    leads = [leading_sizes(letters) for letters in inputs]
    shapes = [shape(letters, front) for letters, front in zip(inputs, leads)]
    return shapes, shape(output, np.broadcast_shapes(*leads))


def lora_curve(steps: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(losses, a trained matrix B) of LoRA on a small GPT, with dropout and with padding in batches of `rows` texts."""
    model = GPT(GPTConfig(19, 12, 16, 2, 2, dropout=0.1), seed=1)
    attach(model, LoRA(r=2, targets=("attn.[qv]", "mlp.up")))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 19, (3, rows, 10))
    mask = rng.integers(4, 11, (3, rows, 1)) > np.arange(10)
    batches = [{"ids": i, "mask": m} for i, m in zip(ids, mask)]
    history = fit(model, batches, steps, AdamW(0.01), progress=False)
    return np.array(history.losses), model.blocks[0].attn.q.edits["lora"].B.numpy()
