"""Write a LoRA as PEFT's files, and read it from them.

    module             tensors in PEFT                                                 here
    a linear map       lora_A.weight (r, in), lora_B.weight (out, r)                   A and B
    an embedding       lora_embedding_A (r, V), lora_embedding_B (C, r)                Bᵀ and Aᵀ

GPT-2's c_attn is a fused module: one map in transformers, three maps q, k and v here. PEFT has one A and one B for it.
Here each of the three maps has its own factors. To write, we join them:

    [q k v] + s [B_q A_q x, B_k A_k x, B_v A_v x]  =  [q k v] + s diag(B_q, B_k, B_v) [A_q; A_k; A_v] x

The rank in the file is the sum of the three ranks. alpha is multiplied by the same factor, so that s = alpha/r stays.
To read, q, k and v each get the whole A of c_attn and their rows of its B. If that B is block-diagonal, each of them
gets only its own block of B and the rows of A that belong to it.

The scale s is alpha/r, or alpha/√r with use_rslora. In PEFT each module may have its own rank and scale. A LoRA here
has one rank and one scale. So smaller ranks are padded with columns of zeros in B, which change nothing, and B is
multiplied by the ratio of the scales.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import array, edit
from ..checks import brief, number, whole
from ..edit import Attached, Edit
from ..formats.directory import first_names
from ..methods.reparameterized.lora import LoRA, LowRankWeight, initial_factors
from ..nn import Embedding, Linear, Module
from .exchange import Values, compact_targets
from .names import ModuleNames, NamedModule
from .peft_config import FILE, chosen_modules, is_part, pattern_values, read_number, read_whole

__all__ = ["read_lora", "write_lora"]

PREFIX = "base_model.model."
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
BASE = "base_layer.weight"                               # of an embedding with a LoRA, PEFT also saves its own weight
# All ranks are padded to the largest one. The padded factors may have at most so many times the numbers of the file.
MOST_FILLING = 16


@dataclass(frozen=True)
class Factors:
    """The LoRA of one map: W + (alpha/r) B A.    A (r, in), B (out, r) on the host"""
    A: np.ndarray
    B: np.ndarray
    alpha: float

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    @property
    def s(self) -> float:
        """The scale alpha/r."""
        return self.alpha / self.r


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def write_lora(model: Module, names: ModuleNames, a: Attached) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(entries of adapter_config.json, tensors) of an attached LoRA.

    ValueError for an edit of a module that transformers does not have, and of a classifier: PEFT trains it whole."""
    factors = _factors_by_module(model, names, a)
    tied = names.tied_head(model)                        # (output layer in transformers, embedding here), or None
    tensors = {}
    ranks = {}                                           # {module of transformers: (r, alpha)}
    for name, (f, is_embedding) in factors.items():
        kinds = EMBEDDING if is_embedding else LINEAR
        first, second = (f.B.T, f.A.T) if is_embedding else (f.A, f.B)
        tensors |= {f"{PREFIX}{name}.{kinds[0]}": first, f"{PREFIX}{name}.{kinds[1]}": second}
        ranks[name] = (f.r, f.alpha)
        if tied is not None and names.of_path(tied[1]).name == name:
            head = tied[0]                               # here it uses the changed embedding; PEFT wants a second LoRA
            tensors |= {f"{PREFIX}{head}.{LINEAR[0]}": f.A, f"{PREFIX}{head}.{LINEAR[1]}": f.B}
            ranks[head] = ranks[name]
    (r, alpha), _ = Counter(ranks.values()).most_common(1)[0]                    # others go into the two patterns
    every = [module.name for module in names.modules] + ([tied[0]] if tied else [])
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _plain(alpha),
        "lora_dropout": float(a.method.dropout),
        "target_modules": _short_names(list(ranks), every),
        "bias": "none",
        "fan_in_fan_out": any(module.transposed for module in names.modules),
        "rank_pattern": {name: own_r for name, (own_r, _) in ranks.items() if own_r != r},
        "alpha_pattern": {name: _plain(own) for name, (_, own) in ranks.items() if own != alpha},
    }
    return config, tensors


