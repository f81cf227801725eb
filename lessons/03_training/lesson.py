# %% [markdown]
# # 03 Training
# **Minutes:** 60. **Prerequisites:** 01, 02. **Exercises:** cross_entropy, adam_update, clip_norm, cosine_schedule
#
# A gradient says which way the loss falls. The plain way to use it, $\theta \leftarrow \theta - \eta g$, hardly trains a transformer. Here we see
# why, derive Adam, and go through what else stands in a training loop: clipping, warm-up, decay, accumulation, and where the memory goes.
# ## One rate for every direction
# The smallest hard problem is a valley, $\ell = \frac12 (u_1^2 + 100\, u_2^2)$. A step of rate $\eta$ multiplies $u_1$ by $1 - \eta$ and $u_2$ by
# $1 - 100\,\eta$. So the steep direction allows rates up to $2/100$, and at such a rate the flat one keeps 98 % of its error in every step.
# **Predict first.** With $\eta = 0.019$, after how many steps has $u_1$ halved? And what if the loss had other units, and were 1000 times as large?
# %%
import os

import numpy as np

import tinyft as ft
from tinyft.learn.draw import figure
from tinyft.learn.lessons import quote, show

FAST, (BLUE, RED, GREEN, GREY) = "TINYFT_FAST" in os.environ, ("#4477aa", "#cc6677", "#228833", "#999999")
TURN, height = np.array([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5, lambda u: (u * u) @ [0.5, 50.0]      # by 45 degrees;  the loss
def drive(optimizer, gradient, steps, start, clip=None):
    "The places a weight comes through from `start`, if its gradient at place w and step t is gradient(w, t)."
    w, path = ft.Parameter([start]), [start]
    optimizer.start({"w": w})
    for t in range(steps):
        w.grad = np.reshape(gradient(w.numpy()[0], t), w.shape)
        optimizer.step(clip=clip)
        path.append(w.numpy()[0].copy())
    return np.array(path)
valley = lambda optimizer, axes=np.eye(2), k=1.0: drive(optimizer, lambda w, t: k * axes @ ([1.0, 100.0] * (w @ axes)), 80, axes @ [-2.0, 1.0])
sgd, faster, adam, turned = valley(ft.SGD(0.019)), valley(ft.SGD(0.021)), valley(ft.Adam(0.05)), valley(ft.Adam(0.05), TURN)
print("SGD halves u1 in", np.argmax(abs(sgd[:, 0]) <= 1), "steps; at a rate of 0.021 it leaves the valley, u2 =", faster[-1, 1].round())
assert np.allclose(valley(ft.Adam(0.05), k=1000.0), adam, atol=1e-4)               # Adam does not see the units
assert height(adam[-1]) < height(sgd[-1]) < height(turned[-1] @ TURN) and abs(faster[-1, 1]) > 1000
fig, panels = figure(3, 2.4)
grid = np.stack(np.meshgrid(np.linspace(-2.4, 0.6, 80), np.linspace(-1.9, 1.3, 80)), -1)
for ax, path, axes, title in zip(panels, (sgd, adam, turned), (np.eye(2), np.eye(2), TURN), ("SGD", "Adam", "Adam, turned by 45°")):
    ax.contour(*grid.transpose(2, 0, 1), height(grid @ axes), levels=[1, 5, 20, 60, 120], colors=GREY, linewidths=0.6)
    ax.plot(*path.T, ".-", color=RED if path is sgd else BLUE, lw=0.8, ms=3)
    ax.plot(0, 0, "k+")
    ax.set(title=title, xlabel="$w_1$", ylabel="$w_2$" if path is sgd else "")
show("80 steps towards the cross. Adam needs no common rate, but its rates belong to the coordinates.")
# %% [markdown]
# ## Adam, derived
# A step should have the length $\eta$ whatever the units of $g$: divide $g$ by its own size, entry by entry. Batches are noisy, so take running
# means, of $g$ for the direction and of $g^2$ for the size. They start at zero: if $g$ stays, $m_t = (1-\beta_1^t)\,g$, so divide by that.
# $$m \leftarrow \beta_1 m + (1-\beta_1) g, \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
# \theta \leftarrow \theta - \eta\, \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \varepsilon}$$
# So every *coordinate* has its own rate. In the turned valley no coordinate is flat, and Adam has no more to offer than SGD.
#
# **Predict first.** Leave the corrections out. Are the first steps too short, "because the means start at zero", as one often reads?
# %%
class Uncorrected(ft.AdamW):
    def update(self, group, lr):
        ft.optim.optimizers.adam_update(group.w, group.g, *group.moments, lr, *self.betas, self.eps, group.decay, t=10**9)
steps = -np.diff(drive(Uncorrected(1.0, weight_decay=0), lambda w, t: [1e-3, 1.0, 1e3], 60, [0.0] * 3), axis=0)
print("uncorrected steps, in rates: first", steps[0].round(1), " longest", steps.max().round(1), "at t =", steps[:, 1].argmax() + 1)
assert np.allclose(steps, steps[:, :1], rtol=1e-3) and steps.min() > 3 and steps.max() > 6       # v starts at zero too, and √v is the divisor
# %% [markdown]
# They are too *long*, up to 6.6 times. Now a real model: a GPT of two layers learns 32 pieces of real text by heart. It gives scores for the next
# token at every place, and the loss is their cross-entropy, $\ln 2048 = 7.6$ at first. The rates of SGD are the best of several tried.
# %%
text = ft.data.pretraining("prose", "valid")
def train(optimizer, schedule=None, clip=None):
    model = ft.GPT(ft.GPTConfig(vocab=2048, positions=64, width=32, layers=2, heads=2), seed=0)
    return model, optimizer, ft.fit(model, ft.data.lm_batches(text[:1024], 32, 16), 32 if FAST else 48, optimizer, schedule, clip=clip).losses
runs = {"SGD": train(ft.SGD(1.0)), "with momentum": train(ft.SGD(0.3, momentum=0.9)), "uncorrected AdamW": train(Uncorrected(0.005)),
        "AdamW": train(ft.AdamW(0.005)), "warm-up and clip": train(ft.AdamW(0.01), ft.constant_schedule(warmup=5), clip=1.0)}
final = [float(np.mean(losses[-4:])) for _, _, losses in runs.values()]
assert final[4] + 0.3 < final[3] < min(final[:3]) - 0.1
model, adam, _ = runs["AdamW"]                                                         # one step more, watched
ft.train.batch.compute_loss(model, ft.train.batch.read_batch(text[:1024].reshape(32, 32)))[1].backward()
named, size = {n: p for n, p in model.named_parameters().items() if "k.bias" not in n}, lambda a: float((a**2).mean()**0.5)
before = {n: p.numpy().copy() for n, p in named.items()}                               # the keys' bias has no gradient: softmax takes it out
adam.step()
gradients, moves = zip(*sorted((size(p.grad), size(p.numpy() - before[n]) / adam.lr) for n, p in named.items()))
assert max(gradients) / min(gradients) > 50 and max(moves) / min(moves) < 30
fig, panels = figure(2)
for (name, (*_, losses)), colour in zip(runs.items(), (GREY, RED, GREEN, BLUE, "black")):
    panels[0].plot(losses, color=colour, label=name)
panels[0].set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, 8))
panels[1].semilogy(gradients, ".", color=RED, label="gradient")
panels[1].semilogy(moves, ".", color=BLUE, label="Adam's step, in rates")
panels[1].set(xlabel="tensors of the GPT, by gradient", ylabel="root mean square")
for ax, where in zip(panels, ("lower left", "lower right")):
    ax.legend(fontsize=8, loc=where)
