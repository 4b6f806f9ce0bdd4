"""A vector for each different item of some rows, computed once."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from chorus_moe.modeling.modeling_heads import ChorusForContrastive
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.contrast.collator import PairCollator
from chorus_moe.training.contrast.pairs import MODALITIES, PairDataset
from chorus_moe.training.loading import ModelOrAdapter, base_model, device_of

# Modality -> what the model's `get_{modality}_features` takes.
INPUTS = {"text": ("input_ids", "attention_mask"), **{name: medium.inputs for name, medium in MEDIA.items()}}


class Embedded(NamedTuple):
    """The items of one modality.

    Args:
        vectors: `(U, D)` float32 unit vectors on the CPU, one for each different item.
        items: `(N,)` int64, which of them each row has.
    """

    vectors: Tensor
    items: Tensor


@torch.inference_mode()
def embed_pairs(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    rows: Sequence[Mapping[str, Any]] | PairDataset,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Embedded]:
    """The vectors of all items of `rows`, by modality. Items that reach the model as the same numbers are one.

    Args:
        model: a ChorusForContrastive in evaluation mode, with or without an adapter.
        rows: pairs with the same modalities, such as a [`PairDataset`].

    Raises:
        ValueError: no rows, or a row that is no pair or cannot be read, by its number.
    """
    if len(rows) == 0:
        raise ValueError("there are no rows to embed")
    collator, head = PairCollator(processor), base_model(model)
    if not isinstance(head, ChorusForContrastive):
        raise ValueError(f"vectors come from ChorusForContrastive, found {type(head).__name__}")
    vectors: dict[str, list[Tensor]] = {}
    items: dict[str, list[int]] = {}
    numbers: dict[str, dict[bytes, int]] = {}
    for start in tqdm(range(0, len(rows), batch_size), desc="embed", unit="batch", disable=not progress):
        batch = collator([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        for name in (name for name in MODALITIES if INPUTS[name][0] in batch):
            inputs = {key: batch[key] for key in INPUTS[name]}
            seen, new = numbers.setdefault(name, {}), []
            for row, key in enumerate(_keys(name, inputs)):
                if key not in seen:
                    seen[key] = len(seen)
                    new.append(row)
                items.setdefault(name, []).append(seen[key])
            if new:
                embed = getattr(head, f"get_{name}_features")
                found = embed(**{key: value[new].to(device_of(model)) for key, value in inputs.items()})
                vectors.setdefault(name, []).append(found.float().cpu())
    return {name: Embedded(torch.cat(parts), torch.tensor(items[name])) for name, parts in vectors.items()}


@torch.inference_mode()
def embed_texts(model: ModelOrAdapter, processor: ChorusProcessor, texts: Sequence[str]) -> Tensor:
    """`(texts, D)` float32 unit vectors on the CPU."""
    batch = processor(text=list(texts), return_tensors="pt", padding_side="right").to(device_of(model))
    head = base_model(model)
    assert isinstance(head, ChorusForContrastive)
    return head.get_text_features(**{key: batch[key] for key in INPUTS["text"]}).float().cpu()


@torch.inference_mode()
def embed_media(model: ModelOrAdapter, processor: ChorusProcessor, name: str, items: Sequence[Any]) -> Tensor:
    """`(items, D)` float32 unit vectors of pictures (`image`) or clips (`audio`), on the CPU.

    Raises:
        MediaError: an item that cannot be read, by its number.
        ValueError: a clip of several windows, by its number.
    """
    # A placeholder each, so that errors name the item.
    text = [getattr(processor, f"{name}_token")] * len(items)
    batch = processor(text=text, return_tensors="pt", **{MEDIA[name].column: [[item] for item in items]})
    if len(batch[INPUTS[name][0]]) != len(items):
        whole = [len(processor(return_tensors="pt", **{MEDIA[name].column: [item]})[INPUTS[name][0]]) for item in items]
        number = next(index for index, windows in enumerate(whole) if windows > 1)
        raise ValueError(f"{name} {number} fills {whole[number]} windows, a vector is of one; cut it shorter")
    batch, head = batch.to(device_of(model)), base_model(model)
    assert isinstance(head, ChorusForContrastive)
    return getattr(head, f"get_{name}_features")(**{key: batch[key] for key in INPUTS[name]}).float().cpu()


def _keys(name: str, inputs: Mapping[str, Tensor]) -> list[bytes]:
    """What tells the items of a batch apart, whatever they were padded to."""
    values = inputs[INPUTS[name][0]]
    masks = inputs[INPUTS[name][1]].bool() if len(INPUTS[name]) > 1 else None
    rows = [value if masks is None else value[masks[row]] for row, value in enumerate(values)]
    return [hashlib.blake2b(row.contiguous().numpy().tobytes()).digest() for row in rows]


def check_trained(model: ModelOrAdapter) -> None:
    """Refuse a model from a checkpoint of another head, whose projections were drawn at random.

    Raises:
        ValueError: naming the class that it was saved as.
    """
    found = base_model(model).config.architectures or []
    # A model that was built here has no such name.
    if found and ChorusForContrastive.__name__ not in found:
        raise ValueError(
            f"the model was saved as {found[0]}; vectors come from a trained {ChorusForContrastive.__name__}, which a "
            "recipe with `model.head: contrastive` makes of it"
        )
