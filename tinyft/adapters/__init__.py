"""Adapters: saved, loaded and combined; exchanged with PEFT and AdapterHub.

    files.py reading.py      the library's own folder, which identifies its base
    combine.py               several adapters as one
    peft*.py adapterhub.py   the folders of PEFT and of AdapterHub, both ways
    names.py exchange.py     for both: transformers' names of modules; strict reading, attaching all or nothing
"""
from .adapterhub import load_adapterhub, save_adapterhub
from .combine import combine
from .files import load_adapter, save_adapter
from .peft import load_peft, save_peft

__all__ = ["combine", "load_adapter", "load_adapterhub", "load_peft", "save_adapter", "save_adapterhub", "save_peft"]
