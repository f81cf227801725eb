# %% [markdown]
# # 18 Sequence distillation
#
# **Reading:** 50 minutes. **You need:** lessons 02 to 04, and 17.
# **Exercises:** best_candidates, extend, finish, is_done, sentence_bleu, choose
# (about two hours).
#
# In lesson 17 the student learned the teacher's distribution of the *next token*. But
# the user of a translator, or of any encoder-decoder (lesson 02), wants a whole
# *text*. This lesson trains students on the **texts** that the teacher writes (Kim
# and Rush 2016).
#
# The first half of the lesson searches for the teacher's best text: **beam search**.
# The second half has three ways to learn from a teacher that writes.

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

END = 0                                                  # the token that ends a text

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
# Our first decoder is a table. It writes the docstring of a function `get_file`. For
# each text so far, a tuple, it has the next words and their probabilities.

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
    return TABLE.get(tokens, {END: 1.0})                 # all other texts end

# %% [markdown]
# **Greedy** decoding takes the most probable token at each step, as `ft.generate` did
# in lesson 04.
#
# **Predict first.** Which text does greedy decoding write? Is it the most probable
# one?

# %%
def greedy(step, length):
    """The most probable token at each step: a text, and its probability.

    step: a decoder, such as `table`.  length: the most tokens."""
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
# $n$ tokens. So we keep a few beginnings at each step: the **beam**.
#
# ## Beam search
# At each step we have up to $B$ **live prefixes**, beginnings of a text with their
# $\ln P$. Each of them is continued with *every* token. These are the **candidates**.
# We sort all of them together by $\ln P$.

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
# The search starts with **one** empty prefix. From $B$ copies of it we would get each
# candidate $B$ times.
#
# Then we select. A candidate that ends is **finished** if it is among the best $B$: a
# candidate with another token would be dropped below that rank, too. Of the candidates
# that do *not* end, the best $B$ live on, so that the search goes on with $B$ prefixes.

# %%
def beam_search(step, B, length):
    """All texts that the search finds, best first: pairs (tokens, ln P)."""
    live = [((), 0.0)]
    finished = []
    for _ in range(length):
        best = candidates(live, step)
        finished += [c for c in best[:B] if c[0][-1] == END]
        live = [c for c in best if c[0][-1] != END][:B]
    return sorted(finished + live, key=lambda text: -text[1])  # live: cut off here

for tokens, log_p in beam_search(table, 2, 4):
    print(f"P = {np.exp(log_p):.3f}", *tokens[:-1])     # without the end

# %% [markdown]
# With $B = 2$ the search finds "get the file". Here are all candidates of its first
# three steps.

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
        kind = "trained" if tokens in kept else ""      # "trained" is drawn in orange
        boxes |= {tokens: (depth * 1.1, row, f"{word}  {log_p:.2f}", kind)}
        arrows.append((tokens[:-1], tokens))
    live = [c for c in found if c[0] in kept]
diagram(boxes, arrows, height=3.4,
        caption="Beam search with B = 2. Each box is a candidate with its ln P. The "
                "two best of each column (orange) live on, whatever their parents. "
                "The grey ones are dropped. In the next step both texts end. Greedy "
                "decoding follows only the topmost branch.")

# %% [check]
assert beam_search(table, 2, 4)[0][0] == ("get", "the", "file", END)
assert beam_search(table, 1, 4)[0][0] == greedy(table, 4)[0]
every = beam_search(table, 100, 4)
assert every[0][0] == ("get", "the", "file", END)
assert np.isclose(sum(np.exp(log_p) for _, log_p in every), 1)
assert {c[0] for c in live} == {t for t in kept if len(t) == 3}

# %% [markdown]
# With $B = 1$ the best text is that of greedy decoding. With a $B$ so large that
# nothing is dropped, the search tries all texts. In between, each step runs the model
# on up to $B$ prefixes, where greedy decoding has one.
#
# The library's search works on a batch: the live prefixes of all sentences are the
# rows of one pass. `best_candidates` finds the candidates of each sentence, and
# `extend` selects. A `Candidate` has its `log_prob` and its `token`. `parent` is the
# number of its prefix among the live ones of its sentence, and `row` the number of that
# prefix among those of all sentences, the rows of the pass:

# %%
quote(Search.extend)

