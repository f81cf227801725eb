"""Lesson 19, training: the two losses of the router, and the whole layer."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft import Context, Module, Parameter, SwitchConfig, ops
from tinyft.array import asarray, asnumpy, xp
from tinyft.learn.diagnose import Unusable, close, described
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes
from tinyft.models.moe import SwitchMLP
from tinyft.tensor import Tensor

MOE = "models.moe:"


def check(got, want, what, guesses):
    """close, with the guesses that differ from the expected result."""
    want = np.asarray(want)
    wrong = {}
    for words, guess in guesses.items():
        guess = np.asarray(guess)
        if guess.shape != want.shape or not np.allclose(guess, want):
            wrong[words] = guess
    close(got, want, what, wrong)


def scalar(made, what):
    """The learner's loss, a Tensor of one number that has a gradient."""
    if not isinstance(made, Tensor):
        raise Unusable(f"{what} should be a Tensor; yours is {described(made)}")
    if not made.requires_grad:
        raise Unusable(f"{what} has no gradient, so it trains nothing: compute with Tensors, "
                       "without .data and .numpy()")
    return made


def one_hot(choice, experts):
    return xp(choice).arange(experts) == choice[..., None]


def leaf(a):
    return Tensor(asarray(np.array(a, np.float64)), requires_grad=True)


# ── balance_loss ──────────────────────────────────────────────────────────────────────────────────
balance_loss = Exercise(
    f"{MOE}balance_loss", difficulty=3, minutes=20,
    may_use="token_weights(real, dtype), 1/n at each of the n real tokens, 0 at padding, with "
            "shape (B, T, 1): the sum of a times these weights is a mean over the real tokens; "
            "chosen.any(axis=-1), True at a real token; .sum(axis=(0, 1)); * of Tensors and "
            "arrays.",
    example="""
        Two tokens, two experts; both tokens choose expert 0. f = (1, 0), P = (0.75, 0.25).
        >>> p = Tensor(np.array([[[0.9, 0.1], [0.6, 0.4]]]))
        >>> chosen = np.array([[[True, False], [True, False]]])
        >>> round(float(balance_loss(p, chosen).numpy()), 3)                 # 2 · 0.75
        1.5
        """,
    hints=(
        "f is a share of the tokens, P is a mean of probabilities: both are means over all real "
        "tokens of the batch. Then E times the sum of f P.",
        "f comes from `chosen`, an array, and has no gradient. P comes from the Tensor.",
        "weight = token_weights(chosen.any(axis=-1), probabilities.dtype);  "
        "f = (chosen * weight).sum(axis=(0, 1)), P in the same way from probabilities;  "
        "(P * f).sum() * E."))


@st.composite
def tokens_with_experts(draw: Callable, rows: int = 1, padding: bool = False,
                        uniform: bool = False):
    """probabilities and chosen (B, T, E)."""
    B = draw(sizes()) + rows - 1 if rows > 1 or padding else 1
    T = draw(sizes()) + padding
    E = draw(sizes()) + 1
    k = draw_array(draw, (B, T, E), (1, 2, 3, 4), np.float64)
    if uniform:
        k = np.ones_like(k)
    choice = draw_array(draw, (B, T), tuple(range(E)), np.int64)
    chosen = one_hot(choice, E)
    if padding:
        lengths = np.array([draw(st.integers(1, T - 1)) for _ in range(B)])
        chosen &= (np.arange(T) < lengths[:, None])[..., None]
    return named(probabilities=k / k.sum(-1, keepdims=True), chosen=chosen)


def shares(p, chosen, counted=None):
    """(f, P): means over the real tokens; counted: over these tokens instead."""
    real = chosen.any(-1) if counted is None else counted
    n = real.sum()
    return (chosen & real[..., None]).sum((0, 1)) / n, (p * real[..., None]).sum((0, 1)) / n


def right_balance(p, chosen):
    f, P = shares(p, chosen)
    return chosen.shape[-1] * (f * P).sum()


def mean_of_rows(p, chosen):
    return np.mean([right_balance(p[b:b + 1], chosen[b:b + 1]) for b in range(len(p))])


