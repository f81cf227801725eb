"""Lesson 15: the values of NF4, the code of a number, and blocks of weights."""
from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from hypothesis import strategies as st

from tinyft.compress.codebooks import Table, get_table
from tinyft.learn.diagnose import Unusable, close, host
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes

CODEBOOKS = "compress.codebooks:"
quantile = NormalDist().inv_cdf


def check(got, want, what, guesses, **more):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items() if not np.array_equal(a, want)}
    close(got, want, what, wrong, **more)


# ── normal_values ─────────────────────────────────────────────────────────────────────────────────
normal_values = Exercise(
    f"{CODEBOOKS}normal_values", difficulty=3, minutes=20, on_host=True, lines=6,
    closed=(f"{CODEBOOKS}_line",),
    may_use="NormalDist().inv_cdf(p), which is Φ⁻¹(p) for one float p; np.linspace(first, last, "
            "n), n equally spaced numbers with both ends; np.array(list, np.float32).  (The "
            "library's helper _line rounds as PyTorch does; np.linspace is good enough here.)",
    example="""
        >>> normal_values(below=1, above=2, largest=0.9).round(2)
        array([-1.  ,  0.  ,  0.41,  1.  ], dtype=float32)
        """,
    hints=(
        "Write the two halves apart.  The half above 0 has `above` values.  Its probabilities are "
        "np.linspace(largest, 0.5, above + 1) without the last one, whose quantile is 0.",
        "The half below 0 is made in the same way with `below`, and has the opposite signs.  So "
        "largest = 0.9 gives the quantile 1.28 above and −1.28 below.",
        "Order: first the half below, which already runs upwards, then 0.0, then the half above, "
        "reversed.  Divide by the last one and make it float32."))
LARGEST = st.sampled_from((0.9, 0.8, 0.95))


def halves(below, above, largest, to_value=quantile):
    """(values below 0, values above 0), both from the ends towards 0."""
    positive = [to_value(p) for p in np.linspace(largest, 0.5, above + 1)[:-1]]
    negative = [-to_value(p) for p in np.linspace(largest, 0.5, below + 1)[:-1]]
    return negative, positive


def right_values(below, above, largest):
    negative, positive = halves(below, above, largest)
    values = np.array([*negative, 0.0, *positive[::-1]])
    return values / values[-1]


def symmetric_values(below, above, largest):
    """Quantiles of equally spaced probabilities from 1 − largest to largest."""
    values = [quantile(p) for p in np.linspace(1 - largest, largest, below + above + 1)]
    return np.array(values) / values[-1]


def middles_of_intervals(below, above, largest):
    n = below + above + 1
    values = [quantile((k + 0.5) / n) for k in range(n)]
    return np.array(values) / values[-1]


def equal_steps(below, above, largest):
    return np.concatenate([np.linspace(-1, 0, below + 1), np.linspace(0, 1, above + 1)[1:]])


def guessed_values(below, above, largest):
    """{mistake: result}"""
    want = right_values(below, above, largest)
    negative, positive = halves(below, above, largest)
    of_cdf = halves(below, above, largest, NormalDist().cdf)
    return {"it is not divided by the largest quantile": want * quantile(largest),
            "0 is not among the values: the two halves have different steps":
                symmetric_values(below, above, largest),
            "these are the quantiles in the middles of equally probable intervals":
                middles_of_intervals(below, above, largest),
            "the values have equal steps; it is the probabilities that are equally spaced":
                equal_steps(below, above, largest),
            "the values below 0 have lost their sign": np.abs(want),
            "the values run downwards": want[::-1],
            "the values are not sorted: each half runs from the ends to 0":
                np.array([*negative, 0.0, *positive]) / quantile(largest),
            "it is the probability Φ(p); Φ⁻¹ is inv_cdf":
                np.array([*of_cdf[0], 0.0, *of_cdf[1][::-1]]) / of_cdf[1][0]}


def check_values(f, below, above, largest):
    got = host(f(below, above, largest), "the values").astype(float)
    check(got, right_values(below, above, largest), "the values",
          guessed_values(below, above, largest), rtol=1e-5, atol=1e-6)


