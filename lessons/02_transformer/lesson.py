# %% [markdown]
# # 02 The transformer
#
# **Reading:** 50 minutes. **You need:** lesson 01 (tensors, `@op`, shape strings).
# **Exercises:** causal_mask, softmax_attention, split_heads, gelu_tanh (about an hour).
#
# "We sat on the bank and watched the river." What is a bank? The word alone does not
# say: the other words do. So a language model must let words exchange information.
# This lesson shows how, first by hand on five words, then inside two trained models.

# %%
import time

import numpy as np

import tinyft as ft
from tinyft.learn.draw import curves, diagram, heat_map
from tinyft.learn.lessons import quote
from tinyft.models.attention import split_heads
from tinyft.models.blocks import PostNormBlock, PreNormBlock

rng = np.random.default_rng(0)

# %% [markdown]
# ## A text as a table
# A transformer holds a text as a table: one row of numbers for each word. In a trained
# model nobody chose these numbers. Here we choose them, so that we can read them. Our
# rows have three numbers: how much the word is about water, how much about money, and
# whether its meaning is unclear.

# %%
vectors = {                      # water, money, unclear
    "the": [0, 0, 0],
    "near": [0, 0, 0],
    "river": [2, 0, 0],
    "money": [0, 2, 0],
    "bank": [1, 1, 1],
}

def rows_of(sentence):
    return np.array([vectors[word] for word in sentence.split()], float)

x = rows_of("the river bank")
print(x)

# %% [markdown]
# There are $T = 3$ words and $C = 3$ numbers in each row ($C$ for *channels*). `bank`
# is half about water and half about money, and it is unclear. We want a rule that reads
# "river" and makes the row of `bank` more about water.
#
# ## Queries, keys and values
# Every row makes three new vectors. Each is the product of the row with a matrix:
#
# - the **query** says what the word looks for,
# - the **key** says what the word has to offer,
# - the **value** says what the word tells to those who look at it.
#
# We choose these matrices too. The three rows of `W_q` belong to the three numbers of a
# word: water, money, unclear. Its two columns are the two numbers of a query: water,
# money. A key has the same two numbers, so we can compare a query with a key. Only an
# unclear word looks for something: for water and for money.

# %%
W_q = np.array([[0, 0], [0, 0], [2, 2]])
W_k = np.array([[1, 0], [0, 1], [-1, -1]])
W_v = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])

q = x @ W_q
k = x @ W_k
v = x @ W_v
print("queries (water, money):", *q)
print("keys    (water, money):", *k)
print("values:", *v)

# %% [markdown]
# Only `bank` has a query that is not zero. Only `river` has a key that is not zero:
# `W_k` subtracts the unclear part, so an unclear word offers nothing. A value tells
# water and money, but not the unclear part.
#
# ## Compare, weigh, mix
# The product of a query and a key is large if the word of the key offers what the word
# of the query looks for. `q @ k.T` has all these products, one row for each query: the
# **scores**. We divide them by $\sqrt{D}$, where $D = 2$ is the length of a query. The
# reason comes below.

# %%
D = q.shape[1]
scores = q @ k.T / np.sqrt(D)
print(scores.round(2))

# %% [markdown]
# A softmax turns each row of scores into **weights**: they are positive, and each row
# has the sum 1. We subtract the largest score first, so that `exp` does not overflow.
# That changes no weight: it divides each exponential and their sum by the same number.

# %%
def softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)

weights = softmax(scores)
words = "the river bank".split()
heat_map(weights, rows=words, columns=words, values=".2f", xlabel="looked at (key)",
         ylabel="looks (query)", height=2.6,
         caption="The weights. Each row is one word that looks, and has the sum 1.")

# %% [markdown]
# `bank` looks mostly at `river`. The other two words look for nothing: all their scores
# are 0, so their weights are equal. (A softmax cannot say "nobody": the weights must
# have the sum 1.) The last step mixes the values with these weights and **adds** the
# result to the row.

# %%
output = weights @ v
new_x = x + output
for word, before, after in zip(words, x, new_x):
    print(f"{word:<6} before {before}   after {after.round(2)}")

# %% [markdown]
# The row of `bank` was [1 1 1] and is now [2.84 1.05 1.00]: much more about water. The
# other two rows, which looked for nothing, got the mean of all values.
#
# This is **attention**, complete. With the matrices $Q$, $K$, $V$ for all queries, keys
# and values:
#
# $$\mathrm{attention}(Q, K, V) = \mathrm{softmax}(Q K^\top / \sqrt{D})\, V$$

# %% [check]
assert np.allclose(weights.sum(axis=1), 1)
assert np.allclose(new_x[2].round(2), [2.84, 1.05, 1.0])

