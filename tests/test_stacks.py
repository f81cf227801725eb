"""Methods on a model with two stacks and a third norm: they look at stacks, sublayers and module types, never at names.

Then the seams of the protocol that this model shows best: eject, one name for one tensor, and what a method trains.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import contract
import numpy as np
import pytest
import toy
from contract import CHECKS, Row, Sizes, batch, build, noise, run, same, short_fit, tokens, values
from helpers import dev, host, wrong_answers
from test_nn import Int8

import tinyft as ft
from tinyft import edit
from tinyft.edit import Edit, Method, attach, attached, count, eject, merge
from tinyft.methods import ALL, BitFit, Full, Houlsby, LoRA, Partial, PrefixTuning, PromptTuning
from tinyft.methods.additive.prefix import Prefix, Reparameterized
from tinyft.methods.reparameterized.lora import LowRank, PackedPlusLowRank
from tinyft.nn import LayerNorm, Linear, Module, Parameter
from tinyft.tensor import Tensor

S = Sizes("gpt")
BLOCKS = [f"{stack}.{i}" for stack in ("encoder", "decoder") for i in range(toy.LAYERS)]
NORMS = ["encoder_norm", "norm"]
NORMS += [f"encoder.{i}.norm{n}" for i in range(toy.LAYERS) for n in (1, 2)]
NORMS += [f"decoder.{i}.norm{n}" for i in range(toy.LAYERS) for n in (1, 2, 3)]
TOPS = ("encoder_norm.", "norm.", "head.", "encoder.1.", "decoder.1.")


def is_norm(name: str) -> bool:
    return name.rsplit(".", 1)[0] in NORMS


def row(method: Method, *, merges: bool = False, **more: Any) -> Row:
    return Row(method, "other", merges, lambda s: 0, **more)


ROWS = {
    "full": row(Full(), merges=True, base=lambda n: True),
    "partial": row(Partial(k=1), merges=True, base=lambda n: n.startswith(TOPS)),
    "bitfit": row(BitFit(), merges=True, base=lambda n: n.endswith(".bias")),
    "houlsby": row(Houlsby(m=4), base=is_norm),
    "houlsby-frozen-norms": row(Houlsby(m=4, norms=False)),
    "lora": row(LoRA(r=2, targets=("attn.[qv]", "cross_attn.[kv]", "embed")), merges=True),
    "prefix": row(PrefixTuning(p=3)),
    "prefix-mlp": row(PrefixTuning(p=3, mlp=5)),
    "prefix-shift": row(PrefixTuning(p=3, shift=True)),
}
TOY_CHECKS = ("moves", "gradients", "save", "off_and_on", "merge", "rows", "optimizer", "dropout", "learns",
              "padding", "recompute")


@pytest.fixture
def two_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract's checks build the encoder-decoder."""
    monkeypatch.setattr(contract, "build", toy.build_toy)


@pytest.mark.parametrize("check", TOY_CHECKS)
@pytest.mark.parametrize("name", ROWS)
def test_a_method_keeps_the_contract_on_an_encoder_decoder(name, check, two_stacks):
    CHECKS[check](ROWS[name], "gpt")


# ── where a method looks ─────────────────────────────────────────────────────────────────────────────────────────────
def check_houlsby(method: Method) -> None:
    """One adapter on each sublayer of each stack, ten in all; every norm trains, a decoder's third norm too."""
    model = toy.build_toy()
    a = attach(model, method)
    sublayers = [f"encoder.{i}.{m}" for i in range(2) for m in ("attn", "mlp")]
    sublayers += [f"decoder.{i}.{m}" for i in range(2) for m in ("attn", "cross_attn", "mlp")]
    assert sorted(a.edits) == sorted(sublayers)
    assert set(a.base_values) == {f"{norm}.{p}" for norm in NORMS for p in ("weight", "bias")}


def check_partial(method: Method) -> None:
    """The top block of both stacks trains, with the norms above them and the head."""
    model = toy.build_toy()
    a = attach(model, method)
    assert set(a.base_values) == {name for name in edit.base_parameters(model) if name.startswith(TOPS)}


