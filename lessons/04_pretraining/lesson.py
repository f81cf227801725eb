# %% [markdown]
# # 04 Pretraining
#
# **Reading:** 50 minutes. **You need:** lessons 01 to 03.
# **Exercises:** next_tokens, mlm, pool (about 50 minutes).
#
# Fine-tuning starts from a model that already knows something. Nobody labelled the
# text from which it learned. Where do its labels come from? From the text: hide a
# token, and ask for it. Training a model on this question is called **pretraining**.
#
# There are two forms. A **causal** model (GPT) predicts each token from the tokens
# before it. A **masked** model (BERT) predicts some tokens from all the others. This
# lesson explains both, measures them, and asks what the models know afterwards.

# %%
import json
import math
import os

import numpy as np

import tinyft as ft
from tinyft import pretrain
from tinyft.data import baselines
from tinyft.learn.draw import bars, curves, diagram
from tinyft.learn.lessons import quote
from tinyft.train.batch import next_tokens

FAST = "TINYFT_FAST" in os.environ                      # set in tests: a shorter run
VOCABULARY = 2048
tokenizer = ft.data.shipped_tokenizer()
gpt, _ = ft.load("base-gpt")                            # the model and its tokenizer;
bert, _ = ft.load("base-bert")                          # all models share this one

# %% [markdown]
# ## The text
# The package ships with real prose: Python's language reference, docstrings and
# comments. It is divided into three **splits**: training, validation and test. All
# text of one Python module is in the same split, so no text of a test module is used
# in training.

# %%
train = ft.data.pretraining("prose", "train")
valid = ft.data.pretraining("prose", "valid")
test = ft.data.pretraining("prose", "test")
print(f"{len(train):,} tokens of training text, {len(test):,} of test text")
print([tokenizer.decode([token]) for token in test[:12]])

# %% [markdown]
# A token is a frequent piece of text: a word, a part of a word, or a sign. The space
# before a word belongs to its token. The vocabulary has 2,048 tokens.
#
# ## The next token
# A causal model reads a text and predicts, at every position, the token that follows.
# So the labels are the text itself, moved by one position.

# %%
ids = np.array(tokenizer.encode("Return the first item of the list.").ids)
inputs = ids[:-1]
labels = ids[1:]
for token, label in zip(inputs, labels):
    read = tokenizer.decode([token])
    print(f"reads {read!r:10} predicts {tokenizer.decode([label])!r}")

# %% [markdown]
# The same as a picture. A column is a position. The upper row is what the model
# reads, the lower row is its label. Each label is the token of the next column: an
# arrow joins a token with the place where it is the label.

# %%
# a box: (column, row, text, kind); kind "data" is blue, "none" is text without a box
boxes = {"r": (-1, 0, "reads", "none"), "l": (-1, 1, "label", "none")}
arrows = []
for t in range(len(inputs)):
    read = tokenizer.decode([inputs[t]]).strip()
    label = tokenizer.decode([labels[t]]).strip()
    boxes |= {f"input {t}": (t, 0, read), f"label {t}": (t, 1, label, "data")}
    if t > 0:
        arrows.append((f"input {t}", f"label {t - 1}"))
diagram(boxes, arrows, caption="The labels are the text, moved by one position.",
        height=1.9)

# %% [markdown]
# The first token is never a label: nothing stands before it. The last token is never
# an input: nothing is known after it. A text of 8 tokens gives 7 labels.
#
# Inside the model, the causal mask of lesson 02 hides all later positions. So one
# pass answers all 7 questions, and no answer can be copied.
#
# Texts of different lengths share a batch: short ones are filled with **padding**,
# and a mask says which tokens are real. Padding has nothing to teach. The label -100
# means "no label here"; the loss leaves such a position out.
#
# Here are two texts, of four and of two tokens. `ft.data.pad` fills the second with
# zeros up to the length of the first. (`multiple=1`: no longer than that. By default
# the length is rounded up to a multiple of 8.)

# %%
batch_ids, batch_mask = ft.data.pad([[483, 277, 808, 1435], [483, 266]], multiple=1)
print("ids:   ", batch_ids.tolist())
print("mask:  ", batch_mask.astype(int).tolist())
print("labels:", next_tokens(batch_ids, batch_mask).tolist())

# %% [markdown]
# The second text has two tokens, so it has one label.
#
# ## The loss
# At each position the model gives a probability to every token of the vocabulary. The
# loss of a position is $-\ln p$, where $p$ is the probability of its label. The loss
# of a text is the mean over its labels. It is the cross-entropy of lesson 03,
# measured in **nats** because the logarithm is natural.
#
# What is the loss of a model that knows nothing? It has to choose among 2,048 tokens.
# With random weights it gives every token about the same probability, $p = 1/2048$.

