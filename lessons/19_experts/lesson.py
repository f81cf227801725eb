# %% [markdown]
# # 19 Mixture of experts
#
# **Reading:** 50 minutes. **You need:** lessons 02 to 04; 14 and 17 help.
# **Exercises:** choose_experts, expert_capacity, within_capacity, balance_loss, z_loss,
# forward (about two hours).
#
# A larger model is a better model, if there is enough text for it. But in the models
# so far every token is multiplied with every weight of every layer. Twice the weights
# are twice the work for each token, in training and in use.
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
# A small linear map, the **router**, gives each token one logit per expert. Its matrix
# is $W_r$. The softmax of the logits gives the probabilities $p$. The token visits the
# expert $e$ with the largest probability. The output of this expert is multiplied by
# this probability:
#
# $p = softmax(W_r x)$, $e = argmax \, p$, $y = p_e \, FFN_e(x)$
#
# The factor $p_e$ is called the **gate**. Here are three tokens and three experts. The
# logits are logarithms of 6, 3, 1 and so on, so that $p$ is easy to read.

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
# But the choice is a whole number, and has no derivative: change a logit a little, and
# the same expert is chosen. So the router learns from the loss **only through the
# gate**.
#
# Here the chosen expert gives the output 5 for the first token. We compute the gradient
# of $y$ with respect to the logits. With the derivative of the softmax it is
# $5 \, p_e (1 - p_e)$ for the chosen expert, and $-5 \, p_e p_i$ for any other expert
# $i$.

# %%
logits = ft.Tensor(np.log([[6.0, 3.0, 1.0]]), requires_grad=True)
p, choice, gate = choose_experts(logits)
y = gate * 5.0                                           # gate 0.6
y.sum().backward()
print("gradient:", logits.grad.round(2))

# %% [markdown]
# A larger first logit makes $y$ larger, and larger other logits make it smaller. Now a
# mistake that is easily made: first choose the expert, then take the softmax *of the
# chosen logit alone*.
#
# **Predict first.** What is the gate now, and what is the gradient?

# %%
logits = ft.Tensor(np.log([[6.0, 3.0, 1.0]]), requires_grad=True)
chosen_logit = ops.gather(logits, choice[..., None])     # (1, 1), the logit of expert 0
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
# In a large model each expert is on a device of its own. All devices work at the same
# time, and wait for the slowest. So each expert has a limited number of places, its
# **capacity**. For a row of $n$ tokens and $E$ experts it is
#
# $capacity = floor(k \, n / E)$
#
# where $k$ is the **capacity factor**. With $k = 1$ all experts together have about as
# many places as there are tokens. (In the library the capacity is also at most $n$. For
# short rows it is at least `min_capacity`, 4 by default. Our example has 1.)
#
# The tokens take the places **in their order**. A token that finds its expert full is
# **dropped**: no expert computes it. In this example we choose the experts by hand.

# %%
tokenizer = ft.data.shipped_tokenizer()
ids = tokenizer.encode("Return the first item of the list.").ids
words = [tokenizer.decode([i]).strip() for i in ids]
choice = np.array([0, 1, 0, 0, 2, 1, 0, 2])              # the expert of each token

# %% [markdown]
# The library's functions take a batch of rows. `chosen` is True at the expert of each
# token. Our batch has one row, without padding.

# %%
chosen = choice[:, None] == np.arange(3)                 # (8, 3): token, expert
chosen = chosen[None]                                    # (1, 8, 3): row, token, expert
real = np.ones((1, 8), bool)                             # True: no padding
capacity = expert_capacity(real, 1.0, experts=3, least=1)
kept = within_capacity(chosen, capacity)                 # (1, 8, 3)
print("capacity:", capacity)                             # floor(8 / 3)
print("kept:", kept[0].any(axis=1).astype(int))          # 1 at each token that is kept

# %% [markdown]
# The picture shows the same. A token goes to the next free place of its expert.

# %%
# a box: (column, row, text, kind); kind "data" is blue, "trained" is orange
first_place = [0.2, 2.95, 5.7]                           # the column for each expert
boxes, arrows = {}, []
for e, column in enumerate(first_place):
    boxes |= {f"expert {e}": (column + 0.55, 2.3, f"expert {e}", "none")}
