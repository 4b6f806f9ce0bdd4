"""One model of pretrained parts: a text model, and encoders for images and sound.

A composition is a plan: it says, for each tensor of the new model, how to make it from tensors of the parents. The plan
runs in memory ([`Composition.build`]) or writes a checkpoint ([`compose_checkpoint`]); both give the same numbers. The
parents are read tensor by tensor and never held whole.
"""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.surgery.banks import silence
from chorus_moe.surgery.checkpoint_writer import PlannedTensor, Recipe, write_checkpoint
from chorus_moe.surgery.compose_processor import compose_processor, parent_tokenizer
from chorus_moe.surgery.compose_recipes import EMBEDDINGS, RecipeFinder, Tower
from chorus_moe.surgery.compose_upcycling import UpcyclingOptions, bank_settings, check_exact, tie_slices
from chorus_moe.surgery.parent_checkpoint import ParentCheckpoint
from chorus_moe.surgery.parent_text import ParentText
from chorus_moe.surgery.parent_towers import TowerParent, audio_parent, vision_parent
from chorus_moe.surgery.report import OperationReport, count_parameters

logger = logging.get_logger(__name__)

Source = str | os.PathLike[str]
TowerSource: TypeAlias = Source | PreTrainedConfig | TowerParent
# Bank -> its settings, or the name of a preset.
Experts = Mapping[str, Mapping[str, Any]] | str
# The names that the processor gives the placeholders, in the order in which a tokenizer without them gets them.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Composition:
    """A plan for a new model.

    Args:
        model: on the meta device, except parameters that are newly initialised.
        recipes: name -> how to make a tensor in consecutive pieces, for all that comes from parents.
        report: what the new model will be.
        text: the text parent, opened.
        vision: the vision parent, opened; None where there is none.
        access: `token`, `cache_dir` and `local_files_only`, as the parents were opened with.
    """

    model: ChorusForConditionalGeneration
    recipes: dict[str, Recipe]
    report: OperationReport
    text: ParentCheckpoint
    vision: TowerParent | None
    access: dict[str, Any]

    def processor(self) -> ChorusProcessor:
        """The processor of the model, from the parents that are open already.

        Raises:
            OSError: a vision parent without an image processor.
            ValueError: a text parent without a tokenizer, or parts that do not fit.
        """
        revision = None if self.vision is None else self.vision.revision
        return compose_processor(
            self.model.config,
            parent_tokenizer(self.text),
            None if self.vision is None else self.vision.source,
            vision_loading={"revision": revision, **self.access},
            notes=self.report.notes,
        )

    def tensors(self) -> dict[str, PlannedTensor]:
        """Everything that a checkpoint of the model holds; nothing is read yet."""
        return {
            name: PlannedTensor(tuple(value.shape), value.dtype, self.recipes.get(name) or partial(iter, [value]))
            for name, value in self.model.state_dict().items()
            if name not in self.model.all_tied_weights_keys
        }

    @torch.no_grad()
    def build(self) -> ChorusForConditionalGeneration:
        """The model, in evaluation mode."""
        # One tensor at a time, so that memory holds one parent tensor beside the model.
        for name, planned in self.tensors().items():
            if name not in self.recipes:
                continue
            # Filled in place: `torch.cat` of all experts would hold every bank twice.
            tensor, filled = torch.empty(planned.shape, dtype=planned.dtype), 0
            for piece in planned.recipe():
                tensor.view(-1)[filled : filled + piece.numel()].copy_(piece.reshape(-1))
                filled += piece.numel()
            _place(self.model, name, tensor)
        # The tied head still points to the meta tensor that was replaced.
        self.model.tie_weights()
        return self.model.eval()


