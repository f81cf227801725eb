"""Unknown keywords: a TypeError that names the nearest known keyword.

    GPTQ(damp_percent=0.1)          GPTQ got an unknown keyword 'damp_percent': did you mean 'damp'?
    fit(model, batches, stesp=9)    fit got an unknown keyword 'stesp': did you mean 'steps'?

    checked_keywords    the decorator of public functions and classes
    refuse_keywords     raises the error; for functions that pass **keywords on
"""
from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

__all__ = ["FOREIGN_NAMES", "checked_keywords", "keyword_names", "refuse_keywords"]

T = TypeVar("T")

# {keyword here: its names in other libraries}. A name may stand in several rows; the first known keyword is proposed.
FOREIGN_NAMES = {
    # a forward pass
    "ids": "input_ids inputs_embeds",
    "mask": "attention_mask key_padding_mask",
    "token_type_ids": "segment_ids types",
    "logit_positions": "at",
    "task": "task_ids",
    "route": "adapter_names",
    "source": "encoder_outputs",
    "source_ids": "src encoder_input_ids",
    "source_mask": "encoder_attention_mask",
    "cache": "past_key_values use_cache",
    "output_hidden_states": "return_hidden_states",
    # text and decoding; greedy decoding is temperature=0
    "temperature": "do_sample greedy T tau temp",
    "end": "eos_token_id end_token eos",
    "max_len": "max_length max_seq_length model_max_length",
    "max_new_tokens": "max_length max_tokens",
    "beams": "num_beams beam_size beam_width",
    "lp": "length_penalty",
    "n_best": "num_return_sequences",
    "texts": "sentences inputs",
    "names": "class_names label_names id2label",
    "normalize": "normalize_embeddings",
    "pooling": "pooling_mode",
    "template": "chat_template",
    # sizes of a model
    "layers": "n_layer n_layers num_layers num_hidden_layers depth encoder_layers num_encoder_layers",
    "heads": "n_head n_heads num_heads num_attention_heads",
    "width": "n_embd d_model dim hidden_size embed_dim",
    "positions": "n_positions n_ctx block_size max_position_embeddings context_length max_seq_length",
    "hidden": "n_inner d_ff intermediate_size ffn_dim",
    "vocab": "vocab_size",
    "token_types": "type_vocab_size",
    "eps": "layer_norm_eps layer_norm_epsilon rms_norm_eps epsilon adam_epsilon",
    "std": "initializer_range",
    "key_value_heads": "num_key_value_heads n_kv_heads num_kv_heads",
    "decoder_layers": "num_decoder_layers n_decoder_layers",
    "head_width": "d_kv head_dim",
    "feed_forward": "feed_forward_proj",
    "dropout": "dropout_rate lora_dropout expert_dropout",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "start": "decoder_start_token_id",
    "activation": "activation_function",
    "scaled": "scale_embedding",
    "rope_base": "rope_theta",
    "tied": "tie_word_embeddings",
    "classes": "num_labels num_classes n_classes",
    "experts": "num_experts n_experts",
    "capacity": "capacity_factor train_capacity_factor expert_capacity",
    "eval_capacity": "eval_capacity_factor",
    "jitter": "router_jitter_noise",
    "balance": "router_aux_loss_coef",
    "z_loss": "router_z_loss_coef",
    "every": "sparse_step",
    # methods
    "r": "rank lora_r",
    "alpha": "lora_alpha migration_strength",
    "targets": "target_modules",
    "p": "num_virtual_tokens prompt_length prefix_length",
    "m": "bottleneck_size adapter_size adapter_dim",
    "mlp": "encoder_hidden_size",
    "k": "num_layers",
    "name": "adapter_name",
    # compression
    "bits": "wbits w_bit n_bits num_bits nbits",
    "group": "group_size groupsize q_group_size",
    "grid": "sym symmetric zero_point",
    "damp": "damp_percent percdamp dampening_frac",
    "block": "block_size blocksize",
    "act_order": "desc_act actorder",
    "double": "double_quant use_double_quant bnb_4bit_use_double_quant",
    "threshold": "llm_int8_threshold",
    "rule": "quantization_config quantizer",
    # distillation
    "teacher": "teacher_model",
    "smoothing": "label_smoothing label_smoothing_factor",
    "soft": "alpha alpha_ce",
    "hard": "alpha_mlm alpha_clm",
    "cosine": "alpha_cos",
    # training
    "lr": "learning_rate",
    "optimizer": "optim learning_rate lr weight_decay",
    "betas": "beta beta1 beta2",
    "weight_decay": "wd decay",
    "momentum": "beta",
    "groups": "param_groups",
    "warmup": "warmup_steps num_warmup_steps",
    "floor": "min_lr eta_min",
    "batches": "batch_size dataset dataloader train_dataset train_dataloader calibration_data",
    "steps": "num_steps max_steps total_steps num_training_steps iterations epochs num_train_epochs",
    "schedule": "scheduler lr_scheduler",
    "loss": "loss_fn criterion",
    "clip": "max_grad_norm max_norm grad_clip gradient_clip_val",
    "accumulate": "gradient_accumulation_steps accumulation_steps accumulate_grad_batches",
    "seed": "rng generator random_state",
    "rng": "seed generator",
    "out": "output_dir",
    "resume": "resume_from_checkpoint",
    "save_every": "save_steps",
    "progress": "disable_tqdm verbose",
    "evaluate_every": "eval_steps eval_interval",
    "patience": "early_stopping_patience",
    "monitor": "metric_for_best_model",
    "autocast": "mixed_precision amp fp16 bf16",
    "recompute": "gradient_checkpointing",
    "on_step": "callback callbacks",
    "batch": "batch_size per_device_train_batch_size",
    "batch_size": "batch bs per_device_train_batch_size per_device_eval_batch_size",
    "length": "seq_len seq_length sequence_length max_length max_seq_length",
    # files and devices
    "path": "folder directory save_directory save_dir pretrained_model_name_or_path model_id",
    "folder": "path directory cache_dir",
    "dtype": "torch_dtype",
    "backend": "device",
}


