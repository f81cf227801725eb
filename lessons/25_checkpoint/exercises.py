"""Lesson 25: rotary positions, shared heads of keys and values, and blocks of 4-bit codes."""
from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft.array import asnumpy, is_array, xp
from tinyft.compress.ggml import half_bytes
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import Shaped, draw_array, named, sizes
from tinyft.models.rotary import Rotary, RotaryScaling

FILLED = (1, 2, -1, 3, -2)                               # no zeros: a zero would hide a mistake


def filled(shape):
    """An input without zeros."""
    return Shaped(shape, FILLED, fractions=(1, 0.5, -1.5, 2, -0.75))


# ── frequencies ───────────────────────────────────────────────────────────────────────────────────
frequencies = Exercise(
    "models.rotary:Rotary.frequencies", difficulty=1, minutes=5,
    may_use="self.width, self.base, self.scaling.apply(frequencies), m.arange and **.",
    example="""
        >>> from tinyft.models.rotary import Rotary, RotaryScaling
        >>> frequencies(Rotary(4, base=100.0))
        array([1. , 0.1])
        >>> frequencies(Rotary(4, base=100.0, scaling=RotaryScaling("linear", factor=2.0)))
        array([0.5 , 0.05])
        """,
    hints=(
        "A head of width D has D/2 pairs.  Pair 0 turns by 1 radian for every position, and each "
        "later pair turns more slowly.",
        "The exponent of pair i is −2i/D.  m.arange(0, D, 2) holds 2i for all pairs.",
        "Compute self.base ** (-m.arange(0, self.width, 2) / self.width).  Return it if "
        "self.scaling is None, else self.scaling.apply of it."))
BASES = st.sampled_from((10000.0, 100.0, 500000.0))


