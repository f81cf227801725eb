"""The registry of kernels: faster implementations of a definition, by the type of the arrays.

    register(definition, array_type, kernel)       put a kernel in front of those that are registered
    find(definition, array_type)                   the kernels, fastest first
    run(definition, array_type, *args, **kwargs)   the first kernel that takes these arguments, at last the definition

A definition is an op of ops.py, an update of an optimiser, or a function that draws random numbers.  A kernel
has the signature of its definition.  It returns NotImplemented for dtypes, shapes or options that it does not
take; then the next kernel is tried.  The library is right without any kernel: `with definitions_only()` runs
the definitions alone.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

KERNELS: dict[tuple[Callable, type], list[Callable]] = {}      # (definition, array type) -> kernels, fastest first
_NO_KERNELS: list[Callable] = []


def register(definition: Callable, array_type: type, kernel: Callable) -> None:
    """Put a kernel in front of the kernels of a definition.  A kernel that is registered already moves to the front."""
    kernels = KERNELS.setdefault((definition, array_type), [])
    if kernel in kernels:
        kernels.remove(kernel)
    kernels.insert(0, kernel)


def find(definition: Callable, array_type: type) -> list[Callable]:
    """The kernels of a definition for arrays of this type, fastest first."""
    return KERNELS.get((definition, array_type), _NO_KERNELS)


def run(definition: Callable, array_type: type, *args: Any, **kwargs: Any) -> Any:
    """The result of the first kernel that does not return NotImplemented, at last of the definition.

    `definition` is also the key of the registry.  An op is a function on Tensors, whose attribute `definition` is the
    function on plain arrays; any other definition is called itself."""
    for kernel in KERNELS.get((definition, array_type), _NO_KERNELS):
        result = kernel(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return getattr(definition, "definition", definition)(*args, **kwargs)


@contextlib.contextmanager
def only(accepts: Callable[[Callable], bool]) -> Iterator[None]:
    """with only(accepts): of the kernels registered before, only those with accepts(kernel) run, in all threads.

    A kernel that is registered inside runs as well.  Afterwards every list that there was is as before."""
    before = dict(KERNELS)
    for key, kernels in before.items():
        KERNELS[key] = [kernel for kernel in kernels if accepts(kernel)]
    try:
        yield
    finally:
        KERNELS.update(before)


def definitions_only() -> contextlib.AbstractContextManager[None]:
    """with definitions_only(): every definition runs as it is written."""
    return only(_no_kernel)


def _no_kernel(kernel: Callable) -> bool:
    return False