# %% [markdown]
# The result says which rows of the pass go on: their cached keys and values are kept.
# `attention` serves a further penalty of GNMT, which we do not use.
#
# **Exercises:** `best_candidates`, `extend`.
#
# ## A larger beam can be worse
# A larger beam looks at more candidates. Is its best text never worse than that of a
# smaller beam?
#
# A model begins with X (0.6) or Y (0.4). Three tokens follow. After X, the first is one
# of ten (0.1 each), and the two others are certain. After Y, the first is one of two
# (0.5 each), and each of the two others is one of ten (0.1 each). There is no end: the
# search stops after four tokens.
#
# **Predict first.** Each text with X has $P$ = 0.06, each with Y 0.002. Which of $B$ =
# 1, 2, 3 find a text with X?

# %%
def trap(tokens):
    ten = dict.fromkeys("abcdefghij", 0.1)
    if not tokens:
        return {"X": 0.6, "Y": 0.4}
    if len(tokens) == 1:
        return ten if tokens[0] == "X" else {"a": 0.5, "b": 0.5}
    return {"a": 1.0} if tokens[0] == "X" else ten

for B in (1, 2, 3):
    tokens, log_p = beam_search(trap, B, 4)[0]
    print(f"B = {B}: P = {np.exp(log_p):.3f}", *tokens)

# %% [check]
found = [round(np.exp(beam_search(trap, B, 4)[0][1]), 6) for B in (1, 2, 3)]
assert found == [0.06, 0.002, 0.06]

# %% [markdown]
# After two tokens, the two prefixes with Y have $P$ = 0.2 each, and those with X have
# 0.06. So with $B = 2$ all prefixes with X are dropped. The small factors of Y come
# later. "More beams, better texts" is a tendency, not a law. Only a beam that drops
# nothing is safe.
#
# ## Why short texts win
# Each token adds a logarithm that is at most 0. So $\ln P$ falls with the length, and
# a search for the largest $\ln P$ prefers short texts. The usual remedy is a **length
# penalty** $lp(n)$, a function of the number $n$ of tokens (the end is one of them):
#
# score $= \ln P / lp(n)$
#
# Two forms are in use:
#
# - $lp(n) = ((5 + n)/6)^\alpha$, from Google's translator GNMT (Wu et al. 2016). The
#   transformer of 2017 used it with $\alpha = 0.6$. It is `ft.GNMTPenalty(0.6)`.
# - $lp(n) = n^\alpha$, the form of `transformers`, whose option `length_penalty` is
#   $\alpha$. With $\alpha = 1$ the score is the mean over the tokens. It is
#   `ft.PowerPenalty(1.0)`.
#
# $\ln P$ is negative. So a large $lp$ makes the score *better*: a positive $\alpha$
# favours long texts, in spite of the name. With $\alpha = 0$, $lp$ is 1 and there is
# no penalty. Take a text in which each token has the probability 0.7:

# %%
n = np.arange(1, 9)
log_p = n * np.log(0.7)
gnmt = np.array([ft.GNMTPenalty(0.6)(int(k)) for k in n])
power = np.array([ft.PowerPenalty(1.0)(int(k)) for k in n])
scores = {"ln P": log_p, "ln P / ((5 + n)/6)^0.6": log_p / gnmt,
          "ln P / n": log_p / power}
curves(scores, x=n, xlabel="tokens n, with the end", ylabel="score",
       caption="The score of a text of n tokens, each with the probability 0.7. "
               "Without a penalty (blue) every further token costs the same. Divided "
               "by n (green), it costs nothing. GNMT's penalty (orange) lies between.")

# %% [markdown]
# The length is that of *each text*: one penalty for all texts would leave them in the
# order of $\ln P$. And it counts the end: a text of only the end has $n = 1$. With
# $n = 0$ we would divide by $0^\alpha = 0$.
#
# Here are two texts with a probability for each word and for the end:

# %%
texts = {"return": np.log([0.5, 0.4]), "return the file": np.log([0.5, 0.6, 0.7, 0.8])}
penalties = {"ln P": ft.GNMTPenalty(0.0), "GNMT": ft.GNMTPenalty(0.6),
             "mean": ft.PowerPenalty(1.0)}
for text, logs in texts.items():
    print(f"{text:16}", end="")
    for name, lp in penalties.items():
        print(f"{name:>6} {logs.sum() / lp(len(logs)):.2f}", end="")
    print()

# %% [check]
short, long = texts.values()
assert short.sum() > long.sum()
assert long.sum() / penalties["GNMT"](4) > short.sum() / penalties["GNMT"](2)
assert long.sum() / 4 > short.sum() / 2
assert ft.GNMTPenalty(0.6)(1) == 1 == ft.PowerPenalty(1.0)(1)
assert np.allclose(log_p / power, np.log(0.7))