# %%
diagram({
    "x": (0, 1, "x\n(T, C)", "data"),
    "q": (1, 0, "Q = x W_q\n(T, D)", "trained"),
    "k": (1, 1, "K = x W_k\n(T, D)", "trained"),
    "v": (1, 2, "V = x W_v\n(T, C)", "trained"),
    "p": (2.1, 0.5, "weights P\n(T, T)"),
    "o": (3.1, 1.25, "P V\n(T, C)"),
    "y": (4, 1.25, "x + P V\n(T, C)", "data"),
}, [("x", "q"), ("x", "k"), ("x", "v"), ("q", "p"), ("k", "p"), ("p", "o"), ("v", "o"),
    ("o", "y")],
    caption="Attention and its shapes: T words, C numbers in a row, D in a query.")

# %% [markdown]
# A model learns the matrices `W_q`, `W_k` and `W_v` in the orange boxes: they are its
# parameters. The weights $P$ are no parameters: they are computed anew for every text.
#
# **Predict first.** We change one word: "the money bank". The matrices stay. What is
# the new row of `bank`, and which of its three weights change?

# %%
x = rows_of("the money bank")
money_weights = softmax((x @ W_q) @ (x @ W_k).T / np.sqrt(D))
money_rows = x + money_weights @ (x @ W_v)
print("weights of bank:", money_weights[2].round(2))
print("row of bank:    ", money_rows[2].round(2))

# %% [markdown]
# The weights are the same as before: `bank` asks for water and for money alike, so
# `money` fits as well as `river` did. The *value* is another one, and the row becomes
# [1.05 2.84 1.00]. Query and key decide **where** to look; the value is **what** comes
# from there.

# %% [check]
assert np.allclose(money_weights, weights)
assert np.allclose(money_rows[2], new_x[2][[1, 0, 2]])

# %% [markdown]
# ## The causal mask
# A model that writes a text one word at a time uses the row of the last word to guess
# the next one. In training it has whole texts, and the row of *every* word guesses the
# word after it: one pass trains $T$ guesses. No row may see its answer, which is the
# next word. So a word may look at itself and at earlier words, and at no later word.
#
# `np.tri(T)` has ones where that is allowed. Everywhere else we set the score to
# $-\infty$ before the softmax. Since $e^{-\infty} = 0$, the weight is exactly 0.

# %%
def attend(sentence, is_causal=False):
    x = rows_of(sentence)
    scores = (x @ W_q) @ (x @ W_k).T / np.sqrt(D)
    if is_causal:
        scores = np.where(np.tri(len(x)) == 1, scores, -np.inf)
    weights = softmax(scores)
    return weights, x + weights @ (x @ W_v)

# %% [markdown]
# We try it with another sentence, in which `river` comes after `bank`.

# %%
sentence = "the bank near the river"
words = sentence.split()
free_weights, free_rows = attend(sentence)
causal_weights, causal_rows = attend(sentence, is_causal=True)
heat_map(free_weights, rows=words, columns=words, values=".2f",
         xlabel="looked at (key)", ylabel="looks (query)",
         caption="Without a mask: bank looks at river.")
heat_map(causal_weights, rows=words, columns=words, values=".2f",
         xlabel="looked at (key)", ylabel="looks (query)",
         caption="With the causal mask: no weight above the diagonal.")

# %% [markdown]
# Every row has the sum 1, in both pictures. With the mask, the first word can only look
# at itself. And look at `bank`, the second row: the word `river` comes later, so it may
# not be seen.

# %%
print("bank without the mask:", free_rows[1].round(2))
print("bank with the mask:   ", causal_rows[1].round(2))

# %% [markdown]
# With the mask, `bank` stays half about water and half about money. This is the price
# of a model that writes. A model that only reads needs no mask. Both kinds exist, and
# we run one of each below.
#
# **Why before the softmax?** Setting weights to 0 *after* it looks like the same thing.

# %%
late_weights = np.where(np.tri(5, dtype=bool), free_weights, 0)
print("masked before: bank", causal_weights[1].round(2), "sum", causal_weights[1].sum())
print("masked after:  bank", late_weights[1].round(2), "sum",
      late_weights[1].sum().round(2))

# %% [markdown]
# Masked after the softmax, the weights of `bank` have the sum 0.1 in place of 1. The
# softmax had given 0.81 to `river` and left little for the others. So the weights of
# the first words still depend on `river`, which `bank` may not see: the denominator of
# the softmax contains its score.

