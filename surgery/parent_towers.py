"""Pretrained vision and audio encoders as towers of a new model.

Unusual here:
- every checkpoint is loaded by the library that wrote it (transformers, timm), which knows its older names of tensors;
  what comes out has the names of our tower, and a tensor that is missing is an error;
- only safetensors files are opened, and no code of a checkpoint is run;
- what the processor must know of the sound (features, rate, window) is read from the parent's feature extractor and
  written into the configuration.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, extract_commit_hash, logging

from chorus_moe.modeling.configuration_towers import ChorusAudioConfig, ChorusVisionConfig
from chorus_moe.modeling.tower_audio import ChorusAudioModel
from chorus_moe.modeling.tower_audio_waveform import WAVEFORM_TYPES, convert_backbone, prepare_backbone_config
from chorus_moe.modeling.tower_vision import ChorusVisionModel
from chorus_moe.modeling.tower_vision_timm import RESERVED_MODEL_ARGS, create_timm_encoder
from chorus_moe.surgery.parent_checkpoint import CURE, ParentCheckpoint
from chorus_moe.surgery.vision_probe import ANY_SIZE_TYPES

Source = str | os.PathLike[str]
# What a timm source may begin with, as in timm itself.
TIMM_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class TowerParent:
    """An encoder to take over.

    Args:
        config: of our tower around it.
        revision: the commit that the weights come from; None for a folder.
        load: reads the encoder.
        prefix: where the encoder lies in our tower.
    """

    source: str
    revision: str | None
    config: ChorusVisionConfig | ChorusAudioConfig
    load: Callable[[], nn.Module]
    prefix: str

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name below `vision_tower.` or `audio_tower.` and tensor, in the checkpoint's dtype.

        The encoder is read at this call, and no reference to it is kept.

        Raises:
            ValueError: tensors that are missing or of another shape.
        """
        for name, tensor in self.load().state_dict().items():
            yield f"{self.prefix}{name}", tensor


def vision_parent(source: Source, *, pool_size: int = 1, revision: str | None = None, **loading: Any) -> TowerParent:
    """A vision encoder.

    Args:
        source: folder or Hub id of a Hugging Face vision model, of a model with one inside (SigLIP, CLIP), of a Chorus
            model or tower, or of a timm model; or the name of a timm model, whose weights come from the Hub.
        pool_size: as in `ChorusVisionConfig`; a Chorus tower keeps its own.
        revision: branch, tag or commit of the repository.
        loading: `token`, `cache_dir`, `local_files_only` as in transformers' `from_pretrained`.

    Raises:
        OSError: nothing there, as transformers says it.
        ValueError: not a vision encoder, or files that are not safetensors.
    """
    loading["revision"] = revision
    text = os.fspath(source)
    for prefix in TIMM_PREFIXES:
        text = text.removeprefix(prefix)
    # A folder of that name wins over a model of timm.
    if not os.path.isdir(text) and is_timm_name(text):
        return _timm_by_name(text, pool_size, loading)
    values, _ = PreTrainedConfig.get_config_dict(text, **loading)
    # Only timm's configurations have this key.
    if "architecture" in values:
        # From here on the commit and not the branch, so that the weights belong to the configuration just read.
        loading["revision"] = values.get("_commit_hash") or revision
        return _timm_parent(text, values, pool_size, loading)
    checkpoint = ParentCheckpoint(text, **loading)
    if checkpoint.config.model_type in ("chorus", ChorusVisionConfig.model_type):
        return _chorus_parent(checkpoint, "vision", ChorusVisionModel)
    return _huggingface_vision(checkpoint, pool_size)


def audio_parent(
    source: Source,
    *,
    pool_size: int = 1,
    max_seconds: float = 30.0,
    backbone_library: str = "transformers",
    revision: str | None = None,
    **loading: Any,
) -> TowerParent:
    """An audio encoder.

    Args:
        source: folder or Hub id of Whisper, wav2vec 2.0, HuBERT or WavLM, with or without head, or of a Chorus model or
            tower.
        pool_size: as in `ChorusAudioConfig`; a Chorus tower keeps its own.
        max_seconds: longest window of an encoder of samples; Whisper's is what its positions hold.
        backbone_library: `torchaudio` builds an encoder of samples of torchaudio's modules (its own importer).
        revision, loading: as in `vision_parent`.

    Raises:
        OSError: nothing there, as transformers says it.
        ValueError: not an audio encoder known here, or files that are not safetensors.
    """
    checkpoint = ParentCheckpoint(source, revision=revision, **loading)
    model_type = checkpoint.config.model_type
    if model_type in ("chorus", ChorusAudioConfig.model_type):
        return _chorus_parent(checkpoint, "audio", ChorusAudioModel)
    if model_type == "whisper":
        return _whisper_parent(checkpoint, pool_size)
    if model_type in WAVEFORM_TYPES:
        return _waveform_parent(checkpoint, pool_size, max_seconds, backbone_library)
    raise ValueError(
        f"{checkpoint}: a {model_type!r} is not a supported audio encoder; choose from "
        f"{', '.join(('whisper', *WAVEFORM_TYPES, 'chorus', ChorusAudioConfig.model_type))}"
    )


