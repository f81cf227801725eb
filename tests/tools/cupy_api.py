"""Write a list of CuPy's names and signatures, for `tinyft/strict.py` and `xpcheck.py`. Needs CuPy, but no GPU.

    pip install cupy-cuda13x
    python tests/tools/cupy_api.py            writes tinyft/cupy_api.json
    python tests/tools/cupy_api.py --check    compares instead; exit status 1 and the differences if it is out of date

Everything is read by introspection: `inspect.signature` for Python functions, the first line of the docstring
for compiled functions (Cython embeds the signature there). A signature is stored as its parameter names with
Python's own stars:
"tup axis out * dtype casting", "subscripts *operands dtype optimize", "array pad_width mode **kwargs".
"""
from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

TARGET = Path(__file__).resolve().parents[2] / "tinyft" / "cupy_api.json"
DEVICE_ONLY = ("get", "set")                               # array methods without a counterpart in NumPy
REDUCING_UFUNCS = ("cupy_add", "cupy_multiply")            # the only ufuncs with .reduce and .accumulate
BROKEN = {"packbits": "axis", "unpackbits": "axis"}        # in the signature, but raises NotImplementedError


def signature(f: Callable) -> str:
    """The parameter names of a callable, with stars; "*args **kwargs" if the signature is unknown."""
    try:
        return _stars(inspect.signature(f))
    except (ValueError, TypeError):
        known = _from_docstring(f)
        return "*args **kwargs" if known is None else known


def _stars(sig: inspect.Signature) -> str:
    """The parameter names of a signature, with stars, without `self`."""
    words = []
    for p in sig.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        words.append(stars + p.name)
    return " ".join(word for word in words if word != "self")


def _from_docstring(f: Callable) -> str | None:
    """Cython's embedded signature: "ndarray.sum(self, axis=None, dtype=None, out=None, keepdims=False) -> ndarray"."""
    doc = (f.__doc__ or "").strip().strip('"').replace("\\", "")
    found = re.match(r"[\w.]+\((.*?)\)(?:\s*->.*)?(?:\n|$)", doc, re.DOTALL)
    if not found:
        return None
    inside = re.sub(r"\([^()]*\)", "", found.group(1))
    parameters = [parameter for parameter in inside.split(",") if parameter.strip()]
    names = [parameter.split("=")[0].split(":")[0].split()[-1] for parameter in parameters]
    return " ".join(name for name in names if name not in ("self", "/"))


def _function(name: str, f: Callable) -> str:
    """The signature of one function."""
    from cupy._core._gufuncs import _GUFunc
    if isinstance(f, _GUFunc):                             # matmul has the keywords of every generalised ufunc
        positional = (_from_docstring(f) or "").replace("**kwargs", "").strip()
        keywords = _stars(inspect.signature(_GUFunc.__call__)).split()
        keywords = [keyword for keyword in keywords if keyword[0] != "*" and keyword != "out"]
        return f"{positional} * {' '.join(keywords)}"
    words = signature(f)
    if "*args" in words or "*operands" in words:           # the docstring of einsum(*operands, **kwargs) has the names
        words = _from_docstring(f) or words
    return " ".join(word for word in words.split() if word != BROKEN.get(name))


def describe() -> dict:
    """CuPy's names by kind. All `ufuncs` take the keywords of "ufunc"; `other` are classes and constants."""
    import cupy
    api = {"version": cupy.__version__, "ufunc": "out casting dtype", "at": [], "reduce": [],
           "functions": {}, "methods": {}, "ufuncs": [], "other": [], "properties": []}
    for prefix, module in {"": cupy, "linalg.": cupy.linalg, "lib.stride_tricks.": cupy.lib.stride_tricks}.items():
        for name in sorted(vars(module)):
            value = getattr(module, name)
            if name.startswith("_") or name == "annotations" or inspect.ismodule(value):
                continue
            if isinstance(value, cupy.ufunc):
                api["ufuncs"].append(name)
                if value._scatter_op is not None or value.name == "cupy_subtract":
                    api["at"].append(name)
                if value.name in REDUCING_UFUNCS:
                    api["reduce"].append(name)
            elif callable(value) and not inspect.isclass(value):
                api["functions"][prefix + name] = _function(name, value)
            else:
                api["other"].append(prefix + name)
    for name in sorted(dir(cupy.ndarray)):
        value = getattr(cupy.ndarray, name)
        if name.startswith("_") or not (hasattr(np.ndarray, name) or name in DEVICE_ONLY):
            continue
        if callable(value):
            api["methods"][name] = signature(value)
        else:
            api["properties"].append(name)
    return {k: " ".join(v) if isinstance(v, list) else v for k, v in api.items()}


def main() -> int:
    """The command. Returns the exit status."""
    text = json.dumps(describe(), indent=0) + "\n"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    stored = TARGET.read_text(encoding="utf-8").splitlines()
    current = text.splitlines()
    for line in sorted(set(stored) ^ set(current)):
        print("-" if line in stored else "+", line)
    return stored != current


if __name__ == "__main__":
    sys.exit(main())
