"""A strict stand-in for CuPy: NumPy underneath, CuPy's rules on top. It is the backend `strict`, used by the tests.

A library tested on NumPy alone fails on its first GPU. `xp` stands for the module `cupy`, `Array` for `cupy.ndarray`.
They offer only the names, keywords and methods of CuPy (cupy_api.json, which tests/tools/cupy_api.py reads from CuPy).
They refuse what CuPy refuses, above all silent copies between host and device. Where CuPy is silent but slow or
undefined, the stand-in is stricter: it refuses NumPy functions on device arrays, NumPy arrays as indices, repeated or
out-of-range indices. It fills new memory with NaN, so that a read before the first write shows.

`counts` gives the cost of code on a device; clear it first.

    call    operations started
    launch  operations that make more than a view: about one kernel each
    bytes   the bytes that the launched operations read and write: each argument once, plus each result. An array given
            as out= is an argument and a result
    sync    the times the host waits for the device; `sync <cause>` for each cause
    h2d     copies from host to device (xp.asarray(host), a list as an index)
"""
from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


def _read_api() -> dict[str, Any]:
    """cupy_api.json: lists of names are stored as one string with spaces."""
    text = Path(__file__).with_name("cupy_api.json").read_text(encoding="utf-8")
    api = json.loads(text)
    for key in ("at", "reduce", "ufuncs", "other", "properties"):
        api[key] = api[key].split()
    return api


API = _read_api()
counts: Counter[str] = Counter()
CUPY = f"CuPy {API['version']}"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = "?bBhHiIlLqQefdFD"                                # CuPy's dtypes, as characters, besides bfloat16
SCALARS = (bool, int, float, complex, np.generic)
PLAIN = (*SCALARS, str, type, np.dtype, slice, type(None), type(...))        # host values that may be arguments
# The dtypes that ufunc.at takes; other ufuncs take integers.
AT_DTYPES = {"add": "iIlLqQefd", "subtract": "iI", "maximum": "iIlLqQfd", "minimum": "iIlLqQfd"}
AT_INTEGERS = "iIlLqQ"
# The number of times the host waits in each function.
SYNCS = {
    "nonzero": 1, "flatnonzero": 1, "argwhere": 1, "unique": 1, "unique_values": 1, "compress": 1, "extract": 1,
    "argpartition": 2, "bincount": 2, "tril_indices": 2, "triu_indices": 2,
}
# CuPy fails with bfloat16 in these functions, or returns another dtype.
NO_BFLOAT16 = {"where", "clip", "round", "around", "var", "std", "cumsum", "einsum"}
CREATING = ("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray")
# NumPy returns Python numbers from these functions, CuPy returns arrays.
AS_ARRAYS = {"allclose", "array_equal", "array_equiv", "count_nonzero"}
# Parameters whose values the host must know: they may be lists, never device arrays.
HOST_PARAMETERS = {
    "shape", "newshape", "new_shape", "dims", "dimensions", "window_shape", "strides", "axis", "axes", "axis1", "axis2",
    "source", "destination", "start", "stop", "step", "num", "N", "M", "n", "k", "offset", "repeats", "reps", "shift",
    "pad_width", "indices_or_sections", "kth", "decimals", "ddof", "keepdims", "dtype", "order", "kind",
}


class StrictError(TypeError):
    """Code that would fail on a GPU, or be undefined or needlessly slow there."""


def _sync(cause: str, times: int = 1) -> None:
    """Count that the host waits for the device."""
    counts["sync"] += times
    counts["sync " + cause] += times


# ── one operation: check the call, unwrap the arguments, run NumPy, wrap the result ──────────────────────────────────
class Signature(NamedTuple):
    """The parameters of a function of CuPy."""
    positional: list[str]                                  # names of the parameters before any star
    words: list[str]                                       # names of all parameters, and the stars
    variadic: str                                          # the name of *args; empty without it
    any_keyword: bool                                      # True with **kwargs


