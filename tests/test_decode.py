"""Text from a model: with a cache and without, padded and alone, greedy and sampled, with adapters on."""
from __future__ import annotations

import numpy as np
import pytest
from contract import build, noise
from helpers import host, wrong_answers

from tinyft import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    LoRA,
    PrefixTuning,
    PromptTuning,
    attach,
    classifier,
    decode,
    generate,
)
from tinyft.decode import choose_token, pad_left

N = 6                                                                            # tokens to generate
ADAPTERS = {
    "none": None,
    "lora": LoRA(r=2),
    "lora on the tied embedding": LoRA(r=2, targets="embed"),
    "prefix": PrefixTuning(p=3),
    "prefix, shifted": PrefixTuning(p=3, shift=True),
    "prefix by an mlp": PrefixTuning(p=3, mlp=5),
    "prompt": PromptTuning(p=3),
}


def model_with(name: str) -> GPT:
    """In float64: two ways to the same logits must not differ by a rounding at a tie."""
    model = build("gpt")
    if ADAPTERS[name] is not None:
        attach(model, ADAPTERS[name])
        noise(model, 0.5)
    return model.to(dtype=np.float64).eval()


def rows() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 23, n).tolist() for n in (5, 2, 4, 1)]


def by_hand(model: GPT, row: list[int], n: int = N) -> list[int]:
    """The argmax of a full forward pass, n times."""
    row = list(row)
    for _ in range(n):
        row.append(int(host(model(np.array([row])))[0, -1].argmax()))
    return row


def check_greedy(model: GPT, go) -> None:
    """Each row of a left-padded batch goes on as it does alone, token by token."""
    ids, mask = pad_left(rows())
    out = go(model, ids, N, mask=mask)
    assert out.shape == (4, 5 + N) and np.array_equal(out[:, :5], ids)
    for row, got in zip(rows(), out):
        assert got[5 - len(row):].tolist() == by_hand(model, row)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_text_is_the_argmax_of_a_full_pass_for_every_row_alone(name, cache):
    model = model_with(name)
    check_greedy(model, lambda m, ids, n, **k: generate(m, ids, n, cache=cache, **k))
    if name != "none":                                   # the adapter changes the text
        assert by_hand(model, rows()[0]) != by_hand(model_with("none"), rows()[0])


@wrong_answers
def test_generation_that_forgets_the_mask_or_the_past_is_caught():
    model = model_with("none")
    right = host(model(np.array([rows()[0]])))
    assert len({tuple(by_hand(model, r)[-N:]) for r in rows()}) > 1 and right.shape == (1, 5, 23)
    for wrong in (lambda m, ids, n, mask: generate(m, ids, n),
                  lambda m, ids, n, mask: np.c_[ids, generate(m, ids[:, -1:], n)[:, 1:]],
                  lambda m, ids, n, mask: np.c_[ids, generate(m, ids[::-1], n, mask=mask[::-1])[:, 5:]],
                  lambda m, ids, n, mask: generate(m, ids, n - 1, mask=mask)):
        with pytest.raises(AssertionError):
            check_greedy(model, wrong)


def test_the_caller_gets_the_ids_back_even_for_no_new_tokens_and_the_mode_is_kept():
    model, (ids, mask) = model_with("none").train(), pad_left(rows())
    assert np.array_equal(generate(model, ids, 0, mask=mask), ids) and model.training
    trained = generate(model, ids, N, mask=mask)
    assert np.array_equal(trained, generate(model.eval(), ids, N, mask=mask)) and not model.training


def test_a_row_that_ended_is_filled_with_the_end_and_the_others_go_on():
    model, (ids, mask) = model_with("none"), pad_left(rows())
    free = generate(model, ids, 10, mask=mask)[:, 5:]
    end = int(free[0, 1])                                # the first row ends at its second token at the latest
    out = generate(model, ids, 10, mask=mask, end=end)[:, 5:]
    for was, got in zip(free.tolist(), out.tolist()):
        stop = was.index(end) + 1 if end in was else len(was)
        assert got[:stop] == was[:len(got)][:stop] and all(t == end for t in got[stop:])
    alone = generate(model, ids[:1, :], 10, mask=mask[:1], end=end)
    assert alone.shape[1] - 5 == free[0].tolist().index(end) + 1                 # nobody is left: it stops


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────
LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2]))
DRAWS = 20_000


