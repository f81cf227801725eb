"""Every key of a config.json, by family: read, refused unless it has a value that our model has, or harmless.

    READ      {key: another valid value}: it reaches the model;  OF_CLASSIFIERS  the same for keys of a classifier only
    REFUSED   {key: (values that load, values that do not)}: it changes the mathematics, and our model has one value
    HARMLESS  {key: another value}: the outputs of the classes that we read do not depend on it
    ALIASES   {other name: name}
    NEWER     {key: another valid value}: it is read, and the transformers beside which we test does not know it yet

Values fit the configurations in CONFIG. test_config.py holds our reader to the table; peers/test_configurations.py
holds the table to transformers.
"""
from __future__ import annotations

from typing import Any

GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 50, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}
BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 50, "max_position_embeddings": 32, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}
DISTILBERT: dict[str, Any] = {
    "model_type": "distilbert", "vocab_size": 50, "max_position_embeddings": 32, "dim": 24, "n_layers": 2, "n_heads": 3,
    "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
}
ROBERTA: dict[str, Any] = {**BERT, "model_type": "roberta", "pad_token_id": 0}

# ── of every class ───────────────────────────────────────────────────────────────────────────────────────────────────
FLAG_OFF = ([False], [True, "yes", None])
REFUSED_EVERYWHERE = {
    "is_encoder_decoder": FLAG_OFF,
    "tie_encoder_decoder": FLAG_OFF,
    "add_cross_attention": FLAG_OFF,
    "torchscript": FLAG_OFF,
    "tie_word_embeddings": ([True], [False, None, 0, "no"]),             # of a language model
    "pruned_heads": ([{}, None], [{"0": [1]}, [0]]),
    "quantization_config": ([None], [{"load_in_8bit": True}]),
}
# Defaults of generate, which takes them as arguments here.
GENERATION = {
    "max_length": 5, "min_length": 2, "do_sample": True, "early_stopping": True, "num_beams": 3, "temperature": 0.5,
    "top_k": 3, "top_p": 0.5, "typical_p": 0.5, "repetition_penalty": 2.0, "length_penalty": 2.0,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[1]], "num_return_sequences": 2,
    "output_scores": True, "return_dict_in_generate": True, "forced_bos_token_id": 1, "forced_eos_token_id": 1,
    "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 1.5], "suppress_tokens": [1],
    "begin_suppress_tokens": [1], "num_beam_groups": 3, "diversity_penalty": 0.5, "decoder_start_token_id": 1,
    "prefix": "Once", "task_specific_params": {"text-generation": {"do_sample": True}},
}
# What a call returns and how it computes, notes about the file, and initial values of new weights.
HARMLESS_EVERYWHERE = {
    **GENERATION,
    "return_dict": False, "output_hidden_states": True, "output_attentions": True, "use_cache": False,
    "dtype": "float16", "torch_dtype": "float16", "use_bfloat16": True, "tf_legacy_loss": True,
    "chunk_size_feed_forward": 3, "initializer_range": 0.5, "finetuning_task": "mnli", "tokenizer_class": "X",
    "sep_token_id": 3, "cross_attention_hidden_size": 5, "_name_or_path": "x", "transformers_version": "4.0.0",
    "label2id": {"a": 0, "b": 1}, "problem_type": "regression",
    "bos_token_id": 7, "eos_token_id": 7, "pad_token_id": 0,
}
# Of a classifier, as is id2label. The two contradict each other if their numbers differ.
READ_BY_A_CLASSIFIER = {"num_labels": 4, "id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}

# ── GPT-2 ────────────────────────────────────────────────────────────────────────────────────────────────────────────
GPT2_READ = {
    "vocab_size": 61, "n_positions": 41, "n_embd": 36, "n_layer": 3, "n_head": 4, "n_inner": 20,
    "layer_norm_epsilon": 0.1, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3,
}
GPT2_ALIASES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
GPT2_REFUSED = {
    **REFUSED_EVERYWHERE,
    "activation_function": (
        ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"],
        ["gelu", "relu", "silu", "swish", "quick_gelu", "tanh", "gelu_10", "mish", None, 3, ["gelu_new"]],
    ),
    "scale_attn_weights": ([True], [False, None, "yes"]),
    "scale_attn_by_inverse_layer_idx": FLAG_OFF,
}
GPT2_HARMLESS = {
    **HARMLESS_EVERYWHERE,
    "reorder_and_upcast_attn": True, "is_decoder": True, "n_ctx": 5,
    "summary_type": "mean", "summary_use_proj": False, "summary_activation": "tanh", "summary_first_dropout": 0.5,
    "summary_proj_to_labels": False,
}

# ── BERT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
BERT_READ = {
    "vocab_size": 61, "max_position_embeddings": 41, "type_vocab_size": 5, "hidden_size": 36, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 20, "layer_norm_eps": 0.1,
    "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.3,
}
BERT_REFUSED = {
    **REFUSED_EVERYWHERE,
    "hidden_act": (
        ["gelu", "gelu_python"],
        ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish", "quick_gelu", None, 3],
    ),
    "position_embedding_type": (["absolute"], [None, "relative_key", "relative_key_query", "rotary", 3]),
    "is_decoder": FLAG_OFF,
}
BERT_HARMLESS = {
    **HARMLESS_EVERYWHERE,
    "directionality": "uni", "pooler_type": "last", "gradient_checkpointing": True,
}

# ── DistilBERT ───────────────────────────────────────────────────────────────────────────────────────────────────────
DISTILBERT_READ = {
    "vocab_size": 61, "max_position_embeddings": 41, "dim": 36, "n_layers": 3, "n_heads": 4, "hidden_dim": 20,
    "dropout": 0.3, "attention_dropout": 0.3,
}
DISTILBERT_ALIASES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
DISTILBERT_REFUSED = {
    **REFUSED_EVERYWHERE,
    "activation": (
        ["gelu", "gelu_python"],
        ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish", "quick_gelu", None, 3],
    ),
}
DISTILBERT_HARMLESS = {
    **HARMLESS_EVERYWHERE,
    "sinusoidal_pos_embds": True, "qa_dropout": 0.5, "is_decoder": True, "tie_weights_": True, "layer_norm_eps": 0.5,
}

# ── RoBERTa ──────────────────────────────────────────────────────────────────────────────────────────────────────────
ROBERTA_READ = {**BERT_READ, "pad_token_id": 11}                   # no token of the compared texts
ROBERTA_HARMLESS = {key: value for key, value in BERT_HARMLESS.items() if key != "pad_token_id"}

# ── Llama, Mistral, Qwen2 ────────────────────────────────────────────────────────────────────────────────────────────
LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 50, "max_position_embeddings": 32, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 24,
}
LLAMA: dict[str, Any] = {"model_type": "llama", **LLAMA_SIZES}
MISTRAL: dict[str, Any] = {"model_type": "mistral", **LLAMA_SIZES, "sliding_window": None}
# The window hides keys of a text of nine tokens, if it is used.
QWEN2: dict[str, Any] = {"model_type": "qwen2", **LLAMA_SIZES, "sliding_window": 8, "max_window_layers": 0}
# Of all three. Mistral's configuration does not write rope_scaling and head_dim is not Qwen2's, but both models obey.
LLAMA_READ_BY_ALL = {
    "vocab_size": 61, "max_position_embeddings": 41, "hidden_size": 36, "num_hidden_layers": 3,
    "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 20, "head_dim": 6,
    "rms_norm_eps": 0.1, "rope_theta": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "attention_dropout": 0.3, "tie_word_embeddings": True,
}
LLAMA_READ = {**LLAMA_READ_BY_ALL, "attention_bias": True, "mlp_bias": True}
LLAMA_NEWER = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}
LLAMA_REFUSED = {
    **{key: values for key, values in REFUSED_EVERYWHERE.items() if key != "tie_word_embeddings"},
    "hidden_act": (["silu", "swish"], ["gelu", "gelu_new", "relu", "sigmoid", None, 3]),
    "partial_rotary_factor": ([1.0, None], [0.5, 2.0, "1"]),
    "rope_interleaved": ([False, None], [True, "no"]),
    "layer_types": (
        [None, ["full_attention", "full_attention"]],
        [["full_attention"], ["full_attention", "other"], "full_attention", 3, {}],
    ),
    "sliding_window": ([None, 32, 4096], [8, 31, 0, -1, True, "8", 8.0]),
}
LLAMA_HARMLESS = {**HARMLESS_EVERYWHERE, "is_decoder": True, "pretraining_tp": 2, "is_llama_config": True}
# These two have the biases of their class, whatever these keys say.
MISTRAL_HARMLESS = {**HARMLESS_EVERYWHERE, "is_decoder": True, "attention_bias": True, "mlp_bias": True}
QWEN2_HARMLESS = {**MISTRAL_HARMLESS, "attention_bias": False, "sliding_window": 5, "max_window_layers": 1}
QWEN2_REFUSED = {
    **{key: values for key, values in LLAMA_REFUSED.items() if key != "sliding_window"},
    "use_sliding_window": ([False], [True, "yes", None, 1]),
}