@cache
def _parse(signature: str) -> Signature:
    """The signature in a string of cupy_api.json: names, "*name" for *args, "**name" for **kwargs, "*" before
    keyword-only names. For example "tup axis out * dtype casting".
    """
    words = signature.split()
    stars = [word for word in words if word.startswith("*")]
    positional = words[:words.index(stars[0])] if stars else words
    variadic = [word[1:] for word in stars if word != "*" and not word.startswith("**")]
    any_keyword = any(word.startswith("**") for word in stars)
    return Signature(positional, words, variadic[0] if variadic else "", any_keyword)


@cache
def _bind(call: str, signature: str, count: int, keywords: tuple[str, ...]) -> list[str]:
    """For each argument, `count` positional ones first, the name of its parameter.

    StrictError if CuPy lacks the parameter."""
    known = _parse(signature)
    extra = count - len(known.positional)
    if extra > 0 and not known.variadic:
        raise StrictError(f"{call}() takes {len(known.positional)} positional arguments in {CUPY}, not {count}")
    unknown = [name for name in keywords if name not in known.words]
    if unknown and not known.any_keyword:
        raise StrictError(f"{call}() has no argument {unknown[0]!r} in {CUPY}, which knows: {signature or 'none'}")
    return [*known.positional[:count], *[known.variadic] * extra, *keywords]


def _unwrap(call: str, name: str, value: Any, arrays: dict[int, Array]) -> Any:
    """The NumPy value of an argument for the parameter `name` of the function `call`.

    `arrays` collects the device arrays by the id of their NumPy arrays, for _wrap. StrictError for host data where CuPy
    wants device arrays, and the other way round."""
    if isinstance(value, Array):
        if name in HOST_PARAMETERS:
            raise StrictError(f"{call}: {name} must be plain numbers; for a device array the host would have to wait")
        arrays[id(value._a)] = value
        return value._a
    if isinstance(value, (list, tuple)):
        return _unwrap_sequence(call, name, value, arrays)
    if not isinstance(value, PLAIN):
        raise StrictError(f"{call} wants a device array, got a {type(value).__name__}; "
                          "host data move once, with xp.asarray")
    return value


def _unwrap_sequence(call: str, name: str, value: list | tuple, arrays: dict[int, Array]) -> list | tuple:
    """The NumPy values of a list or tuple that is the argument for the parameter `name`; see _unwrap.

    StrictError for a list of host values where CuPy wants device arrays."""
    inner = [_unwrap(call, name, v, arrays) for v in value]
    # `args` and `operands` are the *args of einsum, broadcast_shapes and others, which also take host values.
    takes_host_values = name in HOST_PARAMETERS or name in ("args", "operands") or not inner
    if not takes_host_values and not any(isinstance(v, (np.ndarray, list, tuple)) for v in inner):
        raise StrictError(f"{call}: {name} is a {type(value).__name__} of host values where device arrays are needed")
    return type(value)(inner)


def _wrap(result: Any, arrays: dict[int, Array]) -> Any:
    """Device arrays for NumPy's results. A scalar becomes a 0-d array.

    arrays: {id of a NumPy array: its device array}, of the arguments. A result that was an argument (out=, +=,
    copy=False) stays the same object.
    """
    if isinstance(result, np.ndarray):
        return arrays[id(result)] if id(result) in arrays else Array(result)
    if isinstance(result, np.generic):
        return Array(np.asarray(result))
    if isinstance(result, (list, tuple)):
        wrapped = [_wrap(r, arrays) for r in result]
        return wrapped if isinstance(result, list) else tuple(wrapped)
    return result