def check_bitfit(method: Method) -> None:
    """Exactly the biases train; a table whose name contains "bias" does not."""
    model = toy.build_toy()
    a = attach(model, method)
    assert set(a.base_values) == {name for name in edit.base_parameters(model) if name.endswith(".bias")}


def test_houlsby_finds_every_sublayer_and_the_third_norm():
    check_houlsby(Houlsby(m=4))


def test_partial_takes_the_top_blocks_of_both_stacks():
    check_partial(Partial(k=1))
    model = toy.build_toy()
    assert set(attach(model, Partial(k=0)).base_values) == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="0 <= k <= 2"):
        attach(toy.build_toy(), Partial(k=3))


def test_bitfit_takes_biases_by_their_role_not_by_part_of_a_name():
    check_bitfit(BitFit())


def test_a_prefix_has_the_key_value_heads_of_its_attention_cross_attention_included():
    model = toy.build_toy()
    a = attach(model, PrefixTuning(p=3))
    shapes = {path: tuple(e.K.shape) for path, e in a.edits.items()}
    assert len(shapes) == 6
    for path, shape in shapes.items():
        heads = toy.KV_HEADS if "cross" in path else toy.HEADS
        width = S.C // toy.QUERY_HEADS if "cross" in path else S.C // toy.HEADS
        assert shape == (heads, 3, width), path


def test_the_same_prefix_of_zeros_changes_cross_attention_too():
    model = toy.build_toy()
    y = run(model)
    a = attach(model, PrefixTuning(p=3, targets="cross_attn.kv"))
    for e in a.edits.values():
        e.K.copy_(np.zeros(e.K.shape))
        e.V.copy_(np.zeros(e.V.shape))
    assert np.abs(run(model) - y).max() > 1e-3


def test_prompt_tuning_says_which_stacks_it_wants():
    class Towers(toy.EncoderDecoder):
        stacks = {"left": ["encoder.0"], "right": ["decoder.0"]}
    with pytest.raises(TypeError, match="one stack, or with an encoder and a decoder, got left, right"):
        attach(Towers(), PromptTuning(p=2))


class NoStacks(Module):
    def __init__(self):
        self.body = Linear(4, 4, rng=np.random.default_rng(0))
        self.norm = LayerNorm(4)


@pytest.mark.parametrize("method", [Partial(), Houlsby(), PromptTuning()], ids=lambda m: type(m).__name__)
def test_a_model_without_stacks_is_refused_in_one_sentence(method):
    model = NoStacks()
    with pytest.raises(TypeError, match="names its blocks in `stacks`; NoStacks does not"):
        attach(model, method)
    assert not attached(model) and all(p.requires_grad for p in model.parameters())


def test_a_model_without_a_token_embedding_is_refused():
    class Headless(NoStacks):
        stacks = {"encoder": ["body"]}
    with pytest.raises(TypeError, match="token embedding `embed`; Headless has none"):
        attach(Headless(), PromptTuning())


def test_a_method_that_names_a_tensor_the_model_does_not_have_is_refused():
    @dataclass(frozen=True)
    class Typo(Method):
        def trains(self, model: Module) -> set[str]:
            return {"norm.wieght"}
    model = build("gpt")
    with pytest.raises(ValueError, match="norm.wieght, which is not a tensor of this model"):
        attach(model, Typo())
    assert not attached(model)


def test_an_adapter_of_another_model_is_refused_and_the_model_unchanged():
    model = toy.build_toy()
    attach(model, Houlsby(m=2))
    adapter = edit.detach(model)
    other = build("gpt")
    before = values(other)
    with pytest.raises(ValueError, match="attached to another model: this one has no decoder.0"):
        attach(other, adapter)
    now = values(other)
    assert not attached(other) and all(same(now[n], v) for n, v in before.items())


def test_attach_wants_a_method_not_its_class():
    with pytest.raises(TypeError, match="attach wants a Method"):
        attach(build("gpt"), LoRA)


