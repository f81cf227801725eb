"""The decorator `compiled`: a function in plain loops becomes machine code, by Numba, once for each processor.

    @compiled
    def scale(first: int64, last: int64, x: Vector, factor: float32) -> None:
        for i in range(first, last):
            x[i] *= factor

The annotations are the types for which it is compiled. The machine code is kept in a folder: the __pycache__ of this
package, or, if that cannot be written, a folder of the user. It is compiled again if a kernel, Numba or the processor
has changed, or if a file is damaged.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numba
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, NullCache

__all__ = ["Matrix", "Vector", "announce", "boolean", "cache_folder", "compiled", "compiled_sum", "float32", "inlined",
           "inlined_sum", "int64"]

boolean, float32, int64 = types.boolean, types.float32, types.int64
Vector, Matrix = types.float32[::1], types.float32[:, ::1]  # contiguous

# What LLVM may do: round a product and a sum once, multiply by 1/x for a division, ignore the sign of a zero. It may
# not assume that there are no infinities or NaN.
FAST = {"contract", "nsz", "arcp", "afn"}
ANY_ORDER = FAST | {"reassoc"}  # and take sums and products in any order
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

# Functions that compiled functions call. One with a sum over many numbers is a vector loop only in any order.
inlined = numba.njit(**OPTIONS, fastmath=FAST)
inlined_sum = numba.njit(**OPTIONS, fastmath=ANY_ORDER)


def compiled(function: Callable, fastmath: set[str] = FAST) -> Callable:
    """The function, compiled for the types in its annotations. It does not hold the interpreter's lock.

    Arrays must be contiguous where their type says so, aligned and writable; see `is_plain` in shared.py.
    """
    argument_types = inspect.get_annotations(function, eval_str=True)
    result = argument_types.pop("return") or types.void
    dispatcher = numba.njit(**OPTIONS, fastmath=fastmath)(function)
    dispatcher._cache = _cache_of(function)
    dispatcher.compile(result(*argument_types.values()))
    dispatcher.disable_compile()
    return dispatcher


compiled_sum = functools.partial(compiled, fastmath=ANY_ORDER)  # of a function with sums over many numbers


@functools.cache
def announce() -> None:
    """Say, once, what the user waits for."""
    where = "once" if cache_folder() else "in every process, since no folder can be written"
    print(f"tinyft: compiling its kernels for this processor, {where} (a few seconds; TINYFT_KERNELS=numpy does "
          "without them)", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- the folder
@functools.cache
def cache_folder() -> Path | None:
    """The folder of the machine code; None if no folder can be written."""
    folders = [Path(__file__).parent / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # there is no home
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folders.append(Path(base) / "tinyft")
    return next((folder for folder in folders if _is_writable(folder)), None)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@functools.cache
def source_stamp() -> str:
    """A hash of the source of all kernels: a kernel's code depends on constants and helpers in other files."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted([*folder.glob("*.py"), *folder.parent.glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _Locator:
    """The place of a function's machine code, for Numba."""

    def __init__(self, function: Callable) -> None:
        self.name = function.__module__.rpartition(".")[2]
        self._py_file = inspect.getfile(function)  # for Numba's warnings

    def ensure_cache_path(self) -> None:
        """Nothing: cache_folder has made it."""

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return source_stamp()

    def get_disambiguator(self) -> str:
        return self.name


class _Implementation(CompileResultCacheImpl):
    """Numba's choice of file names, with our folder."""

    def __init__(self, function: Callable) -> None:
        self._locator = _Locator(function)
        self._lineno = function.__code__.co_firstlineno
        self._filename_base = self.get_filename_base(f"tinyft.{function.__qualname__}", getattr(sys, "abiflags", ""))


class _Files(IndexDataCacheFile):
    """Numba's files of one function, each with a checksum beside it.

    A file without the right checksum counts as missing. A file is complete on the disk before it gets its name.
    """

    def _load_index(self) -> dict:
        return super()._load_index() if _is_intact(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        if not _is_intact(self._data_path(name)):
            raise OSError(f"{name} is damaged")  # Numba takes it for missing
        return super()._load_data(name)

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[BinaryIO]:
        handle, temporary = tempfile.mkstemp(dir=self._cache_path)
        try:
            with open(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            checksum = _checksum(Path(temporary))
            os.replace(temporary, filepath)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        Path(filepath + SUM).write_text(checksum)


SUM = ".sum"  # the ending of the checksum's file


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_intact(path: str) -> bool:
    """True if the file has the checksum beside it."""
    try:
        return _checksum(Path(path)) == Path(path + SUM).read_text()
    except (OSError, ValueError):
        return False


class _Cache(FunctionCache):
    """Numba's cache of one function, with our files."""

    _impl_class = _Implementation

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The machine code for these types, or None."""
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # written by an earlier Numba, say: compile it again
            found = None
        if found is None:
            announce()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the machine code for these types, if the disk has room."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def _cache_of(function: Callable) -> Any:
    """The cache of a function. One that keeps nothing if no folder can be written, or if Numba's classes have changed.
    """
    if cache_folder():
        with contextlib.suppress(Exception):
            return _Cache(function)
    announce()
    return NullCache()
