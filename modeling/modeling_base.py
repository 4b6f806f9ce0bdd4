"""The base class of every Chorus model: what transformers needs to know, how weights start, and what may be loaded."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import CONFIG_NAME

from .attention import ModalityProjection
from .configuration_chorus import ChorusConfig
from .configuration_services import SERVICES

# What `import chorus_moe` registers. Code that was exported without the package runs transformers' own functions.
FAST_EXPERTS = "cpu_mm"
PathOrName = str | os.PathLike


class ChorusPreTrainedModel(PreTrainedModel):
    """Weights start as in Llama (normal with `initializer_range`, norms one, biases zero), or as a module says."""

    config: ChorusConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("text", "image", "audio")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChorusDecoderLayer", "ConformerBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Attention and experts live in files of their own, which the source search of transformers does not read:
    # without these two, both would silently run their slowest implementation.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The registered fast path unless another is asked for; transformers' own choice where none is registered."""
        if requested_experts is None and FAST_EXPERTS in ALL_EXPERTS_FUNCTIONS.valid_keys():
            requested_experts = FAST_EXPERTS
        return super().get_correct_experts_implementation(requested_experts)

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """Rules of `q_proj`, `k_proj` and `v_proj` are for the ordinary layers: in a cross-modal layer these are
        dictionaries, and the projections in them have rules of their own."""
        dictionaries = {name for name, module in self.named_modules() if isinstance(module, ModalityProjection)}
        return {name: style for name, style in super()._expand_parallel_plan(plan).items() if name not in dictionaries}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in transformers, but a checkpoint that does not fit is an error; see `describe_misfit` for what fits.

        With `output_loading_info=True` missing and unexpected tensors are returned beside the model instead; with an
        empty `state_dict` all weights are new; `ignore_mismatched_sizes=True` starts tensors of another shape anew.
        Only safetensors files are read, unless `use_safetensors=False` says otherwise.

        Raises:
            CheckpointError: naming the missing, unexpected or mismatched tensors.
        """
        # A pickle is refused by torch with the advice to load it without its guard.
        kwargs.setdefault("use_safetensors", True)
        loaded: Any = super().from_pretrained(*args, **kwargs)
        reports = bool(kwargs.get("output_loading_info"))
        misfit = vars(loaded[0] if reports else loaded).pop("_misfit", None)
        # transformers only reports what does not fit; a model whose head was lost would go on with a random one.
        if misfit and not reports and kwargs.get("state_dict") != {}:
            raise CheckpointError(misfit)
        return loaded

    def save_pretrained(self, save_directory: PathOrName, *args: Any, **kwargs: Any) -> None:
        """As in transformers; whoever may read the configuration may read the weights, and finds the code it names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        # One process writes; the probes of several would meet.
        if kwargs.get("is_main_process", True):
            for path in Path(save_directory).glob("*.safetensors"):
                make_readable(path)
            if "drop_absent_code" in SERVICES:
                SERVICES["drop_absent_code"](Path(save_directory, CONFIG_NAME))

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Notes what does not fit for `from_pretrained`, which alone knows whether the caller wants it as a report, and
        which gets no other account of the model below an adapter; takes the weights out of the mapped file."""
        if not load_config.ignore_mismatched_sizes:
            check_shapes(model, load_config.pretrained_model_name_or_path, loading_info.mismatched_keys)
        info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        # Under DeepSpeed transformers remembers also those that no file needed, and saves the weights under old names.
        model._weight_conversions = [one for one in model._weight_conversions or () if one.was_used()]
        model._misfit = describe_misfit(
            model, load_config.pretrained_model_name_or_path, info.missing_keys, info.unexpected_keys
        )
        align_parameters(model)
        return info

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A module with parameters of its own has a method `start_weights(std)`: it knows best how they start.

        That method draws with `transformers.initialization`, whose functions leave alone what a checkpoint has filled.
        """
        super()._init_weights(module)
        start_weights = getattr(module, "start_weights", None)
        if start_weights is not None:
            start_weights(self.config.get_text_config().initializer_range)