# ── eject ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_eject(method: Method) -> None:
    """Outputs stay bitwise, the order of attachment too; the ejected form saves, loads and can be ejected again."""
    model = build("gpt")
    attach(model, LoRA(r=2), name="below")
    attach(model, method, name="mine")
    attach(model, Houlsby(m=2, norms=False), name="above")
    noise(model)
    y = run(model)
    a = eject(model, "mine")
    assert same(run(model), y)
    assert [b.name for b in attached(model)] == ["below", "mine", "above"] and attached(model)[1] is a
    a = eject(model, "mine")
    assert same(run(model), y)
    other = build("gpt")
    b = attach(other, a.method, name="mine")
    edit.load_state_dict(other, b, edit.state_dict(model, a))
    edit.detach(model, "below")
    edit.detach(model, "above")
    assert same(run(other.eval()), run(model))


EJECTABLE = [
    LoRA(r=2), Houlsby(m=2), PromptTuning(p=2),
    PrefixTuning(p=2), PrefixTuning(p=2, mlp=4), PrefixTuning(p=2, mlp=4, shift=True),
]


@pytest.mark.parametrize("method", EJECTABLE, ids=str)
def test_every_method_ejects_and_gives_the_same_outputs(method):
    check_eject(method)


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_every_method_has_an_ejected_form_on_every_model(cls):
    for make in (build, toy.build_toy):
        model = make("gpt")
        try:
            attach(model, cls())
        except TypeError:                                # prompt tuning on two stacks
            continue
        y = run(model, tokens(2, 3))
        eject(model)
        assert same(run(model, tokens(2, 3)), y)


def test_an_ejected_prefix_has_lost_its_mlp_and_trains_on():
    model = build("gpt")
    attach(model, PrefixTuning(p=2, mlp=4))
    assert isinstance(next(iter(attached(model)[0].edits.values())), Reparameterized)
    before = count(model).trained
    a = ft.eject(model)
    assert all(type(e) is Prefix for e in a.edits.values()) and a.method == PrefixTuning(p=2)
    assert count(model).trained == 2 * S.L * 2 * S.C != before
    y = run(model)
    short_fit(model, "gpt", row(a.method))
    assert not same(run(model), y)


@dataclass(frozen=True)
class Lower(LoRA):
    """Its ejected form has no edits outside the first block."""

    def eject(self, edits: dict[str, Edit]) -> tuple[Method, dict[str, Edit]]:
        return self, {path: e for path, e in edits.items() if path.startswith("blocks.0")}


def test_an_ejected_form_may_have_fewer_edits_and_other_methods_stay():
    model = build("gpt")
    first = attach(model, LoRA(r=2))
    attach(model, Lower(r=2, targets="attn.q"))
    last = attach(model, Houlsby(m=2, norms=False))
    a = eject(model, "lower")
    assert attached(model) == (first, a, last)
    assert list(a.edits) == [path for path, m in edit.base_modules(model).items() if "lower" in m.edits]
    assert list(a.edits) == ["blocks.0.attn.q"]


# ── one name for one tensor ──────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Shared(Method):
    """The same low-rank change on two maps: one pair of factors."""

    targets: Any = ("attn.q", "attn.v")

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        return dict.fromkeys(found, LowRank(S.C, S.C, 2, 1.0, 0.0, rng))


def check_names(walk: Any) -> None:
    """The walker gives each tensor one name, the model's own, whatever else is attached; shared parts appear once."""
    for method in (Shared(), PrefixTuning(p=2, mlp=4), Houlsby(m=2), Full(), BitFit()):
        model = build("gpt")
        attach(model, LoRA(r=2), name="other")
        a = attach(model, method, name="mine")
        named = walk(model, a)
        everything = model.named_parameters() | model.named_buffers()
        assert named.keys() <= everything.keys() and all(everything[n] is v for n, v in named.items())
        assert len({id(v) for v in named.values()}) == len(named)
        mine = {n for n in everything if ".edits.mine." in n} | set(a.base_values)
        assert set(named) == mine
        assert {n for n in edit.trained(model) if ".edits.other." not in n} <= set(named)


def test_one_walker_gives_one_name_to_one_tensor():
    check_names(edit.named_state)


def test_the_state_of_a_method_that_was_taken_off_cannot_be_asked_for_by_name():
    model = build("gpt")
    attach(model, LoRA(r=2))
    a = edit.detach(model)
    with pytest.raises(LookupError, match="not attached to this model"):
        edit.state_dict(model, a)


