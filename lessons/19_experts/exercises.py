"""Lesson 19, routing: the expert of a token and its gate, the capacity, the tokens within it."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.array import asarray, asnumpy, xp
from tinyft.learn.diagnose import Unusable, close, described, host
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, positive, sizes
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


def softmax(z, axis=-1):
    e = xp(z).exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def one_hot(choice, experts):
    return xp(choice).arange(experts) == choice[..., None]


# ── choose_experts ────────────────────────────────────────────────────────────────────────────────
choose_experts = Exercise(
    f"{MOE}choose_experts", difficulty=2, minutes=15,
    may_use="ops.softmax(z), along the last axis; p.data, the array of a Tensor; "
            "a.argmax(axis=-1); ops.gather(p, i), the entries i of the last axis of p, where i has "
            "as many axes as p: i[..., None] has one more axis than i.",
    example="""
        >>> logits = Tensor(np.log([[3.0, 1.0], [1.0, 9.0]]))        # two tokens, two experts
        >>> p, choice, gate = choose_experts(logits)
        >>> p.numpy().round(2)
        array([[0.75, 0.25],
               [0.1 , 0.9 ]])
        >>> choice
        array([0, 1])
        >>> gate.numpy().round(2)
        array([[0.75],
               [0.9 ]])
        """,
    hints=(
        "The order matters: first the softmax over all experts, then the choice. A softmax over "
        "the chosen logit alone is always 1.",
        "argmax works on an array, p.data, and gives whole numbers. They have no gradient, and "
        "need none.",
        "choice = p.data.argmax(axis=-1);  gate = ops.gather(p, choice[..., None]).  ops.gather "
        "hands the gradient of the gate back to p."))


def routed(f, logits):
    """(p, choice, gate) from the learner's function, and the Tensor of the logits."""
    z = Tensor(asarray(logits.astype(np.float64)), requires_grad=True)
    made = f(z)
    if not isinstance(made, tuple) or len(made) != 3:
        raise Unusable(f"it should return three things, (p, choice, gate); yours is "
                       f"{described(made)}")
    return made, z


def distinct(experts=2):
    """Logits ln k of tokens (n, E): the numbers k of a token are 1, 2, 3, ... in some order."""
    @st.composite
    def rows(draw: Callable):
        n = draw(sizes())
        E = draw(sizes()) + experts - 1
        return np.log([list(draw(st.permutations(range(1, E + 1)))) for _ in range(n)])
    return rows()


@choose_experts.law("p is the softmax of the logits, over the experts", k=positive("n e"))
def _(f, k):
    z = np.log(k)
    (p, _, _), _ = routed(f, z)
    check(p, k / k.sum(-1, keepdims=True), "p", {
        "it is the softmax over the tokens; each token has probabilities of its own, over the "
        "experts": k / k.sum(0),
        "it is the logits; p is their softmax": z,
        "it is a sigmoid of each logit; the probabilities of a token add up to 1": k / (1 + k)})


@choose_experts.law("e is the expert of the largest p", logits=distinct())
def _(f, logits):
    (_, choice, _), _ = routed(f, logits)
    best = logits.argmax(-1)
    if np.shape(host(choice, "e")) != best.shape or host(choice).dtype.kind not in "iu":
        guess = {"it is True at the expert; e is the number of the expert":
                 one_hot(best, logits.shape[-1])}
        close(choice, best, "e", guess)
    check(choice, best, "e", {"it is the expert of the smallest p": logits.argmin(-1)})


@choose_experts.law("of equal probabilities the first wins", n="size", e="size")
def _(f, n, e):
    (_, choice, _), _ = routed(f, np.zeros((n, e)))
    check(choice, np.zeros(n, np.int64), "e of equal logits", {
        "of equal probabilities the last one wins; it should be the first": np.full(n, e - 1)})


@choose_experts.law("the gate is p_e, the probability of the chosen expert", logits=distinct())
def _(f, logits):
    (_, _, gate), _ = routed(f, logits)
    want = softmax(logits).max(-1, keepdims=True)
    check(gate, want, "the gate", {
        "it is always 1: the softmax is over the selected logit alone. It belongs over all "
        "experts": np.ones_like(want),
        "it is the logit of the chosen expert; the gate is its probability":
            logits.max(-1, keepdims=True),
        "it is E x the probability: the gate is p_e as it is": logits.shape[-1] * want})


