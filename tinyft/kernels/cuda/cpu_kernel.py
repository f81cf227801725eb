"""CpuKernel: CUDA C source as a function on NumPy arrays, with the call of cupy.RawKernel.

    scale = CpuKernel(source, "scale")
    scale((grid,), (block,), (x, np.float32(2), np.int32(x.size)))

The kernels of this folder are tested through it, and the exercises in CUDA C run on it, without a GPU.
cuda_cpu.h holds the language: threads as fibers, barriers, shared memory, shuffles, atomics, half precision.

Errors that a GPU does not report are reported here: an argument of the wrong type or size, a write outside an array,
a barrier that not all threads reach.  Two environment variables change how a launch runs; a correct kernel's result
depends on neither:

    EMU_REVERSE=1       threads run in the reverse order: a result that changes was a race
    EMU_POISON=127      the byte that fills shared memory and surrounds arrays (255 by default, which is NaN and -1)
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...atomic import write_atomically

HERE = Path(__file__).parent
GUARD = 4096                                 # bytes of poison on each side of an array
ALIGNMENT = 256                              # of an array's address, as on a device
SHARED = 48 * 1024                           # bytes of dynamic shared memory, unless a kernel asks for more
_one_at_a_time = threading.Lock()            # a kernel's blocks live in static memory


class KernelError(RuntimeError):
    """A kernel that does not compile, was called wrongly, or did something forbidden."""


class CpuKernel:
    """The kernel `name` of some CUDA C source, compiled for the CPU.

    Called with grid and block (up to three sizes each) and the arguments: NumPy arrays, which must be contiguous, and
    NumPy scalars of the type the kernel takes.  Works on the arrays in place.  KernelError says what went wrong.
    """

    def __init__(self, source: str, name: str, options: Sequence[str] = ()):
        """Compile the source and find the kernel's entry and its parameter types.  options: for the C++ compiler."""
        self.name = name
        if name not in kernels(source) or 'extern "C"' not in source:
            found = ", ".join(kernels(source)) or "none"
            raise KernelError(f'the source holds no extern "C" __global__ void {name}(...); its kernels: {found}')
        library = _library(translate(source), tuple(options))
        self.entry = library[f"emu_run_{name}"]
        self.entry.restype = ctypes.c_char_p
        signature = library[f"emu_signature_{name}"]
        signature.restype = ctypes.c_char_p
        self.parameters = signature().decode().split()       # such as ["pf4", "vi8"]; see _check_argument

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        """Check the call as a device would, run the kernel on guarded copies of the arrays, and copy the results back.

        shared_mem: bytes of dynamic shared memory.  KernelError for a wrong call or a forbidden access."""
        grid = _three_sizes(grid)
        block = _three_sizes(block)
        self._check_launch(grid, block, shared_mem)
        if len(args) != len(self.parameters):
            raise KernelError(f"{self.name} takes {len(self.parameters)} arguments; got {len(args)}")
        for i, (a, wanted) in enumerate(zip(args, self.parameters)):
            self._check_argument(i, a, wanted)
        guarded = self._guard([a for a in args if isinstance(a, np.ndarray)])
        error = self._run(grid, block, shared_mem, [_c_value(a, guarded) for a in args])
        for i, a in enumerate(args):
            if isinstance(a, np.ndarray):
                guarded[_place(a)].give_back(a, f"{self.name} was given argument {i}, {a.dtype} of shape {a.shape}")
        if error:
            raise KernelError(f"{self.name}: {error.decode()}")

    def _run(self, grid: tuple, block: tuple, shared: int, values: list[Any]) -> bytes | None:
        """Call the compiled kernel with the addresses of the values.  Returns its error message, or None.

        Reads the environment: EMU_REVERSE=1 runs the threads in reverse order, EMU_POISON fills unwritten memory."""
        addresses = [v.ctypes.data if isinstance(v, np.ndarray) else ctypes.addressof(v) for v in values]
        sizes = (ctypes.c_uint * 6)(*grid, *block)
        pointers = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        reverse = int(os.environ.get("EMU_REVERSE") == "1")
        with _one_at_a_time:
            return self.entry(sizes, ctypes.c_size_t(shared), reverse, _poison(), pointers)

    def _check_launch(self, grid: tuple, block: tuple, shared: int) -> None:
        """KernelError for sizes that a device refuses: the limits of CUDA."""
        threads = block[0] * block[1] * block[2]
        if not 1 <= threads <= 1024 or block[2] > 64:
            raise KernelError(f"{self.name}: a block has 1 to 1024 threads (z at most 64); got {block}")
        if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise KernelError(f"{self.name}: a grid has at least one block, and at most 65535 along y and z; "
                              f"got {grid}")
        if shared > SHARED:
            raise KernelError(f"{self.name}: {shared} bytes of dynamic shared memory; "
                              f"a kernel has {SHARED} unless it asks for more")

    def _check_argument(self, i: int, a: Any, wanted: str) -> None:
        """KernelError unless an argument has the type of its parameter: a device would reinterpret its bytes.

        wanted: as emu::signature writes it: "p" for a pointer or "v" for a value; "f" for floats, "i" for integers, "?"
        for another type, which is not checked; then the bytes.  "pf4" is a pointer to float32, "vi8" an int64 by value.
        """
        is_pointer = wanted[0] == "p"
        kind = wanted[1]
        size = int(wanted[2:])
        parameter = f"a pointer to {_c_type(kind, size)}" if is_pointer else _c_type(kind, size)
        problem = f"argument {i} of {self.name} is {parameter}; "
        if is_pointer and isinstance(a, np.uintp) and a == 0:            # a null pointer
            return
        if not isinstance(a, (np.ndarray, np.generic)) or isinstance(a, np.ndarray) != is_pointer:
            got = "an array" if isinstance(a, np.ndarray) else f"a {type(a).__name__}"
            advice = "" if is_pointer else ": pass a NumPy scalar of that type"
            raise KernelError(f"{problem}got {got}{advice}")
        got_kind = "i" if a.dtype.kind in "iub" else "f"
        if kind != "?" and (size, kind) != (a.dtype.itemsize, got_kind):
            raise KernelError(f"{problem}got {a.dtype}")
        if is_pointer and not (a.flags.c_contiguous or a.flags.f_contiguous):
            raise KernelError(f"{problem}a pointer carries no strides, and the array of shape {a.shape} is not "
                              "contiguous")

    def _guard(self, arrays: list[np.ndarray]) -> dict[tuple, _Guarded]:
        """{_place(array): its guarded copy}; an array that is given twice has one copy.  KernelError if two overlap.

        In two copies an overlap would not show: the kernel's write to one would not reach the other."""
        found: dict[tuple, _Guarded] = {}
        for a in arrays:
            place = _place(a)
            if place in found:
                continue
            start, nbytes = place
            if any(start < other + n and other < start + nbytes for other, n in found):
                raise KernelError(f"{self.name}: two of the arrays overlap")
            # A poison of its own for each array, so that poison copied from one to another is found too.
            found[place] = _Guarded(a, (_poison() - len(found)) % 256)
        return found


