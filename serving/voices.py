"""The served model under each of its names: alone, or with one of its adapters."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_heads import ChorusForSequenceClassification
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.heads import HEADS
from chorus_moe.training.loading import ModelOrAdapter, base_model, check_source, is_adapter, load_model


@dataclass(frozen=True)
class Voice:
    """What one name stands for.

    Args:
        name: what a client asks for.
        model: shared by all voices.
        adapter: PEFT's name of the adapter; None is the model without any.
    """

    name: str
    model: ModelOrAdapter
    adapter: str | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The model's, which transformers' handlers look at."""
        return base_model(self.model).config

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Within, the model answers with this voice. Only one thread may be in here."""
        model: Any = self.model
        has_adapters = hasattr(model, "disable_adapter")
        if has_adapters and self.adapter is not None:
            model.set_adapter(self.adapter)
        with model.disable_adapter() if has_adapters and self.adapter is None else nullcontext():
            yield


def load_voices(
    source: str,
    adapters: Mapping[str, str] | None = None,
    *,
    base: str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[dict[str, Voice], ChorusProcessor]:
    """A model, or an adapter on one, and further adapters on the same model; the first is named after `source`.

    Args:
        adapters: name -> folder or Hub id.
        base, device, options: as in `load_model`.

    Raises:
        ValueError: a name given twice, or an adapter that does not fit.
        FileNotFoundError: nothing lies there.
    """
    model, processor = load_model(source, base=base, device=device, **options)
    # Of a folder its last part: where it lies is nothing that clients must know.
    first = Path(source).resolve().name if os.path.isdir(source) else source
    voices = [Voice(first, model, "default" if hasattr(model, "peft_config") else None)]
    for name, path in (adapters or {}).items():
        if name in ("default", first):
            raise ValueError(f"the adapter name {name!r} is taken, choose another")
        model = add_adapter(model, name, path)
        voices.append(Voice(name, model, name))
    # The wrapper of the first adapter is the model of all.
    return {voice.name: replace(voice, model=model.eval()) for voice in voices}, processor


def add_adapter(model: ModelOrAdapter, name: str, path: str) -> ModelOrAdapter:
    """`model` with one adapter more.

    Raises:
        ValueError: it does not fit the model.
    """
    from peft import PeftModel

    try:
        if hasattr(model, "peft_config"):
            model.load_adapter(path, adapter_name=name)
            return model
        return PeftModel.from_pretrained(model, path, adapter_name=name)
    except RuntimeError as error:
        raise ValueError(f"the adapter {name} at {path!r} does not fit the model: {error}") from error


def saved_kind(source: str, base: str | None = None) -> type[ChorusPreTrainedModel]:
    """The class that a model, or the one below an adapter, was saved as; one that generates where nothing says."""
    check_source(source)
    if is_adapter(source):
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(source)
        if adapter.task_type == "SEQ_CLS":
            return ChorusForSequenceClassification
        source = base or adapter.base_model_name_or_path or source
    saved_as = AutoConfig.from_pretrained(source).architectures or []
    return next((head.kind for head in HEADS if head.kind.__name__ in saved_as), ChorusForConditionalGeneration)


def check_generates(model: ModelOrAdapter) -> None:
    """Refuse classifiers and embedding models where answers are wanted.

    Raises:
        ValueError: names the class that was found.
    """
    found = base_model(model)
    if not isinstance(found, ChorusForConditionalGeneration):
        raise ValueError(f"{type(found).__name__} writes no text; this command wants a model that generates")
