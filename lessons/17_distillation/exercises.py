"""Lesson 17, the teacher: the loss of its distribution, its pass, its largest logits."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.array import asarray, put_like
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes
from tinyft.nn import Context, Module, Parameter, evaluation_mode
from tinyft.tensor import Tensor, no_grad
from tinyft.train.batch import Targets

SOFT = "compress.distill.soft:"
WHOLE = (1, 2, -1, 3, -2, 0)


def check(got, want, what, guesses, rtol=1e-9):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items()
             if np.shape(a) != np.shape(want) or not np.allclose(a, want, equal_nan=True)}
    close(got, want, what, wrong, rtol=rtol, atol=1e-10)


def tensor(a):
    return Tensor(asarray(np.array(a, np.float64)), requires_grad=True)


# ── distillation_loss ─────────────────────────────────────────────────────────────────────────────
distillation_loss = Exercise(
    f"{SOFT}distillation_loss", difficulty=3, minutes=25, lines=7,
    closed=("functional:kl_divergence",),
    may_use="ops.log_softmax(x), ops.exp(x) and x.sum(axis=-1) of tensors; x.detach(), the same "
            "tensor without a gradient; ops.gather(x, columns), which picks x[i, columns[i, j]] "
            "for x (N, V); w.sum() of an array.",
    example="""
        Teacher: probabilities 1/4 and 3/4. Student: 1/2 and 1/2.
        >>> z_s, z_t = Tensor([[0.0, 0.0]]), Tensor([[0.0, np.log(3.0)]])
        >>> loss = distillation_loss(z_s, z_t, np.ones(1), temperature=1.0)
        >>> round(float(loss.numpy()), 4)                  # 1/4 ln(1/2) + 3/4 ln(3/2)
        0.1308

        At T = 2 the teacher has 1/(1+√3) and √3/(1+√3), and the loss is 4 KL.
        >>> loss = distillation_loss(z_s, z_t, np.ones(1), temperature=2.0)
        >>> round(float(loss.numpy()), 4)
        0.1454
        """,
    hints=(
        "Begin with the logarithms of both distributions, at the temperature T. The teacher's "
        "logits are detached. Then KL of each row is the sum of p_t (ln p_t − ln p_s).",
        "ln p is ops.log_softmax(z * (1 / temperature)). With columns, the student's ln p over all "
        "V classes comes first, and then ops.gather picks the k columns.",
        "(kl * weight).sum() * (temperature**2) / weight.sum(), where kl (N,) is the sum over the "
        "last axis."))


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl_rows(log_p, log_q):
    """KL(p ‖ q) of each row."""
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def logs(z_s, z_t, T, columns=None):
    """(ln p_t, ln p_s) at the temperature T."""
    log_q = log_softmax(z_s / T)
    if columns is not None:
        log_q = np.take_along_axis(log_q, columns, -1)
    return log_softmax(z_t / T), log_q


def right_loss(z_s, z_t, w, T, columns=None):
    return T**2 * (kl_rows(*logs(z_s, z_t, T, columns)) * w).sum() / w.sum()


def guessed_losses(z_s, z_t, w, T):
    log_p, log_q = logs(z_s, z_t, T)
    want = right_loss(z_s, z_t, w, T)
    mean = (kl_rows(log_p, log_q) * w).sum() / w.sum()
    cross = T**2 * ((np.exp(log_p) * log_q).sum(-1) * w).sum() / w.sum()
    at_1 = T**2 * (kl_rows(log_p, log_softmax(z_s)) * w).sum() / w.sum()
    teacher_at_1 = T**2 * (kl_rows(log_softmax(z_t), log_q) * w).sum() / w.sum()
    return {"KL is the wrong way round: the teacher's probabilities are the weights":
                T**2 * (kl_rows(log_q, log_p) * w).sum() / w.sum(),
            "it is divided by the number of classes V, too: the sum is over the classes":
                want / z_s.shape[-1],
            "the factor T² is missing": mean,
            "the factor is T; it should be T²": T * mean,
            "the student's softmax is at T = 1; both are at T": at_1,
            "the teacher's softmax is at T = 1; both are at T": teacher_at_1,
            "the logits are multiplied with T; they are divided by it":
                right_loss(z_s * T**2, z_t * T**2, w, T),
            "it is Σ p_t ln p_s: the sign is wrong, and the entropy is missing": cross,
            "it is the cross-entropy, KL and the entropy of the teacher: at a perfect match it "
            "is not 0": -cross,
            "it is the sum over the rows; it should be their mean": want * w.sum(),
            "every row has the same weight": right_loss(z_s, z_t, np.ones(len(w)), T),
            "it is divided by the number of rows N; it should be by Σ w": want * w.sum() / len(w),
            "it is the squared distance of the logits":
                (((z_s - z_t)**2).sum(-1) * w).sum() / w.sum()}


@st.composite
def two_models(
    draw: Callable, weighted: bool = False, warm: bool = True, equal: bool = False,
    scale: float = 1.0,
):
    """Logits of a student and of a teacher (n, v + 1), weights of the rows, a temperature.

    equal: the student's logits are the teacher's plus 3. scale: a factor of all logits."""
    n, v = draw(sizes()), draw(sizes()) + 1
    student = draw_array(draw, (n, v), WHOLE, np.float64)
    teacher = scale * draw_array(draw, (n, v), WHOLE[::-1], np.float64)
    student = teacher + 3 if equal else scale * student
    weight = np.ones(n)
    if weighted:
        weight = draw_array(draw, (n,), (2, 1, 0, 3), np.float64)
        weight[draw(st.integers(0, n - 1))] = 2.0
    T = draw(st.sampled_from((2.0, 4.0, 3.0))) if warm else 1.0
    return named(student=student, teacher=teacher, weight=weight, temperature=T)


def loss_of(f, z_s, z_t, w, T, columns=None):
    """The result, a Tensor; and the tensors of student and teacher."""
    student, teacher = tensor(z_s), tensor(z_t)
    more = () if columns is None else (columns,)
    out = f(student, teacher, w, T, *more)
    if not isinstance(out, Tensor):
        raise Unusable(f"the result should be a Tensor; yours is a {type(out).__name__}")
    return out, student, teacher


@distillation_loss.law("at T = 1 it is the mean of KL(p_t ‖ p_s) over the rows",
                       given=two_models(warm=False))
def _(f, given):
    out, *_ = loss_of(f, *given)
    check(out, right_loss(*given), "the loss", guessed_losses(*given))


@distillation_loss.law("it is 0 where the student's logits are the teacher's, up to a constant",
                       given=two_models(equal=True))
def _(f, given):
    out, *_ = loss_of(f, *given)
    check(out, np.float64(0), "the loss", guessed_losses(*given))


@distillation_loss.law("T softens both distributions, and T² multiplies KL", given=two_models())
def _(f, given):
    out, *_ = loss_of(f, *given)
    check(out, right_loss(*given), "the loss", guessed_losses(*given))


@distillation_loss.law("row i counts with w[i] / Σ w", given=two_models(weighted=True))
def _(f, given):
    out, *_ = loss_of(f, *given)
    check(out, right_loss(*given), "the loss", guessed_losses(*given))


def renormalised_loss(z_s, z_t, w, T, columns):
    """The student's softmax is over the k columns alone."""
    return right_loss(np.take_along_axis(z_s, columns, -1), z_t, w, T)


