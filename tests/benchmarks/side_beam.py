"""Beam search of a random Marian, the same in both libraries.  case.model: tinyft | torch;  case.method: beams

case.B sources of case.T tokens each, NEW new tokens for each; no text ends before. torch is transformers' generate.
Both search with the penalty n^1, 4-fold or greedy, with a cache, in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Case

NEW = 24
Run = Callable[[], Any]


def build(c: Case) -> Run:
    """The function to measure; it gives the new tokens (B, NEW)."""
    return (with_torch if c.model == "torch" else with_tinyft)(c)


def start(run: Run, c: Case) -> tuple[Callable[[], float], int]:
    """The same as a step; its loss is 0."""

    def step() -> float:
        run()
        return 0.0

    return step, 0


def source(c: Case) -> np.ndarray:
    """Random ids (B, T); 0 is left out."""
    return np.random.default_rng(0).integers(1, c.V, (c.B, c.T))


def config(c: Case) -> Any:
    """The configuration of a Marian whose texts never end."""
    from transformers import MarianConfig

    return MarianConfig(
        vocab_size=c.V, d_model=c.C, encoder_layers=c.L, decoder_layers=c.L, encoder_attention_heads=c.H,
        decoder_attention_heads=c.H, encoder_ffn_dim=4 * c.C, decoder_ffn_dim=4 * c.C, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=None, forced_eos_token_id=None, max_position_embeddings=128,
        scale_embedding=True,
    )


def random_marian(c: Case) -> Any:
    """The model of transformers, with weights of a size that spreads its logits."""
    import torch
    from transformers import MarianMTModel

    torch.manual_seed(0)
    model = MarianMTModel(config(c)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name and p.ndim > 1:          # not the embedding, nor the sinusoids
                p.normal_(std=2 * p.shape[-1] ** -0.5)
        model.model.shared.weight.normal_(std=c.C ** -0.5)
        model.model.shared.weight[0] = 0                 # never the best: the bias below
        model.final_logits_bias[0, 0] = -1e4
    return model


# ---------------------------------------------------------------------------------------------------- tinyft
def with_tinyft(c: Case) -> Run:
    """The best hypotheses of tinyft."""
    import tinyft as ft

    with tempfile.TemporaryDirectory() as folder:
        random_marian(c).save_pretrained(folder)
        model, _ = ft.load(folder)
    ids = source(c)
    beams = int(c.method)

    def run() -> np.ndarray:
        found = ft.beam_search(model, None, NEW, beams=beams, lp=ft.PowerPenalty(1.0), source_ids=ids)
        return np.array([hypotheses[0].tokens for hypotheses in found])

    return run


# ---------------------------------------------------------------------------------------------------- transformers
def with_torch(c: Case) -> Run:
    """The best hypotheses of transformers."""
    import torch

    model = random_marian(c)
    ids = torch.from_numpy(source(c))
    beams = int(c.method)

    @torch.no_grad()
    def run() -> np.ndarray:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=beams, max_new_tokens=NEW, do_sample=False,
            length_penalty=1.0,
        )
        return found.numpy()[:, 1:]

    return run
