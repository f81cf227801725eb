"""transformers refuses a directory with packed weights: it would compute nonsense."""
from __future__ import annotations

import json

import pytest
from packers import pack_all

import tinyft as ft

REASON = "transformers is not installed: pip install 'tinyft[peers]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)


def test_transformers_refuses_the_directory(tmp_path):
    model = ft.GPT(ft.GPTConfig(vocab=30, positions=16, width=32, layers=2, heads=2), seed=1)
    ft.save(pack_all(model, ft.RTN(4, 8)), tmp_path / "m")
    for cls in (transformers.AutoModelForCausalLM, transformers.GPT2LMHeadModel):
        with pytest.raises(ValueError, match="quant_method"):
            cls.from_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Incompatible safetensors file"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="unexpected blocks.0.attn.k.weight.scale_bits"):
        ft.load(tmp_path / "m")
