"""The checkpoint of a run: everything that a later process needs to go on as if the run had never stopped.

Tensors in the file:

    model/<name>        a tensor or buffer of the model: of an edit, or one that trains, or one that a setup changed
    loss/<name>         a tensor or buffer of the loss's module
    mask/<name>         the mask of a tensor
    optimizer/<key>     the state of the optimiser, once the training phase has taken a step
    best/...            model/, loss/ and mask/ of the best evaluation of the phase

Facts in its header: the settings that a resumed run must share, the position in the run, the random state, the history.
"""
from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import array, checks, edit
from ..array import Array
from ..identity import complete, describe
from ..nn import Module
from ..optim import GradScaler, Optimizer
from ..tensor import Tensor
from .batch import CrossEntropy, Loss
from .same_run import (
    LONGEST_CALL,
    check_base,
    check_identity,
    complete_call,
    complete_schedule,
    describe_base,
    describe_data,
    describe_loss,
    describe_schedule,
    one_line,
    read_call,
    to_text,
)

Run = Any                                                               # loop.Run; loop imports this module
VERSION = 2                                                             # of the facts in the header
# The facts of a checkpoint beside those of describe_run.
POSITION = (
    "stage", "t", "done", "first_evaluation", "trainable", "shared_masks", "rng", "batches", "scaler", "history",
)


# ── names of tensors ─────────────────────────────────────────────────────────────────────────────────────────────────
def named_tensors(model: Module, loss: Loss) -> dict[str, Tensor]:
    """All tensors of a run by name; a tensor of the loss's module has "loss." before its name."""
    named = dict(model.named_parameters())
    if loss.module is not None:
        named |= {f"loss.{name}": p for name, p in loss.module.named_parameters().items()}
    return named


def trainable_tensors(model: Module, loss: Loss) -> dict[str, Tensor]:
    """The tensors that an optimiser updates, by name."""
    return {name: p for name, p in named_tensors(model, loss).items() if p.requires_grad}


