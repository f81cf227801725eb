# %% [markdown]
# # 08 LoRA
#
# **Reading:** 50 minutes. **You need:** lessons 01 to 04, matrices and their rank.
# **Exercises:** initial_factors, low_rank_branch, after, fold, low_rank_factors
# (about an hour and a quarter).
#
# Full fine-tuning writes a new value into every weight. So each task needs its own
# copy of the whole model, and training needs memory for a gradient and two moments of
# every weight. LoRA keeps the pretrained weights as they are. Beside a weight matrix
# it trains two thin matrices, whose product is the change.
#
# Does a change of the weights need all its entries? We first train without LoRA, look
# at the change, and then decide.

# %%
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import tinyft as ft
from tinyft.learn.draw import bars, curves, diagram, heat_map
from tinyft.learn.lessons import quote
from tinyft.methods.reparameterized import lora

STEPS = 30 if "TINYFT_FAST" in os.environ else 60
train_tokens = ft.data.pretraining("source", "valid")
test_tokens = ft.data.pretraining("source", "test")
python_test = ft.data.held_out_batches(test_tokens, 64, 32)
prose_tokens = ft.data.pretraining("prose", "test")
prose_test = ft.data.held_out_batches(prose_tokens, 64, 32)

# %% [markdown]
# The model is the small GPT of lesson 04. It learnt prose: documentation and
# comments. The new task is Python source code. For our few steps the text of the split
# `valid` is enough to train on, and it is read faster than `train`. We measure the
# perplexity on 32 rows of 64 tokens from the split `test`: lower is better.

# %%
base, tokenizer = ft.load("base-gpt-small")
print(f"prose:  {ft.perplexity(base, prose_test):6.1f}")
print(f"Python: {ft.perplexity(base, python_test):6.1f}")

# %% [markdown]
# Python is foreign to the model. One function trains a model on Python, always on the
# same batches of 8 rows with 64 tokens, and returns the perplexity.

# %%
def train_on_python(model, learning_rate, steps=STEPS):
    batches = ft.data.lm_batches(train_tokens, 64, 8)
    optimizer = ft.AdamW(learning_rate)
    ft.fit(model, batches, steps, optimizer, progress=False)
    return ft.perplexity(model, python_test)

# %% [markdown]
# ## The change that full training makes
# The model has two blocks. Each has six weight matrices: `q`, `k`, `v` and `o` of the
# attention, `up` and `down` of the feed-forward part. We train these twelve matrices
# and freeze everything else.

# %%
tuned, _ = ft.load("base-gpt-small")
matrices = []
for name, parameter in tuned.named_parameters().items():
    is_matrix = name.startswith("blocks.") and len(parameter.shape) == 2
    parameter.requires_grad = is_matrix
    if is_matrix:
        matrices.append(name)
dense_perplexity = train_on_python(tuned, learning_rate=2e-3)
print(f"{len(matrices)} matrices trained, Python: {dense_perplexity:.1f}")

# %% [markdown]
# Now the change itself. $\Delta W$ is the tuned matrix minus the pretrained one. For
# the query matrix of block 0 it has 64 × 64 entries.

# %%
tuned_weights = tuned.state_dict()
base_weights = base.state_dict()
changes = {}
for name in matrices:
    changes[name] = tuned_weights[name] - base_weights[name]
query = "blocks.0.attn.q.weight"
print(changes[query].shape, "largest entry:", abs(changes[query]).max().round(3))

# %% [markdown]
# A matrix of **rank 1** is one column times one row. Its 64 × 64 entries come from
# 128 numbers. Every matrix is a sum of such matrices. The **singular value
# decomposition** (SVD) finds the best sum: the first term comes as near to the matrix
# as one term can, the first two as near as two terms can, and so on. The size of a
# term is its *singular value*; the largest is the first. A matrix of rank $r$ needs
# only $r$ terms.
#
# **Predict first.** A 64 × 64 matrix has 64 singular values. The sum of their squares
# is the sum of all squared entries of $\Delta W$. How many of the 64 do we need to
# keep 90 % of that sum? (With rank 1 it would be 1. If all 64 were equal, it would be
# 58.)

