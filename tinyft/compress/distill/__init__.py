"""Distillation: a student learns from the outputs of a teacher. Each loss is a Loss of `fit`, with the teacher a field.

    hinton.py       a temperature, and the labels beside the teacher (2015)
    word_level.py   the teacher's distribution of every next token (Kim and Rush 2016)
    sequence.py     the teacher's texts as targets: sequence-level, and interpolation (Kim and Rush 2016)
    beams.py        these texts on disk: a source is decoded once
    bleu.py         the similarity of two sentences
    distilbert.py   the triple loss of DistilBERT (2019)
    layer_transfer.py   embeddings, hidden states and attention scores, too: TinyBERT (2019)
    layers.py       a student that starts from layers of its teacher
    switch.py       a dense student of a Switch model
    cache.py        a teacher's outputs on disk: its pass is paid once
    row_files.py    the files of both
    soft.py         the parts of all losses
"""
from .beams import TeacherBeams
from .bleu import sentence_bleu
from .cache import TeacherCache
from .distilbert import DistilBERTLoss
from .hinton import Hinton
from .layer_transfer import TinyBERTLoss
from .layers import check_tokenizers, layer_map, student
from .sequence import Interpolation, SequenceLevel
from .switch import dense_student
from .word_level import WordLevel

__all__ = ["DistilBERTLoss", "Hinton", "Interpolation", "SequenceLevel", "TeacherBeams", "TeacherCache", "TinyBERTLoss",
           "WordLevel", "check_tokenizers", "dense_student", "layer_map", "sentence_bleu", "student"]