for t, word in enumerate(words):
    e = choice[t]
    if kept[0, t, e]:
        taken = kept[0, :t, e].sum()                     # places taken before
        column = first_place[e] + 1.1 * taken
        boxes |= {f"token {t}": (t, 0, word), f"place {t}": (column, 1.6, word, "data")}
        arrows.append((f"token {t}", f"place {t}"))
    else:
        boxes |= {f"token {t}": (t, 0, word, "trained"),
                  f"dropped {t}": (t, 0.55, "dropped", "none")}
diagram(boxes, arrows, height=2.9,
        caption="Eight tokens choose among three experts with two places each. Four "
                "tokens choose expert 0. The last two of them (orange) are dropped.")

# %% [markdown]
# What is the output of a dropped token? The layer gives $y = 0$. The block around the
# layer computes $x + y$ (lesson 02). So the block gives the token's $x$ to the next
# block unchanged, and there the token may find a free place. Note that $y$ is 0, and
# not $x$: the block adds $x$ itself.
#
# **Predict first.** We reverse the order of the tokens. The choices stay the same. Are
# the same tokens dropped?

# %%
def dropped_words(kept):
    """The words that no expert takes. kept (8, 3)"""
    return [word for word, experts in zip(words, kept) if not experts.any()]

backwards = within_capacity(chosen[:, ::-1], capacity)
print("as it was:", dropped_words(kept[0]))
print("reversed: ", dropped_words(backwards[0, ::-1]))

# %% [check]
assert len(words) == 8
assert capacity[0] == 2
assert kept[0].sum(axis=0).tolist() == [2, 2, 2]
assert dropped_words(kept[0]) == ["item", "list"]
assert dropped_words(backwards[0, ::-1]) == ["Return", "first"]
assert np.array_equal(within_capacity(chosen, np.array([8])), chosen)

# %% [markdown]
# Other tokens are dropped. So the output of a token can depend on the tokens before it
# that choose the same expert, although this layer has no attention. With $k \geq E$ no
# token is ever dropped, since an expert then has a place for every token.
#
# In the paper all rows of a batch share the places. Then the output of a text depends
# on the other texts in its batch, even when the model is only used. In this library
# every row has its own places, so a text gets the same output alone and in a batch.
# Padding chooses no expert and takes no place.

# %%
quote(expert_capacity)
quote(within_capacity)

# %% [markdown]
# **Exercises:** `expert_capacity` and `within_capacity`.
#
# ## The layer
# Now we have all parts of the layer. `route` computes the router's logits.
# `run_experts` collects the tokens of each expert, calls the expert once, and puts each
# output back at the position of its token. (`add_losses` comes later in this lesson.)

# %%
quote(SwitchMLP.forward)

# %% [markdown]
# We make layers for the small GPT of lesson 04: width 64, and experts with 32 hidden
# features. `SwitchConfig` holds the settings.

# %%
WIDTH, HIDDEN = 64, 32

def make_mlp(hidden, rng):
    """An MLP with random weights of standard deviation 0.05."""
    return MLP(WIDTH, hidden, activation=ops.gelu_tanh, rng=rng, std=0.05)

def make_switch(experts, seed=0, **settings):
    """A Switch layer of MLPs with 32 hidden features."""
    rng = np.random.default_rng(seed)
    parts = [make_mlp(HIDDEN, rng) for _ in range(experts)]
    config = ft.SwitchConfig(experts=experts, **settings)
    return SwitchMLP(parts, config, rng=rng, std=0.05)

# %% [markdown]
# What does a token cost? We could use a clock, but a clock also measures Python. So we
# count products of two numbers. With width $C$ and $F$ hidden features an expert
# computes $2 \, C F$ products for a token: $C F$ up and $C F$ down. The router computes
# $C E$. It remains to count the tokens that each expert computes. `recording` (lesson
# 14) calls `see` with every input of the experts' first linear maps.

# %%
def products(layer, x):
    """The products of two numbers that a layer computes for x (B, T, C)."""
    rows = []
    def see(path, part, ctx):
        rows.append(part.shape[0])                       # the tokens of one expert

    first_maps = {str(e): expert.up for e, expert in enumerate(layer.experts)}
    with recording(first_maps, see), ft.no_grad():
        layer(x, ft.Context())
    of_experts = sum(rows) * 2 * WIDTH * HIDDEN
    tokens = x.shape[0] * x.shape[1]
    of_router = tokens * WIDTH * len(layer.experts)
    return of_experts + of_router

