"""The GPT training step of the benchmarks in tinygrad, on its default device. worker.py imports it and times `step`.

Only GPT, and only full fine-tuning. TinyJit compiles the step in its first calls, which are not timed. tinygrad's CPU
device needs clang.
"""

from __future__ import annotations

from collections.abc import Callable

from cases import Case, batch
from tinygrad import Context, Tensor, TinyJit, nn


class Block:
    def __init__(self, c: Case):
        self.c = c
        self.norm1 = nn.LayerNorm(c.C)
        self.qkv = nn.Linear(c.C, 3 * c.C)
        self.o = nn.Linear(c.C, c.C)
        self.norm2 = nn.LayerNorm(c.C)
        self.up = nn.Linear(c.C, 4 * c.C)
        self.down = nn.Linear(4 * c.C, c.C)

    def __call__(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.reshape(B, T, self.c.H, C // self.c.H).transpose(1, 2) for part in parts)
        y = q.scaled_dot_product_attention(k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(self.up(self.norm2(x)).gelu())


class Model:
    def __init__(self, c: Case):
        self.embed = nn.Embedding(c.V, c.C)
        self.pos = nn.Embedding(c.T, c.C)
        self.norm = nn.LayerNorm(c.C)
        self.blocks = [Block(c) for _ in range(c.L)]

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.pos.weight  # every batch has c.T positions
        for b in self.blocks:
            x = b(x)
        return self.norm(x) @ self.embed.weight.T


def build(c: Case) -> Model:
    return Model(c)


def start(model: Model, c: Case) -> tuple[Callable[[], float], int]:
    """(a function that takes one step and returns the loss, the number of trained parameters)."""
    data = batch(c)
    ids = Tensor(data["ids"].astype("int32"))
    labels = Tensor(data["labels"].astype("int32"))
    optimizer = nn.optim.AdamW(nn.state.get_parameters(model), lr=1e-3)

    @TinyJit
    def update(ids: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(ids).sparse_categorical_crossentropy(labels)
        loss.backward()
        return loss.realize(*optimizer.schedule_step())  # tinygrad is lazy: this computes loss and update together

    def step() -> float:
        with Context(TRAINING=1):  # tinygrad's optimisers refuse to step outside training mode
            return update(ids, labels).item()

    return step, sum(p.numel() for p in nn.state.get_parameters(model))
