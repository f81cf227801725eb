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
    "precision:cast_inputs", difficulty=2, minutes=15,
    may_use="rounded(a, dtype) (a in this dtype, also in float32), is_array(a), "
            "autocast_state.dtype (the 16-bit dtype of the autocast region), FLOAT32, and the "
            "sets PRODUCTS, SUMS (names of ops) and ROUNDABLE (dtypes).",
    example="""
        >>> from tinyft.precision import autocast
        >>> x = np.array([1.5, 257.0], np.float32)
        >>> ids = np.array([3, 4])
        >>> with autocast("bfloat16"):
        ...     arrays, kwargs = cast_inputs("matmul", [x, ids], {"bias": x})
        >>> arrays[0]
        array([1.5, 256], dtype=bfloat16)
        >>> arrays[1]
        array([3, 4])
        >>> kwargs["bias"]
        array([1.5, 256], dtype=bfloat16)
        """,
    hints=(
        "First find the dtype that this op wants: autocast_state.dtype if its name is in PRODUCTS, "
        "FLOAT32 if it is in SUMS.  Any other op gets its inputs unchanged.",
        "Some inputs must stay as they are even then: token ids, masks, None, plain numbers, and "
        "float64 arrays, with which gradients are checked.  ROUNDABLE holds the dtypes that you "
        "may change.",
        "Write a small function for one input: it returns rounded(a, dtype) if is_array(a) and "
        "a.dtype is in ROUNDABLE, else a.  Apply it to each array of the list, and to each value "
        "of the dict."))
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


@cast_inputs.law("a product gets all its arrays in the 16-bit dtype of the autocast region",
                 a="n m", name=products, of=floats, to=halves)
def _(f, a, name, of, to):
    (x, y), _ = handed(f, name, [a.astype(F) / 3, a.astype(of)], {}, to)
    same(x, a.astype(F) / 3, f"{name}: the array of float32", to)
    same(y, a.astype(of), f"{name}: the array of {of}", to)


@cast_inputs.law("a sum gets its array in float32", a="n m", name=sums, of=floats, to=halves)
def _(f, a, name, of, to):
    (x,), _ = handed(f, name, [a.astype(of)], {}, to)
    same(x, a, f"{name}: the array of {of}", F)


@cast_inputs.law("every other op gets its inputs as they are, by keyword too", a="n m", name=others,
                 of=floats, to=halves)
def _(f, a, name, of, to):
    (x,), kw = handed(f, name, [a.astype(of)], {"weight": a.astype(of)}, to)
    same(x, a.astype(of), f"{name}: the array of {of}")
    same(kw.get("weight"), a.astype(of), f"{name}: the keyword weight of {of}")


@cast_inputs.law("token ids, masks, None and plain numbers stay as they are", a="n m",
                 name=st.one_of(products, sums), to=halves)
def _(f, a, name, to):
    ids, mask = a.astype(np.int64), a > 0
    (x, y, none, number), _ = handed(f, name, [ids, mask, None, 0.1], {}, to)
    same(x, ids, f"{name}: an array of int64")
    same(y, mask, f"{name}: an array of bool")
    if none is not None or type(number) is not float or number != 0.1:
        raise Unusable(f"{name} should get None and 0.1 as they are; "
                       f"yours gives it {none!r} and {number!r}")


@cast_inputs.law("an array of float64 stays float64", a="n m",
                 name=st.one_of(products, sums), to=halves)
def _(f, a, name, to):
    (x,), _ = handed(f, name, [a / 3], {}, to)
    same(x, a / 3, f"{name}: the array of float64")


@cast_inputs.law("a product's keywords are cast too", a="n m", name=products, to=halves)
def _(f, a, name, to):
    _, kw = handed(f, name, [], {"bias": a.astype(F) / 3}, to)
    same(kw.get("bias"), a.astype(F) / 3, f"{name}: the keyword bias", to)


@cast_inputs.law("a sum's keywords are cast too; a mask and an array of float64 stay", a="n m",
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


@cast_inputs.wrong_answer("Under autocast every op computes in 16 bits.",
                          says="is bfloat16, expected float32")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs,
                  precision.autocast_state.dtype if name in PRODUCTS | SUMS else None)


@cast_inputs.wrong_answer("The inputs of a sum are float32 anyway.",
                          says="expected float32")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs,
                  precision.autocast_state.dtype if name in PRODUCTS else None)


@cast_inputs.wrong_answer("Every op that is no product computes in float32.",
                          says="is float32, expected",
                          subtle=True)
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs,
                  precision.autocast_state.dtype if name in PRODUCTS else np.dtype(F))


@cast_inputs.wrong_answer("An array that has 16 bits already may stay as it is.",
                          says="is float16, expected bfloat16", subtle=True)
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name),
                  {np.dtype(F)} if name in PRODUCTS else ROUNDABLE)


