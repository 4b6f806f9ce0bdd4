"""How each tensor of a composed model is made from tensors of its parents.

A recipe makes a tensor in consecutive pieces, when it is called and not before; a tensor without one is new.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.surgery.checkpoint_writer import Recipe
from chorus_moe.surgery.compose_upcycling import UpcyclingOptions, expert_pieces, noisy
from chorus_moe.surgery.parent_checkpoint import ParentCheckpoint
from chorus_moe.surgery.parent_text import ParentText
from chorus_moe.surgery.parent_towers import TowerParent
from chorus_moe.surgery.parts import bank_tensor

EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
NEW_TENSOR = re.compile(r"model\.(?:vision|audio)_connector\.|\.mlp\.bank_gate\.")
# The mean of an embedding table is summed in double precision: in blocks, or the whole table would be held in doubles.
ROWS_AT_ONCE = 4_096


class Tower:
    """An encoder of the new model.

    Args:
        config: its configuration.
        parent: where its tensors come from, with `tensors()`; newly initialised if None.
    """

    def __init__(self, config: PreTrainedConfig | None, parent: TowerParent | None = None):
        # The new model writes its dtype into this configuration; the caller's object must stay as it was.
        self.config = deepcopy(config)
        self.parent = parent
        self._left: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """One tensor, by its name below the tower. The encoder is read for the first one and freed after the last."""
        if name not in self._left:
            # Read again if a tensor is asked for twice, as when a plan is carried out a second time.
            assert self.parent is not None  # without one no recipe asks
            self._left = dict(self.parent.tensors())
        if name not in self._left:
            raise ValueError(f"the encoder has no tensor {name!r} among {len(self._left)}")
        # Popped, so that memory shrinks while the tower is written.
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"the encoder's tensor {name!r} is {tuple(tensor.shape)}, expected {shape}")
        yield tensor


@dataclass
class RecipeFinder:
    """Finds the recipe of every tensor, and notes in `used` which tensors of the text parent it takes."""

    parent: ParentText
    towers: dict[str, Tower]
    options: UpcyclingOptions
    seed: int
    config: Any

    def __post_init__(self) -> None:
        self.used: dict[str, tuple[int, ...]] = {}
        self._banks = {
            (layer, bank.name): bank
            for layer in self.config.sparse_layers
            for bank in self.config.banks_of_layer(layer)
        }

    def recipes(self, model: PreTrainedModel) -> dict[str, Recipe]:
        found = {
            name: self._recipe(name, tuple(value.shape))
            for name, value in model.state_dict().items()
            if name not in model.all_tied_weights_keys
        }
        return {name: recipe for name, recipe in found.items() if recipe is not None}

    def _recipe(self, name: str, shape: tuple[int, ...]) -> Recipe | None:
        """None for a tensor that is newly initialised."""
        for row in ENCODED:
            prefix = f"model.{row.tower}."
            if name.startswith(prefix):
                tower = self.towers[row.name]
                return None if tower.parent is None else partial(tower.take, name.removeprefix(prefix), shape)
        place = bank_tensor(name)
        if place is not None:
            part, _, parameter = place.part.partition(".")
            return self._of_bank(name, place.layer, place.bank, part, parameter, shape)
        if NEW_TENSOR.search(name):
            return None
        source = self.parent.source(name)
        # The new table may have rows for placeholders that the parent lacks, so its shape is checked without them.
        if name in EMBEDDINGS:
            rows = self.parent.config.vocab_size
            self.used[source] = (rows, *shape[1:])
            return partial(_grown, self.parent.checkpoint, source, shape[0] - rows)
        self.used[source] = shape
        return partial(self._read, source)

    def _of_bank(
        self, name: str, layer: int, bank_name: str, part: str, parameter: str, shape: tuple[int, ...]
    ) -> Recipe | None:
        parent, bank = self.parent, self._banks[layer, bank_name]
        if part in ("gate", "deeper_experts"):
            # No parent has a gate of a bank's own, or experts of several feed-forwards: these are newly initialised.
            return None
        if part == "router":
            # A dense parent has no router, and a correction bias starts at zero: both are newly initialised.
            if parameter != "weight" or not parent.num_experts:
                return None
            self.used[parent.router_weight(layer)] = shape
            return partial(self._read, parent.router_weight(layer))
        width, size = self.config.hidden_size, parent.expert_size
        # Noted for every bank; the dictionary holds each parent tensor once.
        for expert in range(parent.num_experts or 1):
            names = parent.expert_weights(layer, expert) if parent.num_experts else parent.dense_weights(layer)
            self.used |= dict(zip(names, ((size, width), (size, width), (width, size)), strict=True))
        pieces = partial(expert_pieces, parent, layer, bank, parameter, self.options.expert_split)
        if not self.options.expert_noise:
            return pieces
        # A recipe may be called more than once, so it makes a new iterator each time. The name in the seed gives each
        # tensor its own noise, in whatever order they are made.
        return lambda: noisy(pieces(), self.options.expert_noise, self.seed, name)

    def _read(self, source: str) -> Iterator[Tensor]:
        yield self.parent.checkpoint.read(source)


def _grown(checkpoint: ParentCheckpoint, name: str, extra: int) -> Iterator[Tensor]:
    """A table with one row per token, and new rows that are the mean of the old ones."""
    table = checkpoint.read(name)
    yield table
    if extra > 0:
        # The mean of many rows in half precision would lose most of its digits.
        total = sum(rows.double().sum(dim=0) for rows in table.split(ROWS_AT_ONCE))
        yield (total / len(table)).to(table.dtype).expand(extra, -1)
