"""Lesson 15: scales of scales, the gradient through a packed weight, the merge, and pages."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft.array import Array, asarray, asnumpy
from tinyft.compress.codebooks import get_table, quantize_blocks, values_like
from tinyft.learn.diagnose import Unusable, close, host
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes
from tinyft.nn import Packed

CODEBOOKS = "compress.codebooks:"
FILLED = (1, 2, -1, 3, -2)                               # no zeros: a zero would hide a mistake


def check(got, want, what, guesses, **more):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items() if not np.array_equal(a, want)}
    close(got, want, what, wrong, **more)


# ── quantize_scales ───────────────────────────────────────────────────────────────────────────────
quantize_scales = Exercise(
    f"{CODEBOOKS}quantize_scales", difficulty=3, minutes=20, on_host=True,
    may_use='quantize_blocks(W, table, block), which gives (codes (out, in), scales (out, blocks)) '
            'of W (out, in), in blocks along its rows; get_table("dynamic"); '
            "scale.mean(dtype=np.float64); reshape.",
    example="""
        >>> scale = np.array([[1.0, 2.0], [4.0, 5.0]], np.float32)
        >>> codes, second, mean = quantize_scales(scale, block=2)
        >>> float(mean)
        3.0
        >>> second
        array([2., 2.], dtype=float32)
        >>> codes
        array([[  0,  35],
               [219, 255]], dtype=uint8)
        """,
    hints=(
        "Three steps: the mean of all scales, what remains when it is subtracted, and blocks of "
        "what remains.",
        "quantize_blocks wants one long row: (scale - mean).reshape(1, -1).  So a block runs on "
        "into the next row.",
        "It gives codes (1, n) and scales (1, blocks).  Reshape the codes to scale.shape, and take "
        "row 0 of the scales.  The mean: float64 first, then astype(np.float32)."))
SCALES = (2, 1, 5, 4, 8)


@st.composite
def some_scales(draw: Callable, rows: tuple = (1, 2), columns: tuple = (1, 2, 4)):
    """Scales (out, groups), as many as a power of two, so that their mean is exact; and a block."""
    shape = (draw(st.sampled_from(rows)), draw(st.sampled_from(columns)))
    scale = draw_array(draw, shape, SCALES, np.float32)
    return named(scale=scale, block=draw(st.sampled_from((2, 1, 3))))


def in_blocks(remainder, block):
    """(codes, second scales) of what remains, in C order."""
    codes, second = quantize_blocks(remainder.reshape(1, -1), get_table("dynamic"), block)
    return codes.reshape(remainder.shape), second[0]


def right_scales(scale, block):
    mean = np.float32(scale.mean(dtype=np.float64))
    return *in_blocks(scale - mean, block), mean


def parts_of(f, scale, block):
    made = f(scale, block)
    if not isinstance(made, tuple) or len(made) != 3:
        raise Unusable("it should return three things, (codes, second, mean); "
                       f"yours is {made!r:.60}")
    return made


def guessed_second(scale, block):
    """{mistake: result}"""
    mean = np.float32(scale.mean(dtype=np.float64))
    rows = scale.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return {"the mean is not subtracted": in_blocks(scale, block)[1],
            "the mean is added; it is subtracted": in_blocks(scale + mean, block)[1],
            "the mean is that of a row; it is one number for all scales":
                in_blocks(scale - rows, block)[1],
            "the blocks run down the columns; they run along the rows": in_blocks(
                np.ascontiguousarray((scale - mean).T), block)[1],
            "all scales have one second scale; each block has its own":
                np.full(-(-scale.size // block), np.abs(scale - mean).max(), np.float32),
            "the smallest scale is subtracted; it is the mean": in_blocks(
                scale - scale.min(), block)[1]}


def check_second(f, given):
    scale, block = given
    second = host(parts_of(f, scale, block)[1], "the second scales").astype(float)
    check(second, right_scales(scale, block)[1].astype(float), "the second scales",
          {words: a.astype(float) for words, a in guessed_second(scale, block).items()})


@quantize_scales.law("the mean of all scales", given=some_scales())
def _(f, given):
    scale, block = given
    mean = np.asarray(parts_of(f, scale, block)[2]).astype(float)
    guesses = {"it is the mean of each row; it is one number for all scales":
                   scale.mean(axis=1).astype(float),
               "it is 0: no mean is subtracted": np.float64(0),
               "it is the smallest scale": np.float64(scale.min())}
    check(mean, np.float64(scale.mean(dtype=np.float64)), "the mean", guesses)


@quantize_scales.law("one row: a second scale is the largest |a − mean| of its block",
                     given=some_scales(rows=(1,)))
def _(f, given):
    check_second(f, given)


@quantize_scales.law("a block runs on from one row into the next", given=some_scales(rows=(2,)))
def _(f, given):
    check_second(f, given)


@quantize_scales.law("the codes of (a − mean) / second, in the shape of the scales",
                     given=some_scales())
def _(f, given):
    scale, block = given
    mean = np.float32(scale.mean(dtype=np.float64))
    guesses = {"these are codes of the scales; the mean is not subtracted":
                   in_blocks(scale, block)[0],
               "the mean is added; it is subtracted": in_blocks(scale + mean, block)[0],
               "the sign of what remains is lost": in_blocks(np.abs(scale - mean), block)[0]}
    check(parts_of(f, scale, block)[0], right_scales(scale, block)[0], "the codes", guesses)


@quantize_scales.law("uint8 codes, float32 second scales and mean", given=some_scales())
def _(f, given):
    wanted = ("the codes", np.uint8), ("the second scales", np.float32), ("the mean", np.float32)
    for (what, dtype), a in zip(wanted, parts_of(f, *given)):
        close(a, np.asarray(a).astype(dtype), what, dtype=True)


@quantize_scales.wrong_answer("Blocks alone are enough: scales are small numbers.",
                              says="no mean is subtracted")
def _(scale, block):
    return *in_blocks(scale, block), np.float32(0)


@quantize_scales.wrong_answer("The mean is stored, and added later; nothing to do here.",
                              says="the mean is not subtracted")
def _(scale, block):
    return *in_blocks(scale, block), right_scales(scale, block)[2]


@quantize_scales.wrong_answer("The mean is added, as in the decoding.", says="the mean is added")
def _(scale, block):
    mean = right_scales(scale, block)[2]
    return *in_blocks(scale + mean, block), mean


@quantize_scales.wrong_answer("Every row has its mean.", says="mean of each row")
def _(scale, block):
    rows = scale.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return *in_blocks(scale - rows, block), rows[:, 0]


@quantize_scales.wrong_answer("The smallest scale is the offset.", says="the smallest scale")
def _(scale, block):
    low = scale.min()
    return *in_blocks(scale - low, block), low


@quantize_scales.wrong_answer("All scales have one second scale.", says="one second scale")
def _(scale, block):
    mean = right_scales(scale, block)[2]
    codes, second = in_blocks(scale - mean, scale.size)
    return codes, np.repeat(second, -(-scale.size // block)), mean


@quantize_scales.wrong_answer("A block of scales belongs to neighbouring rows.",
                              says="run down the columns")
def _(scale, block):
    mean = right_scales(scale, block)[2]
    codes, second = in_blocks(np.ascontiguousarray((scale - mean).T), block)
    return np.ascontiguousarray(codes.T), second, mean


@quantize_scales.wrong_answer("Scales are positive, so what remains is too.",
                              says="the sign of what remains is lost", subtle=True)
def _(scale, block):
    mean = right_scales(scale, block)[2]
    codes, second = in_blocks(np.abs(scale - mean), block)
    return codes, second, mean


@quantize_scales.wrong_answer("The mean stays a float64.", says="dtype", subtle=True)
def _(scale, block):
    codes, second, mean = right_scales(scale, block)
    return codes, second, np.float64(mean)


# ── decode_scales ─────────────────────────────────────────────────────────────────────────────────
decode_scales = Exercise(
    f"{CODEBOOKS}decode_scales", difficulty=2, minutes=10,
    may_use='values_like("dynamic", codes), the 256 values of the data type, which codes are '
            "indices of; second[block]; a.clip(low, high); LARGEST, the largest float32.",
    example="""
        >>> codes = np.array([[255, 127], [0, 255]], np.uint8)          # values 1, 0, -0.993, 1
        >>> block = np.array([[0, 0], [1, 1]])
        >>> second = np.array([2.0, 0.5], np.float32)
        >>> decode_scales(codes, block, second, np.array([3.0], np.float32))
        array([[5.       , 3.       ],
               [2.5035157, 3.5      ]], dtype=float32)
        """,
    hints=(
        "It undoes quantize_scales from the end to the beginning: a value, times a scale, plus a "
        "mean.",
        "values[codes] gives the value of each code, and second[block] the second scale of each.",
        "Clip the result to 0 ... LARGEST: a code of −0.993 with a large second scale gives a "
        "number below 0."))
DYNAMIC = get_table("dynamic").values


@st.composite
def coded_scales(draw: Callable, codes: tuple, second: tuple = (1, 2, 3), mean: tuple = (9,)):
    """codes, block (groups, n), second (2,) and mean (1,)."""
    shape = (draw(sizes()), draw(sizes()))
    return named(codes=draw_array(draw, shape, codes, np.uint8),
                 block=draw_array(draw, shape, (0, 1), np.int64),
                 second=draw_array(draw, (2,), second, np.float32),
                 mean=draw_array(draw, (1,), mean, np.float32))


def decoded(f, codes, block, second, mean):
    return f(asarray(codes), asarray(block), asarray(second), asarray(mean))


def right_decoded(codes, block, second, mean):
    return np.maximum(DYNAMIC[codes] * second[block] + mean, 0)


def guessed_decoded(codes, block, second, mean):
    """{mistake: result}"""
    remainder = DYNAMIC[codes] * second[block]
    plain = remainder + mean
    return {"the mean is not added": np.maximum(remainder, 0),
            "the mean is not added, and negative numbers are left": remainder,
            "the mean is subtracted; it is added": np.maximum(remainder - mean, 0),
            "the mean is multiplied with the second scale too: it is added last":
                np.maximum((DYNAMIC[codes] + mean) * second[block], 0),
            "each has the second scale of the other block":
                np.maximum(DYNAMIC[codes] * second[1 - block] + mean, 0),
            "all have the second scale of block 0":
                np.maximum(DYNAMIC[codes] * second[0] + mean, 0),
            "the second scale is left out": np.maximum(DYNAMIC[codes] + mean, 0),
            "a code is not a number of 255 equal steps: its value is in the table":
                np.maximum(codes / np.float32(127.5) * second[block] - second[block] + mean, 0),
            "a scale below 0 is left; it should be 0": plain,
            "a scale below 0 has become positive; it should be 0": np.abs(plain)}


def check_decoded(f, given, dtype=False):
    check(decoded(f, *given), right_decoded(*given), "the scales", guessed_decoded(*given),
          rtol=1e-6, dtype=dtype)


@decode_scales.law("the code of 1: second + mean", given=coded_scales((255,)))
def _(f, given):
    check_decoded(f, given)


@decode_scales.law("value[code] · second[block] + mean", given=coded_scales((200, 255, 31, 127)))
def _(f, given):
    check_decoded(f, given)


@decode_scales.law("never below 0", given=coded_scales((0, 10, 255), second=(8, 4), mean=(1, 2)))
def _(f, given):
    check_decoded(f, given)


@decode_scales.law("the scales are float32", given=coded_scales((200, 255, 31)))
def _(f, given):
    check_decoded(f, given, dtype=True)


def plain_scales(codes, block, second, mean):
    return values_like("dynamic", codes)[codes] * second[block] + mean


@decode_scales.wrong_answer("The blocks hold all that is needed.", says="the mean is not added")
def _(codes, block, second, mean):
    return (plain_scales(codes, block, second, mean) - mean).clip(0, None)


@decode_scales.wrong_answer("The mean was subtracted, so it is subtracted.",
                            says="the mean is subtracted")
def _(codes, block, second, mean):
    return (plain_scales(codes, block, second, mean) - 2 * mean).clip(0, None)


@decode_scales.wrong_answer("Undo the scale last.", says="it is added last")
def _(codes, block, second, mean):
    return ((values_like("dynamic", codes)[codes] + mean) * second[block]).clip(0, None)


@decode_scales.wrong_answer("Neighbouring blocks have about the same scale.",
                            says="the other block")
def _(codes, block, second, mean):
    return plain_scales(codes, 1 - block, second, mean).clip(0, None)


@decode_scales.wrong_answer("There is one second scale.", says="of block 0")
def _(codes, block, second, mean):
    return plain_scales(codes, 0 * block, second, mean).clip(0, None)


@decode_scales.wrong_answer("The values are scaled already.", says="second scale is left out")
def _(codes, block, second, mean):
    return (values_like("dynamic", codes)[codes] + mean).clip(0, None)


@decode_scales.wrong_answer("8 bits are 255 equal steps from −1 to 1.", says="in the table")
def _(codes, block, second, mean):
    u = codes / np.float32(127.5) - np.float32(1)
    return (u * second[block] + mean).clip(0, None).astype(np.float32)


@decode_scales.wrong_answer("Scales are positive, so no clip is needed.", says="below 0 is left",
                            subtle=True)
def _(codes, block, second, mean):
    return plain_scales(codes, block, second, mean)


@decode_scales.wrong_answer("A scale is made positive by its absolute value.",
                            says="has become positive", subtle=True)
def _(codes, block, second, mean):
    return abs(plain_scales(codes, block, second, mean))


# ── Packed.input_gradient ─────────────────────────────────────────────────────────────────────────
input_gradient = Exercise(
    "nn:Packed.input_gradient", difficulty=2, minutes=15,
    may_use="self.blocks(), a list of slices of rows; self.dequantize_rows(rows), the dense rows "
            "of W in one slice, (n, in); @, + and slices of arrays.",
    example="""
        >>> from types import SimpleNamespace
        >>> W = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]])           # out = 3, in = 2
        >>> packed = SimpleNamespace(blocks=lambda: [slice(0, 2), slice(2, 3)],
        ...                          dequantize_rows=lambda rows: W[rows])
        >>> input_gradient(packed, np.array([[1.0, 2.0, 3.0]]))
        array([[7., 7.]])
        """,
    hints=(
        "y = x Wᵀ.  So the gradient of x is g W, with g (N, out) and W (out, in).",
        "g W is a sum over the outputs: the rows of one block of W meet the same columns of g, "
        "g[:, rows] @ W[rows], and give a part of the whole result.",
        "Start with the part of the first block, and add those of the others.  Do not collect the "
        "dense rows: when a part is computed, its rows may go."))


class InRows(Packed):
    """A packed weight whose values are given, which counts the rows that are dense at a time."""

    def __init__(self, W: np.ndarray, rows: int):
        self.shape = W.shape
        self.rows_per_block = rows
        self._values = W
        self.seen: list[int] = []

    def dequantize(self) -> Array:
        """All rows."""
        return self.dequantize_rows(slice(None))

    def dequantize_rows(self, rows: slice) -> Array:
        """W[rows]"""
        self.seen.append(len(self._values[rows]))
        return asarray(self._values[rows])


@st.composite
def weight_in_rows(draw: Callable, blocks: int = 1, short: bool = False):
    """W (out, in) in blocks of rows, and the gradient g (N, out)."""
    rows = draw(sizes()) + short
    out = rows * blocks - (draw(st.integers(1, rows - 1)) if short else 0)
    W = draw_array(draw, (out, draw(sizes())), FILLED, np.float64)
    return named(W=W, g=draw_array(draw, (draw(sizes()), out), FILLED, np.float64), rows=rows)


def parts_in_rows(W, g, rows):
    return [g[:, k:k + rows] @ W[k:k + rows] for k in range(0, len(W), rows)]


def guessed_gradients(W, g, rows):
    """{mistake: result}"""
    parts = parts_in_rows(W, g, rows)
    found = {"it is the part of the last block alone: the parts are added up": parts[-1],
             "it is the part of the first block alone": parts[0],
             "the parts are averaged; they are added up": sum(parts) / len(parts),
             "the parts are subtracted; they are added up": parts[0] - sum(parts[1:], 0 * parts[0])}
    if len(W) == 2 * rows:
        found["the columns of g meet the rows of the other block"] = (
            g[:, :rows] @ W[rows:] + g[:, rows:] @ W[:rows])
    if W.shape[0] == W.shape[1]:
        found["it is g Wᵀ: y = x Wᵀ, so the gradient of x is g W"] = g @ W.T
    return found


def check_gradient(f, given):
    W, g, rows = given
    check(f(InRows(W, rows), asarray(g)), g @ W, "the gradient of x",
          guessed_gradients(W, g, rows))


@input_gradient.law("one block of rows: g W", given=weight_in_rows())
def _(f, given):
    check_gradient(f, given)


@input_gradient.law("two blocks: the sum of their parts", given=weight_in_rows(blocks=2))
def _(f, given):
    check_gradient(f, given)


@input_gradient.law("the last block may be shorter", given=weight_in_rows(blocks=2, short=True))
def _(f, given):
    check_gradient(f, given)


@input_gradient.law("only one block of rows is dense at a time", given=weight_in_rows(blocks=2))
def _(f, given):
    W, g, rows = given
    packed = InRows(W, rows)
    f(packed, asarray(g))
    if packed.seen and max(packed.seen) > rows:
        raise Unusable(f"{max(packed.seen)} rows of W were dense at once; a block has {rows}")


@input_gradient.law("g is not changed", given=weight_in_rows(blocks=2))
def _(f, given):
    W, g, rows = given
    on_device = asarray(g.copy())
    f(InRows(W, rows), on_device)
    close(asnumpy(on_device), g, "g after the call")


@input_gradient.wrong_answer("The gradient goes through the transpose of what y went through.",
                             says="g Wᵀ")
def _(self, g):
    W = self.dequantize_rows(slice(None))
    return g @ W.T if W.shape[0] == W.shape[1] else g @ W


@input_gradient.wrong_answer("Each block gives the result.", says="last block alone")
def _(self, g):
    for rows in self.blocks():
        dx = g[:, rows] @ self.dequantize_rows(rows)
    return dx


@input_gradient.wrong_answer("One block stands for all.", says="first block alone")
def _(self, g):
    rows = self.blocks()[0]
    return g[:, rows] @ self.dequantize_rows(rows)


@input_gradient.wrong_answer("The parts are averaged.", says="averaged")
def _(self, g):
    parts = [g[:, rows] @ self.dequantize_rows(rows) for rows in self.blocks()]
    return sum(parts) / len(parts)


@input_gradient.wrong_answer("All of g belongs to each block.", says="matmul")
def _(self, g):
    return sum(g @ self.dequantize_rows(rows) for rows in self.blocks())


@input_gradient.wrong_answer("The order of the blocks does not matter.", says="of the other block")
def _(self, g):
    blocks = self.blocks()
    if len({rows.stop - rows.start for rows in blocks}) > 1:
        return g @ self.dequantize()
    pairs = zip(blocks, blocks[::-1])
    return sum(g[:, one] @ self.dequantize_rows(other) for one, other in pairs)


@input_gradient.wrong_answer("One product is simpler.", says="dense at once", subtle=True)
def _(self, g):
    return g @ self.dequantize()


@input_gradient.wrong_answer("Rounding has the gradient 0, so nothing comes through.",
                             says="zero everywhere")
def _(self, g):
    first = self.blocks()[0]
    return 0 * (g[:, first] @ self.dequantize_rows(first))


# ── merged_weight ─────────────────────────────────────────────────────────────────────────────────
merged_weight = Exercise(
    "methods.reparameterized.lora:merged_weight", difficulty=1, minutes=10,
    may_use="packed.dequantize(), the values of the packed weight; @, + and * of arrays; A.shape.",
    example="""
        >>> from types import SimpleNamespace
        >>> packed = SimpleNamespace(dequantize=lambda: np.array([[1.0, -2.0], [0.5, 0.0]]))
        >>> A, B = np.array([[2.0, 1.0]]), np.array([[1.0], [3.0]])
        >>> merged_weight(packed, A, B, alpha=0.5)
        array([[ 2. , -1.5],
               [ 3.5,  1.5]])
        """,
    hints=(
        "The branch adds (α/r) x Aᵀ Bᵀ to the output.  That is x times the transpose of (α/r) B A.",
        "r is the first size of A.",
        "packed.dequantize() + alpha / r * (B @ A)."))


class Rounded(Packed):
    """A packed weight: its values, and in `original` the weight from before the rounding."""

    def __init__(self, values: np.ndarray, original: np.ndarray):
        self.shape = values.shape
        self._values = asarray(values)
        self.original = asarray(original)

    def dequantize(self) -> Array:
        """The values, in a new array."""
        return self._values.copy()


@st.composite
def rounded_weight(draw: Callable, alphas: tuple = (2.0, 3.0), ranks: tuple = (2, 3)):
    """A weight before (original) and after the rounding (values), A, B and α."""
    out, width = draw(sizes()), draw(sizes())
    r = draw(st.sampled_from(ranks))
    values = draw_array(draw, (out, width), FILLED, np.float64)
    error = draw_array(draw, (out, width), (0.25, -0.25), np.float64)
    return named(values=values, original=values + error,
                 A=draw_array(draw, (r, width), FILLED, np.float64),
                 B=draw_array(draw, (out, r), FILLED, np.float64),
                 alpha=draw(st.sampled_from(alphas)))


def guessed_merges(values, original, A, B, alpha):
    """{mistake: result}"""
    change = B @ A
    s = alpha / len(A)
    return {"it is W + ΔW, with the weight from before the rounding: the branch was trained beside "
            "the rounded one": original + s * change,
            "the factor α/r is left out": values + change,
            "α is the factor here; it should be α/r": values + alpha * change,
            "r is the first size of A": values + alpha / A.shape[1] * change,
            "it is ΔW alone": s * change,
            "it is Ŵ alone: the branch is lost": values,
            "ΔW is subtracted": values - s * change,
            "the sum is rounded again, and a part of ΔW is lost": np.rint(values + s * change)}


def merged(f, values, original, A, B, alpha):
    return f(Rounded(values, original), asarray(A.copy()), asarray(B.copy()), alpha)


def check_merge(f, given):
    values, _, A, B, alpha = given
    want = values + alpha / len(A) * (B @ A)
    check(merged(f, *given), want, "the merged weight", guessed_merges(*given))


@merged_weight.law("α = r: Ŵ + B A", given=rounded_weight(alphas=(1.0,), ranks=(1,)))
def _(f, given):
    check_merge(f, given)


@merged_weight.law("Ŵ + (α/r) B A", given=rounded_weight())
def _(f, given):
    check_merge(f, given)


@merged_weight.law("it computes what the packed weight and its branch compute",
                   given=rounded_weight(), n="size")
def _(f, given, n):
    values, _, A, B, alpha = given
    x = np.ones((n, values.shape[1])) * np.arange(1, n + 1)[:, None]
    W = host(merged(f, *given), "the merged weight", values)
    close(W, np.broadcast_to(W, values.shape), "the merged weight")
    close(x @ W.T, x @ values.T + alpha / len(A) * (x @ A.T) @ B.T, "x times the merged weight")


@merged_weight.law("the dtype is that of the packed weight's values", given=rounded_weight())
def _(f, given):
    values, original, A, B, alpha = given
    single = [a.astype(np.float32) for a in (values, original, A, B)]
    want = single[0] + np.float32(alpha / len(A)) * (single[3] @ single[2])
    close(merged(f, *single, alpha), want, "the merged weight", rtol=1e-5, dtype=True)


@merged_weight.wrong_answer("The adapter belongs to the model that was loaded.",
                            says="from before the rounding")
def _(packed, A, B, alpha):
    return packed.original + alpha / A.shape[0] * (B @ A)


@merged_weight.wrong_answer("A merged weight has to be packed again.", says="rounded again")
def _(packed, A, B, alpha):
    return (packed.dequantize() + alpha / A.shape[0] * (B @ A)).round()


@merged_weight.wrong_answer("The factor only matters in training.", says="α/r is left out")
def _(packed, A, B, alpha):
    return packed.dequantize() + B @ A


@merged_weight.wrong_answer("alpha is the factor.", says="α is the factor here")
def _(packed, A, B, alpha):
    return packed.dequantize() + alpha * (B @ A)


@merged_weight.wrong_answer("r is the last size of A.", says="first size of A")
def _(packed, A, B, alpha):
    return packed.dequantize() + alpha / A.shape[1] * (B @ A)


@merged_weight.wrong_answer("The base stays packed, so only the change is dense.",
                            says="ΔW alone")
def _(packed, A, B, alpha):
    return alpha / A.shape[0] * (B @ A)


@merged_weight.wrong_answer("To merge is to take the branch away.", says="subtracted")
def _(packed, A, B, alpha):
    return packed.dequantize() - alpha / A.shape[0] * (B @ A)


@merged_weight.wrong_answer("A sum is more exact in float64.", says="dtype", subtle=True)
def _(packed, A, B, alpha):
    return packed.dequantize().astype(np.float64) + alpha / A.shape[0] * (B @ A)


# ── cut_into_pages ────────────────────────────────────────────────────────────────────────────────
cut_into_pages = Exercise(
    "optim.paged:cut_into_pages", difficulty=2, minutes=15, on_host=True,
    may_use="min, //, slice(start, end), a while loop.",
    example="""
        >>> cut_into_pages(2, 9, page=4)
        [slice(2, 4, None), slice(4, 8, None), slice(8, 9, None)]
        >>> cut_into_pages(2, 9, page=4, kept=[5])
        [slice(2, 4, None), slice(4, 5, None), slice(5, 8, None), slice(8, 9, None)]
        """,
    hints=(
        "Go from start to stop.  Each slice ends where the first of three things comes: the end of "
        "its page, a number in kept, or stop.",
        "The page of the element `start` ends at (start // page + 1) * page.",
        "Only the numbers of kept that are larger than start end a slice.  The next slice starts "
        "where this one ends; stop when start has reached stop."))
PAGES = st.sampled_from((2, 3, 4))


@st.composite
def stretch(draw: Callable, from_zero: bool = True, keeps: bool = False):
    """start, stop, page and kept."""
    page = draw(PAGES)
    start = 0 if from_zero else draw(st.integers(1, 2 * draw(sizes())))
    stop = start + draw(st.integers(1, page * (draw(sizes()) + 1)))
    kept = (draw(st.integers(0, stop + 1)),) if keeps else ()
    return named(start=start, stop=stop, page=page, kept=kept)


def right_pages(start, stop, page, kept):
    ends = {stop, *range(0, stop, page), *kept}
    inner = sorted(end for end in ends if start < end <= stop)
    return np.array([*zip([start, *inner], inner)], np.int64).reshape(-1, 2)


def counted_from_start(start, stop, page, kept):
    return right_pages(0, stop - start, page, [k - start for k in kept]) + start


def guessed_pages(start, stop, page, kept):
    """{mistake: result}"""
    right = right_pages(start, stop, page, kept)
    whole = right[right[:, 1] - right[:, 0] == page]
    beyond = right.copy()
    beyond[-1, 1] = (right[-1, 0] // page + 1) * page
    with_empty = right_pages(start, stop, page, ())
    with_empty = np.concatenate([with_empty, [[k, k] for k in kept if start <= k <= stop]
                                 or with_empty[:0]])
    return {"the pages are counted from start; they are counted from 0":
                counted_from_start(start, stop, page, kept),
            "the numbers in kept are not looked at": right_pages(start, stop, page, ()),
            "the last page, which is not full, is lost": right[:-1],
            "pages that are not full are lost": whole,
            "the last slice reaches beyond stop": beyond,
            "it is one slice, not cut into pages": np.array([[start, stop]]),
            "the first page is cut only at kept": right_pages(start, stop, stop, kept),
            "a slice is empty: kept lies at an end": np.array(
                sorted(with_empty.tolist()), np.int64).reshape(-1, 2),
            "each slice lacks its last element: slice(a, b) ends before b": right - [0, 1],
            "the slices are counted from start; they are places in the whole array":
                right - start}


def check_pages(f, given):
    start, stop, page, kept = given
    made = f(start, stop, page, kept)
    if not isinstance(made, list) or not all(isinstance(part, slice) for part in made):
        raise Unusable(f"it should return a list of slices; yours is {made!r:.60}")
    got = np.array([(part.start, part.stop) for part in made], np.int64).reshape(-1, 2)
    check(got, right_pages(*given), "start and stop of the slices", guessed_pages(*given))


@cut_into_pages.law("from 0: pages, and a last one that may not be full", given=stretch())
def _(f, given):
    check_pages(f, given)


@cut_into_pages.law("pages are counted from 0 of the whole array", given=stretch(from_zero=False))
def _(f, given):
    check_pages(f, given)


@cut_into_pages.law("a slice ends where the resident elements end",
                    given=stretch(from_zero=False, keeps=True))
def _(f, given):
    check_pages(f, given)


@cut_into_pages.law("nothing to update: no slices", n="size", page=PAGES)
def _(f, n, page):
    made = f(n, n, page, ())
    if made != []:
        raise Unusable(f"start = stop = {n} should give []; yours is {made!r:.60}")


def as_slices(pairs):
    return [slice(int(a), int(b)) for a, b in pairs]


@cut_into_pages.wrong_answer("A page begins at start.", says="counted from start")
def _(start, stop, page, kept=()):
    return as_slices(counted_from_start(start, stop, page, kept))


@cut_into_pages.wrong_answer("Pages are all that matters.", says="not looked at", subtle=True)
def _(start, stop, page, kept=()):
    return as_slices(right_pages(start, stop, page, ()))


@cut_into_pages.wrong_answer("There are stop // page pages.", says="is lost")
def _(start, stop, page, kept=()):
    pairs = right_pages(start, stop, page, kept)
    return as_slices(pairs[pairs[:, 1] - pairs[:, 0] == page])


@cut_into_pages.wrong_answer("A page is always full.", says="beyond stop")
def _(start, stop, page, kept=()):
    pairs = right_pages(start, stop, page, kept)
    if len(pairs):
        pairs[-1, 1] = (pairs[-1, 0] // page + 1) * page
    return as_slices(pairs)


@cut_into_pages.wrong_answer("A slice includes its stop.", says="lacks its last element")
def _(start, stop, page, kept=()):
    return as_slices(right_pages(start, stop, page, kept) - [0, 1])


@cut_into_pages.wrong_answer("One stretch is read at once.", says="not cut into pages")
def _(start, stop, page, kept=()):
    return [slice(start, stop)] if start < stop else []


@cut_into_pages.wrong_answer("A slice says where in the stretch.", says="counted from start")
def _(start, stop, page, kept=()):
    return as_slices(right_pages(start, stop, page, kept) - start)


@cut_into_pages.wrong_answer("There is at least one slice.", says="should give []", subtle=True)
def _(start, stop, page, kept=()):
    return as_slices(right_pages(start, stop, page, kept)) or [slice(start, stop)]
