"""The number of queries in a tile of the compiled attention: its kernel and its account of memory need it."""

from __future__ import annotations

__all__ = ["queries_of_tile"]

QUERIES = 128  # of a tile that is not causal, at most
FEWEST, MOST = 64, 512  # of a causal tile, which has a quarter of all queries between these limits


def queries_of_tile(queries: int, *, causal: bool) -> int:
    """The queries of a tile of one head. A causal tile is smaller, so that it computes fewer hidden scores."""
    wanted = min(max(FEWEST, queries // 4), MOST) if causal else QUERIES
    return min(queries, wanted)
