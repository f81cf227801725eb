"""A table of wrong arguments: every public function, each of its parameters, with values that make no sense there.

A call gives a result, or raises one sentence of ours ("X wants ..., got ...") as a TypeError, ValueError, LookupError,
RuntimeError or OSError, or NumPy's MemoryError. It does so within seconds, and leaves the model as it was.
A sentence of Python's or of NumPy's, such as "'NoneType' object has no attribute 'shape'", names no remedy.

ROWS holds a call that works for each function. A new public name without a row fails test_the_table_is_complete.
"""
from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from helpers import TooSlow, time_limit

import tinyft as ft
from tinyft import adapters, array, data, functional, kernels, nn, optim, train
from tinyft.tensor import OPS, Tensor

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="errors of arguments are raised on the host")
FAMILIES = (TypeError, ValueError, LookupError, RuntimeError, OSError, FloatingPointError, AttributeError)
SECONDS = 20                                             # of processor time; a call that takes longer hangs

WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "a string": "no such thing",
    "an object": object(),
    "-1": -1,
    "0": 0,
    "2.5": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "10**12": 10**12,
    "an empty list": [],
    "an empty dict": {},
    "a ragged list": [[1, 2], [3]],
    "a function": len,
    "a class": dict,
    "an empty array": np.zeros(0, np.float32),
    "an array of NaN": np.full((2, 3), np.nan, np.float32),
    "bytes": b"bytes",
}

# Sentences of Python's and of NumPy's. One of them in a message is a message of theirs.
FOREIGN = re.compile("|".join([
    r"object has no attribute", r"object is not (callable|iterable|subscriptable|a mapping|reversible)",
    r"object cannot be interpreted", r"object of type", r"unsupported operand", r"not supported between",
    r"takes \d+ positional", r"takes from", r"missing \d+ required", r"unexpected keyword", r"must be (str|real|a )",
    r"could not be broadcast", r"inhomogeneous", r"could not convert", r"invalid literal", r"not enough values",
    r"too many values", r"cannot convert", r"out of bounds for axis", r"only integer", r"only length-1",
    r"argument should be", r"expected (str|bytes|an|a) ", r"Cannot interpret", r"ufunc '", r"truth value of",
    r"cannot unpack", r"has no len", r"indices must be", r"bad operand", r"Unable to allocate", r"loop of ufunc",
    r"must be real number", r"not iterable", r"Python integer", r"data type .* not understood", r"too large to convert",
    r"descriptor '", r"can't multiply", r"maximum recursion", r"unhashable", r"array is too big",
    r"Maximum allowed", r"zero-size array", r"negative dimensions", r"list index out of range",
    r"string indices", r"doesn't match any", r"expected string", r"argument 'encode'", r"argument 'ids'",
]))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def gpt() -> ft.GPT:
    return ft.GPT(ft.GPTConfig(vocab=20, positions=12, width=8, layers=1, heads=2), seed=0)


def seq2seq() -> ft.Seq2Seq:
    return ft.Seq2Seq(ft.Seq2SeqConfig(vocab=20, positions=12, width=8, layers=1, heads=2), seed=0)


def bert() -> ft.BERT:
    return ft.BERT(ft.BERTConfig(vocab=20, positions=12, width=8, layers=1, heads=2), seed=0)


def text_classifier() -> ft.BERT:
    vocab = data.shipped_tokenizer().get_vocab_size()
    model = ft.BERT(ft.BERTConfig(vocab=vocab, positions=12, width=8, layers=1, heads=2), seed=0)
    return ft.classifier(model, 2)


def switched() -> ft.GPT:
    experts = ft.SwitchConfig(experts=2, every=1)
    return ft.GPT(ft.GPTConfig(vocab=20, positions=12, width=8, layers=1, heads=2, switch=experts), seed=0)


def rounded() -> ft.GPT:
    model = gpt()
    ft.attach(model, ft.QAT(group=4))
    return model


def adapted(method: Any = ft.LoRA(r=2)) -> ft.GPT:
    model = gpt()
    ft.attach(model, method)
    return model


def a_handle(name: str = "lora") -> ft.Attached:
    model = gpt()
    ft.attach(model, ft.LoRA(r=2), name=name)
    return ft.detach(model)


def batches() -> list:
    return [{"ids": np.arange(12).reshape(2, 6) % 20}]


