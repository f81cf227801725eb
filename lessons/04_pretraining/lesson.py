# %% [markdown]
# # 04 Pretraining
# **Minutes:** 60. **Prerequisites:** 01, 02, 03. **Exercises:** next_tokens, mlm, pool
#
# A text is its own teacher: hide a token, ask for it. A **causal** model (GPT) predicts each token from those before it, a **masked** one (BERT) some
# tokens from all others. The text is real: Python's reference, docstrings and comments, cut by module, so that no test module is in training.
# %%
import json
import math
import os

import numpy as np

import tinyft as ft
from tinyft import pretrain
from tinyft.data import baselines
from tinyft.learn.draw import figure
from tinyft.learn.lessons import quote, show

FAST, V = "TINYFT_FAST" in os.environ, 2048
COLOURS = {"base-gpt-small": "#cc6677", "base-gpt": "#4477aa", "base-gpt-large": "#228833"}
tokenizer = ft.data.shipped_tokenizer()
train, valid, test = (ft.data.pretraining("prose", split) for split in ft.data.SPLITS)
models = {name: ft.load(name)[0] for name in (*COLOURS, "base-bert")}
part = test[:128 * (32 if FAST else 64)]                                               # the part of the test split we work on
print(f"{len(train):,} training tokens, {len(test):,} held out:", [tokenizer.decode([i]) for i in test[:14]])
# %% [markdown]
# ## The next token
# The labels of `ids[:, :-1]` are `ids[:, 1:]`. That shift is all there is to the task. The loss is the mean of $-\ln p$ at the labels, in nats.
#
# **Predict first.** What is the loss of a model that has learnt nothing, with 2,048 tokens to choose from?
# %%
new = ft.GPT(models["base-gpt-small"].config, seed=1)
ids = part.reshape(-1, 128)
loss = ft.evaluate(new, [ids[:8]])["loss"]
print(f"untrained: {loss:.2f} nats;  ln V = {math.log(V):.2f}")
assert abs(loss - math.log(V)) < 0.1
# %% [markdown]
# ## Perplexity
# $e^\ell$ reads as the number of tokens among which the model hesitates. $\ell$ is the mean over **all tokens**. The mean of the perplexities of the
# parts is another number, and one that depends on how the text was cut. **Predict first.** Is it larger or smaller?
# %%
def nats(model, ids):
    "−ln p of every token but the first of a row.  (B, T) -> (B, T − 1)"
    with ft.no_grad():
        log_p = ft.ops.log_softmax(model(ids[:, :-1])).numpy()
    return -np.take_along_axis(log_p, ids[:, 1:, None], -1)[..., 0]

each = {name: nats(models[name], ids) for name in COLOURS}
l, one = each["base-gpt"], math.exp(each["base-gpt"].mean())                           # (texts, 127)
future = np.concatenate([ids[:4, :64], ids[4:8, 64:]], axis=1)                         # the same beginning, another end
assert np.allclose(nats(models["base-gpt"], future)[:, :63], l[:4, :63], atol=1e-3)    # what is to be predicted is not seen
print(f"perplexity {one:.1f};  mean of perplexities by text {np.exp(l.mean(1)).mean():.1f}, by 4 texts "
      f"{np.exp(l.reshape(-1, 4 * 127).mean(1)).mean():.1f}, by token {np.exp(l).mean():,.0f}")
