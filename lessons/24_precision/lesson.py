# %% [markdown]
# # 24 Sixteen bits
#
# **Reading:** 50 minutes. **You need:** lessons 01 to 03.
# **Exercises:** cast_inputs, reclaim_values, update (about 45 minutes).
#
# A parameter in float32 takes 32 bits, which are four bytes. A model of seven billion
# parameters then takes 28 GB. With 16 bits for each parameter it takes 14 GB. In speed
# a GPU gains even more. By its data sheet NVIDIA's H100 does 67 trillion operations a
# second in float32, and about 990 trillion in products of 16-bit matrices.
#
# So why do we not compute everything in 16 bits? This lesson shows what is lost with
# half of the bits. And it shows three remedies, with which training works all the same:
# sums in float32, master weights, and a scale for the loss.

# %%
import time

import numpy as np

import tinyft as ft
from tinyft.array import bfloat16
from tinyft.learn.draw import curves, diagram, figure, heat_map
from tinyft.learn.lessons import quote, show

float32 = np.dtype("float32")
float16 = np.dtype("float16")
DTYPES = {"float32": float32, "bfloat16": bfloat16, "float16": float16}

# %% [markdown]
# There are two kinds of 16-bit numbers. NumPy has `float16`. The other kind,
# `bfloat16`, comes from the small package `ml_dtypes`. With it a NumPy array can hold
# bfloat16 too.
#
# ## How a number is stored
# You know the scientific notation: $6500 = 6.5 \cdot 10^3$. A computer does the same in
# base 2: $6.5 = +1.625 \cdot 2^2$. Nearly every number is written as
#
# $$x = \pm\,(1 + f) \cdot 2^e$$
#
# and three things are stored:
#
# - the **sign**, one bit;
# - the **exponent** $e$, a whole number. The bits hold $e$ plus an offset, so that
#   negative exponents need no sign: $e + 127$ with eight bits, $e + 15$ with five;
# - the **fraction** $f$, at least 0 and less than 1. Its first bit counts 1/2, the next
#   1/4, then 1/8.
#
# The formats differ in how many bits they give to the exponent. We look at the bits.
# (`view` reads the bits of a stored number as a whole number.)

# %%
EXPONENT_BITS = {"float32": 8, "bfloat16": 8, "float16": 5}

def split_bits(number, name):
    "The bits of a number in this format, as three texts: sign, exponent, fraction."
    stored = np.array(number, DTYPES[name])
    size = 8 * stored.itemsize                    # 32 or 16 bits
    whole_number = int(stored.view(f"uint{size}"))
    bits = format(whole_number, f"0{size}b")
    end = 1 + EXPONENT_BITS[name]
    return bits[0], bits[1:end], bits[end:]

for name in DTYPES:
    print(f"{name:9}", *split_bits(6.5, name))

# %% [check]
assert split_bits(6.5, "float16") == ("0", "10001", "1010000000")
assert split_bits(6.5, "bfloat16") == ("0", "10000001", "1010000")

# %% [markdown]
# Read the first row. The sign 0 means plus. The exponent `10000001` is 129, and
# $129 - 127 = 2$. The fraction begins with `101`, which is 1/2 + 1/8 = 0.625. So the
# number is $1.625 \cdot 2^2 = 6.5$. In float16 the exponent is $17 - 15 = 2$, the same.
#
# The number 6.5 fits into all three formats. The number 0.1 fits into none: in base 2
# its fraction never ends. Each format keeps as many bits of it as it has room for.

# %%
colours = np.full((3, 32), np.nan)                # NaN: no cell
texts = np.full((3, 32), "")
for row, name in enumerate(DTYPES):
    sign, exponent, fraction = split_bits(0.1, name)
    bits = sign + exponent + fraction
    texts[row, :len(bits)] = list(bits)
    colours[row, :len(bits)] = 0.15               # the fraction
    colours[row, :1 + len(exponent)] = 1          # the exponent
    colours[row, 0] = -1                          # the sign
    print(f"{name:9} stores {float(np.array(0.1, DTYPES[name])):.9f}")
labels = ["sign"] + [""] * 31
labels[4] = "exponent"
labels[20] = "fraction"
heat_map(colours, rows=list(DTYPES), columns=labels, texts=texts, height=1.4,
         caption="The bits of 0.1. Red: sign. Blue: exponent. Grey: fraction.")

# %% [check]
for name, stored in {"float32": 0.100000001, "bfloat16": 0.100097656,
                     "float16": 0.099975586}.items():
    assert round(float(np.array(0.1, DTYPES[name])), 9) == stored
assert split_bits(0.1, "float32")[1] == split_bits(0.1, "bfloat16")[1]

# %% [markdown]
# The picture says what each format was made for.
#
# - **bfloat16** is the first half of float32, rounded. It has the same eight bits of
#   exponent, so it reaches equally far. It has only seven bits of fraction: two to
#   three digits.
# - **float16** has ten bits of fraction, so it stores 0.1 more exactly. But five bits
#   of exponent do not reach far. We shall see soon how near its ends are.
#
# ## The gaps between numbers
# A format holds only so many numbers, and there are gaps between them. We can measure
# the gaps. Read the bits of a positive number as a whole number, and add 1: those are
# the bits of the next larger number. After the fraction `1010000` comes `1010001`.
# After `1111111` the fraction is 0 again, and the exponent is one larger.