def ids() -> np.ndarray:
    return np.arange(6).reshape(2, 3)


def tensor(*shape: int) -> Tensor:
    return Tensor(np.full(shape, 0.5, np.float32), requires_grad=True)


class Dense(nn.Packed):
    """A packed weight that stores its values unchanged."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.shape = values.shape

    def dequantize(self) -> Any:
        return self.values


def entered(manager: Callable) -> Callable:
    """The call of a context manager, together with its `with`."""
    def call(*args: Any, **kwargs: Any) -> None:
        context = manager(*args, **kwargs)
        if isinstance(context, AbstractContextManager):
            with context:
                pass
    return call


def restoring_threads(n: Any) -> None:
    """set_num_threads, and the number of threads as it was."""
    before = kernels.get_num_threads()
    try:
        kernels.set_num_threads(n)
    finally:
        kernels.set_num_threads(before)


# ── a call that works, for each function ─────────────────────────────────────────────────────────────────────────────
# name -> arguments(path), made anew for each call; `path` is an empty folder. Without an entry the function is called
# without arguments.
def saved_adapter(path: Any) -> dict:
    ft.save_adapter(adapted(), path / "saved")
    return {"model": gpt(), "path": path / "saved"}


def saved_by_peft(path: Any) -> dict:
    ft.save_peft(adapted(), path / "saved")
    return {"model": gpt(), "path": path / "saved", "name": "a"}


def saved_by_adapterhub(path: Any) -> dict:
    ft.save_adapterhub(adapted(ft.Houlsby(m=2, norms=False)), path / "saved")
    return {"model": gpt(), "path": path / "saved", "name": "a"}


def saved_model(path: Any) -> dict:
    ft.save(gpt(), path / "model")
    return {"path": path / "model"}


OPTIMIZER = {"lr": 0.1, "weight_decay": 0.1, "groups": {"*": {"lr": 0.2}}}
SWITCH = {"experts": 2, "every": 1, "capacity": 1.5, "eval_capacity": 2.0, "min_capacity": 1, "jitter": 0.1,
          "balance": 0.1, "z_loss": 0.1, "dropout": 0.1}
GPT_SIZES = {"vocab": 20, "positions": 12, "width": 8, "layers": 1, "heads": 2, "hidden": 8, "dropout": 0.1,
             "eps": 1e-5, "std": 0.02}
SWITCHED = {**GPT_SIZES, "switch": ft.SwitchConfig(**SWITCH)}
BERT_SIZES = {**SWITCHED, "token_types": 2, "first_position": 1, "pooler_activation": "relu", "keep_pooler": False}
LLAMA_SIZES = {**GPT_SIZES, "key_value_heads": 1, "head_width": 4, "rope_base": 100.0,
               "rope_scaling": ft.RotaryScaling("linear", 2.0), "tied": True, "qkv_bias": True, "out_bias": True,
               "mlp_bias": True}
SEQ2SEQ_SIZES = {**SWITCHED, "decoder_layers": 2, "decoder_heads": 1, "decoder_hidden": 6, "activation": "silu",
                 "scaled": False, "start": 3}
T5_SIZES = {**GPT_SIZES, "head_width": 4, "decoder_layers": 2, "buckets": 8, "max_distance": 10,
            "feed_forward": "gated-gelu", "tied": False, "start": 3}
ROWS: dict[str, Callable[[Any], dict]] = {
    "Tensor": lambda path: {"data": [1.0], "requires_grad": True, "decay": True},
    "Parameter": lambda path: {"data": [1.0], "decay": True},
    "use": lambda path: {"name": "numpy"},
    "Context": lambda path: {"ids": ids(), "mask": ids() > 0},
    "unpack": lambda path: {"model": gpt()},
    "GPT": lambda path: {"config": ft.GPTConfig(vocab=20, positions=12, width=8, layers=1, heads=2), "seed": 1},
    "GPTConfig": lambda path: SWITCHED,
    "BERT": lambda path: {"config": ft.BERTConfig(vocab=20, positions=12, width=8, layers=1, heads=2), "seed": 1,
                          "head": "mlm", "pooler": True},
    "BERTConfig": lambda path: BERT_SIZES,
    "Llama": lambda path: {"config": ft.LlamaConfig(vocab=20, positions=12, width=8, layers=1, heads=2), "seed": 1},
    "LlamaConfig": lambda path: LLAMA_SIZES,
    "Seq2Seq": lambda path: {"config": ft.Seq2SeqConfig(vocab=20, positions=12, width=8, layers=1, heads=2), "seed": 1},
    "Seq2SeqConfig": lambda path: SEQ2SEQ_SIZES,
    "T5": lambda path: {"config": ft.T5Config(vocab=20, width=8, layers=1, heads=2, head_width=4), "seed": 1},
    "T5Config": lambda path: T5_SIZES,
    "beam_search": lambda path: {"model": gpt(), "ids": ids(), "max_new_tokens": 2, "beams": 2, "end": 3,
                                 "lp": ft.PowerPenalty(0.5), "n_best": 2, "mask": ids() >= 0, "cache": True,
                                 "coverage": 0.0},
    "GNMTPenalty": lambda path: {"alpha": 0.5},
    "PowerPenalty": lambda path: {"alpha": 0.5},
    "RotaryScaling": lambda path: {"kind": "llama3", "factor": 2.0, "low": 1.0, "high": 4.0, "original": 8},
    "SwitchConfig": lambda path: SWITCH,
    "load": saved_model,
    "save": lambda path: {"model": gpt(), "path": path / "m", "tokenizer": None, "dtype": "float32"},
    "classifier": lambda path: {"model": bert(), "classes": 2, "seed": 0},
    "generate": lambda path: {"model": gpt(), "ids": ids(), "max_new_tokens": 2, "mask": ids() >= 0,
                              "temperature": 0.5, "top_k": 3, "top_p": 0.9, "end": 3, "rng": rng(), "cache": True},
    "chat_prompt": lambda path: {"messages": [{"role": "user", "content": "Hello"}], "template": "chatml",
                                 "add_generation_prompt": True},
    "chat_end": lambda path: {"template": "chatml"},
    "predict": lambda path: {"model": text_classifier(), "tokenizer": data.shipped_tokenizer(), "texts": ["a", "b"],
                             "names": ["no", "yes"], "batch_size": 2, "max_len": 8, "max_new_tokens": 2},
    "embed": lambda path: {"model": text_classifier(), "tokenizer": data.shipped_tokenizer(), "texts": ["a", "b"],
                           "batch_size": 2, "pooling": "max", "normalize": True, "max_len": 8},
    "compress": lambda path: {"model": gpt(), "rule": ft.GPTQ(bits=4, group=4), "batches": [ids()],
                              "targets": "attn.q", "done": {}},
    "RTN": lambda path: {"bits": 4, "group": 8, "grid": "affine"},
    "OBQ": lambda path: {"bits": 4, "group": 8, "grid": "affine", "damp": 0.01},
    **dict.fromkeys(["NF4", "FP4", "E2M1", "Dynamic8"], lambda path: {"block": 8, "double": True}),
    "GPTQ": lambda path: {"bits": 4, "group": 8, "grid": "affine", "damp": 0.01, "block": 16, "act_order": True,
                          "static_groups": True},
    "smooth": lambda path: {"model": gpt(), "batches": [ids()], "alpha": 0.5},
    "QAT": lambda path: {"bits": 4, "group": 8, "grid": "affine", "targets": "attn.q"},
    "LSQ": lambda path: {"bits": 4, "group": 8, "targets": "attn.q"},
    "pack": lambda path: {"model": rounded(), "name": "qat"},
    "Int8": lambda path: {"activations": "affine"},
    "LLMInt8": lambda path: {"threshold": 5.0, "outlier_weights": "dense"},
    "AWQ": lambda path: {"bits": 4, "group": 8, "grid": "affine", "clip": True},
    "student": lambda path: {"teacher": bert(), "layers": 1, "kind": "spread", "token_types": False},
    "dense_student": lambda path: {"teacher": switched(), "start": "mean", "seed": 0},
    "Hinton": lambda path: {"teacher": gpt(), "temperature": 2.0, "soft": 0.5},
    "WordLevel": lambda path: {"teacher": gpt(), "alpha": 0.5},
    "DistilBERTLoss": lambda path: {"teacher": bert(), "temperature": 2.0, "soft": 5.0, "hard": 2.0, "cosine": 1.0},
    **dict.fromkeys(["SequenceLevel", "Interpolation"],
                    lambda path: {"beams": ft.TeacherBeams(None, seq2seq(), end=3, max_new_tokens=4)}),
    "TinyBERTLoss": lambda path: {"teacher": bert(), "width": 6, "layers": [0], "embeddings": 1.0, "hidden": 2.0,
                                  "attention": 0.5, "prediction": 0.0, "temperature": 2.0, "seed": 1},
    "TeacherBeams": lambda path: {"folder": path / "beams", "teacher": seq2seq(), "end": 3, "max_new_tokens": 4,
                                  "beams": 2, "n_best": 2, "lp": ft.PowerPenalty(0.5), "coverage": 0.5},
    "sentence_bleu": lambda path: {"hypothesis": [1, 2, 3], "reference": ["a", "b"]},
    "TeacherCache": lambda path: {"folder": path / "cache", "teacher": gpt(), "k": 4, "temperatures": (2.0,)},
    "attach": lambda path: {"model": gpt(), "method": ft.LoRA(r=2), "name": "a", "seed": 0, "train_head": True},
    "detach": lambda path: {"model": adapted(), "name": "lora"},
    "without": lambda path: {"model": adapted()},
    "merge": lambda path: {"model": adapted()},
    "eject": lambda path: {"model": adapted(), "name": "lora"},
    "combine": lambda path: {"adapters": [a_handle("a"), a_handle("b")], "weights": [0.5, 0.5], "name": "both"},
    "count": lambda path: {"model": gpt()},
    "trained": lambda path: {"model": gpt()},
    "save_adapter": lambda path: {"model": adapted(), "path": path / "a", "name": "lora"},
    "load_adapter": saved_adapter,
    "save_peft": lambda path: {"model": adapted(), "path": path / "a", "name": "lora"},
    "load_peft": saved_by_peft,
    "save_adapterhub": lambda path: {"model": adapted(ft.Houlsby(m=2, norms=False)), "path": path / "a",
                                     "name": "houlsby"},
    "load_adapterhub": saved_by_adapterhub,
    "Phase": lambda path: {"share": 1.0, "setup": None},
    "Partial": lambda path: {"k": 1},
    "Houlsby": lambda path: {"m": 2, "std": 0.1, "norms": True, "targets": ("attn", "mlp")},
    "PromptTuning": lambda path: {"p": 2, "init": "vocabulary"},
    "PrefixTuning": lambda path: {"p": 2, "mlp": 4, "std": 0.1, "shift": True, "targets": "kv"},
    "LoRA": lambda path: {"r": 2, "alpha": 1.0, "dropout": 0.1, "targets": "attn.[qv]"},
    "fit": lambda path: {"model": gpt(), "batches": batches(), "steps": 1, "optimizer": ft.AdamW(0.1),
                         "schedule": ft.constant_schedule(), "loss": None, "clip": 1.0, "accumulate": 1, "seed": 0,
                         "out": path / "run", "save_every": 1, "progress": False},
    "evaluate": lambda path: {"model": gpt(), "batches": batches(), "loss": None},
    "corpus_perplexity": lambda path: {"model": gpt(), "tokens": np.arange(20) % 7, "length": 6, "stride": 3,
                                       "batch_size": 2},
    "perplexity": lambda path: {"model": gpt(), "batches": batches()},
    "memory": lambda path: {"model": gpt(), "method": ft.LoRA(r=2), "batch": 1, "length": 4, "weights": "float16",
                            "optimizer": ft.AdamW(0.1), "accumulate": 1, "labelled": 0.5, "source_length": None},
    "largest_batch": lambda path: {"model": gpt(), "budget": 5e4, "method": None, "length": 4},
    "AdamW": lambda path: {**OPTIMIZER, "betas": (0.9, 0.9), "eps": 1e-8},
    "Adam": lambda path: {**OPTIMIZER, "betas": (0.9, 0.9), "eps": 1e-8},
    "SGD": lambda path: {**OPTIMIZER, "momentum": 0.9},
    "AdamW8bit": lambda path: {**OPTIMIZER, "betas": (0.9, 0.9), "eps": 1e-8, "block": 4},
    "Adam8bit": lambda path: {**OPTIMIZER, "betas": (0.9, 0.9), "eps": 1e-8, "block": 4},
    "Paged": lambda path: {"optimizer": ft.AdamW(0.1), "resident": 8, "pages": "disk", "folder": None},
    "constant_schedule": lambda path: {"warmup": 1},
    "linear_schedule": lambda path: {"warmup": 1},
    "cosine_schedule": lambda path: {"warmup": 1, "floor": 0.1},
    "autocast": lambda path: {"dtype": "bfloat16", "enabled": True},
    "recompute": lambda path: {"enabled": True},
    "GradScaler": lambda path: {"init_scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3,
                                "enabled": True},
    "set_float32_matmul_precision": lambda path: {"precision": "highest"},
    "capture": lambda path: {"step": len, "fallback": None},
    "set_num_threads": lambda path: {"n": kernels.get_num_threads()},
    # functional.py
    "functional.softmax_attention": lambda path: {"q": tensor(2, 3), "k": tensor(4, 3), "v": tensor(4, 3),
                                                  "key_mask": np.ones((2, 4), bool), "causal": True},
    "functional.mse_loss": lambda path: {"x": tensor(2, 3), "y": tensor(2, 3)},
    "functional.kl_divergence": lambda path: {"p_logits": tensor(2, 3), "q_logits": tensor(2, 3), "temperature": 2.0},
    "functional.soft_cross_entropy": lambda path: {"logits": tensor(2, 3), "target": tensor(2, 3)},
    "functional.normalize": lambda path: {"x": tensor(2, 3), "axis": 0, "eps": 1e-6},
    "functional.topk": lambda path: {"x": tensor(2, 3), "k": 2},
    "functional.stack": lambda path: {"xs": [tensor(2), tensor(2)], "axis": 0},
    # data
    "data.encode": lambda path: {"tokenizer": data.shipped_tokenizer(), "text": "a text", "max_len": 8, "form": "gpt"},
    "data.key": lambda path: {"text": "a text"},
    "data.Batches": lambda path: {"examples": [1, 2, 3], "batch_size": 2, "seed": 0, "shuffle": True,
                                  "drop_last": False},
    "data.lm_batches": lambda path: {"tokens": np.arange(20), "T": 4, "batch_size": 2, "seed": 0, "shuffle": True,
                                     "drop_last": False},
    "data.mask_names": lambda path: {"text": "a text"},
    "data.mlm": lambda path: {"ids": ids() + 6, "mask": ids() >= 0, "rng": rng(), "vocab": 20, "p": 0.5},
    "data.mlm_batches": lambda path: {"tokens": np.arange(20), "T": 4, "batch_size": 2, "vocab": 2048, "seed": 0,
                                      "shuffle": True, "p": 0.5, "drop_last": False, "tokenizer": None},
    "data.pad": lambda path: {"rows": [[1, 2], [3]], "max_len": 4, "multiple": 2, "pad_id": 0},
    "data.read_name": lambda path: {"answer": "get_lines"},
    "data.sentences": lambda path: {"text": "A text. Another."},
    "data.source_batches": lambda path: {"pairs": [("a", "b"), ("c", "d")], "tokenizer": data.shipped_tokenizer(),
                                         "batch_size": 2, "max_source": 8, "max_target": 8, "seed": 0, "start": 0,
                                         "end": None, "shuffle": True, "drop_last": False},
    "data.swap_two": lambda path: {"sentence": "one two three four", "rng": rng()},
    "data.text_batches": lambda path: {"examples": data.Examples(("a", "b"), np.array([0, 1])),
                                       "tokenizer": data.shipped_tokenizer(), "batch_size": 2, "max_len": 8, "seed": 0,
                                       "shuffle": True, "form": "bert", "drop_last": False, "group_by_length": False},
    "data.held_out_batches": lambda path: {"tokens": np.arange(20), "T": 4, "count": 3, "batch_size": 2},
    "data.stretch": lambda path: {"tokens": np.arange(20), "seed": 0, "size": 5},
    "data.windows": lambda path: {"tokens": np.arange(20), "T": 4},
    # train
    "train.compute_loss": lambda path: {"model": gpt(), "targets": train.read_batch(batches()[0]), "rng": rng()},
    "train.next_tokens": lambda path: {"ids": ids(), "mask": ids() >= 0},
    "train.read_batch": lambda path: {"batch": batches()[0]},
    # optim
    "CrossEntropy": lambda path: {"smoothing": 0.1},
    "optim.clip_norm": lambda path: {"gradients": [np.ones(3)], "limit": 1.0},
}

NO_ROW = {
    **dict.fromkeys(["Module", "Edit", "Method", "Packed", "Loss", "optim.Optimizer"], "a base class: subclassed"),
    **dict.fromkeys(["Cache", "Full", "BitFit", "no_grad", "detect_anomaly", "backend", "methods",
                     "peak_memory", "get_num_threads", "get_float32_matmul_precision", "data.shipped_tokenizer",
                     "data.snapshot", "data.name_pairs"], "takes no arguments"),
    **dict.fromkeys(["Attached", "Count", "CorpusPerplexity", "History", "Targets", "Predictions", "Hypothesis",
                     "data.Examples", "data.Record", "data.Task", "data.Pairs", "data.NamePair"],
                    "a record that functions of the library return"),
    **dict.fromkeys(["optim.adam_update", "optim.sgd_update"], "the equations on arrays, called by the optimisers"),
    **dict.fromkeys(["optim.Schedule"], "a type"),
    **dict.fromkeys(["data.task", "data.pretraining"], "reads the whole snapshot at each call; test_data.py has them"),
    **dict.fromkeys(["check"], "of the exercises; test_learn.py has it"),
}


def public_functions() -> dict[str, Callable]:
    """Every public function and class by name, except exceptions. A name of several modules is listed once."""
    found: dict[str, Callable] = {}
    modules = {"": ft, "functional.": functional, "optim.": optim, "data.": data, "train.": train,
               "adapters.": adapters}
    seen = set()
    for prefix, module in modules.items():
        for name in module.__all__:
            f = getattr(module, name)
            is_error = isinstance(f, type) and issubclass(f, BaseException)
            if callable(f) and not is_error and id(f) not in seen:
                seen.add(id(f))
                found[prefix + name] = f
    return found


PUBLIC = public_functions()


def test_the_table_is_complete():
    """A new public function needs a row, or a reason in NO_ROW."""
    assert set(PUBLIC) == set(ROWS) | set(NO_ROW)
    assert not set(ROWS) & set(NO_ROW)
    for name, row in ROWS.items():
        parameters = inspect.signature(PUBLIC[name]).parameters
        assert parameters or row is None, name


# ── the ops ──────────────────────────────────────────────────────────────────────────────────────────────────────────
X = (2, 3)
OP_ROWS: dict[str, Callable[[], list]] = {
    **dict.fromkeys(["add", "sub", "mul", "div", "maximum", "straight_through"], lambda: [tensor(*X), tensor(*X)]),
    **dict.fromkeys(["neg", "exp", "log", "sqrt", "tanh", "sigmoid", "absolute", "relu", "silu", "gelu", "gelu_tanh",
                     "transpose", "softmax", "log_softmax"], lambda: [tensor(*X)]),
    **dict.fromkeys(["sum", "mean", "amax"], lambda: [tensor(*X), 0, True]),
    "power": lambda: [tensor(*X), 2.0],
    "matmul": lambda: [tensor(*X), tensor(3, 2)],
    "linear": lambda: [tensor(*X), tensor(4, 3), tensor(4)],
    "project": lambda: [tensor(*X), tensor(4, 3), tensor(4), tensor(4, 3), tensor(4), tensor(4, 3), tensor(4), 2],
    "cumsum": lambda: [tensor(*X), 0],
    "where": lambda: [np.ones(X, bool), tensor(*X), tensor(*X)],
    "clip": lambda: [tensor(*X), 0.0, 1.0],
    "gather": lambda: [tensor(*X), np.zeros(X, int), 0],
    "embedding": lambda: [tensor(*X), np.zeros(4, int)],
    "getitem": lambda: [tensor(*X), 0],
    "reshape": lambda: [tensor(*X), (6,)],
    "permute": lambda: [tensor(*X), (1, 0)],
    "broadcast_to": lambda: [tensor(*X), (4, 2, 3)],
    "concatenate": lambda: [tensor(*X), tensor(*X)],
    "split": lambda: [tensor(*X), (1, 1)],
    "cast": lambda: [tensor(*X), "float64"],
    "layer_norm": lambda: [tensor(*X), tensor(3), tensor(3), 1e-5],
    "rms_norm": lambda: [tensor(*X), tensor(3), 1e-5],
    "swiglu": lambda: [tensor(*X), tensor(*X)],
    "rotary": lambda: [tensor(2, 4), np.ones((2, 4), np.float32), np.zeros((2, 4), np.float32)],
    "attention": lambda: [tensor(1, 1, 2, 3), tensor(1, 1, 2, 3), tensor(1, 1, 2, 3), tensor(1, 1, 2, 2)],
    "cross_entropy": lambda: [tensor(*X), np.zeros(2, int), np.ones(3, np.float32), -100, 0.1],
    "dropout": lambda: [tensor(*X), 0.5, 3],
    "_packed_linear": lambda: [tensor(*X), Dense(np.ones((4, 3), np.float32))],
}


def test_every_op_has_a_row():
    library = {name for name, f in OPS.items() if f.definition.__module__.split(".")[0] == "tinyft"}
    assert library == set(OP_ROWS)


# ── the check ────────────────────────────────────────────────────────────────────────────────────────────────────────
def snapshot(arguments: dict) -> list:
    """What the models among the arguments hold: names, values, and what trains."""
    found = []
    for value in arguments.values():
        if isinstance(value, nn.Module):
            for name, p in value.named_parameters().items():
                found.append((name, p.data.tobytes(), p.requires_grad, p.dtype))
    return found


def complaint(f: Callable, arguments: dict, positional: list | None = None) -> str | None:
    """None if the call gives a result or one sentence of ours, and a refusal leaves the models as they were."""
    before = snapshot(arguments)
    try:
        with time_limit(SECONDS, 6 * SECONDS), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            f(*(positional or []), **arguments)
    except TooSlow:
        return "it hangs"
    except MemoryError:
        return "refused, and the model is another one" if snapshot(arguments) != before else None
    except FAMILIES as e:
        text = f"{type(e).__name__}: {e}"
        words = re.sub(r"^(\w+ wants '.*'; got .*): operands could not be broadcast.*", r"\1", str(e))
        if FOREIGN.search(words):
            return f"a sentence of Python's or NumPy's: {text}"
        if not str(e).strip() or "\n" in str(e).strip() or len(str(e)) > 500:
            return f"not one sentence: {text}"
        if snapshot(arguments) != before:
            return f"refused, and the model is another one: {text}"
    except BaseException as e:
        return f"not an error of arguments: {type(e).__name__}: {e}"
    return None


# A value that makes sense for a parameter, if not in a test: "function(parameter=value)".
SENSIBLE = {"fit(steps=10**12)", "fit(accumulate=10**12)"}                       # a run of many years


def complaints(name: str, path: Any) -> list[str]:
    """All complaints about a function, one line each."""
    f = PUBLIC[name]
    if name in ("without", "autocast", "recompute"):
        f = entered(f)
    if name == "set_num_threads":
        f = restoring_threads
    found = []
    with time_limit(SECONDS, 6 * SECONDS):
        f(**ROWS[name](path / "right"))                   # the row itself works
    count = 0
    for parameter in ROWS[name](path / "names"):
        for kind, wrong in WRONG.items():
            count += 1
            if f"{name}({parameter}={kind})" in SENSIBLE:
                continue
            arguments = ROWS[name](path / f"{count}")
            arguments[parameter] = wrong
            words = complaint(f, arguments)
            if words:
                found.append(f"{name}({parameter}={kind}): {words}")
    return found


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_argument_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                           # a path of "no such thing" is made here
    found = complaints(name, tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", OP_ROWS)
def test_a_wrong_argument_of_an_op_is_refused_in_one_sentence(name):
    found = []
    for i in range(len(OP_ROWS[name]())):
        for kind, wrong in WRONG.items():
            arguments = OP_ROWS[name]()
            arguments[i] = wrong
            words = complaint(OPS[name], {}, arguments)
            if words:
                found.append(f"{name}, argument {i} = {kind}: {words}")
    assert not found, "\n".join(found)


def of_python(x: Any) -> Any:
    return x.shape


def of_ours(x: Any) -> Any:
    raise TypeError(f"of_ours wants a number, got {x!r}")


def changes_the_model(model: Any, x: Any) -> None:
    for p in model.parameters():
        p.data[...] = 0
    of_ours(x)


@pytest.mark.parametrize("f, words", [
    (of_python, "Python's"), (of_ours, None), (lambda x: 1 // 0, "not an error of arguments"),
    (lambda x: changes_the_model(x, 1), "another one"),
])
def test_wrong_sentences_are_noticed(f, words):
    found = complaint(f, {"x": gpt() if words == "another one" else 3})
    assert found is words is None or words in str(found)
