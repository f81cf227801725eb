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
# Llama, Mistral, Qwen2 and SmolLM2 are language models with one common layout. This
# lesson opens a checkpoint of that layout, looks at every part of it, tunes it with
# LoRA, and writes an adapter that PEFT reads. PEFT is the library of Hugging Face for
# adapters.

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
# We want to look into a checkpoint of which we know everything. So we make one: a very
# small Llama, trained for some seconds on the prose that comes with the library
# (documentation and comments). After that we treat it like a stranger's.
#
# `LlamaConfig` holds the sizes. The names that are new to you get their own sections.

# %%
config = ft.LlamaConfig(vocab=2048, positions=512, width=64, layers=2, heads=4,
                        key_value_heads=2, hidden=192, tied=True, eps=1e-5, std=0.08)
model = ft.Llama(config, seed=0)
STEPS = 60 if "TINYFT_FAST" in os.environ else 150
prose = ft.data.pretraining("prose", "train")
batches = ft.data.lm_batches(prose, 64, 16)
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
    return ft.data.held_out_batches(ft.data.pretraining(kind, "test"), 64, 32)

prose_test = test_rows("prose")
python_test = test_rows("source")
base_scores = [ft.perplexity(model, prose_test), ft.perplexity(model, python_test)]
print(f"prose {base_scores[0]:.0f}   Python {base_scores[1]:.0f}")

# %% [check]
assert base_scores[0] < 700 < 900 < base_scores[1] < 2048

# %% [markdown]
# A model that only guesses among 2,048 tokens has the perplexity 2,048. Ours has learnt
# which tokens are frequent in prose, and some pairs of them. Of Python it knows little.
# So Python will be our task.
#
# ## What is in the folder
# `ft.save` wrote a folder as the library `transformers` of Hugging Face does. A model
# that you download has the same files.
#
# **Predict first.** The model has 229,696 parameters in float32. One of the files holds
# them. How many bytes has it, about?

# %%
for file in sorted(checkpoint.iterdir()):
    print(f"{file.name:22} {file.stat().st_size:8,} bytes")

# %% [markdown]
# Four bytes for a parameter make 918,784 bytes. The file `model.safetensors` has a few
# more: it begins with a table of contents.
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
# width $C = 64$, `intermediate_size` is the width of the feed-forward part, 192, and
# `rope_theta` belongs to the positions. A key that the library does not know may change
# the mathematics. So `ft.load` never skips one: it reads it, or refuses it by name.
#
# Now the tensors. The format safetensors is simple: 8 bytes with the length of the
# table, the table as JSON, and then the numbers.

# %%
def read_safetensors(file):
    "The table of contents, {name: entry}, and the bytes of the tensors."
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8:8 + length])
    del table["__metadata__"]                     # notes, no tensor
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
# An entry also says where its bytes lie. So a tensor can be read without the library.

# %%
name = "model.layers.0.self_attn.k_proj.weight"
begin, end = table[name]["data_offsets"]
values = np.frombuffer(tensors[begin:end], "<f4")        # float32, lowest byte first
weight = values.reshape(table[name]["shape"])
print(weight.shape, np.array_equal(weight, model.blocks[0].attn.k.weight.numpy()))

# %% [check]
assert 4 * parameters == len(tensors)
assert np.array_equal(weight, model.blocks[0].attn.k.weight.numpy())
assert settings["intermediate_size"] == 192 and "lm_head.weight" not in table

# %% [markdown]
# `transformers` calls the map `k_proj`, the library calls it `attn.k`. The numbers are
# the same. All of this is what `ft.load` does:

# %%
model, tokenizer = ft.load(checkpoint)
text = "Return the value"
print(tokenizer.encode(text).tokens, tokenizer.encode(text).ids)

# %% [markdown]
# Model and tokenizer belong together: the model knows only the numbers. With another
# tokenizer every number would stand for another piece of text. So always keep both in
# one folder.
#
# ## A Llama is not a GPT
# The GPT of lesson 02 and a Llama are both decoders: a stack of blocks with attention
# and a feed-forward part. Four things differ. They are orange in the picture.