# %% [check]
assert not np.triu(causal_weights, 1).any()
assert np.allclose(causal_weights.sum(axis=1), 1)
assert np.allclose(causal_rows[1], [1.5, 1.5, 1.0]) and free_rows[1, 0] > 2.6
assert late_weights[1].sum() < 0.11 and round(free_weights[1, 4], 2) == 0.81

# %% [markdown]
# ## The library's version
# Here is attention in the library. Before you read it:
#
# - `q`, `k` and `v` are Tensors with any axes in front, written `...`. There are Tq
#   queries and Tk keys; D is the width of a query and a key, E that of a value.
# - `k.T` swaps the last two axes. `q.shape[-1]**-0.5` is $1/\sqrt{D}$.
# - `key_mask` is a second mask, for padding: False at keys that nobody may look at.
# - `xp(q.data)` is the module that made the array: NumPy, or CuPy on a GPU.
# - `ops.where(mask, a, b)` takes `a` where the mask is True, else `b`. The score
#   -1e30 is finite, but its weight is 0 as well.
# - `_check_tensors`, `checks` and `operands` check the arguments. If one is wrong, they
#   raise an error that names it.

# %%
quote(ft.functional.softmax_attention)

# %% [markdown]
# `ops.causal_mask` makes the mask that `np.tri` made above. It also works for more keys
# than queries, which happens when a model writes ("The price of writing", below). You
# will write both functions in the exercises. The models use a third function,
# `ops.attention`. It computes the same values in one op, with a gradient of its own.
# Our own code and both functions of the library agree on our sentence:

# %%
x = rows_of(sentence)
tensors = [ft.Tensor(x @ W) for W in (W_q, W_k, W_v)]
written_out = ft.functional.softmax_attention(*tensors, causal=True)
one_op = ft.ops.attention(*tensors, causal=True)
print("bank:", (causal_rows - x)[1], written_out.data[1], one_op.data[1])

# %% [check]
assert np.allclose(written_out.data, causal_rows - x)
assert np.allclose(one_op.data, causal_rows - x)

# %% [markdown]
# ## Why the root of D
# Each score is a product of two vectors with $D$ numbers. Vaswani et al. (2017, section
# 3.2.1) look at vectors of independent random numbers with mean 0 and standard
# deviation 1. For a model before training, this is roughly true.
#
# **Predict first.** Take $D = 1024$. The product is a sum of 1024 terms. Each term is a
# product of two such numbers, and has standard deviation 1 as well. What is the
# standard deviation of the sum: 1, 32 or 1024?

# %%
widths = [4, 16, 64, 256, 1024]
for width in widths:
    a = rng.normal(size=(2000, width))
    b = rng.normal(size=(2000, width))
    products = (a * b).sum(axis=1)
    print(f"D = {width:>4}   standard deviation of the product {products.std():>5.1f}")

# %% [markdown]
# It is $\sqrt{1024} = 32$: the *variances* of independent terms add up, not the
# standard deviations. Divided by $\sqrt{D}$, a score has standard deviation 1, whatever
# $D$ is.

# %% [check]
assert abs(products.std() / 32 - 1) < 0.1

# %% [markdown]
# What does a softmax do with large scores? We take 64 keys, and look at the largest of
# their 64 weights. We try three scales. The third is $1/\sqrt{C}$, an easy mistake:
# the row of a word, with $C$ numbers, is often wider than a query. We take $C = 32 D$.

# %%
names = ["no scale", "1/√D", "1/√C, C = 32 D"]
largest = {name: [] for name in names}
all_weights = {name: [] for name in names}                # for the derivatives below
for width in widths:
    queries = rng.normal(size=(100, 1, width))
    keys = rng.normal(size=(100, 64, width))
    products = (queries * keys).sum(axis=-1)              # (100, 64)
    scales = [1, 1 / np.sqrt(width), 1 / np.sqrt(32 * width)]
    for name, scale in zip(names, scales):
        weights = softmax(products * scale)
        largest[name].append(weights.max(axis=1).mean())
        all_weights[name].append(weights)
curves(largest, x=widths, log="x", xlabel="D", ylabel="largest of 64 weights",
       height=2.4, caption="Without a scale, one key gets nearly all the weight.")

# %% [markdown]
# - Without a scale, one key has almost all the weight. The other 63 have almost none.
# - With $1/\sqrt{D}$ the largest weight is about 0.1, whatever $D$ is.
# - With $1/\sqrt{C}$ all weights are near 1/64: attention takes the mean of all values.
#
# If one weight is nearly 1, there is a second fault: its score gets almost no gradient.
# The derivative of a weight $p$ with respect to its own score is $p (1 - p)$, near 0
# both for $p = 1$ and for $p = 0$. Summed over the 64 keys:

# %%
slopes = {}
for name in names:
    slopes[name] = [(p * (1 - p)).sum(axis=1).mean() for p in all_weights[name]]
    print(f"{name:<16} D = 4: {slopes[name][0]:.2f}   D = 1024: {slopes[name][-1]:.2f}")

# %% [markdown]
# So $1/\sqrt{D}$ keeps the scores at a size where the weights differ *and* still learn.
# Without it, long queries stop nearly all learning. With a smaller scale, all keys
# become nearly equal.

# %% [check]
assert largest["no scale"][-1] > 0.8
assert 0.08 < min(largest["1/√D"]) and max(largest["1/√D"]) < 0.13
assert max(largest["1/√C, C = 32 D"]) < 0.04
assert slopes["no scale"][-1] < 0.25 and slopes["1/√D"][-1] > 0.8

# %% [markdown]
# ## Inside a trained model
# The library ships small models, trained on text that comes with Python. `base-gpt` is
# a GPT: it guesses the next token, with a causal mask. `ft.load` returns the model and
# its **tokenizer**, which cuts a text into **tokens** (words and pieces of words), each
# with a number.

# %%
gpt, tokenizer = ft.load("base-gpt")
text = "Return the first item of the list."
ids = np.array([tokenizer.encode(text).ids])              # (B, T), a batch of one text
tokens = [tokenizer.decode([i]).strip() for i in ids[0]]
T = len(tokens)
print(T, "tokens:", tokens)
print("ids:", ids)

# %% [markdown]
# A model is called with ids and returns **logits**: for each position, a score for each
# of the 2048 tokens of its vocabulary. A forward pass can have a `Context`. It holds
# what belongs to this one pass, such as the ids and the mask. Every module gets it as
# its second argument, called `ctx`. Here it also collects the tables between the
# layers: the **hidden states**.

# %%
context = ft.Context(output_hidden_states=True)
logits = gpt(ids, context)
tables = context.hidden_states
print("logits:", logits.shape)
print(len(tables), "tables:", tables[0].shape)

# %% [markdown]
# The shapes are $(B, T, V)$ and $(B, T, C)$: $B = 1$ text, $T = 8$ tokens, a vocabulary
# of $V = 2048$, and $C = 128$ numbers in each row. There are four layers, so five
# tables: one before the first layer, and one after each.
#
# ## Heads
# One softmax gives each word one set of weights. But a word may need two things at
# once: its neighbour, and a word far away. So the model runs several attentions side by
# side, the **heads**. Each of the $H$ heads works with its own $D = C / H$ features
# (numbers) of the queries, keys and values. `base-gpt` has $H = 4$ heads of $D = 32$.
# Splitting is a matter of axes: `reshape` cuts the last axis in two, and `permute`
# moves the axis $H$ before the axis $T$.

# %%
quote(split_heads)

# %% [markdown]
# We compute the first attention of the model by hand. `attn.q`, `attn.k` and `attn.v`
# are three linear layers, each with a bias. `norm1` is the layer norm in front of them
# (lesson 01).

# %%
block = gpt.blocks[0]
attn = block.attn
H = attn.heads
normed = block.norm1(tables[0], context)                  # (B, T, C)
q = split_heads(attn.q(normed, context), H).data          # (B, H, T, D)
k = split_heads(attn.k(normed, context), H).data
v = split_heads(attn.v(normed, context), H).data
print("q:", q.shape)

# %% [markdown]
# From here on we do what we did with our five words. NumPy multiplies the last two axes
# and repeats that for all axes in front, so the four heads need no loop.

# %%
may_look = np.tri(T, dtype=bool)
scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])    # (B, H, T, T)
gpt_weights = softmax(np.where(may_look, scores, -np.inf))
mixed = gpt_weights @ v                                   # (B, H, T, D)
joined = mixed.transpose(0, 2, 1, 3).reshape(1, T, 128)   # (B, T, C)
by_hand = attn.o(ft.Tensor(joined), context)
library = attn(normed, context)
print(f"largest difference: {abs(by_hand.data - library.data).max():.0e}")

# %% [markdown]
# The difference is rounding. The heads are put side by side again, and a fourth linear
# layer, `attn.o`, mixes them: that is how the heads write into one row.

# %% [check]
assert np.allclose(by_hand.data, library.data, atol=1e-5)
assert np.allclose(gpt_weights.sum(axis=-1), 1, atol=1e-5)

# %% [markdown]
# ## What heads look at
# The second model is `base-bert`, a BERT. It was trained to fill gaps, so it may look
# both ways: it has no causal mask. Both models use the same tokenizer. We draw one head
# of GPT and two heads of BERT, all from the first layer. BERT has no layer norm in
# front of its attention; we will see where it stands.

