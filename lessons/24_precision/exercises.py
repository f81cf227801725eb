"""Lesson 24: who computes in 16 bits and who in float32, a float32 copy that keeps what rounding
hides, and the search for the loss's scale.
"""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tinyft import precision
from tinyft.array import asarray, asnumpy, bfloat16, is_array
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import positive
from tinyft.optim import GradScaler
from tinyft.optim.buffers import Group
from tinyft.optim.master import MasterWeights
from tinyft.optim.scaler import LARGEST
from tinyft.precision import PRODUCTS, ROUNDABLE, SUMS, rounded, to_float32
from tinyft.tensor import Tensor

F = np.float32

# ── cast_inputs ───────────────────────────────────────────────────────────────────────────────────
cast_inputs = Exercise(
    "precision:cast_inputs", difficulty=2, minutes=15, hints=(
        "First which dtype this op wants, if any: autocast_state.dtype for one of PRODUCTS, "
        "float32 for one of SUMS.  All others are given what came.",
        "Not everything that comes is a number to be rounded: there are token ids, masks, None, "
        "plain numbers, and float64 to check gradients with.  ROUNDABLE has the dtypes that may be "
        "changed.",
        "cast = lambda a: rounded(a, to) if is_array(a) and a.dtype in ROUNDABLE else a; then a "
        "list of cast(a) for the arrays, and a dict of them for the keywords."))
KINDS = (np.dtype(F), np.dtype(np.float16), bfloat16)
others = st.sampled_from(("add", "mul", "gelu", "reshape", "embedding", "cross_entropy"))
products = st.sampled_from(sorted(PRODUCTS))
sums = st.sampled_from(sorted(SUMS))
halves = st.sampled_from((bfloat16, np.dtype(np.float16)))
floats = st.sampled_from(KINDS)


def handed(f, name, arrays, kw, to):
    """The arguments of the op under autocast(to): a list of host arrays, and a dict."""
    with precision.autocast(to):
        out = f(name, [asarray(a) if isinstance(a, np.ndarray) else a for a in arrays],
                {k: asarray(a) for k, a in kw.items()})
    is_pair = isinstance(out, tuple) and len(out) == 2
    if not is_pair or not isinstance(out[0], (list, tuple)) or not isinstance(out[1], dict):
        raise Unusable(f"(list of arrays, dict of keywords) is wanted; yours is {out!r:.60}")
    close(len(out[0]), len(arrays), "the number of arrays")
    close(len(out[1]), len(kw), "the number of keywords")
    return out


def same(got, want, what, dtype=None):
    """As close does, dtypes too; compared in float64."""
    want = want if dtype is None else want.astype(dtype)
    if not is_array(got):
        raise Unusable(f"{what} should be an array; yours is {got!r:.60}")
    if got.dtype != want.dtype:
        raise Unusable(f"{what} is {got.dtype}, expected {want.dtype}")
    close(asnumpy(got).astype(float), want.astype(float), what)


@cast_inputs.law("a product gets all its inputs in 16 bits, of the kind that autocast was told",
                 a="n m", name=products, of=floats, to=halves)
def _(f, a, name, of, to):
    (x, y), _ = handed(f, name, [a.astype(F) / 3, a.astype(of)], {}, to)
    same(x, a.astype(F) / 3, f"{name}: what came as float32", to)
    same(y, a.astype(of), f"{name}: what came as {of}", to)


@cast_inputs.law("a sum gets them in float32", a="n m", name=sums, of=floats, to=halves)
def _(f, a, name, of, to):
    (x,), _ = handed(f, name, [a.astype(of)], {}, to)
    same(x, a, f"{name}: what came as {of}", F)


@cast_inputs.law("every other op gets what came", a="n m", name=others, of=floats, to=halves)
def _(f, a, name, of, to):
    (x,), _ = handed(f, name, [a.astype(of)], {}, to)
    same(x, a.astype(of), f"{name}: what came as {of}")


@cast_inputs.law("token ids, masks, None and plain numbers stay what they are", a="n m",
                 name=st.one_of(products, sums), to=halves)