# ── Marian ───────────────────────────────────────────────────────────────────────────────────────────────────────────
MARIAN: dict[str, Any] = {
    "model_type": "marian", "vocab_size": 50, "max_position_embeddings": 32, "d_model": 24, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "dropout": 0.0, "decoder_start_token_id": 0,
}
MARIAN_READ = {
    "vocab_size": 61, "max_position_embeddings": 41, "d_model": 36, "encoder_layers": 3, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20,
    "dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "activation_function": "swish",
    "scale_embedding": True, "decoder_start_token_id": 7,
}
MARIAN_ALIASES = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"}
MARIAN_REFUSED = {
    **REFUSED_EVERYWHERE,
    "is_encoder_decoder": ([True], [False, "yes", None]),
    "share_encoder_decoder_embeddings": ([True], [False, "yes", None]),
}
# Keys of old files, which transformers' Marian does not read, and those of layers that are dropped while it trains.
MARIAN_HARMLESS = {
    **{key: value for key, value in HARMLESS_EVERYWHERE.items() if key != "decoder_start_token_id"},
    "is_decoder": True, "init_std": 0.5, "num_hidden_layers": 7, "decoder_vocab_size": 33,
    "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "normalize_before": True, "normalize_embedding": True,
    "add_final_layer_norm": True, "add_bias_logits": True, "static_position_embeddings": False,
    "extra_pos_embeddings": 2, "classif_dropout": 0.5, "classifier_dropout": 0.5, "gradient_checkpointing": True,
}

