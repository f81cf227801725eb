"""The account of memory: against the allocator, the graph's own arrays, closed forms and counted products.

The checks are functions of an account, so that the wrong accounts at the end must fail them.
"""
from __future__ import annotations

import dataclasses
import functools
import gc
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tinyft as ft
from tinyft import array, kernels, ops, sizes
from tinyft.compress import Q4_1
from tinyft.memory import CONFIGS, inference, training
from tinyft.memory.formulas import attention_products, gpt_activation_bytes, korthikanti_bytes
from tinyft.nn import Cache
from tinyft.optim import Optimizer
from tinyft.tensor import Tensor, topological
from tinyft.train.batch import compute_loss, read_batch

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="the account is that of NumPy's kernels")
GPT = ft.GPTConfig(vocab=1024, positions=128, width=160, layers=2, heads=5)
BERT = ft.BERTConfig(vocab=1024, positions=128, width=128, layers=2, heads=4)
LLAMA = ft.LlamaConfig(vocab=1024, positions=128, width=160, layers=2, heads=10, key_value_heads=2, hidden=400)
SEQ2SEQ = ft.Seq2SeqConfig(vocab=1024, positions=128, width=160, layers=2, heads=5)
T5 = ft.T5Config(vocab=1024, positions=128, width=160, layers=2, heads=5, head_width=32)
EXPERTS = ft.SwitchConfig(experts=4, every=2)
SWITCH = dataclasses.replace(GPT, switch=EXPERTS)
NOTHING_DROPPED = dataclasses.replace(GPT, switch=ft.SwitchConfig(experts=4, every=2, eval_capacity=4.0))
MODELS = {ft.GPTConfig: ft.GPT, ft.BERTConfig: ft.BERT, ft.LlamaConfig: ft.Llama, ft.Seq2SeqConfig: ft.Seq2Seq,
          ft.T5Config: ft.T5}
ALL_MAPS = ("attn.[qkvo]", "mlp.up", "mlp.down")
METHODS = {
    "full": None,
    "lora": ft.LoRA(r=8),
    "lora all": ft.LoRA(r=8, targets=ALL_MAPS),
    "bitfit": ft.BitFit(),
    "houlsby": ft.Houlsby(m=16),
    "prefix": ft.PrefixTuning(p=10),
    "prompt": ft.PromptTuning(p=10),
    "partial": ft.Partial(k=1),
}


def made(config: Any, method: Any = None) -> ft.Module:
    """A real model with a method."""
    model = MODELS[type(config)](config, 0)
    if method is not None:
        ft.attach(model, method)
    return model


# ── against the allocator ────────────────────────────────────────────────────────────────────────────────────────────
def real_batch(config: Any, B: int, T: int, source_length: int | None = None) -> dict[str, np.ndarray]:
    """A batch with labels, and with sources for an encoder-decoder."""
    rng = np.random.default_rng(0)
    batch = {"ids": rng.integers(0, config.vocab, (B, T)), "labels": rng.integers(0, config.vocab, (B, T))}
    if isinstance(config, (ft.Seq2SeqConfig, ft.T5Config)):
        batch["source_ids"] = rng.integers(0, config.vocab, (B, source_length or T))
    return batch


def measured_peak(config: Any, method: Any, B: int, T: int, weights: str | None = None,
                  source_length: int | None = None, **options: Any) -> int:
    """The largest bytes of all arrays in a real run of two steps, by the allocator."""
    batch = real_batch(config, B, T, source_length)
    gc.collect()
    with ft.peak_memory() as memory:
        model = MODELS[type(config)](config, 0)
        if weights in training.DTYPES:
            model.to(dtype=weights)
        elif weights is not None:
            ft.compress(model, ft.RTN(bits=4, group=64), targets=ALL_MAPS)
        if method is not None:
            ft.attach(model, method)
        ft.fit(model, [batch], 2, progress=False, **options)
    return memory["bytes"]


@pytest.fixture(scope="module", autouse=True)
def _numpy_kernels():
    """The kernels whose account this file tests to the byte; test_compiled_memory.py has the compiled ones."""
    with kernels.numpy_only():
        yield


@pytest.fixture(scope="module")
def _warm(_numpy_kernels):
    """The first step of a process also builds caches, and imports modules of NumPy."""
    measured_peak(ft.GPTConfig(vocab=9, positions=8, width=8, layers=1, heads=1), ft.Houlsby(m=1), 1, 4)


CASES = [
    *[(GPT, name, 6, {}) for name in METHODS],
    *[(GPT, name, 2, {}) for name in ("full", "lora")],
    *[(BERT, name, 6, {}) for name in ("full", "lora", "bitfit")],
    *[(LLAMA, name, 6, {}) for name in ("full", "lora")],
    (GPT, "full", 4, {"autocast": "bfloat16"}), (GPT, "lora", 4, {"autocast": "bfloat16"}),
    (GPT, "full", 4, {"weights": "bfloat16"}), (GPT, "lora", 4, {"weights": "bfloat16"}),
    (GPT, "full", 4, {"recompute": True}), (GPT, "lora", 6, {"recompute": True}),
    (GPT, "full", 4, {"optimizer": ft.SGD(0.1)}), (GPT, "full", 4, {"accumulate": 2}),
    (ft.GPTConfig(vocab=512, positions=128, width=160, layers=2, heads=5, dropout=0.1), "full", 6, {}),
    *[(SEQ2SEQ, name, 6, {}) for name in ("full", "lora", "prefix")], (T5, "full", 6, {}), (T5, "prompt", 6, {}),
    *[(config, "lora", 6, {"source_length": 20}) for config in (SEQ2SEQ, T5)],
    *[(SWITCH, name, 6, {}) for name in ("full", "lora", "bitfit")], (SWITCH, "full", 6, {"recompute": True}),
    (dataclasses.replace(BERT, switch=EXPERTS), "full", 6, {}),
    (dataclasses.replace(SEQ2SEQ, switch=EXPERTS), "lora", 6, {"source_length": 60}),
]