@distillation_loss.law("with columns: p_t is a softmax over the k logits, p_s over all V classes",
                       given=two_models(), seed=st.integers(0, 99))
def _(f, given, seed):
    z_s, z_t, w, T = given
    n, v = z_s.shape
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, v))
    columns = np.argsort(rng.random((n, v)), axis=-1)[:, :k]
    z_t = z_t[:, :k]
    out, *_ = loss_of(f, z_s, z_t, w, T, columns)
    guesses = {"the student's softmax is over the k columns alone: nothing keeps it from giving "
               "probability to the other classes": renormalised_loss(z_s, z_t, w, T, columns),
               "the columns are not used: the teacher's logits belong to these classes":
                   right_loss(z_s, z_t, w, T, np.tile(np.arange(k), (n, 1)))}
    check(out, right_loss(z_s, z_t, w, T, columns), f"the loss with the columns {columns.tolist()}",
          guesses)


@distillation_loss.law("the student's gradient is T (p_s − p_t) w / Σ w",
                       given=two_models(weighted=True))
def _(f, given):
    z_s, z_t, w, T = given
    out, student, _ = loss_of(f, *given)
    if not out.requires_grad:
        raise Unusable("the student gets no gradient: work with tensors, without .data and "
                       ".numpy(), and detach the teacher, not the student")
    out.backward()
    if student.grad is None:
        raise Unusable("the student gets no gradient: detach the teacher, not the student")
    log_p, log_q = logs(z_s, z_t, T)
    want = T * (np.exp(log_q) - np.exp(log_p)) * w[:, None] / w.sum()
    check(student.grad, want, "the gradient of the student's logits", {})