# %%
def neighbour(number, name, steps=1):
    "The number that comes `steps` later in this format."
    stored = np.array([number], DTYPES[name])
    whole_number = stored.view(f"uint{8 * stored.itemsize}")
    moved = (whole_number.astype(int) + steps).astype(whole_number.dtype)
    return float(moved.view(stored.dtype)[0])

print("after 1, in float32:", neighbour(1, "float32"))

# %% [markdown]
# From 256 up to 512 the exponent is 8: the numbers are $256 \cdot (1 + f)$. With seven
# bits, as in bfloat16, $f$ has 128 values. So the gap between two numbers is 2, which
# is 256/128. With the ten bits of float16 it is 256/1024, or 1/4. We print the number
# after 256, and the ends of each format: its smallest positive number and its largest.

# %%
print("format     smallest     largest     after 1   after 256")
for name in DTYPES:
    smallest = neighbour(0, name)
    largest = neighbour(np.inf, name, steps=-1)
    after_1 = neighbour(1, name)
    after_256 = neighbour(256, name)
    print(f"{name:9} {smallest:9.0e} {largest:11.5g} {after_1:11.8g} {after_256:11.8g}")

# %% [check]
assert neighbour(256, "bfloat16") == 258
assert neighbour(256, "float16") == 256.25
assert neighbour(0, "float16") == 2**-24
assert neighbour(np.inf, "float16", steps=-1) == 65504

# %% [markdown]
# After 256 comes 258 in bfloat16: 257 does not exist. In float16 the gap is 1/4.
#
# But float16 ends at 65,504, and its smallest positive number is 6e-8. The other two
# reach from far below 1e-38 to 3e38. We draw the gap after $x$, divided by $x$: how
# large is the step to the next number, relative to the number itself?

# %%
x = 2.0 ** np.arange(-32, 24)                     # the powers of two, 2e-10 to 8e6
gaps = {name: [] for name in DTYPES}
for name in DTYPES:
    for number in x:
        with np.errstate(over="ignore"):          # too large a number becomes infinite
            is_stored = float(np.array(number, DTYPES[name])) == number
        gap = neighbour(number, name) - number if is_stored else np.nan
        gaps[name].append(gap / number)
curves(gaps, x=x, log="xy", xlabel="x", ylabel="gap after x, divided by x",
       caption="The lower, the more digits. float16 is exact in a window; left of it "
               "the digits disappear, and right of it there are no numbers.")

# %% [check]
assert gaps["bfloat16"][30] == 2**-7 and gaps["float16"][30] == 2**-10
assert np.isnan(gaps["float16"][0]) and np.isnan(gaps["float16"][-1])

# %% [markdown]
# float16 loses its digits below $2^{-14}$, or 6e-5, its smallest exponent. Still
# smaller numbers are stored as $f \cdot 2^{-14}$, without the 1 in front of $f$. Their
# gap stays the same: the nearer they are to 0, the fewer digits are left.
#
# The curves were drawn at the powers of two. There a gap is 1/128 of the number in
# bfloat16, and 1/1024 in float16. Just below the next power of two it is only half of
# that, because the gap is the same and the number is twice as large.
#
# A result between two numbers is rounded to the nearer one. So one rounding is wrong by
# at most half a gap, in bfloat16 by 0.4 %. For a weight of a network that is harmless,
# as we shall measure. The danger lies elsewhere.
#
# ## Sums
# If a result lies exactly in the middle between two numbers, it is rounded to the one
# whose last bit is 0. The fraction of 256 is `0000000`, that of 258 is `0000001`.
#
# **Predict first.** We add 4,096 ones, one after another, and round after each
# addition. Where does the sum end in bfloat16? And in float16? (When is the gap 2?)

# %%
totals = {}
for name, dtype in DTYPES.items():
    partial_sums = np.cumsum(np.ones(4096, dtype), dtype=dtype)    # each one rounded
    totals[name] = partial_sums.astype(float)
    print(f"{name:9} {totals[name][-1]:5.0f}")
curves(totals, x=np.arange(1, 4097), log="xy", xlabel="ones added", ylabel="sum",
       caption="A sum in 16 bits stops growing when a term is only half a gap.")

# %% [check]
assert [total[-1] for total in totals.values()] == [4096, 256, 2048]

# %% [markdown]
# The sum in bfloat16 stops at 256: 257 lies in the middle between 256 and 258, and is
# rounded to 256. So is every later sum, and 3,840 ones are lost. In float16 the gap is
# 2 from 2,048 on, and the same happens there.
#
# Sums are everywhere in a network: a mean, a softmax, a norm, and each entry of a
# matrix product. Does this mean that 16-bit numbers are useless for products?
#
# A product of two vectors has two parts, and we round them one after the other. First
# only the factors are rounded to bfloat16, and the sum is kept in float32. Then the sum
# is rounded as well.