def _(f, a, name, to):
    ids, mask = a.astype(np.int64), a > 0
    (x, y, none, number), _ = handed(f, name, [ids, mask, None, 0.1], {}, to)
    same(x, ids, f"{name}: an array of int64")
    same(y, mask, f"{name}: an array of bool")
    if none is not None or type(number) is not float or number != 0.1:
        raise Unusable(f"{name} was to be given None and 0.1 as they came; "
                       f"yours gives {none!r} and {number!r}")


@cast_inputs.law("float64, in which gradients are checked, stays", a="n m",
                 name=st.one_of(products, sums), to=halves)
def _(f, a, name, to):
    (x,), _ = handed(f, name, [a / 3], {}, to)
    same(x, a / 3, f"{name}: what came as float64")


@cast_inputs.law("what comes by keyword is an input too", a="n m", name=products, to=halves)
def _(f, a, name, to):
    _, kw = handed(f, name, [], {"bias": a.astype(F) / 3}, to)
    same(kw.get("bias"), a.astype(F) / 3, f"{name}: the keyword bias", to)


@cast_inputs.law("a sum's keywords too; a mask stays a mask, and float64 stays float64", a="n m",
                 name=sums, to=halves)
def _(f, a, name, to):
    _, kw = handed(f, name, [], {"weight": a.astype(to), "mask": a > 0, "scale": a / 3}, to)
    same(kw.get("weight"), a, f"{name}: the keyword weight", F)
    same(kw.get("mask"), a > 0, f"{name}: the keyword mask")
    same(kw.get("scale"), a / 3, f"{name}: the keyword scale")


def policy(name, arrays, kw, to, kinds=ROUNDABLE, keywords=True):
    """The answer, with the usual errors in it on demand."""
    if to is None:
        return arrays, kw

    def cast(a):
        return rounded(a, to) if is_array(a) and a.dtype in kinds else a

    return [cast(a) for a in arrays], {k: cast(a) if keywords else a for k, a in kw.items()}


def wanted(name):
    """The dtype that autocast wants for an op; None if the op takes its inputs as they are."""
    if name in PRODUCTS:
        return precision.autocast_state.dtype
    return np.dtype(F) if name in SUMS else None


@cast_inputs.wrong_answer("Autocast computes in 16 bits.", says="is bfloat16, expected float32")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs,
                  precision.autocast_state.dtype if name in PRODUCTS | SUMS else None)


@cast_inputs.wrong_answer("Float32 in, float32 added up: nothing to do for a sum.",
                          says="expected float32")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs,
                  precision.autocast_state.dtype if name in PRODUCTS else None)


@cast_inputs.wrong_answer("What is no product is float32.", says="is float32, expected",
                          subtle=True)
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs,
                  precision.autocast_state.dtype if name in PRODUCTS else np.dtype(F))


@cast_inputs.wrong_answer("What has 16 bits already may stay.",
                          says="is float16, expected bfloat16", subtle=True)
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name),
                  {np.dtype(F)} if name in PRODUCTS else ROUNDABLE)


@cast_inputs.wrong_answer("An array is an array.", says="expected int64")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name),
                  {*ROUNDABLE, np.dtype(np.float64), np.dtype(np.int64), np.dtype(bool)})


@cast_inputs.wrong_answer("Floating point is floating point.", says="expected float64")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name), {*ROUNDABLE, np.dtype(np.float64)})


@cast_inputs.wrong_answer("Keywords are options, not numbers.", says="the keyword bias is float32")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name), keywords=False)


@cast_inputs.wrong_answer("Only a product's keywords are numbers.", says="the keyword weight",
                          subtle=True)
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name), keywords=name in PRODUCTS)


@cast_inputs.wrong_answer("What comes by keyword is an array of numbers.", says="the keyword mask",
                          subtle=True)
def _(name, arrays, kwargs):
    to = wanted(name)
    if to is None:
        return arrays, kwargs
    return policy(name, arrays, {}, to)[0], {k: a.astype(to) for k, a in kwargs.items()}