def check_peak(account: Any, config: Any, name: str, B: int, **options: Any) -> None:
    """The peak within 6 %: Python's own objects and the blocks of kernels are left out."""
    predicted = account(config, METHODS[name], batch=B, length=100, **options).peak
    measured = measured_peak(config, METHODS[name], B, 100, **options)
    assert predicted == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("config, name, B, options", CASES, ids=lambda value: str(value)[:24])
def test_the_peak_is_that_of_the_allocator(config, name, B, options, _warm):
    check_peak(ft.memory, config, name, B, **options)


def without_sources(config: Any, *arguments: Any, source_length: int, **options: Any) -> Any:
    """An account of the text alone: the source has one token."""
    return ft.memory(config, *arguments, source_length=1, **options)


def as_a_decoder(config: Any, *arguments: Any, source_length: int, **options: Any) -> Any:
    """An account of the decoder's blocks as those of a GPT, without cross-attention."""
    gpt = ft.GPTConfig(config.vocab, config.positions, config.width, config.layers, config.heads)
    return ft.memory(gpt, *arguments, **options)


@pytest.mark.parametrize("account", [without_sources, as_a_decoder])
def test_an_account_of_one_stack_is_rejected(account, _warm):
    with pytest.raises(AssertionError):
        check_peak(account, SEQ2SEQ, "lora", 6, source_length=100)


def as_a_dense_model(config: Any, *arguments: Any, **options: Any) -> Any:
    """An account of one feed-forward in the place of the experts."""
    return ft.memory(dataclasses.replace(config, switch=None), *arguments, **options)


def test_a_wrong_account_of_experts_is_rejected(monkeypatch, _warm):
    """Arrays without numbers count no token at any expert."""
    with pytest.raises(AssertionError):
        check_peak(as_a_dense_model, SWITCH, "full", 6)
    monkeypatch.setattr(training.EvenSwitchMLP, "count", training.SwitchMLP.count)
    with pytest.raises(AssertionError):
        check_peak(ft.memory, SWITCH, "full", 6)


def test_the_peak_on_packed_weights_is_that_of_the_allocator(_warm):
    """The real packed model, whose copy without numbers has the same buffers."""
    wide = ft.GPTConfig(vocab=512, positions=128, width=512, layers=2, heads=8)
    model = made(wide)
    ft.compress(model, ft.RTN(bits=4, group=64), targets=ALL_MAPS)
    ft.attach(model, ft.LoRA(r=8))
    rng = np.random.default_rng(0)
    batch = {"ids": rng.integers(0, 512, (8, 100)), "labels": rng.integers(0, 512, (8, 100))}
    report = ft.memory(model, batch=8, length=100)
    held = sum(p.data.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.named_buffers().values())
    assert report.weights == held
    gc.collect()
    with ft.peak_memory() as memory:
        ft.fit(model, [batch], 2, progress=False)
    assert report.peak == pytest.approx(held + memory["bytes"], rel=0.1)


