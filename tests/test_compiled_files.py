"""Where machine code is kept, and the choice of kernels: a second process compiles nothing; whatever is wrong with a
file, a folder, or with Numba itself, the result is right.

The processes are forked from one that has imported what takes long, and nothing of what is tested."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import rejects, wrong_answers

import tinyft
from tinyft import array, kernels

pytestmark = [
    pytest.mark.skipif(array.backend() != "numpy", reason="these kernels are for NumPy arrays"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked"),
]
needs_numba = pytest.mark.skipif(not kernels.has_numba(), reason="Numba is not installed")

# It reads jobs (lines of JSON), forks a process for each code of a job, and writes {status, output, errors} of each.
PARENT = """
import contextlib, io, json, multiprocessing, os, sys
exec(sys.argv[1])
for line in sys.stdin:
    job = json.loads(line)
    barrier = multiprocessing.get_context("fork").Barrier(len(job["codes"]), timeout=60)
    children = []
    for code in job["codes"]:
        read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            children.append((pid, read))
            continue
        os.environ.update(job["environment"])
        output, errors, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                exec(code, {"barrier": barrier})
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
                status = 1
        with os.fdopen(write, "w") as pipe:
            json.dump([output.getvalue(), errors.getvalue()], pipe)
        os._exit(status)
    results = []
    for pid, read in children:
        with os.fdopen(read) as pipe:
            text = pipe.read() or '["", ""]'
        output, errors = json.loads(text)
        results.append(dict(status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output=output, errors=errors))
    print(json.dumps(results), flush=True)
"""
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def parents() -> Iterator[Callable[[str], subprocess.Popen]]:
    """A function that starts the parent process of an import, once."""
    started: dict[str, subprocess.Popen] = {}

    def start(imports: str) -> subprocess.Popen:
        if imports not in started:
            path = os.pathsep.join([str(Path(tinyft.__file__).parents[1]), str(Path(__file__).parent)])
            environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
            environment.pop("TINYFT_KERNELS", None)
            started[imports] = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", PARENT, imports], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return started[imports]

    yield start
    for process in started.values():
        process.stdin.close()
        process.wait()
        process.stdout.close()


def run(parent: subprocess.Popen, *codes: str, **environment: str) -> Results:
    """Run the codes at the same time, each in a new process."""
    print(json.dumps({"codes": codes, "environment": environment}), file=parent.stdin, flush=True)
    return json.loads(parent.stdout.readline())


# ---------------------------------------------------------------------------------------------------- machine code
CONSTANT = np.float32(1.2345678)
MODULE = """
import numpy as np
from tinyft.kernels.compiled.compiler import Vector, compiled, float32, int64
CONSTANT = np.float32(1.2345678)

@compiled
def scale(first: int64, last: int64, x: Vector, factor: float32) -> None:
    for i in range(first, last):
        x[i] *= factor * CONSTANT
"""
RUN = """
import sys
sys.path.insert(0, FOLDER)
from module_of_a_test import scale
import numpy as np
x = np.arange(20, dtype=np.float32)
scale(0, 20, x, np.float32(3))
print(x.tolist())
"""
COMPILER = "from tinyft.kernels.compiled import compiler"
WARM = f"""
{COMPILER}
import numba
@numba.njit("void(int64, int64, float32[::1], float32)")  # the first function of a process takes longest
def warm(first, last, x, factor):
    for i in range(first, last):
        x[i] *= factor
