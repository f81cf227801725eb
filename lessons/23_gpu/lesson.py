# %% [markdown]
# # 23 The GPU
# **Minutes:** 60, with the exercises 150. **Prerequisites:** 01, 02, 03, a little C. **Exercises:** add_bias, sum_rows, adam_rates, lay_out
#
# A GPU is fast at the same small work on millions of numbers, and slow to be asked. What does asking cost, what does one kernel gain in the place
# of nine, what goes wrong inside one? No GPU is needed: kernels run on the CPU, and are watched. Where there is one, it is measured too.
# %%
import timeit
from types import SimpleNamespace

import numpy as np

import tinyft as ft
from tinyft.kernels.cuda import launch, layers, optimizer
from tinyft.kernels.cuda.cpu_kernel import CpuKernel, KernelError, emulating
from tinyft.learn.draw import figure
from tinyft.learn.lessons import quote, show
from tinyft.strict import StrictError, counts

LAUNCH, BANDWIDTH, FLOPS = 4e-6, 4.8e12, 67e12           # seconds a launch: an estimate;  bytes/s and float32 operations/s: an H200's data sheet
numbers, update = lambda *shape: np.random.default_rng(0).standard_normal(shape).astype(np.float32), ft.optim.optimizers.adam_update
# %% [markdown]
# ## What a launch costs
# A launch costs the host some microseconds, whatever it starts. The kernel takes as long as the slower of its bytes and its arithmetic:
# $$t = \max(\text{launches} \cdot 4\,\mu s,\; \text{bytes} / 4.8\,\text{TB/s},\; \text{operations} / 67\,\text{T/s})$$
# **Predict first.** From how many numbers on does $y = 2x$, 8 bytes and one operation each, wait for memory? Does NumPy know the same two regimes?
# %%
model = lambda launches, bytes, operations=0: np.maximum(np.maximum(launches * LAUNCH, bytes / BANDWIDTH), operations / FLOPS)
sizes, doubled, even = 2**np.arange(4, 23), {}, LAUNCH * BANDWIDTH / 8
for backend in ("cupy", "numpy")[ft.array.why_no_cupy() is not None:]:                 # the same code on CuPy: an array knows its module
    x, y = (ft.array.to(numbers(int(sizes[-1])), backend) for _ in "xy")
    ask = lambda n: (ft.array.xp(x).multiply(x[:n], 2, out=y[:n]), ft.array.asnumpy(y[:1]))      # to see a number is to wait for it
    mine = doubled[backend] = np.array([min(timeit.repeat(lambda n=n: ask(n), number=10, repeat=4)) / 10 for n in sizes])
print(f"from {even / 1e6:.1f} million on; here, for 16 times as many: at first {mine[4] / mine[0]:.1f} times as long, then {mine[-1] / mine[-5]:.0f}")
assert even == 2.4e6 and model(1, 12 * 4096**2, 2 * 4096**3) > 40 * model(1, 12 * 4096**2)      # n × n: n/6 operations a byte; 14 is even; GELU: 3
# %% [markdown]
# ## Nine passes, or one
# GELU as array operations: each reads its inputs from memory and writes its result there. The strict double of CuPy counts launches and bytes.
# **Predict first.** How many launches, and how often does an array of $x$'s size go to or from memory? How often must it?
# %%
cost = lambda f: (counts.clear(), f(), counts["launch"], counts["bytes"], counts["sync"], counts["h2d"])[2:]
device = ft.array.to(numbers(1 << 16), "strict")
launches, moved, *_ = cost(lambda: ft.ops.gelu_tanh.definition(device))
print(f"{launches} launches, {moved / device.nbytes:.0f} passes;  needed are 2")
assert (launches, moved) == (9, 21 * device.nbytes)
fig, (left, right) = figure(2, 3.1)
for backend, seconds in doubled.items():
    left.loglog(sizes, seconds * 1e6, "o-", ms=3, color="#4477aa" if backend == "numpy" else "#228833", label=f"{backend}, measured here")