@choose_experts.law("the gate hands gradients on to the logits", logits=distinct())
def _(f, logits):
    (_, choice, gate), z = routed(f, logits)
    if not isinstance(gate, Tensor) or not gate.requires_grad:
        raise Unusable("the gate has no gradient, so the router never learns from the task: take "
                       "the gate from p, the Tensor, not from p.data")
    gate.sum().backward()
    p = softmax(logits)
    best = logits.argmax(-1)
    gradient = p.max(-1, keepdims=True) * (one_hot(best, p.shape[-1]) - p)
    close(asnumpy(z.grad), gradient, "the gradient of the logits")


@choose_experts.law("p hands gradients on to the logits", logits=distinct())
def _(f, logits):
    (p, _, _), z = routed(f, logits)
    if not isinstance(p, Tensor) or not p.requires_grad:
        raise Unusable("p has no gradient; the balance loss needs it: return the Tensor, not its "
                       "array")
    (p * p).sum().backward()
    q = softmax(logits)
    gradient = 2 * q * (q - (q * q).sum(-1, keepdims=True))
    close(asnumpy(z.grad), gradient, "the gradient of the logits")


@choose_experts.law("rows of tokens: logits (B, T, E)", k=positive("b t e"))
def _(f, k):
    (p, choice, gate), _ = routed(f, np.log(k))
    want = k / k.sum(-1, keepdims=True)
    check(p, want, "p", {})
    check(choice, k.argmax(-1), "e", {})
    check(gate, want.max(-1, keepdims=True), "the gate", {})


@choose_experts.wrong_answer("Choose first, then take the softmax over what was chosen.",
                             says="the softmax is over the selected logit alone")
def _(logits):
    choice = logits.data.argmax(axis=-1)
    return ops.softmax(logits), choice, ops.softmax(ops.gather(logits, choice[..., None]))


@choose_experts.wrong_answer("The gate is the score of the expert.", says="it is the logit")
def _(logits):
    choice = logits.data.argmax(axis=-1)
    return ops.softmax(logits), choice, ops.gather(logits, choice[..., None])


@choose_experts.wrong_answer("The gate is a number that weights the output; nothing trains it.",
                             says="the gate has no gradient", subtle=True)
def _(logits):
    p = ops.softmax(logits)
    choice = p.data.argmax(axis=-1)
    return p, choice, Tensor(p.data.max(axis=-1, keepdims=True))


@choose_experts.wrong_answer("p is for statistics alone.", says="p has no gradient", subtle=True)
def _(logits):
    p = ops.softmax(logits)
    choice = p.data.argmax(axis=-1)
    return Tensor(p.data), choice, ops.gather(p, choice[..., None])


@choose_experts.wrong_answer("Tokens compete for an expert.", says="softmax over the tokens")
def _(logits):
    p = Tensor(softmax(logits.data, axis=0), requires_grad=True)
    choice = p.data.argmax(axis=-1)
    return p, choice, ops.gather(p, choice[..., None])


@choose_experts.wrong_answer("An expert is a yes or a no, so each has its sigmoid.",
                             says="sigmoid")
def _(logits):
    p = ops.sigmoid(logits)
    choice = p.data.argmax(axis=-1)
    return p, choice, ops.gather(p, choice[..., None])


@choose_experts.wrong_answer("The logits are the probabilities.", says="it is the logits")
def _(logits):
    choice = logits.data.argmax(axis=-1)
    return logits, choice, ops.gather(logits, choice[..., None])


@choose_experts.wrong_answer("The expert with the least to do takes the token.",
                             says="smallest p")
def _(logits):
    p = ops.softmax(logits)
    choice = p.data.argmin(axis=-1)
    return p, choice, ops.gather(p, choice[..., None])


@choose_experts.wrong_answer("A choice is a vector with a 1.", says="the number of the expert")
def _(logits):
    p = ops.softmax(logits)
    choice = p.data.argmax(axis=-1)
    return p, one_hot(choice, p.shape[-1]), ops.gather(p, choice[..., None])


