# %% [markdown]
# # 18 Sequence distillation
#
# **Reading:** 50 minutes. **You need:** lessons 02, 03 and 17.
# **Exercises:** best_candidates, extend, finish, is_done, sentence_bleu, choose
# (about two hours).
#
# In lesson 17 the student learned the teacher's distribution of the *next token*. A
# translator, or any encoder-decoder, is not asked for a token. It is asked for a
# whole text. This lesson asks what the teacher's **texts** can teach (Kim and Rush
# 2016).
#
# First we need the teacher's best text. To find it is a search, and the search has
# traps of its own. So the lesson has two halves: **beam search**, and then three
# ways to learn from a teacher that writes.

# %%
import itertools
import re
import time
from collections import Counter

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

import tinyft as ft
from tinyft.beam import Search
from tinyft.learn.draw import curves, diagram
from tinyft.learn.lessons import quote

END = 0

# %% [markdown]
# ## The probability of a text
# A decoder writes from left to right. It gives each next token a probability, which
# depends on the source $x$ and on the tokens so far. The probability of a text is
# the product of them, and its logarithm is a sum:
#
# $\ln P(y \mid x) = \sum_j \ln p(y_j \mid x, y_1 ... y_{j-1})$
#
# The last token is the **end**. It counts like the others: "return the" and "return
# the file" are different texts, and the end decides which of the two it is.
#
# Here is a decoder that we can hold in our hands: a table. It writes the docstring of
# the function `get_file`. For each text so far it has the next words and their
# probabilities.

# %%
TABLE = {
    (): {"return": 0.6, "get": 0.4},
    ("return",): {"the": 0.4, "a": 0.35, "this": 0.25},
    ("get",): {"the": 0.9, END: 0.1},
    ("return", "the"): {"file": 0.6, "name": 0.4},
    ("return", "a"): {"file": 0.6, "name": 0.4},
    ("return", "this"): {"file": 1.0},
    ("get", "the"): {"file": 0.9, "name": 0.1},
}

def table(tokens):
    """The next tokens after a text, with their probabilities."""
    return TABLE.get(tokens, {END: 1.0})

# %% [markdown]
# **Greedy** decoding takes the most probable token at each step (lesson 04).
#
# **Predict first.** Which text does greedy decoding write? Is it the most probable
# one?

# %%
def greedy(step, length):
    """The text of the most probable next tokens, and its probability."""
    tokens = ()
    p = 1.0
    while len(tokens) < length and END not in tokens:
        options = step(tokens)
        token = max(options, key=options.get)
        tokens = (*tokens, token)
        p *= options[token]
    return tokens, p

tokens, p = greedy(table, 4)
print(f"P = {p:.3f}", *tokens[:-1])
print(f"P = {0.4 * 0.9 * 0.9:.3f}", "get the file")

# %% [check]
assert greedy(table, 4)[0] == ("return", "the", "file", END)
assert np.isclose(greedy(table, 4)[1], 0.144)
assert 0.4 * 0.9 * 0.9 > 2 * greedy(table, 4)[1]

# %% [markdown]
# "get the file" is more than twice as probable. After "get" the model is sure how to
# go on, and after "return" it is not. Greedy decoding cannot know this at the first
# step, and it never comes back.
#
# We could try all texts. But with a vocabulary of $V$ tokens there are $V^n$ texts of
# $n$ tokens. So we keep a few: the **beam**.
#
# ## Beam search
# At each step we have up to $B$ **live** prefixes, with their $\ln P$. Each of them
# is continued with *every* token. These are the **candidates**. We sort all of them
# together by $\ln P$.

# %%
def candidates(live, step):
    """Each live prefix with each next token: pairs (tokens, ln P), best first."""
    found = []
    for tokens, log_p in live:
        for token, p in step(tokens).items():
            found.append(((*tokens, token), log_p + np.log(p)))
    return sorted(found, key=lambda candidate: -candidate[1])

live = [((), 0.0)]
for tokens, log_p in candidates(live, table):
    print(f"{log_p:.2f}", *tokens)

# %% [markdown]
# The search starts with **one** empty prefix. With $B$ equal ones, all of them would
# stay equal for ever.
#
# Then we select. A candidate that ends is **finished**, if it is among the best $B$.
# The best $B$ that do *not* end live on.

