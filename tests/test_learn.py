"""The exercises: the engine that checks them, what it says to bad input, the commands and the learner's files."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import not_on_strict

import tinyft
from tinyft import array, cli
from tinyft.kernels.cuda.cpu_kernel import KernelError
from tinyft.learn import checker, diagnose, isolated, show, sizes
from tinyft.learn import work as work_module
from tinyft.learn.diagnose import Mismatch, close
from tinyft.learn.exercise import exercises, find
from tinyft.learn.subject import Subject
from tinyft.learn.work import Work, fcntl

pytestmark = not_on_strict("texts and files of a learner; test_exercise_laws.py has the laws on every backend")
ALL = exercises()
RIGHT = {
    "autograd.sum_to": """
def sum_to(g, shape):
    if g.itemsize == 2:
        g = g.astype("float32")
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)
"""}


@pytest.fixture
def learner(tmp_path, monkeypatch, capsys):
    """A folder to work in: learner(name, text) writes the file, learner.run(...) is the command; both give what is
    printed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    class Learner:
        def run(self, *words: str) -> str:
            self.status = cli.main(list(words))
            self.out, self.err = capsys.readouterr()
            assert "Traceback" not in self.out + self.err
            assert "site-packages" not in self.out + self.err
            return self.out + self.err

        def __call__(self, name: str, text: str, *words: str) -> str:
            Work().folder.mkdir(exist_ok=True)
            Work().path(find(name)).write_text("import numpy as np\n" + text, encoding="utf-8")
            return self.run("check", name, *words)
    return Learner()


# ── bad input: one friendly message each ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("text, said", [
    ("def sum_to(g, shape)\n    return g\n", ["cannot read work/autograd.sum_to.py", "line 2"]),
    ("def sum_to(g, shape):\nreturn g\n", ["cannot read", "line 3"]),
    ("1 / 0\n", ["ends with ZeroDivisionError", "autograd.sum_to.py:2   1 / 0"]),
    ("import nothing_like_it\n", ["ends with ModuleNotFoundError"]),
    ("raise SystemExit\n", ["ends with SystemExit"]),
    ("def sumto(g, shape):\n    return g\n", ["has no function sum_to, only sumto"]),
    ("", ["has no function sum_to"]),
    ("def sum_to(g):\n    return g\n", ["sum_to takes (g, shape); yours takes (g)"]),
    ("def sum_to(shape, g):\n    return g\n", ["sum_to takes (g, shape); yours takes (shape, g)"]),
    ("def sum_to(g, shape, more):\n    return g\n", ["yours takes (g, shape, more)"]),
    ("def sum_to(g, shape):\n    pass\n", ["should be an array of shape (1, 1)", "is a `return` missing?"]),
    ("def sum_to(g, shape):\n    return g.tolist()\n", ["should be an array", "a list, [[1.0]]"]),
    ("def sum_to(g, shape):\n    return 3\n", ["should be an array", "an int, 3"]),
    ("def sum_to(g, shape):\n    return shape.sum()\n",
     ["AttributeError", "autograd.sum_to.py:3   return shape.sum()"]),
    ("def sum_to(g, shape):\n    exit()\n", ["SystemExit"]),
    ("def sum_to(g, shape):\n    raise KeyboardInterrupt\n", ["ended with KeyboardInterrupt", "sum_to.py:3"]),
    ("def sum_to(g, shape):\n    return g.astype(object)\n", ["an array of dtype object"]),
    ("async def sum_to(g, shape):\n    return g\n", ["a coroutine"]), ("sum_to = 3\n", ["has no function sum_to"]),
    ("def sum_to(g, shape):\n    import os; os._exit(3)\n", ["ended the whole process (exit status 3)"]),
    ("def sum_to(g, shape):\n    return sum_to(g, shape)\n", ["RecursionError"]),
    ("def sum_to(g, shape):\n    g += 1\n    return g\n", ["it changed its argument g"]),
    ("def sum_to(g, shape):\n    return g + np.random.default_rng().standard_normal()\n", ["different answers"]),
    ("from tinyft.tensor import sum_to\n", ["the library's own sum_to"]),
    ("import tinyft.tensor as t\ndef sum_to(g, shape):\n    return t.sum_to(g, shape)\n",
     ["which is the answer", "sum_to.py:4   return t.sum_to(g, shape)"]),
    ("from tinyft.tensor import sum_to as f\n"
     "def sum_to(g, shape):\n    try:\n        return f(g, shape)\n    except Exception:\n        return g\n",
     ["which is the answer"]),
    ("def sum_to(g, shape):\n    print('x' * 10**6)\n    return g.sum()\n",
     ["Your function printed", "996,001 more characters"]),
    ("def sum_to(g, shape):\n    print('seen', g.shape)\n    return -g\n", ["the opposite sign", "seen (1, 1)"]),
    ("def sum_to(g, shape):\n    return 1 / (0 * g)\n", ["nan or inf", "RuntimeWarning: divide by zero"]),
    ("def sum_to(g, shape):\n    raise NotImplementedError\n", ["not written yet"]),
    ("class E(Exception):\n    def __str__(self):\n        raise ValueError('x')\ndef sum_to(g, shape):\n    raise E\n",
     ["The smallest input that fails", "E: (its __str__ raises ValueError)", "autograd.sum_to.py:6   raise E"]),
    ("class E(Exception):\n    def __str__(self):\n        return None\nraise E\n", ["its __str__ raises TypeError"]),
    ("def sum_to(g, shape):\n    raise ValueError('word\\n' * 1000)\n", ["ValueError: word", "and 995 more lines"]),
    ("def sum_to(g, shape):\n    raise ValueError('w' * 10**6)\n", ["ValueError: www", "www..."]),
    (f"x = {'(' * 3000}{')' * 3000}\n", ["too many nested parentheses", "(((..."]),
    ("x = 1\0\n", ["cannot read work/autograd.sum_to.py", "null bytes"]),
    ("def sum_to(g, shape):\n    if True:\n\treturn g\n        return g\n", ["inconsistent use of tabs", "line 4"]),
    ("import sys\ndef sum_to(g, shape):\n    sys.stdout.buffer.write(b'bytes')\n    print(b'more')\n    return -g\n",
     ["the opposite sign", "bytesb'more'"]),
    ("def sum_to(g, shape):\n    print('\\x1b[2J\\x07')\n    return -g\n", ["\\x1b[2J\\x07"]),
    ("def sum_to(g, shape):\n    print('\\ud800')\n    return -g\n", ["the opposite sign"]),
    ("def sum_to(g, shape):\n    return input('? ')\n", ["EOFError", "Your function printed"]),
    ("def sum_to(g, shape):\n    raise GeneratorExit\n", ["ended with GeneratorExit"]),
    ("class L:\n    def __repr__(self):\n        raise ValueError('no')\ndef sum_to(g, shape):\n    return L()\n",
     ["ValueError: no"]),
    ("from nothing.like.it import x\n", ["ends with ModuleNotFoundError", "autograd.sum_to.py:2"]),
    ("import sys\nsys.exit('bye')\n", ["ends with SystemExit: bye"]),
    ("def sum_to(g, shape):\n    return np.ma.masked_array(g + 1, mask=True)\n", ["yours is a MaskedArray"]),
    ("def sum_to(g, shape):\n    return g.astype(np.int8)\n", ["the dtype is int8, expected float64"]),
    ("def sum_to(g, shape):\n    return g.astype(np.float32)\n", ["the dtype is float32, expected float64"])])