"""


class Kept:
    """A compiled function in a module, and the folder of its machine code."""

    def __init__(self, parent: subprocess.Popen, folder: Path) -> None:
        self.parent = parent
        self.folder = folder
        self.cache = folder / "cache"
        self.module = folder / "module_of_a_test.py"
        self.module.write_text(MODULE)
        self.environment = {"TINYFT_CACHE": str(self.cache)}

    def start(self, *before: str) -> Results:
        """Run the function in new processes at the same time, each after the code `before`."""
        code = RUN.replace("FOLDER", repr(str(self.folder)))
        return run(self.parent, *(f"{COMPILER}\n{b}\n{code}" for b in before), **self.environment)

    def compiles(self, before: str = "") -> bool:
        """Run the function in a new process; its result must be right. True if the process compiled it."""
        [result] = self.start(before)
        check_result(result)
        return "compiling its kernels" in result["errors"]

    @property
    def files(self) -> list[Path]:
        return sorted(self.cache.iterdir()) if self.cache.is_dir() else []


def check_result(result: dict[str, Any]) -> None:
    assert result["status"] == 0, result
    right = np.arange(20, dtype=np.float32) * (np.float32(3) * CONSTANT)
    assert np.allclose(json.loads(result["output"]), right, rtol=1e-6)


@pytest.fixture
def kept(parents, tmp_path) -> Kept:
    return Kept(parents(WARM), tmp_path)


@needs_numba
def test_the_second_process_compiles_nothing_and_says_nothing(kept):
    [first] = kept.start("")
    check_result(first)
    assert first["errors"].count("\n") == 1 and "once (a few seconds; TINYFT_KERNELS=numpy" in first["errors"]
    [second] = kept.start("")
    check_result(second)
    assert second["errors"] == ""
    assert [file.suffix for file in kept.files] == [".code"]


def flip_a_bit(file: Path) -> None:
    """A bit of the function's constant: the machine code runs, and is wrong."""
    content = bytearray(file.read_bytes())
    place = bytes(content).find(CONSTANT.tobytes())
    content[place + 2 if place >= 0 else len(content) // 2] ^= 8
    file.write_bytes(content)


def flip_a_bit_of_the_checksum(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)


def put_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "something").touch()


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "cut off in the checksum": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "a bit": flip_a_bit,
    "a bit of the checksum": flip_a_bit_of_the_checksum,
    "other bytes": lambda file: file.write_bytes(bytes(range(256)) * 40),
    "the folder is gone": lambda file: [file.unlink(), file.parent.rmdir()],
}


def check_keeping(kept: Kept, before: str) -> None:
    assert kept.compiles(before) and not kept.compiles(before)


def check_healing(kept: Kept, damage: Callable, before: str = "") -> None:
    """A damaged file is compiled again; the next process finds it whole."""
    kept.compiles(before)
    damage(kept.files[0])
    assert kept.compiles(before)
    assert not kept.compiles(before)


@needs_numba
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_healed(kept, damage):
    check_healing(kept, DAMAGES[damage])


@needs_numba
def test_a_file_that_cannot_be_replaced_does_no_harm(kept):
    kept.compiles()
    put_a_folder(kept.files[0])
    [result] = kept.start("")
    check_result(result)
    assert result["errors"].count("\n") == 2
    assert "the compiled kernels are not kept: could not write" in result["errors"]


CHANGES = {
    "a kernel's source": "compiler.source_stamp = lambda: 'another'",
    "Numba": "import numba; numba.__version__ = '1000.0'",
    "the functions of BLAS": "compiler.add_symbol('tinyft_test', 0)",
}


def check_change(kept: Kept, change: str, before: str = "") -> None:
    kept.compiles(before)
    assert kept.compiles(f"{before}\n{change}")
    assert not kept.compiles(f"{before}\n{change}")


@needs_numba
@pytest.mark.parametrize("change", CHANGES)
def test_machine_code_of_other_sources_is_compiled_again(kept, change):
    check_change(kept, CHANGES[change])


@needs_numba
def test_a_function_outside_of_the_package_is_compiled_again_when_its_file_changes(kept):
    kept.compiles()
    kept.module.write_text(f"{MODULE}\n# one line more\n")
    assert kept.compiles() and not kept.compiles()


@needs_numba
def test_two_processors_share_a_folder(kept):
    other = ("from numba.core.codegen import CPUCodegen\n"
             "CPUCodegen.magic_tuple = lambda self: ('a triple', 'another processor', 'features')")
    assert kept.compiles() and kept.compiles(other)
    assert not kept.compiles() and not kept.compiles(other)
    assert len(kept.files) == 2


def test_the_stamp_is_of_every_source_of_a_kernel(tmp_path):
    pytest.importorskip("numba")
    from tinyft.kernels.compiled import compiler

    stamp_of = compiler.source_stamp.__wrapped__
    names = ["numpy.py", "compiled/compiler.py", "compiled/rows.py"]
    (tmp_path / "compiled").mkdir()
    for name in names:
        (tmp_path / name).write_text("1\n")
    before, compiler.__file__ = compiler.__file__, str(tmp_path / "compiled" / "compiler.py")
    try:
        stamps = {stamp_of()}
        for name in names:
            (tmp_path / name).write_text("2\n")
            stamps.add(stamp_of())
    finally:
        compiler.__file__ = before
    assert len(stamps) == 4