def checked_keywords(target: T) -> T:
    """The decorator of a public function or class: an unknown keyword raises TypeError, as refuse_keywords words it.

    The signature and the docstring stay. If a class defines `__init__`, that method is wrapped. If it defines neither
    `__init__` nor `__new__`, its subclasses are dataclasses, and their `__init__` does not exist yet: the class gets a
    `__new__` that checks the keywords. The subclasses inherit it, and it runs before `__init__`."""
    if not isinstance(target, type):
        return _checked_function(target, target.__name__)
    if "__init__" in vars(target):
        target.__init__ = _checked_function(target.__init__, target.__name__)
    elif "__new__" in vars(target):                      # a NamedTuple
        target.__new__ = staticmethod(_checked_function(target.__new__, target.__name__))
    else:
        target.__new__ = staticmethod(_checked_new)
    return target


def _checked_function(function: Callable, caller: str) -> Callable:
    """The function, after a check of its keywords. caller: for the message."""
    known = frozenset(keyword_names(function))

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if not keywords.keys() <= known:
            refuse_keywords(caller, [keyword for keyword in keywords if keyword not in known], known)
        return function(*args, **keywords)

    return call


def _checked_new(cls: type, *args: Any, **keywords: Any) -> Any:
    """Raise TypeError, naming the nearest keyword, for an unknown one."""
    if cls.__init__ is object.__init__:                  # a class without fields
        if args:
            raise TypeError(f"{cls.__name__} takes no arguments, got {len(args)}")
        refuse_keywords(cls.__name__, keywords, ())
    elif not _takes_any(cls.__init__):
        known = keyword_names(cls.__init__)
        refuse_keywords(cls.__name__, [keyword for keyword in keywords if keyword not in known], known)
    return object.__new__(cls)


_checked_new.__name__ = "__new__"                        # for help; inspect.signature of a base shows no arguments
_checked_new.__signature__ = inspect.Signature([inspect.Parameter("cls", inspect.Parameter.POSITIONAL_OR_KEYWORD)])


def keyword_names(function: Callable) -> tuple[str, ...]:
    """The names of the parameters of a function that can be given as keywords; **keywords is not counted."""
    code = inspect.unwrap(function).__code__
    names = code.co_varnames[code.co_posonlyargcount:code.co_argcount + code.co_kwonlyargcount]
    return tuple(name for name in names if name not in ("self", "_cls"))


def _takes_any(function: Callable) -> bool:
    """True for a function with **keywords."""
    return bool(inspect.unwrap(function).__code__.co_flags & inspect.CO_VARKEYWORDS)


def refuse_keywords(caller: str, unknown: Iterable[str], known: Iterable[str],
                    elsewhere: Mapping[str, str] | None = None) -> None:
    """Raise TypeError if there is an unknown keyword; the message names the nearest known keyword.

    caller      the function or class that got them, for the message
    elsewhere   {keyword of another library that has no counterpart here: what to do in its place}"""
    for keyword in unknown:
        known = sorted(known)
        near = near_keyword(keyword, known)
        if elsewhere is not None and keyword in elsewhere:
            hint = elsewhere[keyword]
        elif near is not None:
            hint = f"did you mean {near!r}?"
        else:
            hint = f"it takes {', '.join(known) or 'no keywords'}"
        raise TypeError(f"{caller} got an unknown keyword {keyword!r}: {hint}")


def near_keyword(keyword: str, known: list[str]) -> str | None:
    """The known keyword that is probably meant; None if there is no guess.

    keyword: its name here or in another library, or a misspelling of one of them."""
    spellings: dict[str, str] = {name: name for name in known}
    for name, foreign in FOREIGN_NAMES.items():
        if name in known:
            spellings = dict.fromkeys(foreign.split(), name) | spellings         # an earlier row wins
    if keyword in spellings:
        return spellings[keyword]
    near = difflib.get_close_matches(keyword, known, 1, 0.75) or difflib.get_close_matches(keyword, spellings, 1, 0.6)
    return spellings[near[0]] if near else None
