"""Write down what CuPy offers, for `tinyft/strict.py` and `xpcheck.py`.  Needs CuPy, but no GPU.

    pip install cupy-cuda13x
    python tests/tools/cupy_api.py            writes tinyft/cupy_api.json
    python tests/tools/cupy_api.py --check    compares instead; exit status 1 and the differences if it is out of date

Everything is read by introspection: `inspect.signature` for what is written in Python, the first line of the docstring for what
is compiled (Cython embeds the signature there).  A signature is kept as its parameter names with Python's own stars:
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
DEVICE_ONLY = ("get", "set")                        # array methods that NumPy has no counterpart of
REDUCING_UFUNCS = ("cupy_add", "cupy_multiply")     # the only ones whose .reduce and .accumulate are implemented
BROKEN = {"packbits": "axis", "unpackbits": "axis"}     # in the signature, but raises NotImplementedError


def signature(f: Callable) -> str:
    """The parameter names of a callable, stars included; "*args **kwargs" where nothing is known."""
    try:
        return _stars(inspect.signature(f))
    except (ValueError, TypeError):
        known = _from_docstring(f)
        return "*args **kwargs" if known is None else known


def _stars(sig: inspect.Signature) -> str:
    words = []
    for p in sig.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not any(w.startswith("*") for w in words):
            words.append("*")
        words.append({p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name)
    return " ".join(w for w in words if w != "self")


def _from_docstring(f: Callable) -> str | None:
    """Cython's embedded signature: "ndarray.sum(self, axis=None, dtype=None, out=None, keepdims=False) -> ndarray"."""
    doc = (f.__doc__ or "").strip().strip('"').replace("\\", "")
    found = re.match(r"[\w.]+\((.*?)\)(?:\s*->.*)?(?:\n|$)", doc, re.DOTALL)
    if not found:
        return None
    inside = re.sub(r"\([^()]*\)", "", found.group(1))
    words = [w.split("=")[0].split(":")[0].split()[-1] for w in inside.split(",") if w.strip()]
    return " ".join(w for w in words if w not in ("self", "/"))


def _function(name: str, f: Callable) -> str:
    from cupy._core._gufuncs import _GUFunc
    if isinstance(f, _GUFunc):                                  # matmul: the keywords are those of every generalised ufunc
        keywords = _stars(inspect.signature(_GUFunc.__call__)).split()
        return (_from_docstring(f) or "").replace("**kwargs", "").strip() + " * " + " ".join(k for k in keywords if k[0] != "*" and k != "out")
    words = signature(f)
    if "*args" in words or "*operands" in words:                # def einsum(*operands, **kwargs): its docstring knows more
        words = _from_docstring(f) or words
    return " ".join(w for w in words.split() if w != BROKEN.get(name))


def describe() -> dict:
    """CuPy's names by kind. `ufuncs` all take the keywords of "ufunc"; `other` are classes and constants."""
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
    text = json.dumps(describe(), indent=0) + "\n"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    stored, fresh = TARGET.read_text(encoding="utf-8").splitlines(), text.splitlines()
    for line in sorted(set(stored) ^ set(fresh)):
        print("-" if line in stored else "+", line)
    return stored != fresh


if __name__ == "__main__":
    sys.exit(main())
