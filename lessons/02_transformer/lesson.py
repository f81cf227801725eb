# %% [markdown]
# # 02 The transformer
#
# **Minutes:** 35, with the exercises 85. **Prerequisites:** lesson 01.
# **Exercises:** causal_mask, softmax_attention, split_heads, gelu_tanh
#
# A transformer holds a text as a table of vectors, one row per token, and improves the rows layer by layer. Attention moves
# information between rows; the MLP works on each row alone. Here attention is computed by hand inside a pretrained model, and at
# the end each part is taken away to see what it was good for.

# %%
import numpy as np

import tinyft as ft
from tinyft.learn.draw import figure
from tinyft.learn.lessons import quote, show
from tinyft.models.blocks import PostNormBlock, PreNormBlock

gpt, tokenizer = ft.load("base-gpt")
bert, _ = ft.load("base-bert")
ids = np.array([tokenizer.encode("Return the first item of the list, or None if the list is empty.").ids])
words = [tokenizer.decode([i]).strip() for i in ids[0]]
T, D = len(words), gpt.config.width // gpt.config.heads
print(T, "tokens:", *words)

# %% [markdown]
# ## Attention
# Each row makes a **query** (what do I look for?), a **key** (what am I?) and a **value** (what do I tell?). Query $i$ is compared with
# every key, a softmax makes weights of the scores, and the weights mix the values: $P V$ with $P$ = softmax$(Q K^\top / \sqrt{D})$.
# A **head** does this with $D$ of the $C$ features; here $C = 128$ and four heads have $D = 32$ each. Head 0 of the first layer:

# %%
context = ft.Context(output_hidden_states=True)                            # output_hidden_states: keep what enters each layer
logits = gpt(ids, context).data
attn, x = gpt.blocks[0].attn, gpt.blocks[0].norm1(context.hidden_states[0], context)      # x (1, T, C) enters the attention
q, k, v = (part(x, context).data[0, :, :D] for part in (attn.q, attn.k, attn.v))
may = np.tri(T, dtype=bool)                                # row i is True up to column i: the token itself and what came before
scores = q @ k.T / np.sqrt(D)
e = np.where(may, np.exp(scores), 0)
P = e / e.sum(axis=1, keepdims=True)
library = ft.ops.attention(ft.Tensor(q), ft.Tensor(k), ft.Tensor(v), causal=True).data
print(f"largest difference from the library: {abs(P @ v - library).max():.0e} of {abs(library).max():.1f}")
assert np.allclose(P @ v, library, atol=1e-5) and np.allclose(P.sum(axis=1), 1)

# %% [markdown]
# ## What heads look at
# **Predict first:** GPT guesses the next token from those before it. BERT fills gaps, and may look both ways. How will their $P$ differ?
# We search all heads of BERT's first layer for the one that looks most at the token before, and the one that looks most at the next.

# %%
context = ft.Context(output_hidden_states=True)
bert(ids, context)
attention = bert.blocks[0].attn
q, k = (ft.models.blocks.split_heads(part(context.hidden_states[0], context), attention.heads) for part in (attention.q, attention.k))
heads = ft.ops.softmax(q @ k.T * D**-0.5).data[0]          # (H, T, T), no mask
before, after = (max(heads, key=lambda p: np.diag(p, offset).mean()) for offset in (-1, 1))
print(f"mean weight on the token before: {np.diag(before, -1).mean():.2f}, and in another head on the next: {np.diag(after, 1).mean():.2f}")
assert not np.triu(P, 1).any() and np.diag(before, -1).mean() > 0.5 < np.diag(after, 1).mean()
fig, axes = figure(3, height=2.75)
for ax, p, title in zip(axes, (P, before, after), ("GPT: a head", "BERT: the token before", "BERT: the next token")):
    ax.imshow(p, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(T), words, rotation=90, fontsize=7)
    ax.set_yticks(range(T), words if ax is axes[0] else [], fontsize=7)
    ax.set(title=title, xlabel="key", ylabel="query" if ax is axes[0] else "")
show("Attention weights P, one row for each query. GPT's lie below the diagonal; BERT has heads for the token before and for the next.")

# %% [markdown]
# ## Why √D, and not √C
# A product of two vectors of $D$ random numbers of size 1 has the size $\sqrt{D}$. Undivided, the softmax of large scores is nearly one-hot,
# and its gradient nearly 0. Divided by the $\sqrt{C}$ of the whole model, 32 heads would hear their scores at $1/\sqrt{32}$.

# %%
rng, sizes = np.random.default_rng(0), 4**np.arange(1, 6)
largest = {}
for name, scale in (("no scale", lambda d: 1), ("1/√D", lambda d: d**-0.5), ("1/√C, 32 heads", lambda d: (32 * d)**-0.5)):
    draws = [(rng.normal(size=(100, 1, d)) * rng.normal(size=(100, 64, d))).sum(axis=-1) * scale(d) for d in sizes]
    largest[name] = [ft.ops.softmax(s).data.max(axis=1).mean() for s in draws]
