"""A strict double of CuPy: NumPy underneath, CuPy's rules on top.  It is the backend `strict`, and it exists for the tests.

A library tested on NumPy alone fails on its first GPU. `xp` stands in for the module `cupy`, `Array` for `cupy.ndarray`: they
offer only the names, keywords and methods CuPy has (cupy_api.json, read off CuPy by tests/tools/cupy_api.py) and refuse what CuPy
refuses, above all silent copies between host and device. Where CuPy is silent but slow or undefined, the double is stricter: NumPy
functions on device arrays, NumPy arrays as indices, repeated or out-of-range indices, memory read before it was written.

`counts` tells what code costs on a device (clear it first): 'call' = operations started; 'launch' = those that are more than a view, about a
kernel each; 'bytes' = what these read and wrote, each argument once; 'sync' = times the host waits for the device, and 'sync <what>' for each
cause; 'h2d' = copies from host to device (xp.asarray(host), a list as an index).
"""
from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

API = {k: v.split() if k in ("at", "reduce", "ufuncs", "other", "properties") else v
       for k, v in json.loads(Path(__file__).with_name("cupy_api.json").read_text(encoding="utf-8")).items()}
counts: Counter[str] = Counter()
CUPY = f"CuPy {API['version']}"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = "?bBhHiIlLqQefdFD"                         # the dtypes CuPy has (as characters), besides bfloat16
SCALARS = (bool, int, float, complex, np.generic)
PLAIN = (*SCALARS, str, type, np.dtype, slice, type(None), type(...))       # no arrays, yet welcome as arguments
AT_DTYPES = {"add": "iIlLqQefd", "subtract": "iI", "maximum": "iIlLqQfd", "minimum": "iIlLqQfd"}    # of ufunc.at; others: integers
SYNCS = {"nonzero": 1, "flatnonzero": 1, "argwhere": 1, "unique": 1, "unique_values": 1, "compress": 1, "extract": 1,
         "argpartition": 2, "bincount": 2, "tril_indices": 2, "triu_indices": 2}
NO_BFLOAT16 = {"where", "clip", "round", "around", "var", "std", "cumsum", "einsum"}    # CuPy fails or gives another dtype
CREATING = ("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray")
AS_ARRAYS = {"allclose", "array_equal", "array_equiv", "count_nonzero"}                 # NumPy gives Python numbers, CuPy arrays
# Parameters whose numbers the host must know: they may be lists, never device arrays.
HOST_PARAMETERS = {
    "shape", "newshape", "new_shape", "dims", "dimensions", "window_shape", "strides", "axis", "axes", "axis1", "axis2", "source",
    "destination", "start", "stop", "step", "num", "N", "M", "n", "k", "offset", "repeats", "reps", "shift", "pad_width",
    "indices_or_sections", "kth", "decimals", "ddof", "keepdims", "dtype", "order", "kind"}


class StrictError(TypeError):
    """Code that would fail on a GPU, or be undefined or needlessly slow there."""


def _sync(what: str, times: int = 1) -> None:
    counts["sync"] += times
    counts["sync " + what] += times


# ---- one operation: check the call, unwrap the arguments, run NumPy, wrap the result

@cache
def _parse(signature: str) -> tuple[list[str], list[str], str, bool]:
    """Of a signature as cupy_api.json writes it: the positional parameters, all of them, the name of *args, is there **kwargs?"""
    words = signature.split()
    stars = [w for w in words if w[0] == "*"]
    positional = words[:words.index(stars[0])] if stars else words
    return positional, words, next((w[1:] for w in stars if w[1:2] not in ("", "*")), ""), any(w[:2] == "**" for w in stars)


def _bind(where: str, signature: str, args: tuple, kwargs: dict) -> list[str]:
    """The parameter each argument goes to, or StrictError where CuPy takes no such argument."""
    positional, known, variadic, any_keyword = _parse(signature)
    extra = len(args) - len(positional)
    if extra > 0 and not variadic:
        raise StrictError(f"{where}() takes {len(positional)} positional arguments in {CUPY}, not {len(args)}")
    unknown = [k for k in kwargs if k not in known]
    if unknown and not any_keyword:
        raise StrictError(f"{where}() has no argument {unknown[0]!r} in {CUPY}, which knows: {signature or 'none'}")
    return [*positional[:len(args)], *[variadic] * extra, *kwargs]


