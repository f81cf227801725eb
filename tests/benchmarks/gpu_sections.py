"""The measurements of gpu.py: each section is a function that yields (name, function that measures one row)."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import math
import os
import platform
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cupy as cp
import numpy as np
from gpu_clock import Clock, Missing, Row, Work, fresh, ratio
from gpu_sides import precision, torch_there
from gpu_steps import compilers, gpt2, lesson, lora, memory

import tinyft as ft
from tinyft import array, optim
from tinyft.array import bfloat16
from tinyft.compress import Uniform
from tinyft.kernels.cuda import gemm, layers, optimizer, packed
from tinyft.tensor import OPS, sum_to

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": bfloat16}
TOLERANCE = {"fp32": 5e-6, "tf32": 2e-3, "fp16": 3e-3, "bf16": 2e-2}


def rows(name: str, smoke: bool) -> Iterator[Row]:
    """The rows of a section.

    A row that fails has the reason under `error`; a row whose library is not installed, under `note`.
    """
    array.use("cupy")
    for what, measure in SECTIONS[name](Clock(smoke)):
        try:
            row = measure()
        except Missing as e:
            row = {"note": f"not available: {e}"}
        except Exception as e:
            row = {"error": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}"}
            traceback.print_exc()
        fresh()
        if row is not None:
            yield {"what": what, **row}


# ---------------------------------------------------------------------------------------------------- the machine
def version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_facts() -> str:
    """Driver, clocks of processors and memory, power and ECC, as nvidia-smi prints them; "" without nvidia-smi."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ""
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
    run = subprocess.run([smi, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    return run.stdout.strip()


def environment(c: Clock) -> Work:
    """Device, driver and versions."""
    d = array.about_device()
    memory_size = f"{d['total'] / 2**30:.0f} GiB"
    driver = f"CUDA {d['driver']}"
    facts = driver_facts()
    if facts:
        driver += f"; driver, clocks of processors and memory, power, ECC: {facts}"
    accelerators = os.environ.get("CUPY_ACCELERATORS", "default")
    found = {
        "device": f"{d['name']}, {d['multiprocessors']} multiprocessors, {memory_size}, "
        f"compute capability {d['capability']}",
        "driver": driver,
        "CUDA runtime of CuPy": d["runtime"],
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "processor cores": len(os.sched_getaffinity(0)),
        "tinyft": ft.__version__,
        "CuPy": f"{cp.__version__}, accelerators {accelerators!r}",
    }
    for name in ("numpy", "torch", "triton", "peft", "transformers", "nvidia-cublas"):
        found[name] = version(name)
    for what, value in found.items():
        yield what, lambda v=value: {"value": v or "not installed"}


def bandwidth(c: Clock) -> Work:
    """A copy, CuPy's elementwise kernels, one of ours, and PyTorch's copy; 4 GiB each way."""
    n = c.size(1 << 30, 1 << 10)
    a = cp.ones(n, np.float32)
    b = cp.empty_like(a)

    def rate(f: Callable, arrays: int) -> Row:
        """The rate of a function that reads and writes so many arrays of the size of `a`."""
        return {"TB/s": 4 * arrays * n / c.best(f) / 1e12}

    # name: (function, arrays that it reads and writes)
    functions = {
        "copy": (lambda: cp.copyto(b, a), 2),
        "CuPy: y = x + 1": (lambda: cp.add(a, 1, out=b), 2),
        "CuPy: z = x + z": (lambda: cp.add(a, b, out=b), 3),
        "tinyft: GELU": (lambda: layers.gelu(a), 2),
        "CuPy: sums of rows of 1,024": (lambda: a.reshape(-1, 1024).sum(axis=1), 1),
        "tinyft: sums of columns": (lambda: layers.sum_rows(a.reshape(-1, min(n, 4096))), 1),
    }
    for name, (f, arrays) in functions.items():
        yield name, partial(rate, f, arrays)

    def torch_copy() -> Row:
        torch, where = torch_there(c)
        x = torch.ones(n, device=where)
        y = torch.empty_like(x)
        return rate(lambda: y.copy_(x), 2)

    yield "PyTorch: copy", torch_copy


# ---------------------------------------------------------------------------------------------------- CPU and GPU
def agreement(c: Clock) -> Work:
    """Losses of the shipped small GPT on Python source, on NumPy and on CuPy, with the same seeds and weights."""
    steps = c.size(60, 3)
    T = c.size(64, 16)
    B = c.size(8, 2)

    def curve(backend: str, method: Any, how: str = "fp32") -> np.ndarray:
        array.use(backend)
        try:
            model, _ = ft.load("base-gpt-small")
            if method is not None:
                ft.attach(model, method)
            tokens = ft.data.task("domain", train_size=20_000).train
            batches = ft.data.lm_batches(tokens, T=T, batch_size=B)
            with precision(how):
                return np.array(ft.fit(model, batches, steps, ft.AdamW(1e-3), progress=False).losses)
        finally:
            array.use("cupy")

    host: dict[str, np.ndarray] = {}

    def compare(name: str, method: Any, how: str) -> Row:
        if name not in host:
            host[name] = curve("numpy", method)
        want = host[name]
        difference = np.abs(curve("cupy", method, how) / want - 1)
        start = difference[:5].max()
        right = start < 10 * TOLERANCE[how] and difference.max() < 0.02
        return {
            "steps": steps,
            "loss, first": want[0],
            "loss, last": want[-1],
            "apart, first 5 steps": start,
            "apart, at most": difference.max(),
            "right": c.check(bool(right)),
        }

    lora = ft.LoRA(r=8, dropout=0.1)
    for name, method, how in (
        ("full", None, "fp32"),
        ("full", None, "tf32"),
        ("LoRA, dropout 0.1", lora, "fp32"),
    ):
        yield f"{name}, {how}", partial(compare, name, method, how)


# ---------------------------------------------------------------------------------------------------- kernels
def examples(c: Clock) -> dict[str, tuple[Callable, tuple | None]]:
    """{op: (make(dtype) -> (inputs, options), (elements that must move forward, backward) or None)}.

    The sizes are those of GPT-2 small with 8 texts of 1,024 tokens. For attention by products the elements are the
    scores, written once and read once, and their gradient likewise.
    """
    real = (8192, 768, 3072, 50257, 8, 12, 1024, 64)
    N, C, F, V, B, H, T, D = c.size(real, (6, 40, 72, 50, 1, 2, 16, 4))
    rng = np.random.default_rng(0)

    def make(dtype: np.dtype, *shape: int) -> Any:
        return normal(rng, shape).astype(dtype)

    def ids(n: int) -> Any:
        return cp.asarray(rng.integers(0, V, n))

    def projections(t: np.dtype) -> tuple:
        """Three weights and biases in one array each, as an optimiser lays them out."""
        W = make(t, 3, C, C)
        b = make(t, 3, C)
        return [make(t, B, N // B, C), W[0], b[0], W[1], b[1], W[2], b[2]], {"heads": H}

    elementwise = (2 * N * F, 3 * N * F)
    scores = B * H * T * T
    return {
        "linear": (lambda t: ([make(t, N, C), make(t, F, C), make(t, F)], {}), None),
        "matmul": (lambda t: ([make(t, B, H, T, D), make(t, B, H, D, T)], {}), None),
        "project": (projections, None),
        "layer_norm": (
            lambda t: ([make(t, N, C), make(t, C), make(t, C)], {"eps": 1e-5}),
            (2 * N * C, 3 * N * C),
        ),
        "gelu": (lambda t: ([make(t, N, F)], {}), elementwise),
        "gelu_tanh": (lambda t: ([make(t, N, F)], {}), elementwise),
        "dropout": (lambda t: ([make(t, N, F), 0.1, 12345], {}), (2 * N * F, 2 * N * F)),
        "embedding": (lambda t: ([make(t, V, C), ids(N)], {}), (2 * N * C, N * C + V * C)),
        "cross_entropy": (lambda t: ([make(t, N, V), ids(N)], {}), (N * V, 2 * N * V)),
        "attention": (
            lambda t: ([make(t, B, H, T, D) for _ in "qkv"], {"causal": True}),
            (2 * scores, 3 * scores),
        ),
    }


def normal(rng: np.random.Generator, shape: tuple) -> Any:
    """Normal random numbers, float32 on the device.

    At most four million are drawn and then repeated: the host would need seconds for the logits of a batch.
    """
    count = max(1, min(math.prod(shape), 1 << 22))
    return cp.resize(cp.asarray(rng.standard_normal(count, np.float32)), shape)


def wide(a: Any) -> Any:
    """A floating-point array in float32; anything else unchanged."""
    return a.astype(np.float32) if array.is_array(a) and a.dtype in DTYPES.values() else a


def pulled(pulls: Any, g: Any, inputs: list) -> list:
    """The gradients of the inputs, None where there is none."""
    if callable(pulls):
        return list(pulls(g, [True] * len(inputs)))
    return [None if pull is None else pull(g) for pull, _ in zip(pulls, inputs)]


def apart(a: Any, b: Any) -> float:
    """The largest difference over the largest value, on the device."""
    b = wide(b)
    return float(cp.abs(wide(a) - b).max() / cp.maximum(cp.abs(b).max(), 1e-20))


def several(y: Any) -> tuple:
    """The values of an op as a tuple."""
    return y if isinstance(y, tuple) else (y,)


def one_kernel(c: Clock, name: str, dtype: str, copy: float) -> Row:
    """Value and pullbacks beside the definition's in float32 (CuPy has no bfloat16 in batched products); then time."""
    kernel = getattr(layers, name)
    definition = OPS[name].definition
    make, move = examples(c)[name]
    inputs, options = make(DTYPES[dtype])
    plain = [wide(a) for a in inputs]
    y, pulls = kernel(*inputs, **options)
    want, defined = definition(*plain, **options)
    value = max(map(apart, several(y), several(want)))
    rng = np.random.default_rng(1)
    gradients = [normal(rng, v.shape).astype(DTYPES[dtype]) for v in several(y)]
    g = gradients if isinstance(y, tuple) else gradients[0]
    exact = [wide(a) for a in gradients] if isinstance(y, tuple) else wide(gradients[0])
    worst = 0.0
    for a, d, e in zip(inputs, pulled(pulls, g, inputs), pulled(defined, exact, plain)):
        if d is not None:
            worst = max(worst, apart(sum_to(d, a.shape), sum_to(e, a.shape)))
    first = several(y)[0]
    length = max(1, first.size // first.shape[-1] if first.ndim else inputs[0].shape[0])
    right = value < TOLERANCE[dtype] and worst < TOLERANCE[dtype] * length**0.5
    del want, defined, y, pulls, first
    copies = c.copies(sum(a.nbytes for a in inputs if array.is_array(a)))
    turn = itertools.cycle([inputs] + [make(DTYPES[dtype])[0] for _ in range(copies - 1)])
    _, back = kernel(*inputs, **options)
    forward = c.device(lambda: kernel(*next(turn), **options))
    backward = c.device(lambda: pulled(back, g, inputs))
    slow = c.device(lambda: definition(*plain, **options))
    row = {
        "apart": value,
        "apart, back": worst,
        "right": c.check(right),
        "ms": forward * 1e3,
        "ms, back": backward * 1e3,
        "definition (float32) / kernel": slow / forward,
    }
    if move:
        size = DTYPES[dtype].itemsize
        row["over a copy"] = forward / (move[0] * size / copy)
        row["over a copy, back"] = backward / (move[1] * size / copy)
    return row


def adam(c: Clock, copy: float) -> Row:
    """AdamW over 64 million parameters: four arrays read, three written."""
    n = c.size(1 << 26, 1000)
    start = [cp.abs(normal(np.random.default_rng(i), (n,))) for i in range(4)]
    ours = [a.copy() for a in start]
    defined = [a.copy() for a in start]
    options = (1e-3, 0.9, 0.999, 1e-8, 0.01, 3)
    optimizer.adam_update(*ours, *options)
    optim.optimizers.adam_update(*defined, *options)
    error = max(apart(a, b) for a, b in zip(ours, defined))
    seconds = c.device(lambda: optimizer.adam_update(*ours, *options))
    slow = c.device(lambda: optim.optimizers.adam_update(*defined, *options))
    return {
        "apart": error,
        "right": c.check(error < 1e-6),
        "ms": seconds * 1e3,
        "over a copy": seconds / (28 * n / copy),
        "definition (float32) / kernel": slow / seconds,
    }


def noise(c: Clock, copy: float) -> Row:
    """Uniform random numbers: bit for bit those of NumPy."""
    x = cp.empty(c.size(1 << 28, 1000), np.float32)
    few = c.size(1 << 20, 1000)
    raw = np.random.Philox(key=7).random_raw(few // 2 + 1).view(np.uint32)[:few]
    want = (raw >> np.uint32(8)) * np.float32(2.0**-24)
    same = np.array_equal(cp.asnumpy(layers.uniform_like(x, 7)[:few]), want)
    seconds = c.device(lambda: layers.uniform_like(x, 7))
    return {
        "apart": 0.0 if same else 1.0,
        "right": c.check(same),
        "ms": seconds * 1e3,
        "over a copy": seconds / (x.nbytes / copy),
    }


def kernels_(c: Clock) -> Work:
    """Each of layers.NAMES in float32 and bfloat16; AdamW; uniform random numbers."""
    copy = c.copy_rate()
    for name in layers.NAMES:
        for dtype in ("fp32", "bf16"):
            yield f"{name}, {dtype}", partial(one_kernel, c, name, dtype, copy)
    yield "adam, fp32", partial(adam, c, copy)
    yield "uniform", partial(noise, c, copy)


def four_bits(c: Clock) -> Work:
    """Four-bit matrix times vector, with several matrices in turn, so that none is still in the cache.

    The smallest matrix has no target: its 8 MB of codes take two microseconds.
    """
    for n in c.size((4096, 8192, 16384), (64,)):
        for count, dtype in ((1, "fp16"), (1, "fp32"), (8, "fp16")):
            yield f"{n:,} × {n:,}, {count} row{'s' * (count > 1)}, {dtype}", partial(one_int4, c, n, count, dtype)


def one_int4(c: Clock, n: int, count: int, dtype: str) -> Row:
    """`count` vectors times one (n, n) matrix; the error is of the first eight outputs, against float64."""
    group = c.size(128, 32)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (n, n), np.uint8)
    scale = rng.uniform(0.01, 0.1, (n, n // group)).astype(np.float16)
    zero = rng.integers(0, 16, (n, n // group))
    x = rng.standard_normal((count, n)).astype(DTYPES[dtype])
    groups = np.arange(n) // group
    rows_ = scale[:8, groups].astype(np.float64) * (codes[:8].astype(np.float64) - zero[:8, groups])
    want = x.astype(np.float64) @ rows_.T
    weight = Uniform(codes, scale.astype(np.float32), zero, kind="affine", bits=4, group=group)
    weight.to(dtype=x.dtype)
    moved = weight.nbytes
    X = cp.asarray(x)
    result = cp.asnumpy(packed.packed_linear(X, weight)[0][:, :8]).astype(np.float64)
    error = float(np.abs(result - want).max() / np.abs(want).max())
    weights = [weight]
    for _ in range(c.copies(moved) - 1):
        weights.append(copy.deepcopy(weight))
    turn = itertools.cycle(weights)
    seconds = c.device(lambda: packed.packed_linear(X, next(turn)))
    share = moved / seconds / c.copy_rate()
    row = {
        "error (float64)": error,
        "right": c.check(error < TOLERANCE[dtype]),
        "µs": seconds * 1e6,
        "TB/s": moved / seconds / 1e12,
        "share of a copy": share,
    }
    if count == 1 and n != 4096:
        row["reaches"] = {"int4": share}
    return row


# ---------------------------------------------------------------------------------------------------- products
def products(c: Clock) -> Work:
    """TFLOP/s of matrix products.  Errors: Frobenius norm of the first rows, relative to float64."""
    real = (8192, 8192, 768, 3072, 50257, 96, 1024, 64)
    N, M, C, F, V, B, T, D = c.size(real, (24, 6, 8, 12, 20, 2, 8, 4))
    # name: shape of a, shape of b, True for a @ bᵀ
    shapes = {
        "square": ((N, N), (N, N), False),
        "linear": ((M, C), (F, C), True),
        "head": ((M, C), (V, C), True),
        "scores": ((B, T, D), (B, T, D), True),
        "weighted values": ((B, T, T), (B, T, D), False),
    }
    for name, (a, b, transposed) in shapes.items():
        left = " × ".join(map(str, a))
        right = b[-2] if transposed else b[-1]
        for how in ("fp32", "tf32", "fp16", "bf16"):
            yield f"{name} {left} by {right}, {how}", partial(one_product, c, a, b, transposed, how)


def to_float64(x: Any) -> np.ndarray:
    """A device array on the host, in float64."""
    return cp.asnumpy(x).astype(np.float64)


def one_product(c: Clock, a_shape: tuple, b_shape: tuple, transposed: bool, how: str) -> Row:
    """One product in one precision by tinyft, CuPy and PyTorch."""
    dtype = DTYPES["fp32" if how == "tf32" else how]
    rng = np.random.default_rng(0)
    a, b = (normal(rng, shape).astype(dtype) for shape in (a_shape, b_shape))
    turned = b.swapaxes(-1, -2) if transposed else b
    first = (0,) * (a.ndim - 2) + (slice(8),)
    want = to_float64(a[first]) @ to_float64(turned[first[:-1]] if a.ndim > 2 else turned)
    sides: dict[str, Callable] = {"tinyft": partial(gemm.matmul, a, turned)}
    batched_bf16 = how == "bf16" and a.ndim > 2
    if how != "tf32" and not batched_bf16:  # CuPy has neither TF32 nor bfloat16 in batches
        sides["CuPy"] = partial(cp.matmul, a, turned)
    note = None
    with precision(how):
        result = to_float64(sides["tinyft"]()[first])
        error = float(np.linalg.norm(result - want) / np.linalg.norm(want))
        try:
            sides["PyTorch"] = torch_product(c, a, b, transposed)
        except Missing as e:
            note = f"not available: {e}"
        times = list(c.turns(sides))
    row = {"error (float64)": error, "right": c.check(error < TOLERANCE[how])}
    work = 2 * want.shape[-1] * a.size
    for name in sides:
        row[f"{name}, TFLOP/s"] = work / float(np.median([seconds[name] for seconds in times])) / 1e12
    for name in sides:
        if name != "tinyft":
            row[f"{name} / tinyft"] = ratio(times, name, "tinyft")
    if note is not None:
        row["note"] = note
    return row


def torch_product(c: Clock, a: Any, b: Any, transposed: bool) -> Callable:
    """The same product in PyTorch, as a function."""
    torch, where = torch_there(c)
    x, y = (
        torch.from_numpy(cp.asnumpy(m.astype(np.float32))).to(where, getattr(torch, str(m.dtype))) for m in (a, b)
    )
    return lambda: x @ (y.mT if transposed else y)


# ---------------------------------------------------------------------------------------------------- host overhead
def overhead(c: Clock) -> Work:
    """Microseconds until a call returns; the arrays are so small that no call waits for the device.

    tinyft: an op, recorded for backward.
    """
    shape = (8, 64)
    x = cp.zeros(shape, np.float32)
    y = cp.zeros(shape, np.float32)
    W = cp.zeros((64, 64), np.float32)
    E = cp.zeros((100, 64), np.float32)
    ids = cp.zeros(8, np.int64)
    host = np.zeros(shape, np.float32)
    X, Y, M, N = (ft.Tensor(a, requires_grad=True) for a in (x, y, W, E))
    ones = ft.Tensor(cp.ones(64, np.float32), requires_grad=True)
    raw = cp.RawKernel('extern "C" __global__ void nothing(const float *x, float *y, int n) {}', "nothing")
    launch = partial(raw, (1,), (32,), (x, y, np.int32(1)))
    yield "an own kernel, launched", lambda: {"CuPy, µs": c.host(launch) * 1e6}

    cupy_calls = {
        "x + y": lambda: x + y,
        "2 x": lambda: x * 2.0,
        "exp": lambda: cp.exp(x),
        "sum of rows": lambda: x.sum(axis=-1),
        "product": lambda: x @ W,
        "product with a transposed matrix": lambda: x @ W.T,
        "rows by number": lambda: E[ids],
        "reshape": lambda: x.reshape(64, 8),
        "zeros": lambda: cp.zeros(shape, np.float32),
        "host array to device": lambda: cp.asarray(host),
        "a number read (waits)": lambda: float(x[0, 0]),
    }
    tinyft_calls = {
        "x + y": lambda: X + Y,
        "2 x": lambda: X * 2.0,
        "exp": lambda: ft.ops.exp(X),
        "sum of rows": lambda: X.sum(axis=-1),
        "product": lambda: X @ M,
        "product with a transposed matrix": lambda: ft.ops.linear(X, M),
        "layer norm": lambda: ft.ops.layer_norm(X, ones, ones),
        "GELU": lambda: ft.ops.gelu_tanh(X),
        "rows by number": lambda: ft.ops.embedding(N, ids),
        "reshape": lambda: X.reshape(64, 8),
        "host array to device": lambda: array.put_like(host, x),
        "a number read (waits)": lambda: X.data[0, 0].item(),
    }

    def measure(name: str) -> Row:
        row: Row = {}
        for library, calls in (("CuPy", cupy_calls), ("tinyft", tinyft_calls)):
            row[f"{library}, µs"] = c.host(calls[name]) * 1e6 if name in calls else None
        try:
            row["PyTorch, µs"] = c.host(torch_calls(c, host)[name]) * 1e6
        except Missing as e:
            row["note"] = f"not available: {e}"
        return row

    for name in dict.fromkeys([*tinyft_calls, *cupy_calls]):
        yield name, partial(measure, name)


def torch_calls(c: Clock, host: np.ndarray) -> dict[str, Callable]:
    """The same calls in PyTorch."""
    torch, where = torch_there(c)
    functional = torch.nn.functional
    x, y, W, E = (
        torch.zeros(shape, device=where, requires_grad=True) for shape in (host.shape, host.shape, (64, 64), (100, 64))
    )
    ids = torch.zeros(8, dtype=torch.int64, device=where)
    return {
        "x + y": lambda: x + y,
        "2 x": lambda: x * 2.0,
        "exp": lambda: torch.exp(x),
        "sum of rows": lambda: x.sum(-1),
        "product": lambda: x @ W,
        "product with a transposed matrix": lambda: functional.linear(x, W),
        "layer norm": lambda: functional.layer_norm(x, (64,), W[0], W[1]),
        "GELU": lambda: functional.gelu(x, approximate="tanh"),
        "rows by number": lambda: E[ids],
        "reshape": lambda: x.reshape(64, 8),
        "zeros": lambda: torch.zeros(host.shape, device=where),
        "host array to device": lambda: torch.from_numpy(host).to(where),
        "a number read (waits)": lambda: x[0, 0].item(),
    }


SECTIONS: dict[str, Callable[[Clock], Work]] = {
    "environment": environment,
    "bandwidth": bandwidth,
    "agreement": agreement,
    "kernels": kernels_,
    "int4": four_bits,
    "lesson": lesson,
    "gpt2": gpt2,
    "lora": lora,
    "products": products,
    "overhead": overhead,
    "memory": memory,
    "compiled": compilers,
}
__all__ = ["SECTIONS", "rows"]
