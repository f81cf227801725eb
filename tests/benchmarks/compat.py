"""The calls that have other names in earlier commits. Each is chosen here, by the contents of the imported package.

`bench.py --against COMMIT` runs the same side files with the tinyft of both commits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tinyft as ft

if hasattr(ft, "objective"):  # up to 505fa3f
    from tinyft.objective import objective as compute_loss
    from tinyft.objective import question as read_batch
else:
    from tinyft.train.batch import compute_loss, read_batch


def loss_function(batch: dict[str, Any]) -> Callable[[Any], Any]:
    """A function of the model that gives the loss of a batch. The batch is read once."""
    targets = read_batch(batch)

    def loss(model: Any) -> Any:
        _, value = compute_loss(model, targets)
        return value

    return loss