# %%
untrained = ft.GPT(gpt.config, seed=1)
held_out = ft.data.held_out_batches(test)
untrained_loss = ft.evaluate(untrained, held_out[:1])["loss"]
print(f"loss of an untrained model: {untrained_loss:.2f}")
print(f"ln 2048:                    {math.log(VOCABULARY):.2f}")

# %% [markdown]
# Its loss is near $-\ln (1/2048) = \ln 2048$. Remember this number: a training run that
# begins far above it has a mistake in its model or in its labels.

# %% [check]
assert abs(untrained_loss - math.log(VOCABULARY)) < 0.1

# %% [markdown]
# ## Perplexity
# A loss of 7.62 nats says little to a reader. So we turn it back: $e^{7.62} = 2048$.
# This number is the **perplexity**: the model is as uncertain as if it had to choose
# among that many equally probable tokens.
#
# The probability of a text is the product of the probabilities of its tokens, each
# given the tokens before it. The logarithm turns this product into a sum: the losses
# of the tokens add up to $-\ln p$ of the whole text.
#
# A text of two tokens shows how perplexity is computed. The model gave the first token
# probability 1/2, and the second 1/8.

# %%
probabilities = np.array([1 / 2, 1 / 8])
losses = -np.log(probabilities)
print("perplexity of each token:     ", np.exp(losses))
print("perplexity of the text:       ", round(np.exp(losses.mean()), 3))
print("mean of the two perplexities: ", round(np.exp(losses).mean(), 3))

# %% [markdown]
# The text has probability 1/2 times 1/8, which is 1/16. Two tokens of probability 1/4
# give the same 1/16. So the text is as hard as two choices among 4: its perplexity is
# 4. With the mean of the perplexities, 5, the text would have probability 1/5 times
# 1/5, which is wrong. **First the mean of all losses, then the exponential.**
#
# A picture shows where the difference comes from. The curve is $e$ to the loss. The
# straight line joins our two tokens. The mean of the two losses is 1.39, halfway
# between them. There the curve is at 4 and the line at 5.

# %%
x = np.linspace(losses[0], losses[1], 50)
line = np.linspace(2, 8, 50)
curves({"e to the loss": np.exp(x), "straight line": line}, x=x,
       levels={"straight line at 1.39: 5": 5.0, "curve at 1.39: 4": 4.0}, height=3.4,
       xlabel="loss in nats (the mean of the two is 1.39)", ylabel="perplexity",
       caption="The curve bends upwards, so the line lies above it: 5, not 4.")

# %% [markdown]
# Now real text. We compute the loss of every single token, since we need it below.
# In the comments, B is the number of texts, T their length, V the vocabulary.

# %%
def token_losses(model, ids):
    """The loss at each label.  ids (B, T) -> losses (B, T - 1)"""
    with ft.no_grad():
        log_p = ft.ops.log_softmax(model(ids[:, :-1])).numpy()   # (B, T - 1, V)
    labels = ids[:, 1:, None]                                    # (B, T - 1, 1)
    return -np.take_along_axis(log_p, labels, axis=-1)[:, :, 0]

# %% [markdown]
# At each position `take_along_axis` picks one of the V numbers: that of the label.
#
# We measure on 128 **windows** of 112 tokens each, taken at equal distances from the
# test split. `ft.data.held_out_batches` cuts them, in 8 batches of 16. The README
# measures on the same windows.

# %%
def windows_of(tokens):
    """The held-out windows of a split.  tokens (N,) -> ids (128, 112)"""
    return np.concatenate([batch["ids"] for batch in ft.data.held_out_batches(tokens)])

windows = windows_of(test)
losses = token_losses(gpt, windows)
perplexity = np.exp(losses.mean())
print(f"base-gpt: loss {losses.mean():.3f}, perplexity {perplexity:.1f}")

# %% [markdown]
# The shipped model hesitates between about 39 tokens, where the untrained one
# hesitates between 2,048.
#
# **Predict first.** Some programs compute a perplexity for each text, and report the
# mean of these. Let us do this for batches of 16 windows, for single windows and for
# single tokens. Which of the three means is nearest to 39.3, which is farthest? Are
# they above it or below it?