# %%
sizes = np.linalg.svd(changes[query], compute_uv=False)
share = np.cumsum(sizes**2) / np.sum(sizes**2)
needed = 1 + int(np.argmax(share >= 0.9))                # argmax: the first True
print(f"{needed} of 64 singular values hold 90 % of the squares")
curves({"the change of the query matrix": share}, x=np.arange(1, 65),
       xlabel="number of singular values kept", ylabel="share of the squares",
       levels={"90 %": 0.9},
       caption="The change of the query matrix is spread over many terms.")

# %% [markdown]
# About twenty. So the change is *not* a matrix of low rank: with four terms we lose
# half of the sum of squares. But entries are not what we want. We want a low
# perplexity. So we ask the model.
#
# `low_rank_factors(M, r)` gives the best factors of rank $r$: a matrix $A$ with $r$
# rows and a matrix $B$ with $r$ columns, so that $B A$ is as near to $M$ as possible.
# It is the last exercise of this lesson.

# %%
def truncated(r):
    """The base plus the best change of rank r in each of the twelve matrices."""
    model, _ = ft.load("base-gpt-small")
    for name, parameter in model.named_parameters().items():
        if name in changes:
            A, B = lora.low_rank_factors(changes[name], r)
            parameter.copy_(base_weights[name] + B @ A)
    return ft.perplexity(model, python_test)

# %% [markdown]
# **Predict first.** Without the change the perplexity is 881, with the whole change
# it is about 145. What is it if we keep 1 of the 64 terms in each matrix? And with 4?

# %%
ranks = [1, 4, 16, 64]
cut = {r: truncated(r) for r in ranks}
for r, perplexity in cut.items():
    print(f"rank {r:2}: {perplexity:6.1f}")

# %% [check]
assert 10 < needed < 30 and 0.35 < share[3] < 0.65
assert 800 < ft.perplexity(base, python_test) < 960
assert cut[1] < 0.4 * 881 and cut[4] < 1.35 * cut[64]
assert abs(cut[64] - dense_perplexity) < 0.5

# %% [markdown]
# One term in 64 makes most of the difference, and four terms come close to the whole
# change. Section 1 of the LoRA paper (Hu et al. 2021) supposes "that the change in
# weights during model adaptation also has a low intrinsic rank". If you read this as
# *the change is a matrix of low rank*, it is false here. What is true: **a change of
# low rank is enough to do most of the work.**
#
# We cut the change *after* training. LoRA trains the factors from the start, and so
# never needs the full change.
#
# ## Two factors beside a layer
# A linear layer computes $y = x W^T$, with $W$ of the shape (out, in). LoRA leaves
# $W$ frozen and adds a branch:
#
# $y = x W^T + \frac{\alpha}{r} (x A^T) B^T$
#
# $A$ has the shape (r, in) and $B$ the shape (out, r). The number $r$ is the **rank**.
# You choose $r$ and $\alpha$, and then $\alpha/r$ is a constant, the *scale*. What it
# is for has its own section below. Only $A$ and $B$ train. In the picture $x$ has $T$
# rows, one for each token.

# %%
diagram(
    {"x": (0, 1, "x\n(T, in)", "data"),
     "W": (1.5, 0, "W   (out, in)\nfrozen"),
     "A": (0.9, 2, "A   (r, in)\ntrained", "trained"),
     "h": (1.65, 2, "(T, r)", "none"),
     "B": (2.4, 2, "B   (out, r)\ntrained", "trained"),
     "s": (3.1, 2, "× α/r"),
     "sum": (3.1, 0.9, "+"),
     "y": (3.9, 0.9, "y\n(T, out)", "data")},
    [("x", "W"), ("x", "A"), ("A", "h"), ("h", "B"), ("B", "s"), ("W", "sum"),
     ("s", "sum"), ("sum", "y")],
    caption="LoRA adds the lower path. The branch is narrow in the middle: r numbers "
            "for each token.")

# %% [markdown]
# In NumPy the formula is one line, the line of `y`. We use a layer with 6 inputs,
# 5 outputs, and rank 2.

# %%
rng = np.random.default_rng(0)
x = rng.normal(size=(3, 6))
W = rng.normal(size=(5, 6))
A = rng.normal(size=(2, 6))
B = rng.normal(size=(5, 2))
alpha = 4.0
r = A.shape[0]
y = x @ W.T + alpha / r * (x @ A.T) @ B.T
print("the result has the shape", y.shape)