def guessed_balance(p, chosen):
    f, P = shares(p, chosen)
    E = chosen.shape[-1]
    n = chosen.any(-1).sum()
    everywhere = np.ones(chosen.shape[:2], bool)
    f_all, P_all = shares(p, chosen, everywhere)
    by_p = one_hot(p.argmax(-1), E) & chosen.any(-1, keepdims=True)
    return {
        "the factor E is missing: with perfect balance it should be 1": (f * P).sum(),
        "the factor E is there twice": E**2 * (f * P).sum(),
        "it is E Σ f²: one factor should be P, which has a gradient": E * (f * f).sum(),
        "it is E Σ P²: one factor should be f, the share of tokens that choose an expert":
            E * (P * P).sum(),
        "f is a number of tokens; it should be a share": E * n * (f * P).sum(),
        "f and P are sums over the tokens; they should be means": E * n**2 * (f * P).sum(),
        "padding is counted: f and P are means over the real tokens": E * (f_all * P_all).sum(),
        "padding is counted in P": E * (f * P_all).sum(),
        "padding is counted in the number of tokens of f": E * (f_all * P).sum(),
        "it is the mean of the losses of the rows; f and P are means over the whole batch":
            mean_of_rows(p, chosen),
        "f is counted from the largest probabilities; `chosen` says which expert was chosen":
            right_balance(p, by_p),
        "1 is subtracted: with perfect balance it should be 1": E * (f * P).sum() - 1}


def balance_of(f, p, chosen):
    P = leaf(p)
    return scalar(f(P, asarray(chosen)), "the loss"), P


def check_balance(f, given):
    p, chosen = given
    loss, _ = balance_of(f, p, chosen)
    check(loss, right_balance(p, chosen), "the loss", guessed_balance(p, chosen))


@balance_loss.law("equal probabilities: it is 1", given=tokens_with_experts(uniform=True))
def _(f, given):
    check_balance(f, given)


@balance_loss.law("it is E Σ f P", given=tokens_with_experts())
def _(f, given):
    check_balance(f, given)


@balance_loss.law("f and P are means over all rows", given=tokens_with_experts(rows=2))
def _(f, given):
    check_balance(f, given)


@balance_loss.law("padding does not count", given=tokens_with_experts(padding=True))
def _(f, given):
    check_balance(f, given)


@balance_loss.law("the gradient of p at a real token is E f / n",
                  given=tokens_with_experts(padding=True))
def _(f, given):
    p, chosen = given
    loss, P = balance_of(f, p, chosen)
    loss.backward()
    share, _ = shares(p, chosen)
    real = chosen.any(-1)
    gradient = chosen.shape[-1] * share * real[..., None] / real.sum()
    check(asnumpy(P.grad), gradient, "the gradient of the probabilities", {})


@balance_loss.wrong_answer("The loss is Σ f P.", says="factor E is missing")
def _(probabilities, chosen):
    f, _ = shares(probabilities.data, chosen)
    weight = chosen.any(-1, keepdims=True) / chosen.any(-1).sum()
    return ((probabilities * weight).sum(axis=(0, 1)) * f).sum()


@balance_loss.wrong_answer("Each sum over experts gets a factor E.", says="there twice")
def _(probabilities, chosen):
    f, _ = shares(probabilities.data, chosen)
    weight = chosen.any(-1, keepdims=True) / chosen.any(-1).sum()
    return ((probabilities * weight).sum(axis=(0, 1)) * f).sum() * chosen.shape[-1]**2


@balance_loss.wrong_answer("The shares should be equal, so the loss needs only the shares.",
                           says="has no gradient")
def _(probabilities, chosen):
    f, _ = shares(probabilities.data, chosen)
    return Tensor(chosen.shape[-1] * (f * f).sum())


@balance_loss.wrong_answer("P alone says who is preferred.", says="one factor should be f")
def _(probabilities, chosen):
    weight = chosen.any(-1, keepdims=True) / chosen.any(-1).sum()
    P = (probabilities * weight).sum(axis=(0, 1))
    return (P * P).sum() * chosen.shape[-1]