# %%
diagram(
    {"gpt": (0, 0, "GPT", "none"), "llama": (2, 0, "Llama", "none"),
     "e": (0, 1, "token + row of its position", "data"),
     "E": (2, 1, "token", "data"),
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
# The norm and the feed-forward part are quickly told. The positions and the heads get a
# section each.
#
# **RMS norm.** A layer norm subtracts the mean of a row, and divides by the standard
# deviation. An RMS norm only divides, by the root of the mean square:
#
# $y = w \, x / \sqrt{\mathrm{mean}(x^2) + \varepsilon}$
#
# It has a weight $w$, and no bias.
#
# **Predict first.** Take the row (3, −1, −2, 0), whose mean is 0. Do the two norms give
# the same? And for the row (8, 4, 3, 5), which is the first one plus 5?

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

# %% [markdown]
# With mean 0 they are equal. In the second row the layer norm removes the 5, and the
# RMS norm keeps it. A row in a network may have any mean, so one norm cannot stand for
# the other.
#
# **Feed-forward with a gate.** There are two maps up, not one. The result of `gate`
# goes through SiLU, $\mathrm{silu}(x) = x \, \sigma(x)$, and is multiplied with the
# result of `up`, entry by entry. So each of the 192 entries of `up` is opened or closed
# by an entry of `gate`. The op `swiglu` does both steps.

# %%
quote(GatedMLP.forward)

# %% [markdown]
# Three maps cost more than two. To make up for it, the feed-forward part is narrower. A
# GPT has two maps between $C$ and $4C$: $8 C^2$ entries. Three maps between $C$ and
# $F$ have $3 C F$. They are equal at $F = 8C/3$. For $C = 64$ this is 171, and
# checkpoints take a rounder number: ours has 192.
#
# ## Positions as rotations
# Attention does not know which word is first (lesson 02). A GPT adds a trained row to
# each token, one row for every position. A Llama has no such rows. Look at the list of
# tensors again: nothing in it belongs to a position.
#
# Instead it *rotates*. The numbers of a query are taken in pairs, and each pair is a
# point in a plane. At position $p$ the pair $i$ is rotated by the angle
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
print("length before and after:", np.linalg.norm(query).round(6),
      np.linalg.norm(rotate(query, 7)).round(6))

# %% [markdown]
# A rotation does not change a length. What does it do to a score, the product of a
# query and a key?
#
# **Predict first.** The same query and key stand at the positions 5 and 2. Then we move
# both to 105 and 102. How does the score change? And if the query moves to 8 alone?

# %%
for q_position, k_position in ((5, 2), (105, 102), (8, 2)):
    score = rotate(query, q_position) @ rotate(key, k_position)
    print(f"query at {q_position:3}, key at {k_position:3}: score {score:.6f}")

# %% [markdown]
# The score depends on the *distance* of the two positions, and on nothing else. The
# reason is simple. If two arrows in a plane are both turned by the same angle, the
# angle between them stays. Here they are turned by $5\theta$ and $2\theta$, and what
# counts is the difference, $3\theta$. Now all pairs of positions:

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
# So a Llama learns "three tokens back" once, and not anew for every position.
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
assert max(lines["our q and k"][1:]) > lines["our q and k"][0] + 1

# %% [markdown]
# For equal vectors the score is largest at distance 0, since every rotation takes the
# arrows apart. It does not fall steadily even then. For other vectors a rotation may
# bring the arrows together. This is useful: a head may look for the token three places
# back, and it could not if nearer tokens always won.
#
# Rotary positions have no parameters, and no largest position. But a model has learnt
# only the distances in its training texts. Some checkpoints were trained further, for
# longer texts, with slower rotations. Then the config has an entry `rope_scaling`, and
# the exercise `frequencies` takes it into account.
#
# ## Which two numbers are a pair?
# In the paper the pairs are neighbours: numbers 0 and 1, numbers 2 and 3. In
# `transformers`, and here, number $i$ belongs to number $i + D/2$.

# %%
halves = np.concatenate([pairs, pairs])           # 0 1 2 ... 0 1 2 ...
neighbours = np.repeat(pairs, 2)                  # 0 0 1 1 2 2 ...
numbers = np.array([halves, neighbours])
heat_map(1 + numbers, rows=["here", "paper"], columns=[str(i) for i in range(D)],
         texts=numbers.astype(str), height=1.5, xlabel="number of the head",
         caption="The pair to which each of the 16 numbers of a head belongs.")

# %% [markdown]
# Both are right, if the rows of the maps `q` and `k` stand in the order that belongs to
# the rule. But a checkpoint does not say which rule it was made for: its rows have the
# same shape in both. (GGUF files, a format that we open below, hold a Llama in the
# order of the paper.)
#
# What happens if a loader gets this wrong? We put the rows of `q` and `k` in the other
# order, and compare the logits.

# %%
paper_order = np.argsort(halves, kind="stable")                 # 0, 8, 1, 9, ...

def reorder(model, order):
    "Reorder the rows of each head in all maps q and k."
    for block in model.blocks:
        for linear in (block.attn.q, block.attn.k):
            heads = linear.weight.numpy().reshape(-1, D, config.width)
            linear.weight.copy_(heads[:, order].reshape(linear.weight.shape))

ids = ft.data.pretraining("prose", "test")[None, :64]           # (1, 64)
with ft.no_grad():
    right = model(ids).numpy()
    reorder(model, paper_order)
    wrong = model(ids).numpy()
    reorder(model, np.argsort(paper_order))                     # and back
    undone = model(ids).numpy()

# %% [markdown]
# Nothing raises an error in the wrong order: every shape fits.

# %%
print(f"wrong order: logits change by up to {abs(wrong - right).max():.2f}")
print(f"put back:    logits change by up to {abs(undone - right).max():.2f}")

# %% [check]
assert abs(wrong - right).max() > 0.1 and not (undone - right).any()

# %% [markdown]
# Our little model hardly uses attention yet, so the change is small. What it does to a
# large model you will see below. So the test of a loader is not that it runs. The test
# is that its logits equal those of another implementation.
#
# ## Fewer heads of keys and values
# When a model writes, it keeps the keys and values of all earlier tokens (lesson 02).
# This **KV cache** grows with the text, and every step of writing reads all of it. So
# the number of heads of keys and values is made smaller, and several heads of queries
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
# To compute it, each head of keys and values is repeated as often as it is used. With a
# group of 2 the heads (0, 1) become (0, 0, 1, 1). NumPy has two functions for copies:
# `np.repeat` gives 0, 0, 1, 1, and `np.tile` gives 0, 1, 0, 1. A loader that takes the
# wrong one pairs queries with foreign keys, and again every shape fits.

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
# The copies exist only during the product. The cache holds each head once. We measure
# it: three Llamas that differ in this number alone read 100 tokens. `cache.kv` is a
# dict with the keys and values of each attention.

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
# **Predict first.** SmolLM2-135M has 30 layers, 9 heads of queries, and 3 heads of keys
# and values of width 64. The cache is float32. How many bytes does a token need? And
# its longest text of 8,192 tokens, with 3 heads and with 9?

# %%
for heads in (3, 9):
    token_bytes = 2 * 30 * heads * 64 * 4         # keys and values
    print(f"{heads} heads: {token_bytes:,} bytes a token, "
          f"{8192 * token_bytes / 1e6:,.0f} MB for 8,192 tokens")

# %% [check]
assert sizes == {4: 102_400, 2: 51_200, 1: 25_600}
assert 2 * 30 * 3 * 64 * 4 == 46_080

# %% [markdown]
# The model itself has 540 MB in float32. So without the groups, one long text would
# need twice the memory of the model. What the groups cost in quality, we cannot measure
# on a model as small as ours. The paper compares large ones.
#
# ## Four bits for a weight
# Many checkpoints are also published in a second form: one file with the ending
# `.gguf`, made for the program llama.cpp. In such a file a weight may have only four
# bits. How can that be enough?
#
# Take 32 neighbours in a row of a weight matrix, a **block**. For each block we store
# two numbers, in float16: the smallest weight $m$, and the step $d$, which is the range
# of the block divided by 15. Each weight gets a **code** $q$ from 0 to 15, and stands
# for
#
# $$d \, q + m$$
#
# This format is called Q4_1. We do it for the first block of a matrix of our model.

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
          label="what is stored of it")
axes.set(xlabel="weight of the block", ylabel="value")
axes.figure.legend(loc="outside upper center", ncols=2)
show("A block and its 16 levels. The lowest and the highest weight lie on a level; "
     "every other weight moves to the nearest one.")

# %% [markdown]
# No weight moves by more than half a step. The codes have four bits, so two of them fit
# into a byte.
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
# The library computes with such blocks as they are. A product takes some rows of the
# weight, turns their codes into float32, multiplies, and forgets them. This is the
# method that turns codes into weights. `unpack_halves` separates the two codes of each
# byte, `scales[0]` and `scales[1]` hold $d$ and $m$ of many blocks.

# %%
quote(Q4_1.decode)

# %% [markdown]
# **Predict first.** We make one weight of a block ten times as large as the largest
# one. How does the error of the other 31 weights change?

# %%
def mean_error(values):
    "The mean error of the first 31 weights of a block."
    packed = Q4_1.quantize(values[None]).dequantize()[0]
    return abs(packed - values)[:31].mean()

normal = rng.normal(size=32).astype(np.float32)
with_outlier = normal.copy()
with_outlier[31] = 10 * abs(normal).max()
print(f"without {mean_error(normal):.3f}   with one large weight "
      f"{mean_error(with_outlier):.3f}")

# %% [check]
assert 3 < mean_error(with_outlier) / mean_error(normal) < 12

# %% [markdown]
# The large weight makes the range wider, so the step grows, and all others are stored
# with that step. This is why the blocks are small: a large weight harms only the 31
# others in its block. The small blocks cost 1 bit more for each weight, for $d$ and
# $m$.
#
# ## A whole model in four bits
# Every weight with two axes becomes packed; the norms stay float32. `ft.load` with
# `packed=True` does this for a GGUF file. Our model comes from a folder, so we do it
# here.

# %%
def pack(model):
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, ft.Parameter) and len(weight.shape) == 2:
            module.weight = Q4_1.quantize(weight.numpy())
    return model