# %%
bert, _ = ft.load("base-bert")
bert_context = ft.Context(output_hidden_states=True)
bert(ids, bert_context)
embedded = bert_context.hidden_states[0]
bert_q = split_heads(bert.blocks[0].attn.q(embedded, bert_context), 4).data
bert_k = split_heads(bert.blocks[0].attn.k(embedded, bert_context), 4).data
bert_weights = softmax(bert_q @ bert_k.swapaxes(-1, -2) / np.sqrt(32))[0]   # (H, T, T)

heat_map(gpt_weights[0, 0], rows=tokens, columns=tokens, values=".1f",
         caption="A head of GPT, first layer. A row is a token that looks.")
heat_map(bert_weights[2], rows=tokens, columns=tokens, values=".1f",
         caption="A head of BERT, first layer: it looks at the token before.")
heat_map(bert_weights[1], rows=tokens, columns=tokens, values=".1f",
         caption="Another head of BERT: it looks at the next token.")

# %% [markdown]
# Everything above GPT's diagonal is 0: no token looks ahead. BERT has one head for the
# token before and one for the next token. Nobody asked for that: to fill a gap, the
# neighbours on both sides are useful, and training found it.

# %%
before = np.diag(bert_weights[2], -1).mean()
after = np.diag(bert_weights[1], 1).mean()
print(f"mean weight on the token before {before:.2f}, on the next token {after:.2f}")

# %% [check]
assert before > 0.9 and after > 0.9
assert not np.triu(gpt_weights[0, 0], 1).any()

# %% [markdown]
# ## Who depends on whom
# A layer looks at rows, and these rows have looked at other rows. After four layers,
# does the mask still hold? We replace one token by `[MASK]`, a token that stands for a
# gap, and see which rows of the output change. We do this for each of the eight tokens.
#
# **Predict first.** We replace the sixth token, the second "the". Which outputs of GPT
# will change? Which outputs of BERT?

# %%
def changes(model):
    before = model(ids).data[0]                           # (T, V)
    found = np.zeros((T, T))
    for i in range(T):
        other = ids.copy()
        other[0, i] = tokenizer.token_to_id("[MASK]")
        found[i] = abs(model(other).data[0] - before).max(axis=1) > 1e-3
    return found

gpt_changes = changes(gpt)
bert_changes = changes(bert)
heat_map(gpt_changes, rows=tokens, columns=tokens, xlabel="output", ylabel="replaced",
         caption="GPT: blue if the output changes when its row's token is replaced.")
heat_map(bert_changes, rows=tokens, columns=tokens, xlabel="output", ylabel="replaced",
         caption="BERT: every output depends on every token.")

# %% [markdown]
# The row of the second "the": in GPT three outputs change, its own and the two later
# ones. So the mask holds for all four layers together. In BERT all eight outputs
# change. (In the pictures of weights, a row is a token that looks *back*. Here a row is
# a token that others look at, so GPT's triangle lies on the other side.)
#
# Such a stack of layers with the mask is called a **decoder**. A stack without the mask
# is called an **encoder**.

# %% [check]
assert np.array_equal(gpt_changes, np.triu(np.ones((T, T))))
assert bert_changes.all()

# %% [markdown]
# ## The block
# A layer is called a **block**. It has two parts. Attention moves information between
# the rows. The **MLP** (multi-layer perceptron) works on each row alone: it makes the
# row wider (from $C$ to $4C$), applies a nonlinear function to every number, and makes
# the row narrow again. Each part reads the row, and **adds** to it:

# %%
diagram({
    "x": (0, 0, "x  (T, C)", "data"),
    "norm1": (1.1, 0, "layer norm", "trained"),
    "attn": (1.1, 1, "attention", "trained"),
    "add1": (0, 1, "+"),
    "middle": (0, 2, "x  (T, C)", "data"),
    "norm2": (1.1, 2, "layer norm", "trained"),
    "mlp": (1.1, 3, "MLP", "trained"),
    "add2": (0, 3, "+"),
    "y": (0, 4, "x  (T, C)", "data"),
    "note1": (2.4, 0, "each row: mean 0,\nstandard deviation 1", "none"),
    "note2": (2.4, 1, "moves information\nbetween rows: P (H, T, T)", "none"),
    "note3": (2.4, 3, "works on each row alone:\n(T, C), (T, 4C), (T, C)", "none"),
    "note4": (1.1, 4, "to the next block", "none"),
}, [("x", "norm1"), ("norm1", "attn"), ("attn", "add1"), ("x", "add1"),
    ("add1", "middle"), ("middle", "norm2"), ("norm2", "mlp"), ("mlp", "add2"),
    ("middle", "add2"), ("add2", "y")],
    caption="A block of GPT. The left column is the residual stream.")