@needs_numba
def test_two_functions_of_one_name_are_kept_apart(kept):
    kept.module.write_text(MODULE + MODULE.replace("factor * CONSTANT", "np.float32(7)"))
    for _ in range(2):
        [result] = kept.start("")
        assert json.loads(result["output"])[1] == 7, result


CLOSURE = """
def make(n):
    def add(x: compiler.Vector) -> None:
        x[0] += n
    return add
compiler.compiled(make(2))
"""


@needs_numba
def test_a_function_with_values_of_its_own_is_refused(kept):
    """Two of them have the same source, and one file."""
    [result] = run(kept.parent, f"{COMPILER}\n{CLOSURE}", **kept.environment)
    assert result["output"].startswith("TypeError: compiled wants a function without a closure, got add"), result


# ---------------------------------------------------------------------------------------------------- folders
NO_FOLDER = """
from pathlib import Path
def no_home():
    raise RuntimeError("Could not determine home directory.")
Path.home = no_home
import os
for name in ("TINYFT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
    os.environ.pop(name, None)
compiler.__file__ = "/dev/null/compiled/compiler.py"
compiler.source_stamp = lambda: "stamp"
"""


@needs_numba
def test_without_a_folder_every_process_compiles_and_says_so(kept):
    for _ in range(2):
        [result] = kept.start(NO_FOLDER)
        check_result(result)
        assert "in every process, since no folder can be written" in result["errors"]
    assert not kept.files


@needs_numba
def test_a_folder_that_cannot_be_written_is_read(kept):
    read_only = "compiler._is_writable = lambda folder: False"
    assert kept.compiles(read_only) and not kept.files
    assert kept.compiles() and not kept.compiles(read_only)


@needs_numba
def test_the_order_of_the_folders(kept):
    [result] = run(kept.parent, "\n".join([
        COMPILER,
        "import os",
        "del os.environ['TINYFT_CACHE']",
        "print(*compiler._folders(), sep='\\n')",
    ]), TINYFT_CACHE="x", XDG_CACHE_HOME=str(kept.folder / "home"))
    package, user = result["output"].split()
    assert package == str(Path(tinyft.__file__).parent / "kernels" / "compiled" / "__pycache__")
    assert user == str(kept.folder / "home" / "tinyft" / "kernels") or sys.platform in ("win32", "darwin")


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))"


@needs_numba
def test_a_full_disk_keeps_nothing_and_does_no_harm(kept):
    for _ in range(2):
        [result] = kept.start(FULL)
        check_result(result)
        assert "the compiled kernels are not kept: could not write" in result["errors"]
    assert not kept.files
    assert kept.compiles() and not kept.compiles()


AT_THE_SAME_TIME = """
write = compiler.write_atomically
def wait_and_write(files):
    barrier.wait()
    write(files)
compiler.write_atomically = wait_and_write
"""


@needs_numba
def test_two_processes_that_compile_at_the_same_time(kept):
    for result in kept.start(AT_THE_SAME_TIME, AT_THE_SAME_TIME):
        check_result(result)
        assert result["errors"].count("\n") == 1
    assert len(kept.files) == 1 and not kept.compiles()


@needs_numba
def test_a_process_that_is_killed_in_the_middle_of_writing(kept):
    [result] = kept.start("import os; os.replace = lambda *_: os._exit(9)")
    assert result["status"] == 9 and len(kept.files) == 1, "the file under its temporary name"
    assert kept.compiles() and not kept.compiles()
    assert len(kept.files) == 1, "the temporary file is gone"


WRONG = {
    "no checksum": ("compiler._read = lambda path, made_for: path.read_bytes()[32:] if path.exists() else None",
                    lambda kept, before: check_healing(kept, flip_a_bit, before)),
    "nothing is written": ("compiler.write_atomically = lambda files: None", check_keeping),
    "a checksum of the code alone": (
        "both = compiler._checksum\ncompiler._checksum = lambda *parts: both(parts[-1])",
        lambda kept, before: check_change(kept, CHANGES["the functions of BLAS"], before)),
    "an error of the disk is raised": (
        "from pathlib import Path\ncompiler.write_atomically = lambda files: Path('/dev/null/x').touch()\n"
        "compiler._announce_loss = lambda reason: 1 / 0",
        lambda kept, before: kept.compiles(before)),
}