def _run(call: str, f: Callable, signature: str, /, *args: Any, **kwargs: Any) -> Any:
    """f(*args, **kwargs) under CuPy's rules: check the arguments, count the cost, return device arrays.

    call: the name for messages, such as "xp.matmul".  f: NumPy's function.  signature: CuPy's parameters, a string of
    cupy_api.json.  StrictError for a call that fails in CuPy."""
    arrays: dict[int, Array] = {}
    names = _bind(call, signature, len(args), tuple(kwargs))
    given = (*args, *kwargs.values())
    values = [_unwrap(call, name, value, arrays) for name, value in zip(names, given)]
    name = call.rpartition(".")[2]                         # without "xp." or "x."
    counts["call"] += 1
    if name == "where" and len(args) == 1:                 # where(mask) is nonzero(mask)
        _sync(name)
    elif name in SYNCS:
        _sync(name, SYNCS[name])
    half = [a for a in arrays.values() if a._a.dtype == BFLOAT16]
    is_batched_product = name == "matmul" and any(a._a.ndim > 2 for a in arrays.values())
    if half and (name in NO_BFLOAT16 or is_batched_product):
        raise StrictError(f"{call}: {CUPY} fails here with bfloat16, or changes the dtype; compute in float32")
    with np.errstate(all="ignore"):                        # a device raises no floating-point errors
        result = f(*values[:len(args)], **dict(zip(kwargs, values[len(args):])))
    is_half_product = name in ("matmul", "dot", "tensordot") and half and len(half) == len(arrays)
    if is_half_product and result.dtype != BFLOAT16:
        result = np.asarray(result, dtype=BFLOAT16)        # NumPy widens this product to float32, CuPy does not
    _count_launch(name, result, arrays)
    if name in AS_ARRAYS:
        result = np.asarray(result)
    return _wrap(result, arrays)


def _count_launch(name: str, result: Any, arrays: dict[int, Array]) -> None:
    """Count a launch of the function `name`, and the bytes that it reads and writes, unless its result is a view.

    arrays: {id of a NumPy array: its device array}, of the arguments. If a function returns an argument, it has written
    to it (out=...), so this is a launch. But xp.asarray and the like (CREATING) return their argument unchanged.
    """
    size = 0
    for r in result if isinstance(result, (list, tuple)) else (result,):
        if not isinstance(r, (np.ndarray, np.generic)):
            continue
        is_argument = id(r) in arrays and name not in CREATING             # such as out=...
        if not is_argument and _shares_memory(r, arrays):
            return
        size += r.nbytes
    for a in arrays.values():
        size += a._a.nbytes
    counts["launch"] += 1
    counts["bytes"] += size


def _shares_memory(result: np.ndarray | np.generic, arrays: dict[int, Array]) -> bool:
    """True if the result is, or may be, a view of an argument."""
    if not isinstance(result, np.ndarray):
        return False
    if result.base is None and id(result) not in arrays:   # new memory of its own: the usual case, so it is fast
        return False
    return any(np.may_share_memory(result, a._a) for a in arrays.values())


# ── the array ────────────────────────────────────────────────────────────────────────────────────────────────────────
LISTS = (list, tuple, range)


def _index(call: str, index: Any) -> tuple:
    """An index as NumPy takes it.

    Host arrays are refused. Lists (copied at every use) and masks (the host waits) are counted.
    """
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if isinstance(part, np.ndarray):
            raise StrictError(f"{call}: a NumPy array as index is copied to the device at every use; "
                              "move it once, with xp.asarray")
        if isinstance(part, Array) and part.dtype == bool:
            _sync(call + " with a mask")
        if isinstance(part, LISTS):
            counts["h2d"] += 1
    return tuple(part._a if isinstance(part, Array) else part for part in parts)