def _unwrap(where: str, name: str, value: Any, seen: dict[int, Array]) -> Any:
    """The NumPy value behind an argument. `seen` collects the device arrays, by the identity of what is behind them."""
    if isinstance(value, Array):
        if name in HOST_PARAMETERS:
            raise StrictError(f"{where}: {name} must be plain numbers; for a device array the host would have to wait")
        seen[id(value._a)] = value
        return value._a
    if isinstance(value, (list, tuple)):
        inner = [_unwrap(where, name, v, seen) for v in value]
        free = name in HOST_PARAMETERS or name in ("args", "operands") or not inner
        if not free and not any(isinstance(v, (np.ndarray, list, tuple)) for v in inner):
            raise StrictError(f"{where}: {name} is a {type(value).__name__} of host values where device arrays are needed")
        return type(value)(inner)
    if not isinstance(value, PLAIN):
        raise StrictError(f"{where}: a {type(value).__name__} where a device array is needed; host data move once, with xp.asarray")
    return value


def _wrap(result: Any, seen: dict[int, Array]) -> Any:
    """Device arrays for NumPy's results. Scalars become 0-d arrays; what was an argument (out=, +=, copy=False) stays itself."""
    if isinstance(result, np.ndarray):
        return seen[id(result)] if id(result) in seen else Array(result)
    if isinstance(result, np.generic):
        return Array(np.asarray(result))
    if isinstance(result, (list, tuple)):
        return (list if isinstance(result, list) else tuple)(_wrap(r, seen) for r in result)
    return result


def _run(where: str, f: Callable, signature: str, /, *args: Any, **kwargs: Any) -> Any:
    """f(*args, **kwargs) under CuPy's rules, where f is NumPy's function and the signature CuPy's."""
    seen: dict[int, Array] = {}
    values = [_unwrap(where, n, v, seen) for n, v in zip(_bind(where, signature, args, kwargs), (*args, *kwargs.values()))]
    short = where.rpartition(".")[2]
    counts["call"] += 1
    if short in SYNCS or (short == "where" and len(args) == 1):
        _sync(short, SYNCS.get(short, 1))
    halves = [a for a in seen.values() if a.dtype == BFLOAT16]
    if halves and (short in NO_BFLOAT16 or (short == "matmul" and any(a.ndim > 2 for a in seen.values()))):
        raise StrictError(f"{where}: {CUPY} fails here with bfloat16, or changes the dtype; compute in float32")
    with np.errstate(all="ignore"):                 # a device raises no floating-point errors
        result = f(*values[:len(args)], **dict(zip(kwargs, values[len(args):])))
    if short in ("matmul", "dot", "tensordot") and len(halves) == len(seen) > 0 and result.dtype != BFLOAT16:
        result = np.asarray(result, dtype=BFLOAT16)             # NumPy widens this product to float32, CuPy does not
    _note_launch(short, result, seen)
    return _wrap(np.asarray(result) if short in AS_ARRAYS else result, seen)


def _note_launch(short: str, result: Any, seen: dict[int, Array]) -> None:
    """Count what more than makes a view: its arguments are read, its result is written."""
    made = [r for r in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(r, (np.ndarray, np.generic))]
    shares = lambda r: isinstance(r, np.ndarray) and any(np.may_share_memory(r, a._a) for a in seen.values())
    if any(shares(r) and (id(r) not in seen or short in CREATING) for r in made):
        return
    counts["launch"] += 1
    counts["bytes"] += sum(a._a.nbytes for a in seen.values()) + sum(r.nbytes for r in made)


# ---- the array

def _index(where: str, i: Any) -> tuple:
    """An index as NumPy takes it; host arrays are refused, lists (copied at every use) and masks (waited for) counted."""
    parts = i if isinstance(i, tuple) else (i,)
    for part in parts:
        if isinstance(part, np.ndarray):
            raise StrictError(f"{where}: a NumPy array as index is copied to the device at every use; move it once, with xp.asarray")
        if isinstance(part, Array) and part.dtype == bool:
            _sync(where + " with a mask")
        counts["h2d"] += isinstance(part, (list, tuple, range))
    return tuple(p._a if isinstance(p, Array) else p for p in parts)


