"""The state of this machine for tinyft, what is wrong, and the command that helps: `tinyft doctor`.

    lines, errors = examine()        lines: (name, text);   errors: sentences, each with a command that helps

An error is only a problem with something that was requested: a backend named by TINYFT_BACKEND, an installed CuPy. A
machine without a GPU and without CuPy is healthy.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from importlib.util import find_spec

import numpy as np

from . import array, dispatch, kernels
from .kernels import system
from .tensor import OPS

__all__ = ["examine", "wheels"]

Lines = list[tuple[str, str]]


def examine() -> tuple[Lines, list[str]]:
    """(lines, errors): the state of this machine as pairs (name, text), and what is wrong, in sentences.

    Nothing is raised."""
    from . import __version__

    errors: list[str] = []
    lines = [
        ("tinyft", __version__),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("NumPy", _numpy()),
        *_kernels(),
    ]
    lines += _cupy(errors)
    lines.append(("backend", _backend(errors)))
    lines.append(("lessons", _lessons()))
    encoding = getattr(sys.stdout, "encoding", None)
    lines.append(("screen", f"{shutil.get_terminal_size().columns} columns, {encoding}"))
    return lines, errors


def wheels() -> dict[str, str]:
    """The installed packages of CuPy, such as cupy-cuda12x: {package: version}. Two are an error: they write the same
    files."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if re.fullmatch(r"cupy([-_](cuda|rocm).*)?", name):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _numpy() -> str:
    """NumPy's version, its BLAS (the library that multiplies its matrices) and the number of BLAS threads, as text."""
    libraries = []
    for library in system.libraries():
        name = f"{library.internal_api} {library.version or ''}".strip()
        architecture = getattr(library, "architecture", None) or "architecture not known"
        libraries.append(f"{name} ({architecture})")
    blas = " and ".join(libraries) or "of the system, whose threads cannot be set"
    threads = kernels.get_num_threads()
    return f"{np.__version__}, BLAS {blas}, {threads} thread{'s' * (threads != 1)}"


def _kernels() -> Lines:
    """The lines on the kernels, faster drop-ins for ops, for NumPy arrays: the ops that have one, and those that Numba
    compiles."""
    in_use = kernels.in_use()
    if in_use == "off":
        return [("kernels", "off (TINYFT_KERNELS): every op is its definition")]
    names = sorted(name.lstrip("_") for name, f in OPS.items() if dispatch.find(f, np.ndarray))
    return [("kernels", f"of NumPy: {', '.join(names)}"), ("compiled", _compiled(in_use))]


def _compiled(in_use: str) -> str:
    """The state of the compiled kernels, as text. They are compiled now if they are not on the disk."""
    if not kernels.has_numba():
        return 'none: pip install "tinyft[fast]" adds compiled kernels'
    try:
        numba = f"Numba {importlib.metadata.version('numba')}"
    except importlib.metadata.PackageNotFoundError:
        numba = "Numba of no known version"
    if in_use == "numpy":
        return f"none, by TINYFT_KERNELS=numpy; {numba} is there"
    try:
        compiled = kernels.compiled_kernels()
    except RuntimeError as e:
        return f"none: {e}"
    if not compiled:
        return f"none: {numba} does not run here"
    names = sorted(definition.__name__ for definition in compiled)
    folder = kernels.cache_folder() or "no folder: none can be written"
    return f"by {numba}: {', '.join(names)}; machine code in {folder}"


def _lessons() -> str:
    """The state of the libraries that only the lessons need, as text."""
    texts = []
    if find_spec("hypothesis"):
        texts.append("Hypothesis is there")
    else:
        texts.append("Hypothesis is missing: pip install tinyft[lessons]")
    texts.append("Matplotlib is there" if find_spec("matplotlib") else "no Matplotlib, so no figures")
    return ", ".join(texts)


def _cupy(errors: list[str]) -> Lines:
    """The lines on CuPy, and if it works on the driver and the device. What is wrong is added to `errors`.

    A machine on which no package of CuPy is installed is healthy."""
    packages = wheels()
    reason = array.why_no_cupy()                         # None if CuPy works
    if len(packages) > 1:
        errors.append(_too_many(packages))
    names = ", ".join(f"{name} {version}" for name, version in packages.items()) or "there"
    if reason is None:
        return [("CuPy", f"{names}, works"), *_device()]
    if packages:
        errors.append(reason)
        return [("CuPy", f"{names}, does not work")]
    return [("CuPy", reason)]


def _too_many(packages: dict[str, str]) -> str:
    """The error for several packages of CuPy, {package: version}: remove all, and install the one for this CUDA."""
    cuda = "13" if any("cuda13" in name for name in packages) else "12"
    uninstall = f"pip uninstall -y {' '.join(packages)}"
    install = f'pip install "{array.EXTRA}{cuda}]"'
    return f"{len(packages)} packages of CuPy write into one folder: {uninstall}, then {install}"


def _device() -> Lines:
    """The driver and the device of a CuPy that works."""
    d = array.about_device()
    free = f"{d['free'] / 2**30:.1f}"
    total = f"{d['total'] / 2**30:.1f}"
    kind = f"{d['name']}, compute capability {d['capability']}, {d['multiprocessors']} multiprocessors"
    return [
        ("driver", f"CUDA {d['driver']}; CuPy's runtime is of {d['runtime']}"),
        ("device", f"{kind}; {free} of {total} GiB free"),
    ]


def _backend(errors: list[str]) -> str:
    """The backend in use and the reason for it, as text.

    A backend that TINYFT_BACKEND names and that cannot be used is added to `errors`, unless its reason is there."""
    requested = os.environ.get("TINYFT_BACKEND")
    try:
        name = array.backend()
    except array.BackendError as e:
        if not any(known in str(e) for known in errors):
            errors.append(str(e))
        return f"none: TINYFT_BACKEND={requested} cannot be used"
    if requested is None:
        return f"{name}, the default" if name == "numpy" else f"{name}, chosen by tinyft.use"
    if requested == "auto" and name != "strict":         # auto chooses cupy or numpy; only tinyft.use chooses strict
        works = "works" if name == "cupy" else "does not work here"
        return f"{name}, by TINYFT_BACKEND=auto: CuPy {works}"
    if name == requested:
        return f"{name}, by TINYFT_BACKEND"
    return f"{name}, chosen by tinyft.use (TINYFT_BACKEND is {requested})"