@normal_values.law("one value on each side of 0: −1, 0 and 1", largest=LARGEST)
def _(f, largest):
    check_values(f, 1, 1, largest)


@normal_values.law("as many values below 0 as above it", above="size", largest=LARGEST)
def _(f, above, largest):
    check_values(f, above, above, largest)


@normal_values.law("one more value above 0", below="size", largest=LARGEST)
def _(f, below, largest):
    check_values(f, below, below + 1, largest)


@normal_values.law("7 below, 8 above and δ = 0.9677083: the published table of NF4")
def _(f):
    got = host(f(7, 8, 0.9677083), "the table").astype(float)
    published = get_table("nf4").values.astype(float)
    check(got, published, "the table", guessed_values(7, 8, 0.9677083), rtol=1e-5, atol=1e-6)


@normal_values.law("the values are float32", above="size", largest=LARGEST)
def _(f, above, largest):
    got = f(above, above, largest)
    close(got, np.asarray(got, np.float32), "the values", dtype=True)


@normal_values.wrong_answer("16 quantiles divide the line from p = 0 to p = 1.",
                            says="p must be in the range")
def _(below, above, largest):
    values = np.array([quantile(float(p)) for p in np.linspace(0, 1, below + above + 1)])
    return (values / values[-1]).astype(np.float32)


@normal_values.wrong_answer("The quantiles of 0 and 1 are infinite, which NumPy can hold.",
                            says="nan or inf")
def _(below, above, largest):
    inner = [quantile(float(p)) for p in np.linspace(0, 1, below + above + 1)[1:-1]]
    values = np.array([-np.inf, *inner, np.inf])
    with np.errstate(invalid="ignore"):
        return (values / values[-1]).astype(np.float32)


@normal_values.wrong_answer("The same steps of probability below 0 and above it.",
                            says="0 is not among the values")
def _(below, above, largest):
    return symmetric_values(below, above, largest).astype(np.float32)


@normal_values.wrong_answer("A value stands in the middle of an interval of probability.",
                            says="middles of equally probable intervals")
def _(below, above, largest):
    return middles_of_intervals(below, above, largest).astype(np.float32)


@normal_values.wrong_answer("The values are equally spaced.", says="equal steps")
def _(below, above, largest):
    return equal_steps(below, above, largest).astype(np.float32)


@normal_values.wrong_answer("Quantiles are the values.", says="not divided by the largest quantile")
def _(below, above, largest):
    return (right_values(below, above, largest) * quantile(largest)).astype(np.float32)


@normal_values.wrong_answer("Both halves hold quantiles of p > 1/2.", says="lost their sign")
def _(below, above, largest):
    return np.abs(right_values(below, above, largest)).astype(np.float32)


@normal_values.wrong_answer("Any order will do: a table is a set.", says="not sorted")
def _(below, above, largest):
    negative, positive = halves(below, above, largest)
    return (np.array([*negative, 0.0, *positive]) / positive[0]).astype(np.float32)


@normal_values.wrong_answer("The distribution function gives the values.", says="Φ⁻¹ is inv_cdf")
def _(below, above, largest):
    negative, positive = halves(below, above, largest, NormalDist().cdf)
    values = np.array([*negative, 0.0, *positive[::-1]], np.float32)
    return values / values[-1]


@normal_values.wrong_answer("np.linspace includes its end, so p = 1/2 gives the 0 of each half.",
                            says="its shape is")
def _(below, above, largest):
    values = right_values(below, above, largest)
    return np.concatenate([values[:below], [0.0], values[below:]]).astype(np.float32)


@normal_values.wrong_answer("A table is computed in float64, and stays so.", says="dtype",
                            subtle=True)
def _(below, above, largest):
    return right_values(below, above, largest)