# %% [markdown]
# The left column is called the **residual stream**. It runs from the embedding to the
# last layer, and the parts only add to it. So a gradient has a way back that goes
# through additions only. And if the parts add small numbers, the rows change little.
#
# We run the first block part by part, and compare with the model's hidden state.

# %%
x = tables[0]
x = x + block.attn(block.norm1(x, context), context)
x = x + block.mlp(block.norm2(x, context), context)
print("shape:", x.shape)
print(f"difference from the model's table: {abs(x.data - tables[1].data).max():.0e}")

# %% [markdown]
# The library says the same in two lines. `self.attn` and the others are modules;
# `forward` is what runs when a module is called.

# %%
quote(PreNormBlock.forward)
quote(PostNormBlock.forward)

# %% [markdown]
# GPT normalises what a part **reads**: the stream itself is left alone. BERT, like the
# transformer of 2017, normalises the **sum**: there the stream passes through every
# layer norm.
#
# Where are the parameters? `named_parameters` lists them; we count by part.

# %%
parts = {"attention": block.attn, "MLP": block.mlp, "layer norms": block.norm1}
counts = {}
for name, part in parts.items():
    counts[name] = sum(p.size for p in part.named_parameters().values())
counts["layer norms"] *= 2                                # there are two of them
for name, count in counts.items():
    print(f"{name:<12}{count:>8,}  {count / sum(counts.values()):>6.1%}")

# %% [markdown]
# Attention has four linear layers of $C \times C$, the MLP two of $C \times 4C$: one
# third against two thirds.

# %% [check]
assert np.allclose(x.data, tables[1].data, atol=1e-5)
assert counts == {"attention": 66048, "MLP": 131712, "layer norms": 512}

# %% [markdown]
# ## The nonlinear function of the MLP
# Without a nonlinear function between its two linear layers, the MLP would be one
# linear layer. GPT-2 and BERT use **GELU**. It takes a normal random number with mean 0
# and standard deviation 1, and multiplies $x$ by the probability that this number is
# below $x$. BERT computes it exactly. GPT-2 uses an approximation:
#
# $$x \, (1 + \tanh(\sqrt{2/\pi} \, (x + 0.044715 x^3))) / 2$$

# %%
z = np.linspace(-4, 4, 801)
exact = ft.ops.gelu(ft.Tensor(z)).data
with_tanh = ft.ops.gelu_tanh(ft.Tensor(z)).data
curves({"GELU": exact, "ReLU: max(x, 0)": np.maximum(z, 0)}, x=z, xlabel="x", ylabel="",
       height=2.2, caption="GELU is smooth, and a little below 0 for small negative x.")
print(f"the two forms differ by at most {abs(exact - with_tanh).max():.4f}")

# %% [markdown]
# The difference of 0.0005 is too small to see, but it is enough to spoil a comparison
# of two models to six digits. So the library has both.
#
# ## Where is the order?
# Nothing in attention knows which word is first. If we shuffle the rows, BERT's
# attention gives the same rows, shuffled. It cannot tell "dog bites man" from "man
# bites dog".

# %%
order = rng.permutation(T)
attention = bert.blocks[0].attn
shuffled_after = attention(embedded, bert_context).data[:, order]
shuffled_before = attention(embedded[:, order], bert_context).data
print(f"largest difference: {abs(shuffled_after - shuffled_before).max():.0e}")

# %% [markdown]
# So both models add a trained row for each **position** to the row of the token, before
# the first block. This is also why a text has a largest length: there are rows for 128
# positions here.

# %% [check]
assert 1e-4 < abs(exact - with_tanh).max() < 6e-4
assert np.allclose(shuffled_after, shuffled_before, atol=1e-4)

# %% [markdown]
# ## Decoder and encoder at work
# We hide one word from both models: "..., **or** None if it is empty". GPT reads what
# comes before the gap and guesses the next token. BERT reads the whole text with the
# token `[MASK]` in the gap.

# %%
text = "Return the first item of the list, or None if it is empty."
long_ids = np.array([tokenizer.encode(text).ids])
gap = 8
masked = long_ids.copy()
masked[0, gap] = tokenizer.token_to_id("[MASK]")
gpt_scores = gpt(long_ids[:, :gap]).data[0, -1]
bert_scores = bert(masked).data[0, gap]
for name, scores in (("GPT", gpt_scores), ("BERT", bert_scores)):
    best = np.argsort(-scores)[:3]
    print(name, [tokenizer.decode([i]).strip() for i in best])

