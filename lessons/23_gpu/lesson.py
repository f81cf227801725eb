# %% [markdown]
# # 23 The GPU
#
# **Reading:** 60 minutes. **You need:** lessons 01 and 03. No GPU, and no C.
# **Exercises:** add_bias, sum_rows, adam_rates, lay_out, layer_norm_rows,
# layer_norm_rows_backward (about two hours).
#
# A GPU is a second computer inside the computer. It computes with thousands of threads
# at once. Does a small model train a thousand times faster there? No: the GPU is idle
# most of the time. This lesson shows what it waits for, and what you can do about it.
# An appendix speeds up one op on the processor, in the same way.
#
# You need no GPU to read it. Two parts of the library stand in for one: an array that
# obeys the rules of a GPU and counts what is asked of it, and a class that runs GPU
# code on your processor. The class needs a compiler, `g++`. Without one you can read
# on, but the cells with GPU code do nothing.

# %%
import importlib
import math
import textwrap
import threading
import time
import timeit
from pathlib import Path

import numpy as np

import tinyft as ft
from tinyft.kernels import numpy as numpy_kernels
from tinyft.kernels.cuda import launch, optimizer
from tinyft.kernels.cuda.cpu_kernel import CpuKernel, KernelError, compiler, emulating
from tinyft.learn.draw import bars, curves, diagram, heat_map, points
from tinyft.learn.lessons import quote
from tinyft.learn.loops import layer_norm_rows
from tinyft.strict import counts

# %% [markdown]
# `has_compiler` is True if `g++` is there.

# %%
float32 = np.float32
try:
    compiler()
    has_compiler = True
except KernelError as reason:
    has_compiler = False
    print(f"The cells with GPU code do nothing here: {reason}")

# %% [markdown]
# ## Two memories
# The processor and its memory are the **host**. The GPU and its memory are the
# **device**. Python runs on the host. It can do two things with the device: copy
# numbers to or from it, and start a **kernel**. A kernel is a function that runs on
# the device. To start one is to **launch** it.

# %%
diagram({"python": (0, 0, "host: Python, NumPy\nits own memory", "data"),
         "device": (2.4, 0, "device: kernels, CuPy\nits own memory", "trained"),
         "numbers": (0, 1, "x = [1. 2. 3.]", "none"),
         "copy": (2.4, 1, "x = [1. 2. 3.]", "none")},
        [("python", "device", "launch a kernel"), ("numbers", "copy", "copy")],
        caption="Two computers. A kernel reads and writes the device's memory only.")

# %% [markdown]
# **CuPy** is a package whose functions have the names of NumPy's. Its arrays lie on the
# device, and each function launches kernels. So the same code can run on both, if it
# takes each function from the module of its array. In the library, `xp` finds that
# module. Read `_modules` as a dictionary: from the type of an array to its module.

# %%
quote(ft.array.xp)

# %% [markdown]
# An op of the library uses it. This is GELU, the function inside the transformer's
# MLP. You know the form from lesson 01: under `@op` stands a function of arrays, which
# returns the value and the pullbacks. The string `"... -> ..."` says that the result
# has the shape of the input. `xp(x).tanh` is NumPy's `tanh` if `x` is an array of
# NumPy, and CuPy's if `x` is one of CuPy.

# %%
quote(ft.ops.gelu_tanh)

# %% [markdown]
# The library has a third kind of array, `strict`. It lies in the host's memory, but it
# takes only what CuPy takes, and it counts what a GPU would have to do: launches,
# bytes, waits and copies. `ft.array.to` makes such an array, `ft.array.asnumpy` brings
# it back to NumPy. The op does not change.

# %%
gelu = ft.ops.gelu_tanh.definition            # the function of arrays under @op
host = np.array([-1, 0, 1, 2], float32)
device = ft.array.to(host, "strict")

for x in (host, device):
    y, _ = gelu(x)
    print(f"{ft.array.name_of(x):7}{np.round(ft.array.asnumpy(y), 3)}")

# %% [check]
assert np.array_equal(gelu(host)[0], ft.array.asnumpy(gelu(device)[0]))

# %% [markdown]
# ## What the host may ask
# A launch returns at once: the host runs ahead while the device computes. But when the
# host wants to **see** a number, it must wait until the device has computed it. And a
# device cannot use an array that lies on the host: it must be copied first. Both are
# slow. CuPy does not compute with a NumPy array that you have not copied. Some other
# copies, and the waits, happen without a word.
#
# `report` runs one expression on the device array `x` and prints what it cost. `eval`
# runs a string as Python. `counts` holds what the strict arrays have counted: `sync`
# are the waits, and `h2d` the copies from host to device.

# %%
x = device
strict_xp = ft.array.xp(x)

def report(text):
    counts.clear()
    try:
        eval(text)
        said = f"waits {counts['sync']}, copies {counts['h2d']}"
    except TypeError as error:
        said = "error: " + str(error).split(";")[0]
    print(f"{text:30}{said}")
    return said

said = report("x * 2.0")

# %% [markdown]
# Nothing was copied: a single number such as `2.0` travels with the launch.
#
# **Predict first.** Below are five more expressions; `host` is a NumPy array. Which of
# them is an error, which copies, and in which must the host wait? Think: whose memory
# are the numbers in, and must the host know a number, or a shape, before it can go on?

# %%
EXPRESSIONS = ["x + host", "x[[0, 2]]", "float(x.sum())", "x[x > 0]",
               "strict_xp.where(x > 0, x, 0)"]
said = {text: report(text) for text in EXPRESSIONS}

# %% [markdown]
# - `x + host` mixes two memories. It is refused, so that nobody copies an array at
#   every step without seeing it.
# - `x[[0, 2]]` has a list as an index. The list lies on the host, so it is copied.
# - `float(...)` gives the host a number. The host waits for it.
# - `x[x > 0]` has as many entries as are positive. The host must know how many, to
#   reserve memory. So it waits too.
# - `where` has a result of the same size whatever the numbers are. Nobody waits.

# %% [check]
assert "error" in said["x + host"]
assert "copies 1" in said["x[[0, 2]]"]
assert "waits 1" in said["float(x.sum())"] and "waits 1" in said["x[x > 0]"]
assert said[EXPRESSIONS[-1]] == "waits 0, copies 0"

# %% [markdown]
# ## What a launch costs
# Three numbers describe a GPU well enough for this lesson. A launch takes the host
# about 4 microseconds (µs): an estimate, and the same for a small and a large kernel.
# The other two are from the data sheet of one GPU, an H200.

# %%
LAUNCH = 4e-6                  # seconds for one launch
BANDWIDTH = 4.8e12             # bytes a second, from and to the device's memory
ARITHMETIC = 67e12             # float32 operations a second

def gpu_seconds(launches, bytes_moved, operations=0):
    memory = bytes_moved / BANDWIDTH
    computing = operations / ARITHMETIC
    return np.maximum(launches * LAUNCH, np.maximum(memory, computing))