@choose_experts.wrong_answer("With E equal experts the gate must be 1.",
                             says="the gate is p_e as it is")
def _(logits):
    p = ops.softmax(logits)
    choice = p.data.argmax(axis=-1)
    return p, choice, ops.gather(p, choice[..., None]) * p.shape[-1]


@choose_experts.wrong_answer("Of equal ones, any will do.", says="the last one wins", subtle=True)
def _(logits):
    p = ops.softmax(logits)
    choice = p.shape[-1] - 1 - p.data[..., ::-1].argmax(axis=-1)
    return p, choice, ops.gather(p, choice[..., None])


# ── expert_capacity ───────────────────────────────────────────────────────────────────────────────
expert_capacity = Exercise(
    f"{MOE}expert_capacity", difficulty=1, minutes=10,
    may_use="real.sum(axis=1); m = xp(real) and then m.floor, m.minimum, m.maximum: the functions "
            "of NumPy, or of CuPy on a GPU.",
    example="""
        >>> real = np.array([[True] * 10, [True] * 6 + [False] * 4])  # rows of 10 and of 6 tokens
        >>> expert_capacity(real, 1.25, 4, 1).astype(int)             # 12.5 / 4 and 7.5 / 4
        array([3, 1])
        >>> expert_capacity(real, 1.25, 4, 4).astype(int)             # at least 4
        array([4, 4])
        """,
    hints=(
        "Every row has a capacity of its own: it counts the real tokens of the row.",
        "Three steps: the share of an expert, factor · n / experts rounded down; not less than "
        "`least`; not more than n.",
        "m.minimum(n, m.maximum(m.floor(factor * n / experts), least)), with n = real.sum(axis=1)."
    ))


def capacities(f, real, factor, experts, least):
    """The learner's capacities as floats: whole numbers of any dtype are right."""
    got = host(f(asarray(real), factor, experts, least), "the capacity", np.zeros(len(real)))
    return got.astype(np.float64) if got.dtype.kind in "iu" else got


def right_capacity(n, factor, experts, least):
    return np.minimum(n, np.maximum(np.floor(factor * n / experts), least))


def row_mask(lengths, T):
    return np.arange(T) < np.array(lengths)[:, None]


