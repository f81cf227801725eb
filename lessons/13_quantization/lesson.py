# %% [markdown]
# # 13 Quantization
#
# **Reading:** 50 minutes. **You need:** lessons 02 to 04, and how bits make a number.
# **Exercises:** affine_scale, affine_zero, encode, fit_groups, code_bits, pack, unpack,
# window_batches (about two hours).
#
# A weight of a model is a float32: 32 bits, 4 bytes. A model with 7 billion weights
# takes 28 GB. Quantization stores each weight as a *code* of few bits, such as 4, and
# the same model takes about 4 GB. The codes stand for fewer values than 32 bits
# could name, so almost every weight changes a little.
#
# This lesson builds the whole path: a weight becomes a code, codes become bytes, and a
# model computes from these bytes. Then we measure what it costs: how much worse does
# the model predict text with 8, 4, 3, 2 or 1 bits for a weight?

# %%
import time

import numpy as np

import tinyft as ft
from tinyft.compress.grids import Grid, code_bits, fit_grid, fit_groups
from tinyft.compress.packing import pack, packed_length, unpack
from tinyft.learn.draw import figure, heat_map, histograms, number_lines
from tinyft.learn.lessons import quote, show
from tinyft.nn import Packed

# %% [markdown]
# ## The few values that b bits can name
# With $b$ bits we can write the numbers $0$ to $2^b - 1$. With 2 bits these are 0, 1, 2
# and 3. Such a number is a **code**. Four codes can stand for four values. So we
# must choose four values for all our weights. Here are six weights.

# %%
w = np.array([-0.9, -0.35, 0.1, 0.4, 1.2, 2.1])

# %% [markdown]
# The simplest choice is a **uniform grid**: the values have equal distances. The
# distance is the **scale** $s$. The range from the smallest weight, $lo$, to the
# largest, $hi$, has $2^b$ values and between them $2^b - 1$ steps:
#
# $s = (hi - lo) / (2^b - 1)$
#
# We also need to know where the grid lies. The **zero point** $z$ is the code of the
# value 0. It is a code, so it is a whole number: from $lo$ up to 0 there are
# $-lo/s$ steps, and we round this number.

# %%
bits = 2
s = (w.max() - w.min()) / (2**bits - 1)
z = np.round(-w.min() / s)
print(f"scale {s:.2f}, zero point {z:.0f}")

# %% [markdown]
# Now every code $q$ stands for the value $s (q - z)$. A weight gets the code of the
# nearest value. That is called *round to nearest*.
#
# $q = clip(round(w/s) + z, 0, 2^b - 1)$
#
# `clip` takes care of the ends: a weight below the first value gets the code 0, one
# above the last value gets the last code.

# %%
codes = np.clip(np.round(w / s) + z, 0, 2**bits - 1)
values = s * (codes - z)
for weight, code, value in zip(w, codes, values):
    print(f"{weight:6.2f}  ->  code {code:.0f}  ->  {value:5.2f}")

# %%
four_values = s * (np.arange(4) - z)
number_lines({"six weights, and the four values of 2 bits": (w, four_values)},
             height=1.5,
             caption="The dots are the weights. Each takes the nearest of four values. "
                     "Only the codes are stored, and s and z once for all of them.")

# %% [markdown]
# This is called an **affine** grid. The library keeps a grid as three things: the
# scales, the zero points, and the largest code, `top`. `Grid.encode` gives codes, and
# you will write it in an exercise. `Grid.decode` gives the values:

# %%
quote(Grid.decode)

# %% [markdown]
# ## A range without zero
# Now four weights that are all positive. Take the formulas as they are.

# %%
positive = np.array([3.0, 4.0, 5.2, 6.0])
own_s = (positive.max() - positive.min()) / 3
own_z = np.round(-positive.min() / own_s)
print(f"scale {own_s:.2f}, zero point {own_z:.0f}")

# %% [markdown]
# The zero point is −3. But it is a code, and no code is negative. If we take the
# nearest code, 0, in its place, the grid is 0, 1, 2, 3: all four weights get the
# value 3.
#
# The cure: **0 belongs to the range**, also when no weight is near it.
#
# $lo = min(0, min(w))$ and $hi = max(0, max(w))$
#
# Then $lo \leq 0 \leq hi$, and $-lo/s$ lies between 0 and $2^b - 1$. So $z$ is always a
# code. Also, the value 0 is exact: a weight that was 0 stays 0.