assert largest["no scale"][-1] > 0.8 and max(largest["1/√D"]) < 0.25 and max(largest["1/√C, 32 heads"]) < 0.04
fig, ax = figure(height=2.4)
for name, values in largest.items():
    ax.semilogx(sizes, values, "o-", ms=4, label=name)
ax.set(xlabel="D, the width of a head", ylabel="largest weight of 64", ylim=(0, 1), xticks=sizes, xticklabels=sizes)
ax.minorticks_off()
ax.legend()
show("The mean largest weight among 64 keys. Without a scale it goes to 1 as D grows; with 1/√D it stays; with 1/√C all weights are nearly 1/64.")

# %% [markdown]
# ## The mask
# $P$ is masked **before** the softmax. Masked after it, the rows no longer add up to 1, and the future has had its say in the sum.
# **Predict first:** we change the last token. Which of GPT's outputs change? Which of BERT's?

# %%
late = np.where(may, ft.ops.softmax(scores).data, 0)
print("masked after the softmax, the first rows add up to", *(f"{total:.2f}" for total in late.sum(axis=1)[:4]))
assert late.sum(axis=1)[0] < 0.9
other = ids.copy()
other[0, -1] += 1
for name, model in (("GPT", gpt), ("BERT", bert)):
    moved = abs(model(other).data - model(ids).data).max(axis=-1)[0] > 1e-4
    print(f"{name:<5} outputs that change: {moved.sum()} of {T}")
    assert moved.sum() == (1 if model is gpt else T)
cache = ft.Cache()                                         # so the keys of the past can be kept, and later queries see them all
first, rest = gpt(ids[:, :10], cache=cache).data, gpt(ids[:, 10:], cache=cache).data
assert np.allclose(np.concatenate([first, rest], axis=1), logits, atol=1e-4)

# %% [markdown]
# ## The block; decoder, encoder, and both
# Each part **adds** to the row. GPT-2 normalises what a part reads, BERT (as the first transformer) what it leaves:

# %%
quote(PreNormBlock.forward)
quote(PostNormBlock.forward)
z = ft.Tensor(np.linspace(-6, 6, 1201))
apart = abs(ft.ops.gelu(z).data - ft.ops.gelu_tanh(z).data).max()
print(f"\nBERT's GELU and GPT-2's differ by at most {apart:.4f}")
assert 1e-4 < apart < 1e-3                                 # too little to see, enough to spoil a comparison of logits
h, free, shuffled = ft.Tensor(rng.normal(size=(1, T, 128)).astype(np.float32)), bert.blocks[0].attn, rng.permutation(T)
assert np.allclose(free(h[:, shuffled]).data, free(h).data[:, shuffled], atol=1e-4)      # without positions and mask there is no order
assert ft.ops.attention(h[:, :5], h, h).shape == (1, 5, 128)      # 5 queries, 16 keys

# %% [markdown]
# With the mask the stack is a **decoder** (GPT), without it an **encoder** (BERT). The transformer of 2017 has both: a second attention in
# the decoder takes its queries from the text being written, its keys and values from the encoded source: 5 words written and 16 read
# make weights $(5, 16)$. The library has no such model yet, but its attention takes any number of queries and keys.
#
# ## What the parts are good for
# **Predict first:** two thirds of a block's numbers are in the MLP. Which hurts more: all attention gone, or all MLPs?

# %%
held_out = ft.data.pretraining("prose", "test")[:48 * 128].reshape(48, 128)

def loss_without(part, change):
    model, _ = ft.load("base-gpt")
    tensors = {n: p for n, p in model.named_parameters().items() if part and part in n}
    for p in tensors.values():
        p.copy_(p.data * change)
    with ft.no_grad():
        scores = ft.ops.log_softmax(model(held_out)).data[:, :-1]
    return -np.take_along_axis(scores, held_out[:, 1:, None], axis=2).mean(), sum(p.size for p in tensors.values())

print("taken away          numbers   loss")
losses = {}
for name, part, change in (("nothing", "", 1), ("√D", "attn.q", D**0.5), ("positions", "pos", 0), ("MLPs", "mlp", 0), ("attention", "attn", 0)):
    losses[name], numbers = loss_without(part, change)
    print(f"{name:<16}{numbers:>11,}{losses[name]:>7.2f}")
    assert name == "nothing" or losses[name] > losses["nothing"] + 0.1 and (losses[name] > np.log(2048)) == (name == "MLPs")

# %% [markdown]
# Without its MLPs the model is worse than one that guesses, ln 2048 = 7.62: what is left was trained to lean on them. So this table tells
# what the parts do in this model, not what a model could learn without them. Attention also costs $T^2$ weights for each head.
#
# **Exercises:** `tinyft start causal_mask`, `tinyft start softmax_attention`, `tinyft start split_heads`, `tinyft start gelu_tanh`