@balance_loss.wrong_answer("f is how many tokens an expert has.", says="it should be a share")
def _(probabilities, chosen):
    weight = chosen.any(-1, keepdims=True) / chosen.any(-1).sum()
    P = (probabilities * weight).sum(axis=(0, 1))
    return (P * chosen.sum(axis=(0, 1))).sum() * chosen.shape[-1]


@balance_loss.wrong_answer("Sums and means are the same up to α.", says="they should be means")
def _(probabilities, chosen):
    real = chosen.any(-1, keepdims=True)
    P = (probabilities * real).sum(axis=(0, 1))
    return (P * chosen.sum(axis=(0, 1))).sum() * chosen.shape[-1]


@balance_loss.wrong_answer("Padding has probabilities, so it counts.",
                           says="padding is counted in P")
def _(probabilities, chosen):
    f, _ = shares(probabilities.data, chosen)
    tokens = chosen.shape[0] * chosen.shape[1]
    return (probabilities.sum(axis=(0, 1)) * f).sum() * (chosen.shape[-1] / tokens)


@balance_loss.wrong_answer("A mean divides by B T.", says="padding is counted in the number")
def _(probabilities, chosen):
    weight = chosen.any(-1, keepdims=True) / chosen.any(-1).sum()
    P = (probabilities * weight).sum(axis=(0, 1))
    return (P * chosen.mean(axis=(0, 1))).sum() * chosen.shape[-1]


@balance_loss.wrong_answer("Each row balances itself.", says="the mean of the losses of the rows")
def _(probabilities, chosen):
    real = chosen.any(-1, keepdims=True)
    weight = real / real.sum(axis=1, keepdims=True)
    f = (chosen * weight).sum(axis=1)
    P = (probabilities * weight).sum(axis=1)
    return (P * f).sum() * (chosen.shape[-1] / len(chosen))


@balance_loss.wrong_answer("Perfect balance costs nothing.", says="1 is subtracted")
def _(probabilities, chosen):
    f, _ = shares(probabilities.data, chosen)
    weight = chosen.any(-1, keepdims=True) / chosen.any(-1).sum()
    P = (probabilities * weight).sum(axis=(0, 1))
    return (P * f).sum() * chosen.shape[-1] - 1


@balance_loss.wrong_answer("The probability of the chosen expert is the one that matters.",
                           says="the gradient of the probabilities", subtle=True)
def _(probabilities, chosen):
    f, _ = shares(probabilities.data, chosen)
    weight = chosen.any(-1, keepdims=True) / chosen.any(-1).sum()
    of_others = Tensor(probabilities.data * ~chosen)
    P = ((probabilities * chosen + of_others) * weight).sum(axis=(0, 1))
    return (P * f).sum() * chosen.shape[-1]


# ── z_loss ────────────────────────────────────────────────────────────────────────────────────────
z_loss = Exercise(
    f"{MOE}z_loss", difficulty=2, minutes=15,
    may_use="ops.exp, ops.log; .sum(axis=-1, keepdims=True); logits.data.max(axis=-1, "
            "keepdims=True), the largest logit of each token; token_weights(real, dtype), as in "
            "balance_loss.",
    example="""
        One token with the logits ln 1 and ln 3: the sum of the exponentials is 4.
        >>> z = Tensor(np.log([[[1.0, 3.0]]]))
        >>> round(float(z_loss(z, np.array([[True]])).numpy()), 3)           # (ln 4)²
        1.922
        """,
    hints=(
        "For each token: the logarithm of the sum of exponentials, over the experts. Its square. "
        "Then the mean over the real tokens.",
        "exp(1000) overflows. With m, the largest logit of a token, ln Σ exp z is "
        "ln Σ exp(z − m) + m.",
        "log_sum = ops.log(ops.exp(z - m).sum(axis=-1, keepdims=True)) + m, with shape (B, T, 1);  "
        "(log_sum * log_sum * token_weights(real, z.dtype)).sum()."))