class Projected(Edit):
    """y + x Rᵀ Bᵀ with a random R that is made again from the seed, so it is not saved."""

    def __init__(self, in_features: int, out_features: int, rng: np.random.Generator):
        self.register_buffer("R", dev(rng.standard_normal((2, in_features)).astype(np.float32)), persistent=False)
        self.B = Parameter(dev(np.zeros((out_features, 2), np.float32)))

    def after(self, x: Tensor, y: Tensor, ctx: Any) -> Tensor:
        return y + (x @ Tensor(self.R).T) @ self.B.T


@dataclass(frozen=True)
class Projection(Method):
    """A user's own method with a random projection."""

    targets: Any = "attn.q"

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        return Projected(module.in_features, module.out_features, rng)


def test_a_buffer_that_is_not_persistent_is_made_again_from_the_seed(tmp_path):
    model = build("gpt")
    a = attach(model, Projection(), seed=7)
    noise(model)
    assert {n.split(".")[-1] for n in edit.state_dict(model, a)} == {"B"}
    ft.save_adapter(model, tmp_path)
    again = build("gpt")
    loaded = ft.load_adapter(again, tmp_path, name="another", method=Projection)
    assert loaded.seed == 7 and same(run(again), run(model))
    other = build("gpt")
    b = attach(other, Projection(), seed=8)
    edit.load_state_dict(other, b, edit.state_dict(model, a))
    assert not same(run(other), run(model))              # so the seed is what made them equal


# ── packed weights ───────────────────────────────────────────────────────────────────────────────────────────────────
def packed_embedding(kind: str = "gpt") -> Any:
    model = build(kind)
    model.embed.weight = Int8(host(model.embed.weight))
    return model


class Watched(Int8):
    """A packed weight that counts how often its whole dense array is built."""

    built = 0

    def dequantize(self) -> Any:
        type(self).built += 1
        return super().dequantize()

    def dequantize_rows(self, rows: Any) -> Any:
        return self.codes[rows].astype(self.scale.dtype) * self.scale[rows]


def test_lora_on_a_packed_embedding_is_seen_by_the_tied_head_and_no_dense_weight_is_built():
    model, dense_model = build("gpt"), build("gpt")
    model.embed.weight = Watched(host(model.embed.weight))
    dense_model.embed.weight.copy_(host(model.embed.weight.dequantize()))
    for m in (model, dense_model):
        attach(m, LoRA(r=3, targets="embed"))
        noise(m)
    Watched.built = 0
    assert isinstance(model.embed.read("weight"), PackedPlusLowRank)
    np.testing.assert_allclose(run(model), run(dense_model), rtol=1e-4, atol=1e-4)
    for m in (model, dense_model):
        m.zero_grad()
        contract.the_loss(m, batch("gpt", 0)).backward()
    wanted = edit.trained(dense_model)
    for name, p in edit.trained(model).items():
        np.testing.assert_allclose(host(p.grad), host(wanted[name].grad), rtol=1e-3, atol=1e-4)
    assert Watched.built == 0
    whole = host(model.embed.read("weight").dequantize())
    np.testing.assert_allclose(whole, host(dense_model.embed.read("weight")), rtol=1e-4, atol=1e-4)


def test_a_packed_weight_without_edits_keeps_no_other_module_from_merging():
    model = packed_embedding()
    attach(model, LoRA(r=2, targets="attn.q"))
    noise(model)
    y = run(model)
    merge(model)
    assert attached(model) == ()
    np.testing.assert_allclose(run(model), y, rtol=1e-4, atol=1e-4)


def test_two_loras_stand_on_one_packed_embedding():
    model, dense_model = packed_embedding(), build("gpt")
    dense_model.embed.weight.copy_(host(model.embed.weight.dequantize()))
    for m in (model, dense_model):
        for seed in (1, 2):
            attach(m, LoRA(r=2, targets="embed"), name=f"lora{seed}", seed=seed)
        noise(m)
    np.testing.assert_allclose(run(model), run(dense_model), rtol=1e-4, atol=1e-4)


def test_an_edit_of_the_weight_that_does_not_take_packed_ones_is_refused():
    class Masked(Edit):
        def tensor(self, name: str, p: Any) -> Any:
            return p
    model = packed_embedding()
    model.embed.edits = {"masked": Masked()}
    with pytest.raises(TypeError, match="Masked .* packed"):
        run(model)