# ── the arrays that a graph keeps ────────────────────────────────────────────────────────────────────────────────────
def inside(value: Any) -> Iterator[Any]:
    """The values that an object of a pullback refers to: cells of a closure, arguments, attributes, entries."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:                           # a cell that is not set yet
                pass
        yield from value.__defaults__ or ()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, Tensor, ft.Module)):
        yield from vars(value).values()


def kept_bytes(y: Tensor, apart: list[Any]) -> int:
    """The bytes of the arrays that the graph of y holds for backward, each memory once, without those of `apart`."""
    seen = set()
    memories = {id(owner(a)) for a in apart}
    total = 0
    stack: list[Any] = []
    for node in topological(y):
        if not isinstance(node, Tensor):
            stack += [back for _, back in getattr(node, "pulls", None) or []]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if not array.is_array(value):
            stack += inside(value)
        elif id(owner(value)) not in memories:
            memories.add(id(owner(value)))
            total += owner(value).nbytes
    return total


def owner(a: Any) -> Any:
    """The array, or the memory, that a view is a part of."""
    if isinstance(a, sizes.Sizes):
        return a.memory
    while isinstance(a, np.ndarray) and isinstance(a.base, np.ndarray):
        a = a.base
    return a


def without(arrays: list[Any], a: Any) -> list[Any]:
    return [b for b in arrays if b is not a]


def loss_of(z: Any) -> Tensor:
    return ops.cross_entropy(z, array.asarray(np.zeros(7, np.int64)))


def dropped(z: Any) -> Tensor:
    return ops.dropout(z, 0.1, 3)


def looked_up(W: Any) -> Tensor:
    return ops.embedding(W, array.asarray(np.zeros((2, 3), np.int64)))


OPS = {
    "linear": lambda x, n: (ops.linear, [x(7, 12), x(5, 12), x(5)]),
    "layer_norm": lambda x, n: (ops.layer_norm, [x(7, 12), x(12), x(12)]),
    "rms_norm": lambda x, n: (ops.rms_norm, [x(7, 12), x(12)]),
    "gelu": lambda x, n: (ops.gelu, [x(n, 64)]),
    "gelu_tanh": lambda x, n: (ops.gelu_tanh, [x(n, 64)]),
    "swiglu": lambda x, n: (ops.swiglu, [x(7, 12), x(7, 12)]),
    "attention": lambda x, n: (ops.attention, [x(2, 4, n // 20, 8), x(2, 2, n // 20, 8), x(2, 2, n // 20, 8)]),
    "cross_entropy": lambda x, n: (loss_of, [x(7, 12)]),
    "dropout": lambda x, n: (dropped, [x(8, 12)]),
    "embedding": lambda x, n: (looked_up, [x(9, 4)]),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("n", [40, 4000])
def test_a_counterpart_keeps_what_its_kernel_keeps(name, n):
    """For every choice of the inputs that need a gradient, the same bytes beside the inputs, and the same with them."""
    found = []
    for backend in ("numpy", "sizes"):
        array.use(backend)
        arguments = []
        f, arrays = OPS[name](lambda *shape: array.asarray(np.ones(shape, np.float32)), n)
        for chosen in range(1, 2**len(arrays)):
            tensors = [Tensor(a, requires_grad=bool(chosen >> i & 1)) for i, a in enumerate(arrays)]
            y = f(*tensors)
            beside = kept_bytes(y, arrays)
            held = [kept_bytes(y, without(arrays, a)) - beside for a in arrays]
            arguments.append((chosen, beside, held))
        found.append(arguments)
    assert found[0] == found[1]


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_the_closed_form_is_what_the_graph_keeps(data):
    """For random sizes: the formula, the account, and the arrays of a real graph (which no view of Python owns)."""
    config, B, s = draw_sizes(data)
    check_kept(config, B, s, gpt_activation_bytes(config, B, s))


def draw_sizes(data: Any) -> tuple[ft.GPTConfig, int, int]:
    """(config, batch, length)"""
    heads = data.draw(st.sampled_from([1, 2, 4]))
    config = ft.GPTConfig(vocab=data.draw(st.integers(5, 60)), positions=200, heads=heads,
                          width=heads * data.draw(st.integers(1, 9)), layers=data.draw(st.integers(1, 3)),
                          hidden=data.draw(st.sampled_from([None, 7, 33])))
    return config, data.draw(st.integers(1, 5)), data.draw(st.integers(2, 150))


def check_kept(config: ft.GPTConfig, B: int, s: int, claimed: int) -> None:
    """A claim of the bytes that training everything keeps must be the account's; and those of a real graph, in which
    arrays without references from a pullback (the loss) do not count."""
    assert claimed == ft.memory(config, batch=B, length=s).kept
    model = made(config)
    ids = np.ones((B, s), np.int64)
    _, loss = compute_loss(model, read_batch({"ids": ids, "labels": ids}))
    in_graph = kept_bytes(loss, [p.data for p in model.parameters()])
    assert in_graph == claimed - 4                       # without the loss


@pytest.mark.parametrize("config", [
    ft.Seq2SeqConfig(vocab=50, positions=128, width=24, layers=2, heads=2),
    ft.T5Config(vocab=50, positions=128, width=24, layers=2, heads=2, head_width=12, feed_forward="gated-gelu",
                tied=False),
], ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("length, source_length", [(40, 70), (90, 20)])
def test_both_stacks_keep_what_a_real_graph_keeps(config, length, source_length):
    """To the byte, but for the loss: keys and values of cross-attention have the length of the source."""
    model = made(config)
    _, loss = compute_loss(model, read_batch(real_batch(config, 3, length, source_length)))
    in_graph = kept_bytes(loss, [p.data for p in model.parameters()])
    kept = ft.memory(config, batch=3, length=length, source_length=source_length).kept
    assert in_graph == kept - 4
    assert kept != ft.memory(config, batch=3, length=length, source_length=source_length + 1).kept


@pytest.mark.parametrize("name, floats", [("full", 16), ("bitfit", 10), ("norms", 10)])
def test_frozen_linear_maps_keep_no_input(name, floats):
    """16 floats for a number of the residual stream; 6 fewer with all maps frozen: 1 for q, k, v; 1 for `up`; 4 for
    `down`. The input of o stays, as it is also the value of attention."""
    slope = kept_slope(METHODS[name] if name != "norms" else ft.Houlsby(m=1))
    if name == "norms":                                  # each of two adapters keeps its input, and brings 3 numbers
        assert slope == pytest.approx(4 * (floats + 2), rel=0.01)
    else:
        assert slope == pytest.approx(4 * floats, rel=0.001)


def kept_slope(method: Any) -> float:
    """Kept bytes of one more layer, for a number of the residual stream."""
    kept = []
    for layers in (2, 3):
        config = ft.GPTConfig(vocab=8, positions=256, width=256, heads=1, layers=layers)
        kept.append(ft.memory(config, method, batch=4, length=256).kept)
    rows = 4 * 256
    small = 4 * rows * 3 + 4 * 256 + 4 * 64 * 64
    return (kept[1] - kept[0] - small) / (rows * 256)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_no_more_than_full_fine_tuning_and_its_own_arrays(name):
    kept = ft.memory(GPT, METHODS[name], batch=8, length=100).kept
    full = ft.memory(GPT, batch=8, length=100).kept
    own = {"houlsby": 1.2, "prefix": 1.2, "prompt": 1.1}.get(name, 1.0)
    assert kept <= own * full


def test_freezing_more_blocks_never_keeps_more():
    kept = [ft.memory(GPT, ft.Partial(k=k), batch=4, length=64).kept for k in (1, 2)]
    kept.append(ft.memory(GPT, batch=4, length=64).kept)
    assert kept == sorted(kept) and len(set(kept)) == 3


def test_activations_are_linear_in_the_batch_and_quadratic_in_the_length_where_scores_are_stored():
    config = ft.GPTConfig(vocab=50, positions=512, width=32, layers=2, heads=4)
    with kernels.definitions():                          # the definitions store all scores
        by_batch = [ft.memory(config, batch=B, length=32).kept for B in (1, 2, 3)]
        by_length = [ft.memory(config, batch=2, length=T).kept for T in (100, 200, 300, 400)]
    one_sequence = by_batch[1] - by_batch[0]
    assert by_batch[2] - by_batch[1] == one_sequence
    second = np.diff(by_length, 2)
    assert second[0] == second[1] > 0
    scores = config.layers * config.heads * 2 * 100**2 * 4
    assert second[0] >= 2 * scores, "P, at least"


# ── parameters, gradients, optimiser states ──────────────────────────────────────────────────────────────────────────
# Bytes of a parameter: weights, gradients, moments with master weights.
REGIMES = {
    "float32, AdamW": (None, ft.AdamW(1e-3), 4, 4, 8),
    "float32, SGD with momentum": (None, ft.SGD(0.1, momentum=0.9), 4, 4, 4),
    "16 bits with float32 master weights, AdamW": ("bfloat16", ft.AdamW(1e-3), 2, 4, 12),
}


def check_fixed(account: Any) -> None:
    """The bytes of a parameter in each regime; real optimisers hold as much."""
    for weights, optimizer, per_weight, per_gradient, per_state in REGIMES.values():
        report = account(GPT, weights=weights, optimizer=optimizer)
        N = sum(p.size for p in made(GPT).parameters())
        assert report.parameters == report.trained == N
        assert report.weights == per_weight * N
        assert report.all_gradients == per_gradient * N
        assert report.optimizer == per_state * N


def test_the_bytes_of_a_parameter_are_those_of_the_table():
    check_fixed(ft.memory)


def test_the_optimiser_of_a_real_model_holds_these_bytes():
    model = made(GPT)
    model.to(dtype="bfloat16")
    optimizer = ft.AdamW(1e-3).start(model.named_parameters())
    held = sum(a.nbytes for a in optimizer.state_dict().values()) - 8                        # without the step
    assert held == ft.memory(GPT, weights="bfloat16").optimizer


def test_a_tied_embedding_counts_once():
    assert ft.memory(GPT).weights == 4 * sum(p.size for p in made(GPT).parameters())
    untied = ft.LlamaConfig(vocab=100, width=16, layers=1, heads=2)
    tied = ft.LlamaConfig(vocab=100, width=16, layers=1, heads=2, tied=True)
    assert ft.memory(untied).weights - ft.memory(tied).weights == 4 * 100 * 16


def test_attach_keeps_a_copy_of_the_base_tensors_that_train():
    assert ft.memory(GPT, ft.Full()).copies == ft.memory(GPT).weights
    assert ft.memory(GPT).copies == ft.memory(GPT, ft.LoRA()).copies == 0


@pytest.mark.parametrize("name, bits", [("nf4", 4.5), ("nf4-double", 4.127), ("q4_0", 4.5), ("q4_1", 5), ("q8_0", 8.5)])
def test_packed_bases_have_their_bits(name, bits):
    dense = ft.memory(GPT, ft.LoRA()).weights
    packed = ft.memory(GPT, ft.LoRA(), weights=name).weights
    maps = 12 * GPT.width**2 * GPT.layers
    assert packed == pytest.approx(dense - maps * (4 - bits / 8), rel=1e-3)
    assert ft.memory(GPT, ft.LoRA(), weights=name).parameters == ft.memory(GPT, ft.LoRA()).parameters


def test_q4_1_is_the_size_of_real_blocks():
    weight = np.ones((160, 160), np.float32)
    assert Q4_1.quantize(weight).nbytes == training.PACKED_BITS["q4_1"] * weight.size / 8


# ── golden cases ─────────────────────────────────────────────────────────────────────────────────────────────────────
def bert_large() -> ft.Module:
    """BERT-large with its pooler and without a head, without numbers."""
    with training.without_numbers():
        return ft.BERT(CONFIGS["bert-large"], training._NoNumbers(np.random.PCG64(0)), head=None, pooler=True)


def test_bert_large_has_335_million_parameters():
    N = sum(p.size for p in bert_large().parameters())
    assert N == 335_141_888
    assert 16 * N / 1e9 == pytest.approx(5.36, abs=0.005)
    assert 4 * 340e6 / 1e9 == pytest.approx(1.36) and 4 * 340e6 / 2**30 == pytest.approx(1.27, abs=0.005)


@pytest.mark.parametrize("length, per_sample, total", [(128, 0.264, 13.8), (512, 1.736, 60.9)])
def test_bert_large_by_the_formula(length, per_sample, total):
    """GB for a sequence, and for a batch of 32 with weights, gradients and moments."""
    one = korthikanti_bytes(length, 1, 1024, 16, 24, 4)
    assert one / 1e9 == pytest.approx(per_sample, abs=5e-4)
    assert (16 * 335_141_888 + 32 * one) / 1e9 == pytest.approx(total, abs=0.05)


def test_the_formula_of_document_002_meets_the_right_one_at_435_tokens_only():
    """3.9 + 1.3 B GB has no length: it is 5 times too much at 128 tokens."""
    claimed = 4 * 340e6
    assert claimed / korthikanti_bytes(128, 1, 1024, 16, 24, 4) == pytest.approx(5.1, abs=0.1)
    assert claimed < korthikanti_bytes(512, 1, 1024, 16, 24, 4)
    lengths = [s for s in range(1, 513) if korthikanti_bytes(s, 1, 1024, 16, 24, 4) <= claimed]
    assert 430 <= max(lengths) <= 440


@given(st.integers(1, 99), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_korthikanti_in_16_bits_is_the_formula_of_the_paper(s, B, a, L):
    h = 8 * a
    assert korthikanti_bytes(s, B, h, a, L, 2) == L * (34 * s * B * h + 5 * a * s * s * B)
    assert korthikanti_bytes(s, B, h, a, L, 4) == L * (66 * s * B * h + 9 * a * s * s * B)
    flash = korthikanti_bytes(s, B, h, a, L, 4, dropout=False, stored_scores=False)
    assert flash == L * (64 * s * B * h + 4 * a * s * B)


def test_gpt3_with_lora_of_rank_4():
    """18.9 million parameters, 38 MB in 16 bits; the base is 9,250 times as large, and training needs an eighth."""
    report = ft.memory(CONFIGS["gpt3"], ft.LoRA(r=4), weights="bfloat16", length=8)
    full = ft.memory(CONFIGS["gpt3"], weights="bfloat16", length=8)
    assert report.trained == 96 * 2 * 4 * (12288 + 12288) == 18_874_368
    assert full.parameters == pytest.approx(174.6e9, rel=1e-3)
    base = 2 * full.parameters
    assert base / (2 * report.trained) == pytest.approx(9251, rel=1e-3)
    fixed = report.weights + report.optimizer + report.all_gradients
    all_fixed = full.weights + full.optimizer + full.all_gradients
    assert all_fixed == 18 * full.parameters
    assert all_fixed / fixed == pytest.approx(9.0, abs=0.05)


def test_the_largest_batch_fits_and_the_next_does_not(monkeypatch):
    options = {"length": 64}
    small = ft.GPTConfig(vocab=200, positions=64, width=64, layers=1, heads=2)
    for budget in (1e6, 5e6):
        n = ft.largest_batch(small, budget, ft.LoRA(), **options)
        assert n >= 1
        assert ft.memory(small, ft.LoRA(), batch=n, **options).peak <= budget
        assert ft.memory(small, ft.LoRA(), batch=n + 1, **options).peak > budget
    assert ft.largest_batch(small, 1e5, ft.LoRA(), **options) == 0
    monkeypatch.setattr(training, "MOST_TOKENS", 64 * 3)
    assert ft.largest_batch(small, 1e12, **options) == 3
    with pytest.raises(TypeError, match="without batch="):
        ft.largest_batch(GPT, 1e8, batch=3)


# ── operations ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def counted_products(monkeypatch):
    """{phase: operations} of every product that the strict backend computes; strict arrays run the definitions."""
    array.use("strict")
    kind = type(array.asarray(np.ones(1, np.float32)))
    counts = {"forward": 0, "backward": 0, "phase": "forward"}
    original = kind.__matmul__

    def counting(a: Any, b: Any) -> Any:
        y = original(a, b)
        counts[counts["phase"]] += 2 * int(np.prod(y.shape)) * a.shape[-1]
        return y
    monkeypatch.setattr(kind, "__matmul__", counting)
    yield counts
    array.use("numpy")


@pytest.mark.parametrize("config, name", [(GPT, "full"), (GPT, "lora"), (GPT, "houlsby"), (GPT, "partial"),
                                          (BERT, "full"), (BERT, "bitfit"), (LLAMA, "full"), (LLAMA, "lora"),
                                          (SEQ2SEQ, "full"), (T5, "lora"), (NOTHING_DROPPED, "full")],
                         ids=lambda value: str(value)[:10])
def test_the_operations_are_the_products_that_run(config, name, counted_products):
    model = made(config, METHODS[name])
    _, loss = compute_loss(model, read_batch(real_batch(config, 2, 20)))
    counted_products["phase"] = "backward"
    loss.backward()
    array.use("numpy")
    with kernels.definitions():
        report = ft.memory(config, METHODS[name], batch=2, length=20)
    assert report.flops == {"forward": counted_products["forward"], "backward": counted_products["backward"]}


def test_accumulation_needs_the_memory_of_two_batches_and_the_operations_of_all():
    two = ft.memory(GPT, length=32, accumulate=2)
    five = ft.memory(GPT, length=32, accumulate=5)
    assert five.peak == two.peak
    assert five.flops == {name: n * 5 // 2 for name, n in two.flops.items()}


def test_training_takes_three_forward_passes_and_the_formula_of_the_weights():
    """2 N a token forward for the N weights in products, and 4 s d a layer; backward twice that."""
    with kernels.definitions():
        flops = ft.memory(GPT, batch=3, length=50).flops
    N = 12 * GPT.layers * GPT.width**2 + GPT.vocab * GPT.width
    forward = 150 * 2 * N + 3 * GPT.layers * attention_products(50, 50, GPT.heads, GPT.width // GPT.heads)
    assert flops == {"forward": forward, "backward": 2 * forward}


def test_gpt2_takes_247_million_operations_a_token():
    assert inference(CONFIGS["gpt2"], length=1).flops_per_token == 247_064_064 + 4 * 12 * 768
    with_context = inference(CONFIGS["gpt2"], length=1024).flops_per_token - 247_064_064
    assert with_context == pytest.approx(37.7e6, rel=2e-3)


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=lambda config: type(config).__name__)
def test_a_token_of_generation_costs_what_inference_says(config):
    """A real cache has the bytes, and the products of one more token are the operations."""
    report = inference(config, batch=2, length=30)
    with training.without_numbers() as ledger, kernels.definitions(), ft.no_grad():
        model = training.build(config)
        cache = Cache()
        model(np.zeros((2, 29), np.int64), cache=cache)
        with ledger.during("token"):
            model(np.zeros((2, 1), np.int64), cache=cache)
        held = sum(a.nbytes for a in cached_arrays(cache))
    assert ledger.flops["token"] == 2 * report.flops_per_token
    assert held == report.cache
    c = config
    kv = getattr(c, "key_value_heads", None) or c.heads
    assert report.cache == 2 * c.layers * 2 * 30 * kv * (c.width // c.heads) * 4


def cached_arrays(cache: Cache) -> list[Any]:
    """All arrays of a cache."""
    found = []
    stack = list(vars(cache).values())
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            found.append(value.data)
        elif isinstance(value, (list, tuple)):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
    return found


def test_lora_adds_two_thin_products_to_a_token():
    model = made(GPT)
    before = inference(model).flops_per_token
    ft.attach(model, ft.LoRA(r=8, targets="attn.[qv]"))
    edits = sum(2 * 8 * (160 + 160) for _ in range(2 * GPT.layers))
    with training.without_numbers() as ledger, kernels.definitions(), ft.no_grad():
        sized = training.build(model)
        with ledger.during("token"):
            sized(np.zeros((1, 1), np.int64))
    assert ledger.flops["token"] == inference(model, length=1).flops_per_token
    assert inference(model).flops_per_token == before + edits
    ft.merge(model)
    assert inference(model).flops_per_token == before


def test_a_token_reads_the_expert_that_it_visits():
    """A token costs what it costs in one MLP, and the router; more rows of a batch visit more experts."""
    dense = inference(GPT, length=9)
    expert = 4 * (2 * GPT.width * 4 * GPT.width + 5 * GPT.width)
    for batch, experts in ((1, 1), (3, 3), (9, 4)):
        report = inference(SWITCH, batch=batch, length=9)
        assert report.flops_per_token == dense.flops_per_token + 2 * 4 * GPT.width
        assert report.weights == dense.weights + 3 * expert + 4 * 4 * GPT.width
        router_and_cache = 4 * 4 * GPT.width + (batch - 1) * dense.cache
        assert report.bytes_per_step == dense.bytes_per_step + (experts - 1) * expert + router_and_cache


GENERATIONS = [
    *[(config, B, T, S) for config in (SEQ2SEQ, T5) for B, T, S in ((6, 60, 100), (40, 10, 120), (6, 100, 5))],
    (SEQ2SEQ, 1, 1, 60), (dataclasses.replace(SEQ2SEQ, switch=EXPERTS), 6, 60, 100), (GPT, 6, 100, None),
]


def check_generation(account: Any, config: Any, B: int, T: int, S: int | None) -> None:
    """The peak of a real greedy generation within 4 %, by the allocator: weights and everything that it allocates."""
    model = MODELS[type(config)](config, 0)
    facts = {} if S is None else {"source_ids": np.zeros((B, S), np.int64)}
    start = np.zeros((B, 1), np.int64) if S is None else None
    ft.generate(model, start, 1, **facts)                # the first pass of a process builds caches
    gc.collect()
    with ft.peak_memory() as memory:
        ft.generate(model, start, T, **facts)
    held = sum(p.data.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.named_buffers().values())
    predicted = account(config, batch=B, length=T, source_length=S).peak
    assert predicted == pytest.approx(held + memory["bytes"], rel=0.04)


@pytest.mark.parametrize("config, B, T, S", GENERATIONS, ids=lambda value: str(value)[:24])
def test_the_peak_of_generation_is_that_of_the_allocator(config, B, T, S, _warm):
    check_generation(inference, config, B, T, S)


def weights_and_cache(config: Any, **options: Any) -> Any:
    report = inference(config, **options)
    return dataclasses.replace(report, peak=report.weights + report.cache)


def short_source(config: Any, *, source_length: int, **options: Any) -> Any:
    return inference(config, source_length=1, **options)


def without_the_encoder(config: Any, **options: Any) -> Any:
    """The peak of the decoder's steps alone."""
    with pytest.MonkeyPatch.context() as patch:
        right = ft.Seq2Seq.encode

        def encode(self: Any, ids: Any, *rest: Any) -> Any:
            found = right(self, ids, *rest)
            sizes.current_ledger().restart_peak()
            return found
        patch.setattr(ft.Seq2Seq, "encode", encode)
        return inference(config, **options)


