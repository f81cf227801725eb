"""Lesson 04: the labels of a language model (next token, masked tokens), and how its losses
are added up.
"""
from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from tinyft.data.batches import SPECIAL
from tinyft.data.batches import mlm as corrupt
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import array, booleans, integers, positive, sizes

PAD, CLS, MASK = SPECIAL["[PAD]"], SPECIAL["[CLS]"], SPECIAL["[MASK]"]
# the ids that are no special token
FIRST, VOCAB = max(SPECIAL.values()) + 1, max(SPECIAL.values()) + 5

# ── next_tokens ───────────────────────────────────────────────────────────────────────────────────
next_tokens = Exercise(
    "train.batch:next_tokens", difficulty=2, minutes=10, on_host=True, hints=(
        "The model reads all tokens but the last, and at each must say the one after it.  So the "
        "labels are the ids, moved by one position.",
        "A position has no label (-100) where the next token is padding, and where the token that "
        "is read there is padding: padding may stand on the left as well.",
        "np.where(both real, ids[:, 1:], -100) with mask[:, 1:] and mask[:, :-1].  Without a mask "
        "every token is real."))


@next_tokens.law("without padding: the label of a position is the next id",
                 ids=integers("b t", 0, 9))
def _(f, ids):
    ids = np.concatenate([ids, ids[:, :1] + 10], axis=1)
    both = (ids[:, :-1] != 0) & (ids[:, 1:] != 0)
    guesses = {"it is the id of the position itself: nothing is left to predict": ids[:, :-1],
               "the id 0 is taken for padding; only a mask says what is padding":
                   np.where(both, ids[:, 1:], -100)}
    close(f(ids), ids[:, 1:], f"the labels of {ids.tolist()}", guesses)


@next_tokens.law("padding on the right gets no label", ids=integers("b t", 0, 9),
                 real=st.integers(1, 4))
def _(f, ids, real):
    mask = np.broadcast_to(np.arange(ids.shape[1]) < real, ids.shape)
    want = np.where(mask[:, 1:], ids[:, 1:], -100)
    close(f(ids, mask), want, f"the labels with the mask {mask[0].tolist()}",
          {"padding is predicted too: the mask has no effect": ids[:, 1:]})


@next_tokens.law("any mask: the position and the next one must both be real",
                 ids=integers("b t", 1, 9), mask=booleans("b t"))
def _(f, ids, mask):
    ids = np.concatenate([ids, ids[:, :1]], axis=1)
    mask = np.concatenate([mask, ~mask[:, -1:]], axis=1)
    want = np.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], -100)
    guesses = {"only the token to be said is looked at; padding that is read asks nothing either":
                   np.where(mask[:, 1:], ids[:, 1:], -100),
               "only the token that is read is looked at": np.where(mask[:, :-1], ids[:, 1:], -100)}
    close(f(ids, mask), want, f"the labels with the mask {mask.astype(int).tolist()}", guesses)


@next_tokens.law("a mask of ones and zeros, as tokenizers give it, is a mask",
                 ids=integers("b t", 1, 9), mask=booleans("b t"))
def _(f, ids, mask):
    want = np.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], -100)
    guesses = {"it differs from the labels for True and False: ~1 is -2, not 0": ids[:, 1:]}
    close(f(ids, mask.astype(np.int64)), want,
          f"the labels with the mask {mask.astype(int).tolist()}", guesses)


@next_tokens.wrong_answer("The labels are the ids; the model shifts them itself.",
                          says="the position itself")
def _(ids, mask=None):
    return ids[:, :-1] if mask is None else np.where(mask[:, :-1], ids[:, :-1], -100)


@next_tokens.wrong_answer("A mask is for attention; the loss sees every position.",
                          says="padding is predicted")
def _(ids, mask=None):
    return ids[:, 1:].copy()


@next_tokens.wrong_answer(
    "Padding stands on the right, so a real token is always read where a real one follows.",
    says="padding that is read")
def _(ids, mask=None):
    return ids[:, 1:].copy() if mask is None else np.where(mask[:, 1:], ids[:, 1:], -100)


@next_tokens.wrong_answer("A position has a label if its token is real.",
                          says="padding is predicted")