# %% [markdown]
# We can also change the weight itself: $W + \frac{\alpha}{r} B A$. The result is the
# same, since $(B A)^T = A^T B^T$. Note the order: $B A$, not $A B$.

# %%
change = alpha / r * B @ A
difference = y - x @ (W + change).T
print(f"largest difference: {abs(difference).max():.0e}")
heat_map(change, values=".1f", xlabel="in", ylabel="out",
         caption="The change has 30 entries, but each row is a mixture of the same two "
                 "rows of A.")

# %% [markdown]
# **Parameters.** A matrix of 64 × 64 has 4,096 entries. With rank 4 the factors have
# $4 \cdot (64 + 64) = 512$. In a large model the difference is larger: for 4,096 ×
# 4,096 and rank 8 the factors have 65,536 entries instead of 16.8 million.
#
# The branch multiplies $x$ with $A$ first. So the large product $B A$ is never built
# during training, and no gradient of the size of $W$ either.
#
# In the library a change of one layer is an *edit*: a small module that stands beside
# the layer. The edit of LoRA is called `LowRank`. Here is how it is made.
# `initial_factors` gives the first values of $A$ and $B$, `array.asarray` puts them
# on the backend (NumPy or a GPU), and a `Parameter` is a tensor that trains.
# `Dropout` comes at the end of the lesson.

# %%
quote(lora.LowRank.__init__)

# %% [markdown]
# `attach` puts LoRA on a model. `targets` names the layers: `attn.[qkvo]` stands for
# the four maps of every attention. The paper adapts only `q` and `v` in most
# experiments. This is a choice, not a rule: any matrix can have a LoRA.

# %%
def with_lora(r=4, alpha=8.0, seed=0):
    model, _ = ft.load("base-gpt-small")
    method = ft.LoRA(r=r, alpha=alpha, targets=("attn.[qkvo]", "mlp.up", "mlp.down"))
    adapter = ft.attach(model, method, seed=seed)
    return model, adapter

model, adapter = with_lora()
print(ft.count(model))

# %% [markdown]
# `attach` froze the base. The adapter holds one pair $A$, $B$ for each of the twelve
# layers, and these are all that trains. `adapter.edits` is a dict of them, by the name
# of the layer.
#
# ## What B = 0 is for
# The training starts from values of $A$ and $B$. `initial_factors` draws $A$ at
# random and sets $B$ to zero. Why not both at random, as in every other layer?
#
# **Predict first.** The adapter is attached and nothing is trained yet. By how much
# do the outputs of this model differ from those of the base?

# %%
ids = test_tokens[:64][None]                             # (1, 64)
with ft.no_grad():
    start_difference = model(ids).numpy() - base(ids).numpy()
print("largest difference:", abs(start_difference).max())

# %% [markdown]
# Exactly zero, not only close to it. With $B = 0$ the branch gives zero whatever $x$
# is. So training starts *at the pretrained model*. All that it knows is there in
# step 1.
#
# But can a factor that is zero learn? This function runs backward once, and returns
# the sizes of the two gradients in one layer. The size is the root of the sum of
# squares.

# %%
def gradient_sizes(model, adapter):
    factors = adapter.edits["blocks.0.attn.q"]
    logits = model(ids[:, :-1])
    loss = ft.ops.cross_entropy(logits, ids[:, 1:])
    loss.backward()
    sizes = [float(np.linalg.norm(p.grad)) for p in (factors.A, factors.B)]
    for parameter in model.parameters():
        parameter.grad = None                            # leave nothing for the next
    return sizes

# %% [markdown]
# Let $G$ be the gradient that the full matrix $W$ would get. The branch adds
# $\frac{\alpha}{r} B A$ to $W$, so $G$ is also the gradient of that product. The rule
# for a product of two matrices (lesson 01) then gives:
#
# - the gradient of $B$ is $\frac{\alpha}{r} G A^T$,
# - the gradient of $A$ is $\frac{\alpha}{r} B^T G$.
#
# **Predict first.** In the first step $B$ is zero and $A$ is not. Which of the two
# has a gradient that is zero? And in the second step?

# %%
model, adapter = with_lora()
first = gradient_sizes(model, adapter)
train_on_python(model, 5e-3, steps=1)
second = gradient_sizes(model, adapter)
print(f"before step 1:  A {first[0]:.4f}   B {first[1]:.4f}")
print(f"before step 2:  A {second[0]:.4f}   B {second[1]:.4f}")