class Array:
    """A device array that lives in host memory. Made by `xp.asarray(host)` and the other creating functions, never directly."""

    __slots__ = ("__weakref__", "_a")
    __array_ufunc__ = None                          # NumPy's ufuncs and operators leave device arrays alone
    __array_priority__ = 100
    __hash__ = None                                 # type: ignore[assignment]
    device = "strict"

    def __init__(self, a: np.ndarray) -> None:
        if not isinstance(a, np.ndarray):
            raise StrictError(f"a device array is made by xp.asarray or xp.empty, not from {type(a).__name__}")
        if a.dtype.char not in DTYPES and a.dtype != BFLOAT16:
            raise StrictError(f"{CUPY} has no arrays of dtype {a.dtype}")
        self._a = a

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise StrictError("Implicit conversion to a NumPy array is not allowed. Use xp.asnumpy(x), and only where waiting is meant.")

    def __array_function__(self, func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        raise StrictError(f"np.{func.__name__} called on a device array; call {func.__name__} of the array's own module")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"cupy.ndarray has no attribute {name!r}, or its strict double does not offer it")

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Iterator[Array]:
        return (Array(np.asarray(row)) for row in self._a)

    def __repr__(self) -> str:
        _sync("print")
        return f"strict.{self._a!r}"

    def __getitem__(self, i: Any) -> Array:
        index = _index("x[...]", i)
        if all(isinstance(p, (int, np.integer, slice, type(None))) for p in index):
            index = (*index, ...)                   # also a single number is a view on a device, not a scalar
        return _wrap(self._a[index], {})

    def __setitem__(self, i: Any, value: Any) -> None:
        if not isinstance(value, (Array, *SCALARS)):
            raise StrictError(f"x[i] = v: v must be a device array or a scalar, not {type(value).__name__}")
        index = _index("x[i] = v", i)
        counts["call"] += 1
        counts["launch"] += 1
        counts["bytes"] += 2 * value._a.nbytes if isinstance(value, Array) else 0
        if isinstance(value, Array) and value.size > 1 and any(isinstance(p, (np.ndarray, list, tuple, range)) for p in index):
            written = np.arange(self.size).reshape(self.shape)[index]
            if np.unique(written).size < written.size:
                raise StrictError("x[i] = v with repeated indices: which value wins is undefined on a GPU (xp.add.at sums them)")
        self._a[index] = value._a if isinstance(value, Array) else value

    def __deepcopy__(self, memo: dict | None = None) -> Array:
        return Array(self._a.copy())

    __copy__ = __deepcopy__

    def get(self, stream: None = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:
        """A host copy, in `out` if given. The host waits for it."""
        _sync("get")
        if out is None:
            return np.array(self._a, order=order)   # type: ignore[call-overload]
        np.copyto(out, self._a, casting="no")
        return out

    @property
    def data(self) -> SimpleNamespace:
        """Where it lies, as an address: for comparing, not for reading."""
        return SimpleNamespace(ptr=self._a.ctypes.data)

    @property
    def flags(self) -> SimpleNamespace:
        """What CuPy keeps of NumPy's flags; there is no `writeable`."""
        return SimpleNamespace(**{n: getattr(self._a.flags, n) for n in ("c_contiguous", "f_contiguous", "owndata", "forc", "fnc")})


def _binary(name: str, f: Callable, reflected: bool = False) -> Callable:
    def method(self: Array, other: Any) -> Any:
        if not isinstance(other, (Array, *SCALARS)):
            if getattr(other, "__array_ufunc__", 0) is None or getattr(other, "__array_priority__", 0) > Array.__array_priority__:
                return NotImplemented               # a class that asks for it gets its own operator called, as in NumPy and CuPy
            raise StrictError(f"{name}: a device array and a {type(other).__name__}; CuPy takes device arrays and scalars only")
        return _run(name, f, "x1 x2", *((other, self) if reflected else (self, other)))
    return method


def _waiting(name: str, f: Callable) -> Callable:
    def method(self: Array, *args: Any) -> Any:
        _bind("x." + name, API["methods"].get(name, "format"), args, {})
        _sync(name)
        return f(self._a, *args)
    return method


def _method(name: str, signature: str) -> Callable:
    f = getattr(np.ndarray, name)
    return lambda self, *args, **kwargs: _run("x." + name, f, "self " + signature, self, *args, **kwargs)


def _complete_array() -> None:
    """Gives Array the operators, conversions, methods and properties that CuPy's arrays have."""
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"):
        f = getattr(operator, f"__{name}__")
        setattr(Array, f"__{name}__", _binary(name, f))
        setattr(Array, f"__r{name}__", _binary(name, f, reflected=True))
        if name != "matmul":                        # CuPy has no in-place matmul: a @= b makes a new array
            setattr(Array, f"__i{name}__", _binary(name, getattr(operator, f"__i{name}__")))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Array, f"__{name}__", _binary(name, getattr(operator, name)))
    for name in ("neg", "pos", "abs", "invert"):
        setattr(Array, f"__{name}__", lambda self, name=name: _run(name, getattr(operator, name), "x", self))
    for kind in (bool, int, float, complex):
        setattr(Array, f"__{kind.__name__}__", _waiting(kind.__name__, kind))
    Array.__format__ = _waiting("format", lambda a, spec: format(a.item(), spec) if a.ndim == 0 else format(a, spec))  # type: ignore
    for name in ("item", "tolist", "tobytes"):
        setattr(Array, name, _waiting(name, getattr(np.ndarray, name)))
    for name, signature in API["methods"].items():
        if name not in vars(Array) and name not in ("set", "dump", "dumps", "tofile", "choose"):
            setattr(Array, name, _method(name, signature))
    for name in API["properties"]:
        if name not in vars(Array) and name != "flat":
            setattr(Array, name, property(lambda self, name=name: _wrap(getattr(self._a, name), {})))