# %% [markdown]
# By $\ln P$ the short text is better. With both penalties the long one is.
#
# **Exercise:** `finish`.
#
# ## When to stop
# A text has finished with a good score. May the search stop? A common rule stops as
# soon as $B$ texts have finished (`early_stopping=True` in `transformers`). But a live
# prefix may still become a better text, above all if the penalty favours long ones.
#
# The safe rule uses that $\ln P$ can only fall. And the larger the penalty, the nearer
# a negative score is to 0. So the best score that a live prefix can reach is its
# present $\ln P$, divided by the largest penalty of all lengths that are still to
# come. If a finished score is at least that good, no live prefix can beat it.
#
# We compare the rules on random models. Each has four tokens: 0, the end, and 1 to 3.
# After each text, their probabilities are the softmax of four random numbers.

# %%
def random_model(seed):
    known = {}                                           # saves time only

    def step(tokens):
        if tokens not in known:
            rng = np.random.default_rng([seed, *tokens])
            z = 2 * rng.standard_normal(4)               # 2: less even probabilities
            p = np.exp(z) / np.exp(z).sum()
            known[tokens] = {token: p[token] for token in range(4)}
        return known[tokens]

    return step

# %%
LENGTH = 8
lp = ft.PowerPenalty(1.0)

def best_score(step, B, may_stop):
    """(the best score, the number of steps) of a search with a rule for stopping."""
    live = [((), 0.0)]
    scores = []                                          # of the finished texts
    for n in range(1, LENGTH + 1):
        best = candidates(live, step)
        scores += [log_p / lp(n) for tokens, log_p in best[:B] if tokens[-1] == END]
        live = [c for c in best if c[0][-1] != END][:B]
        if n < LENGTH and scores and may_stop(scores, live, B):
            return max(scores), n
    scores += [log_p / lp(LENGTH) for _, log_p in live]  # texts that were cut off
    return max(scores), LENGTH

# %%
def never(scores, live, B):
    return False

def when_full(scores, live, B):
    return len(scores) >= B

def when_safe(scores, live, B):                          # lp(LENGTH) is the largest
    return max(scores) >= live[0][1] / lp(LENGTH)

# %% [markdown]
# **Predict first.** In how many of 300 random models does the rule "stop at $B$
# finished texts" lose the best text that the search would find? None, 1 in 100, or
# more than 1 in 10?

# %%
def compare(rule):
    """The best scores and the numbers of steps for 300 models, with B = 3."""
    results = [best_score(random_model(seed), 3, rule) for seed in range(300)]
    return np.array(results).T

full, _ = compare(never)
lost = {}
for rule in (when_full, when_safe):
    scores, steps = compare(rule)
    lost[rule.__name__] = int((scores < full - 1e-12).sum())
    print(f"{rule.__name__:10} {steps.mean():.1f} of 8 steps, "
          f"lost in {lost[rule.__name__]} of 300 models")

# %% [check]
assert lost["when_full"] > 30
assert lost["when_safe"] == 0

# %% [markdown]
# In these random models, the quick rule saves the most steps, and loses often. The safe
# rule costs little more, and it never loses. The library's `is_done` is the safe rule,
# for a caller who wants the `n_best` best texts:

# %%
quote(Search.is_done)

# %% [markdown]
# `reach` is the largest penalty of all lengths to come: with $\alpha > 0$ that of the
# last length, and with $\alpha < 0$, where $lp(n)$ falls, that of the next one.
#
# **Exercise:** `is_done`.
#
# ## A teacher
# Now a real model. `ft.data.name_pairs()` has functions of Python's standard library:
# of each its `name`, its `summary` (the first sentence of the docstring) and its
# `split`. The name is our source, and the first four words of the summary are the
# target. To make the task easy, we take only names that begin with one of 24 frequent
# words, such as "get".

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
# Our tokens are whole words: the 300 most frequent ones. In a name, any other word
# becomes `[UNK]`, unknown. The tokenizer splits at spaces and looks each word up.

# %%
counts = Counter()
for p in chosen:
    if p.split == "train":
        counts.update(p.name.split("_")[:4] + words(p.summary)[:4])