# ── Table.nearest ─────────────────────────────────────────────────────────────────────────────────
nearest = Exercise(
    f"{CODEBOOKS}Table.nearest", difficulty=2, minutes=15, on_host=True, lines=2,
    closed=(f"{CODEBOOKS}Table.thresholds",),
    may_use="self.midpoints, the middles of neighbouring values, upwards; self.codes, the code of "
            "the lowest value, of the second lowest, ...; np.searchsorted(numbers, u), which "
            "counts for each entry of u the numbers below it.",
    example="""
        >>> from tinyft.compress.codebooks import Table
        >>> table = Table("an example", np.array([-1, 0, 0.5, 1], np.float32))
        >>> table.midpoints
        array([-0.5 ,  0.25,  0.75])
        >>> nearest(table, np.array([-0.9, 0.3, 0.25]))
        array([0, 2, 1], dtype=uint8)
        """,
    hints=(
        "Between two midpoints all numbers have the same nearest value.",
        "The number of midpoints below u is the rank of the nearest value: 0 for the lowest.  "
        "np.searchsorted counts them, and does not count a midpoint that u is equal to.",
        "A rank is not yet a code: self.codes[rank] is."))
IN_ORDER = ((-1, 0, 0.5, 1), (-1, -0.5, 0, 1), (-1, 0, 0.25, 1), (-1, -0.75, 0, 1))
SHUFFLED = ((0, 0.5, 1, -1), (0, 1, -1, -0.5), (1, 0, -1, 0.25))


@st.composite
def numbers_near(draw: Callable, tables: tuple, part: float):
    """values (4,) of a table, and u: each a value, moved by a part of the way to a neighbour."""
    values = np.array(draw(st.sampled_from(tables)))
    ranked = np.sort(values)
    n = draw(sizes())
    rank = draw_array(draw, (n,), (2, 1, 0), np.int64)
    below, above = ranked[rank], ranked[rank + 1]
    downwards = draw_array(draw, (n,), (0, 1), np.float64)
    towards = np.where(downwards == 1, 1 - part, part)
    return named(values=values, u=below + towards * (above - below))


def table_of(values):
    return Table("an example", np.asarray(values, np.float32))


def distances(values, u):
    return np.abs(u[..., None] - values)


def right_nearest(values, u):
    """Of two values that are equally near, the lower."""
    order = np.argsort(values)
    return order[distances(values[order], u).argmin(-1)].astype(np.uint8)


def guessed_nearest(values, u):
    """{mistake: result}"""
    n = len(values)
    ranked = np.sort(values)
    order = np.argsort(values)
    rank = distances(ranked, u).argmin(-1)
    floor = np.maximum(np.searchsorted(ranked, u, "right") - 1, 0)
    upper = n - 1 - distances(ranked[::-1], u).argmin(-1)
    by_size = np.abs(np.abs(u)[..., None] - np.abs(values)).argmin(-1)
    named_values = values[right_nearest(values, u)]
    return {"the codes are spread equally over −1 ... 1; the values are not":
                np.clip(np.rint((u + 1) / 2 * (n - 1)), 0, n - 1).astype(np.uint8),
            "it is the next value below; the one above may be nearer":
                order[floor].astype(np.uint8),
            "of two equally near values it is the upper one": order[upper].astype(np.uint8),
            "it is the rank of the value; its code is self.codes[rank]": rank.astype(np.uint8),
            "the sign is lost: −0.5 and 0.5 are different values": by_size.astype(np.uint8),
            "it is the value; its code is wanted": named_values,
            "it is the code of the lowest value: a distance has no sign":
                np.full(u.shape, order[0], np.uint8),
            "it is the first of equal distances in the order of the codes":
                distances(values, u).argmin(-1).astype(np.uint8)}


def check_nearest(f, given, dtype=False):
    values, u = given
    got = f(table_of(values), u)
    check(got, right_nearest(values, u), "the codes", guessed_nearest(values, u), dtype=dtype)


@nearest.law("a value has its own code", given=numbers_near(IN_ORDER, 0))
def _(f, given):
    check_nearest(f, given)


@nearest.law("a number between two values has the code of the nearer one",
             given=numbers_near(IN_ORDER, 0.375))
def _(f, given):
    check_nearest(f, given)


@nearest.law("half-way between two values: the code of the lower one",
             given=numbers_near(IN_ORDER, 0.5))
def _(f, given):
    check_nearest(f, given)


@nearest.law("codes in another order than the values", given=numbers_near(SHUFFLED, 0.25))
def _(f, given):
    check_nearest(f, given)


