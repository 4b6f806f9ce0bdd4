"""Images and sound of a request, for vLLM: how many tokens they are, and what tensors our processor makes of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.context import TimingContext

from chorus_moe.processors.feature_extraction_chorus import ChorusFeatureExtractor
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_limits import MediaPlace
from chorus_moe.processors.processing_media import MEDIA


class OwnResampler:
    """In the place of vLLM's, so that a clip of another rate is heard as everywhere else."""

    def __init__(self, extractor: ChorusFeatureExtractor):
        self.extractor = extractor

    def resample(self, audio: np.ndarray, *, orig_sr: float) -> np.ndarray:
        """The clip `(samples,)` at the model's rate."""
        return self.extractor.load(audio, MediaPlace("audio", 0), round(orig_sr))


class ChorusMediaInfo(BaseProcessingInfo):
    """What a model takes."""

    def get_hf_processor(self, **kwargs: object) -> ChorusProcessor:
        return self.ctx.get_hf_processor(ChorusProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {name: None for name in self.ctx.get_hf_config().modalities if name in MEDIA}

    def get_data_parser(self) -> MultiModalDataParser:
        parser = MultiModalDataParser()
        parser.audio_resampler = OwnResampler(self.get_hf_processor().feature_extractor)
        return parser

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        processor = self.get_hf_processor()
        tokens = {}
        if "image" in mm_counts:
            tokens["image"] = processor.num_image_tokens_for()
        if "audio" in mm_counts:
            tokens["audio"] = processor.num_audio_tokens_for(self.longest_clip(seq_len))
        return tokens

    def longest_clip(self, seq_len: int) -> int:
        """Samples of the longest clip that the processor takes and `seq_len` tokens hold."""
        processor = self.get_hf_processor()
        extractor = processor.feature_extractor
        samples = int(extractor.max_audio_seconds * extractor.sampling_rate)
        while processor.num_audio_tokens_for(samples) > seq_len:
            samples //= 2
        return samples


class EmptyMedia(BaseDummyInputsBuilder):
    """Media with which vLLM measures what it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(MEDIA[name].token * count for name, count in mm_counts.items())

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        data: dict[str, list] = {}
        if count := mm_counts.get("image", 0):
            data["image"] = [Image.new("RGB", (32, 32))] * count
        if count := mm_counts.get("audio", 0):
            # Not silence, which the processor refuses.
            data["audio"] = [np.full(self.info.longest_clip(seq_len), 0.1, dtype=np.float32)] * count
        return data


class ChorusMediaProcessor(BaseMultiModalProcessor):
    """From the media of a request and the ids of its prompt to tensors and expanded ids."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """As in vLLM, for a request whose placeholders and media match.

        Raises:
            ValueError: a request with another number of placeholders than media.
        """
        processor = self.info.get_hf_processor()
        for name, found in (("image", processor.image_token_id), ("audio", processor.audio_token_id)):
            count, expected = inputs.prompt.count(found), inputs.mm_data_items.get_count(name, strict=False)
            if count != expected:
                raise ValueError(
                    f"found {count} {name} placeholders in the prompt for {expected} {MEDIA[name].plural}; one that a "
                    "person typed counts, too"
                )
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Each image and each clip on its own, because vLLM keeps each for later requests."""
        if hf_kwargs:
            raise ValueError(f"mm_processor_kwargs={dict(hf_kwargs)}: a request does not change the processor")
        processor = self.info.get_hf_processor()
        rate = processor.feature_extractor.sampling_rate
        data: dict[str, Any] = {}
        if images := hf_data.get("images"):
            rows = [processor(text=processor.image_token, images=[i], return_tensors="pt") for i in images]
            data["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
            data["num_image_tokens"] = torch.tensor([processor.num_image_tokens_for()] * len(images))
        if clips := hf_data.get("audio"):
            rows = [
                processor(text=processor.audio_token, audio=[c], sampling_rate=rate, return_tensors="pt") for c in clips
            ]
            data["input_features"] = [row["input_features"] for row in rows]
            data["input_features_mask"] = [row["input_features_mask"] for row in rows]
            data["num_audio_tokens"] = torch.tensor(
                [int((row["input_ids"] == processor.audio_token_id).sum()) for row in rows]
            )
        return BatchFeature(data)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "num_image_tokens": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "input_features": MultiModalFieldConfig.batched("audio"),
            "input_features_mask": MultiModalFieldConfig.batched("audio"),
            "num_audio_tokens": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        """One placeholder stands in the prompt for each image and each clip; the model sees one for each token."""
        processor = self.info.get_hf_processor()
        ids = {"image": processor.image_token_id, "audio": processor.audio_token_id}

        def replacement(name: str, items: Any) -> PromptReplacement:
            def tokens(index: int) -> PromptUpdateDetails:
                count = int(items[index][f"num_{name}_tokens"].data)
                return PromptUpdateDetails.select_token_id([ids[name]] * count, ids[name])

            return PromptReplacement(modality=name, target=[ids[name]], replacement=tokens)

        return [replacement(name, items) for name, items in out_mm_kwargs.items()]