def named_buffers(model: Module, loss: Loss) -> dict[str, Array]:
    """The buffers that training may change, by name: those of the edits and of the loss's module, if it has one.

    A buffer is an array that a module owns and that gets no gradient. The loss's have "loss." before their names.
    """
    named = {}
    for attached in edit.attached(model):
        state = edit.named_state(model, attached)
        named |= {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    if loss.module is not None:
        named |= {f"loss.{name}": value for name, value in loss.module.named_buffers(persistent_only=True).items()}
    return named


def saved_tensors(run: Run) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds, by name.

    They are the tensors of all edits, the trainable tensors, the tensors that were written to since the start of the
    run (by the setup of a phase), and the tensors of the loss's module. All others are as at the start of the run.
    """
    model, loss = run.model, run.loss
    always_saved = set(trainable_tensors(model, loss))
    for attached in edit.attached(model):
        always_saved |= set(edit.named_state(model, attached))           # also names of buffers: see named_buffers
    saved = {}
    for name, p in named_tensors(model, loss).items():
        is_written = p.version[0] != run.first_versions[name]            # a version is the number of the last write
        if name in always_saved or is_written or name.startswith("loss."):
            saved[name] = p
    return saved


def file_name(name: str) -> str:
    """The name in the file: "loss.W" is loss/W, any other name is model/name."""
    return f"loss/{name.removeprefix('loss.')}" if name.startswith("loss.") else f"model/{name}"


# ── values and masks ─────────────────────────────────────────────────────────────────────────────────────────────────
def copy_values(run: Run) -> dict[str, np.ndarray]:
    """Copies of all values, buffers and masks, on the host, under their names in the file."""
    arrays = {file_name(name): p.data for name, p in saved_tensors(run).items()}
    arrays |= {file_name(name): buffer for name, buffer in named_buffers(run.model, run.loss).items()}
    arrays |= {f"mask/{name}": p.mask for name, p in named_tensors(run.model, run.loss).items() if p.mask is not None}
    return {name: np.array(array.asnumpy(a)) for name, a in arrays.items()}


def load_values(run: Run, arrays: Mapping[str, np.ndarray]) -> None:
    """Write values, buffers and masks that `copy_values` gave into the model and the loss's module.

    arrays: by their names in the file. A mask restricts which entries of a tensor an optimiser may change; a tensor
    without one in `arrays` has none after this. ValueError if they are of other tensors; then nothing is changed.
    """
    check_values(run, arrays)
    tensors, buffers = destinations(run)
    for name, value in arrays.items():
        if name in tensors:
            tensors[name].copy_(value)
        elif name in buffers:
            buffer = buffers[name]                                      # in place: other parts may hold the same array
            buffer[...] = array.put_like(value, buffer, buffer.dtype)
    for name, p in named_tensors(run.model, run.loss).items():
        set_mask(p, arrays.get(f"mask/{name}"))


def destinations(run: Run) -> tuple[dict[str, Tensor], dict[str, Array]]:
    """(tensors, buffers) that a checkpoint may hold, by their names in the file."""
    tensors = {file_name(name): p for name, p in named_tensors(run.model, run.loss).items()}
    buffers = {file_name(name): buffer for name, buffer in named_buffers(run.model, run.loss).items()}
    return tensors, buffers


def check_values(run: Run, arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError, naming the first ones, if values, buffers or masks do not fit this run's tensors."""
    tensors, buffers = destinations(run)
    masked = named_tensors(run.model, run.loss)
    fitting = tensors | buffers
    required = {file_name(name) for name in saved_tensors(run)} | set(buffers)      # must be among the arrays
    wrong = sorted(required - set(arrays))
    for name in sorted(arrays):
        if name.startswith("mask/"):
            p = masked.get(name.removeprefix("mask/"))
            fits = p is not None and broadcasts_to(arrays[name].shape, p.shape)
        else:
            target = fitting.get(name)
            fits = target is not None and target.shape == arrays[name].shape and target.dtype == arrays[name].dtype
        if not fits:
            wrong.append(name)
    if wrong:
        names = ", ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "")
        raise ValueError(f"this checkpoint is of another run: {names} not in both, or of another shape or dtype")


def broadcasts_to(shape: tuple, wanted: tuple) -> bool:
    """True if an array of the one shape can be broadcast to the other."""
    ends = zip(reversed(shape), reversed(wanted))
    return len(shape) <= len(wanted) and all(size in (1, other) for size, other in ends)


def set_mask(p: Tensor, mask: np.ndarray | None) -> None:
    """Set the mask of a tensor, on its device; None removes it.

    A mask of the same shape is overwritten in place, since an edit may hold the same array.
    """
    if mask is None:
        p.mask = None
    elif p.mask is None or p.mask.shape != mask.shape:
        p.mask = array.put_like(mask, p.data)
    else:
        p.mask[...] = array.put_like(mask, p.data)


def shared_masks(run: Run) -> dict[str, str]:
    """{name of a tensor: name of a buffer} where the tensor's mask is that buffer itself."""
    buffers = {id(buffer): name for name, buffer in named_buffers(run.model, run.loss).items()}
    tensors = named_tensors(run.model, run.loss)
    return {name: buffers[id(p.mask)] for name, p in tensors.items() if id(p.mask) in buffers}


# ── the whole run ────────────────────────────────────────────────────────────────────────────────────────────────────
def state_dict(run: Run) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts): all that a later process needs to continue the run. facts can be written as JSON.

    The arrays are the values as copy_values gives them, the optimiser's state as optimizer/<key>, and the values at the
    best evaluation as best/<name>. shared_masks names the masks that are the very array of a buffer.
    """
    arrays = copy_values(run)
    if run.t > 0:                                                       # steps were taken in this stage
        arrays |= {f"optimizer/{key}": value for key, value in run.optimizer.state_dict().items()}
    arrays |= {f"best/{name}": value for name, value in (run.best or {}).items()}
    facts = dict(
        run.identity, version=2, stage=run.stage_index, t=run.t, done=run.done, first_evaluation=run.first_evaluation,
        trainable=sorted(trainable_tensors(run.model, run.loss)), shared_masks=shared_masks(run),
        rng=run.rng.bit_generator.state, batches=run.stream.state_dict(), scaler=run.scaler.state_dict(),
        history=vars(run.history),
    )
    return arrays, facts


def load_state_dict(run: Run, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Go to the state that `state_dict` gave. ValueError if it is of another run, naming the first difference.

    All is checked before anything is written. The optimiser is not started yet: its state waits in run.optimizer_state
    until the stage starts it.
    """
    arrays, facts = check_state(run, arrays, facts)
    load_batches(run, facts)                                            # the last check: other batches raise
    load_values(run, values_in(arrays))
    tensors = named_tensors(run.model, run.loss)
    for name, p in tensors.items():
        p.requires_grad = name in facts["trainable"]
    buffers = named_buffers(run.model, run.loss)
    for name, buffer in facts["shared_masks"].items():
        tensors[name].mask = buffers[buffer]                            # the same array again, not a copy
    run.stage_index = facts["stage"]
    run.t = facts["t"]
    run.done = facts["done"]
    run.first_evaluation = facts["first_evaluation"]
    run.best = part(arrays, "best/") or None
    run.optimizer_state = part(arrays, "optimizer/") or None
    run.rng.bit_generator.state = facts["rng"]
    run.scaler.load_state_dict(facts["scaler"])
    for name, value in facts["history"].items():
        setattr(run.history, name, value)
    run.history.evaluations = [(step, metrics) for step, metrics in run.history.evaluations]        # JSON has no tuples