@nearest.law("codes in another order, half-way", given=numbers_near(SHUFFLED, 0.5))
def _(f, given):
    check_nearest(f, given)


@nearest.law("the codes are uint8, one for each entry of u", given=numbers_near(IN_ORDER, 0.25))
def _(f, given):
    values, u = given
    check_nearest(f, (values, np.stack([u, u])), dtype=True)


@nearest.wrong_answer("Neighbouring codes have equal distances, as in a uniform grid.",
                      says="spread equally")
def _(self, u):
    n = len(self.values)
    return np.clip(np.rint((u + 1) / 2 * (n - 1)), 0, n - 1).astype(np.uint8)


@nearest.wrong_answer("searchsorted in the values finds the nearest one.", says="next value below")
def _(self, u):
    rank = np.maximum(np.searchsorted(self.ranked, u, side="right") - 1, 0)
    return self.codes[rank]


@nearest.wrong_answer("Half-way is rounded up.", says="upper one")
def _(self, u):
    return self.codes[np.searchsorted(self.midpoints, u, side="right")]


@nearest.wrong_answer("The code is the rank.", says="it is the rank")
def _(self, u):
    return np.searchsorted(self.midpoints, u).astype(np.uint8)


@nearest.wrong_answer("Only the size of a weight matters.", says="the sign is lost")
def _(self, u):
    return np.abs(np.abs(u)[..., None] - np.abs(self.values)).argmin(-1).astype(np.uint8)


@nearest.wrong_answer("The smallest difference belongs to the nearest value.",
                      says="a distance has no sign")
def _(self, u):
    return (self.values - u[..., None]).argmin(-1).astype(np.uint8)


@nearest.wrong_answer("To quantize is to round the weight.", says="its code is wanted")
def _(self, u):
    return self.values[np.abs(u[..., None] - self.values).argmin(-1)].astype(float)


@nearest.wrong_answer("argmin breaks ties as wanted.", says="first of equal distances",
                      subtle=True)
def _(self, u):
    return np.abs(u[..., None] - self.values).argmin(-1).astype(np.uint8)


@nearest.wrong_answer("A code is an int64, as all indices.", says="dtype", subtle=True)
def _(self, u):
    return self.codes[np.searchsorted(self.midpoints, u)].astype(np.int64)


# ── quantize_blocks ───────────────────────────────────────────────────────────────────────────────
quantize_blocks = Exercise(
    f"{CODEBOOKS}quantize_blocks", difficulty=3, minutes=20, on_host=True, lines=10,
    may_use="table.nearest(u), the code of the value that is nearest to each entry of u; np.abs, "
            "np.pad(W, ((0, 0), (0, n))), which adds n columns of zeros; reshape; "
            "np.where(condition, a, b).  The library's function goes through the rows part by "
            "part, since that is faster.  Yours may take all at once.",
    example="""
        >>> from tinyft.compress.codebooks import Table
        >>> table = Table("an example", np.array([-1, 0, 0.5, 1], np.float32))
        >>> W = np.array([[1.0, -4.0, 2.0, 6.0, 3.0]])
        >>> codes, scale = quantize_blocks(W, table, block=2)
        >>> codes
        array([[1, 0, 2, 3, 3]], dtype=uint8)
        >>> scale
        array([[4., 6., 3.]], dtype=float32)
        """,
    hints=(
        "First let the block divide the width.  W.reshape(out, -1, block) has a block on its last "
        "axis, so the scales are np.abs(...).max(axis=-1).",
        "Divide each weight by the scale of its own block, scale[..., None], and ask "
        "table.nearest.  A block of zeros has the scale 0: divide it by 1 instead.",
        "If the last block is short, fill the rows up with zeros first: they change no maximum.  "
        "At the end keep the first W.shape[1] codes of each row."))
EXAMPLE = (-1, 0, 0.5, 1)
WEIGHTS = (1, 2, -4, 3, -1, 4)                           # no zeros: a zero would hide a mistake


