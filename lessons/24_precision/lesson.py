# %% [markdown]
# # 24 Sixteen bits
#
# **Reading:** 50 minutes. **You need:** lessons 01 to 03.
# **Exercises:** cast_inputs, reclaim_values, update (about 45 minutes).
#
# A parameter in float32 takes 32 bits, which are four bytes. A model of seven billion
# parameters then takes 28 GB. With 16 bits for each parameter it takes 14 GB. The GPU
# gains even more: the data sheet of NVIDIA's H100 promises 67 trillion operations a
# second in float32, and 990 trillion in matrix products of 16-bit numbers.
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
# `bfloat16`, comes from a small package of its own; the library uses it on NumPy
# arrays.
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
# - the **fraction** $f$, from 0 to 1. Its first bit counts 1/2, the next 1/4, then 1/8.
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
# A format holds a finite number of numbers, and there are gaps between them. We can
# look at them directly. The next larger number has the bits that, read as a whole
# number, are one more. (The fraction grows by one unit; when it is full, the exponent
# grows.)

# %%
def neighbour(number, name, steps=1):
    "The number that comes `steps` later in this format."
    stored = np.array([number], DTYPES[name])
    whole_number = stored.view(f"uint{8 * stored.itemsize}")
    moved = (whole_number.astype(int) + steps).astype(whole_number.dtype)
    return float(moved.view(stored.dtype)[0])

print("after 1, in float32:", neighbour(1, "float32"))

# %% [markdown]
# **Predict first.** From 256 up to 512 the exponent is 8: the numbers are
# $256 \cdot (1 + f)$. With seven bits, $f$ has 128 values. Which number follows 256 in
# bfloat16? And in float16, with ten bits?

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
x = 2.0 ** np.arange(-32, 24)
gaps = {name: [] for name in DTYPES}
for name in DTYPES:
    for number in x:
        with np.errstate(over="ignore"):
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
# float16 loses its digits below $2^{-14}$, or 6e-5. There the exponent cannot become
# smaller. Smaller numbers are stored without the 1 before the point: the nearer they
# are to 0, the fewer digits are left.
#
# Keep two numbers in mind: relative to the number, a gap is about 1/128 in bfloat16 and
# about 1/1024 in float16. A result between two numbers is rounded to the nearer one, so
# one rounding is wrong by at most half a gap. For a weight of a network that is
# harmless. The danger lies elsewhere.
#
# ## Sums
# What is 256 + 1 in bfloat16? The result 257 lies halfway between 256 and 258. A tie
# goes to the number whose last bit is 0. Here that is 256.
#
# **Predict first.** We add 4,096 ones, one after another, and round after each
# addition. Where does the sum end in bfloat16? And in float16, in which the gap grows
# to 2 at 2,048?

# %%
totals = {}
for name, dtype in DTYPES.items():
    totals[name] = np.cumsum(np.ones(4096, dtype), dtype=dtype).astype(float)
    print(f"{name:9} {totals[name][-1]:5.0f}")
curves(totals, x=np.arange(1, 4097), log="xy", xlabel="ones added", ylabel="sum",
       caption="A sum in 16 bits stops growing when a term is only half a gap.")

# %% [check]
assert [total[-1] for total in totals.values()] == [4096, 256, 2048]

# %% [markdown]
# The sum in bfloat16 stops at 256. Every further one is lost, though the ones together
# are 3,840. Sums are everywhere in a network: a mean, a softmax, a norm, and each entry
# of a matrix product. Does this mean that 16-bit numbers are useless for products?
#
# We separate the two parts of a product of vectors. First only the factors are rounded
# to bfloat16, and the sum is kept in float32. Then the sum is rounded as well.

# %%
rng = np.random.default_rng(0)
a = rng.random(4096)
b = rng.random(4096)
products = a.astype(bfloat16).astype(float32) * b.astype(bfloat16).astype(float32)
sum_in_float32 = products.sum()
sum_in_bfloat16 = float(np.cumsum(products.astype(bfloat16), dtype=bfloat16)[-1])
exact = a @ b
print(f"factors in bfloat16, sum in float32:  {sum_in_float32 / exact - 1:+.3%}")
print(f"factors and sum in bfloat16:          {sum_in_bfloat16 / exact - 1:+.0%}")

# %% [check]
assert abs(sum_in_float32 / exact - 1) < 0.002
assert -0.8 < sum_in_bfloat16 / exact - 1 < -0.7

# %% [markdown]
# The rounded factors cost almost nothing: some are too large, some too small, and the
# errors cancel. The rounded sum misses three quarters. So the first remedy is a rule:
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
#
# Below 1 the gap of bfloat16 is 1/256. So 1 minus a number is rounded back to 1 if that
# number is smaller than half a gap, 1/512.
#
# **Predict first.** A weight is 1. Each of 1,000 steps takes a thousandth of it away.
# In float32 it ends near $1/e = 0.37$. Where does it end in bfloat16?