# %%
by_batch = np.exp(losses.reshape(8, -1).mean(axis=1)).mean()
by_window = np.exp(losses.mean(axis=1)).mean()
by_token = np.exp(losses).mean()
print(f"over all tokens:  {perplexity:8.1f}")
print(f"mean by batch:    {by_batch:8.1f}")
print(f"mean by window:   {by_window:8.1f}")
print(f"mean by token:    {by_token:8,.0f}")

# %% [markdown]
# All three are above it, and the smaller the parts, the larger the mean. It is the
# bend of the curve again: a part with a high loss adds more than a part with a low
# loss takes away. By token, a few surprising tokens decide the result.
#
# The mean of perplexities is in use. Hugging Face's library *evaluate* returns it
# under the name `mean_perplexity` (file `metrics/perplexity/perplexity.py`). Two
# papers that cut their texts differently cannot compare such numbers. The mean loss
# over all tokens does not depend on the batches. `ft.perplexity` is $e$ to this mean.
# It is one line, because `evaluate` does the work:

# %%
quote(ft.perplexity)

# %% [markdown]
# We give it the same windows in three batches of very different sizes.

# %%
batches = [windows[:5], windows[5:70], windows[70:]]
library_perplexity = ft.perplexity(gpt, batches)
print(f"in batches of 5, 65 and 58 windows: {library_perplexity:.1f}")

# %% [markdown]
# Still 39.3. The loss of each batch is multiplied by its number of labels before the
# mean is taken. You write this sum in the exercise `pool`.

# %% [check]
assert abs(perplexity - 39.3) < 0.05
assert perplexity < by_batch < by_window < 100 < by_token
assert abs(library_perplexity / perplexity - 1) < 1e-3
# The beginning of a text has the same losses whatever follows: nothing is copied.
other_ending = np.concatenate([windows[:4, :64], windows[4:8, 64:]], axis=1)
assert np.allclose(token_losses(gpt, other_ending)[:, :63], losses[:4, :63], atol=1e-3)

# %% [markdown]
# ## Something to compare with
# Is 39.3 good? A perplexity means nothing alone. Compare it with a model that
# everybody can build: one that counts. The simplest counts how frequent each token is
# in the training text, and ignores what stands before (**unigrams**).

# %%
counts = np.bincount(train, minlength=VOCABULARY)
frequency = (counts + 1) / (len(train) + VOCABULARY)
unigram_loss = -np.log(frequency[windows]).mean()
print(f"unigrams: loss {unigram_loss:.2f}, perplexity {math.exp(unigram_loss):.0f}")

# %% [markdown]
# The `+ 1` gives a token that never occurs in training a small probability instead of
# 0, since $-\ln 0$ is infinite.
#
# The next model counts pairs (**bigrams**): how often does token $b$ follow token
# $a$? Many pairs never occur in training. There it falls back on the frequency of
# $b$:
#
# $p(b \mid a) = \frac{n_{ab} + m \, p(b)}{n_a + m}$
#
# $n_{ab}$ is the count of the pair, $n_a$ the count of $a$, and $p(b)$ the frequency
# of $b$. If $a$ was never seen, $p(b)$ remains. If $a$ was seen $m$ times, its pairs
# and $p(b)$ count half each. If it was seen much more often, its pairs decide. The
# number $m$ is chosen on the validation split, never on the test split.

# %%
bigram_perplexity = baselines.bigram_perplexity(train, valid, windows, VOCABULARY)
counting = {"unigrams": unigram_loss, "bigrams": math.log(bigram_perplexity)}
print(f"bigrams: loss {counting['bigrams']:.2f}, perplexity {bigram_perplexity:.1f}")
print(f"base-gpt: loss {losses.mean():.2f}, perplexity {perplexity:.1f}")

# %% [markdown]
# `base-gpt` has a million parameters. It is better than the table of pairs, by 0.81
# nats a token. Follow the steps down from 7.62: counting tokens brings 1.21 nats,
# counting pairs 1.93 more, and reading further back the last 0.81. A language model
# that cannot beat the pairs does not use its context.

# %% [check]
unigrams = baselines.unigram_perplexity(train, windows, VOCABULARY)
assert abs(math.exp(unigram_loss) / unigrams - 1) < 1e-6
assert abs(counting["bigrams"] - losses.mean() - 0.81) < 0.02
assert abs(math.log(VOCABULARY) - unigram_loss - 1.21) < 0.02
assert abs(unigram_loss - counting["bigrams"] - 1.93) < 0.02