assert abs(ft.perplexity(models["base-gpt"], [ids[:5], ids[5:]]) / one - 1) < 1e-3     # however it is cut
assert one < np.exp(l.reshape(-1, 4 * 127).mean(1)).mean() < np.exp(l.mean(1)).mean() < np.exp(l).mean()    # e^x is convex
# %% [markdown]
# A perplexity means nothing by itself. It depends on the tokenizer (compare bits per byte instead), on the text, and on how much of it the model may
# read. So it stands beside something that everybody can do: count tokens, and count pairs. The pairs are smoothed, and the smoothing is chosen on
# the validation split, never on the test split:
# %%
quote(baselines.bigram_perplexity)
counting = {"unigrams": baselines.unigram_perplexity(train, part, V), "bigrams": baselines.bigram_perplexity(train, valid, part, V)}
table = counting | {name: math.exp(l.mean()) for name, l in each.items()}
assert list(table.values()) == sorted(table.values(), reverse=True) and table["bigrams"] > 1.4 * table["base-gpt-small"]
# %% [markdown]
# ## Pretraining, watched
# `make base` trained the shipped models and wrote their losses down. With the same seed the first steps come out again here. Then the rest of the
# curve, from the record. **Predict first.** What does a model learn first? At what loss would it know how frequent each token is, and no more?
# %%
recipe = pretrain.RECIPES["base-gpt-small"]
steps = 15 if FAST else 20
batches = ft.data.lm_batches(train, 128, recipe.tokens // 128, recipe.seed)
history = ft.fit(recipe.model(), batches, steps, ft.AdamW(recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.decay),
                 schedule=lambda t, T: ft.cosine_schedule(recipe.warmup, floor=0.1)(t, recipe.steps))
record = {name: json.loads((pretrain.ASSETS / name / "history.json").read_text()) for name in models}
print("mean loss of steps 1-15: here", round(np.mean(history.losses[:15]), 3), " recorded", record["base-gpt-small"]["losses"][0])
assert abs(np.mean(history.losses[:15]) - record["base-gpt-small"]["losses"][0]) < 0.05
first = {name: next(s for s, loss in record["base-gpt"]["evaluations"] if loss < math.log(p)) for name, p in counting.items()}
print("base-gpt is better, held out, at the latest in step:", first)
assert first["unigrams"] < first["bigrams"] and l[:, 63:].mean() < l[:, :4].mean() - 0.2      # what was read before helps
large = record["base-gpt-large"]
assert large["losses"][-1] < large["evaluations"][-1][1] - 0.5                         # 11 epochs: much of the last gain is learnt by heart
fig, panels = figure(2, 3.2)
bins = [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 128)]
for name, colour in COLOURS.items():
    panels[0].plot(np.arange(200) * recipe.steps / 200 + 8, record[name]["losses"], color=colour, lw=1.2, label=name)
    panels[0].plot(*zip(*record[name]["evaluations"]), "o", ms=2.5, color=colour)
    panels[1].plot([(a * b)**0.5 for a, b in bins], [each[name][:, a - 1:b - 1].mean() for a, b in bins], "o-", ms=4, color=colour)
panels[0].plot(np.arange(1, steps + 1), history.losses, color="black", label="here, live")
for ax, x, side in zip(panels, (1, 90), ("left", "right")):
    for name, p in counting.items():
        ax.axhline(math.log(p), color="#999999", lw=1, ls="--")
        ax.text(x, math.log(p) + 0.06, name, color="#666666", fontsize=8, ha=side)
    ax.set(xscale="log", ylim=(2, 7.8))
panels[0].set(xlabel="step of 4,096 tokens", ylabel="loss (nats per token)", title="in training (dots: held out)")
panels[1].set(xlabel="tokens read before", title="held out, after training")
panels[0].legend(fontsize=8, loc="lower left")
show("First how frequent tokens are, then pairs, then what pairs cannot tell. Right: the first twenty tokens of context help; more help little.")
# %% [markdown]
# ## Masked tokens
# BERT chooses 15 % of the places. Of these 80 % become `[MASK]`, 10 % another token, 10 % stay as they are. The loss counts the chosen places only.
# Why not 100 % `[MASK]`? In fine-tuning there is no `[MASK]`; a model that never had to answer for a word it sees need not keep it.
#
# **Predict first.** How often is the shipped BERT right at each of the three kinds, and at places that were not chosen?
# %%
rng, bert = np.random.default_rng(0), models["base-bert"]
texts = np.pad(ids[:, :126], ((0, 0), (1, 1)), constant_values=((0, 0), (2, 3)))       # [CLS] ... [SEP]
seen, labels = ft.data.mlm(texts, np.ones(texts.shape, bool), rng, V)
with ft.no_grad():
    log_p = ft.ops.log_softmax(bert(seen)).numpy()
