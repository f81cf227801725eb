"""Adapters: saved, loaded and combined."""
from .combine import combine
from .files import load_adapter, save_adapter

__all__ = ["combine", "load_adapter", "save_adapter"]
