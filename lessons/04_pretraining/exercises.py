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
from tinyft.learn.sizes import Shaped, array, booleans, integers, named, positive, sizes

PAD, CLS, MASK = SPECIAL["[PAD]"], SPECIAL["[CLS]"], SPECIAL["[MASK]"]
# the ids that are no special token
FIRST, VOCAB = max(SPECIAL.values()) + 1, max(SPECIAL.values()) + 5


def wants_value_error(f, case, *args):
    """Unusable unless f(*args) raises ValueError. case: the reason in words."""
    try:
        f(*args)
    except ValueError:
        return
    raise Unusable(f"{case}, and no ValueError was raised")


# ── next_tokens ───────────────────────────────────────────────────────────────────────────────────
next_tokens = Exercise(
    "train.batch:next_tokens", difficulty=2, minutes=15, on_host=True,
    may_use="slices, `&`, `np.where`, `np.ones`, `np.asarray` and `IGNORE`, which is -100. "
            "(`read_integers` and `read_mask` turn lists into arrays; you need neither.)",
    example="""
        >>> ids = np.array([[5, 6, 7], [8, 9, 0]])
        >>> mask = np.array([[True, True, True], [True, True, False]])
        >>> next_tokens(ids, mask).tolist()
        [[6, 7], [9, -100]]
        """,
    hints=(
        "The model reads all tokens but the last. At each it must predict the token after it. So "
        "the labels are the ids, moved by one position.",
        "A position has no label (-100) where the next token is padding, and where the token that "
        "is read there is padding: padding may stand on the left as well.",
        "Make `real` from the mask with dtype bool, or all True without a mask. Then "
        "np.where(both are real, ids[:, 1:], -100), with real[:, 1:] and real[:, :-1]. Compare the "
        "shapes first, and raise ValueError where they do not fit."))
# the id 0 is a token like any other; it comes last, so that small examples have none
TOKENS = Shaped("b t", (1, 2, 3, 4, 5, 6, 7, 8, 9, 0), np.int64)


@next_tokens.law("without padding: the label of a position is the next id", ids=TOKENS)
def _(f, ids):
    both = (ids[:, :-1] != 0) & (ids[:, 1:] != 0)
    guesses = {"it is the id of the position itself: nothing is left to predict": ids[:, :-1],
               "the id 0 is taken for padding; only a mask says what is padding":
                   np.where(both, ids[:, 1:], -100)}
    close(f(ids), ids[:, 1:], "the labels, called without a mask", guesses)


@next_tokens.law("padding on the right gets no label", ids=TOKENS, lengths=integers("b", 1, 4))
def _(f, ids, lengths):
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    want = np.where(mask[:, 1:], ids[:, 1:], -100)
    close(f(ids, mask), want, "the labels, if text b has lengths[b] real tokens",
          {"padding is predicted too: the mask has no effect": ids[:, 1:],
           "the last real token has the padding after it as its label":
               np.where(mask[:, :-1], ids[:, 1:], -100)})


@next_tokens.law("any mask: the position and the next one must both be real", ids=TOKENS,
                 mask=booleans("b t"))
def _(f, ids, mask):
    want = np.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], -100)
    guesses = {"only the label is looked at: a position that reads padding has a label too":
                   np.where(mask[:, 1:], ids[:, 1:], -100),
               "only the token that is read is looked at": np.where(mask[:, :-1], ids[:, 1:], -100)}
    close(f(ids, mask), want, "the labels", guesses)


@next_tokens.law("a mask of ones and zeros, as tokenizers give it, is a mask", ids=TOKENS,
                 mask=integers("b t", 0, 1))
def _(f, ids, mask):
    real = mask.astype(bool)
    want = np.where(real[:, 1:] & real[:, :-1], ids[:, 1:], -100)
    guesses = {"it differs from the labels for True and False: ~1 is -2, not 0": ids[:, 1:]}
    close(f(ids, mask), want, "the labels", guesses)


@next_tokens.law("a ValueError, if ids has not two axes", ids=Shaped("t", (1, 2, 3), np.int64))
def _(f, ids):
    wants_value_error(f, f"ids has the shape {ids.shape}", ids)


@next_tokens.law("a ValueError, if the mask has another shape than ids", b="size", t="size")
def _(f, b, t):
    ids = np.ones((b + 1, t + 1), np.int64)
    mask = np.ones((1, t + 1), bool)
    wants_value_error(f, f"ids has the shape {ids.shape}, the mask {mask.shape}", ids, mask)