@cast_inputs.wrong_answer("Sixteen bits are bfloat16.", says="is bfloat16, expected float16")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, bfloat16 if name in PRODUCTS else wanted(name))


@cast_inputs.wrong_answer("To round is to cut off.", says="entries")
def _(name, arrays, kwargs):
    def cut(a):
        is_wide = is_array(a) and a.dtype == F
        return (a.view(np.uint32) & np.uint32(0xffff0000)).view(F) if is_wide else a
    if name in PRODUCTS:
        arrays = [cut(a) for a in arrays]
    return policy(name, arrays, kwargs, wanted(name))


@cast_inputs.wrong_answer("A number is an array without axes.", says="None and 0.1", subtle=True)
def _(name, arrays, kwargs):
    arrays = [np.asarray(a, F) if isinstance(a, float) else a for a in arrays]
    return policy(name, arrays, kwargs, wanted(name))


# ── reclaim_values ────────────────────────────────────────────────────────────────────────────────
reclaim_values = Exercise(
    "optim.master:MasterWeights.reclaim_values", difficulty=3, minutes=20, in_place=True, hints=(
        "self.w is float32, and more exact than the 16-bit tensors.  To copy the tensors into it "
        "would undo every step that is still too small to be visible in 16 bits.  So copy only the "
        "tensors that were written from outside.",
        "There are two ways to write: p.data = another array, after which p.data is not "
        "self.views[name]; or into the array itself (p.copy_), which changes p.version[0].  "
        "self.versions[name] is its value after the optimiser's own last write.",
        "First find the written tensors, all of them.  Then call Group.reclaim_values(self): it "
        "makes every p.data its view again.  Then self.w[self.offsets[name]] = "
        "to_float32(self.views[name]).reshape(-1) for the written ones."))
HIDDEN = 2.0**-10  # beside 1, too small to be visible in bfloat16


def bound(*arrays):
    """A group of tensors in bfloat16 whose master weights have moved by less than bfloat16 can
    show.
    """
    made = {}
    for i, a in enumerate(arrays):
        made[f"tensor {i}"] = Tensor(asarray(a.astype(bfloat16)), requires_grad=True)
    group = MasterWeights(0.1, 0.0, dict(made))
    group.lay_out(0)
    group.w += HIDDEN
    group.write_rounded()
    for p in made.values():
        p.mark_written()
    group.record_versions()
    return group, list(made.values())


def joined(arrays):
    return np.concatenate([np.asarray(a, F).reshape(-1) for a in arrays])


def check_values(group, want, before, what="w"):
    """w holds the wanted values, the tensors hold them rounded, and every tensor is a view of the
    flat array.
    """
    in_16_bits = [np.asarray(a).astype(bfloat16).astype(F) for a in want]
    guesses = {"what rounding hides is lost: w was overwritten with the 16-bit values, though "
               "nobody wrote there": joined(in_16_bits),
               "a write from outside was not noticed": joined(before)}
    close(asnumpy(group.w), joined(want), what, guesses, dtype=True)
    close(asnumpy(to_float32(group.rounded)), joined(in_16_bits), "the values of the tensors")
    for name, p in group.tensors.items():
        if p.data is not group.views[name]:
            raise Unusable(f"the data of {name} is not its view of the flat array: "
                           "it would miss the next step")


