"""PEFT beside ours: the same tiny random GPT-2 and BERT, the same adapter; equal logits and equal gradients.

The conventions differ in three places. PEFT puts one LoRA on GPT-2's fused c_attn: one A for q, k and v. Its prefix is
one table whose rows are [K_0 | V_0 | K_1 | V_1 ...]. Its prompt leaves p more rows in the output.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import dev, host

from tinyft import array, edit
from tinyft.formats import load
from tinyft.methods import LoRA, PrefixTuning, PromptTuning

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'tinyft[peers]'")
pytestmark = pytest.mark.peers

V, B, T, C, L, H = 31, 3, 6, 12, 2, 3
GPT2 = {
    "vocab_size": V, "n_positions": 24, "n_embd": C, "n_layer": L, "n_head": H, "n_inner": 20,
    "initializer_range": 0.25, "use_cache": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}
BERT = {
    "vocab_size": V, "max_position_embeddings": 24, "hidden_size": C, "num_hidden_layers": L,
    "num_attention_heads": H, "intermediate_size": 20, "initializer_range": 0.25,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}
BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])


class Pair:
    """One model twice, theirs and ours, in one precision, with one batch and one covector for both."""

    def __init__(self, kind: str, dtype: Any, folder: Any, mask: bool = False):
        torch.manual_seed(0)
        if kind == "gpt2":
            base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
        elif kind == "bert-mlm":
            base = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
        else:
            base = transformers.BertModel(transformers.BertConfig(**BERT))
        with torch.no_grad():
            for p in base.parameters():
                p += 0.1 * torch.randn_like(p)           # no bias stays 0, no gain stays 1
        base.save_pretrained(folder)
        self.ours = load(folder, dtype=dtype)[0].eval()
        self.dtype = dtype
        self.rng = np.random.default_rng(1)
        self.precision = torch.float64 if dtype == np.float64 else torch.float32
        self.base = base.to(self.precision).eval()
        self.ids = self.rng.integers(0, V, (B, T))
        self.cover = self.rng.standard_normal((B, T, C if kind == "bert" else V)).astype(dtype)
        self.mask = np.ones((B, T), bool)
        if mask:
            self.mask[1, 4:] = self.mask[2, 5:] = False
            self.cover *= self.mask[..., None]           # outputs at padded positions mean nothing

    def wrap(self, config: Any) -> dict[str, Any]:
        """Put PEFT on their model, its adapter at a generic point. {name: trainable parameter}."""
        self.theirs = peft.get_peft_model(self.base, config).to(self.precision).eval()
        adapter = {n: p for n, p in self.theirs.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in adapter.values():
                p.copy_(torch.tensor(self.rng.standard_normal(tuple(p.shape)) * 0.4))
        return adapter

    def attach(self, method: Any) -> dict[str, Any]:
        a = edit.attach(self.ours, method)
        self.ours.to(dtype=self.dtype)
        return a.edits

    def check(self, pairs: list[tuple[Any, list[Any], Any]], drop: int = 0) -> None:
        """Compare outputs and gradients, relative to the largest number.

        pairs   (their parameter, our tensors, the function from our gradients to theirs), with values already copied
        drop    rows at the start of their output that ours does not have"""
        tol = 1e-9 if self.dtype == np.float64 else 1e-5
        out = self.theirs(input_ids=torch.tensor(self.ids), attention_mask=torch.tensor(self.mask).long())
        z = (out.logits if "logits" in out else out.last_hidden_state)[:, drop:]
        (z * torch.tensor(self.cover)).sum().backward()
        y = self.ours(self.ids, mask=None if self.mask.all() else self.mask)
        y.backward(dev(self.cover))
        on, z = self.mask, z.detach().numpy()
        assert z.shape == y.shape and np.abs(z).max() > 0.1
        assert np.abs(host(y) - z)[on].max() <= tol * max(np.abs(z).max(), 1)
        for theirs, ours, whole in pairs:
            g, mine = theirs.grad.numpy(), whole([host(p.grad) for p in ours])
            assert g.shape == mine.shape and np.abs(g).max() > 1e-3
            assert np.abs(g - mine).max() <= tol * max(np.abs(g).max(), 1)


def only(arrays: list) -> np.ndarray:
    return arrays[0]


def put(tensor: Any, values: Any) -> Any:
    """Copy values into our tensor."""
    tensor.copy_(array.asarray(values.detach().numpy() if isinstance(values, torch.Tensor) else values))
    return tensor


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@BOTH
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_lora_on_gpt2s_fused_projection_is_three_of_ours_with_one_A(dtype, padded, tmp_path):
    pair = Pair("gpt2", dtype, tmp_path, padded)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["c_attn", "c_fc", "c_proj"],
                             fan_in_fan_out=True, init_lora_weights=False)
    named = pair.wrap(config)
    edits = pair.attach(LoRA(r=3, alpha=5, targets=("attn.[qkvo]", "mlp.up", "mlp.down")))
    where = {"attn.c_attn": "attn.{}", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    pairs = []
    for i in range(L):
        for theirs, ours in where.items():
            prefix = f"base_model.model.transformer.h.{i}.{theirs}"
            A = named[f"{prefix}.lora_A.default.weight"]
            B_ = named[f"{prefix}.lora_B.default.weight"]
            es = [edits[f"blocks.{i}.{ours.format(n)}"] for n in ("qkv" if "{" in ours else "-")]
            for e, part in zip(es, np.split(B_.detach().numpy(), len(es))):
                put(e.A, A)
                put(e.B, part)
            pairs += [(A, [e.A for e in es], lambda gs: sum(gs)), (B_, [e.B for e in es], np.concatenate)]
    pair.check(pairs)


@BOTH
@pytest.mark.parametrize("kind", ["bert-mlm", "bert"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_lora_on_berts_query_and_value(kind, dtype, padded, tmp_path):
    pair = Pair(kind, dtype, tmp_path, padded)
    named = pair.wrap(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False))
    edits = pair.attach(LoRA(r=4, alpha=6, targets="attn.[qv]"))
    pairs = []
    for n, p in named.items():
        i, m = n.split("layer.")[1][0], n.split("lora_")[1][0]
        tensor = getattr(edits[f"blocks.{i}.attn.{'q' if 'query' in n else 'v'}"], m)
        pairs.append((p, [put(tensor, p)], only))
    assert len(pairs) == 4 * L
    pair.check(pairs)


@BOTH
def test_a_merged_model_is_pefts_merged_model(dtype, tmp_path):
    pair = Pair("gpt2", dtype, tmp_path)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=7, target_modules=["c_fc"], fan_in_fan_out=True,
                             init_lora_weights=False)
    named = pair.wrap(config)
    edits = pair.attach(LoRA(r=2, alpha=7, targets="mlp.up"))
    for n, p in named.items():
        put(getattr(edits[f"blocks.{n.split('.h.')[1][0]}.mlp.up"], n.split("lora_")[1][0]), p)
    merged = edit.merge(pair.ours)
    theirs = pair.theirs.merge_and_unload()
    for i in range(L):
        W = theirs.transformer.h[i].mlp.c_fc.weight.detach().numpy().T
        assert np.abs(host(merged.blocks[i].mlp.up.weight) - W).max() <= (1e-14 if dtype == np.float64 else 1e-6)


def test_loras_start_has_the_spread_of_pefts(tmp_path):
    pair = Pair("gpt2", np.float32, tmp_path)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=["c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(pair.base, config)
    A = model.base_model.model.transformer.h[0].mlp.c_fc.lora_A.default.weight.detach().numpy()
    mine = host(pair.attach(LoRA(r=64, targets="mlp.up"))["blocks.0.mlp.up"].A)
    assert mine.shape == A.shape
    assert abs(np.abs(A).max() - np.abs(mine).max()) < 0.01 and abs(A.std() - mine.std()) < 0.01


# ── prefix ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@BOTH
@pytest.mark.parametrize("kind, task", [("gpt2", "CAUSAL_LM"), ("bert", "FEATURE_EXTRACTION")])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_prefix_is_pefts_with_the_text_shifted_by_p(kind, task, dtype, padded, tmp_path):
    p, pair = 3, Pair(kind, dtype, tmp_path, padded)
    (table,) = pair.wrap(peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=p)).values()
    edits = pair.attach(PrefixTuning(p=p, shift=True))
    ours = [getattr(edits[f"blocks.{i}.attn.kv"], m) for i in range(L) for m in "KV"]
    for tensor, rows in zip(ours, np.split(table.detach().numpy(), 2 * L, axis=1)):      # (p, C), head after head
        put(tensor, rows.reshape(p, H, C // H).transpose(1, 0, 2))

    def as_table(gradients: list) -> np.ndarray:
        return np.concatenate([g.transpose(1, 0, 2).reshape(p, C) for g in gradients], axis=1)

    pair.check([(table, ours, as_table)])


@BOTH
def test_a_reparameterised_prefix_is_pefts_projection(dtype, tmp_path):
    p, k, pair = 3, 7, Pair("gpt2", dtype, tmp_path)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, prefix_projection=True,
                                     encoder_hidden_size=k)
    named = pair.wrap(config)
    E, W1, b1, W2, b2 = named.values()
    assert W2.shape == (2 * L * C, k)
    edits = pair.attach(PrefixTuning(p=p, mlp=k, shift=True))
    es = [edits[f"blocks.{i}.attn.kv"] for i in range(L)]
    hidden = es[0].hidden
    pairs = [(t, [put(o, t)], only) for t, o in ((E, hidden.E.weight), (W1, hidden.W1.weight), (b1, hidden.W1.bias))]
    for t, name in ((W2, "weight"), (b2, "bias")):
        ours = [put(getattr(e.W2, name), part) for e, part in zip(es, np.split(t.detach().numpy(), L))]
        pairs.append((t, ours, np.concatenate))
    pair.check(pairs)


# ── prompt ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@BOTH
@pytest.mark.parametrize("kind, task", [("gpt2", "CAUSAL_LM"), ("bert", "FEATURE_EXTRACTION")])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_prompt_is_pefts_without_its_rows_in_the_output(kind, task, dtype, padded, tmp_path):
    p, pair = 4, Pair(kind, dtype, tmp_path, padded)
    (table,) = pair.wrap(peft.PromptTuningConfig(task_type=task, num_virtual_tokens=p)).values()
    tensor = put(pair.attach(PromptTuning(p=p))["embed"].P, table)
    pair.check([(table, [tensor], only)], drop=p)


# ── the comparison itself can fail ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("wrong", ["alpha", "unshifted", "values first", "heads last", "text first"])
def test_the_comparison_tells_wrong_conventions_apart(wrong, tmp_path):
    p, pair = 3, Pair("gpt2", np.float64, tmp_path)
    if wrong == "alpha":
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=7, target_modules=["c_fc"], fan_in_fan_out=True,
                                 init_lora_weights=False)
        named = pair.wrap(config)
        edits = pair.attach(LoRA(r=2, alpha=2, targets="mlp.up"))
        for n, t in named.items():
            put(getattr(edits[f"blocks.{n.split('.h.')[1][0]}.mlp.up"], n.split("lora_")[1][0]), t)
    elif wrong == "text first":
        (table,) = pair.wrap(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p)).values()
        put(pair.attach(PromptTuning(p=p))["embed"].P, table.flip(0))
    else:
        (table,) = pair.wrap(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p)).values()
        edits = pair.attach(PrefixTuning(p=p, shift=wrong != "unshifted"))
        names = "VK" if wrong == "values first" else "KV"
        places = [(i, m) for i in range(L) for m in names]
        for (i, m), rows in zip(places, np.split(table.detach().numpy(), 2 * L, axis=1)):
            if wrong == "heads last":
                by_head = rows.reshape(p, C // H, H).transpose(2, 0, 1)
            else:
                by_head = rows.reshape(p, H, C // H).transpose(1, 0, 2)
            put(getattr(edits[f"blocks.{i}.attn.kv"], m), by_head)
    with pytest.raises(AssertionError):
        pair.check([], drop=p if wrong == "text first" else 0)
