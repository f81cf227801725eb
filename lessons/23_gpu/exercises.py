"""Lesson 23: two kernels in CUDA C, a bias on its way forward and back; tensors laid end to end;
what a captured step may not bake in.
"""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tinyft.array import asarray, asnumpy
from tinyft.kernels.cuda import optimizer
from tinyft.learn.cuda import Kernel
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import array, sizes
from tinyft.optim import buffers
from tinyft.tensor import Tensor

F, HALF = np.float32, np.float16
UNWRITTEN = 99.0  # what an array to be filled holds before

# ── add_bias ──────────────────────────────────────────────────────────────────────────────────────
add_bias = Kernel(
    "kernels.cuda.bias:add_bias", difficulty=2, minutes=15,
    may_use="the words of CUDA C from the lesson: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, "
            "if, for, and a type in brackets to convert a number, such as (float)b[0] or (T)sum.",
    example="""
        >>> y = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
        >>> b = np.array([10, 20, 30], np.float32)
        >>> add_bias((1,), (4,), (y, b, np.int64(6), np.int32(3)))      # 1 block of 4 threads
        >>> y
        array([[11., 22., 33.],
               [14., 25., 36.]], dtype=float32)
        """,
    hints=(
        "A thread's number among all is blockIdx.x * blockDim.x + threadIdx.x.  There are "
        "gridDim.x * blockDim.x threads.  There may be more numbers than threads: then each "
        "thread takes several.",
        "Write the grid-stride loop of the lesson: it begins at the thread's number, goes on by "
        "the number of all threads, and ends before size.  If there are more threads than "
        "numbers, the loop of the last threads does nothing.",
        "Use long long i, because size is a long long.  Add in float and convert the sum back: "
        "y[i] = (T)((float)y[i] + (float)b[i % n]);"))


def biased(f, y, b, grid, block):
    y, b = y.astype(F), b.astype(F)
    f((grid,), (block,), (y, b, np.int64(y.size), np.int32(len(b))))
    return y


@add_bias.law("with more threads than numbers, nothing is written past the end",
              y="r n", b="n")
def _(f, y, b):
    close(biased(f, y, b, 1, 64), (y + b).astype(F), "y", {"nothing is added": y})


@add_bias.law("fewer threads than numbers: each takes several", y="r n", b="n",
              block=st.integers(1, 3))
def _(f, y, b, block):
    number = np.arange(y.size).reshape(y.shape)
    guesses = {"only as many numbers as there are threads got their bias": y + b * (number < block),
               "it adds b[threadIdx.x]; the column of number i is i % n":
                   y + np.resize(b, block)[number % block]}
    close(biased(f, y, b, 1, block), (y + b).astype(F), "y", guesses)


@add_bias.law("several blocks share the numbers", y="r n", b="n", grid=st.integers(2, 3),
              block=st.integers(1, 3))
def _(f, y, b, grid, block):
    number = np.arange(y.size).reshape(y.shape)
    guesses = {"a number got its bias from every block that came by: the stride is the number of "
               "threads of the whole grid":
                   y + b * sum(number >= block * k for k in range(grid))}
    close(biased(f, y, b, grid, block), (y + b).astype(F), "y", guesses)


@add_bias.law("numbers of 16 bits: T is half", y="r n", b="n")
def _(f, y, b):
    half_y, half_b = y.astype(HALF), b.astype(HALF)
    f((1,), (64,), (half_y, half_b, np.int64(y.size), np.int32(len(b))))
    close(half_y, (y + b).astype(HALF), "y, for T = half")


BODY = add_bias.text().split("{\n", 1)[1].rsplit("}", 1)[0]
LOOP = """  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < size;
       i += gridDim.x * (long long)blockDim.x)
    y[i] = (T)((float)y[i] + (float)b[i % n]);
"""
ONE = """  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  {}y[i] = (T)((float)y[i] + (float)b[i % n]);
"""
add_bias.instead("There are as many threads as numbers.", BODY, ONE.format(""), says="past the end")
add_bias.instead("A thread takes one number.", BODY, ONE.format("if (i < size) "),
                 says="as many numbers as there are threads")
