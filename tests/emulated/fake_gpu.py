"""Real CuPy on a machine without a GPU: device memory is host memory, and a launch is a call.

    fake_gpu.install(folder)           before anything imports cupy; `folder` keeps what is compiled
    fake_gpu.execute = f               f(kernel name, its module, sizes, shared, params): emulate.py

CuPy's compiled modules reach CUDA through C functions that cupy_backends.cuda.api.runtime and .driver export in
`__pyx_capi__`, and that every other module reads once, when it is imported.  `install` puts those of fake_gpu.c there
first.  So signatures, dtypes, casts, error texts, the memory pool, launches, copies and waits are CuPy's own.  Its
cuBLAS is fake_cublas.c.

A captured stream records each operation with a copy of every parameter.  A graph repeats them on the arrays that lie at
those addresses then.

Not there: CuPy's libraries that come compiled for a GPU (thrust, CUB), cuRAND, cuSOLVER, cuSPARSE, asynchrony, a fault
at a wrong address.
Written for one version of CuPy, and it refuses any other.  The library never imports this.
"""
from __future__ import annotations

import ctypes as C
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PACKAGE, VERSION = "cupy-cuda13x", "14.2.0"
execute: Callable[[str, bytes, int, int, int], None] | None = None
# f(kernel name, its module): the sizes of what it is given
parameters: Callable[[str, bytes], list[int]] | None = None
launched: Counter[str] = Counter()  # kernels by name, since reset()
LIMITS = dict(threads=1024, shared=232448, grid_yz=65535)
_modules: dict[int, bytes] = {}
_functions: dict[int, tuple[str, bytes]] = {}
_keep: list[Any] = []  # what C holds pointers to
_lib: Any = None
_cublas: Any = None


class Unsupported(RuntimeError):
    """This CuPy is not the one the fake GPU was written for."""


# ── the entry points easier to write in Python: rarely called ────────────────────────────────────────────────────────
def moduleLoadData(image: bytes, _: int = 0) -> int:
    _modules[number := len(_modules) + 1] = bytes(image)
    return number


def moduleGetFunction(module: int, name: str, _: int = 0) -> int:
    _functions[number := len(_functions) + 1] = name, _modules[module]
    return number


def memGetInfo(_: int = 0) -> tuple[int, int]:
    return 2**36, 2**37


def occupancyMaxPotentialBlockSize(f: int, shared: int, most: int, _: int = 0) -> tuple[int, int]:
    return 264, 512


def getDeviceProperties(device: int, _: int = 0) -> dict:
    return dict(name=b"fake GPU", multiProcessorCount=132, major=9, minor=0, totalGlobalMem=2**37,
                maxThreadsPerBlock=1024,
                sharedMemPerBlock=49152, warpSize=32)


PYTHON = {"moduleLoadData": "intptr_t (PyObject *, int)", "moduleGetFunction": "intptr_t (intptr_t, PyObject *, int)",
          "memGetInfo": "PyObject * (int)", "occupancyMaxPotentialBlockSize": "PyObject * (intptr_t, size_t, int, int)",
          "getDeviceProperties": "PyObject * (int, int)"}
# What Python code calls by way of the module, and not of its C functions.
ATTRIBUTES = {"getDevice": lambda: 0,
              "streamIsCapturing": lambda stream: _lib.f_streamIsCapturing(C.c_ssize_t(stream), 0),
              "getDeviceCount": lambda: 1, "driverGetVersion": lambda: 13000,
              "setDevice": lambda device: None, "deviceSynchronize": lambda: _lib.f_deviceSynchronize(0)}
TYPES = {"intptr_t": C.c_ssize_t, "PyObject *": C.py_object, "int": C.c_int, "size_t": C.c_size_t}


def _types(signature: str) -> tuple[str, tuple[str, ...]]:
    """'PyObject *(intptr_t, unsigned int flags, int __pyx_skip_dispatch)' -> ('PyObject *', ('intptr_t', 'unsigned
    int', 'int'))
    """
    result, _, inside = signature.rstrip(")").partition("(")

    def plain(word: str) -> str:
        word = re.sub(r"struct \w+ ?\*.*", "void *", word.strip())
        found = re.match(r"(unsigned int|\w+)( ?\*)?", word)
        return f"{found[1]}{' *' if found[2] else ''}"
    return plain(result.strip()), tuple(plain(a) for a in inside.split(",") if a.strip() not in ("", "void"))


def _compile(source: Path | str, target: Path, *more: str) -> Path:
    """A shared library in `target`, made anew when the source changed."""
    text = source if isinstance(source, str) else source.read_text()
    stamp = target.with_suffix(".c")
    if not target.exists() or not stamp.exists() or stamp.read_text() != text:
        made = f"{target}.{os.getpid()}"
        stamp.write_text(text)
        subprocess.run(["gcc", "-O3", "-shared", "-fPIC", "-w", "-o", made, str(stamp), "-lm", *more], check=True)
        os.replace(made, target)
    return target


