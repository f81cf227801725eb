"""The files that make a model directory a sentence-transformers folder.

    modules.json                 the parts: a Transformer (the directory itself), a Pooling, and perhaps a Normalize
    1_Pooling/config.json        the kind of pooling, by one key for each kind
    sentence_bert_config.json    the longest text in tokens, and whether texts are put in lower case

A setting that changes the embeddings and that this library does not have is refused by its name.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..checks import brief, one_of
from ..files import is_file_name, read_json, read_json_list
from ..pooling import MODES, Pooling

__all__ = ["MODULES", "pooling_files", "read_pooling"]

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
# The names of the file with the settings of the Transformer part; the first that is there is read.
TRANSFORMER = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json")
POOLING = "1_Pooling"
KINDS = ("Transformer", "Pooling", "Normalize")
# The key of each kind of pooling, and the keys of kinds that this library does not have.
MODE_OF = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}
OTHER_MODES = ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken")
# Arguments for the classes of transformers: none of them are passed on.
ARGUMENTS = ("model_args", "tokenizer_args", "config_args", "tokenizer_name_or_path")


def read_pooling(folder: Path, width: int) -> Pooling | None:
    """The pooling settings of a directory; None if it has no modules.json. width: the model's C.

    ValueError for parts and settings that this library does not have, and for damaged files; FileNotFoundError if a
    file that modules.json names is missing, or if one of the files is no ordinary file."""
    if not os.path.lexists(folder / MODULES):
        return None
    pooling_folder, normalize = _read_modules(folder / MODULES)
    mode = _read_mode(folder / pooling_folder / "config.json", width)
    _check_prompts(folder / PROMPTS)
    max_tokens, lower_case = _read_transformer(folder)
    return Pooling(mode, normalize, max_tokens, lower_case)


def _read_modules(file: Path) -> tuple[str, bool]:
    """(the folder of the Pooling part, True if a Normalize part follows), from modules.json."""
    kinds = []
    paths = {}
    for part in read_json_list(file):
        kind = part.get("type") if isinstance(part, dict) else part
        name = kind.rpartition(".")[2] if isinstance(kind, str) else None
        if name not in KINDS:
            raise ValueError(f"{file} wants the parts {', '.join(KINDS)}, got {brief(kind)}")
        kinds.append(name)
        paths[name] = part.get("path")
    if tuple(kinds) not in (KINDS, KINDS[:2]):
        raise ValueError(f"{file} wants the parts {', '.join(KINDS)}, in this order, got {', '.join(kinds) or 'none'}")
    if paths["Transformer"] not in ("", "."):
        raise ValueError(f"{file} wants the Transformer in this directory, got it in {brief(paths['Transformer'])}")
    if not is_file_name(paths["Pooling"]):
        raise ValueError(f"{file} wants the Pooling in a folder of this directory, got {brief(paths['Pooling'])}")
    return paths["Pooling"], "Normalize" in kinds


def _read_mode(file: Path, width: int) -> str:
    """The kind of pooling, "mean", "cls" or "max", from the config.json of the Pooling part.

    pooling_mode names it; without that key, the kind whose own key is true. That of the mean is true by default."""
    config = read_json(file)
    found = config.get("word_embedding_dimension", width)
    if found != width or isinstance(found, bool):
        raise ValueError(f"{file}: word_embedding_dimension wants the model's width {width}, got {brief(found)}")
    if config.get("pooling_mode") is not None:
        return one_of(f"{file}: pooling_mode", config["pooling_mode"], MODES)
    modes = []
    for key, value in {"pooling_mode_mean_tokens": True, **config}.items():
        if not key.startswith("pooling_mode_"):
            continue
        if not isinstance(value, bool):
            raise ValueError(f"{file}: {brief(key)} wants true or false, got {brief(value)}")
        if value and key not in MODE_OF:
            known = " or ".join(MODE_OF)
            raise ValueError(f"{file} wants {known}, got {brief(key)}, which this library does not have")
        if value:
            modes.append(MODE_OF[key])
    if len(modes) != 1:
        raise ValueError(f"{file} wants one kind of pooling, got {', '.join(modes) or 'none'}")
    return modes[0]


def _read_transformer(folder: Path) -> tuple[int | None, bool]:
    """(the longest text in tokens or None, True for lower case), from the settings of the Transformer part."""
    files = [folder / name for name in TRANSFORMER if os.path.lexists(folder / name)]
    if not files:
        return None, False
    file = files[0]
    config = read_json(file)
    longest = config.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ValueError(f"{file}: max_seq_length wants a whole number of at least 1, got {brief(longest)}")
    lower_case = config.get("do_lower_case", False)
    if not isinstance(lower_case, bool):
        raise ValueError(f"{file}: do_lower_case wants true or false, got {brief(lower_case)}")
    for key in ARGUMENTS:
        if config.get(key):
            raise ValueError(f"{file}: {key} wants nothing, as this library does not have it, got {brief(config[key])}")
    return longest, lower_case


def _check_prompts(file: Path) -> None:
    """ValueError if every text would be read with words before it."""
    config: dict[str, Any] = read_json(file) if os.path.lexists(file) else {}
    name = config.get("default_prompt_name")
    if name is not None:
        raise ValueError(f"{file}: default_prompt_name wants null, as this library adds no prompts, got {brief(name)}")


def pooling_files(pooling: Pooling, width: int) -> dict[str, Any]:
    """{path below the directory: content as JSON values} of the files that describe this pooling. width: C."""
    parts = KINDS if pooling.normalize else KINDS[:2]
    paths = {"Transformer": "", "Pooling": POOLING, "Normalize": "2_Normalize"}
    modules = []
    for i, kind in enumerate(parts):
        modules.append(
            {"idx": i, "name": str(i), "path": paths[kind], "type": f"sentence_transformers.models.{kind}"})
    modes = {key: mode == pooling.mode for key, mode in MODE_OF.items()}
    others = {key: False for key in OTHER_MODES}
    transformer = {"max_seq_length": pooling.max_tokens, "do_lower_case": pooling.lower_case}
    return {
        f"{POOLING}/config.json": {"word_embedding_dimension": width, **modes, **others},
        TRANSFORMER[0]: transformer,
        MODULES: modules}