@cast_inputs.wrong_answer("Token ids and masks are arrays, so they are cast too.",
                          says="expected int64")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name),
                  {*ROUNDABLE, np.dtype(np.float64), np.dtype(np.int64), np.dtype(bool)})


@cast_inputs.wrong_answer("Every array of floats may be cast, float64 too.",
                          says="expected float64")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name), {*ROUNDABLE, np.dtype(np.float64)})


@cast_inputs.wrong_answer("Keywords are options, no arrays.", says="the keyword bias is float32")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name), keywords=False)


@cast_inputs.wrong_answer("Only the keywords of a product are arrays.", says="the keyword weight",
                          subtle=True)
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, wanted(name), keywords=name in PRODUCTS)


@cast_inputs.wrong_answer("Every keyword holds an array of floats.", says="the keyword mask",
                          subtle=True)
def _(name, arrays, kwargs):
    to = wanted(name)
    if to is None:
        return arrays, kwargs
    return policy(name, arrays, {}, to)[0], {k: a.astype(to) for k, a in kwargs.items()}


@cast_inputs.wrong_answer("The keywords of any other op are safest in float32.",
                          says="the keyword weight", subtle=True)
def _(name, arrays, kwargs):
    if name in PRODUCTS | SUMS:
        return policy(name, arrays, kwargs, wanted(name))
    return arrays, policy(name, [], kwargs, np.dtype(F))[1]


@cast_inputs.wrong_answer("16 bits always mean bfloat16.", says="is bfloat16, expected float16")
def _(name, arrays, kwargs):
    return policy(name, arrays, kwargs, bfloat16 if name in PRODUCTS else wanted(name))


@cast_inputs.wrong_answer("To round is to cut off the last bits.", says="entries")
def _(name, arrays, kwargs):
    def cut(a):
        is_wide = is_array(a) and a.dtype == F
        return (a.view(np.uint32) & np.uint32(0xffff0000)).view(F) if is_wide else a
    if name in PRODUCTS:
        arrays = [cut(a) for a in arrays]
    return policy(name, arrays, kwargs, wanted(name))


@cast_inputs.wrong_answer("A plain number is an array without axes.",
                          says="None and 0.1", subtle=True)
def _(name, arrays, kwargs):
    arrays = [np.asarray(a, F) if isinstance(a, float) else a for a in arrays]
    return policy(name, arrays, kwargs, wanted(name))


# ── reclaim_values ────────────────────────────────────────────────────────────────────────────────
reclaim_values = Exercise(
    "optim.master:MasterWeights.reclaim_values", difficulty=3, minutes=20, in_place=True,
    may_use="Group.reclaim_values(self), to_float32(a), self.tensors ({name: tensor}), and the "
            "attributes self.w (flat), self.views, self.offsets and self.versions, which are "
            "explained in the docstring.",
    example="""
        >>> from tinyft import Tensor
        >>> from tinyft.array import bfloat16
        >>> from tinyft.optim.master import MasterWeights
        >>> p = Tensor(np.array([1, 2], bfloat16), requires_grad=True)
        >>> q = Tensor(np.array([3, 4], bfloat16), requires_grad=True)
        >>> group = MasterWeights(lr=0.1, decay=0.0, tensors={"p": p, "q": q})
        >>> group.lay_out(moments=0)
        >>> group.w += 0.001                         # too small to be visible in bfloat16
        >>> _ = p.copy_(np.array([5.0, 6.0]))        # written from outside
        >>> reclaim_values(group)
        >>> group.w
        array([5.   , 6.   , 3.001, 4.001], dtype=float32)
        """,
    hints=(
        "self.w is float32, and more exact than the 16-bit tensors.  If you copy every tensor into "
        "it, you undo all steps that are too small to be visible in 16 bits.  Copy only the "
        "tensors that were written from outside.",
        "There are two ways to write.  After p.data = another array, p.data is not "
        "self.views[name].  A write into the array itself (p.copy_) changes p.version[0]; "
        "self.versions[name] is its value after the optimiser's own last write.",
        "First collect the names of all written tensors.  Then call Group.reclaim_values(self): it "
        "makes every p.data its view again.  Then, for each of these names, "
        "self.w[self.offsets[name]] = to_float32(self.views[name]).reshape(-1)."))
HIDDEN = 2.0**-10  # beside 1, too small to be visible in bfloat16


