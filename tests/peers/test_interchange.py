"""Adapters exchanged with PEFT and AdapterHub through their files: equal logits on the same base, both ways.

One base, random and small, is written with tinyft.save and opened on both sides. An adapter is trained for a few steps
on one side, saved there, and loaded on the other.
"""
from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import peft_keys
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
    "distilbert": lambda: ft.BERT(ft.BERTConfig(heads=3, token_types=0, pooler_activation="relu", **SIZES), seed=1),
    "roberta": lambda: ft.BERT(ft.BERTConfig(heads=3, token_types=1, first_position=1, keep_pooler=False, **SIZES),
                               seed=1),
    "llama": lambda: ft.Llama(ft.LlamaConfig(heads=4, key_value_heads=2, **SIZES), seed=1),
    "llama-tied": lambda: ft.Llama(ft.LlamaConfig(heads=4, key_value_heads=2, tied=True, **SIZES), seed=1),
    "mistral": lambda: ft.Llama(ft.LlamaConfig(heads=4, key_value_heads=2, **SIZES), seed=1),
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
    if isinstance(model, ft.BERT) and head != "mlm":
        model = ft.BERT(model.config, seed=1, head=None, pooler=kind == "bert")
    if head == "classes":
        ft.classifier(model, CLASSES, seed=2)
    rng = np.random.default_rng(3)
    for p in model.parameters():
        p.copy_(host(p) + 0.1 * rng.standard_normal(p.shape))
    ft.save(model, folder)
    if kind == "mistral":                                # transformers' Mistral has the layout of its Llama
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        (folder / "config.json").write_text(json.dumps(config))
        model = ft.load(folder)[0]
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
    ("distilbert", "mlm", ("attn.[qv]", "mlp.up")),
    ("distilbert", "classes", ("attn.[ko]", "embed")),
    ("roberta", "mlm", ("attn.[qv]", "head.dense")),
    ("roberta", "classes", "attn.[qkvo]"),
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


