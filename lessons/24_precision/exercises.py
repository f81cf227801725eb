"""Lesson 24: who computes in 16 bits and who in float32, a float32 copy that keeps what rounding hides, and the search for the loss's scale."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tinyft import precision
from tinyft.array import asarray, asnumpy, bfloat16, is_array
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import positive
from tinyft.optim import GradScaler
from tinyft.optim.optimizers import Group, Rounded
from tinyft.precision import PRODUCTS, ROUNDABLE, SUMS, rounded, widen
from tinyft.tensor import Tensor

F = np.float32

# ── given ────────────────────────────────────────────────────────────────────────────────────────────────────────────
given = Exercise(
    "precision:given", difficulty=2, minutes=15, hints=(
        "First which dtype this op wants, if any: here.to for one of PRODUCTS, float32 for one of SUMS.  All others are given what came.",
        "Not everything that comes is a number to be rounded: there are token ids, masks, None, plain numbers, and float64 to check gradients with.  "
        "ROUNDABLE has the dtypes that may be changed.",
        "cast = lambda a: rounded(a, to) if is_array(a) and a.dtype in ROUNDABLE else a; then a list of cast(a) for the arrays, and a dict of them "
        "for the keywords."))
KINDS = (np.dtype(F), np.dtype(np.float16), bfloat16)
others = st.sampled_from(("add", "mul", "gelu", "reshape", "embedding", "cross_entropy"))
products, sums, halves, floats = (st.sampled_from(some) for some in (sorted(PRODUCTS), sorted(SUMS), (bfloat16, np.dtype(np.float16)), KINDS))


def handed(f, name, arrays, kw, to):
    "What the op is given under autocast(to): a list of host arrays, and a dict."
    with precision.autocast(to):
        out = f(name, [asarray(a) if isinstance(a, np.ndarray) else a for a in arrays], {k: asarray(a) for k, a in kw.items()})
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], (list, tuple)) and isinstance(out[1], dict)):
        raise Unusable(f"(list of arrays, dict of keywords) is asked for; yours is {out!r:.60}")
    close(len(out[0]), len(arrays), "the number of arrays")
    close(len(out[1]), len(kw), "the number of keywords")
    return out


def same(got, want, what, dtype=None):
    "As close does, dtypes too; compared in float64."
    want = want if dtype is None else want.astype(dtype)
    if not is_array(got):
        raise Unusable(f"{what} should be an array; yours is {got!r:.60}")
    if got.dtype != want.dtype:
        raise Unusable(f"{what} is {got.dtype}, expected {want.dtype}")
    close(asnumpy(got).astype(float), want.astype(float), what)


@given.law("a product gets all its inputs in 16 bits, of the kind that autocast was told", a="n m", name=products, of=floats, to=halves)
def _(f, a, name, of, to):
    (x, y), _ = handed(f, name, [a.astype(F) / 3, a.astype(of)], {}, to)
    same(x, a.astype(F) / 3, f"{name}: what came as float32", to)
    same(y, a.astype(of), f"{name}: what came as {of}", to)


@given.law("a sum gets them in float32", a="n m", name=sums, of=floats, to=halves)
def _(f, a, name, of, to):
    (x,), _ = handed(f, name, [a.astype(of)], {}, to)
    same(x, a, f"{name}: what came as {of}", F)


@given.law("every other op gets what came", a="n m", name=others, of=floats, to=halves)
def _(f, a, name, of, to):
    (x,), _ = handed(f, name, [a.astype(of)], {}, to)
    same(x, a.astype(of), f"{name}: what came as {of}")


@given.law("token ids, masks, None and plain numbers stay what they are", a="n m", name=st.one_of(products, sums), to=halves)
def _(f, a, name, to):
    ids, mask = a.astype(np.int64), a > 0
    (x, y, none, number), _ = handed(f, name, [ids, mask, None, 0.1], {}, to)
    same(x, ids, f"{name}: an array of int64")
    same(y, mask, f"{name}: an array of bool")
    if none is not None or type(number) is not float or number != 0.1:
        raise Unusable(f"{name} was to be given None and 0.1 as they came; yours gives {none!r} and {number!r}")


@given.law("float64, in which gradients are checked, stays", a="n m", name=st.one_of(products, sums), to=halves)
def _(f, a, name, to):
    (x,), _ = handed(f, name, [a / 3], {}, to)
    same(x, a / 3, f"{name}: what came as float64")


@given.law("what comes by keyword is an input too", a="n m", name=products, to=halves)
def _(f, a, name, to):
    _, kw = handed(f, name, [], {"bias": a.astype(F) / 3}, to)
    same(kw.get("bias"), a.astype(F) / 3, f"{name}: the keyword bias", to)


def policy(name, arrays, kw, to, kinds=ROUNDABLE, keywords=True):
    "The answer, with the usual errors in it on demand."
    if to is None:
        return arrays, kw
    cast = lambda a: rounded(a, to) if is_array(a) and a.dtype in kinds else a
    return [cast(a) for a in arrays], {k: cast(a) if keywords else a for k, a in kw.items()}


def wanted(name):
    return precision.here.to if name in PRODUCTS else np.dtype(F) if name in SUMS else None


@given.believe("Autocast computes in 16 bits.", says="is bfloat16, expected float32", subtle=True)
def _(name, arrays, kw):
    return policy(name, arrays, kw, precision.here.to if name in PRODUCTS | SUMS else None)


@given.believe("Float32 in, float32 added up: nothing to do for a sum.", says="expected float32", subtle=True)
def _(name, arrays, kw):
    return policy(name, arrays, kw, precision.here.to if name in PRODUCTS else None)


@given.believe("What is no product is float32.", says="is float32, expected", subtle=True)
def _(name, arrays, kw):
    return policy(name, arrays, kw, precision.here.to if name in PRODUCTS else np.dtype(F))


@given.believe("What has 16 bits already may stay.", says="is float16, expected bfloat16", subtle=True)
def _(name, arrays, kw):
    return policy(name, arrays, kw, wanted(name), {np.dtype(F)} if name in PRODUCTS else ROUNDABLE)


@given.believe("An array is an array.", says="expected int64")
def _(name, arrays, kw):
    return policy(name, arrays, kw, wanted(name), {*ROUNDABLE, np.dtype(np.float64), np.dtype(np.int64), np.dtype(bool)})


@given.believe("Floating point is floating point.", says="expected float64", subtle=True)
def _(name, arrays, kw):
    return policy(name, arrays, kw, wanted(name), {*ROUNDABLE, np.dtype(np.float64)})


@given.believe("Keywords are options, not numbers.", says="the keyword bias is float32", subtle=True)
def _(name, arrays, kw):
    return policy(name, arrays, kw, wanted(name), keywords=False)


# ── gather_values ────────────────────────────────────────────────────────────────────────────────────────────────────
gather_values = Exercise(
    "optim.optimizers:Rounded.gather_values", difficulty=3, minutes=20, in_place=True, hints=(
        "self.w has more digits than the tensors show.  To copy the tensors into it would undo every step that is still too small to be seen.  So "
        "copy those alone that somebody else has written to.",
        "There are two ways to write: p.data = another array, and then p.data is not the view; or into the array itself (p.copy_), which "
        "p.version[0] counts.  self.versions has what it was when the optimiser last wrote.",
        "Look first, for all tensors; then Group.gather_values(self), after which every p.data is its view again and nobody could tell; then "
        "self.w[s] = widen(view).reshape(-1) for the slices, views that others wrote to."))
HIDDEN = 2.0**-10                                        # too little to be seen beside 1 in bfloat16


def bound(*arrays):
    "Tensors in bfloat16 under an optimiser that has moved each by less than they can show."
    made = [Tensor(asarray(a.astype(bfloat16)), requires_grad=True) for a in arrays]
    group = Rounded(0.1, 0.0, [f"tensor {i}" for i in range(len(made))], list(made))
    group.lay_out(0)
    group.w += HIDDEN
    group.show()
    for p in made:
        p.touch()
    group.note()
    return group, made


def kept(group, want, before, what="w"):
    "w, and what the tensors show of it."
    flat = lambda arrays: np.concatenate([np.asarray(a, F).reshape(-1) for a in arrays])
    shown = [np.asarray(a).astype(bfloat16).astype(F) for a in want]
    guesses = {"what rounding hides is lost: the copy was overwritten with what the tensors show, though nobody else wrote there": flat(shown),
               "what others wrote was not seen": flat(before)}
    close(asnumpy(group.w), flat(want), what, guesses, dtype=True)
    close(asnumpy(widen(group.shown)), flat(shown), "what the tensors show")
    for i, (p, view) in enumerate(zip(group.tensors, group.views)):
        if p.data is not view:
            raise Unusable(f"the data of tensor {i} is not its view in the flat array: the next step would not be seen")


@gather_values.law("nobody wrote: w keeps what the tensors do not show", a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, _ = bound(a, b)
    f(group)
    kept(group, [a + HIDDEN, b + HIDDEN], [a + HIDDEN, b + HIDDEN], "w, after steps too small to be seen")


@gather_values.law("p.data is another array now: w takes it", a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, (p, _) = bound(a, b)
    p.data = asarray((a + 8).astype(bfloat16))
    f(group)
    kept(group, [a + 8, b + HIDDEN], [a + HIDDEN, b + HIDDEN], "w, after p.data = ... of the first tensor")


@gather_values.law("somebody wrote into p.data: w takes it", a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, (_, p) = bound(a, b)
    p.copy_(b + 8)
    f(group)
    kept(group, [a + HIDDEN, b + 8], [a + HIDDEN, b + HIDDEN], "w, after p.copy_(...) of the second tensor")


@gather_values.law("who writes the very number that is shown means it", a=positive("n m"))
def _(f, a):
    group, (p,) = bound(a)
    p.copy_(a)
    f(group)
    kept(group, [a], [a + HIDDEN], "w, after p.copy_(what p shows)")


def copied(group, others):
    "The answer, for those said to have been written to."
    Group.gather_values(group)
    for s, view, by_others in zip(group.slices, group.views, others):
        if by_others:
            group.w[s] = widen(view).reshape(-1)


def replaced(group):
    return [p.data is not view for p, view in zip(group.tensors, group.views)]


def counted(group):
    return [p.version[0] != then for p, then in zip(group.tensors, group.versions)]


@gather_values.believe("The tensors are the model; the copy follows them.", says="what rounding hides is lost")
def _(self):
    copied(self, [True for _ in self.tensors])


@gather_values.believe("The copy is the model; the tensors follow it.", says="what others wrote was not seen")
def _(self):
    Group.gather_values(self)
    self.show()


@gather_values.believe("Whoever writes puts another array there.", says="what others wrote was not seen")
def _(self):
    copied(self, replaced(self))


@gather_values.believe("The version counts whoever writes.", says="what others wrote was not seen", subtle=True)
def _(self):
    copied(self, counted(self))


@gather_values.believe("First take the tensors back, then look who wrote.", says="what others wrote was not seen", subtle=True)
def _(self):
    Group.gather_values(self)
    copied(self, [a or b for a, b in zip(replaced(self), counted(self))])


@gather_values.believe("A tensor that nobody wrote to has version 0.", says="what rounding hides is lost")
def _(self):
    copied(self, [a or p.version[0] > 0 for a, p in zip(replaced(self), self.tensors)])


@gather_values.believe("Where the numbers are the same, nobody wrote.", says="what others wrote was not seen", subtle=True)
def _(self):
    copied(self, [bool((p.data != self.w[s].reshape(p.shape).astype(p.dtype)).any()) for s, p in zip(self.slices, self.tensors)])


# ── update ───────────────────────────────────────────────────────────────────────────────────────────────────────────
update = Exercise(
    "optim.scaler:GradScaler.update", difficulty=1, minutes=10, in_place=True, hints=(
        "self.finite says how the last step went, self.good counts good ones in a row, self.now is S.",
        "Three cases: a step that was skipped shrinks S; the last of growth_interval good steps lets it grow; any other good step is counted.",
        "In a row: a skipped step sets the count to 0, and so does growth.  If not self.enabled, nothing changes."))
settings = {"S": st.sampled_from([8.0, 64.0, 1024.0]), "growth": st.sampled_from([2.0, 4.0]), "backoff": st.sampled_from([0.5, 0.25]),
            "interval": st.integers(2, 4)}


def updated(f, S, growth, backoff, interval, good, finite):
    "(S, count) after a step."
    scaler = GradScaler(S, growth, backoff, interval)
    scaler.good, scaler.finite = good, finite
    f(scaler)
    return scaler.now, scaler.good


@update.law("after a step that was skipped S is smaller by backoff_factor", **settings, good=st.integers(0, 1))
def _(f, S, growth, backoff, interval, good):
    guesses = {"it is halved, whatever backoff_factor is": S / 2, "S is as before": S, "it is divided by growth_factor": S / growth}
    close(updated(f, S, growth, backoff, interval, good, False)[0], S * backoff, "S", guesses)


@update.law("a good step is counted, and S stays", **settings)
def _(f, S, growth, backoff, interval):
    now, good = updated(f, S, growth, backoff, interval, interval - 2, True)
    close(now, S, f"S after {interval - 1} good steps in a row, for growth_interval = {interval}", {"it grew a step too early": S * growth})
    close(good, interval - 1, "the count", {"the step is not counted": interval - 2})


@update.law("the last of growth_interval good steps in a row: S grows by growth_factor", **settings)
def _(f, S, growth, backoff, interval):
    guesses = {"S did not grow: this was the last of so many, not one before": S, "it is doubled, whatever growth_factor is": 2 * S}
    close(updated(f, S, growth, backoff, interval, interval - 1, True)[0], S * growth, f"S after {interval} good steps in a row", guesses)


@update.law("a row ends with a skipped step: the count begins anew", **settings, good=st.integers(1, 3))
def _(f, S, growth, backoff, interval, good):
    guesses = {"good steps are counted through; they are to be in a row": good, "the skipped step is counted as a good one": good + 1}
    close(updated(f, S, growth, backoff, interval + 3, good, False)[1], 0, "the count after a skipped step", guesses)


@update.law("a row ends where S has grown: the count begins anew", **settings)
def _(f, S, growth, backoff, interval):
    guesses = {"the count goes on, so that S never grows again, or grows at once": interval}
    close(updated(f, S, growth, backoff, interval, interval - 1, True)[1], 0, "the count after S has grown", guesses)


@update.law("enabled=False: S is 1 for good", steps=st.integers(1, 3))
def _(f, steps):
    scaler = GradScaler(8.0, growth_interval=1, enabled=False)
    for _ in range(steps):
        f(scaler)
    close(scaler.now, 1.0, f"S, after {steps} good steps for growth_interval = 1", {"it grows though it is switched off": 2.0**steps})


def moved(scaler, good, row=True, anew=True):
    "The answer, growing when `good` is the interval; without the resets on demand."
    if not scaler.enabled:
        return
    scaler.good = good if scaler.finite or not row else 0
    if not scaler.finite:
        scaler.now *= scaler.backoff_factor
    elif scaler.good == scaler.growth_interval:
        scaler.now, scaler.good = scaler.now * scaler.growth_factor, 0 if anew else scaler.good


@update.believe("Backing off is halving.", says="whatever backoff_factor", subtle=True)
def _(self):
    before = self.now
    moved(self, self.good + 1)
    self.now = self.now if self.finite or not self.enabled else before / 2


@update.believe("What grew too far is undone by growth_factor.", says="divided by growth_factor", subtle=True)
def _(self):
    before = self.now
    moved(self, self.good + 1)
    self.now = self.now if self.finite or not self.enabled else before / self.growth_factor


@update.believe("So many good steps, whenever they were.", says="in a row", subtle=True)
def _(self):
    moved(self, self.good + self.finite, row=False)


@update.believe("After N good steps: at the next one.", says="did not grow")
def _(self):
    if self.enabled and self.finite and self.good == self.growth_interval:
        self.now, self.good = self.now * self.growth_factor, 0
    elif self.enabled:
        self.now, self.good = (self.now, self.good + 1) if self.finite else (self.now * self.backoff_factor, 0)


@update.believe("The count tells how long all has gone well.", says="the count goes on", subtle=True)
def _(self):
    moved(self, self.good + 1, anew=False)


@update.believe("S = 1 at the start is what switched off means.", says="it grows though", subtle=True)
def _(self):
    was, self.enabled = self.enabled, True
    moved(self, self.good + 1)
    self.enabled = was