def values_in(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values, buffers and masks among the arrays of a checkpoint: not the optimiser's state, nor the best ones."""
    return {name: value for name, value in arrays.items() if not name.startswith(("optimizer/", "best/"))}


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


# ── the checks before a checkpoint is loaded ─────────────────────────────────────────────────────────────────────────
def check_state(
    run: Run, arrays: dict[str, np.ndarray], facts: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts) of a checkpoint in today's form. ValueError if they do not fit this run. Nothing changes."""
    if not isinstance(facts, dict) or "done" not in facts:
        raise ValueError("this is no checkpoint of fit: it does not hold the position in a run")
    if "version" not in facts:
        try:
            arrays, facts = from_version_0_1(run, arrays, facts)
        except (KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError) as e:
            raise ValueError(f"this is no checkpoint of fit: {checks.brief(e)}") from e
    facts = complete_facts(run, facts)
    content = ("base", "data")                                          # compared below, when the names are known
    check_identity({key: value for key, value in run.identity.items() if key not in content}, facts)
    try:
        check_position(run, facts)
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise ValueError(f"this is no checkpoint of fit: {e}") from e
    check_values(run, values_in(arrays))
    if best := part(arrays, "best/"):
        check_values(run, best)
    check_optimizer_state(run, part(arrays, "optimizer/"), facts)
    held = {name.removeprefix("model/") for name in arrays}
    check_base(run.identity.get("base"), facts.get("base"), held)
    return arrays, facts


def check_position(run: Run, facts: dict[str, Any]) -> None:
    """KeyError, TypeError or ValueError if a fact of the position in a run is missing or makes no sense."""
    missing = sorted(set(POSITION) - facts.keys())
    if missing:
        raise ValueError(f"it does not hold {', '.join(missing)}")
    if checks.whole("version", facts.get("version", VERSION), 1) > VERSION:
        raise ValueError(f"a later version of the library wrote it, version {facts['version']} of its form")
    checks.whole("stage", facts["stage"], 0, len(run.stages))
    for name in ("t", "done"):
        checks.whole(name, facts[name], 0, run.settings.steps)
    checks.instance("trainable", facts["trainable"], list, "a list of names")
    checks.instance("shared_masks", facts["shared_masks"], dict, "a dict of names")
    unknown = {*facts["trainable"], *facts["shared_masks"]} - named_tensors(run.model, run.loss).keys()
    unknown |= set(facts["shared_masks"].values()) - named_buffers(run.model, run.loss).keys()
    if unknown:
        raise ValueError(f"it names {', '.join(sorted(map(str, unknown))[:3])}, which are not in the model")
    np.random.default_rng(0).bit_generator.state = facts["rng"]
    GradScaler().load_state_dict(facts["scaler"])
    check_history(checks.instance("history", facts["history"], dict, "a dict"), vars(run.history))
    checks.whole("first_evaluation", facts["first_evaluation"], 0, len(facts["history"]["evaluations"]))


def check_history(history: dict[str, Any], own: dict[str, Any]) -> None:
    """TypeError or ValueError unless a history from a file has our own entries, with values of the same kinds."""
    if history.keys() != own.keys():
        raise ValueError(f"history wants {', '.join(own)}, got {checks.brief(list(history))}")
    for name, value in own.items():
        checks.instance(f"history: {name}", history[name], type(value), type(value).__name__)
    for name, values in {"losses": history["losses"], **history["terms"]}.items():
        if not isinstance(values, list) or any(type(value) not in (int, float) for value in values):
            raise TypeError(f"history: {checks.brief(name)} wants a list of numbers, got others")
    for step in history["skipped"]:
        checks.whole("history: skipped", step, 0)
    for pair in history["evaluations"]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[1], dict):
            raise TypeError(f"history: evaluations wants pairs of a step and its metrics, got {checks.brief(pair)}")
        checks.whole("history: evaluations", pair[0], 0)