@pytest.mark.parametrize("targets, is_right", [(("attn.[qv]", "mlp.up"), True), (("embed", "attn.q"), False)])
def test_peft_merges_our_lora_but_one_on_a_tied_embedding_twice(targets, is_right, tmp_path):
    model = base("gpt2", "lm", tmp_path / "base")
    ft.attach(model, ft.LoRA(r=2, targets=targets))
    train(model, "lm")
    ft.save_peft(model, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(theirs(tmp_path / "base", "lm"), tmp_path / "adapter")
    check_equal(model, other)
    y, z = host(model(IDS, mask=MASK))[MASK], logits_of(other.merge_and_unload())[MASK]
    difference = np.abs(y - z).max() / np.abs(z).max()
    assert difference < TOLERANCE if is_right else difference > 1e-2
    ft.merge(model)
    assert np.abs(host(model(IDS, mask=MASK))[MASK] - y).max() < TOLERANCE * np.abs(y).max()


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
    ("distilbert", "mlm", {"target_modules": ["q_lin", "vocab_transform"]}),
    ("distilbert", "classes", {"target_modules": ["lin1"], "modules_to_save": ["pre_classifier"]}),
    ("roberta", "mlm", {"target_modules": ["query", "lm_head.dense"]}),
    ("roberta", "classes", {"target_modules": ["dense"]}),
    ("llama", "lm", {"target_modules": ["q_proj", "k_proj", "down_proj", "lm_head"]}),
    ("llama", "lm", {"target_modules": ["embed_tokens", "o_proj"]}),
    ("llama", "classes", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama-tied", "lm", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("qwen2", "lm", {"target_modules": "all-linear", "lora_alpha": 0.5}),
    ("mistral", "lm", {"target_modules": ["q_proj", "gate_proj"]}),
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


@pytest.mark.parametrize("kind, targets", [("gpt2", ["c_attn"]), ("llama", r"layers\.\d\.self_attn\..*")])
def test_an_adapter_of_the_class_without_a_head_loads_onto_the_model_with_one(kind, targets, tmp_path):
    """Its names have no prefix: h.0.attn.c_attn."""
    torch.manual_seed(0)
    model = base(kind, "lm", tmp_path / "base")
    other = peft.get_peft_model(theirs(tmp_path / "base", "none"),
                                peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=targets))
    train_theirs(other)
    other.save_pretrained(tmp_path / "adapter")
    assert not any("transformer." in n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    ft.load_peft(model, tmp_path / "adapter")
    head = host(model.embed.weight if kind == "gpt2" else model.head.weight)
    z = logits_of(other) @ head.T
    assert np.abs(host(model(IDS, mask=MASK)) - z)[MASK].max() <= TOLERANCE * np.abs(z).max()


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
CONFIGS = {"LORA": "LoraConfig", "PROMPT_TUNING": "PromptTuningConfig", "PREFIX_TUNING": "PrefixTuningConfig"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_of_peft_is_in_the_table(kind):
    known = peft_keys.READ[kind].keys() | peft_keys.REFUSED[kind].keys() | peft_keys.HARMLESS[kind].keys()
    assert {f.name for f in fields(getattr(peft, CONFIGS[kind]))} <= known


def test_every_key_of_adapterhubs_bottleneck_is_in_the_table():
    adapters = pytest.importorskip("adapters", reason="adapters is not installed: pip install 'tinyft[peers]'")
    known = peft_keys.HUB_READ.keys() | peft_keys.HUB_REFUSED.keys() | peft_keys.HUB_HARMLESS.keys()
    assert {f.name for f in fields(adapters.DoubleSeqBnConfig)} <= known


HARMLESS = [(kind, key) for kind in CONFIGS for key in peft_keys.HARMLESS[kind]]


@pytest.mark.parametrize("kind, key", HARMLESS)
def test_a_harmless_key_changes_no_output_of_peft(kind, key, tmp_path):
    model = base("gpt2", "lm", tmp_path / "base")
    methods = {"LORA": ft.LoRA(r=2), "PROMPT_TUNING": ft.PromptTuning(p=2),
               "PREFIX_TUNING": ft.PrefixTuning(p=2, shift=True)}
    ft.attach(model, methods[kind])
    train(model, "lm")
    ft.save_peft(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {key: peft_keys.HARMLESS[kind][key]}))
    other = peft.PeftModel.from_pretrained(theirs(tmp_path / "base", "lm"), tmp_path / "adapter")
    check_equal(model, other, drop=2 * (kind == "PROMPT_TUNING"))


VARIANTS = [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
]


@pytest.mark.parametrize("settings, key", VARIANTS)
def test_variants_of_lora_are_refused_by_the_name_of_their_key(settings, key, tmp_path):
    model = base("llama", "lm", tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **settings)
    other = peft.get_peft_model(theirs(tmp_path / "base", "lm"), config)
    other.save_pretrained(tmp_path / "adapter")
    before = host(model(IDS))
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{key}"):
        ft.load_peft(model, tmp_path / "adapter")
    assert np.array_equal(host(model(IDS)), before) and not edit.attached(model)


@pytest.mark.parametrize("config, kind", [
    ("IA3Config", "IA3"), ("AdaLoraConfig", "ADALORA"), ("LoHaConfig", "LOHA"), ("PromptEncoderConfig", "P_TUNING"),
])
def test_other_methods_of_peft_are_refused_by_their_type(config, kind, tmp_path):
    model = base("llama", "lm", tmp_path / "base")
    extra = {"AdaLoraConfig": {"total_step": 10}, "PromptEncoderConfig": {"num_virtual_tokens": 2}}.get(config, {})
    other = peft.get_peft_model(theirs(tmp_path / "base", "lm"), getattr(peft, config)(task_type="CAUSAL_LM", **extra))
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"peft_type wants one of 'LORA', .*got '{kind}'"):
        ft.load_peft(model, tmp_path / "adapter")


# ── the comparison itself can fail ───────────────────────────────────────────────────────────────────────────────────
def wrong_lora(tensors: dict[str, np.ndarray], config: dict[str, Any], wrong: str) -> dict[str, np.ndarray]:
    """The tensors of a LoRA on c_attn with one mistake."""
    out = {}
    for name, a in tensors.items():
        if wrong == "values first" and name.endswith("lora_B.weight"):
            a = np.concatenate(np.split(a, 3)[::-1])
        if wrong == "blocks exchanged" and name.endswith("lora_A.weight"):
            a = np.concatenate(np.split(a, 2)[::-1])
        out[name] = np.ascontiguousarray(a)
    if wrong == "scale of one part":
        config["lora_alpha"] = config["lora_alpha"] // 2
    return out


@pytest.mark.parametrize("wrong", ["values first", "blocks exchanged", "scale of one part"])
def test_the_comparison_rejects_wrong_files_of_lora(wrong, tmp_path):
    model = base("gpt2", "lm", tmp_path / "base")
    ft.attach(model, ft.LoRA(r=2, targets="attn.[qv]"))
    train(model, "lm")
    folder = ft.save_peft(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = folder / "adapter_model.safetensors"
    save_file(wrong_lora(load_file(weights), config, wrong), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        check_equal(model, peft.PeftModel.from_pretrained(theirs(tmp_path / "base", "lm"), folder))


@pytest.mark.parametrize("wrong", ["values first", "heads last", "unrotated"])
def test_the_comparison_rejects_wrong_files_of_a_prefix(wrong, tmp_path):
    p, heads, D = 3, 2, C // 4
    model = base("llama", "lm", tmp_path / "base")
    a = ft.attach(model, ft.PrefixTuning(p=p, std=0.5))
    folder = ft.save_peft(model, tmp_path / "adapter")
    table = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"].reshape(p, L, 2, heads, D)
    if wrong == "values first":
        table = table[:, :, ::-1]
    elif wrong == "heads last":
        table = table.transpose(0, 1, 2, 4, 3)
    else:
        for i in range(L):
            table[:, i, 0] = host(a.edits[f"blocks.{i}.attn.kv"].K).transpose(1, 0, 2)
    save_file({"prompt_embeddings": np.ascontiguousarray(table.reshape(p, -1))}, folder / "adapter_model.safetensors")
    with pytest.raises(AssertionError):
        check_equal(model, peft.PeftModel.from_pretrained(theirs(tmp_path / "base", "lm"), folder))


# ── a real model ─────────────────────────────────────────────────────────────────────────────────────────────────────
SMOLLM2 = Path(__file__).parents[2] / "work" / "real" / "SmolLM2-135M-Instruct.Q4_1.gguf"
real = pytest.mark.skipif(not SMOLLM2.is_file(), reason="work/real has no SmolLM2: make real-assets")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(their model, the folder of the dense base) of SmolLM2, from the GGUF file."""
    folder = tmp_path_factory.mktemp("smollm2")
    ft.save(ft.load(SMOLLM2)[0], folder)
    yield transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), folder
    shutil.rmtree(folder)


@real
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_smollm2s_adapters_are_exchanged_both_ways(packed, smollm2, tmp_path):
    """A LoRA on all linear maps and a prefix. A packed base adapts like the dense one that it unpacks to."""
    other, _ = smollm2
    model, tokenizer = ft.load(SMOLLM2, packed=packed)
    model.eval()
    ids = np.array([tokenizer.encode("The capital of France is Paris, and that of Italy is Rome.").ids])

    def compare(theirs: Any) -> None:
        with torch.no_grad():
            z = theirs(input_ids=torch.tensor(ids)).logits.numpy()
        y = host(model(ids))
        with edit.without(model):
            assert np.abs(host(model(ids)) - y).max() > 0.1
        assert np.abs(y - z).max() <= TOLERANCE * np.abs(z).max()

    ft.attach(model, ft.LoRA(r=4, targets=("attn.[qkvo]", "mlp.gate", "mlp.up", "mlp.down")))
    ft.fit(model, [{"ids": ids}], 3, ft.AdamW(0.01), progress=False)
    model.eval()
    ft.save_peft(model, tmp_path / "lora")
    wrapped = peft.PeftModel.from_pretrained(other, tmp_path / "lora")
    compare(wrapped)
    other = wrapped.unload()
    ft.detach(model)
    ft.attach(model, ft.PrefixTuning(p=5))
    ft.fit(model, [{"ids": ids}], 3, ft.AdamW(0.1), progress=False)
    model.eval()
    ft.save_peft(model, tmp_path / "prefix")
    compare(peft.PeftModel.from_pretrained(other, tmp_path / "prefix"))
    ft.detach(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(other, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    ft.load_peft(model, tmp_path / "theirs")
    compare(wrapped.eval())
    wrapped.unload()


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


@pytest.mark.parametrize("kind, head", [("gpt2", "lm"), ("bert", "mlm"), ("bert", "none"), ("llama", "lm"),
                                        ("roberta", "none")])
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
               ("distilbert", "none"), ("distilbert", "classes"), ("roberta", "classes"),
               ("llama", "classes"), ("llama-tied", "lm"), ("qwen2", "lm")]
KIND = {"reduction_factor": 5, "non_linearity": "gelu"}


@pytest.mark.parametrize("targets", [(), "mlp", "attn", "blocks.1.*"])
@pytest.mark.parametrize("kind, head", [*BOTTLENECKS, ("bert", "mlm")])
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
    with pytest.raises(ValueError, match="adapter_config.json: .* wants .*all that this library has"):
        ft.load_adapterhub(model, tmp_path / "adapter")
    assert np.array_equal(host(model(IDS)), before)


def test_every_width_of_a_bottleneck_survives_adapterhubs_reduction_factor():
    from tinyft.adapters.adapterhub import reduction_factor
    for width in (12, 48, 576, 768):
        for m in range(1, 2 * width):
            assert int(width // reduction_factor(width, m)) == m
