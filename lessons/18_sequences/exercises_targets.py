"""Lesson 18, targets: the similarity of two texts, and the text that the student learns."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from tinyft.beam import Hypothesis
from tinyft.compress.distill import Interpolation
from tinyft.compress.distill.bleu import sentence_bleu as bleu
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes


def check(got, want, what, guesses):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items() if not np.allclose(a, want)}
    close(got, want, what, wrong)


# ── sentence_bleu ─────────────────────────────────────────────────────────────────────────────────
sentence_bleu = Exercise(
    "compress.distill.bleu:sentence_bleu", difficulty=3, minutes=30, lines=16,
    may_use="read_tokens(name, tokens), the tokens as a list, or a TypeError (name is for its "
            "message, such as \"hypothesis\"); ngrams(tokens, n), a Counter of the n-grams; c & d "
            "of two Counters, with the smaller count of each entry; c.total(); ORDERS, which is "
            "4; math.log, math.exp, min.",
    example="""
        1 of 2 words is common: p_1 = 1/2. 0 of 1 pair is: p_2 = 1 / (2**1 * 1) = 1/2. There is
        no run of three. The geometric mean is the square root of 1/2 x 1/2, and BP = 1.
        >>> round(sentence_bleu(["get", "file"], ["get", "name"]), 4)
        0.5

        All words and pairs are common, but the hypothesis is shorter: BP = exp(1 - 3/2).
        >>> round(sentence_bleu(["get", "file"], ["get", "file", "name"]), 4)
        0.6065
        """,
    hints=(
        "For n = 1, ..., 4: count the n-grams of the hypothesis, total = h_n, and those that the "
        "reference has too: an n-gram counts at most as often as in the reference. p_n is their "
        "share.",
        "Stop at the first n for which the hypothesis has no n-grams. Return 0 if no token is "
        "common. At the j-th order without a common n-gram, p_n = 1 / (2**j * total).",
        "The geometric mean is exp(sum(logs) / len(logs)). Multiply with the brevity penalty "
        "min(1, exp(1 - len(reference) / len(hypothesis)))."))


def draw_text(draw, n, values):
    """A text of n tokens."""
    return draw_array(draw, (n,), values, np.int64).tolist()


@st.composite
def two_texts(draw: Callable, values: tuple = (1, 2, 3), extra: int = 0, shorter: int = 0):
    """A hypothesis and a reference with a common token; shorter: of the hypothesis, by so many."""
    n = draw(sizes()) + extra
    hypothesis = draw_text(draw, n, values)
    m = max(n + shorter, 1)
    reference = draw_text(draw, m, values)
    reference[draw(st.integers(0, m - 1))] = hypothesis[draw(st.integers(0, n - 1))]
    return named(hypothesis=hypothesis, reference=reference)


def bleu_of(hypothesis, reference, *, brevity="penalty", clip=True, effective=True, zero=True,
            smooth="exp", mean="geometric", recall=False, kinds=False, orders=4, factor=1):
    """sentence_bleu with one error."""
    if not hypothesis or not reference:
        return 0.0
    shares = []
    empty = 0
    for n in range(1, orders + 1):
        ours = Counter(tuple(hypothesis[i:i + n]) for i in range(len(hypothesis) - n + 1))
        theirs = Counter(tuple(reference[i:i + n]) for i in range(len(reference) - n + 1))
        if kinds:
            ours, theirs = Counter(set(ours)), Counter(set(theirs))
        total = theirs.total() if recall else ours.total()
        matches = (ours & theirs).total()
        if not clip:
            matches = sum(count for gram, count in ours.items() if gram in theirs)
        if total == 0:
            break
        if n == 1 and matches == 0 and zero:
            return 0.0
        empty += matches == 0
        p = matches / total
        if smooth == "add one":
            p = (matches + 1) / (total + 1) if n > 1 else p
        elif matches == 0:
            p = {"exp": 1 / (2**empty * total), "half": 1 / (2 * total), "none": 0.0}[smooth]
        shares.append(p)
    count = len(shares) if effective else orders
    if min(shares) == 0:
        return 0.0
    score = math.exp(sum(map(math.log, shares)) / count)
    if mean == "arithmetic":
        score = sum(shares) / count
    ratio = len(reference) / len(hypothesis)
    factors = {"penalty": min(1.0, math.exp(1 - ratio)), "none": 1.0,
               "no limit": math.exp(1 - ratio), "for long": min(1.0, math.exp(1 - 1 / ratio))}
    return factor * factors[brevity] * score


BLEU_FAULTS = {
    "the brevity penalty is missing: a short text has few chances to be wrong": {"brevity": "none"},
    "the brevity penalty is for short hypotheses, yours is for long ones": {"brevity": "for long"},
    "the brevity penalty is at most 1: a long text gets no reward": {"brevity": "no limit"},
    "an n-gram counts at most as often as it stands in the reference": {"clip": False},
    "orders that are longer than the hypothesis count as if they were perfect":
        {"effective": False},
    "without a common token it is 0, whatever smoothing gives": {"zero": False},
    "an order without a common n-gram makes it 0: smoothing is missing": {"smooth": "none"},
    "the second order without a common n-gram gets 1/(4 h), the third 1/(8 h)": {"smooth": "half"},
    "1 is added to all counts; only orders without a common n-gram are smoothed":
        {"smooth": "add one"},
    "it is the arithmetic mean of the shares; the geometric one is wanted": {"mean": "arithmetic"},
    "it is the share of the reference's n-grams; it should be of the hypothesis'": {"recall": True},
    "each n-gram is counted once; it counts as often as it stands there": {"kinds": True},
    "only single tokens are compared; there are n-grams up to n = 4": {"orders": 1},
    "it is 100 times too large: BLEU is from 0 to 1 here": {"factor": 100},
}


def check_bleu(f, hypothesis, reference):
    got = f(hypothesis, reference)
    guesses = {words: bleu_of(hypothesis, reference, **fault)
               for words, fault in BLEU_FAULTS.items()}
    check(got, bleu_of(hypothesis, reference), "BLEU", guesses)


@st.composite
def twice(draw: Callable):
    """A text as hypothesis and as reference."""
    text = draw_text(draw, draw(sizes()), (1, 2, 3))
    return named(hypothesis=text, reference=list(text))


@st.composite
def nothing_in_common(draw: Callable):
    """Two texts without a common token."""
    hypothesis = draw_text(draw, draw(sizes()), (1, 2, 3))
    return named(hypothesis=hypothesis, reference=draw_text(draw, len(hypothesis), (6, 7, 8)))


@sentence_bleu.law("1 for equal texts", given=twice())
def _(f, given):
    check_bleu(f, *given)


@sentence_bleu.law("0 without a common token", given=nothing_in_common())
def _(f, given):
    got = f(*given)
    close(got, 0.0, "BLEU", {"without a common token it is 0, whatever smoothing gives": got})


@sentence_bleu.law("the same length: the geometric mean of the shares, smoothed",
                   given=two_texts(values=(1, 2, 3, 4, 5, 6)))
def _(f, given):
    check_bleu(f, *given)


@sentence_bleu.law("four tokens and more: n-grams up to n = 4",
                   given=two_texts(values=(1, 2, 3, 4, 5, 6), extra=3))
def _(f, given):
    check_bleu(f, *given)


@sentence_bleu.law("a token that is written twice counts twice only if the reference has it twice",
                   given=two_texts(values=(1, 2), extra=1))
def _(f, given):
    check_bleu(f, *given)


@sentence_bleu.law("the hypothesis is longer: no penalty and no reward",
                   given=two_texts(extra=1, shorter=-1))
def _(f, given):
    check_bleu(f, *given)


@sentence_bleu.law("the hypothesis is shorter: exp(1 − |reference| / |hypothesis|)",
                   given=two_texts(shorter=1))
def _(f, given):
    check_bleu(f, *given)


@sentence_bleu.law("0 if one of the texts is empty", text=st.sampled_from(([1], [2, 1], [1, 2, 3])))
def _(f, text):
    for pair in ((text, []), ([], text), ([], [])):
        close(float(f(*pair)), 0.0, f"BLEU of {pair[0]} and {pair[1]}", {
            "a text without tokens has the BLEU 0": 1.0})


@sentence_bleu.law("a TypeError for a text that is not split into tokens",
                   text=st.sampled_from(("ab", "a")))
def _(f, text):
    for pair in ((text, ["a"]), (["a"], text)):
        try:
            f(*pair)
        except TypeError:
            continue
        raise Unusable(f"for {pair[0]!r} and {pair[1]!r} a TypeError is wanted: a text is a "
                       "sequence of letters, and BLEU compares words")


def checked_bleu(hypothesis, reference, **fault):
    if isinstance(hypothesis, str) or isinstance(reference, str):
        raise TypeError("a list of tokens is wanted")
    return bleu_of(list(hypothesis), list(reference), **fault)


@sentence_bleu.wrong_answer("Precision is enough.", says="the brevity penalty is missing")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, brevity="none")


@sentence_bleu.wrong_answer("A text that is too long is punished.", says="yours is for long ones")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, brevity="for long")


@sentence_bleu.wrong_answer("exp(1 − r/h) is the brevity penalty for any length.",
                            says="no reward", subtle=True)
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, brevity="no limit")


@sentence_bleu.wrong_answer("An n-gram is right if the reference has it.",
                            says="at most as often")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, clip=False)


@sentence_bleu.wrong_answer("BLEU is the fourth root of four shares.",
                            says="as if they were perfect")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, effective=False)


@sentence_bleu.wrong_answer("Smoothing is for every order, the first, too.",
                            says="without a common token it is 0", subtle=True)
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, zero=False)


@sentence_bleu.wrong_answer("A share of 0 makes the geometric mean 0.",
                            says="smoothing is missing")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, smooth="none")


@sentence_bleu.wrong_answer("Each order without a match counts as half a match.",
                            says="the second order without")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, smooth="half")


@sentence_bleu.wrong_answer("Smoothing adds 1 to all counts.", says="1 is added")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, smooth="add one")


@sentence_bleu.wrong_answer("A mean is a sum, divided.", says="the arithmetic mean")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, mean="arithmetic")


@sentence_bleu.wrong_answer("The reference should be found in the hypothesis.",
                            says="the share of the reference's")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, recall=True)


@sentence_bleu.wrong_answer("A set of n-grams is enough.", says="each n-gram is counted once")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, kinds=True)


@sentence_bleu.wrong_answer("The words are right, whatever their order.",
                            says="only single tokens")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, orders=1)


@sentence_bleu.wrong_answer("BLEU is from 0 to 100.", says="100 times too large")
def _(hypothesis, reference):
    return checked_bleu(hypothesis, reference, factor=100)


@sentence_bleu.wrong_answer("Two empty texts are equal, so it is 1.", says="without tokens",
                            subtle=True)
def _(hypothesis, reference):
    if len(hypothesis) == len(reference) == 0:
        return 1.0
    return checked_bleu(hypothesis, reference)


@sentence_bleu.wrong_answer("A text is a sequence, too.", says="a sequence of letters",
                            subtle=True)
def _(hypothesis, reference):
    return bleu_of(list(hypothesis), list(reference))


# ── Interpolation.choose ──────────────────────────────────────────────────────────────────────────
choose = Exercise(
    "compress.distill.sequence:Interpolation.choose", difficulty=2, minutes=15,
    may_use="complete(hypotheses), those that have ended, or all if none has; self.words(tokens), "
            "the tokens without start and end; sentence_bleu(hypothesis, reference); np.argmax, "
            "which gives the first of several largest.",
    example="""
        The end is 0. The target of the data is "5 6 7". The teacher likes "8 9" best.
        >>> from types import SimpleNamespace
        >>> from tinyft.beam import Hypothesis
        >>> method = SimpleNamespace(words=lambda tokens: [t for t in tokens if t != 0])
        >>> texts = [Hypothesis((8, 9, 0), -1.0, -3.0, True),
        ...          Hypothesis((5, 6, 0), -2.0, -6.0, True),
        ...          Hypothesis((5, 6, 7), -3.0, -9.0, False)]           # it has no end
        >>> choose(method, texts, [5, 6, 7, 0]).tokens
        (5, 6, 0)
        """,
    hints=(
        "First take those that have ended: complete(hypotheses). Then compute the BLEU of each "
        "against the target of the data.",
        "Remove start and end from both texts, by self.words: all texts have an end, so it would "
        "be a common token of any two.",
        "candidates[int(np.argmax(similarity))]. The candidates are best first, so the first of "
        "equal ones is the one that the teacher likes best."))
START, END = 9, 0


def a_method():
    """An Interpolation whose teacher is only a start token."""
    method = object.__new__(Interpolation)
    teacher = SimpleNamespace(config=SimpleNamespace(start=START))
    object.__setattr__(method, "beams", SimpleNamespace(teacher=teacher, end=END))
    return method


@st.composite
def a_beam(draw: Callable, ended: str = "all", golds: str = "drawn"):
    """The texts of a beam, best first, and several targets of the data.

    ended: which texts have an end, "all", "some" or "none". golds: "far", without a common token;
    "beam", the texts of the beam; "drawn", any texts; "both", drawn ones and some of the beam."""
    n = draw(sizes()) + 1
    values = (1, 2, 3, 4)
    flip = draw(st.integers(0, 1))
    hypotheses = []
    for i in range(n):
        text = draw_text(draw, draw(st.integers(1, 3)), values)
        if any(words_of(h) == text for h in hypotheses):
            text.append(5 + i)                           # a beam has no text twice
        has_end = ended == "all" or (ended == "some" and i % 2 == flip)
        if not has_end:
            text.append(15 + i)
        score = -1.0 - i / 4
        hypotheses.append(Hypothesis((*text, END) if has_end else tuple(text), score, 4 * score,
                                     has_end))
    of_beam = [list(h.tokens) for h in hypotheses]
    targets = [[*draw_text(draw, k + 1, values), END] for k in range(3)]
    if golds == "far":
        targets = [[20 + k, END] for k in range(3)]
    elif golds == "beam":
        targets = of_beam
    elif golds == "both":
        targets += [of_beam[0], of_beam[-1]]
    return named(hypotheses=hypotheses, golds=targets)


def words_of(hypothesis):
    return [token for token in hypothesis.tokens if token not in (START, END)]


def chosen(hypotheses, gold, *, similarity="bleu", whole=False, cut=False, swap=False, last=False,
           least=False, by_score=False):
    """The place of the chosen text, with one error."""
    ended = [h for h in hypotheses if h.ended]
    candidates = hypotheses if cut or not ended else ended
    if similarity == "teacher":
        return hypotheses.index(candidates[0])
    values = []
    for h in candidates:
        ours = list(h.tokens) if whole else [t for t in h.tokens if t not in (START, END)]
        theirs = list(gold) if whole else [t for t in gold if t not in (START, END)]
        pair = (theirs, ours) if swap else (ours, theirs)
        value = bleu(*pair)
        if similarity == "equal":
            value = float(ours == theirs)
        elif similarity == "common":
            value = float(len(set(ours) & set(theirs)))
        values.append(value + h.score if by_score else value)
    best = min(values) if least else max(values)
    places = [i for i, value in enumerate(values) if value == best]
    return hypotheses.index(candidates[places[-1 if last else 0]])


CHOICE_FAULTS = {
    "it is the teacher's best text: that is the sequence level, without the gold text":
        {"similarity": "teacher"},
    "a text that was cut off was chosen, although others have ended": {"cut": True},
    "the end was compared, too: it makes all texts similar": {"whole": True},
    "of equally similar texts, the teacher's better one, the first, is chosen": {"last": True},
    "the arguments are exchanged: the text of the teacher is the hypothesis": {"swap": True},
    "the least similar text was chosen": {"least": True},
    "only a text that equals the gold one counts; the most similar one is wanted":
        {"similarity": "equal"},
    "the number of common tokens was compared; BLEU is wanted": {"similarity": "common"},
    "the teacher's score was added to BLEU": {"by_score": True},
}


def check_choice(f, hypotheses, golds):
    got = []
    for gold in golds:
        out = f(a_method(), hypotheses, gold)
        if out not in hypotheses:
            raise Unusable(f"choose returns one of the hypotheses; yours returned {str(out)[:60]}")
        got.append(hypotheses.index(out))

    def places(**fault):
        return np.array([chosen(hypotheses, gold, **fault) for gold in golds])

    guesses = {words: places(**fault) for words, fault in CHOICE_FAULTS.items()}
    check(np.array(got), places(), "the number of the chosen text, one for each of the golds",
          guesses)


@choose.law("the gold text is chosen, if it is on the beam", given=a_beam(golds="beam"))
def _(f, given):
    check_choice(f, *given)


@choose.law("the text with the largest BLEU is chosen", given=a_beam())
def _(f, given):
    check_choice(f, *given)


@choose.law("of equally similar texts, the first; the end does not make texts similar",
            given=a_beam(golds="far"))
def _(f, given):
    check_choice(f, *given)


@choose.law("texts that were cut off are chosen only if none has ended",
            given=a_beam(ended="some", golds="both"))
def _(f, given):
    check_choice(f, *given)


@choose.law("if none has ended, the text with the largest BLEU of all is chosen",
            given=a_beam(ended="none", golds="both"))
def _(f, given):
    check_choice(f, *given)


def picked(hypotheses, gold, **fault):
    return hypotheses[chosen(list(hypotheses), list(gold), **fault)]


@choose.wrong_answer("The teacher knows best.", says="it is the teacher's best text")
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, similarity="teacher")


@choose.wrong_answer("The most similar text is the target, finished or not.", says="was cut off",
                     subtle=True)
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, cut=True)


@choose.wrong_answer("The end is a token like others.", says="the end was compared")
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, whole=True)


@choose.wrong_answer("max() over pairs (BLEU, place) is the simplest way.",
                     says="the teacher's better one")
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, last=True)


@choose.wrong_answer("BLEU is symmetric.", says="are exchanged")
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, swap=True)


@choose.wrong_answer("BLEU is a distance.", says="the least similar")
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, least=True)


@choose.wrong_answer("If the gold text is on the beam, take it; else the best.",
                     says="equals the gold one")
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, similarity="equal")


@choose.wrong_answer("The more common words, the better.", says="common tokens was compared")
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, similarity="common")


@choose.wrong_answer("Similarity and score are added, so that both count.",
                     says="score was added")
def _(self, hypotheses, gold):
    return picked(hypotheses, gold, by_score=True)


@choose.wrong_answer("Without an end there is no target, so it is the first.",
                     says="the teacher's best text", subtle=True)
def _(self, hypotheses, gold):
    if not any(h.ended for h in hypotheses):
        return hypotheses[0]
    return picked(hypotheses, gold)