def real_tokens(ids, mask):
    """The mask (B, T) as booleans, all True without one. ValueError where the shapes do not fit."""
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    if ids.ndim != 2 or real.shape != ids.shape:
        raise ValueError("the shapes do not fit")
    return real


@next_tokens.wrong_answer("The labels are the ids; the model shifts them itself.",
                          says="the position itself")
def _(ids, mask=None):
    return np.where(real_tokens(ids, mask)[:, :-1], ids[:, :-1], -100)


@next_tokens.wrong_answer("A mask is for attention; the loss sees every position.",
                          says="padding is predicted")
def _(ids, mask=None):
    real_tokens(ids, mask)
    return ids[:, 1:].copy()


@next_tokens.wrong_answer(
    "Padding stands on the right, so a real token is always read where a real one follows.",
    says="reads padding")
def _(ids, mask=None):
    return np.where(real_tokens(ids, mask)[:, 1:], ids[:, 1:], -100)


@next_tokens.wrong_answer("A position has a label if its token is real.",
                          says="the last real token")
def _(ids, mask=None):
    return np.where(real_tokens(ids, mask)[:, :-1], ids[:, 1:], -100)


@next_tokens.wrong_answer("A label is a number.", says="dtype is float64")
def _(ids, mask=None):
    real = real_tokens(ids, mask)
    return np.where(real[:, 1:] & real[:, :-1], ids[:, 1:], -100.0)


@next_tokens.wrong_answer("~ turns a mask round.", says="~1 is -2", subtle=True)
def _(ids, mask=None):
    real_tokens(ids, mask)
    labels = ids[:, 1:].copy()
    if mask is not None:
        labels[(~mask[:, 1:] | ~mask[:, :-1]).astype(bool) & (mask.dtype == bool)] = -100
    return labels


@next_tokens.wrong_answer("The mask of the first text is that of all.", says="entries")
def _(ids, mask=None):
    first = real_tokens(ids, mask)[:1]
    return np.where(first[:, 1:] & first[:, :-1], ids[:, 1:], -100)


@next_tokens.wrong_answer("The token 0 is padding.", says="only a mask")
def _(ids, mask=None):
    real = real_tokens(ids, mask) if mask is not None else ids != 0
    return np.where(real[:, 1:] & real[:, :-1], ids[:, 1:], -100)


@next_tokens.wrong_answer("A text ends with a token, so the last label is its end.", says="shape")
def _(ids, mask=None):
    real = real_tokens(ids, mask)
    labels = np.where(real[:, 1:] & real[:, :-1], ids[:, 1:], -100)
    return np.concatenate([labels, np.full((len(ids), 1), -100)], axis=1)


@next_tokens.wrong_answer("The labels may be written into the ids.", says="changed its argument")
def _(ids, mask=None):
    real = real_tokens(ids, mask)
    labels = ids[:, 1:]
    labels[~(real[:, 1:] & real[:, :-1])] = -100
    return labels


@next_tokens.wrong_answer("One text is a batch of one.", says="no ValueError", subtle=True)
def _(ids, mask=None):
    if ids.ndim == 1:
        ids = ids[None]
    real = real_tokens(ids, mask)
    return np.where(real[:, 1:] & real[:, :-1], ids[:, 1:], -100)


@next_tokens.wrong_answer("A mask of one row is meant for all rows.", says="no ValueError",
                          subtle=True)
def _(ids, mask=None):
    if mask is not None:
        mask = np.broadcast_to(mask, ids.shape)
    real = real_tokens(ids, mask)
    return np.where(real[:, 1:] & real[:, :-1], ids[:, 1:], -100)


# ── mlm ───────────────────────────────────────────────────────────────────────────────────────────
mlm = Exercise(
    "data.batches:mlm", difficulty=4, minutes=25, on_host=True,
    may_use="`np.flatnonzero`, `np.isin`, `np.full`, `np.setdiff1d`, `array.flat[indices]`, "
            "`rng.random(n)`, `rng.choice(values, n)` and `IGNORE`, which is -100. (`read_array` "
            "turns lists into arrays; you need neither it nor `special_ids`.)",
    example="""
        >>> ids = np.array([[2, 7, 8, 9, 3, 0]])           # [CLS], three words, [SEP], [PAD]
        >>> mask = np.array([[True, True, True, True, True, False]])
        >>> corrupted, labels = mlm(ids, mask, np.random.default_rng(0), vocab=10, p=1.0)
        >>> labels.tolist()
        [[-100, 7, 8, 9, -100, -100]]
        >>> corrupted.tolist()                             # 4 is [MASK]; your draws may differ
        [[2, 4, 8, 9, 3, 0]]
        """,
    hints=(
        "Find the positions that can be chosen: real ones (mask) without a special token. Choose "
        "each with probability p. Only the chosen ones get a label: the token that stood there.",
        "np.flatnonzero gives the indices of these positions, rng.random(len(indices)) < p chooses "
        "among them. If none was chosen, take rng.choice(indices, 1). a.flat[indices] reads and "
        "writes at such indices.",
        "Draw one number u per chosen position. u < 0.8: it becomes special[\"[MASK]\"]. "
        "0.8 <= u < 0.9: a random token of np.setdiff1d(np.arange(vocab), special ids), one for "
        "each position. The rest stays."))


