# %% [markdown]
# # 25 Your own checkpoint
#
# **Reading:** 55 minutes. **You need:** lessons 01 to 04, and 08.
# **Exercises:** frequencies, rotary, repeat_heads, sum_heads, encode_q4_1
# (about an hour).
#
# The models of the earlier lessons came with the library. Yours does not. Somebody
# trained it and published it, as a folder or as one file. A trained model on a disk is
# called a **checkpoint**.
#
# Llama, Mistral, Qwen2 and SmolLM2 are language models with the same architecture. This
# lesson opens a checkpoint of that architecture, looks at every part of it, tunes it
# with LoRA, and writes an adapter that PEFT reads. PEFT is the library of Hugging Face
# for adapters.

# %%
import json
import os
import struct
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import tinyft as ft
from tinyft.compress import Q4_1
from tinyft.data.rows import segment_batches
from tinyft.formats.gguf import read_gguf
from tinyft.learn.draw import bars, curves, diagram, figure, heat_map
from tinyft.learn.lessons import quote, show
from tinyft.models.blocks import GatedMLP

rng = np.random.default_rng(0)
workplace = TemporaryDirectory()                  # removed when the lesson ends
folder = Path(workplace.name)

# %% [markdown]
# ## A checkpoint to begin with
# For a first look we want a checkpoint of which we know everything. So we make one: a
# very small Llama, trained for some seconds on the prose that comes with the library
# (documentation and comments). After that we treat it as if a stranger had made it.
#
# `LlamaConfig` holds the sizes. `std` is the standard deviation of the initial weights.
# The other names that are new to you are explained in later sections.

# %%
config = ft.LlamaConfig(vocab=2048, positions=512, width=64, layers=2, heads=4,
                        key_value_heads=2, hidden=192, tied=True, eps=1e-5, std=0.08)
model = ft.Llama(config, seed=0)
STEPS = 60 if "TINYFT_FAST" in os.environ else 110
prose = ft.data.pretraining("prose", "train")
batches = ft.data.lm_batches(prose, T=64, batch_size=16)
ft.fit(model, batches, STEPS, ft.AdamW(1e-2), ft.cosine_schedule(warmup=20),
       progress=False)
tokenizer = ft.data.shipped_tokenizer()
checkpoint = folder / "checkpoint"
ft.save(model, checkpoint, tokenizer)
parameters = ft.count(model).total
print(f"{parameters:,} parameters")

# %% [markdown]
# As in lesson 08 we measure the perplexity on prose and on Python source, on 32 rows of
# 64 tokens from the split `test`. Lower is better.

# %%
def test_rows(kind):
    return ft.data.held_out_batches(ft.data.pretraining(kind, "test"), T=64, count=32)

prose_test = test_rows("prose")
python_test = test_rows("source")
base_scores = [ft.perplexity(model, prose_test), ft.perplexity(model, python_test)]
print(f"prose {base_scores[0]:.0f}   Python {base_scores[1]:.0f}")

# %% [check]
assert base_scores[0] < 700
assert 900 < base_scores[1] < 2048

# %% [markdown]
# A model that gives each of the 2,048 tokens the same probability has the perplexity
# 2,048. Ours is far better on prose. About Python it knows little, so Python will be
# our task.
#
# ## What is in the folder
# `ft.save` wrote a folder as the library `transformers` of Hugging Face does. A model
# that you download has the same files.
#
# The model has 229,696 parameters in float32. One of the files holds them. Which one?

# %%
for file in sorted(checkpoint.iterdir()):
    print(f"{file.name:22} {file.stat().st_size:8,} bytes")

# %% [markdown]
# A parameter in float32 needs four bytes, so all of them need 918,784. The file
# `model.safetensors` has a few more: it begins with a table of contents.
#
# - `config.json` says which model this is, and its sizes.
# - `model.safetensors` holds the tensors.
# - `tokenizer.json` holds the vocabulary and the rules that cut a text into tokens.
# - `tokenizer_config.json` names the special tokens.
#
# We read them one by one. First the config.

# %%
settings = json.loads((checkpoint / "config.json").read_text())
for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
    print(f"{key:22} {settings[key]}")

# %% [markdown]
# These are the fields of our `LlamaConfig` under other names. `hidden_size` is the
# width $C = 64$, and `intermediate_size` is the width of the feed-forward part, 192.
# `rope_theta` belongs to the positions, which have a section below.
#
# A key that the library does not know may change what the model computes. So `ft.load`
# does not skip such a key: it raises an error that names it.
#
# Now the tensors. The format safetensors is simple: first 8 bytes with the length of
# the table, then the table as JSON, then the bytes of the tensors.

# %%
def read_safetensors(file):
    "The table of contents, {name: entry}, and the bytes of the tensors."
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")   # the lowest byte comes first
    table = json.loads(data[8:8 + length])
    table.pop("__metadata__", None)               # notes about the file, not a tensor
    return table, data[8 + length:]

table, tensors = read_safetensors(checkpoint / "model.safetensors")
for name in sorted(table):
    if "layers.1" not in name:
        print(f"{name:42} {table[name]['dtype']}  {table[name]['shape']}")

# %% [markdown]
# We left out layer 1, which has the same names as layer 0. There is no output layer in
# the list: with `tie_word_embeddings` the table of embeddings is used a second time, as
# the output layer.
#
# An entry also says where its bytes begin and end. So we can read a tensor without the
# library.

# %%
name = "model.layers.0.self_attn.k_proj.weight"
begin, end = table[name]["data_offsets"]
values = np.frombuffer(tensors[begin:end], "<f4")        # "<": lowest byte first
weight = values.reshape(table[name]["shape"])
print(weight.shape, np.array_equal(weight, model.blocks[0].attn.k.weight.numpy()))

# %% [check]
assert 4 * parameters == len(tensors)
assert np.array_equal(weight, model.blocks[0].attn.k.weight.numpy())
assert settings["intermediate_size"] == 192 and "lm_head.weight" not in table

# %% [markdown]
# This is the linear map that makes the keys. `transformers` calls it `k_proj`, our
# library calls it `attn.k`. The numbers are the same. `ft.load` does all of this, for
# all files of the folder:

# %%
model, tokenizer = ft.load(checkpoint)
text = "Return the value"
print(tokenizer.encode(text).tokens, tokenizer.encode(text).ids)

# %% [markdown]
# Model and tokenizer belong together: the model sees only ids, such as 483. With
# another tokenizer an id would stand for another piece of text. So always keep both in
# one folder.
#
# ## A Llama is not a GPT
# The GPT of lesson 02 and a Llama are both decoders: a stack of blocks with attention
# and a feed-forward part. Four things differ: the positions, the norm, the number of
# heads of keys and values, and the feed-forward part. They are orange in the picture.

# %%
diagram(
    {"gpt": (0, 0, "GPT", "none"), "llama": (2, 0, "Llama", "none"),
     "e": (0, 1, "token embedding\n+ position embedding", "data"),
     "E": (2, 1, "token embedding\nand nothing else", "trained"),
     "n": (0, 2, "layer norm"), "N": (2, 2, "RMS norm", "trained"),
     "a": (0, 3, "attention\n4 heads of q, k and v"),
     "A": (2, 3, "attention, q and k rotated\n4 heads of q, 2 of k and v", "trained"),
     "m": (0, 4, "layer norm"), "M": (2, 4, "RMS norm", "trained"),
     "f": (0, 5, "feed-forward\ntwo maps, GELU"),
     "F": (2, 5, "feed-forward with a gate\nthree maps, SiLU", "trained")},
    [("e", "n"), ("n", "a"), ("a", "m"), ("m", "f"),
     ("E", "N"), ("N", "A"), ("A", "M"), ("M", "F")],
    height=4.2, caption="One block of each. The additions beside attention and "
    "feed-forward are the same in both, and are left out.")

# %% [markdown]
# The norm and the feed-forward part need a few lines. The positions and the heads get a
# section each.
#
# **RMS norm.** A layer norm subtracts the mean of a row, and divides by the standard
# deviation. An RMS norm only divides, by the root of the mean square:
#
# $y = w \, x / \sqrt{\mathrm{mean}(x^2) + \varepsilon}$
#
# It has a weight $w$ and no bias. The small number $\varepsilon$, the `rms_norm_eps` of
# the config, avoids a division by 0.
#
# **Predict first.** Take the row (3, −1, −2, 0), whose mean is 0, and let all weights
# be 1. Do the two norms give the same result? And for the row (8, 4, 3, 5), which is
# the first row plus 5?

# %%
row = np.array([3.0, -1.0, -2.0, 0.0])
ones, zeros = np.ones(4), np.zeros(4)
for x in (row, row + 5):
    with_mean = ft.ops.layer_norm(ft.Tensor(x), ones, zeros).numpy()
    without_mean = ft.ops.rms_norm(ft.Tensor(x), ones).numpy()
    print(x, " layer norm", with_mean.round(2), " RMS norm", without_mean.round(2))

# %% [check]
normed = ft.ops.rms_norm(ft.Tensor(row), ones).numpy()
assert np.allclose(normed, ft.ops.layer_norm(ft.Tensor(row), ones, zeros).numpy(),
                   atol=1e-4)
assert np.allclose(with_mean, normed, atol=1e-4)          # of row + 5: the 5 is removed
assert abs(without_mean - normed).max() > 0.5             # of row + 5: the 5 stays

# %% [markdown]
# With mean 0 they are equal. In the second row the layer norm removes the 5, and the
# RMS norm keeps it. A row in a network may have any mean, so one norm cannot stand for
# the other.
#
# **Feed-forward with a gate.** Two linear maps lead from $C$ to the larger width,
# `gate` and `up`. A GPT has only one. The result of `gate` goes through SiLU,
# $\mathrm{silu}(x) = x \, \sigma(x)$ with the sigmoid $\sigma$, and is multiplied with
# the result of `up`, entry by entry. So each of the 192 entries of `up` has its own
# gate. If the gate is near 0, the entry does not pass. The op `swiglu` does both steps,
# `down` leads back to $C$, and `drop` is dropout.

# %%
quote(GatedMLP.forward)

# %% [markdown]
# Three maps of the same size have more parameters than two. So the feed-forward width
# $F$ of a Llama is smaller. A GPT has two maps between $C$ and $4C$, with $8 C^2$
# weights. Three maps between $C$ and $F$ have $3 C F$ weights. The two are equal for
# $F = 8C/3$. For $C = 64$ this is 171. Checkpoints take a rounder number: ours has 192.
#
# ## Positions as rotations
# Attention does not know which word is first (lesson 02). A GPT adds a trained row to
# each token, one row for every position. A Llama has no such rows. Look at the list of
# tensors again: nothing in it belongs to a position.
#
# Instead it *rotates* the queries and the keys. The numbers of a query are taken in
# pairs, and each pair is a point in a plane. At position $p$ the pair $i$ is rotated by
# the angle
#
# $$p \cdot b^{-2i/D}$$
#
# Here $D$ is the width of a head, $i$ counts its pairs from 0 to $D/2 - 1$, and $b$ is
# the base, the `rope_theta` of the config. Keys are rotated by the same rule. Values
# are not. Su et al. (2021) call this rotary positions, **RoPE** for short.

# %%
D = config.width_of_heads                         # 16
base = config.rope_base                           # 10,000
pairs = np.arange(D // 2)
speed = base ** (-2 * pairs / D)                  # radians for one position
for i in pairs:
    print(f"pair {i}: {speed[i]:.4f} radians for one position")

# %% [markdown]
# Pair 0 turns by 1 radian (57 degrees) for every position. Each later pair is slower,
# here by a factor of 3.2. We draw the point (1, 0) of three pairs, at the positions 0
# to 5.

# %%
_, row_of_axes = figure(columns=3, height=2.3)
for i, axes in enumerate(row_of_axes):
    for position in range(6):
        angle = position * speed[i]
        x, y = np.cos(angle), np.sin(angle)
        axes.plot([0, x], [0, y], color="#3b82f6", alpha=1 - 0.12 * position)
        if i < 2 or position in (0, 5):           # the others would overlap
            axes.text(1.18 * x, 1.18 * y, position, ha="center", va="center")
    axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title=f"pair {i}")
    axes.set_axis_off()
