# %% [markdown]
# # 19 Mixture of experts
#
# **Reading:** 50 minutes. **You need:** lessons 02 to 04; 14 and 17 help.
# **Exercises:** choose_experts, expert_capacity, within_capacity, balance_loss, z_loss,
# forward (about two hours).
#
# A larger model is a better model, if there is enough text for it. But in the models
# so far every token is multiplied with every weight. Twice the weights are twice the
# work for each token, in training and ever after.
#
# A **mixture of experts** breaks this rule. It has several feed-forward networks, the
# *experts*, in the place of one. Each token visits only one of them. So the number of
# parameters grows, and the work for a token stays as it is.
#
# We build the simplest such layer, that of the *Switch Transformer* (Fedus, Zoph and
# Shazeer 2021). Then we train it beside dense layers, and see what it gains, and what
# it costs.

# %%
import os
import time
from dataclasses import replace

import numpy as np

import tinyft as ft
from tinyft import ops
from tinyft.compress.calibrate import recording
from tinyft.learn.draw import curves, diagram, heat_map
from tinyft.learn.lessons import quote
from tinyft.models.blocks import MLP
from tinyft.models.moe import (
    SwitchMLP,
    balance_loss,
    choose_experts,
    expert_capacity,
    within_capacity,
    z_loss,
)

# %% [markdown]
# ## Which expert?
# A small linear map, the **router**, gives each token one logit per expert. The
# softmax of the logits are probabilities $p$. The token visits the expert $e$ with the
# largest probability, and the output of this expert is multiplied by the probability:
#
# $p = softmax(W_r x)$, $e = argmax \, p$, $y = p_e \, FFN_e(x)$
#
# The factor $p_e$ is called the **gate**. Three tokens and three experts:

# %%
logits = ft.Tensor(np.log([[6.0, 3.0, 1.0], [1.0, 1.0, 8.0], [2.0, 4.0, 4.0]]))
p, choice, gate = choose_experts(logits)
print(p.numpy().round(2))
print("expert:", choice, "  gate:", gate.numpy()[:, 0].round(2))

# %%
quote(choose_experts)

# %% [markdown]
# The third token has two equal probabilities; the first of them wins.
#
# ## Why the gate
# Why is the output multiplied by the gate? The choice alone would do, one might think.
# Let us see what the router learns from the loss. The choice is a whole number, and has
# no derivative: change a logit a little, and the same expert is chosen. So the router
# learns **only through the gate**.
#
# Here an expert gives the output 5 for the first token. We compute the gradient of $y$
# by the logits.

# %%
logits = ft.Tensor(np.log([[6.0, 3.0, 1.0]]), requires_grad=True)
p, choice, gate = choose_experts(logits)
y = gate * 5.0
y.sum().backward()
print("gradient:", logits.grad.round(2))

# %% [markdown]
# A larger first logit makes $y$ larger, larger other logits make it smaller. Now a
# mistake that has been made more than once: first choose the expert, then take the
# softmax *of the logits that were chosen*. That is one logit.
#
# **Predict first.** What is the gate now, and what is the gradient?

# %%
logits = ft.Tensor(np.log([[6.0, 3.0, 1.0]]), requires_grad=True)
chosen_logit = ops.gather(logits, choice[..., None])     # (1, 1)
alone = ops.softmax(chosen_logit)
(alone * 5.0).sum().backward()
print("gate:", alone.numpy(), "  gradient:", logits.grad)

# %% [markdown]
# The softmax of one number is 1, whatever the number. The layer still computes
# something, the experts train, and the loss goes down. But the router stays as it was
# drawn at random, and nobody gets an error message.

# %% [check]
logits = ft.Tensor(np.log([[6.0, 3.0, 1.0]]), requires_grad=True)
p, _, gate = choose_experts(logits)
assert np.allclose(p.numpy(), [[0.6, 0.3, 0.1]])
(gate * 5.0).sum().backward()
assert np.allclose(logits.grad, [[5 * 0.6 * 0.4, -5 * 0.6 * 0.3, -5 * 0.6 * 0.1]])
assert alone.numpy() == 1
assert choose_experts(ft.Tensor(np.zeros((1, 3))))[1] == 0