# %% [check]
assert not start_difference.any()
assert first[0] == 0 and first[1] > 0 and second[0] > 0 and second[1] > 0

# %% [markdown]
# In the first step only $B$ moves. Then $B$ is not zero any more, and from the second
# step on both learn. So one zero factor is no obstacle, as long as the other is not
# zero.
#
# Now all four ways to start. `attach` gives a random $A$ and $B = 0$. `start` changes
# that where it is asked to, and trains for 20 steps. A random $B$ gets the usual range
# of a layer with $r = 4$ inputs: $\pm 1/\sqrt{r} = \pm 0.5$.

# %%
def start(a_is_random, b_is_random):
    model, adapter = with_lora()
    rng = np.random.default_rng(1)
    for factors in adapter.edits.values():
        if not a_is_random:
            factors.A.copy_(np.zeros(factors.A.shape, np.float32))
        if b_is_random:
            random = rng.uniform(-0.5, 0.5, factors.B.shape)
            factors.B.copy_(random.astype(np.float32))
    before = ft.perplexity(model, python_test)
    return before, train_on_python(model, 5e-3, steps=20)

# %% [markdown]
# **Predict first.** Which start cannot learn at all, and which one is worse than the
# base before it has learnt anything?

# %%
starts = {
    "A random, B = 0": start(True, False),
    "A = 0, B random": start(False, True),
    "A = 0, B = 0": start(False, False),
    "both random": start(True, True),
}
for name, (before, after) in starts.items():
    print(f"{name:16}  at the start {before:8.1f}   after 20 steps {after:7.1f}")

# %% [check]
assert abs(starts["A = 0, B = 0"][0] - starts["A = 0, B = 0"][1]) < 1e-3
assert starts["both random"][0] > 3 * 881 and starts["both random"][1] > 400
assert starts["A random, B = 0"][1] < 230 and starts["A = 0, B random"][1] < 300

# %% [markdown]
# - **A = B = 0** never learns: both gradients stay zero.
# - **Both random** destroys the model before it learns. Then it has to repair it.
# - **One zero, the other random** works. Which of the two is zero matters less.
#
# So $B = 0$ means: start at the pretrained model. And $A$ random means: be able to
# leave it.
#
# ## Rank against quality
# Now the real training. The number of steps is the same for each rank, and
# $\alpha = 2r$, so the factor $\alpha/r$ is always 2.
#
# **Predict first.** Rank 16 has 16 times the parameters of rank 1. With the twelve
# full matrices we got about 145. What do ranks 1, 4 and 16 reach?

# %%
trained = {}
perplexities = {}
for r in (1, 4, 16):
    trained[r] = with_lora(r, alpha=2.0 * r)
    perplexities[r] = train_on_python(trained[r][0], 5e-3)
    count = ft.count(trained[r][0]).trained
    print(f"rank {r:2}: {count:6,} parameters, Python {perplexities[r]:.1f}")

# %%
groups = {}
for r, perplexity in perplexities.items():
    groups[f"rank {r}"] = {"cut after training": cut[r], "trained as LoRA": perplexity}
bars(groups, ylabel="perplexity on Python",
     caption="All entries of the twelve matrices reach 145; the base has 881.")

# %% [check]
assert perplexities[1] > perplexities[4] > perplexities[16] > dense_perplexity - 5
assert perplexities[1] < cut[1]

# %% [markdown]
# A larger rank helps, but less and less. Rank 1 trains 2,304 numbers, 2 % of the
# 98,304 entries of the twelve matrices, and does most of the work. It is also better
# than the full change cut to rank 1 afterwards: training can make the best of the
# rank it has. At rank 16 this is no help any more, since the cut loses little there.
#
# No rank reached the full matrices here. LoRA is nearly as good for far fewer
# numbers; it is not the same. The learning rates, 0.005 for LoRA and 0.002 for the
# matrices, are not tuned, and the runs are short. So a difference of a few percent
# means little.
#
# ## The scale α/r
# Why is there a factor $\alpha/r$? The branch is a sum of $r$ terms, one for each row
# of $A$. With more terms the sum is larger. Section 4.1 of the paper divides by $r$,
# to "reduce the need to retune hyperparameters when we vary r". Is the change then
# really the same for every rank? We take one step and measure the size of
# $\Delta W = \frac{\alpha}{r} B A$.