# %%
def beam_search(step, B, length):
    """All texts that the search finds, best first: pairs (tokens, ln P)."""
    live = [((), 0.0)]
    finished = []
    for _ in range(length):
        best = candidates(live, step)
        finished += [c for c in best[:B] if c[0][-1] == END]
        live = [c for c in best if c[0][-1] != END][:B]
    return sorted(finished + live, key=lambda text: -text[1])

for tokens, log_p in beam_search(table, 2, 4):
    print(f"P = {np.exp(log_p):.3f}", *tokens[:-1])

# %% [markdown]
# With two beams the search finds "get the file". Here is what it has looked at.

# %%
kept = {("return",), ("get",), ("get", "the"), ("return", "the"),
        ("get", "the", "file"), ("return", "the", "file")}
boxes = {(): (0, 2, "start")}
arrows = []
heights = {1: [1, 4], 2: [0, 1, 2, 3.5, 4.5], 3: [0, 1, 3, 4]}
live = [((), 0.0)]
for depth in (1, 2, 3):
    found = sorted(candidates(live, table), key=lambda c: c[0][:-1], reverse=True)
    for (tokens, log_p), row in zip(found, heights[depth]):
        word = "end" if tokens[-1] == END else tokens[-1]
        kind = "trained" if tokens in kept else ""
        boxes |= {tokens: (depth * 1.1, row, f"{word}  {log_p:.2f}", kind)}
        arrows.append((tokens[:-1], tokens))
    live = [c for c in found if c[0] in kept]
diagram(boxes, arrows, height=3.4,
        caption="Beam search with B = 2. Each box is a prefix with its ln P. The two "
                "best of each column (orange) live on, whatever their parents. The "
                "grey ones are dropped. In the next step both texts end. Greedy "
                "decoding knows only the topmost branch.")

# %% [check]
assert beam_search(table, 2, 4)[0][0] == ("get", "the", "file", END)
assert beam_search(table, 1, 4)[0][0] == greedy(table, 4)[0]
every = beam_search(table, 100, 4)
assert every[0][0] == ("get", "the", "file", END)
assert np.isclose(sum(np.exp(log_p) for _, log_p in every), 1)
assert {c[0] for c in live} == {t for t in kept if len(t) == 3}

# %% [markdown]
# With $B = 1$ this is greedy decoding. With a $B$ so large that nothing is dropped,
# it tries all texts. In between it costs $B$ times as much as greedy decoding.
#
# The library's search works on a batch: the live prefixes of all sentences are the
# rows of one pass. `best_candidates` finds the candidates of each sentence, and
# `extend` decides about them:

# %%
quote(Search.extend)

# %% [markdown]
# Look at `rank < self.beams`. A bad candidate that happens to end is forgotten. If
# every end counted, a text of only the end would always be found, even where the
# model finds it almost impossible.
#
# **Exercises:** `best_candidates`, `extend`.
#
# ## A larger beam can be worse
# A larger beam looks at more. Is its best text never worse than that of a smaller
# beam?
#
# **Predict first.** A model begins with A (0.6) or B (0.4). After A come ten tokens
# of 0.1 each, then all is certain. After B come two tokens of 0.5 each, and then
# twice ten tokens of 0.1. All texts have four tokens. Which of $B$ = 1, 2, 3 find the
# best text?

# %%
def trap(tokens):
    ten = dict.fromkeys("abcdefghij", 0.1)
    if not tokens:
        return {"A": 0.6, "B": 0.4}
    if len(tokens) == 1:
        return ten if tokens[0] == "A" else {"a": 0.5, "b": 0.5}
    return {"a": 1.0} if tokens[0] == "A" else ten

for B in (1, 2, 3):
    tokens, log_p = beam_search(trap, B, 4)[0]
    print(f"B = {B}: P = {np.exp(log_p):.3f}", *tokens)

# %% [check]
found = [round(np.exp(beam_search(trap, B, 4)[0][1]), 6) for B in (1, 2, 3)]
assert found == [0.06, 0.002, 0.06]

