"""The folders of PEFT and AdapterHub, without those libraries: names, keys, settings, damage, all or nothing.

peers/test_interchange.py compares outputs with the libraries themselves.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import peft_keys
import pytest
from helpers import host
from safetensors.numpy import load_file, save_file
from toy import text_of

import tinyft as ft
from tinyft import edit
from tinyft.adapters.names import ModuleNames
from tinyft.adapters.peft_config import chosen_modules, compile_simple
from tinyft.adapters.peft_lora import Factors, fuse, split_fused

C, L, V = 12, 2, 23
IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
