"""transformers beside Llama, Mistral and Qwen2: the same logits, gradients and texts from the same files.

Tiny random models in float32, which transformers computes norms and rotations in whatever the dtype. Differences are
relative to the largest number of the array.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dev, host

import tinyft as ft
from tinyft import ops
from tinyft.formats import huggingface, layout
from tinyft.models.rotary import RotaryScaling

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

V, CLASSES = 50, 5
TOLERANCE = 1e-5
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification),
    "mistral": (MistralConfig, MistralForCausalLM, MistralForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification),
}
SIZES = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0, "num_labels": CLASSES,
}
# With heads of width 8 and this original length, one frequency stays, one is mixed and two are divided.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, one head of keys": ("llama", {"num_key_value_heads": 1}),
    "llama, two heads of keys": ("llama", {"num_key_value_heads": 2}),
    "llama, as many heads of keys": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"num_key_value_heads": 2, "head_dim": 10}),
    "llama, narrow heads": ("llama", {"num_key_value_heads": 4, "head_dim": 2}),
    "llama, tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, every bias": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama, another base": ("llama", {"rope_theta": 100.0}),
    "llama, linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama, llama3": ("llama", {"rope_scaling": LLAMA3, "head_dim": 8}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, wide heads": ("mistral", {"num_key_value_heads": 1, "sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2, tied": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 1e6}),
}


def drawn(seed: int) -> tuple[str, dict[str, Any]]:
    """A random configuration."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(list(KINDS)))
    heads = int(rng.choice([1, 2, 3, 4, 6]))
    settings: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([n for n in range(1, heads + 1) if heads % n == 0])),
        "head_dim": int(rng.choice([2, 4, 6, 8])),
        "hidden_size": int(rng.choice([10, 12, 18])),
        "intermediate_size": int(rng.choice([7, 16, 30])),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-2])),
        "rope_theta": float(rng.choice([50.0, 10000.0, 500000.0])),
        "rope_scaling": [None, {"rope_type": "linear", "factor": 2.5}, LLAMA3][int(rng.integers(3))],
        "tie_word_embeddings": bool(rng.integers(2)),
    }
    if kind == "llama":
        settings |= {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}
    if kind == "mistral":
        settings["sliding_window"] = None
    return kind, settings


SEEDS = range(7, 15)
EVERY: dict[str, tuple[str, dict[str, Any]]] = {**CASES, **{f"drawn {seed}": drawn(seed) for seed in SEEDS}}
every_case = pytest.mark.parametrize("case", EVERY)
FEW = ["llama, wide heads", "llama, llama3", "mistral", "qwen2, tied"]
few_cases = pytest.mark.parametrize("case", FEW)