chosen, right, same = labels != -100, log_p.argmax(-1) == texts, seen == texts
free = ~chosen & (texts > 5)                                                           # not chosen, and a word
for kind, at in (("[MASK]", seen == 4), ("another token", chosen & ~same & (seen != 4)), ("left as it is", chosen & same), ("not chosen", free)):
    print(f"{kind:14} {100 * at.mean():5.1f} % of places, right {100 * right[at].mean():5.1f} %")
answer = -np.take_along_axis(log_p, texts[..., None], -1)[..., 0]                      # (B, T)
loss = ft.evaluate(bert, [{"ids": seen, "labels": labels}])["loss"]
print(f"the loss: {loss:.2f};  the mean over all places: {answer.mean():.2f}")
assert abs(answer[chosen].mean() - loss) < 1e-3 and loss > 2 * answer.mean()           # the loss is that of the chosen places
assert right[chosen & same].mean() > 0.85 > right[seen == 4].mean() + 0.2 and right[free].mean() > 0.85
# %% [markdown]
# A loss over all places would look three times as good, and teach mostly copying, which BERT learns from the 1.5 % it must answer for and sees. The
# card's 46.6 % is over all chosen places. And a masked loss is no rival of a causal one: it is asked for less, and reads on both sides.
#
# ## What the base knows, and what not
# **Predict first.** A sentence, or the same with two words swapped: which has more probability? What about 2 + 3 = 5 against 2 + 3 = 0 ... 9?
# %%
gpt = models["base-gpt"]

def cost(sentences):
    ids, mask = ft.data.pad([[ft.data.text.END, *e.ids] for e in tokenizer.encode_batch(sentences)])
    return (nats(gpt, ids) * mask[:, 1:]).sum(1)

held_out = [s for r in ft.data.snapshot() if r.split == "test" and r.kind == "docstring" for s in ft.data.sentences(r.text)][:60]
order = np.mean(cost(held_out) < cost([ft.data.swap_two(s, rng) for s in held_out]))
sums = np.mean([cost([f"{i} + {j} = {k}" for k in range(10)]).argmin() == i + j for i in range(1, 6) for j in range(1, 5)])
source = ft.perplexity(gpt, ft.data.held_out_batches(ft.data.pretraining("source", "test")))
print(f"prefers a sentence to its swapped twin: {100 * order:.0f} %;  sums: {100 * sums:.0f} %;  perplexity of Python source: {source:.0f}")
for prompt in ("Raises ValueError if", "Paris is the capital of"):
    print(tokenizer.decode(ft.generate(gpt, [tokenizer.encode(prompt).ids], 12)[0]), "...")
assert order > 0.8 and sums < 0.4 and source > 5 * one
# %% [markdown]
# It knows how documentation is worded. It knows no facts, cannot add, and Python source is foreign to it, though both come from the same files:
# a base knows what its text made worth knowing. Teaching it something else is fine-tuning, from lesson 05 on.
# %%
bits = len(part) / (math.log(2) * len(tokenizer.decode(part.tolist(), skip_special_tokens=False).encode()))
print(f"on {len(part):,} held-out tokens:\n{'':16}{'numbers':>10}{'perplexity':>12}{'bits per byte':>15}{'as recorded, on the validation split':>38}")
for name, p in table.items():
    numbers = f"{sum(q.size for q in models[name].parameters()):,}" if name in models else ""
    print(f"{name:16}{numbers:>10}{p:12.1f}{bits * math.log(p):15.2f}", f"{math.exp(record[name]['evaluations'][-1][1]):37.1f}" if numbers else "")
# %% [markdown]
# **Exercises.** `tinyft start next_tokens` (and padding), `tinyft start mlm` (80/10/10), `tinyft start pool` (the mean over tokens).