def _plain(alpha: float) -> float | int:
    """alpha as a whole number where it is one, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else float(alpha)


def _factors_by_module(model: Module, names: ModuleNames, a: Attached) -> dict[str, tuple[Factors, bool]]:
    """{module of transformers: (its factors, True for an embedding)} of all edits of a LoRA."""
    parts: dict[str, dict[str, Edit]] = {}               # {module of transformers: {path here: edit}}
    trained_whole = {name.rpartition(".")[0] for name in names.new_head(model)}
    for path, e in a.edits.items():
        module = names.of_path(path)
        if module is None or path in trained_whole:
            raise ValueError(f"PEFT has no LoRA on {path} of this model: a classifier trains whole; "
                             "keep the adapter with tinyft.save_adapter")
        parts.setdefault(module.name, {})[path] = e
    out = {}
    for name, edits in parts.items():
        module = names.of_path(next(iter(edits)))
        own = {path: Factors(array.asnumpy(e.A.data), array.asnumpy(e.B.data), e.alpha) for path, e in edits.items()}
        is_embedding = isinstance(next(iter(edits.values())), LowRankWeight)
        out[name] = (fuse(module, own), is_embedding)
    return out


def fuse(module: NamedModule, own: dict[str, Factors]) -> Factors:
    """The factors of a module of transformers, from those of its parts here.

    own: {path: factors} of the parts that have a LoRA. They have the same rank and scale, since one LoRA made them. If
    all parts have a LoRA and the same A, as after load_peft, this A is written once."""
    present = [own[path] for path in module.paths if path in own]
    first = present[0]
    if len(module.paths) == 1:
        return first
    rows = first.B.shape[0]
    shared = len(present) == len(module.paths) and all(np.array_equal(f.A, first.A) for f in present)
    if shared:
        return Factors(first.A, np.concatenate([f.B for f in present]), first.alpha)
    A = np.concatenate([f.A for f in present])                                   # (Σ r, in)
    B = np.zeros((rows * len(module.paths), len(A)), first.B.dtype)              # (parts · out, Σ r)
    column = 0
    for i, path in enumerate(module.paths):
        if path in own:
            B[i * rows:(i + 1) * rows, column:column + own[path].r] = own[path].B
            column += own[path].r
    return Factors(A, B, first.alpha * len(A) / first.r)                         # the same scale alpha/r


def _short_names(chosen: list[str], every: list[str]) -> list[str]:
    """target_modules: for each chosen module the shortest suffix of its name that only chosen modules have.

    "c_attn" is a suffix of "transformer.h.0.attn.c_attn", and stands for the modules of all blocks. So a suffix with a
    block number is not taken; if there is no other, the whole name is."""
    targets: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        for i in range(len(parts) - 1, -1, -1):
            suffix = ".".join(parts[i:])
            matching = {other for other in every if f".{other}".endswith(f".{suffix}")}
            has_number = any(part.isdecimal() for part in parts[i:])
            if matching <= set(chosen) and (i == 0 or not has_number):
                targets[suffix] = None
                break
    return list(targets)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_lora(model: Module, names: ModuleNames, config: dict[str, Any],
              tensors: dict[str, np.ndarray]) -> tuple[LoRA, Values]:
    """(LoRA, {path: {"A": ..., "B": ...}}) from the entries of adapter_config.json and the tensors.

    tensors: without those of a new head. ValueError for a module with tensors that the config does not choose, and for
    a chosen module without tensors."""
    found = _by_module(names, tensors)
    _check_chosen(model, names, config, found)
    _check_base_weights(model, names, found)
    factors = _without_tied_head(model, names, _read_factors(config, found))
    by_path: dict[str, Factors] = {}
    for module, f in factors.items():
        paths = names.of_name(module).paths
        if len(paths) == 1:
            is_embedding = isinstance(edit.base_modules(model)[paths[0]], Embedding)
            by_path[paths[0]] = Factors(f.B.T, f.A.T, f.alpha) if is_embedding else f
        else:
            by_path |= split_fused(module, f, paths)
    return as_one_lora(model, config, by_path)


def _by_module(names: ModuleNames, tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{module: {kind: array}} of tensors such as base_model.model.transformer.h.0.attn.c_attn.lora_A.weight.

    ValueError for a name of another form."""
    found: dict[str, dict[str, np.ndarray]] = {}
    unexpected = []
    for name, a in tensors.items():
        kind = next((kind for kind in (*LINEAR, *EMBEDDING, BASE) if name.endswith(f".{kind}")), None)
        if kind is None or not name.startswith(PREFIX):
            unexpected.append(name)
            continue
        module = name.removeprefix(PREFIX).removesuffix(f".{kind}")
        found.setdefault(module, {})[kind] = a
    if unexpected:
        raise ValueError(f"the tensors are not those of a LoRA of this model: unexpected {first_names(unexpected)}")
    return found