# %%
def first_change(r, alpha):
    model, adapter = with_lora(r, alpha)
    train_on_python(model, 5e-3, steps=1)
    return float(np.linalg.norm(adapter.edits["blocks.0.attn.q"].delta()))

# %% [markdown]
# **Predict first.** After one step, is the change for $r = 64$ larger than for
# $r = 1$, as large, or smaller? Answer for three factors: 1 (no scale), $8/r$, and
# $8/\sqrt{r}$. The library always divides by $r$. So we get the factor 1 with
# $\alpha = r$, and $8/\sqrt{r}$ with $\alpha = 8 \sqrt{r}$.

# %%
scale_ranks = [1, 4, 16, 64]
changes_by_scale = {
    "factor 1": [first_change(r, r) for r in scale_ranks],
    "factor 8/r": [first_change(r, 8.0) for r in scale_ranks],
    "factor 8/√r": [first_change(r, 8.0 * r**0.5) for r in scale_ranks],
}
for name, values in changes_by_scale.items():
    print(f"{name:12}", "  ".join(f"{value:.3f}" for value in values))
curves(changes_by_scale, x=scale_ranks, log="xy", xlabel="rank r", ylabel="size of ΔW",
       caption="The change of the query matrix after one step.")

# %% [check]
plain, by_r, by_root = changes_by_scale.values()
assert plain[3] > 5 * plain[0] and by_r[3] < 0.3 * by_r[0]
assert abs(by_r[0] / plain[0] - 8) < 0.1
assert max(by_root) < 1.4 * min(by_root)

# %% [markdown]
# Without a scale the change grows about as $\sqrt{r}$, not as $r$. The terms point in
# different directions, and then their squares add up: two sides of length 1 at a right
# angle make a diagonal of $\sqrt{2}$, and $r$ terms make $\sqrt{r}$. The
# factor $\alpha/r$ divides by more than that: at a fixed $\alpha$, a larger rank
# takes *smaller* steps. So whoever compares ranks at one $\alpha$ also compares step
# sizes. Kalajdzievski (2023, "rsLoRA") therefore divides by $\sqrt{r}$.
#
# In our comparison of ranks the factor was 2 for every rank. So there the larger
# ranks took larger steps.
#
# Look at $r = 1$ in the first two lines: $\alpha = 8$ gives 8 times the change of
# $\alpha = 1$. Adam makes steps of the same size whatever $\alpha$ is (lesson 03),
# and then $\alpha$ multiplies them. So $\alpha$ acts like a second learning rate.
# When you change $r$, let $\alpha$ grow like $\sqrt{r}$, or tune the learning rate
# anew.
#
# ## Merging
# After training we may write the change into the weight: $W + \frac{\alpha}{r} B A$.
# The branch is then not needed. The edit computes the change:

# %%
quote(lora.LowRank.delta)

# %% [markdown]
# `.data` is the array of a tensor, and `self.s` is $\alpha/r$. Only the weight
# changes. LoRA has no bias of its own, so the bias of the layer stays as it is.
#
# `merge` does this for all twelve layers. We time a forward pass before and after.
# The two models take turns, and the median of forty ratios counts. `thread_time`
# leaves out the time of other programs and threads.

# %%
def time_ratio(model, other):
    """The time of a forward pass of one model, divided by that of the other."""
    batch = np.tile(ids, (8, 1))
    ratios = []
    for _ in range(40):
        seconds = []
        for measured in (model, other):
            begin = time.thread_time()
            with ft.no_grad():
                measured(batch)
            seconds.append(time.thread_time() - begin)
        ratios.append(seconds[0] / seconds[1])
    return np.median(ratios)

# %% [markdown]
# **Predict first.** The merged model computes with other numbers: one product instead
# of three. Are its outputs exactly equal, equal up to rounding, or a little
# different?

# %%
model, adapter = trained[4]
branch_ratio = time_ratio(model, base)
with ft.no_grad():
    before = model(ids).numpy()
ft.merge(model)
with ft.no_grad():
    after = model(ids).numpy()