# %%
rng = np.random.default_rng(0)
a = rng.random(4096)
b = rng.random(4096)
a_rounded = a.astype(bfloat16).astype(float32)    # rounded, then stored in float32
b_rounded = b.astype(bfloat16).astype(float32)
products = a_rounded * b_rounded
sum_in_float32 = products.sum()
sum_in_bfloat16 = float(np.cumsum(products.astype(bfloat16), dtype=bfloat16)[-1])
exact = a @ b                                     # in float64
print(f"factors in bfloat16, sum in float32:  {sum_in_float32 / exact - 1:+.3%}")
print(f"factors and sum in bfloat16:          {sum_in_bfloat16 / exact - 1:+.0%}")

# %% [check]
assert abs(sum_in_float32 / exact - 1) < 0.002
assert -0.8 < sum_in_bfloat16 / exact - 1 < -0.7

# %% [markdown]
# The rounded factors cost almost nothing: some are too large, some too small, and the
# errors cancel. The rounded sum misses three quarters. The right result is about 1,024,
# and all products are less than 1: at 256 the sum stops again. So the first remedy is a
# rule:
#
# > **16 bits to store and to multiply, float32 to add up.**
#
# A GPU follows it: its units for matrix products take 16-bit factors and add up in
# float32. The library follows it too. An op that gets 16-bit inputs computes in float32
# and rounds its value once, at the end.

# %%
ones = ft.Tensor(np.ones(4096, bfloat16))
total = ft.ops.sum(ones)
print("the library's sum:", total.item(), total.dtype)

# %% [check]
assert total.item() == 4096 and total.dtype == bfloat16

# %% [markdown]
# ## Small updates
# Training is a long sum: a weight plus thousands of small updates. What happens to it?
# Our weight is 1, and each of 1,000 steps takes a thousandth of it away. In float32 it
# ends near $0.999^{1000} = 0.37$.
#
# In bfloat16 the number before 1 is $1 - 1/256$. So 1 minus a number is rounded back to
# 1 if that number is smaller than half of this gap, 1/512 or about 0.002.

# %%
weight = np.ones(1001, bfloat16)                  # entry t: the weight after t steps
exact_weight = np.ones(1001, float32)
for t in range(1000):
    weight[t + 1] = weight[t] - bfloat16.type(0.001) * weight[t]
    exact_weight[t + 1] = exact_weight[t] - float32.type(0.001) * exact_weight[t]
print(f"float32  {exact_weight[-1]:.3f}")
print(f"bfloat16 {float(weight[-1]):.3f}")

# %% [check]
assert float(weight[-1]) == 1 and round(float(exact_weight[-1]), 3) == 0.368

# %% [markdown]
# It does not move. A step of 0.001 is less than 1/512, so each step is rounded away,
# and a thousand of them as well.
#
# ## Master weights
# The second remedy: keep a copy of the weight in float32, and update the copy. After
# every step, round it to 16 bits; the model computes with the rounded value. The
# float32 copy is called the **master weight** (Micikevicius et al. 2018).
#
# So the model still multiplies 16-bit numbers, which is fast on a GPU. Only the sum of
# the updates has float32.

# %%
shown = exact_weight.astype(bfloat16)             # what the model sees of the master
steps = slice(0, 61)
curves({"master, float32": exact_weight[steps],
        "the model's weight, bfloat16": shown[steps].astype(float),
        "bfloat16 without a master": weight[steps].astype(float)},
       ylabel="weight",
       caption="The first 60 steps. The master moves at every step. The weight of "
               "the model follows when the steps have added up to half a gap.")

# %% [check]
assert len(np.unique(shown[steps].astype(float))) > 10

# %% [markdown]
# The optimisers of the library do this by themselves for a model in 16 bits. An
# optimiser keeps the values of all its tensors one after another in one long array,
# `w`, and each tensor is a view of its part. The class `Group` does this for a float32
# model.
#
# For a 16-bit model the class `MasterWeights`, derived from `Group`, has two such
# arrays: `w` in float32, for the updates, and `rounded` in 16 bits. The tensors are
# views of `rounded`. Two methods do most of it:
#
# - `lay_out` is called once, at the start. `super().lay_out` makes the long array in 16
#   bits, and `to_float32` copies it. `moments` are Adam's $m$ and $v$ from lesson 03.
#   (`record_versions` we need in a moment.)
# - `write_rounded` is called after every update.

# %%
quote(ft.optim.master.MasterWeights.lay_out)
quote(ft.optim.master.MasterWeights.write_rounded)

# %% [markdown]
# Now a real model. The small GPT of the library was trained on prose. We teach it some
# Python source, with a small learning rate as in fine-tuning: 1e-5. The source comes as
# an array of token ids; the end of it is our test batch.

# %%
code = ft.data.pretraining("source", "valid")[:20_000]
test_batch = code[-16 * 33:].reshape(16, 33)      # 32 tokens a row, and the next one