def log_sums(z):
    top = z.max(-1)
    return np.log(np.exp(z - top[..., None]).sum(-1)) + top


def right_z(z, real):
    return (log_sums(z)**2)[real].mean()


def without_keepdims(z, real):
    """(B, T) squares times the weights (B, T, 1), as NumPy broadcasts them."""
    B, T = real.shape
    if B not in (1, T):
        return right_z(z, real)                          # NumPy would raise an error
    return (log_sums(z)**2 * (real / real.sum())[..., None]).sum()


def guessed_z(z, real):
    sums = log_sums(z)
    top = z.max(-1)
    return {
        "the squares have shape (B, T), and the weights (B, T, 1): their product is (B, T, T). Use "
        "keepdims=True": without_keepdims(z, real),
        "the square is missing": sums[real].mean(),
        "it is the square of the mean; it should be the mean of the squares": sums[real].mean()**2,
        "it is the mean of Σ z²; the square is taken of ln Σ exp z": (z**2).sum(-1)[real].mean(),
        "it is the square of the largest logit; ln Σ exp z counts the others as well":
            (top**2)[real].mean(),
        "m was subtracted from the logits, and not added again": ((sums - top)**2)[real].mean(),
        "it is Σ exp z without its logarithm": (np.exp(np.minimum(sums, 50))**2)[real].mean(),
        "it is a sum over the tokens; it should be their mean": (sums**2)[real].sum(),
        "padding is counted: it is the mean over the real tokens": (sums**2).mean(),
        "padding is counted in the number of tokens": (sums**2)[real].sum() / real.size}


def z_of(f, z, real):
    logits = leaf(z)
    with np.errstate(all="ignore"):
        return scalar(f(logits, asarray(real)), "the loss"), logits


@st.composite
def logits_of_tokens(draw: Callable, experts: int = 1, padding: bool = False, large: bool = False):
    """logits (B, T, E), logarithms of small whole numbers, and real (B, T). large: times ±1000."""
    B = draw(sizes())
    T = draw(sizes()) + 1
    E = draw(sizes()) + experts - 1 if experts > 1 else 1
    k = draw_array(draw, (B, T, E), (2, 3, 4, 5), np.float64)
    real = np.ones((B, T), bool)
    if padding:
        real = np.arange(T) < np.array([draw(st.integers(1, T - 1)) for _ in range(B)])[:, None]
    scale = draw(st.sampled_from((1000.0, -1000.0))) if large else 1.0
    return named(logits=scale * np.log(k), real=real)


def check_z(f, given):
    z, real = given
    loss, _ = z_of(f, z, real)
    check(loss, right_z(z, real), "the loss", guessed_z(z, real))


@z_loss.law("one expert: the mean of z²", given=logits_of_tokens())
def _(f, given):
    check_z(f, given)


@z_loss.law("the mean of (ln Σ exp z)²", given=logits_of_tokens(experts=2))
def _(f, given):
    check_z(f, given)


@z_loss.law("padding does not count", given=logits_of_tokens(experts=2, padding=True))
def _(f, given):
    check_z(f, given)


@z_loss.law("large logits do not overflow", given=logits_of_tokens(experts=2, large=True))
def _(f, given):
    check_z(f, given)


@z_loss.law("the gradient of z at a real token is 2 ln(Σ exp z) softmax(z) / n",
            given=logits_of_tokens(experts=2, padding=True))
def _(f, given):
    z, real = given
    loss, logits = z_of(f, z, real)
    loss.backward()
    sums = log_sums(z)[..., None]
    gradient = 2 * sums * np.exp(z - sums) * real[..., None] / real.sum()
    check(asnumpy(logits.grad), gradient, "the gradient of the logits", {})


def log_sums_of(logits):
    """ln Σ exp z of Tensors (B, T, 1)."""
    top = logits.data.max(axis=-1, keepdims=True)
    return ops.log(ops.exp(logits - top).sum(axis=-1, keepdims=True)) + top


def means(real):
    return (real / real.sum())[..., None]