show("The position is the angle, and every pair has its own speed. Fast pairs tell "
     "near positions apart, slow pairs far ones.")

# %% [markdown]
# A point $(a, b)$ rotated by an angle $\theta$ is
# $(a \cos\theta - b \sin\theta, \; a \sin\theta + b \cos\theta)$. The first numbers of
# all pairs stand in the first half of a head, the second numbers in the second half.

# %%
def rotate(x, position):
    "A query or key x (D,), rotated by its position."
    first, second = x[:D // 2], x[D // 2:]        # pair i is first[i], second[i]
    cos, sin = np.cos(position * speed), np.sin(position * speed)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos])

query = rng.normal(size=D)
key = rng.normal(size=D)
print("length of the query:", np.linalg.norm(query).round(6),
      " rotated:", np.linalg.norm(rotate(query, 7)).round(6))

# %% [markdown]
# A rotation does not change a length. What does it do to a score, the product of a
# query and a key?
#
# **Predict first.** A query stands at position 5 and a key at position 2. Then we move
# both, to 105 and 102. How does the score change? And if only the query moves, to 8?

# %%
for q_position, k_position in ((5, 2), (105, 102), (8, 2)):
    score = rotate(query, q_position) @ rotate(key, k_position)
    print(f"query at {q_position:3}, key at {k_position:3}: score {score:.6f}")

# %% [markdown]
# For a given query and key, the score depends on the *distance* of the two positions,
# and not on the positions themselves. The reason is simple. A pair of the query and a
# pair of the key are two arrows in a plane. Their product depends on their lengths and
# on the angle between them. Here the arrows are turned by $5\theta$ and $2\theta$, so
# this angle changes by the difference, $3\theta$. At 105 and 102 the difference is the
# same. Now for all positions from 0 to 7:

# %%
scores = np.zeros((8, 8))
for m in range(8):
    for n in range(8):
        scores[m, n] = rotate(query, m) @ rotate(key, n)
labels = [str(position) for position in range(8)]
heat_map(scores, rows=labels, columns=labels, values=".1f", ylabel="query at",
         xlabel="key at", caption="One query and one key at all positions. Along a "
         "diagonal, where the distance is the same, the scores are equal.")

# %% [check]
for distance in range(-7, 8):
    assert np.ptp(np.diag(scores, distance)) < 1e-9
assert np.isclose(np.linalg.norm(query), np.linalg.norm(rotate(query, 7)))
assert abs(scores[5, 2] - scores[6, 2]) > 0.01

# %% [markdown]
# So a Llama can learn "three tokens back" once, and not anew for every position.
#
# The abstract of Su et al. (2021) names one more property: "decaying inter-token
# dependency with increasing relative distances". If you read this as *the score of a
# query and a key gets smaller with their distance*, it is false. We compare a query
# that equals its key with our random pair.

# %%
same = np.ones(D)
distances = np.arange(100)
lines = {"q = k": [rotate(same, n) @ same for n in distances],
         "our q and k": [rotate(query, n) @ key for n in distances]}
curves(lines, x=distances, xlabel="distance", ylabel="score",
       caption="A query equal to its key scores highest at distance 0. The other pair "
               "scores higher at some distances than at 0.")

# %% [check]
assert max(lines["q = k"][1:]) < lines["q = k"][0]
assert (np.diff(lines["q = k"]) > 0).any()                # not a steady fall
assert max(lines["our q and k"][1:]) > lines["our q and k"][0] + 1

# %% [markdown]
# If query and key are equal, the score is largest at distance 0: a rotation of the
# query can only move the arrows apart. But even then the score does not fall steadily.
# For other vectors a rotation may bring the arrows together. This is useful: a head may
# look for the token three positions back. It could not if nearer tokens always won.
#
# Rotary positions have no parameters, and the formula has no largest position. But a
# model has seen only the distances in its training texts. Some checkpoints were trained
# further on longer texts, with slower rotations. Then the config has an entry
# `rope_scaling`, and the exercise `frequencies` takes it into account.
#
# ## Which two numbers are a pair?
# In the paper the pairs are neighbours: numbers 0 and 1, numbers 2 and 3. In
# `transformers`, and here, number $i$ belongs to number $i + D/2$.

# %%
halves = np.concatenate([pairs, pairs])           # 0 1 2 ... 0 1 2 ...
neighbours = np.repeat(pairs, 2)                  # 0 0 1 1 2 2 ...
numbers = np.array([halves, neighbours])
heat_map(1 + numbers, rows=["here", "paper"], columns=[str(i) for i in range(D)],
         texts=numbers.astype(str), height=1.5, xlabel="place in the head",
         caption="The pair to which each of the 16 numbers of a head belongs. A pair "
                 "has one colour.")

# %% [markdown]
# Both rules work, if the rows of the maps `q` and `k` stand in the order that the rule
# wants. But the tensors do not show for which rule they were made: their shapes are the
# same. (GGUF files, a format that we open below, hold a Llama in the order of the
# paper.)
#
# What happens if a loader takes the wrong rule? We put the rows of `q` and `k` into the
# order of the paper, where the two rows of a pair are neighbours. `argsort` finds this
# order: it sorts the rows by their pair.

# %%
paper_order = np.argsort(halves, kind="stable")                 # 0, 8, 1, 9, ...

def reorder(model, order):
    "Reorder the rows of each head in all maps q and k."
    for block in model.blocks:
        for linear in (block.attn.q, block.attn.k):
            heads = linear.weight.numpy().reshape(-1, D, config.width)   # (H, D, C)
            linear.weight.copy_(heads[:, order].reshape(linear.weight.shape))

# %% [markdown]
# Now we compare the logits for one row of tokens, and the perplexity. The inverse of an
# order brings the rows back. `argsort` of an order is its inverse.

