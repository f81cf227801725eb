"""The facts of one forward pass, and the cache of keys and values.

    Context   ids, mask, task, cache ... of one pass. Made by the outermost call, `model(ids, mask=...)`, or by the
              caller; handed down to every module as the second argument; never stored on a module
    Cache     keys and values of earlier positions, for generation one token at a time
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from . import array, checks, ops
from .array import Array, xp
from .keywords import refuse_keywords
from .operands import as_booleans
from .tensor import Tensor

__all__ = ["Cache", "Context"]

# Keywords of other libraries that are no facts of a forward pass, and what to do in their place.
_GENERATE = "a call gives logits; text comes from generate(model, ids, max_new_tokens)"
_LOSS = "a call gives logits; the loss comes from fit and evaluate, or from ops.cross_entropy(logits, labels)"
_TARGET = "the ids of a call are the decoder's, model(ids, source_ids=...): source_ids is what the encoder reads"
_POSITIONS = "positions follow from the mask, so padding is not counted"
ELSEWHERE = {
    **dict.fromkeys(("labels", "label", "targets", "class_weight"), _LOSS),
    **dict.fromkeys(("max_new_tokens", "max_length", "temperature", "top_k", "top_p"), _GENERATE),
    **dict.fromkeys(("do_sample", "num_beams"), _GENERATE),
    **dict.fromkeys(("position_ids", "positions"), _POSITIONS),
    "return_dict": "a call gives one Tensor, the output of the model's head",
    "output_attentions": "attention weights are not kept; output_attention_scores=True keeps the scores before softmax",
    "inputs_embeds": "embeddings (B, T, C) stand in place of ids, model(embeddings)",
    "text": "encode the text first, tokenizer.encode(text).ids",
    **dict.fromkeys(("decoder_input_ids", "target_ids", "tgt"), _TARGET),
    "training": "dropout acts after model.train() if rng= is given",
}


class Context:
    """The facts of one forward pass.

    ids                   (B, T) integers
    mask                  (B, T), True at real tokens, False at padding. None: every token is real
    token_type_ids        (B, T), BERT's segment of each token. None: all 0
    logit_positions       flat indices, into (B·T,), of the positions at which logits are computed. None: all
    task                  (B,) task of each row
    route                 (B,) name of the adapter of each row
    source_ids            (B, Ts) integers: the text that an encoder-decoder's encoder reads. The pass makes `source`
    source_mask           (B, Ts), True at the real tokens of source_ids. None: all
    source                the Context of the encoder, for a decoder that attends to it; in the place of source_ids
    cache                 a Cache of earlier positions
    rng                   generator for dropout. Dropout acts only if it is given and the module is training
    output_hidden_states  True: `hidden_states` collects the input of the first block and every block's output
    output_attention_scores   True: `attention_scores(module)` gives the scores of an attention before the softmax

    A pass fills in:

    last_hidden_state     (B, T, C), the input of the head
    hidden_states         list of (B, T, C); empty unless output_hidden_states
    output                the value that the model returns
    losses                auxiliary losses by name, from `add_loss`. The encoder's and the decoder's Context share them
    scratch               a dict in which edits keep values for later edits of the same pass

    ids, mask and token_type_ids describe the positions of the activations (B, T, C). An edit that puts positions before
    them calls `prepend`.
    A mask may also hold the integers or floats 0 and 1. An unknown keyword raises TypeError.
    """

    FACTS = ("ids", "mask", "token_type_ids", "logit_positions", "task", "route", "source_ids", "source_mask", "source",
             "cache", "rng", "output_hidden_states", "output_attention_scores")

    def __init__(
        self,
        ids: Any = None,
        mask: Any = None,
        token_type_ids: Any = None,
        logit_positions: Any = None,
        task: Any = None,
        route: Any = None,
        source_ids: Any = None,
        source_mask: Any = None,
        source: Context | None = None,
        cache: Cache | None = None,
        rng: np.random.Generator | None = None,
        output_hidden_states: bool = False,
        output_attention_scores: bool = False,
        **unknown: Any,
    ):
        """Keep the facts as attributes of these names; the class describes them.

        TypeError for an unknown keyword, for a source, a cache, a generator or a flag of a wrong kind, and for a source
        in two forms. The other facts are checked by `begin`, when the ids are known."""
        if unknown:
            refuse_keywords("a forward pass", unknown, self.FACTS, ELSEWHERE)
        _check_kinds(source, cache, rng, output_hidden_states, output_attention_scores)
        if source is not None and (source_ids is not None or source_mask is not None):
            raise TypeError("a forward pass wants source= or source_ids=, got both")
        self.inputs = {                                        # as they were given, for `again`
            "ids": ids, "mask": mask, "token_type_ids": token_type_ids, "logit_positions": logit_positions,
            "task": task, "route": route, "source_ids": source_ids, "source_mask": source_mask, "source": source,
            "cache": cache, "rng": rng, "output_hidden_states": output_hidden_states,
            "output_attention_scores": output_attention_scores,
        }
        vars(self).update(self.inputs)
        self.position_shift = 0                                # added to every position: a prefix may set it
        self.last_hidden_state: Tensor | None = None
        self.hidden_states: list[Tensor] = []
        self.output: Any = None
        self.losses: dict[str, Tensor] = {} if source is None else source.losses         # shared with the encoder
        self.scratch: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this forward pass has no {name!r}: it knows {', '.join(self.FACTS)}")

    def need(self, fact: str) -> Any:
        """The fact. AttributeError, naming the keyword to pass, if it was not given."""
        value = vars(self).get(fact)
        if value is None:
            raise AttributeError(f"this forward pass needs {fact!r}: call model(ids, {fact}=...)")
        return value

    def again(self, **changes: Any) -> Context:
        """A new Context of the same batch, for a second pass (a teacher, the base). It has no generator: no dropout."""
        inputs = {**self.inputs, "rng": None, **changes}
        keeps_source = self.source is not None and inputs["source"] is self.source
        if keeps_source:                                       # the encoder runs again as well
            inputs["source"] = self.source.again()
        return Context(**inputs)

    def snapshot(self) -> Context:
        """A copy of this pass as it stands. What runs on the copy changes neither this Context nor its generator.

        The copy draws the random numbers that this pass draws from here on. A source is copied with it."""
        copied = copy.copy(self)
        copied.rng = copy.deepcopy(self.rng)
        copied.losses = dict(self.losses)
        copied.scratch = dict(self.scratch)
        copied.hidden_states = list(self.hidden_states)
        if self.source is not None:
            copied.source = self.source.snapshot()
            copied.source.losses = copied.losses               # shared, as in this pass
            if self.source.rng is self.rng:
                copied.source.rng = copied.rng
        return copied

    def rows(self, index: Array) -> Context:
        """A copy of a pass that has run, as the source of a decoder: its row i is row index[i] of this one.

        Beam search needs it: several beams have the same source."""
        copied = copy.copy(self)
        for fact in ("ids", "mask", "token_type_ids", "task", "last_hidden_state"):
            value = vars(self)[fact]
            if value is not None:
                setattr(copied, fact, value[index])
        copied.hidden_states = [x[index] for x in self.hidden_states]
        copied.scratch = {}
        return copied

    # ── filled in by the pass ──
    def add_loss(self, name: str, value: Tensor) -> None:
        """Add an auxiliary loss: a scalar, already weighted, without padding. Values of one name are summed."""
        checks.instance(f"add_loss({name!r})", value, Tensor, "a scalar Tensor")
        if value.size != 1:
            raise ValueError(f"add_loss({name!r}) wants a scalar, got shape {value.shape}")
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def add_hidden_state(self, x: Tensor) -> None:
        """Keep x (B, T, C) in `hidden_states`, if the caller asked for them."""
        if self.output_hidden_states:
            self.hidden_states.append(x)

    def add_attention_scores(self, module: Any, scores: Tensor, key_mask: Array | None) -> None:
        """Keep the scores (B, H, Tq, Tk) of an attention module, and its mask of keys (B, 1, 1, Tk).

        In scratch, so that recomputation knows them."""
        self.scratch["attention scores", module] = scores
        self.scratch["attention mask", module] = key_mask

    def attention_scores(self, module: Any) -> Tensor:
        """α q kᵀ of an attention module of this pass, (B, H, Tq, Tk), before mask and softmax.

        LookupError if the pass did not keep them."""
        scores = self.scratch.get(("attention scores", module))
        if scores is None:
            raise LookupError("attention_scores wants a pass with output_attention_scores=True that ran this module")
        return scores

    def attention_mask(self, module: Any) -> Array | None:
        """(B, 1, 1, Tk): True at the keys of an attention module that are no padding, a prefix included. None: all.

        LookupError as for attention_scores."""
        self.attention_scores(module)
        return self.scratch["attention mask", module]

    def begin(self, x: Any, like: Array) -> None:
        """Take x as the ids and move the facts to the device of the weights. A model's forward calls it first.

        x: (B, T) ids, or (B, T, C) embeddings in their place. like: an array of the weights, on the wanted device.
        An array on a device is not read, since that would wait for the device: its values are not checked.

        ValueError if x has another shape or no token, or if mask or token_type_ids are not (B, T) or hold other values
        than they may; TypeError for values of another kind, such as floats; IndexError for a logit position outside."""
        if isinstance(x, Tensor):                              # embeddings: the ids are unknown, −1 stands for them
            if x.ndim != 3:
                raise ValueError(f"{WANTED_IDS}, got a Tensor of shape {tuple(x.shape)}: ids are an array or lists")
            ids = xp(like).full(x.shape[:2], -1)
        else:
            ids = array.put_like(read_integers("ids", x, WANTED_IDS), like)
            if ids.dtype.kind == "u":                          # a soft prompt has the id −1
                ids = ids.astype(np.int64)
        if ids.ndim != 2:
            raise ValueError(f"{WANTED_IDS}, got shape {tuple(ids.shape)}")
        if ids.shape[1] == 0:
            raise ValueError(f"a model wants at least one token in a row, got ids of shape {tuple(ids.shape)}")
        self.inputs["ids"] = x                                 # for `again`
        self.ids = ids
        if self.mask is not None:
            self.mask = self._per_token("mask", array.put_like(read_mask("mask", self.mask), like, bool))
        if self.token_type_ids is not None:
            types = read_integers("token_type_ids", self.token_type_ids, WANTED_TYPES)
            self.token_type_ids = self._per_token("token_type_ids", array.put_like(types, like))
        if self.logit_positions is not None:
            positions = read_integers("logit_positions", self.logit_positions, WANTED_POSITIONS)
            check_range("logit position", positions, ids.size, f"the {ids.size} positions of the batch")
            self.logit_positions = array.put_like(positions, like)
        if self.task is not None:
            self.task = array.put_like(read_integers("task", self.task, WANTED_TASK), like)

    def _per_token(self, fact: str, value: Array) -> Array:
        """The value of a fact of shape (B, T). ValueError if its shape is not that of the ids."""
        if value.shape != self.ids.shape:
            raise ValueError(f"{fact} has shape {value.shape}, the ids {self.ids.shape}: both want one entry per token")
        return value

    # ── rows and positions ──
    def prepend(self, p: int) -> None:
        """Record that p positions of a soft prompt were put before the tokens of every row: mask True, id -1."""
        self.ids = _prepended(self.ids, p, value=-1)
        self.mask = _prepended(self.mask, p, value=True)
        self.token_type_ids = _prepended(self.token_type_ids, p, value=0)

    @property
    def past_length(self) -> int:
        """The number of positions that the cache holds."""
        return 0 if self.cache is None else self.cache.length

    def key_mask(self) -> Array | None:
        """(B, Tk), True at real keys, False at padding. None: all keys are real.

        Tk counts the keys that the cache holds, which come first, and the T tokens of this pass."""
        past = None if self.cache is None else self.cache.mask
        if self.past_length == 0 or (past is None and self.mask is None):
            return self.mask
        m = xp(self.ids)
        B, T = self.ids.shape
        if past is None:
            past = m.ones((B, self.past_length), dtype=bool)
        present = m.ones((B, T), dtype=bool) if self.mask is None else self.mask
        return m.concatenate([past, present], axis=1)

    def positions(self, first: int = 0) -> Array:
        """(B, T) or (1, T): first + position_shift + the position of each token among the real tokens of its row.

        Padding is not counted, so left and right padding give the same positions. Cached tokens are counted first.
        position_shift is 0 unless an edit sets it: a prefix that takes positions."""
        m = xp(self.ids)
        T = self.ids.shape[1]
        key_mask = self.key_mask()
        if key_mask is None:
            start = self.past_length + self.position_shift + first
            return m.arange(start, start + T)[None]
        counts = m.cumsum(key_mask.astype(np.int64), axis=1)     # (B, Tk): real keys so far, cached ones included
        # The last T keys are the tokens of this pass. Padding before the first real token gets position 0.
        return m.maximum(counts - 1, 0)[:, -T:] + (self.position_shift + first)

    def select_positions(self, x: Tensor) -> Tensor:
        """x at the `logit_positions`: (B, T, C) -> (n, C). x itself if logits are computed at every position."""
        if self.logit_positions is None:
            return x
        return x.reshape(-1, x.shape[-1])[self.logit_positions]


# ── facts as they were given ─────────────────────────────────────────────────────────────────────────────────────────
WANTED_IDS = "a model wants ids of shape (B, T) or embeddings (B, T, C)"
WANTED_TYPES = "token_type_ids wants integers of the shape of the ids"
WANTED_POSITIONS = "logit_positions wants integers, flat indices into (B·T,)"
WANTED_TASK = "task wants integers of shape (B,)"


def _check_kinds(
    source: Any, cache: Any, rng: Any, output_hidden_states: Any, output_attention_scores: Any,
) -> None:
    """TypeError for a fact of a wrong kind, such as cache=True."""
    if source is not None:
        checks.instance("source", source, Context, "the Context of an encoder's pass")
    if cache is not None:
        checks.instance("cache", cache, Cache, "a Cache()")
    if rng is not None and not callable(getattr(rng, "integers", None)):
        checks.random_generator("rng", rng)
    if output_hidden_states is not False:
        checks.flag("output_hidden_states", output_hidden_states)
    if output_attention_scores is not False:
        checks.flag("output_attention_scores", output_attention_scores)


def read_integers(name: str, value: Any, wanted: str) -> Array:
    """An array or nested lists of integers as an array, where it lies. An empty list is an empty array of integers.

    wanted: the sentence's beginning, "ids wants ...". ValueError for lists of different lengths; TypeError for text,
    None and values that are no integers."""
    a = _read_array(name, value, wanted)
    if a.size == 0 and isinstance(value, (list, tuple)):
        return a.astype(np.int64)
    if a.dtype.kind not in "iu":
        if name == "ids":
            raise TypeError(f"token ids are integers; got {a.dtype}")
        raise TypeError(f"{wanted}, got {a.dtype} values")
    return a


def read_mask(name: str, value: Any) -> Array:
    """A mask as an array of booleans, where it lies: True, or the number 1, where a token is real.

    ValueError for other numbers than 0 and 1, TypeError for other values. The numbers of an array on a device are not
    checked: there, every number but 0 is True."""
    wanted = f"{name} wants True or 1 at real tokens, False or 0 at padding"
    return as_booleans(_read_array(name, value, wanted), wanted)


def _read_array(name: str, value: Any, wanted: str) -> Array:
    """An array, or lists of numbers as a NumPy array. TypeError for another value, ValueError for ragged lists."""
    if array.is_array(value):
        return value
    if value is None or isinstance(value, (str, bytes, dict, set, Tensor)):
        hint = ": encode it first, tokenizer.encode(text).ids" if name == "ids" and isinstance(value, str) else ""
        raise TypeError(f"{wanted}, got {checks.brief(value)}{hint}")
    try:
        a = np.asarray(value)
    except ValueError:                                         # lists of different lengths
        raise ValueError(f"{wanted}, got rows of different lengths: pad them, and give a mask") from None
    return a


def check_range(what: str, values: Any, count: int, of: str) -> None:
    """IndexError unless all values are in 0 ... count − 1. Only a host array is checked: reading waits for a device.

    what: one value in words; of: the values that there are: "token id 9 is outside the vocabulary of 7"."""
    if not isinstance(values, np.ndarray) or values.size == 0:
        return
    smallest = values.min()
    if smallest < 0 or values.max() >= count:
        wrong = smallest if smallest < 0 else values.max()
        raise IndexError(f"{what} {wrong} is outside {of}")


def _prepended(a: Array | None, p: int, value: Any) -> Array | None:
    """a, (B, T), with p columns of one value put before it: (B, p + T)."""
    if a is None:
        return None
    m = xp(a)
    return m.concatenate([m.full((len(a), p), value, a.dtype), a], axis=1)


class Cache:
    """Keys and values of earlier positions, for each attention module.

    kv      {module: (keys, values)} of self-attention, each (B, H, T, D). T grows with each pass
    source  {module: (keys, values)} of cross-attention, computed from the encoder's output in the first pass
    mask    (B, T), True at real positions. None: all positions are real
    length  T
    """

    def __init__(self) -> None:
        self.kv: dict[Any, tuple[Tensor, Tensor]] = {}
        self.source: dict[Any, tuple[Tensor, Tensor]] = {}
        self.mask: Array | None = None
        self.length = 0

    def join(self, key: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) to the cached ones of an attention module; return all, (B, H, Tk, D).

        key: the module whose keys and values they are. Others keep their own."""
        if key in self.kv:
            past_k, past_v = self.kv[key]
            k = ops.concatenate(past_k, k, axis=2)
            v = ops.concatenate(past_v, v, axis=2)
        self.kv[key] = k, v
        return k, v

    def once(self, key: Any, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The keys and values of the cross-attention module `key`: computed in the first pass, then reused."""
        if key not in self.source:
            self.source[key] = compute()
        return self.source[key]

    def advance(self, ctx: Context) -> None:
        """End a pass: its positions become earlier positions."""
        self.mask = ctx.key_mask()
        self.length += ctx.ids.shape[1]

    def rows(self, index: Array) -> Cache:
        """A new cache whose row i is row index[i] of this one. Beam search needs it: beams are reordered."""
        out = self.reordered(index)
        out.source = {key: (k[index], v[index]) for key, (k, v) in self.source.items()}
        return out

    def reordered(self, index: Array) -> Cache:
        """The same, where rows only change places with rows of the same source: its keys and values stay."""
        out = Cache()
        out.kv = {key: (k[index], v[index]) for key, (k, v) in self.kv.items()}
        out.source = self.source
        out.mask = None if self.mask is None else self.mask[index]
        out.length = self.length
        return out
