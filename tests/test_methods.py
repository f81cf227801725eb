"""Every method against the contract (contract.py), the properties of each method, and wrong methods that must fail.

A new method is one more row of ROWS.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import contract
import numpy as np
import pytest
from contract import (
    CHECKS,
    KINDS,
    NEXT_TOKEN,
    Row,
    Sizes,
    batch,
    build,
    near,
    noise,
    put_on,
    run,
    same,
    short_fit,
    the_loss,
    tokens,
    tuned,
    values,
)
from helpers import dev, host, wrong_answers
from test_nn import Int8

from tinyft import GPT, GPTConfig, array, combine, edit, fit, no_grad, ops
from tinyft.edit import Edit, Method, Phase, attach, count, detach, eject, merge, trained
from tinyft.methods import ALL, BitFit, Full, Houlsby, LoRA, Partial, PrefixTuning, PromptTuning
from tinyft.methods.additive.houlsby import Bottleneck, truncated_normal
from tinyft.methods.additive.prefix import Hidden, Prefix, Reparameterized, Shift
from tinyft.methods.additive.prompt import Drop, SoftPrompt
from tinyft.methods.reparameterized.lora import LowRank
from tinyft.models.attention import Attention
from tinyft.nn import Cache, Context, Embedding, Linear, Module, Parameter
from tinyft.optim import SGD, AdamW
from tinyft.tensor import Record, Tensor, topological

LINEARS = ("attn.[qkvo]", "mlp.up", "mlp.down")


# ── the base tensors that a method trains, by name ───────────────────────────────────────────────────────────────────
def every_tensor(name: str) -> bool:
    return True


def in_head(name: str) -> bool:
    return name.startswith("head.")


def in_top_block_or_above(name: str) -> bool:
    return name.startswith(("blocks.1.", "norm.", "head."))


def is_bias(name: str) -> bool:
    return name.split(".")[-1] == "bias"


def is_norm(name: str) -> bool:
    """A layer norm's tensor, except those inside the head."""
    norms = {"norm", "norm0", "norm1", "norm2"}
    return bool(norms & set(name.split("."))) and not in_head(name)


# ── numbers of trainable parameters, in closed form ──────────────────────────────────────────────────────────────────
def count_norms(s: Sizes) -> int:
    """Two norms a block, and the last of GPT and Llama or BERT's first. A norm has 2 C parameters; Llama's has C."""
    size = s.C if s.llama else 2 * s.C
    return s.L * 2 * size + size


def count_biases(s: Sizes) -> int:
    """Per block: q, k, v, o, mlp.down and two norms (7 C) and mlp.up (F). Then one more norm, and the MLM head.

    Our Llama has biases on q, k and v alone."""
    if s.llama:
        return s.L * (s.queries + 2 * s.keys)
    in_mlm_head = 2 * s.C + s.V if s.own_head else 0
    return s.L * (7 * s.C + s.F) + s.C + in_mlm_head


def count_qv(r: int) -> Callable[[Sizes], int]:
    """LoRA of rank r on the queries and values: A (r, C) and B (out, r) for each of the two."""
    return lambda s: s.L * r * (2 * s.C + s.queries + s.keys)


def count_all_linears(s: Sizes) -> int:
    """LoRA of rank 3 on six linear maps of each block."""
    attention = 4 * s.C + 2 * s.queries + 2 * s.keys
    return s.L * 3 * (attention + 2 * (s.C + s.F))


def count_adapters(s: Sizes) -> int:
    """Two adapters a block, of bottleneck width 5."""
    return s.L * 2 * (2 * 5 * s.C + s.C + 5)


def count_prefix(s: Sizes) -> int:
    """Three rows of keys and of values a block."""
    return 2 * s.L * 3 * s.keys


def count_prefix_mlp(s: Sizes) -> int:
    """p = 3 rows E (3, C); W₁ (6, C), b₁ (6); in each block, for keys and for values, W₂ (C, 6) and b₂ (C).

    C is the width of all heads of keys together."""
    return 3 * s.keys + 6 * s.keys + 6 + s.L * 2 * (6 * s.keys + s.keys)


def count_adapters_and_norms(s: Sizes) -> int:
    return count_adapters(s) + count_norms(s)


def mergeable(method: Method, start: str, formula: Callable[[Sizes], int], **more: Any) -> Row:
    return Row(method, start, merges=True, count=formula, **more)


def not_mergeable(method: Method, start: str, formula: Callable[[Sizes], int], **more: Any) -> Row:
    return Row(method, start, merges=False, count=formula, **more)


# ── one row a method ─────────────────────────────────────────────────────────────────────────────────────────────────
# In each row: the method; its output right after attach, compared with the base's ("same" bitwise, "near" or "other");
# the number of trainable parameters; `base`: the base tensors that train as well. contract.Row has all fields.
ROWS = {
    "full": mergeable(Full(), "same", lambda s: s.total, base=every_tensor),
    "partial": mergeable(Partial(k=1), "same", lambda s: s.block + s.tail, base=in_top_block_or_above),
    # Not on GPT, whose tied head has no tensor of its own. A new classification head is counted apart.
    "head": mergeable(Partial(k=0), "same", lambda s: s.own_head, base=in_head, on=KINDS[1:]),
    "bitfit": mergeable(BitFit(), "same", count_biases, base=is_bias),
    "lora": mergeable(LoRA(r=4), "same", count_qv(4)),
    "lora-all": mergeable(LoRA(r=3, targets=LINEARS), "same", count_all_linears),
    "lora-embed": mergeable(LoRA(r=2, targets="embed"), "same", lambda s: 2 * (s.V + s.C)),
    "lora-1": mergeable(LoRA(r=1, alpha=1), "same", count_qv(1)),
    "lora-dropout": mergeable(LoRA(r=4, dropout=0.5), "same", count_qv(4), drops=True),
    "houlsby": not_mergeable(Houlsby(m=5), "near", count_adapters_and_norms, base=is_norm),
    "houlsby-frozen-norms": not_mergeable(Houlsby(m=5, norms=False), "near", count_adapters),
    "prefix": not_mergeable(PrefixTuning(p=3), "other", count_prefix),
    "prefix-mlp": not_mergeable(PrefixTuning(p=3, mlp=6), "other", count_prefix_mlp),
    "prefix-shift": not_mergeable(PrefixTuning(p=3, shift=True), "other", count_prefix),
    "prompt": not_mergeable(PromptTuning(p=3), "other", lambda s: 3 * s.C),
    "prompt-uniform": not_mergeable(PromptTuning(p=3, init="uniform"), "other", lambda s: 3 * s.C),
}
CASES = [pytest.param(row, kind, id=f"{name}-{kind}") for name, row in ROWS.items() for kind in row.on]
every_row_and_model = pytest.mark.parametrize("row, kind", CASES)