def in_one_pass(config: Any, **options: Any) -> Any:
    """The peak of a pass over the whole text."""
    report = inference(config, **options)
    text = np.zeros((options["batch"], options["length"]), np.int64)
    source = np.zeros((options["batch"], options["source_length"]), np.int64)
    with training.without_numbers() as ledger, ft.no_grad():
        training.build(config)(text, source_ids=source, cache=Cache())
    return dataclasses.replace(report, peak=ledger.peak)


@pytest.mark.parametrize("account, T, S", [
    (weights_and_cache, 10, 120), (short_source, 20, 100), (without_the_encoder, 10, 120), (in_one_pass, 40, 5),
])
def test_a_wrong_peak_of_generation_is_rejected(account, T, S, _warm):
    with pytest.raises(AssertionError):
        check_generation(account, SEQ2SEQ, 40, T, S)


def check_step(report: Any, config: Any, B: int, T: int, S: int) -> None:
    """A step of an encoder-decoder by hand: the operations of a token, the cache, and the bytes that are read."""
    h = config.width
    attention = 4 * h * h
    assert report.cache == 2 * config.layers * B * (T + S) * h * 4
    decoder = config.layers * (attention + 2 * h * h + 2 * h * 4 * h) + config.vocab * h     # of cross-attention q, o
    assert report.flops_per_token == 2 * decoder + config.layers * attention_products(1, T + S, config.heads,
                                                                                     h // config.heads)
    read = 0
    for name, p in MODELS[type(config)](config, 0).named_parameters().items():
        if not name.startswith(("encoder.", "encoder_norm.")) and ".cross_attn.k." not in name \
                and ".cross_attn.v." not in name:
            read += p.data.nbytes
    assert report.bytes_per_step == read + report.cache


@pytest.mark.parametrize("config", [SEQ2SEQ, T5], ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("B, T, S", [(2, 30, 7), (1, 1, 20)])
def test_a_token_of_a_target_costs_what_inference_says(config, B, T, S):
    check_step(inference(config, batch=B, length=T, source_length=S), config, B, T, S)
    assert inference(config, length=9) == inference(config, length=9, source_length=9)


@pytest.mark.parametrize("wrong", ["_of_the_source", "_looked_up"])
def test_a_step_that_reads_the_encoder_or_all_sinusoids_is_rejected(wrong, monkeypatch):
    monkeypatch.setitem(inference.__globals__, wrong, lambda model: 0)
    with pytest.raises(AssertionError):
        check_step(inference(SEQ2SEQ, batch=2, length=30, source_length=7), SEQ2SEQ, 2, 30, 7)


def test_idle_experts_of_an_encoder_count_once():
    """More rows visit more experts of the decoder. Those of the encoder are not read in a step at all."""
    config = dataclasses.replace(SEQ2SEQ, switch=EXPERTS)
    one, all_four = (inference(config, batch=B, length=9) for B in (1, 4))
    expert = 4 * (2 * config.width * 4 * config.width + 5 * config.width)
    assert all_four.bytes_per_step - all_four.cache - (one.bytes_per_step - one.cache) == 3 * expert


def test_the_source_of_a_generation_wants_an_encoder_decoder():
    with pytest.raises(TypeError, match="source_length is for an encoder-decoder, got a GPT"):
        inference(GPT, source_length=3)
    with pytest.raises(ValueError, match="inference: source_length wants a whole number >= 1, got 0"):
        inference(SEQ2SEQ, source_length=0)


def test_an_encoder_does_not_generate():
    with pytest.raises(ValueError, match="inference wants a model that generates, got a BERT"):
        inference(BERT)


# ── arrays without numbers ───────────────────────────────────────────────────────────────────────────────────────────
VIEWS = {
    "reshape": lambda a: a.reshape(2, 12, 5),
    "reshape of swapped axes": lambda a: a.swapaxes(0, 1).reshape(-1),
    "heads joined": lambda a: a.reshape(4, 3, 2, 5).swapaxes(1, 2).swapaxes(1, 2).reshape(4, 30),
    "transpose": lambda a: a.transpose(2, 0, 1),
    "slice": lambda a: a[1:3, ..., ::2],
    "integer": lambda a: a[0, 1],
    "one entry": lambda a: a[0, 1, 2],
    "new axis": lambda a: a[:, None],
    "rows": lambda a: a[[0, 2, 2]],
    "rows and a slice": lambda a: a[[0, 1], :, 1:3],
    "copy": lambda a: a.copy(),
    "astype": lambda a: a.astype(np.float64),
    "same dtype": lambda a: a.astype(np.float32, copy=False),
    "ravel": lambda a: a.ravel(),
    "add": lambda a: a + a[0],
    "scaled": lambda a: np.float32(2) * a,
    "compare": lambda a: a > 0,
    "sum": lambda a: a.sum(axis=(0, 2), keepdims=True),
    "sum of all": lambda a: a.sum(),
    "mean": lambda a: a.mean(axis=-1),
    "argmax": lambda a: a.argmax(axis=1),
    "product": lambda a: a @ a.swapaxes(-1, -2),
    "product with a vector": lambda a: a @ a[0, 0],
    "negative": lambda a: -abs(a),
}


@pytest.mark.parametrize("name", VIEWS)
def test_an_array_without_numbers_has_numpys_shape_dtype_and_memory(name):
    real = np.ones((4, 6, 5), np.float32)
    with training.without_numbers() as ledger:
        sized = array.asarray(real)
        before = ledger.total
        expected = VIEWS[name](real)
        got = VIEWS[name](sized)
        is_view = name == "one entry" or np.shares_memory(expected, real)       # NumPy gives a number
        assert tuple(got.shape) == np.shape(expected) and got.dtype == expected.dtype
        assert (got.memory is sized.memory) == is_view
        assert got.flags.c_contiguous == np.asarray(expected).flags.c_contiguous
        assert ledger.total - before == (0 if is_view else got.size * got.itemsize)
        del got
        assert ledger.total == before, "freed with the last reference"


def test_no_decision_depends_on_numbers_that_are_not_there():
    with training.without_numbers():
        a = array.asarray(np.ones(3, np.float32))
        with pytest.raises(TypeError, match="holds no numbers"):
            bool(a.sum() > 1)
        with pytest.raises(TypeError, match="an index of booleans"):
            a[a > 0]
        with pytest.raises(AttributeError, match="the backend 'sizes' has no fft"):
            sizes.xp.fft  # noqa: B018
        with pytest.raises(ValueError, match="reshape"):
            a.reshape(2, 2)


# ── the public face ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_model_stays_as_it_is_and_its_copy_takes_no_memory():
    model = made(ft.GPTConfig(vocab=2048, positions=64, width=512, layers=4, heads=8), ft.LoRA())
    before = {name: (id(p.data), p.data.copy()) for name, p in model.named_parameters().items()}
    with ft.peak_memory() as memory:
        report = ft.memory(model, batch=2, length=32)
    assert memory["bytes"] < 0.2 * report.weights
    for name, p in model.named_parameters().items():
        assert id(p.data) == before[name][0] and (p.data == before[name][1]).all()
    assert array.backend() == "numpy" and len(model._attached) == 1
    assert not model.training


@pytest.mark.parametrize("name, parameters", [("t5-small", 60_506_624), ("t5-base", 222_903_552)])
def test_t5_has_as_many_parameters_as_its_checkpoints(name, parameters):
    report = ft.memory(CONFIGS[name], length=8, source_length=20)
    assert report.parameters == parameters and report.tokens == 28
    assert str(report).startswith("T5, everything trains; 1 × (20 + 8) tokens")


def test_the_length_of_a_source_wants_an_encoder_decoder():
    with pytest.raises(TypeError, match="source_length is for an encoder-decoder, got a GPT"):
        ft.memory(GPT, source_length=8)
    with pytest.raises(ValueError, match="memory: source_length wants a whole number >= 1, got 0"):
        ft.memory(SEQ2SEQ, source_length=0)


def test_a_classifier_is_counted_with_its_labels():
    model = ft.classifier(made(BERT), 3)
    report = ft.memory(model, ft.LoRA(), batch=4, length=32)
    assert report.trained == ft.memory(BERT, ft.LoRA()).trained + sum(
        p.size for name, p in model.named_parameters().items() if name.startswith(("head", "pooler")))


def test_the_backend_is_restored_after_an_error():
    with pytest.raises(ValueError, match="longer than the model's 128 positions"):
        ft.memory(GPT, length=129)
    with pytest.raises(LookupError):
        ft.memory(GPT, ft.LoRA(targets="nothing"))
    assert array.backend() == "numpy"


def test_fewer_labels_need_fewer_logits():
    half = ft.memory(BERT, batch=8, length=64, labelled=0.5)
    assert half.kept < ft.memory(BERT, batch=8, length=64).kept
    assert half.flops["forward"] < ft.memory(BERT, batch=8, length=64).flops["forward"]


def test_the_report_is_a_table_whose_parts_add_up():
    report = ft.memory(GPT, ft.LoRA(), batch=4, length=64)
    parts = [getattr(report, name) for name in report.PARTS]
    assert sum(parts) == report.peak
    text = str(report)
    assert text.startswith("GPT, LoRA; 4 × 64 tokens, float32 weights, AdamW")
    for title in ("weights", "optimiser states", "activations, at the peak", "peak", "GiB", "products of a step"):
        assert title in text


@pytest.mark.parametrize("n, text", [
    (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (-1000, "-1 kB"), (1234, "1.23 kB"), (999_499, "999 kB"),
    (999_600, "1000 kB"), (1e6, "1 MB"), (1e9, "1 GB"), (2**30, "1.07 GB"), (5e12, "5 TB"), (4e15, "4000 TB"),
])
def test_bytes_are_written_in_the_largest_unit_that_fits(n, text):
    assert training.in_bytes(n) == text


@pytest.mark.parametrize("n, text", [
    (0, "0 FLOP"), (999_999, "999999 FLOP"), (1e6, "1 MFLOP"), (1.5e6, "1.5 MFLOP"), (1e9, "1 GFLOP"),
    (2.25e9, "2.25 GFLOP"), (1e12, "1 TFLOP"), (1e15, "1 PFLOP"), (3e18, "3e+03 PFLOP"),
])
def test_operations_are_written_in_the_largest_unit_that_fits(n, text):
    assert training.in_flops(n) == text


# ── wrong accounts ───────────────────────────────────────────────────────────────────────────────────────────────────
def with_fields(**wrong: Any) -> Any:
    """The account with fields that are computed wrongly, each from the right report."""
    def account(*args: Any, **options: Any) -> Any:
        report = ft.memory(*args, **options)
        values = {name: f(report) for name, f in wrong.items()}
        return types.SimpleNamespace(**{**vars(report), **values})
    return account


WRONG_FIXED = {
    "Adam keeps one moment": with_fields(optimizer=lambda r: r.optimizer - 4 * r.trained),
    "a tied embedding is two weights": with_fields(parameters=lambda r: r.parameters + GPT.vocab * GPT.width),
    "gradients have the dtype of the weights": with_fields(
        all_gradients=lambda r: r.all_gradients * r.weights // (4 * r.parameters)),
    "16-bit weights need no master weights": with_fields(
        optimizer=lambda r: min(r.optimizer, 8 * r.trained)),
    "a GB is a GiB": with_fields(weights=lambda r: round(r.weights * 1e9 / 2**30)),
}


@pytest.mark.parametrize("belief", WRONG_FIXED)
def test_a_wrong_account_of_the_fixed_part_is_rejected(belief):
    with pytest.raises(AssertionError):
        check_fixed(WRONG_FIXED[belief])


WRONG_KEPT = {
    "activations are the weights times the batch": lambda c, B, s: 4 * B * sum(p.size for p in made(c).parameters()),
    "the length does not matter": lambda c, B, s: gpt_activation_bytes(c, B, 64),
    "the batch does not matter": lambda c, B, s: gpt_activation_bytes(c, 1, s),
    "scores are stored": lambda c, B, s: gpt_activation_bytes(c, B, s) + 4 * c.layers * c.heads * B * s * s,
    "logits are free": lambda c, B, s: gpt_activation_bytes(c, B, s) - 4 * B * s * c.vocab,
    "norms keep their input as well": lambda c, B, s: gpt_activation_bytes(c, B, s) + 8 * c.layers * B * s * c.width,
    "the feed-forward is as wide as the model": lambda c, B, s: gpt_activation_bytes(
        ft.GPTConfig(vocab=c.vocab, positions=c.positions, width=c.width, layers=c.layers, heads=c.heads,
                     hidden=c.width), B, s),
}


@pytest.mark.parametrize("belief", WRONG_KEPT)
def test_a_wrong_closed_form_is_rejected(belief):
    config = ft.GPTConfig(vocab=50, positions=200, width=24, layers=2, heads=2)
    with pytest.raises(AssertionError):
        check_kept(config, 3, 90, WRONG_KEPT[belief](config, 3, 90))


def linear_that_keeps_its_input(x, W, b=None):
    """A frozen linear map would keep x: its gradient for x holds it."""
    y, (dx, dW, db) = kernels.sizes.linear(x, W, b)
    return y, (lambda g, x=x: dx(g), dW, db)


def norm_that_keeps_its_input(x, w, b, eps=1e-5):
    """The kernel kept x beside x̂ until this test."""
    y, (dx, dw, db) = kernels.sizes.layer_norm(x, w, b, eps)
    return y, (lambda g, x=x: dx(g), dw, db)


def attention_that_stores_scores(q, k, v, **options):
    """Scores are stored."""
    y, back = kernels.sizes.attention(q, k, v, **options)
    scores = sizes.new((*q.shape[:-1], k.shape[-2]), np.float32)
    return y, lambda g, needed, scores=scores: back(g, needed)


@pytest.mark.parametrize("name, wrong", [("linear", linear_that_keeps_its_input),
                                         ("layer_norm", norm_that_keeps_its_input),
                                         ("attention", attention_that_stores_scores)])
def test_a_counterpart_that_keeps_more_is_rejected(name, wrong):
    from tinyft import dispatch
    with training.without_numbers():
        registered = list(dispatch.find(getattr(ops, name), sizes.Sizes))
        dispatch.register(getattr(ops, name), sizes.Sizes, wrong)
    try:
        with pytest.raises(AssertionError):
            test_a_counterpart_keeps_what_its_kernel_keeps(name, 4000)
        with pytest.raises(AssertionError):
            for method in ("full", "bitfit"):
                test_frozen_linear_maps_keep_no_input(method, {"full": 16, "bitfit": 10}[method])
    finally:
        array.use("numpy")
        dispatch.KERNELS[(getattr(ops, name), sizes.Sizes)] = registered


def test_the_update_is_registered_for_arrays_without_numbers():
    from tinyft import dispatch
    with training.without_numbers():
        assert dispatch.find(Optimizer.update_pieces, sizes.Sizes)
