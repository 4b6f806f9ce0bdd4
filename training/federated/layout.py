"""Which tensors of a model are trained together, and whose tokens each of them sees.

Unusual here: names are those of the model's state, adapter included, so server and client must be made by recipes with
the same `lora` and `model` sections. The hash of all other tensors says whether they were.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.surgery.bank_files import add_to_hash
from chorus_moe.surgery.parts import bank_tensor, decoder_of
from chorus_moe.training.federated.updates import Place, Refused

LORA = re.compile(r"(.+)\.lora_([AB])\.(\w+)\.weight")


@dataclass(frozen=True)
class Tensors:
    """What is known of one trained tensor.

    Attributes:
        place: (layer, bank) that it belongs to, if any.
        experts: how many experts it stacks; 1 for any other tensor.
        expert: the one expert whose it is.
        side: `A` or `B` of a LoRA.
        pair: the name that both sides of a LoRA share.
        modality: the one whose tower or connector it belongs to.
    """

    shape: tuple[int, ...]
    place: Place | None = None
    experts: int = 1
    expert: int | None = None
    side: str | None = None
    pair: str | None = None
    modality: str | None = None

    def spread(self, values_E: Tensor) -> Tensor:
        """One value for each expert, in a shape that multiplies the tensor."""
        if self.experts == 1:
            return values_E.reshape([1] * len(self.shape))
        if self.side == "A":
            # Rows: experts slowest.
            return values_E.repeat_interleave(self.shape[0] // self.experts)[:, None]
        if self.side == "B":
            # Columns: experts fastest.
            return values_E.repeat(self.shape[1] // self.experts)[None, :]
        return values_E.reshape([self.experts] + [1] * (len(self.shape) - 1))


Layout = dict[str, Tensors]


def layout_of(model: nn.Module) -> Layout:
    """All that is trained, by name: parameters, and buffers that move beside them (the balance bias of a router)."""
    return {name: _describe(name, tensor, model) for name, tensor in trained_tensors(model).items()}


def layout_asked(model: nn.Module, names: Collection[str], train_lora_a: bool) -> Layout:
    """The server's layout, from the names that it sends weights of, as it is of a client that trains some of them.

    Raises:
        Refused: a name that the model lacks.
    """
    held = model.state_dict()
    if lacking := sorted(set(names) - held.keys()):
        raise Refused(f"{lacking[0]} is trained by the server and is not there")
    moving = [name for name in names if train_lora_a or not (match := LORA.fullmatch(name)) or match[2] == "B"]
    return {name: _describe(name, held[name], model) for name in moving}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of [`layout_of`] themselves; to write into them changes the model."""
    kept = model.state_dict()
    found: dict[str, Tensor] = {}
    # Tied weights have two names, and stand here under the first.
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(prefix=path, recurse=False))
        trained = {name: value for name, value in own.items() if name in wanted}
        # Whole numbers, such as how many batches a norm has seen, have no mean.
        buffers = {
            name: value
            for name, value in module.named_buffers(prefix=path, recurse=False)
            if trained and name in kept and value.is_floating_point()
        }
        found |= trained | buffers
    return found


def _describe(name: str, tensor: Tensor, model: nn.Module) -> Tensors:
    shape, match = tuple(tensor.shape), LORA.fullmatch(name)
    side, pair = (match[2], f"{match[1]}.{match[3]}") if match else (None, None)
    owner = next((row.name for row in ENCODED if f"{row.tower}." in name or f"{row.connector}." in name), None)
    found = bank_tensor(name)
    if found is None:
        return Tensors(shape, side=side, pair=pair, modality=owner)
    place = found.layer, found.bank
    if not re.match(r"(?:deeper_)?experts\.", found.part):
        return Tensors(shape, place, side=side, pair=pair)
    alone = re.match(r"(?:experts|deeper_experts\.\d+)\.(\d+)\.(?:gate|up|down)_proj\.", found.part)
    if alone:
        return Tensors(shape, place, expert=int(alone[1]), side=side, pair=pair)
    (count,) = [b.num_experts for b in decoder_of(model).config.banks_of_layer(found.layer) if b.name == found.bank]
    return Tensors(shape, place, experts=count, side=side, pair=pair)


def base_of(model: nn.Module, trained: Collection[str]) -> str:
    """SHA-256, in hexadecimal, of all tensors but those that are trained, and of how an adapter is scaled."""
    digest, held = hashlib.sha256(), model.state_dict()
    # By place in memory, so that the other name of a tied weight is no part of the base.
    moving = {held[name].data_ptr() for name in trained if name in held}
    for name, tensor in sorted(held.items()):
        if tensor.data_ptr() not in moving:
            add_to_hash(digest, name, tensor)
    # The same matrices mean another change of the model with another alpha.
    scales = {name: (c.r, c.lora_alpha, c.use_rslora) for name, c in getattr(model, "peft_config", {}).items()}
    digest.update(json.dumps(scales, sort_keys=True).encode())
    return digest.hexdigest()


def freeze_lora_a(model: nn.Module) -> None:
    """Train the second matrix of each LoRA alone: the mean of products with one first matrix is the product with the
    mean of the second ones (arXiv 2403.12313)."""
    for name, parameter in model.named_parameters():
        if (match := LORA.fullmatch(name)) and match[2] == "A":
            parameter.requires_grad_(False)


@torch.no_grad()
def write_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a model.

    Raises:
        Refused: one that the model lacks or has in another shape; nothing has been changed then.
    """
    held = model.state_dict()
    for name, tensor in sorted(weights.items()):
        here = tuple(held[name].shape) if name in held else None
        if here != tuple(tensor.shape):
            raise Refused(f"{name} has shape {tuple(tensor.shape)} at the server and {here} here")
    for name, tensor in weights.items():
        held[name].copy_(tensor)