def weight_bytes(model):
    dense = sum(parameter.data.nbytes for parameter in model.parameters())
    return dense + sum(m.nbytes for m in model.modules() if isinstance(m, ft.Packed))

def open_checkpoint(packed=False):
    model, _ = ft.load(checkpoint)
    return pack(model) if packed else model

packed_model = open_checkpoint(packed=True)

# %% [markdown]
# What does it cost in quality? And in time? We run both models in turns, 20 times, on 8
# rows of 64 tokens. The median of the ratios counts.

# %%
packed_scores = [ft.perplexity(packed_model, prose_test),
                 ft.perplexity(packed_model, python_test)]
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
print(f"bytes: {weight_bytes(model):,} dense, {weight_bytes(packed_model):,} packed")
print(f"prose: {base_scores[0]:.0f} dense, {packed_scores[0]:.0f} packed")
print(f"a pass takes {np.median(ratios):.1f} x the time of the dense model")

# %% [check]
assert 6 < weight_bytes(model) / weight_bytes(packed_model) < 6.4
assert abs(packed_scores[0] / base_scores[0] - 1) < 0.03

# %% [markdown]
# A sixth of the memory, nearly the same perplexity, and some more time: the weights are
# unpacked in every pass.
#
# ## A GGUF file, byte by byte
# A GGUF file has all parts of a folder in one. It begins with a table of keys and
# values, which holds the config, the tokenizer and the chat format. A table of tensors
# follows, and then the tensors. We write the smallest one, with one key and one tensor.
# `struct.pack("<Q", n)` is a whole number in 8 bytes, `"<I"` in 4 bytes.

