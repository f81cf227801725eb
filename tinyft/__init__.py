"""tinyft: fine-tuning of transformers, from scratch, to be read.

    import tinyft as ft
    model, tokenizer = ft.load("base-gpt")
    ft.attach(model, ft.LoRA(r=8, targets="attn.[qv]"))
    ft.fit(model, batches, steps=200, optimizer=ft.AdamW(lr=3e-4))

To read it, begin with tensor.py, ops.py, nn.py and edit.py. After these, each method's file can be read alone.
"""
from . import data, functional, kernels, ops
from .adapters import (
    combine,
    load_adapter,
    load_adapterhub,
    load_peft,
    save_adapter,
    save_adapterhub,
    save_peft,
)
from .array import BackendError, CannotCapture, backend, peak_memory, use
from .beam import GNMTPenalty, Hypothesis, PowerPenalty, beam_search
from .chat import chat_end, chat_prompt
from .compress import (
    AWQ,
    E2M1,
    FP4,
    GPTQ,
    LSQ,
    NF4,
    OBQ,
    QAT,
    RTN,
    DistilBERTLoss,
    Dynamic8,
    Hinton,
    Int8,
    Interpolation,
    LLMInt8,
    SequenceLevel,
    TeacherBeams,
    TeacherCache,
    TinyBERTLoss,
    WordLevel,
    compress,
    dense_student,
    pack,
    sentence_bleu,
    smooth,
    student,
)
from .decode import generate
from .edit import (
    Attached,
    CannotMerge,
    Count,
    Edit,
    Method,
    Phase,
    attach,
    count,
    detach,
    eject,
    merge,
    trained,
    unpack,
    without,
)
from .embed import embed
from .formats.huggingface import classifier, load, save
from .kernels import capture, get_num_threads, set_num_threads
from .learn import check
from .memory import largest_batch, memory
from .methods import *  # noqa: F403                    every method of its table: a new one needs no line here
from .methods import ALL as _METHODS
from .methods import methods
from .models import (
    BERT,
    GPT,
    T5,
    BERTConfig,
    GPTConfig,
    Llama,
    LlamaConfig,
    RotaryScaling,
    Seq2Seq,
    Seq2SeqConfig,
    SwitchConfig,
    T5Config,
)
from .nn import Cache, Context, Module, Packed, Parameter
from .optim import (
    SGD,
    Adam,
    Adam8bit,
    AdamW,
    AdamW8bit,
    GradScaler,
    Paged,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
)
from .precision import autocast, get_float32_matmul_precision, set_float32_matmul_precision
from .predict import Predictions, predict
from .recomputation import recompute
from .tensor import ShapeError, Tensor, detect_anomaly, no_grad
from .train import (
    CorpusPerplexity,
    CrossEntropy,
    Diverged,
    History,
    Loss,
    Targets,
    corpus_perplexity,
    evaluate,
    fit,
    perplexity,
)

__version__ = "0.1.0"
__all__ = [
    # the engine
    "Tensor", "no_grad", "detect_anomaly", "use", "backend", "ops", "functional",
    # models
    "Module", "Parameter", "Context", "Cache", "Packed", "unpack", "GPT", "GPTConfig", "BERT", "BERTConfig",
    "Llama", "LlamaConfig", "RotaryScaling", "SwitchConfig", "Seq2Seq", "Seq2SeqConfig", "T5", "T5Config",
    "load", "save", "classifier", "generate", "beam_search", "GNMTPenalty", "PowerPenalty", "Hypothesis",
    "chat_prompt", "chat_end", "data",
    # how a model is changed
    "attach", "detach", "without", "merge", "eject", "combine", "count", "trained", "save_adapter", "load_adapter",
    "save_peft", "load_peft", "save_adapterhub", "load_adapterhub",
    "Edit", "Method", "Phase", "Attached", "Count", "CannotMerge",
    # methods
    "methods", *(cls.__name__ for cls in _METHODS),
    # compression
    "compress", "RTN", "OBQ", "GPTQ", "NF4", "FP4", "E2M1", "Dynamic8", "AWQ", "Int8", "LLMInt8", "smooth", "QAT",
    "LSQ", "pack",
    "student", "dense_student", "Hinton", "WordLevel", "DistilBERTLoss", "TinyBERTLoss", "TeacherCache",
    "SequenceLevel", "Interpolation", "TeacherBeams", "sentence_bleu",
    # training
    "fit", "evaluate", "perplexity", "corpus_perplexity", "CorpusPerplexity", "predict", "Predictions", "embed",
    "History", "Loss", "CrossEntropy", "Targets",
    "AdamW", "Adam", "SGD", "Paged", "AdamW8bit", "Adam8bit",
    "constant_schedule", "linear_schedule", "cosine_schedule", "recompute",
    # 16 bits
    "autocast", "GradScaler", "set_float32_matmul_precision", "get_float32_matmul_precision",
    # costs
    "memory", "largest_batch",
    # devices, threads, errors
    "capture", "kernels", "peak_memory", "set_num_threads", "get_num_threads",
    "BackendError", "CannotCapture", "Diverged", "ShapeError",
    # exercises
    "check",
]

kernels.install()