@needs_numba
@wrong_answers
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_way_to_keep_files_is_caught(kept, name):
    before, check = WRONG[name]
    if name == "no checksum" and sys.platform != "linux":
        pytest.skip("where the constant stands is known on Linux")
    assert rejects(lambda: check(kept, before))


# ---------------------------------------------------------------------------------------------------- without BLAS
NO_BLAS = """
from tinyft.kernels import system
system.libraries = lambda: []
from tinyft.kernels.compiled import blas
from tinyft.kernels.compiled.compiler import Vector, compiled, float32, int64
assert not blas.is_available

def use(x: Vector, product: int64) -> None:
    x[0] = float32(5)
    if product:
        blas_sgemm(0, 0, 0, 0, 0, 0, x[0], x.ctypes, 0, x.ctypes, 0, x[0], x.ctypes, 0)

import numpy as np
import sys
blas_sgemm = blas.sgemm
sys.modules["module"] = compiler
use.__module__ = "module"
compiler.inspect.getfile = lambda function: compiler.__file__
x = np.zeros(1, np.float32)
compiled(use)(x, 0)
print(x.item())
"""


@needs_numba
def test_without_a_known_blas_nothing_is_missing_for_llvm(kept):
    """LLVM would end the process."""
    [right] = run(kept.parent, f"{COMPILER}\n{NO_BLAS}", **kept.environment)
    assert (right["status"], right["output"]) == (0, "5.0\n"), right
    unknown = "compiler.llvm.add_symbol = lambda name, address: None"
    [wrong] = run(kept.parent, f"{COMPILER}\n{unknown}\n{NO_BLAS}", **kept.environment)
    assert wrong["status"] < 0


# ---------------------------------------------------------------------------------------------------- the choice
CHOOSE = """
import sys
from tinyft import kernels
kernels.remove()
kernels.has_numba.cache_clear()
"""
MISSING = f"{CHOOSE}sys.modules['numba'] = None\n"
INSTALL = "kernels.install()\n"
NO_NUMBA_YET = "assert not {'numba', 'llvmlite'} & set(sys.modules)\n"
GELU = """
import numpy as np
import tinyft
x = tinyft.Tensor(np.ones((2, 3), np.float32))
print(tinyft.ops.gelu(x).numpy().sum())
"""


@pytest.fixture
def choose(parents, tmp_path) -> Callable:
    """A function that runs code in a process that has imported tinyft: choose(code, TINYFT_KERNELS's value)."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0\\nor less')\n")

    def choose(code: str, choice: str | None = None) -> dict[str, Any]:
        environment = {} if choice is None else {"TINYFT_KERNELS": choice}
        code = code.replace("FOLDER", repr(str(tmp_path)))
        return run(parents("import tinyft"), code, **environment)[0]

    return choose


@needs_numba
def test_the_first_kernel_imports_numba_and_finds_all_machine_code(choose):
    assert kernels.compiled_kernels()  # in this process: it may compile them
    result = choose(CHOOSE + INSTALL + GELU + "assert 'numba' in sys.modules", "numba")
    assert result["status"] == 0 and result["errors"] == "", result


@needs_numba
def test_a_program_compiles_only_what_it_calls(parents, tmp_path):
    code = f"{CHOOSE}{INSTALL}{GELU}import gc\nprint(gc.isenabled())"
    [result] = run(parents("import tinyft"), code, TINYFT_KERNELS="numba", TINYFT_CACHE=str(tmp_path))
    assert result["status"] == 0 and result["output"].split()[-1] == "True", result
    names = {".".join(file.name.split(".")[:2]) for file in tmp_path.iterdir()}
    assert names == {"elementwise.gelu_forward", "elementwise.gelu_backward"}


SIZES = """
from tinyft import array, dispatch
from tinyft.kernels import compiled_sizes, numpy, sizes
with kernels.definitions():
    array.use("sizes")
