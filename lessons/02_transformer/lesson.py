# %% [markdown]
# # 02 The transformer
#
# **Minutes:** 35, with the exercises 85. **Prerequisites:** lesson 01.
# **Exercises:** causal_mask, softmax_attention, split, gelu_tanh
#
# A transformer holds a text as a table of vectors, one row per token, and improves the rows layer by layer. Attention moves
# information between rows; the MLP works on each row alone. Here attention is computed by hand inside a pretrained model, and at
# the end each part is taken away to see what it was good for.

# %%
import numpy as np

import tinyft as tf
from tinyft.learn.lessons import figure, quote, show
from tinyft.models.blocks import MLP, PostNormBlock, PreNormBlock

gpt, tokenizer = tf.load("base-gpt")
bert, _ = tf.load("base-bert")
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
conheld_out = tf.data.pretraining("prose", "test")[:48 * 128].reshape(48, 128)

def loss_without(part, change):
    model, _ = tf.load("base-gpt")
    tensors = {n: p for n, p in model.named_parameters().items() if part and part in n}
    for p in tensors.values():
        p.copy_(p.data * change)
    with tf.no_grad():
        scores = tf.ops.log_softmax(model(held_out)).data[:, :-1]
    return -np.take_along_axis(scores, held_out[:, 1:, None], axis=2).mean(), sum(p.size for p in tensors.values())

print("taken away          numbers   loss")
for name, part, change in (("nothing", "", 1), ("√D", "attn.q", D**0.5), ("positions", "pos", 0), ("MLPs", "mlp", 0), ("attention", "attn", 0)):
    loss, numbers = loss_without(part, change)
    full = loss if name == "nothing" else full
    print(f"{name:<16}{numbers:>11,}{loss:>7.2f}")
    assert name == "nothing" or loss > full + 0.1 and (loss > np.log(2048)) == (name == "MLPs")

# %% [markdown]
# Without its MLPs the model is worse than one that guesses, ln 2048 = 7.62: what is left was trained to lean on them. So this table tells
# what the parts do in this model, not what a model could learn without them. Attention also costs $T^2$ weights for each head.
#
# **Exercises:** `tinyft start causal_mask`, `tinyft start softmax_attention`, `tinyft start split`, `tinyft start gelu_tanh`