# %%
ids = ft.data.pretraining("prose", "test")[None, :64]           # (1, 64)
with ft.no_grad():
    right = model(ids).numpy()
    reorder(model, paper_order)
    wrong = model(ids).numpy()
    wrong_score = ft.perplexity(model, prose_test)
    reorder(model, np.argsort(paper_order))                     # back
    undone = model(ids).numpy()
print(f"wrong order: logits change by up to {abs(wrong - right).max():.2f}")
print(f"put back:    logits change by up to {abs(undone - right).max():.2f}")
print(f"prose: {base_scores[0]:.0f} before, {wrong_score:.0f} in the wrong order")

# %% [check]
assert abs(wrong - right).max() > 0.1 and not (undone - right).any()
assert abs(wrong_score / base_scores[0] - 1) < 0.05

# %% [markdown]
# Nothing raises an error in the wrong order: every shape fits. The logits are wrong,
# but the perplexity of our little model hardly shows it. What the wrong order does to a
# large model you will see below.
#
# So it is not enough that a loader runs. Its logits must equal those of another
# implementation.
#
# ## Fewer heads of keys and values
# When a model writes, it keeps the keys and values of all earlier tokens (lesson 02).
# This **KV cache** grows with the text, and all of it is read for every new token. So a
# Llama has fewer heads of keys and values than of queries, and several heads of queries
# share one: **grouped-query attention** (Ainslie et al. 2023).

# %%
diagram(
    {"q0": (0, 0, "query 0", "data"), "q1": (1, 0, "query 1", "data"),
     "q2": (2, 0, "query 2", "data"), "q3": (3, 0, "query 3", "data"),
     "k0": (0.5, 1.3, "key and value 0", "trained"),
     "k1": (2.5, 1.3, "key and value 1", "trained")},
    [("q0", "k0"), ("q1", "k0"), ("q2", "k1"), ("q3", "k1")],
    caption="Four heads of queries, two of keys and values. Neighbours share.")

# %% [markdown]
# To compute it, each head of keys and values is repeated once for each of its queries.
# With a group of 2 the heads (0, 1) become (0, 0, 1, 1). NumPy has two functions for
# copies: `np.repeat` gives 0, 0, 1, 1, and `np.tile` gives 0, 1, 0, 1. A program that
# takes the wrong one gives a query the keys of another group, and again every shape
# fits.
#
# `ft.ops.attention` repeats the heads itself. We compare it with both kinds of copies.

# %%
q = rng.normal(size=(4, 5, D))                    # 4 heads, 5 positions
k = rng.normal(size=(2, 5, D))                    # 2 heads
v = rng.normal(size=(2, 5, D))
grouped = ft.ops.attention(ft.Tensor(q), ft.Tensor(k), ft.Tensor(v)).numpy()
for copies in (np.repeat(np.arange(2), 2), np.tile(np.arange(2), 2)):
    k_copies, v_copies = ft.Tensor(k[copies]), ft.Tensor(v[copies])
    output = ft.ops.attention(ft.Tensor(q), k_copies, v_copies).numpy()
    print("heads", copies, "difference:", abs(output - grouped).max().round(2))

# %% [check]
k_copies, v_copies = ft.Tensor(k[[0, 0, 1, 1]]), ft.Tensor(v[[0, 0, 1, 1]])
assert np.allclose(ft.ops.attention(ft.Tensor(q), k_copies, v_copies).numpy(), grouped)
assert abs(output - grouped).max() > 1            # the last output, in the wrong order

# %% [markdown]
# And backward? A number that is used twice gets the sum of two gradients (lesson 01).
# So the gradient of a head of keys is the sum over its copies. Both directions are
# exercises.
#
# The copies exist only while attention is computed. The cache holds each head once. We
# measure it: three Llamas read 100 tokens, with 4, 2 and 1 heads of keys and values.
# `cache.kv` is a dict with the keys and values of each layer.

# %%
def cache_bytes(key_value_heads):
    small = ft.LlamaConfig(vocab=2048, width=64, layers=2, heads=4, hidden=192,
                           key_value_heads=key_value_heads, tied=True)
    cache = ft.Cache()
    long_text = ft.data.pretraining("prose", "test")[None, :100]
    with ft.no_grad():
        ft.Llama(small)(long_text, cache=cache)
    return sum(k.data.nbytes + v.data.nbytes for k, v in cache.kv.values())

sizes = {heads: cache_bytes(heads) for heads in (4, 2, 1)}
for heads, size in sizes.items():
    print(f"{heads} heads of keys and values: {size:,} bytes, {size // 100} a token")

# %% [markdown]
# The same for a larger model. SmolLM2-135M has 30 layers, 9 heads of queries, and 3
# heads of keys and values, all of width 64. The cache is float32. Its longest text has
# 8,192 tokens. How much would the cache need with 9 heads of keys and values?

# %%
for heads in (3, 9):
    token_bytes = 2 * 30 * heads * 64 * 4         # keys and values
    print(f"{heads} heads: {token_bytes:,} bytes a token, "
          f"{8192 * token_bytes / 1e6:,.0f} MB for 8,192 tokens")

# %% [check]
assert sizes == {4: 102_400, 2: 51_200, 1: 25_600}
assert 2 * 30 * 3 * 64 * 4 == 46_080

# %% [markdown]
# The model itself needs 540 MB in float32. So without groups, the cache of one long
# text would be twice as large as the model. A model as small as ours cannot show what
# the groups cost in quality. The paper compares large models.
#
# ## Four bits for a weight
# Many checkpoints are also published in a second form: one file with the ending
# `.gguf`, made for the program llama.cpp. In such a file a weight may have only four
# bits. How can that be enough?
#
# Take 32 neighbouring weights in a row of a matrix. They are called a **block**, like
# the blocks of the model, but these have nothing to do with each other. For each block
# of weights we store two numbers in float16: the smallest weight $m$, and the step $d$.
# The step is the largest weight minus the smallest, divided by 15. For each weight we
# store only a **code** $q$ from 0 to 15. It stands for the weight
#
# $$d \, q + m$$
#
# This format is called Q4_1. We compute the codes of the first block of a matrix of our
# model.