def compute_loss(model, batch):
    "The mean loss of the next token."
    targets = ft.train.batch.read_batch(batch)    # inputs, and the next tokens
    _, loss = ft.train.batch.compute_loss(model, targets)
    return loss

def test_loss(model):
    with ft.no_grad():
        return compute_loss(model, test_batch).item()

model, _ = ft.load("base-gpt-small")
print(f"{ft.count(model)}   loss on Python source: {test_loss(model):.2f}")

# %% [markdown]
# Next the loop. We want to run it without master weights too, and for this we use a
# rule of the optimiser. Somebody may write a new value to a weight of the model, for
# example to load a checkpoint. Then the optimiser must not go on with its old master
# weight. So each tensor counts how often it was written, and `record_versions`
# remembers the count. If the count has changed, the next step copies the 16-bit value
# into `w`.
#
# `p.mark_written()` adds 1 to the count, though nothing was written. If we call it
# after every step, each master weight is replaced by its rounded value, and what was
# rounded away is forgotten. That is training without master weights.

# %%
def train(model, learning_rate, steps, forget=False):
    "Train; return the test loss before the first step and after each eighth one."
    optimizer = ft.AdamW(learning_rate, weight_decay=0)
    optimizer.start(model.named_parameters())
    history = [test_loss(model)]
    batches = iter(ft.data.lm_batches(code[:-16 * 33], 32, 4))
    for t in range(steps):                        # 4 rows of 32 tokens a step
        compute_loss(model, next(batches)).backward()
        optimizer.step(clip=1.0)
        optimizer.zero_grad()
        if forget:
            for p in model.parameters():
                p.mark_written()
        if t % 8 == 7:
            history.append(test_loss(model))
    return history

# %% [markdown]
# **Predict first.** Adam moves each weight by about the learning rate, 1e-5. Half a gap
# of bfloat16 is between 1/512 and 1/256 of the weight. Up to which size can a weight
# move without a master weight? The median of the weights' sizes is 0.07. Do most of
# them move?

# %%
def load_in(dtype):
    return ft.load("base-gpt-small")[0].to(dtype=dtype)

def join_weights(model):
    return np.concatenate([p.numpy().astype(float).ravel() for p in model.parameters()])

alone = load_in(bfloat16)
before = join_weights(alone)
history_alone = train(alone, 1e-5, 48, forget=True)
has_moved = join_weights(alone) != before
print(f"moved: {has_moved.mean():.1%} of the weights")
print(f"median size of those that moved: {np.median(abs(before[has_moved])):.4f}")
print(f"median size of the others:       {np.median(abs(before[~has_moved])):.4f}")

# %% [check]
assert 0.005 < has_moved.mean() < 0.1
assert np.median(abs(before[has_moved])) < 0.1 * np.median(abs(before[~has_moved]))

# %% [markdown]
# 1e-5 is more than half a gap only for weights below about 0.005, 512 times 1e-5. So a
# few per cent move, the smallest ones. All others stay where they were. Now the same
# with master weights, and in float32.

# %%
histories = {"float32": train(load_in(float32), 1e-5, 48),
             "with master weights": train(load_in(bfloat16), 1e-5, 48),
             "bfloat16 alone": history_alone}
gains = {name: history[0] - np.array(history) for name, history in histories.items()}
curves(gains, x=8 * np.arange(7), xlabel="step", ylabel="fall of the test loss",
       caption="With master weights, training in bfloat16 goes as far as in float32. "
               "Without them the model hardly learns.")
for name, gain in gains.items():
    print(f"{name:20} {gain[-1]:.2f}")

# %% [check]
final = {name: gain[-1] for name, gain in gains.items()}
assert final["with master weights"] > 0.8 * final["float32"]
assert final["bfloat16 alone"] < 0.3 * final["float32"]

# %% [markdown]
# The steps were right in all three runs. In one of them the weights could not hold
# them.
#
# ## Autocast
# There is another way to keep small steps: leave the weights in float32, and compute
# only the products in 16 bits. Just before a product its inputs are rounded. This is
# **autocast**, and it holds inside a `with` block. Then no copy is needed: the weights
# themselves are the master weights.
#
# Each op belongs to one of three kinds:
#
# - **products** get their inputs in 16 bits;
# - **sums** get their inputs in float32;
# - **all other ops** take their inputs as they come. If two inputs have different
#   dtypes, the result has the wider one.

# %%
products_to_show = ft.precision.PRODUCTS - {"_packed_linear"}     # for packed weights
print("products, 16 bits:", *sorted(products_to_show))
print("sums, float32:    ", *sorted(ft.precision.SUMS))

# %% [markdown]
# `linear` is $xW + b$, and `project` is the same for the queries, keys and values at
# once. Among the sums you also find `exp`, `log` and `power`: their results soon leave
# the range of float16. The loss, `cross_entropy`, is always float32.
#
# Here is half a block of a transformer, five ops. All inputs are float32. Go through it
# line by line: of which kind is the op, and which dtype has its result?

