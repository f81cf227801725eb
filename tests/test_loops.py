"""Layer norm in plain loops (learn/loops.py): the definition's results, and Numba compiles it as it is."""
from __future__ import annotations

import numpy as np
import pytest
from helpers import host_only

from tinyft import ops
from tinyft.learn.loops import layer_norm_rows, layer_norm_rows_backward

pytestmark = host_only

EPS = 1e-5


def inputs(dtype=np.float32):
    """(x, w, b, g): one row is far from zero, and one has equal entries."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 5, 7))
    x[1] += 1000
    x[2] = 0.1
    w, b = rng.standard_normal((2, 7))
    return [a.astype(dtype) for a in (x, w, b, g)]


def difference(forward, backward, dtype=np.float32):
    """The largest difference to the definition, of the output and the gradients."""
    x, w, b, g = inputs(dtype)
    wide = [a.astype(np.float64) for a in (x, w, b, g)]
    value, pullbacks = ops.layer_norm.definition(*wide[:3], eps=EPS)
    want = [value, *(pullback(wide[3]) for pullback in pullbacks)]
    want[2:] = [a.sum(axis=0) for a in want[2:]]
    y, means, inverses = forward(x, w, b, EPS)
    got = [y, *backward(g, x, w, means, inverses)]
    assert all(a.dtype == dtype for a in (means, inverses, *got))
    usual = [0, 1, 3, 4]                                  # the row of equal entries has a σ of 0.003
    got[1], want[1] = got[1][usual], want[1][usual]
    return max(abs(a - b).max() for a, b in zip(got, want))


def test_the_loops_give_the_definitions_results():
    assert difference(layer_norm_rows, layer_norm_rows_backward, np.float64) < 1e-9
    assert difference(layer_norm_rows, layer_norm_rows_backward) < 1e-3


def test_a_wrong_mean_is_caught():
    def backward(g, x, w, means, inverses):
        return layer_norm_rows_backward(g, x, w, means + inverses.dtype.type(0.01), inverses)
    assert difference(layer_norm_rows, backward) > 5e-3


def test_a_row_of_equal_numbers_gives_b():
    x, w, b, _ = inputs()
    assert np.array_equal(layer_norm_rows(x, w, b)[0][2], b)


def test_numba_compiles_them_as_they_are():
    numba = pytest.importorskip("numba")
    assert difference(numba.njit(layer_norm_rows), numba.njit(layer_norm_rows_backward)) < 1e-3