# %%
grid = fit_grid(positive, "affine", bits=2)
number_lines(
    {"the range from 3 to 6, z = 0 instead of −3": (positive, own_s * np.arange(4)),
     "the range reaches down to 0": (positive, grid.decode(np.arange(4)))},
    caption="Above, all weights have the same value. Below, the steps are larger, but "
            "the weights stay apart.")

# %% [check]
assert list(codes) == [0, 1, 1, 1, 2, 3] and s == 1 and z == 1
assert own_z == -3
assert len(set(np.clip(np.round(positive / own_s), 0, 3))) == 1
assert np.abs(grid.round(positive) - positive).max() <= grid.scale / 2
for one_sided in (positive, -positive):
    assert 0 <= fit_grid(one_sided, "affine", 2).zero <= 3

# %% [markdown]
# **Exercises:** `affine_scale`, `affine_zero`, and then `encode`.
#
# ## How large is the error?
# A weight between two neighbouring values is at most half a step away from the nearer
# one. So the error is at most $s/2$. Because $z$ is rounded, the whole grid may lie up
# to half a step beside the range. One can show that the bound holds even so. We try
# it on a weight matrix of the small GPT of lesson 04. One grid serves one row.

# %%
model, tokenizer = ft.load("base-gpt-small")
W = model.state_dict()["blocks.1.mlp.down.weight"]
print("shape (out, in):", W.shape)
worst = {}
for bits in (8, 4, 3, 2):
    grid = fit_grid(W, "affine", bits)
    error = np.abs(grid.round(W) - W)
    worst[bits] = (error / grid.scale).max()
    share = np.linalg.norm(error) / np.linalg.norm(W)
    print(f"{bits} bits: at most {worst[bits]:.3f} s,  error {100 * share:5.1f} % of W")

# %% [check]
assert max(worst.values()) <= 0.5 + 1e-4

# %% [markdown]
# One bit less makes $s$ about twice as large, so the error doubles. From 8 to 4
# bits the bound $s/2$ grows by a factor of $255/15 = 17$.
#
# ## One outlier spoils its whole group
# The weights that share one scale are a **group**. So far a group was a row of 256
# weights. We make one of them ten times as large as the largest.
#
# **Predict first.** The row has 256 weights, and one of them changes. What happens to
# the error of the 255 others, with 4 bits?

# %%
row = W[:1].copy()
spoiled = row.copy()
spoiled[0, 100] = 10 * np.abs(row).max()
others = np.arange(row.size) != 100

def error_of_others(row):
    error = fit_grid(row, "affine", 4).round(row) - row
    return np.sqrt(np.mean(error[0, others]**2))

before = error_of_others(row)
after = error_of_others(spoiled)
print(f"before {before:.4f}   after {after:.4f}   factor {after / before:.1f}")

# %%
sixteen = np.arange(16)
histograms(
    {"a row": (row, fit_grid(row, "affine", 4).decode(sixteen)),
     "with one outlier": (spoiled, fit_grid(spoiled, "affine", 4).decode(sixteen))},
    region=(-0.35, 0.35), xlabel="weight",
    caption="The lines are values of the 4-bit grid. On the right the grid must reach "
            "the outlier, far outside of the picture, and the other weights share "
            "three values.")

# %% [markdown]
# With $a$ for the largest absolute value, the range was about $-a$ to $a$. Now it is
# $-a$ to $10a$, so each step is about 5 times as large. The 255 other weights did not
# change, and still they pay.
#
# The cure is smaller groups: 64 or 32 neighbours in a row share a scale, not the whole
# row. Then an outlier spoils the 63 weights beside it and no others.

# %%
def error_in_groups(W, group, bits=4):
    parts = W.reshape(len(W), -1, group)                 # (out, groups, g)
    error = fit_grid(parts, "affine", bits).round(parts) - parts
    return np.sqrt(np.mean(error**2))

for group in (256, 64, 32, 16):
    print(f"groups of {group:3}: row {error_in_groups(row, group):.4f}   "
          f"with the outlier {error_in_groups(spoiled, group):.4f}")

# %% [check]
assert 3 < after / before < 8
by_group = [error_in_groups(spoiled, group) for group in (256, 64, 32, 16)]
assert by_group == sorted(by_group, reverse=True)
assert by_group[1] < 0.7 * by_group[0]

# %% [markdown]
# Groups run along the rows of `W`, not along its columns. A product adds up along a
# row, so inside a group the scale is a common factor: sum first, multiply once.
# `fit_groups` gives the grids of all groups, also if the last one of a row is shorter.

