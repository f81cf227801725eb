"""CUDA C source, compiled by g++ and run on the parameter block of a launch.  include/cuda_cpu.h defines the language.

    module = CpuModule(source, {"f": "f"}, folder)         starts the compiler, and does not wait for it
    module.launch("f", grid, block, shared, params)        waits, loads and runs

params is the address of an array of addresses.  The compiled libraries stay in `folder`, named by a digest of their
sources and options.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent / "include"
# fortified, longjmp refuses to go from stack to stack
COMPILER = ["g++", "-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE"]
# a kernel that has none needs no fibers: its threads run one after another
BARRIERS = r"__sync|__shfl|__ballot|__any_sync|__all_sync"
PRELUDE = "#include <cuda_cpu.h>\n"  # and the headers named to CpuModule


def cuda_include() -> tuple[str, ...]:
    """NVIDIA's own headers (half, bfloat16, vector types), from the wheels nvidia-cuda-runtime, -crt and -cccl."""
    try:
        import nvidia.cu13
    except ImportError:
        raise RuntimeError("no CUDA headers: "
                           "pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl") from None
    base = list(nvidia.cu13.__path__)[0]
    return f"{base}/include", f"{base}/include/cccl"


def digest(*parts: object) -> str:
    return hashlib.sha1("\0".join(map(str, parts)).encode()).hexdigest()[:20]


@functools.cache
def prelude(headers: tuple[str, ...], include: tuple[str, ...], folder: Path) -> tuple[Path, str]:
    """A precompiled header (a kernel then takes 0.15 s to compile and not 0.5), and what tells it from another."""
    text = PRELUDE + "".join(f"#include <{h}>\n" for h in headers)
    version = subprocess.run([COMPILER[0], "--version"], capture_output=True, text=True, check=True).stdout
    key = digest(version, COMPILER, text, include, *((p, p.read_text()) for p in sorted(HERE.rglob("*.*h"))))
    path = folder / key / "prelude.h"
    if not path.with_suffix(".h.gch").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        made = f"{path}.{os.getpid()}"
        Compilation([*COMPILER, *(f"-I{i}" for i in include), "-x", "c++-header", str(path), "-o",
                     made]).result("the headers")
        os.replace(made, path.with_suffix(".h.gch"))
    return path, key


class Compilation:
    """A running compiler.  result() waits for it and raises RuntimeError with its message if it failed."""

    def __init__(self, command: list[str]):
        self.process, self.said = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                                   text=True), ""

    def result(self, what: str) -> None:
        if self.process.returncode is None:
            self.said = self.process.communicate()[1]
        if self.process.returncode:
            raise RuntimeError(f"g++ does not compile {what}:\n{self.said[:3000]}")


class CpuModule:
    """The kernels of one CUDA source.  names: {name it is launched by: how C++ calls it};  headers: those that come
    precompiled.
    """

    def __init__(self, source: str, names: dict[str, str], folder: Path, headers: tuple[str, ...] = (),
                 include: tuple[str, ...] = (),
                 defines: tuple[str, ...] = ()):
        self.names, self.lib, self.compiling = list(names), None, None
        include = (str(HERE), *include, *cuda_include())
        first, key = prelude(headers, include, folder)
        fibers = "true" if re.search(BARRIERS, source) else "false"
        source = re.sub(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w\s]+?)\s+(\w+)\s*\[\s*\]\s*;",
                        r"\1 *\2 = (\1 *)emu::dynamic_shared();", source)
        for i, call in enumerate(names.values()):
            source += (f'\nextern "C" const char *emu_{i}(const unsigned *sizes, size_t shared, void **params)'
                       f"{{ return emu::run({call}, sizes, shared, {fibers}, params); }}\n"
                       f'extern "C" int emu_sizes_{i}(unsigned *out) {{ return emu::sizes({call}, out); }}\n')
        stem = first.parent / digest(key, source, defines)
        self.so, self.made = stem.with_suffix(".so"), stem.with_suffix(f".{os.getpid()}")
        if not self.so.exists():
            stem.with_suffix(".cpp").write_text(source)
            self.compiling = Compilation([*COMPILER, "-shared", *defines, *(f"-I{i}" for i in include), "-include",
                                          str(first),
                                  str(stem.with_suffix(".cpp")), "-o", str(self.made)])

    def load(self) -> ctypes.CDLL:
        if self.compiling:
            self.compiling.result(f"the kernel {self.names[0]}")
            os.replace(self.made, self.so)
            self.compiling = None
        if self.lib is None:
            self.lib = ctypes.CDLL(str(self.so))
            for i in range(len(self.names)):
                f = self.lib[f"emu_{i}"]
                f.restype, f.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
                setattr(self.lib, f"emu_{i}", f)
        return self.lib

    def launch(self, name: str, sizes: int, shared: int, params: int) -> None:
        """sizes: the address of six unsigned numbers, the grid's and the block's.

        RuntimeError with the reason if the kernel could not run.
        """
        f = getattr(self.lib or self.load(), f"emu_{self.names.index(name)}")
        error = f(sizes, shared, params)
        if error:
            raise RuntimeError(error.decode())

    def parameters(self, name: str) -> list[int]:
        """The sizes of a kernel's parameters, in bytes."""
        out = (ctypes.c_uint * 256)()
        return out[:self.load()[f"emu_sizes_{self.names.index(name)}"](out)]