def test_a_packed_model_counts_saves_and_knows_its_base(tmp_path):
    model = packed_embedding()
    attach(model, LoRA(r=2, targets=("embed", "attn.q")))
    noise(model)
    assert count(model).total == S.total and count(model).trained == 2 * (S.V + S.C) + S.L * 2 * 2 * S.C
    ft.save_adapter(model, tmp_path)
    again = packed_embedding()
    ft.load_adapter(again, tmp_path)
    assert same(run(again), run(model))
    with pytest.raises(ft.CannotMerge, match="embed.weight is packed: keep the adapter.*unpack"):
        merge(model)


# ── wrong methods, and the check that rejects each ───────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class TwoNorms(Method):
    """Houlsby that knows the names norm1 and norm2 only."""

    def find(self, model: Module) -> dict[str, Module]:
        return Houlsby().find(model)

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        return Houlsby(m=4).edit(path, module, rng)

    def trains(self, model: Module) -> set[str]:
        return {n for n in edit.base_parameters(model) if is_norm(n) and "norm3" not in n}


@dataclass(frozen=True)
class NoCross(TwoNorms):
    """Houlsby that knows the names attn and mlp only."""

    def find(self, model: Module) -> dict[str, Module]:
        return {p: m for p, m in Houlsby().find(model).items() if "cross" not in p}

    def trains(self, model: Module) -> set[str]:
        return Houlsby().trains(model)


@dataclass(frozen=True)
class FirstStack(Method):
    """Partial that takes the top block of the first stack only."""

    def trains(self, model: Module) -> set[str]:
        return {n for n in Partial(k=1).trains(model) if not n.startswith("decoder.")}


@dataclass(frozen=True)
class Substring(Method):
    """BitFit that looks for "bias" anywhere in a name."""

    def trains(self, model: Module) -> set[str]:
        return {n for n in edit.base_parameters(model) if "bias" in n}


@dataclass(frozen=True)
class WrongEject(Method):
    """A prefix whose ejected form is a fresh one."""

    targets: Any = "attn.kv"

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        K, V = (dev(rng.standard_normal((module.heads, 2, module.head_width)).astype(np.float32)) for _ in "KV")
        return Prefix(K, V)

    def eject(self, edits: dict[str, Edit]) -> tuple[Method, dict[str, Edit]]:
        rng = np.random.default_rng(1)
        fresh: dict[str, Edit] = {}
        for path, e in edits.items():
            fresh[path] = Prefix(dev(rng.standard_normal(e.K.shape).astype(np.float32)), e.V.data)
        return self, fresh


@dataclass(frozen=True)
class LosesOne(WrongEject):
    """The ejected form forgets the last block."""

    def eject(self, edits: dict[str, Edit]) -> tuple[Method, dict[str, Edit]]:
        return self, dict(list(edits.items())[:-1])


def walks_edits(model: Any, a: Any) -> dict[str, Any]:
    """Names a shared tensor once for every module that it is on."""
    named = {}
    for path, e in a.edits.items():
        for n, v in {**e.named_parameters(), **e.named_buffers()}.items():
            named[f"{path}.edits.{a.name}.{n}"] = v
    parameters = edit.base_parameters(model)
    return named | {n: parameters[n] for n in a.base_values}


def walks_without_base(model: Any, a: Any) -> dict[str, Any]:
    """Forgets the base tensors that the method trains."""
    return {n: v for n, v in edit.named_state(model, a).items() if n not in a.base_values}


PLANTED = {
    "Houlsby without the third norm": (check_houlsby, TwoNorms()),
    "Houlsby without cross-attention": (check_houlsby, NoCross()),
    "Partial of the first stack": (check_partial, FirstStack()),
    "a method that trains by substring": (check_bitfit, Substring()),
    "an ejected form with other outputs": (check_eject, WrongEject()),
    "an ejected form that lost an edit": (check_eject, LosesOne()),
    "a walker that names a shared tensor twice": (check_names, walks_edits),
    "a walker without the base": (check_names, walks_without_base),
}


@wrong_answers
@pytest.mark.parametrize("name", PLANTED)
def test_the_checks_reject_a_wrong_one(name):
    check, wrong = PLANTED[name]
    with pytest.raises(AssertionError):
        check(wrong)
