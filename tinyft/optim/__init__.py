"""Optimizers, learning-rate schedules and loss scaling."""
from .optimizers import SGD, Adam, AdamW, Optimizer, adam_update, clip_norm, sgd_update
from .paged import Paged
from .scaler import GradScaler
from .schedules import Schedule, constant_schedule, cosine_schedule, linear_schedule

__all__ = [
    "SGD", "Adam", "AdamW", "GradScaler", "Optimizer", "Paged", "Schedule", "adam_update", "clip_norm", "sgd_update",
    "constant_schedule", "cosine_schedule", "linear_schedule",
]