# %%
x = ft.Tensor(rng.standard_normal((4, 8)).astype(float32))
w1 = ft.Tensor(rng.standard_normal((8, 32)).astype(float32))
w2 = ft.Tensor(rng.standard_normal((32, 8)).astype(float32))
scale, shift = np.ones(8, float32), np.zeros(8, float32)
with ft.autocast("bfloat16"):
    normed = ft.ops.layer_norm(x, scale, shift)
    hidden = ft.ops.matmul(normed, w1)
    active = ft.ops.gelu(hidden)
    change = ft.ops.matmul(active, w2)
    y = x + change
results = {"layer_norm": normed, "matmul with w1": hidden, "gelu": active,
           "matmul with w2": change, "add": y}
for name, result in results.items():
    print(f"{name:15} {result.dtype}")

# %% [check]
dtypes = [result.dtype for result in results.values()]
assert dtypes == [float32, bfloat16, bfloat16, bfloat16, float32]

# %% [markdown]
# Here are the five as a picture, with 16 bits in blue.

# %%
diagram(
    {"x": (0, 1, "x\nfloat32"), "norm": (0, 0, "layer_norm\nfloat32"),
     "up": (1, 0, "matmul\nbfloat16", "data"), "gelu": (2, 0, "gelu\nbfloat16", "data"),
     "down": (3, 0, "matmul\nbfloat16", "data"), "add": (3, 1, "add\nfloat32")},
    [("x", "norm"), ("norm", "up"), ("up", "gelu"), ("gelu", "down"), ("down", "add"),
     ("x", "add")],
    height=2.0, caption="Half a block under autocast, with the dtype of each result. "
    "The way from x to add, which runs through all blocks, stays in float32.")

# %% [markdown]
# The layer norm computes in float32. The product rounds its inputs, and gives 16 bits.
# GELU takes what comes. The addition of float32 and bfloat16 gives float32: so the sum
# that runs through all blocks keeps its digits.
#
# Why is `exp` on the list of float32? Take 12, a number that is not unusual in a
# network.

# %%
with np.errstate(over="ignore"):
    print("exp(12) in float16:", np.exp(float16.type(12)))
print("exp(12):           ", round(np.exp(12.0)))

# %% [check]
with np.errstate(over="ignore"):
    assert np.isinf(np.exp(float16.type(12)))

# %% [markdown]
# The result is larger than 65,504, so in float16 it is infinite.
#
# ## Gradients that disappear
# bfloat16 has few digits, but it reaches as far as float32. float16 does not: its
# smallest number is $2^{-24}$, or 6e-8. What is smaller than half of that becomes zero.
#
# This matters for gradients. In `backward` the gradient of a 16-bit result has 16 bits
# too. With float16 autocast the logits come from a matrix product, so they are float16,
# and so is their gradient. Is it so small? The logits have one entry for each position
# and each token of the vocabulary. The gradient of such an entry is
#
# $$\frac{p - y}{N}$$
#
# Here $p$ is the probability that the model gives to this token, and $y$ is 1 if it is
# the right token, else 0. Lesson 03 derived this for softmax and cross-entropy
# together. $N$ is the number of tokens in the batch, because the loss is the mean over
# them.
#
# **Predict first.** Our test batch has $N = 512$ tokens. The model gives a probability
# of 1e-5 to some token, and it was not the right one. Does its gradient survive in
# float16? And is 1e-5 a rare case? (The vocabulary has 2,048 tokens, and the
# probabilities of all together are 1.)

# %%
probability = 1e-5
gradient = probability / 512
print(f"gradient {gradient:.0e}   in float16: {float16.type(gradient)}")

# %% [check]
assert float16.type(gradient) == 0

# %% [markdown]
# It is lost: 2e-8 is less than 3e-8. And such probabilities are common: the mean of
# 2,048 probabilities is 5e-4, and a few likely tokens take most of the sum. How many
# gradients are lost in all? We compute the gradient of all logits in float32 and count.
# We also look at the other end of the model, at the embeddings that it gets as its
# input. For this the model takes the embeddings in place of token ids.

# %%
model, _ = ft.load("base-gpt-small")
ids = test_batch[:, :-1]
next_ids = test_batch[:, 1:]
embedded = ft.Tensor(model.embed.weight.numpy()[ids], requires_grad=True)
logits = ft.Tensor(model(embedded).numpy(), requires_grad=True)   # backward stops here
ft.ops.cross_entropy(logits, next_ids).backward()
ft.ops.cross_entropy(model(embedded), next_ids).backward()
SMALLEST = 2.0**-24

def lost(gradient, factor=1.0):
    "The share of the entries that become 0 in float16, after this factor."
    return (abs(gradient) * factor < SMALLEST / 2).mean()

for name, tensor in {"logits": logits, "embeddings": embedded}.items():
    print(f"{name:10} {lost(tensor.grad):6.1%} are lost")