class ChorusTower(ChorusPreTrainedModel):
    """An encoder of images or sound."""

    def train(self, mode: bool = True) -> Self:
        """Batch norms whose own parameters are frozen keep their statistics: no adapter could store changed ones."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and mode:
                # A norm without parameters goes by the whole tower.
                own = list(module.parameters()) or list(self.parameters())
                module.training = any(parameter.requires_grad for parameter in own)
        return self


def make_readable(path: Path) -> None:
    """Give a file the rights of a new file in its folder: the writer of safetensors leaves it to its owner alone."""
    probe = path.with_name(f".{path.name}.rights")
    probe.touch()
    if probe.stat().st_mode != path.stat().st_mode:
        path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


MAX_NAMES = 5
ALIGNMENT = 64  # bytes, as torch allocates


class CheckpointError(RuntimeError, ValueError):
    """A checkpoint that does not fit: a RuntimeError as transformers raises, a ValueError as all mistakes of users."""


def check_shapes(model: nn.Module, name_or_path: PathOrName | None, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse tensors of another shape.

    Args:
        mismatched: name, shape in the checkpoint and shape in the model of each.

    Raises:
        CheckpointError: naming them with both shapes.
    """
    found = [f"{name} {tuple(theirs)}, expected {tuple(ours)}" for name, theirs, ours in sorted(mismatched)]
    if found:
        raise CheckpointError(
            f"{_subject(model, name_or_path)}: {_counted('mismatched', found, '; ')}. Pass "
            "ignore_mismatched_sizes=True to start these tensors anew"
        )


def describe_misfit(
    model: PreTrainedModel, name_or_path: PathOrName | None, missing: Iterable[str], unexpected: Iterable[str]
) -> str | None:
    """What the checkpoint lacks or has too much of, in one line that names the tensors; None if it fits.

    Args:
        model: a Chorus model whose `config.architectures` says which class saved the checkpoint.
        missing, unexpected: names after what the model itself ignores was taken out.
    """
    same_class = type(model).__name__ in (model.config.architectures or [])
    prefix, base = f"{model.base_model_prefix}.", model.base_model

    # Saved by this class, it must hold exactly our tensors. Saved by another (another head, or none), it may differ in
    # the head, and in nothing else: exchanging heads works, and a lost `lm_head` is still seen.
    def matters(name: str) -> bool:
        return same_class or name.startswith(prefix) or hasattr(base, name.partition(".")[0])

    lacks, has_too_much = sorted(filter(matters, missing)), sorted(filter(matters, unexpected))
    faults = [_counted(kind, keys, ", ") for kind, keys in (("missing", lacks), ("unexpected", has_too_much)) if keys]
    if not faults:
        return None
    advice = SERVICES["advise_missing"](lacks) if "advise_missing" in SERVICES and not has_too_much else ""
    return (
        f"{_subject(model, name_or_path)}: {'; '.join(faults)}. {advice}Pass output_loading_info=True to load it all "
        "the same, missing tensors newly initialised, and get the full list"
    )


def _subject(model: nn.Module, name_or_path: PathOrName | None) -> str:
    source = "the state dict" if name_or_path is None else f"the checkpoint {str(name_or_path)!r}"
    return f"{source} does not fit {type(model).__name__}"


def _counted(kind: str, names: list[str], separator: str) -> str:
    more = f"{separator}and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} {kind} tensor{'s' if len(names) > 1 else ''}: {separator.join(names[:MAX_NAMES])}{more}"


def align_parameters(model: nn.Module) -> None:
    """Copy parameters that lie in a mapped file, at any multiple of eight bytes, to memory as torch allocates it."""
    # Some processors sum in another order where operands are not aligned: a loaded model would differ from the saved
    # one in the last bit. And a mapped file must not change while the model lives. One by one, to need little memory.
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and type(parameter.data) is Tensor and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
