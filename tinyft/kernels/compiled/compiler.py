"""The decorator `compiled`: a function in plain loops becomes machine code, by Numba, once for each processor.

    @compiled
    def scale(first: int64, last: int64, x: Vector, factor: float32) -> None:
        for i in range(first, last):
            x[i] *= factor

The annotations are the types for which it is compiled. The machine code is kept in a folder, one file for a function:

    TINYFT_CACHE                  this folder, if the environment variable is set
    the package's __pycache__     otherwise, if it can be written
    ~/.cache/tinyft/kernels       otherwise; elsewhere on macOS and Windows, see `_user_folder`

A function is compiled again if a kernel, Numba or the processor has changed, or if its file is damaged. Without a
folder that can be written it is compiled in every process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import inspect
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from ...atomic import write_atomically

__all__ = ["CompiledFunction", "Matrix", "Vector", "add_symbol", "boolean", "cache_folder", "calls", "compiled",
           "compiled_sum", "float32", "inlined", "inlined_sum", "int64", "pasted"]

boolean, float32, int64 = types.boolean, types.float32, types.int64
Vector, Matrix = types.float32[::1], types.float32[:, ::1]  # contiguous

# What LLVM may do: round a product and a sum once, multiply by 1/x for a division, ignore the sign of a zero, and take
# approximate functions. It may not assume that there are no infinities or NaN.
FAST = {"contract", "nsz", "arcp", "afn"}
ANY_ORDER = FAST | {"reassoc"}  # and take sums and products in any order
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


class CompiledFunction:
    """A compiled function. It does not hold the interpreter's lock.

    It is compiled, or read from the disk, when `load` is called, or else at its first call. Arrays must be contiguous
    where their type says so, aligned and writable; see `is_plain` in shared.py.
    TypeError for a function with a closure: its source does not say all that it computes.
    """

    def __init__(self, function: Callable, fastmath: set[str]) -> None:
        if function.__closure__:
            raise TypeError(f"compiled wants a function without a closure, got {function.__name__}")
        functools.update_wrapper(self, function)
        self._dispatcher = numba.njit(**OPTIONS, fastmath=fastmath)(function)
        self._dispatcher._cache = _File(function)
        self._is_loaded = False

    def __call__(self, *arguments: Any) -> Any:
        if not self._is_loaded:
            self.load()
        return self._dispatcher(*arguments)

    def load(self) -> None:
        """Compile the function, or read it from the disk, unless that is done."""
        with _lock, _no_collection():
            if not self._is_loaded:
                _compile(self._dispatcher)
                self._is_loaded = True


_lock = threading.RLock()


def compiled(function: Callable, fastmath: set[str] = FAST) -> CompiledFunction:
    """The function as a CompiledFunction, for the types in its annotations."""
    return CompiledFunction(function, fastmath)


compiled_sum = functools.partial(compiled, fastmath=ANY_ORDER)  # of a function with sums over many numbers


def calls(*functions: CompiledFunction) -> Callable[[Callable], Callable]:
    """A decorator of an op's kernel: the compiled functions that it calls. They are loaded before its first call."""
    def mark(kernel: Callable) -> Callable:
        kernel.functions = functions
        return kernel

    return mark


# Functions that compiled functions call, and Python does not. They are compiled for the types in their annotations,
# when first needed. Without types, Numba would compile them for each layout of the arrays that they get.
_not_compiled: list[Any] = []


def inlined(function: Callable, fastmath: set[str] = FAST) -> Callable:
    """The function, for compiled functions to call. LLVM may put its code in the place of a call."""
    dispatcher = numba.njit(**OPTIONS, no_cpython_wrapper=True, fastmath=fastmath)(function)
    _not_compiled.append(dispatcher)
    return dispatcher


inlined_sum = functools.partial(inlined, fastmath=ANY_ORDER)  # LLVM makes a vector loop of a sum only in any order


def pasted(function: Callable) -> Callable:
    """The function, for one compiled function to call: its source stands in the place of the call.

    A long function is then not compiled twice, by itself and inlined. Its FAST or ANY_ORDER is that of its caller, and
    its annotations are for the reader alone.
    """
    return numba.njit(**OPTIONS, inline="always")(function)


def _compile(dispatcher: Any) -> None:
    """Compile a function for the types in its annotations, and for no others."""
    argument_types = inspect.get_annotations(dispatcher.py_func, eval_str=True)
    result = argument_types.pop("return") or types.void
    dispatcher.compile(result(*argument_types.values()))
    dispatcher.disable_compile()