# %% [markdown]
# The three go on at the same time: while one kernel runs, the host launches the next,
# and while some numbers arrive from memory, the device computes with others. So the
# slowest decides, and the time is the maximum of the three.
#
# Take $y = 2x$ in float32. For each number the kernel reads 4 bytes and writes 4
# bytes.
#
# **Predict first.** For few numbers, the launch takes longer than the bytes. From how
# many numbers on do the bytes take longer? You need only `LAUNCH` and `BANDWIDTH`.

# %%
break_even = LAUNCH * BANDWIDTH / 8                 # 8 bytes for each number
print(f"{break_even / 1e6:.1f} million numbers")

# %% [markdown]
# In 4 µs the device could have moved 19 million bytes. With far fewer than 2.4 million
# numbers it is idle most of the time. Is it so for NumPy too, that a call takes the
# time if the array is small, and the bytes if it is large? We measure it here, and
# CuPy too if this computer has a GPU.

# %%
SIZES = 2**np.arange(4, 25, 2)

def seconds(x, y):
    "The time of y = 2 x: the shortest of four measurements."
    def double():
        ft.array.xp(x).multiply(x, 2, out=y)
        return ft.array.asnumpy(y[:1])              # to see a number is to wait for it
    return min(timeit.repeat(double, number=10, repeat=4)) / 10

# %% [markdown]
# `why_no_cupy` is None where CuPy works. A computer without a GPU measures NumPy
# alone.

# %%
measured = {}
for backend in ("numpy", "cupy"):
    if backend == "cupy" and ft.array.why_no_cupy() is not None:
        continue
    x = ft.array.to(np.ones(SIZES[-1], float32), backend)
    y = ft.array.to(np.ones(SIZES[-1], float32), backend)
    times = [seconds(x[:n], y[:n]) for n in SIZES]
    measured[f"{backend}, measured here"] = 1e6 * np.array(times)

curves({"GPU, by the formula": 1e6 * gpu_seconds(1, 8 * SIZES), **measured}, x=SIZES,
       levels={"one launch: 4 µs": 4}, xlabel="numbers", ylabel="µs for y = 2x",
       log="xy", caption="Flat while the call takes the time; then the bytes do.")

# %% [markdown]
# Both lines are flat at first, then they rise with the bytes. A call of NumPy costs
# less than a launch, so for a few thousand numbers the laptop is **faster** than the
# GPU. For millions, the GPU is far ahead.

# %% [check]
numpy_times = measured["numpy, measured here"]
assert round(break_even / 1e6, 1) == 2.4
assert numpy_times[-1] > 20 * numpy_times[0]             # a million times the numbers

# %% [markdown]
# ## Memory or arithmetic?
# Past the launch, two limits are left. Which one holds depends on the number of
# operations for each byte. The device can do $67 / 4.8 = 14$ operations in the time of
# one byte. A kernel that does fewer waits for memory.
#
# $y = 2x$ does one operation for 8 bytes. A product of two matrices $n \times n$ does
# $n^3$ multiplications and as many additions, $2 n^3$ operations. It reads two matrices
# and writes one, $12 n^2$ bytes: that is $n / 6$ operations for each byte.

# %%
per_byte = {"y = 2x": 1 / 8, "product, n = 16": 16 / 6, "product, n = 1024": 1024 / 6}
reached = {}
for name, intensity in per_byte.items():
    reached[name] = (intensity, min(ARITHMETIC, intensity * BANDWIDTH) / 1e12)
    print(f"{name:19}{intensity:8.2f} operations a byte, "
          f"at most {reached[name][1]:4.1f} 10¹² operations a second")

intensities = np.logspace(-1.3, 2.6, 100)
roof = np.minimum(ARITHMETIC, intensities * BANDWIDTH) / 1e12
points(reached, log="xy", lines={"the most that can be reached": (intensities, roof)},
       xlabel="operations for each byte", ylabel="10¹² operations a second",
       caption="y = 2x reaches 1 % of the arithmetic: it waits for memory.")

# %% [check]
assert round(ARITHMETIC / BANDWIDTH) == 14
assert reached["y = 2x"][1] == 0.6 and reached["product, n = 1024"][1] == 67

# %% [markdown]
# This picture is called a **roofline**. On the slope memory decides; on the flat roof
# the arithmetic does. Everything in a network except large products lies far down on
# the slope: GELU, layer norm, the optimiser. For these, only the number of bytes and
# of launches counts.
#
# ## A launch for each operation
# Here is the value of `gelu_tanh` again, without the pullback.

# %%
C = (2 / np.pi)**0.5                                # a number of Python, no array

def gelu_value(x):
    h = ft.array.xp(x).tanh(C * (x + 0.044715 * (x * x * x)))
    return 0.5 * x * (1 + h)

# %% [markdown]
# CuPy runs each operation by itself: `x * x` is one launch, which reads its input from
# memory and writes its result there. One **pass** is an array of $x$'s size that is
# read or written once. So `0.5 * x` and `x * x` are two passes each: $x$ is read, the
# result written. An operation on two different arrays is three.
#
# **Predict first.** How many launches, and how many passes, are the two lines of
# `gelu_value`? And how many passes are needed, if one kernel does everything?

# %%
device = ft.array.to(np.ones(2**16, float32), "strict")
counts.clear()
gelu_value(device)
launches, passes = counts["launch"], counts["bytes"] // device.nbytes
print(f"{launches} launches, {passes} passes;  one kernel: 1 launch, 2 passes")

# %% [markdown]
# The line of `h` has six operations with $2 + 3 + 2 + 3 + 2 + 2 = 14$ passes, the line
# of `return` three with $2 + 2 + 3 = 7$. Each operation writes its result to memory,
# and the next one reads it back. One kernel can read $x$ once, compute everything, and
# write $y$ once. Such a kernel is **fused**. It does the same arithmetic: it saves
# launches and passes.

# %%
many = np.logspace(2, 9, 30)
separate = gpu_seconds(launches, passes * 4 * many)
fused = gpu_seconds(1, 2 * 4 * many)
curves({"9 launches, 21 passes": 1e6 * separate,
        "fused: 1 launch, 2 passes": 1e6 * fused}, x=many, log="xy",
       xlabel="numbers", ylabel="µs, by the formula",
       caption="Small arrays gain by fewer launches, large ones by fewer passes.")
gain = separate / fused
print(f"fused is {gain[0]:.1f} times faster if small, {gain[-1]:.1f} times if large")

# %% [check]
assert (launches, passes) == (9, 21)
assert np.array_equal(gelu_value(host), gelu(host)[0])
assert round(gain[0], 1) == 9 and round(gain[-1], 1) == 10.5