# %%
def text_bytes(text):
    return struct.pack("<Q", len(text)) + text.encode()

codes_of_up = Q4_1.quantize(up).file_blocks().tobytes()
parts = [b"GGUF" + struct.pack("<IQQ", 3, 1, 1),  # version 3, one tensor, one key
         text_bytes("general.architecture") + struct.pack("<I", 8),    # 8: a text
         text_bytes("llama"),
         text_bytes("blk.0.ffn_up.weight"),       # the name of the tensor
         struct.pack("<I2Q", 2, 64, 192),         # two axes, the innermost first
         struct.pack("<IQ", 3, 0)]                # 3: Q4_1; it begins at 0
head = b"".join(parts)
padding = bytes(-len(head) % 32)                  # tensors begin at a multiple of 32
file = folder / "small.gguf"
file.write_bytes(head + padding + codes_of_up)
print(f"{len(head)} + {len(padding)} + {len(codes_of_up):,} bytes")

# %% [markdown]
# `read_gguf` is the library's reader. It compares every length with the size of the
# file before it believes it, because a file may be damaged, or made to do harm.

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
# As a GGUF file in Q4_1 it has 98 MB. In the library's folder, `make real-assets`
# fetches it into `work/real`. With the file, the next cells open it and ask it
# something. Without it they say that it is absent. The text tells what you would see.

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
# template**. Marks say who speaks. The prompt ends where the answer should begin.