def _check_chosen(model: Module, names: ModuleNames, config: dict[str, Any],
                  found: dict[str, dict[str, np.ndarray]]) -> None:
    """ValueError unless the modules with tensors are the modules that the config chooses.

    PEFT would ignore the tensors of the others without a word."""
    tied = names.tied_head(model)
    heads = [tied[0]] if tied else []
    # An adapter that was saved from a class without a head, such as GPT2Model, has names without the class's prefix.
    is_plain = all(module in heads or module in names.table_names for module in found)
    modules = [module.table_name if is_plain else module.name for module in names.modules]
    if names.plan.head == "mlm":                         # transformers' masked language model has no pooler
        modules = [name for name in modules if not is_part(name, "pooler")]
    own = edit.base_modules(model)                       # {path here: module}
    # target_modules "all-linear" stands for every linear map but the output layer.
    output_layers = {tensor.rpartition(".")[0] for tensor in names.new_head(model).values()} | {"lm_head"}
    linear = {name for name in modules if isinstance(own[names.of_name(name).paths[0]], Linear)}
    chosen = chosen_modules(config, [*modules, *heads], linear - output_layers)
    # With this entry, a LoRA on a tied embedding stands for one on the output layer, too.
    if config.get("ensure_weight_tying") and tied and names.of_path(tied[1]).name in chosen:
        chosen.add(tied[0])
    unknown = [module for module in found if module not in {*modules, *heads}]
    missing = [module for module in chosen if module not in found]
    unexpected = [module for module in found if module not in chosen and module not in unknown]
    faults = []
    if unknown:
        faults.append(f"this model has no {first_names(unknown)}")
    if missing:
        faults.append(f"target_modules chooses {first_names(sorted(missing))}, which has no tensors")
    if unexpected:
        faults.append(f"target_modules does not choose {first_names(unexpected)}, which has tensors")
    if not found:
        faults.append("it holds no LoRA")
    if faults:
        raise ValueError(f"the adapter does not fit this model: {'; '.join(faults)}")


def _read_factors(config: dict[str, Any], found: dict[str, dict[str, np.ndarray]]) -> dict[str, Factors]:
    """{module: factors}, with the scale of each. ValueError for shapes that contradict each other or the config."""
    r = read_whole(config, "r", 8)                       # 8 is PEFT's default, here and below
    alpha = read_number(config, "lora_alpha", 8)
    rslora = config.get("use_rslora")
    if rslora not in (None, True, False):
        raise ValueError(f"{FILE}: use_rslora wants true or false, got {brief(rslora)}")
    ranks = pattern_values(config, "rank_pattern", found)
    alphas = pattern_values(config, "alpha_pattern", found)
    factors = {}
    for module, kinds in found.items():
        present = {kind for kind in kinds if kind != BASE}
        if present not in (set(LINEAR), set(EMBEDDING)):
            wanted = " and ".join(EMBEDDING if present & set(EMBEDDING) else LINEAR)
            raise ValueError(f"{module} wants {wanted}, got {first_names(sorted(kinds))}")
        first, second = [kinds[kind] for kind in (LINEAR if LINEAR[0] in kinds else EMBEDDING)]
        own_r = whole(f"{FILE}: rank_pattern", ranks.get(module, r), least=1)
        own_alpha = number(f"{FILE}: alpha_pattern", alphas.get(module, alpha))
        if first.ndim != 2 or second.ndim != 2 or len(first) != own_r or second.shape[1] != own_r:
            raise ValueError(f"{module} wants factors (r, in) and (out, r) of the rank {own_r}, "
                             f"got the shapes {first.shape} and {second.shape}")
        if rslora:
            own_alpha = own_alpha * own_r**0.5           # Factors divide by r, and rsLoRA by √r
        factors[module] = Factors(first, second, own_alpha)
    return factors


def _check_base_weights(model: Module, names: ModuleNames, found: dict[str, dict[str, np.ndarray]]) -> None:
    """ValueError unless the embeddings in the file equal this model's. PEFT would replace the model's by them."""
    for module, kinds in found.items():
        if BASE in kinds and names.differs_from_base(model, f"{module}.weight", kinds[BASE]):
            raise ValueError(f"the file holds a weight of {module} that differs from this model's: "
                             "the adapter was trained on another base, or with more tokens")