# %% [markdown]
# **Exercise:** `choose_experts`.
#
# ## Full experts
# In a large model each expert lies on a device of its own. All devices work at the same
# time, and wait for the slowest. So each expert has a limited number of places, its
# **capacity** $C$. For a row of $n$ tokens and $E$ experts
#
# $C = floor(k \, n / E)$
#
# where $k$ is the *capacity factor*. With $k = 1$ there are as many places as tokens.
# (There are two limits besides: $C$ is at most $n$, and at least 4 by default. In the
# example it is at least 1.)
#
# The tokens take the places **in their order**. A token that finds its expert full is
# **dropped**: no expert computes it.

# %%
tokenizer = ft.data.shipped_tokenizer()
ids = tokenizer.encode("Return the first item of the list.").ids
words = [tokenizer.decode([i]).strip() for i in ids]
choice = np.array([0, 1, 0, 0, 2, 1, 0, 2])              # the expert of each token
chosen = (choice[:, None] == np.arange(3))[None]         # (1, 8, 3): row, token, expert
real = np.ones((1, 8), bool)                             # no padding
capacity = expert_capacity(real, 1.0, experts=3, least=1)
kept = within_capacity(chosen, capacity)[0]              # (8, 3)
print("capacity:", capacity)
print("kept:", kept.any(axis=1).astype(int))

# %% [markdown]
# The picture shows the same. A token goes to the next free place of its expert.

# %%
# a box: (column, row, text, kind); kind "data" is blue, "trained" is orange
boxes, arrows = {}, []
for e in range(3):
    boxes |= {f"expert {e}": (2.75 * e + 0.75, 2.3, f"expert {e}", "none")}
for t, word in enumerate(words):
    e = choice[t]
    k = kept[:t, e].sum()                                # taken places of this expert
    if kept[t, e]:
        column = 2.75 * e + 0.2 + 1.1 * k
        boxes |= {f"token {t}": (t, 0, word), f"place {t}": (column, 1.6, word, "data")}
        arrows.append((f"token {t}", f"place {t}"))
    else:
        boxes |= {f"token {t}": (t, 0, word, "trained"),
                  f"dropped {t}": (t, 0.55, "dropped", "none")}
diagram(boxes, arrows, height=2.9,
        caption="Eight tokens choose among three experts with two places each. Four "
                "tokens choose expert 0. The last two of them (orange) are dropped.")

# %% [markdown]
# What is the output of a dropped token? The layer gives $y = 0$. It stands in a block
# that computes $x + y$ (lesson 02). So the token passes the block by the residual
# stream, as it is, and may find room in the next block. Note that $y$ is 0, and not
# $x$: the block adds $x$ itself.
#
# **Predict first.** We turn the order of the tokens round. The choices stay the same.
# Are the same tokens dropped?

# %%
turned = within_capacity(chosen[:, ::-1], capacity)[0, ::-1]
for name, now in (("as it was", kept), ("turned", turned)):
    print(f"{name:10} dropped:", [words[t] for t in np.flatnonzero(~now.any(axis=1))])

# %% [check]
assert len(words) == 8
assert capacity[0] == 2
assert kept.sum(axis=0).tolist() == [2, 2, 2]
assert np.flatnonzero(~kept.any(axis=1)).tolist() == [3, 6]
assert np.flatnonzero(~turned.any(axis=1)).tolist() == [0, 2]
assert np.array_equal(within_capacity(chosen, np.array([8])), chosen)

