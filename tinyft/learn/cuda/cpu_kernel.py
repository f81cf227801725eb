"""CpuKernel: CUDA C source as a function on NumPy arrays, with the call of cupy.RawKernel.

    scale = CpuKernel(source, "scale")
    scale((grid,), (block,), (x, np.float32(2), np.int32(x.size)))

What a GPU would pass over in silence is an error here: an argument of the wrong type or size, a write outside an array, a barrier
that not all threads reach.  Two environment variables change how a launch runs, and a right kernel's result depends on neither:

    EMU_REVERSE=1       threads run in the reverse order: a result that changes was a race
    EMU_POISON=127      the byte that fills shared memory and surrounds arrays (255 by default, which is NaN and -1)
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
GUARD = 4096                                             # bytes watched on each side of an array
SHARED = 48 * 1024                                       # dynamic shared memory a kernel has without asking for more
_one_at_a_time = threading.Lock()                        # a kernel's blocks live in static memory


class KernelError(RuntimeError):
    "A kernel that does not compile, was called wrongly, or did what it must not."


class CpuKernel:
    """The kernel `name` of some CUDA C source, compiled for the CPU.

    Called with grid and block (up to three sizes each) and the arguments: NumPy arrays, which must be contiguous, and NumPy scalars
    of the type the kernel takes.  Works on the arrays in place.  KernelError says what went wrong."""

    def __init__(self, source: str, name: str, options: Sequence[str] = ()):
        self.name = name
        if name not in kernels(source) or 'extern "C"' not in source:
            raise KernelError(f'the source holds no extern "C" __global__ void {name}(...); its kernels: {", ".join(kernels(source)) or "none"}')
        library = _library(translate(source), tuple(options))
        self.entry, signature = library[f"emu_run_{name}"], library[f"emu_signature_{name}"]
        self.entry.restype = signature.restype = ctypes.c_char_p
        self.parameters = signature().decode().split()

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        grid, block = (tuple(int(n) for n in (*size, 1, 1)[:3]) for size in (grid, block))
        self.check_launch(grid, block, shared_mem)
        if len(args) != len(self.parameters):
            raise KernelError(f"{self.name} takes {len(self.parameters)} arguments; got {len(args)}")
        for i, (a, wanted) in enumerate(zip(args, self.parameters)):
            self.check_argument(i, a, wanted)
        guarded = self.guard([a for a in args if isinstance(a, np.ndarray)])
        values = [ctypes.c_void_p(guarded[_place(a)].address) if isinstance(a, np.ndarray) else a for a in args]
        held = [np.array(v) if isinstance(v, np.generic) else v for v in values]
        pointers = [v.ctypes.data if isinstance(v, np.ndarray) else ctypes.addressof(v) for v in held]
        reverse, poison = os.environ.get("EMU_REVERSE") == "1", _poison()
        with _one_at_a_time:
            error = self.entry((ctypes.c_uint * 6)(*grid, *block), ctypes.c_size_t(shared_mem), int(reverse), poison,
                               (ctypes.c_void_p * max(len(pointers), 1))(*pointers))
        for i, a in enumerate(args):
            if isinstance(a, np.ndarray):
                guarded[_place(a)].give_back(a, f"{self.name} was given argument {i}, {a.dtype} of shape {a.shape}")
        if error:
            raise KernelError(f"{self.name}: {error.decode()}")

    def check_launch(self, grid: tuple, block: tuple, shared: int) -> None:
        "What a device refuses."
        threads = block[0] * block[1] * block[2]
        if not 1 <= threads <= 1024 or block[2] > 64:
            raise KernelError(f"{self.name}: a block has 1 to 1024 threads (z at most 64); got {block}")
        if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise KernelError(f"{self.name}: a grid has at least one block, and at most 65535 along y and z; got {grid}")
        if shared > SHARED:
            raise KernelError(f"{self.name}: {shared} bytes of dynamic shared memory; a kernel has {SHARED} unless it asks for more")

    def check_argument(self, i: int, a: Any, wanted: str) -> None:
        "A device would take the bytes for whatever the kernel says they are."
        pointer, kind, size = wanted[0] == "p", wanted[1], int(wanted[2:])
        said = f"argument {i} of {self.name} " + ("is a pointer to" if pointer else "is") + f" {_called(kind, size)}; "
        if pointer and isinstance(a, np.uintp) and a == 0:
            return                                                               # a null pointer
        if isinstance(a, np.ndarray) != pointer or not isinstance(a, (np.ndarray, np.generic)):
            raise KernelError(said + f"got {'an array' if isinstance(a, np.ndarray) else f'a {type(a).__name__}'}"
                              + ("" if pointer else ": pass a NumPy scalar of that type"))
        mine = "i" if a.dtype.kind in "iub" else "f"
        if kind != "?" and (size, kind) != (a.dtype.itemsize, mine):
            raise KernelError(said + f"got {a.dtype}")
        if pointer and not (a.flags.c_contiguous or a.flags.f_contiguous):
            raise KernelError(said + f"a pointer carries no strides, and the array of shape {a.shape} is not contiguous")

    def guard(self, arrays: list[np.ndarray]) -> dict[tuple, _Guarded]:
        "A copy of each array between two guards; one copy of an array that is given twice."
        out = {}
        for a in arrays:
            if _place(a) not in out and any(start < _place(a)[0] + a.nbytes and _place(a)[0] < start + n for start, n in out):
                raise KernelError(f"{self.name}: two of the arrays overlap")
            out.setdefault(_place(a), _Guarded(a, (_poison() - len(out)) % 256))          # each its own, that copied poison shows too
        return out


class _Guarded:
    "The bytes of an array where a kernel may work on them, between two guards of poison."

    def __init__(self, a: np.ndarray, poison: int):
        self.raw, self.poison = np.full(a.nbytes + 2 * GUARD + 256, poison, np.uint8), poison
        start = GUARD + -(self.raw.ctypes.data + GUARD) % 256                    # aligned as device memory is
        self.inside = slice(start, start + a.nbytes)
        self.address = self.raw.ctypes.data + start
        self.raw[self.inside] = _bytes(a)

    def give_back(self, a: np.ndarray, said: str) -> None:
        "What the kernel left, into the array it came from."
        for where, part in (("before the start", self.raw[:self.inside.start]), ("past the end", self.raw[self.inside.stop:])):
            if (part != self.poison).any():
                raise KernelError(f"{said}, and wrote {where} of it")
        if a.flags.writeable:
            _bytes(a)[:] = self.raw[self.inside]
        elif not np.array_equal(_bytes(a), self.raw[self.inside]):
            raise KernelError(f"{said}, and wrote to it, though it is read-only")


def _bytes(a: np.ndarray) -> np.ndarray:
    "The memory of a contiguous array, as bytes."
    return a.reshape(-1, order="A").view(np.uint8) if a.size else np.empty(0, np.uint8)


def _place(a: np.ndarray) -> tuple[int, int]:
    return a.ctypes.data, a.nbytes


def _poison() -> int:
    return int(os.environ.get("EMU_POISON", "255"))


def _called(kind: str, size: int) -> str:
    return {"f": f"float{8 * size}", "i": "bool or int8" if size == 1 else f"int{8 * size}"}.get(kind, f"something of {size} bytes")


# ── from CUDA C to a library of the CPU ──────────────────────────────────────────────────────────────────────────────
WAITS = re.compile(r"__sync|__shfl|__ballot|__any_sync|__all_sync")
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w\s]+?)\s+(\w+)\s*\[\s*\]\s*;")
BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
KERNEL = re.compile(rf"(template\s*<[^>]*>\s*)?__global__\s+{BOUNDS}void\s+{BOUNDS}(\w+)\s*\(")


def kernels(source: str) -> list[str]:
    "The names of the kernels in some CUDA C; templates have none of their own."
    return [name for template, name in KERNEL.findall(_code(source)) if not template]


def _code(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def translate(source: str) -> str:
    "The C++ of CUDA C: the source itself, with what no header can express rewritten, line for line; then a way in to each kernel."
    body = re.sub(r"^[ \t]*#[ \t]*include[ \t]*<cuda_\w+\.h>.*$", "", source, flags=re.MULTILINE)      # half precision is in cuda_cpu.h
    body = DYNAMIC.sub(r"\1 *\2 = (\1 *)emu::dynamic_shared();", body)
    waits = str(bool(WAITS.search(_code(source)))).lower()
    return f'#include "cuda_cpu.h"\nnamespace {{\n#line 1 "kernel.cu"\n{body}\n}}\n' + "".join(f"""