def test_the_drawn_configurations_have_every_kind_and_setting():
    found = [drawn(seed) for seed in SEEDS]
    assert {kind for kind, _ in found} == set(KINDS)
    for key in ("tie_word_embeddings", "attention_bias"):
        assert {settings.get(key) for _, settings in found} >= {True, False}
    assert len({str(settings["rope_scaling"]) for _, settings in found}) == 3
    groups = {settings["num_attention_heads"] // settings["num_key_value_heads"] for _, settings in found}
    assert len(groups) >= 3


def theirs(case: str, *, classes: bool = False) -> Any:
    """A random model of transformers. Its weights are not small, so that a wrong norm or a missing bias shows."""
    kind, settings = EVERY[case]
    config, causal, classifier = KINDS[kind]
    torch.manual_seed(0)
    model = (classifier if classes else causal)(config(**{**SIZES, **settings}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def both(case: str, folder: Path, **more: Any) -> tuple[Any, ft.Llama]:
    """Their model and ours, from one directory."""
    they = theirs(case, **more)
    they.save_pretrained(folder)
    return they, ft.load(folder)[0]


def batch(rng: np.random.Generator, side: str) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask of texts of 9, 3, 1 and 6 tokens, padded with id 0, which is no other token of theirs."""
    length = np.array([9, 3, 1, 6])[:, None]
    columns = np.arange(9)
    mask = columns < length if side == "right" else columns >= 9 - length
    return np.where(mask, rng.integers(1, V, mask.shape), 0), mask


def call(model: Any, ids: np.ndarray, mask: np.ndarray) -> Any:
    """The logits of their model."""
    return model(torch.tensor(ids), attention_mask=torch.tensor(mask.astype(int))).logits


def near(got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE, what: str = "") -> None:
    """Within the tolerance, relative to the largest number of `want`."""
    assert got.shape == want.shape, what
    difference = np.abs(got - want).max()
    assert difference <= tolerance * np.abs(want).max(), f"{what}: {difference:.3g} of {np.abs(want).max():.3g} apart"


def same_logits(they: Any, we: Any, tolerance: float = TOLERANCE) -> None:
    """The same logits at every real token, with padding on the right and on the left; the same class scores."""
    rng = np.random.default_rng(2)
    for side in ("right", "left"):
        ids, mask = batch(rng, side)
        with torch.no_grad():
            want = call(they, ids, mask).numpy()
        got = host(we(ids, mask=mask))
        if want.ndim == 3:
            got, want = got[mask], want[mask]
        near(got, want, tolerance, side)


def gradients(they: Any, we: Any, side: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, our gradient, theirs) of the cross-entropy, for every tensor."""
    rng = np.random.default_rng(3)
    ids, mask = batch(rng, side)
    their_logits = call(they, ids, mask)
    if their_logits.ndim == 3:
        labels = np.where(mask, rng.integers(0, V, mask.shape), -100)
    else:
        labels = rng.integers(0, CLASSES, len(ids))
    torch.nn.functional.cross_entropy(their_logits.flatten(0, -2), torch.tensor(labels).flatten()).backward()
    ops.cross_entropy(we(ids, mask=mask), dev(labels)).backward()
    family = next(f for f in huggingface.FAMILIES if f.model_type == they.config.model_type)
    plan = family.plan_of(we)
    ours = {name: host(p.grad) for name, p in we.named_parameters().items()}
    stored = layout.file_tensors(family.table(plan), ours)
    got = {family.file_name(name, plan): a for name, a in stored.items()}
    want = {name: p.grad.numpy() for name, p in they.named_parameters()}
    assert got.keys() == want.keys()
    for name in want:
        yield name, got[name], want[name]


# ── the same numbers ─────────────────────────────────────────────────────────────────────────────────────────────────
@every_case
def test_logits(case, tmp_path):
    same_logits(*both(case, tmp_path))


@every_case
def test_every_gradient(case, tmp_path):
    """With padding on either side. No gradient is zero: a rotated bias of the keys is no constant of the scores."""
    they, we = both(case, tmp_path)
    for side in ("right", "left"):
        they.zero_grad()
        we.zero_grad()
        for name, got, want in gradients(they, we, side):
            assert np.abs(want).max() > 1e-4, name
            near(got, want, 2 * TOLERANCE, f"{side}: {name}")


@few_cases
def test_class_scores_and_their_gradients(case, tmp_path):
    they, we = both(case, tmp_path, classes=True)
    assert we.head.out_features == CLASSES
    same_logits(they, we)
    for name, got, want in gradients(they, we, "left"):
        near(got, want, 2 * TOLERANCE, name)


def test_hidden_states_of_a_model_without_a_head(tmp_path):
    """Its file has no output layer and no prefix `model.`; we write it back in the same way."""
    torch.manual_seed(0)
    they = LlamaModel(LlamaConfig(**{**SIZES, "num_key_value_heads": 2})).eval()
    they.save_pretrained(tmp_path / "theirs")
    we, _ = ft.load(tmp_path / "theirs")
    assert we.head is None
    ids, mask = batch(np.random.default_rng(0), "right")
    with torch.no_grad():
        want = they(torch.tensor(ids), attention_mask=torch.tensor(mask.astype(int))).last_hidden_state.numpy()
    near(host(we(ids, mask=mask))[mask], want[mask])
    ft.save(we, tmp_path / "ours")
    again, info = LlamaModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(p, they.state_dict()[name]) for name, p in again.state_dict().items())


def shifted_base(they: Any, we: ft.Llama) -> None:
    we.blocks[0].attn._rotary.base *= 1.05


def heads_in_turn(they: Any, we: ft.Llama) -> None:
    """The rows of q in another order of heads: a b a b in the place of a a b b."""
    q = we.blocks[0].attn.q.weight
    rows = host(q).reshape(2, 2, -1, q.shape[1]).swapaxes(0, 1)
    q.copy_(np.ascontiguousarray(rows.reshape(q.shape)))


def gate_and_up(they: Any, we: ft.Llama) -> None:
    mlp = we.blocks[1].mlp
    mlp.gate, mlp.up = mlp.up, mlp.gate


def last_norm(they: Any, we: ft.Llama) -> None:
    we.norm.weight.copy_(np.ones(we.norm.weight.shape))


@pytest.mark.parametrize("wrong", [shifted_base, heads_in_turn, gate_and_up, last_norm])
def test_a_wrong_model_is_caught(wrong, tmp_path):
    they, we = both("llama, two heads of keys", tmp_path)
    same_logits(they, we)
    wrong(they, we)
    with pytest.raises(AssertionError, match="apart"):
        same_logits(they, we, 1e-3)


@pytest.mark.parametrize("settings", [
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "full_attention"]},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
    {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
])
def test_a_window_is_refused_exactly_if_it_changes_their_logits(settings, tmp_path):
    """A Qwen2's window acts in some layers, or in none."""
    config = {**SIZES, "num_key_value_heads": 2}
    torch.manual_seed(0)
    they = Qwen2ForCausalLM(Qwen2Config(**config, **settings, attn_implementation="eager")).eval()
    without = Qwen2ForCausalLM(Qwen2Config(**config, attn_implementation="eager")).eval()
    without.load_state_dict(they.state_dict())
    ids = torch.tensor(np.random.default_rng(0).integers(1, V, (1, 12)))
    with torch.no_grad():
        difference = float((they(ids).logits - without(ids).logits).abs().max())
    they.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = {**json.loads(file.read_text()), **settings}                       # they write null for an unused window
    file.write_text(json.dumps(written))
    if difference > 1e-6:
        with pytest.raises(ValueError, match="has no sliding window"):
            ft.load(tmp_path)
    else:
        same_logits(they, ft.load(tmp_path)[0])


def test_the_frequencies_are_theirs():
    """Also where the wavelengths of llama3 change their kind."""
    for scaling in (None, {"rope_type": "linear", "factor": 3.0}, LLAMA3, {**LLAMA3, "low_freq_factor": 3.9}):
        config = LlamaConfig(**SIZES, head_dim=64, rope_scaling=scaling, rope_theta=5e5)
        want = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
        ours = None
        if scaling is not None and scaling["rope_type"] == "linear":
            ours = RotaryScaling("linear", 3.0)
        elif scaling is not None:
            ours = RotaryScaling("llama3", 8.0, low=scaling["low_freq_factor"], high=4.0, original=64)
        rotary = ft.models.rotary.Rotary(64, base=5e5, scaling=ours)
        np.testing.assert_allclose(rotary.frequencies(), want, rtol=1e-5)


# ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────────
@few_cases
def test_step_by_step_through_the_cache_are_the_logits_of_their_whole_pass(case, tmp_path):
    they, we = both(case, tmp_path)
    ids, mask = batch(np.random.default_rng(4), "left")
    with torch.no_grad():
        want = call(they, ids, mask).numpy()
    cache = ft.Cache()
    got = [host(we(ids[:, t:t + 1], mask=mask[:, t:t + 1], cache=cache)) for t in range(ids.shape[1])]
    near(np.concatenate(got, axis=1)[mask], want[mask])


@pytest.mark.parametrize("case", [*FEW, "llama, one head of keys", "llama, linear", "llama, tied"])
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_generation(case, cache, tmp_path):
    """Twenty tokens from prompts of different lengths, padded on the left."""
    they, we = both(case, tmp_path)
    they.generation_config.eos_token_id = None
    ids, mask = batch(np.random.default_rng(5), "left")
    attention_mask = torch.tensor(mask.astype(int))
    want = they.generate(torch.tensor(ids), attention_mask=attention_mask, max_new_tokens=20, do_sample=False).numpy()
    got = ft.generate(we, ids, 20, mask=mask, cache=cache)
    assert np.array_equal(np.asarray(got), want)
    assert len(np.unique(want[:, 9:])) > 2, "not one token again and again"


# ── back to files ────────────────────────────────────────────────────────────────────────────────────────────────────
def read_by_transformers(folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    """Their model of a directory of ours: with nothing missing and nothing unexpected."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("case", [*FEW, "llama, tied", "llama, every bias", "llama, linear", "qwen2", "drawn 9"])
def test_transformers_loads_our_files(case, tmp_path):
    """A Mistral comes back as a Llama, which computes the same."""
    they, we = both(case, tmp_path / "theirs")
    ft.save(we, tmp_path / "ours")
    again = read_by_transformers(tmp_path / "ours")
    assert again.config.model_type == {"mistral": "llama"}.get(they.config.model_type, they.config.model_type)
    same_logits(again, we)
    same_logits(they, ft.load(tmp_path / "ours")[0])
    written = again.state_dict()
    assert all(torch.equal(written[name], value) for name, value in they.state_dict().items())
    for key in ("vocab_size", "hidden_size", "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
                "pad_token_id"):
        assert getattr(again.config, key) == getattr(they.config, key), key


@few_cases
def test_transformers_loads_a_classifier_of_ours(case, tmp_path):
    they, we = both(case, tmp_path / "theirs", classes=True)
    ft.save(we, tmp_path / "ours")
    same_logits(read_by_transformers(tmp_path / "ours", transformers.AutoModelForSequenceClassification), we)
    same_logits(they, we)


@few_cases
def test_transformers_loads_a_model_that_was_trained_and_merged(case, tmp_path):
    """After LoRA on every map and merge; then after three steps of full fine-tuning."""
    they, we = both(case, tmp_path / "theirs")
    ids, mask = batch(np.random.default_rng(6), "right")
    before = host(we(ids, mask=mask))
    for method in (ft.LoRA(r=2, targets=("attn.[qkvo]", "mlp.gate", "mlp.up", "mlp.down")), ft.Full()):
        ft.attach(we, method)
        ft.fit(we, [{"ids": ids, "mask": mask}], 3, ft.AdamW(0.02), progress=False)
        after = host(we.eval()(ids, mask=mask))
        assert np.abs(after - before)[mask].max() > 0.1
        ft.merge(we)
        near(host(we(ids, mask=mask)), after)
        folder = tmp_path / type(method).__name__
        ft.save(we, folder)
        same_logits(read_by_transformers(folder), we)
        before = after


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path):
    """We read their half-precision file as the same values, and they read ours."""
    theirs("llama, wide heads").to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    they = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    we, _ = ft.load(tmp_path / "theirs")
    assert {p.dtype for p in we.parameters()} == {np.dtype("float32")}
    ft.save(we, tmp_path / "ours", dtype=dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    same_logits(they, we)
    same_logits(again, we)


@pytest.mark.parametrize("case", ["llama, tied", "qwen2"])
def test_shards(case, tmp_path):
    they = theirs(case)
    they.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    same_logits(they, ft.load(tmp_path)[0])


# ── SmolLM2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────
SMOLLM2 = Path(__file__).resolve().parents[2] / "work/real/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, ft.Llama, Any]:
    """(their model, our model, our tokenizer) of the file."""
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'tinyft[gguf]'")
    if not SMOLLM2.is_file():
        pytest.skip("SmolLM2 is not here: make real-assets")
    they = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32)
    we, tokenizer = ft.load(SMOLLM2)
    return they.eval(), we, tokenizer


TEXTS = ["What is the capital of France?", "def add(a, b):\n    return a +", "The"]


def test_smollm2_logits(smollm2):
    """At 1e-5 of the largest, with padding on either side."""
    they, we, tokenizer = smollm2
    rows = [tokenizer.encode(text).ids for text in TEXTS]
    longest = max(map(len, rows))
    for side in ("right", "left"):
        ids = np.full((len(rows), longest), 2)
        mask = np.zeros(ids.shape, bool)
        for i, row in enumerate(rows):
            columns = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            ids[i, columns] = row
            mask[i, columns] = True
        with torch.no_grad():
            want = call(they, ids, mask).numpy()
        near(host(we(ids, mask=mask))[mask], want[mask], TOLERANCE, side)


def next_token_gradients(model: ft.Llama, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients of the next-token loss by our names."""
    labels = np.full(ids.shape, -100)
    labels[:, :-1] = ids[:, 1:]
    model.zero_grad()
    ops.cross_entropy(model(ids), dev(labels)).backward()
    found = {name: host(p.grad) for name, p in model.named_parameters().items()}
    model.zero_grad()
    return found


def test_smollm2_gradients(smollm2):
    """Of all 272 tensors, ours and theirs, beside our own in float64: the length of the difference, relative to the
    length of the gradient. Thirty layers in float32 cost digits, theirs more than ours."""
    they, we, tokenizer = smollm2
    ids = np.array([tokenizer.encode(TEXTS[0]).ids])
    they.zero_grad()
    they(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
    ours = next_token_gradients(we, ids)
    exact = next_token_gradients(ft.load(SMOLLM2)[0].to(dtype=np.float64), ids)
    family = next(f for f in huggingface.FAMILIES if f.model_type == "llama")
    plan = family.plan_of(we)
    table = family.table(plan)
    their_gradients = {name: p.grad.numpy() for name, p in they.named_parameters()}
    they.zero_grad()
    assert len(ours) == len(their_gradients) == 272
    errors = []
    for name, want in exact.items():
        arrays = ours[name], their_gradients[family.file_name(table[name].name, plan)]
        errors.append([np.linalg.norm(a - want) / np.linalg.norm(want) for a in arrays])
    our_errors, their_errors = np.transpose(errors)
    assert our_errors.max() <= 3e-4 and np.median(our_errors) <= 5e-5, our_errors.max()
    assert their_errors.max() <= 2e-3 and np.median(their_errors) <= 2e-4, their_errors.max()


def test_smollm2_greedy_answers(smollm2):
    """A chat, ten tokens: "The capital of France is Paris." and the end of the turn."""
    they, we, tokenizer = smollm2
    turn = f"<|im_start|>user\n{TEXTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    ids = np.array([tokenizer.encode(turn).ids])
    want = they.generate(torch.tensor(ids), max_new_tokens=10, do_sample=False, eos_token_id=None).numpy()
    got = np.asarray(ft.generate(we, ids, 10))
    assert np.array_equal(got, want)
    assert tokenizer.decode(got[0, ids.shape[1]:].tolist()).startswith("The capital of France is Paris.")
