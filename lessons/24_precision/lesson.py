# %% [markdown]
# # 24 Sixteen bits
# **Minutes:** 60, with the exercises 100. **Prerequisites:** 01, 02, 03. **Exercises:** cast_inputs, reclaim_values, update
#
# Half the bits are half the memory and half the traffic, and tensor cores multiply them several times as fast. What is lost, and what helps?
# The answer in one line: **16 bits are for keeping and for multiplying, float32 is for adding up.** NumPy rounds what an op gives as a GPU does.
# ## What 16 bits can hold
# A number is a sign and $2^{e} (1 + f)$. The bits of $e$ buy range, those of $f$ digits: float16 has 5 and 10 of them, bfloat16 8 and 7 (float32: 8
# and 23). The bit patterns of the positive numbers are in order. So count from 0 up to infinity, and here are all numbers there are.
#
# **Predict first.** Which number follows 256 in bfloat16?
# %%
from unittest import mock

import numpy as np

import tinyft as ft
from tinyft.array import bfloat16
from tinyft.learn.draw import figure
from tinyft.learn.lessons import quote, show

HALVES = {"bfloat16": bfloat16, "float16": np.dtype(np.float16)}
COLOUR = {"float32": "#bbbbbb", "bfloat16": "#4477aa", "float16": "#cc6677", "with masters": "#228833", "alone": "#cc6677"}

fig, (left, right) = figure(2, 2.4)
for row, (name, dtype) in enumerate(HALVES.items()):
    grid = np.arange(np.array(np.inf, dtype).view(np.uint16), dtype=np.uint16).view(dtype).astype(float)
    after = {x: grid[grid > x][0] for x in (0, 1, 256)}
    print(f"{name:9} smallest {after[0]:.0e}   largest {grid[-1]:.3g}   after 1: {after[1]:.4f}   after 256: {after[256]:g}")
    left.vlines(grid[(grid > 0.99) & (grid < 1.02)], row - 0.3, row + 0.3, color=COLOUR[name], lw=1)
    right.loglog(grid[1:-1], np.diff(grid)[1:] / grid[1:-1], color=COLOUR[name])
assert after == {0: 2**-24, 1: 1 + 2**-10, 256: 256.25} and grid[-1] == 65504
left.set(yticks=[0, 1], yticklabels=HALVES, xlabel="all numbers near 1")
right.set(xlim=(1e-10, 1e8), ylim=(1e-4, 2), xlabel="x", ylabel="gap after x, over x")
show("bfloat16 (blue) has few digits, as far as float32 reaches. float16 (red) has more of them, in a window.")
# %% [markdown]
# ## Adding up
# It is 258. So 256 + 1 lies halfway, and is rounded to 256, whose last bit is even. **Predict first.** Where does a sum of 4,096
# ones end? Where a weight of 1, if each of 1,000 steps takes a thousandth of it away?
# %%
for name, dtype in {"float32": np.dtype(np.float32), **HALVES}.items():
    total, weight = np.cumsum(np.ones(4096, dtype), dtype=dtype)[-1], dtype.type(1)
    for _ in range(1000):
        weight -= weight / dtype.type(1000)
    print(f"{name:9} sum {float(total):4.0f}   weight {float(weight):.3f}")
    assert total == {"float32": 4096, "bfloat16": 256, "float16": 2048}[name] and (weight == 1) == (name == "bfloat16")
assert ft.ops.sum(ft.Tensor(np.ones(4096, bfloat16))).item() == 4096         # the library adds up in float32 and rounds once
# %% [markdown]
# ## Weights that train
# So of tensors in 16 bits our optimisers keep the values in float32: **master weights**. They step there, and show the tensors rounded.
# We teach a small GPT of prose some Python at a small rate, with masters and without. **Predict first.** Without them, does nothing move?
# %%
quote(ft.optim.master.MasterWeights.lay_out)
code = ft.data.pretraining("source", "valid")[:20_000]
def train(dtype=None, masters=True, autocast=None, lr=1e-5, steps=96):
    model, optimizer = ft.load("base-gpt-small")[0].to(dtype=dtype), ft.AdamW(lr, weight_decay=0)
    kind = ft.optim.master.MasterWeights if masters else ft.optim.buffers.Group
    with mock.patch.object(ft.optim.optimizers, "MasterWeights", kind):
        return model, optimizer, np.array(ft.fit(model, ft.data.lm_batches(code, 32, 8), steps, optimizer, autocast=autocast).losses)