@z_loss.wrong_answer("A loss is a logarithm.", says="the square is missing")
def _(logits, real):
    return (log_sums_of(logits) * means(real)).sum()


@z_loss.wrong_answer("A sum over the experts leaves (B, T), as the mean over the tokens wants.",
                     says="Use keepdims=True")
def _(logits, real):
    log_sum = log_sums_of(logits).sum(axis=-1)
    return (log_sum * log_sum * means(real)).sum()


@z_loss.wrong_answer("First the mean, then the square.", says="the square of the mean")
def _(logits, real):
    mean = (log_sums_of(logits) * means(real)).sum()
    return mean * mean


@z_loss.wrong_answer("Small logits are logits of small squares.", says="the mean of Σ z²")
def _(logits, real):
    return (logits * logits * means(real)).sum()


@z_loss.wrong_answer("The largest logit is the one that overflows.", says="largest logit")
def _(logits, real):
    top = ops.amax(logits, axis=-1, keepdims=True)
    return (top * top * means(real)).sum()


@z_loss.wrong_answer("A constant subtracted from all logits changes nothing.",
                     says="not added again")
def _(logits, real):
    log_sum = log_sums_of(logits - logits.data.max(axis=-1, keepdims=True))
    return (log_sum * log_sum * means(real)).sum()


@z_loss.wrong_answer("z is Z, the sum of the exponentials.", says="without its logarithm")
def _(logits, real):
    total = ops.exp(log_sums_of(logits))
    return (total * total * means(real)).sum()


@z_loss.wrong_answer("Every token adds its penalty.", says="should be their mean")
def _(logits, real):
    log_sum = log_sums_of(logits)
    return (log_sum * log_sum * real[..., None]).sum()


@z_loss.wrong_answer("Padding has logits, and they must be small as well.",
                     says="padding is counted: it is the mean")
def _(logits, real):
    log_sum = log_sums_of(logits)
    return (log_sum * log_sum).sum() * (1 / real.size)


@z_loss.wrong_answer("A mean divides by B T.", says="in the number of tokens")
def _(logits, real):
    log_sum = log_sums_of(logits)
    return (log_sum * log_sum * real[..., None]).sum() * (1 / real.size)


@z_loss.wrong_answer("Logits are small numbers.", says="nan or inf", subtle=True)
def _(logits, real):
    log_sum = ops.log(ops.exp(logits).sum(axis=-1, keepdims=True))
    return (log_sum * log_sum * means(real)).sum()


@z_loss.wrong_answer("The value is what counts.", says="has no gradient")
def _(logits, real):
    log_sum = log_sums_of(logits).data
    return Tensor((log_sum * log_sum * means(real)).sum())


# ── forward ───────────────────────────────────────────────────────────────────────────────────────
forward = Exercise(
    f"{MOE}SwitchMLP.forward", difficulty=4, minutes=30,
    may_use="self.route(x, ctx), the logits (B, T, E); choose_experts(logits); "
            "self.add_losses(logits, probabilities, chosen, ctx), which adds both losses to the "
            "pass; self.capacity(real), the capacity of each row, where real (B, T) is True at a "
            "real token; within_capacity(chosen, capacity); self.run_experts(x, kept, ctx), "
            "FFN_e(x) of every kept token and 0 elsewhere; ops.cast(gate, x.dtype), the gate in "
            "the dtype of x; m = xp(x.data) and then m.arange, m.ones.",
    example="""
        One expert that doubles x: the gate is 1.
        >>> from tinyft import Context, SwitchConfig
        >>> from tinyft.nn import Linear
        >>> from tinyft.models.moe import SwitchMLP
        >>> rng = np.random.default_rng(0)
        >>> double = Linear(1, 1, rng=rng, bias=False)
        >>> double.weight.data[:] = 2
        >>> layer = SwitchMLP([double], SwitchConfig(experts=1), rng=rng)
        >>> forward(layer, Tensor([[[3.0], [5.0]]]), Context()).numpy()[0]
        array([[ 6.],
               [10.]], dtype=float32)
        """,
    hints=(
        "Six steps: the real tokens, the logits, the choice, the losses, the tokens within the "
        "capacity, the experts. At the end the gate multiplies the output.",
        "chosen (B, T, E) is True at the expert of a real token: compare choice[..., None] with "
        "arange(E), and use & real[..., None]. ctx.mask is None if every token is real.",
        "The losses get `chosen`; the experts get kept = within_capacity(chosen, "
        "self.capacity(real)).  The result is self.run_experts(x, kept, ctx) * gate."))