def _(ids, mask=None):
    return ids[:, 1:].copy() if mask is None else np.where(mask[:, :-1], ids[:, 1:], -100)


@next_tokens.wrong_answer("A label is a number.", says="dtype is float64")
def _(ids, mask=None):
    if mask is None:
        return ids[:, 1:].astype(float)
    mask = np.asarray(mask, bool)
    return np.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], -100.0)


@next_tokens.wrong_answer("~ turns a mask round.", says="~1 is -2", subtle=True)
def _(ids, mask=None):
    labels = ids[:, 1:].copy()
    if mask is not None:
        labels[(~mask[:, 1:] | ~mask[:, :-1]).astype(bool) & (mask.dtype == bool)] = -100
    return labels


@next_tokens.wrong_answer("The mask of the first text is that of all.", says="entries")
def _(ids, mask=None):
    if mask is None:
        return ids[:, 1:].copy()
    first = np.asarray(mask, bool)[:1]
    return np.where(first[:, 1:] & first[:, :-1], ids[:, 1:], -100)


@next_tokens.wrong_answer("The token 0 is padding.", says="only a mask")
def _(ids, mask=None):
    mask = ids != 0 if mask is None else np.asarray(mask, bool)
    return np.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], -100)


@next_tokens.wrong_answer("A text ends with a token, so the last label is its end.", says="shape")
def _(ids, mask=None):
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    labels = np.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], -100)
    return np.concatenate([labels, np.full((len(ids), 1), -100)], axis=1)


# ── mlm ───────────────────────────────────────────────────────────────────────────────────────────
mlm = Exercise(
    "data.batches:mlm", difficulty=4, minutes=25, on_host=True, hints=(
        "Choose positions first: real ones (mask) without a special token, each with probability "
        "p.  Only they get a label: what stood there.",
        "np.flatnonzero finds the free positions, rng.random(len(free)) < p chooses among them; if "
        "none was chosen, take rng.choice(free, 1).  a.flat[indices] reads and writes at flat "
        "indices.",
        "Draw one number u per chosen position: u < 0.8 becomes special[\"[MASK]\"], "
        "0.8 <= u < 0.9 "
        "a random id that is not special (np.setdiff1d(np.arange(vocab), special ids)), the rest "
        "stays."))


@st.composite
def texts(draw):
    """(ids, mask): rows of words and special tokens, the first token of all a word; the mask has
    padding on the right.
    """
    b, t = draw(sizes()), draw(sizes())
    ids = draw(array((b, t), (FIRST, FIRST + 1, FIRST + 2, CLS), np.int64))
    ids[0, 0] = FIRST
    mask = np.arange(t) < draw(array((b, 1), range(1, t + 1), np.int64))
    return ids, mask


seeds = st.integers(0, 7)


@mlm.law("the label of a position is its original id, or -100: no label", drawn=texts(), seed=seeds)
def _(f, drawn, seed):
    ids, mask = drawn
    new, labels = f(ids, mask, np.random.default_rng(seed), VOCAB, SPECIAL, 0.5)
    labelled = np.asarray(labels) != -100
    guesses = {"they are the ids after the corruption: the label is the id before it":
                   np.where(labelled, new, -100)}
    close(labels, np.where(labelled, ids, -100), "the labels", guesses)


@mlm.law("positions without a label keep their token; padding and special tokens get no label",
         drawn=texts(), seed=seeds)
def _(f, drawn, seed):
    ids, mask = drawn
    new, labels = f(ids, mask, np.random.default_rng(seed), VOCAB, SPECIAL, 1.0)
    free = mask & (ids >= FIRST)
    guesses = {"every position has a label: the loss is on tokens that can be read off":
                   np.ones(ids.shape, bool),
               "padding gets labels": ids >= FIRST,
               "special tokens get labels": mask}
    close(np.asarray(labels) != -100, free, "where a label is, for p = 1", guesses)
    close(np.where(free, 0, new), np.where(free, 0, ids), "the new ids where there is no label")


