"""The tree that print(model) shows: shapes, what trains, numbers of parameters, edits, and blocks that look alike."""
from __future__ import annotations

import re

import numpy as np
import pytest
from contract import KINDS, build
from test_nn import Int8, Tree

from tinyft import GPT, RTN, GPTConfig, Houlsby, LoRA, Partial, PrefixTuning, attach, compress, count, detach, printing
from tinyft.nn import Dropout, Linear, Packed


def lines_of(module: object) -> list[str]:
    return repr(module).splitlines()


def line(module: object, name: str) -> list[str]:
    """The words of the line of one part."""
    (found,) = [text.split() for text in lines_of(module) if text.split()[:1] == [name]]
    return found


def test_adapters_whose_names_are_numbers_have_a_line_each():
    model = build("gpt")
    attach(model, LoRA(r=2), name="0")
    attach(model, LoRA(r=2), name="1")
    shown = repr(model)
    assert "+ 0" in shown
    assert "+ 1" in shown


def test_every_part_has_a_line_with_class_shape_and_number_of_parameters():
    model = GPT(GPTConfig(vocab=19, positions=12, width=16, layers=3, heads=2))
    assert lines_of(model)[0] == f"GPT: {count(model).total:,} float32 parameters, all train"
    assert line(model, "embed") == ["embed", "Embedding", "304", "trains", "weight", "(19,", "16),", "tied"]
    assert line(model, "up")[:3] == ["up", "Linear", "1,088"]
    assert line(model, "blocks.0-2") == ["blocks.0-2", "3", "x", "PreNormBlock", "3,280", "trains", "each"]
    assert "causal" in line(model, "attn")
    shown = {text.split()[0] for text in lines_of(model)[2:]}
    assert shown == {"embed", "pos", "drop", "blocks.0-2", "norm1", "attn", *"qkvo", "kv", "drop_p", "norm2", "mlp",
                     "up", "down", "norm", "head"}


def test_columns_stand_below_each_other():
    for text in (repr(build("gpt")), repr(attach(model := build("bert"), LoRA(r=1)) and model)):
        rows = [row for row in text.splitlines() if re.search(r" \d[\d,]*  (trains|frozen)", row)]
        assert len(rows) > 10
        assert len({re.search(r"  (trains|frozen|\d+ train)", row).start() for row in rows}) == 1


def test_only_blocks_that_look_alike_share_a_line():
    model = GPT(GPTConfig(vocab=19, positions=12, width=16, layers=4, heads=2))
    attach(model, Partial(k=1))
    assert "frozen" in line(model, "blocks.0-2") and "trains" in line(model, "blocks.3")
    detach(model)
    attach(model, LoRA(r=2, targets="blocks.1.attn.q"))
    assert line(model, "blocks.2-3") and line(model, "blocks.0") and line(model, "blocks.1")


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_shown_below_their_module_and_what_trains_is_counted(kind):
    model = build(kind)
    before = repr(model)
    attach(model, LoRA(r=2, targets="attn.q"))
    head = lines_of(model)[0]
    trained = sum(p.size for p in model.parameters() if p.requires_grad)
    assert f"; {trained:,} train" in head and " in edits" in head
    assert lines_of(model)[1] == "  lora = LoRA(r=2, alpha=16.0, dropout=0.0, targets='attn.q')"
    names = [text.split() for text in lines_of(model)]
    places = [i for i, words in enumerate(names) if words[:2] == ["+", "lora"]]
    assert places and all(names[i - 1][0] == "q" for i in places)
    assert names[places[0]][2] == "LowRank" and "(2," in names[places[0]]
    detach(model)
    assert repr(model) == before


def test_a_single_module_is_one_line_and_a_module_without_parameters_says_so():
    rng = np.random.default_rng(0)
    assert repr(Linear(3, 2, rng=rng)) == "Linear: 8 float32 parameters, all train; weight (2, 3), bias (2,)"
    assert repr(Dropout(0.1)) == "Dropout: no parameters; p=0.1"
    linear = Linear(3, 2, rng=rng)
    linear.weight.requires_grad = False
    assert "; 2 train" in repr(linear)
    linear.bias.requires_grad = False
    assert ", all frozen" in repr(linear)


def test_buffers_packed_weights_and_shared_parts_are_shown():
    tree = Tree(np.random.default_rng(0))
    text = repr(tree)
    assert "table (3,) int64 buffer" in text and "by_name.a" in text and "layers.0" in text
    tree.layers[0].weight = Int8(np.ones((4, 4), np.float32))
    assert "packed (4, 4)" in repr(tree)
    model = build("gpt")
    attach(model, PrefixTuning(p=2, mlp=3))
    total = sum(p.size for name, p in model.named_parameters().items() if "edits" in name.split("."))
    assert f"and {total:,} in edits; {total:,} train" in repr(model)              # the shared part counts once
    attach(model, Houlsby(m=2, norms=False))
    assert "+ houlsby" in repr(model) and "+ prefixtuning" in repr(model)


def test_a_packed_weight_is_one_readable_line_and_is_counted():
    """As its dense form, frozen, under its module; its buffers are not listed."""
    model = build("gpt")
    names = [text.split()[0] for text in lines_of(model)[2:]]
    compress(model, RTN(4, 8))
    text = repr(model)
    weights = [m for m in model.modules() if isinstance(m, Packed)]
    entries = sum(int(np.prod(w.shape)) for w in weights)
    nbytes = sum(w.nbytes for w in weights)
    assert lines_of(model)[0].endswith(f"all train; {entries:,} weights packed in {nbytes:,} bytes")
    assert count(model).total == entries + sum(p.size for p in model.parameters())
    assert "buffer" not in text and "scale_bits" not in text
    rows = [line.split() for line in lines_of(model)[2:]]
    assert [row[0] for row in rows if row[0] != "weight"] == names
    weight = model.blocks[0].attn.q.weight
    line = rows[[row[0] for row in rows].index("q") + 1]
    assert line[:4] == ["weight", "Uniform", f"{int(np.prod(weight.shape)):,}", "packed"]
    assert f"affine {tuple(weight.shape)}, 4 bits in groups of 8, {weight.nbytes:,} bytes" in text
    assert repr(weight) == (f"Uniform: {int(np.prod(weight.shape)):,} weights packed in {weight.nbytes:,} bytes; "
                            f"{weight.extra_repr()}")
    attach(model, LoRA(r=1, targets="attn.q"))
    assert "in edits; " in repr(model) and "+ lora" in repr(model)
    assert count(model).trained == sum(p.size for p in model.parameters() if p.requires_grad)


def test_mixed_dtypes_are_not_named_as_one():
    model = build("gpt").to(dtype="bfloat16")
    assert "bfloat16 parameters" in lines_of(model)[0]
    attach(model, LoRA(r=1))
    assert "float" not in lines_of(model)[0]


def test_lists_are_joined_by_place_only():
    """Planted: parts of equal looks under other names, and with a gap between their numbers, stay apart."""
    assert printing._is_next("blocks.0", "blocks.2", 2)
    for other in ("blocks.3", "layers.2", "blocks.x"):
        assert not printing._is_next("blocks.0", other, 2)