merge_error = abs(after - before).max()
merged_ratio = time_ratio(model, base)
print(f"largest difference: {merge_error:.0e}, largest logit: {abs(before).max():.0f}")
print(f"forward pass: {branch_ratio:.2f} x the base's time with the branch, "
      f"{merged_ratio:.2f} x merged")

# %% [check]
assert 0 < merge_error < 1e-3

# %% [markdown]
# Equal up to the rounding of float32. And the merged model *is* an ordinary model: it
# has the base's shapes and needs the base's time. A branch that stays a branch costs
# time.
#
# The post *Quick notes on fine-tuning deep learning models* says the opposite: for a
# matrix of $d \times k$ entries LoRA needs $O(r (k + d))$ operations, "a lot faster"
# than $O(d k)$. But the frozen $W$ is still multiplied with $x$. The branch comes *on
# top*: $d k + r (k + d)$. In our model, 98,304 multiplications a token become
# 107,520. That is 9 % more. The measured time usually grows by more, since
# each layer of this small model now makes several calls instead of one, and a call
# has a price of its own.
#
# What if we merge twice? The branch is gone after the first time, so there is nothing
# left to add.

# %%
weight = model.state_dict()[query].copy()
ft.merge(model)
print("changed by the second merge:", (model.state_dict()[query] != weight).any())

# %% [markdown]
# A merge cannot be undone exactly: $W + \Delta W - \Delta W$ is rounded. To compare
# with the base, do not merge. `without` takes the adapter off inside a `with`
# block, and `detach` takes it off for good. Both give the base back, bit for bit.

# %%
model, adapter = trained[16]
with ft.without(model):
    print(f"without: {ft.perplexity(model, python_test):6.1f}")
print(f"with:    {ft.perplexity(model, python_test):6.1f}")
ft.detach(model)
restored = model.state_dict()
is_equal = all((restored[name] == base_weights[name]).all() for name in restored)
print("equal to the base:", is_equal)

# %% [check]
assert is_equal

# %% [markdown]
# ## Two adapters on one base
# A task now costs one small adapter. We train a second one. Its task is prose in
# capital letters, which the tokenizer cuts into other tokens. We make it from up to 600
# docstrings, the texts that explain a Python function.

# %%
def capitals(split):
    records = [r for r in ft.data.snapshot() if r.split == split]
    texts = [r.text.upper() for r in records if r.kind == "docstring"]
    return np.concatenate([e.ids for e in tokenizer.encode_batch(texts[:600])])

capitals_train = capitals("train")
capitals_test = ft.data.held_out_batches(capitals("test"), 64, 32)
print(tokenizer.encode("Return the value").tokens)
print(tokenizer.encode("RETURN THE VALUE").tokens)

# %% [markdown]
# `detach` takes the Python adapter off and returns it with its trained values. Then
# the same base gets the second adapter.

# %%
model, _ = with_lora()
train_on_python(model, 5e-3)
python_adapter = ft.detach(model)

ft.attach(model, python_adapter.method, name="capitals")
batches = ft.data.lm_batches(capitals_train, 64, 8)
ft.fit(model, batches, STEPS, ft.AdamW(5e-3), progress=False)

# %% [markdown]
# On disk an adapter is small. `save_adapter` writes only $A$ and $B$. `load_adapter`
# puts them on a model, and refuses a model with another base.

# %%
with TemporaryDirectory() as name:
    folder = Path(name)
    ft.save_adapter(model, folder / "capitals")
    capitals_adapter = ft.detach(model)
    ft.save(model, folder / "base")
    adapter_bytes = (folder / "capitals/adapter.safetensors").stat().st_size
    base_bytes = (folder / "base/model.safetensors").stat().st_size
    ft.load_adapter(model, folder / "capitals", name="loaded")
    loaded_perplexity = ft.perplexity(model, capitals_test)
    ft.detach(model)
print(f"adapter: {adapter_bytes / 1000:.0f} kB   base: {base_bytes / 1000:.0f} kB")

# %% [markdown]
# Now we swap them. `attach` also takes an adapter that `detach` returned.

# %%
def scores_with(adapter):
    """The perplexities on Python, capitals and prose."""
    if adapter is not None:
        ft.attach(model, adapter)
    tests = [python_test, capitals_test, prose_test]
    found = [ft.perplexity(model, test) for test in tests]
    if adapter is not None:
        ft.detach(model)
    return found

