"""The facts of one forward pass, and the cache of keys and values.

    Context   ids, mask, task, cache ... of one pass. Made by the outermost call, `model(ids, mask=...)`, or by the
              caller; handed down to every module as the second argument; never stored on a module
    Cache     keys and values of earlier positions, for generation one token at a time
"""
from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import array, operands, ops
from .array import Array, xp
from .tensor import Tensor

__all__ = ["Cache", "Context", "refuse_keywords"]

# Keywords of other libraries, and their names here.
SYNONYMS = {
    "attention_mask": "mask", "key_padding_mask": "mask", "input_ids": "ids", "inputs_embeds": "ids",
    "segment_ids": "token_type_ids", "types": "token_type_ids", "at": "logit_positions",
    "task_ids": "task", "adapter_names": "route", "encoder_outputs": "source", "generator": "rng",
    "past_key_values": "cache", "use_cache": "cache", "return_hidden_states": "output_hidden_states",
}


def refuse_keywords(caller: str, unknown: Iterable[str], known: Iterable[str],
                    synonyms: dict[str, str] = SYNONYMS) -> None:
    """Raise TypeError if there is an unknown keyword; the message names the nearest known keyword.

    caller     the function or class that got them, for the message
    synonyms   {another library's name: the name here}; used only if the name here is in `known`"""
    for keyword in unknown:
        known = sorted(known)
        near = synonyms.get(keyword)
        if near not in known:
            near = next(iter(difflib.get_close_matches(keyword, known, 1, 0.6)), None)
        hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(known) or 'no keywords'}"
        raise TypeError(f"{caller} got an unknown keyword {keyword!r}: {hint}")


class Context:
    """The facts of one forward pass.

    ids                   (B, T) integers
    mask                  (B, T), True at real tokens, False at padding. None: every token is real
    token_type_ids        (B, T), BERT's segment of each token. None: all 0
    logit_positions       flat indices, into (B·T,), of the positions at which logits are computed. None: all
    task                  (B,) task of each row
    route                 (B,) name of the adapter of each row
    source                the Context of the encoder, for a decoder that attends to it
    cache                 a Cache of earlier positions
    rng                   generator for dropout. Dropout acts only if it is given and the module is training
    output_hidden_states  True: `hidden_states` collects the input of the first block and every block's output

    A pass fills in:

    last_hidden_state     (B, T, C), the input of the head
    hidden_states         list of (B, T, C); empty unless output_hidden_states
    output                the value that the model returns
    losses                auxiliary losses by name, from `add_loss`. The encoder's and the decoder's Context share them
    scratch               a dict in which edits keep values for later edits of the same pass

    ids, mask and token_type_ids describe the positions of the activations (B, T, C). An edit that puts positions before
    them calls `prepend`.
    An unknown keyword raises TypeError.
    """

    FACTS = ("ids", "mask", "token_type_ids", "logit_positions", "task", "route", "source", "cache", "rng",
             "output_hidden_states")

    def __init__(
        self,
        ids: Any = None,
        mask: Any = None,
        token_type_ids: Any = None,
        logit_positions: Any = None,
        task: Any = None,
        route: Any = None,
        source: Context | None = None,
        cache: Cache | None = None,
        rng: np.random.Generator | None = None,
        output_hidden_states: bool = False,
        **unknown: Any,
    ):
        """Keep the facts as attributes of these names; the class describes them. TypeError for an unknown keyword."""
        if unknown:
            refuse_keywords("a forward pass", unknown, self.FACTS)
        self.inputs = {                                        # as they were given, for `again`
            "ids": ids, "mask": mask, "token_type_ids": token_type_ids, "logit_positions": logit_positions,
            "task": task, "route": route, "source": source, "cache": cache, "rng": rng,
            "output_hidden_states": output_hidden_states,
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

    # ── filled in by the pass ──
    def add_loss(self, name: str, value: Tensor) -> None:
        """Add an auxiliary loss: a scalar, already weighted, without padding. Values of one name are summed."""
        if value.size != 1:
            raise ValueError(f"add_loss({name!r}) wants a scalar, got shape {value.shape}")
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def add_hidden_state(self, x: Tensor) -> None:
        """Keep x (B, T, C) in `hidden_states`, if the caller asked for them."""
        if self.output_hidden_states:
            self.hidden_states.append(x)

    def begin(self, x: Any, like: Array) -> None:
        """Take x as the ids and move the facts to the device of the weights. A model's forward calls it first.

        x: (B, T) ids, or (B, T, C) embeddings in their place. like: an array of the weights, on the wanted device.
        ValueError if x has another shape, or if mask or token_type_ids are not (B, T)."""
        self.inputs["ids"] = x                                 # for `again`
        if isinstance(x, Tensor):                              # embeddings: the ids are unknown, −1 stands for them
            self.ids = xp(like).full(x.shape[:2], -1)
        else:
            self.ids = _beside(operands.as_indices(x, like, "ids"), like)
        if self.ids.ndim != 2:
            raise ValueError(f"a model wants ids of shape (B, T) or embeddings (B, T, C), got shape {tuple(x.shape)}")
        if self.mask is not None:
            self.mask = self._per_token("mask", like, operands.as_mask)
        if self.token_type_ids is not None:
            self.token_type_ids = self._per_token("token_type_ids", like, operands.as_indices)
        if self.logit_positions is not None:
            self.logit_positions = _beside(operands.as_indices(self.logit_positions, like, "logit_positions"), like)
        if self.task is not None:
            self.task = _beside(operands.as_indices(self.task, like, "task"), like)

    def _per_token(self, fact: str, like: Array, convert: Callable) -> Array:
        """A fact of shape (B, T), on the device of `like`. ValueError if its shape is not that of the ids.

        convert: operands.as_mask or operands.as_indices, which take arrays of any dtype."""
        value = _beside(convert(vars(self)[fact], like, fact), like)
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

    def positions(self) -> Array:
        """(B, T) or (1, T): the position of each token among the real tokens of its row, plus `position_shift`.

        Padding is not counted, so left and right padding give the same positions. Cached tokens are counted first.
        position_shift is 0 unless an edit sets it: a prefix that takes positions."""
        m = xp(self.ids)
        T = self.ids.shape[1]
        key_mask = self.key_mask()
        if key_mask is None:
            start = self.past_length + self.position_shift
            return m.arange(start, start + T)[None]
        counts = m.cumsum(key_mask.astype(np.int64), axis=1)     # (B, Tk): real keys so far, cached ones included
        # The last T keys are the tokens of this pass. Padding before the first real token gets position 0.
        return m.maximum(counts - 1, 0)[:, -T:] + self.position_shift

    def select_positions(self, x: Tensor) -> Tensor:
        """x at the `logit_positions`: (B, T, C) -> (n, C). x itself if logits are computed at every position."""
        if self.logit_positions is None:
            return x
        return x.reshape(-1, x.shape[-1])[self.logit_positions]


def _beside(a: Array, like: Array) -> Array:
    """The array on the device of `like`."""
    return array.to(a, array.name_of(like))


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
        out = Cache()
        out.kv = {key: (k[index], v[index]) for key, (k, v) in self.kv.items()}
        out.source = {key: (k[index], v[index]) for key, (k, v) in self.source.items()}
        out.mask = None if self.mask is None else self.mask[index]
        out.length = self.length
        return out