show(f"The same problem for all, and the reason: from tensor to tensor gradients differ by a factor of {max(gradients) / min(gradients):.0f}.")
# %% [markdown]
# ## The rest of the loop
# **Clipping.** Adam does not see units; clipping is for the odd batch. $v$ remembers one gradient of 1000 for a thousand steps. Clipping
# scales *all* gradients by one factor, so that their common norm is at most `clip`, and the direction stays. **Warm-up**: short steps while $v$ rests
# on few batches; without it the rate 0.01 sticks at 5 nats with some seeds. **Decay**: AdamW takes $\eta\lambda\theta$ off a weight. In
# the gradient ("L2", `ft.Adam`) it is divided by $\sqrt v$ like all else, and weights with large gradients hardly decay. For SGD the two are one.
# **Predict first.** A gradient of 1, and 1000 in step 50: how long is step 150? Two weights with noise of 0.01 and 10 for gradients: which decays?
# %%
clipped, free = (-np.diff(drive(ft.Adam(1.0), lambda w, t: 1000.0 if t == 50 else 1.0, 300, [0.0], clip)[:, 0]) for clip in (1.0, None))
noise = np.random.default_rng(0).standard_normal((500, 2)) * [0.01, 10.0]
decoupled, l2 = (drive(kind(1e-3, weight_decay=1.0), lambda w, t: noise[t], 500, [1.0, 1.0])[-1] for kind in (ft.AdamW, ft.Adam))
print(f"step 150, in rates: {free[150]:.3f}, with clipping {clipped[150]:.3f};  weights from 1 to: AdamW {decoupled.round(2)}, L2 {l2.round(2)}")
both = [np.array([30.0]), np.array([40.0])]
assert ft.optim.clip_norm(both, 1.0) == 50 and np.allclose(both, [[0.6], [0.8]])       # one factor for both
assert free[150] < 0.05 and np.allclose(clipped, 1, atol=1e-3) and np.allclose(decoupled, 0.999**500, atol=0.1) and l2[0] < 0.7 and l2[1] > 0.85
# %% [markdown]
# **Accumulation.** A batch too large for memory goes through in parts, and gradients add up. The loss of a part is a mean over *its* labels. So one
# with 53 labels must not weigh as much as one with 98. The mean of the means is a common error. The library's step weights by labels:
# %%
quote(ft.train.loop.add_gradients)
sentences = [s for record in ft.data.snapshot()[:60] for s in ft.data.sentences(record.text)][:8]
ids, mask = ft.data.pad(sorted((e.ids for e in ft.data.shipped_tokenizer().encode_batch(sentences)), key=len))
gradients, labels = [], []
for half in (slice(0, 8), slice(0, 4), slice(4, 8)):                                   # all; the short ones; the long ones
    part = ft.train.batch.read_batch({"ids": ids[half], "mask": mask[half]})
    model.zero_grad()
    ft.train.batch.compute_loss(model, part)[1].backward()
    gradients.append(np.concatenate([p.grad.reshape(-1) for p in model.parameters()]))
    labels.append(part.weight)