def check_optimizer_state(run: Run, state: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """ValueError if the optimiser could not load its state, once its stage starts it.

    An optimiser with a state of its own form checks it itself, when it is started."""
    has_own_form = type(run.optimizer).load_state_dict is not Optimizer.load_state_dict
    if has_own_form or (not state and facts["t"] == 0):                 # no step of this stage was taken
        return
    tensors = named_tensors(run.model, run.loss)
    trainable = {name: p for name, p in tensors.items() if name in facts["trainable"]}
    run.optimizer.read_state(state, run.optimizer.make_groups(trainable))


def load_batches(run: Run, facts: dict[str, Any]) -> None:
    """Move the stream of batches to its position. ValueError, with the stream where it was, if the data are others."""
    before = run.stream.state_dict()
    try:
        run.stream.load_state_dict(facts["batches"])
    except (TypeError, LookupError, AttributeError) as e:
        raise ValueError(f"this is no checkpoint of fit: its position in the batches is of another form ({e})") from e
    ours = run.identity.get("data")
    if ours is None or facts.get("data") is None or ours == facts["data"]:          # None: cannot be compared
        return
    run.stream.load_state_dict(before)
    raise ValueError("this checkpoint is of a run on other data: the batches have the same form, but another content")


# ── the settings that a resumed run must share ───────────────────────────────────────────────────────────────────────
def describe_run(run: Run) -> dict[str, Any]:
    """The settings that a resumed run must share with the run that wrote the checkpoint; JSON-able.

    check_identity compares them, check_base and load_batches the last two. The batches check their own settings."""
    settings = run.settings
    identity = {
        "steps": settings.steps,
        "accumulate": settings.accumulate,
        "clip": settings.clip,
        "autocast": settings.autocast,
        "optimizer": repr(run.optimizer.equations),
        "methods": {a.name: describe(a.method) for a in edit.attached(run.model)},
        "loss": describe_loss(run.loss),
        "trained": sorted(trainable_tensors(run.model, run.loss)),
        "seed": settings.seed,
        "schedule": describe_schedule(run.schedule),
        "base": describe_base(run.model, set(saved_tensors(run)) | set(named_buffers(run.model, run.loss))),
        "data": describe_data(run.stream.batches),
    }
    return json.loads(json.dumps(identity))                             # as it is read from a file: tuples become lists


def complete_facts(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a checkpoint, with the defaults of settings that the library did not have when it was written."""
    methods = {a.name: a.method for a in edit.attached(run.model)}
    equations = run.optimizer.equations
    completed = {
        "optimizer": complete_call(facts.get("optimizer"), repr(equations), type(equations)),
        "methods": complete(facts.get("methods"), methods),
        "loss": complete(facts.get("loss"), run.loss.original),
        "schedule": complete_schedule(facts.get("schedule"), run.schedule),
    }
    return facts | {key: value for key, value in completed.items() if key in facts}


# ── files of version 0.1 ─────────────────────────────────────────────────────────────────────────────────────────────
def from_version_0_1(
    run: Run, arrays: dict[str, np.ndarray], facts: dict[str, Any],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts) of a checkpoint of version 0.1 in today's form. ValueError if it has other methods than this run.

    Version 0.1 knew one loss, one phase per run, and these names:

        value/base/<name>    value/edit/<adapter>/<path>:<name>    value/mask/...    optimizer/<group>.<moment>
        best/...             as value/
    """
    new = {}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            new[name] = value
        else:
            try:
                new_name = name_from_version_0_1(rest)
            except ValueError:
                raise ValueError(f"this is no checkpoint of fit: it holds {checks.brief(name)}") from None
            new[("best/" if kind == "best" else "") + new_name] = value
    history = {name: facts[name] for name in ("losses", "evaluations", "stopped")}
    history["skipped"] = facts.get("skipped", [])
    history["terms"] = {"loss": list(facts["losses"])}
    if not are_methods_of_0_1(facts["methods"], edit.attached(run.model)):
        ours = to_text(run.identity["methods"])
        theirs = one_line(str(facts["methods"]), LONGEST_CALL) or "none"
        raise ValueError(f"this checkpoint is of another run: its methods: {theirs}; here: {ours}")
    kept = ("steps", "accumulate", "clip", "optimizer", "autocast", "t", "done", "rng", "batches")
    new_facts = {name: facts[name] for name in kept if name in facts}
    new_facts |= dict(
        loss=describe(CrossEntropy()), stage=facts["phase"], first_evaluation=0, history=history,
        scaler=facts.get("scaler", run.scaler.state_dict()), trainable=run.identity["trained"], shared_masks={},
    )
    return new, new_facts


def are_methods_of_0_1(text: str, attached: tuple[edit.Attached, ...]) -> bool:
    """True if version 0.1 would have described the attached methods by this text, "lora: LoRA(r=2, alpha=16.0); ...".

    It wrote the repr of each method, which is parsed here as a call with keywords. Only fields that the methods still
    have are compared. Version 0.1 had others, which named modules.
    """
    parts = text.split("; ") if text else []
    if len(parts) != len(attached):
        return False
    for part_text, a in zip(parts, attached):
        name, _, call_text = part_text.partition(": ")
        call = read_call(call_text)
        if call is None or name != a.name or call[0] != type(a.method).__name__:
            return False
        for field, text in call[1].items():
            value = ast.literal_eval(text)
            if getattr(a.method, field, value) != value:                # a field that is gone counts as equal
                return False
    return True


def name_from_version_0_1(old: str) -> str:
    """The name in today's file of a tensor or mask of version 0.1, given without its `value/` or `best/`.

        base/norm.bias                    ->  model/norm.bias
        edit/lora/blocks.0.attn.q:A       ->  model/blocks.0.attn.q.edits.lora.A
        mask/base/norm.bias               ->  mask/norm.bias
    """
    if old.startswith("mask/"):
        return "mask/" + name_from_version_0_1(old.removeprefix("mask/")).removeprefix("model/")
    if old.startswith("base/"):
        return f"model/{old.removeprefix('base/')}"
    _, method_name, rest = old.split("/", 2)                            # edit/<method>/<path>:<name>
    path, name = rest.split(":")
    return f"model/{path}.edits.{method_name}.{name}"