class Affine(Module):
    """An expert: y = factor x + 1. Its number tells it from the others."""

    def __init__(self, width, factor):
        self.in_features = self.out_features = width
        self.factor = Parameter(asarray(np.full(1, float(factor))))

    def forward(self, x, ctx):
        return x * self.factor + 1.0


FACTORS = (2.0, -3.0, 5.0, 7.0, -4.0, 6.0, 3.0, -2.0, 4.0)


@st.composite
def a_layer(draw: Callable, experts: int = 1, tight: bool = False, padding: bool = False):
    """router (E, C), x (B, T, C), mask (B, T) or None, and the capacity of an expert."""
    B = draw(sizes())
    T = draw(sizes()) + 1
    C = draw(sizes())
    E = draw(sizes()) + experts - 1 if experts > 1 else 1
    x = draw_array(draw, (B, T, C), (1, 2, -1, 3, -2), np.float64)
    router = draw_array(draw, (E, C), (1, -1, 2), np.float64) / 2
    mask = None
    if padding:
        mask = np.arange(T) < np.array([draw(st.integers(1, T - 1)) for _ in range(B)])[:, None]
        if draw(st.booleans()):
            mask = mask[:, ::-1].copy()
    return named(router=router, x=x, mask=mask, capacity=1 if tight else T)


def make_layer(router, room):
    """A SwitchMLP of affine experts whose capacity is `room` tokens of a row, α = c = 1."""
    experts, width = router.shape
    switch = SwitchConfig(experts=experts, capacity=1e-6, eval_capacity=1e-6, min_capacity=room,
                          jitter=0.0, balance=1.0, z_loss=1.0)
    parts = [Affine(width, FACTORS[e]) for e in range(experts)]
    layer = SwitchMLP(parts, switch, rng=np.random.default_rng(0))
    layer.router.weight = Parameter(asarray(router))
    return layer.to(dtype=np.float64)


def routing(router, x, mask):
    """(p, choice, gate, chosen) of plain NumPy."""
    z = x @ router.T
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    choice = p.argmax(-1)
    real = np.ones(x.shape[:2], bool) if mask is None else mask
    return p, choice, p.max(-1, keepdims=True), one_hot(choice, len(router)) & real[..., None]


def first(chosen, room):
    before = xp(chosen).cumsum(chosen.astype(np.int64), axis=1) - chosen
    return chosen & (before < room)


def of_experts(x, kept):
    """FFN_e(x) at the kept tokens, 0 elsewhere."""
    factor = (kept * np.array(FACTORS[:kept.shape[-1]])).sum(-1, keepdims=True)
    return (factor * x + 1) * kept.any(-1, keepdims=True)


def right_output(router, x, mask, room):
    _, _, gate, chosen = routing(router, x, mask)
    return gate * of_experts(x, first(chosen, room))


def guessed_outputs(router, x, mask, room):
    p, choice, gate, chosen = routing(router, x, mask)
    kept = first(chosen, room)
    y = of_experts(x, kept)
    every = np.array([factor * x + 1 for factor in FACTORS[:len(router)]])           # (E, B, T, C)
    padded = one_hot(choice, len(router))
    dropped = ~kept.any(-1, keepdims=True)
    return {
        "the gate is not multiplied: y = p_e FFN_e(x)": y,
        "the gate multiplies the input; it should multiply the output": of_experts(gate * x, kept),
        "the gate is multiplied twice": gate * gate * y,
        "it is Σ p FFN(x) over all experts; a token visits one":
            np.einsum("bte,ebtc->btc", p, every),
        "all tokens go to expert 0": gate * (FACTORS[0] * x + 1) * ~dropped,
        "the output of a dropped token is x; it should be 0, since the block adds x itself":
            gate * y + x * dropped,
        "the output of a dropped token is gate · x; it should be 0": gate * (y + x * dropped),
        "no token is dropped: the capacity is not used": gate * of_experts(x, chosen),
        "padding takes room, and gets outputs": gate * of_experts(x, first(padded, room)),
        "padding takes room": gate * of_experts(x, first(padded, room) & chosen)}