# ── T5 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
T5: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "dropout_rate": 0.0,
    "tie_word_embeddings": False, "num_decoder_layers": 2,
}
T5_READ = {
    "vocab_size": 61, "d_model": 36, "d_kv": 5, "d_ff": 20, "num_layers": 3, "num_decoder_layers": 1, "num_heads": 4,
    "relative_attention_num_buckets": 6, "relative_attention_max_distance": 20, "dropout_rate": 0.3,
    "layer_norm_epsilon": 0.1, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 7,
    "tie_word_embeddings": True, "n_positions": 41,
}
T5_ALIASES = {
    "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv",
}
T5_REFUSED = {
    **{key: values for key, values in REFUSED_EVERYWHERE.items() if key != "tie_word_embeddings"},
    "is_encoder_decoder": ([True], [False, "yes", None]),
    "dense_act_fn": (["relu"], ["gelu_new", "silu", None, 3]),           # beside feed_forward_proj "relu"
    "is_gated_act": ([False], [True, None, "no"]),
}
T5_HARMLESS = {
    **{key: value for key, value in HARMLESS_EVERYWHERE.items() if key != "decoder_start_token_id"},
    "is_decoder": True, "initializer_factor": 0.5, "classifier_dropout": 0.5, "output_past": True,
}

CONFIG = {
    "gpt2": GPT2, "bert": BERT, "distilbert": DISTILBERT, "roberta": ROBERTA,
    "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "marian": MARIAN, "t5": T5,
}
READ: dict[str, dict[str, Any]] = {
    "gpt2": GPT2_READ, "bert": BERT_READ, "distilbert": DISTILBERT_READ, "roberta": ROBERTA_READ,
    "llama": LLAMA_READ, "mistral": LLAMA_READ_BY_ALL, "qwen2": LLAMA_READ_BY_ALL, "marian": MARIAN_READ, "t5": T5_READ,
}
REFUSED: dict[str, dict[str, Any]] = {
    "gpt2": GPT2_REFUSED, "bert": BERT_REFUSED, "distilbert": DISTILBERT_REFUSED, "roberta": BERT_REFUSED,
    "llama": LLAMA_REFUSED, "mistral": LLAMA_REFUSED, "qwen2": QWEN2_REFUSED, "marian": MARIAN_REFUSED,
    "t5": T5_REFUSED,
}
HARMLESS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2_HARMLESS, "bert": BERT_HARMLESS, "distilbert": DISTILBERT_HARMLESS, "roberta": ROBERTA_HARMLESS,
    "llama": LLAMA_HARMLESS, "mistral": MISTRAL_HARMLESS, "qwen2": QWEN2_HARMLESS, "marian": MARIAN_HARMLESS,
    "t5": T5_HARMLESS,
}
ALIASES: dict[str, dict[str, str]] = {
    "gpt2": GPT2_ALIASES, "distilbert": DISTILBERT_ALIASES, "marian": MARIAN_ALIASES, "t5": T5_ALIASES,
}
OF_CLASSIFIERS: dict[str, dict[str, Any]] = {"distilbert": {"seq_classif_dropout": 0.3}}
NEWER: dict[str, dict[str, Any]] = dict.fromkeys(("llama", "mistral", "qwen2"), LLAMA_NEWER)
FAMILIES = tuple(CONFIG)
ENCODER_DECODERS = ("marian", "t5")                           # their passes have a source, and they take no classifier
WITH_CLASSIFIER = tuple(family for family in FAMILIES if family not in ENCODER_DECODERS)