# %%
weight = np.ones(1001, bfloat16)
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
# The optimisers of the library do this by themselves for a model in 16 bits. They keep
# the values of many tensors end to end in one flat array `w`. For a 16-bit model there
# are two such arrays: `w` in float32, and `rounded`, which the model's tensors look
# into. Two methods of the class `MasterWeights` do most of it. The class is derived
# from `Group`, which does the same for float32 models. `super().lay_out` moves the
# tensors into the flat array. `to_float32` makes a float32 copy. `moments` are Adam's
# $m$ and $v$ from lesson 03. `record_versions` we need in a moment. After every update
# `write_rounded` rounds `w` into the tensors.

# %%
quote(ft.optim.master.MasterWeights.lay_out)
quote(ft.optim.master.MasterWeights.write_rounded)

# %% [markdown]
# Now a real model. The small GPT of the library was trained on prose. We teach it some
# Python source, with the small learning rate of fine-tuning: 1e-5.

# %%
code = ft.data.pretraining("source", "valid")[:20_000]
test_batch = code[-16 * 33:].reshape(16, 33)      # 32 tokens a row, and the next one

def compute_loss(model, batch):
    "The mean loss of the next token."
    targets = ft.train.batch.read_batch(batch)
    _, loss = ft.train.batch.compute_loss(model, targets)
    return loss

def test_loss(model):
    with ft.no_grad():
        return compute_loss(model, test_batch).item()

model, _ = ft.load("base-gpt-small")
print(f"{ft.count(model)}   loss on Python source: {test_loss(model):.2f}")

# %% [markdown]
# Next the loop. We want to run it without master weights too. There is a simple way.
# The optimiser notices when somebody else writes to a weight: each tensor counts its
# writes, and `record_versions` remembered the count. It then takes the value that was
# written, the 16-bit one. `mark_written` counts a write, though nothing was written. If
# we call it after every step, the optimiser forgets each time what 16 bits cannot show.

# %%
def train(model, learning_rate, steps, forget=False):
    "Train; return the test loss before the first step and after each eighth one."
    optimizer = ft.AdamW(learning_rate, weight_decay=0)
    optimizer.start(model.named_parameters())
    history = [test_loss(model)]
    batches = iter(ft.data.lm_batches(code[:-16 * 33], 32, 4))
    for t in range(steps):
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
# of bfloat16 is between 1/512 and 1/256 of the weight. The median of the weights' sizes
# is 0.07. Without master weights, does any weight move? Do most of them?

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
# A few per cent move: those that are so small that 1e-5 is more than half of their gap.
# All others stay where they were. Now the same with master weights, and in float32.

# %%
histories = {"float32": train(load_in(float32), 1e-5, 48),
             "with master weights": train(load_in(bfloat16), 1e-5, 48),
             "bfloat16 alone": history_alone}
