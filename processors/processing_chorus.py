"""Raw text, images and sound to the tensors of a Chorus model.

Unusual here:
- the processor owns the token-count formulas; the number of placeholders is known before any tensor is made;
- every mistake is found per sample and the error (`MediaError`) names the sample, the modality, the found and the expected number;
- truncation shortens text only;
- a placeholder typed into a message is text (see `chat_messages`); in a raw `__call__` a surplus placeholder is an error;
- labels cover the assistant's words and the token that ends its turn.
"""

import math
import re
from typing import Any

import torch
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from .chat_messages import default_chat_template, prepare_conversation, split_batch
from .feature_extraction_chorus import ChorusFeatureExtractor
from .image_processing_chorus import ChorusImageProcessor
from .media_layout import flatten_media, nest_media
from .media_limits import MediaError, MediaLimits, MediaPlace
from .token_rows import label_rows, pad_rows, pair_tokens, truncate_rows
from .tokenization_chorus import add_media_tokens

# Tokenizers without a limit report a huge model_max_length.
NO_MAX_LENGTH = 10**9


class ChorusProcessor(ProcessorMixin):
    """Image processor, feature extractor and tokenizer of one model.

    Args:
        num_image_tokens: tokens of one image in the sequence; None: the model sees no images.
        frames_per_token: feature frames behind one audio token; None: the model hears nothing.
        image_token, audio_token: placeholders, one per item in the text passed in, one per feature in `input_ids`.

    Raises:
        ValueError: a media token that the tokenizer does not know as one token.
    """

    return_mm_token_type_ids = True
    text_kwargs = {"padding": True}

    def __init__(
        self,
        image_processor: ChorusImageProcessor | None = None,
        feature_extractor: ChorusFeatureExtractor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int | None = None,
        frames_per_token: int | None = None,
        image_token: str = "<image>",
        audio_token: str = "<audio>",
    ):
        self.num_image_tokens = num_image_tokens
        self.frames_per_token = frames_per_token
        self.image_token = image_token
        self.audio_token = audio_token
        self.image_token_id = _media_token_id(tokenizer, image_token)
        self.audio_token_id = _media_token_id(tokenizer, audio_token)
        super().__init__(
            image_processor=image_processor or ChorusImageProcessor(),
            feature_extractor=feature_extractor or ChorusFeatureExtractor(),
            tokenizer=tokenizer,
            chat_template=chat_template or default_chat_template(image_token, audio_token),
        )

    @classmethod
    def from_config(cls, config: Any, tokenizer: Any, **overrides: Any) -> "ChorusProcessor":
        """The processor that fits a `ChorusConfig`.

        Adds missing media tokens to `tokenizer` (then the model's embeddings must be resized before training) and sets its
        padding side to the left, as generation needs it.

        Args:
            config: a ChorusConfig, or anything with its `vision_config` and `audio_config`; either may be None.
            overrides: settings of the processor or of a part, by name, for example `image_mean`, `max_audio_seconds` or
                `image_token`.

        Raises:
            TypeError: an override that no part knows.
            ValueError: the tokenizer's media token ids are not those of the config.
        """
        vision, audio = getattr(config, "vision_config", None), getattr(config, "audio_config", None)
        image_settings: dict[str, Any] = {}
        audio_settings: dict[str, Any] = {}
        own: dict[str, Any] = {"num_image_tokens": None, "frames_per_token": None}
        if vision is not None:
            image_settings = {
                "size": {"height": vision.image_size, "width": vision.image_size},
                "num_channels": vision.num_channels,
            }
            own["num_image_tokens"] = vision.num_image_tokens
        if audio is not None:
            names = {"sampling_rate", "n_fft", "hop_length", "max_seconds"}
            audio_settings = {name: getattr(audio, name) for name in names} | {"feature_size": audio.num_mel_bins}
            own["frames_per_token"] = audio.frames_per_token
        audio_names = set(ChorusFeatureExtractor().to_dict())
        for name, value in overrides.items():
            if name in {"chat_template", "num_image_tokens", "frames_per_token", "image_token", "audio_token"}:
                own[name] = value
            elif name in ChorusImageProcessor.valid_kwargs.__annotations__:
                image_settings[name] = value
            elif name in audio_names:
                audio_settings[name] = value
            else:
                raise TypeError(f"from_config got {name}={value!r}, which no part of the processor knows")
        image_token, audio_token = own.get("image_token", "<image>"), own.get("audio_token", "<audio>")
        add_media_tokens(tokenizer, image_token, audio_token)
        for token, expected in ((image_token, config.image_token_id), (audio_token, config.audio_token_id)):
            found = tokenizer.convert_tokens_to_ids(token)
            if expected is not None and found != expected:
                raise ValueError(f"the tokenizer gives {token} the id {found}, the config expects {expected}")
        tokenizer.padding_side = "left"
        return cls(ChorusImageProcessor(**image_settings), ChorusFeatureExtractor(**audio_settings), tokenizer, **own)

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
        """Tokens of a clip of `num_samples` at the model's sampling rate: ceil(frames / frames_per_token) per window."""
        if self.frames_per_token is None:
            raise MediaError("this model hears nothing (frames_per_token is None)", modality="audio")
        windows = self.feature_extractor.frames_per_window(num_samples)
        return sum(math.ceil(frames / self.frames_per_token) for frames in windows)

    def _get_num_multimodal_tokens(
        self, image_sizes: list | None = None, audio_lengths: list[int] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Token counts for images (height, width) and clips (samples at the model's rate), as serving engines ask."""
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [self.num_image_tokens_for() for _ in image_sizes]
            counts["num_image_patches"] = [1] * len(image_sizes)
        if audio_lengths is not None:
            counts["num_audio_tokens"] = [self.num_audio_tokens_for(length) for length in audio_lengths]
        return MultiModalData(**counts)

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **kwargs: Any) -> str:
        """The placeholders of one image."""
        return self.image_token * self.num_image_tokens_for()

    def replace_audio_token(self, audio_inputs: Any, audio_idx: int = 0, **kwargs: Any) -> str:
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
            `input_ids`, `attention_mask`, `mm_token_type_ids` (B, S); with images `pixel_values` (images, C, H, W); with
            sound `input_features` (windows, frames, mels) and `input_features_mask` (windows, frames).

        Raises:
            MediaError: a mistake in one sample; nothing was computed for the others.
        """
        if kwargs.pop("videos", None) is not None:
            raise MediaError("unknown modality: videos; this processor takes text, images and audio", modality="video")
        if text is None and images is None and audio is None:
            raise ValueError("ChorusProcessor needs text, images or audio")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if text is None:
            image_rows, clip_rows = [flatten_media(images, "image")], [flatten_media(audio, "audio")]
        else:
            texts = [text] if isinstance(text, str) else list(text)
            for sample, entry in enumerate(texts):
                if not isinstance(entry, str):
                    raise MediaError(
                        f"sample {sample}: text must be a string, found {type(entry).__name__}", sample, "text"
                    )
            image_rows = nest_media(images, texts, self.image_token, "image", self.limits)
            clip_rows = nest_media(audio, texts, self.audio_token, "audio", self.limits)
        loaded_images, loaded_clips = self._load_media(
            image_rows, clip_rows, merged["audio_kwargs"].get("sampling_rate")
        )

        tensor_type = merged["text_kwargs"].pop("return_tensors", None)
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._encode(texts, loaded_images, loaded_clips, merged))
        if loaded_images:
            data.update(self.image_processor(loaded_images, **merged["images_kwargs"]))
        if loaded_clips:
            data.update(self.feature_extractor.featurize(loaded_clips, tensor_type))
        return BatchFeature(data, tensor_type=tensor_type, skip_tensor_conversion=self.skip_tensor_conversion)

    def _load_media(
        self, image_rows: list[list], clip_rows: list[list], sampling_rate: int | None
    ) -> tuple[list, list]:
        """Decoded images and clips of all samples, flat, each checked with its sample's number."""
        images, clips = [], []
        for sample, (row_images, row_clips) in enumerate(zip(image_rows, clip_rows, strict=True)):
            if row_images and self.num_image_tokens is None:
                raise MediaError(f"sample {sample}: this model sees no images", sample, "image")
            if row_clips and self.frames_per_token is None:
                raise MediaError(f"sample {sample}: this model hears nothing", sample, "audio")
            for index, image in enumerate(row_images):
                images.append(self.image_processor.load(image, MediaPlace("image", index, sample)))
            for index, clip in enumerate(row_clips):
                clips.append(self.feature_extractor.load(clip, MediaPlace("audio", index, sample), sampling_rate))
        return images, clips

    def _encode(self, texts: list[str], images: list, clips: list, merged: dict[str, Any]) -> dict[str, Any]:
        """Token rows with expanded placeholders, truncated and padded."""
        options = dict(merged["text_kwargs"])
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets", "sanitize_control_tokens"):
            options.pop(name, None)
        padding, truncation = options.pop("padding", True), options.pop("truncation", None)
        max_length, multiple = options.pop("max_length", None), options.pop("pad_to_multiple_of", None)
        side = options.pop("padding_side", None) or self.tokenizer.padding_side
        if max_length is None and self.tokenizer.model_max_length < NO_MAX_LENGTH:
            max_length = self.tokenizer.model_max_length

        image_runs = [self.replace_image_token() for _ in images]
        clip_runs = [self.replace_audio_token(clips, index) for index in range(len(clips))]
        expanded, offsets = self.get_text_with_replacements(list(texts), image_runs, [], clip_runs)
        rows = dict(self.tokenizer(expanded, padding=False, truncation=False, **options))
        media_ids = {self.image_token_id, self.audio_token_id}
        self._check_placeholders(rows["input_ids"], expanded)
        if truncation and getattr(truncation, "value", truncation) != "do_not_truncate" and max_length is not None:
            rows = truncate_rows(rows, max_length, media_ids, self.tokenizer.truncation_side)
        if merged["return_mm_token_type_ids"]:
            rows["mm_token_type_ids"] = self.create_mm_token_type_ids(rows["input_ids"])
        strategy = getattr(padding, "value", padding)
        if strategy and strategy != "do_not_pad":
            length = max_length if strategy == "max_length" else None
            rows = pad_rows(rows, side, self.tokenizer.pad_token_id, length, multiple)
        if merged["return_text_replacement_offsets"]:
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
                    raise MediaError(
                        f"sample {sample}: the tokenizer made {found} {modality} tokens of {expected} {token}; "
                        "register the token with add_media_tokens",
                        sample,
                        modality,
                    )

    # Conversations

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        images: Any = None,
        audio: Any = None,
        return_labels: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or a batch of them, as text or (with `tokenize=True, return_dict=True`) as model inputs.

        A message is `{"role", "content"}`; content is a string or a list of `{"type": "text", "text"}`,
        `{"type": "image", "image" | "path" | "url" | "base64" | "bytes"}` and `{"type": "audio", "audio" | ...}` with
        `"sampling_rate"` beside an array. Special tokens typed into a message become text (see `chat_messages`).

        Args:
            images, audio: items for parts that hold no data, in order: a flat list for one conversation, a list per
                conversation for a batch.
            return_labels: add `labels`, see `build_labels`; implies `tokenize=True, return_dict=True`.
            processor_kwargs: settings of `__call__`, such as `padding`, `truncation`, `max_length`, `sampling_rate`.
            kwargs: as in `ProcessorMixin.apply_chat_template`.

        Raises:
            MediaError: a mistake in one conversation, by its number.
        """
        options = dict(processor_kwargs or {})
        conversations, is_batched = split_batch(conversation)
        kwargs.pop("sanitize_control_tokens", None)
        rate = (
            kwargs.get("sampling_rate")
            or options.get("sampling_rate")
            or options.get("audio_kwargs", {}).get("sampling_rate")
        )
        given = {"image": images, "audio": audio}
        rows = {
            modality: self._media_rows(media, len(conversations), is_batched, modality)
            for modality, media in given.items()
        }
        control = self._control_tokens()
        prepared = [
            prepare_conversation(messages, {name: rows[name][sample] for name in rows}, control, rate, sample)
            for sample, messages in enumerate(conversations)
        ]
        if kwargs.get("tokenize") or return_labels:
            options.setdefault("add_special_tokens", False)
        target = prepared if is_batched else prepared[0]
        if not return_labels:
            return super().apply_chat_template(target, chat_template, processor_kwargs=options, **kwargs)

        wants_mask = kwargs.pop("return_assistant_tokens_mask", False)
        tensor_type = kwargs.pop("return_tensors", "auto")
        tensor_type = options.pop("return_tensors", None) if tensor_type == "auto" else tensor_type
        kwargs.update(tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None)
        batch = super().apply_chat_template(target, chat_template, processor_kwargs=options, **kwargs)
        batch["labels"] = self.build_labels(batch["input_ids"], batch["assistant_masks"])
        if not wants_mask:
            del batch["assistant_masks"]
        return batch.convert_to_tensors(tensor_type=tensor_type)

    def _media_rows(self, media: Any, num_conversations: int, is_batched: bool, modality: str) -> list[list[Any]]:
        if not is_batched or media is None:
            return [flatten_media(media, modality)] + [[] for _ in range(num_conversations - 1)]
        if len(media) != num_conversations:
            raise MediaError(f"found {len(media)} lists of {modality} items for {num_conversations} conversations")
        return [flatten_media(entry, modality) for entry in media]

    def _control_tokens(self) -> re.Pattern[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens = added | set(self.tokenizer.all_special_tokens) | {self.image_token, self.audio_token}
        return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token))

    def _multimodal_inputs_from_conversations(
        self, conversations: list[list[dict]], audio_loading_params: dict, load_audio_from_video: bool = False
    ) -> tuple[list[list], list[list], list[list], dict]:
        """Media of prepared conversations, a list per conversation; decoding waits until everything is checked."""
        rows: dict[str, list[list]] = {"image": [], "audio": []}
        for sample, messages in enumerate(conversations):
            parts = [
                part for message in messages if isinstance(message.get("content"), list) for part in message["content"]
            ]
            for modality in rows:
                items = [part[modality] for part in parts if part["type"] == modality]
                if any(item is None for item in items):
                    missing = sum(item is None for item in items)
                    raise MediaError(f"sample {sample}: {missing} {modality} parts hold no data", sample, modality)
                rows[modality].append(items)
        clips = rows["audio"] if any(rows["audio"]) else []
        return rows["image"], [[] for _ in conversations], clips, {}

    # Labels

    def build_labels(self, input_ids: Any, assistant_masks: Any) -> list[list[int]]:
        """Labels (B, S): the assistant's words and the token that ends its turn, -100 elsewhere.

        Media and pad tokens are never labelled, also inside an assistant's turn.
        """
        if isinstance(input_ids, torch.Tensor):
            input_ids, assistant_masks = input_ids.tolist(), torch.as_tensor(assistant_masks).tolist()
        never = {self.image_token_id, self.audio_token_id}
        if self.tokenizer.pad_token_id != self.tokenizer.eos_token_id:
            never.add(self.tokenizer.pad_token_id)
        return label_rows(input_ids, assistant_masks, never)

    def explain_labels(self, input_ids: Any, labels: Any) -> str:
        """Print and return one line per token of one sample (S,): a mark where it is labelled, then the token."""
        ids = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
        tokens = [self.tokenizer.decode([token]) for token in ids]
        lines = [f"{'label' if is_label else '     '} {token!r}" for token, is_label in pair_tokens(tokens, labels)]
        text = "\n".join(lines)
        print(text)
        return text


def _media_token_id(tokenizer: Any, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token}; add_media_tokens(tokenizer) adds it")
    return token_id
