"""Lesson 13: the scale and the zero point of a grid, its codes, groups, and what they cost."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft.compress.grids import Grid, SignGrid
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import Shaped, draw_array, named, positive, sizes

GRIDS = "compress.grids:"
FILLED = (1, 2, -1, 3, -2)                               # no zeros: a zero would hide a mistake
BITS = st.sampled_from((2, 3, 1, 4, 8))


def filled(shape):
    """An input without zeros."""
    return Shaped(shape, FILLED, fractions=(1, 0.5, -1.5, 2, -0.75))


def check(got, want, what, guesses, dtype=False):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items() if not np.array_equal(a, want)}
    close(got, want, what, wrong, dtype=dtype)


@st.composite
def both_signs(draw: Callable):
    """W (n, g + 1), with a negative and a positive weight in each row."""
    W = draw_array(draw, (draw(sizes()), draw(sizes()) + 1), (1, 2, 3, 4), np.float64)
    W[:, 0] *= -1
    return W


# ── affine_scale ──────────────────────────────────────────────────────────────────────────────────
affine_scale = Exercise(
    f"{GRIDS}affine_scale", difficulty=1, minutes=10, on_host=True,
    may_use="W.min and W.max, both with axis=-1 and keepdims=True; np.minimum and np.maximum; "
            "np.where(condition, a, b).",
    example="""
        >>> affine_scale(np.array([[-1.0, 0.5, 2.0], [3.0, 4.0, 6.0]]), bits=2)
        array([[1.],
               [2.]])
        """,
    hints=(
        "The second row of the example has only positive weights, but its range begins at 0: "
        "(6 - 0) / 3 = 2.",
        "hi is np.maximum(W.max(axis=-1, keepdims=True), 0), and lo is the same with min.  "
        "2 bits have 4 values, and between them 3 steps.",
        "s = (hi − lo) / (2**bits − 1).  A group of zeros gives s = 0, and nobody can divide by "
        "it: np.where(s == 0, 1, s), in the dtype of W."))


def ends(W, axis=-1):
    hi = np.maximum(W.max(axis=axis, keepdims=True), 0)
    lo = np.minimum(W.min(axis=axis, keepdims=True), 0)
    return lo, hi


def right_scale(W, bits):
    lo, hi = ends(W)
    s = (hi - lo) / W.dtype.type(2**bits - 1)
    return np.where(s == 0, W.dtype.type(1), s)


def of_all(a, W):
    """One number for all groups, where each group has its own."""
    return np.broadcast_to(a, (*W.shape[:-1], 1))


def guessed_scales(W, bits):
    """{mistake: result}"""
    lo, hi = ends(W)
    largest = np.abs(W).max(axis=-1, keepdims=True)
    every = ends(W, axis=None)
    own = W.max(axis=-1, keepdims=True) - W.min(axis=-1, keepdims=True)
    steps = 2**bits - 1
    return {"it is divided by 2^b, the number of values; between them are 2^b − 1 steps":
                (hi - lo) / 2**bits,
            "0 is not in the range: lo is at most 0, and hi at least 0": own / steps,
            "it is 2 max|w| / (2^b − 1), the scale of the symmetric grid": 2 * largest / steps,
            "all groups have one scale; each group wants its own": of_all(
                (every[1] - every[0]) / steps, W),
            "it is the range hi − lo; it is not divided into steps": hi - lo,
            "lo has the wrong sign: the range is hi − lo": (hi + lo) / steps}


@affine_scale.law("weights of both signs: (max w − min w) / (2^b − 1)", W=both_signs(), bits=BITS)
def _(f, W, bits):
    close(f(W, bits), right_scale(W, bits), "the scale of W", guessed_scales(W, bits))


@affine_scale.law("weights of one sign: the range reaches to 0", W=positive("n g"),
                  sign=st.sampled_from((1.0, -1.0)), bits=BITS)
def _(f, W, sign, bits):
    W = sign * W
    close(f(W, bits), right_scale(W, bits), "the scale of W", guessed_scales(W, bits))


@affine_scale.law("a group of zeros has the scale 1", n="size", g="size", bits=BITS)
def _(f, n, g, bits):
    guesses = {"a scale of 0 would divide by 0; a group of zeros has the scale 1": np.zeros((n, 1))}
    close(f(np.zeros((n, g)), bits), np.ones((n, 1)), f"the scale of {n} x {g} zeros", guesses)


@affine_scale.law("axes in front stay: (..., g) gives (..., 1)", W=filled("... g"), bits=BITS)
def _(f, W, bits):
    close(f(W, bits), right_scale(W, bits), "the scale", guessed_scales(W, bits))


@affine_scale.law("the dtype is that of W", W=filled("n g"), bits=BITS)
def _(f, W, bits):
    W = W.astype(np.float32)
    close(f(W, bits), right_scale(W, bits), "the scale", rtol=1e-6, dtype=True)


@affine_scale.wrong_answer("b bits have 2^b values, so there are 2^b steps.", says="between them")
def _(W, bits):
    lo, hi = ends(W)
    s = (hi - lo) / W.dtype.type(2**bits)
    return np.where(s == 0, W.dtype.type(1), s)


@affine_scale.wrong_answer("The range is from the smallest weight to the largest one.",
                           says="0 is not in the range")
def _(W, bits):
    s = np.ptp(W, axis=-1, keepdims=True) / W.dtype.type(2**bits - 1)
    return np.where(np.abs(W).max(axis=-1, keepdims=True) == 0, W.dtype.type(1), s)


@affine_scale.wrong_answer("A range is symmetric about 0.", says="symmetric grid")
def _(W, bits):
    s = 2 * np.abs(W).max(axis=-1, keepdims=True) / W.dtype.type(2**bits - 1)
    return np.where(s == 0, W.dtype.type(1), s)


@affine_scale.wrong_answer("A weight matrix has one range.", says="each group wants its own")
def _(W, bits):
    lo, hi = ends(W, axis=None)
    s = of_all((hi - lo) / W.dtype.type(2**bits - 1), W)
    return np.where(s == 0, W.dtype.type(1), s)


@affine_scale.wrong_answer("The scale is the range.", says="not divided into steps")
def _(W, bits):
    lo, hi = ends(W)
    return np.where(hi == lo, W.dtype.type(1), hi - lo)


@affine_scale.wrong_answer("The range is hi + lo.", says="wrong sign")
def _(W, bits):
    lo, hi = ends(W)
    s = (hi + lo) / W.dtype.type(2**bits - 1)
    return np.where(hi == lo, W.dtype.type(1), s)


@affine_scale.wrong_answer("Zeros have the range 0, so their scale is 0.", says="divide by 0",
                           subtle=True)
def _(W, bits):
    lo, hi = ends(W)
    return (hi - lo) / W.dtype.type(2**bits - 1)


@affine_scale.wrong_answer("A scale is a float64.", says="dtype", subtle=True)
def _(W, bits):
    return right_scale(W.astype(np.float64), bits)


@affine_scale.wrong_answer("A group is a column.", says="its shape is")
def _(W, bits):
    lo, hi = ends(W, axis=0)
    s = (hi - lo) / W.dtype.type(2**bits - 1)
    return np.where(s == 0, W.dtype.type(1), s)


# ── affine_zero ───────────────────────────────────────────────────────────────────────────────────
affine_zero = Exercise(
    f"{GRIDS}affine_zero", difficulty=1, minutes=5, on_host=True,
    may_use="W.min(axis=-1, keepdims=True), np.minimum, np.abs and np.rint.",
    example="""
        >>> affine_zero(np.array([[-1.0, 0.5, 2.0], [3.0, 4.0, 6.0]]), np.array([[1.0], [2.0]]))
        array([[1.],
               [0.]])
        """,
    hints=(
        "The code 0 stands for lo.  How many steps of s are there from lo up to 0?",
        "lo is at most 0, so −lo/s is the number of steps.  Without a negative weight it is 0.",
        "np.rint(-np.minimum(W.min(axis=-1, keepdims=True), 0) / scale).  (np.abs in place of the "
        "minus avoids the number −0.)"))
SCALES = (1.5, 0.75, 2, 1)


def right_zero(W, scale):
    return np.rint(np.abs(ends(W)[0]) / scale)


def guessed_zeros(W, scale):
    lo, hi = ends(W)
    return {"it has the wrong sign: z = −lo/s is a code, which is never negative":
                np.rint(lo / scale),
            "0 is not in the range: positive weights have lo = 0": np.rint(
                -W.min(axis=-1, keepdims=True) / scale),
            "it is hi/s; z counts the steps from lo up to 0": np.rint(hi / scale),
            "it is not rounded: z is a code, a whole number": -lo / scale,
            "it is rounded down; z is the nearest whole number": np.floor(-lo / scale),
            "it is −lo: it is not divided by the scale": -lo,
            "all groups have one zero point; each group wants its own":
                of_all(np.rint(-lo.min() / scale), W)}


@st.composite
def scaled_weights(draw: Callable, one_sided: bool = False):
    """W (n, g) and scales (n, 1)."""
    W = draw(both_signs())
    W = np.abs(W) if one_sided else W
    return named(W=W, scale=draw_array(draw, (len(W), 1), SCALES, np.float64))


@affine_zero.law("z = −lo/s, where it is whole", W=both_signs())
def _(f, W):
    scale = np.ones((len(W), 1))
    check(f(W, scale), right_zero(W, scale), "the zero point for s = 1", guessed_zeros(W, scale))


@affine_zero.law("z = −lo/s, rounded to the nearest whole number", given=scaled_weights())
def _(f, given):
    W, scale = given
    check(f(W, scale), right_zero(W, scale), "the zero point", guessed_zeros(W, scale))


@affine_zero.law("without a negative weight z is 0", given=scaled_weights(one_sided=True))
def _(f, given):
    W, scale = given
    check(f(W, scale), right_zero(W, scale), "the zero point", guessed_zeros(W, scale))


@affine_zero.law("axes in front stay, and the dtype is that of W", W=filled("... g"))
def _(f, W):
    W = W.astype(np.float32)
    scale = np.ones((*W.shape[:-1], 1), np.float32)
    check(f(W, scale), right_zero(W, scale), "the zero point", guessed_zeros(W, scale), dtype=True)


@affine_zero.wrong_answer("z = lo/s, with the sign of lo.", says="wrong sign")
def _(W, scale):
    return np.rint(ends(W)[0] / scale)


@affine_zero.wrong_answer("lo is the smallest weight, also where it is positive.",
                          says="0 is not in the range")
def _(W, scale):
    return np.rint(-W.min(axis=-1, keepdims=True) / scale)


@affine_zero.wrong_answer("z counts the steps from 0 up to hi.", says="z counts the steps")
def _(W, scale):
    return np.rint(ends(W)[1] / scale)


@affine_zero.wrong_answer("A zero point may lie between two codes.", says="it is not rounded")
def _(W, scale):
    return -ends(W)[0] / scale


@affine_zero.wrong_answer("To round is to cut the digits off.", says="rounded down", subtle=True)
def _(W, scale):
    return np.floor(-ends(W)[0] / scale)


@affine_zero.wrong_answer("z is a weight.", says="not divided by the scale")
def _(W, scale):
    return -ends(W)[0]


@affine_zero.wrong_answer("A weight matrix has one zero point.", says="each group wants its own")
def _(W, scale):
    return of_all(np.rint(-np.minimum(W.min(), 0) / scale), W).astype(W.dtype)


@affine_zero.wrong_answer("A code is an integer, so it has the dtype int64.", says="dtype")
def _(W, scale):
    return right_zero(W, scale).astype(np.int64)


# ── Grid.encode ───────────────────────────────────────────────────────────────────────────────────
encode = Exercise(
    f"{GRIDS}Grid.encode", difficulty=2, minutes=10, on_host=True, closed=(f"{GRIDS}Grid.round",),
    may_use="self.scale, self.zero and self.top; np.rint, which rounds a half to the even number; "
            "np.clip(a, low, high).",
    example="""
        >>> from tinyft.compress.grids import Grid
        >>> grid = Grid(scale=np.array([[0.5]]), zero=np.array([[1.0]]), top=3)
        >>> grid.decode(np.arange(4))
        array([[-0.5,  0. ,  0.5,  1. ]])
        >>> encode(grid, np.array([[-0.4, 0.1, 0.6, 5.0]]))
        array([[0., 1., 2., 3.]])
        """,
    hints=(
        "w/s is the number of steps from 0 to w.  The code of 0 is z.",
        "Round the number of steps, add z, and then see to it that the code is one of 0 ... top.",
        "np.clip(np.rint(w / self.scale) + self.zero, 0, self.top)."))


@st.composite
def on_a_grid(draw: Callable, offsets: tuple = (0.0,), beyond: int = 0):
    """A grid of n groups, and weights w (n, g) at its values, shifted by a part of a step each.

    The codes lie in 0 ... top, or up to `beyond` outside of it, but never at an end."""
    n = draw(sizes())
    top = draw(st.sampled_from((3, 7)))
    scale = draw_array(draw, (n, 1), (1, 2, 0.5), np.float64)
    zero = draw_array(draw, (n, 1), (1, 2, 0), np.float64)
    codes = range(top + 1)
    if beyond:
        codes = [*range(-beyond, 0), *range(top + 1, top + 1 + beyond)]
    shape = (n, draw(sizes()))
    q = draw_array(draw, shape, codes, np.float64)
    shift = draw_array(draw, shape, offsets, np.float64)
    return named(w=scale * (q - zero + shift), scale=scale, zero=zero, top=top)


def right_codes(w, scale, zero, top):
    return np.clip(np.rint(w / scale) + zero, 0, top)


def encoded(f, w, scale, zero, top, dtype=np.float64):
    grid = Grid(scale.astype(dtype), zero.astype(dtype), top)
    return f(grid, w.astype(dtype))


def guessed_codes(w, scale, zero, top):
    steps = np.rint(w / scale)
    return {"z is left out: the code of the value 0 is z": np.clip(steps, 0, top),
            "z is subtracted; it is added": np.clip(steps - zero, 0, top),
            "w is multiplied with the scale; it is divided by it":
                np.clip(np.rint(w * scale) + zero, 0, top),
            "it is not rounded: a code is a whole number": np.clip(w / scale + zero, 0, top),
            "it is rounded towards 0; the nearest value may be the other neighbour":
                np.clip(np.trunc(w / scale) + zero, 0, top),
            "it is rounded down; the nearest value may be above":
                np.clip(np.floor(w / scale) + zero, 0, top),
            "a code lies outside of 0 ... top: it is not clipped": steps + zero,
            "the steps are clipped before z is added; clip the code":
                np.clip(steps, 0, top) + zero,
            "the largest code is top + 1: 0 ... top are top + 1 codes":
                np.clip(steps + zero, 0, top + 1),
            "a half is rounded up; np.rint rounds it to the even number":
                np.clip(np.floor(w / scale + 0.5) + zero, 0, top),
            "z is added before the rounding, which changes some halves":
                np.clip(np.rint(w / scale + zero), 0, top)}


def check_codes_of(f, given):
    check(encoded(f, *given), right_codes(*given), "the codes of w", guessed_codes(*given))


@encode.law("a value of the grid, s (q − z), has the code q", given=on_a_grid())
def _(f, given):
    check_codes_of(f, given)


@encode.law("a weight between two values has the code of the nearer one",
            given=on_a_grid(offsets=(0.25, -0.25, 0.375, -0.375)))
def _(f, given):
    check_codes_of(f, given)


@encode.law("a weight beyond the ends has the first or the last code", given=on_a_grid(beyond=3))
def _(f, given):
    check_codes_of(f, given)


@encode.law("half-way the even number of steps wins", given=on_a_grid(offsets=(0.5, -0.5)))
def _(f, given):
    check_codes_of(f, given)


@encode.law("a code is a whole number in the dtype of w", given=on_a_grid())
def _(f, given):
    want = right_codes(*given).astype(np.float32)
    check(encoded(f, *given, dtype=np.float32), want, "the codes", guessed_codes(*given),
          dtype=True)


@encode.wrong_answer("The code of the value 0 is 0.", says="z is left out")
def _(self, w):
    return np.clip(np.rint(w / self.scale), 0, self.top)


@encode.wrong_answer("w = s (q + z), so z is subtracted.", says="z is subtracted")
def _(self, w):
    return np.clip(np.rint(w / self.scale) - self.zero, 0, self.top)


@encode.wrong_answer("A scale is a factor.", says="multiplied with the scale")
def _(self, w):
    return np.clip(np.rint(w * self.scale) + self.zero, 0, self.top)


@encode.wrong_answer("clip makes codes of the numbers; no rounding is needed.",
                     says="it is not rounded")
def _(self, w):
    return np.clip(w / self.scale + self.zero, 0, self.top)


@encode.wrong_answer("To round is to cut the digits off.", says="rounded towards 0")
def _(self, w):
    return np.clip(np.trunc(w / self.scale) + self.zero, 0, self.top)


@encode.wrong_answer("To round is to round down.", says="rounded down")
def _(self, w):
    return np.clip(np.floor(w / self.scale) + self.zero, 0, self.top)


@encode.wrong_answer("No weight lies outside of its own grid.", says="it is not clipped")
def _(self, w):
    return np.rint(w / self.scale) + self.zero


@encode.wrong_answer("The number of steps lies in 0 ... top.", says="clip the code")
def _(self, w):
    return np.clip(np.rint(w / self.scale), 0, self.top) + self.zero


@encode.wrong_answer("top is the number of codes.", says="the largest code is top + 1")
def _(self, w):
    return np.clip(np.rint(w / self.scale) + self.zero, 0, self.top + 1)


@encode.wrong_answer("A half is rounded up.", says="to the even number", subtle=True)
def _(self, w):
    return np.clip(np.floor(w / self.scale + 0.5) + self.zero, 0, self.top)


@encode.wrong_answer("It is the same whether z is added before the rounding or after it.",
                     says="before the rounding", subtle=True)
def _(self, w):
    return np.clip(np.rint(w / self.scale + self.zero), 0, self.top)


@encode.wrong_answer("A code is an integer.", says="dtype")
def _(self, w):
    return np.clip(np.rint(w / self.scale) + self.zero, 0, self.top).astype(np.uint8)


# ── fit_groups ────────────────────────────────────────────────────────────────────────────────────
fit_groups = Exercise(
    f"{GRIDS}fit_groups", difficulty=3, minutes=20, on_host=True,
    may_use="fit_grid(part, kind, bits, half_scales=...), whose groups are the last axis of part: "
            "(..., g) gives a Grid with scales (..., 1); grid[..., 0], which takes the last axis "
            "of its scales away; join_grids(list of grids), which puts grids (out, n) side by "
            "side; reshape.",
    example="""
        >>> W = np.array([[1.0, 3.0, 6.0, -3.0, 9.0], [2.0, 0.0, 4.0, 5.0, -3.0]])
        >>> grid = fit_groups(W, "affine", bits=2, group=2)
        >>> grid.scale.round(2)
        array([[1.  , 3.  , 3.  ],
               [0.67, 1.67, 1.  ]])
        >>> grid.zero
        array([[0., 1., 0.],
               [0., 0., 3.]])
        """,
    hints=(
        "The first `whole` inputs of a row fill whole groups; whole = in // g * g.  What remains "
        "is one shorter group.",
        "W[:, :whole].reshape(out, -1, group) has a group on its last axis.  Its grid has scales "
        "(out, groups, 1), and [..., 0] makes them (out, groups).  Leave this part out if it is "
        "empty.",
        "For the rest fit_grid(W[:, whole:], ...) has scales (out, 1) already.  Leave it out if "
        "whole == in.  Give kind, bits and half_scales to both calls."))


def parts_of(W, group):
    return [W[:, start:start + group] for start in range(0, W.shape[1], group)]


def scales_of(parts, bits):
    return np.concatenate([right_scale(part, bits) for part in parts], axis=1)


def grid_of(f, W, bits, group, kind="affine", **more):
    grid = f(W, kind, bits, group, **more)
    if not isinstance(grid, Grid):
        raise Unusable(f"the result should be a Grid; yours is {grid!r:.60}")
    return grid


def guessed_groups(W, bits, group):
    columns = scales_of(parts_of(W.T, group), bits).T
    width = W.shape[1]
    whole = width // group * group
    found = {"a row has one scale; every group of a row has its own":
                 np.repeat(right_scale(W, bits), -(-width // group), axis=1),
             "a group is a part of a column; it is a part of a row": columns}
    if 0 < whole < width:
        first = parts_of(W[:, :whole], group)
        found["the shorter group at the end of a row is lost"] = scales_of(first, bits)
        merged = [*first[:-1], W[:, whole - group:]]
        found["the inputs at the end of a row have joined the group before them"] = scales_of(
            merged, bits)
    return found


@st.composite
def grouped(draw: Callable, is_short: bool = False):
    """W (n, width) and a group that divides the width, or does not."""
    group = draw(sizes()) + is_short
    width = group * draw(sizes())
    if is_short:
        width -= draw(st.integers(1, group - 1))
    return named(W=draw_array(draw, (draw(sizes()), width), FILLED, np.float64), group=group)


@fit_groups.law("a group as wide as W: one scale for each row", W=filled("n k"), bits=BITS)
def _(f, W, bits):
    guesses = guessed_groups(W, bits, W.shape[1])
    guesses["all rows have one scale"] = of_all(right_scale(W.reshape(1, -1), bits), W)
    close(grid_of(f, W, bits, W.shape[1]).scale, right_scale(W, bits), "the scale", guesses)


@fit_groups.law("g neighbours in a row are a group", given=grouped(), bits=BITS)
def _(f, given, bits):
    W, group = given
    close(grid_of(f, W, bits, group).scale, scales_of(parts_of(W, group), bits),
          "the scales of the groups", guessed_groups(W, bits, group))


@fit_groups.law("the last group of a row may be shorter", given=grouped(is_short=True), bits=BITS)
def _(f, given, bits):
    W, group = given
    close(grid_of(f, W, bits, group).scale, scales_of(parts_of(W, group), bits),
          "the scales of the groups", guessed_groups(W, bits, group))


@fit_groups.law("every group has its zero point", given=grouped(), bits=BITS)
def _(f, given, bits):
    W, group = given
    zeros = [right_zero(part, right_scale(part, bits)) for part in parts_of(W, group)]
    close(grid_of(f, W, bits, group).zero, np.concatenate(zeros, axis=1), "the zero points")


@fit_groups.law("the kind of the grid is kept: a sign grid has s = 2 mean |w|",
                given=grouped(is_short=True))
def _(f, given):
    W, group = given
    grid = grid_of(f, W, 1, group, kind="sign")
    if not isinstance(grid, SignGrid):
        raise Unusable("for kind='sign' the result should be a SignGrid: give kind to fit_grid")
    padded = np.zeros((len(W), -(-W.shape[1] // group) * group))
    padded[:, :W.shape[1]] = W
    means = [2 * np.abs(part).mean(axis=1, keepdims=True) for part in parts_of(W, group)]
    of_padded = [2 * np.abs(p).mean(axis=1, keepdims=True) for p in parts_of(padded, group)]
    close(grid.scale, np.concatenate(means, axis=1), "the scales of the sign grid",
          {"the shorter group is filled up with zeros, which change its mean":
               np.concatenate(of_padded, axis=1)})


@fit_groups.law("half_scales=True: the scales are numbers of float16", given=grouped())
def _(f, given):
    W, group = given
    scale = np.asarray(grid_of(f, W / 3, 2, group, half_scales=True).scale)
    if (scale.astype(np.float16) != scale).any():
        raise Unusable("half_scales=True makes no difference: give it to fit_grid")


def fitted(parts, kind, bits, half_scales):
    from tinyft.compress.grids import fit_grid, join_grids
    return join_grids([fit_grid(part, kind, bits, half_scales=half_scales) for part in parts])


@fit_groups.wrong_answer("A row has one scale, which all its groups use.",
                         says="a row has one scale")
def _(W, kind, bits, group, *, half_scales=False):
    return fitted([W] * len(parts_of(W, group)), kind, bits, half_scales)


@fit_groups.wrong_answer("Groups run along the columns.", says="a part of a column")
def _(W, kind, bits, group, *, half_scales=False):
    grid = fitted(parts_of(W.T, group), kind, bits, half_scales)
    return type(grid)(grid.scale.T, np.asarray(grid.zero).T, grid.top)


@fit_groups.wrong_answer("All rows share a scale.", says="all rows have one scale")
def _(W, kind, bits, group, *, half_scales=False):
    parts = [np.tile(part.reshape(1, -1), (len(W), 1)) for part in parts_of(W, group)]
    return fitted(parts, kind, bits, half_scales)


@fit_groups.wrong_answer("What does not fill a group needs no scale.", says="is lost")
def _(W, kind, bits, group, *, half_scales=False):
    whole = W.shape[1] // group * group
    return fitted(parts_of(W[:, :whole] if whole else W, group), kind, bits, half_scales)


@fit_groups.wrong_answer("What does not fill a group joins the group before it.",
                         says="have joined the group before")
def _(W, kind, bits, group, *, half_scales=False):
    whole = W.shape[1] // group * group
    if 0 < whole < W.shape[1]:
        parts = [*parts_of(W[:, :whole - group], group), W[:, whole - group:]]
    else:
        parts = parts_of(W, group)
    return fitted(parts, kind, bits, half_scales)


@fit_groups.wrong_answer("Zeros at the end of a row change nothing.", says="change its mean",
                         subtle=True)
def _(W, kind, bits, group, *, half_scales=False):
    padded = np.zeros((len(W), -(-W.shape[1] // group) * group))
    padded[:, :W.shape[1]] = W
    return fitted(parts_of(padded, group), kind, bits, half_scales)


@fit_groups.wrong_answer("Grids are affine.", says="give kind to fit_grid", subtle=True)
def _(W, kind, bits, group, *, half_scales=False):
    return fitted(parts_of(W, group), "affine", bits, half_scales)


@fit_groups.wrong_answer("half_scales is for someone else.", says="give it to fit_grid",
                         subtle=True)
def _(W, kind, bits, group, *, half_scales=False):
    return fitted(parts_of(W, group), kind, bits, half_scales=False)


@fit_groups.wrong_answer("The groups of a row share their zero point.", says="zero points",
                         subtle=True)
def _(W, kind, bits, group, *, half_scales=False):
    grid = fitted(parts_of(W, group), kind, bits, half_scales)
    if kind != "affine":
        return grid
    zero = np.repeat(grid.zero[:, :1], grid.zero.shape[1], axis=1)
    return Grid(grid.scale, zero, grid.top)


# ── code_bits ─────────────────────────────────────────────────────────────────────────────────────
code_bits = Exercise(
    f"{GRIDS}code_bits", difficulty=1, minutes=5, on_host=True,
    may_use="fixed_zero(kind, bits), the zero point that all groups share, or None if each group "
            "stores its own in `bits` bits.",
    example="""
        >>> code_bits("absmax", 4, 64)
        4.25
        >>> code_bits("affine", 4, 64)
        4.3125
        """,
    hints=(
        "A weight has a code of its own.  Its scale and its zero point it shares with the others "
        "of its group.",
        "A float16 takes 16 bits.  A zero point is a code, so it takes as many bits as a code, "
        "but only where every group stores one.",
        "bits + (16 + zero_bits) / group, where zero_bits is bits if fixed_zero(kind, bits) is "
        "None, else 0."))
GROUPS = st.sampled_from((64, 32, 16, 128))


def guessed_bits(bits, group, zero):
    return {"the scales are forgotten": bits,
            "a float16 takes 16 bits; these are bits of a float32": bits + (32 + zero) / group,
            "a group has one scale, not one for each weight": bits + 16 + zero,
            "the zero points are forgotten": bits + 16 / group,
            "these grids store no zero points: all groups share one": bits + (16 + bits) / group,
            "a zero point takes as many bits as a code": bits + 32 / group,
            "it is the bits of a whole group; divide by its weights": group * bits + 16 + zero,
            "it is a number of bytes": (bits + (16 + zero) / group) / 8}


@code_bits.law("a grid whose groups share the zero point: b + 16/g",
               kind=st.sampled_from(("absmax", "symmetric")), bits=st.sampled_from((4, 2, 3, 8)),
               group=GROUPS)
def _(f, kind, bits, group):
    close(f(kind, bits, group), bits + 16 / group, f"the bits of {kind}",
          guessed_bits(bits, group, 0))


@code_bits.law("the affine grid stores its zero points as well: b + (16 + b)/g",
               bits=st.sampled_from((4, 2, 3, 8)), group=GROUPS)
def _(f, bits, group):
    close(f("affine", bits, group), bits + (16 + bits) / group, "the bits of affine",
          guessed_bits(bits, group, bits))


@code_bits.law("ternary and sign grids", group=GROUPS,
               given=st.sampled_from((("sign", 1), ("ternary", 2))))
def _(f, given, group):
    kind, bits = given
    close(f(kind, bits, group), bits + 16 / group, f"the bits of {kind}",
          guessed_bits(bits, group, 0))


@code_bits.wrong_answer("A weight of b bits takes b bits.", says="scales are forgotten")
def _(kind, bits, group):
    return float(bits)


@code_bits.wrong_answer("A scale is a float32.", says="float16 takes 16 bits")
def _(kind, bits, group):
    return bits + (32 + (bits if kind == "affine" else 0)) / group


@code_bits.wrong_answer("Every weight has a scale.", says="a group has one scale")
def _(kind, bits, group):
    return float(bits + 16 + (bits if kind == "affine" else 0))


@code_bits.wrong_answer("Only scales are stored.", says="zero points are forgotten", subtle=True)
def _(kind, bits, group):
    return bits + 16 / group


@code_bits.wrong_answer("Every grid stores its zero points.", says="share one")
def _(kind, bits, group):
    return bits + (16 + bits) / group


@code_bits.wrong_answer("A zero point is a float16 too.", says="as many bits as a code",
                        subtle=True)
def _(kind, bits, group):
    return bits + (32 if kind == "affine" else 16) / group


@code_bits.wrong_answer("It is asked for a group.", says="bits of a whole group")
def _(kind, bits, group):
    return float(group * bits + 16 + (bits if kind == "affine" else 0))


@code_bits.wrong_answer("Memory is counted in bytes.", says="number of bytes")
def _(kind, bits, group):
    return (bits + (16 + (bits if kind == "affine" else 0)) / group) / 8
