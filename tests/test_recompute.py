"""Recomputed activations: the gradients to the bit, the memory, the work, what is refused, and wrong answers.

The contract (contract.py) holds every method to the same gradients; here are the models and the engine."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, wrong_answers

import tinyft as ft
from tinyft import array, dispatch, ops, recomputation, tensor
from tinyft.compress import Q8_0
from tinyft.context import Context
from tinyft.edit import Edit
from tinyft.nn import Linear, Module, Parameter
from tinyft.tensor import Gradients, Tensor
from tinyft.train.batch import compute_loss, read_batch

LAYERS = 5                                               # three blocks or more: sums of three gradients have an order
VOCAB = 40


def build(kind: str, layers: int = LAYERS, packed: bool = False, dropout: float = 0.1) -> Any:
    """A small model with dropout, in training mode, its tensors at generic points."""
    sizes = {"vocab": VOCAB, "positions": 64, "width": 32, "layers": layers, "heads": 4, "hidden": 64,
             "dropout": dropout}
    if kind == "gpt":
        model = ft.GPT(ft.GPTConfig(**sizes), seed=0)
    elif kind == "bert":
        model = ft.BERT(ft.BERTConfig(**sizes), seed=0)
    else:
        model = ft.Llama(ft.LlamaConfig(**sizes, key_value_heads=2, tied=True), seed=0)
    rng = np.random.default_rng(1)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape) * 0.1)
    if packed:
        for module in model.modules():
            if isinstance(module, Linear):
                module.weight = Q8_0.quantize(host(module.weight))
    return model.train()


def some_batch(rows: int = 3, T: int = 9) -> dict[str, np.ndarray]:
    """Ids with padding and a label at every real position."""
    rng = np.random.default_rng(2)
    ids = rng.integers(0, VOCAB, (rows, T))
    mask = np.ones((rows, T), bool)
    mask[0, T - 3:] = False
    return {"ids": ids, "mask": mask, "labels": np.where(mask, (ids * 7 + 1) % VOCAB, -100)}


def gradients(model: Any, on: bool, passes: int = 1, dtype: str | None = None) -> dict[str, Any]:
    """{name: gradient} after a number of passes that add to it, the losses, and the next random number of dropout."""
    model.zero_grad()
    rng = np.random.default_rng(3)
    targets = read_batch(some_batch())
    losses = []
    for _ in range(passes):
        with ft.recompute(on), ft.autocast(dtype or "bfloat16", enabled=dtype is not None):
            _, loss = compute_loss(model, targets, rng)
        loss.backward()
        losses.append(loss.item())
    found = {name: host(p.grad) for name, p in model.named_parameters().items() if p.grad is not None}
    return found | {"losses": np.array(losses), "next": rng.random()}


def assert_same_gradients(make: Callable[[], Any], **how: Any) -> None:
    """The gradients with recompute are those without it, bitwise; and there are some."""
    plain = gradients(make(), on=False, **how)
    again = gradients(make(), on=True, **how)
    assert len(plain) > 2
    assert plain.keys() == again.keys()
    for name, g in plain.items():
        np.testing.assert_array_equal(g, again[name], err_msg=name)


# ── the gradients ────────────────────────────────────────────────────────────────────────────────────────────────────
METHODS = {
    "full": None,
    "lora": ft.LoRA(r=2, targets=("attn.[qv]", "mlp.up"), dropout=0.2),
    "prefix": ft.PrefixTuning(p=2, mlp=4, shift=True),
    "prompt": ft.PromptTuning(p=2),
    "top": ft.Partial(k=2),
}


def attached(kind: str, method: str, **how: Any) -> Any:
    """A small model with a method on it, away from its special start."""
    model = build(kind, **how)
    if METHODS[method] is not None:
        ft.attach(model, METHODS[method])
        rng = np.random.default_rng(4)
        for p in ft.trained(model).values():
            p.copy_(host(p) + rng.standard_normal(p.shape) * 0.2)
    return model.train()


@pytest.mark.parametrize("kind", ["gpt", "bert", "llama"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_gradients_are_the_same_to_the_bit(kind, method, dtype):
    assert_same_gradients(lambda: attached(kind, method), passes=2, dtype=dtype)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_gradients_of_a_packed_model_are_the_same_to_the_bit(kind):
    assert_same_gradients(lambda: attached(kind, "lora", packed=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_a_model_in_16_bits_are_the_same_to_the_bit(dtype):
    assert_same_gradients(lambda: attached("llama", "full").to(dtype=dtype), passes=2)


class SharedScale(Edit):
    """y ← y ⊙ (1 + s u) in every block, from one shared s: its gradient is a sum over the blocks, with an order.

    u is computed without the block's input, so that it stands beside the path from block to block."""

    def __init__(self, s: Parameter):
        self.s = s

    def after(self, x: Any, y: Tensor, ctx: Context) -> Tensor:
        return y * (ops.tanh(self.s * 3.0) * self.s + 1.0)