# %% [markdown]
# ## Reading CUDA C
# To fuse, we write the kernel ourselves. CUDA is NVIDIA's system for programs on its
# GPUs. Its kernels are written in CUDA C: the language C with a few more words. You
# need only these words of C:
#
# - `int i = 3;` makes a variable. Its type stands before its name: `int` is an integer,
#   `long long` an integer with more bits, `float` is float32. A `;` ends each
#   statement.
# - `float* x` is an array: the address of its first number. `x[i]` is number `i`, from
#   0. C knows no length and checks no index. `const` says that the kernel only reads
#   it.
# - `+`, `-`, `*`, `+=`, `<` and `==` are as in Python, and so is `%` for numbers that
#   are not negative. `/` of two ints drops the rest: `7 / 2` is 3. `&&` is `and`. In
#   `0.5f`, the `f` makes the number a float.
# - `{` and `}` stand around a block of lines, where Python indents.
# - `if (i < n) ...` does something under a condition.
# - `for (int i = 0; i < n; i += 2)` is `for i in range(0, n, 2)`.
# - `(float)a` turns `a` into a float. `//` begins a comment. `void`: nothing is
#   returned.
#
# CUDA adds the threads. A kernel says what **one thread** does. A launch starts many
# threads, all with the same code. They come in **blocks**, and the blocks of a launch
# are its **grid**. Each thread can ask which one it is:
#
# - `threadIdx.x` is its number in its block, and `blockDim.x` the size of a block;
# - `blockIdx.x` is the number of its block, and `gridDim.x` the number of blocks.
#
# Threads and blocks count from 0. The `.x` stands for the first axis; a later section
# has a second one, `.y`. The words `extern "C" __global__` mark a kernel that the host
# may launch by its name.

# %%
DOUBLE = """
extern "C" __global__ void twice(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}
"""

# %% [markdown]
# In the blocks before this one there are `blockIdx.x * blockDim.x` threads. Together
# with the number in the block, this gives each thread of the grid its own `i`. With two
# blocks of four threads, `i` goes from 0 to 7. Here is which thread handles which entry
# of an array of six.

# %%
boxes = {"block 0": (0.825, -0.8, "block 0", "none"),
         "block 1": (3.275, -0.8, "block 1", "none"),
         "nothing": (3.825, 1, "i < n is false", "none")}
for i in range(8):
    column = i * 0.55 + i // 4 * 0.25
    boxes |= {f"thread {i}": (column, 0, f"thread\n{i % 4}", "trained")}
    if i < 6:
        boxes |= {f"entry {i}": (column, 1, f"y[{i}]", "data")}
arrows = [(f"thread {i}", f"entry {i}") for i in range(6)]
diagram(boxes, arrows, caption="i = blockIdx.x * blockDim.x + threadIdx.x, for n = 6.")

# %% [markdown]
# `CpuKernel` compiles a kernel for the processor. It is called as CuPy calls a kernel:
# the grid, the size of a block, the arguments. The sizes are tuples, because a block
# may have several axes. `np.int32(6)` is a number with the type that the kernel asks
# for, `int`. `run` also prints the error, if there is one.

# %%
def run(source, name, grid, block, arguments):
    "Launch a kernel on the CPU. Returns the error in words, or an empty string."
    if not has_compiler:
        return "no compiler"
    try:
        CpuKernel(source, name)(grid, block, arguments)
    except KernelError as error:
        print(textwrap.fill(f"error: {error}", 88))
        return str(error)
    return ""

x = np.array([1, 2, 3, 4, 5, 6], float32)
y = np.zeros(6, float32)
run(DOUBLE, "twice", (2,), (4,), (x, y, np.int32(6)))
print(y)

# %% [check]
assert not has_compiler or y.tolist() == [2, 4, 6, 8, 10, 12]

# %% [markdown]
# **Predict first.** We leave out `if (i < n)`. Eight threads run, for six numbers.
# What do threads 6 and 7 do? Would a GPU tell us?

# %%
error = run(DOUBLE.replace("if (i < n) ", ""), "twice", (2,), (4,), (x, y, np.int32(6)))

# %% [markdown]
# Threads 6 and 7 write past the end of the array, to memory that may belong to another
# one. A GPU often says nothing. The other array is wrong, and you search for the fault
# there. On the CPU, the library puts a margin around each array, and looks at the
# margins after the launch.

# %% [check]
assert not has_compiler or "past the end" in error

# %% [markdown]
# ## Fewer threads than numbers
# A million numbers need no million threads. A thread can take several: it begins at
# its own number `i` and goes on by the number of **all** threads. This is called a
# grid-stride loop. To see it, this kernel writes the number of the thread.

# %%
WHO = """
extern "C" __global__ void who(float* y, int n) {
  int first = blockIdx.x * blockDim.x + threadIdx.x;
  int threads = gridDim.x * blockDim.x;
  for (int i = first; i < n; i += threads) y[i] = first;
}
"""

# %% [markdown]
# **Predict first.** One launch has 2 blocks of 4 threads, and $y$ has 20 entries.
# Which thread writes $y_{13}$? How many entries does thread 3 write, and how many
# thread 4?

# %%
who = np.zeros(20, float32)
run(WHO, "who", (2,), (4,), (who, np.int32(20)))
print(who.astype(int))
heat_map(who[None], values=".0f", columns=[str(i) for i in range(20)],
         xlabel="entry i of y", height=1.1,
         caption="In each entry the number of the thread that wrote it.")

# %% [markdown]
# Thread 5 writes $y_{13}$, because $13 = 5 + 8$. Thread 3 writes three entries (3, 11,
# 19), thread 4 only two.
#
# Why not give each thread three entries in a row? 32 threads of a block form a
# **warp**, which the device runs together. Here a warp reads 32 neighbours at once, and
# one transfer from memory brings them all. With three in a row for each thread, it
# would read the entries 0, 3, 6, ..., 93 at once, and that takes three transfers.

# %% [check]
assert not has_compiler or who.tolist() == [i % 8 for i in range(20)]

# %% [markdown]
# ## The library's fused GELU
# Now you can read a kernel of the library. Some words are new:
#
# - `T` is the type of the numbers: the library puts `float`, or a type of 16 bits, in
#   its place. `(T)a` converts `a` to it.
# - `#define` gives a name to a piece of text, here to the head of the grid-stride loop.
#   `for EACH(i, n)` is that loop.
# - `__device__` marks a function that a kernel calls, and `tanhf` is `tanh` of a float.

# %%
text = (launch.HERE / "gelu.cu").read_text(encoding="utf-8")
for line in text.splitlines():
    if line.startswith("#define") or "tanhf" in line:
        print(textwrap.fill(line, 88, subsequent_indent="    "))
start = text.index('extern "C" __global__ void gelu_tanh(')
print(text[start:text.index("}\n}", start) + 3])

# %% [markdown]
# Each thread reads `x[i]` once, computes all nine operations, and writes `y[i]` once.
# All values in between stay in the thread's registers: a few numbers that each thread
# keeps beside the arithmetic unit. `launch.blocks` chooses the grid: blocks of 256
# threads, and at most 4096 of them. `-(-n // per)` is $n$ divided by `per`, rounded up.

# %%
quote(launch.blocks)
source = launch.source("gelu.cu", (("T", np.dtype(float32)),))      # with T = float
x = np.linspace(-4, 4, 1000, dtype=float32)
y = np.zeros(1000, float32)
grid = launch.blocks(1000)
run(source, "gelu_tanh", (grid,), (launch.THREADS,), (x, y, np.int64(1000)))
difference = abs(y - gelu(x)[0]).max()
print(f"{grid} blocks of {launch.THREADS} threads; largest difference {difference:.0e}")

