"""GPTQ of one layer, (case.V, case.C), with case.T calibration tokens, Hessian included.  case.model: tinyft | torch

Both sides: 4 bits, groups of 128 with an affine grid, damping 1 %, blocks of 128 columns, the inputs in two batches.
tinyft gives the packed weight. "torch" is the plain algorithm in PyTorch, as the paper's own program has it: float32,
three factorisations, the columns of a row-major weight; it gives the rounded weight, its scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cases import Case

BITS = 4
GROUP = 128
BLOCK = 128
DAMP = 0.01
BATCHES = 2
Run = Callable[[], object]


def build(c: Case) -> Run:
    """The function to measure."""
    W, X = layer(c)
    return (with_torch if c.model == "torch" else with_tinyft)(W, X)


def start(run: Run, c: Case) -> tuple[Callable[[], float], int]:
    """The same as a step; its loss is 0."""

    def step() -> float:
        run()
        return 0.0

    return step, 0


def layer(c: Case) -> tuple[np.ndarray, np.ndarray]:
    """W (out, in) and correlated inputs X (tokens, in), float32."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((c.C, c.C), np.float32) / np.sqrt(c.C)
    X = rng.standard_normal((c.T, c.C), np.float32) @ (np.eye(c.C, dtype=np.float32) + mix)
    return rng.standard_normal((c.V, c.C), np.float32) * 0.02, X


# ---------------------------------------------------------------------------------------------------- tinyft
def with_tinyft(W: np.ndarray, X: np.ndarray) -> Run:
    """A function that gives the packed weight."""
    import tinyft as ft
    from tinyft import kernels
    from tinyft.compress.calibrate import Hessian

    kernels.keep_memory()
    rule = ft.GPTQ(bits=BITS, group=GROUP, damp=DAMP, block=BLOCK)

    def run() -> object:
        hessian = Hessian(X.shape[1])
        for x in np.split(X, BATCHES):
            hessian.add(x)
        return rule(W, hessian.matrix)

    return run


# ---------------------------------------------------------------------------------------------------- torch
def with_torch(W: np.ndarray, X: np.ndarray) -> Run:
    """A function that gives the rounded weight, and the scale and zero point of each group."""
    import torch

    weight = torch.from_numpy(W)
    batches = torch.from_numpy(X).chunk(BATCHES)

    @torch.no_grad()
    def run() -> object:
        return torch_gptq(weight.clone(), torch_hessian(batches))

    return run


def torch_hessian(batches):
    """2/n X Xᵀ as a running mean over batches."""
    import torch

    width = batches[0].shape[1]
    H = torch.zeros(width, width)
    n = 0
    for x in batches:
        x = x.t()
        added = x.shape[1]
        H *= n / (n + added)
        n += added
        x = x * (2 / n) ** 0.5
        H += x.matmul(x.t())
    return H


def torch_grid(W):
    """Scale and zero point of each row of W (out, g)."""
    import torch

    nothing = torch.zeros(len(W))
    low = torch.minimum(W.min(1)[0], nothing)
    high = torch.maximum(W.max(1)[0], nothing)
    empty = (low == 0) & (high == 0)
    low[empty] = -1
    high[empty] = 1
    scale = (high - low) / (2**BITS - 1)
    return scale.unsqueeze(1), torch.round(-low / scale).unsqueeze(1)


def torch_quantize(w, scale, zero):
    """The nearest values of the grid."""
    import torch

    q = torch.clamp(torch.round(w / scale) + zero, 0, 2**BITS - 1)
    return scale * (q - zero)


def torch_gptq(W, H):
    """The rounded weight, scales and zero points."""
    import torch

    width = W.shape[1]
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    diagonal = torch.arange(width)
    H[diagonal, diagonal] += DAMP * torch.mean(torch.diag(H))
    H = torch.linalg.cholesky(H)
    H = torch.cholesky_inverse(H)
    U = torch.linalg.cholesky(H, upper=True)
    Q = torch.zeros_like(W)
    grids = []
    for i1 in range(0, width, BLOCK):
        i2 = min(i1 + BLOCK, width)
        W1 = W[:, i1:i2].clone()
        Q1 = torch.zeros_like(W1)
        E1 = torch.zeros_like(W1)
        U1 = U[i1:i2, i1:i2]
        for i in range(i2 - i1):
            if (i1 + i) % GROUP == 0:
                scale, zero = torch_grid(W[:, i1 + i : i1 + i + GROUP])
                grids.append((scale, zero))
            w = W1[:, i]
            d = U1[i, i]
            q = torch_quantize(w.unsqueeze(1), scale, zero).flatten()
            Q1[:, i] = q
            e = (w - q) / d
            W1[:, i:] -= e.unsqueeze(1).matmul(U1[i, i:].unsqueeze(0))
            E1[:, i] = e
        Q[:, i1:i2] = Q1
        W[:, i2:] -= E1.matmul(U[i1:i2, i2:])
    return Q, grids
