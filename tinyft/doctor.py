"""What this machine has, and what would help: `tinyft doctor`.

    lines, errors = examine()        lines: (what, what was found);   errors: sentences, each with the command that mends it

An error is what stands in the way of something asked for: a backend named by TINYFT_BACKEND, a CuPy that is installed.  A machine without a
GPU, and without CuPy, is a healthy one.
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


def examine() -> tuple[list[tuple[str, str]], list[str]]:
    "Look at everything once.  Nothing is raised: what is wrong comes back as a sentence."
    from . import __version__
    lines = [("tinyft", __version__), ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"), ("NumPy", _numpy()),
             ("kernels", _kernels())]
    errors: list[str] = []
    _cupy(lines, errors)
    lines.append(("backend", _backend(errors)))
    lines += [("lessons", f"{'Hypothesis is there' if find_spec('hypothesis') else 'Hypothesis is missing: pip install tinyft[lessons]'}, "
                          f"{'Matplotlib is there' if find_spec('matplotlib') else 'no Matplotlib, so no figures'}"),
              ("screen", f"{shutil.get_terminal_size().columns} columns, {getattr(sys.stdout, 'encoding', None)}")]
    return lines, errors


def wheels() -> dict[str, str]:
    "CuPy as pip knows it: {distribution: version}.  All of them write into one folder, so that two are one too many."
    found = ((d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions())
    return {name: version for name, version in sorted(found) if re.fullmatch(r"cupy([-_](cuda|rocm).*)?", name)}


def _numpy() -> str:
    about = [f"{lib.internal_api} {lib.version or ''}".strip() + f" ({getattr(lib, 'architecture', None) or 'architecture not known'})"
             for lib in system.libraries()]
    n = kernels.get_num_threads()
    return f"{np.__version__}, BLAS {' and '.join(about) or 'of the system, whose threads cannot be set'}, {n} thread{'s' * (n != 1)}"


def _kernels() -> str:
    names = [name for name, f in OPS.items() if dispatch.find(f, np.ndarray)]
    return f"of NumPy: {', '.join(sorted(names))}" if names else "off (TINYFT_KERNELS): every op is its definition"


def _cupy(lines: list, errors: list) -> None:
    "CuPy, the driver and the device."
    have, reason = wheels(), array.why_no_cupy()
    named = ", ".join(f"{name} {version}" for name, version in have.items())
    lines.append(("CuPy", f"{named or 'there'}{', works' if reason is None else ', does not work' if have else ': no'}"))
    if len(have) > 1:
        newest = "13" if any("cuda13" in name for name in have) else "12"
        errors.append(f"{len(have)} packages of CuPy write into one folder: pip uninstall -y {' '.join(have)}, "
                      f'then pip install "{array.EXTRA}{newest}]"')
    if reason is None:
        d, gib = array.about_device(), lambda n: f"{n / 2**30:.1f}"
        lines += [("driver", f"CUDA {d['driver']}; CuPy's runtime is of {d['runtime']}"),
                  ("device", f"{d['name']}, compute capability {d['capability']}, {d['multiprocessors']} multiprocessors; "
                             f"{gib(d['free'])} of {gib(d['total'])} GiB free")]
    elif have:
        errors.append(reason)
    else:
        lines[-1] = ("CuPy", reason)


def _backend(errors: list) -> str:
    "The backend in use and why."
    asked = os.environ.get("TINYFT_BACKEND")
    try:
        name = array.backend()
    except array.BackendError as e:
        if not any(known in str(e) for known in errors):
            errors.append(str(e))
        return f"none: TINYFT_BACKEND={asked} cannot be used"
    if asked is None:
        return f"{name}, the default" if name == "numpy" else f"{name}, chosen by tinyft.use"
    if asked == "auto" and name != "strict":
        return f"{name}, by TINYFT_BACKEND=auto: CuPy {'works' if name == 'cupy' else 'does not work here'}"
    return f"{name}, by TINYFT_BACKEND" if name == asked else f"{name}, chosen by tinyft.use (TINYFT_BACKEND is {asked})"