@st.composite
def texts(draw):
    """ids (b, t + 3): a word, t words or special tokens, [CLS], and a word that is padding."""
    b, t = draw(sizes()), draw(sizes())
    drawn = draw(array((b, t), (FIRST, FIRST + 1, FIRST + 2, CLS), np.int64))
    word = np.full((b, 1), FIRST)
    return np.concatenate([word, drawn, np.full((b, 1), CLS), word], axis=1)


def all_but_last(ids):
    """The mask of `texts`: the last position of each text is padding."""
    mask = np.ones(ids.shape, bool)
    mask[:, -1] = False
    return mask


seeds = st.integers(0, 7)


@mlm.law("the label of a position is its original id, or -100: no label", ids=texts(), seed=seeds)
def _(f, ids, seed):
    new, labels = f(ids, all_but_last(ids), np.random.default_rng(seed), VOCAB, SPECIAL, 0.5)
    labelled = np.asarray(labels) != -100
    guesses = {"they are the ids after the corruption: the label is the id before it":
                   np.where(labelled, new, -100)}
    close(labels, np.where(labelled, ids, -100), "the labels", guesses)


@mlm.law("padding and special tokens have no label; with p = 1 every other token has one",
         ids=texts(), seed=seeds)
def _(f, ids, seed):
    mask = all_but_last(ids)
    _, labels = f(ids, mask, np.random.default_rng(seed), VOCAB, SPECIAL, 1.0)
    guesses = {"positions of padding were chosen: is the mask used? It is False at padding":
                   ids >= FIRST,
               "special tokens were chosen": mask,
               "every position has a label, padding and special tokens too":
                   np.ones(ids.shape, bool)}
    close(np.asarray(labels) != -100, mask & (ids >= FIRST),
          "where a label is (p = 1; the last position of each text is padding)", guesses)


@mlm.law("a position without a label keeps its token", ids=texts(), seed=seeds)
def _(f, ids, seed):
    new, labels = f(ids, all_but_last(ids), np.random.default_rng(seed), VOCAB, SPECIAL, 0.5)
    labelled = np.asarray(labels) != -100
    close(np.where(labelled, 0, new), np.where(labelled, 0, ids),
          "the new ids, with 0 where a label is")


@mlm.law("at least one position has a label, however small p is", ids=texts(), seed=seeds)
def _(f, ids, seed):
    new, labels = f(ids, all_but_last(ids), np.random.default_rng(seed), VOCAB, SPECIAL, 1e-9)
    close(np.asarray((np.asarray(labels) != -100).sum()), np.asarray(1), "the number of labels",
          {"no position has a label: nothing to learn": 0,
           "one position of each text has a label; it is one of the whole batch": len(ids)})


@mlm.law("each position is chosen on its own: not the same ones in every text, and not always "
         "the same number", seed=seeds)
def _(f, seed):
    ids = np.full((20, 50), FIRST)
    mask = np.ones(ids.shape, bool)
    counts = set()
    for call in range(8):
        rng = np.random.default_rng(8 * seed + call)
        labelled = np.asarray(f(ids, mask, rng, VOCAB, SPECIAL, 0.5)[1]) != -100
        counts.add(int(labelled.sum()))
        if len(counts) == 1 and (labelled == labelled[0]).all():
            raise Unusable("the same positions are chosen in all 20 texts")
    if len(counts) == 1:
        raise Unusable(f"in 8 calls {counts.pop()} of 1,000 positions were chosen every time; with "
                       "a draw for each position the number varies")


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


