"""Masks and ids of every dtype act alike: in the forward and backward pass, under each method, in fit and generate."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import build, noise, same
from helpers import dev, host, wrong_answers

from tinyft import AdamW, array, attach, evaluate, fit, generate
from tinyft.context import read_integers, read_mask
from tinyft.methods import Houlsby, LoRA, PrefixTuning, PromptTuning

IDS = np.array([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
LEFT = MASK[:, ::-1]
METHODS = [None, PromptTuning(p=2), PrefixTuning(p=2), PrefixTuning(p=2, shift=True), Houlsby(m=2),
           LoRA(r=2, targets=("embed", "attn.q"))]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
every_kind = pytest.mark.parametrize("kind", ["gpt", "bert", "gpt-classes", "bert-classes", "llama"])


def masks(mask: np.ndarray) -> list[Any]:
    """One mask in every form in which a mask comes."""
    forms: list[Any] = [mask.astype(dtype) for dtype in "?bBhHiIlLqQefd"]
    lists = [mask.tolist(), mask.astype(bool).tolist(), mask.astype(np.float32).tolist(), tuple(map(tuple, mask))]
    return [*forms, *lists, dev(mask), dev(mask.astype(np.float32)), mask.astype(array.bfloat16)]


def all_ids(ids: np.ndarray) -> list[Any]:
    """The same ids in every form in which ids come."""
    return [*(ids.astype(dtype) for dtype in "bBhHiIlLqQ"), ids.tolist(), tuple(map(tuple, ids.tolist())), dev(ids),
            dev(ids.astype(np.uint8)), np.asfortranarray(ids)]


def on(kind: str, method: Any) -> Any:
    model = build(kind)
    if method is not None:
        attach(model, method)
    return noise(model)


def gradients(model: Any, ids: Any, mask: Any) -> dict[str, np.ndarray]:
    model.zero_grad()
    y = model(ids, mask=mask)
    (y * y).sum().backward()
    return {name: host(p.grad) for name, p in model.named_parameters().items() if p.grad is not None}


@every_kind
@every_method
def test_a_mask_of_any_dtype_is_the_mask_of_booleans(kind, method):
    model = on(kind, method)
    y = host(model(IDS, mask=MASK.astype(bool)))
    assert not same(host(model(IDS)), y)
    for mask in masks(MASK):
        assert same(host(model(IDS, mask=mask)), y)


@every_kind
@every_method
def test_ids_of_any_dtype_are_the_same_ids_forward_and_backward(kind, method):
    model = on(kind, method)
    y = host(model(IDS, mask=MASK))
    wanted = gradients(model, IDS, MASK)
    assert wanted
    for ids in all_ids(IDS):
        assert same(host(model(ids, mask=MASK)), y)
        got = gradients(model, ids, MASK)
        assert got.keys() == wanted.keys()
        for name, g in got.items():
            np.testing.assert_allclose(g, wanted[name], rtol=1e-5, atol=1e-6)


def test_token_types_and_logit_positions_of_any_dtype():
    model = build("bert")
    types = (IDS > 4).astype(int)
    y = host(model(IDS, token_type_ids=types, logit_positions=np.array([0, 5])))
    for dtype in "bBhHiIlLqQ":
        facts = {"token_type_ids": types.astype(dtype), "logit_positions": np.array([0, 5], dtype)}
        assert same(host(model(IDS, **facts)), y)
    assert same(host(model(IDS, token_type_ids=types.tolist(), logit_positions=[0, 5])), y)
    assert host(model(IDS, logit_positions=[])).shape[0] == 0


@every_method
def test_generate_takes_a_mask_of_any_dtype(method):
    model = on("gpt", method)
    wanted = generate(model, IDS, 3, mask=LEFT.astype(bool))
    for mask in masks(LEFT):
        assert np.array_equal(generate(model, IDS, 3, mask=mask), wanted)
    assert np.array_equal(generate(model, IDS.astype(np.uint8), 3, mask=LEFT), wanted)


def losses(mask: Any, kind: str) -> tuple[list[float], dict[str, float]]:
    """The losses of a short run, and an evaluation, with this mask."""
    model = build(kind)
    attach(model, LoRA(r=2))
    batch: dict[str, Any] = {"ids": IDS, "mask": mask}
    if kind == "bert-classes":
        batch["labels"] = np.array([0, 1, 2])
    history = fit(model, [batch], 3, AdamW(0.01), progress=False)
    return list(history.losses), evaluate(model, [batch])


@pytest.mark.parametrize("kind", ["gpt", "bert-classes"])
def test_training_and_evaluation_take_a_mask_of_any_dtype(kind):
    wanted = losses(MASK.astype(bool), kind)
    for mask in (MASK, MASK.astype(np.uint8), MASK.astype(np.float32), MASK.tolist(), dev(MASK)):
        assert losses(mask, kind) == wanted


def check_masks(read: Callable[[Any], Any]) -> None:
    """A reader of masks gives the booleans of 0 and 1, and refuses every other number."""
    for mask in masks(MASK):
        assert np.array_equal(host(read(mask)), MASK.astype(bool))
    for other in (2, -1, 0.5, np.inf):
        with pytest.raises(ValueError):
            read(np.where(MASK == 1, 1.0, other))


def test_the_reader_of_masks():
    check_masks(lambda mask: read_mask("mask", mask))


@wrong_answers
@pytest.mark.parametrize("wrong", [lambda m: np.asarray(m), lambda m: np.asarray(m, bool), lambda m: np.asarray(m) > 0])
def test_a_reader_that_keeps_the_dtype_or_takes_any_number_is_rejected(wrong):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_masks(lambda mask: dev(wrong(host(mask))))


def test_integers_are_not_copied_and_not_read_from_a_device():
    ids = np.array([[1]])
    assert read_integers("ids", ids, "") is ids
    assert read_integers("ids", [], "").dtype == np.int64