def test_bad_input_gets_one_friendly_message(learner, text, said):
    out = learner("sum_to", text)
    assert learner.status == 1 and not learner.err
    for words in said:
        assert words in out, out
    assert len(out.splitlines()) < 30


@pytest.mark.parametrize("change", [
    lambda text: text.encode("utf-8-sig"), lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace("    ", "\t").encode(), lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    lambda text: ("# -*- coding: latin-1 -*-\n# \xe4\n" + text).encode("latin-1")],
    ids=["a byte order mark", "CRLF", "tabs", "both", "latin-1"])
def test_a_file_from_any_editor_can_be_solved(learner, change):
    Work().folder.mkdir()
    Work().path(find("sum_to")).write_bytes(change(RIGHT["autograd.sum_to"]))
    assert "All 7 laws hold" in learner.run("check") and learner.status == 0
    assert "def sum_to" in learner.run("diff")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo if hasattr(os, "mkfifo") else Path.mkdir])
def test_something_else_in_the_place_of_a_file_is_one_sentence(learner, make):
    Path("work").mkdir()
    make(Work().path(find("sum_to")))
    for command in ("check", "diff", "debug"):
        out = learner.run(command, "sum_to")
        assert "wants to be a file with your function" in out and len(out.splitlines()) == 1 and learner.status == 1
    assert "it is there already" in learner.run("start", "sum_to")
    assert "is kept as" in learner.run("reset", "sum_to")
    assert "not written yet" in learner.run("check", "sum_to")


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["a file", "a dead link"])
@pytest.mark.parametrize("words", ["start sum_to", "check", "check sum_to", "hint", "reset sum_to", "diff sum_to",
                                   "debug sum_to"])
def test_a_folder_that_is_none_is_one_sentence(learner, make, words):
    make(Path("work"))
    out = learner.run(*words.split())
    assert "work wants to be the folder of your exercises" in out and len(out.splitlines()) == 1 and learner.status == 1
    assert "def sum_to" in learner.run("solution", "sum_to") and learner.status == 0
    assert "hint 1" in learner.run("hint", "sum_to") and "not saved" in learner.out and learner.status == 1


def test_a_disk_that_is_full_leaves_everything_as_it_was(learner, monkeypatch):
    learner("sum_to", "mine = 1\n")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Work, "_check_folder", lambda self: None)
    monkeypatch.setattr(work_module, "_write_new", full)
    for words in (("start", "matmul"), ("reset", "sum_to")):
        out = learner.run(*words)
        assert "could not write work/" in out and "No space left" in out and learner.status == 1
    assert "mine = 1" in Work().path(find("sum_to")).read_text()
    assert not Work().path(find("matmul")).exists() and not list(Path("work").glob("*.bak"))


@pytest.mark.parametrize("text",
                         ["while True:\n    pass\n",
                          "def sum_to(g, shape):\n    while True:\n        try:\n            g = g + 0\n"
                                  "        except Exception:\n            pass\n"])
def test_an_endless_loop_is_cut_off(learner, text, monkeypatch):
    monkeypatch.setattr(checker, "ONE_CALL", 0.3)
    monkeypatch.setattr(isolated, "SILENCE", 4.0)  # Python 3.10 looks at no signal before a `try`
    begun = time.monotonic()
    out = learner("sum_to", text)
    assert "an endless loop?" in out
    assert "autograd.sum_to.py:" in out
    assert learner.status == 1
    assert time.monotonic() - begun < 12


def test_a_slow_moment_does_not_take_back_what_was_found(monkeypatch):
    monkeypatch.setattr(checker, "ONE_CALL", 0.3)
    e = find("sum_to")
    trial = checker.Trial(e.laws[0], checker.Subject(e, lambda g, shape: -g), __file__)
    assert trial.search().kind == "mismatch"
    trial.subject = checker.Subject(e, lambda g, shape: time.sleep(3) or -g)
    assert trial.same_again()
    trial.subject = checker.Subject(e, lambda g, shape: g)
    assert not trial.same_again()


def test_a_busy_machine_ends_no_right_answer(monkeypatch):
    """The limit counts processor time. A call that gets none is ended later, by the clock."""
    monkeypatch.setattr(time, "process_time", lambda: 0.0)             # another program has the processor
    with checker.limited(0.1):
        wait_until(time.monotonic() + 0.25)
    with pytest.raises(checker.TooLong), checker.limited(0.1):
        wait_until(time.monotonic() + 30)
    monkeypatch.undo()
    begun = time.monotonic()
    with pytest.raises(checker.TooLong), checker.limited(0.1):
        wait_until(begun + 30)