def _load_cublas(folder: Path) -> Any:
    """fake_cublas.c under cuBLAS's name, with every function CuPy's binding wants: those it has not answer
    NOT_SUPPORTED.

    Loaded for all to see before CuPy looks for the real one, it is taken for it.
    """
    binding = next((Path(importlib.util.find_spec("cupy_backends").origin).parent / "cuda"
                    / "libs").glob("cublas.*.so"))
    wanted = subprocess.run(["nm", "-D", "--undefined-only", str(binding)], capture_output=True, text=True,
                            check=True).stdout
    text = (HERE / "fake_cublas.c").read_text()
    here = set(re.findall(r"^int (cublas\w+)\(", text, re.M))
    _keep.append(C.CDLL(str(_compile("int nothing(void) { return 0; }\n", folder / "libcublasLt.so.13",
                                     "-Wl,-soname,libcublasLt.so.13")),
                        mode=C.RTLD_GLOBAL))
    soname = "libcublas.so.13"
    missing = sorted(set(re.findall(rf"\b(cublas\w+)@{re.escape(soname)}", wanted)) - here)
    text += "".join(f"int {name}(void) {{ return NOT_SUPPORTED; }}\n" for name in missing)
    (folder / "cublas.map").write_text(f"{soname} {{ global: *; }};\n")
    return C.CDLL(str(_compile(text, folder / soname, f"-Wl,-soname,{soname}",
                               f"-Wl,--version-script={folder / 'cublas.map'}")),
                  mode=C.RTLD_GLOBAL)


def _run(function: int, sizes: int, shared: int, params: int) -> int:
    """One launch.  An error is handed to C, which raises it where CuPy launched."""
    name = "?"
    try:
        name, module = _functions[function]
        launched[name] += 1
        gx, gy, gz, bx, by, bz = (C.c_uint * 6).from_address(sizes)
        block_fits = 0 < bx * by * bz <= LIMITS["threads"] and shared <= LIMITS["shared"]
        grid_fits = max(gy, gz) <= LIMITS["grid_yz"] and gx * gy * gz > 0
        if not block_fits or not grid_fits:
            raise RuntimeError(f"invalid launch: grid {gx, gy, gz}, block {bx, by, bz}, "
                               f"{shared} bytes of shared memory")
        if execute is None:
            raise RuntimeError("nothing runs kernels: emulate.install() does")
        execute(name, module, sizes, shared, params)
        return 0
    except BaseException as e:
        (C.c_char * 2000).in_dll(_lib, "fake_error").value = f"fake GPU: kernel {name}: {e}".encode()[:1999]
        return 1


_graphs: list[list[tuple]] = []  # what each notes: a graph is its place here, and one


def _note(kind: int, a: int, b: int, c: int, d: int) -> int:
    """An event of a capture, called from C: the kinds are those of fake_gpu.c."""
    try:
        if kind == 4:
            _graphs.append([])
        elif kind == 5:
            return len(_graphs)
        elif kind == 6:
            for node in _graphs[a - 1]:
                _again(*node)
        elif kind == 0:  # a launch: the parameters are copied, as a driver does
            name, module = _functions[a]
            addresses = (C.c_void_p * 256).from_address(d)
            held = [C.create_string_buffer(C.string_at(addresses[i], n), n) for i,
                    n in enumerate(parameters(name, module))]
            _graphs[-1].append((kind, a, (C.c_uint * 6)(*(C.c_uint * 6).from_address(b)), c, held))
        else:
            _graphs[-1].append((kind, a, b, c))
        return 0
    except BaseException as e:
        (C.c_char * 2000).in_dll(_lib, "fake_error").value = f"fake GPU: {e}".encode()[:1999]
        return 1


def _again(kind: int, a: int, b: Any, c: int, held: list | None = None) -> None:
    if kind == 0:
        params = (C.c_void_p * max(len(held), 1))(*map(C.addressof, held))
        if _run(a, C.addressof(b), c, C.addressof(params)):
            raise RuntimeError((C.c_char * 2000).in_dll(_lib, "fake_error").value.decode())
    elif kind == 1:
        C.memmove(a, b, c)
    elif kind == 2:
        C.memset(a, b, c)
    elif status := _cublas.fake_again(C.c_long(a)):
        raise RuntimeError(f"cuBLAS status {status}")


