"""The training loop. `train_step` is one whole step.

A method has phases; a run has stages, made from the phases of all its methods (phases.py). A stage is the setup of one
method, or a stretch of training steps.

From `fit` to a matrix product a call passes these functions:

    fit                        the arguments, which settings.py checks
    run_stages                 the loop over steps, with evaluation, checkpoints and Ctrl-C
    train_step                 the parts of a step, in order
    add_gradients              forward and backward for each micro-batch: the part that a CUDA graph replays
    CrossEntropy.__call__      the loss; a user's own loss stands in its place
    GPT.forward, run_blocks, Block.forward, Attention.forward, project, Linear.forward
                               one function for each level of the model. Module.__call__ stands before every forward:
                               it applies the edits of the input and the output (Module.read: those of the weights)
    the op ops.linear          records the product for backward (tensor.py)
    dispatch.run               chooses the kernel for this kind of array
    the kernel                 computes the product

and to the equations of AdamW:

    fit, run_stages, train_step
    Optimizer.launch_step      all tensors at once, if there is a kernel for that (dispatch.run); else:
        update_pieces          clipping, and one update for each flat buffer
        AdamW.update           the arguments of the equations
        run_update             the kernel for them (dispatch.run); without a kernel:
        adam_update            the equations
"""
from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import array, checks, edit, kernels, precision, recomputation
from ..array import Array
from ..edit import Method
from ..files import read_tensors, sweep, write_tensors
from ..keywords import checked_keywords
from ..nn import Context, Module
from ..optim import AdamW, GradScaler, Optimizer, Schedule, constant_schedule
from ..tensor import Tensor
from . import checkpoint
from .batch import BatchStream, CrossEntropy, Loss, Targets, as_loss, is_causal, refuse_copies
from .phases import Stage, make_stages
from .settings import CHECKPOINT, Settings, check_arguments, make_folder
from .terminal import Progress, Stop, stop_requests


class Diverged(ArithmeticError):
    """Raised when the loss or the norm of the gradients is not finite."""