def wait_until(end: float) -> None:
    while time.monotonic() < end:
        pass


def test_what_cannot_be_interrupted_is_killed(learner, monkeypatch):
    monkeypatch.setattr(checker, "ONE_CALL", 0.2)
    monkeypatch.setattr(isolated, "SILENCE", 1.0)
    out = learner("sum_to", "import time\ndef sum_to(g, shape):\n    while True:\n        try:\n"
                  "            while True: time.sleep(0.01)\n        except BaseException: pass\n")
    assert "nothing came back for 1 seconds" in out
    assert "sum_to.py:6   while True" in out
    assert learner.status == 1


@pytest.mark.parametrize("text, said", [
    ("def softmax(x):\n    return x\n", ["gives back two things, its value and a tuple of pullbacks"]),
    ("def softmax(x):\n    return x, (x,)\n", ["a tuple of functions"]),
    ("def softmax(x):\n    return x.tolist(), (lambda g: g,)\n", ["the value of softmax should be an array"]),
    ("from tinyft.tensor import op\n@op('... n -> ... n')\ndef softmax(x):\n"
     "    return np.exp(x) / np.exp(x).sum(), (lambda g: g,)\n",
     ["wrong axis"]),
    ("from tinyft import ops\ndef softmax(x):\n    return ops.softmax.definition(x)\n", ["which is the answer"]),
    ("from tinyft import ops\ndef softmax(x):\n    return ops._softmax(x), (lambda g: g,)\n", ["which is the answer"])])
def test_bad_ops(learner, text, said):
    out = learner("softmax", text)
    assert learner.status == 1 and all(words in out for words in said), out


BIAS = 'extern "C" __global__ void add_bias(T* y, const T* b, long long size, int n) {\n  %s\n}\n'
STEP = "for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) %s"


@pytest.mark.skipif(bool(find("add_bias").missing), reason="no C++ compiler: install g++")
@pytest.mark.parametrize("text, said", [
    (BIAS % (STEP % "y[i] = y[i] + b[i % n];"), ["All 4 laws hold"]),
    (BIAS % "// yours", ["not written yet"]),
    (BIAS % "flot x;", ["does not take this kernel", "add_bias.cu:2:"]),
    (BIAS.replace("int n", "long long n") % ";", ["keep the parameters as they are", "long long size, int n)"]),
    (BIAS.replace("add_bias", "bias") % ";", ["it has no kernel add_bias"]), ("", ["it has no kernel add_bias"]),
    ("__global__ void add_bias(float* y) { y[0] = 1; }", ['holds no extern "C" __global__ void add_bias']),
    (BIAS % "y[0] += b[0];", ["yours    = [[65.]]", "b = [1.]"]),
    (BIAS % (STEP % "y[i] += b[i / n];"), ["The smallest input that fails", "memory that nobody wrote"]),
    (BIAS % "for (int i = 0; i < size; i++) y[i] = threadIdx.x;",
     ["depends on the order of the threads: at [0, 0] it is 63, and 0 when"]),
    (BIAS % "y[threadIdx.x] += 1;", ["and wrote past the end of it"]),
    (BIAS % "if (threadIdx.x < 3) __syncthreads();", ["deadlock in block (0, 0, 0)"])])
def test_a_kernel_of_the_learners(learner, text, said):
    Work().folder.mkdir()
    Work().path(find("add_bias")).write_text(text, encoding="utf-8")
    out = learner.run("check")
    assert all(words in out for words in said) and len(out.splitlines()) < 30, out


@pytest.mark.skipif(bool(find("add_bias").missing), reason="no C++ compiler: install g++")
def test_a_kernel_in_a_notebook_and_the_commands(learner, capsys):
    assert tinyft.check("add_bias", find("add_bias").source()) is True
    assert tinyft.check("add_bias", print) is False
    assert "is written in CUDA C" in capsys.readouterr().out
    assert "work/gpu.add_bias.cu" in learner.run("start", "add_bias")
    assert "not written yet" in learner.run("check")
    assert "// tinyft/kernels/cuda/bias.cu" in learner.run("solution")
    assert "+    y[i] = (T)(" in learner.run("diff")
    assert "several blocks share the numbers" in learner.run("read", "add_bias")
    assert "no Python" in learner.run("debug")
    assert "is kept as work/gpu.add_bias.cu." in learner.run("reset")


def test_without_a_compiler_kernels_are_left_out_and_said_to_be(learner, monkeypatch):
    learner.run("start", "add_bias")
    Path("work/gpu.add_bias.cu").write_text(BIAS % "y[0] = 1;")
    monkeypatch.setattr("tinyft.learn.cuda.compiler",
                        lambda: (_ for _ in ()).throw(KernelError("no C++ compiler found: install g++")))
    out = learner.run("selftest", "add_bias", "adam_rates")
    assert "add_bias" in out
    assert "no C++ compiler found" in out
    assert "gpu.adam_rates               3 laws" in out
    assert learner.status == 0
    assert "no C++ compiler found" in learner.run("check", "add_bias") and learner.status == 1


