"""Models on disk, as Hugging Face style directories and as GGUF files: load, save, classifier.

    huggingface.py   load, save and classifier: files in, files out, and every check in between
    directory.py     reading JSON and safetensors files, without knowledge of a model
    family.py        Family: the protocol of a model family
    gpt2.py bert.py distilbert.py roberta.py llama.py marian.py t5.py
                     one family each: its names, shapes and conventions
    rotary.py        the rotary positions of a config.json
    compressed.py    packed weights beside dense tensors (tinyft.compress)
    sentence.py      the files of a sentence-transformers folder: the settings of pooling
    layout.py        FileTensor: where a tensor stands in a file; Plan: the model that a directory describes
    tokenizer.py     the tokenizer, and the settings of tokenizer_config.json
    config.py        values of a config.json, read with checks

    gguf.py          the bytes of a GGUF file, read with every check
    gguf_model.py gguf_tokenizer.py      the model and the tokenizer of one
"""
from .huggingface import classifier, load, save

__all__ = ["load", "save", "classifier"]