# ── the contract ─────────────────────────────────────────────────────────────────────────────────────────────────────
@every_row_and_model
def test_training_changes_the_trainable_tensors_and_no_other_bit(row, kind):
    contract.check_moves(row, kind)


@every_row_and_model
def test_the_number_of_trainable_parameters(row, kind):
    contract.check_count(row, kind)


@every_row_and_model
def test_the_output_right_after_attach_is_as_the_row_says(row, kind):
    contract.check_start(row, kind)


@every_row_and_model
def test_gradients_agree_with_differences_away_from_the_start(row, kind):
    contract.check_gradients(row, kind)


@every_row_and_model
def test_a_saved_adapter_loads_bitwise(row, kind):
    contract.check_save(row, kind)


@every_row_and_model
def test_detach_restores_the_base_and_attach_restores_the_method(row, kind):
    contract.check_off_and_on(row, kind)


@every_row_and_model
def test_merge_keeps_the_output_or_raises_and_changes_nothing(row, kind):
    contract.check_merge(row, kind)


@every_row_and_model
def test_rows_of_a_batch_are_independent(row, kind):
    contract.check_rows(row, kind)


@every_row_and_model
def test_adamw_keeps_two_moments_per_trainable_parameter(row, kind):
    contract.check_optimizer(row, kind)


@every_row_and_model
def test_dropout_is_in_the_branch_only_and_eval_is_deterministic(row, kind):
    contract.check_dropout(row, kind)


@every_row_and_model
def test_the_loss_of_two_batches_falls_and_a_seed_repeats_the_run(row, kind):
    contract.check_learns(row, kind)


@every_row_and_model
def test_padding_changes_nothing(row, kind):
    contract.check_padding(row, kind)


@pytest.mark.parametrize("row, kind", [case for case in CASES if case.values[1] in NEXT_TOKEN])
def test_decoding_through_the_cache_gives_the_logits_of_one_pass(row, kind):
    contract.check_cache(row, kind)


# ── helpers of the properties ────────────────────────────────────────────────────────────────────────────────────────
GPTS = pytest.mark.parametrize("kind", ["gpt", "bert"])
LANGUAGE_MODELS = pytest.mark.parametrize("kind", ["gpt", "bert", "llama"])


def wide(kind: str = "gpt") -> Any:
    return build(kind).to(dtype=np.float64)


def on(method: Method, kind: str = "gpt", model: Any = None) -> tuple[Any, edit.Attached]:
    """A float64 model with the method on it, at its start."""
    model = build(kind) if model is None else model
    a = attach(model, method)
    return model.to(dtype=np.float64).eval(), a


def grads(model: Any, b: dict) -> dict[str, np.ndarray | None]:
    model.zero_grad()
    the_loss(model, b).backward()
    return {n: host(p.grad) for n, p in model.named_parameters().items()}


def equal_after_training(one: Any, other: Any) -> bool:
    """True if two models have the same values: bitwise on a CPU; a GPU adds colliding rows in any order."""
    ours, theirs = values(one), values(other)
    if array.backend() == "cupy":
        return all(near(v, theirs[name], 1e-4) for name, v in ours.items())
    return contract.all_same(ours, theirs)


