"""Every kind of packed weight, for tests: a new class is one more line of PACKERS."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from helpers import host

import tinyft as ft
from tinyft import array, edit, nn
from tinyft.compress import FORMATS, Uniform
from tinyft.compress.quantize import FP4, Dynamic8, Int8, LLMInt8

Packer = Callable[[np.ndarray], nn.Packed]


def reordered(W: np.ndarray) -> Uniform:
    """A weight whose codes are in another order, with scales of float32 and input scales, as act-order and AWQ make."""
    rng = np.random.default_rng(3)
    width = W.shape[1]
    plain = ft.RTN(5, 12, "symmetric")(W * rng.uniform(0.999, 1.001, (len(W), 1)).astype(np.float32))
    scale = host(plain.scale).T * np.float32(1.0001)
    return Uniform(plain.code_matrix(), scale, kind="symmetric", bits=5, group=12, order=rng.permutation(width),
                   input_scale=rng.uniform(0.5, 2, width).astype(np.float32))


PACKERS: dict[str, Packer] = {
    "affine": ft.RTN(4, 8),
    "affine, 3 bits, short group": ft.RTN(3, 20),
    "absmax": ft.RTN(4, None, "absmax"),
    "ternary": ft.RTN(2, 16, "ternary"),
    "sign": ft.RTN(1, 16, "sign"),
    "reordered": reordered,
    "nf4": ft.NF4(),
    "fp4, blocks of 20": FP4(block=20),
    "dynamic": Dynamic8(),
    "int8": Int8("affine"),
    "outliers": LLMInt8(threshold=0.5),
    "dense outliers": LLMInt8(outlier_weights="dense"),
    **{name: cls.quantize for name, cls in FORMATS.items()},
}


def pack_all(model: nn.Module, packer: Packer, *, embedding: bool = False) -> nn.Module:
    """Put packed weights in the places of the weights of all linear maps inside blocks, and of the token embedding."""
    for path, module in edit.base_modules(model).items():
        is_map = isinstance(module, nn.Linear) and path.startswith("blocks.")
        if is_map or (embedding and module is model.embed):
            packed = packer(host(module.weight))
            module.weight = packed.to(array.name_of(module.weight.data), dtype=module.weight.dtype)
    return model
