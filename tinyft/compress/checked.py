"""The arrays and settings of one packed weight in a file, taken one by one with checks."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import array, checks
from ..array import Array

__all__ = ["Stored"]


class Stored:
    """What a file holds of one packed weight. A class's `restore` takes its parts; whatever remains is refused."""

    def __init__(self, name: str, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
        """name: of the class, for the messages."""
        self.name = name
        self.settings = dict(settings)
        self.arrays = dict(arrays)

    def setting(self, key: str) -> Any:
        """Take a setting. ValueError if it is missing."""
        if key not in self.settings:
            raise ValueError(f"{self.name} wants the setting {key}, got none")
        return self.settings.pop(key)

    def whole(self, key: str, least: int, most: int) -> int:
        """Take a setting that is a whole number in least ... most."""
        return checks.whole(f"{self.name}: {key}", self.setting(key), least, most)

    def array(self, key: str, shape: tuple[int, ...], *dtypes: str) -> Array:
        """Take an array of this shape and one of these dtypes, onto the backend in use. ValueError for another one."""
        found = self.arrays.pop(key, None)
        if found is None:
            raise ValueError(f"{self.name} wants the array {key}, got none")
        if str(found.dtype) not in dtypes:
            raise ValueError(f"{self.name}: {key} wants the dtype {' or '.join(dtypes)}, got {found.dtype}")
        if found.shape != shape:
            raise ValueError(f"{self.name}: {key} wants the shape {shape}, got {found.shape}")
        return array.asarray(np.require(found, requirements=["C", "ALIGNED"]))

    def has(self, key: str) -> bool:
        """True if there is an array of this name."""
        return key in self.arrays

    def numbers(self, key: str, shape: tuple[int, ...], *dtypes: str) -> Array:
        """Take an array of numbers that are kept as their bits: uint16 of float16, uint32 of float32.

        dtypes: those that the class has, of these two. ValueError if one of the numbers is not finite."""
        bits = self.array(key, shape, *dtypes)
        exponent = np.uint16(0x7C00) if bits.dtype == np.uint16 else np.uint32(0x7F800000)
        if ((bits & exponent) == exponent).any():        # all bits of an exponent are set in inf and NaN
            raise ValueError(f"{self.name}: {key} wants finite numbers, got inf or NaN")
        return bits

    def refuse_rest(self) -> None:
        """ValueError if a setting or an array was not taken."""
        for kind, left in (("setting", self.settings), ("array", self.arrays)):
            if left:
                raise ValueError(f"{self.name} has no {kind} {checks.brief(min(left, key=str))}")