@mlm.law("rng decides: a generator in the same state, the same result", ids=texts(), seed=seeds)
def _(f, ids, seed):
    ids = np.tile(ids, (8, 8))
    mask = np.ones(ids.shape, bool)
    new, labels = f(ids, mask, np.random.default_rng(seed), VOCAB)
    again, labels_again = f(ids, mask, np.random.default_rng(seed), VOCAB)
    close(again, new, "the new ids, for a generator in the same state")
    close(labels_again, labels, "the labels, for a generator in the same state")


@mlm.law("a ValueError, if every token is special", b="size", t="size")
def _(f, b, t):
    ids = np.full((b, t), CLS)
    wants_value_error(f, "all tokens are special", ids, np.ones(ids.shape, bool),
                      np.random.default_rng(0), VOCAB)


@mlm.law("a ValueError, if every position is padding", b="size", t="size")
def _(f, b, t):
    ids = np.full((b, t), FIRST)
    wants_value_error(f, "all positions are padding", ids, np.zeros(ids.shape, bool),
                      np.random.default_rng(0), VOCAB)


@mlm.law("a ValueError, if no token is left to draw", seed=seeds)
def _(f, seed):
    ids = np.full((2, 3), FIRST)
    wants_value_error(f, f"every id below vocab = {FIRST} is special", ids,
                      np.ones(ids.shape, bool), np.random.default_rng(seed), FIRST)


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
                  says="positions of padding were chosen")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    return corrupt(ids, np.ones(ids.shape, bool), rng, vocab, special, p)


@mlm.wrong_answer("A mask is True at padding.", says="entries")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    return corrupt(ids, ~mask, rng, vocab, special, p)


@mlm.wrong_answer("Special tokens are tokens.", says="special tokens were chosen")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    candidates = np.where(mask & np.isin(ids, list(special.values())), FIRST, ids)
    new, labels = corrupt(candidates, mask, rng, vocab, special, p)
    return np.where(labels == -100, ids, new), np.where(labels == -100, -100, ids)


@mlm.wrong_answer("The mask is only for padding on the right, which nobody counts.",
                  says="no ValueError", subtle=True)
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    if not mask.any():
        return ids.copy(), np.full(ids.shape, -100)
    return corrupt(ids, mask, rng, vocab, special, p)


@mlm.wrong_answer("A vocabulary always has words.", says="no ValueError", subtle=True)
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    return corrupt(ids, mask, rng, max(vocab, FIRST + 1), special, p)


@mlm.wrong_answer("15 % means exactly 15 of 100 positions.", says="every time", subtle=True)
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    new, labels = corrupt(ids, mask, rng, vocab, special, 1.0)
    free = np.flatnonzero(labels != -100)
    chosen = rng.choice(free, max(1, round(p * len(free))), replace=False)
    is_chosen = np.zeros(ids.shape, bool)
    is_chosen.flat[chosen] = True
    return np.where(is_chosen, new, ids), np.where(is_chosen, labels, -100)


@mlm.wrong_answer("The choice of positions is made once, for all texts.",
                  says="the same positions")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    new, labels = corrupt(ids, mask, rng, vocab, special, 1.0)
    is_chosen = (labels != -100) & (rng.random(ids.shape[1]) < p)
    if not is_chosen.any():
        is_chosen.flat[rng.choice(np.flatnonzero(labels != -100))] = True
    return np.where(is_chosen, new, ids), np.where(is_chosen, labels, -100)


@mlm.wrong_answer("Every text needs a label.", says="one of the whole batch")
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    rows = [corrupt(ids[b:b + 1], mask[b:b + 1], rng, vocab, special, p) for b in range(len(ids))]
    return np.concatenate([new for new, _ in rows]), np.concatenate([label for _, label in rows])


@mlm.wrong_answer("One random token will do for all positions.", says="entries", subtle=True)
def _(ids, mask, rng, vocab, special=SPECIAL, p=0.15):
    new, labels = corrupt(ids, mask, rng, vocab, special, p)
    words = np.setdiff1d(np.arange(vocab), list(special.values()))
    random = (labels != -100) & (new != special["[MASK]"]) & (new != ids)
    return np.where(random, rng.choice(words), new), labels


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
    if np.isin(ids, list(special.values())).all():
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
    "train.evaluate:pool", difficulty=1, minutes=10, on_host=True,
    may_use="`sum`, `zip`, `min` and `math.exp`.",
    example="""
        >>> pool([1.0, 3.0], [3, 1])
        (1.5, 4.4816890703380645)
        """,
    hints=(
        "A batch of 10 tokens must not count as much as one of 1,000: the mean is over tokens, not "
        "over batches.",
        "The loss of all is Σ wᵢ ℓᵢ / Σ wᵢ, over the batches with wᵢ > 0. The perplexity is e to "
        "that loss. A mean of perplexities would give the worst batch too much weight.",
        "The loss of a batch without tokens may be nan, and 0 times nan is nan: skip it. math.exp "
        "raises OverflowError above 709: write math.exp(min(loss, 700))."))