@checked_keywords
@dataclass
class History:
    """The record of a run.

    losses          the loss of every step, with penalties and auxiliary losses; CrossEntropy: nats, mean per label
    terms           {name: value of every step}: "loss" (the loss alone), "penalty.<method>", and the auxiliary losses
                    of the modules under their own names
    evaluations     (number of steps taken before it, metrics) of every evaluation
    stopped         the reason of an early stop, or ""
    skipped         the steps, counted from 0, that float16 skipped
    """
    losses: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    stopped: str = ""
    skipped: list[int] = field(default_factory=list)

    def add_step(self, loss: float, terms: dict[str, float]) -> None:
        """Append the values of one step. A term that is absent in a step counts 0 there."""
        for name in terms.keys() - self.terms.keys():
            self.terms[name] = [0.0] * len(self.losses)
        for name, values in self.terms.items():
            values.append(terms.get(name, 0.0))
        self.losses.append(loss)


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def fit(
    model: Module, batches: Any, steps: int, optimizer: Optimizer | None = None, schedule: Schedule | None = None, *,
    loss: Loss | None = None, clip: float | None = 1.0, accumulate: int = 1, seed: int = 0,
    out: str | os.PathLike | None = None, resume: bool = False, save_every: int = 100, progress: bool = True,
    evaluate: Callable[[], dict[str, float]] | None = None, evaluate_every: int = 0, patience: int = 0,
    monitor: str = "loss", autocast: Any = None, recompute: bool = False, capture: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> History:
    """Train the parameters that the attached methods train (without a method: all parameters), for `steps` updates.

    batches         an iterable of batches, repeated without end. If it has state_dict and load_state_dict
                    (data.Batches), a resumed run does not read the earlier batches again
    optimizer       AdamW(1e-3) if None
    schedule        (t, T) -> factor on the learning rate of step t of the T steps of a training phase
    loss            a Loss; CrossEntropy() if None
    clip            the largest norm of all gradients together (Pascanu et al. 2013); None: no limit
    accumulate      batches per update, weighted by their numbers of labels: the gradient is that of one large batch
    seed            of dropout, and of the random draws of the methods
    out             a folder for checkpoint.safetensors: written, atomically, every `save_every` steps (0: not), before
                    and after the setup of a phase, and at the end
    resume          continue from the checkpoint in `out`, bitwise as if never stopped; without one, start anew
    evaluate        returns metrics, {name: number}; called every `evaluate_every` steps, never if that is 0
    patience        if not 0: training stops after so many evaluations in a row without a better metric `monitor` (lower
                    is better for names that end in loss or perplexity). At the end of a training phase, the values of
                    its best evaluation are restored
    progress        a bar on a terminal and in notebooks, elsewhere a line every few seconds; then a last line (stderr)
    autocast        "bfloat16" or "float16": matrix products in 16 bits. With float16, steps that overflow are skipped
    recompute       a block keeps only its input, and runs again in the backward pass (tinyft.recompute): the memory of
                    activations falls, a step takes about a third longer, and the gradients are the same to the bit
    on_step         called after every step with the steps taken so far and the terms of the step's loss, for a log
    capture         on CuPy, replay each step as a CUDA graph (tinyft.capture): eight shapes of batches get a graph,
                    others run as without. Ignored on NumPy. CannotCapture for accumulate > 1, float16, recompute,
                    methods that override begin or step, and optimisers without a kernel for it

    Ctrl-C finishes the step, writes the checkpoint and raises KeyboardInterrupt; with `out`, SIGTERM does the same and
    raises SystemExit(143). The checkpoint is also written if `evaluate`, a batch or the forward pass raises.
    Diverged if a loss or a norm of gradients is not finite; then nothing was updated or written. Before training:
    TypeError or ValueError for arguments that make no sense, if nothing trains, if the checkpoint is of another run,
    and if `out` holds a run and resume is False. Afterwards the model evaluates (model.eval()), without gradients.
    """
    loss = as_loss(loss)
    optimizer = AdamW(1e-3) if optimizer is None else optimizer
    schedule = constant_schedule() if schedule is None else schedule
    settings = Settings(
        steps=steps, clip=clip, accumulate=accumulate, seed=seed, save_every=save_every,
        evaluate=evaluate, evaluate_every=evaluate_every, patience=patience, monitor=monitor,
        autocast=autocast, recompute=recompute, capture=capture, on_step=on_step,
    )
    check_arguments(model, optimizer, schedule, out, resume=resume, progress=progress)
    rng = np.random.default_rng(settings.seed)
    run = Run(model, loss, BatchStream(batches), optimizer, schedule, rng, settings, out)
    run.prepare(resume)
    run_stages(run, progress)
    return run.history


def run_stages(run: Run, progress: bool) -> None:
    """The loop of fit: the steps of all remaining stages, with evaluations, checkpoints, signals and progress."""
    settings = run.settings
    shown = Progress(settings.steps, run.done, visible=progress)
    try:
        run.set_training_mode(True)
        with stop_requests(on_sigterm=run.path is not None) as stop:
            for stage in run.remaining_training_stages():
                run.evaluate_if_due()                                   # a resumed run whose evaluation had raised
                while run.t < stage.steps and not run.history.stopped:
                    train_step(run, stage.steps)
                    run.report_step()
                    run.evaluate_if_due()
                    shown.show(run.done, run.history.losses[-1], run.tokens)
                    if stop.signal_number:
                        run.stop(stop)
                    if settings.save_every and run.done % settings.save_every == 0:
                        run.save()
            if stop.signal_number:                                      # it came after the last step, in a setup
                run.stop(stop)
        run.save()
        shown.finish(run.done, run.history.losses, run.history.stopped)
    finally:
        shown.close()
        run.set_training_mode(False)
        run.zero_grad()


def train_step(run: Run, T: int) -> None:
    """Step run.t of the T steps of a training stage: one update of the trainable parameters.

    Diverged if the loss or the norm of the gradients is not finite; in float16 such a step is skipped."""
    attached = edit.attached(run.model)
    norm = None
    with run.keeping_last_step():
        batches = run.read_batches()
        factor = run.read_factor(T)                                     # the learning rate is optimizer.lr · factor
        for a in attached:
            a.method.begin(a.edits, run.t, T, run.rng)
        if run.replay is None:
            loss, terms = add_gradients(run, batches, run.rng)
    if run.replay is not None:
        loss, terms, norm = replay_step(run, batches[0], factor)
    try:
        # float16: if gradients overflow, `skipping` catches the error, and sets scaler.finite to False
        with run.scaler.skipping(loss):
            if norm is None:
                norm = run.optimizer.launch_step(factor, run.settings.clip, loss, run.scaler.get_scale())
            # the one time that a step waits for the device
            loss_value, norm_value, term_values = read_values(loss, norm, terms)
            run.optimizer.check_norm(norm_value)
    except FloatingPointError as error:
        raise Diverged(explain_divergence(run, float(loss), factor, error)) from error

    if run.scaler.finite:
        for a in attached:
            a.method.step(a.edits, run.t, T)                            # the gradients are still there
    else:                                                               # a skipped step: nothing was updated
        run.history.skipped.append(run.done)
        # If launch_step raised, the values were not read.
        loss_value, _, term_values = read_values(loss, math.inf, terms)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.history.add_step(loss_value, term_values)
    run.t += 1
    run.done += 1


def add_gradients(run: Run, batches: list[Targets], rng: np.random.Generator) -> tuple[Array, dict[str, Any]]:
    """Forward and backward. Adds the gradients of the mean loss over all micro-batches to the parameters.

    Returns (mean loss, {name: term}), scalars on the device. The terms are empty if the loss has one term only.
    """
    total_weight = sum(targets.weight for targets in batches)
    total = None
    totals: dict[str, Any] = {}
    for targets in batches:
        if targets.weight == 0:                                         # its share is 0, and its own mean 0 / 0
            continue
        with run.autocast(), recomputation.recompute(run.settings.recompute), np.errstate(**run.ignored_warnings):
            ctx, loss = run.loss(run.model, targets, rng)
            added = compute_added_terms(run, ctx)
            terms = {"loss": loss, **added}
            for value in added.values():
                loss = loss + value
        share = targets.weight / total_weight
        if len(batches) > 1:
            loss = loss * share                                         # Σ wᵢ ℓᵢ / Σ wᵢ, not a mean of means
        with np.errstate(**run.ignored_warnings):
            run.scaler.scale(loss).backward()
        total = loss.data if total is None else total + loss.data
        if len(terms) > 1:
            for name, value in terms.items():
                value = value.data if isinstance(value, Tensor) else value
                value = value * share if len(batches) > 1 else value
                totals[name] = totals[name] + value if name in totals else value
    return total, totals


def compute_added_terms(run: Run, ctx: Context) -> dict[str, Any]:
    """The terms that are added to the loss: "penalty.<name>" of every method that has one, and the auxiliary losses.

    ValueError if an auxiliary loss has a name that fit logs itself."""
    terms = {}
    for a in edit.attached(run.model):
        if type(a.method).penalty is not Method.penalty:                # the default penalty is no term
            terms[f"penalty.{a.name}"] = a.method.penalty(a.edits, run.model, ctx)
    taken = {"loss", *terms}
    for name, value in ctx.losses.items():
        if name in taken:
            raise ValueError(f"add_loss wants another name than {name!r}, which fit logs itself")
        terms[name] = value
    return terms


def read_values(loss: Array, norm: Any, terms: dict[str, Any]) -> tuple[float, float, dict[str, float]]:
    """The loss, the norm and all terms as Python floats, in one transfer from the device.

    Without terms (see add_gradients), the only term is the loss.
    """
    on_device = {name: value for name, value in terms.items() if not isinstance(value, float)}
    loss_value, norm_value, *values = array.numbers(loss, norm, *on_device.values())
    host = {name: float(value) for name, value in terms.items() if isinstance(value, float)}
    by_name = host | dict(zip(on_device, values))
    return loss_value, norm_value, {name: by_name[name] for name in terms} or {"loss": loss_value}


def explain_divergence(run: Run, loss: float, factor: float, error: FloatingPointError) -> str:
    """The message of Diverged."""
    step = run.done + 1
    if math.isfinite(loss):
        return (f"{error} at step {step}: lower the learning rate or warm up longer; "
                "tinyft.detect_anomaly() names the op")
    rate = run.optimizer.lr * factor
    return (f"the loss is {loss} at step {step} (learning rate {rate:.2g}): lower the learning rate or warm up longer; "
            "tinyft.detect_anomaly() names the op where it began")


# ── a step as one CUDA graph ─────────────────────────────────────────────────────────────────────────────────────────
def replay_step(run: Run, targets: Targets, factor: float) -> tuple[Array, dict[str, Any], Array]:
    """A step replayed as a CUDA graph: (loss, terms, norm). The batch is checked on the host, since a graph cannot."""
    run.loss.check(run.model, targets)
    # With one batch per update the weight cancels out. It is replaced by the int 1, a constant of the graph: a float
    # that changes may be used by the optimiser only.
    fields = vars(targets) | {"weight": 1}
    return run.replay(type(targets), fields, float(factor), run.rng)


def captured_step(
    run: Run, kind: type[Targets], fields: dict[str, Any], factor: Any, rng: Any,
) -> tuple[Array, dict[str, Any], Array]:
    """The step that is captured: forward, backward and update on one batch."""
    loss, terms = add_gradients(run, [kind(**fields)], rng)
    norm = run.optimizer.launch_step(factor, run.settings.clip, loss)
    run.optimizer.zero_grad()
    return loss, terms, norm


def check_capture(run: Run) -> None:
    """CannotCapture for a run whose steps a graph cannot hold."""
    if run.settings.accumulate > 1:
        raise array.CannotCapture(f"gradients of {run.settings.accumulate} batches are added up before an update: "
                                  "capture wants accumulate=1")
    if run.settings.recompute:
        raise array.CannotCapture("recompute runs blocks again with a copy of the random generator, which a captured "
                                  "step does not have: fit with one of capture and recompute")
    for a in edit.attached(run.model):
        kind = type(a.method)
        if kind.begin is not Method.begin or kind.step is not Method.step:
            raise array.CannotCapture(f"{kind.__name__} has work of its own before or after each step, which a replay "
                                      "would leave out: fit it without capture")


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Run:
    """Settings and progress of one call of `fit`."""

    def __init__(
        self, model: Module, loss: Loss, stream: BatchStream, optimizer: Optimizer, schedule: Schedule,
        rng: np.random.Generator, settings: Settings, out: str | os.PathLike | None = None,
    ):
        self.model = model
        self.loss = loss
        self.stream = stream
        self.optimizer = optimizer
        self.schedule = schedule
        self.rng = rng
        self.settings = settings
        self.path = None if out is None else Path(out) / CHECKPOINT
        self.scaler = GradScaler(enabled=settings.autocast == "float16")
        self.ignored_warnings = {"over": "ignore", "invalid": "ignore"} if self.scaler.enabled else {}
        self.stages = make_stages(edit.attached(model), settings.steps)
        self.history = History()
        self.stage_index = 0                                            # of the current stage
        self.t = 0                                                      # steps taken in this stage
        self.done = 0                                                   # steps taken in all
        self.first_evaluation = 0                                       # index of this stage's first, in the history
        self.best: dict[str, np.ndarray] | None = None                  # values at the best evaluation of this stage
        self.optimizer_state: dict[str, np.ndarray] | None = None       # from a checkpoint, for the next start
        self.replay: Callable | None = None                             # the captured step
        self.tokens = 0                                                 # read so far, for the progress bar
        if loss.module is not None:
            loss.module.to(array.name_of(model.parameters()[0].data))
        # Versions at the start. A tensor with another version when a checkpoint is saved is saved in it.
        self.first_versions = {name: p.version[0] for name, p in checkpoint.named_tensors(model, loss).items()}
        self.wants_next_ids = isinstance(loss, CrossEntropy) and is_causal(model)
        self.identity = checkpoint.describe_run(self) if self.path else {}
        self.saved_at: tuple | None = None                              # the position of the last checkpoint written
        if settings.capture:
            check_capture(self)

    def read_batches(self) -> list[Targets]:
        """The batches of one step. ValueError if none of their labels has a weight."""
        batches = [self.read_batch() for _ in range(self.settings.accumulate)]
        weights = [targets.weight for targets in batches]
        if not sum(weights) > 0 or min(weights) < 0:
            raise ValueError("a step wants a label whose class weight is not 0, got batches of weights "
                             f"{', '.join(map(str, weights))}")
        return batches

    def read_batch(self) -> Targets:
        """The next batch of the stream. The pass will keep hidden states if the loss or a method wants them."""
        batch = next(self.stream)
        targets = self.loss.read(batch)
        if self.wants_next_ids:
            refuse_copies(batch)
        wants = [self.loss.hidden_states, *(a.method.hidden_states for a in edit.attached(self.model))]
        targets.output_hidden_states = any(wants)
        self.tokens += math.prod(targets.ids.shape[:2])
        return targets

    def read_factor(self, T: int) -> float:
        """The factor on the learning rate at this step. TypeError or ValueError if it is no number >= 0."""
        factor = self.schedule(self.t, T)
        if callable(factor):
            raise TypeError("schedule wants a function (t, T) -> factor, got one that returns a function: call it")
        return checks.number("the factor of a schedule", factor, 0)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass: 16-bit products, if the settings ask for them."""
        name = self.settings.autocast
        return precision.autocast(name or "bfloat16", enabled=name is not None)

    # ── stages ──
    def remaining_training_stages(self) -> Iterator[Stage]:
        """Go through the remaining stages: run the setups, and yield each training stage to the loop of fit.

        The best values of a training stage are restored when the loop asks for the next stage.
        """
        while self.stage_index < len(self.stages):
            stage = self.stages[self.stage_index]
            # After an early stop only the final setups run. A stage with t > 0 is resumed all the same: its best values
            # are still to be restored.
            is_skipped = bool(self.history.stopped) and self.t == 0 and not stage.is_final
            if stage.setup is not None and not is_skipped:
                self.run_setup(stage)
            elif not is_skipped:
                self.start()
                yield stage
                self.restore_best()
            self.stage_index += 1
            self.t = 0
            if stage.setup is not None and not is_skipped:
                self.save()

    def start(self) -> None:
        """Start the optimiser for a training stage, or continue it from a checkpoint."""
        self.optimizer.start(checkpoint.trainable_tensors(self.model, self.loss))
        if self.optimizer_state is not None:
            self.optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None
        if self.t == 0:
            self.first_evaluation = len(self.history.evaluations)
        if self.settings.capture:
            step = functools.partial(captured_step, self)
            self.replay = kernels.capture(step, fallback=step)          # further shapes run uncaptured

    def run_setup(self, stage: Stage) -> None:
        """Run the setup of a method, once. A process that is killed in it starts it again from the checkpoint."""
        self.save()
        before = {name: p.shape for name, p in checkpoint.named_tensors(self.model, self.loss).items()}
        stage.setup(self.model, stage.attached.edits, self.stream, self.rng)
        after = {name: p.shape for name, p in checkpoint.named_tensors(self.model, self.loss).items()}
        if before != after:
            raise ValueError(f"the setup of {stage.attached.name} changed names or shapes of tensors, "
                             "which a checkpoint cannot restore")
        self.zero_grad()

    def report_step(self) -> None:
        """Call settings.on_step with the number of steps taken and the terms of the last step's loss."""
        if self.settings.on_step is not None:
            last = {name: values[-1] for name, values in self.history.terms.items()}
            self.settings.on_step(self.done, last)

    # ── evaluation ──
    def evaluate_if_due(self) -> None:
        """Evaluate every settings.evaluate_every steps. If it raises, the checkpoint is written."""
        every = self.settings.evaluate_every
        is_due = self.settings.evaluate and every and self.done and self.done % every == 0
        evaluations = self.history.evaluations
        if not is_due or (evaluations and evaluations[-1][0] == self.done):
            return
        with self.keeping_last_step():
            self.run_evaluation()

    def run_evaluation(self) -> None:
        """Evaluate. Copy the state if it is the best of this stage; set history.stopped if patience has run out."""
        self.set_training_mode(False)
        metrics = self.settings.evaluate()
        self.set_training_mode(True)
        checks.instance("evaluate", metrics, Mapping, "to return metrics, {name: number}")
        metrics = {name: as_float(name, value) for name, value in metrics.items()}
        self.history.evaluations.append((self.done, metrics))
        monitor = self.settings.monitor
        if not self.settings.patience:
            return
        if monitor not in metrics:
            raise KeyError(f"fit wants evaluate to return its monitor {monitor!r}, got {', '.join(metrics)}")
        sign = -1 if monitor.endswith(("loss", "perplexity")) else 1
        scores = []
        for _, metrics in self.history.evaluations[self.first_evaluation:]:
            value = metrics[monitor]
            scores.append(sign * value if math.isfinite(value) else -math.inf)
        best = scores.index(max(scores))
        if best == len(scores) - 1:
            self.best = checkpoint.copy_values(self)
        if len(scores) - 1 - best >= self.settings.patience:
            self.history.stopped = f"no better {monitor} in {self.settings.patience} evaluations"

    def restore_best(self) -> None:
        """Restore the values of the best evaluation, if early stopping recorded one."""
        if self.best is not None:
            checkpoint.load_values(self, self.best)
            self.best = None

    def set_training_mode(self, on: bool) -> None:
        """Set the mode of the model and of the loss's module. A frozen teacher in the loss keeps its mode."""
        self.model.train(on)
        if self.loss.module is not None:
            self.loss.module.train(on)

    def zero_grad(self) -> None:
        """Clear the gradients of all tensors."""
        for p in checkpoint.named_tensors(self.model, self.loss).values():
            p.grad = None

    # ── state ──
    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, values that JSON can hold) of the whole run."""
        return checkpoint.state_dict(self)

    def load_state_dict(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        """Go to the state that `state_dict` gave. ValueError, naming the first difference, if it is of another run."""
        checkpoint.load_state_dict(self, arrays, facts)

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        if self.path:
            write_tensors(self.path, *self.state_dict())
            self.saved_at = self.position()

    def position(self) -> tuple[int, int, int]:
        """The position in the run: the stage, the steps, the evaluations."""
        return self.stage_index, self.done, len(self.history.evaluations)

    @contextlib.contextmanager
    def keeping_last_step(self) -> Iterator[None]:
        """The context of code that updates nothing. If it raises, the checkpoint of the last whole step is written.

        The position in the batches and the random state are those from the start of the block. Nothing is written
        before the first step, nor if the folder holds this state. A full disk must not hide the exception."""
        if not self.path:
            yield
            return
        before = {"batches": self.stream.state_dict(), "rng": self.rng.bit_generator.state}
        try:
            yield
        except Exception:
            if self.position() not in ((0, 0, 0), self.saved_at):
                arrays, facts = self.state_dict()
                with contextlib.suppress(OSError):
                    write_tensors(self.path, arrays, facts | before)
            raise

    def stop(self, request: Stop) -> None:
        """Write the checkpoint, and raise what the request to stop asks for, with the number of steps taken."""
        self.save()
        advice = "; fit(..., resume=True) goes on" if self.path else ""
        request.carry_out(f"stopped after step {self.done} of {self.settings.steps}{advice}")

    def prepare(self, resume: bool) -> None:
        """Remove the temporary files of a run that was killed; with resume, go to the state in the checkpoint.

        Make the folder: one that cannot be made must be noticed before training. OSError."""
        kernels.keep_memory()                                           # freed memory stays with the process: faster
        if self.path is None:
            return
        make_folder(self.path.parent)
        sweep(self.path)
        if resume and self.path.exists():
            self.load_state_dict(*read_tensors(self.path))
            self.saved_at = self.position()


def as_float(name: str, value: Any) -> float:
    """A metric as a float; NaN and infinity are possible. TypeError for anything but one number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"evaluate wants to return numbers, got {checks.brief(value)} for {name!r}") from None
