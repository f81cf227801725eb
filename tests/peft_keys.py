"""Every key of an adapter_config.json of PEFT and AdapterHub: read, refused unless it has our value, or harmless.

    READ      {key: another value}: it reaches the adapter, or is compared with the tensors
    REFUSED   {key: (values that load, values that do not)}: it changes the outputs, and our method has one value
    HARMLESS  {key: another value}: the outputs of a trained adapter do not depend on it

test_peft_files.py holds our readers to the table; peers/test_interchange.py holds the table to PEFT and AdapterHub.
"""
from __future__ import annotations

from typing import Any

HARMLESS_EVERYWHERE: dict[str, Any] = {
    "base_model_name_or_path": "somewhere", "revision": "main", "peft_version": "0.99", "inference_mode": False,
    "auto_mapping": {"base_model_class": "X"},
}
OFF = ([None, False], [True])
NULL = ([None], [{"a": 1}])

LORA_READ = {
    "r": 3, "lora_alpha": 7, "lora_dropout": 0.5, "use_rslora": True, "rank_pattern": {"c_attn": 3},
    "alpha_pattern": {"c_attn": 3}, "target_modules": ["c_fc"], "exclude_modules": ["c_attn"],
    "layers_to_transform": [0], "task_type": "SEQ_CLS", "modules_to_save": ["ln_f"],
}
LORA_REFUSED = {
    "peft_type": (["LORA"], ["ADALORA", "IA3", "LOKR", "P_TUNING", "VERA", None, 3]),
    "task_type": (["CAUSAL_LM", "FEATURE_EXTRACTION", None], ["SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", 3]),
    "bias": (["none"], ["all", "lora_only", 3]),
    "init_lora_weights": ([True, False, "gaussian", "orthogonal", "eva"],
                          ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"]),
    "use_dora": OFF,
    "lora_bias": OFF,
    "use_qalora": OFF,
    "megatron_config": NULL,
    "trainable_token_indices": ([None], [[1], {"wte": [1]}]),
    "velora_config": NULL,
    "alora_invocation_tokens": ([None], [[1, 2]]),
    "monteclora_config": NULL,
    "layer_replication": ([None], [[[0, 1], [0, 2]]]),
    "use_bdlora": NULL,
    "arrow_config": NULL,
    "kasa_config": NULL,
    "target_parameters": ([None, []], [["wte.weight"]]),
}
# layers_pattern is read with layers_to_transform alone; ensure_weight_tying with a LoRA on the embedding alone.
LORA_HARMLESS = {
    **HARMLESS_EVERYWHERE,
    "fan_in_fan_out": False, "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "kpm"}, "lora_ga_config": {"direction": "random"},
    "runtime_config": {"ephemeral_gpu_offload": True}, "qalora_group_size": 3, "megatron_core": "x",
    "layers_pattern": None, "ensure_weight_tying": True,
}
PROMPT_READ = {
    "num_virtual_tokens": 3, "token_dim": 7, "num_layers": 7, "modules_to_save": ["ln_f"], "task_type": "SEQ_CLS",
}
PROMPT_REFUSED = {
    "peft_type": ([], ["P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"]),
    "num_transformer_submodules": ([1, None], [2, "x"]),
    "task_type": LORA_REFUSED["task_type"],
}
PROMPT_HARMLESS = {
    **HARMLESS_EVERYWHERE,
    "prompt_tuning_init": "SAMPLE_VOCAB", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "x",
    "tokenizer_kwargs": None, "num_attention_heads": 5,
}
PREFIX_READ = {**PROMPT_READ, "num_attention_heads": 7}
PREFIX_REFUSED = PROMPT_REFUSED
PREFIX_HARMLESS = {
    **HARMLESS_EVERYWHERE, "encoder_hidden_size": 77, "prefix_projection": True, "init_weights": "zero",
}

READ = {"LORA": LORA_READ, "PROMPT_TUNING": PROMPT_READ, "PREFIX_TUNING": PREFIX_READ}
REFUSED = {"LORA": LORA_REFUSED, "PROMPT_TUNING": PROMPT_REFUSED, "PREFIX_TUNING": PREFIX_REFUSED}
HARMLESS = {"LORA": LORA_HARMLESS, "PROMPT_TUNING": PROMPT_HARMLESS, "PREFIX_TUNING": PREFIX_HARMLESS}
TYPES = tuple(READ)

# ── AdapterHub: the entries of "config" ──────────────────────────────────────────────────────────────────────────────
HUB_READ = {"mh_adapter": False, "output_adapter": False, "reduction_factor": 6, "leave_out": [0]}
HUB_REFUSED = {
    "non_linearity": (["gelu"], ["swish", "relu", "gelu_new", None]),
    "original_ln_before": OFF,
    "original_ln_after": ([True], [False]),
    "ln_before": OFF,
    "ln_after": OFF,
    "adapter_residual_before_ln": OFF,
    "residual_before_ln": ([True], [False, "post_add"]),
    "is_parallel": OFF,
    "scaling": ([1.0], [2.0, "learned", "channel"]),
    "use_gating": OFF,
    "inv_adapter": ([None], ["nice", "glow"]),
    "cross_adapter": OFF,
    "phm_layer": OFF,
    "stochastic_depth": ([0.0, None], [0.1]),
    "architecture": ([None], ["lora", "prefix_tuning", "union", "reft"]),
}
HUB_HARMLESS = {
    "dropout": 0.1, "init_weights": "mam_adapter", "init_weights_seed": 3, "inv_adapter_reduction_factor": 4,
    "phm_dim": 2,
    "factorized_phm_W": False, "shared_W_phm": True, "shared_phm_rule": False, "factorized_phm_rule": True,
    "phm_c_init": "uniform", "phm_init_range": 0.1, "learn_phm": False, "hypercomplex_nonlinearity": "x",
    "phm_rank": 2, "phm_bias": False,
}
