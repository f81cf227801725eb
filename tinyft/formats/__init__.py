"""Models on disk, as Hugging Face style directories:  load, save, classifier.

    layout.py        Place: where one of our tensors stands in a file; Plan: what a directory asks us to build
    gpt2.py bert.py  the names, shapes and traps of one family each
    huggingface.py   files in, files out, and every check in between
"""
from .huggingface import classifier, load, save

__all__ = ["load", "save", "classifier"]