gains = {name: history[0] - np.array(history) for name, history in histories.items()}
curves(gains, x=8 * np.arange(7), ylabel="test loss gained (nats)",
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
# There is another way to keep the steps: leave the weights in float32, and compute only
# the products in 16 bits. Just before a product its inputs are rounded. This
# is **autocast**, and it holds inside a `with` block. Each op belongs to one of three
# kinds:

# %%
print("16 bits:", *sorted(ft.precision.PRODUCTS - {"_packed_linear"}))
print("float32:", *sorted(ft.precision.SUMS))
print("as the inputs come: all others")

# %% [markdown]
# The products come first; `linear` is $xW + b$, and `project` is the same for the
# queries, keys and values at once. The second kind are the ops with a sum inside, and
# `exp`, `log` and `power`, which leave the range of float16 soon. The loss,
# `cross_entropy`, is always float32. For every other op nothing is rounded. If two
# inputs have different dtypes, the result has the wider one.
#
# **Predict first.** This is half a block of a transformer. All inputs are float32.
# Which dtype has each of the five results under `autocast("bfloat16")`?

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
for result in (normed, hidden, active, change, y):
    print(result.dtype)

# %% [check]
dtypes = [result.dtype for result in (normed, hidden, active, change, y)]
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
# Why is `exp` on the list? Numbers such as 12 are nothing unusual in a network.

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
# Are gradients so small? We look at the gradient of the logits. For one token it is
#
# $$\frac{p - y}{N}$$
#
# where $p$ are the probabilities of the model, $y$ is 1 for the right token and 0 for
# all others, and $N$ is the number of tokens in the batch, since the loss is their
# mean.
#
# **Predict first.** Our test batch has $N = 512$ tokens, and the vocabulary has 2,048
# entries. The model gives a probability of 1e-5 to some token, and it was not the right
# one. Does its gradient survive in float16?

# %%
probability = 1e-5
gradient = probability / 512
print(f"gradient {gradient:.0e}   in float16: {float16.type(gradient)}")

# %% [check]
assert float16.type(gradient) == 0

# %% [markdown]
# It is lost: 2e-8 is less than 3e-8. How many are lost in all? We compute the gradient
# of all logits in float32 and count. We also look at the other end of the model, at the
# embeddings that it gets as its input.

# %%
model, _ = ft.load("base-gpt-small")
ids = test_batch[:, :-1]
next_ids = test_batch[:, 1:]
embedded = ft.Tensor(model.embed.weight.numpy()[ids], requires_grad=True)
logits = ft.Tensor(model(embedded).numpy(), requires_grad=True)
ft.ops.cross_entropy(logits, next_ids).backward()
ft.ops.cross_entropy(model(embedded), next_ids).backward()
SMALLEST = 2.0**-24

def lost(gradient, factor=1.0):
    "The share of the entries that become 0 in float16, after this factor."
    return (abs(gradient) * factor < SMALLEST / 2).mean()

for name, tensor in {"logits": logits, "embeddings": embedded}.items():
    print(f"{name:10} {lost(tensor.grad):6.1%} are lost")

# %% [markdown]
# Now for a batch of half a million tokens, as large models are trained with. The loss
# is divided by 1,024 times as many tokens, and so is every gradient.

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
# `backward`. By the chain rule every gradient is then multiplied by $S$. Before the
# update divide the gradients of the weights by $S$; the library keeps those in float32,
# where small numbers survive. $S$ is a power of two: it changes the exponents and no
# digit.

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
# with more tokens: $S = 1/1024$ stands for the half million.

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

scales = 2.0 ** np.arange(-15, 26, 5)
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
# **Predict first.** The gradient is (3, 4), with norm 5. The limit is 1, and
# $S = 1024$. What norm reaches the optimiser in the first order? And in the second?

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
# Every gradient is "too large", and what is left is $S$ times too small. So the library
# does both in one method, in the right order: `scaler.step` hands $S$ to the optimiser
# as `scale`, and the optimiser divides first. `factor` is that of a learning-rate
# schedule; the first line checks the kind of an argument. `skipping` catches the error
# that the optimiser raises if the norm is infinite.

# %%
quote(ft.GradScaler.step)

# %% [markdown]
# ## Who finds S?
# The best $S$ is the largest one with which nothing overflows. It differs from model to
# model, and changes during training. A `GradScaler` finds it by trying:
#
# - If a gradient is infinite or NaN, the step is **skipped**: the weights stay as they
#   are. Then $S$ is halved.
# - After a number of good steps in a row, $S$ is doubled. Usually the number is 2,000;
#   we take 8 to see it happen.
#
# We start far too high, at $2^{22}$ = 4 million. This is the loop that
# `ft.fit(..., autocast="float16")` goes through.

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
# A skipped step costs the work of one step, and nothing else. Usually that is one step
# in 2,000.
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
# moments. The abstract of Micikevicius et al. (2018) says that 16 bits nearly halve
# "memory requirements". Is this so for the memory of the parameters? We train three
# more models, each in its own way.

# %%
REGIONS = {"float32": None, "bfloat16, masters": None,
           "bfloat16, autocast": "bfloat16", "float16, autocast": "float16"}
models["float32"] = load_in(float32)
models["bfloat16, masters"] = load_in(bfloat16)
models["bfloat16, autocast"] = load_in(float32)
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
# moments 8: together 16. How many are they for a model in bfloat16 with master weights?
# Its gradients and moments are float32. And for a model in float32 under autocast?

# %%
rows = {}
for name in REGIONS:
    rows[name] = count_bytes(name) / join_weights(models[name]).size
    print(f"{name:19} {rows[name].sum():.0f} bytes")

# %% [check]
assert [round(row.sum()) for row in rows.values()] == [16, 18, 16, 16]

# %% [markdown]
# Nothing is saved there: master weights make it 18. What can be halved are
# the **activations**, the results that `backward` needs again. With many tokens in a
# batch they are the larger part; the paper says so itself, in section 3.1. On NumPy
# they are not halved, as the last table shows: NumPy computes in float32, and holds
# both copies for a while.
#
# ## What 16 bits do not save
# And the time? The GPU of the first paragraph has units for 16-bit products. Our CPU
# has none. We measure a product of two matrices, so small that one core computes it.

# %%
def shortest_time(product, a, repeats=50):
    "The shortest time of many runs of product(a, a): the one that nothing disturbed."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a)
        times.append(time.perf_counter() - start)
    return min(times)

matrix = rng.standard_normal((60, 60)).astype(float32)

# %% [markdown]
# **Predict first.** For float32, NumPy calls BLAS, a library made for matrix products.
# It has none for 16 bits; there NumPy runs a plain loop. Is a product of float16
# matrices faster or slower? Autocast rounds the factors, multiplies in float32 and
# rounds the result. What do you expect there?

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
# - 16 bits are for storing and multiplying; sums and updates are for float32.
# - bfloat16 has the range of float32 and few digits. float16 has more digits and a
#   small range: it needs a scale for the loss, which is divided out before clipping.
# - A float32 copy of the weights is needed to train: as master weights, or as the
#   weights themselves under autocast.
#
# **Exercises.** `tinyft start precision` gives you all three. In `cast_inputs` you
# write the rule of autocast. In `reclaim_values` you keep the master weights, except
# where somebody wrote to a weight. In `update` you let $S$ grow and shrink.
