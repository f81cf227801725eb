"""QLoRA: LoRA on all linear maps of a base in NF4 with doubly quantized scales, from compressing to merging."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers import dev, host

import tinyft as ft
from tinyft import nn
from tinyft.compress import Codebook
from tinyft.edit import base_modules, base_parameters


def small(kind: str) -> ft.Module:
    if kind == "gpt":
        return ft.GPT(ft.GPTConfig(vocab=24, positions=16, width=32, layers=2, heads=2), seed=1)
    if kind == "bert":
        return ft.BERT(ft.BERTConfig(vocab=24, positions=16, width=32, layers=2, heads=2), seed=1, head="mlm")
    return ft.Llama(ft.LlamaConfig(vocab=24, positions=16, width=32, layers=2, heads=2), seed=1)


def qlora(kind: str = "gpt", r: int = 4) -> ft.Module:
    """A small model, compressed, with LoRA on every map that was compressed."""
    model = small(kind)
    reports = ft.compress(model, ft.NF4())
    ft.attach(model, ft.LoRA(r=r, targets=[report.path for report in reports]))
    return model


def counting(rng: np.random.Generator, rows: int = 8) -> dict:
    """Rows that count upwards by 1, modulo 24."""
    return {"ids": (rng.integers(0, 24, (rows, 1)) + np.arange(12)) % 24}


def ids(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 24, (3, 10))


def base_bytes(model: ft.Module) -> dict[str, bytes]:
    """{name: bytes} of everything that belongs to the base."""
    values = {name: a for name, a in model.state_dict().items() if ".edits." not in name}
    return {name: host(a).tobytes() for name, a in values.items()}


@pytest.mark.parametrize("kind", ["gpt", "bert", "llama"])
def test_every_map_of_the_blocks_is_packed_and_adapted(kind, rng):
    model = qlora(kind)
    maps = [m for path, m in base_modules(model).items() if "blocks" in path and isinstance(m, nn.Linear)]
    assert len(maps) == (14 if kind == "llama" else 12)
    for m in maps:
        assert isinstance(m.weight, Codebook)
        assert m.weight.double
        assert list(m.edits) == ["lora"]
    trained = set(ft.trained(model))
    assert trained == {name for name in model.named_parameters() if ".edits.lora." in name}
    before = host(model(ids(rng)))
    with ft.without(model):
        np.testing.assert_array_equal(host(model(ids(np.random.default_rng(0)))).shape, before.shape)


def test_it_starts_as_the_compressed_base(rng):
    base = small("gpt")
    ft.compress(base, ft.NF4())
    tokens = ids(rng)
    np.testing.assert_array_equal(host(qlora()(tokens)), host(base(tokens)))


def test_it_learns_and_the_base_stays_as_it_is(rng):
    model = qlora(r=8)
    model.embed.weight.copy_(model.embed.weight.data * 10)   # the frozen embedding is the head: it bounds the logits
    before = base_bytes(model)
    data = [counting(rng) for _ in range(10)]
    start = ft.evaluate(model, data)["loss"]
    ft.fit(model, data, 40, ft.AdamW(1e-2), progress=False)
    assert start > 3
    assert ft.evaluate(model, data)["loss"] < 0.6
    assert base_bytes(model) == before


def test_gradients_are_those_beside_the_unpacked_base(rng):
    packed, dense = qlora(), ft.unpack(qlora())
    gradients = []
    batch = counting(rng)
    for model in (packed, dense):
        for path, m in base_modules(model).items():          # B = 0 at the start: A would get no gradient
            if "lora" in m.edits:
                B = m.edits["lora"].B
                B.copy_(np.random.default_rng(len(path)).normal(0, 0.1, B.shape).astype(np.float32))
        ft.ops.cross_entropy(model(batch["ids"]), dev(batch["ids"])).backward()
        gradients.append({name: host(p.grad) for name, p in model.named_parameters().items() if p.grad is not None})
    assert set(gradients[0]) == set(ft.trained(packed))
    for name, g in gradients[0].items():
        np.testing.assert_allclose(g, gradients[1][name], rtol=1e-4, atol=1e-6)
        assert np.abs(g).max() > 0


def test_the_adapter_is_saved_alone_and_loads_on_a_base_that_is_compressed_again(rng, tmp_path):
    model = qlora()
    ft.fit(model, [counting(rng)], 3, ft.AdamW(1e-2), progress=False)
    ft.save_adapter(model, tmp_path / "adapter")
    size = sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    assert size < ft.count(model).trained * 4 + 50_000
    again = small("gpt")
    ft.compress(again, ft.NF4())
    ft.load_adapter(again, tmp_path / "adapter")
    tokens = ids(rng)
    np.testing.assert_array_equal(host(again(tokens)), host(model(tokens)))
    other = small("gpt")
    ft.compress(other, ft.FP4())
    with pytest.raises(ValueError, match="other weights"):
        ft.load_adapter(other, tmp_path / "adapter")


def test_detaching_gives_the_compressed_base_back_bitwise(rng):
    model = qlora()
    base = small("gpt")
    ft.compress(base, ft.NF4())
    tokens = ids(rng)
    ft.fit(model, [counting(rng)], 3, ft.AdamW(1e-2), progress=False)
    trained = host(model(tokens))
    adapter = ft.detach(model)
    np.testing.assert_array_equal(host(model(tokens)), host(base(tokens)))
    assert base_bytes(model) == base_bytes(base)
    ft.attach(model, adapter)
    np.testing.assert_array_equal(host(model(tokens)), trained)


def test_merging_is_refused_with_both_ways_out_and_the_second_one_works(rng):
    model = qlora()
    ft.fit(model, [counting(rng)], 3, ft.AdamW(1e-2), progress=False)
    tokens = ids(rng)
    before = host(model(tokens))
    bytes_before = base_bytes(model)
    with pytest.raises(ft.CannotMerge, match=r"packed: keep the adapter beside it, or unpack the base first"):
        ft.merge(model)
    assert base_bytes(model) == bytes_before
    np.testing.assert_array_equal(host(model(tokens)), before)
    ft.merge(ft.unpack(model))
    np.testing.assert_allclose(host(model(tokens)), before, rtol=1e-4, atol=1e-5)


def test_bytes_of_the_base_are_a_seventh(rng):
    """The maps of the blocks take 4.127 bits of 32, and a little more in maps this small."""
    model = small("gpt")
    reports = ft.compress(model, ft.NF4())
    assert sum(report.after for report in reports) < sum(report.before for report in reports) / 7
    assert max(report.error for report in reports) < 0.012           # 0.0085 for normal weights, on average


def check_full(attach_full: Callable[[ft.Module], Any]) -> None:
    """Full on a packed model raises one sentence with the parameters and the ways out; the model stays as it is."""
    model = small("gpt")
    ft.compress(model, ft.NF4(), targets="attn.[qv]")
    before = base_bytes(model)
    with pytest.raises(ValueError) as caught:
        attach_full(model)
    assert str(caught.value) == (
        "Full trains every parameter, and 4 packed ones cannot train (blocks.0.attn.q.weight, blocks.0.attn.v.weight, "
        "blocks.1.attn.q.weight, ...): attach LoRA, which is QLoRA on an NF4 base, or call tinyft.unpack(model) first")
    assert base_bytes(model) == before and not ft.edit.attached(model)


def test_full_does_not_train_the_rest_of_a_packed_model():
    check_full(lambda model: ft.attach(model, ft.Full()))
    for method in (ft.Partial(k=1), ft.BitFit(), ft.LoRA(r=2)):
        model = small("gpt")
        ft.compress(model, ft.NF4())
        ft.attach(model, method)
        assert ft.trained(model)
    model = small("gpt")
    ft.compress(model, ft.NF4())
    ft.attach(ft.unpack(model), ft.Full())
    assert set(ft.trained(model)) == set(model.named_parameters())


def train_the_rest(model: ft.Module) -> None:
    """What Full did: every dense tensor trains."""
    ft.attach(model, PartialOfAll())


def refuse_without_names(model: ft.Module) -> None:
    raise ValueError("Full trains every parameter: attach LoRA")


@dataclass(frozen=True)
class PartialOfAll(ft.Method):
    def trains(self, model: ft.Module) -> set[str]:
        return set(base_parameters(model))


@pytest.mark.parametrize("wrong", [train_the_rest, refuse_without_names])
def test_another_answer_of_full_is_noticed(wrong):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_full(wrong)
