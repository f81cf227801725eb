"""LoRA in PEFT's files, both ways.

    a linear map       lora_A.weight (r, in), lora_B.weight (out, r)                   our A and B
    an embedding       lora_embedding_A (r, V), lora_embedding_B (C, r)                our Bᵀ and Aᵀ
    GPT-2's c_attn     one A for q, k and v. Our three have an A each:

        [q k v] + s [B_q A_q x, B_k A_k x, B_v A_v x]  =  [q k v] + s diag(B_q, B_k, B_v) [A_q; A_k; A_v] x

    so r is the sum of the three ranks, and alpha grows by the same factor. The other way, q, k and v each get the A of
    c_attn and their part of its B; zero blocks of a block-diagonal B are cut off again.

A scale s = alpha/r, or alpha/√r with use_rslora. PEFT may have another rank and scale in each module. Our LoRA has one
rank: the smaller ones are filled up with columns of zeros in B, which change nothing, and B takes up the scale.
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
BASE = "base_layer.weight"                               # PEFT saves the embedding that a LoRA is on, too
# A rank may be filled up to so many times the numbers in the file: one large rank in a file of small ones.
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

    ValueError for an edit of a module that transformers does not have, or that PEFT trains whole: a classifier."""
    factors = _factors_by_module(model, names, a)
    tied = names.tied_head(model)
    tensors = {}
    ranks = {}
    for name, (f, is_embedding) in factors.items():
        kinds = EMBEDDING if is_embedding else LINEAR
        first, second = (f.B.T, f.A.T) if is_embedding else (f.A, f.B)
        tensors |= {f"{PREFIX}{name}.{kinds[0]}": first, f"{PREFIX}{name}.{kinds[1]}": second}
        ranks[name] = (f.r, f.alpha)
        if tied is not None and names.of_path(tied[1]).name == name:
            head = tied[0]                               # it reads the changed embedding; in PEFT it has its own LoRA
            tensors |= {f"{PREFIX}{head}.{LINEAR[0]}": f.A, f"{PREFIX}{head}.{LINEAR[1]}": f.B}
            ranks[head] = ranks[name]
    (r, alpha), _ = Counter(ranks.values()).most_common(1)[0]
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
    parts: dict[str, dict[str, Edit]] = {}               # module of transformers: {path here: edit}
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
    """The factors of a module of transformers from those of its parts here, {path: factors}; some may have none.

    All parts have one scale and rank: they are of one LoRA. If all parts have the same A, as after load_peft, it stays
    one."""
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
    return Factors(A, B, first.alpha * len(A) / first.r)


def _short_names(chosen: list[str], every: list[str]) -> list[str]:
    """target_modules: for each chosen module its shortest end that no other module has, or else the whole name.

    An end has no block number, so that "c_attn" stands for all blocks."""
    targets: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        for i in range(len(parts) - 1, -1, -1):
            end = ".".join(parts[i:])
            same = [other for other in every if f".{other}".endswith(f".{end}")]
            if set(same) <= set(chosen) and (i == 0 or not any(part.isdecimal() for part in parts[i:])):
                targets[end] = None
                break
    return list(targets)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_lora(model: Module, names: ModuleNames, config: dict[str, Any],
              tensors: dict[str, np.ndarray]) -> tuple[LoRA, Values]:
    """(LoRA, {path: {"A": ..., "B": ...}}) from the entries of adapter_config.json and the tensors.

    tensors: without those of a head. ValueError for tensors that the config does not ask for, and for missing ones."""
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
    """ValueError unless the modules with tensors are those that the config chooses: PEFT drops the others silently."""
    tied = names.tied_head(model)
    heads = [tied[0]] if tied else []
    # Saved from a class without a head, such as GPT2Model: its names have no prefix.
    is_plain = all(module in heads or module in names.table_names for module in found)
    modules = [module.table_name if is_plain else module.name for module in names.modules]
    if names.plan.head == "mlm":                         # transformers' masked language model has no pooler
        modules = [name for name in modules if not is_part(name, "pooler")]
    own = edit.base_modules(model)
    output_layers = {tensor.rpartition(".")[0] for tensor in names.new_head(model).values()} | {"lm_head"}
    linear = {name for name in modules if isinstance(own[names.of_name(name).paths[0]], Linear)}
    chosen = chosen_modules(config, [*modules, *heads], linear - output_layers)
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
    r = read_whole(config, "r", 8)
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
        factors[module] = Factors(first, second, own_alpha * own_r**0.5 if rslora else own_alpha)
    return factors