@distillation_loss.law("the teacher gets no gradient", given=two_models())
def _(f, given):
    out, _, teacher = loss_of(f, *given)
    if out.requires_grad:
        out.backward()
    if teacher.grad is not None:
        raise Unusable("the teacher gets a gradient: it would move towards the student, and each "
                       "step would pay for its backward pass; detach it")


@distillation_loss.law("logits of thousands give a finite loss", given=two_models(scale=5000.0))
def _(f, given):
    with np.errstate(all="ignore"):
        out, *_ = loss_of(f, *given)
    check(out, right_loss(*given), "the loss", {})


def logs_of(student, teacher, temperature, columns=None):
    """(ln p_t, ln p_s), tensors."""
    log_p = ops.log_softmax(teacher.detach() * (1 / temperature))
    log_q = ops.log_softmax(student * (1 / temperature))
    return log_p, log_q if columns is None else ops.gather(log_q, columns)


def mean_of(rows, weight):
    return (rows * weight).sum() / weight.sum()


@distillation_loss.wrong_answer("KL is a distance, so the order does not matter.",
                                says="the wrong way round")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    rows = (ops.exp(log_q) * (log_q - log_p)).sum(axis=-1)
    return mean_of(rows, weight) * temperature**2


@distillation_loss.wrong_answer("A mean is a mean over all entries.", says="number of classes V")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    rows = (ops.exp(log_p) * (log_p - log_q)).mean(axis=-1)
    return mean_of(rows, weight) * temperature**2


@distillation_loss.wrong_answer("The temperature is in the softmax already.",
                                says="the factor T² is missing")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    return mean_of((ops.exp(log_p) * (log_p - log_q)).sum(axis=-1), weight)


@distillation_loss.wrong_answer("The logits were divided by T, so the loss is multiplied with T.",
                                says="the factor is T;")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    return mean_of((ops.exp(log_p) * (log_p - log_q)).sum(axis=-1), weight) * temperature


@distillation_loss.wrong_answer("The temperature is the teacher's; the student answers as it is.",
                                says="the student's softmax is at T = 1")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student * temperature, teacher, temperature, columns)
    return mean_of((ops.exp(log_p) * (log_p - log_q)).sum(axis=-1), weight) * temperature**2


@distillation_loss.wrong_answer("The teacher's probabilities are what they are.",
                                says="the teacher's softmax is at T = 1")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher * temperature, temperature, columns)
    return mean_of((ops.exp(log_p) * (log_p - log_q)).sum(axis=-1), weight) * temperature**2


@distillation_loss.wrong_answer("A high temperature makes the logits large.",
                                says="multiplied with T")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, 1 / temperature, columns)
    return mean_of((ops.exp(log_p) * (log_p - log_q)).sum(axis=-1), weight) * temperature**2


@distillation_loss.wrong_answer("The loss is Σ t ln s, as the lecture writes it.",
                                says="the sign is wrong")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    return mean_of((ops.exp(log_p) * log_q).sum(axis=-1), weight) * temperature**2


@distillation_loss.wrong_answer("The cross-entropy with the teacher is its KL.",
                                says="entropy of the teacher")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    return mean_of((ops.exp(log_p) * log_q).sum(axis=-1), weight) * -temperature**2


@distillation_loss.wrong_answer("To imitate a teacher is to have its logits.",
                                says="squared distance of the logits")
def _(student, teacher, weight, temperature, columns=None):
    difference = student - teacher.detach()
    return mean_of((difference * difference).sum(axis=-1), weight)