# %% [markdown]
# A layer has two capacity factors: `capacity` in training, and `eval_capacity` in
# evaluation mode. Here it is the number of experts, so that no token is dropped.
#
# **Predict first.** 256 tokens go through layers of 1, 4 and 16 experts. How do the
# parameters grow, and how do the products of a token?

# %%
rng = np.random.default_rng(0)
x = ft.Tensor(rng.standard_normal((4, 64, WIDTH)).astype(np.float32))
sizes, work = [], []
for experts in (1, 4, 16):
    layer = make_switch(experts, eval_capacity=experts).eval()
    sizes.append(sum(q.size for q in layer.parameters()))
    work.append(products(layer, x) / 256)
    print(f"{experts:2} experts: {sizes[-1]:6,} parameters, "
          f"{work[-1]:,.0f} products a token")

# %% [check]
assert sizes[2] == 16 * sizes[0]
assert work == [2 * WIDTH * HIDDEN + WIDTH * experts for experts in (1, 4, 16)]
half = products(make_switch(4, eval_capacity=4).eval(), x[:, :32])
assert half == work[1] * 128                             # linear in the tokens
tight = make_switch(4, eval_capacity=0.5, min_capacity=1).eval()
assert products(tight, x) < work[1] * 256                # dropped tokens cost nothing

# %% [markdown]
# With 16 experts the layer has 16 times the parameters. The work of a token grows only
# by the router, 64 products for each expert. It does not matter how the tokens are
# divided among the experts.
#
# But all experts must be in memory, though a token uses only one of them. A mixture of
# experts saves work, and **never memory**.
#
# ## A task
# What do we gain from the parameters? The small GPT has two blocks. We remove the
# feed-forward of its second block, and train other layers in its place. First we
# record the input $x$ of the old layer, while the GPT reads text, and compute its
# output $y$. The new layers learn to give the same output.

# %%
base, _ = ft.load("base-gpt-small")
train = ft.data.pretraining("prose", "train")
test = ft.data.pretraining("prose", "test")
original = base.blocks[1].mlp
inputs = []

def see(path, x, ctx):
    inputs.append(x.numpy())

# `up`, the first linear map of the layer, has the same input as the layer
with recording({"mlp": original.up}, see), ft.no_grad():
    for ids in train[:32768].reshape(16, 32, 64):        # 16 batches of 32 rows
        base(ids)

# %%
X = np.concatenate(inputs)                               # (512, 64, WIDTH)
with ft.no_grad():
    Y = original(ft.Tensor(X), ft.Context()).numpy()

# %% [markdown]
# The error of a new layer is the mean of the squared differences, divided by the
# variance of $y$. A layer that always gives the mean of $y$ has the error 1. A layer
# like the original one has 0. This is a small task, so we can afford many steps.

# %%
STEPS = 100 if "TINYFT_FAST" in os.environ else 200

def error_of(layer, rows, ctx):
    """The error of a layer for some rows of X."""
    difference = layer(ft.Tensor(X[rows]), ctx) - ft.Tensor(Y[rows])
    return (difference * difference).mean() / float(Y.var())

# %% [markdown]
# During training we also want to see which experts the tokens choose. We look at 2,048
# of the tokens, 32 rows of 64.

# %%
def routing(layer):
    """True at the expert of each of 2,048 tokens: (32, 64, 8)."""
    with ft.no_grad():
        logits = layer.router(ft.Tensor(X[:32]), ft.Context())
    _, choice, _ = choose_experts(logits)
    return choice[..., None] == np.arange(8)

# %% [markdown]
# In training, `layer(x, ctx)` adds its own losses to `ctx.losses`. A step adds them to
# the error. In the second half of the training the learning rate falls to 0.