# %% [markdown]
# At the second step the two texts of B have 0.2 each, those of A 0.06. With two beams
# they push A out, and pay for it later. So "more beams, better texts" is a tendency,
# not a law. Only a beam that drops nothing is safe.
#
# ## Why short texts win
# Each token adds a logarithm that is at most 0. So $\ln P$ falls with the length, and
# a search for the largest $\ln P$ likes short texts. The usual remedy divides by a
# **length penalty** of the number of tokens $n$, with the end:
#
# score $= \ln P / lp(n)$
#
# Two forms are in use:
#
# - $lp(n) = ((5 + n)/6)^\alpha$, of Google's translator (Wu et al. 2016), where
#   $\alpha = 0.6$. In the library: `ft.GNMTPenalty(0.6)`
# - $lp(n) = n^\alpha$. With $\alpha = 1$ the score is the mean over the tokens. This
#   is `length_penalty` of `transformers`, and `ft.PowerPenalty(1.0)` here.
#
# $\ln P$ is negative. So a large $lp$ makes the score *better*: a positive $\alpha$
# favours long texts, in spite of the name. $\alpha = 0$ changes nothing. Take a text
# in which each token has the probability 0.7:

# %%
n = np.arange(1, 9)
log_p = n * np.log(0.7)
gnmt = np.array([ft.GNMTPenalty(0.6)(int(k)) for k in n])
power = np.array([ft.PowerPenalty(1.0)(int(k)) for k in n])
curves({"ln P": log_p, "((5 + n)/6)^0.6": log_p / gnmt, "n": log_p / power}, x=n,
       xlabel="tokens n, with the end", ylabel="score",
       caption="The score of a text of n tokens, each with the probability 0.7. "
               "Without a penalty every further token costs the same. Divided by n, "
               "it costs nothing. The penalty of 2016 lies between them.")

# %% [markdown]
# The length is that of *each text*. Some programs divided all texts of a step by the
# penalty of this step. That changes nothing: they stay in the order of $\ln P$. And
# the length counts the end. A text of only the end has $n = 1$; without the end we
# would divide by $0^\alpha$.
#
# Two texts that have finished at different steps:

# %%
texts = {"return": np.log([0.5, 0.4]), "return the file": np.log([0.5, 0.6, 0.7, 0.8])}
penalties = [ft.GNMTPenalty(0.0), ft.GNMTPenalty(0.6), ft.PowerPenalty(1.0)]
for name, logs in texts.items():
    none, google, mean = [logs.sum() / lp(len(logs)) for lp in penalties]
    print(f"{name:16} ln P {none:.2f}, GNMT {google:.2f}, mean {mean:.2f}")

# %% [check]
short, long = texts.values()
assert short.sum() > long.sum()
assert long.sum() / penalties[1](4) > short.sum() / penalties[1](2)
assert long.sum() / 4 > short.sum() / 2
assert ft.GNMTPenalty(0.6)(1) == 1 == ft.PowerPenalty(1.0)(1)
assert np.allclose(log_p / power, np.log(0.7))

# %% [markdown]
# **Exercise:** `finish`.
#
# ## When to stop
# A text has finished with a good score. May the search stop? A common rule: stop as
# soon as $B$ texts have finished. But a live prefix may still become a better text,
# above all if the length penalty favours long ones.
#
# The safe rule uses that $\ln P$ can only fall. The best that a live prefix can
# reach is its present $\ln P$, divided by the largest penalty of all lengths that are
# still to come. If a finished score is at least that good, nothing can change.
#
# We compare the rules on random models: tables of four tokens, drawn at random.

# %%
def random_model(seed):
    known = {}

    def step(tokens):
        if tokens not in known:
            z = 2 * np.random.default_rng([seed, *tokens]).standard_normal(4)
            known[tokens] = dict(enumerate(np.exp(z) / np.exp(z).sum()))
        return known[tokens]

    return step

# %%
LENGTH = 8
lp = ft.PowerPenalty(1.0)

def best_score(step, B, may_stop):
    """(the best score, the number of steps) of a search with a rule for stopping."""
    live = [((), 0.0)]
    scores = []
    for n in range(1, LENGTH + 1):
        best = candidates(live, step)
        scores += [c[1] / lp(n) for c in best[:B] if c[0][-1] == END]
        live = [c for c in best if c[0][-1] != END][:B]
        if n < LENGTH and scores and may_stop(scores, live, B):
            return max(scores), n
    return max(scores + [log_p / lp(LENGTH) for _, log_p in live]), LENGTH

