"""Models with Switch layers on disk. No model of transformers is like them, so the `model_type` is our own.

    tinyft-switch-gpt2      GPT-2 with Switch layers            tinyft-switch-bert      BERT with Switch layers

The directory is that of the dense model, but for the Switch layers: config.json holds the fields of the SwitchConfig
under the key "switch", and in the place of the two maps of a feed-forward, such as `h.1.mlp.c_fc.weight`, the file has

    h.1.router.classifier.weight                        (E, C)
    h.1.experts.expert_0.mlp.c_fc.weight ...            the maps of each expert, in the layout of the dense ones
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from ..checks import brief
from ..models import SwitchConfig
from .bert import BERTFamily
from .gpt2 import GPT2Family
from .layout import FileTensor, Plan, Table

KEY = "switch"
FEED_FORWARD = re.compile(r"blocks\.(\d+)\.mlp\.((up|down)\.(weight|bias))")         # a tensor of the model
LAYER = re.compile(r"(.*?\.\d+\.)(.*)")                                              # a tensor in the file


class WithSwitch:
    """A family of dense models with Switch layers: a class before that family among the bases.

    Its model_type is one of our own; other libraries have none for these models."""
    has_experts = True

    def read_config(self, config: dict, names: Collection[str]) -> Plan:
        """The plan of the dense model, with the Switch layers of the key "switch"."""
        dense, switch = take_switch(config, names)
        return with_switch(super().read_config(dense, names), switch)

    def table(self, plan: Plan) -> Table:
        """The table of the dense model, with routers and experts."""
        return with_experts(super().table(plan), plan)

    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of the dense model, with the key "switch"."""
        return {**super().write_config(plan), KEY: dataclasses.asdict(plan.config.switch)}


class SwitchGPT2Family(WithSwitch, GPT2Family):
    """GPT-2 with Switch layers."""
    model_type = "tinyft-switch-gpt2"


class SwitchBERTFamily(WithSwitch, BERTFamily):
    """BERT with Switch layers."""
    model_type = "tinyft-switch-bert"


def take_switch(config: dict, names: Collection[str]) -> tuple[dict, SwitchConfig]:
    """(config.json without the key "switch", the SwitchConfig that it describes).

    names: of the file's tensors; there cannot be more experts. ValueError for a description of no SwitchConfig."""
    described = config.get(KEY)
    fields = {field.name for field in dataclasses.fields(SwitchConfig)}
    if not isinstance(described, dict) or described.keys() != fields:
        raise ValueError(f"config.json wants {KEY!r} with the fields {', '.join(sorted(fields))}, "
                         f"got {brief(described)}")
    try:
        switch = SwitchConfig(**described)
    except TypeError as e:
        raise ValueError(f"config.json: {e}") from e
    if switch.experts > len(names):
        raise ValueError(f"config.json asks for {switch.experts} experts; the file holds {len(names)} tensors in all")
    return {key: value for key, value in config.items() if key != KEY}, switch


def with_switch(plan: Plan, switch: SwitchConfig) -> Plan:
    """A plan whose configuration has these Switch layers."""
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, switch=switch))


def with_experts(dense: Table, plan: Plan) -> Table:
    """The table of a dense model, with router and experts in the place of the feed-forwards of the Switch layers."""
    c = plan.config
    switched = c.switch.layers(c.layers)
    table: Table = {}
    for name, place in dense.items():
        found = FEED_FORWARD.fullmatch(name)
        if found is None or int(found[1]) not in switched:
            table[name] = place
            continue
        layer, rest = LAYER.fullmatch(place.name).groups()
        mlp = f"blocks.{found[1]}.mlp"
        table[f"{mlp}.router.weight"] = FileTensor(f"{layer}router.classifier.weight", (c.switch.experts, c.width))
        for j in range(c.switch.experts):
            stored = f"{layer}experts.expert_{j}.{rest}"
            table[f"{mlp}.experts.{j}.{found[2]}"] = dataclasses.replace(place, name=stored)
    return table