add_bias.instead("The next number of a thread is a block further on.", BODY,
                 LOOP.replace("+= gridDim.x * (long long)blockDim.x", "+= blockDim.x"),
                 says="from every block", subtle=True)
add_bias.instead("T is float.", BODY,
                 LOOP.replace("(T)((float)y[i] + (float)b[i % n])",
                              "y[i] + (T)(*(float*)&b[i % n])"),
                 says="memory that nobody wrote", subtle=True)
add_bias.instead("A row has seven numbers at most.", BODY,
                 LOOP.replace("i % n", "i % min(n, 6)"), says="y", size=7)
add_bias.instead("Each thread begins at its own number in the block.", BODY,
                 LOOP.replace("blockIdx.x * (long long)blockDim.x + threadIdx.x", "threadIdx.x"),
                 says="entries differ")
add_bias.instead("Row after row: i / n.", BODY, LOOP.replace("i % n", "i / n"),
                 says="outside an array")
add_bias.instead("A thread's number in its block is its column.", BODY,
                 LOOP.replace("i % n", "threadIdx.x % n"), says="b[threadIdx.x]")
add_bias.instead("The last number is number size.", BODY, LOOP.replace("i < size", "i <= size"),
                 says="past the end")


# ── sum_rows ──────────────────────────────────────────────────────────────────────────────────────
sum_rows = Kernel(
    "kernels.cuda.bias:sum_rows", difficulty=4, minutes=35,
    may_use="the words of CUDA C from the lesson, with .x and .y: thread (c, k) has "
            "threadIdx.x = c and threadIdx.y = k, block (i, s) has blockIdx.x = i and "
            "blockIdx.y = s.  Shared memory, also with two indices, a barrier, and min(a, b) of "
            "two ints.",
    example="""
        >>> g = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
        >>> parts = np.zeros((2, 2), np.float32)
        >>> each = np.int32(2)                              # stretches of 2 rows and of 1 row
        >>> sum_rows((1, 2), (32, 8), (g, parts, np.int32(3), np.int32(2), each))
        >>> parts
        array([[4., 6.],
               [5., 6.]], dtype=float32)
        """,
    hints=(
        "There are two steps, with a barrier between them.  First every thread adds up its own "
        "rows, k, k + 8, k + 16, ... of the stretch, and writes its sum into shared memory.  "
        "Then one of the eight threads of a column adds up the eight sums.",
        "__shared__ float sums[8][32]; has an element for each thread: "
        "sums[threadIdx.y][threadIdx.x].  At first it holds garbage, so every thread writes its "
        "element, a zero if it has no row.  Then comes __syncthreads(), which all threads must "
        "reach.",
        "for (int row = blockIdx.y * each + k; row < last; row += 8), with last = min(rows, "
        "(int)(blockIdx.y + 1) * each), and only where column = blockIdx.x * 32 + c is below n.  "
        "No return before the barrier.  After it all threads return, except those with k == 0 "
        "and column < n."))


