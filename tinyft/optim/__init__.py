"Optimizers, learning-rate schedules and loss scaling."
from .optimizers import (
    SGD,
    Adam,
    AdamW,
    Optimizer,
    adam_update,
    clip_norm,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
)
from .scaler import GradScaler

__all__ = [
    "SGD", "Adam", "AdamW", "GradScaler", "Optimizer", "adam_update", "clip_norm",
    "constant_schedule", "cosine_schedule", "linear_schedule",
]
