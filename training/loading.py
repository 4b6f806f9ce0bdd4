"""Load a model or an adapter, from a folder or the Hub, with its processor."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel

import chorus_moe.auto_classes  # noqa: F401  the command line has not registered them before
from chorus_moe.processors.processing_chorus import ChorusProcessor

if TYPE_CHECKING:
    from peft import PeftModel

ModelOrAdapter: TypeAlias = "PreTrainedModel | PeftModel"
ADAPTER_FILE = "adapter_config.json"


def load_model(
    name_or_path: str | os.PathLike[str], *, base: str | None = None, merge: bool = False, **options: Any
) -> tuple[ModelOrAdapter, ChorusProcessor]:
    """A model in evaluation mode and its processor.

    Args:
        name_or_path: a full model, or an adapter on one.
        base: the model below the adapter, when it is not where the adapter was trained.
        merge: fold the adapter into the weights.
        options: for `from_pretrained`, such as `dtype` or `attn_implementation`.

    Raises:
        FileNotFoundError: the base of an adapter is a path that is not there.
    """
    source = str(name_or_path)
    if not is_adapter(source):
        model = AutoModelForMultimodalLM.from_pretrained(source, **options)
        return model.eval(), load_processor(source)
    from peft import PeftConfig, PeftModel

    base = base or PeftConfig.from_pretrained(source).base_model_name_or_path
    if not base:
        raise FileNotFoundError(f"the adapter {source!r} does not say which model it was trained on; pass `base`")
    # Otherwise the path of another machine is looked up on the Hub, and the error says nothing about the adapter.
    if os.path.isabs(base) and not os.path.isdir(base):
        raise FileNotFoundError(f"the adapter {source!r} was trained on {base!r}, which is not there; pass `base`")
    model = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(base, **options), source)
    model = model.merge_and_unload() if merge else model
    # An adapter's folder may lack the processor; then that of its base model is used.
    return model.eval(), load_processor(source, base)


def is_remote(source: str) -> bool:
    """Whether a name that is no file or folder here may be asked for on the Hub, which takes its time to say no."""
    parts = Path(source).parts
    # `name` or `owner/name`. Where a folder of the owner's name lies here, the name below it is misspelt.
    is_path = os.path.isabs(source) or source.startswith((".", "~")) or source.endswith("/")
    return bool(parts) and not is_path and len(parts) <= 2 and not (len(parts) == 2 and os.path.isdir(parts[0]))


def check_source(source: str) -> None:
    """Refuse a misspelt folder before it is looked up on the Hub.

    Raises:
        FileNotFoundError: nothing lies there, and it is no name of a repository.
    """
    if not os.path.exists(source) and not is_remote(source):
        raise FileNotFoundError(f"no model at {source!r}: there is no such folder, and it is no name of a repository")


def is_adapter(name_or_path: str) -> bool:
    """Whether a folder or repository holds an adapter instead of a model."""
    if os.path.isdir(name_or_path):
        return (Path(name_or_path) / ADAPTER_FILE).is_file()
    from transformers.utils import cached_file

    found = cached_file(
        name_or_path, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
    )
    return found is not None


def load_processor(*sources: str) -> ChorusProcessor:
    """The processor of the first source that has one."""
    for source in sources[:-1]:
        if not os.path.isdir(source) or (Path(source) / "processor_config.json").is_file():
            return AutoProcessor.from_pretrained(source)
    return AutoProcessor.from_pretrained(sources[-1])


def base_model(model: ModelOrAdapter) -> PreTrainedModel:
    """The model below a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