# %% [markdown]
# BERT finds "or": it sees "None if it is empty" after the gap. GPT does not see it, and
# guesses "which". So an encoder has more information when it *reads*. A decoder can
# *write*: what it computed for a word stays right when more words follow.
#
# The transformer of 2017 was both, an **encoder-decoder** for translation: an encoder
# reads the source, and the decoder has a second attention, whose keys and values come
# from the encoder. The library's models of this kind are `ft.Seq2Seq` and `ft.T5`, and
# lesson 18 trains one. Attention takes any number of queries and keys: five queries
# and sixteen keys make five rows of output.

# %%
five = ft.Tensor(rng.normal(size=(5, 32)))
sixteen = ft.Tensor(rng.normal(size=(16, 32)))
print(ft.ops.attention(five, sixteen, sixteen).shape)

# %% [check]
assert tokenizer.decode([bert_scores.argmax()]).strip() == "or"
assert tokenizer.decode([gpt_scores.argmax()]).strip() == "which"

# %% [markdown]
# ## The price of writing
# To write token 101, GPT needs the keys and values of the 100 tokens before it. These
# do not change, because the mask hides the new token from them. So `ft.Cache` keeps
# them, and each pass computes one row only. An encoder cannot do this: a new token
# changes all its rows.

# %%
test_text = ft.data.pretraining("prose", "test")          # (N,), real text as ids
long_text = test_text[None, :64]                          # (1, 64)

with ft.no_grad():                                        # no record for a gradient
    start = time.perf_counter()
    for t in range(1, 65):
        without_cache = gpt(long_text[:, :t]).data[0, -1]              # t rows
    middle = time.perf_counter()
    cache = ft.Cache()
    for t in range(64):
        with_cache = gpt(long_text[:, t:t + 1], cache=cache).data[0, -1]   # one row
    end = time.perf_counter()

print(f"without a cache: {64 * 65 // 2:>5,} rows, {middle - start:.2f} s")
print(f"with a cache:    {64:>5,} rows, {end - middle:.2f} s")

# %% [markdown]
# The logits are the same, with 32 times fewer rows. The seconds usually shrink less:
# every pass has a fixed cost, also a pass of one row.
#
# With a cache there are more keys than queries. Two new tokens and three older ones
# make two queries and five keys. The causal mask must know that the older keys come
# first:

# %%
print(ft.ops.causal_mask(2, 5))

# %% [markdown]
# Query 0 stands at position 3, so it may look at the keys 0 to 3. In general, query $i$
# stands at position $i$ + keys − queries.

# %% [check]
assert np.allclose(with_cache, without_cache, atol=1e-3)

# %% [markdown]
# ## The price of length
# The MLP works row by row: a text twice as long costs twice as much. Attention makes
# $T^2$ scores for each head: a text twice as long costs four times as much. We measure
# both in the sizes of `base-gpt`, and attention twice: written out, and as one op.

# %%
def best_time(call):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)

def megabytes(call):
    with ft.peak_memory() as memory:
        call()
    return memory["bytes"] / 1e6

# %% [markdown]
# `ft.peak_memory` measures the memory of arrays inside the `with`: the largest increase
# since the start.

# %%
lengths = [128, 256, 512, 1024, 2048]
names = ["written out", "one op", "MLP"]
times = {name: [] for name in names}
memory = {name: [] for name in names}
for length in lengths:
    rows = ft.Tensor(rng.normal(size=(1, length, 128)).astype(np.float32))
    heads = split_heads(rows, 4)
    calls = [lambda: ft.functional.softmax_attention(heads, heads, heads),
             lambda: ft.ops.attention(heads, heads, heads),
             lambda: block.mlp(rows, context)]
    with ft.no_grad():
        for name, call in zip(names, calls):
            times[name].append(best_time(call))
            memory[name].append(megabytes(call))

print("tokens        " + "".join(f"{length:>8}" for length in lengths))
for name in names:
    print(f"{name:<14}" + "".join(f"{value:>8.1f}" for value in times[name]) + "  ms")

# %% [markdown]
# From left to right the text grows 16 times. By the count of multiplications, the MLP
# should take 16 times as long, and attention 256 times. The times depend on your
# machine, and large arrays take more than that, since they do not fit into the caches
# of the processor. But attention grows far faster than the MLP. Now the memory.

# %%
curves(memory, x=lengths, log="xy", xlabel="tokens", ylabel="megabytes", height=2.6,
       caption="Memory of one call. Only the version written out keeps all T² weights.")