# %% [markdown]
# Other tokens are dropped. So with drops the output of a token depends on the tokens
# before it that choose the same expert, and no attention is involved. With $k \geq E$
# no token is ever dropped, since an expert then has a place for every token.
#
# In the paper all rows of a batch share the places. Then the output of a text depends
# on the texts that are in its batch by chance, even when the model only answers. In
# this library every row has its own places, so a text gets the same output alone and in
# a batch. Padding chooses no expert and takes no place.

# %%
quote(expert_capacity)
quote(within_capacity)

# %% [markdown]
# **Exercises:** `expert_capacity` and `within_capacity`.
#
# ## The layer
# Now all parts are there. `run_experts` collects the tokens of each expert, calls the
# expert once, and puts the outputs back where their tokens stand in the text. (The
# losses come later.)

# %%
quote(SwitchMLP.forward)

# %% [markdown]
# We make layers for the small GPT of lesson 04: width 64, and experts with 32 hidden
# features. `SwitchConfig` holds the settings.

# %%
WIDTH, HIDDEN = 64, 32

def make_mlp(hidden, rng):
    return MLP(WIDTH, hidden, activation=ops.gelu_tanh, rng=rng, std=0.05)

def make_switch(experts, seed=0, **settings):
    """A Switch layer of MLPs with 32 hidden features."""
    rng = np.random.default_rng(seed)
    parts = [make_mlp(HIDDEN, rng) for _ in range(experts)]
    config = ft.SwitchConfig(experts=experts, **settings)
    return SwitchMLP(parts, config, rng=rng, std=0.05)

# %% [markdown]
# What does a token cost? We could use a clock, but a clock also measures Python. So we
# count: how many rows does each expert compute? `recording` (lesson 14) shows us every
# input of a linear map. With width $C$ and $F$ hidden features an expert multiplies
# $2 \, C F$ pairs of numbers for a row: $C F$ up and $C F$ down. The router has $C E$.

# %%
def products(layer, x):
    """The products of two numbers that a layer computes for x (B, T, C)."""
    maps = {str(e): expert.up for e, expert in enumerate(layer.experts)}
    rows = []
    def see(path, part, ctx):
        rows.append(part.shape[0])                       # one row for each token
    with recording(maps, see), ft.no_grad():
        layer(x, ft.Context())
    of_router = x.shape[0] * x.shape[1] * WIDTH * len(layer.experts)
    return sum(rows) * 2 * WIDTH * HIDDEN + of_router

# %% [markdown]
# **Predict first.** 256 tokens go through layers of 1, 4 and 16 experts. No token is
# dropped. How do the parameters grow, and how do the products of a token?

# %%
rng = np.random.default_rng(0)
x = ft.Tensor(rng.standard_normal((4, 64, WIDTH)).astype(np.float32))
sizes, work = [], []
for experts in (1, 4, 16):
    layer = make_switch(experts, eval_capacity=experts).train(on=False)
    sizes.append(sum(q.size for q in layer.parameters()))
    work.append(products(layer, x) / 256)
    print(f"{experts:2} experts: {sizes[-1]:6,} parameters, {work[-1]:,.0f} a token")

# %% [check]
assert sizes[2] > 15 * sizes[0]
assert work == [2 * WIDTH * HIDDEN + WIDTH * experts for experts in (1, 4, 16)]
half = products(make_switch(4, eval_capacity=4).train(on=False), x[:, :32])
assert half == work[1] * 128                             # linear in the tokens
tight = make_switch(4, eval_capacity=0.5, min_capacity=1).train(on=False)
assert products(tight, x) < work[1] * 256                # dropped tokens cost nothing

# %% [markdown]
# Sixteen times the parameters; the work of a token grows only by the router, 64
# products per expert. The work is proportional to the number of tokens, however they
# are divided among the experts.
#
# This is not for free. All experts must lie in memory, though a token uses only one of
# them. A mixture of experts saves work, and **never memory**.
#
# ## A task
# What do we gain from the parameters? The small GPT has two blocks. We take the
# feed-forward of its second block away, and train other layers in its place. First we
# record the input $x$ and the output $y$ of the old layer, while the GPT reads text.
# The new layers learn to give the same output.