class _Guarded:
    """A copy of an array's bytes for the kernel to work on, between two guards of poison."""

    def __init__(self, a: np.ndarray, poison: int):
        self.raw = np.full(a.nbytes + 2 * GUARD + ALIGNMENT, poison, np.uint8)
        self.poison = poison
        start = GUARD + -(self.raw.ctypes.data + GUARD) % ALIGNMENT
        self.inside = slice(start, start + a.nbytes)
        self.address = self.raw.ctypes.data + start
        self.raw[self.inside] = _bytes(a)

    def give_back(self, a: np.ndarray, call: str) -> None:
        """Copy the result into the array.  KernelError if the kernel wrote outside it, or to a read-only array.

        call: the kernel and the argument, for the message.
        """
        before = self.raw[:self.inside.start]
        after = self.raw[self.inside.stop:]
        if (before != self.poison).any():
            raise KernelError(f"{call}, and wrote before the start of it")
        if (after != self.poison).any():
            raise KernelError(f"{call}, and wrote past the end of it")
        if a.flags.writeable:
            _bytes(a)[:] = self.raw[self.inside]
        elif not np.array_equal(_bytes(a), self.raw[self.inside]):
            raise KernelError(f"{call}, and wrote to it, though it is read-only")


def _three_sizes(sizes: Sequence[int]) -> tuple[int, int, int]:
    """(x, y, z), 1 where a size is left out."""
    x, y, z = (*sizes, 1, 1)[:3]
    return int(x), int(y), int(z)


