"""NVIDIA's run-time compiler without a GPU: does CUDA C compile for a device, and to how many registers?

    pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl
    python tests/tools/nvrtc.py sm_90 [FILE.cu ...]          default: every kernel of the library, for float32

It is the compiler that CuPy uses on a device. The wheels bring the library and the headers; no driver is needed.
"""
from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path


def missing() -> str | None:
    """None if NVRTC is installed, else the command that installs it."""
    if _folder():
        return None
    return "no NVRTC: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"


@lru_cache(None)
def _folder() -> Path | None:
    """The folder of the wheel that holds NVRTC, or None."""
    for name in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        folders = spec.submodule_search_locations if spec else None
        for folder in folders or []:
            if list(Path(folder).glob("lib/libnvrtc.so.*")):
                return Path(folder)
    return None


@lru_cache(None)
def _library() -> ctypes.CDLL:
    """The NVRTC library. It finds its builtins by name alone, so they are loaded first."""
    libraries = _folder() / "lib"
    builtins = next(libraries.glob("libnvrtc-builtins.so.*"))
    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    nvrtc = next(path for path in libraries.glob("libnvrtc.so.*") if path.suffix[1:].isdigit())
    return ctypes.CDLL(str(nvrtc))


def compile_cuda(source: str, arch: str) -> tuple[bytes, str]:
    """(the binary for a device such as sm_90, the compiler's remarks).

    RuntimeError with the compiler's messages if it does not accept the source.
    """
    lib = _library()
    program = ctypes.c_void_p()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    include = _folder() / "include"
    options = [f"-arch={arch}", "-std=c++17", f"-I{include}", f"-I{include / 'cccl'}", "--ptxas-options=-v"]
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = lib.nvrtcCompileProgram(program, len(options), encoded)
    log = _bytes(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
    if failed:
        raise RuntimeError(log)
    return _bytes(lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN, program), log


def _bytes(size_of: ctypes._CFuncPtr, get: ctypes._CFuncPtr, program: ctypes.c_void_p) -> bytes:
    """The bytes that `get` writes; `size_of` gives their number."""
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
        if files:
            text = Path(path).read_text(encoding="utf-8")
        else:
            text = source(path.name, (("T", "float32"), ("S", "float16")))
        binary, log = compile_cuda(text, arch)
        print(f"{path}: {len(binary)} bytes for {arch}\n{log}")