@mlm.law("at least one position has a label, however small p is", drawn=texts(), seed=seeds)
def _(f, drawn, seed):
    ids, mask = drawn
    new, labels = f(ids, mask, np.random.default_rng(seed), VOCAB, SPECIAL, 1e-9)
    close(np.asarray((np.asarray(labels) != -100).sum()), np.asarray(1),
          "the number of labels",
          {"no position has a label: nothing to learn": 0})


@mlm.law("of 20,000 words a share of p has a label; 80 % of these are [MASK], a tenth another "
         "word, a tenth as before", seed=seeds)
def _(f, seed):
    ids = np.full((100, 200), FIRST)
    got = shares(ids, *f(ids, np.ones(ids.shape, bool), np.random.default_rng(seed), FIRST + 1000,
                         SPECIAL, 0.5), MASK)
    guesses = {}
    if got[1] == 1:
        guesses["all with a label become [MASK]; then the model never meets a word that may be "
                "wrong"] = got
    if abs(got[0] - 0.15) < 0.02:
        guesses["a share of 15 % has labels whatever p is"] = got
    close(got, np.array([0.5, 0.8, 0.1, 0.1]),
          "the shares with a label, [MASK], another word, as before (for p = 0.5)", guesses,
          rtol=0, atol=0.02)


def shares(ids, new, labels, mask_id):
    """The share of positions with a label; of these, those that are [MASK], another word, as
    before.
    """
    new, labelled = np.asarray(new), np.asarray(labels) != -100
    is_mask = new == mask_id
    of_labelled = [is_mask, (new != ids) & ~is_mask, new == ids]
    return np.array([labelled.mean(), *(kind[labelled].mean() for kind in of_labelled)])


@mlm.law("by default 15 % have a label, and the special tokens are those of the library",
         seed=seeds)
def _(f, seed):
    ids = np.full((100, 200), FIRST)
    ids[:, 0] = CLS
    new, labels = f(ids, np.ones(ids.shape, bool), np.random.default_rng(seed), FIRST + 1000)
    close(np.asarray(labels)[:, 0], np.full(100, -100), "the labels of [CLS]")
    close(shares(ids[:, 1:], new[:, 1:], labels[:, 1:], MASK), np.array([0.15, 0.8, 0.1, 0.1]),
          "the shares with a label, [MASK], another word, as before", rtol=0, atol=0.03)


@mlm.law("rng decides: a generator in the same state, the same result",
         drawn=texts(), seed=seeds)
def _(f, drawn, seed):
    ids, mask = drawn
    ids, mask = np.tile(ids, (8, 8)), np.tile(mask, (8, 8))
    new, labels = f(ids, mask, np.random.default_rng(seed), VOCAB)
    again, labels_again = f(ids, mask, np.random.default_rng(seed), VOCAB)
    close(again, new, "the new ids, for a generator in the same state")
    close(labels_again, labels, "the labels, for a generator in the same state")


@mlm.law("a ValueError, if no position can be chosen", b="size", t="size")
def _(f, b, t):
    ids = np.full((b, t), CLS)
    try:
        f(ids, np.ones(ids.shape, bool), np.random.default_rng(0), VOCAB)
    except ValueError:
        return
    raise Unusable("all tokens are special, and no ValueError was raised")


@mlm.law("the other words come from the whole vocabulary, without the special tokens", seed=seeds)
def _(f, seed):
    ids = np.full((50, 100), FIRST)
    new, labels = f(ids, np.ones(ids.shape, bool), np.random.default_rng(seed), VOCAB, SPECIAL, 1.0)
    met = np.array([i in np.asarray(new) for i in range(VOCAB)])
    guesses = {"special tokens are drawn as words": np.ones(VOCAB, bool),
               "the last id of the vocabulary is never drawn":
                   (np.arange(VOCAB) >= FIRST) & (np.arange(VOCAB) < VOCAB - 1)}
    close(met, (np.arange(VOCAB) >= FIRST) | (np.arange(VOCAB) == MASK),
          f"which of the ids 0 to {VOCAB - 1} stand in the new text", guesses)


OTHERS = {"[PAD]": 7, "[CLS]": 3, "[SEP]": 9, "[MASK]": 1}