# %%
up = model.blocks[0].mlp.up.weight.numpy()        # (192, 64)
block = up[0, :32]
m = block.min()
d = (block.max() - m) / 15
codes = np.floor((block - m) / d + 0.5)           # to the nearest whole number
restored = d * codes + m
print("weights ", block[:6].round(3))
print("codes   ", codes[:6].astype(int))
print("restored", restored[:6].round(3))

# %%
_, axes = figure(height=3)
for level in d * np.arange(16) + m:
    axes.axhline(level, color="#78818c", linewidth=0.5)
axes.plot(block, "o", color="#3b82f6", label="weight")
axes.plot(restored, "_", color="#d97706", markersize=11, markeredgewidth=2,
          label="restored weight")
axes.set(xlabel="place in the block", ylabel="value")
axes.figure.legend(loc="outside upper center", ncols=2)
show("A block and its 16 levels. The lowest and the highest weight lie on a level; "
     "every other weight moves to the nearest one.")

# %% [markdown]
# No weight moves by more than half a step. The codes have four bits, so two of them fit
# into a byte. The library's class `Q4_1` encodes a whole matrix. Its method
# `file_blocks` gives the bytes of all blocks, as they stand in a file.
#
# **Predict first.** A block has 32 codes and two float16 numbers. How many bytes does
# it need, and how many bits is that for each weight? How much smaller than float32?

# %%
stored = Q4_1.quantize(up).file_blocks()          # (192 rows, 2 blocks a row, bytes)
print("shape", stored.shape, stored.dtype)
print(stored[0, 0])

# %% [markdown]
# Twenty bytes: 4 for the two numbers and 16 for the codes. That is 5 bits for a weight
# in place of 32, so 6.4 times smaller. Here is which byte holds what.

# %%
places = np.full((2, 10), "", dtype="<U6")
places.flat[:4] = ["d", "d", "m", "m"]
places.flat[4:] = [f"{j + 16}|{j}" for j in range(16)]
colours = np.zeros((2, 10))                       # 0: grey
colours.flat[:2] = 1.0
colours.flat[2:4] = 0.7
heat_map(colours, rows=["byte 0 ...", "byte 10 ..."], texts=places, height=1.7,
         caption="A block of Q4_1. Blue: d and m, two bytes each. Grey: the numbers of "
                 "the two weights whose codes share a byte, the high half first.")

# %% [markdown]
# In a byte the lower half, `byte & 15`, holds the code of weight $j$. The upper half,
# `byte >> 4`, holds the code of weight $j + 16$, and not that of the neighbour.

# %%
print("byte 4:", stored[0, 0, 4], " lower half", stored[0, 0, 4] & 15,
      " upper half", stored[0, 0, 4] >> 4)
print("our codes of the weights 0 and 16:", codes[[0, 16]].astype(int))

# %% [check]
assert abs(block - restored).max() <= d / 2 * 1.0001
assert stored.shape == (192, 2, 20)
assert np.array_equal(stored[0, 0, 4:] & 15, codes[:16])
assert np.array_equal(stored[0, 0, 4:] >> 4, codes[16:])
assert stored[0, 0, :2].view("<f2")[0] == np.float16(d)

# %% [markdown]
# To turn blocks into weights we read the two float16 numbers, separate the codes of
# each byte, and compute $d q + m$, for all blocks at once.

# %%
def decode(blocks):
    "The weights (..., 32) of blocks (..., 20 bytes)."
    numbers = blocks[..., :4].view("<f2").astype(np.float32)
    scale, shift = numbers[..., :1], numbers[..., 1:]
    lower = blocks[..., 4:] & 15
    upper = blocks[..., 4:] >> 4
    codes = np.concatenate([lower, upper], axis=-1)
    return scale * codes + shift

decoded = decode(stored).reshape(up.shape)
print(f"largest difference to the weights: {abs(decoded - up).max():.3f}")

# %% [check]
assert np.array_equal(decoded, Q4_1.quantize(up).dequantize())

# %% [markdown]
# The library keeps the codes in memory, and the scales beside them. A product with the
# matrix takes some rows, turns their codes into float32, multiplies, and drops these
# float32 numbers again.

# %% [markdown]
# **Predict first.** We make one weight of a block ten times as large as the largest
# one. How does the error of the other 31 weights change?

# %%
def mean_error(values):
    "The mean error of the first 31 weights of a block."
    restored = Q4_1.quantize(values[None]).dequantize()[0]
    return abs(restored - values)[:31].mean()

normal = rng.normal(size=32).astype(np.float32)
with_outlier = normal.copy()
with_outlier[31] = 10 * abs(normal).max()
print(f"without {mean_error(normal):.3f}   with one large weight "
      f"{mean_error(with_outlier):.3f}")

# %% [check]
assert 3 < mean_error(with_outlier) / mean_error(normal) < 12

# %% [markdown]
# The large weight makes the range of the block wider. So the step grows, and the other
# weights are rounded to the larger step. This is why the blocks are small: a large
# weight harms only the 31 others in its block. The price is 1 bit for each weight: $d$
# and $m$ have 32 bits, for 32 weights.
#
# ## A whole model in four bits
# We call a weight in this form **packed**, and a weight in float32 **dense**. Every
# weight with two axes becomes packed; the weights of the norms stay float32. `ft.load`
# with `packed=True` does this for a GGUF file. Our model comes from a folder, so we do
# it here.

# %%
def pack(model):
    "Replace the matrices of a model by packed weights, and return the model."
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, ft.Parameter) and len(weight.shape) == 2:
            module.weight = Q4_1.quantize(weight.numpy())
    return model

def weight_bytes(model):
    "The bytes of all weights in memory, dense and packed."
    dense = sum(parameter.data.nbytes for parameter in model.parameters())
    return dense + sum(m.nbytes for m in model.modules() if isinstance(m, ft.Packed))

def open_checkpoint(packed=False):
    model, _ = ft.load(checkpoint)
    return pack(model) if packed else model

packed_model = open_checkpoint(packed=True)