scores = {
    "base": scores_with(None),
    "Python adapter": scores_with(python_adapter),
    "capitals adapter": scores_with(capitals_adapter),
}
print(f"{'':18}{'Python':>9}{'capitals':>10}{'prose':>8}")
for name, (python, capital, prose) in scores.items():
    print(f"{name:18}{python:9.1f}{capital:10.1f}{prose:8.1f}")

# %% [markdown]
# Each adapter is good at its own task. Each one also makes the model worse at the
# prose it came from: LoRA forgets, too. But here we can take it off.
#
# `combine` makes one adapter from several. Its change is the weighted sum of their
# changes: $c_1 \Delta W_1 + c_2 \Delta W_2$.
#
# **Predict first.** We add both adapters, each with the weight 1. Is the sum as good
# on Python as the Python adapter, and as good on capitals as the other one?

# %%
both = [python_adapter, capitals_adapter]
scores["sum of both"] = scores_with(ft.combine(both, [1.0, 1.0]))
scores["half of both"] = scores_with(ft.combine(both, [0.5, 0.5]))
for name in ("sum of both", "half of both"):
    python, capital, prose = scores[name]
    print(f"{name:18}{python:9.1f}{capital:10.1f}{prose:8.1f}")

# %% [check]
assert abs(loaded_perplexity - scores["capitals adapter"][1]) < 1e-3
assert adapter_bytes < 0.06 * base_bytes
assert scores["Python adapter"][0] < scores["sum of both"][0] < scores["base"][0]
assert scores["Python adapter"][2] > 1.3 * scores["base"][2]

# %% [markdown]
# No. On Python the sum is much better than the base, but its perplexity is twice that
# of the Python adapter. Each change was trained beside the base, not beside the other
# change. Half of both is about as good as the sum on both tasks, and forgets less
# prose: the step away from the base is smaller. Combining is a cheap first try, and not
# a replacement for training on both tasks.
#
# One more trap. We add the *changes* $B_1 A_1$ and $B_2 A_2$. May we add the
# *factors* instead, $A_1 + A_2$ and $B_1 + B_2$? PEFT, the
# library of Hugging Face for such methods, does so in
# `add_weighted_adapter(..., combination_type="linear")`.

# %%
first = python_adapter.edits["blocks.0.attn.q"]
second = capitals_adapter.edits["blocks.0.attn.q"]
exact = first.delta() + second.delta()
A = first.A.numpy() + second.A.numpy()
B = first.B.numpy() + second.B.numpy()
mixed = first.alpha / len(A) * B @ A                     # len(A) is r
mixed_error = np.linalg.norm(mixed - exact) / np.linalg.norm(exact)
print(f"error of the mixed factors: {100 * mixed_error:.0f} % of the exact sum")
print("rank of the exact sum:", np.linalg.matrix_rank(exact))

# %% [markdown]
# The mixed product contains $B_1 A_2$ and $B_2 A_1$, which belong to no task. The
# exact sum has rank 8, since both have rank 4. If you want factors for it,
# `low_rank_factors` finds them.

# %%
for r in (4, 8):
    A, B = lora.low_rank_factors(exact, r)
    error = np.linalg.norm(B @ A - exact) / np.linalg.norm(exact)
    print(f"rank {r}: error {100 * error:.2f} %")

# %% [check]
assert mixed_error > 0.4 and np.linalg.matrix_rank(exact) == 8 and error < 1e-4

# %% [markdown]
# ## What LoRA saves, and what not
# Training keeps four things in memory: the weights, their gradients, two moments of
# Adam for each trained number (lesson 03), and the activations of the forward pass,
# from which backward computes the gradients. `peak_memory` measures one training
# step. It does not count the weights, which are there before. We take the larger
# `base-gpt` with 1.07 million parameters.

# %%
def step_memory(rows, length, with_adapter):
    """The largest rise of memory during one training step, in MB."""
    model, _ = ft.load("base-gpt")
    if with_adapter:
        targets = ["attn.[qkvo]", "mlp.up", "mlp.down"]
        ft.attach(model, ft.LoRA(r=4, alpha=8.0, targets=targets))
    batches = ft.data.lm_batches(train_tokens, length, rows)
    with ft.peak_memory() as memory:
        ft.fit(model, batches, 1, ft.AdamW(1e-4), progress=False)
    return memory["bytes"] / 1e6

