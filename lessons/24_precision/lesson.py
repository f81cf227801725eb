# %% [markdown]
# # 24 Sixteen bits
# **Minutes:** 60, with the exercises 100. **Prerequisites:** 01, 02, 03. **Exercises:** given, gather_values, update
#
# Half the bits are half the memory and half the traffic, and a GPU multiplies them several times as fast. What is lost, and what helps?
# The answer in one line: **16 bits are for keeping and for multiplying, float32 is for adding up.** NumPy rounds here as a GPU does.
# ## What 16 bits can hold
# A number is $\pm\, 2^{e} (1 + f)$. The bits of $e$ buy range, those of $f$ digits: float16 has 5 and 10 of them, bfloat16 8 and 7 (float32: 8
# and 23). The bit patterns of positive numbers are in order, so here are all numbers there are.
#
# **Predict first.** Which number follows 256 in bfloat16?
# %%
import os
from unittest import mock

import numpy as np

import tinyft as tf
from tinyft.array import bfloat16
from tinyft.learn.lessons import figure, quote, show

FAST, BLUE, RED, GREY = "TINYFT_FAST" in os.environ, "#4477aa", "#cc6677", "#bbbbbb"
COLOURS = {"float32": GREY, "bfloat16": BLUE, "float16": RED, "with masters": "#228833", "alone": RED}
HALVES = {"bfloat16": bfloat16, "float16": np.dtype(np.float16)}

fig, (left, right) = figure(2, 2.4)
for row, (name, dtype) in enumerate(HALVES.items()):
    infinity = np.array(np.inf, dtype).view(np.uint16)
    grid = np.arange(infinity, dtype=np.uint16).view(dtype).astype(float)
    after = {x: grid[grid > x][0] for x in (0, 1, 256)}
    print(f"{name:9} smallest {after[0]:.0e}   largest {grid[-1]:.3g}   after 1: {after[1]:.4f}   after 256: {after[256]:g}")
    left.vlines(grid[(grid > 0.99) & (grid < 1.02)], row - 0.3, row + 0.3, color=COLOURS[name], lw=1)
    right.loglog(grid[1:-1], np.diff(grid)[1:] / grid[1:-1], color=COLOURS[name], label=name)
assert after == {0: 2**-24, 1: 1 + 2**-10, 256: 256.25} and grid[-1] == 65504
left.set(yticks=[0, 1], yticklabels=HALVES, xlabel="all numbers near 1")
right.set(xlim=(1e-10, 1e8), ylim=(1e-4, 2), xlabel="x", ylabel="gap after x / x")
right.legend(fontsize=8)
show("bfloat16 has few digits, as far as float32 reaches. float16 has more of them, in a window.")
# %% [markdown]
# ## Adding up
# It is 258. So 256 + 1 lies halfway, and is rounded to 256, whose last bit is even.
#
# **Predict first.** Where does a sum of 4,096 ones end? Where a weight of 1, if each of 1,000 steps takes a thousandth of it away?
# %%
for name, dtype in {"float32": np.dtype(np.float32), **HALVES}.items():
    total, weight, thousand = np.cumsum(np.ones(4096, dtype), dtype=dtype)[-1], dtype.type(1), dtype.type(1000)
    for _ in range(1000):
        weight -= weight / thousand
    print(f"{name:9} sum {float(total):4.0f}   weight {float(weight):.3f}")
    assert total == {"float32": 4096, "bfloat16": 256, "float16": 2048}[name] and (weight == 1) == (name == "bfloat16")

library = tf.ops.sum(tf.Tensor(np.ones(4096, bfloat16)))
assert library.item() == 4096 and library.dtype == bfloat16                  # added up in float32, rounded once
# %% [markdown]
# ## Weights that train
# So of tensors in 16 bits our optimisers keep the values in float32: **master weights**. They step there, and show the tensors rounded.
# We teach a small GPT of prose some Python at a small rate, with masters and without. **Predict first.** Without them, does nothing move?
# %%
quote(tf.optim.Rounded.lay_out)
code = tf.data.pretraining("source", "valid")[:20_000]
def train(dtype=None, masters=True, autocast=None, lr=1e-5, steps=48 if FAST else 96):
    "(model, optimiser, losses)"
    model, optimizer = tf.load("base-gpt-small")[0].to(dtype=dtype), tf.AdamW(lr, weight_decay=0)
    with mock.patch.object(tf.optim, "Rounded", tf.optim.Rounded if masters else tf.optim.Group):
        return model, optimizer, np.array(tf.fit(model, tf.data.lm_batches(code, 32, 8), steps, optimizer, autocast=autocast).losses)