# %% [markdown]
# What does it cost in quality?

# %%
packed_scores = [ft.perplexity(packed_model, prose_test),
                 ft.perplexity(packed_model, python_test)]
print(f"bytes: {weight_bytes(model):,} dense, {weight_bytes(packed_model):,} packed")
print(f"prose: {base_scores[0]:.0f} dense, {packed_scores[0]:.0f} packed")

# %% [markdown]
# And in time? We run the two models in turn, 20 times, on 8 rows of 64 tokens. Each
# time we divide the two processor times. We print the median of these ratios.

# %%
eight_rows = np.tile(ids, (8, 1))
ratios = []
for _ in range(20):
    seconds = []
    for measured in (packed_model, model):
        start = time.thread_time()
        with ft.no_grad():
            measured(eight_rows)
        seconds.append(time.thread_time() - start)
    ratios.append(seconds[0] / seconds[1])
print(f"a forward pass takes {np.median(ratios):.1f} x the time of the dense model")

# %% [check]
assert 6 < weight_bytes(model) / weight_bytes(packed_model) < 6.4
assert abs(packed_scores[0] / base_scores[0] - 1) < 0.03

# %% [markdown]
# The packed model needs a sixth of the memory and has nearly the same perplexity. It
# needs some more time: the weights are unpacked in every forward pass.
#
# ## A GGUF file, byte by byte
# A GGUF file has all parts of a folder in one. It begins with a table of keys and
# values, which holds the config, the tokenizer and the chat format. A table of tensors
# follows, and then the tensors. We write the smallest one, with one key and one tensor.
# `struct.pack("<Q", n)` writes a whole number in 8 bytes, and `"<I"` writes it in 4.
# `"<IQQ"` writes three numbers, and `"<I2Q"` is short for the same.