def _c_value(a: Any, guarded: dict[tuple, _Guarded]) -> Any:
    """An argument as something that has an address: the address of the guarded copy, or a scalar as an array."""
    return ctypes.c_void_p(guarded[_place(a)].address) if isinstance(a, np.ndarray) else np.array(a)


def _bytes(a: np.ndarray) -> np.ndarray:
    """The memory of a contiguous array, as bytes."""
    return a.reshape(-1, order="A").view(np.uint8) if a.size else np.empty(0, np.uint8)


def _place(a: np.ndarray) -> tuple[int, int]:
    """(address, bytes) of an array."""
    return a.ctypes.data, a.nbytes


def _poison() -> int:
    return int(os.environ.get("EMU_POISON", "255"))


def _c_type(kind: str, size: int) -> str:
    """The dtype of a parameter, in words."""
    if kind == "f":
        return f"float{8 * size}"
    if kind == "i":
        return "bool or int8" if size == 1 else f"int{8 * size}"
    return f"something of {size} bytes"


@contextlib.contextmanager
def emulating(reverse: bool, poison: int) -> Iterator[None]:
    """Set the order of the threads, and the byte that fills memory nobody wrote, for the launches in this block.

    A correct kernel's result depends on neither."""
    new = {"EMU_REVERSE": str(int(reverse)), "EMU_POISON": str(poison)}
    old = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ── from CUDA C to a library of the CPU ──────────────────────────────────────────────────────────────────────────────
WAITS = re.compile(r"__sync|__shfl|__ballot|__any_sync|__all_sync")
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w\s]+?)\s+(\w+)\s*\[\s*\]\s*;")
BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
KERNEL = re.compile(rf"(template\s*<[^>]*>\s*)?__global__\s+{BOUNDS}void\s+{BOUNDS}(\w+)\s*\(")
CUDA_HEADER = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<cuda_\w+\.h>.*$", re.MULTILINE)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def kernels(source: str) -> list[str]:
    """The names of the kernels in some CUDA C.  Templates have no names of their own and are left out."""
    return [name for template, name in KERNEL.findall(COMMENT.sub("", source)) if not template]


def translate(source: str) -> str:
    """The C++ of CUDA C: the source, in which cuda_cpu.h defines most of the language, and an entry to each kernel.

    Only what a header cannot express is rewritten.  Line numbers do not change.  Half precision is in cuda_cpu.h, so
    CUDA's own headers are left out.
    """
    body = CUDA_HEADER.sub("", source)
    # `extern __shared__ float a[];` becomes a pointer into memory of the launch's size.
    body = DYNAMIC.sub(r"\1 *\2 = (\1 *)emu::dynamic_shared();", body)
    # A kernel that never waits for other threads runs without fibers, which is faster.
    waits = "true" if WAITS.search(COMMENT.sub("", source)) else "false"
    entries = "".join(_entry(name, waits) for name in kernels(source))
    return f'#include "cuda_cpu.h"\nnamespace {{\n#line 1 "kernel.cu"\n{body}\n}}\n{entries}'