vocabulary = ["[END]", "[UNK]"] + [word for word, _ in counts.most_common(300)]
ids = {word: i for i, word in enumerate(vocabulary)}
tokenizer = Tokenizer(models.WordLevel(ids, "[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

# %% [markdown]
# A target is cut before its first unknown word, and must have at least two words. The
# test gets the splits "valid" and "test". No module of Python is in two splits.

# %%
def known_words(summary):
    """The first four words of a summary, up to the first unknown one."""
    return list(itertools.takewhile(lambda word: word in ids, words(summary)[:4]))

pairs = {"train": [], "test": []}
for p in chosen:
    name = " ".join(p.name.split("_")[:4])
    target = known_words(p.summary)
    if len(target) >= 2:
        part = "train" if p.split == "train" else "test"
        pairs[part].append((name, " ".join(target)))
print(len(pairs["train"]), "pairs for training,", len(pairs["test"]), "for the test")

# %% [markdown]
# `ft.data.source_batches` makes batches of the pairs. Both texts get an end, and the
# decoder's text begins with a **start** token. Here 0 is start, end and padding. The
# mask tells the end from padding.

# %%
def batches_of(name, batch_size, seed=0, shuffle=True):
    return ft.data.source_batches(
        pairs[name], tokenizer, batch_size, max_source=6, max_target=6, seed=seed,
        start=END, end=END, shuffle=shuffle)

def text_of(tokens):
    return " ".join(vocabulary[token] for token in tokens if token != END)

batch = next(iter(batches_of("train", 2)))
print("source_ids\n", batch["source_ids"], "\nids\n", batch["ids"])
print(text_of(batch["source_ids"][0]), "->", text_of(batch["ids"][0]))

# %% [markdown]
# The teacher is a **T5** (Raffel et al. 2019), an encoder-decoder. Ours has one layer
# in the encoder and one in the decoder, and trains for 240 steps.

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
# Here are its five best texts for the first source of the test, without a length
# penalty (`GNMTPenalty(0.0)`). `ft.beam_search` takes the prompt, here None, and the
# largest number of new tokens, here 6. It gives a list for each row of the batch. Each
# text in it has `tokens`, `log_prob`, `score` and `ended`.

# %%
test = list(batches_of("test", 64, shuffle=False).once())

def search(model, batch, beams, lp=ft.GNMTPenalty(0.0), n_best=1):
    """The n_best texts for each source of a batch."""
    source = {"source_ids": batch["source_ids"], "source_mask": batch["source_mask"]}
    return ft.beam_search(model, None, 6, beams=beams, end=END, lp=lp, n_best=n_best,
                          **source)

first = {name: value[:1] for name, value in test[0].items()}
print("source:", text_of(first["source_ids"][0]))
print("target:", text_of(first["ids"][0]))
for text in search(teacher, first, 5, n_best=5)[0]:
    print(f"ln P {text.log_prob:6.2f}   {text_of(text.tokens)}")

# %% [markdown]
# The target is the second best text. Now all sources of the test: are the texts of a
# wider beam more probable? And how long are they, with the penalty $n^\alpha$?

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
    print(f"alpha = {alpha:4}: {lengths[alpha]:.2f} tokens")

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
# 2002) compares a text, the **hypothesis**, with a right one, the **reference**. It
# counts **n-grams**, runs of $n$ tokens:
#
# BLEU $= BP \exp(mean_n \ln p_n)$
#
# - $p_n$ is the share of the hypothesis' n-grams that the reference has, too, for the
#   **orders** $n$ = 1 to 4. An n-gram counts at most as often as in the reference: of
#   "the the the", one "the" counts if the reference has one.
# - $BP = min(1, \exp(1 - r/h))$ is the **brevity penalty**, for the lengths $r$ of
#   the reference and $h$ of the hypothesis. Without it, "the" alone would be perfect.
#
# BLEU was made for whole collections of texts. A single short text often has no
# common run of three or four tokens, and then the mean of logarithms is $-\infty$. So
# BLEU of one sentence needs three more rules:
#
# - **Smoothing** (Chen and Cherry 2014): the first order without a common n-gram gets
#   $p_n = 1/(2 h_n)$, the second $1/(4 h_n)$, the $j$-th $1/(2^j h_n)$. $h_n$ is the
#   number of the hypothesis' n-grams.
# - **Effective order**: orders longer than the hypothesis do not count.
# - Without a common *token*, BLEU is 0.
#
# By hand, for two short texts:

# %%
hypothesis = "return the name".split()
reference = "return the file name".split()
p = [3 / 3]                          # all three words are in the reference
p.append(1 / 2)                      # of two pairs, "return the"
p.append(1 / (2 * 1))                # of one run of three, none: j = 1
brevity = np.exp(1 - 4 / 3)          # there is no run of four
print(f"by hand:     {brevity * np.exp(np.mean(np.log(p))):.4f}")
print(f"the library: {ft.sentence_bleu(hypothesis, reference):.4f}")

# %% [markdown]
# **Predict first.** What is the BLEU of "yes" with the reference "no"? And what would
# it be without the last rule, by smoothing alone?

# %%
print("BLEU:", ft.sentence_bleu(["yes"], ["no"]))
print("smoothing alone:", 1 / (2**1 * 1))                # j = 1, h_1 = 1

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
# Smoothing alone would give one half to two texts that share nothing. Hence the last
# rule.
#
# **Exercise:** `sentence_bleu`.
#
# ## Three ways to learn from a teacher
# Kim and Rush compare three ways. In each, the student reads the source. What does it
# learn to write? We call the target in the data the **gold text**.

# %%
boxes = {
    "g1": (0, 0, "source,\ngold text", "data"), "t1": (1.25, 0, "teacher"),
    "d1": (2.55, 0, "next-token\nprobabilities"),
    "s1": (3.8, 0, "student", "trained"),
    "x2": (0, 1, "source", "data"), "t2": (1.25, 1, "teacher,\nbeam search"),
    "d2": (2.55, 1, "its best text"), "s2": (3.8, 1, "student", "trained"),
    "x3": (0, 2, "source", "data"), "t3": (1.25, 2, "teacher,\nbeam search"),
    "d3": (2.55, 2, "the nearest of\nits K texts"),
    "s3": (3.8, 2, "student", "trained"), "g3": (2.55, 2.9, "gold text", "data")}
rows = ["g1 t1 d1 s1", "x2 t2 d2 s2", "x3 t3 d3 s3", "g3 d3"]
arrows = []
for row in rows:
    arrows += itertools.pairwise(row.split())
diagram(boxes, arrows, height=3.5,
        caption="Top row, word level: the teacher reads source and gold text, and "
                "the student learns its distribution at each position. Middle row, "
                "sequence level: the student learns the teacher's best text. Bottom "
                "row, interpolation: of the teacher's K best texts it learns the one "
                "that is nearest to the gold text.")

# %% [markdown]
# - **Word level**: at each token of the gold text, the loss is the mean of the
#   cross-entropy and the KL divergence of lesson 17, without temperature. The teacher
#   reads *gold* prefixes. It never shows what it would write itself.
#   `ft.WordLevel(teacher)` is a `loss` for `fit`.
# - **Sequence level**: the target of each source becomes $\hat y$, the teacher's best
#   text. The loss stays the cross-entropy. Why only one text? There are far too many to
#   learn them all, and the best one is what the teacher would write.
# - **Interpolation**: $\hat y$ may be far from the gold text. So the target is
#   $\tilde y$: of the $K$ best texts of the beam, that with the largest BLEU with the
#   gold text. It is probable for the teacher and near to the gold text.
#
# The teacher decodes each source of the *training* once. `TeacherBeams` keeps its $K$
# best texts (in a folder; here, with None, in memory). We take $K = 8$, the paper 5 for
# the sequence level and 35 for interpolation.

# %%
beams = ft.TeacherBeams(None, teacher, end=END, max_new_tokens=6, beams=8,
                        lp=ft.GNMTPenalty(0.0))
print(beams.fill(batches_of("train", 64)), "sources decoded")
sequence = ft.SequenceLevel(beams)
interpolation = ft.Interpolation(beams)
quote(ft.Interpolation.choose)

# %% [markdown]
# The 798 pairs have only 394 different sources. `complete` gives the texts that have
# ended, or all if none has, and `self.words` removes start and end. Here are the
# targets of one batch:

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
# **Predict first.** For each of the 394 sources the teacher writes one text. Take one
# *gold* text for each source, too. Which are more different texts?

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

# %% [markdown]
# And one gold text for each source:

# %%
gold_of_source = {}
for part in batches_of("train", 64, shuffle=False).once():
    for source, text in zip(part["source_ids"], part["ids"]):
        gold_of_source[text_of(source)] = text_of(text)
print(len(gold_of_source), "sources,", len(set(gold_of_source.values())),
      "different gold texts")

# %% [check]
kinds = {name: len(set(texts)) for name, texts in learned.items()}
assert kinds["sequence"] < kinds["interpolation"] < kinds["gold"]
assert kinds["sequence"] < 0.9 * len(set(gold_of_source.values()))
similarity = {name: mean_bleu(texts, gold) for name, texts in learned.items()}
assert similarity["gold"] == 1
assert similarity["sequence"] < similarity["interpolation"] < 1
kept = set(batch) - {"ids", "mask"}
assert all((by_sequence[name] == batch[name]).all() for name in kept)
assert beams.fill(batches_of("train", 64)) == 0

# %% [markdown]
# The teacher's texts are *simpler* than the data. It writes the same text for many
# sources, where people wrote different ones. A small student can learn them. The price
# is visible in BLEU: they are not what the data says.
#
# **Exercise:** `choose`.
#
# ## Does it help?
# We train five students of a third of the teacher's width, from the same first weights,
# for 120 steps. We measure on the test:
#
# - **loss**: the cross-entropy of the gold texts, as in lesson 03
# - **BLEU 1** and **BLEU 5**: the mean BLEU with the gold text, for greedy decoding and
#   for five beams, without a length penalty
# - **exact**: the share of greedy texts that equal the gold text
# - **ln P**: of the greedy texts, by the model that wrote them. Near 0, it is sure.
# - **s**: processor seconds of the training, without those of `beams.fill`

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
for name, row in results.items():
    loss, one, five, exact, log_p, taken = row
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
# - **Sequence level**: the student is far surer of its texts (ln P). But its *loss* on
#   the gold texts is *worse* than without a teacher, as in the paper. It is no
#   contradiction: the student has learned to write one good text, not to give
#   probability to all that people write. So do not choose such a student by its loss.
# - **Word level**: the best loss, but greedy texts that are hardly better. After a gold
#   prefix the teacher's distribution spreads over many words: it does not show one text
#   to write.
# - **Interpolation**: ln P is near that of the sequence level, the loss near that
#   without a teacher. The targets are nearer to the gold texts than the teacher's best,
#   but more of them are different. In the paper, the student learns $\hat y$ before it
#   learns $\tilde y$.
# - **Sequence and word**: targets and loss are two choices. Here the targets are the
#   teacher's texts, and the loss is that of the word level. BLEU 1 is the best of the
#   five.
#
# Does the sequence level help most, as the paper says? We repeated the sequence level
# and no teacher with the seeds 4 and 5 of the students' first weights. Each time the
# loss of the sequence level was the worst, and its ln P was nearer to 0 than without a
# teacher. With the seeds 3, 4 and 5, 10, 8 and 5 % of its texts were exact; without a
# teacher, 2, 5 and 2 %. Its BLEU 1 rose by about 0.02 twice, and fell by 0.02 with seed
# 4: 99 texts cannot show so small a difference. So the sequence level makes the student
# surer, and more of its texts exact. Whether it helps *most*, these runs cannot say.
#
# In BLEU 5 the difference is large. Why is the student without a teacher so much worse
# with five beams?

# %%
for beams_of_search in (1, 5):
    found = all_texts(alone, beams_of_search)
    mean_length = np.mean([len(h.tokens) for h in found])
    print(f"B = {beams_of_search}: {mean_length:.1f} tokens, with the end")

# %% [check]
assert mean_length < 3
assert mean_length < np.mean([len(h.tokens) for h in all_texts(alone, 1)]) - 0.5

# %% [markdown]
# This student is unsure at every step. So each token costs much $\ln P$, and the most
# probable text is a very short one. The beam finds it, and greedy decoding misses it.
# (The same happened with seed 4, but not with seed 5.)
#
# A student that has learned one text for each source does not need the beam. That is
# another gain of the sequence level: **greedy decoding is enough**, with one prefix
# in place of five. In the paper, where BLEU is from 0 to 100, five beams gain 2.9 for a
# student without a teacher, and 0.1 for that of the sequence level.
#
# ## Where it stops
# The teacher's mistakes become targets: the student learns them as truth. At the
# sequence level, the gold texts of the training are not used at all. And the teacher
# must decode every source of the training with a beam, which costs more than a pass.
# In return, sources without a gold text can be used, too.
#
# Our task is small, and models of this size learn little more than common beginnings.
# Kim and Rush trained on millions of translated sentences. There the student of the
# sequence level came within one point of BLEU of its teacher, and wrote ten times as
# fast.
#
# **Exercises.** `tinyft start sequences` writes six files:
#
# - `best_candidates`: each live prefix with each token
# - `extend`: which candidates live on, and which are finished
# - `finish`: the score of a text
# - `is_done`: may the search stop?
# - `sentence_bleu`: the similarity of two texts
# - `choose`: the text of the beam that the student learns