# %%
def text_bytes(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data

codes_of_up = Q4_1.quantize(up).file_blocks().tobytes()
parts = [b"GGUF" + struct.pack("<IQQ", 3, 1, 1),  # version 3, one tensor, one key
         text_bytes("general.architecture"),      # the key
         struct.pack("<I", 8),                    # the type of its value: 8 is a text
         text_bytes("llama"),                     # the value
         text_bytes("blk.0.ffn_up.weight"),       # the name of the tensor
         struct.pack("<I2Q", 2, 64, 192),         # two axes, the innermost first
         struct.pack("<IQ", 3, 0)]                # type 3, which is Q4_1; offset 0
head = b"".join(parts)
padding = bytes(-len(head) % 32)                  # tensors begin at a multiple of 32
file = folder / "small.gguf"
file.write_bytes(head + padding + codes_of_up)
print(f"{len(head)} + {len(padding)} + {len(codes_of_up):,} bytes")

# %% [markdown]
# `read_gguf` is the library's reader. A file may be damaged, or made to do harm. So the
# reader compares every length in the file with the size of the file before it uses it.

# %%
found = read_gguf(file)
tensor = found.tensors["blk.0.ffn_up.weight"]
print(found.metadata, tensor.kind, tensor.shape)
print("the same weight:", np.array_equal(tensor.blocks(), stored))

# %% [check]
assert np.array_equal(tensor.blocks(), stored) and tensor.shape == (192, 64)

# %% [markdown]
# ## A real one: SmolLM2
# SmolLM2-135M-Instruct has 135 million parameters, and was tuned to answer questions.
# As a GGUF file in Q4_1 it has 98 MB. `make real-assets`, in the folder of the library,
# fetches it into `work/real`. If the file is there, the next cells open it and ask it
# something. If not, they say that it is absent, and the text tells what you would see.

# %%
smol_file = Path("work/real/SmolLM2-135M-Instruct.Q4_1.gguf")
has_smol = smol_file.exists()
if has_smol:
    smol, smol_tokenizer = ft.load(smol_file, packed=True)
    print(f"{ft.count(smol).total:,} parameters in {weight_bytes(smol) / 1e6:.0f} MB")
else:
    print(f"{smol_file} is absent.")

# %% [markdown]
# It has the same layout as our model. These are its sizes beside ours:
#
# | | ours | SmolLM2-135M |
# |---|---|---|
# | width, layers | 64, 2 | 576, 30 |
# | heads of queries; of keys and values | 4; 2 | 9; 3 |
# | width of a head; feed-forward | 16; 192 | 64; 1,536 |
# | vocabulary | 2,048 | 49,152 |
# | base of the rotations | 10,000 | 100,000 |
#
# ## A chat is a text
# A language model continues a text. How then does it answer a question? It was tuned on
# conversations that were written as one text, always in the same format: the **chat
# template**. Special tokens say who speaks. The prompt ends where the answer should
# begin.

# %%
messages = [{"role": "user", "content": "What is the capital of France?"}]
prompt = ft.chat_prompt(messages, "chatml")
print(prompt)

# %% [markdown]
# The format is named ChatML. A model should get the format that it was tuned on, in
# every character. So a checkpoint holds its template, as a program in the language
# Jinja. Our library does not run a program from a file of a stranger. It recognises the
# formats that it knows, and refuses all others. `ft.chat_prompt(messages, tokenizer)`
# writes the prompt in the format of that tokenizer's checkpoint. SmolLM2's template
# puts a system message in front, if you give none.
#
# `ft.generate` continues a row of ids, here by at most 12 tokens. `end` is the token
# that ends an answer.

# %%
def answer(model, tokenizer, question):
    messages = [{"role": "user", "content": question}]
    prompt = ft.chat_prompt(messages, tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    end = tokenizer.token_to_id(ft.chat_end(tokenizer))
    rows = ft.generate(model, np.array([ids]), max_new_tokens=12, end=end)
    return tokenizer.decode(rows[0, len(ids):])         # without the prompt

if has_smol:
    print(answer(smol, smol_tokenizer, "What is the capital of France?"))
else:
    print(f"{smol_file} is absent.")

# %% [markdown]
# SmolLM2 answers "The capital of France is Paris."
#
# Now we put the rows of `q` and `k` of the same model in the wrong order, as we did
# with our own. A packed weight cannot be changed in place, so `take_rows` makes a new
# one. Does the model still find Paris, perhaps in bad English?

# %%
if has_smol:
    width = smol.config.width_of_heads
    order = np.argsort(np.arange(width) % (width // 2), kind="stable")
    for block in smol.blocks:
        for linear in (block.attn.q, block.attn.k):
            starts = np.arange(0, linear.weight.shape[0], width)
            rows = starts[:, None] + order                      # (heads, width)
            linear.weight = linear.weight.take_rows(rows.reshape(-1))
    print(repr(answer(smol, smol_tokenizer, "What is the capital of France?")))
else:
    print(f"{smol_file} is absent.")

# %% [markdown]
# It writes nothing at all: the first token that it chooses is the one that ends an
# answer. And still no error is raised. If a model that you load is silent or writes
# nonsense, look for a mistake in the loader and in the template first.
#
# When you tune a model on conversations, it should learn the answers and not the
# questions. So the loss counts only the tokens of the answers. `segment_batches` makes
# such batches from pieces of text. Each piece has True beside it if it is to be
# learned. At each position the label is the token that follows. The label -100 means
# that there is no loss at this position.

# %%
pieces = [("Name of: return the first item\n", False), ("first_item", True)]
chat_batches, cut = segment_batches([pieces], tokenizer, batch_size=1, max_len=32)
batch = next(iter(chat_batches))
print(f"{cut} prompts were too long and are cut\n")
print("token      label")
for token, label in zip(batch["ids"][0].tolist(), batch["labels"][0].tolist()):
    learned = "-100" if label == -100 else tokenizer.id_to_token(label)
    print(f"{tokenizer.id_to_token(token):10} {learned}")

# %% [markdown]
# At the last token of the question the label is the first token of the answer. At the
# last token of the answer the label is the token that ends a text: so the model learns
# to stop. (`Ġ` is a space in front of a word, `Ċ` is the end of a line. The tokens
# `[PAD]` are padding.)

# %% [check]
labels = batch["labels"][0]
response_ids = tokenizer.encode("first_item").ids
end_of_text = tokenizer.token_to_id("<|endoftext|>")
assert labels[labels != -100].tolist() == [*response_ids, end_of_text]
if has_smol:
    assert smol.config.layers == 30 and smol.config.key_value_heads == 3
    assert 80 < weight_bytes(smol) / 1e6 < 110

# %% [markdown]
# ## Tune it
# The rest is as in lesson 08: LoRA beside every linear map, and training on Python
# source. A Llama has seven linear maps in a block: `q`, `k`, `v`, `o`, and `gate`,
# `up`, `down`.

# %%
python_tokens = ft.data.pretraining("source", "valid")
method = ft.LoRA(r=8, alpha=16.0,
                 targets=("attn.[qkvo]", "mlp.gate", "mlp.up", "mlp.down"))

def tune(model):
    "Attach LoRA, train on Python, return the perplexities on prose and Python."
    ft.attach(model, method)
    batches = ft.data.lm_batches(python_tokens, T=64, batch_size=8)
    ft.fit(model, batches, 60, ft.AdamW(5e-3), progress=False)
    return [ft.perplexity(model, rows) for rows in (prose_test, python_test)]

tuned = open_checkpoint()
tuned_scores = tune(tuned)
print(ft.count(tuned))
print(f"Python: {base_scores[1]:.0f} before, {tuned_scores[1]:.0f} after")

# %% [markdown]
# LoRA does not change the weights of the base. So they may as well be packed: the
# gradient flows through them to the adapters, but they get no gradient themselves.
#
# We train beside packed weights, with the same data and the same number of steps.

# %%
tuned_packed = open_checkpoint(packed=True)
tuned_packed_scores = tune(tuned_packed)
print(f"Python, beside dense weights:  {tuned_scores[1]:.0f}")
print(f"Python, beside packed weights: {tuned_packed_scores[1]:.0f}")

# %% [check]
assert tuned_scores[1] < 0.8 * base_scores[1]
assert abs(tuned_packed_scores[1] / tuned_scores[1] - 1) < 0.06

# %% [markdown]
# The result beside packed weights is nearly as good. This is the idea of QLoRA
# (Dettmers et al. 2023). For a model of seven billion parameters it decides whether the
# weights fit on one GPU: they need 4.4 GB with 5 bits a weight, and 28 GB in float32.
#
# Our task is small and our model is weak. `make real` does the same with SmolLM2, on a
# task with answers that you can read: to name a function from its description. It takes
# about ten minutes, and the README shows its result.
#
# ## An adapter that PEFT reads
# `ft.save_peft` writes the adapter as a folder with two files. The adapter has 19,456
# parameters in float32.

# %%
adapter = folder / "adapter"
ft.save_peft(tuned, adapter)
for file in sorted(adapter.iterdir()):
    print(f"{file.name:28} {file.stat().st_size:7,} bytes")

# %% [markdown]
# The tensors need about 81 kB: 78 kB for the parameters, and the rest for the table of
# contents. That is less than a tenth of the checkpoint. `adapter_config.json` holds the
# settings of the adapter, under the names that PEFT gives them.

# %%
adapter_config = json.loads((adapter / "adapter_config.json").read_text())
for key in ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias"):
    print(f"{key:16} {adapter_config[key]}")

# %% [markdown]
# The tensors have PEFT's names, too. We read the table as above.

# %%
table, _ = read_safetensors(adapter / "adapter_model.safetensors")
for name in sorted(table)[:4]:
    print(f"{table[name]['shape']!s:9} {name}")

# %% [markdown]
# `lora_A` is our $A$ with the shape (r, in), and `lora_B` is our $B$ with (out, r). A
# name begins with `base_model.model`. Then comes the name of the linear map in
# `transformers`. With the folders of the checkpoint and of the adapter, PEFT needs four
# lines:
#
# ```
# from transformers import AutoModelForCausalLM
# from peft import PeftModel
# base = AutoModelForCausalLM.from_pretrained("checkpoint")
# model = PeftModel.from_pretrained(base, "adapter")
# ```
#
# The tests of the library run these lines, and compare the logits. Here we go the other
# way: `ft.load_peft` reads an adapter and attaches it to a fresh base. It also reads
# adapters that PEFT wrote.

# %%
fresh = open_checkpoint()
ft.load_peft(fresh, adapter)
with ft.no_grad():
    difference = fresh(ids).numpy() - tuned(ids).numpy()
print("largest difference of a logit:", abs(difference).max())

# %% [check]
assert not difference.any()
assert sum(np.prod(entry["shape"]) for entry in table.values()) == 19_456
adapter_file = adapter / "adapter_model.safetensors"
assert 10 * adapter_file.stat().st_size < 4 * parameters
assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in table

# %% [markdown]
# These files do not say to which base they belong. They fit every model with these
# names and shapes, even a wrong one. So write the name of the base down. (A file of
# `ft.save_adapter`, the library's own format, knows its base and refuses another one.)
#
# ## Merge, save, load
# If your users have no PEFT, merge the adapter into the weights. The result is an
# ordinary checkpoint of the old size, for `transformers` and for us.

# %%
ft.merge(tuned)
ft.save(tuned, folder / "merged", tokenizer)
merged, _ = ft.load(folder / "merged")
with ft.no_grad():
    difference = merged(ids).numpy() - fresh(ids).numpy()
merged_bytes = (folder / "merged/model.safetensors").stat().st_size
print(f"{merged_bytes:,} bytes, logits differ by up to {abs(difference).max():.0e}")

# %% [markdown]
# The difference is the rounding of float32, as in lesson 08.
#
# Now we try to merge the adapter that was trained beside packed weights. There a block
# has only 16 levels.

# %%
try:
    ft.merge(tuned_packed)
except ft.CannotMerge as error:
    print(error)

# %% [markdown]
# `merge` refuses. The sum of a packed weight and its change would have to be rounded to
# 16 levels again. Then the merged model would not be the model that you tested. The
# message names the way out: `ft.unpack` makes the weights dense, and dense weights can
# be merged.
#
# Afterwards you may pack the merged model again, and measure what that costs. First we
# look at how large the changes are, compared with the steps of the packed weights.

# %%
ft.unpack(tuned_packed)
before = tuned_packed.blocks[0].attn.q.weight.numpy().copy().reshape(-1, 32)
ft.merge(tuned_packed)
after = tuned_packed.blocks[0].attn.q.weight.numpy().reshape(-1, 32)
steps = np.ptp(before, axis=1, keepdims=True) / 15       # the step d of each block
is_small = abs(after - before) < steps / 2
print(f"{is_small.mean():.0%} of the changes in a query matrix are below half a step")

# %% [markdown]
# **Predict first.** In lesson 24, changes below half a step were lost. Here about a
# third of the changes are so small. How much of the training is lost when we pack the
# merged model?

# %%
unpacked_score = ft.perplexity(tuned_packed, python_test)
packed_again_score = ft.perplexity(pack(tuned_packed), python_test)
print(f"with the adapter beside it {tuned_packed_scores[1]:.0f}")
print(f"unpacked and merged        {unpacked_score:.0f}")
print(f"packed again               {packed_again_score:.0f}")

# %% [check]
assert abs(difference).max() < 1e-3
assert abs(unpacked_score / tuned_packed_scores[1] - 1) < 1e-3
assert abs(packed_again_score / unpacked_score - 1) < 0.03
assert abs(ft.perplexity(merged, python_test) / tuned_scores[1] - 1) < 1e-3
assert 0.2 < is_small.mean() < 0.5

# %% [markdown]
# Almost nothing. In lesson 24 each of a thousand steps was rounded, and each was lost.
# Here the sum of all steps is rounded once. Most weights change by more than half a
# step, and where one is rounded up, another is rounded down. This is so for our small
# model and our large learning rate. For yours, measure it as we did.

# %% [markdown]
# ## The whole lesson in one table
# The bytes are those of the weights in memory. They include the adapter, unless it is
# merged.

# %%
dense_bytes, packed_bytes = weight_bytes(model), weight_bytes(packed_model)
adapter_bytes = 4 * 19_456
rows = {
    "checkpoint": (dense_bytes, *base_scores),
    "4 bits": (packed_bytes, *packed_scores),
    "tuned": (dense_bytes + adapter_bytes, *tuned_scores),
    "4 bits, tuned": (packed_bytes + adapter_bytes, *tuned_packed_scores),
    "merged": (weight_bytes(merged), ft.perplexity(merged, prose_test),
               ft.perplexity(merged, python_test)),
}
print(f"{'':18}{'bytes':>10}{'prose':>8}{'Python':>8}")
for name, (size, prose_score, python_score) in rows.items():
    print(f"{name:18}{size:10,}{prose_score:8.0f}{python_score:8.0f}")
groups = {name: {"prose": row[1], "Python": row[2]} for name, row in rows.items()}
bars(groups, ylabel="perplexity",
     caption="Four bits change little, and training changes much. The tuned models are "
             "better on Python, and worse on prose.")

# %% [check]
assert tuned_scores[0] > base_scores[0]
assert tuned_packed_scores[0] > packed_scores[0]

# %% [markdown]
# With your own checkpoint the steps are the same: `ft.load` on the folder or the GGUF
# file, a look at the config and at an answer, `ft.attach`, `ft.fit`, a measurement
# before and after, `ft.save_peft`. If your data are a file of questions and answers,
# one command does the training. `tinyft convert` then writes the adapter for PEFT.
#
# ```
# tinyft tune --model model.gguf --packed --chat --data train.jsonl --out work/run
# ```
#
# ## Exercises
# Write these functions of the library again:
#
# - `frequencies`: the speed of each pair, also scaled for longer texts,
# - `rotary`: the rotation as an op with its gradient,
# - `repeat_heads` and `sum_heads`: copies of heads, and the gradient of the copies,
# - `encode_q4_1`: blocks of 32 weights as blocks of 20 bytes.
#
# `tinyft start checkpoint` writes a file for each into `work/`, and `tinyft check` says
# what is still wrong.
