"""Which tower and which processor made some features: hashes that change with all that changes the features."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.loading import ModelOrAdapter, base_model

# Of a configuration, what says where it was and how it is run, not what it computes.
ASIDE = ("transformers_version", "dtype", "torch_dtype", "architectures")
# State of a tokenizer's last call.
OF_A_CALL = ("truncation", "padding")


def towers_of(model: ModelOrAdapter) -> dict[str, nn.Module]:
    """Modality -> its tower, of those that the model has, adapters within it included."""
    below = base_model(model).base_model
    found = {row.name: getattr(below, row.tower) for row in ENCODED}
    return {name: tower for name, tower in found.items() if tower is not None}


def tower_hash(tower: nn.Module) -> str:
    """SHA-256 of a tower's configuration and all its tensors, their types included.

    The number type is part of it: features of a tower in bfloat16 are others than those in float32.
    """
    digest = hashlib.sha256(_text(_plain(tower.config.to_dict())))  # type: ignore[union-attr,operator]
    # Buffers that are not saved follow from the configuration.
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(_text([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def processor_hash(processor: ChorusProcessor) -> str:
    """SHA-256 of a processor's settings: pictures, sound, numbers of tokens, tokenizer and chat template."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    settings = {
        "image_processor": _plain(processor.image_processor.to_dict()),
        "feature_extractor": _plain(processor.feature_extractor.to_dict()),
        "num_image_tokens": processor.num_image_tokens,
        "frames_per_token": processor.frames_per_token,
        "audio_convolutions": processor.audio_convolutions,
        "placeholders": [processor.image_token, processor.audio_token],
        "chat_template": processor.chat_template,
        "tokenizer": {key: value for key, value in words.items() if key not in OF_A_CALL},
    }
    return hashlib.sha256(_text(settings)).hexdigest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that change nothing, in sub-configurations too."""
    return {
        str(key): _plain(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in ASIDE and not str(key).startswith("_")
    }


def _text(values: object) -> bytes:
    return json.dumps(values, sort_keys=True, default=str).encode()