def _without_tied_head(model: Module, names: ModuleNames, factors: dict[str, Factors]) -> dict[str, Factors]:
    """The factors without those of a tied output layer.

    Here a tied output layer uses the embedding's weight with its LoRA. In PEFT the embedding and the output layer have
    a LoRA each. ValueError unless both are in the file, with the same update, or neither."""
    tied = names.tied_head(model)
    if tied is None:
        return factors
    head, path = tied
    others = {module: f for module, f in factors.items() if module != head}
    on_embedding = [f for module, f in others.items() if path in names.of_name(module).paths]    # none or one
    on_head = [factors[head]] if head in factors else []
    for f, g in zip(on_embedding, on_head, strict=False):
        # f has the orientation of an embedding, (r, V) and (C, r); g that of a linear map, (r, C) and (V, r).
        if f.s == g.s and np.array_equal(f.A.T, g.B) and np.array_equal(f.B.T, g.A):
            return others
    if on_embedding or on_head:
        raise ValueError(f"this model's output layer {head} is its embedding: wanted a LoRA with the same update on "
                         f"both, got one on {'one of them' if not (on_embedding and on_head) else 'each'}")
    return factors


def split_fused(module: str, f: Factors, paths: tuple[str, ...]) -> dict[str, Factors]:
    """{path: factors} of the parts of a fused module, such as GPT-2's c_attn.

    Each part gets its rows of B. If B is block-diagonal, as `fuse` makes it, a part gets only its block and the rows of
    A that belong to it, and a part whose rows are all zero gets no factors. Otherwise every part gets the whole A."""
    if len(f.B) % len(paths):
        raise ValueError(f"{module} wants a lora_B for {len(paths)} maps of one size, got {len(f.B)} rows")
    blocks = dict(zip(paths, np.split(f.B, len(paths)), strict=True))
    used = {path: np.flatnonzero(B.any(axis=0)) for path, B in blocks.items()}   # the columns that are not all zero
    present = [path for path in paths if len(used[path])]
    width = f.r // max(len(present), 1)                  # the rank of a part
    is_diagonal = bool(present) and width * len(present) == f.r
    for i, path in enumerate(present):
        is_diagonal = is_diagonal and i * width <= used[path][0] and used[path][-1] < (i + 1) * width
    if not is_diagonal:
        return {path: Factors(f.A, B, f.alpha) for path, B in blocks.items()}
    out = {}
    for i, path in enumerate(present):
        columns = slice(i * width, (i + 1) * width)
        out[path] = Factors(f.A[columns], blocks[path][:, columns], f.alpha / len(present))      # the same alpha/r
    return out


def as_one_lora(model: Module, config: dict[str, Any], by_path: dict[str, Factors]) -> tuple[LoRA, Values]:
    """A LoRA of one rank and one scale, and its values, from factors {path: factors} of several ranks and scales.

    The rank is the largest one. Smaller factors are padded: B with columns of zeros, which change nothing. The scale is
    the most frequent one. Where the scale differs, B is multiplied by the ratio of the two. If all ranks and scales are
    equal, all values stay as they are."""
    r = max(f.r for f in by_path.values())
    stored = sum(f.A.size + f.B.size for f in by_path.values())
    filled = sum((f.A.size + f.B.size) // f.r * r for f in by_path.values())
    if filled > MOST_FILLING * stored:
        raise ValueError(f"{FILE}: rank_pattern gives ranks up to {r}; wanted ranks that differ less, since this "
                         "library's LoRA has one rank for all modules")
    # Factors with alpha = 0 change nothing with any scale. They count only if there are no others.
    kinds = Counter((f.r, f.alpha) for f in by_path.values() if f.alpha) or Counter([(r, 0.0)])
    (own_r, own_alpha), _ = kinds.most_common(1)[0]
    alpha = own_alpha if own_r == r else own_alpha * r / own_r                   # the scale own_alpha/own_r, for rank r
    # The added rows of A are random, as in a new LoRA: with zeros in both A and B they could not train.
    rng = np.random.default_rng(0)
    values: Values = {}
    for path, f in by_path.items():
        A, B = f.A, f.B
        if (f.r, f.alpha) != (r, alpha):
            wide = np.promote_types(B.dtype, np.float32)
            ratio = f.s * r / alpha if alpha else 1.0
            first_A, zero_B = initial_factors(A.shape[1], len(B), r, rng)
            A, B = first_A.astype(wide), zero_B.astype(wide)
            A[:f.r] = f.A
            with np.errstate(over="ignore"):             # an overflow gives infinity, which load_peft refuses
                B[:, :f.r] = f.B.astype(wide) * ratio
        values[path] = {"A": A, "B": B}
    dropout = read_number(config, "lora_dropout", 0.0, low=0, below=1)
    return LoRA(r=r, alpha=alpha, dropout=dropout, targets=compact_targets(model, list(by_path))), values