def summed(f, g, each, dtype=F):
    g = np.ascontiguousarray(g, dtype)
    (rows, n), stretches = g.shape, -(-len(g) // each)
    parts = np.full((stretches, n), UNWRITTEN, F)
    f((-(-n // 32), stretches), (32, 8), (g, parts, np.int32(rows), np.int32(n), np.int32(each)))
    return parts


def stretched(g, each):
    return np.stack([g[s:s + each].sum(axis=0) for s in range(0, len(g), each)]).astype(F)


@st.composite
def tall(draw):
    """More rows than a block has threads for, or more columns."""
    g = draw(array((draw(sizes()), draw(sizes()))))
    return np.tile(g, (9, 1)) if draw(st.booleans()) else np.tile(g, (1, 33))


@sum_rows.law("with one stretch, it is the sum of each column", g="r n")
def _(f, g):
    want = g.sum(axis=0, keepdims=True).astype(F)
    guesses = {"nothing is written": 0 * want + UNWRITTEN, "it is the first row alone": g[:1],
               "thread k adds up all rows from row k on, so that row 1 counts twice, row 2 three "
               "times": (np.arange(1, len(g) + 1) @ g)[None],
               "the sum was added to what parts held before: write it with =, not +=":
                   want + UNWRITTEN}
    close(summed(f, g, len(g)), want, "parts", guesses)


@sum_rows.law("each stretch has its own sum; the last one may have fewer rows", g="r n",
              each=st.integers(1, 3))
def _(f, g, each):
    want = stretched(g, each)
    guesses = {"a stretch begins at the first row of all, expected at s·each":
                   np.cumsum(want, axis=0)}
    close(summed(f, g, each), want, "parts", guesses)


@sum_rows.law("there may be more rows than 8, and more columns than 32", g=tall())
def _(f, g):
    early = sum(g[k:k + 1] for k in range(min(8, len(g))))
    guesses = {"it is the sum of the first 8 rows: after row k thread k goes on with row k + 8":
                   early}
    close(summed(f, g, len(g)), g.sum(axis=0, keepdims=True).astype(F), "parts", guesses)


@sum_rows.law("numbers of 16 bits are added up as float: 2048 + 1 + 1 is 2050", g="r n")
def _(f, g):
    g = np.vstack([np.full((1, g.shape[1]), 2048.0), np.ones((2, g.shape[1])), np.abs(g)])
    want = g.sum(axis=0, keepdims=True).astype(F)
    close(summed(f, g, len(g), HALF), want, "parts, for T = half")


sum_rows.instead("Threads of a block run in step, so what one wrote the others see.",
                 "  __syncthreads();\n", "",
                 says="is a __syncthreads() missing?")
sum_rows.instead("A thread without a column has nothing to do, so it may leave.",
                 "  float sum = 0;\n",
                 "  if (column >= n) return;\n  float sum = 0;\n", says="threads that never come")
sum_rows.instead("There are as many columns as threads.", "if (k > 0 || column >= n) return;",
                 "if (k > 0) return;", says="past the end")
sum_rows.instead("All eight threads of a column know the total, so any of them may write it.",
                 "if (k > 0 || column >= n) return;",
                 "if (column >= n) return;", says="a race")
sum_rows.instead("Every thread goes through the rows of its stretch.", "row += 8", "row++",
                 says="counts twice")
sum_rows.instead("A loop over rows goes on by the width of a block.", "row += 8",
                 "row += blockDim.x", says="first 8 rows", subtle=True)
sum_rows.instead("The first row of a block is its row k.", "row = blockIdx.y * each + k", "row = k",
                 says="first row of all", subtle=True)
sum_rows.instead("Each of the eight threads has a row.", "row += 8", "row += each",
                 says="first 8 rows", subtle=True)
sum_rows.instead("Seven threads are eight.", "for (int j = 1; j < 8; j++)",
                 "for (int j = 1; j < 7; j++)", says="parts")
sum_rows.instead("The result of a stretch stands in row 0.",
                 "parts[(size_t)blockIdx.y * n + column]",
                 "parts[column]", says="parts", subtle=True)
sum_rows.instead("The last stretch is as long as the others.",
                 "last = min(rows, (int)(blockIdx.y + 1) * each)",
                 "last = (int)(blockIdx.y + 1) * each", says="outside an array", subtle=True)
sum_rows.instead("An array for sums holds zeros at first.",
                 "parts[(size_t)blockIdx.y * n + column] = sum",
                 "parts[(size_t)blockIdx.y * n + column] += sum", says="held before")
sum_rows.instead("Shared memory is for one column.", "column = blockIdx.x * 32 + c", "column = c",
                 says="parts", subtle=True)
sum_rows.instead("A sum has the type of what is added.", "  float sum = 0;\n", "  T sum = 0;\n",
                 says="parts, for T = half", subtle=True)


# ── adam_rates ────────────────────────────────────────────────────────────────────────────────────
adam_rates = Exercise(
    "kernels.cuda.optimizer:adam_rates", difficulty=2, minutes=10,
    may_use="arithmetic of Python: + − * / and **.",
    example="""
        >>> adam_rates(lr=0.5, b1=0.5, b2=0.75, decay=0.5, t=1)
        (1.0, 2.0, 0.75)
        """,
    hints=(
        "Put m̂ and v̂ into the update: w ← w (1 − ηλ) − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) "
        "+ ε).  Compare it with w ← shrink w − rate m / (root √v + ε), factor by factor.",
        "shrink is what stands before w, rate is what stands before m, and root is what stands "
        "before √v, under the fraction.",
        "√(v / (1 − β₂ᵗ)) = √v / √(1 − β₂ᵗ), so root = (1 - b2**t)**-0.5.  The decay takes η λ of "
        "w, whatever the corrections."))
given = {"lr": st.sampled_from([1.0, 0.5, 0.25, 1e-3]), "t": st.sampled_from([1, 2, 3, 4, 1000])}
b1, b2 = 0.75, 0.9375


def rates(f, lr, decay, t):
    out = f(lr, b1, b2, decay, t)
    if not (isinstance(out, tuple) and len(out) == 3):
        raise Unusable(f"three numbers are wanted, (rate, root, shrink); yours is {out!r}")
    return out


@adam_rates.law("rate holds the learning rate and the bias correction of m", **given)
def _(f, lr, t):
    guesses = {"it is multiplied with 1 − β₁ᵗ; m is too small, so divide": lr * (1 - b1**t),
               "t is one too many: it counts from 1, and that is the step to be taken":
                   lr / (1 - b1**(t + 1)), "m is not corrected": lr}
    close(rates(f, lr, 0.0, t)[0], lr / (1 - b1**t), "rate", guesses)


@adam_rates.law("root holds the bias correction of v, as a factor of √v", **given)
def _(f, lr, t):
    guesses = {"the root is missing: it stands before √v, not before v": 1 / (1 - b2**t),
               "v is not corrected": 1.0}
    close(rates(f, lr, 0.0, t)[1], (1 - b2**t)**-0.5, "root", guesses)


@adam_rates.law("shrink is the part of w that the weight decay leaves", **given,
                decay=st.sampled_from([0.25, 0.5, 1.0, 0.0, 0.01, 1e-4]))
def _(f, lr, t, decay):
    guesses = {"η is left out: the decay follows the schedule too": 1 - decay,
               "it is what is taken off w, expected what stays": lr * decay,
               "the decay is scaled by the corrected learning rate; it has nothing to do with m":
                   1 - lr / (1 - b1**t) * decay}
    close(rates(f, lr, decay, t)[2], 1 - lr * decay, "shrink", guesses)


@adam_rates.wrong_answer("Corrections make things smaller.", says="so divide")
def _(lr, b1, b2, decay, t):
    return lr * (1 - b1**t), (1 - b2**t)**-0.5, 1 - lr * decay


@adam_rates.wrong_answer("Steps count from zero.", says="one too many")
def _(lr, b1, b2, decay, t):
    return optimizer.adam_rates(lr, b1, b2, decay, t + 1)


@adam_rates.wrong_answer("Both moments are corrected in the same way.", says="the root is missing",
                         subtle=True)
def _(lr, b1, b2, decay, t):
    return lr / (1 - b1**t), 1 / (1 - b2**t), 1 - lr * decay


@adam_rates.wrong_answer("λ is a number of its own, so it may be baked in.", says="η is left out",
                         subtle=True)
def _(lr, b1, b2, decay, t):
    return lr / (1 - b1**t), (1 - b2**t)**-0.5, 1 - decay


@adam_rates.wrong_answer("The learning rate is the same for the decay.",
                         says="corrected learning rate",
                         subtle=True)
def _(lr, b1, b2, decay, t):
    return lr / (1 - b1**t), (1 - b2**t)**-0.5, 1 - lr / (1 - b1**t) * decay


@adam_rates.wrong_answer("float32 has digits enough.", says="six digits")
def _(lr, b1, b2, decay, t):
    return tuple(float(np.float32(r)) for r in optimizer.adam_rates(lr, b1, b2, decay, t))


@adam_rates.wrong_answer("Decays this small are no decays.", says="shrink", subtle=True)
def _(lr, b1, b2, decay, t):
    return optimizer.adam_rates(lr, b1, b2, decay if decay > 0.1 else 0.0, t)


@adam_rates.wrong_answer("After ten steps the bias is gone.", says="rate")
def _(lr, b1, b2, decay, t):
    return optimizer.adam_rates(lr, b1, b2, decay, t) if t <= 3 else (lr, 1.0, 1 - lr * decay)


@adam_rates.wrong_answer("β₁ and β₂ are 0.9 and 0.999.", says="rate")
def _(lr, b1, b2, decay, t):
    return optimizer.adam_rates(lr, 0.9, 0.999, decay, t)


@adam_rates.wrong_answer("The smaller root stands before √v.", says="root", subtle=True)
def _(lr, b1, b2, decay, t):
    return lr / (1 - b1**t), (1 - b2**t)**0.5, 1 - lr * decay


# ── lay_out ───────────────────────────────────────────────────────────────────────────────────────
lay_out = Exercise(
    "optim.buffers:Group.lay_out", difficulty=3, minutes=25, in_place=True, lines=12,
    may_use="the tensors' size, dtype and data; slice(start, end); m.zeros(n, dtype) of the module "
            "m = xp(a tensor's data); self.make_views(), which makes self.views from self.offsets "
            "and self.w; self.reclaim_values(), which copies the values of each tensor into its "
            "view and makes the view the tensor's data.",
    example="""
        >>> from tinyft import Tensor
        >>> from tinyft.optim.buffers import Group
        >>> bias = Tensor(np.array([1.0, 2.0]), requires_grad=True)
        >>> weight = Tensor(np.array([[3.0, 4.0], [5.0, 6.0]]), requires_grad=True)
        >>> group = Group(lr=0.1, decay=0.0, tensors={"bias": bias, "weight": weight})
        >>> lay_out(group, 2)
        >>> group.w
        array([1., 2., 3., 4., 5., 6.])
        >>> group.offsets["weight"]
        slice(2, 6, None)
        >>> len(group.moments), group.moments[0]
        (2, array([0., 0., 0., 0., 0., 0.]))
        """,
    hints=(
        "One flat array w holds all values, and each tensor's data becomes a view of it: "
        "w[offset].reshape(shape) makes no copy.  Then an update of w updates every tensor.",
        "self.tensors is {name: tensor}.  Go through the names, those of tensors with more than "
        "LARGE elements last, and give each name a slice: self.offsets[name] = slice(start, start "
        "+ size).",
        "w and each moment is an m.zeros(total, dtype) of its own, with m = xp(a tensor's data).  "
        "At the end self.make_views() makes self.views, and self.reclaim_values() copies each "
        "tensor's values into its view and makes the view its data."))


@st.composite
def tensors(draw, large=False):
    """Arrays of different shapes, of one dtype, with the values 1, 2, 3, ...; if large, one has
    more than LARGE elements and one as many.
    """
    dtype = draw(st.sampled_from((F, np.float64)))
    shapes = []
    for _ in range(draw(sizes())):
        shapes.append(tuple(draw(sizes()) for _ in range(draw(st.integers(0, 2)))))
    if draw(st.booleans()):
        shapes.insert(0, (0,))
    if large:
        shapes.insert(draw(st.integers(0, len(shapes))), (buffers.LARGE,))
        shapes.insert(draw(st.integers(0, len(shapes))), (buffers.LARGE + 1,))
    starts = np.cumsum([1] + [int(np.prod(s)) for s in shapes])
    return [np.arange(a, a + np.prod(s), dtype=dtype).reshape(s) for a, s in zip(starts, shapes)]


def laid(f, arrays, moments=2):
    """(group, {name: tensor}) after f(group, moments)."""
    made = {}
    for i, a in enumerate(arrays):
        made[f"tensor {i}"] = Tensor(asarray(a.copy()), requires_grad=True)
    group = buffers.Group(0.1, 0.0, dict(made))
    f(group, moments)
    for name in ("w", "moments", "offsets", "views"):
        if not hasattr(group, name):
            raise Unusable(f"self.{name} is not there")
    for name in ("offsets", "views"):
        held = getattr(group, name)
        if not isinstance(held, dict) or held.keys() != made.keys():
            raise Unusable(f"self.{name} should be a dict with the names of self.tensors")
    return group, made


def in_order(arrays):
    """The names of the tensors in the order in which they lie in w: large ones last."""
    small = [i for i, a in enumerate(arrays) if a.size <= buffers.LARGE]
    large = [i for i, a in enumerate(arrays) if a.size > buffers.LARGE]
    return small + large


def flat(arrays):
    return np.concatenate([a.reshape(-1) for a in arrays])


@lay_out.law("w holds all values, end to end, in the tensors' dtype", arrays=tensors())
def _(f, arrays):
    group, _ = laid(f, arrays)
    guesses = {"w is zero: the values were not copied into it": 0 * flat(arrays)}
    close(group.w, flat(arrays), "w", guesses, dtype=True)


@lay_out.law("the tensors have their shapes and values as before", arrays=tensors())
def _(f, arrays):
    _, made = laid(f, arrays)
    for (name, p), a in zip(made.items(), arrays):
        close(p, a, name, dtype=True)


@lay_out.law("a change of w changes the tensors", arrays=tensors())
def _(f, arrays):
    group, made = laid(f, arrays)
    group.w += 10
    guesses = {"the tensors did not change: they are copies; a reshaped slice is a view":
               flat(arrays)}
    after = flat([asnumpy(p.data) for p in made.values()])
    close(after, flat(arrays) + 10, "the tensors after w += 10", guesses)
    for name, p in made.items():
        if p.data is not group.views[name]:
            raise Unusable(f"self.views[{name!r}] is not the data of {name}: "
                           "it would count as written from outside at every step")


@lay_out.law("moments: zeros, each as long as w, each an array of its own", arrays=tensors(),
             moments=st.integers(0, 2))
def _(f, arrays, moments):
    group, _ = laid(f, arrays, moments)
    if not isinstance(group.moments, list):
        raise Unusable(f"self.moments should be a list of arrays; yours is a "
                       f"{type(group.moments).__name__}")
    close(len(group.moments), moments, "the number of moments")
    for i, m in enumerate(group.moments):
        what = "moment 0"
        guesses = {}
        if i > 0:
            what = f"moment {i}, after 1 was added to those before it"
            guesses["they are one array under several names"] = 0 * flat(arrays) + i
        close(m, 0 * flat(arrays), what, guesses, dtype=True)
        m += 1


@lay_out.law("large tensors lie last; offsets and views belong to the names",
             arrays=tensors(large=True))
def _(f, arrays):
    group, _ = laid(f, arrays)
    in_order_starts = {}
    end = 0
    for i in in_order(arrays):
        in_order_starts[i] = end
        end += arrays[i].size
    given_starts = np.cumsum([0] + [a.size for a in arrays])[:-1]
    shifted = np.array([in_order_starts[i] for i in range(len(arrays))])
    crossed = np.array([in_order_starts[i] for i in in_order(arrays)])
    starts = np.array([group.offsets[f"tensor {i}"].start for i in range(len(arrays))])
    lengths = np.array([group.offsets[f"tensor {i}"].stop for i in range(len(arrays))]) - starts
    guesses = {"the tensors lie in the order in which they were given: the large one comes last":
               given_starts,
               "a name got the slice of another tensor: slices belong to the tensors": crossed}
    close(starts, shifted, "the starts of the slices", guesses)
    close(lengths, np.array([a.size for a in arrays]), "the lengths of the slices")
    views = np.array([group.views[f"tensor {i}"].size for i in range(len(arrays))])
    close(views, np.array([a.size for a in arrays]), "the sizes of the views")
    if list(group.offsets) != [f"tensor {i}" for i in in_order(arrays)]:
        raise Unusable("the names in self.offsets stand in another order than the tensors in w: "
                       "those of large tensors come last here too")


def laid_out(group, moments, order=None, names=None, dtype=None, moments_dtype=None):
    """The answer up to make_views, with the usual errors in it on demand."""
    dtype = dtype or next(iter(group.tensors.values())).dtype
    given = list(group.tensors)
    sizes_of = [p.size for p in group.tensors.values()]
    if order is None:
        order = sorted(range(len(given)), key=lambda i: sizes_of[i] > buffers.LARGE)
    group.offsets = {}
    end = 0
    for place, i in enumerate(order):
        start = end
        end = start + sizes_of[i]
        name = given[i] if names is None else names[place]
        group.offsets[name] = slice(start, end)
    group.w = asarray(np.zeros(end, dtype))
    group.moments = [asarray(np.zeros(end, moments_dtype or dtype)) for _ in range(moments)]


def copied_into(group):
    for name, p in group.tensors.items():
        group.views[name][...] = p.data


@lay_out.wrong_answer("A tensor is its values; where they lie does not matter.",
                      says="they are copies")
def _(self, moments):
    laid_out(self, moments)
    self.make_views()
    copied_into(self)


@lay_out.wrong_answer("A view is all that a tensor needs.", says="not copied into it")
def _(self, moments):
    laid_out(self, moments)
    self.make_views()
    for name, p in self.tensors.items():
        p.data = self.views[name]


@lay_out.wrong_answer("Values are float32.", says="the dtype is float32")
def _(self, moments):
    laid_out(self, moments, dtype=F)
    self.make_views()
    self.reclaim_values()


@lay_out.wrong_answer("Two moments begin alike, so one array of zeros will do.",
                      says="several names", subtle=True)
def _(self, moments):
    laid_out(self, moments)
    self.moments = self.moments[:1] * moments
    self.make_views()
    self.reclaim_values()


@lay_out.wrong_answer("Moments of one length are the rows of one array.",
                      says="should be a list of arrays", subtle=True)
def _(self, moments):
    laid_out(self, moments)
    self.moments = asarray(np.zeros((moments, self.w.size), self.w.dtype))
    self.make_views()
    self.reclaim_values()


@lay_out.wrong_answer("The order of the names in a dict means nothing.", says="another order",
                      subtle=True)
def _(self, moments):
    laid_out(self, moments)
    self.offsets = {name: self.offsets[name] for name in self.tensors}
    self.make_views()
    self.reclaim_values()


@lay_out.wrong_answer("A name stays where it is.", says="the slice of another tensor", subtle=True)
def _(self, moments):
    laid_out(self, moments)
    right = self.offsets
    laid_out(self, moments, names=list(self.tensors))
    wrong = self.offsets
    self.offsets = right
    self.make_views()
    self.reclaim_values()
    self.offsets = wrong


@lay_out.wrong_answer("One order is as good as another.",
                      says="the large one comes last", subtle=True)
def _(self, moments):
    laid_out(self, moments, order=range(len(self.tensors)))
    self.make_views()
    self.reclaim_values()


@lay_out.wrong_answer("Moments are sums, so they are float64.", says="the dtype is float64",
                      subtle=True)
def _(self, moments):
    laid_out(self, moments, moments_dtype=np.float64)
    self.make_views()
    self.reclaim_values()


@lay_out.wrong_answer("A tensor of LARGE elements is large.", says="starts", subtle=True)
def _(self, moments):
    sizes_of = [p.size for p in self.tensors.values()]
    order = sorted(range(len(sizes_of)), key=lambda i: sizes_of[i] >= buffers.LARGE)
    laid_out(self, moments, order=order)
    self.make_views()
    self.reclaim_values()


@lay_out.wrong_answer("Views may be made at any time.", says="written from outside", subtle=True)
def _(self, moments):
    laid_out(self, moments)
    self.make_views()
    self.reclaim_values()
    self.make_views()


@lay_out.wrong_answer("There are always two moments.", says="the number of moments", subtle=True)
def _(self, moments):
    laid_out(self, 2)
    self.make_views()
    self.reclaim_values()


@lay_out.wrong_answer("A group has four tensors at most.", says="should be a dict", size=7)
def _(self, moments):
    self.lay_out(moments)
    self.offsets = dict(list(self.offsets.items())[:4])