for ax, launches, passes, style in ((left, 1, 2, "k--"), (right, 9, 21, "#cc6677"), (right, 1, 2, "k--")):
    ax.loglog(many := np.logspace(1, 9), model(launches, passes * 4 * many) * 1e6, style, label=f"GPU, by the formula: {passes} passes")
    ax.axvspan(10, even, color="#999999", alpha=0.15 * (passes == 2), lw=0)
    ax.set(xlabel="numbers", ylabel="µs", title="y = 2x" if ax is left else "GELU: 9 launches or 1", xlim=(10, 1e9), ylim=(0.1, 3e5))
    ax.legend(fontsize=7, loc="upper left")
show("Grey: a kernel of two passes waits for its launch. Beyond, time goes with the bytes. Fusing gains nine times here, ten times there.")
# %% [markdown]
# ## A fused kernel
# Fusing saves no arithmetic, though one often reads so; it saves passes and launches. A kernel says what **one thread** does. A launch says how many
# there are: as many blocks of 256 as $n$ needs; in the last some find no number (`i < n`). A warp's 32 threads should read neighbours in memory.
# %%
head, *kernels = (launch.HERE / "gelu.cu").read_text(encoding="utf-8").split('extern "C" ')
print(head[head.index("#define"):head.index("__device__")] + kernels[2])
quote(layers._gelu)
tape, x = [], numbers(1000)                              # tape: of every launch kernel, grid, block, arguments
def compiler(source, name):
    kernel = CpuKernel(source, name)
    return lambda *launched: (tape.append((kernel, *launched)), kernel(*launched))
launch.COMPILERS[np.ndarray] = compiler                  # on a device: cupy.RawKernel
launch._kernel.cache_clear()
try:
    y, want = (f(x)[0] for f in (layers.gelu_tanh, ft.ops.gelu_tanh.definition))
    print(f"on the CPU: {len(tape)} launch of {tape[0][1][0]} blocks of {tape[0][2][0]} threads, off by {abs(y - want).max():.0e}")
    assert len(tape) == 1 and tape[0][1] == (4,) and np.allclose(y, want, atol=1e-6)
except KernelError as e:                                 # no C++ compiler
    tape = print(f"what runs kernels is passed over: {e}")
# %% [markdown]
# ## Threads that meet
# The threads of a block share some memory, and run in **no** order; that a warp runs in step is no longer so. At `__syncthreads()` all wait for all.
# **Predict first.** What does this sum give without the first barrier? Without the second? If the idle leave? The CPU runs one thread until
# it waits, then the next, from 0 up or from 255 down. Shared memory is full of NaN at first.
# %%
TOTAL = """extern "C" __global__ void total(const float* x, float* y) {
  __shared__ float part[256]; int t = threadIdx.x; part[t] = x[t];
  __syncthreads();
  for (int half = 128; half; half /= 2) { if (t < half) part[t] += part[t + half]; __syncthreads(); }
  if (t == 0) y[0] = part[0]; }"""
def total(reverse, old, new):
    y = np.zeros(1, np.float32)
    try:
        with emulating(reverse, poison=255):
            CpuKernel(TOTAL.replace(old, new), "total")((1,), (256,), (np.arange(1, 257, dtype=np.float32), y))
        return y[0]
    except KernelError as e:
        return str(e).split("): ")[-1]
for name, *change in (("as it stands", "", ""), ("no first barrier", "\n  __syncthreads();", ""), ("no second", " __syncthreads(); }", "}"),
                      ("all write y", "if (t == 0) y[0] = part[0]", "y[0] = part[t]"), ("the idle leave", "if (t < half)", "if (t >= half) return;")):
    up, down = (tape and total(reverse, *change) for reverse in (0, 1))
    print(f"{name:18}up: {up}   down: {down if down != up or name[:2] == 'as' else 'the same'}")
    assert not tape or (up == 32896) == (name[:2] == "as") and (down == 32896) == ("leave" not in name)