def frequencies(
    sample=choose_token, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    tokens = sample(np.tile(LOGITS, (DRAWS, 1)), temperature, top_k, top_p, np.random.default_rng(0))
    return np.bincount(tokens, minlength=5) / DRAWS


def wanted(keep: list[int], temperature: float = 1.0) -> np.ndarray:
    p = np.zeros(5)
    p[keep] = np.exp(LOGITS[keep] / temperature)
    return p / p.sum()


EVERY = [0, 1, 2, 3, 4]
CASES = [                                                # the options, and the tokens that may be drawn
    (dict(), EVERY),
    (dict(temperature=0.5), EVERY),
    (dict(temperature=3.0), EVERY),
    (dict(top_k=1), [1]),
    (dict(top_k=3), [1, 3, 4]),
    (dict(top_k=99), EVERY),
    (dict(top_p=0.39), [1]),
    (dict(top_p=0.5), [1, 3]),
    (dict(top_p=0.7), [1, 3, 4]),
    (dict(top_p=1.0), EVERY),
    (dict(top_k=2, top_p=0.9), [1, 3]),
    (dict(top_k=4, top_p=0.5, temperature=2.0), [1, 3]),
]


def check_sampling(sample=choose_token) -> None:
    """Only what may be drawn is drawn, as often as it should be: within five deviations."""
    for how, keep in CASES:
        p, f = wanted(keep, how.get("temperature", 1.0)), frequencies(sample, **how)
        assert (f[p == 0] == 0).all(), how
        assert (np.abs(f - p) <= 5 * np.sqrt(p * (1 - p) / DRAWS) + 1e-12).all(), how


def test_sampling_draws_from_the_right_set_with_the_right_frequencies():
    check_sampling()


def evenly(z, temperature, top_k, top_p, rng):
    """Draws from the top_k tokens with equal probability."""
    k = top_k or 5
    if k > 5:
        return choose_token(z * 0, temperature, None, top_p, rng)
    return choose_token(np.where(z < np.sort(z)[:, [-k]], -1e9, 0.0), temperature, None, top_p, rng)


def top_p_too_small(z, temperature, top_k, top_p, rng):
    """Leaves out the token that crosses top_p."""
    return choose_token(z, temperature, top_k, None if top_p is None else max(top_p - 0.25, 0.01), rng)


def top_p_first(z, temperature, top_k, top_p, rng):
    """Takes top_p from the probabilities before the temperature."""
    return choose_token(z, 1.0 if top_p else temperature, top_k, top_p, rng)


WRONG = {
    "temperature the wrong way round": lambda z, t, k, p, r: choose_token(z, 1 / t, k, p, r),
    "one too many": lambda z, t, k, p, r: choose_token(z, t, None if k is None else k + 1, p, r),
    "the token that crosses the line left out": top_p_too_small,
    "top_p forgotten": lambda z, t, k, p, r: choose_token(z, t, k, None, r),
    "top_p before the temperature": top_p_first,
    "greedy": lambda z, t, k, p, r: choose_token(z, 0.0, k, p, r),
    "evenly": evenly,
}


@wrong_answers
@pytest.mark.parametrize("name", WRONG)
def test_wrong_sampling_is_caught(name):
    with pytest.raises(AssertionError):
        check_sampling(WRONG[name])


@pytest.mark.parametrize("temperature", [1e-2, 1e-8, 1e-300])
def test_as_the_temperature_goes_to_zero_sampling_becomes_greedy(temperature):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((50, 30)) * 3
    assert np.array_equal(choose_token(z, temperature, None, None, rng), z.argmax(-1)) or temperature == 1e-2
    assert (choose_token(z, temperature, None, None, rng) == z.argmax(-1)).mean() > 0.9
    assert (choose_token(z, 5.0, None, None, rng) == z.argmax(-1)).mean() < 0.7


class Always:
    """A generator whose numbers are all the same."""

    def __init__(self, number: float):
        self.number = number

    def random(self, shape: tuple) -> np.ndarray:
        return np.full(shape, self.number)


@pytest.mark.parametrize("number, top_k, top_p, token", [
    (0.0, None, None, 1), (0.5, None, None, 3), (0.499, None, None, 1),
    (0.999, None, 0.5, 1),                               # the first token alone has a probability of 0.5
    (1.0, 1, None, 1), (1.0, 2, None, 3),                # no number, whatever its rounding, leaves the allowed tokens
])
def test_a_number_on_a_boundary_draws_the_later_token_and_never_one_that_is_not_allowed(number, top_k, top_p, token):
    """Tokens 1 and 3 have the probability 1/2 each: token 1 has the interval [0, 1/2), token 3 has [1/2, 1)."""
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0]])
    assert choose_token(logits, 1.0, top_k, top_p, Always(number)).tolist() == [token]