# %% [markdown]
# ## Train one
# We now train a small GPT ourselves: one layer, 64 wide, for a few seconds.
# `lm_batches` cuts the training text into rows of 32 tokens. There are no labels in a
# batch: `fit` makes them, by the shift that you have seen.
#
# **Predict first.** The run reads 128,000 tokens. The levels to compare with: 7.62
# (knows nothing), 6.41 (unigrams), 4.48 (bigrams). What will it learn first, and
# where will its loss be at the end?

# %%
config = ft.GPTConfig(vocab=VOCABULARY, positions=32, width=64, layers=1, heads=2)
small = ft.GPT(config, seed=0)
batches = ft.data.lm_batches(train, T=32, batch_size=8, seed=0)
steps = 200 if FAST else 500
history = ft.fit(small, batches, steps, ft.AdamW(lr=1e-2, betas=(0.9, 0.98)),
                 schedule=ft.cosine_schedule(warmup=0.05))
small_loss = ft.evaluate(small, ft.data.held_out_batches(test, T=32))["loss"]
print(f"loss on test text: {small_loss:.2f}")
averaged = np.mean(np.reshape(history.losses, (-1, 10)), axis=1)      # of 10 steps each
curves({"our model": averaged}, x=10 * np.arange(len(averaged)) + 5, levels=counting,
       caption="A model first learns how frequent each token is.")

# %% [markdown]
# The loss falls fast to the level of the unigrams: at first a model learns how
# frequent each token is. Then it falls slowly: which token follows which is harder to
# learn. A run this short ends far above the pairs.
#
# What does a model at this level write? We let it continue a text: first with the
# most probable token each time, then with tokens drawn at random by their
# probabilities (`temperature=1.0`).

# %%
def continued(model, prompt, **options):
    """The prompt and 12 tokens more, as text."""
    ids = [tokenizer.encode(prompt).ids]
    return tokenizer.decode(ft.generate(model, ids, 12, **options)[0])

print("most probable:", repr(continued(small, "Return the")))
drawn = continued(small, "Return the", temperature=1.0, rng=np.random.default_rng(0))
print("drawn:        ", repr(drawn))
print("base-gpt:     ", repr(continued(gpt, "Return the")))

# %% [markdown]
# Our model writes frequent tokens: `\n` is the end of a line. The order of its tokens
# makes little sense. `base-gpt` writes phrases of documentation. Its most probable
# token leads it in a circle, which is common with this way of writing.

# %% [check]
assert counting["bigrams"] + 0.7 < small_loss < counting["unigrams"] + 0.1
assert history.losses[0] > 7.5

# %% [markdown]
# ## The whole run
# The shipped models were trained in the same way, for 3,000 steps of 4,096 tokens. That
# took about an hour (`make base` in the repository does it again). Their losses are in
# a file beside each model.

# %%
record = {}
for name in ("base-gpt-small", "base-gpt", "base-gpt-large"):
    record[name] = json.loads((pretrain.ASSETS / name / "history.json").read_text())
recorded_steps = 15 * np.arange(200) + 8              # each loss is a mean of 15 steps
for level, value in counting.items():
    is_below = np.array(record["base-gpt"]["losses"]) < value
    step = recorded_steps[is_below.argmax()]          # argmax: the first True
    print(f"base-gpt is better than {level} from step {step}")
curves({name: record[name]["losses"] for name in record}, x=recorded_steps,
       levels=counting, log="x", height=3.4,
       caption="First frequencies, then pairs, then what pairs cannot tell.")

# %% [markdown]
# The horizontal axis is logarithmic: each doubling of the steps is as wide as the
# last. The curves pass the level of the unigrams early, and the level of the pairs
# after a tenth of the run. Learning what pairs cannot tell takes the other nine
# tenths.
#
# The largest model has the lowest loss. Did it learn the language, or did it learn
# this text by heart? It had time for that: 3,000 steps of 4,096 tokens read the
# training text 11 times. Compare the loss in training with the loss on text that was
# held out (the validation split).

# %%
for name, losses_of_run in record.items():
    in_training = losses_of_run["losses"][-1]
    _, validation = losses_of_run["evaluations"][-1]
    print(f"{name:15} training {in_training:.2f}   held out {validation:.2f}")

# %% [markdown]
# From the middle to the large model, the training loss falls much more than the
# held-out loss: by 0.27 and 0.04. Most of the gain is memory of the training text.
# So a loss in training says little about a model; report the loss on held-out text.

# %% [check]
gains = []
for kind in ("losses", "evaluations"):
    last = [np.ravel(record[name][kind][-1])[-1] for name in record]
    gains.append(last[1] - last[2])
