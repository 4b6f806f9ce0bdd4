"""Contrastive embeddings: text, image and sound of one sample are pulled together in one space."""

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_banks import MODALITY_IDS
from .configuration_chorus import ChorusConfig
from .early_exit import pool_tokens
from .modeling_head import ChorusHead
from .modeling_outputs import ChorusContrastiveOutput
from .routers import BankRouting

Routing = tuple[dict[str, BankRouting], ...]


class ChorusForContrastive(ChorusHead):
    """One unit vector a modality, trained with the symmetric cross-entropy of CLIP (arXiv 2103.00020) over all pairs.

    Each modality runs through the decoder alone, so a vector can be computed and indexed without its partners.
    """

    def __init__(self, config: ChorusConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.projections = nn.ModuleDict(
            {name: nn.Linear(hidden_size, config.projection_dim, bias=False) for name in config.modalities}
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, 2.6592)

    def _embed(self, name: str, hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        pooled = pool_tokens(hidden_BSD, mask_BS, self.config.text_config.is_causal)
        return F.normalize(self.projections[name](pooled), dim=-1)

    def _decode(self, name: str, mask_BS: Tensor | None, **inputs: Any) -> tuple[Tensor, Routing]:
        """Unit vectors, and the routing if it was asked for."""
        decoded = self.model.language_model(attention_mask=mask_BS, **inputs)
        return self._embed(name, decoded.last_hidden_state, mask_BS), decoded.router_logits or ()

    def _decode_tokens(self, name: str, tokens_BSD: Tensor, mask_BS: Tensor, **kwargs: Any) -> tuple[Tensor, Routing]:
        modality_BS = torch.full(tokens_BSD.shape[:2], MODALITY_IDS[name], device=tokens_BSD.device)
        return self._decode(name, mask_BS, inputs_embeds=tokens_BSD, mm_token_type_ids=modality_BS, **kwargs)

    def _decode_images(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Routing]:
        tokens = self.model.get_image_features(pixel_values).pooler_output
        mask = torch.ones_like(tokens[..., 0], dtype=torch.long)
        return self._decode_tokens("image", tokens, mask, **kwargs)

    def _decode_audio(
        self, input_features: Tensor, input_features_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Routing]:
        pieces = self.model.get_audio_features(input_features, input_features_mask).pooler_output
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(p[:, 0], dtype=torch.long) for p in pieces], True)
        return self._decode_tokens("audio", nn.utils.rnn.pad_sequence(pieces, True), mask, **kwargs)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Unit vectors `(B, projection_dim)` of texts without placeholders."""
        return self._decode("text", attention_mask, input_ids=input_ids, **kwargs)[0]

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Unit vectors `(images, projection_dim)`."""
        return self._decode_images(pixel_values, **kwargs)[0]

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Unit vectors `(windows, projection_dim)`."""
        return self._decode_audio(input_features, input_features_mask, **kwargs)[0]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: Tensor | None = None,
        return_loss: bool = True,
        num_items_in_batch: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ChorusContrastiveOutput:
        """Embed what is given; row i of every modality belongs together.

        Args:
            input_ids, attention_mask: `(B, S)`, texts without placeholders.
            pixel_values: `(B, C, H, W)`, one image a sample.
            input_features, input_features_mask: `(B, frames, mel bins)` and `(B, frames)`, one clip a sample.

        Raises:
            ValueError: the modalities given have different numbers of rows.
        """
        if kwargs.pop("output_compute", False):
            raise ValueError("output_compute=True is for models that run once a forward; this one runs once a modality")
        if self._counts_choices():
            kwargs["output_router_logits"] = True
        decoded: dict[str, tuple[Tensor, Routing]] = {}
        if input_ids is not None:
            decoded["text"] = self._decode("text", attention_mask, input_ids=input_ids, **kwargs)
        if pixel_values is not None:
            decoded["image"] = self._decode_images(pixel_values, **kwargs)
        if input_features is not None:
            decoded["audio"] = self._decode_audio(input_features, input_features_mask, **kwargs)
        embeds = {name: vectors for name, (vectors, _) in decoded.items()}
        routing = tuple(layer for _, layers in decoded.values() for layer in layers)
        sizes = {name: len(vectors) for name, vectors in embeds.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"contrastive batches need one row of each modality a sample, got {sizes}")

        logits, losses = {}, []
        for left, right in combinations(embeds, 2):
            scores = embeds[left] @ embeds[right].T * self.logit_scale.exp().clamp(max=100.0)
            logits[f"{left}-{right}"] = scores
            target = torch.arange(len(scores), device=scores.device)
            losses.append((F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2)
        loss = torch.stack(losses).mean() if losses and return_loss else None
        return ChorusContrastiveOutput(
            loss=loss,
            text_embeds=embeds.get("text"),
            image_embeds=embeds.get("image"),
            audio_embeds=embeds.get("audio"),
            logits_per_pair=logits,
            router_logits=routing or None,
        )