runs = {"float32": train(), "with masters": train(bfloat16), "alone": train(bfloat16, masters=False)}
untouched = train(lr=1e-12)[2]
gain = {name: untouched - losses for name, (*_, losses) in runs.items()}     # batch by batch
was, now = (np.concatenate([p.numpy().astype(float).ravel() for p in m.parameters()]) for m in (train(bfloat16, steps=0)[0], runs["alone"][0]))
small, large = (np.median(abs(was[(was != now) == moved])) for moved in (True, False))
print(f"alone, {np.mean(was != now):.0%} of the weights have moved: small ones, of {small:.0e}; the others are of {large:.0e}")
assert np.mean(was != now) < 0.1 and small < 0.1 * large and sum(gain["with masters"]) > 0.8 * sum(gain["float32"]) > 8 * sum(gain["alone"])
def draw(ax, curves, y):
    for name, curve in curves.items():
        ax.plot(np.convolve(curve, np.ones(8) / 8, "valid"), color=COLOUR[name], lw=4 if name == "float32" else 1.6, label=name)
    ax.set(xlabel="step", ylabel=y)
    ax.legend(fontsize=8)
draw(figure(1, 2.2)[1], gain, "gain (nats)")
show("What the loss has gained. With masters bfloat16 goes as far as float32, once steps have added up enough to be seen. Alone it hardly moves.")
# %% [markdown]
# ## Gradients
# float16 begins at $6 \cdot 10^{-8}$; what is below half of that becomes 0. So the loss is multiplied by $S$, all gradients with it, and before
# the update they are divided by $S$. "Most would be lost", one often reads. It depends: the loss is a mean over $N$ tokens, so what comes back to
# each carries $1/N$; 1,024 times as many tokens are like $S = 1/1024$. **Predict first.** Of 512 tokens, what share is lost? Of half a million?
# %%
model, asked = train(steps=0)[0], ft.train.batch.read_batch(code[:16 * 33].reshape(16, 33))
def gradients(S, to="float16"):
    "(what comes back to tensors in float16, before it is rounded; the gradient of the weights, in float32), divided by S."
    met, rounded = [], ft.precision.rounded
    def note(a, to):
        met.append(abs(a).ravel() if to == np.float16 else [])
        return rounded(a, to)
    model.zero_grad()
    with ft.autocast(to, enabled=to != "float32"):
        loss = ft.train.batch.compute_loss(model, asked)[1]
    with mock.patch.object(ft.precision, "rounded", note), np.errstate(all="ignore"):
        (loss * S).backward()
    return np.concatenate([[], *met]) / S, np.concatenate([p.grad.ravel() for p in model.parameters()]) / S
exact, scales = gradients(1, "float32")[1], 2.0**np.arange(-15, 26, 5)
error = lambda g: np.linalg.norm(g - exact) / np.linalg.norm(exact)
errors, in_bfloat16, found = [error(gradients(S)[1]) for S in scales], error(gradients(1, "bfloat16")[1]), gradients(2.0**15)[0]
lost = lambda S, least=2.0**-24: np.mean(found[found > 0] * S < least / 2)
print(f"lost of 512 tokens {lost(1):.0%};  of 524,288 {lost(2**-10):.0%};  with S = 32,768 {lost(2**15):.0%};  in bfloat16 {lost(1, 2**-133):.0%}")
print(f"the weights' gradient is off by {errors[3]:.2%};  {errors[1]:.0%};  {errors[6]:.2%};  {in_bfloat16:.2%}")
assert 0.2 < lost(1) < 0.5 < lost(2**-10) and errors[6] < errors[3] < in_bfloat16 < errors[1] and not np.isfinite(errors[-1])
fig, (left, right) = figure(2, 2.6)
left.axvspan(2**-24, 65504, color=COLOUR["float32"], alpha=0.4, lw=0)
for S, colour, name in ((1, COLOUR["float16"], "g"), (2**15, "black", "32,768 g")):
    left.hist(found[found > 0] * S, bins=2.0**np.arange(-50, 20), histtype="step", color=colour, label=name)