extern "C" const char *emu_signature_{name}() {{ return emu::signature({name}); }}
extern "C" const char *emu_run_{name}(const unsigned *size, size_t shared, int reverse, int poison, void **values) {{
  return emu::run({name}, {waits}, size, shared, reverse, poison, values); }}
""" for name in kernels(source))


def compiler() -> str:
    "The C++ compiler: $CXX, or the first of the usual ones that is there."
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise KernelError("no C++ compiler found: CUDA C runs on the CPU through one.  Install g++ or clang++ (Debian, Ubuntu: apt install g++; "
                      "macOS: xcode-select --install), or name yours in the environment variable CXX")


@functools.lru_cache(None)
def _library(code: str, options: tuple[str, ...]) -> ctypes.CDLL:
    "Compiled once, and kept in the user's cache."
    cxx, header = compiler(), (HERE / "cuda_cpu.h").read_bytes()
    key = hashlib.sha256(b"\0".join([code.encode(), header, cxx.encode(), repr(options).encode(), sys.platform.encode()])).hexdigest()[:24]
    built = _cache() / f"{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory() as folder:
            cpp, so = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            cpp.write_text(code, encoding="utf-8")
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-pthread", "-U_FORTIFY_SOURCE", f"-I{HERE}", *options]
            done = subprocess.run([cxx, *flags, str(cpp), "-o", str(so)], capture_output=True, text=True)
            if done.returncode:
                raise KernelError(f"{cxx} does not take this kernel:\n{done.stderr.replace(folder, '')[:3000]}")
            shutil.copy(so, built.with_suffix(f".{os.getpid()}"))
            os.replace(built.with_suffix(f".{os.getpid()}"), built)
    return ctypes.CDLL(str(built))


def _cache() -> Path:
    "A folder of this user's alone: what lies there is run."
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyft" / "cuda"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder
    except OSError:
        return _own_folder()


@functools.lru_cache(None)
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="tinyft-cuda-"))
