"""What gpu.py measures: each section is a function that yields rows, one thing measured in each, fenced one by one."""
from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import platform
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import cupy as cp
import numpy as np
from gpu_clock import Clock, Missing, Row, Work, fresh, ratio
from gpu_sides import precision, torch_there
from gpu_steps import compilers, gpt2, lesson, lora, memory

import tinyft as ft
from tinyft import array, optim
from tinyft.array import bfloat16
from tinyft.kernels.cuda import gemm, int4, layers, optimizer
from tinyft.tensor import OPS, sum_to

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": bfloat16}
TOLERANCE = {"fp32": 5e-6, "tf32": 2e-3, "fp16": 3e-3, "bf16": 2e-2}


def rows(name: str, smoke: bool) -> Iterator[Row]:
    "The rows of a section.  One that cannot be measured says why under `error`, or under `note` where a part is not installed."
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


# ── the machine, and its bytes per second ────────────────────────────────────────────────────────────────────────────
def environment(c: Clock) -> Work:
    "Device, driver and versions."
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None
    d = array.about_device()
    smi = shutil.which("nvidia-smi")
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
    asked = subprocess.run([smi, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20).stdout.strip() if smi else None
    found = {"device": f"{d['name']}, {d['multiprocessors']} multiprocessors, {d['total'] / 2**30:.0f} GiB, compute capability {d['capability']}",
             "driver": f"CUDA {d['driver']}" + (f"; driver, clocks of processors and memory, power, ECC: {asked}" if asked else ""),
             "CUDA runtime of CuPy": d["runtime"], "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
             "processor cores": len(os.sched_getaffinity(0)), "tinyft": ft.__version__,
             "CuPy": cp.__version__ + f", accelerators {os.environ.get('CUPY_ACCELERATORS', 'as it chooses')!r}",
             **{n: version(n) for n in ("numpy", "torch", "triton", "peft", "transformers", "nvidia-cublas")}}
    for what, value in found.items():
        yield what, lambda v=value: {"value": v or "not installed"}


def bandwidth(c: Clock) -> Work:
    "A copy, CuPy's elementwise kernels, one of ours, and PyTorch's copy; 4 GiB each way."
    n = c.size(1 << 30, 1 << 10)
    a = cp.ones(n, np.float32)
    b = cp.empty_like(a)

    def rate(f: Callable, arrays: int) -> Row:
        return {"TB/s": 4 * arrays * n / c.best(f) / 1e12}
    yield "copy", lambda: rate(lambda: cp.copyto(b, a), 2)
    yield "CuPy: y = x + 1", lambda: rate(lambda: cp.add(a, 1, out=b), 2)
    yield "CuPy: z = x + z", lambda: rate(lambda: cp.add(a, b, out=b), 3)
    yield "tinyft: GELU", lambda: rate(lambda: layers.gelu(a), 2)
    yield "CuPy: sums of rows of 1,024", lambda: rate(lambda: a.reshape(-1, 1024).sum(axis=1), 1)
    yield "tinyft: sums of columns", lambda: rate(lambda: layers.sum_rows(a.reshape(-1, min(n, 4096))), 1)

    def torchs() -> Row:
        torch, where = torch_there(c)
        x = torch.ones(n, device=where)
        y = torch.empty_like(x)
        return rate(lambda: y.copy_(x), 2)
    yield "PyTorch: copy", torchs


# ── the CPU and the GPU ──────────────────────────────────────────────────────────────────────────────────────────────
def agreement(c: Clock) -> Work:
    "Losses of the shipped small GPT, fine-tuned on Python source on NumPy and on CuPy: same seeds, weights, batches and noise."
    steps, T, B = c.size(60, 3), c.size(64, 16), c.size(8, 2)

    def curve(backend: str, method: Any, how: str = "fp32") -> np.ndarray:
        array.use(backend)
        try:
            model, _ = ft.load("base-gpt-small")
            if method is not None:
                ft.attach(model, method)
            batches = ft.data.lm_batches(ft.data.task("domain", train_size=20_000).train, T=T, batch_size=B)
            with precision(how):
                return np.array(ft.fit(model, batches, steps, ft.AdamW(1e-3), progress=False).losses)
        finally:
            array.use("cupy")
    host: dict[str, np.ndarray] = {}
    for name, method in (("full", None), ("LoRA, dropout 0.1", ft.LoRA(r=8, dropout=0.1))):
        for how in ("fp32", "tf32") if name == "full" else ("fp32",):
            def compare(name: str = name, method: Any = method, how: str = how) -> Row:
                want = host.setdefault(name, curve("numpy", method))
                apart = np.abs(curve("cupy", method, how) / want - 1)
                return {"steps": steps, "loss, first": want[0], "loss, last": want[-1], "apart, first 5 steps": apart[:5].max(),
                        "apart, at most": apart.max(), "right": c.check(bool(apart[:5].max() < 10 * TOLERANCE[how] and apart.max() < 0.02))}
            yield f"{name}, {how}", compare


# ── kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def examples(c: Clock) -> dict[str, tuple[Callable, tuple | None]]:
    """Op -> (make(dtype) -> (inputs, options), how many numbers must move forward and back).  GPT-2 small's sizes, 8 texts of 1,024 tokens.

    Of attention by products that is: the scores once written and once read, and their gradient likewise."""
    N, C, F, V, B, H, T, D = c.size((8192, 768, 3072, 50257, 8, 12, 1024, 64), (6, 40, 72, 50, 1, 2, 16, 4))
    rng = np.random.default_rng(0)
    make = lambda dtype, *s: normal(rng, s).astype(dtype)
    ids = lambda n: cp.asarray(rng.integers(0, V, n))
    scores = B * H * T * T

    def projections(t: np.dtype) -> tuple:
        "Three weights and biases as an optimiser lays them out: one after another."
        W, b = make(t, 3, C, C), make(t, 3, C)
        return [make(t, B, N // B, C), W[0], b[0], W[1], b[1], W[2], b[2]], {"heads": H}
    return {
        "linear": (lambda t: ([make(t, N, C), make(t, F, C), make(t, F)], {}), None),
        "matmul": (lambda t: ([make(t, B, H, T, D), make(t, B, H, D, T)], {}), None),
        "project": (projections, None),
        "layer_norm": (lambda t: ([make(t, N, C), make(t, C), make(t, C)], {"eps": 1e-5}), (2 * N * C, 3 * N * C)),
        "gelu": (lambda t: ([make(t, N, F)], {}), (2 * N * F, 3 * N * F)),
        "gelu_tanh": (lambda t: ([make(t, N, F)], {}), (2 * N * F, 3 * N * F)),
        "dropout": (lambda t: ([make(t, N, F), 0.1, 12345], {}), (2 * N * F, 2 * N * F)),
        "embedding": (lambda t: ([make(t, V, C), ids(N)], {}), (2 * N * C, N * C + V * C)),
        "cross_entropy": (lambda t: ([make(t, N, V), ids(N)], {}), (N * V, 2 * N * V)),
        "attention": (lambda t: ([make(t, B, H, T, D) for _ in "qkv"], {"causal": True}), (2 * scores, 3 * scores)),
    }


def normal(rng: np.random.Generator, shape: tuple) -> Any:
    "float32 on the device.  Not more than four million are drawn; the host would need seconds for the logits of a batch."
    drawn = cp.asarray(rng.standard_normal(max(1, min(math.prod(shape), 1 << 22)), np.float32))
    return cp.resize(drawn, shape)


def wide(a: Any) -> Any:
    return a.astype(np.float32) if array.is_array(a) and a.dtype in DTYPES.values() else a


def pulled(pulls: Any, g: Any, inputs: list) -> list:
    "The gradients of the inputs, None where there is none."
    return list(pulls(g, [True] * len(inputs))) if callable(pulls) else [None if p is None else p(g) for p, _ in zip(pulls, inputs)]


def apart(a: Any, b: Any) -> float:
    "The largest difference over the largest number, on the device."
    b = wide(b)
    return float(cp.abs(wide(a) - b).max() / cp.maximum(cp.abs(b).max(), 1e-20))


def one_kernel(c: Clock, name: str, dtype: str, copy: float) -> Row:
    "Value and pullbacks beside the definition's, in float32; then time."
    make, move = examples(c)[name]
    inputs, options = make(DTYPES[dtype])
    several = lambda y: y if isinstance(y, tuple) else (y,)
    plain = [wide(a) for a in inputs]                    # float32: CuPy has no bfloat16 in batched products
    y, pulls = getattr(layers, name)(*inputs, **options)
    want, defined = OPS[name].definition(*plain, **options)
    value, rng = max(map(apart, several(y), several(want))), np.random.default_rng(1)
    given = [normal(rng, v.shape).astype(DTYPES[dtype]) for v in several(y)]
    g, exact = (given, [wide(a) for a in given]) if isinstance(y, tuple) else (given[0], wide(given[0]))
    worst = max(apart(sum_to(d, a.shape), sum_to(e, a.shape))
                for a, d, e in zip(inputs, pulled(pulls, g, inputs), pulled(defined, exact, plain)) if d is not None)
    first = several(y)[0]
    length = max(1, first.size // first.shape[-1] if first.ndim else inputs[0].shape[0])
    right = value < TOLERANCE[dtype] and worst < TOLERANCE[dtype] * length**0.5
    del want, defined, y, pulls, first
    turn = itertools.cycle([inputs] + [make(DTYPES[dtype])[0] for _ in range(c.copies(sum(a.nbytes for a in inputs if array.is_array(a))) - 1)])
    _, back = getattr(layers, name)(*inputs, **options)
    forward, backward = c.device(lambda: getattr(layers, name)(*next(turn), **options)), c.device(lambda: pulled(back, g, inputs))
    slow = c.device(lambda: OPS[name].definition(*plain, **options))
    row = {"apart": value, "apart, back": worst, "right": c.check(right), "ms": forward * 1e3, "ms, back": backward * 1e3,
           "definition (float32) / kernel": slow / forward}
    if move:
        size = DTYPES[dtype].itemsize
        row |= {"over a copy": forward / (move[0] * size / copy), "over a copy, back": backward / (move[1] * size / copy)}
    return row


def adam(c: Clock, copy: float) -> Row:
    "AdamW over 64 million numbers: four read, three written."
    n = c.size(1 << 26, 1000)
    start = [cp.abs(normal(np.random.default_rng(i), (n,))) for i in range(4)]
    ours, theirs = [a.copy() for a in start], [a.copy() for a in start]
    options = (1e-3, 0.9, 0.999, 1e-8, 0.01, 3)
    optimizer.adam_update(*ours, *options)
    optim.optimizers.adam_update(*theirs, *options)
    error = max(apart(a, b) for a, b in zip(ours, theirs))
    seconds = c.device(lambda: optimizer.adam_update(*ours, *options))
    return {"apart": error, "right": c.check(error < 1e-6), "ms": seconds * 1e3, "over a copy": seconds / (28 * n / copy),
            "definition (float32) / kernel": c.device(lambda: optim.optimizers.adam_update(*theirs, *options)) / seconds}


def noise(c: Clock, copy: float) -> Row:
    "Uniform numbers: bit for bit NumPy's."
    x = cp.empty(c.size(1 << 28, 1000), np.float32)
    few = c.size(1 << 20, 1000)
    raw = np.random.Philox(key=7).random_raw(few // 2 + 1).view(np.uint32)[:few]
    same = np.array_equal(cp.asnumpy(layers.uniform_like(x, 7)[:few]), (raw >> np.uint32(8)) * np.float32(2.0**-24))
    seconds = c.device(lambda: layers.uniform_like(x, 7))
    return {"apart": 0.0 if same else 1.0, "right": c.check(same), "ms": seconds * 1e3, "over a copy": seconds / (x.nbytes / copy)}


def kernels_(c: Clock) -> Work:
    "Each of layers.NAMES in float32 and bfloat16; AdamW; uniform noise."
    copy = c.copy_rate()
    for name in layers.NAMES:
        for dtype in ("fp32", "bf16"):
            yield f"{name}, {dtype}", lambda n=name, d=dtype: one_kernel(c, n, d, copy)
    yield "adam, fp32", lambda: adam(c, copy)
    yield "uniform", lambda: noise(c, copy)


def four_bits(c: Clock) -> Work:
    "Codes in turn from several matrices, so that none is still in the cache.  8 MB of codes take two microseconds: no target for those."
    group = c.size(128, 32)

    def measure(n: int, rows_: int, dtype: str) -> Row:
        rng = np.random.default_rng(0)
        codes = rng.integers(0, 2**32, (n, n // 8), np.uint32)
        scale, zero = rng.uniform(0.01, 0.1, (n, n // group)).astype(np.float16), rng.integers(0, 16, (n, n // group)).astype(np.float16)
        x = rng.standard_normal((rows_, n)).astype(DTYPES[dtype])
        digits = ((codes[:8, :, None] >> np.arange(0, 32, 4, np.uint32)) & 15).reshape(8, n).astype(np.float64)
        which = np.arange(n) // group
        want = x.astype(np.float64) @ (scale[:8, which].astype(np.float64) * (digits - zero[:8, which])).T
        weight, moved = [cp.asarray(a) for a in (codes, scale, zero)], codes.nbytes + 2 * scale.nbytes
        X = cp.asarray(x)
        got = cp.asnumpy(int4.matmul(X, *weight, group)[:, :8]).astype(np.float64)
        error = float(np.abs(got - want).max() / np.abs(want).max())
        turn = itertools.cycle([weight] + [[a.copy() for a in weight] for _ in range(c.copies(moved) - 1)])
        seconds = c.device(lambda: int4.matmul(X, *next(turn), group))
        share = moved / seconds / c.copy_rate()
        return {"error (float64)": error, "right": c.check(error < TOLERANCE[dtype]), "µs": seconds * 1e6, "TB/s": moved / seconds / 1e12,
                "share of a copy": share, **({"reaches": {"int4": share}} if rows_ == 1 and n != 4096 else {})}
    for n in c.size((4096, 8192, 16384), (64,)):
        for rows_, dtype in ((1, "fp16"), (1, "fp32"), (8, "fp16")):
            yield f"{n:,} × {n:,}, {rows_} row{'s' * (rows_ > 1)}, {dtype}", lambda a=(n, rows_, dtype): measure(*a)


# ── products, and what an operation costs the host ───────────────────────────────────────────────────────────────────
def products(c: Clock) -> Work:
    "TFLOP/s.  Errors: Frobenius norm, against float64, of the first rows."
    N, rows_, C, F, V, B, T, D = c.size((8192, 8192, 768, 3072, 50257, 96, 1024, 64), (24, 6, 8, 12, 20, 2, 8, 4))
    shapes = {"square": ((N, N), (N, N), False), "linear": ((rows_, C), (F, C), True), "head": ((rows_, C), (V, C), True),
              "scores": ((B, T, D), (B, T, D), True), "weighted values": ((B, T, T), (B, T, D), False)}

    def measure(a_shape: tuple, b_shape: tuple, transposed: bool, how: str) -> Row:
        dtype, rng = DTYPES["fp32" if how == "tf32" else how], np.random.default_rng(0)
        a, b = (normal(rng, s).astype(dtype) for s in (a_shape, b_shape))
        turned = b.swapaxes(-1, -2) if transposed else b
        first = (0,) * (a.ndim - 2) + (slice(8),)
        exact = lambda x: cp.asnumpy(x).astype(np.float64)
        want = exact(a[first]) @ exact(turned[first[:-1]] if a.ndim > 2 else turned)
        error = lambda y: float(np.linalg.norm(exact(y[first]) - want) / np.linalg.norm(want))
        sides, notes = {"tinyft": lambda: gemm.matmul(a, turned)}, []
        if how != "tf32" and not (how == "bf16" and a.ndim > 2):                 # CuPy has no TF32 in batches, and no bfloat16 there
            sides["CuPy"] = lambda: a @ turned
        with precision(how):
            off = error(sides["tinyft"]())
            try:
                torch, where = torch_there(c)
                x, y = (torch.from_numpy(cp.asnumpy(m.astype(np.float32))).to(where, getattr(torch, str(dtype))) for m in (a, b))
                sides["PyTorch"] = lambda: x @ (y.mT if transposed else y)
            except Missing as e:
                notes.append(str(e))
            times = list(c.turns(sides))
        work = 2 * want.shape[-1] * a.size
        row = {"error (float64)": off, "right": c.check(off < TOLERANCE[how])}
        row |= {f"{k}, TFLOP/s": work / float(np.median([t[k] for t in times])) / 1e12 for k in sides}
        row |= {f"{k} / tinyft": ratio(times, k, "tinyft") for k in sides if k != "tinyft"}
        return row | ({"note": "not available: " + "; ".join(notes)} if notes else {})
    for name, (a, b, transposed) in shapes.items():
        for how in ("fp32", "tf32", "fp16", "bf16"):
            yield f"{name} {' × '.join(map(str, a))} by {b[-2] if transposed else b[-1]}, {how}", lambda s=(a, b, transposed, how): measure(*s)


def overhead(c: Clock) -> Work:
    "Microseconds until a call returns; arrays so small that the device is never waited for.  tinyft: an op, recorded for backward."
    shape = (8, 64)
    x, y, W, E = cp.zeros(shape, np.float32), cp.zeros(shape, np.float32), cp.zeros((64, 64), np.float32), cp.zeros((100, 64), np.float32)
    ids, host = cp.zeros(8, np.int64), np.zeros(shape, np.float32)
    X, Y, M, N = (ft.Tensor(a, requires_grad=True) for a in (x, y, W, E))
    ones = ft.Tensor(cp.ones(64, np.float32), requires_grad=True)
    o = ft.ops
    table: dict[str, tuple] = {                          # CuPy, tinyft, PyTorch (torch, x, y, W, E, ids)
        "x + y": (lambda: x + y, lambda: X + Y, lambda t, x, y, W, E, i: x + y),
        "2 x": (lambda: x * 2.0, lambda: X * 2.0, lambda t, x, y, W, E, i: x * 2.0),
        "exp": (lambda: cp.exp(x), lambda: o.exp(X), lambda t, x, y, W, E, i: t.exp(x)),
        "sum of rows": (lambda: x.sum(axis=-1), lambda: X.sum(axis=-1), lambda t, x, y, W, E, i: x.sum(-1)),
        "product": (lambda: x @ W, lambda: X @ M, lambda t, x, y, W, E, i: x @ W),
        "product with a transposed matrix": (lambda: x @ W.T, lambda: o.linear(X, M), lambda t, x, y, W, E, i: t.nn.functional.linear(x, W)),
        "layer norm": (None, lambda: o.layer_norm(X, ones, ones), lambda t, x, y, W, E, i: t.nn.functional.layer_norm(x, (64,), W[0], W[1])),
        "GELU": (None, lambda: o.gelu_tanh(X), lambda t, x, y, W, E, i: t.nn.functional.gelu(x, approximate="tanh")),
        "rows by number": (lambda: E[ids], lambda: o.embedding(N, ids), lambda t, x, y, W, E, i: E[i]),
        "reshape": (lambda: x.reshape(64, 8), lambda: X.reshape(64, 8), lambda t, x, y, W, E, i: x.reshape(64, 8)),
        "zeros": (lambda: cp.zeros(shape, np.float32), None, lambda t, x, y, W, E, i: t.zeros(shape, device=x.device)),
        "host array to device": (lambda: cp.asarray(host), lambda: array.put_like(host, x), lambda t, x, y, W, E, i: t.from_numpy(host).to(x.device)),
        "a number read (waits)": (lambda: float(x[0, 0]), lambda: X.data[0, 0].item(), lambda t, x, y, W, E, i: x[0, 0].item()),
    }
    raw = cp.RawKernel('extern "C" __global__ void nothing(const float *x, float *y, int n) {}', "nothing")
    yield "an own kernel, launched", lambda: {"CuPy, µs": c.host(lambda: raw((1,), (32,), (x, y, np.int32(1)))) * 1e6}

    def measure(cupys: Callable | None, ours: Callable | None, theirs: Callable) -> Row:
        row = {"CuPy, µs": cupys and c.host(cupys) * 1e6, "tinyft, µs": ours and c.host(ours) * 1e6}
        try:
            torch, where = torch_there(c)
            arrays = [torch.zeros(a.shape, device=where, requires_grad=True) for a in (x, y, W, E)]
            rows_ = torch.zeros(8, dtype=torch.int64, device=where)
            row["PyTorch, µs"] = c.host(lambda: theirs(torch, *arrays, rows_)) * 1e6
        except Missing as e:
            row["note"] = f"not available: {e}"
        return row
    for what, sides in table.items():
        yield what, lambda s=sides: measure(*s)


SECTIONS: dict[str, Callable[[Clock], Work]] = {
    "environment": environment, "bandwidth": bandwidth, "agreement": agreement, "kernels": kernels_, "int4": four_bits, "lesson": lesson,
    "gpt2": gpt2, "lora": lora, "products": products, "overhead": overhead, "memory": memory, "compiled": compilers}
__all__ = ["SECTIONS", "rows"]