@st.composite
def blocks_of_weights(draw: Callable, blocks: int = 1, short: bool = False):
    """W (n, width) and a block, of which a row holds `blocks`; the last of them is short or not."""
    block = draw(sizes()) + short
    width = block * blocks
    if short:
        width -= draw(st.integers(1, block - 1))
    W = draw_array(draw, (draw(sizes()), width), WEIGHTS, np.float64)
    return named(W=W, block=block)


def padded_blocks(W, block):
    """(out, blocks, block)"""
    missing = -W.shape[1] % block
    return np.pad(W, ((0, 0), (0, missing))).reshape(len(W), -1, block)


def scales_of(W, block):
    return np.abs(padded_blocks(W, block)).max(axis=-1)


def codes_with(W, block, scale, table):
    """The codes for given scales (out, blocks)."""
    parts = padded_blocks(W, block) / np.where(scale == 0, 1, scale)[..., None]
    return table.nearest(parts.astype(np.float64)).reshape(len(W), -1)[:, :W.shape[1]]


def over_the_rows(W, block):
    """The scales of blocks of the flattened weight, filled up to one for each block of each row."""
    flat = W.reshape(-1)
    n = len(W) * -(-W.shape[1] // block)
    flat = np.pad(flat, (0, n * block - len(flat)))
    return np.abs(flat.reshape(-1, block)).max(axis=-1).reshape(len(W), -1)


def guessed_scales(W, block):
    """{mistake: result}"""
    parts = padded_blocks(W, block)
    right = scales_of(W, block)
    whole = W.shape[1] // block * block
    found = {"it is max w; the largest weight may be negative: max |w|": parts.max(axis=-1),
             "it is the largest weight with its sign; a scale is its size":
                 np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0],
             "all blocks of a row have one scale": np.broadcast_to(
                 right.max(axis=1, keepdims=True), right.shape),
             "all rows have one scale": np.broadcast_to(right.max(axis=0), right.shape),
             "it is the mean of |w|; it should be the largest": np.abs(parts).mean(axis=-1),
             "the scales of a row have changed places": right[:, ::-1],
             "a block runs on from one row into the next; every row begins with a new block":
                 over_the_rows(W, block)}
    if 0 < whole < W.shape[1]:
        found["the short block at the end of a row is lost"] = scales_of(W[:, :whole], block)
    return found


def guessed_codes(W, block, table):
    """{mistake: result}"""
    right = scales_of(W, block)
    return {"the sign of the weights is lost": codes_with(np.abs(W), block, right, table),
            "the weights are not divided by the scale": table.nearest(W),
            "a weight is divided by the scale of another block":
                codes_with(W, block, np.roll(right, 1, axis=1), table),
            "a weight is divided by the scale of another row":
                codes_with(W, block, np.roll(right, 1, axis=0), table)}


def quantized(f, W, block):
    """(codes, scales) of a learner's function, with the small table."""
    made = f(W, table_of(EXAMPLE), block)
    if not isinstance(made, tuple) or len(made) != 2:
        raise Unusable(f"it should return two arrays, (codes, scale); yours is {made!r:.60}")
    return made


def check_scales(f, given):
    W, block = given
    scale = host(quantized(f, W, block)[1], "the scales").astype(float)
    check(scale, scales_of(W, block), "the scales", guessed_scales(W, block))


def check_codes(f, given):
    W, block = given
    table = table_of(EXAMPLE)
    want = codes_with(W, block, scales_of(W, block), table)
    check(quantized(f, W, block)[0], want, "the codes", guessed_codes(W, block, table))


@quantize_blocks.law("one block: its scale is max |w|", given=blocks_of_weights())
def _(f, given):
    check_scales(f, given)


@quantize_blocks.law("one block: the code of w/a", given=blocks_of_weights())
def _(f, given):
    check_codes(f, given)


@quantize_blocks.law("every block of a row has its scale", given=blocks_of_weights(blocks=2))
def _(f, given):
    check_scales(f, given)


@quantize_blocks.law("a weight is divided by the scale of its own block",
                     given=blocks_of_weights(blocks=2))
def _(f, given):
    check_codes(f, given)


@quantize_blocks.law("the last block of a row may be short: the scales",
                     given=blocks_of_weights(blocks=2, short=True))