@mlm.law("the special tokens of another vocabulary, as `special` names them", seed=seeds)
def _(f, seed):
    ids = np.tile([3, 0, 2, 4, 5, 6, 8, 9], (300, 1))
    new, labels = f(ids, np.ones(ids.shape, bool), np.random.default_rng(seed), 10, OTHERS, 1.0)
    close(np.asarray(labels)[0], np.array([-100, 0, 2, 4, 5, 6, 8, -100]),
          f"the labels of {ids[0].tolist()} for the special ids 1, 3, 7, 9")
    met = np.array([i in np.asarray(new)[:, 1:-1] for i in range(10)])
    close(met, np.isin(np.arange(10), [0, 1, 2, 4, 5, 6, 8]),
          "which of the ids 0 to 9 stand in the new text, for the special ids 1, 3, 7, 9")


@mlm.wrong_answer("The model should give back the whole text, so every position has a label.",
                  says="every position has a label")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    return corrupt(ids, mask, rng, vocab, special, p)[0], ids.copy()


@mlm.wrong_answer("Masked language modelling masks.", says="all with a label")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    _, labels = corrupt(ids, mask, rng, vocab, special, p)
    return np.where(labels != -100, special["[MASK]"], ids), labels


@mlm.wrong_answer("A random token is a random number below the vocabulary's size.",
                  says="special tokens are drawn")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    new, labels = corrupt(ids, mask, rng, vocab, special, p)
    random = (labels != -100) & (new != special["[MASK]"]) & (new != ids)
    return np.where(random, rng.integers(0, vocab, ids.shape), new), labels


@mlm.wrong_answer("Padding is a token like others: the mask is for attention.",
                  says="padding gets labels")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    return corrupt(ids, np.ones(ids.shape, bool), rng, vocab, special, p)


@mlm.wrong_answer("The label is what the model gets to see.", says="after the corruption")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    new, labels = corrupt(ids, mask, rng, vocab, special, p)
    return new, np.where(labels == -100, -100, new)


@mlm.wrong_answer("A tenth of the tokens is enough.", says="the shares", subtle=True)
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.1):
    return corrupt(ids, mask, rng, vocab, special, p)


@mlm.wrong_answer("p is always 15 %.", says="whatever p is")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    return corrupt(ids, mask, rng, vocab, special, 0.15 if p == 0.5 else p)


@mlm.wrong_answer("Every vocabulary has the special tokens of this one.",
                  says="for the special ids", subtle=True)
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    return corrupt(ids, mask, rng, vocab, SPECIAL, p)


@mlm.wrong_answer("Random is random.", says="different answers")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    return corrupt(ids, mask, np.random.default_rng(), vocab, special, p)


@mlm.wrong_answer("Where nothing can be chosen, nothing is changed.", says="no ValueError",
                  subtle=True)
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    if not (mask & ~np.isin(ids, list(special.values()))).any():
        return ids.copy(), np.full(ids.shape, -100)
    return corrupt(ids, mask, rng, vocab, special, p)


@mlm.wrong_answer("Three in four of the chosen become [MASK].", says="the shares")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    new, labels = corrupt(ids, mask, rng, vocab, special, p)
    spared = (new == special["[MASK]"]) & (rng.random(ids.shape) < 0.0625)
    return np.where(spared, ids, new), labels


@mlm.wrong_answer("A position without a label has the label 0.", says="the labels")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    new, labels = corrupt(ids, mask, rng, vocab, special, p)
    return new, np.where(labels == -100, 0, labels)


# ── pool ──────────────────────────────────────────────────────────────────────────────────────────
pool = Exercise(
    "train.evaluate:pool", difficulty=1, minutes=5, on_host=True, hints=(
        "A batch of 10 tokens must not count as much as one of 1,000: what is averaged are tokens, "
        "not batches.",
        "The loss of all is Σ wᵢ ℓᵢ / Σ wᵢ.  The perplexity is e to that loss: averaging "
        "perplexities would favour the worst batch.",
        "math.exp raises OverflowError above 709: math.exp(min(loss, 700))."))