def _compile_inlined() -> None:
    """Compile the inlined functions: a function that is not on the disk may call them."""
    while _not_compiled:
        _compile(_not_compiled.pop(0))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: a tenth of Numba's time would go to visits of the many objects that it makes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_symbols: list[str] = []


def add_symbol(name: str, address: int) -> None:
    """Tell LLVM the address of a C function that compiled code calls by this name.

    Machine code that was made with other names is compiled again: LLVM ends the process if it does not know a name.
    """
    llvm.add_symbol(name, address)
    _symbols.append(name)


# ---------------------------------------------------------------------------------------------------- the folder
@functools.cache
def cache_folder() -> Path | None:
    """The folder in which machine code is kept; None if no folder can be written."""
    return next((folder for folder in _folders() if _is_writable(folder)), None)


@functools.cache
def _folders() -> list[Path]:
    """The folders that may hold machine code. One that cannot be written is read all the same."""
    chosen = os.environ.get("TINYFT_CACHE")
    if chosen:
        return [Path(chosen).absolute()]
    package = Path(__file__).parent / "__pycache__"
    try:
        return [package, _user_folder()]
    except RuntimeError:  # the user has no home
        return [package]


def _user_folder() -> Path:
    """The folder of this user for files that can be made again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "tinyft" / "kernels"


def _is_writable(folder: Path) -> bool:
    """True if a file can be made in this folder. A folder that is made here can be written by this user alone.

    Who may write to a folder that is there decides which code runs.
    """
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@functools.cache
def _announce() -> None:
    """Say, once, what the user waits for."""
    where = "each once" if cache_folder() else "in every process, since no folder can be written"
    print(f"tinyft: compiling its kernels for this processor, {where} (a few seconds; TINYFT_KERNELS=numpy does "
          "without them)", file=sys.stderr, flush=True)


@functools.cache
def _announce_loss(reason: str) -> None:
    """Say, once, that the next process will compile again."""
    print(f"tinyft: the compiled kernels are not kept: {reason}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- the files
@functools.cache
def source_stamp() -> str:
    """A hash of the source of all kernels: a kernel's code depends on constants and helpers in other files."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted([*folder.glob("*.py"), *folder.parent.glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _File(NullCache):
    """The file of one function, for Numba: a checksum, and the machine code. A folder holds one for each processor.

    The checksum is one of the machine code and of all that it was made from. A file that does not fit counts as
    missing. A file is complete on the disk before it gets its name.
    """

    def __init__(self, function: Callable) -> None:
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__.replace('<locals>.', '')}"
        file = _checksum(Path(inspect.getfile(function)).read_bytes()).hex()
        self.source = f"{source_stamp()} {file} line {function.__code__.co_firstlineno}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The machine code for these types, or None."""
        target_context.refresh()
        name, made_for = self._identify(sig, target_context.codegen())
        for folder in _folders():
            data = _read(folder / name, made_for)
            if data is not None:
                with contextlib.suppress(Exception):  # a Numba with the same number, but changed: compile again
                    return CompileResult._rebuild(target_context, *pickle.loads(data))
        _announce()
        _compile_inlined()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the machine code for these types, if there is a folder and the disk has room."""
        folder = cache_folder()
        if folder is None:
            return
        name, made_for = self._identify(sig, data.codegen)
        try:
            code = dumps(data._reduce())
            write_atomically({folder / name: _checksum(made_for, code) + code})
        except Exception as error:
            _announce_loss(getattr(error, "strerror", None) or str(error))

    def _identify(self, sig: Any, codegen: Any) -> tuple[str, bytes]:
        """(the name of the file, all that the machine code depends on)"""
        processor = f"{codegen.magic_tuple()} Numba {numba.__version__}"
        made_for = f"{self.source} {sig} {processor} {sorted(_symbols)}"
        name = f"{self.name}.{sys.implementation.cache_tag}-{_checksum(processor.encode()).hex()[:8]}.code"
        return name, made_for.encode()


def _read(path: Path, made_for: bytes) -> bytes | None:
    """The machine code in a file; None if there is no file, or if it does not fit its checksum."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, code = content[:CHECKSUM_SIZE], content[CHECKSUM_SIZE:]
    return code if checksum == _checksum(made_for, code) else None


CHECKSUM_SIZE = 32  # bytes


def _checksum(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