def speeds(D, base=10000.0, i=None, sign=-1.0, m=np):
    i = m.arange(D // 2) if i is None else i
    return base ** (sign * 2 * i / D)


def turning(f, D, base=10000.0, scaling=None):
    out = f(Rotary(D, base=base, scaling=scaling))
    if not is_array(out):
        raise Unusable(f"the result should be an array; yours is {out!r:.60}")
    return out


@frequencies.law("there is one frequency for each pair", pairs="size")
def _(f, pairs):
    close(np.array(turning(f, 2 * pairs).shape), np.array([pairs]),
          f"the shape of the frequencies for D = {2 * pairs}",
          {"there is one for each number of a head; two numbers share one": [2 * pairs]})


@frequencies.law("pair 0 turns by 1 radian for every position", pairs="size", base=BASES)
def _(f, pairs, base):
    close(turning(f, 2 * pairs, base)[:1], np.ones(1), "the frequency of pair 0",
          {"the pairs are counted from 1": speeds(2 * pairs, base, np.arange(1, 2))})


@frequencies.law("pair i turns by base^(−2i/D)", pairs="size", base=BASES)
def _(f, pairs, base):
    D = 2 * pairs
    guesses = {"later pairs turn faster; they must be slower": speeds(D, base, sign=1.0),
               "the exponent is −i/D: the 2 is missing": speeds(D, base, np.arange(pairs) / 2),
               "the exponent is −2i/(D/2): D is the width of the head": speeds(pairs, base,
                                                                              np.arange(pairs)),
               "the base is 10000, whatever self.base is": speeds(D)}
    close(turning(f, D, base), speeds(D, base), f"the frequencies for D = {D}", guesses)


@frequencies.law("scaling.apply changes the frequencies", pairs="size",
                 factor=st.sampled_from((2.0, 8.0)), kind=st.sampled_from(("linear", "llama3")))
def _(f, pairs, factor, kind):
    D = 2 * pairs
    scaling = RotaryScaling(kind, factor, original=64)
    want = scaling.apply(speeds(D))
    guesses = {"the scaling is left out": speeds(D),
               "all are divided by the factor; self.scaling.apply knows which": speeds(D) / factor,
               "it is applied twice": scaling.apply(want)}
    close(turning(f, D, scaling=scaling), want, f"the frequencies with the scaling {kind}", guesses)


class Recorder:
    """NumPy, which counts the functions that are taken from it."""
    used = 0

    def __getattr__(self, name):
        self.used += 1
        return getattr(np, name)


@frequencies.law("the module m makes the array", pairs="size")
def _(f, pairs):
    m = Recorder()
    f(Rotary(2 * pairs), m)
    if not m.used:
        raise Unusable("the module m is not used: on a GPU the array would be made on the host")


def scaled(rotary, found):
    return found if rotary.scaling is None else rotary.scaling.apply(found)


@frequencies.wrong_answer("Every pair turns faster than the one before.", says="must be slower")
def _(self, m=np):
    return scaled(self, speeds(self.width, self.base, sign=1.0, m=m))


@frequencies.wrong_answer("The exponent is −i/D.", says="the 2 is missing")
def _(self, m=np):
    return scaled(self, speeds(self.width, self.base, m.arange(self.width // 2) / 2))


@frequencies.wrong_answer("D is the number of pairs.", says="D is the width of the head")
def _(self, m=np):
    pairs = self.width // 2
    return scaled(self, speeds(pairs, self.base, m.arange(pairs)))


@frequencies.wrong_answer("The pairs are counted from 1.", says="counted from 1")
def _(self, m=np):
    return scaled(self, speeds(self.width, self.base, m.arange(1, self.width // 2 + 1)))


@frequencies.wrong_answer("Every number of a head has a frequency.", says="two numbers share one")
def _(self, m=np):
    return scaled(self, m.repeat(speeds(self.width, self.base, m=m), 2))


@frequencies.wrong_answer("The base is always 10000.", says="whatever self.base is", subtle=True)
def _(self, m=np):
    return scaled(self, speeds(self.width, m=m))


@frequencies.wrong_answer("The scaling is for other models.", says="left out", subtle=True)
def _(self, m=np):
    return speeds(self.width, self.base, m=m)


@frequencies.wrong_answer("A scaling divides all frequencies.", says="knows which", subtle=True)
def _(self, m=np):
    factor = 1.0 if self.scaling is None else self.scaling.factor
    return speeds(self.width, self.base, m=m) / factor


@frequencies.wrong_answer("float32 is enough for an angle.", says="dtype")
def _(self, m=np):
    return scaled(self, speeds(self.width, self.base, m=m)).astype(np.float32)


@frequencies.wrong_answer("Arrays are made by NumPy.", says="m is not used", subtle=True)
def _(self, m=np):
    return scaled(self, speeds(self.width, self.base))


# ── rotary ────────────────────────────────────────────────────────────────────────────────────────
rotary = Exercise(
    "ops:rotary", difficulty=3, minutes=20, closed=("ops:_turn",),
    may_use="rotary_factors(x, cos, sin), which raises ValueError for an odd D and returns cos and "
            "sin as arrays in the dtype and on the device of x; xp(x), the module that made x, "
            "NumPy or CuPy, and its concatenate; slices.  As in every op, x is an array.  Return "
            "y and a tuple of three pullbacks, for x, cos and sin; those of cos and sin are None.",
    example="""
        >>> x = np.array([[1.0, 0.0, 0.0, 5.0]])         # the pairs (1, 0) and (0, 5)
        >>> cos, sin = np.array([0.6] * 4), np.array([0.8] * 4)
        >>> rotary(x, cos, sin).data
        array([[ 0.6, -4. ,  0.8,  3. ]])
        """,
    hints=(
        "x[..., :D // 2] holds the first numbers of all pairs, x[..., D // 2:] the second ones.  "
        "A pair (a, b) becomes (a cos − b sin, a sin + b cos).",
        "Write a small function turn(x) that gives (−second half, first half).  Then y is "
        "x * cos + turn(x) * sin.",
        "The gradient turns back: g * cos - turn(g * sin).  Return y and (pullback, None, None)."))
# (cos, sin) of four angles.  The first is the simplest with which every mistake is seen.
COSINES = np.array([0.6, 0.0, 1.0, -0.8])
SINES = np.array([0.8, 1.0, 0.0, 0.6])


@st.composite
def rotations(draw: Callable, heads: bool = False):
    """x (T, D) and g, or (B, H, T, D); cos and sin (T, D)."""
    T = draw(sizes())
    pairs = draw(sizes())
    front = (draw(sizes()), 2) if heads else ()
    angles = draw_array(draw, (T, pairs), range(4), np.int64)
    angles = np.concatenate([angles, angles], axis=-1)
    shape = (*front, T, 2 * pairs)
    return named(x=draw_array(draw, shape, FILLED, np.float64),
                 g=draw_array(draw, shape, FILLED, np.float64),
                 cos=COSINES[angles], sin=SINES[angles])


def turned(x, sign=1.0):
    half = x.shape[-1] // 2
    return np.concatenate([-sign * x[..., half:], sign * x[..., :half]], axis=-1)


def turned_neighbours(x):
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return out


@rotary.law("a pair (a, b) becomes (a cos − b sin, a sin + b cos)", given=rotations())
def _(f, given):
    x, _, cos, sin = given
    y, _ = f(x, cos, sin)
    half = np.concatenate([x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]], axis=-1)
    guesses = {"it is rotated in the opposite direction": x * cos - turned(x) * sin,
               "the pairs are neighbours; number i belongs to number i + D/2":
                   x * cos + turned_neighbours(x) * sin,
               "the minus is missing: (x₁, x₂) turns into (−x₂, x₁)": x * cos + half * sin,
               "cos and sin are swapped": x * sin + turned(x) * cos,
               "the second term is missing": x * cos}
    close(y, x * cos + turned(x) * sin, "y", guesses)


@rotary.law("cos and sin of T positions serve all texts and heads, (B, H, T, D)",
            given=rotations(heads=True))
def _(f, given):
    x, _, cos, sin = given
    close(f(x, cos, sin)[0], x * cos + turned(x) * sin, "y")


@rotary.law("the gradient turns back", given=rotations())
def _(f, given):
    x, g, cos, sin = given
    _, pullbacks = f(x, cos, sin)
    if pullbacks[0] is None:
        raise Unusable("x gets no gradient: the first pullback is None")
    guesses = {"the gradient is turned forward; it must turn back": g * cos + turned(g) * sin,
               "the gradient goes through cos alone": g * cos,
               "the gradient is not turned at all": g}
    close(pullbacks[0](g), g * cos - turned(g) * sin, "the gradient of x", guesses)


@rotary.law("cos and sin get no gradient", given=rotations())
def _(f, given):
    x, _, cos, sin = given
    _, pullbacks = f(x, cos, sin)
    if len(pullbacks) != 3 or any(p is not None for p in pullbacks[1:]):
        raise Unusable("the pullbacks of cos and sin should be None: the angles are not trained")


@rotary.law("an odd D raises ValueError", given=rotations())
def _(f, given):
    x, _, cos, sin = given
    x, cos, sin = (np.concatenate([a, a[..., :1]], axis=-1) for a in (x, cos, sin))
    try:
        f(x, cos, sin)
    except ValueError:
        return
    raise Unusable(f"x has rows of {x.shape[-1]} numbers, which are not pairs: "
                   "raise ValueError (rotary_factors does)")


@rotary.law("y keeps the dtype of x", given=rotations())
def _(f, given):
    x, _, cos, sin = (a.astype(np.float32) for a in given)
    y = x * cos + turned(x) * sin
    close(f(x, cos, sin)[0], y, "y", rtol=1e-5, atol=1e-5)


def halves_turned(x, sign=1.0):
    """turn(x) on either backend, and against the rule for sign = −1."""
    half = x.shape[-1] // 2
    return xp(x).concatenate([-sign * x[..., half:], sign * x[..., :half]], axis=-1)


def check_pairs(x):
    if x.shape[-1] % 2:
        raise ValueError("an odd row")


def back(cos, sin):
    """The right pullbacks."""
    return (lambda g: g * cos - halves_turned(g * sin)), None, None


@rotary.wrong_answer("Neighbours are pairs, as in the paper.", says="the pairs are neighbours")
def _(x, cos, sin):
    check_pairs(x)
    other = xp(x).empty_like(x)
    other[..., 0::2] = -x[..., 1::2]
    other[..., 1::2] = x[..., 0::2]
    return x * cos + other * sin, back(cos, sin)


@rotary.wrong_answer("(x₁, x₂) turns into (x₂, −x₁).", says="opposite direction")
def _(x, cos, sin):
    check_pairs(x)
    return x * cos + halves_turned(x, sign=-1.0) * sin, back(cos, sin)


@rotary.wrong_answer("To turn is to swap the halves.", says="the minus is missing")
def _(x, cos, sin):
    check_pairs(x)
    half = x.shape[-1] // 2
    swapped = xp(x).concatenate([x[..., half:], x[..., :half]], axis=-1)
    return x * cos + swapped * sin, back(cos, sin)


@rotary.wrong_answer("The sine belongs to x, the cosine to the turned x.", says="swapped")
def _(x, cos, sin):
    check_pairs(x)
    return x * sin + halves_turned(x) * cos, back(cos, sin)


@rotary.wrong_answer("The gradient is rotated as x is.", says="it must turn back", subtle=True)
def _(x, cos, sin):
    check_pairs(x)
    y = x * cos + halves_turned(x) * sin
    return y, ((lambda g: g * cos + halves_turned(g) * sin), None, None)


@rotary.wrong_answer("A rotation keeps lengths, so the gradient passes.", says="not turned at all",
                     subtle=True)
def _(x, cos, sin):
    check_pairs(x)
    return x * cos + halves_turned(x) * sin, ((lambda g: g), None, None)


@rotary.wrong_answer("The second term moves numbers, and needs no gradient.",
                     says="through cos alone", subtle=True)
def _(x, cos, sin):
    check_pairs(x)
    return x * cos + halves_turned(x) * sin, ((lambda g: g * cos), None, None)


@rotary.wrong_answer("Every input of an op has a gradient.", says="should be None", subtle=True)
def _(x, cos, sin):
    check_pairs(x)
    y = x * cos + halves_turned(x) * sin
    return y, (back(cos, sin)[0], (lambda g: g * x), (lambda g: g * halves_turned(x)))


@rotary.wrong_answer("If D is odd, a number in the middle stays as it is.",
                     says="which are not pairs", subtle=True)
def _(x, cos, sin):
    return x * cos + halves_turned(x) * sin, back(cos, sin)


@rotary.wrong_answer("Angles want float64.", says="dtype", subtle=True)
def _(x, cos, sin):
    check_pairs(x)
    y = x.astype(np.float64) * cos + halves_turned(x) * sin
    return y, back(cos, sin)


@rotary.wrong_answer("Attention has one text and one head.", says="its shape is", subtle=True)
def _(x, cos, sin):
    check_pairs(x)
    T, D = x.shape[-2:]
    y = x * cos + halves_turned(x) * sin
    return y.reshape(-1, T, D)[0] if x.ndim > 2 else y, back(cos, sin)


# ── repeat_heads ──────────────────────────────────────────────────────────────────────────────────
repeat_heads = Exercise(
    "ops:repeat_heads", difficulty=1, minutes=5,
    may_use="xp(a).repeat(a, group, axis=...), where xp(a) is the module that made a: NumPy, "
            "or CuPy on a GPU.",
    example="""
        >>> a = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])   # two heads, one position, D = 2
        >>> repeat_heads(a, 2).tolist()
        [[[1.0, 2.0]], [[1.0, 2.0]], [[3.0, 4.0]], [[3.0, 4.0]]]
        """,
    hints=(
        "The queries 0 to group − 1 look at head 0, the next `group` queries at head 1.  So the "
        "copies of a head are neighbours.",
        "The axis of the heads is the third from the end: axis −3.  There may be axes in front.",
        "xp(a).repeat(a, group, axis=-3)."))
GROUPS = st.sampled_from((2, 3))


def copies_of(a, group):
    return np.repeat(a, group, axis=-3)


@repeat_heads.law("with a group of 1 the heads stay as they are", a=filled("h t d"))
def _(f, a):
    close(f(a, 1), a, "repeat_heads(a, 1)")


@repeat_heads.law("every head comes `group` times, one copy after another", a=filled("h t d"),
                  group=GROUPS)
def _(f, a, group):
    guesses = {"the heads come in turn (a, b, a, b); copies must be neighbours (a, a, b, b)":
                   np.tile(a, (group, 1, 1)),
               "positions are repeated, not heads": np.repeat(a, group, axis=-2),
               "the numbers of a head are repeated, not the heads": np.repeat(a, group, axis=-1)}
    close(f(a, group), copies_of(a, group), f"repeat_heads(a, {group})", guesses)


@repeat_heads.law("axes in front stay as they are, (B, Hkv, T, D)", a=filled("b h t d"),
                  group=GROUPS)
def _(f, a, group):
    guesses = {"texts are repeated: the axis of the heads is the third from the end":
                   np.repeat(a, group, axis=0)}
    close(f(a, group), copies_of(a, group), f"repeat_heads(a, {group})", guesses)


@repeat_heads.wrong_answer("Copies of all heads stand one behind the other.", says="in turn")
def _(a, group):
    return xp(a).concatenate([a] * group, axis=-3)


@repeat_heads.wrong_answer("Keys are repeated along the positions.", says="positions are repeated")
def _(a, group):
    return xp(a).repeat(a, group, axis=-2)


@repeat_heads.wrong_answer("A wider head serves more queries.", says="the numbers of a head")
def _(a, group):
    return xp(a).repeat(a, group, axis=-1)


@repeat_heads.wrong_answer("The heads are the first axis.", says="texts are repeated", subtle=True)
def _(a, group):
    return xp(a).repeat(a, group, axis=0)


@repeat_heads.wrong_answer("There is always one axis in front.", says="positions are repeated",
                           subtle=True)
def _(a, group):
    return xp(a).repeat(a, group, axis=1)


@repeat_heads.wrong_answer("`group` is the number of copies beside the head itself.",
                           says="its shape is")
def _(a, group):
    return xp(a).repeat(a, group + 1, axis=-3)


# ── sum_heads ─────────────────────────────────────────────────────────────────────────────────────
sum_heads = Exercise(
    "ops:sum_heads", difficulty=2, minutes=10,
    may_use="g.shape, g.reshape(...) and g.sum(axis=...).",
    example="""
        >>> g = np.array([[[1.0]], [[2.0]], [[3.0]], [[4.0]]])   # the copies a, a, b, b
        >>> sum_heads(g, 2).tolist()
        [[[3.0]], [[7.0]]]
        """,
    hints=(
        "A head that was copied gets the sum of the gradients of its copies.  The copies of a "
        "head are neighbours.",
        "Cut the axis of the heads into two with a reshape: (..., H, T, D) becomes "
        "(..., H // group, group, T, D).  Then sum over the copies.",
        "g.reshape(*g.shape[:-3], g.shape[-3] // group, group, *g.shape[-2:]).sum(axis=-3)."))


@sum_heads.law("with a group of 1 the gradient stays as it is", g=filled("h t d"))
def _(f, g):
    close(f(g, 1), g, "sum_heads(g, 1)")


@st.composite
def copies(draw: Callable, front: bool = False):
    """The gradient g of the copies of H heads: (H group, T, D), or (B, H group, T, D)."""
    group = draw(GROUPS)
    batch = (draw(sizes()),) if front else ()
    shape = (*batch, draw(sizes()) * group, draw(sizes()), draw(sizes()))
    return named(g=draw_array(draw, shape, FILLED, np.float64), group=group)


def sums(g, group):
    """The sum of `group` neighbouring heads."""
    return sum(g[..., i::group, :, :] for i in range(group))


@sum_heads.law("the copies of a head, which are neighbours, are added", given=copies())
def _(f, given):
    g, group = given
    H = len(g) // group
    want = sums(g, group)
    guesses = {"heads are added that are no copies of one head: copies are neighbours":
                   g.reshape(group, H, *g.shape[1:]).sum(axis=0),
               "it is the mean of the copies; a gradient is the sum": want / group,
               "only the first copy counts": g[::group],
               "only the last copy counts": g[group - 1::group]}
    close(f(g, group), want, f"sum_heads(g, {group})", guesses)


@sum_heads.law("axes in front stay as they are, (B, H, T, D)", given=copies(front=True))
def _(f, given):
    g, group = given
    close(f(g, group), sums(g, group), f"sum_heads(g, {group})")


@sum_heads.law("for all a: the sum of sum_heads(g) a is the sum of g repeat_heads(a)",
               given=copies())
def _(f, given):
    g, group = given
    found = asnumpy(f(g, group))
    shape = (len(g) // group, *g.shape[1:])
    if found.shape != shape:
        raise Unusable(f"its shape is {found.shape}, expected {shape}")
    a = np.cumsum(np.ones(shape)).reshape(shape)         # 1, 2, 3, ...
    close((found * a).sum(), (g * copies_of(a, group)).sum(),
          "the sum of sum_heads(g) a, for a = 1, 2, 3, ...")


@sum_heads.wrong_answer("The heads came in turn.", says="no copies of one head")
def _(g, group):
    H = g.shape[-3] // group
    return g.reshape(*g.shape[:-3], group, H, *g.shape[-2:]).sum(axis=-4)


@sum_heads.wrong_answer("Copies share a gradient, so it is their mean.", says="it is the mean")
def _(g, group):
    H = g.shape[-3] // group
    return g.reshape(*g.shape[:-3], H, group, *g.shape[-2:]).mean(axis=-3)


@sum_heads.wrong_answer("All copies have the same gradient, so one is enough.",
                        says="only the first copy")
def _(g, group):
    return g[..., ::group, :, :]


@sum_heads.wrong_answer("The last copy overwrites the others.", says="only the last copy")
def _(g, group):
    return g[..., group - 1::group, :, :]


@sum_heads.wrong_answer("The sum is over all heads.", says="its shape is")
def _(g, group):
    return g if group == 1 else g.sum(axis=-3, keepdims=True)


@sum_heads.wrong_answer("The heads are the first axis.", says="its shape is", subtle=True)
def _(g, group):
    return g.reshape(-1, group, *g.shape[1:]).sum(axis=1) if len(g) % group == 0 else g


# ── encode_q4_1 ───────────────────────────────────────────────────────────────────────────────────
encode_q4_1 = Exercise(
    "compress.ggml:encode_q4_1", difficulty=3, minutes=20, on_host=True,
    closed=("compress.ggml:_pack_halves",),
    may_use="half_bytes(a), the two bytes (..., 2) of numbers (..., 1) in float16; reciprocal(a), "
            "which is 1/a, and 0 where a is 0; min, max, np.floor, astype(np.uint8), "
            "np.concatenate.  For bytes: << 4 moves the low half up, and | joins a low and a high "
            "half.",
    example="""
        >>> values = np.arange(32, dtype=np.float32) % 16        # 0 ... 15, 0 ... 15: d = 1, m = 0
        >>> blocks = encode_q4_1(values)
        >>> blocks.shape
        (20,)
        >>> blocks[:4]                                   # 1 and 0 in float16
        array([ 0, 60,  0,  0], dtype=uint8)
        >>> blocks[4:]                                   # 0 | 0 << 4, 1 | 1 << 4, ...
        array([  0,  17,  34,  51,  68,  85, 102, 119, 136, 153, 170, 187, 204,
               221, 238, 255], dtype=uint8)
        """,
    hints=(
        "Work on the last axis, and keep it: values.min(axis=-1, keepdims=True).  m is the least "
        "weight, and 15 steps d lead from it to the largest.",
        "The codes are np.floor((values - m) * reciprocal(d) + 0.5), as uint8.  The first 16 of a "
        "block are the low halves of its 16 bytes, the last 16 are the high halves.",
        "Join half_bytes(d), half_bytes(m) and q[..., :16] | (q[..., 16:] << 4) with "
        "np.concatenate along the last axis."))
STEPS = (1.0, 2.0, 0.5, 4.0)
LEAST = (-8.0, 1.0, -2.0, 3.0)


@st.composite
def levels(draw: Callable, fractions: tuple = (0.0,), steps: tuple = STEPS, least: tuple = LEAST):
    """Blocks whose least weight is m and whose largest is m + 15 d.  q: the weights in steps of d.

    fractions: the parts of a step by which the other weights lie above a level."""
    count = draw(sizes())
    q = draw_array(draw, (count, 32), (1, 2, 4, 7, 14, 9, 3, 12), np.float64)
    q = q + draw_array(draw, (count, 32), fractions, np.float64)
    lowest = draw(st.integers(0, 31))
    q[:, lowest] = 0
    q[:, (lowest + draw(st.integers(1, 31))) % 32] = 15
    d = draw_array(draw, (count, 1), steps, np.float64)
    m = draw_array(draw, (count, 1), least, np.float64)
    return named(values=(d * q + m).astype(np.float32), q=q, d=d, m=m)


def encoded(f, values):
    """The blocks (..., 20) uint8 of an answer."""
    out = f(values)
    if not isinstance(out, np.ndarray) or out.dtype != np.uint8:
        kind = f"an array of {out.dtype}" if isinstance(out, np.ndarray) else f"{out!r:.60}"
        raise Unusable(f"the blocks should be an array of uint8; yours is {kind}")
    want = (*values.shape[:-1], 20)
    if out.shape != want:
        raise Unusable(f"the blocks should have the shape {want}; yours has {out.shape}")
    return out


def halves(a):
    """The bytes of numbers in float16, the lower byte first."""
    return np.asarray(a).astype("<f2").view(np.uint8)


def in_bytes(low, high):
    return (low.astype(int) | high.astype(int) << 4).astype(np.uint8)


@encode_q4_1.law("a block of 32 weights has 20 bytes, and axes in front stay", given=levels())
def _(f, given):
    values = given[0]
    encoded(f, values[0])
    encoded(f, values)
    encoded(f, np.stack([values, values]))


@encode_q4_1.law("bytes 0 and 1 are d = (largest − least)/15 in float16", given=levels())
def _(f, given):
    values, _, d, m = given
    largest = abs(values).max(-1, keepdims=True)
    guesses = {"they hold m: d comes first": halves(m),
               "d is the range divided by 16; 16 levels have 15 steps": halves(d * 15 / 16),
               "the higher byte comes first; the lower one must": halves(d)[:, ::-1],
               "d is the largest magnitude divided by 15": halves(largest / 15),
               "all blocks have the step of the whole array":
                   halves(np.full_like(d, np.ptp(values) / 15))}
    close(encoded(f, values)[:, :2], halves(d), "the bytes of d", guesses)


@encode_q4_1.law("bytes 2 and 3 are m, the least weight, in float16", given=levels())
def _(f, given):
    values, _, d, m = given
    guesses = {"they hold d: m comes second": halves(d),
               "the higher byte comes first; the lower one must": halves(m)[:, ::-1],
               "m is the largest weight; it must be the least": halves(m + 15 * d)}
    close(encoded(f, values)[:, 2:4], halves(m), "the bytes of m", guesses)


@encode_q4_1.law("byte 4 + j holds the codes of the weights j (low half) and j + 16 (high half)",
                 given=levels())
def _(f, given):
    values, q, _, _ = given
    low, high = q[:, :16], q[:, 16:]
    top, bottom = 15 - low, 15 - high
    guesses = {"low and high half are swapped": in_bytes(high, low),
               "neighbours share a byte; the weights j and j + 16 must": in_bytes(q[:, 0::2],
                                                                                 q[:, 1::2]),
               "the codes count down from the largest weight": in_bytes(top, bottom)}
    close(encoded(f, values)[:, 4:], in_bytes(low, high), "the bytes of the codes", guesses)


def codes_in(blocks):
    """The codes (..., 32) in blocks."""
    q = blocks[..., 4:].astype(int)
    return np.concatenate([q & 15, q >> 4], axis=-1)


@encode_q4_1.law("a code is rounded to the nearest whole number",
                 given=levels(fractions=(0.75, 0.25)))
def _(f, given):
    values, q, _, _ = given
    guesses = {"the codes are rounded down: a weight moves by up to a whole step":
                   np.floor(q).astype(int),
               "the codes are rounded up": np.ceil(q).astype(int)}
    close(codes_in(encoded(f, values)), np.floor(q + 0.5).astype(int),
          "the codes of a block", guesses)


@encode_q4_1.law("a half is rounded upwards", given=levels(fractions=(0.5,)))
def _(f, given):
    values, q, _, _ = given
    guesses = {"a half is rounded to the even number, as np.round does": np.round(q).astype(int),
               "a half is rounded down": np.ceil(q - 0.5).astype(int)}
    close(codes_in(encoded(f, values)), np.floor(q + 0.5).astype(int),
          "the codes of weights in the middle of two levels", guesses)


@encode_q4_1.law("equal weights: d is 0, and so are all codes",
                 value=st.sampled_from((3.0, 1.0, -2.0)))
def _(f, value):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block = encoded(f, np.full((1, 32), value, np.float32))
    # NaN as a whole number is 0 on some processors, and another number on others.
    if any("in cast" in str(warning.message) for warning in caught):
        raise Unusable("a code is NaN, which is no whole number: d is 0 for equal weights, and "
                       "0/0 is NaN; reciprocal(d) is 0 there")
    close(block[:, :2], np.zeros((1, 2), int), "the bytes of d of a block of equal weights",
          {"d is 1 where the range is 0; 0 is wanted": halves([[1.0]])})
    close(codes_in(block), np.zeros((1, 32), int), "the codes of a block of equal weights")


@encode_q4_1.law("the codes come from m before it is rounded to float16",
                 given=levels(steps=(0.25, 0.5), least=(2049.0, 4098.0)))
def _(f, given):
    values, q, d, m = given
    rounded = m.astype(np.float16).astype(float)
    guesses = {"the codes come from the rounded m":
                   np.floor((values - rounded) / d + 0.5).clip(0, 15).astype(int)}
    close(codes_in(encoded(f, values)), q.astype(int),
          f"the codes for m = {m[0, 0]:.0f}, which float16 stores as {rounded[0, 0]:.0f}", guesses)


@encode_q4_1.law("the codes come from d before it is rounded to float16",
                 given=levels(fractions=(0.49609375,), steps=(1 + 2.0**-11,), least=(0.0,)))
def _(f, given):
    values, q, _, _ = given
    guesses = {"the codes come from the rounded d":
                   np.floor(values + 0.5).clip(0, 15).astype(int)}
    close(codes_in(encoded(f, values)), np.floor(q + 0.5).astype(int),
          "the codes for d = 1 + 1/2048, which float16 stores as 1", guesses)


def parts(values, least=np.min, steps=15):
    """(d, m, exact codes), each (..., 1) or (..., 32)."""
    m = least(values, axis=-1, keepdims=True)
    spread = np.ptp(values, axis=-1, keepdims=True)
    d = spread / np.float32(steps)
    safe = np.where(d == 0, np.float32(1), d)
    return d, m, (values - m) / safe


def joined(d, m, q):
    low, high = q[..., :16].astype(np.uint8), q[..., 16:].astype(np.uint8)
    return np.concatenate([half_bytes(d), half_bytes(m), low | high << 4], axis=-1)


def nearest(q):
    return np.floor(q + 0.5).clip(0, 15)


@encode_q4_1.wrong_answer("The first of two codes is the high half of a byte.",
                          says="low and high half are swapped")
def _(values):
    d, m, q = parts(values)
    q = nearest(q)
    return joined(d, m, np.concatenate([q[..., 16:], q[..., :16]], axis=-1))


@encode_q4_1.wrong_answer("Neighbours share a byte.", says="neighbours share a byte")
def _(values):
    d, m, q = parts(values)
    q = nearest(q)
    return joined(d, m, np.concatenate([q[..., 0::2], q[..., 1::2]], axis=-1))


@encode_q4_1.wrong_answer("m comes before d.", says="d comes first")
def _(values):
    d, m, q = parts(values)
    return joined(m, d, nearest(q))


@encode_q4_1.wrong_answer("Sixteen levels have sixteen steps.", says="16 levels have 15 steps")
def _(values):
    d, m, q = parts(values, steps=16)
    return joined(d, m, nearest(q))


@encode_q4_1.wrong_answer("All blocks share d and m.", says="the step of the whole array")
def _(values):
    m = np.broadcast_to(values.min(), (*values.shape[:-1], 1))
    d = np.broadcast_to(np.float32(np.ptp(values) / 15), m.shape)
    return joined(d, m, nearest((values - m) / np.where(d == 0, 1, d)))


@encode_q4_1.wrong_answer("A number is written with its higher byte first.",
                          says="the higher byte comes first")
def _(values):
    d, m, q = parts(values)
    blocks = joined(d, m, nearest(q))
    blocks[..., [0, 1, 2, 3]] = blocks[..., [1, 0, 3, 2]]
    return blocks


@encode_q4_1.wrong_answer("m is the largest weight, and codes count down from it.",
                          says="it must be the least")
def _(values):
    d, _, q = parts(values)
    return joined(d, values.max(axis=-1, keepdims=True), 15 - nearest(q))


@encode_q4_1.wrong_answer("Casting to a whole number rounds.", says="a whole step")
def _(values):
    d, m, q = parts(values)
    return joined(d, m, np.floor(q + 1e-3))


@encode_q4_1.wrong_answer("np.round rounds a half upwards.", says="as np.round does", subtle=True)
def _(values):
    d, m, q = parts(values)
    return joined(d, m, np.round(q))


@encode_q4_1.wrong_answer("A block without a range has the step 1.", says="0 is wanted",
                          subtle=True)
def _(values):
    d, m, q = parts(values)
    return joined(np.where(d == 0, np.float32(1), d), m, nearest(q))


@encode_q4_1.wrong_answer("0 divided by 0 is 0.", says="a code is NaN", subtle=True)
def _(values):
    d, m, _ = parts(values)
    return joined(d, m, np.floor((values - m) / d + 0.5))


@encode_q4_1.wrong_answer("The codes come from the m that is stored.", says="from the rounded m",
                          subtle=True)
def _(values):
    d, m, _ = parts(values)
    stored = m.astype(np.float16).astype(np.float32)
    return joined(d, m, nearest((values - stored) / np.where(d == 0, np.float32(1), d)))


@encode_q4_1.wrong_answer("The codes come from the d that is stored.", says="from the rounded d",
                          subtle=True)
def _(values):
    d, m, _ = parts(values)
    stored = d.astype(np.float16).astype(np.float32)
    return joined(d, m, nearest((values - m) / np.where(d == 0, np.float32(1), stored)))


@encode_q4_1.wrong_answer("d and m are stored as the model has them, in float32.",
                          says="should have the shape")
def _(values):
    d, m, q = parts(values)
    codes = joined(d, m, nearest(q))[..., 4:]
    numbers = np.concatenate([d, m], axis=-1).astype("<f4").view(np.uint8)
    return np.concatenate([numbers, codes], axis=-1)


@encode_q4_1.wrong_answer("A code fills a byte.", says="should have the shape")
def _(values):
    d, m, q = parts(values)
    return np.concatenate([half_bytes(d), half_bytes(m), nearest(q).astype(np.uint8)], axis=-1)