# %%
grids = fit_groups(W, "affine", bits=4, group=64)
print("scales (out, groups):", grids.scale.shape)

# %% [markdown]
# ## What the scales cost
# Each group stores its scale as a float16 of 16 bits, and its zero point as one more
# code of $b$ bits. So a weight takes
#
# $b + (16 + b)/g$
#
# bits on average. With small groups "4 bits" are more than 4 bits. A fair comparison
# counts all of them.

# %%
for group in (256, 64, 32, 16):
    average = code_bits("affine", 4, group)
    print(f"4 bits, groups of {group:3}: {average:.2f} bits a weight")

# %% [markdown]
# **Exercises:** `fit_groups` and `code_bits`.
#
# ## Other grids
# The affine grid follows both ends of the range. Others need no zero point for each
# group:
#
# - **symmetric**: the range is $-a$ to $a$, where $a$ is the largest absolute value.
#   $z$ is always $2^{b-1}$. So one value more lies below 0 than above.
# - **absmax**: $-a$, 0 and $a$ are values. One of the $2^b$ codes is not used.
# - **ternary**: only $-s$, 0 and $s$, and $s$ is the *mean* of the absolute values.
# - **sign**: 1 bit, $-m$ or $m$, and $m$ is again this mean.

# %%
kinds = [("affine", 2), ("symmetric", 2), ("absmax", 2), ("ternary", 2), ("sign", 1)]
for kind, bits in kinds:
    grid = fit_grid(w, kind, bits)
    levels = grid.decode(np.arange(grid.top + 1))
    print(f"{kind:9} bits={bits}  values", levels.round(2))

# %% [markdown]
# Why the mean in the last one? With two values $-m$ and $m$ the squared error is
# $\sum (|w| - m)^2$. It is smallest where $m$ is the mean of all $|w|$.
#
# **Predict first.** An affine grid of 1 bit has two values, and 0 is one of them. Which
# weights can it tell apart? Is its error on `W` larger or smaller than that of the sign
# grid?

# %%
one_bit = {}
for kind in ("affine", "sign"):
    error = fit_grid(W, kind, 1).round(W) - W
    one_bit[kind] = np.linalg.norm(error) / np.linalg.norm(W)
    print(f"{kind:6}: error {100 * one_bit[kind]:4.0f} % of W")

# %% [check]
assert one_bit["sign"] < 0.9 * one_bit["affine"]
means = np.abs(W).mean(axis=1, keepdims=True)
assert np.allclose(np.abs(fit_grid(W, "sign", 1).round(W)), means)

# %% [markdown]
# The affine grid of 1 bit holds 0 and a value as far away as the whole range. The
# error is about as large as the weights. The sign grid uses its bit for the sign, and
# the scale for the typical size. **No grid is the best one at every number of bits.**
#
# ## Codes in bytes
# A computer stores bytes of 8 bits. NumPy has no array of 4-bit numbers: an array of
# codes takes one byte for each. So we must pack them ourselves. At 4 bits a byte
# holds two codes, the first one in its low half.

# %%
codes = np.array([1, 2, 3, 4], np.uint8)
for byte in pack(codes, 4):
    print(f"{byte:08b}")

# %% [markdown]
# Read a byte from the right: its *least significant bit* comes first. `0001` is the
# code 1, left of it stands `0010`, the code 2.
#
# Three bits do not divide eight. But it is simple if we think of one long stream of
# bits: code $k$ occupies the bits $3k$, $3k + 1$ and $3k + 2$, and bit $i$ lies in byte
# $i // 8$. Some codes begin in one byte and end in the next.

# %%
codes = np.array([5, 3, 7, 1, 6, 2, 4, 0], np.uint8)
stream = pack(codes, 3)
bit_row = np.unpackbits(stream, bitorder="little")       # the 24 bits in their order
which_code = np.arange(24) // 3
which_byte = np.arange(24) // 8
print("bytes:", stream)

# %%
stripes = np.stack([1 - 2 * (which_code % 2), 1 - 2 * (which_byte % 2)])
heat_map(stripes, texts=np.stack([bit_row, bit_row]).astype(str),
         rows=["codes", "bytes"], columns=[str(i % 8) for i in range(24)],
         xlabel="bit of the byte", height=1.6,
         caption="The same 24 bits twice, the least bit of a code first: 1 1 0 is 3. "
                 "Above the colour changes with every code, below with every byte. "
                 "Codes 2 and 5, counted from 0, lie in two bytes.")

# %% [markdown]
# **Predict first.** How many bytes do 1,000 codes of 3 bits take? And how many, if no
# code may lie in two bytes?

