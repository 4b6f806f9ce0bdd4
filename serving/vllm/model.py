"""The model class that vLLM runs: our own modules, with keys and values in vLLM's paged cache.

Unusual here:
- the tokens of all requests of a step lie one behind the other, as one row of a batch; only attention must know which
  belong together, and that is vLLM's own layer;
- weights are loaded by `from_pretrained`, which knows what they must look like; vLLM's loader brings none.

Shape suffixes: T tokens of all requests, H heads, C head size, D hidden size.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from vllm.model_executor.layers.attention import Attention as PagedAttention
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import _merge_multimodal_embeddings, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.serving.vllm.media import ChorusMediaInfo, ChorusMediaProcessor, EmptyMedia

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PAGED = "chorus_vllm_paged"


def paged_attention(
    module: nn.Module, query_1HTC: Tensor, key_1GTC: Tensor, value_1GTC: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: vLLM's layer writes the keys into its cache and reads all of each request.

    No mask comes here, and none is needed: transformers makes none for a function whose masks it does not know.
    """
    states = (states.squeeze(0).transpose(0, 1).flatten(1) for states in (query_1HTC, key_1GTC, value_1GTC))
    paged: Any = module.paged
    return paged(*states).unflatten(-1, (-1, query_1HTC.shape[-1])).unsqueeze(0), None


AttentionInterface.register(PAGED, paged_attention)


@MULTIMODAL_REGISTRY.register_processor(ChorusMediaProcessor, info=ChorusMediaInfo, dummy_inputs=EmptyMedia)
class PagedChorus(nn.Module, SupportsMultiModal):
    """`ChorusForConditionalGeneration` in vLLM."""

    # A token's banks and projections depend on its modality, which its id tells.
    requires_raw_input_tokens = True

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = ""):
        super().__init__()
        served: Any = vllm_config.model_config
        self.model = ChorusForConditionalGeneration.from_pretrained(
            served.model, revision=served.revision, config=served.hf_config, dtype=served.dtype
        )
        self.model.model.language_model.set_attn_implementation(PAGED)
        config = self.model.config.text_config
        for layer in self.model.model.language_model.layers:
            attention = layer.self_attn
            attention.paged = PagedAttention(
                num_heads=config.num_attention_heads,
                head_size=config.head_dim,
                scale=attention.scaling,
                num_kv_heads=config.num_key_value_heads,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=attention.sliding_window,
                prefix=maybe_prefix(prefix, f"layers.{attention.layer_idx}.self_attn.paged"),
            )
        # What `generate` reads from the saved settings, which vLLM passes to no model.
        saved = self.model.generation_config
        self.suppressed = list(saved.suppress_tokens or ())
        threshold = getattr(saved, "skip_threshold", None)
        self.options = {} if threshold is None else {"skip_threshold": threshold}

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return {"image": "<image>", "audio": "<audio>"}[modality]

    def get_language_model(self) -> "PagedChorus":
        return self

    def embed_multimodal(self, **media: Any) -> list[Tensor]:
        """The tokens `(tokens, D)` of each image, or of each clip."""
        pixel_values, clips, masks = (media.get(n) for n in ("pixel_values", "input_features", "input_features_mask"))
        tokens: list[Tensor] = []
        if pixel_values is not None:
            tokens.extend(self.model.get_image_features(pixel_values).pooler_output)
        if clips is not None:
            assert masks is not None
            # One by one: clips differ in windows and frames.
            for features, mask in zip(clips, masks, strict=True):
                tokens.append(torch.cat(list(self.model.get_audio_features(features, mask).pooler_output)))
        return tokens

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embeddings `(T, D)` of the words, with tokens of images and clips in the places that vLLM marks."""
        embeds = self.model.get_input_embeddings()(input_ids)
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            return embeds
        return _merge_multimodal_embeddings(embeds, multimodal_embeddings, is_multimodal)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states `(T, D)`."""
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model.model.language_model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            mm_token_type_ids=self.model.model.modality_ids(input_ids.unsqueeze(0)),
            use_cache=False,
            **self.options,
        ).last_hidden_state.squeeze(0)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden_states)
        # As in `generate`: a generated placeholder would stand for an image or a clip that does not exist.
        logits[:, self.suppressed] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Nothing is left to load; `weights` are never read from their files."""
        return {name for name, _ in self.named_parameters()}