# %%
base, _ = ft.load("base-gpt-small")
train = ft.data.pretraining("prose", "train")
test = ft.data.pretraining("prose", "test")
target = base.blocks[1].mlp
seen = []

def see(path, x, ctx):
    seen.append(x.numpy())

with recording({"mlp": target.up}, see), ft.no_grad():
    for ids in train[:32768].reshape(16, 32, 64):
        base(ids)
X = np.concatenate(seen)                                 # (512, 64, 64)
with ft.no_grad():
    Y = target(ft.Tensor(X), ft.Context()).numpy()

# %% [markdown]
# The error is the mean of the squared differences, divided by the variance of $y$: 1
# for a layer that knows nothing but the mean, 0 for the right layer. (It is a small
# task, so that we can afford many steps.) At the end we put each layer into the GPT,
# and measure the loss of the GPT on new text.
#
# In training, `layer(x, ctx)` leaves its own losses in `ctx.losses`. We add them.

# %%
STEPS = 100 if "TINYFT_FAST" in os.environ else 200

def routing(layer):
    """True at the expert of each of 2,048 tokens: (32, 64, 8)."""
    with ft.no_grad():
        _, choice, _ = choose_experts(layer.router(ft.Tensor(X[:32]), ft.Context()))
    return choice[..., None] == np.arange(8)

def error_of(layer, rows, ctx):
    """The error of a layer for some rows of X."""
    difference = layer(ft.Tensor(X[rows]), ctx) - ft.Tensor(Y[rows])
    return (difference * difference).mean() / float(Y.var())