# %% [markdown]
# Large models are trained with batches of half a million tokens or more. That is 1,024
# times our 512. The mean divides by 1,024 times as many tokens, so the gradient of each
# logit is 1,024 times smaller. We divide ours by 1,024 and count again. (For the
# embeddings this is right as well: each one belongs to one row of the batch.)

# %%
for name, tensor in {"logits": logits, "embeddings": embedded}.items():
    print(f"{name:10} {lost(tensor.grad, 1 / 1024):6.1%} are lost")

# %% [check]
assert 0.6 < lost(logits.grad) < 0.7 and lost(logits.grad, 1 / 1024) > 0.99
assert lost(embedded.grad) < 0.001 and lost(embedded.grad, 1 / 1024) < 0.01

# %% [markdown]
# Of the logits' gradients two thirds are lost with 512 tokens, and nearly all with half
# a million. Farther down in the model the gradients are larger, since each is a sum
# over many logits. But `backward` begins at the logits: what is lost there is missing
# everywhere.
#
# ## Scale the loss
# The third remedy is one multiplication. Multiply the loss by a large number $S$ before
# `backward`. By the chain rule every gradient is then multiplied by $S$, and the small
# ones are large enough for float16.
#
# Before the update, divide the gradients of the weights by $S$. The library keeps those
# in float32, so they may become small again. $S$ is a power of two: it changes the
# exponents and no digit.

# %%
_, axes = figure(height=2.6)
edges = 2.0 ** np.arange(-50, 20)
for factor, label in {1: "as they are", 2**15: "times S = 32,768"}.items():
    sizes = abs(logits.grad).ravel() * factor
    axes.hist(sizes, bins=edges, histtype="step", linewidth=1.8, label=label)
axes.axvspan(SMALLEST, 65504, color="grey", alpha=0.2, linewidth=0)
axes.set(xscale="log", xlabel="size of a gradient", ylabel="number of logits")
axes.legend()
show("Grey: the range of float16. S moves the gradients into it.")
print(f"with S = 32,768, {lost(logits.grad, 2**15):.1%} are lost")

# %% [markdown]
# How much does this matter for the weights? We compare the gradient of all weights
# under autocast with that in float32, for many $S$. An $S$ below 1 shows what happens
# with more tokens: $S = 1/1024$ makes the gradients of the logits as small as those of
# half a million tokens, without any scale.

# %%
def region(dtype):
    "An autocast region; without a dtype one in which nothing changes."
    return ft.autocast(dtype or "bfloat16", enabled=dtype is not None)

def weight_gradient(S, dtype=None):
    "The gradient of all weights, computed from S times the loss, then divided by S."
    model.zero_grad()
    with region(dtype):
        loss = compute_loss(model, test_batch)
    with np.errstate(all="ignore"):
        (loss * S).backward()
    return np.concatenate([p.grad.ravel() for p in model.parameters()]) / S

# %% [markdown]
# The error of a gradient is the length of its difference from the one in float32.

# %%
in_float32 = weight_gradient(1.0)

def error(gradient):
    "The length of the error, divided by the length of the gradient."
    return np.linalg.norm(gradient - in_float32) / np.linalg.norm(in_float32)

scales = 2.0 ** np.arange(-15, 26, 5)             # nine, from 1/32,768 to 33 million
errors = [error(weight_gradient(S, "float16")) for S in scales]
error_of_bfloat16 = error(weight_gradient(1.0, "bfloat16"))
curves({"float16": errors}, x=scales, levels={"bfloat16, S = 1": error_of_bfloat16},
       log="xy", xlabel="S", ylabel="error of the gradient",
       caption="With a small S the gradient of the weights is wrong. Beyond the right "
               "end of the line the gradients overflow.")
for label, i in {"1/1024": 1, "1": 3, "32,768": 6}.items():
    print(f"float16, S = {label:7} error {errors[i]:6.2%}")
print(f"bfloat16, S = 1       error {error_of_bfloat16:6.2%}")

# %% [check]
assert 0.28 < errors[1] < 0.31 and errors[3] < 0.003
assert 8 * min(errors[4:8]) < error_of_bfloat16 < 0.01
assert not np.isfinite(errors[-1])

# %% [markdown]
# Three things are worth seeing.
#
# - For 512 tokens, float16 is good enough even with $S = 1$, though two thirds of the
#   logits' gradients are lost: the lost ones are the smallest.
# - For half a million tokens the gradient is off by 29 %.
# - With a good $S$ float16 is about ten times as exact as bfloat16, which has three
#   bits of fraction less. But bfloat16 needs no $S$, and so nobody has to find one.
#
# ## First divide, then clip
# Lesson 03 clips gradients: if their norm is larger than a limit, they are scaled down
# to it. `clip_norm` does it in place. With loss scaling there are two orders: divide by
# $S$ and clip, or clip and divide by $S$.
#
# **Predict first.** The true gradient is (3, 4), with norm 5. The limit is 1, and
# $S = 1024$; `backward` gives $S$ times the true gradient. What norm reaches the
# optimiser in the first order? And in the second?

# %%
true_gradient = np.array([3.0, 4.0])
S = 1024.0