def test_tokens_are_drawn_in_double_precision(monkeypatch):
    dtypes = []

    def recording(logits: np.ndarray, *options: object) -> np.ndarray:
        dtypes.append(logits.dtype)
        return choose_token(logits, *options)
    monkeypatch.setattr(decode, "choose_token", recording)
    model = model_with("none").to(dtype=np.float32)
    generate(model, IDS, 2, temperature=1.0, rng=np.random.default_rng(0))
    assert dtypes == [np.float64] * 2


def test_sampled_text_is_set_by_its_seed_and_the_same_with_and_without_a_cache():
    model, (ids, mask) = model_with("none"), pad_left(rows())

    def draw(seed: int, **options: bool) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return generate(model, ids, N, mask=mask, temperature=1.5, top_k=9, rng=rng, **options)
    assert np.array_equal(draw(0), draw(0, cache=False)) and not np.array_equal(draw(0), draw(1))


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
IDS, RNG = np.array([[1, 2, 3]]), np.random.default_rng(0)


@pytest.mark.parametrize("ids, more, words", [
    (np.array([1, 2]), {}, r"ids of shape \(B, T\).* got \(2,\)"), (np.zeros((2, 0), int), {}, r"T >= 1, got \(2, 0\)"),
    (IDS, dict(temperature=1.0), "a generator: rng="), (IDS, dict(temperature=-1.0, rng=RNG), "a temperature > 0"),
    (IDS, dict(temperature=1.0, rng=RNG, top_k=0), "top_k wants a whole number >= 1, got 0"),
    (IDS, dict(temperature=1.0, rng=RNG, top_p=0.0), "top_p wants a finite number > 0 and <= 1, got 0.0"),
    (IDS, dict(temperature=1.0, rng=RNG, top_p=1.1), "top_p wants a finite number > 0 and <= 1, got 1.1"),
    (IDS, dict(mask=np.ones((1, 4), bool)), r"mask has shape \(1, 4\), the ids \(1, 3\)"),
    (IDS, dict(mask=np.array([[True, True, False]])), "padding on the left")])
def test_bad_arguments_get_one_clear_sentence(ids, more, words):
    with pytest.raises(ValueError, match=words):
        generate(model_with("none"), ids, 3, **more)


@pytest.mark.parametrize("ids, tokens, more, words", [
    (IDS, -1, {}, "max_new_tokens wants a whole number >= 0, got -1"),
    (IDS, 3, dict(temperature=float("inf"), rng=RNG), "temperature wants a finite number, got inf"),
    (IDS, 3, dict(temperature=float("nan"), rng=RNG), "temperature wants a finite number, got nan"),
    (IDS, 3, dict(temperature=1.0, rng=RNG, top_k=-2), "top_k wants a whole number >= 1, got -2"),
    (IDS, 3, dict(temperature=1.0, rng=RNG, top_p=float("nan")), "top_p wants a finite number > 0 and <= 1, got nan"),
    (IDS, 3, dict(end=-1), "end wants a whole number from 0 to 22, got -1"),
    (IDS, 3, dict(end=23), "end wants a whole number from 0 to 22, got 23"),
    ([[1, 2], [3]], 3, {}, r"ids of shape \(B, T\), got rows of different lengths"),
    ([], 3, {}, r"T >= 1, got \(0,\)"),
])
def test_values_without_sense_are_refused(ids, tokens, more, words):
    model = model_with("none")
    with pytest.raises(ValueError, match=words):
        generate(model, ids, tokens, **more)


@pytest.mark.parametrize("ids, tokens, more, words", [
    (IDS, 2.5, {}, "max_new_tokens wants a whole number >= 0, got 2.5"),
    (IDS, True, {}, "max_new_tokens wants a whole number >= 0, got True"),
    (IDS, None, {}, "max_new_tokens wants a whole number >= 0, got None"),
    (IDS, 3, dict(temperature="hot"), "temperature wants a finite number, got 'hot'"),
    (IDS, 3, dict(temperature=1.0, rng=3), "rng wants a random generator, .* got 3"),
    (IDS, 3, dict(temperature=1.0, rng=RNG, top_k=1.5), "top_k wants a whole number >= 1, got 1.5"),
    (IDS, 3, dict(end="."), "end wants a whole number"),
    (IDS, 3, dict(cache=1), "cache wants True or False, got 1"),
    (IDS, 3, dict(mask="real"), "mask wants True or 1 at real tokens, .* got 'real'"),
    (None, 3, {}, r"ids of shape \(B, T\), got None"),
    ("text", 3, {}, r"ids of shape \(B, T\), got 'text'"),
    ([["a"]], 3, {}, "token ids are integers; got <U1"),
    (IDS * 1.0, 3, {}, "token ids are integers; got float64"),
])
def test_values_of_a_wrong_kind_are_refused(ids, tokens, more, words):
    model = model_with("none")
    with pytest.raises(TypeError, match=words):
        generate(model, ids, tokens, **more)


