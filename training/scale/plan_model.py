"""A model that is planned for: built on the meta device, its weights by the piece of a step that they belong to."""

import copy
from collections import Counter
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

from chorus_moe.modeling.configuration_banks import LayerBankConfig, check_name
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import freeze
from chorus_moe.training.scale.adapters import expand_with_adapters
from chorus_moe.training.scale.layout import Layout, check_layout
from chorus_moe.training.scale.plan_layouts import Shares
from chorus_moe.training.sizes import with_lora

# What is trained: all; a LoRA, as `Size.lora` counts it; all but the encoders.
TRAINED = ("whole", "lora", "frozen_towers")


class Weight(NamedTuple):
    """A parameter; layers of one kind have equal ones.

    Args:
        name: with `*` for the number of its layer, as in the plans of transformers.
    """

    name: str
    shape: tuple[int, ...]
    is_trained: bool

    @property
    def size(self) -> int:
        return prod(self.shape)


Unit = tuple[Weight, ...]


class PlainConfig:
    """What `check_layout` reads of a configuration, which itself reads its banks anew at each question."""

    def __init__(self, text: ChorusTextConfig, banks: list[LayerBankConfig]):
        self.num_attention_heads, self.num_key_value_heads = text.num_attention_heads, text.num_key_value_heads
        self.experts_layout, self.banks = text.experts_layout, banks
        self.num_memory_tokens, self.num_global_tokens = text.num_memory_tokens, text.num_global_tokens
        self.is_causal = text.is_causal

    def get_text_config(self) -> "PlainConfig":
        return self


class PlannedModel:
    """A model on the meta device and its weights.

    Attributes:
        encoders, embeddings, layers, head: the pieces of a step, which are the units that FSDP2 gathers; the head stays
            gathered.
        names: id of a parameter -> its name, as in [`Weight`].
        kinds: unit -> how many are like it.
        banks: of each sparse layer.

    Raises:
        ValueError: an unknown way to train.
    """

    def __init__(self, config: ChorusConfig, train: str = "whole"):
        check_name("plan", "way to train", train, TRAINED)
        self.config, self.train = config, train
        with torch.device("meta"):
            self.head_model = ChorusForConditionalGeneration(copy.deepcopy(config))
        self.model: Any = self.head_model
        if train == "lora":
            self.model = with_lora(self.head_model)
        elif train == "frozen_towers" and len(config.modalities) > 1:
            freeze(self.head_model, "towers")
        encoders = [row for row in ENCODED if getattr(config, row.config) is not None]
        places = [row.name for row in encoders] + ["embeddings"]
        places += [str(layer) for layer in range(config.text_config.num_hidden_layers)] + ["head"]
        found: dict[str, list[Weight]] = {place: [] for place in places}
        self.names: dict[int, str] = {}
        for path, parameter in self.model.named_parameters():
            name = plain_name(path)
            self.names[id(parameter)] = generic = replace_layer_number_by_wildcard(name)
            found[self._place_of(name)].append(Weight(generic, tuple(parameter.shape), parameter.requires_grad))
        units = [tuple(found[place]) for place in places]
        self.encoders, rest = tuple(units[: len(encoders)]), units[len(encoders) :]
        self.embeddings, self.layers, self.head = rest[0], tuple(rest[1:-1]), rest[-1]
        # Units of one kind are counted once, and so are banks, which the configuration reads anew at each question.
        self.kinds = Counter(self.units)
        text, self.plans = config.text_config, (self.head_model.tp_plan, self.head_model.ep_plan)
        self.banks = [text.banks_of_layer(layer) for layer in text.sparse_layers]
        # What a layout is checked against, with each number of experts once.
        experts = {(bank.name, bank.num_experts): bank for banks in self.banks for bank in banks}
        self.checked = PlainConfig(text, list(experts.values()))

    @staticmethod
    def _place_of(name: str) -> str:
        for row in ENCODED:
            if f"{row.tower}." in name or f"{row.connector}." in name:
                return row.name
        if "language_model.layers." in name:
            return name.partition("language_model.layers.")[2].partition(".")[0]
        return "embeddings" if "embed_tokens" in name or "language_model.global_tokens" in name else "head"

    @property
    def units(self) -> tuple[Unit, ...]:
        """In the order of the forward."""
        return (*self.encoders, self.embeddings, *self.layers, self.head)

    @property
    def size(self) -> int:
        return sum(weight.size for unit in self.units for weight in unit)

    def refusal(self, layout: Layout) -> str | None:
        """Why the model cannot be trained in a layout, with both numbers; None if it can."""
        try:
            check_layout(layout, self.checked)
        except ValueError as error:
            return str(error)
        refused = (self.adapter_refusals[name] for name in ("tensor", "expert") if getattr(layout, name) > 1)
        return next((why for why in refused if why), None)

    @cached_property
    def adapter_refusals(self) -> dict[str, str | None]:
        """Size of a layout -> why the adapter does not go with it; None if it does, or if there is none."""
        found: dict[str, str | None] = dict.fromkeys(("tensor", "expert"))
        for name, plan in zip(found, self.plans, strict=True):
            try:
                expand_with_adapters(self.head_model, plan)
            except ValueError as error:
                found[name] = str(error)
        return found

    def shares(self, layout: Layout) -> Shares:
        return Shares(*self.plans, layout)


def plain_name(path: str) -> str:
    """The name of a parameter without what PEFT puts around it; a LoRA keeps what tells it from the weight."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")