# %%
def fit_layer(layer):
    """Train a layer. Returns the error of each step, and the shares of 20 steps."""
    rng = np.random.default_rng(0)
    optimizer = ft.AdamW(0.01)                           # the learning rate
    optimizer.start(layer.named_parameters())
    errors, shares = [], []
    for t in range(STEPS):
        ctx = ft.Context(rng=rng)
        rows = rng.integers(0, len(X), 16)               # 16 rows of 64 tokens
        error = error_of(layer, rows, ctx)
        total = sum(ctx.losses.values(), start=error)
        layer.zero_grad()
        total.backward()
        optimizer.step(min(1.0, 2 * (1 - t / STEPS)))    # a factor of the learning rate
        errors.append(error.item())
        if isinstance(layer, SwitchMLP) and t % (STEPS // 20) == 0:
            shares.append(routing(layer).mean(axis=(0, 1)))
    return np.array(errors), np.array(shares)

# %% [markdown]
# After its training we put each layer into the GPT, and measure the loss of the GPT on
# new text.

# %%
held_out = list(test[:8192].reshape(4, 32, 64))
results = {}                                             # of each layer, for the table

def measure(name, layer):
    """Train a layer and measure it in the GPT. Returns the shares of the experts."""
    layer.train()
    begin = time.thread_time()
    errors, shares = fit_layer(layer)
    seconds = (time.thread_time() - begin) / STEPS
    base.blocks[1].mlp = layer.eval()
    loss = ft.evaluate(base, held_out)["loss"]
    base.blocks[1].mlp = original
    results[name] = {"layer": layer, "seconds": seconds, "errors": errors, "loss": loss}
    last = errors[-30:].mean()                           # of the last 30 steps
    print(f"{name}: error {last:.2f}, loss of the GPT {loss:.3f}")
    return shares

# %% [markdown]
# We will compare the mixture of experts with two dense layers. An MLP with 32 hidden
# features has about as many products for a token. An MLP with 256 has about as many
# parameters. The original layer has 256, too.

# %%
full_loss = ft.evaluate(base, held_out)["loss"]
print(f"loss with the original layer: {full_loss:.3f}")
for hidden in (32, 256):
    measure(f"dense, {hidden}", make_mlp(hidden, np.random.default_rng(0)))

# %% [markdown]
# The layer with eight times the parameters is much better. But it uses all of them for
# every token. Now the mixture of eight experts with 32 hidden features each: it has the
# parameters of the second layer, and nearly the work of the first. The capacity factor
# is 2, so an expert has 2 · 64 / 8 = 16 places in a row of 64 tokens.

# %%
shares_alone = measure("Switch, no balance loss",
                       make_switch(8, capacity=2.0, balance=0.0))

# %% [markdown]
# It is *worse* than the dense layer of 32, with eight times its parameters! Let us look
# at the choices during training.

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

alone_layer = results["Switch, no balance loss"]["layer"]
starved = int((shares_alone[-1] < 0.01).sum())
print("shares at the end:", shares_alone[-1].round(2))
print(f"{starved} experts have less than 1 % of the tokens")
print(f"{100 * dropped(alone_layer):.0f} % of the tokens are dropped")

# %% [markdown]
# An expert that gets more tokens at the start learns faster. Its output is then better
# than those of the others, so a larger gate makes the loss smaller, and the router
# gives it still more tokens. Other experts get none. **An expert without tokens gets no
# gradient**, so it stays bad. And the popular expert is full: it has 16 places for the
# 64 tokens of a row, so many tokens are dropped.
#
# ## The balance loss
# So the paper adds a loss. Let $f_i$ be the share of tokens that choose expert $i$, and
# $P_i$ the mean of the probability $p_i$ over all tokens. The loss is
#
# $balance = \alpha \, E \sum_i f_i P_i$
#
# The paper takes $\alpha = 0.01$. Why the product? We want equal shares $f_i$. But they
# are counted, and have no derivative. $P_i$ has one. The derivative of the loss with
# respect to $P_i$ is $\alpha E f_i$. It is largest for the expert with the most tokens,
# so gradient descent lowers the probability of this expert most.
#
# $f$ is counted **before** tokens are dropped. After that a popular expert would have
# only as many tokens as it has places, and the loss would hardly see it.

# %%
quote(balance_loss)

# %%
def balance(rows):
    """The balance loss for α = 1, of tokens with these probabilities."""
    p = ft.Tensor(np.array([rows], float))               # (1, tokens, experts)
    choice = p.data.argmax(-1)
    chosen = choice[..., None] == np.arange(p.shape[-1])
    return balance_loss(p, chosen).item()

sure = [[1, 0, 0, 0]] * 8                                # eight tokens, four experts
unsure = [[0.28, 0.24, 0.24, 0.24]] * 8
print(f"all tokens to one expert, p = 1:     {balance(sure):.2f}")
print(f"each token to another expert, p = 1: {balance(np.eye(4)):.2f}")
print(f"all tokens to one expert, p = 0.28:  {balance(unsure):.2f}")

# %% [markdown]
# In the first line the loss has its largest value, $E = 4$. With equal shares it is 1.
# But look at the third line. All tokens choose one expert, and the loss is nearly 1.
#
# The paper says that the loss "is minimized under a uniform distribution". Is it?
#
# **Predict first.** Two experts. Six tokens have the probabilities (0.51, 0.49), four
# tokens (0.01, 0.99). The shares are 0.6 and 0.4. Is the loss above or below 1?

# %%
skewed = [[0.51, 0.49]] * 6 + [[0.01, 0.99]] * 4
print(f"loss {balance(skewed):.3f}")
print("f = 0.6 0.4   P =", np.mean(skewed, axis=0).round(2))

# %% [markdown]
# Below: 2 (0.6 · 0.31 + 0.4 · 0.69) = 0.924. Expert 0 has more tokens, but expert 1
# has the larger mean probability. So in each product one factor is large and the other
# small. Two things are true: the loss is 1 if $f$ *or* $P$ is uniform, and it is at
# most $E$. But a value near 1 does not prove that the shares are equal. So look at the
# shares themselves.
#
# Now the same layer with the balance loss.

# %%
shares = measure("Switch", make_switch(8, capacity=2.0))
empty_row = np.full((1, 20), np.nan)
both = np.concatenate([shares_alone.T, empty_row, shares.T])     # (8 + 1 + 8, 20)
heat_map(both, rows=[*names, "", *names], height=4.4,
         xlabel="time, from the first step to the last",
         caption="Above without the balance loss, below with it, in the same colours. "
                 "Below every expert has work.")

# %%
balanced = results["Switch"]["layer"]
print("shares at the end:", shares[-1].round(2))
print(f"{100 * dropped(balanced):.0f} % of the tokens are dropped")

# %% [check]
loss_of = {name: result["loss"] for name, result in results.items()}
assert full_loss < loss_of["dense, 256"] < loss_of["Switch"]
assert loss_of["Switch"] < loss_of["dense, 32"]
assert loss_of["Switch, no balance loss"] > loss_of["Switch"] + 0.03
assert starved >= 2
assert shares[-1].min() > 0.01
assert dropped(balanced) < 0.7 * dropped(alone_layer)
assert np.isclose(balance(skewed), 0.924)
assert np.isclose(balance(sure), 4)
assert np.isclose(balance(np.eye(4)), 1)
assert balance(unsure) < 1.13

# %% [markdown]
# The shares are not equal, and need not be. But every expert has tokens, and fewer are
# dropped. The layer is now a little better than the dense one of the same work. By how
# much? The dense layer of 256 lowers the loss of the GPT, compared with that of 32. The
# Switch layer reaches this share of the gain:

# %%
gain_of_256 = loss_of["dense, 32"] - loss_of["dense, 256"]
gain_of_switch = loss_of["dense, 32"] - loss_of["Switch"]
print(f"{100 * gain_of_switch / gain_of_256:.0f} % of the gain of eight times the work")

# %% [markdown]
# That is not much for eight times the parameters. The task is small, and the training
# short.
#
# **Exercise:** `balance_loss`.
#
# ## Two more helpers
# The softmax does not change if a constant is added to all logits. So nothing keeps the
# logits small, and large numbers have large rounding errors (lesson 24). The **z-loss**
# (Zoph et al. 2022) keeps them small. It is the mean over the tokens of
#
# $(ln \sum_i exp(z_i))^2$
#
# times $c$. The authors take $c = 0.001$. The loss grows with a constant that the
# softmax does not see:

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
# numbers between 0.99 and 1.01. So a token whose two best experts have nearly the same
# probability tries both of them. How many tokens is that? `route` computes the router's
# logits. It adds the noise only if the Context has a random generator.

# %%
tokens = ft.Tensor(X[:32])
balanced.train()
with ft.no_grad():
    noisy = balanced.route(tokens, ft.Context(rng=np.random.default_rng(1)))
    clean = balanced.route(tokens, ft.Context())
_, noisy_choice, _ = choose_experts(noisy)
_, clean_choice, _ = choose_experts(clean)
changed = np.mean(noisy_choice != clean_choice)
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
# capacity factor 1.25. Then an expert has 1.25 · 64 / 8 = 10 places instead of 16.

# %%
measure("Switch, factor 1.25", make_switch(8, capacity=1.25))
tight = results["Switch, factor 1.25"]["layer"]
print(f"dropped with factor 1.25: {100 * dropped(tight, 1.25):.0f} % of the tokens")
print(f"dropped with factor 2:    {100 * dropped(tight, 2.0):.0f} %")

# %%
def smooth(errors):
    """The mean error of every 20 steps in a row."""
    return np.convolve(errors, np.ones(20) / 20, "valid")

lines = {name: smooth(result["errors"]) for name, result in results.items()}
curves(lines, log="y", ylabel="error",
       caption="The error in training, means of 20 steps.")

# %% [markdown]
# In training the layer with factor 1.25 has the larger error, since the output of a
# dropped token is 0. In evaluation mode both layers have the factor 2, the default of
# `eval_capacity`. So fewer tokens are dropped, and on new text the two layers give the
# GPT nearly the same loss.
#
# ## "Seven times faster"
# A lecture (*Reduced Complexity Models and Pretraining*) says that the Switch
# Transformer "is an LLM with 1.6T parameters" with a "7x increase in pre-training
# speed". But these are two models. The paper compares each with a dense T5 model:
#
# - A Switch model with the work per token of T5-Base is 7 times as fast as T5-Base.
# - The model with 1.6 trillion parameters is 4 times as fast as T5-XXL, the largest T5.
#
# *Faster* means **less time to the same loss**. With equal work per token no step is
# faster, but fewer steps are needed. We can ask the same of our layers.
#
# **Predict first.** The dense layer of 32 took all the steps to come to its error.
# After what share of the steps is the Switch layer (factor 2) as good?

# %%
goal = smooth(results["dense, 32"]["errors"])[-1]
of_switch = smooth(results["Switch"]["errors"])
first = np.flatnonzero(of_switch <= goal)[0]             # the first window as good
share_of_steps = (first + 20) / STEPS                    # a window has 20 steps
for name in ("dense, 32", "Switch"):
    print(f"{name:10}{1000 * results[name]['seconds']:5.1f} ms a step")
print(f"the Switch layer needs {100 * share_of_steps:.0f} % of the steps")

# %% [markdown]
# Fewer steps, but each step takes longer here, although the products are nearly the
# same. Eight small matrix products take longer than one, and sorting the tokens takes
# time as well. On many devices the transport of the tokens takes time. So count both:
# steps to the goal, and the time of a step.
#
# ## Back to one network
# A mixture of experts needs fewer steps, but it is large to store. Can it teach a small
# dense model? The lecture says in one line: "using the same techniques as DistilBERT:
# initializing student weights from teacher". The student of DistilBERT copies whole
# blocks. The student of a Switch model copies **all but the experts**: embeddings,
# attention, norms, dense feed-forwards. In the place of the experts it has one
# feed-forward with random values.
#
# First we need a teacher: the small GPT with our Switch layer in its second block.

# %%
settings = ft.SwitchConfig(experts=8)                    # in every second block
config = replace(base.config, hidden=HIDDEN, switch=settings)
teacher = ft.GPT(config)
own = teacher.named_parameters()
for name, q in base.named_parameters().items():
    if ".mlp." not in name:
        own[name].copy_(q.data)                          # embeddings, attention, norms
teacher.blocks[0].mlp = base.blocks[0].mlp
teacher.blocks[1].mlp = balanced

# %%
student = ft.dense_student(teacher)
of_teacher = teacher.named_parameters()
new = [name for name in student.named_parameters() if name not in of_teacher]
print("new in the student:", new)
for name, model in (("teacher", teacher), ("student", student)):
    print(f"{name}: {ft.count(model).total:,} parameters")

# %% [markdown]
# The student trains on a mix of the labels $y$ and the teacher's probabilities $t$. In
# the paper the teacher has the smaller share:
#
# $L = 0.75 \, CE(y, s) + 0.25 \, KL(t \parallel s)$
#
# This is `ft.Hinton` (lesson 17) with $\lambda = 0.25$ and $T = 1$. Beside the student
# we train a model of the same shape that starts with random weights, for a few steps.

# %%
few = STEPS // 10
batches = list(train[-few * 512:].reshape(few, 8, 64))   # 8 rows in each
distill = ft.Hinton(teacher, temperature=1.0, soft=0.25)
random = ft.GPT(student.config, seed=1)
random.blocks[0].mlp = make_mlp(256, np.random.default_rng(1))   # as in the student

# %%
def loss_on_new_text(model):
    return ft.evaluate(model, held_out)["loss"]

start_loss = loss_on_new_text(student)
for model in (student, random):
    ft.fit(model, batches, few, ft.AdamW(0.0005), loss=distill, progress=False)
teacher_loss = loss_on_new_text(teacher)
student_loss = loss_on_new_text(student)
random_loss = loss_on_new_text(random)
print(f"teacher {teacher_loss:.2f}")
print(f"student {start_loss:.2f}, after {few} steps {student_loss:.2f}")
print(f"random weights, after {few} steps {random_loss:.2f}")

# %% [markdown]
# The student is near its teacher from the start, thanks to the copied parts. Only its
# new feed-forward has to be learned.
#
# How much of the teacher's advantage does a student keep after a long training? The
# lecture says that it "retains about 30% of the teacher's quality gains". This is
# right, but it means 30 % of the *gain* over a dense model, not of the quality. The
# paper gives the logarithm of the perplexity with the opposite sign, so the larger
# number is better:

# %%
dense_t5 = -1.636                                        # T5-Base
gain = -1.444 - dense_t5                                 # of the Switch model
kept_gain = -1.580 - dense_t5                            # of its student
print(f"gain of the teacher: {gain:.3f}, of the student: {kept_gain:.3f}")
print(f"the student keeps {100 * kept_gain / gain:.0f} % of the gain")

# %% [markdown]
# The teacher has 3.8 billion parameters, the student has the 223 million of T5-Base. So
# the student is a T5-Base that is somewhat better. In the paper the kept share depends
# on the size of the teacher. A student with 18 % of the teacher's parameters keeps 37 %
# of the gain. A student with 1 % of them keeps 28 %.

# %% [check]
loss_of = {name: result["loss"] for name, result in results.items()}
errors_of = {name: result["errors"][-30:].mean() for name, result in results.items()}
assert errors_of["Switch"] < 0.85 * errors_of["Switch, factor 1.25"]
assert errors_of["Switch"] < 0.96 * errors_of["dense, 32"]
assert dropped(tight, 2.0) < 0.7 * dropped(tight, 1.25)
assert abs(loss_of["Switch"] - loss_of["Switch, factor 1.25"]) < 0.01
assert 0 < share_of_steps < 0.9
assert new == [f"blocks.1.mlp.{part}" for part in (
    "up.weight", "up.bias", "down.weight", "down.bias")]
assert ft.count(student).total < 0.9 * ft.count(teacher).total
assert ft.count(random).total == ft.count(student).total
assert abs(teacher_loss - loss_of["Switch"]) < 1e-4
assert teacher_loss < student_loss < random_loss - 1
assert student_loss < start_loss < teacher_loss + 0.5
assert round(100 * kept_gain / gain) == 29

# %% [markdown]
# ## The whole lesson in one table
# The layers in the place of the second feed-forward: their parameters, the products of
# two numbers for a token, the time of a training step of 16 rows in milliseconds, and
# the loss of the GPT on new text.

# %%
def print_row(name, layer, milliseconds, loss):
    parameters = sum(q.size for q in layer.parameters())
    if isinstance(layer, SwitchMLP):
        count = 2 * WIDTH * HIDDEN + WIDTH * 8           # one expert, and the router
    else:
        count = 2 * layer.up.weight.size                 # up and down
    print(f"{name:26}{parameters:10,}{count:10,}{milliseconds:>11}{loss:8.3f}")

print(f"{'':26}{'parameters':>10}{'products':>10}{'ms a step':>11}{'loss':>8}")
print_row("the original layer", original, "", full_loss)
for name, result in results.items():
    milliseconds = f"{1000 * result['seconds']:.1f}"
    print_row(name, result["layer"], milliseconds, result["loss"])

# %% [markdown]
# With equal work per token the mixture of experts is a little better than the dense
# layer, if the load is balanced. A dense layer with as many parameters is better still,
# at eight times the work. So experts are a way to have more parameters when *work* is
# what limits you. When memory limits you, see lessons 13 to 15 instead.
#
# This was a small task: one layer, trained once, with a known output for every token. A
# mixture of experts needs many tokens, since each expert sees only its own share.
#
# **Exercises.** `tinyft start experts` writes six files:
#
# - `choose_experts`: probabilities, expert and gate
# - `expert_capacity` and `within_capacity`: how many tokens an expert takes, and which
# - `balance_loss` and `z_loss`: the two losses of the router
# - `forward`: the whole layer