def test_only_a_language_model_generates():
    with pytest.raises(ValueError, match="score for each of 23 tokens; got a model whose head gives 3 scores"):
        generate(classifier(build("gpt"), 3), IDS, 1)
    with pytest.raises(ValueError, match="got a model whose head gives 0 scores"):
        generate(BERT(BERTConfig(23, 24, 2, 12, 1, 3), head=None), IDS, 1, cache=False)
    for no_model in (None, "gpt", GPT):
        with pytest.raises(TypeError, match="generate wants a model, got "):
            generate(no_model, IDS, 1)


def test_generating_leaves_the_mode_of_every_module_as_it_was():
    model = model_with("none").train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    generate(model, IDS, 2)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("keyword, near", [
    ("do_sample", "temperature"), ("temprature", "temperature"), ("attention_mask", "mask"), ("eos_token_id", "end"),
    ("max_length", "max_new_tokens"), ("use_cache", "cache"), ("topk", "top_k"), ("tasks", "task"), ("seed", "rng")])
def test_an_unknown_keyword_is_refused_and_the_near_one_named(keyword, near):
    with pytest.raises(TypeError, match=f"generate got an unknown keyword '{keyword}': did you mean '{near}'"):
        generate(model_with("none"), IDS, 1, **{keyword: True})
    with pytest.raises(TypeError, match="'token_type_ids'"):
        generate(model_with("none"), IDS, 1, token_type_ids=IDS)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["none", "prompt"])
def test_text_that_outgrows_the_positions_raises(cache, name):
    model, room = model_with(name), 24 - (3 if name == "prompt" else 0)          # 24 positions; a prompt takes three
    full = np.ones((1, room), int)
    assert generate(model, full, 1, cache=cache).shape == (1, room + 1)          # its last token is never fed
    with pytest.raises(ValueError, match="longer than the model's 24 positions"):
        generate(model, full, 2, cache=cache)
    assert not model.training


def test_bert_says_that_it_cannot_continue_from_a_cache():
    with pytest.raises(ValueError, match="BERT looks both ways"):
        generate(BERT(BERTConfig(23, 24, 2, 12, 1, 3)), IDS, 1)


def test_padding_on_the_left_keeps_every_row_whole():
    ids, mask = pad_left([[1, 2, 3], [4]], pad=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[True] * 3, [False, False, True]]
    assert pad_left([[1, 2], [4]])[0].tolist() == [[1, 2], [0, 4]]
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token each"):
            pad_left(bad)
    assert pad_left([np.array([1, 2]), (4,)])[0].tolist() == [[1, 2], [0, 4]]
    for bad, words in ((None, "a list of rows"), (3, "a list of rows"), (["ab"], "rows, each a list of token ids"),
                       ([[1.5]], "token id of pad_left wants a whole number"), ([[True]], "wants a whole number")):
        with pytest.raises(TypeError, match=words):
            pad_left(bad)
    for more in ({"pad": -1}, {"rows": [[-3]]}):
        with pytest.raises(ValueError, match="wants a whole number >= 0, got -"):
            pad_left(**{"rows": [[1]], **more})


def test_only_the_last_position_goes_through_the_head_and_only_new_tokens_through_the_blocks(monkeypatch):
    shapes = []
    model = GPT(GPTConfig(23, 24, 12, 1, 3)).eval()

    def record(name: str, module: type) -> None:
        forward = module.forward

        def recording(self, x, ctx):
            shapes.append((name, x.shape))
            return forward(self, x, ctx)
        monkeypatch.setattr(module, "forward", recording)
    record("head", type(model.head))
    record("block", type(model.blocks[0]))
    decode.generate(model, np.ones((2, 5), int), 3)
    assert shapes == [("block", (2, 5, 12)), ("head", (2, 12))] + [("block", (2, 1, 12)), ("head", (2, 12))] * 2
