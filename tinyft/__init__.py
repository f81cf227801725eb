"""tinyft: fine-tuning and compression of transformers, from scratch, to be read.

    import tinyft as tf
    model, tokenizer = tf.load("base-gpt")
    tf.attach(model, tf.LoRA(r=8))
    tf.fit(model, batches, steps=200)

Read tensor.py, ops.py, nn.py and edit.py, about a thousand lines; then any method's file alone.
"""
import os as _os

from . import kernels as _kernels

if _os.environ.get("TINYFT_KERNELS", "on") != "off":
    _kernels.install()
