"""Optimizers, learning-rate schedules and loss scaling."""
from .eight_bit import Adam8bit, AdamW8bit
from .optimizers import SGD, Adam, AdamW, Optimizer, adam_update, clip_norm, sgd_update
from .paged import Paged
from .scaler import GradScaler
from .schedules import Schedule, constant_schedule, cosine_schedule, linear_schedule

__all__ = [
    "SGD", "Adam", "Adam8bit", "AdamW", "AdamW8bit", "GradScaler", "Optimizer", "Paged", "Schedule", "adam_update",
    "clip_norm", "sgd_update", "constant_schedule", "cosine_schedule", "linear_schedule",
]