# %% [check]
assert grid == 4 and (not has_compiler or difference < 2e-6)

# %% [markdown]
# ## Threads that meet
# In GELU no thread needs another. A sum does: all numbers go into one. The threads of
# a block have a memory in common, **shared memory**. It is small, 48 kB for a block,
# and much faster than the device's memory.
#
# Eight threads add eight numbers in three rounds. In each round, the first half of the
# numbers stays: to each of them a thread adds the number that lies half the length
# further on. After the round, half as many numbers are left.

# %%
ROUNDS = [[1, 2, 3, 4, 5, 6, 7, 8], [6, 8, 10, 12], [16, 20], [36]]
boxes = {}
arrows = []
for row, sums in enumerate(ROUNDS):
    note = "part" if row == 0 else f"after round {row}"
    boxes |= {f"note {row}": (-0.75, row, note, "none")}
    for t, value in enumerate(sums):
        kind = "data" if row == 0 else "trained"
        boxes |= {f"{row} {t}": (t * 0.5, row, f"{value}", kind)}
        if row > 0:
            arrows += [(f"{row - 1} {t}", f"{row} {t}"),
                       (f"{row - 1} {t + len(sums)}", f"{row} {t}")]
diagram(boxes, arrows, height=3.0,
        caption="Rounds with half = 4, 2, 1. Thread t computes column t.")

# %% [markdown]
# Two words are new. `__shared__ float part[256];` is an array in shared memory: one
# for each block. `__syncthreads();` is a **barrier**: a thread waits there until all
# threads of its block have come to it. Then all go on, and each sees what the others
# wrote before the barrier. `half /= 2` drops the rest, so 1 becomes 0 and the loop
# ends.

# %%
TOTAL = """
extern "C" __global__ void total(const float* x, float* y) {
  __shared__ float part[256];
  int t = threadIdx.x;
  part[t] = x[t];
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (t < half) part[t] += part[t + half];
    __syncthreads();
  }
  if (t == 0) y[0] = part[0];
}
"""

# %% [markdown]
# Why the barriers? Threads run in **no** fixed order. The first barrier makes sure that
# all of `part` is written before anyone reads it. The second makes sure that a round is
# over before the next begins. A barrier holds for **one** block. Blocks do not wait for
# each other: what needs the results of all blocks is a second launch.
#
# On the CPU the threads run one after the other: thread 0 runs until it waits at a
# barrier, then thread 1, and so on. We can also begin with thread 255 and go down. A
# fault shows if the order changes the result. Shared memory is full of NaN at first,
# so a number that is read too early shows as well.

# %%
def total(source, reverse):
    "The sum of 1, 2, ..., 256 by 256 threads, which run upwards or in reverse order."
    x = np.arange(1, 257, dtype=float32)
    y = np.zeros(1, float32)
    with emulating(reverse=reverse, poison=255):        # poison: bytes that make NaN
        failed = run(source, "total", (1,), (256,), (x, y))
    return "refused" if failed else float(y[0])

print("upwards:", total(TOTAL, False), "  downwards:", total(TOTAL, True))

# %% [check]
assert not has_compiler or total(TOTAL, False) == total(TOTAL, True) == 32896

# %% [markdown]
# **Predict first.** We plant three faults, one at a time. Is each right or wrong
# upwards, and downwards? (If you like, compute the wrong numbers, too.) Which faults
# would a test in one order alone not find?
#
# 1. The first barrier is missing.
# 2. The second barrier, in the loop, is missing.
# 3. Every thread writes its own part: `y[0] = part[t]`, without the `if`.

# %%
FAULTS = {"no first barrier": ("  __syncthreads();\n  for", "  for"),
          "no second barrier": ("    __syncthreads();\n", ""),
          "all threads write y": ("if (t == 0) y[0] = part[0]", "y[0] = part[t]")}
sums = {}
for name, (right, wrong) in FAULTS.items():
    source = TOTAL.replace(right, wrong)
    sums[name] = [total(source, False), total(source, True)]
    print(f"{name:22}upwards {sums[name][0]:8}  downwards {sums[name][1]:8}")

# %% [markdown]
# 1. Upwards, thread 0 reads `part[128]` before thread 128 has written it: NaN.
#    Downwards, thread 0 comes last, and all is written.
# 2. Upwards, thread 0 goes through all rounds before the others begin. It adds the
#    numbers that still lie at 128, 64, ..., 1 to its own 1, so it gets $1 + 129 + 65 +
#    33 + 17 + 9 + 5 + 3 + 2 = 264$. Downwards, every thread finds the finished sums of
#    the threads above it.
# 3. Upwards, thread 255 writes last, and its part is still 256. Downwards, thread 0
#    writes last, and it has the sum.
#
# A fault whose result depends on the order of the threads is a **race**. All three
# kernels are right downwards! On a GPU the order changes from run to run, so such a
# kernel is right on Monday and wrong on Tuesday. The library's kernels, and those you
# write, are checked in both orders.

# %% [check]
if has_compiler:
    assert np.isnan(sums["no first barrier"][0])
    assert sums["all threads write y"][0] == 256
    assert sums["no second barrier"][0] == 1 + 129 + 65 + 33 + 17 + 9 + 5 + 3 + 2 == 264
    assert all(both[1] == 32896 for both in sums.values())

# %% [markdown]
# ## Two more faults
# NVIDIA's own slides "Optimizing Parallel Reduction in CUDA" (Harris 2007) say that
# the last rounds need no barrier: 32 threads of a warp run in step. Many texts repeat
# it. It is no longer so: since the GPUs of 2017 (Volta), the threads of a warp may
# drift apart. Our CPU lets them drift as far as they can: each runs alone up to the
# next barrier. We leave out the barrier of the last rounds, and run both orders.

# %%
IN_STEP = TOTAL.replace("    __syncthreads();", "    if (half > 32) __syncthreads();")
print("upwards:", total(IN_STEP, False), "  downwards:", total(IN_STEP, True))

# %% [markdown]
# Upwards the sum is wrong: a warp needs the barrier as well.
#
# The opposite fault is a barrier that not all threads reach. Here, threads that have
# nothing to do in a round leave with `return`: this ends the thread. The others wait
# for them for ever. A GPU hangs, or goes on with garbage. The CPU says which thread
# waits where; line 10 of this source is the barrier in the loop.

# %%
LEAVE = TOTAL.replace("if (t < half)", "if (t >= half) return;\n    ")
waiting = total(LEAVE, False)

# %% [check]
if has_compiler:
    assert total(IN_STEP, False) != 32896 and total(IN_STEP, True) == 32896
    assert waiting == "refused"