@reclaim_values.law("nobody wrote: w keeps what rounding hides", a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, _ = bound(a, b)
    f(group)
    hidden = [a + HIDDEN, b + HIDDEN]
    check_values(group, hidden, hidden, "w, after steps too small to be visible")


@reclaim_values.law("p.data is another array now: w takes it", a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, (p, _) = bound(a, b)
    p.data = asarray((a + 8).astype(bfloat16))
    f(group)
    before = [a + HIDDEN, b + HIDDEN]
    check_values(group, [a + 8, b + HIDDEN], before, "w, after p.data = ... of the first tensor")


@reclaim_values.law("p.data was written in place: w takes it", a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, (_, p) = bound(a, b)
    p.copy_(b + 8)
    f(group)
    before = [a + HIDDEN, b + HIDDEN]
    check_values(group, [a + HIDDEN, b + 8], before, "w, after p.copy_(...) of the second tensor")


@reclaim_values.law("a write of the very value that is there counts as a write", a=positive("n m"))
def _(f, a):
    group, (p,) = bound(a)
    p.copy_(a)
    f(group)
    check_values(group, [a], [a + HIDDEN], "w, after p.copy_(the value of p)")


@reclaim_values.law("both ways at once, and p.data set to the very value that is there",
                    a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, (p, q) = bound(a, b)
    p.copy_(a + 8)
    p.data = asarray((a + 4).astype(bfloat16))
    q.data = asarray(b.astype(bfloat16))
    f(group)
    check_values(group, [a + 4, b], [a + HIDDEN, b + HIDDEN], "w, after both tensors were written")


def reclaimed(group, written):
    """The answer, for these names."""
    Group.reclaim_values(group)
    for name in written:
        group.w[group.offsets[name]] = to_float32(group.views[name]).reshape(-1)


def replaced(group):
    return {name for name, p in group.tensors.items() if p.data is not group.views[name]}


def counted(group):
    return {name for name, p in group.tensors.items() if p.version[0] != group.versions[name]}


@reclaim_values.wrong_answer("The tensors are the model; the copy follows them.",
                             says="what rounding hides is lost")
def _(self):
    reclaimed(self, set(self.tensors))


@reclaim_values.wrong_answer("The copy is the model; the tensors follow it.",
                             says="was not noticed")
def _(self):
    Group.reclaim_values(self)
    self.write_rounded()


@reclaim_values.wrong_answer("To write is to put another array there.", says="was not noticed")
def _(self):
    reclaimed(self, replaced(self))


@reclaim_values.wrong_answer("The version counts every write.", says="was not noticed")
def _(self):
    reclaimed(self, counted(self))


@reclaim_values.wrong_answer("First reclaim the tensors, then look for writes.",
                             says="was not noticed")
def _(self):
    Group.reclaim_values(self)
    reclaimed(self, replaced(self) | counted(self))


@reclaim_values.wrong_answer("A tensor that nobody wrote to has version 0.",
                             says="what rounding hides is lost")
def _(self):
    ever_written = {name for name, p in self.tensors.items() if p.version[0] > 0}
    reclaimed(self, replaced(self) | ever_written)


@reclaim_values.wrong_answer("Where the values are the same, nobody wrote.",
                             says="was not noticed")
def _(self):
    different = set()
    for name, p in self.tensors.items():
        from_w = self.w[self.offsets[name]].reshape(p.shape).astype(p.dtype)
        if bool((p.data != from_w).any()):
            different.add(name)
    reclaimed(self, different)


@reclaim_values.wrong_answer("An array with the same values is the same array.",
                             says="entries", subtle=True)
def _(self):
    changed = set()
    for name in replaced(self):
        p = self.tensors[name]
        if (to_float32(p.data) != to_float32(self.views[name])).any():
            changed.add(name)
    reclaimed(self, changed | counted(self))


@reclaim_values.wrong_answer("The tensors were written, so the flat array is the old one.",
                             says="the values of the tensors")
def _(self):
    for name in replaced(self) | counted(self):
        self.w[self.offsets[name]] = to_float32(self.tensors[name].data).reshape(-1)


@reclaim_values.wrong_answer("One tensor is written at a time.", says="entries", subtle=True)
def _(self):
    written = sorted(replaced(self) | counted(self))
    reclaimed(self, written[:1])


@reclaim_values.wrong_answer("What a tensor holds is what w holds, rounded.", says="w")
def _(self):
    reclaimed(self, replaced(self) | counted(self))
    self.w[...] = to_float32(self.w.astype(bfloat16))


@reclaim_values.wrong_answer("A write adds to what is hidden.", says="w")
def _(self):
    written = replaced(self) | counted(self)
    hidden = self.w - to_float32(self.w.astype(bfloat16))
    reclaimed(self, written)
    for name in written:
        self.w[self.offsets[name]] += hidden[self.offsets[name]]


# ── update ────────────────────────────────────────────────────────────────────────────────────────
update = Exercise(
    "optim.scaler:GradScaler.update", difficulty=1, minutes=10, in_place=True, hints=(
        "self.finite is False if the last step was skipped, self.good_steps counts good steps in a "
        "row, self.current_scale is S.",
        "Three cases: a skipped step makes S smaller; the last of growth_interval good steps makes "
        "it larger; any other good step is counted.",
        "In a row: a skipped step sets the count to 0, and so does growth.  If not self.enabled, "
        "nothing changes."))
settings = {"S": st.sampled_from([8.0, 64.0, 1024.0, 1.0]), "growth": st.sampled_from([2.0, 4.0]),
            "backoff": st.sampled_from([0.5, 0.25]), "interval": st.integers(2, 7)}


def updated(f, S, growth, backoff, interval, good, finite):
    """(S, number of good steps) after a step."""
    scaler = GradScaler(S, growth, backoff, interval)
    scaler.good_steps = good
    scaler.finite = finite
    f(scaler)
    return scaler.current_scale, scaler.good_steps


@update.law("after a skipped step S is multiplied by backoff_factor", **settings,
            good=st.integers(0, 1))
def _(f, S, growth, backoff, interval, good):
    guesses = {"it is halved, whatever backoff_factor is": S / 2, "S is as before": S,
               "it is divided by growth_factor": S / growth}
    scale, _ = updated(f, S, growth, backoff, interval, good, finite=False)
    close(scale, S * backoff, "S", guesses)


@update.law("a good step is counted, and S stays", **settings)
def _(f, S, growth, backoff, interval):
    scale, good = updated(f, S, growth, backoff, interval, interval - 2, finite=True)
    what = f"S after {interval - 1} good steps in a row, for growth_interval = {interval}"
    close(scale, S, what, {"it grew a step too early": S * growth})
    close(good, interval - 1, "the count", {"the step is not counted": interval - 2})


@update.law("the last of growth_interval good steps in a row: S grows by growth_factor", **settings)
def _(f, S, growth, backoff, interval):
    guesses = {"S did not grow: this was the last of so many steps, not one before": S,
               "it is doubled, whatever growth_factor is": 2 * S}
    scale, _ = updated(f, S, growth, backoff, interval, interval - 1, finite=True)
    close(scale, S * growth, f"S after {interval} good steps in a row", guesses)


@update.law("a skipped step ends the row: the count starts at 0", **settings,
            good=st.integers(1, 3))
def _(f, S, growth, backoff, interval, good):
    guesses = {"skipped steps do not reset the count: good steps must be in a row": good,
               "the skipped step is counted as a good one": good + 1}
    _, count = updated(f, S, growth, backoff, interval + 3, good, finite=False)
    close(count, 0, "the count after a skipped step", guesses)


@update.law("growth ends the row: the count starts at 0", **settings)
def _(f, S, growth, backoff, interval):
    guesses = {"the count goes on, so that S never grows again, or grows at every step": interval}
    _, count = updated(f, S, growth, backoff, interval, interval - 1, finite=True)
    close(count, 0, "the count after S has grown", guesses)


@update.law("S grows up to LARGEST, 2⁶⁰, and is there after the last step",
            growth=settings["growth"],
            S=st.sampled_from([LARGEST, LARGEST / 2, LARGEST * 0.75]), interval=st.integers(1, 3))
def _(f, growth, S, interval):
    scale, _ = updated(f, S, growth, 0.5, interval, interval - 1, finite=True)
    guesses = {"S grows past LARGEST: S times a loss would overflow": S * growth,
               "S does not reach LARGEST": S}
    close(scale, LARGEST, "S", guesses)


@update.law("a step changes S and the count alone", **settings, good=st.integers(0, 1),
            finite=st.booleans())
def _(f, S, growth, backoff, interval, good, finite):
    scaler = GradScaler(S, growth, backoff, interval)
    scaler.good_steps = good
    scaler.finite = finite
    f(scaler)
    others = [scaler.growth_factor, scaler.backoff_factor, scaler.growth_interval, scaler.finite]
    close(np.array(others, float), np.array([growth, backoff, interval, finite], float),
          "growth_factor, backoff_factor, growth_interval and finite")


@update.law("enabled=False: S stays 1", steps=st.integers(1, 3))
def _(f, steps):
    scaler = GradScaler(8.0, growth_interval=1, enabled=False)
    for _ in range(steps):
        f(scaler)
    what = f"S, after {steps} good steps for growth_interval = 1"
    close(scaler.current_scale, 1.0, what, {"it grows though enabled is False": 2.0**steps})


def moved(scaler, good, in_a_row=True, reset=True):
    """The answer, growing when `good` is the interval; without the resets on demand."""
    if not scaler.enabled:
        return
    scaler.good_steps = good if scaler.finite or not in_a_row else 0
    if not scaler.finite:
        scaler.current_scale *= scaler.backoff_factor
    elif scaler.good_steps == scaler.growth_interval:
        scaler.current_scale = min(scaler.current_scale * scaler.growth_factor, LARGEST)
        if reset:
            scaler.good_steps = 0


@update.wrong_answer("Backing off is halving.", says="whatever backoff_factor", subtle=True)
def _(self):
    before = self.current_scale
    moved(self, self.good_steps + 1)
    if self.enabled and not self.finite:
        self.current_scale = before / 2


@update.wrong_answer("A growth that went too far is undone by growth_factor.",
                says="divided by growth_factor", subtle=True)
def _(self):
    before = self.current_scale
    moved(self, self.good_steps + 1)
    if self.enabled and not self.finite:
        self.current_scale = before / self.growth_factor


@update.wrong_answer("So many good steps, in a row or not.", says="must be in a row", subtle=True)
def _(self):
    moved(self, self.good_steps + self.finite, in_a_row=False)


@update.wrong_answer("After N good steps: at the next one.", says="did not grow")
def _(self):
    if not self.enabled:
        return
    if not self.finite:
        self.current_scale *= self.backoff_factor
        self.good_steps = 0
    elif self.good_steps == self.growth_interval:
        self.current_scale *= self.growth_factor
        self.good_steps = 0
    else:
        self.good_steps += 1


@update.wrong_answer("The count says how long all has gone well.",
                     says="the count goes on", subtle=True)
def _(self):
    moved(self, self.good_steps + 1, reset=False)


@update.wrong_answer("enabled=False means that S is 1 at the start.",
                     says="it grows though", subtle=True)
def _(self):
    enabled = self.enabled
    self.enabled = True
    moved(self, self.good_steps + 1)
    self.enabled = enabled


@update.wrong_answer("S may grow as long as all goes well.", says="past LARGEST", subtle=True)
def _(self):
    before = self.current_scale
    moved(self, self.good_steps + 1)
    if self.current_scale == LARGEST:
        self.current_scale = before * self.growth_factor


@update.wrong_answer("Where S would pass LARGEST, it stays.", says="does not reach", subtle=True)
def _(self):
    before = self.current_scale
    moved(self, self.good_steps + 1)
    if self.current_scale == LARGEST:
        self.current_scale = before


@update.wrong_answer("After an update the step is over, so `finite` is True again.",
                     says="growth_factor, backoff_factor", subtle=True)
def _(self):
    moved(self, self.good_steps + 1)
    self.finite = True


@update.wrong_answer("A scale that went too far grows more slowly afterwards.",
                     says="growth_factor, backoff_factor", subtle=True)
def _(self):
    moved(self, self.good_steps + 1)
    if self.enabled and not self.finite:
        self.growth_factor = max(self.growth_factor / 2, 1.5)


@update.wrong_answer("S is never below 16.", says="off")
def _(self):
    moved(self, self.good_steps + 1)
    if self.enabled:
        self.current_scale = max(self.current_scale, 16.0)


@update.wrong_answer("A scale below 1 scales nothing.", says="S", subtle=True)
def _(self):
    moved(self, self.good_steps + 1)
    if self.enabled:
        self.current_scale = max(self.current_scale, 1.0)
