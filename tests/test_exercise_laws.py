"""The exercises: the library's own answers keep every law, every wrong answer is caught, and a stub says enough."""
from __future__ import annotations

import ast
import dataclasses
import doctest
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import host_only
from wrong import replaced

import tinyft
from tinyft import array, kernels
from tinyft.learn import folders, selftest, sizes
from tinyft.learn.checker import run
from tinyft.learn.exercise import Exercise, WrongAnswer, exercises, find
from tinyft.learn.subject import Subject

ALL = exercises()


# ── the laws ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ALL)
def test_the_exercise_accepts_the_reference_and_catches_every_wrong_answer(name):
    if ALL[name].missing:
        pytest.skip(ALL[name].missing)
    if array.backend() == "numpy":
        assert selftest.examine(ALL[name], seeds=1) == []
    else:                                                 # what a wrong answer is told is tested on NumPy
        with kernels.definitions():
            assert selftest.examine_reference(ALL[name], seed=1) == []
        if name.startswith("experts."):                   # those of the other lessons may use NumPy's functions
            assert stopped_by_the_backend(ALL[name]) == []


def stopped_by_the_backend(e: Exercise) -> list[str]:
    """The beliefs of the wrong answers that fail since they are written for NumPy's arrays, and not for their error."""
    found = []
    with kernels.definitions(), replaced(sizes, "QUICK", [(2, 3)]):              # three inputs of size 2 for each law
        for wrong in e.wrong_answers:
            for law in e.laws:
                problem = run(law, Subject(e, wrong.function), shrink=False).problem
                if problem and f"on the backend '{array.backend()}'" in f"{problem.message} {problem.diagnosis}":
                    found.append(wrong.belief)
                if problem:
                    break
    return found


@host_only
@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("experts.")])
def test_wrong_answers_of_routing_are_wrong_on_every_backend(name):
    """Those of all exercises are tried where the tests run on the strict backend."""
    array.use("strict")
    try:
        assert stopped_by_the_backend(ALL[name]) == []
    finally:
        array.use("numpy")


@host_only
def test_a_wrong_answer_for_numpy_alone_is_noticed():
    right = ALL["experts.expert_capacity"]
    planted = WrongAnswer("NumPy's functions take every array.", np_alone, "rounded down", subtle=False)
    array.use("strict")
    try:
        assert stopped_by_the_backend(dataclasses.replace(right, wrong_answers=[planted])) == [planted.belief]
    finally:
        array.use("numpy")


def np_alone(real, factor, experts, least):
    n = real.sum(axis=1)
    return np.minimum(n, np.maximum(np.ceil(factor * n / experts), least))


@host_only
def test_there_are_enough_of_them_and_each_is_complete():
    assert len(ALL) >= 24 and {n.split(".")[0] for n in ALL} == set(folders.lessons())
    for e in ALL.values():
        assert len({law.title for law in e.laws}) == len(e.laws) and 1 <= e.minutes <= 60
        assert e.suffix == ".cu" or ast.parse(e.skeleton())
        assert e.source() and all(len(w.belief) > 10 for w in e.wrong_answers)
        assert not any(callable(w.function) and w.function.__doc__ for w in e.wrong_answers)


@host_only
def test_the_selftest_can_fail():
    e = find("sum_to")
    kept, law = list(e.wrong_answers), e.laws.pop()
    try:
        assert any("not caught" in s or "subtle" in s for s in selftest.examine(e, seeds=1)), "a law is missing"
        e.laws.append(law)
        e.wrong_answers = [type(kept[0])(kept[0].belief, kept[0].function, "something else", subtle=True)]
        found = "\n".join(selftest.examine(e, seeds=1))
        assert "three wrong answers" in found
        assert "does not say" in found
        assert "no subtle error" in found
    finally:
        e.wrong_answers[:], e.laws = kept, e.laws if law in e.laws else [*e.laws, law]


@host_only
def test_the_skeleton_of_a_kernel_is_its_comment_and_signature():
    e = find("sum_rows")
    text, kernel = e.skeleton(), e.source()
    assert text.startswith("// gpu.sum_rows: 23 The GPU")
    assert kernel.split("{")[0] in text
    assert "__syncthreads" not in text + e.statement()[1]
    assert text.rstrip().endswith("// yours to write, in about 10 lines\n}")
    assert kernel.endswith("parts[(size_t)blockIdx.y * n + column] = sum;\n}")
    assert "add_bias" not in text + kernel
    assert (Path(tinyft.__file__).parents[1] / e.file).name == "bias.cu"
    with pytest.raises(ValueError, match="0 times in sum_rows, not once"):
        e.instead("A belief that has drifted.", "__syncwarp();", "", "nothing")


@host_only
def test_the_skeleton_has_signature_and_docstring_but_no_body():
    text = find("autograd.layer_norm").skeleton()
    assert "@op(" in text
    assert "def layer_norm(x, w, b, eps=1e-5):" in text
    assert "x̂ = (x − μ)/σ" in text
    assert "centred" not in text
    assert "from tinyft.tensor import op" in text
    assert "from tinyft.array import xp" in text
    assert "raise NotImplementedError" in text
    assert "_softmax" not in find("softmax").skeleton()
    assert "def _softmax" in find("softmax").source()
    assert "def backward(self" in find("backward").skeleton()
    assert "_state" not in find("backward").imports()


# ── the stub says what a learner needs ───────────────────────────────────────────────────────────────────────────────
def run_example(e: Exercise) -> list[str]:
    """The lines of an exercise's example that do not print what it says, on the library's function."""
    names: dict[str, Any] = {}
    exec(e.imports() if e.suffix == ".py" else "import numpy as np", names)
    names[e.function] = e.reference()
    example = doctest.DocTestParser().get_doctest(textwrap.dedent(e.example), names, e.name, None, 0)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
    return report


@host_only
@pytest.mark.parametrize("name", ALL)
def test_a_stub_says_what_may_be_used_and_shows_an_example_that_is_right(name):
    e = exercises()[name]
    assert e.may_use, "you may use"
    assert e.example, "an example"
    for line in e.guide().splitlines():
        assert line in e.skeleton()
    assert ">>>" in e.example
    if not e.missing:
        assert run_example(e) == []


@host_only
@pytest.mark.parametrize("name", [name for name, e in exercises().items() if e.suffix == ".py"])
def test_a_stub_imports_nothing_under_the_name_of_a_parameter(name):
    e = exercises()[name]
    names: dict[str, Any] = {}
    exec(e.imports(), names)
    assert not names.keys() & e.signature().parameters.keys()


@host_only
def test_an_example_with_a_wrong_result_is_caught():
    e = dataclasses.replace(exercises()["autograd.sum_to"], example="""
        >>> sum_to(np.ones((2, 3)), (3,))
        array([2., 2., 2.])
        """)
    assert run_example(e) == []
    assert run_example(dataclasses.replace(e, example=e.example.replace("2.]", "3.]"))) != []