# %% [markdown]
# **Predict first.** With full training and a batch of 16 tokens the step needs about
# 18 MB. LoRA trains 3 % of the parameters. How much does it need with 16 tokens? And
# with 1,024 tokens, where full training needs about 70 MB?

# %%
memory = {}
for rows, length in ((1, 16), (4, 64), (8, 128)):
    memory[f"{rows * length:,} tokens"] = {
        "full": step_memory(rows, length, with_adapter=False),
        "LoRA": step_memory(rows, length, with_adapter=True),
    }
for name, row in memory.items():
    print(f"{name:13} full {row['full']:6.1f} MB   LoRA {row['LoRA']:6.1f} MB")
bars(memory, ylabel="MB for one step",
     caption="LoRA saves about the same amount at every batch size.")

# %% [check]
small, *_, large = memory.values()
assert small["LoRA"] < 0.2 * small["full"] and large["LoRA"] > 0.7 * large["full"]
assert 10 < small["full"] - small["LoRA"] < 22
assert 8 < large["full"] - large["LoRA"] < 24

# %% [markdown]
# LoRA saves 13 to 17 MB in all cases. That is what full training keeps for each
# trained parameter: a gradient and two moments, 12 bytes times 1.07 million, and a
# few buffers. It does *not* save most of the activations. The gradient must flow back
# through the frozen layers to reach the lowest adapter, and on its way it needs the
# results of every norm, softmax and GELU (lesson 01). Each $A$ needs its input, too.
# With a large batch the activations are most of the memory.
#
# So "LoRA needs a tiny part of the memory" is true for the optimiser, and for the
# memory of a large model with a small batch. And time? We measure a
# step of the small model with 512 tokens. The result is in the last line of the table.

# %%
def seconds_of_steps(model, steps=3):
    batches = ft.data.lm_batches(train_tokens, 64, 8)
    begin = time.perf_counter()
    ft.fit(model, batches, steps, ft.AdamW(1e-4), progress=False)
    return time.perf_counter() - begin

small_lora, _ = with_lora()
small_full, _ = ft.load("base-gpt-small")
ratios = []
for _ in range(9):                      # in turns, since a machine is never quiet
    ratios.append(seconds_of_steps(small_lora) / seconds_of_steps(small_full))
step_ratio = np.median(ratios)

# %% [markdown]
# ## The whole lesson in one table
# Each row is a model that reads Python. `stored` is what a new task adds to the disk.

# %%
table = {"base": [0, scores["base"][0]], "twelve matrices": [98_304, dense_perplexity]}
for r, perplexity in perplexities.items():
    table[f"LoRA, rank {r}"] = [2_304 * r, perplexity]
print(f"{'':18}{'trained':>9}{'stored':>10}{'Python':>9}")
for name, (count, perplexity) in table.items():
    print(f"{name:18}{count:9,}{4 * count / 1000:7.0f} kB{perplexity:9.1f}")
print(f"\nforward pass, branch  {branch_ratio:.2f} x the base's time")
print(f"forward pass, merged  {merged_ratio:.2f} x the base's time")
print(f"training step         {step_ratio:.2f} x the time of training everything")

# %% [markdown]
# A change of rank 4 in twelve matrices does most of what all 98,304 entries do. It
# starts at the pretrained model because $B = 0$, and it can learn because $A$ is not.
# It costs a little time while it is a branch, and none once it is merged. It saves
# gradients and optimiser state, not activations.
#
# A common summary says that LoRA trains "considerably faster", because the factors are
# small. The last line of the table shows that this is not so here. A full step has
# three large products for each matrix: the output, the gradient of $x$, and the
# gradient of $W$. LoRA saves only the third of them, and the update, and pays for the
# branch.
#
# Dropout is one more option: `LoRA(dropout=0.1)` drops entries of the *branch's
# input*, in training only. The base path is never dropped, and a merged model has no
# dropout.
#
# **Exercises.** `tinyft start lora` writes five files:
#
# - `initial_factors`: the start, $A$ random and $B$ zero
# - `low_rank_branch`: the branch with its scale
# - `after`: the branch beside the layer, with dropout in the right place
# - `fold`: the merge of one layer
# - `low_rank_factors`: the best factors of a given matrix