def _(f, given):
    check_scales(f, given)


@quantize_blocks.law("the last block of a row may be short: the codes",
                     given=blocks_of_weights(blocks=2, short=True))
def _(f, given):
    check_codes(f, given)


@quantize_blocks.law("a block of zeros has the scale 0 and the codes of 0", n="size", block="size")
def _(f, n, block):
    W = np.zeros((n, block))
    codes, scale = quantized(f, W, block)
    close(host(scale, "the scales").astype(float), np.zeros((n, 1)), "the scales of zeros",
          {"a block of zeros has the scale 0, though it is divided by 1": np.ones((n, 1))})
    check(codes, np.ones((n, block), np.uint8), "the codes of zeros",
          {"0/0 is NaN, which has no nearest value": np.zeros((n, block), np.uint8)})


@quantize_blocks.law("the codes are uint8 and the scales float32",
                     given=blocks_of_weights(blocks=2))
def _(f, given):
    for what, a in zip(("the codes", "the scales"), quantized(f, *given)):
        close(a, host(a, what).astype(np.uint8 if what == "the codes" else np.float32), what,
              dtype=True)


def answer(W, table, block, scale):
    return codes_with(W, block, scale, table), scale.astype(np.float32)


@quantize_blocks.wrong_answer("The largest weight is W.max().", says="it is max w")
def _(W, table, block):
    return answer(W, table, block, padded_blocks(W, block).max(axis=-1))


@quantize_blocks.wrong_answer("A code holds the size of a weight.", says="sign of the weights")
def _(W, table, block):
    return answer(np.abs(W), table, block, scales_of(W, block))


@quantize_blocks.wrong_answer("A row has one scale.", says="all blocks of a row")
def _(W, table, block):
    scale = scales_of(W, block)
    return answer(W, table, block, np.broadcast_to(scale.max(axis=1, keepdims=True), scale.shape))


@quantize_blocks.wrong_answer("All rows share the scales.", says="all rows have one scale")
def _(W, table, block):
    scale = scales_of(W, block)
    return answer(W, table, block, np.broadcast_to(scale.max(axis=0), scale.shape))


@quantize_blocks.wrong_answer("The scale is the typical size of the weights.", says="the mean of")
def _(W, table, block):
    return answer(W, table, block, np.abs(padded_blocks(W, block)).mean(axis=-1))


@quantize_blocks.wrong_answer("Blocks run over the flattened weight, also where they end inside "
                              "a row.", says="from one row into the next")
def _(W, table, block):
    return answer(W, table, block, over_the_rows(W, block))


@quantize_blocks.wrong_answer("Any scale of the row will do.", says="scale of another block")
def _(W, table, block):
    scale = scales_of(W, block)
    return codes_with(W, block, np.roll(scale, 1, axis=1), table), scale.astype(np.float32)


@quantize_blocks.wrong_answer("table.nearest knows the scale.", says="not divided by the scale")
def _(W, table, block):
    return table.nearest(W), scales_of(W, block).astype(np.float32)


@quantize_blocks.wrong_answer("What does not fill a block is left out.", says="is lost")
def _(W, table, block):
    whole = W.shape[1] // block * block
    W = W[:, :whole] if whole else W
    return answer(W, table, block, scales_of(W, block))


@quantize_blocks.wrong_answer("Zeros need no special case.", says="0/0 is NaN", subtle=True)
def _(W, table, block):
    scale = scales_of(W, block)
    with np.errstate(invalid="ignore"):
        u = padded_blocks(W, block) / scale[..., None]
    codes = table.nearest(u).reshape(len(W), -1)[:, :W.shape[1]]
    return codes, scale.astype(np.float32)


@quantize_blocks.wrong_answer("The scale that is divided by is the scale that is stored.",
                              says="though it is divided by 1", subtle=True)
def _(W, table, block):
    scale = scales_of(W, block)
    return answer(W, table, block, np.where(scale == 0, 1, scale))


@quantize_blocks.wrong_answer("A scale keeps the dtype of W.", says="dtype", subtle=True)
def _(W, table, block):
    scale = scales_of(W, block)
    return codes_with(W, block, scale, table), scale