left.set(xscale="log", xlabel="a gradient's size; grey: float16", yticks=[], ylabel="how many")
right.loglog(scales, errors, "o-", ms=3, color=COLOUR["float16"], label="float16")
right.axhline(in_bfloat16, color=COLOUR["bfloat16"], label="bfloat16, S = 1")
right.set(xlabel="S, up to where gradients overflow", ylabel="error of the gradient")
left.legend(fontsize=8), right.legend(fontsize=8)
show("Left: S moves gradients into float16's window. Right: with too small an S the gradient of the weights is wrong.")
# %% [markdown]
# ## Who computes in what, and who finds S
# bfloat16 loses none; but it has three bits less, and is off by ten times as much. `autocast` says for every op what it computes in. A `GradScaler`
# tries: a step whose gradients overflow is skipped, and $S$ halved; after so many good ones (here 8, usually 2,000) it is doubled. This is the loop
# that `fit(..., autocast="float16")` goes through.
# %%
print("16 bits:", *sorted(ft.precision.PRODUCTS), "\nfloat32:", *sorted(ft.precision.SUMS | ft.precision.LOSSES), "\nas they come: all others")
model, scaler, seen = train(steps=0)[0], ft.GradScaler(2.0**22, growth_interval=8), []
optimizer = ft.AdamW(1e-3, weight_decay=0).start(model.named_parameters())
for _, batch in zip(range(32), ft.data.lm_batches(code, 32, 8)):
    with ft.autocast("float16"):
        loss = ft.train.batch.compute_loss(model, ft.train.batch.read_batch(batch))[1]
    with np.errstate(all="ignore"):
        scaler.scale(loss).backward()
        norm = scaler.step(optimizer, clip=1.0)                              # divides by S, clips, updates; or skips
    seen.append((scaler.get_scale(), norm, loss.item()))
    optimizer.zero_grad()
    scaler.update()
S, norms, losses = np.array(seen).T
curves = {to or "float32": train(autocast=to, lr=1e-3, steps=32)[2] for to in (None, "bfloat16")} | {"float16": losses}
assert norms[0] == np.inf and S[1] == S[0] / 2 and max(np.diff(S)) > 0 and abs(curves["bfloat16"] - curves["float32"]).max() < 0.1
fig, (left, right) = figure(2, 2.4)
left.semilogy(range(32), S, "k", range(32), np.where(norms == np.inf, S, np.nan), "rx", base=2)
left.set(xlabel="step", ylabel="S;  × skipped")
draw(right, curves, "loss, mean of 8 steps")
show("Left: S is found by trying. Right: bfloat16 lies on float32; float16 is behind by the steps that it skipped at the start.")
# %% [markdown]
# ## What it costs
# A float32 weight takes 16 bytes: itself, gradient, two moments. With masters 2 + 4 + 12: gradients are for adding up. Under autocast 16, and in
# passing 2 for a rounded copy. What can be saved is traffic, and part of what a pass keeps for the way back. **Predict first.** On NumPy?
# %%
runs["autocast"], rows = train(autocast="bfloat16"), []
print("bytes per weight    weights   gradients   optimiser   MB, one pass   gain (nats)")
for name, (model, optimizer, losses) in runs.items():
    with ft.peak_memory() as peak, ft.autocast(enabled=name == "autocast"):
        ft.train.batch.compute_loss(model, asked)[1].backward()
    arrays = [p.data for p in model.parameters()], [p.grad for p in model.parameters()], [a for k, a in optimizer.state_dict().items() if k != "step"]
    rows.append([*(sum(a.nbytes for a in some) / was.size for some in arrays), peak["bytes"] / 1e6, np.mean((untouched - losses)[-8:])])
    print("{:16}{:9.1f}{:12.1f}{:12.1f}{:13.1f}{:15.2f}".format(name, *rows[-1]))
assert [round(sum(row[:3])) for row in rows] == [16, 18, 10, 16] and min(row[3] for row in rows) == rows[0][3]
# %% [markdown]
# Nothing is saved: NumPy has no products of 16 bits, computes in float32 inside and holds both. No speed was measured here, on no device.
# **Exercises.** `tinyft start cast_inputs` (autocast's rule), `tinyft start reclaim_values` (masters), `tinyft start update` (who finds $S$).
