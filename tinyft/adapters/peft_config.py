"""adapter_config.json of PEFT, read with checks: the keys that have an effect, and the modules that it names.

    READ      keys that reach the adapter
    FIXED     keys that change the outputs, and of which this library's methods have one value
    HARMLESS  keys without effect on the outputs of a trained adapter: how it started, where it came from

A key that none of the three lists knows is ignored if its value switches nothing on, and refused otherwise.
tests/test_peft_files.py has the table of every key. PEFT 0.21.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..checks import brief, number, one_of, whole
from .exchange import check_settings

__all__ = ["TASKS", "check_keys", "chosen_modules", "names_in", "pattern_values", "read_number", "read_whole"]

FILE = "adapter_config.json"
LARGEST = 1 << 40
TASKS = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", None)
COMMON = {"peft_type", "task_type", "modules_to_save"}
READ = {
    "LORA": COMMON | {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    },
    "PROMPT_TUNING": COMMON | {"num_virtual_tokens", "token_dim", "num_layers"},
    "PREFIX_TUNING": COMMON | {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"},
}
NOTHING = (None, False)
FIXED: dict[str, dict[str, tuple]] = {
    "LORA": {
        "bias": ("none", None),
        # Starts that change the weights of the base, such as "pissa" and "olora", are not here.
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
        **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "megatron_config", "trainable_token_indices",
                         "velora_config", "alora_invocation_tokens", "monteclora_config", "layer_replication",
                         "use_bdlora", "arrow_config", "kasa_config"), NOTHING),
        "target_parameters": (None, []),
    },
    "PROMPT_TUNING": {"num_transformer_submodules": (1, None)},
    "PREFIX_TUNING": {"num_transformer_submodules": (1, None)},
}
HARMLESS_EVERYWHERE = {"base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"}
HARMLESS = {
    # PEFT corrects fan_in_fan_out by the class of the layer.
    "LORA": HARMLESS_EVERYWHERE | {
        "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
        "qalora_group_size", "megatron_core",
    },
    "PROMPT_TUNING": HARMLESS_EVERYWHERE | {
        "num_attention_heads", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
        "tokenizer_kwargs",
    },
    # The file holds the prefix itself, whatever made it.
    "PREFIX_TUNING": HARMLESS_EVERYWHERE | {"encoder_hidden_size", "prefix_projection", "init_weights"},
}

# Patterns of PEFT are regular expressions. Those that a file may use here take little time to match, whatever they are.
SIMPLE = re.compile(r"(?:\\[.dwb]|\(\?:|[\w.\-^$|()]|\[[\w\-]+\]|[*+?])*")
LONGEST_PATTERN = 300                                    # characters
MOST_REPEATS = 3                                         # of "*", "+" and "?"
MOST_ALTERNATIVES = 12
MOST_PATTERNS = 2000


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_keys(config: dict[str, Any]) -> str:
    """The peft_type. ValueError for a type, a task or a setting that this library cannot compute, by its key."""
    kind = one_of(f"{FILE}: peft_type", config.get("peft_type"), tuple(READ))
    one_of(f"{FILE}: task_type", config.get("task_type"), TASKS)
    check_settings(FILE, config, FIXED[kind], READ[kind] | HARMLESS[kind])
    return kind


def read_whole(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least 1. null stands for the default, where there is one."""
    value = config.get(key)
    return whole(f"{FILE}: {key}", default if value is None else value, 1, LARGEST)


def read_number(config: dict[str, Any], key: str, default: float, **limits: float) -> float:
    """A number; `limits` are those of checks.number. null stands for the default."""
    value = config.get(key)
    return number(f"{FILE}: {key}", default if value is None else value, **limits)