def run_layer(f, router, x, mask, room):
    """(layer, x as a Tensor, ctx, output) of the learner's forward."""
    layer = make_layer(router, room)
    ctx = Context(mask=None if mask is None else asarray(mask))
    tokens = leaf(x)
    y = f(layer, tokens, ctx)
    if not isinstance(y, Tensor):
        raise Unusable(f"the output should be a Tensor; yours is {described(y)}")
    return layer, tokens, ctx, y


def check_output(f, given):
    _, _, _, y = run_layer(f, *given)
    check(y, right_output(*given), "the output", guessed_outputs(*given))


@forward.law("one expert: the layer is this expert", given=a_layer())
def _(f, given):
    check_output(f, given)


@forward.law("each token goes through its expert, times the gate", given=a_layer(experts=2))
def _(f, given):
    check_output(f, given)


@forward.law("a token beyond the capacity gives 0", given=a_layer(experts=2, tight=True))
def _(f, given):
    check_output(f, given)


@forward.law("padding gives 0, and takes no room",
             given=a_layer(experts=2, tight=True, padding=True))
def _(f, given):
    check_output(f, given)


def right_losses(router, x, chosen):
    p, _, _, _ = routing(router, x, None)
    real = chosen.any(-1)
    n = max(real.sum(), 1)
    f = chosen.sum((0, 1)) / n
    P = (p * real[..., None]).sum((0, 1)) / n
    return len(router) * (f * P).sum()


def losses_of(f, given, padding=False):
    router, x, mask, room = given
    _, _, ctx, _ = run_layer(f, *given)
    if "balance" not in ctx.losses:
        raise Unusable("the pass has no balance loss: call self.add_losses, with the ctx")
    _, choice, _, chosen = routing(router, x, mask)
    kept = first(chosen, room)
    check(ctx.losses["balance"], right_losses(router, x, chosen), "the balance loss of the pass", {
        "the dropped tokens are missing in it: f is counted before any token is dropped":
            right_losses(router, x, kept),
        "padding is counted in it": right_losses(router, x, one_hot(choice, len(router)))})


@forward.law("the balance loss counts the tokens that choose an expert, dropped or not",
             given=a_layer(experts=2, tight=True))
def _(f, given):
    losses_of(f, given)


@forward.law("the balance loss does not count padding", given=a_layer(experts=2, padding=True))
def _(f, given):
    losses_of(f, given)


@forward.law("the router learns from the output, through the gate", given=a_layer(experts=2))
def _(f, given):
    router, x, mask, room = given
    layer, _, _, y = run_layer(f, *given)
    y.sum().backward()
    if layer.router.weight.grad is None:
        raise Unusable("no gradient reaches the router: does the gate multiply the output as a "
                       "Tensor?")
    p, choice, gate, chosen = routing(router, x, mask)
    out = of_experts(x, chosen).sum(-1, keepdims=True)
    of_logits = out * gate * (one_hot(choice, len(router)) - p)
    gradient = np.einsum("bte,btc->ec", of_logits, x)
    check(asnumpy(layer.router.weight.grad), gradient, "the gradient of the router",
          {"no gradient reaches the router from the output": 0 * gradient})


def steps(layer, x, ctx):
    """(logits, probabilities, choice, gate, chosen, real) as the library computes them."""
    real = xp(x.data).ones(x.shape[:2], dtype=bool) if ctx.mask is None else ctx.mask
    logits = layer.route(x, ctx)
    p = ops.softmax(logits)
    choice = p.data.argmax(-1)
    gate = ops.gather(p, choice[..., None])
    return logits, p, choice, gate, one_hot(choice, p.shape[-1]) & real[..., None], real