divided_first = S * true_gradient / S
ft.optim.clip_norm([divided_first], 1.0)
clipped_first = S * true_gradient
ft.optim.clip_norm([clipped_first], 1.0)
clipped_first /= S
print(f"divide, then clip: norm {np.linalg.norm(divided_first):.4f}")
print(f"clip, then divide: norm {np.linalg.norm(clipped_first):.4f}")

# %% [check]
assert round(np.linalg.norm(divided_first), 4) == 1
assert round(np.linalg.norm(clipped_first) * S, 4) == 1

# %% [markdown]
# In the wrong order the limit is compared with the norm of $S$ times the gradient.
# Nearly every gradient is "too large", and what is left is $S$ times too small. So the
# library does both in one call, in the right order. A `GradScaler` is the object that
# keeps $S$. Its method `step` hands $S$ to the optimiser as `scale`, and the optimiser
# divides by it first, then clips.
#
# In the code below, `factor` is that of a learning-rate schedule, and the first line
# checks the kind of an argument. If the norm is infinite, the optimiser raises an error
# before it changes anything, and `skipping` catches it.

# %%
quote(ft.GradScaler.step)

# %% [markdown]
# ## Who finds S?
# The best $S$ is the largest one with which nothing overflows. It differs from model to
# model, and changes during training. The `GradScaler` finds it by trying:
#
# - If a gradient is infinite or NaN, the step is **skipped**: the weights stay as they
#   are. Then $S$ is halved.
# - After a number of good steps in a row, $S$ is doubled. Usually the number is 2,000;
#   we take 8 to see it happen.
#
# We start far too high, at $2^{22}$, about 4 million. The loop is the one from before,
# with an autocast region and a scaler; `ft.fit(..., autocast="float16")` does the same.
# After `scaler.step`, `scaler.finite` says if all gradients were finite.
# `scaler.update` then changes $S$.

# %%
def train_scaled(model, dtype, scaler, steps=24):
    "Train; return the optimiser and, for each step, S and if the step was skipped."
    optimizer = ft.AdamW(1e-3, weight_decay=0)
    optimizer.start(model.named_parameters())
    batches = iter(ft.data.lm_batches(code[:-16 * 33], 32, 4))
    record = []
    for _ in range(steps):
        with region(dtype):
            loss = compute_loss(model, next(batches))
        with np.errstate(all="ignore"):
            scaler.scale(loss).backward()
            scaler.step(optimizer, clip=1.0)
        record.append((scaler.get_scale(), not scaler.finite))
        optimizer.zero_grad()
        scaler.update()
    return optimizer, np.array(record)

# %% [markdown]
# Now we train with it, and keep the model for the table at the end.

# %%
scaler = ft.GradScaler(2.0**22, growth_interval=8)
models = {"float16, autocast": load_in(float32)}
optimizers = {}
optimizers["float16, autocast"], record = train_scaled(
    models["float16, autocast"], "float16", scaler)
tried, skipped = record.T
print("skipped steps:", np.flatnonzero(skipped))
curves({"S": np.log2(tried)}, ylabel="exponent of S",
       caption="S is 2 to this power. It falls while steps are skipped. After eight "
               "good steps it grows, and falls again if that was too much.")

# %% [check]
assert skipped[0] and tried[1] == tried[0] / 2
assert max(np.diff(tried)) > 0 and 3 <= skipped.sum() <= 8

# %% [markdown]
# A skipped step costs the work of one step, and nothing else. Once $S$ is near the best
# one, this happens when it is doubled too far: about one step in 2,000, with the usual
# number.
#
# ## What 16 bits save
# **A model that no longer trains** takes half of the bytes. Does the rounding hurt it?
# We store the model in each format and measure its loss.

# %%
for name, dtype in DTYPES.items():
    stored = load_in(dtype)
    size = sum(p.data.nbytes for p in stored.parameters())
    print(f"{name:9} {size / 1000:4.0f} kB   test loss {test_loss(stored):.3f}")

# %% [check]
stored_losses = [test_loss(load_in(dtype)) for dtype in DTYPES.values()]
assert max(stored_losses) - min(stored_losses) < 0.02

# %% [markdown]
# Half of the bytes, and the same loss up to the third digit.
#
# **A model that trains** needs more than its weights: a gradient and Adam's two
# moments. A common summary of Micikevicius et al. (2018) is that training in 16 bits
# takes about half of the memory. Is this so for the memory of the parameters? We train
# three more models, each in its own way.

# %%
REGIONS = {"float32": None, "bfloat16, masters": None,
           "bfloat16, autocast": "bfloat16", "float16, autocast": "float16"}
models["float32"] = load_in(float32)
models["bfloat16, masters"] = load_in(bfloat16)
models["bfloat16, autocast"] = load_in(float32)   # autocast rounds, not we
no_scaler = ft.GradScaler(enabled=False)          # S stays 1
for name in list(models)[1:]:
    optimizers[name], _ = train_scaled(models[name], REGIONS[name], no_scaler)

# %% [markdown]
# Then we count the bytes of their arrays.