# %%
def never(scores, live, B):
    return False

def when_full(scores, live, B):
    return len(scores) >= B

def when_safe(scores, live, B):
    return max(scores) >= live[0][1] / lp(LENGTH)

# %% [markdown]
# **Predict first.** In how many of 300 random models does the rule "stop at $B$
# finished texts" lose the best text that the search would find? None, 1 in 100, or
# more than 1 in 10?

# %%
lost = {}
for rule in (never, when_full, when_safe):
    results = [best_score(random_model(seed), 3, rule) for seed in range(300)]
    scores, steps = np.array(results).T
    if rule is never:
        full = scores
    lost[rule.__name__] = int((scores < full - 1e-12).sum())
    print(f"{rule.__name__:10} {steps.mean():.1f} steps, "
          f"lost in {lost[rule.__name__]} of 300 models")

# %% [check]
assert lost["when_full"] > 30
assert lost["when_safe"] == 0

# %% [markdown]
# The quick rule saves the most steps, and loses often. Random tables are hard; a
# trained model is surer of itself. But the safe rule costs little, and it never
# loses. The library's `is_done` is this rule, for the `n_best` texts:

# %%
quote(Search.is_done)

# %% [markdown]
# `reach` is the largest penalty among the lengths to come. With $\alpha > 0$ that is
# the penalty of the last length, with $\alpha < 0$ that of the next one.
#
# **Exercise:** `is_done`.
#
# ## A teacher
# Now a real model. The snapshot of Python's library has functions with docstrings.
# To write the *name* of a function for its docstring, a small model must learn for
# many minutes. We have seconds. So we take the other direction, and only the
# beginning: the name is the source, the first words of the docstring are the target.
# And only names that begin with one of 24 frequent words, such as "get".

# %%
def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())

every = ft.data.name_pairs()
starts = Counter(p.name.split("_")[0] for p in every if p.split == "train")
frequent = {word for word, _ in starts.most_common(24)}
chosen = [p for p in every if p.name.split("_")[0] in frequent
          and len(words(p.summary)) >= 4]
for p in chosen[:3]:
    print(p.name.replace("_", " "), "->", *words(p.summary)[:4])

# %% [markdown]
# Our tokens are whole words: the 300 most frequent ones. A docstring is cut before
# its first rare word, or after four words. A rare word in a name becomes `[UNK]`.

# %%
counts = Counter()
for p in chosen:
    if p.split == "train":
        counts.update(p.name.split("_")[:4] + words(p.summary)[:4])