def plan_composition(
    model_class: type,
    text: Source,
    vision: TowerSource | None = None,
    audio: TowerSource | None = None,
    experts: Experts | None = None,
    *,
    revision: str | None = None,
    vision_revision: str | None = None,
    audio_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Source | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | str | None = None,
    cross_modal_layers: Sequence[int] | None = None,
    seed: int = 0,
    **upcycling: Any,
) -> Composition:
    """Plan a model; arguments as in `compose`.

    Raises:
        OSError: a part is not there.
        ValueError: a part or a setting that does not fit; raised before anything large is read.
    """
    options = UpcyclingOptions(experts=experts, **upcycling)
    access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    parent = ParentText(ParentCheckpoint(text, revision=revision, **access))  # type: ignore[arg-type]
    towers = {
        "image": _tower("image", vision, revision=vision_revision, **access),
        "audio": _tower("audio", audio, revision=audio_revision, **access),
    }
    config = _configuration(parent, towers, options, cross_modal_layers)
    # All checks of settings come before the first tensor is read.
    check_exact(config.text_config, options.expert_split)  # type: ignore[arg-type]
    if dtype is None or dtype == "auto":
        # The dtype of the stored embedding, not `config.dtype`: what the files hold decides.
        dtype = parent.checkpoint.dtype(parent.source(EMBEDDINGS[0]))
    model = _on_meta(model_class, config, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    finder = RecipeFinder(parent, towers, options, seed, config.text_config)
    recipes = finder.recipes(model)
    # Both ways: nothing the decoder needs is missing, and nothing the parent has is left unused, which would mean that
    # the parent computes something that the decoder does not.
    parent.check_tensors(finder.used)
    _start_new(model, recipes, seed)
    for layer in config.text_config.sparse_layers:  # type: ignore[union-attr]
        for bank in model.model.language_model.layers[layer].mlp.banks.values():
            silence(bank.deeper_experts)  # an expert starts as the parent's feed-forward, its first
    if options.expert_split > 1:
        # After the random start of the routers: slices of one copy must get equal scores, or a copy would be taken in
        # parts.
        for layer in config.text_config.sparse_layers:  # type: ignore[union-attr]
            for bank in model.model.language_model.layers[layer].mlp.banks.values():
                tie_slices(bank.router, options.expert_split)
    _carry_generation_config(parent, model)
    # A tied head still points to the table that `_start_new` replaced, and would be counted beside it.
    model.tie_weights()
    report = _report(parent, towers, options, model)
    return Composition(model, recipes, report, parent.checkpoint, towers["image"].parent, access)


class Composed(NamedTuple):
    """What `compose` returns: the model in evaluation mode, its processor, and a report of what was done."""

    model: ChorusForConditionalGeneration
    processor: ChorusProcessor
    report: OperationReport


def compose(
    text: Source,
    vision: TowerSource | None = None,
    audio: TowerSource | None = None,
    experts: Experts | None = None,
    **options: Any,
) -> Composed:
    """One model of a pretrained text model and encoders, its feed-forward upcycled into expert banks.

    On text alone the model computes what the text model computes (up to rounding), until it is trained; new are the
    connectors, the routers of a dense parent and the gates over banks. In cross-modal layers keys and values of every
    modality start as the parent's.

    Args:
        text: folder or Hub id of a causal language model in safetensors files: Llama (and SmolLM), Mistral,
            Ministral, Qwen2, Qwen3, SmolLM3, OLMo 2, Mixtral, Qwen3-MoE or OLMoE. The sparse layers of a mixture
            model stay sparse, and all its banks start as its own experts and router.
        vision: folder or Hub id of an encoder, or a `ChorusVisionConfig` for a new one; None for a model without.
        audio: the same with `ChorusAudioConfig`.
        experts: bank -> settings as in `config.expert_banks`, or a preset's name. If None: a bank for each
            modality, and `common` of a dense parent with encoders. See [`UpcyclingOptions`] for what a bank must
            keep.
        options: `sparse_layers`, `num_experts`, `num_experts_per_tok`, `expert_split` and `expert_noise` as in
            [`UpcyclingOptions`]; `cross_modal_layers` as in [`ChorusTextConfig`] (the last layer if all slide);
            `seed` of all that is drawn; `dtype`, the parent's if None; `revision`, `vision_revision` and
            `audio_revision` of the Hub's repositories; `token`, `cache_dir` and `local_files_only` as in
            `from_pretrained`.

    Raises:
        OSError: a part is not there, or a vision parent has no image processor.
        ValueError: a part or a setting that does not fit, before any weight is read; a text parent without a tokenizer.
    """
    plan = plan_composition(ChorusForConditionalGeneration, text, vision, audio, experts, **options)
    processor = plan.processor()
    logger.info(str(plan.report))
    return Composed(plan.build(), processor, plan.report)


def compose_checkpoint(
    folder: Source,
    text: Source,
    vision: TowerSource | None = None,
    audio: TowerSource | None = None,
    experts: Experts | None = None,
    *,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> OperationReport:
    """Compose a model straight into a folder that `from_pretrained` loads, without holding it in memory.

    Arguments are those of `compose`, and the tensors are the same bit for bit. Memory: the largest tensor of the
    parent, one encoder, and what is newly initialised.

    Args:
        folder: created; must not hold a checkpoint already.
        max_shard_size: as in `save_pretrained`.

    Raises:
        OSError, ValueError: as `compose`; and a folder that holds a checkpoint, or a disk that is too small for it.
    """
    path = Path(folder)
    if path.is_dir() and (found := sorted(path.glob("*.safetensors"))):
        raise ValueError(f"{path}: holds a checkpoint already, such as {found[0].name!r}")
    plan = plan_composition(ChorusForConditionalGeneration, text, vision, audio, experts, **options)
    write_composition(plan, path, max_shard_size)
    return plan.report


def write_composition(plan: Composition, folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Write the weights and configurations of a planned model.

    Raises:
        OSError: the disk has less room than the weights take; nothing was written.
    """
    needed = sum(tensor.size for tensor in plan.tensors().values())
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"the model takes {needed:,} bytes, and the disk has {free:,} free; compose fewer or smaller "
            "experts, or in another dtype", str(folder),
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    size = parse_size_to_int(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    write_checkpoint(folder, plan.tensors(), size)
    # `save_pretrained` of a model sets this; here only the configuration is saved, and loading checks the class by it.
    plan.model.config.architectures = [type(plan.model).__name__]
    plan.model.generation_config.save_pretrained(folder)
    # Last: a folder that was left half written has no config.json and is not loaded.
    plan.model.config.save_pretrained(folder)


def _tower(modality: str, source: Any, **loading: Any) -> Tower:
    if source is None:
        return Tower(None)
    if isinstance(source, PreTrainedConfig):
        return Tower(source)
    # A `TowerParent` that was opened before (as the command line does to check it) is not opened twice.
    if not hasattr(source, "tensors"):
        source = (vision_parent if modality == "image" else audio_parent)(source, **loading)
    return Tower(source.config, source)


def _configuration(
    parent: ParentText, towers: dict[str, Tower], options: UpcyclingOptions, cross_modal_layers: Sequence[int] | None
) -> ChorusConfig:
    modalities = ["text", *(name for name, tower in towers.items() if tower.config is not None)]
    # Without encoders no placeholder is needed, and the vocabulary stays the parent's.
    ids = media_token_ids(parent.checkpoint) if len(modalities) > 1 else {}
    text = parent.settings() | bank_settings(parent, modalities, options)
    # A table larger than the tokenizer keeps its size, since many parents pad theirs. It grows only if a placeholder's
    # id lies outside.
    text["vocab_size"] = max(parent.config.vocab_size, *(i + 1 for i in ids.values()), 0)
    if cross_modal_layers is None and set(text.get("layer_types", ["full_attention"])) == {"sliding_attention"}:
        cross_modal_layers = [parent.config.num_hidden_layers - 1]
    if cross_modal_layers is not None:
        text["cross_modal_layers"] = sorted(cross_modal_layers)
    return ChorusConfig(
        text_config=text,
        vision_config=towers["image"].config,
        audio_config=towers["audio"].config,
        image_token_id=ids.get("image"),
        audio_token_id=ids.get("audio"),
        tie_word_embeddings=parent.config.tie_word_embeddings,
    )


def media_token_ids(checkpoint: ParentCheckpoint) -> dict[str, int]:
    """Ids of the placeholders: those of the parent's tokenizer, and for those that it lacks the next free ones, image
    before audio. A parent without a tokenizer counts as one that uses its whole vocabulary."""
    if not any(checkpoint.file(name) for name in TOKENIZER_FILES):
        start = checkpoint.config.vocab_size
        return {modality: start + i for i, modality in enumerate(MEDIA)}
    tokenizer = checkpoint.tokenizer
    known, next_id = tokenizer.get_vocab(), len(tokenizer)
    ids = {}
    for modality, row in MEDIA.items():
        ids[modality] = known.get(row.token, next_id)
        next_id += row.token not in known
    return ids


def _on_meta(model_class: Any, config: ChorusConfig, dtype: torch.dtype) -> Any:
    for part in (config, config.text_config, config.vision_config, config.audio_config):
        if part is not None:
            part.dtype = dtype  # type: ignore[union-attr]
    with ExitStack() as stack:
        # The contexts of `from_pretrained`: parameters on the meta device, in the dtype, and no initialisation.
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        return model_class(config)


def _start_new(model: Any, recipes: dict[str, Recipe], seed: int) -> None:
    """Initialise what no parent has, as `from_pretrained` does with missing keys; keeps the global random state."""
    for name in recipes:
        # `initialize_weights` leaves alone what carries this mark; what parents bring is still on the meta device.
        model.get_parameter_or_buffer(name)._is_hf_initialized = True
    model._move_missing_keys_from_meta_to_device(set(model.state_dict()) - recipes.keys(), None, None, None)
    # On the CPU only: without `devices=[]` torch would also save the state of every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    is_parameter = last in module._parameters
    setattr(module, last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if is_parameter else tensor)


def _carry_generation_config(parent: ParentText, model: Any) -> None:
    # The model was built with its placeholders suppressed in generation. The parent's settings replace its own, so
    # these ids are carried over.
    checkpoint, media = parent.checkpoint, model.generation_config.suppress_tokens or []
    if checkpoint.file("generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.source, **checkpoint.loading)
    else:
        model.generation_config = GenerationConfig.from_model_config(parent.config)
    if media:
        suppressed = {*media, *(model.generation_config.suppress_tokens or [])}
        model.generation_config.suppress_tokens = sorted(suppressed)


def _report(parent: ParentText, towers: dict[str, Tower], options: UpcyclingOptions, model: Any) -> OperationReport:
    checkpoint, text = parent.checkpoint, model.config.text_config
    experts: dict[str, dict[int, tuple[int, int]]] = {}
    for layer in text.sparse_layers:
        for bank in text.banks_of_layer(layer):
            experts.setdefault(bank.name, {})[layer] = (parent.num_experts, bank.num_experts)
    revision = f" at {checkpoint.revision}" if checkpoint.revision else ""
    notes = [f"text: {parent.config.model_type} from {checkpoint}{revision}"]
    for modality, tower in towers.items():
        if tower.config is not None:
            origin = (
                "newly initialised" if tower.parent is None else f"from {getattr(tower.parent, 'source', 'a parent')}"
            )
            notes.append(f"{modality}: encoder {origin}; its connector is new")
    if text.sparse_layers and not parent.num_experts:
        noise = f", noise {options.expert_noise}" if options.expert_noise else ""
        notes.append(f"experts: copies of the feed-forward in {options.expert_split} part(s){noise}; routers are new")
    if text.sparse_layers and parent.num_experts:
        notes.append("experts and routers: the parent's in every bank")
    if text.vocab_size > parent.config.vocab_size:
        notes.append(f"vocabulary: {parent.config.vocab_size} -> {text.vocab_size}, new rows are the mean of the old")
    # Some checkpoints store a tied head beside its table: it is no second parameter.
    tied = {"lm_head.weight"} if parent.config.tie_word_embeddings else set()
    return OperationReport(
        operation="compose",
        subject=str(checkpoint),
        parameters_before=sum(torch.Size(checkpoint.shape(n)).numel() for n in checkpoint.names if n not in tied),
        parameters_after=count_parameters(model),
        experts=experts,
        notes=notes,
    )