def guessed_capacities(n, T, factor, experts, least):
    share = factor * n / experts
    def bounded(a):
        return np.minimum(n, np.maximum(a, least))
    return {
        "it is rounded up; it should be rounded down": bounded(np.ceil(share)),
        "it is not rounded: a capacity is a whole number of tokens": bounded(share),
        "it is n / experts rounded down, and then times the factor; round at the end":
            bounded(np.floor(factor * (n // experts))),
        "the factor is left out": bounded(n // experts),
        "it is divided by the factor": bounded(np.floor(n / factor / experts)),
        "padding is counted: n is the number of real tokens": bounded(
            np.floor(np.full(len(n), factor * T / experts))),
        "all rows have one capacity; each row has its own": bounded(
            np.floor(np.full(len(n), factor * n.sum() / experts))),
        "`least` is left out": np.minimum(n, np.floor(share)),
        "`least` is taken for the largest capacity; it is the smallest": np.minimum(
            n, np.minimum(np.floor(share), least)),
        "it is more than the row has tokens": np.maximum(np.floor(share), least)}


def check_capacity(f, given):
    real, factor, experts, least = given
    n = real.sum(axis=1).astype(np.float64)
    got = capacities(f, real, factor, experts, least)
    check(got, right_capacity(n, factor, experts, least), "the capacity of each row",
          guessed_capacities(n, real.shape[1], factor, experts, least))


def arguments(lengths, T, factor, experts, least):
    """The arguments of expert_capacity, as the learner sees them. lengths: of the rows"""
    return named(real=row_mask(lengths, T), factor=factor, experts=experts, least=least)


@st.composite
def a_row_of_tokens(draw: Callable):
    """T tokens, factor and experts with a share that is not above T."""
    experts = draw(st.sampled_from((2, 3, 4)))
    T = experts * draw(sizes()) + draw(st.integers(0, experts - 1))
    return arguments([T], T, draw(st.sampled_from((1.25, 1.5, 1.75))), experts, 0)


@st.composite
def a_short_row(draw: Callable):
    """`least` is all tokens of the row."""
    T = draw(sizes()) + 1
    return arguments([T], T, 1.0, draw(st.sampled_from((2, 4, 3))), T)


@st.composite
def a_large_share(draw: Callable):
    """One expert, and a share above the tokens of the row."""
    T = draw(sizes())
    return arguments([T], T, draw(st.sampled_from((2.0, 3.0, 1.5))), 1, 1)


@st.composite
def rows_with_padding(draw: Callable):
    """Two rows or more, and none without padding."""
    B = draw(sizes()) + 1
    lengths = [draw(st.integers(1, 4)) * 4 for _ in range(B)]
    return arguments(lengths, max(lengths) + 4, 1.5, draw(st.sampled_from((2, 4))), 1)


@expert_capacity.law("⌊factor n / experts⌋, where that is between least and n",
                     given=a_row_of_tokens())
def _(f, given):
    check_capacity(f, given)


@expert_capacity.law("it is at least `least`", given=a_short_row())
def _(f, given):
    check_capacity(f, given)


@expert_capacity.law("it is at most n, the tokens of the row", given=a_large_share())
def _(f, given):
    check_capacity(f, given)


@expert_capacity.law("padding is no token; each row has its own capacity",
                     given=rows_with_padding())
def _(f, given):
    check_capacity(f, given)


@expert_capacity.wrong_answer("A token too many is better than one too few.",
                              says="rounded down")
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    return m.minimum(n, m.maximum(m.ceil(factor * n / experts), least))


@expert_capacity.wrong_answer("A capacity may be 2.5 tokens.", says="whole number of tokens")
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    return m.minimum(n, m.maximum(factor * n / experts, least))


@expert_capacity.wrong_answer("Each expert gets its equal share.", says="factor is left out")
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    return m.minimum(n, m.maximum(n // experts, least))


@expert_capacity.wrong_answer("First the share in whole tokens, then some more.",
                              says="round at the end")
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    return m.minimum(n, m.maximum(m.floor(factor * (n // experts)), least))


@expert_capacity.wrong_answer("A row has T tokens.", says="padding is counted", subtle=True)
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    positions = m.full(len(n), real.shape[1])
    return m.minimum(n, m.maximum(m.floor(factor * positions / experts), least))


@expert_capacity.wrong_answer("An expert belongs to the batch, so its capacity does.",
                              says="each row has its own", subtle=True)
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    tokens = m.ones_like(n) * n.sum()
    return m.minimum(n, m.maximum(m.floor(factor * tokens / experts), least))


@expert_capacity.wrong_answer("`least` is a limit, and limits are minima.",
                              says="taken for the largest")
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    return m.minimum(n, m.minimum(m.floor(factor * n / experts), least))


@expert_capacity.wrong_answer("The formula is ⌊f n / E⌋.", says="`least` is left out", subtle=True)
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    return m.minimum(n, m.floor(factor * n / experts))


@expert_capacity.wrong_answer("Room that nobody needs does no harm.", says="more than the row",
                              subtle=True)
def _(real, factor, experts, least):
    m = xp(real)
    n = real.sum(axis=1)
    return m.maximum(m.floor(factor * n / experts), least)


# ── within_capacity ───────────────────────────────────────────────────────────────────────────────
within_capacity = Exercise(
    f"{MOE}within_capacity", difficulty=3, minutes=20,
    may_use="m = xp(chosen) and then m.cumsum(a, axis=1), the sums up to each position, its own "
            "entry included; chosen.astype(np.int64); &; capacity[:, None, None], which has shape "
            "(B, 1, 1).",
    example="""
        Three tokens choose expert 0, one chooses expert 1. Each expert takes two.
        >>> chosen = np.array([[[1, 0], [1, 0], [0, 1], [1, 0]]], bool)
        >>> within_capacity(chosen, np.array([2])).astype(int)
        array([[[1, 0],
                [1, 0],
                [0, 1],
                [0, 0]]])
        """,
    hints=(
        "For each token count the tokens before it, in its row, that chose the same expert. It is "
        "taken if they are fewer than the capacity.",
        "The cumulative sum of `chosen` along the tokens counts a token itself as well. Subtract "
        "`chosen`.",
        "chosen & (before < capacity[:, None, None]).  Without chosen & the experts would take "
        "tokens that did not choose them."))


@st.composite
def a_choice(draw: Callable, rows: int = 1, experts: int = 1, padding: bool = False,
             room: int = 1):
    """chosen (B, T, E) and capacity (B,): few experts, so that some of them are full.

    rows, experts: the least numbers of them. room: the least capacity."""
    B = draw(sizes()) if rows > 1 else 1
    B = B + rows - 1
    E = draw(sizes()) + experts - 1 if experts > 1 else 1
    T = draw(sizes()) + 2
    choice = draw_array(draw, (B, T), tuple(range(E)), np.int64)
    chosen = one_hot(choice, E)
    if padding:
        lengths = np.array([draw(st.integers(1, T - 1)) for _ in range(B)])
        from_left = draw(st.booleans())
        real = row_mask(lengths, T)
        chosen &= (real[:, ::-1] if from_left else real)[..., None]
    capacity = draw_array(draw, (B,), (room, room + 1), np.int64)
    return named(chosen=chosen, capacity=capacity)


def tokens_before(chosen, axis=1):
    """The number of tokens before each position, along an axis, that are True. On every backend."""
    return xp(chosen).cumsum(chosen.astype(np.int64), axis=axis) - chosen


def kept(chosen, capacity):
    before = tokens_before(chosen)
    return chosen & (before < capacity[:, None, None])


def kept_over_batch(chosen, capacity):
    flat = chosen.reshape(1, -1, chosen.shape[-1])
    return kept(flat, capacity.sum()[None]).reshape(chosen.shape)


def kept_by_row(chosen, capacity):
    """The positions are counted for all experts together."""
    any_expert = chosen.any(-1, keepdims=True)
    before = tokens_before(any_expert)
    return chosen & (before < capacity[:, None, None])


def with_padding_at_0(chosen, capacity):
    """Padding takes room at expert 0, as argmax says."""
    full = one_hot(chosen.argmax(-1), chosen.shape[-1])
    return chosen & kept(full, capacity)


def passed_on(chosen, capacity):
    """A token beyond the capacity goes to the next expert that has room."""
    E = chosen.shape[-1]
    out = np.zeros_like(chosen)
    for b, t, e in np.argwhere(chosen):
        for step in range(E):
            if out[b, :, (e + step) % E].sum() < capacity[b]:
                out[b, t, (e + step) % E] = True
                break
    return out


def kept_along_experts(chosen, capacity):
    """The capacity of row b meets the counts of expert b, as NumPy broadcasts (B,)."""
    B, _, E = chosen.shape
    if B > 1 and E not in (1, B):
        return chosen                                    # NumPy would raise an error
    before = tokens_before(chosen)
    return chosen & (before < capacity)


def guessed_kept(chosen, capacity):
    counts = np.cumsum(chosen.astype(np.int64), axis=1)
    before = counts - chosen
    limit = capacity[:, None, None]
    return {
        "each expert takes one token too few: the cumulative sum counts a token itself as well":
            kept(chosen, capacity - 1),
        "each expert takes one token too many: the position before the first is 0, so it must be "
        "< capacity": kept(chosen, capacity + 1),
        "the last tokens are taken; it should be the first ones": kept(
            chosen[:, ::-1], capacity)[:, ::-1],
        "all tokens are taken: is the sum taken along the right axis?": chosen,
        "the tokens of all experts are counted together; each expert has its own capacity":
            kept_by_row(chosen, capacity),
        "the tokens of all rows are counted together; each row counts for itself":
            kept_over_batch(chosen, capacity),
        "padding takes room at expert 0": with_padding_at_0(chosen, capacity),
        "all rows have the capacity of the first row": kept(
            chosen, np.full_like(capacity, capacity[0])),
        "a token beyond the capacity is given to another expert; it should be dropped":
            passed_on(chosen, capacity),
        "the capacity is compared along the experts; it belongs to the rows: use "
        "capacity[:, None, None]": kept_along_experts(chosen, capacity),
        "True stands at experts that a token did not choose": before < limit,
        "True stands at experts that a token did not choose: their count is within the capacity":
            counts <= limit,
        "it is the opposite: True stands at the dropped tokens": chosen & (before >= limit)}


def check_kept(f, given):
    chosen, capacity = given
    got = f(asarray(chosen), asarray(capacity))
    check(got, kept(chosen, capacity), "the tokens that are taken", guessed_kept(chosen, capacity))


@within_capacity.law("one expert takes the first tokens, as many as its capacity",
                     given=a_choice())
def _(f, given):
    check_kept(f, given)


@within_capacity.law("each expert counts the tokens that choose it", given=a_choice(experts=2))
def _(f, given):
    check_kept(f, given)


@within_capacity.law("padding is never taken, and takes no room", given=a_choice(padding=True,
                                                                               experts=2))
def _(f, given):
    check_kept(f, given)


@within_capacity.law("each row counts for itself, with its own capacity", given=a_choice(rows=2))
def _(f, given):
    check_kept(f, given)


@within_capacity.wrong_answer("The cumulative sum is the position, and positions below C fit.",
                              says="one token too few")
def _(chosen, capacity):
    return chosen & (tokens_before(chosen) + 1 < capacity[:, None, None])


@within_capacity.wrong_answer("Position C is the last one with room.", says="one token too many")
def _(chosen, capacity):
    before = tokens_before(chosen)
    return chosen & (before <= capacity[:, None, None])


@within_capacity.wrong_answer("A later token knows more, so it comes first.",
                              says="the last tokens are taken")
def _(chosen, capacity):
    return kept(chosen[:, ::-1], capacity)[:, ::-1]


@within_capacity.wrong_answer("A cumulative sum counts, along whatever axis.",
                              says="along the right axis")
def _(chosen, capacity):
    before = tokens_before(chosen, axis=2)
    return chosen & (before < capacity[:, None, None])


@within_capacity.wrong_answer("The capacity is the number of tokens that a layer takes.",
                              says="counted together; each expert")
def _(chosen, capacity):
    return kept_by_row(chosen, capacity)


@within_capacity.wrong_answer("An expert sees one batch, not rows.",
                              says="of all rows are counted together", subtle=True)
def _(chosen, capacity):
    return kept_over_batch(chosen, capacity)


@within_capacity.wrong_answer("argmax gives every position an expert.",
                              says="padding takes room", subtle=True)
def _(chosen, capacity):
    return with_padding_at_0(chosen, capacity)


@within_capacity.wrong_answer("A full expert sends its tokens to the next one.",
                              says="given to another expert")
def _(chosen, capacity):
    return asarray(passed_on(asnumpy(chosen), asnumpy(capacity)))       # a loop over the tokens


@within_capacity.wrong_answer("The count below the capacity is the answer.",
                              says="did not choose")
def _(chosen, capacity):
    before = tokens_before(chosen)
    return before < capacity[:, None, None]


@within_capacity.wrong_answer("A count up to the capacity is the answer.",
                              says="their count is within")
def _(chosen, capacity):
    return tokens_before(chosen) + chosen <= capacity[:, None, None]


@within_capacity.wrong_answer("NumPy broadcasts the capacity of each row.",
                              says="it belongs to the rows", subtle=True)
def _(chosen, capacity):
    return chosen & (tokens_before(chosen) < capacity)


@within_capacity.wrong_answer("It says which tokens are dropped.", says="the opposite")
def _(chosen, capacity):
    return chosen & ~kept(chosen, capacity)


@within_capacity.wrong_answer("A token is taken or not; the expert is known.", says="its shape is")
def _(chosen, capacity):
    return kept(chosen, capacity).any(axis=-1)


@within_capacity.wrong_answer("All rows are alike.", says="capacity of the first row", subtle=True)
def _(chosen, capacity):
    return kept(chosen, xp(capacity).ones_like(capacity) * capacity[0])