# %% [markdown]
# Written out, attention holds arrays of $4 T^2$ numbers, for 4 heads. With 2048 tokens,
# and 4 bytes for a number, one such array has 67 MB. The one op computes the same, but
# a few rows of the weights at a time, and then frees them. Its memory grows in
# proportion to $T$, not to $T^2$. The time still grows like $T^2$: every score must be
# computed.
#
# How long must a text be for this to matter? The four linear layers of attention have
# $4 C^2$ weights and the MLP has $8 C^2$. So $T$ tokens take $12\, T C^2$
# multiplications there. $Q K^\top$ and $P V$ together take $2\, T^2 C$. The two numbers
# are equal at $T = 6C$.

# %%
for name, width, positions in (("base-gpt", 128, 128), ("GPT-2", 768, 1024)):
    share = 2 * positions / (12 * width + 2 * positions)
    print(f"{name:<9} equal at {6 * width:>5,} tokens; in its longest text, "
          f"{positions:>5,}, the scores take {share:.0%}")

# %% [markdown]
# The last number is the share of these products among all multiplications. For shorter
# texts the linear layers cost more. So the $T^2$ of attention makes a model slow only
# when the text is long compared with the width $C$.

# %% [check]
assert memory["written out"][-1] > 67 and memory["one op"][-1] < 10
assert memory["written out"][-1] > 10 * memory["written out"][-3]
assert memory["one op"][-1] < 6 * memory["one op"][-3]

# %% [markdown]
# ## What the parts are good for
# Last, we take parts away from the trained `base-gpt` and measure its **loss** on text
# that it has not seen: the mean of $-\ln p$, where $p$ is the probability that it gave
# to the right next token. A model that gives all 2048 tokens the same probability has
# the loss $\ln 2048 = 7.62$.

# %%
unseen = test_text[:48 * 128].reshape(48, 128)

def loss_of(model):
    with ft.no_grad():
        log_p = ft.ops.log_softmax(model(unseen)).data    # (48, 128, 2048)
    targets = unseen[:, 1:, None]                         # the next token of each
    return -np.take_along_axis(log_p[:, :-1], targets, axis=2).mean()

print(f"{loss_of(gpt):.2f}")

# %% [markdown]
# We multiply all parameters of a part by a factor; `copy_` writes values into a
# parameter. With the factor 0, a part adds zeros: it is gone. If we multiply the
# queries by $\sqrt{D}$, that undoes the division of the scores by $\sqrt{D}$. If we
# halve the queries, the scores are divided by $\sqrt{C}$ in effect, since
# $\sqrt{C} = 2 \sqrt{D}$ here.

# %%
def without(part, factor):
    model, _ = ft.load("base-gpt")
    changed = 0
    for name, parameter in model.named_parameters().items():
        if part in name.split("."):
            parameter.copy_(parameter.data * factor)
            changed += parameter.size
    return changed, loss_of(model)

# %% [markdown]
# **Predict first.** Two thirds of a block's parameters are in its MLP. Which hurts
# more: all attention gone, or all MLPs gone? And is one of them worse than 7.62?

# %%
edits = {
    "nothing": ("", 1),
    "divided by √C": ("q", 0.5),
    "no division": ("q", 32**0.5),
    "no positions": ("pos", 0),
    "no attention": ("attn", 0),
    "no MLPs": ("mlp", 0),
}
losses = {}
print("changed          parameters   loss")
for name, (part, factor) in edits.items():
    count, losses[name] = without(part, factor)
    print(f"{name:<16}{count:>11,}{losses[name]:>7.2f}")

# %% [markdown]
# A wrong scale removes no parameter, and still costs much. Without the division, the
# scores are $\sqrt{32} = 5.7$ times too large, and the model does worse than without
# its positions.
#
# Without its MLPs the model is worse than 7.62: the attention that is left was trained
# to read rows which the MLPs have changed. Without attention, a row knows its own token
# and position only; it can still say which token often comes next. Without positions,
# the rows no longer say where a word stands. The table tells what the parts do in
# *this* model. It does not tell what a model could learn without them.

# %% [check]
assert losses["nothing"] < losses["divided by √C"] < losses["no positions"]
assert losses["no positions"] < losses["no division"] < losses["no attention"]
assert losses["no attention"] < np.log(2048) < losses["no MLPs"]

# %% [markdown]
# ## Exercises
# Write these four functions of the library again, in this order:
#
# - `causal_mask`: which keys a query may look at, also with older keys in front,
# - `softmax_attention`: attention with both masks, on Tensors,
# - `split_heads`: one `reshape` and one `permute`,
# - `gelu_tanh`: an op with its gradient, as in lesson 01.
#
# `tinyft start transformer` writes a file for each into `work/`, and `tinyft check`
# tells what is still wrong.