assert gains[0] > 2 * gains[1]
for level, earliest, latest in (("unigrams", 30, 90), ("bigrams", 200, 450)):
    is_below = np.array(record["base-gpt"]["losses"]) < counting[level]
    assert earliest < recorded_steps[is_below.argmax()] < latest

# %% [markdown]
# ## How much context helps
# Does the model use more than the last token? We take the losses of the test windows
# by position: the first label is predicted from one token, the hundredth from a
# hundred. Each point is a mean over some positions: 1, 2, 3 to 4, 5 to 8, and so on.

# %%
edges = [0, 1, 2, 4, 8, 16, 32, 64, 111]
by_position = []
for start, end in zip(edges[:-1], edges[1:]):
    by_position.append(losses[:, start:end].mean())
curves({"base-gpt": by_position}, x=edges[1:], levels={"bigrams": counting["bigrams"]},
       log="x", xlabel="tokens read before, at most", ylabel="loss on test windows",
       caption="The first thirty tokens of context help most.")

# %% [markdown]
# With one token before it, the model is no better than the table of pairs: both know
# only that token, and the table has counted what follows it. With thirty tokens the
# model has nearly all of its gain. (The small steps up are chance: the first point is a
# mean of only 128 losses.)

# %% [check]
assert abs(by_position[0] - counting["bigrams"]) < 1
assert by_position[0] > counting["bigrams"]
assert by_position[0] - by_position[4] > 2 * abs(by_position[4] - by_position[-1])

# %% [markdown]
# ## Masked tokens
# BERT reads in both directions. It would see the next token, so the question must be
# another one: some tokens are hidden, and the model must say what stood there. We call
# it **masked language modelling**. The rule is that of the BERT paper (Devlin et al.,
# 2019, section 3.1):
#
# 1. Choose 15 % of the positions. Only these get a label: the token that stood there.
# 2. Of the chosen positions, 80 % become the special token `[MASK]` (*hidden*).
# 3. Another 10 % of them become a random token (*random*).
# 4. The last 10 % of them stay as they are (*kept*).
#
# In short: **80/10/10**. The function `ft.data.mlm` does it. For the picture we take
# the sentence from above, choose half of its positions (`p=0.5`), and use a seed for
# which all three kinds occur.

# %%
text = ids[None]                                        # "Return the first ...", (1, 8)
all_real = np.ones(text.shape, bool)                    # no padding
random = np.random.default_rng(163)
corrupted, labels = ft.data.mlm(text, all_real, random, VOCABULARY, p=0.5)
print("reads: ", corrupted[0].tolist())
print("labels:", labels[0].tolist())

# %%
boxes = {"text": (-0.9, 0, "text", "none"), "reads": (-0.9, 1, "reads", "none"),
         "label": (-0.9, 2, "label", "none")}
kinds = {1: "hidden\n(80 %)", 4: "random\n(10 %)", 6: "hidden\n(80 %)",
         7: "kept\n(10 %)"}                            # what this seed has drawn
for t in range(8):
    word = tokenizer.decode([ids[t]]).strip()
    read = tokenizer.decode([corrupted[0, t]], skip_special_tokens=False).strip()
    boxes |= {f"text {t}": (t, 0, word)}
    if labels[0, t] == -100:
        boxes |= {f"reads {t}": (t, 1, read), f"label {t}": (t, 2, "-100", "none")}
    else:
        boxes |= {f"reads {t}": (t, 1, read, "trained"),
                  f"label {t}": (t, 2, word, "data"),
                  f"kind {t}": (t, 2.8, kinds[t], "none")}
diagram(boxes, height=2.9,
        caption="Orange: the chosen positions. Only they have labels.")

# %% [markdown]
# Look at the last column. The full stop was chosen and kept: the model reads the
# answer, but it cannot know that.
#
# Why not hide all chosen tokens? In fine-tuning there is no `[MASK]`. A model that
# was only ever asked at `[MASK]` would have no reason to keep the meaning of visible
# tokens. So it is asked at visible tokens too.
#
# Why random tokens? Any visible token may be a random one, so the model has to check
# every token against its neighbours. And why kept ones? Without them, a visible token
# with a label would almost never be the answer: the model would learn not to believe
# what it reads.
#
# Does BERT mask 15 % of the tokens? Section 3.1 of the paper says so ("we mask 15% of
# all WordPiece tokens"), before it gives the rule. Let us count.