@st.composite
def batches(draw):
    """(losses, weights) of some batches, the losses quarters."""
    n = draw(sizes())
    each = [v / 4 for v in draw(array((n,), range(17))).tolist()]
    weights = draw(array((n,), (1, 2, 3, 4, 0))).tolist()
    weights[0] = max(weights[0], 1.0)                              # of the others some may be empty
    return named(losses=each, weights=weights)


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


@pool.law("a batch without tokens is left out: its loss is nan", drawn=batches())
def _(f, drawn):
    losses, weights = drawn
    loss = mean_loss(losses, weights)
    got = pooled(f, [*losses, math.nan], [*weights, 0.0])
    if isinstance(got, np.ndarray) and np.isnan(got).any():
        raise Unusable("the law adds a batch of loss nan and weight 0 to the drawn ones, and the "
                       "result is nan, since 0 times nan is nan: leave such a batch out")
    close(got, np.array([loss, math.exp(loss)]),
          "(loss, perplexity) with one batch more, of loss nan and weight 0")


@pool.law("a loss above 700 has the perplexity e⁷⁰⁰, not an error", n="size",
          loss=st.sampled_from((1000.0, 705.0)))
def _(f, n, loss):
    close(pooled(f, [loss] * n, [1.0] * n), np.array([loss, math.exp(700)]), "(loss, perplexity)")


def mean_loss(losses, weights):
    """Σ wᵢ ℓᵢ / Σ wᵢ over the batches that have tokens."""
    return sum(w * l for w, l in zip(weights, losses) if w) / sum(weights)


@pool.wrong_answer("The perplexity of a text is the mean of its batches' perplexities.",
                   says="mean of the perplexities")
def _(losses, weights):
    perplexities = [math.exp(min(loss, 700)) if w else 0.0 for loss, w in zip(losses, weights)]
    return mean_loss(losses, weights), mean_loss(perplexities, weights)


@pool.wrong_answer("The loss of all batches is the mean of their losses.", says="small batches",
                   subtle=True)
def _(losses, weights):
    known = [loss for loss in losses if not math.isnan(loss)]
    if len(known) < len(losses):
        loss = mean_loss(losses, weights)
    else:
        loss = sum(known) / len(known)
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("Perplexity is 2 to the entropy.", says="2 to the loss")
def _(losses, weights):
    loss = mean_loss(losses, weights)
    return loss, 2**min(loss, 700)


@pool.wrong_answer("e to a number is a number.", says="OverflowError", subtle=True)
def _(losses, weights):
    loss = mean_loss(losses, weights)
    return loss, math.exp(loss)


@pool.wrong_answer("The longest batch speaks for all.", says="entries")
def _(losses, weights):
    loss = losses[max(range(len(losses)), key=lambda i: weights[i])]
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("exp may go up to 709.", says="expected", subtle=True)
def _(losses, weights):
    loss = mean_loss(losses, weights)
    return loss, math.exp(min(loss, 709))


@pool.wrong_answer("Only a number that overflows is too large.", says="expected", subtle=True)
def _(losses, weights):
    loss = mean_loss(losses, weights)
    try:
        return loss, math.exp(loss)
    except OverflowError:
        return loss, math.exp(700)


@pool.wrong_answer("A number times 0 is 0.", says="0 times nan", subtle=True)
def _(losses, weights):
    loss = sum(w * l for w, l in zip(weights, losses)) / sum(weights)
    return loss, math.nan if math.isnan(loss) else math.exp(min(loss, 700))


@pool.wrong_answer("A batch counts at least as one token.", says="entries")
def _(losses, weights):
    loss = mean_loss(losses, [max(w, 1) for w in weights])
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("The mean divides by the number of batches.", says="multiplied")
def _(losses, weights):
    loss = sum(w * l for w, l in zip(weights, losses) if w) / len(losses)
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("Two digits of a loss are enough.", says="entries")
def _(losses, weights):
    loss = round(mean_loss(losses, weights), 2)
    return loss, math.exp(min(loss, 700))


@pool.wrong_answer("The perplexity says it all.", says="shape")
def _(losses, weights):
    return np.array(math.exp(min(mean_loss(losses, weights), 700)))
