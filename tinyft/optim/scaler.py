"""Loss scaling, for gradients in float16.

The smallest number of float16 is 6e-8, and many gradients of a transformer are smaller (a quarter, of 500 tokens; the more, the more tokens
the loss is the mean of): they would be 0.  So the loss is multiplied by S, and with it every gradient on the way back; before the gradients are
used they are divided by S again:

    backward from S ℓ;     g ← g / S;     then clip, then update

S is a power of two, which costs no digit.  The largest that does not overflow is found by trying: after N good steps in a row it is doubled;
when a gradient overflows, the step is skipped and S halved.      Micikevicius et al. 2018, §3.2;  names as torch.amp.GradScaler

bfloat16 reaches as far as float32 and needs none of this.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from .. import array, ops
from ..array import Array
from ..tensor import Tensor
from .optimizers import Optimizer

LARGEST = 2.0**60                                        # S, times a loss and squared in a norm, stays inside float32


class GradScaler:
    """init_scale: S at the start;  growth_factor, growth_interval: how S grows, after so many good steps in a row;  backoff_factor: how it shrinks.

        scaler.scale(loss).backward()
        scaler.step(optimizer, factor, clip=1.0)         # g / S, clip, update; or nothing, if a gradient overflowed
        scaler.update()
        optimizer.zero_grad()

    enabled=False: S = 1 for good, and nothing is skipped."""

    def __init__(self, init_scale: float = 65536.0, growth_factor: float = 2.0, backoff_factor: float = 0.5, growth_interval: int = 2000,
                 enabled: bool = True):
        if not (init_scale > 0 and growth_factor > 1 > backoff_factor > 0 and growth_interval > 0):
            raise ValueError("a GradScaler wants init_scale > 0, growth_factor > 1 > backoff_factor > 0 and growth_interval > 0; got "
                             f"{init_scale}, {growth_factor}, {backoff_factor}, {growth_interval}")
        self.growth_factor, self.backoff_factor, self.growth_interval, self.enabled = growth_factor, backoff_factor, growth_interval, enabled
        self.now, self.good, self.finite = float(init_scale) if enabled else 1.0, 0, True

    def get_scale(self) -> float:
        "S"
        return self.now

    def scale(self, loss: Tensor) -> Tensor:
        "S ℓ, to call backward on.  CannotCapture in a captured step: S is another number at other steps."
        if self.enabled and array.recording is not None:
            raise array.CannotCapture("the scale of the loss changes from step to step, which a replay could not: capture a step in bfloat16, "
                                      "which needs none")
        return ops.mul(loss, self.now) if self.enabled else loss

    def step(self, optimizer: Optimizer, factor: float = 1.0, clip: float | None = None) -> Array | float:
        """optimizer.step(factor, clip) with the gradients divided by S; returns their norm.  If they overflowed: infinity, and nothing was updated.

        FloatingPointError if they are not finite though S is 1 or less: then it was not the scale."""
        norm: Any = math.inf
        with self.skipping():
            norm = optimizer.step(factor, clip, scale=self.now)
        return norm

    @contextlib.contextmanager
    def skipping(self, *losses: Array) -> Iterator[None]:
        """with scaler.skipping(): an update, which may find that the gradient's norm is not finite, and raise.  That is noted, and the step skipped.

        FloatingPointError all the same where it was not the scale: S is 1 or less, or one of the losses is not finite itself."""
        try:
            yield
            self.finite = True
        except FloatingPointError:
            if not self.enabled or self.now <= 1 or not all(math.isfinite(float(loss)) for loss in losses):
                raise
            self.finite = False

    def update(self) -> None:
        "After a step: S is multiplied by backoff_factor if it was skipped, by growth_factor if it was the last of growth_interval good ones."
        if not self.enabled:
            return
        self.good = self.good + 1 if self.finite else 0
        if not self.finite:
            self.now *= self.backoff_factor
        elif self.good == self.growth_interval:
            self.now, self.good = min(self.now * self.growth_factor, LARGEST), 0

    def state(self) -> dict[str, float]:
        "What a later process needs to go on: S, and the good steps since it last changed."
        return {"scale": self.now, "good": self.good}

    def load(self, state: dict[str, float]) -> None:
        "The state that `state` gave."
        self.now, self.good = state["scale"], state["good"]