def test_a_check_leaves_the_library_as_it_was(learner):
    from tinyft import dispatch, ops, tensor
    before = (tensor.sum_to, ops.softmax, ops.softmax.definition, dict(tensor.OPS), tensor.Tensor.backward,
              {key: list(found) for key, found in dispatch.KERNELS.items()})
    for name, text in (("softmax",
                        "from tinyft.tensor import op\n@op('... n -> ... n')\ndef softmax(x):\n    return x\n"),
                       ("sum_to", "1 / 0")):
        Work().folder.mkdir(exist_ok=True)
        path = Work().path(find(name))
        path.write_text(text)
        assert [o for o in checker.check_file(find(name), path) if o.problem]
    assert before == (tensor.sum_to, ops.softmax, ops.softmax.definition, dict(tensor.OPS), tensor.Tensor.backward,
                      {key: list(found) for key, found in dispatch.KERNELS.items()})


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_from_start_to_solved(learner):
    out = learner.run("start", "sum_to")
    assert "work/autograd.sum_to.py   ★★☆☆☆  about 10 min" in out and "tinyft check" in out
    assert "not written yet" in learner.run("check") and learner.status == 1
    assert "it is there already" in learner.run("start", "sum_to")
    assert "hint 1 of 3" in learner.run("hint")
    assert "hint 2 of 3" in learner.run("hint")
    assert "tinyft solution" in learner.run("hint")
    out = learner("sum_to", RIGHT["autograd.sum_to"])
    assert learner.status == 0
    assert out.count("✓") == 7
    assert "All 7 laws hold.  Next:  tinyft start autograd.matmul" in out
    assert "solved   3 hints" in learner.run("status")
    assert "def sum_to" in learner.run("solution")
    assert "+    if g.shape == shape:" in learner.run("diff")
    assert "autograd.matmul" in learner.run("start") and Path("work/autograd.matmul.py").exists()
    assert "is kept as" in learner.run("reset", "sum_to")
    assert "raise NotImplementedError" in Path("work/autograd.sum_to.py").read_text()
    assert len(list(Path("work").glob("*.bak"))) == 1
    learner.run("start", "autograd")
    assert len(list(Path("work").glob("autograd.*.py"))) == 6


def test_a_notebook_is_not_written_twice(learner):
    assert "open it in VS Code" in learner.run("lesson", "lora", "--notebook")
    out = learner.run("lesson", "lora", "--notebook")
    assert learner.status == 1
    assert "work/08_lora.ipynb is there already, and nothing was changed" in out


def test_start_never_overwrites(learner):
    learner("sum_to", "mine = 1\n")
    learner.run("start", "sum_to")
    assert "mine = 1" in Path("work/autograd.sum_to.py").read_text()


@pytest.mark.parametrize("words, said", [
    (["check"], "nothing is started"), (["check", "sum_two"], "did you mean sum_to"),
    (["check", "--all"], "nothing is started"),
    (["check", "sum_to", "matmul"], "`tinyft start autograd.sum_to` writes it"),
    (["start", "autogard"], "did you mean autograd"), (["hint", "Sum_Two"], "did you mean sum_to"),
    (["start", ""], "there is no exercise ''; `tinyft status`"), (["reset", "../sum_two"], "there is no exercise"),
    (["solution", "softmaks"], "did you mean softmax"), (["debug", "add_bias"], "is no Python"),
    (["lesson", "autogrda"], "did you mean autograd"), (["read", "tensr"], "did you mean tensor"),
    (["read", "*"], "neither an exercise nor a module '*'"), (["read", ""], "neither an exercise nor a module"),
    (["hint", "nonsense"], "there is no exercise 'nonsense'"),
    (["check", "matmul"], "`tinyft start autograd.matmul` writes it"), (["lesson", "nonsense"], "there is no lesson"),
    (["read", "nonsense"], "neither an exercise nor a module"), (["diff", "matmul"], "is not there")])
def test_wrong_commands_say_what_to_do(learner, words, said):
    assert said in learner.run(*words) and learner.status == 1 and not learner.out


def test_a_name_may_be_a_path_or_the_number_of_a_lesson(learner):
    learner.run("start", "01")
    assert len(list(Path("work").glob("autograd.*.py"))) == 6
    for name in ("work/autograd.sum_to.py", "autograd.sum_to.py", "sum_to", "autograd.sum_to"):
        assert "not written yet" in learner.run("check", name)
    assert "not written yet" in learner.run("check", "01_autograd")


def test_a_name_of_two_exercises_is_refused_with_both(monkeypatch):
    e = find("sum_to")
    other = type(e)(e.target, 2, 10, e.hints, lesson="another")
    monkeypatch.setattr("tinyft.learn.exercise.exercises", lambda: {e.name: e, other.name: other})
    with pytest.raises(ValueError, match="name of several exercises: autograd.sum_to and another.sum_to"):
        find("sum_to")
    assert find("autograd.sum_to") is e


def test_read_shows_what_is_asked_and_the_sources(learner):
    out = learner.run("read", "matmul")
    assert "C = A B" in out and "the gradient of B is Aᵀ G" in out and "a @ b" not in out
    assert "def sum_to" in learner.run("read", "tensor")
    assert "class LoRA" in learner.run("read", "lora")
    assert "01 Tensors and autograd" in learner.run("lesson")
    assert "Hypothesis is there" in learner.run("doctor")


# ── the progress file ────────────────────────────────────────────────────────────────────────────────────────────────
PROGRESS = Path("work/.progress.json")
DAMAGED = [b"{", b"[1]", b"null", b'"solved"', b"\xff\xfe{", b"[" * 100_000, b'{"autograd.sum_to": {"hints": 1}',
           b"\0" * 64]
