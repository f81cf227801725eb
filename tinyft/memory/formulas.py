"""Closed forms of the bytes that a forward pass keeps for its backward pass.

    s length    B batch    h width    F feed-forward width    a heads    L layers    V vocabulary    c bytes a number

Korthikanti et al. 2022 (arXiv:2205.05198, §4.1) count a layer with GELU, F = 4 h, dropout masks of one byte, and stored
scores:

    attention   s B h for the input of q, k, v;  2 for q, k;  1 for v;  1 for the input of o;  a s² B for the
                probabilities, and again after dropout
    MLP         1 for the input of `up`;  4 for the input of GELU;  4 for that of `down`
    norms       2 for their inputs
    masks       one byte each: 2 s B h, and a s² B

    A = s B h (16 c + 2) + a s² B (2 c + 1);      c = 2 gives their s B h (34 + 5 a s/h)

This library keeps the normalised x̂ in the place of a norm's input, and computes the scores again (flash attention). It
has no dropout unless it is asked for: 16 c s B h + small rows. Frozen linear maps keep no input: with all of them
frozen, 6 of the 16 floats go (the inputs of q, k, v, of `up` and of `down`). The input of o is also the value of
attention, which stays.
"""
from __future__ import annotations

from .. import checks
from ..kernels.attention import TILE, causal_tile_rows
from ..kernels.numpy import SMALL
from ..models import GPTConfig

__all__ = ["attention_products", "gpt_activation_bytes", "korthikanti_bytes"]


def korthikanti_bytes(
    length: int, batch: int, width: int, heads: int, layers: int, bytes_per_number: int, *, dropout: bool = True,
    stored_scores: bool = True,
) -> int:
    """A · L, the activations of all layers: (s B h (16 c + 2) + a s² B (2 c + 1)) L.

    dropout=False: no masks, and the probabilities once. stored_scores=False: 4 a s B a layer in the place of a s² B."""
    for name, value in (("length", length), ("batch", batch), ("width", width), ("heads", heads), ("layers", layers)):
        checks.whole(f"korthikanti_bytes: {name}", value, least=0)
    c = bytes_per_number
    rows = length * batch * width * (16 * c + (2 if dropout else 0))
    scores = heads * length * length * batch * (2 * c + 1 if dropout else c)
    if not stored_scores:
        scores = 4 * heads * length * batch
    return layers * (rows + scores)


def gpt_activation_bytes(config: GPTConfig, batch: int, length: int) -> int:
    """The bytes that the graph of a GPT's loss keeps while everything trains, in float32, without dropout.

    With N = B s rows, exactly:

        a layer     4 N (8 h + 2 F)     x̂ and y of two norms, q, k, v and the value of attention; the input and the
                                        value of GELU
                    4 N (2 + a)         1/σ of two norms, and the row sums of attention
                    small arrays        see the code: tanh of a small GELU, all scores if they fit the cache
        the rest    4 N (2 h + 1)       the last norm
                    4 N V + 21 N + 4    logits; labels and sums of cross-entropy; the loss
                    8 N + 8 s           ids and positions"""
    N = batch * length
    h = config.width
    F = config.hidden or 4 * h
    a = config.heads
    layer = 4 * N * (8 * h + 2 * F + 2 + a)
    tile = causal_tile_rows(length)
    layer += 4 * length + 4 * tile * tile                # of attention: ones, and the mask of a tile
    layer += 2 * 4 * h                                   # of the norms: ones
    if N * F <= SMALL:
        layer += 4 * N * F
    if batch * a * length * length <= TILE:
        layer += 4 * batch * a * _tiled_scores(length)
    rest = 4 * N * (2 * h + 1) + 4 * h + 4 * N * config.vocab + N * (1 + 8 + 4 + 4 + 4) + 4 + 8 * N + 8 * length
    return config.layers * layer + rest


def _tiled_scores(length: int) -> int:
    """The scores of one head in the tiles of causal attention: below the diagonal, rounded up to tiles."""
    rows = causal_tile_rows(length)
    total = 0
    for start in range(0, length, rows):
        end = min(start + rows, length)
        total += (end - start) * end
    return total


def attention_products(queries: int, keys: int, heads: int, head_width: int) -> int:
    """The operations of Q Kᵀ and P V for one sequence: 2 · 2 · Tq Tk H D, or 4 s d a token with s keys."""
    return 4 * queries * keys * heads * head_width
