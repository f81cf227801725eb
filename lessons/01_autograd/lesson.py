# %% [markdown]
# # 01 Tensors and autograd
#
# **Minutes:** 30, with the exercises two hours. **Prerequisites:** Python, NumPy, the chain rule.
# **Exercises:** sum_to, matmul, softmax, layer_norm, topological, backward
#
# Training asks one question over and over: if this number moves a little, how does the loss move? A small language model has
# 200,000 such numbers. Moving each in turn costs 200,000 passes. Reverse mode answers for all in one walk back.

# %%
import tracemalloc

import numpy as np

import tinyft as ft
from tinyft.learn.draw import figure
from tinyft.learn.lessons import quote, show
from tinyft.tensor import topological

# %% [markdown]
# ## A tensor remembers how it was made
# **Predict first:** $x = 2$, $u = 3x$, $v = u \cdot u$, $y = u + v$. What is $dy/dx$? Note that $u$ is used three times.

# %%
x = ft.Tensor(np.array(2.0), requires_grad=True)
u = x * 3.0
v = u * u
y = u + v
y.backward(retain_graph=True)
print(f"y = {y.item()}   dy/dx = {x.grad}")
assert x.grad == 39                                        # dy/du = 1 + 2u = 13, du/dx = 3

# %% [markdown]
# Every operation gives back its value and its **pullbacks**: for each input, a function that takes the gradient $g$ of the output
# back to that input. Two of them, as the library has them, and what $y$ remembers, inputs before outputs:

# %%
quote(ft.ops.mul)
quote(ft.ops.tanh)
print([getattr(node, "name", "leaf") for node in topological(y)])

# %% [markdown]
# ## The order of the walk
# The walk starts at $y$ with the gradient 1. At each node it calls the pullbacks and **adds** what they give to the inputs'
# gradients. A node may be passed only when everything that used it has been passed: then its gradient is complete.
#
# **Predict first:** what comes out at $x$ if $u$ is passed as soon as $y$ has reached it, before $v$? And how many paths lead back
# through a chain of 14 doublings, $u$ to $u + u$, if each piece of gradient is passed on by itself as it comes?

# %%
def walk(order):
    grads = {id(order[0]): 1.0}
    for node in order:
        for parent, g in node.pull(np.array(grads[id(node)])):
            grads[id(parent)] = grads.get(id(parent), 0.0) + float(g)
    return grads[id(x)]
def by_paths(node, g):
    return sum(1 + by_paths(p, gp) for p, gp in node.pull(g)) if node is not x else 0

print("in the order y, v, u:", walk([y.node, v.node, u.node]), "    y, u, v:", walk([y.node, u.node, v.node]))
assert walk([y.node, v.node, u.node]) == 39 and walk([y.node, u.node, v.node]) == 3      # the 12 that came through v is lost
y = x
for _ in range(14):
    y = y + y
paths, once = by_paths(y.node, np.array(1.0)), sum(2 for node in topological(y) if node is not x)      # a sum has two pullbacks
print(f"pullbacks called for 14 doublings: {paths:,} along the paths, {once} in topological order")
assert paths == 2**15 - 2 and once == 28

# %% [markdown]
# ## Broadcasting goes back as a sum
# NumPy repeats a small array to fit a large one. Each copy has a gradient; the small array gets their **sum**, in its own shape.
# **Predict first:** the shapes of the two gradients, and their entries.

# %%
column, row = (ft.Tensor(np.ones(shape), requires_grad=True) for shape in ((3, 1), (4,)))
(column * 2.0 + row).sum().backward()
print("column", column.grad.tolist(), "   row", row.grad.tolist())
assert column.grad.shape == (3, 1) and (column.grad == 8).all() and (row.grad == 3).all()

# %% [markdown]
# ## A check that can fail
# Is a pullback right? Take a random direction $d$ of the input and random weights $g$ of the output: the slope
# $g \cdot (f(x + hd) - f(x - hd)) / 2h$ must be $d \cdot$ grad. Many tests take `.sum()`, weights of 1. For softmax they are blind:
# each row adds up to 1 whatever $x$ is, so the true gradient is 0, and a pullback that gives back zeros would pass.