# %%
def fit_layer(layer):
    """Train a layer. Returns the error of each step, and the shares of some steps."""
    rng = np.random.default_rng(0)
    optimizer = ft.AdamW(0.01)
    optimizer.start(layer.named_parameters())
    errors, shares = [], []
    for t in range(STEPS):
        ctx = ft.Context(rng=rng)
        error = error_of(layer, rng.integers(0, len(X), 16), ctx)    # 16 x 64 tokens
        total = sum(ctx.losses.values(), error)
        layer.zero_grad()
        total.backward()
        optimizer.step(min(1.0, 2 * (1 - t / STEPS)))    # the second half slows down
        errors.append(error.item())
        if isinstance(layer, SwitchMLP) and t % (STEPS // 20) == 0:
            shares.append(routing(layer).mean(axis=(0, 1)))
    return np.array(errors), np.array(shares)

# %%
held_out = list(test[:8192].reshape(4, 32, 64))
results = {}                                             # of each layer, for the table

def measure(name, layer):
    """Train a layer, put it into the GPT, and measure the loss on new text."""
    layer.train()
    begin = time.thread_time()
    errors, shares = fit_layer(layer)
    seconds = (time.thread_time() - begin) / STEPS
    base.blocks[1].mlp = layer.train(on=False)
    loss = ft.evaluate(base, held_out)["loss"]
    base.blocks[1].mlp = target
    results[name] = [layer, seconds, errors, loss]
    print(f"{name}: error {errors[-30:].mean():.2f}, loss of the GPT {loss:.3f}")
    return shares

# %% [markdown]
# The dense layer with as many products a token is an MLP with 32 hidden features. The
# one with as many parameters has 256, like the layer that we took away.

# %%
full_loss = ft.evaluate(base, held_out)["loss"]
print(f"loss with the original layer: {full_loss:.3f}")
for hidden in (32, 256):
    measure(f"dense, {hidden}", make_mlp(hidden, np.random.default_rng(0)))

# %% [markdown]
# Eight times the parameters make most of the difference, if all of them are used for
# every token. Now the mixture of eight experts with 32 hidden features each: the
# parameters of the second layer, and nearly the work of the first. The capacity factor
# is 2: an expert has 16 places in a row of 64 tokens.

# %%
shares_alone = measure("Switch, no balance loss",
                       make_switch(8, capacity=2.0, balance=0.0))

# %% [markdown]
# That is *worse* than the dense layer of 32, with eight times its parameters! Let us
# look at the choices during training.

# %%
names = [f"expert {e}" for e in range(8)]
heat_map(shares_alone.T, rows=names, xlabel="time, from the first step to the last",
         height=2.6, caption="The share of the tokens that choose each expert, without "
                             "a balance loss. The bluer, the more tokens.")

# %%
def dropped(layer, factor=2.0):
    """The share of tokens that are dropped."""
    chosen = routing(layer)
    real = np.ones(chosen.shape[:2], bool)
    capacity = expert_capacity(real, factor, experts=8, least=4)
    return 1 - within_capacity(chosen, capacity).any(axis=-1).mean()

alone_layer = results["Switch, no balance loss"][0]
starved = int((shares_alone[-1] < 0.01).sum())
print("shares at the end:", shares_alone[-1].round(2))
print(f"{starved} experts have less than 1 % of the tokens")
print(f"{100 * dropped(alone_layer):.0f} % of the tokens are dropped")

# %% [markdown]
# An expert that gets more tokens at the start learns faster. Then the loss falls if its
# gate grows, so the router gives it still more tokens. Others get none, and **an expert
# without tokens gets no gradient**, so it stays bad. And the popular expert is full: it
# has 16 places for the 64 tokens of a row, and many tokens are dropped.
#
# ## The balance loss
# So the paper adds a loss. Let $f_i$ be the share of tokens that choose expert $i$, and
# $P_i$ the mean of the probability $p_i$ over all tokens. The loss is
#
# $balance = \alpha \, E \sum_i f_i P_i$
#
# with $\alpha = 0.01$. Why the product? The shares are what we want to be equal. But
# they are counted, and have no derivative. $P$ has one: the derivative of the loss by
# $P_i$ is $\alpha E f_i$. So gradient descent makes the probability of an expert
# smaller, and the more so, the more tokens the expert has. $f$ is counted **before**
# tokens are dropped: after that a full expert would look like any other.

# %%
quote(balance_loss)

# %%
def balance(rows):
    """The balance loss for α = 1, of tokens with these probabilities."""
    p = ft.Tensor(np.array([rows], float))
    chosen = p.data.argmax(-1)[..., None] == np.arange(p.shape[-1])
    return float(balance_loss(p, chosen).item())

print(f"all to one, with p = 1:     {balance([[1, 0, 0, 0]] * 8):.2f}")
print(f"one expert for each token:  {balance(np.eye(4)):.2f}")
print(f"all to one, with p = 0.28:  {balance([[0.28, 0.24, 0.24, 0.24]] * 8):.2f}")

# %% [markdown]
# It is $E$ if one expert has all tokens, and 1 if all have equal shares. But look at
# the third line. All tokens choose one expert, and the loss is nearly 1.
#
# One reads that this loss "is smallest for equal shares". Is it?
#
# **Predict first.** Two experts. Six tokens have the probabilities (0.51, 0.49), four
# tokens (0.01, 0.99). The shares are 0.6 and 0.4. Is the loss above or below 1?

# %%
skewed = [[0.51, 0.49]] * 6 + [[0.01, 0.99]] * 4
print(f"loss {balance(skewed):.3f}")
print("f = 0.6 0.4   P =", np.mean(skewed, axis=0).round(2))

# %% [markdown]
# Below. Expert 0 has more tokens, but expert 1 has the larger mean probability. The
# product counts one against the other. What is true: the loss is 1 if $f$ *or* $P$ is
# uniform, and it is at most $E$. A value near 1 does not prove that the load is
# balanced. So look at the shares themselves.
#
# Now the same layer with the balance loss.

# %%
shares = measure("Switch", make_switch(8, capacity=2.0))
gap = np.full((1, 20), np.nan)
heat_map(np.concatenate([shares_alone.T, gap, shares.T]), rows=[*names, "", *names],
         xlabel="time, from the first step to the last", height=4.4,
         caption="Above without the balance loss, below with it, in the same colours. "
                 "Below every expert has work.")

# %%
balanced = results["Switch"][0]
print("shares at the end:", shares[-1].round(2))
print(f"{100 * dropped(balanced):.0f} % of the tokens are dropped")

# %% [check]
loss_of = {name: result[3] for name, result in results.items()}
assert full_loss < loss_of["dense, 256"] < loss_of["Switch"]
assert loss_of["Switch"] < loss_of["dense, 32"] + 0.005
assert loss_of["Switch, no balance loss"] > loss_of["Switch"] + 0.03
assert starved >= 2
assert shares[-1].min() > 0.01
assert dropped(balanced) < 0.7 * dropped(alone_layer)
assert np.isclose(balance(skewed), 0.924)
assert np.isclose(balance([[1, 0, 0, 0]] * 8), 4)
assert np.isclose(balance(np.eye(4)), 1)
assert balance([[0.28, 0.24, 0.24, 0.24]] * 8) < 1.13

# %% [markdown]
# The shares are not equal, and need not be. But every expert has tokens, and fewer are
# dropped. The layer is now better than the dense one of the same work. By how much? We
# count the way from the dense layer of 32 to that of 256 as 100 %.

# %%
small = results["dense, 32"][3]
way = small - results["dense, 256"][3]
print(f"{100 * (small - results['Switch'][3]) / way:.0f} % of the way")

# %% [markdown]
# That is not much for eight times the parameters, after so few steps. It is a small
# task, and it is what we measured.
#
# **Exercise:** `balance_loss`.
#
# ## Two more helpers
# The softmax does not change if a constant is added to all logits. So nothing keeps the
# logits small, and large numbers have large rounding errors (lesson 24). The **z-loss**
# (Zoph et al. 2022) keeps them small: the mean over the tokens of
#
# $(ln \sum_i exp(z_i))^2$
#
# times $c = 0.001$. It sees the constant that the softmax does not see:

# %%
z = ft.Tensor(np.log([[[6.0, 3.0, 1.0]]]))
one = np.ones((1, 1), bool)
for name, moved in (("z", z), ("z + 10", z + 10.0)):
    p, _, _ = choose_experts(moved)
    print(f"{name:7} p = {p.numpy().ravel().round(2)}   "
          f"z-loss {z_loss(moved, one).item():.1f}")

# %%
quote(z_loss)

# %% [markdown]
# The other helper is **jitter**. In training the router's input is multiplied by random
# numbers between 0.99 and 1.01, so that a token whose two best experts are close tries
# both of them. How many tokens is that?

# %%
tokens = ft.Tensor(X[:32])
balanced.train()
with ft.no_grad():
    noisy = balanced.route(tokens, ft.Context(rng=np.random.default_rng(1)))
    clean = balanced.route(tokens, ft.Context())         # no generator, no noise
changed = np.mean(choose_experts(noisy)[1] != choose_experts(clean)[1])
print(f"{100 * changed:.1f} % of the tokens go to another expert")

# %% [check]
assert np.isclose(z_loss(z, one).item(), np.log(10)**2)
assert np.isclose(z_loss(z + 10.0, one).item(), (np.log(10) + 10)**2)
assert np.allclose(choose_experts(z)[0].numpy(), choose_experts(z + 10.0)[0].numpy())
assert 0 < changed < 0.05

# %% [markdown]
# **Exercises:** `z_loss`, and the whole layer: `forward`.
#
# ## Fewer places
# On many devices places cost memory and transport, so the paper trains with the
# capacity factor 1.25. An expert has 10 places then, instead of 16.

# %%
measure("Switch, factor 1.25", make_switch(8, capacity=1.25))
narrow = results["Switch, factor 1.25"][0]
print(f"dropped in training: {100 * dropped(narrow, 1.25):.0f} % of the tokens")
print(f"dropped afterwards:  {100 * dropped(narrow, 2.0):.0f} %")

# %%
def smooth(errors):
    return np.convolve(errors, np.ones(20) / 20, "valid")

curves({name: smooth(result[2]) for name, result in results.items()}, log="y",
       ylabel="error", caption="The error in training, means of 20 steps.")

# %% [markdown]
# A dropped token has the output 0, and its error counts. On new text the difference is
# small: there the factor is 2 for both layers. (Outside of training the library takes
# `eval_capacity` instead of `capacity`. It is 2 by default.)
#
# ## "Seven times faster"
# A lecture (*Reduced Complexity Models and Pretraining*) says that the Switch
# Transformer "is an LLM with 1.6T parameters" with a "7x increase in pre-training
# speed". These are two models. The paper compares models with equal work per token. A
# Switch model of T5-Base's work reaches the quality of T5-Base in a seventh of the
# time. The model with 1.6 trillion parameters is compared with T5-XXL, and is 4 times
# as fast. *Faster* means **less time to the same loss**. With equal work per token no
# step is faster, but fewer steps are needed.
#
# We can ask the same of our layers.
#
# **Predict first.** The dense layer of 32 took all the steps to come to its error.
# After what share of the steps is the Switch layer (factor 2) as good?

# %%
goal = smooth(results["dense, 32"][2])[-1]
of_switch = smooth(results["Switch"][2])
reached = int(np.argmax(of_switch <= goal)) + 20
share_of_steps = reached / STEPS
for name in ("dense, 32", "Switch"):
    print(f"{name:10}{1000 * results[name][1]:5.1f} ms a step")
print(f"the Switch layer needs {100 * share_of_steps:.0f} % of the steps")

# %% [markdown]
# Fewer steps, but each step takes longer here, although the products are nearly the
# same. Eight small matrix products take longer than one, and sorting the tokens takes
# time as well. On many devices it is the transport of the tokens that takes time. So
# count both: steps to the goal, and the time of a step.
#
# ## Back to one network
# A mixture of experts is quick to train, but large to store. Can it teach a small dense
# model? Again the lecture is short: "using the same techniques as DistilBERT:
# initializing student weights from teacher". The student of DistilBERT copies whole
# blocks. The student of a Switch model copies **all but the experts**: embeddings,
# attention, norms, dense feed-forwards. In the place of the experts it has one
# feed-forward with random values.

# %%
config = replace(base.config, hidden=HIDDEN, switch=ft.SwitchConfig(experts=8))
teacher = ft.GPT(config)                                 # the second block has experts
own = teacher.named_parameters()
for name, q in base.named_parameters().items():
    if ".mlp." not in name:
        own[name].copy_(q.data)
teacher.blocks[0].mlp = base.blocks[0].mlp
teacher.blocks[1].mlp = balanced
student = ft.dense_student(teacher)

# %%
theirs, ours = teacher.named_parameters(), student.named_parameters()
new = [name for name in ours if name not in theirs]
print("new in the student:", new)
for name, model in (("teacher", teacher), ("student", student)):
    print(f"{name}: {ft.count(model).total:,} parameters")

# %% [markdown]
# It trains on a mix of the labels and the teacher's probabilities. The small share is
# the teacher's:
#
# $L = 0.75 \, CE(y, p_s) + 0.25 \, KL(p_t, p_s)$
#
# `ft.Hinton` (lesson 17) is this loss. We compare the student with one that starts from
# nothing, after a few steps.

# %%
few = STEPS // 10
batches = list(train[-few * 512:].reshape(few, 8, 64))
distill = ft.Hinton(teacher, temperature=1.0, soft=0.25)
fresh = ft.GPT(student.config, seed=1)
copied_start = ft.evaluate(student, held_out)["loss"]
for model in (student, fresh):
    ft.fit(model, batches, few, ft.AdamW(0.0005), loss=distill, progress=False)
copied_loss = ft.evaluate(student, held_out)["loss"]
fresh_loss = ft.evaluate(fresh, held_out)["loss"]
teacher_loss = ft.evaluate(teacher, held_out)["loss"]
print(f"teacher {teacher_loss:.2f}")
print(f"student {copied_start:.2f}, after {few} steps {copied_loss:.2f}")
print(f"student from nothing {fresh_loss:.2f}")

# %% [markdown]
# The copied parts are nearly all that the student knows. Only its new feed-forward has
# to be learned.
#
# How much of the teacher is left in the end? The lecture says that the student
# "retains about 30% of the teacher's quality gains". This is right, if it is read
# slowly: 30 % of the *gain*, not of the quality. The paper's numbers are logarithms
# of the perplexity with the opposite sign, so the larger number is better:

# %%
dense_t5 = -1.636
gain = -1.444 - dense_t5                                 # of the Switch model
kept_gain = -1.580 - dense_t5                            # of its student
print(f"gain of the teacher: {gain:.3f}, of the student: {kept_gain:.3f}")
print(f"the student keeps {100 * kept_gain / gain:.0f} % of the gain")

# %% [markdown]
# The teacher has 3.8 billion parameters, the student has the 223 million of T5-Base. So
# the student is a T5-Base that is somewhat better, by a third of what the experts had
# gained. And it depends on the compression: 37 % of the gain if 82 % of the parameters
# go away, 28 % if 99 % go away.

# %% [check]
loss_of = {name: result[3] for name, result in results.items()}
errors_of = {name: result[2][-30:].mean() for name, result in results.items()}
assert errors_of["Switch"] < 0.85 * errors_of["Switch, factor 1.25"]
assert errors_of["Switch"] < 0.96 * errors_of["dense, 32"]
assert dropped(narrow, 2.0) < 0.7 * dropped(narrow, 1.25)
assert 0 < share_of_steps < 0.9
assert new == [f"blocks.1.mlp.{part}" for part in (
    "up.weight", "up.bias", "down.weight", "down.bias")]
assert ft.count(student).total < 0.9 * ft.count(teacher).total
assert abs(teacher_loss - loss_of["Switch"]) < 1e-4
assert teacher_loss < copied_loss < fresh_loss - 1
assert round(100 * kept_gain / gain) == 29

# %% [markdown]
# ## The whole lesson in one table
# The layers in the place of the second feed-forward: their parameters, the products of
# two numbers for a token, the time of a training step of 512 tokens, and the loss of
# the GPT on new text.

# %%
print(f"{'':26}{'parameters':>10}{'products':>10}{'ms a step':>11}{'loss':>8}")
print(f"{'the original layer':26}{33_088:10,}{32_768:10,}{'':11}{full_loss:8.3f}")
for name, (layer, seconds, _, loss) in results.items():
    size = sum(q.size for q in layer.parameters())
    hidden = 256 if name == "dense, 256" else HIDDEN
    count = 2 * WIDTH * hidden + (WIDTH * 8 if name.startswith("Switch") else 0)
    print(f"{name:26}{size:10,}{count:10,}{1000 * seconds:11.1f}{loss:8.3f}")

# %% [markdown]
# With equal work per token a mixture of experts is better than a dense layer, if the
# load is balanced. A dense layer with as many parameters is better still, at eight
# times the work. So experts are a way to have more parameters when *work* is what
# limits you. When memory does, they are the wrong way: see lessons 13 to 15.
#
# This was a small task: one layer, one start, and a right answer for every token. A
# mixture of experts needs many tokens, since each expert sees only its own part.
#
# **Exercises.** `tinyft start experts` writes six files:
#
# - `choose_experts`: probabilities, expert and gate
# - `expert_capacity` and `within_capacity`: how many tokens an expert takes, and which
# - `balance_loss` and `z_loss`: the two losses of the router
# - `forward`: the whole layer
