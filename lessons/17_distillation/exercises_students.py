"""Lesson 17, the student: the layers that it starts from, the directions of its states."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft import functional
from tinyft.array import asarray
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes
from tinyft.tensor import Tensor


def check(got, want, what, guesses, rtol=1e-9):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items()
             if np.shape(a) != np.shape(want) or not np.allclose(a, want, equal_nan=True)}
    close(got, want, what, wrong, rtol=rtol, atol=1e-10)


# ── layer_map ─────────────────────────────────────────────────────────────────────────────────────
layer_map = Exercise(
    "compress.distill.layers:layer_map", difficulty=2, minutes=15, on_host=True, lines=10,
    may_use="np.linspace(first, last, m), m equally spaced numbers with both ends; np.rint(a), "
            "which rounds to whole numbers; range(first, end, step); isinstance(kind, (list, "
            "tuple)).  (MAPS holds the two words. `checks` holds functions that check one value; a "
            "plain `if` and `raise ValueError(...)` will do.)",
    example="""
        >>> layer_map("spread", 12, 6)
        [0, 2, 4, 7, 9, 11]
        >>> layer_map("every_other", 12, 6)
        [0, 2, 4, 6, 8, 10]
        >>> layer_map([1, 3], 4, 2)
        [1, 3]
        """,
    hints=(
        "There are three cases: a list or tuple, \"spread\" and \"every_other\". The result is a "
        "list of ints.",
        "\"spread\" goes evenly from layer 0 to layer L − 1, both included, and rounds to the "
        "nearest layer. \"every_other\" is 0, 2, 4, ..., m layers; the last is 2 (m − 1).",
        "[int(layer) for layer in np.rint(np.linspace(0, L - 1, m))].  Raise ValueError for m < 1 "
        "or m > L, for a last layer beyond L − 1, for another kind, and for a list that has not m "
        "different layers of 0 ... L − 1 in rising order."))


@st.composite
def depths(draw: Callable, at_most: int = 1):
    """L layers of a teacher and m of a student, with at_most (m − 1) < L."""
    L = draw(sizes()) + draw(st.integers(5, 11))
    m = draw(st.integers(1, (L - 1) // at_most + 1))
    return named(L=L, m=m)


def layers_of(f, kind, L, m):
    made = f(kind, L, m)
    if not isinstance(made, list) or not all(type(layer) is int for layer in made):
        raise Unusable(f"it should return a list of ints; yours is {made!r:.60}")
    return np.array(made, np.int64)


def guessed_layers(L, m):
    exact = np.linspace(0, L - 1, m)
    return {"every other layer: the last one is left out. \"spread\" reaches layer L − 1":
                np.arange(m) * 2,
            "the numbers are rounded down; they are rounded to the nearest": np.floor(exact),
            "halves are rounded up; `round` of Python and np.rint take the even neighbour":
                np.floor(exact + 0.5),
            "the numbers are rounded up; they are rounded to the nearest": np.ceil(exact),
            "these are the first m layers": np.arange(m),
            "these are the last m layers": np.arange(L - m, L),
            "the last layer is L; the layers are 0 ... L − 1": np.rint(np.linspace(0, L, m)),
            "i L / m leaves out the last layer; it is i (L − 1) / (m − 1)":
                np.arange(m) * L // m,
            "the order is from the top; it is bottom to top": np.rint(exact)[::-1],
            "every layer moves up by a step: layer 0 is left out":
                np.rint(np.linspace(0, L - 1, m + 1))[1:]}


@layer_map.law("\"spread\" is round(i (L − 1) / (m − 1)); with m = 1 it is layer 0", given=depths())
def _(f, given):
    L, m = given
    guesses = {words: np.int64(a) for words, a in guessed_layers(L, m).items()}
    want = np.int64(np.rint(np.linspace(0, L - 1, m)))
    check(layers_of(f, "spread", L, m), want, f"the layers for L={L}, m={m}", guesses)


@layer_map.law("\"spread\" of 12 layers to 6 is that of DistilBERT", L=st.just(12), m=st.just(6))
def _(f, L, m):
    guesses = {words: np.int64(a) for words, a in guessed_layers(L, m).items()}
    check(layers_of(f, "spread", L, m), np.array([0, 2, 4, 7, 9, 11]), "the layers", guesses)


@layer_map.law("\"every_other\" is 0, 2, 4, ...", given=depths(at_most=2))
def _(f, given):
    L, m = given
    check(layers_of(f, "every_other", L, m), 2 * np.arange(m), f"the layers for L={L}, m={m}",
          {"these are all of 0, 2, 4, ...; the student takes the first m": np.arange(0, L, 2),
           "it begins with layer 1; it begins with layer 0": 2 * np.arange(m) + 1,
           "these are the layers of \"spread\"": np.int64(np.rint(np.linspace(0, L - 1, m)))})


@layer_map.law("layers that are given are taken as they are", given=depths(),
               seed=st.integers(0, 99), as_tuple=st.booleans())
def _(f, given, seed, as_tuple):
    L, m = given
    chosen = sorted(int(i) for i in np.random.default_rng(seed).permutation(L)[:m])
    kind = tuple(chosen) if as_tuple else chosen
    close(layers_of(f, kind, L, m), np.array(chosen), f"the layers of {kind}")


def wants_value_error(f, case, *args):
    """Unusable unless f(*args) raises ValueError. case: the reason in words."""
    try:
        f(*args)
    except ValueError:
        return
    except (TypeError, IndexError, KeyError, ZeroDivisionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise Unusable(f"{case}: this wants a ValueError, got {got}") from error
    raise Unusable(f"{case}, and no ValueError was raised")


@layer_map.law("a ValueError unless 1 <= m <= L", L=st.integers(1, 4))
def _(f, L):
    for m in (0, L + 1):
        wants_value_error(f, f"m is {m}, and the teacher has {L} layers", "spread", L, m)


@layer_map.law("a ValueError if every other layer gives fewer than m", L=st.integers(2, 6))
def _(f, L):
    m = (L + 1) // 2 + 1
    wants_value_error(f, f"every other layer of {L} are fewer than m = {m}", "every_other", L, m)


@layer_map.law("a ValueError for another kind", L=st.integers(1, 4))
def _(f, L):
    wants_value_error(f, 'kind is "first"', "first", L, 1)


@layer_map.law("a ValueError for a list with other than m different layers, in rising order",
               L=st.integers(3, 6))
def _(f, L):
    for kind in ([0], [0, 1, 2], [1, 0], [1, 1], [0, L], [-1, 0]):
        wants_value_error(f, f"kind is {kind}, L is {L}, and m is 2", kind, L, 2)


def listed(kind, L, m):
    """`kind` if it is a good list of layers; None if it is a word. ValueError for anything else."""
    if not 1 <= m <= L:
        raise ValueError("m")
    if isinstance(kind, (list, tuple)):
        layers = list(kind)
        fits = len(layers) == m and sorted(set(layers)) == layers
        if not fits or layers[0] < 0 or layers[-1] >= L:
            raise ValueError("layers")
        return layers
    if kind not in ("spread", "every_other"):
        raise ValueError("kind")
    if kind == "every_other" and 2 * (m - 1) >= L:
        raise ValueError("too few")
    return None


def mapped(kind, L, m, spread, every_other=0):
    """layer_map with another formula for "spread", and with another first layer of every other."""
    given = listed(kind, L, m)
    if given is not None:
        return given
    layers = spread if kind == "spread" else np.arange(m) * 2 + every_other
    return [int(layer) for layer in layers]


@layer_map.wrong_answer("DistilBERT takes every other layer: 0, 2, 4, 6, 8, 10.",
                        says="every other layer: the last one is left out")
def _(kind, L, m):
    return mapped(kind, L, m, np.arange(m) * 2)


@layer_map.wrong_answer("int() rounds.", says="rounded down")
def _(kind, L, m):
    return mapped(kind, L, m, np.linspace(0, L - 1, m))


@layer_map.wrong_answer("Round up, so that the upper layers are taken.", says="rounded up")
def _(kind, L, m):
    return mapped(kind, L, m, np.ceil(np.linspace(0, L - 1, m)))


@layer_map.wrong_answer("A half is rounded up.", says="the even neighbour", subtle=True)
def _(kind, L, m):
    return mapped(kind, L, m, np.floor(np.linspace(0, L - 1, m) + 0.5))


@layer_map.wrong_answer("The first layers understand the text; the others can be learned.",
                        says="the first m layers")
def _(kind, L, m):
    return mapped(kind, L, m, np.arange(m))


@layer_map.wrong_answer("The last layers know most.", says="the last m layers")
def _(kind, L, m):
    return mapped(kind, L, m, np.arange(L - m, L))


@layer_map.wrong_answer("L layers have the numbers 1 to L.", says="the last layer is L")
def _(kind, L, m):
    return mapped(kind, L, m, np.rint(np.linspace(0, L, m)))


@layer_map.wrong_answer("From L to m: layer i is i L / m.", says="i L / m")
def _(kind, L, m):
    return mapped(kind, L, m, np.arange(m) * L // m)


@layer_map.wrong_answer("The top layer comes first.", says="from the top")
def _(kind, L, m):
    return mapped(kind, L, m, np.rint(np.linspace(0, L - 1, m))[::-1])


@layer_map.wrong_answer("Every other layer begins with the second.", says="begins with layer 1",
                        subtle=True)
def _(kind, L, m):
    return mapped(kind, L, m, np.rint(np.linspace(0, L - 1, m)), every_other=1)


@layer_map.wrong_answer("An array of layers is as good as a list.", says="a list of ints")
def _(kind, L, m):
    given = listed(kind, L, m)
    return np.rint(np.linspace(0, L - 1, m)) if given is None else given


@layer_map.wrong_answer("Every other layer is every other layer, whatever m is.",
                        says="the first m")
def _(kind, L, m):
    layers = mapped(kind, L, m, np.rint(np.linspace(0, L - 1, m)))
    return list(range(0, L, 2)) if kind == "every_other" else layers


@layer_map.wrong_answer("What is not a known word is a list.", says="got TypeError", subtle=True)
def _(kind, L, m):
    if isinstance(kind, str) and kind not in ("spread", "every_other"):
        return [layer for layer in kind if layer < L]
    return mapped(kind, L, m, np.rint(np.linspace(0, L - 1, m)))


@layer_map.wrong_answer("A student is never deeper than its teacher, so m needs no check.",
                        says="m is 0", subtle=True)
def _(kind, L, m):
    if not 1 <= m <= L:
        return [0] * m
    return mapped(kind, L, m, np.rint(np.linspace(0, L - 1, m)))


@layer_map.wrong_answer("Every other layer always gives half.", says="fewer than m", subtle=True)
def _(kind, L, m):
    if kind == "every_other":
        return [int(layer) for layer in np.arange(m) * 2]
    return mapped(kind, L, m, np.rint(np.linspace(0, L - 1, m)))


@layer_map.wrong_answer("Who gives a list knows what it does.", says="kind is [", subtle=True)
def _(kind, L, m):
    if isinstance(kind, (list, tuple)):
        return list(kind)
    return mapped(kind, L, m, np.rint(np.linspace(0, L - 1, m)))


# ── cosine_loss ───────────────────────────────────────────────────────────────────────────────────
cosine_loss = Exercise(
    "compress.distill.soft:cosine_loss", difficulty=2, minutes=15, lines=6,
    may_use="functional.normalize(x), which divides each vector along the last axis by its length; "
            "x.sum(axis=-1) and x.detach(); real.sum() and real.astype(x.dtype) of the array real. "
            "(`wide` makes float32 of 16-bit tensors; you do not need it.)",
    example="""
        Two positions. The first states are at a right angle, the second have one direction.
        >>> h_s = Tensor([[[1.0, 0.0], [3.0, 4.0]]])
        >>> h_t = Tensor([[[0.0, 2.0], [6.0, 8.0]]])
        >>> float(cosine_loss(h_s, h_t, np.array([[True, True]])).numpy().round(6))
        0.5
        >>> float(cosine_loss(h_s, h_t, np.array([[True, False]])).numpy().round(6))
        1.0
        """,
    hints=(
        "The cosine of two vectors is the product of the two normalised vectors, summed over their "
        "entries: (B, T, C) -> (B, T).",
        "Each real position has the weight 1 / n, padding has 0. If there is no real position, n "
        "is 0: divide by max(n, 1).",
        "cosine = (functional.normalize(student) * functional.normalize(teacher.detach()))"
        ".sum(axis=-1), and ((1 - cosine) * weight).sum() with weight = real / max(real.sum(), 1) "
        "in the dtype of the cosine."))
FILLED = (1, 2, -1, 3, -2)                               # a state of zeros has no direction


@st.composite
def two_states(draw: Callable, padded: bool = False, aligned: bool = False, none: bool = False):
    """Hidden states (b, t, c + 1) of student and teacher, and the real positions.

    aligned: the teacher's states have the directions of the student's. none: none is real."""
    b, t, c = draw(sizes()), draw(sizes()), draw(sizes()) + 1
    student = draw_array(draw, (b, t, c), FILLED, np.float64)
    teacher = draw_array(draw, (b, t, c), FILLED[::-1], np.float64)
    if aligned:
        teacher = student * (2.0 + np.arange(b * t).reshape(b, t, 1))
    real = np.full((b, t), not none)
    if padded:
        real = draw_array(draw, (b, t), (False, True), bool)
        real[0, draw(st.integers(0, t - 1))] = True
    return named(student=student, teacher=teacher, real=real)


def unit(h, axis=-1):
    return h / np.linalg.norm(h, axis=axis, keepdims=True)


def right_cosine(h_s, h_t, real):
    distance = 1 - (unit(h_s) * unit(h_t)).sum(-1)
    return distance[real].sum() / max(real.sum(), 1)


def guessed_cosines(h_s, h_t, real):
    want = right_cosine(h_s, h_t, real)
    everywhere = np.ones(real.shape, bool)
    B, T = real.shape
    n = real.sum()
    over_time = 1 - (unit(h_s, 1) * unit(h_t, 1)).sum(1)
    flat_s, flat_t = h_s[real].ravel(), h_t[real].ravel()
    whole = 1 - flat_s @ flat_t / (np.linalg.norm(flat_s) * np.linalg.norm(flat_t))
    return {"padding counts, too": right_cosine(h_s, h_t, everywhere),
            "it is divided by all B T positions; it should be by the n real ones":
                want * n / (B * T),
            "it is the mean of the cosine; it should be that of 1 − cosine": 1 - want,
            "it is the mean of −cosine: 1 is missing": want - 1,
            "it is the sum over the positions; it should be their mean": want * n,
            "it is the product of the states: their lengths count, too":
                (1 - (h_s * h_t).sum(-1))[real].mean(),
            "only the student's states are normalised":
                (1 - (unit(h_s) * h_t).sum(-1))[real].mean(),
            "the cosine is taken along the positions; it is along the entries of a state":
                over_time.mean(),
            "it is one cosine for all states together; each position has its own": whole,
            "it is the squared distance of the directions, which is twice 1 − cosine": 2 * want,
            "it is the mean of the texts' means; every real token counts the same":
                mean_of_texts(h_s, h_t, real)}


def mean_of_texts(h_s, h_t, real):
    rows = [right_cosine(h_s[b:b + 1], h_t[b:b + 1], real[b:b + 1]) for b in range(len(real))]
    return np.mean(rows)


def cosine_of(f, h_s, h_t, real):
    """The result, a Tensor; and the tensors of student and teacher."""
    student = Tensor(asarray(h_s.copy()), requires_grad=True)
    teacher = Tensor(asarray(h_t.copy()), requires_grad=True)
    out = f(student, teacher, real)
    if not isinstance(out, Tensor):
        raise Unusable(f"the result should be a Tensor; yours is a {type(out).__name__}")
    return out, student, teacher


@cosine_loss.law("all positions are real: the mean of 1 − cosine", given=two_states())
def _(f, given):
    out, *_ = cosine_of(f, *given)
    check(out, right_cosine(*given), "the loss", guessed_cosines(*given))


@cosine_loss.law("0 for states of one direction, whatever their lengths",
                 given=two_states(aligned=True))
def _(f, given):
    out, *_ = cosine_of(f, *given)
    check(out, np.float64(0), "the loss", guessed_cosines(*given))


@cosine_loss.law("padding does not count", given=two_states(padded=True))
def _(f, given):
    out, *_ = cosine_of(f, *given)
    check(out, right_cosine(*given), "the loss", guessed_cosines(*given))


@cosine_loss.law("the gradient turns the student's states", given=two_states(padded=True))
def _(f, given):
    h_s, h_t, real = given
    out, student, _ = cosine_of(f, *given)
    if out.requires_grad:
        out.backward()
    if student.grad is None:
        raise Unusable("the student gets no gradient: work with tensors, without .data and "
                       ".numpy(), and detach the teacher, not the student")
    cosine = (unit(h_s) * unit(h_t)).sum(-1, keepdims=True)
    length = np.linalg.norm(h_s, axis=-1, keepdims=True)
    want = -(unit(h_t) - cosine * unit(h_s)) / length * real[..., None] / real.sum()
    check(student.grad, want, "the gradient of the student's states", {
        "its length is taken for a constant: the gradient has a part along the state":
            -unit(h_t) / length * real[..., None] / real.sum()})


@cosine_loss.law("the teacher gets no gradient", given=two_states())
def _(f, given):
    out, _, teacher = cosine_of(f, *given)
    if out.requires_grad:
        out.backward()
    if teacher.grad is not None:
        raise Unusable("the teacher gets a gradient: detach its states")


@cosine_loss.law("0 if no position is real", given=two_states(none=True))
def _(f, given):
    with np.errstate(all="ignore"):
        out, *_ = cosine_of(f, *given)
    close(out, np.float64(0), "the loss without a real position")


def distance_of(student, teacher):
    """1 − cosine (B, T), with the teacher detached."""
    teacher = functional.normalize(teacher.detach())
    return 1 - (functional.normalize(student) * teacher).sum(axis=-1)


def weight_of(real):
    """The weights of the positions (B, T)."""
    return real.astype(np.float64) / max(int(real.sum()), 1)


@cosine_loss.wrong_answer("A mean is over all positions.", says="padding counts")
def _(student, teacher, real):
    return distance_of(student, teacher).mean()


@cosine_loss.wrong_answer("Padding adds 0 to the sum, and .mean() does the rest.",
                          says="all B T positions")
def _(student, teacher, real):
    return (distance_of(student, teacher) * real.astype(np.float64)).mean()


@cosine_loss.wrong_answer("The loss is the cosine.", says="it should be that of 1 − cosine")
def _(student, teacher, real):
    return ((1 - distance_of(student, teacher)) * weight_of(real)).sum()


@cosine_loss.wrong_answer("−cosine has the same gradient, so it is the same loss.",
                          says="1 is missing")
def _(student, teacher, real):
    return ((distance_of(student, teacher) - 1) * weight_of(real)).sum()


@cosine_loss.wrong_answer("Every position adds its distance.", says="the sum over the positions")
def _(student, teacher, real):
    return (distance_of(student, teacher) * real.astype(np.float64)).sum()


@cosine_loss.wrong_answer("The cosine is the product of the states.", says="their lengths count")
def _(student, teacher, real):
    return ((1 - (student * teacher.detach()).sum(axis=-1)) * weight_of(real)).sum()


@cosine_loss.wrong_answer("The teacher's states are fixed, so they need no norm.",
                          says="only the student's")
def _(student, teacher, real):
    cosine = (functional.normalize(student) * teacher.detach()).sum(axis=-1)
    return ((1 - cosine) * weight_of(real)).sum()


@cosine_loss.wrong_answer("The axis of the tokens is the one to compare.",
                          says="along the positions")
def _(student, teacher, real):
    student = functional.normalize(student, axis=1)
    teacher = functional.normalize(teacher.detach(), axis=1)
    return (1 - (student * teacher).sum(axis=1)).mean() * min(int(real.sum()), 1)


@cosine_loss.wrong_answer("A batch of states is one long vector.",
                          says="one cosine for all states")
def _(student, teacher, real):
    mask = real.astype(np.float64)[..., None]
    student = functional.normalize((student * mask).reshape(1, -1))
    teacher = functional.normalize((teacher.detach() * mask).reshape(1, -1))
    return (1 - (student * teacher).sum()) * min(int(real.sum()), 1)


@cosine_loss.wrong_answer("The mean of each text first, then that of the batch.",
                          says="the mean of the texts' means")
def _(student, teacher, real):
    mask = real.astype(np.float64)
    count = real.sum(axis=-1, keepdims=True)
    weight = mask / (count + (count == 0)) / len(real)
    return (distance_of(student, teacher) * weight).sum()


@cosine_loss.wrong_answer("Nobody updates the teacher, so its gradient does no harm.",
                          says="the teacher gets a gradient", subtle=True)
def _(student, teacher, real):
    cosine = (functional.normalize(student) * functional.normalize(teacher)).sum(axis=-1)
    return ((1 - cosine) * weight_of(real)).sum()


@cosine_loss.wrong_answer("The length of a state is a number, so it is not differentiated.",
                          says="taken for a constant", subtle=True)
def _(student, teacher, real):
    length = functional.normalize(student).detach() / student.detach()
    teacher = functional.normalize(teacher.detach())
    return ((1 - (student * length * teacher).sum(axis=-1)) * weight_of(real)).sum()


@cosine_loss.wrong_answer("There is always a real token.", says="nan or inf", subtle=True)
def _(student, teacher, real):
    weight = real.astype(np.float64) / real.sum()
    return (distance_of(student, teacher) * weight).sum()