@distillation_loss.wrong_answer("Every token adds its KL to the loss.",
                                says="sum over the rows")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    rows = (ops.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return (rows * weight).sum() * temperature**2


@distillation_loss.wrong_answer("A weight is for the labels; the teacher speaks of every row.",
                                says="the same weight")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    return (ops.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean() * temperature**2


@distillation_loss.wrong_answer("A weighted mean is the mean of the weighted rows.",
                                says="the number of rows N")
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature, columns)
    rows = (ops.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return (rows * weight).mean() * temperature**2


@distillation_loss.wrong_answer("Nobody updates the teacher, so its gradient does no harm.",
                                says="the teacher gets a gradient", subtle=True)
def _(student, teacher, weight, temperature, columns=None):
    log_p = ops.log_softmax(teacher * (1 / temperature))
    _, log_q = logs_of(student, teacher, temperature, columns)
    return mean_of((ops.exp(log_p) * (log_p - log_q)).sum(axis=-1), weight) * temperature**2


@distillation_loss.wrong_answer("Both are detached: a loss is a number.",
                                says="the student gets no gradient", subtle=True)
def _(student, teacher, weight, temperature, columns=None):
    with no_grad():
        log_p, log_q = logs_of(student, teacher, temperature, columns)
        rows = (ops.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        return mean_of(rows, weight) * temperature**2


@distillation_loss.wrong_answer("The logarithm of a softmax is log_softmax.",
                                says="nan or inf", subtle=True)
def _(student, teacher, weight, temperature, columns=None):
    log_p, _ = logs_of(student, teacher, temperature, columns)
    q = ops.softmax(student * (1 / temperature))
    if columns is not None:
        q = ops.gather(q, columns)
    return mean_of((ops.exp(log_p) * (log_p - ops.log(q))).sum(axis=-1), weight) * temperature**2


@distillation_loss.wrong_answer("Where the teacher has k classes, the student has them, too.",
                                says="over the k columns alone", subtle=True)
def _(student, teacher, weight, temperature, columns=None):
    if columns is not None:
        student = ops.gather(student, columns)
    log_p, log_q = logs_of(student, teacher, temperature)
    return mean_of((ops.exp(log_p) * (log_p - log_q)).sum(axis=-1), weight) * temperature**2


@distillation_loss.wrong_answer("The k largest logits are those of the first k classes.",
                                says="the columns are not used", subtle=True)
def _(student, teacher, weight, temperature, columns=None):
    log_p, log_q = logs_of(student, teacher, temperature)
    log_q = log_q[:, :log_p.shape[-1]]
    return mean_of((ops.exp(log_p) * (log_p - log_q)).sum(axis=-1), weight) * temperature**2


# ── run_teacher ───────────────────────────────────────────────────────────────────────────────────
run_teacher = Exercise(
    f"{SOFT}run_teacher", difficulty=2, minutes=10,
    may_use="targets.ids; targets.context(), a Context with the facts of the batch, such as its "
            "mask; teacher(ids, ctx), which fills ctx; evaluation_mode(teacher), for a `with`: "
            "within it all parts of the teacher are in evaluation mode and nothing is recorded, "
            "and after it each part is in its own mode again.",
    example="""
        >>> from tinyft.tensor import Tensor
        >>> class Always(Module):                          # its logits are 1 and 2 for any token
        ...     def forward(self, ids, ctx):
        ...         ctx.output = Tensor(np.tile([1.0, 2.0], (*ids.shape, 1)))
        ...         return ctx.output
        >>> targets = Targets(np.array([[7, 8]]), {}, None, None, 2.0)
        >>> run_teacher(Always(), targets).output.numpy()
        array([[[1., 2.],
                [1., 2.]]])
        """,
    hints=(
        "The pass fills a Context: its output holds the logits, last_hidden_state the states. "
        "Make it before the call and return it after.",
        "targets.context() knows the mask and the positions of which logits are wanted. A bare "
        "Context() does not.",
        "with evaluation_mode(teacher): teacher(targets.ids, ctx). It also turns recording off. "
        "teacher.eval() would leave the teacher in evaluation mode, and record the pass."))


class Part(Module):
    """Adds 100 while it trains, as dropout would change the logits."""

    def forward(self, x, ctx):
        return x + 100.0 if self.training else x


class Teacher(Module):
    """The logits of token i are row i of a table: 0 at padding, at the wanted positions alone."""

    def __init__(self, table, fails=False):
        self.table = Parameter(asarray(table.copy()))
        self.part = Part()
        self._fails = fails

    def forward(self, ids, ctx):
        if self._fails:
            raise ArithmeticError("the teacher fails")
        logits = self.part(self.table[asarray(np.asarray(ids))], ctx)
        if ctx.mask is not None:
            logits = logits * put_like(np.asarray(ctx.mask)[..., None], logits.data, np.float64)
        if ctx.logit_positions is not None:
            logits = logits.reshape(-1, logits.shape[-1])[asarray(ctx.logit_positions)]
        ctx.output = logits
        return logits


@st.composite
def a_batch(draw: Callable, masked: bool = False, some: bool = False):
    """A table (4, v) of logits, and targets with ids (b, t)."""
    b, t, v = draw(sizes()), draw(sizes()), draw(sizes())
    table = draw_array(draw, (4, v), (1, 2, -1, 3, -2), np.float64)
    ids = draw_array(draw, (b, t), (1, 2, 3, 0), np.int64)
    mask = draw_array(draw, (b, t), (False, True), bool) if masked else None
    positions = np.arange(0, b * t, 2) if some else None
    facts = {} if mask is None else {"mask": mask}
    return named(table=table, ids=ids, mask=mask,
                 targets=Targets(ids, facts, None, positions, float(b * t)))


def output_of(f, teacher, targets):
    """The logits in the Context that f returns."""
    ctx = f(teacher, targets)
    if not isinstance(ctx, Context):
        raise Unusable(f"the result should be a Context; yours is a {type(ctx).__name__}")
    if not isinstance(ctx.output, Tensor):
        raise Unusable("the output of the Context is empty: give it to the teacher's call")
    return ctx.output


@run_teacher.law("the Context holds the teacher's logits", given=a_batch())
def _(f, given):
    table, ids, _, targets = given
    teacher = Teacher(table).eval()
    close(output_of(f, teacher, targets), table[ids], "the logits")


@run_teacher.law("the batch's mask reaches the teacher", given=a_batch(masked=True))
def _(f, given):
    table, ids, mask, targets = given
    teacher = Teacher(table).eval()
    check(output_of(f, teacher, targets), table[ids] * mask[..., None], "the logits",
          {"the teacher sees no mask: padding is a token for it": table[ids]})


@run_teacher.law("only the wanted positions have logits", given=a_batch(some=True))
def _(f, given):
    table, ids, _, targets = given
    teacher = Teacher(table).eval()
    want = table[ids].reshape(-1, table.shape[-1])[::2]
    if output_of(f, teacher, targets).shape != want.shape:
        raise Unusable("the teacher computes logits at all positions; the batch wants them at "
                       f"{targets.logit_positions.tolist()}")


@run_teacher.law("a teacher in training mode is evaluated, too", given=a_batch())
def _(f, given):
    table, ids, _, targets = given
    teacher = Teacher(table).train()
    check(output_of(f, teacher, targets), table[ids], "the logits",
          {"the teacher is in training mode in this pass: its dropout would be active":
           table[ids] + 100})


def modes(teacher):
    return np.array([module.training for module in teacher.modules()])


@run_teacher.law("after the pass each part of the teacher has the mode that it had",
                 given=a_batch(), mixed=st.booleans())
def _(f, given, mixed):
    teacher = Teacher(given[0]).train()
    if mixed:
        teacher.part.eval()
    before = modes(teacher)
    f(teacher, given[3])
    check(modes(teacher), before, "where a part of the teacher is in training mode",
          {"the teacher is left in evaluation mode": before & False,
           "all parts are in training mode now; one was in evaluation mode": before | True})


@run_teacher.law("also if the pass fails", given=a_batch())
def _(f, given):
    teacher = Teacher(given[0], fails=True).train()
    before = modes(teacher)
    try:
        f(teacher, given[3])
    except ArithmeticError:
        pass
    close(modes(teacher), before,
          "where a part of the teacher is in training mode, after its pass raised an error")


@run_teacher.law("the pass is not recorded: no gradient can reach the teacher", given=a_batch())
def _(f, given):
    output = output_of(f, Teacher(given[0]).eval(), given[3])
    if output.requires_grad:
        raise Unusable("the teacher's pass is recorded: a backward pass would go through the "
                       "teacher, and its activations are kept until then")


@run_teacher.wrong_answer("The logits are what a teacher gives.", says="should be a Context")
def _(teacher, targets):
    with evaluation_mode(teacher):
        return teacher(targets.ids, targets.context())


@run_teacher.wrong_answer("A pass needs the ids and an empty Context.", says="sees no mask")
def _(teacher, targets):
    ctx = Context()
    with evaluation_mode(teacher):
        teacher(targets.ids, ctx)
    return ctx


@run_teacher.wrong_answer("A teacher needs the mask, and gives logits everywhere.",
                          says="logits at all positions", subtle=True)
def _(teacher, targets):
    ctx = Context(**targets.facts)
    with evaluation_mode(teacher):
        teacher(targets.ids, ctx)
    return ctx


@run_teacher.wrong_answer("Without recording, nothing else can go wrong.",
                          says="in training mode in this pass", subtle=True)
def _(teacher, targets):
    ctx = targets.context()
    with no_grad():
        teacher(targets.ids, ctx)
    return ctx


@run_teacher.wrong_answer("A teacher is in evaluation mode for good.",
                          says="left in evaluation mode")
def _(teacher, targets):
    ctx = targets.context()
    teacher.eval()
    with no_grad():
        teacher(targets.ids, ctx)
    return ctx


@run_teacher.wrong_answer("After eval() comes train().", says="all parts are in training mode")
def _(teacher, targets):
    ctx = targets.context()
    teacher.eval()
    try:
        with no_grad():
            teacher(targets.ids, ctx)
    finally:
        teacher.train()
    return ctx


@run_teacher.wrong_answer("After the pass, each part gets its mode back.",
                          says="after its pass raised an error", subtle=True)
def _(teacher, targets):
    ctx = targets.context()
    before = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    with no_grad():
        teacher(targets.ids, ctx)
    for module, training in before:
        module.training = training
    return ctx


@run_teacher.wrong_answer("Evaluation mode means that nothing is recorded.",
                          says="pass is recorded", subtle=True)
def _(teacher, targets):
    ctx = targets.context()
    before = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    try:
        teacher(targets.ids, ctx)
    finally:
        for module, training in before:
            module.training = training
    return ctx


# ── largest ───────────────────────────────────────────────────────────────────────────────────────
largest = Exercise(
    "compress.distill.cache:largest", difficulty=2, minutes=15, on_host=True, lines=6,
    may_use="np.argsort(a, axis=-1, kind=\"stable\"), which sorts from the smallest; "
            "np.take_along_axis(a, columns, axis=-1); a.astype(np.int32).  (The library calls "
            "np.argpartition first: it finds the k largest of V faster than a sort.)",
    example="""
        >>> values, columns = largest(np.array([[1.0, 4.0, -2.0, 3.0]]), 2)
        >>> values
        array([[4., 3.]])
        >>> columns
        array([[1, 3]], dtype=int32)
        """,
    hints=(
        "The columns that sort −logits are those of the largest logits, largest first.",
        "Cut them to the first k. A k of None, or one larger than V, means all V of them: a slice "
        "[:, :None] takes all.",
        "columns = np.argsort(-logits, axis=-1, kind=\"stable\")[:, :k].astype(np.int32), and the "
        "values are np.take_along_axis(logits, columns, axis=-1)."))


@st.composite
def different_logits(draw: Callable):
    """Logits (n, v + 1), all entries of a row different."""
    n, v = draw(sizes()), draw(sizes()) + 1
    rows = [draw(st.permutations(range(v))) for _ in range(n)]
    return np.array(rows, np.float64) - v // 2


def pair_of(f, logits, k):
    """(values, columns) that f returns."""
    made = f(logits, k)
    if not isinstance(made, tuple) or len(made) != 2:
        raise Unusable(f"it should return two arrays, (values, columns); yours is {made!r:.60}")
    return made


def guessed_values(logits, k):
    ordered = np.sort(logits, axis=-1)[:, ::-1]
    by_size = np.take_along_axis(logits, np.argsort(-abs(logits), -1, kind="stable"), -1)
    e = np.exp(ordered - ordered[:, :1])
    flat = np.sort(logits, axis=None)[::-1][:k]
    return {"these are the smallest": ordered[:, ::-1][:, :k],
            "the largest comes last; it comes first": ordered[:, :k][:, ::-1],
            "they are the largest without their signs; −3 is smaller than 1": by_size[:, :k],
            "these are probabilities; the cache keeps logits, which have a temperature later":
                (e / e.sum(-1, keepdims=True))[:, :k],
            "the k largest of all rows together; each row has its own": flat}


@largest.law("k = 1: the largest logit of each row", logits=different_logits())
def _(f, logits):
    values, _ = pair_of(f, logits, 1)
    check(values, logits.max(-1, keepdims=True), "the values", guessed_values(logits, 1))


@largest.law("the k largest logits of each row, largest first", logits=different_logits(), k="size")
def _(f, logits, k):
    k = min(k, logits.shape[-1])
    values, _ = pair_of(f, logits, k)
    check(values, np.sort(logits, axis=-1)[:, ::-1][:, :k], "the values", guessed_values(logits, k))


@largest.law("columns are the classes of these logits", logits=different_logits(), k="size")
def _(f, logits, k):
    k = min(k, logits.shape[-1])
    _, columns = pair_of(f, logits, k)
    order = np.argsort(-logits, axis=-1)
    ranks = np.argsort(order, axis=-1)
    check(np.asarray(columns, np.int64), order[:, :k], "the columns",
          {"these are the ranks of the classes, not the classes": ranks[:, :k],
           "these are 0, 1, 2, ...: the places in the result":
               np.tile(np.arange(k), (len(logits), 1))})


@largest.law("k = None, or a k of more than V, gives all logits, largest first",
             logits=different_logits(), more=st.sampled_from((None, 3)))
def _(f, logits, more):
    k = None if more is None else logits.shape[-1] + more
    values, columns = pair_of(f, logits, k)
    check(values, np.sort(logits, axis=-1)[:, ::-1], f"the values for k={k}",
          {"the logits are in their own order; the largest comes first": logits})
    close(np.asarray(columns, np.int64), np.argsort(-logits, axis=-1), f"the columns for k={k}")


@largest.law("columns are int32: 4 bytes each", logits=different_logits())
def _(f, logits):
    _, columns = pair_of(f, logits, 2)
    want = np.argsort(-logits, axis=-1)[:, :2].astype(np.int32)
    close(columns, want, "the columns", dtype=True)


def sorted_pair(logits, columns):
    return np.take_along_axis(logits, columns, axis=-1), columns.astype(np.int32)


@largest.wrong_answer("argsort begins with the largest.", says="these are the smallest")
def _(logits, k):
    return sorted_pair(logits, np.argsort(logits, axis=-1)[:, :k])


@largest.wrong_answer("The last k of a sort are the k largest, in any order.",
                      says="the largest comes last")
def _(logits, k):
    columns = np.argsort(logits, axis=-1)
    return sorted_pair(logits, columns if k is None else columns[:, -k:])


@largest.wrong_answer("Large means far from zero.", says="without their signs")
def _(logits, k):
    return sorted_pair(logits, np.argsort(-abs(logits), axis=-1, kind="stable")[:, :k])


@largest.wrong_answer("A teacher's output is probabilities.", says="probabilities")
def _(logits, k):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return sorted_pair(p, np.argsort(-logits, axis=-1)[:, :k])


@largest.wrong_answer("The k largest are those of the whole batch.", says="each row has its own")
def _(logits, k):
    columns = np.argsort(-logits.ravel())[:k]
    return logits.ravel()[columns], columns.astype(np.int32)


@largest.wrong_answer("The rank of a class is its column.", says="the ranks")
def _(logits, k):
    order = np.argsort(-logits, axis=-1)
    values, _ = sorted_pair(logits, order[:, :k])
    return values, np.argsort(order, axis=-1)[:, :k].astype(np.int32)


@largest.wrong_answer("A place in the result is a column.", says="0, 1, 2")
def _(logits, k):
    values = np.sort(logits, axis=-1)[:, ::-1][:, :k]
    columns = np.tile(np.arange(values.shape[-1]), (len(logits), 1))
    return values, columns.astype(np.int32)


@largest.wrong_answer("All logits need no order.", says="in their own order", subtle=True)
def _(logits, k):
    columns = np.argsort(-logits, axis=-1)
    if k is None or k > logits.shape[-1]:
        columns = np.tile(np.arange(logits.shape[-1]), (len(logits), 1))
    return sorted_pair(logits, columns[:, :k])


@largest.wrong_answer("There are always more than k classes.", says="Error", subtle=True)
def _(logits, k):
    columns = np.argpartition(-logits, k - 1, axis=-1)[:, :k]
    order = np.argsort(-np.take_along_axis(logits, columns, axis=-1), axis=-1)
    return sorted_pair(logits, np.take_along_axis(columns, order, axis=-1))


@largest.wrong_answer("An index is an index: its dtype does not matter.", says="dtype is int64",
                      subtle=True)
def _(logits, k):
    columns = np.argsort(-logits, axis=-1)[:, :k]
    return np.take_along_axis(logits, columns, axis=-1), columns