def _entry(name: str, waits: str) -> str:
    """C++ of the two functions through which Python reads a kernel's signature and runs it.

    waits: "true" if a thread may wait for others, at a barrier or a shuffle."""
    return f"""
extern "C" const char *emu_signature_{name}() {{ return emu::signature({name}); }}
extern "C" const char *emu_run_{name}(const unsigned *size, size_t shared, int reverse, int poison, void **values) {{
  return emu::run({name}, {waits}, size, shared, reverse, poison, values); }}
"""


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of the usual ones that is installed.  KernelError if there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise KernelError("no C++ compiler found: CUDA C runs on the CPU through one.  Install g++ or clang++ (Debian, "
                      "Ubuntu: apt install g++; macOS: xcode-select --install), or name yours in the environment "
                      "variable CXX")


@functools.lru_cache(None)
def _library(code: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """The compiled library of some C++.  Compiled once and kept in the user's cache.

    KernelError if the compiler does not take the code, or if the system does not load the library."""
    cxx = compiler()
    header = (HERE / "cuda_cpu.h").read_bytes()
    machine = f"{sys.platform} {platform.machine()}"         # a home may be shared by machines of several kinds
    ingredients = [code.encode(), header, cxx.encode(), repr(options).encode(), machine.encode()]
    key = hashlib.sha256(b"\0".join(ingredients)).hexdigest()[:24]
    for path in _kept(key):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        built = _compile(cxx, code, options, Path(folder))
        _keep(key, built.read_bytes())
        # The system may forbid to run code from one of the two folders.
        for path in (built, *_kept(key)):
            try:
                return ctypes.CDLL(str(path))                # on Unix the file may be removed once it is loaded
            except OSError as e:
                reason = e
    raise KernelError(f"the system does not load the compiled kernel: {reason}")


def _compile(cxx: str, code: str, options: tuple[str, ...], folder: Path) -> Path:
    """Compile C++ into a shared library in this folder.  Returns its path.  KernelError, with the compiler's words."""
    # Fibers change stacks with longjmp, which _FORTIFY_SOURCE would abort.
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-pthread", "-U_FORTIFY_SOURCE", f"-I{HERE}", *options]
    cpp = folder / "kernel.cpp"
    so = folder / "kernel.so"
    cpp.write_text(code, encoding="utf-8")
    try:
        done = subprocess.run([cxx, *flags, str(cpp), "-o", str(so)], capture_output=True, text=True, errors="replace")
    except OSError as e:
        raise KernelError(f"the C++ compiler {cxx} cannot be run: {e.strerror}") from None
    if done.returncode:
        said = done.stderr.replace(f"{folder}{os.sep}", "")[:3000]
        raise KernelError(f"{cxx} does not take this kernel:\n{said}")
    if not so.exists():
        raise KernelError(f"the C++ compiler {cxx} wants to write a shared library, and wrote none")
    return so


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────
# A library is kept as KEY-CHECKSUM.so.  KEY is a hash of everything that the library depends on, CHECKSUM one of its
# bytes: a file that was damaged, or written by halves, does not fit its name, and is built again.
def _kept(key: str) -> Iterator[Path]:
    """The intact files of the cache with this key.  Damaged ones are removed."""
    folder = _cache()
    for path in sorted(folder.glob(f"{key}-*.so")) if folder else ():
        with contextlib.suppress(OSError):                   # removed by another process, or not ours
            if path.name == _kept_name(key, path.read_bytes()):
                yield path
            else:
                path.unlink()


def _keep(key: str, content: bytes) -> None:
    """Write a library to the cache, complete or not at all.  Where the cache cannot be written, nothing happens."""
    folder = _cache()
    if folder is not None:
        with contextlib.suppress(OSError):
            write_atomically({folder / _kept_name(key, content): content})


def _kept_name(key: str, content: bytes) -> str:
    """The file name of a library with this content."""
    return f"{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _cache() -> Path | None:
    """A folder that only this user can write to, since the libraries in it are executed.  None if there can be none."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "tinyft" / "cuda"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):                          # RuntimeError: the user has no home
        return None
    return folder