off = [float(np.linalg.norm(np.average(gradients[1:], 0, w) - gradients[0]) / np.linalg.norm(gradients[0])) for w in (labels[1:], [1, 1])]
print(f"parts of {labels[1:]} labels: weighted so, the gradient is off by {off[0]:.0e}; as a mean of means by {off[1]:.2f}")
assert off[0] < 1e-4 and off[1] > 0.02
# %% [markdown]
# ## Where the memory goes
# Adam holds 16 bytes for each number that trains: weight, gradient, two moments (not one, as one often reads). Activations are what the forward pass
# keeps for the backward pass. They grow with the batch; accumulation pays for one part. **Predict first.** 239,000 weights are 1 MB. And 8 texts?
# %%
model = ft.GPT(ft.GPTConfig(vocab=2048, positions=128, width=64, layers=2, heads=2))       # the smallest shipped GPT
count, rows, peaks = sum(p.size for p in model.parameters()), np.array([1, 2, 4, 8]), []
with ft.peak_memory() as state:
    ft.AdamW(1e-3).start(model.named_parameters())                                     # weights and moments; gradients come later
for B in [1, *rows]:                                                                   # the first is not measured: it fills caches
    with ft.peak_memory() as peak:
        ft.train.batch.compute_loss(model, ft.train.batch.read_batch(text[:B * 65].reshape(B, 65)))[1].backward()
    peaks.append(peak["bytes"] / 1e6)
assert abs(state["bytes"] / count - 12) < 0.5 and np.allclose(peaks[1:] / rows, peaks[-1] / 8, rtol=0.1) and peaks[-1] > 10 * 4e-6 * count
fig, panels = figure(2)
for lengths, colour, name in ((free, RED, "no clipping"), (clipped, BLUE, "clip = 1")):
    panels[0].semilogy(lengths, color=colour, label=name)
panels[0].set(xlabel="step", ylabel="Adam's step, in rates", title="one gradient of 1000, in step 50")
panels[1].plot(rows, peaks[1:], "o-", color=RED, label="one pass (mostly activations)")
panels[1].axhline(16e-6 * count, color=BLUE, label="weights, gradients, moments")
panels[1].set(xlabel="texts of 64 tokens in a batch", ylabel="MB", ylim=0, title=f"memory, {count:,} weights")
for ax in panels:
    ax.legend(fontsize=8)
show("Left: what clipping is for. Right: the batch fills the memory, not the weights.")
print(f"{'':20}{'rate':>6}   loss after {len(losses)} steps   bytes per weight for moments")
for (name, (_, optimizer, _)), loss in zip(runs.items(), final):
    moments = sum(a.nbytes for key, a in optimizer.state_dict().items() if key != "step")
    print(f"{name:20}{optimizer.lr:6g}{loss:11.2f}{moments / sum(p.size for p in runs[name][0].parameters()):22.0f}")
# %% [markdown]
# Where this stops: the text is learnt by heart; what a model says of other text is lesson 04.
# **Exercises.** `tinyft start cross_entropy` (where 1/N comes in), `tinyft start adam_update`, `tinyft start clip_norm`, `tinyft start cosine_schedule`.
