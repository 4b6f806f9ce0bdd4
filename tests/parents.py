"""Small text models and encoders of other libraries, saved as their own projects save them."""

from pathlib import Path
from typing import Any

import timm
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.surgery.compose_plan import plan_composition

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = {"image_size": 32, "patch_size": 8}
WORDS = SIZES | {"vocab_size": 99, "max_position_embeddings": 16}
# A token every 20 samples, 30 samples behind the first: clips of a few hundred samples are enough.
WAVEFORM = SIZES | {
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
TIMM_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def whisper_config(bins: int = 80) -> WhisperConfig:
    """Windows of one second."""
    return WhisperConfig(
        d_model=32, num_mel_bins=bins, max_source_positions=50, vocab_size=99,
        encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


def dino(kind: type, **changes: Any) -> Any:
    """A configuration pretrained on larger images than the processor makes, as DINOv2's are."""
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    return kind(**sizes | {"image_size": 56, "patch_size": 8} | changes)


VISION_PARENTS: dict[str, Any] = {
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=WORDS, vision_config=SIZES | PIXELS)),
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **PIXELS)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=WORDS, vision_config=SIZES | PIXELS, projection_dim=32)),
    "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **PIXELS)),
    "dinov2": lambda: Dinov2Model(dino(Dinov2Config)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(dino(Dinov2WithRegistersConfig)),
    "dinov3": lambda: DINOv3ViTModel(dino(DINOv3ViTConfig, image_size=32, intermediate_size=48)),
}
AUDIO_PARENTS: dict[str, Any] = {
    "whisper": lambda: WhisperModel(whisper_config()),
    "whisper_large_v3": lambda: WhisperForConditionalGeneration(whisper_config(bins=128)),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**WAVEFORM)),
    "wav2vec2_layer_norm": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**WAVEFORM, **LAYER_NORM)),
    "hubert": lambda: HubertModel(HubertConfig(**WAVEFORM)),
    "hubert_ctc": lambda: HubertForCTC(HubertConfig(**WAVEFORM, **LAYER_NORM)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**WAVEFORM)),
    "wavlm_ctc": lambda: WavLMForCTC(WavLMConfig(**WAVEFORM, **LAYER_NORM)),
}
WAVEFORM_PARENTS = [name for name in AUDIO_PARENTS if "whisper" not in name]


def image_processor(name: str) -> Any:
    """What belongs to a vision parent: each library's own resizing, cropping and normalisation."""
    if name.startswith("siglip"):
        return SiglipImageProcessor(size={"height": 32, "width": 32})
    if name.startswith("clip"):
        return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
    )


def feature_extractor(name: str) -> Any:
    if name.startswith("whisper"):
        return WhisperFeatureExtractor(feature_size=128 if "v3" in name else 80, chunk_length=1)
    return Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask="layer" in name or "ctc" in name)


def save_vision_parent(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = VISION_PARENTS[name]().eval().to(dtype)
    model.save_pretrained(folder)
    image_processor(name).save_pretrained(folder)
    return model


def save_audio_parent(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AUDIO_PARENTS[name]().eval().to(dtype)
    model.save_pretrained(folder)
    feature_extractor(name).save_pretrained(folder)
    return model


def save_timm_parent(folder: Path, name: str = "vit_tiny_patch16_224", **arguments: Any) -> Any:
    torch.manual_seed(0)
    sizes = {key: value for key, value in arguments.items() if key != "num_classes"} if arguments else TIMM_ARGS
    model = timm.create_model(name, **(arguments or TIMM_ARGS | {"num_classes": 7})).eval()
    # timm before 1.0.31 writes sizes only if they are given again.
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, model_args=sizes or None)
    return model


def encoder_of(model: Any) -> Any:
    """The part of a parent that hears or sees."""
    if isinstance(model, WhisperModel | WhisperForConditionalGeneration):
        return model.get_encoder()
    if hasattr(model, "vision_model"):
        return model.vision_model
    return getattr(model, model.base_model_prefix) if type(model).__name__.endswith("ForCTC") else model


def plain_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Bytes, and tokens as a text model has them: none for media, no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>", *special.pop("others", [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is it? yes or no", "three four five"], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def save_text_parent(folder: Path, **special: Any) -> Any:
    """A Llama with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = plain_tokenizer(**special)
    sizes = SIZES | {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def build(text: Any, vision: Any = None, audio: Any = None, experts: Any = None, **options: Any) -> Any:
    """The model of a composition alone, of parents that need neither tokenizer nor image processor."""
    return plan_composition(ChorusForConditionalGeneration, text, vision, audio, experts, **options).build()