# %%
def count_bytes(name):
    "Bytes of the weights, of their gradients and of the optimiser."
    parameters = list(models[name].parameters())
    compute_loss(models[name], test_batch).backward()
    state = optimizers[name].state_dict()
    state.pop("step")                             # the number of the step is no array
    return np.array([sum(p.data.nbytes for p in parameters),
                     sum(p.grad.nbytes for p in parameters),
                     sum(a.nbytes for a in state.values())])

# %% [markdown]
# **Predict first.** In float32 a parameter takes 4 bytes, its gradient 4, its two
# moments 8: together 16. How many bytes are they, with the master weight, for a model
# in bfloat16? The library keeps its gradients and moments in float32. And how many for
# a model in float32 under autocast?

# %%
rows = {}
for name in REGIONS:
    rows[name] = count_bytes(name) / join_weights(models[name]).size
    print(f"{name:19} {rows[name].sum():.0f} bytes")

# %% [check]
assert [round(row.sum()) for row in rows.values()] == [16, 18, 16, 16]

# %% [markdown]
# Nothing is saved there. With master weights it is even more: 2 bytes for the weight
# and 4 for its master make 18. Under autocast all four arrays are float32, as before.
#
# What can be halved are the **activations**, the results that `backward` needs again.
# With many tokens in a batch they are the larger part. The paper, too, expects the
# saving from them (section 3.1). On NumPy they are not halved, as the last table shows:
# NumPy computes in float32, and holds both copies for a while.
#
# ## What 16 bits do not save
# And the time? The GPU of the first paragraph has units for 16-bit products. Our CPU
# has none. We measure a product of two small matrices in three ways:
#
# - in float32, for which NumPy calls BLAS, a library made for matrix products;
# - in float16, for which BLAS has nothing, so NumPy runs a plain loop;
# - under autocast, which rounds the factors, multiplies in float32 and rounds the
#   result.

# %%
def shortest_time(product, a, repeats=50):
    "The shortest time of many runs of product(a, a): the one that nothing disturbed."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a)
        times.append(time.perf_counter() - start)
    return min(times)

matrix = rng.standard_normal((60, 60)).astype(float32)    # small: one core is enough

# %%
times = {}
times["float32"] = shortest_time(ft.ops.matmul, ft.Tensor(matrix))
times["float16, NumPy's own"] = shortest_time(np.matmul, matrix.astype(float16))
with ft.autocast("bfloat16"):
    times["autocast"] = shortest_time(ft.ops.matmul, ft.Tensor(matrix))
for name, seconds in times.items():
    print(f"{name:21} {seconds / times['float32']:4.0f} times as long")

# %% [check]
assert times["autocast"] > 1.5 * times["float32"]
assert times["float16, NumPy's own"] > 20 * times["float32"]

# %% [markdown]
# On a CPU 16 bits cost time. The library offers them there so that you can see, and
# test, what they do to the numbers: its results are rounded as on a GPU. No speed on a
# GPU was measured in this lesson.
#
# ## All of it in one table
# Each model was trained for 24 steps with a learning rate of 1e-3. The float16 run lost
# some of the steps, because we started $S$ too high.

# %%
print(" " * 19, "weights gradients optimiser   one pass   test loss")
table = {}
for name, dtype in REGIONS.items():
    with ft.peak_memory() as peak, region(dtype):
        compute_loss(models[name], test_batch).backward()
    table[name] = (peak["bytes"] / 1e6, test_loss(models[name]))
    weights, gradients, optimiser = rows[name]
    print(f"{name:19} {weights:5.0f} B {gradients:7.0f} B {optimiser:7.0f} B",
          f"{table[name][0]:8.1f} MB {table[name][1]:10.2f}")

# %% [check]
memory = {name: row[0] for name, row in table.items()}
assert min(memory, key=memory.get) == "float32"
losses = {name: row[1] for name, row in table.items()}
for name in ("bfloat16, masters", "bfloat16, autocast"):
    assert abs(losses[name] - losses["float32"]) < 0.02
assert losses["float32"] + 0.05 < losses["float16, autocast"] < losses["float32"] + 0.4

# %% [markdown]
# In bfloat16 both ways train as well as float32. float16 is behind by the steps that it
# skipped. The memory of one pass is smallest in float32: on NumPy each 16-bit result is
# computed in float32 first.
#
# What to remember:
#
# - 16 bits are for storing and multiplying; sums are for float32.
# - An update is a sum too: a step of less than half a gap is rounded away. So a float32
#   copy of the weights is needed to train: as master weights, or as the weights
#   themselves under autocast.
# - bfloat16 has the range of float32 and few digits. float16 has more digits and a
#   small range, in which small gradients become 0. So the loss is multiplied by a scale
#   before `backward`, and the gradients are divided by it before clipping.
#
# **Exercises.** `tinyft start precision` gives you all three. In `cast_inputs` you
# write the rule of autocast. In `reclaim_values` you keep the master weights, except
# where somebody wrote to a weight. In `update` you let $S$ grow and shrink.
