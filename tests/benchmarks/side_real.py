"""Real checkpoints (`make real-assets`).  case.method names the job;  case.model: tinyft | packed | torch.

    lora_step    a training step of SmolLM2-135M with LoRA (q and v, r = 8), batch 4 x 128, every position labelled
    lora_masked  the same; the first three quarters of each row are a prompt without labels
    generate     64 tokens, greedy, after a prompt of 40 tokens, with the KV cache
    embed        sentence vectors of all-MiniLM-L6-v2, batch 32, length 128

"packed" is tinyft with the 4-bit weights of the file.  "torch" is transformers, with PEFT's LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case

ASSETS = Path(__file__).parents[2] / "work" / "real"
GGUF = ASSETS / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = ASSETS / "all-MiniLM-L6-v2"
VOCABULARY = 49152
TOKENS = 64
Run = Callable[[], float]


def build(c: Case) -> Any:
    """The model of a case; a LoRA is attached for training."""
    return (torch_model if c.model == "torch" else tinyft_model)(c)


def start(model: Any, c: Case) -> tuple[Run, int]:
    """A step that returns its loss (0 if there is none), and the number of trainable parameters."""
    jobs = {"lora_step": "lora", "lora_masked": "lora", "generate": "generate", "embed": "embed"}
    side = "torch" if c.model == "torch" else "tinyft"
    return globals()[f"{jobs[c.method]}_{side}"](model, c)


def rows(c: Case) -> tuple[np.ndarray, np.ndarray]:
    """ids (4, 128) and their labels, the next tokens; -100 where there is no label."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (4, 129))
    labels = ids[:, 1:].copy()
    if c.method == "lora_masked":
        labels[:, :96] = -100
    return ids[:, :-1], labels


def prompt() -> np.ndarray:
    """ids (1, 40)."""
    return np.random.default_rng(1).integers(0, VOCABULARY, (1, 40))


def sentences() -> np.ndarray:
    """ids (32, 128) of MiniLM's vocabulary."""
    return np.random.default_rng(2).integers(1000, 30000, (32, 128))


# ── tinyft ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def tinyft_model(c: Case) -> Any:
    import tinyft as ft
    from tinyft import kernels

    kernels.keep_memory()
    if c.method == "embed":
        model, _ = ft.load(MINILM)
    elif c.model == "packed":
        model, _ = ft.load(GGUF, packed=True)
    else:
        model, _ = ft.load(GGUF)
    if c.method.startswith("lora"):
        ft.attach(model, ft.LoRA(r=8, alpha=16, targets="attn.[qv]"))
        model.train()
    return model


def lora_tinyft(model: Any, c: Case) -> tuple[Run, int]:
    import tinyft as ft
    from tinyft.train.batch import compute_loss, read_batch

    trained = ft.trained(model)
    optimizer = ft.AdamW(1e-3).start(trained)
    ids, labels = rows(c)
    targets = read_batch({"ids": ids, "labels": labels})

    def step() -> float:
        _, loss = compute_loss(model, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(p.size for p in trained.values())


def generate_tinyft(model: Any, c: Case) -> tuple[Run, int]:
    import tinyft as ft

    ids = prompt()

    def step() -> float:
        ft.generate(model, ids, TOKENS)
        return 0.0

    return step, 0


def embed_tinyft(model: Any, c: Case) -> tuple[Run, int]:
    import tinyft as ft

    ids = sentences()

    def step() -> float:
        with ft.no_grad():
            hidden = model(ids).data
            vectors = hidden.mean(axis=1)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return 0.0

    return step, 0


# ── transformers and PEFT ────────────────────────────────────────────────────────────────────────────────────────────
def torch_model(c: Case) -> Any:
    import torch
    import transformers

    if c.method == "embed":
        return transformers.AutoModel.from_pretrained(MINILM).eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS, gguf_file=GGUF.name, dtype=torch.float32)
    if not c.method.startswith("lora"):
        return model.eval()
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def lora_torch(model: Any, c: Case) -> tuple[Run, int]:
    import torch
    from torch.nn import functional as F

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    ids, labels = map(torch.from_numpy, rows(c))

    def step() -> float:
        optimizer.zero_grad()
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in trained)


def generate_torch(model: Any, c: Case) -> tuple[Run, int]:
    import torch

    ids = torch.from_numpy(prompt())

    def step() -> float:
        with torch.no_grad():
            model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                           attention_mask=torch.ones_like(ids), pad_token_id=0)
        return 0.0

    return step, 0


def embed_torch(model: Any, c: Case) -> tuple[Run, int]:
    import torch

    ids = torch.from_numpy(sentences())
    mask = torch.ones_like(ids)

    def step() -> float:
        with torch.no_grad():
            hidden = model(ids, attention_mask=mask).last_hidden_state
            torch.nn.functional.normalize(hidden.mean(dim=1))
        return 0.0

    return step, 0