# %% [markdown]
# ## Blocks with two axes
# For a matrix it is handy if a thread has two numbers: `threadIdx.x` for the column
# and `threadIdx.y` for the row. A block of `(4, 2)` has four times two threads. A
# matrix lies in memory row after row, so with `n` columns the entry in row `row` and
# column `c` is number `row * n + c`.
#
# This kernel writes to each entry the `threadIdx.y` of the thread that handles it.

# %%
WHICH = """
extern "C" __global__ void which(float* y, int rows, int n) {
  int c = threadIdx.x;
  int k = threadIdx.y;
  for (int row = k; row < rows; row += 2) y[row * n + c] = k;
}
"""

# %% [markdown]
# **Predict first.** $y$ has 5 rows and 4 columns, the block is `(4, 2)`. Which rows
# does a thread with $k = 0$ handle, which one with $k = 1$?

# %%
which = np.zeros((5, 4), float32)
run(WHICH, "which", (1,), (4, 2), (which, np.int32(5), np.int32(4)))
heat_map(which, values=".0f", rows=[f"row {i}" for i in range(5)],
         columns=["0", "1", "2", "3"], xlabel="c", height=2.4,
         caption="In each entry k of the thread that handles it: two share a column.")

# %% [markdown]
# Two threads share each column: $k = 0$ handles the rows 0, 2 and 4, and $k = 1$
# handles the rows 1 and 3, in every column. A thread begins at row $k$ and goes on by
# 2, the number of threads in a column.
#
# The kernel of the exercise `sum_rows` is built in this way. There eight threads share
# a column. Each adds up its own rows. Then the eight sums meet in shared memory, in an
# array with two indices: `float sums[8][32]`, with `__shared__` before it. The grid has
# two axes there as well, with `blockIdx.x` and `blockIdx.y`.

# %% [check]
assert not has_compiler or which[:, 0].tolist() == [0, 1, 0, 1, 0]

# %% [markdown]
# ## Tensors laid end to end
# Back to training. An optimiser such as Adam does little arithmetic, but it does it
# for every tensor: weights, biases, norms. A transformer has dozens of tensors, most
# of them small, and each costs as many launches as a large one.
#
# The remedy: one long array holds all values, and each tensor is a **view** of a part
# of it. A view has no numbers of its own: it shows those of the long array.

# %%
flat = np.zeros(6, float32)
bias = flat[0:2]
weight = flat[2:6].reshape(2, 2)

flat += 10                                    # one operation updates both tensors
print("bias  ", bias)
print("weight", weight.tolist())

# %% [markdown]
# Nothing was copied back: `bias` and `weight` look at the same memory as `flat`.

# %%
boxes = {"bias": (1.1, 1.2, "bias (2,)", "data"),
         "weight": (3.2, 1.2, "weight (2, 2)", "trained")}
for i in range(6):
    kind = "data" if i < 2 else "trained"
    boxes |= {f"{i}": (0.8 + 0.6 * i, 0, f"flat[{i}]", kind)}
arrows = [(f"{i}", "bias" if i < 2 else "weight") for i in range(6)]
diagram(boxes, arrows, caption="Two tensors end to end. One update serves both.")

# %% [check]
assert bias.tolist() == [10, 10] and weight.tolist() == [[10, 10], [10, 10]]

# %% [markdown]
# The library's optimisers do this in `Group.lay_out`, which is an exercise below. Now
# the real model: the small GPT of lesson 02, and four rows of text. Each row has 33
# tokens: the model reads 32, and is asked for the one after each. On the strict device
# we count a pass forward and back.

# %%
def cost(f):
    "Launches, megabytes, waits and copies of one call."
    counts.clear()
    f()
    return [counts["launch"], counts["bytes"] / 1e6, counts["sync"], counts["h2d"]]

def forward_and_back():
    targets = ft.train.batch.read_batch(ids)
    _, loss = ft.train.batch.compute_loss(model, targets)
    loss.backward()

backend_before = ft.backend()
ft.use("strict")                              # from now on, new arrays are made there
model, _ = ft.load("base-gpt")
ids = ft.data.pretraining("prose", "valid")[:4 * 33].reshape(4, 33)
table = {"forward and back": cost(forward_and_back)}
print("forward and back:", table["forward and back"][0], "launches")

# %% [markdown]
# Then one step of AdamW. `adam_update` is the function of lesson 03. Here it gets each
# tensor by itself, with its gradient and its two moments. The numbers are the learning
# rate, $\beta_1$, $\beta_2$, $\varepsilon$, the weight decay and the step.

# %%
parameters = list(model.parameters())
moments = [(0 * p.data, 0 * p.data) for p in parameters]

def one_by_one():
    for p, (m, v) in zip(parameters, moments):
        ft.optim.optimizers.adam_update(p.data, p.grad, m, v, 1e-3, 0.9, 0.999, 1e-8,
                                        0.01, 1)

table["AdamW, one by one"] = cost(one_by_one)

# %% [markdown]
# **Predict first.** `adam_update` takes 14 launches, and the model has 68 tensors. How
# many launches are that?
#
# Then we lay the tensors end to end. An update of several tensors at once needs their
# gradients end to end, too, and these must be copied there. For the nine largest that
# is not worth it: each is updated by itself. The 59 others are updated in two pieces,
# one with weight decay and one without. Do you expect a handful of launches, or
# hundreds?

# %%
adamw = ft.AdamW(1e-3)
adamw.start(model.named_parameters())         # lays the tensors end to end
table["AdamW, end to end"] = cost(adamw.step)
ft.use(backend_before)
for name in ("AdamW, one by one", "AdamW, end to end"):
    print(f"{name:20}{table[name][0]:5} launches")

# %% [markdown]
# One by one: $68 \cdot 14 = 952$. End to end: nine tensors and two pieces, so about
# $11 \cdot 14 = 154$ for the update. The rest copies 59 gradients end to end, and
# computes the norm of all gradients. And the host waited twice, to see whether that
# norm is a finite number: before the update and after it.

# %% [check]
assert len(parameters) == 68 and table["AdamW, one by one"][0] == 68 * 14
assert 154 < table["AdamW, end to end"][0] < 952 / 3
assert table["forward and back"][2:] == [0, 2] and table["AdamW, end to end"][2] == 2

# %% [markdown]
# ## Adam in one kernel
# The update itself can be fused too. Here is AdamW as a kernel; `sqrtf` is the square
# root of a float. Three numbers, `rate`, `root` and `shrink`, come from the host: they
# hold the learning rate, the bias corrections and the weight decay of a step. To derive
# them is an exercise, so here we only call the library's `adam_rates`.

# %%
ADAM = """
extern "C" __global__ void adam(float* w, const float* g, float* m, float* v,
                                float rate, float root, float shrink, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  m[i] = 0.9f * m[i] + 0.1f * g[i];
  v[i] = 0.99f * v[i] + 0.01f * g[i] * g[i];
  w[i] = shrink * w[i] - rate * m[i] / (root * sqrtf(v[i]) + 1e-8f);
}
"""

# %% [markdown]
# 14 launches became one, and each array is read and written once. The library's kernel
# goes one step further: it gets a table with the addresses of all gradients, so no
# gradient is copied. We count its launches. `launch.COMPILERS` holds the compiler for
# each type of array; for NumPy's we put in one that notes the name of each kernel that
# is launched.