def draw(shape: tuple, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@dataclass(frozen=True)
class Bottom(Method):
    """What Partial(k = L) leaves out."""

    def trains(self, model: Module) -> set[str]:
        return {n for n in edit.base_parameters(model) if n.split(".")[0] in ("embed", "pos", "type", "norm0")}


# ── full, partial ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
def test_full_trains_what_a_model_without_any_method_trains(kind):
    one, other = build(kind), put_on(ROWS["full"], kind)[0]
    for m in (one, other):
        short_fit(m, kind, ROWS["full"])
    assert equal_after_training(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_all_blocks_and_the_embeddings_are_full_fine_tuning(kind):
    one, other = build(kind), build(kind)
    attach(one, Full())
    attach(other, Partial(k=2))
    attach(other, Bottom())
    for m in (one, other):
        short_fit(m, kind, ROWS["full"])
    assert equal_after_training(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_below_the_lowest_trained_block_nothing_is_computed(kind):
    model, _ = put_on(ROWS["partial"], kind)
    loss = the_loss(model, batch(kind, 0))
    records = [n for n in topological(loss) if isinstance(n, Record)]
    all_records = [n for n in topological(the_loss(build(kind), batch(kind, 0))) if isinstance(n, Record)]
    heads = {"gpt": 1, "bert": 2, "gpt-classes": 1, "bert-classes": 2, "llama": 1}[kind]
    in_block = 7 if kind == "llama" else 6
    maps = {"linear": 1, "project": 3}                    # one kernel may compute q, k and v together
    assert sum(maps.get(r.name, 0) for r in records) == in_block + heads
    assert sum(maps.get(r.name, 0) for r in all_records) == 2 * in_block + heads
    assert not any(r.name == "embedding" for r in records)

    def reads_leaves_only(record: Record) -> bool:
        return all(isinstance(p, Tensor) for p in record.parents())

    # The ops that need no gradient of their input: norm1 in GPT and Llama; q, k and v in BERT.
    lowest = [r.name for r in records if reads_leaves_only(r)]
    norms, linears = (0, 3) if kind.startswith("bert") else (1, 0)
    norm = "rms_norm" if kind == "llama" else "layer_norm"
    assert (lowest.count(norm), sum(maps.get(name, 0) for name in lowest)) == (norms, linears)
    loss.backward()
    assert {n for n, p in model.named_parameters().items() if p.grad is not None} == set(trained(model))


def test_the_head_alone_can_be_trained_on_features_computed_once():
    kind = "gpt-classes"
    model, _ = put_on(ROWS["head"], kind)
    short = build(kind)
    b = batch(kind, 0)
    ctx = Context(mask=b["mask"])
    with no_grad():
        short(b["ids"], ctx)
        x = short.head.row(ctx.last_hidden_state, ctx)
    optimizer = AdamW(0.02, weight_decay=0.1).start({"w": short.head.out.weight})
    for _ in range(5):
        short.head.zero_grad()
        ops.cross_entropy(short.head(x, Context()), dev(b["labels"])).backward()
        optimizer.step(clip=1.0)
    fit(model, [b], 5, AdamW(0.02, weight_decay=0.1), progress=False)
    assert same(host(model.head.out.weight), host(short.head.out.weight))


def test_partial_refuses_more_blocks_than_there_are_and_a_tied_head_alone():
    with pytest.raises(ValueError, match="k wants a whole number >= 0, got -1"):
        Partial(k=-1)
    with pytest.raises(ValueError, match="0 <= k <= 2"):
        attach(build("gpt"), Partial(k=3))
    with pytest.raises(ValueError, match="would train nothing"):
        attach(build("gpt"), Partial(k=0))


# ── BitFit ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_bias_gets_no_gradient_and_every_other_bias_does(kind):
    """Llama's gets one: the bias is rotated by the position of its key, so it is no constant of a row of scores."""
    model, _ = on(BitFit(), kind)
    for n, g in grads(model, batch(kind, 0)).items():
        if contract.edit.base_parameters(model)[n].requires_grad:
            is_ignored = n.endswith("attn.k.bias") and kind != "llama"
            assert np.abs(g).max() <= 1e-12 if is_ignored else np.abs(g).max() > 1e-9, n


@GPTS
def test_a_biass_gradient_is_the_column_sum_of_the_gradient_that_arrives(kind):
    """db = Σ g, seen through an edit that adds a tensor of zeros to the same output."""
    class Tap(Edit):
        def __init__(self, shape: tuple):
            self.z = Parameter(dev(np.zeros(shape)))

        def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
            return y + self.z
    model, _ = on(BitFit(), kind)
    up, b = model.blocks[1].mlp.up, batch("gpt-classes", 0) if kind == "gpt" else batch(kind, 0)
    T = 7
    if kind == "gpt":
        b = {"ids": tokens(4, 8)}
    tap = Tap((4, T, Sizes.F))
    up.edits = {"tap": tap}
    the_loss(model, b).backward()
    assert near(host(up.bias.grad), host(tap.z.grad).sum((0, 1)))


def check_last_name(method: Method) -> None:
    """T5's relative_attention_bias is a table, its weight no bias."""
    model = build("gpt")
    model.blocks[0].attn.relative_attention_bias = Embedding(4, 3, rng=np.random.default_rng(0))
    attach(model, method)
    assert set(trained(model)) == {n for n in model.named_parameters() if n.endswith(".bias")}


def test_bitfit_goes_by_a_tensors_last_name():
    check_last_name(BitFit())
    with pytest.raises(AssertionError):
        check_last_name(Substring())


def test_bitfit_on_a_model_without_biases_says_so_and_does_not_train_the_head_alone():
    class Plain(Module):
        head_modules = ("head",)

        def __init__(self):
            rng = np.random.default_rng(0)
            self.body, self.head = Linear(4, 4, rng=rng, bias=False), Linear(4, 2, rng=rng)
    with pytest.raises(ValueError, match="would train nothing"):
        attach(Plain(), BitFit())
    attach(Plain(), Full())


def test_the_biases_of_two_tasks_can_be_swapped_forth_and_back():
    model, kept, ys = build("bert"), [], []
    for task in (0, 1):
        attach(model, BitFit(), name=f"task{task}")
        fit(model, [batch("bert", task)], 4, AdamW(0.02), progress=False)
        ys.append(run(model))
        kept.append(detach(model))
    assert not near(ys[0], ys[1], 1e-4)
    for task in (0, 1, 0):
        attach(model, kept[task])
        assert same(run(model), ys[task])
        detach(model)


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
def test_loras_first_step_moves_B_and_not_A(kind):
    model, a = on(LoRA(r=2), kind)
    g = grads(model, batch(kind, 0))
    assert all(np.abs(v).max() == 0 for n, v in g.items() if n.endswith("lora.A"))
    assert all(np.abs(v).max() > 1e-8 for n, v in g.items() if n.endswith("lora.B"))


@LANGUAGE_MODELS
def test_one_step_of_SGD_gives_the_update_minus_eta_s_squared_dW_AtA(kind):
    s, eta, b = 8.0, 0.1, batch(kind, 0)
    dW = grads(wide(kind), b)
    model, a = on(LoRA(r=2, alpha=16), kind)
    fit(model, [b], 1, SGD(eta), clip=None, progress=False)
    for path, e in a.edits.items():
        A = host(e.A)
        assert near(host(e.delta()), -eta * s**2 * dW[f"{path}.weight"] @ A.T @ A)


@pytest.mark.parametrize("kind", KINDS)
def test_loras_gradients_are_those_of_the_merged_weight_through_the_factors(kind):
    """dB = s ∇W Aᵀ,  dA = s Bᵀ ∇W"""
    model, a = tuned(replace(ROWS["lora-all"], method=LoRA(r=3, alpha=5, targets=LINEARS)), kind)
    s, b = 5 / 3, batch(kind, 0)
    mine = grads(model, b)
    whole = build(kind).to(dtype=np.float64)
    for path, e in a.edits.items():
        W = edit.base_modules(whole)[path].weight
        W.copy_(host(W) + s * host(e.B) @ host(e.A))
    for n, p in edit.trained(model).items():
        if edit.is_head(model, n):
            edit.base_parameters(whole)[n].copy_(host(p))
    dW = grads(whole, b)
    for path, e in a.edits.items():
        G = dW[f"{path}.weight"]
        assert near(mine[f"{path}.edits.lora.B"], s * G @ host(e.A).T)
        assert near(mine[f"{path}.edits.lora.A"], s * host(e.B).T @ G)


def a_linear(r: int = 3, alpha: float = 6.0, seed: int = 0) -> tuple[Linear, LowRank, Tensor]:
    """A linear map with a LoRA away from its start, and an input; all float64."""
    lin = Linear(5, 7, rng=np.random.default_rng(seed), std=0.5)
    e = LoRA(r=r, alpha=alpha).edit("lin", lin, np.random.default_rng(seed + 1))
    lin.edits = {"lora": e}
    e.B.copy_(draw(e.B.shape, seed + 2))
    lin.bias.copy_(draw((7,), 4))
    return lin.to(dtype=np.float64), e, Tensor(dev(draw((2, 4, 5), 3)))


def test_lora_is_its_equation():
    lin, e, x = a_linear()
    W, b, A, B = (host(p) for p in (lin.weight, lin.bias, e.A, e.B))
    assert near(host(lin(x)), host(x) @ W.T + b + 6 / 3 * (host(x) @ A.T) @ B.T)
    assert np.linalg.matrix_rank(host(e.delta())) == 3


def test_lora_is_the_same_for_every_basis_of_its_rank():
    lin, e, x = a_linear()
    y, M = host(lin(x)), draw((3, 3), 9)
    e.B.copy_(host(e.B) @ M)
    e.A.copy_(np.linalg.inv(M) @ host(e.A))
    assert near(host(lin(x)), y, 1e-11)


def test_doubling_alpha_doubles_what_lora_adds():
    (one, _, x), (two, _, _) = a_linear(alpha=6.0), a_linear(alpha=12.0)
    one_, two_ = host(one(x)), host(two(x))
    one.edits = {}
    assert near(two_ - host(one(x)), 2 * (one_ - host(one(x))))


def test_a_full_rank_lora_can_be_any_update():
    lin, e, _ = a_linear(r=5, alpha=5.0)
    U, S, Vt = np.linalg.svd(draw((7, 5), 8), full_matrices=False)
    e.B.copy_(U * S)
    e.A.copy_(Vt)
    assert near(host(e.delta()), draw((7, 5), 8))


def test_loras_A_is_drawn_from_plus_minus_one_over_root_in_and_B_is_zero():
    e = LoRA(r=64).edit("x", Linear(25, 4, rng=np.random.default_rng(0)), np.random.default_rng(1))
    A = host(e.A)
    assert np.abs(A).max() <= 0.2 and abs(A.std() - 0.2 / 3**0.5) < 0.01 and not host(e.B).any()


def test_two_loras_side_by_side_are_their_sum():
    """Both attached, both combined, and one of twice the rank whose factors are stacked: the same model."""
    base = wide()
    parts = []
    for seed, r in ((1, 2), (2, 3)):
        model = build("gpt")
        attach(model, LoRA(r=r, alpha=2 * r), name=f"lora{seed}", seed=seed)
        noise(model, seed=seed)
        parts.append(detach(model.to(dtype=np.float64)))
    both = wide()
    for a in parts:
        attach(both, a)
    y = run(both)
    for a in reversed(parts):
        detach(both, a.name)
    attach(both, combine(parts))
    assert near(run(both), y)
    stacked, a = on(LoRA(r=5, alpha=10))
    for path, e in a.edits.items():
        one, two = (p.edits[path] for p in parts)
        e.A.copy_(np.concatenate([host(one.A), host(two.A)]))
        e.B.copy_(np.concatenate([host(one.B), host(two.B)], axis=1))
    assert near(run(stacked), y) and not near(run(base), y, 1e-3)
    merge(both)
    assert near(run(both), y)


def test_lora_on_a_tied_embedding_is_seen_by_the_head_and_merges_exactly():
    model, a = tuned(ROWS["lora-embed"], "gpt")
    y, W = run(model), host(model.embed.read("weight"))
    assert not near(W, host(model.embed.weight), 1e-3)
    merge(model)
    assert same(host(model.embed.weight), W) and near(run(model), y)


def test_lora_on_an_embedding_is_its_equation_packed_or_not():
    """W + (α/r) B A, for all who read W."""
    W = draw((7, 5))
    for weight in (Parameter(dev(W)), Int8(W)):
        table = Embedding(7, 5, rng=np.random.default_rng(0)).to(dtype=np.float64)
        table.weight = weight
        e = LoRA(r=3, alpha=6.0).edit("embed", table, np.random.default_rng(1))
        e.B.copy_(draw(e.B.shape, 2))
        table.edits = {"lora": e.to(dtype=np.float64)}
        dense = host(weight.dequantize() if isinstance(weight, Int8) else weight)
        want = (dense + 6 / 3 * host(e.B) @ host(e.A))[tokens(2, 3) % 7]
        assert near(host(table(dev(tokens(2, 3) % 7))), want)


TABLES = [("gpt", "pos"), ("gpt-classes", "embed"), ("bert", "type"), ("bert-classes", "embed")]


@pytest.mark.parametrize("kind, where", TABLES)
def test_lora_on_an_embedding_leaves_rows_alone_that_were_not_read(kind, where):
    model, a = tuned(replace(ROWS["lora-embed"], method=LoRA(r=2, targets=where)), kind)
    b = batch(kind, 0)
    g = grads(model, b)[f"{where}.edits.lora.B"]
    read = {"pos": range(6 if kind == "gpt" else 7), "type": [0], "embed": np.unique(b["ids"])}[where]
    assert {int(i) for i in np.flatnonzero(np.abs(g).max(1))} <= set(read) and np.abs(g).max() > 0


def test_lora_says_what_it_cannot_adapt():
    for targets in ("norm1", "blocks.*", "attn.kv", "head"):
        with pytest.raises(TypeError, match="weight matrix"):
            attach(build("gpt"), LoRA(targets=targets))
    for r in (0, -1):
        with pytest.raises(ValueError, match="rank"):
            attach(build("gpt"), LoRA(r=r))
    with pytest.raises(ValueError, match="dropout"):
        attach(build("gpt"), LoRA(dropout=1.0))


# ── Houlsby ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_whose_upper_matrix_is_zero_is_not_there(kind):
    model, a = put_on(ROWS["houlsby"], kind)
    for e in a.edits.values():
        e.up.weight.copy_(0 * host(e.up.weight))
    assert same(run(model), run(build(kind)))


def test_an_adapter_is_its_equation_and_stands_before_the_residual_sum():
    """h + W_up gelu(W_down h + b) + b', with h what attention (or the MLP) gives out"""
    model, a = tuned(ROWS["houlsby"], "bert")
    block, x = model.blocks[0], Tensor(dev(draw((2, 4, 12), 1)))
    e, ctx = block.attn.edits["houlsby"], Context(ids=tokens(2, 4))
    ctx.begin(tokens(2, 4), model.pos.weight.data)
    with_it = host(block.attn(x, ctx))
    kept, block.attn.edits = block.attn.edits, {}
    h = block.attn(x, ctx)
    z = host(h) @ host(e.down.weight).T + host(e.down.bias)
    assert near(with_it, host(h) + host(ops.gelu(Tensor(dev(z)))) @ host(e.up.weight).T + host(e.up.bias))
    block.attn.edits = kept
    assert near(host(block.norm1(x + Tensor(dev(with_it)), ctx)), host(block.norm1(x + block.attn(x, ctx), ctx)))


def test_an_adapters_weights_start_normal_cut_at_two_sigma():
    z = truncated_normal(np.random.default_rng(0), (300, 40), 0.01)
    assert np.abs(z).max() <= 0.02 and abs(z.mean()) < 2e-4
    assert abs(z.std() / 0.01 - 0.8796) < 0.02           # the standard deviation of the cut normal
    e = Houlsby(m=30, std=0.01).edit("x", build("gpt").blocks[0].attn, np.random.default_rng(1))
    for layer in (e.down, e.up):
        w = host(layer.weight)
        assert 0.015 < np.abs(w).max() <= 0.02 and abs(w.std() - 0.0088) < 0.001 and not host(layer.bias).any()


def test_numbers_within_two_sigma_are_those_drawn_first():
    for seed in range(60):
        first = np.random.default_rng(seed).standard_normal(3)
        z = truncated_normal(np.random.default_rng(seed), (3,), 0.5)
        near = np.abs(first) <= 2
        assert np.array_equal(z[near], first[near] * 0.5) and np.abs(z).max() <= 1.0


# ── prefix ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", NEXT_TOKEN)
def test_keys_and_values_of_real_text_as_a_prefix_are_that_text(kind):
    """Llama's keys in the cache are rotated, and a prefix is not rotated again."""
    base, ids, cache = wide(kind), tokens(1, 7), Cache()
    with no_grad():
        base(ids[:, :3], cache=cache)
    model, a = on(PrefixTuning(p=3, shift=True), kind)
    for i, block in enumerate(base.blocks):
        k, v = cache.kv[block.attn.kv]
        a.edits[f"blocks.{i}.attn.kv"].K.copy_(k.data[0])
        a.edits[f"blocks.{i}.attn.kv"].V.copy_(v.data[0])
    assert near(run(model, ids[:, 3:]), run(base, ids)[:, 3:])
    rows = np.repeat(ids[:, 3:], 2, axis=0)
    assert near(run(model, rows)[1:], run(base, ids)[:, 3:])


def test_two_shifted_prefixes_shift_the_text_twice():
    model, _ = on(PrefixTuning(p=3, shift=True))
    attach(model, PrefixTuning(p=2, shift=True), name="second")
    ctx = Context()
    model(tokens(1, 4), ctx)
    assert ctx.position_shift == 5


def head_outputs(K: np.ndarray, V: np.ndarray, *, causal: bool = False) -> tuple[np.ndarray, ...]:
    """An attention layer with the prefix K, V (H, p, D), written out in NumPy.

    (with the prefix, without it, the prefix's own attention, λ), each (B, H, T, D). The library's layer must give the
    first."""
    rng = np.random.default_rng(3)
    layer = Attention(6, 2, rng=rng, causal=causal)
    for p in layer.parameters():
        p.copy_(rng.standard_normal(p.shape))
    layer.o.weight.copy_(np.eye(6))
    layer.o.bias.copy_(np.zeros(6))
    e = Prefix(array.normal(rng, (2, K.shape[1], 3), 0.1), array.normal(rng, (2, K.shape[1], 3), 0.1))
    layer.kv.edits = {"prefix": e}
    layer.to(dtype=np.float64)
    e.K.copy_(K)
    e.V.copy_(V)
    x = draw((2, 4, 6), 5)

    def by_heads(m: Linear) -> np.ndarray:
        y = x @ host(m.weight).T + host(m.bias)
        return y.reshape(2, 4, 2, 3).transpose(0, 2, 1, 3)

    q = by_heads(layer.q)
    k = by_heads(layer.k)
    v = by_heads(layer.v)
    own = np.exp(q @ k.swapaxes(-1, -2) / 3**0.5) * (np.tri(4) if causal else 1)
    pre = np.exp(q @ K.swapaxes(-1, -2) / 3**0.5)
    Z, Zp = own.sum(-1, keepdims=True), pre.sum(-1, keepdims=True)
    whole = (own @ v + pre @ V) / (Z + Zp)
    ctx = Context()
    ctx.begin(tokens(2, 4), layer.o.weight.data)
    got = host(layer(Tensor(dev(x)), ctx)).reshape(2, 4, 2, 3).transpose(0, 2, 1, 3)
    assert near(got, whole)
    return got, own @ v / Z, pre @ V / Zp, Zp / (Z + Zp)


@pytest.mark.parametrize("causal", [False, True])
def test_a_head_with_a_prefix_mixes_its_own_view_with_the_prefixs(causal):
    """(1 − λ) Attn(q, K, V) + λ Attn(q, P_K, P_V)"""
    got, own, pre, lam = head_outputs(draw((2, 5, 3), 1), draw((2, 5, 3), 2), causal=causal)
    assert near(got, (1 - lam) * own + lam * pre)


def test_a_prefix_of_zeros_is_not_nothing_it_takes_p_of_Z_plus_p_away():
    got, own, _, lam = head_outputs(np.zeros((2, 5, 3)), np.zeros((2, 5, 3)))
    assert near(got, (1 - lam) * own) and not near(got, own, 1e-2)
    Z = 5 / lam - 5
    assert near(got, Z / (Z + 5) * own)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_a_prefixs_rows_does_not_matter(kind):
    model, a = tuned(ROWS["prefix"], kind)
    y = run(model)
    for i, e in enumerate(a.edits.values()):
        order = np.random.default_rng(i).permutation(3)
        e.K.copy_(host(e.K)[:, order])
        e.V.copy_(host(e.V)[:, order])
    assert near(run(model), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [PrefixTuning(p=0), PromptTuning(p=0)], ids=["prefix", "prompt"])
def test_no_rows_are_nothing(method, kind):
    model = build(kind)
    attach(model, method)
    assert same(run(model.eval()), run(build(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_an_mlp_made_can_stand_for_it(kind):
    model, a = tuned(ROWS["prefix-mlp"], kind)
    y, heavy = run(model), edit.count(model)
    assert isinstance(next(iter(a.edits.values())), Reparameterized)
    assert len({id(e.hidden) for e in a.edits.values()}) == 1
    b = eject(model)
    assert same(run(model), y) and b.method == replace(a.method, mlp=None) and edit.attached(model) == (b,)
    for e in b.edits.values():                           # arrays of its own, no views of the MLP's output
        assert host(e.K).flags.c_contiguous and host(e.V).flags.c_contiguous
    light, s = edit.count(model), Sizes(kind)
    assert light.trained == 2 * s.L * 3 * s.keys < heavy.trained and light.head == heavy.head
    detach(model)
    assert same(run(model), run(build(kind).to(dtype=np.float64)))


def test_an_mlps_prefix_is_its_equation_and_its_first_half_is_the_keys():
    model, a = tuned(ROWS["prefix-mlp"], "gpt")
    for e in a.edits.values():
        E, W1, b1 = (host(p) for p in (e.hidden.E.weight, e.hidden.W1.weight, e.hidden.W1.bias))
        W2, b2 = host(e.W2.weight), host(e.W2.bias)
        rows = np.tanh(E @ W1.T + b1) @ W2.T + b2                                # (p, 2C)
        for got, want in zip(e.prefix(Context()), (rows[:, :12], rows[:, 12:])):
            assert near(host(got), want.reshape(3, 3, 4).transpose(1, 0, 2))


def test_an_mlps_prefix_starts_with_the_deviations_that_keep_its_size():
    rng = np.random.default_rng(0)
    shared = Hidden(80, 50, 90, rng)
    last = Reparameterized(5, 10, shared, rng).W2
    standard_normal = np.random.default_rng(0).standard_normal((80, 50)).astype(np.float32)
    assert np.array_equal(host(shared.E.weight), standard_normal)
    assert abs(host(shared.W1.weight).std() * 50**0.5 - 1) < 0.05 and abs(host(last.weight).std() * 90**0.5 - 1) < 0.05
    assert last.weight.shape == (100, 90) and not host(last.bias).any() and not host(shared.W1.bias).any()


def test_prefixes_and_prompts_do_not_decay_and_are_single_precision():
    for name in ("prefix", "prompt", "prompt-uniform"):
        _, a = put_on(ROWS[name], "gpt")
        ps = [p for e in a.edits.values() for p in e.parameters()]
        assert ps and all(p.decay is False and p.dtype == np.float32 for p in ps)


def test_a_shifted_text_needs_room_among_the_positions():
    model = build("gpt")
    attach(model, PrefixTuning(p=3, shift=True))
    assert run(model, tokens(1, 21)).shape == (1, 21, 23)
    with pytest.raises(ValueError, match="positions"):
        run(model, tokens(1, 22))


@GPTS
def test_a_shift_moves_the_text_by_p_positions(kind):
    """A shifted prefix is an unshifted one on a model whose positions start at p."""
    model, a = tuned(ROWS["prefix-shift"], kind)
    y = run(model)
    model.embed.edits = {}
    assert not near(run(model), y, 1e-3)
    model.pos.weight.copy_(np.roll(host(model.pos.weight), -3, axis=0))
    assert near(run(model), y)


# ── prompt ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@LANGUAGE_MODELS
def test_embeddings_of_real_tokens_as_a_prompt_are_those_tokens(kind):
    ids = tokens(1, 7)
    model, a = on(PromptTuning(p=3), kind)
    a.edits["embed"].P.copy_(host(model.embed.weight)[ids[0, :3]])
    assert near(run(model, np.repeat(ids[:, 3:], 2, 0)), np.repeat(run(wide(kind), ids)[:, 3:], 2, 0))


@LANGUAGE_MODELS
def test_a_prompt_is_embeddings_put_in_front_by_hand_and_so_is_its_gradient(kind):
    model, a = tuned(ROWS["prompt"], kind)
    P, base = a.edits["embed"].P, wide(kind)
    rows = np.concatenate([np.broadcast_to(host(P), (4, 3, 12)), host(base.embed.weight)[tokens()]], axis=1)
    whole, cover = Tensor(dev(rows), requires_grad=True), draw((4, 7, Sizes.V), 7)
    y0, y = base(whole), model(tokens())
    assert near(host(y), host(y0)[:, 3:])
    y.backward(dev(cover))
    y0.backward(dev(np.concatenate([np.zeros((4, 3, Sizes.V)), cover], axis=1)))
    assert near(host(P.grad), host(whole.grad)[:, :3].sum(0))


def test_a_prompt_leaves_after_the_last_block():
    model = GPT(GPTConfig(23, 24, 12, 4, 3))
    found = PromptTuning().find(model)
    assert list(found) == ["embed", "blocks.3"]
    assert found["blocks.3"] is model.blocks[3]


def test_a_prompt_starts_as_rows_of_the_vocabulary_or_within_one_half():
    P = host(put_on(ROWS["prompt"], "gpt")[1].edits["embed"].P)
    E = host(build("gpt").embed.weight)
    assert all((E == row).all(1).any() for row in P) and len(np.unique(P, axis=0)) > 1
    table = Embedding(4, 3, rng=np.random.default_rng(0))

    def distinct_rows() -> np.ndarray:
        prompt = SoftPrompt(table, 200, "vocabulary", np.random.default_rng(1))
        return np.unique(host(prompt.P), axis=0)

    assert same(distinct_rows(), np.unique(host(table.weight), axis=0))          # every token may come
    table.weight = Int8(host(table.weight))
    assert same(distinct_rows(), np.unique(host(table.weight.dequantize()), axis=0))
    big = attach(build("gpt"), PromptTuning(p=12, init="uniform")).edits["embed"].P
    assert 0.4 < np.abs(host(big)).max() <= 0.5 and abs(host(big).std() - 12**-0.5) < 0.05
    with pytest.raises(ValueError, match="uniform"):
        attach(build("gpt"), PromptTuning(init="random"))


def test_a_prompt_needs_room_among_the_positions():
    model = build("gpt")
    attach(model, PromptTuning(p=3))
    assert run(model, tokens(1, 21)).shape == (1, 21, 23)
    with pytest.raises(ValueError, match="soft prompt"):
        run(model, tokens(1, 22))


@pytest.mark.parametrize("name", ["prompt", "prefix-shift", "houlsby"])
def test_the_head_speaks_where_it_is_asked_to_whatever_stands_in_front(name):
    model, _ = tuned(ROWS[name], "gpt")
    at = np.array([0, 5, 9, 27])
    assert near(run(model, logit_positions=at), run(model).reshape(-1, Sizes.V)[at])


# ── wrong methods, and the check that refuses each ───────────────────────────────────────────────────────────────────
class WrongLoRA(Method):
    """LoRA with one edit of a wrong kind on each target."""

    targets: Any = "attn.[qv]"
    kind: type[LowRank] = LowRank

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        return self.kind(m.in_features, m.out_features, 4, 4.0, 0.0, rng)


def lora_like(targets: Any = WrongLoRA.targets, **hooks: Any) -> Method:
    """LoRA with another `after`, `fold` or `__init__`."""
    kind = type("WrongLowRank", (LowRank,), hooks)
    return type("SomeLoRA", (WrongLoRA,), {"kind": kind, "targets": targets})()


def starts_dead(self: Any, in_features: int, out_features: int, r: int, alpha: float, dropout: float, rng: Any) -> None:
    """A = B = 0: a saddle point."""
    LowRank.__init__(self, in_features, out_features, r, alpha, dropout, rng)
    self.A.copy_(0 * host(self.A))


def starts_with_dropout(self: Any, in_features: int, out_features: int, r: int, alpha: float, dropout: float,
                        rng: Any) -> None:
    LowRank.__init__(self, in_features, out_features, r, alpha, 0.5, rng)


def drops_the_whole_output(self: Any, x: Any, y: Any, ctx: Any) -> Any:
    return self.drop(LowRank.after(self, x, y, ctx), ctx)


def starts_away(self: Any, x: Any, y: Any, ctx: Any) -> Any:
    return y + ops.linear(x @ self.A.T, self.B + 0.1)


def folds_with_r_forgotten(self: Any, p: dict) -> dict:
    return {**p, "weight": p["weight"] + 4 * self.delta()}


def folds_transposed(self: Any, p: dict) -> dict:
    return {**p, "weight": p["weight"] + self.delta().T}


def folds_negated(self: Any, p: dict) -> dict:
    return {**p, "weight": p["weight"] - self.delta()}


def folds_in_place(self: Any, p: dict) -> dict:
    p["weight"] += self.delta()
    return p


def loses_half_of_the_gradient(self: Any, x: Any, y: Any, ctx: Any) -> Any:
    z = ops.linear(x, self.A)
    return y + ops.linear((z + z.detach()) * 0.5, self.B) * self.s


def looks_at_the_mean_of_the_batch(self: Any, x: Any, y: Any, ctx: Any) -> Any:
    centered = x - x.mean(axis=0, keepdims=True)
    return y + ops.linear(ops.linear(centered, self.A), self.B)


class Careless(Method):
    """Writes into the base's weight instead of standing beside it."""

    targets = "attn.q"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        m.weight.copy_(host(m.weight) * 1.01)
        return LowRank(m.in_features, m.out_features, 4, 4.0, 0.0, rng)


class Secret(LowRank):
    """A random projection that is not among its buffers, drawn from another stream than attach's."""

    def __init__(self, in_features: int, out_features: int, r: int, alpha: float, dropout: float,
                 rng: np.random.Generator):
        super().__init__(in_features, out_features, r, alpha, dropout, rng)
        self._A = self.A.data
        del self.A

    def after(self, x: Any, y: Any, ctx: Any) -> Any:
        return y + ops.linear(ops.linear(x, Tensor(self._A)), self.B) * self.s

    fold = Edit.fold


class SecretLoRA(WrongLoRA):
    kind = Secret


class RowsOnly(LowRank):
    """Changes the rows that an embedding gives, not the weight that the tied head reads."""

    def after(self, x: Any, y: Any, ctx: Any) -> Any:
        return y + (ops.embedding(self.B, x) @ self.A) * self.s


class RowsOnlyLoRA(Method):
    targets = "embed"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        return RowsOnly(m.out_features, m.in_features, 2, 1.0, 0.0, rng)


class OutsideBottleneck(Bottleneck):
    """The nonlinearity is around the residual sum, not inside the branch."""

    def after(self, x: Any, y: Any, ctx: Any) -> Any:
        return ops.gelu(y + self.up(self.down(y, ctx), ctx))


class Outside(Method):
    targets = "blocks.*.attn"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        return OutsideBottleneck(m.out_features, 5, 0.01, rng)


class Blind(Prefix):
    """The mask hides the prefix's own columns."""

    def after(self, x: Any, y: Any, ctx: Any) -> Any:
        k, v, key_mask = super().after(x, y, ctx)
        if key_mask is not None:
            key_mask = key_mask & (ops.xp(key_mask).arange(key_mask.shape[1]) >= self.K.shape[1])
        return k, v, key_mask


class CachedTwice(Prefix):
    """Stands before the cache, so every call leaves another prefix in it."""

    def before(self, x: Any, ctx: Any) -> Any:
        return Prefix.after(self, None, x, ctx)

    after = Edit.after


class WrongShift(Shift):
    """An edit of the position table that counts positions from the left, padding or not."""

    def before(self, positions: Any, ctx: Any) -> Any:
        return ops.xp(ctx.ids).arange(ctx.ids.shape[1])[None] + self._p


class SomePrefix(Method):
    targets: Any = ("attn.kv", "embed")
    kind: type[Prefix] = Prefix
    shift: type[Shift] = Shift

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit | None:
        if isinstance(m, Embedding):
            return self.shift(3)
        K = array.normal(rng, (m.heads, 3, m.head_width), 0.3)
        V = array.normal(rng, (m.heads, 3, m.head_width), 0.3)
        return self.kind(K, V)


def some_prefix(**attributes: Any) -> Method:
    """A shifted prefix with other attributes."""
    return type("SomePrefix", (SomePrefix,), attributes)()


class KeptPrompt(Method):
    """A prompt whose rows stay."""

    targets = "embed"

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        return SoftPrompt(m, 3, "vocabulary", rng)


class Forgetful(SoftPrompt):
    """Puts the prompt in again at every call, cache or not."""

    def after(self, x: Any, y: Any, ctx: Any) -> Any:
        ctx.prepend(3)
        return ops.concatenate(ops.broadcast_to(self.P, (y.shape[0], 3, y.shape[2])), y, axis=1)


class AlwaysDrop(Drop):
    def after(self, x: Any, y: Any, ctx: Any) -> Any:
        return y[:, 3:]


class AlwaysPrompt(Method):
    targets = ("embed", "blocks.1")

    def edit(self, path: str, m: Module, rng: np.random.Generator) -> Edit:
        return Forgetful(m, 3, "vocabulary", rng) if path == "embed" else AlwaysDrop(3)


class Substring(Method):
    """BitFit that looks for "bias" anywhere in a name."""

    def trains(self, model: Module) -> set[str]:
        return {n for n in edit.base_parameters(model) if "bias" in n}


class Leaky(Method):
    """BitFit that trains a gain too."""

    def trains(self, model: Module) -> set[str]:
        return {n for n in edit.base_parameters(model) if is_bias(n) or n == "norm.weight"}


def on_gpt(name: str) -> Row:
    return replace(ROWS[name], on=("gpt",))


ADAPTERS = on_gpt("houlsby")
LORA = on_gpt("lora")
PREFIX = on_gpt("prefix")
PROMPT = on_gpt("prompt")
DROPS = replace(LORA, drops=True)
UNMERGED = replace(LORA, merges=False)
WRONG_DROPOUT = lora_like(__init__=starts_with_dropout, after=drops_the_whole_output)
WRONG_SHIFT = some_prefix(shift=WrongShift, targets=("attn.kv", "pos"))
CROWD = lora_like(after=looks_at_the_mean_of_the_batch, fold=Edit.fold)
PLANTED = {
    "LoRA that forgets r when it merges": ("merge", lora_like(fold=folds_with_r_forgotten), LORA),
    "LoRA that merges A B instead of B A": ("merge", lora_like(fold=folds_transposed), LORA),
    "LoRA that merges with the wrong sign": ("merge", lora_like(fold=folds_negated), LORA),
    "LoRA that folds in place": ("merge", lora_like(fold=folds_in_place), LORA),
    "LoRA with A = B = 0": ("learns", lora_like(__init__=starts_dead), LORA),
    "LoRA with A = B = 0 does not move": ("moves", lora_like(__init__=starts_dead), LORA),
    "LoRA that loses half of its gradient": ("gradients", lora_like(after=loses_half_of_the_gradient), LORA),
    "LoRA that starts away from the base": ("start", lora_like(after=starts_away), LORA),
    "LoRA of another size": ("count", LoRA(r=5), LORA),
    "LoRA that drops out the whole output": ("dropout", WRONG_DROPOUT, DROPS),
    "LoRA with dropout that nobody wanted": ("dropout", lora_like(__init__=starts_with_dropout), LORA),
    "an edit that looks at the whole batch": ("rows", CROWD, LORA),
    "an edit that writes into the base": ("off_and_on", Careless(), LORA),
    "an edit that hides a projection": ("save", SecretLoRA(), UNMERGED),
    "a tied embedding changed only in its rows": ("merge", RowsOnlyLoRA(), LORA),
    "an adapter with the nonlinearity outside": ("start", Outside(), ADAPTERS),
    "an adapter that claims to be exact": ("start", Houlsby(m=5), replace(ADAPTERS, start="same")),
    "an adapter that claims to merge": ("merge", Houlsby(m=5), replace(ADAPTERS, merges=True)),
    "a prefix whose mask is forgotten": ("padding", some_prefix(kind=Blind), PREFIX),
    "a prefix that is cached": ("cache", some_prefix(kind=CachedTwice), PREFIX),
    "a shift that does not look at the mask": ("padding", WRONG_SHIFT, PREFIX),
    "a prefix that claims to be nothing": ("start", PrefixTuning(p=3), replace(PREFIX, start="same")),
    "a prompt whose rows are kept": ("start", KeptPrompt(), PROMPT),
    "a prompt that comes again at every call": ("cache", AlwaysPrompt(), PROMPT),
    "BitFit that trains a gain": ("moves", Leaky(), on_gpt("bitfit")),
    "a count without the norms": ("count", Houlsby(m=5), replace(ADAPTERS, count=count_adapters)),
}


@wrong_answers
@pytest.mark.parametrize("name", PLANTED)
def test_the_checks_refuse_a_wrong_method(name):
    check, method, row = PLANTED[name]
    with pytest.raises(AssertionError):
        CHECKS[check](replace(row, method=method), "gpt")


def test_the_checks_pass_what_the_wrong_methods_were_made_of():
    """The planted mistakes are refused for the mistake, not for how they are built."""
    for method, row in ((lora_like(), LORA), (some_prefix(), PREFIX)):
        for check in CHECKS.keys() - {"count", "start", "optimizer"}:
            CHECKS[check](replace(row, method=method), "gpt")


# ── what a user meets ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_can_be_made_without_arguments_and_put_on(kind):
    for cls in ALL:
        model = build(kind)
        attach(model, cls())
        assert count(model).trained > 0 and len(str(count(model))) > 20
        assert run(model, tokens(2, 3)).shape == run(build(kind), tokens(2, 3)).shape


@pytest.mark.parametrize("name", ROWS)
def test_a_new_head_stays_as_it_is_when_asked_to(name):
    if name == "head":
        return
    model = build("gpt-classes")
    attach(model, ROWS[name].method, train_head=False)
    before = host(model.head.out.weight).copy()
    assert not any(edit.is_head(model, n) for n in trained(model)) and count(model).head == 0
    short_fit(model, "gpt-classes", ROWS[name])
    assert same(host(model.head.out.weight), before)


def factors_A(**seed: int) -> list[np.ndarray]:
    """The matrices A of a new LoRA, module by module."""
    a = attach(build("gpt"), LoRA(r=2), **seed)
    return [host(e.A) for e in a.edits.values()]


def test_the_same_seed_gives_the_same_adapter_and_every_module_its_own_numbers():
    one = factors_A(seed=4)
    again = factors_A(seed=4)
    other = factors_A(seed=5)
    assert all(same(x, y) for x, y in zip(one, again))
    assert not same(one[0], one[1]) and not same(one[0], other[0])


def test_without_a_seed_it_is_seed_zero():
    assert all(same(x, y) for x, y in zip(factors_A(), factors_A(seed=0)))


def test_the_first_method_to_come_carries_the_new_head():
    model = build("gpt-classes")
    first = attach(model, LoRA(r=2), "first")
    second = attach(model, BitFit(), "second")
    assert set(first.base_values) == {"head.out.weight"}
    assert "head.out.weight" not in second.base_values and second.base_values


def test_a_method_that_says_nothing_adds_nothing():
    m = Method()
    assert m.penalty({}, None, Context()) == 0
    assert m.phases() == [Phase(1.0)]
    assert m.trains(build("gpt")) == set()
    assert m.eject({}) == (m, {})


def test_a_count_reads_as_a_sentence():
    assert str(edit.Count(1200, 0, 4800, 99)) == "1,200 trained (25.00 % of 4,800); 99 bytes to store"
    assert str(edit.Count(1, 0, 1, 4)) == "1 trained (100.00 % of 1); 4 bytes to store"
    assert str(edit.Count(0, 7, 0, 28)) == "0 trained (0.00 % of 0) and 7 in the head; 28 bytes to store"


def test_a_method_is_a_frozen_value():
    m = LoRA(r=3)
    with pytest.raises(AttributeError):
        m.r = 4
    assert m == LoRA(r=3) and m != LoRA(r=4) and "r=3" in repr(m)


@pytest.mark.parametrize("make, words", [
    (lambda: LoRA(lora_alpha=8), "LoRA got an unknown keyword 'lora_alpha': did you mean 'alpha'"),
    (lambda: LoRA(rnk=8), "did you mean 'r'"),
    (lambda: LoRA(xyz=8), "it takes alpha, dropout, r, targets"),
    (lambda: LoRA(target_modules="attn.q"), "did you mean 'targets'"),
    (lambda: PromptTuning(num_virtual_tokens=3), "did you mean 'p'"),
    (lambda: Full(k=1), "it takes no keywords"),
])
def test_an_unknown_hyper_parameter_is_refused_and_the_near_one_named(make, words):
    with pytest.raises(TypeError, match=words):
        make()
    assert replace(LoRA(r=2), alpha=3.0) == LoRA(2, 3.0)