# %%
messages = [{"role": "user", "content": "What is the capital of France?"}]
prompt = ft.chat_prompt(messages, "chatml")
print(prompt)

# %% [markdown]
# The format is named ChatML. A model should get the format that it was tuned on, in
# every character. So a checkpoint holds its template, as a program in the language
# Jinja. The library runs no program of a stranger: it recognises the formats that it
# knows, and refuses others. `ft.chat_prompt(messages, tokenizer)` then writes the text.
# SmolLM2's template puts a message of the system in front, if you give none.
#
# `ft.generate` continues a row of ids. `end` is the token that ends an answer.

# %%
def answer(model, tokenizer, question):
    messages = [{"role": "user", "content": question}]
    prompt = ft.chat_prompt(messages, tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    end = tokenizer.token_to_id(ft.chat_end(tokenizer))
    written = ft.generate(model, np.array([ids]), 12, end=end)[0, len(ids):]
    return tokenizer.decode(written)

if has_smol:
    print(answer(smol, smol_tokenizer, "What is the capital of France?"))
else:
    print(f"{smol_file} is absent.")

# %% [markdown]
# SmolLM2 answers "The capital of France is Paris."
#
# Now the same model with the rows of `q` and `k` in the wrong order, as above with our
# own. Does it still find Paris, perhaps in bad English?

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
# It writes nothing at all: the first token that it chooses is the end. And still no
# error is raised. If a model that you load is silent or talks nonsense, suspect the
# loader and the template first.
#
# When you tune a model on conversations, it should learn the answers and not the
# questions. So the loss counts only the tokens of the answers. `segment_batches` makes
# such batches from pieces of text: True stands beside those to learn. At each position
# the label is the token that follows. The label -100 says: no loss here.

# %%
pieces = [("Name of: return the first item\n", False), ("first_item", True)]
chat_batches, _ = segment_batches([pieces], tokenizer, batch_size=1, max_len=32)
batch = next(iter(chat_batches))
print("position   label")
for token, label in zip(batch["ids"][0].tolist(), batch["labels"][0].tolist()):
    learned = "-100" if label == -100 else tokenizer.id_to_token(label)
    print(f"{tokenizer.id_to_token(token):10} {learned}")

# %% [markdown]
# At the end of the question the label is the first token of the answer. At the end of
# the answer it is the token that ends a text: so the model learns to stop. (`Ġ` is a
# space in front of a word, `Ċ` is the end of a line. The tokens `[PAD]` fill the row
# up.)

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
    batches = ft.data.lm_batches(python_tokens, 64, 8)
    ft.fit(model, batches, 60, ft.AdamW(5e-3), progress=False)
    return [ft.perplexity(model, rows) for rows in (prose_test, python_test)]

tuned = open_checkpoint()
tuned_scores = tune(tuned)
print(ft.count(tuned))
print(f"Python: {base_scores[1]:.0f} before, {tuned_scores[1]:.0f} after")

# %% [markdown]
# LoRA does not change the weights beside which it stands. So they may as well be
# packed: the gradient flows through them to the adapters, and never into them.
#
# We train beside packed weights with the same data and the same steps.

# %%
tuned_packed = open_checkpoint(packed=True)
tuned_packed_scores = tune(tuned_packed)
print(f"Python, beside dense weights:  {tuned_scores[1]:.0f}")
print(f"Python, beside packed weights: {tuned_packed_scores[1]:.0f}")

# %% [check]
assert tuned_scores[1] < 0.8 * base_scores[1]
assert abs(tuned_packed_scores[1] / tuned_scores[1] - 1) < 0.06

# %% [markdown]
# A little worse, as the packed base is. This is the idea of QLoRA (Dettmers et al.
# 2023), and lesson 15 is about it. For a model of seven billion parameters it decides
# if the weights fit on one GPU: 4.4 GB with 5 bits a weight, in place of 28 GB.
#
# Our task is small and our model is weak. `make real` does the same with SmolLM2, on a
# task with answers to read: name a function from its description. It takes about ten
# minutes, and the README shows its result.
#
# ## An adapter that PEFT reads
# `ft.save_peft` writes the adapter as a folder with two files. The adapter has 19,456
# trained numbers in float32.

# %%
adapter = folder / "adapter"
ft.save_peft(tuned, adapter)
for file in sorted(adapter.iterdir()):
    print(f"{file.name:28} {file.stat().st_size:7,} bytes")

# %% [markdown]
# About 80 kB: 78 kB of numbers, and the table of contents. That is a twelfth of the
# checkpoint. The config says what the numbers are. Each key is one of PEFT.

# %%
adapter_config = json.loads((adapter / "adapter_config.json").read_text())
for key in ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias"):
    print(f"{key:16} {adapter_config[key]}")

# %% [markdown]
# And the tensors, with the names that PEFT gives them. We read the table as above.

# %%
table, _ = read_safetensors(adapter / "adapter_model.safetensors")
for name in sorted(table)[:4]:
    print(f"{table[name]['shape']!s:9} {name}")

# %% [markdown]
# `lora_A` is our $A$ with the shape (r, in), `lora_B` is our $B$ with (out, r). The
# name between is that of the map in `transformers`, behind `base_model.model`. With
# these two folders PEFT needs four lines:
#
# ```
# from transformers import AutoModelForCausalLM
# from peft import PeftModel
# base = AutoModelForCausalLM.from_pretrained("checkpoint")
# model = PeftModel.from_pretrained(base, "adapter")
# ```
#
# The tests of the library run them, and compare the logits. Here we go the other way:
# `ft.load_peft` puts an adapter on a fresh base. It reads those that PEFT wrote, too.

# %%
fresh = open_checkpoint()
ft.load_peft(fresh, adapter)
with ft.no_grad():
    difference = fresh(ids).numpy() - tuned(ids).numpy()
print("largest difference of a logit:", abs(difference).max())

# %% [check]
assert not difference.any()
assert sum(np.prod(entry["shape"]) for entry in table.values()) == 19_456
assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in table

# %% [markdown]
# PEFT's file does not say to which base it belongs. It fits every model with these
# names and shapes, also a wrong one. So write it down. (The library's own format,
# `ft.save_adapter`, knows its base and refuses another one.)
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
# Now the adapter that was trained beside packed weights. A block of packed weights has
# only 16 levels.

# %%
try:
    ft.merge(tuned_packed)
except ft.CannotMerge as error:
    print(error)

# %% [markdown]
# `merge` refuses. The sum of a packed weight and a change has to be rounded to 16
# levels again, and then the merged model would be another one than you tested. The
# message names the way out: `ft.unpack` makes the weights dense, and then the merge is
# exact.
#
# You may pack the merged model again, and measure what that costs.

# %%
ft.unpack(tuned_packed)
before = tuned_packed.blocks[0].attn.q.weight.numpy().copy().reshape(-1, 32)
ft.merge(tuned_packed)
after = tuned_packed.blocks[0].attn.q.weight.numpy().reshape(-1, 32)
steps = np.ptp(before, axis=1, keepdims=True) / 15       # of each block
is_small = abs(after - before) < steps / 2
print(f"{is_small.mean():.0%} of the changes in a query matrix are below half a step")

# %% [markdown]
# **Predict first.** In lesson 24, changes below half a step were lost. Here they are
# about a third. How much of the training is lost when the merged model is packed?

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
assert 0.2 < is_small.mean() < 0.6

# %% [markdown]
# Almost nothing. In lesson 24 each of a thousand steps was rounded, and each was lost.
# Here the sum of all steps is rounded once. Most weights change by more than half a
# step, and where one is rounded up, another is rounded down. This is so for our small
# model and our large learning rate. For yours, measure it as we did.

# %% [markdown]
# ## The whole lesson in one table
# The bytes are those of the weights in memory, with the adapter where it stands beside
# them.

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
     caption="Four bits change little, the adapter changes much. It is better on "
             "Python, and forgets some prose.")

# %% [markdown]
# With your own checkpoint the steps are the same: `ft.load` on the folder or the GGUF
# file, a look at the config and at an answer, `ft.attach`, `ft.fit`, a measure before
# and after, `ft.save_peft`. If your data are rows of questions and answers in a file,
# one command trains, and `tinyft convert` writes its adapter for PEFT:
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