@st.composite
def batches(draw):
    """(losses, weights) of some batches, the losses quarters."""
    n = draw(sizes())
    each = [v / 4 for v in draw(array((n,), range(17))).tolist()]
    weights = draw(array((n,), (1, 2, 3, 4, 0))).tolist()
    weights[0] = max(weights[0], 1.0)                              # of the others some may be empty
    return each, weights


def pooled(f, losses, weights):
    out = f(losses, weights)
    return np.array(out, float) if isinstance(out, tuple) and len(out) == 2 else out


@pool.law("one batch: its loss, and e to it", l=st.integers(0, 8), w=positive("n"))
def _(f, l, w):
    loss, weight = l / 2, float(w[0])
    guesses = {"it is 2 to the loss; the loss is in nats, so e": [loss, 2**loss],
               "the loss is multiplied with the weight": [loss * weight, math.exp(loss * weight)]}
    close(pooled(f, [loss], [weight]), np.array([loss, math.exp(loss)]), "(loss, perplexity)",
          guesses)


@pool.law("batches of one size: the mean loss, and e to it",
          losses=st.lists(st.integers(0, 8), min_size=1, max_size=4))
def _(f, losses):
    mean, losses = sum(losses) / len(losses), [float(l) for l in losses]
    guesses = {"it is the mean of the perplexities; e goes to the mean of the losses":
                   [mean, sum(map(math.exp, losses)) / len(losses)]}
    close(pooled(f, losses, [2.0] * len(losses)), np.array([mean, math.exp(mean)]),
          "(loss, perplexity)", guesses)


@pool.law("every token counts the same, so large batches count more", drawn=batches())
def _(f, drawn):
    losses, weights = drawn
    loss, plain = sum(l * w for l,
                      w in zip(losses, weights)) / sum(weights), sum(losses) / len(losses)
    guesses = {"it is the mean over batches; small batches count as much as large ones":
                   [plain, math.exp(plain)]}
    close(pooled(f, losses, weights), np.array([loss, math.exp(loss)]), "(loss, perplexity)",
          guesses)


@pool.law("a loss of 1,000 has the perplexity e⁷⁰⁰, not an error", n="size")
def _(f, n):
    close(pooled(f, [1000.0] * n, [1.0] * n), np.array([1000.0, math.exp(700)]),
          "(loss, perplexity)")


@pool.wrong_answer("The perplexity of a text is the mean of its batches' perplexities.",
                   says="mean of the perplexities")
def _(losses, weights):
    share = [w / sum(weights) for w in weights]
    return sum(s * l for s, l in zip(share, losses)), sum(s * math.exp(min(l, 700)) for s,
                                                          l in zip(share, losses))


@pool.wrong_answer("The loss of all batches is the mean of their losses.", says="small batches",
                   subtle=True)
def _(losses, weights):
    loss = sum(losses) / len(losses)
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("Perplexity is 2 to the entropy.", says="2 to the loss")
def _(losses, weights):
    loss = sum(w * l for w, l in zip(weights, losses)) / sum(weights)
    return loss, 2**min(loss, 700)


@pool.wrong_answer("e to a number is a number.", says="OverflowError", subtle=True)
def _(losses, weights):
    loss = sum(w * l for w, l in zip(weights, losses)) / sum(weights)
    return loss, math.exp(loss)


@pool.wrong_answer("The longest batch speaks for all.", says="entries")
def _(losses, weights):
    loss = losses[max(range(len(losses)), key=lambda i: weights[i])]
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("exp may go up to 709.", says="expected", subtle=True)
def _(losses, weights):
    loss = sum(w * l for w, l in zip(weights, losses)) / sum(weights)
    return loss, math.exp(min(loss, 709))


@pool.wrong_answer("A batch counts at least as one token.", says="entries", subtle=True)
def _(losses, weights):
    weights = [max(w, 1) for w in weights]
    loss = sum(w * l for w, l in zip(weights, losses)) / sum(weights)
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("The mean divides by the number of batches.", says="multiplied")
def _(losses, weights):
    loss = sum(w * l for w, l in zip(weights, losses)) / len(losses)
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("Two digits of a loss are enough.", says="entries")
def _(losses, weights):
    loss = round(sum(w * l for w, l in zip(weights, losses)) / sum(weights), 2)
    return loss, math.exp(min(loss, 700))