class Balance(Edit):
    """An auxiliary loss in every block, of one name, and a tensor left for the next block."""

    def __init__(self, w: Parameter):
        self.w = w

    def after(self, x: Any, y: Tensor, ctx: Context) -> Tensor:
        if "left" in ctx.scratch:
            y = y + ctx.scratch["left"] * 0.1
        ctx.scratch["left"] = ops.tanh(y * self.w)
        ctx.add_loss("balance", ((y * self.w) ** 2).mean())
        return y


class Unknown(Edit):
    """Leaves tensors where nobody looks for them: in a list."""

    def __init__(self, w: Parameter):
        self.w = w

    def after(self, x: Any, y: Tensor, ctx: Context) -> Tensor:
        ctx.scratch.setdefault("list", []).append(y * self.w)
        return y


def with_edits(model: Any, kind: type[Edit]) -> Any:
    """The model with one edit of this kind on every block; all hold the same parameter."""
    shared = Parameter(dev(np.linspace(0.2, 0.9, 32), np.float32))
    for block in model.blocks:
        block.edits = {"test": kind(shared)}
    return model


def total_loss(model: Any, on: bool) -> tuple[Context, Tensor]:
    """A loss of the hidden states and the auxiliary losses, beside that of the labels."""
    targets = read_batch(some_batch())
    targets.output_hidden_states = True
    with ft.recompute(on):
        ctx, loss = compute_loss(model, targets, np.random.default_rng(3))
        for h in ctx.hidden_states:
            loss = loss + (h * h).mean()
        for value in ctx.losses.values():
            loss = loss + value
        for kept in ctx.scratch.get("list", []):
            loss = loss + kept.mean()
    return ctx, loss


def same_with_edits(kind: type[Edit]) -> None:
    """The gradients of two passes, with losses of hidden states, are those without recompute, bitwise."""
    found = []
    for on in (False, True):
        model = with_edits(build("gpt"), kind)
        for _ in range(2):
            ctx, loss = total_loss(model, on)
            loss.backward()
        terms = {name: value.item() for name, value in ctx.losses.items()}
        found.append(({name: host(p.grad) for name, p in model.named_parameters().items()}, loss.item(), terms))
    (plain, loss, terms), (again, other_loss, other_terms) = found
    assert loss == other_loss
    assert terms == other_terms
    assert len(ctx.hidden_states) == LAYERS + 1, "a second run adds none"
    for name, g in plain.items():
        np.testing.assert_array_equal(g, again[name], err_msg=name)


@pytest.mark.parametrize("kind", [SharedScale, Balance])
def test_shared_parameters_auxiliary_losses_and_hidden_states_are_the_same_to_the_bit(kind):
    same_with_edits(kind)