def bound(*arrays):
    """A group of tensors in bfloat16.  Their master weights have moved, but by too little to be
    visible in bfloat16.
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
    guesses = {"small steps are lost: w was overwritten with the 16-bit values of a tensor that "
               "nobody wrote to": joined(in_16_bits),
               "a write from outside was not noticed": joined(before)}
    close(asnumpy(group.w), joined(want), what, guesses, dtype=True)
    close(asnumpy(to_float32(group.rounded)), joined(in_16_bits), "the values of the tensors")
    for name, p in group.tensors.items():
        if p.data is not group.views[name]:
            raise Unusable(f"the data of {name} is not its view of the flat array: "
                           "it would miss the next step")


@reclaim_values.law("nobody wrote: w keeps steps that 16 bits cannot show",
                    a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, _ = bound(a, b)
    f(group)
    hidden = [a + HIDDEN, b + HIDDEN]
    check_values(group, hidden, hidden, "w, after steps too small to be visible")


@reclaim_values.law("p.data is another array: w takes its values",
                    a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, (p, _) = bound(a, b)
    p.data = asarray((a + 8).astype(bfloat16))
    f(group)
    before = [a + HIDDEN, b + HIDDEN]
    check_values(group, [a + 8, b + HIDDEN], before, "w, after p.data = ... of the first tensor")


@reclaim_values.law("p.data was written in place: w takes the values",
                    a=positive("n m"), b=positive("k"))
def _(f, a, b):
    group, (_, p) = bound(a, b)
    p.copy_(b + 8)
    f(group)
    before = [a + HIDDEN, b + HIDDEN]
    check_values(group, [a + HIDDEN, b + 8], before, "w, after p.copy_(...) of the second tensor")


@reclaim_values.law("a write of the value that is already there counts as a write",
                    a=positive("n m"))
def _(f, a):
    group, (p,) = bound(a)
    p.copy_(a)
    f(group)
    check_values(group, [a], [a + HIDDEN], "w, after p.copy_(the value of p)")


@reclaim_values.law("both ways at once; and another array with the value that is already there",
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


@reclaim_values.wrong_answer("The tensors are the model, so w is copied from them.",
                             says="small steps are lost")
def _(self):
    reclaimed(self, set(self.tensors))


@reclaim_values.wrong_answer("w is the model, so the tensors are copied from it.",
                             says="was not noticed")
def _(self):
    Group.reclaim_values(self)
    self.write_rounded()


@reclaim_values.wrong_answer("A write always puts another array into p.data.",
                             says="was not noticed")
def _(self):
    reclaimed(self, replaced(self))


@reclaim_values.wrong_answer("The version changes at every write.", says="was not noticed")
def _(self):
    reclaimed(self, counted(self))


@reclaim_values.wrong_answer("First reclaim the tensors, then look for writes.",
                             says="was not noticed")
def _(self):
    Group.reclaim_values(self)
    reclaimed(self, replaced(self) | counted(self))


@reclaim_values.wrong_answer("A tensor that nobody wrote to has version 0.",
                             says="small steps are lost")
def _(self):
    ever_written = {name for name, p in self.tensors.items() if p.version[0] > 0}
    reclaimed(self, replaced(self) | ever_written)


@reclaim_values.wrong_answer("A tensor with unchanged values was not written to.",
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


@reclaim_values.wrong_answer("Only w needs the new values.",
                             says="the values of the tensors")
def _(self):
    for name in replaced(self) | counted(self):
        self.w[self.offsets[name]] = to_float32(self.tensors[name].data).reshape(-1)


@reclaim_values.wrong_answer("Only one tensor is written between two steps.",
                             says="entries", subtle=True)
def _(self):
    written = sorted(replaced(self) | counted(self))
    reclaimed(self, written[:1])


@reclaim_values.wrong_answer("Afterwards w holds what the tensors hold, rounded values.", says="w")
def _(self):
    reclaimed(self, replaced(self) | counted(self))
    self.w[...] = to_float32(self.w.astype(bfloat16))


@reclaim_values.wrong_answer("The part of w that 16 bits cannot show outlives a write.", says="w")
def _(self):
    written = replaced(self) | counted(self)
    hidden = self.w - to_float32(self.w.astype(bfloat16))
    reclaimed(self, written)
    for name in written:
        self.w[self.offsets[name]] += hidden[self.offsets[name]]


@reclaim_values.wrong_answer("It is enough to copy the new values into the flat arrays.",
                             says="is not its view")
def _(self):
    for name in replaced(self) | counted(self):
        p = self.tensors[name]
        self.views[name][...] = p.data
        self.w[self.offsets[name]] = to_float32(p.data).reshape(-1)


# ── update ────────────────────────────────────────────────────────────────────────────────────────
update = Exercise(
    "optim.scaler:GradScaler.update", difficulty=1, minutes=10, in_place=True,
    may_use="min, LARGEST, and the attributes of self that the docstring names.",
    example="""
        >>> from tinyft.optim import GradScaler
        >>> scaler = GradScaler(init_scale=8.0, growth_interval=2)
        >>> update(scaler)                           # the first good step
        >>> scaler.current_scale, scaler.good_steps
        (8.0, 1)
        >>> update(scaler)                           # the second
        >>> scaler.current_scale, scaler.good_steps
        (16.0, 0)
        >>> scaler.finite = False                    # a gradient overflowed
        >>> update(scaler)
        >>> scaler.current_scale, scaler.good_steps
        (8.0, 0)
        """,
    hints=(
        "self.finite is False if the last step was skipped.  self.good_steps counts the good steps "
        "in a row.  self.current_scale is S.",
        "There are three cases.  A skipped step makes S smaller.  The last of growth_interval good "
        "steps makes it larger.  Any other good step is counted.",
        "Begin with `if not self.enabled: return`.  A skipped step sets the count to 0, and so "
        "does growth.  S never exceeds LARGEST: min(S * self.growth_factor, LARGEST)."))
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


@update.law("after growth_interval good steps in a row S is multiplied by growth_factor",
            **settings)
def _(f, S, growth, backoff, interval):
    guesses = {"S did not grow: this was the last of so many steps, not one before": S,
               "it is doubled, whatever growth_factor is": 2 * S}
    scale, _ = updated(f, S, growth, backoff, interval, interval - 1, finite=True)
    close(scale, S * growth, f"S after {interval} good steps in a row", guesses)


@update.law("after a skipped step the count is 0", **settings,
            good=st.integers(1, 3))
def _(f, S, growth, backoff, interval, good):
    guesses = {"skipped steps do not reset the count: good steps must be in a row": good,
               "the skipped step is counted as a good one": good + 1}
    _, count = updated(f, S, growth, backoff, interval + 3, good, finite=False)
    close(count, 0, "the count after a skipped step", guesses)


@update.law("after S has grown the count is 0", **settings)
def _(f, S, growth, backoff, interval):
    guesses = {"the count goes on, so that S never grows again, or grows at every step": interval}
    _, count = updated(f, S, growth, backoff, interval, interval - 1, finite=True)
    close(count, 0, "the count after S has grown", guesses)


@update.law("S grows up to LARGEST, which is 2⁶⁰, and no further",
            growth=settings["growth"],
            S=st.sampled_from([LARGEST, LARGEST / 2, LARGEST * 0.75]), interval=st.integers(1, 3))
def _(f, growth, S, interval):
    scale, _ = updated(f, S, growth, 0.5, interval, interval - 1, finite=True)
    guesses = {"S grows past LARGEST: S times a loss would overflow": S * growth,
               "S does not reach LARGEST": S}
    close(scale, LARGEST, "S", guesses)


@update.law("nothing but S and the count is changed", **settings, good=st.integers(0, 1),
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


@update.law("enabled=False: no step is counted", steps=st.integers(1, 3))
def _(f, steps):
    scaler = GradScaler(8.0, growth_interval=4, enabled=False)
    for _ in range(steps):
        f(scaler)
    guesses = {"steps are counted though enabled is False": steps}
    close(scaler.good_steps, 0, f"the count after {steps} good steps", guesses)


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


@update.wrong_answer("growth_interval good steps need not be in a row.",
                     says="must be in a row", subtle=True)
def _(self):
    moved(self, self.good_steps + self.finite, in_a_row=False)


@update.wrong_answer("S grows at the step after growth_interval good ones.", says="did not grow")
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


@update.wrong_answer("The count says how many steps went well since the last skipped one.",
                     says="the count goes on", subtle=True)
def _(self):
    moved(self, self.good_steps + 1, reset=False)


@update.wrong_answer("enabled=False means that S is 1 at the start.",
                     says="it grows though")
def _(self):
    enabled = self.enabled
    self.enabled = True
    moved(self, self.good_steps + 1)
    self.enabled = enabled


@update.wrong_answer("Good steps are counted also while S is fixed.", says="steps are counted",
                     subtle=True)
def _(self):
    if self.enabled:
        moved(self, self.good_steps + 1)
    else:
        self.good_steps = (self.good_steps + 1) % self.growth_interval


@update.wrong_answer("S may grow without a limit as long as no step overflows.",
                     says="past LARGEST", subtle=True)
def _(self):
    before = self.current_scale
    moved(self, self.good_steps + 1)
    if self.current_scale == LARGEST:
        self.current_scale = before * self.growth_factor


@update.wrong_answer("If S would exceed LARGEST, it does not change.",
                     says="does not reach", subtle=True)
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


@update.wrong_answer("S is at least 16.", says="off")
def _(self):
    moved(self, self.good_steps + 1)
    if self.enabled:
        self.current_scale = max(self.current_scale, 16.0)


@update.wrong_answer("S is at least 1: a smaller scale is of no use.", says="S", subtle=True)
def _(self):
    moved(self, self.good_steps + 1)
    if self.enabled:
        self.current_scale = max(self.current_scale, 1.0)
