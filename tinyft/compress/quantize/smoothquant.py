"""SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models.  Xiao et al., 2022.
arXiv:2211.10438

    y = (x diag(1/s)) (W diag s)ᵀ,    s_j = max |x_j|^α / max_o |W[o, j]|^(1−α)                            §4.1, eq. 3-4

A few inputs of a linear map are much larger than the others, while all of its weights are alike. So weights are easy
to round, and inputs are not. s moves a part α of the difficulty from the inputs into the weights; the function of the
model stays the same. The division costs nothing: the norm before the map does it, γ ← γ/s and β ← β/s. Then every map
that reads the norm needs its weight times s: q, k and v together, `up` and `gate` together, with max |W[o, j]| over
the rows of all of them.

    ft.smooth(model, batches)
    ft.compress(model, ft.Int8())

Maps that read no norm, `o` and `down`, stay as they are. A block whose norms come after its sublayers (post-norm, as
BERT's) is refused: there the output of a norm is also the residual stream, and divided by s the sum would be another.

Departures: an input that was always 0, and one whose weights are all 0, keeps s = 1, where the paper's code gives it
10⁻⁵. Positions of padding do not count.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ... import array, checks, edit
from ...keywords import checked_keywords
from ...nn import Context, LayerNorm, Linear, Module, Packed, RMSNorm, evaluation_mode
from ...tensor import Tensor
from ..calibrate import OutputRecorder, read_passes, recording, run_pass, token_rows

__all__ = ["smooth", "smoothing_scales"]


@checked_keywords
def smooth(model: Module, batches: Iterable, alpha: float = 0.5) -> dict[str, np.ndarray]:
    """Make the inputs of quantized maps smooth, in place: divide each norm by s, multiply its readers' weights by s.

    batches   calibration data, as for `compress`
    alpha     the part of the difficulty that goes into the weights: 0 none, 1 all of it

    The outputs of the model stay the same up to rounding. Returns {path of a norm: s (C,)}.
    TypeError or ValueError, before anything is changed, for a model with attached methods, blocks without a norm before
    their maps, packed weights, and batches without tokens."""
    edit.check_model("smooth", model)
    checks.number("smooth: alpha", alpha, 0, 1)
    if edit.attached(model):
        raise ValueError(f"smooth wants a base without methods, got {edit.attached(model)[-1].name!r} attached: "
                         "merge or detach it first")
    norms = _norms(model)
    passes = read_passes("smooth", batches)
    with evaluation_mode(model):
        readers = _readers(model, norms, passes[0])
        largest = _largest_inputs(model, norms, passes)
    scales = {}
    for path, maps in readers.items():
        columns = np.max([np.abs(_host(linear.weight)).max(axis=0) for linear in maps], axis=0)          # (C,)
        scales[path] = smoothing_scales(largest[path], columns, alpha)
    for path, maps in readers.items():
        _fold(norms[path], maps, scales[path])
    return scales


def smoothing_scales(largest: np.ndarray, columns: np.ndarray, alpha: float) -> np.ndarray:
    """s (in,) from max |x_j| (in,) and max_o |W[o, j]| (in,), of all maps that read x."""
    is_used = (largest > 0) & (columns > 0)
    x = np.where(is_used, largest, 1)
    w = np.where(is_used, columns, 1)
    return x**alpha / w**(1 - alpha)


def _fold(norm: Module, maps: list[Linear], s: np.ndarray) -> None:
    """Divide the outputs of a norm by s (C,), and multiply the weights that read them by s."""
    for p in norm.own().values():                            # γ, and β if there is one
        p.copy_(_host(p) / s)
    for linear in maps:
        linear.weight.copy_(_host(linear.weight) * s)


def _host(p: Tensor) -> np.ndarray:
    """The values of a tensor on the host, float64."""
    return array.asnumpy(p.data).astype(np.float64)


def _norms(model: Module) -> dict[str, Module]:
    """{path: norm} of the norms of all sublayers. TypeError for a norm of a kind that cannot be divided by s."""
    modules = edit.base_modules(model)
    found = {path: modules[path] for path in edit.sublayers(model).values()}
    for path, norm in found.items():
        if not isinstance(norm, (LayerNorm, RMSNorm)):
            raise TypeError(f"smooth wants a LayerNorm or an RMSNorm before each sublayer, and {path} is a "
                            f"{type(norm).__name__}")
    return found


def _readers(model: Module, norms: dict[str, Module], targets: Any) -> dict[str, list[Linear]]:
    """{path of a norm: the linear maps of its sublayers that read its output}, from one forward pass.

    ValueError for a norm whose output its sublayer does not read, and for a packed weight."""
    outputs: dict[int, tuple[str, Tensor]] = {}              # id of an output -> (its norm, the output, kept alive)
    sublayers: dict[str, list[str]] = {path: [] for path in norms}
    for sublayer, norm in edit.sublayers(model).items():
        sublayers[norm].append(sublayer)
    linear_maps = {path: m for path, m in edit.base_modules(model).items() if isinstance(m, Linear)}
    readers: dict[str, list[Linear]] = {path: [] for path in norms}

    def see_norm(path: str, y: Tensor, ctx: Context) -> None:
        outputs[id(y)] = (path, y)

    def see_map(path: str, x: Tensor, ctx: Context) -> None:
        norm, _ = outputs.get(id(x), (None, None))
        if norm is not None and edit.inside(path, sublayers[norm]):
            readers[norm].append(linear_maps[path])
    with recording(norms, see_norm, recorder=OutputRecorder), recording(linear_maps, see_map):
        run_pass(model, targets)
    for path, maps in readers.items():
        if not maps:
            raise ValueError(f"smooth wants a norm before each sublayer (pre-norm blocks, as in GPT and Llama); no map "
                             f"of {sublayers[path][0]} reads {path}")
        if any(isinstance(linear.weight, Packed) for linear in maps):
            raise ValueError(f"smooth wants dense weights, and those after {path} are packed: smooth first, and "
                             "compress then")
    return readers


def _largest_inputs(model: Module, norms: dict[str, Module], passes: list) -> dict[str, np.ndarray]:
    """{path of a norm: max |x_j| (C,)} over all tokens. ValueError if one of them is not finite."""
    largest = {path: np.zeros(norm.out_features) for path, norm in norms.items()}

    def see(path: str, y: Tensor, ctx: Context) -> None:
        rows = token_rows(y, ctx)
        if len(rows):
            largest[path] = np.maximum(largest[path], array.asnumpy(abs(rows).max(axis=0)))
    with recording(norms, see, recorder=OutputRecorder):
        for targets in passes:
            run_pass(model, targets)
    for path, x in largest.items():
        if not np.isfinite(x).all():
            raise ValueError(f"smooth wants finite activations, and {path} gives inf or NaN")
    return largest