class Array:
    """A device array, kept in host memory. `xp.asarray(host)` and the other creating functions make it."""

    __slots__ = ("__weakref__", "_a")
    __array_ufunc__ = None                                 # NumPy's ufuncs and operators leave device arrays alone
    __array_priority__ = 100
    __hash__ = None                                        # type: ignore[assignment]
    device = "strict"

    def __init__(self, a: np.ndarray) -> None:
        if not isinstance(a, np.ndarray):
            raise StrictError(f"a device array is made by xp.asarray or xp.empty, not from {type(a).__name__}")
        if a.dtype.char not in DTYPES and a.dtype != BFLOAT16:
            raise StrictError(f"{CUPY} has no arrays of dtype {a.dtype}")
        self._a = a

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise StrictError("Implicit conversion to a NumPy array is not allowed. "
                          "Use xp.asnumpy(x), and only where waiting is meant.")

    def __array_function__(self, func: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        name = func.__name__
        raise StrictError(f"np.{name} called on a device array; call {name} of the array's own module")

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
        if all(isinstance(part, (int, np.integer, slice, type(None))) for part in index):
            index = (*index, ...)                          # one element is a view on a device, not a scalar
        return _wrap(self._a[index], {})

    def __setitem__(self, i: Any, value: Any) -> None:
        """x[i] = value, counted as one launch.  StrictError for host data, and for integer indices that repeat."""
        if not isinstance(value, (Array, *SCALARS)):
            raise StrictError(f"x[i] = v: v must be a device array or a scalar, not {type(value).__name__}")
        index = _index("x[i] = v", i)                          # as NumPy takes it
        counts["call"] += 1
        counts["launch"] += 1
        if not isinstance(value, Array):
            self._a[index] = value
            return
        counts["bytes"] += 2 * value._a.nbytes
        if value.size > 1 and any(isinstance(part, (np.ndarray, *LISTS)) for part in index):
            self._check_distinct(index)
        self._a[index] = value._a

    def _check_distinct(self, index: tuple) -> None:
        """StrictError if an assignment through this index writes to one element twice."""
        written = np.arange(self.size).reshape(self.shape)[index]
        if np.unique(written).size < written.size:
            raise StrictError("x[i] = v with repeated indices: the value that wins is undefined on a GPU "
                              "(xp.add.at sums them)")

    def __deepcopy__(self, memo: dict | None = None) -> Array:
        return Array(self._a.copy())

    __copy__ = __deepcopy__

    def get(self, stream: None = None, order: str = "C", out: np.ndarray | None = None,
            blocking: bool = True) -> np.ndarray:
        """A host copy, in `out` if given. The host waits for it."""
        _sync("get")
        if out is None:
            return np.array(self._a, order=order)          # type: ignore[call-overload]
        np.copyto(out, self._a, casting="no")
        return out

    @property
    def data(self) -> SimpleNamespace:
        """The address of the memory, as `.ptr`: for comparing, not for reading."""
        return SimpleNamespace(ptr=self._a.ctypes.data)

    @property
    def flags(self) -> SimpleNamespace:
        """The flags of NumPy that CuPy has; there is no `writeable`."""
        names = ("c_contiguous", "f_contiguous", "owndata", "forc", "fnc")
        return SimpleNamespace(**{name: getattr(self._a.flags, name) for name in names})


# ── the array's operators, conversions, methods and properties ───────────────────────────────────────────────────────
def _binary(name: str, f: Callable, reflected: bool = False) -> Callable:
    """The method of Array for an operator of two operands; `f` is the function of the `operator` module.

    reflected: the method is __radd__ or the like, and `self` is the right operand."""
    def method(self: Array, other: Any) -> Any:              # as CuPy: device arrays and scalars only
        if not isinstance(other, (Array, *SCALARS)):
            if _wants_own_operator(other):
                return NotImplemented
            raise StrictError(f"{name}: a device array and a {type(other).__name__}; "
                              "CuPy takes device arrays and scalars only")
        operands = (other, self) if reflected else (self, other)
        return _run(name, f, "x1 x2", *operands)
    return method


def _wants_own_operator(other: Any) -> bool:
    """True for an object that asks for its own operator to be called, as NumPy and CuPy do."""
    priority = getattr(other, "__array_priority__", 0)
    return getattr(other, "__array_ufunc__", 0) is None or priority > Array.__array_priority__


def _unary(name: str) -> Callable:
    """An operator of one operand."""
    def method(self: Array) -> Any:
        return _run(name, getattr(operator, name), "x", self)
    return method


def _waiting(name: str, f: Callable) -> Callable:
    """The method of Array for a conversion to a host value, such as float(x) or x.item(), for which the host waits.

    f: the same conversion of the NumPy array."""
    def method(self: Array, *args: Any) -> Any:
        _bind("x." + name, API["methods"].get(name, "format"), len(args), ())
        _sync(name)
        return f(self._a, *args)
    return method


def _method(name: str, signature: str) -> Callable:
    """The method of Array that runs NumPy's method `name`, with the parameters that CuPy's has (`signature`)."""
    f = getattr(np.ndarray, name)

    def method(self: Array, *args: Any, **kwargs: Any) -> Any:
        return _run("x." + name, f, "self " + signature, self, *args, **kwargs)
    return method


def _property(name: str) -> property:
    """A property of NumPy's arrays."""
    def value(self: Array) -> Any:
        found = getattr(self._a, name)                     # such as x.T, or x.shape
        return Array(found) if isinstance(found, np.ndarray) else found
    return property(value)


def _format(a: np.ndarray, spec: str) -> str:
    """The text of an array; a 0-d array is formatted as a number."""
    return format(a.item(), spec) if a.ndim == 0 else format(a, spec)


def _complete_array() -> None:
    """Give Array the operators, conversions, methods and properties of CuPy's arrays."""
    arithmetic = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
    bitwise = ("and", "or", "xor", "lshift", "rshift")
    for name in (*arithmetic, *bitwise):
        f = getattr(operator, f"__{name}__")
        setattr(Array, f"__{name}__", _binary(name, f))
        setattr(Array, f"__r{name}__", _binary(name, f, reflected=True))
        if name != "matmul":                               # CuPy has no in-place matmul: a @= b makes a new array
            setattr(Array, f"__i{name}__", _binary(name, getattr(operator, f"__i{name}__")))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Array, f"__{name}__", _binary(name, getattr(operator, name)))
    for name in ("neg", "pos", "abs", "invert"):
        setattr(Array, f"__{name}__", _unary(name))
    for kind in (bool, int, float, complex):
        setattr(Array, f"__{kind.__name__}__", _waiting(kind.__name__, kind))
    Array.__format__ = _waiting("format", _format)         # type: ignore[method-assign]
    for name in ("item", "tolist", "tobytes"):
        setattr(Array, name, _waiting(name, getattr(np.ndarray, name)))
    not_offered = ("set", "dump", "dumps", "tofile", "choose", "flat")
    for name, signature in API["methods"].items():
        if name not in vars(Array) and name not in not_offered:
            setattr(Array, name, _method(name, signature))
    for name in API["properties"]:
        if name not in vars(Array) and name not in not_offered:
            setattr(Array, name, _property(name))