def is_timm_name(source: str) -> bool:
    """Whether `source` names a model of timm, with or without a tag."""
    try:
        import timm
    except ImportError:
        return False
    return "/" not in source and os.sep not in source and timm.is_model(source)


def _timm_by_name(name: str, pool_size: int, loading: dict[str, Any]) -> TowerParent:
    """Raises OSError if the Hub cannot be reached, ValueError if it holds no weights of that name."""
    import timm

    pretrained: Any = timm.get_pretrained_cfg(name)
    if not pretrained.hf_hub_id:
        raise ValueError(f"timm has no weights of {name!r} on the Hub: name a tag (timm.list_pretrained()) or a folder")
    values = {"architecture": name, "pretrained_cfg": pretrained.to_dict(), "num_classes": pretrained.num_classes}
    return _timm_parent(pretrained.hf_hub_id, values, pool_size, loading)


def _timm_parent(source: str, values: dict[str, Any], pool_size: int, loading: dict[str, Any]) -> TowerParent:
    pretrained = values.get("pretrained_cfg") or values
    channels, height, width = pretrained.get("input_size") or (3, 224, 224)
    if height != width:
        raise ValueError(f"{source}: made for images of {height} x {width} pixels, only squares are supported")
    # Found now, before any model is built, so that a missing file is an early error.
    path = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **loading)
    if path is None:
        raise ValueError(f"{source}: found no {SAFE_WEIGHTS_NAME}, and {CURE}")
    given = values.get("model_args") or {}
    config = ChorusVisionConfig(
        architecture=values["architecture"],
        # What the tower sets itself (image size, channels, no classes) must not be given twice.
        model_args={key: value for key, value in given.items() if key not in RESERVED_MODEL_ARGS} or None,
        image_size=height,
        num_channels=channels,
        pool_size=pool_size,
    )

    def load() -> nn.Module:
        # Checkpoints that transformers' timm wrapper saved carry its prefix.
        weights = {name.removeprefix("timm_model."): tensor for name, tensor in load_file(path).items()}
        classes = values.get("num_classes", pretrained.get("num_classes", 0))
        model = load_timm_encoder(config.architecture, config.model_args, height, channels, weights, classes)
        # timm builds in float32; the parent's dtype is that of its stored weights.
        return model.to(next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))

    revision = extract_commit_hash(path, loading["revision"])
    return TowerParent(source, revision, config, load, "timm_model.")


def _huggingface_vision(checkpoint: ParentCheckpoint, pool_size: int) -> TowerParent:
    # SigLIP and CLIP hold a text model as well; only their vision part is taken.
    backbone = getattr(checkpoint.config, "vision_config", checkpoint.config)
    kind = AutoModel._model_mapping.get(type(backbone), None)
    # NaFlex (siglip2) takes patches of any aspect ratio, which our images of one size are not.
    if getattr(kind, "main_input_name", None) != "pixel_values" or backbone.model_type.startswith("siglip2"):
        raise ValueError(
            f"{checkpoint}: model_type={backbone.model_type!r} does not encode images of one fixed size; choose a "
            "vision model of transformers (such as SigLIP, CLIP, DINOv2; not NaFlex), or a timm model"
        )
    # `dtype="auto"` in `_load` would take this value instead of the dtype of the stored weights.
    backbone.dtype = None
    config = ChorusVisionConfig(
        backbone_config=backbone,
        image_size=_image_size(checkpoint, backbone),
        num_channels=getattr(backbone, "num_channels", 3),
        pool_size=pool_size,
    )
    return TowerParent(
        checkpoint.source, checkpoint.revision, config, lambda: _load(AutoModel, checkpoint, backbone), "backbone."
    )


def _image_size(checkpoint: ParentCheckpoint, backbone: Any) -> int:
    """Pixels of an image that the parent's image processor makes, where the encoder takes any size; otherwise its own.

    Raises:
        ValueError: no size to be found, or no square.
    """
    size = backbone.image_size
    # Such an encoder interpolates its positions: its own `image_size` says what it was pretrained on, not what it is
    # used with.
    if backbone.model_type in ANY_SIZE_TYPES:
        try:
            processor: Any = AutoImageProcessor.from_pretrained(checkpoint.source, **checkpoint.loading)
        except OSError:
            processor = None
        if processor is not None:
            shape = processor.crop_size if processor.do_center_crop else processor.size
            size = (shape["height"], shape["width"])
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or height is None:
        raise ValueError(f"{checkpoint}: images of {height} x {width} pixels, only squares are supported")
    return height