OF_ANOTHER_TYPE = ["3", "null", '{"hints": "three"}', '{"hints": null}', '{"hints": [1]}', '{"hints": {"n": 1}}',
                   '{"hints": 1e999}', '{"hints": -5}', '{"hints": true}', '{"hints": 0.5}', '{"hints": NaN}',
                   '{"solved": "no"}', '{"solved": 1}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_progress_file_counts_as_empty_and_is_kept(learner, content):
    learner.run("start", "sum_to")
    PROGRESS.write_bytes(content)
    assert "0 of" in learner.run("status")
    assert PROGRESS.read_bytes() == content
    assert "hint 1" in learner.run("hint")
    assert json.loads(PROGRESS.read_text()) == {"autograd.sum_to": {"hints": 1}}
    kept, = Path("work").glob(".progress.json.*.bak")
    assert kept.read_bytes() == content


@pytest.mark.parametrize("facts", OF_ANOTHER_TYPE)
def test_a_fact_of_another_type_counts_as_missing(learner, facts):
    learner.run("start", "sum_to")
    PROGRESS.write_text(f'{{"autograd.sum_to": {facts}, "autograd.matmul": {{"solved": true}}, "theirs": [1, "x"]}}')
    assert "1 of" in learner.run("status")
    assert "hint 1 of 3" in learner.run("hint") and learner.status == 0
    found = json.loads(PROGRESS.read_text())
    assert found["autograd.sum_to"]["hints"] == 1
    assert found["autograd.matmul"] == {"solved": True}
    assert found["theirs"] == [1, "x"], "an entry of somebody else is kept"


@pytest.mark.parametrize("taken", [3, 7, 10**40])
def test_after_the_last_hint_comes_the_last_hint(learner, taken):
    Path("work").mkdir()
    PROGRESS.write_text(f'{{"autograd.sum_to": {{"hints": {taken}}}}}')
    assert "hint 3 of 3" in learner.run("hint", "sum_to")
    assert "3 hints" in learner.run("status")


def test_an_empty_progress_file_and_one_with_a_byte_order_mark(learner):
    Path("work").mkdir()
    PROGRESS.write_bytes(b"")
    assert "hint 1" in learner.run("hint", "sum_to")
    PROGRESS.write_text(PROGRESS.read_text(), encoding="utf-8-sig")
    assert "hint 2" in learner.run("hint", "sum_to")
    assert not list(Path("work").glob("*.bak"))


def test_a_progress_file_that_cannot_be_written_is_one_sentence_and_nothing_else_is_lost(learner):
    PROGRESS.mkdir(parents=True)
    out = learner.run("hint", "sum_to")
    assert "hint 1 of 3" in out and "The progress is not saved: could not write" in out and learner.status == 1
    out = learner("sum_to", RIGHT["autograd.sum_to"])
    assert "All 7 laws hold" in out and "The progress is not saved" in out and learner.status == 1
    assert "is as at the start; yours is kept as" in learner.run("reset", "sum_to")


def test_a_progress_file_elsewhere_stays_a_link(learner, tmp_path):
    Path("work").mkdir()
    (tmp_path / "elsewhere.json").write_text("{}")
    PROGRESS.symlink_to(tmp_path / "elsewhere.json")
    learner.run("hint", "sum_to")
    assert PROGRESS.is_symlink()
    assert "sum_to" in (tmp_path / "elsewhere.json").read_text()


def test_a_check_in_one_terminal_keeps_what_another_saved(learner):
    """The progress is read anew before it is written: a process that read it earlier does not write old facts."""
    one, other = Work(), Work()
    one.record(find("sum_to"), solved=True)
    other.record(find("matmul"), solved=True)
    assert one.progress.keys() == {"autograd.sum_to"}
    one.take_hint(find("matmul"))
    for work in (one, Work()):
        assert work.solved(find("sum_to")) and work.solved(find("matmul")) and work.hints(find("matmul")) == 1


MANY = """
import sys
import textwrap
from tinyft.learn.exercise import exercises
from tinyft.learn.work import Work
n = int(sys.argv[1])
for e in list(exercises().values())[n::4]:
    Work().record(e, solved=True)
for e in list(exercises().values())[:2]:
    Work().take_hint(e)
"""


def run_python(code, *words, **options):
    env = {**os.environ, "PYTHONPATH": str(Path(tinyft.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)


def test_four_processes_that_save_at_once_lose_nothing(learner):
    processes = [run_python(MANY, str(n)) for n in range(4)]
    said = [p.communicate()[0] for p in processes]
    assert not any(said), said
    work = Work()
    assert all(work.solved(e) for e in ALL.values())
    assert [work.hints(e) for e in list(ALL.values())[:2]] == [3, 3]


def test_two_checks_at_once_are_both_saved(learner):
    learner.run("start", "autograd")
    for name in ("sum_to", "topological"):
        e = find(name)
        text = f"from tinyft.tensor import Tensor\n{e.imports()}\n" + e.source()
        Work().path(e).write_text(text)
    check = "import sys; from tinyft import cli; sys.exit(cli.main(['check', sys.argv[1]]))"
    processes = [run_python(check, name) for name in ("sum_to", "topological")]
    for p in processes:
        assert "laws hold" in p.communicate()[0] and p.returncode == 0
    assert Work().progress.keys() == {"autograd.sum_to", "autograd.topological"}


HOLD = """
import os, signal, sys, time
from pathlib import Path
from typing import Any
from tinyft.learn.work import locked
with locked(Path("work/.progress.lock")):
    print("held", flush=True)
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""


@pytest.mark.skipif(fcntl is None, reason="no locks on this system")
def test_a_process_that_died_holding_the_lock_does_not_block_others(learner):
    Path("work").mkdir()
    p = run_python(HOLD, "die")
    assert p.communicate()[0] == "held\n"
    begun = time.monotonic()
    Work().record(find("sum_to"), solved=True)
    assert time.monotonic() - begun < 2 and Work().solved(find("sum_to"))


@pytest.mark.skipif(fcntl is None, reason="no locks on this system")
def test_a_process_that_holds_the_lock_for_ever_is_waited_for_for_a_while_only(learner, monkeypatch):
    Path("work").mkdir()
    p = run_python(HOLD, "wait")
    try:
        assert p.stdout.readline() == "held\n"
        naps = []
        monkeypatch.setattr(work_module, "time", Clock(naps))
        Work().record(find("sum_to"), solved=True)
        assert Work().solved(find("sum_to")) and len(naps) > 100
    finally:
        p.kill()
        p.communicate()


class Clock:
    """Time that passes only in sleep."""

    def __init__(self, naps):
        self.naps = naps
        self.strftime = time.strftime

    def monotonic(self):
        return sum(self.naps)

    def sleep(self, seconds):
        self.naps.append(seconds)


def test_without_locks_the_progress_is_saved_all_the_same(learner, monkeypatch):
    monkeypatch.setattr(work_module, "fcntl", None)
    Work().record(find("sum_to"), solved=True)
    assert Work().solved(find("sum_to"))
    assert "hint 1" in learner.run("hint", "sum_to")


def test_a_notebook_checks_a_function_of_its_own(capsys):
    assert tinyft.check("sum_to", lambda g, shape: -g) is False
    assert "the opposite sign" in capsys.readouterr().out
    scope = {}
    code = compile(RIGHT["autograd.sum_to"], "cell", "exec")
    exec(code, scope)
    assert tinyft.check("autograd.sum_to", scope["sum_to"]) is True
    assert tinyft.check("sum_to", tinyft.tensor.sum_to) is False
    assert "the library's own sum_to" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no exercise"):
        tinyft.check("nonsense", print)
    with pytest.raises(TypeError, match="wants the name of an exercise, .* got the function print"):
        tinyft.check(print, "sum_to")
    assert tinyft.check("sum_to", 3) is False
    assert "autograd.sum_to wants a function, got 3" in capsys.readouterr().out


def test_the_same_laws_on_the_strict_backend(learner):
    assert learner("sum_to", RIGHT["autograd.sum_to"], "--backend", "strict").count("✓") == 7
    out = learner("sum_to", "def sum_to(g, shape):\n    return np.sum(g, axis=0)\n", "--backend", "strict")
    assert "StrictError" in out and "autograd.sum_to.py:3" in out


def test_a_system_that_cannot_fork_starts_a_new_process(learner, monkeypatch):
    monkeypatch.setattr(isolated.sys, "platform", "darwin")
    assert learner("sum_to", RIGHT["autograd.sum_to"]).count("✓") == 7 and learner.status == 0


def test_the_file_in_the_folder_shows_the_laws_to_pytest(learner, tmp_path):
    learner("sum_to", "def sum_to(g, shape):\n    if g.shape == shape:\n        return g\n    return g.sum(axis=0)\n")
    learner.run("start", "matmul")
    out = subprocess.run([sys.executable, "-m", "pytest", "work", "-q", "-p", "no:cacheprovider"], capture_output=True,
                         text=True,
                         env={**os.environ, "PYTHONPATH": str(Path(tinyft.__file__).parents[1])}).stdout
    assert "1 failed, 2 passed, 13 skipped" in out
    assert "The smallest input that fails" in out
    assert "checker.py" not in out


def test_watch_checks_what_was_saved_and_names_the_next_command(learner, monkeypatch):
    learner("sum_to", RIGHT["autograd.sum_to"])
    naps = iter(range(100))

    def nap(seconds):
        n = next(naps)
        if n == 1:
            path = Work().path(find("sum_to"))
            path.write_text("def sum_to(g, shape):\n    return -g\n")
            os.utime(path, (time.time() + 9, time.time() + 9))
        if n == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(time, "sleep", nap)
    out = learner.run("watch")
    assert out.index("Next:  tinyft start") < out.index("the opposite sign")
    assert learner.status == 130
    assert out.count("autograd.sum_to   ") == 2


def test_watch_survives_an_editor_that_saves_by_renaming(learner, monkeypatch):
    """The file is missing for a moment, then another file has its name, with an older time of modification."""
    learner("sum_to", RIGHT["autograd.sum_to"])
    naps = iter(range(100))
    path = Work().path(find("sum_to"))

    def nap(seconds):
        n = next(naps)
        if n == 1:
            path.rename("work/backup~")
        if n == 2:
            Path("work/new").write_text("def sum_to(g, shape):\n    return -g\n")
            os.utime("work/new", (9, 9))
            os.replace("work/new", path)
        if n == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(time, "sleep", nap)
    out = learner.run("watch", "sum_to")
    assert out.index("All 7 laws hold") < out.index("the opposite sign")
    assert out.count("autograd.sum_to   ") == 2 and learner.status == 130


def test_watch_goes_on_when_the_file_vanishes_as_it_is_checked(learner, monkeypatch):
    learner("sum_to", RIGHT["autograd.sum_to"])
    naps = iter(range(100))

    def nap(seconds):
        if next(naps) == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(time, "sleep", nap)
    version = Work.version
    monkeypatch.setattr(Work, "version", lambda self, e: version(self, e) or (1,))
    Work().path(find("sum_to")).unlink()
    assert "is not there" in learner.run("watch", "sum_to") and learner.status == 130


@pytest.mark.parametrize("text, said", [
    ("def sum_to(g, shape): return -g\n", "the opposite sign"),
    ("import functools\nsum_to = functools.partial(lambda g, shape: -g)\n", "written with `def`, got a partial"),
    ("while True:\n    pass\n", "an endless loop?"), ("1 / 0\n", "ZeroDivisionError")])
def test_debug_of_any_file_ends_with_a_sentence(learner, monkeypatch, text, said):
    monkeypatch.setattr(checker, "ONE_CALL", 0.3)
    learner.run("start", "sum_to")
    Path("work/autograd.sum_to.py").write_text(text)
    monkeypatch.setattr("builtins.input", lambda prompt="": "q")
    assert said in learner.run("debug") and learner.status == 1


def test_a_reader_that_closes_the_pipe_ends_the_check_quietly(learner):
    learner("sum_to", "def sum_to(g, shape):\n    print('x' * 100)\n    return -g\n")
    command = "import sys; from tinyft import cli; sys.exit(cli.main(['check']))"
    p = run_python(command)
    p.stdout.close()
    assert p.wait() == 141


def test_debug_stops_in_the_learners_function_with_the_failing_input(learner, monkeypatch):
    learner.run("start", "sum_to")
    Path("work/autograd.sum_to.py").write_text("def sum_to(g, shape):\n    g = -g\n    return g\n")
    monkeypatch.setattr("builtins.input", lambda prompt="", words=iter(["p g.shape", "c"]): next(words, "q"))
    out = learner.run("debug")
    assert "-> g = -g" in out and "(1, 1)" in out


# ── how it looks ─────────────────────────────────────────────────────────────────────────────────────────────────────
class Terminal:
    def __init__(self, encoding, tty=True):
        self.encoding, self.tty, self.text = encoding, tty, ""

    def isatty(self):
        return self.tty

    def flush(self):
        pass

    def write(self, s):
        s.encode(self.encoding)
        self.text += s


def failing():
    e = find("softmax")

    def p(x):
        e = tinyft.array.xp(x).exp(x)
        return e / e.sum()

    return e, list(checker.check_here(e, lambda x: (p(x), (None,))))


@pytest.mark.parametrize("encoding, environment",
                         [("utf-8", {}), ("ascii", {}), ("cp437", {}), ("utf-8", {"NO_COLOR": ""}),
                                                   ("utf-8", {"TERM": "dumb"})])
def test_every_terminal_can_show_it(monkeypatch, encoding, environment):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for k, v in environment.items():
        monkeypatch.setenv(k, v)
    terminal = Terminal(encoding)
    assert show.Page(terminal).report(*failing()) is False
    assert ("\033[" in terminal.text) == (not environment)
    assert ("✕" in terminal.text) == (encoding == "utf-8")
    assert "yours    =" in terminal.text
    assert "Stuck?" in terminal.text
    assert ("p = e^x / sum e^x" in terminal.text) == (encoding == "ascii")
    assert "\033[" not in (show.Page(Terminal("utf-8", tty=False)).sign("right"))


def test_a_narrow_terminal_gets_narrow_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "48")
    terminal = Terminal("utf-8", tty=False)
    show.Page(terminal).report(*failing())
    assert max(len(line) for line in terminal.text.splitlines()) <= 60


def test_the_smallest_input_the_law_yours_and_the_expected_in_this_order(learner):
    out = learner("matmul", "def matmul(a, b):\n    return a @ b, (lambda g: g @ b.T, lambda g: a.T @ g / len(a))\n")
    parts = ["✓ C = A B", "✕ the gradient of B is Aᵀ G", "The smallest input that fails", "a = [[",
             "the gradient of B:", "yours    =", "expected =",
             "→ it is 1/n x the expected result (n = 2 here)", "Stuck?  tinyft hint autograd.matmul"]
    assert sorted(parts, key=out.index) == parts


# ── the diagnoses ────────────────────────────────────────────────────────────────────────────────────────────────────
A, B = np.array([[1., 2], [3, 5]]), np.array([[2., 0, 1], [1, 4, 6]])


@pytest.mark.parametrize("pairs, said", [
    ([(A.T, A)], "transposed"), ([(B.T, B)], "transposed"), ([(-A, A), (-B, B)], "opposite sign"),
    ([(0 * A, A)], "zero everywhere"),
    ([(A / 2, A), (B / 2, B)], "0.5 x the expected result everywhere"),
    ([(A / 2, A), (B / 3, B)], "1/n x the expected"),
    ([(A * 2**0.5, A), (B * 3**0.5, B)], "√n x"), ([(A * 5, A), (B * 7, B)], "another one for each input"),
    ([(A + 1, A), (B + 1, B)], "off by +1 everywhere"), ([(A + 1, A), (B + 2, B)], "off by the same amount"),
    ([(A * np.nan, A)], "4 of 4 entries are nan or inf"), ([(A, A.sum(0))], "broadcasting is not undone"),
    ([(A.ravel(), A)], "the right numbers, but"),
    ([(A[:1], A)], "its shape is (1, 2), expected (2, 2)"),
    ([(A.astype(np.float32), A)], "dtype is float32, expected float64"),
    ([(A + np.triu(A, 1), A)], "above the diagonal"), ([(A + np.diag([1, 7]), A)], "only the diagonal"),
    ([(np.array([[.5, .25], [.5, .75]]), np.array([[.25, .75], [.5, .5]]))], "along axis 0"),
    ([(A > 2, A <= 2)], "other way round"),
    ([(A + [[0, 0], [4, 1]], A)], "2 of 4 entries differ; the worst, at [1, 0], is 7, expected 3"),
    ([(np.array(3.), np.array(1.)), (np.array(7.), np.array(1.))], "it is +6 off")])
def test_each_diagnosis(pairs, said):
    failures = [Mismatch(g, w, "y", {}, {"n": max(w.shape, default=1)}) for g, w in pairs]
    assert said in diagnose.diagnose(failures)


def test_a_diagnosis_of_rounding_and_of_the_last_digits():
    for rounding in (np.rint, np.floor, np.trunc):
        f = Mismatch(rounding(A / 4), A / 4, "y")
        assert "rounded to whole numbers" in diagnose.diagnose([f])
    assert "only the first six digits" in diagnose.diagnose([Mismatch(A * (1 + 1e-8), A, "y")])
    f = Mismatch(A.astype(np.float64), A.astype(np.float32), "y")
    assert "dtype is float64, expected float32 (np.sqrt(2)" in diagnose.diagnose([f])


def test_close_wants_floats_of_the_same_width_and_integers_for_integers():
    close(np.int32(3), np.int64(3))
    close(2.0, np.int64(2))
    for got in (A.astype(np.float32), A.astype(int), A.astype(np.int8), A.astype(array.bfloat16), A * (1 + 1e-8)):
        with pytest.raises(Mismatch):
            close(got, A)
    for got in (A, A > 0, A.astype(np.float32)):
        with pytest.raises(Mismatch):
            close(got, A.astype(int))
    with pytest.raises(diagnose.Unusable):
        close(np.ma.masked_array(A + 1, mask=True), A)


def test_inputs_have_large_sizes_fractions_and_axes_in_front():
    met = {"size": 0, "axes": set(), "fraction": False}

    def look(f, a, b):
        met["size"] = max(met["size"], *b.shape)
        met["axes"].add(a.ndim)
        assert a.shape[:-2] == b.shape[:-2]
        if max(*a.shape, *b.shape) > 4:
            met["fraction"] = met["fraction"] or bool((a % 1).any())
        if sizes._limit[0] < 7:
            assert not (a % 1).any()
    law = type(find("sum_to").laws[0])("look", look, {"a": "... n m", "b": "... m k"})
    assert checker.run(law, Subject.of_reference(find("matmul"))).problem is None
    assert met == {"size": 7, "axes": {2, 3, 4}, "fraction": True}


def writes_to_g(p, g):
    g += p
    return g


def uses_up_p(p, g):
    p *= 2
    return p * g


@pytest.mark.parametrize("pullback, said", [(writes_to_g, "its pullback changed g"),
                                            (uses_up_p, "when it is called again")])
def test_a_pullback_may_neither_write_to_g_nor_use_up_what_it_keeps(pullback, said):
    def softmax(x):
        p = array.xp(x).exp(x - x.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        kept = p.copy()
        return p, (lambda g: pullback(kept, g),)
    outcome = list(checker.check_here(find("softmax"), softmax))[-1]
    assert said in outcome.problem.message


def test_close_accepts_what_is_right_and_only_that():
    close(A + 1e-12, A)
    close(tinyft.Tensor(A), A)
    close(3, np.array(3.0))
    for got, want in ((A, A + 1), (A, A.T), (A > 2, (A > 2) * 1), (A * np.nan, A * np.nan), (A[0], A)):
        with pytest.raises(Mismatch):
            close(got, want)
    for got in (None, [1.0], "x", A.tolist(), (A,), 3):
        with pytest.raises(diagnose.Unusable):
            close(got, A)


# ── what a learner meets ─────────────────────────────────────────────────────────────────────────────────────────────
MATMUL = """
from tinyft.ops import t
from tinyft.tensor import op


@op("... n k, ... k m -> ... n m")
def matmul(a, b):
    return a @ b, (lambda g: g @ b, lambda g: t(a) @ g)
"""


def test_debug_stops_in_an_op_and_then_in_its_pullbacks(learner, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt="", words=iter(["c", "p g.shape"]): next(words, "q"))
    learner("autograd.matmul", MATMUL)
    text = learner.run("debug", "matmul")
    assert "matmul()\n-> return a @ b" in text
    assert "<lambda>()\n-> return a @ b" in text
    assert "(1, 2)" in text


def test_what_a_right_answer_prints_is_shown_once(learner):
    text = RIGHT["autograd.sum_to"].replace("):\n", "):\n    print('the shape is', shape)\n", 1)
    found = learner("autograd.sum_to", text)
    assert "All 7 laws hold" in found
    assert found.count("Your function printed:") == 1
    assert "the shape is (4,)" in found
    assert "printed" not in learner("autograd.sum_to", RIGHT["autograd.sum_to"])


def test_the_folder_of_the_exercises_is_found_from_inside_and_from_below(learner, tmp_path, monkeypatch):
    learner.run("start", "sum_to")
    for below in ("work", "notes", "notes/more"):
        (tmp_path / below).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / below)
        assert "it is there already" in learner.run("start", "sum_to")
        assert not (tmp_path / below / "work").exists()


def test_a_folder_named_work_without_exercises_is_left_alone(learner, tmp_path, monkeypatch):
    (tmp_path / "work" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inside")
    learner.run("start", "sum_to")
    assert (tmp_path / "work" / "inside" / "work" / "autograd.sum_to.py").is_file()


CLIPS = """
import numpy as np


def clip_norm(gradients, limit):
    norm = np.sqrt(sum(np.vdot(g, g) for g in gradients))
    for g in gradients:
        {write}
    return norm
"""


@pytest.mark.parametrize("write", ["g = g * 0.5", "pass"])
def test_an_argument_that_stays_as_it_was_is_the_first_thing_said(learner, write):
    text = learner("training.clip_norm", CLIPS.format(write=write))
    assert "gradients[0] is unchanged: `g = ...` makes a new array" in " ".join(text.split())
    assert "`g[:] = ...`" in text


def test_an_argument_that_was_written_to_is_not_called_unchanged(learner):
    text = learner("training.clip_norm", CLIPS.format(write="g *= 0.5"))
    assert "is unchanged" not in text
    assert "✕" in text


SOFTMAX = """
from tinyft.tensor import op


@op("... n -> ... n")
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    y = e / e.sum(axis=-1, keepdims=True)
    return y, {pullbacks}
"""


@pytest.mark.parametrize("pullbacks", ["lambda g: g", "(lambda g: g)"])
def test_a_single_pullback_without_its_comma_is_told_how_a_tuple_of_one_is_written(learner, pullbacks):
    text = " ".join(learner("autograd.softmax", SOFTMAX.format(pullbacks=pullbacks)).split())
    assert "a tuple of one is written `(f,)`" in text
    assert "one for each of the 1 input (" in text
    assert "(f,)" not in learner("autograd.softmax", SOFTMAX.format(pullbacks="None"))


def test_inputs_that_are_drawn_together_are_shown_under_their_own_names(learner):
    head = "def cross_entropy(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):"
    text = learner("training.cross_entropy", f"{head}\n    return np.float64(7.0), (lambda g: z, None, None)\n")
    assert "      z = [[1.]]\n      y = [0]\n" in text
    assert "drawn" not in text


def test_after_an_exercise_comes_the_one_behind_it_and_at_the_end_the_first_that_is_left(tmp_path):
    work = Work(tmp_path)
    every = list(ALL.values())
    assert work.next() is every[0]
    assert work.next(after=every[20]) is every[21]
    assert work.next(after=every[-1]) is every[0]
    for e in every[:-1]:
        work.record(e, solved=True)
    assert work.next(after=every[3]) is every[-1]
    work.record(every[-1], solved=True)
    assert work.next(after=every[-1]) is None