# %% [markdown]
# Three faults of four are right in one of the orders: a test in one order passes them. The library's kernels, and yours, are run in both.
# ## Host and device
# The host runs ahead; a number it wants to see is waited for. CuPy refuses some mixtures, and lets others through, slow or undefined. The strict
# double refuses those too, and counts waits and copies. **Predict first**, line by line: fine, an error, a wait, a copy?
# %%
for text, line in {"x * 2.0": lambda x: x * 2.0, "x + host": lambda x: x + np.ones(1), "np.exp(x)": np.exp, "x[[0, 2]]": lambda x: x[[0, 2]],
                   "float(x.sum())": lambda x: float(x.sum()), "x[x > 0]": lambda x: x[x > 0],
                   "where(x > 0, x, 0)": lambda x: ft.strict.xp.where(x > 0, x, 0)}.items():
    try:
        said = "launches {0}, waits {2}, copies {3}".format(*cost(lambda line=line: line(device)))
    except (StrictError, TypeError) as e:
        said = str(e)
    print(f"{text:20}{said}")
    assert ("waits 0, copies 0" in said) == (text in ("x * 2.0", "where(x > 0, x, 0)"))
# %% [markdown]
# ## A step, on tape and counted
# A **CUDA graph** is a tape: launches recorded once, replayed by one call. It holds addresses and numbers, no Python. So a recorded step may not
# wait, nor copy from the host, nor ask `if`; its inputs come to one place; what goes by value is **baked in**. **Predict first.** Adam's $t$?
# And an optimiser with dozens of small tensors: laid end to end in one array, of which each is a **view**, how many launches do they take?
# %%
def replayed(by_value):
    "How far three steps of AdamW are from the right ones, if the first is recorded and replayed for the others."
    (w, g), m, v, rates = numbers(2, 1000), *np.zeros((2, 1000), np.float32), np.zeros(3, np.float32)
    right, ours = [k.copy() for k in (w, g, m, v)], SimpleNamespace(w=w, moments=(m, v), rounded=None, stored=w, betas=(0.9, 0.99), eps=1e-8)
    for t in (1, 2, 3):
        update(*right, 0.1, 0.9, 0.99, 1e-8, 0.01, t)
        rates[:] = now = optimizer.adam_rates(0.1, 0.9, 0.99, 0.01, t)                  # the one thing that is written between replays
        if t == 1:
            tape.clear()
            optimizer.update(ours, [(g, slice(0, 1000))], np.ones(2, np.float32), now if by_value else rates, ours)
        for kernel, *launched in tape if t > 1 else ():
            kernel(*launched)
    return abs(w - right[0]).max()
baked, read = (replayed(by_value) if tape else np.nan for by_value in (True, False))
print(f"at a rate of 0.1, off by {baked:.2f} with its numbers baked in, by {read:.0e} with numbers read from the device")
assert not tape or baked > 0.05 and read < 1e-5
home, ids = ft.backend(), np.arange(68).reshape(4, 17) % 64
ft.use("strict")
net, flat = ft.GPT(ft.GPTConfig(vocab=64, positions=32, width=32, layers=4, heads=2), seed=0), ft.AdamW(0.1)
flat.start(net.named_parameters())
zeros = [(p, 0 * p.data, 0 * p.data) for p in net.parameters()]
table = {"forward and back": cost(lambda: ft.train.batch.compute_loss(net, ft.train.batch.read_batch(ids))[1].backward()), "AdamW, end to end": cost(flat.step),
         "AdamW, one by one": cost(lambda: [update(p.data, p.grad, m, v, 0.1, 0.9, 0.99, 1e-8, 0.01, 1) for p, m, v in zeros])}
ft.use(home)
assert table["forward and back"][2:] == (0, 2) and table["AdamW, end to end"][0] < table["AdamW, one by one"][0] / 2
print(f"{'a GPT of ' + str(len(zeros)) + ' tensors':20}launches      MB   waits   copies   µs to launch   µs to move: by the formula")
for name, (launches, moved, waits, copies) in table.items():
    print(f"{name:20}{launches:8}{moved / 1e6:8.1f}{waits:8}{copies:9}{model(launches, 0) * 1e6:15,.0f}{moved / BANDWIDTH * 1e6:13.1f}")
# %% [markdown]
# So small a model waits for launches alone: fuse, lay flat, record. A large one waits for memory and products: fuse, and compute in fewer bits.
# **Exercises.** Kernels: `tinyft start add_bias`, `tinyft start sum_rows`. `tinyft start adam_rates` (not baked in), `tinyft start lay_out` (flat).