# %%
launched = []

def noting_compiler(source, name):
    kernel = CpuKernel(source, name)
    def noted(grid, block, arguments):
        launched.append(name)
        kernel(grid, block, arguments)
    return noted

# %% [markdown]
# The model here has the same 68 tensors, but small ones, so that the processor does
# not run a million threads. `update_pieces` is the library's fused step.

# %%
config = ft.GPTConfig(vocab=64, positions=32, width=16, layers=4, heads=2)
small = ft.GPT(config, seed=0)
targets = ft.train.batch.read_batch(ids % 64)
ft.train.batch.compute_loss(small, targets)[1].backward()
adamw = ft.AdamW(1e-3)
adamw.start(small.named_parameters())
if has_compiler:
    launch.COMPILERS[np.ndarray] = noting_compiler
    optimizer.update_pieces(adamw, factor=1.0, clip=None, loss=None)
    del launch.COMPILERS[np.ndarray]
print(f"{len(list(small.parameters()))} tensors:", ", ".join(launched))

# %% [markdown]
# Four launches for 68 tensors: the squares of all gradients, their sum, and an update
# for each of the two groups (with weight decay and without). Why not one launch? The
# squares are added up by many blocks, and blocks do not wait for each other. Only the
# next launch can rely on all of them.
#
# ## A step as a tape
# Forward and back still take 645 launches. A **CUDA graph** is a tape for them: the
# launches of one step are recorded once (the step is **captured**), and one call of
# the host replays them all. In Python, a tape is a list of launches with their
# arguments:

# %%
def replay(tape):
    for entry in tape:
        run(*entry)                           # source, name, grid, block, arguments

def start_of_training():
    rng = np.random.default_rng(0)
    w = rng.standard_normal(1000).astype(float32)
    g = rng.standard_normal(1000).astype(float32)
    return w, g, np.zeros(1000, float32), np.zeros(1000, float32)

# %% [markdown]
# A replay of the real tape runs no Python between two launches. The tape holds the
# addresses of the arrays, and the numbers that were passed. We record step 1 of AdamW,
# with a learning rate of 0.1, and replay it for the steps 1, 2 and 3. Beside it,
# `adam_update` takes the same three steps; it changes its arrays in place.

# %%
right = start_of_training()
for t in (1, 2, 3):
    ft.optim.optimizers.adam_update(*right, 0.1, 0.9, 0.99, 1e-8, 0.01, t)

numbers_of_step_1 = [float32(a) for a in optimizer.adam_rates(0.1, 0.9, 0.99, 0.01, 1)]
by_value = start_of_training()
tape = [(ADAM, "adam", (4,), (256,), (*by_value, *numbers_of_step_1, np.int32(1000)))]

# %% [markdown]
# **Predict first.** The gradients are the same in every step, and the learning rate is
# constant. Are the weights right after three replays? If not, which number changes
# from step to step although nothing else does?

# %%
for _ in range(3):
    replay(tape)
print(f"largest error of a weight: {abs(by_value[0] - right[0]).max():.2f}")

# %% [markdown]
# The error is almost a whole step of 0.1. The step count $t$ changes: Adam's bias
# corrections, $1 - \beta^t$, belong to one step. On the tape they are numbers of step
# 1, **baked in**. No error is raised; the training is just worse.
#
# The remedy: the kernel reads the three numbers from the device's memory. The tape
# holds their address, and before each replay the host writes new numbers there. We
# change the text of the kernel:

# %%
READS = ADAM.replace("float rate, float root, float shrink,", "const float* rates,")
READS = READS.replace("  m[i] =", "  float rate = rates[0];\n  float root = rates[1];\n"
                                  "  float shrink = rates[2];\n  m[i] =")
print(READS)

# %%
rates = np.zeros(3, float32)                  # the numbers on the device
from_device = start_of_training()
tape = [(READS, "adam", (4,), (256,), (*from_device, rates, np.int32(1000)))]
for t in (1, 2, 3):
    rates[:] = optimizer.adam_rates(0.1, 0.9, 0.99, 0.01, t)
    replay(tape)
print(f"largest error of a weight: {abs(from_device[0] - right[0]).max():.0e}")

# %% [check]
if has_compiler:
    assert launched == ["squares", "norm_and_scale", "adam_tensors", "adam_tensors"]
    assert 0.05 < abs(by_value[0] - right[0]).max() < 0.1
    assert abs(from_device[0] - right[0]).max() < 1e-6

# %% [markdown]
# So this is what a captured step may not contain:
#
# - **a wait**: `float(loss)`, `x[x > 0]`. A tape has no host that could look at a
#   number;
# - **a copy from the host**, such as a list as an index or a new batch. The batch is
#   copied before the replay, always to the same place;
# - **a decision of Python** that depends on a number: the tape has one branch only;
# - **a number by value that changes**: the step count, a learning rate with a
#   schedule, the random key of dropout.
#
# The library's captured step refuses each of these with the error `CannotCapture`,
# which names the cause. The alternative would be a training that is silently wrong.
#
# ## What a step waits for
# We put the counts into the formula, and measure the same pass on this computer.

# %%
model, _ = ft.load("base-gpt")
laptop = min(timeit.repeat(forward_and_back, number=1, repeat=3))
values = sum(p.size for p in model.parameters())
table["AdamW, fused"] = [4, 8 * 4 * values / 1e6, 0, 0]      # 8 passes over all values
on_gpu = table["forward and back"][0] * LAUNCH

print(f"{'':20}launches    MB  waits  copies   µs of launches  µs of bytes")
for name, (launches, megabytes, waits, copies) in table.items():
    print(f"{name:20}{launches:8}{megabytes:6.0f}{waits:7}{copies:8}"
          f"{launches * LAUNCH * 1e6:17,.0f}{megabytes * 1e12 / BANDWIDTH:13.0f}")
print(f"\nforward and back on this computer, measured: {laptop * 1e3:.0f} ms; "
      f"on the GPU, by the formula: {on_gpu * 1e3:.1f} ms")

# %% [markdown]
# The two copies bring the batch to the device: what the model reads, and what it is
# asked for. Fused AdamW makes eight passes: it reads the gradients twice (once for the
# norm), and it reads and writes the values and both moments.

# %%
microseconds = {}
for name, row in table.items():
    label = name.replace(", ", "\n")
    microseconds |= {label: {"launches": row[0] * LAUNCH * 1e6,
                             "bytes": row[1] * 1e12 / BANDWIDTH}}
bars(microseconds, log="y", ylabel="µs, by the formula",
     caption="A model of a million parameters: the launches decide, not the bytes.")