# %%
rng, f = np.random.default_rng(0), ft.ops.softmax
d, g, x = *rng.normal(size=(2, 3, 5)), ft.Tensor(rng.normal(size=(3, 5)), requires_grad=True)
f(x).sum().backward()
blind, x.grad = abs(x.grad).max(), None
f(x).backward(g)
slope = (g * (f(x.data + 1e-5 * d).data - f(x.data - 1e-5 * d).data)).sum() / 2e-5
print(f"through .sum(): {blind:.1f}   random weights: {(x.grad * d).sum():.3f}, small steps say {slope:.3f}")
assert blind < 1e-15 and abs((x.grad * d).sum() - slope) < 1e-8 < abs(slope)

# %% [markdown]
# ## A model of a million letters
# The text that comes with tinyft, as 26 letters and a blank for all else. The model is a table $W$ of scores: row $a$ says what
# follows $a$. Its loss is the mean of $-\ln p$ over all pairs. Counting gives the best possible table, so we know where to arrive.

# %%
text = " ".join(r.text for r in ft.data.snapshot() if (r.kind, r.split) == ("prose", "train")).lower()
codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
ids = np.where((codes >= 97) & (codes <= 122), codes - 96, 0).astype(int)
share = np.bincount(ids[:-1] * 27 + ids[1:], minlength=27 * 27).reshape(27, 27) / (len(ids) - 1)      # of each pair
rows = share.sum(axis=1, keepdims=True)
best = -(share * np.log(np.where(share, share / rows, 1))).sum()
W, losses = ft.Tensor(np.zeros((27, 27)), requires_grad=True), []
for _ in range(300):
    p = ft.ops.softmax(W)
    loss = -(share * p.log()).sum()
    loss.backward()
    assert np.allclose(W.grad, rows * p.data - share)      # what the model expects, less what it saw
    losses.append(loss.item())
    W = ft.Tensor(W.data - 40 * W.grad, requires_grad=True)
print(f"{len(ids):,} letters; the loss begins at {losses[0]:.2f} = ln 27 and ends at {losses[-1]:.2f}; counting: {best:.2f}")
assert best < losses[-1] < 1.01 * best and p.data[17].argmax() == 21      # q, u
fig, (left, right) = figure(2, height=3.1)
left.plot(losses)
left.axhline(best, color="0.5", ls="--", lw=1)
left.set(xlabel="step", ylabel="loss", title="the loss; dashed: counting")
right.imshow(p.data, cmap="Blues", vmax=0.6)
right.set(xlabel="next letter", ylabel="letter", title="what the model learned")
for ticks in (right.set_xticks, right.set_yticks):
    ticks(range(27), list("␣abcdefghijklmnopqrstuvwxyz"), fontsize=6)
show("Left: the loss comes down to what counting gives. Right: the table; q is followed by u.")

# %% [markdown]
# ## What it costs, and where it stops
# Records hold the arrays their pullbacks need, so training keeps what the forward pass made. What is **frozen** has no pullback and
# costs no product going back. Two layers, $\tanh(xA)B$, two products forward, 1,000 rows.
# **Predict first:** which keeps the least memory: training $A$ alone, $B$ alone, or both?

# %%
print("trains    numbers   pullbacks   products going back   kept")
for trained in ("", "B", "A", "AB", "xAB"):
    x, A, B = (ft.Tensor(rng.normal(size=size), name in trained) for name, size in (("x", (1000, 27)), ("A", (27, 64)), ("B", (64, 27))))
    tracemalloc.start()
    y = (x @ A).tanh() @ B
    kept = tracemalloc.get_traced_memory()[0] - y.data.nbytes
    tracemalloc.stop()
    pulls = [n.name for n in topological(y) if not isinstance(n, ft.Tensor) for _ in n.pulls]
    numbers, products = sum(t.size for t in (x, A, B) if t.requires_grad), pulls.count("matmul")
    print(f"{trained or 'nothing':<9}{numbers:>8,}{len(pulls):>12}{products:>22}{kept / 1e3:>7.0f} kB")
    assert products == len(trained) + ("A" in trained) and (kept > 64_000 * 8) == bool(trained)

# %% [markdown]
# All keep the same: $B$ and tanh both need $\tanh(xA)$. Freezing saved products, not memory. The walk costs at most twice the products
# of the forward pass, for 10 numbers or 30,000. It gives first derivatives only, at one point.
# **Exercises:** `tinyft start sum_to`, `tinyft start matmul`, `tinyft start softmax`, `tinyft start layer_norm`,
# `tinyft start topological`, `tinyft start backward`
