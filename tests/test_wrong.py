"""The checks of test_ops.py can fail: they reject each wrong op of wrong.py within a few examples, by an assertion."""
from __future__ import annotations

import numpy as np
import pytest
from helpers import host, leaf, wrong_answers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_ops import check, examples, function
from wrong import WRONG

from tinyft import kernels, ops
from tinyft.tensor import Tensor

FEW = settings(max_examples=60, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
               suppress_health_check=list(HealthCheck))


def draws(name, n=60):
    """The examples for `check`: the same for a real op and a wrong op."""
    found = []

    @FEW
    @given(st.data())
    def collect(data):
        found.append(data.draw(examples(name)))

    collect()
    return found[:n]


@pytest.fixture(scope="module", autouse=True)
def _definitions():
    with kernels.definitions():
        yield


@wrong_answers
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_rejected(name):
    wrong = WRONG[name]
    assert wrong.belief.endswith((".", ")"))
    assert len(wrong.belief) > 20
    with wrong.context():
        for example, rng, _ in draws(wrong.target):
            try:
                check(wrong.f, wrong.target, example, rng)
            except AssertionError:
                return
    pytest.fail(f"{name} passes for {wrong.target}")


@wrong_answers
@pytest.mark.parametrize("name", sorted({wrong.target for wrong in WRONG.values()}))
def test_the_right_answer_passes_the_same_examples(name):
    for example, rng, _ in draws(name):
        check(function(name), name, example, rng)


def test_there_are_many_wrong_answers_with_different_beliefs():
    assert len(WRONG) >= 20
    assert len({wrong.belief for wrong in WRONG.values()}) == len(WRONG)


def test_a_sum_loss_accepts_a_wrong_softmax():
    """Through .sum(), the right gradient of softmax is zero: so a pullback that always returns zero looks right."""
    x = leaf(np.random.default_rng(0).standard_normal((3, 4)))
    WRONG["softmax_zero"].f(x).sum().backward()
    right = Tensor(x.data, requires_grad=True)
    ops.softmax(right).sum().backward()
    assert (host(x.grad) == 0).all()
    assert np.abs(host(right.grad)).max() < 1e-15