# %%
special = ft.data.SPECIAL
start = np.full((len(windows), 1), special["[CLS]"])
end = np.full((len(windows), 1), special["[SEP]"])
texts = np.concatenate([start, windows[:, :110], end], axis=1)      # (128, 112)
all_real = np.ones(texts.shape, bool)
random = np.random.default_rng(0)
corrupted, labels = ft.data.mlm(texts, all_real, random, VOCABULARY)
chosen = labels != -100
hidden = corrupted == special["[MASK]"]
kept = chosen & (corrupted == texts)
replaced = chosen & ~hidden & ~kept
for name, where in (("chosen", chosen), ("[MASK]", hidden), ("random", replaced),
                    ("kept", kept)):
    print(f"{name:8} {100 * where.mean():5.1f} % of all positions")

# %% [markdown]
# About 15 % are *predicted*, and about 12 % are *masked*: 80 % of 15 % is 12 %, and
# 10 % of 15 % is 1.5 %. (The shares are a little lower here, because special tokens are
# never chosen: `[CLS]` at the start of a text, `[SEP]` at its end, and the mark between
# two texts.)
#
# **Predict first.** We run the shipped BERT on these texts and take its most probable
# token. How often is it right at `[MASK]`, at random tokens, at kept tokens, and at
# positions that were not chosen? Sort the four.

# %%
with ft.no_grad():
    log_p = ft.ops.log_softmax(bert(corrupted)).numpy()             # (B, T, V)
is_right = log_p.argmax(axis=-1) == texts
visible = ~chosen & (texts > max(special.values()))                 # no special tokens
accuracy = {"[MASK]": is_right[hidden].mean(), "random": is_right[replaced].mean(),
            "kept": is_right[kept].mean(), "not chosen": is_right[visible].mean()}
for name, share in accuracy.items():
    print(f"{name:10} {100 * share:.0f} % right")
bars(accuracy, ylabel="share right",
     caption="A visible token is usually the answer. A random one misleads.")

# %% [markdown]
# Kept tokens and tokens that were not chosen look alike to the model, so it is
# equally good at both. Random tokens are hardest: the model has to reject what it
# reads. That it is right at a third of them shows that it does not simply copy.
#
# The loss counts the chosen positions only. What if it counted all?

# %%
answer_losses = -np.take_along_axis(log_p, texts[:, :, None], axis=-1)[:, :, 0]
masked_loss = ft.evaluate(bert, [{"ids": corrupted, "labels": labels}])["loss"]
print(f"loss of the library:            {masked_loss:.2f}")
print(f"mean over the chosen positions: {answer_losses[chosen].mean():.2f}")
print(f"mean over all positions:        {answer_losses.mean():.2f}")

# %% [markdown]
# A loss over all positions would look much better, and would teach mostly copying: at
# 85 % of the positions the model reads the answer.
#
# Two warnings. A masked loss cannot be compared with a causal one: it asks about
# fewer tokens, and shows what stands on both sides. And masking has a price: one pass
# over a text gives labels at 15 % of the positions, where a causal model gets one at
# every position.

# %% [check]
assert abs(chosen[:, 1:-1].mean() - 0.15) < 0.01
assert abs(hidden[:, 1:-1].mean() - 0.12) < 0.01
assert abs(answer_losses[chosen].mean() - masked_loss) < 1e-3
assert masked_loss > 2 * answer_losses.mean()
assert accuracy["random"] < accuracy["[MASK]"] < 0.6 < 0.85 < accuracy["not chosen"]
assert abs(accuracy["kept"] - accuracy["not chosen"]) < 0.05

# %% [markdown]
# ## A text as one vector
# BERT gives a vector for each token. Many tasks want one vector for a whole text.
# Making one from many is called **pooling**. Three ways are common: take the vector of
# `[CLS]`, the mean over all positions, or the mean over the **real** positions, which
# are not padding.
#
# The test: 300 docstrings, each from one of 17 Python packages. For each we look for
# the docstring with the most similar vector. How often is it from the same package?

# %%
package = ft.data.task("package").test                 # its texts and its labels
rows = [ft.data.encode(tokenizer, text, max_len=48) for text in package.texts[:300]]
package_labels = package.labels[:300]
ids, mask = ft.data.pad(rows)
context = ft.Context(mask=mask, output_hidden_states=True)          # as in lesson 02
with ft.no_grad():
    bert(ids, context)
states = context.hidden_states[-1].numpy()    # of the last layer, (300, 48, 128)
print(f"{100 * (1 - mask.mean()):.0f} % of the positions are padding")