# %%
print("one stream:    ", packed_length(1000, 3), "bytes")
print("2 in each byte:", 1000 // 2, "bytes")

# %% [check]
assert packed_length(1000, 3) == 375
assert list(pack(np.array([1, 2, 3, 4], np.uint8), 4)) == [0x21, 0x43]
assert np.array_equal(unpack(stream, 3, 8), codes)
for bits in range(1, 9):
    q = np.arange(100) % 2**bits
    assert np.array_equal(unpack(pack(q, bits), bits, 100), q)
    assert len(pack(q, bits)) == packed_length(100, bits)

# %% [markdown]
# Order and place are agreements. Other libraries put the first code into the high
# half, or the halves of a block side by side. A file of packed codes means nothing
# without the rule.
#
# **Exercises:** `pack` and `unpack`.
#
# ## A model with packed weights
# `compress` takes a rule and puts a packed weight in the place of the weight of every
# linear map in the blocks. `RTN` is round to nearest: each weight by itself, no data
# needed. It reports on each weight.

# %%
reports = ft.compress(model, ft.RTN(bits=4, group=64))
for report in reports[:3]:
    print(f"{report.path:16} {report.before:,} -> {report.after:,} bytes")
dense_bytes = sum(report.before for report in reports)
packed_bytes = sum(report.after for report in reports)
print(f"all: {dense_bytes:,} -> {packed_bytes:,} bytes, "
      f"{dense_bytes / packed_bytes:.1f} times smaller")

# %% [markdown]
# Why 7.3 and not 8 times smaller? Because of the scales and zero points: 32 bits become
# 4.35, not 4. The formula above says 4.31. The rest comes from whole bytes: a row of 64
# inputs has one group, and the 4 bits of its zero point take a byte.
#
# (The embedding stays dense here. In this small model it is more than half of all
# weights. In a model with 7 billion weights it is about 2 %.)
#
# What stands in the place of the weight matrix?

# %%
packed = model.blocks[0].mlp.down.weight
print(type(packed).__name__, packed.extra_repr())
print("codes ", packed.codes.shape, packed.codes.dtype)
print("scales", packed.scale.shape)

# %% [markdown]
# The codes are a stream along the inputs, for each of the 64 outputs: 256 codes of 4
# bits in 128 bytes. A product must have numbers, so the codes are decoded *during* the
# product: some rows, their product, the next rows.

# %%
quote(Packed.product)

# %% [markdown]
# So the dense weight is never there as a whole. We measure that on a larger matrix: 4
# million weights, 17 MB as float32.

# %%
rng = np.random.default_rng(0)
large = rng.standard_normal((2048, 2048), dtype=np.float32)
large_packed = ft.RTN(bits=4, group=64)(large)
x = ft.Tensor(rng.standard_normal((1, 2048), dtype=np.float32))
with ft.peak_memory() as memory, ft.no_grad():
    y = large_packed.matmul(x)
print(f"dense weight:          {large.nbytes / 1e6:4.1f} MB")
print(f"packed weight:         {large_packed.nbytes / 1e6:4.1f} MB")
print(f"memory of the product: {memory['bytes'] / 1e6:4.1f} MB")

# %% [check]
expected = x.numpy() @ large_packed.dequantize().T
assert np.allclose(y.numpy(), expected, rtol=1e-3, atol=1e-3)
assert memory["bytes"] < 0.3 * large.nbytes
assert large_packed.nbytes < large.nbytes / 7
average = 8 * packed_bytes / (dense_bytes / 4)
assert abs(average - 4.35) < 0.05

# %% [markdown]
# ## Is it faster?
# A common hope is: 4 bits in place of 32, so the model is faster.
#
# **Predict first.** The packed small GPT reads a seventh of the bytes. How long does
# its forward pass take, compared with the dense model? (Here the products are NumPy's.)

# %%
dense_model, _ = ft.load("base-gpt-small")
prose = ft.data.pretraining("prose", "test")
ids = prose[:512].reshape(8, 64)

def seconds(measured):
    begin = time.thread_time()
    with ft.no_grad():
        measured(ids)
    return time.thread_time() - begin

ratios = [seconds(model) / seconds(dense_model) for _ in range(15)]
print(f"packed: {np.median(ratios):.2f} x the time of dense")

# %% [markdown]
# Not faster. Every product still has the same multiplications and additions, and
# decoding comes on top. Quantization by itself saves *memory*. It saves time only
# where the time goes into reading the weights: one text, one token at a time, on a
# device that computes faster than it reads. And it needs kernels that decode while
# they multiply. The slides of a lecture (*Reduced Complexity Models and
# Pretraining*) say it well: "Quantization only improves the memory requirements of the
# model." Their 3.2 to 4.5 times faster inference comes from special kernels, which
# read fewer bytes. They do not save operations.
#
# ## Perplexity, carefully
# The error of the weights is not what we want to know. We want to know how well the
# model predicts. `corpus_perplexity` cuts a text into windows, and adds the losses of
# all predicted tokens before it takes the exponential. The mean of the perplexities
# of the windows would be another number, and a larger one (lesson 04).

# %%
dense = ft.corpus_perplexity(dense_model, prose[:4096], length=64)
print(dense)
overlapping = ft.corpus_perplexity(dense_model, prose[:4096], length=64, stride=16)
print(overlapping)

# %% [markdown]
# The same model and the same text have two perplexities. In the first line the windows
# do not overlap, so the first tokens of each window are predicted from almost nothing.
# In the second a window begins every 16 tokens and only its last 16 tokens count: each
# is predicted from at least 48 others. It takes 4 times as long. **A perplexity means
# little without its protocol.** We use the first one for all models of this lesson.
#
# **Exercise:** `window_batches`, which makes these windows.
#
# ## Perplexity against bits
# The text is held out: prose that no model was trained on.

# %%
def quantized(bits, group, grid="affine"):
    """(bits a weight, with all that is stored; bytes; perplexity)"""
    model, _ = ft.load("base-gpt-small")
    reports = ft.compress(model, ft.RTN(bits=bits, group=group, grid=grid))
    size = sum(report.after for report in reports)
    found = ft.corpus_perplexity(model, prose[:4096], length=64)
    return 8 * size / (dense_bytes / 4), size, found.perplexity

# %% [markdown]
# **Predict first.** The dense model has a perplexity of 55. What do you expect with 8
# bits, 4 bits, 3 bits and 2 bits, with a scale for each group of 64?

# %%
table = {}
for bits in (8, 4, 3, 2):
    table[bits, 64] = quantized(bits, 64)
    print(f"{bits} bits: perplexity {table[bits, 64][2]:6.1f}")

# %% [markdown]
# 8 bits cost nothing that we can see, 4 bits about 4 %. 3 bits cost a fifth. With 2
# bits the perplexity is three times as high. Now we also change the groups: a whole
# row (64 or 256 weights), 32 and 16.

# %%
for group in (None, 32, 16):
    for bits in (4, 3, 2):
        table[bits, group] = quantized(bits, group)
lines = {}
for group, name in ((None, "row"), (64, "64"), (32, "32"), (16, "16")):
    chosen = [table[bits, group] for bits in (2, 3, 4)]
    lines[name] = ([size for size, _, _ in chosen], [found for _, _, found in chosen])

# %%
_, axes = figure(height=3.0)
for name, (sizes, perplexities) in lines.items():
    axes.plot(sizes, perplexities, "o-", label=f"groups: {name}")
axes.axhline(dense.perplexity, color="gray", linestyle="--", label="float32")
axes.set(yscale="log", xlabel="bits a weight, with scales and zero points",
         ylabel="perplexity")
axes.set_yticks([60, 80, 100, 150, 200], ["60", "80", "100", "150", "200"])
axes.legend()
show("Every line has 2, 3 and 4 bits. Smaller groups move a point to the right, and "
     "mostly down.")

# %% [check]
eight, four, three, two = (table[bits, 64][2] for bits in (8, 4, 3, 2))
assert abs(eight / dense.perplexity - 1) < 0.01
assert four < 1.08 * dense.perplexity
assert 1.1 < three / dense.perplexity < 1.4
assert two > 2.5 * dense.perplexity
assert table[2, 16][2] < 0.65 * table[2, None][2]
assert table[3, 16][2] > table[4, None][2] and table[3, 16][0] < table[4, None][0]
assert table[2, 16][2] > table[3, None][2] and table[2, 16][0] < table[3, None][0]
assert overlapping.perplexity < dense.perplexity
assert np.median(ratios) > 0.9

# %% [markdown]
# Smaller groups help most where the bits are few. At 2 bits, groups of 16 halve the
# perplexity. But they need 3.1 bits for a weight, and at 3.3 bits we could have 3-bit
# codes with one scale a row: perplexity 68 in place of 104. **A bit in the code is
# worth more than a bit in the scales**, until the codes are good enough. At 4 bits
# groups of 32 are not even better than groups of 64: the weights have a smaller error,
# and the perplexity is the same or a little higher. The error of the weights is not
# what we want to know.
#
# Two things that one reads:
#
# - A course page (*Fine-tuning and model compression*) describes quantization as going
#   from 32- or 16-bit floating-point numbers "to 8-bit integers", and "in some cases"
#   4, 2 or 1 bit. Here 4 bits are no special case: 7 times smaller, 4 % worse.
# - The lecture says that methods which round to nearest "only work well down to 8bit /
#   weight". Here they work at 4 bits, even with one scale a row (57.9). They break
#   at 3 and 2 bits.
#   On LLaMA-7B the authors of GPTQ report the same: perplexity 5.68 in 16 bits,
#   6.29 with 4 bits, 25.5 with 3.
#
# ## One bit and three values
# At 2 bits and below the choice of the grid matters most.

# %%
for grid, bits in (("affine", 2), ("symmetric", 2), ("ternary", 2), ("absmax", 2),
                   ("sign", 1), ("affine", 1)):
    table[bits, 32, grid] = quantized(bits, 32, grid)
    print(f"{grid:10}{bits} bits: perplexity {table[bits, 32, grid][2]:7.0f}")

# %% [check]
assert table[1, 32, "sign"][2] < table[2, 32, "absmax"][2]
assert table[1, 32, "affine"][2] > 2048
assert table[2, 32, "affine"][2] < table[2, 32, "symmetric"][2]

# %% [markdown]
# The vocabulary has 2,048 tokens. A model that knows nothing gives each the same
# probability and has a perplexity of 2,048. The affine grid of 1 bit is worse than
# that: it is confidently wrong. The sign grid keeps the signs, and some of what the
# model has learnt is still there. Also, 1 bit with the right grid is better than 2 bits
# with the wrong one: absmax with 2 bits has the values $-a$, 0 and $a$, and most
# weights become 0.
#
# (Models that are *trained* with ternary weights can be good. We only round a finished
# model.)
#
# ## Where rounding stops
# Rounding treats each weight alone. But a layer adds products up, and there errors can
# cancel. Two inputs that are always equal, two weights of 0.4, and a grid of whole
# numbers:

# %%
x = np.array([1.0, 1.0])
weights = np.array([0.4, 0.4])
print("exact output:    ", x @ weights)
print("each one rounded:", x @ np.round(weights))
print("one rounded up:  ", x @ np.array([1.0, 0.0]))

# %% [check]
assert abs(x @ np.round(weights) - 0.8) > abs(x @ np.array([1.0, 0.0]) - 0.8)

# %% [markdown]
# 0.4 is nearer to 0 than to 1. But with one weight rounded up the *output* is nearer:
# 1 in place of 0, where 0.8 is right. The second weight makes up for the error of the
# first. To do that for a whole layer, one has to know which inputs occur together: one
# needs data. That is GPTQ, the next lesson: as many bits, better codes.
#
# ## The whole lesson in one table
# All twelve matrices of the small GPT. The bytes hold codes, scales and zero points.

# %%
print(f"{'':24}{'bits':>6}{'bytes':>9}{'perplexity':>12}")
print(f"{'float32':24}{32:6.2f}{dense_bytes:9,}{dense.perplexity:12.1f}")
rows = [(8, 64), (4, None), (4, 64), (4, 32), (3, None), (3, 64), (3, 16), (2, None),
        (2, 16), (2, 32, "ternary"), (1, 32, "sign")]
for bits, group, *grid in rows:
    average, size, perplexity = table[(bits, group, *grid)]
    kind = grid[0] if grid else "affine"
    name = f"{kind}, {bits} bits, {group or 'row'}"
    print(f"{name:24}{average:6.2f}{size:9,}{perplexity:12.1f}")

# %% [markdown]
# A weight becomes the nearest value of a grid, and the error is at most half a step.
# Small groups keep outliers local, and their scales cost bits. Codes lie in one
# stream of bits. The model computes from the codes. It needs less memory, not less
# work. Rounding to nearest is nearly free at 8 bits, good at 4, poor at 3 and useless
# at 2.
#
# **Exercises.** `tinyft start quantization` writes eight files:
#
# - `affine_scale` and `affine_zero`: where a grid lies
# - `encode`: the code of a weight
# - `fit_groups`: a scale for each group
# - `code_bits`: what a weight takes
# - `pack` and `unpack`: codes in a stream of bytes
# - `window_batches`: the windows of a text
