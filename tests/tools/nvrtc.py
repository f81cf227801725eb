"""NVIDIA's run-time compiler without a GPU: does CUDA C compile for a device, and to how many registers?

    pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl
    python tests/tools/nvrtc.py sm_90 [FILE.cu ...]          default: every kernel of the library, for float32

It is the compiler CuPy uses on a device.  The wheels bring the library and the headers; no driver is needed.
"""
from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path


def missing() -> str | None:
    "None if there is an NVRTC, else what to do about it."
    return None if _place() else "no NVRTC: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"


@lru_cache(None)
def _place() -> Path | None:
    for name in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if list(Path(folder).glob("lib/libnvrtc.so.*")):
                return Path(folder)
    return None


@lru_cache(None)
def _library() -> ctypes.CDLL:
    libraries = _place() / "lib"
    ctypes.CDLL(str(next(libraries.glob("libnvrtc-builtins.so.*"))), mode=ctypes.RTLD_GLOBAL)      # it looks for this one by name alone
    return ctypes.CDLL(str(next(p for p in libraries.glob("libnvrtc.so.*") if p.suffix[1:].isdigit())))


def compile_cuda(source: str, arch: str) -> tuple[bytes, str]:
    "(the binary for a device such as sm_90, the compiler's remarks).  RuntimeError with its messages if it does not take the source."
    lib, program = _library(), ctypes.c_void_p()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [f"-arch={arch}", "-std=c++17", f"-I{_place() / 'include'}", f"-I{_place() / 'include' / 'cccl'}", "--ptxas-options=-v"]
    failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options]))
    log = _bytes(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
    if failed:
        raise RuntimeError(log)
    return _bytes(lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN, program), log


def _bytes(size_of: ctypes._CFuncPtr, get: ctypes._CFuncPtr, program: ctypes.c_void_p) -> bytes:
    n = ctypes.c_size_t()
    assert size_of(program, ctypes.byref(n)) == 0
    out = ctypes.create_string_buffer(n.value)
    assert get(program, out) == 0
    return out.raw


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    from tinyft.kernels.cuda.launch import HERE, source
    arch, *files = sys.argv[1:] or ["sm_90"]
    for path in files or sorted(HERE.glob("*.cu")):
        text = Path(path).read_text(encoding="utf-8") if files else source(path.name, (("T", "float32"), ("S", "float16")))
        binary, log = compile_cuda(text, arch)
        print(f"{path}: {len(binary)} bytes for {arch}\n{log}")