_complete_array()


# ── the module ───────────────────────────────────────────────────────────────────────────────────────────────────────
class Ufunc:
    """A ufunc with the keywords and the methods that CuPy's ufunc has."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self._f = getattr(np, name)
        self._signature = " ".join(["x1", "x2"][:self._f.nin]) + " " + API["ufunc"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(a is None or isinstance(a, (list, tuple, str)) for a in args[:self._f.nin]):
            raise StrictError(f"xp.{self.__name__}: operands must be device arrays or scalars")
        return _run("xp." + self.__name__, self._f, self._signature, *args, **kwargs)

    def __getattr__(self, method: str) -> Callable:
        """`reduce` and `accumulate`, for the two ufuncs that have them in CuPy."""
        if method not in ("reduce", "accumulate") or self.__name__ not in API["reduce"]:
            raise AttributeError(f"cupy.{self.__name__}.{method} is not implemented in {CUPY}")
        call = f"xp.{self.__name__}.{method}"
        return partial(_run, call, getattr(self._f, method), "array axis dtype out keepdims")

    def at(self, a: Array, indices: Any, b: Any) -> None:
        """a[indices] op= b for this ufunc's op, where repeated indices all count.

        StrictError for ufuncs and dtypes that CuPy does not take."""
        call = f"xp.{self.__name__}.at"
        kind = a.dtype if isinstance(a, Array) else type(a).__name__
        dtypes = AT_DTYPES.get(self.__name__, AT_INTEGERS)
        if self.__name__ not in API["at"] or not isinstance(a, Array) or a.dtype.char not in dtypes:
            raise StrictError(f"{call} does not take {kind} in {CUPY}")
        index = _index(call, indices)

        def scatter(x: np.ndarray, y: Any) -> None:
            self._f.at(x, index, y)

        _run(call, scatter, "a b", a, b)


def _empty(shape: Any, dtype: Any = float, order: str = "C") -> Array:
    """An array of NaN, or of the greatest integer, so that a read before the first write shows."""
    poison = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else np.nan
    return _run("xp.empty", np.full, API["functions"]["full"], shape, poison, dtype, order)


def _empty_like(prototype: Array, dtype: Any = None, order: str = "C", subok: None = None, shape: Any = None) -> Array:
    """An array like `_empty`, with the shape and dtype of another one."""
    signature = API["functions"]["empty_like"]
    like = _run("xp.empty_like", np.empty_like, signature, prototype, dtype, "K", subok=False, shape=shape)
    return _empty(like.shape, like.dtype)


def _asnumpy(a: Any, stream: None = None, order: str = "C", out: np.ndarray | None = None, *,
             blocking: bool = True) -> np.ndarray:
    """A host copy of a device array; another value as a NumPy array."""
    return a.get(stream, order, out, blocking) if isinstance(a, Array) else np.asarray(a)


def _creating(name: str) -> Callable:
    """The function xp.<name>, for those that take host data (CREATING), such as xp.asarray.

    It counts each copy of host data to the device."""
    def create(a: Any, *args: Any, **kwargs: Any) -> Array:
        parts = a if isinstance(a, (list, tuple)) else (a,)
        if not any(isinstance(part, Array) for part in parts):         # a list of device arrays needs no copy
            counts["h2d"] += 1
            a = Array(np.array(a))
        return _run("xp." + name, getattr(np, name), API["functions"][name], a, *args, **kwargs)
    return create


class _Module(ModuleType):
    """The names of `cupy` (prefix "") or of one of its submodules. Each is made at its first use."""

    def __init__(self, prefix: str, numpy: Any) -> None:
        name = "strict." + prefix.rstrip(".") if prefix else "strict"
        super().__init__(name)
        self._prefix = prefix
        self._numpy = numpy

    def __getattr__(self, name: str) -> Any:
        full = self._prefix + name
        value = self._find(full, name, getattr(self._numpy, name, None))
        if value is None:
            raise AttributeError(f"cupy.{full} exists, but its strict double does not offer it")
        setattr(self, name, value)
        return value

    def _find(self, full: str, name: str, f: Any) -> Any:
        """The stand-in for cupy.<full>, made of NumPy's `f`. full: such as "linalg.norm"; name: its last part.

        None if CuPy has it and the strict backend does not offer it. AttributeError if CuPy lacks it."""
        if full in API["functions"] or full in API["ufuncs"]:
            if isinstance(f, np.ufunc):
                return Ufunc(name)
            if f is None:                                  # CuPy has it, NumPy does not
                return None
            return partial(_run, "xp." + full, f, API["functions"].get(full, "x"))
        if full in API["other"]:
            offered = (np.generic, np.dtype, np.finfo, np.iinfo, np.linalg.LinAlgError)
            is_offered = isinstance(f, float) or (isinstance(f, type) and issubclass(f, offered))
            return f if is_offered else None
        if any(function.startswith(full + ".") for function in API["functions"]):
            return _Module(full + ".", f)
        hint = "; random numbers are drawn on the host" if full.startswith("random") else ""
        raise AttributeError(f"cupy has no {full}{hint}")


xp: Any = _Module("", np)
vars(xp).update(ndarray=Array, newaxis=None, empty=_empty, empty_like=_empty_like, asnumpy=_asnumpy)
vars(xp).update({name: _creating(name) for name in CREATING})