# %% [markdown]
# Forward and back take 2,580 µs of launches, and 35 µs of bytes. The GPU is idle for
# more than 98 % of the time. That is the answer to the first question: a small model
# waits for its launches, 645 times 4 µs. So fuse kernels, lay tensors end to end,
# capture the step.
#
# The launches decide as long as the device needs less than 4 µs for the work of one,
# which is up to 19 million bytes. A model a thousand times larger has a few times as
# many launches, but each has far more to do: it waits for bytes and arithmetic. There
# only fusing helps, and numbers of fewer bits: the subject of lesson 24.
#
# These times are a model: 4 µs is an estimate, and the formula knows nothing of
# caches. The counts are exact.

# %% [check]
launches, megabytes, waits, copies = table["forward and back"]
assert launches == 645 and round(megabytes) == 168 and (waits, copies) == (0, 2)
assert megabytes * 1e12 / BANDWIDTH < 0.02 * launches * LAUNCH * 1e6
assert table["AdamW, fused"][1] < table["AdamW, one by one"][1] / 3

# %% [markdown]
# ## Appendix: one kernel, three ways
# Fused kernels are faster on the processor, too. There a call of NumPy is like a
# launch: it has a cost of its own, about half a microsecond, it reads whole arrays, and
# it writes a new one. So again we count passes and calls. Our example is layer norm, an
# op of lesson 01. We compute it in three ways, forward only and on one thread.
#
# The first way is its **definition**. The pullback `dx` is not called here:

# %%
quote(ft.ops.layer_norm)

# %% [markdown]
# The definition makes six arrays as large as $x$: four for `h` (two differences, a
# product and a quotient), then `w * h`, and the result. So five of them are temporary.
# The strict device counts the calls and the passes.

# %%
definition = ft.ops.layer_norm.definition
x = np.random.default_rng(0).standard_normal((2048, 256)).astype(float32)
w = np.ones(256, float32)
b = np.zeros(256, float32)

on_strict = [ft.array.to(a, "strict") for a in (x, w, b)]
counts.clear()
definition(*on_strict)
calls = counts["launch"]
passes = counts["bytes"] // x.nbytes
print(f"definition: {calls} calls of NumPy, {passes} passes, "
      f"{4 * passes} bytes for each entry of x")

# %% [markdown]
# To make one of the six arrays, NumPy reads one array of this size and writes one: that
# is $6 \cdot 2 = 12$ passes. Each of the two means reads one array: 14.
#
# The second way is **NumPy in blocks**, in `tinyft/kernels/numpy.py`. It takes 128 rows
# at a time. They have 128 kB, so they fit into the **cache**: a small, fast memory of
# each core of the processor. The temporary arrays are as small as the block, and they
# stay in the cache. From memory, only $x$ is read, and only $y$ is written there: 2
# passes, 8 bytes for each entry.
#
# The third way is **compiled loops**, in `tinyft/kernels/compiled/norms.py`: plain
# `for` loops over the numbers of one row, then of the next. A package named Numba
# translates them into machine code; it uses a compiler named LLVM. Again only $x$ is
# read from memory, and only $y$ is written.
#
# The loops of layer norm are an exercise. So here are those of RMS norm, which is a
# layer norm without the mean and without $b$. `ZERO` and `ONE` are 0 and 1 in float32.
# `float32[:]` is the type of an array of float32. The kernel computes the rows from
# `first` to `last` $- 1$.

# %%
COMPILED = Path(ft.kernels.__file__).parent / "compiled"

def show_code(file, start):
    "Print a file of the compiled kernels from `start` to the end of the function."
    text = (COMPILED / file).read_text(encoding="utf-8")
    begin = text.index(start)
    print(textwrap.dedent(text[begin:text.index("\n\n\n", begin)]) + "\n")

show_code("norms.py", "def variance_of")
show_code("norms.py", '    """y = w x / σ')

# %% [markdown]
# Numba is optional: `pip install "tinyft[fast]"` installs it. `compiled_kernels()` is a
# dictionary, from an op to its compiled kernel.

# %%
compiled = ft.kernels.compiled_kernels() if ft.kernels.has_numba() else {}
ways = {"definition": definition, "NumPy in blocks": numpy_kernels.layer_norm}
if compiled:
    ways["compiled loops"] = compiled[ft.ops.layer_norm]
else:
    print("Numba is not installed or does not run here: you see two of the three ways.")

# %% [markdown]
# The speed of a computer changes from moment to moment. So we call the ways in turn, in
# 41 rounds, and take the median of the rounds. `keep_memory` lets the process keep the
# memory of freed arrays; `fit` calls it, too. Without it, the system must find memory
# for every temporary array and fill it with zeros, and the definition takes even
# longer.

# %%
def one_round():
    "Seconds of each way, called one after the other."
    seconds = {}
    for name, layer_norm in ways.items():
        seconds[name] = timeit.timeit(lambda: layer_norm(x, w, b), number=1)
    return seconds

ft.kernels.keep_memory()
threads_before = ft.kernels.get_num_threads()
ft.kernels.set_num_threads(1)
with ft.no_grad():
    rounds = [one_round() for _ in range(41)]
ft.kernels.set_num_threads(threads_before)

# %% [markdown]
# **Predict first.** If only the bytes from and to memory counted, how many times as
# fast as the definition would the blocks be, and how many times the loops? Do you
# expect the same from the clock? If not, which of the two is faster, and why?

# %%
milliseconds = {}
gains = {}
for name in ways:
    milliseconds[name] = 1e3 * np.median([seconds[name] for seconds in rounds])
    ratios = [seconds["definition"] / seconds[name] for seconds in rounds]
    gains[name] = np.median(ratios)
    print(f"{name:17}{milliseconds[name]:7.2f} ms  {gains[name]:5.1f} times as fast")

# %%
PASSES = {"definition": passes, "NumPy in blocks": 2, "compiled loops": 2}
shown = {}
for name in ways:
    by_bytes = milliseconds["definition"] * PASSES[name] / passes
    shown[name] = {"measured": milliseconds[name], "by the bytes alone": by_bytes}
bars(shown, ylabel="ms, forward, on one thread",
     caption="2,048 rows of 256 numbers. The bytes alone do not explain the times.")

# %% [markdown]
# By the bytes, both would be $14 / 2 = 7$ times as fast. The clock does not agree: the
# loops gain much more than the blocks, though both move the same bytes. One reason is
# the size: arrays of 2 MB fit into the large cache that the cores of most processors
# share, so a pass of the definition costs less than one through memory. Two more
# counts, made by hand from the code, explain the rest.

# %%
COUNTS = {"definition": (14, 10), "NumPy in blocks": (10, 256),
          "compiled loops": (4, 1)}
print(f"{'':17}passes through memory   passes in all   calls     ms")
for name in ways:
    in_all, called = COUNTS[name]
    print(f"{name:17}{PASSES[name]:21}{in_all:16}{called:8}{milliseconds[name]:7.2f}")

# %% [markdown]
# - **Passes in all.** Six calls go through all numbers of a block. Each of them reads
#   the block from the cache, and four write to it: 10 passes. The cache is fast, but
#   not free. The loops read a row three times, for the mean, the variance and the
#   output, and they write it once: 4 passes. All values in between stay in registers.
#   And a row has 1 kB: it stays in the smallest and fastest part of the cache, for
#   which a block is too large.
# - **Calls.** There are 16 blocks, and 16 calls for each: 256. Only six of the 16 go
#   through all numbers of the block. The other ten compute with one number for each
#   row, and their time is little more than the cost of the call:

# %%
small = np.ones(128, float32)
call = min(timeit.repeat(lambda: small * small, number=1000, repeat=5)) / 1000
print(f"a call of NumPy on 128 numbers: {1e6 * call:.1f} µs; "
      f"256 such calls: {256e3 * call:.2f} ms")

# %% [check]
assert (passes, calls) == (14, 10) == COUNTS["definition"]
assert 16 * 128 == len(x) and COUNTS["NumPy in blocks"][1] == 16 * 16
in_blocks = numpy_kernels.layer_norm(x, w, b)[0]
assert np.allclose(in_blocks, definition(x, w, b)[0], atol=1e-5)
if compiled:
    in_loops = compiled[ft.ops.layer_norm](x, w, b)[0]
    assert np.allclose(in_loops, in_blocks, atol=1e-5)
    assert gains["compiled loops"] > 1.5

# %% [markdown]
# **Predict first.** What makes the loops fast: the loops, or the compiler?
# `layer_norm_rows` has the same loops in plain Python, without Numba. How long does it
# take for the 2,048 rows: as long as the definition, ten times as long, or more than a
# hundred times as long?

# %%
four_rows = min(timeit.repeat(lambda: layer_norm_rows(x[:4], w, b), number=1, repeat=3))
plain = 2048 / 4 * four_rows
print(f"the loops in plain Python: about {1e3 * plain:.0f} ms, "
      f"{1e3 * plain / milliseconds['definition']:.0f} times the definition")

# %% [check]
assert 1e3 * plain > 20 * milliseconds["definition"]

# %% [markdown]
# The compiler. Before each operation, Python finds out which types its two numbers
# have, and makes a new object for the result. NumPy finds out the types once for a
# whole array. Compiled code has fixed types: nothing is left to find out while it runs.
#
# ## What compiled loops need
# One instruction of a processor can add four to sixteen pairs of floats at once. Such a
# group of numbers is a **vector**. LLVM uses vectors where they do not change the
# result. So loops need some care. Here are three cases. Where Numba does not run, their
# cells do nothing.
#
# **The order of a sum.** This sum is compiled twice. The second time, `reassoc` allows
# LLVM to add in any order.

# %%
def add_up(x):
    total = float32(0)
    for j in range(len(x)):
        total += x[j]
    return total

def microseconds_of(f, *arguments):
    "The shortest of nine calls; a call before them compiles f."
    f(*arguments)
    return 1e6 * min(timeit.repeat(lambda: f(*arguments), number=1, repeat=9))

# %% [markdown]
# **Predict first.** Which of the two is faster? Are the two results equal? If not,
# which is nearer to the exact sum?

# %%
many = np.random.default_rng(1).random(2**18, dtype=float32)
exact = many.sum(dtype=np.float64)
errors = {}
if compiled:
    import numba

    for name, allowed in {"in order": set(), "in any order": {"reassoc"}}.items():
        sum_of = numba.njit(add_up, fastmath=allowed)
        errors[name] = abs(sum_of(many) - exact)
        print(f"{name:13}{microseconds_of(sum_of, many):7.0f} µs, "
              f"error {errors[name]:7.4f} of {exact:.0f}")

# %% [markdown]
# In order, each addition waits for the one before it. In any order, LLVM keeps many
# sums, the entries of vectors, and adds them up at the end. Each of these sums has
# fewer terms and stays smaller, so it loses less by rounding: here the fast sum is also
# the better one. But its last digits now depend on the processor. In the library, the
# decorator `compiled_sum` allows a kernel to add in any order; kernels without such
# sums have the decorator `compiled`.

# %% [check]
assert not compiled or errors["in any order"] < errors["in order"]

# %% [markdown]
# **A call in a loop.** The function `exp` of C takes one number, so a loop that calls
# it uses no vectors. The library's compiled kernels have an `exp` of their own. It is
# written out as products, sums and a shift of bits, and LLVM makes vectors of it:

# %%
show_code("shared.py", "    y = min(max(x, LOW), HIGH)")

# %% [markdown]
# `exp_called` calls the function of C, `exp_written_out` has the library's in its loop.

# %%
if compiled:
    exp_of_library = importlib.import_module("tinyft.kernels.compiled.shared").exp

def exp_called(x, y):
    for j in range(len(x)):
        y[j] = math.exp(x[j])

def exp_written_out(x, y):
    for j in range(len(x)):
        y[j] = exp_of_library(x[j])

if compiled:
    out = np.empty_like(many)
    for f in (exp_called, exp_written_out):
        print(f"{f.__name__:17}{microseconds_of(numba.njit(f), many, out):7.0f} µs")

# %% [markdown]
# **The lock.** Python's interpreter has a lock: only the thread that holds it runs. A
# compiled function does not need the interpreter, but it holds the lock all the same.
# With `nogil=True` it releases the lock while it runs, and other threads can run, too.
#
# Here a second thread computes `exp_called` for 8 million numbers, and this thread runs
# a loop in Python. What is the longest time for which the loop stands still?

# %%
def longest_pause(f, x, y):
    "Milliseconds for which a Python loop stands still while another thread runs f."
    other = threading.Thread(target=f, args=(x, y))
    longest = 0
    before = time.perf_counter()
    other.start()
    running = True
    while running:
        running = other.is_alive()
        now = time.perf_counter()
        longest = max(longest, now - before)
        before = now
    return 1e3 * longest

# %%
long = np.tile(many, 32)
pauses = {}
for nogil in (False, True):
    if compiled:
        f = numba.njit(exp_called, nogil=nogil)
        f(many, out)                                   # compiles it
        pauses[nogil] = longest_pause(f, long, np.empty_like(long))
        print(f"nogil={nogil!s:6}a pause of {pauses[nogil]:.1f} ms")

# %% [check]
assert not compiled or pauses[False] > pauses[True]

# %% [markdown]
# With the lock, the loop stands still until the function returns. Without it, both
# threads run: on two cores at once, and on one core in turns of a few milliseconds. All
# compiled kernels of the library release the lock, and NumPy does so for most
# operations on large arrays. So the library can share the rows of a kernel, and of a
# matrix product, among its threads (`tinyft/kernels/threads.py`).
#
# The processor and the GPU reward the same things: fewer passes, fewer calls, and
# values that stay in registers.

# %% [markdown]
# **Exercises.** `tinyft start gpu` writes all six. `add_bias` and `sum_rows` are
# kernels in CUDA C, which the check runs on your processor, upwards and downwards.
# `adam_rates` is the three numbers that must not be baked in. `lay_out` lays tensors
# end to end. `layer_norm_rows` and `layer_norm_rows_backward` are layer norm in plain
# loops, forward and back. You write and check them without Numba. If you have it, try
# `numba.njit(layer_norm_rows)`: it compiles your loops as they are.