def _whisper_parent(checkpoint: ParentCheckpoint, pool_size: int) -> TowerParent:
    from transformers import WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    backbone: Any = checkpoint.config
    backbone.dtype = None
    extractor = _feature_extractor(checkpoint) or WhisperFeatureExtractor(feature_size=backbone.num_mel_bins)
    config = ChorusAudioConfig(
        feature_type="whisper",
        sampling_rate=extractor.sampling_rate,
        num_mel_bins=extractor.feature_size,
        n_fft=extractor.n_fft,
        hop_length=extractor.hop_length,
        # Whisper's second convolution halves the frames, so its positions hold twice as many: 1500 are 30 seconds.
        max_seconds=2 * backbone.max_source_positions * extractor.hop_length / extractor.sampling_rate,
        hidden_size=backbone.d_model,
        num_hidden_layers=backbone.encoder_layers,
        num_attention_heads=backbone.encoder_attention_heads,
        intermediate_size=backbone.encoder_ffn_dim,
        subsampling=2,
        pool_size=pool_size,
        backbone_config=backbone,
    )
    # With or without a head in front.
    mapping = {r"^(model\.)?encoder\.": ""}
    return TowerParent(
        checkpoint.source,
        checkpoint.revision,
        config,
        lambda: _load(WhisperEncoder, checkpoint, backbone, mapping),
        "encoder.front_end.",
    )


def _waveform_parent(checkpoint: ParentCheckpoint, pool_size: int, max_seconds: float, library: str) -> TowerParent:
    backbone: Any = prepare_backbone_config(checkpoint.config)
    backbone.dtype = None
    extractor = _feature_extractor(checkpoint)
    # A wrong guess would not fail: unnormalised samples only make the encoder worse, silently.
    if extractor is None:
        raise ValueError(
            f"{checkpoint}: found no preprocessor_config.json, which says the sampling rate and whether samples are "
            "normalised; save the parent's feature extractor beside its weights"
        )
    config = ChorusAudioConfig(
        feature_type="waveform",
        do_normalize=extractor.do_normalize,
        sampling_rate=extractor.sampling_rate,
        num_mel_bins=1,
        # Samples are frames of size one: masks, windows, collator and `generate` then work as for spectrograms.
        hop_length=1,
        max_seconds=max_seconds,
        hidden_size=backbone.hidden_size,
        num_hidden_layers=backbone.num_hidden_layers,
        num_attention_heads=backbone.num_attention_heads,
        intermediate_size=backbone.intermediate_size,
        subsampling=1,
        pool_size=pool_size,
        backbone_config=backbone,
        backbone_library=library,
    )
    return TowerParent(
        checkpoint.source,
        checkpoint.revision,
        config,
        lambda: convert_backbone(_load(AutoModel, checkpoint, backbone), library),
        "encoder.backbone.",
    )


def _feature_extractor(checkpoint: ParentCheckpoint) -> Any:
    """The parent's own; None if it has none."""
    try:
        return AutoFeatureExtractor.from_pretrained(checkpoint.source, **checkpoint.loading)
    except OSError:
        return None


def _chorus_parent(checkpoint: ParentCheckpoint, modality: str, kind: Any) -> TowerParent:
    config: Any = checkpoint.config
    if config.model_type == "chorus":
        config = getattr(config, f"{modality}_config")
        if config is None:
            raise ValueError(f"{checkpoint}: this Chorus model has no {modality} tower")
    if config.model_type != kind.config_class.model_type:
        raise ValueError(f"{checkpoint}: model_type={config.model_type!r} is no {modality} tower")
    # A tower saved alone has no prefix, one inside a model has one or two.
    mapping = {rf"^(model\.)?{modality}_tower\.": ""}
    return TowerParent(
        checkpoint.source, checkpoint.revision, config, lambda: _load(kind, checkpoint, config, mapping), ""
    )


def _load(kind: Any, checkpoint: ParentCheckpoint, config: Any, key_mapping: dict[str, str] | None = None) -> nn.Module:
    """A model of transformers' with the checkpoint's weights, in their dtype.

    Raises:
        ValueError: tensors that are missing or of another shape.
    """
    # A warning about every unused tensor of the head would hide the errors below, which are raised instead.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = kind.from_pretrained(
            checkpoint.source,
            config=config,
            key_mapping=key_mapping,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            # So that a wrong shape is reported with the missing ones, in one error.
            ignore_mismatched_sizes=True,
            **checkpoint.loading,
        )
    finally:
        logging.set_verbosity(verbosity)
    wrong = sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"{checkpoint}: {len(wrong)} tensors of {type(model).__name__} are missing or of another shape, such as "
            f"{wrong[0]!r}"
        )
    return model


def load_timm_encoder(
    architecture: str | None,
    model_args: dict[str, Any] | None,
    image_size: int,
    num_channels: int,
    state_dict: dict[str, Tensor],
    num_classes: int,
) -> nn.Module:
    """`create_timm_encoder` with the weights of a checkpoint, converted as timm converts its own.

    Args:
        num_classes: of the checkpoint's classifier, 0 for none. It is loaded as well, so that timm counts the tensors
            strictly, and then dropped.

    Raises:
        ImportError: timm is missing.
        ValueError: as above, or tensors that are missing or of another shape.
    """
    overlay = {"state_dict": dict(state_dict), "num_classes": num_classes}
    given: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": num_classes}
    model: Any = create_timm_encoder(architecture, model_args, image_size, num_channels, **given)
    model.reset_classifier(0)
    return model