_complete_array()


# ---- the module

class Ufunc:
    """A ufunc with the keywords and the methods that CuPy's has."""

    def __init__(self, name: str) -> None:
        self.__name__, self._f = name, getattr(np, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(a is None or isinstance(a, (list, tuple, str)) for a in args[:self._f.nin]):
            raise StrictError(f"xp.{self.__name__}: operands must be device arrays or scalars")
        return _run("xp." + self.__name__, self._f, "x1 x2 "[:3 * self._f.nin] + API["ufunc"], *args, **kwargs)

    def __getattr__(self, method: str) -> Callable:
        """reduce and accumulate, for the two ufuncs that have them in CuPy."""
        if method not in ("reduce", "accumulate") or self.__name__ not in API["reduce"]:
            raise AttributeError(f"cupy.{self.__name__}.{method} is not implemented in {CUPY}")
        return partial(_run, f"xp.{self.__name__}.{method}", getattr(self._f, method), "array axis dtype out keepdims")

    def at(self, a: Array, indices: Any, b: Any) -> None:
        """a[indices] op= b that is right with repeated indices, for the ufuncs and dtypes CuPy has atomic operations for."""
        where = f"xp.{self.__name__}.at"
        if self.__name__ not in API["at"] or not isinstance(a, Array) or a.dtype.char not in AT_DTYPES.get(self.__name__, "iIlLqQ"):
            raise StrictError(f"{where} does not take {a.dtype if isinstance(a, Array) else type(a).__name__} in {CUPY}")
        index = _index(where, indices)
        _run(where, lambda x, y: self._f.at(x, index, y), "a b", a, b)


def _empty(shape: Any, dtype: Any = float, order: str = "C") -> Array:
    """Poisoned, so that it shows when something is read before it was written: NaN, or the greatest integer."""
    poison = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else np.nan
    return _run("xp.empty", np.full, API["functions"]["full"], shape, poison, dtype, order)


def _empty_like(prototype: Array, dtype: Any = None, order: str = "C", subok: None = None, shape: Any = None) -> Array:
    like = _run("xp.empty_like", np.empty_like, API["functions"]["empty_like"], prototype, dtype, "K", False, shape)
    return _empty(like.shape, like.dtype)


def _asnumpy(a: Any, stream: None = None, order: str = "C", out: np.ndarray | None = None, *, blocking: bool = True) -> np.ndarray:
    return a.get(stream, order, out, blocking) if isinstance(a, Array) else np.asarray(a)


def _creating(name: str) -> Callable:
    """xp.asarray and its kin: the only functions that take host data, and each time they do is counted."""
    def create(a: Any, *args: Any, **kwargs: Any) -> Array:
        if not any(isinstance(p, Array) for p in (a if isinstance(a, (list, tuple)) else (a,))):
            counts["h2d"] += 1
            a = Array(np.array(a))
        return _run("xp." + name, getattr(np, name), API["functions"][name], a, *args, **kwargs)
    return create


class _Module(ModuleType):
    """The names of `cupy` (prefix '') or of one of its submodules, each made when first asked for."""

    def __init__(self, prefix: str, numpy: Any) -> None:
        super().__init__("strict" + "." * bool(prefix) + prefix.rstrip("."))
        self._prefix, self._numpy = prefix, numpy

    def __getattr__(self, name: str) -> Any:
        full, f = self._prefix + name, getattr(self._numpy, name, None)
        value = None
        if full in API["functions"] or full in API["ufuncs"]:
            value = Ufunc(name) if isinstance(f, np.ufunc) else f and partial(_run, "xp." + full, f, API["functions"].get(full, "x"))
        elif full in API["other"]:
            offered = (np.generic, np.dtype, np.finfo, np.iinfo, np.linalg.LinAlgError)
            value = f if isinstance(f, float) or (isinstance(f, type) and issubclass(f, offered)) else None
        elif any(n.startswith(full + ".") for n in API["functions"]):
            value = _Module(full + ".", f)
        else:
            raise AttributeError(f"cupy has no {full}" + "; random numbers are drawn on the host" * full.startswith("random"))
        if value is None:
            raise AttributeError(f"cupy.{full} exists, but its strict double does not offer it")
        setattr(self, name, value)
        return value


xp: Any = _Module("", np)
vars(xp).update(ndarray=Array, newaxis=None, empty=_empty, empty_like=_empty_like, asnumpy=_asnumpy)
vars(xp).update({name: _creating(name) for name in CREATING})