array.use("numpy")
print(any(f.__module__ == compiled_sizes.__name__ for found in dispatch.KERNELS.values() for f in found))
"""


@needs_numba
@pytest.mark.parametrize("choice, expected", [("auto", "True"), ("numba", "True"), ("numpy", "False")])
def test_memory_is_counted_for_the_chosen_kernels_wherever_it_is_first_counted(choose, choice, expected):
    """Inside of `definitions` no kernel is in use; the choice stays what it was."""
    result = choose(CHOOSE + INSTALL + SIZES, choice)
    assert result["status"] == 0 and result["output"].split()[-1] == expected, result


@needs_numba
def test_numba_by_an_argument_must_run(choose):
    result = choose(f"{CHOOSE}sys.path.insert(0, FOLDER)\nkernels.install('numba')\n{GELU}", "auto")
    assert result["output"].startswith("RuntimeError: TINYFT_KERNELS=numba wants a Numba that runs here"), result


@needs_numba
def test_every_compiled_function_belongs_to_an_op():
    """An op loads the functions that it calls. One that it does not name would be compiled in the backward pass."""
    from tinyft.kernels.compiled import compiler

    assert kernels.compiled_kernels()
    modules = [m for name, m in sys.modules.items() if name.startswith("tinyft.kernels.compiled.")]
    functions = {f for m in modules for f in vars(m).values() if isinstance(f, compiler.CompiledFunction)}
    functions -= {f for f in functions if f.__module__.endswith(".waiting")}  # of the threads
    assert functions == {f for kernel in kernels.compiled_kernels().values() for f in kernel.functions}
    assert all(f._is_loaded for f in functions)


CALLED_BY_THREADS = """
import sys, threading
sys.path.insert(0, FOLDER)
from module_of_a_test import scale
import numpy as np
x = np.arange(20, dtype=np.float32)
start = threading.Barrier(4)
def call(i):
    start.wait()
    scale(5 * i, 5 * i + 5, x, np.float32(3))
threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(x.tolist())
"""


@needs_numba
def test_four_threads_call_a_function_that_is_not_compiled(kept):
    code = f"{COMPILER}\n{CALLED_BY_THREADS}".replace("FOLDER", repr(str(kept.folder)))
    [result] = run(kept.parent, code, **kept.environment)
    check_result(result)


def test_without_numba_the_numpy_kernels_do_the_work_silently(choose):
    result = choose(MISSING + INSTALL + GELU + "print(kernels.in_use())", "auto")
    assert (result["status"], result["errors"]) == (0, ""), result
    assert result["output"].split()[-1] == "numpy"
    assert float(result["output"].split()[0]) == pytest.approx(6 * 0.8413447)


def test_numba_is_asked_for_and_missing(choose):
    result = choose(MISSING + INSTALL, "numba")
    assert result["output"].startswith("ImportError: ") and 'pip install "tinyft[fast]"' in result["output"]


FAILS = f"{CHOOSE}sys.path.insert(0, FOLDER)\n"


def test_a_numba_that_does_not_run_here_is_one_line(choose):
    result = choose(FAILS + INSTALL + GELU + GELU, "auto")
    assert result["status"] == 0 and result["errors"] == (
        "tinyft: Numba does not run here, the kernels for NumPy do its work: Numba needs NumPy 1.0 or less\n")
    assert float(result["output"].split()[0]) == pytest.approx(6 * 0.8413447)


def test_a_numba_that_does_not_run_here_is_an_error_if_asked_for(choose):
    result = choose(FAILS + INSTALL + GELU, "numba")
    assert result["output"].startswith("RuntimeError: TINYFT_KERNELS=numba wants a Numba that runs here: Numba needs")


@pytest.mark.parametrize("choice, in_use", [("auto", "numba"), ("numba", "numba"), ("numpy", "numpy"), ("off", "off")])
def test_the_choice_of_kernels(choose, choice, in_use):
    if not kernels.has_numba():
        in_use = in_use.replace("numba", "numpy")
        if choice == "numba":
            pytest.skip("Numba is not installed")
    result = choose(CHOOSE + INSTALL + "print(kernels.in_use())\n" + NO_NUMBA_YET, choice)
    assert result["output"] == f"{in_use}\n", result


def test_an_unknown_choice_is_one_clear_error(choose):
    result = choose(CHOOSE + INSTALL, "nonsense")
    assert result["output"].startswith("ValueError: TINYFT_KERNELS wants one of"), result
    assert all(choice in result["output"] for choice in ("'auto'", "'numba'", "'numpy'", "'off'", "'nonsense'"))