def _check_base_weights(model: Module, names: ModuleNames, found: dict[str, dict[str, np.ndarray]]) -> None:
    """ValueError unless the embeddings that PEFT saved are this model's: PEFT would put them in their place."""
    for module, kinds in found.items():
        if BASE in kinds and names.differs_from_base(model, f"{module}.weight", kinds[BASE]):
            raise ValueError(f"the file holds a weight of {module} that differs from this model's: "
                             "the adapter was trained on another base, or with more tokens")


def _without_tied_head(model: Module, names: ModuleNames, factors: dict[str, Factors]) -> dict[str, Factors]:
    """The factors without those of a tied output layer.

    Our tied output layer reads the weight of the embedding with its LoRA. In PEFT each of the two has its own.
    ValueError unless both are in the file, with the same update, or neither."""
    tied = names.tied_head(model)
    if tied is None:
        return factors
    head, path = tied
    others = {module: f for module, f in factors.items() if module != head}
    on_embedding = [f for module, f in others.items() if path in names.of_name(module).paths]
    on_head = [factors[head]] if head in factors else []
    for f, g in zip(on_embedding, on_head, strict=False):
        if f.s == g.s and np.array_equal(f.A.T, g.B) and np.array_equal(f.B.T, g.A):
            return others
    if on_embedding or on_head:
        raise ValueError(f"this model's output layer {head} is its embedding: wanted a LoRA with the same update on "
                         f"both, got one on {'one of them' if not (on_embedding and on_head) else 'each'}")
    return factors


def split_fused(module: str, f: Factors, paths: tuple[str, ...]) -> dict[str, Factors]:
    """{path: factors} of the parts of a fused module, such as GPT-2's c_attn.

    Each part has its rows of B. If B is block-diagonal, as `fuse` makes it, each part keeps its block only, and a part
    without a block has no factors; otherwise every part has the whole A."""
    if len(f.B) % len(paths):
        raise ValueError(f"{module} wants a lora_B for {len(paths)} maps of one size, got {len(f.B)} rows")
    blocks = dict(zip(paths, np.split(f.B, len(paths)), strict=True))
    used = {path: np.flatnonzero(B.any(axis=0)) for path, B in blocks.items()}   # columns with a number that is not 0
    present = [path for path in paths if len(used[path])]
    width = f.r // max(len(present), 1)
    is_diagonal = bool(present) and width * len(present) == f.r
    for i, path in enumerate(present):
        is_diagonal = is_diagonal and i * width <= used[path][0] and used[path][-1] < (i + 1) * width
    if not is_diagonal:
        return {path: Factors(f.A, B, f.alpha) for path, B in blocks.items()}
    out = {}
    for i, path in enumerate(present):
        columns = slice(i * width, (i + 1) * width)
        out[path] = Factors(f.A[columns], blocks[path][:, columns], f.alpha / len(present))
    return out


def as_one_lora(model: Module, config: dict[str, Any], by_path: dict[str, Factors]) -> tuple[LoRA, Values]:
    """A LoRA of one rank and scale, and its values, from factors of several.

    The rank is the largest; B has columns of zeros up to there, which change nothing. The scale is the most frequent
    one; elsewhere B takes up the difference. With one rank and scale all values stay as they are."""
    r = max(f.r for f in by_path.values())
    stored = sum(f.A.size + f.B.size for f in by_path.values())
    filled = sum((f.A.size + f.B.size) // f.r * r for f in by_path.values())
    if filled > MOST_FILLING * stored:
        raise ValueError(f"{FILE}: rank_pattern gives ranks up to {r}; wanted ranks that differ less, since this "
                         "library's LoRA has one rank for all modules")
    kinds = Counter((f.r, f.alpha) for f in by_path.values() if f.alpha) or Counter([(r, 0.0)])
    (own_r, own_alpha), _ = kinds.most_common(1)[0]
    alpha = own_alpha if own_r == r else own_alpha * r / own_r
    rng = np.random.default_rng(0)                       # of further rows of A: B is 0 there, but may train
    values: Values = {}
    for path, f in by_path.items():
        A, B = f.A, f.B
        if (f.r, f.alpha) != (r, alpha):
            wide = np.promote_types(B.dtype, np.float32)
            ratio = f.s * r / alpha if alpha else 1.0
            first_A, zero_B = initial_factors(A.shape[1], len(B), r, rng)
            A, B = first_A.astype(wide), zero_B.astype(wide)
            A[:f.r] = f.A
            with np.errstate(over="ignore"):             # refused as not finite
                B[:, :f.r] = f.B.astype(wide) * ratio
        values[path] = {"A": A, "B": B}
    dropout = read_number(config, "lora_dropout", 0.0, low=0, below=1)
    return LoRA(r=r, alpha=alpha, dropout=dropout, targets=compact_targets(model, list(by_path))), values
