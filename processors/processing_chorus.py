"""Raw text, images and sound to the tensors of a Chorus model.

Unusual here:
- the processor owns the token-count formulas; the number of placeholders is known before any tensor is made;
- every mistake is found per sample; the error (`MediaError`) names the sample, the modality, the found and the expected
  number;
- truncation shortens text only;
- in a raw `__call__` a surplus placeholder is an error; conversations (`processing_chat`) keep typed ones as text.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack

from .feature_extraction_chorus import ChorusFeatureExtractor
from .image_processing_chorus import ChorusImageProcessor
from .processing_chat import ChatProcessor
from .processing_limits import MediaError, MediaLimits, MediaPlace, check_settings, num_pixels
from .processing_messages import default_chat_template
from .processing_placement import flatten_media, nest_media
from .processing_rows import pad_rows, truncate_rows


class ChorusProcessor(ChatProcessor):
    """Image processor, feature extractor and tokenizer of one model.

    Args:
        num_image_tokens: tokens of one image in the sequence; None: the model sees no images.
        frames_per_token: feature frames behind one audio token; None: the model hears nothing.
        audio_convolutions: [kernel, stride] of the convolutions, without padding, that shorten the frames before that.
        image_token: placeholder, one per item in the text passed in, one per feature in `input_ids`.
        audio_token: the same for audio.

    Raises:
        ValueError: a media token that the tokenizer does not know as one token.
    """

    def __init__(
        self,
        image_processor: ChorusImageProcessor | None = None,
        feature_extractor: ChorusFeatureExtractor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        num_image_tokens: int | None = None,
        frames_per_token: int | None = None,
        image_token: str = "<image>",
        audio_token: str = "<audio>",
        audio_convolutions: list[list[int]] | None = None,
    ):
        counts = {"num_image_tokens": num_image_tokens, "frames_per_token": frames_per_token}
        check_settings({**counts, "audio_convolutions": audio_convolutions or []}, ())
        self.num_image_tokens = num_image_tokens
        self.frames_per_token = frames_per_token
        self.audio_convolutions = audio_convolutions or []
        self.image_token = image_token
        self.audio_token = audio_token
        self.image_token_id = _media_token_id(tokenizer, image_token)
        self.audio_token_id = _media_token_id(tokenizer, audio_token)
        # A tokenizer saves only the sides that it was built with. Generation goes on at the right end of each row.
        keeps: Any = tokenizer
        for name, side in (("padding_side", "left"), ("truncation_side", keeps.truncation_side)):
            if name not in keeps.init_kwargs:
                setattr(keeps, name, side)
                keeps.init_kwargs[name] = side
        super().__init__(
            image_processor=image_processor or ChorusImageProcessor(),
            feature_extractor=feature_extractor or ChorusFeatureExtractor(),
            tokenizer=tokenizer,
            chat_template=chat_template or default_chat_template(image_token, audio_token),
        )

    @classmethod
    def validate_init_kwargs(
        cls, processor_config: dict[str, Any], valid_kwargs: Collection[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers drops unknown names in silence; a misspelt one is an error here."""
        check_settings(processor_config, valid_kwargs)
        return super().validate_init_kwargs(processor_config, valid_kwargs)

    @property
    def limits(self) -> MediaLimits:
        """Limits on the media of a batch; assigning sets them for all parts. They are never saved."""
        return self.image_processor.limits

    @limits.setter
    def limits(self, limits: MediaLimits) -> None:
        self.image_processor.limits = limits
        self.feature_extractor.limits = limits

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    # Token counts

    def num_image_tokens_for(self, num_images: int = 1) -> int:
        """Tokens of `num_images` images."""
        if self.num_image_tokens is None:
            raise MediaError("this model sees no images (num_image_tokens is None)", modality="image")
        return num_images * self.num_image_tokens

    def num_audio_tokens_for(self, num_samples: int) -> int:
        """Tokens of a clip of `num_samples` at the model's rate: for each window ceil(frames / frames_per_token), of
        the frames that the convolutions leave, at least one."""
        if self.frames_per_token is None:
            raise MediaError("this model hears nothing (frames_per_token is None)", modality="audio")
        windows = self.feature_extractor.frames_per_window(num_samples)
        for kernel, stride in self.audio_convolutions:
            # As many as the encoder has: both read its convolutions from the configuration.
            windows = [max((frames - kernel) // stride + 1, 1) for frames in windows]
        return sum(math.ceil(frames / self.frames_per_token) for frames in windows)

    def _get_num_multimodal_tokens(
        self, image_sizes: list | None = None, audio_lengths: list[int] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Token counts of images (height, width) and clips (samples at the model's rate), for serving engines."""
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [self.num_image_tokens_for() for _ in image_sizes]
            # An image is one row of `pixel_values`.
            counts["num_image_patches"] = [1] * len(image_sizes)
        if audio_lengths is not None:
            counts["num_audio_tokens"] = [self.num_audio_tokens_for(length) for length in audio_lengths]
        return MultiModalData(**counts)

    def replace_image_token(self, image_inputs: object = None, image_idx: int = 0, **kwargs: Any) -> str:
        """The placeholders of one image."""
        return self.image_token * self.num_image_tokens_for()

    def replace_audio_token(self, audio_inputs: Sequence[np.ndarray], audio_idx: int = 0, **kwargs: Any) -> str:
        """The placeholders of one clip; `audio_inputs` are loaded clips (samples,)."""
        return self.audio_token * self.num_audio_tokens_for(len(audio_inputs[audio_idx]))

    # Raw inputs to tensors

    def __call__(
        self, images: Any = None, text: Any = None, audio: Any = None, **kwargs: Unpack[ProcessingKwargs]
    ) -> BatchFeature:
        """Tensors of a batch; media may be one item, a flat list in placeholder order, or a list per sample.

        Args:
            images: PIL images, arrays, tensors, paths or bytes.
            text: one string or a list; each holds one `image_token` or `audio_token` per item.
            audio: arrays (with `sampling_rate=`), dicts with 'array' and 'sampling_rate', paths or bytes.
            kwargs: `return_tensors`, `padding` (default True), `truncation`, `max_length`, `sampling_rate`, ...

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` (B, S); with images `pixel_values` (images, C, H, W);
            with sound `input_features` (windows, frames, mels) and `input_features_mask` (windows, frames).

        Raises:
            MediaError: a mistake in one sample; nothing was computed for the others.
        """
        if kwargs.pop("videos", None) is not None:
            raise MediaError("unknown modality: videos; this processor takes text, images and audio", modality="video")
        media = kwargs.pop("media", {})  # of conversations, from `apply_chat_template`
        images, audio = media.get("image", images), media.get("audio", audio)
        if text is None and images is None and audio is None:
            raise ValueError("ChorusProcessor needs text, images or audio")
        merged = self._merge_kwargs(self.valid_processor_kwargs, self.tokenizer.init_kwargs, **kwargs)
        if text is None:
            image_rows, clip_rows = [flatten_media(images, "image")], [flatten_media(audio, "audio")]
        else:
            texts = [text] if isinstance(text, str) else list(text)
            for sample, entry in enumerate(texts):
                if not isinstance(entry, str):
                    place = MediaPlace("text", sample=sample)
                    raise place.error(f"text must be a string, found {type(entry).__name__}")
            image_rows = nest_media(images, texts, self.image_token, "image", self.limits)
            clip_rows = nest_media(audio, texts, self.audio_token, "audio", self.limits)
        # Decoded before any tensor is made: clips' lengths decide the number of placeholders, and mistakes cost less.
        loaded_images, loaded_clips = self._load_media(image_rows, clip_rows, merged)

        tensor_type = merged["text_kwargs"].pop("return_tensors", None)
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._encode(texts, loaded_images, loaded_clips, merged))
        if loaded_images:
            data.update(self.image_processor(loaded_images, **merged["images_kwargs"]))
        if loaded_clips:
            data.update(self.feature_extractor.featurize(loaded_clips, tensor_type))
        return BatchFeature(data, tensor_type=tensor_type, skip_tensor_conversion=self.skip_tensor_conversion)

    def _load_media(self, image_rows: list[list], clip_rows: list[list], merged: dict[str, Any]) -> tuple[list, list]:
        """Decoded images and clips of all samples, flat, each checked with its sample's number."""
        images, clips = [], []
        do_rescale, layout = (merged["images_kwargs"].get(name) for name in ("do_rescale", "input_data_format"))
        sampling_rate = merged["audio_kwargs"].get("sampling_rate")
        for sample, (row_images, row_clips) in enumerate(zip(image_rows, clip_rows, strict=True)):
            of_images, of_sound = MediaPlace("image", sample=sample), MediaPlace("audio", sample=sample)
            if row_images and self.num_image_tokens is None:
                raise of_images.error("this model sees no images")
            if row_clips and self.frames_per_token is None:
                raise of_sound.error("this model hears nothing")
            pixels, seconds = 0, 0.0
            for index, image in enumerate(row_images):
                images.append(self.image_processor.load(image, MediaPlace("image", index, sample), do_rescale, layout))
                pixels += num_pixels(images[-1])
                if pixels > (most := self.limits.sample_pixels):
                    raise of_images.error(f"images of {pixels} pixels, the limit is {most}")
            for index, clip in enumerate(row_clips):
                clips.append(self.feature_extractor.load(clip, MediaPlace("audio", index, sample), sampling_rate))
                seconds += len(clips[-1]) / self.feature_extractor.sampling_rate
                if seconds > (longest := self.limits.sample_seconds):
                    raise of_sound.error(f"{seconds:.2f} seconds, the limit is {longest:g}")
        return images, clips

    def _encode(self, texts: list[str], images: list, clips: list, merged: dict[str, Any]) -> dict[str, Any]:
        """Token rows with expanded placeholders, truncated and padded."""
        options = dict(merged["text_kwargs"])
        options.pop("sanitize_control_tokens", None)
        wants_types = options.pop("return_mm_token_type_ids", True)
        wants_offsets = options.pop("return_text_replacement_offsets", False)
        # Taken from the tokenizer: it would pad and cut without knowing which tokens stand for media.
        padding, truncation = options.pop("padding", True), options.pop("truncation", None)
        max_length, multiple = options.pop("max_length", None), options.pop("pad_to_multiple_of", None)
        side = options.pop("padding_side", None) or self.tokenizer.padding_side
        if max_length is None and self.tokenizer.model_max_length < 10**9:  # a huge number stands for no limit
            max_length = self.tokenizer.model_max_length

        image_runs = [self.replace_image_token() for _ in images]
        clip_runs = [self.replace_audio_token(clips, index) for index in range(len(clips))]
        expanded, offsets = self.get_text_with_replacements(list(texts), image_runs, [], clip_runs)
        rows = dict(self.tokenizer(expanded, padding=False, truncation=False, **options))
        media_ids = {self.image_token_id, self.audio_token_id}
        # Before truncation, which must find each placeholder as one token to keep it.
        self._check_placeholders(rows["input_ids"], expanded)
        # True, a string or an enumeration, as tokenizers take it.
        if truncation and getattr(truncation, "value", truncation) != "do_not_truncate" and max_length is not None:
            rows = truncate_rows(rows, max_length, media_ids, self.tokenizer.truncation_side)
        for sample, ids in enumerate(rows["input_ids"]):
            if not ids:
                place = MediaPlace("text", sample=sample)
                raise place.error("found 0 tokens, expected at least 1: no words, images or clips are left")
        if wants_types:
            rows["mm_token_type_ids"] = self.create_mm_token_type_ids(rows["input_ids"])
        strategy = getattr(padding, "value", padding)
        if strategy and strategy != "do_not_pad":
            length = max_length if strategy == "max_length" else None
            rows = pad_rows(rows, side, self.tokenizer.pad_token_id, length, multiple)
        if wants_offsets:
            rows["text_replacement_offsets"] = offsets
        return rows

    def _check_placeholders(self, input_ids: list[list[int]], expanded: list[str]) -> None:
        """The tokenizer must keep every placeholder as one token of its own."""
        for sample, (ids, text) in enumerate(zip(input_ids, expanded, strict=True)):
            for modality, token, token_id in (
                ("image", self.image_token, self.image_token_id),
                ("audio", self.audio_token, self.audio_token_id),
            ):
                found, expected = ids.count(token_id), text.count(token)
                if found != expected:
                    raise MediaPlace(modality, sample=sample).error(
                        f"the tokenizer made {found} {modality} tokens of {expected} {token}; register the token with "
                        "add_media_tokens"
                    )


def _media_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    # Some tokenizers answer None for an unknown token, others the unknown token's id.
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token}; add_media_tokens(tokenizer) adds it")
    return token_id