runs = {"float32": train(), "with masters": train(bfloat16), "alone": train(bfloat16, masters=False)}
untouched = train(lr=1e-12)[2]
gain = {name: losses - untouched for name, (*_, losses) in runs.items()}
values = lambda model: np.concatenate([p.numpy().astype(float).ravel() for p in model.parameters()])
was, now = values(train(bfloat16, steps=0)[0]), values(runs["alone"][0])
small, large = (np.median(abs(was[(was != now) == moved])) for moved in (True, False))
print(f"alone, {np.mean(was != now):.0%} of the weights have moved: small ones, of {small:.0e}; the others are of {large:.0e}")
assert np.mean(was != now) < 0.1 and small < 0.1 * large
learnt = {name: -np.mean(g[-8:]) for name, g in gain.items()}
assert abs(learnt["with masters"] / learnt["float32"] - 1) < 0.1 and learnt["alone"] < 0.5 * learnt["float32"]

def draw(ax, curves, x, y):
    for name, curve in curves.items():
        ax.plot(np.convolve(curve, np.ones(8) / 8, "valid"), color=COLOURS[name], lw=4 if name == "float32" else 1.6, label=name)
    ax.set(xlabel=x, ylabel=y)
    ax.legend(fontsize=8)
fig, ax = figure(1, 2.2)
draw(ax, gain, "step", "loss less the untouched model's")
show("bfloat16 with master weights learns as float32 does. Without, a twentieth of the weights does all the learning.")
# %% [markdown]
# ## Gradients
# float16 begins at $6 \cdot 10^{-8}$; what is below half of that becomes 0. So the loss is multiplied by $S$, all gradients with it, and before
# the update they are divided by $S$. "Most would be lost", one often reads. It depends: the loss is a mean over $N$ tokens, so what comes back
# to each carries $1/N$. **Predict first.** Of 512 tokens, what share is lost? Of half a million? How wrong are the weights' gradients then?
# %%
model, asked = train(steps=0)[0], tf.train.question(code[:16 * 33].reshape(16, 33))
def gradients(S, autocast="float16"):
    "(what comes back to tensors in float16, before it is rounded; the gradient of the weights), divided by S."
    met = []
    def pull(node, g, real=tf.tensor.Record.pull):
        for p, back in real(node, g):
            met.append(np.abs(back).ravel()[::8] if p.dtype == np.float16 else [])
            yield p, back
    model.zero_grad()
    with mock.patch.object(tf.tensor.Record, "pull", pull), np.errstate(all="ignore"):
        with tf.autocast(autocast or "float16", enabled=autocast is not None):
            loss = tf.train.objective(model, asked)[1]
        (loss * S).backward()
    return np.concatenate(met) / S, np.concatenate([p.grad.ravel() for p in model.parameters()]) / S

exact, scales = gradients(1, None)[1], 2.0**np.arange(-15, 26, 5)
error = lambda g: np.linalg.norm(g - exact) / np.linalg.norm(exact)
errors, brain, found = [error(gradients(S)[1]) for S in scales], error(gradients(1, "bfloat16")[1]), gradients(2.0**16)[0]
lost = lambda S: np.mean(found[found > 0] * S < 2.0**-25)
print(f"lost of 512 tokens: {lost(1):.0%};  of 524,288, each 1/1024 as large: {lost(2**-10):.0%};  with S = 65,536: {lost(2**16):.0%}")
print(f"the weights' gradient is off by {errors[3]:.2%};  {errors[1]:.0%};  {errors[6]:.2%};   in bfloat16 {brain:.2%}")
assert 0.1 < lost(1) < 0.5 < lost(2**-10) and errors[6] < errors[3] < brain < errors[1] and not np.isfinite(errors[-1])
fig, (left, right) = figure(2, 2.6)
left.axvspan(2**-24, 65504, color=GREY, alpha=0.4, lw=0)
for S, colour, name in ((1, RED, "g"), (2**16, BLUE, "65,536 g")):
    left.hist(found[found > 0] * S, bins=2.0**np.arange(-50, 20), histtype="step", color=colour, label=name)