# %% [markdown]
# For the mean over the real positions, the mask sets the vectors of padding to zero,
# and we divide by the number of real tokens.
#
# Two vectors are similar if their **cosine** is large: they point in about the same
# direction. We first subtract the mean of all vectors, which they have in common.

# %%
real = mask[:, :, None]                                             # (B, T, 1)
vectors = {
    "[CLS]": states[:, 0],
    "all positions": states.mean(axis=1),
    "real positions": (states * real).sum(axis=1) / real.sum(axis=1),
}

def nearest(vectors):
    """For each row, the index of the most similar other row.  (n, C) -> (n,)"""
    centred = vectors - vectors.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)                                    # not itself
    return cosine.argmax(axis=1)

# %% [markdown]
# We also look at the lengths of the two texts. And we compute the chance that two
# docstrings drawn at random are from the same package.

# %%
lengths = mask.sum(axis=1)
same_package = {}
length_gap = {}
for name, pooled in vectors.items():
    found = nearest(pooled)
    same_package[name] = np.mean(package_labels[found] == package_labels)
    length_gap[name] = np.abs(lengths[found] - lengths).mean()
    print(f"{name:15} same package {100 * same_package[name]:.0f} %, "
          f"lengths differ by {length_gap[name]:.1f} tokens")
chance = np.sum((np.bincount(package_labels) / len(package_labels)) ** 2)
print(f"by chance {100 * chance:.0f} %")

# %% [markdown]
# All three are much better than chance. `[CLS]` is worst: this BERT was trained on
# masked tokens only, and `[CLS]` never had a label. Nothing has taught it to be a
# summary of the text.
#
# The two means find the right package about equally often; 300 docstrings are too few
# to tell 48 % from 46 %. But look at the lengths. With padding in the mean, texts
# become similar because they are equally *long*: they have the same share of padding.
# Worse, the vector of a text then depends on its batch, since the longest text of the
# batch decides how much padding the others get. Take the shortest docstring. We run
# the model on it once more, alone and without padding, and compare:

# %%
short = lengths.argmin()
alone_ids, alone_mask = ft.data.pad([rows[short]], multiple=1)      # (1, 8)
alone_context = ft.Context(mask=alone_mask, output_hidden_states=True)
with ft.no_grad():
    bert(alone_ids, alone_context)
alone = alone_context.hidden_states[-1].numpy()[0].mean(axis=0)     # (128,)
for name in ("all positions", "real positions"):
    in_batch = vectors[name][short]
    cosine = alone @ in_batch / np.linalg.norm(alone) / np.linalg.norm(in_batch)
    print(f"{name:15} cosine with the vector of the text alone: {cosine:.2f}")

# %% [markdown]
# A cosine of 1 means the same direction. Only the mean over real positions gives a
# text the same vector in every batch. So here too, padding must not count.

# %% [check]
assert same_package["real positions"] > same_package["[CLS]"] + 0.03
assert abs(same_package["real positions"] - same_package["all positions"]) < 0.06
assert length_gap["all positions"] < 0.7 * length_gap["real positions"]
assert same_package["[CLS]"] > 2 * chance
assert abs(cosine - 1) < 1e-4
all_positions = vectors["all positions"][short]
norms = np.linalg.norm(alone) * np.linalg.norm(all_positions)
assert alone @ all_positions < 0.97 * norms

# %% [markdown]
# ## What the base knows, and what not
# A causal model gives every text a probability, and the total loss of a text is
# $-\ln$ of it. So we can ask which of two texts the model prefers: the one with the
# smaller total loss.

# %%
def total_losses(sentences):
    """-ln p of each whole sentence.  A list of n texts -> (n,)"""
    end = special["<|endoftext|>"]                      # stands before each sentence
    rows = [[end, *tokenizer.encode(sentence).ids] for sentence in sentences]
    ids, mask = ft.data.pad(rows)
    return (token_losses(gpt, ids) * mask[:, 1:]).sum(axis=1)

sentences = []
for one in ft.data.snapshot():
    if one.split == "test" and one.kind == "docstring":
        sentences += ft.data.sentences(one.text)
sentences = sentences[:60]
swapped = [ft.data.swap_two(sentence, random) for sentence in sentences]
print(sentences[0])
print(swapped[0])

# %% [markdown]
# How often does the model prefer the sentence to its twin with two words swapped? And
# can it add: of `2 + 3 = 0` to `2 + 3 = 9`, is `2 + 3 = 5` the most probable? We try
# the 20 sums of 1 to 5 and 1 to 4. A blind guess is right once in ten.

