"""Load a model or an adapter, from a folder or the Hub, with its processor."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel
from transformers.utils import logging

import chorus_moe.auto_classes  # noqa: F401  the command line has not registered them before
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.heads import HEADS

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

ModelOrAdapter: TypeAlias = "PreTrainedModel | PeftModel"
ADAPTER_FILE = "adapter_config.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    base: str | None = None,
    merge: bool = False,
    device: str | torch.device | None = None,
    kind: type = AutoModelForMultimodalLM,
    **options: Any,
) -> tuple[ModelOrAdapter, ChorusProcessor]:
    """A model in evaluation mode and its processor.

    Args:
        name_or_path: a full model, or an adapter on one.
        base: the model below the adapter, when it is not where the adapter was trained.
        merge: fold the adapter into the weights.
        device: where the model goes, such as what `find_device` finds; None leaves it where `options` put it.
        kind: the class, or Auto class, that loads the model or what is below an adapter.
        options: for `from_pretrained`, such as `dtype` or `attn_implementation`.

    Raises:
        FileNotFoundError: there is no such folder, or the base of an adapter is a path that is not there.
        ValueError: a checkpoint of another head, which does not hold the layer that predicts tokens.
    """
    source = str(name_or_path)
    base = whole_model(source, base)
    check_head(base, kind)
    if base == source:
        model = kind.from_pretrained(source, **options)  # type: ignore[attr-defined]
        return _ready(model, source, device), load_processor(source)
    from peft import PeftModel

    model = PeftModel.from_pretrained(kind.from_pretrained(base, **options), source)  # type: ignore[attr-defined]
    model = model.merge_and_unload() if merge else model
    # An adapter's folder may lack the processor; then that of its base model is used.
    return _ready(model, source, device), load_processor(source, base)


def _ready(model: ModelOrAdapter, source: str, device: str | torch.device | None) -> ModelOrAdapter:
    """The model on its device, in evaluation mode; weights that are not finite are named in a warning."""
    model = (model if device is None else model.to(device)).eval()
    # Only a warning: the doctor must be able to load such a model too.
    if found := not_finite(model):
        logger.warning(f"{source!r}: {found}; its answers are void")
    return model


def not_finite(model: torch.nn.Module) -> str | None:
    """Which weights hold NaN or infinity, in words; None if all are finite."""
    bad = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if len(bad) < 2:
        return f"the weight {bad[0]} holds NaN or infinity" if bad else None
    return f"{len(bad)} weights hold NaN or infinity, the first is {bad[0]}"


def is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def choice_of(source: str, model: torch.nn.Module, device: torch.device | None = None) -> str:
    """Where a model is, or will be, and in what numbers, as in "my-model: on cuda:0, in bfloat16"."""
    weight = next(model.parameters())
    return f"{source}: on {device or weight.device}, in {str(weight.dtype).removeprefix('torch.')}"


def find_device(name: str | None = None) -> torch.device:
    """The device of this name; for None an accelerator, or the CPU where there is none.

    Raises:
        ValueError: no such device here.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return found or torch.device("cpu")
    here = (
        ["cpu"] if found is None else ["cpu", *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]
    )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; choose from {here}") from error
    if f"{device.type}:{device.index or 0}" not in here and device.type != "cpu":
        raise ValueError(f"there is no device {name!r} here; choose from {here}")
    return device


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
    # Only models older than the owners of repositories have a name of one part, and none of them is ours.
    if not os.path.exists(source) and not (is_remote(source) and len(Path(source).parts) == 2):
        raise FileNotFoundError(
            f"no model at {source!r}: there is no such folder, and on the Hub it would be OWNER/NAME"
        )


def check_head(source: str, kind: type = AutoModelForMultimodalLM) -> None:
    """Refuse to generate with the checkpoint of a classifier or of embeddings: transformers would draw the layer that
    predicts tokens at random, and only warn.

    Raises:
        ValueError: naming the class that saved it.
    """
    if kind is not AutoModelForMultimodalLM:
        return
    config = AutoConfig.from_pretrained(source)
    saved_as, wanted = config.architectures or [], ChorusForConditionalGeneration.__name__
    # Configurations written by hand name no class, and a tied layer is there.
    if saved_as and wanted not in saved_as and not config.tie_word_embeddings:
        raise ValueError(
            f"{source!r} was saved as {saved_as[0]}, without the layer that predicts tokens, which would be drawn at "
            "random; take the model that it was made of"
        )


def whole_model(source: str, base: str | None = None) -> str:
    """The source itself, or where the model below an adapter lies: `base`, or what the adapter says.

    Raises:
        FileNotFoundError: nothing lies there.
    """
    check_source(source)
    if not is_adapter(source):
        return source
    from peft import PeftConfig

    base = base or PeftConfig.from_pretrained(source).base_model_name_or_path
    if not base:
        raise FileNotFoundError(f"the adapter {source!r} does not say which model it was trained on; pass `base`")
    # Otherwise the path of another machine is looked up on the Hub, and the error says nothing about the adapter.
    if os.path.isabs(base) and not os.path.isdir(base):
        raise FileNotFoundError(f"the adapter {source!r} was trained on {base!r}, which is not there; pass `base`")
    check_source(base)
    return base


def saved_kind(source: str, base: str | None = None) -> type:
    """The class that a model, or what is below an adapter, was saved as; the Auto class of generative models where its
    configuration names none of ours. Errors as of `whole_model`."""
    names = AutoConfig.from_pretrained(whole_model(source, base)).architectures or []
    return next((head.kind for head in HEADS if head.kind.__name__ in names), AutoModelForMultimodalLM)


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
    """The processor of the first source that has one.

    Raises:
        OSError: a file is missing, as transformers says it.
        ValueError: a file of the tokenizer that lacks what every tokenizer has.
    """
    has_one = (s for s in sources if not os.path.isdir(s) or (Path(s) / "processor_config.json").is_file())
    source = next(has_one, sources[-1])
    try:
        return AutoProcessor.from_pretrained(source)
    except KeyError as error:
        raise ValueError(
            f"{source!r}: the files of its tokenizer lack {error}; copy them again from where they were"
        ) from error


def base_model(model: ModelOrAdapter) -> PreTrainedModel:
    """The model below a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