def names_in(config: dict[str, Any], key: str) -> list[str]:
    """A list of names. A key that is absent or null gives an empty list."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{FILE}: {key} wants a list of names, got {brief(value)}")
    return value


# ── modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def chosen_modules(config: dict[str, Any], names: Iterable[str], linear: set[str]) -> set[str]:
    """The modules that PEFT adapts, among the modules `names` of the model.

    linear: those that "all-linear" stands for. A module inside one of modules_to_save is never adapted, one of
    exclude_modules neither, and with layers_to_transform only those of these blocks are."""
    names = list(names)
    targets = config.get("target_modules")
    excluded = _matching(config.get("exclude_modules") or [], names, "exclude_modules")
    for module in names_in(config, "modules_to_save"):
        excluded |= {name for name in names if is_part(name, module)}
    if targets == "all-linear":
        chosen = set(linear)
    else:
        chosen = _matching(targets, names, "target_modules")
        layers = _layers(config)
        if layers is not None:
            chosen = {name for name in chosen if _block_number(config, name) in layers}
    return chosen - excluded


def is_part(name: str, module: str) -> bool:
    """True if `name` is a module, or a tensor, of this name, or is inside one: "bert.pooler.dense" of "pooler"."""
    return f".{module}." in f".{name}."


def _matching(targets: Any, names: list[str], key: str) -> set[str]:
    """The names that a list of ends of names, or one regular expression for whole names, matches."""
    if isinstance(targets, str):
        pattern = compile_simple(targets, key)
        return {name for name in names if pattern.fullmatch(name)}
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{FILE}: {key} wants a list of module names or a pattern, got {brief(targets)}")
    ends = set(targets)
    return {name for name in names if ends.intersection(_ends(name))}


def _ends(name: str) -> list[str]:
    """The name, and its ends after each dot: "a.b.c", "b.c", "c"."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _layers(config: dict[str, Any]) -> set[int] | None:
    """The numbers of the blocks in layers_to_transform; None for all blocks."""
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    if isinstance(config.get("target_modules"), str):
        raise ValueError(f"{FILE}: layers_to_transform wants target_modules to be a list, got a pattern")
    numbers = value if isinstance(value, list) else [value]
    return {whole(f"{FILE}: layers_to_transform", n, 0, LARGEST) for n in numbers}


def _block_number(config: dict[str, Any], name: str) -> int | None:
    """The number of the block that a module is in, as PEFT finds it: the first number after the name of a list.

    layers_pattern: names of such lists, "h". Without it, any name but the first: 0 in model.layers.0.mlp."""
    lists = config.get("layers_pattern") or []
    lists = [lists] if isinstance(lists, str) else names_in(config, "layers_pattern")
    parts = name.split(".")
    for wanted in lists or [None]:
        for i in range(2 if wanted is None else 1, len(parts) - 1):
            if parts[i].isdecimal() and wanted in (None, parts[i - 1]):
                return int(parts[i])
    return None


def compile_simple(text: str, key: str) -> re.Pattern[str]:
    """A regular expression from a file. ValueError unless it is of the simple kind that is matched in little time.

    Letters, dots, sets, groups of alternatives, ^ and $, and a few repeats of single characters: a repeated group
    could take time that doubles with each character."""
    wanted = f"{FILE}: {key} wants module names or a simple pattern"
    repeats = sum(text.replace("(?:", "(").count(sign) for sign in "*+?")
    is_simple = (
        len(text) <= LONGEST_PATTERN
        and SIMPLE.fullmatch(text) is not None
        and repeats <= MOST_REPEATS
        and text.count("|") <= MOST_ALTERNATIVES
        and re.search(r"\)[*+?]", text) is None
    )
    if not is_simple:
        raise ValueError(f"{wanted}, got {brief(text)}")
    try:
        return re.compile(text)
    except re.error as e:
        raise ValueError(f"{wanted}, got {brief(text)}: {e}") from e


def pattern_values(config: dict[str, Any], key: str, names: Iterable[str]) -> dict[str, Any]:
    """{module: value} of rank_pattern or alpha_pattern: the value of the first pattern that matches the module.

    A pattern is a regular expression for the name, or for an end of the name after a dot."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
        raise ValueError(f"{FILE}: {key} wants an object with at most {MOST_PATTERNS:,} patterns, "
                         f"got {brief(patterns)}")
    compiled = []
    for text, value in patterns.items():
        compile_simple(text, key)
        compiled.append((re.compile(rf"(.*\.)?({text})$"), value))
    found = {}
    for name in names:
        for pattern, value in compiled:
            if pattern.match(name):
                found[name] = value
                break
    return found
