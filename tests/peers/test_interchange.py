"""Adapters exchanged with PEFT and AdapterHub through their files: equal logits on the same base, both ways.

One base, random and small, is written with tinyft.save and opened on both sides. An adapter is trained for a few steps
on one side, saved there, and loaded on the other.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import host
from safetensors.numpy import load_file, save_file

import tinyft as ft
from tinyft import edit

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'tinyft[peers]'")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

V, B, T, C, L, CLASSES = 31, 3, 6, 24, 2, 3
TOLERANCE = 1e-5
SIZES: dict[str, Any] = {"vocab": V, "positions": 32, "width": C, "layers": L, "hidden": 20}
MODELS = {
    "gpt2": lambda: ft.GPT(ft.GPTConfig(heads=3, **SIZES), seed=1),
    "bert": lambda: ft.BERT(ft.BERTConfig(heads=3, token_types=2, **SIZES), seed=1),
    "llama": lambda: ft.Llama(ft.LlamaConfig(heads=4, key_value_heads=2, **SIZES), seed=1),
    "llama-tied": lambda: ft.Llama(ft.LlamaConfig(heads=4, key_value_heads=2, tied=True, **SIZES), seed=1),
    "qwen2": lambda: ft.Llama(ft.LlamaConfig(heads=4, key_value_heads=2, tied=True, qkv_bias=True, **SIZES), seed=1),
}
CLASSES_OF = {
    "lm": "AutoModelForCausalLM", "mlm": "AutoModelForMaskedLM", "classes": "AutoModelForSequenceClassification",
    "none": "AutoModel",
}
IDS = np.random.default_rng(0).integers(1, V, (B, T))
MASK = np.ones((B, T), bool)
MASK[1, 4:] = False
IDS[1, 4:] = 0                                           # the pad token, by which transformers finds the end


def base(kind: str, head: str, folder: Path) -> Any:
    """A random model in a folder, without zeros in its biases. A BERT with a classifier has a pooler."""
    model = MODELS[kind]()
    if kind == "bert" and head != "mlm":
        model = ft.BERT(model.config, seed=1, head=None, pooler=True)
    if head == "classes":
        ft.classifier(model, CLASSES, seed=2)
    rng = np.random.default_rng(3)
    for p in model.parameters():
        p.copy_(host(p) + 0.1 * rng.standard_normal(p.shape))
    ft.save(model, folder)
    return model.eval()


def theirs(folder: Path, head: str) -> Any:
    """The base as transformers opens it."""
    model = getattr(transformers, CLASSES_OF[head]).from_pretrained(folder).eval()
    model.config.pad_token_id = 0
    return model


def logits_of(model: Any, masked: bool = True, drop: int = 0) -> np.ndarray:
    """Their logits, or hidden states, without the first `drop` rows."""
    arguments = {"attention_mask": torch.tensor(MASK).long()} if masked else {}
    with torch.no_grad():
        out = model(input_ids=torch.tensor(IDS), **arguments)
    values = out.logits if "logits" in out else out.last_hidden_state
    return values.numpy()[:, drop:] if values.ndim == 3 else values.numpy()


def check_equal(ours: Any, model: Any, masked: bool = True, drop: int = 0) -> None:
    """Equal logits at the real positions, and other logits than those of the base."""
    z = logits_of(model, masked, drop)
    y = host(ours(IDS, mask=MASK if masked else None))
    assert y.shape == z.shape
    with edit.without(ours):
        before = host(ours(IDS, mask=MASK if masked else None))
    real = MASK if masked and y.ndim == 3 else np.ones(y.shape[:-1], bool)
    assert np.abs(y - before)[real].max() > 1e-2, "the adapter changes nothing"
    assert np.abs(y - z)[real].max() <= TOLERANCE * max(np.abs(z).max(), 1)


def train(model: Any, head: str) -> None:
    """A few steps of AdamW; without a head, which fit wants, the trained tensors are put at a generic point instead."""
    if head == "none":
        rng = np.random.default_rng(4)
        for p in ft.trained(model).values():
            p.copy_(host(p) + 0.3 * rng.standard_normal(p.shape))
        return
    batch: dict[str, Any] = {"ids": IDS, "mask": MASK}
    if head == "classes":
        batch["labels"] = np.arange(B) % CLASSES
    elif head == "mlm":
        batch["labels"] = IDS
    ft.fit(model, [batch], 4, ft.AdamW(0.05), progress=False)
    model.eval()


def train_theirs(model: Any) -> None:
    """A few steps of AdamW on their side."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        out = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK).long())
        z = out.logits if "logits" in out else out.last_hidden_state
        (z.sin() ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
LORAS = [
    ("gpt2", "lm", "attn.[qv]"),
    ("gpt2", "lm", ("attn.[qkvo]", "mlp.up", "mlp.down")),
    ("gpt2", "lm", ("blocks.0.attn.q", "blocks.1.attn.[qkv]")),
    ("gpt2", "classes", "attn.[qv]"),
    ("bert", "mlm", "attn.[qv]"),
    ("bert", "mlm", ("mlp.down", "head.dense")),
    ("bert", "classes", ("attn.[qkvo]", "mlp.up")),
    ("bert", "none", "attn.o"),
    ("llama", "lm", ("attn.[qkvo]", "mlp.[gu]*", "mlp.down")),
    ("llama", "lm", ("embed", "head", "attn.q")),
    ("llama", "classes", "attn.[qv]"),
    ("llama-tied", "lm", ("embed", "attn.v")),
    ("qwen2", "lm", "attn.[kv]"),
    ("gpt2", "lm", ("embed", "pos")),
]


@pytest.mark.parametrize("kind, head, targets", LORAS)
def test_our_lora_gives_the_same_logits_in_peft_and_comes_back(kind, head, targets, tmp_path):
    model = base(kind, head, tmp_path / "base")
    ft.attach(model, ft.LoRA(r=2, alpha=6, targets=targets))
    train(model, head)
    ft.save_peft(model, tmp_path / "adapter")
    check_equal(model, peft.PeftModel.from_pretrained(theirs(tmp_path / "base", head), tmp_path / "adapter"))
    y = host(model(IDS))
    ours = edit.get_attached(model)
    values = {n: host(v) for n, v in edit.named_state(model, ours).items()}
    ft.detach(model)
    again = ft.load_peft(model, tmp_path / "adapter")
    assert np.array_equal(host(model(IDS)), y)
    assert again.method.r == 2 and again.method.alpha == 6
    for n, v in edit.named_state(model, again).items():
        assert np.array_equal(host(v), values[n]), n
    assert again.edits.keys() == ours.edits.keys()


THEIR_LORAS = [
    ("gpt2", "lm", {"target_modules": ["c_attn"]}),
    ("gpt2", "lm", {"target_modules": ["c_attn", "c_fc", "c_proj"], "rank_pattern": {"c_proj": 5, "0.attn.c_attn": 2},
                    "alpha_pattern": {"mlp.c_proj": 7}, "use_rslora": True}),
    ("gpt2", "lm", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("gpt2", "lm", {"target_modules": "all-linear", "exclude_modules": ["c_fc"]}),
    ("gpt2", "lm", {"target_modules": r".*\.1\..*(c_attn|c_fc)"}),
    ("gpt2", "classes", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    ("bert", "mlm", {"target_modules": ["query", "value"], "task_type": None}),
    ("bert", "mlm", {"target_modules": "all-linear", "task_type": None}),
    ("bert", "classes", {"target_modules": ["query", "dense"]}),
    ("bert", "none", {"target_modules": ["key", "output.dense"]}),
    ("llama", "lm", {"target_modules": ["q_proj", "k_proj", "down_proj", "lm_head"]}),
    ("llama", "lm", {"target_modules": ["embed_tokens", "o_proj"]}),
    ("llama", "classes", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama-tied", "lm", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("qwen2", "lm", {"target_modules": "all-linear", "lora_alpha": 0.5}),
]
TASKS = {"lm": "CAUSAL_LM", "classes": "SEQ_CLS", "none": "FEATURE_EXTRACTION", "mlm": "FEATURE_EXTRACTION"}


@pytest.mark.parametrize("kind, head, settings", THEIR_LORAS)
def test_pefts_lora_gives_the_same_logits_here(kind, head, settings, tmp_path):
    torch.manual_seed(0)
    model = base(kind, head, tmp_path / "base")
    config = peft.LoraConfig(**{"task_type": TASKS[head], "r": 3, "lora_alpha": 5, "lora_dropout": 0.1, **settings})
    other = peft.get_peft_model(theirs(tmp_path / "base", head), config)
    train_theirs(other)
    other.save_pretrained(tmp_path / "adapter")
    a = ft.load_peft(model, tmp_path / "adapter", name="from PEFT")
    assert a.name == "from PEFT" and a.method.dropout == 0.1
    check_equal(model, other)
    ft.save_peft(model, tmp_path / "again")
    check_equal(model, peft.PeftModel.from_pretrained(theirs(tmp_path / "base", head), tmp_path / "again"))


# ── prompt and prefix ────────────────────────────────────────────────────────────────────────────────────────────────
PREFIXES = [
    ("gpt2", "lm", ft.PrefixTuning(p=3, shift=True)),
    ("gpt2", "lm", ft.PrefixTuning(p=3, mlp=5, shift=True)),
    ("gpt2", "classes", ft.PrefixTuning(p=3, shift=True)),
    ("bert", "classes", ft.PrefixTuning(p=2, mlp=4, shift=True)),
    ("bert", "none", ft.PrefixTuning(p=2, shift=True)),
    ("llama", "lm", ft.PrefixTuning(p=4, shift=True)),
    ("llama", "lm", ft.PrefixTuning(p=4)),
    ("llama", "lm", ft.PrefixTuning(p=4, mlp=3)),
    ("llama", "classes", ft.PrefixTuning(p=4)),
    ("llama-tied", "lm", ft.PrefixTuning(p=1, std=1.0)),
    ("qwen2", "lm", ft.PrefixTuning(p=3)),
]


@pytest.mark.parametrize("kind, head, method", PREFIXES)
def test_our_prefix_gives_the_same_logits_in_peft_and_comes_back(kind, head, method, tmp_path):
    model = base(kind, head, tmp_path / "base")
    ft.attach(model, method)
    train(model, head)
    y = host(model(IDS, mask=MASK))
    ft.save_peft(model, tmp_path / "adapter")
    assert np.array_equal(host(model(IDS, mask=MASK)), y), "saving changed the model"
    check_equal(model, peft.PeftModel.from_pretrained(theirs(tmp_path / "base", head), tmp_path / "adapter"))
    ft.detach(model)
    ft.load_peft(model, tmp_path / "adapter")
    assert np.abs(host(model(IDS, mask=MASK)) - y)[MASK if y.ndim == 3 else ...].max() < 1e-5


@pytest.mark.parametrize("kind, head", [("gpt2", "lm"), ("gpt2", "classes"), ("bert", "classes"), ("bert", "none"),
                                        ("llama", "lm"), ("llama", "classes"), ("qwen2", "lm")])
@pytest.mark.parametrize("projection", [False, True], ids=["flat", "with MLP"])
def test_pefts_prefix_gives_the_same_logits_here(kind, head, projection, tmp_path):
    torch.manual_seed(0)
    model = base(kind, head, tmp_path / "base")
    config = peft.PrefixTuningConfig(task_type=TASKS[head], num_virtual_tokens=3, prefix_projection=projection,
                                     encoder_hidden_size=5)
    other = peft.get_peft_model(theirs(tmp_path / "base", head), config)
    train_theirs(other)
    other.save_pretrained(tmp_path / "adapter")
    ft.load_peft(model, tmp_path / "adapter")
    check_equal(model, other)


@pytest.mark.parametrize("kind, head", [("gpt2", "lm"), ("bert", "mlm"), ("bert", "none"), ("llama", "lm")])
def test_prompts_are_exchanged_both_ways(kind, head, tmp_path):
    """PEFT returns logits for the rows of the prompt as well."""
    torch.manual_seed(0)
    p = 3
    model = base(kind, head, tmp_path / "base")
    ft.attach(model, ft.PromptTuning(p=p))
    train(model, head)
    ft.save_peft(model, tmp_path / "adapter")
    check_equal(model, peft.PeftModel.from_pretrained(theirs(tmp_path / "base", head), tmp_path / "adapter"), drop=p)
    ft.detach(model)
    other = peft.get_peft_model(theirs(tmp_path / "base", head),
                                peft.PromptTuningConfig(task_type=TASKS[head], num_virtual_tokens=p))
    train_theirs(other)
    other.save_pretrained(tmp_path / "theirs")
    ft.load_peft(model, tmp_path / "theirs")
    check_equal(model, other, drop=p)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_classifier_behind_a_prompt_reads_the_last_position_in_peft_padded_or_not(kind, tmp_path):
    model = base(kind, "classes", tmp_path / "base")
    ft.attach(model, ft.PromptTuning(p=3))
    train(model, "classes")
    ft.save_peft(model, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(theirs(tmp_path / "base", "classes"), tmp_path / "adapter")
    check_equal(model, other, masked=False)
    ours, z = host(model(IDS, mask=MASK)), logits_of(other)
    assert np.abs(ours - z)[MASK.all(axis=1)].max() < TOLERANCE * 10 < 1e-3 < np.abs(ours - z)[~MASK.all(axis=1)].max()


def test_berts_classifier_behind_a_prompt_is_refused_since_peft_reads_another_row(tmp_path):
    model = base("bert", "classes", tmp_path / "base")
    ft.attach(model, ft.PromptTuning(p=3))
    with pytest.raises(ValueError, match="classifies the first row of the prompt"):
        ft.save_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    ft.detach(model)
    other = peft.get_peft_model(theirs(tmp_path / "base", "classes"),
                                peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    other.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="classifies the first row of the prompt"):
        ft.load_peft(model, tmp_path / "theirs")
    # The refusal is right: the two libraries classify different rows.
    a = ft.attach(model, ft.PromptTuning(p=3))
    table = load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"]
    a.edits["embed"].P.copy_(table)
    assert np.abs(host(model.eval()(IDS, mask=MASK)) - logits_of(other.eval())).max() > 1e-2


# ── AdapterHub ───────────────────────────────────────────────────────────────────────────────────────────────────────
BOTTLENECKS = [("gpt2", "lm"), ("gpt2", "classes"), ("bert", "none"), ("bert", "classes"), ("llama", "lm"),
               ("llama", "classes"), ("llama-tied", "lm"), ("qwen2", "lm")]
KIND = {"reduction_factor": 5, "non_linearity": "gelu"}


@pytest.mark.parametrize("targets", [(), "mlp", "attn", "blocks.1.*"])
@pytest.mark.parametrize("kind, head", BOTTLENECKS)
def test_houlsbys_adapters_give_the_same_outputs_in_adapterhub_and_come_back(kind, head, targets, tmp_path):
    adapters = pytest.importorskip("adapters", reason="adapters is not installed: pip install 'tinyft[peers]'")
    model = base(kind, head, tmp_path / "base")
    method = ft.Houlsby(m=5, norms=False, targets=("blocks.1.attn", "blocks.1.mlp") if "*" in targets else targets)
    a = ft.attach(model, method, name="adapter")
    train(model, head)
    ft.save_adapterhub(model, tmp_path / "adapter")
    other = theirs(tmp_path / "base", head)
    adapters.init(other)
    loading: dict[str, Any] = {}
    other.load_adapter(str(tmp_path / "adapter"), use_safetensors=True, set_active=True, loading_info=loading)
    assert loading == {"missing_keys": [], "unexpected_keys": []}
    check_equal(model, other.eval())
    y = host(model(IDS))
    ft.detach(model)
    again = ft.load_adapterhub(model, tmp_path / "adapter")
    assert again.name == "adapter" and again.edits.keys() == a.edits.keys() and again.method.m == 5
    assert np.array_equal(host(model(IDS)), y)


@pytest.mark.parametrize("settings", [{}, {"mh_adapter": False}, {"leave_out": [0], "output_adapter": False}])
@pytest.mark.parametrize("kind, head", BOTTLENECKS)
def test_adapterhubs_adapters_give_the_same_outputs_here(kind, head, settings, tmp_path):
    adapters = pytest.importorskip("adapters", reason="adapters is not installed: pip install 'tinyft[peers]'")
    torch.manual_seed(0)
    model = base(kind, head, tmp_path / "base")
    other = theirs(tmp_path / "base", head)
    adapters.init(other)
    other.add_adapter("a", config=adapters.DoubleSeqBnConfig(**KIND, **settings))
    other.train_adapter("a")
    train_theirs(other)
    other.save_adapter(str(tmp_path / "adapter"), "a", use_safetensors=True)
    a = ft.load_adapterhub(model, tmp_path / "adapter", name="b")
    assert a.name == "b" and a.method.m == C // 5
    check_equal(model, other)


@pytest.mark.parametrize("name", ["SeqBnConfig", "ParBnConfig", "DoubleSeqBnConfig", "SeqBnInvConfig",
                                  "CompacterConfig", "LoRAConfig", "PrefixTuningConfig"])
def test_other_adapters_of_adapterhub_are_refused_by_their_settings(name, tmp_path):
    """DoubleSeqBnConfig has another non-linearity unless it is told otherwise."""
    adapters = pytest.importorskip("adapters", reason="adapters is not installed: pip install 'tinyft[peers]'")
    model = base("bert", "none", tmp_path / "base")
    other = theirs(tmp_path / "base", "none")
    adapters.init(other)
    config = getattr(adapters, name)
    other.add_adapter("a", config=config(reduction_factor=6) if name == "CompacterConfig" else config())
    other.save_adapter(str(tmp_path / "adapter"), "a", use_safetensors=name != "PrefixTuningConfig")
    if name == "PrefixTuningConfig":                     # AdapterHub cannot write it as safetensors
        save_file({"a": np.zeros(1, np.float32)}, tmp_path / "adapter" / "adapter.safetensors")
    before = host(model(IDS))
    with pytest.raises(ValueError, match="adapter_config.json: wanted "):
        ft.load_adapterhub(model, tmp_path / "adapter")
    assert np.array_equal(host(model(IDS)), before)


def test_every_width_of_a_bottleneck_survives_adapterhubs_reduction_factor():
    from tinyft.adapters.adapterhub import reduction_factor
    for width in (12, 48, 576, 768):
        for m in range(1, 2 * width):
            assert int(width // reduction_factor(width, m)) == m