left.set(xscale="log", xlabel="a gradient's size; grey: float16", yticks=[], ylabel="how many")
right.loglog(scales, errors, "o-", ms=3, color=RED, label="float16")
right.axhline(brain, color=BLUE, label="bfloat16, S = 1")
right.axvspan(scales[-2] * 2, 1e8, color=GREY, alpha=0.4, lw=0)
right.set(xlim=(1e-5, 1e8), xlabel="S; grey: overflow", ylabel="error of the gradient")
left.legend(fontsize=8), right.legend(fontsize=8)
show("Left: S moves gradients into the window. Right: where it is too small they are lost, where too large infinite.")
# %% [markdown]
# ## Who computes in what, and who finds S
# bfloat16 loses nothing, but has three digits less. `autocast` says for every op what it computes in. A `GradScaler` finds $S$ by trying:
# a step whose gradients are not finite is skipped and $S$ halved; after so many good ones (here 8, usually 2,000) it is doubled.
# %%
print("16 bits:", *sorted(tf.precision.PRODUCTS), "\nfloat32:", *sorted(tf.precision.SUMS | tf.precision.LOSSES), "\nas they come: all others")
model, optimizer, scaler = train(steps=0)[0], tf.AdamW(1e-3, weight_decay=0), tf.GradScaler(2.0**22, growth_interval=8)
optimizer.start(model.named_parameters())
batches, S, skipped, losses = iter(tf.data.lm_batches(code, 32, 8)), [], [], []
for step in range(24 if FAST else 40):
    with tf.autocast("float16"):
        loss = tf.train.objective(model, tf.train.question(next(batches)))[1]
    with np.errstate(all="ignore"):
        scaler.scale(loss).backward()
        norm = scaler.step(optimizer, clip=1.0)
    S.append(scaler.get_scale())
    skipped += [step] * (not np.isfinite(norm))
    scaler.update()
    optimizer.zero_grad()
    losses.append(loss.item())
curves = {name: train(autocast=to, lr=1e-3, steps=len(S))[2] for name, to in (("float32", None), ("bfloat16", "bfloat16"))} | {"float16": losses}
assert skipped[0] == 0 and S[1] == S[0] / 2 and max(np.diff(S)) > 0
assert all(abs(np.mean(c[-8:]) / np.mean(curves["float32"][-8:]) - 1) < 0.03 for c in curves.values())
fig, (left, right) = figure(2, 2.6)
left.semilogy(S, color=RED, base=2)
left.semilogy(skipped, np.array(S)[skipped], "kx", ms=5, label="skipped", base=2)
left.set(xlabel="step", ylabel="S")
left.legend(fontsize=8)
draw(right, curves, "step", "loss, mean of 8")
show("Left: too large an S is soon found out. Right: three ways to compute, one curve.")
# %% [markdown]
# ## What it costs
# %%
runs["autocast"] = train(autocast="bfloat16")
print(f"{'bytes per weight':20}weights   gradients   optimiser    all   loss gained")
for name, (model, optimizer, losses) in runs.items():
    with tf.autocast(enabled=name == "autocast"):
        loss = tf.train.objective(model, asked)[1]
    loss.backward()
    size = lambda arrays: sum(a.nbytes for a in arrays) / sum(p.size for p in model.parameters())
    parts = [size(p.data for p in model.parameters()), size(p.grad for p in model.parameters()), size(optimizer.kept().values())]
    print(f"{name:20}{parts[0]:7.1f}{parts[1]:12.1f}{parts[2]:12.1f}{sum(parts):7.1f}{np.mean((losses - untouched)[-8:]):14.2f}")
    assert round(sum(parts)) == (8 if name == "alone" else 16)
