"""Loss scaling, for gradients in float16.

The smallest positive number of float16 is 6e-8.  Many gradients of a transformer are smaller, and would become 0: about
a quarter of them for a loss over 500 tokens, and more for more tokens, since the loss is their mean.  So the loss is
multiplied by a scale S, and with it every gradient.  Before the gradients are used they are divided by S:

    backward from S ℓ;     g ← g / S;     then clip, then update

S is a power of two, so the multiplication is exact.  The largest S that does not overflow is found by trial: after N
good steps in a row S is doubled; when a gradient overflows, the step is skipped and S is halved.
Micikevicius et al. 2018, §3.2

bfloat16 has the range of float32 and needs no loss scaling.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

from .. import array, checks, ops
from ..array import Array
from ..keywords import checked_keywords
from ..tensor import Tensor
from .optimizers import Optimizer

LARGEST = 2.0**60                              # S times a loss, and squared in a norm, must stay finite in float32


@checked_keywords
class GradScaler:
    """The scale S of the loss.      As torch.amp.GradScaler

    init_scale        S at the start
    growth_factor     S is multiplied by this after growth_interval good steps in a row
    backoff_factor    S is multiplied by this after a skipped step
    enabled           False: S stays 1, and no step is skipped

        scaler.scale(loss).backward()
        scaler.step(optimizer, factor, clip=1.0)         # divide by S, clip, update; or skip, if a gradient overflowed
        scaler.update()
        optimizer.zero_grad()

    Its state is S, the number of good steps since S last changed, and `finite`: False if the last step was skipped."""

    def __init__(self, init_scale: float = 65536.0, growth_factor: float = 2.0, backoff_factor: float = 0.5,
                 growth_interval: int = 2000, enabled: bool = True):
        """ValueError unless growth_factor increases S and backoff_factor decreases it."""
        checks.number("init_scale", init_scale)
        checks.number("growth_factor", growth_factor)
        checks.number("backoff_factor", backoff_factor)
        checks.whole("growth_interval", growth_interval)
        checks.flag("enabled", enabled)
        if not (init_scale > 0 and growth_factor > 1 > backoff_factor > 0 and growth_interval > 0):
            raise ValueError(
                "a GradScaler wants init_scale > 0, growth_factor > 1 > backoff_factor > 0 and growth_interval > 0; "
                f"got {init_scale}, {growth_factor}, {backoff_factor}, {growth_interval}")
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.enabled = enabled
        self.current_scale = float(init_scale) if enabled else 1.0           # S
        self.good_steps = 0                                                  # since S last changed
        self.finite = True                                                   # False if the last step was skipped

    def get_scale(self) -> float:
        """The scale S."""
        return self.current_scale

    def scale(self, loss: Tensor) -> Tensor:
        """S times the loss, to call backward on.  CannotCapture in a captured step, where S could not change."""
        checks.instance("scale", loss, Tensor, "a Tensor, the loss")
        if not self.enabled:
            return loss
        if array.recording is not None:
            raise array.CannotCapture("the scale of the loss changes from step to step, and a replay cannot change it: "
                                      "capture a step in bfloat16, which needs no scale")
        return ops.mul(loss, self.current_scale)

    def step(self, optimizer: Optimizer, factor: float = 1.0, clip: float | None = None) -> Array | float:
        """optimizer.step(factor, clip) with gradients divided by S, the scale of the loss.  Returns their norm.

        If a gradient overflowed, nothing is updated and the norm is infinite.  FloatingPointError if a gradient is not
        finite though S is 1 or less: then S was not the cause."""
        checks.instance("step", optimizer, Optimizer, "an optimiser, such as AdamW(1e-3)")
        norm: Array | float = math.inf
        with self.skipping():
            norm = optimizer.step(factor, clip, scale=self.current_scale)
        return norm

    @contextlib.contextmanager
    def skipping(self, *losses: Array) -> Iterator[None]:
        """The context of an update.  A FloatingPointError of the update is caught: the step counts as skipped.

        Sets `finite`: False if the step was skipped.  An error that S, the scale of the loss, did not cause is raised:
        if S is 1 or less, or if one of these losses is not finite itself."""
        try:
            yield
            self.finite = True
        except FloatingPointError:
            losses_are_finite = all(math.isfinite(float(loss)) for loss in losses)
            if not self.enabled or self.current_scale <= 1 or not losses_are_finite:
                raise
            self.finite = False

    def update(self) -> None:
        """Adapt current_scale, which is S, after a step.

        If the step was skipped (`finite` is False), S is multiplied by backoff_factor.  After growth_interval good
        steps in a row it is multiplied by growth_factor, up to LARGEST.  `good_steps` counts the good steps; it is 0
        again after a skipped step, and after S has grown.  Unless `enabled`, nothing changes."""
        if not self.enabled:
            return
        if not self.finite:
            self.current_scale *= self.backoff_factor
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.current_scale = min(self.current_scale * self.growth_factor, LARGEST)
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """S, and the number of good steps since it last changed."""
        return {"scale": self.current_scale, "good": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load what state_dict gave.  TypeError or ValueError, with nothing changed, for anything else."""
        checks.instance("load_state_dict", state, Mapping, "a dict, from state_dict")
        if not {"scale", "good"} <= state.keys():
            raise ValueError(f"load_state_dict wants scale and good, got {checks.brief(list(state))}")
        checks.number("scale", state["scale"], above=0)
        checks.whole("good", state["good"], 0)
        self.current_scale = state["scale"]
        self.good_steps = state["good"]