# %%
in_order = np.mean(total_losses(sentences) < total_losses(swapped))
right_sums = 0
preferred = set()
for a in range(1, 6):
    for b in range(1, 5):
        answers = [f"{a} + {b} = {c}" for c in range(10)]
        best = int(total_losses(answers).argmin())
        preferred.add(best)
        right_sums += best == a + b
print(f"prefers the sentence: {100 * in_order:.0f} %")
print(f"right sums: {right_sums} of 20; it answers {preferred}")
print(continued(gpt, "Raises ValueError if"), "...")
print(continued(gpt, "Paris is the capital of"), "...")

# %% [markdown]
# It knows how documentation is worded. It cannot add: it answers every sum with the
# same frequent digit. And it knows nothing of France. To predict its text better, it
# never needed to know either.
#
# The same files hold text of another kind: Python source. No model was trained on it.
#
# **Predict first.** `base-gpt-large` has twice the parameters of `base-gpt`, and a
# lower perplexity on prose. Is it also lower on source?

# %%
code = windows_of(ft.data.pretraining("source", "test"))
parameters = {}
on_prose = {}
on_code = {}
for name in record:
    model, _ = ft.load(name)
    parameters[name] = sum(p.size for p in model.parameters())
    on_prose[name] = ft.perplexity(model, [windows])
    on_code[name] = ft.perplexity(model, [code])
    print(f"{name:15} prose {on_prose[name]:5.1f}   source {on_code[name]:5.0f}")

# %% [markdown]
# No. On source, 484 is the best of the three, and it belongs to the middle one. A
# lower loss on the pretraining text is no promise for other text. (These are single
# runs, one seed each: do not read a law about sizes from three points.)
#
# Teaching such a base something else, for example Python source, is **fine-tuning**:
# the subject of the lessons that follow.
#
# ## All in one table
# A perplexity depends on the tokenizer: longer tokens are harder to predict, and
# there are fewer of them. **Bits per byte** can be compared across tokenizers: the
# total loss in bits, divided by the length of the text in bytes. A loss is in bits
# when its logarithm has base 2; it is $\log_2$ of the perplexity.

# %%
prose_text = tokenizer.decode(windows.ravel().tolist(), skip_special_tokens=False)
bytes_per_token = len(prose_text.encode()) / windows.size
on_prose |= {name: math.exp(loss) for name, loss in counting.items()}
on_code["unigrams"] = baselines.unigram_perplexity(train, code, VOCABULARY)
on_code["bigrams"] = baselines.bigram_perplexity(train, valid, code, VOCABULARY)
print("                parameters   prose   bits per byte   source")
for name in ("unigrams", "bigrams", *record):
    bits = math.log2(on_prose[name]) / bytes_per_token
    size = f"{parameters[name]:,}" if name in parameters else ""
    print(f"{name:15} {size:>10} {on_prose[name]:7.1f} {bits:15.2f} "
          f"{on_code[name]:8.0f}")

# %% [markdown]
# Perplexities on 128 windows of prose and 128 windows of source. All rows were trained
# on prose. On source, the pairs are as good as the small transformer: what it learned
# about the context of prose is of no use there.

# %% [check]
assert in_order > 0.8
assert right_sums < 8 and len(preferred) == 1
assert abs(on_prose["base-gpt"] - 39.3) < 0.05
assert abs(on_code["base-gpt"] - 484) < 0.5
assert on_code["base-gpt"] < min(on_code["base-gpt-large"], on_code["base-gpt-small"])
assert on_prose["base-gpt-large"] < on_prose["base-gpt"] < on_prose["base-gpt-small"]
assert on_code["bigrams"] < 1.05 * on_code["base-gpt-small"]
assert on_prose["base-gpt-small"] < on_prose["bigrams"] < on_prose["unigrams"]

# %% [markdown]
# ## What to remember
# - The labels of a causal model are its text, moved by one position.
# - Perplexity is $e$ to the mean loss over all tokens, never a mean of perplexities:
#   that is larger, and depends on how the text was cut.
# - Masked language modelling predicts 15 % of the tokens. Of these, 80 % are hidden,
#   10 % are random and 10 % are kept: 12 % of all tokens are hidden.
# - Padding counts in nothing: not in the labels, not in a mean.
# - A base learns what helps to predict its text. Measure it on text that was held out.
#
# **Exercises.** `tinyft start pretraining` writes all three files: `next_tokens` (the
# shift, with padding), `mlm` (80/10/10) and `pool` (the loss of all batches).