def check_version() -> None:
    """Raise Unsupported unless the CuPy installed is the one this was written for."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise Unsupported(f"the emulated GPU wants {PACKAGE}=={VERSION}, which is not installed: "
                          "`make test-emulated` does it all") from None
    if found != VERSION:
        raise Unsupported(f"the emulated GPU is written for {PACKAGE} {VERSION}; {found} is installed")


def install(folder: Path) -> None:
    """Put the fake GPU under CuPy.  Unsupported if this is another CuPy, or one whose entry points have other types."""
    global _lib, _cublas
    check_version()
    if "cupy" in sys.modules:
        raise RuntimeError("the fake GPU must be installed before cupy is imported")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["CUPY_ACCELERATORS"] = ""  # CUB's kernels come compiled for a GPU
    # CuPy's own cache would keep the sources from emulate.py
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    _cublas, _lib = _load_cublas(folder), C.PyDLL(str(_compile(HERE / "fake_gpu.c", folder / "fake_gpu.so")))
    callback = C.PYFUNCTYPE(C.c_int, C.c_ssize_t, C.c_ssize_t, C.c_uint, C.c_ssize_t)(_run)
    _keep.append(callback)
    C.c_void_p.in_dll(_lib, "fake_run").value = C.cast(callback, C.c_void_p).value
    note = C.PYFUNCTYPE(C.c_ssize_t, C.c_int, *[C.c_ssize_t] * 4)(_note)
    _keep.append(note)
    for lib, name in ((_lib, "fake_note"), (_cublas, "fake_tell")):
        C.c_void_p.in_dll(lib, name).value = C.cast(note, C.c_void_p).value
    C.c_void_p.in_dll(_cublas, "fake_captured").value = C.addressof(C.c_ssize_t.in_dll(_lib, "fake_capturing"))
    from cupy_backends.cuda.api import driver, runtime
    C.py_object.in_dll(_lib, "fake_error_class").value = runtime.CUDARuntimeError
    ours = {name: f"{result}({arguments})" for result, name, arguments in re.findall(
        r"^([\w ]+\*?)\s*\bf_(\w+)\(([^)]*)\)", (HERE / "fake_gpu.c").read_text(), re.M)}
    replace(runtime, driver, ours | PYTHON)


def replace(runtime: Any, driver: Any, ours: dict[str, str]) -> None:
    """Every entry point that we have, in the place of CuPy's; the others stay CuPy's own, and say that there is no
    driver.
    """
    name_of, new = C.pythonapi.PyCapsule_GetName, C.pythonapi.PyCapsule_New
    name_of.restype, name_of.argtypes = C.c_char_p, [C.py_object]
    new.restype, new.argtypes = C.py_object, [C.c_void_p, C.c_char_p, C.c_void_p]
    there = {name: (module, capsule) for module in (driver, runtime) for name, capsule in module.__pyx_capi__.items()}
    if gone := sorted(ours.keys() - there.keys()):
        raise Unsupported(f"this CuPy has no {', '.join(gone)}: update fake_gpu")
    for name, signature in ours.items():
        module, capsule = there[name]
        theirs = C.create_string_buffer(name_of(capsule))
        if _types(theirs.value.decode()) != _types(signature):
            raise Unsupported(f"this CuPy changed {name}: {theirs.value.decode()!r} is not {signature!r}; "
                              "update fake_gpu")
        if name in PYTHON:
            result, arguments = _types(signature)
            f = C.PYFUNCTYPE(TYPES[result], *(TYPES[a] for a in arguments))(globals()[name])
            setattr(module, name, globals()[name])
        else:
            f = getattr(_lib, f"f_{name}")
        if name in ATTRIBUTES:
            setattr(module, name, ATTRIBUTES[name])
        _keep.extend((f, theirs))  # the capsule points to both
        module.__pyx_capi__[name] = new(C.cast(f, C.c_void_p).value, C.cast(theirs, C.c_char_p), None)


# ── what it cost ─────────────────────────────────────────────────────────────────────────────────────────────────────
# of `fake` in fake_gpu.c
FIELDS = "launches mallocs memsets waits h2d d2h d2d h2d_bytes d2h_bytes graphs bytes peak".split()


class Counts(NamedTuple):
    """Counts of the device's operations since reset().

    launches, products: kernels, and calls of cuBLAS;  waits: times the host waited for the device;  h2d, d2h, d2d:
    copies from host to device, back, and within;  memsets;  mallocs: memory that CuPy's pool did not have;  bytes: of
    device and pinned memory in use;  peak: their maximum;  graphs: replays, whose launches and products count as such
    """
    launches: int
    products: int
    waits: int
    h2d: int
    d2h: int
    d2d: int
    memsets: int
    mallocs: int
    h2d_bytes: int
    d2h_bytes: int
    graphs: int
    bytes: int
    peak: int


class _Fake(C.Structure):
    _fields_ = [(n, C.c_long) for n in FIELDS]


def counts() -> Counts:
    """The counts now."""
    now = _Fake.in_dll(_lib, "fake")
    return Counts(products=C.c_long.in_dll(_cublas, "fake_products").value, **{n: getattr(now, n) for n in FIELDS})


def reset() -> None:
    """Count from zero.  The memory in use stays what it is, and its peak starts from there."""
    now = _Fake.in_dll(_lib, "fake")
    for n in FIELDS[:10]:
        setattr(now, n, 0)
    now.peak = now.bytes
    C.c_long.in_dll(_cublas, "fake_products").value = 0
    launched.clear()