vocabulary = ["[END]", "[UNK]"] + [word for word, _ in counts.most_common(300)]
ids = {word: i for i, word in enumerate(vocabulary)}
tokenizer = Tokenizer(models.WordLevel(ids, "[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

# %%
pairs = {"train": [], "test": []}
for p in chosen:
    name = " ".join(p.name.split("_")[:4])
    known = itertools.takewhile(ids.__contains__, words(p.summary)[:4])
    text = " ".join(known)
    if len(text.split()) >= 2:
        pairs["train" if p.split == "train" else "test"].append((name, text))
print(len(pairs["train"]), "pairs for training,", len(pairs["test"]), "for the test")

# %% [markdown]
# (The test has the modules of the splits "valid" and "test". No module is in both
# parts.) `ft.data.source_batches` makes batches of the pairs. The decoder's text
# begins with a start token, for which T5 takes padding, here 0.

# %%
def batches_of(name, batch_size, seed=0, shuffle=True):
    return ft.data.source_batches(pairs[name], tokenizer, batch_size, 6, 6, seed,
                                  start=END, end=END, shuffle=shuffle)

def text_of(tokens):
    return " ".join(vocabulary[token] for token in tokens if token != END)

batch = next(iter(batches_of("train", 2)))
print("source_ids\n", batch["source_ids"], "\nids\n", batch["ids"])
print(text_of(batch["source_ids"][0]), "->", text_of(batch["ids"][0]))

# %% [markdown]
# The teacher is a small T5 with one layer in the encoder and one in the decoder. It
# trains for 240 steps.

# %%
def make_model(width, seed=0):
    config = ft.T5Config(vocab=len(vocabulary), width=width, layers=1, heads=4,
                         head_width=width // 4, hidden=2 * width)
    return ft.T5(config, seed)

def train(model, batches, steps, loss=None):
    """Train, and give the seconds of processor time."""
    begin = time.thread_time()
    ft.fit(model, batches, steps, ft.AdamW(8e-3, weight_decay=0.01),
           ft.linear_schedule(warmup=0.1), loss=loss, progress=False)
    return time.thread_time() - begin

teacher = make_model(48)
seconds = train(teacher, batches_of("train", 32), 240)
print(f"{ft.count(teacher).total:,} parameters")

# %% [markdown]
# Here are its five best texts for a source of the test.

# %%
test = list(batches_of("test", 64, shuffle=False).once())

def search(model, batch, beams, lp=ft.GNMTPenalty(0.0), n_best=1):
    """The n_best texts for each source of a batch."""
    source = {"source_ids": batch["source_ids"], "source_mask": batch["source_mask"]}
    return ft.beam_search(model, None, 6, beams=beams, end=END, lp=lp, n_best=n_best,
                          **source)

some = {name: value[:8] for name, value in test[0].items()}
print("source:", text_of(some["source_ids"][0]))
print("target:", text_of(some["ids"][0]))
for text in search(teacher, some, 5, n_best=5)[0]:
    print(f"ln P {text.log_prob:6.2f}   {text_of(text.tokens)}")

# %% [markdown]
# How much does the beam find on all sources of the test, and how long are its texts?

# %%
def all_texts(model, beams, lp=ft.GNMTPenalty(0.0)):
    """The best text for each source of the test."""
    found = []
    for batch in test:
        found += [texts[0] for texts in search(model, batch, beams, lp)]
    return found

by_beams = {B: all_texts(teacher, B) for B in (1, 2, 5)}
for B, found in by_beams.items():
    print(f"B = {B}: mean ln P {np.mean([h.log_prob for h in found]):.2f}")

# %%
lengths = {}
for alpha in (-1.0, 0.0, 1.0):
    found = all_texts(teacher, 5, ft.PowerPenalty(alpha))
    lengths[alpha] = np.mean([len(h.tokens) for h in found])
    print(f"n^{alpha:4}: {lengths[alpha]:.2f} tokens")

# %% [check]
mean_log_p = {B: np.mean([h.log_prob for h in by_beams[B]]) for B in by_beams}
assert mean_log_p[1] < mean_log_p[2] <= mean_log_p[5] + 0.02
assert lengths[-1.0] < lengths[0.0] < lengths[1.0]
assert all(h.score == h.log_prob for h in by_beams[5])

# %% [markdown]
# Here the wider beams find more probable texts. And a larger $\alpha$ gives longer
# ones.
#
# ## How similar are two texts?
# We will need a number for "this text is nearly that one". **BLEU** (Papineni et al.
# 2002) compares **n-grams**, runs of $n$ tokens, of a hypothesis with those of a
# reference:
#
# BLEU $= BP \exp(mean_n \ln p_n)$
#
# - $p_n$ is the share of the hypothesis' n-grams that the reference has too, for
#   $n$ = 1 to 4. An n-gram counts at most as often as in the reference: otherwise
#   "the the the" would be perfect.
# - $BP = min(1, \exp(1 - r/h))$ is the **brevity penalty**, for the lengths $r$ of
#   the reference and $h$ of the hypothesis. A short text has few chances to be wrong.
#
# BLEU was made for whole collections of texts. A single short text often has no
# common run of three or four tokens, and then the mean of logarithms is $-\infty$. So
# BLEU of one sentence needs three more rules:
#
# - **Smoothing** (Chen and Cherry 2014): the $j$-th order without a common n-gram
#   gets $p_n = 1/(2^j h_n)$, where $h_n$ is the number of the hypothesis' n-grams.
# - **Effective order**: orders that are longer than the hypothesis do not count.
# - Without a common *token* it is 0.
#
# By hand, for two short texts:

# %%
hypothesis = "return the name".split()
reference = "return the file name".split()
p = [3 / 3, 1 / 2, 1 / (2 * 1)]      # 3 words, "return the", no run of three
brevity = np.exp(1 - 4 / 3)
print(f"by hand:     {brevity * np.exp(np.mean(np.log(p))):.4f}")
print(f"the library: {ft.sentence_bleu(hypothesis, reference):.4f}")

# %% [markdown]
# **Predict first.** What is the BLEU of "yes" with the reference "no"? And what would
# smoothing alone give?

# %%
print("BLEU:", ft.sentence_bleu(["yes"], ["no"]))
print("smoothing alone:", 1 / (2**1 * 1))

# %% [check]
by_hand = brevity * np.exp(np.mean(np.log(p)))
assert np.isclose(ft.sentence_bleu(hypothesis, reference), by_hand)
assert ft.sentence_bleu(["yes"], ["no"]) == 0
assert ft.sentence_bleu(reference, reference) == 1
clipped = ft.sentence_bleu(["the"] * 3, "return the name".split())
assert np.isclose(clipped, (1 / 3 * 1 / 4 * 1 / 4) ** (1 / 3))
exchanged = ft.sentence_bleu(reference, hypothesis)
assert exchanged != ft.sentence_bleu(hypothesis, reference)

# %% [markdown]
# One half, for two texts that share nothing: a well-known program once gave that.
# Hence the last rule.
#
# **Exercise:** `sentence_bleu`.
#
# ## Three ways to learn from a teacher
# The lecture shows the three ways of Kim and Rush side by side. In each, the student
# reads the source. What does it learn?

# %%
boxes = {
    "g1": (0, 0, "source,\ngold text", "data"), "t1": (1.25, 0, "teacher"),
    "d1": (2.55, 0, "next-token\nprobabilities"),
    "s1": (3.8, 0, "student", "trained"),
    "x2": (0, 1, "source", "data"), "t2": (1.25, 1, "teacher,\nbeam search"),
    "d2": (2.55, 1, "its best text"), "s2": (3.8, 1, "student", "trained"),
    "x3": (0, 2, "source", "data"), "t3": (1.25, 2, "teacher,\nbeam search"),
    "d3": (2.55, 2, "of its K texts\nthe nearest one"),
    "s3": (3.8, 2, "student", "trained"), "g3": (2.55, 2.9, "gold text", "data")}
rows = ["g1 t1 d1 s1", "x2 t2 d2 s2", "x3 t3 d3 s3", "g3 d3"]
arrows = []
for row in rows:
    arrows += itertools.pairwise(row.split())
diagram(boxes, arrows, height=3.5,
        caption="Above, word level: the teacher reads source and gold text, and the "
                "student learns its distribution at each position. Middle, sequence "
                "level: the student learns the teacher's best text. Below, "
                "interpolation: it learns that of the teacher's K best texts which is "
                "nearest to the gold text.")

# %% [markdown]
# The **gold text** is the target in the data.
#
# - **Word level**: the loss of lesson 17 at each token of the gold text, beside the
#   loss of its labels. The teacher's prefixes are the *gold* ones. It never says what
#   it would have written itself. `ft.WordLevel(teacher)` is a `loss` for `fit`.
# - **Sequence level**: the target of each source becomes $\hat y$, the teacher's best
#   text. The loss stays the cross-entropy. Why should one text stand for all of the
#   teacher's distribution over texts? There are far too many texts to learn them all,
#   and the best one is what the teacher would say.
# - **Interpolation**: $\hat y$ may be far from the gold text. So take $\tilde y$: of
#   the $K$ best texts of the beam the one with the largest BLEU with the gold text. A
#   text that the teacher finds easy, and that is nearly right.
#
# The teacher decodes all sources of the *training* once, and `TeacherBeams` keeps its
# $K$ best texts (on disk, if it gets a folder).

# %%
beams = ft.TeacherBeams(None, teacher, end=END, max_new_tokens=6, beams=8,
                        lp=ft.GNMTPenalty(0.0))
print(beams.fill(batches_of("train", 64)), "sources decoded")
sequence = ft.SequenceLevel(beams)
interpolation = ft.Interpolation(beams)
quote(ft.Interpolation.choose)

# %%
batch = next(iter(batches_of("train", 4, seed=5)))
by_sequence = sequence.map_batch(batch)
by_interpolation = interpolation.map_batch(batch)
for row in range(4):
    print("source:         ", text_of(batch["source_ids"][row]))
    print("  gold:         ", text_of(batch["ids"][row]))
    print("  sequence:     ", text_of(by_sequence["ids"][row]))
    print("  interpolation:", text_of(by_interpolation["ids"][row]))

# %% [markdown]
# Sequence level and interpolation replace `ids` and `mask` of a batch, and nothing
# else. Word level leaves the batch as it is, and changes the loss.
#
# **Predict first.** The training has about 800 gold texts, many of them equal. Does
# the teacher write more different texts, or fewer?

# %%
def targets(method=None):
    """The targets of the training, in the order of the data."""
    found = []
    for batch in batches_of("train", 64, shuffle=False).once():
        new = method.map_batch(batch) if method else batch
        found += [text_of(row) for row in new["ids"]]
    return found

def mean_bleu(texts, references):
    scores = []
    for text, reference in zip(texts, references):
        scores.append(ft.sentence_bleu(text.split(), reference.split()))
    return float(np.mean(scores))

gold = targets()
learned = {"gold": gold, "sequence": targets(sequence),
           "interpolation": targets(interpolation)}
for name, texts in learned.items():
    print(f"{name:14}{len(set(texts)):4} different texts, BLEU with gold "
          f"{mean_bleu(texts, gold):.2f}")

# %% [check]
kinds = {name: len(set(texts)) for name, texts in learned.items()}
assert kinds["sequence"] < kinds["interpolation"] < kinds["gold"]
similarity = {name: mean_bleu(texts, gold) for name, texts in learned.items()}
assert similarity["gold"] == 1
assert similarity["sequence"] < similarity["interpolation"] < 1
kept = set(batch) - {"ids", "mask"}
assert all((by_sequence[name] == batch[name]).all() for name in kept)
assert beams.fill(batches_of("train", 64)) == 0

# %% [markdown]
# The teacher's texts are *simpler* than the data: fewer different ones, the common
# beginnings. That is what a small student can learn. The price is visible, too: they
# are not what the data says.
#
# **Exercise:** `choose`.
#
# ## Does it help?
# Five students of a third of the teacher's width, with the same first weights, for
# 120 steps each. We measure on the test:
#
# - **loss**: the cross-entropy of the gold texts, as in lesson 03
# - **BLEU 1** and **BLEU 5**: BLEU with the gold text, of greedy decoding and of five
#   beams, without a length penalty
# - **exact**: the share of greedy texts that equal the gold text
# - **ln P**: of the model's own greedy text. Near 0, it is sure of what it writes.

# %%
gold_test = []
for part in test:
    gold_test += [text_of(row) for row in part["ids"]]

def measure(model):
    """(loss, BLEU 1, BLEU 5, exact, ln P)"""
    one = all_texts(model, 1)
    texts = [text_of(h.tokens) for h in one]
    wide = [text_of(h.tokens) for h in all_texts(model, 5)]
    same = [a == b for a, b in zip(texts, gold_test)]
    sure = np.mean([h.log_prob for h in one])
    loss = ft.evaluate(model, test)["loss"]
    bleu = [mean_bleu(texts, gold_test), mean_bleu(wide, gold_test)]
    return [loss, *bleu, np.mean(same), sure]

# %%
results = {"teacher": [*measure(teacher), seconds]}

def try_student(name, batches, loss=None):
    student = make_model(16, seed=3)
    taken = train(student, batches, 120, loss)
    results[name] = [*measure(student), taken]
    return student

word = ft.WordLevel(teacher)
data = batches_of("train", 32, seed=1)
alone = try_student("no teacher", data)
try_student("word level", batches_of("train", 32, seed=1), word)
try_student("sequence level", sequence.map(batches_of("train", 32, seed=1)))
try_student("interpolation", interpolation.map(batches_of("train", 32, seed=1)))
try_student("sequence and word", sequence.map(batches_of("train", 32, seed=1)), word)
print(f"a student has {ft.count(alone).total:,} parameters")

# %% [markdown]
# ## The whole lesson in one table

# %%
print(f"{'':18}{'loss':>7}{'BLEU 1':>8}{'BLEU 5':>8}{'exact':>8}{'ln P':>7}{'s':>6}")
for name, (loss, one, five, exact, log_p, taken) in results.items():
    print(f"{name:18}{loss:7.2f}{one:8.2f}{five:8.2f}{100 * exact:6.0f} %{log_p:7.2f}"
          f"{taken:6.1f}")

# %% [check]
rows = {}
for column, name in enumerate(("loss", "one", "five", "exact", "log_p")):
    rows[name] = {method: row[column] for method, row in results.items()}
loss, log_p = rows["loss"], rows["log_p"]
assert loss["word level"] < loss["no teacher"] < loss["sequence level"]
assert log_p["no teacher"] + 1 < log_p["interpolation"] < log_p["sequence level"]
assert rows["five"]["sequence level"] > 1.5 * rows["five"]["no teacher"]
assert rows["exact"]["sequence level"] > rows["exact"]["no teacher"]
assert rows["one"]["teacher"] > rows["one"]["sequence level"]

# %% [markdown]
# What do we see, at this size?
#
# - **The sequence level changes most.** Its student is far surer of its texts (ln P).
#   But its *loss* on the gold texts is *worse* than without a teacher. The paper saw
#   the same. It is no contradiction: the student has learned to write one good text,
#   not to give probability to all that people write. So do not choose such a student
#   by its loss.
# - **The word level** has the best loss, and hardly better texts. It teaches the next
#   token after gold prefixes. What to do after the student's own words, it does not
#   show.
# - **Interpolation** lies between the two in ln P, and its loss is about that without
#   a teacher. Its targets are nearer to the gold texts than the teacher's best, and
#   harder to learn in so few steps. In the paper it starts from the student of the
#   sequence level, with 35 beams.
# - **Both**: the targets and the loss are two choices. So word level on the teacher's
#   texts is possible, and a good pair.
#
# Does the sequence level help most, as the paper says? We trained the students with two
# other first weights as well. Each time its loss was the worst, its ln P the best, and
# 9 % of its texts or more were exact, against 2 to 5 % without a teacher. But its gain
# in BLEU 1 was 0.04, 0.00 and 0.05. With 99 texts, that is hardly more than noise. So
# here it helps, but not by much.
#
# One column remains. Why is the student without a teacher so much worse with five
# beams?

# %%
for beams_of_search in (1, 5):
    found = all_texts(alone, beams_of_search)
    mean_length = np.mean([len(h.tokens) for h in found])
    print(f"B = {beams_of_search}: {mean_length:.1f} tokens, with the end")

# %% [check]
assert mean_length < 3
assert mean_length < np.mean([len(h.tokens) for h in all_texts(alone, 1)]) - 0.5

# %% [markdown]
# It is unsure at every step. So each token costs much, and the most probable text is
# a very short one. The beam finds it, and greedy decoding happens to miss it. (With
# one of the two other first weights this did not happen.)
#
# A student that has learned one text for each source does not need the beam. That is
# the second gain of the sequence level: **greedy decoding is enough**, at a fifth of
# the cost. In the paper, five beams gain 2.9 BLEU for a student without a teacher, and
# 0.1 for that of the sequence level.
#
# ## Where it stops
# The teacher's mistakes become targets: the student learns them as truth. The
# gold texts of the training are not even looked at. And the teacher must decode every
# source of the training with a beam, which costs more than a pass. In return, the
# sequence level needs no gold texts at all: any source will do.
#
# Our task is small, and a model of this size learns the common beginnings and little
# more. Kim and Rush trained on millions of sentences of translation. There the
# student of the sequence level came within a point of BLEU of its teacher, and wrote
# ten times as fast.
#
# **Exercises.** `tinyft start sequences` writes six files:
#
# - `best_candidates`: each live prefix with each token
# - `extend`: who lives on, and who is finished
# - `finish`: the score of a text
# - `is_done`: may the search stop?
# - `sentence_bleu`: the similarity of two texts
# - `choose`: the text of the beam that the student learns