def kept_of(layer, chosen, real):
    return first(chosen, layer.capacity(real)[:, None, None])


@forward.wrong_answer("The experts compute the output; the gate only chooses.",
                      says="the gate is not multiplied")
def _(self, x, ctx):
    logits, p, _, _, chosen, real = steps(self, x, ctx)
    self.add_losses(logits, p, chosen, ctx)
    return self.run_experts(x, kept_of(self, chosen, real), ctx)


@forward.wrong_answer("A gate is in front of an expert.", says="it should multiply the output")
def _(self, x, ctx):
    logits, p, _, gate, chosen, real = steps(self, x, ctx)
    self.add_losses(logits, p, chosen, ctx)
    return self.run_experts(x * gate, kept_of(self, chosen, real), ctx)


@forward.wrong_answer("A mixture of experts is a mean of experts.", says="a token visits one")
def _(self, x, ctx):
    logits, p, _, _, chosen, _ = steps(self, x, ctx)
    self.add_losses(logits, p, chosen, ctx)
    total = 0
    for e, expert in enumerate(self.experts):
        total = total + expert(x, ctx) * p[..., e:e + 1]
    return total


@forward.wrong_answer("A dropped token stays as it is: y = x.",
                      says="the output of a dropped token is x")
def _(self, x, ctx):
    logits, p, _, gate, chosen, real = steps(self, x, ctx)
    self.add_losses(logits, p, chosen, ctx)
    kept = kept_of(self, chosen, real)
    return self.run_experts(x, kept, ctx) * gate + x * ~kept.any(-1, keepdims=True)


@forward.wrong_answer("An expert can take as many tokens as come.", says="no token is dropped")
def _(self, x, ctx):
    logits, p, _, gate, chosen, _ = steps(self, x, ctx)
    self.add_losses(logits, p, chosen, ctx)
    return self.run_experts(x, chosen, ctx) * gate


@forward.wrong_answer("A dropped token was not used, so it does not count.",
                      says="f is counted before any token is dropped", subtle=True)
def _(self, x, ctx):
    logits, p, _, gate, chosen, real = steps(self, x, ctx)
    kept = kept_of(self, chosen, real)
    self.add_losses(logits, p, kept, ctx)
    return self.run_experts(x, kept, ctx) * gate


@forward.wrong_answer("Losses are for the trainer.", says="call self.add_losses")
def _(self, x, ctx):
    _, _, _, gate, chosen, real = steps(self, x, ctx)
    return self.run_experts(x, kept_of(self, chosen, real), ctx) * gate


@forward.wrong_answer("Every position chooses an expert.", says="padding takes room")
def _(self, x, ctx):
    logits, p, choice, gate, chosen, real = steps(self, x, ctx)
    self.add_losses(logits, p, chosen, ctx)
    everyone = one_hot(choice, p.shape[-1])
    return self.run_experts(x, kept_of(self, everyone, real), ctx) * gate


@forward.wrong_answer("Padding is left out at the end.", says="padding takes room")
def _(self, x, ctx):
    logits, p, choice, gate, chosen, real = steps(self, x, ctx)
    self.add_losses(logits, p, chosen, ctx)
    kept = kept_of(self, one_hot(choice, p.shape[-1]), real) & chosen
    return self.run_experts(x, kept, ctx) * gate


@forward.wrong_answer("Losses count positions.", says="padding is counted in it", subtle=True)
def _(self, x, ctx):
    logits, p, choice, gate, chosen, real = steps(self, x, ctx)
    self.add_losses(logits, p, one_hot(choice, p.shape[-1]), ctx)
    return self.run_experts(x, kept_of(self, chosen, real), ctx) * gate


@forward.wrong_answer("The gate is a number.", says="no gradient reaches the router", subtle=True)
def _(self, x, ctx):
    logits, p, _, gate, chosen, real = steps(self, x, ctx)
    self.add_losses(logits, p, chosen, ctx)
    return self.run_experts(x, kept_of(self, chosen, real), ctx) * gate.data
