"""An exported model, run by onnxruntime alone: torch computes nothing here.

Shape suffixes: B batch, S tokens, D hidden size.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig

import chorus_moe.auto_classes  # noqa: F401  registers the configuration
from chorus_moe.modeling.configuration_modalities import ENCODED, EncodedModality
from chorus_moe.serving.exporting.parts import DECODER, EMBED_TOKENS

Arrays = dict[str, np.ndarray]


class OnnxModel:
    """The graphs of a folder that `export_model` wrote. Inputs are those of the processor, as arrays or tensors.

    Args:
        providers: onnxruntime's, such as `CUDAExecutionProvider`.

    Raises:
        FileNotFoundError: the folder holds no graphs.
    """

    def __init__(self, folder: str | os.PathLike[str], providers: tuple[str, ...] = ("CPUExecutionProvider",)):
        import onnxruntime

        paths = sorted(Path(folder).glob("*.onnx"))
        if not paths:
            raise FileNotFoundError(
                f"{str(folder)!r} holds no .onnx files: chorus-moe export-graphs MODEL OUT writes them"
            )
        self.config = AutoConfig.from_pretrained(folder)
        self.sessions = {path.stem: onnxruntime.InferenceSession(path, providers=list(providers)) for path in paths}
        is_generating = (Path(folder) / "generation_config.json").is_file()
        self.generation_config = GenerationConfig.from_pretrained(folder) if is_generating else None

    def generate(self, max_new_tokens: int = 64, **inputs: Any) -> torch.Tensor:
        """Prompts and their greedy answers `(B, S + answer)`, as the model's own `generate` returns them; what
        `generation_config` says of other things than end and padding is not read.

        Args:
            inputs: prompts padded on the left.

        Raises:
            ValueError: a model that does not generate.
        """
        if self.generation_config is None:
            raise ValueError(f"{self.config.architectures} does not generate; call the model itself")
        arrays = as_arrays(inputs)
        ids, mask = arrays["input_ids"], self.mask_of(arrays)
        step = {"inputs_embeds": self.embed(arrays), "mm_token_type_ids": self.modalities(ids)}
        step["position_ids"] = (mask.cumsum(axis=1) - 1).clip(min=0)
        session, cache = self.sessions[DECODER], self._empty_cache(len(ids))
        ends, pad = np.array(self.generation_config.eos_token_id).reshape(-1), self.generation_config.pad_token_id
        has_ended = np.zeros(len(ids), dtype=bool)
        for _ in range(max_new_tokens):
            logits, *states = session.run(None, {**step, "attention_mask": mask, **cache})
            cache = dict(zip(cache, states, strict=True))
            token = np.where(has_ended, 0 if pad is None else pad, logits[:, -1].argmax(axis=-1))
            ids = np.concatenate([ids, token[:, None]], axis=1)
            has_ended |= np.isin(token, ends)
            if has_ended.all():
                break
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            step = {
                "inputs_embeds": self._run(EMBED_TOKENS, input_ids=token[:, None])[0],
                "mm_token_type_ids": np.zeros_like(token[:, None]),
                "position_ids": step["position_ids"][:, -1:] + 1,
            }
        return torch.from_numpy(ids)

    def __call__(self, **inputs: Any) -> Arrays:
        """`logits` of a classifier; `text_embeds`, `image_embeds` and `audio_embeds` of an embedding model, of what is
        given."""
        arrays = as_arrays(inputs)
        if DECODER in self.sessions:
            states = {"inputs_embeds": self.embed(arrays), "attention_mask": self.mask_of(arrays)}
            modality = self.modalities(arrays["input_ids"])
            return {"logits": self._run(DECODER, **states, mm_token_type_ids=modality)[0]}
        found = {}
        if "input_ids" in arrays:
            embeds = self._run(EMBED_TOKENS, input_ids=arrays["input_ids"])[0]
            found["text"] = (embeds, self.mask_of(arrays))
        found |= {row.name: self.encode(row, arrays) for row in ENCODED if row.name in self.given(arrays)}
        return {
            f"{name}_embeds": self._run(f"{name}_{DECODER}", inputs_embeds=tokens, attention_mask=mask)[0]
            for name, (tokens, mask) in found.items()
        }

    def embed(self, arrays: Arrays) -> np.ndarray:
        """`(B, S, D)` with image and audio tokens in the places of their placeholders.

        Raises:
            ValueError: placeholders and tokens do not match.
        """
        ids = arrays["input_ids"]
        embeds_BSD = self._run(EMBED_TOKENS, input_ids=ids)[0].copy()
        for row in ENCODED:
            places = ids == getattr(self.config, row.token_id)
            tokens = embeds_BSD[:0, 0]
            if row.name in self.given(arrays):
                encoded, mask = self.encode(row, arrays)
                tokens = encoded[mask.astype(bool)]
            if places.sum() != len(tokens):
                raise ValueError(f"found {places.sum()} {row.name} placeholders for {len(tokens)} {row.name} tokens")
            embeds_BSD[places] = tokens
        return embeds_BSD

    def encode(self, row: EncodedModality, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `(images or clips, tokens, D)` and which of them are real."""
        if row.name == "image":
            tokens = self._run("image_encoder", pixel_values=arrays["pixel_values"])[0]
            return tokens, np.ones(tokens.shape[:2], dtype=np.int64)
        features = arrays["input_features"]
        mask = arrays.get("input_features_mask", np.ones(features.shape[:2], dtype=np.int64))
        # Pipelines pad clips on the left, the encoder wants them to begin at the first frame.
        order = np.argsort(mask == 0, axis=1, kind="stable")
        features, mask = np.take_along_axis(features, order[..., None], 1), np.take_along_axis(mask, order, 1)
        tokens, kept = self._run("audio_encoder", input_features=features, input_features_mask=mask)
        return tokens, kept.astype(np.int64)

    def modalities(self, ids: np.ndarray) -> np.ndarray:
        """`mm_token_type_ids` of token ids."""
        found = np.zeros_like(ids)
        for row in ENCODED:
            found[ids == getattr(self.config, row.token_id)] = row.type_id
        return found

    @staticmethod
    def given(arrays: Arrays) -> list[str]:
        """The encoded modalities that there are inputs of."""
        inputs = {"image": "pixel_values", "audio": "input_features"}
        return [name for name, key in inputs.items() if arrays.get(key) is not None]

    @staticmethod
    def mask_of(arrays: Arrays) -> np.ndarray:
        return arrays.get("attention_mask", np.ones_like(arrays["input_ids"]))

    def _empty_cache(self, batch: int) -> Arrays:
        text = self.config.text_config
        names = [entry.name for entry in self.sessions[DECODER].get_inputs() if entry.name.startswith("past_")]
        return {name: np.zeros((batch, text.num_key_value_heads, 0, text.head_dim), np.float32) for name in names}

    def _run(self, part: str, **inputs: np.ndarray) -> list[np.ndarray]:
        return self.sessions[part].run(None, inputs)


def as_arrays(inputs: dict[str, Any]) -> Arrays:
    """What a processor returns; integers as the graphs take them."""
    arrays = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    return {n: a.astype(np.float32 if a.dtype.kind == "f" else np.int64) for n, a in arrays.items()}