def test_a_tensor_that_is_kept_out_of_sight_gets_its_gradient():
    """Its records stay. The sums have another order, so the last bit may differ."""
    found = []
    for on in (False, True):
        model = with_edits(build("gpt"), Unknown)
        ctx, loss = total_loss(model, on)
        assert len(ctx.scratch["list"]) == LAYERS
        loss.backward()
        found.append({name: host(p.grad) for name, p in model.named_parameters().items()})
    for name, g in found[0].items():
        np.testing.assert_allclose(found[1][name], g, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_kept_graph_runs_again_for_every_backward_pass():
    model = build("gpt")
    _, loss = total_loss(model, on=True)
    loss.backward(retain_graph=True)
    once = {name: host(p.grad).copy() for name, p in model.named_parameters().items()}
    loss.backward()
    for name, p in model.named_parameters().items():
        np.testing.assert_array_equal(host(p.grad), 2 * once[name])
    with pytest.raises(RuntimeError, match="walked before"):
        loss.backward()


def test_no_work_and_no_record_for_what_is_frozen():
    model = build("gpt")
    for p in model.parameters():
        p.train(False)
    with ft.recompute():
        y = model(some_batch()["ids"])
    assert y.is_leaf
    model.head.bias = Parameter(dev(np.zeros(VOCAB, np.float32)))
    with ft.recompute():
        y = model(some_batch()["ids"])
    assert not any(isinstance(node, tensor.Recomputed) for node in tensor.topological(y))


def test_a_tensor_that_is_frozen_between_the_passes_gets_no_gradient():
    model = build("gpt")
    _, loss = total_loss(model, on=True)
    for p in model.blocks[2].parameters():
        p.train(False)
    loss.backward()
    for name, p in model.named_parameters().items():
        assert (p.grad is None) == name.startswith("blocks.2."), name


# ── fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"autocast": "float16"}])
def test_fit_ends_at_the_same_values(more):
    ends = []
    for on in (False, True):
        model = attached("gpt", "lora")
        history = ft.fit(model, [some_batch(), some_batch(2, 7)], 4, ft.AdamW(0.05), progress=False, recompute=on,
                         **more)
        ends.append((history.losses, {name: host(p).copy() for name, p in ft.trained(model).items()}))
    assert ends[0][0] == ends[1][0]
    for name, values in ends[0][1].items():
        np.testing.assert_array_equal(values, ends[1][1][name])


def test_a_run_goes_on_with_and_without_recompute(tmp_path):
    """It is no part of a run's identity: the values are the same."""
    def stop(done: int, terms: dict) -> None:
        if done == 2:
            raise InterruptedError

    whole = attached("gpt", "lora")
    ft.fit(whole, [some_batch()], 4, ft.AdamW(0.05), progress=False)
    half = attached("gpt", "lora")
    how = {"progress": False, "out": tmp_path, "save_every": 1}
    with pytest.raises(InterruptedError):
        ft.fit(half, [some_batch()], 4, ft.AdamW(0.05), on_step=stop, **how)
    ft.fit(half, [some_batch()], 4, ft.AdamW(0.05), recompute=True, resume=True, **how)
    for name, p in ft.trained(whole).items():
        np.testing.assert_array_equal(host(p), host(ft.trained(half)[name]))


# ── memory and work ──────────────────────────────────────────────────────────────────────────────────────────────────
ROWS, T, WIDTH = 8, 48, 32


def peak(layers: int, on: bool) -> int:
    """The peak of a forward and backward pass of LoRA, in bytes."""
    model = attached("gpt", "lora", layers=layers)
    targets = read_batch(some_batch(ROWS, T))
    with ft.peak_memory() as memory:
        with ft.recompute(on):
            _, loss = compute_loss(model, targets, np.random.default_rng(0))
        loss.backward()
    return memory["bytes"]


@pytest.mark.skipif(array.backend() == "cupy", reason="the pool of a device rounds sizes up")
def test_a_block_keeps_its_input_alone():
    """The rise with each further block is one array (B, T, C), and the gradients of its LoRA; without: all it made."""
    one = ROWS * T * WIDTH * 4
    peak(2, on=True)                                     # the first pass also allocates what stays
    with_it = (peak(10, on=True) - peak(4, on=True)) / 6
    without = (peak(10, on=False) - peak(4, on=False)) / 6
    assert one <= with_it <= 1.3 * one
    assert without >= 15 * one
    assert peak(10, on=True) < 0.3 * peak(10, on=False)


@contextlib.contextmanager
def counted(*names: str) -> Iterator[dict[str, int]]:
    """The number of calls of ops, by name."""
    counts = dict.fromkeys(names, 0)
    original = dispatch.run

    def run(f: Callable, *args: Any, **kwargs: Any) -> Any:
        if f.__name__ in counts:
            counts[f.__name__] += 1
        return original(f, *args, **kwargs)

    dispatch.run = run
    try:
        yield counts
    finally:
        dispatch.run = original


def test_the_blocks_run_once_more_and_nothing_else_does():
    names = ("linear", "attention", "cross_entropy", "embedding")
    found = []
    for on in (False, True):
        model = build("llama")
        with counted(*names) as counts:
            gradients(model, on)
        found.append(counts)
    without, with_it = found
    assert with_it["attention"] == 2 * without["attention"] == 2 * LAYERS
    assert with_it["linear"] - without["linear"] == 7 * LAYERS
    assert with_it["cross_entropy"] == without["cross_entropy"]
    assert with_it["embedding"] == without["embedding"]


def test_a_block_below_everything_that_trains_does_not_run_again():
    model = attached("gpt", "top")
    with counted("attention") as counts:
        gradients(model, on=True)
    assert counts["attention"] == LAYERS + 2


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_arguments():
    with pytest.raises(TypeError, match="enabled"), ft.recompute(1):
        pass
    with pytest.raises(TypeError, match="recompute"):
        ft.fit(build("gpt"), [some_batch()], 1, progress=False, recompute="yes")
    with ft.recompute(), ft.recompute(enabled=False):
        assert not isinstance(build("gpt")(some_batch()["ids"]).node.pulls[0][0][0], tensor.Recomputed)
        assert not recomputation._state.on
    assert not recomputation._state.on


def test_a_cache_is_refused_unless_nothing_is_recorded():
    model = build("gpt")
    with ft.recompute(), pytest.raises(ValueError, match="without a cache"):
        model(some_batch()["ids"], cache=ft.Cache())
    with ft.recompute(), ft.no_grad():
        model(some_batch()["ids"], cache=ft.Cache())
    with ft.recompute():
        ft.generate(model.eval(), some_batch()["ids"][:, :4], 3)


def test_capture_is_refused():
    settings = SimpleNamespace(accumulate=1, recompute=True)
    run = SimpleNamespace(settings=settings)
    with pytest.raises(ft.CannotCapture, match="recompute"):
        ft.train.loop.check_capture(run)
    before = array.recording
    array.recording = object()
    try:
        with ft.recompute(), pytest.raises(ft.CannotCapture, match="recompute"):
            build("gpt")(some_batch()["ids"])
    finally:
        array.recording = before


@pytest.mark.parametrize("frozen", [False, True])
def test_a_write_between_the_passes_is_refused(frozen):
    model = attached("gpt", "lora" if frozen else "full")
    _, loss = total_loss(model, on=True)
    weight = model.blocks[1].mlp.down.weight
    weight.copy_(weight.data * 2)
    with pytest.raises(RuntimeError, match="written in place"):
        loss.backward()


def draws(self: Edit, x: Any, y: Tensor, ctx: Context) -> Tensor:
    """Random numbers that are not the Context's."""
    return y * float(np.random.default_rng().random())


CHANGES = {
    "eval": lambda model: model.eval(),
    "other edits": lambda model: setattr(model.blocks[1], "edits", {}),
    "other weight": lambda model: setattr(model.blocks[1].mlp.up, "weight", Parameter(dev(np.ones((64, 32)), "f4"))),
}


@pytest.mark.skipif(array.backend() != "numpy", reason="values on a device are not compared")
@pytest.mark.parametrize("change", [*CHANGES, "own random numbers"])
def test_a_block_that_gives_other_values_is_refused(change, monkeypatch):
    model = with_edits(build("gpt"), SharedScale)
    if change == "own random numbers":
        monkeypatch.setattr(SharedScale, "after", draws)
    _, loss = total_loss(model, on=True)
    CHANGES.get(change, lambda model: None)(model)
    with pytest.raises(RuntimeError, match="a PreNormBlock gave other values"):
        loss.backward()


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
def rng_goes_on(self: Context) -> Context:
    """The second run draws new random numbers from the same generator."""
    copied = ORIGINAL["snapshot"](self)
    copied.rng = self.rng
    return copied


def without_autocast(block: Module, x: Tensor, ctx: Context) -> Tensor:
    """The second run computes in float32, since backward runs outside the region."""
    return run_again_with(block, x, x, ctx)


def input_detached(block: Module, x: Tensor, ctx: Context) -> Tensor:
    """The second run starts from a leaf, so that the gradient ends at the block's input."""
    with ft.autocast(enabled=False):
        return run_again_with(block, x, x.detach(), ctx)


def run_again_with(block: Module, x: Tensor, second: Tensor, ctx: Context) -> Tensor:
    """A block that runs again on another tensor, in a recompute region."""
    if not recomputation._state.on:
        return block(x, ctx)
    start, since = ctx.snapshot(), tensor.next_number()
    y = block(x, ctx)
    tensor.drop_records("a block", lambda: [block(second, start.snapshot())], [y], since)
    return y


def added_twice(self: Any, g: list, gradients: Gradients) -> list:
    """The records of the first run are still there, and give their gradients as well."""
    return ORIGINAL["expand"](self, g, gradients) + ORIGINAL["expand"](self, g, gradients)


def summed_by_block(self: Any, g: list, gradients: Gradients) -> list:
    """A block's own backward pass: its sum for a shared parameter is added to the others' as one number."""
    inner = Gradients()
    order = ORIGINAL["expand"](self, g, inner)
    older = list(self.parents())
    while order:
        node = order.pop()
        d, _ = inner.pop(node)
        if d is None:
            continue
        if isinstance(node, tensor.Part):
            inner.add_part(node, d)
            continue
        for parent, back in node.pull(d):
            inner.add(parent, tensor._fit(back, parent))
    for node in older:
        d, _ = inner.pop(node)
        if d is not None:
            gradients.add(node, d)
    return []


def depth_first(roots: list, since: int = 0) -> tuple[list, list]:
    """Any topological order will do."""
    order, seen, stack = [], set(), [(node, False) for node in roots]
    older = []
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            if node.made < since:
                older.append(node)
                continue
            stack.append((node, True))
            if not isinstance(node, Tensor):
                stack.extend((p, False) for p in node.parents())
    return order, older


def losses_forgotten(y: Tensor, ctx: Context) -> list[Tensor]:
    """A block has one output."""
    return [y]


ORIGINAL = {"snapshot": Context.snapshot, "expand": tensor.Recomputed.expand}
WRONG = {
    "rng goes on": (Context, "snapshot", rng_goes_on),
    "without autocast": (ft.models.blocks, "run_block", without_autocast),
    "input detached": (ft.models.blocks, "run_block", input_detached),
    "added twice": (tensor.Recomputed, "expand", added_twice),
    "summed by block": (tensor.Recomputed, "expand", summed_by_block),
    "depth first": (tensor, "nodes_below", depth_first),
    "losses forgotten": (recomputation, "_outputs", losses_forgotten),
}


@wrong_answers
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_rejected(name, monkeypatch):
    where, attribute, wrong = WRONG[name]
    monkeypatch.setattr(where, attribute, wrong)
    monkeypatch.setattr(tensor, "_same_bits", lambda y, value: True)     # the tests alone must see it
    failures = 0
    for check in (
        functools.partial(assert_same_gradients, functools.partial(attached, "gpt", "lora"), dtype="bfloat16"),
        functools.partial(same_with_edits, SharedScale),
        functools.partial(same_with_edits, Balance),
    ):
        try:
            check()
        except AssertionError:
            failures += 1
    assert failures
